"""The models that a run has to read at each start: LoRA's base, and a teacher.

They are part of its folder, in init_from/ and teacher/, so that they stay when the originals are
deleted, moved or replaced.
"""

import contextlib
import os
import re
import shutil

from datasets import atomic_write, explain_errors, extra, sync
from main import DamagedError, model_from_checkpoint, read_checkpoint


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


def open_kept_model(checkpoint, flag_name):
    """The LoadedModel that the run of a checkpoint keeps. Raises DamagedError without it."""
    folder = checkpoint.folder / flag_name
    expected_id = checkpoint.parents.get(flag_name)
    fault = (
        f"{checkpoint.folder.name} cannot go on without the model in its folder {flag_name}: put "
        f"that back, or start a new run with --{flag_name} and --new_model"
    )
    with explain_errors(fault, raises=DamagedError):
        if folder.is_symlink():
            raise OSError("it is a link")
        metadata = folder / f"{expected_id}.metadata"
        if metadata.exists():
            source = model_from_checkpoint(read_checkpoint(metadata))
        else:
            source = extra("huggingface").open_by_name(str(folder))
        if source.id != expected_id:
            raise ValueError(f"it is {source.id[:12]} instead of {expected_id[:12]}")
    return source
