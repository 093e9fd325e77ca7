"""Distillation: its loss by hand and by automatic differentiation, and students of a teacher."""

import shutil

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, flags, ids, run
from datasets import ByteTokenizer
from test_huggingface import make_model

from extras.distil import distilled_loss_and_gradients, make_loss
from extras.huggingface import export_model


def logits_of(model, tokens):
    return np.array(model(mx.array([list(tokens)]))[0])


@pytest.mark.parametrize("weight, temperature, expected", [
    # Two positions, whose answer has a quarter of the student's probability.
    (0.0, 2.0, 2 * -np.log(0.25)),
    (1.0, 1.0, 2 * (0.8 * np.log(0.8 / 0.75) + 0.2 * np.log(0.2 / 0.25))),
    # The square roots of 4:1 and 3:1 as odds, times 4.
    (1.0, 2.0, 2 * 4 * (2 / 3 * np.log(2 / 3 / 0.6339746) + 1 / 3 * np.log(1 / 3 / 0.3660254))),
    (0.25, 1.0, 2 * -0.75 * np.log(0.25)
        + 0.25 * 2 * (0.8 * np.log(0.8 / 0.75) + 0.2 * np.log(0.2 / 0.25))),
])  # fmt: skip
def test_distillation_by_hand(weight, temperature, expected):
    """Hidden states are 1, the student's logits log 3 and 0, the teacher's log 4 + 1 and 1.

    The teacher has one more, of a padded vocabulary.
    """
    student, teacher = (
        mx.array([[np.log(3.0)], [0.0]]),
        mx.array([[np.log(4.0) + 1], [1.0], [99.0]]),
    )
    states, share, T = mx.ones((2, 1)), mx.array(weight), mx.array(temperature)
    loss, *_ = distilled_loss_and_gradients(
        states, student, mx.array([1, 1]), mx.ones(2), states, teacher, share, T
    )
    assert abs(loss.item() - expected) < 1e-5


@pytest.mark.parametrize("rows, vocab_size", [(6, 31), (300, 40000)])
def test_gradients_of_distillation(rows, vocab_size):
    """Those of the plain formula by automatic differentiation, in one chunk and in several."""
    random = np.random.default_rng(0)
    hidden, head, states, their_head = (
        mx.array(random.normal(size=shape).astype(np.float32))
        for shape in ((rows, 8), (vocab_size, 8), (rows, 5), (vocab_size + 3, 5))
    )
    targets, weights = (
        mx.array(random.integers(vocab_size, size=rows)),
        mx.array(random.random(rows).astype(np.float32)),
    )

    def plain(hidden, head, share=0.3, T=1.7):
        log_p = mx.log(mx.softmax((states @ their_head.T)[:, :vocab_size] / T, axis=-1))
        logits = hidden @ head.T
        log_q = logits / T - mx.logsumexp(logits / T, axis=-1, keepdims=True)
        divergence = (mx.exp(log_p) * (log_p - log_q)).sum(-1)
        nats = (
            mx.logsumexp(logits, axis=-1)
            - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        )
        return (weights * ((1 - share) * nats + share * T * T * divergence)).sum()

    def ours(hidden, head):
        teachers = states, their_head, mx.array(0.3), mx.array(1.7)
        return distilled_loss_and_gradients(hidden, head, targets, weights, *teachers)[0]

    expected, gradients = mx.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    loss, mine = mx.value_and_grad(ours, argnums=(0, 1))(hidden, head)
    assert abs(loss.item() / expected.item() - 1) < 1e-3  # sums of 40,000 in float32
    for a, b in zip(mine, gradients):
        np.testing.assert_allclose(
            np.array(a), np.array(b), rtol=0, atol=2e-4 * np.abs(np.array(b)).max()
        )


@pytest.mark.parametrize("rows, theirs, ours", [(6, 31, 40), (300, 39990, 40000)])
def test_a_student_with_a_padded_vocabulary(rows, theirs, ours):
    """The teacher gives the padding no probability: the plain formula by automatic differentiation."""
    random = np.random.default_rng(0)
    shapes = (rows, 8), (ours, 8), (rows, 5), (theirs, 5)
    arrays = [mx.array(random.normal(size=shape).astype(np.float32)) for shape in shapes]
    hidden, head, states, their_head = arrays
    targets = mx.array(random.integers(theirs, size=rows))
    weights = mx.array(random.random(rows).astype(np.float32))

    def plain(hidden, head, share=0.3, T=1.7):
        log_p = mx.log(mx.softmax(states @ their_head.T / T, axis=-1))
        logits = hidden @ head.T
        log_q = logits / T - mx.logsumexp(logits / T, axis=-1, keepdims=True)
        divergence = (mx.exp(log_p) * (log_p - log_q[:, :theirs])).sum(-1)
        nats = -mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        nats = nats + mx.logsumexp(logits, axis=-1)
        return (weights * ((1 - share) * nats + share * T * T * divergence)).sum()

    def distilled(hidden, head):
        teachers = states, their_head, mx.array(0.3), mx.array(1.7)
        return distilled_loss_and_gradients(hidden, head, targets, weights, *teachers)[0]

    expected, gradients = mx.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    loss, mine = mx.value_and_grad(distilled, argnums=(0, 1))(hidden, head)
    assert abs(loss.item() / expected.item() - 1) < 1e-3  # sums of 40,000 in float32
    for a, b in zip(mine, gradients):
        largest = np.abs(np.array(b)).max()
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=0, atol=2e-4 * largest)
    # The padding alone: there the gradient is that of the student's own probability.
    a, b = np.array(mine[1])[theirs:], np.array(gradients[1])[theirs:]
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * np.abs(b).max())


def test_a_padded_student_of_a_teacher_with_the_same_tokenizer(tmp_path, text):
    """The student begins with a Hugging Face folder of 320 rows; the tokenizer has 257 ids."""
    for name, vocab_size in (("student", 320), ("teacher", 257)):
        model = make_model(vocab_size, seed=vocab_size)
        export_model(model, ByteTokenizer(), tmp_path / name, None)
    line = ["--init_from", tmp_path / "student", "--teacher", tmp_path / "teacher"]
    line += ["--text", text, "--batch_size", 4, "--num_iters", 2, "--max_tokens", 2]
    run(*line, "--save_dir", tmp_path / "lm")
    [record] = main.list_checkpoints(tmp_path / "lm")
    assert record["iteration"] == 2 and record["config"]["vocab_size"] == 320


def test_a_student_ends_nearer_to_its_teacher(base, text):
    folder, id = base
    distances, tokens = [], None
    teacher = main.load_model(folder, main.list_checkpoints(folder)[0])[0]
    for weight in (0.0, 1.0):
        line = [
            *TINY,
            "--text",
            text,
            "--teacher",
            id,
            "--teacher_weight",
            weight,
            "--learning_rate",
            0.01,
        ]
        out, _ = run(*line, "--lr_warmup", 5, "--num_iters", 40, "--new_model", "--save_dir", folder)
        assert "40/40  loss " in out and "perplexity" not in out, "of a loss that is not the text's alone"
        record = main.list_checkpoints(folder)[0]
        assert record["uses"] == {"teacher": [id, id]}
        student, tokenizer = main.load_model(folder, record)
        tokens = tokenizer.encode(text.read_text()[:400]).tolist()
        wanted, given = (
            x - np.log(np.exp(x).sum(-1, keepdims=True))
            for x in (logits_of(teacher, tokens), logits_of(student, tokens))
        )
        distances.append((np.exp(wanted) * (wanted - given)).sum(-1).mean())
    assert distances[1] < 0.8 * distances[0]


def test_a_student_with_an_average_ends_the_same_in_two_legs(base, text, tmp_path):
    folder, id = base
    line = [*TINY, "--text", text, "--teacher", id, "--average", 0.3, "--dropout", 0.1]
    for name, legs in (("whole", [8]), ("legs", [3, 8])):
        shutil.copytree(folder, tmp_path / name)
        for steps, fresh in zip(legs, (["--new_model"], [])):
            run(*line, *fresh, "--num_iters", steps, "--save_dir", tmp_path / name)
    newest = main.list_checkpoints(tmp_path / "whole")[0]
    assert newest["iteration"] == 8 and newest["uses"] == {"teacher": [id, id]}
    assert ids(tmp_path / "legs")[0] == newest["id"]


def test_a_teacher_of_other_tokens(base, text):
    folder, id = base
    run("--text", text, *TINY, "--tokenizer", "word", "--num_iters", 1, "--save_dir", folder)
    other = ids(folder)[0]
    err = run(
        "--text",
        text,
        "--init_from",
        id,
        "--teacher",
        other,
        "--new_model",
        "--save_dir",
        folder,
        status=2,
    )[1]
    assert f"--teacher {other} has a different tokenizer" in err.splitlines()[-1]


@pytest.mark.parametrize("weight, temperature", [(0.0, 2.0), (0.3, 1.0), (1.0, 1.7)])
def test_the_loss_of_a_step(weight, temperature):
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
    given = loss(mx.array(hidden), mx.array(head), mx.array(targets), 1 / 18, mx.array(tokens))

    def log_softmax(logits):
        logits = np.array(logits, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    logits = hidden @ head.T
    nats = -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    log_wanted = log_softmax(np.array(teacher(mx.array(tokens))) / temperature)
    divergence = (np.exp(log_wanted) * (log_wanted - log_softmax(logits / temperature))).sum(-1)
    expected = (1 - weight) * nats + weight * temperature**2 * divergence
    assert given.item() == pytest.approx(expected.mean(), rel=1e-4)
