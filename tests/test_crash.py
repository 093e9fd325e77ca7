"""A part of the two programs that disturb main.py from outside; tests/README.md has the rest."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX does not survive a fork")


def play(name, *arguments):
    """Runs one of the programs in one process; returns its exit status and what it printed."""
    command = [sys.executable, ROOT / "tests" / "nightly" / name, "--jobs", 1, *arguments]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


def test_faults():
    status, out = play("inject_faults.py", "--every", 1600)
    assert " 0 failures" in out, out
    assert status == 0


def test_strangers():
    status, out = play("fuzz_checkpoints.py", "--cases", 10, "--seed", 1)
    assert "10 cases, 0 failures" in out, out
    assert status == 0


def test_a_missing_fsync_is_found(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "extras", copy / "extras")
    for name in ("main.py", "datasets.py"):
        source = (ROOT / name).read_text().replace("os.fsync(", "os.fstat(")
        (copy / name).write_text(source)
    options = ["--scenario", "begin", "--every", 50, "--first", "--checkout", copy]
    status, out = play("inject_faults.py", *options)
    assert "1 failures" in out, out
    assert status == 1
