"""Says whether a change of form has changed a bit: runs the same commands in two checkouts.

    python tests/same.py OLD NEW                two folders that hold the program
    python tests/same.py OLD NEW --only lora    one case

A line a case: "same  NAME"; "OTHER NAME: " and the first difference, with the iteration that it is
at; or "FAILS NAME (OLD or NEW): " and the last line that the program has printed. The exit status
is 1 unless all are the same. It needs no network, and a minute of processor time.

Each training has to give the same log, samples and names of all checkpoints. That an interrupted
one ends as it would have is asked of each checkout by test_training.py and crash.py.
"""

import argparse
import csv
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Flags whose names have moved, {name in OLD: name in NEW}. The cases below have the old ones.
MOVED = {}
# Fields of the log that differ from run to run.
MEASURED = {"seconds", "ms_per_step", "tokens_per_second", "peak_mib"}

COMMON = (
    "--dim 64 --num_blocks 2 --num_heads 4 --context_size 32 --batch_size 8 "
    "--num_iters 30 --lr_warmup 5 --learning_rate 3e-3 "
    "--steps_per_report 3 --steps_per_eval 10 --eval_tokens 2000 --keep 9 "
    # Greedy: a change of how samples are drawn shows in the case "sampling" alone.
    "--max_tokens 5 --temperature 0"
)


class Training(NamedTuple):
    """A command that trains.

    flags: what it has besides COMMON; start: the training in whose folder it begins, as that ended;
    ranks: processes that share it.
    """

    flags: str
    start: str | None = None
    ranks: int = 1


TRAININGS = {
    "plain": Training("--dataset python --batch_size 4"),
    "streams": Training("--dataset python --batch_size 32 --dropout 0.1 --dropout_final 0.3"),
    "muon": Training(
        "--dataset python --batch_size 16 --optimizer muon --qk_norm --untie "
        "--lr_schedule linear --min_lr 0 --weight_decay 0.1"
    ),
    "swiglu": Training(
        "--dataset python --mlp swiglu --num_kv_heads 2 --lr_schedule cosine --grad_accumulation 3"
    ),
    "gelu": Training(
        "--dataset python --tokenizer char --mlp gelu --num_kv_heads 1 --grad_checkpoint "
        "--grad_clip 0"
    ),
    "words": Training(
        "--dataset python --tokenizer word --dim 16 --optimizer muon --train_tokens 100000 "
        "--eval_tokens 500"
    ),
    "own": Training("--text own.txt --test_text test.txt --tokenizer bpe --vocab_size 400"),
    "longer": Training("--dataset python --batch_size 4 --num_iters 60", start="plain"),
    "average": Training("--dataset python --average 0.5"),
    "bfloat16": Training("--dataset python --dtype bfloat16"),
    "cooldown": Training("--dataset python --lr_schedule linear --lr_cooldown 0.4"),
    "decay": Training("--dataset python --weight_decay 0.1 --embedding_decay 1"),
    "patience": Training(
        "--text own.txt --train_tokens 1000 --learning_rate 3e-2 --patience 2 --num_iters 200"
    ),
    "short": Training(  # An epoch is three steps of 24 rows; the last 21 rows are too few.
        "--text own.txt --test_text test.txt --train_tokens 3000 --grad_accumulation 3 "
        "--dropout 0.1 --eval_test"
    ),
    "betas": Training("--dataset python --beta1 0.8 --beta2 0.95 --seed 7"),
    "init": Training(  # The text has fewer rows than a batch.
        "--text own.txt --train_tokens 200 --init_from latest", start="plain"
    ),
    "lora": Training("--text own.txt --init_from latest --lora_rank 4", start="plain"),
    "student": Training("--dataset python --dim 32 --teacher latest", start="plain"),
    "ranks": Training("--dataset python --dropout 0.1 --average 0.5", ranks=2),
}


class Use(NamedTuple):
    """Commands that use a checkpoint of the training `start`; what they print is compared."""

    start: str
    commands: list


USES = {
    "evaluation": Use(
        "own",
        [
            "--evaluate valid --eval_stride 8",
            "--evaluate test",
            "--evaluate valid --quantize 4",
        ],
    ),
    "sampling": Use(
        "plain",
        [
            "--prompt import --max_tokens 40 --num_samples 3 --temperature 1 --top_k 0",
            "--prompt import --max_tokens 40 --seed 7 --temperature 0.8 --top_k 5",
            "--prompt class --max_tokens 40 --seed 8 --temperature 1.2 --top_k 0 --top_p 0.9",
            "--prompt class --max_tokens 40 --seed 9 --min_p 0.1 --repetition_penalty 1.3",
            "--prompt import --max_tokens 40 --seed 10 --temperature 1 --draft best",
            "-m extras.batch prompts.txt --max_tokens 40 --num_samples 2 --temperature 1",
        ],
    ),
}

SCORED = re.compile(r"(train|valid|test) [\d.]+ nats")
SPEED = re.compile(r", [\d,.]+ tokens/s.*")


class Failure(Exception):
    """A command has not ended as it should; the message is its last line."""


def write_texts(folder):
    """Writes the texts of the cases."""
    lines = [f"{i} times {i % 13} is {i * (i % 13)}, señor.\n" for i in range(2500)]
    (folder / "own.txt").write_text("".join(lines[:2000]), encoding="utf-8")
    (folder / "test.txt").write_text("".join(lines[2000:]), encoding="utf-8")
    (folder / "prompts.txt").write_text("import\ndef \nclass\n", encoding="utf-8")


def ring_of(size, path):
    """Names free ports for a ring of processes in a file; returns their environments."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    addresses = [["{}:{}".format(*each.getsockname())] for each in sockets]
    for each in sockets:
        each.close()
    path.write_text(json.dumps(addresses))
    return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(path)} for rank in range(size)]


class Side:
    """One of the checkouts, with a folder for its runs, its tokens and its caches."""

    def __init__(self, name, checkout, folder):
        self.name = name
        self.checkout = checkout
        self.folder = folder
        folder.mkdir()
        write_texts(folder)

    def run(self, flags, ranks=1):
        """What the program prints, run to its end. Raises Failure unless its exit status is 0."""
        command = self.spell(flags.split())
        environments = [{}]
        if ranks > 1:
            environments = ring_of(ranks, self.folder / "hosts.json")
        processes = []
        with open(self.folder / "stderr.txt", "w") as stderr:
            for environment in environments:
                process = subprocess.Popen(
                    [sys.executable, *command],
                    cwd=self.folder,
                    env=os.environ | self.environment() | environment,
                    stdin=subprocess.DEVNULL,
                    # The first rank alone prints.
                    stdout=subprocess.DEVNULL if processes else subprocess.PIPE,
                    stderr=stderr,
                    encoding="utf-8",
                )
                processes.append(process)
            output = processes[0].stdout.read()
            for process in processes:
                process.wait()
        status = processes[0].returncode
        if status != 0:
            said = (self.folder / "stderr.txt").read_text().splitlines() or output.splitlines()
            raise Failure(f"status {status}: {said[-1] if said else 'nothing printed'}")
        return output

    def spell(self, words):
        """What is typed behind `python` on this side."""
        if self.name == "NEW":
            words = [MOVED.get(word, word) for word in words]
        if words[0] == "-m":  # a program of its own
            return words
        return [str(self.checkout / "main.py"), *words, "--data_dir", "data"]

    def environment(self):
        return {"XDG_CACHE_HOME": str(self.folder), "PYTHONPATH": str(self.checkout)}

    @functools.cache
    def train(self, name):
        """What there is to compare of a training."""
        training = TRAININGS[name]
        flags = training.flags
        if training.start:
            self.train(training.start)
            shutil.copytree(self.folder / training.start, self.folder / name)
        output = self.run(f"{COMMON} --save_dir {name} {flags}", training.ranks)
        return facts_of(self.folder / name, output)

    def use(self, name):
        """What the commands of a Use print."""
        use = USES[name]
        self.train(use.start)
        facts = {}
        for command in use.commands:
            output = SPEED.sub("", self.run(f"{command} --save_dir {use.start}"))
            for number, line in enumerate(output.splitlines(), 1):
                facts[command, f"line {number}"] = line
        return facts


def facts_of(folder, output):
    """What there is to compare of a training, {(place, what): value}.

    Its log, its samples, and its checkpoints, whose names are the SHA1s of their weights.
    """
    facts = {}
    for number, path in enumerate(sorted(folder.glob("*/log.csv")), 1):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                place = f"run {number}, iteration {row['iteration']}"
                for field, value in row.items():
                    if field not in MEASURED:
                        facts[place, f"{row['split']} {field}"] = value
    for path in sorted(folder.glob("*/samples.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            facts["end", f"sample {number}"] = line
    for line in output.splitlines():
        if SCORED.match(line):
            split, _, score = line.partition(" ")
            facts["end", f"{split} score"] = SPEED.sub("", score)
    checkpoints = sorted(path.stem for path in folder.glob("*/*.safetensors"))
    if not checkpoints:
        raise Failure("no checkpoint was saved")
    return facts | {("end", f"checkpoint {name}"): "there" for name in checkpoints}


def first_difference(ours, theirs):
    """Where two collections of facts first differ, in words, or None."""
    for place, what in [*ours, *theirs]:
        our = str(ours.get((place, what), "nothing"))
        their = str(theirs.get((place, what), "nothing"))
        if our != their:
            start = max(0, len(os.path.commonprefix([our, their])) - 20)
            excerpts = [each[start : start + 60] for each in (our, their)]
            return f"{place}, {what}: {excerpts[0]!r} became {excerpts[1]!r}"
    return None


def attempt(side, name):
    """The results of a case, or the Failure to have any."""
    try:
        return side.use(name) if name in USES else side.train(name)
    except Failure as failure:
        return failure


def judge(name, sides, results):
    """Prints the line of a case; returns whether all is the same."""
    for side, result in zip(sides, results):
        if isinstance(result, Failure):
            print(f"FAILS {name} ({side.name}): {result}", flush=True)
            return False
    difference = first_difference(*results)
    if difference:
        print(f"OTHER {name}: {difference}", flush=True)
        return False
    print(f"same  {name}", flush=True)
    return True


def main():
    """Returns the exit status."""
    cases = [*TRAININGS, *USES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--only", choices=cases, metavar="NAME", help=", ".join(cases))
    options = parser.parse_args()
    checkouts = {"OLD": options.old.resolve(), "NEW": options.new.resolve()}
    for checkout in checkouts.values():
        if not (checkout / "main.py").is_file():
            parser.error(f"there is no main.py in {checkout}")
    if options.only:
        cases = [options.only]
    verdicts = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:
        sides = []
        for name, checkout in checkouts.items():
            sides.append(Side(name, checkout, Path(scratch, name)))
        for name in cases:
            results = list(pool.map(attempt, sides, [name] * 2))
            verdicts.append(judge(name, sides, results))
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
