"""Runs a program as often as it is asked to, each time in a fork of this process.

    python tests/forkserver.py PROGRAM

This process has imported what the program imports, which takes most of the time of a short run.
All else is as in `python PROGRAM`: the fork runs the file as __main__, with arguments, working
directory and standard streams of its own, and ends as Python ends, but for freeing the memory.
tests/conftest.py asks: one JSON line on stdin for each run, answered by its exit status on stdout.
"""

import atexit
import ctypes
import gc
import importlib
import itertools
import json
import os
import signal
import sys
import threading
import types
from pathlib import Path

PROGRAM = Path(sys.argv[1])
TIMEOUT = 300  # seconds


def open_streams(paths):
    """Puts files in the place of stdin, stdout and stderr, opened as Python opens its own."""
    for number, path in enumerate(paths):
        name = ("stdin", "stdout", "stderr")[number]
        if name == "stdin":
            mode = "r"
            access = os.O_RDONLY
        else:
            mode = "w"
            access = os.O_WRONLY | os.O_TRUNC
        file = os.open(path, access)
        os.dup2(file, number)
        os.close(file)
        buffering = -1
        if name == "stderr":
            buffering = 1  # by the line
        old = getattr(sys, name)
        new = open(
            number,
            mode,
            buffering,
            encoding=old.encoding,
            errors=old.errors,
            closefd=False,
        )
        setattr(sys, name, new)


def prepare(request):
    """Makes a fork's signals, folder, streams and arguments those of the run that is asked for."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(TIMEOUT)
    os.chdir(request["cwd"])
    open_streams(request["streams"])
    sys.argv = [str(PROGRAM), *request["arguments"]]


def serve():
    """Answers until stdin ends; returns True in each fork, where the program is to be run."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            prepare(request)
            return True
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return False


def address_of(matrix):
    return matrix.ctypes.data_as(ctypes.c_void_p)


def generate_kernels():
    """Makes oneDNN generate its kernels once for all forks.

    Each of them would need 20 ms for that. By one thread alone: a pool would not survive a fork.
    """
    fast = sys.modules.get("extras.fast")
    if fast is None or fast.forwarder is None:
        return
    size = 64
    matrix = numpy.ones((size, size), numpy.float32)
    result = numpy.ones((size, size), numpy.float32)
    # The names that cblas.h gives these numbers: CblasRowMajor, CblasNoTrans, CblasTrans.
    row_major = 101
    plain = 111
    transposed = 112
    for left, right in itertools.product((plain, transposed), repeat=2):
        fast.forwarder.cblas_sgemm(
            *(row_major, left, right),
            *(size, size, size),
            ctypes.c_float(1),
            *(address_of(matrix), size),
            *(address_of(matrix), size),
            ctypes.c_float(0),
            *(address_of(result), size),
        )


def execute(code):
    """Runs the program as __main__; returns its exit status if it ends by sys.exit(number)."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = str(PROGRAM)
    try:
        exec(code, module.__dict__)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        return end.code
    return 0


def leave(status):
    """What Python does at the end, but for freeing the memory.

    In a fork that would copy all of it first.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.path[0] = str(PROGRAM.parent)
    importlib.import_module(PROGRAM.stem)  # first: it chooses the kernels of NumPy's OpenBLAS
    import numpy.random  # which the programs import when they need it

    generate_kernels()
    del sys.modules[PROGRAM.stem]  # a fork has its own, which is __main__
    code = compile(PROGRAM.read_bytes(), str(PROGRAM), "exec")
    gc.freeze()  # else each fork's first collection copies what it shares with this process
    if serve():
        leave(execute(code))
