"""Distillation: its loss by automatic differentiation, its steps, and their resume."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, begin, newest, run, saved
from datasets import load_dataset
from test_fast import assert_near, normal
from test_optimizer import SCHEDULE, assert_written_out

import main
from extras.features.distil import distilled_loss_and_gradients


def log_softmax(logits):
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def distilled_losses(logits, their_logits, targets, share, temperature):
    """The loss of each position [...] by the formula at the top of extras/features/distil.py.

    logits: [..., V]; their_logits: [..., V'], of which the first V count.
    """
    wanted = log_softmax(their_logits[..., : logits.shape[-1]] / temperature)
    given = log_softmax(logits / temperature)[..., : their_logits.shape[-1]]
    divergence = (mx.exp(wanted) * (wanted - given)).sum(-1)
    nats = -mx.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return (1 - share) * nats + share * temperature**2 * divergence


@pytest.mark.parametrize("rows, ours, theirs", [
    (6, 31, 34),  # in one chunk
    (6, 40, 31),
    (220, 40000, 39990),  # in several
])  # fmt: skip
def test_gradients_of_distillation(rows, ours, theirs):
    """The teacher gives no probability to a student's padding, and its own is ignored."""
    random = np.random.default_rng(0)
    hidden = normal(0, rows, 8)
    head = normal(1, ours, 8)
    states = normal(2, rows, 5)
    their_head = normal(3, theirs, 5)
    targets = mx.array(random.integers(min(ours, theirs), size=rows))
    scale = mx.array(0.7)

    def plain(hidden, head):
        losses = distilled_losses(hidden @ head.T, states @ their_head.T, targets, 0.3, 1.7)
        return (scale * losses).sum()

    def distilled(hidden, head):
        teachers = states, their_head, mx.array(0.3), mx.array(1.7)
        return distilled_loss_and_gradients(hidden, head, targets, scale, *teachers)[0]

    expected, gradients = mx.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    loss, found = mx.value_and_grad(distilled, argnums=(0, 1))(hidden, head)
    assert abs(loss.item() / expected.item() - 1) < 1e-3  # sums of 40,000 in float32
    assert_near(found, gradients, 2e-4)
    if ours > theirs:  # of the student's padding it is small: that of its own probability alone
        assert_near(found[1][theirs:], gradients[1][theirs:], 2e-3)


def test_steps_are_those_written_out(base, text, tmp_path):
    folder, id = base
    teacher = main.read_contents(newest(folder)).load_model()
    options = "--dim 32 --teacher_weight 0.3 --teacher_temperature 1.7".split()
    run("--text", text, *TINY, *SCHEDULE, *options, "--teacher", id, "--save_dir", folder)
    tokens = load_dataset("text", tmp_path, [text]).train.tokens

    def loss_of(inputs, logits, targets):
        return distilled_losses(logits, teacher(inputs), targets, 0.3, 1.7).mean()

    assert_written_out(newest(folder), tokens, loss_of)


def test_an_interrupted_student_ends_as_one_that_was_not(base, text, tmp_path):
    """Though its teacher's own folder is gone by then."""
    folder, id = base
    whole = shutil.copytree(folder, tmp_path / "whole")
    line = ["--text", text, *TINY, "--teacher", id, "--lr_warmup=0"]
    run(*line, "--num_iters=12", "--save_dir", whole)
    name, _, _ = begin(*line, "--num_iters=5", "--save_dir", folder)
    shutil.rmtree(saved(folder)[-1].folder)
    assert begin("--num_iters=12", "--save_dir", folder)[:2] == (name, 5)
    assert newest(folder).id == newest(whole).id
