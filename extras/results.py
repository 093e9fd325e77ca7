"""Result files: JSON Lines that an interrupted command continues, and files written whole."""

import fcntl
import json
import os
from pathlib import Path

from datasets import CONTROLS, RunError, UsageError, explained, flock, replacing

MOST_PROMPTS = 10**6  # of a command: each takes about a KiB of memory until it is answered


def write_whole(path, text):
    """Writes a UTF-8 file; if a full disk or a kill prevents that, the old file stays intact.

    Anything but a regular file, like /dev/stdout or a pipe, is written directly. Raises RunError.
    """
    with explained(f"cannot write {path}", OSError, kind=RunError):
        if os.path.exists(path) and not os.path.isfile(path):
            Path(path).write_text(text, "utf-8")
            return
        with replacing(os.path.realpath(path)) as file:  # a link stays a link
            file.write(text.encode("utf-8"))


def read_prompt_lines(path):
    """The prompts in a UTF-8 file, one per line. Raises OSError, ValueError.

    Only \\n ends a line, or \\r\\n: others, like \\f, may be part of a prompt.
    """
    text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    if not text:
        raise ValueError("it is empty")
    text = text.removesuffix("\n")
    if text.count("\n") >= MOST_PROMPTS:
        raise ValueError(f"it has more than {MOST_PROMPTS:,} lines")
    return text.split("\n")


def json_line(content):
    """A dict as UTF-8 JSON, with escapes for all control characters and for lone surrogates."""
    text = json.dumps(content, ensure_ascii=False)
    # It may go to a terminal, and JSON itself escapes only some of them.
    text = CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text.encode(errors="backslashreplace")


def append_lines(path, heads):
    """Opens a JSON Lines file for appending; returns it and its complete lines, as bytes.

    `heads` are the dicts that the lines must start with, in order, including those still to be
    written; "completion" follows in each line. A last line cut off by a kill is removed. The file
    is locked until it is closed or the process ends.

    Raises UsageError if it is not a regular file, holds other lines or is locked by another
    process, RunError if a line is damaged; the file is then left unchanged.
    """
    heads = [json_line(head) for head in heads]
    # Include the key that follows: `"max_tokens": 20` alone would also be a prefix of 200.
    heads = [head.removesuffix(b"}") + b', "completion": ' for head in heads]
    if os.path.exists(path) and not os.path.isfile(path):  # reading a device might never end
        raise UsageError(f"{path} is not a regular file: name another --output")
    out = open(path, "a+b")
    try:
        lock_file(out, path)
        out.seek(0)  # read only once locked, or another process's last lines could be missed
        *lines, cut_off = out.read().split(b"\n")
        if not are_ours(lines, cut_off, heads):
            raise UsageError(
                f"{path} holds something other than this command's answers (other prompts, another "
                "model or other sampling flags): name another --output"
            )
        check_lines(path, lines)
        out.truncate(out.tell() - len(cut_off))
    except Exception:
        out.close()
        raise
    return out, lines


def lock_file(file, path):
    """Locks an open file. Raises UsageError if another process has locked it."""
    try:
        # LOCK_NB: raises BlockingIOError instead of waiting.
        flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"{path} is being written by another process: wait for it, or name another --output"
        ) from None


def check_lines(path, lines):
    """Raises RunError if one of a file's lines is not JSON with a completion."""
    for i, line in enumerate(lines, 1):
        fault = f"line {i:,} of {path} is damaged: fix it, or delete it and all that follow"
        with explained(fault, ValueError, RecursionError, kind=RunError):
            answer = json.loads(line.decode())
            if not isinstance(answer["completion"], str):
                raise ValueError("its completion is not a string")


def are_ours(lines, cut_off, heads):
    """Whether `lines`, and the partial last one `cut_off` (b"" if none), start with `heads`."""
    if len(lines) > len(heads):
        return False
    for line, head in zip(lines, heads):
        if not line.startswith(head):
            return False
    if not cut_off:
        return True
    if len(lines) == len(heads):
        return False  # nothing is left to be written
    head = heads[len(lines)]
    return cut_off.startswith(head) or head.startswith(cut_off)
