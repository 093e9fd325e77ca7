"""A run that begins with another's weights.

What it takes over, and mistakes in naming what to reuse.
"""

import shutil

import numpy as np
from conftest import run, start
from mlx.utils import tree_flatten

import main


def test_all_weights_from_another_model(base, text, tmp_path):
    """Full fine-tuning begins with the base's weights, on other text.

    It needs the base no more when it goes on.
    """
    folder, id = base
    (tmp_path / "more.txt").write_text("señor fox\n" * 400)
    line = ["--text", tmp_path / "more.txt", "--init_from", id, "--save_dir", folder]
    line += ["--learning_rate", 1e-9]
    run(*line, "--num_iters", 1, "--context_size", 16, "--max_tokens", 5)
    new_checkpoint, old_checkpoint = main.list_checkpoints(folder)
    assert new_checkpoint.uses == {}
    new = new_checkpoint.open().load_model()
    old = old_checkpoint.open().load_model()
    assert new.config.context_size == 16
    assert new.config.mlp == "swiglu"
    mine = dict(tree_flatten(new.parameters()))
    theirs = dict(tree_flatten(old.parameters()))
    assert mine.keys() == theirs.keys()
    for name in mine:
        wanted = np.array(theirs[name])
        np.testing.assert_allclose(np.array(mine[name]), wanted, atol=1e-6, err_msg=name)
    shutil.rmtree(old_checkpoint.folder)
    run(*line, "--num_iters", 2)
    [extended] = main.list_run(new_checkpoint.folder)[:1]
    assert extended.iteration == 2


def test_the_same_command_with_another_base_is_another_run(base, text):
    """--init_from shapes a run: with another base, or none, it is another one."""
    folder, id = base
    line = ["--text", text, "--save_dir", folder, "--learning_rate", 1e-3, "--max_tokens", 1]
    run(*line, "--init_from", id, "--num_iters", 1)
    [fine_tuned, _] = main.list_checkpoints(folder)
    run(*line, "--init_from", fine_tuned.run, "--num_iters", 2)
    [twice, *_] = main.list_checkpoints(folder)
    assert twice.run != fine_tuned.run
    run(*line, "--init_from", id, "--num_iters", 3)
    [resumed, *_] = main.list_checkpoints(folder)
    assert (resumed.run, resumed.iteration) == (fine_tuned.run, 3)


def test_a_process_that_ends_right_after_loading(base, text):
    """No thread of MLX may still hold what is Python's: it would end the program by an abort.

    Side by side, they are slow enough.
    """
    folder, _ = base
    line = ["--text", text, "--new_model", "--save_dir", folder]
    line += ["--init_from", "latest", "--tokenizer", "word"]
    processes = [start(*line) for _ in range(16)]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert err.count("\n") == 1, err
        assert process.returncode == 2
