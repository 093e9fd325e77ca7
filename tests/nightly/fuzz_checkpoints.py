"""Strangers' checkpoints: whatever their files hold, a command ends well, or in one line.

    python tests/nightly/fuzz_checkpoints.py --seed 7 --cases 20000   cases 7-0, 7-1, ... 7-19999
    python tests/nightly/fuzz_checkpoints.py --only 7-123     that one again; keeps its folder

A *case* is decided by its name. It takes the run or the Hugging Face folder of a stranger, which
the program itself has made, changes one to three things in it (a value, a key, an array, a file, a
name), and mostly puts right hashes on it, as a stranger can. Then it runs a command that meets it,
half of the time on a terminal. The command may end with status 0, or with 1 or 2 and a line that
the program has worded. Forbidden are

- a traceback, death by a signal, more than SECONDS of computing, but for steps of 10,000 rows;
- more memory than MEMORY beyond this process's;
- a file made, changed or deleted where the command has nothing to write: in the home, in a folder
  beside, behind a link, in other runs; what such files hold appearing in what the command writes;
- a character that a terminal acts on;
- the end of --list, or of training another run.

It knows the program's commands and its files, and no function of it.
"""

import contextlib
import copy
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import tty
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forkserver import Program, case_parser, play_all

SECONDS = 20  # of computing: some hundred times what a case takes
# Bytes. Models and files are small here: this is room for a header of 100 MB, the most that is
# read, and its copies.
MEMORY = 300 << 20
# Bytes of memory that the machine is said to have. A record may ask for a large model or a long
# step; what needs more than there is has to be refused.
MACHINE = 16 << 20
ADDRESSES = 4 << 30  # bytes beyond this process's: whoever is refused them would fill a machine
CANARY = "CANARY-5d41402abc4b"  # stands in files that no command is to read

# ---- What is done with a stranger's files -------------------------------------------------------

TEXT = "".join(f"the quick brown fox of line {i} jumps over señor {i * i}\n" for i in range(40))
BRIEF = "--text {text} --new_model --sample_tokens 4 --keep 1 --num_iters"
# A record may ask for a sample of any length.
TRAIN = "--num_iters 3 --keep 1 --sample_tokens 4"
TINY = "--dim 8 --num_heads 2 --num_blocks 1 --context_size 8 --batch_size 2"
TINY += f" --steps_per_report 1 --steps_per_eval 2 --eval_tokens 20 {BRIEF}"
SAMPLE = "--max_tokens 5 --num_samples 2 --prompt"
# {a run: the flags that make it}. "good" is none of a stranger's.
RUNS = {
    "good": "--tokenizer byte",
    "bytes": "--tokenizer byte --seed 1 --average 0.5 --untie --qk_norm",
    "bpe": "--tokenizer bpe --vocab_size 300 --mlp swiglu --num_kv_heads 1",
    "package": "--tokenizer {package} --mlp swiglu",
    "words": "--tokenizer word --optimizer muon",
    "lora": "--init_from good --lora_rank 2",
    "taught": "--teacher good",
}


class Command(NamedTuple):
    """A command that meets a stranger's run, or a Hugging Face folder if it says hub/stranger.

    words: what is typed behind main.py, or behind `python` if they begin with -m.
    writes: a pattern of the paths that it may write; must_succeed: whatever lies beside.
    """

    words: str
    writes: str = "no"
    must_succeed: bool = False


def arguments_of(words):
    """The words of a command, split, with its folders."""
    if not words.startswith("-m "):
        words += " --data_dir data"
    return f"{words} --save_dir save".split()


NEW = "save/text-"  # how the name of a new run begins
COMMANDS = [
    *[Command("--list", must_succeed=True)] * 2,
    *[Command(f"--identifier stranger --temperature 0 {SAMPLE} the")] * 3,
    Command(f"--identifier best {SAMPLE} fox"),
    Command("--identifier stranger --evaluate valid"),
    *[Command(f"--identifier stranger {TRAIN}", f"save/stranger|{NEW}")] * 3,
    Command(TRAIN, "save"),
    Command(f"--identifier good {TRAIN}", "save/good", must_succeed=True),
    Command(f"{TINY} 1 --tokenizer byte", NEW, must_succeed=True),
    Command(f"--init_from stranger {BRIEF} 1", NEW),
    Command(f"--init_from stranger --lora_rank 2 {BRIEF} 1", NEW),
    Command(f"--teacher stranger {TINY} 1", NEW),
    Command(f"--identifier good --draft stranger {SAMPLE} a"),
    Command("-m extras.export out --identifier stranger", "out"),
    Command("-m extras.export out.gguf --identifier stranger", "out.gguf"),
    Command("-m extras.plot out.svg", "out.svg"),
    *[Command(f"--init_from hub/stranger --context_size 8 --batch_size 2 {BRIEF} 1", NEW)] * 2,
    Command(f"--teacher hub/stranger {TINY} 1", NEW),
]

# ---- A stranger's files, as trees of dicts -------------------------------------------------------

FALSE = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
# A tokenizer.json of many parts: each has its own ways to be malformed.
PACKAGE = {
    "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
    "added_tokens": [{"id": 0, "content": "<unk>", "special": True, **FALSE}],
    "normalizer": {"type": "Replace", "pattern": {"Regex": "z+"}, "content": "z"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "FixedLength", "length": 9}],
    },
    "decoder": {"type": "Strip", "content": "z", "start": 1, "stop": 1},
    "model": {
        "type": "WordLevel",
        "vocab": {"<unk>": 0, "the": 1, "fox": 2, "quick": 3, "jumps": 4},
        "unk_token": "<unk>",
    },
}
# What a part of it becomes that chance would not find: a vocabulary larger than each model's, which
# must not be used, and what makes the package panic, which is no Exception.
BEYOND = {"<unk>": 0, "the": 1} | {f"beyond-{i}": i for i in range(2, 400)}
TRAPS = [
    ("model", PACKAGE["model"] | {"vocab": BEYOND}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
]
TYPES = {"F32": "float32", "I32": "int32", "U32": "uint32", "U8": "uint8", "U64": "uint64"}
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "U8": 1, "U64": 8, "BOOL": 1}


class Folder(dict):
    """Files, {name: content}. Content is bytes, a Folder, Link, Pipe or Tensors, or JSON data."""


class Link(str):
    """Where it leads."""


class Pipe:
    """A pipe with a name, to which nobody writes."""


class Tensors(dict):
    """A safetensors file.

    texts: {name: text}; arrays: {name: {"dtype", "shape", "bytes"}}. If not 0, `lie` is the seed of
    what its header then says instead of the truth, and `damage` that of what befalls its bytes.
    """

    def __init__(self, data):
        length = int.from_bytes(data[:8], "little")
        arrays = json.loads(data[8 : 8 + length])
        super().__init__(texts=arrays.pop("__metadata__", {}), arrays=arrays, lie=0, damage=0)
        for entry in arrays.values():
            start, stop = entry.pop("data_offsets")
            entry["bytes"] = data[8 + length + start : 8 + length + stop]

    def __bytes__(self):
        header = {}
        content = b""
        arrays = self.get("arrays")
        for name, entry in arrays.items() if isinstance(arrays, dict) else ():
            try:
                header[name], added = fitted(entry, len(content))
            except (KeyError, TypeError, AttributeError, OverflowError):
                header[name] = str(entry)  # what was put there is no array any more
            else:
                content += added
        if self.get("lie"):
            header = mutated(random.Random(ascii(self["lie"])), header)
        if isinstance(header, dict):
            header = {"__metadata__": self.get("texts"), **header}
        text = dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + content
        if self.get("damage"):
            data = damaged(random.Random(ascii(self["damage"])), data)
        return data


def fitted(entry, start):
    """What a header says of an array that starts there; its bytes, repeated or cut to its size."""
    dtype = entry["dtype"]
    shape = entry["shape"]
    content = b"" + entry["bytes"]
    if content[:1] == b"{":
        shape = [len(content)]
    size = math.prod(number + 0 for number in shape) * WIDTHS.get(dtype, 1)  # no texts
    if content and isinstance(size, int) and 0 <= size < 1 << 20:
        content = (content * (size // len(content) + 1))[:size]
    offsets = [start, start + len(content)]
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}, content


def read(path):
    """What `write` writes."""
    if path.is_dir():
        return Folder((each.name, read(each)) for each in sorted(path.iterdir()))
    data = path.read_bytes()
    if path.suffix in (".safetensors", ".metadata"):
        return Tensors(data)
    return json.loads(data) if path.suffix == ".json" else data


def write(path, content):
    if isinstance(content, Folder):
        path.mkdir(exist_ok=True)
        for name, each in content.items():
            below = path / file_name(name)
            if not os.path.lexists(below):
                write(below, each)
    elif isinstance(content, Link):
        path.symlink_to(content)
    elif isinstance(content, Pipe):
        os.mkfifo(path)
    else:
        path.write_bytes(as_bytes(content))


def as_bytes(content):
    if isinstance(content, (bytes, Tensors)):
        return bytes(content)
    return dumps(content).encode()


def file_name(text):
    """A name that a file can have, as much like this one as possible."""
    name = text.replace("/", "_").replace("\0", "").encode(errors="surrogatepass")[:200]
    return os.fsdecode(name if name.strip(b".") else b"x" + name)


def sha1(data):
    return hashlib.sha1(data).hexdigest()


def seal(run):
    """Puts right hashes on the files of a run: all that is known here of a checkpoint's format.

    <id>.safetensors is named by its SHA1. <id>.metadata has a text `record`, which holds the SHA1
    of the arrays beside it as `state_sha1`, and the text `sha1`, that of the record. So have the
    models that the run keeps in folders of its own.
    """
    for content in run.values():
        if isinstance(content, Folder):
            seal(content)
    for name in [each for each in run if each.endswith(".metadata")]:
        old = name.removesuffix(".metadata")
        new = old
        if f"{old}.safetensors" in run:
            weights = as_bytes(run.pop(f"{old}.safetensors"))
            new = sha1(weights)
            run[f"{new}.safetensors"] = weights
        tensors = run.pop(name)
        texts = tensors.get("texts") if isinstance(tensors, Tensors) else None
        if isinstance(texts, dict) and isinstance(texts.get("record"), str):
            record = texts["record"].replace(old, new)
            state = f'"state_sha1": "{sha1_of_arrays(as_bytes(tensors))}"'
            record = re.sub('"state_sha1": "[0-9a-f]*"', state, record)
            texts["record"] = record
            texts["sha1"] = sha1(record.encode(errors="replace"))
        run[f"{new}.metadata"] = as_bytes(tensors)


def sha1_of_arrays(data):
    """The SHA1 of the arrays in a safetensors file, as far as it is one."""
    lines = b""
    with contextlib.suppress(Exception):  # it is anything
        for name, entry in sorted(Tensors(data)["arrays"].items()):
            dtype = TYPES[entry["dtype"]]
            lines += f"{name} {tuple(entry['shape'])} mlx.core.{dtype}\n".encode()
            lines += entry["bytes"]
    return sha1(lines)


# ---- The mutator --------------------------------------------------------------------------------

DEEP = "@@deep@@"  # becomes brackets in JSON, see `dumps`
HUGE = "@@huge@@"  # becomes a number of 5,000 digits
TEXTS = [
    "\x1b]0;owned\x07", "\x1b[2J", "a\nb", "\0", "\x9b31m", "\ud800", "\udcff", "\u202e",
    "", "x", "é", "x" * 5000, DEEP, HUGE, "../x", "../good", "~", "/dev/zero", ".", "*", "{}",
    "../home/secret.txt", "../beside/secret.txt", "../../beside/secret.txt", "../beside",
    "latest", "auto", "good", "stranger", "--export", "export", "lora_rank", "nan", *WIDTHS,
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 3, 255, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 10**15,
    10**400, 0.0, 0.5, 1e-320, 1e15, 1e308, math.inf, -math.inf, math.nan, True, None,
]  # fmt: skip
COLLECTIONS = [[], {}, [[]], {"a": {}}, {"": None}, [None] * 3, [0] * 4, [[1, 2]]]


def odd_value(chance):
    """Any value of JSON."""
    return copy.deepcopy(chance.choice(chance.choice((TEXTS, NUMBERS, NUMBERS, COLLECTIONS))))


def near(chance, value):
    """A value of the same type, more likely to be let through."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        others = [value + 1, value - 1, 2 * value, 0, 10 ** chance.randrange(12)]
        if abs(value) < 1e300:
            others.append(value * 1.0)
        return chance.choice(others)
    if isinstance(value, float):
        return chance.choice([-value, 2 * value, value * 1e6, value / 1e6])
    if isinstance(value, str):
        place = chance.randrange(len(value) + 1)
        return value[:place] + chance.choice(TEXTS) + value[place + chance.randrange(2) :]
    return odd_value(chance)


def mutated(chance, value):
    """A value with one change; dicts and lists are changed in place."""
    if isinstance(value, (str, bytes)) and value[:1] in ("{", b"{"):
        return mutated_json(chance, value)
    if isinstance(value, bytes):
        return damaged(chance, value)
    if not isinstance(value, (dict, list)) or not value:
        return near(chance, value) if chance.random() < 0.5 else odd_value(chance)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    # What has more in it is drawn more often, and changed as a whole less often.
    key = chance.choices(keys, [size_of(value[each]) for each in keys])[0]
    action = chance.choice(("delete", "odd", "copy", "grow", "rename"))
    if chance.random() > 1 / size_of(value) ** 0.5:
        value[key] = mutated(chance, value[key])
    elif action == "delete":
        del value[key]
    elif action == "odd":
        value[key] = odd_value(chance)
    elif action == "copy":
        value[key] = copy.deepcopy(value[chance.choice(keys)])
    elif isinstance(value, list):
        value += [value[key]] * chance.choice((1, 300))
    elif action == "grow":
        for i in range(chance.choice((1, 300))):
            value[f"{near(chance, key)}{i}"] = near(chance, value[key])
    else:
        value[near(chance, key)] = value.pop(key)
    return value


def size_of(value):
    """About how many values there are in it."""
    if isinstance(value, (str, bytes)):
        return 1 + min(300, len(value) // 10) * (value[:1] in ("{", b"{"))
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return 1 + sum(map(size_of, value))
    return 1


def mutated_json(chance, text):
    """The same for a text or bytes that may hold JSON."""
    try:
        value = json.loads(text)
        if isinstance(value, dict) and "pre_tokenizer" in value and chance.random() < 0.2:
            value = dumps(value | dict([chance.choice(TRAPS)]))
        else:
            value = dumps(mutated(chance, value))
    except (ValueError, RecursionError):  # several lines, or what was put there before
        return near(chance, text) if isinstance(text, str) else damaged(chance, text)
    return value.encode() if isinstance(text, bytes) else value


def damaged(chance, data):
    """Bytes with some of them changed, lost or added, or with another length in front."""
    place = int(chance.random() * (len(data) + 1))
    odd = chance.choice((b"\xff", b"\0", b"\x1b[2J", b"\0\0\xc0\x7f", b"\xed\xa0\x80", b"[", b"{"))
    length = chance.choice((0, 2**27, 2**33, 2**62, 2**63, 2**64 - 1, len(data), 10**8 - 8))
    return chance.choice(
        [
            data[:place] + odd + data[place + 1 :],
            data[:place] + odd + data[place:],
            data[:place] + data[place + chance.randrange(1, 40) :],
            data[:place],
            (odd * len(data))[: len(data)],
            length.to_bytes(8, "little") + data[8:],
            length.to_bytes(8, "little") + data[8:] + bytes(10**8 * chance.randrange(2)),
        ]
    )


def dumps(value):
    """JSON, with all that Python's parser takes besides, as NaN."""
    text = json.dumps(value, default=repr)
    text = text.replace(f'"{DEEP}"', "[" * 50_000).replace(DEEP, "deep")
    return text.replace(f'"{HUGE}"', "9" * 5000).replace(HUGE, "huge")


def misplace(chance, files, beside):
    """Puts something else in the place of a file; beside: a folder that is not the stranger's."""
    name = chance.choice(list(files))
    moved = beside / "moved"
    if chance.random() < 0.4 and not moved.exists():
        write(moved, files[name])
        files[name] = Link(moved)
    else:
        links = map(Link, ["/dev/zero", "/nowhere", beside / "new", beside / "secret.txt"])
        files[name] = chance.choice([Pipe(), Folder(), *links])


# ---- A case -------------------------------------------------------------------------------------


class Templates:
    """The runs and the Hugging Face folder that are changed, made once by a checkout's program."""

    def __init__(self, checkout):
        os.environ["MLX_DISABLE_COMPILE"] = "1"  # for so few steps, loading it takes longer
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # No case reaches the network.
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            os.environ[name] = os.environ[name.upper()] = "http://127.0.0.1:9"
        self.program = Program(checkout / "main.py")
        # What the program imports when it needs it.
        for name in ("tokenizers", "requests", "yaml", "gguf", "matplotlib.backends.backend_svg"):
            importlib.import_module(name)
        parent = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a RAM disk
        self.folder = Path(tempfile.mkdtemp(prefix="strangers-", dir=parent))
        self.text = self.folder / "text.txt"
        self.text.write_text(TEXT)
        save = self.folder / "save"
        package = self.folder / "tokenizer.json"
        write(package, PACKAGE)
        for name, flags in RUNS.items():
            self.make(f"{TINY} 2 {flags} --keep 9".format(text=self.text, package=package))
            [new] = save.glob("text-*")
            new.rename(save / name)
        self.make("-m extras.export hf --identifier bpe")
        self.runs = read(save)
        del self.runs["good"]
        self.hf = read(self.folder / "hf")

    def make(self, words):
        """Runs a command, which has to succeed."""
        log = self.folder / "log.txt"
        log.touch()
        streams = (os.devnull, log, log)
        status = self.program.run(arguments_of(words), streams, self.folder, tick_at_each_look)
        assert not status, f"{words}: {log.read_text()}"


def tick_at_each_look():
    """Makes a second pass from one look at the clock to the next: templates are always the same."""
    time.time = time.perf_counter = map(float, itertools.count(1_700_000_000)).__next__


class Case:
    """The files and the command of one case.

    In `folder` are `work`, where the command runs, and `home` and `beside`, which are none of its
    business.
    """

    def __init__(self, name, templates):
        self.program = templates.program
        self.folder = templates.folder / name
        chance = random.Random(name)
        secret = Folder({"secret.txt": CANARY.encode()})
        work = self.folder / "work"
        write(self.folder, Folder(work=Folder(), home=secret, beside=secret))
        self.on_terminal = chance.random() < 0.5
        self.command = chance.choice(COMMANDS)
        self.arguments = arguments_of(self.command.words.format(text=templates.text))
        is_run = "hub/stranger" not in self.command.words
        files = templates.hf
        if is_run:
            files = templates.runs[chance.choice(list(templates.runs))]
        files = copy.deepcopy(files)
        changes = chance.choices((mutated, misplace), (85, 15), k=chance.choice((1, 1, 2, 3)))
        for _ in range(changes.count(mutated)):
            files = mutated(chance, files)
        if is_run and chance.random() < 0.9:
            seal(files)
        shared = Folder(stranger=files)
        for _ in range(changes.count(misplace)):
            misplace(chance, chance.choice((files or shared, shared)), self.folder / "beside")
        if chance.random() < 0.05:
            shared[chance.choice(TEXTS)] = shared.pop("stranger")
        shutil.copytree(templates.folder / "save" / "good", work / "save" / "good")
        write(work / ("save" if is_run else "hub"), shared)
        self.is_trap = False  # whether ids have no embeddings, without which MLX reads beyond
        for path in work.rglob("stranger/*"):
            if path.is_file() and not path.is_symlink():
                self.is_trap |= b"beyond-399" in path.read_bytes()

    def run(self):
        """Runs the command; returns its faults, as lines."""
        before = snapshot(self.folder)
        reader, writer = os.openpty() if self.on_terminal else os.pipe()
        if self.on_terminal:
            tty.setraw(writer)  # what the program writes arrives as it is
        streams = (os.devnull, f"/dev/fd/{writer}", f"/dev/fd/{writer}")
        _, resident = bytes_of_this_process()
        pid = self.program.start(self.arguments, streams, self.folder / "work", self.prepare)
        os.close(writer)
        self.shown = read_all(reader)
        _, status, usage = os.wait4(pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        self.memory = usage.ru_maxrss * 1024 - resident
        return [*self.judge_end(), *self.judge_files(before, snapshot(self.folder))]

    def prepare(self):
        """Sets limits on the process that is to be the command, and what it sees of the system."""
        os.environ["HOME"] = str(self.folder / "home")
        addresses, _ = bytes_of_this_process()
        addresses += ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        # All that the program asks: that many pages of one byte.
        os.sysconf = {"SC_PHYS_PAGES": MACHINE, "SC_PAGE_SIZE": 1}.get

        def do_not_sleep(seconds):
            """Returns at once."""

        time.sleep = do_not_sleep

    def judge_end(self):
        """What is forbidden in how the command ended and in what it showed."""
        shown = BAR.sub("\n", self.shown)
        last = [line for line in shown.splitlines() if line.strip()][-1:]
        if self.status < 0:
            # A stranger's flags may ask for steps of 10,000 rows. Such a run is computed until its
            # time is up; no other end is excused.
            if self.status != -signal.SIGKILL or not re.search(r"(?m)^steps +\d{5}", shown):
                yield f"died by {signal.Signals(-self.status).name}"
        elif not self.status and self.is_trap and "stranger" in self.command.words:
            yield "used ids that have no embeddings"
        elif self.status > 2 or (self.status and self.command.must_succeed):
            yield f"status {self.status}: {last}"
        elif self.status and not re.search(r"^(main\.py|extras\.\w+): ", shown, re.MULTILINE):
            yield f"no line that says why: {last}"
        if "Traceback (most recent call last)" in shown:
            yield f"a traceback: {last}"
        if self.memory > MEMORY:
            yield f"took {self.memory >> 20} MiB"
        if re.search("out of memory|Unable to allocate|bad_alloc|MemoryError", shown):
            yield "wanted more memory than there is"
        control = CONTROLS.search(shown)
        if self.on_terminal and control:
            yield f"wrote {control[0]!a} to a terminal"
        if CANARY in shown:
            yield "showed what it should not read"

    def judge_files(self, before, after):
        """What was changed where nothing should be; what was written and should not be known."""
        for path in sorted(before.keys() | after.keys()):
            if before.get(path) == after.get(path):
                continue
            if not re.match(rf"work/({self.command.writes}|data)", path):
                yield f"made, changed or deleted {path!a}"
            elif path in after and not path.startswith("work/data"):
                file = self.folder / path
                if file.is_file() and CANARY.encode() in file.read_bytes():
                    yield f"wrote what it should not read to {path!a}"


CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
BAR = re.compile(r"\r(\x1b\[2K)?")  # how progress bars go back to the beginning of their line


def bytes_of_this_process():
    """The bytes of its addresses, and of the memory that it takes."""
    pages = map(int, Path("/proc/self/statm").read_text().split()[:2])
    return [each * resource.getpagesize() for each in pages]


def read_all(reader):
    """What comes from a pipe or terminal until its other end is closed, as text."""
    data = bytearray()
    with contextlib.suppress(OSError):  # how a terminal ends
        while piece := os.read(reader, 1 << 16):
            data += piece
    os.close(reader)
    return data.decode(errors="replace")


def snapshot(folder):
    """What is in a folder: {path below it: what tells whether it was changed}."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        written = None if is_folder else (status.st_size, status.st_mtime_ns, status.st_ino)
        found[str(path.relative_to(folder))] = status.st_mode, written
    return found


# ---- Playing cases ------------------------------------------------------------------------------


def play(templates, name, keeps_folder=False):
    """Plays the case of this name. Raises AssertionError, with its faults.

    keeps_folder: also shows what the command has shown.
    """
    case = Case(name, templates)
    faults = case.run()
    if keeps_folder:
        print(CONTROLS.sub(lambda found: ascii(found[0])[1:-1], BAR.sub("\n", case.shown)))
        print(f"status {case.status}, {case.memory >> 20} MiB, kept: {case.folder}")
    else:
        shutil.rmtree(case.folder)
    words = " ".join(case.arguments)
    if not words.startswith("-m"):
        words = f"main.py {words}"
    assert not faults, f"{'; '.join(faults)}\n    python {words}"


def main():
    parser = case_parser(__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.set_defaults(seed=str(random.randrange(10**6)), jobs=1)
    options = parser.parse_args()
    templates = Templates(options.checkout)
    if options.only:
        return play(templates, options.only, keeps_folder=True)
    try:
        names = [f"{options.seed}-{number}" for number in range(options.cases)]
        return min(1, play_all(partial(play, templates), names, options.jobs))
    finally:
        shutil.rmtree(templates.folder)


if __name__ == "__main__":
    sys.exit(main())
