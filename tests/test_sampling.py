"""Sampling on distributions worked out by hand, generation against uncached passes, and text given piece by piece."""

import math
import re
from types import SimpleNamespace

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import Script, flags
from datasets import ByteTokenizer, CharTokenizer, WordTokenizer
from mlx.utils import tree_flatten, tree_unflatten

INF = math.inf


def make_model(context_size=8, vocab_size=31, kv_heads=2, seed=0):
    shape = dict(num_blocks=2, dim=16, num_heads=4, num_kv_heads=kv_heads, mlp="relu2", mlp_dim=32)
    model = main.LanguageModel(main.Config(vocab_size, context_size, **shape))
    random = np.random.default_rng(seed)
    values = {n: random.normal(0, 1 if w.ndim == 1 else 0.5, w.shape) for n, w in tree_flatten(model.parameters())}
    model.update(tree_unflatten([(name, mx.array(value.astype(np.float32))) for name, value in values.items()]))
    return model


# One token


def shaped(logits, texts=None, **values):
    """What shape_logits makes of logits [B, V], as nested lists; by itself it changes nothing."""
    plain = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    return main.shape_logits(mx.array(logits), flags(**plain | values), texts or [[]] * len(logits)).tolist()


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


# Probabilities 0.1, 0.4, 0.2, 0.3 in one row and 0.25 each in the other.
@pytest.mark.parametrize("p, kept, kept_of_equals", [
    (0.0, [1], 4), (0.39, [1], 4), (0.41, [1, 3], 4), (0.69, [1, 3], 4), (0.71, [1, 2, 3], 4), (0.91, [0, 1, 2, 3], 4),
    (1.0, [0, 1, 2, 3], 4),
])  # fmt: skip
def test_keep_top_p(p, kept, kept_of_equals):
    logits = mx.log(mx.array([[0.1, 0.4, 0.2, 0.3], [0.25] * 4])) - 3
    result = np.array(main.keep_top_p(logits, p))
    assert np.flatnonzero(result[0] > -INF).tolist() == kept
    assert (result[1] > -INF).sum() == kept_of_equals  # ties with the last one stay
    np.testing.assert_array_equal(result[result > -INF], np.array(logits)[result > -INF])


@pytest.mark.parametrize("p, kept", [
    (0.0, [0, 1, 2, 3]), (0.24, [0, 1, 2, 3]), (0.26, [1, 2, 3]), (0.51, [1, 3]), (0.76, [1]), (1.0, [1]),
])  # fmt: skip
def test_keep_min_p(p, kept):
    logits = mx.log(mx.array([[0.1, 0.4, 0.2, 0.3]])) + 5
    assert np.flatnonzero(np.array(main.keep_min_p(logits, p))[0] > -INF).tolist() == kept


def test_penalize():
    logits = mx.array([[3.0, -1, 2, 0, -4]] * 2)
    result = main.penalize(logits, [[0, 1, 3, 3], [4]], 2.0).tolist()
    assert result == [[1.5, -2, 2, 0, -4], [3, -1, 2, 0, -8]]
    assert main.penalize(logits, [[0], [1]], 1.0).tolist() == logits.tolist()


def test_the_rules_apply_in_order():
    """Weights 8, 4, 2, 1: the penalty halves the logit of the first, to the root of 8; temperature 1/2 squares them all, to
    8, 16, 4, 1; of the top three, 28 in all, the first two have 0.857; the lesser of these is half of the greater."""
    logits = [[math.log(weight) for weight in (8, 4, 2, 1)]]
    rules = dict(repetition_penalty=2.0, temperature=0.5, top_k=3)

    def kept(**values):
        return [i for i, x in enumerate(shaped(logits, [[0]], **rules | values)[0]) if x > -INF]

    assert kept() == [0, 1, 2]
    np.testing.assert_allclose(shaped(logits, [[0]], **rules)[0][:3], np.log([8, 16, 4]), rtol=1e-6)
    assert kept(top_p=0.86) == [0, 1, 2] and kept(top_p=0.85) == [0, 1]  # of all four together it would be 24 / 29 = 0.83
    assert kept(top_k=0, top_p=0.82) == [0, 1]
    assert kept(top_p=0.85, min_p=0.49) == [0, 1] and kept(top_p=0.85, min_p=0.51) == [1]


@pytest.mark.parametrize("rules", [dict(temperature=0), dict(temperature=1e-9), dict(top_k=1), dict(top_p=0), dict(min_p=1)])
def test_the_largest_alone(rules):
    logits = np.random.default_rng(0).normal(size=(50, 31)).astype(np.float32)
    result = np.array(shaped(logits, **rules))
    np.testing.assert_array_equal(result.argmax(-1), logits.argmax(-1))
    assert (result > -INF).sum() == 50
    ties = np.array(shaped([[1.0, 2, 2]], temperature=0))
    assert (ties > -INF).tolist() == [[False, True, False]]


# Logits are logarithms of 4, 1, 3, 2, 1/2. At temperature 1/2 these numbers are squared, at 2 their roots count.
DISTRIBUTIONS = [  # sampling flags, and what each token is drawn in proportion to
    (dict(), [4, 1, 3, 2, 0.5]),
    (dict(temperature=0.5), [16, 1, 9, 4, 0.25]),
    (dict(temperature=0.5, top_k=3), [16, 0, 9, 4, 0]),
    (dict(temperature=2.0, top_k=2), [2, 0, 3**0.5, 0, 0]),
    (dict(top_k=99), [4, 1, 3, 2, 0.5]),
    (dict(top_p=0.8), [4, 0, 3, 2, 0]),
    (dict(min_p=0.3), [4, 0, 3, 2, 0]),
    (dict(repetition_penalty=2.0), [2, 1, 3, 2, 0.25]),  # of the first and the last
    (dict(temperature=0.5, top_k=4, top_p=0.9, min_p=0.5), [16, 0, 9, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize("rules, weights", DISTRIBUTIONS, ids=str)
def test_what_is_drawn_has_the_right_distribution(rules, weights):
    draws, logits = 5_000, [math.log(weight) for weight in (4, 1, 3, 2, 0.5)]
    given = flags(**dict(temperature=1.0, top_k=0) | rules)
    model, drawn = Script(lambda token: logits), []
    for seed in range(draws):  # extras/test_decode.py draws 100,000 of them, all together
        drawn += main.Decoder(model, [4, 0]).generate(1, given, seed)
    expected = np.array(weights) / sum(weights) * draws
    counts = np.bincount(drawn, minlength=5)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_squared < {1: 10.83, 2: 13.82, 4: 18.47}[possible.sum() - 1]  # a chance of 1 in 1,000


# Many tokens


def tokens_of(model, prompt, count, seed=0, **values):
    """`count` tokens that follow one prompt."""
    text = list(prompt)
    rules = flags(**dict(temperature=0, top_k=0) | values)
    given = list(main.Decoder(model, text).generate(count, rules, seed))
    assert text == [*prompt, *given]
    return given


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("context_size", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt_length", [1, 5, 8, 9, 20])
def test_each_greedy_token_is_that_of_a_fresh_pass(context_size, prompt_length, kv_heads):
    model = make_model(context_size, kv_heads=kv_heads)
    prompt = np.random.default_rng(prompt_length).integers(31, size=prompt_length).tolist()
    tokens = tokens_of(model, prompt, 30)
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


def test_what_is_forgotten_is_read_again():
    """And what others add to the text is read, too."""
    model, text = make_model(context_size=16), [1, 2, 3]
    decoder = main.Decoder(model, text)
    for more, window in (([4, 5], 5), ([6], 6), ([7] * 10, 16), ([8], 8), ([9], 9), ([10] * 40, 8)):
        text += more
        fresh = np.array(model(mx.array([text[-window:]]))[:, -1])
        np.testing.assert_allclose(np.array(decoder.logits()), fresh, rtol=0, atol=1e-4)
        decoder.forget()
        np.testing.assert_allclose(np.array(decoder.logits()), fresh, rtol=0, atol=1e-4)


def test_no_token_is_asked_for_too_many():
    assert tokens_of(make_model(), [1, 2, 3], 0) == []
    assert len(tokens_of(make_model(), [1, 2, 3], 1)) == 1


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 5)])
def test_the_seed_decides_the_tokens(temperature, top_k):
    model, rules = make_model(), dict(temperature=temperature, top_k=top_k)
    first, same, other = (tokens_of(model, [1, 2], 40, seed, **rules) for seed in (1, 1, 2))
    assert first == same != other
    assert first[:20] == tokens_of(model, [1, 2], 20, 1, **rules)  # the length changes nothing


def test_drawn_tokens_are_among_the_k_likeliest():
    model = make_model(context_size=64)
    tokens, window = tokens_of(model, [1], 60, 5, temperature=2.0, top_k=3), [1]
    ranks = set()
    for token in tokens:
        logits = np.array(model(mx.array([window]))[0, -1])
        assert logits[token] >= np.sort(logits)[-3] - 1e-4
        ranks.add((logits > logits[token] + 1e-4).sum())
        window.append(token)
    assert ranks == {0, 1, 2}  # each had its turn


def test_drawn_tokens_are_independent_of_those_before():
    tokens = np.array(tokens_of(Script(lambda token: [0.0] * 4), [0], 3200, 6, temperature=1.0))
    pairs = np.bincount(tokens[0::2] * 4 + tokens[1::2], minlength=16)  # 100 of each are expected
    assert ((pairs - 100) ** 2 / 100).sum() < 37.70  # 15 degrees of freedom, a chance of 1 in 1,000


# Text


def pieces_of(tokenizer, prompt, ids, stop=None, **options):
    """What a model that answers with these ids, whatever it is asked, adds to a prompt, piece by piece."""
    ids = [int(i) for i in ids]
    answers = iter(ids)
    model = Script(lambda token, V=tokenizer.vocab_size: (np.arange(V) == next(answers)).astype(float).tolist())
    conversation = main.Conversation(tokenizer, model)
    given = flags(max_tokens=len(ids), temperature=0, stop=stop)
    pieces = [piece for piece in conversation.reply(prompt, given, 0, **options) if piece]
    if not stop:
        assert conversation.text[len(conversation.text) - len(ids) :] == ids
    return pieces


def test_characters_of_many_bytes_come_whole():
    text = "aé€😀\n\u0301b\ufffdc"
    characters = ["a", "é", "€", "😀", "\n", "\u0301", "b", "\ufffdc"]  # U+FFFD itself could be the start of another
    for prompt in ("", "x", "né", "long enough to fill the context, 😀"):
        assert pieces_of(ByteTokenizer(), prompt, text.encode()) == characters


@pytest.mark.parametrize("answer", [
    b"ab\xe2\x82", b"\xf0\x9f\x98", b"a\xff\xfeb", b"\x80", b"\xe2\x82a\xe2\x82\xac", b"\xc3\xc3\xa9", b"\xed\xa0\x80z",
    b"",
])  # fmt: skip
def test_broken_bytes_join_to_what_decoding_at_once_gives(answer):
    pieces = pieces_of(ByteTokenizer(), "é", answer)
    assert "".join(pieces) == answer.decode("utf-8", "replace")


def test_random_bytes_join_to_what_decoding_at_once_gives():
    random = np.random.default_rng(0)
    likely = np.array([0x41, 0x80, 0x9F, 0xA0, 0xC3, 0xE2, 0xED, 0xF0, 0xF4, 0xFF, 256])  # 256 is <eos>, without text
    for _ in range(100):
        answer = random.choice(likely, 12)
        expected = bytes(i for i in answer.tolist() if i < 256).decode("utf-8", "replace")
        assert "".join(pieces_of(ByteTokenizer(), "a", answer)) == expected


@pytest.mark.parametrize("tokenizer", [
    ByteTokenizer(), CharTokenizer("\n abcé😀"), CharTokenizer("abcé😀 "), WordTokenizer(["<eos>", "a", "<unk>", "cé"]),
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


def test_a_continuation_ends_before_the_stop():
    """However the text is cut into pieces; of these each is shown as soon as it is no beginning of the stop."""
    random = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(random.choice(["a", "b"], 12))
        stop = "".join(random.choice(["a", "b"], random.integers(1, 5)))
        cuts = sorted(random.integers(0, 13, 4).tolist())
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12])]
        closed = []

        def spoken():
            try:
                yield from pieces
            finally:
                closed.append(True)

        assert "".join(main.pieces_before(stop, spoken())) == text.partition(stop)[0] and closed
    shown = main.pieces_before("\n\n", iter_of(["a", "\n", "b\n", "\nc", "d"]))
    assert [piece for piece in shown if piece] == ["a", "\nb"]
    assert pieces_of(ByteTokenizer(), "", b"one. two. three", stop="two") == list("one. ")


def iter_of(values):
    yield from values


def test_words_come_one_by_one_with_their_spaces():
    vocabulary = ["<eos>", "<unk>", "to", "be", "or"]
    tokenizer = WordTokenizer(vocabulary)
    answer = [vocabulary.index(word) for word in ["to", "be", "<eos>", "or", "<unk>", "<eos>"]]
    assert pieces_of(tokenizer, "be", answer) == [" to", " be", "\n", "or", " <unk>", "\n"]
    assert pieces_of(tokenizer, "", answer) == ["to", " be", "\n", "or", " <unk>", "\n"]


@pytest.mark.parametrize("tokenizer", [
    ByteTokenizer(), CharTokenizer.train(["a\n"]), CharTokenizer.train(["no line end"]), WordTokenizer.train(["a b\n"]),
], ids=["byte", "char", "char without line end", "word"])  # fmt: skip
def test_a_real_model_continues_an_empty_prompt(tokenizer):
    given, replies = flags(max_tokens=20, temperature=1.0, top_k=0), []
    for _ in range(2):
        conversation = main.Conversation(tokenizer, make_model(vocab_size=tokenizer.vocab_size))
        replies.append("".join(conversation.reply("", given, 1)))
    assert replies[0] == replies[1] != ""


def test_what_was_said_before_counts():
    """A reply is what a fresh conversation on the whole text would give, over many turns and past the context."""
    tokenizer, given = ByteTokenizer(), flags(max_tokens=5, temperature=1.0)
    for context_size in (12, 64):
        model = make_model(context_size, vocab_size=257)
        conversation = main.Conversation(tokenizer, model)
        for line in ("ab", "", "cdé", "x" * 20):
            before = conversation.text + list(("\n" * bool(conversation.text) + line).encode())
            list(conversation.reply(line, given, 3))
            assert conversation.text[: len(before)] == before and len(conversation.text) == len(before) + 5
            if len(before) <= context_size - 5:  # else windows begin elsewhere
                assert conversation.text == before + tokens_of(model, before, 5, 3, temperature=1.0, top_k=given.top_k)
    assert re.fullmatch(r"[\d,.]+ tokens/s", conversation.describe_speed())


def test_an_interrupt_ends_a_continuation():
    interrupts, model = SimpleNamespace(received=None), make_model(context_size=64, vocab_size=257)
    conversation = main.Conversation(ByteTokenizer(), model)
    reply = conversation.reply("x", flags(max_tokens=60, temperature=0), 0, interrupts)
    next(reply), next(reply)
    interrupts.received = 2
    assert "".join(reply) == ""
    assert len(conversation.text) <= 4, "what the reader has not seen was not said"
