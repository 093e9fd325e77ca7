"""Train a transformer language model with MLX, resume it bit-exactly, and sample from it.

    python main.py --dataset python --dim 128 --context_size 128   train on Python's own library
    python main.py --dataset ptb          train on Penn Treebank; rerun after Ctrl+C to resume
    python main.py --inference            sample interactively from the newest checkpoint
    python main.py --help                 every flag

This file contains, in order: model, loss and optimizer, batches, evaluation, checkpoints,
interrupts, training, sampling, prompts, flags, setting up a run, commands. datasets.py turns text
into token ids. Everything beyond training, resuming and sampling is in extras/, one file per
feature; this file works without it, in plain MLX.

Shapes use these letters: B rows of a batch, L positions, D model dimension, H query heads, K key
and value heads, d dimension of a head (D / H), V vocabulary, N any number. A linear layer from I
to O features has a matrix [O, I], as in PyTorch. MLX is lazy: operations build a graph, which
mx.eval computes.
"""

import signal
import sys

if __name__ == "__main__":
    # `import main` in an extra must return this module, not a second copy.
    sys.modules["main"] = sys.modules["__main__"]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until there is something to save, Ctrl+C exits without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import csv
import dataclasses
import difflib
import errno
import fcntl
import fnmatch
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import textwrap
import threading
import time
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
fast = None
if (HERE / "extras" / "fast.py").exists():
    from extras import fast  # before NumPy and MLX, to speed up their matrix products

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten
from tqdm import tqdm

from datasets import CORPORA, DATA_FLAGS, LARGEST, SIZE, TOKENIZERS, Dataset, RunError, UsageError
from datasets import choice, explained, extra, flag, load_dataset, number, open_folder
from datasets import tokenizer_from_dict, underscored, user_path, utf8

# Recorded in checkpoints: BLAS libraries round differently.
BLAS = fast.BLAS if fast else "MLX's own BLAS"
# Version of the .metadata format; increment it when an older or newer main.py could misread it.
FORMAT_VERSION = 2


def fast_version(plain):
    """Decorator: replaces a function with its namesake in extras/fast.py, if that file exists.

    The fast version is equivalent up to rounding and quicker on a CPU. To change such a function,
    delete the `@fast_version` above it: the plain version is then used.
    """
    return getattr(fast, plain.__name__) if fast else plain


# ---- Model --------------------------------------------------------------------------------------
# Decoder-only, pre-norm, with RMSNorm, RoPE and grouped-query attention. Layers are named as in
# Hugging Face's Llama.


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a model; saved in checkpoints. Raises UsageError if the values conflict."""

    vocab_size: int  # V
    context_size: int  # positions of a training window, and the capacity of a Cache
    num_blocks: int
    dim: int  # D
    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key and value heads, each shared by H / K query heads
    mlp: str  # a key of MLPS
    mlp_dim: int  # hidden units of an MLP; a gated one has as many gates
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, before RoPE
    untie: bool = False  # the output layer has its own matrix instead of the embeddings
    rope_theta: float = 10000.0  # RoPE's wavelengths: 2 pi to nearly 2 pi * theta positions
    rope_scaling: tuple = None  # parameters of Llama3RoPE; None: plain RoPE
    norm_eps: float = 1e-5  # added to the mean square in every RMSNorm
    head_dim: int = None  # d; None: dim / num_heads

    def __post_init__(self):
        if self.head_dim:  # from a checkpoint or an imported model, where H * d may differ from D
            return
        step = 2 * self.num_heads  # a head's dimension must be even: RoPE rotates pairs
        if self.dim % step:
            fit = step * max(1, round(self.dim / step))
            raise UsageError(
                f"--dim {self.dim} is not a multiple of 2 * --num_heads {self.num_heads}: "
                f"try --dim {fit}"
            )
        if self.num_heads % self.num_kv_heads:
            fit = math.gcd(self.num_heads, self.num_kv_heads)
            raise UsageError(
                f"--num_kv_heads {self.num_kv_heads} does not divide "
                f"--num_heads {self.num_heads}: try {fit}"
            )
        object.__setattr__(self, "head_dim", self.dim // self.num_heads)  # the dataclass is frozen


def mix(bits):
    """A hash of 32-bit numbers: each of its high bits depends on all bits of the argument.

    The constants are from "lowbias32" (Wellons 2018). These operations are vectorized: a mask
    takes a tenth of the time that MLX's generator needs.
    """
    bits = bits * mx.array(0x7FEB352D, mx.uint32)
    return (bits ^ (bits >> 15)) * mx.array(0x846CA68B, mx.uint32)


def draw_noise(noise, shape, sites):
    """The noise that `dropout` takes, for hidden states of a shape [B, L, D] and `sites` sites.

    noise: see make_noise. Returns the rate, random numbers [B, L, D] uint32, each a function of its
    row's key and its place in the row, and a salt for each site.
    """
    if not noise:
        return ()
    rates, keys = noise
    _, L, D = shape
    places = mx.arange(L * D, dtype=mx.uint32).reshape(1, L, D)
    bits = mix(places + keys[:, None, None, 0]) ^ keys[:, None, None, 1]
    # Multiples of the golden ratio, in units of 2^32, lie far apart.
    salts = mx.arange(sites, dtype=mx.uint32) * mx.array(0x9E3779B9, mx.uint32)
    return rates[0], bits ^ (bits >> 16), salts


def dropout(hidden, noise, site):
    """Dropout (Srivastava et al. 2014) of hidden [B, L, D].

    noise: see draw_noise; () for no dropout. site: a place in the model, counted from 0; each has
    its own mask. A row's mask depends only on its own key: splitting a batch does not change it.
    """
    if not noise:
        return hidden
    rate, bits, salts = noise
    bits = mix(bits ^ salts[site])
    # The carry of a 31-bit sum is 1 where `bits` is large enough. A comparison would do the same,
    # but compilers do not vectorize it.
    threshold = ((1 - rate) * 2**31).astype(mx.uint32)
    kept = ((bits >> 1) + threshold) >> 31
    return hidden * (kept.astype(hidden.dtype) / (1 - rate).astype(hidden.dtype))


@fast_version
def attend(queries, keys, values):
    """Causal attention: queries [B, H, L, d], keys and values [B, K, L, d] -> [B, H, L, d]."""
    scale = queries.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask="causal")


class Llama3RoPE(nn.Module):
    """RoPE (Su et al. 2021) for texts longer than the original context, as in Llama 3.1.

    Pairs of dimensions that turn at least `high` times within the original context keep their
    speed, those that turn at most `low` times become `factor` times slower, and the speeds of the
    others are interpolated.
    """

    def __init__(self, d, base, factor, low, high, original_context):
        super().__init__()
        self.d = d
        speeds = base ** -(np.arange(0, d, 2) / d)  # [d / 2], radians per position
        turns = original_context * speeds / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        speeds = kept * speeds + (1 - kept) * speeds / factor
        self._periods = mx.array(1 / speeds, mx.float32)  # the _ keeps MLX from training it

    def __call__(self, x, offset=0):  # [..., L, d] -> [..., L, d]
        return mx.fast.rope(
            x, self.d, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._periods
        )


class Attention(nn.Module):
    """Causal self-attention; H query heads share K key/value heads (Ainslie et al. 2023)."""

    def __init__(self, config):
        super().__init__()
        D, d = config.dim, config.head_dim
        self.num_heads = config.num_heads
        self.head_dim = d
        # Pairs dimensions i and i + d/2, as Hugging Face does.
        self.rope = nn.RoPE(d, base=config.rope_theta)
        if config.rope_scaling:
            self.rope = Llama3RoPE(d, config.rope_theta, *config.rope_scaling)
        self.q_proj = nn.Linear(D, config.num_heads * d, bias=False)
        self.k_proj = nn.Linear(D, config.num_kv_heads * d, bias=False)
        self.v_proj = nn.Linear(D, config.num_kv_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_heads * d, D, bias=False)
        if config.qk_norm:
            # Keeps the scores in range at high learning rates (Henry et al. 2020; Qwen3).
            # All heads share one weight [d].
            self.q_norm = nn.RMSNorm(d, config.norm_eps)
            self.k_norm = nn.RMSNorm(d, config.norm_eps)

    def project(self, hidden, offset=0):
        """Hidden [B, L, D] to queries [B, H, L, d], keys [B, K, L, d] and values [B, K, L, d].

        offset: the index of the first position in its text, for RoPE.
        """
        queries = self.split_heads(self.q_proj(hidden))
        keys = self.split_heads(self.k_proj(hidden))
        values = self.split_heads(self.v_proj(hidden))
        if "q_norm" in self:  # a Module is a dict of its parts
            queries = self.q_norm(queries)
            keys = self.k_norm(keys)
        # One call rotates both: RoPE is many small operations on a CPU, and with two calls,
        # decoding with a small model takes a tenth longer.
        both = mx.concatenate([queries, keys], axis=1)  # [B, H + K, L, d]
        both = self.rope(both, offset=offset)
        return both[:, : self.num_heads], both[:, self.num_heads :], values

    def split_heads(self, projected):
        """[B, L, heads * d] to [B, heads, L, d]."""
        B, L, _ = projected.shape
        return projected.reshape(B, L, -1, self.head_dim).transpose(0, 2, 1, 3)

    def __call__(self, hidden, cache=None):  # [B, L, D] -> [B, L, D]
        B, L, _ = hidden.shape
        if cache is None:
            queries, keys, values = self.project(hidden)
            attended = attend(queries, keys, values)  # [B, H, L, d]
        else:
            queries, keys, values = self.project(hidden, cache.offset)
            attended = cache.attend(queries, keys, values)
        joined = attended.transpose(0, 2, 1, 3).reshape(B, L, -1)  # [B, L, H * d]
        return self.o_proj(joined)


class Cache:
    """The keys and values of one Attention for the tokens read so far."""

    def __init__(self, config, batch_size=1):
        shape = (batch_size, config.num_kv_heads, config.context_size, config.head_dim)
        self.keys = mx.zeros(shape)
        self.values = mx.zeros(shape)
        self.offset = 0  # positions read so far

    def attend(self, queries, keys, values):
        """Appends L positions and attends from them to all so far; shapes as in `attend`.

        Uses MLX's own function: `attend` has a mask for equally many queries and keys, and its
        fast version is slower without mx.compile.
        """
        L = queries.shape[2]
        scale = queries.shape[3] ** -0.5
        end = self.offset + L
        self.keys[:, :, self.offset : end] = keys
        self.values[:, :, self.offset : end] = values
        self.offset = end
        # MLX aligns "causal" at the end, so a query sees everything up to its own position; a
        # single query sees everything without a mask.
        mask = "causal" if L > 1 else None
        return mx.fast.scaled_dot_product_attention(
            queries, self.keys[:, :, :end], self.values[:, :, :end], scale=scale, mask=mask
        )


@fast_version
def relu2(x):
    """Squared ReLU (So et al. 2021).

    It trains as well as the others (PTB, dim 256, 250 steps: 5.64 nats; swiglu 5.68, gelu 5.78)
    and is nearly free on a Linux CPU, where MLX's exp and erf are scalar: on two AMD EPYC cores,
    the forward and backward passes of [1536, 4096] take 8 ms, against 165 for silu and 320 for
    gelu.
    """
    return mx.square(nn.relu(x))


# The choices of --mlp: an activation, and whether it is applied to a gate (Shazeer 2020):
# activation(gate_proj(x)) * up_proj(x) instead of activation(up_proj(x)).
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
        up = self.up_proj(hidden)  # [B, L, mlp_dim]
        if self.is_gated:
            up = self.activation(self.gate_proj(hidden)) * up
        else:
            up = self.activation(up)
        return self.down_proj(up)


class Block(nn.Module):
    """Attention, then an MLP, each applied to normalized hidden [B, L, D] and added to it."""

    def __init__(self, config, index):
        super().__init__()
        self.index = index
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)  # Llama's name for it
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def __call__(self, hidden, cache=None, noise=()):
        site = 2 * self.index + 1  # of dropout; site 0 is the embeddings
        attended = self.self_attn(self.input_layernorm(hidden), cache)
        hidden = hidden + dropout(attended, noise, site)
        transformed = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + dropout(transformed, noise, site + 1)


class Transformer(nn.Module):
    """Token ids [B, L] to final hidden states [B, L, D]; any head can go on top."""

    def __init__(self, config):
        super().__init__()
        # Gradient checkpointing: only the input of each block is kept for the backward pass.
        self.grad_checkpoint = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = [Block(config, i) for i in range(config.num_blocks)]
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)

    def __call__(self, tokens, caches=None, noise=()):
        """caches: a Cache for each block; noise: see make_noise, () for no dropout."""
        hidden = self.embed_tokens(tokens)
        hidden = hidden.astype(self.norm.weight.dtype)  # bfloat16 if the norms are, see make_step
        noise = draw_noise(noise, hidden.shape, sites=2 * len(self.layers) + 1)
        hidden = dropout(hidden, noise, 0)
        if caches is None:
            caches = [None] * len(self.layers)
        for block, cache in zip(self.layers, caches):
            run_block = partial(block, cache=cache, noise=noise)
            if self.grad_checkpoint:
                run_block = nn.utils.checkpoint(block, run_block)
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

    def __call__(self, tokens, caches=None, noise=(), last=0):
        """Logits of the `last` positions only, which is all that decoding needs; 0: of all."""
        hidden = self.model(tokens, caches, noise)[:, -last:]  # [B, last or L, D]; -0 is all
        if self.config.untie:
            return self.lm_head(hidden)
        return self.model.embed_tokens.as_linear(hidden)

    @property
    def head(self):
        """The output layer's matrix [V, D]: the embeddings, unless it has its own."""
        if self.config.untie:
            return self.lm_head.weight
        return self.model.embed_tokens.weight


def init_weights(model, seed):
    """Initializes every parameter.

    Norms are 1, matrices normal with standard deviation 1 / sqrt(inputs). The matrices that write
    into the residual stream are 0, so that each block starts as the identity. An untied output
    layer is also 0.

    Embeddings have standard deviation 5 / dim. Tied, they are also the output layer: the logit of
    the token just read starts near 5 (4.2 at dim 1024, where `norm_eps` is no longer small beside
    their mean square), the others near 0, and the first loss is near ln(V + e^5); untied, it is
    ln V. On PTB (dim 256, AdamW 3e-3), 250 steps reached 5.64 nats with this value, 5.57 with twice
    and 5.91 with a fifth of it, and 5.76 with GPT-2's.
    """
    parameters = tree_flatten(model.parameters())  # [(name, array), ...]
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    weights = []
    for (name, parameter), key in zip(parameters, keys):
        normal = mx.random.normal(parameter.shape, key=key)
        if name.endswith("norm.weight"):
            value = mx.ones_like(parameter)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            value = mx.zeros_like(parameter)
        elif name.endswith("embed_tokens.weight"):
            value = normal * 5 / model.config.dim
        else:
            value = normal * parameter.shape[1] ** -0.5  # [O, I]: outputs vary as much as inputs
        weights.append((name, value))
    model.load_weights(weights)
    mx.eval(model.parameters())


# ---- Loss and optimizer -------------------------------------------------------------------------


@fast_version
def cross_entropy(hidden, head, targets, weights, training=True):
    """Cross-entropy of hidden states [B, L, D], in nats: a weighted sum over all positions.

    head: the output layer's matrix [V, D]; targets: ids [B, L]; weights: [B, L] or a number
    (1 / positions turns the sum into a mean). training: whether a gradient will be taken; if so,
    the fast version computes it together with the loss.
    """
    logits = (hidden @ head.astype(hidden.dtype).T).astype(mx.float32)  # [B, L, V]
    losses = nn.losses.cross_entropy(logits, targets)  # [B, L]
    return (losses * weights).sum()


@fast_version
def over_streams(function, *arrays):
    """[function(*rows), ...], one result per share of the rows of `arrays`.

    The fast version computes the shares in parallel, each on a CPU stream; here there is only one.
    """
    return [function(*arrays)]


@fast_version
def add_up(trees):
    """The sum of several trees of arrays, leaf by leaf."""
    return tree_map(lambda *leaves: reduce(mx.add, leaves), *trees)


@fast_version
def clip_grad_norm(gradients, limit):
    """Scales a tree of gradients to a norm of at most `limit`; returns it and its norm before."""
    return optim.clip_grad_norm(gradients, limit)


@fast_version
def spread(optimizer_class):
    """`optimizer_class`; the fast version: a subclass that uses all cores, with equal results."""
    return optimizer_class


@fast_version
def has_bfloat16():
    """Whether `use_bfloat16` makes a CPU faster; MLX itself has no fast bfloat16 for it."""
    return False


@fast_version
def use_bfloat16(wanted):
    """Sets whether matrix products on a CPU round their inputs to bfloat16; here a no-op."""


class AdamW(optim.AdamW):
    """MLX's AdamW (Loshchilov & Hutter 2019), with a bias correction that costs nothing.

    Fused into a kernel by mx.compile, the scalars that all elements share, powers of the betas,
    would be recomputed for every element. It does not fuse across mx.contiguous.
    """

    def apply_single(self, gradient, parameter, state):
        beta1, beta2 = self.betas
        rate = mx.contiguous(self.learning_rate / (1 - beta1**self.step))
        correction = mx.contiguous(mx.rsqrt(1 - beta2**self.step))
        decay = mx.contiguous(1 - self.learning_rate * self.weight_decay)
        m = beta1 * state["m"] + (1 - beta1) * gradient
        v = beta2 * state["v"] + (1 - beta2) * mx.square(gradient)
        state["m"] = m
        state["v"] = v
        return decay * parameter - rate * m / (mx.sqrt(v) * correction + self.eps)


# Muon's learning rate, as a multiple of AdamW's. On PTB (dim 256, batch 32, AdamW's at 3e-3), the
# validation loss after 120 steps was 5.56 nats, against 5.65 with AdamW alone; on characters (dim
# 128), multiples of 8 and 10 did equally well.
MUON_RATE = 5


class Muon(optim.Muon):
    """MLX's Muon (Jordan et al. 2024) with decoupled weight decay, like AdamW's.

    MLX itself adds the decay to the gradient before orthogonalizing it.
    """

    def __init__(self, learning_rate, weight_decay):
        super().__init__(learning_rate, weight_decay=0.0)
        self.decay = weight_decay

    def apply_single(self, gradient, parameter, state):
        # AdamW decays by its learning rate times `decay`; this does the same, with AdamW's rate.
        decay = self.learning_rate * self.decay / MUON_RATE
        parameter = parameter * (1 - decay)
        return super().apply_single(gradient, parameter, state)


def make_optimizer(model, flags):
    """AdamW; with --optimizer muon, Muon for the blocks' matrices.

    Weight decay: --embedding_decay for the embeddings and the output layer, --weight_decay for
    the blocks' matrices, none for norms.
    """
    rate = flags.learning_rate
    adamw = partial(spread(AdamW), learning_rate=rate, betas=[flags.beta1, flags.beta2])
    if flags.optimizer == "muon":
        blocks = spread(Muon)(rate * MUON_RATE, flags.weight_decay)
    else:
        blocks = adamw(weight_decay=flags.weight_decay)
    decay = flags.weight_decay if flags.embedding_decay is None else flags.embedding_decay
    groups = [blocks, adamw(weight_decay=decay), adamw(weight_decay=0.0)]
    filters = [is_matrix_of_block, is_matrix]
    # filters[i] selects the parameters of groups[i]; the last group takes the rest.
    optimizer = optim.MultiOptimizer(groups, filters)
    optimizer.init(model.trainable_parameters())
    assert_each_has_one_group(optimizer, model)
    return optimizer


def is_matrix(name, parameter):
    """Whether a parameter is a matrix, for MultiOptimizer's filters."""
    return parameter.ndim >= 2


def is_matrix_of_block(name, parameter):
    """Whether a parameter is a block's matrix, not the embeddings or the output layer."""
    return name.startswith("model.layers.") and is_matrix(name, parameter)


def split_group(state):
    """Splits an older checkpoint's state of all matrices into the blocks' and the others'."""
    arrays = tree_flatten(state)
    blocks = [(name, array) for name, array in arrays if name.startswith("model.layers.")]
    others = [
        (name, array) for name, array in arrays if name.startswith(("model.embed", "lm_head"))
    ]
    shared = [(name, array) for name, array in arrays if "." not in name]  # such as `step`
    return tree_unflatten(blocks + shared), tree_unflatten(others + shared)


def assert_each_has_one_group(optimizer, model):
    """Asserts that each trained parameter has state in exactly one group of the optimizer."""
    held = []
    for group in optimizer.optimizers:
        # Arrays are named after their parameter plus a suffix, such as `model.norm.weight.m`; only
        # those of the whole group, such as `step`, have no dot.
        names = {name.rpartition(".")[0] for name, _ in tree_flatten(group.state)}
        held += sorted(names - {""})
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert sorted(held) == sorted(trained)


def set_learning_rate(optimizer, rate):
    """Sets the learning rate of all groups; Muon's is MUON_RATE times the others'."""
    for group in optimizer.optimizers:
        group.learning_rate = rate * MUON_RATE if isinstance(group, optim.Muon) else rate


def learning_rate_at(iteration, flags):
    """The learning rate of step `iteration`, counted from 0.

    It rises linearly over `lr_warmup` steps and then stays, unless --lr_schedule is cosine or
    linear: then it decays to `min_lr` at `num_iters`, over the last share `lr_cooldown` of the
    steps after warmup.
    """
    min_lr = flags.learning_rate / 10 if flags.min_lr is None else flags.min_lr
    cooldown = flags.lr_cooldown * (flags.num_iters - flags.lr_warmup)  # in steps
    done = max(0, iteration - (flags.num_iters - cooldown)) / max(1, cooldown)
    if flags.lr_schedule == "cosine":
        left = (1 + math.cos(math.pi * done)) / 2
    elif flags.lr_schedule == "linear":
        left = 1 - done
    else:
        left = 1
    # Written as a difference, this is exactly the learning rate where `left` is 1.
    rate = flags.learning_rate - (flags.learning_rate - min_lr) * (1 - left)
    warmup = min(1, (iteration + 1) / max(1, flags.lr_warmup))  # + 1: a rate of 0 learns nothing
    return rate * warmup


def average_weights(average, weights, iteration, share):
    """The average of the weights over about the last `share` of the steps taken.

    average: the average before step `iteration`, counted from 0, a tree of arrays; None if it
    starts here. weights: those after the step. Each step is weighted in proportion to a power of
    its place in the run, (place / steps) ^ (1 / share - 1) (Shamir & Zhang 2013; Karras et al.
    2024), so the average depends neither on where the run will end nor on where it was interrupted.
    """
    if average is None:
        return weights
    part = min(1, 1 / (share * (iteration + 1)))  # the newest weights' share of the average
    average = mix_weights(average, weights, mx.array(part))
    mx.eval(average)  # or the graphs of all steps would pile up
    return average


@mx.compile
def mix_weights(average, weights, part):
    """Interpolates between two trees of arrays: `part` 0 gives `average`, 1 gives `weights`."""
    return tree_map(lambda old, new: old + part * (new - old), average, weights)


# ---- Batches ------------------------------------------------------------------------------------


class Batches:
    """An endless stream of batches: windows of a token array [N] in permuted order.

    Each epoch cuts the text into windows at a random offset, so that no token is always left out,
    and draws their order `perm`; `s` is the position in it. The next batch depends only on the
    arguments, the epoch and `s`; the order is saved anyway, since another NumPy version might draw
    a different one. batch_size: rows of a whole step. Raises UsageError if the text is shorter
    than one window.
    """

    def __init__(self, tokens, context_size, batch_size, seed):
        if len(tokens) <= context_size:  # a window is L inputs plus one token, the last target
            raise UsageError(
                f"the training text has {len(tokens):,} tokens, fewer than "
                f"--context_size {context_size} needs: use a longer text or "
                f"--context_size {max(1, len(tokens) - 1)}"
            )
        self.tokens = tokens
        self.context_size = context_size
        self.batch_size = batch_size
        self.seed = seed
        self.begin_epoch(0)

    def begin_epoch(self, epoch):
        """Draws the offset and the order of an epoch, counted from 0, and moves to its start."""
        rng = np.random.default_rng([self.seed, epoch])
        self.epoch = epoch
        self.place = 0
        offsets = min(self.context_size, len(self.tokens) - self.context_size)
        self.offset = int(rng.integers(offsets))
        windows = (len(self.tokens) - 1 - self.offset) // self.context_size
        # [windows]; int32 keeps checkpoints small.
        self.perm = rng.permutation(windows).astype(np.int32)

    def next(self):
        """Inputs and targets of the next step, [B, L] int32.

        An epoch's last, incomplete batch is dropped. If the text has fewer windows than a batch
        has rows, the windows repeat.
        """
        complete = self.place + self.batch_size <= len(self.perm)
        if not complete and self.place > 0:
            self.begin_epoch(self.epoch + 1)
        places = range(self.place, self.place + self.batch_size)
        windows = self.perm.take(places, mode="wrap").astype(np.int64)  # texts may exceed 2^31
        starts = self.offset + windows * self.context_size  # [B]
        self.place += self.batch_size
        ends = starts + self.context_size + 1
        rows = np.stack([self.tokens[start:end] for start, end in zip(starts, ends)])  # [B, L + 1]
        return mx.array(rows[:, :-1], mx.int32), mx.array(rows[:, 1:], mx.int32)

    def state(self):
        """The position in the stream, for a checkpoint's record; `perm` is saved separately."""
        # "s" is what older checkpoints call it, too.
        return {"epoch": self.epoch, "offset": self.offset, "s": self.place}

    def restore(self, state, perm):
        """Moves to the position that `state` describes."""
        self.epoch = state["epoch"]
        self.offset = state["offset"]
        self.place = state["s"]
        self.perm = np.array(perm)


def make_noise(iteration, rows, flags):
    """Dropout rates [N] and keys [N, 2] uint32 for the rows of a step.

    The rates are all equal, in an array that can be divided as the rows are. The key of row r
    depends only on (seed, iteration, r). The rate changes linearly from --dropout to
    --dropout_final at `num_iters`. Returns () without dropout.
    """
    final = flags.dropout if flags.dropout_final is None else flags.dropout_final
    if flags.dropout == 0 and final == 0:
        return ()
    # The 1 makes these random numbers differ from those of Batches.
    rng = np.random.default_rng([flags.seed, iteration, 1])
    rate = flags.dropout + (final - flags.dropout) * iteration / flags.num_iters
    keys = rng.integers(0, 2**32, (rows, 2), np.uint32)
    return mx.full(rows, rate), mx.array(keys)


# ---- Evaluation ---------------------------------------------------------------------------------


def evaluate(model, tokens, batch_size, stride=None, interrupts=None, ranks=None):
    """Mean loss in nats/token over all of `tokens` [N] but the first, each scored once.

    Windows start `stride` tokens apart, by default without overlap. Returns None on a signal.
    """
    ranks = ranks or SingleProcess()
    interrupts = interrupts or Interrupts()
    context_size = model.config.context_size
    stride = stride or context_size
    count = len(tokens) - 1  # number of targets

    def loss(inputs, targets, weights):
        return cross_entropy(model.model(inputs), model.head, targets, weights, training=False)

    # Traced once, as all batches have the same shape. Without `inputs`, the compiled function
    # would keep the weights as constants.
    @partial(mx.compile, inputs=[model.state])
    def score(*windows):
        return sum(over_streams(loss, *windows))

    # [windows]; the first one that starts at `last` or later reaches the end of the text.
    last = max(count - context_size, 0)
    starts = np.arange(0, last + stride, stride)
    # Windows that start at the end, where all weights are 0, pad the last batch.
    missing = -len(starts) % batch_size
    starts = np.append(starts, np.full(missing, count))
    batches = starts.reshape(-1, batch_size)
    nats = 0.0  # summed in 64 bits, as a Python float
    received = None
    for batch in batches[ranks.rank :: ranks.size]:
        received = interrupts.received
        if received:
            break
        inputs, targets, weights = scored_windows(tokens, batch, context_size, stride)
        nats += score(inputs, targets, weights).item()
    nats, received = ranks.sum(nats, received)
    if received:
        interrupts.received = received  # perhaps on another rank
        return None
    return nats / count


def scored_windows(tokens, starts, context_size, stride):
    """Inputs, targets and weights (1 or 0) of the windows at `starts` [B]: [B, L] int32 each."""
    count = len(tokens) - 1  # number of targets
    columns = np.arange(context_size)  # [L]
    places = starts[:, None] + columns  # [B, L]
    # Where windows overlap, tokens scored in the previous window do not count.
    is_new = columns >= context_size - stride
    is_first = starts[:, None] == 0
    weights = (places < count) & (is_new | is_first)
    places = np.minimum(places, count - 1)  # beyond the end any token will do: its weight is 0
    return [mx.array(array, mx.int32) for array in (tokens[places], tokens[places + 1], weights)]


def score_split(name, model, dataset, flags, interrupts, ranks, limit=0):
    """Prints the score of a split, or of its first `limit` tokens.

    Returns the loss in nats/token, or None if a signal arrived.
    """
    split = getattr(dataset, name)
    tokens = split.tokens
    if limit:
        tokens = tokens[: limit + 1]  # the first one is only context
    began = time.perf_counter()
    nats = evaluate(model, tokens, flags.batch_size, flags.eval_stride, interrupts, ranks)
    if nats is not None:
        seconds = time.perf_counter() - began
        line = describe_score(name, nats, split, dataset.tokenizer)
        line += f", {len(tokens) / seconds:,.0f} tokens/s"
        if flags.evaluate:
            line += f" ({seconds:.1f} s, {1000 * seconds / len(tokens):.4f} ms per token)"
        tqdm.write(line)
    return nats


def describe_score(name, nats, split, tokenizer):
    """A split's score, per token and in units that do not depend on the tokenizer."""
    unit = "word" if tokenizer.kind == "word" else "token"
    line = f"{name} {nats:.4f} nats, perplexity {perplexity(nats):.2f} per {unit}"
    if tokenizer.kind not in ("word", "char", "byte"):
        # For the whole split, extrapolated if `nats` is the score of its first tokens only.
        total = nats * len(split.tokens)
        line += f", {perplexity(total / max(1, split.num_words)):.2f} per word"
    line += f", {bits_per_byte(nats, split):.4f} bits per byte"
    if tokenizer.unk is not None:
        line += f", {split.num_unk / len(split.tokens):.2%} <unk>"
    return line


def perplexity(nats):
    """The perplexity of a mean loss in nats."""
    return math.exp(min(nats, 99))  # exp(710) would overflow


def bits_per_byte(nats, split):
    """Converts a mean loss in nats/token to bits per byte of the split's text."""
    return nats / math.log(2) * len(split.tokens) / split.num_bytes


# ---- Checkpoints --------------------------------------------------------------------------------
# `<sha1>.safetensors` holds the trained weights (for LoRA, only the adapters) and is named by the
# SHA1 of its bytes. `<sha1>.metadata`, in the same format, holds the rest of the run's state: the
# optimizer state and `perm` as arrays, with --average also the weights before averaging, the
# tokenizer, and `record`, JSON of the flags, counters and scores. Its header contains the file's
# own SHA1, computed with BLANK in its place. If several runs reach the same weights, each has its
# own metadata; that of later runs is named `<sha1>.<run>.metadata`.

BLANK = "0" * 40  # as long as the SHA1 that replaces it, so that no other byte moves

# What reading a junk file as a checkpoint can raise.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


class Hasher:
    """A file object that keeps only the SHA1 of what is written to it."""

    # MLX checks that a file has these attributes but does not use them.
    closed = False
    seek = None
    tell = None

    def __init__(self):
        self.digest = hashlib.sha1()

    def write(self, data):
        self.digest.update(data)
        return len(data)


def write_safetensors(path, tree, metadata):
    """Writes and syncs a tree of arrays; returns the SHA1 of the file's bytes.

    metadata: {name: text}; a text that is BLANK is replaced by the SHA1 (of the bytes before that).
    """
    arrays = dict(sorted(tree_flatten(tree)))  # sorted: equal arrays give equal bytes
    hasher = Hasher()
    mx.save_safetensors(hasher, arrays, metadata)
    sha1 = hasher.digest.hexdigest()
    stated = {name: sha1 if text == BLANK else text for name, text in metadata.items()}
    with open(path, "wb") as file:
        mx.save_safetensors(file, arrays, stated)
        file.flush()  # out of Python's buffer
        # Also out of the system's, or a power cut could leave a named file without its bytes.
        os.fsync(file.fileno())
    return sha1


def read_header(file):
    """The JSON header of an open safetensors file, as bytes; if damaged, whatever is there."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")  # followed by the header and the arrays
    size = os.fstat(file.fileno()).st_size
    return file.read(min(length, size))  # the length may be junk


def read_metadata(file):
    """The record and the texts of an open `.metadata` file.

    Raises one of UNREADABLE if it is damaged.
    """
    texts = json.loads(read_header(file))["__metadata__"]  # {name: text}
    if hashlib.sha1(texts["record"].encode()).hexdigest() != texts["record_sha1"]:
        raise ValueError("damaged header")
    return json.loads(texts["record"]), texts


def sha1_of(file, stated=BLANK):
    """SHA1 of an open safetensors file, with BLANK in place of the SHA1 `stated` in it."""
    length = 8 + len(read_header(file))  # of the header and its length prefix
    file.seek(0)
    header = file.read(length)
    digest = hashlib.sha1(header.replace(stated.encode(), BLANK.encode(), 1))
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def files_of(folder, record):
    """The files of a checkpoint, open for reading: its .safetensors and its .metadata.

    They stay open in the record, so that the verified bytes are the ones read later, even if the
    run that owns them is still training and deletes them in between.
    """
    if "files" not in record:
        metadata = record.get("path", folder / f"{record['id']}.metadata")
        weights = folder / f"{record['id']}.safetensors"
        record["files"] = [open(weights, "rb"), open(metadata, "rb")]
    return record["files"]


def close_files(record):
    """Closes what files_of opened; until then, a deleted file still takes up disk space."""
    for file in record.pop("files", ()):
        file.close()


def find_damage(folder, record):
    """What is wrong with a checkpoint, or None; called before its content is used.

    Raises RunError if another version of this program wrote it: that is not damage, and no older
    checkpoint may be used instead.
    """
    checkpoint_id = record["id"]
    try:
        weights, metadata = files_of(folder, record)
        said, texts = read_metadata(metadata)
        if said["format_version"] != FORMAT_VERSION:
            raise RunError(
                f"checkpoint {checkpoint_id[:12]} was written by another version of this program: "
                "use the version that wrote it, or --new_model"
            )
        if sha1_of(weights) != checkpoint_id:
            return f"its .safetensors does not have the SHA1 {checkpoint_id[:12]}"
        # The .metadata file is not named by its SHA1, but contains it in its header.
        if sha1_of(metadata, texts["sha1"]) != texts["sha1"]:
            return f"its .metadata does not have the SHA1 {texts['sha1'][:12]}"
        if said["id"] != checkpoint_id:
            return f"its .metadata belongs to {said['id'][:12]}"
        return None
    except UNREADABLE as error:
        return f"it cannot be read ({error})"


def list_checkpoints(folder, warn=False, tries=10):
    """The records of the checkpoints in `folder`, most recently saved first.

    A checkpoint that several runs reached has a record for each of them. Each record also gets
    "id", "path" (of the metadata), defaults for missing "flags", and "run_saved": when its run
    last saved a checkpoint not marked as diverged. If a run in training deletes checkpoints in the
    meantime, the listing is repeated, up to `tries` times: "best" might be a deleted one.
    """
    paths = {path.stem: [] for path in folder.glob("*.safetensors")}  # {id: [metadata, ...]}
    for path in folder.glob("*.metadata"):
        checkpoint_id = path.name.partition(".")[0]
        if checkpoint_id in paths:  # metadata alone is not a checkpoint
            paths[checkpoint_id].append(path)
    records = []
    some_vanished = False
    for checkpoint_id, metadata in paths.items():
        for path in metadata or [folder / f"{checkpoint_id}.metadata"]:
            try:
                with open(path, "rb") as file:
                    record, _ = read_metadata(file)
                # The file name takes precedence; find_damage compares the record with it.
                record |= {"id": checkpoint_id, "path": path}
                record["flags"] = DEFAULTS | record["flags"]  # some flags are newer than the record
                saved_order(record)
                records.append(record)
            except UNREADABLE as error:
                vanished = is_deleted(folder, checkpoint_id)
                some_vanished |= vanished
                if warn and len(checkpoint_id) == 40 and not vanished:
                    print(
                        f"Skipping {checkpoint_id[:12]}: unreadable .metadata ({error})",
                        file=sys.stderr,
                    )
    if some_vanished and (tries > 1 or not records):
        return list_checkpoints(folder, warn, tries - 1)  # there are newer ones
    records.sort(key=saved_order, reverse=True)
    run_saved = {}
    for record in reversed(records):  # oldest first, so that the newest of a run remains
        if not record.get("diverged"):
            run_saved[record["run"]] = record["saved"]
    for record in records:
        record["run_saved"] = run_saved.get(record["run"], 0)
    return records


def is_deleted(folder, checkpoint_id):
    """Whether a checkpoint that was listed is gone, deleted by the run that owns it."""
    return not os.path.lexists(folder / f"{checkpoint_id}.safetensors")  # a dangling link is there


def saved_order(record):
    """The sort key of checkpoints. Raises one of UNREADABLE if the record is not one of ours."""
    return float(record["saved"]), int(record["iteration"]), str(record["run"])


def describe(record):
    """A checkpoint's name in messages."""
    return f"{record['run']}, iteration {record['iteration']:,}, checkpoint {record['id'][:12]}"


def best_id(record):
    """The id of the best checkpoint so far of the run that `record` belongs to, or None."""
    return record["best"]["id"] if record["best"] else None


def matching_checkpoints(records, identifier):
    """The records, newest first, that an identifier matches.

    identifier: an id or a prefix of it, a run's name (its newest checkpoint), "latest", or "best"
    (of the most recently saved run).
    """
    if not records:
        return []
    sound = [record for record in records if not record.get("diverged")]
    if identifier == "latest":
        return sound[:1]
    if identifier == "best":
        best = [record for record in records if record["id"] == best_id(records[0])]
        # The best checkpoint of a branch may belong to the run that it started from.
        own = [record for record in best if record["run"] == records[0]["run"]]
        return (own or best)[:1]
    of_run = [record for record in sound if record["run"] == identifier]
    if of_run:
        return of_run[:1]
    found = {}
    for record in records:
        if record["id"].startswith(identifier):
            found.setdefault(record["id"], record)  # if several runs have it, the last saved
    return list(found.values())


def named_checkpoint(folder, records, identifier, flag="--identifier"):
    """The record that the flag names; its files are verified.

    Raises UsageError if none or several match, RunError if it is damaged.
    """
    found = matching_checkpoints(records, identifier)
    if not records:
        raise UsageError(f"{flag} {identifier!r}: no checkpoint in {folder}: {TRAIN_FIRST}")
    if len(found) != 1:
        matches = "several checkpoints" if found else "no checkpoint"
        known = "; ".join(map(describe, (found or records)[:9]))
        raise UsageError(
            f"{flag} {identifier!r} matches {matches}; name one (--list shows all): {known}"
        )
    [record] = found
    damage = find_damage(folder, record)
    if damage and is_deleted(folder, record["id"]):
        # The identifier may match another checkpoint by now.
        return named_checkpoint(folder, list_checkpoints(folder), identifier, flag)
    if damage:
        raise RunError(
            f"checkpoint {record['id'][:12]} of {flag} is damaged ({damage}): "
            "use another one from --list"
        )
    return record


@contextlib.contextmanager
def locked(folder):
    """Holds the lock for changing checkpoints in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits; a killed holder releases it, too
        yield
        os.fsync(descriptor)  # renames in the folder survive a power cut from here on
    finally:
        os.close(descriptor)


def lock_run(folder, name):
    """An open file, locked to claim run `name` for this process; None if another trains it.

    The lock is released when its holder dies or closes the file.
    """
    file = open(folder / f".{name}.lock", "ab")
    try:
        # Raises BlockingIOError instead of waiting.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def save_checkpoint(folder, run, interrupts=None):
    """Saves a run in its current state; returns the checkpoint's id."""
    keep_trying(write_checkpoint, folder, run, interrupts)
    return run.checkpoint_id


def save_score(folder, run, interrupts=None):
    """Saves the run's record, with its new score, in the metadata of its last checkpoint."""
    keep_trying(write_metadata, folder, run, interrupts)


GRACE = 5  # seconds of retrying a save after SIGTERM; most launchers kill after 10 or more


def keep_trying(write, folder, run, interrupts=None):
    """Calls write(folder, run) under the folder's lock until it succeeds.

    It waits out a full disk or a missing folder: training state is in memory, and the last
    checkpoint is untouched. After a launcher's SIGTERM or SIGHUP, it retries for GRACE seconds and
    then raises SystemExit with the signal's exit status.
    """
    interrupts = interrupts or Interrupts()
    grace = GRACE
    for pause in itertools.chain((1, 2, 5, 10, 30), itertools.repeat(60)):  # seconds
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                write(folder, run)
            return
        except OSError as error:
            remove_leftovers(folder, run.name)  # frees the space of the partial save
            tqdm.write(
                f"Saving to {folder} failed ({error}); retrying in {pause} s. Press Ctrl+C twice "
                f"to exit without saving; SIGTERM exits after {GRACE} s."
            )
        if grace == 0:
            tqdm.write("Exiting without saving; the previous checkpoint is intact.")
            sys.exit(128 + interrupts.received)
        for _ in range(pause):
            time.sleep(1)
            if interrupts.received in (signal.SIGTERM, signal.SIGHUP):
                grace -= 1
            if grace == 0:
                break


def write_checkpoint(folder, run):
    """Tries once to save both files of a checkpoint.

    A checkpoint is never half-written: a file is complete on disk before it gets its name, and a
    checkpoint counts only once it has its .safetensors, which is named last.
    """
    weights = folder / f"{run.name}.safetensors.new"
    sha1 = write_safetensors(weights, run.result(), {"format": "mlx"})
    run.checkpoint_id = sha1
    write_metadata(folder, run)
    os.replace(weights, folder / f"{sha1}.safetensors")


def write_metadata(folder, run):
    """Tries once to write the metadata of the checkpoint `run.checkpoint_id`."""
    # Later than all others, even if the clock was set back.
    saved = max([time.time(), *(record["saved"] + 1e-3 for record in list_checkpoints(folder))])
    record = run.record() | {"saved": saved, "format_version": FORMAT_VERSION}
    tokenizer = json.dumps(run.dataset.tokenizer.to_dict())
    arrays = {"optimizer": run.optimizer.state, "perm": mx.array(run.batches.perm)}
    if run.average:  # the .safetensors holds only the average
        arrays["weights"] = run.model.trainable_parameters()
    replace_metadata(own_metadata(folder, run), record, tokenizer, arrays)


def own_metadata(folder, run):
    """The path of the metadata of a run's last checkpoint: see the top of this section."""
    first = folder / f"{run.checkpoint_id}.metadata"
    later = folder / f"{run.checkpoint_id}.{run.name}.metadata"
    if later.exists():
        return later
    if is_deleted(folder, run.checkpoint_id):  # then `first` is what a killed save has left
        return first
    return first if owner_of(first) in (None, run.name) else later


def owner_of(path):
    """The name of the run that a metadata file belongs to; None if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return read_metadata(file)[0]["run"]
    except UNREADABLE:  # perhaps it does not exist
        return None


def replace_metadata(path, record, tokenizer, arrays):
    """Writes a metadata file; readers see either the old or the new one, never part of one.

    record: a dict; tokenizer: its `to_dict()` as JSON; arrays: a tree.
    """
    text = json.dumps(record)
    texts = {
        "record": text,
        "record_sha1": hashlib.sha1(text.encode()).hexdigest(),  # verifiable without the arrays
        "tokenizer": tokenizer,
        "sha1": BLANK,
    }
    new = path.parent / f"{record['run']}.metadata.new"
    write_safetensors(new, arrays, texts)
    os.replace(new, path)


def prune(folder, run, keep):
    """Deletes checkpoints of a run, except the newest `keep`, the best, and those in use.

    What cannot be deleted now is deleted next time.
    """
    with contextlib.suppress(OSError), locked(folder):
        records = list_checkpoints(folder)
        own = [record for record in records if record["run"] == run.name]  # newest first
        sound = [record["id"] for record in own if not record.get("diverged")]
        # The checkpoint that the run was saved as or resumed from may not be the newest: newer ones
        # may be damaged, which only reading them would reveal.
        kept = {run.checkpoint_id, *sound[:keep]}
        if own:
            kept.add(best_id(own[0]))
        in_use = set()  # by other runs: as their base, teacher or best
        for record in records:
            in_use |= {origin_id for _, origin_id in record.get("uses", {}).values()}
            if record["run"] != run.name:
                in_use.add(best_id(record))
        for record in own:
            if record["id"] in kept:
                continue
            owners = [other for other in records if other["id"] == record["id"]]
            if len(owners) > 1:
                record["path"].unlink(missing_ok=True)  # the checkpoint stays for the others
            elif record["id"] not in in_use:
                (folder / f"{record['id']}.safetensors").unlink(missing_ok=True)
    remove_leftovers(folder, run.name)  # the metadata of deleted checkpoints


def remove_leftovers(folder, name):
    """Deletes what killed saves have left: `.new` files, and metadata without weights.

    name: the run that is being trained.
    """
    run = r"\w+-[0-9a-f]{6}"  # a run's name
    unfinished = re.compile(rf"{run}\.(safetensors|metadata|csv)\.new")
    metadata = re.compile(rf"([0-9a-f]{{40}})(\.{run})?\.metadata")
    with contextlib.suppress(OSError), locked(folder):
        for path in folder.iterdir():
            found = metadata.fullmatch(path.name)
            is_alone = found and is_deleted(folder, found[1])
            if unfinished.fullmatch(path.name) or (is_alone and not may_be_copied(path, name)):
                path.unlink()


def may_be_copied(path, name):
    """Whether metadata without weights may be a checkpoint that a user is copying to the folder.

    It is then new, intact and of a run other than `name`.
    """
    is_new = time.time() - path.lstat().st_ctime < 3600  # seconds; a copy may keep its st_mtime
    return is_new and owner_of(path) not in (None, name)


def newest_sound_id(folder, run):
    """The id of the checkpoint to return to after the step from `run.iteration` diverged, or None.

    If the run was saved at that iteration, the next step from there would diverge again at any
    learning rate.
    """
    if run.saved_iteration < run.iteration:
        return run.checkpoint_id
    for record in list_checkpoints(folder):
        is_own = record["run"] == run.name and record["id"] != run.checkpoint_id
        if is_own and not record.get("diverged"):
            return record["id"]
    return None


def mark_diverged(folder, run):
    """Marks the checkpoint that `run` saved last: training skips it, until it is pruned."""
    for record in list_checkpoints(folder):
        if record["run"] == run.name and record["id"] == run.checkpoint_id:
            with contextlib.suppress(OSError), locked(folder):  # for example, a full disk
                with open(record["path"], "rb") as file:
                    content, texts = read_metadata(file)
                    arrays = load_arrays(file)
                content["diverged"] = True
                replace_metadata(record["path"], content, texts["tokenizer"], arrays)


def load_model(folder, record):
    """The model and tokenizer of a checkpoint, with a LoRA run's adapters merged into its base.

    Raises RunError if that base is gone.
    """
    model = model_of(record)
    weights = load_arrays(files_of(folder, record)[0])
    if record["flags"]["lora_rank"]:  # the file holds only the adapters
        base = open_origin(folder, record, "init_from").model
        rank = record["flags"]["lora_rank"]
        alpha = record["flags"]["lora_alpha"]
        weights = extra("lora").merge(base, weights, rank, alpha)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model, tokenizer_from_dict(load_tokenizer(folder, record))


def load_arrays(file):
    """The arrays of an open safetensors file, {name: array}. Raises RunError if it is unreadable.

    MLX reopens it by its descriptor: the name may be gone, and MLX accepts only UTF-8 names. The
    file object itself is not passed: an MLX thread would release it at an arbitrary time, which
    at exit would abort Python.
    """
    rewind(file)
    try:
        arrays = mx.load(f"/dev/fd/{file.fileno()}", format="safetensors")
        mx.eval(arrays)  # reads them
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{file.name} cannot be read ({reason})") from None
    finally:
        rewind(file)
    return arrays


def rewind(file):
    """Moves a file and its descriptor to the start.

    On macOS, what MLX opens by the descriptor's number shares its position.
    """
    file.seek(0, os.SEEK_END)  # empties the buffer, in which the next line might only move
    file.seek(0)


def load_tokenizer(folder, record):
    """The tokenizer of a checkpoint, as its `to_dict()`."""
    _, metadata = files_of(folder, record)
    _, texts = read_metadata(metadata)
    return json.loads(texts["tokenizer"])


def model_of(record):
    """A model of the shape in a checkpoint's record, with weights yet to be loaded.

    Raises RunError if this program has no such model.
    """
    fault = (
        f"checkpoint {record['id'][:12]} was written by another version of this program: "
        "use the version that wrote it"
    )
    with explained(fault, TypeError, KeyError, kind=RunError):
        return LanguageModel(Config(**record["config"]))


class Origin(NamedTuple):
    """A model that a flag names: a run's starting point, its teacher, or a draft."""

    model: LanguageModel
    tokenizer: object
    id: str  # of its checkpoint; for a Hugging Face folder, a SHA1 over its files


def open_model(folder, name, flag):
    """The Origin that a flag names: a checkpoint, or a Hugging Face folder.

    Raises UsageError if there is none, RunError if it is damaged.
    """
    if os.path.isdir(name):
        return Origin(*extra("huggingface").import_model(Path(name)))
    record = named_checkpoint(folder, list_checkpoints(folder), name, flag)
    model, tokenizer = load_model(folder, record)
    return Origin(model, tokenizer, record["id"])


def open_origin(folder, record, flag):
    """The Origin that --init_from or --teacher named when the run of `record` was started.

    Raises RunError if it is gone or has changed.
    """
    name, origin_id = record["uses"][flag]  # name: a folder's path, or the id again
    fault = (
        f"{record['run']} needs the model that it was started with, unchanged: --{flag} {name}, "
        f"{origin_id[:12]}"
    )
    with explained(fault, UsageError, kind=RunError):  # not the fault of the current command
        origin = open_model(folder, name, f"--{flag}")
        if origin.id != origin_id:  # a folder's files may have been replaced
            raise UsageError(f"it is {origin.id[:12]} now")
    return origin


# ---- Interrupts ---------------------------------------------------------------------------------


class Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP into an attribute that loops check: `received`.

    A second Ctrl+C exits at once, without saving. A repeated SIGTERM or SIGHUP does so only if more
    than half a second has passed since the first signal: `timeout` signals the process and then
    its group, which is a single request. Launchers repeat Ctrl+C in the same way.

    Python runs handlers only after `mx.eval` returns, so a thread reads the bytes that the
    interpreter writes to a wakeup pipe as soon as a signal arrives.
    """

    received = None  # the number of the first signal

    def __init__(self, launched=False):
        self.launched = launched

    def __enter__(self):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # a signal writes its number
        self.handlers = {}
        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Signals that the parent ignores (nohup, background jobs of scripts) stay ignored.
            if signal.getsignal(signal_number) != signal.SIG_IGN:
                self.handlers[signal_number] = signal.signal(signal_number, self.handle)
        threading.Thread(target=self.watch, args=[reader], daemon=True).start()
        return self

    def __exit__(self, *error):
        os.close(signal.set_wakeup_fd(-1))  # ends the thread
        for signal_number, handler in self.handlers.items():
            signal.signal(signal_number, handler)

    def handle(self, signal_number, frame):
        """Does nothing: the thread acts. Without a handler, Python would not write the byte."""

    def watch(self, reader):
        """Runs in the thread: the first signal sets `received`, a later one ends the process."""
        first = None  # when it arrived
        while byte := os.read(reader, 1):  # b"" once __exit__ has closed the other end
            number = byte[0]
            if first is None:
                first = time.monotonic()
                self.received = number
                again = "again " if number == signal.SIGINT else ""
                print(
                    "\nStopping after this step, then saving. "
                    f"Press Ctrl+C {again}to exit without saving.",
                    file=sys.stderr,
                )
                continue
            may_be_echo = self.launched or number != signal.SIGINT
            if not may_be_echo or time.monotonic() - first > 0.5:
                print("\nExited without saving.", file=sys.stderr)
                os._exit(128 + number)  # at once; sys.exit would end only this thread
        os.close(reader)


class Lasting:
    """An output stream that survives losing its reader (`| head`, a closed terminal)."""

    lost = None  # the OSError of a write that failed although there was a reader

    def __init__(self, stream):
        # None if it was closed from the start.
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")
        self.stream.reconfigure(errors="replace")
        self.is_terminal = self.stream.isatty()  # False once it is closed

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Never raises OSError: a line that cannot be written must not end the run."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            is_closed = error.errno == errno.EIO and self.is_terminal
            if is_closed or error.errno == errno.EPIPE:  # no reader; a full disk may recover
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            else:
                self.lost = error


# ---- Training -----------------------------------------------------------------------------------


class SingleProcess:
    """The processes (ranks) that train a run together: here, only one.

    Group in extras/ranks.py has the same methods for processes started by `mlx.launch`, plus
    `follow` for all but rank 0. All run the same `train`, each on a share of the rows; only rank 0
    saves and reports, and the output of the others is not shown.
    """

    rank = 0
    size = 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Does nothing: there is no other rank to tell that this one is done."""

    def broadcast_run(self, run):
        """Rank 0's run, on every rank."""
        return run

    def broadcast_scoring(self, model, dataset, flags):
        """Makes the other ranks score along with rank 0."""

    def rows(self, count):
        """The slice of `count` rows that this rank computes."""
        return slice(0, count)

    def average(self, tree):
        """The mean over all ranks of a tree of arrays."""
        return tree

    def sum(self, number, received):
        """The sum of a number over all ranks, and a signal that any of them has received."""
        return number, received

    def agree(self, received, timeout):
        """A signal that any rank has received, and whether rank 0's time is up."""
        return received, timeout


# The attributes of a Run that are saved in a checkpoint's record.
PROGRESS = [
    "iteration",
    "tokens",
    "seconds",
    "scores",
    "best",
    "recent_steps",
    "recent_loss",
    "recent_seconds",
]


@dataclasses.dataclass
class Run:
    """A training run: its model, its data and its progress."""

    name: str  # <dataset>-<6 hexadecimal digits>
    flags: argparse.Namespace
    dataset: Dataset
    model: LanguageModel
    optimizer: optim.Optimizer
    batches: Batches
    teacher: LanguageModel = None
    average: dict = None  # with --average: the averaged weights, a tree; None at first
    about: dict = None  # what the record contains besides progress, see make_run
    is_branch: bool = False  # started from an older checkpoint of another run

    checkpoint_id: str = None  # the last one saved
    saved_iteration: int = 0  # the iteration of that checkpoint
    iteration: int = 0  # steps done
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # of training, excluding the first step of each session
    scores: list = dataclasses.field(default_factory=list)  # [iteration, nats/token]
    best: dict = None  # "id", "iteration" and "nats" of the best score
    recent_steps: int = 0  # since the last report
    recent_loss: float = 0.0  # the sum of their losses
    recent_seconds: float = 0.0  # the time they took

    def record(self):
        """What a checkpoint's metadata says about the run, serializable as JSON."""
        progress = {name: getattr(self, name) for name in PROGRESS}
        return self.about | {"id": self.checkpoint_id} | progress | self.batches.state()

    def restore(self, folder, record):
        """Restores the state that was saved in the checkpoint of `record`."""
        holds_all = not self.flags.lora_rank  # else only the adapters
        weights, metadata = files_of(folder, record)
        self.model.load_weights(list(load_arrays(weights).items()), strict=holds_all)
        state = tree_unflatten(load_arrays(metadata))
        if "weights" in state:  # the trained ones; the .safetensors has their average
            if self.flags.average:
                self.average = self.model.trainable_parameters()
            self.model.update(state["weights"])
        states = state["optimizer"]["states"]
        if len(states) == 2:  # older checkpoints have a single group of matrices, with AdamW
            states = [*split_group(states[0]), states[1]]
        self.optimizer.state = {"states": states}
        self.batches.restore(record, state["perm"])
        mx.eval(self.model.parameters(), self.optimizer.state)
        close_files(record)
        self.checkpoint_id = record["id"]
        self.saved_iteration = record["iteration"]
        for name in PROGRESS:
            if name in record:  # older checkpoints lack the last ones
                setattr(self, name, record[name])

    def result(self):
        """The weights to save, score and sample from, a tree: the average if there is one.

        For a LoRA run, these are only the adapters.
        """
        return self.average or self.model.trainable_parameters()

    @contextlib.contextmanager
    def with_result(self):
        """Puts `result` into the model, and restores the trained weights afterwards."""
        weights = self.model.trainable_parameters()
        self.model.update(self.result())
        try:
            yield self.model
        finally:
            self.model.update(weights)

    def is_scored(self):
        """Whether the current iteration has a score, perhaps from before a resume."""
        return self.iteration in [iteration for iteration, _ in self.scores]

    def add_score(self, nats):
        """Records the score of the current iteration: validation loss in nats/token."""
        self.scores.append([self.iteration, nats])
        if self.best is None or nats < self.best["nats"]:
            self.best = {"id": self.checkpoint_id, "iteration": self.iteration, "nats": nats}

    def count_misses(self):
        """The number of scheduled evaluations since the best one.

        One at the end of an earlier `num_iters` does not count: otherwise --patience would stop an
        extended run at a different iteration than a run that had its length from the start.
        """
        steps = self.flags.steps_per_eval
        scores = [nats for iteration, nats in self.scores if iteration % steps == 0]
        if not scores:
            return 0
        return len(scores) - 1 - scores.index(min(scores))


def use_device(gpu):
    """Makes the GPU or the CPU the default device; call it before anything is computed."""
    mx.set_default_device(mx.gpu if gpu else mx.cpu)
    if fast and not gpu:
        fast.use_cpu()


def make_step(model, optimizer, flags, ranks=None, teacher=None):
    """A function that takes one training step: step(tokens, targets, *noise) -> loss, norm.

    tokens, targets: [N, L]; noise: see make_noise; loss: the mean in nats; norm: the gradient norm
    before clipping. The N = batch_size * grad_accumulation rows are processed batch_size at a time,
    divided among ranks and streams. With bfloat16, a GPU casts all weights but the embeddings to
    it, while a CPU only rounds the inputs of matrix products; the weights that are updated, the
    optimizer state and the loss are float32.
    """
    ranks = ranks or SingleProcess()
    model.model.grad_checkpoint = flags.checkpoint
    dtype = mx.float32
    if flags.dtype == "bfloat16" and mx.default_device() == mx.gpu:
        dtype = mx.bfloat16
    if teacher is not None:
        distilled_cross_entropy = extra("distil").make_loss(teacher, flags)

    def cast(name, parameter):
        # Embeddings stay in float32: a bfloat16 sum would lose the many small gradients of a
        # frequent token.
        return parameter if "embed_tokens" in name else parameter.astype(dtype)

    def loss(parameters, scale, tokens, targets, *noise):
        # Gradients are taken with respect to the first argument, so the model has to use it.
        model.update(parameters)
        model.update(tree_map_with_path(cast, model.parameters()))  # LoRA's base, too
        hidden = model.model(tokens, noise=noise)  # [B, L, D]
        if teacher is not None:
            return distilled_cross_entropy(hidden, model.head, targets, scale, tokens)
        return cross_entropy(hidden, model.head, targets, scale)

    # Compiled once for its shapes, then replayed. Arrays that are not arguments must be listed in
    # `inputs`, or their values from the first call would be constants of the graph; those that
    # change must be listed in `outputs`, or the change would be lost.
    @partial(mx.compile, inputs=[model.state])
    def loss_and_gradients(scale, *rows):
        weights = model.parameters()
        parameters = model.trainable_parameters()  # with LoRA, only the adapters
        result = mx.value_and_grad(loss)(parameters, scale, *rows)
        model.update(weights)  # `loss` has left its tracers in the model
        return result

    # Trees of arrays that each step reads and replaces. Run.restore substitutes other trees, so it
    # has to be called before this.
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def apply_gradients(results):
        loss, gradients = ranks.average(add_up(results))  # ranks exchange gradients only here
        gradients, norm = clip_grad_norm(gradients, flags.grad_clip or math.inf)
        optimizer.update(model, gradients)
        return loss, norm

    def step(tokens, targets, *noise):
        use_bfloat16(flags.dtype == "bfloat16")
        # Turns sums over positions into means; `average` divides by the number of ranks.
        scale = ranks.size / targets.size
        rank_rows = ranks.rows(flags.batch_size)
        total = None
        for start in range(0, len(tokens), flags.batch_size):
            batch_rows = slice(start, start + flags.batch_size)
            rows = [array[batch_rows][rank_rows] for array in (tokens, targets, *noise)]
            results = over_streams(partial(loss_and_gradients, scale), *rows)
            total = tree_map(mx.add, total, results) if total else results
            if len(tokens) > flags.batch_size:  # or all parts would be in memory at once
                mx.eval(total)
        loss, norm = apply_gradients(total)
        # The code above only builds a graph; it is computed here. Arrays not listed would be left
        # for the next step's graph.
        mx.eval(loss, norm, model.state, optimizer.state)
        use_bfloat16(False)  # scores and samples are computed in float32
        return loss, norm

    return step


def train(run, interrupts, ranks):
    """Trains a run from its current iteration to `num_iters` or an earlier end.

    Returns the exit status: 0, or 128 + the signal that ended it. Raises RunError if the run
    diverges.
    """
    flags, dataset, folder = run.flags, run.dataset, run.flags.save_dir
    is_main = ranks.rank == 0  # the one that saves and reports
    step = make_step(run.model, run.optimizer, flags, ranks, run.teacher)
    reporter = Reporter(run) if is_main else None
    steps_per_save = flags.steps_per_save or flags.steps_per_eval
    start = run.iteration
    end_time = math.inf  # in seconds of training
    if flags.max_minutes is not None:
        end_time = run.seconds + 60 * flags.max_minutes
    received = None  # a signal
    # A run that needs other checkpoints is saved at once: its record keeps them from being pruned.
    if is_main and not run.checkpoint_id:
        uses = run.about["uses"].values()
        if any(name == origin_id for name, origin_id in uses):  # else they name folders
            save_checkpoint(folder, run, interrupts)

    # iteration: steps done. The last pass of the loop only saves and evaluates.
    for iteration in range(start, flags.num_iters + 1):
        run.iteration = iteration
        finished = iteration == flags.num_iters
        received, timeout = ranks.agree(interrupts.received, run.seconds >= end_time)
        on_schedule = iteration % flags.steps_per_eval == 0
        # Whether an evaluation is due; a run of fewer than `steps_per_eval` steps gets none.
        due = iteration >= flags.steps_per_eval and (on_schedule or finished)
        stopping = finished or received or timeout
        save = iteration > start and (due or stopping or iteration % steps_per_save == 0)

        # Save, then evaluate, then add the score, then sample: an error in one does not undo those
        # before it. A run killed between saving and evaluating is evaluated on resume.
        if save and is_main:
            save_checkpoint(folder, run, interrupts)
            run.saved_iteration = iteration
            tqdm.write(f"saved {run.checkpoint_id} at iteration {iteration:,}")
        nats = None
        if (due or timeout) and not run.is_scored():
            limit = flags.eval_tokens
            with run.with_result() as model:
                nats = score_split("valid", model, dataset, flags, interrupts, ranks, limit)
        if nats is not None and not math.isfinite(nats):
            raise divergence_error(run, f"score of iteration {iteration:,}", ranks)
        # A score due to --max_minutes is only shown, and logged until the run is resumed: one
        # without a break would not have it.
        if nats is not None and due:
            run.add_score(nats)
        if nats is not None and is_main:
            reporter.report_score(run, nats)
            # The checkpoint that a branch started from belongs to another run.
            if due and (save or not run.is_branch):
                save_score(folder, run, interrupts)
        if save and is_main and not interrupts.received:
            with run.with_result() as model:
                sample = Conversation(dataset.tokenizer, model)
                tqdm.write("".join(sample.reply("", flags, flags.seed, interrupts)))

        if timeout:
            tqdm.write(f"--max_minutes {flags.max_minutes:g} reached at iteration {iteration:,}.")
        if flags.patience and run.count_misses() >= flags.patience:
            stopping = True
            tqdm.write(
                f"Stopped: no improvement in {run.count_misses()} evaluations (--patience); "
                f"best: {run.best['id']}"
            )
        # Nothing is unsaved here, so a signal that arrived in the meantime costs no other step.
        if save or iteration == start:
            received, _ = ranks.agree(interrupts.received, timeout)
        if stopping or received:
            break

        # A training step.
        began = time.perf_counter()
        tokens, targets = run.batches.next()
        rate = learning_rate_at(iteration, flags)
        set_learning_rate(run.optimizer, rate)  # an array in its state: no recompilation
        noise = make_noise(iteration, len(tokens), flags)
        loss, norm = step(tokens, targets, *noise)
        if flags.average:
            weights = run.model.trainable_parameters()
            run.average = average_weights(run.average, weights, iteration, flags.average)
        loss = loss.item()
        norm = norm.item()
        elapsed = time.perf_counter() - began
        if not math.isfinite(loss + norm):
            raise divergence_error(run, f"loss or gradient of iteration {iteration + 1:,}", ranks)
        # Older checkpoints are deleted only once a step from the newest one has succeeded.
        if is_main and run.saved_iteration == iteration:
            prune(folder, run, flags.keep)
        run.tokens += tokens.size
        if iteration > start:  # the first step compiles
            run.seconds += elapsed
        run.recent_steps += 1
        run.recent_loss += loss
        run.recent_seconds += elapsed

        if is_main and (iteration + 1) % flags.steps_per_report == 0:
            metrics = {
                "loss": run.recent_loss / run.recent_steps,  # nats/token
                "learning_rate": rate,  # this and the norm are from the last step
                "gradient_norm": norm,
                "tokens": run.tokens,
                "tokens_per_second": run.recent_steps * tokens.size / run.recent_seconds,
                "peak_mib": mx.get_peak_memory() / 2**20,
                "seconds": run.seconds,
            }
            # With --train_tokens, num_bytes is still that of the whole text; with --teacher, the
            # loss is not that of the text alone.
            if not flags.train_tokens and run.teacher is None:
                metrics["bits_per_byte"] = bits_per_byte(metrics["loss"], dataset.train)
            reporter.report_steps(iteration + 1, metrics)
            run.recent_steps = 0
            run.recent_loss = 0.0
            run.recent_seconds = 0.0
        if is_main:
            reporter.bar.update()

    if is_main:
        reporter.bar.close()
        # No step was taken from the last checkpoint: unless it has a score, keep the one before.
        prune(folder, run, flags.keep if run.is_scored() else max(2, flags.keep))
    if flags.eval_test and not received:
        with run.with_result() as model:
            score_split("test", model, dataset, flags, interrupts, ranks)
    received, _ = ranks.agree(interrupts.received, False)
    if received:
        there = "nothing was saved yet"
        if run.checkpoint_id:
            there = f"--identifier {run.name} resumes from there"
        tqdm.write(f"Stopped at iteration {run.iteration:,}; {there}.")
        return 128 + received  # how shells report termination by a signal
    return 0


def divergence_error(run, what, ranks):
    """The RunError to raise in a run in which `what` is not finite.

    Training reached `run.iteration`; a checkpoint of that iteration is marked as diverged.
    """
    # A lost rank causes NaNs, too; this call then raises its own error.
    ranks.agree(None, False)
    where = "no good checkpoint is left: start over (--new_model)"
    if ranks.rank == 0:
        if run.saved_iteration == run.iteration:
            mark_diverged(run.flags.save_dir, run)
        sound = newest_sound_id(run.flags.save_dir, run)
        if sound:
            where = f"the last good checkpoint is {sound}: resume"
    return RunError(
        f"the {what} is not finite; {where} "
        "with a lower --learning_rate, --grad_clip or --weight_decay"
    )


# Columns of <run>.csv, empty where a row has no such value; other metrics follow them. loss:
# nats/token, with --teacher mixed with the distillation loss; tokens: trained on so far; peak_mib:
# MLX's peak memory in this process; seconds: of training so far, excluding the first step of each
# session, which compiles.
LOG_COLUMNS = [
    "iteration",
    "split",
    "loss",
    "bits_per_byte",
    "learning_rate",
    "gradient_norm",
    "tokens",
    "tokens_per_second",
    "peak_mib",
    "seconds",
]

# How metrics are shown on the screen: "" hides one; those not listed here are shown by name.
FORMATS = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "gradient_norm": "grad {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_mib": "peak {:,.0f} MiB",
    "bits_per_byte": "",
    "tokens": "",
    "seconds": "",
}


class Reporter:
    """Reports a run's metrics: in a progress bar or lines on the screen, and in <run>.csv."""

    def __init__(self, run):
        self.num_iters = run.flags.num_iters
        self.distills = run.teacher is not None
        self.step_tokens = run.batches.batch_size * run.flags.context_size
        is_terminal = sys.stderr.isatty()
        size = {"dynamic_ncols": True}
        if is_terminal and not os.get_terminal_size(sys.stderr.fileno()).columns:
            size = {"ncols": 100, "nrows": 24}  # unknown, as in some containers
        self.bar = tqdm(
            total=self.num_iters,
            initial=run.iteration,
            disable=not is_terminal,
            bar_format="{n_fmt}/{total_fmt} |{bar}| left {remaining}  {desc}",
            **size,
        )
        path = run.flags.save_dir / f"{run.name}.csv"
        self.table = LogTable(path, run.iteration, run.is_scored())

    def report_steps(self, iteration, metrics):
        """Shows and logs the metrics of the steps up to `iteration`, {name: number}."""
        shown = []
        for name, value in metrics.items():
            form = FORMATS.get(name, name + " {:.4g}")
            if name == "peak_mib" and not self.bar.disable:
                continue  # so that the bar fits 100 columns
            if form:
                shown.append(form.format(value))
            if name == "loss" and not self.distills:
                shown.append(f"perplexity {perplexity(value):.2f}")
        line = "  ".join(shown)
        self.bar.set_description_str(line)
        if self.bar.disable:
            tokens_left = (self.num_iters - iteration) * self.step_tokens
            left = tqdm.format_interval(tokens_left / metrics["tokens_per_second"])
            tqdm.write(f"{iteration:,}/{self.num_iters:,}  {line}  left {left}")
        self.log({"iteration": iteration, "split": "train"} | metrics)

    def report_score(self, run, nats):
        """Logs the score of the validation split; score_split has already shown it."""
        row = {
            "iteration": run.iteration,
            "split": "valid",
            "loss": nats,
            "bits_per_byte": bits_per_byte(nats, run.dataset.valid),
            "tokens": run.tokens,
            "seconds": run.seconds,
        }
        self.log(row)

    def log(self, row):
        """Logs metrics, {name: value}; all of them pass through here, so add other loggers here."""
        self.table.append(row)


def read_log(path):
    """The rows of a run's log, [{column: text}, ...], without truncated or damaged ones.

    The csv module is not used: after a stray quote, it would read all that follows as one row.
    Raises OSError.
    """
    rows = []
    header, *lines = path.read_text("utf-8", errors="replace").split("\n")
    columns = header.strip().split(",")
    for line in lines[:-1]:  # what follows the last line end is truncated
        values = line.split(",")
        row = dict(zip(columns, values))
        place = f"{row.get('iteration')},{row.get('split')}"
        if len(values) == len(columns) and re.fullmatch("[0-9]{1,18},[a-z]+", place):
            rows.append(row)
    return rows


class LogTable:
    """A run's CSV file.

    Rows after the current `iteration` are dropped, since those steps will be repeated; so is a
    score of `iteration` itself unless the run has it (`scored`). Read and write errors are ignored:
    the run is worth more than its log.
    """

    def __init__(self, path, iteration, scored):
        self.path = path
        self.columns = list(LOG_COLUMNS)
        with contextlib.suppress(OSError):
            rows = []
            for row in self.read():
                is_earlier = int(row["iteration"]) < iteration
                is_present = int(row["iteration"]) == iteration
                if is_earlier or (is_present and (scored or row["split"] == "train")):
                    rows.append(row)
            columns = list(LOG_COLUMNS)
            if rows:  # a column that was added by `append` stays
                columns += [name for name in rows[0] if name not in LOG_COLUMNS]
            self.rewrite(rows, columns)

    def read(self):
        return read_log(self.path) if self.path.exists() else []

    def rewrite(self, rows, columns):
        """Replaces the file; a kill leaves either the old or the new one, complete.

        Raises OSError; the old file then stays, and so do its columns.
        """
        new = self.path.with_suffix(".csv.new")
        # The lock keeps other processes from deleting the new file as a leftover.
        with locked(self.path.parent):
            with new.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            new.replace(self.path)
        self.columns = columns

    def append(self, row):
        """Adds a row, {column: value}; a new column is added to all rows."""
        texts = {}
        for name, value in row.items():
            texts[name] = f"{value:.6g}" if isinstance(value, float) else value
        added = [name for name in row if name not in self.columns]
        with contextlib.suppress(OSError):
            if added or not self.path.exists():
                self.rewrite(self.read(), self.columns + added)
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(texts)


def print_start(run, checkpoint, ranks):
    """Prints the start screen: what is trained, on what data, and where its files go.

    checkpoint: the record of the checkpoint being resumed, or None.
    """
    flags, config, dataset = run.flags, run.model.config, run.dataset
    tokenizer = dataset.tokenizer
    versions = run.about["versions"]
    splits = [split for split in (dataset.train, dataset.valid, dataset.test) if split]
    lengths = " / ".join(f"{len(split.tokens):,}" for split in splits)
    windows = len(run.batches.perm)  # of this epoch
    rows = run.batches.batch_size  # of a step
    saved_arrays = arrays_of([run.model.trainable_parameters(), run.optimizer.state])
    if flags.average:
        saved_arrays += arrays_of(run.model.trainable_parameters())
    size = sum(array.nbytes for array in saved_arrays)  # bytes of a checkpoint
    free = shutil.disk_usage(flags.save_dir).free
    parameters = run.about["parameters"]
    trained = sum(array.size for array in arrays_of(run.model.trainable_parameters()))
    of_them = f", {trained:,} trainable" if trained < parameters else ""
    several = f", {ranks.size} ranks" if ranks.size > 1 else ""
    resumed = ""
    if checkpoint:
        resumed = describe_resume(checkpoint["flags"], vars(flags))
    tqdm.write(
        f"run      {run.name}, from iteration {run.iteration:,} to {flags.num_iters:,}, "
        f"seed {flags.seed}\n"
        f"{resumed}"
        f"model    {parameters:,} parameters{of_them}: {config.num_blocks} blocks, "
        f"dim {config.dim}, {config.num_heads} heads ({config.num_kv_heads} key/value heads), "
        f"{config.mlp} {config.mlp_dim}, context {config.context_size}\n"
        f"data     {dataset.name}: {lengths} tokens; "
        f"vocabulary {tokenizer.vocab_size:,} by {tokenizer.kind} "
        f"({tokenizer.vocab_size - tokenizer.num_special:,} without special tokens)\n"
        f"steps    {rows} x {config.context_size} tokens, {windows // rows or 1:,} per epoch; "
        f"{flags.optimizer}\n"
        f"machine  {versions['device']}{several}; MLX {versions['MLX']}, "
        f"matrix products by {BLAS}\n"
        f"files    {flags.save_dir.absolute()}, {size / 2**20:,.0f} MiB per checkpoint, "
        f"{free / 2**20:,.0f} MiB free"
    )
    if flags.batch_size % ranks.size:
        tqdm.write(
            f"--batch_size {flags.batch_size} is not a multiple of {ranks.size} ranks: "
            "some will wait."
        )
    if windows < rows:
        tqdm.write(
            "The text has fewer windows than a batch has rows: some repeat within each batch."
        )
    if flags.dtype != versions["dtype"]:
        tqdm.write(
            "--dtype bfloat16 would be slower here: it needs AVX-512 BF16 or AMX, extras/fast.py "
            "and oneDNN (pip install onednn-cpu-gomp). Computing in float32."
        )
    saved = [record for record in list_checkpoints(flags.save_dir) if record["run"] == run.name]
    missing = max(1, flags.keep + 2 - len(saved))  # the best and the one being written, too
    if size * missing > free:
        tqdm.write(
            f"Low on disk space: the newest {flags.keep} checkpoints (--keep), the best and the "
            f"one being written need another {size * missing / 2**20:,.0f} MiB."
        )
    if run.is_branch:
        tqdm.write(
            f"A new branch: {checkpoint['run']} has newer checkpoints, which are kept. To resume "
            f"this run, name it: --identifier {run.name}."
        )
    if fast and BLAS == fast.REFERENCE_BLAS and not flags.gpu:
        tqdm.write(
            "Matrix products are slow: a fast library for them needs a C compiler "
            "(apt install g++) and oneDNN (pip install onednn-cpu-gomp) or NumPy from PyPI."
        )
    if checkpoint:
        changed = []
        for name, version in versions.items():
            before = checkpoint["versions"].get(name, version)  # older checkpoints lack some
            if before != version:
                changed.append(f"{name} {before} -> {version}")
        if changed:
            tqdm.write(
                f"Environment changed since the checkpoint ({'; '.join(changed)}): "
                "resume may not be bit-exact."
            )


def describe_resume(old, new):
    """The flags, {name: value}, that have changed in a resumed run, for the start screen."""
    changes = []
    for name in INHERITED:
        if old[name] != new[name]:
            changes.append(f"--{name} {old[name]} -> {new[name]}")
    if not changes:
        return "resumed  with unchanged flags\n"
    text = f"resumed  with {', '.join(changes)} (to start over instead: --new_model)\n"
    has_schedule = new["lr_schedule"] != "constant" or new["dropout_final"] is not None
    if old["num_iters"] != new["num_iters"] and has_schedule:
        text += "         The learning rate and dropout schedules now stretch to --num_iters.\n"
    return text


def arrays_of(tree):
    """The arrays of a tree of arrays, without their names."""
    return [array for _, array in tree_flatten(tree)]


# ---- Sampling -----------------------------------------------------------------------------------
# First functions of logits [B, V], then token-by-token decoding.


def penalize(logits, texts, penalty):
    """Applies the repetition penalty (Keskar et al. 2019) to the ids in each row's text.

    It divides logits above 0 and multiplies the others. 1 changes nothing.
    """
    if penalty == 1:
        return logits
    seen = np.zeros(logits.shape, bool)  # [B, V]
    for row, text in enumerate(texts):
        seen[row, text] = True
    penalized = mx.where(logits > 0, logits / penalty, logits * penalty)
    return mx.where(mx.array(seen), penalized, logits)


def keep_top_k(logits, k):
    """Logits with all but the `k` largest set to -inf; ties with the k-th stay. 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    largest = mx.topk(logits, k, axis=-1)  # [B, k], unordered
    least = largest.min(axis=-1, keepdims=True)  # [B, 1]
    return mx.where(logits < least, -math.inf, logits)


def keep_top_p(logits, p):
    """Nucleus sampling (Holtzman et al. 2020): logits with all but the most likely set to -inf.

    Keeps the fewest whose total probability reaches `p`, and at least one.
    """
    if p >= 1:
        return logits
    ascending = mx.sort(logits, axis=-1)
    larger = 1 - mx.cumsum(mx.softmax(ascending, axis=-1), axis=-1)  # probability of larger logits
    least = mx.where(larger < p, ascending, math.inf).min(axis=-1, keepdims=True)  # [B, 1]
    least = mx.minimum(least, ascending[..., -1:])  # p = 0 keeps the largest
    return mx.where(logits < least, -math.inf, logits)


def keep_min_p(logits, p):
    """Min-p sampling (Nguyen et al. 2024): logits with the least likely set to -inf.

    Removes those less than `p` times as probable as the most likely one. 0 keeps all.
    """
    if p == 0:
        return logits
    least = logits.max(axis=-1, keepdims=True) + math.log(p)  # [B, 1]
    return mx.where(logits < least, -math.inf, logits)


def shape_logits(logits, flags, texts):
    """Logits [B, V] to sample from; texts: each row's ids in the model's window.

    Applies the repetition penalty, temperature, top-k, top-p and min-p, in this order, as in
    Hugging Face's transformers. Temperature 0 keeps only the largest.
    """
    logits = penalize(logits.astype(mx.float32), texts, flags.repetition_penalty)
    if flags.temperature < 1e-6:  # 0, or close to it
        ids = mx.arange(logits.shape[-1])
        return mx.where(ids == logits.argmax(axis=-1, keepdims=True), 0, -math.inf)
    logits = keep_top_k(logits / flags.temperature, flags.top_k)
    logits = keep_top_p(logits, flags.top_p)
    return keep_min_p(logits, flags.min_p)


class Decoder:
    """A model that continues a text, a list of at least one id; callers may append to it, too.

    The keys and values of what it has read are cached. When the text outgrows the context, its
    last context_size // 2 tokens are read again: logits are always those of a fresh pass over the
    window of the text that starts at `start`.
    """

    def __init__(self, model, text):
        self.model = model
        self.text = text
        self.begin_window(0)

    def begin_window(self, start):
        """Forgets what was read; the next pass reads the text from index `start`."""
        self.start = start
        self.caches = [Cache(self.model.config) for _ in self.model.model.layers]

    def forget(self):
        """Forgets what was read, for use after an interrupted pass."""
        self.begin_window(self.start)

    def logits(self):
        """Logits [1, V] of the token that follows the text."""
        context_size = self.model.config.context_size
        if len(self.text) - self.start > context_size:
            self.begin_window(len(self.text) - max(1, context_size // 2))
        unread = self.text[self.start + self.caches[0].offset :]
        return self.model(mx.array([unread]), self.caches, last=1).squeeze(1)

    def generate(self, max_tokens, flags, seed):
        """Samples `max_tokens` ids, appends each to the text and yields it.

        The random numbers depend only on the seed and the position in the text.
        """
        for _ in range(max_tokens):
            logits = self.logits()
            logits = shape_logits(logits, flags, [self.text[self.start :]])
            key = mx.array([seed, len(self.text)], mx.uint32)
            # [V], not [1, V], which would not draw the same as a row of a batch (extras/decode.py).
            token = mx.random.categorical(logits[0], key=key).item()
            self.text.append(token)
            yield token

    def describe_draft(self):
        """Statistics of the draft model; here there is none, see extras/decode.py."""
        return ""


def pieces_before(stop, pieces):
    """The pieces of a text up to `stop`; holds back what may be the start of `stop`."""
    held = ""
    with contextlib.closing(pieces):
        for piece in pieces:
            held += piece
            before, found, _ = held.partition(stop)
            if found:
                yield before
                return
            possible = [n for n in range(1, len(stop)) if held.endswith(stop[:n])]
            sure = len(held) - max(possible, default=0)
            yield held[:sure]
            held = held[sure:]
    yield held


def first_ids(tokenizer, prompt):
    """The ids of a prompt; for "", the end token or, if there is none, a newline."""
    ids = tokenizer.encode(prompt).tolist()
    if ids:
        return ids
    if tokenizer.eos is not None:
        return [tokenizer.eos]
    return tokenizer.encode("\n").tolist() or [0]  # some tokenizers ignore newlines


class Detokenizer:
    """Turns token ids that follow one another into pieces of text that no later one can change.

    ids: those of the text before them, which is not part of the pieces.
    """

    def __init__(self, tokenizer, ids):
        self.tokenizer = tokenizer
        self.ids = list(ids)
        self.shown = len(tokenizer.decode(self.ids))  # characters of their text that are out

    def add(self, token):
        """The text that `token` completes; "" inside a character."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd"):  # perhaps the first bytes of a character
            return ""
        piece = text[self.shown :]
        self.ids = [token]  # all that the next token's text can depend on
        self.shown = len(self.tokenizer.decode(self.ids))
        return piece

    def rest(self):
        """What there is of a character that was never completed."""
        return self.tokenizer.decode(self.ids)[self.shown :]


class Conversation:
    """A growing text of a user's prompts and a model's continuations."""

    def __init__(self, tokenizer, model, draft=None):
        self.tokenizer = tokenizer
        self.text = []  # ids
        self.speed = 0.0  # tokens per second of the last reply
        if draft is not None:
            self.decoder = extra("decode").SpeculativeDecoder(model, draft, self.text)
        else:
            self.decoder = Decoder(model, self.text)

    def reply(self, prompt, flags, seed, interrupts=None):
        """Adds `prompt` to the text, and yields the model's continuation in pieces.

        But at the start, the prompt begins a new line. A piece is yielded once no later token can
        change it. The last one ends before --stop.
        """
        pieces = self.pieces(prompt, flags, seed, interrupts)
        return pieces_before(flags.stop, pieces) if flags.stop else pieces

    def pieces(self, prompt, flags, seed, interrupts):
        """Like `reply`, but without --stop."""
        tokenizer = self.tokenizer
        if self.text:
            self.text.extend(tokenizer.encode("\n" + prompt).tolist())  # shared with the decoder
        else:
            self.text.extend(first_ids(tokenizer, prompt))
        detokenizer = Detokenizer(tokenizer, self.text)
        times = []  # when each token arrived
        try:
            for token in self.decoder.generate(flags.max_tokens, flags, seed):
                times.append(time.perf_counter())
                yield detokenizer.add(token)
                if interrupts and interrupts.received:
                    return
            yield detokenizer.rest()
        finally:
            if times:  # excluding the time for the prompt
                self.speed = (len(times) - 1) / (time.perf_counter() - times[0])

    def describe_speed(self):
        """Tokens per second of the last reply, and how often a draft was accepted."""
        return f"{self.speed:,.1f} tokens/s{self.decoder.describe_draft()}"


# ---- Prompts ------------------------------------------------------------------------------------

SETTABLE = [
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_tokens",
    "stop",
    "seed",
]
COMMANDS = """/set NAME VALUE   change a sampling flag: /set temperature 0.8
/reset            forget the conversation
/stats            turn tokens/s after each reply on or off
/quit             exit, as Ctrl+D does; Ctrl+C stops a reply"""


def sample_from(folder, checkpoint, flags):
    """Runs --inference, --prompt or --prompts_file with this checkpoint, and that of --draft.

    The model's text goes to stdout, messages about it to stderr. Raises UsageError.
    """
    model, tokenizer = load_model(folder, checkpoint)
    if flags.quantize:
        extra("quantize").quantize(model, flags.quantize, packed=flags.gpu)
    draft = None
    if flags.draft:
        origin = open_model(folder, flags.draft, "--draft")
        draft = origin.model
        same_tokenizer = origin.tokenizer.to_dict() == tokenizer.to_dict()
        same_rows = draft.config.vocab_size == model.config.vocab_size  # one may be padded
        if not (same_tokenizer and same_rows):  # ids must mean the same text
            raise UsageError(
                f"--draft {flags.draft} has a different tokenizer than {checkpoint['id'][:12]}: "
                "use one trained with the same tokenizer"
            )
    if flags.inference:
        print(describe(checkpoint), file=sys.stderr)
        converse(tokenizer, model, draft, flags)
        return
    if flags.attention:
        extra("pictures").plot_attention(model, tokenizer, flags.prompt, flags.attention)
    elif flags.prompts_file:
        extra("decode").answer_file(model, tokenizer, checkpoint["id"], flags)
    else:
        print_samples(tokenizer, model, draft, flags)
    print(describe(checkpoint), file=sys.stderr)


def print_samples(tokenizer, model, draft, flags):
    """Prints continuations of --prompt on stdout, a line between them; sample i uses seed + i."""
    name_unknown(tokenizer, flags.prompt)
    for i in range(flags.num_samples):
        if i > 0:
            print("-" * 15)  # as nanoGPT does
        conversation = Conversation(tokenizer, model, draft)  # a fresh one for each sample
        for piece in conversation.reply(flags.prompt, flags, flags.seed + i):
            print(piece, end="", flush=True)
        print(flush=True)
    print(conversation.describe_speed(), file=sys.stderr)  # of the last sample


def name_unknown(tokenizer, prompt):
    """Prints the parts of a prompt that the model reads as <unk>."""
    unknown = tokenizer.unknown(prompt)
    if unknown:
        print(f"Not in the vocabulary, read as <unk>: {' '.join(unknown)}", file=sys.stderr)


def converse(tokenizer, model, draft, flags):
    """Answers each line of stdin with a continuation of the conversation so far.

    Lines that begin with / are COMMANDS. Ctrl+C ends a reply; at the prompt it ends the session,
    as Ctrl+D does.
    """
    # Compiles MLX's kernels now: Ctrl+C in a terminal would also kill the compiler, and from here
    # on it is to end only a reply.
    any_id = 0
    for each in (model, draft):
        if each is not None:
            mx.eval(Decoder(each, [any_id]).logits())
    # From here on, Ctrl+C raises KeyboardInterrupt, which the top of this file had prevented.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.reconfigure(errors="surrogateescape")  # invalid UTF-8 is not an error
    question = ""  # for a pipe
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives input() line editing and history)

        question = "> "
    shows_speed = False
    conversation = Conversation(tokenizer, model, draft)
    try:
        while True:
            line = input(question)
            command = line.split() if line.startswith("/") else []
            if command == ["/quit"]:
                break
            elif command == ["/reset"]:
                conversation = Conversation(tokenizer, model, draft)
            elif command == ["/stats"]:
                shows_speed = not shows_speed
            elif len(command) == 3 and command[0] == "/set" and command[1] in SETTABLE:
                set_flag(flags, command[1], command[2])
            elif command:
                print(COMMANDS, file=sys.stderr)
            else:
                print_reply(conversation, line, flags)
                if shows_speed:
                    print(conversation.describe_speed(), file=sys.stderr)
    except (EOFError, KeyboardInterrupt):  # Ctrl+D or end of the pipe; Ctrl+C at the prompt
        if question:
            print()  # puts the shell's prompt on its own line


def set_flag(flags, name, value):
    """Sets a flag to a value, checked as on the command line."""
    try:
        vars(flags).update(parse([f"--{name}={value}"]))
    except UsageError as error:
        print(error, file=sys.stderr)


def print_reply(conversation, line, flags):
    """Prints the continuation of a line; Ctrl+C ends it and keeps what was shown."""
    name_unknown(conversation.tokenizer, line)
    try:
        for piece in conversation.reply(line, flags, flags.seed):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        conversation.decoder.forget()  # it may have been in the middle of a pass
    print(flush=True)


# ---- Flags --------------------------------------------------------------------------------------

COUNT = number(int, 0, LARGEST)
RATE = number(float, 0)
SHARE = number(float, 0, 1)
DROPOUT = number(float, 0, 0.9)
BETA = number(float, 0, 0.99999)  # 1 would divide by zero

PRESETS = {
    "tiny": {"dim": 128, "num_heads": 4, "num_blocks": 4, "context_size": 128},
    "small": {"dim": 256, "num_heads": 8, "num_blocks": 6, "context_size": 256},
    "medium": {"dim": 512, "num_heads": 8, "num_blocks": 12, "context_size": 512},
    "large": {"dim": 768, "num_heads": 12, "num_blocks": 24, "context_size": 1024},
    "gpt2": {"dim": 768, "num_heads": 12, "num_blocks": 12, "context_size": 1024},
    # Smaller than its name: 152M with GPT-2's vocabulary.
    "350m": {"dim": 768, "num_heads": 12, "num_blocks": 16, "context_size": 2048},
}


# {group: {flag: row}}, one statement per group. Every default is set in such a row; where a
# default of None depends on other flags, the help says how. --help and --config files have the
# same groups.
FLAGS = {}

FLAGS["run"] = DATA_FLAGS | {
    "identifier": flag(
        None,
        "checkpoint to resume or sample: SHA1 prefix, run name, latest or best; --plot and --cases "
        "take several, and patterns of run names",
        nargs="+",
        metavar="ID",
    ),
    "new_model": flag(False, "start a new run even if one could be resumed"),
    "num_iters": flag(100000, "total number of training steps", type=SIZE),
    "max_minutes": flag(None, "stop after this much training time in this session", type=RATE),
    "config": flag(
        None,
        "YAML file of flags; the command line overrides it",
        metavar="FILE",
    ),
    "preset": choice(
        None, PRESETS, "standard sizes: sets dim, num_heads, num_blocks and context_size"
    ),
    "gpu": flag(False, "run on the GPU instead of the CPU"),
    "seed": flag(42, "random seed of weights, batches, dropout and samples", type=COUNT),
}

FLAGS["model"] = {
    "context_size": flag(48, "context length in tokens", type=SIZE),
    "num_blocks": flag(4, "number of transformer blocks", type=number(int, 1, 2**12)),
    "dim": flag(1024, "model dimension", type=number(int, 1, 2**16)),
    "num_heads": flag(8, "number of query heads", type=SIZE),
    "num_kv_heads": flag(None, "number of key/value heads (default: num_heads)", type=SIZE),
    "mlp": choice("relu2", MLPS, "activation of the feed-forward layers"),
    "mlp_dim": flag(
        None,
        "width of the feed-forward layers (default: 4 dim; swiglu: 8/3 dim, rounded up to a "
        "multiple of 64)",
        type=number(int, 1, 2**18),
    ),
    "qk_norm": flag(False, "RMS-normalize queries and keys"),
    "untie": flag(False, "separate output matrix instead of tied embeddings"),
    "dropout": flag(0.0, "dropout rate of embeddings and residual branches", type=DROPOUT),
}

FLAGS["training"] = {
    "batch_size": flag(32, "sequences per batch", type=number(int, 1, 2**20)),
    "grad_accumulation": flag(1, "batches per optimizer step", type=SIZE),
    "learning_rate": flag(3e-4, "peak learning rate", type=RATE),
    "min_lr": flag(
        None, "final learning rate of the schedule (default: a tenth of the peak)", type=RATE
    ),
    "weight_decay": flag(1e-5, "decoupled weight decay of the matrices", type=RATE),
    "embedding_decay": flag(
        None, "weight decay of embeddings and output matrix (default: weight_decay)", type=RATE
    ),
    "beta1": flag(0.9, "AdamW's beta1, decay rate of the mean gradient", type=BETA),
    "beta2": flag(0.99, "AdamW's beta2, decay rate of the mean squared gradient", type=BETA),
    "optimizer": choice(
        "adamw",
        ["adamw", "muon"],
        f"muon: Muon for the blocks' matrices at {MUON_RATE} times the learning rate, "
        "AdamW for the rest",
    ),
    "lr_warmup": flag(200, "warmup steps", type=COUNT),
    "lr_schedule": choice("constant", ["constant", "cosine", "linear"], "schedule after warmup"),
    "lr_cooldown": flag(
        1.0,
        "share of the steps after warmup, at the end, over which the rate decays",
        type=SHARE,
    ),
    "grad_clip": flag(1.0, "maximum gradient norm; 0: no clipping", type=RATE),
    "dropout_final": flag(None, "final dropout rate (linear schedule)", type=DROPOUT),
    "dtype": choice(
        "float32",
        ["float32", "bfloat16"],
        "bfloat16: mixed precision with float32 weights",
    ),
    "checkpoint": flag(False, "gradient checkpointing: less memory, more compute"),
    "average": flag(
        0.0,
        "average the weights over about this last share of training; the average is saved, "
        "evaluated and sampled",
        type=SHARE,
    ),
    "patience": flag(None, "stop after this many evaluations without improvement", type=SIZE),
}

FLAGS["reports"] = {
    "steps_per_report": flag(10, "report interval in steps", type=SIZE),
    "steps_per_eval": flag(1000, "evaluation interval in steps", type=SIZE),
    "eval_tokens": flag(100000, "validation tokens per evaluation; 0: all", type=COUNT),
    "steps_per_save": flag(
        None, "checkpoint interval in steps (default: steps_per_eval)", type=SIZE
    ),
    "eval_test": flag(False, "evaluate on the test split at the end"),
    "keep": flag(3, "newest checkpoints to keep, besides the best", type=SIZE),
}

FLAGS["sampling"] = {
    "inference": flag(False, "sample interactively"),
    "prompt": flag(None, "text to continue", metavar="TEXT"),
    "prompts_file": flag(
        None,
        "continue each line of a file, in batches; writes JSON Lines",
        type=user_path,
        metavar="FILE",
    ),
    "output": flag(
        None,
        "file for the results of --prompts_file (JSON Lines; resumed if it exists; default: "
        "stdout) or --cases (JSON)",
        type=user_path,
        metavar="FILE",
    ),
    "max_tokens": flag(200, "maximum number of new tokens", type=SIZE),
    "num_samples": flag(
        1, "samples per prompt, with consecutive seeds", type=number(int, 1, 10**6)
    ),
    "temperature": flag(0.5, "sampling temperature; 0: greedy", type=number(float, 0, 100)),
    "top_k": flag(50, "sample from the k most likely tokens; 0: all", type=COUNT),
    "top_p": flag(1.0, "nucleus sampling threshold", type=SHARE),
    "min_p": flag(0.0, "minimum probability relative to the most likely token", type=SHARE),
    "repetition_penalty": flag(
        1.0, "penalty on tokens that have occurred; 1: none", type=number(float, 0.01, 100)
    ),
    "stop": flag(None, "stop before this text", metavar="TEXT"),
    "draft": flag(None, "draft checkpoint for speculative decoding", metavar="ID"),
}

FLAGS["reuse"] = {
    "init_from": flag(
        None, "initialize from a checkpoint or a Hugging Face folder", metavar="MODEL"
    ),
    "lora_rank": flag(None, "train only LoRA adapters of this rank, on --init_from", type=SIZE),
    "lora_alpha": flag(
        None, "LoRA alpha: adapters are scaled by alpha / rank (default: twice the rank)", type=RATE
    ),
    "teacher": flag(
        None,
        "distill from this model: a checkpoint or a Hugging Face folder",
        metavar="MODEL",
    ),
    "teacher_weight": flag(0.5, "weight of the distillation loss", type=SHARE),
    "teacher_temperature": flag(2.0, "distillation temperature", type=number(float, 0.01, 100)),
    "quantize": flag(
        None,
        "quantize weights to this many bits for sampling, --evaluate and --export",
        type=int,
        choices=[4, 8, 16],
    ),
    "export": flag(
        None, "export a checkpoint to a Hugging Face folder or to FILE.gguf", metavar="DIR"
    ),
}

FLAGS["tools"] = {
    "evaluate": choice(None, ["valid", "test"], "evaluate a checkpoint on a whole split"),
    "eval_stride": flag(
        None,
        "sliding-window stride of --evaluate (default: context_size)",
        type=SIZE,
    ),
    "benchmark": flag(False, "report parameters, FLOPs, memory and speed, then exit"),
    "cases": flag(
        None,
        "rank the expected continuations of prompts, from YAML files",
        nargs="+",
        metavar="FILE",
    ),
    "plot": flag(
        None, "plot the losses of all runs in the folder, or of --identifier", metavar="FILE"
    ),
    "attention": flag(None, "plot the attention of each head over --prompt", metavar="FILE"),
    "list": flag(False, "list runs and checkpoints"),
    "version": flag(False, "print the versions of main.py, Python, MLX and NumPy"),
}

DEFAULTS = {name: row[0] for rows in FLAGS.values() for name, row in rows.items()}

# The flags that load_dataset takes.
DATA = [
    "dataset",
    "text",
    "valid_text",
    "test_text",
    "valid_fraction",
    "train_tokens",
    "tokenizer",
    "vocab_size",
]
# The flags that shape a run: changing one of them makes it a different run.
SHAPING = [
    *DATA,
    "seed",
    "optimizer",
    *FLAGS["model"],
    "init_from",
    "lora_rank",
    "lora_alpha",
    "teacher",
]
# The fields of a Config that are flags.
CONFIG_FLAGS = [name for name in FLAGS["model"] if name != "dropout"]
# The flags that a checkpoint records and a resumed run inherits.
INHERITED = [
    *SHAPING,
    "num_iters",
    *FLAGS["training"],
    *FLAGS["reports"],
    "teacher_weight",
    "teacher_temperature",
]

TRAIN_FIRST = "train a model first, or check --save_dir"

# A command can have only one of these.
MODES = [
    "inference",
    "prompt",
    "prompts_file",
    "evaluate",
    "export",
    "list",
    "cases",
    "plot",
    "benchmark",
    "new_model",
]
EXCLUSIVE = [("dataset", "text"), ("identifier", "new_model"), *itertools.combinations(MODES, 2)]
# Flags that name input files.
READ = [
    "config",
    "cases",
    "prompts_file",
    "text",
    "valid_text",
    "test_text",
    "init_from",
    "teacher",
    "draft",
]
# A flag on the left requires one of those on the right.
PARTNERS = {
    "valid_text": ["text", "identifier"],
    "test_text": ["text", "identifier"],
    "output": ["prompts_file", "cases"],
    "draft": ["prompt", "inference"],
    "attention": ["prompt"],
    "quantize": ["prompt", "prompts_file", "inference", "evaluate", "export"],
    "eval_stride": ["evaluate"],
}


def explain_name(name):
    """A hint for an unknown flag, or None."""
    with contextlib.suppress(UsageError):  # if its file is missing
        known = extra("names").explain(name)
        if known:
            return known
    similar = difflib.get_close_matches(name, DEFAULTS, 1, 0.75)
    return f"--{similar[0]}?" if similar else None


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UsageErrors; argparse would print its whole usage."""

    def error(self, message):
        raise UsageError(f"{message} (--help lists all flags)")


def make_parser():
    """An argparse parser of FLAGS that returns only the flags passed, without defaults."""
    parser = Parser(
        usage="python main.py [flags]",
        description=(__doc__ or "").partition("\nThis file")[0],  # python -OO drops it
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (_, options) in rows.items():
            group.add_argument(f"--{name}", **options)
            if options.get("action") == "store_true":  # --no-NAME turns it off
                negative = {"dest": name, "action": "store_false", "help": argparse.SUPPRESS}
                group.add_argument(f"--no-{name}", **negative)
    return parser


def parse(arguments):
    """The flags passed, {flag: value}. Raises UsageError, which suggests similar flags."""
    values, unknown = make_parser().parse_known_args([underscored(each) for each in arguments])
    if unknown:
        hints = []
        for argument in unknown:
            name, _, _ = argument.lstrip("-—").partition("=")
            if argument.startswith(("-", "—")):
                hints.append(explain_name(name.lower().replace("-", "_")))
        if not hints:
            hints = ["is a flag before it missing, or quotes around it?"]
            if "checkpoint" in values:
                hints.append("--checkpoint is gradient checkpointing, --identifier names a file")
        hints = [*filter(None, hints), "--help lists all flags"]
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)} ({'; '.join(hints)})")
    return vars(values)


def read_command_line(argv):
    """The flags set on the command line, by --config or by --preset, {flag: value}.

    Raises UsageError if two flags are mutually exclusive, or one requires another.
    """
    passed = parse(argv)
    if "config" in passed:
        # The command line overrides the file.
        passed = read_config(passed["config"], passed) | passed
    if "preset" in passed:
        passed = PRESETS[passed["preset"]] | passed  # the file and the command line override it
    if passed.get("tokenizer") == "auto":
        del passed["tokenizer"]  # the same as not passing it
    asked = {name for name in passed if passed[name] is not False}  # --no-x does not count
    for one, other in EXCLUSIVE:
        if one in asked and other in asked:
            raise UsageError(f"--{one} and --{other} are mutually exclusive: use one of them")
    for name in asked - {"prompt"}:  # an empty prompt starts a text
        values = as_list(passed[name])
        if "" in values:
            raise UsageError(f"--{name} is empty: give it a value, or leave it out")
        if "\0" in "".join(map(str, values)):  # only a --config file can hold one
            raise UsageError(f"--{name} holds a null character: leave it out")
    for name, partners in PARTNERS.items():
        if name in asked and not asked.intersection(partners):
            several = ", --".join(partners)
            needed = f"one of --{several}" if len(partners) > 1 else f"--{several}"
            raise UsageError(f"--{name} requires {needed}")
    if "identifier" in passed and not asked & {"cases", "plot"}:
        if len(passed["identifier"]) > 1:
            raise UsageError("--identifier takes one name; several go with --cases and --plot")
        passed["identifier"] = passed["identifier"][0]  # a list only for --cases and --plot
    check_outputs(passed)
    return passed


def as_list(value):
    """The values of a flag, which may be one value or a list, as a list."""
    return value if isinstance(value, list) else [value]


def check_outputs(passed):
    """Raises UsageError if an output file or folder is also an input."""
    for output in ("output", "plot", "attention", "export"):
        if output not in passed:
            continue
        written = os.path.realpath(absolute(passed[output]))
        for name in READ:
            for path in as_list(passed.get(name, [])):
                if os.path.realpath(absolute(path)) == written:
                    raise UsageError(
                        f"--{output} {passed[output]} would overwrite what --{name} names: "
                        f"give --{output} another name"
                    )


def read_config(path, passed):
    """The flags in a YAML file, as if passed on the command line.

    A corpus passed on the command line replaces the file's. Raises UsageError.
    """
    import yaml

    with explained(f"--config {path} must be a YAML file of flags like dim: 8"):
        content = yaml.safe_load(Path(user_path(path)).read_text("utf-8"))
        if content is None:  # only comments
            content = {}
        settings = {}
        for name, value in content.items():
            if name in FLAGS and isinstance(value, dict):
                settings |= value  # a group
            elif name in FLAGS and value is None:
                continue  # a group without flags, or only with comments
            else:
                settings[name] = value
        settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
        known = DEFAULTS.keys() - {"config"}  # a file cannot name another
        unknown = sorted(settings.keys() - known)
        if unknown:
            hints = [*filter(None, map(explain_name, unknown)), "--help lists all"]
            raise UsageError(f"no flag is named {', '.join(unknown[:9])} ({'; '.join(hints)})")
        if "text" in passed or "dataset" in passed:
            for name in ("dataset", "text", "valid_text", "test_text"):
                settings.pop(name, None)
        arguments = []
        for name, value in settings.items():
            if value is True:
                arguments.append(f"--{name}")
            elif value is False:
                arguments.append(f"--no-{name}")
            elif isinstance(value, list):
                arguments += [f"--{name}", *(utf8(str(each)) for each in value)]
            elif value is not None:
                arguments.append(f"--{name}={utf8(str(value))}")
        return parse(arguments)  # with the command line's types, limits and choices


def resolve(flags):
    """Fills in what depends on other flags: defaults of None, `auto`, relative paths."""
    for name in ("text", "valid_text", "test_text"):
        paths = getattr(flags, name)
        if paths:
            setattr(flags, name, [absolute(path) for path in paths])
    for name in ("init_from", "teacher", "draft"):
        path = getattr(flags, name)
        if path and os.path.isdir(absolute(path)):  # else it names a checkpoint
            setattr(flags, name, absolute(path))
    if flags.text:
        flags.dataset = "text"
    if flags.tokenizer == "auto":
        flags.tokenizer = CORPORA[flags.dataset].tokenizer
    if flags.num_kv_heads is None:
        flags.num_kv_heads = flags.num_heads
    if flags.mlp_dim is None:
        flags.mlp_dim = 4 * flags.dim
        _, is_gated = MLPS[flags.mlp]
        if is_gated:
            # Three matrices instead of two: 8/3 dim keeps their total size (Shazeer 2020), here
            # rounded up to a multiple of 64.
            flags.mlp_dim = 64 * math.ceil(8 * flags.dim / (3 * 64))
    if flags.lora_rank and flags.lora_alpha is None:
        flags.lora_alpha = 2 * flags.lora_rank  # LoRA's scale, alpha / rank, is then 2
    return flags


def absolute(path):
    """A path as stored in a checkpoint: valid from any working directory."""
    return os.path.abspath(user_path(path))


# ---- Setting up a run ---------------------------------------------------------------------------

DIVERGED = "the loss of the next step from it is not finite"  # see mark_diverged


def choose_checkpoint(folder, flags, passed, needed):
    """The record of the checkpoint to resume or, if `needed`, to use; None means a new run.

    It is the one that --identifier names, or else the most recently saved one that agrees with all
    shaping flags passed. Its files are verified; if they are damaged, or no step can be taken from
    it, an older one of its run is used instead, but never in place of one that was named. Raises
    UsageError, RunError.
    """
    if flags.new_model:
        return None
    records = list_checkpoints(folder, warn=True)
    wanted = {name: getattr(flags, name) for name in SHAPING if name in passed}
    if needed:
        wanted.pop("seed", None)  # it is for the samples
    if flags.evaluate:
        wanted.pop("test_text", None)  # any text can be scored

    if flags.identifier is not None:
        checkpoint = named_checkpoint(folder, records, flags.identifier)
        for name, value in wanted.items():
            had = checkpoint["flags"][name]
            if had != value:
                raise UsageError(
                    f"--{name} {value} contradicts --identifier, which has {had}: "
                    f"leave --{name} out, or start a new run with --new_model"
                )
        if checkpoint.get("diverged") and not needed:
            raise RunError(f"{describe(checkpoint)}: {DIVERGED}; use an older one from --list")
        return checkpoint

    candidates = [record for record in records if wanted.items() <= record["flags"].items()]
    for record in candidates:
        if record["run"] != candidates[0]["run"]:
            continue  # never resume another run silently
        damage = find_damage(folder, record)
        if not damage and record.get("diverged"):
            damage = DIVERGED
        if not damage:
            return record
        if is_deleted(folder, record["id"]):  # its run is still training: there is a newer one
            return choose_checkpoint(folder, flags, passed, needed)
        print(f"Skipping {describe(record)}: {damage}", file=sys.stderr)
    if candidates:
        raise RunError(
            f"no good checkpoint of {candidates[0]['run']} is left: --new_model starts a new run"
        )
    if records and not needed and not flags.benchmark:
        names = list(dict.fromkeys(record["run"] for record in records))
        tqdm.write(
            f"Starting a new run. Existing runs in {folder}: {', '.join(names[:5])} "
            "(--list shows all); resume one with --identifier NAME."
        )
    return None


def flags_of_resumed_run(checkpoint, passed):
    """The flags of a resumed run: those passed, then the checkpoint's. Raises RunError."""
    old = checkpoint["flags"]
    for rows in FLAGS.values():
        for name in rows.keys() & {*INHERITED}:
            _, options = rows[name]
            if "choices" not in options:
                continue
            # Besides the choices: None for a flag not passed, and the corpus that --text implies.
            known = [*options["choices"], None, "text"]
            if old[name] not in known:
                raise RunError(
                    f"{describe(checkpoint)} has --{name} {old[name]}, "
                    "which this version of the program does not know: use the version that wrote it"
                )
    return resolve(argparse.Namespace(**old | passed))


def check_values(flags):
    """Raises UsageError for incompatible values, passed or from a checkpoint."""
    if flags.min_lr is not None and flags.min_lr > flags.learning_rate:
        raise UsageError(
            f"--min_lr {flags.min_lr} is above --learning_rate {flags.learning_rate}: "
            "give a lower one"
        )
    for name, partner in (("lora_rank", "init_from"), ("lora_alpha", "lora_rank")):
        if getattr(flags, name) and not getattr(flags, partner):
            raise UsageError(f"--{name} requires --{partner}")
    if flags.lora_rank and flags.embedding_decay is not None:
        raise UsageError("--lora_rank trains no embeddings: leave out --embedding_decay")
    if flags.teacher:
        extra("distil")  # if its file is missing, fails before the run starts


def open_origins(folder, flags, checkpoint):
    """The models that --init_from and --teacher name, {flag: Origin}.

    A resumed run needs its teacher and, with LoRA, its base. Raises UsageError, RunError.
    """
    if checkpoint:
        return {name: open_origin(folder, checkpoint, name) for name in checkpoint["uses"]}
    names = [name for name in ("init_from", "teacher") if getattr(flags, name)]
    return {name: open_model(folder, getattr(flags, name), f"--{name}") for name in names}


def adopt_shape(flags, passed, origins):
    """Sets the flags of a new run that its origins determine, see open_origins.

    --init_from determines the whole shape, --teacher only the tokenizer, as both models have to
    predict the same ids, and the longest context: beyond its own, it knows nothing. Raises
    UsageError if a flag passed contradicts an origin, or one origin the other.
    """
    first, *others = origins
    tokenizer = origins[first].tokenizer
    for other in others:
        if origins[other].tokenizer.to_dict() != tokenizer.to_dict():
            raise UsageError(
                f"--{other} {getattr(flags, other)} has a different tokenizer than --{first}: "
                "use one with the same tokenizer"
            )
    decided = {"tokenizer": tokenizer.kind}
    if first == "init_from":
        config = origins[first].model.config
        decided |= {name: getattr(config, name) for name in CONFIG_FLAGS}
    for name, value in decided.items():
        if name == "context_size" and name in passed:
            continue  # RoPE works with any
        if name in passed and passed[name] != value:
            raise UsageError(
                f"--{name} {passed[name]} contradicts --{first}, which has {value}: "
                f"leave --{name} out"
            )
        setattr(flags, name, value)
    if "teacher" in origins:
        longest = origins["teacher"].model.config.context_size
        if "context_size" in passed and flags.context_size > longest:
            raise UsageError(
                f"--context_size {flags.context_size} is more than the teacher has read: give at "
                f"most {longest}"
            )
        flags.context_size = min(flags.context_size, longest)


def make_config(flags, vocab_size):
    """The Config of a new model."""
    return Config(vocab_size=vocab_size, **{name: getattr(flags, name) for name in CONFIG_FLAGS})


def make_model(flags, dataset, checkpoint, origins):
    """The model of a run; a checkpoint's weights are loaded later. Raises UsageError."""
    if "init_from" in origins:
        model = origins["init_from"].model
        # Its context may change; what no flag sets, such as a padded vocabulary, stays.
        model.config = dataclasses.replace(model.config, context_size=flags.context_size)
        if flags.lora_rank:
            extra("lora").add_lora(model, flags.lora_rank, flags.lora_alpha)
    elif checkpoint:
        model = model_of(checkpoint)
    else:
        model = LanguageModel(make_config(flags, dataset.tokenizer.vocab_size))
    check_memory(model, flags)  # MLX is lazy: new weights do not exist yet
    if flags.lora_rank:
        extra("lora").init_lora(model, flags.seed)
    elif not checkpoint and "init_from" not in origins:
        init_weights(model, flags.seed)
    return model


def check_memory(model, flags, training=True):
    """Raises UsageError if the minimum for training or scoring a model exceeds the memory.

    Actual use is higher; `--benchmark` predicts and measures it. MLX itself would crash.
    """
    config = model.config
    window = config.context_size
    floats = {
        "weights": sum(array.size for array in arrays_of(model.parameters())),
        "hidden states": flags.batch_size * window * config.dim,
    }
    if training or mx.default_device() == mx.cpu:  # a GPU scores a window without them
        floats["attention scores"] = config.num_heads * window**2
    if training:
        trained = sum(array.size for array in arrays_of(model.trainable_parameters()))
        moments = 1 if flags.optimizer == "muon" else 2
        floats["gradients and moments"] = trained * (1 + moments)
        if flags.average:
            floats["average of the weights"] = trained
        floats["tokens"] = 2 * flags.batch_size * flags.grad_accumulation * window
        floats["hidden states"] *= config.num_blocks
        if not flags.checkpoint:  # gradient checkpointing keeps the scores of one block, not of all
            floats["attention scores"] *= config.num_blocks
    needed = 4 * sum(floats.values())  # bytes
    if mx.default_device() == mx.gpu:
        info = mx.device_info()
        memory = info.get("memory_size") or info.get("total_memory") or math.inf  # Metal, CUDA
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        largest = max(floats, key=floats.get)
        raise UsageError(
            f"this needs at least {needed / 2**30:,.1f} GiB of memory, most of it for {largest}, "
            f"but this machine has {memory / 2**30:,.1f}: choose a smaller model or batch"
        )


def make_run(name, flags, dataset, checkpoint, origins, ranks):
    """A new run, or the one saved in the checkpoint whose record is `checkpoint`."""
    model = make_model(flags, dataset, checkpoint, origins)  # first: it may be too large
    teacher = origins["teacher"].model if "teacher" in origins else None
    rows = flags.batch_size * flags.grad_accumulation
    run = Run(
        name=name,
        flags=flags,
        dataset=dataset,
        model=model,
        optimizer=make_optimizer(model, flags),
        batches=Batches(dataset.train.tokens, flags.context_size, rows, flags.seed),
        teacher=teacher,
    )
    if checkpoint:
        run.restore(flags.save_dir, checkpoint)
        run.is_branch = name != checkpoint["run"]
    run.about = {
        "run": name,
        "flags": {flag_name: getattr(flags, flag_name) for flag_name in INHERITED},
        "config": dataclasses.asdict(model.config),
        "parameters": sum(weight.size for _, weight in tree_flatten(model.parameters())),
        "tokens_sha256": dataset.sha256,
        "uses": checkpoint["uses"] if checkpoint else needed_origins(flags, origins),
        "command": sys.argv,
        "sources": hash_sources(),
        "versions": list_versions(flags, ranks),
    }
    return run


def needed_origins(flags, origins):
    """The origins that resuming a run needs, and how to find them: {flag: [place, id]}.

    A folder is found by its path, a checkpoint by its id. Without LoRA, --init_from is needed only
    at the start.
    """
    uses = {}
    for flag_name, origin in origins.items():
        if flag_name == "teacher" or flags.lora_rank:
            name = getattr(flags, flag_name)
            uses[flag_name] = [name if os.path.isdir(name) else origin.id, origin.id]
    return uses


def hash_sources():
    """The SHA1s of this program's files, {name: SHA1}: they identify what trained a run."""
    paths = [HERE / "main.py", HERE / "datasets.py", *sorted(HERE.glob("extras/*.py"))]
    hashes = {}
    for path in paths:
        name = str(path.relative_to(HERE))
        hashes[name] = hashlib.sha1(path.read_bytes()).hexdigest()
    return hashes


def list_versions(flags, ranks):
    """What the last bits of a result depend on: resume is bit-exact while these stay the same.

    The C++ compiler is not among them; MLX and extras/fast.py cache what it has compiled.
    """
    device = f"{mx.default_device().type.name}, {mx.device_info().get('device_name', '?')}"
    cores, streams = os.cpu_count(), 1
    if fast and not flags.gpu:
        cores = fast.count_cores()  # fewer under taskset
        streams = fast.count_streams(flags.batch_size // ranks.size, flags.context_size)
    dtype = flags.dtype if mx.default_device() == mx.gpu or has_bfloat16() else "float32"
    return {
        "MLX": mx.__version__,
        "NumPy": np.__version__,
        "BLAS": BLAS,
        "dtype": dtype,
        "device": f"{device}, {cores} cores",
        "streams": streams,
        "ranks": ranks.size,
    }


def load_data(folder, flags, passed, checkpoint, origins):
    """The dataset of a run.

    A run that starts or learns from a model uses that model's tokenizer. A resumed run's checkpoint
    contains it, and any tokenizer that was read from a file.
    """
    if flags.test_text and not flags.text:
        raise UsageError(f"--test_text goes with --text: {flags.dataset} has splits of its own")
    arguments = {name: getattr(flags, name) for name in DATA if name != "dataset"}
    if origins:
        first = next(iter(origins))
        arguments["tokenizer"] = origins[first].tokenizer.to_dict()
    elif checkpoint:
        # A tokenizer file that is not passed again may be gone.
        of_file = flags.tokenizer not in TOKENIZERS and "tokenizer" not in passed
        if flags.init_from or flags.teacher or of_file:
            arguments["tokenizer"] = load_tokenizer(folder, checkpoint)
    dataset = load_dataset(flags.dataset, folder, **arguments, mirror=flags.mirror, say=tqdm.write)
    if checkpoint and checkpoint["tokens_sha256"] != dataset.sha256:
        raise UsageError(
            f"the training text or tokenizer of {checkpoint['run']} has changed: "
            "start a new run with --new_model, or name another --save_dir"
        )
    if (flags.evaluate == "test" or flags.eval_test) and not dataset.test:
        raise UsageError(f"{dataset.name} has no test split: name files for it with --test_text")
    return dataset


# ---- Commands -----------------------------------------------------------------------------------


def list_runs(folder):
    """Prints the runs in `folder` and their checkpoints, most recently saved first."""
    records = list_checkpoints(folder, warn=True)  # newest first
    print(f"Checkpoints in {folder}: {len(records)}")
    latest = next((record for record in records if not record.get("diverged")), None)
    names = dict.fromkeys(record["run"] for record in records)  # unique, in that order
    for name in names:
        own = [record for record in records if record["run"] == name]
        newest = own[0]
        flags = newest["flags"]
        line = f"{name}: {newest['parameters']:,} parameters, "
        line += f"iteration {newest['iteration']:,} of {flags['num_iters']:,}"
        for flag_name, value in flags.items():
            if any(record["flags"].get(flag_name) != value for record in records):
                line += f" --{flag_name} {value}"  # a flag that tells the runs apart
        print(textwrap.fill(line, 100, subsequent_indent="    "))
        for record in own:
            scores = dict(record["scores"])
            score = "not scored"
            if record["iteration"] in scores:
                score = f"{scores[record['iteration']]:.4f}"
            age = tqdm.format_interval(time.time() - record["saved"])
            line = f"    {record['id'][:12]}  iteration {record['iteration']:>9,}"
            line += f"  {score:>10}  {age:>8} old"
            if record is latest:
                line += ", latest"  # of the folder
            if record["id"] == best_id(newest):
                line += ", best"  # of the run
            if record.get("diverged"):
                line += ", diverged"
            print(line)


def show_runs(folder, flags, passed):
    """Runs --plot or --cases on the runs or checkpoints that --identifier names, or on all."""
    records = list_checkpoints(folder, warn=True)
    if not records:
        raise UsageError(f"no checkpoint in {folder}: {TRAIN_FIRST}")
    runs = dict.fromkeys(record["run"] for record in records)  # unique
    named = []
    for identifier in flags.identifier or []:
        # A pattern names the newest checkpoint of each run that it matches.
        names = fnmatch.filter(runs, identifier) or [identifier]
        for name in names:
            record = named_checkpoint(folder, records, name)
            if record not in named:
                named.append(record)
    if flags.plot:
        extra("pictures").plot_runs(folder, [record["run"] for record in named], flags.plot)
    else:
        top_k = passed.get("top_k", 5)  # the default, 50, is for sampling
        if top_k == 0:
            raise UsageError("--top_k 0 would let all --cases pass: give at least 1")
        extra("cases").run_cases(folder, named or records, flags, top_k)


def score_checkpoint(folder, checkpoint, flags, dataset, ranks):
    """Scores a split for --evaluate; with --quantize, then also with quantized weights.

    Returns the exit status.
    """
    model, _ = load_model(folder, checkpoint)
    context_size = model.config.context_size
    if flags.eval_stride and flags.eval_stride > context_size:
        raise UsageError(
            f"--eval_stride {flags.eval_stride} would skip tokens: give at most {context_size}"
        )
    check_memory(model, flags, training=False)
    print(describe(checkpoint), file=sys.stderr)
    # Never entered: there is nothing to save, so Ctrl+C ends this process at once. `evaluate` sets
    # its `received` to a signal that another rank has received.
    interrupts = Interrupts()
    ranks.broadcast_scoring(model, dataset, flags)
    score_split(flags.evaluate, model, dataset, flags, interrupts, ranks)
    if flags.quantize:
        extra("quantize").quantize(model, flags.quantize, packed=False)
        ranks.broadcast_scoring(model, dataset, flags)
        score_split(flags.evaluate, model, dataset, flags, interrupts, ranks)
    return 128 + interrupts.received if interrupts.received else stdout_status()


def stdout_status():
    """The exit status of a command whose result is on stdout: 0.

    Raises RunError if some of it could not be written. Training does not call this: it prints only
    progress, which may be lost on a full disk.
    """
    lost = getattr(sys.stdout, "lost", None)  # see Lasting
    if lost:
        raise RunError(f"the result could not be written to stdout ({lost}): it is not complete")
    return 0


def train_run(flags, dataset, checkpoint, origins, ranks):
    """Starts a run or resumes that of `checkpoint`, and trains it. Returns the exit status."""
    folder = flags.save_dir
    if flags.batch_size < ranks.size:
        raise UsageError(
            f"--batch_size {flags.batch_size} leaves some of the {ranks.size} ranks without a row: "
            "give a larger one"
        )
    name = f"{dataset.name}-{os.urandom(3).hex()}"  # 6 hexadecimal digits: see remove_leftovers
    # --identifier may name an older checkpoint of its run: then this is a new run, too.
    if checkpoint and not (flags.identifier and checkpoint["saved"] < checkpoint["run_saved"]):
        name = checkpoint["run"]
    lock = lock_run(folder, name)
    if not lock:
        raise UsageError(
            f"{name} is being trained by another process: wait for it, or start another with "
            "--new_model"
        )
    interrupts = Interrupts(launched=ranks.size > 1)
    with lock, interrupts:  # from here on there is something to save
        # Another process may have been training the run until just now.
        if checkpoint and name == checkpoint["run"]:
            own = [record for record in list_checkpoints(folder) if record["run"] == name]
            if not own or own[0]["run_saved"] != checkpoint["run_saved"]:
                raise RunError(
                    f"{name} advanced while this process was starting; rerun the command"
                )
        remove_leftovers(folder, name)
        run = make_run(name, flags, dataset, checkpoint, origins, ranks)
        print_start(run, checkpoint, ranks)
        if run.iteration >= flags.num_iters:
            tqdm.write(
                f"Run complete ({run.iteration:,}/{flags.num_iters:,}): raise --num_iters to "
                "continue, or start over with --new_model."
            )
        run = ranks.broadcast_run(run)
        try:
            return train(run, interrupts, ranks)
        except RuntimeError as error:
            # Ctrl+C in a terminal also kills the compiler in a first step, evaluation or sample.
            # All is saved then, except the first step of a run with --average.
            if interrupts.received and ranks.size == 1:
                reason = " ".join(str(error).split())
                tqdm.write(f"Stopped at iteration {run.iteration:,} ({reason[:200]}).")
                return 128 + interrupts.received
            raise


def execute(argv, ranks):
    """Executes the command; returns the exit status."""
    passed = read_command_line(argv)
    flags = resolve(argparse.Namespace(**DEFAULTS | passed))
    if flags.version:
        own = hash_sources()["main.py"][:12]
        python = platform.python_version()
        print(f"main.py {own}, Python {python}, MLX {mx.__version__}, NumPy {np.__version__}")
        return stdout_status()
    if flags.gpu and not mx.is_available(mx.gpu):
        raise UsageError(
            "--gpu: MLX sees no GPU; leave it out, or install MLX for yours: "
            "pip install 'mlx[cuda13]'"
        )
    use_device(flags.gpu)

    # Commands that only look at the folder.
    samples = flags.inference or flags.prompt is not None or flags.prompts_file
    needed = samples or flags.export or flags.evaluate  # requires a checkpoint, of any corpus
    looks = flags.list or flags.plot or flags.cases
    folder = open_folder(flags.save_dir, writing=not (needed or looks))
    if looks:
        if flags.list:
            list_runs(folder)
        else:
            show_runs(folder, flags, passed)
        return stdout_status()

    # Commands that use a checkpoint, but no corpus.
    checkpoint = choose_checkpoint(folder, flags, passed, needed)
    if needed and not checkpoint:
        if list_checkpoints(folder):
            raise UsageError(
                f"no checkpoint in {folder} has the flags given: leave them out, or see --list"
            )
        raise UsageError(f"no checkpoint in {folder}: {TRAIN_FIRST}")
    if flags.export:
        model, tokenizer = load_model(folder, checkpoint)
        if flags.export.lower().endswith(".gguf"):
            extra("gguf").export_gguf(model, tokenizer, flags.export, flags.quantize)
        else:
            extra("huggingface").export_model(model, tokenizer, flags.export, flags.quantize)
        print(describe(checkpoint), file=sys.stderr)
        return 0
    if samples:
        sample_from(folder, checkpoint, flags)
        return stdout_status()

    # Training, evaluation and benchmarks need the corpus, too.
    if checkpoint:
        flags = flags_of_resumed_run(checkpoint, passed)
    check_values(flags)
    flags.save_dir = folder  # open_folder may have chosen it
    origins = {} if flags.evaluate else open_origins(folder, flags, checkpoint)
    if origins and not checkpoint:
        adopt_shape(flags, passed, origins)
    dataset = load_data(folder, flags, passed, checkpoint, origins)
    if flags.evaluate:
        return score_checkpoint(folder, checkpoint, flags, dataset, ranks)
    if flags.benchmark:
        if ranks.size > 1:
            raise UsageError("--benchmark measures one process: start it without mlx.launch")
        run = make_run("benchmark", flags, dataset, checkpoint, origins, ranks)
        extra("benchmark").run_benchmark(run)
        return stdout_status()
    return train_run(flags, dataset, checkpoint, origins, ranks)


def join_ranks():
    """The processes that train together: this one, or those that mlx.launch or MPI started."""
    sizes = [os.environ.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
    if "MLX_RANK" in os.environ or sizes != ["1", "1"]:
        return extra("ranks").Group()
    return SingleProcess()


SMALLER = "give a smaller --batch_size or --context_size"


def explain_mlx_error(error):
    """A line for a RuntimeError of MLX that the user can mend; None for any other."""
    text = str(error)
    if re.search("malloc|out of memory", text, re.IGNORECASE):
        return f"out of memory ({' '.join(text.split())[:200]}): {SMALLER}"
    # On a CPU, MLX compiles in the folder for temporary files.
    if re.match(r"\[Compile|filesystem error", text):
        _, _, output = text.rpartition("the output is: ")  # of the compiler, if it ran
        reason = " ".join(output.splitlines()[-2:])
        return (
            "MLX cannot compile in the folder for temporary files: "
            f"set TMPDIR to a folder with free space ({reason})"
        )
    return None


def main(argv=None):
    """Runs the program; returns the exit status.

    It is 0 on success, 1 on failure, 2 on a usage error, or 128 + the signal that ended it. With
    several ranks, the first one executes the command; the others train and score along.
    """
    try:
        with join_ranks() as ranks:
            if ranks.rank > 0:
                return ranks.follow()
            return execute(sys.argv[1:] if argv is None else argv, ranks)
    except (UsageError, RunError, OSError, ImportError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of stdout is gone, for example head
            return 1
        line = " ".join(str(error).splitlines())  # one line, however many the error has
        if isinstance(error, MemoryError):
            line = f"{line or 'out of memory'}: {SMALLER}"
        if isinstance(error, ImportError):  # a package that only one feature needs
            line += ": pip install -r requirements.txt"
        print(f"main.py: {line}", file=sys.stderr)
        return 2 if isinstance(error, (UsageError, ImportError)) else 1
    except RuntimeError as error:
        line = explain_mlx_error(error)
        if not line:
            raise  # a bug in this program
        print(f"main.py: {line}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # None if it was closed from the start.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout = Lasting(sys.stdout)  # not in main(), which tests call with their own streams
    sys.stderr = Lasting(sys.stderr)
    sys.exit(main())
