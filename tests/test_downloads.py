"""Downloads from a real server on loopback, whatever it does, and each corpus in a small copy."""

import hashlib
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from conftest import ROOT

import datasets
from datasets import File, PackageTokenizer, RunError

CONTENT = b"".join(b"line %d of the file\n" % i for i in range(2000))
BIG = random.Random(0).randbytes(3 << 20)
PAGE = b"<!doctype html><p>This domain is for sale.</p>"

# The status of a request by the behaviour of the server; 200 or 206 for the others.
STATUSES = {
    "absent": 404,
    "busy": 503,
    "moved": 301,
    "redirect": 302,
    "astray": 302,
    "endless-redirect": 302,
}
FIRST_STATUSES = {"slow": 429, "trouble": 503}  # of the first request alone


class Handler(BaseHTTPRequestHandler):
    """The first part of the path says how the server behaves, the last one which file is meant."""

    def do_GET(self):
        server = self.server
        behaviour = self.path.split("/")[1]
        name = self.path.split("/")[-1]
        tries = sum(request.path == self.path for request in server.seen)  # before this one
        request = SimpleNamespace(path=self.path, sent=0)
        request.agent = self.headers["User-Agent"]
        request.range = self.headers["Range"]
        server.seen.append(request)

        content = server.files[name]
        first = 0  # byte
        if request.range and behaviour != "whole":
            first = int(re.fullmatch(r"bytes=(\d+)-", request.range)[1])
        status = self.status_of(behaviour, tries, request.agent)
        body = PAGE
        if status == 200:
            bodies = {"changed": content[::-1], "short": content[:-1], "page": PAGE}
            body = bodies.get(behaviour, content[first:])
            if first:
                status = 206
        self.send_response(status)
        self.send_headers(behaviour, name, status, first, len(body), len(content))
        stop = len(body)
        if tries < len(server.cuts):
            stop = min(stop, server.cuts[tries] - first)
        try:
            self.send_body(request, body[: max(0, stop)])
            if behaviour == "wait" and not tries:
                server.go_on.wait(20)
            if behaviour.startswith("endless"):
                for _ in range(64):  # MiB, far more than sockets buffer
                    self.wfile.write(bytes(1 << 20))
        except OSError:
            server.hung_up.set()

    def status_of(self, behaviour, tries, agent):
        if behaviour == "agent" and not agent.startswith("transformer-lm"):
            return 403
        if behaviour in FIRST_STATUSES and not tries:
            return FIRST_STATUSES[behaviour]
        return STATUSES.get(behaviour, 200)

    def send_headers(self, behaviour, name, status, first, length, total):
        if not behaviour.startswith("endless"):
            self.send_header("Content-Length", str(length))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        if behaviour == "html":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        if behaviour in ("redirect", "endless-redirect"):
            self.send_header("Location", f"/good/{name}")
        if behaviour == "astray":
            self.send_header("Location", "http://[::1/")
        self.end_headers()

    def send_body(self, request, body):
        for begin in range(0, len(body), 1 << 16):
            block = body[begin : begin + (1 << 16)]
            request.sent += len(block)  # first: the other side may be done before this one goes on
            self.wfile.write(block)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A threaded server.

    base: its address; files: name -> bytes; cuts: the byte of the file at which it cuts each try
    off; seen: the requests; slept: the seconds that the client would have slept.
    """
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.base = f"http://127.0.0.1:{server.server_port}"
        server.files = {"corpus.txt": CONTENT, "big": BIG}
        server.cuts = []
        server.seen = []
        server.slept = []
        server.hung_up = threading.Event()
        server.go_on = threading.Event()
        monkeypatch.setattr("time.sleep", server.slept.append)
        options = {"poll_interval": 0.01}  # seconds
        thread = threading.Thread(target=server.serve_forever, kwargs=options, daemon=True)
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "save" / "ptb"
    folder.mkdir(parents=True)
    return folder


def quiet(line):
    pass


def file_of(name, content, **options):
    return File(name, len(content), hashlib.sha256(content).hexdigest(), **options)


CORPUS = file_of("corpus.txt", CONTENT)
BIG_FILE = file_of("big", BIG)


def seen_in(folder):
    """The files in a folder that are not hidden: what is locked stays."""
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def fetch(folder, *addresses, **options):
    """Fetches corpus.txt, and nothing else is left in the folder."""
    path = datasets.fetch(CORPUS, addresses, folder, **{"say": quiet} | options)
    assert path == folder / "corpus.txt"
    assert path.read_bytes() == CONTENT
    assert seen_in(folder) == [path]


def fetch_big(folder, address):
    path = datasets.fetch(BIG_FILE, [address], folder, say=quiet)
    assert path.read_bytes() == BIG
    assert seen_in(folder) == [path]


def fail_to_fetch(folder, *addresses, mirror=None, match=None):
    """The message of the failure; nothing else is said."""
    with pytest.raises(RunError, match=match) as error:
        datasets.fetch(CORPUS, addresses, folder, mirror, say=pytest.fail)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("behaviour", ["good", "redirect", "agent", "whole"])
def test_download(server, folder, behaviour):
    said = []
    fetch(folder, f"{server.base}/{behaviour}/", say=said.append)
    [line] = said
    assert line.startswith(f"Downloaded {server.base}/{behaviour}/corpus.txt ")
    assert str(folder) in line
    assert "\n" not in line
    for request in server.seen:
        assert request.agent.startswith("transformer-lm")
        assert not request.range


def test_what_was_fetched_but_not_yet_verified(server, folder):
    """A kill before verifying costs no second download; what is then found wrong does."""
    (folder / "corpus.txt.part").write_bytes(CONTENT)
    fetch(folder, f"{server.base}/good/")
    assert not server.seen
    (folder / "corpus.txt").unlink()
    (folder / "corpus.txt.part").write_bytes(CONTENT[::-1])
    fetch(folder, f"{server.base}/good/")
    assert len(server.seen) == 1


def test_an_error_without_words(folder, monkeypatch):
    def fail(*_, **__):
        raise requests.ConnectionError()

    monkeypatch.setattr("requests.get", fail)
    fail_to_fetch(folder, "http://nowhere/", match="nowhere/corpus.txt: ConnectionError")


def test_a_part_that_is_a_link(server, folder, tmp_path):
    """Another user may have planted it; what it leads to stays as it is."""
    (tmp_path / "notes").write_text("precious")
    (tmp_path / "mirror" / "ptb").mkdir(parents=True)
    (tmp_path / "mirror" / "ptb" / "corpus.txt").write_bytes(CONTENT)
    (folder / "corpus.txt.part").symlink_to(tmp_path / "notes")
    for mirror in (f"{server.base}/good", str(tmp_path / "mirror")):
        fail_to_fetch(folder, mirror=mirror, match="symbolic link")
        assert (tmp_path / "notes").read_text() == "precious"


# behaviour -> part of the reason given
BAD = {
    "changed": "SHA256",
    "page": f"HTTP status 200, None, {len(PAGE)} of {len(CONTENT):,} bytes",
    "html": "HTTP status 200, text/html",
    "short": f"HTTP status 200, None, {len(CONTENT) - 1:,} of {len(CONTENT):,} bytes",
    "absent": "HTTP status 404",
    "busy": "HTTP status 503",
    "moved": "HTTP status 301",
    "astray": "",  # the words are those of requests
}


@pytest.mark.parametrize("behaviour", BAD)
def test_bad_address(server, folder, behaviour):
    bad = f"{server.base}/{behaviour}/"
    message = fail_to_fetch(folder, bad)
    assert f"({bad}corpus.txt: {BAD[behaviour]}" in message
    assert f"{bad}corpus.txt: )" not in message, "a reason is given"
    assert seen_in(folder) == []
    assert len(server.seen) == (6 if behaviour == "busy" else 1)
    fetch(folder, bad, f"{server.base}/good/")
    paths = [request.path for request in server.seen[-2:]]
    assert paths == [f"/{behaviour}/corpus.txt", "/good/corpus.txt"]


def test_endless_answer_is_cut_off(server, folder):
    endless = f"{server.base}/endless/"
    fail_to_fetch(folder, endless, match=f"/endless/corpus.txt: more than {len(CONTENT):,} bytes")
    assert server.hung_up.wait(10)
    fetch(folder, endless, f"{server.base}/good/")


def test_endless_redirect_is_not_read(server, folder):
    fetch(folder, f"{server.base}/endless-redirect/")
    assert server.hung_up.wait(20), "its body was received to the end"


@pytest.mark.parametrize("behaviour", ["good", "absent", "astray"])
def test_a_password_in_an_address_is_not_shown(server, folder, behaviour):
    said = []
    address = server.base.replace("://", "://user:passw0rd@")
    mirror = f"{address}/{behaviour}"
    if behaviour == "good":
        datasets.fetch(CORPUS, [], folder, mirror, said.append)
    else:
        with pytest.raises(RunError) as error:
            datasets.fetch(CORPUS, [], folder, mirror, said.append)
        said.append(str(error.value))
    assert server.base.removeprefix("http://") in said[0]
    assert "passw0rd" not in said[0]


def test_a_password_that_cannot_be_parsed_is_not_shown(folder):
    message = fail_to_fetch(folder, mirror="http://user:passw0rd@host:port/")
    assert "host:port" in message
    assert "passw0rd" not in message


@pytest.mark.parametrize("behaviour", ["slow", "trouble"])
def test_tries_again(server, folder, behaviour):
    """After 429 and 503; then it is good."""
    fetch(folder, f"{server.base}/{behaviour}/")
    assert len(server.seen) == 2


def test_waits_longer_each_time_and_then_gives_up(server, folder):
    fail_to_fetch(folder, f"{server.base}/busy/", match="/busy/corpus.txt: .*503")
    assert len(server.seen) == 6
    assert server.slept == sorted(server.slept)
    assert 8 <= max(server.slept) <= 60


@pytest.mark.parametrize("behaviour", ["good", "whole"])
@pytest.mark.parametrize("cuts", [[1], [20000], [len(CONTENT) - 1], [500, 30000, 30001]], ids=str)
def test_cut_anywhere(server, folder, behaviour, cuts):
    """Also where the server ignores the Range and sends the whole."""
    server.cuts = cuts
    fetch(folder, f"{server.base}/{behaviour}/")
    assert len(server.seen) == len(cuts) + 1


def test_whole_answer_to_a_range(server, folder):
    (folder / "big.part").write_bytes(BIG[: 1 << 20])
    fetch_big(folder, f"{server.base}/whole/")
    [request] = server.seen
    assert request.range == f"bytes={1 << 20}-"
    assert request.sent == len(BIG)


def test_a_line_that_is_cut_often_gets_through(server, folder):
    """Every 300 KB, ten times: what has arrived is kept."""
    server.cuts = range(300000, len(BIG), 300000)
    fetch_big(folder, f"{server.base}/good/")
    assert sum(request.sent for request in server.seen) < 1.1 * len(BIG)


def test_always_cut(server, folder):
    server.cuts = [1000] * 100
    fail_to_fetch(folder, f"{server.base}/whole/", match="/whole/corpus.txt: .*1000 bytes read")
    assert len(server.seen) < 10


LEFT = [b"x" * 100, b"", CONTENT[::-1], CONTENT + b"more", CONTENT[:100], CONTENT]


@pytest.mark.parametrize("left", LEFT, ids=range(len(LEFT)))
@pytest.mark.parametrize("source", ["good", "whole", "folder"])
def test_what_an_earlier_try_left_spoils_nothing(server, folder, tmp_path, left, source):
    (folder / "corpus.txt.part").write_bytes(left)
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "corpus.txt").write_bytes(CONTENT)
    mirror = str(tmp_path) if source == "folder" else f"{server.base}/{source}"
    fetch(folder, mirror=mirror)


def test_all_addresses_fail(server, folder):
    with socket.socket() as bound:  # bound but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        bad = [f"{server.base}/{behaviour}/" for behaviour in BAD]
        message = fail_to_fetch(folder, refused, *bad)
    for address, reason in zip(bad, BAD.values()):
        assert f"{address}corpus.txt: {reason}" in message
        assert not re.search(rf"{re.escape(address)}corpus.txt: [;)]", message)
    assert re.search(rf"\({refused}corpus.txt: \[Errno \d+\] Connection refused; ", message)
    reasons = message.partition(" could not be downloaded ")[2].partition(". Put it at ")[0]
    assert reasons.count("(") == reasons.count(")") == 1, "no stray parentheses"
    remedies = [str(folder / "corpus.txt"), f"{len(CONTENT):,} bytes", CORPUS.sha256, "--mirror"]
    for remedy in [*remedies, "--dataset python"]:
        assert remedy in message
    assert seen_in(folder) == []


def test_mirror_folder(server, folder, tmp_path):
    good = f"{server.base}/good/"
    mirror = tmp_path / "mirror"
    copy = mirror / "ptb" / "corpus.txt"
    message = fail_to_fetch(folder, good, mirror=str(mirror))
    assert f"{copy}: " in message
    assert server.base not in message
    copy.parent.mkdir(parents=True)
    for content, fault in ((CONTENT[:-1], "size"), (CONTENT[::-1], "SHA256")):
        copy.write_bytes(content)
        fail_to_fetch(folder, good, mirror=str(mirror), match=f"corpus.txt: {fault} ")
        assert seen_in(folder) == []
    copy.write_bytes(CONTENT)
    said = []
    fetch(folder, good, mirror=f"{mirror}/", say=said.append)
    assert server.seen == [], "a mirror stands in for all addresses of the file"
    [line] = said
    assert line.startswith(f"Copied {copy} ")


@pytest.mark.parametrize("end", ["", "/"])
def test_mirror_address(server, folder, end):
    fetch(folder, f"{server.base}/absent/", mirror=f"{server.base}/good{end}")
    assert [request.path for request in server.seen] == ["/good/ptb/corpus.txt"]


def test_intact_file_is_not_fetched_again(server, folder):
    (folder / "corpus.txt").write_bytes(CONTENT)
    fetch(folder, f"{server.base}/good/", say=pytest.fail)
    assert server.seen == []


DAMAGED = [b"", CONTENT[:-1], CONTENT + b"\n", b"L" + CONTENT[1:]]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_file_is_fetched_anew(server, folder, damaged):
    path = folder / "corpus.txt"
    path.write_bytes(damaged)
    said = []
    with pytest.raises(RunError):
        datasets.fetch(CORPUS, [f"{server.base}/absent/"], folder, say=said.append)
    [line] = said
    assert str(path) in line
    fetch(folder, f"{server.base}/good/")


def start_fetch(address, folder):
    call = f"fetch(File{tuple(BIG_FILE)!r}, [{address!r}], Path({str(folder)!r}))"
    command = [sys.executable, "-c", f"from datasets import *; {call}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)  # time.sleep is not what it was
    raise AssertionError("it never came to be")


def test_two_processes_fetch_once(server, folder):
    server.cuts = [2 << 20]  # then it waits, and the rest comes at a second try
    processes = [start_fetch(f"{server.base}/wait/", folder) for _ in range(2)]
    wait_for(lambda: server.seen and server.seen[0].sent == 2 << 20)
    threading.Event().wait(0.3)  # for the other one to come to the lock
    server.go_on.set()
    for process in processes:
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0, out
    assert (folder / "big").read_bytes() == BIG
    assert seen_in(folder) == [folder / "big"]
    assert len(server.seen) == 2
    assert server.seen[1].range


def test_killed_download_is_resumed(server, folder):
    server.cuts = [(2 << 20) + 12345]
    address = f"{server.base}/wait/"
    part = folder / "big.part"
    process = start_fetch(address, folder)
    wait_for(lambda: part.exists() and part.stat().st_size >= 1 << 20)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "big").exists()
    have = part.stat().st_size
    fetch_big(folder, address)
    assert server.seen[1].range == f"bytes={have}-"
    assert server.seen[1].sent == len(BIG) - have


# ---- Archives -----------------------------------------------------------------------------------


def zipped(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def test_only_the_named_members_are_extracted(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    outside = str(tmp_path / "evil")
    names = ["../evil", "../../evil", outside, "../b/x.txt", "other", "deep/evil"]
    members = dict.fromkeys(names, b"evil")
    members |= {"deep/x.txt": b"good", "../deep/y.txt": b"yes"}
    archive = folder / "c.zip"
    archive.write_bytes(zipped(members))
    for member, content in (("deep/x.txt", b"good"), ("../deep/y.txt", b"yes")):
        path = datasets.extract(archive, member, folder)
        assert path == folder / os.path.basename(member)
        assert path.read_bytes() == content
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(written) == [archive, folder / "x.txt", folder / "y.txt"]


def test_a_member_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "c.zip").write_bytes(zipped({"deep/x.txt": b"x"}))
    seen = []

    def fsync(descriptor):
        seen.append((os.fstat(descriptor).st_size, (tmp_path / "x.txt").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    datasets.extract(tmp_path / "c.zip", "deep/x.txt", tmp_path)
    assert seen == [(1, False)]


def test_unpacking_follows_no_link(tmp_path):
    """Neither where the text goes, nor where an earlier version unpacked it first."""
    (tmp_path / "notes").write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c.zip").write_bytes(zipped({"deep/x.txt": b"x"}))
    (tmp_path / "x.txt").symlink_to("notes")
    (tmp_path / "c.zip.unpacked").symlink_to("elsewhere")
    datasets.extract(tmp_path / "c.zip", "deep/x.txt", tmp_path)
    assert (tmp_path / "notes").read_text() == "precious"
    assert (tmp_path / "x.txt").read_text() == "x"
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("plant", [lambda path: path.symlink_to("notes"), os.mkfifo])
def test_a_text_that_is_a_link_or_a_pipe_is_unpacked_again(tmp_path, plant):
    (tmp_path / "notes").write_text("secret")
    content = zipped({"x.txt": b"x"})
    file = file_of("c.zip", content, members=["x.txt"])
    (tmp_path / "c.zip").write_bytes(content)
    plant(tmp_path / "x.txt")
    [path] = datasets.find_texts(file, [], tmp_path, None, quiet)
    assert not path.is_symlink()
    assert path.read_bytes() == b"x"


def test_a_folder_of_downloads_that_is_a_link(folder, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "corpus.txt").write_text("precious")
    folder.rmdir()
    folder.symlink_to(victim)
    with pytest.raises(datasets.UsageError, match="is a link"):
        datasets.fetch(CORPUS, [], folder, str(tmp_path), quiet)
    assert [path.name for path in victim.iterdir()] == ["corpus.txt"]


@pytest.mark.parametrize("content", [zipped({"x.txt": b"x", "../y.txt": b"y"}), b"PK no archive"])
def test_archive_that_lacks_a_member(tmp_path, content):
    archive = tmp_path / "c.zip"
    archive.write_bytes(content)
    with pytest.raises(RunError) as error:
        datasets.extract(archive, "deep/y.txt", tmp_path)
    message = str(error.value)
    assert str(archive) in message
    assert "deep/y.txt" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == [archive]


def test_damaged_member(tmp_path):
    data = bytearray(zipped({"x.txt": random.Random(0).randbytes(1000)}))
    data[500] ^= 1
    archive = tmp_path / "c.zip"
    archive.write_bytes(data)
    with pytest.raises(RunError, match="x.txt"):
        datasets.extract(archive, "x.txt", tmp_path)
    assert list(tmp_path.iterdir()) == [archive], "nothing half unpacked"


# ---- Corpora ------------------------------------------------------------------------------------


@pytest.fixture
def corpora(monkeypatch):
    """A function that gives a file of a corpus (or of GPT-2) another content."""

    def replace_file(dataset, name, content):
        corpus = datasets.GPT2 if dataset == "gpt2" else datasets.CORPORA[dataset]
        files = []
        for file in corpus.files:
            if file.name == name:
                file = file_of(name, content, members=file.members, cuts=file.cuts)
            files.append(file)
        assert corpus.files != files, "it has such a file"
        changed = corpus._replace(files=files)
        if dataset == "gpt2":
            monkeypatch.setattr(datasets, "GPT2", changed)
        else:
            monkeypatch.setitem(datasets.CORPORA, dataset, changed)

    return replace_file


@pytest.fixture
def mirror(tmp_path, corpora):
    """A function that lays a file of a corpus into a mirror folder, whose name it returns."""

    def lay(dataset, name, content):
        path = tmp_path / "mirror" / dataset / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        corpora(dataset, name, content)
        return str(tmp_path / "mirror")

    return lay


def words_of(content):
    """Tokens of a text by the rule that the published counts follow."""
    words = []
    for line in io.StringIO(content.decode(), newline="\n"):
        words += [*line.split(), "<eos>"]
    return words


def assert_words(split, vocabulary, content):
    words = words_of(content)
    expected = [word if word in vocabulary else "<unk>" for word in words]
    assert [vocabulary[i] for i in split.tokens] == expected
    assert split.num_bytes == len(content)
    assert split.num_words == len(words)
    assert split.num_unk == expected.count("<unk>")


PTB = {
    "train": b"the cat sat\non the mat\nthe <unk> sat\n",
    "valid": b" the dog sat\n\n",
    "test": b"a cat\n",
}


def test_ptb(mirror, tmp_path):
    for split, content in PTB.items():
        base = mirror("ptb", f"ptb.{split}.txt", content)
    dataset = datasets.load_dataset("ptb", tmp_path, mirror=base, say=quiet)
    words = ["<eos>", "the", "sat", "<unk>", "cat", "mat", "on"]
    assert dataset.name == "ptb"
    assert dataset.tokenizer.vocabulary == words
    assert dataset.train.tokens.tolist() == [1, 4, 2, 0, 6, 1, 5, 0, 1, 3, 2, 0]
    assert dataset.valid.tokens.tolist() == [1, 3, 2, 0, 0]
    assert dataset.test.tokens.tolist() == [3, 4, 0]
    for split, num_words, num_unk in (("train", 12, 1), ("valid", 5, 1), ("test", 3, 1)):
        known = getattr(dataset, split)
        assert known.num_words == num_words
        assert known.num_unk == num_unk
        assert known.num_bytes == len(PTB[split])
    files = [path.name for path in seen_in(tmp_path / "ptb") if path.is_file()]
    assert files == [f"ptb.{split}.txt" for split in sorted(PTB)]
    assert dataset.folder.parent == tmp_path / "ptb"
    assert (dataset.folder / "train.tokens").exists()

    offline = {"mirror": "/nowhere", "say": pytest.fail}
    assert datasets.load_dataset("ptb", tmp_path, **offline).sha256 == dataset.sha256
    by_bytes = datasets.load_dataset("ptb", tmp_path, tokenizer="byte", **offline)
    assert bytes(by_bytes.valid.tokens.tolist()) == PTB["valid"]


def test_ptb_from_an_address(server, corpora, monkeypatch, tmp_path):
    for split, content in PTB.items():
        name = f"ptb.{split}.txt"
        server.files[name] = content
        corpora("ptb", name, content)
    addresses = [f"{server.base}/moved/", f"{server.base}/good/"]
    moved = datasets.CORPORA["ptb"]._replace(addresses=addresses)
    monkeypatch.setitem(datasets.CORPORA, "ptb", moved)
    assert len(datasets.load_dataset("ptb", tmp_path, say=quiet).train.tokens) == 12
    server.seen.clear()
    options = {"tokenizer": "byte", "mirror": f"{server.base}/good", "say": quiet}
    datasets.load_dataset("ptb", tmp_path / "other", **options)
    paths = [request.path for request in server.seen]
    assert paths == [f"/good/ptb/ptb.{split}.txt" for split in PTB]


WIKI = {
    "train": (
        " \n = Señor <unk> = \n \n The 10 @-@ year war began ; 3 @,@ 000 men\rcame to Łódź . \n"
        " \n = = 東京 = = \n \n war <unk> . \n"
    ),
    "valid": " \n = War = \n \n The war in Łódź was a 20 @-@ year war . \n \n",
    "test": " \n = <unk> = \n \n\n men came \r\n",
}


@pytest.mark.parametrize(
    "dataset, name", [("wikitext2", "wikitext-2"), ("wikitext103", "wikitext-103")]
)
def test_wikitext(mirror, tmp_path, dataset, name):
    contents = {split: text.encode() for split, text in WIKI.items()}
    members = {"../../evil": b"evil", f"{name}/readme": b"no"}
    members |= {f"{name}/wiki.{split}.tokens": text for split, text in contents.items()}
    archive = f"{name}-v1.zip"
    base = mirror(dataset, archive, zipped(members))
    loaded = datasets.load_dataset(dataset, tmp_path, mirror=base, say=quiet)
    vocabulary = loaded.tokenizer.vocabulary
    assert len(vocabulary) == len(set(words_of(contents["train"])))
    assert vocabulary[:4] == ["<eos>", "=", ".", "<unk>"]  # 8, 6, and 2 each, by alphabet
    for split in WIKI:
        assert_words(getattr(loaded, split), vocabulary, contents[split])
    files = [path.name for path in seen_in(tmp_path / dataset) if path.is_file()]
    assert files == sorted([archive, *(f"wiki.{split}.tokens" for split in WIKI)])
    (tmp_path / dataset / archive).unlink()  # what was unpacked is enough
    options = {"tokenizer": "char", "mirror": "/nowhere", "say": pytest.fail}
    datasets.load_dataset(dataset, tmp_path, **options)


def test_enwik8(mirror, tmp_path):
    # 1,000 bytes; the cuts at 900 and 950 are within a character.
    data = b"a" + "é".encode() * 499 + b"\n"
    base = mirror("enwik8", "enwik8.zip", zipped({"enwik8": data}))
    options = {"vocab_size": 300, "mirror": base, "say": quiet}
    loaded = datasets.load_dataset("enwik8", tmp_path, **options)
    assert loaded.tokenizer.kind == "byte"
    for split, part in (("train", data[:900]), ("valid", data[900:950]), ("test", data[950:])):
        known = getattr(loaded, split)
        assert bytes(known.tokens.tolist()) == part
        assert known.num_bytes == len(part)
    for kind in ("char", "word", "bpe"):
        other = datasets.load_dataset("enwik8", tmp_path, tokenizer=kind, **options)
        sizes = [other.train.num_bytes, other.valid.num_bytes, other.test.num_bytes]
        assert sizes == [900, 50, 50]
        assert other.tokenizer.decode(other.train.tokens[:1]).startswith("a")
        # What is printed is valid text.
        other.tokenizer.decode(range(other.tokenizer.vocab_size)).encode()


def test_tinyshakespeare(mirror, tmp_path):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 9 + "Zounds"
    base = mirror("tinyshakespeare", "input.txt", text.encode())
    loaded = datasets.load_dataset("tinyshakespeare", tmp_path, mirror=base, say=quiet)
    cut = int(len(text) * 0.9)
    tokenizer = loaded.tokenizer
    assert tokenizer.kind == "char"
    assert tokenizer.vocabulary == "".join(sorted(set(text[:cut])))
    assert tokenizer.decode(loaded.train.tokens) == text[:cut]
    assert len(loaded.train.tokens) == cut
    assert tokenizer.decode(loaded.valid.tokens) == text[cut:].replace("Z", "\ufffd")
    assert loaded.valid.num_bytes == len(text) - cut
    assert loaded.valid.num_unk == 1
    assert loaded.test is None


MARKER = "<|endoftext|>"
STORIES = [
    f"Once upon a time, girl {i} saw a café.\n\nShe said “hi”." + " The end." * (i % 7)
    for i in range(30)
]
LAYOUTS = ["{}\n" + MARKER + "\n", "{}\n\n" + MARKER + "\n", "\n{}\n" + MARKER]
TINYSTORIES = [("tinystories", "TinyStories"), ("tinystoriesv2", "TinyStoriesV2-GPT4")]


@pytest.mark.parametrize("dataset, name", TINYSTORIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tinystories(mirror, tmp_path, dataset, name, layout):
    tokenizer = PackageTokenizer.train(STORIES, 400)
    base = mirror("gpt2", "tokenizer.json", tokenizer.vocabulary.encode())
    mirror(dataset, f"{name}-train.txt", "".join(map(layout.format, STORIES[:19])).encode())
    valid = [layout.format(story).encode() for story in STORIES[19:]]
    mirror(dataset, f"{name}-valid.txt", b"".join(valid))
    options = {"mirror": base, "say": quiet}
    loaded = datasets.load_dataset(dataset, tmp_path, **options)
    assert loaded.tokenizer.kind == "gpt2"
    assert loaded.tokenizer.eos == tokenizer.eos

    ends = np.cumsum([len(story) for story in valid])
    half = 19 + np.sum(ends < ends[-1] // 2) + 1  # stories that begin before the middle
    assert 19 < half < 29
    splits = {"train": STORIES[:19], "valid": STORIES[19:half], "test": STORIES[half:]}
    for split, stories in splits.items():
        known = getattr(loaded, split)
        expected = []
        for story in stories:
            expected += [tokenizer.eos, *tokenizer.encode(story).tolist()]
        assert known.tokens.tolist() == expected[1:], "between stories only"
        assert known.num_bytes == sum(len(story.encode()) for story in stories)
        assert known.num_words == sum(len(story.split()) + story.count("\n") for story in stories)
    by_words = datasets.load_dataset(dataset, tmp_path, tokenizer="word", **options)
    assert MARKER not in by_words.tokenizer.vocabulary
    assert by_words.train.num_bytes == loaded.train.num_bytes
    by_bytes = datasets.load_dataset(dataset, tmp_path, tokenizer="byte", **options)
    expected = []
    for story in STORIES[half:]:
        expected += [256, *story.encode()]
    assert by_bytes.test.tokens.tolist() == expected[1:]


@pytest.fixture(scope="module")
def modules():
    """The bytes of the standard library's top-level modules, by split."""
    folder = sysconfig.get_path("stdlib")
    names = sorted(name for name in os.listdir(folder) if name.endswith(".py"))
    assert len(names) > 100
    splits = {"valid": names[9::10], "test": names[10::10]}
    others = splits["valid"] + splits["test"]
    splits["train"] = [name for name in names if name not in others]
    contents = {}
    for split, names in splits.items():
        contents[split] = [Path(folder, name).read_bytes() for name in names]
    return contents


def test_python_by_bytes(modules, tmp_path):
    dataset = datasets.load_dataset("python", tmp_path)
    assert dataset.tokenizer.kind == "byte"
    for split, contents in modules.items():
        expected = []
        for content in contents:
            expected += [256, *content]
        known = getattr(dataset, split)
        assert known.tokens.tolist() == expected[1:], "between documents only"
        assert known.num_bytes == sum(map(len, contents))


def test_python_by_characters(modules, tmp_path):
    dataset = datasets.load_dataset("python", tmp_path, tokenizer="char")
    text = b"".join(modules["train"]).decode()
    tokenizer = dataset.tokenizer
    tokens = dataset.train.tokens
    assert tokenizer.vocabulary == "".join(sorted(set(text)))
    assert len(tokens) == len(text)
    assert tokens.max() < tokenizer.unk
    assert tokenizer.decode(tokens[-5000:]) == text[-5000:]
    assert dataset.valid.num_bytes == sum(map(len, modules["valid"]))


def test_real_files_are_described_in_full():
    names = "ptb wikitext2 wikitext103 enwik8 tinyshakespeare tinystories tinystoriesv2".split()
    assert list(datasets.CORPORA) == [*names, "python", "text"]
    sizes = {}  # of each corpus's files
    for name in names:
        corpus = datasets.CORPORA[name]
        sizes[name] = sum(file.size for file in corpus.files)
        texts = 0
        for file in corpus.files:
            texts += max(1, len(file.members)) + len(file.cuts)
        assert texts == (2 if name == "tinyshakespeare" else 3), "a split each"
    assert sizes == {
        "ptb": 5_951_345,
        "wikitext2": 4_475_746,
        "wikitext103": 190_229_076,
        "enwik8": 36_445_475,
        "tinyshakespeare": 1_115_394,
        "tinystories": 1_943_728_838,
        "tinystoriesv2": 2_250_255_763,
    }
    for corpus in [*(datasets.CORPORA[name] for name in names), datasets.GPT2]:
        assert len(corpus.addresses) >= 2
        for address in corpus.addresses:
            assert address.startswith("https://")
            assert address.endswith("/")
        for file in corpus.files:
            assert file.size > 0
            assert len(bytes.fromhex(file.sha256)) == 32
