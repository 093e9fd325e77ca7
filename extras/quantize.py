"""Weights rounded to 4 or 8 bits as in MLX: with a scale and a bias per group.

    python main.py --prompt "TEXT" --quantize 4             samples with rounded weights
    python main.py --evaluate valid --quantize 4            scores the model before and after
    python -m extras.export DIR --quantize 4                writes a smaller model for mlx_lm

16 bits means float16.

Quantization is for inference only: checkpoints always hold float32.
"""

import sys

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from datasets import explained


def quantize(model, bits, packed):
    """Rounds all matrices of a model, in place, to `bits` per weight; returns the size of a group.

    A group is 64 neighbours in a row, or 32 unless 64 divides the length of every row; with 16
    bits there are no groups, and the size is None.

    packed: True, for a GPU or an export, leaves layers with packed weights in the model
    (nn.QuantizedLinear, nn.QuantizedEmbedding); False, for a CPU, where MLX is slow with these,
    converts the rounded weights back to float32. The logits are the same up to rounding.

    Raises UsageError unless 32 divides the length of every row.
    """
    matrices = {}
    for name, weight in tree_flatten(model.parameters()):
        if weight.ndim == 2:
            matrices[name] = weight  # [O, I]
    if bits == 16:
        round_to_float16(model, matrices, packed)
        return None
    group_size = 64
    if any(matrix.shape[1] % 64 for matrix in matrices.values()):
        group_size = 32
    quantized = {}
    with explained(f"--quantize {bits} needs a model in which 32 divides --dim and --mlp_dim"):
        for name, matrix in matrices.items():
            # Packed weights [O, I * bits / 32] and, per group, scales and biases [O, I / group].
            quantized[name] = mx.quantize(matrix, group_size, bits)
    print_sizes(bits, matrices, quantized)

    if packed:
        nn.quantize(model, group_size, bits)
    else:
        rounded = []
        for name, parts in quantized.items():
            rounded.append((name, mx.dequantize(*parts, group_size, bits)))
        model.update(tree_unflatten(rounded))
    # MLX is lazy: without this, the first reply would have to wait for the rounding.
    mx.eval(model.parameters())
    return group_size


def round_to_float16(model, matrices, packed):
    """Rounds a model's matrices, {name: array}; unless `packed`, converts them back to float32.

    Packed, all other weights are rounded, too, or MLX would compute in float32.
    """
    rounded = {name: matrix.astype(mx.float16) for name, matrix in matrices.items()}
    print_sizes(16, matrices, rounded)
    if packed:
        model.set_dtype(mx.float16)
    else:
        back = {name: matrix.astype(mx.float32) for name, matrix in rounded.items()}
        model.update(tree_unflatten(list(back.items())))
    mx.eval(model.parameters())


def print_sizes(bits, before, after):
    """Prints how much smaller this makes the matrices."""
    sizes = f"the matrices' {mebibytes(before):,.1f} MiB would be {mebibytes(after):,.1f}"
    print(f"Quantized to {bits} bits: {sizes}", file=sys.stderr)


def mebibytes(tree):
    """The size of a tree of arrays in MiB."""
    return sum(array.nbytes for _, array in tree_flatten(tree)) / 2**20
