"""Measures, and asserts nothing; the last line is JSON.

    python tests/benchmark.py train                  training steps in float32 and in bfloat16, beside PyTorch's (pip install torch)
                                                     in float32 and under bfloat16 autocast, eager and compiled, and beside plain MLX's
    python tests/benchmark.py decode                 sampling: beside no cache, the memory's speed, and one text at a time
    python tests/benchmark.py generate               the same beside generate of transformers (pip install torch transformers)
    python tests/benchmark.py data --mirror DIR      text to tokens; DIR holds ptb/ptb.train.txt and the others

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
    """What `function(*arguments)` returns, computed in a fresh Python, with its peak resident memory in MiB."""
    code = f"import benchmark, json; print(json.dumps(benchmark.{function}(*{arguments!r})))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def peak_mib():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def load(name, save_dir, options):
    import datasets

    began = time.perf_counter()
    dataset = datasets.load_dataset(name, save_dir, say=lambda line: None, **options)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 3), "tokens": len(dataset.train.tokens), "peak_mib": peak_mib()}


def bpe_speed(path, save_dir):
    """MB/s of encoding by write_tokens and by the package's own encode_batch on the same lines, alternately."""
    import datasets

    tokenizer = datasets.load_dataset("ptb", save_dir, tokenizer="bpe", vocab_size=8000).tokenizer
    texts, size, ratios = Path(path).read_text().splitlines(keepends=True), os.path.getsize(path) / 1e6, []
    for _ in range(5):
        began = time.perf_counter()
        tokenizer.package.encode_batch(texts, add_special_tokens=False)
        package = time.perf_counter() - began
        began = time.perf_counter()
        datasets.write_tokens([datasets.Span(path, 0, os.path.getsize(path))], tokenizer, Path(save_dir) / "bpe.tokens")
        ratios.append((package / (time.perf_counter() - began), size / package))
    ratios.sort()
    return {"speed_over_package": [round(ratio, 2) for ratio, _ in ratios], "package_mb_s": round(statistics.median(mb for _, mb in ratios), 1)}


def anonymous_mib(arguments):
    """The most anonymous memory (RssAnon) of a training run, in MiB: pages of a memory map do not count."""
    process = subprocess.Popen([sys.executable, str(ROOT / "main.py"), *arguments], stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            most = max(most, int(status.partition("RssAnon:")[2].split()[0]))
        except (OSError, IndexError, ValueError):
            pass
        time.sleep(0.02)
    return round(most / 1024)


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
        own = {"text": [str(large)], "valid_text": [str(train)]}
        for name, options in (("word", {"tokenizer": "word"}), ("byte", {"tokenizer": "byte"})):
            cold = figures[f"{size:.0f} MB by {name}"] = in_own_process("load", "text", folder, own | options)
            cold["mb_s"] = round(size / cold["seconds"], 1)
            figures[f"{size:.0f} MB by {name}, warm"] = in_own_process("load", "text", folder, own | options)
        figures["bpe"] = in_own_process("bpe_speed", str(train), folder)
        small = "--dim 64 --num_heads 2 --num_blocks 2 --num_iters 30 --max_tokens 5 --tokenizer word --new_model --save_dir".split()
        lines = {"ptb": ["--dataset", "ptb", "--mirror", mirror], "large": ["--text", str(large), "--valid_text", str(train)]}
        for name, line in lines.items():
            figures[f"training on {name}: RssAnon MiB"] = anonymous_mib([*line, *small, folder])
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

    vocab_size, dim, heads, blocks, context = shape[:5]
    device = "cuda" if gpu else "cpu"
    parameters = {name: torch.nn.Parameter(torch.tensor(weight, device=device)) for name, weight in weights.items()}
    angles = torch.outer(torch.arange(context), 10000 ** (-torch.arange(0, dim // heads, 2) / (dim // heads)))
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(device) for f in (torch.cos, torch.sin))
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 1e-5}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=3e-4, betas=(0.9, 0.99), fused=True)  # fmt: skip

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def model(tokens):
        hidden = F.embedding(tokens, parameters["model.embed_tokens.weight"])
        for i in range(blocks):
            def linear(x, name, i=i):
                return F.linear(x, parameters[f"model.layers.{i}.{name}.weight"])

            def norm(x, name, i=i):
                return F.rms_norm(x, (dim,), parameters[f"model.layers.{i}.{name}.weight"], 1e-5)

            B, L, D = hidden.shape
            x = norm(hidden, "input_layernorm")
            q, k, v = (linear(x, f"self_attn.{name}_proj").view(B, L, heads, -1).transpose(1, 2) for name in "qkv")
            attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            hidden = hidden + linear(attended.transpose(1, 2).reshape(B, L, D), "self_attn.o_proj")
            x = norm(hidden, "post_attention_layernorm")
            hidden = hidden + linear(F.relu(linear(x, "mlp.up_proj")).square(), "mlp.down_proj")
        hidden = F.rms_norm(hidden, (dim,), parameters["model.norm.weight"], 1e-5)
        return F.linear(hidden, parameters["model.embed_tokens.weight"])

    if kind == "compiled":
        model = torch.compile(model)

    def step(batch):
        batch = torch.from_numpy(batch).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def import_plain_main():
    """main.py as it is without extras/: its plain loss, attention and one stream, but on the same fast BLAS."""
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
    values = dict(dim=dim, num_heads=heads, num_blocks=blocks, context_size=context, batch_size=batch_size, dtype=dtype)
    flags = main.resolve(argparse.Namespace(**main.DEFAULTS | values))
    model = main.LanguageModel(main.make_config(flags, vocab_size))
    model.update(tree_unflatten([(name, mx.array(weight)) for name, weight in weights.items()]))
    optimizer = main.make_optimizer(model, flags)
    train_step = main.make_step(model, optimizer, flags)

    def step(batch):
        loss, _ = train_step(mx.array(batch[:, :-1]), mx.array(batch[:, 1:]))
        return loss.item()

    return step


def work(competitor, shape, gpu):
    """Reads numbers of steps from stdin; answers each with the seconds it took, the losses, and the peak memory in MiB."""
    kind, dtype = competitor.split()
    if kind in ("main", "plain"):
        import extras.fast  # before NumPy, for which it chooses kernels
    import numpy as np

    random = np.random.default_rng(0)
    vocab_size, dim, _, blocks, context, batch_size = shape[:6]
    shapes = {"model.embed_tokens": (vocab_size, dim), "model.norm": (dim,)}
    for i in range(blocks):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm": (dim,), layer + "post_attention_layernorm": (dim,)}
        shapes |= {layer + f"self_attn.{name}_proj": (dim, dim) for name in "qkvo"}
        shapes |= {layer + "mlp.up_proj": (4 * dim, dim), layer + "mlp.down_proj": (dim, 4 * dim)}
    weights = {f"{name}.weight": np.ones(s) if len(s) < 2 else random.normal(0, 0.02, s) for name, s in shapes.items()}
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    make_step = mlx_step if kind in ("main", "plain") else torch_step
    step = make_step(kind, shape, gpu, dtype, weights)
    for line in sys.stdin:
        batches = [random.integers(0, vocab_size, (batch_size, context + 1)) for _ in range(int(line))]
        began = time.perf_counter()
        losses = [step(batch) for batch in batches]
        print(json.dumps([time.perf_counter() - began, losses, peak_mib()]), flush=True)


COMPETITORS = ["main float32", "main bfloat16", "plain float32"]
COMPETITORS += ["eager float32", "eager bfloat16", "compiled float32", "compiled bfloat16"]  # PyTorch's
COMPARED = [  # whose speed is divided by whose
    ("main float32", "eager float32"),
    ("main float32", "compiled float32"),
    ("main bfloat16", "eager bfloat16"),
    ("main bfloat16", "compiled bfloat16"),
    ("main bfloat16", "main float32"),
    ("main float32", "plain float32"),
]


def train(names, gpu, rounds=5):
    """Blocks of training steps by each competitor in turn, the same model from the same weights on the same batches."""
    figures, competitors = {}, COMPETITORS
    if subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode:
        print("PyTorch is not installed (pip install torch): only plain MLX is compared with.")
        competitors = COMPETITORS[:3]
    for name in names:
        workers = {}
        for competitor in competitors:
            arguments = [sys.executable, __file__, "work", "--shape", name, "--competitor", competitor]
            if gpu:
                arguments.append("--gpu")
            workers[competitor] = subprocess.Popen(arguments, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True)

        def run(worker, steps):
            worker.stdin.write(f"{steps}\n")
            worker.stdin.flush()
            return json.loads(worker.stdout.readline())

        steps = SHAPES[name][-1]
        firsts = {competitor: run(worker, 20)[1] for competitor, worker in workers.items()}  # compiles, warms up
        seconds = {competitor: [] for competitor in competitors}
        peaks = {}
        for _ in range(rounds):
            for competitor, worker in workers.items():
                taken, _, peaks[competitor] = run(worker, steps)
                seconds[competitor].append(taken / steps)
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
        figure = figures[name] = {"peak_mib": peaks}
        figure["seconds a step"] = {competitor: round(statistics.median(taken), 4) for competitor, taken in seconds.items()}
        for ours, theirs in COMPARED:
            if theirs not in seconds:
                continue
            ratios = sorted(round(b / a, 2) for a, b in zip(seconds[ours], seconds[theirs]))
            figure[f"{ours}: times the speed of {theirs}"] = {"median": statistics.median(ratios), "rounds": ratios}
            figure[f"{ours}: losses off those of {theirs}"] = max(abs(a - b) for a, b in zip(firsts[ours], firsts[theirs]))
        print(name)
        for key, value in figure.items():
            print(f"    {key:<56} {value}", flush=True)
    return figures


def read_speed():
    """GB/s at which NumPy sums 1 GB of float32, the better of one and two threads."""
    import numpy as np

    array, seconds = np.ones(250_000_000, np.float32), []
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
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).to(sys.argv[2])
options = dict(do_sample=True, temperature=0.5, top_k=50, pad_token_id=0, eos_token_id=None)
for line in sys.stdin:
    began = time.perf_counter()
    model.generate(torch.tensor([[1, 2, 3]]).to(sys.argv[2]), min_new_tokens=int(line), max_new_tokens=int(line), **options)
    print(time.perf_counter() - began, flush=True)
"""


def generate(gpu, rounds=5, count=100):
    """Sampling one text beside transformers' generate, the same weights, by turns."""
    import main
    from datasets import ByteTokenizer
    from extras.huggingface import export_model

    main.use_device(gpu)
    figures, shapes = {}, {"10M": dict(dim=256, num_blocks=8, num_heads=8), "110M": dict(dim=768, num_blocks=12, num_heads=12)}
    for name, shape in shapes.items():
        model, flags = make(10000 if name == "10M" else 32000, **shape, context_size=256, mlp="swiglu")
        with tempfile.TemporaryDirectory() as folder:
            export_model(model, ByteTokenizer(), folder, None)
            command = [sys.executable, "-c", THEIRS, folder, "cuda" if gpu else "cpu"]
            worker = subprocess.Popen(command, cwd=folder, stdin=-1, stdout=-1, text=True)
            results = []
            for _ in range(rounds + 1):
                worker.stdin.write(f"{count}\n")
                worker.stdin.flush()
                theirs = count / float(worker.stdout.readline())
                results.append((speed(model, flags, 1, count), theirs))
            worker.communicate()
        ratios = sorted(round(ours / theirs, 2) for ours, theirs in results[1:])
        ours, theirs = (round(statistics.median(column), 1) for column in zip(*results[1:]))
        figures[name] = {"times transformers' speed": {"median": statistics.median(ratios), "rounds": ratios}, "tokens/s": [ours, theirs]}
    return figures


def decode(gpu, rounds=5):
    """Tokens a second of sampling, each figure beside what it is to be compared with, in turn."""
    import main
    import mlx.core as mx
    from mlx.utils import tree_flatten

    main.use_device(gpu)

    def uncached(model, count):
        text, began = [1, 2, 3], time.perf_counter()
        for _ in range(count):
            text.append(model(mx.array([text]))[0, -1].argmax().item())
        return count / (time.perf_counter() - began)

    def summary(ratios):
        return {"median": statistics.median(ratios), "rounds": sorted(ratios)}

    small, large = make(dim=512, num_blocks=8, context_size=1024), make(dim=768, num_heads=12, num_blocks=12, context_size=1024)
    parameters = sum(weight.size for _, weight in tree_flatten(large[0].parameters()))
    speed(*small, 1, 8), speed(*large, 1, 8), speed(*large, 16, 8)
    cached = [round(speed(*small, 1, 512) / uncached(small[0], 512), 1) for _ in range(min(rounds, 3))]
    rows = [(read_speed(), speed(*large, 1, 64), speed(*large, 16, 32)) for _ in range(rounds)]
    return {
        "512 tokens, 8 blocks of dim 512: times the speed without a cache": summary(cached),
        f"{parameters:,} parameters: share of the memory's read speed": summary(
            [round(one * parameters * 4e-9 / read, 2) for read, one, _ in rows]
        ),
        "16 texts: times the tokens of one": summary([round(16 * many / one, 1) for _, one, many in rows]),
        "GB/s read by NumPy, tokens/s of one text, of 16": [[round(r, 1), round(a, 1), round(16 * b, 1)] for r, a, b in rows],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "decode", "generate", "data", "work"])
    parser.add_argument("--mirror", help="address or folder that holds ptb/ptb.train.txt and the others")
    parser.add_argument("--shape", choices=list(SHAPES), help="one of the models (default: all)")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--competitor", choices=COMPETITORS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.part == "work":
        sys.exit(work(flags.competitor, SHAPES[flags.shape], flags.gpu))
    if flags.part == "data" and not flags.mirror:
        parser.error("data needs --mirror")
    if flags.part != "train":
        parts = {"data": lambda: data(os.path.abspath(flags.mirror)), "decode": lambda: decode(flags.gpu), "generate": lambda: generate(flags.gpu)}
        figures = parts[flags.part]()
        for name, figure in figures.items():
            print(f"{name:<36} {figure}")
    else:
        figures = train([flags.shape] if flags.shape else SHAPES, flags.gpu)
    print(json.dumps(figures))
