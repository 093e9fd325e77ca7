"""Plots of losses: what is drawn is compared with the log."""

import itertools
import math
from argparse import Namespace

import main
import pytest
from conftest import TINY, rows_of, run, run_extra, run_folders

from extras import plot


def written(iteration, loss, seconds="", bits_per_byte="", mine=""):
    """The line of a log that has these values of a step and no others."""
    return f"{iteration},train,{loss},{seconds},{bits_per_byte},{mine}"


def make_log(folder, *lines):
    """Writes these lines into the log of the run in a folder, to be made; returns its path."""
    folder.mkdir()
    path = folder / "log.csv"
    path.write_text("\n".join(["iteration,split,loss,seconds,bits_per_byte,mine", *lines]))
    return path


def points_of(axis):
    return [line.get_xydata().tolist() for line in axis.lines]


def test_a_file_of_losses(trained, tmp_path):
    _, err = run_extra("plot", tmp_path / "all.png", "--save_dir", trained)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert "all.png" in err


@pytest.mark.parametrize("count", [0, 1, 2])
def test_losses(trained, figures, count):
    folders = run_folders(trained)
    assert len(folders) == 2
    if count:
        folders = folders[-count:]
    line = ["x.png", "--save_dir", str(trained)]
    if count:
        line += ["--identifier", *[folder.name for folder in folders]]
    plot.main(line)
    by_iteration, by_minute = figures[0].axes
    wanted = list(itertools.product(folders, ["train", "valid"]))
    curves = [line for line in by_iteration.lines if line.get_marker() != "*"]
    labels = []
    for folder, split in wanted:
        label = f"{split} {folder.name}"
        if split == "valid":
            best = best_of(folder)
            label += f": best {best['loss']:.4f} at {best['iteration']}"
            if len(folders) == 2:
                label += f"\n--seed={seed_of(folder)}"
        labels.append(label)
    assert [line.get_label() for line in curves] == labels
    for axis, column, unit in ((by_iteration, "iteration", 1), (by_minute, "seconds", 60)):
        curves = [line for line in axis.lines if line.get_marker() != "*"]
        stars = [line for line in axis.lines if line.get_marker() == "*"]
        for star, folder in zip(stars, folders, strict=True):
            best = best_of(folder)
            assert star.get_xydata().tolist() == [[best[column] / unit, best["loss"]]]
        for line, (folder, split) in zip(curves, wanted, strict=True):
            rows = rows_of(folder / "log.csv", split)
            points = [[row[column] / unit, row["loss"]] for row in rows]
            assert points
            assert line.get_xydata().tolist() == points


def best_of(folder):
    """The row of the best score in a run's log."""
    return min(rows_of(folder / "log.csv", "valid"), key=lambda row: row["loss"])


def seed_of(folder):
    [seed] = {each.flags["seed"] for each in main.list_run(folder)}
    return seed


def made_by(folder, sha256="0" * 64, **flags):
    """What plot_runs reads of a run's checkpoint."""
    flags = main.DEFAULTS | {"tokenizer": "byte"} | flags
    return Namespace(folder=folder, run=folder.name, flags=flags, tokens_sha256={"train": sha256})


def test_a_run_whose_name_begins_with_an_underscore(tmp_path, figures):
    """Whoever renames it so wants to see it in the legend, too."""
    make_log(tmp_path / "_x", written(10, 1.5, 60), "")
    plot.plot_runs([made_by(tmp_path / "_x")], "x.png")
    [legend] = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["train _x", "valid _x"]


@pytest.mark.parametrize("cut", [
    "20,",
    "20,train,0.5",
    written(20, 0.5, 6),
])  # fmt: skip
def test_a_log_whose_last_line_was_cut_off(tmp_path, figures, cut):
    make_log(tmp_path / "run", written(10, 1.5, 60), cut)
    (tmp_path / "no log").mkdir()
    plot.plot_runs([made_by(tmp_path / "run"), made_by(tmp_path / "no log")], "x.png")
    by_iteration, by_minute = figures[0].axes
    assert points_of(by_iteration) == [[[10, 1.5]], []]
    assert points_of(by_minute) == [[[1, 1.5]], []]


@pytest.mark.parametrize("row", [
    written(20, "", 60),
    written(20, 1.5, math.nan),
    written(20, 1e308, 60),
    written("9" * 5000, 1.5, 60),
    "\0\0\0,,",
    "x" * 200_000,
])  # fmt: skip
def test_damaged_rows_are_skipped(tmp_path, row, figures):
    path = make_log(tmp_path / "run", written(10, 1.5, 60), row, written(30, 1.25, 180), "")
    (tmp_path / "folder" / "log.csv").mkdir(parents=True)
    runs = [made_by(tmp_path / "run"), made_by(tmp_path / "folder")]
    plot.plot_runs(runs, "x.png")
    by_iteration, by_minute = figures[0].axes
    assert points_of(by_iteration)[0] == [[10, 1.5], [30, 1.25]]
    assert points_of(by_minute)[0] == [[1, 1.5], [3, 1.25]]
    columns = plot.columns_of(path, "train", "loss")
    assert columns.tolist() == [[10, 30], [60, 180], [1.5, 1.25]]


def test_a_log_with_a_metric_of_ones_own(tmp_path, figures):
    make_log(tmp_path / "run", written(10, 1.5, 60, mine=7), "")
    plot.plot_runs([made_by(tmp_path / "run")], "x.png")
    by_iteration, _ = figures[0].axes
    assert points_of(by_iteration)[0] == [[10, 1.5]]


SHA256S = ["1" * 64, "2" * 64]


@pytest.mark.parametrize("kinds, sha256s, column", [
    (["byte", "byte"], SHA256S, "loss"),
    (["word", "word"], ["1" * 64] * 2, "loss"),
    (["word", "word"], SHA256S, "bits_per_byte"),  # words of two texts
    (["byte", "char"], SHA256S, "bits_per_byte"),
])  # fmt: skip
def test_losses_of_different_tokenizers_are_in_bits_per_byte(
    tmp_path, figures, kinds, sha256s, column
):
    runs = []
    for i, (kind, sha256) in enumerate(zip(kinds, sha256s)):
        folder = tmp_path / f"run-{i}"
        make_log(folder, written(10, 1.5, 60, bits_per_byte=2.5), written(20, 1.25, 120), "")
        runs.append(made_by(folder, sha256, tokenizer=kind))
    plot.plot_runs(runs, "x.png")
    points = [[10, 1.5], [20, 1.25]] if column == "loss" else [[10, 2.5]]
    by_iteration, _ = figures[0].axes
    assert points_of(by_iteration) == [points, [], points, []]
    assert ("bits per byte" in by_iteration.get_ylabel()) == (column != "loss")


def test_the_first_steps_do_not_take_the_y_axis(tmp_path, figures):
    """Also of runs of different lengths, and however the flags are spelled in the legend."""
    runs = []
    for name, length in (("long", 1000), ("short", 100)):
        rows = [written(i, 1.0 + 8.0 * (i <= 0.04 * length), i) for i in range(1, length + 1)]
        make_log(tmp_path / name, *rows, "")
        runs.append(made_by(tmp_path / name, text=[f"/{name}/$x^$/\x1b[1m\udc80"]))
    plot.plot_runs(runs, tmp_path / "x.png")
    bottom, top = figures[0].axes[0].get_ylim()
    assert 0.5 < bottom < 1 < top < 1.5
    figures[0].savefig(tmp_path / "x.svg")
    assert "\x1b" not in (tmp_path / "x.svg").read_text()


def test_a_run_that_has_not_reported_yet(tmp_path, text):
    folder = ["--save_dir", tmp_path / "lm"]
    run("--text", text, *TINY, "--num_iters", 9, *folder)
    _, err = run_extra("plot", "x.png", *folder, status=2, cwd=tmp_path)
    assert f"the runs in {tmp_path / 'lm'} have reported nothing yet" in err.splitlines()[-1]
    run("--num_iters", 10, *folder)
    run_extra("plot", "x.png", *folder, cwd=tmp_path)


def test_a_name_without_an_ending(trained, tmp_path):
    _, err = run_extra("plot", tmp_path / "x", "--save_dir", trained)
    assert f"Plot saved to {tmp_path / 'x.png'}\n" in err
    assert (tmp_path / "x.png").exists()
