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
    found = arrays(main.read_contents(checkpoint).load_model())
    assert_equal(found, expected, rtol=1e-5, atol=1e-6)
    return matrices


def assert_scored_as_merged(checkpoint, text):
    """Its last score, of base and adapters as they were trained, is that of the merged weights."""
    tokens = load_dataset("text", text.parent, [text]).valid.tokens
    nats = main.evaluate(main.read_contents(checkpoint).load_model(), tokens, 4)["loss"]
    assert checkpoint.evaluation.loss == pytest.approx(nats, abs=1e-5)


LORA = "--lora_rank 2 --dropout 0.1 --average 0.3 --learning_rate 0.03 --lr_warmup 5".split()
LORA += "--steps_per_eval 4 --eval_tokens 0 --sample_tokens 8 --num_iters".split()


CALL = "    def __call__(self, x):\n        return 0.9 * super().__call__(x)\n"


def test_an_edited_product_counts_under_the_adapters(base, text, tmp_path):
    """As much as once they are merged: as they begin as nothing, both scores are the base's."""
    folder, id = base
    edits = {
        anchors.MLP: f"class Scaled(nn.Linear):\n{CALL}\n\n{anchors.MLP}",
        anchors.DOWN_PROJECTION: anchors.DOWN_PROJECTION.replace("nn.Linear", "Scaled"),
    }
    program = [copy_program(tmp_path / "copy", edits)]
    line = ["--text", text, "--init_from", id, "--save_dir", folder]
    run(*line, *LORA, 3, "--learning_rate=0", program=program)
    out, _ = run("--evaluate=valid", "--save_dir", folder, program=program)
    [nats] = re.findall(r"^valid ([\d.]+) nats", out, re.M)
    assert newest(folder).evaluation.loss == pytest.approx(float(nats), abs=2e-4)


def test_lora_run(base, text, tmp_path):
    """Its checkpoint holds adapters alone; sampling and export merge them into the base.

    Interrupted, and without its base, it ends with the same checkpoint.
    """
    folder, id = base
    model = main.read_contents(newest(folder)).load_model()
    line = ["--text", text, "--init_from", id[:10], *LORA]
    shutil.copytree(folder, tmp_path / "whole")
    run(*line, 12, "--save_dir", tmp_path / "whole")
    name, _, _ = begin(*line, 5, "--save_dir", folder)
    shutil.rmtree(saved(folder)[-1].folder)
    assert begin("--num_iters=12", "--save_dir", folder)[:2] == (name, 5)
    last = newest(folder)
    assert last.id == newest(tmp_path / "whole").id
    matrices = assert_adapters_on(model, last, 2)
    assert len(matrices) == 2 * 7
    assert all(matrix.any() for matrix in matrices)
    assert_scored_as_merged(last, text)

    run_extra("export", tmp_path / "hf", "--identifier", last.id, "--save_dir", folder)
    again, *_ = import_model(tmp_path / "hf")
    merged = main.read_contents(last).load_model()
    np.testing.assert_array_equal(logits_of(again, [1, 2, 3]), logits_of(merged, [1, 2, 3]))


def test_branches_of_a_lora_run_and_adapters_on_it(base, text):
    """Each has in its own folder all that it needs, and more adapters go onto adapters."""
    folder, id = base
    runs = ["--save_dir", folder]
    name, _, _ = begin("--text", text, "--init_from", id, *runs, *LORA, 4)
    branch, iteration, _ = begin("--identifier", name, "--dropout=0.2", *runs, "--num_iters=5")
    assert (branch != name, iteration) == (True, 4)
    nested, iteration, _ = begin("--text", text, "--init_from", branch, *runs, *LORA, 2)
    assert (nested != name, iteration) == (True, 0)
    for run_folder in {checkpoint.folder for checkpoint in saved(folder)}:
        if run_folder.name not in (nested, branch):
            shutil.rmtree(run_folder)
    line = ["--identifier", branch, *runs, "--num_iters=6"]
    assert "contradicts" in run(*line, "--lora_rank=4", status=2)[1]
    assert begin(*line, "--lora_rank=2")[:2] == (branch, 5)
    shutil.rmtree(folder / branch)
    assert begin("--identifier", nested, *runs, "--num_iters=3")[:2] == (nested, 2)


def test_a_base_with_more_rows_than_ids(tmp_path, text):
    """As Qwen's, padded for speed, with biases: its shape stays, without the folder, too."""
    hf = tmp_path / "hf"
    base = make_model(vocab_size=257 + 24, mlp="swiglu", qkv_bias=True)
    export_model(base, ByteTokenizer(), hf, None)
    runs = ["--save_dir", tmp_path / "lm"]
    name, _, _ = begin("--text", text, "--init_from", hf, *runs, "--lora_alpha=3", *LORA, 2)
    shutil.rmtree(hf)
    assert begin("--num_iters=4", *runs)[:2] == (name, 2)
    last = newest(tmp_path / "lm")
    assert last.config["vocab_size"] == 281
    assert_adapters_on(base, last, 1.5)
    assert_scored_as_merged(last, text)
