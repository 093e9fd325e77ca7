"""Any step of a run, computed again, is that of a run that has saved every step."""

import math
import random
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TINY, begin, run, run_extra, run_folder, saved

RUN = TINY + "--num_iters 30 --lr_warmup 5 --learning_rate 1e-2 --keep 99 --sample_tokens 0".split()


def id_at(folder, step, status=0):
    """The beginning of the id of the checkpoint that latest@STEP names, or the mistake."""
    line = [f"--identifier=latest@{step}", "--prompt=a", "--max_tokens=1", "--save_dir", folder]
    _, err = run(*line, status=status)
    if status:
        return err
    return re.search("checkpoint ([0-9a-f]{12})", err).group(1)


FEATURES = {
    "plain": "",
    "average": "--average 0.3 --dropout 0.1 --lr_schedule cosine",
    "bfloat16": "--dtype bfloat16 --optimizer muon --grad_accumulation 2",
    "lora": "--lora_rank 2",
}


@pytest.mark.parametrize("name", FEATURES)
def test_step_computed_again(name, text, tmp_path):
    flags = [*RUN, "--text", text, *FEATURES[name].split()]
    ids = []
    for folder, steps in ((tmp_path / "all", 1), (tmp_path / "few", 10)):
        if name == "lora":
            run(*TINY, "--text", text, "--num_iters=5", "--save_dir", folder)
            flags += ["--init_from", run_folder(folder).name]
        # Schedules end first at 20, then at 30: these are two stretches of the run.
        for end in (20, 30):
            run(*flags, "--steps_per_save", steps, "--num_iters", end, "--save_dir", folder)
        if name == "lora":
            shutil.rmtree(folder / flags[-1])  # the run has kept it
        ids.append({each.iteration: each.id for each in saved(folder)})
    assert {*ids[1]} == {10, 20, 30}
    generator = random.Random(name)
    for first in (1, 21):
        step = first + generator.randrange(9)
        assert id_at(tmp_path / "few", step) == ids[0][step][:12]
    assert not [*(tmp_path / "few").glob("*/tmp*")]


def test_step_that_cannot_be_proved(text, tmp_path):
    folder = tmp_path / "runs"
    flags = [*RUN, "--text", text, "--steps_per_save=10", "--save_dir", folder]
    run(*flags)
    assert "no later checkpoint" in id_at(folder, 31, status=2)
    assert "is not a run" in id_at(folder, "x", status=2)
    assert "is not a run" in id_at(folder, 5000 * "9", status=2)
    line = ["--identifier=latest@5", "--prompt=a", "--save_dir", folder]
    _, err = run(*line, env={"DISABLE_FAST": "1"}, status=2)
    assert "was computed by other code" in err
    other_blas = ["-c", "import main; main.fast.BLAS += '?'; exit(main.main())"]
    _, err = run(*line, program=other_blas, cwd=ROOT, status=2)
    assert "was computed with other versions: BLAS " in err
    # Without its checkpoints 10 and 20, the seed alone gives step 12.
    expected = id_at(folder, 12)
    shutil.rmtree(run_folder(folder) / "steps")
    for each in saved(folder)[1:]:
        each.weights_path.unlink()
    assert id_at(folder, 12) == expected


def test_step_after_a_damaged_checkpoint_was_passed_over(text, tmp_path):
    """The run has left that checkpoint, and what it had proved: it went on by another schedule."""
    folder = tmp_path / "runs"
    flags = [*RUN, "--text", text, "--lr_schedule=cosine", "--save_dir", folder]
    run(*flags, "--steps_per_save=10")
    abandoned = id_at(folder, 25)
    damaged = saved(folder)[0].weights_path
    damaged.write_bytes(damaged.read_bytes() + b"x")
    run(*flags, "--num_iters=40")
    step = id_at(folder, 25)
    damaged.unlink()
    shutil.rmtree(run_folder(folder) / "steps")
    assert step == id_at(folder, 25) != abandoned


def test_a_step_reads_the_text_where_the_command_says(tmp_path):
    """And it clears what a command that was killed has left."""
    folder = tmp_path / "runs"
    cache = tmp_path / "cache"
    small = ["--dataset=python", *RUN, "--num_iters=4", "--steps_per_save=2"]
    run(*small, "--save_dir", folder)
    (run_folder(folder) / "steps" / "unfinished" / "left").mkdir(parents=True)
    env = {"XDG_CACHE_HOME": str(cache)}
    line = ["--identifier=latest@3", "--prompt=a", "--max_tokens=1", "--save_dir", folder]
    run(*line, env=env)
    run_extra("inspect_step", "latest@3", "--save_dir", folder, env=env)
    assert not [*cache.glob("*/python")]
    assert not [*folder.glob("*/steps/unfinished")]


def test_branch_from_a_step(text, tmp_path):
    """It is the same as one from a checkpoint of that step."""
    flags = [*RUN, "--text", text]
    ends = []
    for steps, folder in ((7, tmp_path / "kept"), (10, tmp_path / "again")):
        name, _, _ = begin(*flags, "--steps_per_save", steps, "--save_dir", folder)
        line = ["--identifier", f"{name}@14", "--learning_rate=1e-3", "--save_dir", folder]
        branch, _, _ = begin(*line)
        assert branch != name
        assert begin(*line)[:2] == (branch, 30), "it is resumed"
        ends.append(saved(folder, branch)[0].id)
    assert ends[0] == ends[1]


def test_training_from_a_step_is_a_branch_without_another_flag(text, tmp_path):
    """It lies beside the run, whose state of that step stays."""
    name, _, _ = begin(*RUN, "--text", text, "--steps_per_save=10", "--save_dir", tmp_path)
    line = ["--identifier", f"{name}@14", "--save_dir", tmp_path]
    branch, _, _ = begin(*line, "--keep=1")
    assert branch != name
    assert saved(tmp_path, branch)[0].id == saved(tmp_path, name)[0].id
    _, err = run(*line, "--prompt=a", "--max_tokens=1")
    assert "iteration 14" in err


def test_what_a_step_did_does_not_depend_on_what_follows(text, tmp_path):
    """Saved again with a later end of its schedules, before a further step, it is the same."""
    line = [*RUN, "--text", text, "--lr_schedule=cosine", "--save_dir", tmp_path]
    run(*line)
    out, _ = run_extra("inspect_step", "latest", "--save_dir", tmp_path)
    run(*line, "--num_iters=60", "--max_minutes=0")
    assert saved(tmp_path)[0].flags["num_iters"] == 60
    assert run_extra("inspect_step", "latest", "--save_dir", tmp_path)[0] == out


def test_what_a_step_did(text, tmp_path):
    folder = tmp_path / "runs"
    name, _, _ = begin(*RUN, "--text", text, "--steps_per_save=10", "--save_dir", folder)
    out, _ = run_extra("inspect_step", f"{name}@15", "--rows=2", "--save_dir", folder)
    _, err = run_extra("inspect_step", f"{name}@0", "--save_dir", folder, status=2)
    assert "is the state before the first step" in err
    newest, _ = run_extra("inspect_step", "latest", "--save_dir", folder)
    assert newest.startswith(f"{name}@{saved(folder)[0].iteration - 1} -> {name}: loss ")
    loss, gradient_norm = map(float, re.search(r"loss (\S+), gradient_norm (\S+),", out).groups())
    before, after = map(float, re.search(r"mean loss (\S+) before, (\S+) after", out).groups())
    assert loss == pytest.approx(before, abs=1e-3)
    norms = {}
    for part, *numbers in re.findall(r"^(\S.*?) {2,}(\S+) +(\S+) +(\S+) +\S+$", out, re.M):
        norms[part] = [float(number) for number in numbers]
    total = math.sqrt(sum(gradient**2 for _, gradient, _ in norms.values()))
    assert total == pytest.approx(min(gradient_norm, 1), rel=1e-2)
    # The update is what lies between the two checkpoints.
    embeddings = []
    for step in (14, 15):
        [path] = run_folder(folder).glob(f"steps/{name}@{step}/*.safetensors")
        embeddings.append(mx.load(str(path))["model.embed_tokens.weight"])
    difference = np.array(embeddings[1] - embeddings[0])
    assert norms["embed_tokens"][2] == pytest.approx(np.linalg.norm(difference), rel=1e-3)
    # Two rows of eight tokens, with the loss of each.
    rows = re.findall(r"^ +(\S+) +(\S+) +([+-]\S+)  '", out, re.M)
    assert len(rows) == 2 * 8
    for first, second, difference in rows:
        assert float(second) - float(first) == pytest.approx(float(difference), abs=2e-4)
