"""Exchange with Hugging Face: what mlx_lm computes with our export, and what comes back of it."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, begin, ids, run, run_extra
from datasets import ByteTokenizer, CharTokenizer, PackageTokenizer, UsageError, WordTokenizer
from datasets import end_of_text
from mlx.utils import tree_flatten, tree_unflatten

from extras import huggingface
from extras.huggingface import export_model, import_model, tokenizer_json

TEXT = "the cat <unk> sat\non the  mat — né 😀\n\nx\x1cy\t\u3000z\r\n"
TOKENIZERS = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer.train([TEXT]),
    "word": WordTokenizer.train([TEXT]),
    "bpe": PackageTokenizer.train([TEXT] * 20, 300),
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
    "qwen2-gqa-byte": dict(num_kv_heads=2, qkv_bias=True, tokenizer="byte"),
    # Pairs of dimensions that are kept, that are stretched, and one between.
    "llama3-byte": dict(
        num_kv_heads=2,
        rope_theta=500.0,
        rope_scaling=(8.0, 1.0, 2.5, 16),
        tokenizer="byte",
    ),
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
    """Exported models by name, and what mlx_lm makes of their folders in a process of its own."""
    folder = tmp_path_factory.mktemp("exported")
    models = {}
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
    folder, models, results = exported
    model, tokenizer = models[name]
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


# ---- Import -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in SHAPES if "char" not in name])
def test_import_is_the_inverse_of_export(exported, name):
    folder, models, _ = exported
    model, tokenizer = models[name]
    found, its, checkpoint_id, _ = import_model(folder / name)
    assert found.config == model.config
    sha1s = ""
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        sha1s += hashlib.sha1((folder / name / file).read_bytes()).hexdigest()
    assert checkpoint_id == hashlib.sha1(sha1s.encode()).hexdigest()
    assert its.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert its.eos == tokenizer.eos
    assert its.unk == tokenizer.unk
    assert its.unknown("the ☃") == tokenizer.unknown("the ☃")
    tokens = [i % model.config.vocab_size for i in range(20)]
    np.testing.assert_array_equal(logits_of(found, tokens), logits_of(model, tokens))


def test_mistral_is_a_llama_within_its_window(tmp_path):
    model = make_model(num_kv_heads=2, untie=True)
    export_model(model, TOKENIZERS["byte"], tmp_path, None)
    change(tmp_path, model_type="mistral", sliding_window=None)
    found, *_ = import_model(tmp_path)
    assert found.config == model.config
    change(tmp_path, sliding_window=20)
    found, *_ = import_model(tmp_path)
    assert found.config.context_size == 20
    np.testing.assert_array_equal(logits_of(found, range(20)), logits_of(model, range(20)))
    change(tmp_path, sliding_window="20")
    with pytest.raises(UsageError, match="sliding_window is '20'"):
        import_model(tmp_path)


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


def test_a_run_from_a_model_with_stretched_rope(tmp_path, text):
    """It trains, resumes, samples, and is exported with what it came with.

    Nothing of RoPE is trained.
    """
    scaling = [8.0, 1.0, 2.5, 16]
    model = make_model(rope_theta=500.0, rope_scaling=tuple(scaling))
    export_model(model, TOKENIZERS["byte"], tmp_path / "hf", None)
    line = ["--text", text, "--init_from", tmp_path / "hf", "--batch_size", 4, "--max_tokens", 4]
    for steps in (2, 4):
        run(*line, "--num_iters", steps, "--save_dir", tmp_path / "legs")
    run(*line, "--num_iters", 4, "--save_dir", tmp_path / "whole")
    assert ids(tmp_path / "legs")[0] == ids(tmp_path / "whole")[0]
    [checkpoint] = main.list_checkpoints(tmp_path / "whole")
    assert checkpoint.config["rope_scaling"] == scaling
    assert not [name for name in checkpoint.open().weights if "rope" in name]
    run_extra("export", tmp_path / "again", "--save_dir", tmp_path / "whole")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    rope = config["rope_parameters"]
    assert rope["rope_type"] == "llama3"
    assert rope["original_max_position_embeddings"] == 16


def test_settings_that_transformers_assumes():
    """As its LlamaConfig and ArceeConfig do.

    The RoPE settings come before what stands beside them.
    """
    settings = dict(
        vocab_size=9,
        max_position_embeddings=8,
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=8,
        rope_theta=5e5,
    )
    llama = settings | {"model_type": "llama", "rope_parameters": {"rope_theta": 2e4}}
    config = huggingface.make_config(llama, False)
    assert config.rope_theta == 2e4
    assert config.norm_eps == 1e-6
    config = huggingface.make_config(settings | {"model_type": "arcee"}, False)
    assert config.rope_theta == 5e5
    assert config.norm_eps == 1e-5


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int32, mx.bool_, mx.complex64])
def test_weights_that_are_no_numbers_of_ours_are_refused(tmp_path, dtype):
    """MLX reads FP8 as uint8: 1.0 would become 56."""
    export_model(make_model(), TOKENIZERS["byte"], tmp_path, None)
    path = tmp_path / "model.safetensors"
    weights = dict(mx.load(str(path)))
    mx.eval(weights)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(dtype)
    mx.save_safetensors(str(path), weights, {"format": "pt"})
    with pytest.raises(UsageError, match="model.norm.weight is neither float32"):
        import_model(tmp_path)


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
    found, _, first_id, _ = import_model(tmp_path)
    assert found.config == model.config
    assert found.config.head_dim == 32
    for name, weight in tree_flatten(found.parameters()):
        assert weight.dtype == mx.float32
        assert mx.array_equal(weight, weights[name].astype(mx.float32))
    # RoPE's speeds, which older folders hold as weights, are computed.
    speeds = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones(16)}
    mx.save_safetensors(str(path), shard | speeds, {"format": "pt"})
    found, *_ = import_model(tmp_path)
    assert found.config == model.config
    # The last shard decides the id, too.
    shard["model.norm.weight"] = weights["model.norm.weight"] * 2
    mx.save_safetensors(str(path), shard, {"format": "pt"})
    _, _, other_id, _ = import_model(tmp_path)
    assert other_id != first_id


def change(folder, file="config.json", **values):
    """Puts these entries into config.json, or into another file."""
    path = folder / file
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps(content))


# RoPE of Llama 3 without room between the two factors.
EQUAL_FACTORS = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 4.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="gpt2"), "model_type gpt2"),
    (dict(model_type=None), "model_type"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope yarn"),
    (dict(rope_parameters=None, rope_scaling={"type": "linear"}), "rope linear"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 0.5}), "factor is 0.5"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (dict(rope_parameters=EQUAL_FACTORS), "low_freq_factor is not below"),
    (dict(quantization={"bits": 4}), "quantization"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(hidden_act="gelu"), "hidden_act gelu"),
    (dict(max_position_embeddings=None), "max_position_embeddings"),
    (dict(num_hidden_layers=3), "layers.2"),
    (dict(intermediate_size=96), "gate_proj"),
    (dict(hidden_size=None), "holds no"),
    (dict(max_position_embeddings="64"), "max_position_embeddings is '64'"),
    (dict(max_position_embeddings=0), "max_position_embeddings is 0"),
    (dict(max_position_embeddings=2**31 - 1), "max_position_embeddings is 2147483647"),
    (dict(max_position_embeddings=64.0), "max_position_embeddings is 64.0"),
    (dict(num_hidden_layers=10**7), "num_hidden_layers is 10,000,000"),
    (dict(num_hidden_layers=10**30), "num_hidden_layers is 1000"),
    (dict(num_hidden_layers=True), "num_hidden_layers is True"),
    (dict(num_attention_heads=-4), "num_attention_heads is -4"),
    (dict(num_key_value_heads=3), "num_key_value_heads does not divide"),
    (dict(head_dim=0), "head_dim is 0"),
    (dict(head_dim=15), "head_dim is odd"),
    (dict(hidden_size=0), "hidden_size is 0"),
    (dict(hidden_size={"a": None}), "hidden_size is {'a': None}"),
    (dict(rope_theta="1e4", rope_parameters=None), "rope_theta is '1e4'"),
    (dict(rope_theta=0, rope_parameters=None), "rope_theta is 0"),
    (dict(rope_theta=float("nan"), rope_parameters=None), "rope_theta is nan"),
    (dict(rope_theta=None, rope_parameters={"rope_theta": [1e4]}), "rope_theta is [10000.0]"),
    (dict(rms_norm_eps=float("inf")), "rms_norm_eps is inf"),
    (dict(rms_norm_eps="x"), "rms_norm_eps is 'x'"),
    (dict(rope_parameters="yarn"), "holds no"),
])  # fmt: skip
def test_settings_that_cannot_be_imported(tmp_path, changes, words):
    export_model(make_model(), TOKENIZERS["byte"], tmp_path, None)
    change(tmp_path, **changes)
    with pytest.raises(UsageError) as error:
        import_model(tmp_path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file, content, words", [
    ("config.json", None, "config.json"),
    ("config.json", b"{", "Expecting"),
    ("model.safetensors", None, "no file *.safetensors"),
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
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_more_ids_than_the_model_has(tmp_path):
    """Ids without an embedding would be read from whatever lies behind the last one."""
    export_model(make_model(256), TOKENIZERS["byte"], tmp_path / "few", None)
    with pytest.raises(UsageError, match="tokenizer has the id 256, vocab_size 256"):
        import_model(tmp_path / "few")
    export_model(make_model(320), TOKENIZERS["byte"], tmp_path / "padded", None)
    padded, *_ = import_model(tmp_path / "padded")
    assert padded.config.vocab_size == 320
    path = tmp_path / "padded" / "tokenizer.json"
    content = path.read_text("utf-8")
    path.write_text(re.sub('("<eos>": ?)256', r"\g<1>300", content), "utf-8")
    with pytest.raises(UsageError, match="tokenizer has 257 ids, but one is 300"):
        import_model(tmp_path / "padded")


# ---- The command line ---------------------------------------------------------------------------
@pytest.fixture
def base(tmp_path, text):
    """A folder with one checkpoint of a SwiGLU model, which Hugging Face has a name for."""
    training = ["--learning_rate", 0.01, "--lr_warmup", 5, "--num_iters", 20]
    folder = tmp_path / "lm"
    run("--text", text, *TINY, "--mlp", "swiglu", *training, "--save_dir", folder)
    return folder


def test_a_checkpoint_comes_back_as_it_was(base, tmp_path):
    _, err = run_extra("export", tmp_path / "hf", "--save_dir", base)
    assert f"LlamaForCausalLM and its tokenizer are in {tmp_path / 'hf'}" in err
    [checkpoint] = main.list_checkpoints(base)
    contents = checkpoint.open()
    model = contents.load_model()
    found, its, *_ = import_model(tmp_path / "hf")
    assert its.encode(TEXT).tolist() == contents.tokenizer.encode(TEXT).tolist()
    theirs = dict(tree_flatten(found.parameters()))
    for name, weight in tree_flatten(model.parameters()):
        assert mx.array_equal(weight, theirs.pop(name))
    assert not theirs


@pytest.mark.parametrize("flag", ["--teacher", "--init_from"])
def test_another_model_in_a_folder_makes_another_run(tmp_path, text, flag):
    """Configuration and tokenizer belong to it, not the weights alone."""
    source = tmp_path / "hf"
    export_model(make_model(), TOKENIZERS["byte"], source, None)
    shutil.copytree(source, tmp_path / "original")
    line = ["--text", text, flag, source, "--batch_size", 4, "--max_tokens", 2]
    if flag == "--init_from":
        line += ["--lora_rank", 2]
    else:
        line += TINY
    line += ["--save_dir", tmp_path / "lm"]
    name, _, _ = begin(*line, "--num_iters", 1)
    for count, file, values in (
        (2, "config.json", dict(rope_theta=5e3)),
        (3, "tokenizer.json", dict(normalizer={"type": "Lowercase"})),
        (4, "tokenizer_config.json", dict(eos_token="a")),
    ):
        change(source, file, **values)
        assert begin(*line, "--num_iters", 1)[:2] == (f"{name}.{count}", 0)
        shutil.copy(tmp_path / "original" / file, source)
    assert begin(*line, "--num_iters", 2)[:2] == (name, 1)


def content_of(folder):
    """The bytes of all files in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["hf", "link", "shards", "weights", "lm", "tokenizer"])
def test_no_model_is_exported_over_another(tmp_path, name):
    """It may be one that a run needs; other weights beside ours would be read as a part of them."""
    model = make_model()
    export_model(model, TOKENIZERS["byte"], tmp_path / "hf", None)
    (tmp_path / "link").symlink_to("hf")
    for folder, file in (
        ("shards", "model-00001-of-00002.safetensors"),
        ("weights", "model.safetensors"),
        ("lm", "0123456789.safetensors"),
        ("tokenizer", "tokenizer.json"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("")
    before = content_of(tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path / name} holds .* already"):
        export_model(make_model(seed=1), TOKENIZERS["byte"], tmp_path / name, None)
    assert content_of(tmp_path) == before


def test_an_export_into_a_folder_with_other_files(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    export_model(make_model(), TOKENIZERS["byte"], tmp_path, None)
    assert import_model(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("size", [0, 1_000, 20_000, 396_000])
def test_a_full_disk_leaves_no_half_of_an_export(tmp_path, size):
    model = make_model()
    mx.eval(model.parameters())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(UsageError, match="cannot write to") as error:
            export_model(model, TOKENIZERS["byte"], tmp_path / "hf", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path / "hf") == []
    export_model(model, TOKENIZERS["byte"], tmp_path / "hf", None)  # once there is room
    assert import_model(tmp_path / "hf")


