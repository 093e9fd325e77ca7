"""Weights rounded to 4 or 8 bits as in MLX: with a scale and a bias per group.

    python main.py --prompt "TEXT" --quantize 4             samples with rounded weights
    python main.py --evaluate valid --quantize 4            scores them
    python -m extras.export DIR --quantize 4                writes a smaller model for mlx_lm

16 bits are float16. Quantization is for inference only: checkpoints always hold float32.
"""

import sys

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from support.cli import explain_errors


def quantize(model, bits, is_packed):
    """Rounds all matrices of a model, in place, to `bits` per weight; returns the size of a group.

    A group is 64 neighbours in a row, or 32 unless 64 divides the length of every row; with 16
    bits there are no groups, and the size is None.

    is_packed: True, for a GPU or an export, leaves layers with packed weights in the model
    (nn.QuantizedLinear, nn.QuantizedEmbedding); False, for a CPU, where MLX is slow with these,
    converts the rounded weights back to float32. The logits are the same up to rounding.

    Raises UsageError unless 32 divides the length of every row.
    """
    matrices = {}
    for name, weight in tree_flatten(model.parameters()):
        if weight.ndim == 2:
            matrices[name] = weight  # [O, I]
    group_size = None
    if bits < 16:
        is_wide = all(matrix.shape[1] % 64 == 0 for matrix in matrices.values())
        group_size = 64 if is_wide else 32
    quantized = {}
    rounded = []
    with explain_errors(f"--quantize {bits} needs a model in which 32 divides --dim and --mlp_dim"):
        for name, matrix in matrices.items():
            if bits == 16:
                quantized[name] = matrix.astype(mx.float16)
                rounded.append((name, quantized[name].astype(mx.float32)))
            else:
                # Weights [O, I * bits / 32] and, per group, scales and biases [O, I / group].
                quantized[name] = mx.quantize(matrix, group_size, bits)
                rounded.append((name, mx.dequantize(*quantized[name], group_size, bits)))
    print(
        f"Quantized to {bits} bits: the matrices' {count_bytes(matrices) / 2**20:,.1f} MiB would "
        f"be {count_bytes(quantized) / 2**20:,.1f}",
        file=sys.stderr,
    )
    if not is_packed:
        model.update(tree_unflatten(rounded))
    elif bits == 16:
        model.set_dtype(mx.float16)  # all weights, or MLX would compute in float32
    else:
        nn.quantize(model, group_size, bits)
    # MLX is lazy: without this, the first reply would have to wait for the rounding.
    mx.eval(model.parameters())
    return group_size


def count_bytes(tree):
    """The size of a tree of arrays."""
    return sum(array.nbytes for _, array in tree_flatten(tree))
