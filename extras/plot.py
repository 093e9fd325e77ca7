"""Plots the losses of runs.

    python -m extras.plot losses.png                       all runs in the folder
    python -m extras.plot losses.png --identifier NAME     this run, or several
    python -m extras.plot losses.png --identifier "ptb-*"  those whose names match
    python -m extras.plot losses.png --ngrams              with what counting alone reaches

It needs matplotlib; the file's extension selects the format (png, pdf, svg), and .png is appended
if there is none.
"""

# First: it chooses the BLAS before MLX takes one.
from extras.common import IDENTIFIERS, flags_of_run, make_parser, read_flags
from extras.common import select_checkpoints, start

import os
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np

from main import reload_data
from support.cli import UsageError, explain_errors
from support.files import user_path
from support.flags import Flag
from support.reports import read_log
from extras.features.list import distinguishing_flags

# Training losses are many and noisy, so they are pale; validation losses have markers.
STYLES = {"train": {"alpha": 0.4}, "valid": {"marker": "o", "markersize": 4}}
NGRAM_LINES = ["solid", "dashed", "dashdot", "dotted"]  # of 1-grams to 4-grams
MAX_HISTORY = 3  # of n-grams: tokens before the one that is predicted
MAX_COUNTED = 10_000_000  # tokens of the training text, at most
MAX_SCORED = 1_000_000  # of the validation text


def main(arguments):
    """Plots as these arguments specify."""
    program_flags = {
        "identifier": IDENTIFIERS,
        "ngrams": Flag(False, bool, "with losses of 1-grams to 4-grams of the training text"),
    }
    parser = make_parser("plot", __doc__, "data_dir", "mirror", **program_flags)
    parser.add_argument("file", metavar="FILE", help="the picture to write")
    flags = read_flags(parser, arguments)
    checkpoints = select_checkpoints(flags)
    ngram_losses = count_ngrams(flags, checkpoints) if flags.ngrams else []
    plot_runs(checkpoints, flags.file, ngram_losses)


def count_ngrams(flags, checkpoints):
    """The losses of 1-grams to 4-grams on the text of these checkpoints; see losses_of_ngrams."""
    if len({str(checkpoint.tokens_sha256) for checkpoint in checkpoints}) > 1:
        raise UsageError("--ngrams is about one text: name runs of the same by --identifier")
    dataset = reload_data(flags_of_run(flags, checkpoints[0]), checkpoints[0])
    vocab_size = dataset.tokenizer.vocab_size
    return losses_of_ngrams(dataset.train.tokens, dataset.valid.tokens, vocab_size)


def losses_of_ngrams(train, valid, vocab_size):
    """The mean losses on `valid` [M], in nats, of n-grams that are counted in `train` [N]: a list.

    The first is that of single tokens, the others that of a token after one, two and three others.
    Probabilities are interpolated with those after fewer tokens (Witten & Bell 1991): the more
    different tokens have followed, the more weight these get. Those of single tokens are
    interpolated with equal chances for all.
    """
    train = train[:MAX_COUNTED]
    tokens = np.concatenate([train, valid[:MAX_SCORED]]).astype(np.int64)
    scored = slice(len(train) + MAX_HISTORY, None)
    histories = np.zeros(len(tokens), np.int64)  # an id of the tokens before each position
    probabilities = 1 / vocab_size
    losses = []
    for length in range(MAX_HISTORY + 1):
        counted = slice(length, len(train))
        _, first, grams = np.unique(
            histories * vocab_size + tokens, return_index=True, return_inverse=True
        )
        count = np.bincount(grams[counted], minlength=len(first))
        of_history = np.bincount(histories[counted], minlength=histories.max() + 1)
        # How many different tokens have followed each history.
        followers = np.bincount(histories[first][count > 0], minlength=len(of_history))
        scored_histories = histories[scored]
        total = of_history[scored_histories] + followers[scored_histories]
        numerator = count[grams[scored]] + followers[scored_histories] * probabilities
        probabilities = np.where(total > 0, numerator / np.maximum(total, 1), probabilities)
        losses.append(-np.log(probabilities).mean())
        # The history of the next position is this gram: of one token more.
        histories = np.concatenate([[len(first)], grams[:-1]])
    return losses


def plot_runs(checkpoints, path, ngram_losses):
    """Plots training and validation losses against iterations and against minutes of training.

    checkpoints: some of each run, newest first; ngram_losses: see count_ngrams. The legend names
    the flags in which the runs differ, and each run's best validation loss. The first twentieth of
    a curve is not drawn. Losses are in nats/token, or in bits per byte if the runs have different
    tokens. Raises UsageError if no run has reported anything yet, or if `path` cannot be written.
    """
    folders = {checkpoint.folder for checkpoint in checkpoints}
    flags_by_run = distinguishing_flags(checkpoints)
    column = "loss"
    unit = "nats/token"
    if len({str(checkpoint.tokens_sha256.get("train")) for checkpoint in checkpoints}) > 1:
        column = "bits_per_byte"
        unit = "bits per byte"
    figure = make_figure(12, 5)
    figure.suptitle("Training (pale) and validation losses")
    by_iteration, by_minute = figure.subplots(1, 2, sharey=True)
    by_iteration.set(xlabel="iteration", ylabel=f"loss ({unit})")
    by_minute.set(xlabel="minutes of training")
    for i, folder in enumerate(sorted(folders)):
        for split, style in STYLES.items():
            iterations, seconds, losses = columns_of(folder / "log.csv", split, column)
            if not len(losses):
                continue
            label = f"{split} {folder.name}"
            if split == "valid":
                best = losses.argmin()
                label += f": best {losses[best]:.4f} at {iterations[best]:,.0f}"
                flags = textwrap.wrap(flags_by_run[folder.name], 50)
                label = "\n".join([label, *flags])
            first = len(losses) // 20  # those before are so high that others would look flat
            style = style | {"color": f"C{i}"}
            by_iteration.plot(iterations[first:], losses[first:], label=label, **style)
            by_minute.plot(seconds[first:] / 60, losses[first:], **style)
    if not by_iteration.lines:
        raise UsageError(
            f"the runs in {checkpoints[0].folder.parent} have reported nothing yet (see "
            "--steps_per_report): train them on, or check --save_dir"
        )
    for order, (loss, line) in enumerate(zip(ngram_losses, NGRAM_LINES), 1):
        style = {"color": "gray", "linewidth": 0.7, "linestyle": line}
        by_iteration.axhline(loss, label=f"{order}-gram, counted: {loss:.4f}", **style)
        by_minute.axhline(loss, **style)
    legend = figure.legend(loc="outside right upper", fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a flag must not start a formula
    save_figure(figure, path)


def columns_of(log, split, column):
    """Iterations, seconds of training and losses of a split, as floats [3, N].

    log: the path; column: the name of the losses. Rows in which one of these is no finite number
    are skipped.
    """
    values = []
    for row in read_log(log):
        try:
            numbers = [float(row[name]) for name in ("iteration", "seconds", column)]
        except (ValueError, KeyError):  # a row without this metric, or a damaged one
            continue
        if row["split"] == split and np.isfinite(numbers).all():
            values.append(numbers)
    return np.array(values, float).reshape(-1, 3).T  # also without any values


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
