"""Train a transformer language model with MLX, never lose a step of it, and talk to it.

    python main.py --dataset python --dim 128 --context_size 128     train on Python's own standard library
    python main.py --dataset ptb                                     train on Penn Treebank; Ctrl+C, same line: go on
    python main.py --inference                                       talk to the checkpoint saved last
    python main.py --help                                            every flag

The whole program is in this file, from the model to the command line; text becomes token ids in datasets.py.
Shapes are written in these letters: B rows of a batch, L positions, D model dimension, H query heads, K key and value
heads, d dimension of a head (D / H), V vocabulary, N any number.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before there is anything to save, Ctrl+C leaves without a traceback

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import timeit
from functools import lru_cache, partial, reduce
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from datasets import CACHE, CORPORA, TOKENIZERS, RunError, UsageError
from datasets import append_lines, explained, load_dataset, open_folder, tokenizer_from_dict, tokenizer_json

SOURCES = {n: hashlib.sha1(Path(__file__).with_name(n).read_bytes()).hexdigest() for n in ("main.py", "datasets.py")}
FORMAT_VERSION = 2  # of the .metadata files; raise it when one program could misread the other's


# ---- A fast BLAS: on Linux it has to be loaded before MLX. The program itself begins with Configuration -------------
BLAS_FORWARDER = """
void (*gemm)(int, int, int, long, long, long, float, const float*, long, const float*, long, float, float*, long);
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float* a, int lda,
                 const float* b, int ldb, float beta, float* c, int ldc) {
  if (m > 8 || ta != 111 || tb != 112 || beta != 0)
    return gemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  #pragma omp parallel for if ((long) n * k > 100000)
  for (long column = 0; column < n; column++)
    for (long row = 0; row < m; row++) {
      float sum = 0;
      for (long i = 0; i < k; i++) sum += a[row * lda + i] * b[column * ldb + i];
      c[row * ldc + column] = alpha * sum;
    }
}
"""


def use_fast_blas():
    """Makes a fast BLAS visible to MLX and returns its name; call it before mlx is imported. MLX's Linux wheel carries
    the reference BLAS (8 GFLOP/s where OpenBLAS reaches 240), but whichever library with global symbols is loaded first
    wins: here a forwarder to the system's BLAS or to the one inside NumPy's wheel, whose names and integers differ (all
    get long integers, which a BLAS of ints reads as well). It computes one thing itself, a few rows times a matrix,
    which is what decoding does: as fast as memory is read, where OpenBLAS takes 3 times as long."""
    if sys.platform != "linux":
        return "Accelerate"
    # Threads that spin while they wait lose their core to other programs just when work comes (7 times slower).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # glibc returns large arrays to the kernel at once, and each new one is faulted in page by page (7x on a sum)
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
        ctypes.CDLL("libc.so.6").mallopt(option, value)
    numpys = [str(path) for path in Path(np.__path__[0]).parent.glob("numpy.libs/libscipy_openblas64_*.so")]
    mkls = "libmkl_rt.so.2", "libmkl_rt.so", f"{sys.prefix}/lib/libmkl_rt.so.2"
    for path in ("libopenblas.so.0", "libblis.so.4", *mkls, *numpys):
        with contextlib.suppress(OSError, AttributeError):
            gemm = (blas := ctypes.CDLL(path))["scipy_cblas_sgemm64_" if path in numpys else "cblas_sgemm"]
            if forwarder := compile_forwarder():
                ctypes.c_void_p.in_dll(forwarder, "gemm").value = ctypes.cast(gemm, ctypes.c_void_p).value
            elif path in numpys:
                break
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            name = "NumPy's OpenBLAS" if path in numpys else os.path.basename(path)
            with contextlib.suppress(AttributeError):  # OpenBLAS has other kernels, and roundings, for each kind of CPU
                core = blas["scipy_openblas_get_corename64_" if path in numpys else "openblas_get_corename"]
                core.restype = ctypes.c_char_p
                name += f" ({core().decode()})"
            return name
    return "reference BLAS"


def compile_forwarder():
    """BLAS_FORWARDER as a library, compiled once for a CPU by the C compiler that MLX needs anyway, or None."""
    cpu = re.search("^(flags|Features).*", Path("/proc/cpuinfo").read_text(), re.M)
    path = CACHE / f"blas-{hashlib.sha1(f'{BLAS_FORWARDER}{cpu and cpu[0]}'.encode()).hexdigest()[:12]}.so"
    vectors = ["-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
    for options in ([*vectors, "-fopenmp"], vectors, []):  # what one compiler knows another may not
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if not path.exists():
                CACHE.mkdir(parents=True, exist_ok=True)
                command = ["cc", "-shared", "-fPIC", "-O3", *options, "-x", "c", "-", "-o", f"{path}.{os.getpid()}"]
                subprocess.run(command, input=BLAS_FORWARDER.encode(), check=True, stderr=subprocess.DEVNULL)
                os.replace(command[-1], path)
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def set_blas_threads(count):
    """Sets the number of threads of a matrix product."""
    openblas = "openblas_set_num_threads", "scipy_openblas_set_num_threads64_"
    for name in (*openblas, "MKL_Set_Num_Threads", "bli_thread_set_num_threads"):
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None)[name](count)


BLAS = use_fast_blas()

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

cpu_stream = lru_cache(None)(lambda i: mx.new_stream(mx.cpu))  # made once: a stream lives as long as the process


# ---- Configuration --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    """What shapes the weights and what they compute. Raises UsageError where the numbers do not fit each other."""

    vocab_size: int
    context_size: int
    num_blocks: int
    dim: int
    num_heads: int
    num_kv_heads: int
    mlp: str
    mlp_dim: int
    qk_norm: bool = False
    untie: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    head_dim: int = None

    def __post_init__(self):
        if self.head_dim:  # of imported models, some of which have other sums of heads than dim
            return
        D, H, K = self.dim, self.num_heads, self.num_kv_heads
        if D % (2 * H):  # RoPE rotates pairs, so a head's dimension is even
            fit = 2 * H * max(1, round(D / (2 * H)))
            raise UsageError(f"--dim {D} is no multiple of 2 * --num_heads {H}: try --dim {fit}")
        if H % K:
            raise UsageError(f"--num_kv_heads {K} does not divide --num_heads {H}: try {math.gcd(H, K)}")
        object.__setattr__(self, "head_dim", D // H)


def make_config(flags, vocab_size, base=None):
    """The Config of a new model: where no flag decides, that of `base`, whose weights it begins with."""
    shape = {field.name: getattr(flags, field.name) for field in dataclasses.fields(Config) if field.name in flags}
    return Config(**(vars(base.config) if base else {}) | shape | {"vocab_size": vocab_size})  # not what a BPE aims at


PRESETS = {  # --dim, --num_heads, --num_blocks, --context_size
    "tiny": (128, 4, 4, 128), "small": (256, 8, 6, 256), "medium": (512, 8, 12, 512), "large": (768, 12, 24, 1024),
    "gpt2": (768, 12, 12, 1024), "350m": (768, 12, 16, 2048),
}  # fmt: skip


# ---- Model: decoder-only, pre-norm, with RMSNorm, RoPE and grouped-query attention; named as in Hugging Face's Llama
def dropout(hidden, noise, site):
    """Zeroes elements of hidden [B, L, D] at random. noise: the rows' rates [B] and keys [B, 2] uint32, or () for none;
    `site` tells the model's dropouts apart. Masks depend on a row's own key alone, so a batch can be split freely."""
    if not noise:
        return hidden
    rates, keys = noise
    draw = mx.vmap(lambda rate, key: mx.random.bernoulli(1 - rate, hidden.shape[1:], key=key))
    kept = draw(rates, keys + mx.array(site, mx.uint32))  # [B, L, D] of bool
    return mx.where(kept, hidden / (1 - rates[:, None, None]), 0).astype(hidden.dtype)


def exp(x):
    """e to the x, for x <= 0, to 2e-6 absolutely. On a CPU MLX's own takes 12 ns, being scalar there; products and sums
    use the vector units, and so does (Taylor's polynomial of x / 32) to the 32: 1.2 ns. Below -30 it stays at 1e-13."""
    if mx.default_device() == mx.gpu:
        return mx.exp(x)
    x, power = mx.maximum(x, -30), 0
    for k in reversed(range(7)):
        power = power * x + 1 / (32**k * math.factorial(k))
    for _ in range(5):
        power = power * power
    return power


@mx.custom_function
def softmax(scores):
    """Over the last axis, by `exp` and with a gradient of its own."""
    weights = exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@softmax.vjp
def softmax_gradient(scores, gradient, weights):
    """From the weights, so that no exp is computed again."""
    product = gradient * weights
    return product - weights * product.sum(axis=-1, keepdims=True)


def attend(queries, keys, values, scale, mask="causal", cached=False):
    """Attention of queries [B, H, L, d], at the last L of S positions or as `mask` says, to keys and values
    [B, K, S, d]: [B, H, L, d]. MLX's own, but for whole texts on a CPU, where this makes steps 3 to 16 % quicker."""
    if mx.default_device() == mx.gpu or cached:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    B, H, L, d = queries.shape
    queries = (queries * scale).reshape(B, keys.shape[1], -1, L, d)  # [B, K, H/K, L, d]
    scores = queries @ keys[:, :, None].swapaxes(-1, -2)  # [B, K, H/K, L, L]
    weights = softmax(mx.where(mx.array(np.tri(L, dtype=bool)), scores, -1e9))
    return (weights @ values[:, :, None]).reshape(B, H, L, d)


class Attention(nn.Module):
    """Causal self-attention, K key/value heads shared by H query heads (Ainslie et al. 2023)."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.rope = nn.RoPE(config.head_dim, base=config.rope_theta)
        self.q_proj = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)
        if config.qk_norm:  # keeps the scores in range at high learning rates (Henry et al. 2020; Qwen3)
            self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, config.norm_eps) for _ in range(2))

    def __call__(self, hidden, cache=None):
        B, L, _ = hidden.shape
        heads = lambda layer: layer(hidden).reshape(B, L, -1, self.head_dim).transpose(0, 2, 1, 3)  # [B, H or K, L, d]
        queries, keys, values = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        offset, mask = cache.place(L) if cache else (0, "causal")
        # Both in one call, of whose many small operations on a CPU a small model's decoding has a tenth less.
        both = self.rope(mx.concatenate([queries, keys], axis=1), offset=offset)
        queries, keys = both[:, : self.num_heads], both[:, self.num_heads :]
        if cache:
            keys, values = cache.append(keys, values)
        attended = attend(queries, keys, values, queries.shape[-1] ** -0.5, mask, cache is not None)  # [B, H, L, d]
        return self.o_proj(attended.transpose(0, 2, 1, 3).reshape(B, L, -1))


class Cache:
    """The keys and values that one Attention has seen of B texts, so that reading a token costs one token. lengths: the
    texts' tokens read so far, [B] of NumPy, which whoever runs the model moves on for all blocks at once."""

    def __init__(self, config, lengths):
        self.lengths = lengths
        shape = (len(lengths), config.num_kv_heads, config.context_size, config.head_dim)
        self.keys, self.values = mx.zeros(shape), mx.zeros(shape)

    def place(self, L):
        """Where the next L tokens stand in their texts, and attention's mask for them."""
        if (self.lengths == self.lengths[0]).all():
            return int(self.lengths[0]), "causal" if L > 1 else None
        last = self.lengths[:, None] + np.arange(L)  # [B, L], what each may see
        return mx.array(self.lengths), mx.array(np.arange(self.lengths.max() + L) <= last[:, None, :, None])

    def append(self, keys, values):
        """Takes in the next L tokens' keys and values [B, K, L, d]; returns those of all tokens so far."""
        first, longest = int(self.lengths.min()), int(self.lengths.max()) + keys.shape[2]
        if first + keys.shape[2] == longest:
            self.keys[:, :, first:longest], self.values[:, :, first:longest] = keys, values
        else:  # a scatter, which takes longer
            rows, places = mx.arange(len(keys))[:, None], mx.array(self.lengths[:, None] + np.arange(keys.shape[2]))
            self.keys[rows, :, places], self.values[rows, :, places] = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        return self.keys[:, :, :longest], self.values[:, :, :longest]


# relu(x)² (So et al. 2021) trains as well as the others (PTB, dim 256, 250 steps: 5.64 nats; swiglu 5.68, gelu 5.78)
# and is nearly free on a CPU, where MLX's exp and erf are scalar (both passes of [1536, 4096] 8 ms; silu 165, gelu 320)
ACTIVATIONS = {"relu2": lambda x: mx.square(nn.relu(x)), "gelu": nn.gelu, "swiglu": nn.silu}


class MLP(nn.Module):
    """The feed-forward layer, [B, L, D] to [B, L, D]; swiglu (Shazeer 2020) has a gate."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        if config.mlp == "swiglu":
            self.gate_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def __call__(self, hidden):
        up, act = self.up_proj(hidden), self.activation
        return self.down_proj(act(self.gate_proj(hidden)) * up if "gate_proj" in self else act(up))


class Block(nn.Module):
    """Attention, then MLP, each normalized before and added to hidden [B, L, D]."""

    def __init__(self, config, index):
        super().__init__()
        self.index = index
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def __call__(self, hidden, cache=None, noise=()):
        hidden = hidden + dropout(self.self_attn(self.input_layernorm(hidden), cache), noise, 2 * self.index + 1)
        return hidden + dropout(self.mlp(self.post_attention_layernorm(hidden)), noise, 2 * self.index + 2)


class Transformer(nn.Module):
    """Token ids [B, L] to final hidden states [B, L, D]; put any head on it."""

    def __init__(self, config):
        super().__init__()
        self.checkpoint = False  # True: gradients keep each block's input alone and compute the rest again
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = [Block(config, i) for i in range(config.num_blocks)]
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)

    def __call__(self, tokens, caches=None, noise=()):
        hidden = dropout(self.embed_tokens(tokens).astype(self.norm.weight.dtype), noise, 0)
        for i, block in enumerate(self.layers):
            run = partial(block, cache=caches[i] if caches else None, noise=noise)
            hidden = (nn.utils.checkpoint(block, run) if self.checkpoint else run)(hidden)
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
        """caches: a Cache for each block, which the tokens continue; noise: see `dropout`; last: positions (0: all)."""
        hidden = self.model(tokens, caches, noise)[:, -last:]
        return self.lm_head(hidden) if self.config.untie else self.model.embed_tokens.as_linear(hidden)

    @property
    def head(self):
        """The output layer's matrix [V, D]: the embeddings, unless --untie gives it one of its own."""
        layer = self.lm_head if self.config.untie else self.model.embed_tokens
        if "scales" in layer:  # quantized
            return mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
        return layer.weight


class LoRALinear(nn.Module):
    """A linear layer that stays as it is, and an update of low rank to train (Hu et al. 2021): [..., I] to [..., O]."""

    def __init__(self, weight, rank, alpha):
        super().__init__()
        self.weight, self.scale = weight, alpha / rank  # [O, I]
        self.lora_a, self.lora_b = mx.zeros((rank, weight.shape[1])), mx.zeros((weight.shape[0], rank))

    def __call__(self, hidden):
        return hidden @ self.weight.T + (hidden @ self.lora_a.T) @ self.lora_b.T * self.scale


def add_lora(model, rank, alpha):
    """Puts a LoRALinear in the place of each linear layer of the blocks; nothing else is trained from then on."""
    replace = lambda layer: LoRALinear(layer.weight, rank, alpha) if isinstance(layer, nn.Linear) else layer
    for block in model.model.layers:
        block.update_modules(tree_map(replace, block.leaf_modules(), is_leaf=nn.Module.is_module))
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b"], strict=False)


def init_weights(model, seed):
    """Gives every trained parameter its first value: norms 1; matrices normal with deviation 1 / sqrt(inputs); 0 for
    an untied output layer, a LoRA update's second factor and what writes into the residual stream, so that each block
    begins as the identity. Embeddings are the output layer too: with the deviation 5 / dim the logit of the token just
    read begins near 5, all others near 0, so the first loss is near ln V. On PTB (dim 256, AdamW 3e-3) validation after
    250 steps was 5.64 nats with it, 5.57 with twice as much, 5.91 with a fifth, 5.76 with GPT-2's initialisation."""
    parameters = tree_flatten(model.trainable_parameters())
    for (name, parameter), key in zip(parameters, mx.random.split(mx.random.key(seed), len(parameters))):
        normal = mx.random.normal(parameter.shape, key=key)
        if name.endswith("norm.weight"):
            value = mx.ones_like(parameter)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", "lora_b")):
            value = mx.zeros_like(parameter)
        elif name.endswith("embed_tokens.weight"):
            value = normal * 5 / model.config.dim
        else:
            value = normal * parameter.shape[1] ** -0.5
        model.load_weights([(name, value)], strict=False)
    mx.eval(model.parameters())


# ---- Optimizer ------------------------------------------------------------------------------------------------------
# Muon's learning rate over AdamW's. On PTB (dim 256, batch 32, AdamW's at 3e-3) validation after 120 steps was 5.56
# nats, with AdamW alone 5.65; on characters (dim 128) ratios of 8 and 10 did as well.
MUON_RATE = 5


def make_optimizer(model, flags, streams=(mx.cpu,)):
    """AdamW (Loshchilov & Hutter 2019) in two groups, matrices with weight decay and norms without, its work dealt out
    over `streams`; with --optimizer muon the blocks' matrices go to Muon (Jordan et al. 2024), with the same decay."""
    adamw = partial(optim.AdamW, flags.learning_rate, betas=[0.9, 0.99], bias_correction=True)
    groups = [adamw(weight_decay=flags.weight_decay), adamw(weight_decay=0.0)]
    filters = [lambda name, weight: weight.ndim >= 2]
    if flags.optimizer == "muon":
        groups.insert(0, optim.Muon(flags.learning_rate, weight_decay=0.0))
        filters.insert(0, lambda name, weight: name.startswith("model.layers.") and weight.ndim >= 2)
    optimizer = optim.MultiOptimizer(groups, filters)
    optimizer.init(model.trainable_parameters())
    moments = [name for group in groups for name, _ in tree_flatten(group.state) if name.endswith(".v")]
    assert sorted(moments) == sorted(f"{name}.v" for name, _ in tree_flatten(model.trainable_parameters()))

    load = [0] * len(streams)

    def dealt(group, update, gradient, parameter, state):
        if isinstance(group, optim.Muon):  # MLX's adds the decay to the gradient
            parameter = parameter * (1 - group.learning_rate * flags.weight_decay / MUON_RATE)
        least = load.index(min(load))
        load[least] += parameter.size
        with mx.stream(streams[least]):
            return update(gradient, parameter, state)

    for group in groups:
        group.apply_single = partial(dealt, group, group.apply_single)
    return optimizer


def set_learning_rate(optimizer, rate):
    """Sets the rate of AdamW's groups; Muon's is MUON_RATE times that."""
    for group in optimizer.optimizers:
        group.learning_rate = rate * MUON_RATE if isinstance(group, optim.Muon) else rate


def learning_rate_at(iteration, flags):
    """The rate of step `iteration` (from 0): a linear warm-up over `lr_warmup` steps, then constant, or down to
    `min_lr` at `num_iters` by a half cosine or a line; 0 only where 0 is asked for."""
    least = flags.learning_rate / 10 if flags.min_lr is None else flags.min_lr
    done = max(0, iteration - flags.lr_warmup) / max(1, flags.num_iters - flags.lr_warmup)
    left = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[flags.lr_schedule]
    rate = flags.learning_rate - (flags.learning_rate - least) * (1 - left)
    return rate * min(1, (iteration + 1) / max(1, flags.lr_warmup))


# ---- Batches --------------------------------------------------------------------------------------------------------
class Batches:
    """Windows of a token array in a permuted order; endless, and a function of (seed, epoch, s) alone. Each epoch cuts
    the text into windows at another offset, so that no token is left out for good, and draws an order `perm` of them;
    `s` is the position in it. Raises UsageError for a text shorter than one window."""

    def __init__(self, tokens, context_size, batch_size, seed):
        if len(tokens) <= context_size:
            problem = f"the training text has {len(tokens):,} tokens, fewer than --context_size {context_size} needs"
            raise UsageError(f"{problem}: use a longer text or --context_size {max(1, len(tokens) - 1)}")
        self.tokens, self.context_size, self.batch_size, self.seed = tokens, context_size, batch_size, seed
        self.begin_epoch(0)

    def begin_epoch(self, epoch):
        random = np.random.default_rng([self.seed, epoch])
        self.epoch, self.s = epoch, 0
        self.offset = int(random.integers(min(self.context_size, len(self.tokens) - self.context_size)))
        windows = (len(self.tokens) - 1 - self.offset) // self.context_size
        self.perm = random.permutation(windows).astype(np.int32)

    def next(self):
        """Inputs and targets, [B, L] int32. An epoch's last, incomplete batch is dropped; too few windows repeat."""
        if self.s + self.batch_size > len(self.perm) and self.s > 0:
            self.begin_epoch(self.epoch + 1)
        order = self.perm.take(range(self.s, self.s + self.batch_size), mode="wrap").astype(np.int64)
        starts = self.offset + order * self.context_size
        self.s += self.batch_size
        rows = np.stack([self.tokens[start : start + self.context_size + 1] for start in starts])  # [B, L + 1]
        return mx.array(rows[:, :-1], mx.int32), mx.array(rows[:, 1:], mx.int32)


# ---- Loss and evaluation --------------------------------------------------------------------------------------------
def head_loss(hidden, head, targets, weights, *teacher, training=True):
    """Weighted sum of cross-entropies in nats, and its gradients by `hidden` and `head`, computed with it, so that of
    the logits [N, V] only a chunk exists at any time (as in Liger Kernel, Hsu et al. 2024). hidden: [N, D]; head:
    [V, D]; targets, weights: [N]; training: False where no gradients are asked for, so that MLX never computes them and
    no chunk waits for them. teacher: its hidden states [N, D'], head [V', D'] and [share, T]; so much of the loss is T²
    times the Kullback-Leibler divergence to what it predicts, both softened by temperature T (Hinton et al. 2015)."""
    answer_weights = weights * (1 - teacher[2][0]) if teacher else weights
    # Chunks of 2^23 logits cost nothing; with fewer than 128 rows the products of a large vocabulary become slow.
    chunks = -(-len(hidden) // max(128, 2**23 // len(head)))
    rows = -(-len(hidden) // chunks)
    loss, hidden_gradient, head_gradient = mx.array(0.0), [], None
    for start in range(0, len(hidden), rows):
        inputs, answers = hidden[start : start + rows], targets[start : start + rows]
        weight = answer_weights[start : start + rows, None]
        if start > 0:
            # On a CPU MLX dispatches operations far ahead of their computation and allocates their results then; idle
            # ones hold the next chunk back until this one is done (267,735 words: 2.5 chunks of memory, not 11).
            idle, *_ = mx.depends([mx.zeros(2)], [loss, hidden_gradient[-1], head_gradient] if training else [loss])
            for _ in range(0 if mx.default_device() == mx.gpu else 64):
                idle = mx.cumsum(idle)
            inputs, *_ = mx.depends([inputs], [idle])
        logits = (inputs @ head.T).astype(mx.float32)  # [rows, V]
        below = logits - logits.max(axis=-1, keepdims=True)
        powers, answer = exp(below), head[answers]
        total = powers.sum(axis=-1, keepdims=True)
        loss = loss + ((mx.log(total) - mx.take_along_axis(below, answers[:, None], axis=-1)) * weight).sum()
        # The gradient by the logits is (powers / total - one-hot answers) * weight, never written out.
        factor = weight / total  # [rows, 1]
        if teacher:
            states, their_head, (mixed, T) = teacher
            theirs = (states[start : start + rows] @ their_head.T)[:, : len(head)].astype(mx.float32)  # [rows, V]
            below = (scores - scores.max(axis=-1, keepdims=True) for scores in (theirs / T, logits / T))
            log_wanted, log_given = (scores - mx.log(exp(scores).sum(axis=-1, keepdims=True)) for scores in below)
            wanted, given = exp(log_wanted), exp(log_given)
            pull = mixed * T * weights[start : start + rows, None]  # [rows, 1]
            loss = loss + T * (pull * wanted * (log_wanted - log_given)).sum()
            powers, factor = powers * factor + pull * (given - wanted), mx.ones_like(factor)
        powers, factor = powers.astype(head.dtype), factor.astype(head.dtype)  # [rows, V], [rows, 1]
        hidden_gradient.append((powers @ head) * factor - answer * weight.astype(head.dtype))  # [rows, D]
        inputs = inputs * factor
        head_gradient = mx.addmm(head_gradient, powers.T, inputs) if start > 0 else powers.T @ inputs  # [V, D]
    states = hidden.astype(mx.float32) * answer_weights[:, None]  # [N, D]
    return loss, mx.concatenate(hidden_gradient), head_gradient.astype(mx.float32).at[targets].subtract(states)


trained_head_loss = mx.custom_function(head_loss)


@trained_head_loss.vjp
def head_loss_gradient(inputs, gradients, outputs):
    """The gradients that head_loss has computed already, times that of its loss."""
    _, head, *others = inputs
    scale = gradients[0].astype(head.dtype)
    return outputs[1] * scale, (outputs[2] * scale).astype(head.dtype), *map(mx.zeros_like, others)


def loss_sum(model, tokens, targets, weights=1.0, noise=(), training=True, teacher=None, mixture=None):
    """Cross-entropy in nats, summed over positions, or mixed with a teacher's. tokens, targets, weights: [B, L]."""
    hidden = model.model(tokens, noise=noise).flatten(0, 1)  # [B * L, D]
    weights = mx.broadcast_to(mx.array(weights), targets.shape).flatten()
    loss = trained_head_loss if training else partial(head_loss, training=False)
    theirs = (teacher.model(tokens).flatten(0, 1), teacher.head, mixture) if teacher else ()
    return loss(hidden, model.head.astype(hidden.dtype), targets.flatten(), weights, *theirs)[0]


def over_streams(streams, function, *arrays):
    """[function(*rows), ...] for a share of the rows of `arrays` on each stream: a stream of a CPU is a thread."""
    results = []
    for i, stream in enumerate(streams):
        rows = slice(len(arrays[0]) * i // len(streams), len(arrays[0]) * (i + 1) // len(streams))
        with mx.stream(stream):
            results.append(function(*(array[rows] for array in arrays)))
    return results


def evaluate(model, tokens, batch_size, interrupts=None, stride=None):
    """Mean nats a token over every token of `tokens` [N] but the first, each scored once; None if `interrupts` cut it
    short. Windows begin `stride` tokens apart, by default side by side; of an overlap only the new end counts."""
    L, count, group = model.config.context_size, len(tokens) - 1, ranks()  # who share the batches: see Ranks
    interrupts, stride = interrupts or Interrupts(), stride or L
    if group.rank() == 0:
        broadcast(interrupts, {"tokens": tokens}, "evaluate", batch_size=batch_size, stride=stride)
    starts = np.arange(0, max(count - L, 0) + stride, stride)
    starts = np.append(starts, np.full(-len(starts) % batch_size, count))  # fills up the last batch
    streams, loss = make_streams(batch_size, L), partial(loss_sum, model, training=False)
    score = mx.compile(lambda *batch: sum(over_streams(streams, loss, *batch)), inputs=[model.state])
    total, received = 0.0, None
    for batch in starts.reshape(-1, batch_size, 1)[group.rank() :: group.size()]:
        if received := interrupts.received:
            break
        places = batch + np.arange(L)  # [B, L]
        weights = (places < count) & ((places - batch >= L - stride) | (batch == 0))
        places = np.minimum(places, count - 1)
        total += score(*(mx.array(each, mx.int32) for each in (tokens[places], tokens[places + 1], weights))).item()
    if group.size() > 1:  # float64, as bytes
        mine = mx.array(np.frombuffer(np.array([total, received or 0]), np.uint8))
        totals, signals = np.array(mx.distributed.all_gather(mine)).view(np.float64).reshape(-1, 2).T
        total, received = totals.sum(), int(signals.max())
        interrupts.received = interrupts.received or received or None
        if group.rank() == 0:
            broadcast(interrupts)
    return None if received else total / count


def score_split(name, model, dataset, flags, interrupts=None, most=0):
    """Prints the score of a split, or of its first `most` tokens; returns the nats a token, None if interrupted."""
    split, began = getattr(dataset, name), time.perf_counter()
    tokens = split.tokens[: most + 1] if most else split.tokens
    nats = evaluate(model, tokens, flags.batch_size, interrupts, flags.evaluate and flags.eval_stride)
    if nats is not None:
        speed = f"{len(tokens) / (time.perf_counter() - began):,.0f} tokens/s"
        tqdm.write(f"{describe_score(name, nats, split, dataset.tokenizer)}, {speed}")
    return nats


def describe_score(name, nats, split, tokenizer):
    """One line with a split's score: per token, and in two units that do not depend on the tokenizer."""
    total = nats * len(split.tokens)
    a_token, a_word = (math.exp(min(mean, 99)) for mean in (nats, total / max(1, split.num_words)))
    line = f"{name} {nats:.4f} nats, perplexity {a_token:.2f} a token, {a_word:.2f} a word, "
    line += f"{total / math.log(2) / split.num_bytes:.4f} bits per byte"
    return line if tokenizer.unk is None else f"{line}, {split.num_unk / len(split.tokens):.2%} <unk>"


# ---- Checkpoints ----------------------------------------------------------------------------------------------------
# `<sha1>.safetensors` holds the parameters and is named by the SHA1 of its bytes; `<sha1>.metadata` (the same format)
# holds all else that a run is: optimizer state and `perm` as arrays, the tokenizer, and `record`, a JSON object with
# the flags, counters and scores. The header of the metadata names the SHA1 of its own bytes, taken with BLANK in place.
BLANK = "0" * 40


def write_safetensors(path, tree, metadata):
    """Writes and syncs a tree of arrays; returns the SHA1 of the file's bytes, which BLANK in the metadata becomes."""
    arrays, digest = dict(sorted(tree_flatten(tree))), hashlib.sha1()
    hasher = SimpleNamespace(write=lambda data: digest.update(data) or len(data), seek=None, tell=None, closed=False)
    mx.save_safetensors(hasher, arrays, metadata)
    sha1 = digest.hexdigest()
    with open(path, "wb") as file:
        mx.save_safetensors(file, arrays, {name: sha1 if text == BLANK else text for name, text in metadata.items()})
        file.flush()
        os.fsync(file.fileno())
    return sha1


def read_header(path):
    """The JSON header of a safetensors file, as bytes; of a damaged file, whatever stands there."""
    with open(path, "rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), os.path.getsize(path)))


def read_texts(path):
    """The record and the texts of a `.metadata` file, whose header alone is read. Of a damaged one any error comes."""
    texts = json.loads(read_header(path))["__metadata__"]
    if hashlib.sha1(texts["record"].encode()).hexdigest() != texts["record_sha1"]:
        raise ValueError("damaged header")
    return json.loads(texts["record"]), texts


def sha1_of(path, stated=BLANK):
    """SHA1 of a safetensors file's bytes, with BLANK in the place of the SHA1 that its header states."""
    with open(path, "rb") as file:
        header = file.read(8 + len(read_header(path)))
        digest = hashlib.sha1(header.replace(stated.encode(), BLANK.encode(), 1))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def find_damage(folder, id):
    """What is wrong with the files of checkpoint `id`, or None; their content is used after this. Raises RunError."""
    try:
        record, texts = read_texts(folder / f"{id}.metadata")
        if record["format_version"] != FORMAT_VERSION:
            raise RunError(f"checkpoint {id[:12]} is of another version of this program: use that one, or --new_model")
        for kind, sha1 in {"safetensors": id, "metadata": texts["sha1"]}.items():
            if sha1_of(folder / f"{id}.{kind}", sha1) != sha1:
                return f"its .{kind} does not have the SHA1 {sha1[:12]}"
        return None if record["id"] == id else f"its .metadata belongs to {record['id'][:12]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"


def list_checkpoints(folder, warn=False):
    """The records of the checkpoints in `folder`, the one saved last first; files of other programs are passed over."""
    records = []
    for path in Path(folder).glob("*.safetensors"):
        try:
            records.append(read_texts(path.with_suffix(".metadata"))[0] | {"id": path.stem})
        except (OSError, ValueError, KeyError, TypeError) as error:
            if warn and len(path.stem) == 40:
                print(f"Passing over {path.stem[:12]}: its .metadata cannot be read ({error})", file=sys.stderr)
    return sorted(records, key=lambda record: (record["saved"], record["iteration"]), reverse=True)


def describe(record):
    """The words by which a line names a checkpoint."""
    return f"{record['run']}, iteration {record['iteration']:,}, checkpoint {record['id'][:12]}"


def named_checkpoint(folder, records, identifier, flag="--identifier"):
    """The one of `records`, the newest first, that the flag means: by an id, its beginning, a run's name (its newest),
    "latest", or "best" (of the run saved last). Raises UsageError if none or several, RunError if it is damaged."""
    names = {record["run"]: [record] for record in reversed(records)}  # the newest of each run
    best = [record for record in records if record["id"] == (records[0]["best"] or {}).get("id")]
    found = (names | {"latest": records[:1], "best": best}).get(identifier)
    found = found or [record for record in records if record["id"].startswith(identifier)]
    if len(found) != 1:
        known = "; ".join(map(describe, (found or records)[:9])) or "none, train first"
        matches = "several checkpoints" if found else "no checkpoint"
        raise UsageError(f"{flag} {identifier!r} matches {matches}; name one (--list shows all): {known}")
    if damage := find_damage(folder, found[0]["id"]):
        raise RunError(f"checkpoint {found[0]['id'][:12]} of {flag} is damaged ({damage}): name another of --list")
    return found[0]


@contextlib.contextmanager
def locked(folder):
    """Holds the lock that every change in `folder` needs; makes renames in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_run(folder, name):
    """An open file that says this process trains run `name`, or None if another does; the lock dies with its holder."""
    file = open(folder / f".{name}.lock", "a")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file


def save_checkpoint(folder, run, id=None):
    """Saves a run as it stands and returns the checkpoint's id; with `id`, of weights saved before, the metadata alone.
    A full disk or a vanished folder is waited out: training state is in memory, and the last checkpoint is untouched.
    Raises RunError if an equal run, whose checkpoint has the same name, is being trained in the same folder."""
    for pause in itertools.chain((1, 2, 5, 10, 30), itertools.repeat(60)):  # seconds
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                return write_checkpoint(folder, run, id)
        except OSError as error:
            clean_folder(folder)
            tqdm.write(f"Saving to {folder} failed ({error}); next try in {pause} s. Ctrl+C twice gives the work up.")
            time.sleep(pause)


def write_checkpoint(folder, run, id):
    """One try. No checkpoint is ever there by halves: both files are complete on disk before one gets its name, the
    metadata gets its own first, and a checkpoint counts only once its .safetensors exists."""
    records, name = list_checkpoints(folder), run.record["run"]
    new = {kind: folder / f"{name}.{kind}.new" for kind in ("metadata", "safetensors")[: 1 if id else 2]}
    if id is None:
        id = write_safetensors(new["safetensors"], run.model.trainable_parameters(), {"format": "mlx"})
        equal = next((record["run"] for record in records if record["id"] == id), name)
        if equal != name and not lock_run(folder, equal):
            new["safetensors"].unlink()
            raise RunError(f"this run equals {equal}, which is being trained in {folder}: stop one of them")
    run.record |= {name: getattr(run.batches, name) for name in ("epoch", "offset", "s")}
    saved = max([time.time(), *(record["saved"] + 1e-3 for record in records)])  # even if the clock was set back
    run.record |= {"id": id, "saved": saved, "format_version": FORMAT_VERSION}
    texts = {"record": json.dumps(run.record), "tokenizer": json.dumps(run.tokenizer.to_dict()), "sha1": BLANK}
    texts["record_sha1"] = hashlib.sha1(texts["record"].encode()).hexdigest()  # so that listing need not read it all
    write_safetensors(new["metadata"], {"optimizer": run.optimizer.state, "perm": mx.array(run.batches.perm)}, texts)
    for kind in new:
        os.replace(new[kind], folder / f"{id}.{kind}")
    return id


def clean_folder(folder, run=None, keep=0):
    """Deletes the checkpoints of `run` but the newest `keep`, the best and those that other runs build on, and what
    killed saves left: under the lock, `.new` files and metadata alone are stale. What cannot go now goes next time."""
    with contextlib.suppress(OSError), locked(folder):
        records = list_checkpoints(folder)
        own = [record["id"] for record in records if run and record["run"] == run.record["run"]]
        needed = {id for record in records for _, id in record.get("uses", {}).values()}
        for id in own[keep:]:
            if id not in needed | {(run.record["best"] or {}).get("id")}:
                (folder / f"{id}.safetensors").unlink(missing_ok=True)  # so that its metadata counts no more
        for path in folder.iterdir():
            ours = re.fullmatch(r"\w+-[0-9a-f]{6}\.(safetensors|metadata|csv)\.new|[0-9a-f]{40}\.metadata", path.name)
            if ours and not path.with_suffix(".safetensors").exists():  # which no .new file has
                path.unlink()


def load_model(folder, record):
    """The model, a LoRA run's merged into its base, and the tokenizer of a checkpoint. Raises RunError without base."""
    _, texts = read_texts(folder / f"{record['id']}.metadata")
    model, weights = LanguageModel(Config(**record["config"])), mx.load(str(folder / f"{record['id']}.safetensors"))
    if rank := record["flags"].get("lora_rank"):
        adapters, weights = weights, dict(tree_flatten(open_used(folder, record, "init_from")[0].parameters()))
        for layer in [name.removesuffix(".lora_a") for name in adapters if name.endswith(".lora_a")]:
            update = adapters[f"{layer}.lora_b"] @ adapters[f"{layer}.lora_a"]
            weights[f"{layer}.weight"] += update * (record["flags"]["lora_alpha"] / rank)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model, tokenizer_from_dict(json.loads(texts["tokenizer"]))


def open_model(folder, name, flag):
    """The model, tokenizer and id of the checkpoint or Hugging Face folder `name`. Raises UsageError, RunError."""
    if os.path.isdir(name):
        return import_model(Path(name))
    record = named_checkpoint(folder, list_checkpoints(folder), name, flag)
    return *load_model(folder, record), record["id"]


def open_used(folder, record, flag):
    """The same for a model that the run of `record` was begun with. Raises RunError if it is not that one."""
    name, id = record["uses"][flag]
    needed = f"{record['run']} needs the model it was begun with, --{flag} {name} as it was, {id[:12]}"
    with explained(needed, UsageError, kind=RunError):
        found = open_model(folder, name, f"--{flag}")
        if found[2] != id:
            raise UsageError(f"it is {found[2][:12]} now")
        return found


# What these models are called at Hugging Face, by `mlp` and `qk_norm`, and what their config.json calls our Config.
COUNTERPARTS = {("swiglu", False): "Llama", ("swiglu", True): "Qwen3", ("relu2", False): "Arcee"}
THEIR_NAMES = {
    "vocab_size": "vocab_size", "context_size": "max_position_embeddings", "num_blocks": "num_hidden_layers",
    "dim": "hidden_size", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "mlp_dim": "intermediate_size", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
}  # fmt: skip


def import_model(path):
    """A Hugging Face folder's model and tokenizer, and its weights' SHA1 (or the SHA1s' own). Raises UsageError."""
    with explained(f"{path} holds no Llama, Qwen3 or Arcee model: name one, or see --list"):
        theirs = json.loads((path / "config.json").read_text())
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        kind = {name.lower(): kind for kind, name in COUNTERPARTS.items()}.get(theirs["model_type"])
        odd = [*filter(theirs.get, ("attention_bias", "mlp_bias", "use_sliding_window", "quantization"))]
        scaling = rope.get("rope_type", rope.get("type", "default"))
        odd += [f"model_type {theirs['model_type']}"] * (not kind) + [f"rope {scaling}"] * (scaling != "default")
        if odd:
            raise UsageError(f"this program has no {', '.join(odd)}")
        files = sorted(path.glob("*.safetensors"))
        weights = {name: weight.astype(mx.float32) for file in files for name, weight in mx.load(str(file)).items()}
        if theirs.get("tie_word_embeddings"):
            weights.pop("lm_head.weight", None)
        usual = {"num_key_value_heads": theirs["num_attention_heads"], "rms_norm_eps": 1e-6, "rope_theta": 1e4}
        fields = {ours: (usual | rope | theirs).get(name) for ours, name in THEIR_NAMES.items()}
        model = LanguageModel(Config(mlp=kind[0], qk_norm=kind[1], untie="lm_head.weight" in weights, **fields))
        model.load_weights(list(weights.items()))
        mx.eval(model.parameters())
        tokenizer = TOKENIZERS["bpe"]((path / "tokenizer.json").read_text())
        ids = [sha1_of(file) for file in files]
        return model, tokenizer, ids[0] if len(ids) == 1 else hashlib.sha1("".join(ids).encode()).hexdigest()


def load_run(folder, record, run):
    """Brings `run` to where the checkpoint of `record` was saved."""
    run.record |= record
    run.model.load_weights(str(folder / f"{record['id']}.safetensors"), strict=not record["flags"].get("lora_rank"))
    state = tree_unflatten(mx.load(str(folder / f"{record['id']}.metadata"), format="safetensors"))
    run.optimizer.state, run.batches.perm = state["optimizer"], np.array(state["perm"])
    vars(run.batches).update({name: record[name] for name in ("epoch", "offset", "s")})
    mx.eval(run.model.parameters(), run.optimizer.state)


# ---- Interrupts -----------------------------------------------------------------------------------------------------
class Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP into a question the training loop asks: `if interrupts.received: save and stop`.
    A second signal leaves at once, without saving. Python runs a handler only when the current `mx.eval` is over, so a
    thread reads the bytes that the interpreter writes to a wake-up pipe the moment a signal comes."""

    received = None  # the signal's number; without `with`, as one signal ends the program, it stays None

    def __enter__(self):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # One that the parent ignores (nohup, background jobs of scripts) stays ignored.
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self.handlers = {n: signal.signal(n, lambda *_: None) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
        threading.Thread(target=self.watch, args=[reader], daemon=True).start()
        return self

    def __exit__(self, _, error, traceback):
        os.close(signal.set_wakeup_fd(-1))  # which ends the thread
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        # Ctrl+C in a terminal also ends the compiler of a first step, evaluation or sample: nothing is unsaved then.
        if self.received and isinstance(error, RuntimeError) and not LAUNCHED:
            raise SystemExit(128 + self.received)

    def watch(self, reader):
        first = None  # when the first of this process came; another rank's may have been before
        while byte := os.read(reader, 1):
            number = byte[0]
            if first is None:
                self.received, first = self.received or number, time.monotonic()
                print("\nStopping after this step, then saving. Once more leaves without saving.", file=sys.stderr)
            elif time.monotonic() - first > 0.5:  # launchers pass on a signal that the terminal has sent already
                print("\nLeft without saving.", file=sys.stderr)
                os._exit(128 + number)
        os.close(reader)


class Lasting:
    """An output stream whose reader may leave (`| head`, a closed terminal) without stopping anything, least a save."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        self.stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # a full disk below a log file may have room again
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


# ---- Ranks: the processes that `mlx.launch` starts, on one machine or several, to train one model --------------------
# Rank 0 does all that a single process does. The others hold the same model and optimizer, take a share of the rows of
# each step and of the windows of each evaluation, and learn all they need, tokens too, from what rank 0 broadcasts.
LAUNCHED = "MLX_RANK" in os.environ or any(os.environ.get(n, "1") != "1" for n in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
LOST = "a rank failed or is gone ({}): the same line goes on from the last checkpoint"
LAUNCHER = os.getppid()  # another one later on means that it is gone


@lru_cache(None)
def ranks():
    """MLX's group of all ranks; of one process, which needs no engine, what is asked of such a group."""
    if not LAUNCHED:
        return SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    opened = lambda: {int(fd) for fd in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{fd}")}  # not listdir's own
    before, group = opened(), mx.distributed.init(strict=True)
    if "MLX_HOSTFILE" in os.environ:  # a ring, whose sockets are the new files
        threading.Thread(target=watch_ring, args=[opened() - before], daemon=True).start()
    return group


def watch_ring(sockets):
    """Ends a rank some seconds after its neighbour's end. MLX's ring raises an error then, but of four ranks one may
    wait forever (0.32.4: after 3 of 44 kills among two to four)."""
    poll = select.poll()
    for number in sockets:
        poll.register(number, getattr(select, "POLLRDHUP", 0))  # a hang-up and an error are always reported
    for number, _ in poll.poll(0):  # a socket that MLX keeps of an attempt to connect that came too early
        poll.unregister(number)
    poll.poll()
    time.sleep(10)
    print(f"{PARSER.prog}: {LOST.format('it closed its connection')}", file=sys.stderr)
    os._exit(1)


def broadcast(interrupts, arrays=None, order="check", **texts):
    """Rank 0's order, arrays and texts, by name, on every rank; a signal that came to any of them is then known to all.
    Raises RuntimeError once a rank is gone: MLX may notice that one message late, so what the ranks have computed
    together counts only after the next one, and before each save comes a "check"."""
    group, file = ranks(), io.BytesIO()
    if group.size() == 1:
        return
    if group.rank() == 0:
        arrays = {name: mx.array(array) for name, array in (arrays or {}).items()}
        mx.save_safetensors(file, arrays, {"order": order, "texts": json.dumps(texts)})
    received = interrupts.received or (signal.SIGHUP if os.getppid() != LAUNCHER else 0)
    size, received = mx.distributed.all_max(mx.array([file.tell(), received], mx.int64)).tolist()
    if not size:
        raise RuntimeError("rank 0 said nothing")
    padded = np.frombuffer(file.getvalue().ljust(size, b"\0"), np.uint8)  # a sum with zeros is exact in bytes
    content = io.BytesIO(bytes(mx.distributed.all_sum(mx.array(padded))))
    interrupts.received = interrupts.received or received or None
    arrays, texts = mx.load(content, format="safetensors", return_metadata=True)
    return texts["order"], arrays, json.loads(texts["texts"])


def lead(interrupts, flags, model, optimizer=None, teacher=None):
    """Gives the other ranks the model that is to be trained, or, without an optimizer, scored."""
    trees = {"model": model.parameters(), "optimizer": optimizer.state if optimizer else {}}
    trees |= {"teacher": teacher.parameters()} if teacher else {}
    for name, array in tree_flatten(trees):  # one by one, or all would be in memory thrice
        broadcast(interrupts, {name: array}, "keep")
    configs = [vars(each.config) for each in (model, teacher) if each]
    broadcast(interrupts, {}, "begin", flags=flags, configs=configs, gpu=mx.default_device() == mx.gpu)


def follow():
    """What the other ranks do: each order of rank 0 ("check" is none) up to its "end". Returns the exit status."""
    kept, run = {}, SimpleNamespace()
    with Interrupts() as interrupts:
        while True:
            match broadcast(interrupts):
                case "keep", arrays, _:
                    kept |= arrays
                case "begin", _, texts:
                    use_device(texts["gpu"])
                    tree, kept, flags = tree_unflatten(kept), {}, argparse.Namespace(**DEFAULTS | texts["flags"])
                    run.model, *teacher = [LanguageModel(Config(**config)) for config in texts["configs"]]
                    if flags.lora_rank:
                        add_lora(run.model, flags.lora_rank, flags.lora_alpha)
                    for model, name in zip((run.model, *teacher), ("model", "teacher")):
                        model.update(tree[name])
                    if "optimizer" in tree:
                        streams = make_streams(flags.batch_size, flags.context_size)
                        run.optimizer = make_optimizer(run.model, flags, streams)
                        run.optimizer.state = tree["optimizer"]
                        run.step = make_step(run.model, run.optimizer, flags, streams, *teacher)
                case "step", arrays, texts:
                    take_step(run, flags, texts["iteration"], arrays["tokens"], arrays["targets"])
                case "evaluate", arrays, texts:
                    evaluate(run.model, np.array(arrays["tokens"]), texts["batch_size"], interrupts, texts["stride"])
                case "end", *_:
                    return 0


# ---- Training -------------------------------------------------------------------------------------------------------
def use_device(gpu):
    """Makes the GPU or the CPU the default device; call it before anything is computed."""
    mx.set_default_device(mx.gpu if gpu else mx.cpu)
    if not gpu:  # graphs are computed breadth first, their streams side by side; else one stream waits for the other
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")


def make_streams(batch_size, context_size):
    """The streams that share a rank's rows of a batch. On a CPU each is a thread on a core of its own, its products
    too: two took 50 ms a step at dim 128 where one took 80. Shares have 256 positions at least, or products become
    small; one stream alone has all cores for them. A GPU has one; so has macOS, whose BLAS brings its own threads."""
    if mx.default_device() == mx.gpu or BLAS == "Accelerate":
        return [mx.default_stream(mx.default_device())]
    cores, rows = len(os.sched_getaffinity(0)), -(-batch_size // ranks().size())
    count = max(1, min(cores, rows, rows * context_size // 256))
    set_blas_threads(cores if count == 1 else 1)
    return [cpu_stream(i) for i in range(count)]


def make_step(model, optimizer, flags, streams, teacher=None):
    """The training step: tokens [N, L], targets [N, L] and, for dropout, rates [N] and keys [N, 2] -> mean loss and
    gradient norm. The N = batch_size * grad_accumulation rows are taken batch_size at a time, those shared out over
    ranks and `streams`. With bfloat16 all but the loss is computed in it; weights and optimizer state stay float32."""
    model.model.checkpoint = flags.checkpoint
    state, group = [model.state, optimizer.state], ranks()
    mixture = mx.array([flags.teacher_weight, flags.teacher_temperature])
    dtype = mx.bfloat16 if flags.dtype == "bfloat16" and mx.default_device() == mx.gpu else mx.float32

    def loss(weights, scale, tokens, targets, *noise):  # scale: of the sum over positions, to a mean
        # The embeddings stay in float32, or the many small gradients of a frequent token would be lost in its sum.
        cast = lambda name, weight: weight if "embed_tokens" in name else weight.astype(dtype)
        model.update(tree_map_with_path(cast, weights))
        return loss_sum(model, tokens, targets, scale, noise, True, teacher, mixture)

    @partial(mx.compile, inputs=[model.state])
    def losses_and_gradients(scale, *batch):
        weights = model.trainable_parameters()
        results = over_streams(streams, partial(mx.value_and_grad(loss), weights, scale), *batch)
        model.update(weights)
        return results  # of each stream

    @partial(mx.compile, inputs=state, outputs=state)
    def update(results):
        turn = itertools.cycle(streams)
        add = lambda *terms: reduce(partial(mx.add, stream=next(turn)), terms)
        loss, gradients = tree_map(add, *results)
        if group.size() > 1:  # in one message, so that no two ranks can differ in the order of several
            loss, gradients = nn.average_gradients((loss, gradients), group, all_reduce_size=2**62)
        gradients, norm = optim.clip_grad_norm(gradients, flags.grad_clip or math.inf)
        optimizer.update(model, gradients)
        return loss, norm

    def step(*batch):
        total = None
        for start in range(0, len(batch[0]), flags.batch_size):
            first, last = (start + flags.batch_size * rank // group.size() for rank in (group.rank(), group.rank() + 1))
            part = (array[first:last] for array in batch)
            results = losses_and_gradients(group.size() / batch[1].size, *part)
            total = tree_map(mx.add, total, results) if total else results
            if len(batch[0]) > flags.batch_size:  # or all parts would be in memory at once
                mx.eval(total)
        return update(total)

    return step


def make_noise(iteration, rows, flags):
    """Dropout's rates [B] and keys [B, 2] for step `iteration`, or () without dropout. Row r's key is a function of
    (seed, iteration, r) alone; the rate moves by a line from --dropout to --dropout_final at `num_iters`."""
    final = flags.dropout if flags.dropout_final is None else flags.dropout_final
    if not (flags.dropout or final):
        return ()
    random = np.random.default_rng([flags.seed, iteration, 1])
    rate = flags.dropout + (final - flags.dropout) * iteration / flags.num_iters
    return mx.full(rows, rate), mx.array(random.integers(0, 2**32, (rows, 2), np.uint32))


def take_step(run, flags, iteration, tokens, targets):
    """Step `iteration` of a run; returns the mean loss and the gradient norm."""
    set_learning_rate(run.optimizer, learning_rate_at(iteration, flags))
    loss, norm = run.step(tokens, targets, *make_noise(iteration, len(tokens), flags))
    mx.eval(loss, norm, run.model.state, run.optimizer.state)
    return loss.item(), norm.item()


def begin_run(flags, dataset, checkpoint, used, name):
    """A run where the record `checkpoint` was saved, or at its start: what is trained, on what, and its record so far.
    used: the models that --init_from and --teacher name, as `open_model` gives them."""
    base, teacher = (used[flag][0] if flag in used else None for flag in ("init_from", "teacher"))
    config = Config(**checkpoint["config"]) if checkpoint else make_config(flags, dataset.tokenizer.vocab_size, base)
    model = base or LanguageModel(config)
    model.config = config  # the context may be another one
    if flags.lora_rank:
        add_lora(model, flags.lora_rank, flags.lora_alpha)
    streams = make_streams(flags.batch_size, flags.context_size)
    optimizer = make_optimizer(model, flags, streams)
    batches = Batches(dataset.train.tokens, flags.context_size, flags.batch_size * flags.grad_accumulation, flags.seed)
    record = {"iteration": 0, "id": None, "scores": [], "best": None, "seconds": 0.0}
    run = SimpleNamespace(record=record, model=model, optimizer=optimizer, batches=batches, tokenizer=dataset.tokenizer)
    if checkpoint:
        load_run(flags.save_dir, checkpoint, run)
    elif not base or flags.lora_rank:
        init_weights(model, flags.seed)
    device = f"{mx.default_device().type.name}, {mx.device_info().get('device_name', '?')}, {os.cpu_count()} cores"
    needs = {flag: id for flag, (*_, id) in used.items() if flag == "teacher" or flags.lora_rank}  # of every leg
    record |= {
        "run": name, "flags": {flag: getattr(flags, flag) for flag in INHERITED}, "tokens_sha256": dataset.sha256,
        "uses": {flag: [path if os.path.isdir(path := getattr(flags, flag)) else id, id] for flag, id in needs.items()},
        "config": dataclasses.asdict(config), "parameters": sum(w.size for _, w in tree_flatten(model.parameters())),
        "command": sys.argv, "sources": SOURCES,
        # What the last bits of a result depend on: a run is exact as long as these stay the same.
        "versions": dict(MLX=mx.__version__, NumPy=np.__version__, BLAS=BLAS, device=device, streams=len(streams),
                         ranks=ranks().size()),
    }  # fmt: skip
    run.teacher, run.step = teacher, make_step(model, optimizer, flags, streams, teacher)
    return run


def train(flags, dataset, checkpoint, used, interrupts):
    """One run from its start, or from the record `checkpoint`, to `num_iters` or a signal; returns the exit status."""
    folder, tokenizer = flags.save_dir, dataset.tokenizer
    if flags.batch_size < (size := ranks().size()):
        raise UsageError(f"--batch_size {flags.batch_size} leaves some of the {size} ranks without a row: give more")
    # A checkpoint that --identifier names, and after which its run went on, is where another run branches off.
    newer = [r["run"] for r in list_checkpoints(folder) if flags.identifier and r["saved"] > checkpoint["saved"]]
    same = checkpoint and checkpoint["run"] not in newer
    name = checkpoint["run"] if same else f"{dataset.name}-{os.urandom(3).hex()}"
    if not (lock := lock_run(folder, name)):
        raise UsageError(f"{name} is being trained by another process: wait for it, or begin another with --new_model")
    if checkpoint and not (folder / f"{checkpoint['id']}.safetensors").exists():  # who held the lock has pruned it
        raise RunError(f"{name} went on while this line was waiting: type it again")
    clean_folder(folder)
    run = begin_run(flags, dataset, checkpoint, used, name)
    record, model, batches = run.record, run.model, run.batches
    lead(interrupts, record["flags"], model, run.optimizer, run.teacher)
    start = record["iteration"]
    print_start(flags, dataset, run, checkpoint or record)
    if start >= flags.num_iters:
        tqdm.write(f"Iteration {start:,} of --num_iters {flags.num_iters:,} is reached: a larger one extends the run.")

    bar = tqdm(total=flags.num_iters, initial=start, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    log = open_log(folder / f"{name}.csv", start, start in dict(record["scores"]))
    batch_tokens = batches.batch_size * flags.context_size
    steps_per_save = flags.steps_per_save or flags.steps_per_eval
    losses, seconds, trained = [], 0.0, 0.0  # since the last report; `trained`: in all, but for a first compiling step
    for iteration in range(start, flags.num_iters + 1):
        record["iteration"] = iteration
        timeout = flags.max_minutes is not None and trained >= 60 * flags.max_minutes
        finished, stopping = iteration == flags.num_iters, interrupts.received or timeout
        due = iteration >= flags.steps_per_eval and (finished or iteration % flags.steps_per_eval == 0)

        # Save, then evaluate, then add the score, then sample: what goes wrong in one costs none of those before it.
        save = iteration > start and (finished or stopping or due or iteration % steps_per_save == 0)
        if save:
            broadcast(interrupts)  # no rank was lost in the last step
            save_checkpoint(folder, run)
            clean_folder(folder, run, flags.keep)
            tqdm.write(f"saved {record['id']} at iteration {iteration:,}")
        if (due or timeout) and iteration not in [scored for scored, _ in record["scores"]]:
            nats = score_split("valid", model, dataset, flags, interrupts, flags.eval_tokens)
            if due and nats is not None:  # best and --patience must not depend on where --max_minutes ends a leg
                bits = nats / math.log(2) * len(dataset.valid.tokens) / dataset.valid.num_bytes
                log(iteration, "valid", nats, bits, "", "", iteration * batch_tokens, "", "", record["seconds"])
                record["scores"].append([iteration, nats])
                if record["best"] is None or nats < record["best"]["nats"]:
                    record["best"] = {"id": record["id"], "iteration": iteration, "nats": nats}
                if save or name == checkpoint["run"]:  # a branch leaves the checkpoint that it began from as it is
                    save_checkpoint(folder, run, record["id"])
        later = [scored for scored, _ in record["scores"] if record["best"]["iteration"] < scored]
        misses = sum(scored % flags.steps_per_eval == 0 for scored in later)  # an earlier leg's end does not count
        if save and not interrupts.received:
            tqdm.write("".join(Conversation(tokenizer, model).reply("", flags, flags.seed, interrupts)))
        if timeout:
            tqdm.write(f"--max_minutes {flags.max_minutes:g} are over at iteration {iteration:,}.")
        if flags.patience and misses >= flags.patience:
            tqdm.write(f"Stopped: no better score in {misses} evaluations (--patience); best: {record['best']['id']}")
            break
        if finished or timeout or (interrupts.received and (save or iteration == start)):
            break  # but a signal that came after the save waits for the next step

        began = time.perf_counter()
        tokens, targets = batches.next()
        broadcast(interrupts, {"tokens": tokens, "targets": targets}, "step", iteration=iteration)
        loss, norm = take_step(run, flags, iteration, tokens, targets)
        losses.append(loss)
        taken = time.perf_counter() - began
        seconds += taken
        if iteration > start:
            trained, record["seconds"] = trained + taken, record["seconds"] + taken

        if not math.isfinite(loss + norm):
            broadcast(interrupts)  # it is not a lost rank's
            problem = f"the loss or gradient of iteration {iteration + 1:,} is not finite, and nothing of it is saved"
            good = f"the last good checkpoint is {record['id'] or 'none yet'}"
            raise RunError(f"{problem}; {good}: go on with a lower --learning_rate or --grad_clip")
        if (iteration + 1) % flags.steps_per_report == 0:
            mean, rate = sum(losses) / len(losses), len(losses) / seconds  # steps a second
            report = f"loss {mean:.4f}  perplexity {math.exp(min(mean, 99)):.2f}  "
            report += f"lr {learning_rate_at(iteration, flags):.2e}  grad {norm:.2f}  "
            report += f"{rate * batch_tokens:,.0f} tokens/s  peak {mx.get_peak_memory() / 2**20:,.0f} MiB"
            bar.set_postfix_str(report)
            if bar.disable:
                left = tqdm.format_interval((flags.num_iters - iteration - 1) / rate)
                tqdm.write(f"{iteration + 1:,}/{flags.num_iters:,}  {report}  left {left}")
            bits = "" if flags.train_tokens else mean / math.log(2) * len(batches.tokens) / dataset.train.num_bytes
            values = learning_rate_at(iteration, flags), norm, (iteration + 1) * batch_tokens, rate * batch_tokens
            log(iteration + 1, "train", mean, bits, *values, mx.get_peak_memory() / 2**20, record["seconds"])
            losses, seconds = [], 0.0
        bar.update()
    bar.close()
    lock.close()
    if flags.eval_test and not interrupts.received:
        score_split("test", model, dataset, flags, interrupts)
    if interrupts.received:
        there = f"--identifier {name} goes on from there" if record["id"] else "nothing was saved yet"
        tqdm.write(f"Stopped at iteration {record['iteration']:,}; {there}.")
        return 128 + interrupts.received
    return 0


LOG = "iteration split loss bits_per_byte learning_rate gradient_norm tokens tokens_per_second peak_mib seconds".split()


def open_log(path, iteration, scored):
    """A function that appends a line of LOG to a run's file of comma-separated values. What the file has of iterations
    later than this one goes: they come again; so does a score of `iteration` itself, if it was not `scored`."""
    lines = [",".join(LOG)]
    with contextlib.suppress(OSError):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        rows = [row for row in rows if len(row) == len(LOG) and row[0].isdigit()]  # the last may be cut off
        lines += [",".join(row) for row in rows if int(row[0]) < iteration + (scored or row[1] == "train")]

    def append(*values):
        with contextlib.suppress(OSError):  # of a full disk: the run is worth more than its log
            with path.open("a") as file:
                print(*(f"{value:.6g}" if isinstance(value, float) else value for value in values), sep=",", file=file)

    with contextlib.suppress(OSError):
        path.with_suffix(".csv.new").write_text("\n".join(lines) + "\n")
        path.with_suffix(".csv.new").replace(path)
    return append


def print_start(flags, dataset, run, last):
    """One screen that says what is trained, on what, and where its files go. last: the record that is continued."""
    record, config, tokenizer, folder = run.record, run.model.config, dataset.tokenizer, flags.save_dir
    several = f", {ranks().size()} ranks" * (ranks().size() > 1)
    size = sum(array.nbytes for _, array in tree_flatten([run.model.trainable_parameters(), run.optimizer.state]))
    free, room, old, new = shutil.disk_usage(folder).free, size * (flags.keep + 2), last["versions"], record["versions"]
    splits = " / ".join(f"{len(split.tokens):,}" for split in (dataset.train, dataset.valid, dataset.test) if split)
    windows, rows = len(run.batches.perm), run.batches.batch_size
    trained = sum(weight.size for _, weight in tree_flatten(run.model.trainable_parameters()))
    few = f", of them {trained:,} trained" if trained < record["parameters"] else ""
    tqdm.write(
        f"run      {record['run']}, from iteration {record['iteration']:,} to {flags.num_iters:,}, seed {flags.seed}\n"
        f"model    {record['parameters']:,} parameters{few}: {config.num_blocks} blocks, dim {config.dim}, "
        f"{config.num_heads} heads ({config.num_kv_heads} for keys and values), {config.mlp} {config.mlp_dim}, "
        f"context {config.context_size}\n"
        f"data     {dataset.name}: {splits} tokens; vocabulary {tokenizer.vocab_size:,} by {tokenizer.kind} "
        f"({tokenizer.vocab_size - tokenizer.num_special:,} without special tokens)\n"
        f"steps    {rows} x {config.context_size} tokens each, {windows // rows or 1:,} an epoch; {flags.optimizer}\n"
        f"machine  {new['device']}{several}; MLX {new['MLX']}, matrix products by {BLAS}\n"
        f"files    {folder.absolute()}, {size / 2**20:,.0f} MiB a checkpoint, {free / 2**20:,.0f} MiB free"
    )
    if flags.batch_size % ranks().size():
        tqdm.write(f"--batch_size {flags.batch_size} does not divide evenly by {ranks().size()} ranks: some wait.")
    if windows < rows:
        tqdm.write("The text has fewer windows than a step's batch: they repeat within it.")
    if flags.dtype == "bfloat16" and not flags.gpu:
        tqdm.write("--dtype bfloat16 would be slower on a CPU, for which MLX has no fast code: it computes in float32.")
    if room > free:
        tqdm.write(f"Low on space: --keep {flags.keep}, the best and the next one need {room / 2**20:,.0f} MiB.")
    if BLAS == "reference BLAS" and not flags.gpu:
        tqdm.write("Slow matrix products: install OpenBLAS (apt install libopenblas0) or a compiler (apt install g++).")
    if changed := [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]:
        tqdm.write(f"Not as the checkpoint was made ({'; '.join(changed)}): exact resume holds in equal conditions.")


# ---- Sampling: functions of logits [B, V], then texts token by token ------------------------------------------------
def penalize(logits, texts, penalty):
    """Divides logits above 0 of the ids in the rows' texts by `penalty`, multiplies others (Keskar et al. 2019)."""
    if penalty == 1:
        return logits
    seen = np.zeros(logits.shape, bool)
    for row, text in enumerate(texts):
        seen[row, text] = True
    return mx.where(mx.array(seen), mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits, k):
    """All but the `k` largest at -inf; ties with the k-th stay. 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    kth = mx.min(mx.topk(logits, k, axis=-1), axis=-1, keepdims=True)
    return mx.where(logits < kth, -math.inf, logits)


def keep_top_p(logits, p):
    """All but the likeliest that together have probability `p`, at least one, at -inf (Holtzman et al. 2020)."""
    if p >= 1:
        return logits
    ascending = mx.sort(logits, axis=-1)
    before = 1 - mx.cumsum(mx.softmax(ascending, axis=-1), axis=-1)  # the probability of all larger ones
    least = mx.min(mx.where(before < p, ascending, math.inf), axis=-1, keepdims=True)
    return mx.where(logits < mx.minimum(least, ascending[..., -1:]), -math.inf, logits)


def keep_min_p(logits, p):
    """All that are less than `p` times as probable as the likeliest at -inf (Nguyen et al. 2024). 0 keeps all."""
    return logits if p == 0 else mx.where(logits < logits.max(axis=-1, keepdims=True) + math.log(p), -math.inf, logits)


def shape_logits(logits, flags, texts):
    """Logits [B, V] of what is sampled: the repetition penalty first, then temperature, top-k, top-p and min-p in this
    order, as in Hugging Face's transformers. Temperature 0 leaves the largest alone."""
    logits = penalize(logits.astype(mx.float32), texts, flags.repetition_penalty)
    if flags.temperature < 1e-6:  # 0, or so little that dividing by it overflows
        return mx.where(mx.arange(logits.shape[-1]) == logits.argmax(axis=-1, keepdims=True), 0, -math.inf)
    return keep_min_p(keep_top_p(keep_top_k(logits / flags.temperature, flags.top_k), flags.top_p), flags.min_p)


class Decoder:
    """A model and the texts it reads, B lists of at least one token each, which may grow and be shortened. Keys and
    values are kept. A text that outgrows the context is read on from the last half of it, passed again, so that logits
    are always those of a fresh pass over the tokens from `starts` on."""

    def __init__(self, model, texts):
        self.model, self.texts = model, texts
        self.starts, self.lengths = np.zeros((2, len(texts)), np.int32)  # of the windows; of what is read of them
        self.caches = [Cache(model.config, self.lengths) for _ in model.model.layers]
        self.proposed = self.accepted = 0  # tokens, as a draft

    def shorten(self, length):
        """Takes back what stands in the texts beyond `length`."""
        for text in self.texts:
            del text[length:]
        self.lengths[:] = np.minimum(self.lengths, length - self.starts)

    def logits(self, count=1):
        """Logits [B, count, V] of what follows each text's last `count` tokens."""
        context_size = self.model.config.context_size
        for row, text in enumerate(self.texts):
            if not count <= len(text) - self.starts[row] <= context_size:
                self.lengths[row], self.starts[row] = 0, max(0, len(text) - max(count, context_size // 2))
            self.lengths[row] = min(self.lengths[row], len(text) - self.starts[row] - count)
        windows = [text[start:] for text, start in zip(self.texts, self.starts)]
        fresh = np.array([len(window) for window in windows]) - self.lengths
        for row in np.flatnonzero((fresh > count) & (fresh.min() < fresh.max())):  # each but its end, then the ends
            alone = Decoder(self.model, [windows[row][:-count]])
            alone.logits()
            for cache, other in zip(self.caches, alone.caches):
                cache.keys[row], cache.values[row] = other.keys[0], other.values[0]
            self.lengths[row] = len(windows[row]) - count
        tokens = mx.array([window[length:] for window, length in zip(windows, self.lengths)])
        logits = self.model(tokens, self.caches, last=count)
        self.lengths += tokens.shape[1]
        return logits

    def draw(self, flags, seeds, count=1):
        """Ids [B, count] drawn of what follows each text's last `count` tokens: functions of a row's seed and of their
        place in its text, not of other rows."""
        logits = self.logits(count).flatten(0, 1)  # [B * count, V]
        rows = zip(self.texts, self.starts, seeds)
        places = [(text, start, seed, len(text) - i) for text, start, seed in rows for i in reversed(range(count))]
        logits = shape_logits(logits, flags, [text[start:end] for text, start, _, end in places])
        keys = mx.array([[seed, end] for *_, seed, end in places], mx.uint32)
        return np.array(mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(logits, keys)).reshape(-1, count)


def generate(decoder, max_tokens, flags, seeds, draft=None, length=4):
    """Yields `max_tokens` times the next ids of the decoder's texts, [B] ints, and appends them there. With one text
    `draft` can be another decoder of it, which proposes up to `length` tokens; `decoder` reads them in one pass and
    keeps those that it draws itself. Both draw by the same random numbers, so that they agree as often as their
    distributions allow, and the text is the same as without a draft (Daliri, Musco & Suresh 2024)."""
    end, proposals = len(decoder.texts[0]) + max_tokens, []
    while (known := len(decoder.texts[0])) < end:
        if draft:
            room = decoder.model.config.context_size - (known - decoder.starts[0])  # or its window would move
            proposals = [id for [id] in generate(draft, min(length, room, end - known - 1), flags, seeds)]
        ids = decoder.draw(flags, seeds, len(proposals) + 1)  # [B, 1 + proposals]
        accepted = next((i for i, id in enumerate(proposals) if id != ids[0, i]), len(proposals))
        if draft:
            draft.proposed, draft.accepted = draft.proposed + len(proposals), draft.accepted + accepted
            for each in (decoder, draft):
                each.shorten(known + accepted)
        for text, id in zip(decoder.texts, ids[:, accepted].tolist()):
            text.append(id)
        yield from ids[:, : accepted + 1].T.tolist()


class Conversation:
    """A text that a model, and perhaps a draft, continues with what is added to it between."""

    def __init__(self, tokenizer, model, draft=None):
        self.tokenizer, self.text, self.speed = tokenizer, [], 0.0  # tokens a second of the last reply
        self.decoders = [Decoder(each, [self.text]) for each in (model, draft) if each]

    def reply(self, prompt, flags, seed, interrupts=None):
        """Adds a line of its own and yields what follows piece by piece, each once no later token can change it."""
        if unknown := self.tokenizer.unknown(prompt):
            print(f"Not in the vocabulary, read as <unk>: {' '.join(unknown)}", file=sys.stderr)
        self.text += self.tokenizer.encode("\n" + prompt).tolist() if self.text else first_ids(self.tokenizer, prompt)
        decode, ids, known, times = self.tokenizer.decode, self.text[:], len(self.text), []
        shown, (first, *draft) = len(decode(ids)), self.decoders
        try:
            for [token] in generate(first, flags.max_tokens, flags, [seed], *draft):
                times.append(time.perf_counter())
                ids.append(token)
                if not (text := decode(ids)).endswith("\ufffd"):  # which may be the first bytes of a character
                    yield text[shown:]
                    ids = ids[-1:]  # all that the next token's text can depend on
                    shown = len(decode(ids))
                if interrupts and interrupts.received:
                    return
            yield decode(ids)[shown:]
        finally:
            for decoder in self.decoders:
                decoder.shorten(known + len(times))  # without what was proposed when the reader left
            self.speed = (len(times) - 1) / (time.perf_counter() - times[0]) if times else 0.0

    def describe_speed(self):
        """Tokens a second of the last reply, and how often the draft was right."""
        line = f"{self.speed:,.1f} tokens/s"
        for draft in self.decoders[1:]:
            rate = draft.accepted / max(1, draft.proposed)
            line += f", {rate:.0%} of the draft's {draft.proposed:,} proposals accepted"
        return line


# ---- Prompts --------------------------------------------------------------------------------------------------------
SETTABLE = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed"]
COMMANDS = """/set NAME VALUE   changes a sampling flag: /set temperature 0.8
/reset            forgets the conversation
/stats            shows tokens/s after each reply, or no longer
/quit             leaves, as Ctrl+D does; Ctrl+C ends a reply"""


def first_ids(tokenizer, prompt):
    """A prompt's ids; where it has none, the end of the text before or, without such a token, of the line before."""
    ids = tokenizer.encode(prompt).tolist()
    return ids or ([tokenizer.eos] if tokenizer.eos is not None else tokenizer.encode("\n").tolist())


def talk(folder, checkpoint, flags):
    """--inference, --prompt or --prompts_file with this checkpoint, and with that of --draft. Raises UsageError."""
    id, (model, tokenizer) = checkpoint["id"], load_model(folder, checkpoint)
    models = [model]
    if flags.quantize:
        quantize(model, flags.quantize, packed=flags.gpu)
    if flags.draft:
        draft, its, _ = open_model(folder, flags.draft, "--draft")
        if its.to_dict() != tokenizer.to_dict():
            raise UsageError(f"--draft {flags.draft} has another tokenizer than {id[:12]}: name one of equal data")
        models.append(draft)
    if flags.inference:
        print(describe(checkpoint), file=sys.stderr)
        return converse(tokenizer, models, flags)
    if flags.attention:
        plot_attention(model, tokenizer, flags.prompt, flags.attention)
    elif flags.prompts_file:
        answer_file(tokenizer, model, id, flags)
    else:  # so many continuations of --prompt, and nothing else, on stdout
        for i in range(flags.num_samples):
            conversation = Conversation(tokenizer, *models)
            print(end="-" * 15 + "\n" if i else "")  # as nanoGPT does
            for piece in conversation.reply(flags.prompt, flags, flags.seed + i):
                print(piece, end="", flush=True)
            print(flush=True)
        print(conversation.describe_speed(), file=sys.stderr)
    print(describe(checkpoint), file=sys.stderr)


def converse(tokenizer, models, flags):
    """Answers each line of stdin with its continuation, in the light of all lines and answers before. Lines that begin
    with / are COMMANDS. Ctrl+C ends a reply; at the prompt it, or Ctrl+D, the session."""
    for model in models:  # compiles what MLX compiles, before Ctrl+C means the end of a reply
        mx.eval(Decoder(model, [[0]]).logits())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.reconfigure(errors="surrogateescape")
    stats, conversation = False, Conversation(tokenizer, *models)
    if question := "> " * sys.stdin.isatty():
        import readline  # noqa: F401 (gives input() line editing and history)
    try:
        while (line := input(question)) != "/quit":
            match line.split() if line.startswith("/") else []:
                case ["/set", name, value] if name in SETTABLE:
                    try:
                        PARSER.parse_args([f"--{name}={value}"], flags)
                    except UsageError as error:
                        print(error, file=sys.stderr)
                case ["/reset"]:
                    conversation = Conversation(tokenizer, *models)
                case ["/stats"]:
                    stats = not stats
                case [_, *_]:
                    print(COMMANDS, file=sys.stderr)
                case []:
                    with contextlib.suppress(KeyboardInterrupt):
                        for piece in conversation.reply(line, flags, flags.seed):
                            print(piece, end="", flush=True)
                    print(flush=True)
                    if stats:
                        print(conversation.describe_speed(), file=sys.stderr)
    except (EOFError, KeyboardInterrupt):
        print(end="\n" if question else "")


def answer_file(tokenizer, model, id, flags, batch_size=16):
    """Continues each line of --prompts_file --num_samples times, many together, each time a line of JSON in --output or
    on stdout. An --output that was begun is continued. Raises UsageError."""
    with explained(f"--prompts_file {flags.prompts_file} must be UTF-8, --output writable", OSError, ValueError):
        prompts = Path(flags.prompts_file).read_text("utf-8").removesuffix("\n").split("\n")
        prompts = [prompt for prompt in prompts for _ in range(flags.num_samples)]
        jobs = [{"prompt": prompt, "seed": flags.seed + i, "checkpoint": id} for i, prompt in enumerate(prompts)]
        out, begun = append_lines(flags.output, jobs) if flags.output else (os.fdopen(os.dup(1), "wb"), [])
    with out:
        for start in range(len(begun), len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            texts = [first_ids(tokenizer, job["prompt"]) for job in batch]
            shown = [len(tokenizer.decode(text)) for text in texts]
            steps = list(generate(Decoder(model, texts), flags.max_tokens, flags, [job["seed"] for job in batch]))
            for job, text, known, tokens in zip(batch, texts, shown, zip(*steps)):
                line = job | {"completion": tokenizer.decode(text)[known:], "tokens": tokens}
                out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                out.flush()


def quantize(model, bits, packed):
    """Rounds every matrix to `bits` in groups of 64, or of 32 where 64 does not divide its rows; returns which. Unless
    `packed`, they are spread out again: on a CPU products with packed ones are slow. Raises UsageError."""
    matrices = {name: weight for name, weight in tree_flatten(model.parameters()) if weight.ndim == 2}
    group = 32 if any(matrix.shape[1] % 64 for matrix in matrices.values()) else 64
    with explained(f"--quantize {bits} needs a model in which 32 divides --dim and --mlp_dim"):
        parts = {name: mx.quantize(matrix, group, bits) for name, matrix in matrices.items()}
    before, after = (sum(array.nbytes for _, array in tree_flatten(each)) / 2**20 for each in (matrices, parts))
    print(f"Quantized to {bits} bits: the matrices' {before:,.1f} MiB would be {after:,.1f}", file=sys.stderr)
    if packed:
        nn.quantize(model, group, bits)
    else:
        model.update(tree_unflatten([(name, mx.dequantize(*part, group, bits)) for name, part in parts.items()]))
    mx.eval(model.parameters())
    return group


# ---- Tools ----------------------------------------------------------------------------------------------------------
def list_runs(folder):
    """Prints the runs in `folder`, the one saved last first: the flags that tell them apart, then their checkpoints."""
    records = list_checkpoints(folder, warn=True)
    print(f"{len(records)} checkpoints in {folder}")
    for name in dict.fromkeys(record["run"] for record in records):
        own = [record for record in records if record["run"] == name]
        flags, best = own[0]["flags"], (own[0]["best"] or {}).get("id")
        differing = [flag for flag in flags if any(record["flags"].get(flag) != flags[flag] for record in records)]
        line = f"{name}: {own[0]['parameters']:,} parameters, iteration {own[0]['iteration']:,} of "
        line += " ".join([f"{flags['num_iters']:,}", *(f"--{flag} {flags[flag]}" for flag in differing)])
        print(textwrap.fill(line, 100, subsequent_indent="    "))
        for record in own:
            score = {i: f"{nats:.4f}" for i, nats in record["scores"]}.get(record["iteration"], "not scored")
            marks = ", latest" * (record is records[0]) + ", best" * (record["id"] == best)
            line = f"    {record['id'][:12]}  iteration {record['iteration']:>9,}  {score:>10}"
            print(f"{line}  {tqdm.format_interval(time.time() - record['saved']):>8} old{marks}")


def predict_memory(config, flags, parameters, streams):
    """Bytes at the peak of a training step's two halves on a CPU: of activations, kept from forward for backward, and
    of gradients, each stream's with their sum and the clipped one. The factors, in floats for each position, were fit
    to 25 models (dim 128 to 512, context 48 to 256, 257 to 50,257 tokens, two streams), within 7 %."""
    B, L, D, V = flags.batch_size, config.context_size, config.dim, config.vocab_size
    a_block = (14.3 if config.qk_norm else 9.9) * D + 2.2 * config.num_kv_heads * config.head_dim
    a_block += {"relu2": 3.6, "swiglu": 5.3, "gelu": 4.7}[config.mlp] * config.mlp_dim + 1.55 * config.num_heads * L
    chunk = min(-(-B * L // streams), max(128, 2**23 // V))  # rows of logits in memory at once, see head_loss
    activations = B * L * config.num_blocks * a_block + streams * V * (2.8 * chunk + 1.1 * D)
    return round(4 * activations), 4 * parameters * max(4, streams + 2)


def run_benchmark(flags, config, batches):
    """--benchmark: what a model weighs, costs and reaches on this machine, in real training steps; a line of JSON last.
    Memory is in bytes, speed in floating-point operations and tokens a second."""
    model, streams = LanguageModel(config), make_streams(flags.batch_size, flags.context_size)
    init_weights(model, flags.seed)
    optimizer = make_optimizer(model, flags, streams)
    parts = {"embeddings": "embed", "attention": r"attn\.\w_proj", "mlp": "mlp", "norms": "norm", "output": "lm_head"}
    weights = tree_flatten(model.parameters())
    modules = {part: sum(w.size for name, w in weights if re.search(names, name)) for part, names in parts.items()}
    # A multiplication and an addition for each weight of a matrix, and for each element of queries, keys and values
    # with each position of the window; backward twice as many, for the gradients by inputs and by weights.
    matrices = modules["attention"] + modules["mlp"] + config.vocab_size * config.dim
    forward = 2 * matrices + 4 * config.num_blocks * config.num_heads * config.head_dim * config.context_size
    activations, gradients = predict_memory(config, flags, sum(modules.values()), len(streams))
    moments = sum(array.nbytes for _, array in tree_flatten(optimizer.state))
    lasting = {"weights": 4 * sum(modules.values()), "optimizer": moments}
    step, (tokens, targets) = make_step(model, optimizer, flags, streams), batches.next()
    noise = make_noise(0, len(tokens), flags)
    train_once = lambda: mx.eval(step(tokens, targets, *noise), model.state, optimizer.state)
    train_once()  # compiles
    mx.reset_peak_memory()
    speed, peak = tokens.size / min(timeit.repeat(train_once, number=1, repeat=5)), mx.get_peak_memory()
    square = mx.random.normal((2048, 2048))
    product = lambda: mx.eval(over_streams(streams, lambda rows: rows @ square, square))
    flops = 2 * 2048**3 / min(timeit.repeat(product, number=1, repeat=6))
    make_streams(1, 1)  # decoding has all cores
    steps = generate(Decoder(model, [[0]]), 33, flags, [flags.seed])
    result = {
        "parameters": modules, "flops_per_token": {"forward": forward, "backward": 2 * forward},
        "memory": lasting | {"activations": activations, "gradients": gradients},
        "predicted_peak": sum(lasting.values()) + max(activations, gradients),  # the one goes as the other comes
        "measured_peak": peak, "tokens_per_second": speed, "matrix_flops": flops,
        "share_of_matrix_speed": 3 * forward * speed / flops,
        "decoded_per_second": 32 / timeit.timeit(lambda: list(steps), lambda: next(steps), number=1),
    }  # fmt: skip
    for name, value in result.items():
        numbers = value if isinstance(value, dict) else {"": value}
        print(f"{name:<22}", ", ".join(f"{part} {round(number, 2):,}".strip() for part, number in numbers.items()))
    print(json.dumps(result))


def plot_runs(folder, names, path):
    """--plot: losses of the runs in `folder` against iterations and against minutes of training. Raises UsageError."""
    import matplotlib.figure

    logs = [log for log in sorted(folder.glob("*.csv")) if log.stem in (names or [log.stem])]
    logs = [log for log in logs if log.open(errors="replace").readline().strip() == ",".join(LOG)]  # and no other's
    if not logs:
        raise UsageError(f"no log of such a run is in {folder}: name its folder with --save_dir")
    figure = matplotlib.figure.Figure(figsize=(12, 5), layout="constrained")
    by_iteration, by_minute = figure.subplots(1, 2, sharey=True)
    for i, log in enumerate(logs):
        rows = list(csv.DictReader(log.open(errors="replace")))
        for split, alpha, marker in (("train", 0.4, None), ("valid", 1, "o")):
            own = [(row["iteration"], row["seconds"], row["loss"]) for row in rows if row["split"] == split]
            iterations, seconds, losses = np.array(own, float).reshape(-1, 3).T
            for axis, places in ((by_iteration, iterations), (by_minute, seconds / 60)):
                axis.plot(places, losses, color=f"C{i}", alpha=alpha, marker=marker, label=f"{log.stem} {split}")
    by_iteration.set(xlabel="iteration", ylabel="loss (nats a token)")
    by_minute.set(xlabel="minutes of training")
    figure.legend(*by_minute.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_figure(figure, path)


def save_figure(figure, path):
    """Writes a matplotlib figure in the format that the path's ending names. Raises UsageError."""
    with explained(f"cannot write {path}: name another file"):
        figure.savefig(os.path.expanduser(path), dpi=min(150, 2**14 / max(figure.get_size_inches())))  # at most 2^14
    print(f"The picture is in {path}", file=sys.stderr)


def plot_attention(model, tokenizer, prompt, path):
    """--attention: the weights of each block (rows) and head (columns) for the prompt's tokens. Raises UsageError."""
    import matplotlib.figure

    tokens = first_ids(tokenizer, prompt)[-model.config.context_size :]
    labels, size = [repr(tokenizer.decode([token]))[1:-1] for token in tokens], max(2.5, 0.22 * len(tokens))  # inches
    weights = attention_weights(model, tokens)  # [blocks, H, L, L]
    blocks, heads = weights.shape[:2]
    figure = matplotlib.figure.Figure(figsize=(size * heads, size * blocks), layout="constrained")
    for (i, j), axis in np.ndenumerate(figure.subplots(blocks, heads, squeeze=False)):
        axis.imshow(weights[i, j], vmin=0, vmax=1, cmap="Blues")
        axis.set_title(f"block {i}, head {j}", fontsize="small")
        axis.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=6, parse_math=False)
        axis.set_yticks(range(len(tokens)), labels, fontsize=6, parse_math=False)
    save_figure(figure, path)


def attention_weights(model, tokens):
    """[blocks, H, L, L] of NumPy: how much each position looks at each other."""
    seen, plain = [], attend

    def watched(queries, keys, values, scale, *rest):
        places = mx.broadcast_to(mx.eye(len(tokens)), (*keys.shape[:3], len(tokens)))  # values that show the weights
        seen.append(plain(queries, keys, places, scale, "causal", True))
        return plain(queries, keys, values, scale, *rest)

    globals()["attend"] = watched
    try:
        model(mx.array([tokens]))
    finally:
        globals()["attend"] = plain
    return np.array(mx.concatenate(seen))


def run_cases(folder, records, flags, top_k):
    """--cases: how likely checkpoints find the expected continuations in a YAML file; a table, JSON with --output. A
    case is passed if each expected token is among the `top_k` likeliest. Raises UsageError."""
    import yaml

    needed = "is no YAML list of prompt and expected, like - {prompt: a, expected: b}, or --output no file to write"
    with explained(f"--cases {flags.cases} {needed}"):
        cases = yaml.load(Path(flags.cases).expanduser().read_text("utf-8"), yaml.BaseLoader)  # all scalars are text
        cases = [(str(case["prompt"]), str(case["expected"])) for case in cases]
        open(flags.output or os.devnull, "a").close()  # fails before the work, not after it
    results = []
    for record in records:
        if damage := find_damage(folder, record["id"]):
            print(f"Passing over {describe(record)}: {damage}", file=sys.stderr)
            continue
        model, tokenizer = load_model(folder, record)
        print(describe(record))
        for prompt, expected in cases:
            wanted = first_ids(tokenizer, expected)[-model.config.context_size :]
            text = (first_ids(tokenizer, prompt) + wanted)[-model.config.context_size - 1 :]
            logits, wanted = model(mx.array([text[:-1]]), last=len(wanted))[0], mx.array(wanted)  # [expected, V]
            worst = (logits > mx.take_along_axis(logits, wanted[:, None], axis=-1)).sum(axis=-1).max().item() + 1
            chance = math.exp(-nn.losses.cross_entropy(logits, wanted, reduction="sum").item())
            best = [tokenizer.decode([token]) for token in mx.argsort(-logits[0])[:top_k].tolist()]
            result = {"checkpoint": record["id"], "prompt": prompt, "expected": expected, "rank": worst}
            known = not tokenizer.unknown(expected)  # <unk> may be likely, but is not what was expected
            results.append(result | {"probability": chance, "top": best, "passed": worst <= top_k and known})
            line = f"  {'pass' if results[-1]['passed'] else 'FAIL'} rank {result['rank']:>6,} {chance:>9.2e}  "
            print(f"{line}{prompt[-24:]!r} {expected[:16]!r}: {' '.join(map(repr, best))}"[:100])
        print(f"  {sum(r['passed'] for r in results[-len(cases) :])} of {len(cases)} within the {top_k} likeliest")
    if flags.output:
        Path(flags.output).write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", "utf-8")


def export_model(model, tokenizer, folder, bits):
    """--export: a folder for transformers and mlx_lm (of Arcee's relu2, for transformers alone). Raises UsageError."""
    config, folder = model.config, Path(os.path.expanduser(folder))
    if not (name := COUNTERPARTS.get((config.mlp, config.qk_norm))):
        shape = f"--mlp {config.mlp}" + " --qk_norm" * config.qk_norm
        raise UsageError(f"--export: Hugging Face has no model with {shape}: train one with --mlp swiglu")
    theirs = {their: getattr(config, our) for our, their in THEIR_NAMES.items()} | {
        "architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "tie_word_embeddings": not config.untie,
        "hidden_act": "relu2" if config.mlp == "relu2" else "silu", "attention_bias": False, "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}, "dtype": "float32",
        "bos_token_id": None, "eos_token_id": tokenizer.eos,
    }  # fmt: skip
    if bits:
        theirs["quantization"] = {"group_size": quantize(model, bits, packed=True), "bits": bits}
    text, about = tokenizer_json(tokenizer)
    chat = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    files = {
        "config": theirs, "tokenizer_config": about | chat | {"model_max_length": config.context_size},
        "generation_config": {"eos_token_id": tokenizer.eos, "do_sample": True, "temperature": 0.5, "top_k": 50},
    }  # fmt: skip
    with explained(f"cannot write to --export {folder}: name a folder of yours"):
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", model.parameters(), {"format": "mlx"})
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(content, indent=2))
        (folder / "tokenizer.json").write_text(text, "utf-8")
    print(f"{name}ForCausalLM and its tokenizer are in {folder}", file=sys.stderr)


# ---- Command line ---------------------------------------------------------------------------------------------------
def number(kind, least, most=math.inf):
    """An argparse type: an int or float from `least` to `most`."""

    def convert(text):
        if least <= (value := kind(text)) <= most and value < math.inf:
            return value
        limit = f" and at most {most}" if most < math.inf else ""
        raise argparse.ArgumentTypeError(f"must be at least {least}{limit}, not {text}")

    convert.__name__ = "whole number" if kind is int else "number"  # which argparse's message names
    return convert


class Parser(argparse.ArgumentParser):
    """One that ends with a line instead of its whole usage, and names the flag that was perhaps meant."""

    def error(self, message):
        near = difflib.get_close_matches(message.split(" ")[2], self._option_string_actions, 1, 0.75)
        near += ["after a flag, in quotes"] * ("--" not in message)
        raise UsageError(f"{message} ({'? '.join([*near, '--help lists all flags'])})")


def make_parser():
    """The parser. Every default is written here and nowhere else."""
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "usage": "python main.py [flags]"}
    parser = Parser(**layout, description=__doc__.partition("\nThe whole")[0], allow_abbrev=False)
    count, size, rate = number(int, 0, 2**31 - 1), number(int, 1, 2**31 - 1), number(float, 0)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    run = parser.add_argument_group("run").add_argument
    run("--dataset", default="ptb", choices=[name for name in CORPORA if name != "text"], help="corpus to train on")
    run("--text", nargs="+", metavar="PATH", help="train on your own UTF-8 files, folders and patterns instead")
    run("--valid_text", nargs="+", metavar="PATH", help="validate on these (default: a part of --text)")
    run("--test_text", nargs="+", metavar="PATH", help="test on these")
    run("--valid_fraction", type=number(float, 0.001, 0.5), default=0.1, help="share of --text for validation")
    run("--train_tokens", type=size, help="train on the first so many tokens (default: all)")
    run("--tokenizer", default="auto", choices=["auto", *TOKENIZERS], help="auto: what is usual for the corpus")
    run("--vocab_size", type=number(int, 257, 2**31 - 1), default=32000, help="of --tokenizer bpe")
    run("--save_dir", help="folder for checkpoints and corpora (default: a RAM disk with room, else ~/.cache)")
    run("--mirror", metavar="BASE", help="address or folder that holds <dataset>/<file>, instead of the usual hosts")
    run("--identifier", nargs="+", metavar="ID", help="checkpoint id or its beginning, run name, latest or best")
    run("--new_model", **switch, help="begin a new run even if one could be resumed")
    run("--num_iters", type=size, default=100000, help="steps to train in all")
    run("--max_minutes", type=number(float, 0), help="stop after so much training, without evaluations and saves")
    run("--config", metavar="FILE", help="YAML file of flags, flat or in the groups of this help; typed flags win")
    run("--preset", choices=list(PRESETS), help="dim, heads, blocks and context of a usual size")
    run("--gpu", **switch, help="compute on the GPU")
    run("--seed", type=count, default=42, help="of weights, batches, dropout and samples")
    model = parser.add_argument_group("model").add_argument
    model("--context_size", type=size, default=48, help="tokens a prediction can look back on")
    model("--num_blocks", type=number(int, 1, 2**12), default=4, help="transformer blocks")
    model("--dim", type=number(int, 1, 2**16), default=1024, help="model dimension")
    model("--num_heads", type=size, default=8, help="query heads")
    model("--num_kv_heads", type=size, help="key and value heads (default: num_heads)")
    model("--mlp", choices=list(ACTIVATIONS), default="relu2", help="feed-forward layer")
    model("--mlp_dim", type=number(int, 1, 2**18), help="its width (default: 4 dim; swiglu: 8/3 dim rounded up to 64)")
    model("--qk_norm", **switch, help="normalize queries and keys, with learned weights")
    model("--untie", **switch, help="an output layer of its own instead of the embeddings")
    model("--dropout", type=number(float, 0, 0.9), default=0.0, help="rate on embeddings and on what each block adds")
    training = parser.add_argument_group("training").add_argument
    training("--batch_size", type=number(int, 1, 2**20), default=32, help="windows computed at once")
    training("--grad_accumulation", type=size, default=1, help="batches to a step")
    training("--learning_rate", type=rate, default=3e-4, help="after warm-up")
    training("--min_lr", type=rate, help="where the schedule ends (default: a tenth of the learning rate)")
    training("--weight_decay", type=rate, default=1e-5, help="on matrices")
    training("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: Muon for the blocks' matrices")
    training("--lr_warmup", type=count, default=200, help="steps to reach the learning rate")
    training("--lr_schedule", choices=["constant", "cosine", "linear"], default="constant", help="after warm-up")
    training("--grad_clip", type=rate, default=1.0, help="largest gradient norm; 0: no limit")
    training("--dropout_final", type=number(float, 0, 0.9), help="--dropout moves by a line to this at the last step")
    training("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation, on a GPU")
    training("--checkpoint", **switch, help="gradient checkpointing: less memory, more time")
    training("--patience", type=size, help="stop after so many evaluations without a better one")
    reports = parser.add_argument_group("reports").add_argument
    reports("--steps_per_report", type=size, default=10, help="steps between two report lines")
    reports("--steps_per_eval", type=size, default=1000, help="steps between two evaluations")
    reports("--eval_tokens", type=count, default=100000, help="validation tokens scored in training; 0: all")
    reports("--steps_per_save", type=size, help="steps between two checkpoints (default: steps_per_eval)")
    reports("--eval_test", **switch, help="score the whole test split at the end")
    reports("--keep", type=size, default=3, help="newest checkpoints to keep, and the best")
    sampling = parser.add_argument_group("sampling").add_argument
    sampling("--inference", **switch, help="talk to a checkpoint")
    sampling("--prompt", metavar="TEXT", help="print what follows it")
    sampling("--prompts_file", metavar="FILE", help="continue each of its lines, many together; answers in JSON Lines")
    sampling("--output", metavar="FILE", help="file for answers, continued if it was begun (default: stdout)")
    sampling("--max_tokens", type=size, default=200, help="length of a continuation")
    sampling("--num_samples", type=size, default=1, help="continuations of each prompt; each has the next seed")
    sampling("--temperature", type=number(float, 0, 100), default=0.5, help="0: always the likeliest token")
    sampling("--top_k", type=count, default=50, help="draw from the k likeliest tokens; 0: all")
    sampling("--top_p", type=number(float, 0, 1), default=1.0, help="draw from the likeliest with so much probability")
    sampling("--min_p", type=number(float, 0, 1), default=0.0, help="and not below this share of the likeliest's")
    sampling("--repetition_penalty", type=number(float, 0.01, 100), default=1.0, help="makes tokens of the text rarer")
    sampling("--draft", metavar="ID", help="a smaller checkpoint that proposes tokens, for speed alone")
    reuse = parser.add_argument_group("reuse").add_argument
    reuse("--init_from", metavar="MODEL", help="begin with a checkpoint's weights or those of a Hugging Face folder")
    reuse("--lora_rank", type=size, help="train adapters of this rank only, with --init_from")
    reuse("--lora_alpha", type=number(float, 0), help="their scale, times the rank (default: twice the rank)")
    reuse("--teacher", metavar="MODEL", help="learn from its predictions, too: a checkpoint or a Hugging Face folder")
    reuse("--teacher_weight", type=number(float, 0, 1), default=0.5, help="share of the teacher in the loss")
    reuse("--teacher_temperature", type=number(float, 0.01, 100), default=2.0, help="softens both predictions")
    reuse("--quantize", type=int, choices=[4, 8], help="bits of a weight in sampling, --evaluate and --export")
    reuse("--export", metavar="DIR", help="write a checkpoint as a Hugging Face folder")
    tools = parser.add_argument_group("tools").add_argument
    tools("--evaluate", choices=["valid", "test"], help="score the whole split with a checkpoint")
    tools("--eval_stride", type=size, help="windows so many tokens apart, for a longer context (default: context_size)")
    tools("--benchmark", **switch, help="what the model to be trained weighs, costs and reaches on this machine")
    tools("--cases", metavar="FILE", help="YAML list of prompt and expected: their ranks, by checkpoint (--identifier)")
    tools("--plot", metavar="FILE", help="picture of the losses of all runs in the folder, or of --identifier")
    tools("--attention", metavar="FILE", help="picture of what each head looks at in --prompt")
    tools("--list", **switch, help="list the runs and checkpoints in the folder")
    return parser


PARSER = make_parser()
GROUPS = {group.title: [flag.dest for flag in group._group_actions] for group in PARSER._action_groups[2:]}
DEFAULTS = vars(PARSER.parse_args([]))
for flag in PARSER._actions[1:]:  # all but --help. From here on what PARSER returns is what was typed
    shown = f" (default: {flag.default})" if flag.default else ""
    flag.help = flag.help.removesuffix(" (default: %(default)s)") + shown  # which older BooleanOptionalActions append
    flag.default = argparse.SUPPRESS
# What makes two command lines mean two different runs, and what a resumed run takes from its checkpoint.
DATA = ["dataset", "text", "valid_text", "test_text", "valid_fraction", "train_tokens", "tokenizer", "vocab_size"]
SHAPING = [*DATA, "seed", "optimizer", *GROUPS["model"], "init_from", "lora_rank", "lora_alpha", "teacher"]
INHERITED = [*SHAPING, "num_iters", *GROUPS["training"], *GROUPS["reports"], "teacher_weight", "teacher_temperature"]

MODES = "inference prompt prompts_file evaluate export list cases plot benchmark new_model".split()
EXCLUSIVE = [("dataset", "text"), ("identifier", "new_model"), *itertools.combinations(MODES, 2)]
PARTNERS = {  # without one of which a flag would have no effect
    "valid_text": "text identifier", "test_text": "text identifier", "output": "prompts_file cases",
    "draft": "prompt inference", "attention": "prompt", "quantize": "prompt prompts_file inference evaluate export",
}  # fmt: skip


def resolve(flags):
    """Replaces values that stand for others: `auto`, relative paths, and the defaults that depend on other flags."""
    absolute = lambda path: os.path.abspath(os.path.expanduser(path))
    for name in ("text", "valid_text", "test_text"):
        setattr(flags, name, getattr(flags, name) and list(map(absolute, getattr(flags, name))))
    for name in ("init_from", "teacher"):
        if getattr(flags, name) and os.path.isdir(path := absolute(getattr(flags, name))):
            setattr(flags, name, path)
    flags.dataset = "text" if flags.text else flags.dataset
    flags.tokenizer = CORPORA[flags.dataset][0] if flags.tokenizer == "auto" else flags.tokenizer
    flags.num_kv_heads = flags.num_kv_heads or flags.num_heads
    flags.mlp_dim = flags.mlp_dim or (-(-flags.dim * 8 // 192) * 64 if flags.mlp == "swiglu" else 4 * flags.dim)
    if flags.lora_rank and flags.lora_alpha is None:
        flags.lora_alpha = 2 * flags.lora_rank
    return flags


def read_config(path, typed):
    """The flags in a YAML file as if they were typed, without what a typed flag excludes. Raises UsageError."""
    import yaml

    settings, arguments = {}, []
    with explained(f"--config {path} is no YAML file of flags like dim: 8"):
        for name, value in yaml.safe_load(Path(path).expanduser().read_text("utf-8")).items():
            settings |= value if name in GROUPS and isinstance(value, dict) else {name: value}
        if unknown := sorted(settings.keys() - DEFAULTS.keys() | settings.keys() & {"config"}):
            raise UsageError(f"no flag is named {', '.join(unknown[:9])} (--help lists all)")
        for name, value in settings.items():
            if isinstance(value, bool):
                name, value = name if value else f"no-{name}", []
            if value is not None and {"dataset": "text", "text": "dataset"}.get(name) not in typed:
                arguments += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
        return vars(PARSER.parse_args(arguments))


def choose_checkpoint(folder, flags, typed, using):
    """The record of the checkpoint to go on from or, if `using`, to use, its files verified; None for a new run.
    Without --identifier it is the one saved last that agrees with each shaping flag typed (not --seed if `using`: that
    is the samples') and, in training, the dataset; if damaged, an older one of its run. Raises UsageError, RunError."""
    records = [] if flags.new_model else list_checkpoints(folder, warn=True)
    records = [record | {"flags": DEFAULTS | record["flags"]} for record in records]  # a flag may be younger
    wanted = {name: getattr(flags, name) for name in SHAPING if name in typed and not (using and name == "seed")}
    if flags.identifier is not None:
        checkpoint = named_checkpoint(folder, records, flags.identifier)
        for name in wanted:
            if checkpoint["flags"][name] != wanted[name]:
                problem = f"--{name} {wanted[name]} contradicts --identifier, which has {checkpoint['flags'][name]}"
                raise UsageError(f"{problem}: leave --{name} out, or begin a new run with --new_model")
        return checkpoint
    wanted |= {} if using else {"dataset": flags.dataset}
    candidates = [record for record in records if wanted.items() <= record["flags"].items()]
    for record in candidates:
        if record["run"] == candidates[0]["run"]:
            if not (damage := find_damage(folder, record["id"])):
                return record
            print(f"Passing over {describe(record)}: {damage}", file=sys.stderr)
    if candidates:
        raise RunError(f"no intact checkpoint of {candidates[0]['run']} is left: --new_model begins a new run")
    if records and not using:
        others = ", ".join(list(dict.fromkeys(record["run"] for record in records))[:5])
        tqdm.write(f"A new run; in {folder} are {others} (--list shows all, --identifier NAME goes on with one)")


def open_origins(folder, flags, typed, checkpoint):
    """The models that --init_from and --teacher name, by flag, and their tokenizer, which is to be the text's, too.
    Fills in the model flags that --init_from decides. Raises UsageError where a typed flag or the two contradict."""
    wanted = {flag: getattr(flags, flag) for flag in ("init_from", "teacher") if getattr(flags, flag)}
    if not wanted:
        return {}, {}
    if checkpoint:
        used = {flag: open_used(folder, checkpoint, flag) for flag in checkpoint["uses"] if not flags.evaluate}
        return used, {"tokenizer": json.loads(read_texts(folder / f"{checkpoint['id']}.metadata")[1]["tokenizer"])}
    used = {flag: open_model(folder, name, f"--{flag}") for flag, name in wanted.items()}
    (first, (model, tokenizer, _)), *others = used.items()
    if any(its.to_dict() != tokenizer.to_dict() for _, (_, its, _) in others):
        raise UsageError(f"--teacher {flags.teacher} has another tokenizer than --{first}: name one with the same")
    decided = {"tokenizer": tokenizer.kind} | (vars(model.config) if first == "init_from" else {})
    for name in sorted(decided.keys() & set(SHAPING) - {"vocab_size"}):
        if name in typed and name != "context_size" and typed[name] != decided[name]:
            contradiction = f"--{name} {typed[name]} contradicts --{first}, which has {decided[name]}"
            raise UsageError(f"{contradiction}: leave --{name} out")
        setattr(flags, name, typed.get(name, decided[name]))
    return used, {"tokenizer": tokenizer.to_dict()}


def read_line(argv):
    """What the command line asks for, {flag: value}: typed, in the file of --config, or meant by --preset. Raises
    UsageError where two flags contradict or one has no effect."""
    typed = vars(PARSER.parse_args(argv))
    if "config" in typed:
        typed = read_config(typed["config"], typed) | typed
    if "preset" in typed:
        typed = dict(zip(("dim", "num_heads", "num_blocks", "context_size"), PRESETS[typed["preset"]])) | typed
    if typed.get("tokenizer") == "auto":
        del typed["tokenizer"]  # it asks for none
    asked = {name for name, value in typed.items() if value is not False}
    for pair in EXCLUSIVE:
        if asked.issuperset(pair):
            raise UsageError(f"--{pair[0]} and --{pair[1]} exclude each other: leave one out")
    for name, partners in PARTNERS.items():
        if name in asked and not asked.intersection(partners.split()):
            raise UsageError(f"--{name} goes with --{partners.replace(' ', ' or --')}: give that, too, or neither")
    if len(typed.get("identifier", [])) > 1 and not asked & {"cases", "plot"}:
        raise UsageError("--identifier takes one name; several go with --cases and --plot")
    return typed


def execute(argv):
    """Does what the command line says; returns the exit status: 0 done, 1 failed, 2 usage, 128 + n after signal n."""
    try:
        typed, remedy = read_line(argv), "train a model first, or name its folder with --save_dir"
        names = typed.get("identifier", [])
        typed |= {"identifier": names[0]} if names else {}
        flags = resolve(argparse.Namespace(**DEFAULTS | typed))
        if flags.gpu and not mx.is_available(mx.gpu):
            raise UsageError("--gpu: MLX sees no GPU; leave it out, or install MLX for yours: pip install mlx[cuda13]")
        use_device(flags.gpu)
        talking = flags.inference or flags.prompt is not None or flags.prompts_file
        using = talking or flags.evaluate or flags.export  # a checkpoint, whatever its corpus
        folder = open_folder(flags.save_dir, writing=not (using or flags.list or flags.cases or flags.plot))
        if flags.cases or flags.plot:
            if not (records := list_checkpoints(folder, warn=True)):
                raise UsageError(f"no checkpoint is in {folder}: {remedy}")
            named = [named_checkpoint(folder, records, name) for name in names]
            if flags.plot:
                return plot_runs(folder, [record["run"] for record in named], flags.plot)
            return run_cases(folder, named or records, flags, typed.get("top_k") or 5)

        if flags.list:
            with locked(folder):  # so that none goes while it is listed
                return list_runs(folder)
        checkpoint = choose_checkpoint(folder, flags, typed, using)
        if using and not checkpoint:
            raise UsageError(f"no such checkpoint in {folder}: {remedy}")
        if flags.export:
            export_model(*load_model(folder, checkpoint), flags.export, flags.quantize)
            return print(describe(checkpoint), file=sys.stderr)
        if talking:
            return talk(folder, checkpoint, flags)

        if checkpoint:
            old = checkpoint["flags"]
            for name in INHERITED:
                if name in typed and old.get(name) != getattr(flags, name):
                    tqdm.write(f"changed  --{name} from {old.get(name)} to {getattr(flags, name)}")
                    if name == "num_iters" and (old["lr_schedule"] != "constant" or old["dropout_final"] is not None):
                        tqdm.write("         which stretches the schedules of learning rate and dropout")
            flags = resolve(argparse.Namespace(**DEFAULTS | old | typed))
        if (least := flags.min_lr or 0) > flags.learning_rate:
            raise UsageError(f"--min_lr {least} is above --learning_rate {flags.learning_rate}: give a lower one")
        for name, partner in {"lora_rank": "init_from", "lora_alpha": "lora_rank"}.items():
            if getattr(flags, name) and not getattr(flags, partner):
                raise UsageError(f"--{name} goes with --{partner}: give that, too, or neither")
        flags.save_dir = folder
        used, vocabulary = open_origins(folder, flags, typed, checkpoint)
        data = {name: getattr(flags, name) for name in DATA if name != "dataset"} | vocabulary
        dataset = load_dataset(flags.dataset, folder, **data, mirror=flags.mirror, say=tqdm.write)
        if checkpoint and checkpoint["tokens_sha256"] != dataset.sha256:
            raise UsageError(f"the training text of {checkpoint['run']} has changed: --new_model begins a run on it")
        if (flags.evaluate == "test" or flags.eval_test) and not dataset.test:
            raise UsageError(f"{dataset.name} has no test split: name files for it with --test_text")
        if flags.evaluate:
            model, _ = load_model(folder, checkpoint)
            if (flags.eval_stride or 0) > (most := model.config.context_size):
                raise UsageError(f"--eval_stride {flags.eval_stride} would leave tokens out: at most {most}")
            print(describe(checkpoint), file=sys.stderr)
            for bits in filter(None, (32, flags.quantize)):
                if bits < 32:
                    quantize(model, bits, packed=flags.gpu and not LAUNCHED)
                lead(Interrupts(), {}, model)
                score_split(flags.evaluate, model, dataset, flags)
            return 0
        if flags.benchmark:
            if LAUNCHED:
                raise UsageError("--benchmark measures one process: start it without mlx.launch")
            config = Config(**checkpoint["config"]) if checkpoint else make_config(flags, dataset.tokenizer.vocab_size)
            batches = Batches(dataset.train.tokens, flags.context_size, flags.batch_size, flags.seed)
            return run_benchmark(flags, config, batches)
        with Interrupts() as interrupts:
            return train(flags, dataset, checkpoint, used, interrupts)
    except (UsageError, RunError, OSError, ImportError) as error:
        missing = isinstance(error, ImportError)  # a package that one function alone needs
        line = f"{error}{': pip install -r requirements.txt' * missing}"
        print(f"{PARSER.prog}: {' '.join(line.splitlines())}", file=sys.stderr)
        return 2 if missing or isinstance(error, UsageError) else 1


def main(argv=None):
    """The program; returns the exit status. Of several ranks the first does what the line says, the others follow."""
    try:
        if ranks().rank() > 0:
            use_device("--gpu" in sys.argv)  # rank 0, which alone may have read a --config, says it again
            return follow()
        status = execute(argv)
        broadcast(Interrupts(), order="end")
        return status or 0
    except RuntimeError as error:
        if not LAUNCHED:
            raise
        print(f"{PARSER.prog}: {LOST.format(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.stdin = sys.stdin or open(os.devnull)  # None where it was closed from the start
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    sys.exit(main())
