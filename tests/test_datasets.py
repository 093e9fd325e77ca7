"""Tokenizers, streams of documents, splits of own text, and the cache of tokens on disk."""

import ast
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import DATASETS, ROOT, TINY, ids, run, start, whole

import datasets
from datasets import PackageTokenizer, ByteTokenizer, CharTokenizer, UsageError, WordTokenizer
from datasets import read_documents, write_tokens

# Line 1 ends at its \n only: \x0c, \x85, \u2028 and CR separate words but end no line. Line 2 is blank.
TEXT = "b a b\n\n a\x0cb \x85 é\u2028c\r\n<unk> x\n"


def random_text(generator, length):
    """Any code points but surrogates, which no UTF-8 file holds."""
    points = [generator.choice((0x7F, 0x7FF, 0xFFFF, 0x10FFFF)) for _ in range(length)]
    points = [generator.randint(0, top) for top in points]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


# ---- Tokenizers ---------------------------------------------------------------------------------


def test_word_ids():
    tokenizer = WordTokenizer.train([TEXT])
    # counts: <eos> 4, b 3, a 2, the others 1 each
    assert tokenizer.vocabulary == ["<eos>", "b", "a", "<unk>", "c", "x", "é"]
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.unk) == (7, 0, 3)
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
    """A prompt that does not end its line gets no <eos>, and a word out of vocabulary is <unk>."""
    assert WordTokenizer.train([TEXT]).encode(text).tolist() == tokens


def test_word_agrees_with_a_line_reader():
    generator = random.Random(1)
    pieces = [
        "aa",
        "b",
        "ü",
        "<unk>",
        " ",
        "\t",
        "\n",
        "\n",
        "\r",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2028",
    ]
    for _ in range(200):
        text = "".join(generator.choices(pieces, k=generator.randint(0, 40)))
        tokenizer = WordTokenizer.train([text])
        words = []
        for line in io.StringIO(text, newline="\n"):  # splits at \n alone
            words += line.split() + ["<eos>"] * line.endswith("\n")
        assert [tokenizer.vocabulary[i] for i in tokenizer.encode(text)] == words
        assert tokenizer.decode(tokenizer.encode(text)).split() == text.split()


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
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.unk) == (5, None, 4)
    assert tokenizer.encode("aéb\n").tolist() == [1, 3, 2, 0]
    # A surrogate pair is the one character that its writer, JSON say, meant; half a pair is one, too.
    assert tokenizer.encode("a😀z\ud800\ud800\udc00\udcff").tolist() == [1, 4, 4, 4, 4, 4]
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
    assert tokens.dtype == dtype
    assert tokens.tolist() == [vocab_size - 2, vocab_size - 1]


def test_byte_round_trip():
    generator = random.Random(3)
    tokenizer = ByteTokenizer.train(["anything"])
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.unk) == (257, 256, None)
    for length in (0, 1, 10, 1000):
        text = random_text(generator, length)
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == list(text.encode("utf-8"))
        assert tokenizer.decode(tokens) == text
        assert tokenizer.unknown(text) == []
    assert (
        tokenizer.decode([104, 256, 105, 0xFF]) == "hi\ufffd"
    )  # <eos> prints nothing, half a character one mark


def test_byte_keeps_what_is_not_utf8():
    """The command line hands bytes that are not UTF-8 over as surrogates: they come out as the same bytes."""
    raw = bytes(range(256)) + random.Random(4).randbytes(1000)
    assert bytes(ByteTokenizer().encode(raw.decode("utf-8", "surrogateescape")).tolist()) == raw


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
    return PackageTokenizer.train(
        [TEXT * 3, "the quick brown fox — jümps over the lazy dogs 漢字\n" * 20], 320
    )


def test_bpe_round_trip(bpe):
    generator = random.Random(7)
    assert 257 < bpe.vocab_size <= 320
    assert bpe.unk is None
    assert bpe.num_special is not True
    assert bpe.num_special == 1
    for text in [*SAMPLES, *(random_text(generator, length) for length in (1, 2, 10, 100, 1000))]:
        tokens = bpe.encode(text)
        assert tokens.dtype == np.uint16
        assert bpe.decode(tokens) == text
        assert bpe.unknown(text) == []
    assert bpe.encode("a<|endoftext|>b").tolist().count(bpe.eos) == 1
    assert bpe.decode(bpe.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
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
    with pytest.raises(KeyError):
        datasets.tokenizer_from_dict({"kind": "later"})


def test_the_end_token_that_a_tokenizer_is_told():
    package = datasets.tokenizers_package()
    vocabulary = {"<|endoftext|>": 0, "</s>": 1, "<end>": 2, "<eos>": 3}
    text = package.Tokenizer(package.models.WordLevel(vocabulary)).to_str()
    plain = {"kind": "bpe", "vocabulary": text}
    for told, eos in ((None, 0), ("<end>", 2), ("<|endoftext|>", 0), ("missing", 0), ("", 0)):
        tokenizer = PackageTokenizer(text, eos=told)
        assert tokenizer.eos == eos
        assert tokenizer.num_special == 1
        data = json.loads(json.dumps(tokenizer.to_dict()))
        # Nothing new in what earlier versions saved: a run knows its text by a hash of it, too.
        assert data == (plain | {"eos": "<end>"} if told == "<end>" else plain)
        assert datasets.tokenizer_from_dict(data).eos == eos


def test_an_imported_tokenizer_has_the_end_token_of_its_model(tmp_path):
    """Even where a text holds the word that is the end token of others."""
    import main

    from extras.huggingface import export_model, import_model

    tokenizer = WordTokenizer.train(["a b <|endoftext|> </s>\n" * 9])
    shape = dict(num_blocks=1, dim=16, num_heads=2, num_kv_heads=2, mlp="swiglu", mlp_dim=64)
    model = main.LanguageModel(main.Config(tokenizer.vocab_size, 8, **shape))
    export_model(model, tokenizer, tmp_path / "hf", bits=None)
    for folder in ("hf", "again"):  # what is exported again is the same
        _, its, _ = import_model(tmp_path / folder)
        assert its.eos == tokenizer.eos
        assert datasets.tokenizer_from_dict(its.to_dict()).eos == tokenizer.eos
        if folder == "hf":
            export_model(model, its, tmp_path / "again", bits=None)
    settings = tmp_path / "hf" / "tokenizer_config.json"
    settings.write_text(
        json.dumps({"eos_token": {"content": "</s>"}})
    )  # as older versions of transformers write it
    assert import_model(tmp_path / "hf")[1].eos == tokenizer.ids["</s>"]
    settings.unlink()
    assert import_model(tmp_path / "hf")[1].eos == tokenizer.ids["<|endoftext|>"]


def test_ids_do_not_depend_on_the_hash_seed():
    program = """
import json
from datasets import PackageTokenizer, CharTokenizer, WordTokenizer
text = "".join(f"w{i * 7919 % 1000}{chr(0x4E00 + i * 7919 % 1000)} " for i in range(1000)) + "\\n"
bpe = PackageTokenizer.train([text[:3000], text[3000:]], 700)
tokenizers = [WordTokenizer.train([text]), CharTokenizer.train([text]), bpe]
print(json.dumps([[t.to_dict(), t.encode(text).tolist()] for t in tokenizers]))
"""
    # All 1,000 words are equally frequent, so an order that a set or dict lent would show.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    first, second = (process.communicate(timeout=60)[0] for process in processes)
    assert first == second
    assert len(json.loads(first)[0][1]) == 1001


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
    code = "import sys, datasets; datasets.load_dataset; sys.exit('mlx' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


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
    code = "import datasets; datasets.extra('collect')"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "elsewhere")}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "alone",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "UsageError: extras/collect.py is missing: copy" in process.stderr.splitlines()[-1]


@pytest.mark.parametrize("missing", ["nowhere", "extras_of_others"])
def test_a_package_that_an_extra_lacks(tmp_path, missing, monkeypatch):
    (tmp_path / "extras").mkdir()
    (tmp_path / "extras" / "__init__.py").write_text("")
    (tmp_path / "extras" / "needy.py").write_text(f"import {missing}\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "extras"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=missing):
        datasets.extra("needy")
    for name in ("extras", "extras.needy"):
        monkeypatch.delitem(sys.modules, name, raising=False)


# ---- Streams of documents -----------------------------------------------------------------------


def write(folder, documents, encoding="utf-8"):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:03}.txt" for i in range(len(documents))]
    for path, text in zip(paths, documents):
        path.write_bytes(text.encode(encoding))
    return paths


def encoded(folder, documents, tokenizer):
    """The tokens of these documents, written as a corpus's are, and what is counted."""
    known = write_tokens(
        [whole(path) for path in write(folder, documents)], tokenizer, folder / "x.tokens"
    )
    tokens = np.fromfile(folder / "x.tokens", datasets.token_dtype(tokenizer.vocab_size))
    assert known["num_tokens"] == len(tokens)
    assert known["num_unk"] == (0 if tokenizer.unk is None else np.sum(tokens == tokenizer.unk))
    return tokens.tolist(), known


def test_byte_documents_are_separated(tmp_path):
    tokens, known = encoded(tmp_path, ["hé\n", "", "a b"], ByteTokenizer())
    assert tokens == [104, 0xC3, 0xA9, 10, 256, 97, 32, 98]  # no document, no separator
    assert (known["num_bytes"], known["num_words"]) == (7, 4)  # words hé, a, b and one line end


def test_bpe_documents_are_separated(tmp_path, bpe):
    tokens, known = encoded(tmp_path, ["the fox\n", "jümps"], bpe)
    assert tokens == [*bpe.encode("the fox\n"), bpe.eos, *bpe.encode("jümps")]
    assert (known["num_bytes"], known["num_words"]) == (14, 4)


def test_word_documents_end_their_line(tmp_path):
    tokenizer = WordTokenizer.train(["a a b"])
    assert tokenizer.vocabulary == ["a", "b", "<eos>", "<unk>"]
    tokens, known = encoded(tmp_path, ["a b", "b\n", "\na é"], tokenizer)
    assert tokens == [0, 1, 2, 1, 2, 2, 0, 3, 2]
    assert (known["num_bytes"], known["num_words"], known["num_unk"]) == (
        10,
        7,
        1,
    )  # 5 words, 2 line ends


def test_char_documents_follow_each_other(tmp_path):
    tokens, known = encoded(tmp_path, ["ab", "ba"], CharTokenizer("ab"))
    assert tokens == [0, 1, 1, 0]
    assert (known["num_bytes"], known["num_words"]) == (4, 2)


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), CharTokenizer("ab"), WordTokenizer.train(["a"])]
)
@pytest.mark.parametrize("documents", [[], [""], ["", ""]])
def test_no_documents(tmp_path, tokenizer, documents):
    tokens, known = encoded(tmp_path, documents, tokenizer)
    assert tokens == []
    assert (known["num_bytes"], known["num_words"]) == (0, 0)


def test_separated_documents_in_one_file(tmp_path):
    (path,) = write(tmp_path, ["--one\n\ntwo\n--\n \n--\nthrée--"])
    for size in (1, 2, 3, 7, 1 << 16):
        documents = list(read_documents([whole(path, marker="--")], size))
        assert documents == [("one\n\ntwo", True), ("thrée", True)]


PIECES = [
    "a",
    "bc",
    "it's",
    "12",
    "!?",
    "漢字",
    "かな",
    "😀",
    "é",
    "<|endoftext|>",
    "<unk>",
    " ",
    "  ",
    "\t",
    "\tq\t\tr",
    "\n",
    "\n\n",
    "\n\n  x",
    " \n y",
    "\r\n",
    "\n \t\n",
    "\n\xa0x",
    "\n\x1cx",
    "\x0b",
    "\x1c",
    "\x1f\n",
    "\x85",
    "\xa0",
    "\u2028",
    "\u3000",
]


@pytest.fixture(scope="module")
def awkward():
    """Texts of awkward white space, with a line end now and then."""
    generator = random.Random(8)
    return [
        "".join(generator.choices(PIECES, k=generator.randint(0, 60))) + "\n" * (i % 2)
        for i in range(60)
    ]


def tokenizer_of(kind, texts):
    return datasets.TOKENIZERS[kind].train(texts, 400)


def streamed(path, tokenizer, size):
    blocks = [text for text, _ in read_documents([whole(path)], size)]
    return "".join(blocks), [i for block in blocks for i in tokenizer.encode(block).tolist()]


@pytest.mark.parametrize("kind", ["word", "char", "byte", "bpe"])
def test_blocks_have_the_ids_of_the_whole(tmp_path, kind, awkward):
    tokenizer = tokenizer_of(kind, awkward)
    for path, text in zip(write(tmp_path, awkward), awkward):
        for size in (16, 17, 40, 1000):
            assert streamed(path, tokenizer, size) == (text, tokenizer.encode(text).tolist()), (
                size,
                text,
            )


@pytest.mark.parametrize(
    "text", ["a\n\n<|endoftext|>b", "a\n\t<|endoftext|>", "<|endoftext|>\n\n\nb\n c"]
)
def test_blocks_around_the_end_token(tmp_path, bpe, text):
    for size in (1, 2, 3):
        assert streamed(*write(tmp_path, [text]), bpe, size) == (text, bpe.encode(text).tolist()), (
            size
        )


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
    tokenizer = tokenizer_of(kind, [text])
    for size in (4, 7, 64):  # it looks for one in 16 times as much
        assert streamed(*write(tmp_path, [text]), tokenizer, size) == (
            text,
            tokenizer.encode(text).tolist(),
        ), size


@pytest.mark.parametrize("kind", ["char", "byte"])
@pytest.mark.parametrize(
    "text", ["漢字" * 900, "\t".join(["x" * 9] * 200), "é" * 1000, "\n" * 500 + "x"], ids=range(4)
)
def test_text_without_line_ends_or_blanks(tmp_path, kind, text):
    tokenizer = tokenizer_of(kind, [text])
    assert streamed(*write(tmp_path, [text]), tokenizer, 5) == (
        text,
        tokenizer.encode(text).tolist(),
    )


def test_blocks_are_small(tmp_path):
    """Memory does not grow with the text."""
    for text in (
        "line of words\n" * 5000,
        "words " * 10000,
        "x" * 60000,
        "\n" * 60000,
        " " * 60000,
    ):
        assert (
            max(len(block) for block, _ in read_documents([whole(*write(tmp_path, [text]))], 256))
            <= 17 * 256 + 2000
        )


@pytest.mark.parametrize("kind", ["word", "char", "byte", "bpe"])
def test_counts_of_words_and_bytes(tmp_path, kind, awkward, monkeypatch):
    """Whatever the blocks. Words are those of ASCII's white space where the text has no other."""
    texts = ["".join(re.sub(r"[\x1c-\x1f\x85\xa0\u2028\u3000]", "", text)) for text in awkward]
    expected = (
        sum(len(text.split()) + text.count("\n") for text in texts),
        sum(len(text.encode()) for text in texts),
    )
    for size in (16, 100, None):
        with monkeypatch.context() as patch:
            if size:
                patch.setattr(
                    datasets, "read_documents", lambda spans, *_: read_documents(spans, size)
                )
            known = encoded(tmp_path, texts, tokenizer_of(kind, texts))[1]
        assert (known["num_words"], known["num_bytes"]) == expected


def test_words_of_all_white_space_are_counted(tmp_path):
    text = "one\xa0two\u2028three\u3000four\x1cfive\x85six\n"
    tokens, known = encoded(tmp_path, [text], WordTokenizer.train([text]))
    assert len(tokens) == known["num_words"] == len(text.split()) + 1


# ---- Own text -----------------------------------------------------------------------------------


def own_text(paths, fraction=0.1, valid=(), test=(), say=pytest.fail, save_dir=Path("/nowhere")):
    """The texts of each split."""
    given = {
        name: paths for name, paths in (("train", paths), ("valid", valid), ("test", test)) if paths
    }
    splits = datasets.own_text(given, fraction, say, save_dir)

    def text_of(span):
        return span.path.read_bytes()[span.start : span.stop].decode()

    return {name: [text_of(span) for span in spans] for name, spans in splits.items()}


@pytest.mark.parametrize(
    "count, fraction, valid",
    [(10, 0.1, [9]), (25, 0.1, [9, 19]), (5, 0.25, [3]), (4, 0.5, [1, 3]), (10, 0.4, [2, 4, 7, 9])],
)
def test_many_files_are_split_whole(tmp_path, count, fraction, valid):
    documents = [
        f"document {i}\n" * (i + 1) + "end" for i in range(count)
    ]  # unequal: a cut by position would differ
    splits = own_text(write(tmp_path, documents), fraction)
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
    for _ in range(100):
        pieces = ["é", "word ", "\n", "\r\n", "x" * 30]
        documents = [
            "".join(generator.choices(pieces, k=generator.randint(0, 300)))
            for _ in range(generator.randint(1, 7))
        ]
        if not any(documents):
            continue
        splits = own_text(write(tmp_path, documents), 0.125)  # 8 files would be split whole
        assert "".join(splits["train"] + splits["valid"]) == "".join(documents)
        # no empty document, which would add a separator
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
    ["😀" * 1000, "a" + "😀" * 1000, "aa" + "😀" * 1000, "aaa" + "😀" * 1000, "😀", "é😀", "héllo"],
)
def test_no_character_is_cut(tmp_path, text, fraction):
    splits = own_text(write(tmp_path, [text]), fraction)  # which decodes both sides
    assert "".join(splits["train"] + splits["valid"]) == text
    assert len(text) < 10 or abs(len(splits["valid"][0]) - fraction * len(text)) < 3


@pytest.mark.parametrize("length", range(1, 40))
def test_short_texts(tmp_path, length):
    text = ("ab\ncdefghij" * 4)[:length]
    for fraction in (0.1, 0.5):
        splits = own_text(write(tmp_path, [text]), fraction)
        assert "".join(splits["train"] + splits["valid"]) == text


def test_given_valid_and_test_text(tmp_path):
    paths = write(tmp_path, ["train\n" * 100, "more\n", "valid\n", "test\n", "test 2\n"])
    splits = own_text(paths[:2], valid=paths[2:3], test=paths[3:])
    assert splits == {
        "train": ["train\n" * 100, "more\n"],
        "valid": ["valid\n"],
        "test": ["test\n", "test 2\n"],
    }
    splits = own_text(paths[:2], test=paths[3:4])
    assert splits["test"] == ["test\n"]
    assert "".join(splits["train"] + splits["valid"]) == "train\n" * 100 + "more\n"
    dataset = datasets.load_dataset(
        "text", tmp_path / "lm", text=paths[:2], valid_text=paths[2:3], test_text=paths[3:]
    )
    assert bytes(dataset.test.tokens[:5].tolist()) == b"test\n"
    assert dataset.test.tokens.tolist().count(256) == 1
    assert bytes(dataset.valid.tokens.tolist()) == b"valid\n"
    for missing in ("text", "valid_text", "test_text"):
        with pytest.raises(UsageError, match="missing.txt"):
            datasets.load_dataset(
                "text", tmp_path / "lm", **{"text": paths[:1], missing: [tmp_path / "missing.txt"]}
            )


def test_folders_and_patterns(tmp_path):
    files = {
        "a.txt": b"a",
        "b.md": b"b",
        "sub/c.py": b"c",
        "sub/deep/d": "é".encode(),
        "lm/ids": b"own",
        ".hidden": b"no",
        ".git/config": b"no",
        "sub/.x/y.txt": b"no",
        "image.png": b"\x89PNG\r\n\0",
        "latin.txt": b"na\xefve",
        "nul.bin": b"a\0b",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    said = []

    def found(*patterns):
        said.clear()
        paths = datasets.text_files(
            [str(tmp_path / pattern) for pattern in patterns], said.append, tmp_path / "lm"
        )
        return [str(path.relative_to(tmp_path)) for path in paths]

    assert found("") == [
        "a.txt",
        "b.md",
        "sub/c.py",
        "sub/deep/d",
    ]  # in order, and nothing of the program's own
    assert len(said) == 1
    assert str(tmp_path) in said[0]
    assert "3 of 7" in said[0]
    assert found("sub") == ["sub/c.py", "sub/deep/d"]
    assert said == []
    assert found("sub/.x") == ["sub/.x/y.txt"], "named by the user"
    assert found("*.txt") == ["a.txt", "latin.txt"]
    assert found("**/*.py") == ["sub/c.py"]
    assert found("b.md", "a.txt", "*.md", "", "sub") == [
        "b.md",
        "a.txt",
        "sub/c.py",
        "sub/deep/d",
    ], "each once"
    for nothing in ("*.html", "missing"):
        with pytest.raises(UsageError, match="no such file"):
            found(nothing)


def test_a_name_that_looks_like_a_pattern(tmp_path):
    path = tmp_path / "a[1].txt"
    path.write_text("text")
    assert datasets.text_files([str(path)], pytest.fail, tmp_path / "lm") == [path]


def test_text_and_save_dir_in_one_folder(tmp_path):
    """The user's files count there, those of the program do not."""
    names = [
        "a.txt",
        "notes.csv",
        "text-2024.csv",
        "sub/b.txt",
        "text/c.txt",
        "python/d.py",
        "ptb.txt",
    ]
    sha1 = "0123456789" * 4
    own = [
        f"{sha1}.metadata",
        f"{sha1}.safetensors",
        "text-ab12cd.csv",
        "text-ab12cd.csv.new",
        "python-000000.metadata.new",
    ]
    own += [
        "text/word-0123456789ab/about.json",
        "text/word-0123456789ab/valid.tokens",
        "ptb/byte-0123456789ab/about.new",
    ]
    own += [
        "ptb/ptb.train.txt",
        "wikitext2/wiki.train.tokens",
        "enwik8/enwik8.zip.part",
        "gpt2/tokenizer.json",
    ]
    for name in names + own:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")

    def found(folder, save_dir):
        paths = datasets.text_files([str(folder)], pytest.fail, save_dir)
        return sorted(str(path.relative_to(tmp_path)) for path in paths)

    assert found(tmp_path, tmp_path) == sorted(names)
    assert found(tmp_path / "sub", tmp_path) == ["sub/b.txt"]
    assert found(tmp_path / "text", tmp_path) == ["text/c.txt"]
    assert found(tmp_path, tmp_path / "text") == sorted(
        [*names[:4], *names[5:], *own[:5], *own[7:]]
    ), "all of it is"
    assert found(tmp_path, tmp_path / "elsewhere") == sorted(names + own)


def test_a_run_beside_its_text(tmp_path, text):
    import main

    line = [
        "--text",
        text.parent,
        "--save_dir",
        text.parent,
        *TINY,
        "--lr_warmup",
        5,
        "--steps_per_eval",
        5,
    ]
    other = [*line[:3], tmp_path.parent / f"{tmp_path.name}-other", *line[4:]]
    for each, steps in ((other, [20]), (line, [10, 20])):
        for num_iters in steps:
            assert main.main([str(argument) for argument in [*each, "--num_iters", num_iters]]) == 0
    assert ids(other[3])[0] in ids(text.parent)


def test_what_is_no_regular_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path must be short
        server.bind("socket")
    assert datasets.text_files([str(tmp_path)], pytest.fail, tmp_path / "lm") == [
        tmp_path / "a.txt"
    ]
    for path in (tmp_path / "pipe", tmp_path / "socket", "/dev/null"):
        with pytest.raises(
            UsageError, match="is a pipe, a device or a socket: write its text to a file"
        ):
            datasets.load_dataset("text", tmp_path / "lm", text=[path])


def test_text_from_a_pipe(tmp_path):
    read, write = os.pipe()
    os.write(write, b"text\n")
    os.close(write)
    line = ["--text", f"/dev/fd/{read}", "--save_dir", tmp_path]
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
    path = tmp_path / "latin.txt"
    (content, offset) = BAD[name]
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        datasets.load_dataset("text", tmp_path / "lm", text=[path], tokenizer=kind, vocab_size=300)
    assert str(path) in str(error.value)
    assert f" byte {offset:,}:" in str(error.value)
    assert "\n" not in str(error.value)


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
    dataset = datasets.load_dataset("text", tmp_path, text=paths, tokenizer=kind)
    vocabulary = dataset.tokenizer.to_dict()
    assert vocabulary["vocabulary"] == words
    assert np.sum(dataset.train.tokens == dataset.tokenizer.unk) == dataset.train.num_unk == 0
    unknown = {"char": 20, "word": 10}[kind]
    assert np.sum(dataset.valid.tokens == dataset.tokenizer.unk) == dataset.valid.num_unk == unknown


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
    on = [True]
    sys.addaudithook(lambda event, args: on and event == "open" and opened.append(str(args[0])))
    forbid(monkeypatch, "read_documents", "sha256_of", "write_tokens")
    second = load(tmp_path, paths, kind, vocab_size=300)
    on.clear()
    assert any("tokens" in path for path in opened)
    assert not set(map(str, paths)) & set(opened)
    assert tokens_of(second) == tokens_of(first)
    assert second.sha256 == first.sha256
    assert second.tokenizer.to_dict() == first.tokenizer.to_dict()
    assert all(
        getattr(first, split).num_bytes == getattr(second, split).num_bytes
        for split in ("train", "valid", "test")
    )


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
    text = paths[split].read_text()
    before = tokens_of(first)
    changed = {
        "same size": text.replace("quick", "aaaaa"),
        "longer": text + "one more line\n",
        "shorter": text[:-200],
    }[change]
    paths[split].write_text(changed)
    second = load(tmp_path, paths)
    assert tokens_of(second) != before
    assert tokens_of(second) == tokens_of(load(tmp_path / "fresh", paths))
    assert (second.sha256 != first.sha256) == (split == 0)


def test_a_run_keeps_the_tokens_that_it_has(tmp_path, paths):
    """While another one encodes a changed text."""
    first = load(tmp_path, paths)
    before = tokens_of(first)
    paths[0].write_text(
        ROWS.replace("quick", "aaaaa")
    )  # of the same size: it would die if its file were shortened
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


DAMAGE = {
    "truncated": lambda folder: os.truncate(folder / "valid.tokens", 10),
    "no tokens": lambda folder: (folder / "train.tokens").unlink(),
    **{
        f"{split} {byte}": lambda folder, split=split, byte=byte: overwrite(
            folder / f"{split}.tokens", byte
        )
        for split in ("train", "valid", "test")
        for byte in (0, 255)  # the first word, and an id far beyond the last one
    },
    "a bit": lambda folder: os.pwrite(os.open(folder / "test.tokens", os.O_RDWR), b"\x01", 3),
    **{
        f"about {content}": lambda folder, content=content: (folder / "about.json").write_text(
            content
        )
        for content in ("", "null", "7", '"check"', '{"check": 0}', '{"splits": {}, "check": 5}')
    },
    "half an about": lambda folder: os.truncate(folder / "about.json", 100),
    "binary": lambda folder: (folder / "about.json").write_bytes(b"\xff\0"),
    "another word": lambda folder: change_about(
        folder, lambda about: about["tokenizer"]["vocabulary"].reverse()
    ),
    "another sha256": lambda folder: change_about(
        folder, lambda about: about.update(sha256="0" * 64)
    ),
    "other counts": lambda folder: change_about(
        folder, lambda about: about["splits"]["valid"].update(num_bytes=5)
    ),
    "other CRC-32s": lambda folder: change_about(
        folder, lambda about: about["crc32"].update(train=5)
    ),
}


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
    assert len(said) == 1
    assert f"{cache_of(tmp_path)} is damaged" in said[0]
    assert tokens_of(load(tmp_path, paths)) == expected


def test_flipped_bits_of_about(tmp_path, paths):
    """Wherever they are, and whether or not it stays JSON."""
    first = load(tmp_path, paths)
    expected = tokens_of(first)
    path = cache_of(tmp_path) / "about.json"
    content = path.read_bytes()
    generator = random.Random(1)
    for _ in range(20):
        place = generator.randrange(len(content))
        flipped = content[place] ^ 1 << generator.randrange(8)
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        second = load(tmp_path, paths, say=str)
        assert tokens_of(second) == expected
        assert second.sha256 == first.sha256
        assert second.tokenizer.to_dict() == first.tokenizer.to_dict()


def test_damaged_tokens_whose_text_is_gone(tmp_path, paths):
    load(tmp_path, paths)
    overwrite(cache_of(tmp_path) / "train.tokens", 0)
    paths[0].unlink()
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path, paths, say=str)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"splits": {}, "stamps": {}}', "as it was written"]
)
def test_tokens_of_an_older_version_are_made_anew_without_a_word(tmp_path, paths, content):
    """It noted no CRC-32s. What checkpoints know of the text stays the same, or no run could be resumed."""
    first = load(tmp_path, paths)
    expected = tokens_of(first)
    path = cache_of(tmp_path) / "about.json"
    if content == "as it was written":
        about = json.loads(path.read_text())
        old = {name: about[name] for name in ("splits", "tokenizer", "sha256", "text")}
        old["stamps"] = {path: known[:2] for path, known in about["stamps"].items()}
        content = json.dumps(old)
    path.write_text(content)
    overwrite(cache_of(tmp_path) / "train.tokens", 0)
    second = load(tmp_path, paths)
    assert tokens_of(second) == expected
    assert second.sha256 == first.sha256


def test_large_tokens_are_verified_where_they_have_changed(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(datasets, "ALWAYS_VERIFIED", 0)
    expected = tokens_of(load(tmp_path, paths))
    path = cache_of(tmp_path) / "train.tokens"

    def verify_nothing():
        with monkeypatch.context() as patch:
            forbid(patch, "crc32_of", "write_tokens")
            assert tokens_of(load(tmp_path, paths)) == expected

    verify_nothing()
    os.utime(path, (1, 1))
    assert tokens_of(load(tmp_path, paths)) == expected
    verify_nothing()  # what was found is noted
    known = path.stat()
    other = path.with_name("other")
    other.write_bytes(bytes(known.st_size))
    os.utime(other, ns=(known.st_atime_ns, known.st_mtime_ns))
    other.replace(path)  # of the same size and time
    said = []
    assert tokens_of(load(tmp_path, paths, say=said.append)) == expected
    assert len(said) == 1
    verify_nothing()


def test_tokens_are_on_the_disk_before_they_count(tmp_path, paths, monkeypatch):
    seen = []
    sync = datasets.sync
    replace = Path.replace
    monkeypatch.setattr(datasets, "sync", lambda path: (seen.append(path.name), sync(path)))
    monkeypatch.setattr(
        Path, "replace", lambda path, new: (seen.append(f"-> {new.name}"), replace(path, new))[1]
    )
    load(tmp_path, paths)
    folder = cache_of(tmp_path).name
    assert seen == [
        "train.tokens",
        "valid.tokens",
        "test.tokens",
        "about.new",
        "-> about.json",
        folder,
    ]


PROGRAM = """
import os, signal, sys, threading
from pathlib import Path
import datasets
write, left = datasets.write_tokens, [{left}]
def watched(*arguments):
    left[0] -= 1
    print("encoding", flush=True)
    threading.Event().wait({pause})
    if left[0] < 0:
        arguments[2].write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
datasets.write_tokens = watched
texts = [[Path(path)] for path in sys.argv[2:]]
dataset = datasets.load_dataset("text", sys.argv[1], texts[0], "word", valid_text=texts[1], test_text=texts[2])
print(dataset.sha256, dataset.test.tokens.tolist())
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


@pytest.mark.parametrize("left", range(3))
@pytest.mark.parametrize("before", ["nothing", "other text"])
def test_killed_while_encoding(tmp_path, paths, left, before):
    if before == "other text":
        paths[0].write_text(ROWS.replace("quick", "aaaaa"))
        load(tmp_path, paths)
        paths[0].write_text(ROWS)
    process = encode_elsewhere(tmp_path, paths, left)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert tokens_of(load(tmp_path, paths)) == tokens_of(load(tmp_path / "fresh", paths))


def test_two_processes_encode_once(tmp_path, paths):
    processes = [encode_elsewhere(tmp_path, paths, pause=0.1) for _ in range(2)]
    outs = [process.communicate(timeout=30)[0].splitlines() for process in processes]
    assert outs[0][-1] == outs[1][-1]
    assert sorted(map(len, outs)) == [1, 4]
    assert json.loads(outs[0][-1].partition(" ")[2]) == load(tmp_path, paths).test.tokens.tolist()


def test_text_that_changes_while_it_is_encoded(tmp_path, paths, monkeypatch):
    """The next start sees it."""
    write = datasets.write_tokens
    times = [0]

    def late(*arguments):
        known = write(*arguments)
        if not times[0]:
            paths[0].write_text(ROWS.replace("quick", "aaaaa"))
        times[0] += 1
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
    assert (cache_of(tmp_path) / "train.tokens").stat().st_size == distinct * np.dtype(
        dtype
    ).itemsize
    assert dataset.test is None, "an empty split is none"


def test_another_python_has_other_modules(tmp_path, monkeypatch):
    """The modules of the Python that was there before are still there, but they are not the running one's."""
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
    first = [tokens_of(load(tmp_path, paths, kind, vocab_size=size)) for kind, size in variants]
    forbid(monkeypatch, "write_tokens")
    load(tmp_path, paths, "word", vocab_size=77)  # which means nothing to it
    assert [
        tokens_of(load(tmp_path, paths, kind, vocab_size=size)) for kind, size in variants
    ] == first
    assert first[3] != first[4]


def test_dataset_knows_its_training_tokens(tmp_path):
    def sha256(train, valid):
        return load(tmp_path, write(tmp_path, [train, valid, "abc"]), "byte").sha256

    first = sha256("one\n", "two\n")
    known = {"num_tokens": 4, "num_bytes": 4, "num_words": 2, "num_unk": 0, "size": 8}
    known = json.dumps([known | {"sha256": hashlib.sha256(b"one\n").hexdigest()}, {"kind": "byte"}])
    assert first == hashlib.sha256(known.encode()).hexdigest(), (
        "of the text, what it is in tokens, and the vocabulary"
    )
    assert first == sha256("one\n", "other\n")
    assert len({first, sha256("one", "two\n"), sha256("eno\n", "two\n")}) == 3


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
    if name not in ("open", "fdopen") or ast.unparse(call.func) == "os.open":
        return False
    places = call.args[0:1] if is_method and name == "open" else call.args[1:2]  # of the mode
    modes = [
        node.value
        for mode in [*places, *filter(None, [named.get("mode")])]
        for node in ast.walk(mode)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return not modes or any("b" not in mode for mode in modes)


SOURCES = [ROOT / "main.py", ROOT / "datasets.py", *sorted((ROOT / "extras").glob("*.py"))]


def test_every_text_file_is_opened_with_an_encoding():
    """A locale other than UTF-8 would change what is read, or fail at it."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and lacks_encoding(node):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found


@pytest.mark.parametrize(
    "line, lacks",
    [
        ("open(p)", True),
        ("open(p, 'a')", True),
        ("open(p, mode='w')", True),
        ("os.fdopen(1, 'w')", True),
        ("p.open()", True),
        ("p.open('r', errors='replace')", True),
        ("p.open('ab' if x else 'w')", True),
        ("p.read_text()", True),
        ("p.write_text(t)", True),
        ("p.read_text(errors='replace')", True),
        ("open(p, 'rb')", False),
        ("open(p, 'w', encoding='utf-8')", False),
        ("os.open(p, os.O_RDONLY)", False),
        ("p.open('ab' if x else 'wb')", False),
        ("p.read_text('utf-8')", False),
        ("p.write_text(t, 'utf-8')", False),
        ("read_text(entry, 'prompt')", False),
        ("webbrowser.new()", False),
    ],
)
def test_what_opens_a_text_file(line, lacks):
    assert lacks_encoding(ast.parse(line).body[0].value) == lacks


def test_a_locale_other_than_utf8_changes_nothing(tmp_path, bpe):
    """Neither the tokens nor a tokenizer that is read from a file with other characters than ASCII."""
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "text.txt").write_text("naïve — 漢字 and words\n" * 400, "utf-8")
    assert not bpe.vocabulary.isascii()
    (tmp_path / "gpt2" / "tokenizer.json").write_text(bpe.vocabulary, "utf-8")
    program = """
import hashlib, json, sys
from pathlib import Path
import datasets
path = Path("gpt2/tokenizer.json")
datasets.FILES["tokenizer.json"] = (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
for kind in ("word", "gpt2", "word", "gpt2"):
    dataset = datasets.load_dataset("text", sys.argv[1], ["text.txt"], kind, mirror=".", say=str)
    print(dataset.sha256, json.dumps(dataset.tokenizer.to_dict()))
"""
    # The first is ASCII: Python 3.10 to 3.14 go by the locale where they are not told to read UTF-8.
    locales = {"ascii": {"PYTHONUTF8": "0", "LC_ALL": "C"}, "utf-8": {"PYTHONUTF8": "1"}}
    seen = []
    for name, env in locales.items():
        options = {"program": (), "env": {"PYTHONPATH": str(ROOT), **env}, "cwd": tmp_path}
        seen.append(run("-c", program, name, **options)[0])
    assert seen[0] == seen[1]
    assert seen[0].count("\n") == 4


def test_a_user_without_a_home(tmp_path):
    """As in a container: HOME is not set, and the system knows no user of that number."""
    program = """
import os, pwd
for name in ("HOME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
import datasets
print(datasets.CACHE)
"""
    out, err = run("-c", program, program=(), env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert (out, err) == (".cache/transformer-lm\n", "")


def test_paths_of_users(tmp_path, monkeypatch):
    uses = {path.name: path.read_text("utf-8").count("expanduser(") for path in SOURCES}
    assert uses.pop("datasets.py") == 2
    assert not any(uses.values()), "beside user_path and CACHE, which must not fail"
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    assert datasets.user_path("~/x") == "/home/somebody/x"
    assert datasets.user_path("a/~b") == "a/~b"
    with pytest.raises(UsageError, match="~no-such-user/x: no such user"):
        datasets.user_path("~no-such-user/x")
    (tmp_path / "~no-such-user").mkdir()
    assert datasets.user_path("~no-such-user") == "~no-such-user", (
        "the name of a file, which a shell leaves as it is"
    )


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
    out, err = prepare("--dataset", "python", "--save_dir", tmp_path)
    dataset = datasets.load_dataset("python", tmp_path, say=pytest.fail)
    assert err == ""
    assert "257" in out
    assert dataset.tokenizer.decode(dataset.train.tokens[:100]) in out
    for split in (dataset.train, dataset.valid, dataset.test):
        for count in (
            f"{len(split.tokens):,} tokens",
            f"{split.num_bytes:,} bytes",
            f"{split.num_words:,}",
        ):
            assert count in out


@pytest.mark.parametrize(
    "line, word",
    [
        ("--dataset ptbb", "ptbb"),
        ("--tokenizer words", "words"),
        ("--text missing.txt", "missing.txt"),
        ("--foo", "--foo"),
        ("--text {0} --valid_fraction 0", "--valid_fraction"),
        ("--text {0} --valid_fraction 2", "--valid_fraction"),
        ("--text {0} --tokenizer bpe --vocab_size 5", "--vocab_size"),
        ("--vocab_size many", "--vocab_size"),
        ("--text {0} --tokenizer {0}", "must be a Hugging Face tokenizer.json"),
        ("--valid_text {0}", "require --text"),
        ("--text {0} --save_tokenizer /nowhere/x.json", "cannot write /nowhere/x.json"),
        ("--train-tokens 0", "at least 1"),
        ("--text {0} --save_tokenizer {0}", "would overwrite"),
        ("--text {0}* --tokenizer bpe --save_tokenizer {0}", "would overwrite"),
        ("--text {0} --dataset ptb", "mutually exclusive"),
        ("--text=", "--text is empty"),
        (
            "--distill_from= --teacher_model m --teacher_prompts {0} --output o",
            "--distill_from is empty",
        ),
        ("--text {0} --tokenizer ~nosuchuser/t.json", "no such user"),
    ],
)
def test_mistakes_in_preparing(tmp_path, text, line, word):
    content = text.read_bytes()
    out, err = prepare(*line.format(text).split(), "--save_dir", tmp_path / "lm", status=2)
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("datasets.py: ")
    assert word in err, err
    assert text.read_bytes() == content


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """Files of Hugging Face's library: {name: path}. Of these only the last is lossless."""
    package = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizers")
    options = dict(vocab_size=400, show_progress=False)
    made = {
        "sentencepiece": package.SentencePieceBPETokenizer(),
        "unigram": package.SentencePieceUnigramTokenizer(),
        "wordpiece": package.BertWordPieceTokenizer(),
        "bytes": package.ByteLevelBPETokenizer(),
    }
    made["sentencepiece"].train_from_iterator(
        ROWS.split("\n"), special_tokens=["<unk>", "</s>"], **options
    )
    made["unigram"].train_from_iterator(
        ROWS.split("\n"), special_tokens=["<unk>"], unk_token="<unk>", **options
    )
    made["wordpiece"].train_from_iterator(ROWS.split("\n"), **options)
    made["bytes"].train_from_iterator(ROWS.split("\n"), special_tokens=["<eos>"], **options)
    for name, tokenizer in made.items():
        tokenizer.save(str(folder / f"{name}.json"))
    return {name: folder / f"{name}.json" for name in made}


def test_a_tokenizer_that_cuts_and_fills_texts(tokenizer_files, tmp_path):
    """As a file may say that was saved for the inputs of one model."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(tokenizer_files["bytes"]))
    ids = plain.encode(ROWS).ids
    plain.enable_truncation(5)
    plain.enable_padding(length=8)
    plain.save(str(tmp_path / "own.json"))
    tokenizer = datasets.read_tokenizer(tmp_path / "own.json")
    assert tokenizer.vocabulary != (tmp_path / "own.json").read_text(), (
        "what was encoded before is not used"
    )
    assert tokenizer.encode(ROWS).tolist() == ids
    assert len(ids) > 8
    assert [tokens.tolist() for tokens in tokenizer.encode_batch([ROWS, "the"])] == [
        ids,
        plain.encode("the").ids[:1],
    ]


def test_a_corpus_is_found_from_any_working_directory(tmp_path, monkeypatch):
    folder = tmp_path / "mirror" / "tinyshakespeare"
    folder.mkdir(parents=True)
    data = ROWS.encode()
    (folder / "input.txt").write_bytes(data)
    monkeypatch.setitem(datasets.FILES, "input.txt", (len(data), hashlib.sha256(data).hexdigest()))
    monkeypatch.chdir(tmp_path)
    made = datasets.load_dataset("tinyshakespeare", "lm", mirror=str(tmp_path / "mirror"), say=str)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets, "write_splits", lambda *_: pytest.fail("encoded again"))
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
    """Its ids are the library's own; what it does not know is named; a checkpoint holds all of it."""
    from tokenizers import Tokenizer

    path = tmp_path / "own.json"
    shutil.copy(tokenizer_files[name], path)
    theirs = Tokenizer.from_file(str(path))
    [text] = write(tmp_path / "text", [ROWS])
    dataset = datasets.load_dataset(
        "text", tmp_path / "lm", text=[text], valid_text=[text], tokenizer=str(path)
    )
    tokenizer = dataset.tokenizer
    ids_of_rows = theirs.encode(ROWS, add_special_tokens=False).ids
    assert dataset.train.tokens.tolist() == ids_of_rows
    assert tokenizer.encode("the fox").dtype == np.uint16
    assert tokenizer.eos == (eos and theirs.token_to_id(eos))
    assert tokenizer.unk == (unk and theirs.token_to_id(unk))
    assert tokenizer.num_special == (eos is not None) + (unk is not None)
    assert tokenizer.unknown("the ☃ fox") == (["☃"] if unk else [])
    if name == "bytes":
        assert tokenizer.decode(tokenizer.encode("a ☃\r\n\té")) == "a ☃\r\n\té"
    line = ["--text", text, *TINY, "--save_dir", tmp_path / "lm"]
    run(*line, "--tokenizer", path, "--num_iters", 2, "--max_tokens", 8)
    path.unlink()
    out, _ = run("--save_dir", tmp_path / "lm", "--num_iters", 4)
    assert "at iteration 4" in out
    assert "by file" in out
    out, err = run("--prompt", "the ☃ fox", "--save_dir", tmp_path / "lm", "--max_tokens", 8)
    assert len(out) > 1
    assert ("☃" in err) == (unk is not None)
    shutil.copy(tokenizer_files["unigram" if name == "bytes" else "bytes"], path)
    _, err = run(*line, "--tokenizer", path, "--num_iters", 6, status=2)
    assert "text or tokenizer of" in err
    assert "--new_model" in err


def test_a_tokenizer_file_of_any_name(tmp_path, monkeypatch):
    """Also of that which its kind has in checkpoints; a kind of tokenizer comes before a file of its name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(datasets.argparse.ArgumentTypeError, match="'file' is neither auto, byte"):
        datasets.tokenizer_name("file")
    for name, expected in (("file", str(tmp_path / "file")), ("byte", "byte")):
        (tmp_path / name).touch()
        assert datasets.tokenizer_name(name) == expected


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe"])
def test_saved_tokenizer_has_the_same_ids(kind, tmp_path):
    [text] = write(tmp_path / "text", [ROWS])
    line = ["--text", text, "--tokenizer", kind, "--vocab_size", 300, "--save_dir", tmp_path / "lm"]
    out, _ = prepare(*line, "--train-tokens", 70, "--save_tokenizer", tmp_path / "own.json")
    assert "            70 tokens" in out
    again, _ = prepare(
        *line[:2], "--tokenizer", tmp_path / "own.json", "--save_dir", tmp_path / "lm"
    )
    counts = [re.findall(r"[\d,]+ tokens", out)[1:] for out in (out, again)]
    assert counts[0] == counts[1]
    one, other = (
        datasets.load_dataset(
            "text", tmp_path / "lm", text=[text], tokenizer=tokenizer, vocab_size=300
        )
        for tokenizer in (kind, str(tmp_path / "own.json"))
    )
    for split in ("train", "valid"):
        np.testing.assert_array_equal(getattr(one, split).tokens, getattr(other, split).tokens)
    assert (one.tokenizer.eos, one.tokenizer.unk) == (other.tokenizer.eos, other.tokenizer.unk)
    assert one.train.num_unk == other.train.num_unk


def test_own_validation_and_test_text(tmp_path):
    """The same counts as main.py's, which has the same flags."""
    import main

    paths = write(tmp_path / "text", [ROWS, ROWS[:3000], ROWS[4000:5000]])
    out, _ = prepare(
        "--text",
        paths[0],
        "--valid_text",
        paths[1],
        "--test_text",
        paths[2],
        "--save_dir",
        tmp_path / "lm",
    )
    assert [
        f"{len(part.encode()):,} tokens" in out for part in (ROWS, ROWS[:3000], ROWS[4000:5000])
    ] == 3 * [True]
    rows = {name: main.FLAGS["run"][name] for name in datasets.DATA_FLAGS}
    assert rows == datasets.DATA_FLAGS
    assert set(main.DATA) <= set(rows)


def test_the_usual_folder(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "usual_folder", lambda: tmp_path / "usual")
    dataset = datasets.load_dataset("text", text=[text])
    assert len(dataset.train.tokens)
    assert (tmp_path / "usual" / "text").is_dir()


def test_a_tilde_in_save_dir(tmp_path, text):
    """The shell leaves it alone behind an =."""
    line = ["--text", text, "--save_dir=~/lm"]
    prepare(*line, env={"HOME": str(tmp_path)}, cwd=tmp_path)
    assert (tmp_path / "lm" / "text").is_dir()
    assert not (tmp_path / "~").exists()


def test_what_is_prepared_is_used(tmp_path, text):
    """Whatever way the path is written."""
    prepare("--text", os.path.relpath(text), "--save_dir", tmp_path / "lm")
    import main

    line = ["--text", text, *TINY, "--num_iters", 1, "--save_dir", tmp_path / "lm"]
    assert main.main([str(argument) for argument in line]) == 0
    assert len([path for path in (tmp_path / "lm" / "text").iterdir() if path.is_dir()]) == 1


def test_streams_that_cannot_take_it_all(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("naïve — text\n" * 300, "utf-8")
    line = ["--text", path, "--save_dir", tmp_path / "lm"]

    out, err = prepare(*line, env={"PYTHONIOENCODING": "ascii"})
    assert "na?ve ? text" in out
    assert err == ""
    read, write = os.pipe()
    os.close(read)  # a reader that has left
    assert prepare(*line, stdout=write, status=1)[1] == ""
    os.close(write)
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            _, err = prepare(*line, stdout=full, status=1)
        assert err.count("\n") == 1
        assert err.startswith("datasets.py: ")
        assert "No space left" in err
    command = " ".join(map(str, [sys.executable, DATASETS, *line, ">&-", "2>&-"]))
    assert subprocess.run(["sh", "-c", command]).returncode == 0, "both are closed from the start"


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
    line = ["--dataset", "ptb", "--mirror", address, "--save_dir", tmp_path / "lm"]
    if task == "collect":
        (tmp_path / "prompts.txt").write_text("one\ntwo\n")
        line = [
            "--distill_from",
            address,
            "--teacher_model",
            "m",
            "--teacher_prompts",
            tmp_path / "prompts.txt",
        ]
        line += ["--output", tmp_path / "out"]
    process = start(*line, program=[DATASETS])
    assert waiting_server.is_waited_for.wait(60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert (out, err) == ("", "")
    if task == "collect":
        [line] = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
        assert json.loads(line)["completion"] == "yes", "what was paid for is kept"


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX then compiles nothing")
@pytest.mark.parametrize("place", ["missing", "text.txt"])
def test_no_folder_for_temporary_files(tmp_path, text, place):
    """MLX compiles there."""
    line = ["--text", text, *TINY, "--num_iters", 1, "--save_dir", tmp_path / "lm"]
    _, err = run(*line, env={"TMPDIR": str(tmp_path / place)}, status=1)
    assert err.count("\n") == 1
    assert err.startswith("main.py: ")
    assert "TMPDIR" in err, err


KINDS = ["word", "char", "byte", "bpe"]
SCORE = r"^{} ([\d.]+) nats, perplexity ([\d.]+) per (word|token)(?:, ([\d.]+) per word)?, ([\d.]+) bits per byte"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the text that tiny models were trained on, one by each tokenizer, in folders of that name; and what
    the trainings printed."""
    folder = tmp_path_factory.mktemp("trained")
    paths = write(folder, [ROWS, ROWS[:4000], ROWS[5000:8000]])
    texts = [
        "--text",
        paths[0],
        "--valid_text",
        paths[1],
        "--test_text",
        paths[2],
        "--vocab_size",
        300,
    ]
    line = [
        *texts,
        *TINY,
        "--num_iters",
        20,
        "--steps_per_eval",
        20,
        "--eval_tokens",
        0,
        "--eval_test",
    ]
    return folder, [
        run(*line, "--tokenizer", kind, "--save_dir", folder / kind)[0] for kind in KINDS
    ]


def test_checkpoint_answers_without_its_corpus(trained, tmp_path):
    folder, _ = trained
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        files = [
            path
            for path in (folder / kind).iterdir()
            if path.suffix in (".safetensors", ".metadata")
        ]
        assert len(files) == 2
        for path in files:
            shutil.copy(path, tmp_path / kind)
        line = ["--inference", "--save_dir", tmp_path / kind, "--max_tokens", 20]
        out, err = run(*line, input="the quick ☃ fox\n")
        assert len(out.strip()) > 3, (kind, out, err)
        assert ("☃" in err) == (kind in ("word", "char")), "a note on what it does not know"


def test_evaluate_gives_the_number_of_training(trained):
    folder, outs = trained
    for name in ("valid", "test"):
        for kind, out in zip(KINDS, outs):
            score, _ = run("--evaluate", name, "--save_dir", folder / kind)
            lines = [line for line in out.splitlines() if line.startswith(f"{name} ")]
            speed = r", [\d,]+ tokens/s"
            latency = r" \([\d.]+ s, [\d.]+ ms per token\)\n"
            assert [re.sub(f"{speed}$", "", line) for line in lines] == [
                re.sub(f"{speed}{latency}$", "", score)
            ]


def test_scores_are_in_the_same_unit(trained):
    folder, outs = trained
    for kind, out in zip(KINDS, outs):
        names = {
            "text": [folder / "000.txt"],
            "valid_text": [folder / "001.txt"],
            "test_text": [folder / "002.txt"],
        }
        dataset = datasets.load_dataset(
            "text", folder / kind, **names, tokenizer=kind, vocab_size=300
        )
        for name, text in (("valid", ROWS[:4000]), ("test", ROWS[5000:8000])):
            nats, perplexity, unit, per_word, bits = re.search(
                SCORE.format(name), out, re.M
            ).groups()
            nats, perplexity, bits = float(nats), float(perplexity), float(bits)
            total = nats * len(getattr(dataset, name).tokens)
            assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
            assert bits == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-3)
            words = len(text.split()) + text.count("\n")
            if kind == "word":
                assert unit == "word"
                assert per_word is None
                assert len(getattr(dataset, name).tokens) - words in (0, 1), (
                    "an <eos> at the end, too"
                )
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
