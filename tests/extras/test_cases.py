"""Probe cases: ranks and probabilities beside those of one pass per token."""

import json
import math
import re
from argparse import Namespace

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, ids, run, run_extra, run_folder
from datasets import ByteTokenizer

from extras import cases

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
    [checkpoint] = [each for each in main.list_checkpoints(trained) if each.id == named[0]]
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


def test_a_damaged_checkpoint_is_skipped(text, tmp_path):
    line = ["--text", text, *TINY, "--steps_per_save", 1, "--num_iters", 2, "--save_dir", tmp_path]
    run(*line)
    newest, older = ids(tmp_path)
    damaged = run_folder(tmp_path) / f"{newest}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    out, err = run_extra("cases", EXAMPLE, "--save_dir", tmp_path)
    assert newest[:12] in err
    assert newest[:12] not in out
    assert older[:12] in out


EXAMPLES = [EXAMPLE, *sorted((ROOT / "extras" / "cases").glob("*.yaml"))]


def test_the_example_files_of_cases(trained, tmp_path):
    assert len(EXAMPLES) >= 3
    line = [*EXAMPLES, "--identifier", "latest", "--output", tmp_path / "out.json"]
    out, _ = run_extra("cases", *line, "--save_dir", trained)
    count = 0
    for path in EXAMPLES:
        count += len(re.findall(r"^- {prompt", path.read_text(), re.M))
    assert count > 40
    assert f"of {count} in the top 5" in out
    results = json.loads((tmp_path / "out.json").read_text())
    assert len({(result["prompt"], result["expected"]) for result in results}) == count


def test_patterns_of_runs(text, tmp_path):
    """Of each run that matches, the newest checkpoint, once."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--steps_per_save", 1]
    line += ["--steps_per_report", 1, "--num_iters"]
    run(*line, 2)
    run(*line, 3, "--new_model")
    (tmp_path / "cases.yaml").write_text("- {prompt: the, expected: e}\n")
    checkpoints = main.list_checkpoints(tmp_path)
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


def test_a_diverged_model_is_valid_json():
    class Diverged:
        config = Namespace(context_size=8)

        def __call__(self, tokens, last):
            return mx.full((1, last, 300), math.nan)

    case = cases.score_case(Diverged(), ByteTokenizer(), "a", "b", 5)
    assert case["probability"] is None
    assert not case["passed"]
    cases.print_result(case | {"prompt": "a", "expected": "b"})
    json.dumps(case, allow_nan=False)
