"""What one step of a run did to its weights and to the losses of its batch.

    python -m extras.inspect_step RUN@340             the step to iteration 340
    python -m extras.inspect_step latest --rows 4     the newest one, with four texts of its batch

The step is computed again, exactly as it was in the run, see features/steps.py. Losses are without
dropout; gradients are those that the optimizer has got: averaged, and clipped.
"""

# First: it chooses the BLAS before MLX takes one.
from extras.common import flags_of_run, make_parser, read_flags, start

import copy
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from main import find_checkpoint, make_step, token_metrics, train_step
from support.cli import UsageError
from support.flags import COUNT, Flag
from extras.features.steps import rewind


def main(arguments):
    """Prints what happened in the step that the arguments name, between two checkpoints."""
    rows = Flag(1, COUNT, "texts to show, most changed first")
    parser = make_parser("inspect_step", __doc__, "gpu", "data_dir", "mirror", rows=rows)
    parser.add_argument("step", metavar="RUN@STEP", help="the step that ended in this checkpoint")
    flags = read_flags(parser, arguments)
    if flags.step.endswith("@0"):
        raise UsageError(f"{flags.step} is the state before the first step: name a later one")
    after = find_checkpoint(flags, flags.step)
    name, _, _ = after.folder.name.partition("@")
    before = find_checkpoint(flags, f"{name}@{after.iteration - 1}")
    what = f"{after.folder.name}, step {after.iteration:,},"
    run = rewind(what, flags_of_run(flags, before), before, after)
    inputs, targets = copy.copy(run.batches).next()
    losses_before = losses_of(run.model, inputs, targets, run.flags.batch_size)
    weights = dict(tree_flatten(run.model.trainable_parameters()))
    recorder, seen = recording(run.optimizer)
    metrics = train_step(run, make_step(run.model, recorder, run.flags, teacher=run.teacher))
    losses_after = losses_of(run.model, inputs, targets, run.flags.batch_size)
    texts = [f"{name} {value:.4g}" for name, value in metrics.items()]
    print(f"{before.folder.name} -> {after.folder.name}: {', '.join(texts)}")
    print(
        f"{losses_before.size} tokens of the batch: mean loss {losses_before.mean():.4f} before, "
        f"{losses_after.mean():.4f} after; {np.mean(losses_after < losses_before):.0%} fell"
    )
    print_norms(weights, seen["gradients"], run.model)
    changes = np.abs(losses_after - losses_before).mean(axis=1)
    for row in np.argsort(-changes)[: flags.rows].tolist():
        print_text(row, targets[row], losses_before[row], losses_after[row], run.dataset.tokenizer)


def recording(optimizer):
    """An optimizer for make_step, and the dict in which it keeps the `gradients` of an update."""
    seen = {}

    def update(model, gradients):
        seen["gradients"] = gradients
        optimizer.update(model, gradients)

    # mx.compile returns `seen` only if it is a part of the state.
    return SimpleNamespace(state=[optimizer.state, seen], update=update), seen


def losses_of(model, inputs, targets, batch_size):
    """The loss of each token of a batch in nats, a NumPy array [B, L]."""
    losses = []
    for begin in range(0, len(inputs), batch_size):
        rows = slice(begin, begin + batch_size)
        metrics = token_metrics(model, inputs[rows], targets[rows])
        losses.append(np.array(metrics["loss"]))
    return np.concatenate(losses)


def print_norms(weights, gradients, model):
    """Prints the norms of gradients and of what was added to the weights, block by block."""
    gradients = dict(tree_flatten(gradients))
    after = dict(tree_flatten(model.trainable_parameters()))
    parts = {}  # {part: sums of squares [3]: of weights, gradients and updates}
    for name, before in weights.items():
        arrays = [before, gradients[name], after[name] - before]
        squares = np.array([mx.square(array).sum().item() for array in arrays])
        part = part_of_model(name)
        parts[part] = parts.get(part, 0) + squares
    print(f"{'':<20}{'weights':>12}{'gradient':>12}{'update':>12}{'relative':>12}")
    for part, squares in parts.items():
        weight, gradient, update = np.sqrt(squares).tolist()
        relative = update / weight if weight else np.inf
        print(f"{part:<20}{weight:>12.4g}{gradient:>12.4g}{update:>12.4g}{relative:>12.2g}")


def part_of_model(name):
    """The part that a parameter belongs to: "block 0 attention", or its own name."""
    words = name.removeprefix("model.").split(".")
    if words[0] != "layers":
        return words[0]
    kind = {"self_attn": "attention", "mlp": "mlp"}.get(words[2], "norms")
    return f"block {words[1]} {kind}"


def print_text(row, targets, before, after, tokenizer):
    """Prints the tokens of a row that were predicted, with the loss of each before and after."""
    print(f"\nrow {row}: {before.mean():.4f} -> {after.mean():.4f}")
    for token, first, second in zip(targets.tolist(), before.tolist(), after.tolist()):
        piece = tokenizer.decode([token])
        print(f"{first:>9.4f}{second:>9.4f}{second - first:>+9.4f}  {piece!r}")


if __name__ == "__main__":
    start("inspect_step", main)
