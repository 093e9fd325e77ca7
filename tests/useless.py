"""How often does extras.versus call a useless edit helpful or harmful? It should be one in twenty.

    python tests/useless.py                  200 edits, half an hour on one core
    python tests/useless.py --edits 20 --seed 7

A useless edit shuffles the columns of one matrix of a model's first weights: these are independent
and identically distributed, so neither side is the better one. Each is tried on six pairs of seeds
of its own, fixed before. Prints a line an edit, then the count.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main  # noqa: E402  (before NumPy's products: it chooses the BLAS)
import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from extras.versus import Outcome, describe_verdict, measure  # noqa: E402

MODEL = "--dim 16 --num_blocks 1 --num_heads 2 --context_size 16 --batch_size 8 --num_iters 150 "
MODEL += "--learning_rate 3e-2 --lr_warmup 5 --lr_schedule cosine"
PAIRS = 6


def outcome(dataset, seed, place=None):
    """The Outcome of a training; place: a number that says which weights are shuffled, and how."""
    flags = main.settle(main.read_command_line([*MODEL.split(), "--seed", str(seed)]))
    run = main.make_run(None, flags, None, {}, dataset, main.SingleProcess())
    if place is not None:
        weights = dict(tree_flatten(run.model.trainable_parameters()))
        drawn = sorted(name for name in weights if np.array(weights[name]).std() > 0)
        name = drawn[place % len(drawn)]
        columns = np.random.default_rng(place).permutation(weights[name].shape[1])
        shuffled = np.array(weights[name])[:, columns]
        run.model.load_weights([(name, mx.array(shuffled))], strict=False)
    step = main.make_step(run.model, run.optimizer, flags)
    while run.iteration < flags.num_iters:
        main.train_step(run, step)
    score = main.evaluate(run.model, dataset.valid.tokens, 64)
    return Outcome(str(score), score, {}, 1.0, None)


def count_verdicts(edits, seed):
    """Prints a line an edit; returns how many were said to have helped or hurt."""
    main.use_device(gpu=False)
    generator = np.random.default_rng(seed)
    called = 0
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"{i} times {i % 7} is {i * (i % 7)}, more or less.\n" for i in range(900)]
        text = Path(folder, "text.txt")
        text.write_text("".join(lines))
        flags = main.settle(main.read_command_line(["--text", str(text), "--data_dir", folder]))
        dataset = main.load_data(flags)
        seeds = generator.choice(10**6, (edits, PAIRS), replace=False)
        places = generator.integers(10**6, size=edits)
        for number, (own, place) in enumerate(zip(seeds.tolist(), places.tolist())):
            pairs = [(outcome(dataset, each), outcome(dataset, each, place)) for each in own]
            result = {"steps": 150, "seeds": own} | measure(pairs)
            verdict = describe_verdict(result, tries=1)
            called += verdict in ("Helped.", "Hurt.")
            ratio = result["spread"] / np.std([before.score for before, _ in pairs], ddof=1)
            print(
                f"{number + 1:>4}  {result['difference']:+.4f}, {result['low']:+.4f} to "
                f"{result['high']:+.4f}; spread {ratio:.2f} of that of a side  "
                f"{verdict.split('.')[0]}",
                flush=True,
            )
    return called


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = count_verdicts(options.edits, options.seed)
    print(f"{found} of {options.edits} useless edits were said to have helped or hurt")
