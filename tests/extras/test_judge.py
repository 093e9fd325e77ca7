"""The judge of comparisons: its scores beside main.py's own, and models that know too much."""

import math
import re
from argparse import Namespace

import anchors
import numpy as np
import pytest
from conftest import ROOT, TINY, copy_program, newest, run

import main
from datasets import load_dataset
from support.cli import RunError
from extras.versus import judge
from extras.versus.judge import Text, choose_spans

V = 31
WIDTH = 100


def side_of(checkpoint, folder=ROOT):
    """What Judge reads of a Side, for a run of the main.py in a folder."""
    config = checkpoint.config
    shape = {"vocab_size": config["vocab_size"], "context_size": config["context_size"]}
    return Namespace(name="mine", folder=folder, flags={"gpu": False}, **shape)


def whole(tokens):
    """A Text of which all is scored."""
    return Text(tokens, [(0, len(tokens) - 1)], 1)


# What is random in training alone is no leak, whichever mode `evaluate` ends in.
TWO_MODES = {
    anchors.QK_NORM: f"        self.dropout = nn.Dropout(0.1)\n{anchors.QK_NORM}",
    anchors.PROJECT_OUT: "return self.o_proj(self.dropout(joined))",
    anchors.BEGIN_EVALUATION: f"    model.train(False)\n{anchors.BEGIN_EVALUATION}",
    anchors.END_EVALUATION: f"    model.train()\n{anchors.END_EVALUATION}",
}
KINDS = [  # flags, and edits of main.py
    ("--tokenizer char --average 0.5 --untie", {}),
    ("--tokenizer word --qk_norm --num_kv_heads 1", {}),
    ("--tokenizer bpe --vocab_size 300 --mlp swiglu --dropout 0.1", {}),
    ("--init_from latest --lora_rank 2", {}),
    ("--init_from latest --context_size 5", {}),
    ("", TWO_MODES),
]


@pytest.mark.parametrize("kind, edits", KINDS)
def test_scores_are_those_of_main(kind, edits, base, text, tmp_path):
    """Of the whole text, and of a part of it, computed from all losses."""
    folder, _ = base
    line = ["--text", text, *kind.split(), "--save_dir", folder, "--learning_rate=0.03"]
    if "--init_from" not in kind:
        line += TINY
    program = copy_program(tmp_path / "copy", edits) if edits else ROOT / "main.py"
    run(*line, "--num_iters=12", "--eval_tokens=0", "--sample_tokens=4", program=[program])
    checkpoint = newest(folder)
    tokenizer = main.read_contents(checkpoint).tokenizer
    tokens = load_dataset("text", folder, [text], tokenizer=tokenizer).valid.tokens
    side = side_of(checkpoint, program.parent)
    count = len(tokens) - 1
    recorded = [checkpoint.evaluation]
    with judge.Judge(side, checkpoint.metadata_path, None) as referee:
        score, _, fault = referee.examine_run(whole(tokens), None, recorded)
        assert fault is None
        assert score == pytest.approx(checkpoint.evaluation.loss, abs=1e-5)
        halves = [referee.mean_loss(Text(tokens, [span], 1)) for span in ((0, 40), (40, count))]
        assert halves[0] != halves[1]
        assert (40 * halves[0] + (count - 40) * halves[1]) / count == pytest.approx(score)


def test_spans_are_evenly_spaced():
    expected = [(start, start + 20) for start in range(0, 901, 100)]
    assert choose_spans(920, 20, 200) == expected
    assert choose_spans(920, 20, 920) == choose_spans(920, 20, 0) == [(0, 920)]


# ---- Models that know too much ------------------------------------------------------------------


def causal(rows):
    """Logits [B, L, V] of a model that sums what it has read, each token by its position."""
    table = np.random.default_rng(0).standard_normal((V, V))
    return np.cumsum(table[rows], axis=1) / np.arange(1, rows.shape[1] + 1)[:, None]


def peeking_at(position, token):
    """The same, but a prediction depends on a later token."""

    def model(rows):
        logits = causal(rows)
        logits[:, position, 0] += 0.01 * rows[:, token]
        return logits

    return model


def averaging_rows(rows):
    return causal(rows) + 0.01 * causal(rows).mean(axis=0)


class Remembering:
    """Its predictions depend on how often it was asked."""

    asked = 0

    def __call__(self, rows):
        self.asked += 1
        return causal(rows) * (1 + 0.001 * self.asked)


def placed(rows):
    """Its predictions depend on the place in the batch."""
    return causal(rows) * (1 + 0.01 * np.arange(len(rows))[:, None, None])


def unmasked_in_batches(rows):
    """It forgets its mask where many rows come at once."""
    logits = causal(rows)
    if len(rows) > 8:
        logits += 0.01 * logits.mean(axis=1, keepdims=True)
    return logits


TOKENS = np.random.default_rng(1).integers(0, V - 1, 40 * WIDTH)  # the last id never occurs


class FakeJudge(judge.Judge):
    """Its side is a function of rows of tokens."""

    def __init__(self, model):
        self.side = Namespace(name="fake", context_size=WIDTH, vocab_size=V)
        self.tolerance = judge.TOLERANCE[False]
        self.model = model

    def logits(self, rows):
        return self.model(rows).astype(np.float32)

    def recorded(self):
        """What its run has scored at its end: the same."""
        count = 10 * WIDTH
        spans = judge.choose_spans(len(TOKENS) - 1, WIDTH, count)
        return [(1, self.mean_loss(Text(TOKENS, spans, 1)), count, 0.0)]


def hiding(model, value):
    """A model with an id that never occurs: its logit is very low."""

    def hidden(rows):
        logits = model(rows)
        logits[:, :, V - 1] = value
        return logits

    return hidden


def after_some_tokens(rows):
    """Only after every fourth id, it knows what comes."""
    logits = causal(rows)
    logits[:, :-1, 0] += np.where(rows[:, :-1] % 4 == 0, 0.1 * rows[:, 1:], 0)
    return logits


TOO_MUCH = [
    (peeking_at(3, 4), "it sees the future: the prediction at position 3 depends on tokens from 4"),
    (peeking_at(0, 63), "position 0 depends on tokens from"),
    (peeking_at(WIDTH - 2, WIDTH - 1), "position 98 depends on tokens from 99"),
    (hiding(peeking_at(3, 4), -np.inf), "position 3 depends on tokens from 4"),
    (unmasked_in_batches, "it sees the future"),
    (after_some_tokens, "it sees the future"),
    (averaging_rows, judge.DEPENDS_ON_OTHERS),
    (Remembering(), judge.DEPENDS_ON_OTHERS),
    (placed, judge.DEPENDS_ON_OTHERS),
]


@pytest.mark.parametrize("model, fault", TOO_MUCH)
def test_what_a_model_must_not_know(model, fault):
    """Each position is tried, also where there are fewer windows than positions."""
    for honest in (causal, hiding(causal, -1e9)):
        assert FakeJudge(honest).examine(whole(TOKENS))[1] is None
    assert fault in FakeJudge(model).examine(whole(TOKENS))[1]


def test_of_a_long_context_places_all_over_it_are_tried():
    """Where there are few windows, and one."""
    for num_windows, token in ((5, WIDTH - 8), (1, WIDTH - 30)):
        referee = FakeJudge(peeking_at(0, token))
        assert "the future" in referee.examine(whole(TOKENS[: num_windows * WIDTH]))[1]


@pytest.mark.parametrize("table, is_diverged", [
    (10 * np.random.default_rng(0).standard_normal((V, V)), True),
    (5 * np.eye(V), False),  # as main.py's models are at first: the token just read is likely
])  # fmt: skip
def test_a_loss_far_above_that_of_an_untrained_model(table, is_diverged):
    referee = FakeJudge(lambda rows: table[rows])
    _, score, fault = referee.examine_run(whole(TOKENS), None, referee.recorded())
    assert (fault == judge.DIVERGED) == is_diverged
    assert math.isnan(score), "there is no test text"


def test_a_test_text_with_what_is_never_predicted():
    """An infinite loss there is not passed over."""
    referee = FakeJudge(hiding(causal, -np.inf))
    valid = whole(TOKENS)
    recorded = referee.recorded()
    assert referee.examine_run(valid, valid, recorded)[2] is None
    test = whole(np.append(TOKENS, V - 1))
    *scores, fault = referee.examine_run(valid, test, recorded)
    assert math.isfinite(scores[0]) and math.isinf(scores[1])
    assert fault == judge.DIVERGED


def test_a_score_that_the_side_finds_otherwise():
    """Or not at all."""
    referee = FakeJudge(causal)
    [(_, loss, count, _)] = referee.recorded()
    for wrong in (0.999 * loss, math.inf, math.nan):
        *_, fault = referee.examine_run(whole(TOKENS), None, [(1, wrong, count, 0.0)])
        assert re.match(r"the run's own loss, \S+ for 1,000 tokens, is not the judge's", fault)
    *_, fault = referee.examine_run(whole(TOKENS), None, [])
    assert fault == "the run has not scored itself"


def test_a_side_that_fails_is_named(base):
    folder, _ = base
    checkpoint = newest(folder)
    with judge.Judge(side_of(checkpoint), folder / "none.metadata", None) as referee:
        with pytest.raises(RunError, match="mine cannot run: .*none.metadata"):
            referee.mean_loss(whole(np.arange(10)))
