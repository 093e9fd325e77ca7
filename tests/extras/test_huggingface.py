"""Exchange with Hugging Face: what mlx_lm computes with our export, and what comes back of it."""

import json
import os
import resource
import shutil
import subprocess
import sys

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, begin, run
from datasets import ByteTokenizer, CharTokenizer, PackageTokenizer, UsageError, WordTokenizer
from datasets import end_of_text
from mlx.utils import tree_flatten, tree_unflatten

from extras.huggingface import export_model, import_model, tokenizer_json

TEXT = "the cat <unk> sat\non the  mat — né 😀\n\nx\x1cy\t\u3000z\r\n"
TOKENIZERS = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer.train([TEXT]),
    "word": WordTokenizer.train([TEXT + " </s>"]),  # a word that ends others' texts
    "bpe": PackageTokenizer.train([TEXT] * 20, 300),
}
# RoPE as Llama 3's: pairs of dimensions that are kept, that are stretched, and one between.
STRETCHED = dict(rope_theta=500.0, rope_scaling=[8.0, 1.0, 2.5, 16])
SHAPES = {
    "llama": dict(num_kv_heads=4, tokenizer="byte"),
    "llama-untied": dict(num_kv_heads=1, untie=True, tokenizer="char"),
    "qwen2": dict(num_kv_heads=2, qkv_bias=True, tokenizer="bpe"),
    "qwen3": dict(num_kv_heads=2, qk_norm=True, head_dim=32, norm_eps=1e-6, tokenizer="word"),
    "llama3": dict(num_kv_heads=2, **STRETCHED, tokenizer="byte"),
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
        value = random.normal(mean, 0.2, weight.shape)
        weights.append((name, mx.array(value.astype(np.float32))))
    model.update(tree_unflatten(weights))
    return model


def logits_of(model, tokens):
    return np.array(model(mx.array([list(tokens)]))[0])


def change(folder, file="config.json", **values):
    """Puts these entries into config.json, or into another file; None is JSON's null."""
    path = folder / file
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps(content))


def weights_of(folder):
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    return weights


def save(weights, path):
    mx.save_safetensors(str(path), weights, {"format": "pt"})


# ---- Export -------------------------------------------------------------------------------------
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


LOAD = """
import json, sys
import mlx.core as mx, numpy as np
from mlx_lm import load
mx.set_default_device(mx.cpu)
text = open(sys.argv[1], newline="").read()
results = {}
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
    """A folder of exported models, and these by name."""
    folder = tmp_path_factory.mktemp("exported")
    models = {}
    for name, shape in SHAPES.items():
        shape = dict(shape)
        tokenizer = TOKENIZERS[shape.pop("tokenizer")]
        models[name] = make_model(tokenizer.vocab_size, **shape), tokenizer
        export_model(*models[name], folder / name, None)
    return folder, models


def test_mlx_lm_loads_what_is_exported(exported, tmp_path):
    folder, models = exported
    model = make_model(dim=128, seed=3)
    export_model(model, TOKENIZERS["byte"], folder / "packed", 4)  # which packs the model, too
    models = models | {"packed": (model, TOKENIZERS["byte"])}
    (folder / "text.txt").write_text(TEXT, newline="")
    command = [sys.executable, "-c", LOAD, "text.txt", *models]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "results.json").read_text())
    for name, (model, tokenizer) in models.items():
        tokens, logits, eos, chat = results[name]
        assert tokens == tokenizer.encode(TEXT).tolist()
        assert eos == tokenizer.eos
        for file in ("config.json", "generation_config.json"):
            settings = json.loads((folder / name / file).read_text())
            assert settings["eos_token_id"] == end_of_text(tokenizer)  # no line end
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


@pytest.mark.parametrize("file", [
    "model-00001-of-00002.safetensors",
    "0123456789.safetensors",
    "tokenizer.json",
])  # fmt: skip
def test_no_model_is_exported_over_another(tmp_path, file):
    """It may be one that a run needs; other weights beside ours would be read as a part of them."""
    (tmp_path / file).write_text("theirs")
    with pytest.raises(UsageError, match=f"{tmp_path} holds {file} already"):
        export_model(make_model(), TOKENIZERS["byte"], tmp_path, None)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]
    (tmp_path / file).rename(tmp_path / "README.md")
    export_model(make_model(), TOKENIZERS["byte"], tmp_path, None)
    assert import_model(tmp_path)


@pytest.mark.parametrize("size", [1_000, 396_000])
def test_a_full_disk_leaves_no_half_of_an_export(tmp_path, size):
    model = make_model()
    mx.eval(model.parameters())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(UsageError, match="cannot write to"):
            export_model(model, TOKENIZERS["byte"], tmp_path / "hf", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path / "hf") == []
    export_model(model, TOKENIZERS["byte"], tmp_path / "hf", None)  # once there is room
    assert import_model(tmp_path / "hf")


# ---- Import -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "llama3"])
def test_import_is_the_inverse_of_export(exported, name):
    folder, models = exported
    model, tokenizer = models[name]
    found, its, *_ = import_model(folder / name)
    assert found.config == model.config
    assert its.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert its.eos == tokenizer.eos
    assert its.unknown("the ☃") == tokenizer.unknown("the ☃")
    tokens = [i % model.config.vocab_size for i in range(20)]
    np.testing.assert_array_equal(logits_of(found, tokens), logits_of(model, tokens))


def test_llama3_rope_by_its_formula():
    """Angles of each pair by the case distinction of Llama 3's own code."""
    d = context = 16
    base = 500.0
    factor = 8.0
    low = 1.0
    high = 2.5
    frequencies = main.rope_frequencies(d, base, [factor, low, high, context])
    kinds = []
    speeds = []
    for i in range(0, d, 2):
        speed = base ** (-i / d)
        wavelength = 2 * np.pi / speed
        if wavelength < context / high:
            kinds.append("kept")
        elif wavelength > context / low:
            kinds.append("stretched")
            speed /= factor
        else:
            kinds.append("between")
            smooth = (context / wavelength - low) / (high - low)
            speed = (1 - smooth) * speed / factor + smooth * speed
        speeds.append(speed)
    assert set(kinds) == {"kept", "stretched", "between"}
    x = np.random.default_rng(0).normal(size=(1, 1, 9, d))
    angles = (np.arange(9) + 5)[:, None] * np.array(speeds)
    cos = np.cos(angles)
    sin = np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    expected = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    found = np.array(main.rotate(mx.array(x.astype(np.float32)), frequencies, offset=5))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.fixture
def hf(tmp_path):
    """A folder with a Llama."""
    export_model(make_model(), TOKENIZERS["byte"], tmp_path / "hf", None)
    return tmp_path / "hf"


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED = [8.0, 1.0, 4.0]
DEFAULT = {"rope_type": "default", "rope_theta": 44.0}


@pytest.mark.parametrize("changes, expected", [
    (dict(rope_theta=77), dict(rope_theta=1e4)),  # beside RoPE's settings, which have their own
    (dict(rope_theta=77, rope_parameters=None), dict(rope_theta=77.0)),
    (dict(rope_scaling=DEFAULT), dict(rope_theta=44.0, rope_scaling=None)),
    (dict(rope_scaling={"type": "llama3", **LLAMA3}), dict(rope_scaling=[*SCALED, 32])),
    (
        dict(
            rope_parameters=DEFAULT | LLAMA3 | {"rope_type": "llama3"},
            original_max_position_embeddings=16,
        ),
        dict(rope_theta=44.0, rope_scaling=[*SCALED, 16]),
    ),
    (dict(num_key_value_heads=None, head_dim=None), dict(num_kv_heads=4, head_dim=16)),
    (dict(model_type="mistral", sliding_window=None), dict(context_size=32)),
    (dict(model_type="mistral", sliding_window=20), dict(context_size=20)),
    (dict(model_type="mistral", max_position_embeddings=9999), dict(context_size=4096)),
    (dict(attention_bias=None, partial_rotary_factor=1.0, is_causal=True), dict()),
])  # fmt: skip
def test_settings_as_transformers_reads_them(hf, changes, expected):
    """As transformers 5.24 does, to whose logits 2,000 random folders were compared by hand."""
    before, *_ = import_model(hf)
    change(hf, **changes)
    found, *_ = import_model(hf)
    assert vars(found.config) == vars(before.config) | expected


def test_weights_of_an_index_in_bfloat16(hf, tmp_path):
    """And of nothing else that lies there; RoPE's speeds, as older folders have, are computed."""
    weights = {}
    for name, weight in weights_of(hf).items():
        weights[name] = weight.astype(mx.bfloat16)
    (hf / "model.safetensors").rename(hf / "model_old.safetensors")
    names = sorted(weights)
    index = {}
    for i in range(2):
        shard = {name: weights[name] for name in names[i::2]}
        shard[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = mx.ones(8)
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save(shard, hf / file)
        index |= dict.fromkeys(shard, file)
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found, _, first_id, files = import_model(hf)
    for name, weight in tree_flatten(found.parameters()):
        assert weight.dtype == mx.float32
        assert mx.array_equal(weight, weights[name].astype(mx.float32))
    # A copy of what was read is the same model.
    (tmp_path / "copy").mkdir()
    for name, path in files.items():
        shutil.copy(path, tmp_path / "copy" / name)
    assert import_model(tmp_path / "copy")[2] == first_id
    # The last shard decides the id, too.
    shard["model.norm.weight"] = weights["model.norm.weight"] * 2
    save(shard, hf / file)
    assert import_model(hf)[2] != first_id
    (hf / file).unlink()
    with pytest.raises(UsageError, match=f"it has no file {file}"):
        import_model(hf)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("head", ["none", "equal", "other", "alone"])
def test_ties_are_those_of_config_and_weights(hf, is_tied, head):
    """Where the two disagree, nothing that was learned is dropped."""
    weights = weights_of(hf)
    embeddings = weights["model.embed_tokens.weight"]
    if head != "none":
        weights["lm_head.weight"] = embeddings * 2 if head == "other" else embeddings
    if head == "alone":
        del weights["model.embed_tokens.weight"]
    save(weights, hf / "model.safetensors")
    change(hf, tie_word_embeddings=is_tied)
    if not is_tied and head in ("none", "alone"):
        with pytest.raises(UsageError, match="its files lack (lm_head|model.embed_tokens).weight"):
            import_model(hf)
        return
    model, *_ = import_model(hf)
    assert model.config.untie == (head == "other" or not is_tied)
    assert mx.array_equal(model.model.embed_tokens.weight, embeddings)
    wanted = embeddings * 2 if head == "other" else embeddings
    assert mx.array_equal(model.head, wanted)


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="gpt2"), "its model_type is gpt2"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(use_sliding_window=True), "use_sliding_window"),
    (dict(is_causal=False), "is_causal"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type yarn"),
    (dict(rope_parameters=None, rope_scaling={"type": "linear"}), "rope_type linear"),
    (dict(rope_parameters={"full_attention": DEFAULT}), "full_attention"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "needs factor, low_freq"),
    (dict(rope_scaling=LLAMA3 | {"type": "llama3", "factor": 0.5}), "cannot be scaled by"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(hidden_act="gelu"), "hidden_act gelu"),
    (dict(num_hidden_layers=3), "its files lack model.layers.2."),
    (dict(num_hidden_layers=1), "it has model.layers.1."),
    (dict(intermediate_size=96), "mlp.down_proj.weight is (64, 128), by config.json (64, 96)"),
    (dict(max_position_embeddings="64"), "its context_size is of another type"),
])  # fmt: skip
def test_settings_that_cannot_be_imported(hf, changes, words):
    change(hf, **changes)
    with pytest.raises(UsageError) as error:
        import_model(hf)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665d63f\nsize 538090408\n"


@pytest.mark.parametrize("file, content, words", [
    ("config.json", None, "it has no file config.json"),
    ("config.json", b"{", "Expecting"),
    ("model.safetensors", None, "it has no file model.safetensors"),
    ("model.safetensors", b"damaged", "model.safetensors is damaged or incomplete"),
    ("model.safetensors", POINTER, "run git lfs pull"),
    ("tokenizer.json", None, "it has no file tokenizer.json"),
    ("tokenizer.json", POINTER, "run git lfs pull"),
    ("adapter_config.json", b"{}", "merge that into its base"),
])  # fmt: skip
def test_folders_that_cannot_be_imported(hf, file, content, words):
    (hf / file).unlink(missing_ok=True)
    if content is not None:
        (hf / file).write_bytes(content)
    with pytest.raises(UsageError) as error:
        import_model(hf)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_half_a_download_and_weights_that_are_no_numbers_of_ours(hf):
    path = hf / "model.safetensors"
    weights = weights_of(hf)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(UsageError, match="model.safetensors is damaged or incomplete"):
        import_model(hf)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(mx.uint8)  # as FP8 is read
    save(weights, path)
    with pytest.raises(UsageError, match="model.norm.weight is neither float32"):
        import_model(hf)


def test_tokens_beyond_the_embeddings(hf):
    """An added one is left out: no text has it. Any other would be read from somewhere else."""
    path = hf / "tokenizer.json"
    content = json.loads(path.read_text())
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    pad = {"id": 257, "content": "[PAD]", "special": True, **options}
    change(hf, "tokenizer.json", added_tokens=[*content["added_tokens"], pad])
    _, tokenizer, *_ = import_model(hf)
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("[PAD]").tolist() == list(b"[PAD]")
    change(hf, "tokenizer.json", model=content["model"] | {"vocab": {"a": 0, "b": 257}})
    with pytest.raises(UsageError, match="tokenizer has "):
        import_model(hf)


# ---- The command line ---------------------------------------------------------------------------
@pytest.mark.parametrize("flag", ["--teacher", "--init_from"])
def test_a_run_keeps_the_very_model_it_was_begun_with(hf, tmp_path, text, flag):
    """Configuration and tokenizer belong to it, not the weights alone: else it is another one."""
    shutil.copytree(hf, tmp_path / "original")
    line = ["--text", text, "--batch_size", 4, "--max_tokens", 2, "--save_dir", tmp_path / "lm"]
    line += ["--lora_rank", 2] if flag == "--init_from" else TINY
    name, _, _ = begin(*line, flag, hf, "--num_iters", 1)
    for file, values in (
        ("config.json", dict(rms_norm_eps=1e-3)),
        ("tokenizer_config.json", dict(eos_token="a")),
    ):
        change(hf, file, **values)
        other, iteration, _ = begin(*line, flag, hf, "--num_iters", 1)
        assert (other != name, iteration) == (True, 0)
        shutil.copy(tmp_path / "original" / file, hf)
    assert begin(*line, flag, tmp_path / "original", "--num_iters", 2)[:2] == (name, 1)
    shutil.rmtree(hf)
    run("--prompt", "a", "--identifier", name, "--save_dir", tmp_path / "lm", "--max_tokens", 1)
    assert begin(*line, flag, hf, "--num_iters", 3)[1] >= 1, "as it was spelled"
