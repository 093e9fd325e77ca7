"""Data parallelism: several processes, the ranks, train one model on one or more machines.

    mlx.launch -n 2 -- python main.py --dataset ptb

The same command starts all of them. Rank 0 alone has the text and the checkpoints; it sends the
others its run, once. Then every rank runs the same `train`, on its share of each batch's rows.
Gradients are averaged over all ranks, so they hold the same weights after every step, and all
decisions follow from shared values. Rank 0 alone saves and reports.
"""

import argparse
import contextlib
import hashlib
import json
import math
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
from datasets import SPLITS, Dataset, RunError, Split, UsageError, explained, one_line
from datasets import tokenizer_from_dict

ALONE = (
    "cannot join the other ranks: start two or more with mlx.launch or Open MPI's mpirun, or unset "
    "MLX_RANK, OMPI_COMM_WORLD_SIZE and PMI_SIZE"
)
LOST = "another rank is gone ({}): rerun the command to resume from the last checkpoint"
PIECE = 1 << 26  # bytes of a message at most: it is in memory three times


class Group:
    """The ranks that `mlx.launch` or MPI started, with the methods of main.py's SingleProcess."""

    is_waiting = True  # whether the other ranks still wait for rank 0's run
    deadline = None  # of the message under way

    def __init__(self, argv):
        with explained("RANKS_TIMEOUT is no number of seconds", ValueError):
            self.timeout = float(os.environ.get("RANKS_TIMEOUT", 600))
        self.launcher = os.getppid()
        with explained(ALONE, RuntimeError, ValueError, kind=RunError):
            # strict: an error rather than a group of one
            self.group = mx.distributed.init(strict=True)
        self.rank = self.group.rank()
        self.size = self.group.size()
        threading.Thread(target=self.watch, args=[open_connections()], daemon=True).start()
        self.compare(argv)

    def compare(self, argv):
        """Raises UsageError on rank 0, and ends the others, unless all run the same.

        A stale copy on one machine would train something else without an error.
        """
        mine = {
            "another command line": repr(argv).encode(),
            "another version of MLX": mx.__version__.encode(),
        }
        for pattern in ("*.py", "extras/*.py", "extras/*.c"):
            sources = [path.read_bytes() for path in sorted(main.HERE.glob(pattern))]
            mine[f"other files {pattern}"] = b"".join(sources)
        digests = [list(hashlib.sha256(content).digest()) for content in mine.values()]
        gathered = self.gather(digests)  # [ranks, kinds, 32]
        is_other = (gathered != gathered[0]).any(axis=2)
        if not is_other.any():
            return
        if self.rank > 0:
            sys.exit()  # rank 0 says it
        rank, kind = np.argwhere(is_other)[0]
        raise UsageError(
            f"rank {rank} has {list(mine)[kind]} than rank 0: start the same command in the same "
            "folder on all machines, with the same version of MLX"
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.rank == 0 and self.is_waiting:
            with contextlib.suppress(ConnectionError):
                self.broadcast(b"")  # there is no run

    def watch(self, connections):
        """Runs in a thread: ends this process if another rank is gone or silent.

        MLX waits forever for one that is silent. If a connection is closed, its ring raises an
        error, but it may wait, too (0.32.4: in a few of a hundred cases).
        """
        poll = select.poll()
        for connection in connections:
            # A hang-up is always reported; incoming data is not.
            poll.register(connection, getattr(select, "POLLRDHUP", 0))
        suspect = None  # the message during which a connection was already closed a second ago
        while True:
            time.sleep(1)
            current = self.deadline
            is_closed = bool(poll.poll(0))
            if current is not None and is_closed and current == suspect:
                end("its connection is closed")
            if current is not None and time.monotonic() > current:
                end(f"nothing was heard of it for {self.timeout:g} s")
            suspect = current if is_closed else None

    def exchange(self, operation, tree, patience=None):
        """The result of one of MLX's operations over all ranks. Raises ConnectionError.

        patience: how long the others may take, in seconds; by default `timeout`.
        """
        mx.eval(tree)
        self.deadline = time.monotonic() + (patience or self.timeout)
        try:
            result = operation(tree, group=self.group)
            mx.eval(result)
        except RuntimeError as error:
            raise ConnectionError(LOST.format(one_line(error))) from None
        finally:
            self.deadline = None
        return result

    def average(self, tree):
        """The mean over all ranks of a tree of arrays."""
        # In one message: with several, two ranks might send different ones first.
        return self.exchange(partial(nn.average_gradients, all_reduce_size=2**62), tree)

    def gather(self, numbers, patience=None):
        """The numbers of every rank, a NumPy array [ranks, ...]."""
        numbers = np.asarray(numbers)
        # As bytes: MLX would turn float64 into float32.
        mine = mx.array(np.frombuffer(numbers.tobytes(), np.uint8))
        gathered = self.exchange(mx.distributed.all_gather, mine, patience)
        return np.array(gathered).view(numbers.dtype).reshape(self.size, *numbers.shape)

    def sum(self, number):
        """The sum of a number over all ranks."""
        return self.gather(number).sum().item()

    def agree(self, received, is_time_up=False):
        """A signal that any rank has received, and whether the time is up on any."""
        if os.getppid() != self.launcher:  # which was killed: nobody would see the run any more
            received = received or signal.SIGHUP
        return self.gather([received or 0, is_time_up]).max(axis=0).tolist()

    def broadcast(self, content=b"", patience=None):
        """Rank 0's bytes on every rank."""
        size = self.gather(len(content), patience)[0].item()
        if self.rank > 0:
            content = bytes(size)  # zeros, which are added to rank 0's
        pieces = []
        for start in range(0, size, PIECE):
            piece = np.frombuffer(content[start : start + PIECE], np.uint8)
            pieces.append(bytes(self.exchange(mx.distributed.all_sum, mx.array(piece))))
        return b"".join(pieces)

    def broadcast_tree(self, tree=None):
        """Rank 0's tree of arrays on every rank."""
        mine = dict(tree_flatten(tree or {}))
        kinds = []
        for name, array in mine.items():
            kinds.append([name, array.shape, str(array.dtype).removeprefix("mlx.core.")])
        leaves = []
        for name, shape, dtype in json.loads(self.broadcast(json.dumps(kinds).encode())):
            content = self.broadcast(bytes(mine.get(name, b"")))
            array = mx.array(np.frombuffer(content, np.uint8))
            leaves.append((name, array.view(getattr(mx, dtype)).reshape(shape)))
        return tree_unflatten(leaves)

    def share(self, run):
        """Sends rank 0's run to the others, which wait for it in `follow`."""
        self.is_waiting = False
        splits = {name: getattr(run.dataset, name) for name in SPLITS}
        splits = {name: split for name, split in splits.items() if split}
        batches = run.batches
        task = {
            "folder": run.folder,
            "flags": vars(run.flags),
            "config": vars(run.model.config),
            "teacher": vars(run.teacher.config) if run.teacher else None,
            "progress": run.progress(),
            "batches": [batches.epoch, batches.offset, batches.place],
            "dataset": run.dataset.name,
            "tokenizer": run.dataset.tokenizer.to_dict(),
            "splits": {name: split[1:] for name, split in splits.items()},
        }
        self.broadcast(json.dumps(task, default=str).encode())  # str: of paths
        tree = {
            "model": run.model.parameters(),
            "optimizer": run.optimizer.state,
            "average": run.average or {},
            "teacher": run.teacher.parameters() if run.teacher else {},
            "perm": batches.perm,
            "tokens": {name: split.tokens for name, split in splits.items()},
        }
        self.broadcast_tree(tree)

    def follow(self):
        """What every rank but the first does; returns the exit status."""
        task = self.broadcast(patience=math.inf)  # rank 0 may download and encode a text first
        if not task:
            return 0
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # rank 0 alone prints
        run = self.receive(json.loads(task))
        with main.Interrupts() as interrupts, contextlib.suppress(RunError):  # rank 0 says it
            main.train(run, interrupts, self)
        return 0

    def receive(self, task):
        """Rank 0's run."""
        flags = argparse.Namespace(**task["flags"])
        main.use_device(flags.gpu)
        tree = self.broadcast_tree()
        model = main.LanguageModel(main.Config(**task["config"]))
        if flags.lora_rank:  # before the weights, which include the adapters'
            main.extra("lora").add_lora(model, flags.lora_rank, flags.lora_alpha)
        model.update(tree["model"])
        optimizer = main.make_optimizer(model, flags)
        optimizer.state = tree["optimizer"]
        teacher = None
        if task["teacher"]:
            teacher = main.LanguageModel(main.Config(**task["teacher"]))
            teacher.update(tree["teacher"])
        splits = dict.fromkeys(SPLITS)
        for name, counts in task["splits"].items():
            splits[name] = Split(np.array(tree["tokens"][name]), *counts)
        tokenizer = tokenizer_from_dict(task["tokenizer"])
        rows = flags.batch_size * flags.grad_accumulation
        batches = main.Batches(splits["train"].tokens, flags.context_size, rows, flags.seed)
        batches.restore(*task["batches"], tree["perm"])
        return main.Run(
            folder=Path(task["folder"]),
            flags=flags,
            dataset=Dataset(task["dataset"], tokenizer, **splits, sha256=None),
            model=model,
            optimizer=optimizer,
            batches=batches,
            teacher=teacher,
            average=tree.get("average"),
            **task["progress"],
        )


def open_connections():
    """The connections of MLX's ring: all that this process has when it has joined; none with MPI."""
    connections = []
    for number in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # no socket, or none that is connected
            connection = socket.socket(fileno=os.dup(int(number)))
            connection.getpeername()
            if connection.family == socket.AF_INET:
                connections.append(connection)
    return connections


def end(reason):
    """Ends this process, whose main thread is stuck inside MLX."""
    print(f"main.py: {LOST.format(reason)}", file=sys.stderr, flush=True)
    os._exit(1)
