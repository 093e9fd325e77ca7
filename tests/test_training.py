"""The loop as a user sees it.

Exact resume, which run is resumed, what is inherited, reports, divergence.
"""

import random
import math
import re
import shlex
import signal
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, SCORED, TINY, flags, ids, log_rows, newest, run, run_folders, start
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


def start_code(code, *arguments):
    """Starts a Python program that imports main.py and changes something in it first."""
    return start(*arguments, program=["-c", code], cwd=ROOT)


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
    text.write_text("".join(lines[:150]))
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    line = ["--text", text, *TINY, *options, "--num_iters", 400, "--steps_per_eval", 150]
    run(*line, "--save_dir", whole, env={"PYTHONHASHSEED": "1"})
    chance = random.Random(len(options))
    for leg in range(3):
        process = start(*line, "--save_dir", parts, env={"PYTHONHASHSEED": str(leg)})
        for _ in range(chance.randrange(1, 9)):
            wait_for(process, "  loss ")
        time.sleep(chance.uniform(0, 0.01))
        interrupt(process)
    run(*line, "--save_dir", parts)
    assert ids(parts)[0] == ids(whole)[0]


def test_extended_equals_at_once(tmp_path, text):
    legs = tmp_path / "legs"
    once = tmp_path / "once"
    line = ["--text", text, *TINY, *DROPOUT]
    for num_iters in (30, 70, 120):
        out, _ = run(*line, "--save_dir", legs, "--num_iters", num_iters)
    assert "resumed  with --num_iters 70 -> 120\n" in out
    run(*line, "--save_dir", once, "--num_iters", 120)
    assert ids(legs)[0] == ids(once)[0]


def test_resuming_the_run_saved_last_needs_no_flags(tmp_path, text):
    line = ["--save_dir", tmp_path]
    run(*line, "--text", text, *TINY, "--num_iters", 20, "--learning_rate", 0.001)
    out, _ = run(*line, "--num_iters", 40)
    assert "from iteration 20 to 40" in out
    assert "dim 16" in out
    inherited = "the learning rate comes from the checkpoint: 0.001 * 40 / 200"
    assert re.search(r"40/40 .* lr 2\.00e-04", out), inherited
    out, _ = run(*line, "--num_iters", 40)
    assert "Run complete (40/40). " in out
    assert "resumed  with unchanged flags\n" in out


BEGINNING = r"run +(\S+), from iteration (\d+)"


def test_each_line_continues_its_own_run(tmp_path, text):
    """Lines that differ in shape, in seed and in text take turns in one folder."""
    other_text = tmp_path / "other.txt"
    other_text.write_text(text.read_text()[::-1])
    lines = [
        ["--text", text, *TINY, "--mlp", "relu2"],
        ["--text", text, *TINY, "--mlp", "gelu", "--seed", 42],
        ["--text", text, *TINY, "--mlp", "gelu", "--seed", 7],
        ["--text", other_text, *TINY],
    ]
    begun = []
    for line in lines:
        out, _ = run(*line, "--save_dir", tmp_path, "--num_iters", 10)
        name, iteration = re.search(BEGINNING, out).groups()
        assert iteration == "0"
        begun.append(name)
    for line, begun_name in zip(lines, begun):
        out, _ = run(*line, "--save_dir", tmp_path, "--num_iters", 20)
        name, iteration = re.search(BEGINNING, out).groups()
        assert name == begun_name
        assert iteration == "10"
    assert len(set(begun)) == 4


def test_new_model_twice_makes_two_runs(tmp_path, text):
    """With equal weights, and each with both files of its own."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--num_iters", 10]
    out, _ = run(*line, "--new_model")
    first = re.search(BEGINNING, out).group(1)
    out, _ = run(*line, "--new_model")
    second = re.search(BEGINNING, out).group(1)
    assert first != second
    names = sorted(folder.name for folder in run_folders(tmp_path))
    assert names == sorted([first, second])
    one, other = ids(tmp_path)
    assert one == other
    out, _ = run(*line)
    assert re.search(BEGINNING, out).groups() == (second, "10")


def test_the_best_of_a_branch_stays_where_the_old_run_goes_on(tmp_path, text):
    schedule = ["--steps_per_eval", 2, "--lr_warmup", 0]
    line = ["--text", text, *TINY, *schedule, "--keep", 1, "--save_dir", tmp_path]
    run(*line, "--num_iters", 2)
    [shared] = main.list_checkpoints(tmp_path)
    run(*line, "--num_iters", 4, "--keep", 9)
    worsening = ["--num_iters", 4, "--learning_rate", 50]
    out, _ = run(*line, "--identifier", shared.id, *worsening)
    branch = re.search(BEGINNING, out).group(1)
    improving = ["--num_iters", 8, "--learning_rate", 0.01]
    run(*line, "--identifier", shared.run, *improving)
    left = main.list_checkpoints(tmp_path)
    assert main.best_of(left, branch).id == shared.id
    of_the_old_run = [each.iteration for each in left if each.run == shared.run]
    assert of_the_old_run == [8]


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


def test_changed_text_is_refused(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path / "lm"]
    run(*line, "--num_iters", 10)
    text.write_text(text.read_text().replace("quick", "slow!"))
    _, err = run(*line, "--num_iters", 20, status=2)
    assert "has changed" in err
    assert "--new_model" in err


AT_ITS_SECOND_EVALUATION = """
import time
import main
evaluate = main.evaluate
calls = []

def disturbed(*arguments, **options):
    calls.append(1)
    if len(calls) == 2:
        main.os.kill(main.os.getpid(), main.signal.SIGNAL)
        time.sleep(0.3)
    return evaluate(*arguments, **options)

main.evaluate = disturbed
main.sys.exit(main.main())
"""


@pytest.mark.parametrize("name, iteration", [("SIGINT", 40), ("SIGKILL", 20)])
def test_evaluation_lines_and_late_score(tmp_path, text, name, iteration):
    """A run stopped in an evaluation is scored when it is resumed, with the same best.

    A signal lets it save what it has, without a score.
    """
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    line = ["--text", text, *TINY, "--num_iters", 60, "--steps_per_eval", 20]
    out, _ = run(*line, "--save_dir", whole)
    scores = re.findall(SCORED, out, re.M)
    assert [int(iteration) for iteration, *_ in scores] == [20, 40, 60]
    reported = [f"{row['loss']:.4f}" for row in log_rows(whole, "train")]
    assert [train for _, train, _, _ in scores] == reported[1::2], "of the report before"
    losses = [float(valid) for _, _, valid, _ in scores]
    is_best = [valid == min(losses[: i + 1]) for i, valid in enumerate(losses)]
    assert [mark == " (best)" for *_, mark in scores] == is_best
    undisturbed = newest(whole)
    assert scored_iterations(undisturbed) == [20, 40, 60]

    code = AT_ITS_SECOND_EVALUATION.replace("SIGNAL", name)
    process = start_code(code, *line, "--save_dir", parts)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGKILL), err
    stopped = newest(parts)
    assert stopped.iteration == iteration
    assert scored_iterations(stopped) == [20]
    out, _ = run(*line, "--save_dir", parts)
    late = re.findall(SCORED, out, re.M)
    assert [score[2:] for score in late] == [score[2:] for score in scores[1:]]
    again = newest(parts)
    assert again.scores == undisturbed.scores
    assert again.id == undisturbed.id
    best = main.best_of(main.list_checkpoints(parts), again.run)
    expected = main.best_of(main.list_checkpoints(whole), undisturbed.run)
    assert best.id == expected.id
    assert logged_scores(parts) == logged_scores(whole) == [20, 40, 60]


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
    newest_two = [checkpoint.score for checkpoint in main.list_checkpoints(tmp_path)][:2]
    assert newest_two[0] is not None
    assert newest_two[1] is None


WITH_ANOTHER_BLAS = """
import main
list_versions = main.list_versions

def list_other_versions(*arguments):
    return list_versions(*arguments) | {"BLAS": "another BLAS"}

main.list_versions = list_other_versions
main.sys.exit(main.main())
"""


def test_another_machine_is_named(tmp_path, text):
    """Exactness holds with one device, BLAS and version; a resume that meets others says so."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path]
    out, _ = run(*line, "--num_iters", 5)
    assert "bit-exact" not in out
    process = start_code(WITH_ANOTHER_BLAS, *line, "--num_iters", 10)
    out, err = process.communicate(timeout=60)
    told = r"Environment changed since the checkpoint \(BLAS .* -> another BLAS\): "
    assert re.search(told + "resume may not be bit-exact", out), err
    assert "at iteration 10" in out, err


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


def test_keep_and_best(tmp_path, text):
    """The best is in the first half: then the learning rate becomes far too high."""
    line = ["--text", text, *TINY, "--steps_per_eval", 10, "--save_dir", tmp_path, "--keep", 2]
    run(*line, "--num_iters", 60, "--learning_rate", 0.01, "--lr_warmup", 20)
    overheating = ["--identifier", "latest", "--learning_rate", 1]
    run(*line, "--num_iters", 120, *overheating)
    left = main.list_checkpoints(tmp_path)
    assert [checkpoint.iteration for checkpoint in left[:2]] == [120, 110]
    best = main.best_of(left, left[0].run)
    assert best.iteration <= 60
    assert left[2:] == [best]


BACK = r"a lower --learning_rate .* go back with (python main\.py --identifier ([0-9a-f]{12}) .*)"


def test_divergence_stops_before_anything_is_saved(tmp_path, text):
    schedule = ["--grad_clip", 0, "--lr_warmup", 0, "--steps_per_save", 1]
    line = ["--text", text, *TINY, "--save_dir", tmp_path, *schedule]
    run(*line, "--num_iters", 3)
    hot = ["--learning_rate", 1e30, "--identifier", "latest"]
    _, err = run(*line, "--num_iters", 1000, *hot, status=1)
    assert "not finite" in err
    assert err.count("\n") == 1
    for checkpoint in main.list_checkpoints(tmp_path):
        contents = checkpoint.open()
        for name, weight in contents.weights.items():
            assert mx.isfinite(weight).all().item(), name
    assert re.search(BACK, err)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--learning_rate", 1e30, "--lr_warmup", 0],
        ["--weight_decay", 1e9],
    ],
)
@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_good_checkpoint_is_one_from_which_a_step_can_be_taken(
    tmp_path, text, wrong, keep
):
    """The loss of the step before a save may be finite, and the weights it made be of no use.

    The message names the one before; with other flags, the command in it goes on from there.
    """
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--keep", keep]
    run(*line, "--num_iters", 3, "--steps_per_save", 1)
    schedule = ["--num_iters", 30, "--steps_per_save", 1]
    _, err = run(*line, *schedule, *wrong, "--identifier", "latest", status=1)
    typed, prefix = re.search(BACK, err).groups()
    found = main.list_checkpoints(tmp_path)
    assert not found[0].id.startswith(prefix), "the newest made the loss infinite"
    [good] = [checkpoint for checkpoint in found if checkpoint.id.startswith(prefix)]

    _, _, *arguments = shlex.split(typed)
    cured = ["--learning_rate", 1e-4, "--weight_decay", 0, "--max_tokens", 1]
    out, _ = run(*arguments, *cured, "--num_iters", 40)
    assert f"from iteration {good.iteration} to 40" in out
    assert "at iteration 40" in out


def test_a_score_that_is_not_finite_ends_the_run(tmp_path, text, monkeypatch, capsys):
    line = ["--text", str(text), *TINY, "--save_dir", str(tmp_path), "--steps_per_eval", "2"]
    assert main.main([*line, "--num_iters", "2"]) == 0
    [good] = main.list_checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(main, "evaluate", lambda *_, **options: float("nan"))
        assert main.main([*line, "--num_iters", "9"]) == 1
    err = capsys.readouterr().err
    assert "score of iteration 4 is not finite" in err
    assert re.search(BACK, err).group(2) == good.id[:12]
    [left] = main.list_checkpoints(tmp_path)
    assert left.id == good.id, "what has no score is not saved"


REPORTED = [
    r"loss ([\d.]+)",
    r"[\d,.]+ ms/step",
    r"lr \S+",
    r"grad [\d.]+",
    r"[\d,]+ tokens/s",
    r"perplexity [\d.,]+",
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


KILLED_AFTER_ITERATION_6 = """
import main
save = main.save

def killed(run, interrupts):
    save(run, interrupts)
    if run.iteration == 6:
        main.os.kill(main.os.getpid(), 9)

main.save = killed
main.sys.exit(main.main())
"""


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

    line_of_parts = [*line, "--save_dir", parts]
    run(*line_of_parts, "--num_iters", 4)
    process = start_code(KILLED_AFTER_ITERATION_6, *line_of_parts, "--num_iters", 100000)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    run(*line_of_parts)
    assert ids(parts)[0] == ids(whole)[0]
    assert newest(parts).scores == newest(whole).scores
    out, _ = run(*line_of_parts)  # once more: it has nothing to do
    assert "in 3 evaluations (--patience)" in out
    assert newest(parts).iteration == 8
    run(*line_of_parts, "--patience", 4)
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


def test_another_number_of_streams_is_named(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--context_size", 64]
    run(*line, "--num_iters", 2, "--batch_size", 1)
    larger = ["--identifier", "latest", "--batch_size", 64]
    out, _ = run(*line, "--num_iters", 4, *larger)
    if main.fast.count_cores() > 1:
        assert re.search(r"Environment changed since the checkpoint \(streams 1 -> \d+\)", out)


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
    oldest_first = reversed(main.list_checkpoints(folder))
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
    """A run goes on with it or without it; without it, it is the run that never had one."""
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


