"""The sequential test: after how many pairs a comparison ends, and with which outcome."""

import functools
import math
from typing import NamedTuple

import numpy as np

from support.flags import number

# {pairs after which a race looks: the critical |t| there}. A group-sequential test like Pocock's
# (1977), for t, with levels of 1.2 to 1.9 % at each look. In all, 5 % of edits without effect are
# called helpful or harmful if differences are normal (simulate_verdicts.py). An interval of this
# width is a repeated confidence interval (Jennison and Turnbull 1989).
RACE_BOUNDS = {4: 4.85, 6: 3.84, 8: 3.28, 10: 2.96, 12: 2.76}
# The minimum detectable effect, at a power of 80 %, in half-widths of the interval. (By simulation
# of normal differences, 1.35 to 1.40 in a race, 1.43 to 1.45 with --pairs.)
MDE_FACTOR = 1.4
FUTILITY_BOUND = 0.7  # from six pairs on, a race without --margin ends if |t| is below it
# The screen of --gate, on seeds that were used before: {pairs at a look: it goes on only if t is
# below minus this}. See tests/nightly/simulate_verdicts.py.
SCREEN_BOUNDS = {2: 0, 6: 1.8}


class RunScore(NamedTuple):
    """What is compared of a run."""

    id: str | None = None  # of its last checkpoint, if there is one
    score: float = math.nan  # the loss on validation text
    test_score: float = math.nan  # the loss on test text, if there is one
    fault: str | None = None  # DIVERGED, or what is wrong with the score, see Judge
    tokens_seen: int | None = None  # in training
    seconds: float = math.nan  # see Comparison.train; nan if those of a part are unknown


def add_test_options(parser):
    """Adds --pairs, see bounds_of, and --margin, see `decide`."""
    race = f"exactly this number (without it, a race: {min(RACE_BOUNDS)} to {max(RACE_BOUNDS)})"
    parser.add_argument("--pairs", type=number(int, 2), help=race)
    margin = "a difference that is smaller than this does not matter"
    parser.add_argument("--margin", type=number(float, 0), help=margin)


def bounds_of(pairs):
    """{pairs: critical |t|} for --pairs, which has one look, or RACE_BOUNDS without it."""
    return {pairs: t_quantile(pairs)} if pairs else RACE_BOUNDS


@functools.cache
def t_quantile(pairs):
    """The two-sided 95 % quantile of Student's t for this many pairs."""
    # Substituting t = sqrt(pairs - 1) * tan(angle) makes the density a power of the cosine.
    angles = np.linspace(0, np.pi / 2, 10**6)
    below = np.cumsum(np.cos(angles) ** (pairs - 2))
    return math.sqrt(pairs - 1) * math.tan(np.interp(0.95 * below[-1], below, angles))


def confidence_interval(values, critical_value=None):
    """The mean of values [pairs], the ends of its interval, and its t statistic.

    critical_value: of t, for the interval's width; by default that of 95 %.
    """
    mean = values.mean()
    standard_error = values.std(ddof=1) / math.sqrt(len(values))
    half_width = (critical_value or t_quantile(len(values))) * standard_error
    t = mean / (standard_error or 1e-300)  # huge if all values are the same
    return mean, mean - half_width, mean + half_width, t


def field_values(pairs, name):
    """A field of all RunScores, [2, pairs]."""
    return np.array([[getattr(run_score, name) for run_score in pair] for pair in pairs]).T


def paired_differences(pairs, name="score"):
    """How a field changes in each pair, after minus before, [pairs]."""
    before, after = field_values(pairs, name)
    return after - before


def decide(bounds, margin, pairs):
    """The outcome after these pairs, a key of VERDICTS; None: more are needed.

    bounds: SCREEN_BOUNDS, or like RACE_BOUNDS; margin: see --margin.
    """
    if len(pairs) not in bounds:
        return None
    critical_value = bounds[len(pairs)]
    is_last = len(pairs) == max(bounds)
    differences = paired_differences(pairs)
    if not differences.any():
        is_same = all(before.id == after.id for before, after in pairs)
        return "same" if is_same else "alike"  # other weights, such as unused ones
    if bounds is SCREEN_BOUNDS:
        *_, t = confidence_interval(differences - (margin or 0))
        if t >= -critical_value:
            return "not better"
        return "promising" if is_last else None
    _, low, high, t = confidence_interval(differences, critical_value)
    if t > critical_value:
        return "hurt"
    if t < -critical_value:
        test = paired_differences(pairs, "test_score")
        is_better_there = confidence_interval(test)[3] < -critical_value
        # Is it clearly less there than on validation text?
        if confidence_interval(differences - test)[3] < -critical_value:
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


def summarize(bounds, pairs):
    """What a result says of pairs of RunScores, {name: number}; bounds: see `decide`."""
    before, after = scores = field_values(pairs, "score")
    differences = after - before
    critical_value = None if bounds is SCREEN_BOUNDS else bounds[len(pairs)]
    mean, low, high, _ = confidence_interval(differences, critical_value)
    numbers = {
        "difference": mean,
        "low": low,
        "high": high,
        "detectable": MDE_FACTOR * (high - low) / 2,
        "agree": int((np.sign(differences) == np.sign(mean)).sum()),
        "scores_before": before.tolist(),
        "scores_after": after.tolist(),
        "outlier": find_outlier(differences),
    }
    test_difference = paired_differences(pairs, "test_score").mean()
    if math.isfinite(test_difference):  # there is a test text
        numbers["test_difference"] = test_difference
    if scores.std(axis=1).all():
        numbers["correlation"] = np.corrcoef(scores)[0, 1]
    before, after = field_values(pairs, "seconds")
    ratios = after / before
    ratios = ratios[np.isfinite(ratios)]
    if len(ratios) > 1:
        numbers |= zip(("time", "time_low", "time_high"), confidence_interval(ratios))
    return numbers


def find_outlier(differences):
    """The index of a pair without which the others scatter less than half as far, or None."""
    index = np.abs(differences - np.median(differences)).argmax()
    others = np.delete(differences, index)
    if len(others) >= 5 and others.std() < differences.std() / 2:
        return int(index)
