"""Did it help? The test of extras.versus, on losses of any other program.

    python -m extras.versus.losses pairs.csv              a race: looks after 4 to 12 pairs
    python -m extras.versus.losses pairs.csv --pairs 8    exactly eight, chosen before

The file has a line "seed,before,after", and such a line for each seed, in the order in which they
were trained. Nothing about the losses is checked.
"""

import csv
import math
from pathlib import Path

import numpy as np

from datasets import Parser, UsageError, explain_errors, number, printable, run_program
from extras.versus.sequential import RunScore, bounds_of, decide, paired_differences, summarize
from extras.versus.verdict import PAIRS_HEADER, VERDICTS, describe_numbers, describe_pair


def main(arguments):
    """Prints the verdict on a file. Pairs count in its order, until there is an outcome."""
    parser = Parser(prog="python -m extras.versus.losses", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="CSV with the columns seed, before, after")
    pairs_help = "exactly this number (without it, a race)"
    parser.add_argument("--pairs", type=number(int, 2), help=pairs_help)
    margin_help = "a difference that is smaller than this does not matter"
    parser.add_argument("--margin", type=number(float, 0), help=margin_help)
    options = parser.parse_args(arguments)
    bounds = bounds_of(options.pairs)
    rows = read_rows(options.file)
    seeds = []
    pairs = []
    outcome = None
    print(PAIRS_HEADER)
    for seed, before, after in rows:
        print(describe_pair(printable(seed), before, after))
        seeds.append(seed)
        pairs.append((RunScore("before", before), RunScore("after", after)))
        outcome = decide(bounds, options.margin, pairs)
        if outcome:
            break
    if not outcome:
        next_look = min(look for look in bounds if look > len(pairs))
        print(f"No verdict yet: the next look is after {next_look} pairs.")
        return
    if np.ptp(paired_differences(pairs)) < 1e-9:
        why = "without effect, or the losses have too few digits"
        print(f"Cannot tell: all differences are the same, so seeds are {why}.")
        return
    asked = {"pairs": options.pairs, "margin": options.margin}
    result = {"seeds": seeds, "outcome": outcome, "unit": "in loss", "asked": asked}
    result |= summarize(pairs, bounds[len(pairs)])
    print(*describe_numbers(result), sep="\n")
    if len(pairs) < len(rows):
        print(f"Rows after the {len(pairs)} pairs of this verdict do not count.")
    verdict = VERDICTS[outcome].format(**result, pairs=len(pairs))
    print(f"{verdict}, if these losses are right and both sides are tuned.")


def read_rows(path):
    """The rows of a CSV file: (seed, loss before, loss after), the first one a text.

    Raises UsageError if it is malformed, or a seed is there twice.
    """
    with explain_errors(f"{path} is no CSV file in UTF-8", OSError, ValueError, csv.Error):
        text = Path(path).read_text("utf-8-sig")  # with a byte-order mark or without
        header, *lines = csv.reader([*text.splitlines(), ""])
    if [cell.strip() for cell in header] != ["seed", "before", "after"]:
        raise UsageError(f"{path}: its first line is not seed,before,after")
    rows = []
    for line_number, cells in enumerate(lines, 2):
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        problem = f"{path}, line {line_number} is not a seed and two finite losses"
        with explain_errors(problem, ValueError):
            seed, *losses = cells
            before, after = map(float, losses)
            if not math.isfinite(before + after):
                raise ValueError("not finite")
        rows.append((seed, before, after))
    if len({seed for seed, *_ in rows}) < len(rows):
        raise UsageError(f"{path} has a seed twice: such pairs are not independent")
    return rows


if __name__ == "__main__":
    run_program("extras.versus.losses", main)
