"""The loop as a user sees it: exact resume, scores, divergence, and the options of the loop."""

import math
import random
import re
import shlex

import pytest
from conftest import ROOT, arrays, assert_equal, ids, interrupt, log_rows, newest, run, run_folder
from conftest import saved, start, wait_for
from datasets import load_dataset

import main
from support import machine


# ---- Exact --------------------------------------------------------------------------------------

VARIANTS = [
    "--mlp swiglu --num_kv_heads 1 --tokenizer word --dropout 0.1 --steps_per_eval 40 "
    "--num_iters 100",
    "--optimizer muon --dropout 0.1 --dropout_final 0.3 --qk_norm --untie --grad_accumulation 3 "
    "--average 0.3 --weight_decay 0.1 --embedding_decay 2 --lr_schedule linear --lr_cooldown 0.5 "
    "--num_iters 60",
    "--batch_size 16 --context_size 64 --grad_checkpoint --dtype bfloat16 --num_iters 60",
]


@pytest.mark.parametrize("options", VARIANTS)
def test_interrupted_equals_undisturbed(line, text, tmp_path, options):
    """The contract: the same file name, wherever the run was stopped, and over epochs' ends.

    Each process hashes by a seed of its own.
    """
    text.write_text("".join(text.read_text().splitlines(True)[:100]))
    whole = tmp_path / "whole"
    line += options.split()
    run(*line, "--save_dir", whole, env={"PYTHONHASHSEED": "1"})
    process = start(*line, env={"PYTHONHASHSEED": "2"})
    for _ in range(random.Random(len(options)).randrange(1, 4)):
        wait_for(process, "  loss ")
    interrupt(process)
    run(*line)
    assert ids(tmp_path)[0] == ids(whole)[0]


ANOTHER_NUMPY = """
import main, numpy
draw = numpy.random.default_rng
numpy.random.default_rng = lambda seed: draw([9, *seed])
main.main()
"""


def test_a_resumed_run_keeps_its_order_of_batches(line, tmp_path):
    """Another NumPy, which would draw another order, reads it from the checkpoint."""
    whole = tmp_path / "whole"
    run(*line, "--num_iters", 20, "--save_dir", whole)
    run(*line, "--num_iters", 9)
    run(*line, "--num_iters", 20, program=["-c", ANOTHER_NUMPY], cwd=ROOT)
    assert ids(tmp_path)[0] == ids(whole)[0]


ONE_CORE = """
import os, sys
os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
import main
sys.exit(main.main())
"""


@pytest.mark.skipif(machine.available_cores() < 2, reason="there is but one core")
@pytest.mark.parametrize("is_begun_on_all", [True, False])
def test_a_run_ends_the_same_on_any_number_of_cores(is_begun_on_all, line, tmp_path):
    """On those that it began with, and a step is computed again there."""
    line += "--dim 64 --num_heads 4 --context_size 64 --batch_size 16 --steps_per_save 1".split()
    programs = [{}, {"program": ["-c", ONE_CORE], "cwd": ROOT}]
    first, second = programs if is_begun_on_all else programs[::-1]
    run(*line, "--num_iters", 6, "--save_dir", tmp_path / "whole", **first)
    run(*line, "--num_iters", 3, **first)
    out, _ = run(*line, "--num_iters", 6, **second)
    assert "Environment changed" not in out
    assert (" cores; on 1, it ends the same." in out) == is_begun_on_all
    assert ids(tmp_path)[0] == ids(tmp_path / "whole")[0]
    step = ["--identifier", f"{run_folder(tmp_path).name}@2", "--prompt", "a", "--max_tokens", 1]
    run(*step, "--save_dir", tmp_path, **second)


def test_another_length_says_where_schedules_end(line):
    line += ["--learning_rate", 0.01, "--lr_warmup", 0, "--steps_per_report", 1]
    line += ["--lr_schedule", "linear", "--min_lr", 0]
    run(*line, "--num_iters", 4)
    out, _ = run(*line, "--num_iters", 8)
    assert "Schedules of the learning rate and of dropout now end" in out
    assert re.findall(r"  lr (\S+)", out)[0] == "5.00e-03"


@pytest.mark.parametrize("env", [{}, {"DISABLE_FAST": "1"}])
def test_bfloat16_on_a_cpu(env, line, tmp_path):
    """Another result where the processor has units for it, else a line and that of float32."""
    # Large enough for products to be rounded.
    line += ["--dim", 64, "--batch_size", 16, "--context_size", 32, "--num_iters", 3]
    of_float32, _ = run(*line, "--save_dir", tmp_path / "float32", env=env)
    out, _ = run(*line, "--dtype", "bfloat16", env=env)
    is_float32 = ids(tmp_path) == ids(tmp_path / "float32")
    assert is_float32 == ("Computing in float32" in out or "products are in float32" in out)
    assert is_float32 or not env
    assert "Computing in float32" not in of_float32


# ---- Scores -------------------------------------------------------------------------------------

# A line of history: iteration, training loss, score, whether it is the best.
SCORED = (
    r"^iteration ([\d,]+): (?:train ([\d.]+), )?valid ([\d.]+) nats( \(best\))?, perplexity "
    r"[\d.]+ per token, [\d.]+ bits per byte; epoch [\d.]+, time [\d:]+, evaluated in [\d.]+ s$"
)


def scored_iterations(folder):
    return [score.iteration for score in newest(folder).evaluations]


def logged_scores(folder):
    """The iterations of the scores of the validation split in the log of a folder's only run."""
    return [row["iteration"] for row in log_rows(folder, "valid")]


def test_a_signal_in_an_evaluation_saves_without_the_score(line, tmp_path):
    """A run stopped there is scored when it is resumed, and has the same best."""
    whole = tmp_path / "whole"
    line += ["--valid_fraction", 0.3, "--eval_tokens", 0]  # which takes a while to score
    line += ["--num_iters", 30, "--steps_per_eval", 10]
    out, _ = run(*line, "--save_dir", whole)
    scores = re.findall(SCORED, out, re.M)
    assert [int(iteration) for iteration, *_ in scores] == [10, 20, 30]
    reported = [f"{row['loss']:.4f}" for row in log_rows(whole, "train")]
    assert [train for _, train, _, _ in scores] == reported, "of the report before"
    losses = [float(valid) for _, _, valid, _ in scores]
    is_best = [valid == min(losses[: i + 1]) for i, valid in enumerate(losses)]
    assert [mark == " (best)" for *_, mark in scores] == is_best

    process = start(*line)
    wait_for(process, "20/30 ")
    interrupt(process)
    assert newest(tmp_path).iteration == 20
    assert scored_iterations(tmp_path) == [10]
    out, _ = run(*line)
    late = re.findall(SCORED, out, re.M)
    assert [score[2:] for score in late] == [score[2:] for score in scores[1:]]
    assert newest(tmp_path).evaluations == newest(whole).evaluations
    assert newest(tmp_path).id == newest(whole).id
    assert logged_scores(tmp_path) == logged_scores(whole) == [10, 20, 30]


def test_a_score_is_shown_before_it_is_saved(line, tmp_path):
    """Evaluate, save once with the score, then sample."""
    out, _ = run(*line, "--num_iters", 20, "--steps_per_eval", 10, "--steps_per_save", 5)
    events = re.findall(r"^(iteration \d+|saved|sample)\b.*?(?: at iteration (\d+))?$", out, re.M)
    expected = "saved 5 sample iteration 10 saved 10 sample saved 15 sample iteration 20 saved 20"
    assert " ".join(" ".join(each).strip() for each in events) == f"{expected} sample"
    assert [checkpoint.evaluation is None for checkpoint in saved(tmp_path)][:2] == [False, True]


def test_scores_of_parts_of_the_text(line, text, tmp_path):
    """The training text as far as it is used, or a whole split.

    Of a part of the text, the number of bytes is not known.
    """
    run(*line, "--train_tokens", 500, "--num_iters", 3)
    model = main.read_contents(newest(tmp_path)).load_model()
    dataset = load_dataset("text", tmp_path, [text])
    scored = {"train": dataset.train.tokens[:500], "valid": dataset.valid.tokens}
    for split, tokens in scored.items():
        out, _ = run("--evaluate", split, "--save_dir", tmp_path)
        nats = main.evaluate(model, tokens, 3)["loss"]
        said = f"{split} {nats:.4f} nats, perplexity {math.exp(nats):.2f} per token, "
        assert out.startswith(said)
        assert ("bits per byte" in out) == (split == "valid")


# ---- Divergence ---------------------------------------------------------------------------------

BACK = r"a lower --learning_rate .* go back with (python main\.py --identifier ([0-9a-f]{12}) .*)"
HOT = ["--learning_rate", 1e30, "--lr_warmup", 0, "--identifier", "latest"]


def test_a_divergence_names_a_checkpoint_from_which_a_step_can_be_taken(line, tmp_path):
    """The loss of the step before a save may be finite, and the weights it made be of no use.

    The message names the one before; with other flags, the command in it goes on from there.
    """
    line += ["--keep", 1, "--steps_per_save", 1]
    run(*line, "--num_iters", 3)
    _, err = run(*line, "--num_iters", 30, *HOT, status=1)
    assert "not finite" in err and err.count("\n") == 1
    typed, prefix = re.search(BACK, err).groups()
    found = saved(tmp_path)
    assert not found[0].id.startswith(prefix), "the newest made the loss infinite"
    good = next(checkpoint for checkpoint in found if checkpoint.id.startswith(prefix))

    _, _, *arguments = shlex.split(typed)
    out, _ = run(*arguments, "--learning_rate", 1e-4, "--num_iters", 40)
    assert f"from iteration {good.iteration} to 40" in out
    assert "at iteration 40" in out


def test_a_score_that_is_not_finite_ends_the_run(line, tmp_path):
    line += ["--steps_per_eval", 1]
    run(*line, "--num_iters", 2)
    known = {*ids(tmp_path)}
    _, err = run(*line, "--num_iters", 9, *HOT, "--weight_decay", 1e9, status=1)
    assert "validation loss of iteration 3 is not finite" in err
    assert re.search(BACK, err).group(2) == newest(tmp_path).id[:12]
    assert {*ids(tmp_path)} == known, "what has no score is not saved"


# ---- Options of the loop ------------------------------------------------------------------------


def test_patience_counts_over_interrupts(line, tmp_path):
    """With a learning rate of 0 no score is better than the first."""
    whole = tmp_path / "whole"
    line += ["--steps_per_eval", 2, "--learning_rate", 0, "--patience", 3, "--sample_tokens", 0]
    out, _ = run(*line, "--save_dir", whole)
    assert "Stopped: no improvement in 3 evaluations (--patience)" in out
    assert out.endswith(" --patience 6\n"), "a command that goes on"
    assert scored_iterations(whole) == [2, 4, 6, 8]

    # An end off the schedule is scored, but no miss.
    for num_iters in (5, 100_000):
        run(*line, "--num_iters", num_iters)
    assert ids(tmp_path)[0] == ids(whole)[0]
    assert scored_iterations(tmp_path) == [2, 4, 5, 6, 8]
    out, _ = run(*line)  # once more: it has nothing to do
    assert "in 3 evaluations (--patience)" in out
    assert newest(tmp_path).iteration == 8


def test_max_minutes_ends_a_leg_and_changes_nothing(line, text, tmp_path):
    whole = tmp_path / "whole"
    line += ["--dropout", 0.1, "--steps_per_eval", 100000, "--eval_test", "--test_text", text]
    out, _ = run(*line, "--max_minutes", 0.005)
    stopped = newest(tmp_path)
    iteration = stopped.iteration
    assert 0 < iteration < 100000
    assert stopped.evaluations == []
    assert stopped.flags["num_iters"] == 100000
    assert f"--max_minutes 0.005 reached at iteration {iteration:,}." in out
    assert len(re.findall(SCORED, out, re.M)) == 1
    assert out.count("\ntest ") == 1
    assert logged_scores(tmp_path) == [iteration]

    end = iteration + 20
    out, _ = run(*line, "--num_iters", end)
    assert f"from iteration {iteration:,}" in out  # and the limit was that leg's own
    assert out.count("\ntest ") == 1
    assert logged_scores(tmp_path) == [end], "not what a run without a break would not have"
    run(*line, "--num_iters", end, "--save_dir", whole)
    assert ids(tmp_path)[0] == ids(whole)[0]


AVERAGE = ["--learning_rate", 0.01, "--lr_warmup", 5, "--steps_per_eval", 10, "--eval_tokens", 0]


def test_average_is_what_is_scored_saved_and_sampled(line, tmp_path):
    """Training is not touched by it: the weights before averaging are those of a run without it."""
    line += [*AVERAGE, "--num_iters", 20, "--steps_per_save", 1, "--keep", 99]
    plain, _ = run(*line, "--save_dir", tmp_path / "plain")
    out, _ = run(*line, "--average", 0.25)

    average = None
    for i, checkpoint in enumerate(reversed(saved(tmp_path / "plain"))):  # oldest first
        weights = main.read_contents(checkpoint).weights
        average = main.update_average(average, weights, i, 0.25)
    averaged = newest(tmp_path)
    contents = main.read_contents(averaged)
    assert_equal(arrays(contents.load_model()), average, rtol=0, atol=1e-6)
    raw = {name: contents.state[f"weights.{name}"] for name in weights}
    assert_equal(raw, weights, rtol=0, atol=0)

    score = f"valid {averaged.evaluation.loss:.4f} nats"
    scored, _ = run("--evaluate", "valid", "--save_dir", tmp_path)
    assert score in scored and score in out
    assert score not in plain
    sample, _ = run("--prompt", "", "--max_tokens", 8, "--save_dir", tmp_path)
    assert f"sample: {sample}" in out.rpartition("saved ")[2]


def test_average_begins_and_ends_with_its_flag(line, tmp_path):
    """A branch has it or does without it; without it, it is the run that never had one."""
    plain = tmp_path / "plain"
    line += AVERAGE
    run(*line, "--num_iters", 30, "--save_dir", plain)
    run(*line, "--num_iters", 10)
    line += ["--identifier", "latest"]
    run(*line, "--num_iters", 20, "--average", 0.5)
    assert newest(tmp_path).flags["average"] == 0.5
    out, _ = run(*line, "--num_iters", 30, "--average", 0)
    assert "--average 0.5 -> 0" in out
    assert ids(tmp_path)[0] == ids(plain)[0]
    # Those of the averaged weights are not the branch's.
    assert newest(tmp_path).evaluations == newest(plain).evaluations[1:]
