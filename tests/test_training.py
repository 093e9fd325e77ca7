"""The loop as a user sees it.

Exact resume, which run is resumed, what is inherited, reports, divergence.
"""

import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, flags, ids, run, start
from datasets import load_dataset
from mlx.utils import tree_flatten
from test_interrupts import wait_for

import main

DROPOUT = ["--dropout", "0.1"]


def records(folder):
    """The flags and counters of the checkpoints in a folder, the newest first."""
    return main.list_checkpoints(folder)


def newest_record(folder):
    return records(folder)[0]


def scored_iterations(record):
    return [iteration for iteration, _ in record["scores"]]


def interrupt(process):
    """Types Ctrl+C and waits until the program has left."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    return out, err


def start_code(code, *arguments):
    """Starts a Python program that imports main.py and changes something in it first."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


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
    text.write_text("".join(lines[:250]))
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    line = ["--text", text, *TINY, *options, "--num_iters", 600, "--steps_per_eval", 250]
    run(*line, "--save_dir", whole, env={"PYTHONHASHSEED": "1"})
    chance = random.Random(len(options))
    for leg in range(4):
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
    assert "resumed  with --num_iters 70 -> 120 (to start over instead: --new_model)" in out
    run(*line, "--save_dir", once, "--num_iters", 120)
    assert ids(legs)[0] == ids(once)[0]


def test_resume_needs_no_flags_but_the_dataset(tmp_path, text):
    line = ["--text", text, "--save_dir", tmp_path]
    run(*line, *TINY, "--num_iters", 20, "--learning_rate", 0.001)
    out, _ = run(*line, "--num_iters", 40)
    assert "from iteration 20 to 40" in out
    assert "dim 16" in out
    inherited = "the learning rate comes from the checkpoint: 0.001 * 40 / 200"
    assert re.search(r"40/40 .* lr 2\.00e-04", out), inherited
    out, _ = run(*line, "--num_iters", 40)
    advice = "raise --num_iters to continue, or start over with --new_model."
    assert f"Run complete (40/40): {advice}" in out
    assert "resumed  with unchanged flags" in out


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


def test_new_model_twice_takes_the_pair_over(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--num_iters", 10]
    out, _ = run(*line, "--new_model")
    first = re.search(r"run +(\S+),", out).group(1)
    before = ids(tmp_path)
    out, _ = run(*line, "--new_model")
    second = re.search(r"run +(\S+),", out).group(1)
    assert first != second
    assert ids(tmp_path) == before
    assert len(before) == 1
    out, _ = run(*line)
    assert second in out


def test_an_older_checkpoint_begins_a_branch(tmp_path, text):
    """What follows a checkpoint that its run has left behind is a run of its own.

    Nothing of the old one is deleted.
    """
    line = ["--text", text, *TINY, "--steps_per_save", 10, "--keep", 2, "--save_dir", tmp_path]
    run(*line, "--num_iters", 20)
    newer, older = ids(tmp_path)
    branching = ["--identifier", older, "--num_iters", 60, "--learning_rate", 0.01]
    out, _ = run(*line, *branching)
    assert "from iteration 10 to 60" in out
    told = r"A new branch: text-\w{6} has newer checkpoints, .* --identifier text-\w{6}"
    assert re.search(told, out)
    assert {older, newer} < set(ids(tmp_path))
    assert len(ids(tmp_path)) == 4
    runs = {record["run"] for record in records(tmp_path)}
    assert len(runs) == 2


def test_the_best_of_a_branch_stays_where_the_old_run_goes_on(tmp_path, text):
    schedule = ["--steps_per_eval", 2, "--lr_warmup", 0]
    line = ["--text", text, *TINY, *schedule, "--keep", 1, "--save_dir", tmp_path]
    run(*line, "--num_iters", 2)
    [shared] = records(tmp_path)
    run(*line, "--num_iters", 4, "--keep", 9)
    worsening = ["--num_iters", 4, "--learning_rate", 50]
    run(*line, "--identifier", shared["id"], *worsening)
    improving = ["--num_iters", 8, "--learning_rate", 0.01]
    run(*line, "--identifier", shared["run"], *improving)
    left = records(tmp_path)
    of_the_old_run = [record for record in left if record["run"] == shared["run"]]
    [branch] = [record for record in left if record["run"] != shared["run"]]
    assert branch["best"]["id"] == shared["id"]
    assert shared["id"] in {record["id"] for record in left}
    assert 4 not in {record["iteration"] for record in of_the_old_run}


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


KILLED_AT_ITS_SECOND_EVALUATION = """
import main
evaluate = main.evaluate
calls = []

def dying(*arguments):
    calls.append(1)
    if len(calls) == 2:
        main.os.kill(main.os.getpid(), 9)
    return evaluate(*arguments)

main.evaluate = dying
main.sys.exit(main.main())
"""


def test_evaluation_lines_and_late_score(tmp_path, text):
    """A checkpoint killed between save and evaluation is scored when it is resumed.

    With the same best.
    """
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    line = ["--text", text, *TINY, "--num_iters", 60, "--steps_per_eval", 20]
    out, _ = run(*line, "--save_dir", whole)
    scores = re.findall(r"^valid (\d+\.\d{4}) nats, perplexity .* bits per byte", out, re.M)
    assert len(scores) == 3

    record = newest_record(whole)
    assert scored_iterations(record) == [20, 40, 60]
    lowest = min(nats for _, nats in record["scores"])
    assert record["best"]["nats"] == lowest

    process = start_code(KILLED_AT_ITS_SECOND_EVALUATION, *line, "--save_dir", killed)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    out, _ = run(*line, "--save_dir", killed)
    assert re.findall(r"^valid (\d+\.\d{4}) nats", out, re.M) == scores[1:]
    again = newest_record(killed)
    assert again["scores"] == record["scores"]
    assert again["best"] == record["best"]
    assert again["id"] == record["id"]


WITH_ANOTHER_BLAS = """
import main
main.BLAS = 'another BLAS'
main.sys.exit(main.main())
"""


def test_another_machine_is_named(tmp_path, text):
    """Exactness holds with one device, BLAS and version; a resume that meets others says so."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path]
    out, _ = run(*line, "--num_iters", 5)
    assert "bit-exact" not in out
    process = start_code(WITH_ANOTHER_BLAS, *line, "--num_iters", 10)
    out, err = process.communicate(timeout=60)
    assert "-> another BLAS" in out, err
    assert "resume may not be bit-exact" in out, err
    assert "at iteration 10" in out, err


def test_eval_tokens(tmp_path, text):
    """0 scores the whole split, a number that many tokens from its start."""
    schedule = ["--num_iters", 5, "--steps_per_eval", 5]
    line = ["--text", text, *TINY, *schedule, "--save_dir", tmp_path, "--new_model"]
    valid = load_dataset("text", tmp_path, [text]).valid.tokens
    scored = {0: valid, 100: valid[:101]}
    for eval_tokens, tokens in scored.items():
        out, _ = run(*line, "--eval_tokens", eval_tokens)
        model, _ = main.load_model(tmp_path, newest_record(tmp_path))
        nats = main.evaluate(model, tokens, 3)
        assert f"valid {nats:.4f} nats" in out


def test_keep_and_best(tmp_path, text):
    schedule = ["--num_iters", 120, "--steps_per_eval", 10]
    line = ["--text", text, *TINY, *schedule, "--save_dir", tmp_path]
    overheating = ["--learning_rate", 0.05, "--lr_warmup", 60]  # so that the best is not the last
    run(*line, "--keep", 2, *overheating)
    newest, older = records(tmp_path)[:2]
    assert newest["iteration"] == 120
    assert older["iteration"] == 110
    kept = {record["id"] for record in records(tmp_path)}
    assert kept == {newest["id"], older["id"], newest["best"]["id"]}


def test_divergence_stops_before_anything_is_saved(tmp_path, text):
    schedule = ["--grad_clip", 0, "--lr_warmup", 0, "--steps_per_save", 1]
    line = ["--text", text, *TINY, "--save_dir", tmp_path, *schedule]
    run(*line, "--num_iters", 3)
    good = ids(tmp_path)[0]
    _, err = run(*line, "--num_iters", 1000, "--learning_rate", 1e30, status=1)
    assert "not finite" in err
    assert "--learning_rate" in err
    assert err.count("\n") == 1
    last_good = re.search(r"checkpoint is ([0-9a-f]{40})", err).group(1)
    assert main.find_damage(tmp_path, {"id": last_good}) is None
    newest = ids(tmp_path)[0]
    weights = mx.load(str(tmp_path / f"{newest}.safetensors"))
    for name, weight in weights.items():
        assert mx.isfinite(weight).all().item(), name
    assert good


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
    """The loss of the step before a save may be finite, and the weights it made be of no use."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--keep", keep]
    run(*line, "--num_iters", 3, "--steps_per_save", 1)
    schedule = ["--num_iters", 30, "--steps_per_eval", 1, "--eval_tokens", 200]
    _, err = run(*line, *schedule, *wrong, status=1)
    named = re.search(r"the last good checkpoint is ([0-9a-f]{40}): resume", err)[1]
    found = records(tmp_path)
    assert found[0]["diverged"]
    assert found[0]["id"] != named, "the newest is the one that made the loss infinite"
    cured = ["--learning_rate", 1e-4, "--weight_decay", 0]
    out, err = run(*line, "--num_iters", 40, *cured, "--max_tokens", 1)
    [place] = [record["iteration"] for record in found if record["id"] == named]
    assert f"from iteration {place} to 40" in out
    assert "next step from it is not finite" in err
    assert "at iteration 40" in out
    for record in records(tmp_path):
        assert "diverged" not in record, "it was pruned"


def test_a_run_that_was_never_good_says_so(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path]
    diverging = ["--learning_rate", 1e30, "--lr_warmup", 0, "--steps_per_eval", 1]
    _, err = run(*line, *diverging, status=1)
    assert "no good checkpoint is left: start over (--new_model)" in err
    _, err = run(*line, status=1)
    assert "--new_model" in err.splitlines()[-1]
    out, _ = run("--list", "--save_dir", tmp_path)
    assert out.rstrip().endswith("diverged")


def test_a_score_that_is_not_finite_ends_the_run(tmp_path, text, monkeypatch, capsys):
    line = ["--text", str(text), *TINY, "--save_dir", str(tmp_path), "--steps_per_eval", "2"]
    assert main.main([*line, "--num_iters", "2"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(main, "evaluate", lambda *_: float("nan"))
        assert main.main([*line, "--num_iters", "9"]) == 1
    assert "score of iteration 4 is not finite" in capsys.readouterr().err
    newest, older = records(tmp_path)
    assert newest["diverged"]
    assert newest["iteration"] == 4
    assert older["iteration"] == 2
    for _, nats in newest["scores"]:
        assert math.isfinite(nats)


REPORTED = [
    r"loss ([\d.]+)",
    r"perplexity [\d.,]+",
    r"lr \S+",
    r"grad [\d.]+",
    r"[\d,]+ tokens/s",
    r"peak [\d,]+ MiB",
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
save = main.save_checkpoint

def killed(folder, run, interrupts):
    id = save(folder, run, interrupts)
    if run.iteration == 6:
        main.os.kill(main.os.getpid(), 9)
    return id

main.save_checkpoint = killed
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
    assert scored_iterations(newest_record(whole)) == [2, 4, 6, 8]

    line_of_parts = [*line, "--save_dir", parts]
    run(*line_of_parts, "--num_iters", 4)
    process = start_code(KILLED_AFTER_ITERATION_6, *line_of_parts, "--num_iters", 100000)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    run(*line_of_parts)
    assert ids(parts)[0] == ids(whole)[0]
    assert newest_record(parts)["scores"] == newest_record(whole)["scores"]
    out, _ = run(*line_of_parts)  # once more: it has nothing to do
    assert "in 3 evaluations (--patience)" in out
    assert newest_record(parts)["iteration"] == 8
    run(*line_of_parts, "--patience", 4)
    assert newest_record(parts)["iteration"] == 10

    # An end off the schedule is scored, but no miss.
    run(*line, "--save_dir", odd, "--num_iters", 5)
    run(*line, "--save_dir", odd, "--num_iters", 20)
    assert scored_iterations(newest_record(odd)) == [2, 4, 5, 6, 8]


def test_patience_does_not_depend_on_where_a_leg_ended(tmp_path, text):
    """The best score is that at the first leg's end, 5.

    But a whole run has none there: its best is that at 6.
    """
    schedule = ["--steps_per_eval", 2, "--lr_warmup", 0, "--patience", 3]
    line = ["--text", text, *TINY, *schedule, "--save_dir", tmp_path]
    run(*line, "--learning_rate", 1e-3, "--num_iters", 5)
    run(*line, "--learning_rate", 0, "--num_iters", 20)  # from here on nothing changes
    iterations, scores = zip(*newest_record(tmp_path)["scores"])
    assert iterations == (2, 4, 5, 6, 8, 10, 12)
    assert scores[1] > scores[2] == scores[-1]


def test_another_number_of_streams_is_named(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--context_size", 64]
    run(*line, "--num_iters", 2, "--batch_size", 1)
    out, _ = run(*line, "--num_iters", 4, "--batch_size", 64)
    if os.cpu_count() > 1:
        assert re.search(r"Environment changed since the checkpoint \(streams 1 -> \d+\)", out)


def logged_scores(folder):
    """The iterations of the scores of the validation split in a folder's logs."""
    iterations = []
    for path in folder.glob("*.csv"):
        for row in path.read_text().split():
            if ",valid," in row:
                iterations.append(row.split(",")[0])
    return iterations


def test_max_minutes_ends_a_leg_and_changes_nothing(tmp_path, text):
    legs = tmp_path / "legs"
    whole = tmp_path / "whole"
    line = ["--text", text, *TINY, *DROPOUT, "--steps_per_eval", 100000]
    limited = ["--max_minutes", 0.005, "--eval_test", "--test_text", text]
    out, _ = run(*line, "--save_dir", legs, *limited)
    stopped = newest_record(legs)
    iteration = stopped["iteration"]
    assert 0 < iteration < 100000
    assert stopped["scores"] == []
    assert stopped["flags"]["num_iters"] == 100000
    assert f"--max_minutes 0.005 reached at iteration {iteration:,}." in out
    assert out.count("\nvalid ") == 1
    assert out.count("\ntest ") == 1
    assert logged_scores(legs) == [str(iteration)]

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
    rates = re.findall(r"lr (\S+)", out)
    assert rates == ["1.00e-02", "7.50e-03", "5.00e-03", "2.50e-03"]
    out, _ = run(*line, "--num_iters", 8)
    assert "The learning rate and dropout schedules now stretch" in out
    rates = re.findall(r"lr (\S+)", out)
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
    shape = ["--dim", 32, "--optimizer", "muon", "--dropout", 0.1]
    line = ["--text", text, *TINY, *shape]
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
        other = ["--dtype", "float32", "--num_iters", 8]
        out, _ = run(*line, *other, "--save_dir", tmp_path / "16")
        assert "dtype bfloat16 -> float32" in out


VARIANTS = [
    "--optimizer muon --dropout 0.1 --dropout_final 0.3 --qk_norm --untie --grad_accumulation 3",
    # several streams
    "--batch_size 16 --context_size 64 --lr_schedule cosine --checkpoint --num_kv_heads 1",
    "--average 0.3 --dropout 0.1 --grad_accumulation 2 --weight_decay 0.1 --embedding_decay 2"
    " --lr_schedule linear --lr_cooldown 0.5",
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
    weights_file, metadata_file = main.files_of(folder, newest_record(folder))
    raw = {}
    for name, array in main.load_arrays(metadata_file).items():
        if name.startswith("weights."):
            raw[name.removeprefix("weights.")] = array
    if not raw:
        raw = main.load_arrays(weights_file)
    return {name: np.array(array) for name, array in raw.items()}


def averaged_weights(folder, share):
    """The average of the weights of all of a run's checkpoints, oldest first."""

    def iteration(record):
        return record["iteration"]

    average = None
    for i, record in enumerate(sorted(records(folder), key=iteration)):
        weights_file, _ = main.files_of(folder, record)
        weights = main.load_arrays(weights_file)
        average = main.average_weights(average, weights, i, share)
    return average


def test_average_is_what_is_scored_saved_and_sampled(tmp_path, text):
    """Training is not touched by it: the weights before averaging are those of a run without it."""
    line = ["--text", text, *TINY, *AVERAGE, "--num_iters", 20]
    line = [*line, "--steps_per_save", 1, "--keep", 99]
    plain, _ = run(*line, "--save_dir", tmp_path / "plain")
    out, _ = run(*line, "--average", 0.25, "--save_dir", tmp_path / "average")

    average = averaged_weights(tmp_path / "plain", 0.25)
    newest = newest_record(tmp_path / "average")
    model, tokenizer = main.load_model(tmp_path / "average", newest)
    for name, weight in tree_flatten(model.parameters()):
        expected = np.array(average[name])
        np.testing.assert_allclose(np.array(weight), expected, rtol=0, atol=1e-6)

    raw = raw_weights(tmp_path / "average")
    expected = raw_weights(tmp_path / "plain")
    assert raw.keys() == expected.keys()
    for name in raw:
        np.testing.assert_array_equal(raw[name], expected[name])

    [_, nats] = newest["scores"][-1]
    score = f"valid {nats:.4f} nats"
    scored, _ = run("--evaluate", "valid", "--save_dir", tmp_path / "average")
    assert score in scored
    assert score in out
    assert score not in plain

    conversation = main.Conversation(tokenizer, model)
    sample = "".join(conversation.reply("", flags(max_tokens=8), 42))
    assert out.rstrip("\n").endswith(sample.rstrip("\n"))


def test_average_begins_and_ends_with_its_flag(tmp_path, text):
    """A run goes on with it or without it; without it, it is the run that never had one."""
    legs = tmp_path / "legs"
    plain = tmp_path / "plain"
    line = ["--text", text, *TINY, *AVERAGE]
    run(*line, "--num_iters", 30, "--save_dir", plain)
    run(*line, "--num_iters", 10, "--save_dir", legs)
    run(*line, "--num_iters", 20, "--average", 0.5, "--save_dir", legs)
    [averaged] = [record for record in records(legs) if record["iteration"] == 20]
    out, _ = run(*line, "--num_iters", 30, "--average", 0, "--save_dir", legs)
    assert "--average 0.5 -> 0" in out
    assert averaged["flags"]["average"] == 0.5
    assert ids(legs)[0] == ids(plain)[0]


def test_checkpoint_that_another_process_pruned_while_this_one_waited(
    tmp_path, text, monkeypatch, capsys
):
    line = ["--text", str(text), *TINY, "--save_dir", str(tmp_path)]
    assert main.main([*line, "--num_iters", "2"]) == 0
    lock_run = main.lock_run

    def late(folder, name):
        for path in folder.glob("*.safetensors"):
            path.unlink()
        return lock_run(folder, name)

    monkeypatch.setattr(main, "lock_run", late)
    assert main.main([*line, "--num_iters", "4"]) == 1
    err = capsys.readouterr().err
    assert "advanced while this process was starting; rerun the command\n" in err
