"""Reports against independent computations.

Sliding evaluation, logs, what a checkpoint says of its making.
"""

import errno
import fcntl
import io
import json
import math
import os
import pty
import re
import shlex
import struct
import termios
from argparse import Namespace

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, flags, ids, log_rows, run, run_folder
from datasets import ByteTokenizer
from test_evaluation import make_model, nats_of


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


def rows_of(path):
    """The rows of a log, as dicts."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def iterations_of(path):
    return [row["iteration"] for _, row in main.read_log(path)]


def row_of(iteration, split="train", **values):
    """The line of a log."""
    return json.dumps({"iteration": iteration, "split": split} | values)


ANYTHING_MORE = " +(?:.*  )?"  # between two metrics: somebody else's


class Endless:
    """Batches of zeros."""

    def __init__(self, flags):
        self.batch_size = flags.batch_size
        self.batch = mx.zeros((flags.batch_size, flags.context_size), mx.int32)

    def next(self):
        return self.batch, self.batch


def run_at(folder, iteration, scores=(), **values):
    """A run without a model, which has come to an iteration."""
    given = flags(save_dir=folder.parent, context_size=8, batch_size=4, **values)
    optimizer = Namespace(optimizers=[])
    valid = Namespace(tokens=range(20), num_bytes=40)
    dataset = Namespace(train=None, valid=valid, tokenizer=ByteTokenizer())
    trained = main.Run(folder.name, folder, given, dataset, None, optimizer, Endless(given))
    trained.iteration = iteration
    trained.scores = [*scores]
    return trained


# ---- Logs ---------------------------------------------------------------------------------------


def test_log(trained):
    checkpoint = main.list_checkpoints(trained)[0]
    rows = rows_of(checkpoint.folder / "log.jsonl")
    expected = []
    for iteration in range(10, 61, 10):
        expected.append(("train", iteration))
        if iteration % 20 == 0:
            expected.append(("valid", iteration))
    assert [(row["split"], row["iteration"]) for row in rows] == expected
    scores = {}
    for row in rows:
        if row["split"] == "valid":
            scores[row["iteration"]] = row["loss"]
    assert scores == pytest.approx(dict(checkpoint.scores), rel=1e-5)
    for row in rows:
        assert row["tokens_seen"] == row["iteration"] * 4 * 32
        bits = row["loss"] / np.log(2)
        assert row["bits_per_byte"] == pytest.approx(bits, rel=0.01)  # some are <eos>
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(checkpoint.seconds, rel=1e-5)


def test_log_says_how_a_step_went(trained):
    checkpoint = main.list_checkpoints(trained)[0]
    for row in rows_of(checkpoint.folder / "log.jsonl"):
        if row["split"] == "train":
            rate = main.learning_rate_at(row["iteration"] - 1, main.settle({}, checkpoint.flags))
            assert row["learning_rate"] == pytest.approx(rate)
            assert row["gradient_norm"] > 0
            assert row["tokens_per_second"] > 0
            assert row["peak_mib"] > 0


def test_log_counts_the_tokens_of_batches_as_they_were(tmp_path, text):
    line = ["--text", text, *TINY, "--steps_per_report", 2, "--save_dir", tmp_path]
    run(*line, "--num_iters", 2)
    changed = ["--identifier", "latest", "--batch_size", 2, "--num_iters", 4]
    run(*changed, "--save_dir", tmp_path)
    counts = [row["tokens_seen"] for row in log_rows(tmp_path)]
    assert counts == [2 * 4 * 8, 2 * 4 * 8 + 2 * 2 * 8]


def test_a_log_that_cannot_be_read_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    content = row_of(10) + "\n"
    path.write_text(content)

    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(main, "read_log", failing)
        log = main.Log(run_at(tmp_path, 0))
    assert path.read_text() == content
    log.append({"iteration": 30, "split": "train", "loss": 0.5})
    assert path.read_text() == content + row_of(30, loss=0.5) + "\n"


@pytest.mark.parametrize("damage", [
    b"",
    b"\0",
    b"\xff",
    b'{"iteration": 15, "spl',
    b'{"iteration": 15}',
    b'{"iteration": 15, "split": null}',
    b'{"iteration": "15", "split": "train"}',
    b'{"iteration": 1e3, "split": "train"}',
    b'{"iteration": true, "split": "train"}',
    b'[15, "train"]',
    b"15",
    b"null",
    b"[" * 100_000,
    b'{"iteration": 15, "split": "train"}\x1c{',
], ids=range(14))  # fmt: skip
def test_a_damaged_row_costs_itself_alone(tmp_path, damage):
    path = tmp_path / "log.jsonl"
    lines = [row_of(10).encode(), damage, row_of(20).encode(), row_of(30).encode()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert iterations_of(path) == [10, 20, 30]
    main.Log(run_at(tmp_path, 20))
    assert iterations_of(path) == [10, 20]


def test_samples_of_a_run(tmp_path, text):
    """Each is what --prompt gives, and none changes the weights."""
    line = ["--text", text, *TINY, "--num_iters", 20, "--steps_per_eval", 10, "--keep", 9]
    asked = ["--sample_prompt", "line", "--sample_prompt=-x", "--sample_tokens", 5]
    run(*line, *asked, "--save_dir", tmp_path / "asked")
    path = run_folder(tmp_path / "asked") / "samples.jsonl"
    rows = rows_of(path)
    places = [(row["iteration"], row["split"], row["prompt"]) for row in rows]
    prompts = ["line", "-x"]
    assert places == [(i, "sample", prompt) for i in (10, 20) for prompt in prompts]
    for row in rows:
        checkpoints = main.list_checkpoints(tmp_path / "asked")
        [named] = [each.id for each in checkpoints if each.iteration == row["iteration"]]
        alone = ["--identifier", named, f"--prompt={row['prompt']}", "--max_tokens", 5]
        out, _ = run(*alone, "--save_dir", tmp_path / "asked")
        assert out == row["text"] + "\n"
    run(*line, "--sample_tokens", 0, "--save_dir", tmp_path / "none")
    assert ids(tmp_path / "none") == ids(tmp_path / "asked")
    assert not list((tmp_path / "none").glob("*/samples.jsonl"))

    # A resumed run inherits the prompts, and takes back no sample that it will not repeat.
    run("--num_iters", 30, "--save_dir", tmp_path / "asked")
    assert [row["iteration"] for row in rows_of(path)] == [10, 10, 20, 20, 30, 30]


def test_samples_that_will_be_repeated_are_cut_off(tmp_path):
    path = tmp_path / "samples.jsonl"
    lines = [row_of(10, "sample"), row_of(20, "sample"), row_of(30, "sample")]
    path.write_text("\n".join(lines) + "\n")
    main.Log(run_at(tmp_path, 20), "samples.jsonl")
    assert path.read_text().splitlines() == lines[:2]


def step_that_gives(**metrics):
    """A step that does nothing and has these metrics."""

    def step(inputs, targets, dropout_rate, keys):
        return {name: mx.array(value) for name, value in metrics.items()}

    return step


def test_a_metric_of_ones_own_is_shown_and_logged(tmp_path, capsys):
    """Its name is one that FORMATS does not know."""
    schedule = dict(learning_rate=0.1, lr_warmup=0)
    trained = run_at(tmp_path, 0, num_iters=40, steps_per_report=10, **schedule)
    reporter = main.Reporter(trained)

    def take_steps(**more):
        metrics = {"loss": 2.0} | more
        for _ in range(10):
            reporter.report_step(trained, main.train_step(trained, step_that_gives(**metrics)))

    take_steps()
    take_steps(my_metric=12.3456)
    take_steps(my_metric=1 / 3)
    lines = capsys.readouterr().out.splitlines()
    reported = [
        "10/40  loss 2.0000",
        r"[\d,.]+ ms/step",
        "lr 1.00e-01",
        r"[\d,]+ tokens/s",
        "perplexity 7.39  ",
    ]
    assert re.match(ANYTHING_MORE.join(reported), lines[0])
    assert re.search(r"  left [\d:]+$", lines[0])
    shown = [re.findall(r"my_metric (\S+)", line) for line in lines]
    assert shown == [[], ["12.35"], ["0.3333"]]

    rows = rows_of(tmp_path / "log.jsonl")
    assert [row.get("my_metric") for row in rows] == [None, 12.3456, 0.333333]
    assert [row["iteration"] for row in rows] == [10, 20, 30]
    assert [row["tokens_seen"] for row in rows] == [320, 640, 960]
    for row in rows:
        assert row["split"] == "train"
        assert row["loss"] == 2
        assert row["learning_rate"] == 0.1
        milliseconds = 1000 * 4 * 8 / row["tokens_per_second"]
        assert row["ms_per_step"] == pytest.approx(milliseconds, rel=1e-4)
        assert "perplexity" not in row, "the loss says it"
        assert "bits_per_byte" not in row, "there is no text to count the bytes of"


def test_a_gradient_that_stays_zero_is_said(tmp_path, capsys):
    """Once, when it is that of two reports in a row."""
    trained = run_at(tmp_path, 0, num_iters=40, steps_per_report=1)
    reporter = main.Reporter(trained)
    said = []
    for norm in (1.0, 0.0, 1e-9, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0):
        step = step_that_gives(loss=2.0, gradient_norm=norm)
        reporter.report_step(trained, main.train_step(trained, step))
        said.append("The gradient stays 0: " in capsys.readouterr().out)
    assert [i for i, is_said in enumerate(said) if is_said] == [4, 8]


def test_a_report_is_the_mean_since_the_last_one(tmp_path):
    trained = run_at(tmp_path, 0, num_iters=40, steps_per_report=2)
    reporter = main.Reporter(trained)
    for loss in (1.0, 2.0, 3.0, 5.0):
        reporter.report_step(trained, main.train_step(trained, step_that_gives(loss=loss)))
    assert [row["loss"] for row in rows_of(tmp_path / "log.jsonl")] == [1.5, 4]


def test_the_first_step_of_a_session_is_not_timed(tmp_path, monkeypatch):
    """It compiles; what it reports as tokens per second counts it nevertheless."""
    clock = iter([0.0, 60.0, 100.0, 100.5])
    monkeypatch.setattr(main.time, "perf_counter", lambda: next(clock))
    trained = run_at(tmp_path, 7, num_iters=40)
    for _ in range(2):
        main.train_step(trained, step_that_gives(loss=1.0))
    assert (trained.iteration, trained.tokens_seen) == (9, 2 * 4 * 8)
    assert (trained.seconds, trained.recent_seconds) == (0.5, 60.5)


class Terminal(io.StringIO):
    """A terminal of this width, 0 if it does not know it, that remembers what is written."""

    def __init__(self, columns):
        super().__init__()
        self.ends = pty.openpty()
        lines = 24 if columns else 0
        fcntl.ioctl(self.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def fileno(self):
        return self.ends[1]

    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [80, 100, 200, 0])
def test_the_progress_bar_fits_the_terminal(tmp_path, columns, monkeypatch):
    """Of a long run, too, and in a terminal that does not know its width.

    It does not jump: when numbers get shorter, the bar stays where it is.
    """
    terminal = Terminal(columns)
    monkeypatch.setattr(main.sys, "stderr", terminal)
    trained = run_at(tmp_path, 0, num_iters=100_000)
    with main.Reporter(trained) as reporter:
        reporter.bar.mininterval = 0  # each step is shown
        for i in range(80):
            values = {"loss": 9.0 + i % 40 / 20, "gradient_norm": 0.5 * (i % 40)}
            metrics = main.train_step(trained, step_that_gives(**values))
            trained.recent_seconds = 0.1 * (40 - i % 40)
            reporter.report_step(trained, metrics)
    for end in terminal.ends:
        os.close(end)
    printed = terminal.getvalue()
    bars = [line for line in re.split(r"[\r\n]+", printed) if "/100,000 |" in line]
    assert len(bars) > 50
    assert max(map(len, bars)) <= (columns or 80)
    ends = [bar.rindex("|") for bar in bars if "loss" in bar]
    assert ends == sorted(ends, reverse=True)
    assert len({*ends[-35:]}) == 1, "of losses above and below 10"
    reported = [r" {5}80/100,000 \|.{8,}\| [\d:]+<[\d:]+  loss 10\.\d+", r"[\d,.]+ ms/step"]
    if columns >= 100:
        reported += [r"lr \S+", r"grad [\d.]+"]
    if columns >= 200:
        reported += [
            r"[\d,]+ tokens/s",
            r"perplexity [\d.]+",
            r"epoch [\d.]+",
            r"peak [\d,]+ MiB",
        ]
    pattern = ANYTHING_MORE.join(reported) + "(?: .*)?$"
    assert re.search(pattern, bars[-1]), bars[-1]


@pytest.mark.parametrize("scores, mark", [
    ([], " (best)"),
    ([[10, 1.5]], " (best)"),
    ([[10, 1.25], [20, 1.5]], ""),
])  # fmt: skip
def test_a_line_of_history(tmp_path, capsys, scores, mark):
    """What is known of an evaluation; the training loss is that of the last report."""
    trained = run_at(tmp_path, 30, scores, num_iters=40, steps_per_report=2)
    trained.seconds = 3723.4
    trained.dataset.train = Namespace(tokens=range(400), num_bytes=800)
    trained.tokens_seen = 500
    reporter = main.Reporter(trained)
    reporter.report_score(trained, 1.375, bool(mark), 2.25)
    for loss in (1.0, 2.0, 4.0):
        reporter.report_step(trained, main.train_step(trained, step_that_gives(loss=loss)))
    reporter.report_score(trained, 1.375, bool(mark), 2.25)
    first, *_, last = capsys.readouterr().out.splitlines()
    bits = 1.375 / math.log(2) * 20 / 40
    score = f"valid 1.3750 nats{mark}, perplexity 3.96 per token, {bits:.4f} bits per byte"
    assert first == f"iteration 30: {score}; epoch 1.25, time 1:02:03, scored in 2.2 s"
    assert last.startswith(f"iteration 33: train 1.5000, {score}; epoch 1.49, time 1:02:")


def test_what_a_checkpoint_was_made_by(trained):
    checkpoint = main.list_checkpoints(trained)[0]
    [stretch] = checkpoint.stretches
    assert stretch["versions"]["MLX"] == mx.__version__
    assert re.fullmatch("[0-9a-f]{40}", stretch["code"])


# ---- The screen ---------------------------------------------------------------------------------


def pasted(out, wanted):
    """The arguments of the command that a line of the output names after `wanted`."""
    [line] = [line for line in out.splitlines() if wanted in line]
    _, _, typed = line.partition(wanted)
    program, script, *arguments = shlex.split(typed)
    assert (program, script) == ("python", "main.py")
    return arguments


def test_start_screen(tmp_path, text):
    line = ["--text", text, *TINY, "--train_tokens", 100, "--num_iters", 2]
    out, _ = run(*line, "--save_dir", tmp_path / "lm")
    folder = run_folder(tmp_path / "lm")
    lines = out.splitlines()
    assert lines[0] == f"run      {folder.name}, from iteration 0 to 2, seed 42"
    assert lines[1].endswith("2 blocks, dim 16, 2 heads (2 key/value heads), relu2 64, context 8")
    splits = r"data     text: [\d,]+ train / [\d,]+ valid tokens; "
    assert re.match(splits + r"byte tokenizer, 257-token vocabulary \(1 special\); in ", lines[2])
    steps = r"steps    4 x 8 tokens, ([\d,]+) per epoch, ([\d.]+) epochs in all; adamw, float32"
    assert re.fullmatch(steps, lines[3]).groups() == ("3", "0.64"), "100 / 32, and 64 / 100"
    assert lines[4] == "rate     0.0003 after 200 warmup steps, which this run does not outlast"
    assert lines[5].startswith("machine  cpu, ")
    assert f"MLX {mx.__version__}, matmuls: " in lines[5]
    assert lines[6].startswith(f"files    {folder}, ")


@pytest.mark.parametrize("given, words", [
    (dict(lr_warmup=0), "0.0003, constant"),
    (dict(lr_warmup=1), "0.0003 after 1 warmup step, constant"),
    (
        dict(learning_rate=5e-3, lr_warmup=20, lr_schedule="linear", min_lr=0, lr_cooldown=0.5),
        "0.005 after 20 warmup steps, constant, then linear to 0 over the last 50%",
    ),
    (dict(lr_schedule="cosine"), "0.0003 after 200 warmup steps, then cosine to 3e-05"),
    (
        dict(lr_schedule="cosine", num_iters=200),
        "0.0003 after 200 warmup steps, which this run does not outlast",
    ),
])  # fmt: skip
def test_the_schedule_in_words(given, words):
    assert main.describe_schedule(flags(**given)) == words


def test_what_the_screen_names_works_when_pasted(tmp_path, text):
    save_dir = tmp_path / "my friend's runs"
    line = ["--text", text, *TINY, "--num_iters", 4, "--save_dir", save_dir]
    out, _ = run(*line)
    name = run_folder(save_dir).name
    assert re.search(r"^4 iterations in 00:\d\d\nRun complete \(4/4\)\.", out, re.M)
    sampling = pasted(out, "To sample: ")
    assert sampling == ["--identifier", name, "--save_dir", str(save_dir), "--inference"]
    reply, _ = run(*sampling, input="line\n")
    assert reply.strip()
    extending = pasted(out, "To train on: ")
    out, _ = run(*extending)
    assert "resumed  with --num_iters 4 -> 8" in out
    assert "Run complete (8/8)." in out

    out, _ = run(*line, "--learning_rate", 0.5)
    assert f"{name}, has --learning_rate 0.0003 instead of 0.5" in out
    out, _ = run(*pasted(out, "To resume that one: "))
    assert f"{name}, from iteration 8 to 8" in out


# ---- Mistakes -----------------------------------------------------------------------------------


