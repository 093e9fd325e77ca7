"""Import of Hugging Face models, and export of ours to transformers and mlx_lm.

    python main.py --init_from DIR ...         fine-tunes a Llama, Mistral, Qwen2, Qwen3, Arcee
    python main.py --init_from ORG/NAME ...    the same, downloaded from Hugging Face's hub
    python main.py --teacher DIR ...           distills from one
    python -m extras.export DIR                writes a checkpoint as such a folder
    python -m extras.export DIR --quantize 4   the same with packed weights, for mlx_lm

Our weights have the same names as their Llama's, so only configuration and tokenizer are converted.
A folder is read as transformers reads it. A model that transformers would compute otherwise than
main.py does is refused.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from datasets import LFS, PackageTokenizer, end_of_text, read_whole
from main import LanguageModel, LoadedModel, config_from_untrusted
from support.cli import UsageError, explain_errors, extra, one_line
from support.files import atomic_write, sha1_of_file, sha1_of_text
from support.runs import load_arrays
from extras.features.memory import describe_shortage

# Their `model_type`, and what is not plain in our Config. An export is of the first that fits.
MODEL_TYPES = {
    "llama": {"mlp": "swiglu"},
    "mistral": {"mlp": "swiglu"},
    "qwen2": {"mlp": "swiglu", "qkv_bias": True},
    "qwen3": {"mlp": "swiglu", "qk_norm": True},
    "arcee": {"mlp": "relu2"},
}
# Their `hidden_act` for our `mlp`.
THEIR_ACTIVATIONS = {"swiglu": "silu", "relu2": "relu2"}
# What their config.json calls the fields of our Config.
THEIR_NAMES = {
    "vocab_size": "vocab_size",
    "context_size": "max_position_embeddings",
    "num_blocks": "num_hidden_layers",
    "dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
# RoPE settings of Llama 3, in the order of our Config's rope_scaling.
THEIR_ROPE_SCALING = [
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
]
# Settings that change what a model computes, and the values that ours have, or null.
SUPPORTED = {
    "attention_bias": [False],
    "mlp_bias": [False],
    "use_sliding_window": [False],
    "is_causal": [True],
    "rope_type": ["default", "llama3"],
    "partial_rotary_factor": [1],
    "full_attention": [],  # RoPE of its own for some blocks
    "sliding_attention": [],
    "per_layer_config": [],
    "quantization": [],
    "quantization_config": [],
    "transformers_weights": [],
}
# The files of a model that are read, besides its weights. The last four may be missing.
INDEX_FILE = "model.safetensors.index.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEXT_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", SPECIAL_TOKENS_FILE]
TEXT_FILES += [TEMPLATE_FILE, INDEX_FILE]
# What comes before names of weights: nothing in a base model, more in one compiled or wrapped.
BODY_PREFIX = re.compile(r"^(.*?\.)??(?=(embed_tokens|layers|norm)\.)")
HEAD_PREFIX = re.compile(r"^.*\.(?=lm_head\.)")
# What the hub calls a model: ORG/NAME, perhaps with a branch or a commit.
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*))?", re.ASCII)


# ---- Import -------------------------------------------------------------------------------------
def open_by_name(name):
    """The LoadedModel of a folder or, without one of that name, on the hub."""
    if os.path.isdir(name):
        return import_model(name)
    if os.path.exists(name):
        raise UsageError(f"{name} is a file: name the folder that it lies in")
    found = HUB_NAME.fullmatch(name)
    if not found:
        raise UsageError(
            f"{name} is no folder here: name one, a checkpoint, or a model of the Hugging Face hub "
            "(ORG/NAME); if a run's model is gone, resume the run with --identifier RUN"
        )
    return import_model(download_model(*found.groups()))


def download_model(repository, revision):
    """The folder of a model on the hub, named by its commit; only what is missing is downloaded.

    Address, key and cache are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and
    its other variables hold here, too.
    """
    fault = f"{repository} is no folder here, and cannot be downloaded from the Hugging Face hub"
    with explain_errors(f"{fault}: pip install huggingface_hub", ImportError):
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    if not sys.stderr.isatty():
        disable_progress_bars()
    # Others hold the same weights in other formats or precisions.
    files = [*TEXT_FILES, "model.safetensors", "model-*-of-*.safetensors"]
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=TEXT_FILES)
        folder = Path(folder)
        with explain_errors(f"{repository} cannot be used: name another model"):
            read_texts(folder)  # before gigabytes are downloaded in vain
        return snapshot_download(repository, revision=folder.name, allow_patterns=files)
    except UsageError:
        raise
    except Exception as error:  # of many kinds, with messages of many lines
        remedy = "check its name, the network and HF_TOKEN"
        raise UsageError(f"{fault}: {remedy} ({one_line(error):.300})") from None


def import_model(folder):
    """Reads a Hugging Face folder: its TEXT_FILES and its weights in *.safetensors files.

    Returns a LoadedModel in float32. Raises UsageError if the folder holds no supported model.
    """
    folder = Path(folder)
    with explain_errors(f"{folder} cannot be used: name another model"):
        config, tokenizer = read_texts(folder)
        files = model_files(folder)
        weights = read_weights(files)
        head = weights.get("lm_head.weight")
        if head is not None and not config.untie:
            # Either matrix may be missing. Both stay if they differ, in spite of config.json.
            embeddings = weights.setdefault("model.embed_tokens.weight", head)
            config.untie = not mx.array_equal(head, embeddings)
            if not config.untie:
                del weights["lm_head.weight"]
        if config.num_blocks > len(weights):
            # Building that many blocks first could exhaust the memory.
            raise UsageError(f"its files hold fewer than {config.num_blocks:,} blocks")
        model = LanguageModel(config)
        try:
            model.load_weights([*weights.items()])
        except ValueError as error:  # which may name hundreds
            raise UsageError(f"its weights do not fit: {one_line(error):.150}") from None
        # Of the SHA1s of all files: editing one of them makes another model.
        model_id = sha1_of_text("".join(sha1_of_file(file.resolve()) for file in files))
    return LoadedModel(model, tokenizer, model_id, {file.name: file for file in files})


def read_texts(folder):
    """The Config of the model in a folder, tied or not as its config.json says, and the tokenizer.

    Raises UsageError if this program has no such model, or no memory for it; if a file is
    malformed, what the package that reads it raises.
    """
    config = read_config(folder)
    heads = config.num_heads + config.num_kv_heads
    matrices = 3 if config.mlp == "swiglu" else 2  # of an MLP
    block = 2 * heads * config.head_dim + matrices * config.mlp_dim
    rows = config.num_blocks * block + config.vocab_size
    shortage = describe_shortage(4 * rows * config.dim)
    if shortage:
        raise UsageError(f"{shortage}: choose a smaller model")
    return config, read_tokenizer(folder, config.vocab_size)


def find_file(folder, name):
    """The path of a file in a folder. Raises UsageError if it is not there, or not yet."""
    path = folder / name
    if not path.is_file():  # a pipe might never begin
        raise UsageError(f"it has no file {name}: download it, or save all with transformers")
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise UsageError(f"{name} was not downloaded: run git lfs pull")
    return path


def read_config(folder):
    """Our Config for the config.json in a folder, tied or not as that says.

    Raises UsageError if a model with these settings computes anything that ours does not.
    """
    if (folder / "adapter_config.json").exists():
        raise UsageError("it has an adapter: merge that into its base with peft, and save the sum")
    entries = json.loads(read_whole(find_file(folder, "config.json")))
    kind = entries.get("model_type")
    if kind not in MODEL_TYPES:
        raise UsageError(f"its model_type is {kind}, not {', '.join(MODEL_TYPES)}")
    # Settings of RoPE, which older files call rope_scaling, count before what is next to them.
    rope = entries.get("rope_scaling") or entries.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    # 10,000 is what transformers assumes where older files say nothing.
    settings = {"rope_theta": 1e4} | entries | rope | {"rope_type": rope_type}
    fields = {**MODEL_TYPES[kind]}
    supported = SUPPORTED | {"hidden_act": [THEIR_ACTIVATIONS[fields["mlp"]]]}
    for name, values in supported.items():
        value = settings.get(name)
        if value is not None and value not in values:
            raise UsageError(f"it has {name} {value!s:.40}, which training does not know")

    for ours, theirs in THEIR_NAMES.items():
        fields[ours] = settings.get(theirs)
        if fields[ours] is None and ours not in ("num_kv_heads", "head_dim"):
            raise UsageError(f"its config.json lacks {theirs}: add it")
    fields["untie"] = not entries.get("tie_word_embeddings")
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    window = settings.get("sliding_window", 4096)
    if kind == "mistral" and window is not None:
        # Within its window, it computes what a Llama does.
        fields["context_size"] = min(fields["context_size"], window)
    fields["rope_theta"] = float(fields["rope_theta"])  # JSON may have an int
    if fields["rope_theta"] < 1:
        raise UsageError(f"it has rope_theta {fields['rope_theta']:g}, which is below 1")
    if rope_type == "llama3":
        context = {"original_max_position_embeddings": entries["max_position_embeddings"]}
        # That one counts where it stands next to RoPE's settings, too.
        scaling = context | rope | entries
        fields["rope_scaling"] = [scaling.get(name) for name in THEIR_ROPE_SCALING]
        if None in fields["rope_scaling"]:
            raise UsageError(f"it has RoPE of type llama3 without all of {THEIR_ROPE_SCALING}")
        if min(fields["rope_scaling"]) <= 0:
            raise UsageError(f"it has RoPE with {fields['rope_scaling']}, not all above 0")
    return config_from_untrusted(fields)


def read_tokenizer(folder, vocab_size):
    """The tokenizer in a folder, for a model with so many embeddings.

    Added tokens beyond these are left out, such as [PAD], which some add and never use: in a text,
    they are letters like any others. Raises UsageError for any other token beyond them, and for one
    that only other files add.
    """
    text = read_whole(find_file(folder, "tokenizer.json"))
    config = read_tokenizer_config(folder)
    content = json.loads(text)
    added = content.get("added_tokens") or []
    usable = [token for token in added if token["id"] < vocab_size]
    if len(usable) < len(added):
        text = json.dumps(content | {"added_tokens": usable})
    package = PackageTokenizer(text).package
    decoder = config.get("added_tokens_decoder") or {}
    named = {int(token): name_of_token(entry) for token, entry in decoder.items()}
    # `eos_token_id` of config.json is not used: it may be an unintended default.
    eos = name_of_token(config.get("eos_token"))
    if eos:
        named[package.token_to_id(eos)] = eos
    for token, name in named.items():
        if token is None or (token < vocab_size and package.id_to_token(token) != name):
            raise UsageError(f"its tokenizer.json lacks the token {name} of another file: add it")
    settings = read_settings(folder, config, package)
    tokenizer = PackageTokenizer(text, eos=eos, bos=read_bos(package), settings=settings)
    size = tokenizer.vocab_size
    if size > vocab_size:
        # MLX does not check indices: it would read beyond the embeddings.
        raise UsageError(f"its tokenizer has {size} tokens, its vocab_size is {vocab_size}")
    return tokenizer


def read_bos(package):
    """The ids that a tokenizer of the package `tokenizers` puts before a text, such as <s>."""
    encoding = package.encode("a")
    if all(encoding.special_tokens_mask):
        raise UsageError("its tokenizer gives no token to the letter a")
    return encoding.ids[: encoding.special_tokens_mask.index(0)]


def name_of_token(entry):
    """A token's text, which stands for itself or in a dict."""
    return entry["content"] if isinstance(entry, dict) else entry


def read_settings(folder, config, package):
    """What an export keeps for other programs: the chat template, and the tokens that it names."""
    settings = {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / TEMPLATE_FILE).exists():
        template = read_whole(folder / TEMPLATE_FILE)
    if template:
        settings["chat_template"] = template
    for name in ("bos_token", "pad_token", "unk_token"):
        token = name_of_token(config.get(name))
        if token and package.token_to_id(token) is not None:
            settings[name] = token
    return settings


def read_tokenizer_config(folder):
    """The content of a folder's tokenizer_config.json and special_tokens_map.json, if any."""
    config = {}
    for name in ("tokenizer_config.json", SPECIAL_TOKENS_FILE):  # transformers prefers the latter
        if (folder / name).exists():
            config |= json.loads(read_whole(find_file(folder, name)))
    return config


def model_files(folder):
    """The paths of a model's weights and TEXT_FILES. Raises UsageError if one is missing.

    The weights are in model.safetensors, or else in what an index names. What else lies there may
    be a copy, or the same in another format.
    """
    weights = ["model.safetensors"]
    if (folder / INDEX_FILE).exists() and not (folder / weights[0]).exists():
        index = json.loads(read_whole(folder / INDEX_FILE))
        weights = sorted(set(index["weight_map"].values()))
        if any("/" in name for name in weights):
            raise UsageError("its index names weights in other folders: put all files into one")
    texts = [name for name in TEXT_FILES if (folder / name).exists()]
    return [find_file(folder, name) for name in weights + texts]


def read_weights(files):
    """All arrays of a model's files by name, as float32."""
    weights = {}
    for file in files:
        if file.name in TEXT_FILES:
            continue
        with explain_errors(f"{file.name} is damaged or incomplete"):
            arrays = load_arrays(file)
            mx.eval(arrays)  # MLX loads lazily
        for name, weight in arrays.items():
            if name.endswith("rotary_emb.inv_freq"):  # older folders hold RoPE's speeds, too
                continue
            if weight.dtype not in (mx.float32, mx.float16, mx.bfloat16):
                # FP8, for example, which MLX reads as uint8.
                raise UsageError(f"{name} is neither float32, float16 nor bfloat16")
            name = BODY_PREFIX.sub("model.", HEAD_PREFIX.sub("", name))
            if name in weights:
                raise UsageError(f"its files hold {name} twice, under different prefixes")
            weights[name] = weight.astype(mx.float32)
    return weights


# ---- Export -------------------------------------------------------------------------------------
# Our models have not learned a chat format: a chat is the concatenated texts of its messages.
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def export_model(model, tokenizer, folder, bits):
    """Writes a folder that transformers and mlx_lm load (only transformers for Arcee's relu2).

    bits: 4 or 8, which packs the model in place, 16 for float16, or None for float32.
    Returns the kind of the model in words. Raises UsageError if Hugging Face has no such model, or
    if the folder cannot be written or already holds a model, which a run might need unchanged.
    """
    folder = Path(folder)
    kind = find_model_type(model.config)
    # A reader of the folder would take any other weights for parts of the exported model.
    taken = sorted([*folder.glob("[!.]*.json"), *folder.glob("[!.]*.safetensors")])
    if taken:
        raise UsageError(f"{folder} holds {taken[0].name} already: name a new folder")
    settings = make_settings(model.config, kind, tokenizer)
    if bits in (4, 8) and kind == "arcee":
        raise UsageError("mlx-lm, which reads such weights, has no Arcee: --quantize 16 or a .gguf")
    if bits:
        group_size = extra("quantize").quantize(model, bits, is_packed=True)
        if group_size:
            # This entry tells mlx_lm that the weights are packed.
            settings["quantization"] = {"group_size": group_size, "bits": bits}
        else:
            settings["dtype"] = "float16"
    package = package_of(tokenizer)
    tokenizer_settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.context_size,
        "chat_template": CHAT_TEMPLATE,
    } | tokenizer.settings
    if tokenizer.eos is not None:
        tokenizer_settings["eos_token"] = package.id_to_token(tokenizer.eos)
    if tokenizer.bos:
        tokenizer_settings["bos_token"] = package.id_to_token(tokenizer.bos[0])
    texts = {
        "config.json": json.dumps(settings, indent=2),
        "tokenizer_config.json": json.dumps(tokenizer_settings, indent=2),
        "tokenizer.json": package.to_str(),
    }
    with explain_errors(f"cannot write to {folder}: name a folder of yours"):
        write_files(folder, model, texts)
    return kind.capitalize()


def write_files(folder, model, texts):
    """Writes a model's weights and these texts, {name: text}, to a folder: all of them or none.

    Raises OSError, or what MLX raises.
    """
    weights = dict(sorted(tree_flatten(model.parameters())))
    folder.mkdir(parents=True, exist_ok=True)
    # No file gets its name before all are written.
    with contextlib.ExitStack() as files:
        # Opened here, because MLX's own error for a path does not say why it failed.
        file = files.enter_context(atomic_write(folder / "model.safetensors"))
        mx.save_safetensors(file, weights, {"format": "mlx"})
        file.flush()
        for name, text in texts.items():
            file = files.enter_context(atomic_write(folder / name))
            file.write(text.encode("utf-8"))
            file.flush()


def find_model_type(config):
    """Their model_type for a model of this Config. Raises UsageError if there is none."""
    unusual_fields = {}
    for field in dataclasses.fields(config):  # also those that you have added
        value = getattr(config, field.name)
        if field.name not in (*THEIR_NAMES, "untie", "rope_scaling") and value != field.default:
            unusual_fields[field.name] = value
    for kind, its_fields in MODEL_TYPES.items():
        if unusual_fields == its_fields:
            return kind
    shape = " ".join(f"--{name} {value}" for name, value in unusual_fields.items())
    raise UsageError(f"Hugging Face has no model with {shape}: train one with --mlp swiglu")


def make_settings(config, kind, tokenizer):
    """The content of config.json for our Config; kind: their model_type."""
    rope_scaling = None
    if config.rope_scaling:
        rope_scaling = {"rope_type": "llama3", **dict(zip(THEIR_ROPE_SCALING, config.rope_scaling))}
    settings = {theirs: getattr(config, ours) for ours, theirs in THEIR_NAMES.items()}
    return settings | {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "tie_word_embeddings": not config.untie,
        "hidden_act": THEIR_ACTIVATIONS[config.mlp],
        "rope_scaling": rope_scaling,
        "dtype": "float32",
        "bos_token_id": tokenizer.bos[0] if tokenizer.bos else None,
        "eos_token_id": end_of_text(tokenizer),
    }


# ---- Tokenizers ---------------------------------------------------------------------------------
def package_of(tokenizer):
    """A tokenizer of the package `tokenizers` with the same ids, for other programs to read."""
    converters = {"byte": convert_bytes, "char": convert_characters, "word": convert_words}
    if tokenizer.kind in converters:
        return converters[tokenizer.kind](tokenizer)
    if not hasattr(tokenizer, "package"):
        raise UsageError(f"tokenizers of the kind {tokenizer.kind} cannot be exported")
    if tokenizer.package.num_special_tokens_to_add(False) == 0:
        return tokenizer.package
    # What it adds to a text, such as <s> and </s>, is to be what training has added.
    package = Tokenizer.from_str(tokenizer.vocabulary)
    package.post_processor = None
    if tokenizer.bos:
        names = [package.id_to_token(token) for token in tokenizer.bos]
        specials = [*zip(names, tokenizer.bos)]
        with explain_errors("its first tokens cannot be exported"):
            template = processors.TemplateProcessing(single=[*names, "$A"], special_tokens=specials)
        package.post_processor = template
    return package


def convert_bytes(tokenizer):
    """Bytes as a byte-level BPE without merges, so that each byte stays a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The visible characters of Latin-1 stand for their own bytes, those after them for the others.
    in_order = sorted(range(256), key=lambda byte: chr(byte) not in alphabet)
    vocabulary = dict(zip(alphabet, in_order))
    vocabulary["<eos>"] = tokenizer.eos
    package = Tokenizer(models.BPE(vocabulary, []))
    package.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    package.decoder = decoders.ByteLevel()
    return package


def convert_characters(tokenizer):
    """Characters as one-character words, joined without spaces."""
    vocabulary = {character: i for i, character in enumerate(tokenizer.vocabulary)}
    vocabulary["<unk>"] = tokenizer.unk
    package = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    any_character = Regex(r"[\s\S]")  # a dot would leave out line ends
    package.pre_tokenizer = pre_tokenizers.Split(any_character, "isolated")
    package.decoder = decoders.Fuse()
    return package


def convert_words(tokenizer):
    """Words between white space, and <eos> for each line end."""
    package = Tokenizer(models.WordLevel(tokenizer.word_to_id, "<unk>"))
    line_ends = normalizers.Replace("\n", " <eos> ")
    # str.split, which yields our words, treats these as white space; WhitespaceSplit does not.
    separators = normalizers.Replace(Regex("[\x1c-\x1f]"), " ")
    package.normalizer = normalizers.Sequence([line_ends, separators])
    package.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # WordPiece puts a space before each word that lacks its prefix, and no word here has it.
    spaces = decoders.WordPiece("\0", cleanup=False)
    line_ends = decoders.Replace(Regex(" ?<eos> ?"), "\n")
    package.decoder = decoders.Sequence([spaces, decoders.Fuse(), line_ends])
    return package
