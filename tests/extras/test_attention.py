"""What attention heads attend to, compared with a computation by hand."""

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import run_extra
from test_huggingface import make_model

from extras import attention


def rotated(x, base=10000.0):
    """RoPE of [H, L, d] by complex numbers, the first half of d real and the second imaginary."""
    _, L, d = x.shape
    half = d // 2
    speeds = base ** (-np.arange(half) / half)
    angles = np.outer(np.arange(L), speeds)
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], -1)


def normalized(x, norm):
    """RMSNorm over the last axis."""
    mean_square = (x**2).mean(-1, keepdims=True)
    return x * np.array(norm.weight) / np.sqrt(mean_square + 1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_weights(kv_heads, qk_norm):
    shape = dict(dim=16, num_heads=2, num_kv_heads=kv_heads, qk_norm=qk_norm)
    model = make_model(vocab_size=13, **shape)
    tokens = [1, 5, 3, 3, 12]
    weights = attention.attention_weights(model, tokens)
    assert weights.shape == (2, 2, 5, 5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    is_later = ~np.tri(5, dtype=bool)
    assert (weights[..., is_later] == 0).all()
    hidden = np.array(model.model.embed_tokens.weight, np.float64)[tokens]
    for i, block in enumerate(model.model.layers):
        inputs = normalized(hidden, block.input_layernorm)
        heads = block.self_attn

        def heads_of(layer):
            outputs = inputs @ np.array(layer.weight).T
            return outputs.reshape(5, -1, 8).transpose(1, 0, 2)

        queries = heads_of(heads.q_proj)
        keys = heads_of(heads.k_proj)
        if qk_norm:
            queries = normalized(queries, heads.q_norm)
            keys = normalized(keys, heads.k_norm)
        queries = rotated(queries)
        keys = rotated(keys)
        for head in range(2):
            own_keys = keys[head * kv_heads // 2]
            scores = queries[head] @ own_keys.T / 8**0.5
            powers = np.exp(scores) * np.tri(5)
            expected = powers / powers.sum(-1, keepdims=True)
            np.testing.assert_allclose(weights[i, head], expected, atol=1e-5)
        outputs = block(mx.array(hidden[None].astype(np.float32)))
        hidden = np.array(outputs[0], np.float64)


def test_attention(trained, figures):
    """The numbers that are drawn, and their labels; a dollar sign begins no formula."""
    line = ["--prompt", "a $x", "--save_dir", str(trained)]
    attention.main(["x.png", *line])
    *axes, colors = figures[0].axes
    assert colors.get_ylabel() == "attention"
    titles = [axis.get_title() for axis in axes]
    assert titles == ["block 0, head 0", "block 0, head 1", "block 1, head 0", "block 1, head 1"]
    labels = [label.get_text() for label in axes[0].get_xticklabels()]
    assert labels == ["a", "\N{OPEN BOX}", "$", "x"]
    model = main.list_checkpoints(trained)[0].open().load_model()
    weights = attention.attention_weights(model, list(b"a $x"))
    for axis, expected in zip(axes, weights.reshape(4, 4, 4)):
        np.testing.assert_array_equal(axis.images[0].get_array(), expected)


def test_a_file_of_attention(trained, tmp_path):
    line = ["--prompt", "the $fox\n", "--save_dir", trained]
    _, err = run_extra("attention", tmp_path / "a", *line)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert f"Plot saved to {tmp_path / 'a.png'}\n" in err
