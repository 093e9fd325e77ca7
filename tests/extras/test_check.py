"""extras.check, with something planted that varies: it has to say where, and not to trust a GPU."""

import pytest
from conftest import ROOT, TINY, run, run_extra

from datasets import RunError, open_code_dir
from extras import check

# What each Python does first: with --gpu it pretends one; norms vary on the GPU or on the CPU.
SITE = """
import os, random, sys

if "--gpu" in sys.argv:
    import pretended_gpu
    pretended_gpu.pretend()
    pretended_gpu.mx.device_info = lambda: {"device_name": os.environ["GPU_NAME"]}
if ("--gpu" in sys.argv) == (os.environ["VARYING"] == "gpu"):
    from extras import fast
    import mlx.core as mx
    norm = mx.linalg.norm
    mx.linalg.norm = lambda *a, **more: norm(*a, **more) * (1 + 1e-5 * random.random())
"""

SHORT = [*TINY[:-2], "--num_iters", 30]  # signals come after the 10th and the 20th step


@pytest.fixture
def env(tmp_path):
    """An environment with a GPU that nothing is known of."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    path = [tmp_path, ROOT / "tests", ROOT]
    return {"PYTHONPATH": ":".join(map(str, path)), "GPU_NAME": str(tmp_path)}


@pytest.fixture
def forgotten():
    """What becomes known of a GPU is deleted."""
    before = set(open_code_dir().glob("gpu-*"))
    yield
    for each in set(open_code_dir().glob("gpu-*")) - before:
        each.unlink()


def is_verified(env, text, tmp_path):
    """Whether a run with --gpu does not say that this GPU is not verified."""
    line = ["--text", text, *TINY, "--num_iters", 1, "--save_dir", tmp_path / "lm", "--new_model"]
    out, _ = run(*line, "--gpu", program=["-m", "main"], env=env)
    assert "machine  gpu" in out
    return "Not verified on this GPU" not in out


def test_a_gpu_that_repeats(env, text, tmp_path, forgotten):
    env["VARYING"] = "cpu"
    line = ["--gpu", "--save_dir", tmp_path / "check"]
    assert not is_verified(env, text, tmp_path)
    out, _ = run_extra("check", *line, "--", *SHORT, env=env)
    *_, last = out.splitlines()
    assert last == "Exact here: GPU."
    assert out.count("\n   ") == 11 + 2
    assert out.count("; struck: ") == 2
    assert is_verified(env, text, tmp_path)
    assert not list((tmp_path / "check").iterdir())


def test_what_varies_is_named(env, text, tmp_path):
    """Operations, and runs of which one was struck."""
    env["VARYING"] = "gpu"
    line = ["--gpu", "--save_dir", tmp_path / "check", "--", *SHORT]
    out, _ = run_extra("check", *line, env=env, status=1)
    *_, last = out.splitlines()
    names = "norm of gradients, Muon, a float32 run, a bfloat16 run"
    assert last == f"Not exact, or not right, here: {names}."
    assert out.count("\n!! ") == 4
    assert not is_verified(env, text, tmp_path)


def test_a_run_that_does_not_begin_says_why():
    with pytest.raises(RunError, match="^main.py: .*--dim"):
        check.train(["--dim", "many"], {})
