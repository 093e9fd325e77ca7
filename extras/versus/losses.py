"""Did it help? The test of extras.versus, on losses of any other program.

    python -m extras.versus.losses runs.csv              a race: looks after 4 to 12 pairs
    python -m extras.versus.losses runs.csv --pairs 8    exactly eight, chosen before

The file has a line for each run: its side (before or after), its seed, its loss and, if sides were
tuned, the value of a setting, such as learning_rate. Seeds with several values choose a side's best
value, so they need all values that the side has. Other seeds are compared, in the order of their
lines. Nobody checks where the losses come from.
"""

import csv
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np

from support.cli import UsageError, command, explain_errors, printable, run_program
from support.flags import Parser
from extras.versus.sequential import RunScore, add_test_options, bounds_of, decide
from extras.versus.sequential import paired_differences, summarize
from extras.versus.verdict import PAIRS_HEADER, SIDES
from extras.versus.verdict import describe_best, describe_numbers, describe_pair, name_verdict


def main(arguments):
    """Prints the verdict on a file. Pairs count in its order, until there is an outcome."""
    parser = Parser(prog="python -m extras.versus.losses", description=__doc__)
    file_help = "CSV with the columns side, seed, loss and, if sides were tuned, a setting"
    parser.add_argument("file", metavar="FILE", help=file_help)
    add_test_options(parser)
    options = parser.parse_args(arguments)
    setting, losses = read_losses(options.file)
    means = [mean_losses(side, setting, losses[side]) for side in SIDES]
    best_values = [min(by_value, key=by_value.get) for by_value in means]
    tuning_seeds = {*tuning_seeds_of(losses["before"]), *tuning_seeds_of(losses["after"])}
    before, after = (losses[side][value] for side, value in zip(SIDES, best_values))
    seeds = [seed for seed in before if seed in after and seed not in tuning_seeds]
    compared = [abs(side[seed]) for side in (before, after) for seed in seeds]
    if 0 < max(compared, default=0) < 0.01:
        raise UsageError(f"{options.file}: four decimals are shown: multiply losses by 1000")
    condition = "if both sides are tuned"
    if setting:
        condition += f" ({setting}: {best_values[0]} before, {best_values[1]} after)"
    best = None
    if tuning_seeds:
        best = describe_best(setting, best_values, losses.values())
        condition = best
    all_seeds = {*itertools.chain(*losses["before"].values(), *losses["after"].values())}
    unpaired = sorted(all_seeds - tuning_seeds - {*seeds})
    if unpaired:
        print(f"Seeds without a run of each side to compare: {', '.join(unpaired)}")
    if best and not seeds:
        print(f"Next: train both sides on other seeds, {best}.")
        return
    print_verdict(seeds, before, after, options, best, condition)


def read_losses(path):
    """The tuned setting's name (None without one), and the losses, {side: {value: {seed: loss}}}.

    The loss of a run that has diverged (nan, inf) is infinite. Raises UsageError if the file is
    malformed, has only one side, or has a run twice.
    """
    with explain_errors(f"{path} is no CSV file in UTF-8"):
        text = Path(path).read_text("utf-8-sig")  # with a byte-order mark or without
        table = csv.reader(text.splitlines())
        lines = [[printable(cell.strip()) for cell in cells] for cells in table]
    header, *lines = lines or [[]]
    columns = ["side", "seed", "loss"]
    settings = [name for name in header if name not in columns]
    setting, *_ = [*settings, None]
    if sorted(header) != sorted(columns + settings[:1]) or "" in header:
        raise UsageError(
            f"{path}: its first line is not side,seed,loss (or side,seed,learning_rate,loss, or "
            "with another setting that was tuned; pandas needs index=False)"
        )
    losses = {side: {} for side in SIDES}
    for line_number, cells in enumerate(lines, 2):
        if not any(cells):
            continue
        problem = f"{path}, line {line_number}: not like {','.join(header)} with before or after"
        with explain_errors(problem):
            run = dict(zip(header, cells, strict=True))
            value = float(run[setting]) if settings else 0
            if not math.isfinite(value):
                raise ValueError("it has no place among the others")
            loss = float(run["loss"])
            losses_by_seed = losses[run["side"]].setdefault(f"{value:.15g}", {})
        if run["seed"] in losses_by_seed:
            raise UsageError(f"{path}, line {line_number}: this run is there twice: leave one out")
        losses_by_seed[run["seed"]] = loss if math.isfinite(loss) else math.inf
    for side in SIDES:
        if not losses[side]:
            raise UsageError(f"{path} has no run of the side {side!r}")
    return setting, losses


def tuning_seeds_of(losses):
    """The seeds that have several values on a side; they choose its best one.

    losses: {value: {seed: loss}}.
    """
    counts = Counter(itertools.chain(*losses.values()))
    return [seed for seed, count in counts.items() if count > 1]


def mean_losses(side, setting, losses):
    """A side's mean loss at each value, {value: loss}, by the seeds that have several.

    losses: {value: {seed: loss}}. With one value, there is nothing to choose: its loss is nan.
    Raises UsageError if a seed has several values, but not all, or if no value can be chosen.
    """
    if len(losses) == 1:
        return dict.fromkeys(losses, math.nan)
    seeds = tuning_seeds_of(losses)
    if not seeds:
        raise UsageError(f"{side!r} has several values of {setting}, but no seed has all of them")
    for seed, value in itertools.product(seeds, losses):
        if seed not in losses[value]:
            raise UsageError(
                f"seed {seed} of {side!r} has several values of {setting}, but not {value}: add "
                "that run, or leave out all but one"
            )
    means = {}
    for value, by_seed in losses.items():
        means[value] = sum(by_seed[seed] for seed in seeds) / len(seeds)
    if min(means.values()) == math.inf:
        raise UsageError(f"no {setting} of {side!r} has a finite loss for each of these seeds")
    return means


def print_verdict(seeds, before, after, options, best, condition):
    """Prints the pairs that count and the verdict.

    before, after: {seed: loss}; best: see describe_best, None if nothing was chosen.
    """
    bounds = bounds_of(options.pairs)
    pairs = []
    print(PAIRS_HEADER)
    for seed in seeds:
        print(describe_pair(seed, before[seed], after[seed]))
        pairs.append((RunScore("before", before[seed]), RunScore("after", after[seed])))
        if not math.isfinite(before[seed] + after[seed]):
            print("Cannot tell: a run of this pair has diverged.")
            return
        outcome = decide(bounds, options.margin, pairs)
        if outcome:
            break
    else:
        next_look = min(look for look in bounds if look > len(pairs))
        print(f"No verdict yet: the next look is after {next_look} pairs.")
        return
    if np.ptp(paired_differences(pairs)) <= 1e-9 * abs(before[seeds[0]]):
        why = "without effect, or the losses have too few digits"
        print(f"Cannot tell: all differences are the same, so seeds are {why}.")
        return
    result = {"seeds": seeds[: len(pairs)], "outcome": outcome, "unit": "in loss"}
    result |= {"asked": vars(options), "tuned": best} | summarize(bounds, pairs)
    print(*describe_numbers(result), sep="\n")
    if len(pairs) < len(seeds):
        print(f"Pairs after the first {len(pairs)} do not count.")
    print(f"{name_verdict(result)}, {condition}.")


if __name__ == "__main__":
    run_program(command("extras.versus.losses")(main))
