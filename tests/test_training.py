"""The loop as a user sees it.

Exact resume, evaluation, reports, divergence, and the options of the loop.
"""

import math
import random
import re
import shlex
import signal
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, SCORED, TINY, flags, ids, log_rows, newest, run, saved, start
from datasets import load_dataset
from mlx.utils import tree_flatten
from test_interrupts import wait_for

import main

DROPOUT = ["--dropout", "0.1"]


def scored_iterations(checkpoint):
    return [iteration for iteration, _ in checkpoint.scores]


def interrupt(process):
    """Types Ctrl+C and waits until the program has left."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    return out, err


INTERRUPTED = [
    [],
    DROPOUT,
    ["--mlp", "swiglu", "--num_kv_heads", "1", "--tokenizer", "word"],
]


@pytest.mark.parametrize("options", INTERRUPTED)
def test_interrupted_equals_undisturbed(tmp_path, text, options):
    """The contract: the same file name, whenever and however often the run was stopped.

    Across an epoch's end, too.
    """
    lines = text.read_text().splitlines(True)
    text.write_text("".join(lines[:100]))
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    line = ["--text", text, *TINY, *options, "--num_iters", 300, "--steps_per_eval", 150]
    run(*line, "--save_dir", whole, env={"PYTHONHASHSEED": "1"})
    chance = random.Random(len(options))
    for leg in range(2):
        process = start(*line, "--save_dir", parts, env={"PYTHONHASHSEED": str(leg)})
        for _ in range(chance.randrange(1, 7)):
            wait_for(process, "  loss ")
        time.sleep(chance.uniform(0, 0.01))
        interrupt(process)
    run(*line, "--save_dir", parts)
    assert ids(parts)[0] == ids(whole)[0]


def test_extended_equals_at_once(tmp_path, text):
    legs = tmp_path / "legs"
    once = tmp_path / "once"
    line = ["--text", text, *TINY, *DROPOUT]
    for num_iters in (5, 12, 20):
        run(*line, "--save_dir", legs, "--num_iters", num_iters)
    run(*line, "--save_dir", once, "--num_iters", 20)
    assert ids(legs)[0] == ids(once)[0]


def test_text_encoded_anew_under_a_running_process(tmp_path, text):
    """The tokens it trains on stay, though another process has replaced them by shorter ones."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path / "lm"]
    first = start(*line)
    wait_for(first, "20/100,000 ")
    text.write_text("short\n" * 50)
    run(*line, "--new_model", "--num_iters", 5)
    wait_for(first, "  loss ")
    wait_for(first, "  loss ")
    out, err = interrupt(first)
    assert "Stopped at iteration" in out, err


def test_a_signal_in_an_evaluation_saves_without_the_score(tmp_path, text):
    """A run stopped there is scored when it is resumed, and has the same best."""
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    line = ["--text", text, "--valid_fraction", 0.5, *TINY]  # which takes a while to score
    line += ["--num_iters", 30, "--steps_per_eval", 10, "--eval_tokens", 0]
    out, _ = run(*line, "--save_dir", whole)
    scores = re.findall(SCORED, out, re.M)
    assert [int(iteration) for iteration, *_ in scores] == [10, 20, 30]
    reported = [f"{row['loss']:.4f}" for row in log_rows(whole, "train")]
    assert [train for _, train, _, _ in scores] == reported, "of the report before"
    losses = [float(valid) for _, _, valid, _ in scores]
    is_best = [valid == min(losses[: i + 1]) for i, valid in enumerate(losses)]
    assert [mark == " (best)" for *_, mark in scores] == is_best

    process = start(*line, "--save_dir", parts)
    wait_for(process, "20/30 ")
    interrupt(process)
    assert newest(parts).iteration == 20
    assert scored_iterations(newest(parts)) == [10]
    out, _ = run(*line, "--save_dir", parts)
    late = re.findall(SCORED, out, re.M)
    assert [score[2:] for score in late] == [score[2:] for score in scores[1:]]
    assert newest(parts).scores == newest(whole).scores
    assert newest(parts).id == newest(whole).id
    assert logged_scores(parts) == logged_scores(whole) == [10, 20, 30]


def test_a_score_is_shown_before_it_is_saved(tmp_path, text):
    """Evaluate, save once with the score, then sample."""
    schedule = ["--num_iters", 20, "--steps_per_eval", 10, "--steps_per_save", 5]
    out, _ = run("--text", text, *TINY, *schedule, "--save_dir", tmp_path)
    events = re.findall(r"^(iteration \d+:|saved .* iteration \d+$)", out, re.M)
    events = [re.sub(" .* ", " ", event) for event in events]
    one_by_one = [
        "saved 5",
        "iteration 10:",
        "saved 10",
        "saved 15",
        "iteration 20:",
        "saved 20",
    ]
    assert events == one_by_one
    assert [checkpoint.score is None for checkpoint in saved(tmp_path)][:2] == [False, True]


def test_eval_tokens(tmp_path, text):
    """0 scores the whole split, a number that many tokens from its start."""
    schedule = ["--num_iters", 5, "--steps_per_eval", 5]
    line = ["--text", text, *TINY, *schedule, "--save_dir", tmp_path, "--new_model"]
    valid = load_dataset("text", tmp_path, [text]).valid.tokens
    scored = {0: valid, 100: valid[:101]}
    for eval_tokens, tokens in scored.items():
        out, _ = run(*line, "--eval_tokens", eval_tokens)
        model = newest(tmp_path).open().load_model()
        nats = main.evaluate(model, tokens, 3)
        assert f"valid {nats:.4f} nats" in out


def test_evaluate_train(tmp_path, text):
    """All that a run is trained on; of a part of the text, the number of bytes is not known."""
    line = ["--text", text, *TINY, "--num_iters", 3, "--save_dir", tmp_path, "--new_model"]
    tokens = load_dataset("text", tmp_path, [text]).train.tokens
    for given, count in (([], len(tokens)), (["--train_tokens", 500], 500)):
        run(*line, *given)
        out, _ = run("--evaluate", "train", "--save_dir", tmp_path)
        nats = main.evaluate(newest(tmp_path).open().load_model(), tokens[:count], 3)
        assert out.startswith(f"train {nats:.4f} nats, perplexity {math.exp(nats):.2f} per token, ")
        assert ("bits per byte" in out) == (not given)


BACK = r"a lower --learning_rate .* go back with (python main\.py --identifier ([0-9a-f]{12}) .*)"


def test_divergence_stops_before_anything_is_saved(tmp_path, text):
    schedule = ["--grad_clip", 0, "--lr_warmup", 0, "--steps_per_save", 1]
    line = ["--text", text, *TINY, "--save_dir", tmp_path, *schedule]
    run(*line, "--num_iters", 3)
    hot = ["--learning_rate", 1e30, "--identifier", "latest"]
    _, err = run(*line, "--num_iters", 1000, *hot, status=1)
    assert "not finite" in err
    assert err.count("\n") == 1
    for checkpoint in saved(tmp_path):
        for name, weight in mx.load(str(checkpoint.weights_path)).items():
            assert mx.isfinite(weight).all().item(), name
    assert re.search(BACK, err)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--learning_rate", 1e30, "--lr_warmup", 0],
        ["--weight_decay", 1e9],
    ],
)
def test_the_last_good_checkpoint_is_one_from_which_a_step_can_be_taken(tmp_path, text, wrong):
    """The loss of the step before a save may be finite, and the weights it made be of no use.

    The message names the one before; with other flags, the command in it goes on from there.
    """
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--keep", 1]
    run(*line, "--num_iters", 3, "--steps_per_save", 1)
    schedule = ["--num_iters", 30, "--steps_per_save", 1]
    _, err = run(*line, *schedule, *wrong, "--identifier", "latest", status=1)
    typed, prefix = re.search(BACK, err).groups()
    found = saved(tmp_path)
    assert not found[0].id.startswith(prefix), "the newest made the loss infinite"
    good = next(checkpoint for checkpoint in found if checkpoint.id.startswith(prefix))

    _, _, *arguments = shlex.split(typed)
    cured = ["--learning_rate", 1e-4, "--weight_decay", 0, "--max_tokens", 1]
    out, _ = run(*arguments, *cured, "--num_iters", 40)
    assert f"from iteration {good.iteration} to 40" in out
    assert "at iteration 40" in out


def test_a_score_that_is_not_finite_ends_the_run(tmp_path, text, monkeypatch, capsys):
    line = ["--text", str(text), *TINY, "--save_dir", str(tmp_path), "--steps_per_eval", "2"]
    assert main.main([*line, "--num_iters", "2"]) == 0
    good = newest(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(main, "evaluate", lambda *_, **options: float("nan"))
        assert main.main([*line, "--num_iters", "9"]) == 1
    err = capsys.readouterr().err
    assert "score of iteration 4 is not finite" in err
    assert re.search(BACK, err).group(2) == good.id[:12]
    assert ids(tmp_path) == [good.id], "what has no score is not saved"


REPORTED = [
    r"loss ([\d.]+)",
    r"grad [\d.]+",
    r"lr \S+",
    r"[\d,.]+ ms/step",
    r"[\d,]+ tokens/s",
    r"epoch [\d.]+",
    r"peak [\d,]+ MiB",
    r"time [\d:]+",
    r"left \S+",
]


def test_losses_go_down_and_reports_are_whole(tmp_path, text):
    schedule = ["--num_iters", 200, "--learning_rate", 0.01, "--lr_warmup", 20]
    out, _ = run("--text", text, *TINY, "--save_dir", tmp_path, *schedule)
    anything_more = "  (?:.*  )?"
    pattern = anything_more.join([r"^([\d,]+)/200", *REPORTED])
    reports = re.findall(pattern, out, re.M)
    iterations = [int(iteration) for iteration, _ in reports]
    assert iterations == list(range(10, 201, 10))
    first_loss = float(reports[0][1])
    last_loss = float(reports[-1][1])
    assert first_loss > 5 > 3 > last_loss


# Options of the loop


def test_patience_counts_over_interrupts(tmp_path, text):
    """With a learning rate of 0 no score is better than the first."""
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    odd = tmp_path / "odd"
    schedule = ["--steps_per_eval", 2, "--learning_rate", 0, "--eval_tokens", 100]
    line = ["--text", text, *TINY, *schedule, "--patience", 3]
    out, _ = run(*line, "--save_dir", whole)
    assert "Stopped: no improvement in 3 evaluations (--patience)" in out
    assert scored_iterations(newest(whole)) == [2, 4, 6, 8]

    run(*line, "--save_dir", parts, "--num_iters", 4)
    run(*line, "--save_dir", parts, "--num_iters", 100_000)
    assert ids(parts)[0] == ids(whole)[0]
    assert newest(parts).scores == newest(whole).scores
    out, _ = run(*line, "--save_dir", parts)  # once more: it has nothing to do
    assert "in 3 evaluations (--patience)" in out
    assert newest(parts).iteration == 8
    run(*line, "--save_dir", parts, "--patience", 4)
    assert newest(parts).iteration == 10

    # An end off the schedule is scored, but no miss.
    run(*line, "--save_dir", odd, "--num_iters", 5)
    run(*line, "--save_dir", odd, "--num_iters", 20)
    assert scored_iterations(newest(odd)) == [2, 4, 5, 6, 8]


def test_patience_does_not_depend_on_where_a_leg_ended(tmp_path, text):
    """The best score is that at the first leg's end, 5.

    But a whole run has none there: its best is that at 6.
    """
    schedule = ["--steps_per_eval", 2, "--lr_warmup", 0, "--patience", 3]
    line = ["--text", text, *TINY, *schedule, "--save_dir", tmp_path]
    run(*line, "--learning_rate", 1e-3, "--num_iters", 5)
    # From here on nothing changes.
    run(*line, "--identifier", "latest", "--learning_rate", 0, "--num_iters", 20)
    assert scored_iterations(newest(tmp_path)) == [2, 4, 5, 6, 8, 10, 12]
    scores = dict(newest(tmp_path).scores)
    assert scores[4] > scores[5]
    assert scores[5] == scores[12]


def logged_scores(folder):
    """The iterations of the scores of the validation split in the log of a folder's only run."""
    return [row["iteration"] for row in log_rows(folder, "valid")]


def test_max_minutes_ends_a_leg_and_changes_nothing(tmp_path, text):
    legs = tmp_path / "legs"
    whole = tmp_path / "whole"
    line = ["--text", text, *TINY, *DROPOUT, "--steps_per_eval", 100000]
    limited = ["--max_minutes", 0.005, "--eval_test", "--test_text", text]
    out, _ = run(*line, "--save_dir", legs, *limited)
    stopped = newest(legs)
    iteration = stopped.iteration
    assert 0 < iteration < 100000
    assert stopped.scores == []
    assert stopped.flags["num_iters"] == 100000
    assert f"--max_minutes 0.005 reached at iteration {iteration:,}." in out
    assert len(re.findall(SCORED, out, re.M)) == 1
    assert out.count("\ntest ") == 1
    assert logged_scores(legs) == [iteration]

    more = ["--num_iters", iteration + 20, "--test_text", text]
    out, _ = run(*line, "--save_dir", legs, *more)
    assert f"from iteration {iteration:,}" in out  # and the limit was that leg's own
    assert logged_scores(legs) == [], "what a run without a break would not have"
    run(*line, "--save_dir", whole, *more)
    assert ids(legs)[0] == ids(whole)[0]


def test_extending_a_schedule_says_that_it_stretches(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--lr_warmup", 0]
    line = [*line, "--steps_per_report", 1]
    schedule = ["--lr_schedule", "linear", "--min_lr", 0, "--learning_rate", 0.01]
    out, _ = run(*line, *schedule, "--num_iters", 4)
    rates = re.findall(r"  lr (\S+)", out)
    assert rates == ["1.00e-02", "7.50e-03", "5.00e-03", "2.50e-03"]
    out, _ = run(*line, *schedule, "--num_iters", 8)
    assert "The learning rate and dropout schedules now stretch" in out
    rates = re.findall(r"  lr (\S+)", out)
    assert rates[0] == "5.00e-03"


RUN_WITHOUT_ONEDNN = """
import runpy, sys
sys.prefix = "/nowhere"  # below which it would be
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[1] + "/main.py", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WITHOUT_ONEDNN = ("-c", RUN_WITHOUT_ONEDNN, str(ROOT))


def test_bfloat16_on_a_cpu(tmp_path, text):
    """Another result where the processor has units for it, else a line and that of float32.

    A resume compares.
    """
    # Large enough for products to be rounded.
    shape = ["--dim", 64, "--batch_size", 16, "--context_size", 32]
    line = ["--text", text, *TINY, *shape, "--optimizer", "muon", "--dropout", 0.1]
    bfloat16 = [*line, "--dtype", "bfloat16"]
    out, _ = run(*bfloat16, "--num_iters", 6, "--save_dir", tmp_path / "16")
    run(*line, "--num_iters", 6, "--save_dir", tmp_path / "32")
    is_float32 = ids(tmp_path / "16") == ids(tmp_path / "32")
    assert is_float32 == ("--dtype bfloat16 would be slower here" in out)
    for num_iters in (2, 4, 6):
        leg = ["--num_iters", num_iters, "--steps_per_save", 6]
        run(*bfloat16, *leg, "--save_dir", tmp_path / "parts")
    interrupted = ids(tmp_path / "parts")
    assert interrupted[0] == ids(tmp_path / "16")[0], "interrupted, and yet the same"

    outs = {}
    for dtype in ("bfloat16", "float32"):
        folder = tmp_path / f"no{dtype}"
        arguments = [*line, "--dtype", dtype, "--num_iters", 6, "--save_dir", folder]
        outs[dtype], _ = run(*arguments, program=WITHOUT_ONEDNN)
    assert "--dtype bfloat16 would be slower here" in outs["bfloat16"]
    assert "oneDNN" not in outs["float32"]
    assert ids(tmp_path / "nobfloat16") == ids(tmp_path / "nofloat32")

    if not is_float32:
        other = ["--identifier", "latest", "--dtype", "float32", "--num_iters", 8]
        out, _ = run(*line, *other, "--save_dir", tmp_path / "16")
        assert "dtype bfloat16 -> float32" in out


VARIANTS = [
    "--optimizer muon --dropout 0.1 --dropout_final 0.3 --qk_norm --untie --grad_accumulation 3",
    # several streams
    "--batch_size 16 --context_size 64 --lr_schedule cosine --grad_checkpoint --num_kv_heads 1",
    "--average 0.3 --dropout 0.1 --grad_accumulation 2 --weight_decay 0.1 --embedding_decay 2"
    " --lr_schedule linear --lr_cooldown 0.5",
    "--dropout 0.1 --optimizer muon --dtype bfloat16",
]


@pytest.mark.parametrize("options", VARIANTS)
def test_interrupted_variants_equal_undisturbed(tmp_path, text, options):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    schedule = ["--num_iters", 60, "--steps_per_eval", 20, "--steps_per_report", 1]
    line = ["--text", text, *TINY, *options.split(), *schedule]
    run(*line, "--save_dir", whole)
    for stop in (7, 30):
        process = start(*line, "--save_dir", parts)
        wait_for(process, f"{stop}/60 ")
        interrupt(process)
    run(*line, "--save_dir", parts)
    assert ids(parts)[0] == ids(whole)[0]


AVERAGE = ["--learning_rate", 0.01, "--lr_warmup", 5, "--steps_per_eval", 10, "--eval_tokens", 0]


def raw_weights(folder):
    """The weights of the newest checkpoint as they were trained.

    With --average those in the other file.
    """
    contents = newest(folder).open()
    raw = {}
    for name, array in contents.state.items():
        if name.startswith("weights."):
            raw[name.removeprefix("weights.")] = array
    raw = raw or contents.weights
    return {name: np.array(array) for name, array in raw.items()}


def averaged_weights(folder, share):
    """The average of the weights of all of a run's checkpoints, oldest first."""
    average = None
    oldest_first = reversed(saved(folder))
    for i, checkpoint in enumerate(oldest_first):
        weights = checkpoint.open().weights
        average = main.average_weights(average, weights, i, share)
    return average


def test_average_is_what_is_scored_saved_and_sampled(tmp_path, text):
    """Training is not touched by it: the weights before averaging are those of a run without it."""
    line = ["--text", text, *TINY, *AVERAGE, "--num_iters", 20]
    line = [*line, "--steps_per_save", 1, "--keep", 99]
    plain, _ = run(*line, "--save_dir", tmp_path / "plain")
    out, _ = run(*line, "--average", 0.25, "--save_dir", tmp_path / "average")

    average = averaged_weights(tmp_path / "plain", 0.25)
    averaged = newest(tmp_path / "average")
    contents = averaged.open()
    model = contents.load_model()
    for name, weight in tree_flatten(model.parameters()):
        expected = np.array(average[name])
        np.testing.assert_allclose(np.array(weight), expected, rtol=0, atol=1e-6)

    raw = raw_weights(tmp_path / "average")
    expected = raw_weights(tmp_path / "plain")
    assert raw.keys() == expected.keys()
    for name in raw:
        np.testing.assert_array_equal(raw[name], expected[name])

    score = f"valid {averaged.score:.4f} nats"
    scored, _ = run("--evaluate", "valid", "--save_dir", tmp_path / "average")
    assert score in scored
    assert score in out
    assert score not in plain

    conversation = main.Conversation(contents.tokenizer, model)
    sample = "".join(conversation.reply("", flags(max_tokens=8), 42))
    _, _, after = out.rpartition("saved ")
    assert sample in after


def test_average_begins_and_ends_with_its_flag(tmp_path, text):
    """A branch has it or does without it; without it, it is the run that never had one."""
    legs = tmp_path / "legs"
    plain = tmp_path / "plain"
    line = ["--text", text, *TINY, *AVERAGE]
    run(*line, "--num_iters", 30, "--save_dir", plain)
    run(*line, "--num_iters", 10, "--save_dir", legs)
    line += ["--identifier", "latest"]
    run(*line, "--num_iters", 20, "--average", 0.5, "--save_dir", legs)
    assert newest(legs).flags["average"] == 0.5
    out, _ = run(*line, "--num_iters", 30, "--average", 0, "--save_dir", legs)
    assert "--average 0.5 -> 0" in out
    assert ids(legs)[0] == ids(plain)[0]
