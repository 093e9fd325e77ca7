"""Exchange with Hugging Face: what mlx_lm computes with our export, and what comes back of it."""

import hashlib
import json
import subprocess
import sys

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, run
from datasets import BPETokenizer, ByteTokenizer, CharTokenizer, UsageError, WordTokenizer
from mlx.utils import tree_flatten, tree_unflatten

from extras.huggingface import export_model, import_model, tokenizer_json

TEXT = "the cat <unk> sat\non the  mat — né 😀\n\nx\x1cy\t\u3000z\r\n"
TOKENIZERS = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer.train([TEXT]),
    "word": WordTokenizer.train([TEXT]),
    "bpe": BPETokenizer.train([TEXT] * 20, 300),
}
# All pairs of swiglu with and without qk_norm, heads, tied or not, tokenizer.
SHAPES = {
    "llama-byte": dict(num_kv_heads=4, tokenizer="byte"),
    "llama-gqa-untied-char": dict(num_kv_heads=2, untie=True, tokenizer="char"),
    "qwen-gqa-byte": dict(num_kv_heads=2, qk_norm=True, tokenizer="byte"),
    "qwen-untied-char": dict(num_kv_heads=4, qk_norm=True, untie=True, tokenizer="char"),
    "llama-mqa-word": dict(num_kv_heads=1, tokenizer="word"),
    "qwen-mqa-untied-word": dict(num_kv_heads=1, qk_norm=True, untie=True, tokenizer="word"),
    "llama-untied-bpe": dict(num_kv_heads=4, untie=True, tokenizer="bpe"),
    "qwen-gqa-bpe": dict(num_kv_heads=2, qk_norm=True, tokenizer="bpe"),
}


def make_model(vocab_size=257, seed=0, dim=64, **values):
    """A model with random weights, none of them 0 or 1."""
    shape = dict(context_size=32, num_blocks=2, dim=dim, num_heads=4, num_kv_heads=4)
    shape |= dict(mlp="swiglu", mlp_dim=2 * dim)
    model = main.LanguageModel(main.Config(vocab_size, **shape | values))
    random = np.random.default_rng(seed)
    weights = []
    for name, weight in tree_flatten(model.parameters()):
        mean = 1 if weight.ndim == 1 else 0
        weights.append((name, mx.array(random.normal(mean, 0.2, weight.shape).astype(np.float32))))
    model.update(tree_unflatten(weights))
    return model


def logits_of(model, tokens):
    return np.array(model(mx.array([list(tokens)]))[0])


# ---- Tokenizers ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_json_gives_the_same_ids(kind):
    from tokenizers import Tokenizer

    tokenizer = TOKENIZERS[kind]
    theirs = Tokenizer.from_str(tokenizer_json(tokenizer)[0])
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    characters = "".join(map(chr, range(1, 0x250)))
    for text in (TEXT, "", "\n", "a", " a  zebra\n\n<eos> \x1d the<unk>cat ", characters):
        tokens = tokenizer.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False).ids == tokens
        if kind in ("byte", "bpe"):
            assert theirs.decode(tokens, skip_special_tokens=False) == text
    if kind == "word":
        tokens = tokenizer.encode("the cat\nsat x").tolist()
        assert theirs.decode(tokens, skip_special_tokens=False) == "the cat\nsat x"


# ---- Export -------------------------------------------------------------------------------------
LOAD = """
import json, sys
import mlx.core as mx, numpy as np
from mlx_lm import load
mx.set_default_device(mx.cpu)
text, results = open(sys.argv[1], newline="").read(), {}
for name in sys.argv[2:]:
    model, tokenizer = load(name)
    ids = tokenizer.encode(text)
    logits = model(mx.array([ids[:32]])).astype(mx.float32)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}])
    logits = np.array(logits)[0].tolist()
    results[name] = [ids, logits, tokenizer.eos_token_id, tokenizer.decode(chat)]
json.dump(results, open("results.json", "w"))
"""


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Exported models by name, and what mlx_lm makes of their folders in a process of its own."""
    folder, models = tmp_path_factory.mktemp("exported"), {}
    for name, shape in SHAPES.items():
        shape = dict(shape)
        tokenizer = TOKENIZERS[shape.pop("tokenizer")]
        models[name] = make_model(tokenizer.vocab_size, **shape), tokenizer
        export_model(*models[name], folder / name, None)
    model = make_model(dim=128, seed=3)
    export_model(model, TOKENIZERS["byte"], folder / "quantized", 4)  # which packs it
    models["quantized"] = model, TOKENIZERS["byte"]
    (folder / "text.txt").write_text(TEXT, newline="")
    (folder / "load.py").write_text(LOAD)
    command = [sys.executable, "load.py", "text.txt", *models]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return folder, models, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", [*SHAPES, "quantized"])
def test_mlx_lm_loads_what_is_exported(exported, name):
    _, models, results = exported
    model, tokenizer = models[name]
    tokens, logits, eos, chat = results[name]
    assert tokens == tokenizer.encode(TEXT).tolist() and eos == tokenizer.eos
    np.testing.assert_allclose(logits, logits_of(model, tokens[:32]), rtol=0, atol=1e-4)
    assert chat == "the cat"


@pytest.mark.parametrize("shape, blame", [
    (dict(mlp="gelu"), "--mlp gelu"),
    (dict(mlp="relu2", qk_norm=True), "--qk_norm"),
])  # fmt: skip
def test_no_counterpart(tmp_path, shape, blame):
    with pytest.raises(UsageError, match=blame):
        export_model(make_model(**shape), TOKENIZERS["byte"], tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


# ---- Import -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in SHAPES if "char" not in name])
def test_import_is_the_inverse_of_export(exported, name):
    folder, models, _ = exported
    model, tokenizer = models[name]
    found, its, checkpoint_id = import_model(folder / name)
    assert found.config == model.config
    assert checkpoint_id == hashlib.sha1((folder / name / "model.safetensors").read_bytes()).hexdigest()
    assert its.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert its.eos == tokenizer.eos
    tokens = [i % model.config.vocab_size for i in range(20)]
    np.testing.assert_array_equal(logits_of(found, tokens), logits_of(model, tokens))


def test_import_of_shards_in_bfloat16_with_heads_of_their_own(tmp_path):
    """Qwen3's smaller models have heads whose dimensions do not sum to the model's."""
    model = make_model(qk_norm=True, head_dim=32, norm_eps=1e-6, rope_theta=1e6)
    export_model(model, TOKENIZERS["byte"], tmp_path, None)
    weights = {}
    for name, weight in mx.load(str(tmp_path / "model.safetensors")).items():
        weights[name] = weight.astype(mx.bfloat16)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    for i in range(2):
        shard = {name: weights[name] for name in names[i::2]}
        path = tmp_path / f"model-{i + 1:05d}-of-00002.safetensors"
        mx.save_safetensors(str(path), shard, {"format": "pt"})
    found, _, first_id = import_model(tmp_path)
    assert found.config == model.config and found.config.head_dim == 32
    for name, weight in tree_flatten(found.parameters()):
        assert weight.dtype == mx.float32
        assert mx.array_equal(weight, weights[name].astype(mx.float32))
    # The last shard decides the id, too.
    shard["model.norm.weight"] = weights["model.norm.weight"] * 2
    mx.save_safetensors(str(path), shard, {"format": "pt"})
    assert import_model(tmp_path)[2] != first_id


def change(folder, **values):
    """Puts these entries into config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="gpt2"), "model_type gpt2"),
    (dict(model_type=None), "model_type"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope yarn"),
    (dict(rope_parameters=None, rope_scaling={"type": "linear"}), "rope linear"),
    (dict(quantization={"bits": 4}), "quantization"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(hidden_act="gelu"), "hidden_act gelu"),
    (dict(max_position_embeddings=None), "max_position_embeddings"),
    (dict(num_hidden_layers=3), "layers.2"),
    (dict(intermediate_size=96), "gate_proj"),
    (dict(hidden_size=None), "holds no"),
])  # fmt: skip
def test_settings_that_cannot_be_imported(tmp_path, changes, words):
    export_model(make_model(), TOKENIZERS["byte"], tmp_path, None)
    change(tmp_path, **changes)
    with pytest.raises(UsageError) as error:
        import_model(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("file, content, words", [
    ("config.json", None, "config.json"),
    ("config.json", b"{", "Expecting"),
    ("model.safetensors", None, "Missing"),
    ("model.safetensors", b"damaged", "holds no"),
    ("tokenizer.json", None, "tokenizer.json"),
    ("tokenizer.json", b"{}", "holds no"),
])  # fmt: skip
def test_folders_that_cannot_be_imported(tmp_path, file, content, words):
    export_model(make_model(), TOKENIZERS["byte"], tmp_path, None)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UsageError) as error:
        import_model(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- The command line ---------------------------------------------------------------------------
@pytest.fixture
def base(tmp_path, text):
    """A folder with one checkpoint of a SwiGLU model, which Hugging Face has a name for."""
    training = ["--learning_rate", 0.01, "--lr_warmup", 5, "--num_iters", 20]
    folder = tmp_path / "lm"
    run("--text", text, *TINY, "--mlp", "swiglu", *training, "--save_dir", folder)
    return folder


def test_a_checkpoint_comes_back_as_it_was(base, tmp_path):
    _, err = run("--export", tmp_path / "hf", "--save_dir", base)
    assert f"LlamaForCausalLM and its tokenizer are in {tmp_path / 'hf'}" in err
    [record] = main.list_checkpoints(base)
    model, tokenizer = main.load_model(base, record)
    found, its, _ = import_model(tmp_path / "hf")
    assert its.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    theirs = dict(tree_flatten(found.parameters()))
    for name, weight in tree_flatten(model.parameters()):
        assert mx.array_equal(weight, theirs.pop(name))
    assert not theirs


@pytest.mark.parametrize("typed, words", [
    (["--export", "/proc/none"], "cannot write to --export"),
    (["--export", "/tmp/x", "--prompt", "x"], "exclude each other"),
])  # fmt: skip
def test_mistakes(base, typed, words):
    err = run(*typed, "--save_dir", base, status=2)[1]
    assert words in err.splitlines()[-1] and "Traceback" not in err
