"""The model against an independent forward pass in NumPy, its cache, first weights and dropout."""

import math
import re

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import arrays, make_model


def random_tokens(model, rows=2):
    size = (rows, model.config.context_size)
    return np.random.default_rng(1).integers(model.config.vocab_size, size=size)


def logits_of(model, tokens, **options):
    return np.array(model(mx.array(tokens), **options))


def assert_close(logits, expected):
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def drop_nothing(hidden, mask_index):
    return hidden


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
        mean_square = (hidden**2).mean(-1, keepdims=True)
        normed = hidden / np.sqrt(mean_square + config.norm_eps)
        return normed * weights[name + ".weight"]

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
            shares = np.exp(scores)
            shares /= shares.sum(-1, keepdims=True)
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
    """Of eight tokens at once, or with a cache in pieces of one token or several."""
    model = make_model(**values)
    tokens = random_tokens(model)
    expected = reference(model, tokens)
    assert_close(logits_of(model, tokens), expected)
    for cuts in ([], [1], [3, 4, 5]):
        caches = [main.KVCache() for _ in model.model.layers]
        pieces = np.split(tokens, cuts, axis=1)
        decoded = [logits_of(model, piece, caches=caches) for piece in pieces]
        assert_close(np.concatenate(decoded, axis=1), expected)


# First weights


def test_first_weights_by_hand():
    """By the seed and a parameter's name alone, so that a parameter more changes no other.

    Blocks begin as the identity. Random values are those of NumPy's generator. A vector or scalar
    of a layer's own, other than a bias, keeps its value.
    """
    config = make_model(untie=True, qk_norm=True, mlp="swiglu", qkv_bias=True).config
    model = main.LanguageModel(config)  # with MLX's own first weights
    model.gain = mx.array(0.5)
    main.init_weights(model, 3)
    for name, weight in arrays(model).items():
        drawn = np.random.default_rng([3, *map(ord, name)])
        drawn = drawn.standard_normal(weight.shape, np.float32)
        if "embed" in name:
            expected = drawn * 5 / 16
        elif re.search("(q|k|v|gate|up)_proj.weight", name):
            expected = drawn / math.sqrt(16)
        elif name == "gain":
            expected = 0.5
        else:
            expected = float("norm" in name)
        np.testing.assert_allclose(weight, expected, rtol=1e-6, err_msg=name)


# Dropout

KEYS = np.random.default_rng(2).integers(0, 2**32, (8, 2), np.uint32)


def make_masks(L, D, rate):
    """The DropoutMasks of a batch of eight rows."""
    return main.DropoutMasks(mx.array(rate), mx.array(KEYS), L, D)


def drop_ones(L, D, rate, mask_index):
    """What dropout leaves of ones [8, L, D]."""
    return np.array(main.dropout(mx.ones((8, L, D)), make_masks(L, D, rate), mask_index))


def test_dropout_acts_on_embeddings_and_on_what_each_block_adds():
    model = make_model(mlp="swiglu")
    tokens = random_tokens(model, rows=8)

    def drop_again(hidden, mask_index):
        return hidden * drop_ones(8, 16, 0.4, mask_index)

    expected = reference(model, tokens, drop_again)
    dropout_masks = make_masks(8, 16, 0.4)
    assert_close(logits_of(model, tokens, dropout_masks=dropout_masks), expected)


def test_masks_are_independent_and_keep_the_expectation():
    """Within a row, between rows, and between sites: each statistic is standard normal."""
    rate = 0.25
    masks = []
    for mask_index in range(5):
        dropped = drop_ones(64, 128, rate, mask_index)
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


# What does not fit: heads of dimension 2 / 4 or 20 / 4, key and value heads that cannot be shared
# equally, a head that would fill the memory.
MISFITS = [
    (dict(dim=2), "dim 2 is not a multiple of 2 * num_heads 4: try 8"),
    (dict(dim=20), "dim 20 is not a multiple of 2 * num_heads 4: try 16"),
    (dict(num_kv_heads=3), "num_kv_heads 3 does not divide num_heads 4: try 1"),
    (dict(num_kv_heads=8), "num_kv_heads 8 does not divide num_heads 4: try 4"),
    (dict(head_dim=10**8), "head_dim 100000000 is not an even number up to 65536"),
]


@pytest.mark.parametrize("values, message", MISFITS)
def test_numbers_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError) as caught:
        make_model(**values)
    assert str(caught.value) == message
