"""Files of prompts: each is continued as main.py continues it alone, and a rerun goes on."""

import fcntl
import itertools
import json
import signal

import main
import numpy as np
import pytest
from conftest import ROOT, Script, flags, ids, run, run_extra, start
from datasets import ByteTokenizer, PackageTokenizer

from extras.batch import answer_batch

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
    line = [source, "--output", path, "--save_dir", folder]
    run_extra("batch", *line, "--max_tokens", 12, *arguments)
    lines = path.read_text().removesuffix("\n").split("\n")
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("temperature", [0, 1])
def test_file_of_prompts(model, temperature, tmp_path):
    hot = ["--temperature", temperature]
    lines = answers(model, tmp_path / "out.jsonl", *hot, "--num_samples", 2, "--seed", 3)
    assert [line["prompt"] for line in lines[::2]] == PROMPTS
    assert [line["seed"] for line in lines] == list(range(3, 3 + 12))
    for line in lines[::3]:
        alone = ["--prompt", line["prompt"], "--seed", line["seed"], *hot, "--max_tokens", 12]
        out, _ = run(*alone, "--save_dir", model)
        assert out == line["completion"] + "\n"
        assert line["checkpoint"] == ids(model)[0]
        assert len(line["tokens"]) == 12
        assert line.keys() >= main.FLAGS["sampling"].keys() - {"num_samples", "draft"}


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


def test_a_reader_that_leaves(byte_model, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the\n" * 1000)  # more than a pipe takes
    line = ["-m", "extras.batch", path, "--max_tokens", 1, "--save_dir", byte_model]
    process = start(*line, program=[], cwd=ROOT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 1
    assert "pipe" not in process.stderr.read()


def test_ctrl_c_shows_no_traceback(byte_model, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the\n" * 10_000)
    line = ["-m", "extras.batch", path, "--save_dir", byte_model]
    process = start(*line, program=[], cwd=ROOT)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert err.count("\n") == 1, "the checkpoint alone was named"


def test_file_of_prompts_is_gone_on_with(word_model, tmp_path):
    path = tmp_path / "out.jsonl"
    whole = answers(word_model, path)
    data = path.read_bytes()
    for size in (0, 3, len(data) // 2, len(data) - 1, len(data)):
        path.write_bytes(data[:size])
        assert answers(word_model, path) == whole
        assert path.read_bytes() == data


@pytest.mark.parametrize("typed", [
    ["--seed", 43],
    ["--max_tokens", 120],
    ["--temperature", 0.25],
    ["--top_k", 5],
    ["--no-stop_at_end"],
    "other prompts",
], ids=str)  # fmt: skip
def test_answers_to_other_prompts_or_by_other_flags_are_left_alone(byte_model, tmp_path, typed):
    path = tmp_path / "out.jsonl"
    answers(byte_model, path)
    data = path.read_bytes()
    line = [tmp_path / "prompts.txt", "--output", path, "--save_dir", byte_model]
    if typed == "other prompts":
        typed = []
        (tmp_path / "prompts.txt").write_text("the company\n")
    _, err = run_extra("batch", *line, "--max_tokens", 12, *typed, status=2)
    assert "name another --output" in err
    assert path.read_bytes() == data


def test_a_damaged_line_of_answers(word_model, tmp_path):
    path = tmp_path / "out.jsonl"
    answers(word_model, path)
    first, *others = path.read_bytes().splitlines(True)
    data = b"".join([first[:-9] + b"\n", *others])
    path.write_bytes(data)
    line = [tmp_path / "prompts.txt", "--output", path, "--max_tokens", 12]
    _, err = run_extra("batch", *line, "--save_dir", word_model, status=1)
    assert f"line 1 of {path} is damaged" in err.splitlines()[-1]
    assert path.read_bytes() == data


def test_two_processes_do_not_write_one_file(word_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("the company\n")
    path = tmp_path / "out.jsonl"
    line = [tmp_path / "prompts.txt", "--output", path, "--max_tokens", 12]
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _, err = run_extra("batch", *line, "--save_dir", word_model, status=2)
        assert f"{path} is being written by another process" in err.splitlines()[-1]
        assert not path.read_bytes()
    run_extra("batch", *line, "--save_dir", word_model)
    assert len(path.read_bytes().splitlines()) == 1


def test_answers_to_stdout(word_model, tmp_path):
    lines = answers(word_model, tmp_path / "out.jsonl")
    line = [tmp_path / "prompts.txt", "--save_dir", word_model]
    out, _ = run_extra("batch", *line, "--max_tokens", 12)
    assert [json.loads(line) for line in out.splitlines()] == lines
