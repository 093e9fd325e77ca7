"""How much memory a step of training takes, before anything is computed."""

import math

import mlx.core as mx

from main import fast
from support.cli import UsageError, say
from support.device import on_gpu
from support.machine import limit_of_memory
from support.reports import count_parameters


def memory_of_step(run, num_ranks=1):
    """Estimates training's peak memory, {part: bytes}; it was measured within a factor of 1.5.

    It is that of a block's backward pass or of the update, which needs everything twice. MLX is
    lazy: nothing of this needs to exist yet.
    """
    flags = run.flags
    config = run.model.config
    rows = flags.batch_size // num_ranks
    positions = rows * config.context_size
    weights = count_parameters([model.parameters() for model in (run.model, run.teacher) if model])
    trained = count_parameters(run.model.trainable_parameters())
    moments = count_parameters(run.optimizer.state)
    # Numbers that a block keeps for each position: states [D], and of its MLP the input and the
    # output of relu2, or all steps of another activation.
    block = 10 * config.dim + (2 if config.mlp == "relu2" else 5) * config.mlp_dim
    # The gradients of a block take as much again. One that is computed again is there twice, too.
    blocks = 3 if flags.grad_checkpoint else config.num_blocks + 1
    activations = positions * (blocks * block + config.num_blocks * config.dim)
    if not on_gpu():  # where the weights of attention are computed again
        # As measured, some of them and their gradients are there at once.
        copies = 6 if flags.grad_checkpoint else config.num_blocks + 2
        activations += copies * positions * config.num_heads * config.context_size
    # Rows of logits, of their exps and gradients, and of gradients of the output layer.
    logits = 4 * positions + config.dim
    if fast:
        streams = fast.count_streams(rows, config.context_size)
        chunk = fast.chunks(math.ceil(positions / streams), config.vocab_size)[0].stop
        logits = streams * (2 * chunk + config.dim)
    activations += logits * config.vocab_size
    activations += 2 * positions * flags.grad_accumulation  # tokens
    return {
        "weights": 4 * weights,
        "gradients": 4 * trained,
        "optimizer": 4 * moments,
        "activations": 4 * max(activations, trained + moments),
    }


def check_memory(run, ranks):
    """Says that training may exceed the memory, and what needs less.

    Raises UsageError beyond 1.5 times the memory, as far as the estimate may be off.
    """
    needed = sum(memory_of_step(run, ranks.size).values())
    shortage = describe_shortage(needed)
    if not shortage:
        return
    line = (
        f"{shortage}: give --grad_checkpoint, a smaller --batch_size with more "
        "--grad_accumulation, or a smaller model or context"
    )
    if needed > 1.5 * memory_size():
        raise UsageError(line)
    say(f"Perhaps too much: {line}.")


def describe_shortage(needed):
    """A message if `needed` bytes are more than this machine can spare, else an empty string."""
    memory = memory_size()
    if needed <= 0.9 * memory:  # the rest is the system's and other programs'
        return ""
    device = "this GPU" if on_gpu() else "this machine"
    needed, memory = needed / 2**30, memory / 2**30
    return f"this needs about {needed:,.1f} GiB of memory; {device} has {memory:,.1f}"


def memory_size():
    """The memory of the device in use, or the limit of a container or a job, in bytes."""
    if on_gpu():
        info = mx.device_info()
        size = info.get("max_recommended_working_set_size")  # Metal's: beyond it, macOS swaps
        return size or info.get("total_memory") or math.inf
    return limit_of_memory()
