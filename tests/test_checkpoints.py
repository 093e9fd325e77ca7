"""Checkpoints: their names prove the bytes, a save is all or nothing, damage is seen.

Faults at every call are in inject_faults.py; what strangers may have put into a folder, in
fuzz_checkpoints.py.
"""

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import stat
import time
import tracemalloc

import main
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, arrays, begin, ids, interrupt, newest, run, saved, start
from conftest import wait_for, write_text


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with a run of three checkpoints, of which the first has the best score."""
    folder = tmp_path_factory.mktemp("three")
    text = write_text(folder, "the quick brown fox jumps over the lazy dog\n" * 200)
    line = ["--text", text, *TINY, "--num_blocks", 1, "--sample_tokens", 0, "--num_iters", 3]
    line += ["--learning_rate", 1, "--lr_warmup", 0, "--steps_per_save", 1, "--keep", 9]
    line += ["--steps_per_eval", 1, "--average", 0.5]
    line += ["--mirror", "https://me:passw0rd@example.org/x"]
    run(*line, "--save_dir", folder / "lm")
    first, *others = reversed(saved(folder / "lm"))
    assert first.evaluation.loss < min(each.evaluation.loss for each in others)
    return folder / "lm", line


@pytest.fixture
def folder(three, tmp_path):
    """A copy of that folder."""
    shutil.copytree(three[0], tmp_path / "lm")
    return tmp_path / "lm"


@pytest.fixture
def line(three, folder):
    """The command that goes on with the run in it."""
    return [*three[1], "--save_dir", folder]


def spoil(path):
    """Flips a bit near the end of a file."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


# ---- What is in one -----------------------------------------------------------------------------


def test_name_is_the_sha1_of_the_bytes_and_content_is_whole(three):
    checkpoint = newest(three[0])
    data = checkpoint.weights_path.read_bytes()
    assert hashlib.sha1(data).hexdigest() == checkpoint.id
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "mlx"}, "what varies between equal runs"
    parameters = arrays(main.read_contents(checkpoint).load_model())
    assert list(header) == sorted(parameters)
    for name, value in parameters.items():
        begins, ends = header[name]["data_offsets"]
        stored = np.frombuffer(data[8 + length :][begins:ends], np.float32)
        np.testing.assert_array_equal(stored.reshape(value.shape), value)
    assert b"passw0rd" not in checkpoint.metadata_path.read_bytes()


def test_no_pickle_no_eval():
    """Nothing in a file can make the program run it."""
    paths = [
        path for name in ("*.py", "support/*.py", "extras/**/*.py") for path in ROOT.glob(name)
    ]
    assert len(paths) > 8
    source = "".join(path.read_text() for path in paths)
    source = source.replace("mx.eval(", "").replace("_exec(", "").replace("noexec(", "")
    for forbidden in ("pickle", "eval(", "exec(", "np.load", "marshal", "__import__"):
        assert forbidden not in source, forbidden


# ---- Saving -------------------------------------------------------------------------------------


def test_a_file_system_that_syncs_no_folder(line, folder, monkeypatch):
    """All is saved that can be: it must not be tried for ever."""
    fsync = os.fsync

    def no_folder(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folder)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    assert main.main([*map(str, line), "--num_iters", "4"]) == 0
    assert newest(folder).iteration == 4


def test_macos_empties_the_cache_of_a_disk(line, folder, monkeypatch):
    """Its fsync does not, so another call has to; where a disk cannot, fsync is what there is."""
    synced = []

    def full_sync(descriptor, command):
        assert command == "F_FULLFSYNC"
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOTSUP, "Operation not supported")
        synced.append("file")

    def fsync(descriptor):
        assert stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append("folder")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", "F_FULLFSYNC", raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full_sync)
    monkeypatch.setattr(os, "fsync", fsync)
    assert main.main([*map(str, line), "--num_iters", "4"]) == 0
    assert synced[-4:] == ["file", "file", "folder", "folder"]


def test_vanished_folder_is_made_again(line, folder):
    process = start(*line, "--num_iters", 100_000, "--steps_per_save", 100_000)
    wait_for(process, "20/100,000 ")
    folder.rename(folder.with_name("gone"))
    interrupt(process)
    main.read_contents(newest(folder))


# ---- Damage -------------------------------------------------------------------------------------


def what_is_read(folder, capsys):
    """The beginning of the id of the checkpoint that a command uses; nothing is asked of it."""
    assert main.main(["--inference", "--save_dir", str(folder)]) == 0
    err = capsys.readouterr().err
    assert err.count("Skipping ") <= 1
    return re.search("checkpoint ([0-9a-f]+), in ", err).group(1)


def test_damages_are_all_found(folder, capsys, monkeypatch):
    """Cut short or with a bit flipped anywhere, in either file; no way of reading it crashes."""
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    checkpoint, other, _ = saved(folder)
    chance = random.Random(0)
    for trial in range(40):
        path = checkpoint.weights_path if trial % 2 else checkpoint.metadata_path
        whole = path.read_bytes()
        data = bytearray(whole)
        if trial % 4 < 2:
            del data[chance.randrange(len(data)) :]
        else:
            end = len(data)
            if trial % 8 >= 6:  # in the header, where it does the most harm
                end = 8 + int.from_bytes(data[:8], "little")
            data[chance.randrange(end)] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        assert what_is_read(folder, capsys) == other.id[:12], f"trial {trial}"
        path.write_bytes(whole)
    assert what_is_read(folder, capsys) == checkpoint.id[:12]
    shutil.copy(other.metadata_path, checkpoint.metadata_path)  # it belongs to another one
    assert what_is_read(folder, capsys) == other.id[:12]


def change_record(path, **values):
    """Changes these entries of the record in a .metadata, and its SHA1 accordingly."""
    arrays, texts = mx.load(str(path), format="safetensors", return_metadata=True)
    mx.eval(arrays)  # before the file is written
    record = json.dumps(json.loads(texts["record"]) | values)
    texts = {"record": record, "sha1": hashlib.sha1(record.encode()).hexdigest()}
    with open(path, "wb") as file:
        mx.save_safetensors(file, arrays, texts)


@pytest.mark.parametrize("flag, value", [("batch_size", 32.0), ("keep", True)])
def test_a_flag_of_another_type(flag, value, line, folder):
    """Python finds 32.0 equal to the default of 32."""
    name, _, _ = begin(*line)
    checkpoint = newest(folder)
    change_record(checkpoint.metadata_path, flags=checkpoint.flags | {flag: value})
    _, err = run("--list", "--save_dir", folder)
    assert err.startswith(f"Skipping {name}, {checkpoint.id[:12]}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("part", ["weights", "state"])
def test_a_name_of_an_array_takes_no_memory(part, folder):
    """A list with that index would take 100 MB."""
    contents = main.read_contents(newest(folder))
    array = {"weights.model.layers.1000000.x": mx.array([1.0])}
    forged = contents._replace(**{part: getattr(contents, part) | array})
    flags = main.resolve_flags({"save_dir": folder.parent}, contents.checkpoint.flags)
    inputs = main.load_inputs(flags, contents.checkpoint)
    tracemalloc.start()
    with pytest.raises(main.DamagedError, match="those of another model"):
        main.make_run(folder, inputs, forged)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20


def test_another_format_is_named(line, folder):
    line += ["--seed", 1, "--steps_per_save", 3, "--steps_per_eval", 3]
    name, _, _ = begin(*line)
    path = newest(folder).metadata_path
    change_record(path, format_version=6)
    _, err = run(*line, status=1)
    [skipped, end] = err.splitlines()
    reason = "its format is version 6: use the commit that wrote it"
    assert skipped == f"Skipping {name}, {path.stem[:12]}: {reason}"
    # It does not begin again unasked: its disk may have failed but for a moment.
    assert end == f"main.py: no checkpoint of {name} can be read: --new_model starts a new run"


def test_damaged_newest_is_named_and_passed_over(line, folder):
    """But for one that was named; the same steps end in the same bytes."""
    last, before, first = saved(folder)
    spoil(last.weights_path)
    _, err = run("--inference", "--identifier", last.id, "--save_dir", folder, status=1)
    assert err.count("\n") == 1
    assert "is damaged" in err
    _, err = run("--prompt", "line 5", "--save_dir", folder)
    assert last.id[:12] in err and str(before) in err
    spoil(before.metadata_path)
    name, iteration, out = begin(*line)
    assert (name, iteration) == (first.folder.name, 1)
    assert last.id[:12] in out
    assert before.id[:12] in out
    assert ids(folder)[0] == last.id
    main.read_contents(newest(folder))


# ---- Pruning ------------------------------------------------------------------------------------


def test_keep_and_best(line, folder):
    """The newest two and the best stay."""
    run(*line, "--num_iters", 5, "--keep", 2)
    assert [checkpoint.iteration for checkpoint in saved(folder)] == [5, 4, 1]


def test_what_the_clock_saves_pushes_nothing_out(line, folder, tmp_path):
    """Of what the schedule asks for, two stay; of the others, the newest. Weights stay the same."""
    line += ["--num_iters", 35, "--steps_per_save", 10, "--steps_per_eval", 0, "--keep", 2]
    line += ["--learning_rate", 1e-3]
    name, _, out = begin(*line, "--minutes_per_save", 1e-9)
    assert [checkpoint.iteration for checkpoint in saved(folder, name)] == [35, 34, 30, 20]
    assert out.count("\nsaved ") == 4, "the clock's are not announced"
    run(*line, "--minutes_per_save", 0, "--save_dir", tmp_path / "plain")
    kept = saved(tmp_path / "plain")
    assert [checkpoint.iteration for checkpoint in kept] == [35, 30, 20]
    assert kept[0].id == saved(folder, name)[0].id


def test_the_best_of_a_run_that_goes_on_from_before_its_newest(line, folder):
    """The newest would be the best, but is damaged: it is none of this past."""
    line += ["--seed", 1, "--learning_rate", 0.01, "--num_iters", 3]
    name, _, _ = begin(*line)
    last, best, _ = saved(folder, name)
    assert last.evaluation.loss < best.evaluation.loss
    spoil(last.weights_path)
    run(*line, "--num_iters", 6, "--keep", 1, "--steps_per_save", 4, "--steps_per_eval", 0)
    assert best.id in [checkpoint.id for checkpoint in saved(folder, name)]


def test_pruning_waits_for_one_good_step(line, folder):
    """The checkpoint before the newest is needed if the newest cannot be trained on."""
    line += ["--new_model", "--steps_per_save", 2, "--steps_per_eval", 0, "--keep", 1]
    name, _, _ = begin(*line, "--num_iters", 4)
    assert len(saved(folder, name)) == 2
    run("--identifier", name, "--save_dir", folder, "--num_iters", 5)
    assert [each.iteration for each in saved(folder, name)] == [5, 4]
