"""What is quick on a CPU, against the plain functions of main.py and against NumPy in float64."""

import importlib.util
import inspect
import math
import os
import shutil
import subprocess
import sys

import main
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import ROOT, flags, nats_of
from mlx.utils import tree_flatten, tree_unflatten

from extras import fast

DROP_INS = ["attend", "cross_entropy", "over_streams", "add_up", "spread"]
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}  # key and value heads for 4 query heads


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """main.py once more, from a folder without extras: a module with its own plain functions."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copy(ROOT / "main.py", folder)
    spec = importlib.util.spec_from_file_location("plain_main", folder / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.fast is None and main.fast is fast
    return module


def normal(seed, *shape, deviation=1.0):
    values = np.random.default_rng(seed).normal(0, deviation, shape)
    return mx.array(values.astype(np.float32))


def compiled_if(wanted, function):
    return mx.compile(function) if wanted else function


def assert_near(found, expected, tolerance):
    """Both trees have the same leaves, which differ by `tolerance` of the largest element."""
    found, expected = tree_flatten(found), tree_flatten(expected)
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, ours), (_, theirs) in zip(found, expected):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        ours, theirs = np.array(ours.astype(mx.float32)), np.array(theirs.astype(mx.float32))
        assert abs(ours - theirs).max() <= tolerance * abs(theirs).max(), name


@pytest.mark.parametrize("name", DROP_INS)
def test_the_program_uses_it_and_it_takes_the_same_arguments(name, plain):
    quick, slow = getattr(fast, name), getattr(plain, name)
    assert getattr(main, name) is quick and slow.__module__ == "plain_main"
    assert str(inspect.signature(quick)) == str(inspect.signature(slow))


# ---- Attention ----------------------------------------------------------------------------------


def test_the_blas_does_not_need_the_folder_for_temporary_files(tmp_path, monkeypatch):
    """It may be full or missing; without the forwarder matrix products are 30 times slower."""
    folders = []

    def compile_nothing(command, env=None, **options):
        folders.append((env or os.environ).get("TMPDIR"))
        raise subprocess.SubprocessError

    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(fast, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(fast.subprocess, "run", compile_nothing)
    assert fast.compile_forwarder() is None and set(folders) == {str(tmp_path / "cache")}


def test_exp_is_within_its_bounds():
    x = np.linspace(-200, 0, 100_001)
    result = np.array(fast.exp(mx.array(x.astype(np.float32))), np.float64)
    assert abs(result - np.exp(x)).max() < 2e-6
    ends = fast.exp(mx.array([0.0, -math.inf])).tolist()
    assert ends == pytest.approx([1, 1e-13], rel=1e-6, abs=1e-12)


def test_softmax_and_its_gradient():
    scores, factors = normal(0, 50, 31, deviation=5), normal(1, 50, 31)

    def weighted(softmax, scores):
        return (softmax(scores, axis=-1) * factors).sum()

    def ours(scores, axis):
        return fast.softmax(scores)

    found = mx.value_and_grad(weighted, argnums=1)(ours, scores)
    expected = mx.value_and_grad(weighted, argnums=1)(mx.softmax, scores)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-4)
    assert_near(found[1], expected[1], 1e-5)


@pytest.mark.parametrize("heads, length, deviation, compiled", [
    ("MHA", 1, 1, False), ("GQA", 1, 1, False),
    ("MHA", 13, 1, False), ("GQA", 13, 1, False), ("MQA", 13, 1, False),
    ("GQA", 64, 1, False), ("GQA", 64, 6, False), ("GQA", 13, 1, True),
])  # fmt: skip
def test_attention_and_its_gradients(heads, length, deviation, compiled, plain):
    """A deviation of 6 makes distributions sharp: nearly all weight is on one position."""
    shapes = [(3, 4, length, 6), (3, HEADS[heads], length, 6), (3, HEADS[heads], length, 6)]
    inputs = [normal(i, *shape, deviation=deviation) for i, shape in enumerate(shapes)]
    factors = normal(3, *shapes[0])
    results = []
    for program in (main, plain):

        def weighted(queries, keys, values):
            attended = program.attend(queries, keys, values)
            return (attended * factors).sum(), attended

        gradients_of = mx.value_and_grad(weighted, argnums=(0, 1, 2))
        (_, attended), gradients = compiled_if(compiled, gradients_of)(*inputs)
        results.append([attended, *gradients])
    assert_near(*results, 2e-5)


# ---- Cross-entropy ------------------------------------------------------------------------------
SIZES = {
    "one chunk": (2, 25, 13),
    "two chunks": (3, 43, 70_000),
    "three chunks": (4, 75, 70_000),
}  # B, L, V


def loss_inputs(size, weights):
    """hidden [B, L, D], head [V, D], targets [B, L] and weights, an array [B, L] or a number."""
    B, L, V = SIZES[size]
    random = np.random.default_rng(5)
    targets = mx.array(random.integers(V, size=(B, L)))
    if weights == "array":
        weights = mx.array(random.uniform(0, 1, (B, L)).astype(np.float32))
    head = normal(1, V, 6, deviation=3)  # sharp distributions, targets far down
    return normal(0, B, L, 6), head, targets, weights


@pytest.mark.parametrize("size, weights, compiled", [
    ("one chunk", "array", False), ("one chunk", 1 / 50, False), ("one chunk", 1, False),
    ("one chunk", "array", True),
    ("two chunks", "array", False), ("two chunks", 1 / 129, False),
    ("three chunks", "array", False), ("three chunks", 1 / 300, True),
])  # fmt: skip
def test_cross_entropy_and_its_gradients(size, weights, compiled, plain):
    hidden, head, targets, weights = loss_inputs(size, weights)
    results = []
    for program in (main, plain):

        def loss(hidden, head):
            return 0.5 * program.cross_entropy(hidden, head, targets, weights)

        gradients_of = mx.value_and_grad(loss, argnums=(0, 1))
        results.append(compiled_if(compiled, gradients_of)(hidden, head))
    assert_near(*results, 5e-5)  # sums of up to 70,000


@pytest.mark.parametrize("size, weights", [
    ("one chunk", "array"), ("one chunk", 1), ("one chunk", 0.01),
    ("two chunks", "array"), ("three chunks", "array"), ("three chunks", 0.01),
])  # fmt: skip
def test_cross_entropy_without_gradients(size, weights, plain):
    inputs = loss_inputs(size, weights)
    expected = plain.cross_entropy(*inputs, training=False).item()
    assert main.cross_entropy(*inputs, training=False).item() == pytest.approx(expected, rel=1e-5)
    assert main.cross_entropy(*inputs).item() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_in_bfloat16(plain):
    """What a GPU is given: hidden states in bfloat16; the head and its gradient are in float32."""
    hidden, head, targets, weights = loss_inputs("one chunk", 1 / 50)
    hidden = hidden.astype(mx.bfloat16)
    results = []
    for program in (main, plain):

        def loss(hidden, head):
            return program.cross_entropy(hidden, head, targets, weights)

        results.append(mx.value_and_grad(loss, argnums=(0, 1))(hidden, head))
    assert_near(*results, 0.02)


def gradients_in_numpy(hidden, head, targets, weights):
    """The loss and its gradients by hidden [N, D] and head [V, D] in float64."""
    hidden, head, weights = (np.array(array, np.float64) for array in (hidden, head, weights))
    logits = hidden @ head.T
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    gradient = powers / powers.sum(-1, keepdims=True)
    gradient[np.arange(len(targets)), targets] -= 1
    gradient *= weights[:, None]
    return (nats_of(logits, targets) * weights).sum(), gradient @ head, gradient.T @ hidden


@pytest.mark.parametrize(
    "rows, vocab_size",
    [(50, 13), (129, 70_000), (300, 70_000)],
    ids=["one", "two", "three chunks"],
)
def test_the_loss_in_chunks_and_its_gradients(rows, vocab_size):
    random = np.random.default_rng(5)
    hidden = random.normal(size=(rows, 6)).astype(np.float32)
    head = random.normal(0, 3, (vocab_size, 6)).astype(
        np.float32
    )  # sharp distributions, answers far down
    targets, weights = (
        random.integers(vocab_size, size=rows),
        random.uniform(0, 1, rows).astype(np.float32),
    )

    def loss(hidden, head):
        return (
            0.5
            * fast.cross_entropy_and_gradients(hidden, head, mx.array(targets), mx.array(weights))[
                0
            ]
        )

    value, gradients = mx.value_and_grad(loss, argnums=(0, 1))(mx.array(hidden), mx.array(head))
    expected = gradients_in_numpy(hidden, head, targets, weights)
    assert value.item() == pytest.approx(0.5 * expected[0], rel=1e-5)
    for gradient, right in zip(gradients, expected[1:]):
        np.testing.assert_allclose(
            np.array(gradient), 0.5 * right, rtol=1e-3, atol=3e-4
        )  # sums of 70,000


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 256, 257, 300])
def test_chunks_have_each_row_once(rows):
    seen = []

    def loss_of_chunk(logits, targets, weights, chunk):
        seen.append(np.arange(rows)[chunk])
        assert len(logits) == len(targets) == len(weights) == len(seen[-1]) <= 128
        return fast.cross_entropy_of_chunk(logits, targets, weights, chunk)

    hidden, head = normal(0, rows, 2), normal(1, 70_000, 2)
    fast.sum_over_chunks(hidden, head, mx.zeros(rows, mx.int32), mx.ones(rows), loss_of_chunk)
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(rows))
    assert len(seen) == math.ceil(rows / 128)


def test_the_memory_of_a_large_vocabulary():
    """WikiText-103's words at batch 32 x 48: weights, twice their gradient, four chunks of logits.

    All of the logits are twelve chunks.
    """
    rows, vocab_size, dim = 32 * 48, 267_735, 32
    head, hidden = mx.random.normal((vocab_size, dim)), mx.random.normal((rows, dim))
    targets, weights = mx.random.randint(0, vocab_size, (rows,)), mx.full(rows, 1 / rows)
    mx.eval(head, hidden, targets, weights)

    def loss(hidden, head):
        return fast.cross_entropy_and_gradients(hidden, head, targets, weights)[0]

    step = mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))
    before = mx.get_active_memory() - head.nbytes
    mx.reset_peak_memory()
    mx.eval(step(hidden, head))
    assert mx.get_peak_memory() - before < 3 * head.nbytes + 4 * 128 * vocab_size * 4


# ---- Streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
@pytest.mark.parametrize("streams", [1, 2, 3, 5])
def test_each_row_is_in_one_share(rows, streams, set_streams):
    set_streams(streams)
    tokens = mx.arange(rows * 7).reshape(rows, 7)
    keys = mx.arange(rows * 2).reshape(rows, 2)
    shares = main.over_streams(lambda *arrays: arrays, tokens, keys)
    assert len(shares) == min(rows, streams)
    for i, array in enumerate((tokens, keys)):
        parts = [share[i] for share in shares]
        assert mx.array_equal(mx.concatenate(parts), array), "in their order"
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    "streams, compiled", [(1, False), (2, False), (3, False), (5, False), (2, True)]
)
def test_the_sum_of_all_shares(streams, compiled, set_streams, plain):
    """Of a tree, as loss and gradients are; sums of whole numbers have no rounding."""
    set_streams(streams)
    numbers = mx.array(np.random.default_rng(0).integers(-9, 9, (12, 7, 3)).astype(np.float32))
    weights = {"a": mx.array([1.0, 2, 3]), "layers": [{"b": mx.array(4.0)}, {"b": mx.array(5.0)}]}

    def loss(weights, rows):
        first, second = weights["layers"]
        return (rows @ weights["a"] * first["b"] * second["b"]).sum()

    results = []
    for program in (main, plain):

        def summed(weights, numbers):
            def loss_and_gradients(rows):
                return mx.value_and_grad(loss)(weights, rows)

            return program.add_up(program.over_streams(loss_and_gradients, numbers))

        results.append(compiled_if(compiled, summed)(weights, numbers))
    assert_near(*results, 0)


def small_weights():
    shapes = {"a": (8, 16), "b": (16, 8), "c": (3, 3), "d": (40, 5)}
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


OPTIMIZERS = {
    "AdamW": (
        optim.AdamW,
        dict(learning_rate=0.01, betas=[0.9, 0.99], weight_decay=0.1, bias_correction=True),
    ),
    "Muon": (main.Muon, dict(learning_rate=0.05, weight_decay=0.1)),
    "Lion": (optim.Lion, dict(learning_rate=0.01, weight_decay=0.1)),
}


@pytest.mark.parametrize("name, streams, compiled", [
    ("AdamW", 1, False), ("AdamW", 2, False), ("AdamW", 3, False), ("AdamW", 2, True),
    ("Muon", 1, False), ("Muon", 2, False), ("Muon", 3, False), ("Muon", 2, True),
    ("Lion", 2, False),
])  # fmt: skip
def test_two_steps_of_a_spread_optimizer_equal_the_plain_one_to_the_bit(
    name, streams, compiled, set_streams, plain
):
    set_streams(streams)
    fast.use_streams(12, 8)
    optimizer_class, options = OPTIMIZERS[name]
    assert plain.spread(optimizer_class) is optimizer_class
    results = []
    for program in (main, plain):
        optimizer = program.spread(optimizer_class)(**options)
        assert isinstance(optimizer, optimizer_class)
        weights = small_weights()
        optimizer.init(weights)
        state = [optimizer.state]

        def step(gradients, weights):
            return optimizer.apply_gradients(gradients, weights)

        if compiled:
            step = mx.compile(step, inputs=state, outputs=state)
        for i, rate in enumerate((0.01, 0.003)):  # the training loop sets the rate of every step
            optimizer.learning_rate = rate
            gradients = {name: normal(10 + i, *weight.shape) for name, weight in weights.items()}
            weights = step(gradients, weights)
            mx.eval(weights, optimizer.state)
        results.append([weights, optimizer.state])
    assert_near(*results, 0)
    assert not mx.array_equal(results[0][0]["a"], small_weights()["a"])


def test_the_work_of_an_optimizer_is_spread(set_streams):
    set_streams(2)
    fast.use_streams(12, 8)
    weights = small_weights()
    optimizer = main.spread(optim.SGD)(0.1)
    optimizer.apply_gradients(weights, weights)
    assert sum(optimizer.load) == sum(weight.size for weight in weights.values())
    assert max(optimizer.load) - min(optimizer.load) <= max(
        weight.size for weight in weights.values()
    )


# ---- Training steps -----------------------------------------------------------------------------


def steps(program, count=6, **values):
    """The losses and gradient norms of some training steps, and the weights after them."""
    given = flags(learning_rate=0.01, batch_size=12, **values)
    shape = dict(vocab_size=11, context_size=6, dim=8, num_heads=2, num_kv_heads=1, mlp_dim=12)
    model = program.LanguageModel(program.Config(num_blocks=2, mlp="swiglu", **shape))
    random = np.random.default_rng(0)
    weights = []
    for name, weight in tree_flatten(model.parameters()):
        value = random.normal(0.5, 0.3, weight.shape).astype(np.float32)
        weights.append((name, mx.array(value)))
    model.update(tree_unflatten(weights))
    optimizer = program.make_optimizer(model, given)
    step = program.make_step(model, optimizer, given)
    losses = []
    for i in range(count):
        tokens = np.random.default_rng([7, i]).integers(11, size=(12, 7))
        noise = program.make_noise(i, 12, flags(dropout=0.2))
        loss, norm = step(mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), *noise)
        mx.eval(loss, norm, model.state, optimizer.state)
        losses.append([loss.item(), norm.item()])
    weights = {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
    return np.array(losses), weights


def test_streams_change_rounding_alone_and_are_exact_in_themselves(set_streams):
    set_streams(1)
    expected, _ = steps(main)
    for streams in (2, 3, 5):
        set_streams(streams)
        runs = [steps(main) for _ in range(3)]
        np.testing.assert_allclose(runs[0][0], expected, rtol=1e-4)
        for losses, weights in runs[1:]:
            np.testing.assert_array_equal(losses, runs[0][0])
            for name in weights:
                np.testing.assert_array_equal(weights[name], runs[0][1][name])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_stay_with_those_of_the_plain_program(optimizer, set_streams, plain):
    set_streams(2)
    losses, _ = steps(main, 12, optimizer=optimizer)
    expected, _ = steps(plain, 12, optimizer=optimizer)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def test_how_many_streams_share_a_batch(monkeypatch):
    monkeypatch.setattr(fast, "BLAS", "a fast one")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4), raising=False)
    counts = [
        fast.count_streams(*size)
        for size in ((32, 48), (16, 48), (8, 48), (1, 4096), (2, 4096), (64, 64))
    ]
    assert counts == [4, 3, 1, 1, 2, 4]
    monkeypatch.setattr(fast, "BLAS", "Accelerate")
    assert fast.count_streams(32, 48) == 1


# ---- Matrix products ----------------------------------------------------------------------------


PRODUCT = """
import main
import mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
left, right = np.random.default_rng(0).normal(size=(2, 200, 200)).astype(np.float32)
pairs = [(left, right), (left.T, right), (left[:7], right.T), (left[:9], right.T)]
for a, b in [*pairs, (left[:1], right), (left[:1], right.T)]:
    assert np.abs(np.array(mx.array(a) @ mx.array(b)) - a @ b).max() < 1e-3
print(main.BLAS)
"""


def blas_of(**env):
    command = [sys.executable, "-c", PRODUCT]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    return process.stdout.strip()


def test_matrix_products_are_right(tmp_path):
    assert blas_of() == main.BLAS != ""
    assert blas_of(XDG_CACHE_HOME=str(tmp_path)) == main.BLAS, "the forwarder is compiled anew"


@pytest.mark.skipif(
    not main.BLAS.startswith(("NumPy's", "reference")), reason="the system has a BLAS of its own"
)
@pytest.mark.parametrize("trouble", ["no compiler", "broken compiler", "no cache folder"])
def test_without_a_fast_blas(trouble, tmp_path):
    (tmp_path / "bin").mkdir()
    cache = tmp_path / "cache"
    if trouble == "broken compiler":
        (tmp_path / "bin" / "cc").write_text("#!/bin/sh\necho no good >&2\nexit 1\n")
        (tmp_path / "bin" / "cc").chmod(0o755)
    if trouble == "no cache folder":
        cache.write_text("a file")
    assert blas_of(PATH=str(tmp_path / "bin"), XDG_CACHE_HOME=str(cache)) == "reference BLAS"
    assert not list(cache.glob("*/*.so"))
