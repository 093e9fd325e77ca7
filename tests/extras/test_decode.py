"""Many texts together, a draft that proposes, and files of prompts.

The oracle is main.py's Decoder, which continues one text: all else has to give the same tokens.
"""

import fcntl
import itertools
import json
import math
import re
from types import SimpleNamespace

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import TEXT, TINY, Constant, Script, flags, ids, run, start
from datasets import ByteTokenizer, PackageTokenizer, UsageError
from test_sampling import DISTRIBUTIONS, make_model, tokens_of

from extras.results import append_lines, json_line
from extras.decode import SAMPLING_FLAGS, BatchDecoder, SpeculativeDecoder, answer_batch


CHI_SQUARED = {1: 10.83, 2: 13.82, 4: 18.47}  # by degrees of freedom: a chance of 1 in 1,000


def assert_distributed(counts, weights):
    """So often each was drawn as befits these weights, but for chance."""
    weights = np.array(weights)
    expected = weights / weights.sum() * counts.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    squares = (counts - expected)[possible] ** 2
    chi_squared = (squares / expected[possible]).sum()
    assert chi_squared < CHI_SQUARED[possible.sum() - 1]


# ---- Many texts together ------------------------------------------------------------------------


@pytest.mark.parametrize("rules, weights", DISTRIBUTIONS, ids=str)
def test_what_is_drawn_has_the_right_distribution(rules, weights):
    draws = 100_000
    logits = [math.log(weight) for weight in (4, 1, 3, 2, 0.5)]
    given = flags(**dict(temperature=1.0, top_k=0) | rules)
    texts = [[4, 0] for _ in range(draws)]
    decoder = BatchDecoder(Constant(logits), texts)
    [drawn] = decoder.generate(1, given, range(draws))
    assert [text[2] for text in texts] == drawn
    assert_distributed(np.bincount(drawn, minlength=5), weights)


@pytest.mark.parametrize("context_size", [1, 7, 16])
@pytest.mark.parametrize("rules", [
    dict(),
    dict(temperature=1.0),
    dict(temperature=0.7, repetition_penalty=1.5, top_p=0.9),
])  # fmt: skip
def test_texts_together_are_continued_like_each_alone(context_size, rules):
    model = make_model(context_size)
    random = np.random.default_rng(1)
    prompts = [random.integers(31, size=length).tolist() for length in (1, 3, 3, 7, 16, 40)]
    texts = [list(prompt) for prompt in prompts]
    given = flags(**dict(temperature=0, top_k=0) | rules)
    together = list(BatchDecoder(model, texts).generate(40, given, range(6)))
    for row, prompt in enumerate(prompts):
        assert [ids[row] for ids in together] == tokens_of(model, prompt, 40, seed=row, **rules)


def test_a_text_can_be_cut_and_go_on_otherwise():
    model = make_model(context_size=16)
    text = [1, 2, 3, 4, 5, 6]
    decoder = BatchDecoder(model, [text])
    for keep, more in ((6, []), (3, [7, 8]), (4, [9]), (1, []), (1, [4] * 20), (2, [3])):
        decoder.cut(keep)
        text += more
        window = text
        if len(text) > 16:
            window = text[-8:]
        fresh = np.array(model(mx.array([window]))[:, -1:])
        np.testing.assert_allclose(np.array(decoder.logits()), fresh, rtol=0, atol=1e-4)


# ---- Drafts -------------------------------------------------------------------------------------


def speculated(model, draft, prompt, count, seed=0, **values):
    text = list(prompt)
    decoder = SpeculativeDecoder(model, draft, text)
    rules = flags(**dict(temperature=0, top_k=0) | values)
    given = list(decoder.generate(count, rules, seed))
    assert text == [*prompt, *given]
    assert len(given) == count
    return given, decoder


@pytest.mark.parametrize("context_size, draft_context", [
    (1, 8),
    (2, 2),
    (7, 4),
    (8, 1),
    (8, 16),
    (64, 64),
])  # fmt: skip
@pytest.mark.parametrize("prompt_length", [1, 8, 20])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_speculation_changes_no_token(context_size, draft_context, prompt_length, temperature):
    model = make_model(context_size)
    prompt = np.random.default_rng(2).integers(31, size=prompt_length).tolist()
    # The first draft has the model's weights, the second has others.
    for seed, penalty in ((0, 1.0), (1, 1.3)):
        rules = dict(repetition_penalty=penalty, temperature=temperature)
        draft = make_model(draft_context, seed=seed)
        tokens, decoder = speculated(model, draft, prompt, 24, **rules)
        assert tokens == tokens_of(model, prompt, 24, **rules)
        if seed == 0 and context_size == draft_context == 64:  # a draft that is the model
            assert decoder.accepted == decoder.proposed > 0, "it is always right"


# Probabilities of the next token after each.
WANTED = np.array([[0.5, 0.1, 0.4], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]])
DRAFTED = np.array([[0.2, 0.7, 0.1], [0.4, 0.2, 0.4], [0.3, 0.3, 0.4]])


def markov_chain(table):
    """A model whose next token depends on the last one by a table of probabilities."""
    return Script(lambda token: np.log(table[token]).tolist(), 64)


@pytest.mark.parametrize("rules, wanted", [
    (dict(), WANTED),
    (dict(temperature=0.5), WANTED**2),
    (dict(top_k=2), WANTED * [[1, 0, 1], [1, 1, 1], [1, 1, 1]]),  # ties stay
], ids=str)  # fmt: skip
def test_speculation_leaves_the_distribution_as_it_is(rules, wanted):
    """Pairs of successive tokens in 2,000, of a Markov chain whose transitions are known."""
    model = markov_chain(WANTED)
    draft = markov_chain(DRAFTED)
    tokens, decoder = speculated(model, draft, [0], 2_000, **dict(temperature=1.0) | rules)
    assert 100 < decoder.accepted < 0.9 * decoder.proposed, "both ways were taken"
    counts = np.zeros((3, 3))
    for before, after in zip(tokens, tokens[1:]):
        counts[before, after] += 1
    for state in range(3):
        assert_distributed(counts[state], wanted[state])


def test_a_conversation_with_a_draft():
    for context_size in (12, 64):
        model = make_model(context_size, vocab_size=257)
        draft = make_model(8, vocab_size=257, seed=1)
        conversation = main.Conversation(ByteTokenizer(), model, draft)
        list(conversation.reply("ab", flags(max_tokens=9, temperature=0), 3))
        prompt = list(b"ab")
        reply = tokens_of(model, prompt, 9, top_k=flags().top_k)
        assert conversation.text == [*prompt, *reply]
        line = conversation.describe_speed()
        assert "tokens/s" in line and "accepted" in line


def test_an_interrupt_ends_a_continuation_with_a_draft():
    interrupts = SimpleNamespace(received=None)
    model = make_model(context_size=64, vocab_size=257)
    conversation = main.Conversation(ByteTokenizer(), model, model)
    reply = conversation.reply("x", flags(max_tokens=60, temperature=0), 0, interrupts)
    next(reply)
    next(reply)
    interrupts.received = 2
    assert "".join(reply) == ""
    assert len(conversation.text) <= 4, "what the reader has not seen was not said"


@pytest.fixture(scope="session")
def two_models(tmp_path_factory):
    """A folder with two models of one text, the last of them smaller, and their ids."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "text.txt").write_text(TEXT)
    line = ["--text", folder / "text.txt", *TINY, "--tokenizer", "word", "--num_iters", 60]
    line += ["--learning_rate", 0.01, "--lr_warmup", 10, "--save_dir", folder / "lm"]
    run(*line, "--dim", 16)
    run(*line, "--dim", 8)
    small, large = ids(folder / "lm")
    return folder / "lm", large, small


def test_draft(two_models):
    folder, large, small = two_models
    line = ["--identifier", large, "--save_dir", folder, "--max_tokens", 40]
    cold = ["--prompt", "the company", *line, "--temperature", 0]
    plain, _ = run(*cold)
    out, err = run(*cold, "--draft", small[:8])
    assert out == plain
    assert re.search(r"[\d.]+ tokens/s, \d+% of the draft's \d+ proposals accepted", err)
    hot = ["--prompt", "the", *line, "--temperature", 1, "--draft", small]
    out, _ = run(*hot)
    again, _ = run(*hot)
    assert out and again == out
    session = ["--inference", *line, "--temperature", 0, "--draft", small]
    out, _ = run(*session, input="the company\n")
    assert out.startswith(plain)


# ---- Files of prompts ---------------------------------------------------------------------------


PROMPTS = [
    "the company",
    "",
    "fox",
    "a lazy dog jumps over the quick brown fox " * 4,
    "the company",
    "zebra — ü",
]


def answers(folder, path, *arguments):
    """The lines of JSON that a file of PROMPTS gives in `path`."""
    source = path.parent / "prompts.txt"
    source.write_text("\n".join(PROMPTS) + "\n")
    line = ["--prompts_file", source, "--output", path, "--save_dir", folder]
    run(*line, "--max_tokens", 12, *arguments)
    lines = path.read_text().removesuffix("\n").split("\n")
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("temperature", [0, 1])
def test_file_of_prompts(model, temperature, tmp_path):
    hot = ["--temperature", temperature]
    lines = answers(model, tmp_path / "out.jsonl", *hot, "--num_samples", 2, "--seed", 3)
    prompts = []
    for prompt in PROMPTS:
        prompts += [prompt, prompt]
    assert [line["prompt"] for line in lines] == prompts
    assert [line["seed"] for line in lines] == list(range(3, 3 + 12))
    for line in lines[::3]:
        alone = ["--prompt", line["prompt"], "--seed", line["seed"], *hot, "--max_tokens", 12]
        out, _ = run(*alone, "--save_dir", model)
        assert out == line["completion"] + "\n"
        assert line["checkpoint"] == ids(model)[0]
        assert len(line["tokens"]) == 12


@pytest.mark.parametrize("stop", ["o", "\n", "e o"])
def test_prompts_end_before_the_stop(model, stop, tmp_path):
    """Together as alone.

    Their tokens are those of the full continuation up to where the stop was complete.
    """
    full = answers(model, tmp_path / "full.jsonl", "--temperature", 1)
    lines = answers(model, tmp_path / "out.jsonl", "--temperature", 1, "--stop", stop)
    for line, other in zip(lines, full):
        assert line["completion"] == other["completion"].partition(stop)[0]
        assert line["stop"] == stop
        count = len(line["tokens"])
        assert line["tokens"] == other["tokens"][:count]
        if count < 12:
            assert stop in other["completion"]
        alone = ["--prompt", line["prompt"], "--seed", line["seed"], "--temperature", 1]
        out, _ = run(*alone, "--max_tokens", 12, "--stop", stop, "--save_dir", model)
        assert out == line["completion"] + "\n"
    assert any(len(line["tokens"]) < 12 for line in lines) or stop == "e o"


END_TOKENS = [ByteTokenizer(), PackageTokenizer.train(["a"], 257)]  # without a text, and with one


@pytest.mark.parametrize("tokenizer", END_TOKENS, ids=["byte", "bpe"])
def test_texts_end_together_as_alone_and_with_a_draft(tokenizer):
    """At their end token, which is one of their tokens but no part of the completion."""
    random = np.random.default_rng(0)
    scripts = []
    for _ in range(2):  # a model and its draft
        logits = random.normal(0, 3, (257, 257))
        logits[:, tokenizer.eos] += 6
        scripts.append(Script(logits.tolist().__getitem__, 64))
    model, draft = scripts
    jobs = [{"prompt": "abcdefgh"[i % 8], "seed": i} for i in range(24)]
    given = flags(max_tokens=6, temperature=1.0, top_k=0)
    lines = answer_batch(model, tokenizer, jobs, given)
    on = answer_batch(model, tokenizer, jobs, flags(**given.given, stop_at_end=False))
    for line, longer in zip(lines, on):
        assert len(longer["tokens"]) == 6
        before = itertools.takewhile(lambda token: token != tokenizer.eos, longer["tokens"])
        kept = list(before)
        assert line["completion"] == tokenizer.decode(kept)
        assert line["tokens"] == longer["tokens"][: len(kept) + 1]
        for other in (None, draft):
            conversation = main.Conversation(tokenizer, model, other)
            pieces = conversation.reply(line["prompt"], given, line["seed"])
            assert "".join(pieces) == line["completion"]
            assert conversation.text == [*tokenizer.encode(line["prompt"]), *line["tokens"]]
    ended = [len(line["tokens"]) < 6 for line in lines]
    assert any(ended) and not all(ended)


def test_no_control_character_is_written_raw():
    """The lines may go to a terminal."""
    content = {"prompt": "a\tb\x1b]0;x\x07\x7f\x9b2Jé\ud800"}
    line = json_line(content)
    assert line.decode().isprintable()
    assert json.loads(line) == content


def test_a_stop_that_is_not_utf8(byte_model, tmp_path):
    """It never comes, and is a string of JSON all the same."""
    for _ in range(2):  # the second one finds all prompts answered
        lines = answers(byte_model, tmp_path / "out.jsonl", "--stop", "\udcff")
        for line in lines:
            assert line["stop"] == "\udcff"
            assert len(line["tokens"]) == 12


@pytest.mark.parametrize("stop", ["\ufffd", "ü", "\ufffdx"])
@pytest.mark.parametrize("data", ["für".encode(), b"f\xc3x", b"f\xff", b"f\xc3"])
def test_a_stop_that_stands_for_half_a_character(stop, data):
    """Together and alone alike: the first half of a character is not yet one that is invalid."""

    def rows(token):  # of logits: after each byte of the data, the next one
        rest = data[data.find(token) + 1 :]
        return [float(i == (rest[0] if rest else ord("."))) for i in range(257)]

    tokenizer = ByteTokenizer()
    values = flags(max_tokens=len(data) - 1, stop=stop, temperature=0, top_k=0)
    [line] = answer_batch(Script(rows), tokenizer, [{"prompt": "f", "seed": 1}], values)
    alone = main.Conversation(tokenizer, Script(rows)).reply("f", values, 1)
    assert line["completion"] == "".join(alone)


def test_the_search_for_the_stop_decodes_each_token_a_few_times(byte_model, monkeypatch):
    """And not the whole text after each."""
    contents = main.list_checkpoints(byte_model)[0].open()
    model = contents.load_model()
    tokenizer = contents.tokenizer
    decode = tokenizer.decode
    decoded = []

    def watched(ids):
        decoded.extend(ids)
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", watched)
    jobs = [{"prompt": "the company", "seed": 1}, {"prompt": "a lazy", "seed": 1}]
    lines = answer_batch(model, tokenizer, jobs, flags(max_tokens=300, stop="never", temperature=1))
    count = sum(len(line["tokens"]) for line in lines)
    assert count == 600
    assert len(decoded) < 10 * count


def test_a_reader_that_leaves(byte_model, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the\n" * 1000)  # more than a pipe takes
    process = start("--prompts_file", path, "--max_tokens", 1, "--save_dir", byte_model)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 1
    assert "pipe" not in process.stderr.read()


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: data[:-1],
    lambda data: b"",
    lambda data: data[:3],
    lambda data: data,
], ids=["half", "last line end", "all", "first line", "nothing"])  # fmt: skip
def test_file_of_prompts_is_gone_on_with(word_model, damage, tmp_path):
    path = tmp_path / "out.jsonl"
    whole = answers(word_model, path)
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert answers(word_model, path) == whole
    assert path.read_bytes() == data


def test_answers_to_other_prompts_are_left_alone(word_model, tmp_path):
    path = tmp_path / "out.jsonl"
    answers(word_model, path)
    data = path.read_bytes()
    source = tmp_path / "prompts.txt"
    line = ["--prompts_file", source, "--output", path, "--save_dir", word_model]
    for prompts, seed in (("other\n", 42), ("the company\n", 42), ("\n".join(PROMPTS), 43)):
        source.write_text(prompts)
        _, err = run(*line, "--max_tokens", 12, "--seed", seed, status=2)
        assert "name another" in err
        assert path.read_bytes() == data


@pytest.mark.parametrize("typed", [
    ["--max_tokens", 1],
    ["--max_tokens", 120],
    ["--temperature", 0.25],
    ["--top_k", 5],
    ["--top_p", 0.5],
    ["--min_p", 0.1],
    ["--repetition_penalty", 1.5],
    ["--quantize", 8],
    ["--no-stop_at_end"],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("lines", [1, len(PROMPTS)])
def test_answers_by_other_flags_are_left_alone(byte_model, tmp_path, typed, lines, monkeypatch):
    # The weights are not quantized: the model is too small, and it is the flag that counts.
    monkeypatch.setattr("extras.quantize.quantize", lambda *_, **__: None)
    source = tmp_path / "prompts.txt"
    source.write_text("\n".join(PROMPTS) + "\n")
    path = tmp_path / "out.jsonl"
    line = ["--prompts_file", source, "--output", path, "--save_dir", byte_model]
    line = [*map(str, line), "--max_tokens", "12"]
    assert main.main(line) == 0
    data = b"".join(path.read_bytes().splitlines(True)[:lines])
    path.write_bytes(data)
    assert main.main([*line, *map(str, typed)]) == 2
    assert path.read_bytes() == data


def test_lines_name_all_flags_that_shape_them(word_model, tmp_path):
    [line, *_] = answers(word_model, tmp_path / "out.jsonl", "--top_p", 0.5)
    assert line["max_tokens"] == 12
    assert line["top_p"] == 0.5
    assert line["quantize"] is None
    without = {"inference", "prompt", "prompts_file", "output", "num_samples", "draft"}
    assert main.FLAGS["sampling"].keys() - without == set(SAMPLING_FLAGS) - {"quantize"}


def test_a_damaged_line_of_answers(word_model, tmp_path):
    path = tmp_path / "out.jsonl"
    answers(word_model, path)
    first, *others = path.read_bytes().splitlines(True)
    data = b"".join([first[:-9] + b"\n", *others])
    path.write_bytes(data)
    line = ["--prompts_file", tmp_path / "prompts.txt", "--output", path, "--max_tokens", 12]
    _, err = run(*line, "--save_dir", word_model, status=1)
    assert f"line 1 of {path} is damaged" in err.splitlines()[-1]
    assert path.read_bytes() == data


def test_two_processes_do_not_write_one_file(word_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("the company\n")
    path = tmp_path / "out.jsonl"
    line = ["--prompts_file", tmp_path / "prompts.txt", "--output", path, "--max_tokens", 12]
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _, err = run(*line, "--save_dir", word_model, status=2)
        assert f"{path} is being written by another process" in err.splitlines()[-1]
        assert not path.read_bytes()
    run(*line, "--save_dir", word_model)
    assert len(path.read_bytes().splitlines()) == 1


def test_a_device_is_not_read():
    """/dev/full, say, has no end."""
    with pytest.raises(UsageError, match="/dev/null is not a regular file"):
        append_lines("/dev/null", [{"prompt": "a"}])


def test_answers_to_stdout(word_model, tmp_path):
    lines = answers(word_model, tmp_path / "out.jsonl")
    line = ["--prompts_file", tmp_path / "prompts.txt", "--save_dir", word_model]
    out, _ = run(*line, "--max_tokens", 12)
    assert [json.loads(line) for line in out.splitlines()] == lines
