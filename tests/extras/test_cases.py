"""Probe cases: ranks and probabilities beside those of one pass per token."""

import json
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, begin, ids, run, run_extra, saved

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
    line = [path, "--save_dir", trained, "--output", tmp_path / "out.json"]
    named = ids(trained)[:2]
    out, _ = run_extra("cases", *line, "--identifier", *named)
    assert max(map(len, out.splitlines())) <= 100
    results = json.loads((tmp_path / "out.json").read_text())
    wanted = [checkpoint_id for checkpoint_id in named for _ in CASES]
    assert [result["checkpoint"] for result in results] == wanted
    [checkpoint] = [each for each in saved(trained) if each.id == named[0]]
    contents = checkpoint.open()
    model = contents.load_model()
    tokenizer = contents.tokenizer
    for (prompt, expected), result in zip(CASES, results):
        assert (result["prompt"], result["expected"]) == (prompt, expected)
        text = tokenizer.encode(prompt).tolist() or [tokenizer.eos]
        ranks = []
        chance = 1.0
        for token in tokenizer.encode(expected).tolist():
            window_size = 32 - len(expected) + 1 + len(ranks)
            window = text[-window_size:]
            logits = np.array(model(mx.array([window]))[0, -1], np.float64)
            if not ranks:
                assert result["top"][0] == tokenizer.decode([int(logits.argmax())])
                best = set(np.argsort(-logits)[:5].tolist())
                assert set(result["top"]) == {tokenizer.decode([other]) for other in best}
            ranks.append(int((logits > logits[token]).sum()) + 1)
            chance *= np.exp(logits[token]) / np.exp(logits).sum()
            text.append(token)
        assert result["rank"] == max(ranks)
        assert result["passed"] == (max(ranks) <= 5)
        assert result["probability"] == pytest.approx(chance, rel=1e-3)
        assert len(result["top"]) == 5
    assert len(re.findall(r"^  (pass|FAIL) ", out, re.M)) == 10
    assert "of 5 in the top 5" in out
    every, _ = run_extra("cases", path, "--save_dir", trained, "--top_k", 257)
    assert every.count("5 of 5 in the top 257") == len(ids(trained))


def test_a_case_without_a_token(text, tmp_path):
    """A space is none to a model of words, which is not asked for the end of the text instead."""
    cases = '- {prompt: the, expected: " "}\n- {prompt: the, expected: "\\n"}\n'
    (tmp_path / "cases.yaml").write_text(cases)
    folder = ["--save_dir", tmp_path / "lm"]
    run("--text", text, "--tokenizer", "word", *TINY, "--num_iters", 1, *folder)
    line = ["cases.yaml", "--top_k", 100000, "--output", "out.json"]
    out, _ = run_extra("cases", *line, *folder, cwd=tmp_path)
    space, line_end = json.loads((tmp_path / "out.json").read_text())
    assert (space["rank"], space["probability"], space["passed"]) == (None, None, False)
    assert line_end["passed"]
    assert "FAIL rank      -         -" in out


def test_the_example_files_of_cases(trained, tmp_path):
    examples = [EXAMPLE, *(ROOT / "extras" / "cases").glob("*.yaml")]
    line = [*examples, "--identifier", "latest", "--output", tmp_path / "out.json"]
    run_extra("cases", *line, "--save_dir", trained)
    count = sum(path.read_text().count("\n- {prompt") for path in examples)
    assert len(json.loads((tmp_path / "out.json").read_text())) == count > 40


def test_patterns_of_runs(text, tmp_path):
    """Of each run that matches, the newest checkpoint, once."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--steps_per_save", 1]
    line += ["--steps_per_report", 1, "--num_iters"]
    run(*line, 2)
    run(*line, 3, "--new_model")
    (tmp_path / "cases.yaml").write_text("- {prompt: the, expected: e}\n")
    checkpoints = saved(tmp_path)
    newest = {each.run: each.id for each in reversed(checkpoints)}
    assert len(newest) == 2
    line = ["cases.yaml", "--output", "out.json", "--save_dir", tmp_path, "--identifier"]
    for patterns, expected in (
        (["text-*"], set(newest.values())),
        (["*[0-9a-f]", "latest"], set(newest.values())),
        ([f"*{checkpoints[0].run[-6:]}"], {checkpoints[0].id}),
    ):
        run_extra("cases", *line, *patterns, cwd=tmp_path)
        assert checkpoints_in(tmp_path / "out.json") == expected
    run_extra("plot", "losses.png", "--identifier", "text-*", "--save_dir", tmp_path, cwd=tmp_path)
    _, err = run_extra("cases", *line, "python-*", cwd=tmp_path, status=2)
    assert "--identifier 'python-*' matches no checkpoint" in err


def test_what_cannot_be_opened_is_skipped(trained, tmp_path, text):
    """The others are scored, each once however often it is named."""
    folder = ["--save_dir", tmp_path / "lm"]
    results = tmp_path / "out.json"
    shutil.copytree(trained, tmp_path / "lm")
    base = ids(trained)[0]
    line = ["--text", text, "--init_from", base, "--lora_rank", 2, "--batch_size", 4]
    name, _, _ = begin(*line, "--num_iters", 1, "--max_tokens", 2, *folder)
    shutil.rmtree(tmp_path / "lm" / name / "init_from")
    damaged = saved(tmp_path / "lm")[-1]
    damaged.weights_path.write_bytes(b"")
    cases = [EXAMPLE, *folder]
    _, err = run_extra("cases", *cases, "--output", results)
    assert err.count("Skipping ") == 2
    assert f"{name} lacks the model in its folder init_from" in err
    assert f"{damaged} is damaged" in err
    assert checkpoints_in(results) == set(ids(trained)) - {damaged.id}
    out, _ = run_extra("cases", *cases, "--identifier", base, base)
    assert out.count("in the top 5") == 1
    content = results.read_text()
    _, err = run_extra("cases", *cases, "--output", results, "--identifier", "latest", status=1)
    assert "Skipping" not in err
    assert results.read_text() == content
