"""Measures, and asserts nothing: `python tests/benchmark.py data --mirror DIR` (DIR holds ptb/ptb.train.txt, …).

The last line is JSON. Each figure is measured in a process of its own, so that peak memory is that of the one thing.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=["data"])
    parser.add_argument("--mirror", required=True, help="address or folder that holds ptb/ptb.train.txt and the others")
    flags = parser.parse_args()
    figures = data(os.path.abspath(flags.mirror))
    for name, figure in figures.items():
        print(f"{name:<36} {figure}")
    print(json.dumps(figures))
