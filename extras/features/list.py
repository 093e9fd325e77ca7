"""The runs in a folder, python main.py --list, or one of them, with --identifier RUN."""

import re
import shlex
import shutil
import time
from pathlib import Path

from support.cli import printable, utf8
from support.files import size_of
from support.flags import FLAGS, arguments_of
from support.runs import NO_CHECKPOINT, best_checkpoint, checkpoints_in, list_run_folders

COLUMNS = "saved", "run", "of", "iteration", "best valid", "bpb", "MiB"  # bpb: bits per byte
NAME = re.compile(r".+-[0-9a-f]{8}(\.\d+)?")  # of a run, see run_name


def list_runs(flags, find_checkpoint):
    """Prints a line for each run in --save_dir, newest first, or all about that of --identifier.

    A line is at most as wide as the terminal, and gives the best loss in nats per token.
    """
    if flags.identifier:
        return print_run(find_checkpoint(flags, flags.identifier).folder)
    rows = []
    for folder in list_run_folders(flags.save_dir):
        checkpoints = checkpoints_in(folder, warn=True)
        if checkpoints or NAME.fullmatch(folder.name):
            rows.append(describe(folder, checkpoints))
    if not rows:
        return print(NO_CHECKPOINT.format(flags.save_dir))
    rows = [COLUMNS, *sorted(rows, reverse=True)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        line = "  ".join(map(str.ljust, row, widths))
        print(line[: shutil.get_terminal_size().columns].rstrip())


def describe(folder, checkpoints):
    """The line of a run, in COLUMNS; checkpoints: newest first, perhaps none."""
    size = f"{size_of(folder) / 2**20:,.0f}"
    if not checkpoints:
        return "-", folder.name, "", "nothing saved", "", "", size
    newest = checkpoints[0]
    saved = time.strftime("%y-%m-%d %H:%M", time.localtime(newest.saved_at))
    names = [newest.origin.recipe, *newest.flags["text"], newest.flags["dataset"]]
    text = Path(next(filter(None, names))).name
    iteration = f"{newest.iteration:,} of {newest.flags['num_iters']:,}"
    best = best_checkpoint(checkpoints).evaluation
    losses = "", ""
    if best:
        losses = f"{best.loss:.4f} at {best.iteration:,}", f"{best.bits_per_byte:.4f}"
    return saved, folder.name, printable(utf8(text))[:16], iteration, *losses, size


def print_run(folder):
    """Prints the flags of a run, as they would be typed, and its checkpoints."""
    checkpoints = checkpoints_in(folder)
    defaults = FLAGS.defaults
    flags = {name: value for name, value in checkpoints[0].flags.items() if value != defaults[name]}
    print(printable(utf8(f"{folder.name}: {shlex.join(arguments_of(flags))}")))
    for checkpoint in checkpoints:
        loss = f"{checkpoint.evaluation.loss:.4f}" if checkpoint.evaluation else ""
        print(f"{checkpoint.iteration:>12,}  {checkpoint.id}  {loss}")
