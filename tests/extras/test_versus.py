"""Comparisons of two sides: their runs are ordinary ones, and the numbers those of the books."""

import json
import math
import re
import shutil
import subprocess
import time

import pytest
from conftest import ROOT, TEXT, TINY, newest, rows_of, run, saved, start

from extras import plot

STEPS = [*TINY, "--num_iters", 24, "--steps_per_eval", 8]
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A repository with two commits, the second of the program, and a text beside it."""
    folder = tmp_path_factory.mktemp("committed")
    for name in ("main.py", "datasets.py"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "extras", folder / "extras", ignore=ignored)
    (folder / "text.txt").write_text(TEXT)
    (folder / ".gitignore").write_text("runs\ntext.txt\n__pycache__\n")
    commit = ["commit", "-q", "--allow-empty", "-m", "a"]
    for command in (["init", "-q"], commit, ["add", "."], commit):
        subprocess.run([*GIT, *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def project(committed, tmp_path):
    """A copy of it that a test may edit."""
    return shutil.copytree(committed, tmp_path / "project")


def begin(project, *arguments):
    """Starts a comparison; its flags of main.py are STEPS, and those behind --."""
    if "--" not in arguments:
        arguments = [*arguments, "--"]
    line = [*arguments, *STEPS, "--text", "text.txt"]
    program = ["-m", "extras.versus"]
    return start(*line, program=program, cwd=project, env={"PYTHONPATH": str(project)})


def versus(project, *arguments, status=0):
    """What a comparison prints."""
    process = begin(project, *arguments)
    out, err = process.communicate()
    assert process.returncode == status, f"{out}\n{err}"
    return out, err


def edit(project, old, new):
    """Replaces a text in main.py, where it stands once."""
    path = project / "main.py"
    source = path.read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))


def runs(project):
    """The last checkpoints of all runs, {(side, seed): checkpoint}."""
    found = {}
    for folder in (project / "runs" / "versus").glob("*-*"):
        side, _, _ = folder.name.partition("-")
        for each in saved(folder, "text-*"):
            if each.iteration == 24:
                found[side, each.flags["seed"]] = each
    return found


def wait_for_checkpoint(project, side):
    """Waits until a run of a side has saved something."""
    while not [*project.glob(f"runs/versus/{side}-*/text-*/*.safetensors")]:
        time.sleep(0.01)


def test_comparison(project, figures):
    # The rate is so high that the last score is not always the best.
    compared = ["--learning_rate 1", "--pairs", 2, "--json"]
    process = begin(project, *compared)
    wait_for_checkpoint(project, "before")
    source = (project / "main.py").read_text()
    edit(project, "    return flags.learning_rate *", "    return 0.0 *")  # it has its own copy
    out, err = process.communicate()
    assert process.returncode == 0, err
    (project / "main.py").write_text(source)
    found = runs(project)
    differences = []
    for seed in (42, 43):
        before = found["before", seed].score
        after = found["after", seed].score
        assert f"{seed:>10}{before:>10.4f}{after:>10.4f}{after - before:>+14.4f}\n" in out
        differences.append(after - before)
    mean = sum(differences) / 2
    margin = 12.706 * abs(differences[1] - differences[0]) / 2  # 12.706: Student's t, 1 degree
    result = json.loads(out.splitlines()[-1])
    assert result["difference"] == pytest.approx(mean)
    expected = pytest.approx([mean - margin, mean + margin], rel=1e-4)
    assert [result["low"], result["high"]] == expected
    assert result["verdict"] == "Helped."

    # A run of its own ends in the same checkpoint.
    flags = ["--text", project / "text.txt", "--learning_rate", 1, "--seed", 43]
    run(*STEPS, *flags, "--save_dir", project / "alone")
    assert newest(project / "alone").id == found["after", 43].id

    # The picture shows what the table says.
    draw = ["x.png", "--versus", "--save_dir", str(project / "runs")]
    plot.main(draw)
    losses, pairs = figures[0].axes
    for side, points in zip(("before", "after"), losses.lines, strict=True):
        assert [*points.get_ydata()] == [found[side, seed].score for seed in (42, 43)]
    assert pairs.lines[1].get_ydata()[0] == pytest.approx(mean)
    assert [*pairs.lines[2].get_ydata()] == differences

    # The next edit on one of these seeds has more chances to look good. Killed and typed again.
    other = ["--learning_rate 0.5 --untie", "--pairs", 2, "--seeds", 43]
    process = begin(project, *other)
    for line in process.stdout:
        if "difference" in line:
            process.kill()  # its run goes on alone
    process.wait()
    out, _ = versus(project, *other)
    assert out.splitlines()[-1].startswith("Looks better, but this is try 2 on these seeds")
    [sizes] = re.findall(r"differ in size: (\S+) parameters before, (\S+) after", out)
    smaller, larger = [int(size.replace(",", "")) for size in sizes]
    assert larger - smaller == 257 * 16, "the output matrix"

    # The first one repeated has the same verdict, and is the one that is drawn.
    out, _ = versus(project, *compared, "--jobs", 1)
    assert json.loads(out.splitlines()[-1])["verdict"] == "Helped."
    plot.main(draw)
    assert figures[-1].axes[0].get_legend_handles_labels()[1][1] == "after: --learning_rate 1"


def test_other_tokens_and_divergence(project):
    out, _ = versus(project, "--tokenizer char", "--learning_rate 1e30 --grad_clip 0", "--pairs", 2)
    assert out.endswith("2 of 4 runs diverged: no interval.\n")
    for seed in (42, 43):
        folder = runs(project)["before", seed].folder
        bits = rows_of(folder / "log.csv", "valid")[-1]["bits_per_byte"]
        assert f"{seed:>10}{bits:>10.4f}       nan" in out


def test_equal_time(project):
    """A side may take fewer steps: here, its runs are the beginnings of the other side's."""
    out, _ = versus(project, "HEAD", "--num_iters 16", "--pairs", 2)
    run(*STEPS, "--text", project / "text.txt", "--save_dir", project / "alone")
    scores = dict(newest(project / "alone").scores)
    assert f"{42:>10}{scores[24]:>10.4f}{scores[16]:>10.4f}" in out
    assert "equal steps" not in out


def test_numbers_that_there_are_not(project):
    """JSON has no NaN, as the correlation with a side that does not train is one.

    Both sides have the first weights of a run as links: a model may be large.
    """
    run("--text", project / "text.txt", *TINY, "--num_iters", 5, "--save_dir", project / "runs")
    [base] = (project / "runs").glob("text-*/*.safetensors")
    compared = ["--learning_rate 0", "--pairs", 2, "--seeds", 7, "--json"]
    out, err = versus(project, *compared, "--", "--init_from", "latest")
    lines = out.splitlines()
    result = json.loads(lines[-1], parse_constant=pytest.fail)
    assert result["correlation"] is None
    assert not math.isnan(result["difference"])
    for side in result["comparison"].split():
        [path] = project.glob(f"runs/versus/{side}.*/init_from/{base.name}")
        assert path.samefile(base)


def test_edit_without_effect_is_proved(project):
    """A plain function runs on both sides: only what it does counts, not how it rounds.

    Both begin with the weights of the same run.
    """
    run("--text", project / "text.txt", *TINY, "--num_iters", 5, "--save_dir", project / "runs")
    base = newest(project / "runs")
    edit(project, "    joined = attended.transpose", "    joined  =  attended.transpose")
    edit(project, "def linear_product(x, weight):\n", "def linear_product(x, weight):  # a note\n")
    norm = "mx.fast.rms_norm(x, weight, eps)\n"
    edit(project, f"    return {norm}", f"    normed = {norm}    return normed\n")
    out, _ = versus(project, "HEAD", "--pairs", 2, "--", "--init_from", "latest")
    assert "\nedited   rms_norm: each side runs that of its main.py" in out
    assert "No effect, proved: the same weights and scores after step 24" in out
    found = runs(project)
    assert len(found) == 4  # both sides are computed
    assert found["before", 42].id == found["after", 42].id != found["before", 43].id
    assert {each.origins["init_from"] for each in found.values()} == {base.id}


def test_same(project):
    """As `git bisect run` asks it."""
    edit(project, "hidden * (kept", "hidden * 1.0 * (kept")  # of dropout, which is not used
    versus(project, "HEAD", "--same", "--pairs", 2)
    edit(project, "return flags.learning_rate *", "return 1.001 * flags.learning_rate *")
    out, _ = versus(project, "HEAD", "--same", "--pairs", 2, status=1)
    assert out == "Different weights after 20 steps, seed 42.\n"
    edit(project, "return 1.001 * flags.learning_rate *", "return 1.001 * * flags.learning_rate")
    _, err = versus(project, "HEAD", "--same", status=125)
    assert err.startswith("Cannot tell: your files cannot run: SyntaxError: invalid syntax (main")
    diverging = ["--learning_rate", "1e30", "--grad_clip", 0]
    _, err = versus(project, "HEAD", "HEAD", "--same", "--", *diverging, status=125)
    assert err == "Cannot tell: a run with seed 42 has diverged\n"
    shutil.rmtree(project / ".git")
    _, err = versus(project, "HEAD", status=2)
    assert "not a git repository" in err


MISTAKES = [
    (["nonsense"], "nonsense is no commit with this program"),
    (["HEAD~1"], "HEAD~1 is no commit with this program"),  # it has no main.py
    (["--stop 'a"], "--stop 'a cannot be read as flags (No closing quotation)"),
    (["--valid_fraction 0.2"], "--valid_fraction has to be the same on both sides"),
    (["HEAD", "--", "--patience", 3], "--patience cannot be compared"),
    (["--tokenizer word"], "a model that may answer <unk> has no bits per byte"),
    (["--init_from nobody"], "--init_from nobody cannot run: --save_dir runs holds no runs"),
]


@pytest.mark.parametrize("arguments, reason", MISTAKES)
def test_mistakes(committed, arguments, reason):
    _, err = versus(committed, *arguments, status=2)
    assert err.startswith("extras.versus: ")
    assert err.count("\n") == 1
    assert reason in err
