"""Draws the README's picture, for light and dark pages, from extras/versus/nanogpt.csv.

    python docs/picture.py

It writes docs/verdict-light.svg and docs/verdict-dark.svg.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from extras.versus.losses import mean_losses, read_losses, tuning_seeds_of  # noqa: E402
from extras.versus.sequential import RACE_BOUNDS, confidence_interval  # noqa: E402

NAMES = {"before": "GELU", "after": "squared ReLU"}
DEMO_RATE = 1e-3
# Of the text, and of the side "after": GitHub's.
COLORS = {
    "light": {"before": "#1f2328", "after": "#0969da"},
    "dark": {"before": "#e6edf3", "after": "#4493f8"},
}


def draw(losses, colors):
    """The figure; losses: see read_losses."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    figure.suptitle("nanoGPT's CPU demo: does squared ReLU help?", weight="bold")
    left, right = figure.subplots(1, 2)
    best_rates = draw_rates(left, losses, colors)
    pairs = [losses[side][best_rates[side]] for side in NAMES]
    draw_pairs(right, pairs, {*tuning_seeds_of(losses["before"])}, colors)
    left.set_ylabel("validation loss (lower is better)")
    return figure


def draw_rates(axis, losses, colors):
    """The losses of the tuning seeds by learning rate; returns the best rates, {side: text}."""
    best_rates = {}
    for side, name in NAMES.items():
        means = mean_losses(side, "learning_rate", losses[side])
        seeds = tuning_seeds_of(losses[side])
        rates = sorted(means, key=float)
        for rate in rates:
            values = [losses[side][rate][seed] for seed in seeds]
            axis.plot([float(rate)] * len(values), values, "o", color=colors[side], ms=4, alpha=0.6)
        best_rates[side] = best = min(means, key=means.get)
        means_by_rate = [means[rate] for rate in rates]
        axis.plot([*map(float, rates)], means_by_rate, color=colors[side], label=name)
        axis.plot(float(best), means[best], "o", ms=13, mfc="none", color=colors[side])
    axis.axvline(DEMO_RATE, color=colors["before"], ls=":", lw=1)
    axis.set_title("At each learning rate (two seeds;\ncircles: each side's best)", fontsize=11)
    axis.set(xlabel="learning rate", xscale="log")
    axis.set_xticks([1e-3, 2e-3, 4e-3, 8e-3], ["0.001\n(demo)", "0.002", "0.004", "0.008"])
    axis.minorticks_off()
    axis.legend(loc="upper right")
    return best_rates


def draw_pairs(axis, sides, tuning_seeds, colors):
    """The differences of new seeds' losses, [{seed: loss}] before and after, and their mean."""
    seeds = [seed for seed in sides[0] if seed in sides[1] and seed not in tuning_seeds]
    before, after = [np.array([losses[seed] for seed in seeds]) for losses in sides]
    places = range(len(seeds))
    axis.axhline(0, color=colors["before"], lw=1)
    axis.vlines(places, 0, after - before, color=colors["after"], alpha=0.5)
    axis.plot(places, after - before, "o", color=colors["after"], ms=5)
    mean, low, high, _ = confidence_interval(after - before, RACE_BOUNDS[len(seeds)])
    axis.axhline(mean, color=colors["after"], ls="--")
    axis.axhspan(low, high, color=colors["after"], alpha=0.15, lw=0)
    interval = f"{mean:+.3f} (95 %: {low:+.3f} to {high:+.3f})"
    axis.set_title(f"New seeds, each side at its best:\nmean {interval}", fontsize=11)
    axis.set_xticks(places, seeds)
    axis.set(xlabel="random seed", ylabel="squared ReLU minus GELU")


def style_of(text):
    """matplotlib's settings: everything in the color of the page's text, on no background."""
    style = {"font.size": 11, "svg.hashsalt": "verdict", "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        style[name] = text
    return style


if __name__ == "__main__":
    _, all_losses = read_losses(ROOT / "extras" / "versus" / "nanogpt.csv")
    for mode, side_colors in COLORS.items():
        with matplotlib.rc_context(style_of(side_colors["before"])):
            # Without the date, an unchanged picture is an unchanged file.
            path = Path(__file__).with_name(f"verdict-{mode}.svg")
            draw(all_losses, side_colors).savefig(path, transparent=True, metadata={"Date": None})
