"""The two sides of a comparison: copies of their files, and what their code says of itself."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from support.code import words_of_code
from support.cli import RunError, UsageError, explain_errors, one_line
from support.files import hash_of_data, hash_of_file, hold_lock

WORKER = Path(__file__).with_name("worker.py")
HERE = WORKER.parents[2]  # not resolved: extras/ may be a link

# Paths of tests, hidden files, pages, and what programs leave: they do not decide how a run ends.
IGNORED_FILES = r"tests/|(.*/)?\.|.*(\.(md|rst|ipynb|svg|png|jpg|pdf|pyc|log|out)|~)$"
MAX_COPIED_FILE_BYTES = 1 << 20  # a larger file is linked instead of copied
TIMEOUT_SECONDS = 3600  # that a side has for its texts and a first step, or for being judged


@dataclass
class Copy:
    """A side's files as they were at the start: the user may go on editing them."""

    name: str  # what was typed
    typed_flags: list
    commit: str  # its short SHA1
    folder: Path
    linked: list  # its files that were too large for a copy
    code_words: dict  # {path in its folder: what counts of that file}, without pages and tests


@dataclass
class Side(Copy):
    """One of the two things that are compared: a Copy, and what its code says of its flags."""

    words: list  # its flags as a command line, with models by their ids
    flags: dict  # the values of all flags, as its main.py resolves them
    identity: dict  # the values of those that decide how a run ends, and the ids of its models
    edited_functions: list  # its main.py's functions edited since fast.py was written
    files: dict  # of checkpoints that its flags name, {path in its folder: original path}
    versions: dict  # what its last bits depend on: libraries, device and the like
    num_parameters: int  # of its model
    vocab_size: int
    context_size: int
    tokens_sha256: dict  # {split: the SHA256 of its tokens and tokenizer}
    tokenizer: dict  # its to_dict()
    valid: tuple | None = None  # the Text on which it is scored, see judge.py
    test: tuple | None = None  # another, if there is one


def is_flags(side):
    """Whether a side is the current files, with or without flags, and not a commit."""
    return not side or side.startswith("-")


@contextlib.contextmanager
def copied_sides(options):
    """The Copies of both sides, which are deleted at the end of the block."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.path.realpath(temporary))
        yield copy_side(options.before, folder / "0"), copy_side(options.after, folder / "1")


def copy_side(typed, folder):
    """The Copy of a commit, or of the current files for flags; folder: is made for it."""
    name = typed or "your files"
    flags = []
    commit = "HEAD"
    folder.mkdir()
    if is_flags(typed):
        with explain_errors(f"{name} cannot be read as flags"):
            flags = shlex.split(typed or "")
        names = list_files("--cached", "--others") or files_without_git()
    else:
        commit = typed
        copy_commit(typed, folder)
        names = list_files("--others")
    linked = copy_files(names, folder)
    code_words = {}
    for path in sorted(folder.rglob("*")):
        source = str(path.relative_to(folder))
        if path.is_file() and not re.match(IGNORED_FILES, source):
            code_words[source] = words_of_file(path)
    commit = git("rev-parse", "--short", commit).decode().strip()
    return Copy(name, flags, commit, folder, linked, code_words)


def git(*words, **options):
    """What a git command prints in the program's folder: bytes, none without git or repository.

    options: of subprocess.run.
    """
    options = {"stderr": subprocess.PIPE} | options
    with contextlib.suppress(FileNotFoundError):
        command = ["git", "-C", HERE, *words]
        return subprocess.run(command, stdout=subprocess.PIPE, **options).stdout
    return b""


def list_files(*kinds):
    """The paths of files that git lists and does not ignore; kinds: options of `git ls-files`."""
    names = git("ls-files", "-z", "--exclude-standard", *kinds)
    return os.fsdecode(names).split("\0")[:-1]


def files_without_git():
    """The paths of the files beside main.py, and of all files in packages there."""
    paths = [*HERE.iterdir()]
    for package in HERE.glob("*/__init__.py"):
        paths += package.parent.rglob("*")
    return [str(path.relative_to(HERE)) for path in paths if path.is_file()]


def copy_commit(commit, folder):
    """Copies the program as it is in a commit."""
    # Its SHA1, or why there is none.
    tree = git("rev-parse", f"{commit}:./", stderr=subprocess.STDOUT).decode(errors="replace")
    tree = one_line(tree)
    environment = os.environ | {"GIT_INDEX_FILE": folder.with_suffix(".index")}
    for words in (["read-tree", tree], ["checkout-index", "--all"]):
        git("--work-tree", folder, *words, env=environment)
    if not (folder / "datasets.py").exists():
        what = f"is no commit with this program, in a git repository at {HERE}"
        raise UsageError(f"{commit} {what} ({tree[-200:]})")


def copy_files(names, folder):
    """Copies the program's current files, since the user may go on editing them.

    A file that exists in `folder` stays. Links large files, and folders that git lists, such as a
    repository in this one; returns their names.
    """
    linked = []
    for name in names:
        path = HERE / name
        target = folder / name
        if os.path.lexists(target) or not path.exists():  # git also lists deleted files
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or path.stat().st_size > MAX_COPIED_FILE_BYTES:
            target.symlink_to(path)
            linked.append(name)
        else:
            shutil.copy(path, target)
    return linked


def words_of_file(path):
    """What counts of a file, a list: of Python code, not layout and comments.

    A linked file may be too large to be read each time: it is known by its size and time.
    """
    if path.is_symlink():
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]
    if path.suffix == ".py":
        return words_of_code(path.read_text("utf-8", errors="replace"))
    return [hash_of_file(path)]


class SideError(RunError):
    """A side cannot run, through its own fault, not the machine's; its name comes first."""


class KilledError(SideError):
    """A signal or a lack of memory has ended a process of a side; perhaps the machine did it."""


def retry_once(function, *arguments):
    """Calls a function; once more if it raises KilledError."""
    try:
        return function(*arguments)
    except KilledError:
        return function(*arguments)


def process_error(name, status, output):
    """The exception for a failed process of a side; name: the side's.

    Its message has the last line of `output`, and the file and line of a traceback there.
    """
    if status < 0:
        return KilledError(f"{name} cannot run: ended by {signal.Signals(-status).name}")
    line = one_line(output.strip().rpartition("\n")[2]) or f"exit status {status}"
    for file, line_number in re.findall(r'File ".*?(\w+\.py)", line (\d+)', output)[-1:]:
        line += f" ({file}, line {line_number})"
    line = f"{name} cannot run: {line}"
    if re.search("MemoryError|out of memory", line):
        return KilledError(line)
    if status == 2:
        return UsageError(line)
    return RunError(line) if "OSError" in line else SideError(line)


class Worker(contextlib.AbstractContextManager):
    """A process that answers questions about a side by its code, see worker.py."""

    def __init__(self, side, *words, **options):
        """side: a Copy or a Side; words: the question; options: of Popen."""
        self.side = side
        self.messages = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, "-B", WORKER, side.folder, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            **options,
        )
        self.killer = threading.Timer(TIMEOUT_SECONDS, self.process.kill)
        self.killer.start()

    def __exit__(self, *error):
        self.killer.cancel()
        self.process.kill()
        self.process.communicate()
        self.messages.close()

    def ask(self, question=b""):
        """The next answer, plain data, after a question is written to its stdin."""
        try:
            self.process.stdin.write(question)
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            self.process.wait()
            self.messages.seek(0)
            output = self.messages.read()
            raise process_error(self.side.name, self.process.returncode, output) from None


def make_side(copy, words):
    """The Side of a Copy with these flags; its code answers, see `describe` in worker.py."""
    with Worker(copy, "describe", *words) as worker:
        return Side(**vars(copy), **worker.ask())


def identify(side, *others):
    """A digest of all that decides how the runs of a side end; others: more of it, plain data."""
    return hash_of_data([side.identity, side.tokens_sha256, side.code_words, *others])[:12]


def install(side, folder):
    """Copies the files of a Side into a folder, unless it exists.

    Raises UsageError if they were changed there.
    """
    with hold_lock(folder.parent):
        if not folder.exists():
            # Renamed when complete, so that `folder` never holds half a copy.
            partial = folder.with_name(f"{folder.name}.{os.getpid()}")
            shutil.copytree(side.folder, partial, symlinks=True)
            for name, path in side.files.items():
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, target)
            partial.rename(folder)
    with explain_errors(f"a copy was changed: delete {folder}"):
        for source, words in side.code_words.items():
            if words_of_file(folder / source) != words:
                raise OSError(f"{source} is not that of {side.name}")
