"""The loss's gradient by finite differences, and scores of splits, computed window by window."""

import math
import re
from types import SimpleNamespace

import main
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY, loss_of, nats_of, run
from datasets import ByteTokenizer, Split, WordTokenizer, load_dataset
from mlx.utils import tree_flatten, tree_unflatten


def make_model(**values):
    shape = dict(
        vocab_size=13,
        context_size=8,
        num_blocks=2,
        dim=8,
        num_heads=2,
        num_kv_heads=1,
        mlp_dim=12,
        mlp="relu2",
    )
    model = main.LanguageModel(main.Config(**shape | values))
    random = np.random.default_rng(0)
    weights = {}
    for name, weight in tree_flatten(model.parameters()):
        # No weight is 0 or 1, so that no gradient is trivial.
        if weight.ndim == 1:
            weights[name] = random.normal(1, 0.3, weight.shape)
        else:
            weights[name] = random.normal(0, 0.6, weight.shape)
    set_weights(model, weights)
    return model


def set_weights(model, weights):
    named = []
    for name, weight in weights.items():
        named.append((name, mx.array(weight.astype(np.float32))))
    model.update(tree_unflatten(named))


def arrays(tree):
    return {name: np.array(weight, np.float64) for name, weight in tree_flatten(tree)}


def draw_tokens(seed, size):
    return np.random.default_rng(seed).integers(13, size=size)


def test_cross_entropy_is_a_masked_sum():
    model = make_model()
    random = np.random.default_rng(1)
    tokens, targets = random.integers(13, size=(2, 3, 8))
    mask = random.integers(2, size=(3, 8))
    nats = nats_of(model(mx.array(tokens)), targets)

    def loss(**options):
        return loss_of(model, mx.array(tokens), mx.array(targets), **options).item()

    masked = (nats * mask).sum()
    assert loss() == pytest.approx(nats.sum(), rel=1e-5)
    assert loss(weights=mx.array(mask)) == pytest.approx(masked, rel=1e-5)
    assert loss(weights=1 / 24) == pytest.approx(nats.mean(), rel=1e-5)


@pytest.mark.parametrize("mlp, rate", [
    ("relu2", 0.0),
    ("swiglu", 0.0),
    ("gelu", 0.0),
    ("swiglu", 0.3),
])  # fmt: skip
def test_gradient_equals_finite_differences(mlp, rate):
    model = make_model(mlp=mlp)
    random = np.random.default_rng(3)
    tokens, targets = map(mx.array, random.integers(13, size=(2, 2, 8)))
    keys = mx.array(random.integers(0, 2**32, (2, 2), np.uint32))
    noise = None
    if rate:
        noise = main.Noise(mx.array(rate), keys, 8, model.config.dim)
    mask = mx.array(random.uniform(0.1, 1, (2, 8)).astype(np.float32))
    value_and_grad = nn.value_and_grad(model, loss_of)
    _, gradients = value_and_grad(model, tokens, targets, mask, noise)
    weights = arrays(model.parameters())
    gradients = arrays(gradients)
    assert weights.keys() == gradients.keys()

    def loss_at(name, weight):
        """The loss where one of the weights is another.

        The sum is taken in float64: the loss would spend digits of float32 on it.
        """
        set_weights(model, weights | {name: weight})
        nats = nats_of(model(tokens, noise=noise), targets)
        return (nats * np.array(mask)).sum()

    def slope(name, direction, distance):
        step = distance * direction
        ahead = loss_at(name, weights[name] + step)
        behind = loss_at(name, weights[name] - step)
        return (ahead - behind) / (2 * distance)

    for name, weight in weights.items():
        size = np.linalg.norm(gradients[name])
        assert size > 0.1, name  # or the comparison would prove nothing
        for direction in random.normal(size=(2, *weight.shape)):
            direction /= np.linalg.norm(direction)
            near = slope(name, direction, 0.01)
            far = slope(name, direction, 0.02)
            # Extrapolated to a distance of 0 (Richardson), which leaves errors of fourth order
            # and the kinks of relu2.
            limit = (4 * near - far) / 3
            expected = (gradients[name] * direction).sum()
            assert limit == pytest.approx(expected, abs=5e-4 * size), name


# Scores of a split


def score_window_by_window(model, tokens):
    """Mean nats of tokens[1:], each predicted once.

    Window i predicts tokens iL + 1 to iL + L from those before.
    """
    L = model.config.context_size
    total = 0.0
    scored = 0
    for start in range(0, len(tokens) - 1, L):
        targets = tokens[start + 1 : start + L + 1]
        inputs = tokens[start : start + len(targets)].astype(np.int32)
        [logits] = model(mx.array(inputs[None]))
        total += nats_of(logits, targets).sum()
        scored += len(targets)
    assert scored == len(tokens) - 1
    return total / scored


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 16, 17, 33, 50, 97, 98])
def test_evaluate_scores_every_token_but_the_first_once(length):
    model = make_model()
    tokens = draw_tokens(length, length).astype(np.uint16)
    expected = score_window_by_window(model, tokens)
    # 97 tokens are 12 whole windows: whole batches for some of these.
    for batch_size in (1, 2, 3, 5, 32):
        nats = main.evaluate(model, tokens, batch_size)
        assert nats == pytest.approx(expected, rel=1e-5), batch_size


def test_evaluate_begins_each_window_anew():
    """The windows' scores are those of the windows alone."""
    model = make_model()
    tokens = draw_tokens(3, 25)
    parts = []
    for start in (0, 8, 16):
        window = tokens[start : start + 9]
        parts.append(main.evaluate(model, window, 2))
    mean = sum(parts) / 3
    assert main.evaluate(model, tokens, 2) == pytest.approx(mean, rel=1e-5)


class Later:
    """Interrupts that come after some questions."""

    def __init__(self, questions):
        self.questions = questions

    @property
    def received(self):
        self.questions -= 1
        if self.questions < 0:
            return 2
        return None

    @received.setter
    def received(self, number):
        """Other ranks' signals are noted here."""


def test_an_interrupted_evaluation_has_no_score():
    model = make_model()
    tokens = draw_tokens(4, 100)  # 13 windows
    at_once = SimpleNamespace(received=2)
    never = SimpleNamespace(received=None)
    score = main.evaluate(model, tokens, 2)
    assert main.evaluate(model, tokens, 2, interrupts=at_once) is None
    assert main.evaluate(model, tokens, 2, interrupts=Later(3)) is None
    assert main.evaluate(model, tokens, 2, interrupts=never) == score
    assert main.evaluate(model, tokens, 2, interrupts=Later(7)) == score


# The line that tells a score


def test_describe_score_by_hand():
    tokenizer = WordTokenizer(["<eos>", "<unk>", "a", "b"])
    tokens = np.array([2, 3, 1, 0, 2, 1, 3, 0], np.uint16)
    split = Split(tokens, num_bytes=20, num_words=4, num_unk=2)
    # 8 tokens of ln 2 nats are 8 bits: 8 / 20 a byte; 2 tokens of 8 are <unk>
    assert main.describe_score("valid", math.log(2), split, tokenizer) == (
        "valid 0.6931 nats, perplexity 2.00 per word, 0.4000 bits per byte, 25.00% <unk>"
    )
    # 8 tokens of 1.5 nats are 12 nats: 12 / ln 2 / 20 = 0.8656 bits a byte
    assert main.describe_score("test", 1.5, split, tokenizer) == (
        "test 1.5000 nats, perplexity 4.48 per word, 0.8656 bits per byte, 25.00% <unk>"
    )
    # Of pieces of words there are 4 words' worth: exp(12 / 4) a word.
    pieces = SimpleNamespace(kind="bpe", unk=None)
    assert main.describe_score("test", 1.5, split, pieces) == (
        "test 1.5000 nats, perplexity 4.48 per token, 20.09 per word, 0.8656 bits per byte"
    )


def test_another_test_text(tmp_path, text):
    """Any text can be scored; the oracle is a run that had it from the start."""
    folder = tmp_path / "lm"
    other_text = tmp_path / "other.txt"
    other_text.write_text("the lazy dog jumps\n" * 90)
    line = ["--text", text, *TINY, "--num_iters", 10]
    other = ["--test_text", other_text]
    latest = ["--identifier", "latest", "--save_dir", folder]
    score = r"^test ([\d.]+) nats"

    run(*line, "--save_dir", folder)
    out, _ = run("--evaluate", "test", *latest, *other)
    [nats] = re.findall(score, out, re.M)
    out, _ = run(*line, *other, "--eval_test", "--save_dir", tmp_path / "with")
    [expected] = re.findall(score, out, re.M)
    assert nats == expected

    run("--dataset", "python", *TINY, "--num_iters", 1, "--save_dir", folder)
    _, err = run("--evaluate", "test", *latest, *other, status=2)
    assert err.count("\n") == 1
    assert "--test_text go with --text" in err


def split_of(text, tokenizer, folder):
    """The text as a Split."""
    path = folder / "text.txt"
    path.write_text(text)
    options = {"text": [path], "valid_text": [path], "tokenizer": tokenizer}
    return load_dataset("text", folder / "data", **options).train


def test_describe_score_of_bytes(tmp_path):
    """Byte by byte, bits per byte is nats / ln 2, and there is no <unk>.

    Words are counted in the text.
    """
    tokenizer = ByteTokenizer()
    split = split_of("to be or\nnot é\n", tokenizer, tmp_path)  # 16 bytes; 5 words and 2 line ends
    nats = 7 / 16 * math.log(8)
    assert main.describe_score("valid", nats, split, tokenizer) == (
        "valid 0.9098 nats, perplexity 2.48 per token, 1.3125 bits per byte"
    )


def test_describe_score_a_word_is_a_token_of_the_word_tokenizer(tmp_path):
    text = "to be or\nnot to be\n"
    tokenizer = WordTokenizer.train([text])
    split = split_of(text, tokenizer, tmp_path)
    line = main.describe_score("valid", 1.0, split, tokenizer)
    assert "nats, perplexity 2.72 per word, " in line
    assert line.endswith("0.00% <unk>")


def test_describe_score_of_a_diverged_model_does_not_overflow():
    split = Split(np.zeros(8, np.uint16), num_bytes=8, num_words=1, num_unk=0)
    line = main.describe_score("valid", 1e6, split, ByteTokenizer())
    assert line.startswith("valid 1000000.0000 nats")
