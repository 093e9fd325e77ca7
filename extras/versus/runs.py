"""The runs of a comparison: trains both sides with the same seeds, and has them judged."""

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np

from support.cli import RunError, UsageError, explain_errors
from support.files import hash_of_data, hash_of_file, lock_file, open_no_follow
from extras.features.hints import ALIASES
from support.machine import available_cores
from extras.versus import ledger
from extras.versus.judge import DIVERGED, Judge, read_texts
from extras.versus.sequential import RunScore
from extras.versus.sides import HERE, WORKER, SideError, git, identify, install, make_side
from extras.versus.sides import process_error, retry_once
from extras.versus.verdict import describe_best

OWN_TOKENS = 4096  # that a run itself scores at its end; the judge checks that loss
# Flags of runs: one checkpoint is kept, and nothing sampled.
RUN_FLAGS = ["--keep=1", f"--eval_tokens={OWN_TOKENS}", "--sample_tokens=0"]
NUM_TUNING_SEEDS = 2  # seeds by which --tune chooses
# A run is killed if it takes longer, by the clock, than MIN_TIMEOUT seconds plus TIMEOUT_FACTOR
# times the processor time of the longest run that has ended: machines may be busy.
TIMEOUT_FACTOR = 30
MIN_TIMEOUT = 600
BYTES_PER_PARAMETER = 12  # of a checkpoint: one float32, and two in the optimizer


class Comparison:
    """Two Sides and their runs; those of one side differ only in their seeds."""

    def __init__(self, options, common, copies, tuned=((), ())):
        """options, common: see read_arguments; copies: see copied_sides; tuned: flags by side."""
        self.options = options
        self.common = common
        self.tuning_note = None  # with --tune, the chosen values, as a condition of the verdict
        compared = ["diff", "--no-index", "--no-color", "--no-ext-diff", "0", "1"]
        self.patch = git("-C", copies[0].folder.parent, *compared).decode(errors="replace")
        sides = []
        for copy, last_flags in zip(copies, tuned):
            words = [*common, *copy.typed_flags, *last_flags]
            sides.append(retry_once(make_side, copy, words))
        before, after = sides
        texts = [read_texts(sides, split, options.tokens) for split in ("valid", "test")]
        self.first_seed = before.flags["seed"] if options.seeds is None else options.seeds
        self.on_gpu = before.flags["gpu"] or after.flags["gpu"]
        is_alone = self.on_gpu or sys.platform == "darwin"
        self.core_shares = share_cores(options.jobs or (1 if is_alone else 4))
        # A function that either side has edited runs without its fast version on both: else they
        # would differ in rounding, too.
        plain = {*before.edited_functions, *after.edited_functions}
        self.plain_functions = ",".join(sorted(plain))
        self.environment = os.environ | {"PLAIN_FUNCTIONS": self.plain_functions}
        folder = Path(os.path.abspath(before.flags["save_dir"]), "versus")
        check_ignored(folder)
        self.ledger = folder / ledger.NAME
        self.sides = []
        for side, valid, test in zip(sides, *texts):
            side_id = identify(side, side.versions, self.plain_functions)
            # The number of cores decides how sums are rounded.
            path = folder / f"{side_id}.{len(self.core_shares[0])}"
            install(side, path)
            self.sides.append(replace(side, folder=path, valid=valid, test=test))
        self.run_seconds = []  # of finished runs

    def train_pairs(self, seeds):
        """Yields each seed with the RunScores of both sides.

        Each share of the cores trains a run at a time. Closing the generator stops the runs that
        still train.
        """
        shares = [*self.core_shares]

        def take_share():  # of a thread, for the processes that it starts
            share = shares.pop()
            if share:
                os.sched_setaffinity(0, share)

        self.is_stopped = False
        pool = ThreadPoolExecutor(len(shares), initializer=take_share)
        try:
            pairs = [
                [pool.submit(self.run_locked, side, seed) for side in self.sides] for seed in seeds
            ]
            for seed, (before, after) in zip(seeds, pairs):
                yield seed, before.result(), after.result()
        finally:
            self.is_stopped = True
            pool.shutdown(cancel_futures=True)

    def run_locked(self, side, seed):
        """Trains a run to its end and has it judged; returns the RunScore."""
        # Another comparison may train the same run. The run inherits this lock, and keeps it if
        # only this program is killed.
        path = side.folder / f"output-{seed}.txt"
        with open(path, "a+", errors="replace", opener=open_no_follow) as output:
            while not self.is_stopped:
                with contextlib.suppress(BlockingIOError):
                    lock_file(output, wait=False)
                    break
                time.sleep(0.2)
            return retry_once(self.train_and_judge, side, seed, output)

    def train_and_judge(self, side, seed, output):
        """Trains a run, unless it has ended, and judges it; output: the file for what it prints."""
        if self.is_stopped:
            raise RunError("stopped")
        num_iters = side.flags["num_iters"]
        path = side.folder / f"seconds-{seed}.json"
        record = newest_record(side.folder, seed)
        is_new = not record
        if is_new or record["iteration"] < num_iters:
            output.truncate(0)
            status, seconds = self.train(side, seed, output)
            record = newest_record(side.folder, seed)
            if status or not record:
                output.seek(0)
                error = process_error(side.name, status, output.read())
                if "is not finite" in str(error) and not self.options.same:
                    return RunScore(fault=DIVERGED)
                raise error
            if is_new:  # all of the run was measured
                path.write_text(str(seconds))
        if record["tokens_sha256"] != side.tokens_sha256:
            fault = "has changed meanwhile: repeat, or name a --test_text that is no part of it"
            raise UsageError(f"the text of {side.name} {fault}")
        if self.options.same:  # only the weights count
            return RunScore(record["id"])
        *scores, fault = self.judge(side, record)
        if record["iteration"] != num_iters:
            fault = f"it has taken {record['iteration']:,} steps, not {num_iters:,}"
        seconds = math.nan
        with contextlib.suppress(OSError, ValueError):  # it was resumed, or the disk was full
            seconds = float(path.read_text())
            self.run_seconds.append(seconds)
        return RunScore(record["id"], *scores, fault, record["tokens_seen"], seconds)

    def train(self, side, seed, output):
        """Starts or resumes a run and waits for it; returns its exit status and time in seconds.

        The time is the processor's, which other programs do not prolong; on a GPU, the clock's.
        Raises SideError if it takes far longer than those that have ended, RunError if the disk is
        full, OSError if the folder was deleted.
        """
        words = [*side.words, f"--steps_per_eval={side.flags['num_iters']}", *RUN_FLAGS]
        words += [f"--seed={seed}", f"--save_dir={side.folder}"]
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, side.folder / "main.py", *words],
            env=self.environment,
            cwd=side.folder,  # with the files that its code reads
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        pid = 0
        try:
            while not pid:
                if self.is_stopped:
                    raise RunError("stopped")
                elapsed = time.monotonic() - began
                if elapsed > MIN_TIMEOUT + TIMEOUT_FACTOR * max(self.run_seconds, default=math.inf):
                    raise SideError(f"{side.name} cannot run: it does not end")
                free = shutil.disk_usage(side.folder).free
                if free < BYTES_PER_PARAMETER * side.num_parameters:
                    raise RunError(f"no space is left for {side.folder}: make some, and repeat")
                time.sleep(0.05)
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        finally:  # does nothing to a process that has ended
            process.kill()
            process.wait()
        seconds = usage.ru_utime + usage.ru_stime
        if self.on_gpu:
            seconds = time.monotonic() - began
        return os.waitstatus_to_exitcode(status), seconds

    def judge(self, side, record):
        """The scores of a checkpoint on both texts, and what is wrong with them, see RunScore.

        Keeps them in a file in the side's folder.
        """
        asked = []
        for text in filter(None, (side.valid, side.test)):
            asked.append([hashlib.sha256(text.tokens).hexdigest(), text.spans, text.scale])
        code = [hash_of_file(WORKER.with_name(name)) for name in ("judge.py", "worker.py")]
        digest = hash_of_data([record["id"], asked, code])
        path = side.folder / f"judged-{digest}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):
            valid, test, fault = json.loads(path.read_text("utf-8"))
            return valid, test, fault
        with Judge(side, record["path"], self.environment) as judge:
            judged = judge.examine_run(side.valid, side.test, record["evaluations"][-1:])
        path.write_text(json.dumps(judged), "utf-8")
        return judged

    def describe(self):
        """What was compared, {name: value}, for a result in the ledger."""
        before, after = self.sides
        options = self.options
        asked = {name: getattr(options, name) for name in ("pairs", "tokens", "margin", "gate")}
        # Whatever the number of steps, the baseline is the same.
        identity = before.identity | {"num_iters": None}
        is_same = before.tokenizer == after.tokenizer
        return {
            # Without the number of cores: with others, it is the same comparison.
            "comparison": f"{before.folder.stem} {after.folder.stem}",
            "baseline": identify(replace(before, identity=identity)),
            "asked": asked | {"seed": self.first_seed},
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "before": before.name,
            "after": after.name,
            "commits": [before.commit, after.commit],
            "flags": shlex.join(self.common),
            "unit": "nats/token" if is_same else "bits per byte",
            "steps": [side.flags["num_iters"] for side in self.sides],
            "versions": [before.versions, after.versions],
            "patch": self.patch,
            "tuned": self.tuning_note,
        }


def tune(options, common, copies):
    """The Comparison of both sides, each with its best value of --tune.

    The first seeds choose the values; the Comparison begins after them.
    """
    flag, _, listed = options.tune.partition("=")
    flag = flag.replace("-", "_")
    for name, aliases in ALIASES.items():
        if flag in aliases.split():
            flag = name
    with explain_errors(f"--tune {options.tune}: the values are no numbers"):
        values = sorted(listed.split(","), key=float)
    means = []  # [2] for each value
    for value in values:
        comparison = Comparison(options, common, copies, [[f"--{flag}={value}"]] * 2)
        if flag not in comparison.sides[0].identity:
            raise UsageError(f"--tune {flag}: this flag does not decide how a run ends")
        end = comparison.first_seed + NUM_TUNING_SEEDS
        losses = []
        for _, *pair in comparison.train_pairs(range(comparison.first_seed, end)):
            losses.append([math.inf if run.fault else run.score for run in pair])
        before, after = np.mean(losses, axis=0)
        means.append([before, after])
        print(f"--{flag} {value}: before {before:.4f}, after {after:.4f}", flush=True)
    options.seeds = end
    chosen = [values[i] for i in np.argmin(means, axis=0)]
    comparison = Comparison(options, common, copies, [[f"--{flag}={value}"] for value in chosen])
    comparison.tuning_note = describe_best(flag, chosen, [values] * 2)
    return comparison


def check_ignored(folder):
    """Raises UsageError if the runs in a folder would be files of the next comparison's sides."""
    is_inside = folder.is_relative_to(HERE) and git("rev-parse", "--git-dir")
    if is_inside and not git("check-ignore", folder):
        raise UsageError(f"--save_dir {folder.parent} would count as code: add it to .gitignore")


def share_cores(jobs):
    """The cores of each of `jobs` runs, or of fewer runs if there are fewer cores.

    Each has the same number of cores, as that decides how sums are rounded.
    """
    if not hasattr(os, "sched_getaffinity"):  # on macOS: each run has all cores
        return [set()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    jobs = min(jobs, available_cores())
    size = len(cores) // jobs
    return [{*cores[i * size : (i + 1) * size]} for i in range(jobs)]


def read_record(path):
    """The record of a checkpoint, from its .metadata. Raises OSError."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    record = json.loads(header["__metadata__"]["record"])
    return record | record["counters"]


def newest_record(folder, seed):
    """The record, and its `path`, of the newest checkpoint of a seed; None if there is none."""
    records = []
    for path in folder.glob("*-*/[!.]*.metadata"):  # not in init_from and teacher
        # Meanwhile, runs of other seeds delete older checkpoints.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # or damaged
            record = read_record(path)
            if record["flags"]["seed"] == seed and path.with_suffix(".safetensors").exists():
                records.append(record | {"path": path})
    return max(records, key=itemgetter("iteration"), default=None)
