"""What the rules of extras.versus do, by simulation: no run is trained.

    python tests/nightly/rules.py                  20,000 comparisons a line, a few minutes
    python tests/nightly/rules.py --tries 2000

The differences of pairs are drawn from a normal distribution, and decided by the functions that
extras.versus itself uses. First the race; then --gate, and a night in which a program tries a
hundred edits one after the other, as most such edits are: 60 do nothing, 30 harm, 10 help.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from extras.versus.sequential import RACE, SCREENED, Outcome, race, screen

SPREAD = 0.008  # of the differences of pairs, in nats/token, as measured for the recipe `first`
# How many edits of a night have which effect, in nats/token: below zero is better.
NIGHT = {0.0: 60, 0.01: 30, -0.005: 4, -0.01: 4, -0.02: 2}


def decided(decide, effect, most, generator):
    """The outcome of pairs whose differences have a mean of `effect` and a spread of 1.

    Returns it with the number of pairs that it took.
    """
    pairs = []
    for i, difference in enumerate(generator.normal(effect, 1, most)):
        pairs.append((Outcome(f"before {i}", 4.0), Outcome(f"after {i}", 4.0 + difference)))
        outcome = decide(pairs)
        if outcome:
            return outcome, len(pairs)


def kept(effect, generator):
    """Whether --keep keeps an edit of this effect, and how many runs that took."""
    outcome, pairs = decided(partial(screen, 0), effect, SCREENED, generator)
    runs = pairs  # the side before was trained for an earlier edit
    if outcome == "promising":
        outcome, pairs = decided(partial(race, RACE, None), effect, max(RACE), generator)
        runs += 2 * pairs
    return outcome == "helped", runs


def main(tries, seed):
    generator = np.random.default_rng(seed)
    for effect in (0, -0.5, -1, -2):
        results = [decided(partial(race, RACE, None), effect, 12, generator) for _ in range(tries)]
        outcomes = [outcome for outcome, _ in results]
        shares = [f"{name} {outcomes.count(name) / tries:.1%}" for name in ("helped", "hurt")]
        pairs = np.mean([pairs for _, pairs in results])
        shown = f"{', '.join(shares)}; {pairs:.1f} pairs"
        print(f"race, effect {effect:+} spreads: {shown}", flush=True)
    false = total = 0.0
    for effect, count in NIGHT.items():
        results = [kept(effect / SPREAD, generator) for _ in range(tries)]
        share, runs = np.mean(results, axis=0)
        false += count * share * (effect >= 0)
        total += count * runs
        print(f"--keep, effect {effect:+}: keeps {share:.2%}; {runs:.1f} runs", flush=True)
    print(f"a night of 100 edits: {false:.2f} false ones kept, {total:.0f} runs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tries", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    main(options.tries, options.seed)
