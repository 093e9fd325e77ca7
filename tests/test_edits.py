"""What a researcher edits, logits, loss, score, schedule: one place each, that holds everywhere."""

import math
import re
from operator import itemgetter

import anchors
import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, begin, copy_program, log_rows, newest, read_record, run
from datasets import load_dataset

LOGITS = anchors.LOGITS.strip()


@pytest.fixture
def line(text, tmp_path):
    schedule = "--num_iters 40 --learning_rate 0.03 --lr_warmup 0".split()
    return ["--text", text, *TINY, *schedule, "--save_dir", tmp_path / "lm"]


def edited(tmp_path, edits):
    return {"program": [copy_program(tmp_path / "copy", edits)]}


def score_without_fast(tmp_path, program):
    """The validation loss of the newest checkpoint."""
    slow = {"env": {"DISABLE_FAST": "1"}}
    out, _ = run("--evaluate", "valid", "--save_dir", tmp_path / "lm", **slow, **program)
    return float(re.match(r"valid (\S+) nats", out)[1])


@pytest.mark.parametrize("name, old, new", [
    ("LanguageModel", anchors.HEAD, anchors.HEAD.replace("False", "True")),
    ("LanguageModel", anchors.CALL, anchors.CALL.replace("\n", " / 2\n")),
])  # fmt: skip
def test_an_edited_output_layer_is_trained_and_scored(name, old, new, line, tmp_path):
    """Parts of the model are edited, not `logits` itself: fast.py does not know them either."""
    program = edited(tmp_path, {old: new})
    out, _ = run(*line, "--untie", "--eval_tokens", 0, **program)
    assert re.search(f"^edited .*{name}", out, re.M)
    checkpoint = newest(tmp_path / "lm")
    for part, weight in mx.load(str(checkpoint.weights_path)).items():
        if part.startswith("lm_head."):  # which begins as 0, also its bias
            assert mx.abs(weight).max().item() > 0.1
    nats = score_without_fast(tmp_path, program)
    assert nats == pytest.approx(checkpoint.evaluation.loss, abs=1e-4)


def test_a_mistake_in_an_edited_layer_is_no_damage(line, tmp_path):
    """It gets Python's traceback, wherever the layer is made."""
    run(*line, "--num_iters", 2)
    mistaken = anchors.DOWN_PROJECTION.replace("config.dim", "config.dims")
    program = edited(tmp_path, {anchors.DOWN_PROJECTION: mistaken})
    for words in (["--prompt", "the"], ["--identifier", "latest", "--num_iters", 3]):
        _, err = run(*words, "--save_dir", line[-1], status=1, **program)
        assert err.rstrip().endswith("AttributeError: 'Config' object has no attribute 'dims'")


def test_a_number_that_steps_remember_is_a_field_of_progress(line, tmp_path):
    """It is resumed; the code without it names it."""
    remembered = "    smoothed: float = 0.0\n"
    step = '    run.smoothed = 0.9 * run.smoothed + 0.1 * metrics["loss"]\n'
    program = edited(tmp_path, {
        anchors.RECENT_LOSS: anchors.RECENT_LOSS + remembered,
        anchors.COUNT_LOSS: anchors.COUNT_LOSS + step,
    })  # fmt: skip
    ends = []
    for legs in ([8], [3, 8]):
        folder = ["--save_dir", tmp_path / f"{len(legs)} legs"]
        for end in legs:
            run(*line[:-2], *folder, "--num_iters", end, "--steps_per_eval", 0, **program)
        records = map(read_record, folder[1].glob("*/*.metadata"))
        ends.append(max(records, key=itemgetter("iteration"))["counters"]["smoothed"])
        _, err = run(*folder, "--num_iters", 9, status=1)
        assert "the code that saved it had smoothed: use that" in err
    assert ends[0] == ends[1] > 0


@pytest.mark.parametrize("untie", ["--untie", "--no-untie"])
def test_a_softcap_holds_in_training_scores_and_samples(untie, line, text, tmp_path):
    """With logits from -1 to 1, no loss over 257 bytes can be lower than this."""
    program = edited(tmp_path, {LOGITS: "return mx.tanh(output_layer(hidden).astype(mx.float32))"})
    least = math.log(1 + 256 * math.exp(-2))
    out, _ = run(*line, untie, "--eval_tokens", 0, **program)
    assert re.search("^edited .*LanguageModel.*: computed by main.py, not by fast.py$", out, re.M)
    rows = log_rows(tmp_path / "lm")
    assert min(row["loss"] for row in rows) > least - 1e-5

    hot = "--prompt the --temperature 1 --top_k 0 --max_tokens 400".split()
    sample, _ = run(*hot, "--save_dir", tmp_path / "lm", **program)
    letters = set(text.read_text())
    known = sum(letter in letters for letter in sample)
    assert known < 0.7 * len(sample), "the likeliest bytes are e^2 times as likely as the others"
    nats = score_without_fast(tmp_path, program)
    assert nats == pytest.approx(rows[-1]["loss"], abs=1e-4)

    run(*line, untie, "--new_model")
    learned = newest(tmp_path / "lm").evaluation.loss
    assert learned < least, "which the plain program learns in these steps"


def test_what_does_not_know_other_logits_says_so(line, tmp_path):
    program = edited(tmp_path, {LOGITS: "return 2 * output_layer(hidden).astype(mx.float32)"})
    folder = program["program"][0].parent
    name, _, _ = begin(*line)
    _, err = run(*line, "--teacher", name, status=2, **program)
    line = "--teacher: distil.py in extras/ computes logits as main.py had them: undo the edit"
    assert err == f"main.py: {line} of LanguageModel\n"
    exported = [tmp_path / "hf", "--save_dir", tmp_path / "lm"]
    _, err = run(*exported, program=["-m", "extras.export"], cwd=folder)
    assert "Other programs know nothing of your edit of LanguageModel.\n" in err


def test_the_loss_is_what_trains_and_the_score_stays(line, tmp_path):
    """A loss of 0 moves no weight: the score is that of the first weights."""
    line += ["--weight_decay", 0]
    run(*line, **edited(tmp_path, {anchors.LOSS: "return 0 * (losses * scale).sum()"}))
    *steps, score = log_rows(tmp_path / "lm")
    assert [row["loss"] for row in steps] == [0, 0, 0, 0]
    begin(*line, "--learning_rate", 0)
    assert score["loss"] == pytest.approx(newest(tmp_path / "lm").evaluation.loss, rel=1e-5)


def test_another_metric_of_the_validation_text(line, text, tmp_path):
    """Is shown and logged: here, how often a letter above "g" is to be predicted."""
    metrics = anchors.METRICS.replace("}", ', "late": targets > ord("g")}')
    program = edited(tmp_path, {anchors.METRICS: metrics})
    out, _ = run(*line, "--eval_tokens", 0, **program)
    tokens = load_dataset("text", tmp_path / "data", [text], "byte").valid.tokens
    expected = np.mean(tokens[1:] > ord("g"))
    [score] = log_rows(tmp_path / "lm", "valid")
    assert score["late"] == pytest.approx(expected, abs=1e-5)
    assert f" bits per byte, late {expected:.4g}; " in out


DROPS = """def drops(iteration, flags):
    return 1 if iteration % 6 < 4 else 0.1


SCHEDULES = {"drops": drops, """


def test_a_schedule_comes_out_as_written(line, tmp_path):
    """With restarts and a tenfold drop; its ends on the start screen."""
    program = edited(tmp_path, {anchors.SCHEDULES: DROPS})
    given = "--lr_schedule drops --num_iters 9 --steps_per_report 1"
    out, _ = run(*line, *given.split(), **program)
    assert re.findall(r"  lr (\S+)", out) == 4 * ["3.00e-02"] + 2 * ["3.00e-03"] + 3 * ["3.00e-02"]
    assert "\nrate     drops: 0.03 (step 1), 0.03 (step 9)\n" in out


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_of_any_length_has_a_score(steps, line, tmp_path):
    """At its end, of no more tokens than it has read, unless all are asked for.

    They are windows that are evenly spread over all of the text.
    """
    dataset = load_dataset("text", tmp_path / "data", [line[1]], "byte")
    text = dataset.valid.tokens
    of_all = len(text) - 1
    last = of_all - 8
    spread = [i * last // (4 * steps - 1) for i in range(4 * steps)]
    for limit, starts in ((20, [0, last]), (1000, spread), (0, range(0, of_all, 8))):
        out, _ = run(*line, "--num_iters", steps, "--eval_tokens", limit, "--new_model")
        assert f"\niteration {steps}: " in out
        checkpoint = newest(tmp_path / "lm")
        model = main.read_contents(checkpoint).load_model()
        sizes = [min(8, of_all - start) for start in starts]
        nats = [main.evaluate(model, text[start : start + 9], 4)["loss"] for start in starts]
        expected = np.average(nats, weights=sizes)
        bits = pytest.approx(expected / math.log(2) * len(text) / dataset.valid.num_bytes)
        score = (steps, pytest.approx(expected, rel=1e-5), sum(sizes), bits, "evenly spread")
        assert checkpoint.evaluation == score


def test_the_tokens_of_scores_are_chosen_once(line, tmp_path):
    """When the run begins: scores of one run, and of its branches, can be compared."""
    more = ["--steps_per_eval", 2, "--num_iters"]
    run(*line, *more, 2)
    for change in (["--num_iters", 6], ["--num_iters", 7, "--steps_per_eval", 1]):
        run(*line, *more, 2, *change)
    first = newest(tmp_path / "lm")
    run(
        "--identifier", first.id, "--batch_size", 8, "--num_iters", 9, "--save_dir", tmp_path / "lm"
    )
    sizes = {each.num_tokens for each in first.evaluations + newest(tmp_path / "lm").evaluations}
    assert sizes == {2 * 4 * 8}
    run("--eval_tokens", 16, "--num_iters", 11, "--save_dir", tmp_path / "lm")
    assert newest(tmp_path / "lm").evaluation.num_tokens == 16, "it was asked for"
    run(*line, "--steps_per_eval", 0, "--num_iters", 2, "--seed", 1)
    run(*line, *more, 4, "--seed", 1)
    assert newest(tmp_path / "lm").evaluation.num_tokens == 2 * 4 * 8, "chosen when it can be"


@pytest.mark.parametrize("flags, iteration", [
    ("--max_minutes 0", 0),
    ("--max_minutes 1e-9 --steps_per_eval 0", 2),  # the first step is not timed
])  # fmt: skip
def test_no_score_where_the_time_is_up(flags, iteration, line):
    """Before the first step, or with an evaluation interval of 0, which means none."""
    out, _ = run(*line, *flags.split())
    assert f"reached at iteration {iteration}." in out
    assert "valid " not in out.split("\nfiles ")[1]


def test_the_step_that_compiles_has_no_time(line, tmp_path):
    out, _ = run(*line, "--num_iters", 3, "--steps_per_report", 1)
    first, *others = re.findall(r"^\d/3  .*", out, re.M)
    assert "ms/step" not in first and " left " not in first
    assert all("ms/step" in each and " left " in each for each in others)
    untimed, *timed = log_rows(tmp_path / "lm", "train")
    assert "ms_per_step" not in untimed
    milliseconds = sum(row["ms_per_step"] for row in timed)
    assert timed[-1]["seconds"] == pytest.approx(milliseconds / 1000, rel=1e-3)
