"""Reports against independent computations.

Sliding evaluation, logs, what a checkpoint says of its making.
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import math
import os
import pty
import random
import re
import signal
import struct
import termios
import time
from argparse import Namespace

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, flags, run, start
from test_evaluation import make_model, nats_of
from test_interrupts import wait_for


@pytest.mark.parametrize("length", [2, 8, 9, 10, 33, 50])
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_sliding_evaluation(length, stride):
    """Each token is scored once, alone, with the context of the first window that reaches it."""
    model = make_model()
    context_size = 8
    tokens = np.random.default_rng(length).integers(13, size=length).astype(np.uint16)
    total = 0.0
    for answer in range(1, length):
        windows_before = math.ceil((answer - context_size) / stride)
        begin = max(0, windows_before) * stride
        context = tokens[begin:answer].astype(np.int32)
        logits = model(mx.array(context[None]))[0, -1:]
        total += nats_of(logits, tokens[answer : answer + 1]).sum()
    for batch_size in (1, 4):
        score = main.evaluate(model, tokens, batch_size, stride=stride)
        assert score == pytest.approx(total / (length - 1), rel=1e-5)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with two runs of a byte model that has learnt a little."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    line = ["--text", folder / "text.txt", *TINY, "--context_size", 32, "--save_dir", folder / "lm"]
    line += ["--learning_rate", 0.01, "--lr_warmup", 5, "--num_iters", 60, "--steps_per_eval", 20]
    for seed in (1, 2):
        run(*line, "--seed", seed)
    return folder / "lm"


def rows_of(path):
    return list(csv.DictReader(path.open()))


def written(**values):
    """The line of a log that has these values and no others."""
    return ",".join(str(values.get(name, "")) for name in main.LOG_COLUMNS)


def train_row(iteration, loss=1):
    return written(iteration=iteration, split="train", loss=loss)


HEADER = ",".join(main.LOG_COLUMNS)


# ---- Logs ---------------------------------------------------------------------------------------
def test_log(trained):
    record = main.list_checkpoints(trained)[0]
    rows = rows_of(trained / f"{record['run']}.csv")
    assert list(rows[0])[: len(main.LOG_COLUMNS)] == main.LOG_COLUMNS
    expected = []
    for iteration in range(10, 61, 10):
        expected.append(("train", iteration))
        if iteration % 20 == 0:
            expected.append(("valid", iteration))
    assert [(row["split"], int(row["iteration"])) for row in rows] == expected
    scores = {}
    for row in rows:
        if row["split"] == "valid":
            scores[int(row["iteration"])] = float(row["loss"])
    assert scores == pytest.approx(dict(record["scores"]), rel=1e-5)
    for row in rows:
        assert int(row["tokens"]) == int(row["iteration"]) * 4 * 32
        bits = float(row["loss"]) / np.log(2)
        assert float(row["bits_per_byte"]) == pytest.approx(bits, rel=0.01)  # some are <eos>
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(record["seconds"], rel=1e-5)


def test_log_counts_the_tokens_of_batches_as_they_were(tmp_path, text):
    line = ["--text", text, *TINY, "--steps_per_report", 2, "--save_dir", tmp_path]
    run(*line, "--num_iters", 2)
    run(*line, "--num_iters", 4, "--batch_size", 2)
    rows = rows_of(next(tmp_path.glob("*.csv")))
    assert [int(row["tokens"]) for row in rows] == [2 * 4 * 8, 2 * 4 * 8 + 2 * 2 * 8]


def test_a_log_is_written_anew_under_the_lock(tmp_path, monkeypatch):
    """Else another process that cleans the folder would take it for what a killed save left."""
    replace = main.Path.replace
    tries = []

    def watched(new, path):
        descriptor = os.open(tmp_path, os.O_RDONLY)  # as a second process would
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        assert new.name == "run.csv.new"
        tries.append(path)
        return replace(new, path)

    monkeypatch.setattr(main.Path, "replace", watched)
    main.LogTable(tmp_path / "run.csv", 0, False)
    assert tries
    assert (tmp_path / "run.csv").read_text().strip() == HEADER


def test_log_of_a_run_that_is_killed(tmp_path, text):
    """Whatever stops it, the log ends with the lines, and the losses, of the run never touched."""
    # Checkpoints fall between reports, whose losses are means over the steps before and after them.
    line = ["--text", text, *TINY, "--context_size", 64]
    line += ["--steps_per_report", 4, "--steps_per_eval", 12, "--steps_per_save", 3]
    chance = random.Random(0)
    for _ in range(6):
        process = start(*line, "--save_dir", tmp_path / "killed")
        wait_for(process, "  loss ")
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(chance.choice([signal.SIGKILL, signal.SIGINT]))
        process.communicate(timeout=120)
    num_iters = main.list_checkpoints(tmp_path / "killed")[0]["iteration"] + 15
    logs = []
    for name in ("killed", "whole"):
        run(*line, "--save_dir", tmp_path / name, "--num_iters", num_iters)
        [log] = (tmp_path / name).glob("*.csv")
        logs.append([])
        for row in rows_of(log):
            logs[-1].append((row["iteration"], row["split"], row["loss"], row["gradient_norm"]))
    assert logs[0] == logs[1]
    assert len(logs[0]) >= num_iters // 4
    assert not list((tmp_path / "killed").glob("*.new"))


def test_a_log_that_cannot_be_read_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "run.csv"
    content = HEADER + "\n" + train_row(10) + "\n"
    path.write_text(content)

    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(main, "read_log", failing)
        log = main.LogTable(path, 20, False)
        # Of a new column, for which it would be rewritten.
        log.append({"iteration": 20, "split": "train", "mine": 1})
        assert path.read_text() == content
    log.append({"iteration": 30, "split": "train", "loss": 0.5})
    assert path.read_text() == content + train_row(30, 0.5) + "\n"


def test_a_log_that_cannot_be_rewritten_keeps_its_columns(tmp_path, monkeypatch):
    """What is written to it later can be read."""
    path = tmp_path / "run.csv"
    log = main.LogTable(path, 0, False)

    def failing(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(main.Path, "replace", failing)
        log.append({"iteration": 10, "split": "train", "mine": 1})
    log.append({"iteration": 20, "split": "train", "loss": 0.5})
    log.append({"iteration": 30, "split": "train", "mine": 1})
    assert [row["iteration"] for row in main.read_log(path)] == ["20", "30"]
    assert [row.get("mine") for row in main.read_log(path)] == ["", "1"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_input_output_error_of_stdout(tmp_path, is_terminal):
    """A closed terminal is nobody's loss; of a file the caller learns."""

    class Failing:
        def __init__(self):
            self.file = open(tmp_path / "out", "w", encoding="utf-8")

        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        def isatty(self):
            return is_terminal

        def __getattr__(self, name):
            return getattr(self.file, name)

    stream = main.Lasting(Failing())
    stream.write("text")
    assert (stream.lost is None) == is_terminal


def test_a_score_that_was_not_saved_is_logged_once(tmp_path):
    path = tmp_path / "run.csv"
    for scored, expected in ((True, ["10", "10"]), (False, ["10"])):
        lines = [
            HEADER,
            train_row(10),
            written(iteration=10, split="valid", loss=1),
            train_row(20),
            "20,va",
        ]
        # Damaged at its end, which is no reason to stop a run.
        path.write_bytes("\n".join(lines).encode() + b"\xff")
        log = main.LogTable(path, 10, scored)
        assert [row["iteration"] for row in rows_of(path)] == expected
        given = {"iteration": 11, "split": "train", "tokens": 5, "seconds": 0.25}
        log.append(given | {"loss": 1 / 3})
        assert path.read_text().splitlines()[-1] == written(**given, loss="0.333333")


@pytest.mark.parametrize("damage", [
    "²,train,",
    '15,"train,1,,,,,,,',
    "15,train",
    train_row(15) + ",,,,",  # more than the columns
    "",
    "\0,,,,,,,,,",
    "\x1c15,train,",
])  # fmt: skip
def test_a_damaged_row_costs_itself_alone(tmp_path, damage):
    path = tmp_path / "run.csv"
    lines = [
        HEADER,
        train_row(10),
        damage,
        train_row(20),
        train_row(30),
    ]
    path.write_text("\n".join(lines) + "\n")
    main.LogTable(path, 20, False)
    assert [row["iteration"] for row in rows_of(path)] == ["10", "20"]


def test_a_metric_of_ones_own_is_shown_and_logged(tmp_path, capsys):
    """Its name is one that neither LOG_COLUMNS nor FORMATS knows.

    Rows before it stay, and so does its column when a run resumes.
    """
    given = flags(save_dir=tmp_path, num_iters=40, context_size=8)
    trained = main.Run("text-0a1b2c", given, None, None, None, Namespace(batch_size=4))
    metrics = {"loss": 2.0, "learning_rate": 0.1, "tokens_per_second": 64.0}
    reporter = main.Reporter(trained)
    reporter.report_steps(10, metrics)
    reporter.report_steps(20, metrics | {"my_metric": 12.3456})
    reporter.report_steps(30, metrics | {"my_metric": 1 / 3})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("10/40  loss 2.0000  perplexity 7.39  lr 1.00e-01  64 tokens/s")
    shown = [re.findall(r"my_metric (\S+)", line) for line in lines]
    assert shown == [[], ["12.35"], ["0.3333"]]

    path = tmp_path / "text-0a1b2c.csv"
    rows = rows_of(path)
    columns = list(rows[0])
    assert columns[: len(main.LOG_COLUMNS)] == main.LOG_COLUMNS
    assert "my_metric" in columns[len(main.LOG_COLUMNS) :]
    assert [row["my_metric"] for row in rows] == ["", "12.3456", "0.333333"]
    assert [row["iteration"] for row in rows] == ["10", "20", "30"]
    for row in rows:
        assert row["split"] == "train"
        assert row["loss"] == "2"
        assert row["learning_rate"] == "0.1"
        assert row["tokens_per_second"] == "64"
        for name in ("bits_per_byte", "gradient_norm", "tokens", "seconds"):
            assert row[name] == "", "it was not given"

    trained.iteration = 20
    main.Reporter(trained).report_steps(30, metrics | {"my_metric": 0.5})
    assert rows_of(path) == [*rows[:2], rows[2] | {"my_metric": "0.5"}]


@pytest.mark.parametrize("columns", [100, 0])
def test_the_progress_bar_fits_100_columns(tmp_path, text, columns):
    """Of a long run, too, and in a terminal that does not know its width."""
    terminal, end = pty.openpty()
    lines = 24 if columns else 0
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    line = [*TINY, "--learning_rate", 0, "--num_iters", 100_000, "--max_minutes", 0.01]
    process = start("--text", text, *line, "--save_dir", tmp_path, stdout=end, stderr=end)
    os.close(end)
    printed = b""
    part = None
    with contextlib.suppress(OSError):  # at its end
        while part != b"":
            part = os.read(terminal, 1 << 16)
            printed += part
    os.close(terminal)
    assert process.wait(60) == 0
    bars = [line for line in re.split(r"[\r\n]+", printed.decode()) if "/100000 |" in line]
    assert max(map(len, bars)) <= 100
    report = r"left [\d:]+  loss [\d.]+  perplexity [\d.]+  lr \S+  grad [\d.]+  .*[\d,]+ tokens/s"
    assert re.search(report, bars[-1]), bars[-1]


def test_what_a_checkpoint_was_made_by(trained):
    record = main.list_checkpoints(trained)[0]
    assert record["command"][1:3] == ["--text", str(trained.parent / "text.txt")]
    assert "--seed" in record["command"]
    for name in ("main.py", "datasets.py", "extras/fast.py", "extras/ranks.py"):
        assert record["sources"][name] == hashlib.sha1((ROOT / name).read_bytes()).hexdigest()


# ---- Mistakes -----------------------------------------------------------------------------------
@pytest.mark.parametrize("typed, words", [
    (["--evaluate", "valid", "--eval_stride", 33], "at most 32"),
    (["--prompt", "x", "--identifier", "latest", "best"], "--identifier takes one name"),
])  # fmt: skip
def test_mistakes(trained, typed, words):
    err = run(*typed, "--save_dir", trained, status=2, cwd=trained.parent)[1]
    assert words in err.splitlines()[-1] and "Traceback" not in err
