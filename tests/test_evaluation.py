"""The loss's gradient by finite differences, and scores of splits, computed token by token."""

import math
import re

import main
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY, arrays, make_model, newest, run


def nats_of(logits, targets):
    """Cross-entropy of each position in float64: logits [..., V], targets [...]."""
    logits = np.array(logits, np.float64)
    indices = np.array(targets, np.int64)[..., None]
    chosen = np.take_along_axis(logits, indices, -1)[..., 0]
    return np.logaddexp.reduce(logits, -1) - chosen


@pytest.mark.parametrize("mlp", ["relu2", "swiglu", "gelu"])
def test_gradient_equals_finite_differences(mlp):
    model = make_model(mlp=mlp)
    random = np.random.default_rng(3)
    tokens, targets = map(mx.array, random.integers(31, size=(2, 2, 8)))
    keys = mx.array(random.integers(0, 2**32, (2, 2), np.uint32))
    dropout_masks = main.DropoutMasks(mx.array(0.3), keys, 8, model.config.dim)

    def loss():
        return main.training_loss(model, tokens, targets, 0.5, dropout_masks)

    _, gradients = nn.value_and_grad(model, loss)()
    weights = arrays(model)
    gradients = arrays(gradients)

    def loss_at(name, weight):
        """The loss where one of the weights is another.

        The sum is taken in float64: the loss would spend digits of float32 on it.
        """
        changed = weights | {name: weight}
        model.load_weights([(each, mx.array(value)) for each, value in changed.items()])
        nats = nats_of(model(tokens, dropout_masks=dropout_masks), targets)
        return 0.5 * nats.sum()

    def slope(name, direction, distance):
        step = distance * direction
        ahead = loss_at(name, weights[name] + step)
        behind = loss_at(name, weights[name] - step)
        return (ahead - behind) / (2 * distance)

    for name, weight in weights.items():
        size = np.linalg.norm(gradients[name])
        assert size > 0.1, name  # or the comparison would prove nothing
        direction = random.normal(size=weight.shape)
        direction /= np.linalg.norm(direction)
        near = slope(name, direction, 0.01)
        far = slope(name, direction, 0.02)
        # Extrapolated to a distance of 0 (Richardson), which leaves errors of fourth order and the
        # kinks of relu2.
        limit = (4 * near - far) / 3
        expected = (gradients[name] * direction).sum()
        assert limit == pytest.approx(expected, abs=5e-4 * size), name


@pytest.mark.parametrize("length", [2, 8, 9, 10, 33, 97])
@pytest.mark.parametrize("stride", [None, 1, 3, 7, 8])
def test_evaluate_scores_every_token_but_the_first_once(length, stride):
    """Alone, with the context of the first window that reaches it."""
    model = make_model()
    tokens = np.random.default_rng(length).integers(31, size=length).astype(np.uint16)
    step = stride or 8  # the size of the context
    total = 0.0
    for answer in range(1, length):
        windows_before = math.ceil((answer - 8) / step)
        begin = max(0, windows_before) * step
        logits = model(mx.array([tokens[begin:answer].tolist()]))[0, -1]
        total += nats_of(logits, tokens[answer])
    for batch_size in (1, 3, 32):
        scores = main.evaluate(model, tokens, batch_size, stride=stride)
        assert scores == {"loss": pytest.approx(total / (length - 1), rel=1e-5)}


# ---- The line that tells a score ----------------------------------------------------------------

# 5 words, of which é was never seen, and 2 line ends, which count, as in Penn Treebank: 16 bytes.
SCORED_TEXT = "to be or\nnot é\n"


@pytest.fixture
def line(tmp_path):
    """A command that trains on another text."""
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 90)
    schedule = "--num_iters 30 --learning_rate 0.01 --lr_warmup 0".split()
    return ["--text", tmp_path / "text.txt", *TINY, *schedule, "--save_dir", tmp_path]


# Tokens of the text, what there is a perplexity of, and the share of <unk>.
@pytest.mark.parametrize("tokenizer, count, units, unknown", [
    ("word", 7, "per word", ", 14.29% <unk>"),
    ("byte", 16, "per token", ""),
    ("char", 15, "per token", ", 6.67% <unk>"),
    ("bpe --vocab_size 257", 16, r"per token, (\S+) per word", ""),
])  # fmt: skip
def test_a_score_in_units_of_the_text(tokenizer, count, units, unknown, line, tmp_path):
    """The same in bits per byte, by hand: of all tokens, per 16 bytes."""
    (tmp_path / "valid.txt").write_text(SCORED_TEXT * 40)
    run(*line, "--valid_text", tmp_path / "valid.txt", "--tokenizer", *tokenizer.split())
    out, err = run("--evaluate", "validation", "--save_dir", tmp_path)
    assert err.startswith(f"{newest(tmp_path)}, in ")
    said = rf"valid (\S+) nats, perplexity (\S+) {units}, (\S+) bits per byte{unknown}"
    nats, *perplexities, bits = map(float, re.match(rf"{said}, [\d,]+ tokens/s", out).groups())
    of_token_and_word = [math.exp(nats), math.exp(nats * count / 7)]
    assert perplexities == pytest.approx(of_token_and_word[: len(perplexities)], rel=0.01)
    assert bits == pytest.approx(nats / math.log(2) * count / 16, rel=1e-3)


def test_a_text_is_scored_without_that_of_the_training(line, tmp_path):
    (tmp_path / "test.txt").write_text(SCORED_TEXT * 4)
    run(*line)
    scoring = ["--evaluate", "test", "--test_text", tmp_path / "test.txt", "--save_dir", tmp_path]
    score = re.findall(r"^test (\S+) nats", run(*scoring)[0], re.M)
    (tmp_path / "text.txt").unlink()
    assert re.findall(r"^test (\S+) nats", run(*scoring)[0], re.M) == score != []
