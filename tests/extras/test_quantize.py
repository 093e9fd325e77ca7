"""Quantization: the values that are left, and the same logits packed or not."""

import re

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, run
from mlx.utils import tree_flatten
from test_huggingface import logits_of, make_model

from datasets import ByteTokenizer
from extras.huggingface import export_model, import_model
from extras.quantize import quantize


def test_sixteen_bits_are_float16(tmp_path, capsys):
    """Of any size of model.

    Unpacked to sample with, packed to export, which mlx_lm and imports read.
    """
    model = make_model(dim=40, seed=5)
    plain = make_model(dim=40, seed=5)
    packed = make_model(dim=40, seed=5)
    assert quantize(model, 16, packed=False) is None
    assert "16 bits: the matrices'" in capsys.readouterr().err
    before = dict(tree_flatten(plain.parameters()))
    for name, weight in tree_flatten(model.parameters()):
        assert weight.dtype == mx.float32
        expected = np.array(before[name])
        if weight.ndim == 2:
            expected = expected.astype(np.float16)
        np.testing.assert_array_equal(np.array(weight), expected.astype(np.float32))
    export_model(packed, ByteTokenizer(), tmp_path, 16)
    files = mx.load(str(tmp_path / "model.safetensors"))
    assert {array.dtype for array in files.values()} == {mx.float16}
    model.set_dtype(mx.float16)  # the norms, too
    model.set_dtype(mx.float32)
    found, *_ = import_model(tmp_path)
    tokens = range(20)
    np.testing.assert_array_equal(logits_of(found, tokens), logits_of(model, tokens))


@pytest.mark.parametrize("dim, group", [(128, 64), (96, 32)])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights(dim, group, bits, capsys):
    """A group has at most 2^bits values, evenly spaced, and each weight is nearly at the next."""
    model = make_model(dim=dim)
    plain = make_model(dim=dim)
    assert quantize(model, bits, packed=False) == group
    before = dict(tree_flatten(plain.parameters()))
    for name, weight in tree_flatten(model.parameters()):
        weight = np.array(weight)
        exact = np.array(before[name])
        if weight.ndim == 1:
            np.testing.assert_array_equal(weight, exact)
            continue
        groups = weight.reshape(-1, group)[:50]
        for mine, theirs in zip(groups, exact.reshape(-1, group)):
            values = np.unique(mine)
            assert len(values) <= 2**bits
            step = np.ptp(theirs) / (2**bits - 1)
            assert np.abs(mine - theirs).max() < 1.1 * step
            if bits == 4:  # of 8 bits, neighbours may both be missing
                differences = np.diff(values)
                steps = differences / differences.min()
                np.testing.assert_allclose(steps % 1 % 0.999, 0, atol=0.01)
    packed = make_model(dim=dim)
    quantize(packed, bits, packed=True)
    tokens = list(range(20))
    unpacked = logits_of(model, tokens)
    np.testing.assert_allclose(logits_of(packed, tokens), unpacked, rtol=0, atol=1e-4)
    layer = packed.model.embed_tokens
    parts = layer.weight, layer.scales, layer.biases
    rows = mx.dequantize(*parts, layer.group_size, layer.bits)  # [V, D]
    np.testing.assert_array_equal(np.array(rows), np.array(model.model.embed_tokens.weight))
    err = capsys.readouterr().err
    size = float(re.search(r"would be ([\d.]+)", err)[1]) * 2**20
    expected = 0
    for name, part in tree_flatten(packed.parameters()):
        if "norm" not in name:
            expected += part.nbytes
    assert abs(size - expected) < 2**20 * 0.06


def test_quantized_from_the_command_line(tmp_path, text):
    training = ["--learning_rate", 0.01, "--lr_warmup", 5, "--num_iters", 40]
    run("--text", text, *TINY, "--dim", 32, *training, "--save_dir", tmp_path)
    whole, _ = run("--evaluate", "valid", "--save_dir", tmp_path)
    out, err = run("--evaluate", "valid", "--quantize", 4, "--save_dir", tmp_path)
    before, after = [float(re.match(r"valid ([\d.]+) nats", line)[1]) for line in (whole, out)]
    assert before != after
    assert abs(before - after) < 0.1
    assert "Quantized to 4 bits" in err
    prompt = ["--prompt", "line 5", "--temperature", 0, "--save_dir", tmp_path]
    out, _ = run(*prompt, "--quantize", 8)
    assert out.strip()
