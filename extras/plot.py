"""Plots the losses of runs.

    python -m extras.plot losses.png                       all runs in the folder
    python -m extras.plot losses.png --identifier NAME     this run, or several
    python -m extras.plot losses.png --identifier "ptb-*"  those whose names match

It needs matplotlib; the file's extension selects the format (png, pdf, svg), and .png is appended
if there is none.
"""

# First: main.py chooses the BLAS before NumPy and MLX take one.
from extras.program import add_identifiers, make_parser, read_flags, select_checkpoints, start

import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np

from datasets import UsageError, explained, printable, user_path, utf8
from main import flags_apart, read_log, settle

DPI = 150  # dots per inch, fewer if a side of the image would exceed MAX_PIXELS
MAX_PIXELS = 2**13
# Training losses are many and noisy, so they are pale; validation losses have markers.
SPLIT_STYLES = {"train": {"alpha": 0.4}, "valid": {"alpha": 1, "marker": "o", "markersize": 4}}
# Tokenizers that are the same in all runs; others count as the same only with the same text.
FIXED_TOKENIZERS = ["byte", "gpt2"]
# The first losses of a run are so high that they would take most of the y axis: it shows those
# after this share of its iterations.
START = 0.05
LARGEST_NUMBER = 1e30  # in a plot: the axes of larger ones overflow


def main(arguments):
    """Plots as these arguments specify. Raises UsageError."""
    parser = make_parser("plot", __doc__)
    parser.add_argument("file", metavar="FILE", help="the picture to write")
    add_identifiers(parser)
    flags = read_flags(parser, arguments)
    plot_runs(select_checkpoints(flags.save_dir, flags.identifier), flags.file)


def plot_runs(checkpoints, path):
    """Plots training and validation losses against iterations and against minutes of training.

    checkpoints: some of each run, newest first. The legend names the flags in which the runs
    differ, and each run's best validation loss, which has a star. Losses are in nats/token, or, if
    the runs have different tokenizers, in bits per byte. Raises UsageError if no run has a log,
    which begins with the first report, or if `path` cannot be written.
    """
    apart = flags_apart(checkpoints)
    folders = {each.folder.name: each.folder for each in checkpoints}
    names = [name for name in sorted(folders) if (folders[name] / "log.csv").is_file()]
    if not names:
        raise UsageError(
            f"the runs in {checkpoints[0].folder.parent} have reported nothing yet (see "
            "--steps_per_report): train them on, or check --save_dir"
        )
    column = "loss"
    unit = "loss (nats/token)"
    if len({tokenizer_of(each) for each in checkpoints}) > 1:
        column = "bits_per_byte"
        unit = "loss (bits per byte)"
    figure = make_figure(12, 5)
    figure.suptitle("Training (pale) and validation losses")
    by_iteration, by_minute = figure.subplots(1, 2, sharey=True)
    legend_lines = 0
    shown = []  # losses that the y axis has room for
    for i, name in enumerate(names):
        color = f"C{i}"
        for split, style in SPLIT_STYLES.items():
            iterations, seconds, losses = columns_of(folders[name] / "log.csv", split, column)
            shown += losses[iterations >= START * iterations.max(initial=0)].tolist()
            best = losses.argmin() if split == "valid" and len(losses) else None
            # Not the name first: labels that begin with _ are left out of legends.
            label = f"{split} {name}"
            if best is not None:
                label += f": best {losses[best]:.4f} at {iterations[best]:,.0f}"
            if split == "valid" and apart[name]:
                label += "\n" + textwrap.fill(printable(utf8(apart[name])), 50)
            legend_lines += 1 + label.count("\n")
            for axis, x in ((by_iteration, iterations), (by_minute, seconds / 60)):
                axis.plot(x, losses, color=color, label=label, **style)
                if best is not None:
                    axis.plot(x[best], losses[best], "*", color=color, markersize=14)
    by_iteration.set(xlabel="iteration", ylabel=unit)
    by_minute.set(xlabel="minutes of training")
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        by_iteration.set_ylim(min(shown) - margin, max(shown) + margin)
    # One legend serves both: their lines are the same.
    lines, labels = by_minute.get_legend_handles_labels()
    legend = figure.legend(lines, labels, loc="outside right upper", fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a flag must not start a formula
    figure.set_figheight(max(5, 1 + 0.17 * legend_lines))  # inches
    save_figure(figure, path)


def tokenizer_of(checkpoint):
    """What two runs with the same tokenizer have in common."""
    kind = settle({}, checkpoint.flags).tokenizer
    return kind if kind in FIXED_TOKENIZERS else checkpoint.tokens_sha256["train"]


def columns_of(log, split, column):
    """Iterations, seconds of training and losses of a split, as floats [3, N].

    log: the path; column: the name of the losses. Rows in which one of these is not a number
    below LARGEST_NUMBER are skipped.
    """
    values = []
    for row in read_log(log):
        if row["split"] != split:
            continue
        try:
            numbers = [float(row[name]) for name in ("iteration", "seconds", column)]
        except (ValueError, KeyError):  # a damaged row, or one without this metric
            continue
        if all(abs(number) < LARGEST_NUMBER for number in numbers):  # nan is not
            values.append(numbers)
    # Without any values, the shape would be [0].
    return np.array(values, float).reshape(-1, 3).T


def make_figure(width, height):
    """An empty matplotlib figure; width and height are in inches."""
    # Not pyplot: nothing is shown on a screen.
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Writes a matplotlib figure to the file `path`, or `path`.png if that has no extension.

    Raises UsageError if that fails.
    """
    dpi = min(DPI, MAX_PIXELS / max(figure.get_size_inches()))
    with explained(f"cannot write {path}: name another file"):
        path = Path(user_path(path))
        if not path.suffix:
            # matplotlib would append it, too, but without reporting it.
            path = path.with_name(f"{path.name}.png")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of characters that the font lacks: a box is drawn
            figure.savefig(path, dpi=dpi)
    print(f"Plot saved to {path}", file=sys.stderr)


if __name__ == "__main__":
    start("plot", main)
