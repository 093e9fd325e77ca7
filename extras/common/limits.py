"""What this process may use of its machine: by affinity, and in a container or a job."""

import contextlib
import functools
import math
import os
from pathlib import Path


@functools.cache
def count_cores():
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
