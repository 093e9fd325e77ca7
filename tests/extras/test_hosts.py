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
from conftest import ROOT, TINY, free_ports, ids, start
from hosts import Hosts, missing_tool
from test_ranks import finish, newest_in, run_ranks, wait_for

from datasets import CACHE

SILENCE = 4  # seconds, instead of a minute

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
ranks.CHECK = 1
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
def served(hosts, tmp_path):
    """Hosts with ssh."""
    missing = missing_tool()
    if missing:
        pytest.skip(f"hosts with ssh: {missing}")
    hosts.serve(tmp_path, CACHE.parent)
    return hosts


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


def test_a_machine_that_vanishes_ends_the_run(hosts, tmp_path, text):
    folder = tmp_path / "lm"
    line = ["--text", text, *TINY, "--save_dir", folder, "--steps_per_save", 10]
    ranks = start_on(hosts, tmp_path, *line)
    wait_for(ranks[0], "at iteration 20")
    hosts.cut(1)
    outputs, statuses = finish(ranks, SILENCE + 40)
    assert statuses == [1, 1], outputs
    for _, err in outputs:
        assert err.count("a rank failed or is gone") == 1, err
        assert "Traceback" not in err
    assert newest_in(folder).iteration >= 20


def test_a_machine_that_pauses_is_waited_for(hosts, tmp_path, text):
    folder = tmp_path / "lm"
    line = ["--text", text, *TINY, "--save_dir", folder, "--steps_per_save", 10]
    ranks = start_on(hosts, tmp_path, *line)
    wait_for(ranks[0], "at iteration 20")
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(1.2 * SILENCE)
    ranks[1].send_signal(signal.SIGCONT)
    wait_for(ranks[0], "saved ")
    ranks[0].send_signal(signal.SIGTERM)
    outputs, statuses = finish(ranks, 40)
    assert statuses == [143, 0], outputs


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
    line = ["--text", text, *TINY, "--dropout", 0.1, "--num_iters"]
    run_ranks(2, tmp_path, *line, 20, "--save_dir", tmp_path / "one machine")
    folder = tmp_path / "two machines"
    served.launch(served.launch_command([*line, 20, "--save_dir", folder])).wait(200)
    assert "Run complete (20/20)" in served.output()
    assert ids(folder) == ids(tmp_path / "one machine") != []
    served.addresses.append(served.addresses[1])
    served.launch(served.launch_command([*line, 25, "--save_dir", folder])).wait(200)
    assert "from iteration 20 to 25" in served.output()
    assert newest_in(folder).versions["ranks"] == 3
    served.wait_until_empty()


def test_a_stale_copy_on_one_machine(hosts, tmp_path, text):
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
    folder = tmp_path / "lm"
    line = ["--text", text, *TINY, "--save_dir", folder, "--steps_per_save", 10]
    launcher = served.launch(served.launch_command(line, ["-c", PROGRAM]))
    served.wait_for("at iteration 20")
    served.kill(victim)
    if victim == "launcher":
        fill_terminal(served.pid("rank0"))  # that nobody reads any more
    served.wait_until_empty()
    launcher.wait()
    out = served.output()
    assert out.count("a rank failed or is gone") <= 1, "that of a rank that the launcher waited for"
    saved = [int(number) for number in re.findall(r"at iteration (\d+)", out)]
    assert newest_in(folder).iteration >= max(saved)
