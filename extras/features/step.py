"""Sampling on a Linux CPU by step.c: one C function a token instead of hundreds of MLX operations.

fast.py puts Reader and sample_tokens in the place of main.py's. The logits are the same up to
rounding, and the random numbers are the same: so are the texts, unless two tokens are as good as
equal.

What is sampled is the model as it is: fast.py compares the source of all that step.c stands for,
and `Weights` makes sure that functions and layers are still what that source defines.
"""

import ctypes
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import main
from support.cli import RunError, UsageError, explain_errors, warning
from support.machine import count_cores
from extras.features import fast

LONG, DOUBLE, ADDRESS = ctypes.c_long, ctypes.c_double, ctypes.c_void_p

library = fast.compile_library(Path(__file__).with_suffix(".c"))  # None if that fails
if library:
    library.read_tokens.argtypes = [ADDRESS, ADDRESS, LONG, *[ADDRESS] * 3, LONG, ADDRESS, ADDRESS]
    library.sample_token.argtypes = [ADDRESS, LONG, DOUBLE, LONG, *[DOUBLE] * 3, ADDRESS, LONG]
    library.sample_token.argtypes += [ADDRESS, ADDRESS]
    library.sample_token.restype = LONG


class Model(ctypes.Structure):
    _fields_ = [(name, LONG) for name in ("V", "D", "H", "K", "d", "F", "num_blocks", "mlp")]
    _fields_ += [("threads", LONG), ("norm_eps", DOUBLE), ("frequencies", ADDRESS)]
    _fields_ += [(name, ADDRESS) for name in ("embed_tokens", "lm_head", "norm", "layers", "sgemm")]


class Cache(ctypes.Structure):
    _fields_ = [("keys", ADDRESS), ("values", ADDRESS), ("B", LONG), ("capacity", LONG)]


# ---- The model ----------------------------------------------------------------------------------
class PlainError(Exception):
    """Why plain MLX has to sample a model, in words."""


def require(condition, reason):
    if not condition:
        raise PlainError(reason)


LAYERS = [nn.Linear, nn.RMSNorm, nn.Embedding]
# What a class has beside its functions; the last two from Python 3.13 on.
NO_FUNCTIONS = {"__module__", "__doc__", "__dict__", "__weakref__"}
NO_FUNCTIONS |= {"__firstlineno__", "__static_attributes__"}


def require_functions():
    """Raises PlainError unless all functions are still those that main.py, fast.py and MLX define.

    In a notebook, or in a module of the user's own, one may have been replaced.
    """
    known = [fast.linear, fast.rms_norm, fast.embedding, *map(vars(fast).get, fast.REPLACED)]
    definitions = {layer.__name__: layer for layer in LAYERS}
    definitions |= {name: getattr(main, name, None) for name in fast.STANDS_FOR["Reader"]}
    for name, definition in definitions.items():
        file = main.__file__
        functions = {name: definition}
        if definition in LAYERS:
            file = definition.__init__.__code__.co_filename
        if isinstance(definition, type):
            keys = vars(definition).keys() - NO_FUNCTIONS
            functions = {f"{name}.{key}": vars(definition)[key] for key in keys}
        for full_name, function in functions.items():
            function = getattr(function, "fget", function)  # of a property
            code = getattr(function, "__code__", None)
            is_own = code and (function.__qualname__, code.co_filename) == (full_name, file)
            is_own = is_own and full_name.endswith(code.co_name)  # or it wraps the other one
            require(is_own or function in known, f"{full_name} was replaced")


KINDS = {"": main.LanguageModel, "model": main.Transformer, "self_attn": main.Attention}
KINDS |= {"mlp": main.MLP, "embed_tokens": nn.Embedding, "lm_head": nn.Linear}
ACTIVATIONS = {"relu2": main.relu2, "gelu": nn.gelu, "swiglu": nn.silu}  # in step.c's order


def parameters_of(model):
    """A model's parameters, {name: array}.

    Raises PlainError unless its layers are those that main.py makes of its Config.
    """
    require(type(model) is main.LanguageModel, f"a {type(model).__name__} is no LanguageModel")
    config = model.config
    parameters = {}
    for name, layer in model.named_modules():
        _, _, part = name.rpartition(".")
        kind = nn.Linear if part.endswith("_proj") else nn.RMSNorm
        kind = main.Block if part.isdecimal() else KINDS.get(part, kind)
        is_plain = type(layer) is kind and not vars(layer).keys() & vars(kind).keys()
        if kind is nn.RMSNorm:
            is_plain &= getattr(layer, "eps", None) == config.norm_eps
        elif kind is main.MLP and is_plain:
            is_plain = layer.activation is ACTIVATIONS.get(config.mlp)
            is_plain &= layer.is_gated == (config.mlp == "swiglu")
        elif kind is main.Attention and is_plain:
            is_plain = layer.head_dim == config.head_dim
            is_plain &= np.shape(layer.frequencies) == (config.head_dim // 2,)
            is_plain &= np.array_equal(layer.frequencies, frequencies_of(model))
        require(is_plain, f"{name or 'it'}, a {type(layer).__name__}, is not as main.py makes it")
        others = [key for key in layer if key != "layers" and not isinstance(layer[key], nn.Module)]
        parameters |= {f"{name}.{key}": layer[key] for key in others}
    return parameters


def frequencies_of(model):
    return model.model.layers[0].self_attn.frequencies


def weight_shapes(config):
    """The shapes of a model's weights, {name: shape}, and of a block's, in step.c's order.

    None: this model does not have it.
    """
    V, D, d, F = config.vocab_size, config.dim, config.head_dim, config.mlp_dim
    queries, keys = config.num_heads * d, config.num_kv_heads * d
    model = {
        "model.embed_tokens.weight": (V, D),
        "lm_head.weight": (V, D) if config.untie else None,
        "model.norm.weight": (D,),
    }
    block = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (queries, D),
        "self_attn.q_proj.bias": (queries,) if config.qkv_bias else None,
        "self_attn.k_proj.weight": (keys, D),
        "self_attn.k_proj.bias": (keys,) if config.qkv_bias else None,
        "self_attn.v_proj.weight": (keys, D),
        "self_attn.v_proj.bias": (keys,) if config.qkv_bias else None,
        "self_attn.o_proj.weight": (D, queries),
        "self_attn.q_norm.weight": (d,) if config.qk_norm else None,
        "self_attn.k_norm.weight": (d,) if config.qk_norm else None,
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D) if config.mlp == "swiglu" else None,
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    return model, block


class Weights:
    """Where a model's weights are, for step.c. Raises PlainError if it knows no such model."""

    def __init__(self, language_model):
        require_functions()
        self.parameters = parameters_of(language_model)
        config = self.config = language_model.config
        self.arrays = []  # that step.c reads
        model, block = weight_shapes(config)
        embed_tokens, lm_head, norm = map(self.take, model, model.values())
        layers = []
        for i in range(config.num_blocks):
            layers += [self.take(f"model.layers.{i}.{name}", block[name]) for name in block]
        names = ", ".join(self.parameters)
        require(not names, f"it has parameters of your own: {names}")
        # With less to do, threads would cost more than they save.
        num_bytes = sum(array.nbytes for array in self.arrays)
        threads = max(1, min(count_cores(), num_bytes // 2**20))
        self.layers = (ADDRESS * len(layers))(*layers)
        self.frequencies = np.array(frequencies_of(language_model), np.float64)
        sizes = [config.vocab_size, config.dim, config.num_heads, config.num_kv_heads]
        sizes += [config.head_dim, config.mlp_dim, config.num_blocks]
        sizes += [[*ACTIVATIONS].index(config.mlp), threads]
        addresses = [self.frequencies.ctypes.data, embed_tokens, lm_head or embed_tokens, norm]
        addresses += [ctypes.addressof(self.layers)]
        if fast.forwarder:
            addresses.append(ctypes.cast(fast.forwarder.cblas_sgemm, ADDRESS).value)
        self.model = Model(*sizes, config.norm_eps, *addresses)

    def take(self, name, shape):
        """The address of a parameter, which is none of the others then; None if shape is None."""
        if shape is None:
            return None
        array = self.parameters.pop(name, None)
        is_plain = isinstance(array, mx.array) and array.shape == shape
        is_plain = is_plain and array.dtype == mx.float32
        require(is_plain, f"{name} is not {shape} in float32")
        array = np.ascontiguousarray(array)  # no copy of what lies by rows
        self.arrays.append(array)
        return array.__array_interface__["data"][0]


# ---- Reading and sampling -----------------------------------------------------------------------
said = set()  # reasons that the screen has shown


def make_reader(model, num_texts=1):
    """A Reader, or None where plain MLX has to sample a model, which the screen says."""
    try:
        require(library, "step.c was not compiled: apt install g++")
        return Reader(model, num_texts)
    except PlainError as error:
        if str(error) not in said:
            said.add(str(error))
            warning(f"Sampling in plain MLX, which is slower: {error}")
        return None


class Reader:
    """main.py's Reader, by step.c, for texts of different lengths.

    num_read: how many ids of each text it has read, [B]. If a number is lowered, the ids after that
    are forgotten. Raises PlainError, and `read` UsageError, for a model that step.c does not know.
    """

    def __init__(self, model, num_texts=1):
        self.language_model = model
        self.weights = Weights(model)
        self.is_new = True
        self.cache = Cache(capacity=0)
        self.num_read = np.zeros(num_texts, np.int64)

    def read(self, parts, count=1):
        """Logits [B, count, V] after each of the last `count` tokens of every text.

        parts: for each text, the list of ids that follow what was read of it, at least `count`.
        """
        lengths = [len(part) for part in parts]
        if not 1 <= count <= min(lengths) or self.num_read.min() < 0:
            raise ValueError(f"{count} ids or more are needed for each text")
        # Since the last prompt, the weights may have changed.
        if max(lengths) > 1 and not self.is_new:
            with explain_errors("the model has changed: begin another text", PlainError):
                self.weights = Weights(self.language_model)
        self.is_new = False
        tokens, texts, positions, kept = [], [], [], []
        for text, (part, start) in enumerate(zip(parts, self.num_read.tolist())):
            tokens += part
            texts += [text] * len(part)
            positions += range(start, start + len(part))
            kept += range(len(tokens) - count, len(tokens))
        V = self.weights.config.vocab_size
        check_ids(tokens, V)
        with explain_errors("shorten the prompt", MemoryError, raises=RunError):
            self.reserve(max(positions) + 1)
            logits = np.empty((len(kept), V), np.float32)
            arrays = map(ints, (tokens, texts, positions))
            address = logits.ctypes.data
            model, cache = ctypes.byref(self.weights.model), ctypes.byref(self.cache)
            kept = ints(kept)
            if not library.read_tokens(
                model, cache, len(tokens), *arrays, len(kept), kept, address
            ):
                raise MemoryError("there is no memory to read it")
        self.num_read += lengths
        return logits.reshape(len(parts), count, V)

    def reserve(self, length):
        """Makes room for `length` tokens of each text. Raises MemoryError."""
        old = self.cache
        if length <= old.capacity:
            return
        config = self.weights.config
        capacity = 256 * math.ceil(length / 256)
        shape = (config.num_blocks, len(self.num_read), config.num_kv_heads)
        keys = np.zeros((*shape, capacity, config.head_dim), np.float32)
        values = np.zeros((*shape, config.head_dim, capacity), np.float32)
        if old.capacity:
            keys[..., : old.capacity, :], values[..., : old.capacity] = old.arrays
        cache = Cache(keys.ctypes.data, values.ctypes.data, len(self.num_read), capacity)
        cache.arrays = keys, values
        self.cache = cache


def check_ids(ids, V):
    """Raises UsageError for ids that are none of V."""
    if not 0 <= min(ids) <= max(ids) < V:
        raise UsageError(f"the tokenizer has ids that are not among the model's {V:,}")


def ints(numbers):
    return (ctypes.c_int * len(numbers))(*numbers)


def sample_tokens(logits, flags, windows, keys):
    """main.py's sample_tokens, of a Reader's logits."""
    logits = np.ascontiguousarray(logits, np.float32)
    B, V = logits.shape
    rules = [V, flags.temperature, flags.top_k, flags.top_p, flags.min_p, flags.repetition_penalty]
    buffer = (ctypes.c_float * (2 * V))()
    ids = []
    for i in range(B):
        penalized = ints([])
        if flags.repetition_penalty != 1:
            check_ids(windows[i], V)
            penalized = ints(windows[i])
        address = logits.ctypes.data + 4 * V * i
        key = (ctypes.c_uint * 2)(*keys[i])
        token = library.sample_token(address, *rules, penalized, len(penalized), key, buffer)
        ids.append(token)
    return ids
