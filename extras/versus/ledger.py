"""The ledger: the file of all comparisons in a folder, each from its first pair on."""

import json
from pathlib import Path

from datasets import RunError, UsageError, explain_errors, open_no_follow
from extras.versus.sequential import SCREEN_BOUNDS

NAME = "comparisons.jsonl"


def read_results(path):
    """The results in a ledger, the last of each try, newest at the end; [] if there is no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    results = {}
    for number, line in reversed([*enumerate(lines, 1)]):
        problem = f"{path}, line {number} is no comparison: if a disk has damaged it, delete it"
        with explain_errors(problem, ValueError, TypeError, KeyError, raises=RunError):
            older = {"look": 1, "asked": None, "baseline": None}  # older commits lack these
            result = older | json.loads(line)
            key = (result["comparison"], str(result["asked"]), result["look"])
            results.setdefault(key, result)
    return [*reversed(results.values())]


def begin_entry(described, results, again=False):
    """The entry of a comparison with the number of the try, `look`, {name: value}.

    described: see Comparison.describe. Tries are counted by baseline: another edit, other seeds or
    more pairs are the next. A repeated command is the same, unless `again` is set and it has ended.
    It has the first of its `fresh` seeds, by which no comparison before it has judged.
    """
    asked = [described["comparison"], described["asked"]]
    fresh = described["asked"]["seed"] + max(SCREEN_BOUNDS)
    try_number = 1
    for result in reversed(results):
        is_same = [result["comparison"], result["asked"]] == asked
        if is_same and not (again and result["outcome"]):
            return described | {name: result[name] for name in ("look", "fresh")}
        if result["baseline"] == described["baseline"]:
            try_number += result["outcome"] not in ("same", "alike")
        fresh = max([fresh, *[seed + 1 for seed in result["seeds"]]])
    return described | {"look": try_number, "fresh": fresh}


def record(path, result):
    """Appends a result to a ledger."""
    with open(path, "a", encoding="utf-8", opener=open_no_follow) as file:
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
            low, high = result["low"], result["high"]
            interval = f"{result['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        commits = ", ".join(result["commits"])
        print(
            f"{result['date']}  {len(result['seeds']):>2} pairs  {interval:<30}{result['verdict']} "
            f"{result['before']} -> {result['after']} ({commits}) -- {result['flags']}"
        )
