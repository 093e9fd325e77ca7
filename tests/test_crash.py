"""A part of the two programs that disturb main.py from outside; tests/README.md has the rest."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, copy_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX does not survive a fork")


def play(name, *arguments, failures=0):
    """Runs one of the programs in one process; so many of its cases have to fail."""
    command = [sys.executable, ROOT / "tests" / "nightly" / name, "--jobs", 1, *arguments]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True)
    out = ended.stdout + ended.stderr
    assert re.search(rf"\b[1-9]\d* cases, {failures} failures", out), out
    assert ended.returncode == failures


def test_faults():
    play("inject_faults.py", "--every", 1600)


def test_strangers():
    play("fuzz_checkpoints.py", "--cases", 10, "--seed", 1)


def test_a_missing_fsync_is_found(tmp_path):
    main_path = copy_program(tmp_path / "copy")
    path = main_path.parent / "support/files.py"
    path.write_text(path.read_text().replace("os.fsync(", "os.fstat("))
    options = ["--scenario", "begin", "--every", 50, "--first", "--checkout", main_path.parent]
    play("inject_faults.py", *options, failures=1)
