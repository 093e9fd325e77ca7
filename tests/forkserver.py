"""Runs a program as often as it is asked to, each time in a fork of this process, which has imported what the program imports.

    python tests/forkserver.py PROGRAM

That takes most of the time of a short run. All else is as in `python PROGRAM`: the fork runs the file as __main__, with
arguments, working directory and standard streams of its own, and ends as Python ends, but for freeing the memory.
tests/conftest.py asks: one JSON line on stdin for each run, answered by its exit status on stdout.
"""

import atexit
import ctypes
import gc
import importlib
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
    for number, (name, path) in enumerate(zip(("stdin", "stdout", "stderr"), paths)):
        is_input = name == "stdin"
        file = os.open(path, os.O_RDONLY if is_input else os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
        settings = {"encoding": getattr(sys, name).encoding, "errors": getattr(sys, name).errors}
        buffering = 1 if name == "stderr" else -1
        setattr(sys, name, open(number, "r" if is_input else "w", buffering, closefd=False, **settings))


def serve():
    """Answers until stdin ends; returns True in each fork, where the program is to be run."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.alarm(TIMEOUT)
            os.chdir(request["cwd"])
            open_streams(request["streams"])
            sys.argv = [str(PROGRAM), *request["arguments"]]
            return True
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return False


def generate_kernels():
    """Makes oneDNN generate its kernels once for all forks, each of which would need 20 ms for them.

    By one thread alone: a pool of threads would not survive a fork.
    """
    fast = sys.modules.get("extras.fast")
    if fast is None or fast.forwarder is None:
        return
    matrix = numpy.ones((64, 64), numpy.float32)
    result = numpy.ones((64, 64), numpy.float32)
    given = [matrix.ctypes.data_as(ctypes.c_void_p), 64]
    for names in ((111, 111), (111, 112), (112, 111), (112, 112)):  # of cblas: not transposed, transposed
        sizes = (64, 64, 64, ctypes.c_float(1), *given, *given, ctypes.c_float(0))
        fast.forwarder.cblas_sgemm(101, *names, *sizes, result.ctypes.data_as(ctypes.c_void_p), 64)


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
    """What Python does at the end, but for freeing the memory: in a fork that would copy all of it first."""
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
