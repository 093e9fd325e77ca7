"""What the rules of extras.versus do, by simulation: no run is trained.

    python tests/nightly/simulate_verdicts.py     20,000 comparisons and 4,000 nights
    python tests/nightly/simulate_verdicts.py --tries 2000 --nights 40

The differences of pairs are drawn from a distribution, and decided by the functions that
extras.versus itself uses. First the race, also of tuned sides; then --gate, and nights in which a
program tries a hundred edits one after the other, as most such edits are: 60 do nothing, 30 harm,
10 help.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from extras.versus.sequential import RACE_BOUNDS, SCREEN_BOUNDS, RunScore, decide

SPREAD = 0.008  # of the differences of pairs, in nats/token, as measured for the recipe `first`
NANOGPT_SPREAD = 0.0125  # the same in nanoGPT's demo, by extras/versus/nanogpt.csv
# How many edits of a night have which effect, in nats/token: below zero is better.
NIGHT = {0.0: 60, 0.01: 30, -0.005: 4, -0.01: 4, -0.02: 2}
# Mean losses of a model at six learning rates: of "before" in extras/versus/nanogpt.csv.
LOSSES_BY_RATE = np.array([1.9004, 1.7961, 1.7747, 1.7697, 1.7677, 1.7744])

# Differences of pairs, with a mean of 0 and a standard deviation of 1.
DRAWN = {
    "normal": lambda generator, count: generator.standard_normal(count),
    "heavy-tailed": lambda generator, count: generator.standard_t(3, count) / 3**0.5,
    "skewed": lambda generator, count: generator.exponential(1, count) - 1,  # few are much worse
}


def decided(bounds, effect, draw):
    """The outcome of pairs whose differences have a mean of `effect` and a spread of 1.

    bounds: see `decide`; draw: a function of the number of pairs. Returns the outcome with the
    number of pairs that it took.
    """
    pairs = []
    for i, difference in enumerate(effect + draw(max(bounds))):
        pairs.append((RunScore(f"before {i}", 4.0), RunScore(f"after {i}", 4.0 + difference)))
        outcome = decide(bounds, None, pairs)
        if outcome:
            return outcome, len(pairs)


def kept(effect, draw):
    """Whether --gate keeps an edit of this effect, and how many runs that took."""
    outcome, pairs = decided(SCREEN_BOUNDS, effect, draw)
    runs = pairs  # the side before was trained for an earlier edit
    if outcome == "promising":
        outcome, pairs = decided(RACE_BOUNDS, effect, draw)
        runs += 2 * pairs
    return outcome == "helped", runs


def show_races(kind, draw, tries):
    """Prints how often a race calls edits of some effects helpful or harmful."""
    for effect in (0, -0.01, -0.02):
        results = [decided(RACE_BOUNDS, effect / NANOGPT_SPREAD, draw) for _ in range(tries)]
        outcomes, pairs = zip(*results)
        shares = [f"{name} {outcomes.count(name) / tries:.1%}" for name in ("helped", "hurt")]
        shown = f"{', '.join(shares)}; {np.mean(pairs):.1f} pairs"
        print(f"{kind}: effect {effect:+}, spread {NANOGPT_SPREAD}: {shown}", flush=True)


def bowl(cost, offset=0):
    """Mean losses at four rates, a step apart; a step from the best rate costs `cost`.

    offset: by how many steps the best rate lies beyond the second one.
    """
    return cost * (np.arange(-1, 3) - offset) ** 2


def tuned_outcome(spread, losses, num_seeds, draw):
    """The outcome of a race at each side's best rate; losses: means of (before, after), [2, rates].

    By chance, a side chooses a worse rate.
    """
    noise = draw(2 * len(losses[0]) * num_seeds) * spread / 2**0.5
    means = losses + noise.reshape(2, -1, num_seeds).mean(axis=2)
    before, after = np.take_along_axis(losses, means.argmin(axis=1)[:, None], axis=1).flatten()
    outcome, _ = decided(RACE_BOUNDS, (after - before) / spread, draw)
    return outcome


def show_tuned_races(kind, draw, tries):
    """Prints what races call sides, each at its best rate."""
    six, four = LOSSES_BY_RATE, LOSSES_BY_RATE[1:5]
    cases = [
        ("six rates, spread of `first`", SPREAD, (six, six), 2),
        ("six rates, spread of `first`, 4 seeds choose", SPREAD, (six, six), 4),
    ]
    for effect in (0, -0.01, -0.02):
        losses = (four, four + effect)
        cases.append(
            (f"four rates, nanoGPT's spread, effect {effect:+}", NANOGPT_SPREAD, losses, 2)
        )
    for cost in (0.2, 0.4, 0.8, 1.6, 2.4):  # times the spread
        for offset in (0, 0.5):
            losses = (bowl(cost), bowl(cost, offset))
            name = f"a step costs {cost} spreads, best rates {offset} steps apart"
            cases.append((name, 1, losses, 2))
    for name, spread, losses, num_seeds in cases:
        losses = np.array(losses)
        outcomes = [tuned_outcome(spread, losses, num_seeds, draw) for _ in range(tries)]
        shares = {outcome: outcomes.count(outcome) / tries for outcome in ("helped", "hurt")}
        # Twice: on other seeds, tuned again.
        shown = [f"{outcome} {p:.1%} (twice: {p**2:.2%})" for outcome, p in shares.items()]
        print(f"{kind}: {name}: {', '.join(shown)}", flush=True)


def show_nights(kind, draw, nights):
    """Prints what --gate keeps in nights of a hundred edits."""
    false = np.zeros(nights)  # useless or harmful edits that are kept, by night
    total = 0
    for effect, count in NIGHT.items():
        results = [kept(effect / SPREAD, draw) for _ in range(nights * count)]
        is_kept, runs = np.array(results).T
        if effect >= 0:
            false += is_kept.reshape(nights, count).sum(axis=1)
        total += runs.sum() / nights
        shown = f"keeps {is_kept.mean():.2%}; {runs.mean():.1f} runs"
        print(f"{kind}: --gate, effect {effect:+}: {shown}", flush=True)
    share = np.mean(false > 0)
    shown = f"{false.mean():.2f} false ones kept, any in {share:.1%} of them; {total:.0f} runs each"
    print(f"{kind}: {nights} nights: {shown}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tries", type=int, default=20_000)
    parser.add_argument("--nights", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for kind, draw in DRAWN.items():
        draw = partial(draw, np.random.default_rng(options.seed))
        show_races(kind, draw, options.tries)
        show_tuned_races(kind, draw, options.tries)
        show_nights(kind, draw, options.nights)
