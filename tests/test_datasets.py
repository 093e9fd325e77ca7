"""Tokenizers, streams of documents, splits of own text, and the cache of tokens on disk."""

import ast
import base64
import fcntl
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import unicodedata
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import DATASETS, ROOT, TINY, begin, run, run_folder, start, whole

import datasets
from datasets import ByteTokenizer, CharTokenizer, PackageTokenizer, RunError, UsageError
from datasets import WordTokenizer, read_documents, write_tokens

# Line 1 ends at its \n only: \x0c, \x85, \u2028 and CR separate words but end no line. Line 2 is
# blank.
TEXT = "b a b\n\n a\x0cb \x85 é\u2028c\r\n<unk> x\n"


def random_text(generator, length):
    """Any code points but surrogates, which no UTF-8 file holds."""
    characters = []
    for _ in range(length):
        point = generator.randint(0, generator.choice((0x7F, 0x7FF, 0xFFFF, 0x10FFFF)))
        if not 0xD800 <= point < 0xE000:
            characters.append(chr(point))
    return "".join(characters)


# ---- Tokenizers ---------------------------------------------------------------------------------


def test_word_ids():
    tokenizer = WordTokenizer.train([TEXT])
    # counts: <eos> 4, b 3, a 2, the others 1 each
    assert tokenizer.vocabulary == ["<eos>", "b", "a", "<unk>", "c", "x", "é"]
    assert tokenizer.vocab_size == 7
    assert tokenizer.eos == 0
    assert tokenizer.unk == 3
    tokens = tokenizer.encode(TEXT)
    assert tokens.tolist() == [1, 2, 1, 0, 0, 2, 1, 6, 4, 0, 3, 5, 0]
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens) == "b a b\n\na b é c\n<unk> x\n"


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("", []),
        ("a", [2]),
        ("a\n", [2, 0]),
        ("a\nb", [2, 0, 1]),
        ("\n\n", [0, 0]),
        ("  ", []),
        ("nie a", [3, 2]),
    ],
)
def test_word_prompts(text, tokens):
    """A prompt that does not end its line gets no <eos>; a word out of vocabulary is <unk>."""
    assert WordTokenizer.train([TEXT]).encode(text).tolist() == tokens


def test_word_agrees_with_a_line_reader():
    generator = random.Random(1)
    pieces = ["aa", "b", "ü", "<unk>", " ", "\t", "\n", "\n"]
    pieces += ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2028"]
    for _ in range(200):
        text = "".join(generator.choices(pieces, k=generator.randint(0, 40)))
        tokenizer = WordTokenizer.train([text])
        words = []
        for line in io.StringIO(text, newline="\n"):  # splits at \n alone
            words += line.split()
            if line.endswith("\n"):
                words.append("<eos>")
        ids = tokenizer.encode(text)
        assert [tokenizer.vocabulary[i] for i in ids] == words
        assert tokenizer.decode(ids).split() == text.split()


@pytest.mark.parametrize("documents", [[], [""], ["\n"], ["word"], ["<unk> <eos>\n"]])
def test_word_specials_exist_once(documents):
    words = WordTokenizer.train(documents).vocabulary
    assert words.count("<eos>") == words.count("<unk>") == 1


def test_word_unknown():
    tokenizer = WordTokenizer.train(["a b\n"])
    assert tokenizer.unknown("b nie a\nda <unk> \ud800") == ["nie", "da", "\ud800"]
    assert tokenizer.encode("\ud800 b").tolist() == [tokenizer.unk, tokenizer.vocabulary.index("b")]


def test_char_ids():
    tokenizer = CharTokenizer.train(["bé\n", "ab"])
    assert tokenizer.vocabulary == "\nabé"
    assert tokenizer.vocab_size == 5
    assert tokenizer.eos is None
    assert tokenizer.unk == 4
    assert tokenizer.encode("aéb\n").tolist() == [1, 3, 2, 0]
    # A surrogate pair is the one character that its writer, JSON say, meant. Half a pair is one,
    # too.
    assert tokenizer.encode("a😀z\ud800\ud800\udc00\udcff").tolist() == [1, 4, 4, 4, 4, 4]
    assert tokenizer.decode([1, 4]) == "a\ufffd"
    assert tokenizer.unknown("zab\ud800z") == ["z", "\ud800"]


def test_char_round_trip():
    generator = random.Random(2)
    vocabulary = random_text(generator, 500)
    tokenizer = CharTokenizer.train([vocabulary[:200], vocabulary[200:]])
    characters = sorted(set(vocabulary))
    for length in (0, 1, 10, 1000):
        text = "".join(generator.choices(vocabulary, k=length))
        tokens = tokenizer.encode(text)
        assert tokens.tolist() == [characters.index(character) for character in text]
        assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("vocab_size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_fit_their_type(vocab_size, dtype):
    characters = "".join(map(chr, range(0x10000, 0x10000 + vocab_size - 1)))
    tokens = CharTokenizer(characters).encode(characters[-1] + "a")
    assert tokens.dtype == dtype
    assert tokens.tolist() == [vocab_size - 2, vocab_size - 1]


def test_byte_round_trip():
    generator = random.Random(3)
    tokenizer = ByteTokenizer.train(["anything"])
    assert tokenizer.vocab_size == 257
    assert tokenizer.eos == 256
    assert tokenizer.unk is None
    for length in (0, 1, 10, 1000):
        text = random_text(generator, length)
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == list(text.encode("utf-8"))
        assert tokenizer.decode(tokens) == text
        assert tokenizer.unknown(text) == []
    # <eos> prints nothing, half a character one mark.
    assert tokenizer.decode([104, 256, 105, 0xFF]) == "hi\ufffd"


def test_byte_keeps_what_is_not_utf8():
    """The command line's bytes that are not UTF-8 arrive as surrogates; the ids are those bytes."""
    raw = bytes(range(256)) + random.Random(4).randbytes(1000)
    text = raw.decode("utf-8", "surrogateescape")
    assert bytes(ByteTokenizer().encode(text).tolist()) == raw


SAMPLES = [
    TEXT,
    "",
    " ",
    "\n",
    "a  b   \t c\r\n\r\n",
    "it's we'll DON'T 12,345.67",
    "漢字かな\u3000交じり文",
    "😀👩‍👩‍👧‍👦 e\u0301",
    "\x00\x1c\x85\ufeff",
]


@pytest.fixture(scope="module")
def bpe():
    words = "the quick brown fox — jümps over the lazy dogs 漢字\n"
    return PackageTokenizer.train([TEXT * 3, words * 20], 320)


def test_bpe_round_trip(bpe):
    generator = random.Random(7)
    assert 257 < bpe.vocab_size <= 320
    assert bpe.unk is None
    assert bpe.num_special == 1
    texts = [random_text(generator, length) for length in (1, 2, 10, 100, 1000)]
    for text in [*SAMPLES, *texts]:
        tokens = bpe.encode(text)
        assert tokens.dtype == np.uint16
        assert bpe.decode(tokens) == text
        assert bpe.unknown(text) == []
    tokens = bpe.encode("a<|endoftext|>b")
    assert tokens.tolist().count(bpe.eos) == 1
    assert bpe.decode(tokens) == "a<|endoftext|>b"
    assert len(bpe.encode("the quick brown fox")) < 10, "merges are learned"
    assert bpe.decode(bpe.encode("a\udcffb")) == "a\ufffdb"  # what UTF-8 cannot hold


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe"])
def test_a_batch_has_the_ids_of_its_texts(kind, bpe):
    tokenizer = bpe if kind == "bpe" else datasets.TOKENIZERS[kind].train([TEXT])
    batch = list(tokenizer.encode_batch(SAMPLES))
    assert len(batch) == len(SAMPLES)
    for ids, text in zip(batch, SAMPLES):
        expected = tokenizer.encode(text)
        assert np.array_equal(ids, expected)
        assert ids.dtype == expected.dtype


def test_bpe_has_all_bytes_and_at_most_the_size_asked_for():
    tiny = PackageTokenizer.train(["ab ab"], 32000)
    assert 257 <= tiny.vocab_size < 270
    assert tiny.decode(tiny.encode("😀 ab")) == "😀 ab"
    assert PackageTokenizer.train(["ab ab"], 257).vocab_size == 257


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe", "gpt2"])
def test_tokenizers_survive_json(kind, bpe):
    text = TEXT + random_text(random.Random(5), 300)
    if kind == "gpt2":
        tokenizer = PackageTokenizer(bpe.vocabulary, kind)
    else:
        tokenizer = datasets.TOKENIZERS[kind].train([text], 300)
    assert tokenizer.kind == kind
    assert type(tokenizer) is datasets.TOKENIZERS[kind]
    loaded = datasets.tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert type(loaded) is type(tokenizer)
    assert loaded.to_dict() == tokenizer.to_dict()
    for name in ("kind", "vocab_size", "num_special", "eos", "unk"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    sample = text + "out of vocabulary ☃"
    assert np.array_equal(loaded.encode(sample), tokenizer.encode(sample))
    assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def package_tokenizer(model, **parts):
    """A tokenizer of the package with this model, and these parts of a tokenizer.json."""
    return PackageTokenizer(json.dumps({"model": model, **parts}), "file")


def test_a_tokenizer_that_cannot_cope_with_a_text():
    """As a file may be: its unknown token is none of its tokens, or its decoder panics."""
    without_unk = package_tokenizer({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"})
    assert without_unk.encode("a").tolist() == [0]
    for encode in (without_unk.encode, lambda text: without_unk.encode_batch([text])):
        with pytest.raises(UsageError, match="^this tokenizer cannot encode the text: train with"):
            encode("b")
    strip = {"type": "Strip", "content": "a", "start": 1, "stop": 1}
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    with pytest.raises(UsageError, match="^this tokenizer cannot decode its ids: train with"):
        package_tokenizer(model, decoder=strip).decode([0])


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def in_sequence(name, *parts):
    return {"type": "Sequence", name: list(parts)}


DOUBLE = replace({"String": "a"}, "aa")
LONG_TABLE = {
    "type": "Precompiled",
    "precompiled_charsmap": base64.b64encode(bytes(4) + b"a\0" + b"b" * 99 + b"\0").decode(),
}
GROWING = [
    {"normalizer": in_sequence("normalizers", *[DOUBLE] * 30)},
    {"normalizer": in_sequence("normalizers", *[in_sequence("normalizers", DOUBLE, DOUBLE)] * 4)},
    {"normalizer": replace({"String": "a"}, "b" * 10**6)},
    {"normalizer": replace({"Regex": "."}, "bc" * 50)},
    {"normalizer": {"type": "Prepend", "prepend": "b" * 99}},
    {"normalizer": LONG_TABLE},
    {"pre_tokenizer": in_sequence("pretokenizers", *[{"type": "ByteLevel"}] * 9)},
    {"decoder": in_sequence("decoders", *[DOUBLE] * 30)},
]


@pytest.mark.parametrize("part", GROWING, ids=range(len(GROWING)))
def test_a_tokenizer_that_would_fill_the_memory(part):
    """Thirty of its steps would make a billion characters of one."""
    with pytest.raises(ValueError, match="more than 64 times as long"):
        datasets.check_growth(part)


def test_a_tokenizer_that_would_fill_the_memory_is_refused():
    vocabulary = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    with pytest.raises(ValueError, match="more than 64 times as long"):
        package_tokenizer(vocabulary, **GROWING[0])


def test_what_tokenizers_in_use_do_to_a_text():
    """T5's parts, Llama's and GPT-2's."""
    table = "\ufdfa".encode() + b"\0" + unicodedata.normalize("NFKC", "\ufdfa").encode() + b"\0"
    table = base64.b64encode(bytes(4) + table).decode()
    t5 = [
        {"type": "Precompiled", "precompiled_charsmap": table},
        replace({"Regex": " {2,}"}, "▁"),
    ]
    metaspace = {"type": "Metaspace", "replacement": "▁"}
    llama = [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")]
    datasets.check_growth(
        {"normalizer": in_sequence("normalizers", *t5), "pre_tokenizer": metaspace}
    )
    datasets.check_growth({"normalizer": in_sequence("normalizers", *llama), "decoder": metaspace})
    datasets.check_growth({"normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}})


def test_the_end_token_that_a_tokenizer_is_told():
    package = datasets.tokenizers_package()
    vocabulary = {"<|endoftext|>": 0, "</s>": 1, "<end>": 2, "<eos>": 3}
    text = package.Tokenizer(package.models.WordLevel(vocabulary)).to_str()
    plain = {"kind": "bpe", "vocabulary": text}
    cases = [(None, 0), ("<end>", 2), ("<|endoftext|>", 0), ("missing", 0), ("", 0)]
    for told, eos in cases:
        tokenizer = PackageTokenizer(text, eos=told)
        assert tokenizer.eos == eos
        assert tokenizer.num_special == 1
        data = json.loads(json.dumps(tokenizer.to_dict()))
        # The default is not noted: a run knows its text by a hash of the tokenizer, too.
        expected = plain | {"eos": "<end>"} if told == "<end>" else plain
        assert data == expected
        assert datasets.tokenizer_from_dict(data).eos == eos


def test_an_imported_tokenizer_has_the_end_token_of_its_model(tmp_path):
    """Even where a text holds the word that is the end token of others."""
    import main

    from extras.huggingface import export_model, import_model

    def import_tokenizer(folder):
        _, tokenizer, *_ = import_model(folder)
        return tokenizer

    tokenizer = WordTokenizer.train(["a b <|endoftext|> </s>\n" * 9])
    shape = dict(num_blocks=1, dim=16, num_heads=2, num_kv_heads=2, mlp="swiglu", mlp_dim=64)
    model = main.LanguageModel(main.Config(tokenizer.vocab_size, 8, **shape))
    export_model(model, tokenizer, tmp_path / "hf", bits=None)
    imported = import_tokenizer(tmp_path / "hf")
    export_model(model, imported, tmp_path / "again", bits=None)
    for each in (imported, import_tokenizer(tmp_path / "again")):
        assert each.eos == tokenizer.eos
        assert datasets.tokenizer_from_dict(each.to_dict()).eos == tokenizer.eos
    settings = tmp_path / "hf" / "tokenizer_config.json"
    # As older versions of transformers write it.
    settings.write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert import_tokenizer(tmp_path / "hf").eos == tokenizer.ids["</s>"]
    settings.unlink()
    assert import_tokenizer(tmp_path / "hf").eos == tokenizer.ids["<|endoftext|>"]


def test_ids_do_not_depend_on_the_hash_seed():
    program = """
import json
from datasets import CharTokenizer, PackageTokenizer, WordTokenizer
words = [f"w{i * 7919 % 1000}{chr(0x4E00 + i * 7919 % 1000)} " for i in range(1000)]
text = "".join(words) + "\\n"
bpe = PackageTokenizer.train([text[:3000], text[3000:]], 700)
for tokenizer in (WordTokenizer.train([text]), CharTokenizer.train([text]), bpe):
    print(json.dumps([tokenizer.to_dict(), tokenizer.encode(text).tolist()]))
"""
    # All 1,000 words are equally frequent, so an order that a set or dict lent would show.
    outs = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        outs.append(subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE).stdout)
    assert outs[0] == outs[1]
    _, ids = json.loads(outs[0].splitlines()[0])
    assert len(ids) == 1001


class Text(str):
    """A string that says when it is gone."""

    alive = 0

    def __init__(self, *_):
        Text.alive += 1

    def __del__(self):
        Text.alive -= 1


@pytest.mark.parametrize("kind", ["char", "word"])
def test_training_does_not_hold_the_texts(kind):
    most = []

    def texts():
        for i in range(50):
            yield Text(f"text {i}\n")
            most.append(Text.alive)

    datasets.TOKENIZERS[kind].train(texts())
    assert max(most) <= 3


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match="pip install tokenizers"):
        PackageTokenizer.train(["a"])


def test_mlx_is_not_imported():
    code = "import sys, datasets\nfor name in ('mlx', 'tokenizers'): print(name in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout == b"False\nFalse\n"


# ---- Extras -------------------------------------------------------------------------------------


def test_an_extra_that_is_missing():
    with pytest.raises(UsageError, match="^extras/nothing.py is missing: copy .*$"):
        datasets.extra("nothing")


@pytest.mark.parametrize("others", ["nothing", "a module", "a package", "a namespace"])
def test_the_folder_of_extras_is_missing(tmp_path, others):
    """Also where a package of that name from elsewhere is installed."""
    (tmp_path / "alone").mkdir()
    shutil.copy(ROOT / "datasets.py", tmp_path / "alone")
    folder = tmp_path / "elsewhere" / "extras"
    if others == "a module":
        folder.parent.mkdir()
        folder.with_suffix(".py").write_text("")
    elif others != "nothing":
        folder.mkdir(parents=True)
        if others == "a package":
            (folder / "__init__.py").write_text("")
    command = [sys.executable, "-c", "import datasets; datasets.extra('collect')"]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "elsewhere")}
    options = {"cwd": tmp_path / "alone", "capture_output": True, "text": True}
    process = subprocess.run(command, env=env, **options)
    last = process.stderr.splitlines()[-1]
    assert "UsageError: extras/collect.py is missing: copy" in last


@pytest.mark.parametrize("missing", ["nowhere", "extras_of_others"])
def test_a_package_that_an_extra_lacks(tmp_path, missing, monkeypatch):
    (tmp_path / "extras").mkdir()
    (tmp_path / "extras" / "__init__.py").write_text("")
    (tmp_path / "extras" / "needy.py").write_text(f"import {missing}\n")
    for name in list(sys.modules):
        if name.partition(".")[0] == "extras":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=missing):
        datasets.extra("needy")
    for name in ("extras", "extras.needy"):
        monkeypatch.delitem(sys.modules, name, raising=False)


# ---- Shared with main.py ------------------------------------------------------------------------


def fail(error):
    raise error


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UsageError("no such\n  flag"), 2, "no such flag"),
        (ImportError("No module named 'x'"), 2, "No module named 'x': pip install -r requi"),
        (RunError("damaged"), 1, "damaged"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (MemoryError(), 1, "out of memory: give a smaller --batch_size or --context_size"),
        (MemoryError("4 GB"), 1, "4 GB: give a smaller --batch_size"),
    ],
)
def test_errors_of_a_command(capsys, error, status, line):
    assert datasets.run_command("x.py", fail, error) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"x.py: {line}")
    assert err.count("\n") == 1


def test_statuses_of_a_command(capsys):
    assert datasets.run_command("x.py", lambda: None) == 0
    assert datasets.run_command("x.py", int, "130") == 130
    assert datasets.run_command("x.py", fail, BrokenPipeError()) == 1
    assert capsys.readouterr() == ("", "")
    for error in (KeyboardInterrupt, ZeroDivisionError):  # a bug shows its traceback
        with pytest.raises(error):
            datasets.run_command("x.py", fail, error())


def test_an_error_of_the_command_line():
    with pytest.raises(
        UsageError, match=r"^unrecognized arguments: --x \(--help lists all flags\)$"
    ):
        datasets.Parser().parse_args(["--x"])


@pytest.mark.parametrize("export", ["folder", "gguf"])
def test_an_export_leaves_the_users_files_alone(tmp_path, export):
    """Of whatever name: earlier versions deleted those that ended in .new."""
    import main

    shape = dict(num_blocks=1, dim=32, num_heads=2, num_kv_heads=2, mlp="swiglu", mlp_dim=64)
    model = main.LanguageModel(main.Config(257, 8, **shape))
    names = ["model.gguf.new", "config.json.new", "model.safetensors.new", "tokenizer.json.new"]
    for name in names:
        (tmp_path / name).write_text("precious")
    if export == "folder":
        datasets.extra("huggingface").export_model(model, ByteTokenizer(), tmp_path, bits=None)
    else:
        pytest.importorskip("gguf")
        path = tmp_path / "model.gguf"
        datasets.extra("gguf").export_gguf(model, ByteTokenizer(), path, bits=None)
        assert path.read_bytes().startswith(b"GGUF")
    for name in names:
        assert (tmp_path / name).read_text() == "precious"
    assert not list(tmp_path.glob(".*")), "nothing is left"


# ---- Where files lie ----------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without a RAM disk; returns CACHE."""
    monkeypatch.setattr(datasets, "RAM_DISK", tmp_path / "nowhere")
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_ram_disk_of_the_user(home, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "RAM_DISK", tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    assert datasets.open_data_dir() == home, "it is no disk"
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    assert datasets.open_data_dir() == tmp_path / "disk" / "transformer-lm"


def test_folders_that_are_named(home, tmp_path, monkeypatch):
    data_dir = tmp_path / "deep" / "data"
    save_dir = tmp_path / "runs"
    assert datasets.open_data_dir(data_dir, save_dir) == data_dir
    assert not save_dir.exists()
    assert datasets.open_data_dir(None, str(save_dir)) == save_dir
    assert save_dir.is_dir()
    (tmp_path / "file").write_text("")
    for flag, folders in (("--data_dir", ["file"]), ("--save_dir", [None, "file"])):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match=f"^cannot write to {flag} file: name a folder"):
            datasets.open_data_dir(*folders)


@pytest.mark.parametrize("lacking", ["home", "folder"])
def test_without_a_home_the_text_lies_beside_the_runs(home, tmp_path, monkeypatch, lacking):
    monkeypatch.chdir(tmp_path)
    if lacking == "home":
        monkeypatch.setattr(datasets, "CACHE", None)
    else:
        home.write_text("a file")
    assert datasets.open_data_dir() == Path("runs")


def test_a_dataset_in_the_default_folder(home, text):
    dataset = datasets.load_dataset("text", text=[text])
    assert len(dataset.train.tokens) > 0
    assert dataset.folder.parent == home / "text"


# ---- Streams of documents -----------------------------------------------------------------------


def write(folder, documents, encoding="utf-8"):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:03}.txt" for i in range(len(documents))]
    for path, text in zip(paths, documents):
        path.write_bytes(text.encode(encoding))
    return paths


def encoded(folder, documents, tokenizer):
    """The tokens of these documents, written as a corpus's are, and what is counted."""
    path = folder / "x.tokens"
    spans = [whole(document) for document in write(folder, documents)]
    known = write_tokens(spans, tokenizer, path)
    tokens = np.fromfile(path, datasets.token_dtype(tokenizer.vocab_size))
    assert known["num_tokens"] == len(tokens)
    num_unk = 0
    if tokenizer.unk is not None:
        num_unk = np.sum(tokens == tokenizer.unk)
    assert known["num_unk"] == num_unk
    return tokens.tolist(), known


def test_byte_documents_are_separated(tmp_path):
    tokens, known = encoded(tmp_path, ["hé\n", "", "a b"], ByteTokenizer())
    assert tokens == [104, 0xC3, 0xA9, 10, 256, 97, 32, 98]  # no document, no separator
    # words hé, a, b and one line end
    assert known["num_bytes"] == 7
    assert known["num_words"] == 4


def test_bpe_documents_are_separated(tmp_path, bpe):
    tokens, known = encoded(tmp_path, ["the fox\n", "jümps"], bpe)
    assert tokens == [*bpe.encode("the fox\n"), bpe.eos, *bpe.encode("jümps")]
    assert known["num_bytes"] == 14
    assert known["num_words"] == 4


def test_word_documents_end_their_line(tmp_path):
    tokenizer = WordTokenizer.train(["a a b"])
    assert tokenizer.vocabulary == ["a", "b", "<eos>", "<unk>"]
    tokens, known = encoded(tmp_path, ["a b", "b\n", "\na é"], tokenizer)
    assert tokens == [0, 1, 2, 1, 2, 2, 0, 3, 2]
    # 5 words, 2 line ends
    assert known["num_bytes"] == 10
    assert known["num_words"] == 7
    assert known["num_unk"] == 1


def test_char_documents_follow_each_other(tmp_path):
    tokens, known = encoded(tmp_path, ["ab", "ba"], CharTokenizer("ab"))
    assert tokens == [0, 1, 1, 0]
    assert known["num_bytes"] == 4
    assert known["num_words"] == 2


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), CharTokenizer("ab"), WordTokenizer.train(["a"])]
)
@pytest.mark.parametrize("documents", [[], [""], ["", ""]])
def test_no_documents(tmp_path, tokenizer, documents):
    tokens, known = encoded(tmp_path, documents, tokenizer)
    assert tokens == []
    assert known["num_bytes"] == 0
    assert known["num_words"] == 0


def test_separated_documents_in_one_file(tmp_path):
    (path,) = write(tmp_path, ["--one\n\ntwo\n--\n \n--\nthrée--"])
    for size in (1, 2, 3, 7, 1 << 16):
        documents = list(read_documents([whole(path, marker="--")], size))
        assert documents == [("one\n\ntwo", True), ("thrée", True)]


PIECES = ["a", "bc", "it's", "12", "!?", "漢字", "かな", "😀", "é", "<|endoftext|>", "<unk>"]
# Awkward white space.
PIECES += [" ", "  ", "\t", "\tq\t\tr", "\n", "\n\n", "\n\n  x", " \n y", "\r\n", "\n \t\n"]
PIECES += ["\n\xa0x", "\n\x1cx", "\x0b", "\x1c", "\x1f\n", "\x85", "\xa0", "\u2028", "\u3000"]


@pytest.fixture(scope="module")
def awkward():
    """Texts of awkward white space, every other one with a line end."""
    generator = random.Random(8)
    texts = []
    for i in range(60):
        text = "".join(generator.choices(PIECES, k=generator.randint(0, 60)))
        texts.append(text + "\n" * (i % 2))
    return texts


def tokenizer_of(kind, texts):
    return datasets.TOKENIZERS[kind].train(texts, 400)


def streamed(path, tokenizer, size):
    """The text and the ids of a file that is read in blocks of `size` bytes."""
    text = ""
    ids = []
    for block, _ in read_documents([whole(path)], size):
        text += block
        ids += tokenizer.encode(block).tolist()
    return text, ids


def assert_streamed(path, text, tokenizer, sizes):
    """Whatever the size of the blocks, the text and its ids are those of the whole."""
    ids = tokenizer.encode(text).tolist()
    for size in sizes:
        assert streamed(path, tokenizer, size) == (text, ids), size


@pytest.mark.parametrize("kind", ["word", "char", "byte", "bpe"])
def test_blocks_have_the_ids_of_the_whole(tmp_path, kind, awkward):
    tokenizer = tokenizer_of(kind, awkward)
    for path, text in zip(write(tmp_path, awkward), awkward):
        assert_streamed(path, text, tokenizer, (16, 17, 40, 1000))


@pytest.mark.parametrize(
    "text", ["a\n\n<|endoftext|>b", "a\n\t<|endoftext|>", "<|endoftext|>\n\n\nb\n c"]
)
def test_blocks_around_the_end_token(tmp_path, bpe, text):
    [path] = write(tmp_path, [text])
    assert_streamed(path, text, bpe, (1, 2, 3))


@pytest.mark.parametrize("kind", ["word", "char", "byte", "bpe"])
@pytest.mark.parametrize(
    "text",
    [
        "one two 3 漢字 " * 200,
        "a  the é\tq " * 200,
        "a\n\n\n b\n \n" * 100,
        "\n  x y" * 200,
        "a <|endoftext|>" * 200,
    ],
    ids=range(5),
)
def test_long_stretches_without_a_place_to_cut(tmp_path, kind, text):
    """Blanks are such a place when nothing else is."""
    [path] = write(tmp_path, [text])
    # It looks for one in 16 times as much.
    assert_streamed(path, text, tokenizer_of(kind, [text]), (4, 7, 64))


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize(
    "text",
    ["漢字" * 900, "\t".join(["x" * 9] * 200), "é" * 1000, "\n" * 500 + "x"],
    ids=range(4),
)
def test_text_without_line_ends_or_blanks(tmp_path, kind, text):
    [path] = write(tmp_path, [text])
    assert_streamed(path, text, tokenizer_of(kind, [text]), [5])


@pytest.mark.parametrize("kind", ["word", "char", "byte", "bpe"])
def test_windows_line_ends_are_cut_as_others(tmp_path, kind):
    """In blocks that are no larger, and to the ids of the whole."""
    lines = ["a word\r\n", "<|endoftext|>\r\n", "\r\n", " then\r\n", "x\r", "<\r\n", "y\n"]
    text = "".join(random.Random(1).choices(lines, k=400))
    [path] = write(tmp_path, [text])
    assert_streamed(path, text, tokenizer_of(kind, [text]), [5, 16, 100])
    plain = "a word of two\r\n" * 1000
    [path] = write(tmp_path, [plain])
    longest = max(len(block) for block, _ in read_documents([whole(path)], 256))
    assert longest < 600


def test_blocks_are_small(tmp_path):
    """Memory does not grow with the text."""
    texts = ["line of words\n" * 5000, "words " * 10000, "x" * 60000, "\n" * 60000, " " * 60000]
    for text in texts:
        [path] = write(tmp_path, [text])
        for block, _ in read_documents([whole(path)], 256):
            assert len(block) <= 17 * 256 + 2000


@pytest.mark.parametrize("kind", ["word", "char", "byte", "bpe"])
def test_counts_of_words_and_bytes(tmp_path, kind, awkward, monkeypatch):
    """Whatever the blocks. Words are those of ASCII's white space where the text has no other."""
    texts = [re.sub(r"[\x1c-\x1f\x85\xa0\u2028\u3000]", "", text) for text in awkward]
    num_words = sum(len(text.split()) + text.count("\n") for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    for size in (16, 100, 1 << 17):
        monkeypatch.setattr(datasets, "read_documents", partial(read_documents, size=size))
        _, known = encoded(tmp_path, texts, tokenizer_of(kind, texts))
        assert known["num_words"] == num_words
        assert known["num_bytes"] == num_bytes


def test_words_of_all_white_space_are_counted(tmp_path):
    text = "one\xa0two\u2028three\u3000four\x1cfive\x85six\n"
    tokens, known = encoded(tmp_path, [text], WordTokenizer.train([text]))
    assert len(tokens) == known["num_words"] == len(text.split()) + 1


# ---- Own text -----------------------------------------------------------------------------------


def own_text(paths, fraction=0.1, valid=(), test=(), say=pytest.fail):
    """The texts of each split."""
    given = {"train": paths}
    if valid:
        given["valid"] = valid
    if test:
        given["test"] = test
    texts = {}
    for split, spans in datasets.own_text(given, fraction, say, []).items():
        texts[split] = []
        for span in spans:
            content = span.path.read_bytes()
            texts[split].append(content[span.start : span.stop].decode())
    return texts


@pytest.mark.parametrize(
    "count, fraction, valid",
    [
        (10, 0.1, [9]),
        (25, 0.1, [9, 19]),
        (5, 0.25, [3]),
        (4, 0.5, [1, 3]),
        (10, 0.4, [2, 4, 7, 9]),
    ],
)
def test_many_files_are_split_whole(tmp_path, count, fraction, valid):
    # Of unequal lengths: a cut by position would differ.
    documents = [f"document {i}\n" * (i + 1) + "end" for i in range(count)]
    splits = own_text(write(tmp_path, documents), fraction)
    train = [i for i in range(count) if i not in valid]
    assert splits["valid"] == [documents[i] for i in valid]
    assert splits["train"] == [documents[i] for i in train]


LINES = "012345678\n" * 100  # 1,000 characters


@pytest.mark.parametrize(
    "text, fraction, cut",
    [
        (LINES, 0.1, 900),  # a line ends right there
        (LINES, 0.155, 850),  # 845 is within a line
        (LINES, 0.149, 860),  # 851 is one past a line end
        ("x" * 5000, 0.1, 4500),  # no line end at all
        ("x" * 4500 + "y" * 2000 + "\n" + "z" * 100, 0.5, 3300),  # none near
        (LINES.replace("0", "é"), 0.1, 900),  # counted in bytes, of which each line has 11
        (LINES.replace("8\n", "\r\n"), 0.155, 850),
    ],
)
def test_one_file_is_cut_behind_a_line(tmp_path, text, fraction, cut):
    splits = own_text(write(tmp_path, [text]), fraction)
    assert splits == {"train": [text[:cut]], "valid": [text[cut:]]}


def test_few_files_are_cut_by_position(tmp_path):
    first = LINES[:20]
    second = LINES[:70].replace("0", "A")
    third = LINES[:10]
    splits = own_text(write(tmp_path, [first, second, third]), 0.25)  # 75 of 100 characters
    assert splits == {"train": [first, second[:60]], "valid": [second[60:], third]}


def test_own_text_loses_nothing(tmp_path):
    generator = random.Random(6)
    pieces = ["é", "word ", "\n", "\r\n", "x" * 30]
    for _ in range(100):
        documents = []
        for _ in range(generator.randint(1, 7)):
            length = generator.randint(0, 300)
            documents.append("".join(generator.choices(pieces, k=length)))
        if not any(documents):
            continue
        splits = own_text(write(tmp_path, documents), 0.125)  # 8 files would be split whole
        assert "".join(splits["train"] + splits["valid"]) == "".join(documents)
        # An empty document would add a separator.
        assert all(splits["train"])
        assert all(splits["valid"])


@pytest.mark.parametrize("text", ["x" * 4000 + "\n", ("word " * 150 + "\n") * 6])
def test_validation_gets_text_where_the_last_line_is_long(tmp_path, text):
    splits = own_text(write(tmp_path, [text]), 0.1)
    assert "".join(splits["train"] + splits["valid"]) == text
    assert splits["train"]
    assert splits["valid"]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
@pytest.mark.parametrize(
    "text",
    [
        "😀" * 1000,
        "a" + "😀" * 1000,
        "aa" + "😀" * 1000,
        "aaa" + "😀" * 1000,
        "😀",
        "é😀",
        "héllo",
    ],
    ids=range(7),
)
def test_no_character_is_cut(tmp_path, text, fraction):
    splits = own_text(write(tmp_path, [text]), fraction)  # which decodes both sides
    assert "".join(splits["train"] + splits["valid"]) == text
    if len(text) > 10:
        assert abs(len(splits["valid"][0]) - fraction * len(text)) < 3


@pytest.mark.parametrize("length", range(1, 40))
def test_short_texts(tmp_path, length):
    text = ("ab\ncdefghij" * 4)[:length]
    for fraction in (0.1, 0.5):
        splits = own_text(write(tmp_path, [text]), fraction)
        assert "".join(splits["train"] + splits["valid"]) == text


def test_given_valid_and_test_text(tmp_path):
    train = "train\n" * 100
    paths = write(tmp_path, [train, "more\n", "valid\n", "test\n", "test 2\n"])
    splits = own_text(paths[:2], valid=paths[2:3], test=paths[3:])
    assert splits["train"] == [train, "more\n"]
    assert splits["valid"] == ["valid\n"]
    assert splits["test"] == ["test\n", "test 2\n"]
    splits = own_text(paths[:2], test=paths[3:4])
    assert splits["test"] == ["test\n"]
    assert "".join(splits["train"] + splits["valid"]) == train + "more\n"

    given = {"text": paths[:2], "valid_text": paths[2:3], "test_text": paths[3:]}
    dataset = datasets.load_dataset("text", tmp_path / "lm", **given)
    assert bytes(dataset.test.tokens[:5].tolist()) == b"test\n"
    assert dataset.test.tokens.tolist().count(256) == 1
    assert bytes(dataset.valid.tokens.tolist()) == b"valid\n"
    for missing in ("text", "valid_text", "test_text"):
        given = {"text": paths[:1], missing: [tmp_path / "missing.txt"]}
        with pytest.raises(UsageError, match="missing.txt"):
            datasets.load_dataset("text", tmp_path / "lm", **given)


def test_what_is_held_out_is_not_trained_on(tmp_path):
    """Even where --text names its folder, or it by itself."""
    a, b, c = write(tmp_path / "text", ["a\n", "b\n", "c\n"])
    (tmp_path / "link").symlink_to(tmp_path / "text")
    said = []
    for paths in ([tmp_path / "text"], [a, b, c], [tmp_path / "link"]):
        splits = own_text(paths, valid=[b], test=[tmp_path / "link" / c.name], say=said.append)
        assert splits == {"train": ["a\n"], "valid": ["b\n"], "test": ["c\n"]}
    splits = own_text([tmp_path / "text"], test=[c], say=said.append)
    assert "".join(splits["train"] + splits["valid"]) == "a\nb\n"
    assert len(said) == 4
    assert said[0].startswith("Not training on 2 files of --text")
    # Whoever names the same files for both wants that.
    assert own_text([a], valid=[a]) == {"train": ["a\n"], "valid": ["a\n"]}


FILES = {
    "a.txt": b"a",
    "b.md": b"b",
    "sub/c.py": b"c",
    "sub/deep/d": "é".encode(),
    "lm/ids": b"own",
    "runs/x-123456/log.csv": b"own",
    ".hidden": b"no",
    ".git/config": b"no",
    "sub/.x/y.txt": b"no",
    "image.png": b"\x89PNG\r\n\0",
    "latin.txt": b"na\xefve",
    "nul.bin": b"a\0b",
}


@pytest.fixture
def find(tmp_path):
    """A function: the relative paths of the texts that patterns match among FILES, and notices.

    Checkpoints lie in runs/, corpora in lm/.
    """
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def find(*patterns, own=("runs", "lm")):
        said = []
        paths = [str(tmp_path / pattern) for pattern in patterns]
        own_folders = [(tmp_path / name).resolve() for name in own]
        found = datasets.text_files(paths, said.append, own_folders)
        return [str(path.relative_to(tmp_path)) for path in found], said

    return find


TEXTS = ["a.txt", "b.md", "sub/c.py", "sub/deep/d"]


def test_folders_and_patterns(find, tmp_path):
    found, said = find("")
    assert found == TEXTS, "in order, and nothing of the program's own"
    assert said == [f"{tmp_path}: skipping 3 of 7 files that are not UTF-8 text"]
    assert find("sub") == (["sub/c.py", "sub/deep/d"], [])
    assert find("sub/.x") == (["sub/.x/y.txt"], []), "named by the user"
    assert find("*.txt") == (["a.txt", "latin.txt"], [])
    assert find("**/*.py") == (["sub/c.py"], [])
    found, _ = find("b.md", "a.txt", "*.md", "", "sub")
    assert found == ["b.md", "a.txt", "sub/c.py", "sub/deep/d"], "each once"
    for nothing in ("*.html", "missing"):
        with pytest.raises(UsageError, match="no such file"):
            find(nothing)


def test_checkpoints_and_corpora_are_no_text(find, tmp_path):
    """Unless they are named outright, file by file."""
    assert find("**/*.csv") == ([], [])
    assert find("*/ids") == ([], [])
    assert find("r*", "a.txt") == (["a.txt"], [])
    assert find("runs/x-123456/log.csv", "lm/ids") == (["runs/x-123456/log.csv", "lm/ids"], [])
    (tmp_path / "link").symlink_to("runs")
    for folder in ("runs", "runs/x-123456", "lm", "link", "sub/../lm"):
        with pytest.raises(UsageError, match="lies where checkpoints and corpora are kept: name"):
            find(folder)
    # Of --save_dir . the files can be named, but not the folders.
    assert find("a.txt", own=["."]) == (["a.txt"], [])
    with pytest.raises(UsageError, match="lies where checkpoints"):
        find("sub", own=["."])
    assert find("sub", own=["su"]) == (["sub/c.py", "sub/deep/d"], [])


def test_a_name_that_looks_like_a_pattern(tmp_path):
    path = tmp_path / "a[1].txt"
    path.write_text("text")
    assert datasets.text_files([str(path)], pytest.fail, []) == [path]


def test_text_and_save_dir_in_one_folder(tmp_path):
    """--text . beside ./runs, and --save_dir . for a text there."""
    [text] = write(tmp_path, [ROWS])
    plain = datasets.load_dataset("text", tmp_path.parent / f"{tmp_path.name}-lm", text=[text])
    runs = tmp_path / "runs"
    (runs / "x-123456").mkdir(parents=True)
    (runs / "x-123456" / "log.csv").write_text("iteration\n")
    options = {"data_dir": tmp_path / "lm", "save_dir": runs}
    beside = datasets.load_dataset("text", text=[tmp_path], **options)
    assert beside.sha256 == plain.sha256
    again = datasets.load_dataset("text", text=[tmp_path], **options)
    assert again.sha256 == plain.sha256, "its tokens are no text, either"
    within = datasets.load_dataset("text", text=[text], save_dir=tmp_path)
    assert within.sha256 == plain.sha256
    assert within.folder.parent == tmp_path / "text"
    with pytest.raises(UsageError, match="lies where checkpoints and corpora are kept"):
        datasets.load_dataset("text", text=[tmp_path], save_dir=tmp_path)


def test_what_is_no_regular_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path must be short
        server.bind("socket")
    assert datasets.text_files([str(tmp_path)], pytest.fail, []) == [tmp_path / "a.txt"]
    for path in (tmp_path / "pipe", tmp_path / "socket", "/dev/null"):
        with pytest.raises(UsageError, match="is a pipe, a device or a socket: write its text"):
            datasets.load_dataset("text", tmp_path / "lm", text=[path])


def test_text_from_a_pipe(tmp_path):
    read, write = os.pipe()
    os.write(write, b"text\n")
    os.close(write)
    line = ["--text", f"/dev/fd/{read}", "--data_dir", tmp_path]
    _, err = prepare(*line, pass_fds=[read], status=2)
    os.close(read)
    assert err.count("\n") == 1
    assert "write its text to a file" in err


def test_a_folder_without_text(tmp_path):
    with pytest.raises(UsageError, match="there is no text") as error:
        datasets.load_dataset("text", tmp_path / "lm", text=[tmp_path])
    assert str(tmp_path) in str(error.value)


BAD = {
    "latin": ("naïve\n".encode("latin-1"), 2),
    "beyond the first block": ("é".encode() * 400000 + b"\xff" + b"a" * 100000, 800000),
    "at the edge of a block": (
        b"a" * ((1 << 18) - 1) + b"\xe2\x28\xa1" + b"a" * 100000,
        (1 << 18) - 1,
    ),
    "cut off at the end": (b"a\n" * 100 + "é".encode()[:1], 200),
    "no text at all": (b"\x80" * 5000, 0),
    "in validation": (b"abcdefgh\n" * 1000 + b"\xfe" + b"\n", 9000),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", ["byte", "word", "bpe"])
def test_files_that_are_not_utf8(tmp_path, name, kind):
    content, offset = BAD[name]
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    options = {"text": [path], "tokenizer": kind, "vocab_size": 300}
    with pytest.raises(UsageError) as error:
        datasets.load_dataset("text", tmp_path / "lm", **options)
    message = str(error.value)
    assert str(path) in message
    assert f" byte {offset:,}:" in message
    assert "\n" not in message


def test_bytes_of_own_text_are_untouched(tmp_path):
    text = "\ufeffone\r\ntwo\rthree\x00\x0c\n" * 50
    dataset = datasets.load_dataset("text", tmp_path, text=write(tmp_path, [text]))
    tokens = np.concatenate([dataset.train.tokens, dataset.valid.tokens])
    assert bytes(tokens.tolist()) == text.encode()
    assert dataset.train.num_bytes + dataset.valid.num_bytes == len(text.encode())
    assert dataset.tokenizer.kind == "byte"
    assert dataset.test is None


@pytest.mark.parametrize("kind, words", [("char", "\nab"), ("word", ["<eos>", "ab", "<unk>"])])
def test_vocabulary_is_that_of_training(tmp_path, kind, words):
    paths = write(tmp_path, ["ab\n" * 90 + "zz\n" * 10])
    dataset = datasets.load_dataset("text", tmp_path / "lm", text=paths, tokenizer=kind)
    tokenizer = dataset.tokenizer
    assert tokenizer.vocabulary == words
    assert np.sum(dataset.train.tokens == tokenizer.unk) == 0
    assert dataset.train.num_unk == 0
    unknown = {"char": 20, "word": 10}[kind]
    assert np.sum(dataset.valid.tokens == tokenizer.unk) == unknown
    assert dataset.valid.num_unk == unknown


def test_bpe_is_trained_on_training_text_alone(tmp_path):
    paths = write(tmp_path, ["ab cd\n" * 50, "zzzz zzzz\n" * 50])
    options = {"valid_text": paths[1:], "tokenizer": "bpe", "vocab_size": 300}
    dataset = datasets.load_dataset("text", tmp_path, text=paths[:1], **options)
    vocabulary = json.loads(dataset.tokenizer.vocabulary)["model"]["vocab"]
    assert "ab" in vocabulary
    assert "zz" not in vocabulary


# ---- The cache ----------------------------------------------------------------------------------


ROWS = "".join(
    f"line {i}: the quick brown fox — jümps over {i * i} lazy dogs\n" for i in range(300)
)


@pytest.fixture
def paths(tmp_path):
    """Files for --text, --valid_text and --test_text."""
    return write(tmp_path / "text", [ROWS, ROWS[:1000], ROWS[1000:3000]])


def load(tmp_path, paths, kind="word", say=pytest.fail, **options):
    names = {"text": paths[:1], "valid_text": paths[1:2], "test_text": paths[2:]}
    return datasets.load_dataset(
        "text", tmp_path / "lm", **names, tokenizer=kind, say=say, **options
    )


def forbid(monkeypatch, *names):
    for name in names:
        monkeypatch.setattr(
            datasets, name, lambda *_, name=name, **__: pytest.fail(f"{name} is called")
        )


def tokens_of(dataset):
    return [getattr(dataset, split).tokens.tolist() for split in ("train", "valid", "test")]


def cache_of(tmp_path):
    (folder,) = (path for path in (tmp_path / "lm" / "text").iterdir() if path.is_dir())
    return folder


@pytest.mark.parametrize("kind", ["word", "char", "byte", "bpe"])
def test_second_load_reads_no_text(tmp_path, paths, kind, monkeypatch):
    first = load(tmp_path, paths, kind, vocab_size=300)
    opened = []
    is_on = [True]  # a hook stays for ever

    def hook(event, arguments):
        if is_on and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    forbid(monkeypatch, "read_documents", "sha256_of", "write_tokens")
    second = load(tmp_path, paths, kind, vocab_size=300)
    is_on.clear()
    assert any("tokens" in path for path in opened)
    assert not set(map(str, paths)) & set(opened)
    assert tokens_of(second) == tokens_of(first)
    assert second.sha256 == first.sha256
    assert second.tokenizer.to_dict() == first.tokenizer.to_dict()
    assert second.folder == first.folder == cache_of(tmp_path)
    for split in ("train", "valid", "test"):
        assert getattr(second, split).num_bytes == getattr(first, split).num_bytes


def test_second_load_of_a_text_cut_by_position(tmp_path, paths, monkeypatch):
    first = datasets.load_dataset("text", tmp_path, text=paths[:1])
    forbid(monkeypatch, "read_documents", "sha256_of", "write_tokens")
    assert datasets.load_dataset("text", tmp_path, text=paths[:1]).sha256 == first.sha256


def test_changed_times_keep_the_tokens(tmp_path, paths, monkeypatch):
    first = load(tmp_path, paths)
    os.utime(paths[0], (1, 1))
    with monkeypatch.context() as patch:
        forbid(patch, "write_tokens", "read_documents")
        assert tokens_of(load(tmp_path, paths)) == tokens_of(first)
    forbid(monkeypatch, "write_tokens", "sha256_of")
    load(tmp_path, paths)


@pytest.mark.parametrize("split", range(3))
@pytest.mark.parametrize("change", ["same size", "longer", "shorter"])
def test_changed_text_is_encoded_anew(tmp_path, paths, split, change):
    first = load(tmp_path, paths)
    before = tokens_of(first)
    text = paths[split].read_text()
    changes = {
        "same size": text.replace("quick", "aaaaa"),
        "longer": text + "one more line\n",
        "shorter": text[:-200],
    }
    paths[split].write_text(changes[change])
    second = load(tmp_path, paths)
    assert tokens_of(second) != before
    assert tokens_of(second) == tokens_of(load(tmp_path / "fresh", paths))
    for name, sha256 in first.sha256.items():
        is_changed = split == 0 or name == datasets.SPLITS[split]  # the first has the vocabulary
        assert (second.sha256[name] != sha256) == is_changed


def test_a_run_keeps_the_tokens_that_it_has(tmp_path, paths):
    """While another one encodes a changed text."""
    first = load(tmp_path, paths)
    before = tokens_of(first)
    # Of the same size: it would die if its file were shortened.
    paths[0].write_text(ROWS.replace("quick", "aaaaa"))
    assert tokens_of(load(tmp_path, paths)) != before
    assert tokens_of(first) == before


def overwrite(path, byte):
    path.write_bytes(bytes([byte]) * path.stat().st_size)


def change_about(folder, change):
    """Changes the dict in about.json and leaves its CRC-32 as it is."""
    path = folder / "about.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def flip_a_bit(path):
    with open(path, "r+b") as file:
        file.seek(3)
        [byte] = file.read(1)
        file.seek(3)
        file.write(bytes([byte ^ 1]))


def write_about(content):
    """A function that writes this to the about.json of a cache."""
    return lambda folder: (folder / "about.json").write_bytes(content)


def change_entry(entry, name, value):
    """A function that changes a dict in about.json, and not its CRC-32."""

    def change(about):
        about[entry][name] = value

    return lambda folder: change_about(folder, change)


DAMAGE = {
    "truncated": lambda folder: os.truncate(folder / "valid.tokens", 10),
    "no tokens": lambda folder: (folder / "train.tokens").unlink(),
    # The first word, and an id far beyond the last one.
    "train 0": lambda folder: overwrite(folder / "train.tokens", 0),
    "train 255": lambda folder: overwrite(folder / "train.tokens", 255),
    "valid 0": lambda folder: overwrite(folder / "valid.tokens", 0),
    "valid 255": lambda folder: overwrite(folder / "valid.tokens", 255),
    "test 0": lambda folder: overwrite(folder / "test.tokens", 0),
    "test 255": lambda folder: overwrite(folder / "test.tokens", 255),
    "a bit": lambda folder: flip_a_bit(folder / "test.tokens"),
    "an empty about": write_about(b""),
    "about null": write_about(b"null"),
    "about 7": write_about(b"7"),
    "about a string": write_about(b'"check"'),
    "about {}": write_about(b"{}"),
    "only a check": write_about(b'{"check": 0}'),
    "a wrong check": write_about(b'{"splits": {}, "check": 5}'),
    "a deep about": write_about(b"[" * 100_000),
    "binary": write_about(b"\xff\0"),
    "half an about": lambda folder: os.truncate(folder / "about.json", 100),
    "another vocabulary": change_entry("tokenizer", "vocabulary", ["<eos>", "<unk>"]),
    "another text": change_entry("text", 0, ""),
    "other counts": change_entry("splits", "valid", {"num_bytes": 5}),
    "other CRC-32s": change_entry("crc32", "train", 5),
}


def forge(folder, change):
    """Changes the dict in about.json, and then all checks to what is right."""
    path = folder / "about.json"
    about = json.loads(path.read_text())
    del about["check"]
    change(about)
    for split in about["crc32"]:
        if (folder / f"{split}.tokens").is_file():
            about["crc32"][split] = datasets.crc32_of(folder / f"{split}.tokens")
    path.write_text(json.dumps(about | {"check": datasets.check_of(about)}))


def forge_entry(entry, name, value):
    """A function that changes a dict in about.json, with the right checks."""

    def change(about):
        about[entry][name] = value

    return lambda folder: forge(folder, change)


def forge_tokens(folder):
    """Writes an id that the tokenizer does not have."""
    overwrite(folder / "train.tokens", 255)
    forge(folder, lambda about: None)


def add_token(folder):
    with open(folder / "valid.tokens", "ab") as file:
        file.write(b"\0")
    forge(folder, lambda about: None)


FORGED = {
    "tokens": forge_tokens,
    "half a token": add_token,
    "fewer ids": forge_entry("tokenizer", "vocabulary", ["<eos>", "<unk>"]),
    "no tokenizer": forge_entry("tokenizer", "kind", "x"),
    "no bytes": forge_entry("splits", "valid", dict.fromkeys(["num_tokens"], 5)),
    "a string": lambda folder: forge(folder, lambda about: about.update(splits="x")),
    "no split": lambda folder: forge(folder, lambda about: about["splits"].pop("train")),
    "a path": forge_entry("crc32", "../../../../x", 0),
    "no stamps": lambda folder: forge(folder, lambda about: about.update(stamps=[])),
    "no text": lambda folder: forge(folder, lambda about: about.update(text=[])),
    "no sha256": lambda folder: forge(folder, lambda about: about.update(sha256=5)),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_tokens_are_made_anew(tmp_path, paths, case):
    """A stranger's folder may hold them: MLX would read ids that do not exist from anywhere."""
    expected = tokens_of(load(tmp_path, paths))
    FORGED[case](cache_of(tmp_path))
    said = []
    assert tokens_of(load(tmp_path, paths, say=said.append)) == expected
    assert f"{cache_of(tmp_path)} is damaged" in said[0]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_folder_of_tokens_that_is_a_link(tmp_path, paths, depth):
    """Files of the same names may lie where it leads."""
    load(tmp_path, paths)
    folder = [cache_of(tmp_path).parent, cache_of(tmp_path)][depth]
    victim = tmp_path / "victim"
    folder.rename(victim)
    folder.symlink_to(victim)
    before = whole(victim)
    with pytest.raises(UsageError, match="is a link: delete it, or name another --data_dir"):
        load(tmp_path, paths)
    assert whole(victim) == before


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tokens_are_made_anew(tmp_path, paths, damage):
    first = load(tmp_path, paths)
    expected = tokens_of(first)
    DAMAGE[damage](cache_of(tmp_path))
    said = []
    second = load(tmp_path, paths, say=said.append)
    assert tokens_of(second) == expected
    assert second.sha256 == first.sha256
    assert second.tokenizer.to_dict() == first.tokenizer.to_dict()
    assert second.valid.num_bytes == first.valid.num_bytes
    [line] = said
    assert f"{cache_of(tmp_path)} is damaged" in line
    assert tokens_of(load(tmp_path, paths)) == expected


def test_damaged_tokens_whose_text_is_gone(tmp_path, paths):
    load(tmp_path, paths)
    overwrite(cache_of(tmp_path) / "train.tokens", 0)
    paths[0].unlink()
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path, paths, say=str)


PROGRAM = """
import os, signal, sys, threading
from pathlib import Path
import datasets
write = datasets.write_tokens
left = [{left}]
def watched(*arguments):
    left[0] -= 1
    print("encoding", flush=True)
    threading.Event().wait({pause})
    if left[0] < 0:
        arguments[2].write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
datasets.write_tokens = watched
text, valid_text, test_text = [[Path(path)] for path in sys.argv[2:]]
options = {{"valid_text": valid_text, "test_text": test_text}}
dataset = datasets.load_dataset("text", sys.argv[1], text, "word", **options)
print(dataset.sha256["train"], dataset.test.tokens.tolist())
"""


def encode_elsewhere(tmp_path, paths, left=9, pause=0):
    command = [
        sys.executable,
        "-c",
        PROGRAM.format(left=left, pause=pause),
        tmp_path / "lm",
        *paths,
    ]
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_processes_encode_once(tmp_path, paths):
    processes = [encode_elsewhere(tmp_path, paths, pause=0.1) for _ in range(2)]
    outs = [process.communicate(timeout=30)[0].splitlines() for process in processes]
    assert outs[0][-1] == outs[1][-1]
    assert sorted(map(len, outs)) == [1, 4], "lines: one of them encoded three splits"
    _, _, tokens = outs[0][-1].partition(" ")
    assert json.loads(tokens) == load(tmp_path, paths).test.tokens.tolist()


def test_tokens_are_mapped_under_the_lock(tmp_path, paths, monkeypatch):
    """Else another process that waits for it could encode a changed text in between."""
    map_dataset = datasets.map_dataset
    seen = []

    def watched(*arguments):
        with open(cache_of(tmp_path) / ".lock", "ab") as lock:
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(True)
        return map_dataset(*arguments)

    monkeypatch.setattr(datasets, "map_dataset", watched)
    load(tmp_path, paths)
    load(tmp_path, paths)
    assert len(seen) == 2


def test_text_that_changes_while_it_is_encoded(tmp_path, paths, monkeypatch):
    """The next start sees it."""
    write_tokens = datasets.write_tokens

    def late(*arguments):
        known = write_tokens(*arguments)
        paths[0].write_text(ROWS.replace("quick", "aaaaa"))
        return known

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "write_tokens", late)
        load(tmp_path, paths)
    assert tokens_of(load(tmp_path, paths)) == tokens_of(load(tmp_path / "fresh", paths))


def test_train_tokens(tmp_path, paths, monkeypatch):
    whole = load(tmp_path, paths)
    forbid(monkeypatch, "write_tokens")
    part = load(tmp_path, paths, train_tokens=100)
    assert part.train.tokens.tolist() == whole.train.tokens[:100].tolist()
    assert tokens_of(part)[1:] == tokens_of(whole)[1:]
    assert tokens_of(load(tmp_path, paths, train_tokens=10**9)) == tokens_of(whole)


@pytest.mark.parametrize("distinct, dtype", [(65535, np.uint16), (65536, np.uint32)])
def test_ids_on_disk_fit_the_vocabulary(tmp_path, distinct, dtype):
    text = "".join(map(chr, range(0x10000, 0x10000 + distinct)))
    dataset = load(tmp_path, write(tmp_path, [text, "a" + text[-9:], ""]), "char")
    assert dataset.tokenizer.vocab_size == distinct + 1
    assert dataset.train.tokens.dtype == dtype
    assert dataset.valid.tokens.tolist() == [distinct, *range(distinct - 9, distinct)]
    path = cache_of(tmp_path) / "train.tokens"
    assert path.stat().st_size == distinct * np.dtype(dtype).itemsize
    assert dataset.test is None, "an empty split is none"


def test_another_python_has_other_modules(tmp_path, monkeypatch):
    """The modules of the Python before are still there, but not the running one's."""
    for version in ("one", "two"):
        library = tmp_path / version
        library.mkdir()
        for i in range(12):
            (library / f"m{i:02}.py").write_text(f"# module {i} of {version}\n")
        monkeypatch.setattr(
            datasets.sysconfig, "get_path", lambda name, library=library: str(library)
        )
        dataset = datasets.load_dataset("python", tmp_path / "lm")
        assert f"of {version}" in dataset.tokenizer.decode(dataset.train.tokens[:30])


def test_tokenizers_have_their_own_cache(tmp_path, paths, monkeypatch):
    variants = [("word", 300), ("char", 300), ("byte", 300), ("bpe", 300), ("bpe", 310)]

    def load_all():
        return [tokens_of(load(tmp_path, paths, kind, vocab_size=size)) for kind, size in variants]

    first = load_all()
    forbid(monkeypatch, "write_tokens")
    load(tmp_path, paths, "word", vocab_size=77)  # which means nothing to it
    assert load_all() == first
    assert first[3] != first[4]


@pytest.mark.parametrize("kind", ["word", "char", "byte", "bpe"])
def test_a_tokenizer_that_is_at_hand(tmp_path, paths, kind, monkeypatch):
    """Its ids are used, whatever the text; its cache is found again."""
    first = load(tmp_path, paths, kind, vocab_size=300)
    other = tmp_path / "other"
    second = load(other, [paths[2], paths[0], paths[1]], first.tokenizer)
    expected = [first.test, first.train, first.valid]
    assert tokens_of(second) == [split.tokens.tolist() for split in expected]
    assert second.tokenizer.to_dict() == first.tokenizer.to_dict()
    again = load(tmp_path, paths, first.tokenizer)
    assert again.sha256 == first.sha256
    forbid(monkeypatch, "write_tokens")
    assert load(tmp_path, paths, again.tokenizer).folder == again.folder


def test_dataset_knows_its_tokens(tmp_path):
    def sha256(train, valid):
        return load(tmp_path, write(tmp_path, [train, valid, "abc"]), "byte").sha256

    first = sha256("one\n", "two\n")
    ids = np.frombuffer(b"one\n", np.uint8).astype("<u2")
    of_ids = hashlib.sha256(ids.tobytes()).hexdigest()
    identity = json.dumps([of_ids, {"kind": "byte"}])
    assert first["train"] == hashlib.sha256(identity.encode()).hexdigest()
    assert first["train"] == sha256("one\n", "other\n")["train"]
    assert first["valid"] == sha256("other\n", "two\n")["valid"]
    assert len({first["train"], sha256("one", "two\n")["train"]}) == 2


def test_too_little_text(tmp_path):
    for text in ("a", "ab"):
        with pytest.raises(UsageError, match="validation"):
            datasets.load_dataset("text", tmp_path / "lm", text=write(tmp_path, [text]))


# ---- Encodings and homes that are not the usual ones --------------------------------------------


def lacks_encoding(call):
    """Whether an ast.Call opens a text file in the encoding of the locale."""
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if is_method else getattr(call.func, "id", "")
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in named:
        return False
    if name in ("read_text", "write_text") and is_method:
        return len(call.args) < (1 if name == "read_text" else 2)
    if name not in ("open", "fdopen"):
        return False
    others = ("os.open", "members.open", "checkpoint.open", "candidate.open")  # members: of a zip
    if ast.unparse(call.func) in others:
        return False
    place = 0 if is_method and name == "open" else 1  # of the mode
    modes = call.args[place : place + 1]
    if "mode" in named:
        modes.append(named["mode"])
    strings = []
    for mode in modes:
        for node in ast.walk(mode):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return not strings or any("b" not in string for string in strings)


SOURCES = [ROOT / "main.py", ROOT / "datasets.py", *sorted((ROOT / "extras").glob("*.py"))]


def test_every_text_file_is_opened_with_an_encoding():
    """A locale other than UTF-8 would change what is read, or fail at it."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and lacks_encoding(node):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found


def test_a_locale_other_than_utf8_changes_nothing(tmp_path, bpe):
    """Neither the tokens nor a tokenizer that is read from a file with non-ASCII characters."""
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "text.txt").write_text("naïve — 漢字 and words\n" * 400, "utf-8")
    assert not bpe.vocabulary.isascii()
    (tmp_path / "gpt2" / "tokenizer.json").write_text(bpe.vocabulary, "utf-8")
    program = """
import hashlib, json, sys
from pathlib import Path
import datasets
content = Path("gpt2/tokenizer.json").read_bytes()
file = datasets.File("tokenizer.json", len(content), hashlib.sha256(content).hexdigest())
datasets.GPT2 = datasets.GPT2._replace(files=[file])
for kind in ("word", "gpt2", "word", "gpt2"):
    dataset = datasets.load_dataset("text", sys.argv[1], ["text.txt"], kind, mirror=".", say=str)
    print(dataset.sha256, json.dumps(dataset.tokenizer.to_dict()))
"""
    # ASCII: Python 3.10 to 3.14 go by the locale where they are not told to read UTF-8.
    locales = {"ascii": {"PYTHONUTF8": "0", "LC_ALL": "C"}, "utf-8": {"PYTHONUTF8": "1"}}
    seen = []
    for name, env in locales.items():
        options = {"program": (), "env": {"PYTHONPATH": str(ROOT), **env}, "cwd": tmp_path}
        out, _ = run("-c", program, name, **options)
        seen.append(out)
    assert seen[0] == seen[1]
    assert seen[0].count("\n") == 4


WITHOUT_A_HOME = """
import os, pwd
os.environ.pop("HOME", None)
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
import datasets
print(datasets.CACHE)
"""


def test_a_user_without_a_home(tmp_path):
    """As in a container: HOME is not set, and the system knows no user of that number.

    What is in CACHE is read: it must not be in the working directory.
    """
    for relative in ("", ".cache", "~/.cache"):
        env = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": relative}
        out, err = run("-c", WITHOUT_A_HOME, program=(), env=env, cwd=tmp_path)
        assert out == "None\n"
        assert err == ""
    env = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    out, _ = run("-c", WITHOUT_A_HOME, program=(), env=env, cwd=tmp_path)
    assert out == f"{tmp_path}/transformer-lm\n"


def test_no_code_from_the_working_directory(tmp_path):
    """A library that a stranger has put there is not loaded."""
    program = WITHOUT_A_HOME + "print(datasets.open_code_dir())\n"
    env = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": ".cache"}
    out, err = run("-c", program, program=(), env=env, cwd=tmp_path)
    none, folder = out.splitlines()
    assert (none, err) == ("None", "")
    assert Path(folder).is_absolute() and not Path(folder).exists(), "it is gone at the end"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("planted", ["another owner", "a link", "a file", "mode 777", "mode 770"])
def test_no_code_from_a_folder_that_another_user_has_made(tmp_path, monkeypatch, planted):
    monkeypatch.setattr(datasets, "CACHE", tmp_path)
    monkeypatch.setattr(datasets.atexit, "register", lambda *given, **options: None)
    own = datasets.open_code_dir.__wrapped__()
    assert own.parent == tmp_path and own.stat().st_mode & 0o777 == 0o700
    assert datasets.open_code_dir.__wrapped__() == own
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    own.rmdir()
    if planted == "a link":
        own.symlink_to(elsewhere)
    elif planted == "a file":
        own.write_text("")
    else:
        own.mkdir(0o700)
    if planted == "another owner":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(own, 65534, 65534)
    if planted.startswith("mode"):
        own.chmod(int(planted.split()[1], 8))
    found = datasets.open_code_dir.__wrapped__()
    assert not found.is_relative_to(tmp_path)
    assert found.stat().st_mode & 0o777 == 0o700
    found.rmdir()


@pytest.mark.parametrize("home", [".", "", "x"])
def test_a_relative_cache_folder_is_ignored(monkeypatch, home):
    monkeypatch.setenv("XDG_CACHE_HOME", "x/.cache")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert datasets.find_cache() == Path("/home/somebody/.cache/transformer-lm")
    monkeypatch.setenv("HOME", home)
    cache = datasets.find_cache()
    assert cache is None or cache.is_absolute()


def test_paths_of_users(tmp_path, monkeypatch):
    for path in SOURCES:
        uses = path.read_text("utf-8").count("expanduser(")
        # user_path and find_cache, which must not fail.
        assert uses == (2 if path.name == "datasets.py" else 0), path
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    assert datasets.user_path("~/x") == "/home/somebody/x"
    assert datasets.user_path("a/~b") == "a/~b"
    with pytest.raises(UsageError, match="~no-such-user/x: no such user"):
        datasets.user_path("~no-such-user/x")
    (tmp_path / "~no-such-user").mkdir()
    # The name of a file, which a shell leaves as it is.
    assert datasets.user_path("~no-such-user") == "~no-such-user"


@pytest.mark.parametrize(
    "line",
    [
        "--save_dir ~no-such-user/lm",
        "--text ~no-such-user/a.txt",
        "--config ~no-such-user/a.yaml",
        "--save_dir {0} --dataset ptb --mirror ~no-such-user/m",
        "--save_dir {0} --init_from ~no-such-user/m",
    ],
)
def test_folders_of_unknown_users(tmp_path, line, capsys, monkeypatch):
    import main

    monkeypatch.chdir(tmp_path)
    line = line if "--save_dir" in line else line + " --save_dir {0}"
    assert main.main(line.format(tmp_path / "lm").split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "~no-such-user" in err
    assert not list(tmp_path.glob("~*")), err


# ---- datasets.py and main.py as programs --------------------------------------------------------


def prepare(*arguments, **options):
    return run(*arguments, program=[DATASETS], **options)


def test_preparing_a_corpus(tmp_path):
    out, err = prepare("--dataset", "python", "--data_dir", tmp_path)
    dataset = datasets.load_dataset("python", tmp_path, say=pytest.fail)
    assert err == ""
    assert "257" in out
    assert str(dataset.folder) in out
    assert dataset.tokenizer.decode(dataset.train.tokens[:100]) in out
    for split in (dataset.train, dataset.valid, dataset.test):
        assert f"{len(split.tokens):,} tokens" in out
        assert f"{split.num_bytes:,} bytes" in out
        assert f"{split.num_words:,} words" in out


@pytest.mark.parametrize("line, words", [
    ("--dataset ptbb", "invalid choice: 'ptbb'"),
    ("--datset ptb", "unrecognized arguments: --datset ptb (--help lists all flags)"),
    ("--text missing.txt", "missing.txt: no such file"),
    ("--vocab_size 5", "--vocab_size: must be at least 257"),
    ("--tokenizer=", "--tokenizer: is empty"),
    ("--text {0} --tokenizer {0}", "must be a Hugging Face tokenizer.json, or one of auto, byte"),
    ("--text {0} --save_tokenizer /nowhere/x.json", "cannot write /nowhere/x.json"),
    ("--text {0} --data_dir {0}", "cannot write to --data_dir"),
])  # fmt: skip
def test_mistakes_in_preparing(tmp_path, text, line, words):
    content = text.read_bytes()
    line = ["--data_dir", tmp_path / "data", *line.format(text).split()]
    out, err = prepare(*line, status=2)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("datasets.py: ")
    assert words in err
    assert text.read_bytes() == content


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """Files of Hugging Face's library: {name: path}. Of these only the last is lossless."""
    package = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizers")
    specials = {
        "sentencepiece": ["<unk>", "</s>"],
        "unigram": ["<unk>"],
        "wordpiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        "bytes": ["<eos>"],
    }
    made = {
        "sentencepiece": package.SentencePieceBPETokenizer(),
        "unigram": package.SentencePieceUnigramTokenizer(),
        "wordpiece": package.BertWordPieceTokenizer(),
        "bytes": package.ByteLevelBPETokenizer(),
    }
    paths = {}
    for name, tokenizer in made.items():
        options = {"vocab_size": 400, "special_tokens": specials[name], "show_progress": False}
        if name == "unigram":
            options["unk_token"] = "<unk>"
        tokenizer.train_from_iterator(ROWS.split("\n"), **options)
        paths[name] = folder / f"{name}.json"
        tokenizer.save(str(paths[name]))
    return paths


def test_a_tokenizer_that_cuts_and_fills_texts(tokenizer_files, tmp_path):
    """As a file may say that was saved for the inputs of one model."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(tokenizer_files["bytes"]))
    whole = plain.encode(ROWS).ids
    first = plain.encode("the").ids[:1]
    plain.enable_truncation(5)
    plain.enable_padding(length=8)
    path = tmp_path / "own.json"
    plain.save(str(path))
    tokenizer = datasets.read_tokenizer(path)
    assert tokenizer.vocabulary != path.read_text(), "what was encoded before is not used"
    assert len(whole) > 8
    assert tokenizer.encode(ROWS).tolist() == whole
    batch = tokenizer.encode_batch([ROWS, "the"])
    assert [tokens.tolist() for tokens in batch] == [whole, first]


def test_a_corpus_is_found_from_any_working_directory(tmp_path, monkeypatch):
    folder = tmp_path / "mirror" / "tinyshakespeare"
    folder.mkdir(parents=True)
    data = ROWS.encode()
    (folder / "input.txt").write_bytes(data)
    corpus = datasets.CORPORA["tinyshakespeare"]
    sha256 = hashlib.sha256(data).hexdigest()
    file = datasets.File("input.txt", len(data), sha256, cuts=(90,))
    monkeypatch.setitem(datasets.CORPORA, "tinyshakespeare", corpus._replace(files=[file]))
    monkeypatch.chdir(tmp_path)
    mirror = str(tmp_path / "mirror")
    made = datasets.load_dataset("tinyshakespeare", "lm", mirror=mirror, say=str)
    monkeypatch.chdir(folder)
    forbid(monkeypatch, "write_splits")
    again = datasets.load_dataset("tinyshakespeare", tmp_path / "lm", say=str)
    assert again.train.tokens.tolist() == made.train.tokens.tolist()


@pytest.mark.parametrize(
    "name, eos, unk",
    [
        ("sentencepiece", "</s>", "<unk>"),
        ("unigram", None, "<unk>"),
        ("wordpiece", None, "[UNK]"),
        ("bytes", "<eos>", None),
    ],
)
def test_tokenizer_of_a_file(tokenizer_files, name, eos, unk, tmp_path):
    """Its ids are the library's own; what it does not know is named."""
    from tokenizers import Tokenizer

    path = tokenizer_files[name]
    theirs = Tokenizer.from_file(str(path))
    [text] = write(tmp_path / "text", [ROWS])
    options = {"text": [text], "valid_text": [text], "tokenizer": str(path)}
    dataset = datasets.load_dataset("text", tmp_path / "lm", **options)
    tokenizer = dataset.tokenizer
    assert tokenizer.kind == "file"
    expected = theirs.encode(ROWS, add_special_tokens=False).ids
    assert dataset.train.tokens.tolist() == expected
    assert tokenizer.encode("the fox").dtype == np.uint16
    assert tokenizer.eos == (eos and theirs.token_to_id(eos))
    assert tokenizer.unk == (unk and theirs.token_to_id(unk))
    assert tokenizer.num_special == (eos is not None) + (unk is not None)
    assert tokenizer.unknown("the ☃ fox") == (["☃"] if unk else [])
    if name == "bytes":
        assert tokenizer.decode(tokenizer.encode("a ☃\r\n\té")) == "a ☃\r\n\té"


@pytest.mark.parametrize("name", ["sentencepiece", "unigram", "wordpiece", "bytes"])
def test_a_checkpoint_holds_all_of_its_tokenizer(tokenizer_files, name, tmp_path):
    path = tmp_path / "own.json"
    shutil.copy(tokenizer_files[name], path)
    [text] = write(tmp_path / "text", [ROWS])
    line = ["--text", text, *TINY, "--save_dir", tmp_path / "lm"]
    run(*line, "--tokenizer", path, "--num_iters", 2, "--max_tokens", 8)
    path.unlink()
    out, _ = run("--save_dir", tmp_path / "lm", "--num_iters", 4)
    assert "at iteration 4" in out
    assert "file tokenizer" in out
    out, err = run("--prompt", "the ☃ fox", "--save_dir", tmp_path / "lm", "--max_tokens", 8)
    assert len(out) > 1
    assert ("☃" in err) == (name != "bytes")
    shutil.copy(tokenizer_files["unigram" if name == "bytes" else "bytes"], path)
    name = run_folder(tmp_path / "lm").name
    again = begin(*line, "--tokenizer", path, "--num_iters", 6)
    assert again[:2] == (f"{name}.2", 0), "another tokenizer makes another run"


def test_a_tokenizer_file_of_any_name(tmp_path, monkeypatch):
    """Also of that which its kind has in checkpoints; a kind comes before a file of its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "byte").touch()
    assert datasets.tokenizer_name("byte") == "byte"
    assert datasets.tokenizer_name("./byte") == str(tmp_path / "byte")
    assert datasets.tokenizer_name("file") == str(tmp_path / "file")
    with pytest.raises(UsageError, match="file must be a Hugging Face tokenizer.json, or one of"):
        datasets.load_dataset("text", tmp_path / "lm", text=[tmp_path], tokenizer="file")


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe"])
def test_saved_tokenizer_has_the_same_ids(kind, tmp_path):
    [text] = write(tmp_path / "text", [ROWS])
    own = tmp_path / "own.json"
    line = ["--text", text, "--data_dir", tmp_path / "lm"]
    options = ["--tokenizer", kind, "--vocab_size", 300]
    out, _ = prepare(*line, *options, "--save_tokenizer", own)
    again, _ = prepare(*line, "--tokenizer", own)
    pattern = r"[\d,]+ tokens"
    assert re.findall(pattern, out) == re.findall(pattern, again)

    loaded = []
    for tokenizer in (kind, str(own)):
        options = {"text": [text], "tokenizer": tokenizer, "vocab_size": 300}
        loaded.append(datasets.load_dataset("text", tmp_path / "lm", **options))
    one, other = loaded
    for split in ("train", "valid"):
        np.testing.assert_array_equal(getattr(one, split).tokens, getattr(other, split).tokens)
    assert one.tokenizer.eos == other.tokenizer.eos
    assert one.tokenizer.unk == other.tokenizer.unk
    assert one.train.num_unk == other.train.num_unk


def test_a_tilde_in_data_dir(tmp_path, text):
    """The shell leaves it alone behind an =."""
    prepare("--text", text, "--data_dir=~/data", env={"HOME": str(tmp_path)}, cwd=tmp_path)
    assert (tmp_path / "data" / "text").is_dir()
    assert not (tmp_path / "~").exists()


def test_what_is_prepared_is_used(tmp_path, text):
    """Whatever way the path is written."""
    prepare("--text", os.path.relpath(text), "--data_dir", tmp_path / "lm")
    import main

    line = ["--text", text, *TINY, "--num_iters", 1, "--save_dir", tmp_path / "lm"]
    assert main.main([str(argument) for argument in line]) == 0
    assert len([path for path in (tmp_path / "lm" / "text").iterdir() if path.is_dir()]) == 1


def test_streams_that_cannot_take_it_all(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("naïve — text\n" * 300, "utf-8")
    line = ["--text", path, "--data_dir", tmp_path / "lm"]

    out, err = prepare(*line, env={"PYTHONIOENCODING": "ascii"})
    assert "na?ve ? text" in out
    assert err == ""
    read, write = os.pipe()
    os.close(read)  # a reader that has left
    _, err = prepare(*line, stdout=write, status=1)
    assert err == ""
    os.close(write)
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            _, err = prepare(*line, stdout=full, status=1)
            prepare(*line, stdout=full, stderr=full, status=1)
        assert err.count("\n") == 1
        assert err.startswith("datasets.py: ")
        assert "No space left" in err
    command = " ".join(map(str, [sys.executable, DATASETS, *line, ">&-", "2>&-", "<&-"]))
    assert subprocess.run(["sh", "-c", command]).returncode == 0, "closed from the start"


class Waiting(BaseHTTPRequestHandler):
    """Answers one request for a completion; all others wait."""

    def do_GET(self):
        self.server.is_waited_for.set()
        self.server.end.wait()

    def do_POST(self):
        if self.server.answers:
            self.do_GET()
            return
        self.server.answers += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def waiting_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Waiting)
    server.is_waited_for = threading.Event()
    server.end = threading.Event()
    server.answers = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.end.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("task", ["prepare", "collect"])
def test_ctrl_c_ends_it_without_a_traceback(tmp_path, waiting_server, task):
    address = f"http://127.0.0.1:{waiting_server.server_port}"
    if task == "prepare":
        program = [DATASETS]
        line = ["--dataset", "ptb", "--mirror", address, "--data_dir", tmp_path / "lm"]
    else:
        program = ["-m", "extras.collect"]
        (tmp_path / "prompts.txt").write_text("one\ntwo\n")
        line = ["--distill_from", address, "--teacher_model", "m"]
        line += ["--teacher_prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out"]
    process = start(*line, program=program, cwd=ROOT)
    assert waiting_server.is_waited_for.wait(60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert out == ""
    assert err == ""
    if task == "collect":
        [line] = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
        assert json.loads(line)["completion"] == "yes", "what was paid for is kept"


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX then compiles nothing")
def test_nothing_but_the_runs_can_be_written(tmp_path, text):
    """Neither a home nor the usual folder for temporary files: MLX compiles elsewhere."""
    line = ["--text", text, *TINY, "--num_iters", 1, "--save_dir", tmp_path / "lm"]
    env = {"TMPDIR": str(tmp_path / "missing"), "XDG_CACHE_HOME": str(text)}
    out, err = run(*line, env=env)
    assert "at iteration 1\n" in out and not err


KINDS = ["word", "char", "byte", "bpe"]
SCORE = (
    r"^(?:iteration.* )?{} ([\d.]+) nats(?: \(best\))?, perplexity ([\d.]+) per (word|token)"
    r"(?:, ([\d.]+) per word)?, ([\d.]+) bits per byte"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the text of tiny models, one by each tokenizer, in folders of that name.

    And what the trainings printed.
    """
    folder = tmp_path_factory.mktemp("trained")
    paths = write(folder, [ROWS, ROWS[:4000], ROWS[5000:8000]])
    line = ["--text", paths[0], "--valid_text", paths[1], "--test_text", paths[2]]
    line += ["--vocab_size", 300, *TINY, "--num_iters", 20, "--steps_per_eval", 20]
    line += ["--eval_tokens", 0, "--eval_test"]
    outs = []
    for kind in KINDS:
        out, _ = run(*line, "--tokenizer", kind, "--save_dir", folder / kind)
        outs.append(out)
    return folder, outs


def test_checkpoint_answers_without_its_corpus(trained, tmp_path):
    folder, _ = trained
    for kind in KINDS:
        saved = tmp_path / kind
        shutil.copytree(folder / kind, saved, ignore=shutil.ignore_patterns("text"))
        line = ["--inference", "--save_dir", saved, "--max_tokens", 20]
        out, err = run(*line, input="the quick ☃ fox\n")
        assert len(out.strip()) > 3, (kind, out, err)
        assert ("☃" in err) == (kind in ("word", "char")), "a note on what it does not know"


def test_evaluate_gives_the_number_of_training(trained):
    folder, outs = trained
    latency = r", [\d,]+ tokens/s \([\d.]+ s, [\d.]+ ms per token\)\n"
    # In training a line of history goes on, and that of the test split ends as this one does.
    end = r"(?:; epoch .*|, [\d,]+ tokens/s.*)?$"
    for name in ("valid", "test"):
        for kind, out in zip(KINDS, outs):
            score, _ = run("--evaluate", name, "--save_dir", folder / kind)
            assert re.search(f"{latency}$", score)
            expected = re.sub(f"{latency}$", "", score)
            line = rf"^(?:iteration.* )?{re.escape(expected)}{end}"
            assert len(re.findall(line, out.replace(" (best)", ""), re.M)) == 1


def test_scores_are_in_the_same_unit(trained):
    folder, outs = trained
    names = {
        "text": [folder / "000.txt"],
        "valid_text": [folder / "001.txt"],
        "test_text": [folder / "002.txt"],
    }
    for kind, out in zip(KINDS, outs):
        options = {"tokenizer": kind, "vocab_size": 300}
        dataset = datasets.load_dataset("text", folder / kind, **names, **options)
        for name, text in (("valid", ROWS[:4000]), ("test", ROWS[5000:8000])):
            score = re.search(SCORE.format(name), out, re.M)
            nats, perplexity, unit, per_word, bits = score.groups()
            num_tokens = len(getattr(dataset, name).tokens)
            total = float(nats) * num_tokens
            expected = total / math.log(2) / len(text.encode())
            assert float(perplexity) == pytest.approx(math.exp(float(nats)), rel=1e-3)
            assert float(bits) == pytest.approx(expected, rel=1e-3)
            words = len(text.split()) + text.count("\n")
            if kind == "word":
                assert unit == "word"
                assert per_word is None
                assert num_tokens - words in (0, 1), "an <eos> at the end, too"
            elif kind == "bpe":
                assert unit == "token"
                assert float(per_word) == pytest.approx(math.exp(total / words), rel=0.01)
            else:
                assert unit == "token"
                assert per_word is None, "no words, no perplexity of theirs"


def test_evaluate_without_a_test_split(tmp_path, text, capsys):
    import main

    line = ["--text", text, *TINY, "--num_iters", 1, "--save_dir", tmp_path / "lm"]
    assert main.main([str(argument) for argument in line]) == 0
    capsys.readouterr()
    assert main.main(["--evaluate", "test", "--save_dir", str(tmp_path / "lm")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "--test_text" in err


def test_an_empty_test_text(tmp_path, text, capsys):
    import main

    (tmp_path / "empty.txt").write_text("")
    line = ["--text", text, *TINY, "--num_iters", 1, "--save_dir", tmp_path / "lm"]
    line = [*line, "--test_text", tmp_path / "empty.txt", "--eval_test"]
    assert main.main([str(argument) for argument in line]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1
