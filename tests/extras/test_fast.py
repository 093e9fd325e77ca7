"""What is quick on a CPU, against the plain functions of main.py and against NumPy in float64."""

import inspect
import itertools
import os
import re
import shutil
import sys
from functools import partial

import anchors
import main
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT, TINY, copy_program, load_module, log_rows, run, start, write_script
from mlx.utils import tree_flatten

from extras.features.fast import sources_of_definitions
from support.code import EDITED_NAMES, LOADED_SOURCES, hash_of_code
from extras.features import fast


@pytest.fixture(scope="session")
def plain():
    """main.py once more, without fast.py: a module with its own plain functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_FAST", "1")
        module = load_module(ROOT / "main.py")
    assert module.fast is None and main.fast is fast
    return module


def plain_layer(name):
    """A layer's plain function of its weight and its input."""
    functions = {
        "linear": lambda weight, x: x @ weight.T,
        "rms_norm": lambda weight, x: mx.fast.rms_norm(x, weight, 0.1),
        "embedding": lambda weight, tokens: weight[tokens],
    }
    return functions[name]


def quick_layer(name):
    """The same by MLX's own layer, as fast.py has changed it."""
    layers = {
        "linear": nn.Linear(1, 1, bias=False),
        "rms_norm": nn.RMSNorm(1, 0.1),
        "embedding": nn.Embedding(1, 1),
    }

    def call(weight, x):
        layers[name].weight = weight
        return layers[name](x)

    return call


def normal(seed, *shape, deviation=1.0):
    values = np.random.default_rng(seed).normal(0, deviation, shape)
    return mx.array(values.astype(np.float32))


def assert_near(found, expected, tolerance):
    """Both trees have the same leaves, which differ by `tolerance` of the largest element."""
    found = dict(tree_flatten(found))
    expected = dict(tree_flatten(expected))
    assert found.keys() == expected.keys()
    for name, ours in found.items():
        theirs = expected[name]
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        ours = np.array(ours.astype(mx.float32))
        theirs = np.array(theirs.astype(mx.float32))
        assert abs(ours - theirs).max() <= tolerance * abs(theirs).max(), name


# ---- Which of two functions runs ----------------------------------------------------------------


@pytest.mark.upkeep
@pytest.mark.parametrize("name", fast.PLAIN_HASHES)
def test_it_stands_for_the_plain_function_as_it_is_now(name, plain):
    digest = hash_of_code(sources_of_definitions(LOADED_SOURCES["main.py"])[name])
    assert name not in EDITED_NAMES, (
        f"{name} in main.py has changed, so that main.py no longer uses the quick one: compare it "
        f"with {name} in fast.py, change that accordingly, and then enter "
        f'"{name}": "{digest}" in PLAIN_HASHES'
    )
    if name not in fast.REPLACED:  # another one stands for it, too
        return
    quick = getattr(fast, name)
    assert getattr(main, name) is quick
    assert inspect.signature(quick) == inspect.signature(getattr(plain, name))


EDITS = {  # what is replaced in main.py, and by what
    anchors.LOSS: "return 2 * (losses * scale).sum()",
    anchors.CLIP: "return gradients, mx.array(7.0)",
    # Remarks are no edits.
    anchors.MODEL_SECTION: f"# A remark\n# of two lines.\n\n{anchors.MODEL_SECTION}",
    '    """Squared ReLU': '    """The square of ReLU',
    anchors.RELU2: "mx.square(nn.relu(x))  # of x\n",
}


def test_edited_functions_take_effect_at_once(text, tmp_path):
    """And they alone are named on the start screen."""
    line = ["--text", text, *TINY, "--num_iters=3", "--steps_per_report=1", "--save_dir"]
    run(*line, tmp_path / "plain")
    path = copy_program(tmp_path / "copy", EDITS)
    out, _ = run(*line, tmp_path / "edited", program=["-B", path])  # a Python of its own
    assert "kernels: fast.py\n" in out
    named = re.findall("^edited +(.*): computed by main.py, not by", out, re.M)
    assert named == ["training_loss, clip_grad_norm"]
    [plain, *_] = log_rows(tmp_path / "plain", "train")
    edited = log_rows(tmp_path / "edited", "train")
    assert edited[0]["loss"] == pytest.approx(2 * plain["loss"], rel=1e-5)
    assert [row["gradient_norm"] for row in edited] == [7, 7, 7]


# ---- Each function: values and gradients ---------------------------------------------------------


def by_both(loss, arrays, compiled, plain):
    """What loss(program, *arrays) gives, and its gradients, of both programs."""
    results = []
    for program in (main, plain):
        gradients_of = mx.value_and_grad(partial(loss, program), argnums=[*range(len(arrays))])
        if compiled:
            gradients_of = mx.compile(gradients_of)
        results.append(gradients_of(*arrays))
    return results


def heads(query_heads, key_heads, length, deviation=1.0):
    """Queries, keys and values; a deviation of 6 puts nearly all weight on one position."""
    arrays = []
    for seed, count in enumerate((query_heads, key_heads, key_heads)):
        arrays.append(normal(seed, 3, count, length, 6, deviation=deviation))
    return arrays


FREQUENCIES = 100.0 ** -(np.arange(0, 6, 2) / 6)


@pytest.fixture(params=["cpu", "pretended gpu"])
def branch(request, monkeypatch):
    """Each test with it is about both branches of fast.py; a CPU computes."""
    if request.param != "cpu":
        monkeypatch.setattr(fast, "on_gpu", lambda: True)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name, inputs, tolerance", [
    ("relu2", [normal(0, 50, 31)], 1e-6),
    ("linear", [normal(1, 40, 31), normal(0, 3, 50, 31)], 1e-6),
    ("linear", [normal(1, 40, 31), normal(0, 3, 1, 31)], 1e-6),
    ("linear", [normal(1, 40, 31), normal(0, 31)], 1e-6),
    ("rms_norm", [normal(1, 40), normal(0, 3, 1, 40, deviation=3)], 2e-6),
    ("rms_norm", [normal(1, 40), normal(0, 3, 13, 40, deviation=3)], 2e-6),
    ("rotate", [normal(0, 3, 4, 1, 6), FREQUENCIES, 7], 2e-6),
    ("rotate", [normal(0, 3, 4, 13, 6), FREQUENCIES, 7], 2e-6),
    ("attend", heads(4, 4, 1), 2e-5),
    ("attend", heads(4, 1, 13), 2e-5),
    ("attend", heads(4, 2, 64, deviation=6), 2e-5),
    # Of one id, of seven, and of a thousand, of which a text lacks most.
    ("embedding", [normal(0, 1, 6), mx.array([[0] * 100] * 2)], 1e-6),
    ("embedding", [normal(0, 7, 6), mx.array([[6, 0, 6, 3], [3, 6, 0, 6]])], 1e-6),
    ("embedding", [normal(0, 1000, 6), mx.array([[*range(50), 999, 5, 5]] * 2)], 1e-6),
])  # fmt: skip
def test_values_and_gradients(name, inputs, tolerance, compiled, plain):
    arrays = []
    for value in inputs:
        if isinstance(value, mx.array) and value.dtype == mx.float32:
            arrays.append(value)
    constants = inputs[len(arrays) :]

    def function_of(program):
        if hasattr(program, name):
            return getattr(program, name)
        return plain_layer(name) if program is plain else quick_layer(name)

    factors = normal(9, *function_of(plain)(*inputs).shape)

    def weighted(program, *arrays):
        output = function_of(program)(*arrays, *constants)
        return (output * factors).sum(), output

    results = []
    for (_, output), gradients in by_both(weighted, arrays, compiled, plain):
        results.append([output, gradients])
    assert_near(*results, tolerance)


@pytest.mark.usefixtures("branch")
def test_a_norm_in_bfloat16():
    """The gradient of its weight is about as exact as its inputs."""
    x, weight, factors = [array.astype(mx.bfloat16) for array in (
        normal(0, 8, 512, 16, deviation=3), normal(1, 16), 1 + normal(2, 8, 512, 16)
    )]  # fmt: skip

    def weighted(weight, dtype):
        normed = quick_layer("rms_norm")(weight.astype(dtype), x.astype(dtype))
        return (normed.astype(mx.float32) * factors.astype(mx.float32)).sum()

    gradients = [mx.grad(weighted)(weight, dtype) for dtype in (mx.bfloat16, mx.float32)]
    assert_near(*[gradient.astype(mx.float32) for gradient in gradients], 0.004)


@pytest.mark.usefixtures("branch")
@pytest.mark.parametrize("B, L, V, dtype, tolerance", [
    (2, 25, 13, mx.float32, 1e-5),
    (2, 25, 13, mx.bfloat16, 0.02),  # as on a GPU; the head and its gradient: float32
    (2, 75, 66_000, mx.float32, 1.5e-4),  # two chunks; the plain one adds 66,000 in float32
])  # fmt: skip
@pytest.mark.parametrize("untie, compiled", [(False, True), (True, False)])
def test_the_loss_its_gradients_and_the_score(B, L, V, dtype, tolerance, untie, compiled, plain):
    targets = mx.array(np.random.default_rng(5).integers(V, size=(B, L)))
    hidden = normal(0, B, L, 8).astype(dtype)
    head = normal(1, V, 8, deviation=3)  # sharp distributions, targets far down

    def loss(program, hidden, head):
        model = model_of(hidden, head, program, untie)
        return 0.5 * program.training_loss(model, targets, targets, 0.02)

    results = by_both(loss, [hidden, head], compiled, plain)
    assert_near(*results, tolerance)
    for program, (value, _) in zip((main, plain), results):
        model = model_of(hidden, head, program, untie)
        scores = program.token_metrics(model, targets, targets)
        assert [*scores] == ["loss"] and scores["loss"].shape == (B, L)
        sum_of_scores = scores["loss"].sum().item() * 0.01
        assert sum_of_scores == pytest.approx(value.item(), rel=max(tolerance, 1e-5))


class FinalStates(nn.Module):
    """In the place of a Transformer: final hidden states [B, L, D], whatever it reads."""

    def __init__(self, hidden, head):
        super().__init__()
        self.hidden = hidden
        self.embed_tokens = nn.Embedding(1, 1)
        self.embed_tokens.weight = head

    def __call__(self, tokens, caches=None, dropout_masks=None):
        return self.hidden


def model_of(hidden, head, program=main, untie=False):
    """A model with these final hidden states, and this output layer [V, D]."""
    dim = head.shape[1]
    config = program.Config(len(head), 8, 1, dim, 2, 2, "relu2", 8, untie=untie)
    model = program.LanguageModel(config)
    model.model = FinalStates(hidden, head)
    if untie:
        model.lm_head.weight = head
    return model


@pytest.mark.usefixtures("branch")
def test_the_memory_of_a_large_vocabulary(monkeypatch):
    """Weights, twice their gradient, four chunks of logits; all of the logits are twelve chunks.

    A CPU that pretends to be a GPU takes three arrays for a chunk's loss, and begins operations of
    further ones ahead: 12 instead of the 37 that were seen when chunks did not wait.
    """
    most = 16 if fast.on_gpu() else 4
    starts = range(0, 32 * 48, 128)
    monkeypatch.setattr(fast, "chunks", lambda *sizes: [slice(i, i + 128) for i in starts])
    vocab_size, dim = 20_000, 32
    head = mx.random.normal((vocab_size, dim))
    hidden = mx.random.normal((32, 48, dim))
    targets = mx.random.randint(0, vocab_size, (32, 48))
    mx.eval(head, hidden, targets)

    def loss(hidden, head):
        return main.training_loss(model_of(hidden, head), targets, targets, 1 / targets.size)

    step = mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))
    before = mx.get_active_memory() - head.nbytes
    mx.reset_peak_memory()
    mx.eval(step(hidden, head))
    chunk = 128 * vocab_size * 4
    assert mx.get_peak_memory() - before < 3 * head.nbytes + most * chunk


# ---- Matrix products ----------------------------------------------------------------------------


COMPUTE = """
import ctypes, itertools, os, shutil
class NoOneDNN(ctypes.CDLL):
    def __init__(self, name, *options, **more):
        if "libdnnl" in str(name):
            raise OSError("not here")
        super().__init__(name, *options, **more)
if "NO_ONEDNN" in os.environ:
    ctypes.CDLL = NoOneDNN
import main
import mlx.core as mx, numpy as np
main.use_device(gpu=False)
left, right = mx.array(np.random.default_rng(0).normal(size=(2, 200, 200)).astype(np.float32))
sizes = (1, 7, 9, 16, 20, 32, 33, 65, 200), (33, 200), (1, 3, 8, 33, 200)
for a, b, rows, inner, columns in itertools.product([left, left.T], [right, right.T], *sizes):
    a, b = a[:rows, :inner], b[:inner, :columns]
    expected = np.array(a, np.float64) @ np.array(b, np.float64)
    assert np.abs(np.array(a @ b) - expected).max() < 1e-3
    total = np.array(mx.addmm(mx.ones(expected.shape), a, b, alpha=0.5, beta=-3))
    assert np.abs(total - 0.5 * expected + 3).max() < 1e-3
double = mx.compile(lambda x: mx.exp(x) * 2 + x)
assert abs(double(mx.zeros(3)).sum().item() - 6) < 1e-6
print(main.fast and main.fast.BLAS, shutil.which("g++"), sep="\\n")
"""


def blas_of(folder, **env):
    """What multiplies matrices if that is the folder for what is compiled."""
    out, err = run(program=["-c", COMPUTE], env={"XDG_CACHE_HOME": str(folder)} | env, cwd=ROOT)
    assert err == ""
    return out.splitlines()[0]


def logging_compiler(folder, lines=""):
    """A PATH on which g++ is a script: these lines, its command as a line of `log`, and itself."""
    found = shutil.which("g++")
    log = f'echo "$@" >> {folder / "log"}'
    write_script(folder / "bin" / "g++", f'{lines}\n{log}\nexec {found} "$@"')
    return f"{folder / 'bin'}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def cold_start(tmp_path_factory):
    """Two processes at once, without anything compiled: their folder, and what they print.

    The folder for temporary files is missing.
    """
    folder = tmp_path_factory.mktemp("cold")
    env = {"PATH": logging_compiler(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    env["TMPDIR"] = str(folder / "missing")
    starts = [start(program=["-c", COMPUTE], env=env, cwd=ROOT) for _ in range(2)]
    said = []
    for process in starts:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == ""
        said.append(out.splitlines())
    return folder, said


needs_forwarder = pytest.mark.skipif(
    fast.BLAS.startswith(("reference", "Accelerate")), reason="there is no forwarder"
)
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="MLX compiles by g++ on Linux"
)


@needs_forwarder
@needs_compiler
def test_matrix_products_are_right(cold_start, tmp_path):
    """With the forwarder compiled anew, and then without a compiler."""
    folder, said = cold_start
    assert [blas for blas, _ in said] == [fast.BLAS, fast.BLAS]
    assert blas_of(folder / "cache", PATH=str(tmp_path)) == fast.BLAS


@needs_forwarder
@needs_compiler
def test_a_library_that_is_cut_off_is_made_again(cold_start):
    """It would end the process by a signal."""
    folder, _ = cold_start
    [library] = folder.glob("cache/*/*/fast-*.so")
    data = library.read_bytes()
    library.write_bytes(data[:-9000])
    path = f"{folder / 'bin'}:{os.environ['PATH']}"  # the same compiler
    assert blas_of(folder / "cache", PATH=path) == fast.BLAS
    assert len(library.read_bytes()) == len(data)


@needs_forwarder
def test_after_mlx_it_is_too_late(text, tmp_path):
    """And it is said that the BLAS is slow."""
    line = ["--text", text, *TINY, "--num_iters=1", "--save_dir", tmp_path]
    out, _ = run(*line, program=["-c", "import mlx.core, main; main.main()"], cwd=ROOT)
    assert "Matrix products are slow" in out


@pytest.mark.skipif(not fast.BLAS.startswith("oneDNN"), reason="oneDNN is for Linux on x86-64")
def test_matrix_products_without_onednn(tmp_path):
    assert blas_of(tmp_path, NO_ONEDNN="1").startswith("NumPy's OpenBLAS (")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has a fast BLAS")
@pytest.mark.parametrize("trouble", ["no compiler", "broken compiler", "no cache folder"])
def test_without_a_fast_blas(trouble, tmp_path):
    """Products are slow then, and kernels are not compiled; both are right."""
    (tmp_path / "bin").mkdir()
    cache = tmp_path / "cache"
    if trouble == "broken compiler":
        write_script(tmp_path / "bin" / "cc", "echo no good >&2\nexit 1")
    if trouble == "no cache folder":
        cache.write_text("a file")
    assert blas_of(cache, PATH=str(tmp_path / "bin")) == "reference BLAS"
    assert not list(cache.glob("*/*/*.so"))


# ---- macOS --------------------------------------------------------------------------------------

AS_ON_MACOS = """
import os, sys, sysconfig

sysconfig.get_config_vars()  # while it can still be found
sys.platform = "darwin"
missing = "sched_getaffinity sched_setaffinity posix_fadvise memfd_create copy_file_range eventfd"
for name in missing.split():
    vars(os).pop(name, None)
import main
sys.exit(main.main(sys.argv[1:]))
"""


def test_what_macos_lacks_is_not_needed(tmp_path, text):
    schedule = "--num_iters 20 --steps_per_report 1 --learning_rate 3e-3".split()
    line = ["--text", text, *TINY, *schedule]
    options = {"program": ["-c", AS_ON_MACOS], "env": {"PYTHONPATH": str(ROOT)}}
    run(*line, "--save_dir", tmp_path / "linux")
    out, _ = run(*line, "--save_dir", tmp_path / "macos", **options)
    assert "matmuls: Accelerate" in out
    *_, here = log_rows(tmp_path / "linux")
    *_, there = log_rows(tmp_path / "macos")
    assert there["loss"] == pytest.approx(here["loss"], abs=1e-4)
    run("--prompt=the", "--save_dir", tmp_path / "macos", **options)


# ---- bfloat16 -----------------------------------------------------------------------------------


def rounded(array):
    """What NumPy, which has no bfloat16, makes of it by MLX: the nearest, ties to even."""
    return np.array(mx.array(array).astype(mx.bfloat16).astype(mx.float32))


needs_bfloat16 = pytest.mark.skipif(
    not fast.has_bfloat16(), reason="bfloat16 is not faster on this processor"
)


@needs_bfloat16
@pytest.mark.parametrize("rows, inner, columns, rounds", [
    (1, 900, 700, True),
    (83, 77, 79, True),
    (300, 700, 500, True),
    (9, 33, 17, False),
    (64, 48, 48, False),
    (3, 100_000, 1, False),  # sums, as in norms and losses
])  # fmt: skip
def test_products_round_what_they_multiply(rows, inner, columns, rounds):
    """And nothing else: sums are those of float32, and small products do not round."""
    random = np.random.default_rng(0)
    left = random.normal(size=(rows, inner)).astype(np.float32)
    right = random.normal(size=(inner, columns)).astype(np.float32)
    ties = left.view(np.uint32)[:, ::3]  # they go to the even neighbour
    ties[:] = ties & 0xFFFF0000 | 0x8000
    factors = [left, right]
    if rounds:
        factors = map(rounded, factors)
    left_factor, right_factor = [factor.astype(np.float64) for factor in factors]
    exact = left_factor @ right_factor
    by_rows_and_columns = [[mx.array(each), mx.array(each.T.copy()).T] for each in (left, right)]
    for a, b in itertools.product(*by_rows_and_columns):
        with mx.stream(mx.cpu), main.bfloat16_products(True):
            product = np.array(a @ b)
        assert np.abs(product - exact).max() <= 1e-5 * np.abs(exact).max()


@needs_bfloat16
def test_what_is_not_finite_stays_so():
    left = np.zeros((80, 80), np.float32)  # smaller products do not round
    left[:3, 0] = np.array([0x7F800001, 0xFFFFFFFF, 0x7F800000], np.uint32).view(np.float32)
    with mx.stream(mx.cpu), main.bfloat16_products(True):
        product = np.array(mx.array(left) @ mx.ones((80, 80)))
    assert np.isnan(product[:2]).all() and np.isinf(product[2]).all()


# ---- Compiler -----------------------------------------------------------------------------------


@needs_compiler
def test_two_processes_share_a_header(cold_start):
    home, said = cold_start
    [folder] = (home / "cache" / "transformer-lm").glob("code-*/compiler-*")
    compilers = {compiler for _, compiler in said}
    assert compilers == {str(folder / "g++")}, "these processes' PATH has it first"
    assert len(list(folder.rglob("*.gch"))) == 1
    assert str(folder) not in os.environ["PATH"], "that of others does not"


@needs_compiler
def test_kernels_never_fuse_a_product_with_a_sum(cold_start, tmp_path):
    """Some loops of a kernel would, on ARM, and others not: equal runs had different weights."""
    folder, _ = cold_start
    blas_of(tmp_path / "cache", PATH=logging_compiler(tmp_path), DISABLE_FAST="1")
    for home in (folder, tmp_path):
        lines = [line for line in (home / "log").read_text().splitlines() if "-shared" in line]
        assert lines and all("-ffp-contract=off" in line for line in lines)


@needs_compiler
def test_starts_with_a_damaged_header(cold_start, tmp_path):
    folder, _ = cold_start
    shutil.copytree(folder / "cache", tmp_path / "cache")
    [header] = tmp_path.rglob("*.gch")
    header.write_bytes(header.read_bytes()[: 1 << 20])
    for kernels in tmp_path.rglob("mlx/*/cpu"):
        shutil.rmtree(kernels)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"  # the same compiler
    assert blas_of(tmp_path / "cache", PATH=path) == fast.BLAS


@needs_compiler
def test_starts_without_a_header(tmp_path):
    """Without a folder for it, and by an older compiler, which does not know an option."""
    (tmp_path / "cache").write_text("")
    refuse = 'case "$*" in *vect-max-version*) exit 1;; esac'
    path = logging_compiler(tmp_path, refuse)
    assert blas_of(tmp_path / "cache", PATH=path) == fast.BLAS
    assert " -shared " in (tmp_path / "log").read_text(), "a kernel was compiled"
