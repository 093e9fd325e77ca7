"""Data parallelism: several processes, the ranks, train one model on one or more machines.

    mlx.launch -n 2 -- python main.py --dataset ptb

The same command starts all of them. Rank 0 alone has the text and the checkpoints; it sends the
others its run, once. Then every rank runs the same `train`, on its share of each batch's rows.
Gradients are averaged over all ranks, so they hold the same weights after every step, and all
decisions follow from shared values. Rank 0 alone saves and reports.
"""

import argparse
import contextlib
import io
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

import main
from datasets import SPLITS, Dataset, Split, tokenizer_from_dict
from support.cli import RunError, UsageError, explain_errors, one_line
from support.code import LOADED_SOURCES
from support.files import hash_of_data

ALONE_MESSAGE = (
    "cannot join the other ranks: start two or more with mlx.launch or Open MPI's mpirun, or unset "
    "MLX_RANK, OMPI_COMM_WORLD_SIZE and PMI_SIZE"
)
LOST_MESSAGE = "another rank is gone ({}): rerun the command to resume from the last checkpoint"
MAX_PIECE_BYTES = 1 << 26  # bytes of a message, at most


class Group(contextlib.AbstractContextManager):
    """The ranks that `mlx.launch` or MPI started, with the methods of main.py's SingleProcess."""

    is_shared = False  # whether all have rank 0's run
    deadline = None  # of the message under way, as time.monotonic tells it

    def __init__(self, argv):
        with explain_errors("RANKS_TIMEOUT is no number of seconds", ValueError):
            self.timeout = float(os.environ.get("RANKS_TIMEOUT", 600))
        self.launcher = os.getppid()
        if "NCCL_HOST_IP" in os.environ:  # what mlx.launch takes where it finds NVIDIA's GPUs
            raise UsageError("ranks cannot meet by NCCL: give mlx.launch --backend ring")
        with explain_errors(ALONE_MESSAGE, RuntimeError, ValueError, raises=RunError):
            # strict: an error rather than a group of one
            self.group = mx.distributed.init(strict=True)
        self.rank = self.group.rank()
        self.size = self.group.size()
        threading.Thread(target=self.watch, args=[ring_connections()], daemon=True).start()
        self.check_same_program(argv)

    def check_same_program(self, argv):
        """Raises UsageError on rank 0, and ends the others, unless all run the same.

        A stale copy on one machine would train something else without an error.
        """
        digest = hash_of_data([argv, mx.__version__, sorted(LOADED_SOURCES.items())])
        digests = self.all_gather(list(digest.encode()))  # [ranks, 64]
        others = np.flatnonzero((digests != digests[0]).any(axis=1))
        if not len(others):
            return
        if self.rank > 0:
            sys.exit()  # rank 0 says it
        raise UsageError(
            f"rank {others[0]} has another command line, other files in its folder, or another "
            "version of MLX than rank 0: start the same command with the same files on all machines"
        )

    def __exit__(self, *error):
        if self.rank == 0 and not self.is_shared:
            with contextlib.suppress(ConnectionError):
                self.broadcast(b"")  # there is no run
        self.group = None  # `watch` keeps this object, and MPI has to be left in order

    def watch(self, connections):
        """Runs in a thread: ends this process if another rank is gone or silent.

        MLX waits forever for one that is silent. If a connection is closed, its ring raises an
        error or, in one of ten cases, waits, too (0.32.4).
        """
        poll = select.poll()
        for connection in connections:
            # A hang-up is always reported; incoming data is not.
            poll.register(connection, getattr(select, "POLLRDHUP", select.POLLHUP))
        suspect = None  # the message during which a connection was already closed a second ago
        while True:
            time.sleep(1)
            current = self.deadline
            if current is None:
                continue
            if time.monotonic() > current and self.is_shared:  # preparing a text may take hours
                exit_process(f"nothing was heard of it for {self.timeout:g} s")
            is_closed = bool(poll.poll(0))
            if is_closed and current == suspect:
                exit_process("its connection is closed")
            suspect = current if is_closed else None

    def exchange(self, operation, tree):
        """The result of one of MLX's operations over all ranks. Raises ConnectionError."""
        mx.eval(tree)  # the time that this takes is not the others'
        self.deadline = time.monotonic() + self.timeout
        try:
            result = operation(tree, group=self.group)
            mx.eval(result)
        except RuntimeError as error:
            raise ConnectionError(LOST_MESSAGE.format(one_line(error))) from None
        finally:
            self.deadline = None
        return result

    def all_mean(self, tree):
        """The mean over all ranks of a tree of arrays."""
        # In one message: with several, two ranks might send different ones first.
        return self.exchange(partial(nn.average_gradients, all_reduce_size=2**62), tree)

    def all_gather(self, numbers):
        """The numbers of every rank, a NumPy array [ranks, ...]."""
        numbers = np.asarray(numbers)
        # As bytes: MLX would turn float64 into float32.
        mine = mx.array(np.frombuffer(numbers.tobytes(), np.uint8))
        gathered = self.exchange(mx.distributed.all_gather, mine)
        return np.array(gathered).view(numbers.dtype).reshape(self.size, *numbers.shape)

    def all_sum(self, number):
        """The sum of a number over all ranks."""
        return self.all_gather(number).sum().item()

    def agree(self, stop_signal, is_time_up=False):
        """A signal that any rank has received, and whether the time is up on any."""
        if os.getppid() != self.launcher:  # which was killed: nobody would see the run any more
            stop_signal = stop_signal or signal.SIGHUP
        return self.all_gather([stop_signal or 0, is_time_up]).max(axis=0).tolist()

    def broadcast(self, content=b""):
        """Rank 0's bytes on every rank."""
        size = self.all_gather(len(content))[0].item()
        whole = np.zeros(size, np.uint8)
        if self.rank == 0:
            whole[:] = np.frombuffer(content, np.uint8)
        for start in range(0, size, MAX_PIECE_BYTES):
            piece = whole[start : start + MAX_PIECE_BYTES]
            piece[:] = self.exchange(mx.distributed.all_sum, mx.array(piece))  # others add zeros
        return whole.tobytes()

    def broadcast_run(self, run):
        """Sends rank 0's run to the others, which wait for it in `follow`."""
        self.is_shared = True
        dataset = run.dataset
        splits = {name: getattr(dataset, name) for name in SPLITS if getattr(dataset, name)}
        models = {"init_from": run.model}
        if run.teacher:
            models["teacher"] = run.teacher
        numbers, arrays = run.snapshot()
        del arrays["weights"]  # which the model has
        record = {
            "folder": run.folder,
            "flags": vars(run.flags),
            "configs": {name: vars(model.config) for name, model in models.items()},
            "state": numbers,
            "origin": vars(run.origin),
            "dataset": dataset.name,
            "tokenizer": dataset.tokenizer.to_dict(),
            "splits": {name: split[1:] for name, split in splits.items()},
        }
        tree = {
            "models": {name: model.parameters() for name, model in models.items()},
            "state": arrays,
            "tokens": {name: mx.array(split.tokens) for name, split in splits.items()},
        }
        file = io.BytesIO()
        text = json.dumps(record, default=str)  # of paths
        mx.save_safetensors(file, dict(tree_flatten(tree)), {"record": text})
        self.broadcast(file.getvalue())

    def follow(self):
        """What every rank but the first does; returns the exit status."""
        content = self.broadcast()
        if not content:
            return 0
        self.is_shared = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # rank 0 alone prints
        run = self.receive(content)
        with main.Interrupts() as interrupts, contextlib.suppress(RunError):  # rank 0 says it
            main.train(run, interrupts, self)
        return 0

    def receive(self, content):
        """Rank 0's run."""
        arrays, texts = mx.load(io.BytesIO(content), format="safetensors", return_metadata=True)
        tree = tree_unflatten(list(arrays.items()))
        record = json.loads(texts["record"])
        flags = argparse.Namespace(**record["flags"])
        with explain_errors(f"rank {self.rank} cannot do as rank 0 does", UsageError):
            main.use_device(flags.gpu)
        tokenizer = tokenizer_from_dict(record["tokenizer"])
        splits = dict.fromkeys(SPLITS)
        for name, counts in record["splits"].items():
            splits[name] = Split(np.array(tree["tokens"][name]), *counts)
        dataset = Dataset(record["dataset"], tokenizer, **splits, sha256=None)
        models = {}
        for name, config in record["configs"].items():
            model = main.LanguageModel(main.Config(**config))
            models[name] = main.LoadedModel(model, tokenizer, id="", files={})
        origin = main.runs.Origin(**record["origin"])
        inputs = main.Inputs(flags, dataset, models, parents={}, code={}, origin=origin)
        run = main.make_run(Path(record["folder"]), inputs, ranks=self)
        for name, source in models.items():
            source.model.update(tree["models"][name])
        state = tree["state"] | {"weights": run.model.trainable_parameters()}
        run.restore(record["state"], dict(tree_flatten(state)))
        return run


def ring_connections():
    """The connections of MLX's ring: all that this process has, once it has joined.

    With MPI there are none to look at: it ends all ranks itself.
    """
    connections = []
    numbers = os.listdir("/dev/fd") if "MLX_HOSTFILE" in os.environ else []
    for number in numbers:
        with contextlib.suppress(OSError):  # no socket, or none that is connected
            connection = socket.socket(fileno=os.dup(int(number)))
            connection.getpeername()
            if connection.family == socket.AF_INET:
                connections.append(connection)
    return connections


def exit_process(reason):
    """Ends this process, whose main thread is stuck inside MLX."""
    print(f"main.py: {LOST_MESSAGE.format(reason)}", file=sys.stderr, flush=True)
    os._exit(1)
