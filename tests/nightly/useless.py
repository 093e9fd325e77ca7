"""How often does extras.versus call a useless edit helpful or harmful? It should be one in twenty.

    python tests/nightly/useless.py                  200 edits, an hour
    python tests/nightly/useless.py --edits 20 --seed 7

A useless edit shuffles the columns of one matrix of a model's first weights: these are independent
and identically distributed, so neither side is the better one. Each is compared, then tried with
--gate, on seeds of its own, fixed before. Prints a line an edit, then the counts.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
MODEL = "--text text.txt --test_text test.txt --dim 16 --num_blocks 1 --num_heads 2 "
MODEL += "--context_size 16 --batch_size 8 --num_iters 150 --learning_rate 3e-2 --lr_warmup 5 "
MODEL += "--lr_schedule cosine"
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
    (folder / "test.txt").write_text("".join(reversed(lines)))


def compare(folder, place, first_seed):
    """The results of an edit without and with --keep, and whether that keeps it.

    place: a number that says which weights it shuffles.
    """
    source = (ROOT / "main.py").read_text()
    assert source.count(LAST_LINE) == 1
    (folder / "main.py").write_text(source.replace(LAST_LINE, EDIT.format(place=place)))
    outcomes = []
    for options in ([], ["--gate"]):
        options = [*options, "--json", "--seeds", str(first_seed), "--", *MODEL.split()]
        options += ["--save_dir", f"runs{place}"]
        line = [sys.executable, "-m", "extras.versus", "HEAD", *options]
        done = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stdout)
        outcomes.append(json.loads(done.stdout.splitlines()[-1]))
    shutil.rmtree(folder / f"runs{place}")
    return *outcomes, done.returncode == 0


def count_verdicts(edits, seed):
    """Prints a line an edit; returns how many were said to have helped or hurt, and were kept."""
    generator = np.random.default_rng(seed)
    seeds = 100 * generator.choice(10**6, edits, replace=False)
    places = generator.choice(10**6, edits, replace=False)
    num_called = num_kept = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        for number, (place, first_seed) in enumerate(zip(places.tolist(), seeds.tolist()), 1):
            result, last, is_kept = compare(folder, place, first_seed)
            num_called += result["outcome"] in ("helped", "hurt", "valid only")
            num_kept += is_kept
            interval = f"{result['low']:+.4f} to {result['high']:+.4f}"
            outcome = f"{result['outcome']} after {len(result['seeds'])} pairs"
            outcomes = f"{outcome}; --gate: {last['outcome']}"
            print(f"{number:>4}  {result['difference']:+.4f}, {interval}  {outcomes}", flush=True)
    return num_called, num_kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    called, kept = count_verdicts(options.edits, options.seed)
    print(f"of {options.edits} useless edits, {called} were called helpful or harmful, {kept} kept")
