"""Measures, and asserts nothing; the last line is JSON.

    python tests/benchmark.py train               training steps in float32 and in bfloat16
    python tests/benchmark.py decode              sampling of one text and of sixteen
    python tests/benchmark.py generate            sampling, beside transformers' generate
    python tests/benchmark.py data --mirror DIR   text to tokens; DIR holds ptb/ptb.train.txt etc.

train: beside PyTorch's steps (pip install torch), in float32 and under bfloat16 autocast, eager and
compiled, and beside plain MLX's. decode: beside no cache, the memory's speed, and one text at a
time. generate needs torch and transformers.

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
# Taken before main.py changes how threads wait, which would slow other programs down.
ENVIRONMENT = dict(os.environ)
TORCH_GPU = "mps" if sys.platform == "darwin" else "cuda"


def in_own_process(function, *arguments):
    """What `function(*arguments)`, of this file, returns in a fresh Python."""
    code = f"import benchmark, json; print(json.dumps(benchmark.{function}(*{arguments!r})))"
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def peak_mib():
    """The peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        peak //= 1024  # there in bytes
    return round(peak / 1024)


def summary(ratios):
    return {"median": statistics.median(ratios), "rounds": sorted(ratios)}


def settled(**values):
    """The flags of an empty command line, with these values instead of the defaults."""
    import main

    return main.settle(values)


# ---- Data ---------------------------------------------------------------------------------------


def load(name, data_dir, options):
    import datasets

    began = time.perf_counter()
    dataset = datasets.load_dataset(name, data_dir, **options)
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 3),
        "tokens": len(dataset.train.tokens),
        "peak_mib": peak_mib(),
    }


def bpe_speed(path, data_dir):
    """MB/s of encoding by write_tokens and by the package's own encode_batch, alternately."""
    import datasets

    options = {"tokenizer": "bpe", "vocab_size": 8000}
    tokenizer = datasets.load_dataset("ptb", data_dir, **options).tokenizer
    texts = Path(path).read_text().splitlines(keepends=True)
    size = os.path.getsize(path)
    whole = datasets.Span(path, 0, size)
    ratios = []
    speeds = []  # of the package, in MB/s
    for _ in range(5):
        began = time.perf_counter()
        tokenizer.package.encode_batch(texts, add_special_tokens=False)
        package_seconds = time.perf_counter() - began
        began = time.perf_counter()
        datasets.write_tokens([whole], tokenizer, Path(data_dir) / "bpe.tokens")
        ratios.append(round(package_seconds / (time.perf_counter() - began), 2))
        speeds.append(size / 1e6 / package_seconds)
    return {
        "speed_over_package": sorted(ratios),
        "package_mb_s": round(statistics.median(speeds), 1),
    }


def anonymous_mib(arguments):
    """The most anonymous memory (RssAnon) of a training run: pages of a memory map do not count."""
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            most = max(most, int(status.partition("RssAnon:")[2].split()[0]))
        except (OSError, IndexError, ValueError):
            pass  # it has just begun or ended
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"status {process.returncode}: {' '.join(command)}")
    return round(most / 1024)


SMALL = "--dim 64 --num_heads 2 --num_blocks 2 --num_iters 30 --max_tokens 5 --tokenizer word"


def data(mirror, copies):
    """Speed and memory of datasets.py, from raw text to tokens.

    copies: of Penn Treebank in a large text; 111 have the size of WikiText-103.
    """
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        data_dir = os.path.join(folder, "data")
        ptb = {"mirror": mirror}
        in_own_process("load", "ptb", data_dir, ptb | {"tokenizer": "byte"})  # brings the files
        figures["ptb words"] = in_own_process("load", "ptb", data_dir, ptb)
        train = Path(folder, "train.txt")
        shutil.copy(Path(data_dir, "ptb", "ptb.train.txt"), train)
        large = Path(folder, "large.txt")
        with large.open("wb") as out:
            for _ in range(copies):
                out.write(train.read_bytes())
        size = large.stat().st_size / 1e6
        for kind in ("word", "byte"):
            own = {"text": [str(large)], "valid_text": [str(train)], "tokenizer": kind}
            name = f"{size:.0f} MB by {kind}"
            cold = in_own_process("load", "text", data_dir, own)
            cold["mb_s"] = round(size / cold["seconds"], 1)
            figures[name] = cold
            figures[f"{name}, warm"] = in_own_process("load", "text", data_dir, own)
        figures["bpe"] = in_own_process("bpe_speed", str(train), data_dir)
        texts = {
            "ptb": ["--dataset", "ptb", "--mirror", mirror],
            "large": ["--text", str(large), "--valid_text", str(train)],
        }
        folders = ["--save_dir", os.path.join(folder, "runs"), "--data_dir", data_dir]
        for name, text in texts.items():
            line = [*text, *SMALL.split(), "--new_model", *folders]
            figures[f"training on {name}: RssAnon MiB"] = anonymous_mib(line)
    return figures


# ---- Training -----------------------------------------------------------------------------------

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

    vocab_size, dim, heads, blocks, context = shape[:5]
    d = dim // heads
    device = TORCH_GPU if gpu else "cpu"
    if gpu:
        torch.set_float32_matmul_precision("high")  # TF32, as MLX's
    parameters = {}
    for name, weight in weights.items():
        parameters[name] = torch.nn.Parameter(torch.tensor(weight, device=device))
    speeds = 10000 ** (-torch.arange(0, d, 2) / d)
    angles = torch.outer(torch.arange(context), speeds)
    cos = torch.cat([angles.cos(), angles.cos()], -1).to(device)  # [L, d]
    sin = torch.cat([angles.sin(), angles.sin()], -1).to(device)
    matrices = [each for each in parameters.values() if each.ndim > 1]
    vectors = [each for each in parameters.values() if each.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 1e-5},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.99), fused=True)

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def weight_of(name):
        return parameters[f"{name}.weight"]

    def normalize(x, name):
        return F.rms_norm(x, (dim,), weight_of(name), 1e-5)

    def attend(x, layer):
        B, L, D = x.shape
        queries, keys, values = [
            F.linear(x, weight_of(f"{layer}.{name}_proj")).view(B, L, heads, d).transpose(1, 2)
            for name in "qkv"
        ]
        attended = F.scaled_dot_product_attention(
            rotate(queries), rotate(keys), values, is_causal=True
        )
        joined = attended.transpose(1, 2).reshape(B, L, D)
        return F.linear(joined, weight_of(f"{layer}.o_proj"))

    def transform(x, layer):
        up = F.linear(x, weight_of(f"{layer}.up_proj"))
        return F.linear(F.relu(up).square(), weight_of(f"{layer}.down_proj"))

    def model(tokens):
        hidden = F.embedding(tokens, weight_of("model.embed_tokens"))
        for i in range(blocks):
            layer = f"model.layers.{i}"
            x = normalize(hidden, f"{layer}.input_layernorm")
            hidden = hidden + attend(x, f"{layer}.self_attn")
            x = normalize(hidden, f"{layer}.post_attention_layernorm")
            hidden = hidden + transform(x, f"{layer}.mlp")
        hidden = normalize(hidden, "model.norm")
        return F.linear(hidden, weight_of("model.embed_tokens"))

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
    """main.py as it is without extras/: its plain functions and one stream, on the fast BLAS."""
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

    vocab_size, dim, heads, blocks, context, batch_size = shape[:6]
    main.use_device(gpu)
    flags = main.settle(
        dict(
            dim=dim,
            num_heads=heads,
            num_blocks=blocks,
            context_size=context,
            batch_size=batch_size,
            dtype=dtype,
        )
    )
    model = main.LanguageModel(main.make_config(flags, vocab_size))
    arrays = [(name, mx.array(weight)) for name, weight in weights.items()]
    model.update(tree_unflatten(arrays))
    optimizer = main.make_optimizer(model, flags)
    train_step = main.make_step(model, optimizer, flags)
    dropout = main.draw_dropout(0, batch_size, flags)  # its rate is 0

    def step(batch):
        metrics = train_step(mx.array(batch[:, :-1]), mx.array(batch[:, 1:]), *dropout)
        return metrics["loss"].item()

    return step


def draw_weights(shape, random):
    """Weights of a model of this shape, {name: array}."""
    import numpy as np

    vocab_size, dim, _, blocks = shape[:4]
    shapes = {"model.embed_tokens": (vocab_size, dim), "model.norm": (dim,)}
    for i in range(blocks):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm"] = (dim,)
        shapes[f"{layer}.post_attention_layernorm"] = (dim,)
        for name in "qkvo":
            shapes[f"{layer}.self_attn.{name}_proj"] = (dim, dim)
        shapes[f"{layer}.mlp.up_proj"] = (4 * dim, dim)
        shapes[f"{layer}.mlp.down_proj"] = (dim, 4 * dim)
    weights = {}
    for name, size in shapes.items():
        if len(size) == 1:
            weight = np.ones(size)
        else:
            weight = random.normal(0, 0.02, size)
        weights[f"{name}.weight"] = weight.astype(np.float32)
    return weights


def work(competitor, shape, gpu):
    """Reads numbers of steps from stdin; answers each with a line of JSON.

    It holds the seconds they took, their losses, and the peak memory in MiB.
    """
    kind, dtype = competitor.split()
    import numpy as np

    random = np.random.default_rng(0)
    weights = draw_weights(shape, random)
    vocab_size, _, _, _, context, batch_size = shape[:6]
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


OURS = ["main float32", "main bfloat16", "plain float32"]
PYTORCH = ["eager float32", "eager bfloat16", "compiled float32", "compiled bfloat16"]
COMPARED = [  # whose speed is divided by whose
    ("main float32", "eager float32"),
    ("main float32", "compiled float32"),
    ("main bfloat16", "eager bfloat16"),
    ("main bfloat16", "compiled bfloat16"),
    ("main bfloat16", "main float32"),
    ("main float32", "plain float32"),
]


class Worker:
    """A competitor in a process of its own, see `work`."""

    def __init__(self, competitor, shape, gpu):
        command = [sys.executable, __file__, "work", "--shape", shape, "--competitor", competitor]
        if gpu:
            command.append("--gpu")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True, **pipes)

    def run(self, steps):
        """The seconds that these steps took, their losses, and the peak memory in MiB."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def train(names, gpu, rounds=5):
    """Blocks of training steps by each competitor in turn.

    All train the same model from the same weights on the same batches.
    """
    competitors = OURS + PYTORCH
    command = [sys.executable, "-c", "import torch"]
    if subprocess.run(command, capture_output=True).returncode:
        print("PyTorch is not installed (pip install torch): only plain MLX is compared with.")
        competitors = OURS
    figures = {}
    for name in names:
        workers = {each: Worker(each, name, gpu) for each in competitors}
        figures[name] = compare(workers, SHAPES[name][-1], rounds)
        print(name)
        for key, value in figures[name].items():
            print(f"    {key:<56} {value}", flush=True)
    return figures


def compare(workers, steps, rounds):
    """The figures of these workers, {competitor: Worker}, which end."""
    firsts = {}  # losses
    for competitor, worker in workers.items():
        _, firsts[competitor], _ = worker.run(20)  # compiles, warms up
    seconds = {competitor: [] for competitor in workers}  # per step
    peaks = {}
    for _ in range(rounds):
        for competitor, worker in workers.items():
            taken, _, peaks[competitor] = worker.run(steps)
            seconds[competitor].append(taken / steps)
    for worker in workers.values():
        worker.end()
    medians = {each: round(statistics.median(taken), 4) for each, taken in seconds.items()}
    figure = {"peak_mib": peaks, "seconds a step": medians}
    for ours, theirs in COMPARED:
        if theirs not in workers:
            continue
        ratios = [round(b / a, 2) for a, b in zip(seconds[ours], seconds[theirs])]
        figure[f"{ours}: times the speed of {theirs}"] = summary(ratios)
        differences = [abs(a - b) for a, b in zip(firsts[ours], firsts[theirs])]
        figure[f"{ours}: losses off those of {theirs}"] = max(differences)
    return figure


# ---- Sampling -----------------------------------------------------------------------------------


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

    flags = settled(**values)
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


def whole_speed(model, flags, count):
    """Tokens a second of `count`, from the prompt of three tokens on, with all that precedes."""
    import main

    began = time.perf_counter()
    list(main.Decoder(model, [1, 2, 3]).generate(count, flags, 0))
    return count / (time.perf_counter() - began)


def uncached_speed(model, count):
    """Tokens a second if each pass reads the whole text again."""
    import mlx.core as mx

    text = [1, 2, 3]
    began = time.perf_counter()
    for _ in range(count):
        text.append(model(mx.array([text]))[0, -1].argmax().item())
    return count / (time.perf_counter() - began)


THEIRS = """
import sys, time, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).to(sys.argv[2])
options = dict(do_sample=True, temperature=0.5, top_k=50, pad_token_id=0, eos_token_id=None)
for line in sys.stdin:
    count = int(line)
    prompt = torch.tensor([[1, 2, 3]]).to(sys.argv[2])
    began = time.perf_counter()
    model.generate(prompt, min_new_tokens=count, max_new_tokens=count, **options)
    print(time.perf_counter() - began, flush=True)
"""
GENERATED = {
    "10M": dict(vocab_size=10000, dim=256, num_blocks=8, num_heads=8),
    "110M": dict(vocab_size=32000, dim=768, num_blocks=12, num_heads=12),
}


def generate(gpu, rounds=5, count=100):
    """Sampling one text beside transformers' generate, with the same weights, by turns."""
    import main
    from datasets import ByteTokenizer
    from extras.huggingface import export_model

    main.use_device(gpu)
    figures = {}
    for name, shape in GENERATED.items():
        model, flags = make(**shape, context_size=256, mlp="swiglu")
        results = []
        with tempfile.TemporaryDirectory() as folder:
            export_model(model, ByteTokenizer(), folder, None)
            command = [sys.executable, "-c", THEIRS, folder, TORCH_GPU if gpu else "cpu"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            worker = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, **pipes)
            for _ in range(rounds + 1):
                worker.stdin.write(f"{count}\n")
                worker.stdin.flush()
                theirs = count / float(worker.stdout.readline())
                results.append((whole_speed(model, flags, count), theirs))
            worker.communicate()
        del results[0]  # warms up
        ratios = [round(ours / theirs, 2) for ours, theirs in results]
        medians = [round(statistics.median(column), 1) for column in zip(*results)]
        figures[name] = {"times transformers' speed": summary(ratios), "tokens/s": medians}
    return figures


def decode(gpu, rounds=5):
    """Tokens a second of sampling, each figure beside what it is to be compared with, in turn."""
    import main

    main.use_device(gpu)
    small = make(dim=512, num_blocks=8, context_size=1024)
    large = make(dim=768, num_heads=12, num_blocks=12, context_size=1024)
    large_model, _ = large
    size = 4 * main.count_parameters(large_model.parameters()) / 1e9  # GB
    for model, rows in ((small, 1), (large, 1), (large, 16)):
        speed(*model, rows, 8)  # compiles
    cached = []
    for _ in range(min(rounds, 3)):
        small_model, _ = small
        ratio = speed(*small, 1, 512) / uncached_speed(small_model, 512)
        cached.append(round(ratio, 1))
    shares = []
    gains = []
    rows = []
    for _ in range(rounds):
        read = read_speed()
        one = speed(*large, 1, 64)
        sixteen = 16 * speed(*large, 16, 32)
        shares.append(round(one * size / read, 2))
        gains.append(round(sixteen / one, 1))
        rows.append([round(read, 1), round(one, 1), round(sixteen, 1)])
    return {
        "512 tokens, 8 blocks of dim 512: times the speed without a cache": summary(cached),
        f"weights of {size:.2f} GB: share of the memory's read speed": summary(shares),
        "16 texts: times the tokens of one": summary(gains),
        "GB/s read by NumPy, tokens/s of one text, of 16": rows,
    }


def main_of_benchmark():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["train", "decode", "generate", "data", "work"])
    parser.add_argument("--mirror", help="address or folder that holds ptb/ptb.train.txt etc.")
    parser.add_argument("--copies", type=int, default=111, help="of ptb in the large text of data")
    parser.add_argument("--shape", choices=list(SHAPES), help="one of the models (default: all)")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--competitor", choices=OURS + PYTORCH, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.part == "work":
        work(flags.competitor, SHAPES[flags.shape], flags.gpu)
        return
    if flags.part == "data" and not flags.mirror:
        parser.error("data needs --mirror")
    if flags.part == "train":
        figures = train([flags.shape] if flags.shape else SHAPES, flags.gpu)
    else:
        if flags.part == "data":
            mirror = flags.mirror
            if os.path.isdir(mirror):  # else an address
                mirror = os.path.abspath(mirror)
            figures = data(mirror, flags.copies)
        elif flags.part == "decode":
            figures = decode(flags.gpu)
        else:
            figures = generate(flags.gpu)
        for name, figure in figures.items():
            print(f"{name:<36} {figure}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main_of_benchmark()
