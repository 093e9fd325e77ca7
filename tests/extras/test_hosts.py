"""Ranks on two machines, here network namespaces on a switch, with MLX's launcher or without."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT, TINY, free_ports, ids, newest, start
from hosts import Hosts, missing_tool
from test_interrupts import wait_for
from test_ranks import finish, run_ranks

import main
from datasets import CACHE

SILENCE = 4  # seconds, instead of a minute
CHECK = 1  # second between two looks, instead of five

# Runs Python in a namespace.
IN_NAMESPACE = """
import os, sys
name, *command = sys.argv[1:]
os.execvp("ip", ["ip", "netns", "exec", name, sys.executable, *command])
"""
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import main
from extras import ranks
ranks.SILENCE = {SILENCE}
ranks.CHECK = {CHECK}
sys.exit(main.main())
"""
HASTY = PROGRAM.replace("ranks.CHECK =", "ranks.START = ranks.ATTEMPT =")


@pytest.fixture
def hosts():
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    try:
        with Hosts() as hosts:
            yield hosts
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces: {error.stderr.decode()}")


@pytest.fixture
def hosts_with_ssh(hosts):
    """Hosts on which an sshd can be started."""
    missing = missing_tool()
    if missing:
        pytest.skip(f"hosts with ssh: {missing}")
    return hosts


@pytest.fixture
def served(hosts_with_ssh, tmp_path):
    """Hosts on which an sshd runs."""
    hosts_with_ssh.serve(tmp_path, CACHE.parent)
    return hosts_with_ssh


def start_on(hosts, folder, *arguments, program=PROGRAM):
    """A rank on each host, without ssh."""
    file = folder / "hosts.json"
    ports = free_ports(2)
    file.write_text(json.dumps([[f"{a}:{p}"] for a, p in zip(hosts.addresses, ports)]))
    processes = []
    for rank, name in enumerate(hosts.names):
        env = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)}
        in_namespace = ["-c", IN_NAMESPACE, name, "-c", program]
        processes.append(start(*arguments, env=env, program=in_namespace))
    return processes


def test_a_machine_that_pauses_is_waited_for_and_one_that_vanishes_is_not(hosts, tmp_path, text):
    folder = tmp_path / "lm"
    line = ["--text", text, *TINY, "--save_dir", folder, "--steps_per_save", 10]
    ranks = start_on(hosts, tmp_path, *line)
    wait_for(ranks[0], "at iteration 20")
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(SILENCE + CHECK + 1)
    saved = newest(folder).iteration
    ranks[1].send_signal(signal.SIGCONT)
    wait_for(ranks[0], f"at iteration {saved + 10:,}")

    hosts.cut(1)
    outputs, statuses = finish(ranks, SILENCE + 40)
    assert statuses == [1, 1], outputs
    for _, err in outputs:
        assert err.count("a rank failed or is gone") == 1, err
        assert "Traceback" not in err
    assert newest(folder).iteration >= saved + 10


def test_machines_that_cannot_meet(hosts, tmp_path, text):
    """A cable that is not plugged in, or a firewall that drops what arrives."""
    hosts.cut(1)
    line = ["--text", text, *TINY, "--save_dir", tmp_path / "lm"]
    outputs, statuses = finish(start_on(hosts, tmp_path, *line, program=HASTY), 40)
    assert statuses == [1, 1]
    for rank, (_, err) in enumerate(outputs):
        other = 1 - rank
        assert err.startswith(f"main.py: cannot reach rank {other} at {hosts.addresses[other]}:")
        assert err.count("\n") == 1


def test_the_command_of_the_guide(served, tmp_path, text):
    """It ends with the weights of two ranks on one machine; three ranks resume it."""
    line = ["--text", text, *TINY, "--num_blocks", 1, "--dropout", 0.1, "--num_iters"]
    run_ranks(2, tmp_path, *line, 6, "--save_dir", tmp_path / "one machine")
    folder = tmp_path / "two machines"
    served.launch(served.launch_command([*line, 6, "--save_dir", folder])).wait(200)
    assert "Run complete (6/6)" in served.output()
    assert ids(folder) == ids(tmp_path / "one machine") != []
    served.addresses.append(served.addresses[1])
    served.launch(served.launch_command([*line, 8, "--save_dir", folder])).wait(200)
    assert "from iteration 6 to 8" in served.output()
    assert newest(folder).versions["ranks"] == 3
    served.wait_until_empty()


def test_a_stale_copy_on_one_machine(hosts_with_ssh, tmp_path, text):
    hosts = hosts_with_ssh
    stale = tmp_path / "main.py"
    stale.write_text((ROOT / "main.py").read_text() + "# stale\n")
    hosts.serve(tmp_path, CACHE.parent, mounts={1: [stale, ROOT / "main.py"]})
    line = ["--text", text, *TINY, "--num_iters", 5, "--save_dir", tmp_path / "lm"]
    hosts.launch(hosts.launch_command(line)).wait(200)
    assert "main.py: rank 1 has another MLX or other files than rank 0" in hosts.output()
    assert not ids(tmp_path / "lm")


def fill_terminal(pid):
    """Writes to the terminal of a process until that has ended."""
    with contextlib.suppress(OSError):
        terminal = os.open(f"/proc/{pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        while os.path.samestat(os.fstat(terminal), os.stat(f"/proc/{pid}/fd/2")):
            with contextlib.suppress(BlockingIOError):
                os.write(terminal, b"x" * 1000)
            time.sleep(0.01)
        os.close(terminal)


@pytest.mark.parametrize("victim", ["rank0", "rank1", "launcher"])
def test_a_killed_process_ends_all(victim, served, tmp_path, text):
    """Without its launcher a run is saved where it ends, which here nothing else does."""
    folder = tmp_path / "lm"
    line = ["--text", text, *TINY, "--num_blocks", 1, "--save_dir", folder]
    begun = r"at iteration 4\b"
    if victim == "launcher":
        line += ["--steps_per_save", 100_000, "--steps_per_eval", 100_000]
        begun = r"[1-9]\d/100,000 \|"  # the bar that rank 0 shows over ssh
    else:
        line += ["--steps_per_save", 2]
    launcher = served.launch(served.launch_command(line, ["-c", PROGRAM]))
    served.wait_for(begun)
    assert served.kill(victim)
    if victim == "launcher":
        rank0 = served.pid("rank0")
        assert rank0 is not None
        fill_terminal(rank0)  # that nobody reads any more
    served.wait_until_empty()
    launcher.wait()
    out = served.output()
    assert out.count("a rank failed or is gone") <= 1, "that of a rank that the launcher waited for"
    if victim == "launcher":
        [checkpoint] = main.list_checkpoints(folder)
        assert checkpoint.iteration >= 10
    else:
        saved = [int(number) for number in re.findall(r"at iteration (\d+)", out)]
        assert newest(folder).iteration >= max(saved)
