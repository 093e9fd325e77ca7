"""Train a transformer language model with MLX, never lose a step of it, and talk to it.

    python main.py --dataset python --dim 128 --context_size 128     train on Python's own standard library
    python main.py --dataset ptb                                     train on Penn Treebank; Ctrl+C, same line: go on
    python main.py --inference                                       talk to the checkpoint saved last
    python main.py --help                                            every flag

This file is a run, in this order: batches, evaluation, checkpoints, interrupts, ranks, the training loop, sampling,
prompts, tools, and the command line. The model is in model.py; text becomes token ids in datasets.py.
Shapes are written in these letters: B rows of a batch, L positions, D model dimension, H query heads, K key and value
heads, d dimension of a head (D / H), V vocabulary, N any number.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before there is anything to save, Ctrl+C leaves without a traceback

import argparse
import contextlib
import csv
import dataclasses
import difflib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import select
import shutil
import sys
import textwrap
import threading
import time
import timeit
from functools import lru_cache, partial, reduce
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from datasets import CORPORA, TOKENIZERS, RunError, UsageError
from datasets import append_lines, explained, load_dataset, open_folder, tokenizer_from_dict, utf8
from model import ACTIVATIONS, BLAS, Cache, Config, LanguageModel, add_lora, attention_weights, export_model
from model import import_model, init_weights, loss_sum, make_optimizer, quantize, set_blas_threads, set_learning_rate

import mlx.core as mx  # after model.py, which makes a fast BLAS visible to it
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

PROGRAM = "main.py", "model.py", "datasets.py"  # whose SHA1s are kept in every record: which program trained it
SOURCES = {name: hashlib.sha1(Path(__file__).with_name(name).read_bytes()).hexdigest() for name in PROGRAM}
FORMAT_VERSION = 2  # of the .metadata files; raise it when an older or newer main.py could misread them


# ---- Batches --------------------------------------------------------------------------------------------------------
class Batches:
    """Windows of a token array in a permuted order; endless, a function of its arguments, epoch and s alone. Each epoch
    cuts the text into windows at a random offset, so that no token is left out for good, and draws their order `perm`,
    in which `s` is the position. Raises UsageError for a text shorter than one window. tokens: [N]; batch_size: rows of
    a whole step, those of all ranks and of all --grad_accumulation parts together."""

    def __init__(self, tokens, context_size, batch_size, seed):
        if len(tokens) <= context_size:  # a window is L inputs and one more token, its last target
            problem = f"the training text has {len(tokens):,} tokens, fewer than --context_size {context_size} needs"
            raise UsageError(f"{problem}: use a longer text or --context_size {max(1, len(tokens) - 1)}")
        self.tokens, self.context_size, self.batch_size, self.seed = tokens, context_size, batch_size, seed
        self.begin_epoch(0)

    def begin_epoch(self, epoch):
        """Draws the offset and the order of epoch number `epoch` (from 0), and goes to its beginning."""
        random = np.random.default_rng([self.seed, epoch])
        self.epoch, self.s = epoch, 0
        self.offset = int(random.integers(min(self.context_size, len(self.tokens) - self.context_size)))
        windows = (len(self.tokens) - 1 - self.offset) // self.context_size
        self.perm = random.permutation(windows).astype(np.int32)  # [windows]; 4 bytes each in every checkpoint

    def next(self):
        """Inputs and targets, [B, L] int32. An epoch's last, incomplete batch is dropped; too few windows repeat."""
        if self.s + self.batch_size > len(self.perm) and self.s > 0:  # s = 0: fewer windows than B
            self.begin_epoch(self.epoch + 1)
        order = self.perm.take(range(self.s, self.s + self.batch_size), mode="wrap").astype(np.int64)
        starts = self.offset + order * self.context_size  # [B]; int64, as a text may have more than 2^31 tokens
        self.s += self.batch_size
        rows = np.stack([self.tokens[start : start + self.context_size + 1] for start in starts])  # [B, L + 1]
        return mx.array(rows[:, :-1], mx.int32), mx.array(rows[:, 1:], mx.int32)


# ---- Evaluation -----------------------------------------------------------------------------------------------------
def evaluate(model, tokens, batch_size, interrupts=None, stride=None):
    """Mean nats a token over every token of `tokens` [N] but the first, each scored once; None if `interrupts` cut it
    short. Windows begin `stride` tokens apart, by default side by side; of an overlap only the new end counts."""
    L, count, group = model.config.context_size, len(tokens) - 1, ranks()  # who share the batches: see Ranks
    interrupts, stride = interrupts or Interrupts(), stride or L
    if group.rank() == 0:  # the others were called by follow() upon this very order
        broadcast(interrupts, {"tokens": tokens}, "evaluate", batch_size=batch_size, stride=stride)
    starts = np.arange(0, max(count - L, 0) + stride, stride)  # [windows]; the last one reaches the text's end
    starts = np.append(starts, np.full(-len(starts) % batch_size, count))  # windows of weight 0 fill the last batch
    streams, loss = make_streams(batch_size, L), partial(loss_sum, model, training=False)
    # Traced once, as all batches have one shape. Without `inputs` the weights of now would be constants in it.
    score = mx.compile(lambda *batch: sum(over_streams(streams, loss, *batch)), inputs=[model.state])
    total, received = 0.0, None  # nats, in Python's 64 bits
    for batch in starts.reshape(-1, batch_size, 1)[group.rank() :: group.size()]:  # [B, 1], this rank's share
        if received := interrupts.received:
            break  # on to all_gather, in which the other ranks wait
        places = batch + np.arange(L)  # [B, L]
        # Of each window the last `stride` positions count, of the first one all; what is beyond the end never does.
        weights = (places < count) & ((places - batch >= L - stride) | (batch == 0))
        places = np.minimum(places, count - 1)  # beyond the end any token will do: it weighs 0
        total += score(*(mx.array(each, mx.int32) for each in (tokens[places], tokens[places + 1], weights))).item()
    if group.size() > 1:  # as bytes: MLX would take float64 for float32
        mine = mx.array(np.frombuffer(np.array([total, received or 0]), np.uint8))  # [16] bytes; 0: no signal
        totals, signals = np.array(mx.distributed.all_gather(mine)).view(np.float64).reshape(-1, 2).T  # [ranks] each
        total, received = totals.sum(), int(signals.max())  # a signal to one rank voids the score on all
        interrupts.received = interrupts.received or received or None
        if group.rank() == 0:
            broadcast(interrupts)  # a rank lost in all_gather may show only here, before the score counts
    return None if received else total / count


def score_split(name, model, dataset, flags, interrupts=None, most=0):
    """Prints the score of a split, or of its first `most` tokens; returns the nats a token, None if interrupted."""
    split, began = getattr(dataset, name), time.perf_counter()
    tokens = split.tokens[: most + 1] if most else split.tokens  # + 1: the first token is only context
    # Windows overlap for --evaluate alone: in training they always stand side by side.
    nats = evaluate(model, tokens, flags.batch_size, interrupts, flags.evaluate and flags.eval_stride)
    if nats is not None:
        speed = f"{len(tokens) / (time.perf_counter() - began):,.0f} tokens/s"
        tqdm.write(f"{describe_score(name, nats, split, dataset.tokenizer)}, {speed}")
    return nats


def describe_score(name, nats, split, tokenizer):
    """One line with a split's score: per token, and in two units that do not depend on the tokenizer."""
    total = nats * len(split.tokens)  # of the whole split, extrapolated where `nats` is of its first tokens
    a_token, a_word = (math.exp(min(mean, 99)) for mean in (nats, total / max(1, split.num_words)))
    line = f"{name} {nats:.4f} nats, perplexity {a_token:.2f} a token, {a_word:.2f} a word, "
    line += f"{total / math.log(2) / split.num_bytes:.4f} bits per byte"  # nats / ln 2 = bits
    return line if tokenizer.unk is None else f"{line}, {split.num_unk / len(split.tokens):.2%} <unk>"


# ---- Checkpoints ----------------------------------------------------------------------------------------------------
# `<sha1>.safetensors` holds what is trained (of LoRA the adapters alone) and is named by the SHA1 of its bytes.
# `<sha1>.metadata` (the same format) holds all else that a run is: optimizer state and `perm` as arrays, the tokenizer,
# and `record`, JSON of the flags, counters and scores. Its header states the file's own SHA1, taken with BLANK there.
BLANK = "0" * 40  # as long as the SHA1 that takes its place, so that nothing else moves


def write_safetensors(path, tree, metadata):
    """Writes and syncs a tree of arrays; returns the SHA1 of the file's bytes, which BLANK in the metadata becomes."""
    arrays, digest = dict(sorted(tree_flatten(tree))), hashlib.sha1()  # sorted: equal arrays give equal bytes
    # MLX wants a file's four attributes but calls `write` alone, which has to return the bytes it took.
    hasher = SimpleNamespace(write=lambda data: digest.update(data) or len(data), seek=None, tell=None, closed=False)
    mx.save_safetensors(hasher, arrays, metadata)  # first for the SHA1 alone, without a copy of the file in memory
    sha1 = digest.hexdigest()
    with open(path, "wb") as file:
        mx.save_safetensors(file, arrays, {name: sha1 if text == BLANK else text for name, text in metadata.items()})
        file.flush()  # out of Python's buffer
        os.fsync(file.fileno())  # and out of the system's, or after a power cut a name could stand for missing bytes
    return sha1


def read_header(path):
    """The JSON header of a safetensors file, as bytes; of a damaged file, whatever stands there."""
    with open(path, "rb") as file:  # of safetensors: the header's length in 8 bytes, the header, the arrays
        return file.read(min(int.from_bytes(file.read(8), "little"), os.path.getsize(path)))  # the length may be junk


def read_texts(path):
    """The record and the texts of a `.metadata` file, from its header. A damaged one raises what find_damage lists."""
    texts = json.loads(read_header(path))["__metadata__"]  # where safetensors keeps strings, by name
    if hashlib.sha1(texts["record"].encode()).hexdigest() != texts["record_sha1"]:
        raise ValueError("damaged header")
    return json.loads(texts["record"]), texts


def sha1_of(path, stated=BLANK):
    """SHA1 of a safetensors file's bytes, with BLANK in the place of the SHA1 that its header states."""
    with open(path, "rb") as file:
        header = file.read(8 + len(read_header(path)))  # with its length in front
        digest = hashlib.sha1(header.replace(stated.encode(), BLANK.encode(), 1))  # by default the plain SHA1
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def find_damage(folder, id):
    """What is wrong with checkpoint `id`, or None; asked before its content is used. RunError: of another version."""
    try:
        record, texts = read_texts(folder / f"{id}.metadata")
        if record["format_version"] != FORMAT_VERSION:  # not damage: no older checkpoint is to take its place
            raise RunError(f"checkpoint {id[:12]} is of another version of this program: use that one, or --new_model")
        for kind, sha1 in {"safetensors": id, "metadata": texts["sha1"]}.items():  # stated by name; by header
            if sha1_of(folder / f"{id}.{kind}", sha1) != sha1:
                return f"its .{kind} does not have the SHA1 {sha1[:12]}"
        return None if record["id"] == id else f"its .metadata belongs to {record['id'][:12]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"


def list_checkpoints(folder, warn=False):
    """The records of the checkpoints in `folder`, the one saved last first; files of other programs are passed over."""
    records = []
    for path in Path(folder).glob("*.safetensors"):  # metadata alone is no checkpoint
        try:
            records.append(read_texts(path.with_suffix(".metadata"))[0] | {"id": path.stem})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # what reading junk can raise
            if warn and len(path.stem) == 40:
                print(f"Passing over {path.stem[:12]}: its .metadata cannot be read ({error})", file=sys.stderr)
    return sorted(records, key=lambda record: (record["saved"], record["iteration"]), reverse=True)


def describe(record):
    """The words by which a line names a checkpoint."""
    return f"{record['run']}, iteration {record['iteration']:,}, checkpoint {record['id'][:12]}"


def named_checkpoint(folder, records, identifier, flag="--identifier"):
    """The one of `records`, the newest first, that the flag means: by an id, its beginning, a run's name (its newest),
    "latest", or "best" (of the run saved last). Raises UsageError if none or several, RunError if it is damaged."""
    names = {record["run"]: [record] for record in reversed(records)}  # the newest of each run
    best = [record for record in records if record["id"] == (records[0]["best"] or {}).get("id")]
    found = (names | {"latest": records[:1], "best": best}).get(identifier)
    found = found or [record for record in records if record["id"].startswith(identifier)]
    if len(found) != 1:
        known = "; ".join(map(describe, (found or records)[:9])) or "none, train first"
        matches = "several checkpoints" if found else "no checkpoint"
        raise UsageError(f"{flag} {identifier!r} matches {matches}; name one (--list shows all): {known}")
    if damage := find_damage(folder, found[0]["id"]):
        raise RunError(f"checkpoint {found[0]['id'][:12]} of {flag} is damaged ({damage}): name another of --list")
    return found[0]


@contextlib.contextmanager
def locked(folder):
    """Holds the lock for changing checkpoints in `folder`; makes renames in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits; a holder that is killed frees it, too
        yield
        os.fsync(descriptor)  # of a folder: the names in it
    finally:
        os.close(descriptor)


def lock_run(folder, name):
    """An open file that says this process trains run `name`, or None if another does; the lock dies with its holder."""
    file = open(folder / f".{name}.lock", "a")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # NB: raises BlockingIOError instead of waiting
        return file  # once nothing refers to it, Python closes it and the lock is free


def save_checkpoint(folder, run, id=None):
    """Saves a run as it stands and returns the checkpoint's id; with `id`, of weights saved before, the metadata alone.
    A full disk or a vanished folder is waited out: training state is in memory, and the last checkpoint is untouched.
    Raises RunError if an equal run, whose checkpoint has the same name, is being trained in the same folder."""
    for pause in itertools.chain((1, 2, 5, 10, 30), itertools.repeat(60)):  # seconds
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                return write_checkpoint(folder, run, id)
        except OSError as error:
            clean_folder(folder)  # frees the room of what was begun
            tqdm.write(f"Saving to {folder} failed ({error}); next try in {pause} s. Ctrl+C twice gives the work up.")
            time.sleep(pause)


def write_checkpoint(folder, run, id):
    """One try. No checkpoint is ever there by halves: both files are complete on disk before one gets its name, the
    metadata gets its own first, and a checkpoint counts only once its .safetensors exists."""
    records, name = list_checkpoints(folder), run.record["run"]
    new = {kind: folder / f"{name}.{kind}.new" for kind in ("metadata", "safetensors")[: 1 if id else 2]}
    if id is None:
        id = write_safetensors(new["safetensors"], run.model.trainable_parameters(), {"format": "mlx"})
        equal = next((record["run"] for record in records if record["id"] == id), name)
        if equal != name and not lock_run(folder, equal):  # a probe; a finished run's checkpoint may change hands
            new["safetensors"].unlink()
            raise RunError(f"this run equals {equal}, which is being trained in {folder}: stop one of them")
    run.record |= {name: getattr(run.batches, name) for name in ("epoch", "offset", "s")}
    saved = max([time.time(), *(record["saved"] + 1e-3 for record in records)])  # even if the clock was set back
    run.record |= {"id": id, "saved": saved, "format_version": FORMAT_VERSION}
    texts = {"record": json.dumps(run.record), "tokenizer": json.dumps(run.tokenizer.to_dict()), "sha1": BLANK}
    texts["record_sha1"] = hashlib.sha1(texts["record"].encode()).hexdigest()  # so that listing need not read it all
    write_safetensors(new["metadata"], {"optimizer": run.optimizer.state, "perm": mx.array(run.batches.perm)}, texts)
    for kind in new:
        os.replace(new[kind], folder / f"{id}.{kind}")  # atomic: no reader sees half a file
    return id


def clean_folder(folder, run=None, keep=0):
    """Deletes the checkpoints of `run` but the newest `keep`, the best and those that other runs need, and what
    killed saves left: under the lock, `.new` files and metadata alone are stale. What cannot go now goes next time."""
    with contextlib.suppress(OSError), locked(folder):
        records = list_checkpoints(folder)
        own = [record["id"] for record in records if run and record["run"] == run.record["run"]]
        needed = {id for record in records for _, id in record.get("uses", {}).values()}  # LoRA bases, teachers
        needed |= {(each["best"] or {}).get("id") for each in records if each["id"] not in own[1:]}  # branches', too
        for id in own[keep:]:
            if id not in needed:
                (folder / f"{id}.safetensors").unlink(missing_ok=True)  # so that its metadata counts no more
        for path in folder.iterdir():
            ours = re.fullmatch(r"\w+-[0-9a-f]{6}\.(safetensors|metadata|csv)\.new|[0-9a-f]{40}\.metadata", path.name)
            if ours and not path.with_suffix(".safetensors").exists():  # which no .new file has
                path.unlink()


def load_model(folder, record):
    """The model, a LoRA run's merged into its base, and the tokenizer of a checkpoint. Raises RunError without base."""
    _, texts = read_texts(folder / f"{record['id']}.metadata")
    model, weights = LanguageModel(Config(**record["config"])), mx.load(str(folder / f"{record['id']}.safetensors"))
    if rank := record["flags"].get("lora_rank"):  # the file holds its adapters alone
        adapters, weights = weights, dict(tree_flatten(open_used(folder, record, "init_from")[0].parameters()))
        for layer in [name.removesuffix(".lora_a") for name in adapters if name.endswith(".lora_a")]:
            update = adapters[f"{layer}.lora_b"] @ adapters[f"{layer}.lora_a"]  # [O, rank] @ [rank, I] = [O, I]
            weights[f"{layer}.weight"] += update * (record["flags"]["lora_alpha"] / rank)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())  # MLX loads lazily: only this reads the arrays
    return model, tokenizer_from_dict(json.loads(texts["tokenizer"]))


def open_model(folder, name, flag):
    """The model, tokenizer and id of the checkpoint or Hugging Face folder `name`. Raises UsageError, RunError."""
    if os.path.isdir(name):  # Hugging Face's; else an id or its beginning, a run's name, latest or best
        model, tokenizer, files = import_model(Path(name))
        ids = list(map(sha1_of, files))
        return model, tokenizer, ids[0] if len(ids) == 1 else hashlib.sha1("".join(ids).encode()).hexdigest()
    record = named_checkpoint(folder, list_checkpoints(folder), name, flag)
    return *load_model(folder, record), record["id"]


def open_used(folder, record, flag):
    """The same for a model that the run of `record` was begun with. Raises RunError if it is not that one."""
    name, id = record["uses"][flag]  # name: a folder's path or the id once more
    needed = f"{record['run']} needs the model it was begun with, --{flag} {name} as it was, {id[:12]}"
    with explained(needed, UsageError, kind=RunError):  # the line typed now is not at fault
        found = open_model(folder, name, f"--{flag}")
        if found[2] != id:  # a folder's files may have been replaced
            raise UsageError(f"it is {found[2][:12]} now")
        return found


def load_run(folder, record, run):
    """Brings `run` to where the checkpoint of `record` was saved: weights, optimizer, and the place in the text."""
    run.record |= record
    run.model.load_weights(str(folder / f"{record['id']}.safetensors"), strict=not record["flags"].get("lora_rank"))
    state = tree_unflatten(mx.load(str(folder / f"{record['id']}.metadata"), format="safetensors"))
    run.optimizer.state, run.batches.perm = state["optimizer"], np.array(state["perm"])
    vars(run.batches).update({name: record[name] for name in ("epoch", "offset", "s")})
    mx.eval(run.model.parameters(), run.optimizer.state)


# ---- Interrupts -----------------------------------------------------------------------------------------------------
class Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP into a question the training loop asks: `if interrupts.received: save and stop`.
    A second one, half a second later or more, leaves at once, without saving. Python runs a handler only when `mx.eval`
    is over, so a thread reads the bytes that the interpreter writes to a wake-up pipe the moment a signal comes."""

    received = None  # the number of the first signal, to this process or, told by broadcast(), to another rank

    def __enter__(self):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # a signal writes one byte, its number
        # What the parent ignores (nohup, jobs of scripts) stays ignored. A signal without a handler writes no byte.
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self.handlers = {n: signal.signal(n, lambda *_: None) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
        threading.Thread(target=self.watch, args=[reader], daemon=True).start()
        return self

    def __exit__(self, _, error, traceback):
        os.close(signal.set_wakeup_fd(-1))  # which ends the thread
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        # Ctrl+C in a terminal also ends the compiler of a first step, evaluation or sample: nothing is unsaved then.
        if self.received and isinstance(error, RuntimeError) and not LAUNCHED:
            raise SystemExit(128 + self.received)  # the status by which shells tell a signal

    def watch(self, reader):
        """The thread: the first signal becomes `received`, a later one ends the process in the middle of anything."""
        first = None  # when the first of this process came; another rank's may have been before
        while byte := os.read(reader, 1):  # b"" once __exit__ has closed the other end
            number = byte[0]
            if first is None:
                self.received, first = self.received or number, time.monotonic()
                print("\nStopping after this step, then saving. Once more leaves without saving.", file=sys.stderr)
            elif time.monotonic() - first > 0.5:  # launchers pass on a signal that the terminal has sent already
                print("\nLeft without saving.", file=sys.stderr)
                os._exit(128 + number)  # at once; sys.exit would end this thread alone
        os.close(reader)


class Lasting:
    """An output stream whose reader may leave (`| head`, a closed terminal) without stopping anything, least a save."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: closed from the start
        self.stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Raises no OSError: a line that cannot be written is not worth the run."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # a full disk below a log file may have room again
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


# ---- Ranks: the processes that `mlx.launch` starts, on one machine or several, to train one model --------------------
# Rank 0 does all that a single process does. The others hold the same model and optimizer, take a share of the rows of
# each step and of the windows of each evaluation, and learn all they need, tokens too, from what rank 0 broadcasts.
LAUNCHED = "MLX_RANK" in os.environ or any(os.environ.get(n, "1") != "1" for n in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
LOST = "a rank failed or is gone ({}): the same line goes on from the last checkpoint"
LAUNCHER = os.getppid()  # another one later on means that it is gone


@lru_cache(None)  # the engine starts at the first call, and once
def ranks():
    """MLX's group of all ranks; of one process, which needs no engine, what is asked of such a group."""
    if not LAUNCHED:
        return SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    opened = lambda: {int(fd) for fd in os.listdir("/dev/fd") if os.path.exists(f"/dev/fd/{fd}")}  # not listdir's own
    before, group = opened(), mx.distributed.init(strict=True)  # strict: an error rather than a group of one
    if "MLX_HOSTFILE" in os.environ:  # a ring, whose sockets are the new files
        threading.Thread(target=watch_ring, args=[opened() - before], daemon=True).start()
    return group


def watch_ring(sockets):
    """Ends a rank some seconds after its neighbour's end. MLX's ring raises an error then, but of four ranks one may
    wait forever (0.32.4: after 3 of 44 kills among two to four)."""
    poll = select.poll()
    for number in sockets:
        poll.register(number, getattr(select, "POLLRDHUP", 0))  # a hang-up and an error are always reported
    for number, _ in poll.poll(0):  # a socket that MLX keeps of an attempt to connect that came too early
        poll.unregister(number)
    poll.poll()  # returns when a neighbour closes its end: arriving data are no event
    time.sleep(10)  # seconds, in which an orderly end or MLX's own error comes first
    print(f"{PARSER.prog}: {LOST.format('it closed its connection')}", file=sys.stderr)
    os._exit(1)  # the main thread may be stuck inside MLX


def broadcast(interrupts, arrays=None, order="check", **texts):
    """Rank 0's order, arrays and texts, by name, on every rank; a signal that came to any of them is then known to all.
    Raises RuntimeError once a rank is gone: MLX may notice that one message late, so what the ranks have computed
    together counts only after the next one, and before each save comes a "check"."""
    group, file = ranks(), io.BytesIO()
    if group.size() == 1:
        return
    if group.rank() == 0:
        arrays = {name: mx.array(array) for name, array in (arrays or {}).items()}
        mx.save_safetensors(file, arrays, {"order": order, "texts": json.dumps(texts)})
    received = interrupts.received or (signal.SIGHUP if os.getppid() != LAUNCHER else 0)  # an orphan stops, too
    # First how long rank 0's message is, and the largest signal number on any rank; then the message itself.
    size, received = mx.distributed.all_max(mx.array([file.tell(), received], mx.int64)).tolist()
    if not size:
        raise RuntimeError("rank 0 said nothing")
    padded = np.frombuffer(file.getvalue().ljust(size, b"\0"), np.uint8)  # a sum with zeros is exact in bytes
    content = io.BytesIO(bytes(mx.distributed.all_sum(mx.array(padded))))
    interrupts.received = interrupts.received or received or None
    arrays, texts = mx.load(content, format="safetensors", return_metadata=True)
    return texts["order"], arrays, json.loads(texts["texts"])


def lead(interrupts, flags, model, optimizer=None, teacher=None):
    """Gives the other ranks the model that is to be trained, or, without an optimizer, scored."""
    trees = {"model": model.parameters(), "optimizer": optimizer.state if optimizer else {}}
    trees |= {"teacher": teacher.parameters()} if teacher else {}
    for name, array in tree_flatten(trees):  # one by one, or all would be in memory thrice
        broadcast(interrupts, {name: array}, "keep")
    configs = [vars(each.config) for each in (model, teacher) if each]
    broadcast(interrupts, {}, "begin", flags=flags, configs=configs, gpu=mx.default_device() == mx.gpu)


def follow():
    """What the other ranks do: each order of rank 0 ("check" is none) up to its "end". Returns the exit status."""
    kept, run = {}, SimpleNamespace()
    with Interrupts() as interrupts:  # a signal here reaches all ranks with the next broadcast
        while True:
            match broadcast(interrupts):
                case "keep", arrays, _:
                    kept |= arrays
                case "begin", _, texts:
                    use_device(texts["gpu"])
                    tree, kept, flags = tree_unflatten(kept), {}, argparse.Namespace(**DEFAULTS | texts["flags"])
                    run.model, *teacher = [LanguageModel(Config(**config)) for config in texts["configs"]]
                    if flags.lora_rank:  # before the weights, among which are then the adapters'
                        add_lora(run.model, flags.lora_rank, flags.lora_alpha)
                    for model, name in zip((run.model, *teacher), ("model", "teacher")):
                        model.update(tree[name])
                    if "optimizer" in tree:
                        streams = make_streams(flags.batch_size, flags.context_size)
                        run.optimizer = make_optimizer(run.model, flags, streams)
                        run.optimizer.state = tree["optimizer"]
                        run.step = make_step(run.model, run.optimizer, flags, streams, *teacher)
                case "step", arrays, texts:
                    take_step(run, flags, texts["iteration"], arrays["tokens"], arrays["targets"])
                case "evaluate", arrays, texts:
                    evaluate(run.model, np.array(arrays["tokens"]), texts["batch_size"], interrupts, texts["stride"])
                case "end", *_:
                    return 0  # also after a user's mistake, which rank 0 alone reports


# ---- Training -------------------------------------------------------------------------------------------------------
def use_device(gpu):
    """Makes the GPU or the CPU the default device; call it before anything is computed."""
    mx.set_default_device(mx.gpu if gpu else mx.cpu)
    if not gpu:  # graphs are computed breadth first, their streams side by side; else one stream waits for the other
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000")


cpu_stream = lru_cache(None)(lambda i: mx.new_stream(mx.cpu))  # made once: a stream lives as long as the process


def make_streams(batch_size, context_size):
    """The streams that share a rank's rows of a batch. On a CPU each is a thread on a core of its own, its products
    too: two took 50 ms a step at dim 128 where one took 80. Shares average 256 positions or more, or products become
    small; one stream alone has all cores for them. A GPU has one; so has macOS, whose BLAS brings its own threads."""
    if mx.default_device() == mx.gpu or BLAS == "Accelerate":
        return [mx.default_stream(mx.default_device())]
    cores, rows = len(os.sched_getaffinity(0)), batch_size // ranks().size()  # ours; a rank's smallest share
    count = max(1, min(cores, rows, rows * context_size // 256))
    set_blas_threads(cores if count == 1 else 1)  # or every stream's products would start a thread for each core
    return [cpu_stream(i) for i in range(count)]


def over_streams(streams, function, *arrays):
    """[function(*rows), ...] for a share of the rows of `arrays` on each stream: a stream of a CPU is a thread. What is
    built here is only MLX's graph: evaluated, it runs on all streams side by side. Each needs at least one row."""
    results = []
    for i, stream in enumerate(streams):
        rows = slice(len(arrays[0]) * i // len(streams), len(arrays[0]) * (i + 1) // len(streams))
        with mx.stream(stream):  # operations belong to the stream under which they are built
            results.append(function(*(array[rows] for array in arrays)))
    return results


def make_step(model, optimizer, flags, streams, teacher=None):
    """The training step: tokens [N, L], targets [N, L] and, for dropout, rates [N] and keys [N, 2] -> mean loss and
    gradient norm. The N = batch_size * grad_accumulation rows are taken batch_size at a time, those shared out over
    ranks and `streams`. With bfloat16 the model computes in it; weights, optimizer state and loss are float32."""
    model.model.checkpoint = flags.checkpoint  # gradient checkpointing, see Transformer; not the saved files
    state, group = [model.state, optimizer.state], ranks()  # trees of arrays that each step reads and replaces
    mixture = mx.array([flags.teacher_weight, flags.teacher_temperature])  # the teacher's [share, T], see head_loss
    dtype = mx.bfloat16 if flags.dtype == "bfloat16" and mx.default_device() == mx.gpu else mx.float32

    def loss(weights, scale, tokens, targets, *noise):  # scale: of the sum over positions, to a mean
        # The embeddings stay in float32, or the many small gradients of a frequent token would be lost in its sum.
        cast = lambda name, weight: weight if "embed_tokens" in name else weight.astype(dtype)
        model.update(tree_map_with_path(cast, weights))  # compute with the argument: gradients are taken by it
        return loss_sum(model, tokens, targets, scale, noise, True, teacher, mixture)

    # Compiled once for its shapes, then replayed. Arrays that are no arguments must be named as inputs, or their values
    # of the first call would be constants of the graph; those it changes as outputs, or the change would be lost.
    @partial(mx.compile, inputs=[model.state])
    def losses_and_gradients(scale, *batch):
        weights = model.trainable_parameters()  # of LoRA the adapters alone
        results = over_streams(streams, partial(mx.value_and_grad(loss), weights, scale), *batch)
        model.update(weights)  # `loss` has left its tracers in the model
        return results  # [(loss, gradients), ...], a pair of each stream

    @partial(mx.compile, inputs=state, outputs=state)
    def update(results):
        turn = itertools.cycle(streams)  # each leaf's sum is computed on the next stream
        add = lambda *terms: reduce(partial(mx.add, stream=next(turn)), terms)
        loss, gradients = tree_map(add, *results)
        if group.size() > 1:  # in one message, so that no two ranks can differ in the order of several
            loss, gradients = nn.average_gradients((loss, gradients), group, all_reduce_size=2**62)
        gradients, norm = optim.clip_grad_norm(gradients, flags.grad_clip or math.inf)  # norm: that before clipping
        optimizer.update(model, gradients)
        return loss, norm

    def step(*batch):  # tokens, targets and, for dropout, rates, keys
        total = None
        for start in range(0, len(batch[0]), flags.batch_size):
            first, last = (start + flags.batch_size * rank // group.size() for rank in (group.rank(), group.rank() + 1))
            part = (array[first:last] for array in batch)
            # Each sum becomes its part of the mean over N * L positions, times the ranks: `update` averages over them.
            results = losses_and_gradients(group.size() / batch[1].size, *part)
            total = tree_map(mx.add, total, results) if total else results
            if len(batch[0]) > flags.batch_size:  # or all parts would be in memory at once
                mx.eval(total)
        return update(total)  # ranks exchange gradients here alone, once a step

    return step


def learning_rate_at(iteration, flags):
    """The rate of step `iteration` (from 0): a linear warm-up over `lr_warmup` steps, then constant, or down to
    `min_lr` at `num_iters` by a half cosine or a line; 0 only where 0 is asked for."""
    least = flags.learning_rate / 10 if flags.min_lr is None else flags.min_lr
    done = max(0, iteration - flags.lr_warmup) / max(1, flags.num_iters - flags.lr_warmup)
    left = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[flags.lr_schedule]
    rate = flags.learning_rate - (flags.learning_rate - least) * (1 - left)
    return rate * min(1, (iteration + 1) / max(1, flags.lr_warmup))  # + 1: a rate of 0 would waste the first step


def make_noise(iteration, rows, flags):
    """Dropout's rates [N] and keys [N, 2] for step `iteration`, or () without dropout. Row r's key is a function of
    (seed, iteration, r) alone; the rate moves by a line from --dropout to --dropout_final at `num_iters`."""
    final = flags.dropout if flags.dropout_final is None else flags.dropout_final
    if not (flags.dropout or final):
        return ()
    random = np.random.default_rng([flags.seed, iteration, 1])  # 1: with 0 or nothing these would be Batches' draws
    rate = flags.dropout + (final - flags.dropout) * iteration / flags.num_iters
    return mx.full(rows, rate), mx.array(random.integers(0, 2**32, (rows, 2), np.uint32))


def take_step(run, flags, iteration, tokens, targets):
    """Step `iteration`, on every rank; returns the mean loss (nats a token) and the gradient norm, as floats."""
    set_learning_rate(run.optimizer, learning_rate_at(iteration, flags))  # an array in the state: nothing compiles anew
    loss, norm = run.step(tokens, targets, *make_noise(iteration, len(tokens), flags))  # nothing is computed yet
    mx.eval(loss, norm, run.model.state, run.optimizer.state)  # or the update would wait in the next step's graph
    return loss.item(), norm.item()


def make_config(flags, vocab_size, base=None):
    """The Config of a new model: where no flag decides, that of `base`, whose weights it begins with."""
    shape = {f.name: getattr(flags, f.name) for f in dataclasses.fields(Config) if f.name in GROUPS["model"]}
    return Config(**{"vocab_size": vocab_size} | (vars(base.config) if base else {}) | shape)  # some bases are padded


def begin_run(flags, dataset, checkpoint, used, name):
    """A run where the record `checkpoint` was saved, or at its start: what is trained, on what, and its record so far.
    used: the models that --init_from and --teacher name, as `open_model` gives them. Raises UsageError."""
    base, teacher = (used[flag][0] if flag in used else None for flag in ("init_from", "teacher"))
    config = Config(**checkpoint["config"]) if checkpoint else make_config(flags, dataset.tokenizer.vocab_size, base)
    model = base or LanguageModel(config)
    model.config = config  # a base's, but for the context size, which may be another one
    if flags.lora_rank:
        add_lora(model, flags.lora_rank, flags.lora_alpha)  # before the optimizer, which takes what is trained
    streams = make_streams(flags.batch_size, flags.context_size)
    optimizer = make_optimizer(model, flags, streams)
    batches = Batches(dataset.train.tokens, flags.context_size, flags.batch_size * flags.grad_accumulation, flags.seed)
    record = {"iteration": 0, "id": None, "scores": [], "best": None, "tokens": 0, "seconds": 0.0}
    run = SimpleNamespace(record=record, model=model, optimizer=optimizer, batches=batches, tokenizer=dataset.tokenizer)
    if checkpoint:
        load_run(flags.save_dir, checkpoint, run)
    elif not base or flags.lora_rank:
        init_weights(model, flags.seed)  # with LoRA the adapters alone: the base is frozen
    device = f"{mx.default_device().type.name}, {mx.device_info().get('device_name', '?')}, {os.cpu_count()} cores"
    needs = {flag: id for flag, (*_, id) in used.items() if flag == "teacher" or flags.lora_rank}  # to resume, too
    record |= {  # in the place of a loaded record's: flags and machine may be others
        "run": name, "flags": {flag: getattr(flags, flag) for flag in INHERITED}, "tokens_sha256": dataset.sha256,
        "uses": {flag: [path if os.path.isdir(path := getattr(flags, flag)) else id, id] for flag, id in needs.items()},
        "config": dataclasses.asdict(config), "parameters": sum(w.size for _, w in tree_flatten(model.parameters())),
        "command": sys.argv, "sources": SOURCES,
        # What the last bits of a result depend on: a run is exact as long as these stay the same.
        "versions": dict(MLX=mx.__version__, NumPy=np.__version__, BLAS=BLAS, device=device, streams=len(streams),
                         ranks=ranks().size()),
    }  # fmt: skip
    # After load_run, which gives the optimizer other dicts of state: the compiled step holds on to those it is given.
    run.teacher, run.step = teacher, make_step(model, optimizer, flags, streams, teacher)
    return run


def train(flags, dataset, checkpoint, used, interrupts):
    """A run from its start, or from the record `checkpoint`, to `num_iters` or a signal; returns the exit status: 0, or
    128 + the signal. used: see begin_run. Raises UsageError and, where it cannot go on, RunError: its line says why."""
    folder, tokenizer = flags.save_dir, dataset.tokenizer
    if flags.batch_size < (size := ranks().size()):
        raise UsageError(f"--batch_size {flags.batch_size} leaves some of the {size} ranks without a row: give more")
    # A checkpoint that --identifier names, and after which its run went on, is where another run branches off.
    newer = [r["run"] for r in list_checkpoints(folder) if flags.identifier and r["saved"] > checkpoint["saved"]]
    same = checkpoint and checkpoint["run"] not in newer  # the run goes on; else a new one or a branch begins
    name = checkpoint["run"] if same else f"{dataset.name}-{os.urandom(3).hex()}"  # 6 hex digits: see clean_folder
    if not (lock := lock_run(folder, name)):  # kept open: a closed file's lock is gone
        raise UsageError(f"{name} is being trained by another process: wait for it, or begin another with --new_model")
    if checkpoint and not (folder / f"{checkpoint['id']}.safetensors").exists():  # another process trained and pruned
        raise RunError(f"{name} went on while this line was starting: type it again")
    clean_folder(folder)
    run = begin_run(flags, dataset, checkpoint, used, name)
    record, model, batches = run.record, run.model, run.batches
    lead(interrupts, record["flags"], model, run.optimizer, run.teacher)  # model and optimizer to the other ranks
    start = record["iteration"]
    print_start(flags, dataset, run, checkpoint or record)
    if start >= flags.num_iters:
        tqdm.write(f"Iteration {start:,} of --num_iters {flags.num_iters:,} is reached: a larger one extends the run.")

    bar = tqdm(total=flags.num_iters, initial=start, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    log = open_log(folder / f"{name}.csv", start, start in dict(record["scores"]))
    batch_tokens = batches.batch_size * flags.context_size
    steps_per_save = flags.steps_per_save or flags.steps_per_eval
    losses, seconds, trained = [], 0.0, 0.0  # since the last report; `trained`: in this leg, but for its first step
    for iteration in range(start, flags.num_iters + 1):  # steps done so far; the last turn takes none
        record["iteration"] = iteration
        timeout = flags.max_minutes is not None and trained >= 60 * flags.max_minutes
        finished, stopping = iteration == flags.num_iters, interrupts.received or timeout
        due = iteration >= flags.steps_per_eval and (finished or iteration % flags.steps_per_eval == 0)

        # Save, then evaluate, then add the score, then sample: what goes wrong in one costs none of those before it.
        save = iteration > start and (finished or stopping or due or iteration % steps_per_save == 0)
        if save:
            broadcast(interrupts)  # raises if a rank was lost in the last step, which is then worth nothing
            save_checkpoint(folder, run)
            clean_folder(folder, run, flags.keep)
            tqdm.write(f"saved {record['id']} at iteration {iteration:,}")
        if (due or timeout) and iteration not in [scored for scored, _ in record["scores"]]:  # not by an earlier leg
            if (nats := score_split("valid", model, dataset, flags, interrupts, flags.eval_tokens)) is not None:
                bits = nats / math.log(2) * len(dataset.valid.tokens) / dataset.valid.num_bytes
                log(iteration, "valid", nats, bits, "", "", record["tokens"], "", "", record["seconds"])
            if due and nats is not None:  # best and --patience must not depend on where --max_minutes ends a leg
                record["scores"].append([iteration, nats])
                if record["best"] is None or nats < record["best"]["nats"]:
                    record["best"] = {"id": record["id"], "iteration": iteration, "nats": nats}  # clean_folder keeps it
                if save or name == checkpoint["run"]:  # a branch leaves the checkpoint that it began from as it is
                    save_checkpoint(folder, run, record["id"])  # the same weights; their metadata hold the score now
        scores = [nats for scored, nats in record["scores"] if scored % flags.steps_per_eval == 0]  # not at legs' ends,
        misses = len(scores) - 1 - scores.index(min(scores)) if scores else 0  # so that legs stop as a whole run does
        if save and not interrupts.received:
            tqdm.write("".join(Conversation(tokenizer, model).reply("", flags, flags.seed, interrupts)))
        if timeout:
            tqdm.write(f"--max_minutes {flags.max_minutes:g} are over at iteration {iteration:,}.")
        if flags.patience and misses >= flags.patience:
            tqdm.write(f"Stopped: no better score in {misses} evaluations (--patience); best: {record['best']['id']}")
            break
        if finished or timeout or (interrupts.received and (save or iteration == start)):
            break  # a signal since `stopping` was read, where nothing was saved, gets one more step and its save

        began = time.perf_counter()
        tokens, targets = batches.next()
        broadcast(interrupts, {"tokens": tokens, "targets": targets}, "step", iteration=iteration)
        loss, norm = take_step(run, flags, iteration, tokens, targets)
        losses.append(loss)
        record["tokens"] += tokens.size
        taken = time.perf_counter() - began
        seconds += taken
        if iteration > start:  # not the one that compiles
            trained, record["seconds"] = trained + taken, record["seconds"] + taken  # of this leg; of the run

        if not math.isfinite(loss + norm):
            broadcast(interrupts)  # raises if a lost rank is the cause: another error, another remedy
            problem = f"the loss or gradient of iteration {iteration + 1:,} is not finite, and nothing of it is saved"
            good = f"the last good checkpoint is {record['id'] or 'none yet'}"
            raise RunError(f"{problem}; {good}: go on with a lower --learning_rate or --grad_clip")
        if (iteration + 1) % flags.steps_per_report == 0:
            mean, rate = sum(losses) / len(losses), len(losses) / seconds  # steps a second
            report = f"loss {mean:.4f}  perplexity {math.exp(min(mean, 99)):.2f}  "  # exp(710) overflows
            report += f"lr {learning_rate_at(iteration, flags):.2e}  grad {norm:.2f}  "
            report += f"{rate * batch_tokens:,.0f} tokens/s  peak {mx.get_peak_memory() / 2**20:,.0f} MiB"
            bar.set_postfix_str(report)
            if bar.disable:
                left = tqdm.format_interval((flags.num_iters - iteration - 1) / rate)
                tqdm.write(f"{iteration + 1:,}/{flags.num_iters:,}  {report}  left {left}")
            # Only of the whole text: num_bytes is that of all of it, wherever --train_tokens ends.
            bits = "" if flags.train_tokens else mean / math.log(2) * len(batches.tokens) / dataset.train.num_bytes
            values = learning_rate_at(iteration, flags), norm, record["tokens"], rate * batch_tokens
            log(iteration + 1, "train", mean, bits, *values, mx.get_peak_memory() / 2**20, record["seconds"])
            losses, seconds = [], 0.0
        bar.update()
    bar.close()
    lock.close()  # another process may train the run now
    if flags.eval_test and not interrupts.received:
        score_split("test", model, dataset, flags, interrupts)
    if interrupts.received:
        there = f"--identifier {name} goes on from there" if record["id"] else "nothing was saved yet"
        tqdm.write(f"Stopped at iteration {record['iteration']:,}; {there}.")
        return 128 + interrupts.received  # as shells report the end by a signal
    return 0


# Columns of <run>.csv, empty where a line has no such value. loss: nats a token; tokens: trained on since the start;
# peak_mib: MLX's peak of this process; seconds: of training, all legs together, without each one's first step.
LOG = "iteration split loss bits_per_byte learning_rate gradient_norm tokens tokens_per_second peak_mib seconds".split()


def open_log(path, iteration, scored):
    """A function that appends a line of LOG to a run's file of comma-separated values. What the file has of iterations
    later than this one goes: they come again; so does a score of `iteration` itself, if it was not `scored`."""
    lines = [",".join(LOG)]
    with contextlib.suppress(OSError):
        rows = [line.split(",") for line in path.read_text(errors="replace").splitlines()]
        rows = [row for row in rows if len(row) == len(LOG) and row[0].isdigit()]  # the last may be cut off
        lines += [",".join(row) for row in rows if int(row[0]) < iteration + (scored or row[1] == "train")]

    def append(*values):
        with contextlib.suppress(OSError):  # of a full disk: the run is worth more than its log
            with path.open("a") as file:
                print(*(f"{value:.6g}" if isinstance(value, float) else value for value in values), sep=",", file=file)

    with contextlib.suppress(OSError):
        with locked(path.parent):  # or another process' clean_folder would take the new one for a killed save's
            path.with_suffix(".csv.new").write_text("\n".join(lines) + "\n")
            path.with_suffix(".csv.new").replace(path)  # a kill leaves the old file or the new one, whole
    return append


def print_start(flags, dataset, run, last):
    """One screen that says what is trained, on what, and where its files go. last: the record continued, or its own."""
    record, config, tokenizer, folder = run.record, run.model.config, dataset.tokenizer, flags.save_dir
    several = f", {ranks().size()} ranks" * (ranks().size() > 1)
    # Bytes: of a checkpoint, free on the disk, and of --keep checkpoints with the best and the one being written.
    size = sum(array.nbytes for _, array in tree_flatten([run.model.trainable_parameters(), run.optimizer.state]))
    free, room, old, new = shutil.disk_usage(folder).free, size * (flags.keep + 2), last["versions"], record["versions"]
    splits = " / ".join(f"{len(split.tokens):,}" for split in (dataset.train, dataset.valid, dataset.test) if split)
    windows, rows = len(run.batches.perm), run.batches.batch_size  # windows of this epoch; rows of a step
    trained = sum(weight.size for _, weight in tree_flatten(run.model.trainable_parameters()))
    note = f", of them {trained:,} trained" if trained < record["parameters"] else ""
    tqdm.write(
        f"run      {record['run']}, from iteration {record['iteration']:,} to {flags.num_iters:,}, seed {flags.seed}\n"
        f"model    {record['parameters']:,} parameters{note}: {config.num_blocks} blocks, dim {config.dim}, "
        f"{config.num_heads} heads ({config.num_kv_heads} for keys and values), {config.mlp} {config.mlp_dim}, "
        f"context {config.context_size}\n"
        f"data     {dataset.name}: {splits} tokens; vocabulary {tokenizer.vocab_size:,} by {tokenizer.kind} "
        f"({tokenizer.vocab_size - tokenizer.num_special:,} without special tokens)\n"
        f"steps    {rows} x {config.context_size} tokens each, {windows // rows or 1:,} an epoch; {flags.optimizer}\n"
        f"machine  {new['device']}{several}; MLX {new['MLX']}, matrix products by {BLAS}\n"
        f"files    {folder.absolute()}, {size / 2**20:,.0f} MiB a checkpoint, {free / 2**20:,.0f} MiB free"
    )
    if flags.batch_size % ranks().size():
        tqdm.write(f"--batch_size {flags.batch_size} does not divide evenly by {ranks().size()} ranks: some wait.")
    if windows < rows:
        tqdm.write("The text has fewer windows than a step's batch: they repeat within it.")
    if flags.dtype == "bfloat16" and not flags.gpu:
        tqdm.write("--dtype bfloat16 would be slower on a CPU, for which MLX has no fast code: it computes in float32.")
    if room > free:
        tqdm.write(f"Low on space: --keep {flags.keep}, the best and the next one need {room / 2**20:,.0f} MiB.")
    if BLAS == "reference BLAS" and not flags.gpu:
        tqdm.write("Slow matrix products: install OpenBLAS (apt install libopenblas0) or a compiler (apt install g++).")
    if changed := [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]:
        tqdm.write(f"Not as the checkpoint was made ({'; '.join(changed)}): exact resume holds in equal conditions.")


# ---- Sampling: functions of logits [B, V], then texts token by token ------------------------------------------------
def penalize(logits, texts, penalty):
    """Of the ids in a row's text, divides logits above 0 by `penalty` and multiplies the rest (Keskar et al. 2019)."""
    if penalty == 1:
        return logits
    seen = np.zeros(logits.shape, bool)  # [B, V]: which ids a row's text has
    for row, text in enumerate(texts):
        seen[row, text] = True
    return mx.where(mx.array(seen), mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits, k):
    """All but the `k` largest at -inf; ties with the k-th stay. 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    kth = mx.min(mx.topk(logits, k, axis=-1), axis=-1, keepdims=True)  # [B, 1]; topk gives no order
    return mx.where(logits < kth, -math.inf, logits)


def keep_top_p(logits, p):
    """All but the likeliest that together have probability `p`, at least one, at -inf (Holtzman et al. 2020)."""
    if p >= 1:
        return logits
    ascending = mx.sort(logits, axis=-1)
    before = 1 - mx.cumsum(mx.softmax(ascending, axis=-1), axis=-1)  # the probability of all larger ones
    least = mx.min(mx.where(before < p, ascending, math.inf), axis=-1, keepdims=True)  # [B, 1], the least kept
    return mx.where(logits < mx.minimum(least, ascending[..., -1:]), -math.inf, logits)  # p = 0: the largest


def keep_min_p(logits, p):
    """All that are less than `p` times as probable as the likeliest at -inf (Nguyen et al. 2024). 0 keeps all."""
    return logits if p == 0 else mx.where(logits < logits.max(axis=-1, keepdims=True) + math.log(p), -math.inf, logits)


def shape_logits(logits, flags, texts):
    """Logits [B, V] of what is sampled: the repetition penalty first, then temperature, top-k, top-p and min-p in this
    order, as in Hugging Face's transformers. Temperature 0 keeps only the largest."""
    logits = penalize(logits.astype(mx.float32), texts, flags.repetition_penalty)
    if flags.temperature < 1e-6:  # 0, or as good as 0
        return mx.where(mx.arange(logits.shape[-1]) == logits.argmax(axis=-1, keepdims=True), 0, -math.inf)
    return keep_min_p(keep_top_p(keep_top_k(logits / flags.temperature, flags.top_k), flags.top_p), flags.min_p)


class Decoder:
    """A model and the texts it reads, B lists of at least one token each, which may grow and be shortened. Keys and
    values are kept. A text that outgrows the context is read again from its last context_size // 2 tokens on, so that
    logits are always those of a fresh pass over the tokens from `starts` on."""

    def __init__(self, model, texts):
        self.model, self.texts = model, texts
        self.starts, self.lengths = np.zeros((2, len(texts)), np.int32)  # of the windows; of what is read of them
        self.caches = [Cache(model.config, self.lengths) for _ in model.model.layers]  # all hold this very array
        self.proposed = self.accepted = 0  # tokens, as a draft

    def shorten(self, length):
        """Takes back what stands in the texts beyond `length`."""
        for text in self.texts:
            del text[length:]  # in place: a draft's decoder has the same list
        self.lengths[:] = np.minimum(self.lengths, length - self.starts)  # in place: the caches hold this array

    def logits(self, count=1):
        """Logits [B, count, V] of what follows each of the last `count` tokens of every text."""
        context_size = self.model.config.context_size
        # A text that has outgrown its window, or has less than `count` tokens left of it, gets a new one, all unread.
        # The last `count` tokens are always read, if need be again: what is asked for are their logits.
        for row, text in enumerate(self.texts):
            if not count <= len(text) - self.starts[row] <= context_size:
                self.lengths[row], self.starts[row] = 0, max(0, len(text) - max(count, context_size // 2))
            self.lengths[row] = min(self.lengths[row], len(text) - self.starts[row] - count)
        windows = [text[start:] for text, start in zip(self.texts, self.starts)]
        fresh = np.array([len(window) for window in windows]) - self.lengths  # [B]: tokens not read yet
        # One pass reads equally many tokens of each row. Where rows differ, those with more are read alone at first:
        for row in np.flatnonzero((fresh > count) & (fresh.min() < fresh.max())):  # each but its end, then the ends
            alone = Decoder(self.model, [windows[row][:-count]])
            alone.logits()
            for cache, other in zip(self.caches, alone.caches):
                cache.keys[row], cache.values[row] = other.keys[0], other.values[0]  # [K, context, d]
            self.lengths[row] = len(windows[row]) - count
        tokens = mx.array([window[length:] for window, length in zip(windows, self.lengths)])  # [B, fresh]
        logits = self.model(tokens, self.caches, last=count)  # [B, count, V]; the caches take the tokens in
        self.lengths += tokens.shape[1]  # in place, for all caches at once
        return logits

    def draw(self, flags, seeds, count=1):
        """Ids [B, count], one drawn for what follows each of the last `count` tokens of every text, by random numbers
        that depend on the row's seed and the place in its text alone, not on other rows."""
        logits = self.logits(count).flatten(0, 1)  # [B * count, V]
        rows = zip(self.texts, self.starts, seeds)
        places = [(text, start, seed, len(text) - i) for text, start, seed in rows for i in reversed(range(count))]
        logits = shape_logits(logits, flags, [text[start:end] for text, start, _, end in places])
        keys = mx.array([[seed, end] for *_, seed, end in places], mx.uint32)  # [B * count, 2], as MLX's are
        return np.array(mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(logits, keys)).reshape(-1, count)


def generate(decoder, max_tokens, flags, seeds, draft=None, length=4):
    """Yields `max_tokens` times the next ids of the decoder's texts, [B] ints, and appends them there. With one text
    `draft` can be another decoder of it, which proposes up to `length` tokens; `decoder` reads them in one pass and
    keeps those that it draws itself. Both draw by the same random numbers, so that they mostly agree where their
    distributions are alike, and the text is the same as without a draft (Daliri, Musco & Suresh 2024)."""
    end, proposals = len(decoder.texts[0]) + max_tokens, []
    while (known := len(decoder.texts[0])) < end:
        if draft:
            room = decoder.model.config.context_size - (known - decoder.starts[0])  # or its window would move
            proposals = [id for [id] in generate(draft, min(length, room, end - known - 1), flags, seeds)]
        # Drawn by the same random numbers as the proposals, which are accepted up to the first it draws otherwise.
        ids = decoder.draw(flags, seeds, len(proposals) + 1)  # [B, 1 + proposals]
        accepted = next((i for i, id in enumerate(proposals) if id != ids[0, i]), len(proposals))
        if draft:
            draft.proposed, draft.accepted = draft.proposed + len(proposals), draft.accepted + accepted
            for each in (decoder, draft):
                each.shorten(known + accepted)  # takes rejected proposals back, and what is read of them
        for text, id in zip(decoder.texts, ids[:, accepted].tolist()):
            text.append(id)  # the decoder's own, after the last accepted one
        yield from ids[:, : accepted + 1].T.tolist()  # the accepted, which it drew too, and its own


def first_ids(tokenizer, prompt):
    """The ids of a prompt, at least one for a model to continue: "" is the end token or, without one, a line end."""
    ids = tokenizer.encode(prompt).tolist()
    return ids or ([tokenizer.eos] if tokenizer.eos is not None else tokenizer.encode("\n").tolist())


class Conversation:
    """A growing text: what a user adds to it, and what a model, perhaps sped up by a draft, continues it with."""

    def __init__(self, tokenizer, model, draft=None):
        self.tokenizer, self.text, self.speed = tokenizer, [], 0.0  # tokens a second of the last reply
        self.decoders = [Decoder(each, [self.text]) for each in (model, draft) if each]  # on one list of ids

    def reply(self, prompt, flags, seed, interrupts=None):
        """Adds `prompt` on a new line; yields what follows in pieces, each once no later token can change it."""
        if unknown := self.tokenizer.unknown(prompt):
            print(f"Not in the vocabulary, read as <unk>: {' '.join(unknown)}", file=sys.stderr)
        self.text += self.tokenizer.encode("\n" + prompt).tolist() if self.text else first_ids(self.tokenizer, prompt)
        decode, ids, known, times = self.tokenizer.decode, self.text[:], len(self.text), []  # times: when tokens came
        shown, (first, *draft) = len(decode(ids)), self.decoders  # shown: characters of decode(ids) already out
        try:
            for [token] in generate(first, flags.max_tokens, flags, [seed], *draft):
                times.append(time.perf_counter())
                ids.append(token)
                if not (text := decode(ids)).endswith("\ufffd"):  # which may be the first bytes of a character
                    yield text[shown:]
                    ids = ids[-1:]  # all that the next token's text can depend on
                    shown = len(decode(ids))
                if interrupts and interrupts.received:
                    return
            yield decode(ids)[shown:]  # a character's bytes that were never completed, if any
        finally:
            for decoder in self.decoders:
                decoder.shorten(known + len(times))  # without what was proposed when the reader left
            self.speed = (len(times) - 1) / (time.perf_counter() - times[0]) if times else 0.0  # without the prompt

    def describe_speed(self):
        """Tokens a second of the last reply, and how often the draft was right."""
        line = f"{self.speed:,.1f} tokens/s"
        for draft in self.decoders[1:]:
            rate = draft.accepted / max(1, draft.proposed)
            line += f", {rate:.0%} of the draft's {draft.proposed:,} proposals accepted"
        return line


# ---- Prompts --------------------------------------------------------------------------------------------------------
SETTABLE = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed"]
COMMANDS = """/set NAME VALUE   changes a sampling flag: /set temperature 0.8
/reset            forgets the conversation
/stats            shows tokens/s after each reply, or no longer
/quit             leaves, as Ctrl+D does; Ctrl+C ends a reply"""


def talk(folder, checkpoint, flags):
    """--inference, --prompt or --prompts_file with this checkpoint, and with that of --draft. The model's text goes to
    stdout, what is said about it to stderr. Raises UsageError."""
    id, (model, tokenizer) = checkpoint["id"], load_model(folder, checkpoint)
    models = [model]
    if flags.quantize:
        quantize(model, flags.quantize, packed=flags.gpu)  # on a CPU rounded, then spread out again
    if flags.draft:
        draft, its, _ = open_model(folder, flags.draft, "--draft")
        if its.to_dict() != tokenizer.to_dict():  # it proposes ids, which have to mean the same text
            raise UsageError(f"--draft {flags.draft} has another tokenizer than {id[:12]}: name one of equal data")
        models.append(draft)
    if flags.inference:
        print(describe(checkpoint), file=sys.stderr)
        return converse(tokenizer, models, flags)
    if flags.attention:
        plot_attention(model, tokenizer, flags.prompt, flags.attention)
    elif flags.prompts_file:
        answer_file(tokenizer, model, id, flags)
    else:  # so many continuations of --prompt, and nothing else, on stdout
        for i in range(flags.num_samples):
            conversation = Conversation(tokenizer, *models)  # a new one, so that no sample reads another
            print(end="-" * 15 + "\n" if i else "")  # as nanoGPT does
            for piece in conversation.reply(flags.prompt, flags, flags.seed + i):  # sample i is that of --seed S + i
                print(piece, end="", flush=True)
            print(flush=True)
        print(conversation.describe_speed(), file=sys.stderr)  # of the last sample
    print(describe(checkpoint), file=sys.stderr)


def converse(tokenizer, models, flags):
    """Answers each line of stdin with its continuation, in the light of all lines and answers before. Lines that begin
    with / are COMMANDS. Ctrl+C ends a reply; at the prompt it, or Ctrl+D, the session."""
    for model in models:  # compiles what MLX compiles, before Ctrl+C means the end of a reply
        mx.eval(Decoder(model, [[0]]).logits())  # any id will do: 0 is in each vocabulary
    signal.signal(signal.SIGINT, signal.default_int_handler)  # raises KeyboardInterrupt: the top of this file undone
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 are no error
    stats, conversation = False, Conversation(tokenizer, *models)
    if question := "> " * sys.stdin.isatty():  # none in a pipe
        import readline  # noqa: F401 (gives input() line editing and history)
    try:
        while (line := input(question)) != "/quit":
            match line.split() if line.startswith("/") else []:  # []: text to continue
                case ["/set", name, value] if name in SETTABLE:
                    try:
                        PARSER.parse_args([f"--{name}={value}"], flags)  # checked like a typed flag, set in `flags`
                    except UsageError as error:
                        print(error, file=sys.stderr)
                case ["/reset"]:
                    conversation = Conversation(tokenizer, *models)
                case ["/stats"]:
                    stats = not stats
                case [_, *_]:  # any other, or a /set that names no such flag
                    print(COMMANDS, file=sys.stderr)
                case []:
                    with contextlib.suppress(KeyboardInterrupt):  # Ctrl+C: what was shown stays in the conversation
                        for piece in conversation.reply(line, flags, flags.seed):  # one seed for all: see Decoder.draw
                            print(piece, end="", flush=True)
                    print(flush=True)
                    if stats:
                        print(conversation.describe_speed(), file=sys.stderr)
    except (EOFError, KeyboardInterrupt):  # Ctrl+D or the pipe's end; Ctrl+C at the prompt
        print(end="\n" if question else "")  # the shell's prompt gets a line of its own


def answer_file(tokenizer, model, id, flags, batch_size=16):
    """Continues each line of --prompts_file --num_samples times, `batch_size` together, each time a line of JSON
    (prompt, seed, checkpoint, completion, tokens) in --output or on stdout. An --output that holds the first of these
    lines is continued. Raises UsageError, also for an --output that holds anything else."""
    with explained(f"--prompts_file {flags.prompts_file} must be UTF-8, --output writable", OSError, ValueError):
        prompts = Path(flags.prompts_file).read_text("utf-8").removesuffix("\n").split("\n")  # splitlines cuts at \f
        prompts = [prompt for prompt in prompts for _ in range(flags.num_samples)]
        jobs = [{"prompt": prompt, "seed": flags.seed + i, "checkpoint": id} for i, prompt in enumerate(prompts)]
        out, begun = append_lines(flags.output, jobs) if flags.output else (os.fdopen(os.dup(1), "wb"), [])
    with out:  # stdout itself stays open: `out` has a copy of its descriptor
        for start in range(len(begun), len(jobs), batch_size):  # those of `begun` are answered
            batch = jobs[start : start + batch_size]
            texts = [first_ids(tokenizer, job["prompt"]) for job in batch]  # which generate lengthens
            shown = [len(tokenizer.decode(text)) for text in texts]  # characters of the prompts
            steps = list(generate(Decoder(model, texts), flags.max_tokens, flags, [job["seed"] for job in batch]))
            for job, text, known, tokens in zip(batch, texts, shown, zip(*steps)):  # steps: [max_tokens][B]
                line = job | {"completion": tokenizer.decode(text)[known:], "tokens": tokens}
                out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                out.flush()  # a kill costs the batch that is computed, no more


# ---- Tools ----------------------------------------------------------------------------------------------------------
def list_runs(folder):
    """Prints the runs in `folder`, the one saved last first: the flags that tell them apart, then their checkpoints."""
    records = list_checkpoints(folder, warn=True)  # the newest first
    print(f"{len(records)} checkpoints in {folder}")
    for name in dict.fromkeys(record["run"] for record in records):  # each run once, in that order
        own = [record for record in records if record["run"] == name]
        flags, best = own[0]["flags"], (own[0]["best"] or {}).get("id")  # best: None before a score
        differing = [flag for flag in flags if any(record["flags"].get(flag) != flags[flag] for record in records)]
        line = f"{name}: {own[0]['parameters']:,} parameters, iteration {own[0]['iteration']:,} of "
        line += " ".join([f"{flags['num_iters']:,}", *(f"--{flag} {flags[flag]}" for flag in differing)])
        print(textwrap.fill(line, 100, subsequent_indent="    "))
        for record in own:
            score = {i: f"{nats:.4f}" for i, nats in record["scores"]}.get(record["iteration"], "not scored")
            marks = ", latest" * (record is records[0]) + ", best" * (record["id"] == best)  # of the folder; of the run
            line = f"    {record['id'][:12]}  iteration {record['iteration']:>9,}  {score:>10}"
            print(f"{line}  {tqdm.format_interval(time.time() - record['saved']):>8} old{marks}")


def predict_memory(config, flags, parameters, streams):
    """(activations, gradients): bytes at the peak of a training step's two halves on a CPU. Activations are kept from
    forward for backward; gradients are each stream's, their sum and the clipped ones. The factors, in floats for each
    position, were fit to 25 models (dim 128 to 512, context 48 to 256, 257 to 50,257 tokens, 2 streams), within 7 %."""
    B, L, D, V = flags.batch_size, config.context_size, config.dim, config.vocab_size
    a_block = (14.3 if config.qk_norm else 9.9) * D + 2.2 * config.num_kv_heads * config.head_dim  # floats a position
    a_block += {"relu2": 3.6, "swiglu": 5.3}.get(config.mlp, 4.7) * config.mlp_dim + 1.55 * config.num_heads * L
    chunk = min(-(-B * L // streams), max(128, 2**23 // V))  # rows of logits in memory at once, see head_loss
    activations = B * L * config.num_blocks * a_block + streams * V * (2.8 * chunk + 1.1 * D)  # floats
    return round(4 * activations), 4 * parameters * max(4, streams + 2)


def run_benchmark(flags, config, batches):
    """--benchmark: what a model weighs, costs and reaches on this machine, in real training steps; a line of JSON last.
    Memory is in bytes, speed in floating-point operations and tokens a second."""
    model, streams = LanguageModel(config), make_streams(flags.batch_size, flags.context_size)
    init_weights(model, flags.seed)
    optimizer = make_optimizer(model, flags, streams)
    parts = {"embeddings": "embed", "attention": r"attn\.\w_proj", "mlp": "mlp", "norms": "norm", "output": "lm_head"}
    weights = tree_flatten(model.parameters())
    modules = {part: sum(w.size for name, w in weights if re.search(names, name)) for part, names in parts.items()}
    # A multiplication and an addition for each weight of a matrix and, with each position of the window, twice for each
    # element of the queries (scores, weighted sum of values); backward twice as many, by inputs and by weights.
    matrices = modules["attention"] + modules["mlp"] + config.vocab_size * config.dim  # output, tied or not
    forward = 2 * matrices + 4 * config.num_blocks * config.num_heads * config.head_dim * config.context_size
    activations, gradients = predict_memory(config, flags, sum(modules.values()), len(streams))
    moments = sum(array.nbytes for _, array in tree_flatten(optimizer.state))
    lasting = {"weights": 4 * sum(modules.values()), "optimizer": moments}
    step, (tokens, targets) = make_step(model, optimizer, flags, streams), batches.next()
    noise = make_noise(0, len(tokens), flags)
    train_once = lambda: mx.eval(step(tokens, targets, *noise), model.state, optimizer.state)  # lazy until mx.eval
    train_once()  # compiles
    mx.reset_peak_memory()  # what came before does not count
    # The fastest of several repetitions: other programs can slow one down, never speed it up.
    speed, peak = tokens.size / min(timeit.repeat(train_once, number=1, repeat=5)), mx.get_peak_memory()
    # What the speed of training is measured against: a product of large square matrices, on the same streams.
    square = mx.random.normal((2048, 2048))
    product = lambda: mx.eval(over_streams(streams, lambda rows: rows @ square, square))
    flops = 2 * 2048**3 / min(timeit.repeat(product, number=1, repeat=6))  # a second; 2: multiply, add
    make_streams(1, 1)  # decoding has all cores
    steps = generate(Decoder(model, [[0]]), 33, flags, [flags.seed])  # the first, which compiles, is not timed
    result = {
        "parameters": modules, "flops_per_token": {"forward": forward, "backward": 2 * forward},
        "memory": lasting | {"activations": activations, "gradients": gradients},
        "predicted_peak": sum(lasting.values()) + max(activations, gradients),  # the one goes as the other comes
        "measured_peak": peak, "tokens_per_second": speed, "matrix_flops": flops,
        "share_of_matrix_speed": 3 * forward * speed / flops,  # 3: backward costs two forwards
        "decoded_per_second": 32 / timeit.timeit(lambda: list(steps), lambda: next(steps), number=1),
    }  # fmt: skip
    for name, value in result.items():
        numbers = value if isinstance(value, dict) else {"": value}
        print(f"{name:<22}", ", ".join(f"{part} {round(number, 2):,}".strip() for part, number in numbers.items()))
    print(json.dumps(result))


def plot_runs(folder, names, path):
    """--plot: losses of the runs in `folder` against iterations and against minutes of training. Raises UsageError."""
    import matplotlib.figure  # only where a picture is asked for; not pyplot, as nothing is shown on a screen

    logs = [log for log in sorted(folder.glob("*.csv")) if log.stem in (names or [log.stem])]
    logs = [log for log in logs if log.open(errors="replace").readline().strip() == ",".join(LOG)]  # and no other's
    if not logs:
        raise UsageError(f"no log of such a run is in {folder}: name its folder with --save_dir")
    figure = matplotlib.figure.Figure(figsize=(12, 5), layout="constrained")
    by_iteration, by_minute = figure.subplots(1, 2, sharey=True)
    for i, log in enumerate(logs):
        rows = list(csv.DictReader(log.open(errors="replace")))
        for split, alpha, marker in (("train", 0.4, None), ("valid", 1, "o")):  # train: dense and noisy, so pale
            own = [(row["iteration"], row["seconds"], row["loss"]) for row in rows if row["split"] == split]
            iterations, seconds, losses = np.array(own, float).reshape(-1, 3).T  # (-1, 3): there may be none
            for axis, places in ((by_iteration, iterations), (by_minute, seconds / 60)):
                axis.plot(places, losses, color=f"C{i}", alpha=alpha, marker=marker, label=f"{log.stem} {split}")
    by_iteration.set(xlabel="iteration", ylabel="loss (nats a token)")
    by_minute.set(xlabel="minutes of training")
    figure.legend(*by_minute.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_figure(figure, path)


def save_figure(figure, path):
    """Writes a matplotlib figure, at most 2^14 pixels a side, in the format of the path's ending. Raises UsageError."""
    with explained(f"cannot write {path}: name another file"):
        figure.savefig(os.path.expanduser(path), dpi=min(150, 2**14 / max(figure.get_size_inches())))  # dots an inch
    print(f"The picture is in {path}", file=sys.stderr)


def plot_attention(model, tokenizer, prompt, path):
    """--attention: a square for each block (down) and head (across): how much each token of the prompt (down) looks
    at each (across), from 0 (white) to 1 (dark blue). Raises UsageError."""
    import matplotlib.figure

    tokens = first_ids(tokenizer, prompt)[-model.config.context_size :]  # its end, if it outgrows a window
    labels, size = [repr(tokenizer.decode([token]))[1:-1] for token in tokens], max(2.5, 0.22 * len(tokens))  # inches
    weights = attention_weights(model, tokens)  # [blocks, H, L, L]
    blocks, heads = weights.shape[:2]
    figure = matplotlib.figure.Figure(figsize=(size * heads, size * blocks), layout="constrained")
    for (i, j), axis in np.ndenumerate(figure.subplots(blocks, heads, squeeze=False)):
        axis.imshow(weights[i, j], vmin=0, vmax=1, cmap="Blues")
        axis.set_title(f"block {i}, head {j}", fontsize="small")
        axis.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=6, parse_math=False)  # a $ is no formula
        axis.set_yticks(range(len(tokens)), labels, fontsize=6, parse_math=False)
    save_figure(figure, path)


def run_cases(folder, records, flags, top_k):
    """--cases: how likely checkpoints find the expected continuations in a YAML file; a table, JSON with --output.
    rank: the worst of an expected token, 1 is the likeliest; probability: of the whole continuation; top: the likeliest
    first tokens. A case is passed if its rank is at most `top_k` and all of it known. Raises UsageError, RunError."""
    import yaml

    needed = "is no YAML list of prompt and expected, like - {prompt: a, expected: b}, or --output no file to write"
    with explained(f"--cases {flags.cases} {needed}"):
        cases = yaml.load(Path(flags.cases).expanduser().read_text("utf-8"), yaml.BaseLoader)  # all scalars are text
        cases = [(utf8(str(case["prompt"])), utf8(str(case["expected"]))) for case in cases]  # \ud83d\ude00: one sign
        open(flags.output or os.devnull, "a").close()  # fails before the work, not after it
    results = []
    for record in records:
        if damage := find_damage(folder, record["id"]):
            print(f"Passing over {describe(record)}: {damage}", file=sys.stderr)
            continue
        model, tokenizer = load_model(folder, record)
        print(describe(record))
        for prompt, expected in cases:
            # One pass scores all expected tokens, each behind the true ones before it, not behind the model's guesses.
            wanted = first_ids(tokenizer, expected)[-model.config.context_size :]
            text = (first_ids(tokenizer, prompt) + wanted)[-model.config.context_size - 1 :]  # the last one is no input
            logits, wanted = model(mx.array([text[:-1]]), last=len(wanted))[0], mx.array(wanted)  # [expected, V]
            worst = (logits > mx.take_along_axis(logits, wanted[:, None], axis=-1)).sum(axis=-1).max().item() + 1
            chance = math.exp(-nn.losses.cross_entropy(logits, wanted, reduction="sum").item())
            best = [tokenizer.decode([token]) for token in mx.argsort(-logits[0])[:top_k].tolist()]
            result = {"checkpoint": record["id"], "prompt": prompt, "expected": expected, "rank": worst}
            known = not tokenizer.unknown(expected)  # <unk> may be likely, but is not what was expected
            results.append(result | {"probability": chance, "top": best, "passed": worst <= top_k and known})
            line = f"  {'pass' if results[-1]['passed'] else 'FAIL'} rank {result['rank']:>6,} {chance:>9.2e}  "
            print(f"{line}{prompt[-24:]!r} {expected[:16]!r}: {' '.join(map(repr, best))}"[:100])
        print(f"  {sum(r['passed'] for r in results[-len(cases) :])} of {len(cases)} within the {top_k} likeliest")
    if flags.output:
        Path(flags.output).write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", "utf-8")


# ---- Command line ---------------------------------------------------------------------------------------------------
PRESETS = {  # --dim, --num_heads, --num_blocks, --context_size
    "tiny": (128, 4, 4, 128), "small": (256, 8, 6, 256), "medium": (512, 8, 12, 512), "large": (768, 12, 24, 1024),
    "gpt2": (768, 12, 12, 1024), "350m": (768, 12, 16, 2048),
}  # fmt: skip


def number(kind, least, most=math.inf):
    """An argparse type: an int or float from `least` to `most`, both included; neither infinity nor nan is one."""

    def convert(text):
        if least <= (value := kind(text)) <= most and value < math.inf:  # nan fails the first comparison
            return value
        limit = f" and at most {most}" if most < math.inf else ""
        raise argparse.ArgumentTypeError(f"must be at least {least}{limit}, not {text}")

    convert.__name__ = "whole number" if kind is int else "number"  # which argparse's message names
    return convert


class Parser(argparse.ArgumentParser):
    """One that ends with a line instead of its whole usage, and names the flag that was perhaps meant."""

    def error(self, message):
        """message: argparse's, whose third word may be a flag misspelt. Raises UsageError."""
        near = difflib.get_close_matches(message.split(" ")[2], self._option_string_actions, 1, 0.75)
        near += ["after a flag, in quotes"] * ("--" not in message)
        raise UsageError(f"{message} ({'? '.join([*near, '--help lists all flags'])})")


def make_parser():
    """The parser. Every default is written here; where it is None, the help says what it follows from."""
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "usage": "python main.py [flags]"}
    parser = Parser(**layout, description=__doc__.partition("\nThis file")[0], allow_abbrev=False)  # no short forms
    count, size, rate = number(int, 0, 2**31 - 1), number(int, 1, 2**31 - 1), number(float, 0)  # int32, as MLX's
    switch = {"action": argparse.BooleanOptionalAction, "default": False}  # --name and --no-name
    run = parser.add_argument_group("run").add_argument  # the title is a group in a --config file, too
    run("--dataset", default="ptb", choices=[name for name in CORPORA if name != "text"], help="corpus to train on")
    run("--text", nargs="+", metavar="PATH", help="train on your own UTF-8 files, folders and patterns instead")
    run("--valid_text", nargs="+", metavar="PATH", help="validate on these (default: a part of --text)")
    run("--test_text", nargs="+", metavar="PATH", help="test on these")
    run("--valid_fraction", type=number(float, 0.001, 0.5), default=0.1, help="share of --text for validation")
    run("--train_tokens", type=size, help="train on the first so many tokens (default: all)")
    run("--tokenizer", default="auto", choices=["auto", *TOKENIZERS], help="auto: what is usual for the corpus")
    run("--vocab_size", type=number(int, 257, 2**31 - 1), default=32000, help="of --tokenizer bpe")  # 257: bytes + END
    run("--save_dir", help="folder for checkpoints and corpora (default: a RAM disk with room, else ~/.cache)")
    run("--mirror", metavar="BASE", help="address or folder that holds <dataset>/<file>, instead of the usual hosts")
    run("--identifier", nargs="+", metavar="ID", help="checkpoint id or its beginning, run name, latest or best")
    run("--new_model", **switch, help="begin a new run even if one could be resumed")
    run("--num_iters", type=size, default=100000, help="steps to train in all")
    run("--max_minutes", type=number(float, 0), help="stop after so much training; evaluations and saves do not count")
    run("--config", metavar="FILE", help="YAML file of flags, flat or in the groups of this help; typed flags win")
    run("--preset", choices=list(PRESETS), help="dim, heads, blocks and context of a usual size")
    run("--gpu", **switch, help="compute on the GPU")
    run("--seed", type=count, default=42, help="of weights, batches, dropout and samples")
    model = parser.add_argument_group("model").add_argument
    model("--context_size", type=size, default=48, help="tokens a prediction can look back on")
    model("--num_blocks", type=number(int, 1, 2**12), default=4, help="transformer blocks")
    model("--dim", type=number(int, 1, 2**16), default=1024, help="model dimension")
    model("--num_heads", type=size, default=8, help="query heads")
    model("--num_kv_heads", type=size, help="key and value heads (default: num_heads)")
    model("--mlp", choices=list(ACTIVATIONS), default="relu2", help="feed-forward layer")
    model("--mlp_dim", type=number(int, 1, 2**18), help="its width (default: 4 dim; swiglu: 8/3 dim rounded up to 64)")
    model("--qk_norm", **switch, help="normalize queries and keys, with learned weights")
    model("--untie", **switch, help="an output layer of its own instead of the embeddings")
    model("--dropout", type=number(float, 0, 0.9), default=0.0, help="rate on embeddings and on what each block adds")
    training = parser.add_argument_group("training").add_argument
    training("--batch_size", type=number(int, 1, 2**20), default=32, help="windows computed at once")
    training("--grad_accumulation", type=size, default=1, help="batches to a step")
    training("--learning_rate", type=rate, default=3e-4, help="after warm-up")
    training("--min_lr", type=rate, help="where the schedule ends (default: a tenth of the learning rate)")
    training("--weight_decay", type=rate, default=1e-5, help="on matrices")
    training("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: Muon for the blocks' matrices")
    training("--lr_warmup", type=count, default=200, help="steps to reach the learning rate")
    training("--lr_schedule", choices=["constant", "cosine", "linear"], default="constant", help="after warm-up")
    training("--grad_clip", type=rate, default=1.0, help="largest gradient norm; 0: no limit")
    training("--dropout_final", type=number(float, 0, 0.9), help="--dropout moves by a line to this at the last step")
    training("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation, on a GPU")
    training("--checkpoint", **switch, help="gradient checkpointing: less memory, more time")
    training("--patience", type=size, help="stop after so many evaluations without a better one")
    reports = parser.add_argument_group("reports").add_argument
    reports("--steps_per_report", type=size, default=10, help="steps between two report lines")
    reports("--steps_per_eval", type=size, default=1000, help="steps between two evaluations")
    reports("--eval_tokens", type=count, default=100000, help="validation tokens scored in training; 0: all")
    reports("--steps_per_save", type=size, help="steps between two checkpoints (default: steps_per_eval)")
    reports("--eval_test", **switch, help="score the whole test split at the end")
    reports("--keep", type=size, default=3, help="newest checkpoints to keep, and the best")
    sampling = parser.add_argument_group("sampling").add_argument
    sampling("--inference", **switch, help="talk to a checkpoint")
    sampling("--prompt", metavar="TEXT", help="print what follows it")
    sampling("--prompts_file", metavar="FILE", help="continue each of its lines, many together; answers in JSON Lines")
    sampling("--output", metavar="FILE", help="file for answers, continued if it was begun (default: stdout)")
    sampling("--max_tokens", type=size, default=200, help="length of a continuation")
    sampling("--num_samples", type=size, default=1, help="continuations of each prompt; each has the next seed")
    sampling("--temperature", type=number(float, 0, 100), default=0.5, help="0: always the likeliest token")
    sampling("--top_k", type=count, default=50, help="draw from the k likeliest tokens; 0: all")
    sampling("--top_p", type=number(float, 0, 1), default=1.0, help="draw from the likeliest with so much probability")
    sampling("--min_p", type=number(float, 0, 1), default=0.0, help="and not below this share of the likeliest's")
    sampling("--repetition_penalty", type=number(float, 0.01, 100), default=1.0, help="makes tokens of the text rarer")
    sampling("--draft", metavar="ID", help="a smaller checkpoint that proposes tokens, for speed alone")
    reuse = parser.add_argument_group("reuse").add_argument
    reuse("--init_from", metavar="MODEL", help="begin with a checkpoint's weights or those of a Hugging Face folder")
    reuse("--lora_rank", type=size, help="train adapters of this rank only, with --init_from")
    reuse("--lora_alpha", type=number(float, 0), help="their scale, times the rank (default: twice the rank)")
    reuse("--teacher", metavar="MODEL", help="learn from its predictions, too: a checkpoint or a Hugging Face folder")
    reuse("--teacher_weight", type=number(float, 0, 1), default=0.5, help="share of the teacher in the loss")
    reuse("--teacher_temperature", type=number(float, 0.01, 100), default=2.0, help="softens both predictions")
    reuse("--quantize", type=int, choices=[4, 8], help="bits of a weight in sampling, --evaluate and --export")
    reuse("--export", metavar="DIR", help="write a checkpoint as a Hugging Face folder")
    tools = parser.add_argument_group("tools").add_argument
    tools("--evaluate", choices=["valid", "test"], help="score the whole split with a checkpoint")
    tools("--eval_stride", type=size, help="windows so many tokens apart, for a longer context (default: context_size)")
    tools("--benchmark", **switch, help="what the model to be trained weighs, costs and reaches on this machine")
    tools("--cases", metavar="FILE", help="YAML list of prompt and expected: their ranks, by checkpoint (--identifier)")
    tools("--plot", metavar="FILE", help="picture of the losses of all runs in the folder, or of --identifier")
    tools("--attention", metavar="FILE", help="picture of what each head looks at in --prompt")
    tools("--list", **switch, help="list the runs and checkpoints in the folder")
    return parser


PARSER = make_parser()
# {title: its flags}. The first two groups are argparse's own, of positional arguments and of --help.
GROUPS = {group.title: [flag.dest for flag in group._group_actions] for group in PARSER._action_groups[2:]}
DEFAULTS = vars(PARSER.parse_args([]))  # {flag: value}; the flags themselves lose theirs below
for flag in PARSER._actions[1:]:  # all but --help. From here on what PARSER returns is what was typed
    shown = f" (default: {flag.default})" if flag.default else ""
    flag.help = flag.help.removesuffix(" (default: %(default)s)") + shown  # which older BooleanOptionalActions append
    flag.default = argparse.SUPPRESS
# DATA: what load_dataset takes. SHAPING: typed otherwise, it means another run. INHERITED: what a resumed run keeps.
DATA = ["dataset", "text", "valid_text", "test_text", "valid_fraction", "train_tokens", "tokenizer", "vocab_size"]
SHAPING = [*DATA, "seed", "optimizer", *GROUPS["model"], "init_from", "lora_rank", "lora_alpha", "teacher"]
INHERITED = [*SHAPING, "num_iters", *GROUPS["training"], *GROUPS["reports"], "teacher_weight", "teacher_temperature"]

MODES = "inference prompt prompts_file evaluate export list cases plot benchmark new_model".split()
EXCLUSIVE = [("dataset", "text"), ("identifier", "new_model"), *itertools.combinations(MODES, 2)]
PARTNERS = {  # without one of which a flag would have no effect
    "valid_text": "text identifier", "test_text": "text identifier", "output": "prompts_file cases",
    "draft": "prompt inference", "attention": "prompt", "quantize": "prompt prompts_file inference evaluate export",
    "eval_stride": "evaluate",
}  # fmt: skip


def resolve(flags):
    """Replaces values that stand for others: `auto`, relative paths, and the defaults that depend on other flags."""
    absolute = lambda path: os.path.abspath(os.path.expanduser(path))  # a checkpoint keeps them, for any working folder
    for name in ("text", "valid_text", "test_text"):
        setattr(flags, name, getattr(flags, name) and list(map(absolute, getattr(flags, name))))
    for name in ("init_from", "teacher"):
        if getattr(flags, name) and os.path.isdir(path := absolute(getattr(flags, name))):  # else a checkpoint's name
            setattr(flags, name, path)
    flags.dataset = "text" if flags.text else flags.dataset
    flags.tokenizer = CORPORA[flags.dataset][0] if flags.tokenizer == "auto" else flags.tokenizer
    flags.num_kv_heads = flags.num_kv_heads or flags.num_heads
    # swiglu has three matrices where others have two: 8/3 dim, to a multiple of 64, keeps their size (Shazeer 2020).
    flags.mlp_dim = flags.mlp_dim or (-(-flags.dim * 8 // 192) * 64 if flags.mlp == "swiglu" else 4 * flags.dim)
    if flags.lora_rank and flags.lora_alpha is None:
        flags.lora_alpha = 2 * flags.lora_rank  # LoRA's scale, alpha / rank, is then 2
    return flags


def read_config(path, typed):
    """The flags in a YAML file as if they were typed, but no corpus where another is typed. Raises UsageError."""
    import yaml

    settings, arguments = {}, []
    with explained(f"--config {path} must be a YAML file of flags like dim: 8"):
        for name, value in yaml.safe_load(Path(path).expanduser().read_text("utf-8")).items():
            settings |= value if name in GROUPS and isinstance(value, dict) else {name: value}
        if unknown := sorted(settings.keys() - DEFAULTS.keys() | settings.keys() & {"config"}):  # no file in a file
            raise UsageError(f"no flag is named {', '.join(unknown[:9])} (--help lists all)")
        for name, value in settings.items():
            if isinstance(value, bool):  # a switch, which takes no value
                name, value = name if value else f"no-{name}", []
            if value is not None and {"dataset": "text"}.get(name, "dataset" * name.endswith("text")) not in typed:
                arguments += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
        return vars(PARSER.parse_args(arguments))  # with a typed flag's types, limits and choices


def choose_checkpoint(folder, flags, typed, needed):
    """The record of the checkpoint to go on from or, if `needed`, to use, its files verified; None for a new run.
    Without --identifier it is the one saved last that agrees with each shaping flag typed (not --seed if `needed`: that
    is the samples') and, in training, the dataset; if damaged, an older one of its run. Raises UsageError, RunError."""
    records = [] if flags.new_model else list_checkpoints(folder, warn=True)
    records = [record | {"flags": DEFAULTS | record["flags"]} for record in records]  # a flag may be younger
    wanted = {name: getattr(flags, name) for name in SHAPING if name in typed and not (needed and name == "seed")}
    if flags.identifier is not None:
        checkpoint = named_checkpoint(folder, records, flags.identifier)
        for name in wanted:
            if checkpoint["flags"][name] != wanted[name]:
                problem = f"--{name} {wanted[name]} contradicts --identifier, which has {checkpoint['flags'][name]}"
                raise UsageError(f"{problem}: leave --{name} out, or begin a new run with --new_model")
        return checkpoint
    wanted |= {} if needed else {"dataset": flags.dataset}  # even if not typed: its default decides
    candidates = [record for record in records if wanted.items() <= record["flags"].items()]
    for record in candidates:
        if record["run"] == candidates[0]["run"]:  # never silently go on with another run
            if not (damage := find_damage(folder, record["id"])):
                return record
            print(f"Passing over {describe(record)}: {damage}", file=sys.stderr)
    if candidates:
        raise RunError(f"no intact checkpoint of {candidates[0]['run']} is left: --new_model begins a new run")
    if records and not needed and not flags.benchmark:  # the return is None: a new run
        others = ", ".join(list(dict.fromkeys(record["run"] for record in records))[:5])
        tqdm.write(f"A new run; in {folder} are {others} (--list shows all, --identifier NAME goes on with one)")


def open_origins(folder, flags, typed, checkpoint):
    """The models that --init_from and --teacher name, by flag, and their tokenizer, which is to be the text's, too.
    Fills in the model flags that --init_from decides. Raises UsageError where a typed flag or the two contradict."""
    wanted = {flag: getattr(flags, flag) for flag in ("init_from", "teacher") if getattr(flags, flag)}
    if not wanted:
        return {}, {}
    if checkpoint:  # its record says which they were; --evaluate needs neither here
        used = {flag: open_used(folder, checkpoint, flag) for flag in checkpoint["uses"] if not flags.evaluate}
        return used, {"tokenizer": json.loads(read_texts(folder / f"{checkpoint['id']}.metadata")[1]["tokenizer"])}
    used = {flag: open_model(folder, name, f"--{flag}") for flag, name in wanted.items()}  # (model, tokenizer, id) each
    (first, (model, tokenizer, _)), *others = used.items()  # --init_from, where both are given
    if any(its.to_dict() != tokenizer.to_dict() for _, (_, its, _) in others):
        raise UsageError(f"--teacher {flags.teacher} has another tokenizer than --{first}: name one with the same")
    # --init_from decides the whole shape, --teacher only the tokenizer: both models have to predict the same ids.
    decided = {"tokenizer": tokenizer.kind} | (vars(model.config) if first == "init_from" else {})
    for name in sorted(decided.keys() & set(SHAPING) - {"vocab_size"}):  # that is what a new BPE aims at
        if name in typed and name != "context_size" and typed[name] != decided[name]:  # RoPE suits any
            contradiction = f"--{name} {typed[name]} contradicts --{first}, which has {decided[name]}"
            raise UsageError(f"{contradiction}: leave --{name} out")
        setattr(flags, name, typed.get(name, decided[name]))  # what is typed differs in context_size alone
    return used, {"tokenizer": tokenizer.to_dict()}


def read_line(argv):
    """What the command line asks for, {flag: value}: typed, in the file of --config, or meant by --preset. Raises
    UsageError where two flags exclude each other or one of PARTNERS stands alone."""
    typed = vars(PARSER.parse_args(argv))
    if "config" in typed:
        typed = read_config(typed["config"], typed) | typed  # the line wins over the file
    if "preset" in typed:  # weaker than the file and the line
        typed = dict(zip(("dim", "num_heads", "num_blocks", "context_size"), PRESETS[typed["preset"]])) | typed
    if typed.get("tokenizer") == "auto":
        del typed["tokenizer"]  # it asks for none
    asked = {name for name, value in typed.items() if value is not False}  # --no-x asks for nothing
    for pair in EXCLUSIVE:
        if asked.issuperset(pair):
            raise UsageError(f"--{pair[0]} and --{pair[1]} exclude each other: leave one out")
    for name, partners in PARTNERS.items():
        if name in asked and not asked.intersection(partners.split()):
            raise UsageError(f"--{name} goes with --{partners.replace(' ', ' or --')}: give that, too, or neither")
    if len(typed.get("identifier", [])) > 1 and not asked & {"cases", "plot"}:
        raise UsageError("--identifier takes one name; several go with --cases and --plot")
    return typed


def execute(argv):
    """Does what the command line says; returns the exit status: 0 or None done, 1 failed, 2 usage, 128 + signal."""
    try:
        typed, remedy = read_line(argv), "train a model first, or name its folder with --save_dir"
        names = typed.get("identifier", [])
        typed |= {"identifier": names[0]} if names else {}  # --cases and --plot take all `names`
        flags = resolve(argparse.Namespace(**DEFAULTS | typed))  # for a run that goes on, again below
        if flags.gpu and not mx.is_available(mx.gpu):
            raise UsageError("--gpu: MLX sees no GPU; leave it out, or install MLX for yours: pip install mlx[cuda13]")
        use_device(flags.gpu)
        talking = flags.inference or flags.prompt is not None or flags.prompts_file
        needed = talking or flags.evaluate or flags.export  # a checkpoint, whatever its corpus
        folder = open_folder(flags.save_dir, writing=not (needed or flags.list or flags.cases or flags.plot))
        if flags.cases or flags.plot:
            if not (records := list_checkpoints(folder, warn=True)):
                raise UsageError(f"no checkpoint is in {folder}: {remedy}")
            named = [named_checkpoint(folder, records, name) for name in names]
            if flags.plot:
                return plot_runs(folder, [record["run"] for record in named], flags.plot)
            return run_cases(folder, named or records, flags, typed.get("top_k") or 5)  # 50 is for sampling

        if flags.list:
            with locked(folder):  # so that none goes while it is listed
                return list_runs(folder)
        checkpoint = choose_checkpoint(folder, flags, typed, needed)
        if needed and not checkpoint:
            raise UsageError(f"no such checkpoint in {folder}: {remedy}")
        if flags.export:
            export_model(*load_model(folder, checkpoint), flags.export, flags.quantize)
            return print(describe(checkpoint), file=sys.stderr)
        if talking:
            return talk(folder, checkpoint, flags)

        # The rest needs the corpus: training, --evaluate, --benchmark. A checkpoint's flags stand in for the defaults.
        if checkpoint:
            old = checkpoint["flags"]
            for name in INHERITED:
                if name in typed and old.get(name) != getattr(flags, name):
                    tqdm.write(f"changed  --{name} from {old.get(name)} to {getattr(flags, name)}")
                    if name == "num_iters" and (old["lr_schedule"] != "constant" or old["dropout_final"] is not None):
                        tqdm.write("         which stretches the schedules of learning rate and dropout")
            flags = resolve(argparse.Namespace(**DEFAULTS | old | typed))
        if (least := flags.min_lr or 0) > flags.learning_rate:  # here, as either may come from the checkpoint
            raise UsageError(f"--min_lr {least} is above --learning_rate {flags.learning_rate}: give a lower one")
        for name, partner in {"lora_rank": "init_from", "lora_alpha": "lora_rank"}.items():  # PARTNERS sees typed flags
            if getattr(flags, name) and not getattr(flags, partner):
                raise UsageError(f"--{name} goes with --{partner}: give that, too, or neither")
        flags.save_dir = folder  # which open_folder may have chosen
        used, vocabulary = open_origins(folder, flags, typed, checkpoint)  # {}: the text's own tokenizer
        data = {name: getattr(flags, name) for name in DATA if name != "dataset"} | vocabulary
        dataset = load_dataset(flags.dataset, folder, **data, mirror=flags.mirror, say=tqdm.write)
        if checkpoint and checkpoint["tokens_sha256"] != dataset.sha256:
            problem = f"the training text of {checkpoint['run']} has changed"
            raise UsageError(f"{problem}: begin a run on it with --new_model, or name another --save_dir")
        if (flags.evaluate == "test" or flags.eval_test) and not dataset.test:
            raise UsageError(f"{dataset.name} has no test split: name files for it with --test_text")
        if flags.evaluate:
            (model, _), interrupts = load_model(folder, checkpoint), Interrupts()
            if (flags.eval_stride or 0) > (most := model.config.context_size):
                raise UsageError(f"--eval_stride {flags.eval_stride} would leave tokens out: at most {most}")
            print(describe(checkpoint), file=sys.stderr)
            for bits in filter(None, (32, flags.quantize)):
                if bits < 32:
                    quantize(model, bits, packed=flags.gpu and not LAUNCHED)  # other ranks' models are plain
                lead(interrupts, {}, model)  # to the other ranks; without `with` Ctrl+C ends it at once
                score_split(flags.evaluate, model, dataset, flags, interrupts)
            return interrupts.received and 128 + interrupts.received  # a signal to another rank voids the score
        if flags.benchmark:
            if LAUNCHED:
                raise UsageError("--benchmark measures one process: start it without mlx.launch")
            config = Config(**checkpoint["config"]) if checkpoint else make_config(flags, dataset.tokenizer.vocab_size)
            batches = Batches(dataset.train.tokens, flags.context_size, flags.batch_size, flags.seed)
            return run_benchmark(flags, config, batches)
        with Interrupts() as interrupts:  # from here on there is something to save
            return train(flags, dataset, checkpoint, used, interrupts)
    except (UsageError, RunError, OSError, ImportError) as error:  # RuntimeError: see main
        missing = isinstance(error, ImportError)  # a package that one function alone needs
        line = f"{error}{': pip install -r requirements.txt' * missing}"
        print(f"{PARSER.prog}: {' '.join(line.splitlines())}", file=sys.stderr)  # one line, however many the error has
        return 2 if missing or isinstance(error, UsageError) else 1


def main(argv=None):
    """The program; returns the exit status. Of several ranks the first does what the line says, the others follow."""
    try:
        if ranks().rank() > 0:
            use_device("--gpu" in sys.argv)  # rank 0, which alone may have read a --config, says it again
            return follow()
        status = execute(argv)
        broadcast(Interrupts(), order="end")  # whatever the status, or the others wait on
        return status or 0
    except RuntimeError as error:  # MLX raises it when a rank is gone
        if not LAUNCHED:
            raise  # there is no rank to lose, so the traceback is wanted
        print(f"{PARSER.prog}: {LOST.format(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.stdin = sys.stdin or open(os.devnull)  # None where it was closed from the start
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)  # not in main(), which tests call with their own
    sys.exit(main())
