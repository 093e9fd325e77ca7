"""How often does extras.versus call a useless edit helpful or harmful? It should be one in twenty.

    python tests/useless.py                  200 edits, 40 minutes
    python tests/useless.py --edits 20 --seed 7

A useless edit shuffles the columns of one matrix of a model's first weights: these are independent
and identically distributed, so neither side is the better one. Each is tried on six pairs of seeds
of its own, fixed before. Prints a line an edit, then the count.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODEL = "--text text.txt --dim 16 --num_blocks 1 --num_heads 2 --context_size 16 --batch_size 8 "
MODEL += "--num_iters 150 --learning_rate 3e-2 --lr_warmup 5 --lr_schedule cosine"
LAST_LINE = "    model.load_weights(weights)\n"  # of init_weights
EDIT = """
    drawn = [name for name, value in weights if value.ndim > 1 and value.any()]
    values = dict(weights)
    name = drawn[{place} % len(drawn)]
    columns = np.random.default_rng({place}).permutation(values[name].shape[1])
    values[name] = values[name][:, mx.array(columns)]
    model.load_weights([*values.items()])
"""


def copy_project(folder):
    """Copies the program and a text into a folder, and commits the former."""
    shutil.copytree(ROOT / "extras", folder / "extras")
    for name in ("main.py", "datasets.py"):
        shutil.copy(ROOT / name, folder)
    author = ["-c", "user.name=useless", "-c", "user.email=useless@localhost"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "before"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    lines = [f"{i} times {i % 7} is {i * (i % 7)}, more or less.\n" for i in range(900)]
    (folder / "text.txt").write_text("".join(lines))


def compare(folder, place, first_seed):
    """What extras.versus says of an edit; place: a number that says which weights it shuffles."""
    source = (ROOT / "main.py").read_text()
    assert source.count(LAST_LINE) == 1
    (folder / "main.py").write_text(source.replace(LAST_LINE, EDIT.format(place=place)))
    options = ["--json", "--seeds", str(first_seed), "--", *MODEL.split()]
    line = [sys.executable, "-m", "extras.versus", "HEAD", *options, "--save_dir", f"runs{place}"]
    done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def count_verdicts(edits, seed):
    """Prints a line an edit; returns how many were said to have helped or hurt."""
    generator = np.random.default_rng(seed)
    seeds = 100 * generator.choice(10**6, edits, replace=False)
    places = generator.choice(10**6, edits, replace=False)
    called = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        for number, (place, first_seed) in enumerate(zip(places.tolist(), seeds.tolist()), 1):
            result = compare(folder, place, first_seed)
            called += result["verdict"] in ("Helped.", "Hurt.")
            interval = f"{result['low']:+.4f} to {result['high']:+.4f}"
            verdict = result["verdict"].split(".")[0]
            print(f"{number:>4}  {result['difference']:+.4f}, {interval}  {verdict}", flush=True)
    return called


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = count_verdicts(options.edits, options.seed)
    print(f"{found} of {options.edits} useless edits were said to have helped or hurt")
