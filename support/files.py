"""Folders, locks, and files that appear whole; hashes of what they hold."""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from support.cli import UsageError, explain_errors, one_line, say, utf8

# ---- Folders ------------------------------------------------------------------------------------


def user_path(path):
    """`path` with ~, ~name and $NAME replaced by what they stand for.

    Raises UsageError for a URL, and if they stand for nothing and no file has literally that name.
    """
    if re.match(r"\w+://", str(path)):
        raise UsageError(f"{path} is an address: download the file, and name it by its path")
    # A folder's own name may have a $.
    if any("$" in str(each) and os.path.lexists(each) for each in (path, *Path(path).parents)):
        return str(path)
    expanded = os.path.expanduser(os.path.expandvars(path))
    if (expanded.startswith("~") or "$" in expanded) and not os.path.lexists(expanded):
        raise UsageError(
            f"{path}: no such user or variable; write the folder out, or put ./ before a name "
            "that begins with ~"
        )
    return expanded


def absolute(path):
    """A path that is valid from any working directory; see user_path."""
    return os.path.abspath(user_path(path))


def absolute_pattern(path):
    """A path or a glob pattern that is valid from any working directory.

    Only what was typed is a pattern, not the names of the folders around it.
    """
    plain = absolute(path)
    if os.path.exists(plain):
        return plain
    folder, pattern = re.fullmatch(r"([^*?[]*/)?(.*)", str(path), re.DOTALL).groups()
    return os.path.join(glob.escape(absolute(folder or ".")), pattern)


CACHE = None  # there is no home folder
# The user's cache folder, from which compiled code is loaded: never a relative path, as the working
# directory may hold another user's files. (The XDG specification ignores such paths, too.)
for caches in (os.path.expanduser("~/.cache"), os.environ.get("XDG_CACHE_HOME", "")):
    if os.path.isabs(caches):
        CACHE = Path(caches, "transformer-lm")
RAM_DISK = Path("/Volumes/RAMDisk")  # on macOS, if the user has made one of this name
RAM_DISK_SIZE = 4 << 30  # bytes, at least; tinystories and its tokens take 3 GiB


def make_data_dir(data_dir=None):
    """The folder for corpora, downloads and tokens as a Path, created if it is missing.

    It is `data_dir`, if given; else a folder on a RAM disk, if mounted; else the first of CACHE and
    runs/ that is writable. Raises UsageError if none is.
    """
    if data_dir is not None:
        folders = [Path(user_path(data_dir))]
    else:
        folders = [CACHE, Path("runs")]
        if os.path.ismount(RAM_DISK):
            if shutil.disk_usage(RAM_DISK).total >= RAM_DISK_SIZE:
                folders = [RAM_DISK / "transformer-lm"]
            else:
                print(f"{RAM_DISK} is not used: it has less than {RAM_DISK_SIZE:,} bytes.")
    for folder in filter(None, folders):
        try:
            make_writable(folder)
            return folder
        except OSError as error:
            reason = one_line(error)
    raise UsageError(
        f"cannot write texts to {folder}: name a folder of yours by --data_dir ({reason})"
    )


def check_save_dir(save_dir):
    """Raises UsageError if MLX cannot read files in the folder of runs."""
    path = str(save_dir.absolute())
    if utf8(path) != path:
        raise UsageError(f"--save_dir {path}: MLX reads only names in UTF-8; rename it")


def make_save_dir(save_dir):
    """Makes the folder of runs, if it is missing. Raises UsageError if it is not writable."""
    with explain_errors(f"cannot write to --save_dir {save_dir}: name a folder of yours", OSError):
        make_writable(save_dir)


def make_writable(folder):
    """Makes a folder; raises OSError if no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # it may exist but be read-only


def is_on_ram_disk(path):
    """Whether a path lies in one of the folders that --help names for that."""
    return os.path.realpath(path).startswith((f"{RAM_DISK}/", "/dev/shm/"))


def size_of(folder):
    """The bytes of all files in a folder."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            size += path.lstat().st_size
    return size


# ---- Files that appear whole --------------------------------------------------------------------


def lock_file(file, wait=True):
    """Locks an open file, or its descriptor, until it is closed, if the file system has locks.

    wait: for a process that holds the lock; if False, raises BlockingIOError instead.
    """
    import fcntl  # here, as Windows lacks it, where extras.versus.losses needs none

    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # the file system has no locks
        pass


@contextlib.contextmanager
def hold_lock(folder):
    """Makes a folder, holds its lock, and deletes what killed calls of `new_file` left there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as lock:
        lock_file(lock)
        remove_leftovers(folder)
        yield


def open_no_follow(path, flags):
    """An `opener` for open(): raises OSError if `path` is a link, which might lead anywhere.

    Opening a pipe does not wait for its other end.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


@contextlib.contextmanager
def new_file(folder):
    """Yields a new binary file in a folder, for `publish`; deletes it if the block fails."""
    path = Path(folder, f".{os.urandom(8).hex()}.new")
    # "x" follows no link and opens no file that exists.
    with open(path, "xb") as file:
        try:
            yield file
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def publish(file, path):
    """Syncs a `new_file` and renames it to `path` atomically, replacing an old file."""
    file.close()  # a file that is open for writing cannot be executed
    sync(file.name)  # before the old file is replaced
    os.replace(file.name, path)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a new binary file, which replaces `path` when the block ends.

    If the block or the disk fails, an old file at `path` stays intact. Raises OSError.
    """
    path = Path(path)
    with new_file(path.parent) as file:
        yield file
        publish(file, path)


def remove_leftovers(folder):
    """Deletes what killed processes left of `new_file`; no other process may write to `folder`."""
    for path in folder.glob(f".{'[0-9a-f]' * 16}.new"):
        with contextlib.suppress(OSError):  # a folder, or another user's: it does no harm
            path.unlink()


@functools.cache  # once
def warn_of_sync(reason):
    say(
        f"The file system cannot sync folders ({reason}): after a power cut, a save may be missing."
    )


def sync(path):
    """Waits until a file, or the names in a folder, are on disk and would survive a power cut."""
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:  # macOS, whose fsync stops at the disk's cache
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except (AttributeError, OSError):  # another system, or a disk that cannot
            os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder: then the file has to do.
        if error.errno in (errno.EIO, errno.ENOSPC) or not os.path.isdir(path):
            raise
        warn_of_sync(one_line(error))
    finally:
        os.close(descriptor)


# ---- Hashes -------------------------------------------------------------------------------------


def hash_of_data(data):
    """The SHA256 of plain data."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def hash_of_file(path, algorithm=hashlib.sha256, opener=None):
    """The hash of a file, which may be larger than memory. Raises OSError."""
    digest = algorithm()
    with open(path, "rb", opener=opener) as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def sha1_of_text(text):
    """The SHA1 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha1(text.encode()).hexdigest()


def sha1_of_file(path):
    """The SHA1 of a file, but not of a symbolic link. Raises OSError."""
    return hash_of_file(path, hashlib.sha1, open_no_follow)
