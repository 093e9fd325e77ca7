"""Downloads from a server on loopback, whatever it does, and each corpus in a small copy."""

import functools
import hashlib
import io
import re
import signal
import sysconfig
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import DATASETS, start

import datasets
from datasets import PackageTokenizer, RunError

MARKER = "<|endoftext|>"


# ---- A corpus in a small copy -------------------------------------------------------------------


@pytest.fixture
def lay(tmp_path, monkeypatch):
    """A function that lays a file of a corpus into a mirror folder, whose name it returns.

    From then on, its SHA256 and size are the expected ones.
    """

    def lay(name, content):
        path = tmp_path / "mirror" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        line = f"{hashlib.sha256(content).hexdigest()} {len(content)} {path.name}"
        files, replaced = re.subn(rf".+ {re.escape(path.name)}\n", f"{line}\n", datasets.FILES)
        assert replaced == 1
        monkeypatch.setattr(datasets, "FILES", files)
        return str(tmp_path / "mirror")

    return lay


def zipped(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def words_of(content):
    """Tokens of a text by the rule that the published counts follow."""
    words = []
    for line in io.StringIO(content.decode(), newline="\n"):
        words += [*line.split(), "<eos>"]
    return words


PTB = {
    "train": b"the cat sat\non the mat\nthe <unk> sat\n",
    "valid": b" the dog sat\n\n",
    "test": b"a cat\n",
}


@pytest.fixture
def ptb(lay):
    for split, content in PTB.items():
        mirror = lay(f"ptb/ptb.{split}.txt", content)
    return mirror


def test_ptb(ptb, tmp_path):
    dataset = datasets.load_dataset("ptb", tmp_path / "data", mirror=ptb)
    assert dataset.tokenizer.vocabulary == ["<eos>", "the", "sat", "<unk>", "cat", "mat", "on"]
    assert dataset.train.tokens.tolist() == [1, 4, 2, 0, 6, 1, 5, 0, 1, 3, 2, 0]
    assert dataset.valid.tokens.tolist() == [1, 3, 2, 0, 0]
    assert dataset.test.tokens.tolist() == [3, 4, 0]
    for split, num_words, num_unk in (("train", 12, 1), ("valid", 5, 1), ("test", 3, 1)):
        assert getattr(dataset, split)[1:] == (len(PTB[split]), num_words, num_unk)
    again = datasets.load_dataset("ptb", tmp_path / "data", mirror="/nowhere")
    assert again.sha256 == dataset.sha256
    other = datasets.load_dataset("ptb", tmp_path / "data", mirror="/nowhere", tokenizer="byte")
    assert bytes(other.valid.tokens.tolist()) == PTB["valid"]


@pytest.mark.parametrize("corpus, name", [
    ("wikitext2", "wikitext-2"),
    ("wikitext103", "wikitext-103"),
])  # fmt: skip
def test_wikitext(corpus, name, lay, tmp_path):
    contents = {
        "train": " \n = Señor <unk> = \n \n 3 @,@ 000 men\rcame to Łódź . \n = 東京 = \n".encode(),
        "valid": b" \n = War = \n \n The war was a 20 @-@ year war . \n \n",
        "test": b" \n = <unk> = \n \n\n men came \r\n",
    }
    members = {"../../evil": b"evil", f"{name}/readme": b"no"}
    members |= {f"{name}/wiki.{split}.tokens": text for split, text in contents.items()}
    mirror = lay(f"{corpus}/{name}-v1.zip", zipped(members))
    dataset = datasets.load_dataset(corpus, tmp_path / "data", mirror=mirror)
    vocabulary = dataset.tokenizer.vocabulary
    for split, content in contents.items():
        words = words_of(content)
        expected = [word if word in vocabulary else "<unk>" for word in words]
        known = getattr(dataset, split)
        assert [vocabulary[i] for i in known.tokens] == expected
        assert known[1:] == (len(content), len(words), expected.count("<unk>"))
    assert not list(tmp_path.rglob("evil"))


def test_enwik8(lay, tmp_path):
    # 1,000 bytes; the cuts at 900 and 950 are within a character.
    data = b"a" + "é".encode() * 499 + b"\n"
    mirror = lay("enwik8/enwik8.zip", zipped({"enwik8": data}))
    for kind in ("auto", "char", "word", "bpe"):
        options = {"tokenizer": kind, "vocab_size": 300, "mirror": mirror}
        dataset = datasets.load_dataset("enwik8", tmp_path / "data", **options)
        splits = [dataset.train, dataset.valid, dataset.test]
        assert [split.num_bytes for split in splits] == [900, 50, 50]
        if kind == "auto":
            tokens = np.concatenate([split.tokens for split in splits])
            assert bytes(tokens.tolist()) == data


def test_tinyshakespeare(lay, tmp_path):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 9 + "Zounds"
    mirror = lay("tinyshakespeare/input.txt", text.encode())
    dataset = datasets.load_dataset("tinyshakespeare", tmp_path / "data", mirror=mirror)
    cut = int(len(text) * 0.9)
    assert dataset.tokenizer.vocabulary == "".join(sorted(set(text[:cut])))
    assert dataset.tokenizer.decode(dataset.train.tokens) == text[:cut]
    assert dataset.tokenizer.decode(dataset.valid.tokens) == text[cut:].replace("Z", "\ufffd")
    assert dataset.valid.num_unk == 1
    assert dataset.test is None


@pytest.mark.parametrize("layout", ["{}\n" + MARKER + "\n", "\n{}\n" + MARKER])
def test_tinystories(layout, lay, tmp_path):
    stories = []
    for i in range(30):
        stories.append(f"Once, girl {i} saw a café.\n\nShe said “hi”." + " The end." * (i % 7))
    tokenizer = PackageTokenizer.train(stories, 400)
    lay("gpt2/tokenizer.json", tokenizer.vocabulary.encode())
    lay("tinystories/TinyStories-train.txt", "".join(map(layout.format, stories[:19])).encode())
    valid = [layout.format(story).encode() for story in stories[19:]]
    mirror = lay("tinystories/TinyStories-valid.txt", b"".join(valid))
    ends = np.cumsum([len(story) for story in valid])
    half = 19 + np.sum(ends < ends[-1] // 2) + 1  # stories that begin before the middle
    splits = {"train": stories[:19], "valid": stories[19:half], "test": stories[half:]}
    dataset = datasets.load_dataset("tinystories", tmp_path / "data", mirror=mirror)
    for split, texts in splits.items():
        expected = []
        for text in texts:
            expected += [tokenizer.eos, *tokenizer.encode(text).tolist()]
        known = getattr(dataset, split)
        assert known.tokens.tolist() == expected[1:], "between stories only"
        assert known.num_bytes == sum(len(text.encode()) for text in texts)


def test_python(tmp_path):
    """The top-level modules, every tenth of them held out, with an end token between them."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    splits = {"valid": paths[9::10], "test": paths[10::10]}
    held_out = splits["valid"] + splits["test"]
    splits["train"] = [path for path in paths if path not in held_out]
    dataset = datasets.load_dataset("python", tmp_path)
    for split, modules in splits.items():
        expected = b"\xff".join(path.read_bytes() for path in modules)
        tokens = getattr(dataset, split).tokens
        assert bytes(np.where(tokens == 256, 255, tokens).astype(np.uint8)) == expected


# ---- A server -----------------------------------------------------------------------------------

BIG = PTB["train"] * 8000  # 304,000 bytes


class Handler(BaseHTTPRequestHandler):
    """The first part of the path says how the server behaves, the last one which file is meant."""

    def do_GET(self):
        server = self.server
        _, behaviour, *_, name = self.path.split("/")
        content = server.files[name]
        number = len(server.ranges)
        first = 0
        if self.headers["Range"]:
            first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        server.ranges.append(first)
        if behaviour == "whole":
            first = 0
        bodies = {"changed": content[::-1], "page": b"<!doctype html><p>For sale.</p>"}
        body = bodies.get(behaviour, content[first:])
        statuses = {"absent": 404, "busy": 503, "moved": 301}
        status = statuses.get(behaviour, 206 if first else 200)
        if behaviour == "trouble" and number == 0:
            status = 503
        self.send_response(status)
        if behaviour != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if number < len(server.cuts):
            body = body[: max(0, server.cuts[number] - first)]
        try:
            self.wfile.write(body)
            if behaviour == "wait" and number == 0:
                server.go_on.wait(20)
            while behaviour == "endless":
                self.wfile.write(bytes(1 << 20))
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(ptb, lay, monkeypatch):
    """A server of Penn Treebank, with BIG for training.

    base: its address; cuts: the byte of the file at which it cuts each answer off; ranges: the
    first bytes that were asked for.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.base = f"http://127.0.0.1:{server.server_port}"
        lay("ptb/ptb.train.txt", BIG)
        server.files = {path.name: path.read_bytes() for path in Path(ptb, "ptb").iterdir()}
        server.cuts = []
        server.ranges = []
        server.go_on = threading.Event()
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield server
        server.go_on.set()
        server.shutdown()


def load(server, tmp_path, behaviour):
    """Downloads Penn Treebank from a server; its training text."""
    folder = tmp_path / "data"
    options = {"mirror": f"{server.base}/{behaviour}", "tokenizer": "byte"}
    dataset = datasets.load_dataset("ptb", folder, **options)
    assert not list(folder.rglob("*.part"))
    return bytes(dataset.train.tokens.tolist())


@pytest.mark.parametrize("behaviour", ["good", "whole", "trouble"])
@pytest.mark.parametrize("cuts", [[], [1], [len(BIG) - 1], [*range(70_000, 300_000, 70_000)]])
def test_cut_anywhere(behaviour, cuts, server, tmp_path):
    """However often; at most 64 KiB are asked for again, but if the server sends the whole."""
    server.cuts = cuts
    assert load(server, tmp_path, behaviour) == BIG
    if behaviour == "good":
        again = np.subtract(cuts, server.ranges[1:-2])
        assert np.all((again >= 0) & (again < 1 << 16))


# How a server behaves -> part of the reason that is given
BAD = {
    "changed": "SHA256",
    "page": "HTTP status 200, 31 of",
    "absent": "HTTP status 404",
    "busy": "HTTP status 503",
    "moved": "HTTP status 301",
    "endless": f"more than {len(BIG):,} bytes",
}


@pytest.mark.parametrize("behaviour", BAD)
def test_bad_address(behaviour, server, tmp_path):
    with pytest.raises(RunError, match=rf"/{behaviour}/ptb/ptb.train.txt: .*{BAD[behaviour]}"):
        load(server, tmp_path, behaviour)
    assert len(server.ranges) == (6 if behaviour == "busy" else 1)
    assert not (tmp_path / "data" / "ptb" / "ptb.train.txt").exists()
    assert load(server, tmp_path, "good") == BIG


def test_all_addresses_fail(server, tmp_path, monkeypatch):
    """The reasons and the remedies, in one line, without a password; the next one may be good."""
    dead = server.base.replace("http://", "http://user:passw0rd@").rsplit(":", 1)[0] + ":9/"
    hosts = [dead, f"{server.base}/absent/"]
    monkeypatch.setitem(datasets.HOSTS, "ptb", hosts)
    with pytest.raises(RunError) as error:
        datasets.load_dataset("ptb", tmp_path / "data")
    message = str(error.value)
    path = str(tmp_path / "data" / "ptb" / "ptb.train.txt")
    for words in ("refused", "HTTP status 404", path, "SHA256", "--mirror", "--dataset python"):
        assert words in message
    assert "passw0rd" not in message and "\n" not in message
    hosts.append(f"{server.base}/good/")
    assert len(datasets.load_dataset("ptb", tmp_path / "data").train.tokens) == 12 * 8000


def test_mirror_folder(ptb, tmp_path):
    path = Path(ptb, "ptb", "ptb.train.txt")
    for content, fault in ((None, "No such file"), (PTB["train"][::-1], "SHA256")):
        path.unlink(missing_ok=True)
        if content:
            path.write_bytes(content)
        with pytest.raises(RunError, match=f"{path}: .*{fault}"):
            datasets.load_dataset("ptb", tmp_path / "data", mirror=ptb)
    path.write_bytes(PTB["train"])
    datasets.load_dataset("ptb", tmp_path / "data", mirror=f"{ptb}/")


@pytest.mark.parametrize("left", [b"x" * 9, b"", BIG[::-1], BIG + b"more"])
@pytest.mark.parametrize("name", ["ptb.train.txt", "ptb.train.txt.part"])
def test_what_an_earlier_try_left_spoils_nothing(left, name, server, tmp_path):
    (tmp_path / "data" / "ptb").mkdir(parents=True)
    (tmp_path / "data" / "ptb" / name).write_bytes(left)
    assert load(server, tmp_path, "good") == BIG


PROGRAM = """
import sys
sys.argv[1:], sys.path[:0], datasets_files = sys.argv[3:], [sys.argv[1]], sys.argv[2]
import datasets
datasets.FILES = datasets_files
datasets.main(sys.argv[1:])
"""


def test_killed_and_two_at_once(server, tmp_path):
    """A killed download is resumed; of two processes, one downloads."""
    server.cuts = [200_000]
    line = [Path(DATASETS).parent, datasets.FILES, "--tokenizer", "byte"]
    line += ["--data_dir", tmp_path / "data", "--mirror", f"{server.base}/wait"]
    begin = functools.partial(start, *line, program=("-c", PROGRAM))
    part = tmp_path / "data" / "ptb" / "ptb.train.txt.part"
    killed = begin()
    until = time.monotonic() + 60
    while not part.exists() or part.stat().st_size < 131_072:
        assert time.monotonic() < until and killed.poll() is None, killed.communicate()
        threading.Event().wait(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    have = part.stat().st_size
    for process in [begin(), begin()]:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert server.ranges[1:] == [have, 0, 0]
