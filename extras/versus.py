"""Did an edit help, or was it noise? Trains both sides with the same seeds and compares them.

    python -m extras.versus HEAD -- --config first             your files against the last commit
    python -m extras.versus main feature -- --config first     two commits
    python -m extras.versus "--dropout 0.1" -- --config first  flags against none

Behind -- are the flags of main.py that both sides have. With the same seed, both sides read the
same batches and begin with the same weights, so that much of the noise of a single run cancels.
What is compared is the loss of the whole validation split after the last step. Interrupted, the
same command goes on where it was. extras/versus.md says what its numbers mean.
"""

import argparse
import csv
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Not main.py: the files of now may not even run.
from datasets import Parser, RunError, UsageError, explained, no_follow, number, one_line
from datasets import open_data_dir, repair_streams, run_command

HERE = Path(__file__).resolve().parent.parent

# Student's t for an interval of 95 %: its 0.975 quantiles for 1, 2, … 30 degrees of freedom.
T_QUANTILES = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
]
MOST_PAIRS = len(T_QUANTILES) + 1
# The 0.8 quantile, for the difference that would be seen four times in five; for 5 to 30 degrees
# of freedom it is 0.92 to 0.85.
T_POWER = 0.9

SAME_STEPS = 20  # of each run of --same
TRIAL_MINUTES = 0.1  # of training before it is said what the comparison will cost
LONGER = 1.03  # a step that takes this many times as long is worth a word
CANNOT_TELL = 125  # `git bisect run` then skips the commit

# Flags of main.py that cannot stand behind --, and why.
REFUSED = {
    "patience": "all runs take the same number of steps",
    "max_minutes": "all runs take the same number of steps",
    "eval_tokens": "the whole validation split is scored",
    "identifier": "it trains runs of its own",
    "new_model": "it trains runs of its own",
    "inference": "it trains",
    "prompt": "it trains",
    "evaluate": "it trains",
    "list": "it trains",
}
# Those that both sides have to have: first those that decide the validation text.
SHARED = ["dataset", "text", "valid_text", "valid_fraction", "text_field"]
SHARED += ["seed", "num_iters", "save_dir", "data_dir"]


class Side(NamedTuple):
    """One of the two things that are compared."""

    name: str  # what was typed
    words: list  # its flags
    flags: dict  # the values of all flags of its runs, as its main.py understands them
    given: list  # the names of those that were given
    edited: list  # functions of its main.py that its extras/fast.py does not know
    folder: Path  # a copy of its files, in which its runs are, too


class Outcome(NamedTuple):
    """What there is to compare of a run."""

    id: str | None  # of its last checkpoint; None if it diverged
    score: float  # of the whole validation split, in nats/token; nan if it diverged
    bits_per_byte: float  # the same in bits
    curve: dict  # {iteration: score}
    ms_per_step: float  # the median
    tokens_sha256: dict  # of its texts, see main.Checkpoint


def main(arguments):
    """Compares what these arguments name; returns the exit status. Raises UsageError, RunError."""
    options, common = read_arguments(arguments)
    if not options.same:
        return print_comparison(Comparison(options, common), options)
    try:
        return print_sameness(Comparison(options, common))
    except (UsageError, RunError) as error:
        print(f"Cannot tell: {one_line(error)}", file=sys.stderr)
        return CANNOT_TELL


def read_arguments(arguments):
    """The options of this program, with its `sides`, and the words behind --. Raises UsageError."""
    parser = Parser(
        prog="python -m extras.versus",
        usage="python -m extras.versus SIDE [SIDE] [options] -- [flags of main.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options = {
        "--pairs": {"type": number(int, 2, MOST_PAIRS), "default": 6, "help": "of runs (6)"},
        "--seeds": {"type": number(int, 0, 2**31), "help": "the first one (that of --seed, or 42)"},
        "--same": {
            "action": "store_true",
            "help": f"only {SAME_STEPS} steps of each run; exit status 0: the same weights, "
            f"1: others, {CANNOT_TELL}: one side does not run",
        },
        "--json": {"action": "store_true", "help": "the result as JSON on the last line"},
    }
    for name, details in options.items():
        parser.add_argument(name, **details)
    parser.add_argument("sides", nargs="+", metavar="SIDE", help="a commit, or flags in quotes")
    place = arguments.index("--") if "--" in arguments else len(arguments)
    own = []
    for word in arguments[:place]:
        is_option = word.partition("=")[0] in [*options, "--help", "-h"]
        # argparse takes a word that begins with a blank for no option of its own.
        own.append(word if is_option or not word.startswith("-") else f" {word}")
    values = parser.parse_args(own)
    if len(values.sides) > 2:
        raise UsageError(f"there are two sides: what is {values.sides[2]!r} compared with?")
    return values, arguments[place + 1 :]


class Comparison:
    """Two Sides and the runs of both: those of a side differ in nothing but their seeds."""

    def __init__(self, options, common):
        self.common = common
        typed = options.sides
        if len(typed) == 1:  # it is compared with what there is without it
            typed = [None, *typed] if is_flags(typed[0]) else [*typed, None]
        self.before = make_side("before", typed[0], common)
        self.after = make_side("after", typed[1], common)
        self.check_flags()
        flags = self.before.flags
        self.folder = self.before.folder.parent
        save_dir = flags["save_dir"] if "save_dir" in self.before.given else None
        self.data_dir = open_data_dir(flags["data_dir"], save_dir)
        self.steps = SAME_STEPS if options.same else flags["num_iters"]
        first = flags["seed"] if options.seeds is None else options.seeds
        self.seeds = range(first, first + options.pairs)
        # Where either side runs its own function instead of that of extras/fast.py, both have to:
        # or the difference would also be that of two ways to round.
        self.plain = sorted({*self.before.edited, *self.after.edited})

    def check_flags(self):
        """Raises UsageError where the sides cannot be compared."""
        sides = (self.before, self.after)
        for name, reason in REFUSED.items():
            if any(name in side.given for side in sides):
                raise UsageError(f"--{name} cannot be compared: {reason}")
        for name in SHARED:
            if self.before.flags[name] != self.after.flags[name]:
                raise UsageError(f"--{name} has to be the same on both sides: put it behind --")

    @property
    def key(self):
        """What tells this comparison from others, whatever their seeds."""
        return f"{self.before.folder.name} {self.after.folder.name}"

    @property
    def runs(self):
        """The folder of all runs in that of a side. With other plain functions, they are others."""
        return "-".join(["runs", str(self.steps), *self.plain])

    def save_dir(self, side, seed):
        """The folder of a run of its own."""
        return side.folder / self.runs / str(seed)

    def train(self, side, seed, *more):
        """Trains a run, or goes on with it; returns its exit status and what it has printed."""
        save_dir = self.save_dir(side, seed)
        save_dir.mkdir(parents=True, exist_ok=True)
        values = {
            "seed": seed,
            "num_iters": self.steps,
            "steps_per_eval": min(side.flags["steps_per_eval"], self.steps),
            "steps_per_report": min(side.flags["steps_per_report"], self.steps),
            "eval_tokens": 0,
            "sample_tokens": 0,
            "save_dir": save_dir.absolute(),
            "data_dir": self.data_dir.absolute(),
        }
        command = [sys.executable, side.folder / "main.py", *self.common, *side.words, *more]
        for name, value in values.items():
            command += [f"--{name}", str(value)]
        environment = os.environ | {"PLAIN_FUNCTIONS": ",".join(self.plain)}
        with open(save_dir / "output.txt", "a+", opener=no_follow) as output:
            # The run inherits this lock: if only this program was killed, the run still has it.
            fcntl.flock(output, fcntl.LOCK_EX)
            output.truncate(0)
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            status = wait_for(process)
            output.seek(0)
            text = output.read()
        if status > 128:  # the user has interrupted both
            sys.exit(status)
        return status, text

    def complete(self, side, seed):
        """The Outcome of a run, which is trained to its end. Raises UsageError, RunError.

        If it is complete already, main.py says so: whether it is that run, it knows best.
        """
        status, output = self.train(side, seed)
        last_line = output.strip().rpartition("\n")[2]
        if status == 1 and "is not finite" in last_line:
            return Outcome(None, math.nan, math.nan, {}, math.nan, {})
        if status:
            kind = UsageError if status == 2 else RunError
            raise kind(f"{side.name} does not run: {last_line or f'exit status {status}'}")
        name = re.search(r"^run +(\S+),", output, re.MULTILINE).group(1)
        folder = self.save_dir(side, seed) / name
        newest = newest_record(folder)
        scores = dict(newest["scores"])
        rows = read_rows(folder / "log.csv")
        bits = [float(row["bits_per_byte"]) for row in rows if row["split"] == "valid"]
        times = [float(row["ms_per_step"]) for row in rows if row["split"] == "train"]
        return Outcome(
            id=newest["id"],
            score=scores[self.steps],
            bits_per_byte=bits[-1],
            curve=scores,
            ms_per_step=statistics.median(times),
            tokens_sha256=newest["tokens_sha256"],
        )

    def complete_pair(self, seed):
        """The Outcomes of both sides."""
        return self.complete(self.before, seed), self.complete(self.after, seed)

    def predict_minutes(self):
        """About how long the runs will take that are not complete; it begins the first of them."""
        missing = []
        for seed in self.seeds:
            for side in (self.before, self.after):
                newest = newest_record(self.save_dir(side, seed))
                if newest is None or newest["iteration"] < self.steps:
                    missing.append((side, seed))
        if not missing:
            return 0.0
        began = time.monotonic()
        self.train(*missing[0], "--max_minutes", str(TRIAL_MINUTES))
        trained = newest_record(self.save_dir(*missing[0]))
        if trained is None:  # `complete` will say why
            return 0.0
        per_step = trained["seconds"] / max(1, trained["iteration"] - 1)
        # What was not training: the start and one evaluation.
        other = time.monotonic() - began - TRIAL_MINUTES * 60
        evaluations = self.steps / min(self.before.flags["steps_per_eval"], self.steps)
        return len(missing) * (per_step * self.steps + max(0, other) * evaluations) / 60


def newest_record(folder):
    """The record of a run's checkpoint that was saved last, a dict, or None.

    folder: the run's, or the one that it lies in.
    """
    records = []
    # Not deeper: there may be single steps, computed again later.
    for path in [*folder.glob("*.metadata"), *folder.glob("*/*.metadata")]:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        records.append(json.loads(header["__metadata__"]["record"]))
    return max(records, key=itemgetter("saved"), default=None)


def read_rows(path):
    """The rows of a .csv file, {column: text}."""
    with open(path, encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def is_flags(typed):
    """Whether a side is typed as flags, not as a commit."""
    return typed is not None and typed.strip().startswith("-")


# ---- The files of a side ------------------------------------------------------------------------

QUESTION = """
import json, sys, main
from datasets import UsageError
try:
    flags = main.settle(main.read_command_line(sys.argv[1:]))
except UsageError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
answer = {"flags": vars(flags), "given": [*flags.given], "edited": main.EDITED}
print(json.dumps(answer, default=str))
"""


def make_side(role, typed, common):
    """The Side of a commit, or of the files and flags of now; typed: None for the files alone.

    Raises UsageError.
    """
    with explained(f"{typed} cannot be read as flags", ValueError):
        words = shlex.split(typed) if is_flags(typed) else []
    name = (typed or "your files").strip()
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "copy")
        copy.mkdir()
        if typed is None or words:
            copy_files(copy)
        else:
            copy_commit(typed, copy)
        # Only the role tells two equal sides apart: both are computed.
        key = hash_files(copy, [role, *common, *words])
        # Not by `python -c`, which would import the main.py of the working directory.
        question = Path(temporary, "question.py")
        question.write_text(QUESTION, encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, question, *common, *words]
        asked = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
        said = one_line(asked.stderr.strip().rpartition("\n")[2])
        if asked.returncode == 2:
            raise UsageError(said)
        if asked.returncode:
            raise RunError(f"{name} does not run: {said}")
        answer = json.loads(asked.stdout)
        folder = Path(answer["flags"]["save_dir"], "versus", f"{role}-{key[:12]}")
        if not folder.exists():
            with explained(f"cannot write to {folder}: name another --save_dir", OSError):
                folder.parent.mkdir(parents=True, exist_ok=True)
                # Perhaps from another file system: half a copy must not have this name.
                shutil.move(copy, folder.with_suffix(f".{os.getpid()}"))
                folder.with_suffix(f".{os.getpid()}").rename(folder)
    return Side(name, words, folder=folder, **answer)


def copy_files(folder):
    """Copies the program as it is now: its owner goes on editing it."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(
        HERE / "extras", folder / "extras", ignore=shutil.ignore_patterns("__pycache__")
    )


def copy_commit(commit, folder):
    """Copies the program as it is in a commit. Raises UsageError."""
    archive = ["git", "-C", HERE, "archive", "--format=tar", commit, "--", ":(glob)*.py", "extras"]
    try:
        files = subprocess.run(archive, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=files, check=True)
    except FileNotFoundError as error:
        raise UsageError(f"{error.filename} is missing: install it to compare commits") from None
    except subprocess.CalledProcessError as error:
        reason = one_line(error.stderr.decode(errors="replace"))
        raise UsageError(f"{commit} is no commit with this program ({reason})") from None
    if not (folder / "main.py").exists():
        raise UsageError(f"{commit} has no main.py: name a later commit")


def hash_files(folder, words):
    """The SHA1 of all files in a folder, with their names, and of these words."""
    digest = hashlib.sha1(json.dumps(words).encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = hashlib.sha1(path.read_bytes()).hexdigest()
            digest.update(f"\n{path.relative_to(folder)} {content}".encode())
    return digest.hexdigest()


def wait_for(process):
    """The exit status of a process, to which a signal that asks for the end is passed on.

    A terminal's Ctrl+C reaches it, too; main.py takes the two for one.
    """

    def forward(number, frame):
        process.send_signal(number)

    handlers = {}
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handlers[each] = signal.signal(each, forward)
    status = process.wait()
    for each, handler in handlers.items():
        signal.signal(each, handler)
    return 128 - status if status < 0 else status  # as shells report a signal


# ---- What is printed ----------------------------------------------------------------------------


def print_sameness(comparison):
    """Prints whether both sides end in the same weights; returns 0 if so, else 1."""
    for seed in comparison.seeds:
        before, after = comparison.complete_pair(seed)
        if before.id != after.id:
            print(f"Different weights after {comparison.steps} steps, seed {seed}.")
            return 1
    print(f"The same weights after {comparison.steps} steps, for each of these seeds.")
    return 0


def print_comparison(comparison, options):
    """Trains all pairs, prints what was found and records it."""
    before, after = comparison.before, comparison.after
    print(f"before   {before.name}\nafter    {after.name}")
    if comparison.plain:
        print(f"edited   {', '.join(comparison.plain)}: main.py's own on both sides")
    runs = 2 * len(comparison.seeds)
    minutes = comparison.predict_minutes()
    cost = f"about {minutes:.0f} minutes" if minutes >= 1 else "less than a minute"
    print(f"{runs} runs of {comparison.steps:,} steps, {cost} to go", flush=True)
    print(f"{'seed':>10}{'before':>10}{'after':>10}{'difference':>14}")
    pairs = []
    column = "score"
    for seed in comparison.seeds:
        pair = comparison.complete_pair(seed)
        pairs.append(pair)
        column = column_of(comparison, pair, column)
        first, second = [getattr(outcome, column) for outcome in pair]
        print(f"{seed:>10}{first:>10.4f}{second:>10.4f}{second - first:>+14.4f}", flush=True)
    result = {
        "comparison": comparison.key,
        "runs": comparison.runs,
        "before": before.name,
        "after": after.name,
        "flags": shlex.join(comparison.common),
        "steps": comparison.steps,
        "first_seed": comparison.seeds[0],
        "pairs": len(pairs),
        "unit": "nats/token" if column == "score" else "bits per byte",
    }
    result |= measure(pairs, column)
    path = comparison.folder / "versus.csv"
    result["verdict"] = describe_verdict(result, count_tries(path, result))
    if "low" in result:
        for line in [*describe_numbers(result), *describe_equal_time(result, pairs)]:
            print(line)
    print(result["verdict"])
    record(path, result)
    if options.json:
        print(json.dumps(result))


def column_of(comparison, pair, column):
    """What of two Outcomes is compared: "score", or "bits_per_byte" of different tokens.

    column: that of the pairs before. Raises UsageError if the texts differ.
    """
    texts = [outcome.tokens_sha256["valid"] for outcome in pair if outcome.id]
    if len({*texts}) < 2:
        return column
    tokenizers = []
    for side in (comparison.before, comparison.after):
        tokenizers.append((side.flags["tokenizer"], side.flags["vocab_size"]))
    if tokenizers[0] == tokenizers[1]:
        raise UsageError("the validation texts of the sides differ: nothing can be compared")
    if "word" in (tokenizers[0][0], tokenizers[1][0]):
        raise UsageError("a model that may answer <unk> has no bits per byte: use other tokenizers")
    return "bits_per_byte"


def measure(pairs, column):
    """The numbers of a comparison, {name: value}; if a run has diverged, only how many."""
    diverged = sum(outcome.id is None for pair in pairs for outcome in pair)
    if diverged:
        return {"diverged": diverged}
    before, after = np.array([[getattr(each, column) for each in pair] for pair in pairs]).T
    differences = after - before
    mean, margin = interval(differences)
    correlation = None  # of the sides
    if before.std() and after.std():
        correlation = float(np.corrcoef(before, after)[0, 1])
    speeds = np.array([[outcome.ms_per_step for outcome in pair] for pair in pairs])
    ms_before, ms_after = np.median(speeds, axis=0).tolist()
    return {
        "difference": float(mean),
        "low": float(mean - margin),
        "high": float(mean + margin),
        "spread": float(differences.std(ddof=1)),
        "agree": int((np.sign(differences) == np.sign(mean)).sum()),
        "correlation": correlation,
        "ms_before": ms_before,
        "ms_after": ms_after,
        "diverged": 0,
        "same": all(first.id == second.id for first, second in pairs) and not differences.any(),
    }


def interval(differences):
    """The mean of differences [pairs, ...], and half the width of its 95 % interval."""
    pairs = len(differences)
    margin = T_QUANTILES[pairs - 2] * differences.std(axis=0, ddof=1) / math.sqrt(pairs)
    return differences.mean(axis=0), margin


def describe_numbers(result):
    """Yields what was measured, a line each."""
    correlation = ""
    if result["correlation"] is not None:
        correlation = f"; correlation of the sides {result['correlation']:.2f}"
    yield (
        f"mean difference {result['difference']:+.4f} {result['unit']}, 95 % interval "
        f"{result['low']:+.4f} to {result['high']:+.4f}; {result['agree']} of {result['pairs']} "
        f"pairs have its sign{correlation}"
    )
    ratio = result["ms_after"] / result["ms_before"]
    yield (
        f"This is at equal steps. A step took {result['ms_before']:.1f} ms before, "
        f"{result['ms_after']:.1f} after ({ratio:.2f} times)."
    )


def describe_equal_time(result, pairs):
    """Yields a line on the side whose steps take longer: how far it comes in the other's time."""
    slower = int(result["ms_after"] > result["ms_before"])
    times = sorted([result["ms_before"], result["ms_after"]])
    factor = times[1] / times[0]
    curves = [pair[slower].curve for pair in pairs]
    iterations = sorted(curves[0])
    steps = result["steps"] / factor
    if factor < LONGER or result["unit"] != "nats/token" or steps < iterations[0]:
        return
    means = [np.mean([curve[iteration] for curve in curves]) for iteration in iterations]
    score = np.interp(steps, iterations, means)
    other = np.mean([pair[1 - slower].score for pair in pairs])
    yield (
        f"In equal time, {('before', 'after')[slower]} has taken {steps:,.0f} steps: "
        f"{score:.4f} on its curve, in the middle of its schedule, beside {other:.4f}."
    )


def describe_verdict(result, tries):
    """What the numbers say; tries: see count_tries."""
    if result["diverged"]:
        return f"{result['diverged']} of {2 * result['pairs']} runs diverged: no interval."
    if result["same"]:
        return (
            f"No effect, proved: the same weights and scores after step {result['steps']:,}, for "
            "these flags and seeds."
        )
    fresh = f"--seeds {result['first_seed'] + 100}"
    if result["low"] <= 0 <= result["high"]:
        pairs = result["pairs"]
        shown = detectable(result["spread"], pairs)
        smaller = detectable(result["spread"], 4 * pairs)
        return (
            f"No difference seen. With this spread, {pairs} pairs would mostly show one of roughly "
            f"{shown:.2g}; {4 * pairs} fresh pairs ({fresh}), one of {smaller:.2g}."
        )
    helped = result["difference"] < 0
    if tries == 1:
        return "Helped." if helped else "Hurt."
    return (
        f"Looks {'better' if helped else 'worse'}, but this is try {tries} on these seeds, and "
        f"one of many looks so by chance: confirm it, once, with {fresh}."
    )


def detectable(spread, pairs):
    """The difference that so many pairs show four times in five."""
    quantile = T_QUANTILES[min(pairs, MOST_PAIRS) - 2]
    return (quantile + T_POWER) * spread / math.sqrt(pairs)


# ---- The record of all comparisons --------------------------------------------------------------


COLUMNS = (
    *("comparison", "runs", "before", "after", "flags", "steps", "first_seed", "pairs", "unit"),
    *("difference", "low", "high", "spread", "agree", "correlation", "ms_before", "ms_after"),
    *("diverged", "same", "verdict"),
)


def same_comparison(row, result):
    """Whether a row of versus.csv is of the same sides, flags and seeds."""
    names = ("comparison", "flags", "steps", "first_seed", "pairs")
    return all(row[name] == str(result[name]) for name in names)


def count_tries(path, result):
    """How many comparisons there were on some of these seeds, up to this one.

    Those with other flags behind -- are not counted.
    """
    own = {*range(result["first_seed"], result["first_seed"] + result["pairs"])}
    tries = 1
    for row in read_rows(path) if path.exists() else []:
        if same_comparison(row, result):
            break  # it has its place among them
        first = int(row["first_seed"])
        shared = own & {*range(first, first + int(row["pairs"]))}
        if row["flags"] == result["flags"] and shared:
            tries += 1
    return tries


def record(path, result):
    """Adds a row to versus.csv, unless the same comparison is there already."""
    rows = read_rows(path) if path.exists() else []
    if any(same_comparison(row, result) for row in rows):
        return
    with open(path, "a", encoding="utf-8", newline="", opener=no_follow) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not rows:
            writer.writeheader()
        writer.writerow(result)


if __name__ == "__main__":
    repair_streams()
    sys.exit(run_command("extras.versus", main, sys.argv[1:]))
