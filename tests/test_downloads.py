"""Downloads from a server on loopback, whatever it does, and each corpus in a small copy."""

import functools
import hashlib
import io
import os
import re
import shutil
import sys
import sysconfig
import time
import zipfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from conftest import DATASETS, ROOT, documents_of, load_module, serving, start

from datasets import PackageTokenizer, load_dataset


# ---- A corpus in a small copy -------------------------------------------------------------------


class Copy:
    """A copy of datasets.py that expects other files than the real ones, which lie in a mirror."""

    def __init__(self, folder):
        self.path = folder / "datasets.py"
        self.path.write_bytes(Path(DATASETS).read_bytes())
        shutil.copytree(ROOT / "support", folder / "support")
        self.mirror = folder / "mirror"
        self.data_dir = folder / "data"

    def edit(self, pattern, new):
        source, count = re.subn(pattern, new, self.path.read_text("utf-8"))
        assert count > 0
        self.path.write_text(source, "utf-8")

    def lay(self, name, content):
        """Lays a file into the mirror; its SHA256 and size are the expected ones from now on."""
        path = self.mirror / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        self.edit(rf"[0-9a-f]{{64}} +\d+ {path.name}", f"{sha256} {len(content)} {path.name}")

    def load(self, name, **options):
        options = {"mirror": str(self.mirror)} | options
        return load_module(self.path).load_dataset(name, self.data_dir, **options)


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def zipped(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


PTB = {
    "train": b"the cat sat\non the mat\nthe <unk> sat\n",
    "valid": b" the dog sat\n\n",
    "test": b"a cat\n",
}


@pytest.fixture
def ptb(copy):
    for split, content in PTB.items():
        copy.lay(f"ptb/ptb.{split}.txt", content)
    return copy


def test_ptb(ptb):
    dataset = ptb.load("ptb")
    assert dataset.tokenizer.vocabulary == ["<eos>", "the", "sat", "<unk>", "cat", "mat", "on"]
    assert dataset.train.tokens.tolist() == [1, 4, 2, 0, 6, 1, 5, 0, 1, 3, 2, 0]
    assert dataset.valid.tokens.tolist() == [1, 3, 2, 0, 0]
    assert dataset.test.tokens.tolist() == [3, 4, 0]
    other = ptb.load("ptb", mirror="/nowhere", tokenizer="byte")
    assert bytes(other.valid.tokens.tolist()) == PTB["valid"], "nothing is downloaded twice"


def test_an_edited_program_encodes_anew(ptb):
    """All of datasets.py counts, but comments; what another version encoded stays.

    A process that runs meanwhile goes on with the code that it has loaded.
    """

    def load():
        dataset = ptb.load("ptb")
        written = os.stat(dataset.folder / "about.json").st_mtime_ns
        return dataset.valid.tokens.tolist(), dataset.folder, written

    running = load_module(ptb.path)
    ids, first, written = load()
    ptb.edit("# Most frequent first", "# By frequency")
    with open(ptb.path.parent / "support/files.py", "a") as file:
        file.write("FACTOR = 2\n")
    assert load() == (ids, first, written)
    ptb.edit('" <eos> "', '" <eos> <eos> "')
    assert running.load_dataset("ptb", ptb.data_dir).folder == first
    twice, second, _ = load()
    assert twice == [1, 3, 2, 0, 0, 0, 0]
    ptb.edit('" <eos> <eos> "', '" <eos> "')
    assert load() == (ids, first, written), "it is not encoded again"
    ptb.edit("BLOCK_SIZE = 1 << 17", "BLOCK_SIZE = 1 << 16")
    _, third, _ = load()
    assert {*first.parent.glob("*-*")} == {second, third}, "the two that were written last"


RHYMES = '''
def rhymes(get_file):
    """Rhymes."""
    return cut(whole(get_file("rhymes.txt")), 12)


CORPORA["rhymes"] = Corpus("word", rhymes, files="""
0000000000000000000000000000000000000000000000000000000000000000 0 rhymes.txt
""")

# The tokenizer "gpt2"'''


def test_a_new_corpus(copy):
    """A function and a row; a file that the row does not list is said to be missing there."""
    copy.edit('# The tokenizer "gpt2"', RHYMES)
    copy.lay("rhymes/rhymes.txt", b"one two one\nthree two\n")
    dataset = copy.load("rhymes")
    assert dataset.tokenizer.vocabulary == ["one", "<eos>", "two", "<unk>"]
    assert dataset.valid.tokens.tolist() == [3, 2, 1]
    copy.edit(r'get_file\("rhymes', 'get_file("poems')
    with pytest.raises(Exception, match='add a line "SHA256 SIZE poems.txt" to the files of rh'):
        copy.load("rhymes", tokenizer="char")


@pytest.mark.parametrize("corpus, name", [
    ("wikitext2", "wikitext-2"),
    ("wikitext103", "wikitext-103"),
])  # fmt: skip
def test_wikitext(corpus, name, copy, tmp_path):
    members = {"../../evil": b"evil", f"{name}/readme": b"no"}
    for split in PTB:
        members[f"{name}/wiki.{split}.tokens"] = f" \n = Señor <unk> {split} = \n \n\r".encode()
    copy.lay(f"{corpus}/{name}-v1.zip", zipped(members))
    assert copy.load(corpus).tokenizer.kind == "word"
    dataset = copy.load(corpus, tokenizer="byte")
    for split in PTB:
        content = members[f"{name}/wiki.{split}.tokens"]
        assert bytes(getattr(dataset, split).tokens.tolist()) == content
    assert not list(tmp_path.rglob("evil"))


def test_enwik8(copy):
    # 1,000 bytes; the cuts at 900 and 950 are within a character.
    data = b"a" + "é".encode() * 499 + b"\n"
    copy.lay("enwik8/enwik8.zip", zipped({"enwik8": data}))
    dataset = copy.load("enwik8")
    splits = [dataset.train, dataset.valid, dataset.test]
    assert [split.num_bytes for split in splits] == [900, 50, 50]
    assert b"".join(bytes(split.tokens.tolist()) for split in splits) == data


def test_tinyshakespeare(copy):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 9 + "Zounds"
    copy.lay("tinyshakespeare/input.txt", text.encode())
    dataset = copy.load("tinyshakespeare")
    cut = int(len(text) * 0.9)
    assert dataset.tokenizer.decode(dataset.train.tokens) == text[:cut]
    assert dataset.tokenizer.decode(dataset.valid.tokens) == text[cut:].replace("Z", "\ufffd")
    assert dataset.test is None


@pytest.mark.parametrize("layout", ["{}\n<|endoftext|>\n", "\n{}\n<|endoftext|>"])
def test_tinystories(layout, copy):
    """The validation file is cut behind the story that the middle lies in, or begins with."""
    stories = [f"Once, girl {i} saw a café.\n\nShe said “hi”." for i in range(10, 30)]
    tokenizer = PackageTokenizer.train(stories, 400)
    copy.lay("gpt2/tokenizer.json", tokenizer.vocabulary.encode())
    for name, texts in (("train", stories[:10]), ("valid", stories[10:])):
        content = "".join(map(layout.format, texts)).encode()
        copy.lay(f"tinystories/TinyStories-{name}.txt", content)
    dataset = copy.load("tinystories")
    splits = {"train": stories[:10], "valid": stories[10:16], "test": stories[16:]}
    for split, texts in splits.items():
        expected = tokenizer.encode("<|endoftext|>".join(texts))  # between stories only
        assert getattr(dataset, split).tokens.tolist() == expected.tolist()


def test_python(tmp_path):
    """The top-level modules without a packager's own, with an end token between them."""
    valid = (
        "_apple_support asyncore calendar code copy datetime dis fractions glob gzip mimetypes "
        "modulefinder netrc pickle pty shlex statistics tarfile webbrowser"
    )
    test = (
        "_android_support _pylong antigravity cgi compileall configparser contextlib csv getopt "
        "lzma nntplib ntpath pdb posixpath profile queue smtplib sunau textwrap this tokenize uu "
        "xdrlib zipapp"
    )
    splits = {"valid": {*valid.split()}, "test": {*test.split()}}
    splits["train"] = sys.stdlib_module_names - splits["valid"] - splits["test"]
    dataset = load_dataset("python", tmp_path)
    for split, names in splits.items():
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        expected = [path.read_bytes().decode() for path in modules if path.stem in names]
        assert documents_of(getattr(dataset, split)) == expected

    # A test text of one's own takes the place of its test split.
    (tmp_path / "mine.txt").write_text("mine")
    other = load_dataset("python", tmp_path, test_text=[tmp_path / "mine.txt"])
    assert documents_of(other.test) == ["mine"]
    assert other.sha256 == dataset.sha256


# ---- A server -----------------------------------------------------------------------------------

BIG = PTB["train"] * 8000  # 304,000 bytes


class Handler(BaseHTTPRequestHandler):
    """The first part of the path says how the server behaves, the last one which file is meant."""

    def do_GET(self):
        server = self.server
        _, behaviour, *_, name = self.path.split("/")
        number = len(server.ranges)
        first = int(self.headers["Range"][len("bytes=") : -1])
        server.ranges.append(first)
        if behaviour == "whole":
            first = 0
        body = (server.copy.mirror / "ptb" / name).read_bytes()[first:]
        if behaviour == "page":
            body = b"<!doctype html><p>For sale.</p>"
        status = 206 if first else 200
        if behaviour == "absent":
            status = 404
        self.send_response(status)
        if behaviour != "longer":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if number < len(server.cuts):
            body = body[: max(0, server.cuts[number] - first)]
        self.wfile.write(body)
        if behaviour == "wait" and number == 0:
            time.sleep(20)
        if behaviour == "longer":
            self.wfile.write(bytes(1 << 25))


@pytest.fixture
def server(ptb):
    """A server of Penn Treebank, with BIG for training.

    copy: a program that expects these files; url: its address; cuts: the byte of the file at which
    it cuts each answer off; ranges: the first bytes that were asked for.
    """
    with serving(Handler) as server:
        ptb.lay("ptb/ptb.train.txt", BIG)
        server.copy = ptb
        server.cuts = []
        server.ranges = []
        yield server


def load(server, behaviour):
    """Downloads Penn Treebank from a server; its training text."""
    dataset = server.copy.load("ptb", mirror=f"{server.url}/{behaviour}", tokenizer="byte")
    assert not list(server.copy.data_dir.rglob("*.part"))
    return bytes(dataset.train.tokens.tolist())


@pytest.mark.parametrize("behaviour", ["good", "whole"])
@pytest.mark.parametrize("cuts", [[len(BIG) - 1], [70_000, 140_000, 210_000, 280_000]])
def test_cut_anywhere(behaviour, cuts, server):
    """At most 64 KiB are asked for again, but if the server sends the whole."""
    server.cuts = cuts
    assert load(server, behaviour) == BIG
    if behaviour == "good":
        again = np.subtract(cuts, server.ranges[1:-2])
        assert np.all((again >= 0) & (again < 1 << 16))


@pytest.mark.parametrize("behaviour, reason", [
    ("page", "SHA256"),
    ("longer", f"more than {len(BIG):,} bytes"),
])  # fmt: skip
def test_bad_address(behaviour, reason, server):
    with pytest.raises(Exception, match=rf"/{behaviour}/ptb/ptb.train.txt: .*{reason}"):
        load(server, behaviour)
    assert len(server.ranges) == 1
    assert load(server, "good") == BIG


def test_all_addresses_fail(server):
    """The reasons and the remedies, in one line, without a password; the next one may be good."""
    copy = server.copy
    copy.edit("https://raw.githubusercontent.com/", f"{server.url}/absent/")
    dead = "http://user:passw0rd@127.0.0.1:9/"
    copy.edit("https://cdn.jsdelivr.net/", dead)
    with pytest.raises(Exception) as error:
        copy.load("ptb", mirror=None)
    message = str(error.value)
    for words in ("refused", "HTTP status 404", "by hand", "--mirror", "--dataset python"):
        assert words in message
    assert "passw0rd" not in message and "\n" not in message
    copy.edit(dead, f"{server.url}/good/")
    assert len(copy.load("ptb", mirror=None).train.tokens) == 12 * 8000


@pytest.mark.parametrize("left", [b"x" * 9, BIG[::-1], BIG + b"more"])
@pytest.mark.parametrize("name", ["ptb.train.txt", "ptb.train.txt.part"])
def test_what_an_earlier_try_left_spoils_nothing(left, name, server):
    path = server.copy.data_dir / f"ptb/{name}"
    path.parent.mkdir(parents=True)
    path.write_bytes(left)
    assert load(server, "good") == BIG


def test_killed_and_two_at_once(server):
    """A killed download is resumed; of two processes, one downloads."""
    copy = server.copy
    server.cuts = [200_000]
    line = ["--data_dir", copy.data_dir, "--mirror", f"{server.url}/wait"]
    begin = functools.partial(start, *line, program=[copy.path])
    part = copy.data_dir / "ptb/ptb.train.txt.part"
    killed = begin()
    while not part.exists() or part.stat().st_size < 131_072:
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    have = part.stat().st_size
    for process in [begin(), begin()]:
        assert process.wait() == 0
    assert server.ranges[1:] == [have, 0, 0]
