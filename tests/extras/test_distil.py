"""Distillation: its loss by hand and by automatic differentiation, and students of a teacher."""

import shutil

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, begin, flags, newest, run
from test_huggingface import logits_of

from extras.distil import distilled_loss_and_gradients, make_loss


def normal(random, *shape):
    return mx.array(random.normal(size=shape).astype(np.float32))


def log_softmax(logits):
    logits = np.array(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence_of_two(wanted, given):
    """Of two probabilities of the first of two tokens."""
    first = wanted * np.log(wanted / given)
    second = (1 - wanted) * np.log((1 - wanted) / (1 - given))
    return first + second


@pytest.mark.parametrize("weight, temperature, expected", [
    # Two positions, whose answer has a quarter of the student's probability.
    (0.0, 2.0, 2 * -np.log(0.25)),
    (1.0, 1.0, 2 * divergence_of_two(0.8, 0.75)),
    # The square roots of 4:1 and 3:1 as odds, times 4.
    (1.0, 2.0, 2 * 4 * divergence_of_two(2 / 3, 0.6339746)),
    (0.25, 1.0, 2 * (0.75 * -np.log(0.25) + 0.25 * divergence_of_two(0.8, 0.75))),
])  # fmt: skip
def test_distillation_by_hand(weight, temperature, expected):
    """Hidden states are 1, the student's logits log 3 and 0, the teacher's log 4 + 1 and 1.

    The teacher has one more, of a padded vocabulary.
    """
    student = mx.array([[np.log(3.0)], [0.0]])
    teacher = mx.array([[np.log(4.0) + 1], [1.0], [99.0]])
    states = mx.ones((2, 1))
    targets = mx.array([1, 1])
    teachers = (states, teacher, mx.array(weight), mx.array(temperature))
    loss, *_ = distilled_loss_and_gradients(states, student, targets, mx.ones(2), *teachers)
    assert abs(loss.item() - expected) < 1e-5


def assert_like_the_formula(rows, ours, theirs):
    """Loss and gradients are the plain formula's, by automatic differentiation.

    The vocabularies have `ours` and `theirs` ids, and what both have counts for the teacher.
    Returns the two gradients of the head, as computed and by the formula.
    """
    shared = min(ours, theirs)
    random = np.random.default_rng(0)
    hidden = normal(random, rows, 8)
    head = normal(random, ours, 8)
    states = normal(random, rows, 5)
    their_head = normal(random, theirs, 5)
    targets = mx.array(random.integers(shared, size=rows))
    weights = mx.array(random.random(rows).astype(np.float32))

    def plain(hidden, head, share=0.3, T=1.7):
        their_logits = (states @ their_head.T)[:, :shared]
        log_p = mx.log(mx.softmax(their_logits / T, axis=-1))
        logits = hidden @ head.T
        log_q = logits / T - mx.logsumexp(logits / T, axis=-1, keepdims=True)
        differences = log_p - log_q[:, :shared]
        divergence = (mx.exp(log_p) * differences).sum(-1)
        answers = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        nats = mx.logsumexp(logits, axis=-1) - answers
        losses = (1 - share) * nats + share * T * T * divergence
        return (weights * losses).sum()

    def distilled(hidden, head):
        teachers = states, their_head, mx.array(0.3), mx.array(1.7)
        return distilled_loss_and_gradients(hidden, head, targets, weights, *teachers)[0]

    expected, gradients = mx.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    loss, found = mx.value_and_grad(distilled, argnums=(0, 1))(hidden, head)
    assert abs(loss.item() / expected.item() - 1) < 1e-3  # sums of 40,000 in float32
    for mine, wanted in zip(found, gradients):
        tolerance = 2e-4 * np.abs(np.array(wanted)).max()
        np.testing.assert_allclose(np.array(mine), np.array(wanted), rtol=0, atol=tolerance)
    return np.array(found[1]), np.array(gradients[1])


@pytest.mark.parametrize("rows, ours, theirs", [
    (6, 31, 34),  # in one chunk
    (6, 40, 31),
    (220, 40000, 39990),  # in several
])  # fmt: skip
def test_gradients_of_distillation(rows, ours, theirs):
    """The teacher gives no probability to a student's padding, and its own is ignored."""
    found, expected = assert_like_the_formula(rows, ours, theirs)
    padding = found[theirs:]
    if len(padding):
        # There the gradient is that of the student's own probability.
        expected = expected[theirs:]
        tolerance = 2e-3 * np.abs(expected).max()
        np.testing.assert_allclose(padding, expected, rtol=0, atol=tolerance)


def test_a_student_ends_nearer_to_its_teacher(base, text):
    """It goes on without the model that it learns from, and so does its branch."""
    folder, id = base
    distances = []
    teacher = newest(folder).open().load_model()
    folder_of_teacher = newest(folder).folder
    line = [*TINY, "--text", text, "--teacher", id, "--learning_rate", 0.01, "--lr_warmup", 5]
    line += ["--save_dir", folder]
    for weight in (0.0, 1.0):
        out, _ = run(*line, "--teacher_weight", weight, "--num_iters", 40)
        assert "40/40  loss " in out
        assert "perplexity" not in out, "of a loss that is not the text's alone"
        contents = newest(folder).open()
        student = contents.load_model()
        tokens = contents.tokenizer.encode(text.read_text()[:400]).tolist()
        wanted = log_softmax(logits_of(teacher, tokens))
        found = log_softmax(logits_of(student, tokens))
        distances.append((np.exp(wanted) * (wanted - found)).sum(-1).mean())
    assert distances[1] < 0.8 * distances[0]

    shutil.rmtree(folder_of_teacher)
    name = newest(folder).run
    assert begin(*line, "--teacher_weight", 1, "--num_iters", 41)[:2] == (name, 40)
    line = ["--identifier", name, "--teacher_weight", 0.9, "--save_dir", folder, "--num_iters"]
    branch, iteration, _ = begin(*line, 42)
    assert (branch != name, iteration) == (True, 41)
    shutil.rmtree(folder / name)
    assert begin("--save_dir", folder, "--num_iters", 43)[:2] == (branch, 42)


def mixed_loss(student, teacher, tokens, targets, weight=0.5, temperature=2.0):
    """The mean loss of a batch [B, L], by the formula at the top of extras/distil.py."""
    logits = np.array(student(tokens))
    nats = -np.take_along_axis(log_softmax(logits), np.array(targets)[..., None], -1)[..., 0]
    log_wanted = log_softmax(np.array(teacher(tokens)) / temperature)
    divergence = (np.exp(log_wanted) * (log_wanted - log_softmax(logits / temperature))).sum(-1)
    return ((1 - weight) * nats + weight * temperature**2 * divergence).mean()


def test_the_loss_of_a_step(weight=0.3, temperature=1.7):
    """What the step calls, against NumPy: a mean over texts [B, L], a teacher of another width."""
    shape = dict(
        vocab_size=11,
        context_size=6,
        num_blocks=1,
        num_heads=2,
        num_kv_heads=2,
        mlp="relu2",
        mlp_dim=12,
    )
    teacher = main.LanguageModel(main.Config(dim=12, untie=True, **shape))
    random = np.random.default_rng(0)
    tokens, targets = random.integers(11, size=(2, 3, 6))
    hidden = random.normal(size=(3, 6, 8)).astype(np.float32)
    head = random.normal(size=(11, 8)).astype(np.float32)
    loss = make_loss(teacher, flags(teacher_weight=weight, teacher_temperature=temperature))
    found = loss(mx.array(hidden), mx.array(head), mx.array(targets), 1 / 18, mx.array(tokens))

    def student(tokens):
        return hidden @ head.T

    expected = mixed_loss(student, teacher, mx.array(tokens), targets, weight, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-4)
