"""Corpora with a document in each row: JSON Lines and Parquet."""

import gzip
import hashlib
import json
import sys
import tracemalloc

import pytest
from conftest import TINY, documents_of, run, run_extra

from datasets import load_dataset
from support.cli import UsageError

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
LONGEST = 1 << 24  # bytes of a row


def write(path, texts, field="text"):
    """Writes a file with a text in each row, of the kind that its name says."""
    rows = [{"id": i, field: text} for i, text in enumerate(texts)]
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    lines = [json.dumps(row, ensure_ascii=row["id"] % 2 == 0) for row in rows]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts_of(path, **options):
    """The texts of a file's rows, in the order of their ids."""
    folder = path.parent / "data"
    dataset = load_dataset("text", folder, [path], "byte", valid_text=[path], **options)
    return documents_of(dataset.train)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.parquet", "A.JSONL.GZ"])
def test_each_row_is_a_document(name, tmp_path):
    path = write(tmp_path / name.lower(), DOCUMENTS, "content").rename(tmp_path / name)
    assert texts_of(path, text_field="content") == DOCUMENTS


def test_rows_without_a_text_are_left_out(tmp_path):
    lines = ['\ufeff{"text": "a"}', "", '{"text": null}', '{"text": ""}', "  ", '{"text": "b"}']
    lines += ['{"text": "\\ud83d\\ude00 half: \\ud83d"}']
    path = tmp_path / "a.jsonl"
    path.write_text("\r\n".join(lines))
    assert texts_of(path) == ["a", "b", "😀 half: \ufffd"]
    assert texts_of(write(tmp_path / "a.parquet", ["a", None, "", "b"])) == ["a", "b"]


def test_rows_are_held_out_by_their_text(tmp_path):
    """Whatever is there beside them; each row is in one split, in the order of the files.

    By characters, which have no end token, it begins a line.
    """
    texts = ["x" * (i + 1) for i in range(47)]
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.jsonl", texts[:6])
    write(folder / "b.parquet", texts[6:19])
    write(folder / "c.jsonl.gz", texts[19:])
    dataset = load_dataset("text", tmp_path / "data", [folder], "char", valid_fraction=0.25)
    trained_on = dataset.tokenizer.decode(dataset.train.tokens).splitlines()
    held_out = dataset.tokenizer.decode(dataset.valid.tokens).splitlines()
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert held_out == [text for text, digest in zip(texts, digests) if digest < "4"]
    assert trained_on == [text for text in texts if text not in held_out]


def test_another_field_is_another_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "t{i}", "other": "o{i}"}}\n' for i in range(20)))
    for field in ("text", "other", "text"):
        assert texts_of(path, text_field=field)[:2] == [f"{field[0]}0", f"{field[0]}1"]


@pytest.mark.parametrize("kind", [
    pyarrow.string(),
    pyarrow.large_string(),
    pyarrow.string_view(),  # Polars since 1.38
    pyarrow.binary(),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
], ids=str)  # fmt: skip
def test_what_writers_of_parquet_write(kind, tmp_path):
    column = pyarrow.array(["a", None, "é", "a"]).cast(kind)
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["a", "é", "a"]


GOOD = '{"text": "good"}\n'
REMEDY = "write the text of each row into it, as one string"
BAD_LINES = [  # what follows a good line; words of the answer
    ('{"text": "cut of', "row 2 of .* must be a JSON object"),
    ('{"text": ["good"]}\n', f"row 2 of .* has no text in the field text: {REMEDY}"),
    ('{"body": "good", "title": 1}\n', r"by --text_field \(it has body\), or write the text"),
    ('{"\x1b[31m\\u001b[2J": 1}\n', "row 2"),
    ("[" * 100_000 + "\n", "row 2 of .* must be a JSON object"),
    ('{"text": "\udcff"}\n', "row 2 of .* must be a JSON object"),  # no UTF-8
]


@pytest.mark.parametrize("line, words", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_row_that_is_no_text(line, words, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + line, errors="surrogateescape")
    with pytest.raises(UsageError, match=words):
        texts_of(path)


def test_a_column_that_is_no_text(tmp_path):
    parquet.write_table(pyarrow.table({"text": [["a"]], "other": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"field text: .* --text_field \(it has other\)"):
        texts_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_damaged_file_is_one_line(name, tmp_path):
    """Cut short, or another kind of file."""
    path = write(tmp_path / name, [f"{i**9}" for i in range(400)])
    whole = path.read_bytes()
    cut = [whole[: len(whole) * i // 10] for i in range(1, 10)]
    for data in [b"PAR1", b"no file of this kind\n" * 99, *cut]:
        path.write_bytes(data)
        with pytest.raises(UsageError, match=f"{path} cannot be read: is it whole"):
            texts_of(path)


def test_a_small_file_of_a_large_row_fills_no_memory(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"x" * (100 << 20)))
    tracemalloc.start()
    with pytest.raises(UsageError, match="row 1 of .* has more than 16,777,216 bytes: cut it"):
        texts_of(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * LONGEST
    parquet.write_table(pyarrow.table({"text": ["a", "x" * (LONGEST + 1)]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="row 2 of .* has more than"):
        texts_of(tmp_path / "a.parquet")


def test_without_the_package(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", ["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install -U pyarrow numpy"):
        texts_of(path)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])  # whose end tokens have no text, and one
def test_a_text_ends_however_it_is_sampled(tokenizer, tmp_path):
    """A run on the rows of a file, which are all the same short text."""
    stories = write(tmp_path / "stories.jsonl.gz", ["once upon a time."] * 300)
    runs = ["--save_dir", tmp_path / "lm"]
    shape = "--context_size 16 --dim 32 --mlp swiglu --vocab_size 300".split()
    schedule = "--num_iters 120 --learning_rate 0.01 --lr_warmup 5".split()
    run(
        "--text",
        stories,
        "--valid_text",
        stories,
        "--tokenizer",
        tokenizer,
        *TINY,
        *shape,
        *schedule,
        *runs,
    )
    line = ["--temperature=0", "--max_tokens=40", *runs]
    out, _ = run("--prompt=once", *line)
    assert out == " upon a time.\n"
    assert run("--prompt=once", *line, "--draft=latest")[0] == out
    out, _ = run("--prompt=once", *line, "--no-stop_at_end")
    assert out.partition("once upon")[0] in (" upon a time.", " upon a time.<|endoftext|>")
    (tmp_path / "prompts.txt").write_text("once\nonce upon a\n")
    out, _ = run_extra("batch", tmp_path / "prompts.txt", *line)
    answers = [json.loads(answer) for answer in out.splitlines()]
    assert [answer["completion"] for answer in answers] == [" upon a time.", " time."]
    first, second = [answer["tokens"] for answer in answers]
    assert first[-len(second) :] == second, "both end in the end token"
