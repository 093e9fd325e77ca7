"""extras.check, with something planted that varies: it has to say where."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, run

from support.cli import UsageError
from extras import check

# What each Python does first: with --gpu it pretends one.
SITE = """
import os, sys

if "--gpu" in sys.argv:
    import pretended_gpu
    pretended_gpu.pretend()
    pretended_gpu.mx.device_info = lambda: {"device_name": os.environ["GPU_NAME"]}
"""

SHORT = [*TINY[:-2], "--num_iters=30"]  # signals come after the 10th and the 20th step


@pytest.fixture
def env(tmp_path):
    """An environment with a GPU that nothing is known of."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    path = [tmp_path, ROOT / "tests", ROOT]
    return {"PYTHONPATH": ":".join(map(str, path)), "GPU_NAME": str(tmp_path)}


# The program, without its second run.
CHECK = """
from extras import check
check.RUNS.popitem()
check.start("check", check.main)
"""
ROW = r"\| \d{4}-\d\d-\d\d \| Linux \w+ \| (\w+), .* \| [\d.]+ \| \w* \| (.*) \| [\d,]+ \|"


def test_a_gpu_that_repeats(env, tmp_path):
    """Its losses are compared with those of a CPU; the row can be pasted into tested.md."""
    line = ["--gpu", "--save_dir", tmp_path / "check"]
    out, _ = run(*line, "--", *SHORT, program=["-c", CHECK], env=env)
    *_, last = out.splitlines()
    assert re.fullmatch(ROW, last).groups() == ("gpu", "exact")
    assert last.count("|") == (ROOT / "docs" / "tested.md").read_text().splitlines()[-1].count("|")
    assert out.count("; struck: ") == 1
    assert not list((tmp_path / "check").iterdir())


FLAGS = partial(SimpleNamespace, training=[], dtype="float32", batch_size=1, context_size=8)
WRONG = [
    {"id": "b"},  # where it was struck
    {"sample": "b"},
    {"loss": "1.1"},  # on the CPU
    {"loss": "nan"},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_varies_is_marked(wrong, tmp_path, monkeypatch, capsys):
    """Here, of the float32 run alone."""

    def train(line, strikes):
        result = {"loss": "1.0", "speed": "1", "id": "a", "sample": "a"}
        is_cpu = line[-1].endswith("cpu")
        is_wrong = is_cpu if "loss" in wrong else bool(strikes)
        return result | (wrong if is_wrong and "bfloat16" not in line else {})

    monkeypatch.setattr(check, "train", train)
    monkeypatch.setattr(check, "read_flags", lambda *_: FLAGS(gpu=True, save_dir=tmp_path))
    assert check.main([]) == 1
    out = capsys.readouterr().out
    assert out.count("\n!! ") == 1 and "\n!! float32: " in out
    assert re.search(r" \| not exact \| 1 \|\n$", out)


def test_a_run_that_does_not_begin_says_why():
    with pytest.raises(UsageError, match="^main.py: .*--dim"):
        check.train(["--dim", "many"], {})
