"""AdamW against NumPy, its groups, the learning rate's schedule, and the training step."""

import main
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import flags, loss_of
from extras import lora
from main import MUON_RATE
from mlx.utils import tree_flatten, tree_map, tree_unflatten


@pytest.fixture(autouse=True)
def two_streams(set_streams):
    """Batches are shared out over two streams, however small they are."""
    set_streams(2)


def make_model(num_blocks=2, **values):
    config = main.Config(
        vocab_size=11,
        context_size=6,
        num_blocks=num_blocks,
        dim=8,
        num_heads=2,
        num_kv_heads=1,
        mlp="swiglu",
        mlp_dim=12,
        **values,
    )
    model = main.LanguageModel(config)
    random = np.random.default_rng(0)
    weights = {}
    for name, weight in tree_flatten(model.parameters()):
        weights[name] = random.normal(0.5, 0.3, weight.shape)
    model.update(tree_of(weights))
    return model


def tree_of(weights):
    """NumPy arrays by their names, as a tree of MLX arrays in float32."""
    named = []
    for name, weight in weights.items():
        named.append((name, mx.array(weight.astype(np.float32))))
    return tree_unflatten(named)


def arrays(tree):
    """The inverse of tree_of."""
    return {name: np.array(weight, np.float64) for name, weight in tree_flatten(tree)}


def assert_close(weights, expected, **tolerances):
    """Fails unless two dicts of NumPy arrays are the same, but for the tolerances."""
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, expected[name], err_msg=name, **tolerances)


def adam_names(group):
    """The names of the parameters that one of AdamW's or Muon's groups holds."""
    names = [name for name, _ in tree_flatten(group.state)]
    return [name.removesuffix(".v") for name in names if name.endswith(".v")]


def outer_names(untie):
    """The names of the matrices outside of the blocks."""
    names = ["model.embed_tokens.weight"]
    if untie:
        names.append("lm_head.weight")
    return sorted(names)


@pytest.mark.parametrize("embedding_decay", [None, 0.0, 7.0])
def test_two_steps_equal_adamw_in_numpy(embedding_decay):
    model = make_model(untie=True)
    given = flags(learning_rate=0.01, weight_decay=0.1, embedding_decay=embedding_decay)
    optimizer = main.make_optimizer(model, given)
    outer_decay = 0.1 if embedding_decay is None else embedding_decay
    decays = {"proj": 0.1, "embed": outer_decay, "lm_head": outer_decay, "norm": 0.0}
    random = np.random.default_rng(1)
    weights = arrays(model.parameters())
    first = dict.fromkeys(weights, 0.0)
    second = dict.fromkeys(weights, 0.0)
    for step, rate in ((1, 0.01), (2, 0.003)):  # the loop sets the rate of every step
        # Gradients from 1e-9 to 1: beside the small ones epsilon counts, and the zeros leave
        # weight decay alone.
        gradients = {}
        for name, weight in weights.items():
            sizes = 10.0 ** random.integers(-9, 1, weight.shape)
            sizes *= random.random(weight.shape) > 0.1
            gradients[name] = random.normal(size=weight.shape) * sizes
        main.set_learning_rate(optimizer, rate)
        optimizer.update(model, tree_of(gradients))
        for name, gradient in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.99 * second[name] + 0.01 * gradient**2
            mean = first[name] / (1 - 0.9**step)
            square = second[name] / (1 - 0.99**step)
            [decay] = {decay for part, decay in decays.items() if part in name}
            weights[name] *= 1 - rate * decay
            weights[name] -= rate * mean / (np.sqrt(square) + 1e-8)
        assert_close(arrays(model.parameters()), weights, rtol=0, atol=1e-6)


def orthogonal(matrix):
    """Five of Muon's Newton-Schulz steps, as its authors give them."""
    rows, columns = matrix.shape
    if rows > columns:
        return orthogonal(matrix.T).T
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        factor = -4.7750 * square + 2.0315 * square @ square
        x = 3.4445 * x + factor @ x
    return x


@pytest.mark.parametrize("untie", [False, True])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(untie):
    model = make_model(untie=untie)
    given = flags(optimizer="muon", learning_rate=0.01, weight_decay=0.1)
    optimizer = main.make_optimizer(model, given)
    blocks, others, plain = map(adam_names, optimizer.optimizers)
    weights = arrays(model.parameters())
    hidden = [name for name in weights if "proj" in name]
    norms = [name for name in weights if "norm" in name]
    assert len(hidden) == 14
    assert sorted(blocks) == sorted(hidden)
    assert sorted(others) == outer_names(untie)
    assert sorted(plain) == sorted(norms)

    random = np.random.default_rng(1)
    velocity = dict.fromkeys(hidden, 0.0)
    for rate in (0.01, 0.003):
        gradients = {}
        for name, weight in weights.items():
            gradients[name] = random.normal(size=weight.shape)
        main.set_learning_rate(optimizer, rate)
        optimizer.update(model, tree_of(gradients))
        for name in hidden:
            velocity[name] = 0.95 * velocity[name] + 0.05 * gradients[name]
            update = orthogonal(0.05 * gradients[name] + 0.95 * velocity[name])  # Nesterov
            rows, columns = update.shape
            update *= max(1, rows / columns) ** 0.5
            weights[name] *= 1 - rate * 0.1
            weights[name] -= rate * MUON_RATE * update
    reached = arrays(model.parameters())
    for name in hidden:
        np.testing.assert_allclose(reached[name], weights[name], rtol=0, atol=1e-4, err_msg=name)
    for group in optimizer.optimizers[1:]:
        assert group.learning_rate.item() == pytest.approx(0.003)


@pytest.mark.parametrize("untie", [False, True])
def test_each_parameter_is_in_exactly_one_group(untie):
    model = make_model(untie=untie)
    optimizer = main.make_optimizer(model, flags(weight_decay=0.1, embedding_decay=3.0))
    blocks, others, plain = map(adam_names, optimizer.optimizers)
    names = list(arrays(model.parameters()))
    norms = [name for name in names if "norm" in name]
    assert sorted(blocks + others + plain) == sorted(names)
    assert sorted(others) == outer_names(untie)
    assert sorted(plain) == sorted(norms)
    decays = [group.weight_decay for group in optimizer.optimizers]
    assert decays == [0.1, 3.0, 0.0]


def test_what_is_frozen_has_no_group():
    """As a LoRA run's base."""
    model = make_model()
    names = sorted(arrays(model.parameters()))
    model.model.embed_tokens.freeze()
    optimizer = main.make_optimizer(model, flags())
    held = sorted(sum(map(adam_names, optimizer.optimizers), []))
    names.remove("model.embed_tokens.weight")
    assert held == names


@pytest.mark.parametrize("name", main.OPTIMIZERS)
def test_each_choice_of_optimizer_moves_every_parameter(name):
    model = make_model()
    before = arrays(model.parameters())
    optimizer = main.make_optimizer(model, flags(optimizer=name))
    optimizer.update(model, tree_map(mx.ones_like, model.trainable_parameters()))
    for parameter, weight in arrays(model.parameters()).items():
        assert (weight != before[parameter]).any(), parameter


@pytest.mark.parametrize("name", main.SCHEDULES)
def test_each_schedule_begins_at_the_peak(name):
    given = flags(learning_rate=0.8, min_lr=0.0, lr_warmup=0, lr_schedule=name, num_iters=10)
    assert main.learning_rate_at(0, given) == 0.8


def rates_of(count, given):
    """The learning rates of a run's first iterations."""
    return [main.learning_rate_at(i, given) for i in range(count)]


def test_learning_rate_warms_up_and_stays():
    given = flags(learning_rate=0.8, lr_warmup=4)
    assert rates_of(7, given) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    assert main.learning_rate_at(10**6, given) == 0.8


@pytest.mark.parametrize("lr_warmup", [0, 1])
def test_learning_rate_without_warm_up(lr_warmup):
    given = flags(learning_rate=0.8, lr_warmup=lr_warmup)
    assert rates_of(3, given) == [0.8, 0.8, 0.8]


def test_learning_rate_is_never_zero():
    given = flags(learning_rate=1e-4, lr_warmup=1000)
    rates = rates_of(1100, given)
    assert min(rates) == rates[0] == pytest.approx(1e-7)
    assert max(rates) == 1e-4
    assert rates == sorted(rates)


ROOT_HALF = 0.5**0.5


@pytest.mark.parametrize("schedule, min_lr, expected", [
    ("linear", 0.0, [0.4, 0.8, 0.8, 0.6, 0.4, 0.2]),
    ("linear", None, [0.4, 0.8, 0.8, 0.62, 0.44, 0.26]),
    ("cosine", 0.0, [0.4, 0.8, 0.8, 0.4 + 0.4 * ROOT_HALF, 0.4, 0.4 - 0.4 * ROOT_HALF]),
    ("cosine", 0.2, [0.4, 0.8, 0.8, 0.5 + 0.3 * ROOT_HALF, 0.5, 0.5 - 0.3 * ROOT_HALF]),
    ("constant", 0.2, [0.4, 0.8, 0.8, 0.8, 0.8, 0.8]),
])  # fmt: skip
def test_learning_rate_schedules(schedule, min_lr, expected):
    given = flags(
        learning_rate=0.8,
        lr_warmup=2,
        num_iters=6,
        lr_schedule=schedule,
        min_lr=min_lr,
    )
    assert rates_of(6, given) == pytest.approx(expected)


@pytest.mark.parametrize("schedule, lr_cooldown, expected", [
    ("linear", 1.0, [0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ("linear", 0.5, [0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.6, 0.4, 0.2]),
    # begins between two steps
    ("linear", 0.3125, [0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.64, 0.32]),
    ("linear", 0.0, [0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]),
    ("cosine", 0.5, [0.4, *[0.8] * 6, 0.4 + 0.4 * ROOT_HALF, 0.4, 0.4 - 0.4 * ROOT_HALF]),
    ("constant", 0.5, [0.4, *[0.8] * 9]),
])  # fmt: skip
def test_learning_rate_falls_over_the_cooldown(schedule, lr_cooldown, expected):
    given = flags(
        learning_rate=0.8,
        lr_warmup=2,
        num_iters=10,
        lr_schedule=schedule,
        lr_cooldown=lr_cooldown,
        min_lr=0,
    )
    assert rates_of(10, given) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("lr_warmup, num_iters", [
    (0, 1),
    (0, 9),
    (5, 5),
    (200, 10),
])  # fmt: skip
@pytest.mark.parametrize("lr_cooldown", [0.0, 0.01, 1.0])
def test_no_schedule_divides_by_zero_or_gives_a_zero_rate(
    schedule, lr_warmup, num_iters, lr_cooldown
):
    given = flags(
        learning_rate=0.5,
        lr_warmup=lr_warmup,
        num_iters=num_iters,
        lr_schedule=schedule,
        lr_cooldown=lr_cooldown,
    )
    for rate in rates_of(num_iters, given):
        assert 0 < rate <= 0.5


def test_a_schedule_of_ones_own(monkeypatch):
    monkeypatch.setitem(main.SCHEDULES, "square", lambda done, flags: (1 - done) ** 2)
    given = flags(learning_rate=0.8, lr_warmup=0, num_iters=4, lr_schedule="square", min_lr=0)
    assert rates_of(4, given) == pytest.approx([0.8, 0.45, 0.2, 0.05])


def test_an_optimizer_of_ones_own(uncompiled, monkeypatch):
    """Lion for the matrices of the blocks: a step is the learning rate times a sign."""

    def lion(flags, weight_decay):
        return optim.Lion(flags.learning_rate, weight_decay=weight_decay)

    monkeypatch.setitem(main.OPTIMIZERS, "lion", (lion, main.adamw))
    model = make_model()
    before = arrays(model.parameters())
    given = flags(optimizer="lion", learning_rate=0.25, weight_decay=0)
    optimizer = main.make_optimizer(model, given)
    take(main.make_step(model, optimizer, given), *batch())
    after = arrays(model.parameters())
    for name in before:
        if "proj" in name:
            np.testing.assert_allclose(abs(after[name] - before[name]), 0.25, rtol=1e-5)


@pytest.mark.parametrize("share, closed_form", [
    (1.0, lambda places: places**0),  # the plain mean
    (0.5, lambda places: places - 1),
    (0.25, lambda places: (places - 1) * (places - 2) * (places - 3)),
])  # fmt: skip
def test_average_weights_have_the_powers_of_their_places(share, closed_form):
    """The recursion against sums written out.

    Step `place` of N, counted from 1, has a weight known in closed form.
    """
    random = np.random.default_rng(0)
    steps = random.normal(size=(20, 4, 3)).astype(np.float32)
    average = None
    for i, step in enumerate(steps):
        average = main.average_weights(average, {"layer": [mx.array(step)]}, i, share)
        if i + 1 >= 1 / share:
            parts = closed_form(np.arange(1, i + 2, dtype=np.float64))
            taken = steps[: i + 1].astype(np.float64)
            expected = np.tensordot(parts / parts.sum(), taken, 1)
        else:
            expected = step  # the newest weights
        [result] = average["layer"]
        np.testing.assert_allclose(np.array(result), expected, rtol=0, atol=1e-5)


def test_dropout_moves_by_a_line():
    given = flags(dropout=0.1, dropout_final=0.5, num_iters=4)
    keys = []
    for i, expected in enumerate([0.1, 0.2, 0.3, 0.4]):
        rate, keys_of_rows = main.draw_dropout(i, 5, given)
        assert rate.item() == pytest.approx(expected)
        keys.append(np.array(keys_of_rows))
    assert len(np.unique(np.concatenate(keys), axis=0)) == 20
    _, keys_of_three_rows = main.draw_dropout(2, 3, given)
    np.testing.assert_array_equal(keys[2][:3], np.array(keys_of_three_rows))
    _, keys_of_another_seed = main.draw_dropout(2, 5, flags(dropout=0.1, seed=1))
    assert (keys[2] != np.array(keys_of_another_seed)).any()

    rate, _ = main.draw_dropout(3, 1, flags(dropout=0.1, num_iters=4))
    assert rate.item() == pytest.approx(0.1)
    rate, _ = main.draw_dropout(1, 1, flags(dropout_final=0.4, num_iters=4))
    assert rate.item() == pytest.approx(0.1)
    rate, _ = main.draw_dropout(3, 1, flags())
    assert rate.item() == 0


NO_DROPOUT = flags()


def take(step, tokens, targets):
    """A step without dropout: its metrics."""
    return step(tokens, targets, *main.draw_dropout(0, len(tokens), NO_DROPOUT))


def draw_tokens(seed, size):
    return np.random.default_rng(seed).integers(11, size=size)


def inputs_and_targets(tokens):
    return mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])


def batch():
    return inputs_and_targets(draw_tokens(2, (3, 7)))


@pytest.fixture
def uncompiled():
    """Steps without the C++ compiler, which a compiled step calls for every kernel.

    Where that is not what is tested, time is saved.
    """
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("grad_clip", [0.0, 0.25, 1e6])
def test_gradients_are_clipped_by_their_common_norm(uncompiled, grad_clip):
    model = make_model()
    tokens, targets = batch()
    value_and_grad = nn.value_and_grad(model, loss_of)
    total, gradients = value_and_grad(model, tokens, targets)
    gradients = arrays(gradients)
    for gradient in gradients.values():
        gradient /= targets.size  # that of the mean
    squares = [(gradient**2).sum() for gradient in gradients.values()]
    norm = np.sqrt(sum(squares))
    assert norm > 0.5  # or 0.25 would clip nothing
    before = arrays(model.parameters())
    optimizer = optim.SGD(1.0)  # whose update at rate 1 is the gradient itself
    step = main.make_step(model, optimizer, flags(grad_clip=grad_clip))
    metrics = take(step, tokens, targets)
    assert metrics["loss"].item() == pytest.approx(total.item() / targets.size, rel=1e-5)
    assert metrics["gradient_norm"].item() == pytest.approx(norm, rel=1e-5)  # before clipping
    factor = 0.25 / norm if grad_clip == 0.25 else 1.0
    updates = {}
    expected = {}
    for name, weight in arrays(model.parameters()).items():
        updates[name] = before[name] - weight
        expected[name] = factor * gradients[name]
    assert_close(updates, expected, rtol=1e-4, atol=1e-6)


# The step in its variants. All tokens are drawn from a small model's vocabulary of 11.


def steps(count=6, dropout=0.2, **values):
    """The losses and gradient norms of some training steps, and the weights after them."""
    given = flags(learning_rate=0.01, dropout=dropout, **values)
    model = make_model()
    optimizer = main.make_optimizer(model, given)
    step = main.make_step(model, optimizer, given)
    rows = given.batch_size * given.grad_accumulation
    losses = []
    for i in range(count):
        tokens = draw_tokens([7, i], (12, 7))[:rows]
        rate, keys = main.draw_dropout(i, rows, given)
        metrics = step(*inputs_and_targets(tokens), rate, keys)
        losses.append([metrics["loss"].item(), metrics["gradient_norm"].item()])
    return np.array(losses), arrays(model.parameters())


def test_accumulation_is_the_big_batch():
    expected, weights = steps(batch_size=12)
    for batch_size, grad_accumulation in ((4, 3), (6, 2), (2, 6)):
        losses, reached = steps(batch_size=batch_size, grad_accumulation=grad_accumulation)
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        assert_close(reached, weights, rtol=0, atol=2e-3)
    others, _ = steps(batch_size=4)
    assert abs(others - expected).max() > 0.01  # or the comparison would prove nothing


def peak_of_a_step(grad_checkpoint):
    """The median memory, in bytes, that a step of a larger model needs at most."""
    config = main.Config(
        vocab_size=11,
        context_size=64,
        num_blocks=8,
        dim=32,
        num_heads=2,
        num_kv_heads=2,
        mlp="swiglu",
        mlp_dim=128,
    )
    given = flags(batch_size=64, grad_checkpoint=grad_checkpoint)
    model = main.LanguageModel(config)
    tokens = mx.array(draw_tokens(0, (64, 64)))
    step = main.make_step(model, main.make_optimizer(model, given), given)
    peaks = []
    for _ in range(3):  # other programs' load moves a single peak
        mx.reset_peak_memory()
        before = mx.get_active_memory()  # of other tests, too
        take(step, tokens, tokens)
        peaks.append(mx.get_peak_memory() - before)
    return sorted(peaks)[1]


def test_gradient_checkpointing_changes_memory_alone(set_streams):
    expected, weights = steps(batch_size=12)
    losses, reached = steps(batch_size=12, grad_checkpoint=True)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    set_streams(1)
    plain = peak_of_a_step(grad_checkpoint=False)
    checkpointed = peak_of_a_step(grad_checkpoint=True)
    assert checkpointed < 0.6 * plain


def test_twenty_steps_stay_with_the_plain_ones():
    """As MLX's documentation would write the step.

    Its own loss, attention, AdamW and clipping, one stream, eager.
    """
    given = flags(learning_rate=0.01, batch_size=12, mlp="relu2")
    model = make_model()
    plain = optim.AdamW(0.01, betas=[0.9, 0.99], weight_decay=1e-5, bias_correction=True)

    def loss(model, tokens, targets):
        # With caches attention is MLX's own.
        caches = [main.Cache() for _ in model.model.layers]
        logits = model(tokens, caches)
        return nn.losses.cross_entropy(logits, targets, reduction="mean")

    value_and_grad = nn.value_and_grad(model, loss)
    expected = []
    for i in range(20):
        tokens, targets = inputs_and_targets(draw_tokens([7, i], (12, 7)))
        value, gradients = value_and_grad(model, tokens, targets)
        gradients, _ = optim.clip_grad_norm(gradients, given.grad_clip)
        plain.update(model, gradients)
        expected.append(value.item())
    losses_and_norms, _ = steps(20, dropout=0.0, batch_size=12)
    np.testing.assert_allclose(losses_and_norms[:, 0], expected, rtol=0, atol=1e-4)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A function after which the program believes in a GPU.

    The CPU computes what that is given to do.
    """
    stream = mx.default_stream(mx.cpu)

    def pretend():
        monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
        monkeypatch.setattr(mx, "default_stream", lambda device: stream)

    return pretend


def test_bfloat16_computes_in_it_and_keeps_float32(monkeypatch, pretended_gpu):
    """What a GPU is given to do: the losses are near, no weight or moment is rounded."""
    expected, _ = steps(dropout=0.0, batch_size=12)
    seen_of_embeddings = set()
    seen_of_others = set()
    call = main.Transformer.__call__

    def spying(model, *arguments, **options):
        for name, weight in tree_flatten(model.parameters()):
            seen = seen_of_embeddings if "embed" in name else seen_of_others
            seen.add(weight.dtype)
        return call(model, *arguments, **options)

    monkeypatch.setattr(main.Transformer, "__call__", spying)
    pretended_gpu()
    losses, weights = steps(dropout=0.0, batch_size=12, dtype="bfloat16")
    assert seen_of_others == {mx.bfloat16}
    assert seen_of_embeddings == {mx.float32}
    assert 1e-5 < abs(losses[:, 0] - expected[:, 0]).max() < 0.1
    unchanged = []
    for weight in weights.values():
        rounded = mx.array(weight.astype(np.float32)).astype(mx.bfloat16)
        is_unchanged = np.array(rounded.astype(mx.float32)) == weight
        unchanged.append(is_unchanged.ravel())
    assert np.mean(np.concatenate(unchanged)) < 0.1


def test_lora_computes_in_bfloat16(monkeypatch, pretended_gpu):
    """With its frozen base, which stays in float32 between the steps."""
    seen = set()
    call = main.Transformer.__call__

    def spying(model, *arguments, **options):
        hidden = call(model, *arguments, **options)
        seen.add(hidden.dtype)
        return hidden

    monkeypatch.setattr(main.Transformer, "__call__", spying)
    pretended_gpu()
    model = make_model()
    base = arrays(model.parameters())
    lora.add_lora(model, rank=2, alpha=4.0)
    given = flags(batch_size=12, dtype="bfloat16")
    step = main.make_step(model, optim.SGD(1.0), given)
    tokens = mx.zeros((12, 6), mx.int32)
    take(step, tokens, tokens)
    assert seen == {mx.bfloat16}
    weights = dict(tree_flatten(model.parameters()))
    dtypes = {weight.dtype for weight in weights.values()}
    assert dtypes == {mx.float32}
    for name, weight in base.items():
        adapted = name.replace(".weight", ".linear.weight")
        if adapted in weights:
            name = adapted
        np.testing.assert_array_equal(np.array(weights[name]), weight)


def test_a_frequent_token_keeps_its_gradient_in_bfloat16(set_streams, pretended_gpu):
    """Thousands of small terms go into the sums of its embedding.

    And of its row of the output layer.
    """
    tokens = draw_tokens(1, (64, 65))
    is_frequent = np.random.default_rng(0).random((64, 65)) < 0.5
    tokens[is_frequent] = 3

    def gradient_of_embeddings(dtype):
        name = "model.embed_tokens.weight"
        model = make_model()
        before = arrays(model.parameters())[name]
        given = flags(batch_size=64, dtype=dtype, grad_clip=0.0)
        step = main.make_step(model, optim.SGD(1.0), given)
        take(step, *inputs_and_targets(tokens))
        after = arrays(model.parameters())[name]
        return before - after

    set_streams(1)
    expected = gradient_of_embeddings("float32")
    pretended_gpu()
    gradient = gradient_of_embeddings("bfloat16")
    for token in range(11):
        error = np.linalg.norm(gradient[token] - expected[token])
        assert error < 0.1 * np.linalg.norm(expected[token]), token
