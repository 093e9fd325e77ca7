"""A model's size, cost and speed on this machine, measured in real training steps.

    python -m extras.benchmark --config first --dim 512    the model that main.py would train

It takes main.py's flags. Prints what it found in words and, as its last line, the same numbers as
JSON: parameters, floating-point operations (FLOPs) per token, memory in bytes, speed in tokens per
second, and milliseconds for the first token of a continuation and for each later one. It saves
nothing.
"""

# First: main.py chooses the BLAS before NumPy and MLX take one.
from extras.program import start

import json
import re
import textwrap
import timeit

import mlx.core as mx
from mlx.utils import tree_flatten

from datasets import UsageError
from main import Decoder, SingleProcess, average_weights, bfloat16_products, draw_dropout, fast
from main import begin, make_run, make_step, over_streams, read_command_line, settle
from main import use_device

# The parts of a model, and a pattern in the names of their parameters.
PARTS = {
    "embeddings": "embed",
    "attention": r"attn\.\w_proj",
    "mlp": "mlp",
    "norms": "norm",
    "output": "lm_head",
}
# Repetitions; the fastest counts, because other programs can only slow one down.
TRAINING_STEPS = 5
MATRIX_PRODUCTS = 6
MATRIX_SIZE = 2048  # rows and columns of the matrices whose product is timed
DECODED_TOKENS = 32


# Flags of main.py by which it trains nothing.
USES = ["inference", "prompt", "evaluate", "list", "identifier"]


def main(arguments):
    """Measures the model that main.py would train with these arguments.

    Raises UsageError, RunError.
    """
    flags = settle(read_command_line(arguments))
    for name in USES:
        if name in flags.given:
            raise UsageError(f"--{name} trains nothing: give the flags of a training")
    use_device(flags.gpu)
    models, flags, dataset = begin(flags)
    run_benchmark(make_run(flags.save_dir, flags, None, models, dataset, SingleProcess()))


def run_benchmark(run):
    """Measures a training step of a run and decoding with its model, and prints the result."""
    model, flags = run.model, run.flags
    parameters = count_parameters(model)
    flops = count_flops(model.config, parameters, flags.lora_rank)
    training_speed, peak_memory = measure_training(run)
    matrix_speed = measure_matrix_speed(flags.dtype)
    result = {
        "parameters": parameters,
        "flops_per_token": flops,
        "memory": measure_memory(run),
        "peak_memory": peak_memory,
        "tokens_per_second": training_speed,
        "matrix_flops": matrix_speed,
        "share_of_matrix_speed": sum(flops.values()) * training_speed / matrix_speed,
    }
    result |= measure_decoding(run)
    print_result(result, run.batches.batch_size * flags.context_size)
    print(json.dumps(result))


def print_result(result, tokens):
    """Prints the result in words; tokens: of a training step."""
    counts = result["parameters"]
    parts = [f"{count:,} {part}" for part, count in counts.items() if count]
    print_row("parameters", f"{sum(counts.values()):,}: {', '.join(parts)}")
    flops = result["flops_per_token"]
    print_row(
        "compute",
        f"{flops['forward'] / 1e6:,.2f} MFLOP per token forward, {flops['backward'] / 1e6:,.2f} "
        "backward",
    )
    memory = [f"{size / 2**20:,.1f} {part}" for part, size in result["memory"].items()]
    print_row(
        "memory",
        f"{result['peak_memory'] / 2**20:,.1f} MiB at the peak of a training step: "
        f"{', '.join(memory)}, the rest activations and gradients",
    )
    speed = result["tokens_per_second"]
    print_row(
        "training",
        f"{speed:,.0f} tokens/s, {1000 * tokens / speed:,.1f} ms per step of {tokens:,} tokens; "
        f"that is {sum(flops.values()) * speed / 1e9:,.1f} GFLOP/s, "
        f"{result['share_of_matrix_speed']:.0%} of the {result['matrix_flops'] / 1e9:,.1f} that "
        "products of large matrices reach here",
    )
    print_row(
        "sampling",
        f"first token after {result['first_token_ms']:,.1f} ms, then one every "
        f"{result['token_ms']:,.1f} ms ({result['decoded_per_second']:,.1f} tokens/s)",
    )


def print_row(name, text):
    """Prints a text beside its name, in lines of at most 100 columns."""
    print(textwrap.fill(f"{name:<11} {text}", 100, subsequent_indent=" " * 12))


# ---- Counts -------------------------------------------------------------------------------------
def count_parameters(model):
    """The number of weights in each of PARTS."""
    counts = {}
    for part, pattern in PARTS.items():
        counts[part] = 0
        for name, weight in tree_flatten(model.parameters()):
            if re.search(pattern, name):
                counts[part] += weight.size
    return counts


def count_flops(config, parameters, lora_rank):
    """Floating-point operations per token of the forward and the backward pass.

    The forward pass takes a multiplication and an addition per weight of a matrix. Attention takes
    them twice per element of a query and position of the window: for the scores and for the
    weighted sum of values. The backward pass takes twice as many: for the gradients with respect
    to the inputs and for those with respect to the weights, which LoRA needs for none of these
    (extras/fast.py computes those of the output layer nevertheless).
    """
    # The output layer multiplies by a matrix, either the embeddings or its own.
    output = config.vocab_size * config.dim
    matrices = parameters["attention"] + parameters["mlp"] + output
    queries = config.num_blocks * config.num_heads * config.head_dim  # elements
    forward = 2 * matrices + 4 * queries * config.context_size
    backward = 2 * forward
    if lora_rank:
        backward -= 2 * matrices
    return {"forward": forward, "backward": backward}


def measure_memory(run):
    """Bytes that persist between steps: weights, the optimizer's moments, the --average."""
    weights = run.model.parameters()
    memory = {"weights": count_bytes(weights), "optimizer": count_bytes(run.optimizer.state)}
    if run.flags.average:
        memory["average"] = count_bytes(run.model.trainable_parameters())
    return memory


def count_bytes(tree):
    """The size of a tree of arrays."""
    return sum(array.nbytes for _, array in tree_flatten(tree))


# ---- Measurements -------------------------------------------------------------------------------
def measure_training(run):
    """Tokens per second of a training step, and the peak of MLX's memory in bytes."""
    flags = run.flags
    inputs, targets = run.batches.next()
    train_step = make_step(run.model, run.optimizer, flags, teacher=run.teacher)
    dropout_rate, keys = draw_dropout(0, len(inputs), flags)
    average = None

    def train_once():
        nonlocal average
        train_step(inputs, targets, dropout_rate, keys)
        if flags.average:
            average = average_weights(average, run.model.trainable_parameters(), 1, flags.average)

    # The first step compiles, so neither its time nor its memory counts.
    train_once()
    mx.reset_peak_memory()
    seconds = min(timeit.repeat(train_once, number=1, repeat=TRAINING_STEPS))
    return inputs.size / seconds, mx.get_peak_memory()


def measure_matrix_speed(dtype):
    """FLOPs per second of a product of large square matrices, the most that training can reach.

    dtype: float32 or bfloat16, as for --dtype.
    """
    matrix = mx.random.normal((MATRIX_SIZE, MATRIX_SIZE))
    if dtype == "bfloat16" and mx.default_device() == mx.gpu:
        matrix = matrix.astype(mx.bfloat16)

    def multiply(rows):
        return (rows @ matrix)[0]  # a sum of rows takes no time

    def multiply_once():
        mx.eval(over_streams(multiply, matrix))

    with bfloat16_products(dtype == "bfloat16"):
        seconds = min(timeit.repeat(multiply_once, number=1, repeat=MATRIX_PRODUCTS))
    return 2 * MATRIX_SIZE**3 / seconds  # 2: multiplication and addition


def measure_decoding(run):
    """Time to first token and decoding speed for one text, after a prompt of half a context."""
    if fast is not None:
        # A single row is not split over streams: its products use all cores.
        fast.use_all_cores()
    model, flags = run.model, run.flags
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
        "decoded_per_second": DECODED_TOKENS / seconds,
    }


if __name__ == "__main__":
    start("benchmark", main)
