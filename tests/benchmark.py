"""Measures, and asserts nothing; the last line is JSON.

    python tests/benchmark.py train
        training steps in float32 and in bfloat16, beside PyTorch's (pip install torch) in float32
        and under bfloat16 autocast, eager and compiled, and beside plain MLX's
    python tests/benchmark.py decode
        sampling: beside no cache, the memory's speed, and one text at a time
    python tests/benchmark.py generate
        the same beside generate of transformers (pip install torch transformers)
    python tests/benchmark.py data --mirror DIR
        text to tokens; DIR holds ptb/ptb.train.txt and the others

Each figure is measured in a process of its own, so that peak memory is that of the one thing.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def in_own_process(function, *arguments):
    """What `function(*arguments)` returns, computed in a fresh Python."""
    code = f"import benchmark, json; print(json.dumps(benchmark.{function}(*{arguments!r})))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def peak_mib():
    """The most resident memory that this process has had, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def load(name, save_dir, options):
    import datasets

    began = time.perf_counter()
    dataset = datasets.load_dataset(name, save_dir, say=lambda line: None, **options)
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 3),
        "tokens": len(dataset.train.tokens),
        "peak_mib": peak_mib(),
    }


def bpe_speed(path, save_dir):
    """MB/s of encoding by write_tokens and by the package's own encode_batch.

    On the same lines, alternately.
    """
    import datasets

    tokenizer = datasets.load_dataset("ptb", save_dir, tokenizer="bpe", vocab_size=8000).tokenizer
    texts = Path(path).read_text().splitlines(keepends=True)
    size = os.path.getsize(path)
    span = datasets.Span(path, 0, size)
    ratios = []
    package_speeds = []
    for _ in range(5):
        began = time.perf_counter()
        tokenizer.package.encode_batch(texts, add_special_tokens=False)
        package_seconds = time.perf_counter() - began
        began = time.perf_counter()
        datasets.write_tokens([span], tokenizer, Path(save_dir) / "bpe.tokens")
        own_seconds = time.perf_counter() - began
        ratios.append(round(package_seconds / own_seconds, 2))
        package_speeds.append(size / 1e6 / package_seconds)
    return {
        "speed_over_package": sorted(ratios),
        "package_mb_s": round(statistics.median(package_speeds), 1),
    }


def anonymous_mib(arguments):
    """The most anonymous memory (RssAnon) of a training run, in MiB.

    Pages of a memory map do not count.
    """
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            _, _, rest = status.partition("RssAnon:")
            most = max(most, int(rest.split()[0]))
        except (OSError, IndexError, ValueError):
            pass
        time.sleep(0.02)
    return round(most / 1024)


SMALL_RUN = (
    "--dim 64 --num_heads 2 --num_blocks 2 --num_iters 30 --max_tokens 5 "
    "--tokenizer word --new_model"
).split()


def data(mirror):
    """Speed and memory of datasets.py, from raw text to tokens."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        ptb = {"mirror": mirror}
        in_own_process("load", "ptb", folder, ptb | {"tokenizer": "byte"})  # brings the files
        figures["ptb words"] = in_own_process("load", "ptb", folder, ptb)
        train = Path(folder) / "ptb" / "ptb.train.txt"
        large = Path(folder) / "large.txt"
        with large.open("wb") as out:  # WikiText-103's size
            for _ in range(111):
                out.write(train.read_bytes())
        size = large.stat().st_size / 1e6
        for tokenizer in ("word", "byte"):
            own = {"text": [str(large)], "valid_text": [str(train)], "tokenizer": tokenizer}
            name = f"{size:.0f} MB by {tokenizer}"
            cold = in_own_process("load", "text", folder, own)
            cold["mb_s"] = round(size / cold["seconds"], 1)
            figures[name] = cold
            figures[f"{name}, warm"] = in_own_process("load", "text", folder, own)
        figures["bpe"] = in_own_process("bpe_speed", str(train), folder)
        lines = {
            "ptb": ["--dataset", "ptb", "--mirror", mirror],
            "large": ["--text", str(large), "--valid_text", str(train)],
        }
        for name, line in lines.items():
            arguments = [*line, *SMALL_RUN, "--save_dir", folder]
            figures[f"training on {name}: RssAnon MiB"] = anonymous_mib(arguments)
    return figures


SHAPES = {  # vocabulary, dim, heads, blocks, context, batch, steps in a round
    "default": (10000, 1024, 8, 4, 48, 32, 2),
    "small": (10000, 256, 4, 4, 64, 32, 10),
    "tiny": (10000, 128, 4, 4, 64, 12, 40),
    "tiny, characters": (65, 128, 4, 4, 64, 12, 100),
}


def torch_step(kind, shape, gpu, dtype, weights):
    """The same model in PyTorch, `eager` or `compiled`, with bfloat16 under autocast.

    Returns a function from a batch [B, L + 1] to the loss.
    """
    import torch
    import torch.nn.functional as F

    _, dim, heads, blocks, context, _, _ = shape
    device = "cuda" if gpu else "cpu"
    parameters = {}
    matrices = []
    vectors = []
    for name, weight in weights.items():
        parameter = torch.nn.Parameter(torch.tensor(weight, device=device))
        parameters[name] = parameter
        group = matrices if parameter.ndim > 1 else vectors
        group.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": 1e-5},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.99), fused=True)
    head_dim = dim // heads
    frequencies = 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(context), frequencies)
    angles = torch.cat((angles, angles), -1)
    cos = torch.cos(angles).to(device)
    sin = torch.sin(angles).to(device)

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def linear(x, name):
        return F.linear(x, parameters[f"{name}.weight"])

    def norm(x, name):
        return F.rms_norm(x, (dim,), parameters[f"{name}.weight"], 1e-5)

    def split_heads(x):
        B, L, _ = x.shape
        return x.view(B, L, heads, -1).transpose(1, 2)

    def attention(x, name):
        queries = split_heads(linear(x, f"{name}.q_proj"))
        keys = split_heads(linear(x, f"{name}.k_proj"))
        values = split_heads(linear(x, f"{name}.v_proj"))
        attended = F.scaled_dot_product_attention(
            rotate(queries), rotate(keys), values, is_causal=True
        )
        return linear(attended.transpose(1, 2).reshape(x.shape), f"{name}.o_proj")

    def mlp(x, name):
        up = linear(x, f"{name}.up_proj")
        return linear(F.relu(up).square(), f"{name}.down_proj")

    def model(tokens):
        hidden = F.embedding(tokens, parameters["model.embed_tokens.weight"])
        for i in range(blocks):
            block = f"model.layers.{i}"
            x = norm(hidden, f"{block}.input_layernorm")
            hidden = hidden + attention(x, f"{block}.self_attn")
            x = norm(hidden, f"{block}.post_attention_layernorm")
            hidden = hidden + mlp(x, f"{block}.mlp")
        return linear(norm(hidden, "model.norm"), "model.embed_tokens")

    if kind == "compiled":
        model = torch.compile(model)

    def step(batch):
        batch = torch.from_numpy(batch).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def import_plain_main():
    """main.py as it is without extras/: its plain loss, attention and one stream.

    But on the same fast BLAS.
    """
    from extras import fast  # loads that BLAS

    fast.use_cpu()
    fast.set_blas_threads(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "main.py", folder)
        sys.path.insert(0, folder)
        import main

    assert main.fast is None
    return main


def mlx_step(kind, shape, gpu, dtype, weights):
    """main.py's own step, or for `plain` that of import_plain_main."""
    if kind == "plain":
        main = import_plain_main()
    else:
        import main
    import mlx.core as mx
    from mlx.utils import tree_unflatten

    vocab_size, dim, heads, blocks, context, batch_size, _ = shape
    main.use_device(gpu)
    values = dict(
        dim=dim,
        num_heads=heads,
        num_blocks=blocks,
        context_size=context,
        batch_size=batch_size,
        dtype=dtype,
    )
    flags = main.resolve(argparse.Namespace(**main.DEFAULTS | values))
    model = main.LanguageModel(main.make_config(flags, vocab_size))
    named = [(name, mx.array(weight)) for name, weight in weights.items()]
    model.update(tree_unflatten(named))
    optimizer = main.make_optimizer(model, flags)
    train_step = main.make_step(model, optimizer, flags)

    def step(batch):
        loss, _ = train_step(mx.array(batch[:, :-1]), mx.array(batch[:, 1:]))
        return loss.item()

    return step


def shapes_of_weights(shape):
    """The shapes of a model's weights by their names, which lack ".weight"."""
    vocab_size, dim, _, blocks, _, _, _ = shape
    shapes = {"model.embed_tokens": (vocab_size, dim), "model.norm": (dim,)}
    for i in range(blocks):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm": (dim,),
            f"{layer}.post_attention_layernorm": (dim,),
            f"{layer}.self_attn.q_proj": (dim, dim),
            f"{layer}.self_attn.k_proj": (dim, dim),
            f"{layer}.self_attn.v_proj": (dim, dim),
            f"{layer}.self_attn.o_proj": (dim, dim),
            f"{layer}.mlp.up_proj": (4 * dim, dim),
            f"{layer}.mlp.down_proj": (dim, 4 * dim),
        }
    return shapes


def work(competitor, shape, gpu):
    """Reads numbers of steps from stdin.

    Answers each with the seconds it took, the losses, and the peak memory in MiB.
    """
    kind, dtype = competitor.split()
    if kind in ("main", "plain"):
        import extras.fast  # before NumPy, for which it chooses kernels
    import numpy as np

    random = np.random.default_rng(0)
    vocab_size, _, _, _, context, batch_size, _ = shape
    weights = {}
    for name, sizes in shapes_of_weights(shape).items():
        weight = np.ones(sizes)
        if weight.ndim > 1:
            weight = random.normal(0, 0.02, sizes)
        weights[f"{name}.weight"] = weight.astype(np.float32)
    make_step = mlx_step if kind in ("main", "plain") else torch_step
    step = make_step(kind, shape, gpu, dtype, weights)
    for line in sys.stdin:
        batches = []
        for _ in range(int(line)):
            batches.append(random.integers(0, vocab_size, (batch_size, context + 1)))
        began = time.perf_counter()
        losses = [step(batch) for batch in batches]
        seconds = time.perf_counter() - began
        print(json.dumps([seconds, losses, peak_mib()]), flush=True)


OF_MLX = ["main float32", "main bfloat16", "plain float32"]
OF_TORCH = ["eager float32", "eager bfloat16", "compiled float32", "compiled bfloat16"]
COMPETITORS = OF_MLX + OF_TORCH
COMPARED = [  # whose speed is divided by whose
    ("main float32", "eager float32"),
    ("main float32", "compiled float32"),
    ("main bfloat16", "eager bfloat16"),
    ("main bfloat16", "compiled bfloat16"),
    ("main bfloat16", "main float32"),
    ("main float32", "plain float32"),
]


class Worker:
    """A process that runs `work` for one competitor."""

    def __init__(self, shape_name, competitor, gpu):
        command = [sys.executable, __file__, "work"]
        command += ["--shape", shape_name, "--competitor", competitor]
        if gpu:
            command.append("--gpu")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, steps):
        """Takes some steps; returns the seconds, the losses, and the peak memory in MiB."""
        print(steps, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def is_installed(package):
    command = [sys.executable, "-c", f"import {package}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def compare(name, competitors, gpu, rounds):
    """The figures of one shape."""
    workers = {}
    for competitor in competitors:
        workers[competitor] = Worker(name, competitor, gpu)
    first_losses = {}
    for competitor, worker in workers.items():  # compiles, warms up
        _, first_losses[competitor], _ = worker.run(20)
    steps = SHAPES[name][-1]
    seconds = {competitor: [] for competitor in competitors}
    peaks = {}
    for _ in range(rounds):
        for competitor, worker in workers.items():
            taken, _, peaks[competitor] = worker.run(steps)
            seconds[competitor].append(taken / steps)
    for worker in workers.values():
        worker.stop()

    medians = {}
    for competitor, taken in seconds.items():
        medians[competitor] = round(statistics.median(taken), 4)
    figures = {"peak_mib": peaks, "seconds a step": medians}
    for ours, theirs in COMPARED:
        if theirs not in competitors:
            continue
        ratios = []
        for our_seconds, their_seconds in zip(seconds[ours], seconds[theirs]):
            ratios.append(round(their_seconds / our_seconds, 2))
        differences = []
        for our_loss, their_loss in zip(first_losses[ours], first_losses[theirs]):
            differences.append(abs(our_loss - their_loss))
        figures[f"{ours}: times the speed of {theirs}"] = summary(ratios)
        figures[f"{ours}: losses off those of {theirs}"] = max(differences)
    return figures


def summary(ratios):
    return {"median": statistics.median(ratios), "rounds": sorted(ratios)}


def train(names, gpu, rounds=5):
    """Blocks of training steps by each competitor in turn.

    The same model from the same weights on the same batches.
    """
    competitors = COMPETITORS
    if not is_installed("torch"):
        print("PyTorch is not installed (pip install torch): only plain MLX is compared with.")
        competitors = OF_MLX
    figures = {}
    for name in names:
        figures[name] = compare(name, competitors, gpu, rounds)
        print(name)
        for key, value in figures[name].items():
            print(f"    {key:<56} {value}", flush=True)
    return figures


def read_speed():
    """GB/s at which NumPy sums 1 GB of float32, the better of one and two threads."""
    import numpy as np

    array = np.ones(250_000_000, np.float32)
    seconds = []
    with ThreadPoolExecutor(2) as threads:
        for shares in ([array], np.split(array, 2)):
            began = time.perf_counter()
            list(threads.map(np.sum, shares))
            seconds.append(time.perf_counter() - began)
    return array.nbytes / 1e9 / min(seconds)


def make(vocab_size=32000, **values):
    """A fresh model and its flags."""
    import main

    flags = main.resolve(argparse.Namespace(**main.DEFAULTS | values))
    model = main.LanguageModel(main.make_config(flags, vocab_size))
    main.init_weights(model, 0)
    return model, flags


def speed(model, flags, rows, count):
    """Steps a second of `count`, after a prompt of three tokens and a warm-up."""
    import main
    from extras.decode import BatchDecoder

    if rows == 1:
        steps = main.Decoder(model, [1, 2, 3]).generate(count + 3, flags, 0)
    else:
        texts = [[1, 2, 3] for _ in range(rows)]
        steps = BatchDecoder(model, texts).generate(count + 3, flags, range(rows))
    for _ in range(3):
        next(steps)
    began = time.perf_counter()
    list(steps)
    return count / (time.perf_counter() - began)


THEIRS = """
import sys, time, torch
from transformers import AutoModelForCausalLM
device = sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).to(device)
prompt = torch.tensor([[1, 2, 3]]).to(device)
options = dict(do_sample=True, temperature=0.5, top_k=50, pad_token_id=0, eos_token_id=None)
for line in sys.stdin:
    count = int(line)
    began = time.perf_counter()
    model.generate(prompt, min_new_tokens=count, max_new_tokens=count, **options)
    print(time.perf_counter() - began, flush=True)
"""


def generate(gpu, rounds=5, count=100):
    """Sampling one text beside transformers' generate, the same weights, by turns."""
    import main
    from datasets import ByteTokenizer
    from extras.huggingface import export_model

    main.use_device(gpu)
    shapes = {
        "10M": dict(vocab_size=10000, dim=256, num_blocks=8, num_heads=8),
        "110M": dict(vocab_size=32000, dim=768, num_blocks=12, num_heads=12),
    }
    figures = {}
    for name, shape in shapes.items():
        model, flags = make(**shape, context_size=256, mlp="swiglu")
        with tempfile.TemporaryDirectory() as folder:
            export_model(model, ByteTokenizer(), folder, None)
            worker = subprocess.Popen(
                [sys.executable, "-c", THEIRS, folder, "cuda" if gpu else "cpu"],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            our_speeds = []
            their_speeds = []
            for _ in range(rounds + 1):
                print(count, file=worker.stdin, flush=True)
                their_seconds = float(worker.stdout.readline())
                their_speeds.append(count / their_seconds)
                our_speeds.append(speed(model, flags, 1, count))
            worker.communicate()
        del our_speeds[0], their_speeds[0]  # of warming up
        ratios = []
        for ours, theirs in zip(our_speeds, their_speeds):
            ratios.append(round(ours / theirs, 2))
        medians = [statistics.median(our_speeds), statistics.median(their_speeds)]
        figures[name] = {
            "times transformers' speed": summary(ratios),
            "tokens/s": [round(median, 1) for median in medians],
        }
    return figures


def uncached_speed(model, count):
    """Tokens a second, each by a pass over all of the text."""
    import mlx.core as mx

    text = [1, 2, 3]
    began = time.perf_counter()
    for _ in range(count):
        logits = model(mx.array([text]))
        text.append(logits[0, -1].argmax().item())
    return count / (time.perf_counter() - began)


def decode(gpu, rounds=5):
    """Tokens a second of sampling, each figure beside what it is to be compared with, in turn."""
    import main
    from mlx.utils import tree_flatten

    main.use_device(gpu)
    small = make(dim=512, num_blocks=8, context_size=1024)
    large = make(dim=768, num_heads=12, num_blocks=12, context_size=1024)
    small_model, _ = small
    large_model, _ = large
    parameters = sum(weight.size for _, weight in tree_flatten(large_model.parameters()))
    speed(*small, 1, 8)
    speed(*large, 1, 8)
    speed(*large, 16, 8)

    over_uncached = []
    for _ in range(min(rounds, 3)):
        cached = speed(*small, 1, 512)
        over_uncached.append(round(cached / uncached_speed(small_model, 512), 1))
    shares_of_reading = []
    gains_of_many = []
    speeds = []
    for _ in range(rounds):
        read = read_speed()  # GB/s
        one = speed(*large, 1, 64)
        many = 16 * speed(*large, 16, 32)
        shares_of_reading.append(round(one * parameters * 4e-9 / read, 2))
        gains_of_many.append(round(many / one, 1))
        speeds.append([round(read, 1), round(one, 1), round(many, 1)])
    return {
        "512 tokens, 8 blocks of dim 512: times the speed without a cache": summary(over_uncached),
        f"{parameters:,} parameters: share of the memory's read speed": summary(shares_of_reading),
        "16 texts: times the tokens of one": summary(gains_of_many),
        "GB/s read by NumPy, tokens/s of one text, of 16": speeds,
    }


def measure(flags):
    """The figures of the part of this program that the flags name."""
    if flags.part == "data":
        return data(os.path.abspath(flags.mirror))
    if flags.part == "decode":
        return decode(flags.gpu)
    if flags.part == "generate":
        return generate(flags.gpu)
    names = [flags.shape] if flags.shape else SHAPES
    return train(names, flags.gpu)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=["train", "decode", "generate", "data", "work"])
    parser.add_argument(
        "--mirror",
        help="address or folder that holds ptb/ptb.train.txt and the others",
    )
    parser.add_argument("--shape", choices=list(SHAPES), help="one of the models (default: all)")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--competitor", choices=COMPETITORS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.part == "work":
        sys.exit(work(flags.competitor, SHAPES[flags.shape], flags.gpu))
    if flags.part == "data" and not flags.mirror:
        parser.error("data needs --mirror")
    figures = measure(flags)
    if flags.part != "train":  # which has printed them one by one
        for name, figure in figures.items():
            print(f"{name:<36} {figure}")
    print(json.dumps(figures))
