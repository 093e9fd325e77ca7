"""Several ranks train one model: as one process does, to rounding.

None is left behind when one of them goes.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import CACHES, MAIN, TINY, assert_equal, copy_program, ids, newest, rows_of, run
from conftest import start, wait_for

LINE = [*TINY, *"--text text.txt --num_iters 12 --steps_per_report 1".split()]
LINE += "--learning_rate 3e-3 --dropout 0.2".split()
LAUNCH = "import sys; from mlx._distributed_utils.launch import main; sys.exit(main())"


@pytest.fixture
def line(tmp_path, text):
    """A command in a folder with its text, which one process has followed, in the folder `one`."""
    run(*LINE, "--save_dir=one", cwd=tmp_path)
    return LINE


def free_ports(count):
    """Ports of the loopback address that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start_ranks(size, folder, *arguments, last=(), program=MAIN, timeout="10"):
    """The processes that `mlx.launch -n size` would start, with MLX's ring between them.

    All but the first are in an empty folder. last: arguments of the last one alone; program: its;
    timeout: how many seconds a rank may be silent.
    """
    hosts = folder / f"hosts-{os.urandom(3).hex()}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    (folder / "empty").mkdir(exist_ok=True)
    processes = []
    for rank in range(size):
        env = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "RANKS_TIMEOUT": timeout}
        env |= {"HOME": str(folder / "empty"), "XDG_CACHE_HOME": CACHES}
        options = {"env": env, "cwd": folder / "empty" if rank else folder}
        if rank == size - 1:
            process = start(*arguments, *last, program=[program], **options)
        else:
            process = start(*arguments, **options)
        processes.append(process)
    return processes


def finish(processes):
    """What the ranks print, [(stdout, stderr)], and their exit statuses."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=60))
    finally:
        for process in processes:
            process.kill()
    return outputs, [process.returncode for process in processes]


def run_ranks(size, folder, *arguments):
    """What rank 0 prints; the others print nothing and write no file."""
    outputs, statuses = finish(start_ranks(size, folder, *arguments))
    assert statuses == [0] * size, outputs
    assert not any(out for out, _ in outputs[1:])
    assert not list((folder / "empty").iterdir())
    return outputs[0][0]


def assert_equal_runs(folder, other):
    """Their losses and weights are the same, to rounding."""
    losses = []
    weights = []
    for each in (folder, other):
        checkpoint = newest(each)
        losses.append([row["loss"] for row in rows_of(checkpoint.folder / "log.csv", "train")])
        weights.append(mx.load(str(checkpoint.weights_path)))
    np.testing.assert_allclose(*losses, atol=1e-5)
    assert_equal(*weights, atol=2e-5)


@pytest.mark.parametrize("size, num_scores, options", [
    (2, 3, "--grad_accumulation 2 --average 0.3 --batch_size 5 --steps_per_eval 6 --eval_test"),
    (3, 1, "--optimizer muon --untie --grad_checkpoint --qk_norm --num_blocks 1"),
])  # fmt: skip
def test_the_steps_are_those_of_one_process(tmp_path, text, size, num_scores, options):
    (tmp_path / "test.txt").write_text(text.read_text()[:2000])
    given = [*LINE, "--test_text=test.txt", *options.split()]
    alone, _ = run(*given, "--save_dir=one", cwd=tmp_path)
    together = run_ranks(size, tmp_path, *given, "--save_dir=lm")
    assert_equal_runs(tmp_path / "lm", tmp_path / "one")
    score = re.compile(r"(?<!best: )\b(?:valid|test) [\d.]+ nats")
    assert score.findall(together) == score.findall(alone)
    assert len(score.findall(alone)) == num_scores


def test_lora_with_a_teacher(tmp_path, line):
    shutil.copytree(tmp_path / "one", tmp_path / "lm")
    given = [*line, *"--init_from latest --teacher latest --lora_rank 2".split()]
    run(*given, "--save_dir=one", cwd=tmp_path)
    run_ranks(2, tmp_path, *given, "--save_dir=lm")
    assert newest(tmp_path / "lm").flags["lora_rank"] == 2
    assert_equal_runs(tmp_path / "lm", tmp_path / "one")


def test_saved_by_two_resumed_by_one_and_back(tmp_path, line):
    given = [*line, "--save_dir=lm", "--num_iters"]
    run_ranks(2, tmp_path, *given, 4)
    out, _ = run(*given, 8, cwd=tmp_path)
    assert "from iteration 4 to 8" in out and "ranks 2 -> 1" in out
    out = run_ranks(2, tmp_path, *given, 12)
    assert "from iteration 8 to 12" in out and "2 ranks;" in out
    assert_equal_runs(tmp_path / "lm", tmp_path / "one")


def test_another_command_is_that_of_one_process(tmp_path, line):
    given = "--evaluate valid --eval_stride 7 --save_dir one".split()
    alone, _ = run(*given, cwd=tmp_path)
    together = run_ranks(2, tmp_path, *given)
    score = re.compile(r"valid (.*), [\d,]+ tokens/s")
    assert score.findall(together) == score.findall(alone) != []


@pytest.mark.parametrize("number, signalled", [(signal.SIGTERM, [1]), (signal.SIGINT, [0, 1])])
def test_signal_to_any_rank_stops_all(tmp_path, text, number, signalled):
    ranks = start_ranks(2, tmp_path, *LINE, "--num_iters=100000", "--save_dir=lm")
    wait_for(ranks[0], "20/100,000 ")
    for rank in signalled:
        ranks[rank].send_signal(number)
    [(out, err), (_, other)], statuses = finish(ranks)
    assert statuses == [128 + number, 0], (out, err, other)
    assert "Stopped at iteration" in out and len(ids(tmp_path / "lm")) == 1, "saved once"
    assert "Traceback" not in err + other


@pytest.mark.parametrize("size, victim, number", [(3, 0, signal.SIGKILL), (2, 1, signal.SIGSTOP)])
def test_a_rank_that_is_gone_or_silent_ends_the_others(tmp_path, text, size, victim, number):
    given = [*LINE, *"--save_dir lm --steps_per_save 2 --num_iters".split()]
    ranks = start_ranks(size, tmp_path, *given, 100_000, timeout="3")
    wait_for(ranks[0], "at iteration 4")
    ranks[victim].send_signal(number)
    others = [rank for rank in ranks if rank is not ranks[victim]]
    try:
        outputs, statuses = finish(others)
    finally:
        ranks[victim].kill()
    assert statuses == [1] * len(others), outputs
    for _, err in outputs:
        [said] = [line for line in err.splitlines() if not line.startswith("[ring]")]
        assert said.startswith("main.py: another rank is gone (")
        assert said.endswith(": rerun the command to resume from the last checkpoint")
    saved = newest(tmp_path / "lm").iteration
    out, _ = run(*given, saved + 2, cwd=tmp_path)
    assert f"from iteration {saved:,} to {saved + 2:,}" in out


def test_ranks_whose_launcher_is_gone_stop_saved(tmp_path, text):
    ports = ["--starting-port", free_ports(1)[0]]
    given = "--save_dir lm --num_iters 100000 --steps_per_eval 100000".split()
    command = [sys.executable, "-c", LAUNCH, "-n", 2, *ports, "--", sys.executable, MAIN, *LINE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen([*map(str, [*command, *given])], cwd=tmp_path, **pipes)
    wait_for(launcher, "20/100,000 ")
    launcher.kill()
    deadline = time.monotonic() + 60
    while not ids(tmp_path / "lm"):
        assert time.monotonic() < deadline, "ranks were left alone in the world"
        time.sleep(0.1)
    assert newest(tmp_path / "lm").segments[-1].versions["ranks"] == 2


@pytest.mark.parametrize("env, status, said", [
    ({"MLX_RANK": "0"}, 1, "unset MLX_RANK"),
    ({"PMI_SIZE": "2"}, 1, "unset MLX_RANK"),
    ({"MLX_RANK": "0", "MLX_HOSTFILE": "hosts.json"}, 1, "start two or more with mlx.launch"),
    ({"MLX_RANK": "0", "NCCL_HOST_IP": "127.0.0.1"}, 2, "give mlx.launch --backend ring"),
])  # fmt: skip
def test_ranks_that_cannot_meet(tmp_path, env, status, said):
    """What another launcher sets, what an earlier one has left, and `mlx.launch -n 1`."""
    (tmp_path / "hosts.json").write_text("\n")
    _, err = run("--list", "--save_dir", ".", env=env, cwd=tmp_path, status=status)
    assert err.count("\n") == 1
    assert re.search("ranks cannot meet|cannot join the other ranks", err) and said in err


OTHER = "rank 1 has another command line, other files in its folder, or another version of MLX"


@pytest.mark.parametrize("given, last, edit, said", [
    (["--batch_size=1"], [], "", "--batch_size 1 leaves some of the 2 ranks without a row"),
    ([], ["--seed=2"], "", OTHER),
    ([], [], "# other\n", OTHER),
])  # fmt: skip
def test_a_mistake_is_said_once(tmp_path, text, given, last, edit, said):
    """edit: what the last rank's copy of the program has at the end of one of its files."""
    program = copy_program(tmp_path / "copy")
    with open(tmp_path / "copy" / "extras" / "features" / "lora.py", "a") as file:
        file.write(edit)
    ranks = start_ranks(2, tmp_path, *LINE, *given, last=last, program=program)
    outputs, statuses = finish(ranks)
    assert statuses == [2, 0], outputs
    [(_, err), (_, other)] = outputs
    assert said in err.splitlines()[-1]
    assert not other
