"""The ledger: the file of all comparisons in a folder, each from its first pair on."""

import json
from pathlib import Path

from support.cli import RunError, UsageError, explain_errors
from support.files import open_no_follow
from extras.versus.sequential import SCREEN_BOUNDS

NAME = "comparisons.jsonl"


def read_results(path):
    """The results in a ledger, the last of each try, newest at the end; [] if there is no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    results = {}
    for number, line in enumerate(lines, 1):
        problem = f"{path}, line {number} is no comparison: if a disk has damaged it, delete it"
        with explain_errors(problem, ValueError, TypeError, KeyError, raises=RunError):
            result = json.loads(line)
            key = (result["comparison"], str(result["asked"]), result["look"])
            results.pop(key, None)  # so that the newest comes last
            results[key] = result
    return [*results.values()]


def begin_entry(path, described, again=False):
    """What a ledger will say of a comparison: `described`, `look` and `fresh`, {name: value}.

    described: see Comparison.describe. look: the number of this try among all with its baseline;
    another edit, other seeds or more pairs make a new try. A repeated command is the same try,
    unless `again` is set and it has ended. fresh: a seed that no earlier comparison has reached.
    """
    fresh = described["asked"]["seed"] + max(SCREEN_BOUNDS)
    try_number = 1
    for result in reversed(read_results(path)):
        is_same = all(result[name] == described[name] for name in ("comparison", "asked"))
        if is_same and not (again and result["outcome"]):
            return described | {name: result[name] for name in ("look", "fresh")}
        if result["baseline"] == described["baseline"]:
            try_number += result["outcome"] not in ("same", "alike")
        fresh = max(fresh, 1 + max(result["seeds"], default=0))
    return described | {"look": try_number, "fresh": fresh}


def record(path, result):
    """Appends a result to a ledger."""
    with open(path, "a", opener=open_no_follow) as file:
        file.write(json.dumps(result) + "\n")


def print_list(name):
    """Prints a line for each result in a ledger, or in that of a folder of runs, newest last."""
    path = Path(name)
    if path.is_dir():
        path = path / "versus" / NAME
    results = read_results(path)
    if not results:
        raise UsageError(f"nothing was compared in {name}: name the --save_dir of a comparison")
    for result in results:
        interval = ""
        if "difference" in result:
            interval = "{difference:+.4f} ({low:+.4f} to {high:+.4f})".format(**result)
        commits = ", ".join(result["commits"])
        print(
            f"{result['date']}  {len(result['seeds']):>2} pairs  {interval:<30}{result['verdict']} "
            f"{result['before']} -> {result['after']} ({commits}) -- {result['flags']}"
        )
