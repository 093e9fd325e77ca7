"""What makes MLX fast on a CPU: a fast BLAS, quicker attention and loss, a stream for each core.

main.py imports this file before MLX and then uses, in place of its own plain functions of the same
names,

    attend          causal attention, with a softmax that uses the vector units
    cross_entropy   loss and gradient in one pass over chunks of rows, so that the logits never
                    exist as a whole
    over_streams    a function of a batch, computed for a share of the rows on each core
    add_up          the sum of what the shares gave
    spread          an optimizer that deals its work out over the cores

Each computes what the plain one computes, to rounding; tests/extras/test_fast.py compares them. On
a GPU they leave the work to MLX. Without this file main.py works in the same way, only slower.

Shapes: B rows of a batch, L positions, D model dimension, H query heads, K key and value heads, d
dimension of a head, V vocabulary, N any number.
"""

import contextlib
import ctypes
import hashlib
import math
import os
import re
import subprocess
import sys
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np

from datasets import CACHE

# ---- BLAS ---------------------------------------------------------------------------------------
# The library of matrix products, which has to be loaded before MLX.

REFERENCE_BLAS = "reference BLAS"  # what MLX's Linux wheel brings along

# C. MLX calls cblas_sgemm by rows, with `order` 101; 111 is a matrix as it stands, 112 transposed,
# as in x @ weight.T. `gemm` is the fast BLAS's own function, set in load_blas. The loop is for at
# most 8 rows times such a transposed matrix.
BLAS_FORWARDER = """
void (*gemm)(int, int, int, long, long, long, float, const float*, long, const float*, long,
             float, float*, long);
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha,
                 const float* a, int lda, const float* b, int ldb, float beta,
                 float* c, int ldc) {
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
    """Makes a fast BLAS visible to MLX, before MLX is imported, and returns its name.

    MLX's Linux wheel carries the reference BLAS (6 GFLOP/s where OpenBLAS reaches 190), but
    whichever library with global symbols is loaded first wins: here a forwarder to the system's
    BLAS or to the one inside NumPy's wheel, whose names and integers differ. (The forwarder passes
    long integers, which a BLAS of ints reads as well.) It computes one thing itself, a few rows
    times a matrix, which is what decoding does: as fast as memory is read, where OpenBLAS takes 3
    times as long.
    """
    if sys.platform != "linux":
        return "Accelerate"  # macOS's own, which MLX uses
    # Threads that spin while they wait lose their core to other programs just when work comes: 7
    # times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_freed_memory()
    mkl = ["libmkl_rt.so.2", "libmkl_rt.so", f"{sys.prefix}/lib/libmkl_rt.so.2"]
    for path in ["libopenblas.so.0", "libblis.so.4", *mkl]:
        if load_blas(path, "cblas_sgemm"):
            return os.path.basename(path) + kernels_of(path, "openblas_get_corename")
    for path in Path(np.__path__[0]).parent.glob("numpy.libs/libscipy_openblas64_*.so"):
        # MLX would not find NumPy's names by itself.
        if load_blas(str(path), "scipy_cblas_sgemm64_", needs_forwarder=True):
            return "NumPy's OpenBLAS" + kernels_of(str(path), "scipy_openblas_get_corename64_")
    return REFERENCE_BLAS


def keep_freed_memory():
    """Makes glibc keep the memory of freed arrays.

    Otherwise each new array is faulted in page by page: 7 times the time of a sum.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library, as on Alpine
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX


def load_blas(path, product, needs_forwarder=False):
    """Makes the library at `path` MLX's BLAS; False if that fails. product: its cblas_sgemm."""
    try:
        gemm = ctypes.CDLL(path)[product]
    except (OSError, AttributeError):  # not installed; without that function
        return False
    forwarder = (
        compile_forwarder()
    )  # loaded before `path` below, so its cblas_sgemm is the one found
    if forwarder:
        ctypes.c_void_p.in_dll(forwarder, "gemm").value = ctypes.cast(gemm, ctypes.c_void_p).value
    elif needs_forwarder:
        return False
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # its other functions, for set_blas_threads too
    return True


def compile_forwarder():
    """BLAS_FORWARDER as a library, compiled once for each kind of CPU; None if that fails."""
    cpu = re.search("^(flags|Features).*", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    kind = f"{BLAS_FORWARDER}{cpu and cpu[0]}"  # a cache may serve several CPUs
    path = CACHE / f"blas-{hashlib.sha1(kind.encode()).hexdigest()[:12]}.so"
    # Without the first two options sums would stay scalar.
    vectors = ["-march=native", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
    for options in (
        [*vectors, "-fopenmp"],
        vectors,
        [],
    ):  # what one compiler knows another may not
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if not path.exists():
                CACHE.mkdir(parents=True, exist_ok=True)
                new = f"{path}.{os.getpid()}"
                command = ["cc", "-shared", "-fPIC", "-O3", *options, "-x", "c", "-", "-o", new]
                subprocess.run(
                    command,
                    input=BLAS_FORWARDER.encode(),
                    check=True,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "TMPDIR": str(CACHE)},  # that of the user may be full
                )
                os.replace(new, path)  # never half a library, even if two processes compile
            return ctypes.CDLL(
                str(path), mode=ctypes.RTLD_GLOBAL
            )  # visible to MLX, which is loaded later
    return None


def kernels_of(path, function):
    """The kernels that an OpenBLAS has chosen, " (SkylakeX)", or "". Each rounds in its own way."""
    try:
        name = ctypes.CDLL(path)[function]
    except AttributeError:  # no OpenBLAS
        return ""
    name.restype = ctypes.c_char_p  # else ctypes would take the pointer for an int
    return f" ({name().decode()})"


def set_blas_threads(count):
    """Lets a matrix product use `count` threads."""
    setters = [
        "openblas_set_num_threads",
        "scipy_openblas_set_num_threads64_",
        "MKL_Set_Num_Threads",
        "bli_thread_set_num_threads",
    ]
    for name in setters:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None)[name](count)  # None: among all that this process has loaded


BLAS = use_fast_blas()  # kept in checkpoints: another one rounds otherwise

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


# ---- Attention ----------------------------------------------------------------------------------
def on_gpu():
    """Whether MLX computes on a GPU, where its own functions are the fast ones."""
    return mx.default_device() == mx.gpu


def exp(x):
    """e to the x, for x <= 0, within 2e-6; below -30 it stays at 1e-13.

    On a CPU MLX's own is scalar and takes 12 ns. This one, Taylor's polynomial of x / 32, then to
    the 32nd power, is products and sums alone, which use the vector units: 1.2 ns.
    """
    if on_gpu():
        return mx.exp(x)
    x = mx.maximum(x, -30)
    power = 0
    for k in reversed(range(7)):
        power = power * x + 1 / (
            32**k * math.factorial(k)
        )  # Horner's scheme for the sum of (x / 32)^k / k!
    for _ in range(5):  # squared 5 times: to the 32nd
        power = power * power
    return power


@mx.custom_function
def softmax(scores):
    """Softmax of scores [..., S] over the last axis, by `exp` and with a gradient of its own."""
    weights = exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@softmax.vjp
def softmax_gradient(scores, gradient, weights):
    """The gradient by the scores; MLX gives the output, too, so no exp is computed again."""
    product = gradient * weights
    return product - weights * product.sum(
        axis=-1, keepdims=True
    )  # the product with softmax's Jacobian


def attend(queries, keys, values):
    """Causal attention: queries [B, H, L, d], keys and values [B, K, L, d] -> [B, H, L, d].

    As main.py's `attend`; on a CPU it makes training steps 3 to 16 % quicker.
    """
    B, H, L, d = queries.shape
    scale = d**-0.5
    if on_gpu():
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask="causal"
        )
    queries = (queries * scale).reshape(B, keys.shape[1], -1, L, d)  # [B, K, H/K, L, d]
    scores = queries @ keys[:, :, None].swapaxes(-1, -2)  # [B, K, H/K, L, L]
    past = mx.array(np.tri(L, dtype=bool))  # [L, L]
    weights = softmax(mx.where(past, scores, -1e9))  # the future weighs 1e-13 at most
    attended = weights @ values[:, :, None]  # [B, K, H/K, L, d]
    return attended.reshape(B, H, L, d)


# ---- Cross-entropy ------------------------------------------------------------------------------
def cross_entropy(hidden, head, targets, weights, training=True):
    """Sum of the cross-entropies in nats, each times its weight: main.py's `cross_entropy`.

    hidden: [B, L, D]; head: [V, D]; targets: [B, L]; weights: [B, L] or a number. training: False
    where no gradient is asked for, so that none is computed. The gradients by `hidden` and `head`
    are computed together with the loss, chunk of rows by chunk of rows (as in Liger Kernel, Hsu et
    al. 2024): half the time of doing one after the other, and the logits [B * L, V] never exist as
    a whole.
    """
    inputs = flatten_positions(hidden, head, targets, weights)
    if training:
        return cross_entropy_and_gradients(*inputs)[0]
    return sum_over_chunks(*inputs, cross_entropy_of_chunk, training=False)[0]


def flatten_positions(hidden, head, targets, weights):
    """The arguments of cross_entropy for N positions: hidden [N, D], head, targets, weights [N]."""
    weights = mx.broadcast_to(mx.array(weights), targets.shape)
    return hidden.flatten(0, 1), head.astype(hidden.dtype), targets.flatten(), weights.flatten()


def sum_over_chunks(hidden, head, targets, weights, loss_of_chunk, training=True):
    """The loss and its gradients by hidden [N, D] and head [V, D], for targets and weights [N].

    loss_of_chunk(logits [n, V] float32, targets [n], weights [n, 1], rows) computes for a slice
    `rows` of the rows the loss and its gradient by the logits in two factors, `powers` [n, V] and
    `scale` [n, 1]: the gradient is powers * scale, less `weights` at each target. The last term is
    never written out: it would be nearly all zeros.
    """
    # Chunks of 2^23 logits (32 MiB) cost nothing; with fewer than 128 rows the products of a large
    # vocabulary become slow.
    most = max(128, 2**23 // len(head))
    chunks = math.ceil(len(hidden) / most)
    size = math.ceil(len(hidden) / chunks)
    loss = mx.array(0.0)
    hidden_gradients = []
    head_gradient = None
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        inputs = hidden[rows]  # [n, D]
        if start > 0:
            done = [loss, hidden_gradients[-1], head_gradient] if training else [loss]
            inputs = wait_for(done, inputs)
        weight = weights[rows, None]  # [n, 1]
        logits = (inputs @ head.T).astype(mx.float32)  # [n, V]
        chunk_loss, powers, scale = loss_of_chunk(logits, targets[rows], weight, rows)
        loss = loss + chunk_loss
        powers = powers.astype(head.dtype)
        scale = scale.astype(head.dtype)
        of_targets = head[targets[rows]] * weight.astype(head.dtype)  # [n, D]
        hidden_gradients.append((powers @ head) * scale - of_targets)
        inputs = inputs * scale  # D columns scaled instead of V
        if start == 0:
            head_gradient = powers.T @ inputs  # [V, D]
        else:
            head_gradient = mx.addmm(head_gradient, powers.T, inputs)
    states = hidden.astype(mx.float32) * weights[:, None]  # [N, D]
    head_gradient = (
        head_gradient.astype(mx.float32).at[targets].subtract(states)
    )  # `at` adds up those of one target
    return loss, mx.concatenate(hidden_gradients), head_gradient


def wait_for(done, array):
    """`array`, but not before the arrays `done` are computed, and some idle operations later.

    On a CPU MLX dispatches operations far ahead of their computation and allocates their results
    then. Idle operations in between hold the next chunk back until this one is over: with 267,735
    words a loss then takes the memory of 2.5 chunks instead of 11.
    """
    idle = mx.depends([mx.zeros(2)], done)[0]
    if not on_gpu():
        for _ in range(64):
            idle = mx.cumsum(idle)
    return mx.depends([array], [idle])[0]


def cross_entropy_of_chunk(logits, targets, weights, rows):
    """What sum_over_chunks wants of a chunk; logits: [n, V], targets: [n], weights: [n, 1]."""
    below = logits - logits.max(
        axis=-1, keepdims=True
    )  # 0 at most: no overflow, and `exp` needs it
    powers = exp(below)
    total = powers.sum(axis=-1, keepdims=True)  # [n, 1]; powers / total are the probabilities
    nats = mx.log(total) - mx.take_along_axis(below, targets[:, None], axis=-1)  # [n, 1]
    return (nats * weights).sum(), powers, weights / total


def stored_gradients(inputs, gradients, outputs):
    """The vjp of a function that has computed a loss and its gradients by `hidden` and `head`.

    MLX gives the inputs, the gradients by the outputs, and the outputs. Nothing else among the
    inputs is trained.
    """
    head = inputs[1]
    scale = gradients[0].astype(head.dtype)  # of the result by this loss: 1 unless it is scaled
    others = [mx.zeros_like(array) for array in inputs[2:]]
    return outputs[1] * scale, (outputs[2] * scale).astype(head.dtype), *others


@mx.custom_function
def cross_entropy_and_gradients(hidden, head, targets, weights):
    """The loss and its gradients by hidden [N, D] and head [V, D], see stored_gradients."""
    return sum_over_chunks(hidden, head, targets, weights, cross_entropy_of_chunk)


cross_entropy_and_gradients.vjp(stored_gradients)


# ---- Streams: a CPU stream of MLX is a thread ---------------------------------------------------
# Half of the rows on each of two streams uses both cores for the elementwise work, too: at dim 128
# a step took 50 ms where one stream took 80.


def use_cpu():
    """Lets MLX compute graphs breadth first: else one stream would wait for the other."""
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")


def count_streams(rows, context_size):
    """How many streams share the rows of a batch.

    A share has 256 positions on average or more, or its products become small. A GPU has one
    stream; so has macOS, whose BLAS brings its own threads.
    """
    if on_gpu() or BLAS == "Accelerate":
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, rows, rows * context_size // 256))


@lru_cache(None)  # made once: a stream lives as long as the process
def cpu_stream(index):
    return mx.new_stream(mx.cpu)


streams_in_use = 1  # by the last call of use_streams


def use_streams(rows, context_size):
    """The streams for a batch of so many rows.

    Each of several computes its matrix products in one thread, a single one in all.
    """
    global streams_in_use
    if on_gpu() or BLAS == "Accelerate":
        return [mx.default_stream(mx.default_device())]
    streams_in_use = count_streams(rows, context_size)
    cores = len(os.sched_getaffinity(0))
    set_blas_threads(
        cores if streams_in_use == 1 else 1
    )  # or each stream's products would start a thread a core
    return current_streams()


def current_streams():
    """The streams of the batch that is computed now."""
    if on_gpu() or BLAS == "Accelerate":
        return [mx.default_stream(mx.default_device())]
    return [cpu_stream(i) for i in range(streams_in_use)]


def use_all_cores():
    """Gives a matrix product all cores, as decoding wants it."""
    use_streams(1, 1)


def share(count, part, parts):
    """The slice of `count` rows that is part number `part` of `parts` nearly equal ones."""
    return slice(count * part // parts, count * (part + 1) // parts)


def over_streams(function, *arrays):
    """[function(*rows), ...] for shares of the rows of `arrays` [B, L, ...], each on a stream.

    What is built here is only MLX's graph: when it is evaluated, all streams run side by side.
    """
    rows, context_size = arrays[0].shape[:2]
    streams = use_streams(rows, context_size)
    results = []
    for i, stream in enumerate(streams):
        own = share(rows, i, len(streams))
        with mx.stream(stream):  # operations belong to the stream under which they are built
            results.append(function(*[array[own] for array in arrays]))
    return results


def add_up(trees):
    """The sum of several trees of arrays, each leaf on the next stream in turn."""
    streams = current_streams()
    total = []
    for i, leaves in enumerate(zip(*map(tree_flatten, trees))):
        name = leaves[0][0]
        with mx.stream(streams[i % len(streams)]):
            total.append((name, reduce(mx.add, [array for _, array in leaves])))
    return tree_unflatten(total)


def spread(optimizer_class):
    """A subclass of an MLX optimizer that deals the parameters out over the streams."""

    class Spread(optimizer_class):
        """Updates each parameter on the stream that has the fewest elements so far."""

        load = None  # elements of each stream

        def apply_single(self, gradient, parameter, state):
            streams = current_streams()
            if self.load is None or len(self.load) != len(streams):
                self.load = [0] * len(streams)
            least = self.load.index(min(self.load))
            self.load[least] += parameter.size
            with mx.stream(streams[least]):
                return super().apply_single(gradient, parameter, state)

    return Spread
