"""Whether this machine repeats results exactly: a block of text to paste into an issue.

    python -m extras.check          on its CPU
    python -m extras.check --gpu    on its GPU; after a --, flags of their model or optimizer

It takes a minute or two, or five where a GPU's kernels are compiled for the first time. It works in
a folder of its own in --save_dir, and deletes that. Runs of the recipe `first` that get SIGTERM and
then, on one core less, kill -9 must end with the SHA1 of one that is left alone. The operations of
a step and of a sample must give the same bits twenty times and, on a GPU, what the CPU gives, up to
rounding. `!!` marks what is amiss, and the last line says what was exact.
"""

# First: it chooses the BLAS before MLX takes one.
from extras.common import make_parser, read_flags, start

import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import main as core
from support.cli import HERE, RunError, UsageError, one_line
from support.device import ALONE, list_versions
from support.files import make_save_dir

REPETITIONS = 20
ROUNDING = 1e-2  # relative; products in TF32, as some GPUs make them, put Muon off by 3e-3
MAIN = HERE / "main.py"
TRAINING = (
    "--config first --num_iters 60 --lr_warmup 10 --steps_per_report 1 --steps_per_save 10 "
    "--eval_tokens 5000 --sample_tokens 0"
)
RUNS = {
    "a float32 run": "",
    "a bfloat16 run": "--dtype bfloat16 --dropout 0.1 --grad_checkpoint",
}
STRIKES = {10: signal.SIGTERM, 25: signal.SIGKILL}  # after which step, of 60
END = r"^(\d+)/\1  loss (?P<loss>\S+) .* (?P<speed>\S+ tokens/s)[\s\S]+^saved (?P<id>\w{12})"


def main(arguments):
    """Checks this machine; returns the exit status."""
    parser = make_parser("check", __doc__, "gpu")
    parser.add_argument("training", nargs="*", default=[], help="flags for the runs")
    flags = read_flags(parser, arguments)
    make_save_dir(flags.save_dir)
    versions = list_versions(flags, ALONE, core.fast)
    print(f"{platform.platform()}, Python {platform.python_version()}, {versions}\n")
    amiss = []
    with tempfile.TemporaryDirectory(prefix="check-", dir=flags.save_dir) as folder:
        for name, check, *given in list_checks(folder, flags):
            mark = "  "
            try:
                text = check(*given)
            except (OSError, RuntimeError, RunError) as error:
                mark = "!!"
                text = one_line(error)
                amiss.append(name)
            print(f"{mark} {name:<23} {text}", flush=True)
    if amiss:
        print(f"\nNot exact, or not right, here: {', '.join(amiss)}.")
        return 1
    print(f"\nExact here: {'GPU' if flags.gpu else 'CPU'}.")
    return 0


def list_checks(folder, flags):
    """Yields what to check: a name, a function, and its arguments.

    The function returns what it has found, or raises OSError, RuntimeError or RunError.
    """
    for name, *operation in list_operations():
        yield name, check_operation, *operation
    device = ["--gpu"] if flags.gpu else []
    for name, more in RUNS.items():
        line = [*f"{TRAINING} {more}".split(), "--text", MAIN, *device, *flags.training]
        yield name, check_run, line, folder


# ---- Operations ---------------------------------------------------------------------------------
def list_operations():
    """Yields what steps and samples compute: a name, a function, and its arguments' shapes."""
    states = (4, 128, 256)
    table = (2000, 256)
    heads = (4, 4, 128, 64)
    few_heads = (4, 2, 128, 64)
    tokens = mx.random.randint(0, 200, (4, 128), key=mx.random.key(7))  # most more than once
    frequencies = core.rope_frequencies(64, 10000)
    yield "hash for dropout", partial(core.hash32, mx.arange(9999, dtype=mx.uint32))
    yield "product of long rows", mx.matmul, (64, 8192), (8192, 64)
    yield "RMSNorm", nn.RMSNorm(256), states
    yield "RoPE", partial(core.rotate, frequencies=frequencies, offset=3), heads
    yield "attention", core.attend, heads, few_heads, few_heads
    yield "attention of one token", core.attend, (4, 4, 1, 64), few_heads, few_heads
    yield "embeddings", partial(embed, tokens), table
    yield "loss", partial(loss, tokens), table
    yield "norm of gradients", mx.linalg.norm, table
    yield "Muon", core.Muon(1e-3, 0).orthogonalize, states
    yield "token by chance", sample, (2, 50257)


def embed(tokens, table):
    """The embeddings of tokens in a table."""
    layer = nn.Embedding(1, 1)
    layer.weight = table
    return layer(tokens)


def loss(tokens, table):
    """The loss of a model with a table of embeddings, which are also its output layer."""
    model = core.LanguageModel(core.Config(len(table), 128, 1, 256, 4, 4, "relu2", 512))
    core.init_weights(model, 7)
    model.model.embed_tokens.weight = table
    return core.training_loss(model, tokens, tokens[:, ::-1], 1e-3)


def sample(logits):
    """Ids drawn from logits [B, V], with top-k and top-p."""
    kept = core.keep_top_p(core.keep_top_k(logits, 50), 0.9)
    return mx.random.categorical(kept, key=mx.random.key(7))


def check_operation(function, *shapes):
    """Computes an operation repeatedly, and on the CPU."""
    results = [compute(function, shapes) for _ in range(REPETITIONS)]
    with mx.stream(mx.cpu):
        expected = compute(function, shapes)
    off = np.linalg.norm(results[0] - expected) / np.linalg.norm(expected)
    distinct = len({result.tobytes() for result in results})
    text = f"{distinct} of {REPETITIONS} results distinct, {off:.0e} off the CPU's"
    if distinct == 1 and off < ROUNDING:
        return text
    raise RunError(text)


def compute(function, shapes):
    """A function's result for arguments of these shapes, and its gradients: one NumPy array."""
    random = np.random.default_rng(0)
    arguments = [mx.array(random.normal(0, 0.5, shape), mx.float32) for shape in shapes]
    results = [function(*arguments)]
    if results[0].dtype == mx.float32:
        _, gradients = mx.vjp(function, arguments, results)
        results += gradients
    return np.concatenate([np.array(result, float).ravel() for result in results])


# ---- Runs ---------------------------------------------------------------------------------------
def check_run(line, folder):
    """Trains: undisturbed, and struck."""
    whole = train([*line, "--save_dir", f"{folder}/whole"], {})
    struck = train([*line, "--save_dir", f"{folder}/struck"], STRIKES)
    text = f"loss {whole['loss']}, {whole['speed']}, {whole['id']}; struck: {struck['id']}"
    if whole["id"] == struck["id"]:
        return text
    raise RunError(text)


def hide_core():
    """Takes one of several cores from this process, which a run must not notice."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[1:] or cores)


def train(line, strikes):
    """Runs main.py until it is done; returns what it says then, a match of END.

    strikes: {step: signal} that end it before, after each of which it is run again.
    """
    command = [sys.executable, MAIN, *line]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    for step, strike in [*strikes.items(), (None, None)]:
        said = ""
        prepare = hide_core if strike == signal.SIGKILL else None
        with subprocess.Popen(command, text=True, preexec_fn=prepare, **pipes) as process:
            for text in process.stdout:
                said += text
                if text.startswith(f"{step}/"):
                    process.send_signal(strike)
    if process.returncode == 2:
        raise UsageError(said.splitlines()[-1])
    end = re.search(END, said, re.MULTILINE)
    if end is None:
        raise RunError(said.splitlines()[-1])
    return end


if __name__ == "__main__":
    start("check", main)
