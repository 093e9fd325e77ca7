"""Texts in other files than plain ones: JSON Lines, Parquet, and the token ids of nanoGPT.

    python main.py --text stories.jsonl.zst                          a document in each row
    python main.py --text shards/ --text_field content               in a field of another name
    python main.py --text train.bin --valid_text val.bin --tokenizer gpt2

datasets.py calls this file for what its ROW_FILES match and for *.bin. Everything is streamed: a
row has at most MOST_BYTES, and whatever is wrong with a stranger's file is one line.
"""

import contextlib
import gzip
import itertools
import json
import os

import numpy as np

from datasets import UsageError, explained, one_line, utf8

MOST_BYTES = 1 << 24  # of a row, as JSON or as a text
BATCH = 16  # rows of a Parquet file that are in memory at once
WINDOW = 1 << 17  # token ids that are decoded at once


@contextlib.contextmanager
def reading(path):
    """Turns what libraries raise for a damaged file into a UsageError."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # each of them has types of its own
        reason = one_line(error) or type(error).__name__
        raise UsageError(
            f"{path} cannot be read: is it whole, and of the kind that its name says? ({reason})"
        ) from None


# ---- Rows ---------------------------------------------------------------------------------------


def read_rows(rows):
    """Yields the text of each row of a file, "" where there is none; rows: the Rows of datasets.py.

    Raises UsageError for a row that is no text, one that is too long, or a damaged file.
    """
    read = read_parquet if rows.path.suffix.lower() == ".parquet" else read_json_lines
    for text in read(rows.path, rows.field):
        if text and not text.endswith(rows.line_end):
            text += rows.line_end
        yield utf8(text)  # JSON may spell half a character


def read_json_lines(path, field):
    """Yields the field's text in each line of a file; blank lines do not count."""
    with reading(path), open_decompressed(path) as file:
        for number in itertools.count(1):
            line = file.readline(MOST_BYTES + 1)
            if not line:
                return
            if len(line) > MOST_BYTES:
                raise too_long(path, number)
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"row {number:,} of {path} is not JSON: each line must be an object such as "
                    f'{{"{field}": "once upon a time"}} ({one_line(error)})'
                ) from None
            if not isinstance(row, dict):
                raise UsageError(
                    f"row {number:,} of {path} is not a JSON object such as "
                    f'{{"{field}": "once upon a time"}}: write one in each line'
                )
            if field not in row:
                raise no_such_field(path, number, field, row)
            text = row[field]
            if text is not None and not isinstance(text, str):
                raise no_text(path, number, field, type(text).__name__)
            yield text or ""


def open_decompressed(path):
    """Opens a file for reading bytes, as they were before .gz or .zst. Raises UsageError."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, mode="rb")
    if path.suffix.lower() == ".zst":
        with explained(f"{path} needs a package: pip install backports.zstd", ImportError):
            try:
                from compression import zstd  # since Python 3.14
            except ImportError:
                from backports import zstd
        return zstd.open(path, mode="rb")
    return open(path, "rb")


def read_parquet(path, field):
    """Yields the text in each row of a Parquet file's column."""
    with explained(f"{path} needs a package: pip install pyarrow", ImportError):
        import pyarrow
        from pyarrow import compute, parquet
    # A buffer, as a file may be a single group of rows; pre_buffer would keep all that was read.
    options = {"buffer_size": 1 << 20, "pre_buffer": False}
    with reading(path), parquet.ParquetFile(path, **options) as file:
        schema = file.schema_arrow
        if field not in schema.names:
            raise no_such_field(path, 1, field, schema.names)
        kind = schema.field(field).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise no_text(path, 1, field, str(kind))
        number = 1
        for batch in file.iter_batches(BATCH, columns=[field], use_threads=False):
            column = batch.column(0).cast(pyarrow.large_string())
            for length in compute.binary_length(column).to_pylist():
                if length is not None and length > MOST_BYTES:
                    raise too_long(path, number)
                number += 1
            for text in column.to_pylist():
                yield text or ""


def too_long(path, number):
    """The UsageError for a row of more than MOST_BYTES."""
    return UsageError(
        f"row {number:,} of {path} has more than {MOST_BYTES:,} bytes: cut it into several rows, "
        "or name its text as a file of its own"
    )


def no_such_field(path, number, field, names):
    """The UsageError for a row that has only the fields `names`."""
    known = [f"{name:.40}" for name in itertools.islice(names, 10)]
    return UsageError(
        f"row {number:,} of {path} has no field {field}: name one by --text_field "
        f"(it has {', '.join(known) or 'none'})"
    )


def no_text(path, number, field, kind):
    """The UsageError for a field of another type."""
    return UsageError(
        f"the field {field} of {path} is not text but {kind:.40} in row {number:,}: name another "
        "one by --text_field"
    )


# ---- Token ids ----------------------------------------------------------------------------------


def read_ids(files, tokenizer):
    """Yields (text, ids [N]) of files of GPT-2's token ids, uint16, as nanoGPT's prepare.py writes.

    files: the Ids of datasets.py. The text is what the ids stand for, without the end token. Raises
    UsageError if the ids are not the tokenizer's.
    """
    # A text is cut before these tokens: they begin a word, or end a document.
    begins = np.zeros(tokenizer.vocab_size, bool)
    for token, number in tokenizer.package.get_vocab().items():
        begins[number] = token.startswith(("\u0120", "\u010a"))  # GPT-2's space and line end
    begins[tokenizer.eos] = True
    for file in files:
        ids = map_ids(file.path)
        start = 0
        while start < len(ids):
            window = ids[start : start + WINDOW]
            if window.max() >= tokenizer.vocab_size:
                raise UsageError(
                    f"{file.path} does not hold GPT-2's ids as uint16, without a header: it has "
                    f"{window.max():,}, and they end at {tokenizer.vocab_size - 1:,}"
                )
            last_cut = np.flatnonzero(begins[window]).max(initial=0)
            if start + WINDOW < len(ids) and last_cut > 0:
                window = window[:last_cut]
            start += len(window)
            documents = np.split(window, np.flatnonzero(window == tokenizer.eos))
            rows = [document.tolist() for document in documents]
            texts = tokenizer.package.decode_batch(rows, skip_special_tokens=True)
            for text, document in zip(texts, documents):
                yield text, document.astype(tokenizer.dtype)


def map_ids(path):
    """The ids in a file, [N] uint16, memory-mapped. Raises UsageError."""
    if path.with_name("meta.pkl").exists():
        raise UsageError(
            f"{path} has ids of another tokenizer than GPT-2's, as meta.pkl beside it says: "
            "name the text that it was made from"
        )
    size = os.path.getsize(path)
    if size % 2:
        raise UsageError(f"{path} is not a file of two-byte token ids: it has {size:,} bytes")
    with reading(path):
        return np.memmap(path, "<u2", "r") if size else np.zeros(0, np.uint16)
