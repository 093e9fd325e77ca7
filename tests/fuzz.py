"""The fuzzer: whatever a stranger's file or server holds, a command ends well, or in one line.

    python tests/fuzz.py --seed 7 --cases 50000 --jobs 2   cases 7-0, 7-1, ... 7-49999
    python tests/fuzz.py --only 7-123                      that one again; keeps its folder
    python tests/fuzz.py --planted                         how soon planted bugs are found

A *case* is decided by its name alone. It makes odd files in a folder of its own: checkpoints (with
right hashes, too), links, logs, tokenizers, Hugging Face folders, YAML, JSON Lines, texts, or the
answers of a server. Then it runs one command on them, in a fork of this process, which has imported
all and computed nothing. Allowed ends are status 0, and status 1 or 2 with a last line on stderr
that the program has worded. Forbidden are

- a traceback, an unworded failure, death by a signal, more than SECONDS of computing, unless the
  start screen announced a step of more than STEP tokens, which a record may ask for;
- more memory than MEMORY beyond this process's, or an allocation that the limit ADDRESSES refuses;
- a file created, changed or deleted where the command has nothing to write: in the home, in a
  folder beside, behind a link, in other runs; what is in such files appearing in the output;
- a character that a terminal acts on, in what goes to one;
- a key that reaches another server, the screen or a file;
- the end of --list, or of training another run, because of a stranger's checkpoint beside it.
"""

import argparse
import base64
import copy
import gc
import gzip
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

try:
    from backports import zstd
except ImportError:
    zstd = None  # .zst files are then something else

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402

import datasets  # noqa: E402
from datasets import CONTROLS  # noqa: E402

# Seconds of computing, some hundred times what a case takes; thrice as long on the clock.
SECONDS = 20
# Tokens of a training step. So many take some seconds in micro-batches of 16.
STEP = 50_000
# Bytes. Models and files are small here: this is room for a header of 100 MB, the most that is
# read, and its copies.
MEMORY = 300 << 20
# Bytes of memory that the machine is said to have. What needs more is refused: a record may name
# any context, and up to four texts, or a text and a draft, remember one.
MACHINE = 64 << 20
# Bytes of addresses beyond this process's. Whoever is refused so much would fill a machine.
ADDRESSES = 4 << 30
CANARY = "CANARY-5d41402abc4b"  # stands in files that no command is to read
KEY = "sk-KEY-7b2fe1"
MOST_PAUSES = 60  # they are skipped, but so many are waiting for ever

# ---- Odd values ---------------------------------------------------------------------------------

DEEP = "@@deep@@"  # becomes brackets in JSON, see `dumps`
HUGE = "@@huge@@"  # becomes a number of 5,000 digits
ESCAPES = ["\x1b]0;owned\x07", "\x1b[2J", "a\nb", "\0", "\r", "\x7f", "\x9b31m", "\x08"]
TEXTS = [
    *ESCAPES,
    *("", "x", " ", "\ud800", "\u2028", "\u202e", "é", "x" * 5000, DEEP, HUGE),
    *("../x", "../good", "../..", "~", "~nobody", "/dev/zero", "/dev/stdin", "/dev/fd/0", "."),
    *("HOME/secret.txt", "BESIDE/secret.txt", "BESIDE", "../../beside/secret.txt", "stranger"),
    *("latest", "best", "*", "[", "{}", "%s%n", "--export", "-x", "nan", "1e999", "auto", "good"),
]
NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 255, 256, 2**16, 2**20, 2**24, 2**31 - 1, 2**31, 2**32, 2**53),
    *(2**63 - 1, 2**63, 2**64, -(2**63), 10**15, 10**400),
    *(0.0, -0.0, 0.5, 1.5, 1e-320, 1e-7, 1e15, 1e30, 1e308, math.inf, -math.inf, math.nan),
    *(None, True, False),
]
COLLECTIONS = [[], {}, [[]], {"a": {}}, {"": None}, [None] * 3, [0] * 4, {"x": "y"}, [[1, 2]]]


def odd_value(chance):
    """Any value of JSON."""
    pool = chance.choice((TEXTS, NUMBERS, NUMBERS, COLLECTIONS))
    return copy.deepcopy(chance.choice(pool))


def near(chance, value):
    """A value of the same type, more likely to be let through."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        powers = [10 ** chance.randrange(1, 12) for _ in range(3)]
        near_float = float(max(-(10**300), min(value, 10**300)))
        changed = [value + 1, value - 1, 2 * value, -value, value // 2, near_float, 1]
        return chance.choice([*changed, *powers])
    if isinstance(value, float):
        return chance.choice([-value, 2 * value, value * 1e6, value / 1e6, 1.0])
    if isinstance(value, str):
        place = chance.randrange(len(value) + 1)
        added = chance.choice(TEXTS)
        return chance.choice([value[:place], value[:place] + added + value[place:], value + added])
    return chance.choice([value * 2, value[:-1], [value]]) if isinstance(value, list) else value


def mutated(chance, tree):
    """JSON data with one change, made in place: of a value, a key, or what there is of them."""
    if not isinstance(tree, (dict, list)) or not tree:
        return near(chance, tree) if chance.random() < 0.4 else odd_value(chance)
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = chance.choice(keys)
    action = chance.random()
    if action < 0.08:
        del tree[key]
    elif action < 0.12 and isinstance(tree, dict):
        name = chance.choice([*TEXTS, *datasets.DATA_FLAGS, "lora_rank", "export", "gpu"])
        tree[name] = odd_value(chance)
    elif action < 0.15 and isinstance(tree, dict):
        tree[str(near(chance, key))] = tree.pop(key)
    elif action < 0.18:
        tree[key] = copy.deepcopy(tree[chance.choice(keys)])
    elif action < 0.2 and isinstance(tree, list):
        tree.append(odd_value(chance))
    else:
        tree[key] = mutated(chance, tree[key])
    return tree


def often_mutated(chance, tree):
    """A copy with one to three changes."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice((1, 1, 2, 3))):
        tree = mutated(chance, tree)
    return tree


def dumps(value):
    """JSON, with all that Python's parser takes besides, as NaN."""
    text = json.dumps(value)
    text = text.replace(f'"{DEEP}"', "[" * 50_000).replace(DEEP, "deep")
    return text.replace(f'"{HUGE}"', "9" * 5000).replace(HUGE, "huge")


def damaged(chance, data):
    """Bytes with some of them changed, lost or added."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = int(chance.random() * (len(data) + 1))
        action = chance.randrange(5)
        if action == 0:
            data[place : place + 1] = chance.randbytes(1)
        elif action == 1:
            del data[place:]
        elif action == 2:
            del data[place : place + chance.randrange(1, 40)]
        elif action == 3:
            data[place:place] = chance.randbytes(chance.randrange(1, 40))
        else:
            odd = (b"\xff", b"\0", b"\x1b[2J", b"\r", b"\n", b"\xed\xa0\x80", b"[", b"{", b"\xef")
            data[place:place] = chance.choice(odd)
    return bytes(data)


# ---- Safetensors, by bytes ----------------------------------------------------------------------

BLANK = b"0" * 40


class Tensors:
    """The texts and arrays of a safetensors file: {name: [dtype, shape, bytes]}."""

    def __init__(self, data):
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        self.texts = header.pop("__metadata__", {})
        self.arrays = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            content = data[8 + length + start : 8 + length + stop]
            self.arrays[name] = [entry["dtype"], entry["shape"], content]

    def header(self):
        """What the header says of the arrays, to be changed before `packed`."""
        entries = {}
        place = 0
        for name, (dtype, shape, content) in self.arrays.items():
            stop = place + len(content)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, stop]}
            place = stop
        return entries

    def packed(self, entries=None):
        """The bytes of a file with this header, or the right one."""
        header = {"__metadata__": self.texts, **(entries or self.header())}
        text = dumps(header).encode()
        content = b"".join(content for _, _, content in self.arrays.values())
        return len(text).to_bytes(8, "little") + text + content


def seal(tensors, record, entries=None):
    """The bytes of a .metadata file with right hashes; record: its text."""
    record_sha1 = hashlib.sha1(record.encode()).hexdigest()
    tensors.texts = {"record": record, "record_sha1": record_sha1, "sha1": BLANK.decode()}
    data = tensors.packed(entries)
    place = data.find(b'"sha1": "' + BLANK) + len('"sha1": "')
    return data[:place] + hashlib.sha1(data).hexdigest().encode() + data[place + 40 :]


WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1, "I64": 8, "BOOL": 1, "F8_E4M3": 1}


def change_array(chance, tensors):
    """Changes one array: what it holds, its shape or type, its name; the file stays well-formed."""
    name = chance.choice(list(tensors.arrays))
    dtype, shape, content = tensors.arrays[name]
    action = chance.randrange(9)
    if action == 0:
        del tensors.arrays[name]
    elif action == 1:
        other = chance.choice(["", "..", "x", f"{name}.x", "weights.x"])
        tensors.arrays[other] = tensors.arrays[name]
    elif action == 2:
        tensors.arrays[name] = [dtype, [*shape, 1], content]
    elif action == 3:
        tensors.arrays[name] = [dtype, shape[::-1], content]
    elif action == 4:
        tensors.arrays[name] = ["F32", [0], b""]
    elif action == 5:
        other = chance.choice(list(WIDTHS))
        count = math.prod(shape)
        tensors.arrays[name] = [other, shape, chance.randbytes(count * WIDTHS[other])]
    elif action == 6:
        tensors.arrays[name] = [dtype, shape, chance.randbytes(len(content))]
    elif action == 7:
        odd = chance.choice((b"\xff", b"\0", b"\x7f", b"\0\0\xc0\x7f"))
        tensors.arrays[name] = [dtype, shape, (odd * len(content))[: len(content)]]
    elif len(content) >= 4:
        number = chance.choice((-1, 2**31 - 1, 0, 1000)).to_bytes(4, "little", signed=True)
        tensors.arrays[name] = [dtype, shape, number + content[4:]]


def changed_header(chance, tensors):
    """A header that says something else of the arrays than there is."""
    entries = tensors.header()
    for _ in range(chance.choice((1, 1, 2))):
        entry = entries[chance.choice(list(entries))]
        if not isinstance(entry, dict) or chance.random() < 0.2:
            mutated(chance, entries)
            continue
        size = chance.choice((0, 1, -1, 2**31, 2**62, 2**63 - 1, 10**18))
        action = chance.randrange(5)
        if action == 0:
            entry["data_offsets"] = [0, size]
        elif action == 1:
            entry["data_offsets"] = [size, size + 4]
        elif action == 2:
            entry["shape"] = chance.choice(([size], [size, size], [-1, -1], [], [0], [2**32] * 2))
        elif action == 3:
            entry["dtype"] = chance.choice([*WIDTHS, "F64", "C64", "", "X", "F4", "U64", 5])
        else:
            mutated(chance, entry)
    return entries


# ---- Templates: what a good run, folder or tokenizer is -----------------------------------------

TEXT = "".join(f"the quick brown fox of line {i} jumps over señor {i * i}\n" for i in range(40))
TINY = "--dim 8 --num_heads 2 --num_blocks 1 --context_size 8 --batch_size 2".split()
TINY += "--steps_per_report 1 --steps_per_eval 2 --eval_tokens 20 --max_tokens 4".split()
# {name: the flags of its run}
RUNS = {
    "good": ["--tokenizer", "byte"],
    "char": ["--tokenizer", "char", "--average", "0.5", "--untie", "--qk_norm", "--ngrams", "3"],
    "word": "--tokenizer word --optimizer muon --conv_size 3 --embedding_scale 4".split(),
    "bpe": ["--tokenizer", "bpe", "--vocab_size", "300", "--mlp", "swiglu", "--num_kv_heads", "1"],
    "file": ["--tokenizer", "TOKENIZER", "--mlp", "swiglu"],
    "lora": ["--init_from", "good", "--lora_rank", "2"],
    "taught": ["--teacher", "good"],
}
PACKAGE = {  # a tokenizer.json
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": 0,
            "content": "<unk>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": {"type": "Fuse"},
    "model": {
        "type": "WordLevel",
        "vocab": {"<unk>": 0, "the": 1, "fox": 2, "quick": 3, "</s>": 4},
        "unk_token": "<unk>",
    },
}


class Templates:
    """Good runs and a Hugging Face folder, made once by the program itself."""

    def __init__(self, folder):
        self.runs = {}  # {name: (record, weights, metadata)}
        text = folder / "text.txt"
        text.write_text(TEXT)
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text(json.dumps(PACKAGE))
        save = folder / "save"
        for name, flags in RUNS.items():
            flags = [str(tokenizer) if each == "TOKENIZER" else each for each in flags]
            before = set(save.glob("*")) if save.exists() else set()
            command = [*TINY, *flags, "--text", text, "--num_iters", 2, "--save_dir", save]
            in_a_fork(main.main, [*map(str, command), "--new_model"])
            [made] = set(save.glob("text-*")) - before
            self.runs[name] = read_run(made)
            made.rename(save / name)
        self.text_path = str(text)
        export = ["--export", folder / "hf", "--identifier", "bpe", "--save_dir", save]
        in_a_fork(main.main, [*map(str, export)])
        self.hf = {path.name: path.read_bytes() for path in sorted((folder / "hf").iterdir())}
        rows = map(json.loads, (save / "good" / "log.jsonl").read_text().splitlines())
        self.log = b"".join(json.dumps(without_times(row)).encode() + b"\n" for row in rows)
        self.bomb = make_bomb(400 << 20)
        self.parquets = make_parquets()  # none without pyarrow
        self.gpt2 = self.hf["tokenizer.json"]  # what --tokenizer gpt2 is, with fewer ids


def without_times(row):
    """A row of a log in which what differs each time is the same."""
    for name in ("seconds", "tokens_per_second", "ms_per_step", "peak_mib"):
        if name in row:
            row[name] = 1.5
    return row


def make_bomb(size):
    """Gzip of so many zeros, made in pieces: this process stays small."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    piece = bytes(1 << 20)
    pieces = [packer.compress(piece) for _ in range(size >> 20)]
    return b"".join([*pieces, packer.flush()])


def in_a_fork(function, *arguments):
    """Calls a function in a fork of this process, which so computes nothing; shows no output."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.argv = ["main.py", *arguments[0]]
            status = function(*arguments)
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"a template could not be made: {arguments}")


def read_run(folder):
    """The record of a run's last checkpoint, with times that are the same each time; its files."""
    weights = max(folder.glob("*.safetensors"))
    tensors = Tensors(weights.with_suffix(".metadata").read_bytes())
    record = json.loads(tensors.texts["record"])
    record |= {"saved": 1.7e9, "seconds": 1.25, "recent_seconds": 0.5, "command": ["main.py"]}
    return record, weights.read_bytes(), seal(tensors, json.dumps(record))


# ---- A case -------------------------------------------------------------------------------------


class Case:
    """The files and the command of one case.

    In `folder` are `work`, where the command runs, and `home` and `beside`, which are none of its
    business. `writes` are the paths below `folder` that it may write.
    """

    def __init__(self, name, folder, templates):
        self.name = name
        self.chance = random.Random(name)
        self.folder = folder
        self.templates = templates
        self.work = folder / "work"
        self.save = self.work / "save"
        self.program = "main.py"
        self.arguments = []
        self.statuses = {0, 1, 2}
        self.writes = ["work/data"]
        self.answers = None  # of a server, bytes
        self.corpus = None  # what --dataset ptb is, bytes
        for each in ("work/save", "work/data", "home", "beside/empty"):
            (folder / each).mkdir(parents=True)
        for each in ("home/secret.txt", "beside/secret.txt", "beside/log.jsonl"):
            (folder / each).write_text(f"{CANARY}\n" * 40)
        self.text = self.work / "text.txt"
        self.text.write_text(TEXT)

    def plant(self, run, record=None, kind="good", weights=None, metadata=None):
        """Writes a checkpoint; what is not given is right. record: JSON data or text."""
        known, good_weights, good_metadata = self.templates.runs[kind]
        weights = good_weights if weights is None else weights
        if record is None:
            record = self.record(kind) | {"id": hashlib.sha1(weights).hexdigest()}
        text = record if isinstance(record, str) else self.placed(dumps(record))
        if metadata is None:
            metadata = seal(Tensors(good_metadata), text)
        folder = self.save / run
        folder.mkdir()
        name = hashlib.sha1(weights).hexdigest()
        (folder / f"{name}.safetensors").write_bytes(weights)
        (folder / f"{name}.metadata").write_bytes(metadata)
        (folder / "log.jsonl").write_bytes(self.templates.log)
        return folder / f"{name}.metadata"

    def record(self, kind):
        """The record of a good checkpoint, which this case may change."""
        record, _, _ = self.templates.runs[kind]
        text = json.dumps(record).replace(self.templates.text_path, str(self.text))
        return json.loads(text)

    def placed(self, text):
        """A text in which the folders that are none of the command's business have their names."""
        text = text.replace("BESIDE", str(self.folder / "beside"))
        return text.replace("HOME", str(self.folder / "home"))

    def run(self, *arguments, writes=(), statuses=None, program="main.py"):
        """Sets the command."""
        self.program = program
        self.arguments = [*map(str, arguments)]
        self.writes += writes
        self.statuses = statuses or self.statuses

    def run_main(self, *arguments, **options):
        """Sets a command of main.py in the case's folders."""
        folders = ["--save_dir", "save", "--data_dir", "data"]
        self.run(*arguments, *folders, **options)


# ---- Checkpoints --------------------------------------------------------------------------------

PROMPTS = ["the fox", "", "é", "\x1b[2J", "zzzz", "\udcff", "the " * 9, "\U0010fffd", "<eos>"]
SAMPLING = ["--temperature 0", "--top_k 0", "--top_p 0.5", "--num_samples 2", "--stop e"]
SAMPLING += ["", "--quantize 4", "--repetition_penalty 1.5", "--min_p 0.1"]


def use_checkpoint(case, *names, name="stranger"):
    """Draws a command that meets the checkpoint of the run `name`."""
    chance = case.chance
    folders = ["--save_dir", "save", "--data_dir", "data"]
    one = ["--identifier", chance.choice((name, name, name, "latest", "best"))]
    mine = ["save/NEW", f"save/{name}"]
    briefly = ["--max_tokens", "4", "--keep", "1", "--num_iters"]
    begin = ["--text", "text.txt", *briefly, "1", "--new_model"]
    text = chance.choice(PROMPTS)
    sampling = ["--max_tokens", "5", *chance.choice(SAMPLING).split()]
    (case.work / "stdin").write_bytes(b"the fox\n/set top_k x\n/stats\n" + odd_text(chance)[:500])
    (case.work / "cases.yaml").write_text("- {prompt: the, expected: fox}\n")
    (case.work / "prompts.txt").write_text("the fox\n\nquick\n")
    from_file = ["--prompts_file", "prompts.txt", "--output", "out"]
    good = {0}
    known = {
        "list": (["--list"], [], good),
        "prompt": ([*one, f"--prompt={text}", *sampling], [], None),
        "latest": ([f"--prompt={text}", *sampling], [], None),
        "inference": ([*one, "--inference", *sampling], [], None),
        "attention": ([*one, f"--prompt={text}", "--attention", "out.svg"], ["out.svg"], None),
        "evaluate": ([*one, "--evaluate", "valid"], [], None),
        "resume": ([*one, *briefly, "3"], [*mine, "save/good"], None),
        "rerun": ([*briefly, "3"], [*mine, "save/good"], None),
        "export": ([*one, "--export", chance.choice(("out", "out.gguf"))], ["out"], None),
        "init_from": (["--init_from", name, *begin], ["save/NEW"], None),
        "lora": (["--init_from", name, "--lora_rank", "2", *begin], ["save/NEW"], None),
        "teacher": (["--teacher", name, *TINY, *begin], ["save/NEW"], None),
        "draft": (["--identifier", "good", "--draft", name, "--prompt", "a"], [], None),
        "cases": (["--cases", "cases.yaml", "--output", "out.json"], ["out.json"], None),
        "prompts": ([*one, *from_file, *sampling], ["out"], None),
        "plot": (["--plot", "out.svg"], ["out.svg"], None),
        # A good run goes on, or a new one begins, whatever lies beside.
        "good": (["--identifier", "good", *briefly, "3"], ["save/good"], good),
        "new": ([*TINY, *begin, "--tokenizer", "byte"], ["save/NEW"], good),
    }
    weights = {"plot": 0.2, "attention": 0.2, "good": 0.6, "new": 0.6}  # which take longest
    weights |= {"list": 2, "prompt": 4, "resume": 3}
    names = names or [*known]
    command = chance.choices(names, [weights.get(each, 1) for each in names])[0]
    arguments, writes, statuses = known[command]
    writes = [f"work/{each}" for each in writes]
    case.run(*arguments, *folders, writes=writes, statuses=statuses)


def draw_kind(case):
    return case.chance.choice(["good", "good", *RUNS])


# What a model's arrays do not tell.
NOT_IN_ARRAYS = ("context_size", "rope_theta", "rope_scaling", "norm_eps", "num_heads", "head_dim")


def odd_records(case):
    """A checkpoint with right hashes whose record says something else."""
    chance = case.chance
    case.plant("good")
    kind = draw_kind(case)
    record = case.record(kind)
    record["saved"] += 5
    for _ in range(chance.choice((1, 1, 2, 3))):
        part = chance.random()
        if part < 0.15:
            name = chance.choice(NOT_IN_ARRAYS)
            record["config"][name] = mutated(chance, record["config"].get(name))
        elif part < 0.3:
            record["config"] = mutated(chance, record["config"])
        elif part < 0.5:
            record["flags"] = mutated(chance, record["flags"])
        elif part < 0.6:
            name = chance.choice(main.INHERITED)
            default = main.DEFAULTS[name]
            record["flags"][name] = near(chance, default) if default else odd_value(chance)
        else:
            name = chance.choice(list(record))
            record[name] = mutated(chance, record[name])
        if not (isinstance(record["config"], dict) and isinstance(record["flags"], dict)):
            break
    text = case.placed(dumps(record))
    if chance.random() < 0.1:
        text = damaged(chance, text.encode()).decode("utf-8", "replace")
    case.plant("stranger", text, kind)
    use_checkpoint(case)


def unsealed_records(case):
    """The same, but whoever did it has forgotten the hashes."""
    chance = case.chance
    case.plant("good")
    kind = draw_kind(case)
    _, weights, metadata = case.templates.runs[kind]
    damage = chance.randrange(3)
    if damage == 0:
        metadata = damaged(chance, metadata)
    elif damage == 1:
        tensors = Tensors(metadata)
        tensors.texts["record"] = dumps(often_mutated(chance, case.record(kind)))
        metadata = tensors.packed()
    else:
        tensors = Tensors(metadata)
        tensors.texts = often_mutated(chance, tensors.texts)
        metadata = tensors.packed()
    path = case.plant("stranger", kind=kind, metadata=metadata)
    if chance.random() < 0.3:
        file = path.with_suffix(chance.choice((".safetensors", ".metadata")))
        file.write_bytes(damaged(chance, file.read_bytes()))
    use_checkpoint(case)


def with_length(chance, data):
    """A safetensors file that says another length of its header."""
    size = chance.choice((0, 1, 2**27, 2**33, 2**40, 2**62, 2**63, 2**64 - 1, len(data)))
    return size.to_bytes(8, "little") + data[8:]


def odd_headers(case):
    """Headers of safetensors files with right hashes that say something else of the arrays."""
    chance = case.chance
    case.plant("good")
    kind = draw_kind(case)
    record = case.record(kind)
    record["saved"] += 5
    _, weights, metadata = case.templates.runs[kind]
    tensors = Tensors(weights)
    if chance.random() < 0.5:
        weights = tensors.packed(changed_header(chance, tensors))
        if chance.random() < 0.3:
            weights = damaged(chance, weights)
    if chance.random() < 0.2:
        weights = with_length(chance, weights)
    record["id"] = hashlib.sha1(weights).hexdigest()
    tensors = Tensors(metadata)
    entries = None
    if chance.random() < 0.5:
        entries = changed_header(chance, tensors)
    metadata = seal(tensors, case.placed(dumps(record)), entries)
    if chance.random() < 0.2:
        metadata = with_length(chance, metadata)
    case.plant("stranger", record, kind, weights, metadata)
    use_checkpoint(case)


def odd_arrays(case):
    """Well-formed files with right hashes, but other arrays."""
    chance = case.chance
    case.plant("good")
    kind = draw_kind(case)
    record = case.record(kind)
    record["saved"] += 5
    _, weights, metadata = case.templates.runs[kind]
    if chance.random() < 0.6:
        tensors = Tensors(weights)
        for _ in range(chance.choice((1, 1, 2))):
            change_array(chance, tensors)
        weights = tensors.packed()
    tensors = Tensors(metadata)
    if chance.random() < 0.6:
        for _ in range(chance.choice((1, 1, 2))):
            change_array(chance, tensors)
    record["id"] = hashlib.sha1(weights).hexdigest()
    metadata = seal(tensors, case.placed(dumps(record)))
    case.plant("stranger", record, kind, weights, metadata)
    use_checkpoint(case, "prompt", "evaluate", "resume", "resume", "export", "init_from", "good")


def odd_tokenizers(case):
    """Checkpoints with another tokenizer."""
    chance = case.chance
    case.plant("good")
    kind = draw_kind(case)
    record, weights, metadata = case.templates.runs[kind]
    tensors = Tensors(metadata)
    data = json.loads(tensors.arrays["tokenizer"][2])
    action = chance.randrange(5)
    if action == 0:
        data = often_mutated(chance, data)
    elif action == 1:
        data = draw_tokenizer(chance)
    elif action == 2 and data["kind"] in ("bpe", "file"):
        data["vocabulary"] = dumps(often_mutated(chance, json.loads(data["vocabulary"])))
    elif action == 3:
        data = {"kind": chance.choice(["bpe", "gpt2", "file"]), "vocabulary": odd_package(chance)}
    else:
        data["kind"] = chance.choice([*datasets.TOKENIZERS, "../x", "BESIDE", ["byte"], {}])
    content = case.placed(dumps(data)).encode()
    if chance.random() < 0.1:
        content = damaged(chance, content)
    tensors.arrays["tokenizer"] = ["U8", [len(content)], content]
    record = case.record(kind)
    record["saved"] += 5
    metadata = seal(tensors, case.placed(dumps(record)))
    case.plant("stranger", record, kind, metadata=metadata)
    use_checkpoint(case, "prompt", "prompt", "evaluate", "resume", "export", "cases", "teacher")
    size = len(data["vocabulary"]) if action == 1 else 0
    if size > record["config"]["vocab_size"] and "--cases" not in case.arguments:
        # What lies beyond the model's arrays in memory would be read, often without a sign.
        case.statuses = {1, 2}


def draw_tokenizer(chance):
    """Vocabularies of this program's own kinds, some too large for the model."""
    first = chance.choice((32, 97, 0x300, 0xD7F0, 0x10FF00))
    count = chance.choice((0, 1, 5, 60, 250, 500, 20_000))
    characters = [chr(i) for i in range(first, min(first + count, 0x110000))]
    if chance.random() < 0.5:
        return {"kind": "char", "vocabulary": "".join(characters)}
    words = [*characters, "<eos>", "<unk>", *chance.sample(ESCAPES, 2)]
    chance.shuffle(words)
    return {"kind": "word", "vocabulary": words}


NAMES = [
    *ESCAPES[:3],
    *("-x", ".hidden", "a copy", "x" * 200, "\udcff", "é", "$x^$", "latest", "best", "*", "[a]"),
    *("0123456789ab", "_x", "x..", "--list", "good2"),
]


def odd_names(case):
    """A good checkpoint in a folder with another name."""
    case.plant("good")
    path = case.plant("stranger", case.record("good") | {"saved": 1.8e9})
    name = case.chance.choice(NAMES)
    os.rename(path.parent, os.path.join(case.save, name))
    use_checkpoint(case, "list", "list", "latest", "rerun", "cases", "plot", "new", "prompt")
    if "--num_iters" in case.arguments and "--new_model" not in case.arguments:
        case.writes.append(f"work/save/{name}")  # it may be that run which goes on


def odd_links(case):
    """Links, pipes and folders in the place of files and folders."""
    chance = case.chance
    case.plant("good")
    path = case.plant("stranger", case.record("good") | {"saved": 1.8e9})
    weights = path.with_suffix(".safetensors")
    good = case.save / "good"
    planted = [path, weights, path.parent / "log.jsonl", path.parent / f"{'1' * 40}.metadata"]
    planted += [path.parent / ".0123456789abcdef.new", path.parent / f"{'2' * 40}.safetensors"]
    for victim in chance.sample(planted, chance.choice((1, 2, 3))):
        elsewhere = case.folder / "beside" / victim.name
        if victim.exists() and chance.random() < 0.5:
            shutil.copy(victim, elsewhere)
        victim.unlink(missing_ok=True)
        targets = [elsewhere, case.folder / "beside/secret.txt", good, "/dev/zero", "/nowhere"]
        targets += [victim.name, good / "log.jsonl", case.folder / "beside/new"]
        action = chance.randrange(8)
        if action == 0:
            os.mkfifo(victim)
        elif action == 1:
            victim.mkdir()
        else:
            victim.symlink_to(chance.choice(targets))
    if chance.random() < 0.2:
        path.parent.rename(case.folder / "beside" / "run")
        path.parent.symlink_to(case.folder / "beside" / "run")
    use_checkpoint(case)


ROWS = [
    *(b"[]", b"5", b"\xff", b"\0" * 99, b"[" * 50_000, b"", b"{", b"null"),
    *(b'{"iteration": "x"}', b'{"iteration": 1}', b'{"iteration": 1, "split": []}'),
    b'{"iteration": 1e999, "split": "train"}',
    b'{"iteration": 1, "split": "train", "seconds": [], "loss": 1}',
]


def odd_logs(case):
    """A run's log, to be continued or plotted."""
    chance = case.chance
    case.plant("good")
    path = case.plant("stranger", case.record("good") | {"saved": 1.8e9})
    rows = case.templates.log.splitlines()
    for _ in range(chance.choice((1, 2, 5))):
        place = chance.randrange(len(rows) + 1)
        if chance.random() < 0.5:
            row = chance.choice(ROWS)
        else:
            row = dumps(often_mutated(chance, json.loads(case.templates.log.splitlines()[0])))
            row = row.encode()
        rows.insert(place, row)
    content = b"\n".join(rows) + chance.choice((b"", b"\n"))
    if chance.random() < 0.2:
        content = damaged(chance, content)
    (path.parent / "log.jsonl").write_bytes(content)
    use_checkpoint(case, "resume", "rerun", "resume", "plot")


# ---- Tokenizers of the package, and Hugging Face folders ----------------------------------------

MODELS = [
    PACKAGE["model"],
    {"type": "WordLevel", "vocab": {"the": 0, "fox": 1}, "unk_token": "[UNK]"},
    {"type": "Unigram", "unk_id": None, "vocab": [["the", -1.0], ["fox", -2.0]]},
    {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": True},
    {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 9,
        "vocab": {"[UNK]": 0, "the": 1, "##e": 2},
    },
    {"type": "BPE", "vocab": {"t": 0, "h": 1, "th": 2}, "merges": [["t", "h"]]},
    {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], "unk_token": "<none>", "dropout": 0.5},
]
CHARSMAP = base64.b64encode(b"\x04\0\0\0abcd").decode()
NORMALIZERS = [
    None,
    {"type": "Precompiled", "precompiled_charsmap": CHARSMAP},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
    {"type": "Prepend", "prepend": ""},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "BertNormalizer", "clean_text": True, "lowercase": True, "strip_accents": None,
     "handle_chinese_chars": True},
    {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}]},
]
PRE_TOKENIZERS = [
    None,
    {"type": "Split", "pattern": {"Regex": "(?:x*)*y"}, "behavior": "Isolated", "invert": False},
    {"type": "FixedLength", "length": 0},
    {"type": "Punctuation", "behavior": "Contiguous"},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "CharDelimiterSplit", "delimiter": " "},
    {"type": "UnicodeScripts"},
]
DECODERS = [
    None,
    {"type": "Strip", "content": "t", "start": 1, "stop": 1},
    {"type": "ByteLevel"},
    {"type": "ByteFallback"},
    {"type": "WordPiece", "prefix": "", "cleanup": True},
    {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
    {"type": "BPEDecoder", "suffix": ""},
    {"type": "Replace", "pattern": {"String": "t"}, "content": "\x1b[2J"},
]
POST_PROCESSORS = [
    None,
    {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    {"type": "BertProcessing", "sep": ["</s>", 900], "cls": ["<s>", 901]},
]


def odd_package(chance):
    """The text of a tokenizer.json."""
    settings = copy.deepcopy(PACKAGE)
    if chance.random() < 0.8:
        settings["model"] = copy.deepcopy(chance.choice(MODELS))
    for name, choices in (
        ("normalizer", NORMALIZERS),
        ("pre_tokenizer", PRE_TOKENIZERS),
        ("decoder", DECODERS),
        ("post_processor", POST_PROCESSORS),
    ):
        if chance.random() < 0.4:
            settings[name] = copy.deepcopy(chance.choice(choices))
    if chance.random() < 0.3:
        settings["truncation"] = {"max_length": chance.choice((0, 1, 2**40)), "stride": 0}
    if chance.random() < 0.2:
        added = {**PACKAGE["added_tokens"][0], "content": chance.choice(TEXTS)}
        settings["added_tokens"].append(added | {"id": chance.choice((0, 5, 9, 2**31, 2**32 - 1))})
    if chance.random() < 0.5:
        settings = often_mutated(chance, settings)
    return dumps(settings)


def tokenizer_files(case):
    """--tokenizer FILE, in both programs."""
    chance = case.chance
    content = odd_package(chance).encode()
    if chance.random() < 0.1:
        content = damaged(chance, content)
    (case.work / "tokenizer.json").write_bytes(content)
    arguments = ["--text", "text.txt", "--tokenizer", "tokenizer.json"]
    if chance.random() < 0.7:
        if chance.random() < 0.3:
            arguments += ["--save_tokenizer", "out.json"]
        case.run_main(*arguments, program="datasets.py", writes=["work/out.json"])
    else:
        case.run_main(*arguments, *TINY, "--num_iters", 2, writes=["work/save/NEW"])


def hf_folders(case):
    """A Hugging Face folder to start or to learn from."""
    chance = case.chance
    files = dict(case.templates.hf)
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(["config.json"] * 4 + ["tokenizer_config.json", *files, "weights"])
        if name in ("model.safetensors", "weights"):
            name = "model.safetensors"
            tensors = Tensors(case.templates.hf[name])
            if chance.random() < 0.6:
                change_array(chance, tensors)
                files[name] = tensors.packed()
            else:
                files[name] = tensors.packed(changed_header(chance, tensors))
        elif name == "tokenizer.json" and chance.random() < 0.5:
            files[name] = odd_package(chance).encode()
        elif chance.random() < 0.85:
            data = json.loads(case.templates.hf[name])
            files[name] = case.placed(dumps(often_mutated(chance, data))).encode()
        else:
            files[name] = damaged(chance, files.get(name, b"{}"))
    if chance.random() < 0.1:
        files["model.safetensors.index.json"] = dumps(odd_value(chance)).encode()
        files.pop(chance.choice(list(files)))
    folder = case.work / "hf"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if chance.random() < 0.1:
        name = chance.choice(list(case.templates.hf))
        (folder / name).unlink(missing_ok=True)
        action = chance.randrange(3)
        if action == 0:
            (folder / name).mkdir()
        elif action == 1:
            os.mkfifo(folder / name)
        else:  # links are usual there: the hub's cache is made of them
            targets = ["/nowhere", "/dev/zero", case.folder / "beside/secret.txt", name]
            (folder / name).symlink_to(chance.choice(targets))
    flag_name = chance.choice(("--init_from", "--init_from", "--teacher"))
    arguments = [flag_name, "hf", "--text", "text.txt", "--num_iters", "1", "--batch_size", "2"]
    arguments += ["--max_tokens", "4"]
    if flag_name == "--teacher":
        arguments += TINY
    elif chance.random() < 0.3:
        arguments += ["--lora_rank", "2"]
    case.run_main(*arguments, "--context_size", "8", writes=["work/save/NEW"])


# ---- YAML, JSON Lines, texts --------------------------------------------------------------------


def odd_yaml(chance, value):
    """YAML that may say more than JSON can."""
    action = chance.random()
    if action < 0.15:  # aliases that would unfold to 9 ** depth texts
        depth = chance.choice((2, 8, 9))
        entries = ["- x: &a0 [x, x, x, x, x, x, x, x, x]"]
        for i in range(depth):
            entries.append(f"  x{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]")
        entries += [f"  prompt: *a{depth}", "  expected: x"]
        if chance.random() < 0.5:
            return "\n".join(entries)
        return "\n".join(["stop:", *entries])
    if action < 0.25:
        return chance.choice(
            [
                "!!python/object/apply:os.system ['touch ../beside/new']",
                "a: &a [*a]",
                "&a [*a]",
                "[" * 3000,
                "? {a: b}\n: c",
                "1: 2\n? [1]\n: 3",
                "a: 2020-13-45",
                "dim: 1_0\nseed: 0x10\nlearning_rate: 1e-3",
                "<<: *x",
                "--- a\n--- b",
                "seed: 1:30:59",
                "dim: .inf\nseed: .nan",
                "text: !!binary aGFsbG8=",
                "a: !!set {x, y}",
                "%YAML 9.9\n---\n",
                "\t- x",
            ]
        )
    return dumps(value)  # which is YAML, too


CONFIG = {
    "model": {"dim": 8, "num_heads": 2, "num_blocks": 1, "context_size": 8},
    "num_iters": 1,
    "batch_size": 2,
    "seed": 7,
    "mlp": "relu2",
    "tokenizer": "byte",
    "learning_rate": 1e-3,
    "untie": True,
    "ngrams": 3,
    "text": ["text.txt"],
}


def configs(case):
    """--config. What it may write to is the user's choice, so it names no such flag."""
    chance = case.chance
    settings = often_mutated(chance, CONFIG)
    text = odd_yaml(chance, settings).replace("BESIDE", "x").replace("HOME", "x")
    text = re.sub(r"\.\.|~|export|plot|output", "x", text)
    content = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        content = damaged(chance, content)
    (case.work / "config.yaml").write_bytes(content)
    # Sizes that are typed are the user's own: these must not be large.
    small = [*TINY, "--num_iters", "1", "--mlp_dim", "8", "--grad_accumulation", "1"]
    small += ["--num_kv_heads", "2", "--vocab_size", "300", "--context_size", "8"]
    case.run_main("--config", "config.yaml", "--text", "text.txt", *small, writes=["work/save/NEW"])


def cases_files(case):
    """--cases."""
    chance = case.chance
    case.plant("good")
    entries = [{"prompt": "the", "expected": " fox"}, {"prompt": "", "expected": "\x1b[2J"}]
    content = odd_yaml(chance, often_mutated(chance, entries)).encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        content = damaged(chance, content)
    (case.work / "cases.yaml").write_bytes(content)
    case.run_main("--cases", "cases.yaml", "--output", "out.json", writes=["work/out.json"])


def odd_text(chance):
    """The bytes of a text file."""
    pieces = [b"the quick\n", b"\xef\xbb\xbf", b"\0", b"\xff", b"\r", b"\r\n", b"\n", b" ", b"\t"]
    pieces += ["é—\u2028\x85\U0001f600e\u0301".encode(), b"\xed\xa0\x80", b"\xe2\x82"]
    pieces += [b"\x1b[2J", b"<|endoftext|>", b"<eos>", b"<unk>", b"\xf0\x9f", b"a" * 999, b"1" * 99]
    drawn = chance.choices(pieces, k=chance.choice((0, 1, 2, 5, 30)))
    content = b"".join(drawn)
    if chance.random() < 0.5:
        content = TEXT.encode() + content
    if chance.random() < 0.05:
        content *= 300
    return content


def texts(case):
    """--text and its kin, prepared by datasets.py or trained on."""
    chance = case.chance
    folder = case.work / "texts"
    folder.mkdir()
    for i in range(chance.choice((1, 1, 2, 12))):
        name = chance.choice([f"{i}.txt", f"{i}{chance.choice(NAMES)}", f".{i}"])
        content = odd_text(chance)
        Path(os.path.join(folder, name)).write_bytes(content)
    arguments = ["--text", chance.choice(("texts", "texts/*", "texts/0.txt"))]
    for name in ("--valid_text", "--test_text"):
        if chance.random() < 0.2:
            path = case.work / f"{name[2:]}.txt"
            path.write_bytes(odd_text(chance))
            arguments += [name, path.name]
    arguments += ["--tokenizer", chance.choice(("byte", "char", "word", "bpe"))]
    arguments += ["--vocab_size", "300"]
    if chance.random() < 0.7:
        case.run_main(*arguments, program="datasets.py")
    else:
        case.run_main(*arguments, *TINY, "--num_iters", 1, writes=["work/save/NEW"])


DOCUMENTS = [{"text": "the quick brown fox"}, {"text": "jumps over\n"}, {"text": None}]
DOCUMENTS *= 12
SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".parquet", ".bin")


def make_parquets():
    """Parquet files with rows of several types, as bytes. A process of its own imports pyarrow."""
    code = """
import io, json, sys
import pyarrow as pa
from pyarrow import parquet

texts = [each["text"] for each in json.load(sys.stdin)]
columns = [pa.array(texts), pa.array(texts, pa.large_string())]
columns += [pa.array(texts).dictionary_encode(), pa.array([[each] for each in texts])]
columns += [pa.array(texts, pa.binary()), pa.array(range(len(texts)))]
for column in columns:
    for compression in ("none", "snappy", "zstd"):
        file = io.BytesIO()
        table = pa.table({"text": column, "\x1b[2J": column})
        parquet.write_table(table, file, compression=compression, row_group_size=10)
        print(file.getvalue().hex())
"""
    options = {"input": json.dumps(DOCUMENTS), "text": True, "capture_output": True}
    made = subprocess.run([sys.executable, "-c", code], **options)
    return [bytes.fromhex(line) for line in made.stdout.split()]


def draw_rows(case, suffix):
    """The content of a file of rows, or of token ids."""
    chance = case.chance
    if suffix == ".bin":
        ids = chance.choices((0, 1, 40, 200, 255, 256, 257, 299, 298, 65535), [99] * 9 + [2], k=99)
        return np.array(ids, "<u2").tobytes() + chance.choice((b"", b"", b"\0"))
    if suffix == ".parquet" and case.templates.parquets:
        return chance.choice(case.templates.parquets)
    rows = DOCUMENTS if chance.random() < 0.3 else often_mutated(chance, DOCUMENTS)
    rows = rows if isinstance(rows, list) else [rows]
    content = "\n".join(map(dumps, rows)).encode() + chance.choice((b"", b"\n", b"\n\n"))
    if suffix.endswith((".gz", ".zst")):
        pack = gzip.compress
        if suffix.endswith(".zst") and zstd is not None:
            pack = zstd.compress
        return case.templates.bomb if chance.random() < 0.1 else pack(content)
    return content


def rows_files(case):
    """Files with a document in each row, and of token ids."""
    chance = case.chance
    suffix = chance.choice(SUFFIXES)
    tokenizers = ("byte", "char", "word", "bpe", "gpt2")
    count = chance.choice((1, 1, 2))
    if suffix == ".bin" and chance.random() < 0.8:
        tokenizers = ("gpt2",)
        count = 2
    names = []
    for name in ("train", "valid")[:count]:
        content = draw_rows(case, suffix)
        if chance.random() < 0.4:
            content = damaged(chance, content)
        if chance.random() < 0.1:
            suffix = chance.choice(SUFFIXES)
        names.append(name + suffix)
        (case.work / names[-1]).write_bytes(content)
    (case.work / "data/gpt2").mkdir()
    (case.work / "data/gpt2" / datasets.GPT2.files[0].name).write_bytes(case.templates.gpt2)
    arguments = ["--text", names[0]]
    if len(names) > 1:
        arguments += ["--valid_text", names[1]]
    if chance.random() < 0.2:
        arguments += ["--text_field", chance.choice(("\x1b[2J", "body", "[text]"))]
    arguments += ["--tokenizer", chance.choice(tokenizers)]
    arguments += ["--vocab_size", "300"]
    case.run_main(*arguments, program="datasets.py")


def prompts_files(case):
    """--prompts_file, and an --output to be gone on with."""
    chance = case.chance
    kind = chance.choice(("good", "char", "word", "bpe", "file"))
    case.plant("good")
    case.plant("stranger", kind=kind)
    (case.work / "prompts.txt").write_bytes(odd_text(chance)[:2000])
    settings = {"max_tokens": 5, "temperature": 0.5, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    settings |= {"repetition_penalty": 1.0, "stop": None, "quantize": None}
    record, weights, _ = case.templates.runs[kind]
    head = {"prompt": "the quick", "seed": 42, "checkpoint": record["id"], **settings}
    line = head | {"completion": "x", "tokens": [1]}
    if chance.random() < 0.7:
        if chance.random() < 0.5:
            (case.work / "prompts.txt").write_text("the quick\nfox\n")
        text = dumps(line if chance.random() < 0.3 else often_mutated(chance, line))
        content = text.encode() + chance.choice((b"", b"\n", b"\n\n"))
        if chance.random() < 0.3:
            content = damaged(chance, content)
        (case.work / "out").write_bytes(content)
    arguments = ["--prompts_file", "prompts.txt", "--output", "out", "--max_tokens", "5"]
    case.run_main("--identifier", "stranger", *arguments, writes=["work/out"])


def collected_files(case):
    """What extras/collect.py reads: prompts, and answers to be gone on with."""
    chance = case.chance
    is_jsonl = chance.random() < 0.5
    name = "prompts.jsonl" if is_jsonl else "prompts.txt"
    if is_jsonl:
        lines = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
        if chance.random() < 0.6:
            lines = often_mutated(chance, lines)
        lines = lines if isinstance(lines, list) else [lines]
        content = "\n".join(map(dumps, lines)).encode() + b"\n"
    else:
        content = odd_text(chance)[:200] if chance.random() < 0.5 else b"ab\ncd\n"
    if chance.random() < 0.2:
        content = damaged(chance, content)
    (case.work / name).write_bytes(content)
    if chance.random() < 0.6:
        line = {"prompt": "ab", "model": "m", "completion": "x"}
        text = dumps(line if chance.random() < 0.5 else often_mutated(chance, line))
        (case.work / "out").mkdir()
        content = text.encode() + chance.choice((b"", b"\n"))
        (case.work / "out" / "answers.jsonl").write_bytes(damaged(chance, content))
    run_collector(case, name, [reply(json.dumps(GOOD_ANSWER).encode())])


# ---- Servers ------------------------------------------------------------------------------------

GOOD_ANSWER = {"choices": [{"message": {"role": "assistant", "content": "words"}}]}


def reply(body, status=200, length=None, headers=()):
    """The bytes of an HTTP answer."""
    if length is None:
        length = len(body)
    lines = [f"HTTP/1.1 {status} X", *headers]
    if length != "":
        lines.append(f"Content-Length: {length}")
    head = "\r\n".join([*lines, "Connection: close", "", ""])
    return head.encode("latin-1", "replace") + body


PLACES = ["http://127.0.0.1:OTHER/", "http://localhost:OTHER/v1", "//127.0.0.1:OTHER", "/again"]
PLACES += ["file:///BESIDE/secret.txt", "ftp://x/", "http://[", "http://\x1b[2J/", "http://x\0y/"]
ESCAPE = "\x1b]0;owned\x07"


def odd_reply(chance, body, bomb):
    """One answer of a server that should have sent `body`."""
    action = chance.randrange(9)
    if action == 0:
        length = chance.choice((0, 1, -1, "x", 10**20, len(body) + 1, max(0, len(body) - 1), ""))
        return reply(body, 200, length)
    if action == 1:
        status = chance.choice((200, 206, 204, 301, 404, 416, 429, 500, 503, 99, 999))
        return reply(chance.choice((body, f"{ESCAPE} {KEY}".encode())), status)
    if action in (2, 3):
        status = chance.choice((301, 302, 303, 307, 308))
        return reply(b"", status, 0, [f"Location: {chance.choice(PLACES)}"])
    if action == 4:  # more or less than it should be, or other bytes
        content = (body[: len(body) // 2], body + b"x" * 99, body * 2000, damaged(chance, body))
        return reply(chance.choice(content), 200, chance.choice((None, "", len(body))))
    if action == 5:
        return reply(chance.choice((body, bomb)), 200, None, ["Content-Encoding: gzip"])
    if action == 6:
        header = chance.choice(
            [
                f"Content-Type: text/html{ESCAPE}",
                "Content-Range: bytes 5-9/3",
                "Transfer-Encoding: chunked",
                f"Retry-After: {'9' * 30}",
                "Retry-After: ²",
                f"{ESCAPE}: x",
            ]
        )
        return reply(body, chance.choice((200, 206, 429)), "", [header])
    if action == 7:
        return chance.choice(
            [
                b"",
                chance.randbytes(50),
                f"HTTP/1.1 200 {ESCAPE}{KEY}\r\n\r\n".encode(),
                b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
                b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000,
            ]
        )
    return reply(body)


def odd_replies(chance, body, bomb):
    """What a server sends, one after the other; the last one is repeated."""
    return [odd_reply(chance, body, bomb) for _ in range(chance.choice((1, 1, 2, 4)))]


def downloads(case):
    """A corpus from a mirror. Its sizes and hashes are known."""
    chance = case.chance
    case.corpus = TEXT.encode()
    case.answers = odd_replies(chance, case.corpus, case.templates.bomb)
    if chance.random() < 0.3:
        case.answers.append(reply(case.corpus))
    if chance.random() < 0.3:
        (case.work / "data/ptb").mkdir()
        part = case.work / "data/ptb/ptb.train.txt.part"
        part.write_bytes(chance.choice((b"x", case.corpus[:9], case.corpus * 2)))
    arguments = ["--dataset", "ptb", "--mirror", "http://127.0.0.1:PORT"]
    case.run_main(*arguments, program="datasets.py")


def collections(case):
    """Answers of a server with OpenAI's API."""
    chance = case.chance
    (case.work / "prompts.txt").write_text("ab\ncd\n")
    body = json.dumps(GOOD_ANSWER)
    action = chance.random()
    if action < 0.5:
        body = dumps(often_mutated(chance, GOOD_ANSWER))
    elif action < 0.6:
        body = dumps({"choices": [{"message": {"content": chance.choice(TEXTS)}}]})
    answers = odd_replies(chance, body.encode(), case.templates.bomb)
    if chance.random() < 0.4:
        answers = [reply(body.encode())]
    run_collector(case, "prompts.txt", answers)


def run_collector(case, prompts, answers):
    case.answers = answers
    case.run(
        *("--distill_from", "http://127.0.0.1:PORT/v1", "--teacher_model", "m"),
        *("--teacher_prompts", prompts, "--output", "out", "--max_requests", "12"),
        program="extras.collect",
        writes=["work/out"],
    )


# {family: its share of the cases}
FAMILIES = {
    odd_records: 24,
    unsealed_records: 5,
    odd_headers: 10,
    odd_arrays: 8,
    odd_tokenizers: 8,
    odd_names: 3,
    odd_links: 8,
    odd_logs: 3,
    tokenizer_files: 7,
    hf_folders: 8,
    configs: 5,
    cases_files: 4,
    texts: 5,
    rows_files: 6,
    prompts_files: 4,
    collected_files: 4,
    downloads: 4,
    collections: 5,
}


class Server(threading.Thread):
    """Answers on a port of the loopback address, and on another one to which it redirects.

    `leaked`: whether a key came to the other one.
    """

    def __init__(self, answers):
        super().__init__(daemon=True)
        self.first = socket.create_server(("127.0.0.1", 0))
        self.other = socket.create_server(("127.0.0.1", 0))
        self.port = self.first.getsockname()[1]
        self.other_port = self.other.getsockname()[1]
        self.answers = answers
        self.leaked = False

    def start(self):
        super().start()
        threading.Thread(target=self.serve_other, daemon=True).start()

    def run(self):
        place = 0
        while True:
            connection, _ = self.first.accept()
            answer = self.answers[min(place, len(self.answers) - 1)]
            place += 1
            self.speak(connection, answer)

    def serve_other(self):
        while True:
            connection, _ = self.other.accept()
            request = self.speak(connection, reply(json.dumps(GOOD_ANSWER).encode()))
            if KEY.encode() in request:
                self.leaked = True

    def speak(self, connection, answer):
        """Reads a request, sends the answer and returns the request."""
        request = b""
        with connection:
            try:
                while b"\r\n\r\n" not in request:
                    data = connection.recv(1 << 16)
                    if not data:
                        break
                    request += data
                head, _, body = request.partition(b"\r\n\r\n")
                found = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
                missing = int(found[1]) - len(body) if found else 0
                while missing > 0:
                    data = connection.recv(1 << 16)
                    missing -= len(data) or missing
                connection.sendall(answer.replace(b"OTHER", str(self.other_port).encode()))
            except OSError:
                pass  # the client has gone
        return request


# ---- In the fork of a case ----------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    """A stream to a file of which the program thinks that it is a terminal."""

    def isatty(self):
        return True


class Waited(BaseException):
    """The program pauses again and again."""


def be_a_case(case, plant):
    """Turns this process into the command of a case; never returns."""
    status = 70
    try:
        os.chdir(case.work)
        os.environ["HOME"] = str(case.folder / "home")
        os.environ["TEACHER_API_KEY"] = KEY
        stdin = "stdin" if Path("stdin").exists() else os.devnull
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        for number in (1, 2):
            path = case.folder / f"stream{number}"
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
        options = {"encoding": "utf-8", "errors": "replace", "line_buffering": True}
        sys.stdout = Terminal(open(1, "wb", 0, closefd=False), write_through=True, **options)
        sys.stderr = io.TextIOWrapper(open(2, "wb", 0, closefd=False), **options)
        skip_pauses()
        limit_itself()
        if plant:
            plant()
        if case.corpus is not None:
            size = len(case.corpus)
            sha256 = hashlib.sha256(case.corpus).hexdigest()
            names = ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")
            files = [datasets.File(name, size, sha256) for name in names]
            datasets.CORPORA["ptb"] = datasets.Corpus("word", (), files)
        gpt2 = case.templates.gpt2
        file = datasets.GPT2.files[0]._replace(
            size=len(gpt2), sha256=hashlib.sha256(gpt2).hexdigest()
        )
        datasets.GPT2 = datasets.GPT2._replace(files=[file])
        server = None
        arguments = case.arguments
        if case.answers is not None:
            server = Server(case.answers)
            server.start()
            port = str(server.port)
            arguments = [each.replace("PORT", port) for each in arguments]
        sys.argv = [case.program, *arguments]
        if case.program == "main.py":
            status = main.main()
        else:
            module = sys.modules[case.program.removesuffix(".py")]
            status = main.run_command(case.program, module.main, arguments)
        if server and server.leaked:
            print("LEAK: a key came to another server", file=sys.stderr)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 71)


def skip_pauses():
    """Makes time.sleep return at once, some times."""
    count = 0

    def sleep(seconds):
        nonlocal count
        count += 1
        if count > MOST_PAUSES:
            raise Waited

    time.sleep = sleep


def memory_in_use():
    """Bytes of memory of this process, which a fork begins with."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def limit_itself():
    """Sets limits on this process beyond what the one before it needs."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30,) * 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sizes = {"SC_PAGE_SIZE": resource.getpagesize()}
    sizes["SC_PHYS_PAGES"] = MACHINE // resource.getpagesize()
    sysconf = os.sysconf
    os.sysconf = lambda name: sizes[name] if name in sizes else sysconf(name)


# ---- The verdict --------------------------------------------------------------------------------


def snapshot(folder):
    """What is in a folder: {path below it: what tells whether it was changed}."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            content = None
            if os.path.islink(path):
                content = os.readlink(path)
            elif name in files and status.st_size < 1 << 20 and os.path.isfile(path):
                content = Path(path).read_bytes()
            elif name in files:
                content = status.st_size, status.st_mtime_ns
            found[os.path.relpath(path, folder)] = status.st_mode, content
    return found


NEW_RUN = re.compile(r"work/save/(text|ptb|python)-[0-9a-f]{6}(/|$)")


def may_write(case, path):
    """Whether a path below the case's folder is one that its command writes."""
    if path in ("stream1", "stream2"):
        return True
    for allowed in case.writes:
        if allowed == "work/save/NEW":
            if NEW_RUN.match(path):
                return True
        elif path == allowed or path.startswith((f"{allowed}/", f"{allowed}.gguf")):
            return True
    return False


# Lines that Rust writes when the package `tokenizers` panics; nobody can prevent them.
PANIC = re.compile(r"thread '.*' panicked at |note: run with `RUST_BACKTRACE|.*\.rs:\d+:\d+")


def announces_long_step(shown):
    """Whether the start screen says that a step has more than STEP tokens."""
    announced = re.search(r"^steps +(\d+) x (\d+) tokens", shown, re.MULTILINE)
    return announced is not None and int(announced[1]) * int(announced[2]) > STEP


def find_faults(case, status, usage, before, baseline):
    """What is forbidden in the end of a case, as lines; baseline: bytes of memory at its start."""
    faults = []
    out = (case.folder / "stream1").read_bytes()
    err = (case.folder / "stream2").read_bytes()
    shown = (out + err).decode("utf-8", "replace")
    words = err.decode("utf-8", "replace")
    is_too_long = case.is_hung or status == -signal.SIGXCPU
    if is_too_long and announces_long_step(shown):
        pass
    elif case.is_hung:
        faults.append("hung")
    elif status < 0:
        faults.append(f"died by {signal.Signals(-status).name}")
    if "Traceback (most recent call last)" in words:
        last = [line for line in words.splitlines() if line and line[0] not in " \t"][-1]
        faults.append(f"traceback: {last[:120]}")
    elif status >= 0:
        faults += judge_words(case, status, words)
    if usage.ru_maxrss * 1024 - baseline > MEMORY:
        faults.append(f"took {(usage.ru_maxrss * 1024 - baseline) >> 20} MiB")
    if "out of memory" in words or "Unable to allocate" in words or "std::bad_alloc" in words:
        faults.append("wanted more memory than there is")
    control = CONTROLS.search(shown)
    if control:
        faults.append(f"printed {control[0]!a}")
    if CANARY in shown:
        faults.append("showed what it should not read")
    if KEY in shown or "LEAK" in words:
        faults.append("gave a key away")
    return faults + judge_files(case, before)


def judge_words(case, status, words):
    """Whether the status, and the last line on stderr, are those of an allowed end."""
    if status not in case.statuses:
        last = words.strip().rpartition("\n")[2]
        return [f"status {status}: {last[:120]}"]
    lines = [line for line in words.splitlines() if not PANIC.match(line)]
    worded = [line for line in lines if line.startswith(f"{case.program}: ")]
    if status == 0 and worded:
        return ["an error, but status 0"]
    if status != 0 and (len(worded) != 1 or lines[-1] != worded[0]):
        return ["no last line that says why"]
    return []


def judge_files(case, before):
    """What was written where nothing should be, and what should not have been read."""
    faults = []
    after = snapshot(case.folder)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) == after.get(path):
            continue
        change = "changed"
        if path not in after:
            change = "deleted"
        elif path not in before:
            change = "made"
        if not may_write(case, path):
            faults.append(f"{change} {path!a}")
        elif not path.startswith(("work/data", "stream")) and path in after:
            _, content = after[path]
            content = content if isinstance(content, bytes) else b""
            if CANARY.encode() in content or KEY.encode() in content:
                faults.append(f"wrote what it should not read to {path!a}")
    for suffix in (".safetensors", ".metadata"):
        pattern = re.compile(r"work/save/good/[0-9a-f]{40}\%s" % suffix)
        if any(map(pattern.fullmatch, before)) and not any(map(pattern.fullmatch, after)):
            faults.append("the good run has no checkpoint any more")
    return faults


# ---- Playing cases ------------------------------------------------------------------------------


def play(name, folder, templates, plant=None):
    """Plays the case of this name in a new folder; returns it and its faults."""
    case = Case(name, folder, templates)
    family = draw_family(case.chance)
    family(case)
    case.family = family.__name__
    before = snapshot(folder)
    sys.stdout.flush()
    baseline = memory_in_use()
    pid = os.fork()
    if pid == 0:
        be_a_case(case, plant)
    case.is_hung = False

    def end(*_):
        case.is_hung = True
        os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.alarm(3 * SECONDS)
    _, status, usage = os.wait4(pid, 0)
    signal.alarm(0)
    case.status = os.waitstatus_to_exitcode(status)
    return case, find_faults(case, case.status, usage, before, baseline)


def draw_family(chance):
    return chance.choices([*FAMILIES], [*FAMILIES.values()])[0]


def describe(case, faults):
    """A line about a case."""
    command = " ".join(map(ascii, case.arguments))
    return f"{case.name} {case.family}: {'; '.join(faults)}\n    {case.program} {command}"


def warm_up():
    """Imports what cases import, and computes nothing."""
    for name in ("collect", "huggingface", "gguf", "pictures", "cases", "decode", "quantize"):
        importlib.import_module(f"extras.{name}")
    for name in ("lora", "distil", "names", "results", "formats"):
        importlib.import_module(f"extras.{name}")
    for name in ("tokenizers", "requests", "yaml", "matplotlib.figure", "gguf", "numpy.random"):
        importlib.import_module(name)
    importlib.import_module("matplotlib.backends.backend_svg")
    main.make_parser()
    main.mx.disable_compile()  # for steps as small as here, loading what is compiled takes longer
    for name in ("http_proxy", "https_proxy", "all_proxy"):  # no case reaches the network
        os.environ[name] = os.environ[name.upper()] = "http://127.0.0.1:9"
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()


def make_folder():
    """A new folder, on a RAM disk if there is one with room."""
    parent = None
    if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 1 << 30:
        parent = "/dev/shm"
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=parent))


def remove(folder):
    """Deletes a folder, whatever was made in it."""
    shutil.rmtree(folder, ignore_errors=True)


def make_templates(folder):
    (folder / "templates").mkdir()
    return Templates(folder / "templates")


def work_off(seed, numbers, folder, templates, report):
    """Plays cases; calls report(case, faults) for each."""
    for number in numbers:
        place = folder / f"case-{number}"
        place.mkdir()
        case, faults = play(f"{seed}-{number}", place, templates)
        report(case, faults)
        remove(place)


def fuzz(seed, count, jobs, folder):
    """Plays so many cases in so many processes; returns the exit status."""
    templates = make_templates(folder)
    began = time.perf_counter()
    workers = []
    for first in range(jobs):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            work_as_one(seed, range(first, count, jobs), folder, templates, first == 0)
        workers.append(pid)
    total = Counter()
    for pid in workers:
        os.waitpid(pid, 0)
        result = folder / f"worker-{pid}.json"
        if result.exists():
            total += Counter(json.loads(result.read_text()))
    seconds = time.perf_counter() - began
    played = total.pop("cases", 0)
    found = total.pop("found", 0)
    rate = played / seconds
    print(f"seed {seed}, {played} cases, {found} findings, {seconds:.0f} s, {rate:.0f} cases/s")
    print(json.dumps(dict(sorted(total.items()))))
    return 1 if found or played < count else 0


def work_as_one(seed, numbers, folder, templates, is_first):
    """Plays cases in this process, which then ends."""
    total = Counter()
    seen = Counter()  # of each kind of fault
    began = time.perf_counter()

    def report(case, faults):
        total["cases"] += 1
        total[f"{case.family}, status {case.status}"] += 1
        if faults:
            total["found"] += 1
            kind = re.sub(r"[0-9a-f]{6,}|\d+", "N", faults[0])
            seen[kind] += 1
            if seen[kind] <= 5:
                print(describe(case, faults), flush=True)
        if is_first and total["cases"] % 500 == 0:
            rate = total["cases"] / (time.perf_counter() - began)
            print(f"{total['cases']} of {len(numbers)}, {rate:.1f} cases/s", flush=True)

    try:
        work_off(seed, numbers, folder, templates, report)
        (folder / f"worker-{os.getpid()}.json").write_text(json.dumps(total))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


# ---- Planted bugs -------------------------------------------------------------------------------


def edited(place, old, new):
    """A function that replaces a part of the source of one of the program's functions."""

    def plant():
        module_name, _, path = place.partition(":")
        module = sys.modules[module_name]
        owner = module
        *outer, name = path.split(".")
        for each in outer:
            owner = getattr(owner, each)
        source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
        if old not in source:
            raise RuntimeError(f"{place} has no {old!r}")
        code = {}
        source = f"from __future__ import annotations\n{source.replace(old, new)}"
        exec(compile(source, f"<{place}>", "exec"), module.__dict__, code)
        setattr(owner, name, code[name])
        for other_name, other in list(sys.modules.items()):  # where it was imported, too
            is_ours = other_name.partition(".")[0] in ("main", "datasets", "extras")
            if is_ours and not outer and hasattr(other, name):
                setattr(other, name, code[name])

    return plant


def follow_with_key():
    requests = sys.modules["requests"]
    requests.Session.should_strip_auth = lambda *_: False


CHECKPOINTS = (odd_records, odd_headers, odd_arrays, odd_tokenizers)
# {name: (the families that meet it, what plants it)}
PLANTED = {
    "a record is unchecked": (
        CHECKPOINTS,
        edited("main:Checkpoint.check", "for field in", "return\n    for field in"),
    ),
    "its model is unchecked": (
        CHECKPOINTS,
        edited("main:check_config", "made = Config(**config)", "return"),
    ),
    "its flags are unchecked": (
        CHECKPOINTS,
        edited("main:check_flags", "for name in", "return\n    for name in"),
    ),
    "its arrays are unchecked": (
        CHECKPOINTS,
        edited("main:check_arrays", "if kinds[0] != kinds[1]", "if False"),
    ),
    "ids beyond the model": (
        CHECKPOINTS,
        edited("main:Checkpoint.open", "if tokenizer.vocab_size >", "if 0 >"),
    ),
    "headers of any length": (
        CHECKPOINTS,
        edited("main:read_header", "min(length, 10**8)", "length"),
    ),
    "less is unreadable": (
        CHECKPOINTS,
        lambda: setattr(main, "UNREADABLE", (OSError, ValueError, LookupError, TypeError)),
    ),
    "links are followed": (
        (odd_links,),
        edited("datasets:no_follow", "os.O_NOFOLLOW | os.O_NONBLOCK", "0"),
    ),
    "a run has any name": (
        (odd_names,),
        lambda: setattr(main, "RUN_NAME", re.compile(".*", re.DOTALL)),
    ),
    "other runs are pruned": (
        (*CHECKPOINTS, odd_links, odd_logs),
        edited("main:prune", "if each.run == run.name", "if True"),
    ),
    "controls are printed": (
        (*CHECKPOINTS, hf_folders),
        edited("datasets:printable", 'CONTROLS.sub("\\ufffd", text)', "text"),
    ),
    "the package may panic": (
        (odd_tokenizers, tokenizer_files, hf_folders),
        edited("datasets:package_errors", "except BaseException", "except OSError"),
    ),
    "pipes are waited for": (
        (hf_folders, configs),
        edited("datasets:read_whole", "if path.exists()", "if False"),
    ),
    "an import may fail oddly": (
        (hf_folders,),
        edited("extras.huggingface:import_model", "explained(fault)", "explained(fault, OSError)"),
    ),
    "YAML's lists unfold": (
        (configs,),
        edited("main:read_config", "isinstance(each, (list, dict))", "False"),
    ),
    "the lists of cases unfold": (
        (cases_files,),
        edited("extras.cases:read_text", 'f"a {key} is', 'f"{entry[key]} is'),
    ),
    "keys go to other servers": ((collections, collected_files), follow_with_key),
    "keys are shown": (
        (collections,),
        edited("extras.collect:Teacher.without_key", "if self.key", "if False"),
    ),
    "answers of any size": (
        (collections,),
        edited("extras.collect:read_answer", "if len(content) >", "if 0 >"),
    ),
    "nothing": (CHECKPOINTS, None),
}


def check_planted():
    """Raises RuntimeError if a bug's place has changed, as its failure would count as found."""
    for name, (_, plant) in PLANTED.items():
        child = os.fork()
        if not child:
            try:
                if plant:
                    plant()
            except Exception:
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"cannot plant {name!r}")


def try_planted(names, seed, count, folder):
    """Prints after how many cases each planted bug is found; returns 0 if all are, else 1."""
    check_planted()
    templates = make_templates(folder)
    found = 0
    for name in names:
        families, plant = PLANTED[name]
        line = f"not in {count}"
        for number in range(count):
            if draw_family(random.Random(f"{seed}-{number}")) not in families:
                continue
            place = folder / "case"
            place.mkdir()
            case, faults = play(f"{seed}-{number}", place, templates, plant)
            remove(place)
            if not faults:
                continue
            place.mkdir()
            _, without = play(f"{seed}-{number}", place, templates)
            remove(place)
            if not without:
                found += 1
                line = f"{number + 1:>5}  {case.name} {case.family}: {faults[0]}"
                break
        print(f"{name:<26}{line}", flush=True)
    print(f"{found} of {len(names)} found")
    return 0 if found == len(names) else 1


# ---- The command line ---------------------------------------------------------------------------


def play_again(name, folder):
    """Plays one case, keeps its folder and shows all; returns the exit status."""
    templates = make_templates(folder)
    place = folder / f"case-{name.rpartition('-')[2]}"
    place.mkdir()
    case, faults = play(name, place, templates)
    print(describe(case, faults))
    for number in (1, 2):
        shown = (place / f"stream{number}").read_bytes().decode("utf-8", "replace")
        print(CONTROLS.sub(lambda found: ascii(found[0])[1:-1], shown))
    print(f"status {case.status}, kept: {place}")
    return 1 if faults else 0


def command_line():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seed", default=str(random.randrange(10**6)))
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--only", metavar="SEED", help="this case alone, which keeps its folder")
    parser.add_argument(
        "--planted",
        nargs="*",
        choices=[*PLANTED, []],
        metavar="NAME",
        help="how soon planted bugs are found: these, or all",
    )
    options = parser.parse_args()
    warm_up()
    folder = make_folder()
    if options.only:
        return play_again(options.only, folder)
    print(f"seed {options.seed}, in {folder}", flush=True)
    try:
        if options.planted is not None:
            names = options.planted or [*PLANTED][:-1]
            return try_planted(names, options.seed, options.cases, folder)
        return fuzz(options.seed, options.cases, options.jobs, folder)
    finally:
        remove(folder)


if __name__ == "__main__":
    sys.exit(command_line())
