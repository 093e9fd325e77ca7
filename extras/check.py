"""Whether this machine repeats results exactly: a block of text to paste into an issue.

    python -m extras.check          on its CPU
    python -m extras.check --gpu    and on its GPU; after a --, the flags of another model

It takes up to two minutes, works in a folder of its own in --save_dir, and deletes that. Runs of
the recipe `first` that SIGTERM and then kill -9 have struck must end with the SHA1 of one that was
left alone. The operations of a step and of a sample must give the same bits twenty times and, on a
GPU, what the CPU gives, up to rounding. `!!` marks what is amiss, and the last line says what was
exact. If the GPU was, main.py no longer calls it unverified.
"""

# First: main.py chooses the BLAS before NumPy and MLX take one.
from extras.program import make_parser, read_flags, start

import contextlib
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import main as core
from datasets import explained, make_writable, number, one_line, sync

MAIN = core.HERE / "main.py"
REPETITIONS = 20
ROUNDING = 1e-2  # relative; products in TF32, as some GPUs make them, put Muon off by 3e-3
RUNS = {
    "a float32 run": "",
    "a bfloat16 run": "--dtype bfloat16 --dropout 0.1 --grad_checkpoint",
}
LOSS_ROUNDING = 0.1  # nats, at the end of a run


def main(arguments):
    """Checks this machine; returns the exit status. Raises UsageError."""
    parser = make_parser("check", __doc__, "gpu")
    steps = number(int, 6, 999)
    parser.add_argument("--steps", type=steps, default=60, help="of each run (default: 60)")
    parser.add_argument("model", nargs="*", default=[], help="flags where it is not `first`")
    flags = read_flags(parser, arguments)
    with explained(f"cannot write to --save_dir {flags.save_dir}: name a folder of yours", OSError):
        make_writable(flags.save_dir)
    versions = core.list_versions(flags, core.SingleProcess())
    print(f"{platform.platform()}, Python {platform.python_version()}, {versions}")
    with tempfile.TemporaryDirectory(prefix="check-", dir=flags.save_dir) as folder:
        on_cpu = {}
        parts = {"system calls": check_system(folder)}
        parts["CPU"] = check_device("", folder, flags, on_cpu)
        if flags.gpu:
            parts["GPU"] = check_device("--gpu", folder, flags, on_cpu)
        amiss = print_findings(parts)
    if flags.gpu and "GPU" not in amiss:
        core.proof_of_gpu(versions).touch()
    if not amiss:
        print(f"\nExact here: {', '.join(parts)}.")
        return 0
    wrong = [f"{part} ({', '.join(names)})" for part, names in amiss.items()]
    print(f"\nNot exact, or not right, here: {', '.join(wrong)}.")
    return 1


def print_findings(parts):
    """Prints what is found, a line each; returns the names of what is amiss.

    parts: of the machine, {part: findings}; a finding is a name, a text, and whether all is right.
    """
    amiss = {}  # {part: [name, ...]}
    for part, findings in parts.items():
        print(f"\n{part}")
        for name, text, is_right in findings:
            mark = "  " if is_right else "!!"
            print(f"{mark} {name:<24} {text}", flush=True)
            if not is_right:
                amiss.setdefault(part, []).append(name)
    return amiss


def check_system(folder):
    """Makes the calls that checkpoints need and a system may lack; yields findings."""
    descriptor = os.open(folder, os.O_RDONLY)
    calls = {
        "lock of a folder": lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB),
        "sync of a folder": lambda: sync(folder),
        "/dev/fd": lambda: os.stat(f"/dev/fd/{descriptor}"),
    }
    if sys.platform == "darwin":
        calls["F_FULLFSYNC"] = lambda: fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    for name, call in calls.items():
        try:
            call()
            yield name, "works", True
        except OSError as error:
            yield name, error, False
    os.close(descriptor)


def check_device(device, folder, flags, on_cpu):
    """Yields findings about a device.

    device: --gpu, or "" for the CPU; on_cpu: what the CPU has computed, {name: result}, to which
    missing results are added.
    """
    with contextlib.nullcontext() if device else mx.stream(mx.cpu):  # --gpu's is the default
        yield from check_operations(on_cpu)
    yield from check_runs(device, folder, flags, on_cpu)


# ---- Operations ---------------------------------------------------------------------------------
def list_operations():
    """Yields what steps and samples compute: a name, a function, and its arguments' shapes."""
    states, table, logits = (4, 128, 256), (2000, 256), (2, 50257)
    heads, few_heads = (4, 4, 128, 64), (4, 2, 128, 64)
    key = mx.random.key(7)
    tokens = mx.random.randint(0, 200, (4, 128), key=key)  # most of them more than once
    frequencies = core.rope_frequencies(64, 10000)
    places = mx.arange(9999, dtype=mx.uint32)
    yield "hash for dropout", lambda: core.mix(places)
    yield "matrix product", mx.matmul, (512, 256), (256, 512)
    yield "product of long rows", mx.matmul, (64, 8192), (8192, 64)
    yield "RMSNorm", lambda x, weight: core.rms_norm(x, weight, 1e-5), states, (256,)
    yield "RoPE", lambda x: core.rotate(x, frequencies, 3), heads
    yield "attention", core.attend, heads, few_heads, few_heads
    yield "attention of one token", core.attend, (4, 4, 1, 64), few_heads, few_heads
    yield "SwiGLU", lambda x, y: nn.silu(x) * y, states, states
    yield "embeddings", lambda x: core.look_up(x, tokens), table
    yield "loss", lambda x, head: core.cross_entropy(x / 9, head, tokens, 1e-3), states, table
    yield "norm of gradients", mx.linalg.norm, table
    yield "Muon", core.Muon(1e-3, 0).orthogonalize, (4, 128, 512)
    yield "top-k", lambda x: mx.softmax(core.keep_top_k(x, 50), axis=-1), logits
    yield "top-p", lambda x: mx.softmax(core.keep_top_p(x, 0.9), axis=-1), logits
    yield "most probable token", lambda x: x.argmax(axis=-1), logits
    yield "token by chance", lambda x: mx.random.categorical(x, key=key), logits


def check_operations(on_cpu):
    """Computes each operation repeatedly; see check_device."""
    for name, function, *shapes in list_operations():
        random = np.random.default_rng(0)
        arguments = [mx.array(random.normal(size=shape), mx.float32) for shape in shapes]
        distinct = set()
        try:
            for _ in range(REPETITIONS):
                found = compute(function, arguments)
                distinct.add(found.tobytes())
        except RuntimeError as error:
            yield name, one_line(error), False
            continue
        expected = on_cpu.setdefault(name, found)
        off = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        text = f"{len(distinct)} of {REPETITIONS} results distinct, {off:.0e} off the CPU's"
        yield name, text, len(distinct) == 1 and off < ROUNDING


def compute(function, arguments):
    """A function's result and, where there are any, its gradients: one NumPy array of them all."""
    results = [function(*arguments)]
    if arguments and results[0].dtype == mx.float32:
        _, gradients = mx.vjp(function, arguments, results)
        results += gradients
    return np.concatenate([np.array(each, float).ravel() for each in results])


# ---- Runs ---------------------------------------------------------------------------------------
def check_runs(device, folder, flags, on_cpu):
    """Trains, undisturbed and struck; see check_device."""
    every = flags.steps // 6
    steps = 6 * every
    line = f"--config first --num_iters {steps} --lr_warmup {every} --steps_per_report {every}"
    line += f" --steps_per_save {every} --eval_tokens 5000 --sample_tokens 0 {device}"
    strikes = {every: signal.SIGTERM, 2 * every: signal.SIGKILL}
    end = rf"^{steps}/{steps}  loss (\S+) .* (\S+ tokens/s)[\s\S]+^saved (\w+) at iteration {steps}"
    for name, more in RUNS.items():
        command = [*f"{line} {more}".split(), *flags.model, "--text", MAIN, "--save_dir"]
        whole = train([*command, f"{folder}/{device} {name}"], {})
        struck = train([*command, f"{folder}/{device} {name}, struck"], strikes)
        ends = re.findall(end, whole, re.M) + re.findall(end, struck, re.M)
        if len(ends) < 2:
            yield name, struck.splitlines()[-1], False
            continue
        (loss, speed, expected), (_, _, found) = ends
        cpu_loss = on_cpu.setdefault(name, loss)
        text = f"loss {loss} (CPU {cpu_loss}), {speed}, {expected[:12]}; struck: {found[:12]}"
        off = abs(float(loss) - float(cpu_loss))
        yield name, text, found == expected and off < LOSS_ROUNDING


def train(line, strikes):
    """Runs main.py to its end; returns what it has printed.

    strikes: {step: signal} that end it before, after each of which it is run again.
    """
    command = [sys.executable, MAIN, *line]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    for step, strike in [*strikes.items(), (None, None)]:
        said = ""
        with subprocess.Popen(command, text=True, **pipes) as process:
            for text in process.stdout:
                said += text
                if text.startswith(f"{step}/"):
                    process.send_signal(strike)
        if strike and process.returncode == 0:
            return "it ended before the signal came: give more --steps"
    return said


if __name__ == "__main__":
    start("check", main)
