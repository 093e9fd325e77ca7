"""Sampling on distributions worked out by hand, generation against uncached passes, and text given piece by piece."""

import math
from types import SimpleNamespace

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import flags
from datasets import byte_tokenizer, char_tokenizer, word_tokenizer
from mlx.utils import tree_flatten, tree_unflatten

INF = math.inf


def make_model(context_size=8, vocab_size=31, kv_heads=2):
    shape = dict(num_blocks=2, dim=16, num_heads=4, num_kv_heads=kv_heads, mlp="relu2", mlp_dim=32)
    model = main.LanguageModel(main.Config(vocab_size, context_size, **shape))
    random = np.random.default_rng(0)
    values = {n: random.normal(0, 1 if w.ndim == 1 else 0.5, w.shape) for n, w in tree_flatten(model.parameters())}
    model.update(tree_unflatten([(name, mx.array(value.astype(np.float32))) for name, value in values.items()]))
    return model


# One token


@pytest.mark.parametrize("k, expected", [
    (0, [3, 1, 2, 5, 4]),
    (1, [-INF, -INF, -INF, 5, -INF]),
    (3, [3, -INF, -INF, 5, 4]),
    (4, [3, -INF, 2, 5, 4]),
    (5, [3, 1, 2, 5, 4]),
    (50, [3, 1, 2, 5, 4]),
])  # fmt: skip
def test_keep_top_k(k, expected):
    logits = mx.array([3.0, 1, 2, 5, 4])
    assert main.keep_top_k(logits, k).tolist() == expected
    both = main.keep_top_k(mx.stack([logits, -logits]), k).tolist()  # each row has its own k largest
    ascending = sorted([-3, -1, -2, -5, -4], reverse=True)[: k or None]
    assert both == [expected, [-x if -x in ascending else -INF for x in (3, 1, 2, 5, 4)]]


@pytest.mark.parametrize("k, expected", [
    (1, [-INF, 2, 2, -INF, 2]),
    (2, [-INF, 2, 2, -INF, 2]),
    (3, [-INF, 2, 2, -INF, 2]),
    (4, [1, 2, 2, -INF, 2]),
])  # fmt: skip
def test_keep_top_k_keeps_ties(k, expected):
    assert main.keep_top_k(mx.array([[1.0, 2, 2, 0, 2]]), k).tolist() == [expected]


def test_temperature_0_takes_the_largest():
    logits = np.random.default_rng(0).normal(size=(50, 31)).astype(np.float32)
    for top_k in (0, 1, 5):
        drawn = main.sample(mx.array(logits), mx.random.key(1), 0, top_k)
        np.testing.assert_array_equal(np.array(drawn), logits.argmax(-1))
    drawn = main.sample(mx.array(logits), mx.random.key(1), 1.0, 1)  # so does any other if one token is left
    np.testing.assert_array_equal(np.array(drawn), logits.argmax(-1))


# Logits are logarithms of 4, 1, 3, 2, 1/2. At temperature 1/2 these numbers are squared, at 2 their roots count.
@pytest.mark.parametrize("temperature, top_k, weights", [
    (1.0, 0, [4, 1, 3, 2, 0.5]),
    (0.5, 0, [16, 1, 9, 4, 0.25]),
    (0.5, 3, [16, 0, 9, 4, 0]),
    (2.0, 2, [2, 0, 3**0.5, 0, 0]),
    (1.0, 99, [4, 1, 3, 2, 0.5]),
])  # fmt: skip
def test_sample_has_the_right_distribution(temperature, top_k, weights):
    draws = 100_000
    logits = mx.broadcast_to(mx.log(mx.array([4.0, 1, 3, 2, 0.5])) + 7, (draws, 5))  # a shift changes nothing
    drawn = np.array(main.sample(logits, mx.random.key(3), temperature, top_k))
    expected = np.array(weights) / sum(weights) * draws
    counts = np.bincount(drawn, minlength=5)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_squared < {1: 10.83, 2: 13.82, 4: 18.47}[possible.sum() - 1]  # a chance of 1 in 1,000


# Many tokens


@pytest.mark.parametrize("context_size", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt_length", [1, 5, 8, 9, 20])
def test_each_greedy_token_is_that_of_a_fresh_pass(context_size, prompt_length):
    model = make_model(context_size)
    prompt = np.random.default_rng(prompt_length).integers(31, size=prompt_length).tolist()
    tokens = list(main.generate(model, prompt, 30, 0, 0, 0))
    assert len(tokens) == 30
    window = list(prompt)
    for token in tokens:
        if len(window) > context_size:  # full: the last half is kept
            window = window[len(window) - max(1, context_size // 2) :]
        logits = np.array(model(mx.array([window]))[0, -1])
        # A cache may round differently, which decides only where the best two are as good as equal.
        assert logits[token] >= logits.max() - 1e-4
        window.append(token)
    assert len(set(tokens)) > 1 or context_size == 1


def test_a_prompt_is_left_as_it_was_and_no_token_is_asked_for_too_many():
    prompt = [1, 2, 3]
    assert list(main.generate(make_model(), prompt, 0, 0, 0, 0)) == []
    assert len(list(main.generate(make_model(), prompt, 1, 0, 0, 0))) == 1
    assert prompt == [1, 2, 3]


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 5)])
def test_the_seed_decides_the_tokens(temperature, top_k):
    model = make_model()
    first, same, other = (list(main.generate(model, [1, 2], 40, temperature, top_k, seed)) for seed in (1, 1, 2))
    assert first == same != other
    assert first[:20] == list(main.generate(model, [1, 2], 20, temperature, top_k, 1))  # the length changes nothing


def test_drawn_tokens_are_among_the_k_likeliest():
    model = make_model(context_size=64)
    tokens, window = list(main.generate(model, [1], 60, 2.0, 3, 5)), [1]
    ranks = set()
    for token in tokens:
        logits = np.array(model(mx.array([window]))[0, -1])
        assert logits[token] >= np.sort(logits)[-3] - 1e-4
        ranks.add((logits > logits[token] + 1e-4).sum())
        window.append(token)
    assert ranks == {0, 1, 2}  # each had its turn


def test_drawn_tokens_are_independent_of_those_before():
    def equal_chances(tokens, caches):
        return mx.zeros((*tokens.shape, 4))

    equal_chances.config, equal_chances.model = SimpleNamespace(context_size=8), SimpleNamespace(layers=[])
    tokens = np.array(list(main.generate(equal_chances, [0], 3200, 1.0, 0, 6)))
    pairs = np.bincount(tokens[0::2] * 4 + tokens[1::2], minlength=16)  # 100 of each are expected
    assert ((pairs - 100) ** 2 / 100).sum() < 37.70  # 15 degrees of freedom, a chance of 1 in 1,000


# Text


class Script:
    """A model that answers with these ids one after the other, whatever it is asked."""

    def __init__(self, ids, vocab_size, context_size=8):
        self.ids, self.vocab_size = iter(ids), vocab_size
        self.config, self.model = SimpleNamespace(context_size=context_size), SimpleNamespace(layers=[])

    def __call__(self, tokens, caches):
        assert tokens.ndim == 2 and 1 <= tokens.shape[1] <= self.config.context_size
        likely = mx.arange(self.vocab_size) == next(self.ids)
        return mx.broadcast_to(mx.where(likely, 0.0, -1e9), (*tokens.shape, self.vocab_size))


def pieces_of(tokenizer, prompt, ids, **options):
    ids = [int(i) for i in ids]
    model = Script(ids, tokenizer.vocab_size)
    given = flags(max_tokens=len(ids), temperature=1.0, top_k=3)
    return [piece for piece in main.continue_text(model, tokenizer, prompt, given, **options) if piece]


def test_characters_of_many_bytes_come_whole():
    text = "aé€😀\n\u0301b\ufffdc"
    characters = ["a", "é", "€", "😀", "\n", "\u0301", "b", "\ufffdc"]  # U+FFFD itself could be the start of another
    for prompt in ("", "x", "né", "long enough to fill the context, 😀"):
        assert pieces_of(byte_tokenizer(), prompt, text.encode()) == characters


@pytest.mark.parametrize("answer", [
    b"ab\xe2\x82", b"\xf0\x9f\x98", b"a\xff\xfeb", b"\x80", b"\xe2\x82a\xe2\x82\xac", b"\xc3\xc3\xa9", b"\xed\xa0\x80z",
    b"",
])  # fmt: skip
def test_broken_bytes_join_to_what_decoding_at_once_gives(answer):
    pieces = pieces_of(byte_tokenizer(), "é", answer)
    assert "".join(pieces) == answer.decode("utf-8", "replace")


def test_random_bytes_join_to_what_decoding_at_once_gives():
    random = np.random.default_rng(0)
    likely = np.array([0x41, 0x80, 0x9F, 0xA0, 0xC3, 0xE2, 0xED, 0xF0, 0xF4, 0xFF, 256])  # 256 is <eos>, without text
    for _ in range(100):
        answer = random.choice(likely, 12)
        expected = bytes(i for i in answer.tolist() if i < 256).decode("utf-8", "replace")
        assert "".join(pieces_of(byte_tokenizer(), "a", answer)) == expected


@pytest.mark.parametrize("tokenizer", [
    byte_tokenizer(), char_tokenizer("\n abcé😀"), char_tokenizer("abcé😀 "), word_tokenizer(["<eos>", "a", "<unk>", "cé"]),
], ids=["byte", "char", "char without line end", "word"])  # fmt: skip
@pytest.mark.parametrize("prompt", ["", "a", "a b", "b a\n", "\n\n", "zz a", "a zz", "a cé 😀"])
def test_pieces_join_to_what_decoding_at_once_gives(tokenizer, prompt):
    random = np.random.default_rng(0)
    begin = [int(i) for i in tokenizer.encode(prompt)]
    if not begin:  # nothing to continue: the model is asked what follows the end of a text or line
        begin = [tokenizer.eos] if tokenizer.eos is not None else [int(tokenizer.encode("\n")[0])]
    for _ in range(20):
        answer = random.integers(tokenizer.vocab_size, size=9).tolist()
        if tokenizer.kind == "byte":
            answer = list("".join(random.choice(["a", "é", "😀", "\n"], 4)).encode())
        whole = tokenizer.decode(begin + answer)
        shown = tokenizer.decode(begin)
        assert whole.startswith(shown)
        assert "".join(pieces_of(tokenizer, prompt, answer)) == whole[len(shown) :]


def test_words_come_one_by_one_with_their_spaces():
    vocabulary = ["<eos>", "<unk>", "to", "be", "or"]
    tokenizer = word_tokenizer(vocabulary)
    answer = [vocabulary.index(word) for word in ["to", "be", "<eos>", "or", "<unk>", "<eos>"]]
    assert pieces_of(tokenizer, "be", answer) == [" to", " be", "\n", "or", " <unk>", "\n"]
    assert pieces_of(tokenizer, "", answer) == ["to", " be", "\n", "or", " <unk>", "\n"]


@pytest.mark.parametrize("tokenizer", [
    byte_tokenizer(), char_tokenizer(None, ["a\n"]), char_tokenizer(None, ["no line end"]), word_tokenizer(None, ["a b\n"]),
], ids=["byte", "char", "char without line end", "word"])  # fmt: skip
def test_a_real_model_continues_an_empty_prompt(tokenizer):
    model = make_model(vocab_size=tokenizer.vocab_size)
    given = flags(max_tokens=20, temperature=1.0, top_k=0)
    first, second = ("".join(main.continue_text(model, tokenizer, "", given)) for _ in range(2))
    assert first == second != ""


def test_an_interrupt_ends_a_continuation():
    interrupts = SimpleNamespace(received=None)
    given = flags(max_tokens=6, temperature=0)
    continuation = main.continue_text(Script(b"abcdef", 257), byte_tokenizer(), "x", given, interrupts)
    assert next(continuation) == "a" and next(continuation) == "b"
    interrupts.received = 2
    assert "".join(continuation) == ""
