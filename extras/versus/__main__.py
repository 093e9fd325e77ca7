"""Did an edit help, or was it noise? Trains both sides with the same seeds, and compares them.

    python -m extras.versus HEAD -- --config first             your files against the last commit
    python -m extras.versus main feature -- --config first     two commits
    python -m extras.versus "--dropout 0.1" -- --config first  flags against none
    python -m extras.versus HEAD --tune dropout=0,0.1 -- --config first   each at its best
    python -m extras.versus --list                             what was compared so far
    python -m extras.versus.losses runs.csv                    losses of any other program

After -- come main.py's flags for both sides. With the same seed, both read the same batches and
begin with the same weights, so that much of the noise of a single run cancels. A judge (judge.py)
computes the loss of each run's last checkpoint on validation text, and these losses are compared.
After an interruption, the same command goes on. README.md in this folder explains the numbers.
"""

import json
import re
import signal
import sys
import textwrap

CANNOT_TELL = 125  # `git bisect run` then skips the commit
SAME_STEPS = 20  # of each run of --same; five of them are warm-up

try:  # nothing imports main.py here: the current one may be broken
    from extras.versus import ledger
    from extras.versus.judge import DEFAULT_TOKENS, DIVERGED
    from extras.versus.runs import Comparison, tune
    from extras.versus.sequential import RACE_BOUNDS, SCREEN_BOUNDS, add_test_options, bounds_of
    from extras.versus.sequential import decide, summarize
    from extras.versus.sides import SideError, copied_sides, is_flags
    from extras.versus.verdict import PAIRS_HEADER, SIDES, describe_numbers, describe_pair
    from extras.versus.verdict import describe_verdict, list_side_differences
    from support.cli import RunError, UsageError, command, one_line, run_program
    from support.flags import Parser, number
except Exception as error:
    print(f"extras.versus: cannot run with these files: {error!r}", file=sys.stderr)
    sys.exit(CANNOT_TELL)


def main(arguments):
    """Does what the arguments say; returns the exit status."""
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, stop)
    options, common = read_arguments(arguments)
    if options.list:
        return ledger.print_list(options.list)
    if options.same:
        command = check_sameness
    else:
        command = keep_or_drop if options.gate else run_comparison
    try:
        make = tune if options.tune else Comparison
        with copied_sides(options) as copies:
            comparison = make(options, common, copies)
        return command(comparison)
    except (UsageError, RunError, OSError) as error:
        reason = one_line(error)
        # "Before" is made first: if only "after" cannot run, the edit is at fault, not the command.
        is_after = reason.startswith(f"{options.after or 'your files'} cannot ")
        if options.gate and is_after and isinstance(error, (SideError, UsageError)):
            print(f"{reason}\nDrop.")
            return 1
        if options.same or (options.gate and not isinstance(error, UsageError)):
            print(f"Cannot tell: {reason}", file=sys.stderr)
            return CANNOT_TELL
        raise


def stop(number, frame):
    """Ends this program; on the way out, Comparison.train_pairs ends the processes of its runs."""
    print("\nStopped: to go on, repeat the command.", file=sys.stderr)
    sys.exit(128 + number)


def read_arguments(arguments):
    """The options of this program, with the sides, and the words after --."""
    parser = Parser(
        prog="python -m extras.versus",
        usage="%(prog)s SIDE [SIDE] [options] -- [flags of main.py]",
        description=__doc__,
    )
    add = parser.add_argument
    add("before", metavar="SIDE", type=str.strip, nargs="?", help="a commit, or flags in quotes")
    add("after", metavar="SIDE", type=str.strip, nargs="?", help="another (your files)")
    add_test_options(parser)
    add("--seeds", type=int, help="the first seed (that of --seed, or 42)")
    tokens = f"scored tokens of each text, evenly spaced ({DEFAULT_TOKENS:,}); 0: all"
    add("--tokens", type=number(int, 0), default=DEFAULT_TOKENS, help=tokens)
    tune = "a flag and its values: each side takes its best one, by seeds that are not compared"
    add("--tune", metavar="FLAG=A,B,...", help=tune)
    jobs = "runs at a time, each with its share of the cores (4; --gpu or a Mac: 1)"
    add("--jobs", type=number(int, 1), help=jobs)
    add("--json", action="store_true", help="the result as JSON on the last line")
    same = f"exit status: 0 same weights in {SAME_STEPS} steps, 1 others, {CANNOT_TELL} cannot tell"
    add("--same", action="store_true", help=same)
    keep = f"for loops; exit status: 0 keep, 1 drop, {CANNOT_TELL} cannot tell; see agent.md"
    add("--gate", action="store_true", help=keep)
    slower = "--gate: how many times as long an edit may take (%(default)s)"
    add("--max_time", type=number(float, 0), default=1.05, help=slower)
    add("--again", action="store_true", help="--gate: try on new seeds what it has dropped before")
    listed = "what was compared so far: the ledger in this folder, or this file"
    add("--list", metavar="SAVE_DIR", nargs="?", const="runs", help=listed)
    end = [*arguments, "--"].index("--")
    common = arguments[end + 1 :]
    # A side that is flags gets a blank before it: argparse then does not read it as an option.
    ours = "|".join(parser._option_string_actions).replace("_", "[_-]")
    side_flag = rf"^(?!({ours})\b)-"
    try:
        options = parser.parse_args([re.sub(side_flag, " -", word) for word in arguments[:end]])
    except UsageError as error:
        raise UsageError(f"{error}; flags of main.py stand in quotes, or after --") from None
    if options.gate and options.pairs:
        raise UsageError("--gate chooses its own pairs: leave --pairs out")
    if options.same:
        common += [f"--num_iters={SAME_STEPS}", "--lr_warmup=5"]
    if options.tune and (options.same or "," not in options.tune):
        raise UsageError("--tune takes a flag and values, like --tune dropout=0,0.1, and no --same")
    if not options.before and not options.list:
        raise UsageError("name a commit, or flags in quotes, to compare your files with")
    if is_flags(options.before) and not options.after:  # compared with the files without them
        options.before, options.after = None, options.before
    return options, common


def check_sameness(comparison):
    """Prints whether both sides end in the same weights; returns 0 if so, else 1."""
    first_seed = comparison.first_seed
    seeds = range(first_seed, first_seed + (comparison.options.pairs or 2))
    is_same = all(before.id == after.id for _, before, after in comparison.train_pairs(seeds))
    what = "The same" if is_same else "Different"
    print(f"{what} weights after {SAME_STEPS} steps, seeds {seeds[0]} to {seeds[-1]}.")
    return int(not is_same)


def run_comparison(comparison):
    """Trains pairs until the outcome is clear; prints and records it."""
    options = comparison.options
    bounds = bounds_of(options.pairs)
    print_start(comparison)
    entry = ledger.begin_entry(comparison.ledger, comparison.describe())
    result = compare(comparison, entry, comparison.first_seed, options.margin, bounds)
    record_and_print(comparison, result)


def keep_or_drop(comparison):
    """Prints whether to keep an edit; returns the exit status.

    An edit is kept only if there is a test text, if both sides have the same number of steps and,
    unless their tokenizers differ, the same training text and number of tokens read, and if it
    takes about as long.

    First, a screen: a few pairs on seeds that were used before, where "before" is probably trained
    already. Most edits end there. A promising one has to win a race on fresh seeds.
    """
    options = comparison.options
    if comparison.sides[0].test is None:
        raise UsageError("--gate needs text that the runs do not see: name some with --test_text")
    before, after = [sum(map(len, side.code_words.values())) for side in comparison.sides]
    margin = options.margin if after < before else None  # only less code is kept without a gain
    entry = ledger.begin_entry(comparison.ledger, comparison.describe(), options.again)
    decisions = [
        result
        for result in ledger.read_results(comparison.ledger)
        if result["comparison"] == entry["comparison"] and "kept" in result
    ]
    if decisions and not decisions[-1]["kept"] and not options.again:
        message = "It was dropped before: --again tries it on new seeds."
        record_and_print(comparison, decisions[-1], message, "Drop.")
        return 1
    print_start(comparison)
    result = compare(comparison, entry, comparison.first_seed, margin, SCREEN_BOUNDS)
    if result["outcome"] == "promising":
        print("That is promising. On seeds that no comparison has had:")
        result = compare(comparison, entry, entry["fresh"], margin, RACE_BOUNDS)
    if result["at_fault"] == "before":
        record_and_print(comparison, result)
        return CANNOT_TELL
    kept_outcomes = ["helped", "partly"]
    if margin is not None:
        kept_outcomes += ["equal", "not worse", "same", "alike"]
    is_gain = result["outcome"] in kept_outcomes and not result["unlike"]
    if is_gain and "time" not in result:
        record_and_print(comparison, result, "It was stopped too often to be timed: try --again.")
        return CANNOT_TELL
    is_slow = is_gain and result["time"] > options.max_time
    is_kept = result["kept"] = is_gain and not is_slow
    lines = ["It takes longer than --max_time allows."] if is_slow else []
    record_and_print(comparison, result, *lines, "Keep." if is_kept else "Drop.")
    return int(not is_kept)


def compare(comparison, entry, first_seed, margin, bounds):
    """Trains and prints pairs until there is an outcome; returns the result, {name: value}.

    entry: see begin_entry, recorded after the first pair; margin, bounds: see `decide`.
    """
    seeds = range(first_seed, first_seed + max(bounds))
    result = entry | {"seeds": [*seeds], "outcome": None, "verdict": "Not finished."}
    at_fault = fault = None
    pairs = []
    if comparison.sides[0].folder == comparison.sides[1].folder:
        outcome = "same"
        seeds = []  # nothing is trained
    else:
        print(f"Looks after {', '.join(map(str, bounds))} pairs of runs.")
        print(PAIRS_HEADER, flush=True)
    for seed, before, after in comparison.train_pairs(seeds):
        pairs.append((before, after))
        print(describe_pair(seed, before.score, after.score), flush=True)
        if len(pairs) == 1:
            ledger.record(comparison.ledger, result)
        fault = before.fault or after.fault
        if fault:
            at_fault = "before" if before.fault else "after"
            outcome = "diverged" if fault == DIVERGED else "cannot tell"
            fault = f"{entry[at_fault]}: {fault}"
        else:
            outcome = decide(bounds, margin, pairs)
        if outcome:
            break
    result |= {
        "seeds": [*seeds[: len(pairs)]],
        "runs": [[run.id for run in pair] for pair in pairs],
        "outcome": outcome,
        "at_fault": at_fault,
        "fault": fault,
        "unlike": [*list_side_differences(comparison.sides, pairs)],
    }
    if len(pairs) > 1 and not fault:
        result |= summarize(bounds, pairs)
    return result | {"verdict": describe_verdict(result)}


def record_and_print(comparison, result, *lines):
    """Records a result, and prints it with further lines."""
    ledger.record(comparison.ledger, result)
    print(*describe_numbers(result), result["verdict"], *lines, sep="\n")
    if comparison.options.json:
        print(json.dumps(result))


def print_start(comparison):
    """Prints what is compared."""
    for name, side in zip(SIDES, comparison.sides):
        size = f"{side.flags['num_iters']:,} steps, {side.num_parameters:,} parameters"
        print(f"{name:<9}{side.name}: {size}")
        if side.linked:
            print(textwrap.shorten(f"Linked, not copied: {', '.join(side.linked)}", 200))
        for path, words in side.code_words.items():
            if path != "main.py" and "'begin_main'" in words and "/" not in path:
                print(f"{path} is a copy of main.py: it is not what runs.")
    plain = comparison.plain_functions
    if plain:
        print(f"edited   {plain}: both sides run main.py's version, not fast.py's")


if __name__ == "__main__":
    run_program(command("extras.versus")(main))
