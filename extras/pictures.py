"""Plots of the losses of runs and of what attention heads attend to.

    python main.py --plot losses.png                       the losses of all runs in the folder
    python main.py --plot losses.png --identifier NAME     the losses of this run (or of several)
    python main.py --attention heads.png --prompt "TEXT"   what each head attends to in a prompt

Both need matplotlib; the file extension selects the format (png, pdf, svg), and .png is appended
if there is none.
Dimension letters are those of main.py: D model, H query heads, K key/value heads, L positions,
d head.
"""

import math
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from datasets import UsageError, explained, user_path
from main import first_ids, read_log

DPI = 150  # dots per inch, fewer if a side of the image would exceed MAX_PIXELS
MAX_PIXELS = 2**13
# Training losses are many and noisy, so they are pale; validation losses have markers.
SPLIT_STYLES = {"train": {"alpha": 0.4}, "valid": {"alpha": 1, "marker": "o"}}


# ---- Losses -------------------------------------------------------------------------------------
def plot_runs(folders, path):
    """Plots training and validation losses against iterations and against minutes of training.

    folders: the Paths of the runs, newest first. Raises UsageError if none has a log, which
    begins with the first report, or if `path` cannot be written.
    """
    logs = [folder / "log.jsonl" for folder in sorted(folders)]
    logs = [log for log in logs if log.is_file()]
    if not logs:
        raise UsageError(
            f"the runs in {folders[0].parent} have reported nothing yet (see --steps_per_report): "
            "train them on, or check --save_dir"
        )
    figure = make_figure(12, 5)
    by_iteration, by_minute = figure.subplots(1, 2, sharey=True)
    for i, log in enumerate(logs):
        for split, style in SPLIT_STYLES.items():
            iterations, seconds, losses = columns_of(log, split)  # [N] each
            # Not the name first: labels that begin with _ are left out of legends.
            label = f"{split} {log.parent.name}"
            by_iteration.plot(iterations, losses, color=f"C{i}", label=label, **style)
            by_minute.plot(seconds / 60, losses, color=f"C{i}", label=label, **style)
    by_iteration.set(xlabel="iteration", ylabel="loss (nats/token)")
    by_minute.set(xlabel="minutes of training")
    # One legend serves both: their lines are the same.
    lines, labels = by_minute.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right upper", fontsize="small")
    save_figure(figure, path)


def columns_of(log, split):
    """Iterations, seconds of training and losses (nats per token) of a split, as floats [3, N].

    log: the path. Rows in which one of these is not a finite number are skipped.
    """
    values = []
    for _, row in read_log(log):
        if row["split"] != split:
            continue
        try:
            numbers = [float(row[name]) for name in ("iteration", "seconds", "loss")]
        except (ValueError, LookupError, TypeError, OverflowError):  # a damaged row
            continue
        if all(map(math.isfinite, numbers)):
            values.append(numbers)
    # Without any values, the shape would be [0].
    return np.array(values, float).reshape(-1, 3).T


# ---- Attention ----------------------------------------------------------------------------------
def plot_attention(model, tokenizer, prompt, path):
    """Plots a matrix for each block (down) and each head (across).

    Its element in row i and column j is how much token i of the prompt attends to token j, from 0
    (white) to 1 (dark blue). Only the end of a prompt longer than the context is plotted.
    Raises UsageError if `path` cannot be written.
    """
    tokens = first_ids(tokenizer, prompt)[-model.config.context_size :]
    weights = attention_weights(model, tokens)  # [blocks, H, L, L]
    # Without the quotes of `repr`, but with its escapes, so that a label is a single line.
    labels = [repr(tokenizer.decode([token]))[1:-1] for token in tokens]
    ticks = range(len(tokens))
    blocks, heads = weights.shape[:2]
    side = max(2.5, 0.22 * len(tokens))  # inches per matrix, with room for each label
    figure = make_figure(side * heads, side * blocks)
    axes = figure.subplots(blocks, heads, squeeze=False)
    for (i, j), axis in np.ndenumerate(axes):
        axis.imshow(weights[i, j], vmin=0, vmax=1, cmap="Blues")
        axis.set_title(f"block {i}, head {j}", fontsize="small")
        # parse_math: a dollar sign in a text must not start a formula.
        axis.set_xticks(ticks, labels, rotation=90, fontsize=6, parse_math=False)
        axis.set_yticks(ticks, labels, fontsize=6, parse_math=False)
    save_figure(figure, path)


def attention_weights(model, tokens):
    """How much each position of a text attends to itself and to each position before it.

    tokens: L ids. Returns a float32 NumPy array [blocks, H, L, L]; the last axis sums to 1.
    """
    seen = mx.array(np.tri(len(tokens), dtype=bool))  # [L, L]: no position looks ahead
    hidden = model.model.embed_tokens(mx.array([tokens]))  # [1, L, D]
    weights = []
    for block in model.model.layers:
        queries, keys, _ = block.self_attn.project(block.input_layernorm(hidden))
        # H / K neighbouring query heads share each key head.
        keys = mx.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)  # [1, H, L, d]
        scale = queries.shape[-1] ** -0.5
        scores = (queries * scale) @ keys.swapaxes(-1, -2)  # [1, H, L, L]
        scores = mx.where(seen, scores.astype(mx.float32), -mx.inf)
        weights.append(mx.softmax(scores, axis=-1))
        hidden = block(hidden)
    return np.array(mx.concatenate(weights))


# ---- Figures ------------------------------------------------------------------------------------
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
        figure.savefig(path, dpi=dpi)
    print(f"Plot saved to {path}", file=sys.stderr)
