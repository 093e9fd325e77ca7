"""Any step of a run, computed again: --identifier RUN@340 is the run's state after its step 340.

It is recomputed from the nearest earlier checkpoint, or from the seed. It only counts as the run's
own if the same steps, taken further, end in the SHA1 of the run's next checkpoint.
"""

import re
import shutil
import tempfile
from pathlib import Path

from datasets import UsageError, progress_bar, sync
from main import Inputs, SingleProcess, checkpoints_in, describe_changes, list_versions, make_run
from main import kept_model_flags, make_step, open_kept_models, open_newest, read_code
from main import reload_data, resolve_flags, sha1_of_code, train_step, write_checkpoint

FOLDER = "steps"  # in that of a run


def checkpoint_at(checkpoints, identifier):
    """The Checkpoint of RUN@STEP, or of latest@STEP; checkpoints: those of all runs, newest first.
    """
    name, _, step = identifier.rpartition("@")
    if name == "latest" and checkpoints:
        name = checkpoints[0].folder.name
    run_checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.folder.name == name]
    if not run_checkpoints or not re.fullmatch("[0-9]{1,12}", step):
        raise UsageError(f"{identifier} is not a run, @ and a step of it: see --list")
    step = int(step)
    folder = run_checkpoints[0].folder / FOLDER / f"{name}@{step}"
    computed = checkpoints_in(folder)  # before this
    for checkpoint in [*run_checkpoints, *computed]:
        if checkpoint.iteration == step:
            return checkpoint
    earlier = [checkpoint for checkpoint in run_checkpoints if checkpoint.iteration < step]
    later = [checkpoint for checkpoint in run_checkpoints if checkpoint.iteration > step]
    if not later:
        raise UsageError(
            f"{identifier}: no later checkpoint of {name} is left that could prove it; the last "
            f"one is of iteration {run_checkpoints[0].iteration:,}"
        )
    start = earlier[0] if earlier else None
    proof = later[-1]
    with tempfile.TemporaryDirectory(dir=run_checkpoints[0].folder) as temporary:
        copy = Path(temporary, folder.name)
        recompute(start, proof, step, copy)
        folder.parent.mkdir(exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # one that cannot be read any more
        copy.rename(folder)
    sync(folder.parent)
    [found] = checkpoints_in(folder)
    return found


def recompute(earlier, later, step, folder):
    """Computes the state after a step, between two checkpoints of a run, and saves it in `folder`.

    earlier: None stands for the run's first weights. Raises UsageError if it would not be this
    run's state, RunError.
    """
    what = f"step {step:,} of {later.folder.name}"
    flags = resolve_flags({}, later.flags)
    start = 0
    if earlier:
        start = earlier.iteration
    elif "branched_from" in later.parents or (flags.init_from and not flags.lora_rank):
        # A run keeps the model that it began with only if that is LoRA's base.
        raise UsageError(f"{what}: no earlier checkpoint is left, and no seed gives its first one")
    *_, segment = [segment for segment in later.segments if segment.iteration <= start]
    flags.num_iters = segment.num_iters  # schedules end there
    if segment.code_sha1 != sha1_of_code(read_code(vars(flags))):
        raise UsageError(f"{what} was computed by other code than this")
    changes = describe_changes(segment.versions, list_versions(flags, SingleProcess()))
    if changes:
        raise UsageError(f"{what} was computed with other versions: {changes}")

    folder.mkdir()
    for name in kept_model_flags(flags):
        shutil.copytree(later.folder / name, folder / name)
    run = open_run(folder, flags, earlier, later)
    step_fn = make_step(run.model, run.optimizer, flags, teacher=run.teacher)
    with progress_bar(total=later.iteration - start, unit="step", desc=what) as bar:
        while run.iteration < later.iteration:
            if run.iteration == step:
                run.evaluations = [
                    evaluation for evaluation in later.evaluations if evaluation.iteration <= step
                ]
                write_checkpoint(run)
            train_step(run, step_fn)
            bar.update()
    run.folder = folder.parent / "proof"
    run.folder.mkdir()
    write_checkpoint(run)
    if run.checkpoint_id != later.id:
        raise UsageError(
            f"{what} cannot be computed again: iteration {later.iteration:,} then is "
            f"{run.checkpoint_id[:12]}, and was {later.id[:12]}; flags, code or versions may have "
            "changed in between"
        )


def open_run(folder, flags, checkpoint, kin):
    """The run in the state of a checkpoint, or before its first step if that is None.

    kin: a checkpoint of the same run, with whose text and models it is trained.
    """
    contents = None
    if checkpoint:
        contents = open_newest([checkpoint], is_named=True)
    dataset = reload_data(flags, kin)
    models = open_kept_models(flags, kin)
    inputs = Inputs(flags, dataset, models, kin.parents, read_code(vars(flags)))
    return make_run(folder, inputs, contents)
