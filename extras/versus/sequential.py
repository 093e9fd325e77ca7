"""The sequential test: after how many pairs a comparison ends, and what their numbers say."""

import functools
import math
from typing import NamedTuple

import numpy as np

# A race looks at these numbers of pairs. A difference counts if |t| is beyond the value: by this
# rule, 5 % of all useless edits are called helpful or harmful, at whatever look, if the differences
# are normal.
RACE = {4: 4.85, 6: 3.84, 8: 3.28, 10: 2.96, 12: 2.76}
FUTILITY_BOUND = 0.7  # from six pairs on, a race ends where |t| is below it
SCREENED = 6  # pairs of --gate on used seeds
PROMISING = -1.8  # the t that they have to reach; see tests/nightly/simulate_verdicts.py


class Outcome(NamedTuple):
    """What there is to compare of a run."""

    id: str | None = None  # of its last checkpoint; None if it has none
    score: float = math.nan  # of the validation text
    test_score: float = math.nan  # of the test text, if there is one
    fault: str | None = None  # DIVERGED, or what is wrong with its score, see Judge
    read: int | None = None  # tokens
    seconds: float = math.nan  # of the processor, for the whole process; nan if it was resumed


@functools.cache
def t_quantile(pairs):
    """The two-sided 95 % quantile of Student's t for this many pairs."""
    # By t = sqrt(pairs - 1) * tan(angle), its density becomes a power of the cosine.
    angles = np.linspace(0, np.pi / 2, 10**6)
    below = np.cumsum(np.cos(angles) ** (pairs - 2))
    return math.sqrt(pairs - 1) * math.tan(np.interp(0.95 * below[-1], below, angles))


def interval(values, quantile=None):
    """The mean of values [pairs], the ends of its 95 % interval, and its t."""
    mean = values.mean()
    error = values.std(ddof=1) / math.sqrt(len(values))
    half = (quantile or t_quantile(len(values))) * error
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return mean, mean - half, mean + half, t


def column(pairs, name):
    """A field of the Outcomes of pairs, [2, pairs]."""
    return np.array([[getattr(outcome, name) for outcome in pair] for pair in pairs]).T


def changes(pairs, name="score"):
    """After minus before of a field of the Outcomes of pairs, [pairs]."""
    before, after = column(pairs, name)
    return after - before


def without_change(pairs):
    """The outcome where no loss has changed: "same", or "alike" if weights have, as unused ones."""
    return "same" if all(before.id == after.id for before, after in pairs) else "alike"


def race(looks, margin, pairs):
    """The outcome of a race after these pairs, one of verdict.py's; None: more are needed.

    looks: {number of pairs: the t beyond which a difference counts}; margin: see --margin.
    """
    if len(pairs) not in looks:
        return None
    quantile = looks[len(pairs)]
    is_last = len(pairs) == max(looks)
    _, low, high, t = interval(changes(pairs), quantile)
    if not changes(pairs).any():
        return without_change(pairs)
    if t > quantile:
        return "hurt"
    if t < -quantile:
        test = changes(pairs, "test_score")
        is_better_there = interval(test, quantile)[3] < -quantile
        # That much less on test text, and by no accident.
        is_less_there = interval(changes(pairs) - test)[3] < -quantile
        if is_less_there:
            return "partly" if is_better_there else "valid only"
        return "helped"
    if margin is not None:
        if max(-low, high) < margin:
            return "equal"
        if is_last and high < margin:
            return "not worse"
    elif len(pairs) >= 6 and abs(t) < FUTILITY_BOUND:
        return "none"
    return "none" if is_last else None


def screen(worst, pairs):
    """The outcome of pairs on seeds that were used before: "promising" or "not better".

    worst: the difference that is to be beaten, 0 or a margin. None: more pairs are needed.
    """
    if len(pairs) not in (2, SCREENED):
        return None
    mean, *_, t = interval(changes(pairs) - worst)
    if not changes(pairs).any():
        return without_change(pairs)
    if len(pairs) == 2:
        return None if mean < 0 else "not better"
    return "promising" if t < PROMISING else "not better"


def measure(pairs, quantile=None):
    """The numbers of pairs of Outcomes, {name: value}.

    quantile: the t beyond which a difference counts, by default that of 95 %.
    """
    before, after = scores = column(pairs, "score")
    differences = after - before
    mean, low, high, _ = interval(differences, quantile)
    numbers = {
        "difference": mean,
        "low": low,
        "high": high,
        "agree": int((np.sign(differences) == np.sign(mean)).sum()),
        "scores_before": before.tolist(),
        "scores_after": after.tolist(),
        "outlier": find_outlier(differences),
    }
    test_difference = changes(pairs, "test_score").mean()
    if math.isfinite(test_difference):  # there is such a text
        numbers["test_difference"] = test_difference
    if scores.std(axis=1).all():
        numbers["correlation"] = np.corrcoef(scores)[0, 1]
    before, after = column(pairs, "seconds")
    ratios = after / before
    ratios = ratios[np.isfinite(ratios)]
    if len(ratios) > 1:
        numbers |= zip(("time", "time_low", "time_high"), interval(ratios))
    return numbers


def find_outlier(differences):
    """The place of a pair without which the others scatter less than half as far, or None."""
    place = np.abs(differences - np.median(differences)).argmax()
    others = np.delete(differences, place)
    if len(others) >= 5 and others.std(ddof=1) < differences.std(ddof=1) / 2:
        return int(place)
