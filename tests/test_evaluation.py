"""The loss's gradient by finite differences, and scores of splits, computed token by token."""

import math
import re

import main
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY, arrays, make_model, run


def nats_of(logits, targets):
    """Cross-entropy of each position in float64: logits [..., V], targets [...]."""
    logits = np.array(logits, np.float64)
    largest = logits.max(-1, keepdims=True)
    totals = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    indices = np.asarray(targets, np.int64)[..., None]
    chosen = np.take_along_axis(logits, indices, -1)[..., 0]
    return totals - chosen


@pytest.mark.parametrize("mlp", ["relu2", "swiglu", "gelu"])
def test_gradient_equals_finite_differences(mlp):
    model = make_model(mlp=mlp)
    random = np.random.default_rng(3)
    tokens, targets = map(mx.array, random.integers(31, size=(2, 2, 8)))
    keys = mx.array(random.integers(0, 2**32, (2, 2), np.uint32))
    dropout_masks = main.DropoutMasks(mx.array(0.3), keys, 8, model.config.dim)

    def loss():
        hidden = model.model(tokens, dropout_masks=dropout_masks)  # [B, L, D]
        return main.training_loss(model, hidden, targets, 0.5)

    _, gradients = nn.value_and_grad(model, loss)()
    weights = arrays(model)
    gradients = arrays(gradients)
    assert weights.keys() == gradients.keys()

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
    total = 0.0
    for answer in range(1, length):
        windows_before = math.ceil((answer - 8) / (stride or 8))
        begin = max(0, windows_before) * (stride or 8)
        context = tokens[begin:answer].astype(np.int32)
        logits = model(mx.array(context[None]))[0, -1:]
        total += nats_of(logits, tokens[answer : answer + 1]).sum()
    for batch_size in (1, 3, 32):
        scores = main.evaluate(model, tokens, batch_size, stride=stride)
        assert scores == {"loss": pytest.approx(total / (length - 1), rel=1e-5)}


# ---- The line that tells a score ----------------------------------------------------------------

# 4 words, of which é was never seen, and 2 line ends: 16 bytes.
SCORED_TEXT = "to be or\nnot é\n"
UNITS = {  # tokenizer: tokens of this text, whether a token is a word, the share of <unk>
    "word": (7, "word", ", 14.29% <unk>"),
    "byte": (16, "token", ""),
    "char": (15, "token", ", 6.67% <unk>"),
}


@pytest.mark.parametrize("tokenizer", UNITS)
def test_a_score_in_units_of_the_text(tokenizer, tmp_path):
    """The same in bits per byte, by hand: of all tokens, per 16 bytes."""
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 90)
    (tmp_path / "valid.txt").write_text(SCORED_TEXT * 40)
    texts = ["--text", tmp_path / "text.txt", "--valid_text", tmp_path / "valid.txt"]
    schedule = ["--num_iters", 30, "--learning_rate", 0.01, "--lr_warmup", 0]
    run(*texts, *TINY, *schedule, "--tokenizer", tokenizer, "--save_dir", tmp_path)
    [weights] = tmp_path.glob("text-*/*.safetensors")
    out, _ = run("--evaluate", "validation", "--identifier", weights, "--save_dir", tmp_path)
    nats = float(re.match(r"valid ([\d.]+) nats", out).group(1))
    count, unit, unknown = UNITS[tokenizer]
    said = r"valid \S+ nats, perplexity ([\d.]+) per (\w+), ([\d.]+) bits per byte(, \S+ <unk>)?,"
    perplexity, its_unit, bits, its_unknown = re.match(said, out).groups()
    assert float(perplexity) == pytest.approx(math.exp(nats), rel=0.01)
    assert (its_unit, its_unknown or "") == (unit, unknown)
    assert float(bits) == pytest.approx(nats / math.log(2) * count / 16, rel=1e-3)


def test_a_text_is_scored_without_that_of_the_training(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 90)
    (tmp_path / "test.txt").write_text(SCORED_TEXT * 4)
    runs = ["--save_dir", tmp_path / "lm"]
    run("--text", text, *TINY, "--num_iters", 1, *runs)
    line = ["--evaluate", "test", "--test_text", tmp_path / "test.txt", *runs]
    [score] = re.findall(r"^test (\S+) nats", run(*line)[0], re.M)
    text.unlink()
    assert re.findall(r"^test (\S+) nats", run(*line)[0], re.M) == [score]
    run("--evaluate", "valid", *runs, status=2)


def test_a_score_of_pieces_of_words(tmp_path):
    """Where a token is less than a word, the perplexity of a word is named, too."""
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 90)
    line = ["--text", tmp_path / "text.txt", *TINY, "--tokenizer", "bpe", "--num_iters", 1]
    out, _ = run(*line, "--vocab_size", 257, "--save_dir", tmp_path)
    [count] = re.findall(r"/ ([\d,]+) valid tokens", out)
    out, _ = run("--evaluate", "valid", "--save_dir", tmp_path)
    nats, per_word = re.match(r"valid ([\d.]+) nats, .* per token, (\S+) per word, ", out).groups()
    words = 9 * 7  # in nine lines, whose ends count, as in Penn Treebank
    expected = math.exp(float(nats) * int(count) / words)
    assert float(per_word) == pytest.approx(expected, rel=0.06)
