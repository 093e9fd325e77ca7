"""Runs: what their checkpoints record, and which one a command means; names, folders and locks.

<save_dir>/<run>/ holds one run: its checkpoints, log.csv, samples.jsonl, the code that trained it
(code-*/), the models that it reads at each start (init_from/, teacher/), and what RUN@STEP has
computed (steps/). All but steps/ is written only by the process that holds the folder's lock. Each
checkpoint is two safetensors files, which main.py writes and opens:

    <sha1>.safetensors  the weights (for LoRA, only the adapters), named by the SHA1 of its bytes
    <sha1>.metadata     the optimizer state, the order of batches, the tokenizer and, with
                        --average, the weights before averaging; its header holds a record (see
                        Checkpoint), with the SHA1 of these arrays, and the record's own SHA1

A checkpoint may be untrusted: its content is checked before use, and no link is followed.

Which run a command trains:

    no flag that identifies a run      the newest run, if there is one
    flags that identify a run          the run of these flags, texts, models and code
    --identifier                       the run that it names; but a branch, if it names an older
                                       checkpoint, or a training flag has another value
    --new_model, or no such run yet    a new run

A run's name is a hash of the flags that identify it, of the contents of its texts and models, and
of the checkpoint that a branch began from. Its folder is NAME or NAME.2, NAME.3, …
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple, get_args

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from support.cli import RunError, UsageError, explain_errors, one_line, say, shorten_list
from support import code
from support.code import describe_edit
from support.files import atomic_write, lock_file, open_no_follow, remove_leftovers, sha1_of_file
from support.files import sha1_of_text, sync
from support.flags import FLAGS, IDENTITY, INIT, RECORDED, check_values, get_values, nonempty

# ---- Records ------------------------------------------------------------------------------------

# Version of the .metadata format; increment it when another main.py could misread it.
FORMAT_VERSION = 8
SHA1_PATTERN = re.compile("[0-9a-f]{40}")
NO_CHECKPOINT = "no checkpoint in {} can be used: train a model first, or check --save_dir"
EVAL_WINDOWS = "evenly spread"  # which tokens of the validation text are scored in training


class DamagedError(RunError):
    """A checkpoint that is not what was saved."""


class Evaluation(NamedTuple):
    """The validation loss, the mean over `num_tokens` predicted tokens."""

    iteration: int
    loss: float  # in nats per token
    num_tokens: int
    bits_per_byte: float
    windows: str = "the first"  # which tokens these were: its run's Origin.eval_windows


@dataclasses.dataclass
class Segment:
    """A part of a run's steps, taken by the same code, in one environment, for one `num_iters`.

    Segments that differ only in where they begin are equal.
    """

    iteration: int = dataclasses.field(compare=False)  # its first step, counted from 0
    num_iters: int  # where the schedules of its learning rate and dropout end
    code: dict  # {path: hash} of its files, see hash_sources
    versions: dict  # of the environment, see device.list_versions


@dataclasses.dataclass
class Origin:
    """How a run began; it stays so when the run is resumed, and in its branches."""

    cores: int  # that it could use
    recipe: str | None  # the --config of its first command
    held_out: str  # how validation text is chosen, see datasets.HELD_OUT
    eval_windows: str = EVAL_WINDOWS  # this and the next one: see choose_eval_size
    eval_size: int = 0  # tokens that an evaluation in training scores; 0: not chosen yet
    trained_on: list = dataclasses.field(default_factory=list)  # see compare_texts
    seen: float = 0.0  # about the share of the validation text that its models were trained on


@dataclasses.dataclass(kw_only=True, eq=False)
class Progress:
    """What of a run's progress is compared and shown; main.Run has more."""

    iteration: int = 0  # steps done
    seconds: float = 0.0  # of training, without the first step after each start, which compiles
    evaluations: list = dataclasses.field(default_factory=list)  # of type Evaluation
    starts: list = dataclasses.field(default_factory=list)  # iterations where training was begun

    @property
    def evaluation(self):
        """The Evaluation at the current iteration, or None."""
        for evaluation in self.evaluations:
            if evaluation.iteration == self.iteration:
                return evaluation
        return None


@dataclasses.dataclass(kw_only=True, eq=False)  # a copy in another folder is another checkpoint
class Checkpoint(Progress):
    """A checkpoint as its record describes it.

    Give a new field a default, as older checkpoints lack it.
    """

    id: str  # the SHA1 of its .safetensors file, which names both files
    run_name: str  # of the run that saved it; a folder of another name holds a copy
    state_sha1: str  # of the arrays in its .metadata, see sha1_of_arrays
    saved_at: float  # in seconds since 1970; increases with each save of its run
    flags: dict  # {name: value} of the flags in RECORDED
    config: dict  # of the model: the fields of main.Config
    tokens_sha256: dict  # the Dataset.sha256 of its run
    parents: dict  # {"init_from", "teacher", "branched_from": id of that model or checkpoint}
    origin: Origin
    segments: list  # of type Segment
    counters: dict  # further numbers that main.Run.restore needs
    format_version: int
    is_interim: bool = False  # saved because of --minutes_per_save: goes when a newer one is good

    folder: Path = dataclasses.field(init=False)  # of its run; not in the record

    @property
    def is_copy(self):
        """Whether its files were copied from the folder of another run."""
        return self.run_name != self.folder.name

    @property
    def weights_path(self):
        return self.folder / f"{self.id}.safetensors"

    @property
    def metadata_path(self):
        return self.folder / f"{self.id}.metadata"

    def __str__(self):
        return f"{self.folder.name}, iteration {self.iteration:,}, checkpoint {self.id[:12]}"


def comparable_evaluations(evaluations):
    """The evaluations on the same tokens as the last one."""
    scored = [(each.num_tokens, each.windows) for each in evaluations]
    return [each for each, place in zip(evaluations, scored) if place == scored[-1]]


def choose_eval_size(run, checkpoint):
    """Chooses how many tokens the evaluations of a main.Run score: whole windows, or all.

    No more than are trained on between evaluations, so that short trials need not wait. It stays so
    when the run is resumed, unless --eval_tokens has another value. checkpoint: the one that is
    resumed, or None.
    """
    flags = run.flags
    is_same = not checkpoint or checkpoint.flags["eval_tokens"] == flags.eval_tokens
    if not flags.steps_per_eval or (run.origin.eval_size and is_same):
        return
    num_targets = len(run.dataset.valid.tokens) - 1
    interval = min(flags.steps_per_eval, flags.num_iters)
    size = min(flags.eval_tokens, interval * run.batches.rows_per_step * flags.context_size)
    whole = max(1, size // flags.context_size) * flags.context_size
    run.origin.eval_size = min(num_targets, whole) if size else num_targets
    run.origin.eval_windows = EVAL_WINDOWS


def best_evaluation(evaluations):
    """The comparable evaluation with the lowest loss, the first of equal ones; None without any."""
    evaluations = comparable_evaluations(evaluations)
    return min(evaluations, key=lambda evaluation: evaluation.loss, default=None)


def evaluations_since_best(evaluations, interval):
    """How many evaluations in a row brought no new best.

    Only those at multiples of the interval, --steps_per_eval, count, so that an extended run, which
    has one more at its old end, stops where a run of the new length would.
    """
    losses = []
    for evaluation in comparable_evaluations(evaluations):
        if evaluation.iteration % (interval or math.inf) == 0:
            losses.append(evaluation.loss)
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def read_checkpoint(metadata_path):
    """The Checkpoint that a .metadata file describes.

    Raises an exception of any type if it is malformed: the file is untrusted.
    """
    with open(metadata_path, "rb", opener=open_no_follow) as file:
        length = int.from_bytes(file.read(8), "little")  # of the JSON header that follows
        # The length may be junk. MLX itself reads no header of 100 MB.
        header = json.loads(file.read(min(length, 10**8)))["__metadata__"]
    if sha1_of_text(header["record"]) != header["sha1"]:
        raise ValueError("damaged header")
    record = json.loads(header["record"])
    version = record["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"its format is version {version}: use the commit that wrote it")
    record["origin"] = from_untrusted(Origin, record["origin"])
    origin = record["origin"]
    are_hashes = all(type(each) is int and 0 <= each < 2**64 for each in origin.trained_on)
    if not are_hashes or not 1 <= origin.cores <= 4096:
        raise ValueError("its origin is malformed")
    record["segments"] = [from_untrusted(Segment, segment) for segment in record["segments"]]
    checkpoint = from_untrusted(Checkpoint, record)
    checkpoint.folder = metadata_path.parent
    checkpoint.evaluations = [Evaluation(*evaluation) for evaluation in checkpoint.evaluations]
    for evaluation in checkpoint.evaluations:
        has_types = [*map(type, evaluation)] == [int, float, int, float, str]
        if not has_types or not math.isfinite(evaluation.loss):
            raise ValueError("its evaluations are malformed")
    if not checkpoint.segments or not all(map(SHA1_PATTERN.fullmatch, checkpoint.parents.values())):
        raise ValueError("its history is malformed")
    if not {*map(type, checkpoint.starts)} <= {int}:
        raise ValueError("its starts are malformed")
    for name, value in checkpoint.counters.items():
        check_range(name, value)
    # A flag that was added after the checkpoint was saved, or was None, gets its default.
    flags = {name: value for name, value in checkpoint.flags.items() if value is not None}
    check_values(flags)
    defaults = FLAGS.defaults
    checkpoint.flags = {name: defaults[name] for name in FLAGS.names(RECORDED)} | flags
    if checkpoint.id != metadata_path.stem:
        raise ValueError(f"it belongs to {checkpoint.id[:12]}")
    return checkpoint


def from_untrusted(cls, values):
    """An object of a dataclass, made of an untrusted {field: value}.

    Raises ValueError or TypeError if a field without a default is missing, or one is of another
    type or out of range.
    """
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"the code that saved it had {name:.50}: use that")
        expected = types[name]
        if type(value) is not expected and type(value) not in get_args(expected):
            raise ValueError(f"its {name:.50} is of another type")
        check_range(name, value)
    return cls(**values)


def check_range(name, value):
    """Raises ValueError for an untrusted number that no run would record."""
    least = 0 if type(value) is int else -1e15  # by rounding, a loss may be negative
    if type(value) in (int, float) and not least <= value < 1e15:
        raise ValueError(f"its {name} is out of range")


def compare_texts(origin, dataset, models):
    """Records what text a new run trains on, and whether it is validated on that of its models.

    By the smallest hashes of all windows of 64 tokens: a text that holds much of another one has
    many of these. models: the main.LoadedModels with which it begins or from which it learns.
    """
    if dataset.name != "text":
        return
    trained_on = {*hash_windows(dataset.train.tokens)[:NUM_HASHES].tolist()}
    for loaded in models:
        path = loaded.files.get(f"{loaded.id}.metadata")
        if path is None:  # it is no run of ours
            continue
        known = read_checkpoint(path).origin.trained_on
        if known:
            was_seen = np.isin(hash_windows(dataset.valid.tokens, known[-1]), known)
            if was_seen.sum() > len(was_seen) / 20:
                origin.seen = float(was_seen.mean())
            trained_on |= {*known}
    origin.trained_on = sorted(trained_on)[:NUM_HASHES]


NUM_HASHES = 200  # some 4 KB in a record
MAX_HASHED = 1 << 26  # tokens


def hash_windows(tokens, limit=2**64 - 1):
    """The hashes up to a limit of all windows of 64 tokens [N], sorted, each once: uint64."""
    hashes = tokens[:MAX_HASHED].astype(np.uint64)
    for span in (1, 2, 4, 8, 16, 32):
        hashes = hashes[:-span] * 0x9E3779B97F4A7C15 + hashes[span:]
        hashes ^= hashes >> 29
    return np.unique(hashes[hashes <= limit])


# ---- Arrays -------------------------------------------------------------------------------------


def read_arrays(checkpoint):
    """The weights and the state of a checkpoint, {name: array} each.

    Raises ValueError, or what MLX raises, if either file is not what was saved.
    """
    if sha1_of_file(checkpoint.weights_path) != checkpoint.id:
        raise ValueError("its .safetensors has another SHA1")
    weights = load_arrays(checkpoint.weights_path)
    state = load_arrays(checkpoint.metadata_path)
    if sha1_of_arrays(state) != checkpoint.state_sha1:
        raise ValueError("its .metadata has other arrays")
    return weights, state


def check_arrays(actual, expected):
    """Raises ValueError unless two trees hold arrays of the same names, shapes and types."""

    def specs(tree):
        return {name: (array.shape, array.dtype) for name, array in tree_flatten(tree)}

    if specs(actual) != specs(expected):
        raise ValueError("its arrays are those of another model")


def sha1_of_arrays(arrays):
    """The SHA1 of arrays, {name: array}: of their names, shapes, types and bytes."""
    digest = hashlib.sha1()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(memoryview(array))
    return digest.hexdigest()


def load_arrays(path):
    """The arrays of a safetensors file, {name: array}; MLX reads them when they are evaluated.

    Raises ValueError, or what MLX raises, if the file is malformed.
    """
    arrays = mx.load(str(path), format="safetensors")
    if sum(array.nbytes for array in arrays.values()) > path.stat().st_size:
        # With arrays that overlap, a small file could claim more memory than there is.
        raise ValueError("it is truncated, or its arrays overlap")
    return arrays


# ---- Finding checkpoints ------------------------------------------------------------------------


def list_checkpoints(save_dir, warn=False):
    """The checkpoints of all runs in `save_dir`, most recently saved first.

    Unreadable ones are skipped, with a line on stderr if `warn`. Raises UsageError if
    `save_dir` is not a folder, or is the folder of a run.
    """
    checkpoints = []
    for folder in list_run_folders(save_dir):
        checkpoints += checkpoints_in(folder, warn)
    return newest_first(checkpoints)


def list_run_folders(save_dir):
    """The folders in `save_dir` that may hold a run; see list_checkpoints."""
    problem = f"--save_dir {save_dir} holds no runs: train a model first, or name their folder"
    with explain_errors(problem, OSError):
        paths = list(save_dir.iterdir())
    folders = []
    for path in paths:
        if path.suffix == ".metadata" and SHA1_PATTERN.fullmatch(path.stem):
            raise UsageError(
                f"--save_dir {save_dir} is the folder of a run: name its parent folder"
            )
        # Unprintable names might control a terminal.
        if path.is_dir() and not path.is_symlink() and path.name.isprintable():
            folders.append(path)
    return folders


def checkpoints_in(folder, warn=False):
    """The checkpoints of one run, most recently saved first; see list_checkpoints."""
    checkpoints = []
    for path in folder.glob("[0-9a-f]" * 40 + ".safetensors"):  # a SHA1
        try:
            checkpoints.append(read_checkpoint(path.with_suffix(".metadata")))
        except Exception as error:  # an untrusted file can raise any
            if warn:
                say(f"Skipping {folder.name}, {path.stem[:12]}: {one_line(error)}", sys.stderr)
    return newest_first(checkpoints)


def newest_first(checkpoints):
    """Sorts checkpoints by the time of their save; copies count as older than all others."""
    return sorted(checkpoints, key=lambda c: (not c.is_copy, c.saved_at, c.iteration), reverse=True)


def best_checkpoint(checkpoints):
    """The checkpoint of the best evaluation, else the newest one; None if there are none.

    checkpoints: newest first.
    """
    evaluated = {}
    for checkpoint in reversed(checkpoints):
        if checkpoint.evaluation:
            evaluated[checkpoint.evaluation] = checkpoint
    newest = next(iter(checkpoints), None)
    return evaluated.get(best_evaluation([*evaluated]), newest)


def find_checkpoint(save_dir, checkpoints, name, flag_name="identifier"):
    """Finds the checkpoint that a flag names, among those in --save_dir (newest first).

    name: an id or its beginning, the file of that name, a run's name (its newest checkpoint),
    "latest", or "best" (of the run saved last). Raises UsageError if it names none, several, or one
    outside --save_dir.
    """
    path = Path(name)
    if not checkpoints and flag_name == "identifier" and not os.path.exists(path):
        raise UsageError(NO_CHECKPOINT.format(save_dir))
    if len(path.parts) > 1 and os.path.exists(path):
        if save_dir.resolve() not in path.resolve().parents:
            remedy = "copy the run there, or name the folder of its runs by --save_dir"
            if flag_name != "identifier":
                remedy += "; a Hugging Face model's folder has a config.json"
            raise UsageError(f"--{flag_name} {name} lies outside --save_dir {save_dir}: {remedy}")
        if path.is_file():  # in another folder, a copy may have this id
            checkpoints = checkpoints_in(path.parent)
    name = path.name.removesuffix(".safetensors")
    runs = [checkpoint.folder.name for checkpoint in checkpoints]
    if name == "latest":
        matches = checkpoints[:1]
    elif name == "best" and checkpoints:
        matches = [best_checkpoint(checkpoints_in(checkpoints[0].folder))]
    elif name in runs:
        matches = [checkpoints[runs.index(name)]]
    else:
        matches = checkpoints_of_id(checkpoints, name)
    if len(matches) == 1:
        return matches[0]
    names = shorten_list([*dict.fromkeys(runs)]) or "none"
    hint = ""
    if flag_name in ("init_from", "teacher"):
        hint = "; if a run's model is gone, resume the run with --identifier RUN"
    raise UsageError(
        f"--{flag_name} {name!r} matches {len(matches) or 'no'} checkpoints in {save_dir}, "
        f"which has these runs: {names} (see --list){hint}"
    )


def checkpoints_of_id(checkpoints, prefix):
    """The checkpoints whose ids begin with `prefix`, one for each id.

    Copies, and branches before their first step, have the same id as their origin. Among these, the
    oldest run that trained it counts.
    """

    def by_origin(checkpoint):
        is_parents = checkpoint.id == checkpoint.parents.get("branched_from")
        return not checkpoint.is_copy, not is_parents

    found = {}
    for checkpoint in sorted(checkpoints, key=by_origin):  # the last, oldest one of an id stays
        if prefix and checkpoint.id.startswith(prefix):
            found[checkpoint.id] = checkpoint
    return list(found.values())


# ---- The run of a command -----------------------------------------------------------------------

# A run's name depends on what these paths contain, not on where they lie.
PATH_FLAGS = ["text", "valid_text", "tokenizer", "init_from", "teacher"]
MAX_LOST_SECONDS = 600  # of training that a command may leave behind without being told to


def choose_checkpoint(flags, find):
    """The Checkpoint that a command goes on from: that of --identifier or, by default, the newest.

    None if the command describes its run by flags, has --new_model, or there is no checkpoint.
    find(flags, name): see main.find_checkpoint.
    """
    if flags.identifier:
        if flags.new_model:
            raise UsageError("--identifier resumes a run, --new_model starts one: use only one")
        return find(flags, flags.identifier)
    if flags.new_model or {*FLAGS.names(IDENTITY)} & {*flags.explicit}:
        # Refuses the folder of a run, before a text is written there.
        list_run_folders(flags.save_dir)
        return None
    return next(iter(list_checkpoints(flags.save_dir, warn=True)), None)


def refuse_conflict(flags, values, owner):
    """Raises UsageError if an explicit flag in INIT differs from `values`, those of `owner`.

    Texts and tokenizer files are compared by content, in main.reload_data.
    """
    for name in FLAGS.names(INIT):
        if name not in flags.explicit or name not in values:
            continue
        value = values[name]
        if name in ("text", "valid_text") or (name == "tokenizer" and os.sep in str(value)):
            continue
        if getattr(flags, name) != value:
            reason = "was made without it" if value is None else f"has {value}"
            raise UsageError(
                f"--{name} {getattr(flags, name)} contradicts {owner}, which {reason}: "
                f"leave --{name} out, or name another run or model"
            )


def continues_run(flags, checkpoint):
    """Whether a command continues its checkpoint's run, instead of beginning a branch.

    True if the checkpoint is its run's newest, and no training flag has another value. One in
    steps/, computed by RUN@STEP, always begins a branch.
    """
    if not checkpoint.folder.parent.samefile(flags.save_dir):
        return False
    newest_ids = [newest.id for newest in checkpoints_in(checkpoint.folder)[:1]]
    has_same_flags = get_values(flags, FLAGS["training"]).items() <= checkpoint.flags.items()
    return has_same_flags and newest_ids == [checkpoint.id]


def run_identity(flag_values, sha256, parents):
    """What a run's name is made of, {name: value}: texts and models by content, not by path.

    flag_values: {name: value}; sha256: see datasets.Dataset; parents: see Checkpoint.
    """
    names = [name for name in FLAGS.names(IDENTITY) if name not in PATH_FLAGS]
    identity = {name: flag_values[name] for name in names} | sha256 | parents
    for name in ("init_from", "teacher"):
        # The word counts, not the id: "latest" will soon mean this very run.
        if str(flag_values[name]).partition("@")[0] in ("latest", "best"):
            identity[name] = flag_values[name]
    return identity


def run_name(identity):
    """The name of the run of this identity: <dataset>-<8 hexadecimal digits>.

    Defaults are left out: otherwise, adding a flag to the program would rename all runs.
    """
    defaults = FLAGS.defaults
    changed = {name: value for name, value in identity.items() if value != defaults.get(name)}
    return f"{identity['dataset']}-{sha1_of_text(json.dumps(changed, sort_keys=True))[:8]}"


def find_folder(inputs, chosen):
    """The folder of the run that has these main.Inputs, which may be a new one.

    chosen: the checkpoint from which the command goes on, or None if its flags describe the run. Of
    NAME, NAME.2, …, the folder is that of the run that the same code saved last (with --identifier,
    any code). Without such a run, it is the first that is free: it does not exist, or has no
    checkpoint. Returns a line, too, or None, about a run by other code that is left behind; raises
    UsageError if that is unfinished and has more than MAX_LOST_SECONDS of training.
    """
    flags = inputs.flags
    if chosen and continues_run(flags, chosen):
        return chosen.folder, None
    if chosen:  # the command begins a branch, or resumes one
        inputs.parents["branched_from"] = chosen.id
    identity = run_identity(vars(flags), inputs.dataset.sha256, inputs.parents)
    name = run_name(identity)
    runs = {}  # {folder: its checkpoints, newest first}
    if not flags.new_model:
        for folder in list_run_folders(flags.save_dir):
            if re.fullmatch(rf"{re.escape(name)}(\.\d+)?", folder.name):
                runs[folder] = checkpoints_in(folder)
    newest_checkpoints = [checkpoints[0] for checkpoints in runs.values() if checkpoints]
    others = []  # of other code, newest first
    for checkpoint in newest_first(newest_checkpoints):
        if run_identity(checkpoint.flags, checkpoint.tokens_sha256, checkpoint.parents) != identity:
            say(f"Ignoring {checkpoint.folder.name}: its flags do not match its name.")
        elif flags.identifier or not describe_edit(checkpoint, inputs.code):
            return checkpoint.folder, None
        else:
            others.append(checkpoint)
    line = None
    if others:
        line = describe_other(flags, others[0], describe_edit(others[0], inputs.code))
    folder = flags.save_dir / name
    for count in itertools.count(2):
        # In a folder without a checkpoint, the same command was perhaps stopped before it saved.
        if runs.get(folder) == [] or not os.path.lexists(folder):
            return folder, line
        folder = flags.save_dir / f"{name}.{count}"


def describe_other(flags, other, edit):
    """A line about the newest run by other code, beside which a new run begins; see find_folder."""
    name = other.folder.name
    num_iters = flags.explicit.get("num_iters", other.flags["num_iters"])
    resume = resume_command(flags, name)
    if num_iters != other.flags["num_iters"]:
        resume += f" --num_iters {num_iters}"
    if other.iteration < num_iters and other.seconds > MAX_LOST_SECONDS:
        raise UsageError(
            f"the code was edited since {name} reached iteration {other.iteration:,} of "
            f"{num_iters:,}, after {other.seconds / 60:.0f} minutes of training ({edit}): continue "
            f"it with this code by {resume}, or add --new_model to begin a new run"
        )
    return (
        f"{name}, at iteration {other.iteration:,} of {other.flags['num_iters']:,}, was trained by "
        f"other code ({edit}); to continue it with this code: {resume}"
    )


def resume_command(flags, name=None):
    """The command that resumes a run or a checkpoint, or the newest run, in the same folders."""
    parts = ["python", code.main_file]
    if name:
        parts += ["--identifier", name]
    for folder in ("save_dir", "data_dir"):
        if folder in flags.explicit:
            parts += [f"--{folder}", flags.explicit[folder]]
    if flags.gpu:
        parts.append("--gpu")
    return shlex.join(map(str, parts))


def has_changed(run, checkpoint):
    """Whether a run has begun as a branch of this checkpoint, or with new flags before its end."""
    if checkpoint.folder != run.folder:
        return True
    has_new_flags = get_values(run.flags, FLAGS.names(RECORDED)) != checkpoint.flags
    return has_new_flags and run.iteration < run.flags.num_iters


@contextlib.contextmanager
def locked_folder(folder):
    """Holds the lock of a run's folder, which is made if it is missing.

    Raises UsageError if another process holds it. The lock ends with the process, however that
    ends. If nothing was written there, the folder is deleted.
    """
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock_file(descriptor, wait=False)
        except BlockingIOError:
            raise UsageError(
                f"{folder.name} is being trained by another process: wait for it, or start another "
                "run with --new_model"
            ) from None
        try:
            yield
        finally:  # only the holder of the lock may delete it
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
    finally:
        os.close(descriptor)


def prune_checkpoints(run):
    """Deletes old checkpoints of a run, and leftovers of killed saves in its folder.

    The newest --keep checkpoints, the newest interim one if it is newer, and the best one stay.
    """
    with contextlib.suppress(OSError):
        checkpoints = checkpoints_in(run.folder)  # newest first
        # The best of this run's history: a damaged checkpoint that resume skipped does not count.
        history = [
            checkpoint for checkpoint in checkpoints if checkpoint.evaluation in run.evaluations
        ]
        lasting = [checkpoint for checkpoint in checkpoints if not checkpoint.is_interim]
        kept = [*checkpoints[:1], *lasting[: run.flags.keep], best_checkpoint(history)]
        for checkpoint in checkpoints:
            if checkpoint not in kept and checkpoint.id != run.checkpoint_id:
                checkpoint.weights_path.unlink(missing_ok=True)
        remove_leftovers(run.folder)
        # A .metadata file without its .safetensors is not a checkpoint.
        for path in run.folder.glob("*.metadata"):
            if not os.path.lexists(path.with_suffix(".safetensors")):
                path.unlink()


# ---- Models that a run begins with or learns from -----------------------------------------------
# Those that it has to read at each start, LoRA's base and a teacher, are part of its folder, in
# init_from/ and teacher/, so that they stay when the originals are deleted, moved or replaced.


def model_name(text):
    """A flag's type: a model's name, or its address on Hugging Face's hub."""
    return nonempty(text).removeprefix("https://huggingface.co/")


def is_hugging_face(name):
    """Whether a model's name is that of a Hugging Face folder or model, not of a checkpoint."""
    # `resolve_flags` has made the path of a model folder absolute; other folders are of runs.
    return "/" in name and (is_model_folder(name) or not os.path.isdir(name))


def is_model_folder(path):
    """Whether this is a folder with a Hugging Face model, or with an adapter of one."""
    names = ("config.json", "adapter_config.json")
    return any(os.path.isfile(os.path.join(path, name)) for name in names)


MAX_IMPORTED_CONTEXT = 1024  # of a Hugging Face model, unless --context_size is given


def flags_from_pretrained(models, flags):
    """The flags of a new run that its models determine, {flag: value}.

    Each model determines the tokenizer, as all have to predict the same ids; --init_from determines
    FLAGS["model"], except for the context. Raises UsageError if an explicit flag contradicts a
    model, or one model the other.
    """
    tokenizer, *other_tokenizers = [loaded.tokenizer for loaded in models.values()]
    for other_tokenizer in other_tokenizers:
        if other_tokenizer.to_dict() != tokenizer.to_dict():
            raise UsageError(
                "--teacher has another tokenizer than --init_from: use a teacher with the same"
            )
    values = {"tokenizer": tokenizer.kind, "context_size": flags.context_size}
    if "init_from" in models:
        config = models["init_from"].model.config
        values |= get_values(config, FLAGS["model"])
        if "context_size" in flags.explicit:
            values["context_size"] = flags.context_size
        elif is_hugging_face(flags.init_from):
            values["context_size"] = min(config.context_size, MAX_IMPORTED_CONTEXT)
    refuse_conflict(flags, values, "--init_from" if flags.init_from else "--teacher")
    for name, loaded in models.items():
        limit = loaded.model.config.context_size  # perhaps that of a sliding window
        if is_hugging_face(getattr(flags, name)) and values["context_size"] > limit:
            raise UsageError(f"--{name} reads at most {limit} tokens: give --context_size {limit}")
    return values


def kept_model_flags(flags):
    """The flags whose models a run keeps in its folder: of a teacher, and of LoRA's base."""
    names = []
    if flags.teacher:
        names.append("teacher")
    if flags.lora_rank:
        names.append("init_from")
    return names


def keep_model(folder, files):
    """Makes a model's files, {name: path}, part of a new run, in a folder of their own."""
    if os.path.lexists(folder):  # a start that was killed has left it
        shutil.rmtree(folder)
    fault = f"the model for {folder.name}/ was deleted meanwhile: repeat the command"
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with explain_errors(fault, FileNotFoundError):  # its run may have pruned it
            keep_file(path.resolve(), target)
        sync(target.parent)


def keep_file(path, target):
    """Links a file that is named by its hash, which nobody changes; copies any other."""
    if re.fullmatch("[0-9a-f]{40,64}", path.stem):  # a checkpoint, or in the cache of the hub
        with contextlib.suppress(OSError):  # another file system
            os.link(path, target)
            return
    with atomic_write(target) as file, open(path, "rb") as original:
        shutil.copyfileobj(original, file)


def kept_base_files(checkpoint):
    """The files of the base of a LoRA run, {path from the run's folder: path}."""
    files = {}
    for path in (checkpoint.folder / "init_from").rglob("*"):
        if path.is_file() and not path.is_symlink():  # no link of a stranger's is followed
            files[str(path.relative_to(checkpoint.folder))] = path
    return files
