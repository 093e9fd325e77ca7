"""Probe cases: ranks and probabilities beside those of one pass per token."""

import json
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, begin, ids, newest, run_extra, saved

import main

EXAMPLE = ROOT / "tests" / "cases.yaml"
CASES = [
    ("the quick", " brown"),
    ("", "t"),
    ("the lazy", "x"),
    ("o" * 50, "ver"),
    ("😀", "😀"),  # which json.dumps halves
]


def checkpoints_in(path):
    """The checkpoints that a file of results names."""
    results = json.loads(path.read_text())
    return {result["checkpoint"] for result in results}


def test_cases(trained, tmp_path):
    path = tmp_path / "cases.yaml"
    cases = [{"prompt": prompt, "expected": expected} for prompt, expected in CASES]
    path.write_text(json.dumps(cases))  # which is YAML, too
    checkpoint = newest(trained)
    line = [path, "--save_dir", trained, "--identifier", checkpoint.id]
    out, _ = run_extra("cases", *line, "--output", tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    contents = main.read_contents(checkpoint)
    model = contents.load_model()
    tokenizer = contents.tokenizer
    for (prompt, expected), result in zip(CASES, results, strict=True):
        assert (result["prompt"], result["expected"]) == (prompt, expected)
        text = tokenizer.encode(prompt).tolist() or [tokenizer.eos]
        ranks = []
        chance = 1.0
        for token in tokenizer.encode(expected).tolist():
            window_size = 32 - len(expected) + 1 + len(ranks)
            logits = np.array(model(mx.array([text[-window_size:]]))[0, -1], np.float64)
            if not ranks:
                best = np.argsort(-logits)[:5].tolist()
                assert result["top"] == [tokenizer.decode([other]) for other in best]
            ranks.append(int((logits > logits[token]).sum()) + 1)
            chance *= np.exp(logits[token]) / np.exp(logits).sum()
            text.append(token)
        assert result["rank"] == max(ranks)
        assert result["passed"] == (max(ranks) <= 5)
        assert result["probability"] == pytest.approx(chance, rel=1e-3)
    passed = len(re.findall(r"^  pass ", out, re.M))
    assert out.endswith(f"  {passed} of 5 in the top 5\n")
    worst = max(result["rank"] for result in results)
    out, _ = run_extra("cases", *line, "--top_k", worst)
    assert out.endswith(f"  5 of 5 in the top {worst}\n")


def test_a_case_without_a_token(word_model, tmp_path):
    """A space is none to a model of words, which is not asked for the end of the text instead."""
    cases = '- {prompt: the, expected: " "}\n- {prompt: the, expected: "\\n"}\n'
    (tmp_path / "cases.yaml").write_text(cases)
    line = ["cases.yaml", "--top_k=100000", "--output=out.json"]
    out, _ = run_extra("cases", *line, "--save_dir", word_model, cwd=tmp_path)
    space, line_end = json.loads((tmp_path / "out.json").read_text())
    assert (space["rank"], space["probability"], space["passed"]) == (None, None, False)
    assert line_end["passed"]
    assert "FAIL rank      -" in out


def test_the_example_files_of_cases(trained):
    examples = [EXAMPLE, *(ROOT / "extras" / "cases").glob("*.yaml")]
    out, _ = run_extra("cases", *examples, "--identifier=latest", "--save_dir", trained)
    [count] = re.findall(r" of (\d+) in the top 5$", out, re.M)
    assert int(count) == sum(path.read_text().count("\n- {prompt") for path in examples)


def test_patterns_of_runs(trained, tmp_path):
    """Of each run that matches, the newest checkpoint, once."""
    checkpoints = saved(trained)
    last_of = {each.folder.name: each.id for each in reversed(checkpoints)}
    assert len(last_of) == 2
    line = [EXAMPLE, "--output", tmp_path / "out.json", "--save_dir", trained, "--identifier"]
    for patterns, expected in (
        (["text-*", "latest"], set(last_of.values())),
        ([f"*{checkpoints[0].folder.name[-6:]}"], {checkpoints[0].id}),
    ):
        out, _ = run_extra("cases", *line, *patterns)
        assert checkpoints_in(tmp_path / "out.json") == expected
        assert out.count("in the top 5") == len(expected)
    _, err = run_extra("cases", *line, "python-*", status=2)
    assert "--identifier 'python-*' matches no checkpoint" in err


def test_what_cannot_be_opened_is_skipped(trained, tmp_path, text):
    """The others are scored."""
    folder = ["--save_dir", tmp_path / "lm"]
    results = tmp_path / "out.json"
    shutil.copytree(trained, tmp_path / "lm")
    base = ids(trained)[0]
    line = ["--text", text, "--init_from", base, "--lora_rank=2", "--batch_size=4"]
    name, _, _ = begin(*line, "--num_iters=1", "--sample_tokens=2", *folder)
    shutil.rmtree(tmp_path / "lm" / name / "init_from")
    damaged = saved(tmp_path / "lm")[-1]
    damaged.weights_path.write_bytes(b"")
    cases = [EXAMPLE, *folder, "--output", results]
    _, err = run_extra("cases", *cases)
    assert err.count("Skipping ") == 2
    assert f"{name} cannot go on without the model in its folder init_from" in err
    assert f"{damaged} is damaged" in err
    assert checkpoints_in(results) == set(ids(trained)) - {damaged.id}
    run_extra("cases", *cases, "--identifier=latest", status=1)
    assert checkpoints_in(results) == set(ids(trained)) - {damaged.id}
