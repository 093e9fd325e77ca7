"""Checkpoints: the names prove the bytes, a save is all or nothing at every call, damage is always seen."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
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
    assert main.find_damage(tmp_path, {"id": id}) is None
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
        main.remove_leftovers(folder, run.name)
        newest = main.list_checkpoints(folder)[0]["id"]
        assert main.find_damage(folder, {"id": newest}) is None and newest in new | {old}
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
        assert main.find_damage(tmp_path, {"id": id}) is None
        assert not list(tmp_path.glob("*.new"))


def fail_to_save(folder, monkeypatch, capsys, received=None):
    """Saves where it never works, up to 1,000 s; returns (pauses announced, seconds slept, the status of an exit or None)."""
    seconds = 0

    def sleep(time):
        nonlocal seconds
        seconds += time
        if seconds >= 1000:
            raise Killed

    interrupts = main.Interrupts()
    interrupts.received = received
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(main, "write_checkpoint", lambda *_: open("/nowhere/at/all"))
    with pytest.raises((SystemExit, Killed)) as end:
        main.save_checkpoint(folder, make_run(), interrupts)
    pauses = re.findall(r"retrying in (\d+) s", capsys.readouterr().out)
    return list(map(int, pauses)), seconds, getattr(end.value, "code", None)


@pytest.mark.parametrize("received", [None, signal.SIGINT])
def test_retries_pause_longer_and_longer(tmp_path, monkeypatch, capsys, received):
    """Also after one Ctrl+C: who sits at the terminal can press it again."""
    pauses, seconds, status = fail_to_save(tmp_path, monkeypatch, capsys, received)
    assert pauses == sorted(pauses) and pauses[0] == 1 and pauses[-1] == 60
    assert seconds == 1000 and status is None


@pytest.mark.parametrize("received", [signal.SIGTERM, signal.SIGHUP])
def test_a_launchers_signal_ends_the_retries(tmp_path, monkeypatch, capsys, received):
    """After GRACE seconds and one more try; a launcher would send SIGKILL 10 s after it or later."""
    pauses, seconds, status = fail_to_save(tmp_path, monkeypatch, capsys, received)
    assert pauses == [1, 2, 5, 10] and seconds == main.GRACE and status == 128 + received


def test_vanished_folder_is_made_again(tmp_path):
    run = make_run()
    folder = tmp_path / "lm"
    first = main.save_checkpoint(folder, run)
    shutil.rmtree(folder)
    assert main.save_checkpoint(folder, run) == first
    assert main.find_damage(folder, {"id": first}) is None


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
        assert main.find_damage(tmp_path, {"id": id}), f"trial {trial}"
        main.list_checkpoints(tmp_path)
        path.write_bytes(whole)
    assert main.find_damage(tmp_path, {"id": id}) is None


def test_swapped_metadata_is_found(tmp_path):
    """Two whole files that do not belong together."""
    run = make_run()
    first = main.save_checkpoint(tmp_path, run)
    advance(run)
    second = main.save_checkpoint(tmp_path, run)
    shutil.copy(tmp_path / f"{first}.metadata", tmp_path / f"{second}.metadata")
    assert "belongs to" in main.find_damage(tmp_path, {"id": second})


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
    main.remove_leftovers(tmp_path, "ptb-0a1b2c")
    assert {path.name for path in tmp_path.iterdir()} == set(foreign)
    assert main.list_checkpoints(tmp_path, warn=True) == []
    assert capsys.readouterr().err.count("Skipping") == 1


def test_metadata_that_comes_before_its_weights_stays(tmp_path, monkeypatch):
    """As when a checkpoint is moved into a folder in which another run trains; its own run would have left it."""
    run = make_run()
    id = main.save_checkpoint(tmp_path, run)
    weights = tmp_path / f"{id}.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    main.remove_leftovers(tmp_path, "other-0a1b2c")
    weights.write_bytes(content)
    assert main.find_damage(tmp_path, {"id": id}) is None
    weights.unlink()
    with monkeypatch.context() as patch:
        now = time.time()
        patch.setattr(time, "time", lambda: now + 4000)
        main.remove_leftovers(tmp_path, "other-0a1b2c")
    assert not list(tmp_path.iterdir()), "an hour later it is what a kill has left"
    main.save_checkpoint(tmp_path, run)
    weights.unlink()
    main.remove_leftovers(tmp_path, run.name)
    assert not list(tmp_path.iterdir())


def test_metadata_of_a_killed_save_is_replaced_by_an_equal_run(tmp_path):
    run = make_run()
    id = main.save_checkpoint(tmp_path, run)
    (tmp_path / f"{id}.safetensors").unlink()
    again = make_run("test-222222")
    assert main.save_checkpoint(tmp_path, again) == id
    assert [record["run"] for record in main.list_checkpoints(tmp_path)] == ["test-222222"]


def test_links_that_lead_nowhere(tmp_path, capsys):
    """Links to a RAM disk dangle after a reboot."""
    (tmp_path / f"{'0' * 40}.safetensors").symlink_to("/nowhere/at/all")
    assert main.list_checkpoints(tmp_path) == []
    run = make_run()
    older = main.save_checkpoint(tmp_path, run)
    advance(run)
    newer = main.save_checkpoint(tmp_path, run)
    (tmp_path / f"{newer}.safetensors").unlink()
    (tmp_path / f"{newer}.safetensors").symlink_to("/nowhere/at/all")
    assert choose(tmp_path)["id"] == older and newer[:12] in capsys.readouterr().err
    with pytest.raises(RunError, match="damaged"):
        choose(tmp_path, identifier=newer)


def test_arrays_are_read_from_the_start_of_a_file(tmp_path, monkeypatch):
    """On macOS, what /dev/fd opens begins where the file's descriptor is, and moves it."""
    run = make_run()
    id = main.save_checkpoint(tmp_path, run)
    load = main.mx.load

    def load_as_on_macos(path, **options):
        descriptor = int(path.rpartition("/")[2])
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0
        arrays = load(path, **options)
        main.mx.eval(arrays)
        os.lseek(descriptor, 100, os.SEEK_SET)
        return arrays

    monkeypatch.setattr(main.mx, "load", load_as_on_macos)
    with open(tmp_path / f"{id}.metadata", "rb") as file:
        for read in (file.read, lambda: main.read_metadata(file), lambda: file.read(10)):
            read()
            assert main.load_arrays(file) and main.read_metadata(file)[0]["id"] == id


def test_prune_keeps_the_newest_the_best_and_other_runs(tmp_path):
    run, other = make_run(), make_run("test-111111", seed=5)
    foreign = main.save_checkpoint(tmp_path, other)
    saved = []
    for i in range(6):
        advance(run)
        saved.append(main.save_checkpoint(tmp_path, run))
        if i == 1:
            run.best = {"id": saved[1], "iteration": 2, "nats": 1.0}
    main.prune(tmp_path, run, 2)
    assert {record["id"] for record in main.list_checkpoints(tmp_path)} == {saved[1], saved[4], saved[5], foreign}
    assert len(list(tmp_path.glob("*.metadata"))) == 4


def test_a_clock_set_back_does_not_hide_the_newest(tmp_path, monkeypatch):
    run, saved = make_run(), []
    for clock in (2000.0, 3000.0, 1000.0, 1001.0):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        advance(run)
        saved.append(main.save_checkpoint(tmp_path, run))
        main.prune(tmp_path, run, 2)
    assert [record["id"] for record in main.list_checkpoints(tmp_path)] == [saved[3], saved[2]]


def test_a_flag_younger_than_the_checkpoint_has_its_default(tmp_path):
    run = make_run()
    del run.about["flags"]["mlp"], run.about["flags"]["grad_clip"]
    id = main.save_checkpoint(tmp_path, run)
    assert choose(tmp_path, {"mlp": "relu2"})["id"] == id
    assert choose(tmp_path, {"mlp": "gelu"}, mlp="gelu") is None


def test_identifiers(tmp_path):
    run, other = make_run("ptb-0a1b2c"), make_run("ptb-3d4e5f", seed=5)
    with pytest.raises(UsageError, match="no checkpoint in .*: train a model first"):
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


def test_an_equal_checkpoint_belongs_to_all_runs_that_reached_it(tmp_path):
    """Each has metadata of its own, in training or not, and the last one that prunes it deletes the weights."""
    first, second = make_run("test-aaaaaa"), make_run("test-bbbbbb")
    first.scores, second.scores = [[0, 1.5]], [[0, 2.5]]
    id = main.save_checkpoint(tmp_path, first)
    assert main.save_checkpoint(tmp_path, second) == id
    main.save_score(tmp_path, first)
    main.save_score(tmp_path, second)
    records = main.list_checkpoints(tmp_path)
    assert [(record["run"], record["scores"]) for record in records] == [("test-bbbbbb", [[0, 2.5]]), ("test-aaaaaa", [[0, 1.5]])]
    assert all(main.find_damage(tmp_path, record) is None for record in records)
    assert main.named_checkpoint(tmp_path, records, id)["run"] == "test-bbbbbb", "that saved last"
    assert main.named_checkpoint(tmp_path, records, "test-aaaaaa")["scores"] == [[0, 1.5]]
    for run in (first, second):
        advance(run)
        run.model.update(main.tree_map(lambda array: array + len(run.scores), run.model.parameters()))
        run.scores.append([1, 1.0])
    for run in (first, second):
        assert main.save_checkpoint(tmp_path, run) != id
        main.prune(tmp_path, run, 1)
        left = sorted(path.name for path in tmp_path.glob(f"{id}*"))
        assert left == ([f"{id}.safetensors", f"{id}.test-bbbbbb.metadata"] if run is first else [])


def test_weights_that_are_equal_by_chance_do_not_mix_their_runs(tmp_path):
    """Two runs that learn nothing have the same weights, but each its own place in its own text."""
    first, second = make_run("test-aaaaaa"), make_run("test-bbbbbb")
    second.batches.begin_epoch(3)
    id = main.save_checkpoint(tmp_path, first)
    assert main.save_checkpoint(tmp_path, second) == id
    for run in (first, second):
        again = make_run(run.name)
        again.restore(tmp_path, main.named_checkpoint(tmp_path, main.list_checkpoints(tmp_path), run.name))
        assert again.batches.epoch == run.batches.epoch
        np.testing.assert_array_equal(again.batches.perm, run.batches.perm)


def test_a_branch_keeps_the_best_of_the_run_that_it_left(tmp_path):
    old, branch = make_run("test-aaaaaa"), make_run("test-bbbbbb")
    best = main.save_checkpoint(tmp_path, old)
    branch.best = {"id": best, "iteration": 0, "nats": 1.0}
    advance(branch)
    main.save_checkpoint(tmp_path, branch)
    for _ in range(2):
        advance(old, 2)
        main.save_checkpoint(tmp_path, old)
    main.prune(tmp_path, old, 1)
    records = main.list_checkpoints(tmp_path)
    assert [record["id"] for record in records if record["run"] == old.name] == [old.checkpoint_id, best]


@pytest.mark.parametrize("kind", ["safetensors", "metadata"])
def test_a_file_that_is_damaged_after_the_verification(tmp_path, kind):
    """MLX raises a RuntimeError then."""
    run = make_run()
    id = main.save_checkpoint(tmp_path, run)
    record = choose(tmp_path)
    os.truncate(tmp_path / f"{id}.{kind}", 100)
    with pytest.raises(RunError, match=f"{id}.{kind} cannot be read") as error:
        run.restore(tmp_path, record)
    assert "\n" not in str(error.value)


def test_what_is_open_is_read_even_if_it_is_deleted(tmp_path):
    """A reader beside a run that prunes: what was verified is what is read."""
    run = make_run()
    main.save_checkpoint(tmp_path, run)
    wanted = dict(main.tree_flatten(run.model.parameters()))
    wanted = {name: np.array(array) for name, array in wanted.items()}
    record = choose(tmp_path)
    advance(run)
    main.save_checkpoint(tmp_path, run)
    main.prune(tmp_path, run, 1)
    assert not (tmp_path / f"{record['id']}.safetensors").exists()
    model, tokenizer = main.load_model(tmp_path, record)
    for name, array in main.tree_flatten(model.parameters()):
        np.testing.assert_array_equal(np.array(array), wanted[name])
    assert tokenizer.to_dict() == run.dataset.tokenizer.to_dict()


@pytest.mark.parametrize("identifier", [None, "latest", "test-000000"])
def test_one_deleted_since_the_folder_was_listed_gives_way_to_a_newer_one(tmp_path, monkeypatch, capsys, identifier):
    run = make_run()
    main.save_checkpoint(tmp_path, run)
    find_damage = main.find_damage

    def find_damage_late(folder, record):
        monkeypatch.setattr(main, "find_damage", find_damage)
        advance(run)
        main.save_checkpoint(tmp_path, run)
        main.prune(tmp_path, run, 1)
        return find_damage(folder, record)

    monkeypatch.setattr(main, "find_damage", find_damage_late)
    assert choose(tmp_path, identifier=identifier)["id"] == run.checkpoint_id
    assert capsys.readouterr().err == "", "that is nothing to report"


def test_all_that_were_listed_may_be_deleted_before_they_are_read(tmp_path, monkeypatch):
    """A reader that was slow: it lists again, and finds what has replaced them."""
    run = make_run()
    main.save_checkpoint(tmp_path, run)
    read_metadata = main.read_metadata

    def read_late(file):
        monkeypatch.setattr(main, "read_metadata", read_metadata)
        advance(run)
        main.save_checkpoint(tmp_path, run)
        main.prune(tmp_path, run, 1)
        raise FileNotFoundError

    monkeypatch.setattr(main, "read_metadata", read_late)
    assert [record["id"] for record in main.list_checkpoints(tmp_path)] == [run.checkpoint_id]


def test_prune_keeps_what_the_run_was_resumed_from(tmp_path):
    """Newer ones may be damaged, which their names and records do not show."""
    run = make_run()
    saved = []
    for _ in range(3):
        advance(run)
        saved.append(main.save_checkpoint(tmp_path, run))
    (tmp_path / f"{saved[2]}.safetensors").write_bytes(b"")
    run.checkpoint_id = saved[1]
    main.prune(tmp_path, run, 1)
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == set(saved[1:])


def test_a_diverged_checkpoint_is_marked_and_passed_over(tmp_path, capsys):
    run = make_run()
    sound = main.save_checkpoint(tmp_path, run)
    advance(run)
    assert main.newest_sound_id(tmp_path, run) == sound, "a step was taken from it"
    main.save_checkpoint(tmp_path, run)
    before = read_safetensors(tmp_path / f"{run.checkpoint_id}.metadata")[0]
    run.saved_iteration = run.iteration
    assert main.newest_sound_id(tmp_path, run) == sound
    main.mark_diverged(tmp_path, run)
    [record] = [record for record in main.list_checkpoints(tmp_path) if record.get("diverged")]
    assert record["id"] == run.checkpoint_id and main.find_damage(tmp_path, record) is None
    after = read_safetensors(tmp_path / f"{run.checkpoint_id}.metadata")[0]
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)
    assert choose(tmp_path)["id"] == sound and "not finite" in capsys.readouterr().err
    for name in ("latest", run.name):
        assert choose(tmp_path, identifier=name)["id"] == sound
    with pytest.raises(RunError, match="not finite"):
        choose(tmp_path, identifier=run.checkpoint_id)
    run.restore(tmp_path, choose(tmp_path))
    main.prune(tmp_path, run, 1)
    assert [record["id"] for record in main.list_checkpoints(tmp_path)] == [sound]


def test_records_of_another_program_do_not_end_this_one(tmp_path, capsys):
    """Of the right form and intact, but without what a record has, or with values that this version does not know."""
    run = make_run()
    id = main.save_checkpoint(tmp_path, run)
    [record] = main.list_checkpoints(tmp_path)
    _, texts = main.read_metadata(open(record["path"], "rb"))
    del record["path"]
    path = tmp_path / f"{id}.metadata"
    for name in ("saved", "iteration", "flags"):
        less = {key: value for key, value in record.items() if key != name}
        main.replace_metadata(path, less, texts["tokenizer"], {"perm": mx.zeros(1)})
        assert main.list_checkpoints(tmp_path, warn=True) == []
        assert id[:12] in capsys.readouterr().err
    strange = record | {"flags": record["flags"] | {"optimizer": "lion"}}
    with pytest.raises(RunError, match="--optimizer lion"):
        main.flags_of_resumed_run(strange, {})
    for config in (record["config"] | {"mlp": "geglu"}, record["config"] | {"experts": 8}):
        with pytest.raises(RunError, match="another version"):
            main.model_of(record | {"config": config})


def test_no_pickle_no_eval():
    """Nothing in a file can make the program run it."""
    paths = [ROOT / "main.py", ROOT / "datasets.py", *sorted(ROOT.glob("extras/*.py"))]
    assert len(paths) > 8
    source = "".join(path.read_text() for path in paths)
    for forbidden in ("pickle", "eval(", "exec(", "np.load", "marshal", "__import__"):
        assert forbidden not in source.replace("mx.eval(", "").replace("_exec(", ""), forbidden
