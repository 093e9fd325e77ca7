"""Makes the README's picture: runs the comparison, and draws it for light and dark pages.

    python docs/picture.py make FOLDER      some 12 minutes on two cores
    python docs/picture.py draw FOLDER

All that is drawn comes from the record in FOLDER, as extras.versus has written it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from extras.versus.ledger import NAME, read_results  # noqa: E402

# The README's comparison.
SIDES = ["HEAD", "--qk_norm"]
TUNED = "--tune learning_rate=2e-3,3e-3,4.5e-3,6.5e-3,9e-3 -- --config first --num_iters 300"
# Of the text, and of the side "after": GitHub's.
COLORS = {
    "light": ("#1f2328", "#0969da"),
    "dark": ("#e6edf3", "#4493f8"),
}


def make(folder):
    """Makes the comparison, and writes `folder`/versus/."""
    folder.mkdir()
    line = [sys.executable, "-m", "extras.versus", *SIDES, *TUNED.split()]
    subprocess.run([*line, "--save_dir", str(folder)], cwd=ROOT, check=True)


def draw(folder):
    """Writes verdict-light.svg and verdict-dark.svg beside this file."""
    [result] = read_results(folder / "versus" / NAME)
    for mode, (text, blue) in COLORS.items():
        with matplotlib.rc_context(style_of(text)):
            figure = Figure(figsize=(7, 3.2), layout="constrained")
            draw_comparison(figure.subplots(), result, text, blue)
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


def draw_comparison(axis, result, text, blue):
    """The losses of each seed without and with the flag, and the verdict."""
    before = result["scores_before"]
    after = result["scores_after"]
    seeds = range(len(before))
    axis.vlines(seeds, before, after, color=blue, alpha=0.5)
    axis.plot(seeds, before, "o", color=text, ms=8, label="before: without it")
    axis.plot(seeds, after, "o", color=blue, ms=8, label="after: with it")
    verdict, _, _ = result["verdict"].partition(",")
    title = (
        f"mean difference {result['difference']:+.3f}\n"
        f"95 % interval {result['low']:+.3f} to {result['high']:+.3f}\n"
        f"verdict: {verdict}\n"
    )
    axis.legend(title=title, fontsize=11, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_xticks(seeds, result["seeds"])
    axis.set(xlabel="random seed", ylabel="validation loss in nats\n(lower is better)")
    axis.margins(x=0.15)
    question = "Does it help to normalize queries and keys (--qk_norm)?"
    axis.set_title(question, loc="left", weight="bold")


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
