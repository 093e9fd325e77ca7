"""Tokenizers, splits and downloads: ids worked out by hand, round trips on random text, a real server on loopback."""

import hashlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import datasets
from datasets import ByteTokenizer, CharTokenizer, File, RunError, Split, UsageError, WordTokenizer

# Line 1 ends at its \n only: \x0c, \x85, \u2028 and CR separate words but end no line. Line 2 is blank.
TEXT = "b a b\n\n a\x0cb \x85 é\u2028c\r\n<unk> x\n"


def random_text(generator, length):
    """Any code points but surrogates, which no UTF-8 file holds."""
    points = [generator.choice((0x7F, 0x7FF, 0xFFFF, 0x10FFFF)) for _ in range(length)]
    points = [generator.randint(0, top) for top in points]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_word_ids():
    tokenizer = WordTokenizer.train([TEXT])
    # counts: <eos> 4, b 3, a 2, the others 1 each
    assert tokenizer.words == ["<eos>", "b", "a", "<unk>", "c", "x", "é"]
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.unk) == (7, 0, 3)
    tokens = tokenizer.encode(TEXT)
    assert tokens.tolist() == [1, 2, 1, 0, 0, 2, 1, 6, 4, 0, 3, 5, 0]
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens) == "b a b\n\na b é c\n<unk> x\n"


@pytest.mark.parametrize(
    "text, tokens",
    [("", []), ("a", [2]), ("a\n", [2, 0]), ("a\nb", [2, 0, 1]), ("\n\n", [0, 0]), ("  ", []), ("nie a", [3, 2])],
)
def test_word_prompts(text, tokens):
    """A prompt that does not end its line gets no <eos>, and a word out of vocabulary is <unk>."""
    assert WordTokenizer.train([TEXT]).encode(text).tolist() == tokens


def test_word_agrees_with_a_line_reader():
    generator = random.Random(1)
    pieces = ["aa", "b", "ü", "<unk>", " ", "\t", "\n", "\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2028"]
    for _ in range(200):
        text = "".join(generator.choices(pieces, k=generator.randint(0, 40)))
        tokenizer = WordTokenizer.train([text])
        words = []
        for line in io.StringIO(text, newline="\n"):  # splits at \n alone
            words += line.split() + ["<eos>"] * line.endswith("\n")
        assert [tokenizer.words[i] for i in tokenizer.encode(text)] == words
        assert tokenizer.decode(tokenizer.encode(text)).split() == text.split()


@pytest.mark.parametrize("documents", [[], [""], ["\n"], ["word"], ["<unk> <eos>\n"]])
def test_word_specials_exist_once(documents):
    words = WordTokenizer.train(documents).words
    assert words.count("<eos>") == words.count("<unk>") == 1


def test_word_unknown():
    tokenizer = WordTokenizer.train(["a b\n"])
    assert tokenizer.unknown("b nie a\nda <unk> \ud800") == ["nie", "da", "\ud800"]
    assert tokenizer.encode("\ud800 b").tolist() == [tokenizer.unk, tokenizer.ids["b"]]


def test_char_ids():
    tokenizer = CharTokenizer.train(["bé\n", "ab"])
    assert tokenizer.characters == "\nabé"
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.unk) == (5, None, 4)
    assert tokenizer.encode("aéb\n").tolist() == [1, 3, 2, 0]
    # A surrogate pair in a Python string is two characters, not the one that UTF-16 would read in it.
    assert tokenizer.encode("a😀z\ud800\ud800\udc00\udcff").tolist() == [1, 4, 4, 4, 4, 4, 4]
    assert tokenizer.decode([1, 4]) == "a\ufffd"
    assert tokenizer.unknown("zab\ud800z") == ["z", "\ud800"]


def test_char_round_trip():
    generator = random.Random(2)
    vocabulary = random_text(generator, 500)
    tokenizer = CharTokenizer.train([vocabulary[:200], vocabulary[200:]])
    for length in (0, 1, 10, 1000):
        text = "".join(generator.choices(vocabulary, k=length))
        tokens = tokenizer.encode(text)
        assert tokens.tolist() == [sorted(set(vocabulary)).index(character) for character in text]
        assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("vocab_size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_fit_their_type(vocab_size, dtype):
    characters = "".join(map(chr, range(0x10000, 0x10000 + vocab_size - 1)))
    tokens = CharTokenizer(characters).encode(characters[-1] + "a")
    assert tokens.dtype == dtype and tokens.tolist() == [vocab_size - 2, vocab_size - 1]


def test_byte_round_trip():
    generator, tokenizer = random.Random(3), ByteTokenizer.train(["anything"])
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.unk) == (257, 256, None)
    for length in (0, 1, 10, 1000):
        text = random_text(generator, length)
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.uint16 and tokens.tolist() == list(text.encode("utf-8"))
        assert tokenizer.decode(tokens) == text
        assert tokenizer.unknown(text) == []
    assert tokenizer.decode([104, 256, 105, 0xFF]) == "hi\ufffd"  # <eos> prints nothing, half a character one mark


def test_byte_keeps_what_is_not_utf8():
    """The command line hands bytes that are not UTF-8 over as surrogates: they come out as the same bytes."""
    raw = bytes(range(256)) + random.Random(4).randbytes(1000)
    assert bytes(ByteTokenizer().encode(raw.decode("utf-8", "surrogateescape")).tolist()) == raw


@pytest.mark.parametrize("kind", ["byte", "char", "word"])
def test_tokenizers_survive_json(kind):
    text = TEXT + random_text(random.Random(5), 300)
    tokenizer = datasets.TOKENIZERS[kind].train([text])
    loaded = datasets.tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert type(loaded) is type(tokenizer)
    assert loaded.to_dict() == tokenizer.to_dict()
    assert (loaded.vocab_size, loaded.eos, loaded.unk) == (tokenizer.vocab_size, tokenizer.eos, tokenizer.unk)
    sample = text + "out of vocabulary ☃"
    assert np.array_equal(loaded.encode(sample), tokenizer.encode(sample))
    with pytest.raises(KeyError):
        datasets.tokenizer_from_dict({"kind": "later"})


def test_ids_do_not_depend_on_the_hash_seed():
    program = """
import json
from datasets import CharTokenizer, WordTokenizer
text = "".join(f"w{i * 7919 % 1000}{chr(0x4E00 + i * 7919 % 1000)} " for i in range(1000)) + "\\n"
tokenizers = [cls.train([text]) for cls in (WordTokenizer, CharTokenizer)]
print(json.dumps([[t.to_dict(), t.encode(text).tolist()] for t in tokenizers]))
"""
    # All 1,000 words are equally frequent, so an order that a set or dict lent would show.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    first, second = (process.communicate(timeout=60)[0] for process in processes)
    assert first == second and len(json.loads(first)[0][1]) == 1001


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def test_byte_documents_are_separated():
    split = datasets.encode_split(["hé\n", "", "a b"], ByteTokenizer())
    assert split.tokens.tolist() == [104, 0xC3, 0xA9, 10, 256, 256, 97, 32, 98]
    assert (split.num_bytes, split.num_words) == (7, 4)  # words hé, a, b and one line end


def test_word_documents_end_their_line():
    tokenizer = WordTokenizer.train(["a a b"])
    assert tokenizer.words == ["a", "<eos>", "b", "<unk>"]
    split = datasets.encode_split(["a b", "b\n", "\na é"], tokenizer)
    assert split.tokens.tolist() == [0, 2, 1, 2, 1, 1, 0, 3, 1]
    assert (split.num_bytes, split.num_words) == (10, 7)  # 5 words and 2 line ends that are in the text


def test_char_documents_follow_each_other():
    split = datasets.encode_split(["ab", "ba"], CharTokenizer("ab"))
    assert split.tokens.tolist() == [0, 1, 1, 0]
    assert (split.num_bytes, split.num_words) == (4, 2)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("ab"), WordTokenizer.train(["a"])])
def test_no_documents(tokenizer):
    split = datasets.encode_split([], tokenizer)
    assert split.tokens.shape == (0,) and split.tokens.dtype == np.uint16
    assert (split.num_bytes, split.num_words) == (0, 0)


def write(folder, documents):
    paths = [folder / f"{i:03}.txt" for i in range(len(documents))]
    for path, text in zip(paths, documents):
        path.write_bytes(text.encode())
    return paths


@pytest.mark.parametrize(
    "count, fraction, valid", [(10, 0.1, [9]), (25, 0.1, [9, 19]), (5, 0.25, [3]), (4, 0.5, [1, 3])]
)
def test_many_files_are_split_whole(tmp_path, count, fraction, valid):
    documents = [f"document {i}\n" * (i + 1) + "end" for i in range(count)]  # unequal: a cut by position would differ
    splits = datasets.own_text(write(tmp_path, documents), fraction)
    assert splits["valid"] == [documents[i] for i in valid]
    assert splits["train"] == [text for i, text in enumerate(documents) if i not in valid]


LINES = "012345678\n" * 100  # 1,000 characters


@pytest.mark.parametrize(
    "text, fraction, cut",
    [
        (LINES, 0.1, 900),  # a line ends right there
        (LINES, 0.155, 850),  # 845 is within a line
        (LINES, 0.149, 860),  # 851 is one past a line end
        ("x" * 5000, 0.1, 4500),  # no line end at all
        ("x" * 4500 + "y" * 2000 + "\n" + "z" * 100, 0.5, 3300),  # none near
        (LINES.replace("0", "é"), 0.1, 900),  # counted in characters
        (LINES.replace("8\n", "\r\n"), 0.155, 850),
    ],
)
def test_one_file_is_cut_behind_a_line(tmp_path, text, fraction, cut):
    splits = datasets.own_text(write(tmp_path, [text]), fraction)
    assert splits == {"train": [text[:cut]], "valid": [text[cut:]]}


def test_few_files_are_cut_by_position(tmp_path):
    first, second, third = LINES[:20], LINES[:70].replace("0", "A"), LINES[:10]
    splits = datasets.own_text(write(tmp_path, [first, second, third]), 0.25)  # 75 of 100 characters
    assert splits == {"train": [first, second[:60]], "valid": [second[60:], third]}


def test_own_text_loses_nothing(tmp_path):
    generator = random.Random(6)
    for _ in range(100):
        pieces = ["é", "word ", "\n", "\r\n", "x" * 30]
        documents = [
            "".join(generator.choices(pieces, k=generator.randint(0, 300))) for _ in range(generator.randint(1, 7))
        ]
        splits = datasets.own_text(write(tmp_path, documents), 0.125)  # 8 files would be split whole
        assert "".join(splits["train"] + splits["valid"]) == "".join(documents)
        assert all(splits["train"]) and all(splits["valid"])  # no empty document, which would add a separator


@pytest.mark.parametrize("text", ["x" * 4000 + "\n", ("word " * 150 + "\n") * 6])
def test_validation_gets_text_where_the_last_line_is_long(tmp_path, text):
    splits = datasets.own_text(write(tmp_path, [text]), 0.1)
    assert "".join(splits["train"] + splits["valid"]) == text
    assert splits["train"] and splits["valid"]


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve\n".encode("latin-1"))
    with pytest.raises(UsageError) as error:
        datasets.load_dataset("text", tmp_path, text=[path])
    assert str(path) in str(error.value) and "byte 2:" in str(error.value) and "\n" not in str(error.value)
    for missing in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(UsageError) as error:
            datasets.load_dataset("text", tmp_path, text=[missing])
        assert str(missing) in str(error.value) and "\n" not in str(error.value)


def test_bytes_of_own_text_are_untouched(tmp_path):
    text = "\ufeffone\r\ntwo\rthree\x00\x0c\n" * 50
    dataset = datasets.load_dataset("text", tmp_path, text=write(tmp_path, [text]))
    tokens = np.concatenate([dataset.train.tokens, dataset.valid.tokens])
    assert bytes(tokens.tolist()) == text.encode()
    assert dataset.train.num_bytes + dataset.valid.num_bytes == len(text.encode())
    assert dataset.tokenizer.kind == "byte" and dataset.test is None


@pytest.mark.parametrize("kind, words", [("char", "\nab"), ("word", ["<eos>", "ab", "<unk>"])])
def test_vocabulary_is_that_of_training(tmp_path, kind, words):
    paths = write(tmp_path, ["ab\n" * 90 + "zz\n" * 10])
    dataset = datasets.load_dataset("text", tmp_path, text=paths, tokenizer=kind)
    vocabulary = dataset.tokenizer.to_dict()
    assert vocabulary.get("characters", vocabulary.get("words")) == words
    assert np.sum(dataset.train.tokens == dataset.tokenizer.unk) == 0
    assert np.sum(dataset.valid.tokens == dataset.tokenizer.unk) == {"char": 20, "word": 10}[kind]


@pytest.fixture(scope="module")
def modules():
    """The bytes of the standard library's top-level modules, by split."""
    folder = sysconfig.get_path("stdlib")
    names = sorted(name for name in os.listdir(folder) if name.endswith(".py"))
    assert len(names) > 100
    splits = {"valid": names[9::10], "test": names[10::10]}
    splits["train"] = [name for name in names if name not in splits["valid"] + splits["test"]]
    return {split: [Path(folder, name).read_bytes() for name in names] for split, names in splits.items()}


def test_python_splits(modules):
    splits = datasets.python_source()
    assert {split: [text.encode() for text in texts] for split, texts in splits.items()} == modules


def test_python_by_bytes(modules, tmp_path):
    dataset = datasets.load_dataset("python", tmp_path)
    assert dataset.tokenizer.kind == "byte"
    for split in modules:
        tokens, raw = getattr(dataset, split).tokens, b"".join(modules[split])
        assert tokens[tokens < 256].astype(np.uint8).tobytes() == raw
        assert np.sum(tokens == 256) == len(modules[split]) - 1  # between documents only
        assert getattr(dataset, split).num_bytes == len(raw)


def test_python_by_characters(modules, tmp_path):
    dataset = datasets.load_dataset("python", tmp_path, tokenizer="char")
    text = b"".join(modules["train"]).decode()
    assert dataset.tokenizer.characters == "".join(sorted(set(text)))
    assert len(dataset.train.tokens) == len(text) and dataset.train.tokens.max() < dataset.tokenizer.unk
    assert dataset.tokenizer.decode(dataset.train.tokens[-5000:]) == text[-5000:]
    assert dataset.valid.num_bytes == sum(map(len, modules["valid"])) and not list(tmp_path.iterdir())


def test_dataset_knows_its_training_tokens():
    def sha256(train, valid):
        train, valid = (Split(np.array(tokens, "<u2"), 1, 1) for tokens in (train, valid))
        return datasets.Dataset("text", ByteTokenizer(), train, valid, None).sha256

    assert sha256([1, 258], [5]) == hashlib.sha256(b"\x01\x00\x02\x01").hexdigest()
    assert sha256([1, 258], [5]) == sha256([1, 258], [6])
    assert len({sha256(tokens, [5]) for tokens in ([1, 258], [1, 259], [258, 1], [1, 258, 0], [1])}) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Downloads

CONTENT = b"".join(b"line %d of the file\n" % i for i in range(2000))
PAGE = b"<!doctype html><p>This domain is for sale.</p>"


class Handler(BaseHTTPRequestHandler):
    """The first part of the path says how the server behaves, the last one which file is meant."""

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["User-Agent"]))
        behaviour, name = self.path.split("/")[1], self.path.split("/")[-1]
        content = self.server.files[name]
        status = {"absent": 404, "busy": 503, "moved": 301, "redirect": 302, "astray": 302}.get(behaviour, 200)
        body = {"good": content, "changed": content[::-1], "cut": content[: len(content) // 2]}.get(behaviour, PAGE)
        self.send_response(status)
        if behaviour == "redirect":
            self.send_header("Location", f"/good/{name}")
        if behaviour == "astray":
            self.send_header("Location", "http://[::1/")
        if behaviour != "endless":
            self.send_header("Content-Length", str(len(content if behaviour == "cut" else body)))
        self.end_headers()
        self.wfile.write(body)
        try:
            for _ in range(64 if behaviour == "endless" else 0):  # 64 MiB, far more than sockets buffer
                self.wfile.write(bytes(1 << 20))
        except OSError:
            self.server.hung_up.set()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A threaded server with `base` (its address), `files` (name -> bytes) and `seen` ((path, User-Agent) in order)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.base = f"http://127.0.0.1:{server.server_port}"
        server.files, server.seen, server.hung_up = {"corpus.txt": CONTENT}, [], threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "save" / "ptb"
    folder.mkdir(parents=True)
    return folder


def file_at(*addresses, name="corpus.txt", content=CONTENT):
    return File(name, len(content), hashlib.sha256(content).hexdigest(), addresses)


def assert_fetched(path, folder):
    assert path == folder / "corpus.txt" and path.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [path]  # no .part is left


@pytest.mark.parametrize("behaviour", ["good", "redirect"])
def test_download(server, folder, behaviour):
    said = []
    address = f"{server.base}/{behaviour}/corpus.txt"
    assert_fetched(datasets.fetch(file_at(address), folder, say=said.append), folder)
    assert len(said) == 1 and address in said[0] and str(folder) in said[0] and "\n" not in said[0]
    assert all(agent.startswith("transformer-lm") for _, agent in server.seen)


BAD = {  # behaviour -> part of the reason given
    "changed": "SHA256",
    "html": f"size {len(PAGE)} instead of {len(CONTENT):,} bytes",
    "cut": "",  # the words are those of requests
    "absent": "HTTP status 404",
    "busy": "HTTP status 503",
    "moved": "HTTP status 301",
}


@pytest.mark.parametrize("behaviour", BAD)
def test_bad_address(server, folder, behaviour):
    bad, good = f"{server.base}/{behaviour}/corpus.txt", f"{server.base}/good/corpus.txt"
    with pytest.raises(RunError) as error:
        datasets.fetch(file_at(bad), folder, say=pytest.fail)
    assert f"{bad}: {BAD[behaviour]}" in str(error.value)
    assert list(folder.iterdir()) == []
    assert_fetched(datasets.fetch(file_at(bad, good), folder, say=lambda line: None), folder)
    assert [path.split("/")[1] for path, _ in server.seen] == [behaviour, behaviour, "good"]


def test_malformed_redirect(server, folder):
    file = file_at(f"{server.base}/astray/corpus.txt", f"{server.base}/good/corpus.txt")
    assert_fetched(datasets.fetch(file, folder, say=lambda line: None), folder)


def test_endless_answer_is_cut_off(server, folder):
    with pytest.raises(RunError, match="/endless/corpus.txt: size "):
        datasets.fetch(file_at(f"{server.base}/endless/corpus.txt"), folder, say=pytest.fail)
    assert server.hung_up.wait(10)
    assert list(folder.iterdir()) == []


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
        assert f"{address}: {reason}" in message and f"{address}: ;" not in message
    for remedy in (str(folder / "corpus.txt"), f"{len(CONTENT):,} bytes", file.sha256, "--mirror", "--dataset python"):
        assert remedy in message
    assert list(folder.iterdir()) == []


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
        assert list(folder.iterdir()) == []
    (mirror / "ptb" / "corpus.txt").write_bytes(CONTENT)
    assert_fetched(datasets.fetch(file, folder, f"{mirror}/", say=lambda line: None), folder)
    assert server.seen == []  # a mirror stands in for all addresses of the file


@pytest.mark.parametrize("end", ["", "/"])
def test_mirror_address(server, folder, end):
    file = file_at(f"{server.base}/absent/corpus.txt")
    assert_fetched(datasets.fetch(file, folder, f"{server.base}/good{end}", say=lambda line: None), folder)
    assert [path for path, _ in server.seen] == ["/good/ptb/corpus.txt"]


def test_intact_file_is_not_fetched_again(server, folder):
    (folder / "corpus.txt").write_bytes(CONTENT)
    file = file_at(f"{server.base}/good/corpus.txt")
    assert_fetched(datasets.fetch(file, folder, say=pytest.fail), folder)
    assert server.seen == []


@pytest.mark.parametrize("damaged", [b"", CONTENT[:-1], CONTENT + b"\n", b"L" + CONTENT[1:]])
def test_damaged_file_is_fetched_anew(server, folder, damaged):
    path, said = folder / "corpus.txt", []
    path.write_bytes(damaged)
    with pytest.raises(RunError):
        datasets.fetch(file_at(f"{server.base}/absent/corpus.txt"), folder, say=said.append)
    assert len(said) == 1 and str(path) in said[0]
    assert_fetched(datasets.fetch(file_at(f"{server.base}/good/corpus.txt"), folder, say=said.append), folder)


PTB = {
    "train": b"the cat sat\non the mat\nthe <unk> sat\n",
    "valid": b" the dog sat\n\n",
    "test": b"a cat\n",
}


@pytest.fixture
def ptb(server, monkeypatch):
    """A Penn Treebank of six lines, whose first address is dead."""
    files = {}
    for split, content in PTB.items():
        name = f"ptb.{split}.txt"
        server.files[name] = content
        addresses = [f"{server.base}/{behaviour}/{name}" for behaviour in ("moved", "good")]
        files[split] = file_at(*addresses, name=name, content=content)
    monkeypatch.setattr(datasets, "PTB_FILES", files)


def test_ptb(server, ptb, tmp_path):
    dataset = datasets.load_dataset("ptb", tmp_path, say=lambda line: None)
    assert dataset.name == "ptb" and dataset.tokenizer.words == ["<eos>", "the", "sat", "<unk>", "cat", "mat", "on"]
    assert dataset.train.tokens.tolist() == [1, 4, 2, 0, 6, 1, 5, 0, 1, 3, 2, 0]
    assert dataset.valid.tokens.tolist() == [1, 3, 2, 0, 0]
    assert dataset.test.tokens.tolist() == [3, 4, 0]
    for split, num_words in (("train", 12), ("valid", 5), ("test", 3)):
        assert getattr(dataset, split).num_words == num_words
        assert getattr(dataset, split).num_bytes == len(PTB[split])
    assert sorted(path.name for path in (tmp_path / "ptb").iterdir()) == [f"ptb.{split}.txt" for split in sorted(PTB)]
    server.seen.clear()
    again = datasets.load_dataset("ptb", tmp_path, say=pytest.fail)
    assert again.sha256 == dataset.sha256 and server.seen == []


def test_ptb_from_a_mirror(server, ptb, tmp_path):
    mirror = f"{server.base}/good"
    dataset = datasets.load_dataset("ptb", tmp_path, tokenizer="byte", mirror=mirror, say=lambda line: None)
    assert bytes(dataset.valid.tokens.tolist()) == PTB["valid"]
    assert [path for path, _ in server.seen] == [f"/good/ptb/ptb.{split}.txt" for split in PTB]


def test_real_ptb_files_are_described_in_full():
    assert list(datasets.PTB_FILES) == ["train", "valid", "test"]
    for split, file in datasets.PTB_FILES.items():
        assert file.name == f"ptb.{split}.txt" and file.size > 0 and len(bytes.fromhex(file.sha256)) == 32
        assert file.addresses and all(a.startswith("https://") and a.endswith(file.name) for a in file.addresses)
