"""Any step of a run, computed again: --identifier RUN@340 is the run's state after its step 340.

It is recomputed from the nearest earlier checkpoint, or from the seed. It only counts as the run's
own if the same steps, taken further, end in the SHA1 of the run's next checkpoint.
"""

import re
import shutil

from main import fast, load_inputs, make_run, make_step, open_newest, train_step, write_checkpoint
from support.cli import UsageError, progress_bar
from support.code import hash_sources, what_counts
from support.device import ALONE, list_versions
from support.files import hold_lock, sync
from support.machine import use_cores
from support.reports import code_of, describe_changes
from support.runs import checkpoints_in, kept_model_flags
from extras.common import flags_of_run


def checkpoint_at(flags, checkpoints, identifier):
    """The Checkpoint of RUN@STEP, or of latest@STEP.

    flags: the command's; checkpoints: those of all runs, newest first.
    """
    name, _, step = identifier.rpartition("@")
    if name == "latest" and checkpoints:
        name = checkpoints[0].folder.name
    run_checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint.folder.name == name]
    if not run_checkpoints or not re.fullmatch("[0-9]{1,12}", step):
        raise UsageError(f"{identifier} is not a run, @ and a step of it: see --list")
    step = int(step)
    newest = run_checkpoints[0]
    ancestors = [checkpoint for checkpoint in run_checkpoints if is_ancestor(checkpoint, newest)]
    earlier = [checkpoint for checkpoint in ancestors if checkpoint.iteration < step]
    later = [checkpoint for checkpoint in ancestors if checkpoint.iteration > step]
    folder = newest.folder / "steps" / f"{name}@{step}"
    for checkpoint in [*ancestors, *computed_before(folder, newest)]:
        if checkpoint.iteration == step:
            return checkpoint
    if not later:
        raise UsageError(
            f"{identifier}: no later checkpoint of {name} is left that could prove it; the last "
            f"one is of iteration {newest.iteration:,}"
        )
    start, *_ = [*earlier, None]
    unfinished = folder.parent / "unfinished"
    with hold_lock(folder.parent):
        if not computed_before(folder, newest):  # by another command, meanwhile
            shutil.rmtree(unfinished, ignore_errors=True)  # of a command that was killed
            unfinished.mkdir()
            try:
                recompute(flags, start, later[-1], step, unfinished / folder.name)
                shutil.rmtree(folder, ignore_errors=True)  # one that cannot be used any more
                (unfinished / folder.name).rename(folder)
            finally:
                shutil.rmtree(unfinished)
            sync(folder.parent)
        return checkpoints_in(folder)[0]


def computed_before(folder, newest):
    """The checkpoint in the folder of a step, if it was computed: a list of at most one."""
    return [checkpoint for checkpoint in checkpoints_in(folder) if is_ancestor(checkpoint, newest)]


def is_ancestor(checkpoint, newest):
    """Whether a run's newest checkpoint descends from this one, or is it.

    A run that has passed over a damaged checkpoint may have gone on with other flags or code.
    """
    histories = []
    for segments in (checkpoint.segments, newest.segments):
        histories.append([part for part in segments if part.iteration < checkpoint.iteration])
    return histories[0] == histories[1]


def recompute(command_flags, earlier, later, step, folder):
    """Computes the state after a step, between two checkpoints of a run, and saves it in `folder`.

    earlier: None stands for the run's first weights. Raises UsageError if it would not be this
    run's state, RunError.
    """
    what = f"step {step:,} of {later.folder.name}"
    flags = flags_of_run(command_flags, later)
    # A run keeps the model that it began with only if that is LoRA's base.
    has_lost_base = flags.init_from and not flags.lora_rank
    if not earlier and ("branched_from" in later.parents or has_lost_base):
        raise UsageError(f"{what}: no earlier checkpoint is left, and no seed gives its first one")
    run = rewind(what, flags, earlier, later)
    folder.mkdir()
    for name in kept_model_flags(flags):
        shutil.copytree(later.folder / name, folder / name)
    run.folder = folder
    step_fn = make_step(run.model, run.optimizer, flags, teacher=run.teacher)
    with progress_bar(total=later.iteration - run.iteration, unit="step", desc=what) as bar:
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


def rewind(what, flags, earlier, later):
    """The run of these flags at the checkpoint `earlier`, as it then went on to `later`.

    earlier: None stands for the run's first weights. Raises UsageError, which begins with `what`,
    if other code or versions than these have taken the next step.
    """
    iteration = earlier.iteration if earlier else 0
    # Not always the last one: a run that is resumed with other flags is saved before a step.
    *_, segment = [part for part in later.segments if part.iteration <= iteration]
    flags.num_iters = segment.num_iters  # schedules end there
    if what_counts(segment.code) != what_counts(hash_sources(code_of(later))):
        raise UsageError(f"{what} was computed by other code than this")
    use_cores(later.origin.cores)
    versions = list_versions(flags, ALONE, fast)
    # Not the hash of support/: that the step is the run's is proved by its SHA1.
    changes = describe_changes({name: segment.versions.get(name) for name in versions}, versions)
    if changes:
        raise UsageError(f"{what} was computed with other versions: {changes}")
    return rebuild_run(flags, earlier, later)


def rebuild_run(flags, checkpoint, sibling):
    """The run in the state of a checkpoint, or before its first step if that is None.

    sibling: a checkpoint of the same run, with whose text and models it is trained.
    """
    contents = checkpoint and open_newest([checkpoint], is_named=True)
    return make_run(sibling.folder, load_inputs(flags, sibling), contents)
