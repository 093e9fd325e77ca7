"""Benchmarks: counts beside those worked out by hand, and the parts of the peak of memory."""

import json

import pytest
from conftest import TINY, ids, run_extra

PARTS = ["embeddings", "attention", "mlp", "norms", "output"]
SHAPES = [  # flags, the weights of PARTS, products of queries and keys for each position
    (
        "--dim 64 --num_heads 4 --num_blocks 3 --context_size 32 --batch_size 16",
        [257 * 64, 3 * 4 * 64 * 64, 3 * 2 * 64 * 256, (2 * 3 + 1) * 64, 0],
        3 * 64 * 32,
    ),
    (
        "--dim 128 --num_heads 4 --num_kv_heads 2 --num_blocks 2 --context_size 64 --batch_size 8"
        " --mlp swiglu --untie --qk_norm",
        [257 * 128, 2 * 3 * 128 * 128, 2 * 3 * 128 * 384, 5 * 128 + 2 * 2 * 32, 257 * 128],
        2 * 128 * 64,
    ),
]


def measured(*line):
    """What the program says in JSON of the model that these arguments name."""
    out, _ = run_extra("benchmark", *line)
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("shape, weights, queries_by_keys", SHAPES)
def test_benchmark(shape, weights, queries_by_keys, text, tmp_path):
    result = measured("--text", text, *shape.split(), "--save_dir", tmp_path)
    assert result["parameters"] == dict(zip(PARTS, weights))
    # Two operations for each weight of a matrix, also of embeddings that are the output layer.
    forward = 2 * sum(weights[:3]) + 4 * queries_by_keys
    assert result["flops_per_token"] == {"forward": forward, "backward": 2 * forward}
    size = 4 * sum(weights)
    assert result["memory"]["weights"] == size
    assert result["memory"]["optimizer"] == pytest.approx(2 * size, rel=0.01)
    assert result["memory"]["gradients"] == size
    estimated = sum(result["memory"].values())
    assert 1 / 1.5 < estimated / result["peak_memory"] < 1.5
    speed = result["tokens_per_second"]
    assert result["flops_per_second"] == pytest.approx(3 * forward * speed)
    for name in ("tokens_per_second", "first_token_ms", "token_ms"):
        assert result[name] > 0, name
    assert not ids(tmp_path), "nothing is saved"


def test_runs_that_need_a_checkpoint(base, text):
    """One that goes on with other flags, one of LoRA, and a student."""
    folder, id = base
    line = ["--batch_size=2", "--save_dir", folder]
    whole = measured("--identifier", id, *line)
    adapters = measured("--text", text, "--init_from", id, "--lora_rank=2", *line)
    student = measured("--text", text, *TINY, "--dim=24", "--teacher", id, *line)
    for result in (whole, adapters, student):
        assert result["tokens_per_second"] > 0
    weights = whole["parameters"]
    assert weights["embeddings"] == 257 * 16
    # LoRA takes no gradients with respect to the matrices of its base.
    matrices = weights["attention"] + weights["mlp"] + weights["embeddings"]
    flops = adapters["flops_per_token"]
    assert flops["backward"] == 2 * flops["forward"] - 2 * matrices
    assert ids(folder) == [id]
