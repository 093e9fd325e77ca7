"""Types random pairs of commands: does the second resume the first in one of two checkouts alone?

    python tests/pairs.py OLD NEW                    two folders that hold main.py
    python tests/pairs.py OLD NEW --pairs 200 --seed 1

Each pair is typed with a new --save_dir. What the second command does: it resumes the first one's
run, begins a branch of it or a run, or ends with a status. A pair of which that differs is shown,
and the exit status is 1, unless the difference is a decision: see EXPECTED.
"""

import argparse
import random
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from conftest import ForkServer, environment

SMALL = (
    "--dim 16 --num_heads 2 --num_blocks 1 --context_size 8 --batch_size 4 --num_iters 1 "
    "--sample_tokens 0 --data_dir data"
)
# What a command may have besides SMALL; the first of each list stands for its default.
SHAPING = [
    ["", "--seed 7", "--seed 42"],
    ["", "--learning_rate 1e-3", "--learning_rate 3e-4"],
    ["", "--dropout 0.1", "--dropout 0"],
    ["", "--mlp gelu", "--mlp relu2", "--mlp_dim 64", "--mlp_dim 32"],
    ["", "--num_kv_heads 1", "--num_kv_heads 2"],
    ["", "--batch_size 2", "--batch_size 4"],
    ["", "--optimizer muon", "--optimizer adamw"],
    ["", "--average 0.5"],
    ["", "--tokenizer char", "--tokenizer byte"],
    ["", "--train_tokens 500"],
    ["", "--lr_schedule cosine", "--lr_schedule cosine --min_lr 1e-5"],
    ["", "--init_from hf", "--init_from hf --dim 16", "--init_from hf --lora_rank 2"],
    ["", "--teacher hf"],
]
OTHERS = [
    ["", "--keep 1"],
    ["", "--steps_per_report 1"],
    ["", "--patience 3"],
    ["", "--grad_checkpoint"],
    ["", "--num_iters 2", "--num_iters 3"],
]
TEXTS = ["one.txt", "two.txt", "./one.txt", "copy.txt"]  # the last two are the first
WHICH = ["", "", "", "--new_model", "--identifier latest", "--identifier RUN"]
BEGUN = re.compile(r"^run +(\S+), from iteration (\d+)", re.M)

# What NEW does on purpose: what OLD and NEW do, what the second command has then, and why.
EXPECTED = [
    ("resumes", "branch", "--identifier", "other flags than the run's begin a branch"),
    ("begins", "resumes", "copy.txt", "a text is known by its content, whatever it is called"),
]


def draw_pair(chance):
    """Two commands, of which the second often is the first with one thing changed."""
    options = [chance.choice(each) if chance.random() < 0.15 else "" for each in SHAPING]
    text = chance.choice(TEXTS[:2])
    first = ["--text", text, *SMALL.split(), *" ".join(options).split()]
    which = chance.choice(WHICH)
    others = [chance.choice(each) if chance.random() < 0.3 else "" for each in OTHERS]
    if chance.random() < 0.1:  # bare
        return first, f"{which} --data_dir data --num_iters 2 {' '.join(others)}".split()
    if chance.random() < 0.6:
        place = chance.randrange(len(options))
        options[place] = chance.choice(SHAPING[place])
    if chance.random() < 0.3:
        text = chance.choice(TEXTS)
    second = ["--text", text, *SMALL.split(), *" ".join([*options, which, *others]).split()]
    return first, second


def write_texts(folder):
    line = "the quick brown fox jumps over the lazy dog {}\n"
    for name, word in (("one", "one"), ("two", "2"), ("copy", "one")):
        text = "".join(line.format(word) for _ in range(60))
        (folder / f"{name}.txt").write_text(text)


class Side:
    """A checkout, and the folder in which its commands are typed."""

    def __init__(self, checkout, folder):
        self.folder = folder
        self.server = ForkServer(str(Path(checkout, "main.py")), environment({}))
        folder.mkdir()
        write_texts(folder)
        line = ["--text", "one.txt", *SMALL.split(), "--mlp", "swiglu", "--save_dir", "base"]
        self.server.run(line, None, folder)
        self.server.run(["--export", "hf", "--save_dir", "base"], None, folder)

    def type(self, line):
        """Types a command: the run that it trains and where it begins, or its exit status."""
        status, out, _ = self.server.run(line, None, self.folder)
        begun = BEGUN.search(out)
        return begun.groups() if begun else (f"status {status}", None)

    def outcome(self, first, second, save_dir):
        """What the second command does after the first one."""
        name, _ = self.type([*first, "--save_dir", save_dir])
        line = [name if word == "RUN" else word for word in second]
        other, iteration = self.type([*line, "--save_dir", save_dir])
        if iteration is None:
            return other
        if other == name:
            return "resumes"
        return "begins" if iteration == "0" else "branch"


def reason_for(old, new, second):
    """Why NEW may do something else, or None."""
    for *outcome, word, reason in EXPECTED:
        if outcome == [old, new] and word in second:
            return reason
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="a folder that holds main.py")
    parser.add_argument("new", help="another")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="show what was expected, too")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    pairs = [draw_pair(chance) for _ in range(given.pairs)]
    count = Counter()
    with tempfile.TemporaryDirectory() as folder:
        old = Side(given.old, Path(folder, "old"))
        new = Side(given.new, Path(folder, "new"))
        for number, pair in enumerate(pairs):
            outcomes = [side.outcome(*pair, f"lm{number}") for side in (old, new)]
            reason = outcomes[0]
            if outcomes[0] != outcomes[1]:
                reason = reason_for(*outcomes, pair[1]) or "NOT EXPECTED"
                if reason == "NOT EXPECTED" or given.verbose:
                    print(" -> ".join(outcomes), *map(" ".join, pair), sep="\n    ", flush=True)
            count[" -> ".join(dict.fromkeys(outcomes)), reason] += 1
    for (outcome, reason), times in count.most_common():
        print(f"{times:5} {outcome}: {reason}")
    return int(any(reason == "NOT EXPECTED" for _, reason in count))


if __name__ == "__main__":
    sys.exit(main())
