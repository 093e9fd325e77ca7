"""What the tests share: the program, run the way a user starts it, and small models and texts."""

import contextlib
import csv
import filecmp
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from argparse import Namespace
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
MAIN = str(ROOT / "main.py")
DATASETS = str(ROOT / "datasets.py")
sys.path.insert(0, str(ROOT))

# The folder in which compiled code is kept, for commands whose home is another.
CACHES = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
# Commands buffer what they print, and keep what they have compiled, as a user's do.
os.environ.pop("PYTHONUNBUFFERED", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# No test reaches the network: nobody listens at this port. Where there is none, a name that
# cannot be resolved would cost 5 s.
os.environ |= {
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1,localhost",
}

# Tests of functions are about the CPU; with --gpu, a Mac's products are float32, too.
os.environ["MLX_ENABLE_TF32"] = "0"
INITIAL = dict(os.environ)  # that of each command; fast.py sets some variables for this process
# Before any test imports MLX, which takes the BLAS that is loaded before it.
import main  # noqa: E402
import mlx.core as mx  # noqa: E402
from forkserver import default_signals  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from support.flags import FLAGS  # noqa: E402
from support.runs import checkpoints_in, newest_first  # noqa: E402

mx.set_default_device(mx.cpu)  # a Mac's is its GPU

TINY = (
    "--eval_tokens 100 "  # scoring a whole validation text would be half of a run
    "--dim 16 --num_heads 2 --num_blocks 2 "
    "--context_size 8 --batch_size 4 --sample_tokens 8"
).split()
WORDS = "the quick brown fox of the company jumps over a lazy dog".split()


def line_of_words(i):
    """Line i of TEXT: the words from one of them on, and then the first few."""
    words = WORDS[i % 5 :] + WORDS[: i % 7]
    return " ".join(words) + " — señor\n"


TEXT = "".join(map(line_of_words, range(400)))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers():
    """The workers of `-n auto`: one more than cores, as many tests wait for processes."""
    return 1 + os.cpu_count()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """All tests of a file on one worker: what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def start(*arguments, env=None, program=(MAIN,), **options):
    """Starts `python main.py *arguments`, or another `program`.

    env: variables beside those of INITIAL; options: of Popen.
    """
    defaults = {
        "preexec_fn": default_signals,
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "errors": "surrogateescape",
    }
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.Popen(command, env=INITIAL | (env or {}), **defaults | options)


def wait_for(process, words):
    """Reads the process's stdout up to a line that holds `words`."""
    for line in process.stdout:
        if words in line:
            return line
    said = process.stderr and process.stderr.read()
    raise AssertionError(f"{words!r} never came: {said}")


def interrupt(process, number=signal.SIGINT):
    """Sends a training a signal, upon which it saves and leaves; returns (stdout, stderr)."""
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    return out, err


@functools.cache
def fork_server(program, variables):
    """tests/forkserver.py for one program: a run begins 0.2 s earlier than in its own Python.

    variables: of its environment, ((name, value), ...).
    """
    server = [ROOT / "tests" / "forkserver.py"]
    env = dict(variables)
    return start(program, program=server, env=env, stdin=subprocess.PIPE, stderr=None)


def run_in_fork(server, path, arguments, input, cwd, env):
    """Runs `python path *arguments` to its end: its exit status, stdout and stderr.

    path: of the server's program, or of a copy of which only main.py was edited.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdin = Path(folder, "stdin")
        stdout = Path(folder, "stdout")
        stderr = Path(folder, "stderr")
        stdin.write_text(input or "", errors="surrogateescape")
        request = {
            "path": path,
            "arguments": arguments,
            "cwd": cwd or os.getcwd(),
            "env": env,
            "streams": [stdin, stdout, stderr],
        }
        print(json.dumps(request, default=str), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        out = stdout.read_text(errors="surrogateescape")
        err = stderr.read_text(errors="surrogateescape")
        return status, out, err


def is_edited_alone(path):
    """Whether a file is a copy of main.py, edited or not, with all others beside it as they are."""
    files = [*ROOT.glob("support/*.py"), *ROOT.glob("extras/**/*.py"), *ROOT.glob("extras/*/*.c")]
    names = ["datasets.py", *(str(each.relative_to(ROOT)) for each in files)]
    same, _, _ = filecmp.cmpfiles(ROOT, path.parent, names, shallow=False)
    return path.name == "main.py" and same == names


# Variables that Python, or a module that a server has imported, reads when it starts.
READ_AT_START = re.compile("PYTHON|LC_|HOME|PATH|TMPDIR|XDG_|DISABLE_FAST")
SURVIVES_A_FORK = sys.platform == "linux"  # on macOS neither Metal nor Accelerate does


def run(*arguments, status=0, input=None, program=(MAIN,), cwd=None, env=None, **options):
    """Runs the program to its end and returns (stdout, stderr); its exit status must be `status`.

    options: more of those of `start`, which ask for a Python of its own.
    """
    env = env or {}
    if SURVIVES_A_FORK and len(program) == 1 and not options:
        path = Path(program[0])
        at_start = tuple((name, env[name]) for name in sorted(env) if READ_AT_START.match(name))
        server = fork_server(MAIN if is_edited_alone(path) else str(path), at_start)
        ended, out, err = run_in_fork(server, path, [*map(str, arguments)], input, cwd, env)
    else:
        if input is not None:
            options["stdin"] = subprocess.PIPE
        process = start(*arguments, program=program, cwd=cwd, env=env, **options)
        out, err = process.communicate(input, timeout=300)
        ended = process.returncode
    assert ended == status, f"status {ended}\n{out}\n{err}"
    return out, err


def load_module(path):
    """A file of Python as a module of its own, which no `import` finds."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_extra(name, *arguments, **options):
    """Runs `python -m extras.NAME *arguments`, as `run` does."""
    program = ["-m", f"extras.{name}"]
    if SURVIVES_A_FORK:
        return run(*program, *arguments, **options)  # which the forks of main.py know
    env = {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return run(*arguments, program=program, env=env, **options)


def copy_program(folder, edits=None):
    """Copies the program into a new folder, with {old: new} in main.py; returns main.py's path."""
    for package in ("support", "extras"):
        shutil.copytree(ROOT / package, folder / package)
    for program in (MAIN, DATASETS):
        shutil.copy(program, folder)
    for old, new in (edits or {}).items():
        edit(folder, old, new)
    return folder / "main.py"


def edit(folder, old, new):
    """Replaces a text in a folder's main.py, where it stands once."""
    path = folder / "main.py"
    source = path.read_text()
    assert source.count(old) == 1, old
    path.write_text(source.replace(old, new))


def on_gpu(*arguments, **options):
    """Runs `python main.py *arguments --gpu`, or a program in extras/, with a pretended GPU."""
    return run(*arguments, "--gpu", program=[ROOT / "tests" / "pretended_gpu.py"], **options)


def write_script(path, lines):
    """Makes a program of these lines for a shell, as a compiler that fails."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


class Server(ThreadingHTTPServer):
    """A server whose clients may hang up."""

    def handle_error(self, request, address):
        """Prints no traceback: in Python 3.11, that parses code, in two threads at once."""


@contextlib.contextmanager
def serving(handler):
    """A server on the loopback address; its `url` says where it is."""
    with Server(("127.0.0.1", 0), handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


def ids(save_dir):
    """The ids of the checkpoints of all runs in a folder, the one saved last first."""
    return [checkpoint.id for checkpoint in saved(save_dir)]


def run_folders(save_dir):
    """The folders of the runs in a folder, by name."""
    return sorted({path.parent for path in Path(save_dir).glob("*/*.safetensors")})


def run_folder(save_dir):
    """The folder of the only run in a folder."""
    [folder] = run_folders(save_dir)
    return folder


def read_record(metadata_path):
    """What the record of a checkpoint says, as a dict."""
    data = metadata_path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return json.loads(json.loads(header)["__metadata__"]["record"])


def saved(save_dir, run="*"):
    """The checkpoints of one or all runs in a folder, the one saved last first."""
    found = []
    for folder in Path(save_dir).glob(run):
        found += checkpoints_in(folder)
    return newest_first(found)


def newest(save_dir):
    """The checkpoint that was saved last in a folder."""
    return saved(save_dir)[0]


def begin(*line, **options):
    """Types a command that trains: the run's name, where it began, and what was said."""
    out, err = run(*line, **options)
    name, iteration = re.search(r"^run +(\S+), from iteration ([\d,]+) ", out, re.M).groups()
    return name, int(iteration.replace(",", "")), out + err


def log_rows(save_dir, split=None):
    """The rows in the log of the only run in a folder, or those of one split, as dicts."""
    return rows_of(run_folder(save_dir) / "log.csv", split)


def rows_of(path, split=None):
    """The same for the log at a path: {name: number}, and the split as text."""
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            numbers = {"split": row.pop("split")}
            for name, text in row.items():
                if text:
                    numbers[name] = json.loads(text)
            rows.append(numbers)
    return [row for row in rows if split in (None, row["split"])]


LINES = "".join(
    f"line {i}: the quick brown fox — jümps over {i * i} lazy dogs\n" for i in range(600)
)


def write_text(folder, text=LINES):
    """A UTF-8 file to train on."""
    path = folder / "text.txt"
    path.write_text(text)
    return path


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@pytest.fixture
def line(text, tmp_path):
    """A command that trains a small model on that text, and saves it in the test's own folder."""
    return ["--text", text, *TINY, "--save_dir", tmp_path]


def flags(**values):
    """What functions that take flags read: these values, and the defaults of all others."""
    return Namespace(**FLAGS.defaults | values, explicit=values)


def documents_of(split):
    """The documents of a split in bytes: its texts between end tokens."""
    tokens = np.minimum(split.tokens, 0xFF)  # a byte that is in no text
    return [text.decode() for text in bytes(tokens.astype(np.uint8)).split(b"\xff")]


def make_model(context_size=8, vocab_size=31, seed=0, **values):
    """A small model with every weight random, those of the norms too: no part does nothing."""
    shape = dict(num_blocks=2, dim=16, num_heads=4, num_kv_heads=2, mlp="relu2", mlp_dim=24)
    config = main.Config(vocab_size, context_size, **shape | values)
    model = main.LanguageModel(config)
    random = np.random.default_rng(seed)
    weights = []
    for name, weight in tree_flatten(model.parameters()):
        mean, deviation = (1, 0.3) if weight.ndim == 1 else (0, 0.5)
        value = random.normal(mean, deviation, weight.shape)
        weights.append((name, mx.array(value.astype(np.float32))))
    model.load_weights(weights)
    return model


def arrays(tree):
    """The arrays of a tree or a model, {name: NumPy array in float64}."""
    if hasattr(tree, "parameters"):
        tree = tree.parameters()
    return {name: np.array(array, np.float64) for name, array in tree_flatten(tree)}


def assert_equal(weights, expected, **tolerances):
    """Both are {name: array}, of the same names and, to rounding, of the same values."""
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, expected[name], err_msg=name, **tolerances)


@pytest.fixture(scope="session")
def first_base(tmp_path_factory):
    """A folder with one checkpoint, 20 steps old."""
    folder = tmp_path_factory.mktemp("base")
    schedule = ["--learning_rate", 0.01, "--lr_warmup", 5, "--num_iters", 20]
    line = ["--text", write_text(folder), *TINY, "--mlp", "swiglu", *schedule]
    run(*line, "--save_dir", folder / "lm")
    return folder / "lm"


@pytest.fixture
def base(first_base, tmp_path):
    """A copy of that folder, and the checkpoint's id."""
    folder = shutil.copytree(first_base, tmp_path / "lm")
    return folder, ids(folder)[0]


def train_small(folder, tokenizer):
    """A folder with a small model and without the text it was trained on."""
    path = write_text(folder, TEXT)
    schedule = ["--learning_rate", 0.01, "--lr_warmup", 10, "--num_iters", 100]
    run("--text", path, *TINY, "--tokenizer", tokenizer, *schedule, "--save_dir", folder / "lm")
    path.unlink()
    return folder / "lm"


@pytest.fixture(scope="session")
def word_model(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("word"), "word")


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("byte"), "byte")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with two runs of a byte model that has learnt a little."""
    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder, "the quick brown fox jumps over the lazy dog\n" * 400)
    line = ["--text", text, *TINY, "--context_size", 32, "--save_dir", folder / "lm"]
    line += ["--learning_rate", 0.01, "--lr_warmup", 5, "--num_iters", 60, "--steps_per_eval", 20]
    for seed in (1, 2):
        run(*line, "--seed", seed)
    return folder / "lm"


@pytest.fixture(params=["word", "byte"])
def model(request):
    return request.getfixturevalue(f"{request.param}_model")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in place of the files they would be written to."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    return drawn
