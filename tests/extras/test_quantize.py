"""Quantization: the values that are left, and the same logits packed or not."""

import re

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, make_model, run
from mlx.utils import tree_flatten
from test_huggingface import logits_of

from datasets import ByteTokenizer
from extras.features.huggingface import export_model, import_model
from extras.features.quantize import quantize


def test_sixteen_bits_are_float16(tmp_path, capsys):
    """Of any size of model.

    Unpacked to sample with, packed to export, which mlx_lm and imports read.
    """
    model, packed = [make_model(vocab_size=257, dim=40, seed=5) for _ in range(2)]
    before = dict(tree_flatten(model.parameters()))
    assert quantize(model, 16, is_packed=False) is None
    assert "16 bits: the matrices'" in capsys.readouterr().err
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
    """Matrices are what MLX makes of them, packed or not; their size is said."""
    model, packed = [make_model(dim=dim, mlp_dim=2 * dim) for _ in range(2)]
    before = dict(tree_flatten(model.parameters()))
    assert quantize(model, bits, is_packed=False) == group
    err = capsys.readouterr().err
    quantize(packed, bits, is_packed=True)
    size = 0
    for name, weight in tree_flatten(model.parameters()):
        expected = before[name]
        if weight.ndim == 2:
            parts = mx.quantize(expected, group, bits)
            expected = mx.dequantize(*parts, group, bits)
            size += sum(part.nbytes for part in parts)
        np.testing.assert_array_equal(np.array(weight), np.array(expected), err_msg=name)
    unpacked = logits_of(model, range(20))
    np.testing.assert_allclose(logits_of(packed, range(20)), unpacked, rtol=0, atol=1e-4)
    said = re.search(r"would be ([\d.]+)", err).group(1)
    assert float(said) == pytest.approx(size / 2**20, abs=0.06)


def test_quantized_from_the_command_line(tmp_path, text):
    training = "--dim 32 --num_iters 40 --learning_rate 0.01 --lr_warmup 5".split()
    run("--text", text, *TINY, *training, "--save_dir", tmp_path)
    line = ["--evaluate=valid", "--save_dir", tmp_path]
    whole, _ = run(*line)
    out, err = run(*line, "--quantize=4")
    before, after = [float(re.match(r"valid ([\d.]+) nats", line)[1]) for line in (whole, out)]
    assert before != after
    assert abs(before - after) < 0.1
    assert "Quantized to 4 bits" in err
