"""Files with a document in each row: JSON Lines and Parquet.

    python main.py --text stories.jsonl.gz                  the text in the field "text"
    python main.py --text shards/ --text_field content      in a field of another name

datasets.py calls this file for what its ROW_FILES match. Everything is streamed: a row has at most
MAX_BYTES, and whatever is wrong with a stranger's file is one line.
"""

import gzip
import itertools
import json
import re

from support.cli import UsageError, explain_errors, one_line, utf8

MAX_BYTES = 1 << 24  # of a row, as JSON or as a text
BATCH_ROWS = 16  # rows of a Parquet file that are in memory at once
# Types of columns that may hold texts, as pyarrow spells them; some writers call a text binary.
TEXT_TYPES = re.compile(r"(dictionary<values=)?(large_)?(string|binary)(_view)?\b.*")


def read_rows(file):
    """Yields the text of each row of a file, "" where there is none; file: a RowFile.

    Raises UsageError for a row that is no text, one that is too long, or a damaged file.
    """
    read = read_parquet if file.path.suffix.lower() == ".parquet" else read_json_lines
    try:
        for text in read(file.path, file.field):
            yield utf8(text or "")  # JSON may spell half a character
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # what libraries raise for a damaged file has types of its own
        reason = one_line(error) or type(error).__name__
        raise UsageError(
            f"{file.path} cannot be read: is it whole, and of the kind that it is named? ({reason})"
        ) from None


def read_json_lines(path, field):
    """Yields the field's value in each line of a file; blank lines do not count."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_BYTES:
                raise long_row_error(path, number)
            if line.isspace():
                continue
            fault = f'row {number:,} of {path} must be a JSON object, as in {{"{field}": "Hello"}}'
            with explain_errors(fault, ValueError, RecursionError):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("it is another value")
            text = row.get(field, 0)
            if text is not None and not isinstance(text, str):
                texts = [name for name, value in row.items() if isinstance(value, str)]
                raise missing_text_error(path, number, field, texts)
            yield text


def read_parquet(path, field):
    """Yields the text in each row of a Parquet file's column."""
    with explain_errors(f"{path} needs a package: pip install -U pyarrow numpy", ImportError):
        import pyarrow
        from pyarrow import compute, parquet
    # A buffer, as a file may be a single group of rows; pre_buffer would keep all that was read.
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        columns = file.schema_arrow
        texts = [column.name for column in columns if TEXT_TYPES.fullmatch(str(column.type))]
        if field not in texts:
            raise missing_text_error(path, 1, field, texts)
        number = 1
        for batch in file.iter_batches(BATCH_ROWS, columns=[field], use_threads=False):
            column = batch.column(0).cast(pyarrow.large_string())
            for length in compute.binary_length(column).to_pylist():
                if length is not None and length > MAX_BYTES:
                    raise long_row_error(path, number)
                number += 1
            yield from column.to_pylist()


def long_row_error(path, number):
    """The UsageError for a row of more than MAX_BYTES."""
    return UsageError(
        f"row {number:,} of {path} has more than {MAX_BYTES:,} bytes: cut it into several rows, "
        "or name its text as a file of its own"
    )


def missing_text_error(path, number, field, texts):
    """The UsageError for a row that holds texts in the fields `texts` alone."""
    remedy = "write the text of each row into it, as one string"
    if texts:
        listed = ", ".join(f"{name:.40}" for name in texts[:10])
        remedy = f"name another one by --text_field (it has {listed}), or {remedy}"
    return UsageError(f"row {number:,} of {path} has no text in the field {field}: {remedy}")
