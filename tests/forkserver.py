"""Runs a program as often as it is asked to, each time in a fork of this process.

    python tests/forkserver.py PROGRAM

This process has imported what the program imports, which takes most of the time of a short run.
All else is as in `python PROGRAM`: the fork runs the file as __main__, with arguments, working
directory and standard streams of its own, and ends as Python ends, but for freeing the memory. It
may also run another file, if that imports the same.
tests/conftest.py asks: one JSON line on stdin for each run, answered by its exit status on stdout.
tests/nightly/inject_faults.py and fuzz_checkpoints.py have a Program in their own process.
"""

import argparse
import atexit
import ctypes
import gc
import importlib
import itertools
import json
import os
import runpy
import signal
import sys
import threading
import traceback
import types
from pathlib import Path

TIMEOUT = 300  # seconds


def default_signals():
    """Gives signals their default action: what runs in the background ignores some."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Program:
    """A Python program, ready to be run in forks of this process.

    path: its file. Nothing may have been computed by MLX here: that does not survive a fork.
    """

    def __init__(self, path):
        self.path = Path(path).resolve()
        sys.path[0] = str(self.path.parent)
        typed, sys.argv = sys.argv, [str(self.path)]  # what is imported is a program's
        importlib.import_module(self.path.stem)  # first: it chooses a BLAS
        sys.argv = typed
        import numpy.random  # noqa: F401 (which the programs import when they need it)

        generate_kernels()
        code = sys.modules["support.code"]
        for source in code.LOADED_SOURCES.values():
            code.hash_of_code(source)  # which keeps it
        del sys.modules[self.path.stem]  # a fork has its own, which is __main__
        self.code = compile(self.path.read_bytes(), str(self.path), "exec")
        gc.freeze()  # else each fork's first collection copies what it shares with this process

    def start(self, arguments, streams, cwd=".", prepare=None, path=None, env=None):
        """Begins `python PROGRAM arguments` in a fork; returns its process id.

        Arguments that begin with -m MODULE begin that, from the program's folder. streams: the
        files in the place of stdin, stdout and stderr; prepare: what the fork calls before the
        program begins; path: another file to be run in the place of the program's; env: more
        variables of the environment.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            if path and Path(path) != self.path:
                self.become(path)
            os.environ.update(env or {})
            self.be_one(arguments, streams, cwd)
            if prepare:
                prepare()
            self.execute()
            status = 0
        except BaseException as end:
            if isinstance(end, SystemExit) and isinstance(end.code, int):
                status = end.code
            else:
                traceback.print_exc()
        leave(status)

    def run(self, *arguments, **options):
        """`start`, to its end; returns the exit status, or minus the signal that killed it."""
        _, status = os.waitpid(self.start(*arguments, **options), 0)
        return os.waitstatus_to_exitcode(status)

    def become(self, path):
        """Makes another file the program of this fork."""
        self.path = Path(path)
        self.code = None
        sys.path[0] = str(self.path.parent)
        for name in ("cli", "code", "flags"):
            sys.modules[f"support.{name}"].HERE = self.path.parent
        if "extras" in sys.modules:
            sys.modules["extras"].__path__[:] = [str(self.path.parent / "extras")]

    def be_one(self, arguments, streams, cwd):
        """Makes a fork's signals, folder, streams and arguments those of a new process."""
        default_signals()
        signal.alarm(TIMEOUT)
        os.chdir(cwd)
        open_streams(streams)
        sys.argv = [str(self.path), *arguments]

    def execute(self):
        """Runs the program, or the module behind -m, as __main__."""
        if sys.argv[1:2] == ["-m"]:
            del sys.argv[:2]  # runpy puts the path of the module in the place of the first
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            return
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        module.__file__ = str(self.path)
        code = self.code or compile(self.path.read_bytes(), str(self.path), "exec")
        exec(code, module.__dict__)


def open_streams(paths):
    """Puts files in the place of stdin, stdout and stderr, as buffered as Python's own."""
    for descriptor, path in enumerate(paths):
        with open(path, "w" if descriptor else "r") as file:
            os.dup2(file.fileno(), descriptor)
    # Those of this process may have read ahead, or be files, in which one can seek.
    sys.stdin = reopen(sys.stdin, 0)
    sys.stdout = reopen(sys.stdout, 1, mode="w")
    sys.stderr = reopen(sys.stderr, 2, mode="w", buffering=1)


def reopen(stream, descriptor, **options):
    options |= {"encoding": stream.encoding, "errors": stream.errors}
    return open(descriptor, closefd=False, **options)


def generate_kernels():
    """Makes oneDNN generate its kernels once for all forks.

    Each of them would need 20 ms for that. By one thread alone: a pool would not survive a fork.
    """
    fast = sys.modules.get("extras.features.fast")
    if fast is None or fast.forwarder is None:
        return
    size = 64
    zeros = (ctypes.c_float * size**2)()
    one = ctypes.c_float(1)
    # As cblas.h numbers them: CblasRowMajor is 101, CblasNoTrans 111, CblasTrans 112.
    for left, right in itertools.product((111, 112), repeat=2):
        shapes = [101, left, right, size, size, size]
        factors = [one, zeros, size, zeros, size]
        fast.forwarder.cblas_sgemm(*shapes, *factors, one, zeros, size)


def leave(status):
    """What Python does at the end, but for freeing the memory.

    In a fork that would copy all of it first.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def case_parser(doc):
    """A parser of the flags that all programs that play cases have; doc: the program's."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--only", metavar="CASE", help="this case alone, which keeps its folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1])
    return parser


def play_all(play, cases, jobs, ends_at_first=False):
    """Calls play(name) for the name of each case, in several processes; prints what it raises.

    Returns the number of cases that failed: in which it raised anything.
    """
    sys.stdout.flush()
    for job in range(jobs):
        if not os.fork():
            failures = play_share(play, cases[job::jobs], ends_at_first)
            os._exit(min(failures, 99))
    failures = 0
    for _ in range(jobs):
        _, status = os.wait()
        failures += os.waitstatus_to_exitcode(status)
    print(f"{len(cases)} cases, {failures} failures")
    return failures


def play_share(play, cases, ends_at_first):
    """Plays cases one after the other; returns the number of those that failed."""
    failures = 0
    for case in cases:
        try:
            play(case)
        except Exception:
            failures += 1
            print(f"--only {case}: {traceback.format_exc()}", flush=True)
            if ends_at_first:
                break
    return failures


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")  # apart from what a program prints when it is imported
    os.dup2(2, 1)
    program = Program(sys.argv[1])
    for line in sys.stdin:
        print(program.run(**json.loads(line)), file=answers, flush=True)
