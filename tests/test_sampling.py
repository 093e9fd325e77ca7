"""Sampling on distributions worked out by hand, and generation against uncached passes.

And text, given piece by piece.
"""

import math
from argparse import Namespace

import main
import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from conftest import flags, make_model
from datasets import ByteTokenizer, CharTokenizer, PackageTokenizer, WordTokenizer
from tokenizers import decoders, models


class Script:
    """A model whose logits [V] depend on the last token alone: `rows`, a function of it.

    They may be truth values: of the only token that can follow.
    """

    def __init__(self, rows, context_size=8):
        self.rows = rows
        self.config = Namespace(context_size=context_size)
        self.model = Namespace(layers=[None])  # one layer, as its KVCache says what is read

    def __call__(self, tokens, caches, logits_to_keep):
        length = tokens.shape[1]
        assert logits_to_keep <= length <= self.config.context_size, "more than a model can read"
        for cache in caches:
            cache.offset = cache.offset + length
        logits = []
        for row in tokens.tolist():
            logits.append([self.rows(token) for token in row[-logits_to_keep:]])
        return mx.array(np.array(logits, np.float32))


# One token


# {value: how many of the probabilities 0.1, 0.4, 0.2, 0.3 are kept}
KEPT = {
    main.keep_top_k: {0: 4, 1: 1, 3: 3, 50: 4},
    main.keep_top_p: {0.0: 1, 0.39: 1, 0.41: 2, 0.71: 3, 1.0: 4},
    main.keep_min_p: {0.0: 4, 0.24: 4, 0.26: 3, 0.76: 1},
}


@pytest.mark.parametrize("keep", KEPT)
def test_what_is_kept(keep):
    """The likeliest; of four equal ones, all: ties with the last stay."""
    probabilities = [[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]
    logits = np.log(probabilities).astype(np.float32) - 3
    likeliest = [1, 3, 2, 0]
    for value, count in KEPT[keep].items():
        result = np.array(keep(mx.array(logits), value))
        is_kept = result > -math.inf
        assert np.flatnonzero(is_kept[0]).tolist() == sorted(likeliest[:count])
        assert is_kept[1].all()
        np.testing.assert_array_equal(result[is_kept], logits[is_kept])


def test_a_penalty_counts_what_the_window_holds():
    """The likeliest token, but for what a window of one or two tokens has: half of its logit."""
    model = Script(lambda token: [4.0, 3.0, 1.0], context_size=2)
    assert tokens_of(model, [0], 6, repetition_penalty=2.0) == [1, 0, 1, 0, 1, 0]


# Many tokens


def tokens_of(model, prompt, count, seed=0, **values):
    """`count` tokens that follow one prompt."""
    text = list(prompt)
    rules = flags(**dict(temperature=0, top_k=0) | values)
    given = list(main.Decoder(model, text).generate(count, rules, seed))
    assert text == [*prompt, *given]
    return given


@pytest.mark.parametrize("context_size", [1, 7, 8])
@pytest.mark.parametrize("prompt_length", [1, 8, 20])
def test_each_greedy_token_is_that_of_a_fresh_pass(context_size, prompt_length):
    model = make_model(context_size)
    random = np.random.default_rng(prompt_length)
    prompt = random.integers(31, size=prompt_length).tolist()
    tokens = tokens_of(model, prompt, 30)
    window = list(prompt)
    for token in tokens:
        if len(window) > context_size:  # full: the last half is kept
            half = max(1, context_size // 2)
            window = window[-half:]
        logits = np.array(model(mx.array([window]))[0, -1])
        # A cache may round differently, which decides only where the best two are as good as equal.
        assert logits[token] >= logits.max() - 1e-4
        window.append(token)


@pytest.mark.parametrize("context_size", [16, 64])
def test_a_long_prompt_is_read_in_parts(context_size, monkeypatch):
    model = make_model(context_size)
    prompt = np.random.default_rng(1).integers(31, size=50).tolist()
    at_once = tokens_of(model, prompt, 30)
    monkeypatch.setattr(main, "TOKENS_PER_PASS", 3)
    assert tokens_of(model, prompt, 30) == at_once


def test_a_signal_ends_a_long_prompt(monkeypatch):
    """After the part that is read; the text goes on from there."""
    monkeypatch.setattr(main, "TOKENS_PER_PASS", 8)
    given = flags(max_tokens=5, temperature=0)
    conversation = main.Conversation(ByteTokenizer(), make_model(64, vocab_size=257))
    reply = conversation.reply("x" * 40, given, 0, Namespace(stop_signal=2))
    assert [*reply] == []
    assert conversation.decoder.num_read == 8
    answer = [*conversation.reply("", given, 0)]
    fresh = main.Conversation(ByteTokenizer(), make_model(64, vocab_size=257))
    assert answer == [*fresh.reply("x" * 40 + "\n", given, 0)]


def test_drawn_tokens_are_independent_of_those_before():
    model = Script(lambda token: [0.0, 0.0, 0.0, 0.0])
    tokens = np.array(tokens_of(model, [0], 3200, seed=6, temperature=1.0))
    pairs = tokens[0::2] * 4 + tokens[1::2]
    counts = np.bincount(pairs, minlength=16)
    expected = 100  # of each
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 37.70  # 15 degrees of freedom, a chance of 1 in 1,000


# Text


def pieces_of(tokenizer, prompt, ids, stop=None):
    """What a model that answers with these ids, whatever it is asked, adds to a prompt.

    Piece by piece.
    """
    ids = list(map(int, ids))
    answers = iter(ids)

    def next_of_ids(token):
        return np.arange(tokenizer.vocab_size) == next(answers)

    conversation = main.Conversation(tokenizer, Script(next_of_ids))
    given = flags(max_tokens=len(ids), temperature=0, stop=stop, stop_at_end=False)
    pieces = [piece for piece in conversation.reply(prompt, given, 0) if piece]
    if not stop:
        answered = len(conversation.ids) - len(ids)
        assert conversation.ids[answered:] == ids
    elif tokenizer.kind in ("byte", "char", "bpe"):  # later, the model reads what was shown
        begin = tokenizer.decode(main.encode_prompt(tokenizer, prompt))
        assert tokenizer.decode(conversation.ids) == begin + "".join(pieces)
    return pieces


def test_characters_of_many_bytes_come_whole():
    # U+FFFD itself could be the start of another.
    characters = ["a", "é", "€", "😀", "\n", "\u0301", "b", "\ufffdc"]
    text = "".join(characters)
    for prompt in ("", "x", "né", "long enough to fill the context, 😀"):
        assert pieces_of(ByteTokenizer(), prompt, text.encode()) == characters


def sentencepiece():
    """As Llama 2's: a line end and what is no piece are bytes; one that is broken breaks all."""
    pieces = ["<unk>", "▁", "a", "b", "▁the", "é", "</s>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    package = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    start = decoders.Strip(" ", 1, 0)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), start]
    package.decoder = decoders.Sequence(parts)
    return PackageTokenizer(package.to_str(), "file")


def unigram():
    pieces = [("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("a", -3.0), ("é", -3.0)]
    package = tokenizers.Tokenizer(models.Unigram(pieces, 0))
    package.decoder = decoders.Metaspace()
    return PackageTokenizer(package.to_str(), "file")


def wordpiece():
    """As BERT's, which joins a point to the word before it."""
    pieces = ["[UNK]", "the", "##m", "a", ".", "n", "'", "t", "!"]
    package = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}))
    package.decoder = decoders.WordPiece()
    return PackageTokenizer(package.to_str(), "file")


TOKENIZERS = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer("\n abcé😀"),
    "char without line end": CharTokenizer("abcé😀 "),
    "word": WordTokenizer(["<eos>", "a", "<unk>", "cé"]),
    "bpe": PackageTokenizer.train(["a b\né 😀 the them"] * 9, 280),
    "sentencepiece": sentencepiece(),
    "unigram": unigram(),
    "wordpiece": wordpiece(),
}
FIRST_BYTE = {"byte": 0, "sentencepiece": 7}  # their id of the byte 0
# Which bytes of UTF-8 may follow one another is random then.
LIKELY_BYTES = [0x41, 0x0A, 0x80, 0x9F, 0xA0, 0xC3, 0xE2, 0xED, 0xF0, 0xF4, 0xFF]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_join_to_what_decoding_at_once_gives(kind):
    """And end before the stop, wherever in them it begins and ends."""
    tokenizer = TOKENIZERS[kind]
    random = np.random.default_rng(0)
    for i in range(150):
        prompt = random.choice(["a", "a b", "b a\n", "\n\n", "zz a", "a cé 😀", "a zz"])
        begin = tokenizer.encode(prompt).tolist()
        if not begin:
            continue
        answer = random.integers(tokenizer.vocab_size, size=12).tolist()
        if kind in FIRST_BYTE and i % 3:
            answer[4:] = (FIRST_BYTE[kind] + random.choice(LIKELY_BYTES, 8)).tolist()
        if i % 5 == 0:
            answer = tokenizer.encode("a é 😀\nthe a").tolist() + answer[:3]
        typed = len(tokenizer.decode(begin))
        whole = tokenizer.decode(begin + answer)[typed:]
        assert "".join(pieces_of(tokenizer, prompt, answer)) == whole
        if whole:
            start = random.integers(len(whole))
            stop = whole[start : start + random.integers(1, 4)]
            shown = "".join(pieces_of(tokenizer, prompt, answer, stop=stop))
            assert shown == whole.partition(stop)[0]


def test_a_continuation_ends_before_the_stop():
    """Each piece is shown once it is no beginning of it, at the end of the answer at the latest."""
    assert pieces_of(ByteTokenizer(), "", b"aab", stop="bb") == ["a", "a", "b"]
    assert pieces_of(ByteTokenizer(), "", b"a\nb\n\ncd", stop="\n\n") == ["a", "\nb"]
    assert pieces_of(ByteTokenizer(), "", b"one. two. three", stop="two") == list("one. ")


def test_a_text_ends_at_its_end_token():
    """And what is said then begins another, without a line end before it."""
    tokenizer = ByteTokenizer()
    eos = tokenizer.eos
    successors = {ord("q"): ord("s"), ord("s"): ord("o"), ord("o"): eos, eos: ord("n")}

    def rows(token):
        return np.arange(257) == successors.get(token, ord("."))

    given = flags(max_tokens=6, temperature=0)
    conversation = main.Conversation(tokenizer, Script(rows, 64))
    for prompt, reply in (("q", "so"), ("s", "o"), ("", "n....."), ("q", "so")):
        assert "".join(conversation.reply(prompt, given, 0)) == reply
    assert conversation.ids == [*b"qso", eos, *b"so", eos, *b"n.....\nqso", eos]
    conversation = main.Conversation(tokenizer, Script(rows, 64))
    on = flags(max_tokens=6, temperature=0, stop_at_end=False)
    assert "".join(conversation.reply("q", on, 0)) == "son.."  # the end token has no text
    assert conversation.ids == [*b"qso", eos, *b"n.."]


def test_words_come_one_by_one_with_their_spaces():
    tokenizer = WordTokenizer(["<eos>", "<unk>", "to", "be", "or"])
    answer = tokenizer.encode("to be\nor <unk>\n")
    assert pieces_of(tokenizer, "be", answer) == [" to", " be", "\n", "or", " <unk>", "\n"]
    assert pieces_of(tokenizer, "", answer) == ["to", " be", "\n", "or", " <unk>", "\n"]


def test_what_was_said_before_counts():
    """A reply is what a fresh conversation on the whole text would give.

    Over many turns and past the context.
    """
    given = flags(max_tokens=5, temperature=1.0)
    rules = dict(temperature=1.0, top_k=given.top_k)
    for context_size in (12, 64):
        model = make_model(context_size, vocab_size=257)
        conversation = main.Conversation(ByteTokenizer(), model)
        for line in ("ab", "", "cdé", "x" * 20):
            before = list(conversation.ids)
            if before:
                before += b"\n"
            before += line.encode()
            list(conversation.reply(line, given, 3))
            assert conversation.ids[: len(before)] == before
            assert len(conversation.ids) == len(before) + 5
            if len(before) <= context_size - 5:  # else windows begin elsewhere
                expected = tokens_of(model, before, 5, seed=3, **rules)
                assert conversation.ids == before + expected
