"""Exchange with Hugging Face: what mlx_lm computes with our export, and what comes back of it."""

import json
import os
import resource
import shutil

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, begin, make_model, run, run_extra
from datasets import ByteTokenizer, CharTokenizer, PackageTokenizer, WordTokenizer, end_of_text
from support.cli import UsageError
from mlx.utils import tree_flatten
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors

from extras.features.huggingface import export_model, import_model

TEXT = "the cat <unk> sat\non the  mat — né 😀\n\nx\x1cy\t\u3000z\r\n"
TOKENIZERS = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer.train([TEXT]),
    "word": WordTokenizer.train([TEXT + " </s>"]),  # a word that ends others' texts
    "bpe": PackageTokenizer.train([TEXT] * 20, 300),
}
# RoPE as Llama 3's: pairs of dimensions that are kept, that are stretched, and one between.
STRETCHED = dict(rope_theta=500.0, rope_scaling=[8.0, 1.0, 2.5, 16])
SHAPES = {  # of models by these names, and their tokenizers
    "llama": ("byte", dict(num_kv_heads=4)),
    "llama-untied": ("char", dict(num_kv_heads=1, untie=True)),
    "qwen2": ("bpe", dict(num_kv_heads=2, qkv_bias=True)),
    "qwen3": ("word", dict(num_kv_heads=2, qk_norm=True, head_dim=32, norm_eps=1e-6)),
    "llama3": ("byte", dict(num_kv_heads=2, **STRETCHED)),
}
TEXTS = ["config.json", "tokenizer.json", "tokenizer_config.json"]


def make_llama(vocab_size=257, **values):
    """A Llama, or what these values of a Config make of it, with random weights."""
    shape = dict(context_size=32, dim=64, num_kv_heads=4, mlp="swiglu", mlp_dim=128)
    return make_model(vocab_size=vocab_size, **shape | values)


def logits_of(model, tokens):
    return np.array(model(mx.array([list(tokens)]))[0].astype(mx.float32))


def change(folder, file="config.json", **values):
    """Puts these entries into config.json, or into another file; None is JSON's null."""
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


def weights_of(folder):
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    return weights


def save(weights, path):
    mx.save_safetensors(str(path), weights, {"format": "pt"})


# ---- Export -------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A folder of exported models, and these by name, each with its tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    models = {}
    for name, (kind, shape) in SHAPES.items():
        tokenizer = TOKENIZERS[kind]
        models[name] = make_llama(tokenizer.vocab_size, **shape), tokenizer
        export_model(*models[name], folder / name, None)
    return folder, models


def test_mlx_lm_loads_what_is_exported(exported):
    mlx_lm = pytest.importorskip("mlx_lm")
    folder, models = exported
    packed = make_llama(seed=3), TOKENIZERS["byte"]
    export_model(*packed, folder / "packed", 4)  # which packs the model, too
    for name, (model, tokenizer) in [*models.items(), ("packed", packed)]:
        theirs, package = mlx_lm.load(str(folder / name))
        tokens = package.encode(TEXT)
        assert tokens == tokenizer.encode(TEXT).tolist()
        assert package.eos_token_id == tokenizer.eos
        settings = json.loads((folder / name / "config.json").read_text())
        assert settings["eos_token_id"] == end_of_text(tokenizer)  # no line end
        logits = logits_of(theirs, tokens[:32])
        tolerance = 1e-4 * np.abs(logits).max()
        np.testing.assert_allclose(logits_of(model, tokens[:32]), logits, rtol=0, atol=tolerance)
        chat = package.apply_chat_template([{"role": "user", "content": "the cat"}])
        assert package.decode(chat) == "the cat"


def test_tokenizers_give_the_same_ids(exported):
    folder, models = exported
    characters = "".join(map(chr, range(1, 0x250)))
    for name, (_, tokenizer) in models.items():
        theirs = Tokenizer.from_file(str(folder / name / "tokenizer.json"))
        for text in ("", "\n", " a  zebra\n\n<eos> \x1d the<unk>cat ", characters):
            tokens = tokenizer.encode(text).tolist()
            assert theirs.encode(text, add_special_tokens=False).ids == tokens
            if tokenizer.kind in ("byte", "bpe"):
                assert theirs.decode(tokens, skip_special_tokens=False) == text
        tokens = tokenizer.encode("the cat\nsat on").tolist()
        assert theirs.decode(tokens, skip_special_tokens=False) == "the cat\nsat on"


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "tokenizer.json"])
def test_no_model_is_exported_over_another(tmp_path, file):
    """It may be one that a run needs; other weights beside ours would be read as a part of them."""
    (tmp_path / file).write_text("theirs")
    with pytest.raises(UsageError, match=f"{tmp_path} holds {file} already"):
        export_model(make_llama(), TOKENIZERS["byte"], tmp_path, None)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["theirs"]


def test_a_full_disk_leaves_no_half_of_an_export(tmp_path):
    tokenizer = WordTokenizer.train(["x" * 20_000])  # whose file is larger than the weights
    model = make_llama(tokenizer.vocab_size, dim=8, mlp_dim=8)
    mx.eval(model.parameters())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UsageError, match="cannot write to"):
            export_model(model, tokenizer, tmp_path / "hf", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path / "hf") == []


# ---- Import -------------------------------------------------------------------------------------
def test_import_is_the_inverse_of_export(exported):
    folder, models = exported
    for name, (model, tokenizer) in models.items():
        found, its, *_ = import_model(folder / name)
        assert found.config == model.config
        assert its.eos == tokenizer.eos
        assert its.unknown("the ☃") == tokenizer.unknown("the ☃")
        logits = logits_of(found, range(10))
        np.testing.assert_array_equal(logits, logits_of(model, range(10)))


@pytest.fixture
def hf(tmp_path):
    """A folder with a Llama."""
    export_model(make_llama(), TOKENIZERS["byte"], tmp_path / "hf", None)
    return tmp_path / "hf"


LLAMA3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"
DEFAULT = {"rope_type": "default", "rope_theta": 44.0}


@pytest.mark.parametrize("changes, expected", [
    (dict(rope_theta=77), dict(rope_theta=77.0)),
    (dict(rope_theta=77, rope_parameters=DEFAULT), dict(rope_theta=44.0)),
    (dict(rope_scaling=DEFAULT, rope_parameters={"rope_type": "yarn"}), dict(rope_theta=44.0)),
    (dict(rope_scaling=LLAMA3), dict(rope_scaling=[8.0, 1.0, 4.0, 32])),
    (
        dict(rope_parameters=LLAMA3 | {ORIGINAL: 8}, **{ORIGINAL: 16}),
        dict(rope_scaling=[8.0, 1.0, 4.0, 16]),
    ),
    (dict(num_key_value_heads=None, head_dim=None), dict(num_kv_heads=4, head_dim=16)),
    (dict(model_type="mistral", sliding_window=None), dict()),
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


def test_weights_of_an_index_in_bfloat16(hf):
    """And of nothing else that lies there; RoPE's speeds, as older folders have, are computed."""
    weights = {name: weight.astype(mx.bfloat16) for name, weight in weights_of(hf).items()}
    (hf / "model.safetensors").rename(hf / "model_old.safetensors")
    index = {}
    for i in range(2):
        shard = dict(sorted(weights.items())[i::2])
        shard[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = mx.ones(8)
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save(shard, hf / file)
        index |= dict.fromkeys(shard, file)
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found, _, first_id, files = import_model(hf)
    for name, weight in tree_flatten(found.parameters()):
        assert weight.dtype == mx.float32
        assert mx.array_equal(weight, weights[name].astype(mx.float32))
    assert files.keys() == {*index.values(), *TEXTS, "model.safetensors.index.json"}
    # The last shard decides the id, too.
    shard["model.norm.weight"] = weights["model.norm.weight"] * 2
    save(shard, hf / file)
    assert import_model(hf)[2] != first_id
    (hf / file).unlink()
    with pytest.raises(UsageError, match=f"it has no file {file}"):
        import_model(hf)
    (hf / "model_old.safetensors").rename(hf / "model.safetensors")
    assert import_model(hf), "it counts before an index"


@pytest.mark.parametrize("rename", [
    lambda name: name.removeprefix("model."),
    lambda name: f"_orig_mod.{name}",
    lambda name: f"model.{name}",
], ids=["base", "compiled", "wrapped"])  # fmt: skip
def test_weights_are_found_under_any_prefix(hf, rename):
    weights = weights_of(hf)
    save({rename(name): weight for name, weight in weights.items()}, hf / "model.safetensors")
    for name, weight in tree_flatten(import_model(hf).model.parameters()):
        assert mx.array_equal(weight, weights[name])
    twice = {f"wrapped.{name}": weight for name, weight in weights.items()}
    save(weights | twice, hf / "model.safetensors")
    with pytest.raises(UsageError, match="twice, under different prefixes"):
        import_model(hf)


EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@pytest.mark.parametrize("is_tied, written, untie", [
    (True, {EMBEDDINGS: 1}, False),
    (True, {HEAD: 1}, False),
    (True, {EMBEDDINGS: 1, HEAD: 1}, False),
    (True, {EMBEDDINGS: 1, HEAD: 2}, True),
    (False, {EMBEDDINGS: 1, HEAD: 1}, True),
])  # fmt: skip
def test_ties_are_those_of_config_and_weights(hf, is_tied, written, untie):
    """Where the two disagree, nothing that was learned is dropped."""
    weights = weights_of(hf)
    embeddings = weights.pop(EMBEDDINGS)
    for name, factor in written.items():
        weights[name] = embeddings * factor
    save(weights, hf / "model.safetensors")
    change(hf, tie_word_embeddings=is_tied)
    model, *_ = import_model(hf)
    assert model.config.untie == untie
    assert mx.array_equal(model.model.embed_tokens.weight, embeddings)
    assert mx.array_equal(model.output_matrix, embeddings * written.get(HEAD, 1))


FP8 = mx.ones(64, mx.uint8)  # as MLX reads it
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665d63f\nsize 538090408\n"


@pytest.mark.parametrize("file, content, words", [
    ("config.json", dict(attention_bias=True), "attention_bias"),
    ("config.json", dict(rope_parameters={"rope_type": "yarn"}), "rope_type yarn"),
    ("config.json", dict(rope_parameters={"full_attention": DEFAULT}), "full_attention"),
    ("config.json", dict(rope_scaling={"type": "llama3"}), "without all of ['factor', "),
    ("config.json", dict(rope_scaling=LLAMA3 | {"factor": 0}), "not all above 0"),
    ("config.json", dict(rope_parameters=dict(DEFAULT, rope_theta=0)), "which is below 1"),
    ("config.json", dict(rms_norm_eps=None), "its config.json lacks rms_norm_eps"),
    ("config.json", dict(quantization_config={"bits": 4}), "quantization_config"),
    ("config.json", dict(hidden_act="gelu"), "hidden_act gelu"),
    ("config.json", dict(num_hidden_layers=3), "Missing 9 parameters: model.layers.2."),
    ("config.json", dict(num_hidden_layers=1), "Received 9 parameters not in model: model.layers."),
    ("config.json", dict(num_hidden_layers=30), "its files hold fewer than 30 blocks"),
    ("config.json", dict(intermediate_size=96), "Expected shape (96, 64) but received"),
    ("config.json", dict(max_position_embeddings="64"), "its context_size is of another type"),
    ("config.json", b"{", "Expecting"),
    ("model.safetensors", b"damaged", "model.safetensors is damaged or incomplete"),
    ("model.safetensors", POINTER, "run git lfs pull"),
    ("model.safetensors", {"lm_head.bias": FP8.astype(mx.float16)}, "not in model: lm_head.bias"),
    ("model.safetensors", {"model.norm.weight": FP8}, "model.norm.weight is neither float32"),
    ("tokenizer.json", None, "it has no file tokenizer.json"),
    ("tokenizer_config.json", dict(eos_token="<x>"), "lacks the token <x>"),
    ("tokenizer_config.json", dict(added_tokens_decoder={"5": {"content": "<x>"}}),
     "lacks the token <x>"),
    ("adapter_config.json", b"{}", "merge that into its base"),
])  # fmt: skip
def test_folders_that_cannot_be_imported(hf, file, content, words):
    if content is None:
        (hf / file).unlink()
    elif isinstance(content, bytes):
        (hf / file).write_bytes(content)
    elif file.endswith("config.json"):
        change(hf, file, **content)
    else:
        save(weights_of(hf) | content, hf / file)
    with pytest.raises(UsageError) as error:
        import_model(hf)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 350


def test_weights_in_other_folders(hf):
    """A run that keeps them side by side could not open them again."""
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "w/a.safetensors"}}')
    with pytest.raises(UsageError, match="put all files into one"):
        import_model(hf)


@pytest.mark.parametrize("flag", ["--teacher", "--init_from"])
def test_no_run_reads_more_than_a_window(hf, tmp_path, text, flag):
    change(hf, model_type="mistral", sliding_window=20)
    line = ["--text", text, "--num_iters=1", "--context_size=21", flag, hf]
    _, err = run(*line, "--save_dir", tmp_path, status=2)
    assert f"{flag} reads at most 20 tokens: give --context_size 20" in err


def test_tokens_beyond_the_embeddings(hf):
    """An added one is left out: no text has it. Any other would be read from somewhere else."""
    path = str(hf / "tokenizer.json")
    padded = Tokenizer.from_file(path)
    padded.add_special_tokens(["[PAD]"])
    padded.save(path)
    _, tokenizer, *_ = import_model(hf)
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("[PAD]").tolist() == list(b"[PAD]")
    change(hf, vocab_size=200)
    with pytest.raises(UsageError, match="its tokenizer has 257 tokens, its vocab_size is 200"):
        import_model(hf)


# ---- The command line ---------------------------------------------------------------------------
@pytest.mark.parametrize("flag", ["--teacher", "--init_from"])
def test_a_run_keeps_the_very_model_it_was_begun_with(hf, tmp_path, text, flag):
    """Configuration and tokenizer belong to it, not the weights alone: else it is another one."""
    shutil.copytree(hf, tmp_path / "original")
    line = ["--text", text, "--batch_size=4", "--sample_tokens=2", "--save_dir", tmp_path / "lm"]
    line += ["--lora_rank=2"] if flag == "--init_from" else TINY
    name, _, _ = begin(*line, flag, hf, "--num_iters=1")
    change(hf, "tokenizer_config.json", eos_token="a")
    other, iteration, _ = begin(*line, flag, hf, "--num_iters=1")
    assert (other != name, iteration) == (True, 0)
    assert begin(*line, flag, tmp_path / "original", "--num_iters=2")[:2] == (name, 1)
    shutil.rmtree(hf)
    named = ["--identifier", name, "--save_dir", tmp_path / "lm", "--num_iters=3"]
    assert begin(*named)[:2] == (name, 2)


# ---- Tokens before a text -----------------------------------------------------------------------


def test_a_start_token_is_put_where_its_base_had_it(text, tmp_path):
    """In training, in prompts and in what is exported; what a text ends with is left to `eos`.

    Its chat template is exported, too.
    """
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], 300, special_tokens=["<s>", "</s>"])
    own = Tokenizer.from_str(trained.to_str())
    template = {"single": "<s> $A </s>", "special_tokens": [("<s>", 0), ("</s>", 1)]}
    own.post_processor = processors.TemplateProcessing(**template)
    tokenizer = PackageTokenizer(own.to_str(), "file")
    folder = tmp_path / "alone"
    export_model(make_llama(tokenizer.vocab_size), tokenizer, folder, None)
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert alone.encode("the end").ids == tokenizer.encode("the end").tolist()

    own.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": "<s>{{ messages }}", "pad_token": "</s>", "unk_token": "not there"}
    change(folder, "tokenizer_config.json", **settings)
    expected = own.encode("the end").ids[:-1]
    assert expected[0] == 0
    assert main.encode_prompt(import_model(folder).tokenizer, "the end") == expected
    line = ["--text", text, "--init_from", folder, "--num_iters=1", "--batch_size=2"]
    out, _ = run(*line, "--save_dir", tmp_path / "lm", "--sample_tokens=1")
    assert "\nEach text begins with <s>, as for the base model.\n" in out
    for path in (tmp_path / "lm" / "text").rglob("*.tokens"):
        assert np.fromfile(path, np.uint16)[0] == 0
    run_extra("export", tmp_path / "out", "--save_dir", tmp_path / "lm")
    again = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert again.encode("the end").ids == expected
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 0
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "<s>{{ messages }}"
    assert (settings["bos_token"], settings["pad_token"]) == ("<s>", "</s>")
    assert "unk_token" not in settings


TEMPLATES = [{"name": "tools", "template": "t"}, {"name": "default", "template": "{{ bos_token }}"}]


def test_what_other_files_say_of_a_tokenizer(hf):
    """As transformers reads them: some entries have several forms, or count in another file."""
    change(
        hf,
        "tokenizer_config.json",
        chat_template=TEMPLATES,
        bos_token={"content": "a"},
        eos_token="b",
        added_tokens_decoder={"9999": {"content": "<x>"}},  # which has no embedding
    )
    (hf / "special_tokens_map.json").write_text('{"eos_token": "c"}')
    found = import_model(hf).tokenizer
    assert found.decode([found.eos]) == "c"
    assert found.settings == {"chat_template": "{{ bos_token }}", "bos_token": "a"}
    (hf / "chat_template.jinja").write_text("own")
    assert import_model(hf).tokenizer.settings["chat_template"] == "own"


UNUSABLE = [  # what is put into the model, the id of <b> before each text, and the fault
    ({"type": "BPE", "dropout": 0.3}, None, "it is a BPE with a dropout"),
    ({}, 10**9, "its bos has an id"),
    ({"vocab": {"b": 0, "<eos>": 1}, "merges": []}, 0, "gives no token to the letter a"),
]


@pytest.mark.parametrize("entries, first, fault", UNUSABLE)
def test_tokenizers_that_cannot_be_used(hf, entries, first, fault):
    path = hf / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= entries
    package = Tokenizer.from_str(json.dumps(content))
    if first is not None:
        before = {"single": "<b> $A", "special_tokens": [("<b>", first)]}
        package.post_processor = processors.TemplateProcessing(**before)
    package.save(str(path))
    with pytest.raises(UsageError, match=fault):
        import_model(hf)
