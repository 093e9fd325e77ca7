"""LoRA: adapters that begin as nothing and are trained alone, and the base that they need."""

import re
import shutil

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import begin, flags, ids, run, run_extra
from datasets import ByteTokenizer
from mlx.utils import tree_flatten, tree_unflatten

from extras.huggingface import export_model
from extras.lora import add_lora, init_lora, merge


def make_model(vocab_size=257, seed=0, dim=64, **values):
    """A model with random weights, none of them 0 or 1."""
    shape = dict(context_size=32, num_blocks=2, dim=dim, num_heads=4, num_kv_heads=4)
    shape |= dict(mlp="swiglu", mlp_dim=2 * dim)
    model = main.LanguageModel(main.Config(vocab_size, **shape | values))
    random = np.random.default_rng(seed)
    weights = []
    for name, weight in tree_flatten(model.parameters()):
        mean = 1 if weight.ndim == 1 else 0
        value = random.normal(mean, 0.2, weight.shape)
        weights.append((name, mx.array(value.astype(np.float32))))
    model.update(tree_unflatten(weights))
    return model


def logits_of(model, tokens):
    return np.array(model(mx.array([list(tokens)]))[0])


def test_adapters_begin_as_nothing_and_alone_are_trained():
    model = make_model(mlp="relu2")
    base = make_model(mlp="relu2")
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


def test_adapters_keep_a_bias():
    """Of queries, keys and values, as Qwen2 has it: it stays, frozen."""
    model = make_model(qkv_bias=True)
    tokens = mx.array([[1, 5, 3, 2]])
    expected = np.array(model(tokens))
    biases = [name for name, _ in tree_flatten(model.parameters()) if name.endswith(".bias")]
    assert len(biases) == 3 * len(model.model.layers)
    add_lora(model, 2, 4.0)
    np.testing.assert_array_equal(np.array(model(tokens)), expected)
    assert not [name for name, _ in tree_flatten(model.trainable_parameters()) if "bias" in name]


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


LORA = "--lora_rank 2 --num_iters 30 --dropout 0.1 --average 0.3".split()
LORA += "--learning_rate 0.03 --lr_warmup 5".split()
LORA += ["--max_tokens", 8]


def checkpoint_of(folder, checkpoint_id):
    [found] = [each for each in main.list_checkpoints(folder) if each.id == checkpoint_id]
    return found


def test_lora_run(base, text, tmp_path):
    """Its checkpoint holds adapters alone and names its base; sampling and export merge them.

    Interrupted, it ends with the same checkpoint.
    """
    folder, id = base
    line = ["--text", text, "--init_from", id[:10], *LORA, "--save_dir"]
    shutil.copytree(folder, tmp_path / "other")
    out, _ = run(*line, folder)
    assert "trainable" in out
    [last] = [each for each in main.list_checkpoints(folder) if each.id != id]
    assert last.origins == {"init_from": id}
    assert last.flags["lora_alpha"] == 4
    assert last.run != checkpoint_of(folder, id).run
    weights = mx.load(str(last.weights_path))
    assert len(weights) == 2 * 2 * 7
    assert all("lora_" in name for name in weights)

    run(*line, tmp_path / "other", "--num_iters", 11)
    run(*line, tmp_path / "other", "--num_iters", 30)
    assert ids(tmp_path / "other")[0] == last.id
    # It goes on without the base being named again.
    out, _ = run("--save_dir", tmp_path / "other", "--num_iters", 31)
    assert "from iteration 30 to 31" in out

    live = checkpoint_of(folder, id).open().load_model()
    add_lora(live, 2, 4)
    live.load_weights(list(weights.items()), strict=False)
    contents = last.open()
    merged = contents.load_model()
    tokens = contents.tokenizer.encode("line 5: the quick").tolist()
    expected = logits_of(live, tokens)
    np.testing.assert_allclose(logits_of(merged, tokens), expected, rtol=0, atol=1e-4)
    run_extra("export", tmp_path / "hf", "--save_dir", folder)
    again = main.open_model(folder, str(tmp_path / "hf"), "init_from")
    np.testing.assert_array_equal(logits_of(again.model, tokens), logits_of(merged, tokens))


@pytest.mark.parametrize("options", [[], ["--lora_rank", 2]], ids=["all", "lora"])
def test_a_base_with_more_rows_than_ids(tmp_path, text, options):
    """As Qwen3's, padded for speed: its shape stays, in every leg."""
    export_model(make_model(257 + 24), ByteTokenizer(), tmp_path / "hf", None)
    line = ["--text", text, "--init_from", tmp_path / "hf", *options, "--max_tokens", 8]
    line += ["--save_dir", tmp_path / "lm"]
    run(*line, "--num_iters", 2)
    out, _ = run(*line, "--num_iters", 4)
    assert "from iteration 2 to 4" in out
    assert main.list_checkpoints(tmp_path / "lm")[0].config["vocab_size"] == 281
    run("--prompt", "line", "--max_tokens", 8, "--save_dir", tmp_path / "lm")


def test_a_base_that_is_gone_or_changed(base, text, tmp_path):
    """The run has what it needs of it: it goes on, and can be sampled from."""
    folder, _ = base
    run_extra("export", tmp_path / "hf", "--save_dir", folder)
    line = ["--text", text, "--init_from", tmp_path / "hf", *LORA, "--save_dir", folder]
    name, _, _ = begin(*line)
    sampled = ["--identifier", name, "--prompt", "line", "--save_dir", folder]
    before, _ = run(*sampled)
    source = main.open_model(folder, str(tmp_path / "hf"), "init_from")
    norm = source.model.model.norm.weight
    source.model.update(tree_unflatten([("model.norm.weight", norm * 2)]))
    shutil.rmtree(tmp_path / "hf")
    export_model(source.model, source.tokenizer, tmp_path / "hf", None)
    assert run(*sampled)[0] == before
    shutil.rmtree(tmp_path / "hf")
    assert run(*sampled)[0] == before
    assert begin("--save_dir", folder, "--num_iters", 40)[:2] == (name, 30)
