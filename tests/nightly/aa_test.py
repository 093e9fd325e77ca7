"""How often does extras.versus call a useless edit helpful or harmful? It should be one in twenty.

    python tests/nightly/aa_test.py                      200 edits, an hour
    python tests/nightly/aa_test.py gate --edits 40      how many does --gate keep?
    python tests/nightly/aa_test.py rate --edits 40      an edit that only doubles the rate
    python tests/nightly/aa_test.py tuned --edits 40     the same, each side at its best rate

A useless edit shuffles the columns of one matrix of a model's first weights: these are independent
and identically distributed, so neither side is the better one. One that doubles the learning rate
inside is useless only where each side has its best one. Each has seeds of its own, fixed before.
Prints a line an edit, then the counts.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from edits import change, commit_program, versus  # first: it finds the others

import anchors
from extras.versus.verdict import SIGNIFICANT

MODEL = "--text text.txt --test_text test.txt --dim 16 --num_blocks 1 --num_heads 2 "
MODEL += "--context_size 16 --batch_size 8 --num_iters 150 --learning_rate 3e-2 --lr_warmup 5 "
MODEL += "--lr_schedule cosine --save_dir runs"
SHUFFLED = """
    drawn = [name for name, value in weights if value.ndim > 1 and value.any()]
    values = dict(weights)
    name = drawn[{place} % len(drawn)]
    columns = np.random.default_rng({place}).permutation(values[name].shape[1])
    values[name] = values[name][:, mx.array(columns)]
    model.load_weights([*values.items()])
"""
DOUBLED = anchors.RATE.replace("return", "return 2 *")

# {way: (what is edited, what takes its place, options of extras.versus, more flags of main.py)}
WAYS = {
    "race": (anchors.LAST_OF_INIT, SHUFFLED, "", ""),
    "gate": (anchors.LAST_OF_INIT, SHUFFLED, "--gate", ""),
    "rate": (anchors.RATE, DOUBLED, "", "--learning_rate 5e-3"),
    "tuned": (anchors.RATE, DOUBLED, "--tune learning_rate=1e-2,2e-2,4e-2", ""),
}


def compare(folder, way, place, first_seed):
    """The result of an edit; place: a number that says which weights it shuffles."""
    line, edit, options, flags = WAYS[way]
    change(folder, {"main.py": [(line, edit.format(place=place))]})
    words = f"HEAD {options} --json --seeds {first_seed} -- {MODEL} {flags}".split()
    done = versus(folder, words)
    assert done.returncode in (0, 1), done.stdout
    shutil.rmtree(folder / "runs")
    return json.loads(done.stdout.splitlines()[-1])


def count_verdicts(way, edits, seed):
    """Prints a line an edit, then how many were said to have helped or hurt, and were kept."""
    generator = np.random.default_rng(seed)
    seeds = 100 * generator.choice(10**6, edits, replace=False)
    places = generator.choice(10**6, edits, replace=False)
    num_called = num_kept = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commit_program(folder)
        lines = [f"{i} times {i % 7} is {i * (i % 7)}, more or less.\n" for i in range(900)]
        (folder / "text.txt").write_text("".join(lines))
        (folder / "test.txt").write_text("".join(reversed(lines)))
        for number, (place, first_seed) in enumerate(zip(places, seeds), 1):
            result = compare(folder, way, place, first_seed)
            num_called += result["outcome"] in SIGNIFICANT
            num_kept += result.get("kept", False)
            interval = ""
            if "difference" in result:
                interval = "{difference:+.4f}, {low:+.4f} to {high:+.4f}  ".format_map(result)
            pairs = len(result["seeds"])
            print(f"{number:>4}  {interval}{result['outcome']} after {pairs} pairs", flush=True)
    print(f"{way}: of {edits} edits, {num_called} were called helpful or harmful, {num_kept} kept")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("way", choices=WAYS, nargs="?", default="race")
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    count_verdicts(options.way, options.edits, options.seed)
