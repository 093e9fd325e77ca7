"""Reports against independent computations: logs, samples, the screen."""

import contextlib
import json
import re
import tempfile
from argparse import Namespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, copy_program, ids, interrupt, log_rows, newest, rows_of, run
from conftest import run_folder, saved, start
from test_prompts import Terminal

from support.reports import Log, Reporter


# ---- Logs ---------------------------------------------------------------------------------------


def places_to(end, report):
    """Split and iteration of the rows of a log with a score after every other report."""
    places = []
    for iteration in range(report, end + 1, report):
        places.append(("train", iteration))
        if iteration % (2 * report) == 0:
            places.append(("valid", iteration))
    return places


def test_log(trained):
    """Each report and score, once, in the units of its columns."""
    checkpoint = newest(trained)
    rows = rows_of(checkpoint.folder / "log.csv")
    assert [(row["split"], row["iteration"]) for row in rows] == places_to(60, 10)
    scores = {}
    for row in rows:
        if row["split"] == "valid":
            scores[row["iteration"]] = row["loss"]
        else:
            assert row["learning_rate"] == 0.01
            assert min(row["gradient_norm"], row["tokens_per_second"], row["peak_mib"]) > 0
            assert row["ms_per_step"] == pytest.approx(128_000 / row["tokens_per_second"], rel=1e-4)
            assert row["epoch"] == pytest.approx(row["tokens_seen"] / 15840, rel=0.01)
        assert row["tokens_seen"] == row["iteration"] * 4 * 32
        bits = row["loss"] / np.log(2)
        assert row["bits_per_byte"] == pytest.approx(bits, rel=0.01)  # some are <eos>
    expected = {each.iteration: each.loss for each in checkpoint.evaluations}
    assert scores == pytest.approx(expected, rel=1e-5)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(checkpoint.seconds, rel=1e-5)


@pytest.fixture
def line(line):
    """A command that reports every 5 steps and scores every 10."""
    return [*line, "--steps_per_report", 5, "--steps_per_eval", 10]


def test_a_log_that_was_deleted_begins_with_its_columns(tmp_path):
    run_here = Namespace(folder=tmp_path, iteration=0, evaluation=None)
    log = Log(run_here)
    for iteration in (1, 2):
        log.append({"iteration": iteration, "split": "train", "loss": 0.5})
        (tmp_path / "log.csv").unlink()
    log.append({"iteration": 3, "split": "train", "loss": 0.25})
    assert (tmp_path / "log.csv").read_text() == "iteration,split,loss\n3,train,0.25\n"


@pytest.mark.parametrize("damage", [
    "25,train\n" * 3 + "30,",
    "\0\r\n\xff,\"\n",
    "," * 200_000,
])  # fmt: skip
def test_a_resumed_run_has_each_row_once(line, tmp_path, damage):
    """What comes after its checkpoint, and what is damaged, costs no other row."""
    run(*line, "--num_iters", 20)
    path = run_folder(tmp_path) / "log.csv"
    header, *rows = path.read_text("latin-1").splitlines(keepends=True)
    later = rows[-1].replace("20,", "21,", 1)
    lines = [header, *rows[:2], damage + "\n", *rows[2:], later, rows[0][:-2]]
    path.write_text("".join(lines), "latin-1")
    run(*line, "--num_iters", 30)
    rows = log_rows(tmp_path)
    assert [(row["split"], row["iteration"]) for row in rows] == places_to(30, 5)


SPREADSHEETS = {  # what one makes of a log, and whether the rows can still be read
    "CR LF": (lambda text: text.replace("\n", "\r\n"), True),
    "CR": (lambda text: text.replace("\n", "\r"), False),
    "semicolons": (lambda text: text.replace(",", ";"), False),
    "more columns": (lambda text: re.sub(r"(?<=\d)\n", ",,\n", text), False),
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_a_log_that_a_spreadsheet_has_saved(line, tmp_path, kind):
    """With a byte-order mark, too; what cannot be read is put aside, and that is said."""
    run(*line, "--num_iters", 10)
    path = run_folder(tmp_path) / "log.csv"
    save, is_kept = SPREADSHEETS[kind]
    content = save(path.read_text()).encode("utf-8-sig")
    path.write_bytes(content)
    out, _ = run(*line, "--num_iters", 20)
    first = 5 if is_kept else 15
    rows = log_rows(tmp_path, "train")
    assert [row["iteration"] for row in rows] == [*range(first, 21, 5)]
    assert ("log.csv cannot be read: it was renamed to log.old.csv" in out) != is_kept
    if not is_kept:
        assert path.with_name("log.old.csv").read_bytes() == content


@pytest.mark.parametrize("name, kind", [("log.csv", "folder"), ("samples.jsonl", "link")])
def test_a_log_that_cannot_be_written_is_said_once(line, tmp_path, name, kind):
    run(*line, "--num_iters", 10)
    path = run_folder(tmp_path) / name
    other = tmp_path / "other.txt"
    other.write_text("mine\n")
    path.unlink()
    if kind == "link":
        path.symlink_to(other)
    else:
        path.mkdir()
    out, _ = run(*line, "--num_iters", 40)
    assert "Run complete (40/40). " in out
    assert out.count(f"\nCannot write {name}; the run goes on. ") == 1
    assert other.read_text() == "mine\n"
    assert path.is_symlink() == (kind == "link")


def test_a_metric_of_ones_own_is_shown_and_logged(line, tmp_path):
    """One line of main.py is edited; a run that goes on has it from then on."""
    run(*line, "--num_iters", 10)
    before = '{"loss": loss, "gradient_norm": norm}'
    after = '{"loss": loss, "gradient_norm": norm, "my,metric": loss / 2}'
    edited = copy_program(tmp_path / "edited", {before: after})
    more = ["--identifier", "latest", "--num_iters", 20, "--steps_per_report", 1]
    out, _ = run("--save_dir", tmp_path, *more, program=[edited])
    shown = re.findall(r"^\d+/20  loss ([\d.]+) .*  my,metric ([\d.]+)  ", out, re.M)
    assert len(shown) == 10
    for loss, half in shown:
        assert float(half) == pytest.approx(float(loss) / 2, abs=1e-3)
    rows = log_rows(tmp_path, "train")
    assert [row["iteration"] for row in rows] == [5, *range(10, 21)]
    for row in rows[:2]:
        assert "my,metric" not in row
    for row in rows[2:]:
        assert row["my,metric"] == pytest.approx(row["loss"] / 2, rel=1e-4)


def test_a_report_is_the_mean_since_the_last_one(line, tmp_path):
    run(*line, "--num_iters", 10)
    run(*line, "--num_iters", 10, "--steps_per_report", 1, "--save_dir", tmp_path / "each")
    each = log_rows(tmp_path / "each", "train")
    for row in log_rows(tmp_path, "train"):
        of_it = [step for step in each if 0 <= row["iteration"] - step["iteration"] < 5]
        mean = sum(step["loss"] for step in of_it) / 5
        assert row["loss"] == pytest.approx(mean, rel=1e-4)
        assert row["gradient_norm"] == of_it[-1]["gradient_norm"], "that of the last step"


def samples_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_of_a_run(line, tmp_path):
    """Each is what --prompt gives, and none changes the weights."""
    line += ["--num_iters", 20, "--keep", 9]
    run(*line, "--sample_prompt", "line", "--sample_prompt=-x", "--sample_tokens", 5)
    path = run_folder(tmp_path) / "samples.jsonl"
    rows = samples_in(path)
    expected = [(10, "line"), (10, "-x"), (20, "line"), (20, "-x")]
    assert [(row["iteration"], row["prompt"]) for row in rows] == expected
    named = {checkpoint.iteration: checkpoint.id for checkpoint in saved(tmp_path)}
    for row in rows:
        alone = [f"--prompt={row['prompt']}", "--max_tokens", 5, "--save_dir", tmp_path]
        out, _ = run("--identifier", named[row["iteration"]], *alone)
        assert out == row["text"] + "\n"
    none = tmp_path / "none"
    run(*line, "--sample_tokens", 0, "--save_dir", none)
    assert ids(none) == ids(tmp_path)
    assert not list(none.glob("*/samples.jsonl"))

    # A resumed run inherits the prompts, and takes back no sample that it will not repeat.
    run("--num_iters", 30, "--save_dir", tmp_path)
    assert [row["iteration"] for row in samples_in(path)] == [10, 10, 20, 20, 30, 30]


def test_progress_in_a_terminal(line):
    """A bar that fits into the terminal's 100 columns."""
    with Terminal(*line, "--num_iters", 100) as terminal:
        shown = terminal.wait_for("Run complete")
        lines = re.split(r"[\r\n]+", terminal.logfile_read.getvalue())
    bars = [each for each in lines if "/100 [" in each]
    assert max(map(len, bars)) <= 100
    assert re.search(r"100%\|\S+\| 100/100 \[.*, loss [\d.]+, lr [\d.e-]+, ", bars[-1])
    assert not re.search(r"\d/100  loss ", shown), "what the bar says is not printed again"


# ---- The screen ---------------------------------------------------------------------------------


def test_start_screen(line, tmp_path):
    out, _ = run(*line, "--train_tokens", 100, "--num_iters", 2)
    folder = run_folder(tmp_path)
    lines = out.splitlines()
    assert lines[0] == f"run      {folder.name}, from iteration 0 to 2, seed 42"
    assert lines[1].endswith("2 blocks, dim 16, 2 heads (2 key/value heads), relu2 64, context 8")
    splits = r"data     text: [\d,]+ train / [\d,]+ valid tokens; "
    assert re.match(splits + r"byte tokenizer, 257-token vocabulary; in ", lines[2])
    steps = r"steps    4 x 8 tokens, ([\d,]+) per epoch, ([\d.]+) epochs in all; adamw, float32"
    assert re.fullmatch(steps, lines[3]).groups() == ("3", "0.64"), "100 / 32, and 64 / 100"
    assert lines[4] == "rate     constant: 1.5e-06 (step 1), 3e-06 (step 2)"
    assert lines[5].startswith("machine  cpu, ")
    assert f"MLX {mx.__version__}, matmuls: " in lines[5]
    assert lines[6] == f"files    {folder}"


def test_the_schedule_in_words(line):
    """Its ends, and that of warmup."""
    given = "--learning_rate 5e-3 --lr_warmup 20 --lr_schedule linear --min_lr 0 --lr_cooldown 0.5"
    out, _ = run(*line, *given.split(), "--num_iters", 30)
    shown = "0.00025 (step 1), 0.005 (step 20), 0.001 (step 30)"
    assert f"\nrate     linear: {shown}\n" in out


# What takes 10,000 times as long on this clock, and a disk that is nearly full.
SLOW = """
import shutil, sys, time
from types import SimpleNamespace

clock = time.perf_counter
time.perf_counter = lambda: 10_000 * clock()
shutil.disk_usage = lambda path: SimpleNamespace(free=99)

import main

sys.exit(main.main(sys.argv[1:]))
"""


def test_what_a_first_run_costs_is_said(line, tmp_path):
    """Its days, after the first report; where its files lie, and how large they are."""
    process = start(*line, "--steps_per_report", 2, program=["-c", SLOW], cwd=ROOT)
    begun = ""
    while "\n20/100,000 " not in begun:
        begun += process.stdout.readline()
    out, _ = interrupt(process)
    assert re.search(r"^This will take \S+ days; python main.py --config first takes", begun, re.M)
    assert begun.count("This will take") == 1
    assert re.search(r"  left [\d.]+ days$", begun, re.M)
    assert re.search(
        r"^Checkpoints may take \S+ GiB, and .* has 0.0: give a smaller --keep", begun, re.M
    )
    folder = run_folder(tmp_path)
    size = sum(path.stat().st_size for path in folder.rglob("*")) / 2**20
    assert f"\nFiles: {folder}, {size:,.0f} MiB\n" in out


def test_a_ram_disk_is_named(line):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        out, _ = run(*line, "--num_iters", 1, "--save_dir", folder)
    assert f"\n{folder} is on a RAM disk: it takes memory, and is gone after a restart.\n" in out


def test_a_sample_of_the_default_length_is_five_lines(tmp_path, capsys):
    for length, shown in ((60, 5), (100, 10)):
        run = Namespace(flags=Namespace(sample_tokens=length), iteration=1, folder=tmp_path)
        reporter = Namespace(run=run, writing=contextlib.nullcontext)
        Reporter.report_sample(reporter, "a\n", "b\n" * 8)
        assert capsys.readouterr().out.count("\n") == shown
    rows = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(row)["text"] for row in rows] == 2 * ["b\n" * 8], "kept whole"
