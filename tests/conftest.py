"""What the tests share: the program as a subprocess, the way a user starts it, and small models and texts."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
MAIN, DATASETS = str(ROOT / "main.py"), str(ROOT / "datasets.py")
sys.path.insert(0, str(ROOT))

INITIAL = dict(os.environ)  # extras/fast.py sets some variables for its own process
# Each process that loads NumPy would spend 0.05 s of a second core on OpenBLAS's threads waiting for their first product.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import main  # noqa: E402 (before any test imports MLX, which takes the BLAS that is loaded before it)
from datasets import Span  # noqa: E402

TINY = "--dim 16 --num_heads 2 --num_blocks 2 --context_size 8 --batch_size 4 --max_tokens 8".split()
WORDS = "the quick brown fox of the company jumps over a lazy dog".split()
TEXT = "".join(" ".join(WORDS[i % 5 :] + WORDS[: i % 7]) + " — señor\n" for i in range(400))


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: long runs of the fault matrix, only with pytest -m soak")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


def start(*arguments, env=None, program=(MAIN,), **options):
    """Starts `python main.py *arguments`, or another `program`; signals have their default action even where the tests run in the background."""

    def default_signals():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = streams | {"text": True, "errors": "surrogateescape"} | options
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        env={**os.environ, **(env or {})}, preexec_fn=default_signals, **options,
    )  # fmt: skip


def environment(env):
    """This process's environment with `env` on top, but for what pytest sets for each test, and extras/fast.py when it is used."""
    own = ("PATH", "OMP_WAIT_POLICY", "OPENBLAS_CORETYPE")
    lasting = {name: value for name, value in os.environ.items() if name not in (*own, "PYTEST_CURRENT_TEST")}
    return lasting | {name: INITIAL[name] for name in own if name in INITIAL} | env


class ForkServer:
    """tests/forkserver.py for one program in one environment: a run begins 0.2 s earlier than in a Python of its own."""

    def __init__(self, program, env):
        command = [sys.executable, str(ROOT / "tests" / "forkserver.py"), program]
        self.process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, arguments, input, cwd):
        """Runs `python program *arguments` to its end; returns its exit status, stdout and stderr."""
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
            for path, content in zip(streams, (input or "", "", "")):
                path.write_text(content, errors="surrogateescape")
            request = {"arguments": arguments, "cwd": cwd or os.getcwd(), "streams": streams}
            print(json.dumps(request, default=str), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            return status, *(path.read_text(errors="surrogateescape") for path in streams[1:])


@functools.cache
def fork_server(program, env):
    return ForkServer(program, dict(env))


def run(*arguments, status=0, input=None, program=(MAIN,), cwd=None, env=None, **options):
    """Runs the program to its end and returns (stdout, stderr); its exit status must be `status`.

    options: more of those of `start`, which ask for a Python of its own.
    """
    is_file = len(program) == 1
    survives_a_fork = sys.platform == "linux"  # on macOS neither Metal nor Accelerate does
    if survives_a_fork and is_file and not options:
        server = fork_server(str(program[0]), tuple(sorted(environment(env or {}).items())))
        ended, out, err = server.run([*map(str, arguments)], input, cwd)
    else:
        if input is not None:
            options["stdin"] = subprocess.PIPE
        process = start(*arguments, program=program, cwd=cwd, env=env, **options)
        out, err = process.communicate(input, timeout=300)
        ended = process.returncode
    assert ended == status, f"status {ended}\n{out}\n{err}"
    return out, err


def free_ports(count):
    """Ports of the loopback address that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Watched:
    """A file that a save writes, with a `write` that tests can make fail; `watch_files` puts it in the place of open."""

    def __init__(self, path):
        self.file = open(path, "wb")

    def write(self, data):
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def watch_files(path, mode="r", **options):
    return Watched(path) if mode == "wb" else open(path, mode, **options)


def whole(path, **options):
    """A Span of the whole file."""
    return Span(Path(path), 0, os.path.getsize(path), **options)


def ids(folder):
    """The ids of the checkpoints in a folder, the one written last first."""
    paths = sorted(Path(folder).glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [path.stem for path in paths]


@pytest.fixture
def text(tmp_path):
    """A UTF-8 file of 600 lines to train on."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: the quick brown fox — jümps over {i * i} lazy dogs\n" for i in range(600)))
    return path


def flags(**values):
    """The flags of an empty command line, with these values instead of the defaults."""
    return main.resolve(Namespace(**main.DEFAULTS | values))


class Script:
    """A model whose logits [V] depend on the last token alone: `rows`, a function of it."""

    def __init__(self, rows, context_size=8):
        self.rows = rows
        self.config = Namespace(context_size=context_size, num_kv_heads=1, head_dim=2)
        self.model = Namespace(layers=[None])  # one layer, as its Cache says what is read

    def __call__(self, tokens, caches, last):
        import mlx.core as mx

        assert tokens.ndim == 2 and last <= tokens.shape[1] <= self.config.context_size
        for cache in caches:
            cache.offset = cache.offset + tokens.shape[1]
        return mx.array([[self.rows(token) for token in row[-last:]] for row in tokens.tolist()])


def nats_of(logits, targets):
    """Cross-entropy of each position in float64: logits [..., V], targets [...]."""
    logits = np.array(logits, np.float64)
    largest = logits.max(-1, keepdims=True)
    totals = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    return totals - np.take_along_axis(logits, np.asarray(targets, np.int64)[..., None], -1)[..., 0]


def loss_of(model, tokens, targets, weights=1.0, noise=()):
    """The weighted sum of a model's cross-entropies in nats, computed as the training step does."""
    hidden = model.model(tokens, noise=noise)  # [B, L, D]
    return main.cross_entropy(hidden, model.head, targets, weights)


@pytest.fixture
def set_streams(monkeypatch):
    """A function that sets how many streams share the rows of a batch, however small it is."""
    from extras import fast

    def set_streams(count):
        monkeypatch.setattr(fast, "count_streams", lambda rows, context_size: min(rows, count))

    return set_streams


@pytest.fixture
def base(tmp_path, text):
    """A folder with one checkpoint, 20 steps old, and its id."""
    line = [*TINY, "--mlp", "swiglu", "--learning_rate", 0.01, "--lr_warmup", 5, "--num_iters", 20]
    run("--text", text, *line, "--save_dir", tmp_path / "lm")
    return tmp_path / "lm", ids(tmp_path / "lm")[0]


def train_small(folder, tokenizer):
    """A folder with a small model and without the text it was trained on."""
    path = folder / "text.txt"
    path.write_text(TEXT)
    line = [*TINY, "--tokenizer", tokenizer, "--learning_rate", 0.01, "--lr_warmup", 10, "--num_iters", 100]
    run("--text", path, *line, "--save_dir", folder / "lm")
    path.unlink()
    return folder / "lm"


@pytest.fixture(scope="session")
def word_model(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("word"), "word")


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("byte"), "byte")


@pytest.fixture(params=["word", "byte"])
def model(request):
    return request.getfixturevalue(f"{request.param}_model")
