"""The model against an independent forward pass in NumPy, its cache, first weights and dropout."""

import math

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import arrays, make_model
from main import DropoutMasks, dropout
from mlx.utils import tree_flatten


def random_tokens(model, rows=2, length=None, seed=1):
    size = (rows, length or model.config.context_size)
    return np.random.default_rng(seed).integers(model.config.vocab_size, size=size)


def logits_of(model, tokens, **options):
    return np.array(model(mx.array(tokens), **options))


def make_caches(model):
    return [main.KVCache() for _ in model.model.layers]


def assert_close(logits, expected, rtol=0, atol=1e-4):
    np.testing.assert_allclose(logits, expected, rtol=rtol, atol=atol)


def drop_nothing(hidden, mask_index):
    return hidden


def normalize(hidden, epsilon):
    """RMSNorm without its weights."""
    mean_square = (hidden**2).mean(-1, keepdims=True)
    return hidden / np.sqrt(mean_square + epsilon)


def reference(model, tokens, drop=drop_nothing, heads=None):
    """Logits [B, L, V] in float64, one head at a time.

    Written from the papers and Hugging Face's Llama. heads: a list for each head's weights
    [B, L, L], block by block.
    """
    config = model.config
    weights = arrays(model)
    B, L = tokens.shape
    d = config.head_dim or config.dim // config.num_heads

    def norm(hidden, name):
        return normalize(hidden, config.norm_eps) * weights[name + ".weight"]

    def linear(hidden, name):
        return hidden @ weights[name + ".weight"].T

    def rotate(vectors):
        """RoPE of vectors [B, L, d]: x cos + rotate_half(x) sin."""
        positions = np.arange(L)[:, None]
        frequencies = config.rope_theta ** -(np.arange(0, d, 2) / d)
        angles = positions * frequencies
        angles = np.concatenate([angles, angles], -1)
        first, second = np.split(vectors, 2, -1)
        half = np.concatenate([-second, first], -1)
        return vectors * np.cos(angles) + half * np.sin(angles)

    def softmax(scores):
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        return shares / shares.sum(-1, keepdims=True)

    def attention(hidden, name):
        queries = linear(hidden, name + ".q_proj")
        keys = linear(hidden, name + ".k_proj")
        values = linear(hidden, name + ".v_proj")
        is_later = np.arange(L)[:, None] < np.arange(L)
        attended = np.zeros((B, L, config.num_heads * d))
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            own = slice(head * d, head * d + d)
            other = slice(shared * d, shared * d + d)
            query = queries[..., own]
            key = keys[..., other]
            if config.qk_norm:
                query = norm(query, name + ".q_norm")
                key = norm(key, name + ".k_norm")
            scores = rotate(query) @ rotate(key).swapaxes(1, 2) / math.sqrt(d)
            scores[:, is_later] = -np.inf
            shares = softmax(scores)
            attended[..., own] = shares @ values[..., other]
            if heads is not None:
                heads.append(shares)
        return linear(attended, name + ".o_proj")

    def mlp(hidden, name):
        up = linear(hidden, name + ".up_proj")
        if config.mlp == "swiglu":
            gate = linear(hidden, name + ".gate_proj")
            inner = gate / (1 + np.exp(-gate)) * up
        elif config.mlp == "gelu":
            erf = np.vectorize(math.erf)
            inner = up * 0.5 * (1 + erf(up / math.sqrt(2)))
        else:
            inner = np.maximum(up, 0) ** 2
        return linear(inner, name + ".down_proj")

    hidden = weights["model.embed_tokens.weight"][tokens]
    hidden = drop(hidden, 0)
    for i in range(config.num_blocks):
        block = f"model.layers.{i}"
        normed = norm(hidden, block + ".input_layernorm")
        hidden = hidden + drop(attention(normed, block + ".self_attn"), 2 * i + 1)
        normed = norm(hidden, block + ".post_attention_layernorm")
        hidden = hidden + drop(mlp(normed, block + ".mlp"), 2 * i + 2)
    head = "lm_head" if config.untie else "model.embed_tokens"
    return linear(norm(hidden, "model.norm"), head)


SHAPES = [
    dict(),
    dict(num_kv_heads=4, mlp="gelu", qk_norm=True),
    dict(num_kv_heads=1, mlp="swiglu", untie=True),
    dict(rope_theta=50.0, norm_eps=0.1, num_blocks=1),
    dict(dim=22, head_dim=6),  # as imported models have: the heads are wider than the model
]


@pytest.mark.parametrize("values", SHAPES, ids=str)
def test_logits_equal_an_independent_forward_pass(values):
    model = make_model(**values)
    tokens = random_tokens(model)
    expected = reference(model, tokens)
    assert_close(logits_of(model, tokens), expected)
    assert_close(logits_of(model, tokens, caches=make_caches(model)), expected)


@pytest.mark.parametrize("parts", [[1] * 8, [1, 7], [3, 1, 1, 3]], ids=str)
def test_decoding_with_a_cache_equals_one_pass(parts):
    model = make_model()
    tokens = random_tokens(model)
    caches = make_caches(model)
    decoded = []
    cuts = np.cumsum(parts)[:-1]
    for piece in np.split(tokens, cuts, axis=1):
        decoded.append(logits_of(model, piece, caches=caches))
    for cache in caches:
        assert cache.offset == 8, "all are read"
    decoded = np.concatenate(decoded, axis=1)
    assert_close(decoded, logits_of(model, tokens), rtol=2e-6, atol=1e-5)


# First weights


def test_first_weights_by_hand():
    """By the seed and a parameter's name alone, so that a parameter more changes no other.

    Blocks begin as the identity. Random values are those of NumPy's generator. A vector or scalar
    of a layer's own, other than a bias, keeps its value.
    """
    shape = make_model(untie=True, qk_norm=True, mlp="swiglu", qkv_bias=True).config
    model = main.LanguageModel(shape)
    model.gain = mx.array(0.5)
    unset = []
    for name, weight in tree_flatten(model.parameters()):
        if weight.ndim > 1 or "bias" in name:
            unset.append((name, mx.full(weight.shape, math.nan)))
    model.load_weights(unset, strict=False)
    main.init_weights(model, 3)
    for name, weight in tree_flatten(model.parameters()):
        drawn = np.random.default_rng([3, *map(ord, name)])
        drawn = drawn.standard_normal(weight.shape, np.float32)
        if "embed" in name:
            expected = drawn * 5 / 16
        elif any(part in name for part in ("q_proj.w", "k_proj.w", "v_proj.w", "gate", "up")):
            expected = drawn / math.sqrt(16)
        elif name == "gain":
            expected = 0.5
        else:
            expected = np.full(weight.shape, float("norm" in name))
        np.testing.assert_allclose(np.array(weight), expected, rtol=1e-6, err_msg=name)


# Dropout

KEYS = np.random.default_rng(2).integers(0, 2**32, (8, 2), np.uint32)


def make_masks(hidden_shape, rate, rows=slice(8)):
    """The DropoutMasks of some rows of a batch of eight."""
    _, L, D = hidden_shape
    return DropoutMasks(mx.array(rate), mx.array(KEYS[rows]), L, D)


def drop(hidden, rate, mask_index, rows=slice(8)):
    hidden = mx.array(hidden)
    return dropout(hidden, make_masks(hidden.shape, rate, rows), mask_index)


def test_dropout_acts_on_embeddings_and_on_what_each_block_adds():
    model = make_model(mlp="swiglu")
    tokens = random_tokens(model, rows=8)

    def drop_again(hidden, mask_index):
        scale = np.array(drop(mx.ones(hidden.shape), 0.4, mask_index), np.float64)
        return hidden * scale

    expected = reference(model, tokens, drop_again)
    dropout_masks = make_masks((*tokens.shape, model.config.dim), 0.4)
    assert_close(logits_of(model, tokens, dropout_masks=dropout_masks), expected)


def test_masks_are_independent_and_keep_the_expectation():
    """Within a row, between rows, and between sites: each statistic is standard normal."""
    rate = 0.25
    masks = []
    for mask_index in range(5):
        dropped = np.array(drop(mx.ones((8, 64, 128)), rate, mask_index))
        np.testing.assert_allclose(np.unique(dropped), [0, 1 / (1 - rate)], rtol=1e-6)
        masks.extend(dropped.reshape(8, -1) == 0)
    normed = (np.stack(masks) - rate) / math.sqrt(rate * (1 - rate))  # [40, 8192]
    between = normed @ normed.T / math.sqrt(8192)
    statistics = [normed.sum(1) / math.sqrt(8192), between[~np.eye(40, dtype=bool)]]
    for distance in (1, 2, 64, 127, 128, 129, 512):
        products = normed[:, :-distance] * normed[:, distance:]
        statistics.append(products.sum(1) / math.sqrt(8192 - distance))
        crossed = normed[:-8, :-distance] * normed[8:, distance:]  # with the next site
        statistics.append(crossed.sum(1) / math.sqrt(8192 - distance))
    for statistic in statistics:
        assert abs(statistic).max() < 5.5
        assert statistic.std() == pytest.approx(1, abs=6 / math.sqrt(statistic.size))


# Configuration


# What does not fit: heads of dimension 22 / 4, heads of 5, which cannot be rotated in pairs, key
# and value heads that cannot be shared equally, a head that would fill the memory.
MISFITS = [
    (dict(dim=22), "dim 22 is not a multiple of 2 * num_heads 4: try 24"),
    (dict(dim=20), "dim 20 is not a multiple of 2 * num_heads 4: try 16"),
    (dict(dim=2), "dim 2 is not a multiple of 2 * num_heads 4: try 8"),
    (dict(num_kv_heads=3), "num_kv_heads 3 does not divide num_heads 4: try 1"),
    (dict(num_kv_heads=8), "num_kv_heads 8 does not divide num_heads 4: try 4"),
    (dict(head_dim=10**8), "head_dim 100000000 is not an even number up to 65536"),
]


@pytest.mark.parametrize("values, message", MISFITS)
def test_numbers_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError) as caught:
        make_model(**values)
    assert str(caught.value) == message
