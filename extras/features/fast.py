"""Makes MLX fast on a CPU, by a fast BLAS and a stream per core, and repeatable on a GPU.

main.py imports this file before MLX and then uses these functions in place of its own plain ones
of the same names:

    rotate            RoPE, in fewer operations
    attend            causal attention, with a softmax that uses the vector units
    relu2             squared ReLU, with a gradient that uses them
    checkpoint_block  gradient checkpointing, block by block
    training_loss     loss and gradient in one pass over chunks of rows, so that the logits never
                      exist as a whole
    token_metrics     the losses of a validation text, by the same chunks
    sum_over_shards   a sum over the rows of a batch, of which each core computes a shard
    clip_grad_norm    gradient clipping on all cores
    parallelize       an optimizer that distributes its work over the cores
    Reader            what the next token of a text may be, by step.c; see step.py
    sample_tokens     the choice of that token

It also makes three of MLX's own layers faster: nn.Linear, with a gradient that is stored like the
matrix; nn.RMSNorm, in fewer operations; nn.Embedding, with repeatable gradients on a GPU.

fast.c, which it compiles, passes MLX's matrix products on to a fast BLAS.

They match the plain functions up to rounding; tests/extras/test_fast.py compares them. A plain
function is replaced while its hash, and those of all that it stands for, are the ones in
PLAIN_HASHES; once edited, it runs itself. On a GPU, all but nn.Embedding, nn.RMSNorm, loss, metrics
and AdamW's update are MLX's. Without this file, or with DISABLE_FAST in the environment, main.py
does the same, but up to 30 times as slowly on a CPU; only --teacher, bfloat16 on a CPU and runs
that repeat on a GPU need it.

Shapes: B rows of a batch, L positions, D model dimension, H query heads, K key and value heads, d
head dimension, V vocabulary, N any number.
"""

import contextlib
import ctypes
import importlib.metadata
import itertools
import math
import os
import platform
import re
import shlex
import shutil
import site
import struct
import subprocess
import sys
from functools import lru_cache, partial, reduce
from pathlib import Path

# Threads that spin while waiting lose their core to other programs just when work arrives: 7 times
# slower. A tenth of a millisecond does no harm, and in decoding the next product comes within it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np

from support.cli import UsageError, extra
from support.code import EDITED_NAMES, LOADED_SOURCES, hash_of_code
from support.files import atomic_write, hash_of_data, hold_lock
from support.machine import (
    CLEAN,
    REFERENCE_BLAS,
    count_cores,
    cpu_info,
    make_kernel_dir,
    use_compiler,
)

# hash_of_code of main.py's plain versions. Where a test finds that one has changed, compare it with
# the fast one, then enter the new hash.
PLAIN_HASHES = {
    "bfloat16_products": "1a7b8cade7a86dd4d9af1c9bf17ccc11d0bbe5817be028d58f2ff7283cc6f25a",
    "rotate": "973a6a3bbaeb4fc1879d6d21f12b90cf61a5344d3fa9b00e0b6b35fa265ea3f7",
    "attend": "cb3f723fb8537df0ff87d500d302f7144148d7ed1fca5c8ac11bf8ec330d6071",
    "relu2": "26ba362f71b69ddad5ef1aef06faf5b5672d61289478e9d7be3cff4baa29f6f2",
    "checkpoint_block": "c542fa5f10983e213d0f4058c427a0faa6ebcc3ffaa9d1170b85963991536ba9",
    "LanguageModel": "58ef908f6330460c05b5dd7fe49409460ef9071e60ebadbe75ad0dafcdf767b0",
    "training_loss": "8e43a2883e22e7723c3945067592c3ed2ba811b0d731768cf065ebe4598e3a93",
    "token_metrics": "50c28f004144b4be3429e298e96b6547a42062a9854e51a6ba3f6e9032772195",
    "sum_over_shards": "0bd6f0e1ff71aea9cedc6168f2a99260ab8c34cb7c6e420a33682a65be18aa7f",
    "clip_grad_norm": "75b1fa4cbb8ef8ef0c69a1e40ae310a6db6ffbc9591366f2efbe88d0824d7e2a",
    "Muon": "592dd79087cc7b99efdf1c04643fe59e1ea0d40337a72354b509ec5105c0db81",
    "parallelize": "401bba3139d79f1d87c66f61df66ae07523d545cb7b9ba2cae0fead32722fdf4",
    "Attention": "0c6e19ea3c40ad217efa0512c47f87fa7c70642f7e1469fc0adb9f5e3471eccc",
    "MLP": "57d2c173ba4dec2f1c5cf4cf991a3e0d6076e6e4b6010ee0045c46cde423ce61",
    "Block": "6bf4424e94d17c103c3ef7bcbe8c6dece2a610f0abaff4acd0201add852d6e45",
    "Transformer": "13368491c0e9c9daf0dcee6fcbf931fbb9958efa345544a372207726e83ae9af",
    "KVCache": "676f412ee5eab4755065385119a5b501abac00a1b94b5a77275310a97cd3972f",
    "Reader": "bcff8887b40e1f2abc524c3c20ccb99158ff471564df576777bc23b4941f2e74",
    "dropout": "0f2cec29e034d17e932bc59453486aa462421bc44356f66e77957f299e7d9b1f",
    "sample_tokens": "bf2b915b6e866fbe36a8812caa0ae3e92ea904e503561ce71b8f0b1cabdf35b3",
    "sample_token": "8337586102b7b2a4b48a12a245140bb371bd6353457d389ff032f5dfa0d8751e",
    "is_greedy": "cc839b1479f58129bfc61d2b44a704c5fbfbf8c56c39af94dc7d78a10dd2b73e",
    "process_logits": "4c34fad2482483765ce85d7b994e6bf1f0c1443a459d61f794a2512cdba1dd04",
    "penalize": "28d34aec681a414c58cfc0b9c28dd005180364f458c5da3ed64c33470d541ae4",
    "keep_top_k": "4978547399e1e393d5e8f136b5773fe0db6999bb45576b66fae0fe74d14d8b45",
    "keep_top_p": "c9dff4d4628ca10172688feb7454ecfaad547d25c5b8f10236a7cdb686d5558c",
    "keep_min_p": "b6f26f7d7cd7feba66af2d25418981084eafed75643ee016dd509cb264e39b79",
    "Decoder": "f00c60c52e84b08ae1e55e793e389914405d1af108c20dc991b1867ef16f8fc8",
}
# {a function here: what else it stands for}
# Decoder is not replaced, but step.py's logits are NumPy's.
SAMPLING = ["Attention", "MLP", "Block", "Transformer", "LanguageModel", "KVCache", "Reader"]
SAMPLING += ["Decoder", "attend", "rotate", "relu2", "dropout", "sample_tokens", "sample_token"]
SAMPLING += ["is_greedy", "process_logits", "penalize", "keep_top_k", "keep_top_p", "keep_min_p"]
STANDS_FOR = {
    "training_loss": ["LanguageModel"],
    "token_metrics": ["LanguageModel"],
    "parallelize": ["Muon"],
    "Reader": SAMPLING,
    "sample_tokens": SAMPLING,
}
REPLACED = {}  # {name: main.py's function}


@lru_cache(maxsize=1)
def sources_of_definitions(source):
    """{name: source} of functions and classes, with decorators; of several of a name, all.

    Those below `if` and the like count, too. (Quicker than a syntax tree, at each start.)
    """
    sources = {}
    decorators = ""
    for statement in re.split(r"^(?=[^\s)#])", source, flags=re.MULTILINE):
        names = re.findall(r"^[ \t]*(?:def|class)\s+(\w+)", statement, flags=re.MULTILINE)
        if statement.startswith("@"):
            decorators += statement
            continue
        if statement.startswith(("def", "class")):
            names = names[:1]  # others are its own
        for name in names:
            sources[name] = sources.get(name, "") + decorators + statement
        decorators = ""
    return sources


def fast_version(function):
    """A decorator that replaces a function of main.py with its faster namesake in this file.

    Both agree up to rounding. The function itself runs once it, or what else the fast one stands
    for, was edited; the start screen says so.
    """
    names = [function.__name__, *STANDS_FOR.get(function.__name__, [])]
    for name in names:
        source = sources_of_definitions(LOADED_SOURCES["main.py"]).get(name, "")
        if hash_of_code(source) != PLAIN_HASHES[name] and name not in EDITED_NAMES:
            EDITED_NAMES.append(name)
    # extras.versus compares an edited function with its original in plain MLX, as the fast version
    # would round differently.
    plain_names = EDITED_NAMES + os.environ.get("PLAIN_FUNCTIONS", "").split(",")
    if {*names} & {*plain_names}:
        return function
    REPLACED[function.__name__] = function
    return globals()[function.__name__]


# ---- BLAS ---------------------------------------------------------------------------------------
# The library for matrix products, which must be loaded before MLX.

forwarder = None  # fast.c, compiled

# The instruction sets that oneDNN uses, by its numbers for them.
INSTRUCTIONS = {
    0x7: "AVX2",
    0x27: "AVX-512",
    0x67: "AVX-512 VNNI",
    0xE7: "AVX-512 BF16",
    0x1EF: "AVX-512 FP16",
    0xFEF: "AMX",
}
HAS_AVX512_BF16 = 0x80  # bits of these numbers
HAS_AMX_BF16 = 0x800


def use_fast_blas():
    """Makes a fast BLAS visible to MLX, before MLX is imported, and returns its name.

    MLX's Linux wheel bundles the reference BLAS (6 GFLOP/s where others reach 190 to 500), but the
    first `cblas_sgemm` to be loaded with global symbols wins: here a forwarder to oneDNN or, if
    that is not installed, to the OpenBLAS in NumPy's wheel.
    """
    global forwarder
    if sys.platform != "linux":
        return f"Accelerate of macOS {platform.mac_ver()[0]}"  # which MLX uses
    if "mlx.core" in sys.modules:
        return REFERENCE_BLAS  # too late: import main before MLX
    keep_freed_memory()
    name, functions = find_blas()
    if functions:
        forwarder = compile_library(Path(__file__).with_suffix(".c"), ctypes.RTLD_GLOBAL)
    if forwarder is None:
        return REFERENCE_BLAS
    for pointer, function in functions.items():
        address = ctypes.cast(function, ctypes.c_void_p).value
        ctypes.c_void_p.in_dll(forwarder, pointer).value = address
    return name


HEAP_BYTES = 2**32  # of addresses; only what is used takes memory
MADV_HUGEPAGE = 14


def keep_freed_memory():
    """Makes glibc keep the memory of freed arrays, in pages of 2 MiB.

    Otherwise each new array is faulted in page by page, which makes a sum take 7 times as long. And
    a step uses more pages of 4 KiB than fit into a CPU's cache of addresses, the TLB.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library, as on Alpine
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.malloc.restype = ctypes.c_void_p
        heap = libc.malloc(ctypes.c_size_t(HEAP_BYTES))  # takes no memory before it is used
        if heap:
            start = heap & -(2**16)  # madvise wants the start of a page: 64 KiB at most
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(HEAP_BYTES), MADV_HUGEPAGE)
            libc.free(ctypes.c_void_p(heap))  # the next arrays come from it


def find_blas():
    """The name of a fast BLAS, and its functions by their pointers in fast.c; or "" and {}."""
    # Where pip installs it, in an environment or for a user, or a system package. On ARM, its
    # instruction sets have other numbers.
    folders = [f"{sys.prefix}/lib/", f"{site.getuserbase()}/lib/", ""]
    for folder in folders if platform.machine() == "x86_64" else []:
        with contextlib.suppress(OSError, AttributeError):  # not there, or another version
            onednn = ctypes.CDLL(f"{folder}libdnnl.so.3")
            instructions = onednn.dnnl_get_effective_cpu_isa()
            functions = {
                "onednn": onednn.dnnl_sgemm,
                "set_threads": onednn.omp_set_num_threads,  # of the OpenMP that it uses
            }
            # With AVX-512 BF16 alone, AMD's are faster in bfloat16, but Intel's reach half the
            # speed of float32 (two Emerald Rapids cores whose AMX is hidden from a virtual machine:
            # 177 instead of 308 GFLOP/s).
            fast_in_bf16 = HAS_AMX_BF16
            if "AuthenticAMD" in cpu_info():
                fast_in_bf16 = HAS_AVX512_BF16
            if instructions & fast_in_bf16:
                functions["onednn_bf16"] = onednn.dnnl_gemm_bf16bf16f32
            onednn.dnnl_version.restype = ctypes.POINTER(ctypes.c_int * 3)
            version = ".".join(map(str, onednn.dnnl_version().contents))
            name = INSTRUCTIONS.get(instructions, hex(instructions))
            return f"oneDNN {version} ({name})", functions
    for path in Path(np.__path__[0]).parent.glob("numpy.libs/libscipy_openblas64_*.so"):
        openblas = ctypes.CDLL(str(path))
        # Each set of kernels rounds differently.
        openblas.scipy_openblas_get_corename64_.restype = ctypes.c_char_p
        kernels = openblas.scipy_openblas_get_corename64_().decode()
        functions = {
            "openblas": openblas.scipy_cblas_sgemm64_,
            "set_threads": openblas.scipy_openblas_set_num_threads64_,
        }
        return f"NumPy's OpenBLAS ({kernels})", functions
    return "", {}


def compile_library(source, mode=ctypes.DEFAULT_MODE):
    """A C file as a library, compiled once; None if that fails. mode: ctypes'."""
    compiler = next(filter(shutil.which, ["cc", "gcc", "clang"]), "cc")
    # Without the last three, sums would stay scalar.
    vectors = ["-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
    # Not every compiler knows every option.
    for options in ([*vectors, "-fopenmp"], vectors, []):
        # UsageError: no folder can hold code, so MLX cannot compile, either.
        with contextlib.suppress(UsageError, OSError, subprocess.SubprocessError):
            about = [source.read_text("utf-8"), options]
            path = make_kernel_dir() / f"{source.stem}-{hash_of_data(about)[:12]}.so"
            if path.exists() and is_cut_off(path):  # it would end the process, when it is used
                path.unlink()
            compile_once(path, [compiler, "-shared", "-fPIC", "-O3", *options, source, "-lm"])
            return ctypes.CDLL(str(path), mode)
    return None


def is_cut_off(path):
    """Whether the last part of a 64-bit Linux library is missing: its table of sections."""
    data = path.read_bytes()
    if len(data) < 64:
        return True
    begin, size, count = struct.unpack("<40xQ10xHH2x", data[:64])
    return len(data) < begin + size * count


def compile_once(path, command):
    """Makes the file `path` by a compiler, unless it is there; one process at a time.

    Raises OSError, SubprocessError.
    """
    if path.exists():
        return
    with hold_lock(path.parent):
        if path.exists():  # another process has just made it
            return
        environment = {**os.environ, "TMPDIR": str(path.parent)}  # the user's may be full
        with atomic_write(path) as file:
            subprocess.run(
                [*CLEAN, *command, "-o", file.name],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )


def set_forwarder(name, value):
    """Sets an int of fast.c: `threads` that a product may use, or whether it `rounds_to_bf16`."""
    if forwarder is not None:
        ctypes.c_int.in_dll(forwarder, name).value = value


def has_bfloat16():
    """Whether matrix products on this CPU, computed by oneDNN, are faster in bfloat16."""
    return forwarder is not None and bool(ctypes.c_void_p.in_dll(forwarder, "onednn_bf16"))


@contextlib.contextmanager
def bfloat16_products(is_enabled):
    """If is_enabled, products on a CPU round their inputs to bfloat16, if it can; sums: float32."""
    set_forwarder("rounds_to_bf16", is_enabled)
    try:
        yield
    finally:
        set_forwarder("rounds_to_bf16", False)


BLAS = use_fast_blas()  # recorded in checkpoints: another one rounds differently

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map


from support.device import on_gpu


# ---- GPUs: MLX's own functions are fast there ---------------------------------------------------
def use_gpu():
    """Prepares MLX for a GPU, before anything is computed: the order of sums stays the same."""
    # cuDNN adds up the gradient of attention in an order that varies.
    os.environ.setdefault("MLX_CUDA_USE_CUDNN_SDPA", "0")


def describe_blas():
    """What multiplies matrices, with the versions on which the last bits depend."""
    if not on_gpu():
        return BLAS
    macos, _, _ = platform.mac_ver()  # "" elsewhere
    parts = [f"Metal of macOS {macos}" if macos else "CUDA"]
    for path in Path("/proc/driver/nvidia").glob("version"):  # not there in WSL
        parts += re.findall(r" (\d{3}\.[\d.]+)", path.read_text("utf-8"))
    for package in importlib.metadata.distributions():
        if str(package.name).startswith("nvidia-cublas"):  # None: a damaged one's
            parts.append(f"{package.name} {package.version}")
    if os.environ.get("MLX_ENABLE_TF32") != "0":
        parts.append("TF32 allowed")
    if os.environ.get("MLX_CUDA_USE_CUDNN_SDPA") != "0":  # see use_gpu
        parts.append("cuDNN attention")
    return ", ".join(parts)


# ---- MLX's layers -------------------------------------------------------------------------------
def linear(layer, x):
    """nn.Linear, with a gradient w.r.t. its weight [O, I] that is stored by rows; x: [..., I].

    MLX's own is a transposed view, which clip_grad_norm copies element by element and AdamW reads
    with a stride: at dim 1024, they took a fifth of a step.
    """
    weight = layer.weight
    if on_gpu() or x.ndim < 2:
        product = x @ weight.T
    else:
        positions = x.flatten(0, -2)  # [N, I]
        product = product_of_positions(positions, weight).reshape(*x.shape[:-1], len(weight))
    return product + layer.bias if "bias" in layer else product


@mx.custom_function
def product_of_positions(x, weight):
    return x @ weight.T


@product_of_positions.vjp
def product_gradients(inputs, gradient, output):
    x, weight = inputs
    return (gradient @ weight).astype(x.dtype), gradient.T @ x


def rms_norm(layer, x):
    """nn.RMSNorm of x [..., D], with a gradient of few operations.

    On a GPU, x is normed without the weight, which is multiplied in float32: MLX's kernel with a
    weight adds up its gradient in bfloat16, 1 to 2 % off. For some sizes, CUDA's does not wait
    between rows (read in MLX 0.32.1), so sums might vary.
    """
    weight = layer.weight
    if on_gpu():
        normed = mx.fast.rms_norm(x, None, layer.eps)
        return (normed * weight.astype(mx.float32)).astype(x.dtype)
    normed, _ = normalize(x.reshape(-1, x.shape[-1]), weight, layer.eps)
    return normed.reshape(x.shape)


@mx.custom_function
@mx.compile  # for a cached pass, in which its callers are not: fewer operations
def normalize(x, weight, eps):
    """RMSNorm of x [N, D], and the factors [N, 1] that normalize the rows."""
    squares = row_sums(x * x)
    factor = mx.rsqrt(squares / x.shape[-1] + eps)
    return x * factor * weight, factor


@normalize.vjp
def normalize_gradients(inputs, gradients, outputs):
    x, weight, eps = inputs
    gradient = gradients[0]
    factor = outputs[1]
    product = gradient * x
    row_dots = product @ weight[:, None]  # [N, 1]
    d_x = (gradient * weight - x * row_dots * (mx.square(factor) / x.shape[-1])) * factor
    d_weight = (product.T @ factor).flatten()
    return d_x, d_weight, None


def embedding(layer, tokens):
    """nn.Embedding; on a GPU, its gradient is the same each time.

    There MLX adds up the rows of a token in an order that varies, so that no run would repeat.
    """
    if on_gpu():
        return gather_rows(layer.weight, tokens)
    return layer.weight[tokens]


@mx.custom_function
def gather_rows(table, tokens):
    return table[tokens]


@gather_rows.vjp
def gather_rows_gradients(inputs, gradient, output):
    table, tokens = inputs
    sums = sum_by_id(gradient.flatten(0, -2), tokens.flatten(), len(table))
    return sums, mx.zeros_like(tokens)


def sum_by_id(rows, ids, count):
    """The sums [count, D] of the rows [N, D] that have the same id; ids: [N].

    The rows are sorted by id. Each sum is then a product of ones and a segment of the rows. There
    are as many segments, S, as there can be different ids; some may be empty.
    """
    N = len(ids)
    order = mx.argsort(ids)
    ids = ids[order]
    is_new = mx.concatenate([mx.array([True]), ids[1:] != ids[:-1]])
    starts = mx.sort(mx.where(is_new, mx.arange(N), N))[: min(N, count)]  # [S]
    ends = mx.concatenate([starts[1:], mx.array([N])])
    segments = mx.stack([starts, ends], axis=1).astype(mx.uint32)
    sums = mx.segmented_mm(mx.ones((1, N)), rows[order], segments).squeeze(1)  # [S, D]
    table = mx.zeros((count + 1, rows.shape[1]))
    table[mx.where(starts < N, ids[mx.minimum(starts, N - 1)], count)] = sums
    return table[:count]  # without the row for empty segments


nn.Linear.__call__ = linear
nn.RMSNorm.__call__ = rms_norm
nn.Embedding.__call__ = embedding


# ---- RoPE ---------------------------------------------------------------------------------------
def rotate(x, frequencies, offset):
    """main.py's `rotate`; the sines and cosines are constants of a compiled graph."""
    B, H, L, d = x.shape
    if on_gpu() or not isinstance(offset, int):
        periods = mx.array(1 / frequencies)
        return mx.fast.rope(
            x, d, traditional=False, base=None, scale=1.0, offset=offset, freqs=periods
        )
    pairs = x.reshape(B, H, L, 2, d // 2)
    table = rotation_table(offset, L, frequencies.tobytes())
    return rotate_pairs(pairs, table).reshape(B, H, L, d)


@lru_cache(maxsize=1)
def rotation_table(offset, length, frequencies):
    """Cosines and sines [2, L, 2, d / 2] for rotate_pairs; all blocks share them."""
    angles = np.arange(offset, offset + length)[:, None] * np.frombuffer(frequencies)  # [L, d / 2]
    cosines, sines = np.cos(angles), np.sin(angles)
    table = np.array([[cosines, cosines], [-sines, sines]], np.float32)
    return mx.array(table.swapaxes(1, 2))


@mx.custom_function
@mx.compile
def rotate_pairs(pairs, table):
    """RoPE of pairs [B, H, L, 2, d / 2]; table: see rotation_table."""
    return pairs * table[0] + pairs[..., ::-1, :] * table[1]


@rotate_pairs.vjp
def rotate_gradients(inputs, gradient, output):
    """The gradient, rotated back: MLX's own would first fill arrays with zeros.

    It is stored by positions, so that the gradient of the projection need not copy it.
    """
    table = inputs[1]
    cosines, sines = table[:, :, None]
    gradient = gradient.swapaxes(1, 2)  # [B, L, H, 2, d / 2]
    d_pairs = gradient * cosines - gradient[..., ::-1, :] * sines
    return d_pairs.swapaxes(1, 2), mx.zeros_like(table)


# ---- Attention ----------------------------------------------------------------------------------
def exp(x):
    """e to the x, for x <= 0, within 2e-6; constant at 1e-13 below -30.

    On a CPU, MLX's own is scalar and takes 12 ns. This one, a Taylor polynomial of x / 32 raised
    to the 32nd power, needs only products and sums, which use the vector units: 0.5 ns.
    """
    return mx.exp(x) if on_gpu() else exp_by_powers(x)


@mx.compile  # in sampling, too, where its callers are not: there it would be twenty passes
def exp_by_powers(x):
    x = mx.maximum(x, -30)
    c = [1 / (32**k * math.factorial(k)) for k in range(7)]
    square = x * x
    # Estrin's scheme, not Horner's: MLX fuses at most 11 operations in a row into one kernel.
    first = (c[3] * x + c[2]) * square + (c[1] * x + c[0])
    rest = c[6] * square + (c[5] * x + c[4])
    power = rest * (square * square) + first
    for _ in range(5):  # squared 5 times: the 32nd power
        power = power * power
    return power


def attend(queries, keys, values, mask="causal"):
    """Causal attention: queries [B, H, L, d], keys and values [B, K, N, d] -> [B, H, L, d].

    Like main.py's `attend`, with a softmax that uses the vector units and a gradient of few
    operations. With a cache, where nothing is compiled, it is slower: there MLX's own is used.
    """
    B, H, L, d = queries.shape
    K = keys.shape[1]
    if on_gpu() or L == 1 or keys.shape[2] > L or not isinstance(mask, str):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=d**-0.5, mask=mask)
    queries = queries.reshape(B, K, -1, d)  # [B, K, H / K * L, d]
    # [L, H / K * L]: 0 for the past, -1e9 for the future, which then weighs 1e-13 at most. Sums use
    # the vector units, mx.where does not.
    mask = np.tile(np.tril(np.full((L, L), -1e9, np.float32), -1), (1, H // K))
    attended, _ = attend_masked(queries, keys, mx.contiguous(values), mx.array(mask))
    return attended.reshape(B, H, L, d)


@mx.custom_function
def attend_masked(queries, keys, values, mask):
    """Attention of queries [B, K, N, d] to keys and values [B, K, L, d], and its weights.

    mask: [L, N], is added to the scores. These have a column for each query, so that a number for
    each query is a row: operations with rows use the vector units, those with columns do not.
    """
    scores = (keys @ queries.swapaxes(-1, -2)) * queries.shape[-1] ** -0.5 + mask
    exps = exp(scores - scores.max(axis=-2, keepdims=True))
    weights = exps / exps.sum(axis=-2, keepdims=True)  # [B, K, L, N]
    return weights.swapaxes(-1, -2) @ values, weights


@attend_masked.vjp
def attend_gradients(inputs, gradients, outputs):
    queries, keys, values, mask = inputs
    gradient = mx.contiguous(gradients[0])
    attended, weights = outputs
    d_values = weights @ gradient
    # The gradient w.r.t. the weights, times softmax's Jacobian.
    d_weights = values @ gradient.swapaxes(-1, -2)
    row_dots = row_sums(gradient * attended).swapaxes(-1, -2)  # [B, K, 1, N]
    d_scores = weights * (d_weights - row_dots) * queries.shape[-1] ** -0.5
    d_queries = d_scores.swapaxes(-1, -2) @ keys
    d_keys = d_scores @ queries
    return d_queries, d_keys, d_values, mx.zeros_like(mask)


def relu2(x):
    """main.py's `relu2`, with a gradient 3 times as fast because it compares nothing."""
    return mx.square(mx.maximum(x, 0)) if on_gpu() else squared_relu(x)


@mx.custom_function
def squared_relu(x):
    return mx.square(mx.maximum(x, 0))


@squared_relu.vjp
def squared_relu_gradient(x, gradient, output):
    # This is 2 * max(x, 0). For mx.maximum, MLX would reuse the first pass's, in a separate kernel.
    return gradient * (x + mx.abs(x))


# ---- Gradient checkpointing ---------------------------------------------------------------------
def checkpoint_block(block, run_block):
    """main.py's `checkpoint_block`, with all gradients of a block before those of the block below.

    Breadth first, MLX would otherwise compute the gradients of all matrices at the end, and keep
    the recomputed activations of all blocks until then.
    """
    run_block = nn.utils.checkpoint(block, run_block)
    if on_gpu():
        return run_block

    def run(hidden):
        parameters = block.trainable_parameters()
        hidden, tied = tie_gradients(hidden, parameters)
        block.update(tied)
        hidden = run_block(hidden)
        block.update(parameters)
        return hidden

    return run


@mx.custom_function
def tie_gradients(hidden, parameters):
    """Returns both; their gradients are computed together, see below."""
    return hidden, parameters


@tie_gradients.vjp
def tied_gradients(inputs, gradients, outputs):
    d_hidden, d_parameters = gradients
    arrays = [array for _, array in tree_flatten(d_parameters)]
    return mx.depends([d_hidden], arrays)[0], d_parameters


# ---- Cross-entropy ------------------------------------------------------------------------------
def training_loss(model, inputs, targets, scale, dropout_masks=None):
    """The cross-entropies in nats, times `scale`, summed: main.py's `training_loss`.

    inputs, targets: [B, L]. The gradients w.r.t. the hidden states and the head are computed
    together with the loss, in chunks of rows (as in Liger Kernel, Hsu et al. 2024): this takes half
    the time of computing one after the other, and the logits [B * L, V] never exist as a whole.
    """
    if not has_plain_head(model):
        return REPLACED["training_loss"](model, inputs, targets, scale, dropout_masks)
    hidden = model.model(inputs, dropout_masks=dropout_masks).flatten(0, 1)  # [B * L, D]
    head = model.output_matrix.astype(hidden.dtype)
    return cross_entropy_and_gradients(hidden, head, targets.flatten(), mx.array(scale))[0]


def token_metrics(model, inputs, targets):
    """The cross-entropy of each position in nats, {"loss": [B, L]}: main.py's `token_metrics`."""
    if not has_plain_head(model):
        return REPLACED["token_metrics"](model, inputs, targets)
    hidden = model.model(inputs).flatten(0, 1)  # [B * L, D]
    head = model.output_matrix.astype(hidden.dtype)
    losses = []
    for rows in chunks(len(hidden), len(head)):
        hidden_rows = hidden[rows]
        if losses:
            hidden_rows = wait_for(losses[-1:], hidden_rows)
        logits = (head @ hidden_rows.T).astype(mx.float32)
        nats, _, _ = cross_entropy_of_chunk(logits, targets.flatten()[rows], scale=1)
        losses.append(nats)
    return {"loss": mx.concatenate(losses).reshape(targets.shape)}


def has_plain_head(model):
    """Whether the logits are products with `output_matrix`: not if the layer is one of your own."""
    layer = model.lm_head if model.config.untie else model.model.embed_tokens
    return type(layer) in (nn.Linear, nn.Embedding) and "bias" not in layer


def chunks(num_positions, vocab_size):
    """Slices that divide the positions, each with as many logits as are computed at a time."""
    # Chunks of 2^23 logits (32 MiB) cost no time; with fewer than 128 rows, the products of a large
    # vocabulary become slow. A GPU needs larger ones: each chunk reads all of the head.
    max_rows = max(128, 2**23 // vocab_size)
    if on_gpu():
        max_rows = max(1024, 2**27 // vocab_size)
    size = math.ceil(num_positions / math.ceil(num_positions / max_rows))
    return [slice(start, start + size) for start in range(0, num_positions, size)]


def sum_over_chunks(hidden, head, add_chunk):
    """A loss and its gradients w.r.t. hidden [N, D] and head [V, D], chunk by chunk.

    add_chunk(inputs [n, D], rows, d_head) returns, for a slice `rows` of the rows, the loss, its
    gradient w.r.t. the inputs, and d_head (at first None) plus its gradient w.r.t. the head.
    """
    loss = mx.array(0.0)
    d_hidden = []
    d_head = None
    for rows in chunks(len(hidden), len(head)):
        inputs = hidden[rows]
        if d_hidden:
            inputs = wait_for([loss, d_hidden[-1], d_head], inputs)
        chunk_loss, d_inputs, d_head = add_chunk(inputs, rows, d_head)
        loss = loss + chunk_loss
        d_hidden.append(d_inputs)
    return loss, mx.concatenate(d_hidden), d_head


def chunked_loss_and_gradients(hidden, head, targets, scale, loss_of_chunk):
    """The loss and its gradients w.r.t. hidden [N, D] and head [V, D]; targets: [N]; scale: [].

    Logits have a column for each position, as scores in attend_masked have one for each query.
    loss_of_chunk(logits [V, n] float32, targets [n], scale, rows) computes, for a slice `rows` of
    the positions, their losses [n] and two factors of the gradient w.r.t. the logits, `exps` [V, n]
    and `factor` [n]: the gradient is exps * factor, minus `scale` at each target. The last term is
    never materialized on a CPU: it would be nearly all zeros.
    """

    def add_chunk(inputs, rows, d_head):
        logits = (head @ inputs.T).astype(mx.float32)  # [V, n]
        losses, exps, factor = loss_of_chunk(logits, targets[rows], scale, rows)
        loss = losses.sum()
        if on_gpu():
            is_target = mx.arange(len(head))[:, None] == targets[rows]
            d_logits = (exps * factor - mx.where(is_target, scale, 0)).astype(head.dtype)
            return loss, d_logits.T @ head, add_head_gradient(d_head, d_logits, inputs)
        at_targets = head[targets[rows]] * scale  # [n, D]
        # A product whose first matrix is the small one, as exps.T @ head is not, is faster.
        d_inputs = ((head.T @ exps) * factor).T - at_targets
        inputs = inputs * factor[:, None]  # D columns scaled instead of V
        if d_head is None:
            return loss, d_inputs, exps @ inputs  # [V, D]
        return loss, d_inputs, mx.addmm(d_head, exps, inputs)

    loss, d_hidden, d_head = sum_over_chunks(hidden, head, add_chunk)
    if not on_gpu():
        # `at` adds up repeated targets.
        d_head = d_head.at[targets].subtract(hidden * scale)
    return loss, d_hidden, d_head


def add_head_gradient(d_head, d_logits, inputs):
    """d_head (or 0) plus the float32 gradient w.r.t. `head`, where logits = head @ inputs.T."""
    product = (d_logits @ inputs).astype(mx.float32)
    return product if d_head is None else d_head + product


def fused_cross_entropy_and_gradients(hidden, head, targets, scale):
    """`cross_entropy_and_gradients` by MLX's fused kernels for GPUs.

    They, and those of products, are fast with a multiple of 128 logits. Padding is -3e38, a bias
    that costs nothing.
    """
    num_padding = -len(head) % 128
    padded = mx.pad(head, [(0, num_padding), (0, 0)])
    is_padding = mx.arange(len(padded)) >= len(head)
    bias = mx.where(is_padding, -3e38, 0).astype(head.dtype)

    def loss_of_chunk(logits, targets):
        return (mx.fast.cross_entropy(logits, targets) * scale).sum()

    def add_chunk(inputs, rows, d_head):
        logits = mx.addmm(bias, inputs, padded.T)
        loss, d_logits = mx.value_and_grad(loss_of_chunk)(logits, targets[rows])
        return loss, d_logits @ padded, add_head_gradient(d_head, d_logits.T, inputs)

    loss, d_hidden, d_head = sum_over_chunks(hidden, padded, add_chunk)
    return loss, d_hidden, d_head[: len(head)]


def wait_for(done, array):
    """`array`, available only once the arrays `done` and then some idle operations are computed.

    On a CPU, MLX dispatches operations far ahead of their computation and allocates their results
    at dispatch. Idle operations in between hold the next chunk back until this one is done: with
    267,735 words, a loss then takes the memory of 2.5 chunks instead of 11.
    """
    idle = mx.depends([mx.zeros(2)], done)[0]
    if not on_gpu():
        for _ in range(64):
            idle = mx.cumsum(idle)
    return mx.depends([array], [idle])[0]


def cross_entropy_of_chunk(logits, targets, scale, rows=None):
    """Cross-entropies [n] of logits [V, n] in nats, times `scale`; `exps` [V, n] and `factor` [n].

    exps * factor are the probabilities, times `scale`; targets: [n]; rows: not used.
    """
    largest = logits.max(axis=0)  # [n]
    exps = exp(logits - largest)  # exponents <= 0: no overflow, and `exp` requires it
    total = row_sums(exps.T).flatten()
    target_logits = mx.take_along_axis(logits, targets[None], axis=0).flatten()
    nats = mx.log(total) - (target_logits - largest)
    return nats * scale, exps, scale / total


def row_sums(array):
    """The row sums [n, 1] of an array [n, V]; on a CPU by a product, which is twice as fast."""
    if on_gpu():
        return array.sum(axis=-1, keepdims=True)
    return array @ mx.ones((array.shape[-1], 1))


def stored_gradients(inputs, gradients, outputs):
    """The vjp of a function that has computed a loss and its gradients w.r.t. `hidden` and `head`.

    MLX passes the inputs, the gradients w.r.t. the outputs, and the outputs. None of the other
    inputs is trained.
    """
    hidden, head, *others = inputs
    scale = gradients[0]  # of the result w.r.t. this loss: 1 unless it is scaled
    d_hidden = (outputs[1] * scale).astype(hidden.dtype)
    d_head = (outputs[2] * scale).astype(head.dtype)
    return d_hidden, d_head, *map(mx.zeros_like, others)


@mx.custom_function
def cross_entropy_and_gradients(hidden, head, targets, scale):
    """The loss and its gradients w.r.t. hidden [N, D] and head [V, D]; see stored_gradients."""
    if on_gpu():
        return fused_cross_entropy_and_gradients(hidden, head, targets, scale)
    return chunked_loss_and_gradients(hidden, head, targets, scale, cross_entropy_of_chunk)


cross_entropy_and_gradients.vjp(stored_gradients)


# ---- Compiler -----------------------------------------------------------------------------------
# On a CPU, MLX generates C++ kernels and runs `g++` for each: 0.4 s, 0.3 s of it for one header. A
# first run needs dozens of kernels.

PREAMBLE = "mlx/backend/cpu/compiled_preamble.h"  # what each kernel includes
MLX_OPTIONS = ["-std=c++17", "-O3", "-Wall", "-fPIC"]  # a precompiled header needs the same options
# With these, more kernels use the vector units: square roots, comparisons, and those with many
# arrays. They change no result, but for the second one on ARM: see main.py's use_device.
OWN_OPTIONS = [
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "--param=vect-max-version-for-alias-checks=100",
]


def use_precompiled_header():
    """Prepends to PATH a folder whose `g++` uses a precompiled copy of MLX's header.

    It lies next to that copy, in a folder for each MLX and compiler version.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")  # MLX only calls g++
    code_dir = make_kernel_dir()
    if compiler is None or sys.platform != "linux":
        return
    if Path(compiler).parent.parent == code_dir:
        return  # the process that has started this one has put it there
    status = os.stat(compiler)
    about = [mx.__version__, compiler, status.st_size, status.st_mtime_ns]
    about += [MLX_OPTIONS, OWN_OPTIONS]
    folder = code_dir / f"compiler-{hash_of_data(about)[:12]}"
    header = folder / f"{PREAMBLE}.gch"
    include = Path(mx.__file__).parent / "include"
    options = [*MLX_OPTIONS, *OWN_OPTIONS, "-I", include, "-x", "c++-header"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # as on a full disk
        compile_once(header, [compiler, *options, include / PREAMBLE])
    fast_command = shlex.join([compiler, "-I", str(folder), *OWN_OPTIONS])
    # If the header is damaged, or the compiler lacks an option, it compiles nearly as MLX asked.
    plain_command = f'{shlex.quote(compiler)} -ffp-contract=off "$@"'
    use_compiler(folder, f'{fast_command} "$@" 2>/dev/null || {plain_command}')


# ---- Streams: each CPU stream of MLX is a thread ------------------------------------------------
# With half of the rows on each of two streams, elementwise work uses both cores, too: at dim 128,
# a step took 50 ms instead of the 80 ms of one stream.


def use_cpu():
    """Prepares MLX for a CPU, before anything is computed.

    Graphs are computed breadth first, so that streams alternate; a header of kernels is compiled
    only once.
    """
    # A step of 24 blocks of dim 256, with Muon, took 1.18 times as long with MLX's own 20: one
    # stream waited for the other.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")
    # A stream that is woken for an operation does not interrupt the thread that dispatches the
    # next ones: at dim 128, 2 interruptions a step instead of 235.
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or a container forbids it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    set_forwarder("threads", count_cores())  # a shard of a batch gets one, see use_streams
    use_precompiled_header()


def count_streams(rows, context_size):
    """How many streams share the rows of a batch.

    A shard has at least 256 positions on average, or its products would be too small. A GPU has
    one stream, and so does macOS, whose BLAS has its own threads.
    """
    if on_gpu() or BLAS.startswith("Accelerate"):
        return 1
    return max(1, min(count_cores(), rows, rows * context_size // 256))


@lru_cache(None)  # made once: a stream lives as long as the process
def cpu_stream(index):
    return mx.new_stream(mx.cpu)


streams_in_use = 1  # set by the last call of use_streams


def use_streams(rows, context_size):
    """Chooses the streams for a batch of `rows` rows.

    Each of several streams uses one thread for its matrix products, a single stream uses all.
    """
    global streams_in_use
    streams_in_use = count_streams(rows, context_size)
    # Otherwise each stream's products would start one thread per core.
    set_forwarder("threads", count_cores() if streams_in_use == 1 else 1)


def current_streams():
    """The streams of the current batch."""
    if streams_in_use == 1:
        return [mx.default_stream(mx.default_device())]
    return [cpu_stream(i) for i in range(streams_in_use)]


def sum_over_shards(function, *arrays):
    """function(*arrays), a tree of sums over the rows of arrays [B, ...], the first of them [B, L].

    Each stream computes it for a shard of the rows; these sums are added up leaf by leaf, each leaf
    on the next stream in turn. This only builds MLX's graph; when it is evaluated, all streams run
    in parallel.
    """
    use_streams(*arrays[0].shape[:2])
    partial_sums = compute_shards(function, *arrays)
    return map_in_turn(lambda *leaves: reduce(mx.add, leaves), *partial_sums)


def compute_shards(function, *arrays):
    """[function(*shard), ...]: each stream computes it for its shard of the arrays' rows.

    If there are fewer rows than streams, the list is shorter.
    """
    streams = current_streams()
    count = len(arrays[0])
    results = []
    for i, stream in enumerate(streams):
        rows = slice(count * i // len(streams), count * (i + 1) // len(streams))
        if rows.start < rows.stop:
            with mx.stream(stream):  # operations run on the stream under which they are built
                results.append(function(*[array[rows] for array in arrays]))
    return results


def map_in_turn(function, *trees):
    """tree_map(function, *trees), computed for each leaf on the next of the current streams."""
    streams = itertools.cycle(current_streams())

    def on_next_stream(*leaves):
        with mx.stream(next(streams)):
            return function(*leaves)

    return tree_map(on_next_stream, *trees)


def clip_grad_norm(gradients, max_norm):
    """Scales a tree of gradients to a norm of at most max_norm; returns it and its norm before.

    Like MLX's, but on all streams; a sum of squares is a dot product, which reads a vector once.
    """
    if on_gpu():
        return optim.clip_grad_norm(gradients, max_norm)
    squares = map_in_turn(lambda array: array.reshape(1, -1) @ array.reshape(-1, 1), gradients)
    squares = [square for _, square in tree_flatten(squares)]
    # Like sum(squares), but by the same kernel for any number of parameters.
    norm = mx.sqrt(mx.cumsum(mx.concatenate(squares).flatten())[-1])
    scale = mx.minimum(max_norm / (norm + 1e-6), 1)
    return map_in_turn(lambda array: array * scale, gradients), norm


def parallelize(optimizer):
    """An MLX optimizer that distributes the parameters over the streams from now on.

    Each parameter is updated on the stream that has the fewest elements so far. MLX's own AdamW
    also gets a quicker update.
    """
    update = optimizer.apply_single
    if type(optimizer) is optim.AdamW and optimizer.bias_correction:
        update = partial(adamw_update, optimizer)
    load = []  # elements of each stream

    def apply_single(gradient, parameter, state):
        streams = current_streams()
        if len(load) != len(streams):
            load[:] = [0] * len(streams)
        least = load.index(min(load))
        load[least] += parameter.size
        with mx.stream(streams[least]):
            return update(gradient, parameter, state)

    optimizer.apply_single = apply_single
    if hasattr(optimizer, "orthogonalize"):  # Muon
        optimizer.orthogonalize = partial(map_over_shards, optimizer.orthogonalize)
    return optimizer


def map_over_shards(function, stack):
    """function(stack), arrays [N, ...]; each stream computes it for a shard of them."""

    def arrays_of(shard):
        return [*function(shard)]  # taken apart on the shard's stream

    return list(itertools.chain(*compute_shards(arrays_of, stack)))


def adamw_update(optimizer, gradient, parameter, state):
    """What MLX's AdamW does with a parameter, with a bias correction that costs nothing.

    Fused into a kernel by mx.compile, the scalars that all elements share, powers of the betas,
    would be recomputed for every element. It does not fuse across mx.contiguous.
    """
    beta1, beta2 = optimizer.betas
    rate = mx.contiguous(optimizer.learning_rate / (1 - beta1**optimizer.step))
    correction = mx.contiguous(mx.rsqrt(1 - beta2**optimizer.step))
    decay = mx.contiguous(1 - optimizer.learning_rate * optimizer.weight_decay)
    m = beta1 * state["m"] + (1 - beta1) * gradient
    v = beta2 * state["v"] + (1 - beta2) * mx.square(gradient)
    state["m"] = m
    state["v"] = v
    return decay * parameter - rate * m / (mx.sqrt(v) * correction + optimizer.eps)


# ---- Sampling: step.py, which imports main.py, so only when it is needed ------------------------
def Reader(model):
    """main.py's Reader, or that of step.py."""
    return quick_reader(model) or REPLACED["Reader"](model)


def quick_reader(model, num_texts=1):
    """step.py's Reader; None on a GPU, on a Mac, and where plain MLX has to sample the model."""
    if on_gpu() or sys.platform != "linux" or "Reader" not in REPLACED:
        return None
    return extra("step").make_reader(model, num_texts)


def sample_tokens(logits, flags, windows, keys):
    """main.py's sample_tokens; step.py's for the logits of its Reader, which are NumPy's."""
    if isinstance(logits, mx.array):
        return REPLACED["sample_tokens"](logits, flags, windows, keys)
    return extra("step").sample_tokens(logits, flags, windows, keys)
