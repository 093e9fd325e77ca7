"""Measures, and asserts nothing.

    python tests/benchmark.py train              training steps in float32 and in bfloat16
    python tests/benchmark.py sample             sampling of one text and of sixteen

train: beside PyTorch's compiled steps (pip install torch), in bfloat16 by autocast, and beside
main.py's own functions without those of fast.py. sample: greedily, beside the exported model in
transformers (pip install torch transformers) and llama.cpp (pip install gguf llama-cpp-python).
What is compared is measured by turns; all but main.py's samples in a new process each time.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
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
        [sys.executable, *command],
        cwd=Path(__file__).parent,
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
    return json.loads(run("-c", code).splitlines()[-1])


def is_installed(package):
    return importlib.util.find_spec(package) is not None


def machine(gpu):
    """What the figures depend on: the device, and the versions of what is compared."""
    import main

    main.use_device(gpu)
    from support.device import ALONE, list_versions

    versions = list_versions(main.resolve_flags({"gpu": gpu}), ALONE, main.fast)
    for package in ("torch", "transformers"):
        if is_installed(package):
            versions[package] = importlib.metadata.version(package)
    return versions


def by_turns(measures, rounds):
    """What functions, {name: function}, return in each of some rounds: {name: [result, ...]}."""
    results = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            results[name].append(measure())
    return results


def summary(values):
    values = sorted(round(value, 2) for value in values)
    return {"median": statistics.median(values), "rounds": values}


COMPARED = [  # whose speed is divided by whose, if both were measured
    ("main float32", "compiled float32"),
    ("main bfloat16", "compiled bfloat16"),
    ("main bfloat16", "main float32"),
    ("main float32", "plain float32"),
    ("one text", "transformers"),
    ("one text", "llama.cpp"),
    ("16 texts", "one text"),
    ("16 texts", "transformers, 16 texts"),
]


def compare(speeds, losses=None):
    """The figures of speeds {competitor: [speed, one a round]} and losses {competitor: [loss]}."""
    figure = {}
    for ours, theirs in COMPARED:
        if {ours, theirs} <= speeds.keys():
            ratios = [a / b for a, b in zip(speeds[ours], speeds[theirs])]
            figure[f"{ours}: times the speed of {theirs}"] = summary(ratios)
            if losses:
                off = max(abs(a - b) for a, b in zip(losses[ours], losses[theirs]))
                figure[f"{ours}: losses off those of {theirs}"] = round(off, 5)
    return figure


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
COMPETITORS = ["main float32", "main bfloat16", "plain float32"]
COMPETITORS += ["compiled float32", "compiled bfloat16"]  # PyTorch


def prepare(folder, words, steps, line):
    """Writes a text of random words, and what PyTorch needs to train on it as main.py does.

    words: the size of the vocabulary; line: main.py's arguments. PyTorch needs the first weights
    and the batches, inputs and targets [steps, 2, B, L].
    """
    import main

    words -= 2  # the end token and <unk>
    drawn = np.random.default_rng(0).integers(words, size=(20_000, 20))
    drawn.flat[:words] = np.arange(words)
    np.savetxt(f"{folder}/text.txt", drawn, "w%d")
    flags = main.resolve_flags(main.read_command_line(line))
    main.use_device(flags.gpu)
    training = main.make_run(folder, main.load_inputs(flags))
    training.model.save_weights(f"{folder}/weights.npz")
    np.save(f"{folder}/batches.npy", [np.stack(training.batches.next()) for _ in range(steps)])


def torch_steps(folder, dtype, heads, gpu, optimizer):
    """PyTorch's losses and seconds of each step; bfloat16 by autocast."""
    import torch
    import torch.nn.functional as F

    device = "cpu"
    if gpu:
        device = TORCH_GPU
        torch.set_float32_matmul_precision("high")  # TF32, as MLX's
    parameters = {}
    for name, weight in np.load(f"{folder}/weights.npz").items():
        parameters[name] = torch.nn.Parameter(torch.tensor(weight, device=device))
    batches = torch.from_numpy(np.load(f"{folder}/batches.npy")).long()
    d = len(parameters["model.norm.weight"]) // heads
    speeds = 10000 ** (-torch.arange(0, d, 2) / d)
    angles = torch.outer(torch.arange(batches.shape[-1]), speeds).repeat(1, 2)  # [L, d]
    cos = angles.cos().to(device)
    sin = angles.sin().to(device)
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
    groups = [{"params": matrices, "weight_decay": 1e-5}, {"params": vectors, "weight_decay": 0.0}]
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

    def attend(x, layer):
        queries, keys, values = [
            linear(x, f"{layer}.{name}_proj").unflatten(-1, (heads, d)).transpose(1, 2)
            for name in "qkv"
        ]
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
        inputs, targets = batch.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        for each in optimizers:
            each.zero_grad()
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
    run(str(ROOT / "main.py"), *line, "--dtype", dtype, "--save_dir", save_dir, **env)
    [log] = Path(save_dir).glob("*/log.csv")
    rows = csv.DictReader(log.read_text().splitlines())
    rows = [row for row in rows if row["split"] == "train"]
    losses = [float(row["loss"]) for row in rows]
    seconds = [float(row["ms_per_step"] or "nan") / 1000 for row in rows]  # the first has none
    return losses, seconds


def train(flags, warmup=20):
    """Trainings of the same model, from the same weights on the same batches, by turns."""
    from support.flags import arguments_of

    has_torch = is_installed("torch")
    if not has_torch:
        print("PyTorch is not installed (pip install torch): only plain MLX is compared with.")
    names = [name for name in SHAPES if flags.gpu or name != "gpt2"]
    figures = {}
    for name in [flags.shape] if flags.shape else names:
        shape, words, steps = SHAPES[name]
        steps += warmup
        optimizer = shape.get("optimizer", "adamw")
        with tempfile.TemporaryDirectory() as folder:
            values = dict(text=f"{folder}/text.txt", data_dir=folder, tokenizer="word")
            values |= dict(num_iters=steps, lr_warmup=0, steps_per_report=1, sample_tokens=0)
            line = arguments_of(shape | values | {"gpu": flags.gpu})
            call("prepare", folder, words, steps, line)
            measures = {}
            for each in COMPETITORS:
                kind, dtype = each.split()
                if flags.dtype and dtype not in flags.dtype:
                    continue
                if kind != "compiled":
                    measures[each] = partial(main_steps, folder, kind, dtype, line)
                elif has_torch:
                    others = dtype, shape["num_heads"], flags.gpu, optimizer
                    measures[each] = partial(call, "torch_steps", folder, *others)
            results = by_turns(measures, flags.rounds)
        taken = {}
        speeds = {}
        losses = {}
        for each, trainings in results.items():
            means = [statistics.mean(seconds[warmup:]) for _, seconds in trainings]
            taken[each] = round(statistics.median(means), 4)
            speeds[each] = [1 / mean for mean in means]
            losses[each], _ = trainings[-1]
        figures[name] = {"seconds a step": taken} | compare(speeds, losses)
    return figures


# ---- Sampling -----------------------------------------------------------------------------------

SAMPLED = {
    "10M": dict(vocab_size=10_000, dim=256, num_blocks=8, num_heads=8, mlp_dim=704),
    "110M": dict(vocab_size=32_000, dim=768, num_blocks=12, num_heads=12, mlp_dim=2048),
}
PROMPT = [1, 2, 3]


def second_time(generate):
    """The seconds that a function takes the second time; the first warms up."""
    _, seconds = timeit.repeat(generate, number=1, repeat=2)
    return seconds


def speed(model, count, rows=1):
    """Tokens a second of `count` that follow PROMPT, in each of some rows."""
    import main
    from extras.features.decode import BatchDecoder

    greedy = main.resolve_flags({"temperature": 0.0})

    def generate():
        steps = main.Decoder(model, [*PROMPT]).generate(count, greedy, 0)
        if rows > 1:
            texts = [[*PROMPT] for _ in range(rows)]
            steps = BatchDecoder(model, texts).generate(count, greedy, range(rows))
        list(steps)

    return rows * count / second_time(generate)


def transformers_speed(folder, gpu, count, rows):
    """The same of transformers, with the model in a folder."""
    sys.path.remove(str(ROOT))  # where its `import datasets` would find main.py's
    import torch
    from transformers import AutoModelForCausalLM

    device = TORCH_GPU if gpu else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    prompts = torch.tensor([PROMPT] * rows).to(device)
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    options |= dict(min_new_tokens=count, max_new_tokens=count)
    return rows * count / second_time(partial(model.generate, prompts, **options))


def llama_cpp_speed(path, gpu, count):
    """The same of llama.cpp, for one text."""
    from llama_cpp import Llama

    options = dict(n_ctx=1024, n_threads=os.cpu_count(), n_gpu_layers=-1 if gpu else 0)
    model = Llama(path, verbose=False, **options)

    def generate():
        list(itertools.islice(model.generate(PROMPT, temp=0.0), count))

    return count / second_time(generate)


def sample(flags, count=100):
    """Tokens a second, greedily, by turns with what they are to be compared with."""
    import main
    from datasets import ByteTokenizer
    from extras.features.gguf import export_gguf
    from extras.features.huggingface import export_model

    main.use_device(flags.gpu)
    figures = {}
    for name, shape in SAMPLED.items():
        kv_heads = shape["num_heads"]
        config = main.Config(**shape, num_kv_heads=kv_heads, context_size=1024, mlp="swiglu")
        model = main.LanguageModel(config)
        main.init_weights(model, 42)
        measures = {
            "one text": partial(speed, model, count),
            "16 texts": partial(speed, model, count, 16),
        }
        with tempfile.TemporaryDirectory() as folder:
            if is_installed("transformers"):
                export_model(model, ByteTokenizer(), f"{folder}/hf", None)
                theirs = partial(call, "transformers_speed", f"{folder}/hf", flags.gpu, count)
                measures["transformers"] = partial(theirs, 1)
                measures["transformers, 16 texts"] = partial(theirs, 16)
            if is_installed("llama_cpp"):
                path = f"{folder}/model.gguf"
                export_gguf(model, ByteTokenizer(), path, None)
                measures["llama.cpp"] = partial(call, "llama_cpp_speed", path, flags.gpu, count)
            speeds = by_turns(measures, flags.rounds)
        summaries = {each: summary(values) for each, values in speeds.items()}
        figures[name] = summaries | compare(speeds)
    return figures


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
    measure = train if options.part == "train" else sample
    measured = {"machine": call("machine", options.gpu)} | measure(options)
    for name, figure in measured.items():
        print(name)
        for key, value in figure.items():
            print(f"    {key:<56} {value}")
