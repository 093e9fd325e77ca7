"""Ranks on two machines, here network namespaces on a switch: when one vanishes or pauses."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT, TINY, free_ports, start
from test_ranks import finish, newest_in, wait_for

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
sys.exit(main.main())
"""


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Two hosts on a switch, each a namespace."""

    def __init__(self):
        self.id = os.urandom(2).hex()
        self.names = [f"h{i}-{self.id}" for i in range(2)]
        self.switch = f"sw-{self.id}"
        self.addresses = ["10.99.0.1", "10.99.0.2"]

    def __enter__(self):
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for i, name in enumerate(self.names):
            ip("netns", "add", name)
            cable = ["type", "veth", "peer", "e0", "netns", name]
            ip("-n", self.switch, "link", "add", f"p{i}", *cable)
            ip("-n", self.switch, "link", "set", f"p{i}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{self.addresses[i]}/24", "dev", "e0")
            ip("-n", name, "link", "set", "e0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *error):
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def cut(self, host):
        """Pulls the cable of a host at the switch, which the other one does not see."""
        ip("-n", self.switch, "link", "set", f"p{host}", "down")

    def start(self, folder, *arguments):
        """A rank on each host."""
        file = folder / "hosts.json"
        ports = free_ports(2)
        file.write_text(json.dumps([[f"{a}:{p}"] for a, p in zip(self.addresses, ports)]))
        processes = []
        for rank, name in enumerate(self.names):
            env = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)}
            program = ["-c", IN_NAMESPACE, name, "-c", PROGRAM]
            processes.append(start(*arguments, env=env, program=program))
        return processes


@pytest.fixture
def hosts():
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    hosts = Hosts()
    try:
        hosts.__enter__()
    except subprocess.CalledProcessError as error:
        hosts.__exit__()
        pytest.skip(f"no network namespaces: {error.stderr.decode()}")
    yield hosts
    hosts.__exit__()


def test_a_machine_that_vanishes_ends_the_run(hosts, tmp_path, text):
    folder = tmp_path / "lm"
    line = ["--text", text, *TINY, "--save_dir", folder, "--steps_per_save", 10]
    ranks = hosts.start(tmp_path, *line)
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
    ranks = hosts.start(tmp_path, *line)
    wait_for(ranks[0], "at iteration 20")
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(2 * SILENCE)
    ranks[1].send_signal(signal.SIGCONT)
    wait_for(ranks[0], "saved ")
    ranks[0].send_signal(signal.SIGTERM)
    outputs, statuses = finish(ranks, 40)
    assert statuses == [143, 0], outputs
