"""What attention heads attend to, compared with a computation by hand."""

import numpy as np
import pytest
from conftest import TINY, newest, run
from test_model import reference

from extras import attention


@pytest.mark.parametrize("options", ["", "--num_kv_heads 1 --qk_norm"])
def test_attention(options, text, figures, tmp_path):
    """The numbers that are drawn, and their labels; a dollar sign begins no formula."""
    folder = tmp_path / "lm"
    line = ["--text", text, *TINY, "--num_iters", 20, "--learning_rate", 0.02, "--lr_warmup", 0]
    run(*line, *options.split(), "--save_dir", folder)
    attention.main(["x.png", "--prompt", "a $x", "--save_dir", str(folder)])
    *axes, colors = figures[0].axes
    assert colors.get_ylabel() == "attention"
    titles = [axis.get_title() for axis in axes]
    assert titles == ["block 0, head 0", "block 0, head 1", "block 1, head 0", "block 1, head 1"]
    labels = [label.get_text() for label in axes[0].get_xticklabels()]
    assert labels == ["a", "\N{OPEN BOX}", "$", "x"]
    heads = []
    reference(newest(folder).open().load_model(), np.array([[*b"a $x"]]), heads=heads)
    for axis, [expected] in zip(axes, heads, strict=True):
        np.testing.assert_allclose(axis.images[0].get_array(), expected, atol=1e-5)
