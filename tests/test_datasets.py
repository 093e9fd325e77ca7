"""Tokenizers, encoding, splits of own text, and the cache of tokens on disk."""

import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import DATASETS, ROOT, TINY, documents_of, run
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import SPLITS, TOKENIZERS, ByteTokenizer, CharTokenizer, PackageTokenizer
from datasets import WordTokenizer, encode_after, load_dataset, tokenizer_from_dict
from support.cli import UsageError
from support.files import absolute_pattern, new_file, sync, user_path

# Line 1 ends at its \n only: \x0c, \x85, \u2028 and CR separate words but end no line. Line 2 is
# blank.
TEXT = "b a b\n\n a\x0cb \x85 é\u2028c\r\n<unk> x\n"
ROWS = "".join(
    f"line {i}: the quick brown fox — jümps over {i * i} lazy dogs\n" for i in range(300)
)


def lay(folder, files):
    """Writes {name: text or bytes} into a folder, which is returned."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write(folder, documents):
    """A file each, of which the paths are returned."""
    files = {f"{i:03}.txt": document for i, document in enumerate(documents)}
    lay(folder, files)
    return [folder / name for name in files]


def texts_of(folder, *text, **options):
    """The text of each split, in bytes, with | for the end token between files."""
    dataset = load_dataset("text", folder / "data", text, "byte", **options)
    splits = {name: getattr(dataset, name) for name in SPLITS}
    return {name: "|".join(documents_of(split)) for name, split in splits.items() if split}


def prepare(*arguments, **options):
    return run(*arguments, program=[DATASETS], **options)


# ---- Tokenizers ---------------------------------------------------------------------------------


def test_words():
    tokenizer = WordTokenizer.train([TEXT])
    # counts: <eos> 4, b 3, a 2, the others 1 each
    assert tokenizer.vocabulary == ["<eos>", "b", "a", "<unk>", "c", "x", "é"]
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.unk) == (7, 0, 3)
    tokens = tokenizer.encode(TEXT)
    assert tokens.tolist() == [1, 2, 1, 0, 0, 2, 1, 6, 4, 0, 3, 5, 0]
    assert tokenizer.decode(tokens) == "b a b\n\na b é c\n<unk> x\n"
    # A prompt that does not end its line gets no <eos>; half a character is an unknown word.
    assert tokenizer.encode("nie a\n\ud800 b").tolist() == [3, 2, 0, 3, 1]
    assert tokenizer.unknown("b nie a\nda <unk> \ud800") == ["nie", "da", "\ud800"]


WHITE = "\t\n\r\x0b\x0c\x1c\x85\xa0\u2028 "


@given(st.text("ab" + WHITE, max_size=60))
def test_word_agrees_with_a_line_reader(text):
    tokenizer = WordTokenizer.train([text])
    words = []
    for line in io.StringIO(text, newline="\n"):  # splits at \n alone
        words += line.split()
        if line.endswith("\n"):
            words.append("<eos>")
    ids = tokenizer.encode(text)
    assert [tokenizer.vocabulary[i] for i in ids] == words
    assert tokenizer.decode(ids).split() == text.split()


def test_characters():
    tokenizer = CharTokenizer.train(["bé\n", "ab"])
    assert tokenizer.vocabulary == "\nabé"
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.unk) == (5, None, 4)
    assert tokenizer.encode("aéb\n").tolist() == [1, 3, 2, 0]
    # A surrogate pair is the one character that its writer meant. Half a pair is one, too.
    assert tokenizer.encode("a😀z\ud800\ud800\udc00\udcff").tolist() == [1, 4, 4, 4, 4, 4]
    assert tokenizer.decode([1, 4]) == "a\ufffd"
    assert tokenizer.unknown("zab\ud800z") == ["z", "\ud800"]


def test_bytes():
    """The command line's bytes that are not UTF-8 arrive as surrogates; the ids are those bytes."""
    raw = bytes(range(256))
    text = raw.decode("utf-8", "surrogateescape")
    assert ByteTokenizer().encode(text).tolist() == list(raw)
    # What is no byte is a character, or none.
    assert bytes(ByteTokenizer().encode("\ud83d\ude00\ud83d").tolist()) == "😀\ufffd".encode()
    # <eos> prints nothing, half a character one mark.
    assert ByteTokenizer().decode([104, 256, 105, 0xFF]) == "hi\ufffd"


@pytest.fixture(scope="module")
def bpe():
    words = "the quick brown fox — jümps over the lazy dogs 漢字\n"
    return PackageTokenizer.train([TEXT * 3, words * 20], 320)


def test_bpe(bpe):
    tokens = bpe.encode("a<|endoftext|>b")
    assert tokens.tolist().count(bpe.eos) == 1
    assert bpe.decode(tokens) == "a<|endoftext|>b"
    assert bpe.decode(bpe.encode("a\udcffb")) == "a\ufffdb"  # what UTF-8 cannot hold


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trips(bpe, text):
    """Bytes and subwords are lossless on any text, characters on their own."""
    for tokenizer in (ByteTokenizer(), bpe, CharTokenizer.train([text])):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokenizer.unknown(text) == []


@pytest.mark.parametrize("data", [
    {"kind": "char", "vocabulary": ["ab"]},
    {"kind": "word", "vocabulary": ["<eos>", "a"]},
    {"kind": "word", "vocabulary": ["<eos>", "<unk>", 0.5]},
    {"kind": "byte", "vocabulary": "a"},
])  # fmt: skip
def test_what_is_no_tokenizer(data):
    with pytest.raises(UsageError, match="^the tokenizer cannot be used"):
        tokenizer_from_dict(data)


@pytest.mark.parametrize("largest", [65_535, 65_536])
def test_ids_may_be_large_and_have_gaps(largest):
    words = tokenizers.models.WordLevel({"a": 0, "b": largest}, "a")
    tokenizer = PackageTokenizer(tokenizers.Tokenizer(words).to_str())
    assert tokenizer.vocab_size == largest + 1
    assert tokenizer.encode("b").tolist() == [largest]


# A class of the package tokenizers, its special tokens, its end token and its unknown one.
@pytest.mark.parametrize("name, specials, eos, unk", [
    ("SentencePieceBPETokenizer", ["<unk>", "</s>"], "</s>", "<unk>"),
    ("SentencePieceUnigramTokenizer", ["<unk>"], None, "<unk>"),
    ("BertWordPieceTokenizer", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], None, "[UNK]"),
    ("ByteLevelBPETokenizer", ["<eos>"], "<eos>", None),
])  # fmt: skip
def test_tokenizer_of_a_file(name, specials, eos, unk, tmp_path):
    """Its ids are the library's own, of whole texts even if it says that inputs are cut or filled.

    What it does not know is named.
    """
    theirs = getattr(tokenizers, name)()
    options = {"unk_token": unk} if "Unigram" in name else {}
    theirs.train_from_iterator(ROWS.split("\n"), 400, special_tokens=specials, **options)
    expected = theirs.encode(ROWS, add_special_tokens=False).ids
    theirs.enable_truncation(5)
    theirs.enable_padding(length=8)
    file = tmp_path / "own.json"
    theirs.save(str(file))
    paths = write(tmp_path / "text", [ROWS])
    dataset = load_dataset("text", tmp_path / "lm", paths, file, valid_text=paths)
    tokenizer = dataset.tokenizer
    assert dataset.train.tokens.tolist() == expected
    assert tokenizer.eos == (eos and theirs.token_to_id(eos))
    assert tokenizer.unk == (unk and theirs.token_to_id(unk))
    assert tokenizer.unknown("the ☃ fox") == (["☃"] if unk else [])


@pytest.mark.parametrize("dtype, added", [(np.int64, 0), (np.uint16, 256)])
def test_ids_that_cannot_be_stored_or_looked_up(dtype, added, tmp_path):
    class Mine(ByteTokenizer):
        def encode(self, text):
            return (super().encode(text) + added).astype(dtype)

    with pytest.raises(UsageError, match="byte must give ids below its vocab_size, 257, as uint16"):
        encoded(tmp_path, ["hello"], Mine())


def test_neither_locale_nor_hash_seed_changes_tokens(tmp_path, bpe):
    # All words are equally frequent, so an order that a set or dict lent would show.
    words = [f"é{i * 7919 % 1000}{chr(0x4E00 + i * 7919 % 1000)} " for i in range(1000)]
    (tmp_path / "text.txt").write_text("".join(words) + "\n", "utf-8")
    (tmp_path / "own.json").write_text(bpe.vocabulary, "utf-8")
    # ASCII: Python 3.10 to 3.14 go by the locale where they are not told to read UTF-8.
    plain = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONHASHSEED": "1"}
    for kind in ("word", "char", "bpe", "own.json"):
        found = set()
        for env in (plain, {"PYTHONUTF8": "1", "PYTHONHASHSEED": "2"}):
            folder = tmp_path / f"{kind}{len(env)}"
            line = ["--text", "text.txt", "--tokenizer", kind, "--vocab_size", 700]
            prepare(*line, "--data_dir", folder, env=env, cwd=tmp_path)
            [path] = folder.glob("text/*/train.tokens")
            found.add(path.read_bytes())
        assert len(found) == 1


# ---- Encoding -----------------------------------------------------------------------------------


def encoded(folder, documents, tokenizer):
    """The documents as a Split: a file each, all of them for training."""
    paths = write(folder, documents)
    options = {"text": paths, "valid_text": paths, "tokenizer": tokenizer}
    return load_dataset("text", folder / "data", **options).train


def test_documents_are_separated(tmp_path):
    """As their tokenizer does: by an end token, or by lines."""
    split = encoded(tmp_path / "byte", ["hé\n", "", "a b"], ByteTokenizer())
    assert split.tokens.tolist() == [104, 0xC3, 0xA9, 10, 256, 97, 32, 98]
    assert split[1:] == (7, 4, 0)  # bytes; words hé, a, b and one line end; <unk>
    words = WordTokenizer(["a", "b", "<eos>", "<unk>"])
    split = encoded(tmp_path / "word", ["a b", "b\n", "\na é"], words)
    assert split.tokens.tolist() == [0, 1, 2, 1, 2, 2, 0, 3, 2]
    assert split[1:] == (10, 7, 1)
    characters = CharTokenizer("\nab")
    split = encoded(tmp_path / "char", ["ab", "", "ba\n", "b"], characters)
    assert characters.decode(split.tokens) == "ab\nba\nb"


PIECES = ["a", "bc", "it's", "12", "!?", "漢字", "かな", "😀", "é", "<|endoftext|>", "<unk>"]
# Awkward white space.
PIECES += [" ", "  ", "\t", "\tq\t\tr", "\n", "\n\n", "\n\n  x", " \n y", "\r\n", "\n \t\n"]
PIECES += ["\n\xa0x", "\n\x1cx", "\x0b", "\x1c", "\x1f\n", "\x85", "\xa0", "\u2028", "\u3000"]


@pytest.mark.parametrize("kind", ["byte", "char", "word", "bpe"])
@pytest.mark.parametrize("pieces", [
    PIECES,
    [piece for piece in PIECES if "\n" not in piece],
    ["word ", "it's\r\n", "\r\n"],
    ["word "],
    ["\n"],
    ["漢字"],
    ["漢字" * 26 + "\n\n", "かな。\n\u3000\u3000"],  # more than is kept at once, no single space
], ids=["awkward", "no line ends", "Windows", "one line", "blank lines", "one word",
        "Chinese"])  # fmt: skip
def test_blocks_have_the_ids_and_counts_of_the_whole(kind, pieces, tmp_path):
    """A text that is not encoded at once."""
    text = "".join(random.Random(8).choices(pieces, k=80_000)) + "x"
    if kind == "bpe":
        text = text[:400_000]  # it is slow
    tokenizer = TOKENIZERS[kind].train([text[:20_000]], 400)
    split = encoded(tmp_path, [text], tokenizer)
    expected = tokenizer.encode(text).tolist()
    if kind == "word":
        expected.append(tokenizer.eos)
    assert split.tokens.tolist() == expected
    assert split.num_bytes == len(text.encode())
    assert split.num_words == len(text.split()) + text.count("\n")


def test_a_space_that_a_tokenizer_puts_before_a_text_stands_there_alone(tmp_path):
    """Not before each block, nor before what goes on behind a prompt."""
    theirs = tokenizers.SentencePieceBPETokenizer()  # as of Llama 2
    theirs.train_from_iterator([ROWS], 300)
    tokenizer = PackageTokenizer(theirs.to_str(), "file")
    text = "".join(random.Random(8).choices(ROWS.split(" ") + ["\n", " ", " "], k=80_000))
    split = encoded(tmp_path, [text], tokenizer)
    assert split.tokens.tolist() == tokenizer.encode(text).tolist()
    for before, after in (("the", " lazy"), ("q", "ver"), ("", "fox"), ("qu", "ick")):
        [ids] = encode_after(tokenizer, [(after, before[-1:])])
        joined = tokenizer.decode([*tokenizer.encode(before), *ids])
        assert joined == before + after


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Even if it is a single line, or a single word."""
    program = """
import pathlib, sys, datasets
datasets.load_dataset("text", sys.argv[1], text=sys.argv[2:], tokenizer="byte")
print(pathlib.Path("/proc/self/status").read_text())
"""
    peaks = []
    for size in (8, 24):  # MB
        files = {"lines": b"words of a line\n" * (size << 16), "word": b"x" * (size << 20)}
        folder = lay(tmp_path / str(size), files)
        command = [sys.executable, "-c", program, tmp_path / f"data{size}", folder]
        out = subprocess.check_output(command, cwd=ROOT)
        peaks.append(int(re.search(rb"VmHWM:\s+(\d+) kB", out)[1]))
    assert peaks[1] / peaks[0] < 1.4  # pages of the mapped tokens count, too


def test_bpe_of_a_single_word_is_learned_quickly():
    """A genome, or text of a language without spaces: in seconds, where it took minutes."""
    genome = "".join(random.Random(0).choices("ACGT", k=300_000))
    tokenizer = PackageTokenizer.train([genome], 600)
    assert tokenizer.vocab_size == 600


# ---- Own text: what is read ---------------------------------------------------------------------

FILES = {
    "a.txt": "a",
    "b.md": "b",
    "sub/c.py": "c",
    "sub/deep/d": "é",
    "data/ids": "own",
    "runs/x-123456/log.csv": "own",
    "old/text-123456/samples.jsonl": "no",  # of a run that this command does not use
    f"old/text-123456/{40 * '0'}.metadata": "no",
    ".hidden": "no",
    ".git/config": "no",
    "sub/.x/y.txt": "no",
    "image.png": b"\x89PNG\r\n\0",
    "latin": b"na\xefve",
    "nul.bin": b"a\0b",
    "valid.txt": "valid",
}


@pytest.fixture
def find(tmp_path, monkeypatch):
    """A function: the texts that patterns match among FILES. Checkpoints are in runs/."""
    lay(tmp_path, FILES)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"valid_text": [tmp_path / "valid.txt"], "save_dir": "~/runs"}

    def find(*patterns):
        paths = [tmp_path / pattern for pattern in patterns]
        return texts_of(tmp_path, *paths, **options)["train"]

    return find


def test_folders_and_patterns(find, tmp_path, capsys):
    assert find("") == "a|b|c|é"  # in order, and nothing of the program's own
    out = capsys.readouterr().out
    assert f"{tmp_path}: leaving out what is no readable UTF-8 text: " in out
    assert find("*") == find("")  # a pattern is no other than a folder
    assert find("sub") == "c|é"
    assert find("sub/.x") == "no"  # named by the user
    assert find("**/*.py", "b.md") == "c|b"
    assert find("b.md", "a.txt", "*.md", "", "sub") == "b|a|c|é"  # each once
    # Checkpoints and corpora are no text, unless they are named outright.
    assert find("r*", "a.txt", "sub") == "a|c|é"
    assert find("runs/x-123456/log.csv", "data/ids") == "own|own"
    assert find("runs/x-123456") == "own"
    (tmp_path / "link").symlink_to("runs")
    for folder in ("runs", "data", "link", "**/*.csv"):
        with pytest.raises(UsageError, match="there is no text in .* --save_dir and --data_dir"):
            find(folder)


@pytest.mark.parametrize("folder", ["notes[1]", "a*b", "what?", "$HOME", "[!x]"])
def test_what_was_not_typed_is_no_pattern(folder, tmp_path, monkeypatch):
    """Nor a variable: the names of folders around, by a pattern, a path and a recorded path."""
    here = lay(tmp_path / folder / "in", {"a.txt": "own\n" * 9})
    lay(tmp_path / "notes1" / "in", {"a.txt": "other\n" * 9})
    lay(tmp_path / "axb" / "in", {"a.txt": "other\n" * 9})
    monkeypatch.chdir(here)
    assert user_path(here / "new") == str(here / "new")
    monkeypatch.setenv("FOLDER", str(tmp_path))
    assert user_path("$FOLDER/new") == f"{tmp_path}/new"
    for path in ("*.txt", "a.txt", ".", here / "*.txt", absolute_pattern("*.txt")):
        if path != here / "*.txt" or folder == "$HOME":  # there, it was typed
            assert texts_of(tmp_path, path) == {"train": "own\n" * 8, "valid": "own\n"}


def test_markup_is_read_as_it_stands_which_is_said(tmp_path, capsys):
    """So are line ends of Windows."""
    files = {name: f"<b>{name}</b>\n" * 9 for name in ("a.HTML", "b.csv", "c.ipynb", "d.txt")}
    folder = lay(tmp_path / "c", files)
    (folder / "e.txt").write_bytes(b"yes\r\nno\r\n")
    texts_of(tmp_path, folder)
    said = capsys.readouterr().out
    assert "read as they stand, with all their signs: c/a.HTML, c/b.csv, c/c.ipynb\n" in said
    assert f"{folder}: with line ends of Windows, CR LF, which stay: c/e.txt\n" in said


def test_links_are_followed_once(find, tmp_path):
    """To folders elsewhere; in a loop; to a file that is read by its own name."""
    elsewhere = lay(tmp_path / "elsewhere", {"e.txt": "ee"})
    sub = tmp_path / "sub"
    (sub / "books").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(sub)
    (sub / "z.txt").symlink_to("c.py")
    (sub / "gone.txt").symlink_to("nowhere")
    os.mkfifo(sub / "pipe")  # to open it would wait for ever
    assert sorted(find("sub").split("|")) == ["c", "ee", "é"]


@pytest.mark.parametrize("name, words", [
    ("*.html", "no such file"),
    ("/dev/null", "is a pipe, a device or a"),
    ("a.bin", "a.bin is not UTF-8 at byte 0: it is no plain text: leave it out"),
    ("", "a.bin is not UTF-8 at byte 0: it is no plain text: leave it out"),  # its folder
])  # fmt: skip
def test_what_is_no_text(name, words, tmp_path):
    lay(tmp_path, {"a.bin": b"\xff\x01ab"})
    with pytest.raises(UsageError, match=words):
        texts_of(tmp_path, tmp_path / name)


ENGLISH = "“Déjà vu”, said Zoë – naïvely.\n" * 20
REMEDIES = {  # how a text is saved -> its bytes
    "UTF-16": ENGLISH.encode("utf-16"),
    "UTF-16, big-endian": b"\xfe\xff" + ENGLISH.encode("utf-16-be"),
    "Windows": ENGLISH.encode("cp1252"),
    "damaged": ENGLISH.encode() + b"\xff\n",
    "beyond the first block": ENGLISH.encode() * 400 + b"\xe2\x28\xa1\n" + b"a" * 1000,
}


@pytest.mark.skipif(not shutil.which("iconv"), reason="needs iconv")
@pytest.mark.parametrize("name", REMEDIES)
def test_the_remedy_gives_the_text(name, tmp_path):
    """The command in the message, when pasted."""
    path = tmp_path / "my notes"
    path.write_bytes(REMEDIES[name])
    with pytest.raises(UsageError) as error:
        texts_of(tmp_path, path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    [command] = re.findall("iconv .* > NEW", message)
    subprocess.run(command, shell=True, cwd=tmp_path, stderr=subprocess.DEVNULL)
    new = tmp_path / "NEW"
    assert "Déjà vu" in texts_of(tmp_path, new, valid_text=[new])["train"]


def test_bytes_of_user_text_are_untouched(tmp_path):
    """But for a byte-order mark, which Windows puts before each file."""
    text = "one\r\ntwo\rthree\x01\x0c \ufeff\n" * 50
    path = tmp_path / "a.txt"
    path.write_text("\ufeff" + text, newline="")
    assert "".join(texts_of(tmp_path, path).values()) == text


# ---- Own text: its splits -----------------------------------------------------------------------


LINES = "012345678\n" * 100  # 1,000 characters


@pytest.mark.parametrize("count, fraction", [(20, 0.25), (40, 0.001)])
def test_many_files_are_split_by_their_names(tmp_path, capsys, count, fraction):
    """Whole: those with low hashes, at least one. A new file moves none, nor another folder."""
    documents = [f"document {i}" for i in range(count)]
    folder = tmp_path / "old"
    places = {}  # of names
    for path in write(folder, documents):
        digest = hashlib.sha256(path.name.encode()).hexdigest()
        places[path.name] = int(digest, 16) / 16**64
    limit = max(fraction, min(places.values()))
    valid = [text for text, place in zip(documents, places.values()) if place <= limit]
    train = [text for text in documents if text not in valid]
    (folder / "first").symlink_to(folder)
    for paths in ([folder], [folder / "*.txt"], [*folder.glob("*.txt")]):
        splits = texts_of(tmp_path, *paths, valid_fraction=fraction)
        assert {name: sorted(text.split("|")) for name, text in splits.items()} == {
            "train": sorted(train), "valid": sorted(valid)
        }  # fmt: skip
        assert "whole files, as there are 20 or more: " in capsys.readouterr().out
    (folder / "0-new.txt").write_text("new")
    moved = texts_of(tmp_path, folder, valid_fraction=fraction)["valid"].split("|")
    assert {*moved} - {"new"} == {*valid}


def test_of_few_files_each_ones_end_is_held_out(tmp_path, capsys):
    paths = write(tmp_path, [LINES, LINES[::-1] * 9])
    splits = texts_of(tmp_path, *paths)
    ends = [LINES[-100:], (LINES[::-1] * 9)[-899:]]
    assert splits["valid"] == "|".join(ends)
    assert "10.0% of the bytes: the end of each file\n" in capsys.readouterr().out


@pytest.mark.parametrize("text, fraction, cut", [
    (LINES, 0.1, 900),  # a line ends right there
    (LINES, 0.155, 850),  # 845 is within a line
    (LINES, 0.149, 860),  # 851 is one past a line end
    ("x" * 5000, 0.1, 4500),  # no line end at all
    ("x" * 4500 + "y" * 2000 + "\n" + "z" * 100, 0.5, 3300),  # none near
    (LINES.replace("0", "é"), 0.1, 900),  # counted in bytes, of which each line has 11
    ("a" + "😀" * 1000, 0.3, 701),  # no character is cut
])  # fmt: skip
def test_one_file_is_cut_behind_a_line(tmp_path, text, fraction, cut):
    splits = texts_of(tmp_path, *write(tmp_path, [text]), valid_fraction=fraction)
    assert splits == {"train": text[:cut], "valid": text[cut:]}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text("é \n\r😀x", max_size=300), max_size=6))
def test_user_text_loses_nothing(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("own")
    documents = ["begin\n" * 9, *documents]  # enough for both splits
    paths = write(folder, documents)
    splits = texts_of(folder, *paths, valid_fraction=0.125)
    found = "".join(splits.values()).replace("|", "")
    assert sorted(found) == sorted("".join(documents))


def test_what_is_held_out_is_not_trained_on(tmp_path, capsys):
    """Even where --text names its folder, or it by itself."""
    a, b, c = write(tmp_path / "text", ["aa\n", "bb\n", "cc\n"])
    (tmp_path / "link").symlink_to(tmp_path / "text")
    other = {"valid_text": [b], "test_text": [tmp_path / "link" / c.name]}
    for paths in ([tmp_path / "text"], [a, b, c], [tmp_path / "link"]):
        splits = texts_of(tmp_path, *paths, **other)
        assert splits == {"train": "aa\n", "valid": "bb\n", "test": "cc\n"}
        out = capsys.readouterr().out
        assert out.startswith("Not training on what is for validation or testing: ")
        assert b.name in out and c.name in out and a.name not in out
    # Whoever names the same files for both wants that, and is told when a run begins.
    assert texts_of(tmp_path, a, valid_text=[a]) == {"train": "aa\n", "valid": "aa\n"}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("names", [
    "train.txt valid.txt test.txt",
    "train-00000-of-00001.txt validation-00000-of-00001.txt test-00000-of-00001.txt",
    "train/a.txt dev/a.txt test/a.txt",
    "en/train.txt en/valid.txt en/test.txt",
    "wiki.train.tokens wiki.valid.tokens wiki.test.tokens",
])  # fmt: skip
def test_files_that_are_splits_by_their_names(names, tmp_path):
    files = dict(zip([*names.split(), "zz"], ["train\n", "valid\n", "test\n", "more\n"]))
    folder = lay(tmp_path / "test_corpus", files)  # whose own name counts for nothing
    expected = {"train": "train\n|more\n", "valid": "valid\n", "test": "test\n"}
    assert texts_of(tmp_path, folder) == expected
    for path in folder.glob("**/*train*"):
        path.rename(path.with_name("a train ride.txt"))
    assert "test" not in texts_of(tmp_path, folder), "no file is for training by its name"


PATHS = ["c", "c/*", "c/train c/valid", "c/*/*", "c/**/*.txt", "c/valid c"]
IN_FOLDERS = {"train/a.txt": "train", "valid/a.txt": "valid"}


@pytest.mark.parametrize("paths", PATHS)
def test_splits_however_they_are_named(paths, tmp_path):
    """By their folder, by a pattern, or by the paths that a shell makes of one."""
    lay(tmp_path / "c", IN_FOLDERS)
    found = [tmp_path / path for path in paths.split()]
    assert texts_of(tmp_path, *found) == {"train": "train", "valid": "valid"}


@pytest.mark.parametrize("command", [
    "ln -s valid/a.txt latest.txt",
    "ln -s valid current",
    "ln valid/a.txt all.txt",
    # As in the cache of a hub.
    "mv train 0; mv valid 1; mkdir train valid; ln -s ../0/a.txt train; ln -s ../1/a.txt valid",
])  # fmt: skip
def test_no_link_takes_a_text_into_training(command, tmp_path):
    folder = lay(tmp_path / "c", IN_FOLDERS)
    subprocess.run(command, shell=True, cwd=folder, check=True)
    assert texts_of(tmp_path, folder) == {"train": "train", "valid": "valid"}


@pytest.mark.parametrize("content", [b"", b"na\xefve", b"\x1f\x8b"])
def test_no_split_stands_for_one_that_cannot_be_used(content, tmp_path):
    files = {"train.txt": content, "valid.txt": "valid\n" * 9, "test.txt": "test\n" * 9}
    with pytest.raises(UsageError, match="train.txt is |no text is left for training"):
        texts_of(tmp_path, lay(tmp_path / "c", files))


def test_an_empty_file_named_for_training_is_cut_nowhere(tmp_path):
    files = {"train.txt": "", "zz.txt": LINES}
    splits = texts_of(tmp_path, lay(tmp_path / "c", files))
    assert splits == {"train": LINES[:900], "valid": LINES[900:]}


def test_a_picture_of_a_train_is_no_split(tmp_path):
    """Where nothing is named for validation or testing, it is left out as any other."""
    files = {"train.png": b"\x89PNG\r\n\0", "a.txt": "notes\n" * 20}
    assert "notes" in texts_of(tmp_path, lay(tmp_path / "c", files))["train"]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_files_held_out_by_their_names_beside_others(split, tmp_path):
    """A file that is given takes the place of one."""
    folder = lay(tmp_path / "corpus", {f"{name}.txt": name for name in SPLITS})
    splits = texts_of(tmp_path, folder, **{f"{split}_text": write(tmp_path, ["mine"])})
    assert splits == dict(zip(SPLITS, SPLITS)) | {split: "mine"}


def test_pieces_are_those_of_training(tmp_path):
    train, valid = write(tmp_path, ["ab ab\n" * 50, "zz zz\n" * 50])
    options = {"valid_text": [valid], "vocab_size": 300}
    dataset = load_dataset("text", tmp_path / "data", [train], "bpe", **options)
    assert len(dataset.tokenizer.encode("ab")) == 1
    assert len(dataset.tokenizer.encode("zz")) == 2, "never seen"


# ---- The cache ----------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path):
    """Files for --text, --valid_text and --test_text."""
    return write(tmp_path / "text", [ROWS, ROWS[:1000], ROWS[1000:3000]])


@pytest.fixture
def load(tmp_path, paths):
    """A function: the dataset of these files."""
    names = {"text": paths[:1], "valid_text": paths[1:2], "test_text": paths[2:]}

    def load(kind="word", **options):
        return load_dataset("text", tmp_path / "lm", **names, tokenizer=kind, **options)

    return load


def tokens_of(dataset):
    return [getattr(dataset, split).tokens.tolist() for split in SPLITS]


def written(folder):
    """When the tokens of a dataset were written."""
    return (folder / "train.tokens").stat().st_mtime_ns


def test_text_is_encoded_once_by_each_tokenizer(load):
    """What is read back is the same: tokens, counts, and a tokenizer that gives the same ids."""
    variants = [("word", 300), ("char", 300), ("byte", 300), ("bpe", 300), ("bpe", 310)]
    first = [load(kind, vocab_size=size) for kind, size in variants]
    times = [written(one.folder) for one in first]
    again = [load(kind, vocab_size=size) for kind, size in variants]
    for one, other, time in zip(first, again, times):
        assert written(other.folder) == time
        assert tokens_of(other) == tokens_of(one) and other.train[1:] == one.train[1:]
        assert load(other.tokenizer).sha256 == other.sha256 == one.sha256
    assert len({each.sha256["train"] for each in first}) == 5
    part = load(vocab_size=300, train_tokens=100)
    assert part.train.tokens.tolist() == first[0].train.tokens[:100].tolist()
    assert written(part.folder) == times[0]


@pytest.mark.parametrize("split", range(3))
@pytest.mark.parametrize("change", ["same size", "longer", "touched"])
def test_changed_text_is_encoded_anew(load, paths, split, change):
    """A process that has the old tokens keeps them. What has the same bytes is the same text."""
    first = load("byte")
    before = tokens_of(first)
    text = paths[split].read_text()
    changes = {"same size": text[:-2] + "!\n", "longer": text + "!", "touched": text}
    paths[split].write_text(changes[change])
    os.utime(paths[split], (1, 1))
    second = load("byte")
    assert tokens_of(first) == before
    assert (tokens_of(second) == before) == (change == "touched")
    same = second.sha256 == first.sha256
    assert same == (change == "touched" or split == 2)


def test_damaged_tokens_are_made_anew(load, capsys):
    first = load()
    before = tokens_of(first)
    for name in ("train.tokens", "valid.tokens", "about.json"):
        path = first.folder / name
        content = path.read_bytes()
        damaged = [b"", b"[1]", content[:-1]]
        for place in range(0, len(content), len(content) // 9):
            flipped = bytes([content[place] ^ 1])
            damaged.append(content[:place] + flipped + content[place + 1 :])
        for each in damaged:
            path.write_bytes(each)
            second = load()
            assert tokens_of(second) == before
            assert second.sha256 == first.sha256 and second.valid[1:] == first.valid[1:]
            assert f"{first.folder} is damaged" in capsys.readouterr().out


def test_dataset_knows_its_tokens(load, tmp_path):
    """Its identity is the SHA256 of the ids on disk and of the tokenizer, by split."""

    def sha256(train, valid):
        write(tmp_path / "text", [train, valid])
        return load("byte").sha256

    of_ids = hashlib.sha256(b"o\0n\0e\0\n\0").hexdigest()
    identity = json.dumps([of_ids, {"kind": "byte"}])
    first = sha256("one\n", "two\n")
    assert first["train"] == hashlib.sha256(identity.encode()).hexdigest()
    assert sha256("two\n", "one\n") == {"train": first["valid"], "valid": first["train"]}


def test_what_a_killed_process_had_begun_is_deleted(load):
    with new_file(load().folder) as file:
        left = Path(file.name)
    assert left.exists(), "it was not published"
    load()
    assert not left.exists()


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, errno.ENOSYS])
def test_a_disk_that_cannot_sync_folders_is_named_once(number, tmp_path, monkeypatch, capsys):
    """A file that cannot be synced was not saved, nor was one on a disk that fails."""

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    for _ in range(2):
        sync(tmp_path)
    assert capsys.readouterr().out.count(os.strerror(number)) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        sync(tmp_path / "file")
    number = errno.EIO
    with pytest.raises(OSError):
        sync(tmp_path)


# ---- Where files lie ----------------------------------------------------------------------------


WHERE = """
import io, os, pwd, shutil, sys, tempfile, types
if sys.argv[1] == "no home":
    os.environ.pop("HOME", None)
    pwd.getpwuid = lambda uid: {}[uid]
if "RAM disk" in sys.argv[1]:
    size = 2 << 30 if "small" in sys.argv[1] else 8 << 30
    os.path.ismount = lambda path: str(path) == "/Volumes/RAMDisk"
    shutil.disk_usage = lambda path: types.SimpleNamespace(total=size)
    tempfile.TemporaryFile = lambda dir: io.BytesIO()
    os.mkdir = lambda *_: None
from support import machine
from support.files import make_data_dir
from support.machine import make_kernel_dir
if sys.argv[1] == "another CPU":
    machine.cpu_info = lambda: "flags\t\t: fpu sse2"
print(make_kernel_dir())
assert make_kernel_dir() == make_kernel_dir()
print(make_data_dir())
"""


def where(folder, machine, **env):
    """Where compiled code and texts lie for a user with these variables, who is in a folder."""
    env = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": "", "HOME": str(folder / "home"), **env}
    out, err = run("-c", WHERE, machine, program=(), env=env, cwd=folder)
    assert err == ""
    return [*map(Path, out.splitlines())]


def test_where_code_and_texts_lie(tmp_path):
    code, data = where(tmp_path, "home")
    in_home = tmp_path / "home" / ".cache" / "transformer-lm"
    assert data == in_home
    assert code.parent == data and code.stat().st_mode & 0o777 == 0o700
    assert where(tmp_path, "another CPU")[0] != code, "it may lack instructions"
    code, data = where(tmp_path, "home", XDG_CACHE_HOME=str(tmp_path / "caches"))
    assert data == code.parent == tmp_path / "caches" / "transformer-lm"
    assert where(tmp_path, "RAM disk")[1] == Path("/Volumes/RAMDisk/transformer-lm")
    _, said, data = where(tmp_path, "small RAM disk")
    assert data == in_home
    assert said.is_relative_to("/Volumes") and "RAMDisk is not used" in str(said)
    # Without a home, what is in the working directory may be a stranger's.
    for relative in ("", ".cache", "~/.cache"):
        code, data = where(tmp_path, "no home", XDG_CACHE_HOME=relative)
        assert data == Path("runs")
        assert code.is_absolute() and not code.exists(), "it is gone at the end"


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")


@pytest.mark.parametrize("command", [
    pytest.param("chown 65534:65534 {0}", marks=needs_root),
    "mv {0} {0}.own; ln -s {0}.own {0}",
    "chmod 770 {0}",
])  # fmt: skip
def test_no_code_from_a_folder_that_another_user_has_made(tmp_path, command):
    own, _ = where(tmp_path, "home")
    subprocess.run(command.format(own), shell=True, check=True)
    code, _ = where(tmp_path, "home")
    assert not code.is_relative_to(tmp_path)


# ---- datasets.py as a program -------------------------------------------------------------------


def test_preparing_a_corpus(tmp_path, text):
    """Its sizes are printed, and it is what main.py trains on, whatever way the path is written."""
    line = ["--text", os.path.relpath(text), "--data_dir=~/lm"]
    out, err = prepare(*line, env={"HOME": str(tmp_path)})
    assert err == ""
    folder = Path(re.search("^in (.*)$", out, re.M)[1])
    assert folder.is_relative_to(tmp_path / "lm" / "text")
    for split in ("train", "valid"):
        count = os.path.getsize(folder / f"{split}.tokens") // 2
        assert re.search(f"^{split} +{count:,} tokens ", out, re.M)
    before = written(folder)
    run("--text", text, *TINY, "--num_iters", 1, "--save_dir", tmp_path / "lm")
    assert written(folder) == before


@pytest.mark.parametrize("line, words", [
    ("--datset ptb", "unrecognized arguments: --datset (--dataset?; --help lists all flags)"),
    ("--tokenizer=", "--tokenizer: is empty"),
    ("--vocab_size 5", "--vocab_size: must be at least 257"),
])  # fmt: skip
def test_mistakes_in_preparing(line, words, text, tmp_path):
    _, err = prepare(*line.format(text).split(), status=2, cwd=tmp_path)
    assert err.count("\n") == 1 and err.startswith("datasets.py: ") and words.format(text) in err


def test_streams_that_are_closed_from_the_start(tmp_path, text):
    line = ["--text", text, "--data_dir", tmp_path / "lm"]
    command = " ".join(map(str, [sys.executable, DATASETS, *line, ">&-", "2>&-", "<&-"]))
    subprocess.run(command, shell=True, check=True)
