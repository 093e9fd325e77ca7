"""A run that begins with another's weights: what it takes over, and mistakes in naming what to reuse."""

import main
import numpy as np
import pytest
from conftest import run, start
from mlx.utils import tree_flatten


def test_all_weights_from_another_model(base, text, tmp_path):
    """Full fine-tuning begins with the base's weights, on other text, and needs it no more when it goes on."""
    folder, id = base
    (tmp_path / "more.txt").write_text("señor fox\n" * 400)
    line = ["--text", tmp_path / "more.txt", "--init_from", id, "--learning_rate", 1e-9, "--save_dir", folder]
    run(*line, "--num_iters", 1, "--context_size", 16, "--max_tokens", 5)
    records = main.list_checkpoints(folder)
    (new, tokenizer), (old, _) = (main.load_model(folder, record) for record in records)
    assert records[0]["uses"] == {} and new.config.context_size == 16 and new.config.mlp == "swiglu"
    for (name, mine), (_, theirs) in zip(tree_flatten(new.parameters()), tree_flatten(old.parameters())):
        np.testing.assert_allclose(np.array(mine), np.array(theirs), atol=1e-6, err_msg=name)
    for path in folder.glob(f"{id}.*"):
        path.unlink()
    run(*line, "--num_iters", 2)
    assert main.list_checkpoints(folder)[0]["iteration"] == 2


@pytest.mark.parametrize("typed, words", [
    (["--init_from", "zzz"], "--init_from 'zzz' matches no checkpoint"),
    (["--init_from", "latest", "--dim", 32], "--dim 32 contradicts --init_from, which has 16"),
    (["--init_from", "latest", "--mlp", "gelu"], "--mlp gelu contradicts"),
    (["--init_from", "latest", "--tokenizer", "word"], "--tokenizer word contradicts"),
    (["--lora_rank", 4], "--lora_rank requires --init_from"),
    (["--lora_alpha", 4], "--lora_alpha requires --lora_rank"),
    (["--teacher", "zzz"], "--teacher 'zzz' matches no checkpoint"),
])  # fmt: skip
def test_mistakes(base, text, typed, words):
    folder, _ = base
    line = [*typed, "--save_dir", folder, "--text", text, "--num_iters", 1, "--new_model"]
    err = run(*line, status=2)[1]
    assert words in err.splitlines()[-1] and "Traceback" not in err


def test_a_process_that_ends_right_after_loading(base, text):
    """No thread of MLX may still hold what is Python's: it would end the program by an abort. Side by side, they are slow enough."""
    folder, _ = base
    line = ["--text", text, "--new_model", "--init_from", "latest", "--tokenizer", "word", "--save_dir", folder]
    processes = [start(*line) for _ in range(16)]
    ends = [(process.communicate(timeout=120)[1].count("\n"), process.returncode) for process in processes]
    assert ends == [(1, 2)] * 16
