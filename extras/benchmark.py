"""A model's size, cost and speed on this machine, measured in real training steps.

    python main.py --benchmark                          the model of the latest checkpoint
    python main.py --benchmark --dim 512 --mlp swiglu   another one

Prints what it found in words and, as its last line, the same numbers as JSON: parameters,
floating-point operations (FLOPs) per token, memory in bytes, speed in tokens per second, and
milliseconds for the first token of a continuation and for each later one. It saves nothing.
"""

import json
import math
import re
import textwrap
import timeit

import mlx.core as mx
from mlx.utils import tree_flatten

from main import Decoder, average_weights, bfloat16_products, draw_dropout, fast, make_step
from main import over_streams

# The parts of a model, and a pattern in the names of their parameters.
PARTS = {
    "embeddings": "embed",
    "attention": r"attn\.\w_proj",
    "mlp": "mlp",
    "norms": "norm",
    "output": "lm_head",
}
# Floats that an MLP keeps per hidden unit, by activation; 5.1 for all others, such as gelu.
HIDDEN_UNIT_FLOATS = {"relu2": 3.0, "swiglu": 6.3}
# Repetitions; the fastest counts, because other programs can only slow one down.
TRAINING_STEPS = 5
MATRIX_PRODUCTS = 6
MATRIX_SIZE = 2048  # rows and columns of the matrices whose product is timed
DECODED_TOKENS = 32


def run_benchmark(run):
    """Measures a training step of a run and decoding with its model, and prints the result."""
    model, flags = run.model, run.flags
    parameters = count_parameters(model)
    flops = count_flops(model.config, parameters, flags.lora_rank)
    trained = sum(weight.size for _, weight in tree_flatten(model.trainable_parameters()))
    lasting = measure_memory(run)
    streams = count_streams(flags)
    passing = predict_memory(model.config, flags, trained, lasting["optimizer"], streams)
    training_speed, measured_peak = measure_training(run)
    matrix_speed = measure_matrix_speed(flags.dtype)
    result = {
        "parameters": parameters,
        "flops_per_token": flops,
        "memory": lasting | passing,
        # Activations are freed as gradients are made, so the peak contains the larger of the two.
        "predicted_peak": sum(lasting.values()) + max(passing.values()),
        "measured_peak": measured_peak,
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
    memory = {part: f"{size / 2**20:,.1f} MiB" for part, size in result["memory"].items()}
    passing = f"activations ({memory.pop('activations')}) or gradients ({memory.pop('gradients')})"
    lasting = ", ".join(f"{part} ({size})" for part, size in memory.items())
    print_row(
        "memory",
        f"{result['measured_peak'] / 2**20:,.1f} MiB at the peak of a training step, predicted "
        f"{result['predicted_peak'] / 2**20:,.1f}: {lasting}, and {passing}, whichever is larger",
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


# ---- Counts and predictions ---------------------------------------------------------------------
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


def count_streams(flags):
    """How many streams share the rows of a batch: one without extras/fast.py."""
    if fast is None:
        return 1
    return fast.count_streams(flags.batch_size, flags.context_size)


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


def predict_memory(config, flags, parameters, optimizer, streams):
    """Bytes at the peak of each half of a training step on a CPU.

    The step is computed as in extras/fast.py, without --grad_checkpoint.
    parameters: the number of trained weights; optimizer: the bytes of its moments; streams: how
    many share a batch. Returns a dict: "activations" are what the forward pass keeps for the
    backward pass; "gradients" are those of each stream, their sum, the clipped ones, and the new
    moments. The factors were fitted to 94 models (dim 128 to 512, context 48 to 256, vocabularies
    of 257 to 10,000 tokens, 2 streams): 9 in 10 are within 7%, all within 25%.
    """
    positions = flags.batch_size * config.context_size
    # Floats that a block keeps per position.
    hidden_states = (7 if config.qk_norm else 3) * config.dim  # including queries
    keys_and_values = 3.2 * config.num_kv_heads * config.head_dim
    hidden_units = HIDDEN_UNIT_FLOATS.get(config.mlp, 5.1) * config.mlp_dim
    scores = 1.1 * config.num_heads * config.context_size
    per_block = hidden_states + keys_and_values + hidden_units + scores
    per_position = 18 * config.dim + config.num_blocks * per_block
    # The loss is computed in chunks (extras/fast.py); each stream holds the logits of one, twice.
    rows = math.ceil(positions / streams)  # of a stream
    chunks = math.ceil(rows / max(128, 2**23 // config.vocab_size))
    loss = 2 * streams * config.vocab_size * math.ceil(rows / chunks)
    first_gradients = 0.8 * parameters
    copies = streams + 2 if streams > 1 else 2  # of the gradients; one stream's are the sum
    return {
        "activations": round(4 * (positions * per_position + loss + first_gradients)),
        "gradients": 4 * parameters * copies + optimizer,
    }


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
