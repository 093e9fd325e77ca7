"""A model as one GGUF file, for llama.cpp and the programs built on it (Ollama, LM Studio).

    python -m extras.export model.gguf                  float32
    python -m extras.export model.gguf --quantize 16    float16; 8: Q8_0, 4: Q4_0

The `gguf` package of llama.cpp writes the file. The architectures are those of
extras/features/huggingface.py: Llama, Qwen2, Qwen3, Arcee. llama.cpp supports GPT-2's tokenizer, a
byte-level BPE; a byte tokenizer is one without merges. It has no word or character tokenizers.
"""

import json
import os
from pathlib import Path

import numpy as np
from mlx.utils import tree_flatten

from datasets import end_of_text
from main import rope_frequencies
from support.cli import UsageError, explain_errors, utf8
from support.files import atomic_write
from extras.features.huggingface import CHAT_TEMPLATE, find_model_type, package_of

# What llama.cpp calls the fields of our Config.
SETTINGS = {
    "context_length": "context_size",
    "embedding_length": "dim",
    "block_count": "num_blocks",
    "feed_forward_length": "mlp_dim",
    "head_count": "num_heads",
    "head_count_kv": "num_kv_heads",
    "key_length": "head_dim",
    "value_length": "head_dim",
    "rope_dimension_count": "head_dim",
    "rope_freq_base": "rope_theta",
    "layer_norm_rms_eps": "norm_eps",
    "vocab_size": "vocab_size",
}


def export_gguf(model, tokenizer, path, bits):
    """Writes a file for llama.cpp; bits: per weight of a matrix, 4, 8 or 16, None for 32.

    Returns the kind of the model in words. Raises UsageError if llama.cpp has no such model or
    tokenizer, if the package is missing, or if the file exists or cannot be written.
    """
    path = Path(path)
    kind = find_model_type(model.config)
    content = tokenizer_content(tokenizer)
    with explain_errors("GGUF needs a package: pip install -U gguf", ImportError, KeyError):
        import gguf

        architecture = gguf.MODEL_ARCH[kind.upper()]
    names = gguf.get_tensor_name_map(architecture, model.config.num_blocks)
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: name another file, or delete it")
    formats = gguf.GGMLQuantizationType
    matrix_format = {None: formats.F32, 16: formats.F16, 8: formats.Q8_0, 4: formats.Q4_0}[bits]
    needed = f"--quantize {bits} needs a model in which 32 divides --dim and --mlp_dim"
    with explain_errors(f"cannot write {path}: name a file of yours", OSError):
        with atomic_write(path) as file:
            writer = gguf.GGUFWriter(file.name, kind)
            for theirs, ours in SETTINGS.items():
                getattr(writer, f"add_{theirs}")(getattr(model.config, ours))
            writer.add_name(utf8(path.stem))
            writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{matrix_format.name}", 0))
            add_tokenizer(writer, content, tokenizer, model.config.vocab_size)
            for tensor, array in convert_weights(model, names, "qwen" not in kind):
                wanted = matrix_format if array.ndim == 2 else formats.F32
                with explain_errors(needed, gguf.quants.QuantError):
                    data = gguf.quantize(array, wanted)
                writer.add_tensor(tensor, data, raw_dtype=wanted)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    return f"{kind.capitalize()} in {matrix_format.name}"


def convert_weights(model, names, is_permuted):
    """Yields each weight with its name in GGUF: (name, array).

    names: the package's map of names. is_permuted: whether RoPE pairs neighbouring dimensions
    there, as for all but Qwen2 and Qwen3; here it pairs dimensions i and i + d/2.
    """
    config = model.config
    for name, weight in tree_flatten(model.parameters()):
        array = np.array(weight)
        layer_name, _, kind = name.rpartition(".")  # kind: weight or bias
        if is_permuted and layer_name.endswith(("q_proj", "k_proj")):
            halves = array.reshape(-1, 2, config.head_dim // 2, config.dim)
            array = halves.swapaxes(1, 2).reshape(array.shape)
        yield f"{names[layer_name]}.{kind}", array
    if config.rope_scaling:
        # How many times slower each pair of dimensions rotates than without scaling.
        plain = rope_frequencies(config.head_dim, config.rope_theta)
        scaled = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        yield "rope_freqs.weight", (plain / scaled).astype(np.float32)


# ---- Tokenizers ---------------------------------------------------------------------------------
def tokenizer_content(tokenizer):
    """What the tokenizer.json of a tokenizer says. Raises UsageError if llama.cpp has none such."""
    content = json.loads(package_of(tokenizer).to_str())
    model = content["model"]
    pre_tokenizer = content["pre_tokenizer"] or {}
    wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    is_like_gpt2 = model["type"] == "BPE" and wanted.items() <= pre_tokenizer.items()
    # What GGUF has no fields for.
    more = [content["normalizer"], model.get("ignore_merges"), model.get("end_of_word_suffix")]
    is_plain = not any(more) and len(tokenizer.bos) < 2
    if tokenizer.kind != "byte" and not (is_like_gpt2 and is_plain):
        raise UsageError(
            f"llama.cpp has no {tokenizer.kind} tokenizer that splits text like this one: train "
            "with --tokenizer bpe or byte, or export a folder for transformers; for other models, "
            "use llama.cpp's convert_hf_to_gguf.py"
        )
    return content


def add_tokenizer(writer, content, tokenizer, size):
    """Adds `size` tokens in the order of their ids, in the fields that llama.cpp reads."""
    from gguf import TokenType

    tokens = {token: text for text, token in content["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    kinds[tokenizer.eos] = TokenType.CONTROL
    # llama.cpp requires at least one merge; this one never applies.
    merges = content["model"]["merges"] or [["<eos>", "<eos>"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(i, f"<unused {i}>") for i in range(size)])
    writer.add_token_types([kinds.get(i, TokenType.UNUSED) for i in range(size)])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    end = end_of_text(tokenizer)
    if end is not None:
        writer.add_eos_token_id(end)
    # llama.cpp requires one, also where it is not prepended.
    start, *_ = [*tokenizer.bos, end]
    if start is not None:
        writer.add_bos_token_id(start)
    writer.add_add_bos_token(bool(tokenizer.bos))
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.settings.get("chat_template", CHAT_TEMPLATE))
