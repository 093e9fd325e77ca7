"""The soak: runs disturbed by thousands of faults have to end as the run that was never touched.

    python tests/soak.py --seed 7 --faults 300       repeats what the seed 7 did
    python tests/soak.py --seed 7 --scenario 12      one scenario of it; says every leg
    python tests/soak.py --sweep                     a fault at every single call of a short run
    python tests/soak.py --sweep kill                only this one of ACTIONS

A *scenario* is a command line drawn from a table and a row of faults, both decided by the seed and
the scenario's number. Its run is trained once undisturbed. Then the same command is started again
and again, each *leg* with a fault, until the run is finished, and the two are compared: weights,
optimizer state, place in the text, scores, best and log.

A leg is a fork of this process, which has imported main.py and computed nothing: it costs 0.1 s
where `python main.py` costs 0.5. (Where MLX does not survive a fork it is a new process.) In it
the calls that main.py makes of the system are counted, by the *phase* they are made in, and a
*strike* is due at one of them: a signal, a kill, an error. Counting makes a fault repeatable, where
a clock would not. "wall clock" is the exception: a signal to a real `python main.py` after a time.
"""

import argparse
import builtins
import errno
import fcntl
import gc
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402

from conftest import free_ports  # noqa: E402
import numpy.random  # noqa: E402, F401  (what each leg would import)

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
TIMEOUT = 100  # seconds until a leg counts as hung
FORKS = sys.platform == "linux"  # on macOS neither Metal nor Accelerate works after a fork


# ---- In the process of a leg --------------------------------------------------------------------


class Leg:
    """Counts the calls that main.py makes in each phase, and strikes at those that are due.

    strikes: dicts, one after the other, of `phase`, `call` (counted since the one before) and
    `action`; an error has `times`, too. Phases: start, cache (of tokens), step, save, log, eval,
    sample, end; and pause, in which a save waits for its next try.
    """

    def __init__(self, folder, strikes, steps, report):
        self.folder = str(folder)
        self.strikes = list(strikes)
        self.steps_left = steps  # until it is stopped, if no strike came; None: as many as it takes
        self.report = report  # a file descriptor
        self.phases = ["start"]  # the innermost last
        self.counts = Counter()  # calls, by phase
        self.since = Counter()  # those since the last strike
        self.failing = None  # the strike whose error the next calls of its phase meet, too
        self.interrupts = None  # of main.py, once it has some
        self.skew = 0.0  # seconds by which the clocks were moved
        self.write_report = os.write

    def tell(self, **content):
        """Adds a line to the leg's report."""
        self.write_report(self.report, json.dumps(content).encode() + b"\n")

    def meet(self, what, path="", begin=None):
        """Counts a call, and strikes if one is due. begin: does half of what the call would do."""
        phase = "pause" if what == "sleep" else self.phases[-1]
        self.counts[phase] += 1
        self.since[phase] += 1
        if self.failing and self.failing["phase"] == phase and self.failing["times"] > 0:
            self.failing["times"] -= 1
            self.fail(self.failing["action"], what, begin)
        if what == "step" and self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left == 0:
                self.strikes = []
                self.send(signal.SIGTERM)
        if not self.strikes:
            return
        strike = self.strikes[0]
        if strike["phase"] != phase or strike["call"] != self.since[phase]:
            return
        self.strikes.pop(0)
        self.since.clear()
        self.steps_left = None
        self.tell(**strike, what=what, path=str(path) if isinstance(path, (str, Path)) else "")
        self.act(strike, what, begin)

    def act(self, strike, what, begin):
        action = strike["action"]
        if action == "kill":
            if begin:
                begin()
            os.kill(os.getpid(), signal.SIGKILL)
        elif action in STOPPING:
            self.send(getattr(signal, action))
        elif action == "pause":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "clock set back":
            self.move_clock(-1e6)
        elif action == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        elif action == "lift":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        elif action == "fill":
            free = shutil.disk_usage(self.folder).free
            Path(self.folder, "ballast").write_bytes(bytes(max(0, free - 20_000)))
        elif action == "free":
            Path(self.folder, "ballast").unlink()
        else:
            self.failing = {"times": 0} | strike
            self.failing["times"] -= 1
            self.fail(action, what, begin)

    def fail(self, name, what, begin):
        """Raises the error that a call would."""
        if what not in CALLS:  # no call of the system, as a step
            return
        if begin and name == "ENOSPC":
            begin()
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))

    def send(self, number):
        """Sends this process a signal, and waits until main.py knows of it."""
        first = self.interrupts is None or self.interrupts.received is None
        self.skew += 1  # a second one has to come later than half a second
        os.kill(os.getpid(), number)
        waited = 0
        while self.interrupts is not None and waited < 1000:
            if first and self.interrupts.received:
                break
            SLEEP(0.002)
            waited += 1

    def move_clock(self, seconds):
        """Sets the clock of the day, by `seconds`; that of intervals goes on."""
        plain = time.time
        time.time = lambda: plain() + seconds

    def sleep(self, seconds):
        """In the place of time.sleep: a moment, after which the clocks say that it was all."""
        is_start = self.phases == ["start"]
        if is_start or threading.current_thread() is not threading.main_thread():
            SLEEP(seconds)  # a rank that waits for others
            return
        SLEEP(0.002)
        self.skew += seconds
        self.meet("sleep")

    def watch(self, function, what, is_ours=None):
        """The function, whose calls are met."""

        def call(*arguments, **options):
            if is_ours is None or is_ours(arguments[0]):
                self.meet(what, arguments[0])
            return function(*arguments, **options)

        return call

    def enter(self, phase, function):
        """The function, during which calls are those of `phase`."""

        def call(*arguments, **options):
            self.phases.append(phase)
            try:
                return function(*arguments, **options)
            finally:
                self.phases.pop()

        return call

    def is_ours(self, path):
        """Whether a path is in the folder of checkpoints."""
        if isinstance(path, int):
            return False
        return os.fsdecode(path).startswith(self.folder)

    def open(self, path, mode="r", *arguments, **options):
        """In the place of open."""
        if not self.is_ours(path):
            return OPEN(path, mode, *arguments, **options)
        self.meet("open", path)
        return WatchedFile(OPEN(path, mode, *arguments, **options), path, self)

    def install(self):
        """Puts itself between main.py and the system, for the rest of this process."""
        builtins.open = io.open = self.open
        for name in ("replace", "unlink", "mkdir", "rmdir", "open", "scandir", "listdir"):
            setattr(os, name, self.watch(getattr(os, name), name, self.is_ours))
        os.fsync = self.watch(os.fsync, "fsync")
        fcntl.flock = self.watch(fcntl.flock, "flock")
        plain_monotonic = time.monotonic
        time.monotonic = lambda: plain_monotonic() + self.skew
        time.sleep = self.sleep

        main.load_dataset = self.enter("cache", main.load_dataset)
        main.train = self.enter("step", main.train)
        main.learning_rate_at = self.watch(main.learning_rate_at, "step")
        for name in ("save", "prune"):
            setattr(main, name, self.enter("save", getattr(main, name)))
        for name in ("__init__", "append"):
            setattr(main.Log, name, self.enter("log", getattr(main.Log, name)))
        main.describe_end = self.enter("end", self.watch(main.describe_end, "end"))
        main.scored_windows = self.enter("eval", self.watch(main.scored_windows, "batch"))
        main.Decoder.logits = self.enter("sample", self.watch(main.Decoder.logits, "token"))
        enter = main.Interrupts.__enter__
        leave = main.Interrupts.__exit__

        def noting_enter(interrupts):
            enter(interrupts)
            self.interrupts = interrupts
            return interrupts

        def noting_leave(interrupts, *error):
            self.phases.append("end")
            self.meet("leave")
            self.interrupts = None
            leave(interrupts, *error)
            self.meet("left")

        main.Interrupts.__enter__ = noting_enter
        main.Interrupts.__exit__ = noting_leave


# The calls that can fail.
CALLS = "open read readinto write flush close".split()
CALLS += "replace unlink mkdir rmdir scandir listdir fsync flock".split()
OPEN = io.open
SLEEP = time.sleep


class WatchedFile:
    """An open file whose calls a Leg meets."""

    def __init__(self, file, path, leg):
        self.file = file
        self.path = path
        self.leg = leg

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __iter__(self):
        return iter(self.file)

    def __del__(self):
        self.file.close()

    def close(self):
        is_open = not self.file.closed
        self.file.close()
        if is_open:
            self.leg.meet("close", self.path)

    def read(self, *size):
        self.leg.meet("read", self.path)
        return self.file.read(*size)

    def readinto(self, buffer):
        self.leg.meet("readinto", self.path)
        return self.file.readinto(buffer)

    def flush(self):
        self.leg.meet("flush", self.path)
        self.file.flush()

    def write(self, data):
        def begin():
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.leg.meet("write", self.path, begin)
        return self.file.write(data)


def be_a_leg(arguments, folder, strikes, steps, paths, environment):
    """Turns this process into `python main.py arguments`, with strikes; never returns."""
    status = 1
    try:
        signal.alarm(TIMEOUT)
        for name in STOPPING:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in ((1, paths["out"]), (2, paths["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
        report = os.open(paths["report"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        sys.stdout = OPEN(1, "w", buffering=1, closefd=False)
        sys.stderr = OPEN(2, "w", buffering=1, closefd=False)
        sys.argv = ["main.py", *arguments]
        leg = Leg(folder, strikes, steps, report)
        if "SOAK_STREAMS" in environment:
            count = int(environment["SOAK_STREAMS"])
            main.fast.count_streams = lambda rows, context_size: min(rows, count)
        leg.install()
        status = main.main()
        leg.tell(counts=leg.counts)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


# ---- Legs, as the soak sees them ----------------------------------------------------------------


class Started:
    """A leg that runs in another process."""

    def __init__(self, pid, paths, strikes):
        self.pid = pid
        self.paths = paths
        self.strikes = strikes

    def wait(self):
        """Waits for its end; sets what it left. status: as subprocess has it."""
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        self.read()
        return self

    def wait_for_pause(self):
        """Waits until it has stopped itself; False if it has ended instead."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return True
        self.status = os.waitstatus_to_exitcode(status)
        self.read()
        return False

    def read(self):
        self.out = self.paths["out"].read_text()
        self.err = self.paths["err"].read_text()
        self.struck = []
        self.counts = {}
        if self.paths["report"].exists():
            for line in self.paths["report"].read_text().splitlines():
                content = json.loads(line)
                if "counts" in content:
                    self.counts = content["counts"]
                else:
                    self.struck.append(content)

    def has_struck(self):
        """Whether all its strikes came."""
        return len(self.struck) == len(self.strikes)


class Failure(Exception):
    """The program did what it must not do."""


def expect(condition, *words):
    if not condition:
        raise Failure(" ".join(map(str, words)))


# ---- What a folder holds ------------------------------------------------------------------------
# Read without main.py: it is an oracle.

RUN_NAME = r"text-[0-9a-f]{6}"
# A command that names a run or a checkpoint, as it is printed to be pasted.
PASTED = re.compile(r"python main\.py (--identifier .*?)(?= --learning_rate|\n| \(or|$)")


def split_safetensors(data):
    """The header of a safetensors file, as bytes with their length, and the rest."""
    length = 8 + int.from_bytes(data[:8], "little")
    return data[:length], data[length:]


def read_metadata(path):
    """The record of a .metadata file and the SHA1 of its arrays; ValueError or alike if damaged."""
    data = path.read_bytes()
    header, arrays = split_safetensors(data)
    texts = json.loads(header[8:])["__metadata__"]
    stated = texts["sha1"].encode()
    blanked = data.replace(stated, b"0" * 40, 1)
    if len(stated) != 40 or hashlib.sha1(blanked).hexdigest().encode() != stated:
        raise ValueError("damaged")
    return json.loads(texts["record"]), hashlib.sha1(arrays).hexdigest()


def write_metadata(path, record, arrays, header):
    """Writes a .metadata file whose SHA1s are right, whatever the record says.

    record: its text; arrays, header: those of another file.
    """
    entries = json.loads(header[8:])
    texts = {"record": record, "record_sha1": hashlib.sha1(record.encode()).hexdigest()}
    entries["__metadata__"] = texts | {"sha1": "0" * 40}
    blank = json.dumps(entries).encode()
    data = len(blank).to_bytes(8, "little") + blank + arrays
    sha1 = hashlib.sha1(data).hexdigest().encode()
    place = data.index(b'"sha1": "') + len(b'"sha1": "')
    path.write_bytes(data[:place] + sha1 + data[place + 40 :])


def intact_checkpoints(folder):
    """[(record, SHA1 of the arrays in its metadata)] of all runs in a folder, the furthest first.

    A record then has its run's name, too.
    """
    found = []
    for weights in folder.glob("*/*.safetensors"):
        if not weights.is_file() or hashlib.sha1(weights.read_bytes()).hexdigest() != weights.stem:
            continue
        try:
            record, arrays = read_metadata(weights.with_suffix(".metadata"))
        except (ValueError, KeyError, TypeError, OSError, OverflowError):
            continue
        if record["id"] == weights.stem and record["format_version"] == 3:
            found.append((record | {"run": weights.parent.name}, arrays))
    order = [(record["iteration"], record["saved"]) for record, _ in found]
    places = sorted(range(len(found)), key=order.__getitem__, reverse=True)
    return [found[place] for place in places]


def read_log(path):
    """The rows of a log without what is a matter of time."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        for name in ("seconds", "tokens_per_second", "ms_per_step", "peak_mib"):
            row.pop(name, None)
        rows.append(row)
    return rows


# What of a record depends on nothing but the steps.
EXACT = "id iteration tokens_seen scores recent_steps recent_loss epoch offset place".split()


def outcome(folder, base_run):
    """What a finished run is compared by, and its name."""
    records = [pair for pair in intact_checkpoints(folder) if pair[0]["run"] != base_run]
    expect(records, "no checkpoint is left")
    record, arrays = records[0]
    state = {name: record[name] for name in EXACT} | {"arrays": arrays}
    return state, record["run"]


# ---- Scenarios ----------------------------------------------------------------------------------

SIZES = "--dim 16 --num_heads 2 --context_size 8".split()

# What decides which kernels MLX compiles: few rows, as each new kernel takes the compiler a moment.
SHAPES = [
    "--num_blocks 1",
    "--num_blocks 2 --dropout 0.1",
    "--num_blocks 1 --mlp swiglu --qk_norm --num_kv_heads 1",
    "--num_blocks 1 --optimizer muon --untie --ngrams 3 --ngram_rows 100 --conv_size 3",
    "--num_blocks 1 --optimizer muon --conv_size 2 --embedding_scale 8",
    "--num_blocks 2 --grad_accumulation 2 --dropout 0.2 --dropout_final 0",
    "--num_blocks 2 --dtype bfloat16 --dropout 0.1 --optimizer muon",
    "--num_blocks 1 --mlp gelu --checkpoint",
    "--num_blocks 1 --average 0.2 --dropout 0.1",
    "--num_blocks 1 --average 0.4 --teacher average",
]

# What does not: one of each row is drawn.
CHOICES = [
    ["--batch_size 2", "--batch_size 3", "--batch_size 4"],
    [f"--num_iters {count}" for count in range(40, 80)],
    ["--steps_per_save 3", "--steps_per_save 4", "--steps_per_save 5", ""],
    ["--steps_per_eval 6", "--steps_per_eval 7", "--steps_per_eval 10"],
    ["--steps_per_report 1", "--steps_per_report 2", "--steps_per_report 3"],
    ["--eval_tokens 40", "--eval_tokens 100", "--eval_tokens 0"],
    ["--max_tokens 1", "--max_tokens 3"],
    ["--keep 1", "--keep 2", "--keep 3", "--keep 4"],
    ["--learning_rate 0.001", "--learning_rate 0.03"],
    ["--lr_warmup 0", "--lr_warmup 5"],
    ["--lr_schedule constant", "--lr_schedule constant", "--lr_schedule cosine --min_lr 0"],
    ["--seed 1", "--seed 2", "--seed 3"],
    ["", "", "--patience 2"],
    ["", "", "--eval_test"],
    ["", "", "", "--train_tokens 300"],
]
TOKENIZERS = ["", "", "--tokenizer char", "--tokenizer word", "--tokenizer bpe --vocab_size 270"]
REUSES = ["", "", "", "", "--init_from", "--teacher", "--init_from --lora_rank 2"]


def write_text(path, lines):
    words = "the quick brown fox of the company jumps over a lazy dog".split()
    text = ""
    for i in range(lines):
        text += " ".join(words[i % 5 :] + words[: i % 7]) + f" {i} — señor\n"
    path.write_text(text)


class Scenario:
    """A command, where it runs, and what is known of its run.

    place: "process", "ranks", or "small disk"; flags: drawn by chance if they are not given.
    """

    def __init__(self, work, chance, place="process", flags=None):
        self.work = work
        self.place = place
        self.ranks = chance.choice((2, 2, 3)) if place == "ranks" else 1
        self.folder = work / "lm"
        self.folder.mkdir(parents=True)
        self.text = work / "text.txt"
        write_text(self.text, chance.randrange(14, 40))
        write_text(work / "other.txt", 5)
        self.legs = 0
        self.faults = Counter()  # those that struck, by kind
        self.journal = []  # what was done, for a failure's message
        self.reached = 0  # the iteration of the newest intact checkpoint
        self.skipped = set()  # beginnings of ids that the program once could not read
        self.is_finished = False
        self.is_exact_log = True  # until a fault strikes the log itself
        self.damaged = {}  # {id: iteration} of checkpoints that were
        self.branches = set()  # runs that began in the middle of another one
        self.base = None  # the id of the checkpoint that the run begins with or learns from
        self.base_run = None  # and the run of that
        self.environment = {}
        self.flags = []
        if chance.random() < 0.1 and place == "process":
            self.environment["SOAK_STREAMS"] = "2"
        self.flags = ["--text", str(self.text), "--test_text", str(work / "other.txt")]
        self.flags += flags or self.draw_flags(chance)
        if place == "small disk":
            self.mount()
        self.train_undisturbed()

    def draw_flags(self, chance):
        shape = chance.choice(SHAPES)
        drawn = [chance.choice(choices) for choices in CHOICES]
        reuse = chance.choice(REUSES) if self.place == "process" else ""
        flags = []
        if reuse:
            self.make_base()
            name, *rest = reuse.split()
            drawn.append(" ".join([name, self.base, *rest]))
        else:
            drawn.append(chance.choice(TOKENIZERS))
        if not reuse.startswith("--init_from"):  # which has a shape already
            flags += SIZES
            drawn.append(shape)
        for words in drawn:
            flags += words.split()
        if self.place != "process":  # there are few of these scenarios: each has many faults
            flags += ["--num_iters", "120", "--batch_size", "3"]
        return flags

    def make_base(self):
        """A run to begin with or to learn from, in the same folder as the disturbed one."""
        flags = ["--text", str(self.text), *SIZES, "--num_blocks", "1", "--num_iters", "1"]
        flags += ["--batch_size", "2", "--max_tokens", "1"]
        self.wait_well(self.start([], [*flags, "--seed", "9"]))
        [(record, _)] = intact_checkpoints(self.folder)
        self.base = record["id"]
        self.base_run = record["run"]

    def train_undisturbed(self):
        """Trains the run at once, elsewhere, for `expected` and the log of it."""
        plain = self.work / "undisturbed"
        plain.mkdir()
        if self.base:
            shutil.copytree(self.folder / self.base_run, plain / self.base_run)
        [leg, *_] = self.start_all({}, self.flags, plain)
        self.counts = Counter(leg.counts)
        self.expected, run = outcome(plain, self.base_run)
        self.expected_log = read_log(plain / run / "log.jsonl")

    def mount(self):
        """A small disk in the place of the folder. Raises CannotMount."""
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(self.folder)]
        if subprocess.run(command, capture_output=True).returncode:
            raise CannotMount

    def unmount(self):
        if self.place == "small disk":
            subprocess.run(["umount", "-l", str(self.folder)])

    def keep_disk(self):
        """After a failure: the files of a small disk stay, but not the disk."""
        if self.place == "small disk":
            shutil.copytree(self.folder, self.work / "small disk")
        self.unmount()

    def leave(self):
        """Removes the scenario's files."""
        victim = self.work / "victim.txt"
        if victim.exists():
            expect(victim.read_text() == "precious", "a file outside was written to")
        self.unmount()
        shutil.rmtree(self.work)

    # -- Legs

    def start(self, strikes, arguments=None, folder=None, environment=None, steps=None):
        """Starts a leg, which is struck so, or stopped by SIGTERM after so many steps."""
        arguments = [*(self.flags if arguments is None else arguments)]
        folder = folder or self.folder
        arguments += ["--save_dir", str(folder)]
        self.legs += 1
        paths = {name: self.work / f"{self.legs}.{name}" for name in ("out", "err", "report")}
        said = " ".join(arguments)
        if folder == self.folder and self.flags:
            said = said.replace(" ".join(self.flags), "...")
        self.journal.append(f"leg {self.legs}: {said} {json.dumps(strikes)}")
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            paths_given = {name: str(path) for name, path in paths.items()}
            environment = self.environment | (environment or {})
            task = [arguments, str(folder), strikes, steps, paths_given, environment]
            if FORKS:
                be_a_leg(*task)
            command = [sys.executable, __file__, "--leg", json.dumps(task)]
            os.execv(sys.executable, command)
        return Started(pid, paths, strikes)

    def start_all(self, strikes, arguments=None, folder=None, steps=None):
        """Runs a leg on all ranks to its end. strikes: {rank: strikes}; steps: as in `start`."""
        if self.ranks == 1:
            return [self.start(strikes.get(0, []), arguments, folder, steps=steps).wait()]
        hosts = self.work / f"hosts-{self.legs}.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(self.ranks)]))
        legs = []
        for rank in range(self.ranks):
            environment = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            own = strikes.get(rank, [])
            legs.append(self.start(own, arguments, folder, environment, steps))
            steps = None  # rank 0 stops all
        return [leg.wait() for leg in legs]

    def wait_well(self, leg):
        leg.wait()
        self.look_at(leg, {0})

    # -- What must hold after each leg

    def check(self, leg, statuses, is_clean=True):
        """Raises Failure unless a leg of training ended as it must.

        is_clean: whether it may leave nothing behind but checkpoints, logs and the cache.
        """
        self.look_at(leg, statuses)
        saved = [int(each.replace(",", "")) for each in re.findall(SAVED, leg.out)]
        stopped = re.search(r"^Stopped at iteration ([\d,]+)\. Rerun", leg.out, re.M)
        if stopped and leg.status > 128:
            saved.append(int(stopped[1].replace(",", "")))
        records = self.own_checkpoints()
        # From before one that it could not read, perhaps only this time, the run goes on as if that
        # did not exist, unless it is saved again.
        self.skipped |= {*re.findall(r"^Skipping .*checkpoint (\w+) is damaged", leg.err, re.M)}
        self.skipped -= {*re.findall(r"^saved (\w{12})", leg.out, re.M)}
        resumed = re.search(r"^run .*, from iteration ([\d,]+) to", leg.out, re.M)
        if resumed:  # this time, it could read that one
            begun = int(resumed[1].replace(",", ""))
            self.skipped -= {each["id"][:12] for each in records if each["iteration"] == begun}
        left = [each["iteration"] for each in records if each["id"][:12] not in self.skipped]
        if self.skipped:
            self.reached = min(self.reached, max(left, default=0))
        reached = max(left, default=0)
        expect(
            reached >= max([self.reached, *saved]),
            f"iteration {max([self.reached, *saved])} was saved; left is {reached}",
        )
        self.reached = reached
        # The existence of the weights proves the checkpoint complete, even after a kill.
        intact = {record["id"] for record in records} | {*self.damaged, self.base}
        for path in self.folder.glob("*/*.safetensors"):
            expect(path.stem in intact, f"{path.name} is damaged, and not by the soak")
        has_trained = leg.status == 0 or leg.status > 128
        trained = re.search(r"^run +(\S+), from", leg.out, re.M)
        if is_clean and has_trained and trained:
            self.expect_no_junk(self.folder / trained[1])

    def look_at(self, leg, statuses):
        """Raises Failure if a leg of any kind ended as none may."""
        said = f"{leg.status}, struck {leg.struck}"
        self.journal.append(f"    ended with {said}")
        printed = f"\n{leg.out}\n{leg.err}"
        expect("Traceback" not in leg.out + leg.err, "a traceback:", printed)
        expect(leg.status in statuses, f"status {said}, not one of {statuses}:", printed)
        if leg.status in (1, 2):
            # The ring of MLX's ranks says something of its own, perhaps later.
            lines = [line for line in leg.err.splitlines() if not line.startswith("[ring]")]
            own = [line for line in lines if line.startswith("main.py: ")]
            expect(len(own) == 1 and lines[-1] == own[0], "not one line:", printed)

    def own_checkpoints(self):
        """The records of the run's intact checkpoints, the furthest first."""
        records = [record for record, _ in intact_checkpoints(self.folder)]
        return [record for record in records if record["run"] != self.base_run]

    def note_damage(self, checkpoint_id):
        """Remembers that a checkpoint may be damaged or gone, and which iteration it was of."""
        for record in self.own_checkpoints():
            if record["id"] == checkpoint_id:
                self.damaged[checkpoint_id] = record["iteration"]
        self.damaged.setdefault(checkpoint_id, None)

    def expect_no_junk(self, trained):
        """Raises Failure unless the folder of the run that was trained holds what it must.

        That of another run may have what killed saves have left, until that run is resumed.
        """
        for path in self.folder.iterdir():
            is_known = re.fullmatch(RUN_NAME, path.name) or path.name in ("text", "ballast")
            expect(is_known, f"{path.name} was left behind")
        if trained.exists():  # a new run that saved nothing leaves nothing
            self.expect_whole(trained)
        for path in self.folder.glob("text/*/*"):
            is_known = path.name in (".lock", "about.json") or path.suffix == ".tokens"
            expect(is_known, f"{path.name} was left behind")

    def expect_whole(self, run):
        """Raises Failure unless a run's folder has pairs of files, a log and samples alone."""
        for path in run.iterdir():
            is_known = re.fullmatch(r"[0-9a-f]{40}\.safetensors|(log|samples)\.jsonl", path.name)
            if re.fullmatch(r"[0-9a-f]{40}\.metadata", path.name):
                is_known = path.with_suffix(".safetensors").exists()
            expect(is_known, f"{path.name} was left behind")

    # -- The end

    def finish(self):
        """Lets the run end undisturbed, and compares it."""
        if self.place == "small disk":
            (self.folder / "ballast").unlink(missing_ok=True)
        if not self.is_finished:
            for leg in self.start_all({}):
                self.check(leg, {0})
        self.compare()

    def compare(self):
        """Raises Failure unless the run has ended as the undisturbed one."""
        state, run = outcome(self.folder, self.base_run)
        for name, value in self.expected.items():
            expect(state[name] == value, f"{name} is {state[name]}, undisturbed it is {value}")
        if self.is_exact_log:
            self.compare_log(run)
        if state["scores"] and run not in self.branches:
            iteration, nats = min(state["scores"], key=lambda score: score[1])
            own = [record for record in self.own_checkpoints() if record["run"] == run]
            has_best = any(nats == dict(each["scores"]).get(each["iteration"]) for each in own)
            is_lost = iteration in self.damaged.values()
            expect(has_best or is_lost, "the best checkpoint is gone")

    def compare_log(self, run):
        """Raises Failure unless a run's log is that of the undisturbed one, to the row."""
        log = read_log(self.folder / run / "log.jsonl")
        expected_log = self.expected_log
        if run in self.branches:  # whose log begins where they do
            expected_log = expected_log[len(expected_log) - len(log) :]
        for row, expected in zip(log, expected_log):
            expect(row == expected, f"the log has {row}, undisturbed {expected}")
        expect(len(log) == len(expected_log), "the log has another length")

    def extend(self, chance):
        """Resumes the finished run for some steps more, where this is exact."""
        words = " ".join(self.flags)
        if "cosine" in words or "dropout_final" in words or "patience" in words:
            return
        num_iters = int(re.search(r"--num_iters (\d+)", words)[1])
        steps_per_eval = int(re.search(r"--steps_per_eval (\d+)", words)[1])
        if num_iters % steps_per_eval:  # the score at the old end would be one more
            return
        flags = [*self.flags, "--num_iters", str(num_iters + chance.randrange(1, 9))]
        plain = self.work / "undisturbed"
        for folder in (plain, self.folder):
            for leg in self.start_all({}, flags, folder):
                self.look_at(leg, {0})
        self.expected, run = outcome(plain, self.base_run)
        self.expected_log = read_log(plain / run / "log.jsonl")
        self.compare()


class CannotMount(Exception):
    """Only root can mount a small disk."""


SAVED = r"^saved [0-9a-f]{40} at iteration ([\d,]+)$"


# ---- Faults -------------------------------------------------------------------------------------
# Each is a function of (scenario, chance) that returns whether it struck.

# The calls of a phase from which one is drawn: about as many as two saves, some steps ... have.
SPANS = {"step": 6, "save": 140, "log": 15, "eval": 3, "sample": 3}


def draw_call(scenario, chance, phase):
    """The number of a call in a phase: mostly a near one, so that a run has many faults."""
    last = max(1, scenario.counts[phase])
    if chance.random() < 0.9:
        last = min(last, SPANS.get(phase, last))
    return chance.randint(1, last)


def vary(scenario, chance):
    """The scenario's command, sometimes with flags that may change from leg to leg."""
    flags = [*scenario.flags]
    records = scenario.own_checkpoints()
    if records and not scenario.damaged and chance.random() < 0.1:
        flags = ["--identifier", records[0]["run"], "--max_tokens", "2"]  # the rest is inherited
    if chance.random() < 0.2:
        flags += ["--steps_per_save", str(chance.randint(1, 6))]
    if chance.random() < 0.2:
        flags += ["--keep", str(chance.randint(1, 4))]
    return flags


def have_checkpoints(scenario, count):
    """The run's checkpoints, the furthest first; if they are fewer, some steps are trained."""
    records = scenario.own_checkpoints()
    for _ in range(count - len(records)):
        leg = scenario.start([], steps=3).wait()
        scenario.check(leg, {0, 143})
        scenario.is_finished = leg.status == 0
    return scenario.own_checkpoints()


def run_struck(scenario, chance, strikes, statuses, is_clean=True):
    """Runs a leg with these strikes; returns whether the first one came."""
    steps = 10 if chance.random() < 0.9 else None  # in which a strike mostly comes
    leg = scenario.start(strikes, vary(scenario, chance), steps=steps).wait()
    for struck in leg.struck:
        is_error = struck["action"].startswith("E")
        if is_error and (struck["phase"] == "log" or "log.jsonl" in struck["path"]):
            scenario.is_exact_log = False
        unread = re.search(r"([0-9a-f]{40})\.(metadata|safetensors)$", struck["path"])
        if is_error and struck["phase"] == "start" and unread:
            # A checkpoint that could not be read was passed over, as a damaged one would be. The
            # log was cut to the older one; the next leg may resume the newer one, rows of which
            # are then missing.
            scenario.note_damage(unread[1])
            scenario.reached = 0
            scenario.is_exact_log = False
    if not leg.has_struck():
        statuses = statuses | {0, 143}
    if any(struck["what"] == "rmdir" for struck in leg.struck):
        statuses = statuses | {0}  # the last call of a leg, all of whose work is done
    scenario.check(leg, statuses, is_clean)
    for phase, count in leg.counts.items():
        scenario.counts[phase] = max(scenario.counts[phase], count)
    scenario.is_finished = leg.status == 0
    return len(leg.struck) > 0


def lose_cache(scenario, chance, phase):
    """Before a fault in the phase `cache`: most often there is something to encode."""
    if phase == "cache" and chance.random() < 0.7:
        shutil.rmtree(scenario.folder / "text", ignore_errors=True)


def ended_by(name):
    """The statuses of a process that a signal ends."""
    number = getattr(signal, name)
    return {128 + number, -number}


def signalled(scenario, chance, phase):
    lose_cache(scenario, chance, phase)
    call = draw_call(scenario, chance, phase)
    name = chance.choice(STOPPING)
    strikes = [{"phase": phase, "call": call, "action": name}]
    return run_struck(scenario, chance, strikes, ended_by(name))


def signalled_twice(scenario, chance):
    """The second one leaves at once."""
    phase = chance.choice(("step", "save", "eval", "sample"))
    call = draw_call(scenario, chance, phase)
    names = chance.choices(STOPPING, k=2)
    strikes = [
        {"phase": phase, "call": call, "action": names[0]},
        {"phase": "save", "call": chance.randint(1, 30), "action": names[1]},
    ]
    statuses = ended_by(names[0]) | ended_by(names[1])
    return run_struck(scenario, chance, strikes, statuses, is_clean=False)


def killed(scenario, chance, phase):
    lose_cache(scenario, chance, phase)
    call = draw_call(scenario, chance, phase)
    strikes = [{"phase": phase, "call": call, "action": "kill"}]
    return run_struck(scenario, chance, strikes, {-signal.SIGKILL})


def draw_end(chance):
    """Strikes that end a leg soon, with their statuses, so that the run has more faults."""
    kind = chance.choice(("SIGTERM", "SIGINT", "kill", "none"))
    if kind == "none":
        return [], {0}
    statuses = {-signal.SIGKILL} if kind == "kill" else ended_by(kind)
    return [{"phase": "step", "call": chance.randint(1, 5), "action": kind}], statuses


def failing(scenario, chance, phase):
    """A call fails, once or several times; a save is then tried again."""
    lose_cache(scenario, chance, phase)
    call = draw_call(scenario, chance, phase)
    action = chance.choice(("ENOSPC", "EIO", "EACCES"))
    times = chance.choice((1, 1, 2, 5, 40))
    strikes = [{"phase": phase, "call": call, "action": action, "times": times}]
    end, statuses = draw_end(chance)
    if phase in ("start", "cache"):
        statuses = statuses | {1, 2}
    return run_struck(scenario, chance, strikes + end, statuses | {0}, is_clean=False)


def signalled_in_retry(scenario, chance):
    """A signal comes, or a kill, while a save waits for its next try."""
    strikes = [
        {
            "phase": "save",
            "call": draw_call(scenario, chance, "save"),
            "action": chance.choice(("ENOSPC", "EIO")),
            "times": chance.choice((1, 3, 10)),
        },
        {
            "phase": "pause",
            "call": chance.randint(1, 3),
            "action": chance.choice((*STOPPING, "kill")),
        },
    ]
    action = strikes[1]["action"]
    statuses = {-signal.SIGKILL} if action == "kill" else ended_by(action)
    return run_struck(scenario, chance, strikes, statuses, is_clean=False)


def clock_set_back(scenario, chance):
    phase = chance.choice(("step", "save", "start"))
    strikes = [
        {"phase": phase, "call": draw_call(scenario, chance, phase), "action": "clock set back"}
    ]
    end, statuses = draw_end(chance)
    return run_struck(scenario, chance, strikes + end, statuses)


def file_size_limited(scenario, chance):
    """A limit on the size of files, as a quota's: lifted while a save waits for its next try."""
    scenario.is_exact_log = False
    strikes = [
        {"phase": "step", "call": draw_call(scenario, chance, "step"), "action": "limit"},
        {"phase": "pause", "call": chance.randint(1, 30), "action": "lift"},
    ]
    end, statuses = draw_end(chance)
    return run_struck(scenario, chance, strikes + end, statuses)


def saves_keep_failing(scenario, chance):
    """A second signal ends even a save that never works; the last checkpoint stands."""
    name = chance.choice(STOPPING)
    scenario.is_exact_log = False
    strikes = [
        {"phase": "step", "call": draw_call(scenario, chance, "step"), "action": "limit"},
        {"phase": "pause", "call": chance.randint(1, 30), "action": name},
        {"phase": "pause", "call": chance.randint(1, 3), "action": name},
    ]
    return run_struck(scenario, chance, strikes, ended_by(name), is_clean=False)


def disk_full(scenario, chance):
    """The disk fills up, and has room again while a save waits for its next try."""
    scenario.is_exact_log = False
    strikes = [
        {"phase": "step", "call": draw_call(scenario, chance, "step"), "action": "fill"},
        {"phase": "pause", "call": chance.randint(1, 30), "action": "free"},
        {"phase": "step", "call": chance.randint(1, 5), "action": "SIGTERM"},
    ]
    struck = run_struck(scenario, chance, strikes, ended_by("SIGTERM"))
    (scenario.folder / "ballast").unlink(missing_ok=True)
    return struck


# -- Damage between legs


def spoil(path, chance):
    """Damages a file in one of many ways, and says how."""
    how = chance.choice(("cut", "flip", "zero", "empty", "delete"))
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data)) if data else 0
    if how == "delete":
        path.unlink()
        return how
    if how == "empty" or not data:
        data = b""
    elif how == "cut":
        data = data[:place]
    elif how == "flip":
        data[place] ^= chance.randint(1, 255)
    else:
        end = min(len(data), place + chance.randint(1, 4096))
        data[place:end] = bytes(end - place)
    path.write_bytes(data)
    return f"{how} at {place}"


def damage(scenario, chance, record, kind):
    """Damages a file of a checkpoint. kind: safetensors or metadata."""
    path = scenario.folder / record["run"] / f"{record['id']}.{kind}"
    scenario.note_damage(record["id"])
    scenario.journal.append(f"{path.name}: {spoil(path, chance)}")
    scenario.reached = scenario.own_checkpoints()[0]["iteration"]
    scenario.is_finished = False


def checkpoint_damaged(scenario, chance, kind):
    """A file of the newest or an older checkpoint, but never of the last intact one."""
    records = have_checkpoints(scenario, 2)
    spare = [record for record in records if is_spare(record, records)]
    if not spare:
        return False
    record = spare[0] if chance.random() < 0.6 else chance.choice(spare)
    damage(scenario, chance, record, kind)
    return True


def best_and_newest_damaged(scenario, chance):
    """Both of one run, which then resumes from what is left."""
    records = have_checkpoints(scenario, 3)
    if not records:
        return False
    own = [record for record in records if record["run"] == records[0]["run"]]
    scored = [record for record in own if record["iteration"] in dict(record["scores"])]
    if len(own) < 3 or not scored:
        return False
    best = min(scored, key=lambda record: dict(record["scores"])[record["iteration"]])
    for record in (own[0], best):
        if record["id"] not in scenario.damaged:  # they may be one
            damage(scenario, chance, record, chance.choice(("safetensors", "metadata")))
    return True


def is_spare(record, records):
    """Whether the run of a checkpoint has another one, too."""
    run = [each for each in records if each["run"] == record["run"]]
    return len(run) > 1


def log_damaged(scenario, chance):
    """Rows may be lost, but not more."""
    logs = sorted(scenario.folder.glob("*/log.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    if not logs or not logs[-1].is_file():  # a pipe, say, from the last time
        return False
    scenario.is_exact_log = False
    how = chance.random()
    if how < 0.1:
        logs[-1].unlink()
        logs[-1].mkdir()
    elif how < 0.2:
        logs[-1].unlink()
        logs[-1].symlink_to(make_victim(scenario))
    elif how < 0.3:
        logs[-1].unlink()
        os.mkfifo(logs[-1])
    else:
        scenario.journal.append(f"{logs[-1].name}: {spoil(logs[-1], chance)}")
    return True


def make_victim(scenario):
    """A file of the user's outside the folder, which must stay as it is."""
    path = scenario.work / "victim.txt"
    path.write_text("precious")
    return path


def cache_damaged(scenario, chance, pattern):
    paths = sorted(scenario.folder.glob(f"text/*/{pattern}"))
    if not paths:
        return False
    path = chance.choice(paths)
    scenario.journal.append(f"{path.name}: {spoil(path, chance)}")
    return True


def leftovers_planted(scenario, chance):
    """What a killed process may have left, and links among it."""
    records = scenario.own_checkpoints()
    run = scenario.folder / f"text-{chance.randrange(16**6):06x}"
    if records and chance.random() < 0.8:
        run = scenario.folder / records[0]["run"]
    run.mkdir(exist_ok=True)
    unfinished = f".{chance.randrange(16**16):016x}.new"
    name = chance.choice([unfinished, f"{chance.randrange(16**40):040x}.metadata"])
    junk = chance.randbytes(chance.randrange(2000))
    if chance.random() < 0.3:
        (run / name).symlink_to(make_victim(scenario))
    else:
        (run / name).write_bytes(junk)
    scenario.journal.append(f"{run.name}/{name} planted")
    return True


# An odd value of a field, from a stranger whose SHA1s are right. None of them is of a run that any
# command here resumes: its seed is another one.
ODD = [
    ("run", []),
    ("saved", "123"),
    ("saved", math.inf),
    ("saved", math.nan),
    ("saved", 1e300),
    ("saved", 99999999999.9999),
    ("saved", -1.0),
    ("saved", 10**400),
    ("iteration", math.inf),
    ("iteration", "5"),
    ("iteration", -1),
    ("iteration", 10**10),
    ("iteration", True),
    ("tokens_seen", 10**30),
    ("recent_loss", math.nan),
    ("scores", "12"),
    ("scores", [[6, None]]),
    ("scores", [[6, math.inf]]),
    ("scores", [5]),
    ("uses", []),
    ("uses", {"teacher": "x"}),
    ("uses", {"teacher": ["a", 5]}),
    ("uses", {"export": ["a", "0" * 40]}),
    ("versions", {"\x1b]0;owned": "x"}),
    ("flags", {"learning_rate": "x"}),
    ("flags", {"min_lr": 1.0, "learning_rate": 0.1}),
    ("flags", {"benchmark": True}),
    ("flags", {"text": "here", "seed": 77}),
    ("flags", {"dataset": "nowhere"}),
    ("flags", []),
    ("config", {}),
    ("config", "x"),
    ("config.num_heads", 0),
    ("config.num_kv_heads", 0),
    ("config.dim", -16),
    ("config.num_blocks", 10**9),
    ("config.rope_theta", 10**400),
    ("config.rope_scaling", "x"),
    ("config.mlp", "nothing"),
    ("config.experts", 8),
    ("id", "../../victim"),
    ("id", 5),
    ("folder", "/"),
    ("epoch", 10**12),
    ("place", 1.5),
    ("format_version", 2),
    ("format_version", "3"),
    ("deep", None),
    ("a list", None),
    ("not JSON", None),
    ("no texts", None),
]


def plant_odd(scenario, chance, source, folder):
    """Copies a checkpoint to a folder, with an odd record of correct SHA1s."""
    folder.mkdir(exist_ok=True)
    name, value = chance.choice(ODD)
    record, _ = read_metadata(source)
    data = source.read_bytes()
    header, arrays = split_safetensors(data)
    checkpoint_id = f"{chance.randrange(16**40):040x}"
    record |= {"id": checkpoint_id, "flags": record["flags"] | {"seed": 77}}
    outer, _, inner = name.partition(".")
    if inner:
        record[outer] = record[outer] | {inner: value}
    else:
        record[name] = value
    text = json.dumps(record)
    if name == "deep":
        text = "[" * 200_000
    elif name == "a list":
        text = "[1, 2]"
    elif name == "not JSON":
        text = "{"
    path = folder / f"{checkpoint_id}.metadata"
    write_metadata(path, text, arrays, header)
    if name == "no texts":
        content = b'{"__metadata__": {"record": 5}}'
        path.write_bytes(len(content).to_bytes(8, "little") + content)
    shutil.copy(source.with_suffix(".safetensors"), path.with_suffix(".safetensors"))
    scenario.journal.append(f"an odd {name}: {value!r:.50}")


def odd_record(scenario, chance):
    """An odd record comes into the folder while a run trains, which it must not end."""
    records = have_checkpoints(scenario, 1)
    if not records:
        return False
    source = scenario.folder / records[0]["run"] / f"{records[0]['id']}.metadata"
    copied = scenario.work / "source.metadata"
    for suffix in (".metadata", ".safetensors"):
        shutil.copy(source.with_suffix(suffix), copied.with_suffix(suffix))
    end, statuses = draw_end(chance)
    phase = chance.choice(("start", "step", "save"))
    pause = {"phase": phase, "call": draw_call(scenario, chance, phase), "action": "pause"}
    first = scenario.start([pause, *end], steps=10)
    if not first.wait_for_pause():
        scenario.check(first, {0, 143})
        scenario.is_finished = first.status == 0
        return False
    odd = scenario.folder / "odd"
    for _ in range(3):
        plant_odd(scenario, chance, copied, odd)
    os.kill(first.pid, signal.SIGCONT)
    first.wait()
    listing = scenario.start([], ["--list"]).wait()
    scenario.look_at(listing, {0})
    again = scenario.start([], steps=3).wait()
    # Whose files the oracle does not know.
    shutil.rmtree(odd)
    scenario.check(first, statuses | {0, 143})
    scenario.check(again, {0, 143})
    scenario.is_finished = again.status == 0
    return True


def needed_file_gone(scenario, chance):
    """Without its text or its base a run cannot be trained: one line, and nothing is lost."""
    paths = [scenario.text]
    # A run's own average is no other checkpoint.
    has_teacher = "--teacher" in scenario.flags and "average" not in scenario.flags
    if "--lora_rank" in scenario.flags or has_teacher:
        paths += list(scenario.folder.glob(f"{scenario.base_run}/{scenario.base}.*"))
    path = chance.choice(paths)
    hidden = scenario.work / "hidden"
    path.rename(hidden)
    scenario.journal.append(f"{path.name} hidden")
    leg = scenario.start([]).wait()
    hidden.rename(path)
    scenario.check(leg, {1, 2})
    return True


def text_touched(scenario, chance):
    """A text of another age and equal content is the same text."""
    os.utime(scenario.text, (1, chance.randrange(10**9)))
    return True


# -- Other processes


def second_process(scenario, chance):
    """The same command, while the first one trains: refused."""
    if not have_checkpoints(scenario, 1):
        return False
    end, statuses = draw_end(chance)
    pause = {"phase": "step", "call": draw_call(scenario, chance, "step"), "action": "pause"}
    first = scenario.start([pause, *end])
    if not first.wait_for_pause():
        scenario.check(first, {0})
        scenario.is_finished = True
        return False
    second = scenario.start([]).wait()
    os.kill(first.pid, signal.SIGCONT)
    first.wait()
    scenario.look_at(second, {2})
    expect("another process" in second.err, "not refused for the right reason:", second.err)
    scenario.check(first, statuses | {0})
    scenario.is_finished = first.status == 0
    return True


def equal_run(scenario, chance):
    """The same command with --new_model, while the first one trains: both come to equal files."""
    pause = {"phase": "step", "call": draw_call(scenario, chance, "step"), "action": "pause"}
    end, statuses = draw_end(chance)
    first = scenario.start([pause, *end])
    if not first.wait_for_pause():
        scenario.check(first, {0})
        scenario.is_finished = True
        return False
    strikes, other_statuses = draw_end(chance)
    second = scenario.start(strikes, [*scenario.flags, "--new_model"], steps=9).wait()
    os.kill(first.pid, signal.SIGCONT)
    first.wait()
    scenario.check(second, other_statuses | {0, 143}, is_clean=False)
    scenario.check(first, statuses | {0}, is_clean=False)
    scenario.is_finished = False  # if one of them is, resuming it is quick
    return True


def draw_reader(scenario, chance):
    """A command that reads, or None if there is nothing to read yet."""
    records = have_checkpoints(scenario, 1)
    if not records:
        return None
    readers = [["--list"], ["--prompt", "a", "--max_tokens", "2"], ["--evaluate", "valid"]]
    newest = max(records, key=lambda record: record["saved"])  # "best" is that of its run
    own = [record for record in records if record["run"] == newest["run"]]
    is_scored = any(record["iteration"] in dict(record["scores"]) for record in own)
    if is_scored and not scenario.damaged:
        readers.append([*readers[1], "--identifier", "best"])
    return chance.choice(readers)


def readers_beside(scenario, chance):
    """Commands that read, while a save or a deletion is under way."""
    commands = [draw_reader(scenario, chance) for _ in range(2)]
    if None in commands:
        return False
    end, statuses = draw_end(chance)
    pause = {"phase": "save", "call": draw_call(scenario, chance, "save"), "action": "pause"}
    first = scenario.start([pause, *end], [*scenario.flags, "--keep", "1"])
    if not first.wait_for_pause():
        scenario.check(first, {0})
        scenario.is_finished = True
        return False
    readers = [scenario.start([], command) for command in commands]
    SLEEP(0.1)  # the folder's lock may keep them waiting
    os.kill(first.pid, signal.SIGCONT)
    first.wait()
    for reader in readers:
        scenario.wait_well(reader)
    scenario.check(first, statuses | {0})
    scenario.is_finished = first.status == 0
    return True


def slow_reader(scenario, chance):
    """A command that reads, while all that it has listed is replaced."""
    command = draw_reader(scenario, chance)
    if not command:
        return False
    pause = {"phase": "start", "call": chance.randint(1, 40), "action": "pause"}
    reader = scenario.start([pause], command)
    if not reader.wait_for_pause():
        scenario.look_at(reader, {0})
        return False
    stop = {"phase": "step", "call": 3, "action": "SIGTERM"}
    flags = [*scenario.flags, "--keep", "1", "--steps_per_save", "1"]
    trainer = scenario.start([stop], flags)
    SLEEP(0.4)  # the reader may hold the folder's lock
    os.kill(reader.pid, signal.SIGCONT)
    scenario.wait_well(reader)
    scenario.check(trainer.wait(), {143, 0})
    scenario.is_finished = trainer.status == 0
    return True


def branch_stopped(scenario, chance):
    """A branch that is stopped before its first save exists, and what it prints works."""
    records = have_checkpoints(scenario, 2)
    own = [record for record in records if record["run"] == records[0]["run"]]
    older = [record for record in own if record["saved"] < own[0]["saved"]]
    ids = [record["id"] for record in records]
    older = [record for record in older if ids.count(record["id"]) == 1]
    if not older:
        return False
    record = chance.choice(older)
    phase = chance.choice(("start", "save", "step"))
    call = 1 if phase == "step" else draw_call(scenario, chance, phase)
    action = chance.choice((*STOPPING, "kill"))
    strikes = [{"phase": phase, "call": call, "action": action}]
    before = {path.name for path in scenario.folder.iterdir()}
    leg = scenario.start(strikes, ["--identifier", record["id"]], steps=5).wait()
    statuses = {-signal.SIGKILL} if action == "kill" else ended_by(action)
    after = {path.name for path in scenario.folder.iterdir() if path.name != "text"}
    scenario.branches |= after - before
    scenario.check(leg, statuses if leg.has_struck() else {0, 143})
    scenario.is_finished = False
    pasted = PASTED.search(leg.out)
    if pasted:
        scenario.journal.append(f"pasted: {pasted[1]}")
        words = shlex.split(pasted[1])
        names = words[: words.index("--save_dir")]
        scenario.check(scenario.start([], names, steps=2).wait(), {0, 143})
    return leg.has_struck()


def base_pruned(scenario, chance):
    """The run of a LoRA run's base prunes while that starts: it is refused, or keeps its base."""
    folder = scenario.work / "origins"
    shape = ["--text", str(scenario.text), "--max_tokens", "1"]
    base = [*shape, *SIZES, "--num_blocks", "1", "--batch_size", "2", "--steps_per_save", "1"]
    base += ["--keep", "1"]
    scenario.start([], base, folder, steps=2).wait()
    origin, _ = chance.choice(intact_checkpoints(folder))  # the newest, or the one before it
    pause = {"phase": "start", "call": chance.randint(1, 80), "action": "pause"}
    if chance.random() < 0.3:
        pause = {"phase": "save", "call": chance.randint(1, 30), "action": "pause"}
    tuned = ["--init_from", origin["id"], "--lora_rank", "2", "--num_iters", "2"]
    leg = scenario.start([pause], [*shape, *tuned, "--batch_size", "2"], folder)
    is_paused = leg.wait_for_pause()
    other = scenario.start([], base, folder, steps=3)
    if is_paused:
        SLEEP(0.3)  # the other one may wait for what this one holds
        os.kill(leg.pid, signal.SIGCONT)
        leg.wait()
    scenario.look_at(other.wait(), {0, 143})
    scenario.look_at(leg, {0, 2})
    runs = {record["run"] for record, _ in intact_checkpoints(folder)} - {origin["run"]}
    expect(len(runs) == (leg.status == 0), f"it left {len(runs)} runs")
    for run in runs:
        again = ["--identifier", run, "--prompt", "a", "--max_tokens", "1"]
        scenario.look_at(scenario.start([], again, folder).wait(), {0})
        more = ["--identifier", run, "--num_iters", "3", "--max_tokens", "1"]
        scenario.look_at(scenario.start([], more, folder).wait(), {0})
    shutil.rmtree(folder)
    return is_paused


def diverged(scenario, chance):
    """One line, which names a checkpoint that is there; nothing is lost and nothing marked."""
    records = have_checkpoints(scenario, 2)
    if not records or scenario.damaged:  # what is named must not be damaged
        return False
    newest = max(records, key=lambda record: record["saved"])
    place = newest["iteration"] % newest["flags"]["steps_per_eval"]
    if place == 0 and newest["iteration"] not in dict(newest["scores"]):
        return False  # it would be scored first, and saved with these flags
    after = newest["iteration"] + 1  # the first step's loss is finite, the second one's is not
    if after % newest["flags"]["steps_per_eval"] == 0 or after >= newest["flags"]["num_iters"]:
        return False  # nor may it be scored and saved between the two
    flags = ["--identifier", newest["run"], "--learning_rate", "1e38", "--lr_warmup", "0"]
    flags += ["--grad_clip", "0", "--lr_schedule", "constant", "--steps_per_save", "1000"]
    leg = scenario.start([], flags).wait()
    if leg.status == 0:  # it was at its end
        return False
    scenario.check(leg, {1})
    expect("is not finite" in leg.err, "another error:", leg.err)
    pasted = PASTED.search(leg.err)
    if pasted:
        prefix = shlex.split(pasted[1])[1]
        known = {record["id"][:12] for record in scenario.own_checkpoints()}
        expect(prefix in known, f"it names {prefix}, which is not there")
    return True


def second_signal_at_the_end(scenario, chance):
    """A second Ctrl+C while a stopped session leaves: all is saved already."""
    names = chance.choices(STOPPING, k=2)
    strikes = [
        {"phase": "step", "call": draw_call(scenario, chance, "step"), "action": names[0]},
        {"phase": "end", "call": chance.randint(1, 3), "action": names[1]},
    ]
    statuses = ended_by(names[0]) | ended_by(names[1])
    return run_struck(scenario, chance, strikes, statuses)


def wall_clock(scenario, chance):
    """A real `python main.py`, and a real signal at some moment."""
    if scenario.environment:
        return False  # which it would not have
    name = chance.choice((*STOPPING, "SIGKILL"))
    command = [sys.executable, str(ROOT / "main.py"), *scenario.flags]
    command += ["--save_dir", str(scenario.folder)]
    scenario.legs += 1
    scenario.journal.append(f"{name} to {' '.join(command)}")
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    SLEEP(chance.uniform(0.02, 0.4))
    process.send_signal(getattr(signal, name))
    leg = Started(process.pid, {}, [])
    leg.struck = []
    leg.out, leg.err = process.communicate(timeout=TIMEOUT)
    leg.status = process.returncode
    first_line = r'main.py", line \d+, in <module>\n(    import signal\n|  File "<frozen)'
    is_starting = re.search(first_line, leg.err)
    is_starting = is_starting or "main.py" not in leg.err or "line 0, in <module>" in leg.err
    if leg.err.endswith("KeyboardInterrupt\n") and not leg.out and is_starting:
        # Python was starting, up to main.py's `import signal`: it ends with 1 or by the signal.
        leg.err = ""
        leg.status = -signal.SIGINT
    scenario.check(leg, ended_by(name) | {0})
    scenario.is_finished = leg.status == 0
    return leg.status != 0


def default_signals():
    for name in STOPPING:
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def time_over(scenario, chance):
    """--max_minutes ends a leg."""
    leg = scenario.start([], [*scenario.flags, "--max_minutes", "1e-7"]).wait()
    scenario.check(leg, {0})
    is_over = "reached at iteration" in leg.out
    scenario.is_finished = not is_over
    return is_over


# -- Ranks


def run_ranks_struck(scenario, chance, rank, phase, action):
    """Runs a leg on all ranks with a strike at one of them; returns (legs, whether it came)."""
    call = 1 if phase == "eval" else draw_call(scenario, chance, phase)  # few batches a rank
    strike = {"phase": phase, "call": call, "action": action}
    legs = scenario.start_all({rank: [strike]}, steps=10)
    has_struck = legs[rank].has_struck()
    if not has_struck:
        scenario.is_finished = legs[0].status == 0
        for leg in legs:
            scenario.check(leg, {0, 143})
    return legs, has_struck


def rank_killed(scenario, chance):
    """The others end with one line."""
    victim = chance.randrange(scenario.ranks)
    phase = chance.choice(("step", "step", "eval"))
    legs, has_struck = run_ranks_struck(scenario, chance, victim, phase, "kill")
    if not has_struck:
        return False
    for rank, leg in enumerate(legs):
        scenario.check(leg, {-signal.SIGKILL} if rank == victim else {1}, is_clean=False)
        lost = "a rank failed or is gone" in leg.err
        expect(lost or rank == victim, f"rank {rank} does not say what happened:", leg.err)
    return True


def rank_signalled(scenario, chance):
    """Which stops all of them, saved."""
    rank = chance.randrange(scenario.ranks)
    phase = chance.choice(("step", "step", "eval", "save")) if rank == 0 else "step"
    name = chance.choice(STOPPING)
    legs, has_struck = run_ranks_struck(scenario, chance, rank, phase, name)
    if not has_struck:
        return False
    scenario.check(legs[0], {128 + getattr(signal, name)})
    for leg in legs[1:]:
        scenario.check(leg, {0})
    return True


# The kinds of faults, by the place of a scenario.
FAULTS = {
    "process": {
        "signal at a step": partial(signalled, phase="step"),
        "signal in a save": partial(signalled, phase="save"),
        "signal in an evaluation": partial(signalled, phase="eval"),
        "signal in sampling": partial(signalled, phase="sample"),
        "signal in the log": partial(signalled, phase="log"),
        "signal at the start": partial(signalled, phase="start"),
        "signal in the cache": partial(signalled, phase="cache"),
        "signal in a retried save": signalled_in_retry,
        "two signals": signalled_twice,
        "kill at a step": partial(killed, phase="step"),
        "kill in a save": partial(killed, phase="save"),
        "kill in an evaluation": partial(killed, phase="eval"),
        "kill in sampling": partial(killed, phase="sample"),
        "kill in the log": partial(killed, phase="log"),
        "kill at the start": partial(killed, phase="start"),
        "kill in the cache": partial(killed, phase="cache"),
        "failing call of a save": partial(failing, phase="save"),
        "failing call of the start": partial(failing, phase="start"),
        "failing call of the cache": partial(failing, phase="cache"),
        "failing call of the log": partial(failing, phase="log"),
        "file size limit": file_size_limited,
        "saves that keep failing": saves_keep_failing,
        "clock set back": clock_set_back,
        "damaged weights": partial(checkpoint_damaged, kind="safetensors"),
        "damaged metadata": partial(checkpoint_damaged, kind="metadata"),
        "best and newest damaged": best_and_newest_damaged,
        "damaged log": log_damaged,
        "damaged tokens": partial(cache_damaged, pattern="*.tokens"),
        "damaged about.json": partial(cache_damaged, pattern="about.json"),
        "leftovers": leftovers_planted,
        "needed file gone": needed_file_gone,
        "touched text": text_touched,
        "second process": second_process,
        "equal run": equal_run,
        "odd record": odd_record,
        "stopped branch": branch_stopped,
        "pruned base": base_pruned,
        "divergence": diverged,
        "second signal at the end": second_signal_at_the_end,
        "readers beside a save": readers_beside,
        "slow reader": slow_reader,
        "wall clock": wall_clock,
        "time over": time_over,
    },
    "ranks": {
        "killed rank": rank_killed,
        "signalled rank": rank_signalled,
    },
    "small disk": {
        "full disk": disk_full,
        "full disk, kill in a save": partial(killed, phase="save"),
    },
}


# ---- The soak -----------------------------------------------------------------------------------


def play(seed, number, work):
    """Plays one scenario; returns it, or None where it needs more rights. Raises Failure."""
    chance = random.Random(f"{seed}:{number}")
    place = "process"
    if number % 48 == 7:
        place = "ranks"
    elif number % 24 == 15:
        place = "small disk"
    scenario = None
    try:
        scenario = Scenario(work, chance, place)
        for kind in draw_kinds(seed, number, place):
            if scenario.is_finished:
                break
            scenario.journal.append(kind)
            if FAULTS[place][kind](scenario, chance):
                scenario.faults[kind] += 1
        scenario.finish()
        if chance.random() < 0.2:
            scenario.extend(chance)
    except CannotMount:
        shutil.rmtree(work)
        return None
    except Exception as error:
        words = str(error) if isinstance(error, Failure) else traceback.format_exc()
        if scenario:
            words += "\n" + "\n".join(scenario.journal)
            scenario.keep_disk()
        raise Failure(f"{words}\nkept: {work}") from None
    scenario.leave()
    return scenario


def draw_kinds(seed, number, place):
    """The kinds of faults of a scenario.

    All have their turn before any comes again, among the even numbers and among the odd ones.
    """
    known = list(FAULTS[place])
    if place != "process":
        return known * 5
    size = 14
    half, parity = divmod(number, 2)  # of two worker processes each has one half
    first = half * size
    kinds = []
    for place_in_deck in range(first, first + size):
        deck, index = divmod(place_in_deck, len(known))
        order = random.Random(f"{seed}:deck {deck}:{parity}").sample(known, len(known))
        kinds.append(order[index])
    return kinds


LEAST = 3  # faults of a kind, in each worker process


def work_off(seed, faults, folder, first, stride):
    """Plays scenarios first, first + stride ... until enough faults struck; returns a result.

    These are `faults` in all and, if that is not too few, LEAST of each kind that any scenario may
    have.
    """
    result = {"counts": Counter(), "legs": 0, "scenarios": 0, "failures": []}
    number = first
    while len(result["failures"]) < 3:
        rarest = min(result["counts"][kind] for kind in FAULTS["process"])
        if result["counts"].total() >= faults and rarest >= min(LEAST, faults // 100):
            break
        try:
            scenario = play(seed, number, folder / f"scenario-{number}")
            if scenario:
                result["counts"] += scenario.faults
                result["legs"] += scenario.legs
                result["scenarios"] += 1
        except Failure as failure:
            again = f"python tests/soak.py --seed {seed} --scenario {number}"
            result["failures"].append(f"{failure}\nagain: {again}")
        number += stride
    return result


def share_out(work, jobs, folder):
    """Does work(folder, first, stride) in so many processes; returns the sum of the results."""
    workers = []
    for first in range(jobs):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                result = work(folder, first, jobs)
                (folder / f"worker-{first}.json").write_text(json.dumps(result))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        workers.append(pid)
    total = {"counts": Counter(), "legs": 0, "scenarios": 0, "failures": []}
    for first, pid in enumerate(workers):
        os.waitpid(pid, 0)
        result = json.loads((folder / f"worker-{first}.json").read_text())
        total["counts"] += Counter(result["counts"])
        for name in ("legs", "scenarios", "failures"):
            total[name] += result[name]
    return total


def sweep(actions, folder, first=0, stride=1):
    """Strikes at each single call of a short run that begins, and of one that is resumed.

    actions: some of ACTIONS. Of all these faults only number `first`, first + stride ... are
    played. Returns a result.
    """
    result = {"counts": Counter(), "legs": 0, "scenarios": 1, "failures": []}
    scenario = Scenario(folder / f"sweep-{first}", random.Random(1), flags=SWEPT)
    template = scenario.work / "template"
    number = 0
    for kind in ("begun", "resumed"):
        if kind == "resumed":
            scenario.check(scenario.start([], steps=3).wait(), {143})
        shutil.rmtree(template, ignore_errors=True)
        shutil.copytree(scenario.folder, template)
        counts = scenario.start([]).wait().counts
        for phase, count in counts.items():
            for call, action in itertools.product(range(1, count + 1), actions):
                number += 1
                if number % stride != first:
                    continue
                restore(scenario, template)
                try:
                    strike_at(scenario, phase, call, action)
                    result["counts"][f"{kind}: {action} in {phase}"] += 1
                except Failure as failure:
                    words = "\n".join([str(failure), kind, *scenario.journal])
                    result["failures"].append(words)
                    print(words, flush=True)  # at once: a sweep takes long
        restore(scenario, template)
    result["legs"] = scenario.legs
    return result


SWEPT = [*SIZES, *"--num_blocks 1 --batch_size 2 --num_iters 7 --steps_per_save 2".split()]
SWEPT += "--steps_per_eval 4 --steps_per_report 2 --eval_tokens 30 --keep 1 --max_tokens 1".split()
# Of each sweep's calls. An error with `times` meets what cleans up after it, too.
ACTIONS = ("kill", "SIGTERM", "EIO", "ENOSPC, twice", "EACCES, twice")


def restore(scenario, template):
    """Brings a scenario's folder back to what the template is."""
    shutil.rmtree(scenario.folder)
    shutil.copytree(template, scenario.folder)
    for path in scenario.work.glob("[0-9]*.*"):  # what legs have printed
        path.unlink()
    scenario.journal.clear()
    scenario.reached = 0
    scenario.is_finished = False
    scenario.is_exact_log = True


def strike_at(scenario, phase, call, action):
    """One leg with one strike, and one that finishes the run."""
    name, _, times = action.partition(", ")
    strike = {"phase": phase, "call": call, "action": name, "times": 2 if times else 1}
    if action == "kill":
        statuses = {-signal.SIGKILL}
    elif action in STOPPING:
        statuses = ended_by(action) | {0}  # after the last check for signals
    else:
        statuses = {0, 1, 2} if phase in ("start", "cache") else {0}
    is_clean = action == "kill" or action in STOPPING
    leg = scenario.start([strike]).wait()
    if leg.has_struck() and not is_clean and phase == "log":
        scenario.is_exact_log = False
    scenario.check(leg, statuses if leg.has_struck() else {0}, is_clean)
    scenario.finish()


def describe(seed, result, seconds):
    """A line for people, and the counts as JSON in another."""
    counts = dict(sorted(result["counts"].items()))
    return (
        f"seed {seed}, faults {sum(counts.values())}, scenarios {result['scenarios']}, "
        f"legs {result['legs']}, {seconds:.0f} s, by kind\n{json.dumps(counts)}"
    )


def make_folder():
    """A new folder, on a RAM disk if there is one with room: saves are synced there at once."""
    parent = None
    if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 1 << 30:
        parent = "/dev/shm"
    return Path(tempfile.mkdtemp(prefix="soak-", dir=parent))


def command_line():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seed", default=str(random.randrange(10**6)))
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--scenario", type=int, help="only this one")
    parser.add_argument(
        "--sweep", nargs="*", choices=ACTIONS, metavar="ACTION", help="a fault at every single call"
    )
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--leg", help=argparse.SUPPRESS)  # what a new process is to do
    options = parser.parse_args()
    if options.leg:
        be_a_leg(*json.loads(options.leg))
    folder = make_folder()
    print(f"seed {options.seed}, in {folder}", flush=True)
    began = time.perf_counter()
    if options.scenario is not None:
        scenario = play(options.seed, options.scenario, folder / "scenario")
        print("\n".join(scenario.journal))
        return 0
    if options.sweep is not None:
        actions = options.sweep or ACTIONS
        result = share_out(partial(sweep, actions), options.jobs, folder)
    else:
        faults = -(-options.faults // options.jobs)
        result = share_out(partial(work_off, options.seed, faults), options.jobs, folder)
    for failure in result["failures"]:
        print(failure, end="\n\n")
    print(describe(options.seed, result, time.perf_counter() - began))
    if result["failures"]:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    gc.freeze()  # else each leg's first collection copies what it shares with this process
    sys.exit(command_line())
