"""Corpora that are no plain text: rows of JSON Lines and Parquet, and token ids."""

import gzip
import io
import json
import random
import subprocess
import sys
import tracemalloc

import datasets
import numpy as np
import pytest
from conftest import DATASETS, TINY, ids, run, run_extra
from datasets import PackageTokenizer, Rows, UsageError, read_documents

from extras import formats

try:
    from compression import zstd  # since Python 3.14
except ImportError:
    zstd = pytest.importorskip("backports.zstd")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

# What may stand in a row: line ends, quotes, any characters, another text's end token.
DOCUMENTS = [
    "the quick brown fox\njumped",
    'a "quote" \\ and a tab\t',
    "señor — 😀 \u2028 \x00 \x85",
    " \n ",
    "two <|endoftext|> in one",
    "x" * 300_000,  # more than a block
    "last\n",
]


def write(path, texts, field="text"):
    """Writes a file with a text in each row, of the kind that its name says."""
    rows = [{"id": i, field: text} for i, text in enumerate(texts)]
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    lines = [json.dumps(row, ensure_ascii=row["id"] % 2 == 0) for row in rows]
    data = ("\n".join(lines) + "\n").encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstd.compress(data)
    path.write_bytes(data)
    return path


def load(folder, *texts, tokenizer="byte", **options):
    """The user's texts as a Dataset, with its cache in a folder."""
    return datasets.load_dataset("text", folder, texts, tokenizer, say=pytest.fail, **options)


def rows_of(path, field="text", line_end=""):
    return list(formats.read_rows(Rows(path, field, line_end)))


# ---- Rows ---------------------------------------------------------------------------------------

NAMES = ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "A.JSONL.GZ"]


@pytest.mark.parametrize("name", NAMES)
def test_each_row_is_a_document(name, tmp_path):
    path = write(tmp_path / name.lower(), DOCUMENTS, "content").rename(tmp_path / name)
    dataset = load(tmp_path / "data", path, valid_text=[path], text_field="content")
    expected = b"\xff".join(text.encode() for text in DOCUMENTS)
    tokens = dataset.train.tokens
    assert bytes(np.where(tokens == 256, 255, tokens).astype(np.uint8)) == expected
    assert dataset.train.num_bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert dataset.train.num_words == sum(
        len(text.split()) + text.count("\n") for text in DOCUMENTS
    )


def test_rows_without_a_text_are_left_out(tmp_path):
    lines = ['{"text": "a"}', "", '{"text": null}', '{"text": ""}', "  ", '\ufeff{"text": "b"}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines[:-1]) + "\r\n" + lines[-1].strip("\ufeff"))
    assert [text for text in rows_of(path) if text] == ["a", "b"]
    path.write_text(lines[-1])  # as some programs for Windows write it
    assert rows_of(path) == ["b"]
    other = write(tmp_path / "a.parquet", ["a", None, "", "b"])
    tokens = load(tmp_path / "data", other, valid_text=[other]).train.tokens
    assert tokens.tolist() == [ord("a"), 256, ord("b")]


def test_half_a_character_is_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude00\\udcff"}\n')
    assert rows_of(path) == ["a\ufffd", "😀\ufffd"]


def test_a_tokenizer_without_an_end_token_gets_line_ends(tmp_path):
    path = write(tmp_path / "a.jsonl", ["ab", "b\n", "", "a"])
    dataset = load(tmp_path / "data", path, valid_text=[path], tokenizer="char")
    assert dataset.tokenizer.decode(dataset.train.tokens) == "ab\nb\na\n"
    dataset = load(tmp_path / "data", path, valid_text=[path], tokenizer="word")
    assert dataset.tokenizer.decode(dataset.train.tokens) == "ab\nb\na\n"


def test_every_tenth_row_is_held_out(tmp_path):
    """Counted over all files; each row is in one split, and in the order of the files."""
    texts = [f"row {i}" for i in range(47)]
    write(tmp_path / "a.jsonl", texts[:4])
    write(tmp_path / "b.parquet", texts[4:19])
    write(tmp_path / "c.jsonl.zst", texts[19:])
    paths = [tmp_path / name for name in ("a.jsonl", "b.parquet", "c.jsonl.zst")]
    for fraction, step in ((0.1, 10), (0.25, 4)):
        splits = datasets.own_text({"train": paths}, fraction, pytest.fail, [])
        found = {}
        for split, spans in splits.items():
            found[split] = [text for text, _ in read_documents(spans)]
        assert found["valid"] == texts[step - 1 :: step]
        assert found["train"] == [text for text in texts if text not in found["valid"]]


def test_a_folder_of_several_kinds(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    write(folder / "sub" / "rows.parquet", [f"row {i}" for i in range(10)])
    write(folder / "rows.jsonl.gz", [f"line {i}" for i in range(10)])
    (folder / "notes.txt").write_text("notes\n" * 10)
    (folder / "ids.bin").write_bytes(b"ab")  # which looks like a text
    said = []
    splits = datasets.own_text({"train": [folder]}, 0.1, said.append, [])
    texts = [text for text, _ in read_documents(splits["train"])]
    assert texts[0] == "notes\n" * 9
    assert texts[1:] == [f"line {i}" for i in range(9)] + [f"row {i}" for i in range(9)]
    assert said == [f"{folder}: skipping 1 of 4 files that are not UTF-8 text"]


def test_another_field_is_another_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "t{i}", "other": "o{i}"}}\n' for i in range(20)))
    texts = {}
    for field in ("text", "other", "text"):
        dataset = load(tmp_path / "data", path, text_field=field)
        texts[field] = dataset.tokenizer.decode(dataset.train.tokens)[:6]
    assert texts == {"text": "t0t1t2", "other": "o0o1o2"}
    assert len(list((tmp_path / "data" / "text").iterdir())) == 2


def test_ids_do_not_depend_on_the_hash_seed(tmp_path):
    write(tmp_path / "a.jsonl", [f"the quick fox {i * i}" for i in range(200)])
    found = set()
    for seed in ("1", "2"):
        folder = tmp_path / seed
        line = ["--text", tmp_path / "a.jsonl", "--tokenizer", "bpe", "--vocab_size", 300]
        own = {"env": {"PYTHONHASHSEED": seed}, "stdin": subprocess.DEVNULL}  # a Python of its own
        run(*line, "--data_dir", folder, program=(DATASETS,), **own)
        [path] = folder.glob("text/*/train.tokens")
        found.add(path.read_bytes())
    assert len(found) == 1


# ---- Damage and mistakes ------------------------------------------------------------------------

LONG = '{"text": "' + "x" * formats.MOST_BYTES + '"}\n'
GOOD = '{"text": "good"}\n'
BAD_LINES = [  # what follows a good line; words of the answer
    ("good\n", "row 2 of .* is not JSON"),
    ('{"text": "cut of', "row 2 of .* is not JSON"),
    ('["good"]\n', "row 2 of .* is not a JSON object"),
    ('{"text": ["good"]}\n', "is not text but list in row 2: .* --text_field"),
    ('{"text": 3}\n', "is not text but int in row 2"),
    ('{"body": "good", "title": 1}\n', r"no field text: .* --text_field \(it has body, title\)"),
    ("{}\n", r"no field text: .* \(it has none\)"),
    ('{"\x1b[31m\\u001b[2J": 1}\n', "row 2"),
    ('{"' + "a" * 5000 + '": 1}\n', "no field text"),
    (LONG, "row 2 of .* has more than 16,777,216 bytes: cut it"),
    ("[" * 100_000 + "\n", "row 2 of .* is not JSON"),
    ('{"text": ' + "1" * 10_000 + "}\n", "row 2 of .* is not JSON"),
    (b'{"text": "\xff"}\n', "row 2 of .* is not JSON"),
]


@pytest.mark.parametrize("line, words", BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_row_that_is_no_text(line, words, suffix, tmp_path):
    path = tmp_path / f"a.jsonl{suffix}"
    data = GOOD.encode() + (line if isinstance(line, bytes) else line.encode())
    path.write_bytes(zstd.compress(data) if suffix else data)
    with pytest.raises(UsageError, match=words) as error:
        rows_of(path)
    said = datasets.one_line(error.value)
    assert said.isprintable() and len(said) < 500


def test_the_longest_row(tmp_path):
    path = tmp_path / "a.jsonl"
    length = formats.MOST_BYTES - len('{"text": ""}\n')
    path.write_text('{"text": "' + "x" * length + '"}\n')
    assert rows_of(path) == ["x" * length]
    table = pyarrow.table({"text": ["x" * formats.MOST_BYTES]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert len(rows_of(tmp_path / "a.parquet")[0]) == formats.MOST_BYTES
    table = pyarrow.table({"text": ["a", "x" * (formats.MOST_BYTES + 1)]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="row 2 of .* has more than"):
        rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("column, words", [
    (pyarrow.array([["a"]]), "not text but list<.*> in row 1: name another"),
    (pyarrow.array([1]), "not text but int64"),
    (pyarrow.array([b"a"]), "not text but binary"),
    (pyarrow.array([{"text": "a"}]), "not text but struct"),
])  # fmt: skip
def test_a_column_that_is_no_text(column, words, tmp_path):
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=words):
        rows_of(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"no field other: .* \(it has text\)"):
        rows_of(tmp_path / "a.parquet", "other")


def test_columns_of_other_kinds_of_text(tmp_path):
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        column = pyarrow.array(["a", None, "é", "a"]).cast(kind)
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        assert rows_of(tmp_path / "a.parquet") == ["a", "", "é", "a"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_one_line(name, tmp_path):
    """Cut short at any place, altered in any, empty, or another kind of file."""
    chance = random.Random(0)
    texts = ["".join(chance.choices("abcdefgh \n", k=300)) for _ in range(40)]
    path = write(tmp_path / name, texts)
    whole = path.read_bytes()
    damaged = [b"\0", b"PAR1", b"no file of this kind\n" * 99]
    damaged += [whole[: chance.randrange(1, len(whole))] for _ in range(20)]
    no_such_files = len(damaged)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 20])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        damaged.append(bytes(data))
    for number, data in enumerate(damaged):
        path.write_bytes(data)
        is_refused = False
        try:
            rows_of(path)
        except UsageError as error:
            assert str(path) in str(error)
            is_refused = True
        # Parquet and zstd may have no checksum: then an altered file holds other texts.
        assert is_refused or number >= no_such_files, data


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_small_file_of_a_large_row_fills_no_memory(name, tmp_path):
    data = io.BytesIO()
    compressed = gzip.GzipFile(fileobj=data, mode="wb") if name.endswith(".gz") else None
    compressed = compressed or zstd.ZstdFile(data, "wb")
    with compressed:
        compressed.write(b'{"text": "')
        for _ in range(100):
            compressed.write(b"x" * (1 << 20))
    path = tmp_path / name
    path.write_bytes(data.getvalue())
    tracemalloc.start()
    with pytest.raises(UsageError, match="row 1 of .* has more than"):
        rows_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * formats.MOST_BYTES


def test_a_large_parquet_file_is_streamed(tmp_path):
    """Of its groups of rows, and of the pages of each, no more is kept than what is read."""
    texts = pyarrow.table({"text": ["x" * 20_000] * 200})  # 4 MB
    options = {"use_dictionary": False, "compression": "none"}
    with parquet.ParquetWriter(tmp_path / "a.parquet", texts.schema, **options) as writer:
        for _ in range(8):
            writer.write_table(texts)
    most = 0
    before = pyarrow.total_allocated_bytes()
    for _ in formats.read_rows(Rows(tmp_path / "a.parquet", "text", "")):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 20_000 < most < 12e6  # bytes: a row is kept, of 32 MB


@pytest.mark.parametrize("name, package, remedy", [
    ("a.parquet", "pyarrow", "pip install pyarrow"),
    ("a.jsonl.zst", "backports", "pip install backports.zstd"),
])  # fmt: skip
def test_a_package_that_is_not_installed(name, package, remedy, tmp_path, monkeypatch):
    path = write(tmp_path / name, ["a"])
    monkeypatch.setitem(sys.modules, package, None)
    if package == "backports":
        monkeypatch.setitem(sys.modules, "compression", None)
    with pytest.raises(UsageError, match=remedy):
        rows_of(path)


def test_other_compressed_files_are_named(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"text"))
    with pytest.raises(UsageError, match="a.txt.gz: decompress it"):
        load(tmp_path / "data", path)


# ---- Token ids ----------------------------------------------------------------------------------


def gpt2_like():
    """A small tokenizer in place of GPT-2's; most words and some characters take several ids."""
    trained = PackageTokenizer.train(["the quick brown fox\njumped — señor 😀 " * 50], 264)
    return PackageTokenizer(trained.vocabulary, "gpt2")


def encoded(tokenizer, texts):
    """The ids of texts as nanoGPT writes them: each followed by the end token."""
    tokens = []
    for text in texts:
        tokens += [*tokenizer.encode(text), tokenizer.eos]
    return np.array(tokens, "<u2")


def test_files_of_token_ids(tmp_path, monkeypatch):
    """The ids stay as they are; bytes and words are those of their texts."""
    tokenizer = gpt2_like()
    chance = random.Random(0)
    texts = []
    for _ in range(50):
        count = chance.randrange(60)
        words = chance.choices(["the", "quick", "señor", "😀", "\n", "—"], k=count)
        texts.append(" ".join(words))
    encoded(tokenizer, texts).tofile(tmp_path / "train.bin")
    encoded(tokenizer, texts[:9]).tofile(tmp_path / "val.bin")
    given = {"valid_text": [tmp_path / "val.bin"], "tokenizer": tokenizer}
    counts = []
    for window in (64, 1 << 17):
        monkeypatch.setattr(formats, "WINDOW", window)
        dataset = load(tmp_path / str(window), tmp_path / "train.bin", **given)
        assert dataset.train.tokens.tolist() == encoded(tokenizer, texts).tolist()
        assert dataset.valid.tokens.tolist() == encoded(tokenizer, texts[:9]).tolist()
        counts.append([dataset.train.num_bytes, dataset.train.num_words, dataset.sha256])
    assert counts[0] == counts[1]
    assert counts[0][0] == sum(len(text.encode()) for text in texts)
    assert counts[0][1] == sum(len(text.split()) + text.count("\n") for text in texts)


def test_token_ids_that_cannot_be_used(tmp_path):
    tokenizer = gpt2_like()
    path = tmp_path / "train.bin"
    encoded(tokenizer, ["the fox"]).tofile(path)
    with pytest.raises(UsageError, match="train.bin would be read as GPT-2's .* --tokenizer gpt2"):
        load(tmp_path / "data", path, valid_text=[path])
    with pytest.raises(UsageError, match="train.bin is read as token ids: add --valid_text"):
        load(tmp_path / "data", path, tokenizer=tokenizer)
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(UsageError, match="two kinds"):
        load(tmp_path / "data", path, tmp_path / "notes.txt", tokenizer=tokenizer)
    for data, words in ((b"abc", "it has 3 bytes"), (b"\xff\xff", "it has 65,535, .* end at 26")):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=words):
            load(tmp_path / "data", path, valid_text=[path], tokenizer=tokenizer)
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(UsageError, match="another tokenizer .* meta.pkl"):
        load(tmp_path / "data", path, valid_text=[path], tokenizer=tokenizer)


# ---- From the command line ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A folder with two runs on the rows of a file: all are the same short text."""
    folder = tmp_path_factory.mktemp("stories")
    write(folder / "stories.jsonl.zst", ["once upon a time."] * 300)
    line = ["--text", folder / "stories.jsonl.zst", *TINY, "--context_size", 16, "--dim", 32]
    line += ["--learning_rate", 0.01, "--lr_warmup", 5, "--save_dir", folder / "lm"]
    out, _ = run(*line, "--num_iters", 120, "--mlp", "swiglu")
    # 17 bytes, and an end token between each two
    assert "data     text: 4,859 train / 539 valid tokens" in out
    run(*line, "--num_iters", 60, "--new_model")
    return folder / "lm"


def test_a_text_ends_however_it_is_sampled(stories, tmp_path):
    draft, model = ids(stories)
    line = ["--identifier", model, "--temperature", 0, "--max_tokens", 40, "--save_dir", stories]
    out, _ = run("--prompt", "once", *line)
    assert out == " upon a time.\n"
    out, _ = run("--prompt", "once", *line, "--no-stop_at_end")
    assert out.startswith(" upon a time.once upon a time.")
    out, _ = run("--prompt", "once", *line, "--draft", draft)
    assert out == " upon a time.\n"
    out, _ = run("--inference", *line, input="once up\nonce\n")
    assert out == "on a time.\n upon a time.\n"
    (tmp_path / "prompts.txt").write_text("once\nonce upon a\n")
    out, _ = run_extra("batch", tmp_path / "prompts.txt", *line)
    answers = [json.loads(answer) for answer in out.splitlines()]
    assert [answer["completion"] for answer in answers] == [" upon a time.", " time."]
    assert [answer["tokens"][-1] for answer in answers] == [256, 256]


def test_a_file_without_the_field(tmp_path):
    path = write(tmp_path / "a.jsonl", ["a"] * 20, "story")
    _, err = run("--text", path, *TINY, "--save_dir", tmp_path, status=2)
    assert err == (
        f"main.py: row 1 of {path} has no field text: name one by --text_field "
        "(it has id, story)\n"
    )
    dataset = datasets.load_dataset("text", tmp_path, text=[path], text_field="story")
    assert len(dataset.train.tokens) == 35  # 18 of one byte, and 17 between them
