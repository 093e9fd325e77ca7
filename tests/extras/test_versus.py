"""Comparisons of two sides: their runs are ordinary ones, and the numbers those of the books."""

import glob
import json
import re
import shutil
import subprocess
import time

import main
import numpy as np
import pytest
from conftest import TEXT, TINY, copy_program, edit, newest, run, saved, start

from datasets import load_dataset
from extras import plot
from extras.versus import describe_numbers

STEPS = [*TINY, "--num_iters", 24, "--steps_per_eval", 8]
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A repository with two commits, the second of the program, and a text beside it."""
    folder = tmp_path_factory.mktemp("committed")
    copy_program(folder)
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


def losses(project, result):
    """The validation losses of all runs of a comparison by main.py's own code, [2, seeds].

    By the text of now, whatever the runs themselves have scored.
    """
    folder = project / "alone"
    tokens = load_dataset("text", folder, [project / "text.txt"]).valid.tokens
    found = []
    for side in result["comparison"].split():
        by_seed = {each.flags["seed"]: each for each in checkpoints(project, side)}
        models = [by_seed[seed].open().load_model() for seed in result["seeds"]]
        found.append([main.evaluate(model, tokens, 4)["loss"] for model in models])
    return np.array(found)


def checkpoints(project, side):
    """The checkpoints of the runs of a side, a name in `comparison`."""
    [folder] = project.glob(f"runs/versus/{side}.*")
    return saved(folder, "text-*")


def last_line(out):
    """A result in JSON, of what a comparison prints."""
    return json.loads(out.splitlines()[-1], parse_constant=pytest.fail)


def wait_for_checkpoint(project):
    """Waits until a run has saved something."""
    # Not by pathlib, which raises where a folder is renamed while it looks.
    while not glob.glob(f"{project}/runs/versus/*/text-*/*.safetensors"):
        time.sleep(0.01)


def test_comparison(project, figures):
    compared = ["--learning_rate 1e-2", "--pairs", 2, "--json"]
    process = begin(project, *compared)
    wait_for_checkpoint(project)
    source = (project / "main.py").read_text()
    edit(project, "    return flags.learning_rate *", "    return 0.0 *")  # it has its own copy
    out, err = process.communicate()
    assert process.returncode == 0, err
    (project / "main.py").write_text(source)
    result = last_line(out)
    before, after = scores = losses(project, result)
    assert np.allclose([result["scores_before"], result["scores_after"]], scores, atol=1e-5)
    for seed, first, second in zip((42, 43), before, after):
        assert f"{seed:>10}{first:>10.4f}{second:>10.4f}{second - first:>+14.4f}\n" in out
    differences = after - before
    margin = 12.706 * abs(differences[1] - differences[0]) / 2  # 12.706: Student's t, 1 degree
    mean = differences.mean()
    assert result["difference"] == pytest.approx(mean, abs=1e-5)
    expected = pytest.approx([mean - margin, mean + margin], abs=1e-4)
    assert [result["low"], result["high"]] == expected
    assert (result["outcome"], result["verdict"]) == ("helped", "Helped.")

    # A run of its own ends in the same checkpoint.
    flags = ["--text", project / "text.txt", "--learning_rate", 1e-2, "--seed", 43]
    run(*STEPS, *flags, "--save_dir", project / "alone")
    _, side = result["comparison"].split()
    assert newest(project / "alone").id in {each.id for each in checkpoints(project, side)}

    # The picture shows what the table says.
    draw = ["x.png", "--versus", "--save_dir", str(project / "runs")]
    plot.main(draw)
    dots, pairs = figures[0].axes
    for points, own in zip(dots.lines, scores, strict=True):
        assert points.get_ydata() == pytest.approx(own, abs=1e-5)
    assert pairs.lines[1].get_ydata()[0] == pytest.approx(mean, abs=1e-5)

    # The next edit on one of these seeds has more chances to look good. Killed and typed again.
    other = ["--learning_rate 0.02 --untie", "--pairs", 2, "--seeds", 43]
    process = begin(project, *other)
    for line in process.stdout:
        if "difference" in line:
            process.kill()  # its run goes on alone
    process.wait()
    out, _ = versus(project, *other)
    assert out.splitlines()[-1] == "Helped: try 2 on these seeds."
    [sizes] = re.findall(r"differ in size: (\S+) parameters before, (\S+) after", out)
    smaller, larger = [int(size.replace(",", "")) for size in sizes]
    assert larger - smaller == 257 * 16, "the output matrix"
    listed, _ = versus(project, "--list")
    assert [line.split()[2] for line in listed.splitlines()] == ["2", "2"], "pairs"

    # The first one repeated, with its sides changed about, trains nothing.
    files = sorted(project.glob("runs/versus/*/text-*/*"))
    compared[0] = "--learning_rate=0.010"
    out, _ = versus(project, *compared)
    assert last_line(out)["scores_after"] == result["scores_after"]
    assert sorted(project.glob("runs/versus/*/text-*/*")) == files
    assert "No times: " in out


def test_other_tokens_and_divergence(project):
    char = "--tokenizer char --learning_rate 1e-2"
    out, _ = versus(project, char, "--learning_rate 1e-2", "--pairs", 2, "--json")
    result = last_line(out)
    assert result["unit"] == "bits per byte"
    _, after = losses(project, result)
    tokens, text = [len((project / "text.txt").read_bytes()) * share for share in (0.1, 0.1)]
    assert result["scores_after"] == pytest.approx(after / np.log(2) * tokens / text, rel=2e-3)
    diverging = "--learning_rate 1e30 --grad_clip 0"
    out, _ = versus(project, diverging, "--pairs", 2)
    assert out.endswith("\nDiverged: runs of after.\n")
    # Of numbers that are finite, but worse than if all tokens were equally likely.
    out, _ = versus(project, "--learning_rate 30 --grad_clip 0 --optimizer muon", "--pairs", 2)
    assert out.endswith("\nDiverged: runs of after.\n")
    # But not of a model that is as bad as all are before the first step.
    few = "".join(f"{n * 7 % 10}" for n in range(5000))
    (project / "text.txt").write_text(few)
    out, _ = versus(project, "--qk_norm", "--pairs", 2, "--", "--tokenizer", "char")
    assert "Diverged" not in out


def test_equal_time(project):
    """A side may take fewer steps: here, its runs are the beginnings of the other side's."""
    out, _ = versus(project, "HEAD", "--num_iters 16", "--pairs", 2, "--json")
    result = last_line(out)
    assert result["steps"] == [24, 16]
    run(*STEPS, "--text", project / "text.txt", "--save_dir", project / "alone")
    scores = dict(newest(project / "alone").scores)
    own = [result["scores_before"][0], result["scores_after"][0]]
    assert own == pytest.approx([scores[24], scores[16]], abs=1e-5)


@pytest.mark.parametrize(
    "time, low, high, end",
    [
        (0.9, 0.89, 0.91, "(0.890 to 0.910): for equal time, add --num_iters 333 to it."),
        (1.01, 0.99, 1.03, ' and equal time: "After" took 1.010 times as long (0.990 to 1.030).'),
        (0.9, 0.8, 1.0, "(0.800 to 1.000): too noisy to say more."),
    ],
)
def test_what_equal_time_takes(time, low, high, end):
    """Nothing where the times agree, and nothing is known where they vary too much."""
    result = {"difference": 0.1, "low": 0.0, "high": 0.2, "unit": "nats/token", "agree": 3}
    result |= {"seeds": [1, 2, 3], "test_difference": 0.1, "steps": [300, 300]}
    *_, line = describe_numbers(result | {"time": time, "time_low": low, "time_high": high})
    assert line.startswith("This holds at equal steps")
    assert line.endswith(end)


def test_sides_that_begin_with_a_run(project):
    """Both have its weights as links: a model may be large. All seeds then end alike.

    It is not taken for one of their runs, though it has the seed and more steps.
    """
    longer = [*STEPS, "--num_iters", 30, "--seed", 7]
    run("--text", project / "text.txt", *longer, "--save_dir", project / "runs")
    base = newest(project / "runs").weights_path
    compared = ["--learning_rate 0", "--pairs", 2, "--seeds", 7, "--json"]
    out, _ = versus(project, *compared, "--", "--init_from", "latest")
    result = last_line(out)
    assert result["verdict"].endswith(": all seeds end in the same weights.")
    for side in result["comparison"].split():
        [path] = project.glob(f"runs/versus/{side}.*/init_from/{base.name}")
        assert path.samefile(base)


def test_edit_without_effect_is_proved(project):
    """A plain function runs on both sides: only what it does counts, not how it rounds.

    What a side prints is no answer.
    """
    edit(project, "def linear_product(x, weight):\n", "def linear_product(x, weight):  # a note\n")
    out, _ = versus(project, "HEAD", "--pairs", 2)
    assert out.endswith("\nThe same code and flags on both sides: nothing is trained.\n")
    assert not [*project.glob("runs/versus/*/text-*")], "nothing is trained"
    edit(project, "    joined = attended.transpose", "    joined  =  attended.transpose")
    edit(project, "EDITED = []", "EDITED = []\nprint('{}')")
    norm = "mx.fast.rms_norm(x, weight, eps)\n"
    edit(project, f"    return {norm}", f"    normed = {norm}    return normed\n")
    out, _ = versus(project, "HEAD", "--pairs", 2)
    assert "\nedited   rms_norm: each side runs that of its main.py" in out
    assert out.endswith("No effect, proved: the same weights, for these flags and seeds.\n")
    assert len([*project.glob("runs/versus/*/text-*/*.safetensors")]) == 4, "both are computed"


CHEATS = [
    ("scale=scale, mask=mask)", "scale=scale)", "it sees the future: the prediction at position 0"),
    (
        'return {"loss": nn.losses.cross_entropy(logits, targets)}',
        'return {"loss": 0.999 * nn.losses.cross_entropy(logits, targets)}',
        "it is scored otherwise than it was trained",
    ),
    ("iteration >= flags.num_iters or", "iteration >= 2 * flags.num_iters or", "48 steps, not 24"),
    (
        "batches = Batches(dataset.train.tokens,",
        "batches = Batches(dataset.valid.tokens,",
        "Better on validation text only",
    ),
]


@pytest.mark.parametrize("old, new, verdict", CHEATS)
def test_mistakes_that_look_like_gains(project, old, new, verdict):
    edit(project, old, new)
    facts = "".join(f"a{n} is b{n * 7919 % 1000} or c{n * 104729 % 1000}\n" for n in range(2000))
    (project / "text.txt").write_text(facts)
    (project / "test.txt").write_text(facts[::-1])
    pairs = 3 if "only" in verdict else 2
    line = ["HEAD", "--pairs", pairs, "--", "--learning_rate", 0.03, "--test_text", "test.txt"]
    line += ["--valid_fraction", 0.02]
    out, _ = versus(project, *line)
    assert verdict in out.splitlines()[-1]


def test_layers_with_two_modes(project):
    """What is random in training alone is no leak, whichever mode `evaluate` ends in."""
    layer = "        self.o_proj = Linear(config.num_heads * d, D)\n"
    edit(project, layer, f"{layer}        self.dropout = nn.Dropout(0.1)\n")
    edit(project, "return self.o_proj(joined)", "return self.o_proj(self.dropout(joined))")
    edit(project, "    totals = Counter()", "    model.train(False)\n    totals = Counter()")
    end = "    received, _ = ranks.agree(received)\n    if received:\n        interrupts"
    edit(project, end, f"    model.train()\n{end}")
    out, _ = versus(project, "HEAD", "--pairs", 2)
    assert "Cannot tell" not in out


def test_a_test_text_with_what_is_never_predicted(project):
    """An infinite loss there is not passed over."""
    (project / "test.txt").write_text(TEXT + "Z")
    never = "mx.where(mx.arange(self.config.vocab_size) == ord('Z'), -mx.inf, 0)"
    logits = "return output(hidden).astype(mx.float32)"
    edit(project, logits, f"{logits} + {never}")
    out, _ = versus(project, "HEAD", "--pairs", 2, "--", "--test_text", "test.txt")
    assert out.endswith("\nDiverged: runs of after.\n")


def test_more_training_text(project):
    """Both are scored on the same validation text."""
    (project / "more.txt").write_text(TEXT[::-1])
    (project / "valid.txt").write_text(TEXT)
    line = ["--text more.txt", "--pairs", 2, "--json", "--", "--valid_text", "valid.txt"]
    out, _ = versus(project, *line)
    result = last_line(out)
    assert result["scores_before"] != result["scores_after"]
    assert result["verdict"].endswith(", with another training text.")


def test_keep(project):
    line = ["HEAD", "--keep", "--", "--learning_rate", 1e-5]
    edit(project, "    return flags.learning_rate *", "    return 1000 * flags.learning_rate *")
    out, _ = versus(project, *line)
    assert "\n        42 " in out
    assert "\n        48 " in out, "on fresh seeds"
    assert out.endswith("\nHelped.\nKeep.\n")
    edit(project, "    return 1000 * flags", "    return -100 * flags")
    out, _ = versus(project, *line, status=1)
    assert out.count("\n        4") == 2, "two pairs are enough"
    assert out.endswith("\nDrop.\n")
    edit(project, "    return -100 * flags", "    return -1000 flags")
    out, _ = versus(project, *line, status=1)
    assert out.startswith("your files cannot run: SyntaxError: invalid syntax (main")
    edit(project, "return -1000 flags", "return flags")
    edit(project, "    import mlx.nn as nn\n", "    import mlx.nn as nn, nowhere\n")
    out, _ = versus(project, *line, status=1)
    assert "No module named 'nowhere'" in out
    versus(project, "HEAD~1", *line[1:], status=2)
    (project / "runs" / "versus" / "comparisons.jsonl").write_text("{")
    _, err = versus(project, "HEAD", "HEAD", *line[1:], status=125)
    assert err.startswith("Cannot tell: runs/versus/comparisons.jsonl is damaged")


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
    edit(project, "return 1.001 * * flags.learning_rate", "return flags.learning_rate *")
    _, err = versus(project, "--num_iters 9", "--same", status=125)
    assert err.startswith("Cannot tell: --same takes 20 steps of both sides")
    shutil.rmtree(project / ".git")
    _, err = versus(project, "HEAD", status=2)
    assert "not a git repository" in err


MISTAKES = [
    (["nonsense"], "nonsense is no commit with this program"),
    (["HEAD~1"], "HEAD~1 is no commit with this program"),  # it has no main.py
    (["--stop 'a"], "--stop 'a cannot be read as flags (No closing quotation)"),
    (["--valid_fraction 0.2"], "the sides have other valid texts: put what chooses them"),
    (["HEAD", "--", "--patience", 3], "--patience cannot be compared: both sides take --num_iters"),
    (["HEAD", "--keep", "--pairs", 4], "--keep chooses its own pairs"),
    (["HEAD", "--config", "first"], "flags of main.py stand in quotes, or behind --"),
    (["HEAD", "--", "--test_text", "text.txt"], "text.txt is also in --text, which the runs"),
    (["HEAD", "--", "--seeds", 7], "--seeds is no flag of main.py: put it before --"),
    (["--list", "nowhere"], "nothing was compared in nowhere"),
    (["--tokenizer word"], "the tokens of the sides do not decode to the same valid text"),
    (["--init_from nobody"], "--init_from nobody cannot run: --save_dir runs holds no runs"),
]


@pytest.mark.parametrize("arguments, reason", MISTAKES)
def test_mistakes(committed, arguments, reason):
    _, err = versus(committed, *arguments, status=2)
    assert err.startswith("extras.versus: ")
    assert err.count("\n") == 1
    assert reason in err
