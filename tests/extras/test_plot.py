"""Plots of losses: what is drawn is compared with the log."""

import math
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import TINY, log_rows, rows_of, run, run_extra, run_folders, saved

from extras import plot
from extras.plot import losses_of_ngrams


def test_a_file_of_losses(trained, tmp_path):
    _, err = run_extra("plot", tmp_path / "all", "--save_dir", trained)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert f"Plot saved to {tmp_path / 'all.png'}\n" in err


@pytest.mark.parametrize("count", [1, 2])
def test_losses(trained, figures, count):
    folders = run_folders(trained)[-count:]
    line = ["x.png", "--save_dir", str(trained), "--identifier"]
    plot.main([*line, *[folder.name for folder in folders]])
    [axis] = figures[0].axes
    curves = [curve for curve in axis.lines if curve.get_marker() != "v"]
    labels = []
    for folder in folders:
        for split in ("train", "valid"):
            rows = rows_of(folder / "log.csv", split)
            shown = [[row["iteration"], row["loss"]] for row in rows]
            assert curves.pop(0).get_xydata().tolist() == shown
        best = min(row["loss"] for row in rows)
        seed = saved(trained, folder.name)[0].flags["seed"]
        labels.append(f"{folder.name if count == 1 else f' --seed={seed}'}: valid {best:.4f}")
    assert not curves
    assert sorted(text.get_text() for text in axis.texts) == sorted(labels)
    heights = sorted(text.xy[1] for text in axis.texts)
    bottom, top = axis.get_ylim()
    assert all(np.diff(heights) > 0.049 * (top - bottom)), "none lies over another"


def test_where_a_run_was_resumed_is_marked(text, tmp_path, figures):
    line = ["--text", text, *TINY, "--steps_per_report=1", "--save_dir", tmp_path, "--num_iters"]
    for end in (30, 40, 60):
        run(*line, end)
    plot.main(["x.png", "--save_dir", str(tmp_path)])
    [axis] = figures[0].axes
    [marks] = [curve for curve in axis.lines if curve.get_marker() == "v"]
    assert marks.get_xdata().tolist() == [30, 40]
    losses = {row["iteration"]: row["loss"] for row in log_rows(tmp_path, "train")}
    assert marks.get_ydata().tolist() == [losses[30], losses[40]]


@pytest.fixture
def run_of(trained, tmp_path):
    """A function that makes a folder with one run whose log has these lines; returns its log."""

    def run_of(*lines):
        shutil.copytree(run_folders(trained)[0], tmp_path / "lm" / "byte")
        path = tmp_path / "lm" / "byte" / "log.csv"
        path.write_text("\n".join(["iteration,split,loss,seconds,mine", *lines]))
        return tmp_path / "lm"

    return run_of


@pytest.mark.parametrize("row", [
    "20,train,,60,",
    "20,train,nan,60,",
    f"{'9' * 5000},train,1.5,60,",
    "20,train,1.5",
    "\0\0\0,,",
    "x" * 200_000,
], ids=range(6))  # fmt: skip
def test_damaged_rows_are_skipped(row, run_of, figures):
    """And the last line, if it was cut off."""
    folder = run_of("10,train,1.5,60,7", row, "30,train,1.25,180,", "40,train,1")
    plot.main(["x.png", "--save_dir", str(folder)])
    [axis] = figures[0].axes
    assert axis.lines[0].get_xydata().tolist() == [[10, 1.5], [30, 1.25]]


def test_the_first_steps_do_not_take_the_y_axis(run_of, figures):
    folder = run_of(*[f"{i},train,{9 if i < 5 else 1},{i}," for i in range(1, 101)], "")
    plot.main(["x.png", "--save_dir", str(folder)])
    bottom, top = figures[0].axes[0].get_ylim()
    assert 0.5 < bottom < 1 < top < 1.5


def test_losses_of_different_texts_are_in_bits_per_byte(run_of, text, figures):
    folder = run_of("10,train,1.5,60,", "")
    line = ["--text", text, "--tokenizer=char", *TINY, "--num_iters=10", "--save_dir", folder]
    run(*line, "--steps_per_eval=0")
    plot.main(["x.png", "--save_dir", str(folder)])
    [axis] = figures[0].axes
    assert axis.get_ylabel() == "loss (bits per byte)"
    [other] = [each for each in run_folders(folder) if each.name != "byte"]
    rows = rows_of(other / "log.csv", "train")
    curve, _ = axis.lines  # the other one has no mark
    assert curve.get_ydata().tolist() == [row["bits_per_byte"] for row in rows]


# ---- What counting reaches ----------------------------------------------------------------------


def probability(token, history, counts, size):
    """Witten and Bell's, by the definition; history: None before single tokens."""
    if history is None:
        return 1 / size
    shorter = history[1:] if history else None
    lower = probability(token, shorter, counts, size)
    followed = [counts[(*history, other)] for other in range(size)]
    kinds = sum(count > 0 for count in followed)
    if not kinds:
        return lower
    return (followed[token] + kinds * lower) / (sum(followed) + kinds)


def test_ngrams_are_those_of_the_books():
    random = np.random.default_rng(0)
    train = random.integers(0, 7, 300).astype(np.uint16) % 5  # two ids never occur
    valid = random.integers(0, 7, 80).astype(np.uint16)
    found = losses_of_ngrams(train, valid, 7)
    for length, loss in enumerate(found):
        counts = Counter()
        for size in range(1, length + 2):  # what follows the third token, as all have a history
            for end in range(4, len(train) + 1):
                counts[tuple(train[end - size : end])] += 1
        nats = 0.0
        for place in range(3, len(valid)):
            history = tuple(valid[place - length : place])
            nats -= math.log(probability(valid[place], history, counts, 7))
        assert loss == pytest.approx(nats / (len(valid) - 3))


def test_lines_of_ngrams(trained, figures):
    plot.main(["x.png", "--save_dir", str(trained), "--identifier=latest", "--ngrams"])
    [axis] = figures[0].axes
    first, second, third, fourth = [line.get_ydata()[0] for line in axis.lines[-4:]]
    assert first > second > third > fourth, "the text has few words"
    assert sum("-grams, counted: " in text.get_text() for text in axis.texts) == 4
