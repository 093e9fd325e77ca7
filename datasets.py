"""Text in, token ids out: corpora, downloads, tokenizers, and a cache of the result.

    dataset = load_dataset("ptb", "/tmp/lm")  # fetched once, verified, encoded, memory-mapped
    dataset.tokenizer.decode(dataset.train.tokens[:20])

Everything is streamed: memory does not grow with the corpus. This file knows nothing of MLX or of models.
"""

import argparse
import codecs
import contextlib
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
import tempfile
import time
import zipfile
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm


class UsageError(Exception):
    """The user asked for something that cannot be: one line with the cause and the remedy, exit status 2."""


class RunError(Exception):
    """Something failed while the program did what it was asked to: one line, exit status 1."""


@contextlib.contextmanager
def explained(text, *errors, kind=UsageError):
    """Turns `errors`, or any, into a line for the user: `text`, the cause and the remedy, and what the error says."""
    try:
        yield
    except errors or Exception as error:
        raise kind(f"{text} ({' '.join(str(error).split())})") from None


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "transformer-lm"
SPLITS, END = ("train", "valid", "test"), "<|endoftext|>"  # the end of a document, where a text spells it out
# A corpus, encoded. `test` may be None. sha256: of training text and tokenizer; a resumed run knows the corpus by it.
Dataset = namedtuple("Dataset", "name tokenizer train valid test sha256")
# [N] uint16 or uint32, memory-mapped; the bytes, and the words and line ends, behind them; how many are <unk>.
Split = namedtuple("Split", "tokens num_bytes num_words num_unk")
# Bytes of a file: a document, or several with `marker` between them. errors: "strict" refuses what is not UTF-8.
Span = namedtuple("Span", "path start stop marker errors", defaults=(None, "surrogateescape"))
# A download, which counts only with this size (bytes) and SHA256; addresses that end in / have the name put behind.
File = namedtuple("File", "name size sha256 addresses")

# ---- Tokenizers: each function makes one of its `vocabulary`, plain data, or trains it on `texts`. `encode(text)` is
# [N] ids, `decode(ids)` text, `unknown(text)` what becomes `unk`; `eos` stands between documents; an id can be None.
# `to_dict()` goes whole into a checkpoint. No order below is left to chance, so no hash seed changes an id.
def byte_tokenizer(vocabulary=None, texts=(), vocab_size=None):
    """The 256 byte values and `<eos>`. Lossless on any text."""
    return SimpleNamespace(
        kind="byte", vocab_size=257, num_special=1, eos=256, unk=None, unknown=lambda text: [],  # no text is unknown
        encode=lambda text: np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.uint16),
        decode=lambda ids: bytes(i for i in map(int, ids) if i < 256).decode("utf-8", "replace"),
        to_dict=lambda: {"kind": "byte"},  # nothing else to remember
    )  # fmt: skip


def char_tokenizer(vocabulary=None, texts=(), vocab_size=None):
    """The characters of the training text in sorted order, then `<unk>`. Lossless on the characters it knows."""
    if vocabulary is None:
        vocabulary = "".join(sorted(set(itertools.chain.from_iterable(map(utf8, texts)))))
    unk = len(vocabulary)  # the id after the last character
    table = np.full(0x110000, unk, token_dtype(unk + 1))  # [code point] -> id
    table[list(map(ord, vocabulary))] = np.arange(unk)  # of all others `unk`
    return SimpleNamespace(
        kind="char", vocabulary=vocabulary, vocab_size=unk + 1, num_special=1, eos=None, unk=unk,  # no end
        encode=lambda text: table[np.frombuffer(utf8(text).encode("utf-32-le"), np.uint32)],  # looked up all at once
        decode=lambda ids: "".join(vocabulary[i] if i < unk else "\ufffd" for i in map(int, ids)),
        unknown=lambda text: sorted(set(text) - set(vocabulary)),
        to_dict=lambda: {"kind": "char", "vocabulary": vocabulary},
    )  # fmt: skip


def word_tokenizer(vocabulary=None, texts=(), vocab_size=None):
    """The words (`str.split`) of the training text by frequency, then alphabet; `<eos>` at each \\n; `<unk>`."""
    split = lambda text: utf8(text).replace("\n", " <eos> ").split()
    if vocabulary is None:
        counts = Counter({"<eos>": 0, "<unk>": 0})  # both exist even where the text has none
        counts.update(itertools.chain.from_iterable(map(split, texts)))
        vocabulary = sorted(counts, key=lambda word: (-counts[word], word))  # no tie is left
    known = {word: i for i, word in enumerate(vocabulary)}
    eos, unk, dtype = known["<eos>"], known["<unk>"], token_dtype(len(known))
    return SimpleNamespace(
        kind="word", vocabulary=vocabulary, vocab_size=len(known), num_special=2, eos=eos, unk=unk,
        encode=lambda text: np.fromiter(map(known.get, split(text), itertools.repeat(unk)), dtype),
        decode=lambda ids: re.sub(" ?\n ?", "\n", " ".join("\n" if i == eos else vocabulary[i] for i in map(int, ids))),
        unknown=lambda text: [word for word in text.split() if word not in known],
        to_dict=lambda: {"kind": "word", "vocabulary": vocabulary},
    )  # fmt: skip


def bpe_tokenizer(vocabulary=None, texts=(), vocab_size=32000, kind="bpe"):
    """By the `tokenizers` package: GPT-2's or a trained byte-level BPE, lossless, END one token; or an imported one."""
    with explained("the tokenizers gpt2 and bpe need a package: pip install tokenizers", ImportError):
        from tokenizers import ByteLevelBPETokenizer, Tokenizer
    if vocabulary is None:
        untrained, shown = ByteLevelBPETokenizer(), sys.stderr.isatty()  # bars are for terminals
        untrained.train_from_iterator(map(utf8, texts), vocab_size, 0, special_tokens=[END], show_progress=shown)
        vocabulary = untrained.to_str()
    bpe = Tokenizer.from_str(vocabulary)  # trained now, or what from_dict or a download gave
    size, dtype = bpe.get_vocab_size(), token_dtype(bpe.get_vocab_size())
    ends = map(bpe.token_to_id, (END, "<eos>", "</s>", "<|end_of_text|>"))  # ours, and those of imported models
    eos = next((id for id in ends if id is not None), None)
    return SimpleNamespace(
        kind=kind, vocabulary=vocabulary, package=bpe, vocab_size=size, num_special=int(eos is not None), eos=eos,
        encode=lambda text: np.array(bpe.encode(utf8(text), add_special_tokens=False).ids, dtype),
        encode_batch=lambda texts: [np.array(each.ids, dtype) for each in bpe.encode_batch_fast(  # in parallel threads
            [*map(utf8, texts)], add_special_tokens=False)],
        decode=lambda ids: bpe.decode(list(map(int, ids)), skip_special_tokens=False),  # else END would vanish
        unk=None, unknown=lambda text: [], to_dict=lambda: {"kind": kind, "vocabulary": vocabulary},
    )  # fmt: skip


TOKENIZERS = {"byte": byte_tokenizer, "char": char_tokenizer, "word": word_tokenizer, "bpe": bpe_tokenizer}
TOKENIZERS["gpt2"] = lambda *arguments: bpe_tokenizer(*arguments, kind="gpt2")
# The tokenizer that gave `data` by its `to_dict()`; a KeyError for a kind that this version does not know.
tokenizer_from_dict = lambda data: TOKENIZERS[data["kind"]](data.get("vocabulary"))
token_dtype = lambda vocab_size: np.uint16 if vocab_size <= 1 << 16 else np.uint32


def utf8(text):
    """`text` with pairs of surrogates joined and U+FFFD for what UTF-8 cannot hold: halves of them, stray input."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# ---- Downloads
def fetch(file, folder, mirror=None, say=print):
    """Path of `file` in `folder`, fetched from its addresses in turn or from `mirror` (an address or a folder with
    <dataset>/<file name>). It gets its name only once it is verified. Raises RunError with all reasons and remedies."""
    path, part, reasons = folder / file.name, folder / f"{file.name}.part", []
    addresses = [f"{mirror.rstrip('/')}/{folder.name}/"] if mirror else file.addresses  # no other is asked then
    addresses = [address + file.name if address.endswith("/") else address for address in addresses]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{file.name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes one fetches, and the other finds the file
        if path.exists():  # fetched before
            if not (fault := find_fault(file, path)):
                return path  # and it was verified just now
            say(f"{path} is not the file it should be ({fault}); it is fetched anew.")
        while addresses:
            try:
                if not (resumed := part.exists()) or part.stat().st_size != file.size:  # else a kill left it unverified
                    download(addresses[0], part, file.size)
                if not (fault := find_fault(file, part)):
                    say(f"Fetched {addresses[0]} ({file.size:,} bytes, verified) to {path}")
                    return part.replace(path)
                part.unlink()  # a wrong file is not gone on with
                if not resumed:  # else the fault may lie in what was there before: once more, from the start
                    raise OSError(fault)
            except (OSError, ValueError) as error:  # requests' own are OSErrors; a malformed redirect is a ValueError
                reasons.append(f"{addresses.pop(0)}: {error}")
    problem = f"{file.name} could not be fetched ({'; '.join(reasons)})"
    by_hand = f"Put it at {path} by hand ({file.size:,} bytes, SHA256 {file.sha256})"
    raise RunError(f"{problem}. {by_hand}, or name another source with --mirror; --dataset python needs no network.")


def find_fault(file, path):
    """What is wrong with the size or SHA256 of the file at `path`, or None."""
    if os.path.getsize(path) != file.size:
        return f"size {os.path.getsize(path):,} instead of {file.size:,} bytes"
    return None if sha256_of(path) == file.sha256 else f"SHA256 other than {file.sha256[:12]}…"


def sha256_of(path):
    """SHA256 of a file's bytes, which may be more than memory holds."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def download(address, part, size):
    """Brings `address` into the file `part`, going on where it was cut off, until six tries in a row bring nothing."""
    if "://" not in address:  # a mirror may be a folder
        return shutil.copyfile(os.path.expanduser(address), part)
    import requests  # not at each start: that takes a fifth of a second
    failures, told, reason, have = 0, None, "the connection was cut", part.stat().st_size if part.exists() else 0
    while failures < 6:  # which counts only tries without a byte
        had = have = have if have < size else 0  # too long a part is begun anew
        headers = {"User-Agent": "transformer-lm (a language-model trainer)", "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={have}-"} if have else {}  # the rest only
        try:
            with requests.get(address, headers=headers, stream=True, timeout=30) as response:
                status, told = response.status_code, response.headers  # told: None until a server has answered
                if status == 429 or status >= 500:
                    raise requests.HTTPError(f"HTTP status {status}")  # worth another try
                have = have if status == 206 else 0  # a server may send the whole whatever it is asked for
                stated = int(told.get("Content-Length", size - have)) + have  # bytes, of the whole file
                if status not in (200, 206) or stated != size or "html" in told.get("Content-Type", ""):
                    raise OSError(f"HTTP status {status}, {told.get('Content-Type')}, {stated:,} of {size:,} bytes")
                bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None)
                with bar, part.open("ab" if have else "wb") as out:
                    for chunk in response.iter_content(1 << 16):  # the last, unfinished one is lost in a cut
                        bar.update(out.write(chunk))
                        if out.tell() > size:
                            raise OSError(f"more than {size:,} bytes")  # a lying server must not fill the disk
        except requests.RequestException as error:  # whose text wraps the cause in three layers of urllib3's
            reason = re.search(r"([^:'\"(]*)['\")]*$", str(error))[1].strip() or type(error).__name__
            if told is None:  # a dead host is not worth the wait
                raise OSError(reason) from None
        have = part.stat().st_size if part.exists() else 0
        if have == size:
            return None
        failures = failures + 1 if have <= had else 0  # one that crawls may go on
        pause = told.get("Retry-After", "")
        time.sleep(min(int(pause), 60) if pause.isdigit() else 2**failures // 2)  # seconds
    raise OSError(reason)


def extract(archive, member, folder):
    """Path of `member` of a zip file, unpacked into `folder` under its last name alone. Raises RunError."""
    fault = f"{archive} does not hold {member}: delete it and start again"
    with explained(fault, KeyError, zipfile.BadZipFile, kind=RunError), tempfile.TemporaryDirectory(dir=folder) as new:
        return Path(zipfile.ZipFile(archive).extract(member, new)).replace(folder / os.path.basename(member))


# ---- Corpora
FILES = {  # name -> size in bytes, SHA256
    "ptb.train.txt": (5101618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    "ptb.valid.txt": (399782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    "ptb.test.txt": (449945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
    "wikitext-2-v1.zip": (4475746, "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c"),
    "wikitext-103-v1.zip": (190229076, "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"),
    "enwik8.zip": (36445475, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
    "input.txt": (1115394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "TinyStories-train.txt": (1924281556, "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f"),
    "TinyStories-valid.txt": (19447282, "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4"),
    "TinyStoriesV2-GPT4-train.txt": (2227753162, "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
    "TinyStoriesV2-GPT4-valid.txt": (22502601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
    "tokenizer.json": (1355256, "8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6"),
}
GITHUB = "https://raw.githubusercontent.com/{}/master/data/{}", "https://cdn.jsdelivr.net/gh/{}@master/data/{}"
HUBS = "https://huggingface.co", "https://hf-mirror.com"
PTB = [GITHUB[i].format(f"{user}/lstm", "") for i, user in ((0, "wojzaremba"), (0, "tomsercu"), (1, "wojzaremba"))]
WIKITEXT = ["https://wikitext.smerity.com/"]
WIKITEXT += ["https://web.archive.org/web/20230301182406id_/https://s3.amazonaws.com/research.metamind.io/wikitext/"]
SHAKESPEARE = [address.format("karpathy/char-rnn", "tinyshakespeare/") for address in GITHUB]
STORIES = [f"{hub}/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/" for hub in HUBS]
GPT2 = [f"{hub}/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/" for hub in HUBS]

CORPORA = {  # name -> usual tokenizer, addresses, texts, marker. A text is a file or a member of an archive, with the
    # percents of its bytes at which it is cut; the pieces of all of them are in order the splits train, valid and test.
    # Penn Treebank as Mikolov et al. (2010) prepared it: one sentence a line, 10,000 words.
    "ptb": ("word", PTB, {f"ptb.{split}.txt": [] for split in SPLITS}),
    # WikiText (Merity et al. 2016): Wikipedia articles by words; 2 and 103 million of them.
    "wikitext2": ("word", WIKITEXT, {f"wikitext-2-v1.zip/wikitext-2/wiki.{s}.tokens": [] for s in SPLITS}),
    "wikitext103": ("word", WIKITEXT, {f"wikitext-103-v1.zip/wikitext-103/wiki.{s}.tokens": [] for s in SPLITS}),
    # The first 100 MB of an English Wikipedia dump (Hutter Prize), split by bytes: 90, 5 and 5 million.
    "enwik8": ("byte", ["https://mattmahoney.net/dc/", "https://data.deepai.org/"], {"enwik8.zip/enwik8": [90, 95]}),
    # Karpathy's 40,000 lines of Shakespeare: the first 90 % of the characters (all ASCII) to train, the rest valid.
    "tinyshakespeare": ("char", SHAKESPEARE, {"input.txt": [90]}),
    # Stories by GPT-3.5 and GPT-4 (Eldan & Li 2023). They have no test split: that is the second half of valid.
    "tinystories": ("gpt2", STORIES, {"TinyStories-train.txt": [], "TinyStories-valid.txt": [50]}, END),
    "tinystoriesv2": ("gpt2", STORIES, {"TinyStoriesV2-GPT4-train.txt": [], "TinyStoriesV2-GPT4-valid.txt": [50]}, END),
    "python": ("byte",), "text": ("byte",),
}  # fmt: skip


def python_spans():
    """{split: [Span, ...]} of the running Python's top-level modules: every tenth to valid, the next one to test."""
    modules = [Span(p, 0, os.path.getsize(p)) for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    valid, test = modules[9::10], modules[10::10]
    return {"train": [span for span in modules if span not in valid + test], "valid": valid, "test": test}


def corpus_spans(name, folder, mirror, say):
    """{split: [Span, ...]} of a corpus of the table, whose files are downloaded if they are missing."""
    (_, addresses, texts, *marker), spans = CORPORA[name], []
    for place, percents in texts.items():
        file, _, member = place.partition("/")
        path = folder / os.path.basename(place)
        if not (member and path.exists()):  # what was unpacked is enough
            path = fetch(File(file, *FILES[file], addresses), folder, mirror, say)
            path = extract(path, member, folder) if member else path
        cuts = [find_cut(path, os.path.getsize(path) * percent // 100, *marker) for percent in (0, *percents, 100)]
        spans += [Span(path, *ends, *marker) for ends in itertools.pairwise(cuts)]
    return {split: [span] for split, span in zip(SPLITS, spans)}


def own_text(given, valid_fraction, say, save_dir):
    """{split: [Span, ...]} of the user's files, each a document. Without a given "valid" a part of "train" is it."""
    files = {split: text_files(paths, say, save_dir) for split, paths in given.items()}  # each once, in order
    splits = {split: [Span(path, 0, os.path.getsize(path), None, "strict") for path in files[split]] for split in files}
    documents = [span for span in splits["train"] if span.stop]  # not the empty ones
    if not documents:
        raise UsageError(f"there is no text in {', '.join(map(str, given['train']))}: give other files to --text")
    return splits | ({"train": documents} if "valid" in given else divide(documents, valid_fraction))


def divide(documents, valid_fraction):
    """{"train": [Span, ...], "valid": ...}: by default of ten documents or more every tenth, of few the text's end."""
    counts = [int(i * valid_fraction + 1e-9) for i in range(len(documents) + 1)]  # of the first i; rounding aside
    if counts[-1]:
        valid = dict.fromkeys(span for span, (a, b) in zip(documents, itertools.pairwise(counts)) if a < b)
        return {"train": [span for span in documents if span not in valid], "valid": list(valid)}
    size = round(sum(span.stop for span in documents) * (1 - valid_fraction))  # bytes to train on
    before = itertools.accumulate((span.stop for span in documents), initial=0)
    cuts = [find_cut(span.path, size - start, "\n") for span, start in zip(documents, before)]  # 0 beyond `size`
    train = [span._replace(stop=cut) for span, cut in zip(documents, cuts) if cut]
    valid = [span._replace(start=cut) for span, cut in zip(documents, cuts) if cut < span.stop]
    return {"train": train, "valid": valid}


def find_cut(path, at, marker=None):
    """Where to cut a file: at byte `at` or, with a `marker`, behind the first in the next 32 KiB, else a character."""
    size = os.path.getsize(path)
    if not marker or not 0 < at < size:
        return max(0, min(at, size))
    with open(path, "rb") as file:
        file.seek(at - 1)
        near = file.read(1 << 16)
    found = re.compile(re.escape(marker.encode())).search(near, 0, len(near) // 2)
    return at - 1 + (found or re.match(rb".[\x80-\xbf]*", near, re.DOTALL)).end()


def text_files(paths, say, save_dir):
    """The files that `paths` mean: files, patterns, and below folders all text not hidden and not in `save_dir`."""
    found = []
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches or not all(os.access(match, os.R_OK) for match in matches):
            raise UsageError(f"{path}: no such file, folder or pattern to read; give a text's path, or put it back")
        for match in map(Path, matches):
            below = [file for file in sorted(match.rglob("*")) if "/." not in f"/{file.relative_to(match)}"]
            below = [file for file in below if file.is_file() and save_dir.resolve() not in file.resolve().parents]
            begins = (file.open(encoding="utf-8", errors="surrogateescape").read(1 << 16) for file in below)
            texts = [file for file, begin in zip(below, begins) if not re.search("[\0\udc80-\udcff]", begin)]
            found += texts if match.is_dir() else [match]  # a file that is named is taken whatever it holds
            if len(texts) < len(below):
                say(f"{match}: {len(below) - len(texts):,} of {len(below):,} files are not UTF-8 text and left out")
    return list(dict.fromkeys(found))  # each once


# ---- Encoding, as a stream
# The last place where a text can be cut so that its parts give the tokens of the whole: behind a line end that GPT-2's
# BPE (not all imported ones) parts from what follows (as it does a white space's last character), else at a blank.
LINE = re.compile(r".*((?<=\S)\n(?=\S)|\n(?=[ \t\n][^\s<]))", re.DOTALL)
BLANK = re.compile(r".*((?<=\S)(?=\s[^\s<])|(?<=\s)(?=<\|endoftext\|>))", re.DOTALL)


def read_documents(spans, size=1 << 17):
    """Yields (text, begins): blocks of about `size` bytes, or documents that a marker ends; does it begin one?"""
    for span in spans:
        decoder, rest, begins = codecs.getincrementaldecoder("utf-8")(span.errors), "", True  # rest: not yet yielded
        with open(span.path, "rb") as file:
            file.seek(span.start)
            while data := file.read(min(size, span.stop - file.tell())):
                final = file.tell() == span.stop  # what is left is yielded whole
                try:
                    rest += decoder.decode(data, final)
                except UnicodeDecodeError as error:
                    at = file.tell() - len(error.object) + error.start  # bytes from the start of the file
                    raise UsageError(f"{span.path} is not UTF-8 at byte {at:,}: convert it (iconv -t UTF-8)") from None
                long = final or len(rest) > 16 * size  # do not wait for a better place to cut
                if span.marker:
                    *documents, rest = [*rest.split(span.marker), *[""] * final]  # the last may go on in the next block
                    yield from ((text.strip("\n"), True) for text in documents if text.strip())
                elif (place := LINE.match(rest) or long and BLANK.match(rest)) or long:
                    cut = place.end() if place and not final else len(rest)
                    yield rest[:cut], begins
                    rest, begins = rest[cut:], False  # the rest belongs to the same document


def write_tokens(spans, tokenizer, path):
    """Encodes `spans` into a file, with one `eos` between documents (by words, behind each). Returns what it counts."""
    count, digest, last = np.zeros(4, int), hashlib.sha256(), None  # [tokens, bytes, words, <unk>]
    encode_all = getattr(tokenizer, "encode_batch", lambda texts: map(tokenizer.encode, texts))
    blocks = itertools.chain(read_documents(spans), [("", True)] if tokenizer.kind == "word" else [])
    bar = tqdm(total=sum(s.stop - s.start for s in spans), unit="B", unit_scale=True, desc=path.name, disable=None)
    path.unlink(missing_ok=True)  # whoever trains on the old tokens keeps them
    with bar, path.open("wb") as out, ThreadPoolExecutor(1) as hasher:
        while batch := list(itertools.islice(blocks, 64)):  # 8 MiB of own text
            for (text, begins), ids in zip(batch, encode_all([text for text, _ in batch])):
                if begins and last not in (None, tokenizer.eos) and tokenizer.eos is not None:
                    ids = np.append(np.array(tokenizer.eos, ids.dtype), ids)  # which ends the document before
                last = ids[-1] if len(ids) else last  # a block of white space may have none
                data = np.frombuffer(raw := text.encode("utf-8", "surrogateescape"), np.uint8)
                space = (data == 32) | (data - np.uint8(9) <= 4) | (data - np.uint8(28) <= 3)  # what split() cuts at
                words = np.count_nonzero(space[:-1] > space[1:]) + (not space[:1].all())  # 26 times as fast as split()
                words = words if text.isascii() else len(text.split())  # Unicode has other blanks, too
                count += len(ids), len(raw), words + text.count("\n"), np.count_nonzero(ids == tokenizer.unk)
                hasher.submit(digest.update, raw)  # beside the encoding: hashlib lets other threads run
                out.write(ids)
                bar.update(len(raw))
    counts = zip(("num_tokens", *Split._fields[1:]), count.tolist())
    return dict(counts, size=path.stat().st_size, sha256=digest.hexdigest())


# ---- Datasets
def usual_folder():
    """The folder where nobody names one: on a RAM disk if there is one (on Linux with 4 GiB free), else CACHE."""
    roomy = os.path.isdir("/dev/shm") and (shm := os.statvfs("/dev/shm")).f_bavail * shm.f_frsize >= 4 << 30
    roomy = roomy or os.path.isdir("/dev/shm/transformer-lm")  # in use: else a run that fills it is lost from sight
    disks = ["/Volumes/RAMDisk"] * os.path.ismount("/Volumes/RAMDisk") + ["/dev/shm"] * roomy
    return Path(disks[0], "transformer-lm") if disks else CACHE  # RAM is where a checkpoint is written fastest


def open_folder(save_dir, writing):
    """The folder of checkpoints and corpora as a Path, made if need be. Raises UsageError if it cannot be used."""
    folder = usual_folder() if save_dir is None else Path(save_dir).expanduser()
    if save_dir is None and writing:
        lost = ", a RAM disk: it does not survive a reboot" * (folder != CACHE)
        tqdm.write(f"Checkpoints and corpora go to {folder}{lost} (--save_dir names another folder)")
    if not (writing or folder.is_dir()):
        raise UsageError(f"there is no folder {folder}: name the one that a run was saved in with --save_dir")
    if writing:
        with explained(f"cannot write to --save_dir {folder}: name a folder of yours", OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # a folder can exist and yet be closed to us
    return folder


# Size (bytes) and time of change (ns) of a file, False if it is not there: while they stay, so does its text.
stamp = lambda path: os.path.exists(path) and [os.stat(path).st_size, os.stat(path).st_mtime_ns]


def read_about(cache, spans):
    """What about.json says of the tokens in `cache`, {} unless they are whole, and whether their text is as it was."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # it is damaged
        about = json.loads((cache / "about.json").read_text())
        if all(stamp(cache / f"{split}.tokens")[0] == had["size"] for split, had in about["splits"].items()):
            same = not spans or about["text"][0] == repr(spans)
            return about, same and all(stamp(path) == known for path, known in about["stamps"].items())
    return {}, False


def write_splits(spans, tokenizer, cache):
    """Encodes all splits into `cache`; returns their counts, the tokenizer, and the SHA256 of it and train's counts."""
    (cache / "about.json").unlink(missing_ok=True)  # from here until it is written anew no tokens count
    splits = {split: write_tokens(spans[split], tokenizer, cache / f"{split}.tokens") for split in spans}
    sha256 = hashlib.sha256(json.dumps([splits["train"], tokenizer.to_dict()]).encode()).hexdigest()
    return {"splits": splits, "tokenizer": tokenizer.to_dict(), "sha256": sha256}


def load_dataset(name, save_dir, text=(), tokenizer="auto", valid_fraction=0.1, mirror=None, say=print,
                 vocab_size=32000, valid_text=(), test_text=(), train_tokens=None):  # fmt: skip
    """The corpus `name`, a key of CORPORA ("text": the user's files), as a Dataset; its files go below `save_dir`.
    tokenizer: a kind, with the vocabulary of the whole training split, even if only `train_tokens` of it are used; or
    a ready one's `to_dict()`. Raises UsageError if the user's files cannot be used, RunError for a failed download."""
    save_dir, ready = Path(save_dir), tokenizer if isinstance(tokenizer, dict) else None
    kind = ready["kind"] if ready else CORPORA[name][0] if tokenizer == "auto" else tokenizer
    if not 0.001 <= valid_fraction <= 0.5 or kind == "bpe" and vocab_size < 257:
        raise UsageError("--valid_fraction goes from 0.001 to 0.5, --vocab_size from 257 (the bytes and the end token)")
    given = {"train": text, "valid": valid_text, "test": test_text}
    given = {split: [os.path.abspath(os.path.expanduser(p)) for p in paths] for split, paths in given.items() if paths}
    source = {"text": [given, valid_fraction], "python": sysconfig.get_path("stdlib")}.get(name)
    # The cache's name: all that decides the tokens but the text, which is compared below.
    key = json.dumps([source, ready or (vocab_size if kind == "bpe" else None)])
    cache = save_dir / name / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    spans = own_text(given, valid_fraction, say, save_dir) if name == "text" else None  # downloads do not change
    with open(cache / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes one encodes
        about, fresh = read_about(cache, spans)  # a warm start encodes nothing
        if not fresh:
            spans = spans or (python_spans() if name == "python" else corpus_spans(name, save_dir / name, mirror, say))
            before = {str(span.path): stamp(span.path) for split in spans.values() for span in split}
            content = [repr(spans), list(map(sha256_of, before))]  # by which a text is known again
            if about.get("text") != content:
                vocabulary = ready and ready.get("vocabulary")
                if kind == "gpt2" and not ready:
                    file = File("tokenizer.json", *FILES["tokenizer.json"], GPT2)
                    vocabulary = fetch(file, save_dir / "gpt2", mirror, say).read_text()
                texts = (text for text, _ in read_documents(spans["train"]))
                about = write_splits(spans, TOKENIZERS[kind](vocabulary, texts, vocab_size), cache) | {"text": content}
            about["stamps"] = before  # of before it was read: a change since then shows at the next start
            (cache / "about.new").write_text(json.dumps(about))
            (cache / "about.new").replace(cache / "about.json")
    trained, splits = tokenizer_from_dict(about["tokenizer"]), dict.fromkeys(SPLITS)
    for split, known in about["splits"].items():
        if known["num_tokens"] > 1:  # a single one has no next one to predict
            ids = np.memmap(cache / f"{split}.tokens", token_dtype(trained.vocab_size), "r")
            splits[split] = Split(ids[: train_tokens if split == "train" else None], *map(known.get, Split._fields[1:]))
    if not splits["train"] or not splits["valid"]:
        raise UsageError("no text is left for training or validation: give more text or another --valid_fraction")
    return Dataset(name, trained, **splits, sha256=about["sha256"])


def append_lines(path, heads):
    """Opens a file of JSON lines to go on with: the file and its whole lines, of which line i begins like heads[i]. A
    last one that a kill cut off is deleted. Raises UsageError, and changes nothing, if the file holds other things."""
    heads = [json.dumps(head, ensure_ascii=False).encode()[:-1] for head in heads]
    out = open(path, "a+b")
    out.seek(0)
    *lines, cut = out.read().split(b"\n")  # `cut`: what stands behind the last line end
    ours = len(lines) <= len(heads) and all(map(bytes.startswith, lines, heads))
    if not ours or cut[: len(head := [*heads, b"\n"][len(lines)])] != head[: len(cut)]:
        raise UsageError(f"{path} holds other things than this model's answers to these prompts: name another --output")
    out.truncate(out.tell() - len(cut))
    return out, lines


def distill(url, model, prompts, folder, most=1000, timeout=120, say=print):
    """Collects what `model`, at a server that speaks OpenAI's chat completions, answers to `prompts`: a line of JSON
    each in folder/answers.jsonl, and all of them, for --text, in folder/corpus.txt. At most `most` requests a start;
    the next start goes on. The key, from TEACHER_API_KEY, is written nowhere. Raises UsageError, RunError."""
    import requests

    folder.mkdir(parents=True, exist_ok=True)
    key, path, sent = os.environ.get("TEACHER_API_KEY", ""), folder / "answers.jsonl", 0
    address, headers = f"{url.rstrip('/')}/chat/completions", {"Authorization": f"Bearer {key}"} if key else {}
    out, lines = append_lines(path, [{"prompt": prompt, "model": model} for prompt in prompts])
    with out:
        for prompt in prompts[len(lines) :]:
            body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
            for pause in (1, 2, 4, 8, 16, 32, 60, None):  # seconds
                if sent >= most:
                    raise RunError(f"{most} requests are made (the limit), {len(lines)} prompts answered: start again")
                sent, wait = sent + 1, ""
                try:
                    answer = requests.post(address, json=body, headers=headers, timeout=timeout)
                    status, wait = answer.status_code, answer.headers.get("Retry-After", "")
                    if status == 200:
                        text = utf8(answer.json()["choices"][0]["message"]["content"] or "")  # it may hold half a pair
                        break
                    reason = f"status {status}: {answer.text}"
                    if status < 500 and status not in (408, 409, 425, 429):
                        pause = None  # it will not do another time
                except (requests.RequestException, ValueError, LookupError, TypeError) as error:
                    reason = f"{type(error).__name__}: {error}"
                reason = " ".join(reason.replace(key or "\0", "***")[:240].split())  # no message shows the key
                if pause is None:
                    raise RunError(f"{url} does not answer ({reason}); {len(lines):,} answers are kept: start it again")
                say(f"{reason}; once more in a moment")
                time.sleep(max(pause, min(int(wait), 600)) if wait.isdigit() else pause)
            lines += [json.dumps({"prompt": prompt, "model": model, "completion": text}, ensure_ascii=False).encode()]
            out.write(lines[-1] + b"\n")
            out.flush()  # an answer that was paid for is not lost
    corpus = "".join("{prompt}\n{completion}\n".format(**json.loads(line)) for line in lines)
    (folder / "corpus.txt").write_text(corpus, "utf-8")
    say(f"{len(lines):,} answers are in {path}; train on them with --text {folder / 'corpus.txt'}")


def make_parser():
    """The flags of this file as a program; those of a corpus mean what they mean to main.py."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", choices=[name for name in CORPORA if name != "text"], default="ptb")
    add("--text", nargs="+", metavar="PATH", help="your own files, folders or patterns instead")
    add("--tokenizer", choices=["auto", *TOKENIZERS], default="auto")
    add("--vocab_size", type=int, default=32000, help="of --tokenizer bpe (default: %(default)s)")
    add("--valid_fraction", type=float, default=0.1, help="of --text (default: %(default)s)")
    add("--save_dir", help="the folder that main.py is given, too (default: as there)")
    add("--mirror", metavar="BASE", help="address or folder that holds <dataset>/<file>")
    add = parser.add_argument_group("collecting a corpus (a key is read from TEACHER_API_KEY)").add_argument
    add("--distill_from", metavar="URL", help="of a server that speaks OpenAI's chat completions")
    add("--teacher_model", metavar="NAME", help="the server's model")
    add("--teacher_prompts", metavar="FILE", help="a prompt a line")
    add("--output", metavar="DIR", help="for answers.jsonl and corpus.txt")
    add("--max_requests", metavar="N", type=int, default=1000, help="limit of one start (default: %(default)s)")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help lists all flags)\n")
    return parser


def main():
    """Prepares a corpus ahead of training and says what it is, or collects one from a teacher."""
    parser = make_parser()
    flags = parser.parse_args()
    teaching = [flags.distill_from, flags.teacher_model, flags.teacher_prompts, flags.output]
    if any(teaching) and None in teaching:  # --max_requests alone has a default
        parser.error("--distill_from, --teacher_model, --teacher_prompts and --output go together: give all")
    try:
        if flags.distill_from:
            with explained(f"--teacher_prompts {flags.teacher_prompts} must be a UTF-8 file", OSError, ValueError):
                prompts = Path(flags.teacher_prompts).read_text("utf-8").removesuffix("\n").split("\n")
            return distill(flags.distill_from, flags.teacher_model, prompts, Path(flags.output), flags.max_requests)
        given = {name: getattr(flags, name) for name in ("text", "tokenizer", "vocab_size", "valid_fraction", "mirror")}
        dataset = load_dataset("text" if flags.text else flags.dataset, open_folder(flags.save_dir, True), **given)
    except (UsageError, RunError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    tokenizer = dataset.tokenizer
    print(f"{dataset.name} by {tokenizer.kind}: vocabulary {tokenizer.vocab_size:,}, special {tokenizer.num_special}")
    for split in filter(None, (dataset.train, dataset.valid, dataset.test)):
        print(f"{len(split.tokens):>14,} tokens{split.num_bytes:>15,} bytes{split.num_words:>14,} words and line ends")
    print(tokenizer.decode(dataset.train.tokens[:100]))


if __name__ == "__main__":
    sys.exit(main())
