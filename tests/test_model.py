"""The model against an independent forward pass in NumPy, its cache, its first weights and its dropout."""

import math

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import loss_of
from datasets import UsageError
from main import dropout, draw_noise
from mlx.utils import tree_flatten, tree_unflatten

HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}  # key and value heads for 4 query heads


def make_model(kv_heads=2, mlp="relu2", seed=0, **values):
    """A small model with every weight random, those of the norms too: no two of its parts are alike or do nothing."""
    shape = dict(vocab_size=31, context_size=12, num_blocks=2, dim=24, num_heads=4, mlp_dim=40)
    model = main.LanguageModel(main.Config(**shape | dict(num_kv_heads=kv_heads, mlp=mlp) | values))
    random = np.random.default_rng(seed)
    weights = []
    for name, weight in tree_flatten(model.parameters()):
        value = random.normal(size=weight.shape)
        value = 1 + 0.3 * value if weight.ndim == 1 else value if "embed" in name else value * weight.shape[1] ** -0.5
        weights.append((name, mx.array(value.astype(np.float32))))
    model.update(tree_unflatten(weights))
    return model


def random_tokens(model, rows=2, length=None, seed=1):
    size = (rows, length or model.config.context_size)
    return np.random.default_rng(seed).integers(model.config.vocab_size, size=size)


def logits_of(model, tokens, **options):
    return np.array(model(mx.array(tokens), **options))


def reference(model, tokens, drop=lambda hidden, site: hidden):
    """Logits [B, L, V] in float64, written from the papers and Hugging Face's Llama, one head at a time."""
    config = model.config
    weights = {name: np.array(weight, np.float64) for name, weight in tree_flatten(model.parameters())}
    B, L = tokens.shape
    d = config.dim // config.num_heads

    def norm(hidden, name):
        rms = np.sqrt((hidden**2).mean(-1, keepdims=True) + config.norm_eps)
        return hidden / rms * weights[name + ".weight"]

    def linear(hidden, name):
        return hidden @ weights[name + ".weight"].T

    def rotate(vectors):  # [B, L, d]: x cos + rotate_half(x) sin
        angles = np.arange(L)[:, None] * config.rope_theta ** -(np.arange(0, d, 2) / d)
        angles = np.concatenate([angles, angles], -1)
        half = np.concatenate([-vectors[..., d // 2 :], vectors[..., : d // 2]], -1)
        return vectors * np.cos(angles) + half * np.sin(angles)

    def attention(hidden, name):
        queries, keys, values = (linear(hidden, f"{name}.{letter}_proj") for letter in "qkv")
        attended = np.zeros((B, L, config.dim))
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            own, other = slice(head * d, head * d + d), slice(shared * d, shared * d + d)
            query, key = queries[..., own], keys[..., other]
            if config.qk_norm:
                query, key = norm(query, name + ".q_norm"), norm(key, name + ".k_norm")
            scores = rotate(query) @ rotate(key).swapaxes(1, 2) / math.sqrt(d)
            scores[:, np.arange(L)[:, None] < np.arange(L)] = -np.inf
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            attended[..., own] = shares / shares.sum(-1, keepdims=True) @ values[..., other]
        return linear(attended, name + ".o_proj")

    def mlp(hidden, name):
        up = linear(hidden, name + ".up_proj")
        if config.mlp == "swiglu":
            gate = linear(hidden, name + ".gate_proj")
            inner = gate / (1 + np.exp(-gate)) * up
        elif config.mlp == "gelu":
            inner = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        else:
            inner = np.maximum(up, 0) ** 2
        return linear(inner, name + ".down_proj")

    hidden = drop(weights["model.embed_tokens.weight"][tokens], 0)
    for i in range(config.num_blocks):
        block = f"model.layers.{i}"
        hidden = hidden + drop(attention(norm(hidden, block + ".input_layernorm"), block + ".self_attn"), 2 * i + 1)
        hidden = hidden + drop(mlp(norm(hidden, block + ".post_attention_layernorm"), block + ".mlp"), 2 * i + 2)
    return linear(norm(hidden, "model.norm"), "lm_head" if config.untie else "model.embed_tokens")


@pytest.mark.parametrize("mlp", ["relu2", "swiglu", "gelu"])
@pytest.mark.parametrize("heads", HEADS)
def test_logits_equal_an_independent_forward_pass(heads, mlp):
    model = make_model(HEADS[heads], mlp)
    tokens = random_tokens(model)
    np.testing.assert_allclose(logits_of(model, tokens), reference(model, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [dict(qk_norm=True), dict(untie=True), dict(qk_norm=True, untie=True, mlp="swiglu")])
@pytest.mark.parametrize("heads", HEADS)
def test_normalized_queries_and_an_own_output_layer(heads, options):
    model = make_model(HEADS[heads], **options)
    tokens = random_tokens(model)
    expected = reference(model, tokens)
    np.testing.assert_allclose(logits_of(model, tokens), expected, rtol=0, atol=1e-4)
    caches = [main.Cache(model.config, len(tokens)) for _ in model.model.layers]
    np.testing.assert_allclose(logits_of(model, tokens, caches=caches), expected, rtol=0, atol=1e-4)


def test_rope_base_and_norm_epsilon_come_from_the_configuration():
    model = make_model(rope_theta=50.0, norm_eps=0.1, num_blocks=1)
    tokens = random_tokens(model)
    np.testing.assert_allclose(logits_of(model, tokens), reference(model, tokens), rtol=0, atol=1e-4)


def test_parameters_are_named_and_shaped_as_in_hugging_face_llama():
    model = make_model(mlp="swiglu")  # vocabulary 31, dim 24, 4 heads of 6, 2 of them for keys and values, mlp_dim 40
    expected = {"model.embed_tokens.weight": (31, 24), "model.norm.weight": (24,)}  # tied: no lm_head.weight
    for block in ("model.layers.0.", "model.layers.1."):
        expected |= {
            block + "input_layernorm.weight": (24,),
            block + "self_attn.q_proj.weight": (24, 24),
            block + "self_attn.k_proj.weight": (12, 24),
            block + "self_attn.v_proj.weight": (12, 24),
            block + "self_attn.o_proj.weight": (24, 24),
            block + "post_attention_layernorm.weight": (24,),
            block + "mlp.gate_proj.weight": (40, 24),
            block + "mlp.up_proj.weight": (40, 24),
            block + "mlp.down_proj.weight": (24, 40),
        }
    assert {name: weight.shape for name, weight in tree_flatten(model.parameters())} == expected
    ungated = {name for name, _ in tree_flatten(make_model(mlp="relu2").parameters())}
    assert ungated == {name for name in expected if "gate_proj" not in name}


@pytest.mark.parametrize("heads", HEADS)
def test_no_position_sees_a_later_token(heads):
    model = make_model(HEADS[heads])
    tokens = random_tokens(model, rows=1)
    before = logits_of(model, tokens)[0]
    for position in range(tokens.shape[1]):
        changed = tokens.copy()
        changed[0, position] = (changed[0, position] + 1) % model.config.vocab_size
        after = logits_of(model, changed)[0]
        np.testing.assert_array_equal(after[:position], before[:position])
        assert (abs(after[position:] - before[position:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("parts", [[12], [1] * 12, [1, 11], [11, 1], [5, 1, 1, 3, 2]], ids=str)
def test_decoding_with_a_cache_equals_one_pass(heads, parts):
    model = make_model(HEADS[heads])
    tokens = random_tokens(model)
    caches = [main.Cache(model.config, len(tokens)) for _ in model.model.layers]
    decoded = []
    for piece in np.split(tokens, np.cumsum(parts)[:-1], axis=1):
        decoded.append(logits_of(model, piece, caches=caches))
    assert {cache.offset for cache in caches} == {12}, "all are read"
    decoded = np.concatenate(decoded, axis=1)
    np.testing.assert_allclose(decoded, logits_of(model, tokens), rtol=2e-6, atol=1e-5)


# First weights


def initial(seed, **values):
    """A model whose parameters were all NaN before init_weights, and its parameters as NumPy arrays."""
    model = make_model(**values)
    model.update(tree_unflatten([(n, mx.full(w.shape, math.nan)) for n, w in tree_flatten(model.parameters())]))
    main.init_weights(model, seed)
    return model, {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}


def test_init_weights_sets_every_parameter():
    _, weights = initial(3, vocab_size=500, dim=64, mlp_dim=256, mlp="swiglu")
    seen = set()
    for name, weight in weights.items():
        assert np.isfinite(weight).all(), name
        if "norm" in name:
            assert (weight == 1).all()
        elif "o_proj" in name or "down_proj" in name:  # a block begins as the identity
            assert (weight == 0).all()
        else:
            deviation = 5 / 64 if "embed" in name else 1 / math.sqrt(64)
            assert weight.std() == pytest.approx(deviation, rel=0.1), name
            assert abs(weight.mean()) < 0.1 * deviation
            seen.add(weight.ravel()[:100].tobytes())
    assert len(seen) == 1 + 2 * 5  # no two matrices begin alike


def test_init_weights_is_a_function_of_the_seed():
    (_, first), (_, same), (_, other) = initial(3), initial(3), initial(4)
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, same[name])
        constant = any(part in name for part in ("norm", "o_proj", "down_proj"))
        assert constant or (weight != other[name]).mean() > 0.99, name


@pytest.mark.parametrize("mlp", ["relu2", "swiglu", "gelu"])
def test_blocks_begin_as_the_identity_and_the_loss_near_equal_chances(mlp):
    model, weights = initial(5, vocab_size=5000, dim=128, mlp=mlp)
    tokens = random_tokens(model, rows=40)
    embedding = np.array(weights["model.embed_tokens.weight"], np.float64)
    hidden = embedding[tokens]
    hidden /= np.sqrt((hidden**2).mean(-1, keepdims=True) + model.config.norm_eps)
    np.testing.assert_allclose(np.array(model(mx.array(tokens))), hidden @ embedding.T, atol=1e-4)
    loss = loss_of(model, mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])).item() / tokens[:, 1:].size
    assert loss == pytest.approx(math.log(5000 + math.exp(5)), abs=0.15)


# Dropout

KEYS = mx.array(np.random.default_rng(2).integers(0, 2**32, (8, 2), np.uint32))


def noise(rate, rows=slice(8)):
    return mx.full(8, rate)[rows], KEYS[rows]


def drop(hidden, rate, site, rows=slice(8)):
    hidden = mx.array(hidden)
    return dropout(hidden, draw_noise(noise(rate, rows), hidden.shape, 5), site)


def test_dropout_masks_do_not_depend_on_how_the_batch_is_split():
    hidden = mx.array(np.random.default_rng(0).normal(size=(8, 12, 24)).astype(np.float32))
    for site in range(5):
        whole = drop(hidden, 0.4, site)
        for size in (1, 3, 4):
            parts = [drop(hidden[i : i + size], 0.4, site, slice(i, i + size)) for i in range(0, 8, size)]
            np.testing.assert_array_equal(np.array(mx.concatenate(parts)), np.array(whole))
    model = make_model()
    tokens = random_tokens(model, rows=8)
    halves = [logits_of(model, tokens[half], noise=noise(0.4, half)) for half in (slice(4), slice(4, 8))]
    # Matrix products of another size may round differently; one element dropped otherwise is visible by far.
    np.testing.assert_allclose(np.concatenate(halves), logits_of(model, tokens, noise=noise(0.4)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_has_the_right_share_and_expectation(rate):
    hidden = np.random.default_rng(0).uniform(1, 2, (8, 64, 512)).astype(np.float32)
    dropped = np.array(drop(hidden, rate, 1))
    error = 5 * math.sqrt(rate * (1 - rate) / hidden.size)  # five standard deviations
    assert (dropped == 0).mean() == pytest.approx(rate, abs=error)
    for row in dropped:
        assert (row == 0).mean() == pytest.approx(rate, abs=error * math.sqrt(8))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], hidden[kept] / (1 - rate), rtol=1e-6)
    assert dropped.mean() == pytest.approx(hidden.mean(), rel=2 * error / (1 - rate))


def test_dropout_differs_between_sites_and_rows():
    masks = np.stack([np.array(drop(mx.ones((8, 12, 24)), 0.5, site)) != 0 for site in range(5)])
    masks = masks.reshape(40, -1)
    agreement = (masks[:, None] == masks[None]).mean(-1)[~np.eye(40, dtype=bool)]
    assert abs(agreement - 0.5).max() < 0.15  # half of 288 places, five deviations


@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
def test_dropout_acts_on_embeddings_and_on_what_each_block_adds(mlp):
    model = make_model(mlp=mlp)
    tokens = random_tokens(model, rows=8)

    def drop_again(hidden, site):
        return hidden * np.array(drop(mx.ones(hidden.shape), 0.4, site), np.float64)

    np.testing.assert_allclose(logits_of(model, tokens, noise=noise(0.4)), reference(model, tokens, drop_again), rtol=0, atol=1e-4)


def test_masks_are_independent():
    """Within a row at any distance, between rows, and between sites: no more correlated than chance allows."""
    rate, L, D = 0.25, 64, 128
    masks = np.stack([np.array(drop(mx.ones((8, L, D)), rate, site)) == 0 for site in range(5)]).reshape(40, -1)
    normed = (masks - rate) / math.sqrt(rate * (1 - rate))
    between = (normed @ normed.T / math.sqrt(L * D))[~np.eye(40, dtype=bool)]  # standard normal, if independent
    within = np.array([(normed[:, :-d] * normed[:, d:]).sum(1) / math.sqrt(L * D - d) for d in (1, 2, 3, 64, D - 1, D, D + 1, 4 * D)])
    crossed = np.array([(normed[:-8, :-d] * normed[8:, d:]).sum(1) / math.sqrt(L * D - d) for d in (1, D)])  # the next site
    for statistic in (between, within, crossed, normed.reshape(40, L, D).sum((0, 1)) / math.sqrt(40 * L)):
        assert abs(statistic).max() < 5.5 and statistic.std() == pytest.approx(1, abs=6 / math.sqrt(statistic.size))


# Configuration


@pytest.mark.parametrize("values, named", [
    (dict(dim=22), ["--dim 22", "--num_heads 4", "--dim 24"]),  # no multiple of the heads
    (dict(dim=20), ["--dim 20", "--num_heads 4", "--dim 16"]),  # heads of 5 cannot be rotated in pairs
    (dict(dim=2), ["--dim 2", "--num_heads 4", "--dim 8"]),
    (dict(kv_heads=3), ["--num_kv_heads 3", "--num_heads 4"]),
    (dict(kv_heads=8), ["--num_kv_heads 8", "--num_heads 4"]),
])  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(values, named):
    with pytest.raises(UsageError) as caught:
        make_model(**values)
    for part in named:
        assert part in str(caught.value)
