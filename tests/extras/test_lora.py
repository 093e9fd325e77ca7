"""LoRA: adapters that begin as nothing and are trained alone, and the base that they need."""

import re
import shutil

import main
import mlx.core as mx
import numpy as np
from conftest import begin, flags, newest, run, run_extra, saved, start
from datasets import ByteTokenizer
from mlx.utils import tree_flatten
from test_huggingface import logits_of, make_model
from test_interrupts import wait_for

from extras.huggingface import export_model, import_model
from extras.lora import add_lora, init_lora, merge


def test_adapters_begin_as_nothing_and_alone_are_trained():
    model = make_model(mlp="relu2", qkv_bias=True)
    base = make_model(mlp="relu2", qkv_bias=True)
    add_lora(model, 4, 8)
    given = flags(dim=64, batch_size=4, learning_rate=0.1, lr_warmup=0)
    init_lora(model, 1)
    tokens = np.random.default_rng(0).integers(257, size=20).tolist()
    np.testing.assert_array_equal(logits_of(model, tokens), logits_of(base, tokens))
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert len(names) == 2 * 2 * 6
    for name in names:
        assert re.search(r"layers\.\d\.\w+\.\w+_proj\.lora_[ab]$", name)
    optimizer = main.make_optimizer(model, given)
    step = main.make_step(model, optimizer, given)
    dropout = main.draw_dropout(0, 4, given)
    batch = mx.array(np.random.default_rng(1).integers(257, size=(4, 9)))
    for _ in range(3):
        step(batch[:, :-1], batch[:, 1:], *dropout)
    trained = dict(tree_flatten(model.parameters()))
    for name, weight in tree_flatten(base.parameters()):
        assert mx.array_equal(trained[name], weight), "the base stays as it was"
    for name in names:
        assert mx.any(trained[name] != 0)
    assert np.abs(logits_of(model, tokens) - logits_of(base, tokens)).max() > 0.01


def test_merged_weights_by_hand():
    """Of rank 1 and alpha 3 the update is three times the outer product of B and A."""
    base = make_model(num_blocks=1)
    model = make_model(num_blocks=1)
    add_lora(model, 1, 3)
    adapters = {}
    for name, adapter in tree_flatten(model.trainable_parameters()):
        adapters[name] = mx.ones_like(adapter)
    name = "model.layers.0.self_attn.q_proj"
    random = np.random.default_rng(0)
    a = random.normal(size=(1, 64)).astype(np.float32)
    b = random.normal(size=(64, 1)).astype(np.float32)
    adapters[f"{name}.lora_a"] = mx.array(a)
    adapters[f"{name}.lora_b"] = mx.array(b)
    before = {name: np.array(weight) for name, weight in tree_flatten(base.parameters())}
    merged = merge(base, adapters, 1, 3)
    assert merged.keys() == before.keys()
    expected = before[f"{name}.weight"] + 3 * np.outer(b, a)
    found = np.array(merged[f"{name}.weight"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for name, weight in before.items():
        if "_proj" not in name:
            np.testing.assert_array_equal(np.array(merged[name]), weight)
        elif "q_proj" not in name:
            np.testing.assert_allclose(np.array(merged[name]), weight + 3, rtol=1e-6)


LORA = "--lora_rank 2 --dropout 0.1 --average 0.3 --learning_rate 0.03 --lr_warmup 5".split()
LORA += ["--max_tokens", 8, "--num_iters"]


def test_lora_run(base, text, tmp_path):
    """Its checkpoint holds adapters alone; sampling and export merge them into the base.

    Interrupted, and without its base, it ends with the same checkpoint.
    """
    folder, id = base
    line = ["--text", text, "--init_from", id[:10], *LORA]
    shutil.copytree(folder, tmp_path / "whole")
    out, _ = run(*line, 12, "--save_dir", tmp_path / "whole")
    assert "trainable" in out
    name, _, _ = begin(*line, 5, "--save_dir", folder)
    shutil.rmtree(saved(folder)[-1].folder)
    assert begin(*line, 12, "--save_dir", folder)[:2] == (name, 5)
    last = newest(folder)
    assert last.id == newest(tmp_path / "whole").id
    assert last.flags["lora_alpha"] == 4
    weights = mx.load(str(last.weights_path))
    assert len(weights) == 2 * 2 * 7
    assert all("lora_" in name for name in weights)
    # It goes on without the base being named again.
    assert begin("--save_dir", folder, "--num_iters", 13)[:2] == (name, 12)

    live = saved(tmp_path / "whole")[-1].open().load_model()
    add_lora(live, 2, 4)
    live.load_weights(list(weights.items()), strict=False)
    contents = last.open()
    merged = contents.load_model()
    tokens = contents.tokenizer.encode("line 5: the quick").tolist()
    expected = logits_of(live, tokens)
    np.testing.assert_allclose(logits_of(merged, tokens), expected, rtol=0, atol=1e-4)
    run_extra("export", tmp_path / "hf", "--identifier", last.id, "--save_dir", folder)
    again, *_ = import_model(tmp_path / "hf")
    np.testing.assert_array_equal(logits_of(again, tokens), logits_of(merged, tokens))


def test_branches_of_a_lora_run_and_adapters_on_it(base, text):
    """Each has in its own folder all that it needs, and more adapters go onto adapters."""
    folder, id = base
    name, _, _ = begin("--text", text, "--init_from", id, *LORA, 4, "--save_dir", folder)
    line = ["--identifier", name, "--dropout", 0.2, "--save_dir", folder, "--num_iters"]
    branch, iteration, _ = begin(*line, 5)
    assert (branch != name, iteration) == (True, 4)
    line_of_nested = ["--text", text, "--init_from", branch, *LORA]
    nested, iteration, _ = begin(*line_of_nested, 2, "--save_dir", folder)
    assert (nested == name, iteration) == (False, 0)
    for run_folder in {checkpoint.folder for checkpoint in saved(folder)}:
        if run_folder.name not in (nested, branch):
            shutil.rmtree(run_folder)
    answers = ["--prompt", "line", "--max_tokens", 3, "--save_dir", folder, "--identifier"]
    assert begin("--identifier", branch, "--save_dir", folder, "--num_iters", 6)[:2] == (branch, 5)
    shutil.rmtree(folder / branch)
    run(*answers, nested)
    assert begin(*line_of_nested, 3, "--save_dir", folder)[:2] == (nested, 2)


def test_a_base_with_more_rows_than_ids(tmp_path, text):
    """As Qwen3's, padded for speed: its shape stays, in every leg and without the folder."""
    hf = tmp_path / "hf"
    export_model(make_model(257 + 24), ByteTokenizer(), hf, None)
    line = ["--text", text, "--lora_rank", 2, "--max_tokens", 8, "--save_dir", tmp_path / "lm"]
    line += ["--init_from", hf]
    name, _, _ = begin(*line, "--num_iters", 2)
    shutil.rmtree(hf)
    assert begin(*line, "--num_iters", 4)[:2] == (name, 2)
    assert newest(tmp_path / "lm").config["vocab_size"] == 281
    run("--prompt", "line", "--max_tokens", 8, "--identifier", name, "--save_dir", tmp_path / "lm")


def test_a_start_that_was_killed_before_its_first_save(base, text):
    """What it has linked is no run; the same command begins anew, in the same folder."""
    folder, id = base
    line = ["--text", text, "--init_from", id, *LORA, 100_000, "--save_dir", folder]
    process = start(*line)
    wait_for(process, "20/100,000 ")
    process.kill()
    process.communicate()
    [left] = folder.glob("*/init_from/")
    name, iteration, _ = begin(*line, "--num_iters", 2)
    assert (folder / name, iteration) == (left.parent, 0)
    assert begin(*line, "--num_iters", 3)[:2] == (name, 2)
