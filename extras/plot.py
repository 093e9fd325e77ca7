"""Plots the losses of runs.

    python -m extras.plot losses.png                       all runs in the folder
    python -m extras.plot losses.png --identifier NAME     this run, or several
    python -m extras.plot losses.png --identifier "ptb-*"  those whose names match

It needs matplotlib; the file's extension selects the format (png, pdf, svg), and .png is appended
if there is none.
"""

# First: it chooses the BLAS before MLX takes one.
from extras.common import IDENTIFIERS, make_parser, read_flags, select_checkpoints, start

import os
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np

from support.cli import UsageError, explain_errors
from support.files import user_path
from support.flags import FLAGS, IDENTITY
from support.reports import read_log

# Training losses are many and noisy, so they are pale; validation losses have markers.
STYLES = {"train": {"alpha": 0.4}, "valid": {"marker": "o", "markersize": 4}}


def main(arguments):
    """Plots as these arguments specify."""
    parser = make_parser("plot", __doc__, identifier=IDENTIFIERS)
    parser.add_argument("file", metavar="FILE", help="the picture to write")
    flags = read_flags(parser, arguments)
    plot_runs(select_checkpoints(flags), flags.file)


def plot_runs(checkpoints, path):
    """Plots training and validation losses against iterations.

    checkpoints: some of each run, newest first. The legend names the flags in which the runs
    differ, and each run's best validation loss. The first twentieth of a curve is not drawn. Losses
    are in nats/token, or in bits per byte if the runs have different tokens. Raises UsageError if
    no run has reported anything yet, or if `path` cannot be written.
    """
    folders = {checkpoint.folder for checkpoint in checkpoints}
    flags_by_run = distinguishing_flags(checkpoints)
    column = "loss"
    unit = "nats/token"
    if len({str(checkpoint.tokens_sha256.get("train")) for checkpoint in checkpoints}) > 1:
        column = "bits_per_byte"
        unit = "bits per byte"
    figure = make_figure(8, 4.5)
    axis = figure.subplots()
    axis.set(xlabel="iteration", ylabel=f"loss ({unit})")
    axis.set_title("Training (pale) and validation losses")
    for i, folder in enumerate(sorted(folders)):
        for split, style in STYLES.items():
            iterations, losses = columns_of(folder / "log.csv", split, column)
            if not len(losses):
                continue
            label = f"{split} {folder.name}"
            if split == "valid":
                best = losses.argmin()
                label += f": best {losses[best]:.4f} at {iterations[best]:,.0f}"
                flags = textwrap.wrap(flags_by_run[folder.name].strip(), 50)
                label = "\n".join([label, *flags])
            first = len(losses) // 20  # those before are so high that others would look flat
            style = style | {"color": f"C{i}"}
            axis.plot(iterations[first:], losses[first:], label=label, **style)
    if not axis.lines:
        raise UsageError(
            f"the runs in {checkpoints[0].folder.parent} have reported nothing yet (see "
            "--steps_per_report): train them on, or check --save_dir"
        )
    legend = figure.legend(loc="outside right upper", fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a flag must not start a formula
    save_figure(figure, path)


def distinguishing_flags(checkpoints):
    """The flags that tell the runs of these checkpoints apart, {run: "--dim=32 --seed=1"}.

    checkpoints: newest first. Of each run, the newest counts.
    """
    newest = {checkpoint.folder.name: checkpoint for checkpoint in reversed(checkpoints)}
    texts = dict.fromkeys(newest, "")
    for name in FLAGS.names(IDENTITY):
        values = {run: str(checkpoint.flags[name]) for run, checkpoint in newest.items()}
        if len({*values.values()}) > 1:
            for run, value in values.items():
                texts[run] += f" --{name}={value}"
    return texts


def columns_of(log, split, column):
    """Iterations and losses of a split, as floats [2, N].

    log: the path; column: the name of the losses. Rows in which one of these is no finite number
    are skipped.
    """
    values = []
    for row in read_log(log):
        try:
            numbers = [float(row[name]) for name in ("iteration", column)]
        except (ValueError, KeyError):  # a row without this metric, or a damaged one
            continue
        if row["split"] == split and np.isfinite(numbers).all():
            values.append(numbers)
    return np.array(values, float).reshape(-1, 2).T  # also without any values


def make_figure(width, height):
    """An empty matplotlib figure; width and height are in inches."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which this Python may lack
    from matplotlib.figure import Figure  # not pyplot: nothing is shown on a screen

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Writes a matplotlib figure to the file `path`, or `path`.png if that has no extension.

    Returns the path of the file. Raises UsageError if that fails.
    """
    with explain_errors(f"cannot write {path}: name another file"), warnings.catch_warnings():
        path = Path(user_path(path))
        if not path.suffix:
            path = path.with_name(f"{path.name}.png")
        warnings.simplefilter("ignore")  # of characters that the font lacks: a box is drawn
        # Dots per inch: no side of the figure has more than 2^13. A long legend makes it higher.
        dpi = min(150, 2**13 / max(figure.get_size_inches()))
        figure.savefig(path, dpi=dpi, bbox_inches="tight")
    print(f"Plot saved to {path}", file=sys.stderr)
    return path


if __name__ == "__main__":
    start("plot", main)
