"""Did an edit help, or was it noise? Trains both sides with the same seeds and compares them.

    python -m extras.versus HEAD -- --config first             your files against the last commit
    python -m extras.versus main feature -- --config first     two commits
    python -m extras.versus "--dropout 0.1" -- --config first  flags against none

Behind -- are the flags of main.py that both sides have. With the same seed, both sides read the
same batches and begin with the same weights, so that much of the noise of a single run cancels.
What is compared is the loss of the whole validation split after the last step. Several runs train
at a time, each on its share of the cores. Interrupted, the same command goes on where it was.
extras/versus.md says what its numbers mean.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

# Not main.py: the files of now may not even run.
from datasets import Parser, RunError, UsageError, explained, flock, no_follow, number, one_line
from datasets import run_program

HERE = Path(__file__).resolve().parent.parent

NATS = "nats/token"
BITS = "bits per byte"  # of sides with different tokens
SAME_STEPS = 20  # of each run of --same
RESULTS = "comparisons.jsonl"
POWER = 1.4  # times half the interval: the difference that is seen four times in five
CANNOT_TELL = 125  # `git bisect run` then skips the commit

# Flags of main.py that have no place here, and those that have to be the same on both sides: first
# those that decide the validation text.
REFUSED = ["patience", "max_minutes", "eval_tokens", "identifier", "new_model"]
REFUSED += ["inference", "prompt", "evaluate", "list"]
SHARED = ["dataset", "text", "valid_text", "valid_fraction", "text_field"]
SHARED += ["seed", "save_dir", "data_dir"]


def main(arguments):
    """Compares what these arguments name; returns the exit status. Raises UsageError, RunError."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    options, common = read_arguments(arguments)
    if not options.same:
        return print_comparison(Comparison(options, common), options.json)
    try:
        return print_sameness(Comparison(options, common))
    except (UsageError, RunError) as error:
        print(f"Cannot tell: {one_line(error)}", file=sys.stderr)
        return CANNOT_TELL


def stop(number, frame):
    """Ends this program; Comparison.complete_pairs first ends the runs that it waits for."""
    print("\nStopped: the same command goes on.", file=sys.stderr)
    sys.exit(128 + number)


def read_arguments(arguments):
    """The options of this program, with the sides, and the words behind --. Raises UsageError."""
    parser = Parser(
        prog="python -m extras.versus",
        usage="%(prog)s SIDE [SIDE] [options] -- [flags of main.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("before", metavar="SIDE", type=str.strip, help="a commit, or flags in quotes")
    add("after", metavar="SIDE", type=str.strip, nargs="?", default="", help="another (your files)")
    add("--pairs", type=number(int, 2), default=6, help="of runs (6)")
    add("--seeds", type=int, help="the first one (that of --seed, or 42)")
    jobs = "runs at a time, each on its share of the cores (4; with --gpu, 1)"
    add("--jobs", type=number(int, 1), help=jobs)
    add("--json", action="store_true", help="the result as JSON on the last line")
    same = f"exit status 0: same weights after {SAME_STEPS} steps, 1: others, {CANNOT_TELL}: no run"
    add("--same", action="store_true", help=same)
    end = [*arguments, "--"].index("--")
    # argparse takes a word that begins with a blank for no option: these are sides.
    flag = r"^-(?!h$|-(help|pairs|seeds|jobs|json|same)\b)"
    options = parser.parse_args([re.sub(flag, " -", word) for word in arguments[:end]])
    if is_flags(options.before) and not options.after:  # compared with what there is without them
        options.before, options.after = "", options.before
    return options, arguments[end + 1 :]


def is_flags(side):
    """Whether a side is flags for the files of now, or none, and not a commit."""
    return not side or side.startswith("-")


# ---- Sides --------------------------------------------------------------------------------------


class Side(NamedTuple):
    """One of the two things that are compared."""

    name: str  # what was typed
    folder: Path  # a copy of its files
    words: list  # its flags
    flags: dict  # the values of all flags, as its main.py understands them
    given: list  # the names of those that were given
    edited: list  # functions of its main.py that its extras/fast.py does not know
    files: dict  # of the checkpoints that its flags name, {name in its folder: path}


# The main.py of a side is asked what its flags mean, and which files are the checkpoints that they
# name.
QUESTION = """
import sys
sys.path[0] = sys.argv.pop(1)  # not the working directory, which may have another main.py
import json, main
from datasets import RunError, UsageError, open_data_dir
files = {}
words = sys.argv[1:]
try:
    flags = main.settle(main.read_command_line(sys.argv[1:]))
    flags.data_dir = open_data_dir(flags.data_dir, flags.given.get("save_dir"))
    for flag in main.ORIGINS:
        name = getattr(flags, flag)
        if name and not main.is_foreign(name):
            source = main.open_model(flags.save_dir, name, flag)
            words.append(f"--{flag}={source.id}")
            files |= {f"{flag}/{name}": path.resolve() for name, path in source.files.items()}
except (RunError, UsageError) as error:
    print(error, file=sys.stderr)
    sys.exit(2)
answer = {"words": words, "flags": vars(flags), "given": [*flags.given]}
answer |= {"edited": main.EDITED, "files": files}
print(json.dumps(answer, default=str))
"""


def make_side(typed, common, folder):
    """The Side of a commit, or of flags for the files of now; folder: a new one, for its files.

    Raises UsageError, RunError.
    """
    name = typed or "your files"
    words = common
    folder.mkdir()
    if is_flags(typed):
        with explained(f"{name} cannot be read as flags", ValueError):
            words = [*common, *shlex.split(typed)]
        copy_files(folder)
    else:
        copy_commit(typed, folder)
    command = [sys.executable, "-Bc", QUESTION, folder, *words]
    asked = subprocess.run(command, capture_output=True, errors="replace")
    if asked.returncode:
        raise failure(name, asked.returncode, asked.stderr)
    return Side(name, folder, **json.loads(asked.stdout))


def copy_files(folder):
    """Copies the program as it is now: its owner goes on editing it."""
    for path in HERE.glob("*.py"):
        shutil.copy(path, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(HERE / "extras", folder / "extras", ignore=ignored)


def copy_commit(commit, folder):
    """Copies the program as it is in a commit. Raises UsageError."""
    archive = ["git", "-C", HERE, "archive", commit, "--", ":(glob)*.py", "extras"]
    with explained("to compare commits, install git and tar", FileNotFoundError):
        asked = subprocess.run(archive, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=asked.stdout, capture_output=True)
    if not (folder / "main.py").exists():
        reason = one_line(asked.stderr.decode(errors="replace")) or "it has no main.py"
        raise UsageError(f"{commit} is no commit with this program ({reason})")


def install(side, save_dir, plain, cores):
    """The Side with its files in a folder of its own, named by them and by all of its flags.

    plain: see Comparison; cores: how many each of its runs has, the suffix of the folder's name.
    """
    digest = hashlib.sha1(json.dumps([plain, side.words]).encode())
    for path in sorted(side.folder.rglob("*")):
        if path.is_file():
            digest.update(f"\n{path.relative_to(side.folder)}\n".encode() + path.read_bytes())
    # Only the role, "before" or "after", tells two equal sides apart: both are computed.
    identity = f"{side.folder.name}-{digest.hexdigest()[:12]}"
    folder = Path(save_dir, "versus", f"{identity}.{cores}")
    if not folder.exists():
        with explained(f"cannot write to {folder}: name another --save_dir", OSError):
            # Half a copy never has its name.
            partial = folder.with_name(f"{folder.name}.{os.getpid()}")
            shutil.copytree(side.folder, partial)
            for name, path in side.files.items():  # its runs find them by their ids
                link_or_copy(path, partial / name)
            partial.rename(folder)
    return side._replace(folder=folder)


def link_or_copy(path, target):
    """Links a file, which may be large, or copies it from another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copy(path, target)


def failure(name, status, output):
    """The exception for a main.py that has failed: its last line, and where a traceback points."""
    line = one_line(output.strip().rpartition("\n")[2]) or f"exit status {status}"
    for file, place in re.findall(r'File ".*?(\w+\.py)", line (\d+)', output)[-1:]:
        line += f" ({file}, line {place})"
    kind = UsageError if status == 2 else RunError
    return kind(f"{name} cannot run: {line}")


# ---- Runs ---------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What there is to compare of a run."""

    id: str | None  # of its last checkpoint; None if it diverged
    parameters: int  # of its model
    steps: int
    score: float  # of the whole validation split after its last step; nan if it diverged
    ms_per_step: float
    text: str | None  # the SHA256 of its validation tokens


class Training(NamedTuple):
    """A run that a process trains."""

    side: Side
    seed: int
    cores: set
    process: subprocess.Popen
    output: TextIO  # the file in which it prints


class Comparison:
    """Two Sides and the runs of both: those of a side differ in nothing but their seeds."""

    def __init__(self, options, common):
        """See read_arguments. Raises UsageError, RunError."""
        self.common = common
        with tempfile.TemporaryDirectory() as temporary:
            before = make_side(options.before, common, Path(temporary, "before"))
            after = make_side(options.after, common, Path(temporary, "after"))
            check_flags(before, after)
            flags = before.flags
            self.unit = choose_unit(before, after)
            first = flags["seed"] if options.seeds is None else options.seeds
            self.seeds = range(first, first + options.pairs)
            on_gpu = before.flags["gpu"] or after.flags["gpu"]
            self.shares = share_cores(options.jobs or (1 if on_gpu else 4))
            # Where either side runs its own function instead of that of extras/fast.py, both have
            # to: or the difference would also be that of two ways to round.
            self.plain = sorted({*before.edited, *after.edited})
            installed = []
            for side in (before, after):
                steps = SAME_STEPS if options.same else side.flags["num_iters"]
                words = [*side.words, *words_of_run(side.flags, steps)]
                side = side._replace(words=words)
                cores = len(self.shares[0])
                installed.append(install(side, flags["save_dir"], self.plain, cores))
            self.before, self.after = installed

    def complete_pairs(self):
        """Yields each seed with the Outcomes of both sides.

        As many runs train at a time as there are shares of the cores. Closing the generator ends
        those that still train. Raises UsageError, RunError.
        """
        sides = (self.before, self.after)
        waiting = [(side, seed) for seed in self.seeds for side in sides]
        running = []
        outcomes = {}  # {(folder of a side, seed): Outcome}
        free = [*self.shares]
        try:
            for seed in self.seeds:
                pair = [(side.folder, seed) for side in sides]
                while any(run not in outcomes for run in pair):
                    while free and waiting:
                        running.append(self.start(*waiting.pop(0), free.pop(0)))
                    time.sleep(0.05)
                    ended = [each for each in running if each.process.poll() is not None]
                    for each in ended:
                        running.remove(each)
                        free.append(each.cores)
                        outcomes[each.side.folder, each.seed] = self.outcome(each)
                yield seed, *[outcomes[run] for run in pair]
        finally:  # after a signal, which a terminal has sent to all: main.py counts one
            for each in running:
                each.process.terminate()
            for each in running:
                each.process.wait()

    def start(self, side, seed, cores):
        """Starts to train a run on these cores, or to resume it; returns the Training."""
        words = [*side.words, f"--seed={seed}", f"--save_dir={side.folder}"]
        # The run inherits this lock: if only this program was killed, the run still has it.
        output = open(side.folder / f"output-{seed}.txt", "a+", errors="replace", opener=no_follow)
        flock(output)
        output.truncate(0)
        with on_cores(cores):
            process = subprocess.Popen(
                [sys.executable, side.folder / "main.py", *words],
                env=os.environ | {"PLAIN_FUNCTIONS": ",".join(self.plain)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        return Training(side, seed, cores, process, output)

    def outcome(self, training):
        """The Outcome of a run whose process has ended. Raises UsageError, RunError.

        If it was complete before, main.py has said so: whether it is that run, it knows best.
        """
        side = training.side
        with training.output as output:
            output.seek(0)
            printed = output.read()
        status = training.process.returncode
        if status:
            error = failure(side.name, status, printed)
            if "is not finite" not in str(error):
                raise error
            nan = math.nan
            return Outcome(id=None, parameters=0, steps=0, score=nan, ms_per_step=nan, text=None)
        with explained(f"the runs of {side.name} cannot be read", kind=RunError):
            run = re.search(r"^run +(\S+),", printed, re.MULTILINE).group(1)
            parameters = re.search(r"^model +(\S+) parameters", printed, re.MULTILINE).group(1)
            newest = newest_record(side.folder / run)
            scale = 1.0
            if self.unit == BITS:
                with open(side.folder / run / "log.csv", encoding="utf-8", newline="") as file:
                    [*_, row] = [row for row in csv.DictReader(file) if row["split"] == "valid"]
                scale = float(row["bits_per_byte"]) / float(row["loss"])
            steps = newest["iteration"]
            return Outcome(
                id=newest["id"],
                parameters=int(parameters.replace(",", "")),
                steps=steps,
                score=scale * dict(newest["scores"])[steps],
                # The first step, which compiles, has no time.
                ms_per_step=1000 * (newest["seconds"] or math.nan) / steps,
                text=newest["tokens_sha256"]["valid"],
            )


def words_of_run(flags, steps):
    """What a comparison adds to the flags of a side.

    A run is scored once, after the last step, and keeps one checkpoint.
    """
    return [
        f"--num_iters={steps}",
        f"--steps_per_eval={steps}",
        f"--steps_per_save={flags['steps_per_save'] or flags['steps_per_eval']}",
        "--keep=1",
        "--eval_tokens=0",
        "--sample_tokens=0",
        f"--data_dir={flags['data_dir']}",
    ]


def share_cores(jobs):
    """The cores of each of so many runs, or of fewer runs if there are fewer cores.

    The sets have the same size: how many cores a run has decides how its sums are rounded.
    """
    if not hasattr(os, "sched_getaffinity"):  # on macOS, each run has all cores
        return [set()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    jobs = min(jobs, len(cores))
    size = len(cores) // jobs
    return [{*cores[i * size : (i + 1) * size]} for i in range(jobs)]


@contextlib.contextmanager
def on_cores(cores):
    """Processes that are started in this block run on these cores."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def check_flags(before, after):
    """Raises UsageError where two Sides cannot be compared."""
    for name in REFUSED:
        if name in [*before.given, *after.given]:
            raise UsageError(
                f"--{name} cannot be compared: both sides train new runs, of --num_iters steps, "
                "and are scored on the whole validation split (--init_from RUN begins with the "
                "weights of another run)"
            )
    for name in SHARED:
        if before.flags[name] != after.flags[name]:
            raise UsageError(f"--{name} has to be the same on both sides: put it behind --")


def choose_unit(before, after):
    """The unit in which two Sides are compared. Raises UsageError if there is none."""
    tokenizers = {(side.flags["tokenizer"], side.flags["vocab_size"]) for side in (before, after)}
    if len(tokenizers) == 1:
        return NATS
    if "word" in [name for name, _ in tokenizers]:
        raise UsageError("a model that may answer <unk> has no bits per byte: use other tokenizers")
    return BITS


def newest_record(folder):
    """The record of the checkpoint that was saved last in a run's folder."""
    records = []
    for path in folder.glob("*.metadata"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        records.append(json.loads(header["__metadata__"]["record"]))
    return max(records, key=itemgetter("saved"))


# ---- Numbers ------------------------------------------------------------------------------------


def t_quantile(pairs):
    """What Student's t of so many differences stays below, to both sides of zero, in 95 %."""
    # By t = sqrt(pairs - 1) * tan(angle), its density becomes a power of the cosine.
    angles = np.linspace(0, np.pi / 2, 10**6)
    below = np.cumsum(np.cos(angles) ** (pairs - 2))
    return math.sqrt(pairs - 1) * math.tan(np.interp(0.95 * below[-1], below, angles))


def interval(differences):
    """The mean of differences [pairs], and half the width of its 95 % interval."""
    pairs = len(differences)
    deviation = differences.std(ddof=1) / math.sqrt(pairs)
    return differences.mean(), t_quantile(pairs) * deviation


def measure(pairs):
    """The numbers of pairs of Outcomes, {name: value}; all are None if a run has diverged."""
    before, after = np.array([[outcome.score for outcome in pair] for pair in pairs]).T
    speeds = [[outcome.ms_per_step for outcome in pair] for pair in pairs]
    ms_before, ms_after = np.median(speeds, axis=0)
    differences = after - before
    mean, margin = interval(differences)
    first, second = pairs[0]
    numbers = {
        "parameters_before": first.parameters,
        "parameters_after": second.parameters,
        "steps_before": first.steps,
        "steps_after": second.steps,
        "difference": mean,
        "low": mean - margin,
        "high": mean + margin,
        "spread": differences.std(ddof=1),
        "agree": int((np.sign(differences) == np.sign(mean)).sum()),
        "correlation": np.corrcoef(before, after)[0, 1],
        "scores_before": before.tolist(),
        "scores_after": after.tolist(),
        "ms_before": ms_before,
        "ms_after": ms_after,
        "same": all(one.id == other.id for one, other in pairs) and not differences.any(),
    }
    diverged = int(np.isnan([before, after]).sum())
    if diverged:
        numbers = dict.fromkeys(numbers)
    return numbers | {"diverged": diverged}


# ---- What is printed and recorded ---------------------------------------------------------------


def print_sameness(comparison):
    """Prints whether both sides end in the same weights; returns 0 if so, else 1."""
    with contextlib.closing(comparison.complete_pairs()) as pairs:
        for seed, before, after in pairs:
            if None in (before.id, after.id):
                raise RunError(f"a run with seed {seed} has diverged")
            if before.id != after.id:
                print(f"Different weights after {SAME_STEPS} steps, seed {seed}.")
                return 1
    print(f"The same weights after {SAME_STEPS} steps, for each of these seeds.")
    return 0


def print_comparison(comparison, as_json):
    """Trains all pairs, prints what was found and records it."""
    before, after = comparison.before, comparison.after
    print(f"before   {before.name}\nafter    {after.name}")
    if comparison.plain:
        names = ", ".join(comparison.plain)
        print(f"edited   {names}: each side runs that of its main.py, not of extras/fast.py")
    steps = [side.flags["num_iters"] for side in (before, after)]
    print(f"{2 * len(comparison.seeds)} runs: {steps[0]:,} steps before, {steps[1]:,} after")
    print(f"{'seed':>10}{'before':>10}{'after':>10}{'difference':>14}", flush=True)
    pairs = []
    began = time.monotonic()
    with contextlib.closing(comparison.complete_pairs()) as completed:
        for seed, first, second in completed:
            texts = {first.text, second.text} - {None}
            if comparison.unit == NATS and len(texts) > 1:
                raise UsageError("the sides have other validation texts: nothing can be compared")
            pairs.append((first, second))
            difference = f"{second.score - first.score:>+14.4f}"
            print(f"{seed:>10}{first.score:>10.4f}{second.score:>10.4f}{difference}", flush=True)
            left = len(comparison.seeds) / len(pairs) - 1  # as a multiple of what is done
            minutes = left * (time.monotonic() - began) / 60
            if minutes >= 1.5:
                print(f"about {minutes:.0f} minutes to go", file=sys.stderr)
    result = {
        # Without the number of cores: the same edit on other shares is no other comparison.
        "comparison": f"{before.folder.stem} {after.folder.stem}",
        "before": before.name,
        "after": after.name,
        "flags": shlex.join(comparison.common),
        "seeds": [*comparison.seeds],
        "unit": comparison.unit,
    }
    result |= measure(pairs)
    line = record(before.folder.parent / RESULTS, result)
    if not result["diverged"]:
        for each in describe_numbers(result):
            print(each)
    print(result["verdict"])
    if as_json:
        print(line)


def describe_numbers(result):
    """Yields what was measured, a line each."""
    yield (
        f"mean difference {result['difference']:+.4f} {result['unit']}, 95 % interval "
        f"{result['low']:+.4f} to {result['high']:+.4f}; {result['agree']} of "
        f"{len(result['seeds'])} pairs have its sign; correlation of the sides "
        f"{result['correlation']:.2f}"
    )
    if result["parameters_before"] != result["parameters_after"]:
        yield (
            f"The models differ in size: {result['parameters_before']:,} parameters before, "
            f"{result['parameters_after']:,} after."
        )
    times = f"A step took {result['ms_before']:.1f} ms before, {result['ms_after']:.1f} after"
    before = result["steps_before"] * result["ms_before"]  # of all steps, in ms
    if result["steps_before"] == result["steps_after"]:
        steps = before / result["ms_after"]
        equal = f'For equal time, add --num_iters {steps:.0f} to "after".'
        yield f"This is at equal steps. {times}. {equal}"
    else:
        after = result["steps_after"] * result["ms_after"]
        yield f"{times}; all steps, {before / 1000:.1f} s and {after / 1000:.1f} s."


def describe_verdict(result, tries):
    """What the numbers say; tries: how many comparisons there were on some of these seeds."""
    pairs = len(result["seeds"])
    if result["diverged"]:
        return f"{result['diverged']} of {2 * pairs} runs diverged: no interval."
    if result["same"]:
        return (
            f"No effect, proved: the same weights and scores after step {result['steps_after']:,}, "
            "for these flags and seeds."
        )
    fresh = f"--seeds {result['seeds'][0] + max(100, pairs)}"
    if result["low"] <= 0 <= result["high"]:
        shown = POWER * (result["high"] - result["low"]) / 2
        return (
            f"No difference seen. With this spread, {pairs} pairs show a difference of {shown:.2g} "
            f"four times in five; {4 * pairs} fresh ones (--pairs {4 * pairs} {fresh}), one of "
            f"{shown / 2:.2g}."
        )
    helped = result["difference"] < 0
    if tries == 1:
        return "Helped." if helped else "Hurt."
    return (
        f"Looks {'better' if helped else 'worse'}, but this is try {tries} on these seeds, and "
        f"one of many looks so by chance: confirm it, once, with {fresh}."
    )


def record(path, result):
    """Adds the verdict to a result, and the result to a file of them; returns its line of JSON.

    A try is a comparison on some of the same seeds, with the same flags behind --; repeating it
    makes no other.
    """
    earlier = set()
    for other in read_results(path):
        if all(other[name] == result[name] for name in ("comparison", "seeds")):
            break
        if other["flags"] == result["flags"] and {*other["seeds"]} & {*result["seeds"]}:
            earlier.add((other["comparison"], *other["seeds"]))
    result["verdict"] = describe_verdict(result, 1 + len(earlier))
    # nan is no JSON.
    line = json.dumps({name: value if value == value else None for name, value in result.items()})
    with open(path, "a", encoding="utf-8", opener=no_follow) as file:
        file.write(f"{line}\n")
    return line


def read_results(path):
    """The results of all comparisons in a file, if there is one; see record."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    with explained(f"{path} is damaged: delete its last line", ValueError, kind=RunError):
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    run_program("extras.versus", main)
