"""Did an edit help, or was it noise? Trains both sides with the same seeds and compares them.

    python -m extras.versus HEAD -- --config first             your files against the last commit
    python -m extras.versus main feature -- --config first     two commits
    python -m extras.versus "--dropout 0.1" -- --config first  flags against none
    python -m extras.versus HEAD --tune dropout=0,0.1 -- --config first   each at its best
    python -m extras.versus --list                             what was compared so far

Behind -- are the flags of main.py that both sides have. With the same seed, both sides read the
same batches and begin with the same weights, so that much of the noise of a single run cancels.
What is compared is the loss on validation text, computed by a judge (extras/judge.py) from the last
checkpoints. Interrupted, the same command goes on where it was. extras/versus.md says what its
numbers mean.
"""

import argparse
import contextlib
import difflib
import fcntl
import functools
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

CANNOT_TELL = 125  # `git bisect run` then skips the commit

try:  # not main.py: the files of now may not even run
    from datasets import Parser, RunError, UsageError, explained, flock, hash_of_code
    from datasets import hash_of_file, locked, no_follow, number, one_line, run_program
    from datasets import words_of_code
    from extras.judge import BITS, DIVERGED, LIMIT, SIDE, Referee, SideError, choose_spans, failure
    from extras.judge import read_text
except Exception as error:
    print(f"extras.versus: cannot run with these files: {error!r}", file=sys.stderr)
    sys.exit(CANNOT_TELL)

HERE = Path(os.path.abspath(__file__)).parent.parent  # extras/ may be a link

PAGES = (".md", ".rst", ".ipynb", ".svg", ".png", ".jpg", ".pdf")
LARGE = 1 << 20  # bytes of a file that is linked instead of copied
MOST = 20 << 20  # bytes of all that are copied
OWN_TOKENS = 4096  # that a run scores at its end, and the judge after it
SAME_STEPS = 20  # of each run of --same, the first five of them warm-up
RESULTS = "comparisons.jsonl"
# A race looks at these numbers of pairs. A difference counts if |t| is beyond the value: by this
# rule, 5 % of all useless edits are called helpful or harmful, at whatever look.
RACE = {4: 4.85, 6: 3.84, 8: 3.28, 10: 2.96, 12: 2.76}
HOPELESS = 0.7  # from six pairs on, a race ends where |t| is below it
POWER = 1.5  # times half an interval, whose spread is estimated: what four in five would show
SLOWER = 1.05  # a ratio of times that a verdict says
NOISE = 0.03  # half an interval of ratios of times, at most, for what follows from it
TUNED = 2  # seeds on which --tune chooses
SCREENED = 6  # pairs of --gate on used seeds
PROMISING = -1.8  # the t that they have to reach; see tests/nightly/rules.py

# Flags of this program that main.py does not have.
OWN = ["pairs", "seeds", "margin", "tokens", "jobs", "json", "same", "tune"]

# Flags of main.py that have no place here, and why.
REFUSED = dict.fromkeys(["patience", "max_minutes"], "both sides take --num_iters steps")
REFUSED["identifier"] = "--init_from RUN begins with the weights of another run"
REFUSED |= dict.fromkeys(["new_model", "inference", "prompt", "evaluate", "list"], "all runs train")


def main(arguments):
    """Compares what these arguments name; returns the exit status. Raises UsageError, RunError."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, stop)
    options, common = read_arguments(arguments)
    if options.list:
        return print_list(options.list)
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
    """The options of this program, with the sides, and the words behind --. Raises UsageError."""
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
    keep = f"for loops: 0 keep, 1 drop, {CANNOT_TELL} cannot tell; see extras/agent.md"
    add("--gate", "--keep", action="store_true", help=keep)
    add("--list", metavar="SAVE_DIR", nargs="?", const="runs", help="what was compared in a folder")
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


def is_flags(side):
    """Whether a side is flags for the files of now, or none, and not a commit."""
    return not side or side.startswith("-")


# ---- Sides --------------------------------------------------------------------------------------


class Side(NamedTuple):
    """One of the two things that are compared, as extras/side.py describes it."""

    name: str  # what was typed
    folder: Path  # a copy of its files
    words: list  # its flags, as they were when it was asked
    flags: dict  # the values of all flags, as its main.py understands them
    given: list  # the names of those that were given
    shape: dict  # the values of those that may change a run
    edited: list  # functions of its main.py that its extras/fast.py does not know
    notices: list  # lines for the user
    files: dict  # of the checkpoints that its flags name, {name in its folder: path}
    sources: list  # the files that decide how its runs end, relative to its folder
    origins: dict  # the ids of the models that its runs begin with
    versions: dict  # of all that its last bits depend on
    parameters: int  # of its model
    vocab_size: int
    context_size: int
    texts: dict  # {split: the SHA256 of its tokens and tokenizer}
    tokenizer: dict  # its to_dict()


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
        names = tracked = git_files("--cached")
        if "main.py" not in tracked:  # no repository, or another one
            names, tracked = files_without_git(), []
    else:
        copy_commit(typed, folder)
        names = tracked = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    linked = copy_files([*names, *git_files("--others", "--exclude-standard")], folder)
    command = [sys.executable, "-B", SIDE, folder, "describe", *words]
    asked = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if asked.returncode:
        raise failure(name, asked.returncode, asked.stderr)
    answer = json.loads(asked.stdout)
    unseeded = answer.pop("unseeded")
    if unseeded:
        raise SideError(f"{name}: all seeds give the same {unseeded}", name)
    sources = []
    for path in sorted({*tracked, *answer.pop("read")}):
        is_page = path.startswith(("tests/", ".git")) or path.endswith(PAGES)
        if (folder / path).is_file() and not is_page:
            sources.append(path)
    if linked:
        more = f" and {len(linked) - 5} more" if len(linked) > 5 else ""
        answer["notices"].append(f"Linked, not copied: {', '.join(linked[:5])}{more}")
    return Side(name, folder, sources=sources, **answer)


def git_files(*kinds):
    """The paths of files in the program's folder that git lists, if there are git and a repository.

    kinds: options of `git ls-files`.
    """
    command = ["git", "-C", HERE, "ls-files", "-z", *kinds]
    with contextlib.suppress(FileNotFoundError):
        listed = subprocess.run(command, capture_output=True).stdout
        return os.fsdecode(listed).split("\0")[:-1]
    return []


def files_without_git():
    """The paths of files beside main.py and in packages there."""
    packages = [HERE / "extras", *(each.parent for each in HERE.glob("*/__init__.py"))]
    paths = [*HERE.iterdir(), *(path for package in packages for path in package.rglob("*"))]
    names = [str(path.relative_to(HERE)) for path in paths if path.is_file()]
    return [name for name in names if "__pycache__" not in name]


def copy_files(names, folder):
    """Copies the program's files as they are now: their owner goes on editing them.

    A file that is there already stays. Large ones are linked: their names are returned.
    """
    linked = []
    total = 0  # bytes
    for name in names:
        path = HERE / name
        target = folder / name
        if os.path.lexists(target) or not path.exists():  # or it was deleted
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size
        if path.is_dir():  # a link, as extras/ may be
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif size > LARGE or total + size > MOST:
            target.symlink_to(path)
            linked.append(name)
        else:
            shutil.copy(path, target)
            total += size
    return linked


def copy_commit(commit, folder):
    """Copies the program as it is in a commit. Raises UsageError."""
    with explained("to compare commits, install git and tar", FileNotFoundError):
        asked = subprocess.run(["git", "-C", HERE, "archive", commit], capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=asked.stdout, capture_output=True)
    for path in [*folder.iterdir()]:
        if path.is_symlink():  # to what is in no commit: it is taken as it is now
            path.unlink()
            copy = shutil.copytree if (HERE / path.name).is_dir() else shutil.copy
            copy(HERE / path.name, path)
    if not (folder / "main.py").exists():
        reason = one_line(asked.stderr.decode(errors="replace")) or "it has no main.py"
        raise UsageError(f"{commit} is no commit with this program ({reason})")


def short_id(typed):
    """The beginning of a commit's id; "" for flags."""
    if is_flags(typed):
        return ""
    command = ["git", "-C", HERE, "rev-parse", "--short", typed]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def install(side, save_dir, cores, others):
    """The Side with its files in a folder of its own, named by what decides how its runs end.

    cores: how many each of its runs has; others: what else there is, plain data.
    """
    hashes = {name: hash_of(side.folder / name) for name in side.sources}
    data = [side.shape, side.origins, side.texts, side.versions, hashes, *others]
    sha1 = hashlib.sha1(json.dumps(data, sort_keys=True).encode()).hexdigest()
    folder = Path(save_dir, "versus", f"{sha1[:12]}.{cores}").absolute()
    fault = f"cannot write to {folder}: name another --save_dir"
    with explained(fault, OSError), locked(folder.parent):
        if not folder.exists():
            # Half a copy never has its name.
            partial = folder.with_name(f"{folder.name}.{os.getpid()}")
            shutil.copytree(side.folder, partial, symlinks=True)
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


def hash_of(path):
    """What tells a file of a side from others; layout and comments of code do not."""
    if path.is_symlink():  # a large one
        return [path.stat().st_size, path.stat().st_mtime_ns]
    if path.suffix == ".py":
        return hash_of_code(path.read_text("utf-8", errors="replace"))
    return hash_of_file(path)


def count_words(side):
    """The length of a side's code; remarks and line breaks do not count."""
    paths = [side.folder / name for name in side.sources if name.endswith(".py")]
    return sum(len(words_of_code(path.read_text("utf-8", errors="replace"))) for path in paths)


def patch(before, after):
    """What tells the files of two Sides apart, as text that `patch` reads."""
    lines = []
    for name in sorted({*before.sources, *after.sources}):
        texts = []
        for side in (before, after):
            path = side.folder / name
            is_there = name in side.sources and not path.is_symlink()
            text = path.read_text("utf-8", errors="replace") if is_there else ""
            texts.append(text.splitlines(True))
        lines += difflib.unified_diff(*texts, f"a/{name}", f"b/{name}")
    return "".join(lines)


# ---- Runs ---------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What there is to compare of a run."""

    id: str | None = None  # of its last checkpoint; None if it has none
    score: float = math.nan  # of the validation text
    test_score: float = math.nan  # of the test text, if there is one
    fault: str | None = None  # DIVERGED, or what is wrong with its score, see Referee
    read: int | None = None  # tokens
    seconds: float = math.nan  # of the processor, for the whole process; nan if it was there before
    kept_seconds: float = math.nan  # the same, also where it was there before


class Comparison:
    """Two Sides and the runs of both: those of a side differ in nothing but their seeds."""

    def __init__(self, options, common, flag=None, values=(None, None)):
        """See read_arguments; flag, values: of --tune, for each side.

        Raises UsageError, RunError.
        """
        self.options = options
        self.common = common
        self.tuned = {"flag": flag, "values": values} if flag else None
        own = [[*common, f"--{flag}={value}"] if flag else common for value in values]
        with tempfile.TemporaryDirectory() as temporary:
            temporary = os.path.realpath(temporary)
            before = make_side(options.before, own[0], Path(temporary, "before"))
            after = make_side(options.after, own[1], Path(temporary, "after"))
            check_flags(before, after, options.same)
            self.texts = [read_text(before, after, split) for split in ("valid", "test")]
            self.unit = self.texts[0].unit
            contexts = [before.context_size, after.context_size]
            self.spans = []
            for text in self.texts:
                self.spans.append(text and choose_spans(text, contexts, options.tokens))
            self.first_seed = before.flags["seed"] if options.seeds is None else options.seeds
            self.on_gpu = before.flags["gpu"] or after.flags["gpu"]
            self.shares = share_cores(options.jobs or (1 if self.on_gpu else 4))
            # Where either side runs its own function instead of that of extras/fast.py, both have
            # to: or the difference would also be that of two ways to round.
            self.plain = sorted({*before.edited, *after.edited})
            self.environment = os.environ | {"PLAIN_FUNCTIONS": ",".join(self.plain)}
            self.patch = patch(before, after)
            self.commits = [short_id(options.before), short_id(options.after)]
            installed = []
            for side in (before, after):
                words = words_of_run(side.flags, options.same)
                side = side._replace(words=[*side.words, *words])
                cores = len(self.shares[0])
                others = [self.plain, options.same]
                installed.append(install(side, before.flags["save_dir"], cores, others))
            self.before, self.after = installed
        self.ledger = self.before.folder.parent / RESULTS
        self.processes = set()
        self.is_stopped = False

    def pairs(self, seeds):
        """Yields each seed with the Outcomes of both sides.

        As many runs train at a time as there are shares of the cores. Closing the generator ends
        those that still train. Raises UsageError, RunError.
        """
        shares = [*self.shares]

        def take_share():  # by the thread, which gives it to the processes that it starts
            share = shares.pop()
            if share:
                os.sched_setaffinity(0, share)

        self.is_stopped = False
        pool = ThreadPoolExecutor(len(shares), initializer=take_share)
        try:
            pairs = []
            for seed in seeds:
                sides = (self.before, self.after)
                pairs.append([pool.submit(self.run, i, side, seed) for i, side in enumerate(sides)])
            for seed, (before, after) in zip(seeds, pairs):
                yield seed, before.result(), after.result()
        finally:
            self.is_stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*self.processes]:
                process.terminate()
            pool.shutdown()

    def run(self, index, side, seed):
        """Trains a run to its end and has it judged; returns the Outcome.

        index: 0 for the side before, 1 for that after. Raises UsageError, RunError.
        """
        # Another comparison may train the same run. The run inherits this lock: if only this
        # program was killed, the run still has it.
        path = side.folder / f"output-{seed}.txt"
        with open(path, "a+", errors="replace", opener=no_follow) as output:
            while not self.is_stopped:
                with contextlib.suppress(BlockingIOError):
                    flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.2)
            if self.is_stopped:
                raise RunError("stopped")
            record = newest_record(side.folder, seed)
            seconds = math.nan
            if not record or record["iteration"] < self.steps(side):
                output.truncate(0)
                status, seconds = self.train(side, seed, output)
                output.seek(0)
                error = failure(side.name, status, output.read()) if status else None
                if error and "is not finite" in str(error):
                    return Outcome(fault=DIVERGED)
                if error:
                    raise error
                # The time of a run that was resumed is not that of a whole run.
                seconds = math.nan if record else seconds
                path.with_name(f"seconds-{seed}.json").write_text(json.dumps(seconds))
                record = newest_record(side.folder, seed)
            if not record:
                raise SideError(f"{side.name} cannot run: it has saved nothing", side.name)
            if record["tokens_sha256"] != side.texts:
                raise UsageError(f"the text of {side.name} has changed since this comparison began")
            if self.options.same:  # only the weights count
                return Outcome(record["id"])
            *scores, fault = self.judge(index, side, record)
        steps = record["iteration"]
        if steps != self.steps(side):
            fault = f"it has taken {steps:,} steps, not {self.steps(side):,}"
        kept = math.nan
        with contextlib.suppress(OSError, ValueError):
            kept = json.loads(path.with_name(f"seconds-{seed}.json").read_text())
        return Outcome(record["id"], *scores, fault, record["tokens_seen"], seconds, kept)

    def describe(self):
        """What a result says of what was compared, {name: value}."""
        before, after = self.before, self.after
        return {
            # Without the number of cores: the same edit on other shares is no other comparison.
            "comparison": f"{before.folder.stem} {after.folder.stem}",
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "before": before.name,
            "after": after.name,
            "commits": self.commits,
            "flags": shlex.join(self.common),
            "unit": self.unit,
            "parameters": [before.parameters, after.parameters],
            "steps": [self.steps(before), self.steps(after)],
            "patch": self.patch,
            "tuned": self.tuned,
        }

    def results(self):
        """All results in the ledger."""
        return read_results(self.ledger)

    def steps(self, side):
        """How many steps the runs of a side take."""
        return int(side.words[-1].partition("=")[2])

    def train(self, side, seed, output):
        """Trains a run or goes on with it; returns its exit status and time in seconds.

        That is processor time of the whole process, which other programs do not prolong; on a GPU,
        it is by the clock.
        """
        words = [*side.words, f"--seed={seed}", f"--save_dir={side.folder}"]
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, side.folder / "main.py", *words],
            env=self.environment,
            cwd=side.folder,  # where its code finds what it reads
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        self.processes.add(process)
        _, status, usage = os.wait4(process.pid, 0)
        self.processes.discard(process)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = usage.ru_utime + usage.ru_stime
        return process.returncode, time.monotonic() - began if self.on_gpu else seconds

    def judge(self, index, side, record):
        """The scores of a checkpoint on both texts, and what is wrong with them, see Outcome.

        They are kept in a file beside it.
        """
        tokens = [text and text.tokens[index] for text in self.texts]
        digest = hashlib.sha1(repr([record["id"], self.unit, self.spans]).encode())
        digest.update(SIDE.read_bytes() + SIDE.with_name("judge.py").read_bytes())
        for ids in tokens:
            digest.update(b"" if ids is None else ids)
        path = side.folder / f"judged-{digest.hexdigest()}.json"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text("utf-8"))
        with Referee(side, record["path"], self.environment) as referee:
            self.processes.add(referee.process)
            scores, fault = referee.judge(tokens, self.spans, own_score(record, tokens[0]))
            self.processes.discard(referee.process)
        for i, text in enumerate(self.texts):
            if self.unit == BITS and text:
                scores[i] *= (len(tokens[i]) - 1) / math.log(2) / text.num_bytes
        judged = [*scores, fault]
        path.write_text(json.dumps(judged), "utf-8")
        return judged


def own_score(record, tokens):
    """The number of tokens that a run has scored at its end, and their loss."""
    *_, last = record["scores"] or [[record["iteration"], math.inf]]
    if len(last) == 2:  # older commits did not record it
        last = [*last, min(OWN_TOKENS, len(tokens) - 1)]
    _, loss, count, *_ = last
    return count, loss


def words_of_run(flags, same):
    """What a comparison adds to the flags of a side; the last word is the number of steps.

    A run keeps one checkpoint, and is scored by the judge. With --same, it is short.
    """
    steps = SAME_STEPS if same else flags["num_iters"]
    words = [
        f"--steps_per_eval={steps}",
        f"--steps_per_save={flags['steps_per_save'] or flags['steps_per_eval'] or steps}",
        "--keep=1",
        f"--eval_tokens={1 if same else OWN_TOKENS}",
        "--sample_tokens=0",
    ]
    if same:  # the schedule is to show, not only its warm-up
        words.append(f"--lr_warmup={min(5, flags['lr_warmup'])}")
    return [*words, f"--num_iters={steps}"]


def tuned(options, common):
    """The Comparison of both sides, each with that value of --tune which suits it best.

    All values are tried with the first seeds, the Comparison begins behind them. Raises UsageError,
    RunError.
    """
    flag, _, listed = options.tune.partition("=")
    values = listed.split(",")
    losses = []  # of each value, [2]
    for value in values:
        comparison = Comparison(options, common, flag, [value, value])
        seeds = range(comparison.first_seed, comparison.first_seed + TUNED)
        with contextlib.closing(comparison.pairs(seeds)) as trained:
            pairs = [pair for _, *pair in trained]
        has_fault = np.any([[bool(each.fault) for each in pair] for pair in pairs], axis=0)
        means = np.where(has_fault, math.inf, column(pairs, "score").mean(axis=1))
        losses.append(means)
        print(f"--{flag} {value}: before {means[0]:.4f}, after {means[1]:.4f}", flush=True)
    chosen = [values[place] for place in np.argmin(losses, axis=0)]
    options.seeds = comparison.first_seed + TUNED
    comparison = Comparison(options, common, flag, chosen)
    comparison.tuned["at_edge"] = bool({*chosen} & {values[0], values[-1]})
    return comparison


def share_cores(jobs):
    """The cores of each of so many runs, or of fewer runs if there are fewer cores.

    The sets have the same size: how many cores a run has decides how its sums are rounded.
    """
    if not hasattr(os, "sched_getaffinity"):  # on macOS, each run has all cores
        return [set()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    allowed = len(cores)
    with contextlib.suppress(OSError, ValueError):  # a container's share of them; "max" for all
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("utf-8").split()
        allowed = max(1, int(quota) // int(period))
    jobs = min(jobs, len(cores), allowed)
    size = len(cores) // jobs
    return [{*cores[i * size : (i + 1) * size]} for i in range(jobs)]


def check_flags(before, after, same):
    """Raises UsageError where two Sides cannot be compared."""
    for name, reason in REFUSED.items():
        if name in [*before.given, *after.given]:
            raise UsageError(f"--{name} cannot be compared: {reason}")
    if same and before.flags["num_iters"] != after.flags["num_iters"]:
        raise UsageError(f"--same takes {SAME_STEPS} steps of both sides: give one --num_iters")
    for side in (before, after):
        for path in map(Path, side.flags.get("test_text") or []):
            if {path, *path.parents} & {*map(Path, side.flags["text"] or [])}:
                raise UsageError(f"--test_text {path} is also in --text, which the runs learn from")
        for name, path in side.files.items():
            learned = name.endswith(".metadata") and read_record(path)["tokens_sha256"]["train"]
            if learned == side.texts["valid"]:
                fault = "was trained on the validation text: name another, or another --valid_text"
                raise UsageError(f"{side.name}: the model in {name.partition('/')[0]} {fault}")


def read_record(path):
    """The record of a checkpoint, in its .metadata. Raises OSError."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["record"])


def newest_record(folder, seed):
    """The record of the checkpoint of a seed that was saved last, with its `path`, or None."""
    records = []
    for path in folder.glob("*/*.metadata"):
        if path.parent.name in ("init_from", "teacher"):  # what the runs begin with
            continue
        # Runs of other seeds delete checkpoints of theirs.
        with contextlib.suppress(FileNotFoundError):
            record = read_record(path)
            if record["flags"]["seed"] == seed and path.with_suffix(".safetensors").exists():
                records.append(record | {"path": path})
    return max(records, key=itemgetter("saved"), default=None)


# ---- Numbers ------------------------------------------------------------------------------------


@functools.cache
def t_quantile(pairs):
    """What Student's t of so many differences stays below, to both sides of zero, in 95 %."""
    # By t = sqrt(pairs - 1) * tan(angle), its density becomes a power of the cosine.
    angles = np.linspace(0, np.pi / 2, 10**6)
    below = np.cumsum(np.cos(angles) ** (pairs - 2))
    return math.sqrt(pairs - 1) * math.tan(np.interp(0.95 * below[-1], below, angles))


def interval(values, quantile=None):
    """The mean of values [pairs], the ends of its 95 % interval, and its t."""
    mean = values.mean()
    error = values.std(ddof=1) / math.sqrt(len(values))
    half = (quantile or t_quantile(len(values))) * error
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return mean, mean - half, mean + half, t


def measure(pairs, quantile=None):
    """The numbers of pairs of Outcomes, {name: value}.

    quantile: the t beyond which a difference counts, by default that of 95 %.
    """
    before, after = scores = column(pairs, "score")
    mean, low, high, _ = interval(after - before, quantile)
    numbers = {
        "difference": mean,
        "low": low,
        "high": high,
        "agree": int((np.sign(after - before) == np.sign(mean)).sum()),
        "scores_before": before.tolist(),
        "scores_after": after.tolist(),
    }
    test_difference = changes(pairs, "test_score").mean()
    if math.isfinite(test_difference):  # there is such a text
        numbers["test_difference"] = test_difference
    if scores.std(axis=1).all():
        numbers["correlation"] = np.corrcoef(scores)[0, 1]
    seconds = column(pairs, "seconds")
    ratios = seconds[1] / seconds[0]
    ratios = ratios[np.isfinite(ratios)]
    if len(ratios) > 2:
        numbers |= zip(("time", "time_low", "time_high"), interval(ratios))
    kept = column(pairs, "kept_seconds")
    if np.isfinite(kept).all():
        numbers["kept_time"] = float(np.median(kept[1] / kept[0]))
    return numbers


def column(pairs, name):
    """A field of the Outcomes of pairs, [2, pairs]."""
    return np.array([[getattr(outcome, name) for outcome in pair] for pair in pairs]).T


def find_fault(pairs):
    """What makes the runs of a side worthless: "before" or "after", and a text; or two Nones."""
    for name, own in zip(("before", "after"), zip(*pairs)):
        faults = [each.fault for each in own if each.fault]
        if len(own) > 1 and len({each.id for each in own}) == 1:
            faults.append("all seeds end in the same weights")
        if faults:
            return name, faults[0]
    return None, None


def changes(pairs, name="score"):
    """After minus before of a field of the Outcomes of pairs, [pairs]."""
    before, after = column(pairs, name)
    return after - before


def race(looks, margin, pairs):
    """The outcome of a race after these pairs, one of the keys of VERDICTS; None: more are needed.

    looks: {number of pairs: the t beyond which a difference counts}; margin: see --margin.
    """
    if len(pairs) not in looks:
        return None
    quantile = looks[len(pairs)]
    is_last = len(pairs) == max(looks)
    _, low, high, t = interval(changes(pairs), quantile)
    if not changes(pairs).any() and all(before.id == after.id for before, after in pairs):
        return "same"
    if t > quantile:
        return "hurt"
    if t < -quantile:
        test = changes(pairs, "test_score")
        is_better_there = interval(test, quantile)[3] < -quantile
        # That much less on test text, and by no accident.
        is_less_there = interval(changes(pairs) - test)[3] < -quantile
        if is_less_there:
            return "partly" if is_better_there else "valid only"
        return "helped"
    if margin is not None:
        if max(-low, high) < margin:
            return "equal"
        if is_last and high < margin:
            return "not worse"
    elif len(pairs) >= 6 and abs(t) < HOPELESS:
        return "none"
    return "none" if is_last else None


def screen(worst, pairs):
    """The outcome of pairs on seeds that were used before: "promising" or "not better".

    worst: the difference that is to be beaten, 0 or a margin. None: more pairs are needed.
    """
    if len(pairs) not in (2, SCREENED):
        return None
    mean, *_, t = interval(changes(pairs) - worst)
    if not changes(pairs).any():
        return "same"
    if len(pairs) == 2:
        return None if mean < 0 else "not better"
    return "promising" if t < PROMISING else "not better"


# ---- What is printed and recorded ---------------------------------------------------------------

VERDICTS = {
    "helped": "Helped",
    "hurt": "Hurt",
    "partly": "Helped by no more than on test text: part of it is a leak",
    "valid only": "Better on validation text only",
    "equal": "Equal within {margin:g}",
    "not worse": "Not worse by more than {margin:g}",
    "none": "No difference seen",
    "promising": "Promising, on seeds that were used before",
    "not better": "Not better, on seeds that were used before",
    "same": "No effect, proved: the same weights, for these flags and seeds",
    "diverged": "Diverged: runs of {at_fault}",  # "before" or "after"
    "cannot tell": "Cannot tell",
}


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
    result = compare(comparison, seeds, partial(race, looks, options.margin), looks)
    print_result(result, options)


def keep_or_drop(comparison):
    """Whether a loop should keep an edit; returns the exit status.

    It keeps only with equal steps, training text and number of tokens read, and with a test text.

    A few pairs on seeds that were used before, and for which the side before is likely to be
    trained, sort out most edits. What they promise counts only if a race confirms it, on seeds that
    nothing was chosen by.
    """
    options = comparison.options
    before, after = comparison.before, comparison.after
    if comparison.texts[1] is None:
        raise UsageError("--gate asks for text that the runs do not have: name some by --test_text")
    is_smaller = count_words(after) < count_words(before)
    margin = options.margin if is_smaller else None
    first = comparison.first_seed
    number = f"2 or {SCREENED}, then {min(RACE)} to {max(RACE)}"
    print_start(comparison, number)
    result = compare(comparison, range(first, first + SCREENED), partial(screen, margin or 0))
    if result["outcome"] == "promising":
        print("That is promising. On seeds that no comparison has had:")
        fresh = 1 + max(max(each["seeds"], default=first) for each in comparison.results())
        decide = partial(race, RACE, margin)
        result = compare(comparison, range(fresh, fresh + max(RACE)), decide, RACE)
    kept = ["helped", "partly", "equal", "not worse"]
    if margin is not None:
        kept.append("same")
    if result["at_fault"] == "before":
        print_result(result, options)
        return CANNOT_TELL
    is_equal = len({*result["steps"]}) == 1 and not result["unlike"]
    is_kept = result["outcome"] in kept and is_equal
    print_result(result, options, "Keep." if is_kept else "Drop.")
    return 0 if is_kept else 1


def compare(comparison, seeds, decide, looks=None):
    """Trains pairs until `decide` names an outcome; records the result, and returns it.

    decide: a function of the pairs so far; looks: see race.
    """
    sides = comparison.before, comparison.after
    pairs, outcome, (at_fault, fault) = train_pairs(comparison, seeds, decide)
    result = comparison.describe() | {
        "seeds": [*seeds[: len(pairs)]],
        "outcome": outcome,
        "at_fault": at_fault,
        "fault": fault,
        "unlike": unlike(*sides, pairs),
    }
    if len(pairs) > 1 and not fault:
        result |= measure(pairs, looks and looks.get(len(pairs)))
    tries = {result["comparison"]}
    for other in comparison.results():
        has_baseline = other["comparison"].split()[0] == sides[0].folder.stem
        is_alike = has_baseline or other["flags"] == result["flags"]
        if is_alike and other["outcome"] != "same" and {*other["seeds"]} & {*result["seeds"]}:
            tries.add(other["comparison"])
    result["tries"] = len(tries)
    result["verdict"] = describe_verdict(result, comparison.options.margin)
    with open(comparison.ledger, "a", encoding="utf-8", opener=no_follow) as file:
        file.write(json.dumps(result) + "\n")
    return result


def train_pairs(comparison, seeds, decide):
    """Trains pairs and prints them; returns them, the outcome, and what find_fault found."""
    pairs = []
    if comparison.before.folder == comparison.after.folder:
        return pairs, "same", (None, None)
    print(f"{'seed':>10}{'before':>10}{'after':>10}{'difference':>14}", flush=True)
    with contextlib.closing(comparison.pairs(seeds)) as trained:
        for seed, *pair in trained:
            pairs.append(pair)
            before, after = [each.score for each in pair]
            print(f"{seed:>10}{before:>10.4f}{after:>10.4f}{after - before:>+14.4f}", flush=True)
            at_fault, fault = find_fault(pairs)
            if fault:
                outcome = "diverged" if fault == DIVERGED else "cannot tell"
            else:
                outcome = decide(pairs)
            if outcome:
                return pairs, outcome, (at_fault, fault)


def unlike(before, after, pairs):
    """What the two Sides were given that is not alike, apart from what is compared: names."""
    names = []
    if before.tokenizer != after.tokenizer:
        return names
    if before.texts["train"] != after.texts["train"]:
        names.append("training text")
    for pair in pairs[:1]:
        read = [each.read for each in pair if each.read]
        if before.flags["num_iters"] == after.flags["num_iters"] and len({*read}) > 1:
            names.append("number of tokens read")
    return names


def print_result(result, options, *lines):
    """Prints what was found."""
    for line in [*describe_numbers(result), result["verdict"], *lines]:
        print(line)
    if options.json:
        print(json.dumps(result))


def print_start(comparison, number):
    """Prints what is compared; number: of pairs, in words."""
    before, after = comparison.before, comparison.after
    print(f"before   {before.name}\nafter    {after.name}")
    if comparison.plain:
        names = ", ".join(comparison.plain)
        print(f"edited   {names}: each side runs that of its main.py, not of extras/fast.py")
    for line in dict.fromkeys([*before.notices, *after.notices]):
        print(line)
    if before.parameters != after.parameters:
        print(
            f"The models differ in size: {before.parameters:,} parameters before, "
            f"{after.parameters:,} after."
        )
    steps = [comparison.steps(side) for side in (before, after)]
    print(f"{number} pairs of runs: {steps[0]:,} steps before, {steps[1]:,} after")


def describe_numbers(result):
    """Yields what was measured, a line each; nothing where there are no numbers."""
    if "difference" not in result:
        return
    pairs = len(result["seeds"])
    line = (
        f"mean difference {result['difference']:+.4f} {result['unit']}, 95 % interval "
        f"{result['low']:+.4f} to {result['high']:+.4f}; {result['agree']} of {pairs} pairs have "
        "its sign"
    )
    if pairs > 3 and "correlation" in result:  # of two, it is 1 or -1
        line += f"; correlation of the sides {result['correlation']:.2f}"
    yield line
    if "test_difference" in result:
        yield f"On test text, the mean difference is {result['test_difference']:+.4f}."
    else:
        yield "Not checked on text that the sides have not had: name some with --test_text."
    if "time" not in result:
        earlier = ""
        if "kept_time" in result:
            ratio = f"{result['kept_time']:.2f} times as long"
            earlier = f' By those of earlier runs, "after" took {ratio}.'
        yield f"No times: fewer than three pairs were trained anew.{earlier}"
        return
    time, low, high = result["time"], result["time_low"], result["time_high"]
    times = f'"After" took {time:.3f} times as long ({low:.3f} to {high:.3f})'
    steps = result["steps"]
    if steps[0] != steps[1]:
        yield f"{times}."
    elif high - low > 2 * NOISE * time:
        yield f"This holds at equal steps. {times}: too noisy to say more."
    elif low <= 1 <= high:
        yield f"This holds at equal steps and equal time: {times}."
    else:
        equal = f'for equal time, add --num_iters {steps[0] / time:.0f} to it'
        yield f"This holds at equal steps. {times}: {equal}."


def describe_verdict(result, margin):
    """The verdict of a result in words."""
    at_fault = result["at_fault"]
    verdict = VERDICTS[result["outcome"]].format(margin=margin, at_fault=at_fault)
    if result["outcome"] == "same" and not result["seeds"]:
        verdict = "The same code and flags on both sides: nothing is trained"
    elif result["outcome"] == "cannot tell":
        verdict += f": {result[at_fault]}: {result['fault']}"
    elif result["outcome"] == "none":
        pairs = len(result["seeds"])
        shown = POWER * (result["high"] - result["low"]) / 2
        verdict += f": {pairs} pairs show a difference of {shown:.2g} four times in five"
    verdict = ", ".join([verdict, *conditions(result)])
    if result["tries"] > 1 and result["outcome"] in ("helped", "partly", "hurt", "valid only"):
        verdict += f": try {result['tries']} on these seeds"
    return f"{verdict}."


def conditions(result):
    """Yields under which conditions a verdict holds, apart from what is compared."""
    if result["outcome"] == "helped" and "test_difference" not in result:
        yield "on validation text (there was no test text)"
    before, after = result["steps"]
    if before != after and "difference" in result:
        yield f"with {after / before:.3g} times the steps"
    elif result.get("time_low", 0) > SLOWER:
        yield f"in {result['time']:.2g} times the time"
    for what in result["unlike"]:
        yield f"with another {what}"
    if result["tuned"]:
        before, after = result["tuned"]["values"]
        at_edge = " (at the edge of the list: give more)" if result["tuned"]["at_edge"] else ""
        yield f"each at its best {result['tuned']['flag']}: {before} before, {after} after{at_edge}"


def read_results(path):
    """The results of all comparisons in a file, if there is one; see record."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    with explained(f"{path} is damaged: delete its last line", ValueError, kind=RunError):
        return [json.loads(line) for line in lines]


def print_list(save_dir):
    """Prints what was compared in a folder of runs, a line each, the last one at the end."""
    results = read_results(Path(save_dir, "versus", RESULTS))
    if not results:
        raise UsageError(f"nothing was compared in {save_dir}: name a --save_dir of comparisons")
    for each in results:
        interval = ""
        if "difference" in each:
            interval = f"{each['difference']:+.4f} ({each['low']:+.4f} to {each['high']:+.4f})"
        sides = zip((each["before"], each["after"]), each["commits"])
        before, after = [f"{name} {commit}".rstrip() for name, commit in sides]
        pairs = f"{len(each['seeds']):>2} pairs"
        tries = f", try {each['tries']}" if each["tries"] > 1 else ""
        outcome = f"{each['outcome']}{tries}"
        print(
            f"{each['date']}  {pairs}  {interval:<30}{outcome:<18}{before} -> {after} -- "
            f"{each['flags']}"
        )


if __name__ == "__main__":
    run_program("extras.versus", main)
