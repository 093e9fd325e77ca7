"""Makes the picture of the README: runs what it shows, and draws it for light and dark pages.

    python .github/picture.py make FOLDER --nanogpt CLONE    about 10 minutes on two cores
    python .github/picture.py draw FOLDER --processor NAME
    python .github/picture.py compare FOLDER --nanogpt CLONE --dataset python

CLONE is one of nanoGPT; it needs PyTorch in the environment. All that is drawn comes from the logs
in FOLDER, of which each run's log.csv is as main.py has written it. `compare` only trains the
recipe `characters`, and nanoGPT's demo, as it is and tuned, on a dataset, and prints their
validation losses.
"""

import argparse
import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Taken before main.py changes how threads wait: nanoGPT's steps would take 1.4 times as long.
ENVIRONMENT = dict(os.environ)

import main  # noqa: E402

from datasets import load_dataset  # noqa: E402

EVERY = 200  # steps between nanoGPT's evaluations
KILLED = "--dataset python --preset tiny --batch_size 8 --num_iters 300 --steps_per_eval 50"
RECIPE = "--config characters --steps_per_eval 92"
# nanoGPT's own command for a CPU, with more batches for each estimate and more of these.
DEMO = (
    "config/train_shakespeare_char.py --device=cpu --compile=False "
    f"--eval_iters=200 --eval_interval={EVERY} --log_interval=1 --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
# What scored best on Tiny Shakespeare in eleven runs of about 90 s, with learning rates of 1e-3 to
# 1e-2, contexts of 64 to 256, and batches of 6 to 18. On a CPU, compiled steps took as long.
TUNED = "--learning_rate=6e-3 --min_lr=0.0"
# nanoGPT's two runs, by the name of the log.
NANOGPT = {"nanogpt": DEMO, "nanogpt-tuned": f"{DEMO} {TUNED}"}
KILLS = 5
# Of the text, of killed runs, of nanoGPT's, of ours: GitHub's.
COLORS = {
    "light": ("#1f2328", "#1a7f37", "#0969da", "#bc4c00"),
    "dark": ("#e6edf3", "#3fb950", "#4493f8", "#f0883e"),
}


# ---- Runs ---------------------------------------------------------------------------------------


def make(folder, nanogpt, mirror):
    """Writes undisturbed/, killed/, kills.json, and what `compare` writes."""
    folder.mkdir()
    subprocess.run(command(KILLED, folder / "undisturbed"), check=True)
    kills = train_and_kill(folder / "killed")
    (folder / "kills.json").write_text(json.dumps(kills))
    compare(folder, "tinyshakespeare", nanogpt, mirror)


def compare(folder, dataset, nanogpt, mirror):
    """Trains each model on a dataset's characters, one by one: our folder, nanoGPT's logs."""
    data_dir = folder / "data"
    place = ["--mirror", mirror] if mirror else []
    prepare_characters(nanogpt / "data" / f"{dataset}_char", dataset, data_dir, mirror)
    ours = command(f"{RECIPE} --dataset {dataset}", folder / "ours")
    subprocess.run([*ours, "--data_dir", str(data_dir), *place], check=True)
    for name, flags in NANOGPT.items():
        theirs = [sys.executable, "train.py", *flags.split(), f"--dataset={dataset}_char"]
        with open(folder / f"{name}.txt", "w") as log:
            subprocess.run(theirs, cwd=nanogpt, env=ENVIRONMENT, stdout=log, check=True)
    for name, points in results_of(folder).items():
        seconds, loss = points[-1]
        print(f"{name}: {loss:.4f} nats/character after {seconds:.1f} s of training")


def results_of(folder):
    """(seconds, loss) of each evaluation of each model."""
    theirs = {name: nanogpt_losses(folder / f"{name}.txt") for name in NANOGPT}
    return theirs | {"ours": our_losses(folder / "ours")}


def command(flags, save_dir):
    """A command that trains, and reports each step at once."""
    line = [sys.executable, "-u", str(ROOT / "main.py"), *flags.split()]
    return [*line, "--steps_per_report", "1", "--save_dir", str(save_dir)]


def train_and_kill(save_dir):
    """Trains, and kills each process but the last at a random step; returns these steps."""
    chance = random.Random(0)
    kills = sorted(chance.sample(range(60, 300), KILLS))
    for step in kills:
        process = subprocess.Popen(command(KILLED, save_dir), stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(f"{step}/"):
                process.kill()
        process.wait()
    subprocess.run(command(KILLED, save_dir), check=True)
    return kills


def prepare_characters(folder, name, data_dir, mirror):
    """A dataset's characters, as nanoGPT's prepare.py would write them."""
    folder.mkdir(exist_ok=True)
    dataset = load_dataset(name, data_dir, tokenizer="char", mirror=mirror)
    for part, split in (("train", dataset.train), ("val", dataset.valid)):
        np.asarray(split.tokens, np.uint16).tofile(folder / f"{part}.bin")
    with open(folder / "meta.pkl", "wb") as file:
        pickle.dump({"vocab_size": dataset.tokenizer.vocab_size}, file)


# ---- Drawing ------------------------------------------------------------------------------------


def draw(folder, processor):
    """Writes proof-light.svg and proof-dark.svg beside this file."""
    for mode, colors in COLORS.items():
        text, green, blue, orange = colors
        with matplotlib.rc_context(style_of(text)):
            figure = Figure(figsize=(9, 3.6), layout="constrained")
            left, right = figure.subplots(1, 2, width_ratios=[5, 4])
            draw_proof(left, folder, text, green)
            draw_comparison(right, folder, processor, blue, orange)
            path = Path(__file__).with_name(f"proof-{mode}.svg")
            # Without the date, an unchanged picture is an unchanged file.
            figure.savefig(path, transparent=True, metadata={"Date": None})


def style_of(text):
    """matplotlib's settings: everything in the color of the page's text, on no background."""
    style = {"font.size": 11, "svg.hashsalt": "proof"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        style[name] = text
    return style


def draw_proof(axis, folder, text, green):
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
    style = {"fontsize": 10, "handlelength": 1, "frameon": False}
    axis.legend(labels, title="SHA1 of the last weights", **style)
    axis.set_ylim(top=7)  # the legend lies above the curve
    axis.set(xlabel="step", ylabel="training loss (nats/byte)")
    is_same = newest(undisturbed).id == newest(killed).id
    verdict = "same weights" if is_same else "other weights"
    axis.set_title(f"kill -9, rerun: {verdict}", loc="left", weight="bold")


def draw_comparison(axis, folder, processor, blue, orange):
    """Validation losses against seconds of training, on two cores of a processor."""
    results = results_of(folder)
    # The labels lie right of the curves' ends, where no curve is.
    for name, title, color, shift in (
        ("nanogpt", "nanoGPT's CPU demo, {}:", blue, (8, -4)),
        ("nanogpt-tuned", "its learning rate tuned:", blue, (8, -4)),
        ("ours", "ours, tuned, {}:", orange, (8, 4)),
    ):
        seconds, losses = zip(*results[name])
        axis.plot(seconds, losses, "o-", color=color, lw=2, ms=5)
        place = {"xytext": shift, "textcoords": "offset points"}
        words = f"{title.format(size_of(folder, name))} {losses[-1]:.2f}"
        axis.annotate(words, (seconds[-1], losses[-1]), color=color, weight="bold", **place)
    axis.set_xlabel(f"seconds of training, two {processor} cores")
    axis.set_ylabel("validation loss (nats/character)")
    axis.set_ylim(bottom=1.45)
    axis.set_title("Tiny Shakespeare by characters", loc="left", weight="bold")


def size_of(folder, name):
    """A model's number of parameters, such as "0.8M"."""
    if name == "ours":
        return f"{newest(folder / name).parameters / 1e6:.1f}M"
    printed = (folder / f"{name}.txt").read_text()
    [millions] = re.findall(r"number of parameters: ([\d.]+)M", printed)
    return f"{float(millions):.1f}M"


def newest(save_dir):
    """The checkpoint saved last in a folder of runs."""
    return main.list_checkpoints(save_dir)[0]


def rows_of(save_dir, split):
    """The rows of a split in the log of the only run in a folder."""
    rows = main.read_log(newest(save_dir).folder / "log.csv")
    return [row for row in rows if row["split"] == split]


def training_losses(save_dir):
    return [(int(row["iteration"]), float(row["loss"])) for row in rows_of(save_dir, "train")]


def our_losses(save_dir):
    """(seconds, loss) of each evaluation."""
    return [(float(row["seconds"]), float(row["loss"])) for row in rows_of(save_dir, "valid")]


def nanogpt_losses(log):
    """The same, from what nanoGPT prints; its first step, which warms up, does not count."""
    points = []
    seconds = 0.0
    for line in log.read_text().splitlines():
        step = re.match(r"iter (\d+): loss .*, time ([\d.]+)ms", line)
        score = re.match(r"step (\d+): train loss .*, val loss ([\d.]+)", line)
        # Its time of a step after an evaluation includes the evaluation.
        if step and int(step[1]) % EVERY:
            seconds += float(step[2]) / 1000
        if score and int(score[1]):
            points.append((seconds * EVERY / (EVERY - 1), float(score[2])))
    return points


def command_line():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["make", "draw", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nanogpt", type=Path, help="a clone of it")
    parser.add_argument("--dataset", default="tinyshakespeare", help="what `compare` trains on")
    parser.add_argument("--mirror", help="of the dataset, as for main.py")
    parser.add_argument("--processor", default="CPU", help="its name in the picture")
    flags = parser.parse_args()
    folder = flags.folder.absolute()
    if flags.part == "compare":
        folder.mkdir()
        compare(folder, flags.dataset, flags.nanogpt, flags.mirror)
        return
    if flags.part == "make":
        make(folder, flags.nanogpt, flags.mirror)
    draw(folder, flags.processor)


if __name__ == "__main__":
    command_line()
