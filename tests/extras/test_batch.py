"""Files of prompts: each is continued as main.py continues it alone, and a rerun goes on."""

import fcntl
import json
import re

from conftest import ids, run, run_extra

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
    run_extra("batch", *line, "--max_tokens=12", *arguments)
    lines = path.read_text().removesuffix("\n").split("\n")
    return [json.loads(line) for line in lines]


def test_file_of_prompts(model, tmp_path):
    hot = "--temperature=1"
    lines = answers(model, tmp_path / "out.jsonl", hot, "--num_samples=2", "--seed=3")
    assert [line["prompt"] for line in lines[::2]] == PROMPTS
    assert [line["seed"] for line in lines] == list(range(3, 3 + 12))
    for line in lines[::3]:
        alone = ["--prompt", line["prompt"], "--seed", line["seed"], hot, "--max_tokens=12"]
        out, _ = run(*alone, "--save_dir", model)
        assert out == line["completion"] + "\n"
        assert line["checkpoint"] == ids(model)[0]
        assert len(line["tokens"]) == 12
        assert (line["temperature"], line["top_k"], line["stop"]) == (1, 50, None)


def test_prompts_end_before_the_stop(model, tmp_path):
    """Their tokens are those of the full continuation up to where the stop was complete."""
    full = answers(model, tmp_path / "full.jsonl", "--temperature=1")
    lines = answers(model, tmp_path / "out.jsonl", "--temperature=1", "--stop=o")
    for line, other in zip(lines, full):
        assert line["completion"] == other["completion"].partition("o")[0]
        count = len(line["tokens"])
        assert line["tokens"] == other["tokens"][:count]
        assert count == 12 or "o" in other["completion"]
    assert any(len(line["tokens"]) < 12 for line in lines)


def test_a_prompt_that_is_not_read_whole_is_named(byte_model, tmp_path):
    """Once for all of its samples."""
    path = tmp_path / "prompts.txt"
    path.write_text("fox\n" + "x" * 500)
    line = ["--num_samples=2", "--max_tokens=1", "--save_dir", byte_model]
    _, err = run_extra("batch", path, *line)
    assert re.findall("The prompt's (.*) tokens are more than the context", err) == ["500"]


def test_file_of_prompts_is_gone_on_with(word_model, tmp_path):
    path = tmp_path / "out.jsonl"
    whole = answers(word_model, path)
    data = path.read_bytes()
    for size in (0, 3, len(data) // 2, len(data) - 1, len(data)):
        path.write_bytes(data[:size])
        assert answers(word_model, path) == whole
        assert path.read_bytes() == data


def test_answers_by_other_flags_are_left_alone(byte_model, tmp_path):
    path = tmp_path / "out.jsonl"
    answers(byte_model, path)
    data = path.read_bytes()
    line = [tmp_path / "prompts.txt", "--output", path, "--save_dir", byte_model]
    for typed in ("--seed=43", "--max_tokens=120", "--no-stop_at_end"):
        _, err = run_extra("batch", *line, "--max_tokens=12", typed, status=2)
        assert "name another --output" in err
        assert path.read_bytes() == data


def test_two_processes_do_not_write_one_file(word_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("the company\n")
    path = tmp_path / "out.jsonl"
    line = [tmp_path / "prompts.txt", "--output", path, "--max_tokens=12"]
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _, err = run_extra("batch", *line, "--save_dir", word_model, status=2)
    assert f"{path} is being written by another process" in err.splitlines()[-1]
    assert not path.read_bytes()
