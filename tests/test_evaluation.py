"""The loss's gradient by finite differences, and the score of a split against one computed window by window."""

import math
import re
from types import SimpleNamespace

import main
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY, loss_of, nats_of, run, whole
from datasets import ByteTokenizer, Split, WordTokenizer, write_tokens
from mlx.utils import tree_flatten, tree_unflatten


def make_model(**values):
    shape = dict(vocab_size=13, context_size=8, num_blocks=2, dim=8, num_heads=2, num_kv_heads=1, mlp_dim=12)
    model = main.LanguageModel(main.Config(**shape | dict(mlp="relu2") | values))
    random, weights = np.random.default_rng(0), {}
    for name, weight in tree_flatten(model.parameters()):  # no weight is 0 or 1, so that no gradient is trivial
        weights[name] = random.normal(1, 0.3, weight.shape) if weight.ndim == 1 else random.normal(0, 0.6, weight.shape)
    set_weights(model, weights)
    return model


def set_weights(model, weights):
    model.update(tree_unflatten([(name, mx.array(weight.astype(np.float32))) for name, weight in weights.items()]))


def arrays(tree):
    return {name: np.array(weight, np.float64) for name, weight in tree_flatten(tree)}


def test_cross_entropy_is_a_masked_sum():
    model, random = make_model(), np.random.default_rng(1)
    tokens, targets = random.integers(13, size=(2, 3, 8))
    mask = random.integers(2, size=(3, 8))
    nats = nats_of(model(mx.array(tokens)), targets)
    given = mx.array(tokens), mx.array(targets)
    assert loss_of(model, *given).item() == pytest.approx(nats.sum(), rel=1e-5)
    assert loss_of(model, *given, weights=mx.array(mask)).item() == pytest.approx((nats * mask).sum(), rel=1e-5)
    assert loss_of(model, *given, weights=1 / 24).item() == pytest.approx(nats.mean(), rel=1e-5)


@pytest.mark.parametrize("mlp, rate", [("relu2", 0.0), ("swiglu", 0.0), ("gelu", 0.0), ("swiglu", 0.3)])
def test_gradient_equals_finite_differences(mlp, rate):
    model, random = make_model(mlp=mlp), np.random.default_rng(3)
    tokens, targets = (mx.array(ids) for ids in random.integers(13, size=(2, 2, 8)))
    keys = mx.array(random.integers(0, 2**32, (2, 2), np.uint32))
    noise = (mx.full(2, rate), keys) if rate else ()
    mask = mx.array(random.uniform(0.1, 1, (2, 8)).astype(np.float32))
    _, gradients = nn.value_and_grad(model, loss_of)(model, tokens, targets, mask, noise)
    weights, gradients = arrays(model.parameters()), arrays(gradients)
    assert weights.keys() == gradients.keys()

    def loss_at(weight):  # the sum is taken in float64: the loss would spend digits of float32 on it
        set_weights(model, weights | {name: weight})
        return (nats_of(model(tokens, noise=noise), targets) * np.array(mask)).sum()

    for name, weight in weights.items():
        size = np.linalg.norm(gradients[name])
        assert size > 0.1, name  # or the comparison would prove nothing
        for direction in random.normal(size=(2, *weight.shape)):
            direction /= np.linalg.norm(direction)
            near, far = (
                (loss_at(weight + distance * direction) - loss_at(weight - distance * direction)) / (2 * distance)
                for distance in (0.01, 0.02)
            )
            # Extrapolated to a distance of 0 (Richardson), which leaves errors of fourth order and the kinks of relu2.
            limit = (4 * near - far) / 3
            assert limit == pytest.approx((gradients[name] * direction).sum(), abs=5e-4 * size), name


# Scores of a split


def score_window_by_window(model, tokens):
    """Mean nats of tokens[1:], each predicted once: window i predicts tokens iL + 1 to iL + L from those before."""
    L, total, scored = model.config.context_size, 0.0, 0
    for start in range(0, len(tokens) - 1, L):
        inputs, targets = tokens[start : start + L], tokens[start + 1 : start + L + 1]
        inputs = inputs[: len(targets)]
        total += nats_of(model(mx.array(inputs[None].astype(np.int32)))[0], targets).sum()
        scored += len(targets)
    assert scored == len(tokens) - 1
    return total / scored


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 16, 17, 33, 50, 97, 98])
def test_evaluate_scores_every_token_but_the_first_once(length):
    model = make_model()
    tokens = np.random.default_rng(length).integers(13, size=length).astype(np.uint16)
    expected = score_window_by_window(model, tokens)
    for batch_size in (1, 2, 3, 5, 32):  # 97 tokens are 12 whole windows: whole batches for some of these
        assert main.evaluate(model, tokens, batch_size) == pytest.approx(expected, rel=1e-5), batch_size


def test_evaluate_begins_each_window_anew():
    """The windows' scores are those of the windows alone."""
    model, tokens = make_model(), np.random.default_rng(3).integers(13, size=25)
    parts = [main.evaluate(model, tokens[start : start + 9], 2) for start in (0, 8, 16)]
    assert main.evaluate(model, tokens, 2) == pytest.approx(sum(parts) / 3, rel=1e-5)


class Later:
    """Interrupts that come after some questions."""

    def __init__(self, questions):
        self.questions = questions

    @property
    def received(self):
        self.questions -= 1
        return 2 if self.questions < 0 else None

    @received.setter
    def received(self, number):
        """Other ranks' signals are noted here."""


def test_an_interrupted_evaluation_has_no_score():
    model, tokens = make_model(), np.random.default_rng(4).integers(13, size=100)  # 13 windows
    score = main.evaluate(model, tokens, 2)
    assert main.evaluate(model, tokens, 2, interrupts=SimpleNamespace(received=2)) is None
    assert main.evaluate(model, tokens, 2, interrupts=Later(3)) is None
    assert main.evaluate(model, tokens, 2, interrupts=SimpleNamespace(received=None)) == score
    assert main.evaluate(model, tokens, 2, interrupts=Later(7)) == score


# The line that tells a score


def test_describe_score_by_hand():
    tokenizer = WordTokenizer(["<eos>", "<unk>", "a", "b"])
    split = Split(np.array([2, 3, 1, 0, 2, 1, 3, 0], np.uint16), num_bytes=20, num_words=4, num_unk=2)
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
    (tmp_path / "other.txt").write_text("the lazy dog jumps\n" * 90)
    line = ["--text", text, *TINY, "--num_iters", 10]
    other = ["--test_text", tmp_path / "other.txt"]
    run(*line, "--save_dir", tmp_path / "lm")
    scored, _ = run("--evaluate", "test", "--identifier", "latest", *other, "--save_dir", tmp_path / "lm")
    expected, _ = run(*line, *other, "--eval_test", "--save_dir", tmp_path / "with")
    [[nats], [expected_nats]] = (re.findall(r"^test ([\d.]+) nats", out, re.M) for out in (scored, expected))
    assert nats == expected_nats
    run("--dataset", "python", *TINY, "--num_iters", 1, "--save_dir", tmp_path / "lm")
    _, err = run("--evaluate", "test", "--identifier", "latest", *other, "--save_dir", tmp_path / "lm", status=2)
    assert err.count("\n") == 1 and "python has splits of its own" in err


def split_of(text, tokenizer, folder):
    """The text as a Split, encoded through a file as a corpus is."""
    (folder / "text.txt").write_text(text)
    known = write_tokens([whole(folder / "text.txt")], tokenizer, folder / "text.tokens")
    tokens = np.fromfile(folder / "text.tokens", np.uint16)
    return Split(tokens, known["num_bytes"], known["num_words"], known["num_unk"])


def test_describe_score_of_bytes(tmp_path):
    """Byte by byte, bits per byte is nats / ln 2, and there is no <unk>; words are counted in the text."""
    tokenizer = ByteTokenizer()
    split = split_of("to be or\nnot é\n", tokenizer, tmp_path)  # 16 bytes; 5 words and 2 line ends
    assert main.describe_score("valid", 7 / 16 * math.log(8), split, tokenizer) == (
        "valid 0.9098 nats, perplexity 2.48 per token, 1.3125 bits per byte"
    )


def test_describe_score_a_word_is_a_token_of_the_word_tokenizer(tmp_path):
    text = "to be or\nnot to be\n"
    tokenizer = WordTokenizer.train([text])
    line = main.describe_score("valid", 1.0, split_of(text, tokenizer, tmp_path), tokenizer)
    assert "nats, perplexity 2.72 per word, " in line and line.endswith("0.00% <unk>")


def test_describe_score_of_a_diverged_model_does_not_overflow():
    split = Split(np.zeros(8, np.uint16), num_bytes=8, num_words=1, num_unk=0)
    assert main.describe_score("valid", 1e6, split, ByteTokenizer()).startswith("valid 1000000.0000 nats")
