"""Did it help? The test of extras.versus, on losses of any other program.

    python -m extras.versus.losses runs.csv              a race: looks after 4 to 12 pairs
    python -m extras.versus.losses runs.csv --pairs 8    exactly eight, chosen before

The file has a line for each run: its side (before or after), its seed and its loss, as a table with
these three columns. Seeds are compared in the order of their lines. If a setting was tuned, take
each side at its best value, and other seeds than those that have chosen it. Nobody checks where the
losses come from.
"""

import csv
import math
from pathlib import Path

import numpy as np

from support.cli import UsageError, command, explain_errors, printable, run_program
from support.flags import Parser
from extras.versus.sequential import RunScore, add_test_options, bounds_of, decide
from extras.versus.sequential import paired_differences, summarize
from extras.versus.verdict import PAIRS_HEADER, SIDES, describe_numbers, describe_pair, name_verdict

COLUMNS = ["side", "seed", "loss"]


def main(arguments):
    """Prints the verdict on a file. Pairs count in its order, until there is an outcome."""
    parser = Parser(prog="python -m extras.versus.losses", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="CSV with the columns side, seed and loss")
    add_test_options(parser)
    options = parser.parse_args(arguments)
    before, after = read_losses(options.file).values()
    seeds = [seed for seed in before if seed in after]
    compared = [abs(side[seed]) for side in (before, after) for seed in seeds]
    if 0 < max(compared, default=0) < 0.01:
        raise UsageError(f"{options.file}: four decimals are shown: multiply losses by 1000")
    unpaired = sorted({*before, *after} - {*seeds})
    if unpaired:
        print(f"Seeds without a run of each side to compare: {', '.join(unpaired)}")
    print_verdict(seeds, before, after, options)


def read_losses(path):
    """The losses in a file, {side: {seed: loss}}, in the order of SIDES.

    The loss of a run that has diverged (nan, inf) is infinite. Raises UsageError if the file is
    malformed, has only one side, or has a run twice.
    """
    with explain_errors(f"{path} is no CSV file in UTF-8"):
        text = Path(path).read_text("utf-8-sig")  # with a byte-order mark or without
        table = csv.reader(text.splitlines())
        lines = [[printable(cell.strip()) for cell in cells] for cells in table]
    header, *lines = lines or [[]]
    if sorted(header) != sorted(COLUMNS):
        raise UsageError(
            f"{path}: its first line is not {','.join(COLUMNS)}: leave out all other columns, "
            "and runs at values that were not chosen (pandas needs index=False)"
        )
    losses = {side: {} for side in SIDES}
    for line_number, cells in enumerate(lines, 2):
        if not any(cells):
            continue
        problem = f"{path}, line {line_number}: not like {','.join(header)} with before or after"
        with explain_errors(problem):
            run = dict(zip(header, cells, strict=True))
            loss = float(run["loss"])
            by_seed = losses[run["side"]]
        if run["seed"] in by_seed:
            raise UsageError(f"{path}, line {line_number}: this run is there twice: leave one out")
        by_seed[run["seed"]] = loss if math.isfinite(loss) else math.inf
    for side in SIDES:
        if not losses[side]:
            raise UsageError(f"{path} has no run of the side {side!r}")
    return losses


def print_verdict(seeds, before, after, options):
    """Prints the pairs that count and the verdict; before, after: {seed: loss}."""
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
    result |= {"asked": vars(options), "tuned": None} | summarize(bounds, pairs)
    print(*describe_numbers(result), sep="\n")
    if len(pairs) < len(seeds):
        print(f"Pairs after the first {len(pairs)} do not count.")
    print(f"{name_verdict(result)}, if both sides are tuned.")


if __name__ == "__main__":
    run_program(command("extras.versus.losses")(main))
