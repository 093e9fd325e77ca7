"""What any command-line program needs: errors, a start and an end, lines on a terminal."""

import os
import sys

FOLDER = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # the project's
MODULES = "numpy mlx requests urllib3 tokenizers tqdm yaml matplotlib huggingface_hub".split()
MODULES += sys.stdlib_module_names

# Before one is imported that a file or a folder beside main.py hides:
for entry in sorted(os.scandir(FOLDER), key=lambda entry: entry.name):
    is_package = os.path.exists(f"{entry.path}/__init__.py")
    is_hiding = entry.name.removesuffix(".py") in MODULES or entry.name in ("main", "datasets")
    if is_hiding and (is_package or entry.name.endswith(".py")):
        print(f"{entry.path} hides the module of this name from Python: rename it", file=sys.stderr)
        sys.exit(2)

import contextlib
import functools
import importlib
import re
import signal
import threading
from pathlib import Path

HERE = Path(FOLDER)

# ---- Errors -------------------------------------------------------------------------------------


class UsageError(Exception):
    """An impossible request: reported in one line with cause and remedy, exit status 2.

    Nearly every function may raise this or RunError; run_command turns both into a line and a
    status.
    """


class RunError(Exception):
    """A failure while carrying out a valid request: reported in one line, exit status 1."""


@contextlib.contextmanager
def explain_errors(text, *errors, raises=UsageError):
    """Turns exceptions of the types `errors` (default: any) into one of the type `raises`.

    Its message, one line for the user, is `text`, which names the cause and the remedy, followed by
    the exception's own. ImportError and NameError pass, unless `errors` lists them.
    """
    expected = errors or (BaseException,)  # a panic of the package tokenizers is no Exception
    # The first three are no errors; a missing package or name is no fault of what was read.
    passed = (KeyboardInterrupt, SystemExit, GeneratorExit, ImportError, NameError)
    if errors:
        passed = ()
    try:
        yield
    except passed:
        raise
    except expected as error:
        raise raises(f"{text} ({one_line(error)})") from None


# Characters that a terminal acts on: all controls but \t and \n.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text):
    """Untrusted text, with U+FFFD for each control character on which a terminal would act."""
    return CONTROLS.sub("\ufffd", text)


def utf8(text):
    """`text` made encodable as UTF-8: surrogate pairs joined, lone ones replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def one_line(error):
    """An exception's message, or an untrusted text: on one line, printable, without passwords."""
    line = " ".join(str(error).split())
    return printable(re.sub(r"(?<=://)[^/?#\s]*@", "", line))  # what precedes a URL's host


# {a pattern in a RuntimeError of MLX that the user can fix: what to say}. The first match counts.
MLX_ERRORS = {
    r"Resource limit \(\d+\)": (
        "more arrays at once than Metal allows: give fewer --num_blocks, or --grad_checkpoint"
    ),
    "(?i)malloc|out of memory|insufficient memory": (
        "out of memory: give a smaller --batch_size or --context_size"
    ),
    r"((cu|nvrtc)\w*\(.*\)|execution) failed|Cache thrashing": (
        "the GPU has failed: rerun the command to resume from the last checkpoint; if it fails "
        "again, give a smaller --batch_size"
    ),
    "start new thread|Resource temporarily unavailable": (
        "no thread can be started: raise the limit of processes, ulimit -u"
    ),
    "xcrun|xcode-select": (
        "MLX cannot compile for the CPU of this Mac: xcode-select --install, or add --gpu"
    ),
    r"^\[Compile|^filesystem error|^Could not load C\+\+|(load compiled .*|no) kernel": (
        "MLX cannot compile, or what it has compiled is damaged: rerun the command (if it was a "
        "signal), set XDG_CACHE_HOME to a folder of yours with free space, where programs may run, "
        "or delete ~/.cache/transformer-lm/code-*"
    ),
}


@contextlib.contextmanager
def explain_mlx_errors():
    """Raises RunError where MLX fails in this block for a reason that the user can fix."""
    try:
        yield
    except RuntimeError as error:
        reason = one_line(error)
        for pattern, line in MLX_ERRORS.items():
            if re.search(pattern, reason):
                first = re.search(r"error: .*|$", reason)[0] or reason[-200:]  # a compiler's first
                raise RunError(f"{line} ({first[:200]})") from None
        raise  # a bug in this program


# ---- Start --------------------------------------------------------------------------------------

# Whether the program that runs is one of this project, not another that imports this file.
# While Python imports extras/__init__.py for `python -m extras.NAME`, sys.argv[0] is "-m".
OUR_PROGRAMS = rf"{re.escape(str(HERE))}/(main\.py|datasets\.py|extras/.*)"
IS_PROGRAM = sys.argv[0] == "-m" or bool(re.fullmatch(OUR_PROGRAMS, os.path.realpath(sys.argv[0])))


@contextlib.contextmanager
def first_imports():
    """Imports a program's packages in this block; one that fails ends it with a one-line message.

    Before, it prepares the process: Ctrl+C, and the number of OpenBLAS's threads.
    """
    is_notebook = hasattr(sys, "ps1")
    if IS_PROGRAM and not is_notebook:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # Files on disk are valid at any time, so Ctrl+C may exit at once, without a traceback.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "18")  # idle threads spin for 2^18 cycles
    if IS_PROGRAM:  # OpenBLAS dies where no thread may start; fast.py asks for those it needs
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        yield
        mlx = sys.modules.get("mlx.core")
        if mlx and tuple(map(int, re.findall(r"\d+", mlx.__version__)[:3])) < (0, 32, 4):
            raise ImportError(f"MLX>=0.32.4 is needed, not {mlx.__version__}")
    except ImportError as error:
        if not IS_PROGRAM:
            raise
        name = os.path.basename(sys.argv[0]).replace("-m", "extras")
        print(f"{name}: {explain_import(error)}", file=sys.stderr)
        sys.exit(2)


def explain_import(error):
    """An ImportError's cause and remedy, in one line."""
    reason = one_line(error)
    library = re.search(r"(/\S+): version `(\w+)_\S+' not found", reason)
    if library:
        remedy = "MLX needs glibc 2.35 or newer"
        if library[2] != "GLIBC":
            remedy = "take its folder out of LD_LIBRARY_PATH"
        return f"{library[1]} is too old: {remedy}"
    return (
        f"{reason[:300]}: activate the environment (. .venv/bin/activate), or make one: "
        "pip install -r requirements.txt, or uv run python main.py (Windows: in WSL)"
    )


with first_imports():
    from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # tqdm's own lock starts another Python process


def format_interval(seconds, short=tqdm.format_interval):
    """Seconds as tqdm writes them, like 2:05 or 23:10:00, but from a day on like 1.5 days."""
    return short(seconds) if seconds < 86400 else f"{seconds / 86400:.1f} days"


tqdm.format_interval = staticmethod(format_interval)  # also in bars


def extra(name):
    """The module `extras.features.<name>`. Raises UsageError if its file is missing.

    The core works without extras/, whose files are imported only when needed. If the module needs
    a package that is not installed, the ModuleNotFoundError propagates.
    """
    try:
        return importlib.import_module(f"extras.features.{name}")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("extras"):
            raise
    raise UsageError(
        f"extras/features/{name}.py, or a file that it imports, is missing: "
        "copy the project's folder extras next to main.py"
    )


def has_extra(name):
    """Whether there is a file extras/features/<name>.py."""
    return (HERE / f"extras/features/{name}.py").exists()


# ---- End ----------------------------------------------------------------------------------------


def command(name):
    """A decorator for a function of a program's arguments: the function becomes the program `name`.

    Called without arguments, it takes those of the process. It returns the exit status: what the
    function returns (0 for None), 2 for a request that cannot be met, or 1 for a failure; both are
    reported in one line on stderr.
    """

    def decorate(function):
        @functools.wraps(function)
        def run(arguments=None):
            return run_command(name, function, sys.argv[1:] if arguments is None else arguments)

        return run

    return decorate


def run_command(name, function, arguments):
    """Calls `function(arguments)` and returns the exit status, see `command`."""
    if os.getpid() == 1:  # a container's first process ignores signals by default
        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signal_number, lambda signal_number, _: os._exit(128 + signal_number))
    line = None
    status = 1
    try:
        with explain_mlx_errors():
            result = function(arguments) or 0
        sys.stdout.flush()  # a full disk is noticed here at the latest
        return result
    except BrokenPipeError:  # the reader of stdout is gone, for example head
        pass
    except UsageError as error:
        line = one_line(error)
        status = 2
    except ImportError as error:  # a package that only one feature needs
        line = f"{one_line(error)}: pip install -r requirements.txt"
        status = 2
    except MemoryError as error:
        reason = one_line(error) or "out of memory"
        line = f"{reason}: give a smaller --batch_size or --context_size"
    except (RunError, OSError) as error:
        line = one_line(error)
    with contextlib.suppress(OSError):  # the status still tells of the failure
        if line is not None:
            print(f"{name}: {line}", file=sys.stderr)
    flush_or_drop(sys.stdout)
    return status


def run_program(main):
    """Runs a `command` with the arguments of the process, and exits with its status.

    First, it makes the standard streams usable: they may be closed, or unable to encode a text.
    """
    for stream_name in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream_name) is None:  # it was closed at startup
            setattr(sys, stream_name, open(os.devnull, "r+", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not those of a notebook's %run
            stream.reconfigure(errors="replace")
    sys.exit(main())


def flush_or_drop(stream):
    """Flushes a stream; if it cannot be written, drops what is in it, and what comes later."""
    try:
        stream.flush()
    except OSError:  # Python would try again at exit, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- Lines on a terminal ------------------------------------------------------------------------


def say(text, file=None):
    """Prints a line about a run; if that fails (`| head`, a full disk), the run goes on."""
    file = file or sys.stdout
    with contextlib.suppress(OSError):
        tqdm.write(text, file)
        file.flush()


def warning(text):
    """Prints a line, perhaps with untrusted text, on stderr; like `say`, it does not fail."""
    say(printable(text), sys.stderr)


def for_terminal(text):
    """Untrusted text, also a model's, for stdout: on a terminal, `printable` and without CRs."""
    if sys.stdout.isatty():
        return printable(text.replace("\r", ""))
    return text


def progress_bar(**options):
    """A bar of tqdm on a terminal, unless TQDM_DISABLE hides it."""
    # In some containers, a terminal has no width.
    if not sys.stderr.isatty() or not os.get_terminal_size(sys.stderr.fileno()).columns:
        options["disable"] = True
    return tqdm(**options)


def shorten_list(names):
    """The first five names of a list, and how many more there are."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return one_line(", ".join(names[:5])) + more


def plural(number, noun):
    """A number of things: "1 block", "2 blocks"."""
    if number != 1:
        noun += "s"
    return f"{number:,} {noun}"
