"""GGUF files: what is written, read back by the reader of the package of llama.cpp."""

import json

import numpy as np
import pytest
from conftest import run_extra
from datasets import ByteTokenizer, PackageTokenizer, WordTokenizer
from support.cli import UsageError
from mlx.utils import tree_flatten
from test_huggingface import STRETCHED, make_llama
from tokenizers import Tokenizer, decoders

from extras.features.gguf import export_gguf

gguf = pytest.importorskip("gguf")
TEXT = "the cat <unk> sat\non the  mat — né 😀\n\nx\ty\u3000z\r\n1234\n"
BPE = PackageTokenizer.train([TEXT] * 20, 300)
CONTENT = json.loads(BPE.vocabulary)
WHOLE_WORDS = CONTENT["model"] | {"ignore_merges": True}  # as Llama 3's
# Some names as files for llama.cpp have them, beside the package's own map.
NAMES = {
    "model.embed_tokens.weight": "token_embd",
    "model.norm.weight": "output_norm",
    "model.layers.1.input_layernorm.weight": "blk.1.attn_norm",
    "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k",
    "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output",
    "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm",
    "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up",
    "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down",
}


def read(path):
    """A file's fields, tensors and their types, all by name; quantized tensors as numbers."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    kinds = {}
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        tensors[name] = gguf.dequantize(tensor.data, tensor.tensor_type)
        kinds[name] = tensor.tensor_type.name
    return fields, tensors, kinds


def fields_of(tokenizer, folder):
    """The fields of a file with this tokenizer, for a vocabulary that is padded by two."""
    export_gguf(make_llama(tokenizer.vocab_size + 2), tokenizer, folder / "model.gguf", None)
    fields, _, _ = read(folder / "model.gguf")
    return fields


def halves_apart(array, head_dim):
    """The rows of queries or keys in our order.

    llama.cpp's RoPE turns rows 2i and 2i + 1 of a head together, ours i and i + head_dim/2.
    """
    pairs = array.reshape(-1, head_dim // 2, 2, array.shape[-1])
    return pairs.swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize("kind, shape, bits, matrix_kind, error", [
    ("llama", dict(num_kv_heads=1, **STRETCHED), None, "F32", 0),
    ("llama", dict(untie=True, head_dim=32), 16, "F16", 1e-3),
    ("qwen3", dict(num_kv_heads=2, qk_norm=True), 8, "Q8_0", 0.01),
    ("arcee", dict(mlp="relu2"), 4, "Q4_0", 0.2),
], ids=["llama3", "llama", "qwen3", "arcee"])  # fmt: skip
def test_each_tensor(kind, shape, bits, matrix_kind, error, tmp_path):
    model = make_llama(BPE.vocab_size + 2, **shape)  # a padded vocabulary
    config = model.config
    export_gguf(model, BPE, tmp_path / "model.gguf", bits)
    fields, tensors, kinds = read(tmp_path / "model.gguf")
    if config.rope_scaling:  # factors of the angles of each pair of dimensions, by Llama 3's code
        factors = tensors.pop("rope_freqs")
        np.testing.assert_allclose(factors, [1, 4.449015554967443, *[8] * 6], rtol=1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_blocks)
    weights = tree_flatten(model.parameters())
    assert len(tensors) == len(weights)
    for ours, weight in weights:
        weight = np.array(weight)
        theirs = NAMES.get(ours) or names.get_name(ours.removesuffix(".weight"))
        array = tensors[theirs]
        assert array.shape == weight.shape
        if kind != "qwen3" and theirs.endswith(("attn_q", "attn_k")):
            array = halves_apart(array, config.head_dim)
        is_matrix = weight.ndim == 2
        assert kinds[theirs] == (matrix_kind if is_matrix else "F32")
        tolerance = is_matrix * error * np.abs(weight).max()
        np.testing.assert_allclose(array, weight, rtol=0, atol=tolerance)
    assert fields["general.architecture"] == kind
    expected = {
        "context_length": 32,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    assert {field: fields[f"{kind}.{field}"] for field in expected} == expected


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])
def test_the_tokenizer(tokenizer, tmp_path):
    fields = fields_of(tokenizer, tmp_path)
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(tokens) == len(set(tokens)) == len(kinds) == tokenizer.vocab_size + 2
    decoder = decoders.ByteLevel()
    for i in range(tokenizer.vocab_size):
        if i != tokenizer.eos:
            assert decoder.decode([tokens[i]]) == tokenizer.decode([i])
    assert kinds[tokenizer.eos] == gguf.TokenType.CONTROL
    assert kinds[-2:] == 2 * [gguf.TokenType.UNUSED]
    assert kinds.count(gguf.TokenType.NORMAL) == tokenizer.vocab_size - 1
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos
    assert not fields["tokenizer.ggml.add_bos_token"]
    merges = fields["tokenizer.ggml.merges"]
    if tokenizer.kind == "byte":
        assert merges == ["<eos> <eos>"], "which never applies"
    else:
        assert merges == [" ".join(merge) for merge in CONTENT["model"]["merges"]]


def test_a_start_token_without_an_end_token(tmp_path):
    tokenizer = PackageTokenizer(json.dumps(CONTENT), bos=[5])
    tokenizer.eos = None
    fields = fields_of(tokenizer, tmp_path)
    assert fields["tokenizer.ggml.add_bos_token"] and fields["tokenizer.ggml.bos_token_id"] == 5
    assert "tokenizer.ggml.eos_token_id" not in fields


def test_added_tokens_that_are_not_special(tmp_path):
    """llama.cpp reads them in any text, as this tokenizer does.

    Special ones it reads only where it is told to.
    """
    package = Tokenizer.from_str(BPE.vocabulary)
    package.add_tokens(["<think>"])
    package.add_special_tokens(["<im>"])
    fields = fields_of(PackageTokenizer(package.to_str(), "file"), tmp_path)
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[-4:-2] == [gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL]


@pytest.mark.parametrize("tokenizer, words", [
    (WordTokenizer.train([TEXT]), "llama.cpp has no word tokenizer that .* --tokenizer bpe"),
    (PackageTokenizer(json.dumps(CONTENT | {"pre_tokenizer": None})), "convert_hf_to_gguf.py"),
    (PackageTokenizer(json.dumps(CONTENT | {"model": WHOLE_WORDS})), "convert_hf_to_gguf.py"),
    (PackageTokenizer(BPE.vocabulary, bos=[0, 1]), "convert_hf_to_gguf.py"),
])  # fmt: skip
def test_tokenizers_that_llama_cpp_lacks(tokenizer, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        fields_of(tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_from_the_command_line(base, tmp_path):
    folder = ["--save_dir", base[0]]
    path = tmp_path / "model.GGUF"
    _, err = run_extra("export", path, *folder)
    assert f"Llama in F32 and its tokenizer are in {path}" in err
    data = path.read_bytes()
    small = tmp_path / "small.gguf"
    nowhere = tmp_path / "nowhere" / "model.gguf"
    for typed, words in (
        ([path], f"{path} exists: name another file"),
        ([small, "--quantize=8"], "--quantize 8 needs a model in which 32 divides --dim"),
        ([nowhere], "cannot write"),
    ):
        _, err = run_extra("export", *typed, *folder, status=2)
        assert words in err and err.count("\n") == 1
    assert path.read_bytes() == data
    assert sorted(each.name for each in tmp_path.iterdir()) == ["lm", "model.GGUF"]
