"""A model's size, cost and speed on this machine, measured in real training steps.

    python -m extras.benchmark --config first --dim 512    the model that main.py would train
    python -m extras.benchmark --identifier latest         a checkpoint, as it would be trained on

It takes main.py's flags. Prints a line for each number and, as its last line, the same numbers as
JSON: parameters, floating-point operations (FLOPs) per token, memory in bytes (its parts are
estimates, its peak is measured), speed in tokens and in FLOPs per second, and milliseconds for the
first token of a continuation and for each later one. It saves nothing.
"""

# First: it chooses the BLAS before MLX takes one.
from extras.common import start

import json
import re
import timeit

import mlx.core as mx
from mlx.utils import tree_flatten

from main import Decoder, fast, load_inputs, make_run, make_step, open_checkpoint
from main import read_command_line, resolve_flags, train_step, use_device
from support.cli import UsageError, format_interval
from support.flags import FLAGS, ineffective_flag_notices
from support.reports import count_parameters
from extras.features.memory import memory_of_step
from extras.features.steps import rebuild_run

# The parts of a model, and a pattern in the names of their parameters.
PARTS = {
    "embeddings": "embed",
    "attention": r"attn\.\w_proj",
    "mlp": "mlp",
    "norms": "norm",
    "output": "lm_head",
}
REPETITIONS = 5  # the fastest counts, because other programs can only slow one down
DECODED_TOKENS = 32


def main(arguments):
    """Measures the model that main.py would train with these arguments, or a checkpoint."""
    flags = resolve_flags(read_command_line(arguments))
    for name in FLAGS["mode"]:
        if name in flags.explicit and name != "new_model":
            raise UsageError(f"--{name} trains nothing: give the flags of a training")
    use_device(flags.gpu)
    if flags.identifier:
        checkpoint = open_checkpoint(flags).checkpoint
        flags = resolve_flags(flags.explicit, checkpoint.flags)
        run = rebuild_run(flags, checkpoint, checkpoint)
    else:
        run = make_run(flags.save_dir, load_inputs(flags))
    for line in ineffective_flag_notices(run.flags):
        print(line)
    parameters = count_by_part(run.model)
    flops = count_flops(run.model, parameters)
    result = {"parameters": parameters, "flops_per_token": flops}
    result["memory"] = memory_of_step(run)
    result |= measure_training(run)
    result["flops_per_second"] = sum(flops.values()) * result["tokens_per_second"]
    result |= measure_decoding(run)
    seconds = run.flags.num_iters * run.batches.rows_per_step * run.flags.context_size
    seconds /= result["tokens_per_second"]
    print_result(result)
    print(f"{'all steps':<18}{format_interval(seconds)}")
    print(json.dumps(result))


def print_result(result):
    """Prints each number with its name, those of parts on one line."""
    for name, value in result.items():
        parts = value if isinstance(value, dict) else {"": value}
        texts = [f"{round(number, 1):,} {part}" for part, number in parts.items()]
        print(f"{name:<18}{', '.join(texts)}".rstrip())


# ---- Counts -------------------------------------------------------------------------------------
def count_by_part(model):
    """The number of weights in each of PARTS."""
    counts = {}
    for part, pattern in PARTS.items():
        counts[part] = 0
        for name, weight in tree_flatten(model.parameters()):
            if re.search(pattern, name):
                counts[part] += weight.size
    return counts


def count_flops(model, parameters):
    """Floating-point operations per token of the forward and the backward pass.

    parameters: see count_by_part. The forward pass takes a multiplication and an addition per
    weight of a matrix. Attention takes them twice per element of a query and position of the
    window: for the scores and for the weighted sum of values. The backward pass takes twice as
    many: for the gradients with respect to the inputs and for those with respect to the weights,
    which LoRA needs for its adapters alone (extras/features/fast.py computes those of the output
    layer nevertheless).
    """
    config = model.config
    # The output layer multiplies by a matrix, either the embeddings or its own.
    output = config.vocab_size * config.dim
    matrices = parameters["attention"] + parameters["mlp"] + output
    queries = config.num_blocks * config.num_heads * config.head_dim  # elements
    forward = 2 * matrices + 4 * queries * config.context_size
    num_frozen = max(0, matrices - count_parameters(model.trainable_parameters()))
    backward = 2 * forward - 2 * num_frozen
    return {"forward": forward, "backward": backward}


# ---- Measurements -------------------------------------------------------------------------------
def measure_training(run):
    """Tokens per second of training steps, and the peak of MLX's memory in bytes."""
    step = make_step(run.model, run.optimizer, run.flags, teacher=run.teacher)
    # The first step compiles, so neither its time nor its memory counts.
    train_step(run, step)
    mx.reset_peak_memory()
    seconds = min(timeit.repeat(lambda: train_step(run, step), number=1, repeat=REPETITIONS))
    tokens = run.batches.rows_per_step * run.flags.context_size
    return {"tokens_per_second": tokens / seconds, "peak_memory": mx.get_peak_memory()}


def measure_decoding(run):
    """Time to first token and decoding speed for one text, after a prompt of half a context."""
    if fast is not None:
        fast.use_streams(1, 1)  # a single row is not split: its products use all cores
    model = run.model
    flags = run.flags
    length = max(1, model.config.context_size // 2)
    prompt = run.dataset.train.tokens[:length].tolist()

    def generate():
        return Decoder(model, list(prompt)).generate(DECODED_TOKENS + 1, flags, flags.seed)

    list(generate())  # compiles
    tokens = generate()
    first_token = timeit.timeit(lambda: next(tokens), number=1)
    seconds = timeit.timeit(lambda: list(tokens), number=1)
    return {
        "first_token_ms": 1000 * first_token,
        "token_ms": 1000 * seconds / DECODED_TOKENS,
    }


if __name__ == "__main__":
    start("benchmark", main)
