"""What is quick on a CPU, against the plain functions of main.py and against NumPy in float64."""

import ast
import ctypes
import hashlib
import importlib.util
import inspect
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import main
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import DATASETS, MAIN, ROOT, TINY, flags, ids, log_rows, nats_of, run
from datasets import without_comments
from mlx.utils import tree_flatten, tree_unflatten

from extras import fast

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
    if wanted:
        function = mx.compile(function)
    return function


def in_float32(array):
    return np.array(array.astype(mx.float32))


def assert_near(found, expected, tolerance):
    """Both trees have the same leaves, which differ by `tolerance` of the largest element."""
    found = tree_flatten(found)
    expected = tree_flatten(expected)
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, ours), (_, theirs) in zip(found, expected):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        ours = in_float32(ours)
        theirs = in_float32(theirs)
        assert abs(ours - theirs).max() <= tolerance * abs(theirs).max(), name


# ---- Which of two functions runs ----------------------------------------------------------------


def decorated_functions():
    """The names of the functions in main.py that have @fast_version."""
    names = []
    for node in ast.parse(Path(MAIN).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(each) for each in node.decorator_list]
            if "fast_version" in decorators:
                names.append(node.name)
    return names


@pytest.mark.parametrize("name", decorated_functions())
def test_it_stands_for_the_plain_function_as_it_is_now(name, plain):
    source = without_comments(inspect.getsource(getattr(plain, name)))
    sha1 = hashlib.sha1(source.encode()).hexdigest()
    assert fast.STANDS_FOR.get(name) == sha1, (
        f"{name} in main.py has changed, so that main.py no longer uses the quick one: compare it "
        f"with {name} in extras/fast.py, change that accordingly, and then enter "
        f'"{name}": "{sha1}" in STANDS_FOR'
    )


def test_it_stands_for_nothing_else():
    assert sorted(fast.STANDS_FOR) == sorted(decorated_functions())
    assert main.EDITED == []


@pytest.mark.parametrize("name", fast.STANDS_FOR)
def test_the_program_uses_it_and_it_takes_the_same_arguments(name, plain):
    quick = getattr(fast, name)
    slow = getattr(plain, name)
    assert getattr(main, name) is quick
    assert slow.__module__ == "plain_main"
    assert str(inspect.signature(quick)) == str(inspect.signature(slow))


@pytest.fixture
def copy(tmp_path):
    """A folder with a copy of the program, to edit."""
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(MAIN, folder)
    shutil.copy(DATASETS, folder)
    shutil.copytree(ROOT / "extras", folder / "extras")
    return folder


def edit(folder, old, new):
    """Replaces the only `old` in the copy of main.py."""
    path = folder / "main.py"
    source = path.read_text()
    assert source.count(old) == 1, old
    path.write_text(source.replace(old, new))


def train_copy(folder, text, save_dir, *more, **env):
    """The start screen of some steps of the program in a folder, and their rows in the log."""
    line = ["--text", text, *TINY, "--num_iters", 3, "--steps_per_report", 1]
    line += ["--lr_warmup", 0, "--learning_rate", 0.01, "--save_dir", save_dir, *more]
    # With an option it is a Python of its own: a server would not read the file again.
    out, _ = run(*line, program=["-B", folder / "main.py"], env=env)
    return out, log_rows(save_dir, "train")


def edited(out):
    """The functions that the start screen says to be main.py's own."""
    assert "kernels: extras/fast.py\n" in out
    names = re.findall("^edited +(.*): main.py's own runs, not that of extras/fast.py$", out, re.M)
    return names[0].split(", ") if names else []


# {function: (the last line of its source, another one)}
EDITS = {
    "attend": (
        "    return mx.fast.scaled_dot_product_attention("
        'queries, keys, values, scale=scale, mask=mask)\n',
        "    return mx.zeros_like(queries)\n",
    ),
    "relu2": ("    return mx.square(nn.relu(x))\n", "    return mx.zeros_like(x)\n"),
    "cross_entropy": (
        "    return (losses * weights).sum()\n",
        "    return 2 * (losses * weights).sum()\n",
    ),
    "clip_grad_norm": (
        "    return optim.clip_grad_norm(gradients, limit)\n",
        "    return optim.clip_grad_norm(gradients, limit / 1000)[0], mx.array(7.0)\n",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_function_takes_effect_at_once(name, copy, text, tmp_path):
    out, before = train_copy(copy, text, tmp_path / "before")
    assert edited(out) == []
    edit(copy, *EDITS[name])
    out, after = train_copy(copy, text, tmp_path / "after")
    assert edited(out) == [name]
    # The matrices that write into the residual stream are 0 at first: the first loss is that of
    # the embeddings alone, whatever attention and activation are.
    doubled = 2 if name == "cross_entropy" else 1
    assert after[0]["loss"] == pytest.approx(doubled * before[0]["loss"], rel=1e-5)
    norms_before = [row["gradient_norm"] for row in before]
    norms_after = [row["gradient_norm"] for row in after]
    assert norms_after != pytest.approx(norms_before, rel=1e-4)
    if name == "clip_grad_norm":
        assert norms_after == [7, 7, 7]


def test_two_edited_functions_are_both_named(copy, text, tmp_path):
    edit(copy, *EDITS["relu2"])
    edit(copy, *EDITS["attend"])
    out, _ = train_copy(copy, text, tmp_path / "lm")
    assert edited(out) == ["attend", "relu2"]


def test_an_edit_of_anything_else_changes_nothing(copy, text, tmp_path):
    _, before = train_copy(copy, text, tmp_path / "before")
    edit(copy, "# ---- Model ---", "# A remark\n# of two lines.\n\n# ---- Model ---")
    edit(copy, "# ---- Loss and optimizer ---", "# Another one.\n\n# ---- Loss and optimizer ---")
    edit(copy, "    return nats / count\n", "    # The mean.\n    return nats / count\n")
    edit(copy, '    """Squared ReLU', '    """The square of ReLU')
    edit(copy, "mx.square(nn.relu(x))\n", "mx.square(nn.relu(x))  # of x\n")
    out, after = train_copy(copy, text, tmp_path / "after")
    assert edited(out) == []
    assert [row["loss"] for row in after] == [row["loss"] for row in before]
    code = "import main; print(main.EDITED)"
    assert run(program=["-c", code], cwd=copy)[0] == "[]\n"


def test_a_resumed_run_says_that_a_function_was_edited(copy, text, tmp_path):
    train_copy(copy, text, tmp_path / "lm")
    edit(copy, *EDITS["relu2"])
    named = ["--num_iters", 4, "--identifier", "latest"]
    out, _ = train_copy(copy, text, tmp_path / "lm", *named)
    assert "The code that trains was edited since the checkpoint" in out


def test_disable_fast(copy, text, tmp_path):
    """The plain program, to the bit, although extras/fast.py is there."""
    out, disabled = train_copy(copy, text, tmp_path / "disabled", DISABLE_FAST="1")
    assert "kernels: main.py\n" in out
    assert "matmuls: MLX's own BLAS" in out
    (copy / "extras" / "fast.py").unlink()
    out, without = train_copy(copy, text, tmp_path / "without")
    assert "kernels: main.py\n" in out
    assert [row["loss"] for row in disabled] == [row["loss"] for row in without]
    ids_disabled = ids(tmp_path / "disabled")
    assert len(ids_disabled) == 1
    assert ids_disabled == ids(tmp_path / "without")


# ---- Attention ----------------------------------------------------------------------------------


def test_the_blas_does_not_need_the_folder_for_temporary_files(tmp_path, monkeypatch):
    """It may be full or missing; without the forwarder matrix products are 30 times slower."""
    folders = []

    def compile_nothing(command, env=None, **options):
        folders.append((env or os.environ).get("TMPDIR"))
        raise subprocess.SubprocessError

    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(fast, "open_code_dir", lambda: tmp_path)
    monkeypatch.setattr(fast.subprocess, "run", compile_nothing)
    assert fast.compile_forwarder() is None
    assert set(folders) == {str(tmp_path)}


def test_exp_is_within_its_bounds():
    x = np.linspace(-200, 0, 100_001)
    result = np.array(fast.exp(mx.array(x.astype(np.float32))), np.float64)
    assert abs(result - np.exp(x)).max() < 2e-6
    ends = fast.exp(mx.array([0.0, -math.inf])).tolist()
    assert ends == pytest.approx([1, 1e-13], rel=1e-6, abs=1e-12)


def test_relu2_and_its_gradient(plain):
    x = normal(0, 50, 31)
    factors = normal(1, 50, 31)
    results = []
    for program in (fast, plain):

        def weighted(x):
            return (program.relu2(x) * factors).sum()

        results.append(mx.value_and_grad(weighted)(x))
    assert_near(*results, 1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_linear_products_and_their_gradients(compiled, plain):
    inputs = [normal(0, 3, 50, 31), normal(1, 40, 31)]  # x [B, L, I], weight [O, I]
    factors = normal(2, 3, 50, 40)
    results = []
    for program in (fast, plain):

        def weighted(x, weight):
            product = program.linear_product(x, weight)
            return (product * factors).sum(), product

        gradients_of = mx.value_and_grad(weighted, argnums=(0, 1))
        (_, product), gradients = compiled_if(compiled, gradients_of)(*inputs)
        results.append([product, *gradients])
    assert_near(*results, 1e-6)


def test_the_gradient_of_a_linear_layer_is_stored_like_its_weight():
    """By rows: strides in bytes say so."""

    def total(weight):
        return fast.linear_product(normal(0, 3, 50, 31), weight).sum()

    gradient = mx.grad(total)(normal(1, 40, 31))
    mx.eval(gradient)
    assert memoryview(gradient).strides == (31 * 4, 4)


@pytest.mark.parametrize("limit", [0.5, 1e9, math.inf])
def test_clipping_to_a_norm(limit, plain, set_streams):
    gradients = {"a": normal(0, 50, 31), "b": [normal(1, 7), normal(2, 300, 2)]}
    for streams in (1, 2):
        set_streams(streams)
        expected = plain.clip_grad_norm(gradients, limit)
        assert_near(fast.clip_grad_norm(gradients, limit), expected, 2e-6)


@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("compiled", [False, True])
def test_rms_norm_and_its_gradients(length, compiled, plain):
    inputs = [normal(0, 3, length, 40, deviation=3), normal(1, 40)]  # x, weight
    factors = normal(2, 3, length, 40)
    results = []
    for program in (main, plain):

        def weighted(x, weight):
            normed = program.rms_norm(x, weight, 0.1)
            return (normed * factors).sum(), normed

        gradients_of = mx.value_and_grad(weighted, argnums=(0, 1))
        (_, normed), gradients = compiled_if(compiled, gradients_of)(*inputs)
        results.append([normed, *gradients])
    assert_near(*results, 2e-6)


def test_an_integer_may_be_added_to_the_mean_square(plain):
    """A checkpoint may hold one that is larger than MLX's."""
    x = normal(0, 3, 13, 40)
    results = [program.rms_norm(x, mx.ones(40), 10**25) for program in (main, plain)]
    assert_near(*results, 2e-6)


@pytest.mark.parametrize("length, offset", [(1, 0), (1, 7), (13, 0), (13, 7)])
@pytest.mark.parametrize("compiled", [False, True])
def test_rope_and_its_gradient(length, offset, compiled, plain):
    x = normal(0, 3, 4, length, 6)
    factors = normal(1, 3, 4, length, 6)
    frequencies = main.rope_frequencies(6, 100)
    results = []
    for program in (main, plain):

        def weighted(x):
            turned = program.rotate(x, frequencies, offset)
            return (turned * factors).sum(), turned

        gradient_of = compiled_if(compiled, mx.value_and_grad(weighted))
        (_, turned), gradient = gradient_of(x)
        results.append([turned, gradient])
    assert_near(*results, 2e-6)


@pytest.mark.parametrize("heads, length, deviation, compiled", [
    ("MHA", 1, 1, False),
    ("GQA", 1, 1, False),
    ("MHA", 13, 1, False),
    ("GQA", 13, 1, False),
    ("MQA", 13, 1, False),
    ("GQA", 64, 1, False),
    ("GQA", 64, 6, False),
    ("GQA", 13, 1, True),
])  # fmt: skip
def test_attention_and_its_gradients(heads, length, deviation, compiled, plain):
    """A deviation of 6 makes distributions sharp: nearly all weight is on one position."""
    inputs = [
        normal(0, 3, 4, length, 6, deviation=deviation),
        normal(1, 3, HEADS[heads], length, 6, deviation=deviation),
        normal(2, 3, HEADS[heads], length, 6, deviation=deviation),
    ]
    factors = normal(3, 3, 4, length, 6)
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
    ("one chunk", "array", False),
    ("one chunk", 1 / 50, False),
    ("one chunk", 1, False),
    ("one chunk", "array", True),
    ("two chunks", "array", False),
    ("two chunks", 1 / 129, False),
    ("three chunks", "array", False),
    ("three chunks", 1 / 300, True),
])  # fmt: skip
def test_cross_entropy_and_its_gradients(size, weights, compiled, plain):
    hidden, head, targets, weights = loss_inputs(size, weights)
    results = []
    for program in (main, plain):

        def loss(hidden, head):
            return 0.5 * program.cross_entropy(hidden, head, targets, weights)

        gradients_of = mx.value_and_grad(loss, argnums=(0, 1))
        results.append(compiled_if(compiled, gradients_of)(hidden, head))
    # The plain one adds up 70,000 powers in float32, which loses digits.
    assert_near(*results, 1.5e-4)


@pytest.mark.parametrize("size, weights", [
    ("one chunk", "array"),
    ("one chunk", 1),
    ("one chunk", 0.01),
    ("two chunks", "array"),
    ("three chunks", "array"),
    ("three chunks", 0.01),
])  # fmt: skip
def test_cross_entropy_without_gradients(size, weights, plain):
    inputs = loss_inputs(size, weights)
    expected = plain.cross_entropy(*inputs, training=False).item()
    for found in (main.cross_entropy(*inputs, training=False), main.cross_entropy(*inputs)):
        assert found.item() == pytest.approx(expected, rel=1e-5)


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
    hidden = np.array(hidden, np.float64)
    head = np.array(head, np.float64)
    weights = np.array(weights, np.float64)
    logits = hidden @ head.T
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    gradient = powers / powers.sum(-1, keepdims=True)
    gradient[np.arange(len(targets)), targets] -= 1
    gradient *= weights[:, None]
    loss = (nats_of(logits, targets) * weights).sum()
    return loss, gradient @ head, gradient.T @ hidden


@pytest.mark.parametrize(
    "rows, vocab_size",
    [(50, 13), (129, 70_000), (300, 70_000)],
    ids=["one", "two", "three chunks"],
)
def test_the_loss_in_chunks_and_its_gradients(rows, vocab_size):
    random = np.random.default_rng(5)
    hidden = random.normal(size=(rows, 6)).astype(np.float32)
    # Sharp distributions, answers far down.
    head = random.normal(0, 3, (vocab_size, 6)).astype(np.float32)
    targets = random.integers(vocab_size, size=rows)
    weights = random.uniform(0, 1, rows).astype(np.float32)

    def loss(hidden, head):
        given = hidden, head, mx.array(targets), mx.array(weights)
        nats, *_ = fast.cross_entropy_and_gradients(*given)
        return 0.5 * nats

    value, gradients = mx.value_and_grad(loss, argnums=(0, 1))(mx.array(hidden), mx.array(head))
    nats, *expected = gradients_in_numpy(hidden, head, targets, weights)
    assert value.item() == pytest.approx(0.5 * nats, rel=1e-5)
    for gradient, right in zip(gradients, expected):  # sums of 70,000
        np.testing.assert_allclose(np.array(gradient), 0.5 * right, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 256, 257, 300])
def test_chunks_have_each_row_once(rows):
    seen = []

    def loss_of_chunk(logits, targets, weights, chunk):
        own = np.arange(rows)[chunk]
        seen.append(own)
        assert len(logits) == len(targets) == len(weights) == len(own) <= 128
        return fast.cross_entropy_of_chunk(logits, targets, weights, chunk)

    hidden = normal(0, rows, 2)
    head = normal(1, 70_000, 2)
    targets = mx.zeros(rows, mx.int32)
    fast.sum_over_chunks(hidden, head, targets, mx.ones(rows), loss_of_chunk)
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(rows))
    assert len(seen) == math.ceil(rows / 128)


def test_the_memory_of_a_large_vocabulary():
    """WikiText-103's words at batch 32 x 48: weights, twice their gradient, four chunks of logits.

    All of the logits are twelve chunks.
    """
    rows, vocab_size, dim = 32 * 48, 267_735, 32
    head = mx.random.normal((vocab_size, dim))
    hidden = mx.random.normal((rows, dim))
    targets = mx.random.randint(0, vocab_size, (rows,))
    weights = mx.full(rows, 1 / rows)
    mx.eval(head, hidden, targets, weights)

    def loss(hidden, head):
        return fast.cross_entropy_and_gradients(hidden, head, targets, weights)[0]

    step = mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))
    before = mx.get_active_memory() - head.nbytes
    mx.reset_peak_memory()
    mx.eval(step(hidden, head))
    chunk = 128 * vocab_size * 4
    assert mx.get_peak_memory() - before < 3 * head.nbytes + 4 * chunk


# ---- Streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5, 12])
@pytest.mark.parametrize("streams", [1, 2, 3, 5])
def test_each_row_is_in_one_share(rows, streams, set_streams):
    set_streams(streams)
    tokens = mx.arange(rows * 7).reshape(rows, 7)
    keys = mx.arange(rows * 2).reshape(rows, 2)
    shares = []

    def sums(*arrays):
        shares.append(arrays)
        return [array.sum() for array in arrays]

    totals = main.over_streams(sums, tokens, keys)
    assert [total.item() for total in totals] == [tokens.sum().item(), keys.sum().item()]
    assert len(shares) == min(rows, streams)
    for i, array in enumerate((tokens, keys)):
        parts = [share[i] for share in shares]
        assert mx.array_equal(mx.concatenate(parts), array), "in their order"
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("streams, compiled", [
    (1, False),
    (2, False),
    (3, False),
    (5, False),
    (2, True),
])  # fmt: skip
def test_the_sum_of_all_shares(streams, compiled, set_streams, plain):
    """Of a tree, as loss and gradients are; sums of whole numbers have no rounding."""
    set_streams(streams)
    integers = np.random.default_rng(0).integers(-9, 9, (12, 7, 3))
    numbers = mx.array(integers.astype(np.float32))
    weights = {"a": mx.array([1.0, 2, 3]), "layers": [{"b": mx.array(4.0)}, {"b": mx.array(5.0)}]}

    def loss(weights, rows):
        first, second = weights["layers"]
        return (rows @ weights["a"] * first["b"] * second["b"]).sum()

    results = []
    for program in (main, plain):

        def summed(weights, numbers):
            def loss_and_gradients(rows):
                return mx.value_and_grad(loss)(weights, rows)

            return program.over_streams(loss_and_gradients, numbers)

        results.append(compiled_if(compiled, summed)(weights, numbers))
    assert_near(*results, 0)


def small_weights():
    return {
        "a": normal(0, 8, 16),
        "b": normal(1, 16, 8),
        "c": normal(2, 3, 3),
        "d": normal(3, 40, 5),
    }


OPTIMIZERS = {
    "AdamW": (
        optim.AdamW,
        dict(learning_rate=0.01, betas=[0.9, 0.99], weight_decay=0.1, bias_correction=True),
    ),
    "Muon": (main.Muon, dict(learning_rate=0.05, weight_decay=0.1)),
    "Lion": (optim.Lion, dict(learning_rate=0.01, weight_decay=0.1)),
}


@pytest.mark.parametrize("name, streams, compiled", [
    ("AdamW", 1, False),
    ("AdamW", 2, False),
    ("AdamW", 3, False),
    ("AdamW", 2, True),
    ("Muon", 1, False),
    ("Muon", 2, False),
    ("Muon", 3, False),
    ("Muon", 2, True),
    ("Lion", 2, False),
])  # fmt: skip
def test_two_steps_of_a_spread_optimizer_equal_the_plain_one_to_the_bit(
    name, streams, compiled, set_streams, plain
):
    set_streams(streams)
    fast.use_streams(12, 8)
    optimizer_class, options = OPTIMIZERS[name]
    results = []
    for program in (main, plain):
        optimizer = optimizer_class(**options)
        assert program.spread(optimizer) is optimizer
        weights = small_weights()
        optimizer.init(weights)
        state = [optimizer.state]

        def step(gradients, weights):
            return optimizer.apply_gradients(gradients, weights)

        if compiled:
            step = mx.compile(step, inputs=state, outputs=state)
        for i, rate in enumerate((0.01, 0.003)):  # the training loop sets the rate of every step
            optimizer.learning_rate = rate
            gradients = {}
            for parameter, weight in weights.items():
                gradients[parameter] = normal(10 + i, *weight.shape)
            weights = step(gradients, weights)
            mx.eval(weights, optimizer.state)
        results.append([weights, optimizer.state])
    assert_near(*results, 0)
    weights_after, _ = results[0]
    assert not mx.array_equal(weights_after["a"], small_weights()["a"])


def test_the_work_of_an_optimizer_is_spread(set_streams):
    set_streams(2)
    fast.use_streams(12, 8)
    weights = small_weights()
    load = Counter()  # elements of each stream

    class Recorder(optim.SGD):
        def apply_single(self, gradient, parameter, state):
            load[str(mx.default_stream(mx.cpu))] += parameter.size
            return super().apply_single(gradient, parameter, state)

    optimizer = main.spread(Recorder(0.1))
    optimizer.apply_gradients(weights, weights)
    sizes = [weight.size for weight in weights.values()]
    assert len(load) == 2
    assert sum(load.values()) == sum(sizes)
    assert max(load.values()) - min(load.values()) <= max(sizes)


# ---- Training steps -----------------------------------------------------------------------------


def steps(program, count=6, **values):
    """The losses and gradient norms of some training steps, and the weights after them."""
    given = flags(learning_rate=0.01, batch_size=12, dropout=0.2, **values)
    shape = dict(vocab_size=11, context_size=6, dim=8, num_heads=2, num_kv_heads=1, mlp_dim=12)
    shape |= dict(num_blocks=2, mlp="swiglu")
    model = program.LanguageModel(program.Config(**shape))
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
        dropout = program.draw_dropout(i, 12, given)
        metrics = step(mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), *dropout)
        losses.append([metrics["loss"].item(), metrics["gradient_norm"].item()])
    after = {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
    return np.array(losses), after


def test_streams_change_rounding_alone_and_are_exact_in_themselves(set_streams):
    set_streams(1)
    expected, _ = steps(main)
    for streams in (2, 3, 5):
        set_streams(streams)
        first_losses, first_weights = steps(main)
        np.testing.assert_allclose(first_losses, expected, rtol=1e-4)
        for _ in range(2):
            losses, weights = steps(main)
            np.testing.assert_array_equal(losses, first_losses)
            for name in weights:
                np.testing.assert_array_equal(weights[name], first_weights[name])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_stay_with_those_of_the_plain_program(optimizer, set_streams, plain):
    set_streams(2)
    losses, _ = steps(main, 12, optimizer=optimizer)
    expected, _ = steps(plain, 12, optimizer=optimizer)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def test_how_many_streams_share_a_batch(monkeypatch):
    monkeypatch.setattr(fast, "BLAS", "a fast one")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4), raising=False)
    assert fast.count_streams(32, 48) == 4
    assert fast.count_streams(16, 48) == 3
    assert fast.count_streams(8, 48) == 1
    assert fast.count_streams(1, 4096) == 1
    assert fast.count_streams(2, 4096) == 2
    assert fast.count_streams(64, 64) == 4
    monkeypatch.setattr(fast, "BLAS", "Accelerate")
    assert fast.count_streams(32, 48) == 1


# ---- Matrix products ----------------------------------------------------------------------------


PRODUCT = """
import os, sys
if "NO_ONEDNN" in os.environ:
    sys.prefix = "/nowhere"  # below which it would be
import main
import mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
left, right = np.random.default_rng(0).normal(size=(2, 200, 200)).astype(np.float32)
pairs = [
    (left, right),
    (left.T, right),
    (left.T, right.T),
    (left[:1], right),
    (left[:, :33], right[:33]),
    (left, right[:, :1]),
    (left, right[:1].T),
    (left[:1], left[:1].T),
    (left.T, right[:, :1]),
]
for rows in (1, 7, 9, 16, 20, 32, 33, 65):
    for columns in (1, 3, 8, 33, 200):
        pairs.append((left[:rows], right[:columns].T))
for a, b in pairs:
    expected = a.astype(np.float64) @ b
    a, b = mx.array(a), mx.array(b)
    product = np.array(a @ b)
    assert np.abs(product - expected).max() < 1e-3
    total = np.array(mx.addmm(mx.ones(product.shape), a, b, alpha=0.5))
    assert np.abs(total - 0.5 * expected - 1).max() < 1e-3
print(main.fast.BLAS)
"""


def blas_of(**env):
    command = [sys.executable, "-c", PRODUCT]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    return process.stdout.strip()


def test_matrix_products_are_right(tmp_path):
    assert blas_of() == fast.BLAS != ""
    assert blas_of(XDG_CACHE_HOME=str(tmp_path)) == fast.BLAS, "the forwarder is compiled anew"


@pytest.mark.skipif(fast.forwarder is None, reason="there is no forwarder")
def test_after_mlx_it_is_too_late():
    """And it is not said that the fast BLAS is used."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = "import mlx.core, main; print(main.fast.BLAS, main.fast.has_bfloat16())"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert process.stdout == "reference BLAS False\n"


@pytest.mark.skipif(fast.forwarder is None, reason="there is no forwarder")
@pytest.mark.parametrize("m, n, k", [(3, 5, 7), (1, 9, 40), (40, 9, 1), (64, 70, 90)])
@pytest.mark.parametrize("transposed", [*itertools.product([False, True], repeat=2)])
def test_products_by_columns(m, n, k, transposed):
    """As other libraries that find the same symbol may ask for."""
    random = np.random.default_rng(0)
    a = random.normal(size=(m, k)).astype(np.float32)
    b = random.normal(size=(k, n)).astype(np.float32)

    def stored(matrix, is_transposed):
        """Its name, its elements by columns, which are those of the transposed by rows."""
        if is_transposed:
            return 112, np.ascontiguousarray(matrix)
        return 111, np.ascontiguousarray(matrix.T)

    def pointer(array):
        return array.ctypes.data_as(ctypes.c_void_p)

    a_name, a_stored = stored(a, transposed[0])
    b_name, b_stored = stored(b, transposed[1])
    product = np.zeros((n, m), np.float32)  # [m, n] by columns
    by_columns = 102
    fast.forwarder.cblas_sgemm(
        by_columns,
        a_name,
        b_name,
        m,
        n,
        k,
        ctypes.c_float(1),
        pointer(a_stored),
        a_stored.shape[1],
        pointer(b_stored),
        b_stored.shape[1],
        ctypes.c_float(0),
        pointer(product),
        m,
    )
    np.testing.assert_allclose(product.T, a @ b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(fast.forwarder is None, reason="there is no forwarder")
def test_what_is_compiled_needs_no_compiler(tmp_path):
    (tmp_path / "bin").mkdir()
    for env in ({}, {"PATH": str(tmp_path / "bin")}):
        assert blas_of(XDG_CACHE_HOME=str(tmp_path), **env) == fast.BLAS


@pytest.mark.skipif(not fast.BLAS.startswith("oneDNN"), reason="oneDNN is for Linux on x86-64")
def test_matrix_products_without_onednn():
    assert blas_of(NO_ONEDNN="1").startswith("NumPy's OpenBLAS (")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has a fast BLAS")
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
    assert not list(cache.glob("*/*/*.so"))


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has a fast BLAS")
def test_a_library_that_cannot_be_loaded(tmp_path):
    """Of the cache it is compiled anew; if a compiler makes it so, the next options are tried."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "cc"
    script.write_text(
        f"""#!/bin/sh
{shutil.which("cc")} "$@" || exit
case "$*" in *-fopenmp*)
    for last; do :; done
    echo junk > "$last"
esac
"""
    )
    script.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    env = {"PATH": path, "XDG_CACHE_HOME": str(tmp_path)}
    assert blas_of(**env) == fast.BLAS
    [library] = tmp_path.glob("*/*/blas-*")
    library.write_bytes(b"junk")
    assert blas_of(**env) == fast.BLAS
    assert list(tmp_path.glob("*/*/blas-*")) == [library]
    assert library.stat().st_size > 1000


# ---- macOS --------------------------------------------------------------------------------------

AS_ON_MACOS = """
import os, sys, sysconfig

sysconfig.get_config_vars()  # while it can still be found
sys.platform = "darwin"
missing = (
    "sched_getaffinity",
    "sched_setaffinity",
    "posix_fadvise",
    "memfd_create",
    "copy_file_range",
    "eventfd",
)
for name in missing:
    vars(os).pop(name, None)
import main
sys.exit(main.main(sys.argv[1:]))
"""


def test_what_macos_lacks_is_not_needed(tmp_path, text):
    line = ["--text", text, *TINY, "--num_iters", 20, "--steps_per_report", 1]
    line += ["--learning_rate", 3e-3]
    options = {"program": ["-c", AS_ON_MACOS], "env": {"PYTHONPATH": str(ROOT)}}
    run(*line, "--save_dir", tmp_path / "linux")
    out, _ = run(*line, "--save_dir", tmp_path / "macos", **options)
    assert "matmuls: Accelerate" in out
    losses = []
    for folder in ("linux", "macos"):
        losses.append([row["loss"] for row in log_rows(tmp_path / folder)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert len(losses[0]) == 20
    for more in (["--evaluate", "valid"], ["--prompt", "the"]):
        run(*more, "--save_dir", tmp_path / "macos", **options)


# ---- bfloat16 -----------------------------------------------------------------------------------


def rounded(array):
    """What NumPy, which has no bfloat16, makes of it by MLX: the nearest, ties to even."""
    return np.array(mx.array(array).astype(mx.bfloat16).astype(mx.float32))


@pytest.mark.parametrize(
    "instructions, maker, is_faster",
    [
        ("AVX-512 BF16", "AuthenticAMD", True),  # Zen 4, Zen 5
        ("AVX-512 FP16", "GenuineIntel", False),  # Emerald Rapids whose AMX is hidden
        ("AMX", "GenuineIntel", True),
        ("AVX-512", "AuthenticAMD", False),
    ],
)
def test_where_bfloat16_is_faster(instructions, maker, is_faster):
    """As measured, but for AMX; Intel's AVX-512 BF16 multiplies at half the speed of float32."""
    numbers = {name: number for number, name in fast.INSTRUCTIONS.items()}
    about = f"vendor_id\t: {maker}"
    assert fast.is_bfloat16_faster(numbers[instructions], about) == is_faster


@pytest.fixture
def bfloat16(monkeypatch):
    """Products round, also where that is slower than not to."""
    function = fast.forwarder and ctypes.c_void_p.in_dll(fast.forwarder, "onednn_bf16").value
    if not function:
        pytest.skip("this processor has no instructions for bfloat16, or there is no oneDNN")
    monkeypatch.setattr(fast, "prefers_bfloat16", True)
    with fast.bfloat16_products():
        yield


def test_a_product_with_a_vector_does_not_round(bfloat16):
    """Norms and sums of losses are such; a long sum loses no digits."""
    random = np.random.default_rng(0)
    vector = random.uniform(size=300_000).astype(np.float32)
    rows = vector.reshape(3, -1)
    with mx.stream(mx.cpu):
        square = (mx.array(vector) @ mx.array(vector)).item()
        sums = fast.sum_of_rows(mx.array(rows))[:, 0].tolist()
        columns = (mx.array(rows.T.copy()).T @ mx.ones((100_000, 1)))[:, 0].tolist()
    exact = (vector.astype(np.float64) ** 2).sum()
    assert square == pytest.approx(exact, rel=1e-6)
    assert sums == pytest.approx(rows.sum(1, np.float64).tolist(), rel=1e-6)
    assert columns == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("rows, inner, columns, rounds", [
    (1, 900, 700, True),
    (83, 77, 79, True),
    (300, 700, 500, True),
    (9, 33, 17, False),
    (64, 48, 48, False),
])  # fmt: skip
@pytest.mark.parametrize("left_turned", [False, True])
@pytest.mark.parametrize("right_turned", [False, True])
def test_products_round_what_they_multiply(
    rows, inner, columns, rounds, left_turned, right_turned, bfloat16
):
    """And nothing else: sums are those of float32, and small products do not round."""
    random = np.random.default_rng(0)
    left = random.normal(size=(rows, inner)).astype(np.float32)
    right = random.normal(size=(inner, columns)).astype(np.float32)
    if rounds:
        exact = rounded(left).astype(np.float64) @ rounded(right)
    else:
        exact = left.astype(np.float64) @ right

    def array_of(matrix, is_turned):
        """It, in memory by columns if it is turned."""
        if is_turned:
            return mx.array(np.ascontiguousarray(matrix.T)).T
        return mx.array(matrix)

    with mx.stream(mx.cpu):
        product = np.array(array_of(left, left_turned) @ array_of(right, right_turned))
    assert np.abs(product - exact).max() <= 1e-5 * np.abs(exact).max()


def test_rounding_of_ties_and_of_what_is_not_finite(bfloat16):
    """Ties go to the even neighbour; above the largest number is infinity; NaN stays NaN."""
    bits = [
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0x3F807FFF,
        0x7F7FFFFF,
        0x7F800000,
        0xFF800000,
        0x7F800001,
        0xFFFFFFFF,
        1,
    ]
    numbers = np.array(bits, np.uint32).view(np.float32)
    for number in numbers:
        left = np.zeros((80, 80), np.float32)  # smaller products do not round
        left[:, 0] = number
        with mx.stream(mx.cpu):
            product = np.array(mx.array(left) @ mx.ones((80, 80)))
        expected = np.full_like(product, rounded(np.array([number]))[0])
        np.testing.assert_array_equal(product, expected, err_msg=str(number))


def test_only_the_step_rounds(text, tmp_path):
    """Scores and samples are float32's, and a step in bfloat16 is near that in float32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        shape = dict(dim=64, num_heads=2, num_blocks=2, context_size=16)
        given = flags(batch_size=8, dtype=dtype, **shape)
        model = main.LanguageModel(main.make_config(given, 257))
        main.init_weights(model, 1)
        texts = np.random.default_rng(0).integers(0, 257, (8, 17))
        tokens = mx.array(texts, mx.int32)
        before = main.evaluate(model, np.array(tokens).flatten(), 4)
        step = main.make_step(model, main.make_optimizer(model, given), given)
        losses[dtype] = []
        dropout = main.draw_dropout(0, 8, given)
        for _ in range(5):
            metrics = step(tokens[:, :-1], tokens[:, 1:], *dropout)
            losses[dtype].append(metrics["loss"].item())
        losses[dtype].append(before)
    assert losses["float32"][-1] == losses["bfloat16"][-1], "a score rounded"
    assert losses["float32"] == pytest.approx(losses["bfloat16"], abs=2e-3)
    assert (losses["float32"] != losses["bfloat16"]) == fast.has_bfloat16()


# ---- Compiler -----------------------------------------------------------------------------------

COMPILE = """
import main
import mlx.core as mx
main.use_device(gpu=False)
double = mx.compile(lambda x: mx.exp(x) * 2 + x)
assert abs(double(mx.zeros(3)).sum().item() - 6) < 1e-6
import os, shutil
print(shutil.which("g++"))
"""


def compile_in(folder, **env):
    """A cold start in a process: no kernels, no header; returns it."""
    (folder / "cache").mkdir(exist_ok=True)
    given = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        **env,
    }
    command = [sys.executable, "-c", COMPILE]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=given,
        start_new_session=True,
    )


needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="MLX compiles by g++ on Linux"
)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A folder in which compile_in has run."""
    main.use_device(gpu=False)  # as in a program whose children inherit its PATH
    folder = tmp_path_factory.mktemp("started")
    out, err = compile_in(folder).communicate(timeout=120)
    assert out.strip().endswith("/g++") and err == ""
    return folder


@needs_compiler
def test_two_processes_share_a_header(tmp_path):
    starts = [compile_in(tmp_path), compile_in(tmp_path)]
    for process in starts:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == ""
        found = out.strip()
    [folder] = (tmp_path / "cache" / "transformer-lm").glob("code-*/compiler-*")
    assert found == str(folder / "g++"), "this process's PATH has it first"
    assert len(list(folder.rglob("*.gch"))) == 1
    assert str(folder) not in os.environ["PATH"], "that of others does not"


@needs_compiler
def test_a_process_that_another_has_started_uses_the_same_compiler(started):
    """Not a script that runs the script of the other one."""
    assert Path(shutil.which("g++")).parent.name.startswith("compiler-")
    out, err = compile_in(started).communicate(timeout=120)
    assert err == "" and len(list(started.rglob("*.gch"))) == 1
    assert "/compiler-" not in Path(out.strip()).read_text().partition(" -I ")[0]


@needs_compiler
def test_headers_of_older_versions_go_and_what_killed_compilations_left(tmp_path):
    compile_in(tmp_path).communicate(timeout=120)
    [folder] = (tmp_path / "cache" / "transformer-lm").glob("code-*")
    for current in folder.glob("compiler-*"):
        shutil.rmtree(current)
    for i in range(5):
        (folder / f"compiler-{i}").mkdir(parents=True)
        os.utime(folder / f"compiler-{i}", (i, i))
    (folder / "compiler-5.new").mkdir()
    (folder / ".0123456789abcdef.new").touch()
    compile_in(tmp_path).communicate(timeout=120)
    assert not list(folder.glob("*.new"))
    left = {path.name for path in folder.glob("compiler-*")}
    assert len(left) == 3 and left > {"compiler-3", "compiler-4"}


@needs_compiler
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang is not installed")
def test_with_clang_alone(tmp_path):
    (tmp_path / "bin").mkdir()
    for tool in ("clang", "clang++", "ld", "as", "sh"):
        if shutil.which(tool):
            (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    out, err = compile_in(tmp_path, PATH=str(tmp_path / "bin")).communicate(timeout=120)
    assert err == "" and out.strip().endswith("/g++"), "MLX then compiles by clang"
    assert list(tmp_path.rglob("mlx/*/cpu/*.so"))


@needs_compiler
def test_killed_at_any_moment_of_a_cold_start(tmp_path):
    """Whatever it leaves, the next start finishes."""
    for moment in np.random.default_rng(0).uniform(0.2, 3, 5):
        process = compile_in(tmp_path)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # all is compiled: begin anew
            shutil.rmtree(tmp_path / "cache")
    out, err = compile_in(tmp_path).communicate(timeout=120)
    assert err == "" and out.strip().endswith("/g++")
    assert not list((tmp_path / "cache").glob("*/*/*.new"))


@needs_compiler
@pytest.mark.parametrize("trouble", [
    "no g++",
    "no cache folder",
    "damaged header",
    "full of errors",
])  # fmt: skip
def test_starts_without_the_header(tmp_path, trouble, started):
    env = {}
    folder = tmp_path
    if trouble == "no g++":
        (tmp_path / "bin").mkdir()
        env["PATH"] = str(tmp_path / "bin")
    if trouble == "full of errors":  # a compiler that compiles kernels, but no headers
        (tmp_path / "bin").mkdir()
        compiler = tmp_path / "bin" / "g++"
        compiler.write_text(
            "#!/bin/sh\n"
            'case "$*" in *c++-header*) exit 1;; esac\n'
            f'exec {shutil.which("g++")} "$@"\n'
        )
        compiler.chmod(0o755)
        env["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    if trouble == "no cache folder":
        (tmp_path / "file").write_text("")
        env["XDG_CACHE_HOME"] = str(tmp_path / "file")
    if trouble == "damaged header":
        folder = started
        [header] = folder.rglob("*.gch")
        header.write_bytes(header.read_bytes()[: 1 << 20])
        for kernels in folder.rglob("mlx/*/cpu"):
            shutil.rmtree(kernels)
    process = compile_in(folder, **env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
