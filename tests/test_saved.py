"""Runs that an earlier commit has saved: each command does with them what it did then."""

import re
import shutil

import pytest
from conftest import ROOT, begin, run, saved
from saved.make import COMMANDS, FOLDER, HERE, write_texts
from support.code import hash_of_code, what_counts

PLAIN, OWN, LORA, BRANCH = COMMANDS
ENDS = {PLAIN: 4, OWN: 4, LORA: 2, BRANCH: 6}


@pytest.fixture
def folder(tmp_path):
    """A copy of the folder of these runs, whose texts lie where they have recorded them."""
    write_texts()
    for name in COMMANDS:
        shutil.copytree(HERE / name, tmp_path / name)
    return tmp_path


def test_a_bare_command_goes_on_with_the_run_saved_last(folder):
    name, iteration, said = begin("--save_dir", folder, "--num_iters", 8)
    assert (name, iteration) == (BRANCH, 6)
    assert "resumed  with --num_iters 6 -> 8" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command(name, folder):
    """It goes on; once the code has changed, it begins a run beside it, but for a branch."""
    begun, iteration, said = begin(*COMMANDS[name].split(), "--save_dir", folder)
    code = what_counts(saved(folder, name)[-1].segments[-1].code)
    is_same = all(hash_of_code((ROOT / path).read_text()) == code[path] for path in code)
    if is_same or name == BRANCH:
        assert (begun, iteration) == (name, ENDS[name])
        assert f"Run complete ({ENDS[name]}/{ENDS[name]})" in said
    else:
        assert (begun, iteration) == (f"{name}.2", 0)
        assert "was trained by other code (" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_identifier(name, folder):
    begun = begin("--identifier", name, "--num_iters", 8, "--save_dir", folder)
    assert begun[:2] == (name, ENDS[name])


def test_a_branch(folder):
    oldest = saved(folder, PLAIN)[-1]
    _, iteration, said = begin("--identifier", oldest.id, "--save_dir", folder)
    assert iteration == 2 and f"This is a branch of {PLAIN}" in said


@pytest.mark.parametrize("name", [PLAIN, OWN])
def test_a_step_between_checkpoints(name, folder):
    """It is computed again, or it is said what has changed."""
    _, _, said = begin("--identifier", name, "--save_dir", folder)
    line = ["--identifier", f"{name}@3", "--evaluate", "valid", "--save_dir", folder]
    if re.search(r"Code changed|Environment changed \((?!support \w+ -> \w+\))", said):
        _, err = run(*line, status=2)
        assert re.search(f"step 3 of {name} was computed (by other code|with other versions)", err)
    else:
        _, err = run(*line)
        assert err.startswith(f"{name}@3, iteration 3, checkpoint ")


@pytest.mark.parametrize("name", COMMANDS)
def test_init_from(name, folder):
    text = f"{FOLDER}/notes" if name == OWN else f"{FOLDER}/text.txt"
    line = ["--text", text, "--init_from", name, "--num_iters", 1, "--seed", 7]
    begun, iteration, _ = begin(*line, "--save_dir", folder)
    assert begun not in COMMANDS and iteration == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_evaluate(name, folder):
    """The loss is the one that the run has recorded for the whole text."""
    out, err = run("--identifier", name, "--evaluate", "valid", "--save_dir", folder)
    [nats] = re.findall(r"^valid ([\d.]+) nats", out, re.M)
    [newest, *_] = saved(folder, name)
    assert err.startswith(f"{newest}, in {folder}")
    assert float(nats) == pytest.approx(newest.evaluation.loss, abs=0.2)


def test_list(folder):
    out, err = run("--list", "--save_dir", folder)
    rows = dict(re.findall(r"  (text-\w+) +[\w.]+ +([\d,]+ of [\d,]+) ", out))
    assert rows == {name: f"{end} of {end}" for name, end in ENDS.items()} and not err
