"""The two sides of a comparison: a copy of their files, and what their code says of itself."""

import contextlib
import difflib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from datasets import RunError, UsageError, explained, hash_of_code, hash_of_file, locked
from datasets import one_line, words_of_code

WORKER = Path(__file__).with_name("worker.py")
HERE = Path(os.path.abspath(__file__)).parents[2]  # extras/ may be a link

PAGES = (".md", ".rst", ".ipynb", ".svg", ".png", ".jpg", ".pdf")
LARGE = 1 << 20  # bytes of a file that is linked instead of copied
MOST = 20 << 20  # bytes of all that are copied
LONGEST = 3600  # seconds until a side has encoded its texts and taken a step, or was judged


class Side(NamedTuple):
    """One of the two things that are compared, as worker.py describes it."""

    name: str  # what was typed
    folder: Path  # a copy of its files
    words: list  # its flags, as they were when it was asked
    flags: dict  # the values of all flags, as its main.py understands them
    given: list  # the names of those that were given
    shape: dict  # the values of those that may change a run
    edited: list  # functions of its main.py that its fast.py does not know
    notices: list  # lines for the user
    files: dict  # of the checkpoints that its flags name, {name in its folder: path}
    sources: list  # the files that decide how its runs end, relative to its folder
    origins: dict  # the ids of the models that its runs begin with
    versions: dict  # of all that its last bits depend on
    parameters: int  # of its model
    vocab_size: int
    context_size: int
    texts: dict  # {split: the SHA256 of its tokens and tokenizer}
    tokenizer: dict  # its to_dict()


class SideError(RunError):
    """A side cannot run, by its own fault: not by that of the machine."""

    def __init__(self, text, name):
        super().__init__(text)
        self.name = name  # the side's


class Died(RunError):
    """A process of a side was ended by a signal, or for want of memory."""


def twice(name, function, *arguments):
    """What a function returns, called once more if it raises Died: the machine may be at fault.

    Raises SideError after the second time; name: the side's.
    """
    with contextlib.suppress(Died):
        return function(*arguments)
    try:
        return function(*arguments)
    except Died as error:
        raise SideError(f"{error}, twice", name) from None


def failure(name, status, output):
    """The exception for a process of a side that has failed; name: the side's.

    It says its last line, and where a traceback points.
    """
    line = one_line(output.strip().rpartition("\n")[2]) or f"exit status {status}"
    if status < 0:
        line = f"ended by {signal.Signals(-status).name}"
    for file, place in re.findall(r'File ".*?(\w+\.py)", line (\d+)', output)[-1:]:
        line += f" ({file}, line {place})"
    line = f"{name} cannot run: {line}"
    if status < 0 or re.search("MemoryError|out of memory", line):
        return Died(line)
    if status == 2:
        return UsageError(line)
    return RunError(line) if "OSError" in line else SideError(line, name)


def is_flags(side):
    """Whether a side is flags for the files of now, or none, and not a commit."""
    return not side or side.startswith("-")


def make_side(typed, common, folder, is_second):
    """The Side of a commit, or of flags for the files of now; folder: a new one, for its files.

    is_second: whether the other side has taken the flags in `common`.
    """
    name = typed or "your files"
    words = common
    folder.mkdir()
    if is_flags(typed):
        with explained(f"{name} cannot be read as flags", ValueError):
            words = [*common, *shlex.split(typed)] if typed else common
        names = tracked = git_files("--cached")
        if "main.py" not in tracked:  # no repository, or another one
            names, tracked = files_without_git(), []
    else:
        names = tracked = copy_commit(typed, folder)
    linked = copy_files([*names, *git_files("--others", "--exclude-standard")], folder)
    try:
        answer = twice(name, describe, name, folder, words)
    except UsageError as error:
        if is_second and words is common:
            raise SideError(str(error), name) from None
        raise
    for path in map(Path, answer["flags"].get("test_text") or []):
        if HERE in path.parents:  # the runs are not to have it
            (folder / path.relative_to(HERE)).unlink(missing_ok=True)
    unseeded = answer.pop("unseeded")
    if unseeded:
        raise SideError(f"{name}: all seeds give the same {unseeded}", name)
    sources = []
    for path in sorted({*tracked, *answer.pop("read")}):
        is_page = path.startswith(("tests/", ".git")) or path.endswith(PAGES)
        if (folder / path).is_file() and not is_page:
            sources.append(path)
    if linked:
        more = f" and {len(linked) - 5} more" if len(linked) > 5 else ""
        answer["notices"].append(f"Linked, not copied: {', '.join(linked[:5])}{more}")
    return Side(name, folder, sources=sources, **answer)


def describe(name, folder, words):
    """What the code of a side says of itself, see worker.py."""
    command = [sys.executable, "-B", WORKER, folder, "describe", *words]
    options = {"capture_output": True, "text": True, "errors": "replace", "timeout": LONGEST}
    try:
        asked = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        raise SideError(f"{name} cannot run: its first step does not end", name) from None
    if asked.returncode or not asked.stdout:
        raise failure(name, asked.returncode, asked.stderr)
    return json.loads(asked.stdout)


def git_files(*kinds):
    """The paths of files in the program's folder that git lists, if there are git and a repository.

    kinds: options of `git ls-files`.
    """
    command = ["git", "-C", HERE, "ls-files", "-z", *kinds]
    with contextlib.suppress(FileNotFoundError):
        listed = subprocess.run(command, capture_output=True).stdout
        return os.fsdecode(listed).split("\0")[:-1]
    return []


def files_without_git():
    """The paths of files beside main.py and in packages there."""
    packages = [HERE / "extras", *(each.parent for each in HERE.glob("*/__init__.py"))]
    paths = [*HERE.iterdir(), *(path for package in packages for path in package.rglob("*"))]
    names = [str(path.relative_to(HERE)) for path in paths if path.is_file()]
    return [name for name in names if "__pycache__" not in name]


def copy_files(names, folder):
    """Copies the program's files as they are now: their owner goes on editing them.

    A file that is there already stays. Large ones are linked: their names are returned.
    """
    linked = []
    total = 0  # bytes
    for name in names:
        path = HERE / name
        target = folder / name
        if os.path.lexists(target) or not path.exists():  # or it was deleted
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size
        if path.is_dir():  # a link, as extras/ may be
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif size > LARGE or total + size > MOST:
            target.symlink_to(path)
            linked.append(name)
        else:
            shutil.copy(path, target)
            total += size
    return linked


def copy_commit(commit, folder):
    """Copies the program as it is in a commit; returns the paths."""
    with explained("to compare commits, install git and tar", FileNotFoundError):
        asked = subprocess.run(["git", "-C", HERE, "archive", commit], capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=asked.stdout, capture_output=True)
    paths = [*folder.rglob("*")]
    for path in paths:
        if path.is_symlink() and folder not in path.resolve().parents:
            path.unlink()  # what is in no commit is copied as it is now
    if folder / "main.py" not in paths:
        reason = one_line(asked.stderr.decode(errors="replace")) or "it has no main.py"
        raise UsageError(f"{commit} is no commit with this program ({reason})")
    return [str(path.relative_to(folder)) for path in paths]


def short_id(typed):
    """The beginning of a commit's id: of the last one, for flags; "" without a repository."""
    commit = "HEAD" if is_flags(typed) else typed
    command = ["git", "-C", HERE, "rev-parse", "--short", commit]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def identify(side, *others):
    """What decides how the runs of a side end, as one hash; others: plain data."""
    hashes = {name: hash_of(side.folder / name) for name in side.sources}
    data = [side.shape, side.origins, side.texts, hashes, *others]
    return hashlib.sha1(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def install(side, folder):
    """The Side with its files in a folder of its own."""
    fault = f"cannot write to {folder}: name another --save_dir"
    with explained(fault, OSError), locked(folder.parent):
        if not folder.exists():
            # Half a copy never has its name.
            partial = folder.with_name(f"{folder.name}.{os.getpid()}")
            shutil.copytree(side.folder, partial, symlinks=True)
            for name, path in side.files.items():  # its runs find them by their ids
                link_or_copy(path, partial / name)
            partial.rename(folder)
    return side._replace(folder=folder)


def link_or_copy(path, target):
    """Links a file, which may be large, or copies it from another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copy(path, target)


def code_of(path):
    """A file as text."""
    return path.read_text("utf-8", errors="replace")


def hash_of(path):
    """What tells a file of a side from others; layout and comments of code do not."""
    return hash_of_code(code_of(path)) if path.suffix == ".py" else hash_of_file(path)


def count_words(side):
    """The length of a side's code; remarks and line breaks do not count."""
    paths = [side.folder / name for name in side.sources if name.endswith(".py")]
    return sum(len(words_of_code(code_of(path))) for path in paths)


def patch(before, after):
    """A unified diff of the files of both Sides."""
    lines = []
    for name in sorted({*before.sources, *after.sources}):
        texts = []
        for side in (before, after):
            path = side.folder / name
            is_there = name in side.sources and not path.is_symlink()
            texts.append(code_of(path).splitlines(True) if is_there else [])
        lines += difflib.unified_diff(*texts, f"a/{name}", f"b/{name}")
    return "".join(lines)
