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

import math
import os
import sys
import warnings
from pathlib import Path

import numpy as np

from main import reload_data
from support.cli import UsageError, explain_errors
from support.files import user_path
from support.flags import FLAGS, IDENTITY, Flag
from support.reports import read_log

# Training losses are many and noisy, so they are pale; validation losses have markers.
STYLES = {"train": {"alpha": 0.4}, "valid": {"marker": "o", "markersize": 4}}
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
    probabilities = 1 / vocab_size
    losses = []
    for length in range(MAX_HISTORY + 1):
        keys = []  # of histories and of n-grams, in both texts
        for tokens in (train[:MAX_COUNTED], valid[:MAX_SCORED]):
            history = np.zeros(len(tokens) - MAX_HISTORY, np.uint64)
            for back in range(1, length + 1):
                history = history * vocab_size + tokens[MAX_HISTORY - back : -back]
            keys += [history, history * vocab_size + tokens[MAX_HISTORY:]]
        counted_histories, counted_ngrams, histories, ngrams = keys
        _, first = np.unique(counted_ngrams, return_index=True)
        # How many different tokens have followed each history.
        followers = count_in(counted_histories[first], histories)
        total = count_in(counted_histories, histories) + followers
        numerator = count_in(counted_ngrams, ngrams) + followers * probabilities
        probabilities = np.where(total > 0, numerator / np.maximum(total, 1), probabilities)
        losses.append(-np.log(probabilities).mean())
    return losses


def count_in(keys, wanted):
    """How often each of the keys `wanted` [M] occurs among `keys` [N]."""
    found, counts = np.unique(keys, return_counts=True)
    places = np.searchsorted(found, wanted).clip(max=len(found) - 1)
    return np.where(found[places] == wanted, counts[places], 0)


def plot_runs(checkpoints, path, ngram_losses):
    """Plots training and validation losses against iterations.

    checkpoints: some of each run, newest first; ngram_losses: see count_ngrams. At a curve stand
    the flags in which its run differs, or its name, and its best validation loss; a triangle marks
    where the run was resumed. The first twentieth of a curve is not drawn. Losses are in nats per
    token, or in bits per byte if the runs have different tokens. Raises UsageError if no run has
    reported anything yet, or if `path` cannot be written.
    """
    runs = {checkpoint.folder: checkpoint for checkpoint in reversed(checkpoints)}  # the newest
    column = "loss"
    unit = "nats per token"
    if len({str(checkpoint.tokens_sha256.get("train")) for checkpoint in checkpoints}) > 1:
        column = "bits_per_byte"
        unit = "bits per byte"
    figure = make_figure(8, 4.5)
    axis = figure.subplots()
    axis.set(xlabel="iteration", ylabel=f"loss ({unit})")
    axis.set_title("Losses in training (pale) and on held-out text (dots); triangles: resumed")
    names = distinguishing_flags(runs)
    ends = {}  # {folder: see add_labels}
    for i, folder in enumerate(sorted(runs)):
        color = f"C{i}"
        for split, style in STYLES.items():
            iterations, losses = columns_of(folder / "log.csv", split, column)
            if not len(losses):
                continue
            first = len(losses) // 20  # those before are so high that others would look flat
            axis.plot(iterations[first:], losses[first:], color=color, **style)
            if split == "train":
                starts = [start for start in runs[folder].starts if start > iterations[first]]
                axis.plot(
                    starts, np.interp(starts, iterations, losses), "v", color=color, alpha=0.6
                )
            label = f"{names[folder] or folder.name}: {split} {losses.min():.4f}"
            ends[folder] = (losses[-1], label, color)
    if not axis.lines:
        raise UsageError(
            f"the runs in {checkpoints[0].folder.parent} have reported nothing yet (see "
            "--steps_per_report): train them on, or check --save_dir"
        )
    labels = [*ends.values()]
    for order, loss in enumerate(ngram_losses, 1):
        axis.axhline(loss, color="gray", linewidth=0.7, linestyle="dashed")
        labels.append((loss, f"{order}-grams, counted: {loss:.4f}", "gray"))
    add_labels(axis, labels)
    save_figure(figure, path)


def add_labels(axis, labels):
    """Writes texts beside the ends of curves, [(height, text, color)], none over another."""
    bottom, top = axis.get_ylim()
    place = -math.inf
    for height, text, color in sorted(labels):
        place = max(place + 0.05 * (top - bottom), height)
        label = axis.annotate(
            text, (1.01, place), xycoords=("axes fraction", "data"), color=color, va="center"
        )
        label.set_parse_math(False)  # a dollar sign in a flag must not start a formula


def distinguishing_flags(runs):
    """The flags that tell these runs apart, {folder: "--dim=32 --seed=1"}.

    runs: {folder: a checkpoint}.
    """
    texts = dict.fromkeys(runs, "")
    for name in FLAGS.names(IDENTITY):
        values = {folder: str(checkpoint.flags[name]) for folder, checkpoint in runs.items()}
        if len({*values.values()}) > 1:
            for folder, value in values.items():
                texts[folder] += f" --{name}={value}"
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
