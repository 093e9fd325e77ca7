"""extras.check, with something planted that varies: it has to say where."""

import random

import mlx.core as mx
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


# The program, without its second run, and with fewer repetitions.
CHECK = """
from extras import check
check.REPETITIONS = 3
check.RUNS.popitem()
check.start("check", check.main)
"""


def test_a_gpu_that_repeats(env, tmp_path):
    line = ["--gpu", "--save_dir", tmp_path / "check"]
    out, _ = run(*line, "--", *SHORT, program=["-c", CHECK], env=env)
    *_, last = out.splitlines()
    assert last == "Exact here: GPU."
    assert out.count("\n   ") == 11 + 1
    assert out.count("; struck: ") == 1
    assert not list((tmp_path / "check").iterdir())


def test_what_varies_is_named(tmp_path, monkeypatch, capsys):
    """Operations, and runs: here, the float32 run ends otherwise where it was struck."""
    norm = mx.linalg.norm

    def varying(*arguments, **options):
        return norm(*arguments, **options) * (1 + 1e-5 * random.random())

    def train(line, strikes):
        id = "b" if strikes and "bfloat16" not in line else "a"
        return {"loss": "1.0", "speed": "1 tokens/s", "id": id}

    monkeypatch.setattr(mx.linalg, "norm", varying)
    monkeypatch.setattr(check, "train", train)
    monkeypatch.setattr(check, "REPETITIONS", 3)
    assert check.main(["--save_dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    names = "norm of gradients, Muon, a float32 run"
    assert out.endswith(f"\nNot exact, or not right, here: {names}.\n")
    assert out.count("\n!! ") == 3


def test_a_run_that_does_not_begin_says_why():
    with pytest.raises(UsageError, match="^main.py: .*--dim"):
        check.train(["--dim", "many"], {})
