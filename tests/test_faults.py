"""The fault matrix on real processes: whatever interrupts a run, it ends with the SHA1 of the run never touched.

`pytest -m soak` runs the long version.
"""

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

# Reports each step, saves every 10th, evaluates every 20th; an epoch has 140 or so steps, so some end on the way.
LINE = [*TINY, "--batch_size", 8, "--context_size", 64, "--dropout", 0.1, "--steps_per_report", 1, "--steps_per_eval", 20, "--steps_per_save", 10]

# A child that ends itself, with nothing said or flushed, at the n-th call of those that a save consists of.
KILLED_AT = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import main
from conftest import Watched, watch_files
left = int(sys.argv.pop(1))
def deadly(function):
    def call(*arguments):
        global left
        left -= 1
        if left == 0:
            if function is write:
                arguments[0].file.write(bytes(arguments[1])[: len(arguments[1]) // 2])
                arguments[0].file.flush()
            os.kill(os.getpid(), 9)
        return function(*arguments)
    return call
main.open, write = watch_files, Watched.write
Watched.write = deadly(write)
os.replace, os.fsync, os.unlink = map(deadly, (os.replace, os.fsync, os.unlink))
sys.exit(main.main())
"""


def start_killed_at(call, *arguments):
    command = [sys.executable, "-c", KILLED_AT.format(root=str(ROOT)), str(call), *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def interrupt(line, folder, chance, times):
    """Starts `line` that often, each time interrupted in another way and at another moment; returns how often, by kind."""
    counts = {"SIGINT": 0, "SIGTERM": 0, "SIGKILL": 0, "in a save": 0}
    for _ in range(times):
        kind = chance.choice(list(counts))
        if kind == "in a save":
            process = start_killed_at(chance.randrange(1, 150), *line, "--save_dir", folder)
        else:
            process = start(*line, "--save_dir", folder)
            wait_for(process, "  loss ")
            time.sleep(chance.uniform(0, 0.2))
            process.send_signal(getattr(signal, kind))
        _, err = process.communicate(timeout=120)
        assert process.returncode in (130, 143, -9), err
        counts[kind] += 1
    return counts


def fault_matrix(tmp_path, text, seed, times):
    """Interrupts a run so many times, lets it go on for some steps, and compares it with one of as many steps at once."""
    import main

    line = ["--text", text, *LINE]
    counts = interrupt(line, tmp_path / "disturbed", random.Random(seed), times)
    num_iters = main.list_checkpoints(tmp_path / "disturbed")[0]["iteration"] + 15
    for name in ("disturbed", "undisturbed"):
        run(*line, "--save_dir", tmp_path / name, "--num_iters", num_iters)
    mine, theirs = (main.list_checkpoints(tmp_path / name)[0] for name in ("disturbed", "undisturbed"))
    assert mine["id"] == theirs["id"] and mine["scores"] == theirs["scores"] and mine["best"] == theirs["best"]
    left = {path.name for path in (tmp_path / "disturbed").iterdir()}
    left = [name for name in left if not re.fullmatch(r"[0-9a-f]{40}\.(safetensors|metadata)|\.text-[0-9a-f]{6}\.lock|text-[0-9a-f]{6}\.csv|text", name)]
    assert not left, "something was left behind"
    return counts | {"steps": num_iters}


def test_fault_matrix(tmp_path, text):
    counts = fault_matrix(tmp_path, text, seed=1, times=44)
    assert min(counts.values()) >= 5, counts


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 8))
def test_soak(tmp_path, text, seed):
    print(fault_matrix(tmp_path, text, seed, times=200))


def test_file_size_limit_lifted_later(tmp_path, text):
    """A save that the system refuses is tried again until it works, from the state in memory."""
    line = ["--text", text, *TINY, "--num_iters", 20]
    load_dataset("text", tmp_path / "lm", [text], valid_text=None, test_text=None)  # tokens beyond the limit
    limited = ["bash", "-c", 'ulimit -S -f 8; exec "$0" "$@"', sys.executable, ROOT / "main.py", *line, "--save_dir", tmp_path / "lm"]
    process = subprocess.Popen(list(map(str, limited)), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert "next try in 1 s" in wait_for(process, "failed")
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
        assert "Low on space" in wait_for(process, "Low on space")
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
    assert re.search(r"Iteration \d[\d,]* of --num_iters 2 is reached", out)
