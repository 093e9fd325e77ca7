"""A part of the fuzzer: no case may end badly, and it has to find a bug that is planted."""

import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX does not survive a fork")


def fuzz(*arguments):
    """Runs tests/fuzz.py; returns its exit status and what it printed."""
    command = [sys.executable, ROOT / "tests" / "fuzz.py", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return ended.returncode, ended.stdout + ended.stderr


def test_no_case_ends_badly():
    status, shown = fuzz("--seed", 1, "--cases", 100)
    assert "100 cases, 0 findings" in shown, shown
    assert status == 0


def test_a_planted_bug_is_found():
    names = ("a record is unchecked", "nothing")
    status, shown = fuzz("--seed", 11, "--cases", 20, "--planted", *names)
    assert "1 of 2 found" in shown, shown
    assert status == 1
