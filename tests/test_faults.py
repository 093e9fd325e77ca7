"""Faults of all kinds on real processes: whatever disturbs a run, it ends as the run that was never touched.

`pytest -m soak` runs the long version: ten thousand faults, and one at every single call of a short run. tests/soak.py
says what a fault is, and repeats one.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, ids, run, start
from test_interrupts import wait_for

from datasets import load_dataset


def run_soak(*arguments):
    """Runs tests/soak.py, whose failures are printed with how to repeat them; returns what it prints, and its counts by kind."""
    command = [sys.executable, ROOT / "tests" / "soak.py", *arguments]
    process = subprocess.run(list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.returncode == 0, process.stdout
    return process.stdout, json.loads(process.stdout.splitlines()[-1])


def test_faults_of_all_kinds():
    import soak

    if not soak.FORKS:  # where a fault costs ten times as much
        run_soak("--seed", 1, "--faults", 40)
        return
    out, counts = run_soak("--seed", 1, "--faults", 120)
    places = ["process", "ranks"] + ["small disk"] * (os.geteuid() == 0)  # root alone can mount
    rare = {kind for place in places for kind in soak.FAULTS[place] if counts.get(kind, 0) < 2}
    assert not rare, out


@pytest.mark.soak
@pytest.mark.parametrize("part", range(10))
def test_soak(part, capsys):
    """A thousand faults; SOAK_SEED repeats those of an earlier time."""
    seed = os.environ.get("SOAK_SEED") or random.randrange(10**6)
    out, _ = run_soak("--seed", f"{seed}-{part}", "--faults", 1000)
    with capsys.disabled():
        print(f"\nSOAK_SEED={seed}, part {part}: {out}")


@pytest.mark.soak
def test_every_call(capsys):
    out, _ = run_soak("--sweep")
    with capsys.disabled():
        print(f"\n{out}")


def test_file_size_limit_lifted_later(tmp_path, text):
    """A save that the system refuses is tried again until it works, from the state in memory."""
    line = ["--text", text, *TINY, "--num_iters", 20]
    load_dataset("text", tmp_path / "lm", [text], valid_text=None, test_text=None)  # tokens beyond the limit
    limited = ["bash", "-c", 'ulimit -S -f 8; exec "$0" "$@"', sys.executable, ROOT / "main.py", *line, "--save_dir", tmp_path / "lm"]
    process = subprocess.Popen(list(map(str, limited)), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert "retrying in 1 s" in wait_for(process, "failed")
    assert not ids(tmp_path / "lm") and not list((tmp_path / "lm").glob("*.new"))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    run(*line, "--save_dir", tmp_path / "undisturbed")
    assert ids(tmp_path / "lm") == ids(tmp_path / "undisturbed")


def test_full_disk_and_double_ctrl_c(tmp_path, text):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        line = ["--text", text, *TINY, "--num_iters", 20, "--save_dir", disk]
        run(*line)
        good = ids(disk)
        (disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(disk).free - 20_000))
        process = start(*line[:-3], 40, *line[-2:])
        assert "Low on disk space" in wait_for(process, "Low on disk space")
        assert "No space left" in wait_for(process, "failed")
        process.send_signal(signal.SIGINT)
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130 and ids(disk) == good
        (disk / "ballast").unlink()
        run(*line[:-3], 40, *line[-2:])
        run("--text", text, *TINY, "--num_iters", 40, "--save_dir", tmp_path / "undisturbed")
        assert ids(disk)[0] == ids(tmp_path / "undisturbed")[0]
    finally:
        subprocess.run(["umount", "-l", str(disk)])


def test_folder_that_vanishes(tmp_path, text):
    line = ["--text", text, *TINY, "--num_iters", 600, "--steps_per_save", 200]
    process = start(*line, "--save_dir", tmp_path / "lm")
    wait_for(process, "saved")
    shutil.rmtree(tmp_path / "lm")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    run(*line, "--save_dir", tmp_path / "undisturbed")
    assert ids(tmp_path / "lm")[0] == ids(tmp_path / "undisturbed")[0]


def test_damaged_newest_is_named_and_passed_over(tmp_path, text):
    line = ["--text", text, *TINY, "--num_iters", 60, "--steps_per_save", 20]
    run(*line, "--save_dir", tmp_path)
    newest = ids(tmp_path)[0]
    path = tmp_path / f"{newest}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    _, err = run("--inference", "--identifier", newest, "--save_dir", tmp_path, status=1)
    assert err.count("\n") == 1 and "is damaged" in err
    _, err = run("--inference", "--save_dir", tmp_path, input="line 5")
    assert newest[:12] in err and "iteration 40" in err
    out, err = run(*line, "--save_dir", tmp_path)
    assert newest[:12] in err and "from iteration 40" in out
    assert ids(tmp_path)[0] == newest, "the same steps end in the same bytes"
    import main

    assert main.find_damage(tmp_path, {"id": newest}) is None


def test_second_process_is_refused(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--steps_per_save", 20]
    first = start(*line)
    wait_for(first, "saved")
    _, err = run(*line, status=2)
    assert err.count("\n") == 1 and "another process" in err and "--new_model" in err
    # An equal run under another name comes to the same weights, each with metadata of its own.
    equal, _ = run(*line, "--new_model", "--num_iters", 40)
    assert "at iteration 40" in equal
    other, _ = run(*line, "--seed", 7, "--num_iters", 40)
    assert "at iteration 40" in other
    first.kill()  # the lock dies with its holder
    first.communicate()
    out, _ = run(*line, "--num_iters", 2)
    assert re.search(r"Run complete \(\d[\d,]*/2\)", out)
