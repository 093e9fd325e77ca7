"""Benchmarks: counts beside formulas by hand, and the parts of the peak of memory."""

import json
import re

import pytest
from conftest import TINY, ids, run_extra

SHAPES = {  # flags, the dimension of all heads' keys, the hidden units of an MLP
    "plain": (
        "--dim 64 --num_heads 4 --num_blocks 3 --context_size 32 --batch_size 16", 64, 256
    ),
    "all": (
        "--dim 128 --num_heads 4 --num_kv_heads 2 --num_blocks 2 --context_size 64 --batch_size 8"
        " --mlp swiglu --untie --qk_norm", 64, 384
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape, kv_dim, mlp_dim", SHAPES.values(), ids=SHAPES)
def test_benchmark(shape, kv_dim, mlp_dim, text, tmp_path):
    out, _ = run_extra("benchmark", "--text", text, *shape.split(), "--save_dir", tmp_path)
    result = json.loads(out.splitlines()[-1])
    values = {name: int(value) for name, value in re.findall(r"--(\w+) (\d+)", shape)}
    D = values["dim"]
    blocks = values["num_blocks"]
    norms = (2 * blocks + 1) * D
    if "--qk_norm" in shape:
        norms += blocks * 2 * D // 4
    matrices = 3 if "swiglu" in shape else 2
    output = 257 * D if "--untie" in shape else 0
    assert result["parameters"] == {
        "embeddings": 257 * D,
        "attention": blocks * (2 * D * D + 2 * D * kv_dim),
        "mlp": blocks * D * mlp_dim * matrices,
        "norms": norms,
        "output": output,
    }
    products = result["parameters"]["attention"] + result["parameters"]["mlp"] + 257 * D
    forward = 2 * products + blocks * 4 * D * values["context_size"]
    assert result["flops_per_token"] == {"forward": forward, "backward": 2 * forward}
    weights = 4 * sum(result["parameters"].values())
    assert result["memory"]["weights"] == weights
    assert result["memory"]["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    assert result["memory"]["gradients"] == weights
    estimated = sum(result["memory"].values())
    assert 1 / 1.5 < estimated / result["peak_memory"] < 1.5
    speed = result["tokens_per_second"]
    assert result["flops_per_second"] == pytest.approx(3 * forward * speed)
    for name in ("tokens_per_second", "first_token_ms", "token_ms"):
        assert result[name] > 0, name
    assert not ids(tmp_path), "nothing is saved"


def test_a_checkpoint_is_measured_as_it_is(base):
    """With the flags that it was trained with, or others of training."""
    folder, id = base
    line = ["--identifier", id, "--batch_size", 2, "--save_dir", folder]
    out, _ = run_extra("benchmark", *line)
    result = json.loads(out.splitlines()[-1])
    assert result["parameters"]["embeddings"] == 257 * 16
    assert result["tokens_per_second"] > 0
    assert ids(folder) == [id]


@pytest.mark.parametrize("options", [
    ["--init_from", "latest", "--lora_rank", 2],
    ["--teacher", "latest", "--dim", 24],
])  # fmt: skip
def test_what_else_a_step_may_do_is_measured_too(options, base, text):
    folder, id = base
    line = ["--text", text, "--batch_size", 4, "--save_dir", folder]
    if "--teacher" in options:
        line += TINY
    out, _ = run_extra("benchmark", *line, *options)
    result = json.loads(out.splitlines()[-1])
    assert result["tokens_per_second"] > 0
    assert ids(folder) == [id]
    if "--lora_rank" in options:  # no gradients with respect to the matrices of the base
        flops = result["flops_per_token"]
        out, _ = run_extra("benchmark", "--identifier", id, "--save_dir", folder)
        parts = json.loads(out.splitlines()[-1])["parameters"]
        matrices = parts["attention"] + parts["mlp"] + 257 * 16
        assert flops["backward"] == 2 * flops["forward"] - 2 * matrices
