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
import threading
import time
from contextlib import suppress

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import MAIN, ROOT, TINY, free_ports, ids, newest, run, start
from test_interrupts import wait_for

from datasets import CACHE, RunError
from extras.ranks import Meeting

STEPS = [*TINY, "--num_iters", 20, "--steps_per_report", 1]
STEPS += ["--lr_warmup", 2, "--learning_rate", 3e-3]
LAUNCH = "import sys; from mlx._distributed_utils.launch import main; sys.exit(main())"
# What a rank prints at its end: the SHA1 of all that it has of the model and its optimizer.
HASHED = """
import hashlib, sys
sys.path.insert(0, {root!r})
import main
from mlx.utils import tree_flatten
plain = main.train
def watched(run, *rest):
    global last
    last = run
    return plain(run, *rest)
main.train = watched
status = main.main(sys.argv[1:])
state = tree_flatten([last.model.parameters(), last.optimizer.state])
sha1 = hashlib.sha1()
for _, array in state:
    sha1.update(bytes(array))
print("hash", sha1.hexdigest(), file=sys.stderr)
sys.exit(status)
"""


# Each rank says "well" if all sockets that are watched are open ones.
LATE = """
import sys, threading
sys.path.insert(0, {root!r})
import main, os, stat
from extras import ranks
ranks.Meeting.hold = lambda self: None
ranks.time.sleep = print  # the end would come at once
watched = []
plain = ranks.watch_ring
def watch_ring(sockets):
    watched.extend(sockets)
    return plain(sockets)
ranks.watch_ring = watch_ring
group = main.join_ranks()
assert group.size == 2
threading.Event().wait(1)
assert len(watched) >= 2
assert all(stat.S_ISSOCK(os.fstat(each).st_mode) for each in watched)
print('well', flush=True)
threading.Event().wait(1)  # the first to leave ends the other
"""


def start_ranks(size, folder, *arguments, apart=0, programs=None, **options):
    """The processes that `mlx.launch -n size` would start, with MLX's ring between them.

    programs: that of each rank, if they differ. Each is in a folder of its own. They share what
    fast.py has compiled, which would otherwise take each of them two seconds.
    """
    hosts = folder / f"hosts-{os.urandom(3).hex()}.json"
    addresses = [[f"127.0.0.1:{port}"] for port in free_ports(size)]
    hosts.write_text(json.dumps(addresses))
    processes = {}
    for rank in reversed(range(size)):
        home = folder / f"rank{rank}"
        home.mkdir(exist_ok=True)
        env = {
            "MLX_RANK": str(rank),
            "MLX_HOSTFILE": str(hosts),
            "HOME": str(home),
            "XDG_CACHE_HOME": str(CACHE.parent),
        }
        if processes:
            time.sleep(apart)
        if programs:
            options["program"] = programs[rank]
        processes[rank] = start(*arguments, env=env, cwd=home, **options)
    return [processes[rank] for rank in range(size)]


def finish(processes, seconds=120):
    """What the ranks print, [(stdout, stderr)], and their exit statuses."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=seconds))
    finally:
        for process in processes:
            process.kill()
    return outputs, [process.returncode for process in processes]


def run_ranks(size, folder, *arguments, **options):
    outputs, statuses = finish(start_ranks(size, folder, *arguments, **options))
    assert statuses == [0] * size, outputs
    for out, err in outputs[1:]:
        assert not out, "rank 0 alone prints"
    return outputs


def losses(save_dir):
    """The losses in the log of the run saved last."""
    rows = main.read_log(newest(save_dir).folder / "log.csv")
    return np.array([float(row["loss"]) for row in rows])


def weights(save_dir):
    return mx.load(str(newest(save_dir).weights_path))


def assert_equal_weights(folder, other):
    left = weights(folder)
    right = weights(other)
    assert left.keys() == right.keys()
    for name in left:
        ours = np.array(left[name])
        theirs = np.array(right[name])
        np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=name)


def test_one_process_runs_no_distributed_code(tmp_path, text, monkeypatch):
    def failing(*_, **__):
        pytest.fail("a single process asked the engine")

    for name in ("init", "all_sum", "all_max", "all_gather"):
        monkeypatch.setattr(mx.distributed, name, failing)
    line = ["--text", str(text), *TINY, "--num_iters", "2", "--save_dir", str(tmp_path / "lm")]
    assert main.main(line) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_each_row_belongs_to_one_part(size, parts):
    rows = mx.arange(2 * size).reshape(size, 2)
    found = [main.part_of(rows, part, parts) for part in range(parts)]
    assert mx.array_equal(mx.concatenate(found), rows), "in their order"
    lengths = [len(each) for each in found]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("env", [
    {"MLX_RANK": "0"},
    {"PMI_SIZE": "2"},
    {"MLX_RANK": "0", "MLX_HOSTFILE": "{folder}/hosts.json"},
])  # fmt: skip
def test_ranks_that_cannot_meet(tmp_path, env):
    """What another launcher sets, or what an earlier one has left in the environment."""
    (tmp_path / "hosts.json").write_text("no JSON")
    env = {name: value.format(folder=tmp_path) for name, value in env.items()}
    _, err = run("--list", "--save_dir", tmp_path, env=env, status=1)
    assert err.count("\n") == 1
    assert "cannot join the other ranks" in err and "unset MLX_RANK" in err


class Meetings:
    """Ranks that meet, each in a thread."""

    def __init__(self, folder, size):
        self.ports = free_ports(size)
        self.hostfile = folder / "hosts.json"
        self.hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in self.ports]))
        self.ended = {}  # rank: None, or the error it has raised
        self.threads = []

    def start(self, rank):
        def hold():
            error = None
            try:
                Meeting(rank, self.hostfile).hold()
            except RunError as raised:
                error = str(raised)
            self.ended[rank] = error

        self.threads.append(threading.Thread(target=hold, daemon=True))
        self.threads[-1].start()

    def connect(self, rank):
        """A connection to a rank, which may not listen yet."""
        while True:
            with suppress(ConnectionRefusedError):
                return socket.create_connection(("127.0.0.1", self.ports[rank]))
            assert self.threads[0].is_alive(), self.ended
            time.sleep(0.01)

    def finish(self):
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive(), self.ended
        return self.ended


@pytest.mark.parametrize("order", [[0], [1, 0], [0, 1], [2, 0, 1], [3, 2, 1, 0], [0, 1, 3, 2]])
def test_ranks_meet_once_the_last_has_started(order, tmp_path):
    meetings = Meetings(tmp_path, len(order))
    *others, last = order
    for rank in others:
        meetings.start(rank)
        time.sleep(0.1)
    assert not meetings.ended
    meetings.start(last)
    assert meetings.finish() == dict.fromkeys(order)
    for port in meetings.ports:  # which MLX needs now
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pytest.fail("somebody still listens")


def test_a_rank_that_does_not_come_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("extras.ranks.START", 3)
    monkeypatch.setattr("extras.ranks.ATTEMPT", 0.1)
    monkeypatch.setattr("extras.ranks.PATIENCE", 0.2)
    meetings = Meetings(tmp_path, 3)
    for rank in (0, 1):
        meetings.start(rank)
    ended = meetings.finish()
    assert ended[1].startswith(f"cannot reach rank 2 at 127.0.0.1:{meetings.ports[2]} (")
    assert "firewall" in ended[1]
    assert ended[0].startswith("rank 0 waited in vain for rank 2")
    waiting = f"main.py: waiting for rank 2 at 127.0.0.1:{meetings.ports[2]} ("
    assert capfd.readouterr().err.count(waiting) == 1


def test_strangers_do_not_meet(tmp_path):
    meetings = Meetings(tmp_path, 2)
    meetings.start(0)
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"1" * 100):
        with meetings.connect(0) as stranger:
            stranger.sendall(said)
    meetings.start(1)
    assert meetings.finish() == {0: None, 1: None}


def test_a_port_in_use_is_one_line(tmp_path):
    meetings = Meetings(tmp_path, 2)
    with socket.create_server(("127.0.0.1", meetings.ports[0])):
        meetings.start(0)
        error = meetings.finish()[0]
    assert f"rank 0 cannot listen at 127.0.0.1:{meetings.ports[0]}" in error
    assert "--starting-port" in error


def test_a_single_rank_needs_no_launcher(tmp_path):
    (tmp_path / "hosts.json").write_text("\n")  # as `mlx.launch -n 1` writes it
    env = {"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
    _, err = run("--list", "--save_dir", tmp_path, env=env, status=2)
    assert err == "main.py: mlx.launch has started a single rank: leave it out, or start more\n"


DROPOUT = ["--dropout", 0.2, "--grad_accumulation", 2, "--steps_per_eval", 10]
TEN_STEPS = ["--num_iters", 10, "--steps_per_eval", 5]


@pytest.mark.parametrize("size, num_scores, options", [
    (2, 2, [*DROPOUT, "--average", 0.3]),
    (2, 0, ["--optimizer", "muon", "--untie", "--grad_checkpoint", "--batch_size", 5]),
    # Enough for a stream a core, but for one rank's single row.
    (2, 0, ["--batch_size", 3, "--context_size", 256]),
    (3, 3, [*DROPOUT, "--eval_test", "--qk_norm", "--num_blocks", 1, *TEN_STEPS]),
])  # fmt: skip
def test_the_steps_are_those_of_one_process(tmp_path, text, size, num_scores, options):
    test_text = tmp_path / "test.txt"
    test_text.write_text(text.read_text()[:2000])
    given = ["--text", text, "--test_text", test_text, *STEPS, *options]
    alone, _ = run(*given, "--save_dir", tmp_path / "one")
    program = ["-c", HASHED.format(root=str(ROOT))]
    outputs = run_ranks(size, tmp_path, *given, "--save_dir", tmp_path / "lm", program=program)
    together, _ = outputs[0]
    np.testing.assert_allclose(losses(tmp_path / "lm"), losses(tmp_path / "one"), atol=1e-5)
    assert_equal_weights(tmp_path / "lm", tmp_path / "one")
    hashes = {re.search(r"^hash (\w{40})$", err, re.M)[1] for _, err in outputs}
    assert len(hashes) == 1, "the ranks hold different models"
    score = re.compile(r"(?<!best: )\b(?:valid|test) [\d.]+ nats")
    assert score.findall(together) == score.findall(alone)
    assert len(score.findall(alone)) == num_scores
    for rank in range(1, size):  # which are told all they need
        assert not list((tmp_path / f"rank{rank}").iterdir())


def test_lora_with_a_teacher(tmp_path, text):
    folder = tmp_path / "lm"
    line = ["--text", text, *STEPS, "--num_blocks", 1, "--num_iters", 8]
    run(*line, "--save_dir", folder)
    base = ids(folder)[0]
    given = [*line, "--init_from", base, "--teacher", base, "--lora_rank", 2]
    for place in ("one", "two"):
        shutil.copytree(folder, tmp_path / place)
    run(*given, "--save_dir", tmp_path / "one", "--new_model")
    run_ranks(2, tmp_path, *given, "--save_dir", tmp_path / "two", "--new_model")
    assert newest(tmp_path / "two").origins == {"init_from": base, "teacher": base}
    assert len(losses(tmp_path / "one")) == 8
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5)
    assert set(weights(tmp_path / "two")) == set(weights(tmp_path / "one"))
    assert all("lora" in name for name in weights(tmp_path / "two"))


def test_saved_by_two_resumed_by_one_and_back(tmp_path, text):
    given = ["--text", text, *TINY, "--dropout", 0.1, "--average", 0.5]
    given += ["--steps_per_report", 1, "--learning_rate", 3e-3, "--num_blocks", 1]
    run(*given, "--num_iters", 12, "--save_dir", tmp_path / "one")
    folder = tmp_path / "mixed"
    run_ranks(2, tmp_path, *given, "--num_iters", 4, "--save_dir", folder)
    out, _ = run(*given, "--num_iters", 8, "--save_dir", folder)
    assert "from iteration 4 to 8" in out and "ranks 2 -> 1" in out
    [(out, _), _] = run_ranks(2, tmp_path, *given, "--num_iters", 12, "--save_dir", folder)
    assert "from iteration 8 to 12" in out and "2 ranks;" in out
    np.testing.assert_allclose(losses(folder), losses(tmp_path / "one"), atol=1e-5)
    assert_equal_weights(folder, tmp_path / "one")


def test_evaluation_is_split_and_exact(tmp_path, text):
    folder = ["--save_dir", tmp_path / "lm"]
    score = re.compile(r"(?:valid|train) (.*), [\d,]+ tokens/s")
    # The groups of --quantize need dimensions that 32 divides.
    run("--text", text, *TINY, "--num_blocks", 1, "--dim", 32, "--num_iters", 3, *folder)
    lines = [
        ["--evaluate", "valid", "--batch_size", 7, "--eval_stride", 3],
        ["--evaluate", "valid", "--quantize", 8],
        ["--evaluate", "train"],
    ]
    for line in lines:
        alone, _ = run(*line, *folder)
        [(together, _), _] = run_ranks(2, tmp_path, *line, *folder)
        assert score.findall(alone)
        assert score.findall(together) == score.findall(alone)


@pytest.mark.parametrize("number, signalled", [
    (signal.SIGINT, [1]),
    (signal.SIGTERM, [0]),
    (signal.SIGINT, [0, 1]),
])  # fmt: skip
def test_signal_to_any_rank_stops_all(tmp_path, text, number, signalled):
    folder = tmp_path / "lm"
    ranks = start_ranks(2, tmp_path, "--text", text, *TINY, "--num_blocks", 1, "--save_dir", folder)
    wait_for(ranks[0], "20/100,000 ")
    for rank in signalled:
        ranks[rank].send_signal(number)
    [(out, err), (_, other)], statuses = finish(ranks)
    assert statuses == [128 + number, 0], (out, err, other)
    assert "Stopped at iteration" in out and len(ids(folder)) == 1, "saved once"
    assert "Traceback" not in err + other


@pytest.mark.parametrize("size, victim", [(2, 1), (2, 0), (3, 1)])
def test_killed_rank_ends_the_others(tmp_path, text, size, victim):
    folder = tmp_path / "lm"
    given = ["--text", text, *TINY, "--num_blocks", 1, "--save_dir", folder]
    ranks = start_ranks(size, tmp_path, *given, "--steps_per_save", 2)
    wait_for(ranks[0], "at iteration 4")
    ranks[victim].kill()
    began = time.monotonic()
    outputs, statuses = finish(ranks, 60)
    assert time.monotonic() - began < 60
    for rank in set(range(size)) - {victim}:
        assert statuses[rank] == 1, outputs[rank]
        _, err = outputs[rank]
        assert "a rank failed or is gone" in err and "Traceback" not in err
    saved = newest(folder).iteration
    assert saved >= 4 and saved % 2 == 0
    out, _ = run(*given, "--num_iters", saved + 2)
    assert f"from iteration {saved:,} to {saved + 2:,}" in out


def test_fewer_rows_than_ranks_is_one_line(tmp_path, text):
    line = ["--text", text, *TINY, "--batch_size", 1, "--save_dir", tmp_path]
    outputs, statuses = finish(start_ranks(2, tmp_path, *line))
    assert statuses == [2, 0], outputs
    [(_, err), (_, other)] = outputs
    assert "--batch_size 1 leaves some of the 2 ranks without a row" in err
    assert err.count("\n") == 1
    assert not other


def test_usage_error_is_said_once(tmp_path):
    outputs, statuses = finish(start_ranks(2, tmp_path, "--dim", "many", "--save_dir", tmp_path))
    assert statuses == [2, 0]
    [(_, err), (_, other)] = outputs
    assert "invalid whole number value" in err
    assert not other


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_whose_launcher_is_gone_stop_saved(tmp_path, text, number):
    folder = tmp_path / "lm"
    command = [sys.executable, "-c", LAUNCH, "-n", "2", "--starting-port", free_ports(1)[0]]
    command += ["--", sys.executable, ROOT / "main.py", "--text", text, *TINY, "--save_dir", folder]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    launcher = subprocess.Popen(list(map(str, command)), text=True, **pipes)
    wait_for(launcher, "20/100,000 ")
    command = ["ps", "-o", "pid=", "--ppid", str(launcher.pid)]
    children = subprocess.run(command, capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    launcher.send_signal(number)
    launcher.wait(60)
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in children):
        assert time.monotonic() < deadline, "ranks were left alone in the world"
        time.sleep(0.1)
    [checkpoint] = main.list_checkpoints(folder)
    assert len(ids(folder)) == 1
    assert checkpoint.stretches[-1].versions["ranks"] == 2
    assert checkpoint.iteration >= 20


def test_only_open_sockets_are_watched(tmp_path):
    """Where MLX has tried to connect in vain before, it keeps a socket that was never open."""
    code = LATE.format(root=str(ROOT))
    outputs, _ = finish(start_ranks(2, tmp_path, program=["-c", code], apart=2))
    assert all(out.startswith("well\n") for out, _ in outputs), outputs


@pytest.mark.parametrize("file", ["main.py", "extras/lora.py"])
def test_a_rank_with_other_files_is_noticed(file, tmp_path, text):
    stale = tmp_path / "stale"
    stale.mkdir()
    for name in ("main.py", "datasets.py"):
        shutil.copy(ROOT / name, stale)
    shutil.copytree(ROOT / "extras", stale / "extras")
    with open(stale / file, "a") as other:
        other.write("# other\n")
    programs = [[MAIN], [stale / "main.py"]]
    line = ["--text", text, *STEPS, "--save_dir", tmp_path / "lm"]
    outputs, statuses = finish(start_ranks(2, tmp_path, *line, programs=programs))
    assert statuses == [1, 1]
    for _, err in outputs:
        assert "rank 1 has another MLX or other files than rank 0" in err
    assert not list((tmp_path / "lm").glob("*/*.safetensors"))
