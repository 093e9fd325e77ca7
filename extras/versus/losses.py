"""The verdict on losses that another program computed: `python -m extras.versus --losses FILE`."""

import csv
import io
import math
from pathlib import Path

from datasets import UsageError, explain_errors
from extras.versus.sequential import RunScore, decide, summarize
from extras.versus.verdict import VERDICTS, describe_numbers

COLUMNS = ["seed", "before", "after"]


def judge_file(path, bounds, options):
    """Prints the verdict on a CSV file of losses, see `read_rows`; bounds: see `decide`.

    Pairs count in the order of the file, until there is an outcome.
    """
    rows = read_rows(path)
    seeds = []
    pairs = []
    outcome = None
    print(f"{'seed':>10}{'before':>10}{'after':>10}{'difference':>14}")
    for seed, before, after in rows:
        print(f"{seed:>10}{before:>10.4f}{after:>10.4f}{after - before:>+14.4f}")
        seeds.append(seed)
        pairs.append((RunScore(score=before), RunScore(score=after)))
        outcome = decide(bounds, options.margin, pairs)
        if outcome:
            break
    if not outcome:
        next_look = min(look for look in bounds if look > len(pairs))
        print(f"No verdict yet: the next look is after {next_look} pairs.")
        return
    asked = {"pairs": options.pairs, "margin": options.margin}
    result = {"seeds": seeds, "outcome": outcome, "unit": "in loss", "asked": asked}
    result |= summarize(pairs, bounds[len(pairs)])
    print(*describe_numbers(result), sep="\n")
    if len(pairs) < len(rows):
        print(f"It ended here, so {len(rows) - len(pairs)} more rows do not count.")
    print(f"{VERDICTS[outcome].format(**result, pairs=len(pairs))}, by losses that nobody checked.")


def read_rows(path):
    """The rows of a CSV file with COLUMNS, as (text, float, float).

    Raises UsageError if it is malformed, a seed is there twice, or no loss has changed.
    """
    problem = f"--losses {path} is not a CSV file with the columns {', '.join(COLUMNS)}"
    with explain_errors(problem, OSError, ValueError, csv.Error):
        text = Path(path).read_text("utf-8-sig")  # with a mark of the byte order, or without
        header, *rows = [row for row in csv.reader(io.StringIO(text)) if row]
        if header != COLUMNS:
            raise ValueError(f"they are {', '.join(header):.100}")
        rows = [(seed.strip(), float(before), float(after)) for seed, before, after in rows]
    if not all(math.isfinite(loss) for _, *losses in rows for loss in losses):
        raise UsageError(f"--losses {path}: a loss is not finite, so nothing can be said")
    if len({seed for seed, _, _ in rows}) < len(rows):
        raise UsageError(f"--losses {path} has a seed twice: such pairs are not independent")
    if rows and all(before == after for _, before, after in rows):
        raise UsageError(f"--losses {path}: no loss has changed; is the edit in both programs?")
    return rows
