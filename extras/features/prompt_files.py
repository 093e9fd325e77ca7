"""Files of prompts, and of answers to them: JSON Lines that an interrupted command continues."""

import json
from pathlib import Path

from support.cli import CONTROLS, RunError, UsageError, explain_errors
from support.files import lock_file


def read_prompt_lines(path):
    """The prompts in a UTF-8 file, one per line. Raises OSError, ValueError.

    Only \\n ends a line, or \\r\\n: others, like \\f, may be part of a prompt.
    """
    text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    if not text:
        raise ValueError("it is empty")
    return text.removesuffix("\n").split("\n")


def json_line(content):
    """A dict as a line of UTF-8 JSON; all control characters and lone surrogates are escaped."""
    text = json.dumps(content, ensure_ascii=False)
    # It may go to a terminal, and JSON itself escapes only some of them.
    text = CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.encode(errors="backslashreplace") + b"\n"


def append_lines(path, jobs):
    """Opens a file of answers for appending; returns it and those it has, as dicts.

    jobs: the dicts with which its lines must begin, in order, including those still to be written;
    "completion" follows in each line. A last line cut off by a kill is removed. The file is locked
    until it is closed or the process ends.

    Raises UsageError if it holds other lines or is locked by another process, RunError if a line
    is damaged; the file is then left unchanged. Raises OSError if it cannot be used.
    """
    out = open(path, "a+b")
    busy = f"{path} is being written by another process: wait for it, or name another --output"
    with explain_errors(busy, BlockingIOError):
        lock_file(out, wait=False)
    out.seek(0)  # read only once locked, or another process's last lines could be missed
    lines = out.read().split(b"\n")
    # With the key that follows: `"max_tokens": 20` alone would also be the beginning of 200.
    starts = [json_line(job).removesuffix(b"}\n") + b', "completion": ' for job in jobs]
    # The last line may be cut off.
    fits = [line[: len(start)] == start[: len(line)] for line, start in zip(lines, starts)]
    if not all(fits) or any(lines[len(starts) :]):
        raise UsageError(
            f"{path} holds something other than this command's answers (other prompts, another "
            "model or other sampling flags): name another --output"
        )
    cut_off = lines.pop()  # empty, unless the process was killed
    answers = []
    for i, line in enumerate(lines, 1):
        fault = f"line {i:,} of {path} is damaged: fix it, or delete it and all that follow"
        with explain_errors(fault, ValueError, RecursionError, raises=RunError):
            answer = json.loads(line.decode())
            if not isinstance(answer["completion"], str):
                raise ValueError("its completion is not a string")
        answers.append(answer)
    out.truncate(out.tell() - len(cut_off))
    return out, answers
