"""Checkpoints: the names prove the bytes, a save is all or nothing at every call, damage is always seen."""

import errno
import hashlib
import json
import os
import random
import shutil
import struct
import time

import main
import numpy as np
import pytest
from conftest import ROOT, Watched, flags, watch_files
from datasets import Dataset, RunError, UsageError, WordTokenizer
from main import mx


def make_run(name="test-000000", seed=1, **values):
    """A small run that was never trained."""
    given = flags(dim=16, num_heads=2, num_blocks=1, context_size=8, batch_size=2, **values)
    tokenizer = WordTokenizer.train(["a b c d\n" * 5])
    config = main.Config(tokenizer.vocab_size, 8, 1, 16, 2, 2, "relu2", 64)
    model = main.LanguageModel(config)
    main.init_weights(model, seed)
    batches = main.Batches(np.arange(200, dtype=np.uint16) % 6, 8, 2, seed)
    about = {
        "run": name,
        "config": main.dataclasses.asdict(config),
        "flags": {flag: getattr(given, flag) for flag in main.INHERITED},
    }
    dataset = Dataset("test", tokenizer, train=None, valid=None, test=None, sha256=None)
    optimizer = main.make_optimizer(model, given)
    return main.Run(name, given, dataset, model, optimizer, batches, about=about)


def advance(run, steps=1):
    step = main.make_step(run.model, run.optimizer, flags())
    for _ in range(steps):
        mx.eval(step(*run.batches.next()), run.model.state, run.optimizer.state)
        run.iteration += 1


def read_safetensors(path):
    """An independent reader of the format: header length, JSON, little-endian rows."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    dtypes = {"F32": np.float32, "I32": np.int32, "U64": np.uint64}
    arrays = {
        name: np.frombuffer(data[8 + length :][slice(*entry["data_offsets"])], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }
    return arrays, metadata


def test_name_is_the_sha1_of_the_bytes_and_content_is_whole(tmp_path):
    run = make_run()
    advance(run, 3)
    id = main.save_checkpoint(tmp_path, run)
    weights, metadata = read_safetensors(tmp_path / f"{id}.safetensors")
    assert hashlib.sha1((tmp_path / f"{id}.safetensors").read_bytes()).hexdigest() == id
    assert metadata == {"format": "mlx"}, "nothing in the file may vary between equal runs"
    for name, value in main.tree_flatten(run.model.parameters()):
        np.testing.assert_array_equal(weights.pop(name), np.array(value))
    assert not weights
    state, metadata = read_safetensors(tmp_path / f"{id}.metadata")
    record = json.loads(metadata["record"])
    assert record["iteration"] == 3 and record["s"] == 6 and record["epoch"] == 0
    np.testing.assert_array_equal(state["perm"], run.batches.perm)
    assert json.loads(metadata["tokenizer"]) == run.dataset.tokenizer.to_dict()
    assert sum(name.endswith(".m") for name in state) == len(main.tree_flatten(run.model.parameters()))
    data = (tmp_path / f"{id}.metadata").read_bytes()
    blanked = data.replace(metadata["sha1"].encode(), b"0" * 40)
    assert hashlib.sha1(blanked).hexdigest() == metadata["sha1"]
    assert main.find_damage(tmp_path, id) is None
    assert not list(tmp_path.glob("*.new"))


def test_load_is_the_identity(tmp_path):
    run = make_run()
    advance(run, 5)
    id = main.save_checkpoint(tmp_path, run)
    advance(run, 40)  # past an epoch's end
    other = make_run()
    main.init_weights(other.model, 2)
    other.restore(tmp_path, main.list_checkpoints(tmp_path)[0])
    advance(other, 40)
    mine, theirs = (dict(main.tree_flatten([r.model.state, r.optimizer.state])) for r in (run, other))
    assert all(mx.array_equal(mine.pop(name), value) for name, value in theirs.items()) and not mine
    assert main.save_checkpoint(tmp_path, other) == main.save_checkpoint(tmp_path, run) != id


class Faults:
    """Counts the calls of a save that reach the operating system and lets the n-th one fail."""

    def __init__(self, monkeypatch, at, error):
        self.calls, self.at, self.error = 0, at, error
        monkeypatch.setattr(main, "open", watch_files, raising=False)
        for holder, name in ((os, "replace"), (os, "fsync"), (os, "open"), (Watched, "write")):
            monkeypatch.setattr(holder, name, self.wrap(getattr(holder, name), name))

    def wrap(self, function, name):
        def faulty(*arguments):
            self.calls += 1
            if self.calls == self.at:
                if name == "write":  # half of it gets to the disk
                    arguments[0].file.write(bytes(arguments[1])[: len(arguments[1]) // 2])
                    arguments[0].file.flush()
                raise self.error
            return function(*arguments)

        return faulty


def count_calls(folder, run):
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, 0, None)
        main.save_checkpoint(folder, run)
    return faults.calls


class Killed(BaseException):
    """Stands for a `kill -9`: nothing in the program handles it."""


def test_killed_at_every_call_of_a_save(tmp_path):
    """After it, either the checkpoint before or the new one is the newest intact one, and cleaning leaves only pairs."""
    run = make_run()
    old = main.save_checkpoint(tmp_path, run)
    advance(run)
    shutil.copytree(tmp_path, tmp_path / "copy")
    calls = count_calls(tmp_path / "copy", run)
    new = {path.stem for path in (tmp_path / "copy").glob("*.safetensors")} - {old}
    assert calls > 30
    outcomes = []
    for at in range(1, calls + 1):
        folder = tmp_path / f"at{at}"
        folder.mkdir()
        for kind in ("safetensors", "metadata"):
            shutil.copy(tmp_path / f"{old}.{kind}", folder)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            Faults(patch, at, Killed())
            main.save_checkpoint(folder, run)
        main.remove_leftovers(folder)
        newest = main.list_checkpoints(folder)[0]["id"]
        assert main.find_damage(folder, newest) is None and newest in new | {old}
        assert len({path.stem for path in folder.iterdir()}) * 2 == len(list(folder.iterdir()))
        outcomes.append(newest)
    assert outcomes[0] == old and outcomes[-1] in new, "faults were not spread over the whole save"


@pytest.mark.parametrize("score_only", [False, True])
def test_error_at_every_call_is_retried(tmp_path, monkeypatch, score_only, capsys):
    """A full disk or a broken one: nothing is lost, the same checkpoint is there in the end, and no `.new` stays."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    run = make_run()
    id = main.save_checkpoint(tmp_path, run)
    calls = count_calls(tmp_path, run)
    for at in range(1, calls + 1):
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, at, OSError(errno.ENOSPC, "No space left on device"))
            if score_only:
                main.save_score(tmp_path, run)
            else:
                assert main.save_checkpoint(tmp_path, run) == id
        if faults.calls >= at:
            assert pauses.pop() == 1 and "No space left" in capsys.readouterr().out
        assert main.find_damage(tmp_path, id) is None
        assert not list(tmp_path.glob("*.new"))


def test_retries_pause_longer_and_longer(tmp_path, monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 8:
            raise Killed

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(main, "write_checkpoint", lambda *_: open("/nowhere/at/all"))
    with pytest.raises(Killed):
        main.save_checkpoint(tmp_path, make_run())
    assert pauses == sorted(pauses) and pauses[-1] <= 60


def test_vanished_folder_is_made_again(tmp_path):
    run = make_run()
    folder = tmp_path / "lm"
    first = main.save_checkpoint(folder, run)
    shutil.rmtree(folder)
    assert main.save_checkpoint(folder, run) == first
    assert main.find_damage(folder, first) is None


def test_200_damages_are_all_found(tmp_path):
    """Cut short or with a bit flipped anywhere, in either file: found by the loader, and no way of reading it crashes."""
    run = make_run()
    id = main.save_checkpoint(tmp_path, run)
    chance = random.Random(0)
    for trial in range(240):
        path = tmp_path / f"{id}.{'safetensors' if trial % 2 else 'metadata'}"
        whole = path.read_bytes()
        if trial % 4 < 2:
            path.write_bytes(whole[: chance.randrange(len(whole))])
        else:
            # Every other flip hits the header, where it does the most harm.
            at = chance.randrange(len(whole) if trial % 8 < 6 else 8 + int.from_bytes(whole[:8], "little"))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        assert main.find_damage(tmp_path, id), f"trial {trial}"
        main.list_checkpoints(tmp_path)
        path.write_bytes(whole)
    assert main.find_damage(tmp_path, id) is None


def test_swapped_metadata_is_found(tmp_path):
    """Two whole files that do not belong together."""
    run = make_run()
    first = main.save_checkpoint(tmp_path, run)
    advance(run)
    second = main.save_checkpoint(tmp_path, run)
    shutil.copy(tmp_path / f"{first}.metadata", tmp_path / f"{second}.metadata")
    assert "belongs to" in main.find_damage(tmp_path, second)


def choose(folder, typed=None, **values):
    given = flags(**{"context_size": 8, "dataset": "ptb"} | values)
    return main.choose_checkpoint(folder, given, typed or {}, needed=False)


def test_damage_is_passed_over_for_the_next_older_one(tmp_path, capsys):
    run = make_run()
    saved = []
    for _ in range(3):
        advance(run)
        saved.append(main.save_checkpoint(tmp_path, run))
    assert choose(tmp_path)["id"] == saved[2]
    for path in (tmp_path / f"{saved[2]}.safetensors", tmp_path / f"{saved[1]}.metadata"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    assert choose(tmp_path)["id"] == saved[0]
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and saved[2][:12] in err and saved[1][:12] in err
    with pytest.raises(RunError, match="damaged"):
        choose(tmp_path, identifier=saved[2])
    (tmp_path / f"{saved[0]}.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="--new_model"):
        choose(tmp_path)
    (tmp_path / f"{saved[0]}.metadata").unlink()
    capsys.readouterr()
    main.list_checkpoints(tmp_path, warn=True)
    assert saved[0][:12] in capsys.readouterr().err


def test_files_of_others_are_left_alone(tmp_path, capsys):
    foreign = {"model.safetensors": b"x", "notes.new": b"", "a.metadata": b"", f"{'0' * 40}.safetensors": b"other program"}
    header = b'{"__metadata__": {"record": 5}}'  # of the right form, with other things in it
    foreign |= {"b.safetensors": b"", "b.metadata": len(header).to_bytes(8, "little") + header}
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
    for name in ("ptb-0a1b2c.metadata.new", "ptb-0a1b2c.safetensors.new", f"{'1' * 40}.metadata"):
        (tmp_path / name).write_bytes(b"left by a killed save")
    main.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(foreign)
    assert main.list_checkpoints(tmp_path, warn=True) == []
    assert capsys.readouterr().err.count("Passing over") == 1


def test_prune_keeps_the_newest_the_best_and_other_runs(tmp_path):
    run, other = make_run(), make_run("test-111111", seed=5)
    foreign = main.save_checkpoint(tmp_path, other)
    saved = []
    for i in range(6):
        advance(run)
        saved.append(main.save_checkpoint(tmp_path, run))
        if i == 1:
            run.best = {"id": saved[1], "iteration": 2, "nats": 1.0}
    main.prune(tmp_path, run.name, 2)
    assert {record["id"] for record in main.list_checkpoints(tmp_path)} == {saved[1], saved[4], saved[5], foreign}
    assert len(list(tmp_path.glob("*.metadata"))) == 4


def test_a_clock_set_back_does_not_hide_the_newest(tmp_path, monkeypatch):
    run, saved = make_run(), []
    for clock in (2000.0, 3000.0, 1000.0, 1001.0):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        advance(run)
        saved.append(main.save_checkpoint(tmp_path, run))
        main.prune(tmp_path, run.name, 2)
    assert [record["id"] for record in main.list_checkpoints(tmp_path)] == [saved[3], saved[2]]


def test_a_flag_younger_than_the_checkpoint_has_its_default(tmp_path):
    run = make_run()
    del run.about["flags"]["mlp"], run.about["flags"]["grad_clip"]
    id = main.save_checkpoint(tmp_path, run)
    assert choose(tmp_path, {"mlp": "relu2"})["id"] == id
    assert choose(tmp_path, {"mlp": "gelu"}, mlp="gelu") is None


def test_identifiers(tmp_path):
    run, other = make_run("ptb-0a1b2c"), make_run("ptb-3d4e5f", seed=5)
    with pytest.raises(UsageError, match="matches no checkpoint; name one .--list shows all.: none"):
        choose(tmp_path, identifier="latest")
    saved = []
    for r in (run, other, run):
        advance(r)
        saved.append(main.save_checkpoint(tmp_path, r))
    run.best = {"id": saved[0], "iteration": 1, "nats": 1.0}
    main.save_score(tmp_path, run)
    expected = {saved[1]: 1, saved[1][:6]: 1, "ptb-3d4e5f": 1, "ptb-0a1b2c": 2, "latest": 2, "best": 0}
    for identifier, i in expected.items():
        assert choose(tmp_path, identifier=identifier)["id"] == saved[i], identifier
    for unclear in ("", "zzz"):
        if unclear or len({id[:1] for id in saved}) == 3:
            with pytest.raises(UsageError) as error:
                main.named_checkpoint(tmp_path, main.list_checkpoints(tmp_path), unclear)
            assert all(id[:12] in str(error.value) for id in saved)
    with pytest.raises(UsageError, match="--dim 32 contradicts .* 16"):
        choose(tmp_path, {"dim": 32}, dim=32, identifier="latest")


@pytest.mark.parametrize("difference", [-1, 1])
def test_another_format_is_refused(tmp_path, monkeypatch, difference):
    with monkeypatch.context() as other_program:
        other_program.setattr(main, "FORMAT_VERSION", main.FORMAT_VERSION + difference)
        main.save_checkpoint(tmp_path, make_run())
    with pytest.raises(RunError, match="another version"):
        choose(tmp_path)


def test_equal_run_in_training_is_refused_and_a_finished_one_taken_over(tmp_path):
    run, equal = make_run("test-aaaaaa"), make_run("test-bbbbbb")
    id = main.save_checkpoint(tmp_path, run)
    lock = main.lock_run(tmp_path, "test-aaaaaa")
    assert lock and main.lock_run(tmp_path, "test-aaaaaa") is None
    with pytest.raises(RunError, match="test-aaaaaa"):
        main.save_checkpoint(tmp_path, equal)
    assert main.list_checkpoints(tmp_path)[0]["run"] == "test-aaaaaa" and not list(tmp_path.glob("*.new"))
    lock.close()
    assert main.save_checkpoint(tmp_path, equal) == id
    assert [record["run"] for record in main.list_checkpoints(tmp_path)] == ["test-bbbbbb"]


def test_no_pickle_no_eval():
    """Nothing in a file can make the program run it."""
    paths = [ROOT / "main.py", ROOT / "datasets.py", *sorted(ROOT.glob("extras/*.py"))]
    assert len(paths) > 8
    source = "".join(path.read_text() for path in paths)
    for forbidden in ("pickle", "eval(", "exec(", "np.load", "marshal", "__import__"):
        assert forbidden not in source.replace("mx.eval(", "").replace("_exec(", ""), forbidden
