"""A fault at every call of the system that a run makes; then random ones. All from outside.

    python tests/nightly/inject_faults.py                           every call, every action
    python tests/nightly/inject_faults.py --every 40                one in forty of these cases
    python tests/nightly/inject_faults.py --random 5000 --seed 7    five thousand random faults
    python tests/nightly/inject_faults.py --only begin-57-power   one again, or 7-12 of --random
    python tests/nightly/inject_faults.py --checkout DIR            the main.py of another folder

A *leg* is main.py as it is, in a fork of this process, started as a user starts it. In it, each
call that opens, reads, writes, names, syncs or deletes something in the folder of runs is counted,
and a fault strikes at one of them, see ACTIONS. Seconds are a thousandth as long in it, so that the
pauses between the tries of a save take no time.

Afterwards the same command, undisturbed, has to end as the run that was never touched: with the
same checkpoints, scores and log. No leg may end in a traceback or an unworded status, leave a
half-written checkpoint, lose more than the steps since the last save, or change another run.
"""

import atexit
import builtins
import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forkserver import Program, case_parser, play_all

FASTER = 1000  # how many seconds of a leg pass in one
# Exit statuses, with the work saved.
SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 138}

# What can happen at a call of the system, but for signals:
ACTIONS = [
    "kill",  # the process is killed; a write is half done; what it wrote stays
    "power",  # the power fails: all that was not synced is lost, names and contents
    "names",  # it fails after the system wrote the names, but no content that was not synced
    "EIO",  # this call fails, once
    "ENOSPC",  # from here on nothing can be written; two signals then end the process
]
# Calls of the module os whose first argument is a path or a descriptor.
CALLS = "open replace rename link unlink mkdir rmdir fsync scandir listdir".split()
FILLING = "replace rename link mkdir fsync write".split()  # what a full disk refuses


# ---- In the process of a leg --------------------------------------------------------------------


class Disk:
    """What of a folder would be there after the power has failed.

    A file's content is what it was when the file was last synced, and the names in a folder are
    those of when that was. Files are known by their inodes; each is held open, so that its number
    is not given to another file.
    """

    def __init__(self, folder):
        self.folder = folder
        self.root = os.stat(folder).st_ino
        self.names = {}  # {inode of a folder: {name: inode}}
        self.contents = {}  # {inode of a file: bytes}; none of one that was never synced
        self.held = []
        for path in [folder, *Path(folder).rglob("*")]:
            self.hold(path)
            self.sync(path)

    def hold(self, path):
        """Notes a file or folder that is there, or is new."""
        self.held.append(CALLED["open"](path, os.O_RDONLY | os.O_NONBLOCK))
        if os.path.isdir(path):
            self.names.setdefault(os.stat(path).st_ino, {})

    def sync(self, path):
        """Notes what is in a file or folder: it is on disk now."""
        inode = os.stat(path).st_ino
        if os.path.isdir(path):
            self.names[inode] = {each.name: each.inode() for each in CALLED["scandir"](path)}
        else:
            with OPEN(path, "rb") as file:
                self.contents[inode] = file.read()

    def lose(self, keeps_names):
        """Leaves of the folder what is on disk; with `keeps_names`, also all names."""
        if keeps_names:
            for place, _, _ in os.walk(self.folder):
                self.sync(place)
        shutil.rmtree(self.folder)
        self.write(self.root, self.folder)

    def write(self, inode, path):
        """Makes the file or folder of an inode, as it is on disk."""
        if inode in self.names:
            os.mkdir(path)
            for name, other in self.names[inode].items():
                self.write(other, os.path.join(path, name))
        else:
            with OPEN(path, "wb") as file:
                file.write(self.contents.get(inode, b""))


CALLED = {name: getattr(os, name) for name in CALLS}  # as they are
OPEN = io.open
SLEEP = time.sleep
MONOTONIC = time.monotonic
TIME = time.time


def path_of(path):
    """The absolute path of a path, or of what a descriptor is open for."""
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    return os.path.abspath(os.fsdecode(path))


class Watch:
    """Stands between a program and the system for the rest of this process.

    folder: that of the runs; strikes: [(call, action), ...]; report: the file that says what was
    struck and, at the end, how many calls there were.
    """

    def __init__(self, folder, strikes, report):
        self.folder = str(folder)
        self.strikes = dict(strikes)
        self.report = report
        self.count = 0
        self.is_full = False  # the disk
        self.disk = Disk(self.folder)
        for name in CALLS:
            setattr(os, name, self.watched(name))
        builtins.open = io.open = self.open
        WatchedFile.watch = self
        time.sleep = self.sleep
        time.monotonic = self.monotonic
        atexit.register(self.tell, {})
        self.tell({})  # the program begins

    def sleep(self, seconds):
        SLEEP(seconds / FASTER)

    def monotonic(self):
        return MONOTONIC() * FASTER

    def tell(self, content):
        with OPEN(self.report, "a") as file:
            file.write(json.dumps(content | {"call": self.count}) + "\n")

    def is_ours(self, path):
        """Whether a path, or what a descriptor is open for, is in the folder."""
        return path_of(path).startswith(self.folder)

    def watched(self, name):
        """The function of the module os, whose calls are met."""
        function = CALLED[name]

        def call(path=".", *arguments, **options):
            if not self.is_ours(path):
                return function(path, *arguments, **options)
            self.meet(name, path)
            result = function(path, *arguments, **options)
            if name == "mkdir":
                self.disk.hold(path)
            if name == "fsync":
                self.disk.sync(path_of(path))
            return result

        return call

    def open(self, path, mode="r", buffering=-1, *texts, opener=None, **options):
        """In the place of open: the same, but the calls of the file, which is buffered, are met.

        texts and options: what a TextIOWrapper takes, too.
        """
        if isinstance(path, int) or not self.is_ours(path):
            return OPEN(path, mode, buffering, *texts, opener=opener, **options)
        self.meet("open", path)
        raw = WatchedFile(path, mode.replace("t", ""), opener=opener)
        if "r" in mode:
            file = io.BufferedReader(raw)
        else:
            self.disk.hold(path)
            file = io.BufferedWriter(raw)
        return file if "b" in mode else io.TextIOWrapper(file, *texts, **options)

    def meet(self, what, path, begin=None):
        """Counts a call, and strikes if one is due. begin: does half of what the call would do."""
        self.count += 1
        action = self.strikes.get(self.count)
        if action:
            self.tell({"action": action, "what": what, "path": str(path)})
            self.strike(action, begin)
        if self.is_full and what in FILLING:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def strike(self, action, begin):
        if action == "kill":
            if begin:
                begin()
            os.kill(os.getpid(), signal.SIGKILL)
        elif action in ("power", "names"):
            vars(os).update(CALLED)
            self.disk.lose(keeps_names=action == "names")
            os.kill(os.getpid(), signal.SIGKILL)
        elif action in ("ENOSPC", "ENOSPC for a while"):
            self.is_full = True
            reaction = self.give_up if action == "ENOSPC" else self.make_room
            threading.Thread(target=reaction, daemon=True).start()
        elif action == "clock set back":
            time.time = the_time_of_long_ago
        elif action in SIGNALS:
            self.send(getattr(signal, action))
        else:
            if begin:
                begin()
            raise OSError(getattr(errno, action), action)

    def send(self, number):
        """Sends this process a signal, and waits until it says on stderr that it knows."""
        said = os.fstat(2).st_size
        os.kill(os.getpid(), number)
        for _ in range(100):
            SLEEP(0.005)  # a next one within half a second of a leg would count as the same
            if os.fstat(2).st_size > said:
                break

    def give_up(self):
        """Does in a thread what a user does whose disk is full: presses Ctrl+C, then insists."""
        SLEEP(0.15)  # for some tries: of a leg's time, minutes
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            SLEEP(0.03)
            os.kill(os.getpid(), signal.SIGTERM)

    def make_room(self):
        SLEEP(0.05)
        self.is_full = False


def the_time_of_long_ago():
    return TIME() - 1e6


class WatchedFile(io.FileIO):
    """An open file whose calls the Watch of this process meets."""

    watch = None

    def readinto(self, buffer):
        self.watch.meet("read", self.name)
        return super().readinto(buffer)

    def readall(self):
        self.watch.meet("read", self.name)
        return super().readall()

    def write(self, data):
        def begin():
            half = len(data) // 2
            super(WatchedFile, self).write(bytes(data)[:half])

        self.watch.meet("write", self.name, begin)
        return super().write(data)


# ---- What a folder holds ------------------------------------------------------------------------
# Read without the program: it is an oracle.


def sha1_of_arrays(path):
    """The SHA1 of the arrays in a safetensors file: of all that follows its header."""
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha1(data[header:]).hexdigest()


def read_log(run, may_repeat):
    """The rows of a run's log, {(iteration, split): row}, without what is a matter of time."""
    rows = {}
    for path in run.glob("log.csv"):  # if there is one
        for row in csv.DictReader(path.read_text().splitlines()):
            if may_repeat and (None in row or None in row.values()):  # cut off, or two in one
                continue
            key = (int(row["iteration"]), row["split"])
            assert may_repeat or key not in rows, f"the log has {key} twice"
            measured = ("seconds", "tokens_per_second", "ms_per_step", "peak_mib")
            # A column may be of rows that were lost: what is empty is not there.
            rows[key] = {name: text for name, text in row.items() if text and name not in measured}
    return rows


def read_samples(run):
    """The samples of a run, {iteration: text}; those of a save that was repeated are equal."""
    samples = {}
    for path in run.glob("samples.jsonl"):  # if there is one
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut off by a kill, and what was appended to that
                continue
            text = samples.setdefault(row["iteration"], row["text"])
            assert row["text"] == text, f"two samples of {row['iteration']}"
    return samples


class Kept(NamedTuple):
    """A checkpoint, as its .metadata has it."""

    id: str
    iteration: int
    score: float | None


def read_kept(run):
    """The checkpoints of a run whose records are whole, a set of Kept."""
    kept = set()
    for path in run.glob("*.metadata"):
        data = path.read_bytes()
        try:
            texts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            record = texts["record"]
            is_whole = hashlib.sha1(record.encode()).hexdigest() == texts["sha1"]
        except (ValueError, KeyError):
            continue
        if is_whole and path.with_suffix(".safetensors").exists():
            fields = json.loads(record)
            score = {each[0]: each[1] for each in fields["evaluations"]}.get(fields["iteration"])
            kept.add(Kept(path.stem, fields["iteration"], score))
    return kept


# ---- Legs ---------------------------------------------------------------------------------------


class Leg:
    """What a leg has done, as far as its streams and its Watch tell.

    Runs are short here: the numbers of iterations have no commas.
    """

    def __init__(self, status, out, err, report):
        self.status = status
        self.out = out
        self.err = err
        self.struck = [row for row in report if "action" in row]
        self.calls = max([row["call"] for row in report], default=0)
        self.saved = {}  # {iteration: id}
        for name, iteration in re.findall(r"^saved (\w{40}) at iteration (\d+)$", out, re.M):
            self.saved[int(iteration)] = name
        self.run = None  # its name, if the leg came so far as to say it
        self.begun = None  # and the iteration from which it went on
        found = re.search(r"^run +(\S+), from iteration (\d+) to", out, re.M)
        if found:
            self.run = found[1]
            self.begun = int(found[2])
        self.reached = max(self.saved, default=0)  # the iteration that it says is safe
        saved = r"^(?:Run complete \(|Stopped at iteration )(\d+)(?:/|\. Rerun|\. To resume)"
        found = re.search(saved, out, re.M)
        if found:
            self.reached = int(found[1])

    def may_lack_rows(self):
        """Whether rows of the log may be gone: what is not synced, or what it could not take."""
        for row in self.struck:
            if row["action"] in ("power", "names", "ENOSPC", "ENOSPC for a while"):
                return True
            path = row["path"]  # of an fsync, the number of a file
            if row["action"] == "EIO" and (path.isdigit() or path.endswith((".csv", ".new"))):
                return True
        return False


class Work:
    """A folder of runs, `lm` in a folder of its own, and the legs that were played in it."""

    program = None  # the Program that all legs run

    def __init__(self, place, template=None):
        self.place = place
        self.folder = place / "lm"
        self.folder.mkdir(parents=True)
        if template:
            shutil.copytree(template, self.folder, dirs_exist_ok=True)
        self.count = 0  # of legs
        self.told = []  # what was done, for a failure's message
        self.reached = {}  # {run: the iteration that can no longer be lost}
        self.damaged = set()  # ids of checkpoints that a fault has damaged
        self.is_whole_log = True
        self.is_exact = True  # whether the same checkpoints have to be left

    def begin(self, arguments, strikes=()):
        """Starts a leg; returns its process id and the paths of its stdout, stderr and report."""
        self.count += 1
        paths = [self.place / f"{self.count}.{name}" for name in ("stdout", "stderr", "report")]
        for path in paths:
            path.touch()
        self.told.append(f"leg {self.count}: {' '.join(arguments)} {[*strikes] or ''}")

        line = [*arguments, "--save_dir", str(self.folder)]
        streams = [os.devnull, *paths[:2]]
        prepare = partial(Watch, self.folder, strikes, paths[-1])
        return self.program.start(line, streams, self.place, prepare), paths

    def wait(self, pid, paths):
        """Waits for the end of a leg and returns it, if one may end so."""
        _, status = os.waitpid(pid, 0)
        out, err, report = [path.read_text(errors="replace") for path in paths]
        report = [json.loads(line) for line in report.splitlines()]
        leg = Leg(os.waitstatus_to_exitcode(status), out, err, report)
        self.told.append(f"  status {leg.status}, {leg.calls} calls; struck: {leg.struck}")
        assert "Traceback" not in out + err, f"a traceback: {err[-2000:]}"
        if leg.status in (1, 2):
            last = err.splitlines()[-1:]
            assert last and last[0].startswith("main.py: "), f"unworded: {err[-500:]}"
        self.note(leg)
        return leg

    def note(self, leg):
        """Checks what a leg has left, and that it lost nothing."""
        for path in sorted(self.folder.glob("*/*.safetensors")):
            if path.stem in self.damaged:
                continue
            is_whole = hashlib.sha1(path.read_bytes()).hexdigest() == path.stem
            assert is_whole, f"{path.name} is half-written"
            assert path.with_suffix(".metadata").exists(), f"{path.name} has no metadata"
        if leg.may_lack_rows():
            self.is_whole_log = False
        if leg.begun is None:
            return
        safe = self.reached.get(leg.run, 0)
        if "Skipping" in leg.err and (leg.struck or self.damaged):  # it could not read the newest
            safe = 0
        lost = f"iteration {safe} of {leg.run} was safe, but a leg began from {leg.begun}"
        assert leg.begun >= safe, lost
        self.reached[leg.run] = max(safe, leg.reached)

    def leg(self, arguments, strikes=()):
        return self.wait(*self.begin(arguments, strikes))

    def outcome(self, run):
        """What a finished run is compared by."""
        folder = self.folder / run
        states = {path.stem: sha1_of_arrays(path) for path in folder.glob("*.metadata")}
        kept = read_kept(folder)
        newest = max(kept, key=attrgetter("iteration"))
        scored = [each for each in kept if each.score is not None]
        best = min(scored, key=attrgetter("score"), default=newest)
        listed = self.leg(["--list", "--identifier", folder.name]).out
        assert f"  {best.id}  " in listed, f"--list has no {best}"
        files = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        return {
            "newest": newest,
            "best": best,
            "state": states[newest.id],
            "files": files - {"samples.jsonl"},  # a kill between a save and its sample costs that
            "states": states,
            "kept": kept,
            "samples": read_samples(folder),
            "log": read_log(folder, may_repeat=not self.is_whole_log),
        }


# ---- The sweep: scenarios, and a fault at each of their calls -----------------------------------


TEXT = "the quick brown fox jumps over a lazy dog — señor\n" * 4  # which a run reads several times
SIZES = "--dim 16 --num_heads 2 --num_blocks 1 --context_size 8 --batch_size 4"
PACE = "--num_iters 12 --lr_warmup 0 --steps_per_save 4 --steps_per_eval 8 --steps_per_report 3"
PACE += " --eval_tokens 40 --sample_tokens 2 --keep 1"
RATES = "--learning_rate 0.02 --lr_schedule linear --dropout 0.1 --average 0.3"


class Scenario:
    """A command, the folder that it begins with, and how it ends undisturbed.

    make: a function of the scenario and the Work in which it makes that folder; it returns the
    command's arguments.
    """

    def __init__(self, place, make):
        self.place = place
        before = Work(place / "before")
        text = place / "text.txt"
        text.write_text(TEXT)
        # A character again and again, which is what an untrained model expects: its loss rises, so
        # that the last checkpoint is not the best.
        valid = place / "valid.txt"
        valid.write_text("0" * 50)
        self.texts = f"--text {text} --valid_text {valid}"
        self.line = make(self, before)
        self.template = before.folder
        with self.work("undisturbed") as work:
            leg = work.leg(self.line)
            assert leg.status == 0, f"undisturbed: {leg.err}"
            self.calls = leg.calls
            self.run = leg.run
            self.expected = work.outcome(leg.run)

    @contextlib.contextmanager
    def work(self, name):
        """A Work that begins with the folder; a failure's message tells what was done in it."""
        work = Work(self.place / name, self.template)
        try:
            yield work
        except AssertionError as failure:
            raise AssertionError("\n".join([str(failure), *work.told])) from None
        shutil.rmtree(work.place)

    def finish(self, work):
        """Ends a run that was struck, undisturbed: it has to end as if it had not been struck."""
        last = work.leg(self.line)
        assert last.status == 0, f"undisturbed, it ended with {last.status}: {last.err}"
        assert last.run == self.run, f"{last.run} began beside {self.run}"
        compare(self.expected, work.outcome(last.run), work)
        for path in self.template.rglob("*"):
            name = path.relative_to(self.template)
            if path.is_file() and name.parts[0] not in (last.run, "text"):
                same = (work.folder / name).read_bytes() == path.read_bytes()
                assert same, f"{name}, of another run, has changed"

    def strike(self, call, action):
        """Lets a fault strike at a call of the command."""
        with self.work(f"{call}-{action}") as work:
            judge_status(work.leg(self.line, [(call, action)]))
            self.finish(work)


def compare(expected, found, work):
    """Checks that a run has ended as the one that was never touched."""
    for name, value in expected.items():
        if name in ("best", "files", "states", "kept") and not work.is_exact:
            continue
        if name == "samples":
            # One may be lost between a save and its sample; or there are more, if a run was begun
            # anew as its only checkpoint could not be read.
            for iteration in value.keys() & found[name].keys():
                assert found[name][iteration] == value[iteration], "other samples"
            continue
        if name == "log" and not work.is_whole_log:
            value = {key: row for key, row in value.items() if key in found[name]}
        assert found[name] == value, f"other {name}: {found[name]} instead of {value}"


def judge_status(leg):
    """Checks that a leg that was struck ended with a status that the strikes allow."""
    allowed = {0}  # if none came: folders are listed in any order, and calls vary a little
    for row in leg.struck:
        action = row["action"]
        if action in ("kill", "power", "names"):
            allowed = {-signal.SIGKILL}
        elif action in SIGNALS:
            allowed.add(SIGNALS[action])
            is_at_end = leg.calls - row["call"] < 3  # it may have come when all was done
            if not is_at_end:
                allowed.discard(0)
            if leg.begun is None or is_at_end:  # nothing to save: it has its default action
                allowed.add(-getattr(signal, action))
        elif leg.begun is None:  # it could not begin, or had not yet said so when signals came
            allowed |= {1, 2, 130, 143, -signal.SIGINT, -signal.SIGTERM}
        elif action == "ENOSPC":
            allowed |= {130, 143}
    last = leg.struck[-1]["action"] if leg.struck else "no strike"
    assert leg.status in allowed, f"status {leg.status} after {last}: {leg.err[-500:]}"


def begin(scenario, before):
    return f"{scenario.texts} {SIZES} {PACE} {RATES}".split()


def resume(scenario, before):
    line = begin(scenario, before)
    calls = before.leg([*line, "--seed", "1"]).calls  # another run
    before.leg(line, [(round(0.7 * calls), "SIGTERM")])
    return line


def branch(scenario, before):
    leg = before.leg([*begin(scenario, before), "--keep", "2"])
    return ["--identifier", leg.saved[8][:12], "--keep", "1"]


def adapt(scenario, before):
    base = before.leg(f"{scenario.texts} {SIZES} --num_iters 3 --sample_tokens 1".split())
    line = f"{scenario.texts} --init_from {base.saved[3]} --lora_rank 2 --batch_size 4"
    return f"{line} {PACE} {RATES}".split()


def prune(scenario, before):
    """A base goes on that another run still needs as it was."""
    line = begin(scenario, before)
    base = before.leg(line, [(100, "SIGTERM")])
    newest = base.saved[max(base.saved)]
    adapted = f"{scenario.texts} --init_from {newest} --lora_rank 2 --batch_size 4"
    before.leg(f"{adapted} --num_iters 2 --sample_tokens 1".split())
    return line


SCENARIOS = {
    "begin": begin,
    "resume": resume,
    "branch": branch,
    "adapt": adapt,
    "prune": prune,
}


# ---- Random faults ------------------------------------------------------------------------------

FAULTS = 10  # of a scenario
MORE_ACTIONS = ["ENOSPC for a while", "clock set back", *SIGNALS]
SHAPES = [
    "",
    "--optimizer muon --untie",
    "--mlp swiglu --qk_norm --num_kv_heads 1",
    "--grad_accumulation 2 --dropout 0.2 --dropout_final 0",
    "--average 0.2 --dropout 0.1",
    "--checkpoint --lr_schedule cosine --min_lr 0",
    "--tokenizer char",
    "--tokenizer bpe --vocab_size 270",
]
REUSES = ["", "", "", "--init_from {}", "--teacher {}", "--init_from {} --lora_rank 2"]


def drawn(chance, scenario, before):
    """Flags drawn by chance."""
    line = f"{scenario.texts} --num_iters 100 --lr_warmup 5 --learning_rate 0.01"
    line += f" --steps_per_save {chance.randint(2, 6)} --steps_per_eval {chance.randint(5, 9)}"
    line += f" --steps_per_report {chance.randint(1, 3)} --keep {chance.randint(1, 3)}"
    line += f" --sample_tokens 1 --seed {chance.randint(1, 9)}"
    line += f" --minutes_per_save {chance.choice([0, 1e-9, 1e-4])}"
    if chance.random() < 0.3:  # so long an evaluation that signals come in it
        (scenario.place / "valid.txt").write_text("0" * 3000)
        line += " --eval_tokens 0"
    reuse = chance.choice(REUSES)
    if reuse:
        base = f"{scenario.texts} {SIZES} --num_iters 2 --sample_tokens 1"
        line += " " + reuse.format(before.leg(base.split()).saved[2])
    if "--init_from" in reuse:
        line += " --batch_size 4"
    elif reuse:
        line += f" {SIZES}"
    else:
        line += f" {SIZES} {chance.choice(SHAPES)}"
    return line.split()


def struck(scenario, work, chance):
    """A fault at a call, and a signal some calls later, which ends the leg in any case."""
    call = chance.randint(1, 200)
    action = chance.choice([*ACTIONS, *MORE_ACTIONS])
    strikes = [(call, action), (call + chance.randint(30, 200), "SIGTERM")]
    judge_status(work.leg(scenario.line, strikes))


def signalled_twice(scenario, work, chance):
    call = chance.randint(1, 200)
    numbers = [chance.choice([*SIGNALS]) for _ in range(2)]
    strikes = [(call, numbers[0]), (call + chance.randint(1, 20), numbers[1])]
    judge_status(work.leg(scenario.line, strikes))


def ended_by_the_clock(scenario, work, chance):
    """A signal at any moment, not just at a call."""
    pid, paths = work.begin(scenario.line)
    while not paths[-1].read_text():  # its report
        SLEEP(0.001)
    SLEEP(chance.uniform(0, 0.5))
    name = chance.choice(["SIGKILL", *SIGNALS])
    os.kill(pid, getattr(signal, name))  # also has no effect, if it has ended
    leg = work.wait(pid, paths)
    allowed = {0, -getattr(signal, name), SIGNALS.get(name)}
    assert leg.status in allowed, f"status {leg.status} after {name}: {leg.err[-500:]}"


def spoil(path, chance):
    """Damages a file."""
    data = bytearray(path.read_bytes())
    way = chance.choice(["a bit flipped"] * 3 + ["cut off", "emptied", "gone", "zeros at the end"])
    place = chance.randrange(len(data))
    if way == "gone":
        path.unlink()
        return
    if way == "cut off":
        del data[place:]
    elif way == "emptied":
        data.clear()
    elif way == "zeros at the end":
        data[place:] = bytes(len(data) - place)
    else:
        data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def checkpoint_damaged(scenario, work, chance):
    """A checkpoint is damaged; if that was the newest, the one before is gone on from."""
    run = work.folder / scenario.run
    intact = sorted(each for each in read_kept(run) if each.id not in work.damaged)
    if len(intact) < 2:
        return struck(scenario, work, chance)
    damaged = chance.choice(intact)
    name = damaged.id + chance.choice([".safetensors", ".metadata"])
    spoil(run / name, chance)
    work.told.append(f"  damaged: {name}")
    work.damaged.add(damaged.id)
    work.is_exact = False  # it is not deleted, and another may be the best
    work.reached[scenario.run] = max(each.iteration for each in intact if each != damaged)
    judge_status(work.leg(scenario.line, [(chance.randint(30, 200), "SIGTERM")]))


KINDS = [struck] * 6 + [signalled_twice]
KINDS += [ended_by_the_clock] * 2 + [checkpoint_damaged] * 2


def play_randomly(place, seed):
    """Trains a run that is struck by FAULTS faults."""
    chance = random.Random(seed)
    scenario = Scenario(place, partial(drawn, chance))
    with scenario.work("struck") as work:
        # Where a run was interrupted near its end, that checkpoint is one of the newest.
        work.is_exact = "--keep 1" in " ".join(scenario.line)
        for _ in range(FAULTS):
            kind = chance.choice(KINDS)
            work.told.append(kind.__name__)
            kind(scenario, work, chance)
        scenario.finish(work)


# ---- The command line ---------------------------------------------------------------------------


@cache
def scenario_of(folder, name):
    """A scenario of the sweep, made once."""
    return Scenario(folder / name, SCENARIOS[name])


def sweep(folder, names):
    """The cases of all calls of these scenarios; a signal is one of SIGNALS, by turns."""
    cases = []
    for name in names:
        scenario = scenario_of(folder, name)
        outcome = scenario.expected
        assert outcome["best"] != outcome["newest"], "the last checkpoint is the best"
        print(f"{name}: {scenario.calls} calls", flush=True)
        for call in range(1, scenario.calls + 1):
            actions = [*ACTIONS, [*SIGNALS][call % len(SIGNALS)]]
            cases += [f"{name}-{call}-{action}" for action in actions]
    return cases


def play(folder, case):
    """Plays a case of the sweep or a random one, by its name. Raises AssertionError."""
    first, second, *action = case.split("-")
    if action:
        scenario_of(folder, first).strike(int(second), *action)
    else:
        play_randomly(folder / case, case)


def command_line():
    parser = case_parser(__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="N")
    parser.add_argument("--scenario", choices=SCENARIOS, help="this one alone")
    parser.add_argument("--random", type=int, metavar="FAULTS")
    parser.add_argument("--first", action="store_true", help="end at the first failure")
    options = parser.parse_args()
    Work.program = Program(options.checkout / "main.py")
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    if options.only:
        print(f"in {folder}, which stays")
        return play(folder, options.only)
    try:
        if options.random:
            count = math.ceil(options.random / FAULTS)
            cases = [f"{options.seed}-{number}" for number in range(count)]
        else:
            cases = sweep(folder, [options.scenario] if options.scenario else SCENARIOS)
            cases = cases[:: options.every]
        return min(1, play_all(partial(play, folder), cases, options.jobs, options.first))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(command_line())
