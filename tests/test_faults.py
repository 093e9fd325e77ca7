"""Faults of all kinds on real processes: a disturbed run ends as the one that was never touched.

`pytest -m soak` runs the long version: ten thousand faults, and one at every single call of a short
run. tests/soak.py says what a fault is, and repeats one.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, ids, run, run_folder, start
from test_interrupts import wait_for

import main
from datasets import load_dataset


def run_soak(*arguments):
    """Runs tests/soak.py; returns what it prints, and its counts by kind.

    It prints its failures with how to repeat them.
    """
    command = [sys.executable, ROOT / "tests" / "soak.py", *arguments]
    process = subprocess.run(
        [*map(str, command)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout, json.loads(process.stdout.splitlines()[-1])


def test_faults_of_many_kinds():
    import soak

    faults = 40 if soak.FORKS else 20  # elsewhere one costs ten times as much
    out, counts = run_soak("--seed", 2, "--faults", faults, "--jobs", 1)
    assert sum(counts.values()) >= faults
    assert len(counts) >= 0.6 * faults, out  # the seed gives 32 kinds of 44


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
    save_dir = tmp_path / "lm"
    line = ["--text", text, *TINY, "--num_iters", 20]
    load_dataset("text", save_dir, [text])  # whose tokens are beyond the limit
    program = [sys.executable, ROOT / "main.py", *line, "--save_dir", save_dir]
    limited = ["bash", "-c", 'ulimit -S -f 8; exec "$0" "$@"', *program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*map(str, limited)], text=True, **pipes)
    assert "retrying in 1 s" in wait_for(process, "failed")
    assert not ids(save_dir)
    assert not list(save_dir.rglob("*.new"))
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    run(*line, "--save_dir", tmp_path / "undisturbed")
    assert ids(save_dir) == ids(tmp_path / "undisturbed")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)])


def test_full_disk_and_double_ctrl_c(tmp_path, text, small_disk):
    line = ["--text", text, *TINY]
    run(*line, "--num_iters", 20, "--save_dir", small_disk)
    good = ids(small_disk)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))
    process = start(*line, "--num_iters", 40, "--save_dir", small_disk)
    assert "No space left" in wait_for(process, "failed")
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.poll() is None, "a single one asks for the save"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert ids(small_disk) == good
    ballast.unlink()
    run(*line, "--num_iters", 40, "--save_dir", small_disk)
    run(*line, "--num_iters", 40, "--save_dir", tmp_path / "undisturbed")
    assert ids(small_disk)[0] == ids(tmp_path / "undisturbed")[0]


def test_folder_that_vanishes(tmp_path, text):
    line = ["--text", text, *TINY, "--num_iters", 600, "--steps_per_save", 200]
    process = start(*line, "--save_dir", tmp_path / "lm")
    wait_for(process, "saved")
    # By its name, in one step: the program may create files while a folder is emptied.
    (tmp_path / "lm").rename(tmp_path / "gone")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    run(*line, "--save_dir", tmp_path / "undisturbed")
    assert ids(tmp_path / "lm")[0] == ids(tmp_path / "undisturbed")[0]


def test_damaged_newest_is_named_and_passed_over(tmp_path, text):
    line = ["--text", text, *TINY, "--num_iters", 60, "--steps_per_save", 20]
    line += ["--save_dir", tmp_path]
    run(*line)
    newest = ids(tmp_path)[0]
    path = run_folder(tmp_path) / f"{newest}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    named = ["--inference", "--identifier", newest, "--save_dir", tmp_path]
    _, err = run(*named, status=1)
    assert err.count("\n") == 1
    assert "is damaged" in err
    _, err = run("--inference", "--save_dir", tmp_path, input="line 5")
    assert newest[:12] in err
    assert "iteration 40" in err
    out, err = run(*line)
    assert newest[:12] in err
    assert "from iteration 40" in out
    assert ids(tmp_path)[0] == newest, "the same steps end in the same bytes"
    main.list_checkpoints(tmp_path)[0].open()


def test_second_process_is_refused(tmp_path, text):
    line = ["--text", text, *TINY, "--save_dir", tmp_path, "--steps_per_save", 20]
    first = start(*line)
    wait_for(first, "saved")
    _, err = run(*line, status=2)
    assert err.count("\n") == 1
    assert "another process" in err
    assert "--new_model" in err
    # Other runs in the folder, an equal one among them, are trained at the same time.
    equal, _ = run(*line, "--new_model", "--num_iters", 40)
    assert "at iteration 40" in equal
    other, _ = run(*line, "--seed", 7, "--num_iters", 40)
    assert "at iteration 40" in other
    name = next(path.name for path in tmp_path.glob("text-*") if is_locked(path))
    first.kill()  # the lock dies with its holder
    first.communicate()
    out, _ = run(*line, "--identifier", name, "--num_iters", 2)
    assert f"run      {name}, from iteration" in out


def is_locked(folder):
    """Whether another process trains a run."""
    try:
        with main.lock(folder, main.fcntl.LOCK_EX | main.fcntl.LOCK_NB):
            return False
    except BlockingIOError:
        return True
