"""What this process may use of its machine, and where compiled code is kept."""

import atexit
import contextlib
import functools
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

from support.cli import explain_errors
from support.files import CACHE, atomic_write, hash_of_data


REFERENCE_BLAS = "reference BLAS"  # bundled with MLX's Linux wheel


cores_in_use = None  # see use_cores


def use_cores(count):
    """Makes a run compute as on so many cores: the order of its sums depends on their number."""
    global cores_in_use
    cores_in_use = count


def count_cores():
    """The cores of the run, or those that are there."""
    return cores_in_use or available_cores()


@functools.cache
def available_cores():
    """The cores that this process may use, by its affinity and its container's share of time."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    for quota, period in read_cgroups("{}/cpu.max"):
        cores = min(cores, math.ceil(quota / period))
    return cores


def limit_of_memory():
    """The memory that this process may use, in bytes."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limits = [*read_cgroups("{}/memory.max"), *read_cgroups("memory/{}/memory.limit_in_bytes")]
    return min(sizes + [size for [size] in limits])


def read_cgroups(name):
    """Yields the numbers [N] in a file of this process's control groups and of those around them.

    name: with {} for a group, like "{}/cpu.max" in the second version of control groups.
    """
    lines = []  # like "0::/user.slice/job.scope"; only Linux has them
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    for line in lines:
        group = Path(line.split(":", 2)[2].lstrip("/"))
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file; "max" for no limit
                text = Path("/sys/fs/cgroup", name.format(folder)).read_text("utf-8")
                yield [*map(int, text.split())]


def cpu_info():
    """What Linux says about the CPU; "" if nothing."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text("utf-8")
    return ""


@functools.cache
def make_kernel_dir():
    """The folder for compiled code, which is loaded from there: no other user can write to it.

    It is in CACHE, one for each kind of system and CPU, as machines may share a home. If there is
    no home, or it cannot hold code, the folder is a temporary one, deleted at exit.
    """
    if CACHE is not None and not re.search(r'[$`"\\]', str(CACHE)):  # MLX's shell would read these
        instructions = hash_of_data(re.findall("^(?:flags|Features).*", cpu_info(), re.M)[:1])[:8]
        # Raise the 3 if code that was compiled before must not be loaded again.
        words = ["code", "3", platform.machine(), *platform.libc_ver(), instructions]
        folder = CACHE / "-".join(words)
        with contextlib.suppress(OSError):
            folder.mkdir(0o700, parents=True, exist_ok=True)
            status = os.lstat(folder)  # of a link itself, which counts as writable by all
            is_private = status.st_uid == os.getuid() and not status.st_mode & 0o022
            is_noexec = os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0)
            if is_private and os.access(folder, os.W_OK) and not is_noexec:
                return folder
    with explain_errors("no folder for compiled code: set TMPDIR to a folder of yours", OSError):
        folder = tempfile.mkdtemp(prefix="transformer-lm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


# Runs a compiler without variables that may hide its own headers, as a system of modules sets them.
CLEAN = "env -u CPATH -u C_INCLUDE_PATH -u CPLUS_INCLUDE_PATH -u GCC_EXEC_PREFIX".split()
# What MLX runs as g++. It ignores signals: a terminal's Ctrl+C reaches it, too, and would end it in
# the middle of a step.
COMPILER_SCRIPT = """#!/bin/sh
trap '' INT TERM HUP USR1 USR2 XCPU
unset CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH GCC_EXEC_PREFIX
{}
"""


def use_compiler(folder, command):
    """Makes MLX run a shell command as its g++: a script in a folder that comes first in PATH.

    If the script cannot be written, MLX finds the real g++. In TMPDIR, libraries that a power cut
    has left incomplete are deleted, to be compiled again.
    """
    path = folder / "g++"
    script = COMPILER_SCRIPT.format(command)
    with contextlib.suppress(OSError):
        if not path.exists() or path.read_text("utf-8") != script:
            with atomic_write(path) as file:
                file.write(script.encode())
                os.fchmod(file.fileno(), 0o700)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    for library in Path(os.environ["TMPDIR"]).glob("mlx/*/cpu/lib*.so"):
        with contextlib.suppress(OSError):
            head = library.open("rb").read(48)
            # An ELF file ends with a table, and its first bytes say where that begins.
            table = int.from_bytes(head[40:], sys.byteorder)
            is_whole = head.startswith(b"\x7fELF") and library.stat().st_size > table
            if sys.platform == "linux" and not is_whole:
                library.unlink()
