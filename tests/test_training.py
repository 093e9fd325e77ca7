"""The loop as a user sees it: exact resume, which run is resumed, what is inherited, reports, divergence."""

import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, ids, run, start
from test_interrupts import wait_for

import main

DROPOUT = ["--dropout", "0.1"]


@pytest.mark.parametrize("options", [[], DROPOUT, ["--mlp", "swiglu", "--num_kv_heads", "1", "--tokenizer", "word"]])
def test_interrupted_equals_undisturbed(tmp_path, text, options):
    """The contract: the same file name, whenever and however often the run was stopped; across an epoch's end."""
    text.write_text("".join(text.read_text().splitlines(True)[:250]))
    line = ["--text", text, *TINY, *options, "--num_iters", 600, "--steps_per_eval", 250]
    run(*line, "--save_dir", tmp_path / "whole", env={"PYTHONHASHSEED": "1"})
    chance = random.Random(len(options))
    for leg in range(4):
        process = start(*line, "--save_dir", tmp_path / "parts", env={"PYTHONHASHSEED": str(leg)})
        for _ in range(chance.randrange(1, 9)):
            wait_for(process, "  loss ")
        time.sleep(chance.uniform(0, 0.01))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130, err
    run(*line, "--save_dir", tmp_path / "parts")
    assert ids(tmp_path / "parts")[0] == ids(tmp_path / "whole")[0]


def test_extended_equals_at_once(tmp_path, text):
    line = ["--text", text, *TINY, *DROPOUT]
    for num_iters in (30, 70, 120):
        out, _ = run(*line, "--save_dir", tmp_path / "legs", "--num_iters", num_iters)
    assert "resumed  with --num_iters 70 -> 120 (to start over instead: --new_model)" in out
    run(*line, "--save_dir", tmp_path / "once", "--num_iters", 120)
    assert ids(tmp_path / "legs")[0] == ids(tmp_path / "once")[0]


def test_resume_needs_no_flags_but_the_dataset(tmp_path, text):
    run("--text", text, *TINY, "--save_dir", tmp_path, "--num_iters", 20, "--learning_rate", 0.001)
    out, _ = run("--text", text, "--save_dir", tmp_path, "--num_iters", 40)
    assert "from iteration 20 to 40" in out and "dim 16" in out
    assert re.search(r"40/40 .* lr 2\.00e-04", out), "the learning rate comes from the checkpoint: 0.001 * 40 / 200"
    out, _ = run("--text", text, "--save_dir", tmp_path, "--num_iters", 40)
    assert "Run complete (40/40): raise --num_iters to continue, or start over with --new_model." in out
    assert "resumed  with unchanged flags" in out


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
    names = [[], [], [], []]
    for num_iters in (10, 20):
        for line, runs in zip(lines, names):
            out, _ = run(*line, "--save_dir", tmp_path, "--num_iters", num_iters)
            runs.append(re.search(r"run +(\S+), from iteration (\d+)", out).groups())
    for first, second in names:
        assert first[1] == "0" and second == (first[0], "10")
    assert len({first[0] for first, _ in names}) == 4


def test_new_model_twice_takes_the_pair_over(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--num_iters", 10, "--new_model"]
    first = re.search(r"run +(\S+),", run(*line)[0]).group(1)
    before = ids(tmp_path)
    second = re.search(r"run +(\S+),", run(*line)[0]).group(1)
    assert first != second and ids(tmp_path) == before and len(before) == 1
    out, _ = run(*line[:-1])
    assert second in out


def test_an_older_checkpoint_begins_a_branch(tmp_path, text):
    """What follows a checkpoint that its run has left behind is a run of its own: nothing of the old one is deleted."""
    line = ["--text", text, *TINY, "--steps_per_save", 10, "--keep", 2, "--save_dir", tmp_path]
    run(*line, "--num_iters", 20)
    older, newer = sorted(ids(tmp_path), key=lambda id: (tmp_path / f"{id}.safetensors").stat().st_mtime_ns)
    out, _ = run(*line, "--identifier", older, "--num_iters", 60, "--learning_rate", 0.01)
    assert "from iteration 10 to 60" in out
    assert re.search(r"A new branch: text-\w{6} has newer checkpoints, .* --identifier text-\w{6}", out)
    assert {older, newer} < set(ids(tmp_path)) and len(ids(tmp_path)) == 4
    assert len({record["run"] for record in main.list_checkpoints(tmp_path)}) == 2


def test_the_best_of_a_branch_stays_where_the_old_run_goes_on(tmp_path, text):
    line = ["--text", text, *TINY, "--steps_per_eval", 2, "--lr_warmup", 0, "--keep", 1, "--save_dir", tmp_path]
    run(*line, "--num_iters", 2)
    [shared] = records(tmp_path)
    run(*line, "--num_iters", 4, "--keep", 9)
    run(*line, "--identifier", shared["id"], "--num_iters", 4, "--learning_rate", 50)  # which makes it worse
    run(*line, "--identifier", shared["run"], "--num_iters", 8, "--learning_rate", 0.01)
    left = {record["id"]: record["run"] for record in records(tmp_path)}
    [branch] = [record for record in records(tmp_path) if record["run"] != shared["run"]]
    assert branch["best"]["id"] == shared["id"] in left
    assert 4 not in [record["iteration"] for record in records(tmp_path) if record["run"] == shared["run"]]


def test_text_encoded_anew_under_a_running_process(tmp_path, text):
    """The tokens it trains on stay what they were, though another process has replaced them by shorter ones."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path / "lm"]
    first = start(*line)
    wait_for(first, "20/100,000 ")
    text.write_text("short\n" * 50)
    run(*line, "--new_model", "--num_iters", 5)
    wait_for(first, "  loss ")
    wait_for(first, "  loss ")
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130 and "Stopped at iteration" in out, err


def test_changed_text_is_refused(tmp_path, text):
    run("--text", text, *TINY, "--save_dir", tmp_path / "lm", "--num_iters", 10)
    text.write_text(text.read_text().replace("quick", "slow!"))
    _, err = run("--text", text, *TINY, "--save_dir", tmp_path / "lm", "--num_iters", 20, status=2)
    assert "has changed" in err and "--new_model" in err


def test_evaluation_lines_and_late_score(tmp_path, text):
    """A checkpoint killed between save and evaluation is scored when it is resumed, with the same best."""
    line = ["--text", text, *TINY, "--num_iters", 60, "--steps_per_eval", 20]
    out, _ = run(*line, "--save_dir", tmp_path / "whole")
    scores = re.findall(r"^valid (\d+\.\d{4}) nats, perplexity .* bits per byte", out, re.M)
    assert len(scores) == 3

    import main

    record = main.list_checkpoints(tmp_path / "whole")[0]
    assert [iteration for iteration, _ in record["scores"]] == [20, 40, 60]
    assert record["best"]["nats"] == min(nats for _, nats in record["scores"])
    # The same, killed at the moment of the second evaluation.
    crash = "import main\nevaluate, calls = main.evaluate, []\n" + (
        "def dying(*arguments):\n    calls.append(1)\n    if len(calls) == 2: main.os.kill(main.os.getpid(), 9)\n"
        "    return evaluate(*arguments)\nmain.evaluate = dying\nmain.sys.exit(main.main())\n"
    )
    process = start_code(crash, *line, "--save_dir", tmp_path / "killed")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    out, _ = run(*line, "--save_dir", tmp_path / "killed")
    assert re.findall(r"^valid (\d+\.\d{4}) nats", out, re.M) == scores[1:]
    again = main.list_checkpoints(tmp_path / "killed")[0]
    assert again["scores"] == record["scores"] and again["best"] == record["best"] and again["id"] == record["id"]


def test_another_machine_is_named(tmp_path, text):
    """Exactness holds with one device, BLAS and version; a resume that meets others works, and says so."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path]
    out, _ = run(*line, "--num_iters", 5)
    assert "bit-exact" not in out
    other = "import main\nmain.BLAS = 'another BLAS'\nmain.sys.exit(main.main())\n"
    out, err = start_code(other, *line, "--num_iters", 10).communicate(timeout=60)
    assert "-> another BLAS" in out and "resume may not be bit-exact" in out and "at iteration 10" in out, err


def test_eval_tokens(tmp_path, text):
    """0 scores the whole split, a number that many tokens from its start."""
    import main
    from datasets import load_dataset

    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--num_iters", 5, "--steps_per_eval", 5, "--new_model"]
    dataset = load_dataset("text", tmp_path, [text])
    for eval_tokens, tokens in ((0, dataset.valid.tokens), (100, dataset.valid.tokens[:101])):
        out, _ = run(*line, "--eval_tokens", eval_tokens)
        model, _ = main.load_model(tmp_path, main.list_checkpoints(tmp_path)[0])
        assert f"valid {main.evaluate(model, tokens, 3):.4f} nats" in out


def start_code(code, *arguments):
    """Starts a Python program that imports main.py and changes something in it first."""
    import subprocess
    import sys

    from conftest import ROOT

    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_keep_and_best(tmp_path, text):
    import main

    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--num_iters", 120, "--steps_per_eval", 10]
    run(*line, "--keep", 2, "--learning_rate", 0.05, "--lr_warmup", 60)  # overheats, so that the best is not the last
    records = main.list_checkpoints(tmp_path)
    best = records[0]["best"]["id"]
    assert [record["iteration"] for record in records[:2]] == [120, 110]
    assert {record["id"] for record in records} == {records[0]["id"], records[1]["id"], best}


def test_divergence_stops_before_anything_is_saved(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--grad_clip", 0, "--lr_warmup", 0, "--steps_per_save", 1]
    run(*line, "--num_iters", 3)
    good = ids(tmp_path)[0]
    _, err = run(*line, "--num_iters", 1000, "--learning_rate", 1e30, status=1)
    assert "not finite" in err and "--learning_rate" in err and err.count("\n") == 1
    last_good = re.search(r"checkpoint is ([0-9a-f]{40})", err).group(1)
    import main

    assert main.find_damage(tmp_path, {"id": last_good}) is None
    weights = main.mx.load(str(tmp_path / f"{ids(tmp_path)[0]}.safetensors"))
    assert all(main.mx.isfinite(weight).all().item() for weight in weights.values())
    assert good


@pytest.mark.parametrize("wrong", [["--learning_rate", 1e30, "--lr_warmup", 0], ["--weight_decay", 1e9]])
@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_good_checkpoint_is_one_from_which_a_step_can_be_taken(tmp_path, text, wrong, keep):
    """The loss of the step before a save may be finite, and the weights that it made be of no use."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--keep", keep]
    run(*line, "--num_iters", 3, "--steps_per_save", 1)
    _, err = run(*line, "--num_iters", 30, "--steps_per_eval", 1, "--eval_tokens", 200, *wrong, status=1)
    named = re.search(r"the last good checkpoint is ([0-9a-f]{40}): resume", err)[1]
    records = main.list_checkpoints(tmp_path)
    assert records[0]["diverged"] and records[0]["id"] != named, "the newest is the one that made the loss infinite"
    out, err = run(*line, "--num_iters", 40, "--learning_rate", 1e-4, "--weight_decay", 0, "--max_tokens", 1)
    [place] = [record["iteration"] for record in records if record["id"] == named]
    assert f"from iteration {place} to 40" in out and "next step from it is not finite" in err
    assert "at iteration 40" in out
    assert not any("diverged" in record for record in main.list_checkpoints(tmp_path)), "it was pruned"


def test_a_run_that_was_never_good_says_so(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--learning_rate", 1e30, "--lr_warmup", 0, "--steps_per_eval", 1]
    _, err = run(*line, status=1)
    assert "no good checkpoint is left: start over (--new_model)" in err
    _, err = run("--text", text, *TINY, "--save_dir", tmp_path, status=1)
    assert "--new_model" in err.splitlines()[-1]
    out, _ = run("--list", "--save_dir", tmp_path)
    assert out.rstrip().endswith("diverged")


def test_a_score_that_is_not_finite_ends_the_run(tmp_path, text, monkeypatch, capsys):
    line = [*map(str, ["--text", text, *TINY, "--save_dir", tmp_path, "--steps_per_eval", 2])]
    assert main.main([*line, "--num_iters", "2"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(main, "evaluate", lambda *_: float("nan"))
        assert main.main([*line, "--num_iters", "9"]) == 1
    assert "score of iteration 4 is not finite" in capsys.readouterr().err
    newest, older = main.list_checkpoints(tmp_path)
    assert newest["diverged"] and newest["iteration"] == 4 and older["iteration"] == 2
    assert all(math.isfinite(nats) for _, nats in newest["scores"])


def test_losses_go_down_and_reports_are_whole(tmp_path, text):
    out, _ = run("--text", text, *TINY, "--save_dir", tmp_path, "--num_iters", 200, "--learning_rate", 0.01, "--lr_warmup", 20)
    reports = re.findall(
        r"^([\d,]+)/200  loss ([\d.]+)  perplexity [\d.,]+  lr \S+  grad [\d.]+  [\d,]+ tokens/s  peak [\d,]+ MiB  left \S+", out, re.M
    )
    assert [int(iteration) for iteration, _ in reports] == list(range(10, 201, 10))
    assert float(reports[0][1]) > 5 > 3 > float(reports[-1][1])


# Options of the loop


def records(folder):
    """The flags and counters of the checkpoints in a folder, the newest first."""
    return main.list_checkpoints(folder)


def test_patience_counts_over_interrupts(tmp_path, text):
    """With a learning rate of 0 no score is better than the first."""
    line = ["--text", text, *TINY, "--steps_per_eval", 2, "--learning_rate", 0, "--patience", 3, "--eval_tokens", 100]
    whole, _ = run(*line, "--save_dir", tmp_path / "whole")
    assert "Stopped: no improvement in 3 evaluations (--patience)" in whole
    assert [iteration for iteration, _ in records(tmp_path / "whole")[0]["scores"]] == [2, 4, 6, 8]
    run(*line, "--save_dir", tmp_path / "parts", "--num_iters", 4)
    arguments = [*map(str, line), "--save_dir", str(tmp_path / "parts"), "--num_iters", "100000"]
    dying = (
        "import main\nsave = main.save_checkpoint\ndef killed(folder, run, interrupts):\n    id = save(folder, run, interrupts)\n"
        "    if run.iteration == 6:\n        main.os.kill(main.os.getpid(), 9)\n    return id\n"
        f"main.save_checkpoint = killed\nmain.sys.exit(main.main({arguments!r}))"
    )
    assert subprocess.run([sys.executable, "-c", dying], cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    out, _ = run(*line, "--save_dir", tmp_path / "parts")
    assert ids(tmp_path / "parts")[0] == ids(tmp_path / "whole")[0]
    assert records(tmp_path / "parts")[0]["scores"] == records(tmp_path / "whole")[0]["scores"]
    out, _ = run(*line, "--save_dir", tmp_path / "parts")  # once more: it has nothing to do
    assert "in 3 evaluations (--patience)" in out and records(tmp_path / "parts")[0]["iteration"] == 8
    out, _ = run(*line, "--save_dir", tmp_path / "parts", "--patience", 4)
    assert records(tmp_path / "parts")[0]["iteration"] == 10
    run(*line, "--save_dir", tmp_path / "odd", "--num_iters", 5)  # an end off the schedule is scored, but no miss
    run(*line, "--save_dir", tmp_path / "odd", "--num_iters", 20)
    assert [iteration for iteration, _ in records(tmp_path / "odd")[0]["scores"]] == [2, 4, 5, 6, 8]


def test_patience_does_not_depend_on_where_a_leg_ended(tmp_path, text):
    """The best score is that at the first leg's end, 5, but a whole run has none there: its best is that at 6."""
    line = ["--text", text, *TINY, "--steps_per_eval", 2, "--lr_warmup", 0, "--patience", 3, "--save_dir", tmp_path]
    run(*line, "--learning_rate", 1e-3, "--num_iters", 5)
    run(*line, "--learning_rate", 0, "--num_iters", 20)  # from here on nothing changes
    iterations, scores = zip(*records(tmp_path)[0]["scores"])
    assert iterations == (2, 4, 5, 6, 8, 10, 12) and scores[1] > scores[2] == scores[-1]


def test_another_number_of_streams_is_named(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--context_size", 64]
    run(*line, "--num_iters", 2, "--batch_size", 1)
    out, _ = run(*line, "--num_iters", 4, "--batch_size", 64)
    if os.cpu_count() > 1:
        assert re.search(r"Environment changed since the checkpoint \(streams 1 -> \d+\)", out)


def test_max_minutes_ends_a_leg_and_changes_nothing(tmp_path, text):
    line = ["--text", text, *TINY, *DROPOUT, "--save_dir", tmp_path / "legs", "--steps_per_eval", 100000]
    out, _ = run(*line, "--max_minutes", 0.005, "--eval_test", "--test_text", text)
    stopped = records(tmp_path / "legs")[0]
    assert 0 < stopped["iteration"] < 100000 and stopped["scores"] == [] and stopped["flags"]["num_iters"] == 100000
    assert f"--max_minutes 0.005 reached at iteration {stopped['iteration']:,}." in out
    assert out.count("\nvalid ") == 1 and out.count("\ntest ") == 1
    logged = lambda: [line.split(",")[0] for path in (tmp_path / "legs").glob("*.csv") for line in path.read_text().split() if ",valid," in line]
    assert logged() == [str(stopped["iteration"])]
    more = ["--num_iters", stopped["iteration"] + 20, "--test_text", text]
    out, _ = run(*line, *more)
    assert f"from iteration {stopped['iteration']:,}" in out  # and the limit was that leg's own
    assert logged() == [], "what a run without a break would not have"
    run(*line[:-4], "--save_dir", tmp_path / "whole", "--steps_per_eval", 100000, *more)
    assert ids(tmp_path / "legs")[0] == ids(tmp_path / "whole")[0]


def test_extending_a_schedule_says_that_it_stretches(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--lr_warmup", 0, "--steps_per_report", 1]
    out, _ = run(*line, "--lr_schedule", "linear", "--min_lr", 0, "--learning_rate", 0.01, "--num_iters", 4)
    assert re.findall(r"lr (\S+)", out) == ["1.00e-02", "7.50e-03", "5.00e-03", "2.50e-03"]
    out, _ = run(*line, "--num_iters", 8)
    assert "The learning rate and dropout schedules now stretch" in out and re.findall(r"lr (\S+)", out)[0] == "5.00e-03"


WITHOUT_ONEDNN = ("-c", """
import runpy, sys
sys.prefix = "/nowhere"  # below which it would be
sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[1] + "/main.py", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
""", str(ROOT))


def test_bfloat16_on_a_cpu(tmp_path, text):
    """Another result where the processor has units for it, else a line and that of float32; a resume compares."""
    line = ["--text", text, *TINY, "--dim", 32, "--optimizer", "muon", "--dropout", 0.1]
    bfloat16 = [*line, "--dtype", "bfloat16"]
    out, _ = run(*bfloat16, "--num_iters", 6, "--save_dir", tmp_path / "16")
    run(*line, "--num_iters", 6, "--save_dir", tmp_path / "32")
    assert (ids(tmp_path / "16") == ids(tmp_path / "32")) == ("--dtype bfloat16 would be slower here" in out)
    for steps in (2, 4, 6):
        run(*bfloat16, "--num_iters", steps, "--steps_per_save", 6, "--save_dir", tmp_path / "parts")
    assert ids(tmp_path / "parts")[0] == ids(tmp_path / "16")[0], "interrupted, and yet the same"

    outs = {}
    for dtype in ("bfloat16", "float32"):
        outs[dtype], _ = run(*line, "--dtype", dtype, "--num_iters", 6, "--save_dir", tmp_path / f"no{dtype}", program=WITHOUT_ONEDNN)
    assert "--dtype bfloat16 would be slower here" in outs["bfloat16"] and "oneDNN" not in outs["float32"]
    assert ids(tmp_path / "nobfloat16") == ids(tmp_path / "nofloat32")

    if ids(tmp_path / "16") != ids(tmp_path / "32"):
        out, _ = run(*line, "--dtype", "float32", "--num_iters", 8, "--save_dir", tmp_path / "16")
        assert "dtype bfloat16 -> float32" in out


VARIANTS = [
    "--optimizer muon --dropout 0.1 --dropout_final 0.3 --qk_norm --untie --grad_accumulation 3",
    "--batch_size 16 --context_size 64 --lr_schedule cosine --checkpoint --num_kv_heads 1",  # several streams
    "--average 0.3 --dropout 0.1 --grad_accumulation 2 --weight_decay 0.1 --embedding_decay 2"
    " --lr_schedule linear --lr_cooldown 0.5",
]


@pytest.mark.parametrize("options", VARIANTS)
def test_interrupted_variants_equal_undisturbed(tmp_path, text, options):
    line = ["--text", text, *TINY, *options.split(), "--num_iters", 60, "--steps_per_eval", 20, "--steps_per_report", 1]
    run(*line, "--save_dir", tmp_path / "whole")
    for stop in (7, 30):
        process = start(*line, "--save_dir", tmp_path / "parts")
        wait_for(process, f"{stop}/60 ")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130, err
    run(*line, "--save_dir", tmp_path / "parts")
    assert ids(tmp_path / "parts")[0] == ids(tmp_path / "whole")[0]


AVERAGE = ["--learning_rate", 0.01, "--lr_warmup", 5, "--steps_per_eval", 10, "--eval_tokens", 0]


def raw_weights(folder):
    """The weights of the newest checkpoint as they were trained: with --average those in the other file."""
    record = records(folder)[0]
    weights, metadata = (main.load_arrays(file) for file in main.files_of(folder, record))
    raw = {name.removeprefix("weights."): array for name, array in metadata.items() if name.startswith("weights.")}
    return {name: main.np.array(array) for name, array in (raw or weights).items()}


def test_average_is_what_is_scored_saved_and_sampled(tmp_path, text):
    """Training is not touched by it: the weights before averaging are those of a run without it."""
    line = ["--text", text, *TINY, *AVERAGE, "--num_iters", 20, "--steps_per_save", 1, "--keep", 99]
    plain, _ = run(*line, "--save_dir", tmp_path / "plain")
    out, _ = run(*line, "--average", 0.25, "--save_dir", tmp_path / "average")
    steps = sorted(records(tmp_path / "plain"), key=lambda record: record["iteration"])
    average = None
    for i, record in enumerate(steps):
        weights = main.load_arrays(main.files_of(tmp_path / "plain", record)[0])
        average = main.average_weights(average, weights, i, 0.25)
    newest = records(tmp_path / "average")[0]
    model, tokenizer = main.load_model(tmp_path / "average", newest)
    for name, weight in main.tree_flatten(model.parameters()):
        main.np.testing.assert_allclose(main.np.array(weight), main.np.array(average[name]), rtol=0, atol=1e-6)
    raw, expected = raw_weights(tmp_path / "average"), raw_weights(tmp_path / "plain")
    assert raw.keys() == expected.keys()
    for name in raw:
        main.np.testing.assert_array_equal(raw[name], expected[name])
    [_, nats] = newest["scores"][-1]
    scored, _ = run("--evaluate", "valid", "--save_dir", tmp_path / "average")
    assert f"valid {nats:.4f} nats" in scored and f"valid {nats:.4f} nats" in out and f"valid {nats:.4f} nats" not in plain
    sample = main.Conversation(tokenizer, model).reply("", main.resolve(main.argparse.Namespace(**main.DEFAULTS | {"max_tokens": 8})), 42)
    assert out.rstrip("\n").endswith("".join(sample).rstrip("\n"))


def test_average_begins_and_ends_with_its_flag(tmp_path, text):
    """A run goes on with it or without it; without it, it is the run that never had one."""
    line = ["--text", text, *TINY, *AVERAGE]
    run(*line, "--num_iters", 30, "--save_dir", tmp_path / "plain")
    run(*line, "--num_iters", 10, "--save_dir", tmp_path / "legs")
    run(*line, "--num_iters", 20, "--average", 0.5, "--save_dir", tmp_path / "legs")
    [averaged] = [record for record in records(tmp_path / "legs") if record["iteration"] == 20]
    out, _ = run(*line, "--num_iters", 30, "--average", 0, "--save_dir", tmp_path / "legs")
    assert "--average 0.5 -> 0" in out and averaged["flags"]["average"] == 0.5
    assert ids(tmp_path / "legs")[0] == ids(tmp_path / "plain")[0]


def test_checkpoint_that_another_process_pruned_while_this_one_waited(tmp_path, text, monkeypatch, capsys):
    line = ["--text", str(text), *TINY, "--save_dir", str(tmp_path), "--num_iters"]
    assert main.main([*line, "2"]) == 0
    lock_run = main.lock_run

    def late(folder, name):
        for path in folder.glob("*.safetensors"):
            path.unlink()
        return lock_run(folder, name)

    monkeypatch.setattr(main, "lock_run", late)
    assert main.main([*line, "4"]) == 1
    assert "advanced while this process was starting; rerun the command\n" in capsys.readouterr().err
