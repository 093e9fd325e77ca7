"""Makes the picture of the README: runs what it shows, and draws it for light and dark pages.

    python docs/picture.py make FOLDER      some 15 minutes on two cores
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
# An edit of Muon in main.py, the README's example.
EDIT = ("momentum=0.95):", "momentum=0.9):")
# Its two comparisons: the README's, and one on other seeds that trains for longer.
COMPARED = {
    "300 steps": "HEAD -- --config first --num_iters 300",
    "800 steps": "HEAD --seeds 142 -- --config first",
}
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
    for arguments in COMPARED.values():
        line = [sys.executable, "-m", "extras.versus", *arguments.split()]
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
    """Writes proof-light.svg and proof-dark.svg beside this file."""
    for mode, (text, green, blue) in COLORS.items():
        with matplotlib.rc_context(style_of(text)):
            figure = Figure(figsize=(9, 3.6), layout="constrained")
            left, right = figure.subplots(1, 2, width_ratios=[5, 4])
            draw_kills(left, folder, text, green)
            draw_comparisons(right, folder, text, blue)
            path = Path(__file__).with_name(f"proof-{mode}.svg")
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
    axis.set(xlabel="step", ylabel="training loss (nats/token)")
    is_same = newest(undisturbed).id == newest(killed).id
    verdict = "same weights" if is_same else "other weights"
    axis.set_title(f"kill -9, rerun: {verdict}", loc="left", weight="bold")


def draw_comparisons(axis, folder, text, blue):
    """What an edit did to the loss of each seed, and where the mean may lie."""
    axis.axhline(0, color=text, lw=1)
    ticks = {}  # {place: seed}
    results = read_results(folder / "versus" / NAME)[-len(COMPARED) :]
    for title, result in zip(COMPARED, results, strict=True):
        differences = np.subtract(result["scores_after"], result["scores_before"])
        first = len(ticks) + bool(ticks)  # a gap between the two
        places = range(first, first + len(differences))
        ticks |= zip(places, result["seeds"])
        axis.vlines(places, 0, differences, color=blue, alpha=0.5)
        axis.plot(places, differences, "o", color=blue, ms=7)
        ends = [places[0] - 0.4, places[-1] + 0.4]
        axis.plot(ends, [differences.mean()] * 2, color=blue, lw=1, ls="--")
        axis.fill_between(ends, result["low"], result["high"], color=blue, alpha=0.2, lw=0)
        verdict = result["verdict"].lower().rstrip(".")
        axis.text(ends[0], 0.002, f"{title}: {verdict}")
    labels = ["a pair: after minus before", "mean", "95 % interval of the mean"]
    axis.legend(axis.lines[1:3] + axis.collections[1:2], labels, fontsize=10, loc="lower center")
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set(xlabel="seed", ylabel="change of validation loss (nats/token)")
    axis.set_ylim(-0.08, 0.008)
    axis.set_title("momentum 0.95 to 0.9", loc="left", weight="bold")


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
