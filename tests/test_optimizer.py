"""Updates written out in NumPy, the learning rate's schedules, averages of weights."""

from argparse import Namespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY, arrays, flags, log_rows, newest, on_gpu, rows_of, run
from datasets import load_dataset
from mlx.utils import tree_unflatten

import main


# ---- Steps --------------------------------------------------------------------------------------


class AdamW:
    """AdamW of one parameter, as Loshchilov and Hutter give it."""

    def __init__(self, flags, decay):
        self.flags = flags
        self.decay = decay
        self.steps = 0
        self.mean = 0.0
        self.square = 0.0

    def step(self, weight, gradient, rate):
        beta1, beta2 = self.flags.beta1, self.flags.beta2
        self.steps += 1
        self.mean = beta1 * self.mean + (1 - beta1) * gradient
        self.square = beta2 * self.square + (1 - beta2) * gradient**2
        mean = self.mean / (1 - beta1**self.steps)
        square = self.square / (1 - beta2**self.steps)
        weight = weight * (1 - rate * self.decay)
        return weight - rate * mean / (np.sqrt(square) + 1e-8)


class Muon:
    """Muon of one matrix, at 5 times AdamW's rate; decay is that of AdamW."""

    def __init__(self, flags, decay):
        self.decay = decay
        self.velocity = 0.0

    def step(self, weight, gradient, rate):
        self.velocity = 0.9 * self.velocity + 0.1 * gradient
        update = orthogonal(0.1 * gradient + 0.9 * self.velocity)  # Nesterov
        rows, columns = update.shape
        update *= max(1, rows / columns) ** 0.5
        return weight * (1 - rate * self.decay) - 5 * rate * update


def orthogonal(matrix):
    """Five of Muon's Newton-Schulz steps, as its authors give them."""
    rows, columns = matrix.shape
    if rows > columns:
        return orthogonal(matrix.T).T
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(5):
        square = x @ x.T
        factor = -4.7750 * square + 2.0315 * square @ square
        x = 3.4445 * x + factor @ x
    return x


def make_optimizers(names, flags):
    """What moves each parameter, by its name."""
    outer_decay = flags.weight_decay if flags.embedding_decay is None else flags.embedding_decay
    optimizers = {}
    for name in names:
        if "norm" in name:
            optimizers[name] = AdamW(flags, 0.0)
        elif "embed" in name or "lm_head" in name:
            optimizers[name] = AdamW(flags, outer_decay)
        else:
            kind = Muon if flags.optimizer == "muon" else AdamW
            optimizers[name] = kind(flags, flags.weight_decay)
    return optimizers


def cross_entropy(inputs, logits, targets):
    return nn.losses.cross_entropy(logits, targets, reduction="mean")


def train_by_hand(checkpoint, tokens, loss_of):
    """The losses and gradient norms [steps, 2] of a checkpoint's run, and its last weights.

    As MLX's documentation would write the step: one stream, eager. loss_of: of inputs and targets
    [B, L] and logits [B, L, V].
    """
    flags = Namespace(**checkpoint.flags)
    model = main.LanguageModel(main.Config(**checkpoint.config))
    main.init_weights(model, flags.seed)
    rows = flags.batch_size * flags.grad_accumulation
    batches = main.Batches(tokens, flags.context_size, rows, flags.seed)

    def loss(inputs, targets, dropout_masks):
        caches = [main.KVCache() for _ in model.model.layers]  # with which attention is MLX's own
        logits = model(inputs, caches=caches, dropout_masks=dropout_masks)
        return loss_of(inputs, logits, targets)

    value_and_grad = nn.value_and_grad(model, loss)
    weights = arrays(model)
    optimizers = make_optimizers(weights, flags)
    metrics = []
    for i in range(flags.num_iters):
        inputs, targets = batches.next()
        rate, row_keys = main.draw_dropout(i, rows, flags)
        dropout_masks = main.DropoutMasks(rate, row_keys, flags.context_size, flags.dim)
        value, gradients = value_and_grad(inputs, targets, dropout_masks)
        gradients = arrays(gradients)
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        metrics.append([value.item(), norm])
        clipped = min(1, flags.grad_clip / norm) if flags.grad_clip else 1
        rate = main.learning_rate_at(i, flags)
        named = []
        for name, gradient in gradients.items():
            weights[name] = optimizers[name].step(weights[name], clipped * gradient, rate)
            named.append((name, mx.array(weights[name].astype(np.float32))))
        model.update(tree_unflatten(named))
    return np.array(metrics), weights


STEPS = {
    "AdamW": "--batch_size 8 --untie --weight_decay 2 --embedding_decay 7 --grad_clip 0.5 "
    "--beta1 0.8 --beta2 0.9 --dropout 0.1 --dropout_final 0.4",
    "Muon": "--batch_size 8 --optimizer muon --mlp swiglu --num_kv_heads 1 --qk_norm "
    "--weight_decay 2 --grad_clip 0 --lr_schedule linear --lr_cooldown 0.5 --min_lr 0",
    "accumulation": "--batch_size 4 --grad_accumulation 3 --mlp gelu --dropout 0.2",
    # Of three and two rows.
    "several streams": "--batch_size 5 --context_size 128 --grad_checkpoint --dropout 0.1 "
    "--grad_clip 0.5",
}


SCHEDULE = (
    "--num_iters 12 --learning_rate 0.01 --lr_warmup 3 --steps_per_report 1 --sample_tokens 0"
).split()


def assert_written_out(checkpoint, tokens, loss_of=cross_entropy):
    """The log and the weights of a run with this SCHEDULE are those of train_by_hand."""
    rows = rows_of(checkpoint.folder / "log.csv", "train")
    metrics = [[row["loss"], row["gradient_norm"]] for row in rows]
    expected, weights = train_by_hand(checkpoint, tokens, loss_of)
    np.testing.assert_allclose(metrics, expected, rtol=2e-4)
    reached = arrays(main.read_contents(checkpoint).load_model())
    for name, weight in weights.items():
        # Where a gradient is as good as 0, rounding decides its sign, and so AdamW's step.
        error = np.linalg.norm(reached[name] - weight) / np.linalg.norm(weight)
        assert error < 0.005, name


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_written_out(name, text, tmp_path):
    """Value, gradient, clipping, decay and update, each parameter in its group; 12 times."""
    run("--text", text, *TINY, *SCHEDULE, *STEPS[name].split(), "--save_dir", tmp_path / "lm")
    tokens = load_dataset("text", tmp_path, [text]).train.tokens
    assert_written_out(newest(tmp_path / "lm"), tokens)


def test_gradient_checkpointing_saves_memory(text, tmp_path):
    shape = "--num_blocks 8 --context_size 64 --batch_size 32 --mlp_dim 128".split()
    line = ["--text", text, *TINY, *shape, "--num_iters", 2, "--steps_per_report", 1]
    peaks = []
    for name in ("--no-grad_checkpoint", "--grad_checkpoint"):
        run(*line, name, "--save_dir", tmp_path / name)
        peaks.append(log_rows(tmp_path / name, "train")[-1]["peak_mib"])
    assert peaks[1] < 0.6 * peaks[0]


# ---- bfloat16, as a GPU computes it -------------------------------------------------------------


def test_bfloat16_computes_in_it_and_keeps_float32(text, tmp_path):
    """No weight is rounded, nor is the sum of the gradients of a frequent token."""
    text.write_text("a" * 6000 + text.read_text()[:6000])
    options = "--batch_size 128 --grad_clip 0 --steps_per_report 1 --sample_tokens 0 --num_iters 1"
    line = ["--text", text, *TINY, *options.split()]
    losses = []
    gradients = []
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        on_gpu(*line, "--dtype", dtype, "--save_dir", folder)
        losses += [row["loss"] for row in log_rows(folder, "train")]
        contents = main.read_contents(newest(folder))
        for name, array in contents.state.items():
            if name.endswith("embed_tokens.weight.m"):  # AdamW's mean: a tenth of it at first
                gradients.append(np.array(array)[ord("a")])
    assert 0 < abs(losses[0] - losses[1]) < 0.02
    expected, gradient = gradients
    assert np.linalg.norm(gradient - expected) < 0.02 * np.linalg.norm(expected)
    embeddings = contents.weights["model.embed_tokens.weight"]
    rounded = embeddings.astype(mx.bfloat16).astype(mx.float32)
    assert np.mean(np.array(rounded == embeddings)) < 0.1


# ---- Schedules ----------------------------------------------------------------------------------

DOWN = [0.4 + 0.4 * 0.5**0.5, 0.4, 0.4 - 0.4 * 0.5**0.5]  # a cosine's
RATES = [  # schedule, flags, and the rates of a run with a peak of 0.8
    ("constant", dict(lr_warmup=1, num_iters=2, min_lr=0.2), [0.8, 0.8]),
    ("linear", dict(num_iters=6), [0.4, 0.8, 0.8, 0.62, 0.44, 0.26]),
    ("linear", dict(lr_cooldown=0.3125, min_lr=0), [0.4, *[0.8] * 7, 0.64, 0.32]),  # between steps
    ("linear", dict(lr_cooldown=0, min_lr=0), [0.4, *[0.8] * 9]),
    ("linear", dict(lr_warmup=20, num_iters=2), [0.04, 0.08]),
    ("cosine", dict(lr_cooldown=0.5, min_lr=0), [0.4, *[0.8] * 6, *DOWN]),
    ("cosine", dict(num_iters=4, min_lr=0.2), [0.4, 0.8, 0.8, 0.5]),
]


@pytest.mark.parametrize("schedule, values, expected", RATES)
def test_learning_rates(schedule, values, expected):
    common = dict(learning_rate=0.8, lr_warmup=2, num_iters=10, lr_schedule=schedule)
    given = flags(**common | values)
    rates = [main.learning_rate_at(i, given) for i in range(given.num_iters)]
    assert rates == pytest.approx(expected)


def test_dropout_moves_by_a_line():
    """Each row of each step has random numbers of its own."""
    given = flags(dropout=0.1, dropout_final=0.5, num_iters=4)
    keys = []
    for i, expected in enumerate([0.1, 0.2, 0.3, 0.4]):
        rate, keys_of_rows = main.draw_dropout(i, 5, given)
        assert rate.item() == pytest.approx(expected)
        keys.append(np.array(keys_of_rows))
    assert len(np.unique(np.concatenate(keys), axis=0)) == 20
    _, keys_of_three_rows = main.draw_dropout(2, 3, given)
    np.testing.assert_array_equal(keys[2][:3], np.array(keys_of_three_rows))
    rate, of_another_seed = main.draw_dropout(2, 5, flags(dropout=0.1, seed=1))
    assert rate.item() == pytest.approx(0.1)
    assert (keys[2] != np.array(of_another_seed)).any()


# ---- Averages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share, closed_form", [
    (1.0, lambda places: places**0),  # the plain mean
    (0.25, lambda places: (places - 1) * (places - 2) * (places - 3)),
])  # fmt: skip
def test_averaged_weights_have_the_powers_of_their_places(share, closed_form):
    """The recursion against sums written out; step `place` counts from 1."""
    steps = np.random.default_rng(0).normal(size=(20, 4, 3)).astype(np.float32)
    average = None
    for i, step in enumerate(steps):
        average = main.update_average(average, {"layer": mx.array(step)}, i, share)
        if i + 1 >= 1 / share:
            parts = closed_form(np.arange(1, i + 2))
            expected = np.tensordot(parts / parts.sum(), steps[: i + 1], 1)
        else:
            expected = step  # the newest weights
        np.testing.assert_allclose(np.array(average["layer"]), expected, rtol=0, atol=1e-5)
