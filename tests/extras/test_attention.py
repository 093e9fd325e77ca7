"""What attention heads attend to, compared with a computation by hand."""

import mlx.core as mx
import numpy as np
from conftest import TINY, newest, run
from test_model import reference

import main
from extras import attention


def test_attention(text, figures, tmp_path):
    """The numbers that are drawn, and their labels; a dollar sign begins no formula."""
    folder = tmp_path / "lm"
    shape = "--num_heads 4 --num_kv_heads 2 --qk_norm".split()
    schedule = "--num_iters 20 --learning_rate 0.02 --lr_warmup 0".split()
    run("--text", text, *TINY, *shape, *schedule, "--save_dir", folder)
    picture = str(tmp_path / "x.png")
    attention.main([picture, "--prompt", "a $x", "--save_dir", str(folder)])
    *axes, colors = figures[0].axes
    assert colors.get_ylabel() == "attention"
    titles = [f"block {block}, head {head}" for block in range(2) for head in range(4)]
    assert [axis.get_title() for axis in axes] == titles
    labels = [label.get_text() for label in axes[0].get_xticklabels()]
    assert labels == ["a", "\N{OPEN BOX}", "$", "x"]
    heads = []
    reference(main.read_contents(newest(folder)).load_model(), np.array([[*b"a $x"]]), heads=heads)
    for axis, [expected] in zip(axes, heads, strict=True):
        np.testing.assert_allclose(axis.images[0].get_array(), expected, atol=1e-5)
    numbers = np.load(tmp_path / "x.npz")
    drawn = numbers["weights"].reshape(-1, 4, 4)
    np.testing.assert_allclose(drawn, np.concatenate(heads), atol=1e-5)
    assert numbers["tokens"].tolist() == labels


def test_attention_of_an_edited_model(byte_model, figures, monkeypatch, tmp_path):
    """What is drawn is what `attend` does: here, each position attends to the first one."""

    def attend_to_the_first(queries, keys, values, mask=None):
        return mx.broadcast_to(values[:, :, :1], values.shape)

    monkeypatch.setattr(attention, "attend", attend_to_the_first)
    prompt = "the quick brown fox"
    picture = str(tmp_path / "x.png")
    attention.main([picture, "--prompt", prompt, "--save_dir", str(byte_model)])
    weights = np.load(tmp_path / "x.npz")["weights"]
    np.testing.assert_array_equal(weights[..., 0], 1)
    np.testing.assert_array_equal(weights[..., 1:], 0)
