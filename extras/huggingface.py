"""Import of Hugging Face models, and export of ours to transformers and mlx_lm.

    python main.py --init_from DIR ...         fine-tunes a Llama, Mistral, Qwen2, Qwen3, Arcee
    python main.py --init_from ORG/NAME ...    the same, downloaded from Hugging Face's hub
    python main.py --teacher DIR ...           distills from one
    python -m extras.export DIR                writes a checkpoint as such a folder
    python -m extras.export DIR --quantize 4   the same with packed weights, for mlx_lm

Our weights have the same names as their Llama's, so only configuration and tokenizer are converted.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from datasets import PackageTokenizer, UsageError, end_of_text, explained, extra, one_line
from datasets import read_whole, replacing, user_path, without_passwords
from main import DEFAULTS, MLPS, Config, LanguageModel, load_arrays, refuse_beyond_memory
from main import sha1_of_file

# Their names, and our (mlp, qk_norm, qkv_bias) for each. An export has the first one that fits.
KINDS = {
    "Llama": ("swiglu", False, False),
    "Mistral": ("swiglu", False, False),
    "Qwen2": ("swiglu", False, True),
    "Qwen3": ("swiglu", True, False),
    "Arcee": ("relu2", False, False),
}
THEIR_KINDS = "Llama, Mistral, Qwen2, Qwen3 or Arcee"
# What the hub calls a model: ORG/NAME, perhaps with a branch or a commit.
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w.-]*))?", re.ASCII)
# What to do about some errors of huggingface_hub.
HUB_ERRORS = {
    "RepositoryNotFoundError": "it has no such model, or a private one: check the name, or set "
    "HF_TOKEN",
    "GatedRepoError": "accept the terms on its page there, and set HF_TOKEN",
    "RevisionNotFoundError": "the model has no such branch or commit",
    "LocalEntryNotFoundError": "no connection, and it was not downloaded before: check the "
    "network, HF_ENDPOINT and HF_HUB_OFFLINE",
}
# The files of a model on the hub that are read. Others hold the same weights in other formats.
TEXTS = ["config.json", "tokenizer.json", "tokenizer_config.json"]
WEIGHTS = "model*.safetensors"
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
# config.json's RoPE settings other than the type, in the order of our Config's rope_scaling.
THEIR_ROPE_SCALING = [
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
]
# Entries of a config.json that, if set, make a model compute what ours cannot.
UNSUPPORTED = [
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "quantization",
    "quantization_config",
]
# Valid types, minimum and maximum of these numbers in a config.json. The others are sizes, and
# LARGEST_SIZE is far more than any model has.
NUMBERS = {
    "rope_theta": ((int, float), 1, 1e17),
    "rms_norm_eps": ((int, float), 0, 1),
    "factor": ((int, float), 1, 1e6),
    "low_freq_factor": ((int, float), 1e-6, 1e6),
    "high_freq_factor": ((int, float), 1e-6, 1e6),
}
LARGEST_SIZE = 2**24
# Our models have not learned a chat format: a chat is the concatenated texts of its messages.
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

# The files of an export.
EXPORTED = [
    "model.safetensors",
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "tokenizer.json",
]


# ---- Import -------------------------------------------------------------------------------------
def open_by_name(name):
    """The model of a folder or, if there is none of that name, on the hub.

    Returns what `import_model` does. Raises UsageError.
    """
    if os.path.isdir(name):
        return import_model(Path(name))
    found = HUB_NAME.fullmatch(name)
    if not found:
        remedy = "name one, a checkpoint, or a model of the Hugging Face hub (ORG/NAME)"
        raise UsageError(f"{name} is no folder here: {remedy}")
    repository, revision = found.groups()
    return import_model(download_model(repository, revision))


def download_model(repository, revision=None):
    """The folder of a model on the hub, named by its commit; only what is missing is downloaded.

    Address, key and cache are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and
    its other variables hold here, too. Raises UsageError.
    """
    fault = f"{repository} is no folder here, and cannot be downloaded from the Hugging Face hub"
    with explained(f"{fault}: pip install huggingface_hub", ImportError):
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars
    if not sys.stderr.isatty():
        disable_progress_bars()
    download = partial(huggingface_hub.snapshot_download, repository)
    try:
        folder = Path(download(revision=revision, allow_patterns=TEXTS))
        check_texts(folder)  # before gigabytes are downloaded in vain
        return Path(download(revision=folder.name, allow_patterns=[*TEXTS, WEIGHTS]))
    except UsageError as error:
        raise UsageError(f"{repository}: {error}") from None
    except Exception as error:  # of many kinds, with messages of many lines
        kind = type(error).__name__
        message = without_passwords(one_line(error))[:200]  # it may quote HF_ENDPOINT
        reason = HUB_ERRORS.get(kind, f"{kind}: {message}")
        raise UsageError(f"{fault}: {reason}") from None


def check_texts(folder):
    """Raises UsageError unless a folder's TEXTS are those of a model that can be loaded."""
    malformed = (OSError, LookupError, ValueError, TypeError, AttributeError)
    with explained(f"its config.json is not that of a {THEIR_KINDS} model", *malformed):
        config = read_config(folder)
    if not (folder / "tokenizer.json").exists():
        raise UsageError("it has no tokenizer.json")
    heads = config.num_heads + config.num_kv_heads
    _, is_gated = MLPS[config.mlp]
    matrices = 3 if is_gated else 2
    block = 2 * heads * config.head_dim * config.dim + matrices * config.mlp_dim * config.dim
    embeddings = config.vocab_size * config.dim
    refuse_beyond_memory({"weights": config.num_blocks * block + embeddings})


def read_config(path):
    """Our Config for the config.json in a folder, tied or not as that says.

    Raises UsageError if this program has no such model, and exceptions of several types if it is
    malformed.
    """
    settings = read_settings(path)
    unsupported = find_unsupported(settings)
    if unsupported:
        # Better no model than one that computes something else.
        raise UsageError(f"it has {', '.join(unsupported)}, which training does not know")
    return make_config(settings, untie=not settings.get("tie_word_embeddings"))


def import_model(path):
    """Reads a Hugging Face folder: config.json, tokenizer.json and the *.safetensors files.

    Returns the fields of a Source: the model in float32, its tokenizer, its id and its files.
    Raises UsageError if the folder holds no model that is supported.
    """
    fault = f"{path} holds no {THEIR_KINDS} model that can be loaded: name one, or see --list"
    with explained(fault):
        config = read_config(path)
        if not (path / "tokenizer.json").exists():
            raise UsageError("it has no tokenizer.json")
        weights = read_weights(weight_files(path))
        if not config.untie:
            # Some folders hold an output layer anyway, a copy of the embeddings.
            weights.pop("lm_head.weight", None)
        # Some hold none although config.json does not say so.
        config.untie = "lm_head.weight" in weights
        if config.num_blocks > len(weights):
            # Building that many blocks first could exhaust the memory.
            raise UsageError(f"num_hidden_layers is {config.num_blocks:,}: its files hold fewer")
        model = LanguageModel(config)
        # Raises ValueError unless the names and shapes of all weights match.
        model.load_weights(list(weights.items()))
        # MLX loads lazily: only this reads the arrays and detects a damaged file.
        mx.eval(model.parameters())
        vocabulary = read_whole(path / "tokenizer.json")
        tokenizer = PackageTokenizer(vocabulary, eos=read_eos(path))
        largest = max(tokenizer.package.get_vocab().values())
        if largest >= config.vocab_size:
            # MLX does not check indices: it would read beyond the embeddings.
            raise UsageError(f"its tokenizer has the id {largest}, vocab_size {config.vocab_size}")
        files = model_files(path)
    return model, tokenizer, id_of(path), {file.name: file for file in files}


def weight_files(folder):
    """The paths of a model's weights. Raises UsageError if there are none."""
    # Large models come in several files. A folder of Mistral's holds the weights again, in
    # consolidated.safetensors.
    files = sorted(folder.glob(WEIGHTS)) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError("it has no file *.safetensors")
    return files


def model_files(folder):
    """The paths of the files of a model that are read."""
    texts = [folder / name for name in TEXTS]
    return weight_files(folder) + [path for path in texts if path.exists()]  # one is optional


def id_of(folder):
    """The id of the model in a folder: the SHA1 of the SHA1s of its files.

    So editing one of them makes another model.
    """
    sha1s = [sha1_of_file(path.resolve()) for path in model_files(Path(folder))]
    return hashlib.sha1("".join(sha1s).encode()).hexdigest()


def read_settings(path):
    """The entries of config.json without nulls, which mean the same as no entry.

    (But for Mistral's sliding_window, which all of its folders have.)
    """
    entries = json.loads(read_whole(path / "config.json"))
    return {name: value for name, value in entries.items() if value is not None}


def read_eos(path):
    """The token that ends a text, from tokenizer_config.json; None if that does not specify it.

    The `eos_token_id` of config.json is not used: it may be an unintended default.
    """
    file = path / "tokenizer_config.json"
    if not file.exists():
        return None
    token = json.loads(read_whole(file)).get("eos_token")
    return token["content"] if isinstance(token, dict) else token


def read_weights(files):
    """All arrays of these safetensors files by name, as float32."""
    weights = {}
    for file in files:
        if not file.is_file():  # a pipe might never begin
            raise UsageError(f"{file.name} is not a regular file")
        for name, weight in load_arrays(file).items():
            if name.endswith("rotary_emb.inv_freq"):  # older folders hold RoPE's speeds, too
                continue
            if weight.dtype not in (mx.float32, mx.float16, mx.bfloat16):
                # MLX reads FP8, for one, as the integers of its bits.
                raise UsageError(f"{name} is neither float32, float16 nor bfloat16")
            weights[name] = weight.astype(mx.float32)
    return weights


def find_kind(settings):
    """Our (mlp, qk_norm, qkv_bias) for their `model_type`, or None.

    Raises KeyError if that is missing.
    """
    for name, kind in KINDS.items():
        if name.lower() == settings["model_type"]:
            return kind
    return None


def find_rope(settings):
    """The RoPE settings in config.json, {} if none; older files call them `rope_scaling`."""
    return settings.get("rope_parameters") or settings.get("rope_scaling") or {}


def find_rope_type(settings):
    """How config.json stretches RoPE's wavelengths for texts longer than those of training."""
    rope = find_rope(settings)
    return rope.get("rope_type", rope.get("type", "default"))


def find_unsupported(settings):
    """What a model with these settings does that ours cannot, as a list of phrases."""
    found = [name for name in UNSUPPORTED if settings.get(name)]
    kind = find_kind(settings)
    if kind is None:
        found.append(f"model_type {settings['model_type']}")
    rope_type = find_rope_type(settings)
    if rope_type not in ("default", "llama3"):
        found.append(f"rope {rope_type}")
    mlp = "swiglu"  # if the type is unknown: most models use it
    if kind is not None:
        mlp, _, _ = kind
    activation = settings.get("hidden_act", THEIR_ACTIVATIONS[mlp])
    if activation != THEIR_ACTIVATIONS[mlp]:
        found.append(f"hidden_act {activation}")
    return found


def make_config(settings, untie):
    """Our Config for their settings.

    Raises KeyError if one without a default is missing, UsageError if one cannot be used.
    """
    # What transformers assumes for entries that a config.json lacks.
    defaults = {
        "num_key_value_heads": settings["num_attention_heads"],
        "head_dim": None,
        "rms_norm_eps": 1e-5 if settings["model_type"] == "arcee" else 1e-6,
        "rope_theta": 1e4,
    }
    # `rope_theta` is among the RoPE settings, which come first, or, in older folders, next to them.
    settings = defaults | settings | find_rope(settings)
    fields = {ours: settings[theirs] for ours, theirs in THEIR_NAMES.items()}
    for ours, theirs in THEIR_NAMES.items():
        if theirs != "head_dim" or fields[ours] is not None:
            check_number(theirs, fields[ours])
        if theirs in ("rope_theta", "rms_norm_eps"):
            fields[ours] = float(fields[ours])
    if fields["num_heads"] % fields["num_kv_heads"]:
        raise UsageError("num_key_value_heads does not divide num_attention_heads")
    if fields["head_dim"] is not None and fields["head_dim"] % 2:
        raise UsageError("head_dim is odd")  # RoPE rotates pairs
    if find_rope_type(settings) == "llama3":
        for name in THEIR_ROPE_SCALING:
            check_number(name, settings[name])
        fields["rope_scaling"] = tuple(settings[name] for name in THEIR_ROPE_SCALING)
        if settings["low_freq_factor"] >= settings["high_freq_factor"]:
            raise UsageError("low_freq_factor is not below high_freq_factor")
    mlp, qk_norm, qkv_bias = find_kind(settings)
    if settings["model_type"] == "mistral" and settings.get("sliding_window"):
        # Within the window, it computes what a Llama does.
        check_number("sliding_window", settings["sliding_window"])
        fields["context_size"] = min(fields["context_size"], settings["sliding_window"])
    return Config(mlp=mlp, qk_norm=qk_norm, qkv_bias=qkv_bias, untie=untie, **fields)


def check_number(name, value):
    """Raises UsageError unless an entry of config.json is a number in its valid range."""
    types, least, most = NUMBERS.get(name, ((int,), 1, LARGEST_SIZE))
    # By `type`, since a bool is an instance of int.
    if type(value) not in types or not least <= value <= most:
        raise UsageError(f"{name} is {value!r}")


# ---- Export -------------------------------------------------------------------------------------
def export_model(model, tokenizer, folder, bits):
    """Writes a folder that transformers and mlx_lm load (only transformers for Arcee's relu2).

    bits: 4 or 8, which packs the model in place, 16 for float16, or None for float32.
    Raises UsageError if Hugging Face has no such model, or if the folder cannot be written or
    already holds a model, which a run might need unchanged.
    """
    folder = Path(user_path(folder))
    name = find_counterpart(model.config)
    check_vacant(folder)
    settings = make_settings(model.config, name, tokenizer)
    if bits:
        group_size = extra("quantize").quantize(model, bits, packed=True)
        if group_size:
            # This entry tells mlx_lm that the weights are packed.
            settings["quantization"] = {"group_size": group_size, "bits": bits}
        else:
            settings["dtype"] = "float16"
    tokenizer_text, tokenizer_settings = tokenizer_json(tokenizer)
    tokenizer_settings["chat_template"] = CHAT_TEMPLATE
    tokenizer_settings["model_max_length"] = model.config.context_size
    # For `generate` of transformers to use.
    sampling = {
        "eos_token_id": end_of_text(tokenizer),
        "do_sample": True,
        "temperature": DEFAULTS["temperature"],
        "top_k": DEFAULTS["top_k"],
    }
    weights = dict(sorted(tree_flatten(model.parameters())))

    texts = {
        "config.json": json.dumps(settings, indent=2),
        "tokenizer_config.json": json.dumps(tokenizer_settings, indent=2),
        "generation_config.json": json.dumps(sampling, indent=2),
        "tokenizer.json": tokenizer_text,
    }

    with explained(f"cannot write to {folder}: name a folder of yours"):
        folder.mkdir(parents=True, exist_ok=True)
        # No file gets its name before all are written.
        with contextlib.ExitStack() as files:
            # Opened here, because MLX's own error for a path does not say why it failed.
            file = files.enter_context(replacing(folder / "model.safetensors"))
            mx.save_safetensors(file, weights, {"format": "mlx"})
            file.flush()
            for file_name, text in texts.items():
                file = files.enter_context(replacing(folder / file_name))
                file.write(text.encode("utf-8"))
                file.flush()
    message = f"{name}ForCausalLM and its tokenizer are in {folder}"
    if name == "Arcee":
        message += " for transformers (mlx-lm has no Arcee: for it, train with --mlp swiglu)"
    print(message, file=sys.stderr)


def check_vacant(folder):
    """Raises UsageError if a folder holds a model, or a file that an export would replace."""
    taken = [folder / name for name in EXPORTED if (folder / name).exists()]
    # A reader of the folder would take any other weights for parts of the exported model.
    taken += sorted(folder.glob("*.safetensors"))
    if taken:
        raise UsageError(f"{folder} holds {taken[0].name} already: name a new folder")


def find_counterpart(config):
    """Their name for a model of this Config. Raises UsageError if there is none."""
    kind = (config.mlp, config.qk_norm, config.qkv_bias)
    name = next((name for name in KINDS if KINDS[name] == kind), None)
    if name is None:
        shape = f"--mlp {config.mlp}"
        if config.qk_norm:
            shape += " --qk_norm"
        raise UsageError(f"Hugging Face has no model with {shape}: train one with --mlp swiglu")
    known = {*THEIR_NAMES, "mlp", "qk_norm", "qkv_bias", "untie", "rope_scaling"}
    for field in dataclasses.fields(config):  # one of a user's own, perhaps
        if field.name not in known and getattr(config, field.name) != field.default:
            raise UsageError(f"Hugging Face has no model with {field.name}")
    return name


def make_settings(config, name, tokenizer):
    """The content of config.json for our Config; name: their name for the model."""
    settings = {theirs: getattr(config, ours) for ours, theirs in THEIR_NAMES.items()}
    settings["architectures"] = [f"{name}ForCausalLM"]
    settings["model_type"] = name.lower()
    settings["tie_word_embeddings"] = not config.untie
    settings["hidden_act"] = THEIR_ACTIVATIONS[config.mlp]
    settings["attention_bias"] = False
    settings["mlp_bias"] = False
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= dict(zip(THEIR_ROPE_SCALING, config.rope_scaling)) | {"rope_type": "llama3"}
        settings["rope_scaling"] = rope  # as mlx_lm and older versions of transformers call it
    settings["rope_parameters"] = rope
    settings["dtype"] = "float32"
    # Our texts have no start token.
    settings["bos_token_id"] = None
    settings["eos_token_id"] = end_of_text(tokenizer)
    return settings


# ---- Tokenizers ---------------------------------------------------------------------------------
def tokenizer_json(tokenizer):
    """A tokenizer for other programs, with the same ids.

    Returns the text of tokenizer.json and the entries of tokenizer_config.json, a dict.
    """
    if tokenizer.kind == "byte":
        package = convert_bytes(tokenizer)
    elif tokenizer.kind == "char":
        package = convert_characters(tokenizer)
    elif tokenizer.kind == "word":
        package = convert_words(tokenizer)
    else:
        package = tokenizer.package
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eos is not None:
        settings["eos_token"] = package.id_to_token(tokenizer.eos)
    return package.to_str(), settings


def convert_bytes(tokenizer):
    """Bytes as a byte-level BPE without merges, so that each byte stays a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    vocabulary["<eos>"] = tokenizer.eos
    package = Tokenizer(models.BPE(vocabulary, []))
    package.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    package.decoder = decoders.ByteLevel()
    return package


def byte_characters():
    """The characters that stand for the 256 bytes in GPT-2's vocabulary, in order of the bytes.

    A byte that is a visible Latin-1 character stands for itself; the others take the characters
    from 256 on, in order.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}  # ! to ~, ¡ to ¬, ® to ÿ
    characters = []
    substitute = 256
    for byte in range(256):
        if byte in visible:
            characters.append(chr(byte))
        else:
            characters.append(chr(substitute))
            substitute += 1
    return characters


def convert_characters(tokenizer):
    """Characters as one-character words, joined without spaces."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: i for i, character in enumerate(tokenizer.vocabulary)}
    vocabulary["<unk>"] = tokenizer.unk
    package = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    any_character = Regex(r"[\s\S]")  # a dot would leave out line ends
    package.pre_tokenizer = pre_tokenizers.Split(any_character, "isolated")
    package.decoder = decoders.Fuse()
    return package


def convert_words(tokenizer):
    """Words between white space, and <eos> for each line end."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(tokenizer.vocabulary)}
    package = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
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
