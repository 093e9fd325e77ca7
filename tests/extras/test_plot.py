"""Plots of losses: what is drawn is compared with the log."""

import shutil

import pytest
from conftest import TINY, rows_of, run, run_extra, run_folders, saved

from extras import plot


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
    curves = iter(axis.lines)
    for folder in folders:
        for split in ("train", "valid"):
            rows = rows_of(folder / "log.csv", split)
            curve = next(curves)
            assert curve.get_xydata().tolist() == [[row["iteration"], row["loss"]] for row in rows]
            label = f"{split} {folder.name}"
            if split == "valid":
                best = min(rows, key=lambda row: row["loss"])
                label += f": best {best['loss']:.4f} at {best['iteration']}"
                if count == 2:
                    label += f"\n--seed={saved(trained, folder.name)[0].flags['seed']}"
            assert curve.get_label() == label
    assert next(curves, None) is None


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
    [curve] = axis.lines
    assert curve.get_ydata().tolist() == [row["bits_per_byte"] for row in rows]
