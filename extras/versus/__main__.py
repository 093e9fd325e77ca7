"""Did an edit help, or was it noise? Trains both sides with the same seeds and compares them.

    python -m extras.versus HEAD -- --config first             your files against the last commit
    python -m extras.versus main feature -- --config first     two commits
    python -m extras.versus "--dropout 0.1" -- --config first  flags against none
    python -m extras.versus HEAD --tune dropout=0,0.1 -- --config first   each at its best
    python -m extras.versus --list                             what was compared so far

Behind -- are the flags of main.py that both sides have. With the same seed, both sides read the
same batches and begin with the same weights, so that much of the noise of a single run cancels.
What is compared is the loss on validation text, computed by a judge (judge.py) from the last
checkpoints. Interrupted, the same command goes on where it was. README.md in this
folder says what its numbers mean.
"""

import argparse
import contextlib
import json
import math
import re
import signal
import sys
from functools import partial

CANNOT_TELL = 125  # `git bisect run` then skips the commit

try:  # not main.py: the files of now may not even run
    from datasets import Parser, RunError, UsageError, number, one_line, run_program
    from extras.versus import ledger
    from extras.versus.judge import DIVERGED, LIMIT
    from extras.versus.runs import SAME_STEPS, Comparison, tuned
    from extras.versus.sequential import RACE, SCREENED, measure, race, screen, t_quantile
    from extras.versus.sides import count_words, is_flags
    from extras.versus.verdict import describe_numbers, describe_verdict, unlike
except Exception as error:
    print(f"extras.versus: cannot run with these files: {error!r}", file=sys.stderr)
    sys.exit(CANNOT_TELL)

# Flags of this program that main.py does not have.
OWN = ["pairs", "seeds", "margin", "tokens", "jobs", "json", "same", "tune", "again", "max_time"]


def main(arguments):
    """Compares what these arguments name; returns the exit status."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, stop)
    options, common = read_arguments(arguments)
    if options.list:
        return ledger.print_list(options.list)
    if options.same:
        command = print_sameness
    else:
        command = keep_or_drop if options.gate else print_comparison
    try:
        return command(tuned(options, common) if options.tune else Comparison(options, common))
    except (UsageError, RunError, OSError) as error:
        has_status = options.same or (options.gate and not isinstance(error, UsageError))
        if not has_status:
            raise
        reason = one_line(error)
        if options.gate and getattr(error, "name", None) == (options.after or "your files"):
            print(f"{reason}\nDrop.")
            return 1
    print(f"Cannot tell: {reason}", file=sys.stderr)
    return CANNOT_TELL


def stop(number, frame):
    """Ends this program; Comparison.pairs first ends the processes that it waits for."""
    print("\nStopped: the same command goes on.", file=sys.stderr)
    sys.exit(128 + number)


def read_arguments(arguments):
    """The options of this program, with the sides, and the words behind --."""
    parser = Parser(
        prog="python -m extras.versus",
        usage="%(prog)s SIDE [SIDE] [options] -- [flags of main.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    sides = "a commit, or flags in quotes"
    add("before", metavar="SIDE", type=str.strip, nargs="?", default="", help=sides)
    add("after", metavar="SIDE", type=str.strip, nargs="?", default="", help="another (your files)")
    race = f"of runs, exactly (a race: {min(RACE)} to {max(RACE)})"
    add("--pairs", type=number(int, 2), help=race)
    add("--seeds", type=int, help="the first one (that of --seed, or 42)")
    margin = "a loss that is smaller than this does not matter"
    add("--margin", type=number(float, 0), help=margin)
    tokens = f"tokens of each text that are scored, evenly spaced ({LIMIT:,}); 0: all"
    add("--tokens", type=number(int, 0), default=LIMIT, help=tokens)
    tune = "a flag and its values: each side takes the best on seeds that are not compared"
    add("--tune", metavar="FLAG=A,B,...", help=tune)
    jobs = "runs at a time, each on its share of the cores (4; with --gpu, 1)"
    add("--jobs", type=number(int, 1), help=jobs)
    add("--json", action="store_true", help="the result as JSON on the last line")
    same = f"exit status 0: same weights after {SAME_STEPS} steps, 1: others, {CANNOT_TELL}: no run"
    add("--same", action="store_true", help=same)
    keep = f"for loops: 0 keep, 1 drop, {CANNOT_TELL} cannot tell; see agent.md"
    add("--gate", "--keep", action="store_true", help=keep)
    slower = "the most that --gate lets an edit take of the time of before (%(default)s)"
    add("--max_time", type=number(float, 0), default=1.05, help=slower)
    add("--again", action="store_true", help="--gate: on new seeds, what it has dropped before")
    listed = "what was compared in a folder, or what a ledger has"
    add("--list", metavar="SAVE_DIR", nargs="?", const="runs", help=listed)
    end = [*arguments, "--"].index("--")
    common = arguments[end + 1 :]
    for name in OWN:
        if f"--{name}" in common:
            raise UsageError(f"--{name} is no flag of main.py: put it before --")
    if re.search(r"--eval_tokens\b", " ".join(arguments)):  # a recipe may have it
        raise UsageError("--eval_tokens cannot be compared: --tokens says how many are scored")
    # argparse takes a word that begins with a blank for no option: these are sides.
    of_side = rf"^-(?!h$|-({'|'.join(OWN)}|help|gate|keep|list)\b)"
    try:
        options = parser.parse_args([re.sub(of_side, " -", word) for word in arguments[:end]])
    except UsageError as error:
        raise UsageError(f"{error}; flags of main.py stand in quotes, or behind --") from None
    if options.gate and (options.pairs or options.same):
        raise UsageError("--gate chooses its own pairs: leave --pairs and --same out")
    if options.tune and (options.same or not re.fullmatch(r"\w+=[^,]+(,[^,]+)+", options.tune)):
        raise UsageError("--tune takes a flag and its values, and no --same: --tune dropout=0,0.1")
    if not options.before and not options.list:
        raise UsageError("name a commit, or flags in quotes, to compare your files with")
    if is_flags(options.before) and not options.after:  # compared with what there is without them
        options.before, options.after = "", options.before
    return options, common


def print_sameness(comparison):
    """Prints whether both sides end in the same weights; returns 0 if so, else 1."""
    seeds = range(comparison.first_seed, comparison.first_seed + (comparison.options.pairs or 2))
    with contextlib.closing(comparison.pairs(seeds)) as pairs:
        for seed, before, after in pairs:
            if DIVERGED in (before.fault, after.fault):
                raise RunError(f"a run with seed {seed} has diverged")
            if before.id != after.id:
                print(f"Different weights after {SAME_STEPS} steps, seed {seed}.")
                return 1
    print(f"The same weights after {SAME_STEPS} steps, for each of these seeds.")
    return 0


def print_comparison(comparison):
    """Trains pairs until the outcome is clear, and prints and records what was found."""
    options = comparison.options
    looks = {options.pairs: t_quantile(options.pairs)} if options.pairs else RACE
    seeds = range(comparison.first_seed, comparison.first_seed + max(looks))
    number = f"{min(looks)} to {max(looks)}" if len(looks) > 1 else options.pairs
    print_start(comparison, number)
    look = ledger.begin_look(comparison.describe(), comparison.results())
    decide = partial(race, looks, options.margin)
    finish(comparison, compare(comparison, look, seeds, decide, looks))


def keep_or_drop(comparison):
    """Whether a loop should keep an edit; returns the exit status.

    It keeps only with equal steps, training text, number of tokens read and about equal time, and
    with a test text.

    A few pairs on seeds that were used before, and for which the side before is likely to be
    trained, sort out most edits. What they promise counts only if a race confirms it, on seeds that
    nothing was chosen by.
    """
    options = comparison.options
    if comparison.texts[1] is None:
        raise UsageError("--gate asks for text that the runs do not have: name some by --test_text")
    before, after = map(count_words, comparison.sides)
    margin = options.margin if after < before else None  # less code may be kept without a gain
    first = comparison.first_seed
    results = comparison.results()
    look = ledger.begin_look(comparison.describe(), results, options.again)
    same = [each for each in results if each["comparison"] == look["comparison"]]
    decided = [each for each in same if "kept" in each]
    if decided and not decided[-1]["kept"] and not options.again:
        show(decided[-1], options, "It was dropped before: --again tries it on new seeds.", "Drop.")
        return 1
    print_start(comparison, f"2 or {SCREENED}, then {min(RACE)} to {max(RACE)}")
    seeds = range(first, first + SCREENED)
    result = compare(comparison, look, seeds, partial(screen, margin or 0))
    if result["outcome"] == "promising":
        print("That is promising. On seeds that no comparison has had:")
        used = [*seeds, *(seed for each in results for seed in each["seeds"])]
        fresh = look["fresh"] = look["fresh"] or 1 + max(used)
        decide = partial(race, RACE, margin)
        result = compare(comparison, look, range(fresh, fresh + max(RACE)), decide, RACE)
    if result["at_fault"] == "before":
        finish(comparison, result)
        return CANNOT_TELL
    kept = ["helped", "partly", "equal", "not worse"]
    if margin is not None:
        kept += ["same", "alike"]
    is_equal = len({*result["steps"]}) == 1 and not result["unlike"]
    time = float(result.get("time", math.inf))
    is_kept = result["outcome"] in kept and is_equal and time <= options.max_time
    lines = ["Keep." if is_kept else "Drop."]
    if result["outcome"] in kept and time > options.max_time:
        lines.insert(0, f"It takes {time:.2f} times as long: more than --max_time allows.")
    finish(comparison, result | {"kept": is_kept}, *lines)
    return 0 if is_kept else 1


def compare(comparison, look, seeds, decide, looks=None):
    """Trains pairs until `decide` names an outcome; returns the result, {name: value}.

    look: see begin_look; decide: a function of the pairs so far; looks: see race.
    """
    pairs, outcome, (at_fault, fault) = train_pairs(comparison, look, seeds, decide)
    result = look | {
        "seeds": [*seeds[: len(pairs)]],
        "runs": [[outcome.id for outcome in pair] for pair in pairs],
        "outcome": outcome,
        "at_fault": at_fault,
        "fault": fault,
        "is_race": looks is RACE,
        "unlike": unlike(*comparison.sides, pairs),
    }
    if len(pairs) > 1 and not fault:
        result |= measure(pairs, looks and looks.get(len(pairs)))
    return result | {"verdict": describe_verdict(result, comparison.options.margin)}


def train_pairs(comparison, look, seeds, decide):
    """Trains pairs and prints them; returns them, the outcome, and what find_fault found.

    The ledger has the look from its first pair on.
    """
    pairs = []
    before, after = comparison.sides
    if before.folder == after.folder:
        return pairs, "same", (None, None)
    print(f"{'seed':>10}{'before':>10}{'after':>10}{'difference':>14}", flush=True)
    with contextlib.closing(comparison.pairs(seeds)) as trained:
        for seed, *pair in trained:
            pairs.append(pair)
            before, after = [each.score for each in pair]
            print(f"{seed:>10}{before:>10.4f}{after:>10.4f}{after - before:>+14.4f}", flush=True)
            if len(pairs) == 1:
                begun = {"seeds": [*seeds], "outcome": None, "verdict": "Not finished."}
                ledger.record(comparison.ledger, look | begun)
            at_fault, fault = find_fault(pairs)
            if fault:
                outcome = "diverged" if fault == DIVERGED else "cannot tell"
            else:
                outcome = decide(pairs)
            if outcome:
                return pairs, outcome, (at_fault, fault)


def find_fault(pairs):
    """What makes the runs of a side worthless: "before" or "after", and a text; or two Nones."""
    for name, own in zip(("before", "after"), zip(*pairs)):
        faults = [each.fault for each in own if each.fault]
        if len(own) > 1 and len({each.id for each in own}) == 1:
            faults.append("all seeds end in the same weights")
        if faults:
            return name, faults[0]
    return None, None


def finish(comparison, result, *lines):
    """Records and prints what was found."""
    ledger.record(comparison.ledger, result)
    show(result, comparison.options, *lines)


def show(result, options, *lines):
    """Prints a result."""
    for line in [*describe_numbers(result), result["verdict"], *lines]:
        print(line)
    if options.json:
        print(json.dumps(result))


def print_start(comparison, number):
    """Prints what is compared; number: of pairs, in words."""
    before, after = comparison.sides
    print(f"before   {before.name}\nafter    {after.name}")
    if comparison.plain:
        names = ", ".join(comparison.plain)
        print(f"edited   {names}: each side runs that of its main.py, not of fast.py")
    for line in dict.fromkeys([*before.notices, *after.notices]):
        print(line)
    if before.parameters != after.parameters:
        print(
            f"The models differ in size: {before.parameters:,} parameters before, "
            f"{after.parameters:,} after."
        )
    steps = f"{comparison.steps(0):,} steps before, {comparison.steps(1):,} after"
    print(f"{number} pairs of runs: {steps}")


if __name__ == "__main__":
    run_program("extras.versus", main)
