"""Comparisons of two sides: their runs are ordinary ones, and the numbers those of the books."""

import json
import math
import shutil
import subprocess
import time

import pytest
from conftest import ROOT, TEXT, TINY, newest, run, saved, start

from extras import plot

STEPS = [*TINY, "--num_iters", 24, "--steps_per_eval", 8, "--steps_per_report", 4]
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A repository with one commit of the program, and a text beside it."""
    folder = tmp_path_factory.mktemp("committed")
    for name in ("main.py", "datasets.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "extras", folder / "extras", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "text.txt").write_text(TEXT)
    (folder / ".gitignore").write_text("runs\ntext.txt\n__pycache__\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*GIT, *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def project(committed, tmp_path):
    """A copy of it, without runs, that a test may edit."""
    ignored = shutil.ignore_patterns("runs", "alone-*")
    return shutil.copytree(committed, tmp_path / "project", ignore=ignored)


def line_of(*arguments):
    """A command line of the program that compares; its flags of main.py come last."""
    return [*arguments, "--", *STEPS, "--text", "text.txt"]


def versus(project, *arguments, status=0):
    """What a comparison prints; its flags of main.py are STEPS."""
    options = {"program": ["-m", "extras.versus"], "env": {"PYTHONPATH": str(project)}}
    return run(*line_of(*arguments), cwd=project, status=status, **options)


def edit(project, old, new):
    """Replaces a text in main.py, where it stands once."""
    path = project / "main.py"
    source = path.read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))


def runs(project):
    """The ids of all runs' last checkpoints, {(side, seed): id}."""
    found = {}
    for folder in (project / "runs" / "versus").glob("*-*"):
        side = folder.name.partition("-")[0]
        for checkpoint in reversed(saved(folder)):
            found[side, checkpoint.flags["seed"]] = checkpoint.id
    return found


def test_comparison(committed, figures):
    """Killed and typed again, it ends in the numbers of main.py's own runs."""
    compared = ["--learning_rate 3e-2", "--pairs", 2, "--json"]
    options = {"program": ["-m", "extras.versus"], "cwd": committed}
    with start(*line_of(*compared), env={"PYTHONPATH": str(committed)}, **options) as process:
        while not [*committed.glob("runs/versus/after-*/*/*.safetensors")]:
            time.sleep(0.01)
        process.kill()  # its run goes on alone
    out, _ = versus(committed, *compared)
    result = json.loads(out.splitlines()[-1])
    ids = runs(committed)
    assert len(ids) == 4
    scores = {"before": [], "after": []}
    for (side, seed), id in sorted(ids.items()):
        own = ["--learning_rate", "3e-2"] if side == "after" else []
        folder = committed / f"alone-{side}-{seed}"
        line = [*STEPS, *own, "--text", committed / "text.txt", "--seed", seed]
        run(*line, "--eval_tokens", 0, "--save_dir", folder)
        assert id == newest(folder).id
        scores[side].append(newest(folder).score)
    differences = []
    for seed, before, after in zip((42, 43), scores["before"], scores["after"]):
        assert f"{seed:>10}{before:>10.4f}{after:>10.4f}{after - before:>+14.4f}\n" in out
        differences.append(after - before)
    mean = sum(differences) / 2
    deviation = math.sqrt(sum((each - mean) ** 2 for each in differences))
    margin = 12.706 * deviation / math.sqrt(2)  # Student's t with one degree of freedom
    assert result["difference"] == pytest.approx(mean)
    assert [result["low"], result["high"]] == pytest.approx([mean - margin, mean + margin], rel=1e-4)
    assert mean + margin < 0
    assert result["verdict"] == "Helped."

    # The picture shows what the table says.
    plot.main(["x.png", "--versus", "--save_dir", str(committed / "runs")])
    above, below = figures[0].axes
    assert [line.get_ydata()[-1] for line in above.lines[:2]] == scores["before"]
    assert above.lines[5].get_ydata()[-1] == pytest.approx(sum(scores["after"]) / 2)
    assert below.lines[1].get_xydata()[-1].tolist() == pytest.approx([24, mean])

    # The next edit on the same seeds has more chances to look good. The first stays the first.
    out, _ = versus(committed, "--learning_rate 2.9e-2", "--pairs", 2)
    assert out.splitlines()[-1].startswith("Looks better, but this is try 2 on these seeds")
    out, _ = versus(committed, "--learning_rate 1e30 --grad_clip 0", "--pairs", 2)
    assert "       nan" in out
    assert out.endswith("2 of 4 runs diverged: no interval.\n")


def test_edit_without_effect_is_proved(project):
    """A plain function runs on both sides: only what it does counts, not how it rounds."""
    edit(project, "    joined = attended.transpose", "    joined  =  attended.transpose")
    edit(project, "def linear_product(x, weight):\n", "def linear_product(x, weight):  # a note\n")
    edit(project, "    return mx.square(nn.relu(x))\n", "    y = nn.relu(x)\n    return y * y\n")
    out, _ = versus(project, "HEAD", "--pairs", 2)
    assert "\nedited   relu2: main.py's own on both sides\n" in out
    assert "No effect, proved: the same weights and scores after step 24" in out
    ids = runs(project)
    assert len(ids) == 4  # both sides are computed
    assert ids["before", 42] == ids["after", 42] != ids["before", 43]


def test_same(project):
    """As `git bisect run` asks it."""
    edit(project, "hidden * (kept", "hidden * 1.0 * (kept")  # of dropout, which is not used
    versus(project, "HEAD", "--same", "--pairs", 2)
    edit(project, "return rate * warmup", "return rate * warmup * 1.001")
    out, _ = versus(project, "HEAD", "--same", "--pairs", 2, status=1)
    assert out == "Different weights after 20 steps, seed 42.\n"
    edit(project, "return rate * warmup * 1.001", "return rate * warmup *")
    _, err = versus(project, "HEAD", "--same", status=125)
    assert err.startswith("Cannot tell: your files does not run: ")


MISTAKES = [
    (["nonsense"], "nonsense is no commit with this program"),
    (["HEAD", "HEAD", "HEAD"], "unrecognized arguments: HEAD"),
    (["--dim 7"], "dim 7 is not a multiple"),
    (["--stop 'a"], "--stop 'a cannot be read as flags (No closing quotation)"),
    (["--num_iters 7"], "--num_iters has to be the same on both sides"),
    (["--patience 3"], "--patience cannot be compared"),
    (["HEAD", "--pairs", "1"], "--pairs"),
]


@pytest.mark.parametrize("arguments, reason", MISTAKES)
def test_mistakes(project, arguments, reason):
    _, err = versus(project, *arguments, status=2)
    assert err.startswith("extras.versus: ")
    assert err.count("\n") == 1
    assert reason in err


def test_without_git(project):
    shutil.rmtree(project / ".git")
    _, err = versus(project, "HEAD", status=2)
    assert "HEAD is no commit with this program" in err and "not a git repository" in err
