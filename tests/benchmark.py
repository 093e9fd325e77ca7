"""Measures, and asserts nothing.

    python tests/benchmark.py train              training steps in float32 and in bfloat16
    python tests/benchmark.py sample             sampling of one text and of sixteen

train: beside PyTorch's compiled steps (pip install torch), in bfloat16 by autocast, and beside
main.py's own functions without those of fast.py. sample: greedily, beside the exported model in
transformers (pip install torch transformers) and llama.cpp (pip install gguf llama-cpp-python).
What is compared is measured by turns, each training in a process of its own.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Taken before main.py changes how threads wait, which would slow other programs down.
ENVIRONMENT = dict(os.environ)
TORCH_GPU = "mps" if sys.platform == "darwin" else "cuda"


def run(*command, **env):
    """What a program prints."""
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        env=ENVIRONMENT | env,
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.returncode:
        sys.exit(f"this command failed: {' '.join(process.args)}")
    return process.stdout


def call(function, *arguments):
    """What `function(*arguments)`, of this file, returns in a fresh Python."""
    code = f"import benchmark, json; print(json.dumps(benchmark.{function}(*{arguments!r})))"
    out = run("-c", code, PYTHONPATH=str(Path(__file__).parent))
    return json.loads(out.splitlines()[-1])


def is_installed(package):
    return importlib.util.find_spec(package) is not None


def machine(gpu):
    """What the figures depend on: the device, and the versions of what is compared."""
    import main

    main.use_device(gpu)
    versions = main.list_versions(main.resolve_flags({"gpu": gpu}), main.SingleProcess())
    for package in ("torch", "transformers"):
        if is_installed(package):
            versions[package] = importlib.metadata.version(package)
    return versions


def summary(values):
    values = sorted(round(value, 2) for value in values)
    return {"median": statistics.median(values), "rounds": values}


# ---- Training -----------------------------------------------------------------------------------

SMALL = dict(dim=256, num_heads=4, context_size=64, batch_size=32)
TINY = dict(dim=128, num_heads=4, context_size=64, batch_size=12)
RECIPE = dict(mlp="swiglu", mlp_dim=704, qk_norm=True, optimizer="muon")
GPT2 = dict(dim=768, num_heads=12, num_blocks=12, context_size=1024, batch_size=8)
SHAPES = {  # flags of the model and its batches, the size of the vocabulary, steps in a round
    "default": (dict(dim=1024, num_heads=8, context_size=48, batch_size=32), 10_000, 2),
    "small": (SMALL, 10_000, 10),
    "tiny": (TINY, 10_000, 40),
    "tiny, few words": (TINY, 65, 100),
    "small, as a recipe": (SMALL | RECIPE, 10_000, 10),
    "gpt2": (GPT2, 50_000, 20),  # for GPUs: a step takes minutes on a CPU
}
OURS = ["main float32", "main bfloat16", "plain float32"]
PYTORCH = ["compiled float32", "compiled bfloat16"]
COMPARED = [  # whose speed is divided by whose
    ("main float32", "compiled float32"),
    ("main bfloat16", "compiled bfloat16"),
    ("main bfloat16", "main float32"),
    ("main float32", "plain float32"),
]


def make_model(vocab_size, dim, num_heads, context_size, mlp="relu2", **others):
    """A fresh model; others: of its Config."""
    import main

    shape = dict(num_blocks=4, mlp_dim=4 * dim, num_kv_heads=num_heads) | others
    config = main.Config(vocab_size, context_size, dim=dim, num_heads=num_heads, mlp=mlp, **shape)
    model = main.LanguageModel(config)
    main.init_weights(model, 42)
    return model


def prepare(folder, shape, words, steps):
    """Writes a text of random words into a folder, and what PyTorch needs to train as main.py.

    These are the model's first weights and the batches [steps, B, L + 1].
    """
    import main
    from datasets import load_dataset
    from mlx.utils import tree_flatten

    words -= 2  # the end token and <unk>
    drawn = np.random.default_rng(0).integers(words, size=(20_000, 20))
    drawn.flat[:words] = np.arange(words)
    np.savetxt(f"{folder}/text.txt", drawn, "w%d")
    dataset = load_dataset("text", folder, [f"{folder}/text.txt"], "word")
    shape = dict(shape)
    batch_size = shape.pop("batch_size")
    shape.pop("optimizer", None)
    model = make_model(dataset.tokenizer.vocab_size, **shape)
    weights = {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
    np.savez(f"{folder}/weights.npz", **weights)
    batches = main.Batches(dataset.train.tokens, shape["context_size"], batch_size, 42)
    rows = []
    for _ in range(steps):
        inputs, targets = map(np.array, batches.next())
        rows.append(np.concatenate([inputs, targets[:, -1:]], axis=1))
    np.save(f"{folder}/batches.npy", rows)


def torch_steps(folder, dtype, heads, gpu, optimizer):
    """PyTorch's losses and seconds of each step; bfloat16 by autocast."""
    import torch
    import torch.nn.functional as F

    device = TORCH_GPU if gpu else "cpu"

    if gpu:
        torch.set_float32_matmul_precision("high")  # TF32, as MLX's
    weights = np.load(f"{folder}/weights.npz")
    parameters = {}
    for name, weight in weights.items():
        parameters[name] = torch.nn.Parameter(torch.tensor(weight, device=device))
    batches = torch.from_numpy(np.load(f"{folder}/batches.npy")).long()
    context = batches.shape[-1] - 1
    dim = len(weights["model.norm.weight"])
    d = dim // heads
    speeds = 10000 ** (-torch.arange(0, d, 2) / d)
    angles = torch.outer(torch.arange(context), speeds)
    cos = torch.cat([angles.cos(), angles.cos()], -1).to(device)  # [L, d]
    sin = torch.cat([angles.sin(), angles.sin()], -1).to(device)
    count = sum(name.endswith("o_proj.weight") for name in parameters)
    blocks = [f"model.layers.{i}" for i in range(count)]
    matrices = []
    vectors = []
    of_blocks = []
    for name, parameter in parameters.items():
        if optimizer == "muon" and "_proj" in name:
            of_blocks.append(parameter)
        else:
            (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": 1e-5},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.99), fused=True)]
    if of_blocks:
        optimizers.append(torch.optim.Muon(of_blocks, lr=5 * 3e-4, weight_decay=1e-5 / 5))

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def linear(x, name):
        return F.linear(x, parameters[f"{name}.weight"])

    def normalize(x, name):
        weight = parameters[f"{name}.weight"]
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    def split_heads(x):
        return x.unflatten(-1, (heads, d)).transpose(1, 2)

    def attend(x, layer):
        queries, keys, values = [split_heads(linear(x, f"{layer}.{name}_proj")) for name in "qkv"]
        if f"{layer}.q_norm.weight" in parameters:
            queries = normalize(queries, f"{layer}.q_norm")
            keys = normalize(keys, f"{layer}.k_norm")
        attended = F.scaled_dot_product_attention(
            rotate(queries), rotate(keys), values, is_causal=True
        )
        return linear(attended.transpose(1, 2).flatten(2), f"{layer}.o_proj")

    def transform(x, layer):
        hidden = linear(x, f"{layer}.up_proj")
        if f"{layer}.gate_proj.weight" in parameters:
            hidden = F.silu(linear(x, f"{layer}.gate_proj")) * hidden
        else:
            hidden = F.relu(hidden).square()
        return linear(hidden, f"{layer}.down_proj")

    @torch.compile
    def model(tokens):
        hidden = F.embedding(tokens, parameters["model.embed_tokens.weight"])
        for block in blocks:
            hidden = hidden + attend(
                normalize(hidden, f"{block}.input_layernorm"), f"{block}.self_attn"
            )
            x = normalize(hidden, f"{block}.post_attention_layernorm")
            hidden = hidden + transform(x, f"{block}.mlp")
        return linear(normalize(hidden, "model.norm"), "model.embed_tokens")

    losses = []
    seconds = []
    for batch in batches:
        began = time.perf_counter()
        batch = batch.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for each in optimizers:
            each.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def main_steps(folder, kind, dtype, line):
    """The same of main.py, from its log.

    plain: main.py's own functions and one stream, on the fast BLAS.
    """
    env = {}
    if kind == "plain":
        from extras.features import fast

        env["PLAIN_FUNCTIONS"] = ",".join(fast.PLAIN_HASHES)
    save_dir = tempfile.mkdtemp(dir=folder)
    line = [*line, "--tokenizer", "word", "--dtype", dtype, "--lr_warmup", 0]
    line += ["--steps_per_report", 1, "--sample_tokens", 0]
    line += ["--data_dir", folder, "--save_dir", save_dir]
    run(ROOT / "main.py", *line, **env)
    [log] = Path(save_dir).glob("*/log.csv")
    with open(log) as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    losses = [float(row["loss"]) for row in rows]
    seconds = [float(row["ms_per_step"] or "nan") / 1000 for row in rows]  # the first has none
    return losses, seconds


def train(names, gpu, rounds, dtypes, warmup=20):
    """Trainings of the same model, from the same weights on the same batches, by turns."""
    from main import arguments_of

    competitors = OURS + PYTORCH
    if not is_installed("torch"):
        print("PyTorch is not installed (pip install torch): only plain MLX is compared with.")
        competitors = OURS
    competitors = [each for each in competitors if each.split()[1] in dtypes]
    figures = {}
    for name in names:
        shape, words, steps = SHAPES[name]
        with tempfile.TemporaryDirectory() as folder:
            call("prepare", folder, shape, words, warmup + steps)
            line = ["--text", f"{folder}/text.txt", "--num_iters", warmup + steps]
            line += arguments_of(shape)
            line += ["--gpu"] if gpu else []
            results = {each: [] for each in competitors}
            for _ in range(rounds):
                for each in competitors:
                    kind, dtype = each.split()
                    if each in OURS:
                        result = main_steps(folder, kind, dtype, line)
                    else:
                        others = shape["num_heads"], gpu, shape.get("optimizer", "adamw")
                        result = call("torch_steps", folder, dtype, *others)
                    results[each].append(result)
        figures[name] = compare(results, warmup)
    return figures


def compare(results, warmup):
    """The figures of results {competitor: [(losses, seconds), ...]}, one a round."""
    figure = {"seconds a step": {}}
    taken = {}
    losses = {}
    for competitor, rounds in results.items():
        taken[competitor] = [statistics.mean(seconds[warmup:]) for _, seconds in rounds]
        figure["seconds a step"][competitor] = round(statistics.median(taken[competitor]), 4)
        losses[competitor], _ = rounds[-1]
    for ours, theirs in COMPARED:
        if {ours, theirs} <= results.keys():
            ratios = [b / a for a, b in zip(taken[ours], taken[theirs])]
            figure[f"{ours}: times the speed of {theirs}"] = summary(ratios)
            off = max(abs(a - b) for a, b in zip(losses[ours], losses[theirs]))
            figure[f"{ours}: losses off those of {theirs}"] = round(off, 5)
    return figure


# ---- Sampling -----------------------------------------------------------------------------------


def speed(model, count, rows=1):
    """Tokens a second of `count` that follow a prompt of three tokens, in each of some rows."""
    import main
    from extras.features.decode import BatchDecoder

    rules = Namespace(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    began = time.perf_counter()
    if rows == 1:
        steps = main.Decoder(model, [1, 2, 3]).generate(count, rules, 0)
    else:
        texts = [[1, 2, 3] for _ in range(rows)]
        steps = BatchDecoder(model, texts).generate(count, rules, range(rows))
    list(steps)
    return rows * count / (time.perf_counter() - began)


TRANSFORMERS = """
import sys, time, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).to(sys.argv[2])
options = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
for line in sys.stdin:
    count, rows = map(int, line.split())
    prompt = torch.tensor([[1, 2, 3]] * rows).to(sys.argv[2])
    began = time.perf_counter()
    model.generate(prompt, min_new_tokens=count, max_new_tokens=count, **options)
    print(time.perf_counter() - began, flush=True)
"""
LLAMA_CPP = """
import itertools, os, sys, time
from llama_cpp import Llama
layers = 0 if sys.argv[2] == "cpu" else -1
options = dict(n_ctx=1024, n_threads=os.cpu_count(), n_gpu_layers=layers, verbose=False)
model = Llama(sys.argv[1], **options)
for line in sys.stdin:
    count, rows = map(int, line.split())
    began = time.perf_counter()
    list(itertools.islice(model.generate([1, 2, 3], temp=0.0), count))
    print(time.perf_counter() - began, flush=True)
"""
SAMPLED = {
    "10M": dict(vocab_size=10_000, dim=256, num_blocks=8, num_heads=8, mlp_dim=704),
    "110M": dict(vocab_size=32_000, dim=768, num_blocks=12, num_heads=12, mlp_dim=2048),
}
SAMPLED_COMPARED = [  # whose speed is divided by whose
    ("one text", "transformers"),
    ("one text", "llama.cpp"),
    ("16 texts", "one text"),
    ("16 texts", "transformers, 16 texts"),
]


class Worker:
    """A process that samples from exported weights by another program."""

    def __init__(self, code, path, gpu):
        command = [sys.executable, "-c", code, path, TORCH_GPU if gpu else "cpu"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        folder = os.path.dirname(path)  # not the program's, where datasets.py would be imported
        self.process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, **pipes)

    def speed(self, count, rows=1):
        """As the function `speed`, of its model."""
        print(count, rows, file=self.process.stdin, flush=True)
        return rows * count / float(self.process.stdout.readline())


def start_workers(model, folder, gpu):
    """{name of a competitor: Worker}, of those that are installed."""
    from datasets import ByteTokenizer
    from extras.features.gguf import export_gguf
    from extras.features.huggingface import export_model

    workers = {}
    if is_installed("transformers"):
        export_model(model, ByteTokenizer(), f"{folder}/hf", None)
        workers["transformers"] = Worker(TRANSFORMERS, f"{folder}/hf", gpu)
    if is_installed("llama_cpp"):
        export_gguf(model, ByteTokenizer(), f"{folder}/model.gguf", None)
        workers["llama.cpp"] = Worker(LLAMA_CPP, f"{folder}/model.gguf", gpu)
    return workers


def sample(gpu, rounds, count=100):
    """Tokens a second, greedily, by turns with what they are to be compared with."""
    import main

    main.use_device(gpu)
    figures = {}
    for name, shape in SAMPLED.items():
        model = make_model(**shape, context_size=1024, mlp="swiglu")
        with tempfile.TemporaryDirectory() as folder:
            workers = start_workers(model, folder, gpu)
            speeds = {
                "one text": partial(speed, model, count),
                "16 texts": partial(speed, model, count, 16),
            }
            for other, worker in workers.items():
                speeds[other] = partial(worker.speed, count)
                if other == "transformers":
                    speeds["transformers, 16 texts"] = partial(worker.speed, count, 16)
            taken = {each: [] for each in speeds}
            for _ in range(1 + rounds):
                for each, measured in speeds.items():
                    taken[each].append(measured())
            for worker in workers.values():
                worker.process.communicate()
        taken = {each: values[1:] for each, values in taken.items()}  # the first warms up
        figures[name] = {each: summary(values) for each, values in taken.items()}
        for ours, theirs in SAMPLED_COMPARED:
            if theirs in taken:
                ratios = [a / b for a, b in zip(taken[ours], taken[theirs])]
                figures[name][f"{ours}: times the speed of {theirs}"] = summary(ratios)
    return figures


def measure(flags):
    """The figures of a part."""
    if flags.part == "train":
        names = [name for name in SHAPES if flags.gpu or name != "gpt2"]
        names = [flags.shape] if flags.shape else names
        return train(names, flags.gpu, flags.rounds, flags.dtype or ["float32", "bfloat16"])
    return sample(flags.gpu, flags.rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["train", "sample"])
    parser.add_argument("--shape", choices=list(SHAPES), help="one of the models (default: all)")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="by turns (default: 5)")
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    measured = {"machine": call("machine", options.gpu)} | measure(options)
    for name, figure in measured.items():
        print(name)
        for key, value in figure.items():
            print(f"    {key:<56} {value}")
