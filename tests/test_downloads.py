"""Downloads from a real server on loopback, whatever it does, and each corpus in a fixture of its form."""

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
from datasets import BPETokenizer, File, RunError

CONTENT = b"".join(b"line %d of the file\n" % i for i in range(2000))
BIG = random.Random(0).randbytes(3 << 20)
PAGE = b"<!doctype html><p>This domain is for sale.</p>"


class Handler(BaseHTTPRequestHandler):
    """The first part of the path says how the server behaves, the last one which file is meant."""

    def do_GET(self):
        behaviour, name, server = self.path.split("/")[1], self.path.split("/")[-1], self.server
        tries = sum(request.path == self.path for request in server.seen)  # before this one
        request = SimpleNamespace(path=self.path, agent=self.headers["User-Agent"], range=self.headers["Range"], sent=0)
        server.seen.append(request)
        content = server.files[name]
        first = int(re.fullmatch(r"bytes=(\d+)-", request.range)[1]) if request.range and behaviour != "whole" else 0
        status = {"absent": 404, "busy": 503, "moved": 301, "redirect": 302, "astray": 302}.get(behaviour, 200)
        if behaviour in ("slow", "trouble") and not tries:
            status = {"slow": 429, "trouble": 503}[behaviour]
        if behaviour == "agent" and not request.agent.startswith("transformer-lm"):
            status = 403
        body = {"changed": content[::-1], "short": content[:-1], "page": PAGE}.get(behaviour, content[first:])
        body, status = (body, 206 if first else 200) if status == 200 else (PAGE, status)
        stop = server.cuts[tries] - first if tries < len(server.cuts) else len(body)
        self.send_response(status)
        headers = {"Content-Length": len(body)}
        headers |= {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if status == 206 else {}
        headers |= {"Retry-After": 7} if status == 429 else {}
        headers |= {"Content-Type": "text/html; charset=utf-8"} if behaviour == "html" else {}
        headers |= {"Location": f"/good/{name}"} if behaviour == "redirect" else {}
        headers |= {"Location": "http://[::1/"} if behaviour == "astray" else {}
        if behaviour == "endless":
            del headers["Content-Length"]
        for header, value in headers.items():
            self.send_header(header, str(value))
        self.end_headers()
        try:
            for begin in range(0, min(stop, len(body)), 1 << 16):
                block = body[begin : min(begin + (1 << 16), stop)]
                request.sent += len(block)  # first: the other side may be done before this one goes on
                self.wfile.write(block)
            if behaviour == "wait" and not tries:
                server.go_on.wait(20)
            for _ in range(64 if behaviour == "endless" else 0):  # 64 MiB, far more than sockets buffer
                self.wfile.write(bytes(1 << 20))
        except OSError:
            server.hung_up.set()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A threaded server: `base` (its address), `files` (name -> bytes), `cuts` (after how many bytes of the file
    it cuts each try off), `seen` (the requests) and `slept` (the seconds that the client would have slept)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.base = f"http://127.0.0.1:{server.server_port}"
        server.files, server.cuts, server.seen, server.slept = {"corpus.txt": CONTENT, "big": BIG}, [], [], []
        server.hung_up, server.go_on = threading.Event(), threading.Event()
        monkeypatch.setattr("time.sleep", server.slept.append)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
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


def file_at(*addresses, name="corpus.txt", content=CONTENT):
    return File(name, len(content), hashlib.sha256(content).hexdigest(), addresses)


def seen_in(folder):
    """The files in a folder that are not hidden: what is locked stays."""
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def assert_fetched(path, folder, name="corpus.txt", content=CONTENT):
    assert path == folder / name and path.read_bytes() == content
    assert seen_in(folder) == [path]  # no .part is left


@pytest.mark.parametrize("behaviour", ["good", "redirect", "agent", "whole"])
def test_download(server, folder, behaviour):
    said = []
    address = f"{server.base}/{behaviour}/corpus.txt"
    assert_fetched(datasets.fetch(file_at(address), folder, say=said.append), folder)
    assert len(said) == 1 and address in said[0] and str(folder) in said[0] and "\n" not in said[0]
    assert all(request.agent.startswith("transformer-lm") and not request.range for request in server.seen)


def test_what_was_fetched_but_not_yet_verified(server, folder):
    """A kill between the last byte and the name costs no second download; what is then found wrong does."""
    file = file_at(f"{server.base}/good/corpus.txt")
    (folder / "corpus.txt.part").write_bytes(CONTENT)
    assert_fetched(datasets.fetch(file, folder, say=quiet), folder)
    assert not server.seen
    (folder / "corpus.txt").unlink()
    (folder / "corpus.txt.part").write_bytes(CONTENT[::-1])
    assert_fetched(datasets.fetch(file, folder, say=quiet), folder)
    assert len(server.seen) == 1


def test_an_error_without_words(folder, monkeypatch):
    monkeypatch.setattr("requests.get", lambda *_, **__: (_ for _ in ()).throw(requests.ConnectionError()))
    with pytest.raises(RunError, match="nowhere/corpus.txt: ConnectionError"):
        datasets.fetch(file_at("http://nowhere/corpus.txt"), folder, say=quiet)


def test_a_source_that_ends_in_a_slash(server, folder):
    assert_fetched(datasets.fetch(file_at(f"{server.base}/good/some/where/"), folder, say=quiet), folder)
    assert server.seen[0].path == "/good/some/where/corpus.txt"


BAD = {  # behaviour -> part of the reason given
    "changed": "SHA256",
    "page": f"HTTP status 200, None, {len(PAGE)} of {len(CONTENT):,} bytes",
    "html": "HTTP status 200, text/html",
    "short": f"HTTP status 200, None, {len(CONTENT) - 1:,} of {len(CONTENT):,} bytes",
    "absent": "HTTP status 404",
    "busy": "",  # 503, in the words of urllib3
    "moved": "HTTP status 301",
    "astray": "",  # the words are those of requests
}


@pytest.mark.parametrize("behaviour", BAD)
def test_bad_address(server, folder, behaviour):
    bad, good = f"{server.base}/{behaviour}/corpus.txt", f"{server.base}/good/corpus.txt"
    with pytest.raises(RunError) as error:
        datasets.fetch(file_at(bad), folder, say=pytest.fail)
    assert f"{bad}: {BAD[behaviour]}" in str(error.value) and f"{bad}: )" not in str(error.value)
    assert seen_in(folder) == []
    tries = len(server.seen)
    assert tries == (6 if behaviour == "busy" else 1)
    assert_fetched(datasets.fetch(file_at(bad, good), folder, say=quiet), folder)
    assert [request.path for request in server.seen[-2:]] == [f"/{behaviour}/corpus.txt", "/good/corpus.txt"]


def test_endless_answer_is_cut_off(server, folder):
    with pytest.raises(RunError, match=f"/endless/corpus.txt: more than {len(CONTENT):,} bytes"):
        datasets.fetch(file_at(f"{server.base}/endless/corpus.txt"), folder, say=pytest.fail)
    assert server.hung_up.wait(10)
    good = f"{server.base}/good/corpus.txt"
    assert_fetched(datasets.fetch(file_at(f"{server.base}/endless/corpus.txt", good), folder, say=quiet), folder)


@pytest.mark.parametrize("behaviour", ["slow", "trouble"])
def test_tries_again(server, folder, behaviour):
    """429 with Retry-After: 7, and 503; then it is good."""
    assert_fetched(datasets.fetch(file_at(f"{server.base}/{behaviour}/corpus.txt"), folder, say=quiet), folder)
    assert len(server.seen) == 2 and (behaviour == "trouble" or server.slept == [7])


def test_waits_longer_each_time_and_then_gives_up(server, folder):
    with pytest.raises(RunError, match="/busy/corpus.txt: .*503"):
        datasets.fetch(file_at(f"{server.base}/busy/corpus.txt"), folder, say=pytest.fail)
    assert len(server.seen) == 6 and server.slept == sorted(server.slept) and 8 <= max(server.slept) <= 60


@pytest.mark.parametrize("seed", range(3))
def test_cut_connection_is_resumed(server, folder, seed):
    server.cuts = [random.Random(seed).randrange(2 << 20, len(BIG))]
    path = datasets.fetch(file_at(f"{server.base}/good/big", name="big", content=BIG), folder, say=quiet)
    assert_fetched(path, folder, "big", BIG)
    whole, rest = server.seen
    first = int(rest.range.removeprefix("bytes=").removesuffix("-"))
    assert whole.range is None and 0 < first <= whole.sent == server.cuts[0] and rest.sent == len(BIG) - first


@pytest.mark.parametrize("behaviour", ["good", "whole"])
@pytest.mark.parametrize("cuts", [[1], [20000], [len(CONTENT) - 1], [500, 30000, 30001]], ids=str)
def test_cut_anywhere(server, folder, behaviour, cuts):
    """Also where the server ignores the Range and sends the whole."""
    server.cuts = cuts
    assert_fetched(datasets.fetch(file_at(f"{server.base}/{behaviour}/corpus.txt"), folder, say=quiet), folder)
    assert len(server.seen) == len(cuts) + 1


def test_whole_answer_to_a_range(server, folder):
    (folder / "big.part").write_bytes(BIG[: 1 << 20])
    path = datasets.fetch(file_at(f"{server.base}/whole/big", name="big", content=BIG), folder, say=quiet)
    assert_fetched(path, folder, "big", BIG)
    assert [(request.range, request.sent) for request in server.seen] == [(f"bytes={1 << 20}-", len(BIG))]


def test_a_line_that_is_cut_often_gets_through(server, folder):
    """Every 300 KB, ten times: what has arrived is kept."""
    server.cuts = range(300000, len(BIG), 300000)
    path = datasets.fetch(file_at(f"{server.base}/good/big", name="big", content=BIG), folder, say=quiet)
    assert_fetched(path, folder, "big", BIG)
    assert sum(request.sent for request in server.seen) < 1.1 * len(BIG)


def test_always_cut(server, folder):
    server.cuts = [1000] * 100
    with pytest.raises(RunError, match="/whole/corpus.txt: .*cut"):
        datasets.fetch(file_at(f"{server.base}/whole/corpus.txt"), folder, say=pytest.fail)
    assert len(server.seen) < 10


@pytest.mark.parametrize("left", [b"x" * 100, b"", CONTENT[::-1], CONTENT + b"more", CONTENT[:100], CONTENT])
@pytest.mark.parametrize("source", ["good", "whole", "folder"])
def test_what_an_earlier_try_left_spoils_nothing(server, folder, tmp_path, left, source):
    (folder / "corpus.txt.part").write_bytes(left)
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "corpus.txt").write_bytes(CONTENT)
    mirror = str(tmp_path) if source == "folder" else f"{server.base}/{source}"
    assert_fetched(datasets.fetch(file_at(), folder, mirror, say=quiet), folder)


def test_all_addresses_fail(server, folder):
    with socket.socket() as bound:  # bound but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{bound.getsockname()[1]}/corpus.txt"
        addresses = [f"{server.base}/{behaviour}/corpus.txt" for behaviour in BAD]
        file = file_at(refused, *addresses)
        with pytest.raises(RunError) as error:
            datasets.fetch(file, folder, say=pytest.fail)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for address, reason in zip([refused, *addresses], ["", *BAD.values()]):
        assert f"{address}: {reason}" in message and not re.search(rf"{re.escape(address)}: [;)]", message)
    assert "refused" in message
    for remedy in (str(folder / "corpus.txt"), f"{len(CONTENT):,} bytes", file.sha256, "--mirror", "--dataset python"):
        assert remedy in message
    assert seen_in(folder) == []


def test_mirror_folder(server, folder, tmp_path):
    file = file_at(f"{server.base}/good/corpus.txt")
    mirror = tmp_path / "mirror"
    with pytest.raises(RunError) as error:
        datasets.fetch(file, folder, str(mirror), say=pytest.fail)
    assert f"{mirror}/ptb/corpus.txt: " in str(error.value) and server.base not in str(error.value)
    (mirror / "ptb").mkdir(parents=True)
    for content, fault in ((CONTENT[:-1], "size"), (CONTENT[::-1], "SHA256")):
        (mirror / "ptb" / "corpus.txt").write_bytes(content)
        with pytest.raises(RunError, match=f"corpus.txt: {fault} "):
            datasets.fetch(file, folder, str(mirror), say=pytest.fail)
        assert seen_in(folder) == []
    (mirror / "ptb" / "corpus.txt").write_bytes(CONTENT)
    assert_fetched(datasets.fetch(file, folder, f"{mirror}/", say=quiet), folder)
    assert server.seen == []  # a mirror stands in for all addresses of the file


@pytest.mark.parametrize("end", ["", "/"])
def test_mirror_address(server, folder, end):
    file = file_at(f"{server.base}/absent/corpus.txt")
    assert_fetched(datasets.fetch(file, folder, f"{server.base}/good{end}", say=quiet), folder)
    assert [request.path for request in server.seen] == ["/good/ptb/corpus.txt"]


def test_intact_file_is_not_fetched_again(server, folder):
    (folder / "corpus.txt").write_bytes(CONTENT)
    assert_fetched(datasets.fetch(file_at(f"{server.base}/good/corpus.txt"), folder, say=pytest.fail), folder)
    assert server.seen == []


@pytest.mark.parametrize("damaged", [b"", CONTENT[:-1], CONTENT + b"\n", b"L" + CONTENT[1:]])
def test_damaged_file_is_fetched_anew(server, folder, damaged):
    path, said = folder / "corpus.txt", []
    path.write_bytes(damaged)
    with pytest.raises(RunError):
        datasets.fetch(file_at(f"{server.base}/absent/corpus.txt"), folder, say=said.append)
    assert len(said) == 1 and str(path) in said[0]
    assert_fetched(datasets.fetch(file_at(f"{server.base}/good/corpus.txt"), folder, say=said.append), folder)


def start_fetch(file, folder):
    code = f"from datasets import *; fetch(File{tuple(file)!r}, Path({str(folder)!r}))"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)  # time.sleep is not what it was
    raise AssertionError("it never came to be")


def test_two_processes_fetch_once(server, folder):
    server.cuts = [2 << 20]  # then it waits, and the rest comes at a second try
    file = file_at(f"{server.base}/wait/big", name="big", content=BIG)
    processes = [start_fetch(file, folder) for _ in range(2)]
    wait_for(lambda: server.seen and server.seen[0].sent == 2 << 20)
    threading.Event().wait(0.3)  # for the other one to come to the lock
    server.go_on.set()
    assert [process.communicate(timeout=30) and process.returncode for process in processes] == [0, 0]
    assert_fetched(folder / "big", folder, "big", BIG)
    assert len(server.seen) == 2 and server.seen[1].range


def test_killed_download_is_resumed(server, folder):
    server.cuts = [(2 << 20) + 12345]
    file, part = file_at(f"{server.base}/wait/big", name="big", content=BIG), folder / "big.part"
    process = start_fetch(file, folder)
    wait_for(lambda: part.exists() and part.stat().st_size >= 1 << 20)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (folder / "big").exists()
    have = part.stat().st_size
    assert_fetched(datasets.fetch(file, folder, say=quiet), folder, "big", BIG)
    assert (server.seen[1].range, server.seen[1].sent) == (f"bytes={have}-", len(BIG) - have)


# ---- Archives -------------------------------------------------------------------------------------------------------


def zipped(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def test_only_the_named_members_are_extracted(tmp_path):
    folder, outside = tmp_path / "a" / "b", tmp_path / "evil"
    folder.mkdir(parents=True)
    evil = {name: b"evil" for name in ("../evil", "../../evil", str(outside), "../b/x.txt", "other", "deep/evil")}
    (folder / "c.zip").write_bytes(zipped(evil | {"deep/x.txt": b"good", "../deep/y.txt": b"yes"}))
    paths = [datasets.extract(folder / "c.zip", member, folder) for member in ("deep/x.txt", "../deep/y.txt")]
    assert paths == [folder / "x.txt", folder / "y.txt"] and [path.read_bytes() for path in paths] == [b"good", b"yes"]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(written) == [folder / "c.zip", *paths]


def test_a_member_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "c.zip").write_bytes(zipped({"deep/x.txt": b"x"}))
    (tmp_path / "c.zip.unpacked" / "deep").mkdir(parents=True)  # as a killed process leaves it
    (tmp_path / "c.zip.unpacked" / "deep" / "x.txt").write_bytes(b"half")
    seen = []
    monkeypatch.setattr(datasets, "sync", lambda path: seen.append((path.read_bytes(), (tmp_path / "x.txt").exists())))
    datasets.extract(tmp_path / "c.zip", "deep/x.txt", tmp_path)
    assert seen == [(b"x", False)] and not (tmp_path / "c.zip.unpacked").exists()


@pytest.mark.parametrize("content", [zipped({"x.txt": b"x", "../y.txt": b"y"}), b"PK no archive"])
def test_archive_that_lacks_a_member(tmp_path, content):
    (tmp_path / "c.zip").write_bytes(content)
    with pytest.raises(RunError) as error:
        datasets.extract(tmp_path / "c.zip", "deep/y.txt", tmp_path)
    message = str(error.value)
    assert str(tmp_path / "c.zip") in message and "deep/y.txt" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == [tmp_path / "c.zip"]


def test_damaged_member(tmp_path):
    data = bytearray(zipped({"x.txt": random.Random(0).randbytes(1000)}))
    data[500] ^= 1
    (tmp_path / "c.zip").write_bytes(data)
    with pytest.raises(RunError, match="x.txt"):
        datasets.extract(tmp_path / "c.zip", "x.txt", tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "c.zip"], "nothing half unpacked"


# ---- Corpora --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A function that lays a file into a mirror folder and has it known by its size and SHA256; gives the mirror."""

    def lay(dataset, name, content):
        path = tmp_path / "mirror" / dataset / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        monkeypatch.setitem(datasets.FILES, name, file_at(name=name, content=content)[1:3])
        return str(tmp_path / "mirror")

    return lay


def words_of(content):
    """Tokens of a text by the rule that the published counts follow."""
    return [word for line in io.StringIO(content.decode(), newline="\n") for word in [*line.split(), "<eos>"]]


def assert_words(split, vocabulary, content):
    assert [vocabulary[i] for i in split.tokens] == [
        word if word in vocabulary else "<unk>" for word in words_of(content)
    ]
    assert (split.num_bytes, split.num_words) == (len(content), len(split.tokens))
    assert split.num_unk == sum(word == "<unk>" or word not in vocabulary for word in words_of(content))


PTB = {
    "train": b"the cat sat\non the mat\nthe <unk> sat\n",
    "valid": b" the dog sat\n\n",
    "test": b"a cat\n",
}


def test_ptb(mirror, tmp_path):
    base = [mirror("ptb", f"ptb.{split}.txt", content) for split, content in PTB.items()][0]
    dataset = datasets.load_dataset("ptb", tmp_path, mirror=base, say=quiet)
    assert dataset.name == "ptb" and dataset.tokenizer.vocabulary == ["<eos>", "the", "sat", "<unk>", "cat", "mat", "on"]
    assert dataset.train.tokens.tolist() == [1, 4, 2, 0, 6, 1, 5, 0, 1, 3, 2, 0]
    assert dataset.valid.tokens.tolist() == [1, 3, 2, 0, 0]
    assert dataset.test.tokens.tolist() == [3, 4, 0]
    for split, num_words, num_unk in (("train", 12, 1), ("valid", 5, 1), ("test", 3, 1)):
        assert getattr(dataset, split).num_words == num_words and getattr(dataset, split).num_unk == num_unk
        assert getattr(dataset, split).num_bytes == len(PTB[split])
    files = [path.name for path in seen_in(tmp_path / "ptb") if path.is_file()]
    assert files == [f"ptb.{split}.txt" for split in sorted(PTB)]
    assert datasets.load_dataset("ptb", tmp_path, mirror="/nowhere", say=pytest.fail).sha256 == dataset.sha256
    by_bytes = datasets.load_dataset("ptb", tmp_path, tokenizer="byte", mirror="/nowhere", say=pytest.fail)
    assert bytes(by_bytes.valid.tokens.tolist()) == PTB["valid"]


def test_ptb_from_an_address(server, monkeypatch, tmp_path):
    for split, content in PTB.items():
        name = f"ptb.{split}.txt"
        server.files[name] = content
        monkeypatch.setitem(datasets.FILES, name, file_at(name=name, content=content)[1:3])
    addresses = [f"{server.base}/moved/", f"{server.base}/good/"]
    monkeypatch.setitem(datasets.CORPORA, "ptb", datasets.CORPORA["ptb"]._replace(addresses=addresses))
    assert len(datasets.load_dataset("ptb", tmp_path, say=quiet).train.tokens) == 12
    server.seen.clear()
    datasets.load_dataset("ptb", tmp_path / "other", tokenizer="byte", mirror=f"{server.base}/good", say=quiet)
    assert [request.path for request in server.seen] == [f"/good/ptb/ptb.{split}.txt" for split in PTB]


WIKI = {
    "train": " \n = Señor <unk> = \n \n The 10 @-@ year war began ; 3 @,@ 000 men\rcame to Łódź . \n \n"
    " = = 東京 = = \n \n war <unk> . \n",
    "valid": " \n = War = \n \n The war in Łódź was a 20 @-@ year war . \n \n",
    "test": " \n = <unk> = \n \n\n men came \r\n",
}


@pytest.mark.parametrize("dataset, name", [("wikitext2", "wikitext-2"), ("wikitext103", "wikitext-103")])
def test_wikitext(mirror, tmp_path, dataset, name):
    contents = {split: text.encode() for split, text in WIKI.items()}
    members = {f"{name}/wiki.{split}.tokens": content for split, content in contents.items()}
    evil = {"../../evil": b"evil", f"{name}/readme": b"no"}
    base = mirror(dataset, f"{name}-v1.zip", zipped(evil | members))
    loaded = datasets.load_dataset(dataset, tmp_path, mirror=base, say=quiet)
    assert loaded.tokenizer.vocab_size == len(set(words_of(contents["train"])))
    assert loaded.tokenizer.vocabulary[:4] == ["<eos>", "=", ".", "<unk>"]  # 8, 6, and 2 each, by alphabet
    for split in WIKI:
        assert_words(getattr(loaded, split), loaded.tokenizer.vocabulary, contents[split])
    files = [path.name for path in seen_in(tmp_path / dataset) if path.is_file()]
    assert files == sorted([f"{name}-v1.zip", *(f"wiki.{split}.tokens" for split in WIKI)])
    (tmp_path / dataset / f"{name}-v1.zip").unlink()  # what was unpacked is enough
    datasets.load_dataset(dataset, tmp_path, tokenizer="char", mirror="/nowhere", say=pytest.fail)


def test_enwik8(mirror, tmp_path):
    data = b"a" + "é".encode() * 499 + b"\n"  # 1,000 bytes; the cuts at 900 and 950 are within a character
    base = mirror("enwik8", "enwik8.zip", zipped({"enwik8": data}))
    parts = {"train": data[:900], "valid": data[900:950], "test": data[950:]}
    loaded = datasets.load_dataset("enwik8", tmp_path, mirror=base, say=quiet)
    assert loaded.tokenizer.kind == "byte"
    for split, part in parts.items():
        assert bytes(getattr(loaded, split).tokens.tolist()) == part and getattr(loaded, split).num_bytes == len(part)
    for kind in ("char", "word", "bpe"):
        other = datasets.load_dataset("enwik8", tmp_path, tokenizer=kind, vocab_size=300, mirror=base, say=quiet)
        assert [getattr(other, split).num_bytes for split in parts] == [900, 50, 50]
        assert other.tokenizer.decode(other.train.tokens[:1]).startswith("a")
        other.tokenizer.decode(range(other.tokenizer.vocab_size)).encode()  # what is printed is valid text


def test_tinyshakespeare(mirror, tmp_path):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 9 + "Zounds"
    base = mirror("tinyshakespeare", "input.txt", text.encode())
    loaded = datasets.load_dataset("tinyshakespeare", tmp_path, mirror=base, say=quiet)
    cut = int(len(text) * 0.9)
    assert loaded.tokenizer.kind == "char" and loaded.tokenizer.vocabulary == "".join(sorted(set(text[:cut])))
    assert loaded.tokenizer.decode(loaded.train.tokens) == text[:cut] and len(loaded.train.tokens) == cut
    assert loaded.tokenizer.decode(loaded.valid.tokens) == text[cut:].replace("Z", "\ufffd") and loaded.test is None
    assert (loaded.valid.num_bytes, loaded.valid.num_unk) == (len(text) - cut, 1)


MARKER = "<|endoftext|>"
STORIES = [f"Once upon a time, girl {i} saw a café.\n\nShe said “hi”.{' The end.' * (i % 7)}" for i in range(30)]


@pytest.mark.parametrize("dataset, name", [("tinystories", "TinyStories"), ("tinystoriesv2", "TinyStoriesV2-GPT4")])
@pytest.mark.parametrize("layout", ["{}\n" + MARKER + "\n", "{}\n\n" + MARKER + "\n", "\n{}\n" + MARKER])
def test_tinystories(mirror, tmp_path, dataset, name, layout):
    tokenizer = BPETokenizer.train(STORIES, 400)
    base = mirror("gpt2", "tokenizer.json", tokenizer.vocabulary.encode())
    mirror(dataset, f"{name}-train.txt", "".join(map(layout.format, STORIES[:19])).encode())
    valid = [layout.format(story).encode() for story in STORIES[19:]]
    mirror(dataset, f"{name}-valid.txt", b"".join(valid))
    loaded = datasets.load_dataset(dataset, tmp_path, mirror=base, say=quiet)
    assert loaded.tokenizer.kind == "gpt2" and loaded.tokenizer.eos == tokenizer.eos
    ends = np.cumsum([len(story) for story in valid])
    half = 19 + sum(end < ends[-1] // 2 for end in ends) + 1  # stories that begin before the middle
    assert 19 < half < 29
    for split, stories in (("train", STORIES[:19]), ("valid", STORIES[19:half]), ("test", STORIES[half:])):
        tokens = getattr(loaded, split).tokens.tolist()
        documents = [tokenizer.encode(story).tolist() for story in stories]
        assert tokens == sum(([tokenizer.eos] + document for document in documents), [])[1:]
        assert getattr(loaded, split).num_bytes == sum(len(story.encode()) for story in stories)
        assert getattr(loaded, split).num_words == sum(len(story.split()) + story.count("\n") for story in stories)
    by_words = datasets.load_dataset(dataset, tmp_path, tokenizer="word", mirror=base, say=quiet)
    assert MARKER not in by_words.tokenizer.vocabulary and by_words.train.num_bytes == loaded.train.num_bytes
    by_bytes = datasets.load_dataset(dataset, tmp_path, tokenizer="byte", mirror=base, say=quiet)
    expected = [token for story in STORIES[half:] for token in (256, *story.encode())][1:]
    assert by_bytes.test.tokens.tolist() == expected


@pytest.fixture(scope="module")
def modules():
    """The bytes of the standard library's top-level modules, by split."""
    folder = sysconfig.get_path("stdlib")
    names = sorted(name for name in os.listdir(folder) if name.endswith(".py"))
    assert len(names) > 100
    splits = {"valid": names[9::10], "test": names[10::10]}
    splits["train"] = [name for name in names if name not in splits["valid"] + splits["test"]]
    return {split: [Path(folder, name).read_bytes() for name in names] for split, names in splits.items()}


def test_python_by_bytes(modules, tmp_path):
    dataset = datasets.load_dataset("python", tmp_path)
    assert dataset.tokenizer.kind == "byte"
    for split in modules:
        expected = [token for module in modules[split] for token in (256, *module)][1:]  # between documents only
        assert getattr(dataset, split).tokens.tolist() == expected
        assert getattr(dataset, split).num_bytes == sum(map(len, modules[split]))


def test_python_by_characters(modules, tmp_path):
    dataset = datasets.load_dataset("python", tmp_path, tokenizer="char")
    text = b"".join(modules["train"]).decode()
    assert dataset.tokenizer.vocabulary == "".join(sorted(set(text)))
    assert len(dataset.train.tokens) == len(text) and dataset.train.tokens.max() < dataset.tokenizer.unk
    assert dataset.tokenizer.decode(dataset.train.tokens[-5000:]) == text[-5000:]
    assert dataset.valid.num_bytes == sum(map(len, modules["valid"]))


def test_real_files_are_described_in_full():
    corpora = [corpus for name, corpus in datasets.CORPORA.items() if name not in ("python", "text")]
    needed = [text.file for corpus in corpora for text in corpus.texts]
    assert {*needed, "tokenizer.json"} == set(datasets.FILES)
    for addresses in [corpus.addresses for corpus in corpora] + [datasets.GPT2]:
        assert len(addresses) >= 2 and all(address.startswith("https://") for address in addresses)
        assert any(address.endswith("/") for address in addresses)
    assert all(size > 0 and len(bytes.fromhex(sha256)) == 32 for size, sha256 in datasets.FILES.values())
    total = {"ptb": 5951345, "wikitext2": 4475746, "wikitext103": 190229076, "enwik8": 36445475, "input": 1115394}
    assert sum(size for name, (size, _) in datasets.FILES.items() if name.startswith("ptb.")) == total["ptb"]
    assert datasets.FILES["wikitext-2-v1.zip"][0] == total["wikitext2"]
    assert datasets.FILES["wikitext-103-v1.zip"][0] == total["wikitext103"]
    assert datasets.FILES["enwik8.zip"][0] == total["enwik8"] and datasets.FILES["input.txt"][0] == total["input"]
    assert sum("TinyStories" in name for name in datasets.FILES) == 4 and "tokenizer.json" in datasets.FILES
    names = "ptb wikitext2 wikitext103 enwik8 tinyshakespeare tinystories tinystoriesv2 python text".split()
    assert list(datasets.CORPORA) == names
