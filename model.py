"""The model: a fast BLAS for it, its shape, layers, first weights, loss and optimizer, and its way to other programs.

    model = LanguageModel(Config(vocab_size=257, context_size=128, num_blocks=4, dim=128, num_heads=4, num_kv_heads=4,
                                 mlp="relu2", mlp_dim=512))
    init_weights(model, seed=42)  # until then the weights are MLX's defaults
    logits = model(mx.array([[1, 2, 3]]))  # tokens [B, L] -> [B, L, V]; loss_sum is what main.py trains it by

Shapes are written in these letters: B rows of a batch, L positions, D model dimension, H query heads, K key and value
heads, d dimension of a head (D / H), S positions that are looked at, V vocabulary, N any number. A linear layer from I
to O numbers has a matrix [O, I], as in PyTorch. MLX is lazy: operations build a graph, which mx.eval computes.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from datasets import CACHE, TOKENIZERS, UsageError, explained


# ---- A fast BLAS: on Linux it has to be loaded before MLX. The model itself begins with Configuration ---------------
# C. MLX calls cblas_sgemm by rows, with `order` 101; 111 is a matrix as it stands, 112 transposed, as in x @ weight.T.
# `gemm` is the fast BLAS's own, set in use_fast_blas; the loop is for at most 8 rows times such a transposed matrix.
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
    the reference BLAS (6 GFLOP/s where OpenBLAS reaches 190), but whichever library with global symbols is loaded first
    wins: here a forwarder to the system's BLAS or to the one inside NumPy's wheel, whose names and integers differ (the
    forwarder passes long integers, which a BLAS of ints reads as well). It computes one thing itself, a few rows times
    a matrix, which is what decoding does: as fast as memory is read, where OpenBLAS takes 3 times as long."""
    if sys.platform != "linux":
        return "Accelerate"  # macOS's own, which MLX uses
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
            if forwarder := compile_forwarder():  # loaded before `path` below, so its cblas_sgemm is the one found
                ctypes.c_void_p.in_dll(forwarder, "gemm").value = ctypes.cast(gemm, ctypes.c_void_p).value
            elif path in numpys:  # MLX would not find NumPy's names by itself
                break
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # its other functions, for set_blas_threads too
            name = "NumPy's OpenBLAS" if path in numpys else os.path.basename(path)
            with contextlib.suppress(AttributeError):  # OpenBLAS has other kernels, and roundings, for each kind of CPU
                core = blas["scipy_openblas_get_corename64_" if path in numpys else "openblas_get_corename"]
                core.restype = ctypes.c_char_p  # else ctypes would take the pointer for an int
                name += f" ({core().decode()})"
            return name
    return "reference BLAS"  # print_start in main.py then says what to install


def compile_forwarder():
    """BLAS_FORWARDER as a library, compiled once for each kind of CPU by the C compiler; None where that fails."""
    cpu = re.search("^(flags|Features).*", Path("/proc/cpuinfo").read_text(), re.M)  # a cache may serve several CPUs
    path = CACHE / f"blas-{hashlib.sha1(f'{BLAS_FORWARDER}{cpu and cpu[0]}'.encode()).hexdigest()[:12]}.so"
    vectors = ["-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]  # or sums stay scalar
    for options in ([*vectors, "-fopenmp"], vectors, []):  # what one compiler knows another may not
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if not path.exists():
                CACHE.mkdir(parents=True, exist_ok=True)
                command = ["cc", "-shared", "-fPIC", "-O3", *options, "-x", "c", "-", "-o", f"{path}.{os.getpid()}"]
                subprocess.run(command, input=BLAS_FORWARDER.encode(), check=True, stderr=subprocess.DEVNULL)
                os.replace(command[-1], path)  # never half a library, even if two processes compile
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # visible to MLX, which is loaded later


def set_blas_threads(count):
    """Lets a matrix product use `count` threads: 1 where several streams share the cores (main.py: make_streams)."""
    openblas = "openblas_set_num_threads", "scipy_openblas_set_num_threads64_"
    for name in (*openblas, "MKL_Set_Num_Threads", "bli_thread_set_num_threads"):
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None)[name](count)  # None: among all that this process has loaded


BLAS = use_fast_blas()  # kept in checkpoints: another one rounds otherwise

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten


# ---- Configuration --------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    """What shapes the weights and what they compute; saved in checkpoints. Raises UsageError for misfits."""

    vocab_size: int  # V
    context_size: int  # positions of a training window, and the most that a Cache holds
    num_blocks: int
    dim: int
    num_heads: int  # H, of queries
    num_kv_heads: int  # K, of keys and values: H / K query heads share each
    mlp: str  # a key of ACTIVATIONS
    mlp_dim: int  # hidden units of an MLP; swiglu has so many gates, too
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, before RoPE
    untie: bool = False  # the output layer has a matrix of its own, not the embeddings
    rope_theta: float = 10000.0  # RoPE's wavelengths go from 2 pi positions to nearly 2 pi times this
    norm_eps: float = 1e-5  # added to the mean square in every RMSNorm
    head_dim: int = None  # d; None: dim / num_heads

    def __post_init__(self):
        if self.head_dim:  # of a checkpoint, which was checked once, or an imported model, where H * d need not be D
            return
        D, H, K = self.dim, self.num_heads, self.num_kv_heads
        if D % (2 * H):  # RoPE rotates pairs, so a head's dimension is even
            fit = 2 * H * max(1, round(D / (2 * H)))
            raise UsageError(f"--dim {D} is no multiple of 2 * --num_heads {H}: try --dim {fit}")
        if H % K:
            raise UsageError(f"--num_kv_heads {K} does not divide --num_heads {H}: try {math.gcd(H, K)}")
        object.__setattr__(self, "head_dim", D // H)


# ---- Model: decoder-only, pre-norm, with RMSNorm, RoPE and grouped-query attention; named as in Hugging Face's Llama
def dropout(hidden, noise, site):
    """Zeroes elements of hidden [B, L, D] at random. noise: the rows' rates [B] and keys [B, 2] uint32, or () for none;
    `site` tells the model's dropouts apart. Masks depend on a row's own key alone, so a batch can be split freely."""
    if not noise:
        return hidden
    rates, keys = noise
    draw = mx.vmap(lambda rate, key: mx.random.bernoulli(1 - rate, hidden.shape[1:], key=key))
    kept = draw(rates, keys + mx.array(site, mx.uint32))  # [B, L, D] of bool
    return mx.where(kept, hidden / (1 - rates[:, None, None]), 0).astype(hidden.dtype)  # kept ones grow: the mean stays


def exp(x):
    """e to the x, for x <= 0, within 2e-6; below -30 it stays at 1e-13. On a CPU MLX's own is scalar, 12 ns; this one,
    Taylor's polynomial of x / 32, then to the 32nd power, is products and sums, which use the vector units: 1.2 ns."""
    if mx.default_device() == mx.gpu:
        return mx.exp(x)
    x, power = mx.maximum(x, -30), 0
    for k in reversed(range(7)):
        power = power * x + 1 / (32**k * math.factorial(k))  # Horner's scheme for the sum of (x / 32)^k / k!
    for _ in range(5):  # squared 5 times: to the 32
        power = power * power
    return power


@mx.custom_function
def softmax(scores):
    """Of scores [..., S], over the last axis, by `exp` and with a gradient of its own."""
    weights = exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@softmax.vjp
def softmax_gradient(scores, gradient, weights):
    """MLX gives the input, the gradient by the output and the output, so that no exp is computed again."""
    product = gradient * weights
    return product - weights * product.sum(axis=-1, keepdims=True)  # the product with softmax's Jacobian


def attend(queries, keys, values, scale, mask="causal", by_mlx=False):
    """Attention of queries [B, H, L, d], which stand at the last L of S positions, to keys and values [B, K, S, d]:
    [B, H, L, d]. mask: "causal" or, `by_mlx`, None (all is seen) or bool [B, 1, L, S] (True: seen). by_mlx: MLX's own
    always, not only on a GPU; else whole texts (S = L) on a CPU are done here, which makes steps 3 to 16 % quicker."""
    if mx.default_device() == mx.gpu or by_mlx:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    B, H, L, d = queries.shape  # L is S from here on, and all is causal
    queries = (queries * scale).reshape(B, keys.shape[1], -1, L, d)  # [B, K, H/K, L, d]
    scores = queries @ keys[:, :, None].swapaxes(-1, -2)  # [B, K, H/K, L, L]
    weights = softmax(mx.where(mx.array(np.tri(L, dtype=bool)), scores, -1e9))  # the future weighs 1e-13 at most
    return (weights @ values[:, :, None]).reshape(B, H, L, d)  # [B, K, H/K, L, d] to heads in the order of q_proj


class Attention(nn.Module):
    """Causal self-attention, K key/value heads shared by H query heads (Ainslie et al. 2023)."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.rope = nn.RoPE(config.head_dim, base=config.rope_theta)  # pairs i, i + d/2, as in Hugging Face's Llama
        self.q_proj = nn.Linear(config.dim, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)  # [K * d, D]
        self.v_proj = nn.Linear(config.dim, config.num_kv_heads * config.head_dim, bias=False)  # [K * d, D]
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)
        if config.qk_norm:  # keeps the scores in range at high learning rates (Henry et al. 2020; Qwen3)
            self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, config.norm_eps) for _ in range(2))

    def __call__(self, hidden, cache=None):  # [B, L, D] -> [B, L, D]
        B, L, _ = hidden.shape
        heads = lambda layer: layer(hidden).reshape(B, L, -1, self.head_dim).transpose(0, 2, 1, 3)  # [B, H or K, L, d]
        queries, keys, values = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        if "q_norm" in self:  # a Module is a dict of its parts
            queries, keys = self.q_norm(queries), self.k_norm(keys)  # over d, one weight [d] for all heads
        offset, mask = cache.place(L) if cache else (0, "causal")
        # Both in one call: RoPE is many small operations on a CPU, and this saves a small model's decoding a tenth.
        both = self.rope(mx.concatenate([queries, keys], axis=1), offset=offset)  # [B, H + K, L, d]
        queries, keys = both[:, : self.num_heads], both[:, self.num_heads :]
        if cache:
            keys, values = cache.append(keys, values)  # [B, K, S, d]
        attended = attend(queries, keys, values, queries.shape[-1] ** -0.5, mask, cache is not None)  # [B, H, L, d]
        return self.o_proj(attended.transpose(0, 2, 1, 3).reshape(B, L, -1))  # heads side by side: [B, L, H * d]


class Cache:
    """The keys and values that one Attention has computed of B texts, so that a new token is all that has to be read.
    lengths: how many tokens are read of each, [B] of NumPy, one array for all blocks' caches, which only look at it:
    who runs the model (Decoder in main.py) adds L after each call, or takes off what is to be forgotten."""

    def __init__(self, config, lengths):
        self.lengths = lengths
        shape = (len(lengths), config.num_kv_heads, config.context_size, config.head_dim)
        self.keys, self.values = mx.zeros(shape), mx.zeros(shape)

    def place(self, L):
        """RoPE's offset of the next L tokens, an int or [B], and attention's mask for them, see `attend`."""
        if (self.lengths == self.lengths[0]).all():
            return int(self.lengths[0]), "causal" if L > 1 else None  # one token sees all before it, unmasked
        last = self.lengths[:, None] + np.arange(L)  # [B, L], the last that each token may see
        return mx.array(self.lengths), mx.array(np.arange(self.lengths.max() + L) <= last[:, None, :, None])

    def append(self, keys, values):
        """Takes in the next L tokens' keys and values [B, K, L, d]; returns all S, junk where a text is shorter."""
        first, longest = int(self.lengths.min()), int(self.lengths.max()) + keys.shape[2]  # longest: S, after these L
        if first + keys.shape[2] == longest:
            self.keys[:, :, first:longest], self.values[:, :, first:longest] = keys, values
        else:  # a scatter, which takes longer
            rows, places = mx.arange(len(keys))[:, None], mx.array(self.lengths[:, None] + np.arange(keys.shape[2]))
            self.keys[rows, :, places], self.values[rows, :, places] = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        return self.keys[:, :, :longest], self.values[:, :, :longest]  # 2x [B, K, S, d]


# relu(x)² (So et al. 2021) trains as well as the others (PTB, dim 256, 250 steps: 5.64 nats; swiglu 5.68, gelu 5.78)
# and is nearly free on a CPU, where MLX's exp and erf are scalar (both passes of [1536, 4096] 8 ms; silu 165, gelu 320)
ACTIVATIONS = {"relu2": lambda x: mx.square(nn.relu(x)), "gelu": nn.gelu, "swiglu": nn.silu}


class MLP(nn.Module):
    """The feed-forward layer, [B, L, D] to [B, L, D]; swiglu (Shazeer 2020) has a gate."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        if config.mlp == "swiglu":
            self.gate_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)  # [mlp_dim, D]
        self.up_proj = nn.Linear(config.dim, config.mlp_dim, bias=False)  # [mlp_dim, D]
        self.down_proj = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def __call__(self, hidden):
        up, act = self.up_proj(hidden), self.activation
        return self.down_proj(act(self.gate_proj(hidden)) * up if "gate_proj" in self else act(up))


class Block(nn.Module):
    """Attention, then MLP, each normalized before and added to hidden [B, L, D]."""

    def __init__(self, config, index):
        super().__init__()
        self.index = index
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)  # Llama's name, though it is RMSNorm
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def __call__(self, hidden, cache=None, noise=()):  # noise: see `dropout`, whose site 0 is the embeddings'
        hidden = hidden + dropout(self.self_attn(self.input_layernorm(hidden), cache), noise, 2 * self.index + 1)
        return hidden + dropout(self.mlp(self.post_attention_layernorm(hidden)), noise, 2 * self.index + 2)


class Transformer(nn.Module):
    """Token ids [B, L] to final hidden states [B, L, D]; put any head on it."""

    def __init__(self, config):
        super().__init__()
        self.checkpoint = False  # True: gradients keep each block's input alone and compute the rest again
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = [Block(config, i) for i in range(config.num_blocks)]
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)  # after the last block, before any head

    def __call__(self, tokens, caches=None, noise=()):
        hidden = dropout(self.embed_tokens(tokens).astype(self.norm.weight.dtype), noise, 0)  # to bfloat16 if norms are
        for i, block in enumerate(self.layers):
            run = partial(block, cache=caches[i] if caches else None, noise=noise)  # checkpoint passes on hidden alone
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
        """caches: a Cache for each block; noise: see `dropout`; last: of so many last positions alone (0: of all)."""
        hidden = self.model(tokens, caches, noise)[:, -last:]  # [B, L or last, D]: decoding needs few logits
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
        self.weight, self.scale = weight, alpha / rank  # [O, I], frozen; A is [rank, I] and B [O, rank]
        self.lora_a, self.lora_b = mx.zeros((rank, weight.shape[1])), mx.zeros((weight.shape[0], rank))

    def __call__(self, hidden):
        return hidden @ self.weight.T + (hidden @ self.lora_a.T) @ self.lora_b.T * self.scale  # [..., rank] in between


def add_lora(model, rank, alpha):
    """Puts a LoRALinear in the place of each linear layer of the blocks; nothing else is trained from then on."""
    replace = lambda layer: LoRALinear(layer.weight, rank, alpha) if isinstance(layer, nn.Linear) else layer
    for block in model.model.layers:
        block.update_modules(tree_map(replace, block.leaf_modules(), is_leaf=nn.Module.is_module))
    model.freeze()
    model.unfreeze(keys=["lora_a", "lora_b"], strict=False)  # not strict: most layers have neither


def init_weights(model, seed):
    """Gives every trained parameter its first value: norms 1; matrices normal with deviation 1 / sqrt(inputs); 0 for
    an untied output layer, a LoRA update's second factor and what writes into the residual stream, so that each block
    begins as the identity. Tied embeddings are the output layer, too: with the deviation 5 / dim the logit of the token
    just read begins near 5, others near 0: the first loss is near ln(V + 147), or ln V if untied. On PTB (dim 256,
    AdamW 3e-3) 250 steps gave 5.64 nats with it, 5.57 with twice as much, 5.91 with a fifth, 5.76 with GPT-2's."""
    parameters = tree_flatten(model.trainable_parameters())  # [(name, array), ...]; of a LoRA run its factors alone
    for (name, parameter), key in zip(parameters, mx.random.split(mx.random.key(seed), len(parameters))):
        normal = mx.random.normal(parameter.shape, key=key)
        if name.endswith("norm.weight"):
            value = mx.ones_like(parameter)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", "lora_b")):
            value = mx.zeros_like(parameter)
        elif name.endswith("embed_tokens.weight"):
            value = normal * 5 / model.config.dim
        else:
            value = normal * parameter.shape[1] ** -0.5  # [O, I]: outputs vary as much as inputs
        model.load_weights([(name, value)], strict=False)
    mx.eval(model.parameters())


# ---- Loss ------------------------------------------------------------------------------------------------------------
def head_loss(hidden, head, targets, weights, *teacher, training=True):
    """Weighted sum of cross-entropies in nats, and its gradients by `hidden` and `head`, computed chunk by chunk with
    it, so that the logits [N, V] never exist as a whole (as in Liger Kernel, Hsu et al. 2024). hidden: [N, D]; head:
    [V, D]; targets, weights: [N]; training: False where no gradients are asked for, so that MLX never computes them and
    no chunk waits for them. teacher: its hidden states [N, D'], head [V', D'] and [share, T]; a share of the loss is T²
    times the Kullback-Leibler divergence to what it predicts, both softened by temperature T (Hinton et al. 2015)."""
    answer_weights = weights * (1 - teacher[2][0]) if teacher else weights  # the teacher has the other share
    # Chunks of 2^23 logits cost nothing; with fewer than 128 rows the products of a large vocabulary become slow.
    chunks = -(-len(hidden) // max(128, 2**23 // len(head)))  # -(-a // b) rounds up; 2^23 logits are 32 MiB
    rows = -(-len(hidden) // chunks)
    loss, hidden_gradient, head_gradient = mx.array(0.0), [], None
    for start in range(0, len(hidden), rows):
        inputs, answers = hidden[start : start + rows], targets[start : start + rows]  # [rows, D], [rows]
        weight = answer_weights[start : start + rows, None]  # [rows, 1]
        if start > 0:
            # On a CPU MLX dispatches operations far ahead of their computation and allocates their results then; idle
            # ones hold the next chunk back until this one is done (267,735 words: 2.5 chunks of memory, not 11).
            idle, *_ = mx.depends([mx.zeros(2)], [loss, hidden_gradient[-1], head_gradient] if training else [loss])
            for _ in range(0 if mx.default_device() == mx.gpu else 64):
                idle = mx.cumsum(idle)
            inputs, *_ = mx.depends([inputs], [idle])  # the same values, but not before `idle` is there
        logits = (inputs @ head.T).astype(mx.float32)  # [rows, V]
        below = logits - logits.max(axis=-1, keepdims=True)  # 0 at most: no overflow, and `exp` needs it
        powers, answer = exp(below), head[answers]  # [rows, V]; [rows, D], of the right answers
        total = powers.sum(axis=-1, keepdims=True)  # [rows, 1]; powers / total are the probabilities
        loss = loss + ((mx.log(total) - mx.take_along_axis(below, answers[:, None], axis=-1)) * weight).sum()
        # The gradient by the logits is (powers / total - one-hot answers) * weight, never written out.
        factor = weight / total  # [rows, 1]
        if teacher:
            # T² times the gradient of KL(softmax(theirs / T), softmax(logits / T)) by the logits is T (given - wanted).
            # `powers` becomes it plus powers * factor, the text's gradient but for the answers; `factor` becomes 1.
            states, their_head, (mixed, T) = teacher
            theirs = (states[start : start + rows] @ their_head.T)[:, : len(head)].astype(mx.float32)  # [rows, V]
            below = (scores - scores.max(axis=-1, keepdims=True) for scores in (theirs / T, logits / T))
            log_wanted, log_given = (scores - mx.log(exp(scores).sum(axis=-1, keepdims=True)) for scores in below)
            wanted, given = exp(log_wanted), exp(log_given)  # [rows, V], the teacher's and ours
            pull = mixed * T * weights[start : start + rows, None]  # [rows, 1]
            loss = loss + T * (pull * wanted * (log_wanted - log_given)).sum()  # the other T is in `pull`
            powers, factor = powers * factor + pull * (given - wanted), mx.ones_like(factor)
        powers, factor = powers.astype(head.dtype), factor.astype(head.dtype)  # [rows, V], [rows, 1]
        hidden_gradient.append((powers @ head) * factor - answer * weight.astype(head.dtype))  # [rows, D]
        inputs = inputs * factor  # scales D columns instead of V
        head_gradient = mx.addmm(head_gradient, powers.T, inputs) if start > 0 else powers.T @ inputs
    states = hidden.astype(mx.float32) * answer_weights[:, None]  # [N, D]; `at` adds up those of one target
    return loss, mx.concatenate(hidden_gradient), head_gradient.astype(mx.float32).at[targets].subtract(states)


trained_head_loss = mx.custom_function(head_loss)


@trained_head_loss.vjp
def head_loss_gradient(inputs, gradients, outputs):
    """MLX gives the inputs, the gradients by the outputs, and the outputs, which hold the gradients by the inputs."""
    _, head, *others = inputs  # targets, weights, the teacher's: none is trained
    scale = gradients[0].astype(head.dtype)  # of the result by this loss: 1 unless it is scaled
    return outputs[1] * scale, (outputs[2] * scale).astype(head.dtype), *map(mx.zeros_like, others)


def loss_sum(model, tokens, targets, weights=1.0, noise=(), training=True, teacher=None, mixture=None):
    """Cross-entropy in nats, summed over positions, or mixed with a teacher's. tokens, targets: [B, L]; weights: [B, L]
    or a number (1 / positions: a mean). noise: see `dropout`. mixture: the teacher's [share, T], see head_loss."""
    hidden = model.model(tokens, noise=noise).flatten(0, 1)  # [B * L, D]
    weights = mx.broadcast_to(mx.array(weights), targets.shape).flatten()  # [B * L]
    loss = trained_head_loss if training else partial(head_loss, training=False)  # evaluations skip the gradients
    theirs = (teacher.model(tokens).flatten(0, 1), teacher.head, mixture) if teacher else ()  # without dropout
    return loss(hidden, model.head.astype(hidden.dtype), targets.flatten(), weights, *theirs)[0]


# ---- Optimizer ------------------------------------------------------------------------------------------------------
# Muon's learning rate over AdamW's. On PTB (dim 256, batch 32, AdamW's at 3e-3) validation after 120 steps was 5.56
# nats, with AdamW alone 5.65; on characters (dim 128) ratios of 8 and 10 did as well.
MUON_RATE = 5


def make_optimizer(model, flags, streams=(mx.cpu,)):  # streams: see make_streams in main.py
    """AdamW (Loshchilov & Hutter 2019) in two groups, matrices with weight decay and norms without, its work dealt out
    over `streams`; with --optimizer muon the blocks' matrices go to Muon (Jordan et al. 2024), with the same decay."""
    adamw = partial(optim.AdamW, flags.learning_rate, betas=[0.9, 0.99], bias_correction=True)
    groups = [adamw(weight_decay=flags.weight_decay), adamw(weight_decay=0.0)]  # of matrices, of norms
    filters = [lambda name, weight: weight.ndim >= 2]  # AdamW's first takes these, embeddings too; the last the rest
    if flags.optimizer == "muon":
        groups.insert(0, optim.Muon(flags.learning_rate, weight_decay=0.0))  # chooses first; its decay is in `dealt`
        filters.insert(0, lambda name, weight: name.startswith("model.layers.") and weight.ndim >= 2)
    optimizer = optim.MultiOptimizer(groups, filters)
    optimizer.init(model.trainable_parameters())  # at once: other ranks are sent its state before the first step
    moments = [name for group in groups for name, _ in tree_flatten(group.state) if name.endswith(".v")]
    assert sorted(moments) == sorted(f"{name}.v" for name, _ in tree_flatten(model.trainable_parameters()))  # none lost

    load = [0] * len(streams)

    def dealt(group, update, gradient, parameter, state):  # in place of MLX's apply_single, for each weight
        if isinstance(group, optim.Muon):  # like AdamW: MLX's own would orthogonalize the decay, too
            parameter = parameter * (1 - group.learning_rate * flags.weight_decay / MUON_RATE)  # by AdamW's rate
        least = load.index(min(load))
        load[least] += parameter.size
        with mx.stream(streams[least]):
            return update(gradient, parameter, state)

    for group in groups:
        group.apply_single = partial(dealt, group, group.apply_single)  # the old one, bound now, is `update`
    return optimizer


def set_learning_rate(optimizer, rate):
    """Sets the rate of AdamW's groups; Muon's is MUON_RATE times that. main.py does so before each step."""
    for group in optimizer.optimizers:
        group.learning_rate = rate * MUON_RATE if isinstance(group, optim.Muon) else rate


# ---- Exchange: quantized weights, the folders of Hugging Face, and a look inside -------------------------------------
def quantize(model, bits, packed):
    """Rounds all matrices to `bits` in groups of 64 along rows, or 32 where 64 does not divide all; returns the size of
    a group. Unless `packed` they are spread to float32 again: CPUs are slow with packed ones. Raises UsageError."""
    matrices = {name: weight for name, weight in tree_flatten(model.parameters()) if weight.ndim == 2}
    group = 32 if any(matrix.shape[1] % 64 for matrix in matrices.values()) else 64
    with explained(f"--quantize {bits} needs a model in which 32 divides --dim and --mlp_dim"):
        parts = {name: mx.quantize(matrix, group, bits) for name, matrix in matrices.items()}  # packed, scales, biases
    before, after = (sum(array.nbytes for _, array in tree_flatten(each)) / 2**20 for each in (matrices, parts))
    print(f"Quantized to {bits} bits: the matrices' {before:,.1f} MiB would be {after:,.1f}", file=sys.stderr)
    if packed:  # for a GPU or --export: QuantizedLinear, QuantizedEmbedding
        nn.quantize(model, group, bits)
    else:
        model.update(tree_unflatten([(name, mx.dequantize(*part, group, bits)) for name, part in parts.items()]))
    mx.eval(model.parameters())  # now: MLX is lazy, and the first reply would have to wait
    return group


# What these models are called at Hugging Face, by `mlp` and `qk_norm`, and what their config.json calls our Config.
COUNTERPARTS = {("swiglu", False): "Llama", ("swiglu", True): "Qwen3", ("relu2", False): "Arcee"}  # gelu has none
THEIR_ACTIVATIONS = {"swiglu": "silu", "relu2": "relu2"}
THEIR_NAMES = {
    "vocab_size": "vocab_size", "context_size": "max_position_embeddings", "num_blocks": "num_hidden_layers",
    "dim": "hidden_size", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "mlp_dim": "intermediate_size", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
}  # fmt: skip


def import_model(path):
    """The model and tokenizer in a Hugging Face folder, and the files of its weights. Raises UsageError."""
    with explained(f"{path} holds no Llama, Qwen3 or Arcee model: name one, or see --list"):
        theirs = json.loads((path / "config.json").read_text())
        theirs = {"head_dim": None} | {name: value for name, value in theirs.items() if value is not None}
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        kind = {name.lower(): kind for kind, name in COUNTERPARTS.items()}.get(theirs["model_type"])
        others = "attention_bias", "mlp_bias", "use_sliding_window", "quantization", "quantization_config"
        odd, act = [*filter(theirs.get, others)], THEIR_ACTIVATIONS[kind[0] if kind else "swiglu"]
        scaling = rope.get("rope_type", rope.get("type", "default"))
        odd += [f"model_type {theirs['model_type']}"] * (not kind) + [f"rope {scaling}"] * (scaling != "default")
        odd += [f"hidden_act {theirs.get('hidden_act')}"] * (theirs.get("hidden_act", act) != act)
        if odd:  # better none than one that computes something else
            raise UsageError(f"this program has no {', '.join(odd)}")
        files = sorted(path.glob("*.safetensors"))
        weights = {name: weight.astype(mx.float32) for file in files for name, weight in mx.load(str(file)).items()}
        if theirs.get("tie_word_embeddings"):
            weights.pop("lm_head.weight", None)
        usual = {"num_key_value_heads": theirs["num_attention_heads"], "rms_norm_eps": 1e-6, "rope_theta": 1e4}
        fields = {ours: (usual | rope | theirs)[name] for ours, name in THEIR_NAMES.items()}
        model = LanguageModel(Config(mlp=kind[0], qk_norm=kind[1], untie="lm_head.weight" in weights, **fields))
        model.load_weights(list(weights.items()))  # strict: names and shapes have to agree
        mx.eval(model.parameters())
        tokenizer = TOKENIZERS["bpe"]((path / "tokenizer.json").read_text())
        return model, tokenizer, files


def tokenizer_json(tokenizer):
    """The text of a `tokenizer.json` that gives the same ids, and what `tokenizer_config.json` says beside it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if tokenizer.kind in ("bpe", "gpt2"):
        made = tokenizer.package
    elif tokenizer.kind == "byte":  # GPT-2 writes each byte as a character; those that cannot be seen from 256 on
        seen = [*range(33, 127), *range(161, 173), *range(174, 256)]  # ! to ~, ¡ to ¬, ® to ÿ
        order = [*seen, *sorted(set(range(256)) - set(seen))]
        signs = {chr(byte if i < len(seen) else 256 + i - len(seen)): byte for i, byte in enumerate(order)}
        made = Tokenizer(models.BPE(signs | {"<eos>": 256}, []))  # no merges, so each byte stays a token
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    else:
        known = {text: i for i, text in enumerate(tokenizer.vocabulary)} | {"<unk>": tokenizer.unk}
        made = Tokenizer(models.WordLevel(known, "<unk>"))
    if tokenizer.kind == "char":  # [\s\S]: any character, line ends too. Fuse: joined without spaces
        made.pre_tokenizer, made.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    if tokenizer.kind == "word":
        # str.split cuts at \x1c to \x1f, too. To decode, WordPiece puts spaces before what lacks its prefix, here \0.
        lines, spaces = normalizers.Replace("\n", " <eos> "), normalizers.Replace(Regex("[\x1c-\x1f]"), " ")
        made.normalizer, made.pre_tokenizer = normalizers.Sequence([lines, spaces]), pre_tokenizers.WhitespaceSplit()
        joined = [decoders.WordPiece("\0", cleanup=False), decoders.Fuse(), decoders.Replace(Regex(" ?<eos> ?"), "\n")]
        made.decoder = decoders.Sequence(joined)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    end = {} if tokenizer.eos is None else {"eos_token": made.id_to_token(tokenizer.eos)}
    return made.to_str(), about | end


def export_model(model, tokenizer, folder, bits):
    """--export: a folder for transformers and mlx_lm (of Arcee's relu2, for transformers alone). Raises UsageError."""
    config, folder = model.config, Path(os.path.expanduser(folder))
    if not (name := COUNTERPARTS.get((config.mlp, config.qk_norm))):
        shape = f"--mlp {config.mlp}" + " --qk_norm" * config.qk_norm
        raise UsageError(f"--export: Hugging Face has no model with {shape}: train one with --mlp swiglu")
    theirs = {their: getattr(config, our) for our, their in THEIR_NAMES.items()} | {
        "architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "tie_word_embeddings": not config.untie,
        "hidden_act": THEIR_ACTIVATIONS[config.mlp], "attention_bias": False, "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}, "dtype": "float32",
        "bos_token_id": None, "eos_token_id": tokenizer.eos,
    }  # fmt: skip
    if bits:  # packs the model in place: an export is the last use of it
        theirs["quantization"] = {"group_size": quantize(model, bits, packed=True), "bits": bits}  # as mlx_lm calls it
    text, about = tokenizer_json(tokenizer)
    chat = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}  # no chat format was learned
    files = {  # beside weights and tokenizer.json; sampling by main.py's defaults
        "config": theirs, "tokenizer_config": about | chat | {"model_max_length": config.context_size},
        "generation_config": {"eos_token_id": tokenizer.eos, "do_sample": True, "temperature": 0.5, "top_k": 50},
    }  # fmt: skip
    with explained(f"cannot write to --export {folder}: name a folder of yours"):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "model.safetensors", "wb") as file:  # so that an error says why: MLX's own does not
            mx.save_safetensors(file, dict(sorted(tree_flatten(model.parameters()))), {"format": "mlx"})
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(content, indent=2))
        (folder / "tokenizer.json").write_text(text, "utf-8")
    print(f"{name}ForCausalLM and its tokenizer are in {folder}", file=sys.stderr)


def attention_weights(model, tokens):
    """[blocks, H, L, L] of NumPy: how much each position of `tokens`, L ids, looks at itself and each one before."""
    seen, plain = [], attend

    def watched(queries, keys, values, scale, *rest):
        places = mx.broadcast_to(mx.eye(len(tokens)), (*keys.shape[:3], len(tokens)))  # weights @ identity = weights
        seen.append(plain(queries, keys, places, scale, "causal", True))  # [1, H, L, L], by MLX's own code
        return plain(queries, keys, values, scale, *rest)

    globals()["attend"] = watched
    try:
        model(mx.array([tokens]))
    finally:
        globals()["attend"] = plain
    return np.array(mx.concatenate(seen))
