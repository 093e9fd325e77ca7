"""One command, one run.

Which run a command begins or resumes, and the commands that the program prints.
"""

import re
import shlex
import shutil
import signal

import pytest
from conftest import TINY, flags, ids, newest, resumed_by, run, run_folder, run_folders, start
from test_interrupts import wait_for

import main

RUN = r"run +(\S+), from iteration ([\d,]+) "


def begin(*line, **options):
    """Types a command that trains: the run's name, where it began, and what was said."""
    out, _ = run(*line, **options)
    name, iteration = re.search(RUN, out).groups()
    return name, int(iteration.replace(",", "")), out


# Sweeps

SWEEPS = {
    "learning_rate": ["3e-4", "1e-3", "1e-2"],  # the first is the default
    "batch_size": ["2", "4"],
    "dropout": ["0", "0.1"],
}


@pytest.mark.parametrize("flag", SWEEPS)
def test_a_sweep_trains_a_run_for_each_value(tmp_path, text, flag):
    """The same loop again resumes each run, and once more finds them complete."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path]
    begun = {}
    for value in SWEEPS[flag]:
        name, iteration, out = begin(*line, f"--{flag}", value, "--num_iters", 10)
        assert iteration == 0
        assert ("\nStarting a new run: " in out) == bool(begun)
        begun[value] = name
    assert len(set(begun.values())) == len(SWEEPS[flag])
    for value in SWEEPS[flag]:
        name, iteration, out = begin(*line, f"--{flag}", value, "--num_iters", 20)
        assert (name, iteration) == (begun[value], 10)
        assert "resumed  with --num_iters 10 -> 20\n" in out
    before = sorted(ids(tmp_path))
    for value in reversed(SWEEPS[flag]):
        name, iteration, out = begin(*line, f"--{flag}", value, "--num_iters", 20)
        assert (name, iteration) == (begun[value], 20)
        assert "Run complete (20/20). " in out
        assert "\nsaved " not in out
    assert sorted(ids(tmp_path)) == before
    for value, name in begun.items():
        [last] = main.list_run(tmp_path / name)[:1]
        assert last.flags[flag] == float(value)


def test_a_sweep_that_was_interrupted_goes_on(tmp_path, text):
    """In the middle of its second run: the first is complete, the third not begun."""
    values = ["1e-3", "3e-3", "1e-2"]
    line = ["--text", text, *TINY, "--dropout", 0.1, "--num_iters", 200]
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    undisturbed = []
    for value in values:
        run(*line, "--learning_rate", value, "--save_dir", whole)
        undisturbed.append(ids(whole)[0])

    first, _, _ = begin(*line, "--learning_rate", values[0], "--save_dir", parts)
    process = start(*line, "--learning_rate", values[1], "--save_dir", parts)
    wait_for(process, "20/200 ")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    stopped = newest(parts)
    assert 20 <= stopped.iteration < 200

    found = []
    for value in values:
        name, iteration, _ = begin(*line, "--learning_rate", value, "--save_dir", parts)
        found.append((name, iteration))
    assert found[0] == (first, 200)
    assert found[1] == (stopped.run, stopped.iteration)
    third, iteration = found[2]
    assert iteration == 0
    assert third not in (first, stopped.run)
    for (name, _), expected in zip(found, undisturbed):
        assert main.list_run(parts / name)[0].id == expected


# Which run a command names


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A folder with a run that has done 10 of 20 steps, and how it was typed."""
    folder = tmp_path_factory.mktemp("half_way")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    line = ["--text", text, *TINY, "--learning_rate", 0.01, "--num_iters", 20]
    run(*line, "--max_minutes", 1e-9, "--save_dir", folder / "lm")
    return folder / "lm", line


def copy_of(half_way, tmp_path):
    """A copy of that folder that a test may change, and how the run in it was typed."""
    folder, line = half_way
    shutil.copytree(folder, tmp_path / "lm")
    return tmp_path / "lm", [*line, "--save_dir", tmp_path / "lm"]


def test_a_run_is_never_continued_with_another_value(half_way, tmp_path):
    """Neither typed nor from a file, unless --identifier names it."""
    folder, line = copy_of(half_way, tmp_path)
    [stopped] = main.list_checkpoints(folder)
    assert 0 < stopped.iteration < 20
    (tmp_path / "flags.yaml").write_text("beta2: 0.95\n")
    others = [["--learning_rate", 0.02], ["--config", tmp_path / "flags.yaml"], ["--seed", 7]]
    for other in others:
        name, iteration, out = begin(*line, *other)
        assert name != stopped.run
        assert iteration == 0
        assert "Run complete (20/20). " in out
    assert main.list_run(stopped.folder) == [stopped], "it was not touched"

    name, iteration, _ = begin(*line)
    assert (name, iteration) == (stopped.run, stopped.iteration)
    more = ["--num_iters", 30, "--learning_rate", 0.02]
    name, iteration, out = begin(*line, *more, "--identifier", stopped.run)
    assert (name, iteration) == (stopped.run, 20)
    [told] = re.findall("^resumed  with (.*)", out, re.M)
    assert set(told.split(", ")) == {"--num_iters 20 -> 30", "--learning_rate 0.01 -> 0.02"}
    changed = main.list_run(stopped.folder)[0]
    assert changed.flags["learning_rate"] == 0.02


def test_a_run_that_was_changed_is_not_what_its_first_command_names(half_way, tmp_path):
    """That command trains what it always did, the whole way at its learning rate."""
    folder, line = copy_of(half_way, tmp_path)
    once = tmp_path / "once"
    run(*line, "--save_dir", once)
    run(*line, "--identifier", "latest", "--learning_rate", 0.1)
    changed = newest(folder)
    name, _, _ = begin(*line)
    assert name != changed.run
    assert newest(folder).id == ids(once)[0] != changed.id
    again, iteration, _ = begin(*line)
    assert (again, iteration) == (name, 20)


def test_without_flags_the_run_saved_last_goes_on(half_way, tmp_path):
    folder, line = copy_of(half_way, tmp_path)
    [first] = run_folders(folder)
    second, _, _ = begin(*line, "--learning_rate", 0.02)
    name, _, _ = begin("--save_dir", folder, "--num_iters", 30)
    assert name == second
    begin(*line, "--num_iters", 30)
    name, iteration, _ = begin("--save_dir", folder, "--num_iters", 40)
    assert (name, iteration) == (first.name, 30)


CANDIDATES = ["1", "2", "1000", "0.5", "0", "other", "none"]


def another_value(name, held):
    """A value of a flag that is not the one held, as the command line would give it."""
    [action] = [each for each in main.make_parser()._actions if f"--{name}" in each.option_strings]
    if action.nargs == 0:
        return not held
    for candidate in action.choices or CANDIDATES:
        try:
            value = main.parse([f"--{name}={candidate}"])[name]
            settled = getattr(flags(**{name: value}), name)
        except main.UsageError:
            continue
        if settled != held:
            return value
    raise AssertionError(f"no other value of {name} was found")


@pytest.mark.parametrize("name", main.INHERITED)
def test_each_flag_that_changes_weights_makes_another_run(half_way, name):
    """And no other flag does."""
    folder, _ = half_way
    checkpoints = main.list_checkpoints(folder)
    held = getattr(main.settle({}, checkpoints[0].flags), name)
    changed = {"save_dir": str(folder), name: another_value(name, held)}
    given = checkpoints[0].flags | changed
    if name == "dataset":
        del given["text"]  # it comes first
    found = resumed_by(checkpoints, **given)
    if name not in main.SHAPING:
        assert found == checkpoints
        return
    assert found == []
    settled = flags(**given)
    value = getattr(settled, name)
    told = main.describe_other(checkpoints[0], settled)
    its_value = f"no --{name}" if held is None else f"--{name} {held}"
    assert f"{its_value} instead of {value}" in told

    if name in main.FIXED:
        with pytest.raises(main.UsageError) as error:
            resumed_by(checkpoints, **changed, identifier=checkpoints[0].run)
        assert f"--{name} {value} contradicts" in str(error.value)
        has = "was made without it" if held is None else f"has {held}"
        assert f"which {has}" in str(error.value)
    else:
        named = resumed_by(checkpoints, **changed, identifier=checkpoints[0].run)
        assert named == checkpoints


@pytest.mark.parametrize("name", main.SHAPING)
def test_a_flag_that_a_run_has_must_be_given_again(half_way, name):
    """Else a command would resume a run with a flag that nobody typed."""
    folder, _ = half_way
    checkpoints = main.list_checkpoints(folder)
    its_flags = checkpoints[0].flags
    place = {"save_dir": str(folder)}
    assert resumed_by(checkpoints, **its_flags, **place) == checkpoints
    given = {key: value for key, value in its_flags.items() if key != name}
    held = getattr(flags(**its_flags, **place), name)
    is_default = getattr(flags(**given, **place), name) == held
    expected = checkpoints if is_default else []
    assert resumed_by(checkpoints, **given, **place) == expected


# What the program prints to be typed


ODD_FOLDER = "it's my runs; $HOME"


def typed(pattern, said):
    """The arguments of the command that follows `pattern` in what the program said."""
    [command] = re.findall(pattern + r"(python main\.py .*)", said)
    _, _, *arguments = shlex.split(command)
    return arguments


@pytest.fixture
def line(text, tmp_path):
    """A command that trains a small model in folders with odd names."""
    folders = ["--save_dir", tmp_path / ODD_FOLDER, "--data_dir", tmp_path / "my data"]
    return ["--text", text, *TINY, "--max_tokens", 4, *folders]


def test_commands_of_a_complete_run(line, tmp_path):
    name, _, out = begin(*line, "--num_iters", 10)
    assert out.splitlines()[-2].startswith("Run complete (10/10). To sample: ")
    assert out.splitlines()[-1].startswith("To train on: ")
    sample, err = run(*typed("To sample: ", out), input="line 5\n")
    assert sample.strip()
    assert err == f"{newest(tmp_path / ODD_FOLDER)}, in {tmp_path / ODD_FOLDER}\n"
    resumed, iteration, out = begin(*typed("To train on: ", out))
    assert (resumed, iteration) == (name, 10)
    assert "Run complete (20/20). " in out


def test_commands_name_no_folder_that_was_not_given(text, tmp_path):
    """The default is ./runs, wherever that is."""
    place = {"cwd": tmp_path}
    folders = ["--data_dir", "data"]
    name, _, out = begin("--text", text, *TINY, "--num_iters", 10, *folders, **place)
    assert run_folder(tmp_path / "runs").name == name
    arguments = typed("To train on: ", out)
    assert "--save_dir" not in arguments
    resumed, iteration, _ = begin(*arguments, **place)
    assert (resumed, iteration) == (name, 10)


def test_a_shorter_run_than_it_is_goes_on(line):
    name, _, _ = begin(*line, "--num_iters", 20)
    _, _, out = begin(*line, "--num_iters", 5)
    assert "Run complete (20/5). " in out
    resumed, iteration, out = begin(*typed("To train on: ", out))
    assert (resumed, iteration) == (name, 20)
    assert "saved " in out


def test_a_run_out_of_patience_goes_on(line):
    """With a learning rate of 0 no score is better than the first."""
    patience = ["--steps_per_eval", 2, "--learning_rate", 0, "--patience", 2]
    name, _, out = begin(*line, *patience, "--num_iters", 100)
    assert "Ended at iteration 6 of 100. To sample: " in out
    resumed, iteration, out = begin(*typed("To train on: ", out))
    assert (resumed, iteration) == (name, 6)
    assert "Ended at iteration 10 of 100. To sample: " in out


def test_a_run_out_of_time_goes_on(line):
    name, _, out = begin(*line, "--max_minutes", 1e-9, "--num_iters", 30)
    stopped = int(re.search(r"Ended at iteration (\d+) of 30\. To sample: ", out).group(1))
    assert stopped < 30
    resumed, iteration, out = begin(*typed("To train on: ", out))
    assert (resumed, iteration) == (name, stopped)
    assert "Run complete (30/30). " in out, "it is as long as it was to be"


@pytest.mark.parametrize("more", [[], ["--new_model"]])
def test_command_of_a_run_that_was_stopped(line, more, tmp_path):
    """It goes on exactly."""
    folder = tmp_path / ODD_FOLDER
    line += ["--dropout", 0.1]
    run(*line, "--num_iters", 200, "--save_dir", tmp_path / "whole")
    process = start(*line, *more, "--num_iters", 200)
    wait_for(process, "20/200 ")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    stopped = newest(folder)
    last = out.splitlines()[-1]
    assert last.startswith(f"Stopped at iteration {stopped.iteration}. ")
    name, iteration, _ = begin(*typed("To resume: ", last))
    assert (name, iteration) == (stopped.run, stopped.iteration)
    assert ids(folder)[0] == ids(tmp_path / "whole")[0]


def test_command_of_the_run_that_is_not_resumed(line):
    name, _, _ = begin(*line, "--num_iters", 10)
    other, _, out = begin(*line, "--num_iters", 10, "--learning_rate", 0.01, "--dropout", 0.1)
    assert other != name
    told = f"Starting a new run: the last one, {name}, has --learning_rate 0.0003 instead of 0.01, "
    assert told + "--dropout 0.0 instead of 0.1. To resume that one: " in out
    arguments = typed("To resume that one: ", out)
    resumed, iteration, out = begin(*arguments, "--num_iters", 20)
    assert (resumed, iteration) == (name, 10)
    assert "resumed  with --num_iters 10 -> 20\n" in out


def test_command_of_a_divergence(line, tmp_path):
    """It goes back to a checkpoint from which a step was taken."""
    line += ["--learning_rate", 0.001, "--lr_warmup", 0]
    name, _, _ = begin(*line, "--num_iters", 3)
    [good] = main.list_checkpoints(tmp_path / ODD_FOLDER)
    more = ["--num_iters", 30, "--steps_per_save", 1, "--identifier", name]
    _, err = run(*line, *more, "--weight_decay", 1e30, status=1)
    arguments = typed("choose a lower --learning_rate or --grad_clip, and go back with ", err)
    branch, iteration, out = begin(*arguments, "--learning_rate", 0.0003, "--max_tokens", 1)
    assert branch != name
    assert iteration == good.iteration
    assert "--learning_rate 0.001 -> 0.0003" in out
    assert "Run complete (3/3). " in out
    _, iteration, out = begin(*typed("To train on: ", out))
    assert iteration == 3
    assert "Run complete (6/6). " in out


# Folders of runs


def test_a_copied_run_is_a_run_of_its_own(half_way, tmp_path):
    folder, line = copy_of(half_way, tmp_path)
    [original] = main.list_checkpoints(folder)
    copy = folder / "before-the-change.1"
    shutil.copytree(original.folder, copy)
    listed, _ = run("--list", "--save_dir", folder)
    assert f"\n{original.run} " in listed
    assert f"\n{copy.name} " in listed

    name, iteration, out = begin(*line, "--identifier", copy.name)
    assert (name, iteration) == (copy.name, original.iteration)
    assert "A new branch" not in out
    assert main.list_run(original.folder) == [original], "it was not touched"
    assert (copy / "log.csv").exists()
    run(*line, "--identifier", original.run)
    assert main.list_run(copy)[0].id == main.list_run(original.folder)[0].id

    shutil.rmtree(copy)
    name, iteration, _ = begin(*line, "--num_iters", 30)
    assert (name, iteration) == (original.run, 20)


def test_a_renamed_run_goes_on_under_its_name(half_way, tmp_path):
    folder, line = copy_of(half_way, tmp_path)
    [original] = main.list_checkpoints(folder)
    original.folder.rename(folder / "keep_me")
    name, iteration, out = begin(*line)
    assert (name, iteration) == ("keep_me", original.iteration)
    assert "--identifier keep_me " in out.splitlines()[-1]
    assert [path.name for path in run_folders(folder)] == ["keep_me"]
    answer, err = run("--prompt", "the", "--identifier", "keep_me", "--save_dir", folder)
    assert answer.strip()
    assert err.startswith("keep_me, iteration 20, ")


def test_a_run_moved_to_another_folder_goes_on_there(half_way, tmp_path):
    """Its folder is all of it: the result is that of a run that stayed."""
    folder, line = copy_of(half_way, tmp_path)
    [original] = main.list_checkpoints(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(original.folder, elsewhere / original.run)
    name, iteration, _ = begin(*line, "--save_dir", elsewhere)
    assert (name, iteration) == (original.run, original.iteration)
    run(*line)
    assert ids(elsewhere)[0] == ids(folder)[0]


def test_a_command_of_one_run_leaves_the_others_alone(half_way, tmp_path):
    """Pruning deletes what is its own run's."""
    folder, line = copy_of(half_way, tmp_path)
    [original] = main.list_checkpoints(folder)
    copy = folder / "copy"
    shutil.copytree(original.folder, copy)
    before = {path: path.read_bytes() for path in original.folder.iterdir()}
    saving = ["--steps_per_save", 1, "--keep", 1, "--identifier", "copy"]
    run(*line, *saving, "--num_iters", 30)
    after = {path: path.read_bytes() for path in original.folder.iterdir()}
    assert after == before
    assert original.id not in {checkpoint.id for checkpoint in main.list_run(copy)}


def test_the_same_command_resumes_its_own_run(tmp_path, text):
    """Also where a run that was begun with more flags agrees with it and was saved later."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path]
    plain, _, _ = begin(*line, "--num_iters", 5)
    other, _, _ = begin(*line, "--dropout", 0.1, "--num_iters", 5)
    again, iteration, out = begin(*line, "--num_iters", 10)
    assert again == plain != other
    assert iteration == 5
    assert "\nkept " not in out
    again, iteration, _ = begin(*line, "--dropout", 0.1, "--num_iters", 10)
    assert (again, iteration) == (other, 5)
    run("--prompt", "the", "--text", text, "--save_dir", tmp_path, "--max_tokens", 1)


def test_a_flag_less_is_another_run(tmp_path, text):
    """A baseline never resumes the run that it is the baseline of."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path]
    name, _, _ = begin(*line, "--dropout", 0.1, "--optimizer", "muon", "--num_iters", 5)
    baseline, iteration, out = begin(*line, "--num_iters", 10)
    assert baseline != name
    assert iteration == 0
    told = f"the last one, {name}, has --optimizer muon instead of adamw, "
    assert told + "--dropout 0.1 instead of 0.0. To resume that one: " in out
    again, iteration, _ = begin(*line, "--num_iters", 20)
    assert (again, iteration) == (baseline, 10)
