"""Plots what the attention heads of a model attend to in a text.

    python -m extras.attention heads.png --prompt "def __init__(self"

It needs matplotlib; the file's extension selects the format, as for extras.plot. Beside the picture
lies a .npz of the same name for NumPy: `weights` [blocks, H, L, L], and `tokens`, L texts.
Dimension letters are those of main.py: D model, H query heads, L positions, d head.
"""

# First: it chooses the BLAS before MLX takes one.
from extras.common import make_parser, read_flags, start

import mlx.core as mx
import numpy as np

from main import attend, encode_prompt, open_checkpoint
from support.cli import explain_errors
from support.reports import announce
from extras.plot import make_figure, save_figure


def main(arguments):
    """Plots a matrix for each block (down) and each head (across), and saves their numbers.

    Its element in row i and column j is how much token i of the prompt attends to token j, from 0
    (white) to 1 (dark blue). Only the end of a prompt longer than the context is plotted.
    Raises UsageError if the files cannot be written.
    """
    parser = make_parser("attention", __doc__, "identifier", "gpu")
    parser.add_argument("file", metavar="FILE", help="the picture to write")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the text")
    flags = read_flags(parser, arguments)
    contents = open_checkpoint(flags)
    model = contents.load_model()
    tokenizer = contents.tokenizer
    tokens = encode_prompt(tokenizer, flags.prompt)[-model.config.context_size :]
    weights = attention_weights(model, tokens)  # [blocks, H, L, L]
    # Each on one line, with spaces that can be seen.
    labels = [repr(tokenizer.decode([token]))[1:-1].replace(" ", "\u2423") for token in tokens]
    blocks, heads = weights.shape[:2]
    side = max(2.5, 0.22 * len(tokens))  # inches of a matrix, with room for each label
    figure = make_figure(side * heads + 1, side * blocks + 0.5)
    title = "how much each token (row) attends to those before it (columns)"
    figure.suptitle(f"{contents.checkpoint}: {title}")
    axes = figure.subplots(blocks, heads, squeeze=False)
    for (block, head), axis in np.ndenumerate(axes):
        image = axis.imshow(weights[block, head], vmin=0, vmax=1, cmap="Blues")
        axis.set_title(f"block {block}, head {head}", fontsize="small")
        # parse_math: a dollar sign in a text must not start a formula.
        text = {"labels": labels, "fontsize": 8, "parse_math": False}
        axis.set_xticks(range(len(tokens)), rotation=90, **text)
        axis.set_yticks(range(len(tokens)), **text)
    figure.colorbar(image, ax=axes, label="attention", shrink=0.8)
    numbers = save_figure(figure, flags.file).with_suffix(".npz")
    with explain_errors(f"cannot write {numbers}: name another picture", OSError):
        np.savez(numbers, weights=weights, tokens=labels)
    print(f"Numbers saved to {numbers}")
    announce(contents.checkpoint)


def attention_weights(model, tokens):
    """How much each position of a text attends to itself and to each position before it.

    tokens: L ids. Returns a float32 NumPy array [blocks, H, L, L]; the last axis sums to 1.

    They are those of main.py's `attend`, also of one that was edited: what it makes of values that
    are 1 at one position and 0 at all others.
    """
    L = len(tokens)
    hidden = model.model.embed(mx.array([tokens]))  # [1, L, D]
    weights = []
    for block in model.model.layers:
        queries, keys, values = block.self_attn.project_qkv(block.input_layernorm(hidden))
        d = values.shape[-1]
        parts = []  # [1, H, L, d] each
        for first in range(0, L, d):  # d positions at a time, as a value has d numbers
            ones = mx.broadcast_to(mx.eye(L, d, -first), values.shape)
            parts.append(attend(queries, keys, ones))
        weights.append(mx.concatenate(parts, axis=-1)[..., :L])
        hidden = block(hidden)
    return np.array(mx.concatenate(weights).astype(mx.float32))


if __name__ == "__main__":
    start("attention", main)
