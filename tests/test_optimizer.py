"""AdamW against NumPy, its groups, the learning rate's schedule, and gradient clipping in the training step."""

import main
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import flags
from mlx.utils import tree_flatten, tree_unflatten

STREAMS = [mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)]


def make_model(num_blocks=2):
    shape = dict(vocab_size=11, context_size=6, dim=8, num_heads=2, num_kv_heads=1, mlp_dim=12)
    model = main.LanguageModel(main.Config(**shape, num_blocks=num_blocks, mlp="swiglu"))
    random = np.random.default_rng(0)
    set_weights(model, {n: random.normal(0.5, 0.3, w.shape) for n, w in tree_flatten(model.parameters())})
    return model


def set_weights(model, weights):
    model.update(tree_unflatten([(name, mx.array(weight.astype(np.float32))) for name, weight in weights.items()]))


def arrays(tree):
    return {name: np.array(weight, np.float64) for name, weight in tree_flatten(tree)}


def test_two_steps_equal_adamw_in_numpy():
    model = make_model()
    optimizer = main.make_optimizer(model, flags(learning_rate=0.01, weight_decay=0.1))
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
            decay = 0.1 if weights[name].ndim == 2 else 0.0
            weights[name] = weights[name] * (1 - rate * decay) - rate * mean / (np.sqrt(square) + 1e-8)
        for name, weight in arrays(model.parameters()).items():
            np.testing.assert_allclose(weight, weights[name], rtol=0, atol=1e-6, err_msg=name)


def test_each_parameter_is_in_exactly_one_group():
    model = make_model()
    optimizer = main.make_optimizer(model, flags(weight_decay=0.1))
    decayed, plain = (
        [name[:-2] for name, _ in tree_flatten(group.state) if name.endswith(".v")] for group in optimizer.optimizers
    )
    names = [name for name, _ in tree_flatten(model.parameters())]
    assert sorted(decayed + plain) == sorted(names)
    assert sorted(plain) == sorted(name for name in names if "norm" in name)
    assert [group.weight_decay for group in optimizer.optimizers] == [0.1, 0.0]


@pytest.mark.parametrize("change", [lambda names: names[1:], lambda names: names + names[:1]], ids=["none", "twice"])
def test_a_parameter_without_a_group_or_with_two_is_noticed(monkeypatch, change):
    flatten = main.tree_flatten

    def groups_changed(tree, *options):  # stands for an optimizer whose filters leave a gap or overlap
        leaves = flatten(tree, *options)
        moments = [leaf for leaf in leaves if leaf[0].endswith("embed_tokens.weight.v")]
        rest = [leaf for leaf in leaves if not leaf[0].endswith("embed_tokens.weight.v")]
        return rest + (change(moments) if moments else [])

    monkeypatch.setattr(main, "tree_flatten", groups_changed)
    with pytest.raises(AssertionError):
        main.make_optimizer(make_model(), flags())


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
    total, gradients = nn.value_and_grad(model, main.loss_sum)(model, tokens, targets)
    gradients = {name: gradient / targets.size for name, gradient in arrays(gradients).items()}  # of the mean
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    assert norm > 0.5  # or 0.25 would clip nothing
    before = arrays(model.parameters())
    step = main.make_step(model, optim.SGD(1.0), flags(grad_clip=grad_clip), STREAMS)  # whose update at rate 1 is the gradient itself
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
    step = main.make_step(compiled, optimizer, given, STREAMS)
    tokens, targets = batch()
    for rate in (0.01, 0.05, 0.001):
        optimizer.learning_rate = plain_optimizer.learning_rate = rate
        step(tokens, targets)
        _, gradients = nn.value_and_grad(plain, main.loss_sum)(plain, tokens, targets, (), 1 / targets.size)
        plain_optimizer.update(plain, gradients)
    expected = arrays(plain.parameters())
    for name, weight in arrays(compiled.parameters()).items():
        # Where a gradient is near 0, Adam's quotient magnifies its rounding: hence far from 1e-6, yet far below a step.
        np.testing.assert_allclose(weight, expected[name], rtol=0, atol=2e-4, err_msg=name)
