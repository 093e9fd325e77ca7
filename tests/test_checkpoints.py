"""Checkpoints: their names prove the bytes, a save is all or nothing, damage is seen.

Faults at every call are in crash.py; what strangers may have put into a folder, in strangers.py.
"""

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import stat
import struct
import time

import main
import numpy as np
import pytest
from conftest import ROOT, TINY, flags, ids, rows_of, run, run_folder
from datasets import Dataset, RunError, UsageError, WordTokenizer
from main import mx


def make_run(save_dir, name="test-000000", seed=1, tokenizer=None, **values):
    """A small run that was never trained and never saved."""
    sizes = {"dim": 16, "num_heads": 2, "num_blocks": 1, "context_size": 8, "batch_size": 2}
    given = flags(**sizes | values, seed=seed, dataset="ptb", save_dir=str(save_dir))
    tokenizer = tokenizer or WordTokenizer.train(["a b c d\n" * 5])
    model = main.LanguageModel(main.make_config(given, tokenizer.vocab_size))
    main.init_weights(model, seed)
    sha256 = {"train": "0" * 64, "valid": "1" * 64}
    return main.Run(
        name=name,
        folder=save_dir / name,
        flags=given,
        dataset=Dataset("ptb", tokenizer, train=None, valid=None, test=None, sha256=sha256),
        stretches=[main.Stretch(0, given.num_iters, "2" * 40, {"MLX": "1"})],
        model=model,
        optimizer=main.make_optimizer(model, given),
        batches=main.Batches(np.arange(200, dtype=np.uint16) % 6, 8, 2, seed),
    )


def advance(run, steps=1):
    """Trains a run for some steps."""
    step = main.make_step(run.model, run.optimizer, run.flags)
    for _ in range(steps):
        inputs, targets = run.batches.next()
        rate, keys = main.draw_dropout(run.iteration, len(inputs), run.flags)
        step(inputs, targets, rate, keys)
        run.iteration += 1


def save(run):
    """Saves a run; returns the id of the checkpoint."""
    main.save(run, main.Interrupts())
    return run.checkpoint_id


def train_and_save(run, times, steps=1):
    """Saves a run so many times, after some steps each; returns the ids, the oldest first."""
    saved = []
    for _ in range(times):
        advance(run, steps)
        saved.append(save(run))
    return saved


def score(run, nats):
    """Gives a run a score at its current iteration, as evaluating it does."""
    run.scores.append([run.iteration, nats])


def listed(save_dir):
    """The ids of the checkpoints in a folder, the newest first."""
    return [each.id for each in main.list_checkpoints(save_dir)]


def choose(save_dir, **given):
    """The Contents that a command with these flags resumes, or None."""
    settled = flags(**given, save_dir=str(save_dir))
    checkpoints = main.list_checkpoints(save_dir)
    candidates = main.find_candidates(checkpoints, settled, main.identity(settled))
    return main.open_newest(candidates, settled) if candidates else None


def chosen_id(save_dir, **given):
    """The id of the checkpoint that a command with these flags resumes."""
    return choose(save_dir, **given).checkpoint.id


def is_intact(save_dir, checkpoint_id):
    """Whether each copy of a checkpoint can be opened."""
    found = [each for each in main.list_checkpoints(save_dir) if each.id == checkpoint_id]
    try:
        for checkpoint in found:
            checkpoint.open()
    except main.Damaged:
        return False
    return bool(found)


def spoil(path):
    """Flips a bit near the end of a file."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def read_safetensors(path):
    """An independent reader of the format: header length, JSON, little-endian rows."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    texts = header.pop("__metadata__")
    dtypes = {"F32": np.float32, "I32": np.int32, "U64": np.uint64, "U8": np.uint8}
    arrays = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        content = data[8 + length :][start:stop]
        array = np.frombuffer(content, dtypes[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    return arrays, texts


# ---- What is in one -----------------------------------------------------------------------------


def test_name_is_the_sha1_of_the_bytes_and_content_is_whole(tmp_path):
    run = make_run(tmp_path)
    advance(run, 3)
    checkpoint_id = save(run)
    path = run.folder / f"{checkpoint_id}.safetensors"
    assert hashlib.sha1(path.read_bytes()).hexdigest() == checkpoint_id
    weights, texts = read_safetensors(path)
    assert texts == {"format": "mlx"}, "nothing in the file may vary between equal runs"
    parameters = dict(main.tree_flatten(run.model.parameters()))
    assert list(weights) == sorted(parameters)
    for name, value in parameters.items():
        np.testing.assert_array_equal(weights[name], np.array(value))

    path = path.with_suffix(".metadata")
    state, texts = read_safetensors(path)
    record = json.loads(texts["record"])
    assert record["format_version"] == 4
    assert record["iteration"] == 3
    assert record["place"] == 6
    assert record["epoch"] == 0
    np.testing.assert_array_equal(state["perm"], run.batches.perm)
    tokenizer = json.loads(bytes(state["tokenizer"]))
    assert tokenizer == run.dataset.tokenizer.to_dict()
    means = [name for name in state if name.endswith(".m")]
    assert len(means) == len(parameters)
    assert hashlib.sha1(texts["record"].encode()).hexdigest() == texts["record_sha1"]
    blanked = path.read_bytes().replace(texts["sha1"].encode(), b"0" * 40)
    assert hashlib.sha1(blanked).hexdigest() == texts["sha1"]
    assert len(list(run.folder.iterdir())) == 2


def test_load_is_the_identity(tmp_path):
    run = make_run(tmp_path)
    advance(run, 5)
    checkpoint_id = save(run)
    advance(run, 40)  # past an epoch's end
    other = make_run(tmp_path, name="test-111111")
    main.init_weights(other.model, 2)
    choose(tmp_path).restore(other)
    advance(other, 40)
    mine = dict(main.tree_flatten([run.model.state, run.optimizer.state]))
    theirs = dict(main.tree_flatten([other.model.state, other.optimizer.state]))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert mx.array_equal(value, theirs[name]), name
    assert save(run) == save(other) != checkpoint_id


def test_no_password_is_saved(tmp_path, monkeypatch):
    """A checkpoint names the command that made it, and may be given away."""
    monkeypatch.setattr("sys.argv", ["main.py", "--mirror=https://me:passw0rd@example.org/x"])
    run = make_run(tmp_path)
    save(run)
    [checkpoint] = main.list_checkpoints(tmp_path)
    assert checkpoint.command == ["main.py", "--mirror=https://example.org/x"]
    assert b"passw0rd" not in checkpoint.metadata_path.read_bytes()


def test_a_tokenizer_above_the_limit_of_a_header(tmp_path):
    """MLX reads no header of 100 MB, so the tokenizer must not be in it."""
    words = [f"{i:010000}" for i in range(10_100)]
    tokenizer = WordTokenizer(["<eos>", "<unk>", *words])
    run = make_run(tmp_path, tokenizer=tokenizer, dim=4, num_heads=1)
    save(run)
    path = run.folder / f"{run.checkpoint_id}.metadata"
    assert path.stat().st_size > 10**8
    contents = choose(tmp_path)
    assert contents.tokenizer.vocabulary == tokenizer.vocabulary
    contents.restore(run)


def test_arrays_are_read_from_the_start_of_a_file(tmp_path, monkeypatch):
    """On macOS, what /dev/fd opens begins where the file's descriptor is, and moves it."""
    run = make_run(tmp_path)
    checkpoint_id = save(run)
    load = main.mx.load

    def load_as_on_macos(path, **options):
        descriptor = int(path.rpartition("/")[2])
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0
        arrays = load(path, **options)
        main.mx.eval(arrays)
        os.lseek(descriptor, 100, os.SEEK_SET)
        return arrays

    monkeypatch.setattr(main.mx, "load", load_as_on_macos)
    with open(run.folder / f"{checkpoint_id}.metadata", "rb") as file:
        for read in (file.read, lambda: main.read_texts(file), lambda: file.read(10)):
            read()
            assert main.load_arrays(file)
            record = json.loads(main.read_texts(file)["record"])
            assert record["id"] == checkpoint_id


# ---- Saving -------------------------------------------------------------------------------------


def test_a_file_system_that_syncs_no_folder(tmp_path, monkeypatch):
    """All is saved that can be: it must not be tried for ever."""
    fsync = os.fsync

    def no_folder(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folder)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    run = make_run(tmp_path)
    save(run)
    assert listed(tmp_path) == [run.checkpoint_id]


def test_vanished_folder_is_made_again(tmp_path):
    run = make_run(tmp_path / "lm")
    first = save(run)
    shutil.rmtree(tmp_path / "lm")
    assert save(run) == first
    assert is_intact(tmp_path / "lm", first)


def test_leftovers_of_a_killed_save(tmp_path):
    """They are removed from a run's own folder alone, and nothing else is."""
    run = make_run(tmp_path)
    other = make_run(tmp_path, name="test-111111")
    for each in (run, other):
        save(each)
        for name in (".0123456789abcdef.new", f"{'1' * 40}.metadata"):
            (each.folder / name).write_bytes(b"left by a killed save")
    own = {path.name for path in run.folder.glob(f"{run.checkpoint_id}.*")}
    foreign = {"notes.new", "a.metadata", ".short.new", "model.safetensors", ".hidden"}
    for name in foreign:
        (run.folder / name).write_bytes(b"")
    main.remove_unfinished(run.folder)
    assert {path.name for path in run.folder.iterdir()} == own | foreign
    assert len(list(other.folder.iterdir())) == 4


# ---- Damage -------------------------------------------------------------------------------------


def test_240_damages_are_all_found(tmp_path):
    """Cut short or with a bit flipped anywhere, in either file; no way of reading it crashes."""
    run = make_run(tmp_path)
    checkpoint_id = save(run)
    chance = random.Random(0)
    for trial in range(240):
        kind = "safetensors" if trial % 2 else "metadata"
        path = run.folder / f"{checkpoint_id}.{kind}"
        whole = path.read_bytes()
        if trial % 4 < 2:
            path.write_bytes(whole[: chance.randrange(len(whole))])
        else:
            end = len(whole)
            if trial % 8 >= 6:  # in the header, where it does the most harm
                end = 8 + int.from_bytes(whole[:8], "little")
            at = chance.randrange(end)
            flipped = whole[at] ^ 1 << chance.randrange(8)
            path.write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
        assert not is_intact(tmp_path, checkpoint_id), f"trial {trial}"
        path.write_bytes(whole)
    assert is_intact(tmp_path, checkpoint_id)


def test_swapped_metadata_is_found(tmp_path, capsys):
    """Two whole files that do not belong together."""
    run = make_run(tmp_path)
    first, second = train_and_save(run, 2)
    shutil.copy(run.folder / f"{first}.metadata", run.folder / f"{second}.metadata")
    [checkpoint] = main.list_checkpoints(tmp_path, warn=True)
    assert checkpoint.id == first
    assert f"belongs to {first[:12]}" in capsys.readouterr().err


def test_damage_is_passed_over_for_the_next_older_one(tmp_path, capsys):
    run = make_run(tmp_path)
    saved = train_and_save(run, 3)
    assert chosen_id(tmp_path) == saved[2]
    spoil(run.folder / f"{saved[2]}.safetensors")
    spoil(run.folder / f"{saved[1]}.metadata")
    assert chosen_id(tmp_path) == saved[0]
    first, second = capsys.readouterr().err.splitlines()
    assert saved[2][:12] in first
    assert saved[1][:12] in second
    (run.folder / f"{saved[0]}.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="--new_model"):
        choose(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "metadata"])
def test_a_file_that_is_damaged_after_the_verification(tmp_path, kind):
    """MLX raises a RuntimeError then."""
    run = make_run(tmp_path)
    save(run)
    contents = choose(tmp_path)
    os.truncate(run.folder / f"{run.checkpoint_id}.{kind}", 100)
    with pytest.raises(RunError, match=run.checkpoint_id[:12]) as error:
        contents.restore(run)
    assert "\n" not in str(error.value)


def test_what_is_open_is_read_even_if_it_is_deleted(tmp_path):
    """What was verified is what is read."""
    run = make_run(tmp_path)
    save(run)
    wanted = {}
    for name, array in main.tree_flatten(run.model.parameters()):
        wanted[name] = np.array(array)
    contents = choose(tmp_path)
    contents.checkpoint.delete()
    assert not list(run.folder.iterdir())
    model = contents.load_model()
    for name, array in main.tree_flatten(model.parameters()):
        np.testing.assert_array_equal(np.array(array), wanted[name])
    assert contents.tokenizer.to_dict() == run.dataset.tokenizer.to_dict()


# ---- Choosing one -------------------------------------------------------------------------------


def test_an_id_of_two_runs_names_the_first(tmp_path):
    """A branch begins with a copy, and has other flags."""
    [saved] = train_and_save(make_run(tmp_path, name="ptb-0a1b2c"), 1)
    assert train_and_save(make_run(tmp_path, name="ptb-3d4e5f"), 1) == [saved]
    checkpoints = main.list_checkpoints(tmp_path)
    assert main.named_checkpoint(tmp_path, checkpoints, saved[:12]).run == "ptb-0a1b2c"


def test_best_needs_a_score(tmp_path):
    run = make_run(tmp_path)
    train_and_save(run, 1)
    with pytest.raises(UsageError, match=f"{run.name}, the run saved last, has no score yet"):
        choose(tmp_path, identifier="best")
    score(run, 2.5)
    train_and_save(run, 1)
    assert "best: valid 2.5000 nats at iteration 1\n" in main.describe_end(run, None)


def test_identifiers(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint in .*: train a model first"):
        choose(tmp_path, identifier="latest")
    run = make_run(tmp_path, name="ptb-0a1b2c")
    other = make_run(tmp_path, name="ptb-3d4e5f", seed=5)
    saved = []
    for i, each in enumerate((run, other, run)):
        advance(each)
        score(each, 1.0 + i)
        saved.append(save(each))
    expected = {
        saved[1]: 1,
        saved[1][:6]: 1,
        "ptb-3d4e5f": 1,
        "ptb-0a1b2c": 2,
        "latest": 2,
        "best": 0,
    }
    for identifier, place in expected.items():
        assert chosen_id(tmp_path, identifier=identifier) == saved[place], identifier
    with pytest.raises(UsageError) as error:
        choose(tmp_path, identifier="zzz")
    assert "ptb-0a1b2c; ptb-3d4e5f" in str(error.value)
    with pytest.raises(UsageError, match="--dim 32 contradicts .* 16"):
        choose(tmp_path, identifier="latest", dim=32)


def test_a_flag_younger_than_the_checkpoint_has_its_default(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    with monkeypatch.context() as older:
        known = [name for name in main.INHERITED if name not in ("mlp", "grad_clip")]
        older.setattr(main, "INHERITED", known)
        checkpoint_id = save(run)
    [checkpoint] = main.list_checkpoints(tmp_path)
    assert chosen_id(tmp_path, **checkpoint.flags, mlp="relu2") == checkpoint_id
    assert choose(tmp_path, **checkpoint.flags, mlp="gelu") is None


def test_equal_checkpoints_of_two_runs_are_independent(tmp_path):
    """Each has a folder, with its own progress and its own scores."""
    first = make_run(tmp_path, name="test-aaaaaa")
    second = make_run(tmp_path, name="test-bbbbbb")
    second.batches.begin_epoch(3)
    score(first, 1.5)
    score(second, 2.5)
    checkpoint_id = save(first)
    assert save(second) == checkpoint_id
    assert chosen_id(tmp_path, identifier=checkpoint_id) == checkpoint_id
    for each in (first, second):
        contents = choose(tmp_path, identifier=each.name)
        again = make_run(tmp_path, name=each.name)
        contents.restore(again)
        assert again.scores == each.scores
        assert again.batches.epoch == each.batches.epoch
        np.testing.assert_array_equal(again.batches.perm, each.batches.perm)
    shutil.rmtree(second.folder)
    assert is_intact(tmp_path, checkpoint_id)


# ---- Locks --------------------------------------------------------------------------------------


def test_pruning_waits_for_readers(tmp_path):
    """While one reads, all stays; afterwards the next pruning deletes it. Readers share."""
    run = make_run(tmp_path, keep=1)
    saved = train_and_save(run, 3)
    with main.lock(tmp_path, fcntl.LOCK_SH), main.lock(tmp_path, fcntl.LOCK_SH | fcntl.LOCK_NB):
        main.prune(run)
        assert listed(tmp_path) == saved[::-1]
    main.prune(run)
    assert listed(tmp_path) == [saved[2]]


def test_a_command_holds_the_lock_while_it_starts(tmp_path, text, monkeypatch):
    """Nobody can delete what it has listed."""
    line = ["--text", text, *TINY, "--num_iters", 2, "--save_dir", tmp_path / "lm"]
    run(*line)
    load_data = main.load_data

    def load_data_beside_a_pruner(*arguments):
        exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
        with pytest.raises(BlockingIOError), main.lock(tmp_path / "lm", exclusive):
            pass
        return load_data(*arguments)

    monkeypatch.setattr(main, "load_data", load_data_beside_a_pruner)
    assert main.main([*map(str, line), "--num_iters", "3"]) == 0


# ---- Pruning ------------------------------------------------------------------------------------


def test_prune_keeps_what_the_run_was_resumed_from(tmp_path):
    """Newer ones may be damaged, which their names and records do not show."""
    run = make_run(tmp_path, keep=1)
    saved = train_and_save(run, 3)
    (run.folder / f"{saved[2]}.safetensors").write_bytes(b"")
    run.checkpoint_id = saved[1]
    main.prune(run)
    assert {path.stem for path in run.folder.glob("*.safetensors")} == {*saved[1:]}


def test_prune_keeps_the_best_of_a_run_that_goes_on_from_before_its_newest(tmp_path):
    """The newest is damaged, but its record says that it is the best."""
    run = make_run(tmp_path, keep=1)
    saved = []
    for nats in (1.0, 3.0, 0.5):
        advance(run)
        score(run, nats)
        saved.append(save(run))
    spoil(run.folder / f"{saved[2]}.safetensors")
    again = make_run(tmp_path, keep=1)
    choose(tmp_path).restore(again)
    assert again.checkpoint_id == saved[1]
    again.saved = run.saved
    again.model.update(main.tree_map(lambda array: array * 2, again.model.parameters()))
    for nats in (4.0, 5.0):
        advance(again)
        score(again, nats)
        save(again)
        main.prune(again)
    assert is_intact(tmp_path, saved[0])


def test_pruning_waits_for_one_good_step(tmp_path, text):
    """The checkpoint before the newest is needed if the newest cannot be trained on."""
    line = ["--text", text, *TINY, "--steps_per_save", 2, "--keep", 1]
    line += ["--save_dir", tmp_path / "lm"]
    run(*line, "--num_iters", 4)
    assert len(ids(tmp_path / "lm")) == 2
    run(*line, "--num_iters", 5)
    first, second = main.list_checkpoints(tmp_path / "lm")
    assert [first.iteration, second.iteration] == [5, 4]


# ---- Branches, origins, divergence --------------------------------------------------------------


def test_a_branch_has_its_own_folder(tmp_path, text):
    """It is saved at once, and the run that it left stays as it is."""
    line = ["--text", text, *TINY, "--steps_per_save", 2, "--num_iters", 6]
    line += ["--steps_per_report", 1]
    line += ["--save_dir", tmp_path]
    run(*line)
    older = main.list_checkpoints(tmp_path)[1]
    before = {path: path.read_bytes() for path in older.folder.iterdir()}
    out, _ = run("--identifier", older.id, "--learning_rate", 0.1, "--save_dir", tmp_path)
    assert "A new branch" in out
    assert {path: path.read_bytes() for path in older.folder.iterdir()} == before
    [newest, first] = [each for each in main.list_checkpoints(tmp_path) if each.run != older.run]
    assert first.id == older.id
    assert newest.id not in [path.stem for path in before]
    assert newest.flags["learning_rate"] == 0.1
    logged = [row["iteration"] for row in rows_of(newest.folder / "log.csv")]
    assert logged and min(logged) > older.iteration


def test_the_base_of_a_lora_run_cannot_be_pruned_while_that_starts(tmp_path, text, monkeypatch):
    line = ["--text", text, *TINY, "--save_dir", tmp_path]
    run(*line, "--num_iters", 2)
    [base] = main.list_checkpoints(tmp_path)
    pruner = make_run(tmp_path, name=base.run, keep=1)
    load_data = main.load_data

    def load_data_beside_a_pruner(*arguments):
        train_and_save(pruner, 2)
        main.prune(pruner)
        return load_data(*arguments)

    monkeypatch.setattr(main, "load_data", load_data_beside_a_pruner)
    tuned = ["--init_from", base.id, "--lora_rank", 2, "--text", text, "--num_iters", 2]
    tuned += ["--max_tokens", 1, "--save_dir", tmp_path]
    assert main.main([*map(str, tuned)]) == 0
    main.prune(pruner)
    assert base.id in listed(tmp_path)
    [newest, *_] = main.list_checkpoints(tmp_path)
    run("--identifier", newest.run, "--prompt", "a", "--save_dir", tmp_path)


def test_no_pickle_no_eval():
    """Nothing in a file can make the program run it."""
    paths = [ROOT / "main.py", ROOT / "datasets.py", *sorted(ROOT.glob("extras/*.py"))]
    assert len(paths) > 8
    source = "".join(path.read_text() for path in paths)
    source = source.replace("mx.eval(", "").replace("_exec(", "")
    for forbidden in ("pickle", "eval(", "exec(", "np.load", "marshal", "__import__"):
        assert forbidden not in source, forbidden


def test_damaged_newest_is_named_and_passed_over(tmp_path, text):
    line = ["--text", text, *TINY, "--num_iters", 60, "--steps_per_save", 20]
    line += ["--save_dir", tmp_path]
    run(*line)
    newest = ids(tmp_path)[0]
    path = run_folder(tmp_path) / f"{newest}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    named = ["--inference", "--identifier", newest, "--save_dir", tmp_path]
    _, err = run(*named, status=1)
    assert err.count("\n") == 1
    assert "is damaged" in err
    _, err = run("--inference", "--save_dir", tmp_path, input="line 5")
    assert newest[:12] in err
    assert "iteration 40" in err
    out, err = run(*line)
    assert newest[:12] in err
    assert "from iteration 40" in out
    assert ids(tmp_path)[0] == newest, "the same steps end in the same bytes"
    main.list_checkpoints(tmp_path)[0].open()
