"""Makes the README's pictures: runs what they show, and draws them for light and dark pages.

    python docs/picture.py make FOLDER      some 20 minutes on two cores
    python docs/picture.py draw FOLDER

All that is drawn comes from the logs and records in FOLDER, as main.py has written them.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402 (before MLX: it chooses the BLAS)

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from extras.versus.ledger import NAME, read_results  # noqa: E402

KILLED = "--dataset python --preset tiny --batch_size 8 --num_iters 300 --steps_per_eval 50"
KILLS = 5
# The README's edit of main.py, and its comparison.
EDIT = ("return self.momentum * v + (1 - self.momentum) * gradient", "return v")
COMPARED = "HEAD --tune learning_rate=2e-3,3e-3,4.5e-3 -- --config first --num_iters 300"
# Of the text, of killed runs, of an experiment: GitHub's.
COLORS = {
    "light": ("#1f2328", "#1a7f37", "#0969da"),
    "dark": ("#e6edf3", "#3fb950", "#4493f8"),
}


# ---- Runs ---------------------------------------------------------------------------------------


def make(folder):
    """Writes undisturbed/, killed/, kills.json and versus/."""
    folder.mkdir()
    subprocess.run(command(folder / "undisturbed"), check=True)
    kills = train_and_kill(folder / "killed")
    (folder / "kills.json").write_text(json.dumps(kills))
    edited = folder / "edited"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(edited)], check=True)
    source = (edited / "main.py").read_text("utf-8")
    assert source.count(EDIT[0]) == 1
    (edited / "main.py").write_text(source.replace(*EDIT), "utf-8")
    line = [sys.executable, "-m", "extras.versus", *COMPARED.split()]
    subprocess.run([*line, "--save_dir", str(folder)], cwd=edited, check=True)


def command(save_dir):
    """A command that trains, and reports each step at once."""
    line = [sys.executable, "-u", str(ROOT / "main.py"), *KILLED.split()]
    return [*line, "--steps_per_report", "1", "--save_dir", str(save_dir)]


def train_and_kill(save_dir):
    """Trains, and kills each process but the last at a random step; returns these steps."""
    chance = random.Random(0)
    kills = sorted(chance.sample(range(60, 300), KILLS))
    for step in kills:
        process = subprocess.Popen(command(save_dir), stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(f"{step}/"):
                process.kill()
        process.wait()
    subprocess.run(command(save_dir), check=True)
    return kills


# ---- Drawing ------------------------------------------------------------------------------------


def draw(folder):
    """Writes verdict-MODE.svg and resume-MODE.svg beside this file, MODE being light or dark."""
    for mode, (text, green, blue) in COLORS.items():
        for name, draw_part, color in [
            ("verdict", draw_comparison, blue),
            ("resume", draw_kills, green),
        ]:
            with matplotlib.rc_context(style_of(text)):
                figure = Figure(figsize=(7, 3.2), layout="constrained")
                draw_part(figure.subplots(), folder, text, color)
                path = Path(__file__).with_name(f"{name}-{mode}.svg")
                # Without the date, an unchanged picture is an unchanged file.
                figure.savefig(path, transparent=True, metadata={"Date": None})


def style_of(text):
    """matplotlib's settings: everything in the color of the page's text, on no background."""
    style = {"font.size": 11, "svg.hashsalt": "proof", "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        style[name] = text
    return style


def draw_kills(axis, folder, text, green):
    """The losses of a run that was killed again and again, on those of one never touched."""
    undisturbed = folder / "undisturbed"
    killed = folder / "killed"
    steps, losses = zip(*training_losses(undisturbed))
    axis.plot(steps, losses, color=text, lw=5, alpha=0.3)
    steps, losses = zip(*training_losses(killed))
    axis.plot(steps, losses, color=green, lw=1)
    kills = json.loads((folder / "kills.json").read_text())
    loss_at = dict(zip(steps, losses))
    axis.plot(kills, [loss_at[step] for step in kills], "x", color=text, ms=9, mew=2.5)
    labels = [f"never touched: {newest(undisturbed).id[:12]}"]
    labels.append(f"killed {len(kills)} times (x): {newest(killed).id[:12]}")
    axis.legend(labels, title="SHA1 of the last weights", fontsize=10, handlelength=1)
    axis.set_ylim(top=7)  # the legend lies above the curve
    axis.set(xlabel="step", ylabel="training loss in nats\n(lower is better)")
    is_same = newest(undisturbed).id == newest(killed).id
    verdict = "same weights" if is_same else "other weights"
    axis.set_title(f"Killed and run again: {verdict}", loc="left", weight="bold")


def draw_comparison(axis, folder, text, blue):
    """What the edit did to the loss of each seed, and where the mean may lie."""
    [result] = read_results(folder / "versus" / NAME)
    differences = np.subtract(result["scores_after"], result["scores_before"])
    seeds = range(len(differences))
    axis.axhline(0, color=text, lw=1)
    axis.vlines(seeds, 0, differences, color=blue, alpha=0.5)
    axis.plot(seeds, differences, "o", color=blue, ms=8)
    ends = [-0.4, len(differences) - 0.6]
    axis.plot(ends, [differences.mean()] * 2, color=blue, lw=1, ls="--")
    axis.fill_between(ends, result["low"], result["high"], color=blue, alpha=0.2, lw=0)
    labels = ["one seed, trained with and without the edit", "mean", "95 % interval of the mean"]
    handles = axis.lines[1:] + axis.collections[1:]
    axis.legend(handles, labels, fontsize=10, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_xticks(seeds, result["seeds"])
    axis.set(xlabel="seed", ylabel="change of the loss in nats\n(below 0 is better)")
    verdict = result["verdict"].rstrip(".")
    axis.set_title(f"Muon without Nesterov's momentum: {verdict}", loc="left", weight="bold")


def newest(save_dir):
    """The checkpoint saved last in a folder of runs."""
    return main.list_checkpoints(save_dir)[0]


def training_losses(save_dir):
    """(step, loss) of each report of the only run in a folder."""
    rows = main.read_log(newest(save_dir).folder / "log.csv")
    return [(int(row["iteration"]), float(row["loss"])) for row in rows if row["split"] == "train"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["make", "draw"])
    parser.add_argument("folder", type=Path)
    flags = parser.parse_args()
    if flags.part == "make":
        make(flags.folder.absolute())
    draw(flags.folder.absolute())
