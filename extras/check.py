"""Whether this machine repeats results exactly: a block of text to paste into an issue.

    python -m extras.check          on its CPU
    python -m extras.check --gpu    on its GPU; after a --, flags of their model or optimizer

It takes a minute or two, or five where a GPU's kernels are compiled for the first time. It works in
a folder of its own in --save_dir, and deletes that. Runs of the recipe `first` that get SIGTERM and
then, on one core less, kill -9 must end with the SHA1 and the sample of one that is left alone and,
on a GPU, with the loss that the CPU finds, up to rounding. `!!` marks what is amiss. The last line
is a row for docs/tested.md.
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
import time

import main as core
from support.cli import HERE, RunError, UsageError
from support.device import ALONE, list_versions
from support.files import make_save_dir
from extras.versus.sides import git

ROUNDING = 0.02  # of a loss after 60 steps, relative, between a GPU and a CPU
MAIN = HERE / "main.py"
TRAINING = (
    "--config first --num_iters 60 --lr_warmup 10 --steps_per_report 1 --steps_per_save 10 "
    "--eval_tokens 5000"
)
RUNS = {
    "float32": "",
    "bfloat16": "--dtype bfloat16 --dropout 0.1 --grad_checkpoint",
}
STRIKES = {10: signal.SIGTERM, 25: signal.SIGKILL}  # after which step, of 60
END = (
    r"^(\d+)/\1  loss (?P<loss>\S+) .* (?P<speed>\S+) tokens/s[\s\S]+^saved (?P<id>\w{12})"
    r"[\s\S]+^sample: (?P<sample>.*)"
)


def main(arguments):
    """Checks this machine; returns the exit status."""
    parser = make_parser("check", __doc__, "gpu")
    parser.add_argument("training", nargs="*", default=[], help="flags for the runs")
    flags = read_flags(parser, arguments)
    make_save_dir(flags.save_dir)
    versions = list_versions(flags, ALONE, core.fast)
    print(f"{platform.platform()}, Python {platform.python_version()}, {versions}\n")
    device = ["--gpu"] if flags.gpu else []
    is_exact = True
    speeds = []
    with tempfile.TemporaryDirectory(prefix="check-", dir=flags.save_dir) as folder:
        for name, more in RUNS.items():
            line = [*f"{TRAINING} {more}".split(), "--text", MAIN, *flags.training, "--save_dir"]
            whole = train([*line, f"{folder}/whole", *device], {})
            struck = train([*line, f"{folder}/struck", *device], STRIKES)
            expected = train([*line, f"{folder}/cpu"], {}) if flags.gpu else whole
            loss, on_cpu = float(whole["loss"]), float(expected["loss"])
            is_right = abs(loss - on_cpu) < ROUNDING * on_cpu  # not if one is nan
            ends = [(end["id"], end["sample"]) for end in (whole, struck)]
            is_right = is_right and ends[0] == ends[1]
            is_exact = is_exact and is_right
            speeds.append(whole["speed"])
            mark = "  " if is_right else "!!"
            print(
                f"{mark} {name}: {whole['speed']} tokens/s, {whole['id']}; struck: {struck['id']}; "
                f"loss {loss} ({on_cpu} on the CPU)"
            )
    commit = git("rev-parse", "--short", "HEAD").decode().strip()
    system = f"{platform.system()} {platform.machine()}"
    cells = [time.strftime("%Y-%m-%d"), system, versions["device"], versions["MLX"]]
    cells += [commit, "exact" if is_exact else "not exact", *speeds[:1]]
    print(f"\n| {' | '.join(cells)} |")
    return 0 if is_exact else 1


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
