"""AdamW against NumPy, its groups, the learning rate's schedule, and gradient clipping in the training step."""

import main
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import flags, loss_of
from extras import lora
from main import MUON_RATE
from mlx.utils import tree_flatten, tree_unflatten


@pytest.fixture(autouse=True)
def two_streams(set_streams):
    """Batches are shared out over two streams, however small they are."""
    set_streams(2)


def make_model(num_blocks=2, **values):
    shape = dict(vocab_size=11, context_size=6, dim=8, num_heads=2, num_kv_heads=1, mlp_dim=12)
    model = main.LanguageModel(main.Config(**shape, num_blocks=num_blocks, mlp="swiglu", **values))
    random = np.random.default_rng(0)
    set_weights(model, {n: random.normal(0.5, 0.3, w.shape) for n, w in tree_flatten(model.parameters())})
    return model


def set_weights(model, weights):
    model.update(tree_unflatten([(name, mx.array(weight.astype(np.float32))) for name, weight in weights.items()]))


def arrays(tree):
    return {name: np.array(weight, np.float64) for name, weight in tree_flatten(tree)}


@pytest.mark.parametrize("embedding_decay", [None, 0.0, 7.0])
def test_two_steps_equal_adamw_in_numpy(embedding_decay):
    model = make_model(untie=True)
    given = flags(learning_rate=0.01, weight_decay=0.1, embedding_decay=embedding_decay)
    optimizer = main.make_optimizer(model, given)
    decays = {"proj": 0.1, "embed": 0.1 if embedding_decay is None else embedding_decay, "norm": 0.0}
    decays["lm_head"] = decays["embed"]
    random = np.random.default_rng(1)
    weights = arrays(model.parameters())
    first = {name: np.zeros(weight.shape) for name, weight in weights.items()}
    second = {name: np.zeros(weight.shape) for name, weight in weights.items()}
    for step, rate in ((1, 0.01), (2, 0.003)):  # the loop sets the rate of every step
        # Gradients from 1e-9 to 1: beside the small ones epsilon counts, and the zeros leave weight decay alone.
        gradients = {}
        for name, weight in weights.items():
            sizes = 10.0 ** random.integers(-9, 1, weight.shape) * (random.random(weight.shape) > 0.1)
            gradients[name] = random.normal(size=weight.shape) * sizes
        optimizer.learning_rate = rate
        optimizer.update(model, tree_unflatten([(n, mx.array(g.astype(np.float32))) for n, g in gradients.items()]))
        for name, gradient in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.99 * second[name] + 0.01 * gradient**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.99**step)
            [decay] = {decay for part, decay in decays.items() if part in name}
            weights[name] = weights[name] * (1 - rate * decay) - rate * mean / (np.sqrt(square) + 1e-8)
        for name, weight in arrays(model.parameters()).items():
            np.testing.assert_allclose(weight, weights[name], rtol=0, atol=1e-6, err_msg=name)


def orthogonal(matrix):
    """Five of Muon's Newton-Schulz steps, as its authors give them."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("untie", [False, True])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(untie):
    model = make_model(untie=untie)
    given = flags(optimizer="muon", learning_rate=0.01, weight_decay=0.1)
    optimizer = main.make_optimizer(model, given)
    groups = [[n[:-2] for n, _ in tree_flatten(group.state) if n.endswith(".v")] for group in optimizer.optimizers]
    names = [name for name, _ in tree_flatten(model.parameters())]
    hidden = [name for name in names if "proj" in name]
    assert sorted(groups[0]) == sorted(hidden) and len(hidden) == 14
    assert sorted(groups[1]) == sorted(["model.embed_tokens.weight"] + ["lm_head.weight"] * untie)
    assert sorted(groups[2]) == sorted(name for name in names if "norm" in name)
    random, weights = np.random.default_rng(1), arrays(model.parameters())
    velocity = {name: 0.0 for name in hidden}
    for rate in (0.01, 0.003):
        gradients = {name: random.normal(size=weight.shape) for name, weight in weights.items()}
        main.set_learning_rate(optimizer, rate)
        optimizer.update(model, tree_unflatten([(n, mx.array(g.astype(np.float32))) for n, g in gradients.items()]))
        for name in hidden:
            velocity[name] = 0.95 * velocity[name] + 0.05 * gradients[name]
            update = orthogonal(0.05 * gradients[name] + 0.95 * velocity[name])  # Nesterov
            update *= max(1, update.shape[0] / update.shape[1]) ** 0.5
            weights[name] = weights[name] * (1 - rate * 0.1) - rate * MUON_RATE * update
    for name in hidden:
        np.testing.assert_allclose(arrays(model.parameters())[name], weights[name], rtol=0, atol=1e-4, err_msg=name)
    assert all(group.learning_rate.item() == pytest.approx(0.003) for group in optimizer.optimizers[1:])


@pytest.mark.parametrize("untie", [False, True])
def test_each_parameter_is_in_exactly_one_group(untie):
    model = make_model(untie=untie)
    optimizer = main.make_optimizer(model, flags(weight_decay=0.1, embedding_decay=3.0))
    blocks, others, plain = (
        [name[:-2] for name, _ in tree_flatten(group.state) if name.endswith(".v")] for group in optimizer.optimizers
    )
    names = [name for name, _ in tree_flatten(model.parameters())]
    assert sorted(blocks + others + plain) == sorted(names)
    assert sorted(others) == sorted(["model.embed_tokens.weight"] + ["lm_head.weight"] * untie)
    assert sorted(plain) == sorted(name for name in names if "norm" in name)
    assert [group.weight_decay for group in optimizer.optimizers] == [0.1, 3.0, 0.0]


@pytest.mark.parametrize("untie", [False, True])
def test_one_group_of_matrices_is_divided_in_two(untie):
    """As an older checkpoint has it, with AdamW: blocks, embeddings and output layer together."""
    model = make_model(untie=untie)
    optimizer = main.make_optimizer(model, flags())
    ones = main.tree_map(mx.ones_like, model.parameters())
    optimizer.update(model, ones)
    blocks, others, _ = optimizer.state["states"]
    together = main.tree_unflatten(list({**dict(tree_flatten(blocks)), **dict(tree_flatten(others))}.items()))
    for part, expected in zip(main.split_group(together), (blocks, others)):
        part, expected = arrays(part), arrays(expected)
        assert part.keys() == expected.keys() and len(part) > 3
        for name in part:
            np.testing.assert_array_equal(part[name], expected[name])


def weights_of(model):
    """The names and weights of a model's matrices, and those of its norms."""
    weights = tree_flatten(model.trainable_parameters())
    matrices = [(name, weight) for name, weight in weights if weight.ndim == 2]
    norms = [(name, weight) for name, weight in weights if weight.ndim == 1]
    return matrices, norms


def hold(group, weights):
    """Makes an optimizer hold just these weights, [(name, array), ...]."""
    group.state = {}
    group.init(tree_unflatten(weights))


def is_optimizer(each):
    return isinstance(each, type) and issubclass(each, optim.Optimizer)


OPTIMIZERS = [each for each in vars(optim).values() if is_optimizer(each)]
OPTIMIZERS.remove(optim.Optimizer)
OPTIMIZERS.remove(optim.MultiOptimizer)


def test_all_optimizers_of_mlx_are_known():
    names = {each.__name__ for each in OPTIMIZERS}
    known = "AdamW Lion Adafactor SGD Adam AdaDelta Adagrad RMSprop Adamax Muon"
    assert names >= set(known.split())


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_groups_of_any_optimizer_are_checked(optimizer_class):
    model = make_model()
    matrices, norms = weights_of(model)
    groups = [optimizer_class(0.01), optimizer_class(0.01)]
    optimizer = optim.MultiOptimizer(groups, [main.is_matrix])
    optimizer.init(model.trainable_parameters())
    main.assert_each_has_one_group(optimizer, model)
    for wrong in (norms[1:], norms[:-1], norms + matrices[:1], norms + matrices):
        hold(groups[1], wrong)
        with pytest.raises(AssertionError):
            main.assert_each_has_one_group(optimizer, model)
    hold(groups[1], norms)
    main.assert_each_has_one_group(optimizer, model)


def test_what_is_frozen_has_no_group():
    """As a LoRA run's base; but what is trained in its place has to have one."""
    model = make_model()
    model.model.embed_tokens.freeze()
    optimizer = main.make_optimizer(model, flags())
    main.assert_each_has_one_group(optimizer, model)
    model.unfreeze()
    with pytest.raises(AssertionError):
        main.assert_each_has_one_group(optimizer, model)


@pytest.mark.parametrize("groups", [0, 2], ids=["none", "twice"])
def test_a_parameter_without_a_group_or_with_two_is_noticed(monkeypatch, groups):
    """make_optimizer itself checks; its filters are made to leave a gap, or to overlap."""
    model = make_model()
    (embeddings, *matrices), norms = weights_of(model)
    assert embeddings[0] == "model.embed_tokens.weight"
    init = optim.MultiOptimizer.init

    def init_wrongly(optimizer, parameters):
        init(optimizer, parameters)
        if groups == 0:
            hold(optimizer.optimizers[0], matrices[1:])
        else:
            hold(optimizer.optimizers[2], [*norms, embeddings])

    monkeypatch.setattr(optim.MultiOptimizer, "init", init_wrongly)
    with pytest.raises(AssertionError):
        main.make_optimizer(model, flags())


def test_learning_rate_warms_up_and_stays():
    rates = [main.learning_rate_at(i, flags(learning_rate=0.8, lr_warmup=4)) for i in range(7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    assert main.learning_rate_at(10**6, flags(learning_rate=0.8, lr_warmup=4)) == 0.8


@pytest.mark.parametrize("lr_warmup", [0, 1])
def test_learning_rate_without_warm_up(lr_warmup):
    assert [main.learning_rate_at(i, flags(learning_rate=0.8, lr_warmup=lr_warmup)) for i in range(3)] == [0.8] * 3


def test_learning_rate_is_never_zero():
    given = flags(learning_rate=1e-4, lr_warmup=1000)
    rates = [main.learning_rate_at(i, given) for i in range(1100)]
    assert min(rates) == rates[0] == pytest.approx(1e-7)
    assert rates == sorted(rates) and max(rates) == 1e-4


@pytest.mark.parametrize("schedule, min_lr, expected", [
    ("linear", 0.0, [0.4, 0.8, 0.8, 0.6, 0.4, 0.2]),
    ("linear", None, [0.4, 0.8, 0.8, 0.62, 0.44, 0.26]),
    ("cosine", 0.0, [0.4, 0.8, 0.8, 0.4 + 0.4 * 0.5**0.5, 0.4, 0.4 - 0.4 * 0.5**0.5]),
    ("cosine", 0.2, [0.4, 0.8, 0.8, 0.5 + 0.3 * 0.5**0.5, 0.5, 0.5 - 0.3 * 0.5**0.5]),
    ("constant", 0.2, [0.4, 0.8, 0.8, 0.8, 0.8, 0.8]),
])  # fmt: skip
def test_learning_rate_schedules(schedule, min_lr, expected):
    given = flags(learning_rate=0.8, lr_warmup=2, num_iters=6, lr_schedule=schedule, min_lr=min_lr)
    assert [main.learning_rate_at(i, given) for i in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule, lr_cooldown, expected", [
    ("linear", 1.0, [0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    ("linear", 0.5, [0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.6, 0.4, 0.2]),
    ("linear", 0.3125, [0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.64, 0.32]),  # begins between two steps
    ("linear", 0.0, [0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]),
    ("cosine", 0.5, [0.4, *[0.8] * 6, 0.4 + 0.4 * 0.5**0.5, 0.4, 0.4 - 0.4 * 0.5**0.5]),
    ("constant", 0.5, [0.4, *[0.8] * 9]),
])  # fmt: skip
def test_learning_rate_falls_over_the_cooldown(schedule, lr_cooldown, expected):
    given = flags(learning_rate=0.8, lr_warmup=2, num_iters=10, lr_schedule=schedule, lr_cooldown=lr_cooldown, min_lr=0)
    assert [main.learning_rate_at(i, given) for i in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("lr_warmup, num_iters", [(0, 1), (0, 9), (5, 5), (200, 10)])
@pytest.mark.parametrize("lr_cooldown", [0.0, 0.01, 1.0])
def test_no_schedule_divides_by_zero_or_gives_a_zero_rate(schedule, lr_warmup, num_iters, lr_cooldown):
    given = flags(learning_rate=0.5, lr_warmup=lr_warmup, num_iters=num_iters, lr_schedule=schedule, lr_cooldown=lr_cooldown)
    assert all(0 < main.learning_rate_at(i, given) <= 0.5 for i in range(num_iters))


@pytest.mark.parametrize("share, closed_form", [
    (1.0, lambda place: 1),  # the plain mean
    (0.5, lambda place: place - 1),
    (0.25, lambda place: (place - 1) * (place - 2) * (place - 3)),
])  # fmt: skip
def test_average_weights_have_the_powers_of_their_places(share, closed_form):
    """The recursion against sums written out: step `place` of N, counted from 1, has a weight known in closed form."""
    steps = np.random.default_rng(0).normal(size=(20, 4, 3)).astype(np.float32)
    average = None
    for i, step in enumerate(steps):
        average = main.average_weights(average, {"layer": [mx.array(step)]}, i, share)
        if i + 1 >= 1 / share:  # before that it is the newest weights
            parts = np.array([closed_form(place) for place in range(1, i + 2)], np.float64)
            expected = np.tensordot(parts / parts.sum(), steps[: i + 1].astype(np.float64), 1)
        else:
            expected = step
        np.testing.assert_allclose(np.array(average["layer"][0]), expected, rtol=0, atol=1e-5)


def test_dropout_moves_by_a_line():
    given = flags(dropout=0.1, dropout_final=0.5, num_iters=4)
    rates, keys = zip(*(main.make_noise(i, 5, given) for i in range(4)))
    np.testing.assert_allclose(np.array(rates), np.tile([[0.1], [0.2], [0.3], [0.4]], 5), rtol=1e-6)
    assert len(np.unique(np.array(keys).reshape(20, 2), axis=0)) == 20
    np.testing.assert_array_equal(np.array(keys[2][:3]), np.array(main.make_noise(2, 3, given)[1]))
    assert (np.array(keys[2]) != np.array(main.make_noise(2, 5, flags(dropout=0.1, seed=1))[1])).any()
    assert main.make_noise(3, 1, flags(dropout=0.1, num_iters=4))[0].item() == pytest.approx(0.1)
    assert main.make_noise(1, 1, flags(dropout_final=0.4, num_iters=4))[0].item() == pytest.approx(0.1)
    assert main.make_noise(3, 1, flags()) == ()


def batch():
    tokens = np.random.default_rng(2).integers(11, size=(3, 7))
    return mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])


@pytest.fixture
def uncompiled():
    """A compiled step calls the C++ compiler for every kernel; where that is not what is tested, time is saved."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("grad_clip", [0.0, 0.25, 1e6])
def test_gradients_are_clipped_by_their_common_norm(uncompiled, grad_clip):
    model = make_model()
    tokens, targets = batch()
    total, gradients = nn.value_and_grad(model, loss_of)(model, tokens, targets)
    gradients = {name: gradient / targets.size for name, gradient in arrays(gradients).items()}  # of the mean
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    assert norm > 0.5  # or 0.25 would clip nothing
    before = arrays(model.parameters())
    step = main.make_step(model, optim.SGD(1.0), flags(grad_clip=grad_clip))  # whose update at rate 1 is the gradient itself
    loss, reported = step(tokens, targets)
    assert loss.item() == pytest.approx(total.item() / targets.size, rel=1e-5)
    assert reported.item() == pytest.approx(norm, rel=1e-5)  # before clipping
    factor = 0.25 / norm if grad_clip == 0.25 else 1.0
    for name, weight in arrays(model.parameters()).items():
        np.testing.assert_allclose(before[name] - weight, factor * gradients[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_step_is_value_gradient_and_update():
    """The compiled step does what the same pieces do one by one, and the rate set between steps reaches it."""
    given = flags(learning_rate=0.01, weight_decay=0.1, grad_clip=0.0)
    compiled, plain = make_model(num_blocks=0), make_model(num_blocks=0)  # a matrix and a norm: few kernels to compile
    optimizer, plain_optimizer = main.make_optimizer(compiled, given), main.make_optimizer(plain, given)
    step = main.make_step(compiled, optimizer, given)
    tokens, targets = batch()
    for rate in (0.01, 0.05, 0.001):
        optimizer.learning_rate = plain_optimizer.learning_rate = rate
        step(tokens, targets)
        _, gradients = nn.value_and_grad(plain, loss_of)(plain, tokens, targets, 1 / targets.size)
        plain_optimizer.update(plain, gradients)
    expected = arrays(plain.parameters())
    for name, weight in arrays(compiled.parameters()).items():
        # Where a gradient is near 0, Adam's quotient magnifies its rounding: hence far from 1e-6, yet far below a step.
        np.testing.assert_allclose(weight, expected[name], rtol=0, atol=2e-4, err_msg=name)


# The step in its variants. All tokens are drawn from a small model's vocabulary of 11; dropout is on where rates are.


def steps(count=6, noise=True, **values):
    """The losses of some training steps, and the weights after them."""
    given = flags(learning_rate=0.01, **values)
    model = make_model()
    optimizer = main.make_optimizer(model, given)
    step = main.make_step(model, optimizer, given)
    rows, losses = given.batch_size * given.grad_accumulation, []
    for i in range(count):
        tokens = np.random.default_rng([7, i]).integers(11, size=(12, 7))[:rows]
        drop = main.make_noise(i, rows, flags(dropout=0.2)) if noise else ()
        loss, norm = step(mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), *drop)
        mx.eval(loss, norm, model.state, optimizer.state)
        losses.append([loss.item(), norm.item()])
    return np.array(losses), arrays(model.parameters())


def test_accumulation_is_the_big_batch():
    expected, weights = steps(batch_size=12)
    for batch_size, grad_accumulation in ((4, 3), (6, 2), (2, 6)):
        losses, reached = steps(batch_size=batch_size, grad_accumulation=grad_accumulation)
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
        for name in weights:
            np.testing.assert_allclose(reached[name], weights[name], rtol=0, atol=2e-3, err_msg=name)
    assert abs(steps(batch_size=4)[0] - expected).max() > 0.01  # or the comparison would prove nothing


def test_gradient_checkpointing_changes_memory_alone(set_streams):
    expected, weights = steps(batch_size=12)
    losses, reached = steps(batch_size=12, checkpoint=True)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    peaks = []
    set_streams(1)
    for checkpoint in (False, True):
        given = flags(batch_size=64, checkpoint=checkpoint)
        model = main.LanguageModel(main.Config(11, 64, 8, 32, 2, 2, "swiglu", 128))
        tokens = mx.array(np.random.default_rng(0).integers(11, size=(64, 64)))
        step = main.make_step(model, main.make_optimizer(model, given), given)
        peaks.append([])
        for _ in range(6):  # other programs' load moves a single peak
            mx.reset_peak_memory()
            before = mx.get_active_memory()  # of other tests, too
            mx.eval(step(tokens, tokens), model.state)
            peaks[-1].append(mx.get_peak_memory() - before)
    assert sorted(peaks[1])[3] < 0.6 * sorted(peaks[0])[3]


def test_twenty_steps_stay_with_the_plain_ones():
    """As MLX's documentation would write the step: its own loss, attention, AdamW and clipping, one stream, eager."""
    given = flags(learning_rate=0.01, batch_size=12, mlp="relu2")
    model = make_model()
    plain = optim.AdamW(0.01, betas=[0.9, 0.99], weight_decay=1e-5, bias_correction=True)

    def loss(model, tokens, targets):
        caches = [main.Cache(model.config, 12) for _ in model.model.layers]  # with which attention is MLX's own
        return nn.losses.cross_entropy(model(tokens, caches), targets, reduction="mean")

    losses = []
    for i in range(20):
        tokens = mx.array(np.random.default_rng([7, i]).integers(11, size=(12, 7)))
        value, gradients = nn.value_and_grad(model, loss)(model, tokens[:, :-1], tokens[:, 1:])
        gradients, norm = optim.clip_grad_norm(gradients, given.grad_clip)
        plain.update(model, gradients)
        losses.append([value.item(), norm.item()])
    np.testing.assert_allclose(steps(20, noise=False, batch_size=12)[0][:, 0], np.array(losses)[:, 0], rtol=0, atol=1e-4)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A function after which the program believes in a GPU; the CPU computes what that is given to do."""
    stream = mx.default_stream(mx.cpu)

    def pretend():
        monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
        monkeypatch.setattr(mx, "default_stream", lambda device: stream)

    return pretend


def test_bfloat16_computes_in_it_and_keeps_float32(monkeypatch, pretended_gpu):
    """What a GPU is given to do: the losses are near, no weight or moment is rounded."""
    expected, _ = steps(noise=False, batch_size=12)
    seen = []
    call = main.Transformer.__call__

    def spying(model, *arguments, **options):
        seen.extend((name, weight.dtype) for name, weight in tree_flatten(model.parameters()))
        return call(model, *arguments, **options)

    monkeypatch.setattr(main.Transformer, "__call__", spying)
    pretended_gpu()
    losses, weights = steps(noise=False, batch_size=12, dtype="bfloat16")
    assert {dtype for name, dtype in seen if "embed" not in name} == {mx.bfloat16}
    assert {dtype for name, dtype in seen if "embed" in name} == {mx.float32}
    assert 1e-5 < abs(losses[:, 0] - expected[:, 0]).max() < 0.1
    rounded = [np.array(mx.array(w.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32)) == w for w in weights.values()]
    assert np.mean(np.concatenate([part.ravel() for part in rounded])) < 0.1


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
    step = main.make_step(model, optim.SGD(1.0), flags(batch_size=12, dtype="bfloat16"))
    tokens = mx.zeros((12, 6), mx.int32)
    mx.eval(step(tokens, tokens), model.state)
    assert seen == {mx.bfloat16}
    weights = dict(tree_flatten(model.parameters()))
    assert {weight.dtype for weight in weights.values()} == {mx.float32}
    for name, weight in base.items():
        adapted = name.replace(".weight", ".linear.weight")
        kept = weights[adapted if adapted in weights else name]
        np.testing.assert_array_equal(np.array(kept), weight)


def test_a_frequent_token_keeps_its_gradient_in_bfloat16(set_streams, pretended_gpu):
    """Thousands of small terms go into the sums of its embedding and of its row of the output layer."""
    tokens = mx.array(np.where(np.random.default_rng(0).random((64, 65)) < 0.5, 3, np.random.default_rng(1).integers(11, size=(64, 65))))
    gradients = []
    set_streams(1)
    for dtype in ("float32", "bfloat16"):
        if dtype == "bfloat16":
            pretended_gpu()
        model, before = make_model(), arrays(make_model().parameters())
        step = main.make_step(model, optim.SGD(1.0), flags(batch_size=64, dtype=dtype, grad_clip=0.0))
        mx.eval(step(tokens[:, :-1], tokens[:, 1:]), model.state)
        name = "model.embed_tokens.weight"
        gradients.append(before[name] - arrays(model.parameters())[name])
    for row in range(11):
        error = np.linalg.norm(gradients[1][row] - gradients[0][row]) / np.linalg.norm(gradients[0][row])
        assert error < 0.1, row
