"""Many texts together, and a draft that proposes.

The oracle is main.py's Decoder, which continues one text: all else has to give the same tokens.
"""

import re

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import flags, run, run_folders
from test_sampling import Script, make_model, tokens_of

from extras.features import fast
from extras.features.decode import BatchDecoder, SpeculativeDecoder


@pytest.fixture(params=["step.c", "plain MLX"])
def way(request, monkeypatch):
    """Each test with it is about both ways to read texts, and to sample."""
    if request.param == "plain MLX":
        monkeypatch.setattr(fast, "quick_reader", lambda *arguments: None)


# ---- Many texts together ------------------------------------------------------------------------


# Logits are logarithms of 4, 1, 3, 2, 1/2. At temperature 1/2 these numbers are squared.
@pytest.mark.parametrize("rules, weights", [  # flags, and what each token is drawn in proportion to
    (dict(), [4, 1, 3, 2, 0.5]),
    (dict(temperature=0.5, top_k=3), [16, 0, 9, 4, 0]),
    (dict(top_p=0.8), [4, 0, 3, 2, 0]),
    (dict(min_p=0.3), [4, 0, 3, 2, 0]),
    (dict(repetition_penalty=2.0), [2, 1, 3, 2, 0.25]),  # of the first and the last
    (dict(temperature=0.5, top_k=4, top_p=0.9, min_p=0.5), [16, 0, 9, 0, 0]),
], ids=str)  # fmt: skip
def test_what_is_drawn_has_the_right_distribution(rules, weights):
    draws = 30_000
    logits = np.log([4, 1, 3, 2, 0.5])
    given = flags(**dict(temperature=1.0, top_k=0) | rules)
    texts = [[4, 0] for _ in range(draws)]
    decoder = BatchDecoder(Script(lambda token: logits), texts)
    [drawn] = decoder.generate(1, given, range(draws))
    assert [text[2] for text in texts] == drawn
    counts = np.bincount(drawn, minlength=5)
    weights = np.array(weights)
    expected = weights / weights.sum() * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    thresholds = {1: 10.83, 2: 13.82, 4: 18.47}  # by degrees of freedom: chances of 1 in 1,000
    assert chi_squared < thresholds[possible.sum() - 1]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("context_size", [1, 7, 16])
@pytest.mark.parametrize("rules", [
    dict(),
    dict(temperature=0.7, repetition_penalty=1.5, top_p=0.9),
])  # fmt: skip
def test_texts_together_are_continued_like_each_alone(context_size, rules):
    model = make_model(context_size)
    random = np.random.default_rng(1)
    prompts = [random.integers(31, size=length).tolist() for length in (1, 3, 3, 7, 16, 40)]
    texts = [list(prompt) for prompt in prompts]
    given = flags(**dict(temperature=0, top_k=0) | rules)
    together = list(BatchDecoder(model, texts).generate(40, given, range(6)))
    for row, prompt in enumerate(prompts):
        assert [ids[row] for ids in together] == tokens_of(model, prompt, 40, seed=row, **rules)


@pytest.mark.usefixtures("way")
def test_a_text_can_be_cut_and_go_on_otherwise():
    model = make_model(context_size=16)
    text = [1, 2, 3, 4, 5, 6]
    decoder = BatchDecoder(model, [text])
    for keep, more in ((6, []), (3, [7, 8]), (4, [9]), (1, []), (1, [4] * 20), (2, [3])):
        decoder.truncate(keep)
        text += more
        window = text
        if len(text) > 16:
            window = text[-8:]
        fresh = np.array(model(mx.array([window]))[:, -1:])
        np.testing.assert_allclose(np.array(decoder.next_token_logits()), fresh, rtol=0, atol=1e-4)


# ---- Drafts -------------------------------------------------------------------------------------


def speculated(model, draft, prompt, count, seed=0, **values):
    text = list(prompt)
    decoder = SpeculativeDecoder(model, draft, text)
    rules = flags(**dict(temperature=0, top_k=0) | values)
    given = list(decoder.generate(count, rules, seed))
    assert text == [*prompt, *given]
    return given, decoder


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("context_size, draft_context, prompt_length", [
    (1, 8, 1),
    (7, 4, 8),
    (8, 1, 8),
    (8, 16, 20),
    (64, 64, 1),
])  # fmt: skip
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_speculation_changes_no_token(context_size, draft_context, prompt_length, temperature):
    model = make_model(context_size)
    prompt = np.random.default_rng(2).integers(31, size=prompt_length).tolist()
    # The first draft has the model's weights, the second has others.
    for seed, penalty in ((0, 1.0), (1, 1.3)):
        rules = dict(repetition_penalty=penalty, temperature=temperature)
        draft = make_model(draft_context, seed=seed)
        tokens, decoder = speculated(model, draft, prompt, 24, **rules)
        assert tokens == tokens_of(model, prompt, 24, **rules)
        if context_size == draft_context == 64:
            is_right = decoder.num_accepted == decoder.num_proposed > 0
            assert is_right == (seed == 0), "always, if it is the model itself"


@pytest.mark.parametrize("kept", [1, 5, 15, 30])
def test_a_text_that_was_cut_goes_on_as_without_a_draft(kept):
    """As --stop cuts a reply, of a conversation that has outgrown the context."""
    model = make_model(context_size=16)
    rules = flags(temperature=1.0, top_k=0)
    texts = []
    for decode in (main.Decoder, lambda model, ids: SpeculativeDecoder(model, model, ids)):
        text = [1, 2, 3]
        decoder = decode(model, text)
        [*decoder.generate(30, rules, 0)]
        decoder.truncate(kept)
        text += [4, 5]
        [*decoder.generate(30, rules, 0)]
        texts.append(text)
    assert texts[0] == texts[1]


def test_draft(trained):
    model, draft = [folder.name for folder in run_folders(trained)]
    prompt = ["--prompt", "the company", "--temperature=0", "--max_tokens=40"]
    line = [*prompt, "--identifier", model, "--save_dir", trained]
    plain, _ = run(*line)
    out, err = run(*line, "--draft", draft)
    assert out == plain
    out, _ = run("--inference", *line[2:], "--draft", draft, input="the company\n")
    assert out.startswith(plain)
    assert re.search(r"[\d.]+ tokens/s, \d+% of the draft's \d+ proposals accepted", err)
