"""LoRA: adapters that begin as nothing and are trained alone, and the base that they need."""

import re
import shutil

import anchors
import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import arrays, assert_equal, begin, copy_program, make_model, newest, run, run_extra
from conftest import saved
from datasets import ByteTokenizer, load_dataset
from test_huggingface import logits_of

from extras.features.huggingface import export_model, import_model


def assert_adapters_on(base, checkpoint, scale):
    """A model is its base but for scale * B A in each layer; returns B of all layers."""
    adapters = mx.load(str(checkpoint.weights_path))
    layers = sorted({name.rpartition(".")[0] for name in adapters})
    expected = arrays(base)
    matrices = []
    for layer in layers:
        a = np.array(adapters.pop(f"{layer}.lora_a"))
        b = np.array(adapters.pop(f"{layer}.lora_b"))
        expected[f"{layer}.weight"] += scale * b @ a
        matrices.append(b)
    assert not adapters, "nothing else is saved"
    found = arrays(checkpoint.open().load_model())
    assert_equal(found, expected, rtol=1e-5, atol=1e-6)
    return matrices


def assert_scored_as_merged(checkpoint, text):
    """Its last score, of base and adapters as they were trained, is that of the merged weights."""
    tokens = load_dataset("text", text.parent, [text]).valid.tokens
    nats = main.evaluate(checkpoint.open().load_model(), tokens, 4)["loss"]
    assert checkpoint.evaluation.loss == pytest.approx(nats, abs=1e-5)


LORA = "--lora_rank 2 --dropout 0.1 --average 0.3 --learning_rate 0.03 --lr_warmup 5".split()
LORA += ["--sample_tokens", 8, "--num_iters"]


def test_adapters_begin_as_nothing(base, text):
    folder, id = base
    model = newest(folder).open().load_model()
    line = ["--text", text, "--init_from", id, "--save_dir", folder, "--learning_rate", 0]
    run(*line, "--lora_rank", 2, "--num_iters", 1)
    matrices = assert_adapters_on(model, newest(folder), 2)
    assert not any(matrix.any() for matrix in matrices)


def test_an_edited_product_counts_under_the_adapters(base, text, tmp_path):
    """As much as once they are merged; they are nothing here."""
    folder, id = base
    edits = {anchors.PRODUCT: "    return 0.9 * (x @ weight.T)\n"}
    program = [copy_program(tmp_path / "copy", edits)]
    line = ["--text", text, "--init_from", id, "--eval_tokens", 0, "--save_dir", folder]
    run(*line, *LORA, 3, "--learning_rate", 0, program=program)
    out, _ = run("--evaluate", "valid", "--save_dir", folder, program=program)
    [nats] = re.findall(r"^valid ([\d.]+) nats", out, re.M)
    assert newest(folder).evaluation.loss == pytest.approx(float(nats), abs=2e-4)


def test_lora_run(base, text, tmp_path):
    """Its checkpoint holds adapters alone; sampling and export merge them into the base.

    Interrupted, and without its base, it ends with the same checkpoint.
    """
    folder, id = base
    model = newest(folder).open().load_model()
    line = ["--text", text, "--init_from", id[:10], "--steps_per_eval", 4, "--eval_tokens", 0]
    line += LORA
    shutil.copytree(folder, tmp_path / "whole")
    out, _ = run(*line, 12, "--save_dir", tmp_path / "whole")
    assert "trainable" in out
    name, _, _ = begin(*line, 5, "--save_dir", folder)
    shutil.rmtree(saved(folder)[-1].folder)
    assert begin("--num_iters", 12, "--save_dir", folder)[:2] == (name, 5)
    last = newest(folder)
    assert last.id == newest(tmp_path / "whole").id
    assert last.flags["lora_alpha"] == 4
    matrices = assert_adapters_on(model, last, 2)
    assert len(matrices) == 2 * 7
    assert all(matrix.any() for matrix in matrices)
    assert_scored_as_merged(last, text)
    # It goes on without the base being named again.
    assert begin("--save_dir", folder, "--num_iters", 13)[:2] == (name, 12)

    run_extra("export", tmp_path / "hf", "--identifier", last.id, "--save_dir", folder)
    again, *_ = import_model(tmp_path / "hf")
    merged = last.open().load_model()
    np.testing.assert_array_equal(logits_of(again, [1, 2, 3]), logits_of(merged, [1, 2, 3]))


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
    named = ["--identifier", nested, "--num_iters", 3, "--save_dir", folder]
    assert begin(*named)[:2] == (nested, 2)


def test_a_base_with_more_rows_than_ids(tmp_path, text):
    """As Qwen's, padded for speed, with biases: its shape stays, without the folder, too."""
    hf = tmp_path / "hf"
    base = make_model(vocab_size=257 + 24, mlp="swiglu", qkv_bias=True)
    export_model(base, ByteTokenizer(), hf, None)
    line = ["--text", text, "--lora_rank", 2, "--lora_alpha", 3, "--init_from", hf]
    line += ["--learning_rate", 0.03, "--lr_warmup", 0, "--steps_per_eval", 2, "--eval_tokens", 0]
    line += ["--sample_tokens", 8, "--save_dir", tmp_path / "lm"]
    name, _, _ = begin(*line, "--num_iters", 2)
    shutil.rmtree(hf)
    assert begin("--num_iters", 4, "--save_dir", tmp_path / "lm")[:2] == (name, 2)
    last = newest(tmp_path / "lm")
    assert last.config.vocab_size == 281
    assert_adapters_on(base, last, 1.5)
    assert_scored_as_merged(last, text)
    run("--prompt", "line", "--max_tokens", 8, "--identifier", name, "--save_dir", tmp_path / "lm")
