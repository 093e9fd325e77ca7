"""Makes the README's picture: runs two comparisons, and draws them for light and dark pages.

    python docs/picture.py make FOLDER      some 20 minutes on two cores
    python docs/picture.py draw FOLDER

All that is drawn comes from the record in FOLDER, as extras.versus has written it.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from extras.versus.ledger import NAME, read_results  # noqa: E402

# The README's comparisons: a flag at the recipe's learning rate, and each side at its best one.
SIDES = ["HEAD", "--qk_norm"]
TUNE = ["--tune", "learning_rate=3e-3,4.5e-3,6.5e-3,9e-3"]
RECIPE = ["--", "--config", "first", "--num_iters", "300"]
# Of the text, and of the side "after": GitHub's.
COLORS = {
    "light": ("#1f2328", "#0969da"),
    "dark": ("#e6edf3", "#4493f8"),
}


def make(folder):
    """Makes the comparisons, and writes `folder`/versus/."""
    folder.mkdir()
    for tune in ([], TUNE):
        line = [sys.executable, "-m", "extras.versus", *SIDES, *tune, *RECIPE]
        subprocess.run([*line, "--save_dir", str(folder)], cwd=ROOT, check=True)


def draw(folder):
    """Writes verdict-light.svg and verdict-dark.svg beside this file."""
    plain, tuned = read_results(folder / "versus" / NAME)
    question = "Does it help to normalize queries and keys (--qk_norm)?"
    for mode, (text, blue) in COLORS.items():
        with matplotlib.rc_context(style_of(text)):
            figure = Figure(figsize=(7.5, 3.9), layout="constrained")
            figure.suptitle(question, weight="bold")
            left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
            draw_comparison(left, plain, "both at a learning rate of 3e-3", text, blue)
            draw_comparison(right, tuned, "each at its best of four", text, blue)
            left.set_ylabel("validation loss in nats\n(lower is better)")
            figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
            path = Path(__file__).with_name(f"verdict-{mode}.svg")
            # Without the date, an unchanged picture is an unchanged file.
            figure.savefig(path, transparent=True, metadata={"Date": None})


def style_of(text):
    """matplotlib's settings: everything in the color of the page's text, on no background."""
    style = {"font.size": 11, "svg.hashsalt": "verdict", "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        style[name] = text
    return style


def draw_comparison(axis, result, rates, text, blue):
    """The losses of each seed without and with the flag, and the verdict."""
    before = result["scores_before"]
    after = result["scores_after"]
    seeds = range(len(before))
    axis.vlines(seeds, before, after, color=blue, alpha=0.5)
    axis.plot(seeds, before, "o", color=text, ms=7, label="before: without it")
    axis.plot(seeds, after, "o", color=blue, ms=7, label="after: with it")
    verdict = re.split("[,:]", result["verdict"])[0]
    interval = f"95 % interval {result['low']:+.3f} to {result['high']:+.3f}"
    title = f"{rates}:\n{verdict}, {result['difference']:+.3f}\n{interval}"
    axis.set_title(title, fontsize=11)
    axis.set_xticks(seeds, result["seeds"])
    axis.set(xlabel="random seed")
    axis.margins(x=0.15)


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
