"""Train a transformer language model with MLX, resume it bit-exactly, and sample from it.

    python main.py --config first    train on Python's own library (two minutes; needs extras/)
    python main.py --inference       sample interactively from the newest checkpoint
    python main.py                   resume the newest run; without any, train a large model
    python main.py --help            list all flags

What you edit comes first: model, loss and optimizer, batches, evaluation, training, sampling. The
rest saves runs and reads flags; a command begins in `main`, at the end. datasets.py turns text into
token ids, support/ finds runs and reports on them. Every other feature is a file in extras/.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # before Hugging Face's `datasets`

# First: it names a file that hides one of Python's modules.
from support.cli import RunError, UsageError, command, explain_errors, extra, first_imports
from support.cli import flush_or_drop, for_terminal, has_extra, run_program, say, warning

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import signal
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support import code

code.begin_main(__name__, __file__)
with first_imports():
    import fcntl  # noqa: F401 (where it is missing, on Windows, nothing could be saved)

    # extras/features/fast.py, or None. It comes before MLX, which takes the BLAS loaded first.
    fast = extra("fast") if code.uses_fast() else None

    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    import numpy as np
    from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

import datasets
from support import device, files, machine, reports, runs
from support.flags import COUNT, FLAGS, FRACTION, MAX_INT32, NONNEGATIVE, RECORDED, SIZE
from support.flags import Flag, Parser, get_values, ineffective_flag_notices, nonempty, number
from support.flags import one_of, parse_command_line
from support.runs import Checkpoint, DamagedError, Evaluation, Progress

# Replaces a function by its faster namesake in fast.py, unless you have edited it here.
fast_version = fast.fast_version if fast else lambda function: function

# ---- Model --------------------------------------------------------------------------------------
# Decoder-only, pre-norm, with RMSNorm, RoPE and grouped-query attention. Layers are named as in
# Hugging Face's Llama. Letters in shapes: B rows of a batch, L positions, N any number; V, D, H, K
# and d are those of Config. A linear layer from I to O features has a matrix [O, I], as in PyTorch.


@dataclasses.dataclass
class Config:
    """A model's architecture; saved in checkpoints.

    Give a new field a default, as older checkpoints lack it; whole numbers have to be positive. A
    row of FLAGS["model"], below class MLP, makes it a flag.
    """

    vocab_size: int  # V
    context_size: int  # length of a training window, and the longest text read in one piece
    num_blocks: int
    dim: int  # D, of the hidden states
    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key and value heads, each shared by H / K query heads
    mlp: str  # a key of MLPS
    mlp_dim: int  # width of an MLP's hidden layer, and of its gate
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, before RoPE
    untie: bool = False  # the output layer has its own matrix instead of the embeddings
    # Set by no flag, only by models from Hugging Face:
    rope_theta: float = 10000.0  # the base of RoPE's frequencies
    rope_scaling: list | None = None  # see rope_frequencies
    norm_eps: float = 1e-5  # added to the mean square in every RMSNorm
    head_dim: int | None = None  # d, of a head; None: dim / num_heads
    qkv_bias: bool = False  # queries, keys and values have a bias, as in Qwen2

    def __post_init__(self):
        """Fills in head_dim; raises ValueError for values that do not fit together."""
        if self.head_dim is None:  # imported models set it, and H * d may differ from D
            divisor = 2 * self.num_heads  # a head's dimension must be even: RoPE rotates pairs
            if self.dim % divisor:
                suggested_dim = divisor * max(1, round(self.dim / divisor))
                raise ValueError(
                    f"dim {self.dim} is not a multiple of 2 * num_heads {self.num_heads}: "
                    f"try {suggested_dim}"
                )
            self.head_dim = self.dim // self.num_heads
        if self.head_dim % 2 or self.head_dim > 2**16:
            raise ValueError(f"head_dim {self.head_dim} is not an even number up to {2**16}")
        if self.context_size * self.num_kv_heads * self.head_dim > MAX_INT32:
            raise ValueError(f"context_size {self.context_size}: too many keys for MLX, give less")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}: "
                f"try {math.gcd(self.num_heads, self.num_kv_heads)}"
            )


@fast_version
def attend(queries, keys, values, mask="causal"):
    """Causal attention: queries [B, H, L, d], keys and values [B, K, N, d] -> [B, H, L, d].

    Queries belong to the last L of the N positions: in training L is N, in decoding mostly 1.
    mask: "causal", or bool [B, 1, L, N], true where a query may see a key; it must leave out later
    positions, too. Only extras/features/decode.py passes one, for texts of different lengths.
    """
    # softmax(queries @ keys.swapaxes(2, 3) * scale) @ values, with scores of -inf where the mask
    # is false, and each key/value head repeated H / K times.
    scale = queries.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


@fast_version
def rotate(x, frequencies, offset):
    """RoPE (Su et al. 2021) of x [B, H, L, d].

    offset: the first token's position, an int or, if L is 1, an array [B] with one for each row.
    frequencies: a NumPy array [d / 2] in radians per position; the i-th one rotates dimensions
    i and i + d / 2, as in Hugging Face's models.
    """
    d = x.shape[-1]
    periods = mx.array(1 / frequencies)  # MLX wants positions per radian
    return mx.fast.rope(x, d, traditional=False, base=None, scale=1.0, offset=offset, freqs=periods)


def rope_frequencies(d, theta, scaling=None):
    """The frequencies of `rotate`, [d / 2], in radians per position.

    scaling: None or, for texts longer than in training, [factor, low, high, original_context], as
    in Llama 3.1. Pairs of dimensions that turn at least `high` times within original_context
    positions keep their frequency; those that turn at most `low` times become `factor` times
    slower; in between, frequencies are interpolated.
    """
    frequencies = theta ** -(np.arange(0, d, 2) / d)
    if not scaling:
        return frequencies
    factor, low, high, original_context = scaling
    turns = original_context * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return smooth * frequencies + (1 - smooth) * frequencies / factor


class Attention(nn.Module):
    """Causal self-attention; H query heads share K key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config):
        super().__init__()
        D, d = config.dim, config.head_dim
        self.head_dim = d
        # A NumPy array, as an MLX array would be a parameter.
        self.frequencies = rope_frequencies(d, config.rope_theta, config.rope_scaling)
        self.q_proj = nn.Linear(D, config.num_heads * d, config.qkv_bias)
        self.k_proj = nn.Linear(D, config.num_kv_heads * d, config.qkv_bias)
        self.v_proj = nn.Linear(D, config.num_kv_heads * d, config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * d, D, bias=False)
        if config.qk_norm:
            # Keeps the scores in range at high learning rates (Henry et al. 2020; Qwen3).
            # All heads share one weight [d].
            self.q_norm = nn.RMSNorm(d, config.norm_eps)
            self.k_norm = nn.RMSNorm(d, config.norm_eps)

    def project_qkv(self, hidden, offset=0):
        """Hidden [B, L, D] to queries [B, H, L, d], keys [B, K, L, d] and values [B, K, L, d].

        offset: the position of the first token in its text, for RoPE.
        """
        queries = self.split_heads(self.q_proj(hidden))
        keys = self.split_heads(self.k_proj(hidden))
        values = self.split_heads(self.v_proj(hidden))
        if "q_norm" in self:
            queries = self.q_norm(queries)
            keys = self.k_norm(keys)
        queries = rotate(queries, self.frequencies, offset)
        keys = rotate(keys, self.frequencies, offset)
        return queries, keys, values

    def split_heads(self, projected):
        """[B, L, heads * d] to [B, heads, L, d]."""
        B, L, _ = projected.shape
        return projected.reshape(B, L, -1, self.head_dim).transpose(0, 2, 1, 3)

    def __call__(self, hidden, cache=None):
        """[B, L, D] to [B, L, D]; cache: a KVCache in decoding, see Sampling."""
        B, L, _ = hidden.shape
        if cache is None:
            queries, keys, values = self.project_qkv(hidden)
            attended = attend(queries, keys, values)  # [B, H, L, d]
        else:
            queries, keys, values = self.project_qkv(hidden, cache.offset)
            keys, values = cache.update_and_fetch(keys, values)
            attended = attend(queries, keys, values, cache.mask)
        joined = attended.transpose(0, 2, 1, 3).reshape(B, L, -1)  # [B, L, H * d]
        return self.o_proj(joined)


@fast_version
def relu2(x):
    """Squared ReLU (So et al. 2021).

    On a Linux CPU it costs little; silu and gelu need MLX's exp and erf, which are slow there.
    """
    return mx.square(nn.relu(x))


# The choices of --mlp, {name: (activation, is_gated)}. With a gate (Shazeer 2020), the hidden layer
# is activation(gate_proj(x)) * up_proj(x) instead of activation(up_proj(x)).
MLPS = {
    "relu2": (relu2, False),
    "gelu": (nn.gelu, False),  # the exact one, with erf
    "swiglu": (nn.silu, True),
}


class MLP(nn.Module):
    """The feed-forward layer, [B, L, D] to [B, L, D]."""

    def __init__(self, config):
        super().__init__()
        self.activation, self.is_gated = MLPS[config.mlp]
        if self.is_gated:
            self.gate_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def __call__(self, hidden):
        inner = self.up_proj(hidden)  # [B, L, mlp_dim]
        if self.is_gated:
            inner = self.activation(self.gate_proj(hidden)) * inner
        else:
            inner = self.activation(inner)
        return self.down_proj(inner)


# A row for each flag; other groups follow beside their code. SIZE is a whole number from 1 on,
# COUNT from 0 on.
FLAGS["model"] = {
    "context_size": Flag(48, SIZE, "context length in tokens"),
    "num_blocks": Flag(4, number(int, 1, 2**12), "transformer blocks"),
    "dim": Flag(1024, number(int, 1, 2**16), "model dimension"),
    "num_heads": Flag(8, SIZE, "query heads"),
    "num_kv_heads": Flag(None, SIZE, "key/value heads (default: num_heads)"),
    "qk_norm": Flag(False, bool, "RMS-normalize queries and keys"),
    "untie": Flag(False, bool, "separate output matrix instead of tied embeddings"),
    "mlp": Flag("relu2", one_of(MLPS), "activation of the feed-forward layers"),
    "mlp_dim": Flag(
        None,
        number(int, 1, 2**18),
        "width of the feed-forward layers (default: 4 dim; "
        "swiglu: 8/3 dim, rounded up to a multiple of 64)",
    ),
}


class Block(nn.Module):
    """Attention, then an MLP: each reads normalized hidden states [B, L, D] and adds to them."""

    def __init__(self, config, index):
        super().__init__()
        self.index = index
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def __call__(self, hidden, cache=None, dropout_masks=None):
        mask_index = 2 * self.index + 1
        attended = self.self_attn(self.input_layernorm(hidden), cache)
        hidden = hidden + dropout(attended, dropout_masks, mask_index)
        mlp_output = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + dropout(mlp_output, dropout_masks, mask_index + 1)


@fast_version
def checkpoint_block(block, run_block):
    """Gradient checkpointing (Chen et al. 2016): run_block, storing only its input for backward.

    block: the Module with its parameters; run_block: hidden [B, L, D] -> [B, L, D].
    """
    return nn.utils.checkpoint(block, run_block)


class Transformer(nn.Module):
    """Token ids [B, L] to final hidden states [B, L, D]; any output layer can go on top."""

    def __init__(self, config):
        super().__init__()
        self.grad_checkpoint = False  # see checkpoint_block
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = [Block(config, i) for i in range(config.num_blocks)]
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)

    def embed(self, tokens):
        """The embeddings [B, L, D] of tokens, before dropout."""
        hidden = self.embed_tokens(tokens)
        return hidden.astype(self.norm.weight.dtype)  # bfloat16 if the norms are, see make_step

    def __call__(self, tokens, caches=None, dropout_masks=None):
        """caches: a KVCache per block; dropout_masks: None for no dropout."""
        hidden = dropout(self.embed(tokens), dropout_masks, mask_index=0)
        if caches is None:
            caches = [None] * len(self.layers)
        for block, cache in zip(self.layers, caches):
            run_block = partial(block, cache=cache, dropout_masks=dropout_masks)
            if self.grad_checkpoint:
                run_block = checkpoint_block(block, run_block)
            hidden = run_block(hidden)
        return self.norm(hidden)


class LanguageModel(nn.Module):
    """Token ids [B, L] to logits [B, L, V] of the token that follows each position."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        if config.untie:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def __call__(self, tokens, caches=None, dropout_masks=None, logits_to_keep=None):
        """Logits of the last `logits_to_keep` positions (1 is enough to decode), or of all.

        Training, evaluation and sampling all call this. (For speed, fast.py's loss and metrics have
        a copy of this class. An edit of it turns them off.)
        """
        hidden = self.model(tokens, caches, dropout_masks)  # [B, L, D]
        if logits_to_keep is not None:
            hidden = hidden[:, -logits_to_keep:]
        return self.logits(hidden)

    def logits(self, hidden):
        """Logits [B, L, V] float32 of final hidden states [B, L, D].

        A softcap, a bias or a scale goes here.
        """
        output_layer = self.lm_head if self.config.untie else self.model.embed_tokens.as_linear
        return output_layer(hidden).astype(mx.float32)

    @property
    def output_matrix(self):
        """The output layer's matrix [V, D]: the embeddings, unless untied."""
        if self.config.untie:
            return self.lm_head.weight
        return self.model.embed_tokens.weight


def normal_init(name, shape, seed):
    """A standard normal array of this shape, to initialize a parameter.

    It depends only on the seed and the parameter's name: adding a parameter to a model leaves the
    values of all others unchanged. NumPy draws it, so it is the same on every device.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    return mx.array(rng.standard_normal(shape, np.float32))


# Matrices start at zero if their names end so.
ZERO_INIT = ("o_proj.weight", "down_proj.weight", "lm_head.weight")


FLAGS["init"] = {"seed": Flag(42, COUNT, "for weights, batches, dropout and samples")}


def init_weights(model, seed):
    """Initializes every matrix and bias; other vectors and scalars stay as their layers made them.

    Biases are 0, matrices normal with standard deviation 1 / sqrt(inputs). The matrices that write
    into the residual stream are 0, so that each block starts as the identity. An untied output
    layer is also 0.

    Embeddings have standard deviation 5 / dim. If they are tied, they are the output layer, too. At
    first, the model then predicts that each token repeats: its logit is 4 to 5 (up to a dim of
    1024), those of others are about 0, and the loss begins near ln(V + e^5). Untied, it begins at
    ln V.
    """
    weights = []
    for name, parameter in tree_flatten(model.parameters()):
        if name.endswith(".bias"):
            value = mx.zeros_like(parameter)
        elif parameter.ndim < 2:
            value = parameter  # 1 in a norm
        elif name.endswith(ZERO_INIT):
            value = mx.zeros_like(parameter)
        elif name.endswith("embed_tokens.weight"):
            value = normal_init(name, parameter.shape, seed) * 5 / model.config.dim
        else:
            # [O, I]: preserves the variance
            value = normal_init(name, parameter.shape, seed) * parameter.shape[-1] ** -0.5
        weights.append((name, value))
    model.load_weights(weights)


# ---- Dropout ------------------------------------------------------------------------------------
# A generator of masks of our own: fast on a CPU, and independent of how a batch is split.


def hash32(bits):
    """A hash of 32-bit numbers: each of its high bits depends on all bits of the argument.

    The constants are from "lowbias32" (Wellons 2018). These operations are vectorized, so a
    mask takes a tenth of the time that MLX's generator needs.
    """
    bits = bits * mx.array(0x7FEB352D, mx.uint32)
    return (bits ^ (bits >> 15)) * mx.array(0x846CA68B, mx.uint32)


def draw_dropout(iteration, num_rows, flags):
    """The dropout rate of a step, [] float32, and a key for each row, [num_rows, 2] uint32.

    The key of row r depends only on (seed, iteration, r). The rate changes linearly from --dropout
    to --dropout_final at `num_iters`.
    """
    final = flags.dropout if flags.dropout_final is None else flags.dropout_final
    dropout_rate = flags.dropout + (final - flags.dropout) * iteration / flags.num_iters
    # The 1 makes these random numbers differ from those of Batches.
    rng = np.random.default_rng([flags.seed, iteration, 1])
    row_keys = rng.integers(0, 2**32, (num_rows, 2), np.uint32)
    return mx.array(dropout_rate), mx.array(row_keys)


class DropoutMasks:
    """The masks of dropout (Srivastava et al. 2014) for the rows of one batch.

    dropout_rate: [] float32; row_keys: [B, 2] uint32, see draw_dropout; L, D: the shape of a row's
    hidden states. A row's masks depend only on its own key: splitting a batch does not change them.
    """

    def __init__(self, dropout_rate, row_keys, L, D):
        self.keep_prob = 1 - dropout_rate
        positions = mx.arange(L * D, dtype=mx.uint32).reshape(1, L, D)
        bits = hash32(positions + row_keys[:, None, None, 0]) ^ row_keys[:, None, None, 1]
        self.bits = bits ^ (bits >> 16)  # [B, L, D]


def dropout(hidden, dropout_masks, mask_index):
    """Applies dropout to hidden states [B, L, D]; dropout_masks: None for no dropout.

    mask_index: 0 is the mask of the embeddings; then come two for each block.
    """
    if dropout_masks is None:
        return hidden
    # Multiples of 2^32 / golden ratio, modulo 2^32, lie far apart.
    salt = mx.array(mask_index * 0x9E3779B9 % 2**32, mx.uint32)
    bits = hash32(dropout_masks.bits ^ salt)
    # The sum's top bit is 1 with probability keep_prob. A shift is vectorized, a comparison is not.
    keep_prob = dropout_masks.keep_prob
    mask = ((bits >> 1) + (keep_prob * 2**31).astype(mx.uint32)) >> 31
    return hidden * (mask.astype(hidden.dtype) / keep_prob.astype(hidden.dtype))


# ---- Loss and optimizer -------------------------------------------------------------------------


@fast_version
def training_loss(model, inputs, targets, scale, dropout_masks=None):
    """What training minimizes: the cross-entropy in nats, times `scale`, summed over positions.

    inputs, targets: ids [B, L]. An edit here does not change the evaluation, see token_metrics.
    With --teacher, distil.py's loss is used instead.
    """
    logits = model(inputs, dropout_masks=dropout_masks)  # [B, L, V]
    losses = nn.losses.cross_entropy(logits, targets)  # [B, L]
    return (losses * scale).sum()


@fast_version
def sum_over_shards(function, *arrays):
    """Returns function(*arrays), a tree of sums over the B rows of arrays [B, ...].

    The first array is [B, L]. The fast version divides the rows among the cores, and adds up what
    the function returns for each part.
    """
    return function(*arrays)


@fast_version
def clip_grad_norm(gradients, max_norm):
    """Scales a tree of gradients to a norm of at most max_norm; returns it and its old norm."""
    return optim.clip_grad_norm(gradients, max_norm)


class Muon(optim.Optimizer):
    """Muon (Jordan et al. 2024) with decoupled weight decay, like AdamW's.

    Unlike MLX's, it orthogonalizes all matrices of a shape at once, and its weight decay does not
    pass through the momentum.
    """

    # Muon's learning rate is this times --learning_rate, which is AdamW's. 5 was best on words; on
    # characters, 5, 8 and 10 were equally good.
    lr_scale = 5

    def __init__(self, learning_rate, weight_decay, momentum=0.9):
        super().__init__()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.momentum = momentum

    def init_single(self, parameter, state):
        state["v"] = mx.zeros_like(parameter)

    def apply_gradients(self, gradients, parameters):
        directions = super().apply_gradients(gradients, parameters)  # by apply_single
        # Stacking matrices of the same shape halves the operations per step of recipe `first`.
        by_shape = {}
        for name, direction in tree_flatten(directions):
            by_shape.setdefault(direction.shape, {})[name] = direction
        orthogonal = []
        for matrices in by_shape.values():
            stack = mx.stack([*matrices.values()])
            orthogonal += zip(matrices, self.orthogonalize(stack))
        return tree_map(self.update_matrix, tree_unflatten(orthogonal), parameters)

    def apply_single(self, gradient, parameter, state):
        """The direction of Nesterov momentum; MLX's own optimizers return a new parameter here."""
        v = self.momentum * state["v"] + (1 - self.momentum) * gradient
        state["v"] = v
        return self.momentum * v + (1 - self.momentum) * gradient

    def orthogonalize(self, stack):
        """Brings all singular values of matrices [N, R, C] near 1, by Newton-Schulz steps.

        No matrix affects another, so the fast version of `parallelize` can divide them among cores.
        """
        is_tall = stack.shape[1] > stack.shape[2]
        x = stack.swapaxes(1, 2) if is_tall else stack
        x = x / (mx.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
        # Jordan's coefficients: small values grow fastest, and all end between about 0.7 and 1.2.
        a, b, c = 3.4445, -4.7750, 2.0315
        for _ in range(5):
            # a * x + (b * gram + c * gram @ gram) @ x, in fewer passes over memory
            gram = x @ x.swapaxes(1, 2)
            x = mx.addmm(x, mx.addmm(gram, gram, gram, alpha=c, beta=b), x, beta=a)
        return x.swapaxes(1, 2) if is_tall else x

    def update_matrix(self, direction, matrix):
        """The matrix after a step in an orthogonalized direction."""
        rows, columns = matrix.shape
        # Outputs of a tall matrix then change as much per step as those of a square one.
        lr = self.learning_rate * max(1, rows / columns) ** 0.5
        # The same decay as AdamW's, whose learning rate is not multiplied by lr_scale.
        decay = self.learning_rate * self.weight_decay / self.lr_scale
        return matrix * (1 - decay) - lr * direction


@fast_version
def parallelize(optimizer):
    """Returns the optimizer unchanged; the fast version distributes its work over the cores."""
    return optimizer


def make_adamw(flags, weight_decay):
    """MLX's AdamW (Loshchilov & Hutter 2019)."""
    betas = [flags.beta1, flags.beta2]
    return optim.AdamW(flags.learning_rate, betas, bias_correction=True, weight_decay=weight_decay)


def make_muon(flags, weight_decay):
    return Muon(flags.learning_rate, weight_decay)


# The choices of --optimizer: a function that makes the optimizer of the blocks' matrices, and one
# for all other parameters.
OPTIMIZERS = {
    "adamw": (make_adamw, make_adamw),
    "muon": (make_muon, make_adamw),
}


FLAGS["init"] |= {
    "optimizer": Flag(
        "adamw",
        one_of(OPTIMIZERS),
        f"muon: for the blocks' matrices, at {Muon.lr_scale} times the learning rate",
    ),
}
BETA = number(float, 0, 0.99999)  # 1 would divide by zero

FLAGS["training"] = {
    "learning_rate": Flag(3e-4, NONNEGATIVE, "peak learning rate"),
    "weight_decay": Flag(1e-5, NONNEGATIVE, "decoupled weight decay of the matrices"),
    "embedding_decay": Flag(
        None, NONNEGATIVE, "weight decay of embeddings and output matrix (default: weight_decay)"
    ),
    "beta1": Flag(0.9, BETA, "AdamW's beta1, decay rate of the mean gradient"),
    "beta2": Flag(0.99, BETA, "AdamW's beta2, decay rate of the mean squared gradient"),
    "grad_clip": Flag(1.0, NONNEGATIVE, "maximum gradient norm; 0: no clipping"),
}


def make_optimizer(model, flags):
    """The optimizer of all trained parameters; call set_learning_rate before each step.

    Weight decay: --weight_decay for the blocks' matrices, none for norms and biases,
    --embedding_decay for the rest: the embeddings, the output layer and stacks of matrices.
    """
    block_optimizer, other_optimizer = OPTIMIZERS[flags.optimizer]
    embedding_decay = flags.weight_decay
    if flags.embedding_decay is not None:
        embedding_decay = flags.embedding_decay
    groups = [
        block_optimizer(flags, flags.weight_decay),
        other_optimizer(flags, embedding_decay),
        other_optimizer(flags, 0.0),
    ]
    # filters[i] selects the parameters of groups[i], the last group takes the rest. Muon takes only
    # matrices: a stack of them, which has three dimensions, goes to the second group.
    filters = [
        lambda name, parameter: name.startswith("model.layers.") and parameter.ndim == 2,
        lambda name, parameter: parameter.ndim >= 2,
    ]
    optimizer = optim.MultiOptimizer([parallelize(group) for group in groups], filters)
    optimizer.init(model.trainable_parameters())
    return optimizer


def set_learning_rate(optimizer, learning_rate):
    """Sets each group's learning rate, multiplied by its `lr_scale` if it has one."""
    for group in optimizer.optimizers:
        group.learning_rate = learning_rate * getattr(group, "lr_scale", 1)


def constant_schedule(iteration, flags):
    """The peak rate at every step."""
    return 1


def cosine_schedule(iteration, flags):
    """The peak rate until the cooldown; then half a cosine down to `min_lr`."""
    cosine = (1 + math.cos(math.pi * cooldown_progress(iteration, flags))) / 2  # 1 to 0
    return 1 - (1 - min_factor(flags)) * (1 - cosine)  # exactly 1 before cooldown


def linear_schedule(iteration, flags):
    """The peak rate until the cooldown; then a straight line down to `min_lr`."""
    return 1 - (1 - min_factor(flags)) * cooldown_progress(iteration, flags)


def cooldown_progress(iteration, flags):
    """The completed fraction of the cooldown: 0 until it begins, 1 at `num_iters`.

    The cooldown is the last fraction `lr_cooldown` of the steps after warmup.
    """
    cooldown_steps = flags.lr_cooldown * (flags.num_iters - flags.lr_warmup)
    return max(0, iteration - (flags.num_iters - cooldown_steps)) / max(1, cooldown_steps)


def min_factor(flags):
    """--min_lr as a multiple of the peak rate, by default a tenth."""
    if flags.min_lr is None:
        return 0.1
    return flags.min_lr / (flags.learning_rate or 1)  # if the peak is 0, any multiple of it is 0


# The choices of --lr_schedule: functions of the step, counted from 0, that give a multiple of
# --learning_rate. learning_rate_at applies warmup on top.
SCHEDULES = {"constant": constant_schedule, "cosine": cosine_schedule, "linear": linear_schedule}

FLAGS["training"] |= {
    "lr_schedule": Flag("constant", one_of(SCHEDULES), "schedule after warmup"),
    "lr_warmup": Flag(200, COUNT, "warmup steps"),
    "lr_cooldown": Flag(1.0, FRACTION, "last fraction of steps after warmup that decays the rate"),
    "min_lr": Flag(
        None, NONNEGATIVE, "learning rate after the last step (default: a tenth of the peak)"
    ),
    "average": Flag(0.0, FRACTION, "average the weights over about this last fraction of steps"),
}


def learning_rate_at(iteration, flags):
    """The scheduled learning rate of step `iteration`, counted from 0.

    Warmup scales it by a linearly rising factor in the first `lr_warmup` steps.
    """
    warmup = min(1, (iteration + 1) / max(1, flags.lr_warmup))  # + 1: a rate of 0 learns nothing
    return flags.learning_rate * SCHEDULES[flags.lr_schedule](iteration, flags) * warmup


def update_average(average, weights, iteration, fraction):
    """The average of the weights over about the last `fraction` of the steps taken.

    average: a tree of arrays, as it was before step `iteration` (counted from 0), or None if there
    is none yet; weights: those after that step. Step s of n enters with a coefficient about
    proportional to (s / n) ^ (1 / fraction - 1) (Shamir & Zhang 2013; Karras et al. 2024), so
    the average depends neither on where the run will end nor on where it was interrupted.
    """
    if average is None:
        return weights
    alpha = min(1, 1 / (fraction * (iteration + 1)))  # the newest weights' fraction of the average
    average = interpolate(average, weights, mx.array(alpha))
    mx.eval(average)  # or the graphs of all steps would pile up
    return average


@mx.compile
def interpolate(average, weights, alpha):
    """Interpolates between two trees of arrays: `alpha` 0 gives `average`, 1 gives `weights`."""
    return tree_map(lambda old, new: old + alpha * (new - old), average, weights)


# ---- Batches ------------------------------------------------------------------------------------

FLAGS["training"] |= {
    "batch_size": Flag(32, number(int, 1, 2**20), "sequences per batch"),
    "grad_accumulation": Flag(1, SIZE, "batches per optimizer step"),
    "dropout": Flag(0.0, number(float, 0, 0.9), "dropout rate of embeddings and residual branches"),
    "dropout_final": Flag(
        None, number(float, 0, 0.9), "dropout rate at the end, reached linearly (default: dropout)"
    ),
}


class Batches:
    """An endless stream of batches: windows of a text, token ids [N], in permuted order.

    Each epoch cuts the text into windows, from a random `offset` on (a fixed one would always leave
    out the same last tokens), and draws their order, `perm`. `cursor` is the index of the next
    window in `perm`.
    Raises UsageError if the text is shorter than one window.
    """

    def __init__(self, tokens, context_size, rows_per_step, seed):
        if len(tokens) <= context_size:  # a window is L inputs plus one token, the last target
            remedy = "use a longer text or --train_tokens"
            if len(tokens) > 1:
                remedy += f" or --context_size {len(tokens) - 1}"
            raise UsageError(
                f"the training text has {len(tokens):,} tokens, fewer than "
                f"--context_size {context_size} needs: {remedy}"
            )
        self.tokens = tokens
        self.context_size = context_size
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.begin_epoch(0)

    def begin_epoch(self, epoch):
        """Draws the offset and the order of the windows; `epoch` counts from 0."""
        rng = np.random.default_rng([self.seed, epoch])
        num_offsets = min(self.context_size, len(self.tokens) - self.context_size)
        offset = int(rng.integers(num_offsets))
        num_windows = (len(self.tokens) - 1 - offset) // self.context_size
        self.seek(epoch, 0, offset, rng.permutation(np.arange(num_windows, dtype=np.uint32)))

    def seek(self, epoch, cursor, offset, perm):
        """Goes to a position in an epoch.

        perm: [num_windows] uint32, saved in checkpoints, as another NumPy may draw a different one.
        Raises ValueError if these are not windows of the text.
        """
        if not {type(epoch), type(cursor), type(offset)} <= {int}:
            raise ValueError("its place in the text is no number of windows")
        num_windows = (len(self.tokens) - 1 - offset) // self.context_size
        if perm.dtype != np.uint32 or perm.shape != (num_windows,) or perm.max() >= num_windows:
            raise ValueError("its order of batches is that of another text")
        self.epoch = epoch
        self.cursor = cursor
        self.offset = offset
        self.perm = perm

    def next(self):
        """Inputs and targets of the next step, [N, L] int32.

        If fewer windows are left than a step needs, the next epoch begins. If even a whole epoch
        has fewer, they repeat within the step.
        """
        has_full_step = self.cursor + self.rows_per_step <= len(self.perm)
        if not has_full_step and self.cursor > 0:
            self.begin_epoch(self.epoch + 1)
        indices = range(self.cursor, self.cursor + self.rows_per_step)
        window_indices = self.perm.take(indices, mode="wrap").astype(np.int64)
        starts = self.offset + window_indices * self.context_size  # [N]
        self.cursor += self.rows_per_step
        ends = starts + self.context_size + 1
        rows = np.stack([self.tokens[start:end] for start, end in zip(starts, ends)])  # [N, L + 1]
        return mx.array(rows[:, :-1], mx.int32), mx.array(rows[:, 1:], mx.int32)


# ---- Evaluation ---------------------------------------------------------------------------------


@fast_version
def token_metrics(model, inputs, targets):
    """The metrics of an evaluation at each position, {name: [B, L]}; inputs, targets: ids [B, L].

    The mean of each metric is shown and logged. `loss` is the cross-entropy in nats, whatever
    training minimizes; it alone decides which checkpoint is best and when --patience ends a run.
    """
    logits = model(inputs)  # [B, L, V]
    return {"loss": nn.losses.cross_entropy(logits, targets)}


def evaluate(model, tokens, batch_size, stride=0, limit=0, interrupts=None, ranks=device.ALONE):
    """The means of token_metrics, {name: number}, over all of `tokens` [N] but the first one.

    Each token counts once. Windows start `stride` tokens apart: by default context_size, so that
    they do not overlap; with less, each token has more context. limit: how many tokens are scored,
    in windows that are evenly spread, if not all are. Returns None on a signal.
    """
    context_size = model.config.context_size
    stride = stride or context_size
    num_targets = len(tokens) - 1

    def metric_sums(inputs, targets, mask):
        metrics = token_metrics(model, inputs, targets)
        return {name: (values * mask).sum() for name, values in metrics.items()}

    # Traced once, as all batches have the same shape. Without `inputs`, the compiled function
    # would keep the weights as constants.
    @partial(mx.compile, inputs=[model.state])
    def batch_sums(*windows):
        return sum_over_shards(metric_sums, *windows)

    # No window starts after one that reaches the end of the text.
    last_start = max(num_targets - context_size, 0)
    starts = np.arange(0, last_start + stride, stride)
    if context_size <= limit < num_targets:
        starts = np.linspace(0, num_targets - context_size, limit // context_size).astype(int)
        num_targets = limit // context_size * context_size
    batch_size = min(batch_size, len(starts))
    # Windows that start at the end, all masked, fill up each rank's last batch.
    num_padding = -len(starts) % (batch_size * ranks.size)
    starts = np.append(starts, np.full(num_padding, len(tokens) - 1))
    start_batches = starts.reshape(-1, batch_size)
    totals = Counter()  # {name: sum}, in 64 bits, as Python floats
    stop_signal = None
    for batch_starts in start_batches[ranks.rank :: ranks.size]:
        stop_signal = interrupts and interrupts.stop_signal
        if stop_signal:
            break
        sums = batch_sums(*evaluation_windows(tokens, batch_starts, context_size, stride))
        totals.update({name: array.item() for name, array in sums.items()})
    stop_signal, _ = ranks.agree(stop_signal)
    if stop_signal:
        interrupts.stop_signal = stop_signal  # perhaps one that only another rank got
        return None
    return {name: ranks.all_sum(total) / num_targets for name, total in totals.items()}


def evaluation_windows(tokens, starts, context_size, stride):
    """Inputs, targets and mask (1: counts) of the windows at `starts` [B]: [B, L] int32 each."""
    num_targets = len(tokens) - 1
    columns = np.arange(context_size)  # [L]
    positions = starts[:, None] + columns  # [B, L]
    # Where windows overlap, tokens of the previous window do not count again.
    is_new = columns >= context_size - stride
    is_first = starts[:, None] == 0
    mask = (positions < num_targets) & (is_new | is_first)
    positions = np.minimum(positions, num_targets - 1)  # the end is masked: any token will do
    windows = (tokens[positions], tokens[positions + 1], mask)
    return [mx.array(array, mx.int32) for array in windows]


# How metrics are shown on the screen; others are shown by their names. loss: nats/token, with
# --teacher mixed with the distillation loss; epoch: passes over the text; peak_mib: MLX's peak
# memory in this process. For all logged metrics, see Reporter.
reports.METRIC_FORMATS |= {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "gradient_norm": "grad {:.2f}",
    "ms_per_step": "{:,.1f} ms/step",
    "tokens_per_second": "{:,.0f} tokens/s",
    "epoch": "epoch {:.2f}",
    "peak_mib": "peak {:,.0f} MiB",
}
reports.BAR_METRICS[:] = ["loss", "learning_rate", "tokens_per_second"]  # fit into 80 columns


def print_evaluation(name, model, dataset, flags, interrupts=None, ranks=device.ALONE):
    """Prints the losses of a whole split, unless a signal arrives."""
    split = dataset.splits[name]
    num_tokens = len(split.tokens)
    start = time.perf_counter()
    options = {"stride": flags.eval_stride, "interrupts": interrupts, "ranks": ranks}
    metrics = evaluate(model, split.tokens, flags.batch_size, **options)
    if metrics is not None:
        seconds = time.perf_counter() - start
        losses = reports.describe_losses(name, metrics, split, dataset.tokenizer)
        times = f"{seconds:.1f} s, {1000 * seconds / num_tokens:.4f} ms per token"
        say(f"{losses}, {num_tokens / seconds:,.0f} tokens/s ({times})")


# ---- Training -----------------------------------------------------------------------------------

FLAGS["training"] |= {
    "dtype": Flag("float32", one_of(["float32", "bfloat16"]), "bfloat16 keeps weights in float32"),
}

FLAGS["session"] = {
    "num_iters": Flag(100000, SIZE, "total number of training steps"),
    "patience": Flag(None, SIZE, "stop after this many evaluations without improvement"),
    "steps_per_report": Flag(10, SIZE, "report interval in steps"),
    "steps_per_eval": Flag(
        1000, COUNT, "evaluation interval in steps, besides the end; 0: no evaluation"
    ),
    "steps_per_save": Flag(
        1000, SIZE, "checkpoint interval in steps, besides evaluations and the end"
    ),
    "minutes_per_save": Flag(
        10.0,
        NONNEGATIVE,
        "also save after so many minutes of training, over the last such; 0: never",
    ),
    "keep": Flag(3, SIZE, "newest checkpoints to keep, besides the best"),
    "eval_tokens": Flag(
        100000, COUNT, "validation tokens per evaluation in training, at most, spread; 0: all"
    ),
    "eval_test": Flag(False, bool, "evaluate on the test split at the end"),
    "report_to": Flag(None, str, "wandb, or none"),
    "sample_prompt": Flag(
        [], str, "what to continue after a save, unless by Ctrl+C (default: the start of a text)"
    ),
    "sample_tokens": Flag(
        60, COUNT, "maximum number of tokens of these samples; by default five lines; 0: none"
    ),
    "grad_checkpoint": Flag(False, bool, "gradient checkpointing: less memory, more compute"),
} | datasets.TEXT_FLAGS["session"]


def make_step(model, optimizer, flags, ranks=device.ALONE, teacher=None):
    """Makes step_fn(dropout_rate, inputs, targets, row_keys), which takes an optimizer step.

    inputs, targets: [N, L], N = batch_size * grad_accumulation; dropout_rate, row_keys: see
    draw_dropout. step_fn returns {name: scalar array}: `loss`, the mean of training_loss over
    positions, and `gradient_norm`, before clipping. Call make_step after Run.restore, which
    replaces arrays.
    """
    model.model.grad_checkpoint = flags.grad_checkpoint
    has_dropout = flags.dropout or flags.dropout_final
    loss_of_text = training_loss
    if teacher is not None:
        loss_of_text = extra("distil").make_loss(teacher, flags)
    if flags.dtype == "bfloat16" and device.on_gpu():
        loss_of_text = with_bfloat16_weights(loss_of_text)

    # This runs once for each shard of a micro-batch, and the results are added up: it has to return
    # a sum over rows, and a weight penalty here would count once for each shard.
    def loss_fn(scale, dropout_rate, inputs, targets, row_keys):
        dropout_masks = None
        if has_dropout:
            D = model.config.dim
            dropout_masks = DropoutMasks(dropout_rate, row_keys, inputs.shape[1], D)
        return loss_of_text(model, inputs, targets, scale, dropout_masks)

    value_and_grad = nn.value_and_grad(model, loss_fn)

    # Compiled once per set of shapes, then replayed. Arrays that are neither arguments nor in
    # `inputs` become constants, which is right for the teacher's weights.
    @partial(mx.compile, inputs=[model.state])
    def loss_and_gradients(*arguments):
        weights = model.parameters()
        sums = value_and_grad(*arguments)
        model.update(weights)  # value_and_grad has left its tracers in the model
        return sums

    # Trees of arrays that each step reads and replaces: without `outputs`, changes would be lost.
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def optimizer_step(loss, gradients):
        gradients, norm = clip_grad_norm(gradients, flags.grad_clip or math.inf)
        optimizer.update(model, gradients)
        return {"loss": loss, "gradient_norm": norm}

    def step_fn(dropout_rate, inputs, targets, row_keys):
        # Each rank sums over its own positions. Scaled by this, the mean of the ranks' sums is the
        # mean over all positions.
        scale = ranks.size / targets.size
        function = partial(loss_and_gradients, scale, dropout_rate)
        with bfloat16_products(flags.dtype == "bfloat16"):
            batch = (inputs, targets, row_keys)
            loss, gradients = mean_over_batch(function, batch, flags.batch_size, ranks)
            metrics = optimizer_step(loss, gradients)
            # MLX is lazy: most of the above only builds a graph, which is computed here. What is
            # not evaluated stays a graph, which grows with each step.
            mx.eval(metrics, state)
        return metrics

    return step_fn


def mean_over_batch(function, batch, batch_size, ranks):
    """The mean over ranks of function(*batch), a tree of sums over rows.

    batch: arrays [N, ...]. Each micro-batch of batch_size rows is divided among the ranks, then
    among streams.
    """
    begin = batch_size * ranks.rank // ranks.size
    end = batch_size * (ranks.rank + 1) // ranks.size
    num_rows = len(batch[0])
    total = None
    for start in range(0, num_rows, batch_size):
        rows = slice(start + begin, start + end)
        sums = sum_over_shards(function, *(array[rows] for array in batch))
        total = sums if total is None else tree_map(mx.add, total, sums)
        if num_rows > batch_size:  # or all would be in memory at once
            mx.eval(total)
    return ranks.all_mean(total)  # ranks exchange gradients only here


def with_bfloat16_weights(loss_of_text):
    """A loss like training_loss, for a GPU: all weights but the embeddings are cast to bfloat16.

    Master weights, optimizer state and loss stay float32. (On a CPU, bfloat16_products rounds the
    inputs of matrix products instead.)
    """

    def to_bfloat16(name, parameter):
        # Embeddings stay in float32: a bfloat16 sum would lose the many small gradients of a
        # frequent token.
        return parameter if "embed_" in name else parameter.astype(mx.bfloat16)

    def loss(model, *arguments):
        model.update(tree_map_with_path(to_bfloat16, model.parameters()))  # LoRA's base, too
        return loss_of_text(model, *arguments)

    return loss


def train(run, interrupts, ranks):
    """Trains a run from its current iteration to `num_iters` or an earlier end.

    Returns a signal that has arrived, if any. Raises RunError if the run diverges.
    """
    flags = run.flags
    run.starts.append(run.iteration)
    step_fn = make_step(run.model, run.optimizer, flags, ranks, run.teacher)
    time_limit = math.inf  # in seconds of training
    if flags.max_minutes is not None:
        time_limit = run.seconds + 60 * flags.max_minutes
    with contextlib.closing(make_reporter(run, ranks)) as reporter:
        settle = partial(evaluate_and_save, run, interrupts, ranks, reporter, time_limit)
        # A run that is resumed may be complete, or was stopped before its evaluation.
        is_done, stop_signal = settle()
        while not is_done and not stop_signal:
            is_first_after_save = not run.has_unsaved_changes
            metrics = train_step(run, step_fn)
            if not math.isfinite(metrics["loss"] + metrics["gradient_norm"]):
                raise reports.divergence_error(run, "loss or gradient", run.iteration - 1)
            # A finite step from the newest checkpoint shows that it is good: older ones can go.
            if is_first_after_save and ranks.rank == 0:
                runs.prune_checkpoints(run)
            reporter.report_step(metrics)
            is_done, stop_signal = settle()
    # No step follows the last checkpoint. A finite validation loss, which `validate` requires, also
    # shows that it is good.
    if run.evaluation and ranks.rank == 0:
        runs.prune_checkpoints(run)
    if run.is_out_of_patience():
        say(f"Stopped: no improvement in {run.evaluations_since_best()} evaluations (--patience).")
    if run.seconds >= time_limit:
        say(f"--max_minutes {flags.max_minutes:g} reached at iteration {run.iteration:,}.")
    if flags.eval_test and not stop_signal:
        with run.using_average() as model:
            print_evaluation("test", model, run.dataset, flags, interrupts, ranks)
    stop_signal, _ = ranks.agree(interrupts.stop_signal)
    return stop_signal


def train_step(run, step_fn):
    """Takes the next step of a run; returns its metrics, {name: number}."""
    flags = run.flags
    start = time.perf_counter()
    lr = learning_rate_at(run.iteration, flags)
    set_learning_rate(run.optimizer, lr)  # MLX keeps it in optimizer.state: no recompilation
    inputs, targets = run.batches.next()
    dropout_rate, row_keys = draw_dropout(run.iteration, len(inputs), flags)
    metrics = step_fn(dropout_rate, inputs, targets, row_keys)
    if flags.average:
        weights = run.model.trainable_parameters()
        run.average = update_average(run.average, weights, run.iteration, flags.average)
    metrics = {name: array.item() for name, array in metrics.items()}
    run.count_step(inputs.size, time.perf_counter() - start, metrics["loss"])
    return metrics | {"learning_rate": lr}


def evaluate_and_save(run, interrupts, ranks, reporter, time_limit):
    """Evaluates and saves a run if that is due at its current iteration.

    Returns whether it is done, and a signal that has arrived, or None.
    """
    flags = run.flags
    stop_signal, is_time_up = ranks.agree(interrupts.stop_signal, run.seconds >= time_limit)
    # Evaluate before saving, so that the checkpoint records the loss. If a signal ends the
    # evaluation, the resumed run repeats it.
    is_due = run.is_evaluation_due() or (is_time_up and flags.steps_per_eval)
    if is_due and run.iteration > 0 and not run.evaluation:
        validate(run, interrupts, ranks, reporter)
    is_done = is_time_up or run.iteration >= flags.num_iters or run.is_out_of_patience()
    if is_done or stop_signal or run.is_save_due():
        if ranks.rank == 0:
            save_and_sample(run, interrupts, reporter)
        # A signal that arrived meanwhile ends the run before the next step.
        stop_signal, _ = ranks.agree(interrupts.stop_signal)
    elif ranks.rank == 0 and run.is_save_overdue():  # others need not know
        save(run, interrupts, is_interim=True)
    return is_done, stop_signal


def validate(run, interrupts, ranks, reporter):
    """Evaluates the validation split, unless a signal arrives.

    It scores run.origin.eval_size tokens. What only --max_minutes causes is shown, not recorded:
    checkpoints do not depend on that flag. Raises RunError if the loss is not finite.
    """
    split = run.dataset.valid
    size = run.origin.eval_size
    start = time.perf_counter()
    with run.using_average() as model:
        metrics = evaluate(model, split.tokens, run.flags.batch_size, 0, size, interrupts, ranks)
    if metrics is None:
        return
    seconds = time.perf_counter() - start
    if not math.isfinite(metrics["loss"]):
        raise reports.divergence_error(run, "validation loss", run.iteration)
    mark = ""
    if run.is_evaluation_due():
        bits = split.bits_per_byte(metrics["loss"])
        evaluation = Evaluation(run.iteration, metrics["loss"], size, bits, run.origin.eval_windows)
        run.evaluations.append(evaluation)
        run.has_unsaved_changes = True
        if run.evaluation == runs.best_evaluation(run.evaluations):
            mark = " (best)"
    tokenizer = run.dataset.tokenizer
    losses = reports.describe_losses("valid", metrics, split, tokenizer, mark)
    reporter.report_evaluation(losses, metrics, seconds)


def make_reporter(run, ranks):
    """What reports the progress of a run: on the screen, in its folder, and to a dashboard."""
    if ranks.rank > 0:  # only rank 0 saves and reports
        return reports.SilentReporter()
    dashboard = None
    if run.flags.report_to == "wandb":
        dashboard = extra("report").Dashboard(run)
    return reports.Reporter(run, dashboard)


# ---- Sampling -----------------------------------------------------------------------------------
# A Conversation has a Decoder (ids to the next id) and, for each reply, a Detokenizer (to text).


def bit_width(text):
    """A flag's type: bits of a quantized weight; "int8" is 8."""
    return int(one_of(["4", "8", "16"])(text.removeprefix("int")))


FLAGS["sampling"] = {
    "max_tokens": Flag(200, SIZE, "maximum number of new tokens"),
    "num_samples": Flag(1, number(int, 1, 10**6), "samples of --prompt, with consecutive seeds"),
    "temperature": Flag(0.5, number(float, 0, 100), "sampling temperature; 0: greedy"),
    "top_k": Flag(50, COUNT, "sample from the k most likely tokens; 0: all"),
    "top_p": Flag(1.0, FRACTION, "nucleus sampling threshold"),
    "min_p": Flag(0.0, FRACTION, "minimum probability relative to the most likely token"),
    "repetition_penalty": Flag(
        1.0, number(float, 0.01, 100), "penalty on tokens that have occurred; 1: none"
    ),
    "stop": Flag(None, nonempty, "stop before this text"),
    "stop_at_end": Flag(True, bool, "end a sample at the end token, where texts end with one"),
    "draft": Flag(None, nonempty, "draft checkpoint for speculative decoding"),
    "quantize": Flag(None, bit_width, "quantize trained weights to 4, 8 or 16 bits"),
}


def penalize(logits, ids, penalty):
    """Applies the repetition penalty (Keskar et al. 2019) to ids that occur in a row's text.

    ids: a list for each row. Logits above 0 are divided by the penalty, others multiplied.
    """
    if penalty == 1:
        return logits
    is_seen = np.zeros(logits.shape, bool)  # [B, V]
    for row, row_ids in enumerate(ids):
        is_seen[row, row_ids] = True
    penalized = mx.where(logits > 0, logits / penalty, logits * penalty)
    return mx.where(mx.array(is_seen), penalized, logits)


def keep_top_k(logits, k):
    """Logits with all but the `k` largest set to -inf; ties with the k-th stay. 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    largest = mx.topk(logits, k, axis=-1)  # [B, k], unordered
    threshold = largest.min(axis=-1, keepdims=True)  # [B, 1]
    return mx.where(logits < threshold, -math.inf, logits)


def keep_top_p(logits, p):
    """Nucleus sampling (Holtzman et al. 2020): logits with all but the nucleus set to -inf.

    The nucleus is the fewest tokens whose total probability reaches `p`, at least one, and ties
    with them.
    """
    if p >= 1:
        return logits
    # Only what top-k has left needs to be sorted, not all of a large vocabulary.
    num_left = max(1, (logits > -math.inf).sum(axis=-1).max().item())
    ascending = mx.sort(mx.topk(logits, num_left, axis=-1), axis=-1)
    mass_above = 1 - mx.cumsum(mx.softmax(ascending, axis=-1), axis=-1)  # of larger logits
    threshold = mx.where(mass_above < p, ascending, math.inf).min(axis=-1, keepdims=True)  # [B, 1]
    threshold = mx.minimum(threshold, ascending[..., -1:])  # p = 0 keeps the largest
    return mx.where(logits < threshold, -math.inf, logits)


def keep_min_p(logits, p):
    """Min-p sampling (Nguyen et al. 2024): logits with the least likely set to -inf.

    Removes tokens less than `p` times as probable as the most likely one. 0 keeps all.
    """
    if p == 0:
        return logits
    threshold = logits.max(axis=-1, keepdims=True) + math.log(p)  # [B, 1]
    return mx.where(logits < threshold, -math.inf, logits)


def process_logits(logits, flags, ids):
    """Logits [B, V] to sample from; ids: for each row, the list of ids in the model's window.

    Applies the repetition penalty, temperature, top-k, top-p and min-p, in this order, as in
    Hugging Face's transformers. At temperature 0, only the penalty applies.
    """
    logits = penalize(logits.astype(mx.float32), ids, flags.repetition_penalty)
    if is_greedy(flags):
        return logits
    logits = keep_top_k(logits / flags.temperature, flags.top_k)
    logits = keep_top_p(logits, flags.top_p)
    return keep_min_p(logits, flags.min_p)


def sample_token(logits, flags, key):
    """An id, [] uint32, sampled from logits [V] of process_logits; key: [2] uint32."""
    if is_greedy(flags):
        return logits.argmax()
    return mx.random.categorical(logits, key=key)


def is_greedy(flags):
    """Whether the most probable token is taken: at a temperature of 0, or close to it."""
    return flags.temperature < 1e-6


@fast_version
def sample_tokens(logits, flags, windows, keys):
    """An id for each row of logits [B, V], a list.

    windows: for each row, the list of ids in the model's window; keys: [B, 2] numbers. A row's id
    does not depend on the other rows.
    """
    logits = process_logits(logits, flags, windows)

    def sample_one(row, key):
        return sample_token(row, flags, key)

    return mx.vmap(sample_one)(logits, mx.array(keys, mx.uint32)).tolist()


class KVCache:
    """The keys and values of the tokens that one Attention has read so far."""

    def __init__(self):
        self.mask = "causal"  # for `attend`
        self.keys = None  # [B, K, capacity, d], in the order of the positions
        self.values = None
        self.offset = 0  # positions read so far

    def update_and_fetch(self, keys, values):
        """Adds keys and values [B, K, L, d]; returns those of all positions so far."""
        end = self.offset + keys.shape[2]
        self.reserve(end, keys, values)
        self.keys[:, :, self.offset : end] = keys
        self.values[:, :, self.offset : end] = values
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reserve(self, end, keys, values):
        """Makes room for `end` positions of keys and values like these, [B, K, any, d].

        The capacity is a multiple of 256, not a whole context, which can be very long.
        """
        if self.keys is None:
            self.keys = keys[:, :, :0]
            self.values = values[:, :, :0]
        B, K, capacity, d = self.keys.shape
        if end > capacity:
            zeros = mx.zeros((B, K, 256 * math.ceil(end / 256) - capacity, d), keys.dtype)
            self.keys = mx.concatenate([self.keys, zeros], axis=2)
            self.values = mx.concatenate([self.values, zeros], axis=2)


@fast_version
class Reader:
    """A model that reads texts in parts: keys and values of what it has read are cached."""

    def __init__(self, model):
        self.model = model
        self.caches = [KVCache() for _ in model.model.layers]

    def read(self, parts, count=1):
        """Logits [B, count, V] after each of the last `count` tokens.

        parts: for each text, the list of ids that follow what was read of it, all equally long.
        """
        return self.model(mx.array(parts), self.caches, logits_to_keep=count)


TOKENS_PER_PASS = 1024  # of a prompt: attention takes memory for each pair of them


class Decoder:
    """A model that continues a text.

    ids: the text so far, a list; callers may append to it, too. `generate` needs at least one id.
    When the text outgrows the context, its last context_size // 2 tokens are read again. So logits
    equal those of a pass without a cache over ids[window_start:].
    """

    def __init__(self, model, ids):
        self.model = model
        self.ids = ids
        self.begin_window(0)

    def truncate(self, length):
        """Shortens the text to `length` ids; all of it is read again."""
        del self.ids[length:]
        self.begin_window(0)

    def begin_window(self, start):
        """Forgets what was read; the next pass reads the text from index `start`."""
        self.window_start = start
        self.num_read = start  # of the text
        self.reader = None  # made when it is needed: until then, the model may change

    def read(self, end):
        """Logits [1, V] of the token that follows ids[:end], after reading up to there."""
        if self.reader is None:
            self.reader = Reader(self.model)
        logits = self.reader.read([self.ids[self.num_read : end]])[:, 0]
        self.num_read = end
        return logits

    def read_prompt(self):
        """Reads a long text but for its end; yields after each pass, so that a loop can stop it."""
        context_size = self.model.config.context_size
        if len(self.ids) - self.window_start > context_size:
            self.begin_window(len(self.ids) - max(1, context_size // 2))
        while len(self.ids) - self.num_read > TOKENS_PER_PASS:
            mx.eval(self.read(self.num_read + TOKENS_PER_PASS))
            yield

    def next_token_logits(self):
        """Logits [1, V] of the token that follows the text."""
        for _ in self.read_prompt():
            pass
        return self.read(len(self.ids))

    def generate(self, max_tokens, flags, seed):
        """Samples `max_tokens` ids, appends each to the text and yields it.

        The random numbers depend only on the seed and the position in the text.
        """
        for _ in range(max_tokens):
            logits = self.next_token_logits()
            window = self.ids[self.window_start :]
            [token] = sample_tokens(logits, flags, [window], [[seed, len(self.ids)]])
            self.ids.append(token)
            yield token


def encode_prompt(tokenizer, prompt):
    """The ids of a prompt that begins a text.

    If there are none ("", and no start token): the end token, else a newline, else id 0.
    """
    ids = [*tokenizer.bos, *tokenizer.encode(prompt).tolist()]
    if ids:
        return ids
    if tokenizer.eos is not None:
        return [tokenizer.eos]
    return tokenizer.encode("\n").tolist() or [0]  # some tokenizers ignore newlines


class Detokenizer:
    """Turns successive token ids into pieces of text that no later id can change.

    ids: those of the preceding text, which is not part of the pieces.
    """

    def __init__(self, tokenizer, ids):
        self.tokenizer = tokenizer
        self.ids = list(ids)
        self.num_shown = len(tokenizer.decode(self.ids))  # characters of decode(ids) already shown

    def add_token(self, token):
        """The text that `token` completes; "" if it ends inside a character."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        # The last character may be incomplete; later bytes may also make earlier ones invalid.
        if text.endswith("\ufffd") or token in self.tokenizer.byte_ids:
            return ""
        piece = text[self.num_shown :]
        self.ids = [token]  # all that the next token's text can depend on
        self.num_shown = len(self.tokenizer.decode(self.ids))
        return piece

    def finalize(self):
        """The text of a last character that was never completed."""
        return self.tokenizer.decode(self.ids)[self.num_shown :]


class Conversation:
    """A growing text of a user's prompts and a model's continuations."""

    def __init__(self, tokenizer, model, draft=None):
        self.tokenizer = tokenizer
        self.model = model
        self.ids = []  # of the text; shared with the decoder
        self.reply_start = 0  # number of ids before the last reply
        self.tokens_per_second = 0.0  # of the last reply
        if draft is not None:
            self.decoder = extra("decode").SpeculativeDecoder(model, draft, self.ids)
        else:
            self.decoder = Decoder(model, self.ids)

    def reply(self, prompt, flags, seed, interrupts=None):
        """Adds `prompt` to the text, and yields the model's continuation in pieces.

        Except at the start of a text, the prompt goes on a new line. A piece is yielded once no
        later token can change it. The reply ends after --max_tokens, at the end token, on a signal,
        or before the text of --stop, which then is no part of the conversation.
        """
        pieces = self.generate_pieces(prompt, flags, seed, interrupts)
        if flags.stop:
            return self.cut_at_stop(flags.stop, pieces)
        return pieces

    def cut_at_stop(self, stop, pieces):
        """The pieces of a reply up to `stop`; holds back what may be the start of `stop`."""
        buffer = ""
        for piece in pieces:
            buffer += piece
            before, separator, _ = buffer.partition(stop)
            if separator:
                yield before
                pieces.close()
                self.remove_last_characters(len(buffer) - len(before))
                return
            overlaps = [n for n in range(1, len(stop)) if buffer.endswith(stop[:n])]
            num_safe = len(buffer) - max(overlaps, default=0)
            yield buffer[:num_safe]
            buffer = buffer[num_safe:]
        yield buffer

    def remove_last_characters(self, count):
        """Removes the last `count` characters of the reply; this may cut a token in two."""
        text = self.tokenizer.decode(self.ids)[:-count]
        self.decoder.truncate(self.reply_start)
        self.append_text(text[len(self.tokenizer.decode(self.ids)) :])

    def append_text(self, text):
        """Appends `text`, tokenized as a continuation."""
        before = self.tokenizer.decode(self.ids[-1:])[-1:]
        [ids] = datasets.encode_after(self.tokenizer, [(text, before)])
        self.ids.extend(ids.tolist())

    def generate_pieces(self, prompt, flags, seed, interrupts):
        """Like `reply`, but without --stop."""
        tokenizer = self.tokenizer
        end = datasets.end_of_text(tokenizer) if flags.stop_at_end else None
        if self.ids and self.ids[-1] != end:
            line_end = "" if tokenizer.decode(self.ids[-1:]).endswith("\n") else "\n"
            self.append_text(line_end + prompt)
        elif prompt or not self.ids:  # the prompt begins a text
            self.ids.extend(encode_prompt(tokenizer, prompt))
        self.reply_start = len(self.ids)
        detokenizer = Detokenizer(tokenizer, self.ids)
        times = []  # when each token arrived
        try:
            for _ in self.decoder.read_prompt():
                if interrupts and interrupts.stop_signal:
                    return
            for token in self.decoder.generate(flags.max_tokens, flags, seed):
                times.append(time.perf_counter())
                if token == end:
                    break
                yield detokenizer.add_token(token)
                if interrupts and interrupts.stop_signal:
                    return
            yield detokenizer.finalize()
        finally:
            if times:  # excluding the time for the prompt
                self.tokens_per_second = (len(times) - 1) / (time.perf_counter() - times[0])


def warn_about_prompt(conversation, prompt):
    """Warns about what the model will not read of a prompt, or will read differently."""
    tokenizer = conversation.tokenizer
    unknown = tokenizer.unknown(prompt)
    if unknown:
        warning(f"Not in the vocabulary, read as <unk>: {' '.join(unknown)}")
    length = len(encode_prompt(tokenizer, prompt))
    if length > conversation.model.config.context_size:
        warning(
            f"The prompt's {length:,} tokens are more than the context: only their end is read."
        )
    if prompt.endswith(" ") and hasattr(tokenizer, "package"):
        warning("The prompt ends in a space, which the tokenizer joins to the next word: omit it.")
    if prompt.startswith("FILE:"):  # nanoGPT's way to name one
        warning('The prompt is this text itself; for a file\'s: --prompt "$(cat FILE)"')


def sample_checkpoint(flags):
    """Runs --inference or --prompt with a checkpoint's model.

    The model's text goes to stdout, messages about it to stderr.
    """
    contents = open_checkpoint(flags)
    model = contents.load_model()
    draft = None
    if flags.draft:
        draft = extra("decode").open_draft(flags, contents)
    if flags.quantize:
        extra("quantize").quantize(model, flags.quantize, is_packed=flags.gpu)
    # Only now: a command that is refused must not have announced a checkpoint.
    reports.announce(contents.checkpoint)
    new_conversation = partial(Conversation, contents.tokenizer, model, draft)
    if flags.inference:
        converse(new_conversation, flags)
        return
    for i in range(flags.num_samples):
        conversation = new_conversation()
        if i == 0:
            warn_about_prompt(conversation, flags.prompt)
        else:
            print("-" * 15)  # as nanoGPT does
        if sys.stdout.isatty() and not flags.stop:
            print(for_terminal(flags.prompt), end="")
        print_pieces(conversation.reply(flags.prompt, flags, flags.seed + i))
    speed = f"{conversation.tokens_per_second:,.1f} tokens/s"  # of the last sample
    if draft:
        speed += conversation.decoder.describe_draft()
    warning(speed)


def print_pieces(pieces):
    """Prints the pieces of a text as they come, and ends its line."""
    for piece in pieces:
        print(for_terminal(piece), end="", flush=True)
    print(flush=True)


def converse(new_conversation, flags):
    """Answers each line of stdin with a continuation of the conversation so far.

    /reset forgets it, /quit exits. Ctrl+C ends a reply or, at the prompt, the program, as Ctrl+D
    does.
    """
    # At the prompt, Ctrl+C has to raise KeyboardInterrupt: support/cli.py made it end the process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.reconfigure(errors="surrogateescape")  # invalid UTF-8 is not an error
    input_prompt = ""  # for a pipe
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # some Pythons lack it
            import readline  # noqa: F401 (gives input() line editing and history)

        input_prompt = "> "
    conversation = new_conversation()
    try:
        while True:
            line = input(input_prompt)
            if line.rstrip() == "/quit":
                break
            elif line.rstrip() == "/reset":
                conversation = new_conversation()
            else:
                print_reply(conversation, line, flags)
    except (EOFError, KeyboardInterrupt):  # Ctrl+D or end of the pipe; Ctrl+C at the prompt
        if input_prompt:
            print()  # puts the shell's prompt on its own line
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C may also interrupt Python's exit


def print_reply(conversation, line, flags):
    """Prints the continuation of a line; Ctrl+C ends it and keeps what was shown."""
    interrupts = Interrupts()  # not entered: only its attribute is used

    # No KeyboardInterrupt, as an exception raised inside MLX can be lost.
    def on_signal(signal_number, frame):
        interrupts.stop_signal = signal_number

    handler = signal.signal(signal.SIGINT, on_signal)
    warn_about_prompt(conversation, line)
    print_pieces(conversation.reply(line, flags, flags.seed, interrupts))
    signal.signal(signal.SIGINT, handler)


# ---- Checkpoints --------------------------------------------------------------------------------
# The state of a run, and the two files that hold it; see support/runs.py for their names and for
# the record in the second one.


@dataclasses.dataclass(kw_only=True, eq=False)
class Counters(Progress):
    """The numbers that each step changes: recorded in every checkpoint, and restored on resume.

    Give a new field a default, as older checkpoints lack it; whole numbers are never negative.
    """

    tokens_seen: int = 0
    recent_steps: int = 0  # of the current report interval
    recent_loss: float = 0.0  # the sum of their losses


@dataclasses.dataclass(eq=False)
class Run(Counters):
    """A training run: its model, its data and its progress."""

    folder: Path  # where it is saved, see find_folder
    flags: argparse.Namespace
    dataset: datasets.Dataset
    model: LanguageModel
    optimizer: optim.Optimizer
    batches: Batches
    teacher: LanguageModel | None
    parents: dict  # see Checkpoint.parents
    origin: runs.Origin
    segments: list  # of type Segment; the last is current
    code: dict  # see code.read_code
    average: dict | None = None  # with --average: the averaged weights, a tree; None at first
    has_stepped: bool = False  # in this process
    checkpoint_id: str | None = None  # of the last checkpoint
    saved_at: float = 0.0  # see Checkpoint
    saved_seconds: float = 0.0  # the seconds of training then
    has_unsaved_changes: bool = False  # steps or evaluations since the last save

    def snapshot(self):
        """All that training changes: numbers, {name: value}, and a tree of arrays.

        A checkpoint saves it, and ranks receive it. To make steps remember more, give Counters a
        field (a number), or add an array here and in `restore`.
        """
        numbers = get_values(self, field_names(Counters))
        numbers |= get_values(self.batches, ["epoch", "cursor", "offset"])
        arrays = {
            "weights": self.model.trainable_parameters(),  # for a LoRA run, only the adapters
            "optimizer": self.optimizer.state,
            "perm": mx.array(self.batches.perm),
        }
        if self.average:
            arrays["average"] = self.average
        return numbers, arrays

    def restore(self, numbers, arrays):
        """Goes back to a `snapshot`; arrays: its tree flattened, {name: array}.

        It may be untrusted: raises an exception (of any type) if it does not fit.
        """
        perm = np.array(arrays.pop("perm"))
        expected = {"weights": self.model.trainable_parameters(), "optimizer": self.optimizer.state}
        if any(name.startswith("average.") for name in arrays):
            expected["average"] = expected["weights"]
        runs.check_arrays(arrays, expected)
        tree = tree_unflatten(arrays)  # only now, as a name like "weights.999999999" makes a list
        self.model.update(tree["weights"])
        self.optimizer.state = tree["optimizer"]
        place = {name: numbers.pop(name) for name in ("epoch", "cursor", "offset")}
        self.batches.seek(**place, perm=perm)
        vars(self).update(vars(runs.from_untrusted(Counters, numbers)))
        self.evaluations = [Evaluation(*evaluation) for evaluation in self.evaluations]
        if self.flags.average:
            self.average = tree.get("average")
        elif "average" in tree:  # a branch without --average: the losses were of averages
            self.evaluations = []

    @property
    def versions(self):
        """The current environment, see list_versions."""
        return self.segments[-1].versions

    @property
    def epochs(self):
        """Passes over the training text."""
        return self.tokens_seen / len(self.dataset.train.tokens)

    def count_step(self, num_tokens, seconds, loss):
        """Counts a step that has just been taken."""
        if self.iteration % self.flags.steps_per_report == 0:  # the steps before were reported
            self.recent_steps = 0
            self.recent_loss = 0.0
        self.iteration += 1
        self.has_unsaved_changes = True
        self.tokens_seen += num_tokens
        if self.has_stepped:
            self.seconds += seconds
        self.has_stepped = True
        self.recent_steps += 1
        self.recent_loss += loss

    def is_evaluation_due(self):
        """Whether to evaluate now: every `steps_per_eval` iterations, and at the end."""
        interval = self.flags.steps_per_eval
        if not interval:
            return False
        return self.iteration % interval == 0 or self.iteration == self.flags.num_iters

    def is_save_due(self):
        """Whether the schedule calls for a save at the current iteration."""
        return self.iteration % self.flags.steps_per_save == 0 or self.is_evaluation_due()

    def is_save_overdue(self):
        """Whether --minutes_per_save have passed in training since the last save."""
        limit = 60 * self.flags.minutes_per_save or math.inf
        return self.seconds - self.saved_seconds >= limit

    def evaluations_since_best(self):
        """How many evaluations in a row brought no new best, for --patience."""
        return runs.evaluations_since_best(self.evaluations, self.flags.steps_per_eval)

    def is_out_of_patience(self):
        """Whether --patience ends the run."""
        return self.evaluations_since_best() >= (self.flags.patience or math.inf)

    @contextlib.contextmanager
    def using_average(self):
        """Yields the model with averaged weights, if any; afterwards, it has its own again."""
        weights = self.model.trainable_parameters()
        self.model.update(self.average or weights)
        try:
            yield self.model
        finally:
            self.model.update(weights)


def field_names(cls):
    return [field.name for field in dataclasses.fields(cls)]


def save_and_sample(run, interrupts, reporter):
    """Saves a run and samples from it, unless nothing has changed since the last save."""
    if not run.has_unsaved_changes:
        return
    save(run, interrupts)
    say(f"saved {run.checkpoint_id} at iteration {run.iteration:,}")
    flags = argparse.Namespace(**vars(run.flags))
    flags.max_tokens = flags.sample_tokens
    if flags.max_tokens == 0:
        return
    with run.using_average() as model:
        for prompt in flags.sample_prompt or [""]:
            if interrupts.stop_signal:
                break
            conversation = Conversation(run.dataset.tokenizer, model)
            warn_about_prompt(conversation, prompt)
            text = "".join(conversation.reply(prompt, flags, flags.seed, interrupts))
            if not interrupts.stop_signal:  # else it is cut short
                reporter.report_sample(prompt, text)


def save(run, interrupts, is_interim=False):
    """Saves the run; retries until the disk accepts it.

    It waits out a full disk or a missing folder: training state is in memory, and the last
    checkpoint is untouched.
    """
    for attempt in itertools.count():
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(run, is_interim)
            return
        except OSError as error:
            how_often = "again" if interrupts.stop_signal else "twice"
            pause = min(2**attempt, 60)  # seconds
            say(
                f"Saving to {run.folder} failed ({error}); retrying in {pause} s. "
                f"Press Ctrl+C or send SIGTERM {how_often} to exit without saving."
            )
            time.sleep(pause)


def write_checkpoint(run, is_interim=False):
    """Tries once to save both files of a checkpoint.

    A checkpoint is never half-written: a file is complete on disk before it gets its name, and a
    checkpoint counts only once it has its .safetensors, which is named last.
    """
    numbers, arrays = run.snapshot()
    weights = arrays_to_save(arrays.pop("average" if run.average else "weights"))
    # As an array: MLX reads no long header, and a vocabulary can be long.
    tokenizer = json.dumps(run.dataset.tokenizer.to_dict()).encode()
    arrays["tokenizer"] = mx.array(np.frombuffer(tokenizer, np.uint8))
    state = arrays_to_save(arrays)
    code.save_code(run)
    with files.new_file(run.folder) as weights_file:
        mx.save_safetensors(weights_file, weights, {"format": "mlx"})
        weights_file.flush()
        sha1 = files.sha1_of_file(weights_file.name)
        saved_at = max(time.time(), run.saved_at + 1e-3)  # even if the clock was set back
        record = {name: numbers.pop(name) for name in field_names(Progress)}
        record |= {  # with these, the fields of a Checkpoint
            "counters": numbers,
            "format_version": runs.FORMAT_VERSION,
            "is_interim": is_interim,
            "run_name": run.folder.name,
            "flags": get_values(run.flags, FLAGS.names(RECORDED)),
            "config": dataclasses.asdict(run.model.config),
            "tokens_sha256": run.dataset.sha256,
            "parents": run.parents,
            "origin": vars(run.origin),
            "segments": [vars(segment) for segment in run.segments],
            "id": sha1,
            "state_sha1": runs.sha1_of_arrays(state),
            "saved_at": saved_at,
        }
        record = json.dumps(record)
        header = {"record": record, "sha1": files.sha1_of_text(record)}
        with files.atomic_write(run.folder / f"{sha1}.metadata") as metadata_file:
            mx.save_safetensors(metadata_file, state, header)
        files.publish(weights_file, run.folder / f"{sha1}.safetensors")
    files.sync(run.folder)
    files.sync(run.folder.parent)  # which holds the folder's own name
    run.checkpoint_id = sha1
    run.saved_at = saved_at
    run.saved_seconds = run.seconds
    run.has_unsaved_changes = False
    if device.on_gpu():
        mx.clear_cache()  # no step may reuse what the CPU has read, see arrays_to_save


def arrays_to_save(tree):
    """The arrays of a tree, {name: array}, sorted: equal arrays give equal bytes.

    On a GPU, they are copies: reading an array would move it out of NVIDIA's memory for good (MLX
    issue 3861).
    """
    arrays = dict(sorted(tree_flatten(tree)))
    if device.on_gpu():
        arrays = {name: array * 1 for name, array in arrays.items()}
    return arrays


class Contents(NamedTuple):
    """The verified content of a checkpoint."""

    checkpoint: Checkpoint
    config: Config
    tokenizer: object
    weights: dict  # {name: array} of its .safetensors
    state: dict  # {name: array} of its .metadata

    def load_model(self):
        """The model, with a LoRA run's adapters merged into its base.

        Raises DamagedError if the weights are not those of the model.
        """
        checkpoint = self.checkpoint
        weights = self.weights
        rank = checkpoint.flags["lora_rank"]
        if rank:  # the file holds only the adapters
            base = open_kept_model(checkpoint, "init_from").model
            with explain_errors(f"{checkpoint} does not fit its base", raises=DamagedError):
                alpha = checkpoint.flags["lora_alpha"]
                weights = extra("lora").merge(base, weights, rank, alpha)
        # Other errors, such as a TypeError in an edited layer, are bugs, not damage.
        problem = f"{checkpoint} does not fit its record"
        with explain_errors(problem, *MODEL_ERRORS, raises=DamagedError):
            model = LanguageModel(self.config)
            runs.check_arrays(weights, model.parameters())
            model.update(tree_unflatten(weights))
            mx.eval(model.parameters())
        return model

    def load_into(self, run):
        """Puts the saved state into a run. Raises DamagedError if it does not fit."""
        checkpoint = self.checkpoint
        problem = f"{checkpoint} does not fit its record: use another one from --list"
        with explain_errors(problem, raises=DamagedError):
            # With --average, the .metadata has the trained weights, the .safetensors the average.
            has_average = any(name.startswith("weights.") for name in self.state)
            key = "average" if has_average else "weights"
            weights = {f"{key}.{name}": array for name, array in self.weights.items()}
            numbers = checkpoint.counters | get_values(checkpoint, field_names(Progress))
            run.restore(numbers, self.state | weights)
        run.checkpoint_id = checkpoint.id
        run.saved_at = checkpoint.saved_at
        run.saved_seconds = checkpoint.seconds
        run.segments = [*checkpoint.segments]


# What is raised by making a model with impossible sizes, or by giving it another one's weights.
MODEL_ERRORS = (ValueError, RuntimeError, MemoryError, OverflowError)


def read_contents(checkpoint):
    """Verifies both files of a Checkpoint and returns the Contents.

    Raises DamagedError if either is not what was saved.
    """
    with explain_errors(f"{checkpoint} is damaged", raises=DamagedError):
        weights, state = runs.read_arrays(checkpoint)
        tokenizer = datasets.tokenizer_from_dict(json.loads(bytes(state.pop("tokenizer"))))
        config = config_from_untrusted(checkpoint.config)
        if tokenizer.vocab_size > config.vocab_size:
            # MLX does not check indices: it would read beyond the embeddings.
            raise ValueError("its tokenizer has more ids than its model")
        if config.num_blocks > len(weights):
            # Building that many blocks first could exhaust the memory.
            raise ValueError("its model has more blocks than arrays")
        return Contents(checkpoint, config, tokenizer, weights, state)


def open_newest(candidates, is_named=False):
    """The Contents of the first undamaged candidate; if `is_named`, a damaged one is an error."""
    for candidate in candidates:
        try:
            return read_contents(candidate)
        except DamagedError as error:
            if is_named:
                raise RunError(f"{error}; use another one from --list") from None
            say(f"Skipping {error}", sys.stderr)
    raise RunError("no undamaged checkpoint of this run is left: --new_model starts a new one")


def config_from_untrusted(values):
    """A Config made of an untrusted {field: value}. Raises ValueError or TypeError."""
    config = runs.from_untrusted(Config, values)
    for name, value in values.items():
        if type(value) is int and not 1 <= value <= MAX_INT32:
            raise ValueError(f"{name} {value} is not from 1 to {MAX_INT32}")
    if config.mlp not in MLPS:
        raise ValueError(f"mlp {config.mlp} is not one of {', '.join(MLPS)}")
    if not {*map(type, config.rope_scaling or [])} <= {int, float}:
        raise ValueError("rope_scaling is not a list of numbers")
    return config


# ---- Models that a run begins with or learns from -----------------------------------------------

FLAGS["init"] |= {
    "init_from": Flag(
        None, runs.model_name, "start from a checkpoint, a Hugging Face folder, or ORG/NAME"
    ),
    "lora_rank": Flag(None, SIZE, "train only LoRA adapters of this rank, on --init_from"),
    "lora_alpha": Flag(None, NONNEGATIVE, "adapters are scaled by alpha / rank (default: 2 rank)"),
    "teacher": Flag(None, runs.model_name, "distill from this model, named as for --init_from"),
}

FLAGS["training"] |= {
    "teacher_weight": Flag(0.5, FRACTION, "weight of the distillation loss"),
    "teacher_temperature": Flag(2.0, number(float, 0.01, 100), "distillation temperature"),
}


class LoadedModel(NamedTuple):
    """A model that a flag names: the one that a run begins with, its teacher, or a draft."""

    model: LanguageModel
    tokenizer: object
    id: str  # of its checkpoint; for a Hugging Face model, a SHA1 over its files
    files: dict  # those to keep so that it can be opened again, {name: path}


def open_model(flags, flag_name):
    """The LoadedModel that a flag names: a checkpoint, or a Hugging Face folder or model.

    Raises UsageError if there is none, RunError if it is damaged.
    """
    name = getattr(flags, flag_name)
    if runs.is_hugging_face(name):
        return extra("huggingface").open_by_name(name)
    checkpoint = find_checkpoint(flags, name, flag_name)
    with explain_errors(f"--{flag_name}: name another model", DamagedError, raises=RunError):
        return model_from_checkpoint(checkpoint)


def model_from_checkpoint(checkpoint):
    """Opens a checkpoint as a LoadedModel; with LoRA, `files` include the base's."""
    contents = read_contents(checkpoint)
    to_keep = {path.name: path for path in (checkpoint.weights_path, checkpoint.metadata_path)}
    if checkpoint.flags["lora_rank"]:
        to_keep |= runs.kept_base_files(checkpoint)
    return LoadedModel(contents.load_model(), contents.tokenizer, checkpoint.id, to_keep)


def open_kept_model(checkpoint, flag_name):
    """The LoadedModel that the run of a checkpoint keeps. Raises DamagedError without it."""
    folder = checkpoint.folder / flag_name
    expected_id = checkpoint.parents.get(flag_name)
    fault = (
        f"{checkpoint.folder.name} cannot go on without the model in its folder {flag_name}: put "
        f"that back, or start a new run with --{flag_name} and --new_model"
    )
    with explain_errors(fault, raises=DamagedError):
        if folder.is_symlink():
            raise OSError("it is a link")
        metadata = folder / f"{expected_id}.metadata"
        if metadata.exists():
            loaded = model_from_checkpoint(runs.read_checkpoint(metadata))
        else:
            loaded = extra("huggingface").open_by_name(str(folder))
        if loaded.id != expected_id:
            raise ValueError(f"it is {loaded.id[:12]} instead of {expected_id[:12]}")
    return loaded


# ---- Interrupts ---------------------------------------------------------------------------------


class Interrupts:
    """Turns a termination signal into an attribute that loops check: `stop_signal`.

    A second one, half a second later or more, ends the process at once, without saving. A sooner
    one is a repetition: `timeout` signals the process, then its group; launchers repeat Ctrl+C.

    Python runs handlers only after `mx.eval` returns, so a thread reads the bytes that the
    interpreter writes to a pipe as soon as a signal arrives.
    """

    # Ctrl+C, kill, a closed terminal; USR1, USR2 and XCPU: warnings of schedulers before a kill.
    SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    SIGNALS += [signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
    stop_signal = None  # the number of the first signal

    def __enter__(self):
        reader, writer = os.pipe()
        self.thread = threading.Thread(target=self.watch, args=[reader], daemon=True)
        self.thread.start()
        os.set_blocking(writer, False)
        self.previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.handlers = {}
        for signal_number in self.SIGNALS:
            # Signals that the parent ignores (nohup, background jobs of scripts) stay ignored.
            if signal.getsignal(signal_number) != signal.SIG_IGN:
                # Does nothing, as the thread acts; but without a handler, Python writes no byte.
                self.handlers[signal_number] = signal.signal(signal_number, lambda *_: None)
        return self

    def __exit__(self, *error):
        os.close(signal.set_wakeup_fd(self.previous_writer))  # ends the thread
        self.thread.join()  # a notebook's next %run deletes modules that the thread needs
        for signal_number, handler in self.handlers.items():
            signal.signal(signal_number, handler)

    def watch(self, reader):
        """Runs in the thread: the first signal sets `stop_signal`, a later one ends the process."""
        first_time = None  # when it arrived
        while byte := os.read(reader, 1):  # b"" once __exit__ has closed the other end
            [signal_number] = byte
            if signal_number not in self.SIGNALS:  # a signal with another handler
                continue
            if first_time is None:
                first_time = time.monotonic()
                self.stop_signal = signal_number
                again = "again " if signal_number == signal.SIGINT else ""
                warning(
                    "\nStopping after this step, then saving. "
                    f"Press Ctrl+C {again}to exit without saving."
                )
            elif time.monotonic() - first_time > 0.5:
                warning("\nExited without saving.")
                os._exit(128 + signal_number)  # at once; sys.exit would end only this thread
        os.close(reader)


# ---- Processes and devices ----------------------------------------------------------------------


def join_ranks(argv):
    """A context manager: the ranks that mlx.launch or MPI started, or this process alone."""
    sizes = [os.environ.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
    if "MLX_RANK" in os.environ or sizes != ["1", "1"]:
        return extra("ranks").Group(argv)
    device.refuse_launchers()
    return contextlib.nullcontext(device.ALONE)


def use_device(gpu):
    """Makes the GPU or the CPU the default device; call it before anything is computed."""
    device.use_device(gpu, fast)


@fast_version
def bfloat16_products(is_enabled):
    """A context manager: if is_enabled, a CPU rounds inputs of products to bfloat16, if it can."""
    return contextlib.nullcontext()


# ---- Flags --------------------------------------------------------------------------------------


PRESETS = ["tiny", "small", "medium", "large", "gpt2", "350m"]  # see extras/recipes/presets

FLAGS["mode"] = {  # a command has at most one of them
    "inference": Flag(False, bool, "sample interactively; /reset forgets the text, /quit exits"),
    "prompt": Flag(None, str, "text to continue"),
    "evaluate": Flag(None, datasets.split_name, "evaluate a checkpoint on train, valid or test"),
    "list": Flag(False, bool, "list runs and checkpoints"),
    "new_model": Flag(False, bool, "start a new run even if one could be resumed"),
}

FLAGS["command"] = {
    "eval_stride": Flag(
        None, SIZE, "tokens between windows of --evaluate and --eval_test (default: context_size)"
    ),
    "identifier": Flag(
        None, nonempty, "checkpoint to use: SHA1 prefix, run, RUN@STEP, latest, or best of its run"
    ),
    "config": Flag(None, nonempty, "YAML file of flags, or a recipe in extras/recipes"),
    "preset": Flag(None, one_of(PRESETS), "sets dim, num_heads, num_blocks, context_size"),
    "max_minutes": Flag(None, NONNEGATIVE, "stop after this much training time of this command"),
    "gpu": Flag(False, bool, "run on the GPU instead of the CPU"),
} | datasets.TEXT_FLAGS["command"]

FLAGS["data"] = datasets.TEXT_FLAGS["data"]


def read_command_line(arguments):
    """The flags that a command line sets, {name: value}."""
    parser = Parser(
        extra("hints") if has_extra("hints") else None,
        usage=f"python {code.main_file} [flags]",
        description="\n\n".join((__doc__ or "").split("\n\n")[:2]),  # python -OO drops it
        epilog="Exit status: 0 done, 1 failed, 2 usage error; 128 + its number after a signal.",
    )
    for title, rows in FLAGS.items():
        parser.add_flags(rows, title)
    return parse_command_line(parser, arguments)


def resolve_flags(explicit, recorded=None):
    """All flags of a command or a run, as a Namespace.

    explicit: those that the command sets, also kept as the attribute `explicit`; recorded: values
    of the checkpoint that it resumes, or of a new run's models, for flags that it does not set.
    Others have their defaults; a default of None that depends on other flags is filled in.
    """
    if "text" in explicit:
        explicit = {"dataset": "text"} | explicit  # load_dataset refuses another dataset
    flags = argparse.Namespace(**FLAGS.defaults | (recorded or {}) | explicit)
    flags.explicit = explicit
    flags.save_dir = Path(flags.save_dir)
    flags.data_dir = flags.data_dir or explicit.get("save_dir")
    for name in {"text", "valid_text", "test_text"} & {*explicit}:  # recorded ones are absolute
        setattr(flags, name, [*map(files.absolute_pattern, explicit[name])])
    for name in {"init_from", "teacher", "draft"} & {*explicit}:
        # Others name checkpoints, or models on the hub.
        if runs.is_model_folder(files.user_path(explicit[name])):
            setattr(flags, name, files.absolute(explicit[name]))
    if flags.tokenizer == "auto":
        flags.tokenizer = datasets.CORPORA[flags.dataset].tokenizer_kind
    elif flags.tokenizer == explicit.get("tokenizer") and flags.tokenizer not in datasets.KINDS:
        flags.tokenizer = files.absolute(flags.tokenizer)
    if flags.num_kv_heads is None:
        flags.num_kv_heads = flags.num_heads
    if flags.mlp_dim is None:
        flags.mlp_dim = 4 * flags.dim
        _, is_gated = MLPS[flags.mlp]
        if is_gated:
            # Three matrices instead of two: 8/3 dim keeps their total size (Shazeer 2020), here
            # rounded up to a multiple of 64.
            flags.mlp_dim = 64 * math.ceil(8 * flags.dim / (3 * 64))
    if flags.lora_rank:
        if not flags.init_from and not flags.identifier:
            raise UsageError("--lora_rank trains adapters of a model: name it by --init_from")
        if flags.lora_alpha is None:
            flags.lora_alpha = 2 * flags.lora_rank  # LoRA's scale, alpha / rank, is then 2
    return flags


# ---- What a run is made of ----------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a run is made of."""

    flags: argparse.Namespace
    dataset: datasets.Dataset
    models: dict  # those that it reads at this start, {flag: LoadedModel}
    parents: dict  # see Checkpoint.parents
    code: dict  # see code.read_code
    origin: runs.Origin


def load_inputs(flags, checkpoint=None):
    """The Inputs of a new run or, with a checkpoint, of the run that saved it."""
    if checkpoint:
        models = open_kept_models(flags, checkpoint)
        dataset = reload_data(flags, checkpoint)
        parents = dict(checkpoint.parents)
        origin = checkpoint.origin
    else:
        names = [name for name in ("init_from", "teacher") if getattr(flags, name)]
        models = {name: open_model(flags, name) for name in names}
        tokenizer = None
        if models:
            flags = resolve_flags(flags.explicit, runs.flags_from_pretrained(models, flags))
            tokenizer = models[names[0]].tokenizer
        dataset = load_data(flags, tokenizer)
        parents = {name: loaded.id for name, loaded in models.items()}
        origin = runs.Origin(machine.available_cores(), flags.config, datasets.HELD_OUT)
        runs.compare_texts(origin, dataset, models.values())
    sources = code.read_code(vars(flags), dataset.reads_rows)
    return Inputs(flags, dataset, models, parents, sources, origin)


def open_kept_models(flags, checkpoint):
    """The models that a checkpoint's run keeps, {flag: LoadedModel}; see kept_model_flags."""
    return {name: open_kept_model(checkpoint, name) for name in runs.kept_model_flags(flags)}


def load_data(flags, tokenizer=None):
    """The dataset of a run; tokenizer: that of a model or a checkpoint, instead of the flags'."""
    if flags.eval_stride and flags.eval_stride > flags.context_size:
        raise UsageError(
            f"--eval_stride {flags.eval_stride} would skip tokens: "
            f"give at most {flags.context_size}"
        )
    arguments = get_values(flags, [*FLAGS["data"], "test_text", "save_dir", "mirror"])
    arguments["data_dir"] = files.make_data_dir(flags.data_dir)
    if tokenizer:
        arguments["tokenizer"] = tokenizer
    dataset = datasets.load_dataset(**arguments)
    if (flags.evaluate == "test" or flags.eval_test) and not dataset.test:
        raise UsageError(f"{dataset.name} has no test split: name files for it with --test_text")
    return dataset


def reload_data(flags, checkpoint):
    """The dataset of a checkpoint's run. Raises UsageError if it has changed.

    If the tokenizer came from a model or a file, it is taken from the run's checkpoints: the
    original may be gone.
    """
    is_from_file = flags.tokenizer not in datasets.TOKENIZERS and "tokenizer" not in flags.explicit
    tokenizer = None
    if flags.init_from or flags.teacher or is_from_file:
        tokenizer = open_newest(runs.checkpoints_in(checkpoint.folder)).tokenizer
    dataset = load_data(flags, tokenizer)
    if checkpoint.tokens_sha256 != dataset.sha256:
        why = " (what --test_text names is left out of --text)" if flags.test_text else ""
        if checkpoint.origin.held_out != datasets.HELD_OUT:
            why = f" (it held out validation text {checkpoint.origin.held_out}: see its code-*/)"
        remedy = "start a new run with --new_model, or from its weights with --init_from"
        if flags.evaluate:
            remedy = "to score another text, --evaluate test --test_text FILE"
        raise UsageError(
            f"the text or tokenizer of {checkpoint.folder.name} has changed{why}: {remedy}"
        )
    return dataset


def make_model(flags, dataset, contents, models):
    """The model of a run; only that of --init_from already has its weights."""
    base = models.get("init_from")
    if contents and not base:
        problem = f"{contents.checkpoint} has no model"
        with explain_errors(problem, *MODEL_ERRORS, raises=DamagedError):
            return LanguageModel(contents.config)
    try:
        if base:
            # What no flag sets, such as a padded vocabulary, stays.
            config = dataclasses.replace(base.model.config, context_size=flags.context_size)
        else:
            config = Config(dataset.tokenizer.vocab_size, **get_values(flags, FLAGS["model"]))
    except ValueError as error:  # its message begins with the name of a field
        raise UsageError(f"--{error}") from None
    if not base:
        return LanguageModel(config)
    base.model.config = config
    if flags.lora_rank:
        extra("lora").add_lora(base.model, flags.lora_rank, flags.lora_alpha, flags.seed)
    return base.model


def make_run(folder, inputs, contents=None, ranks=device.ALONE):
    """The run whose state is in `contents`, or a new run if that is None."""
    flags, dataset, models, parents, sources, origin = inputs
    machine.use_cores(origin.cores)  # they decide how sums are rounded
    if contents and contents.config.vocab_size < dataset.tokenizer.vocab_size:
        # MLX does not check indices: it would read and write beyond the embeddings.
        raise DamagedError(f"{contents.checkpoint} has fewer embeddings than the text has tokens")
    model = make_model(flags, dataset, contents, models)
    optimizer = make_optimizer(model, flags)
    rows_per_step = flags.batch_size * flags.grad_accumulation
    batches = Batches(dataset.train.tokens, flags.context_size, rows_per_step, flags.seed)
    run = Run(
        folder=folder,
        flags=flags,
        dataset=dataset,
        model=model,
        optimizer=optimizer,
        batches=batches,
        teacher=models["teacher"].model if "teacher" in models else None,
        parents=parents,
        origin=origin,
        segments=[],
        code=sources,
    )
    if has_extra("memory"):
        extra("memory").check_memory(run, ranks)
    if contents:
        contents.load_into(run)
        if contents.checkpoint.folder != folder:  # a branch: these are its parent's
            run.evaluations = [run.evaluation] if run.evaluation else []
    elif "init_from" not in models:
        init_weights(model, flags.seed)
    runs.choose_eval_size(run, contents and contents.checkpoint)
    hashes = code.hash_sources(sources)
    versions = device.list_versions(flags, ranks, fast) | {"support": code.hash_of_package(hashes)}
    segment = runs.Segment(run.iteration, flags.num_iters, hashes, versions)
    if run.segments[-1:] != [segment]:
        run.segments.append(segment)
    mx.eval(model.parameters(), optimizer.state)
    return run


# ---- Commands -----------------------------------------------------------------------------------


def find_checkpoint(flags, name, flag_name="identifier"):
    """The Checkpoint that a flag names; RUN@STEP is computed again, if need be."""
    checkpoints = runs.list_checkpoints(flags.save_dir, warn=True)
    if "@" in Path(name).name:
        return extra("steps").checkpoint_at(flags, checkpoints, name)
    return runs.find_checkpoint(flags.save_dir, checkpoints, name, flag_name)


def open_checkpoint(flags):
    """The Contents of the checkpoint that a command uses: that of --identifier, or the newest.

    Raises UsageError if a flag contradicts it, RunError if it is damaged.
    """
    checkpoint = find_checkpoint(flags, flags.identifier or "latest")
    values = checkpoint.flags | {"seed": flags.seed}  # here, the samples' seed
    if flags.test_text:
        values["text_field"] = flags.text_field  # of that text
    runs.refuse_conflict(flags, values, checkpoint.folder.name)
    if flags.identifier:
        return open_newest([checkpoint], is_named=True)
    return open_newest(runs.checkpoints_in(checkpoint.folder))


def evaluate_checkpoint(flags):
    """Evaluates a split for --evaluate, with the weights of --quantize if that is given."""
    contents = open_checkpoint(flags)
    model = contents.load_model()
    checkpoint = contents.checkpoint
    flags = resolve_flags(flags.explicit, checkpoint.flags)
    if flags.evaluate == "test" and flags.test_text:  # the run's own text may be gone
        flags.dataset = "text"
        flags.text = flags.valid_text = flags.test_text
        dataset = load_data(flags, contents.tokenizer)
    else:
        dataset = reload_data(flags, checkpoint)
    if flags.quantize:
        extra("quantize").quantize(model, flags.quantize, is_packed=False)
    reports.announce(checkpoint)
    for line in ineffective_flag_notices(flags):
        warning(line)
    print_evaluation(flags.evaluate, model, dataset, flags)


def check_early(flags, ranks):
    """Raises UsageError for what can be refused before anything is downloaded."""
    if flags.batch_size < ranks.size:
        raise UsageError(
            f"--batch_size {flags.batch_size} leaves some of the {ranks.size} ranks without a "
            "row: give a larger one"
        )
    if flags.teacher:
        extra("distil").check()
    if flags.report_to:
        extra("report").check(flags.report_to)


def open_run(folder, inputs, chosen, ranks):
    """The run in a locked folder, and the checkpoint from which it goes on, or None.

    That is the newest one in the folder; without any, it is `chosen`, with which a branch begins.
    """
    flags = inputs.flags
    # Under the lock, no other process adds one.
    checkpoints = runs.checkpoints_in(folder, warn=True)
    if not checkpoints and any(folder.glob("[!.]*.safetensors")):
        raise RunError(f"no checkpoint of {folder.name} can be read: --new_model starts a new run")
    contents = None
    if checkpoints or chosen:
        # If a branch already exists, it is resumed; then --identifier only says where it began.
        is_named = flags.identifier and (not checkpoints or folder == chosen.folder)
        contents = open_newest(checkpoints or [chosen], is_named)
        checkpoint = contents.checkpoint
        # Flags that the command does not set come from the checkpoint, except those about the test
        # text, which is already loaded.
        test_flags = get_values(flags, ["test_text", "eval_test"])
        flags = resolve_flags(flags.explicit, checkpoint.flags | test_flags)
        inputs = inputs._replace(flags=flags)
        if not chosen:  # "latest" may name this run by now: use the models that it keeps
            inputs = inputs._replace(models=open_kept_models(flags, checkpoint))
            inputs = inputs._replace(parents=checkpoint.parents, origin=checkpoint.origin)
    run = make_run(folder, inputs, contents, ranks)
    if not checkpoints:
        for name in runs.kept_model_flags(run.flags):
            runs.keep_model(folder / name, inputs.models[name].files)
    return run, contents and contents.checkpoint


@command(code.main_file)
def main(arguments):
    """Does what the arguments say, by default those of the process; returns the exit status.

    It is 0 on success, 1 on failure, 2 on a usage error, or 128 + the signal that ended it.
    """
    with join_ranks(arguments) as ranks:
        if ranks.rank > 0:
            return ranks.follow()
        flags = resolve_flags(read_command_line(arguments))
        files.check_save_dir(flags.save_dir)
        use_device(flags.gpu)
        if flags.list:
            return extra("list").list_runs(flags, find_checkpoint)
        if flags.evaluate:
            return evaluate_checkpoint(flags)
        if flags.inference or flags.prompt is not None:
            return sample_checkpoint(flags)
        files.make_save_dir(flags.save_dir)

        # Which run: a checkpoint gives its flags; its flags, texts and models give its folder.
        chosen = runs.choose_checkpoint(flags, find_checkpoint)
        if chosen:
            flags = resolve_flags(flags.explicit, chosen.flags)
            runs.refuse_conflict(flags, chosen.flags, chosen.folder.name)
        check_early(flags, ranks)
        inputs = load_inputs(flags, chosen)
        folder, note = runs.find_folder(inputs, chosen)
        with runs.locked_folder(folder):
            run, checkpoint = open_run(folder, inputs, chosen, ranks)
            with Interrupts() as interrupts:  # from here on there is something to save
                rate = partial(learning_rate_at, flags=run.flags)
                reports.print_start(run, checkpoint, rate, note)
                # Saved before its first step, a branch needs its parent no more, and new flags
                # survive a kill.
                if checkpoint and runs.has_changed(run, checkpoint):
                    save(run, interrupts)
                ranks.broadcast_run(run)
                say("")  # the end of the start screen
                stop_signal = train(run, interrupts, ranks)
                say(reports.describe_end(run, stop_signal, arguments, note))
    for stream in (sys.stdout, sys.stderr):
        flush_or_drop(stream)  # a closed pipe must not fail a saved run
    return 128 + stop_signal if stop_signal else 0  # how shells report the end by a signal


code.remember_user_modules()  # before anybody edits them

if __name__ == "__main__":
    try:
        run_program(main)
    finally:
        code.forget_user_modules()
