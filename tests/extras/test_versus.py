"""Comparisons of two sides: their runs are ordinary ones, and the numbers those of the books."""

import contextlib
import glob
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import anchors
import main
import numpy as np
import pytest
from conftest import TEXT, TINY, copy_program, edit, newest, run, saved, start

from datasets import load_dataset
from support.cli import RunError, UsageError
from extras.versus import __main__ as versus
from extras.versus import runs, sides
from extras.versus.judge import DIVERGED, Text
from extras.versus.ledger import read_results
from extras.versus.sequential import RunScore
from extras.versus.verdict import list_side_differences

STEPS = [*TINY[2:], *"--num_iters 24 --steps_per_eval 8".split()]
NO_EFFECT = "No effect, proved: the same weights in float32, for these flags and seeds."


def commit(folder):
    """Commits all files in a folder, which becomes a repository if it is none."""
    author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init"], ["add", "."], [*author, "commit", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A repository with two commits, the second of the program, and a text beside it."""
    folder = tmp_path_factory.mktemp("committed")
    commit(folder)
    copy_program(folder)
    (folder / "text.txt").write_text(TEXT)
    (folder / ".gitignore").write_text("runs\ntext.txt\n__pycache__\n")
    commit(folder)
    return folder


@pytest.fixture
def project(committed, tmp_path):
    """A copy of it that a test may edit."""
    return shutil.copytree(committed, tmp_path / "project")


def line_of(typed):
    """The arguments of a comparison; its flags of main.py are STEPS, and those after --."""
    words = shlex.split(typed)
    if "--" not in words:
        words.append("--")
    return [*words, *STEPS, "--text", "text.txt"]


def begin(project, typed):
    """Starts a comparison in a Python of its own."""
    program = ["-m", "extras.versus"]
    env = {"PYTHONPATH": str(project)}
    return start(*line_of(typed), program=program, cwd=project, env=env)


def compare(project, typed, status=0):
    """What a comparison prints, whose arguments are typed so."""
    line = ["-m", "extras.versus", *line_of(typed)]
    return run(*line, program=[project / "main.py"], cwd=project, status=status)


def losses(project, result):
    """The validation losses of all runs of a comparison by main.py's own code, [2, seeds].

    By the text of now, whatever the runs themselves have scored.
    """
    folder = project.with_name(f"{project.name} alone")  # a new file there would count
    tokens = load_dataset("text", folder, [project / "text.txt"]).valid.tokens
    found = []
    for side in result["comparison"].split():
        by_seed = {each.flags["seed"]: each for each in checkpoints(project, side)}
        models = [main.read_contents(by_seed[seed]).load_model() for seed in result["seeds"]]
        found.append([main.evaluate(model, tokens, 4)["loss"] for model in models])
    return np.array(found)


def checkpoints(project, side):
    """The checkpoints of the runs of a side, a name in `comparison`."""
    [folder] = project.glob(f"runs/versus/{side}.*")
    return saved(folder, "text-*")


def last_line(out):
    """A result in JSON, of what a comparison prints."""
    return json.loads(out.splitlines()[-1], parse_constant=pytest.fail)


def wait_for_checkpoint(project, process):
    """Waits until a run of a comparison has saved something."""
    # Not by pathlib, which raises where a folder is renamed while it looks.
    while not glob.glob(f"{project}/runs/versus/*/text-*/*.safetensors"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def compared(committed, tmp_path_factory):
    """A comparison in a copy of the project: `project`, `out` and `result`.

    main.py is edited while it runs: the sides have copies of their own.
    """
    folder = tmp_path_factory.mktemp("compared") / "project"
    project = shutil.copytree(committed, folder)
    process = begin(project, "'--learning_rate 1e-2' --pairs 2 --json")
    wait_for_checkpoint(project, process)
    source = (project / "main.py").read_text()
    edit(project, anchors.RATE, "    return 0.0 *")
    out, err = process.communicate()
    assert process.returncode == 0, err
    (project / "main.py").write_text(source)
    return SimpleNamespace(project=project, out=out, result=last_line(out))


def test_the_losses_are_those_of_the_runs(compared):
    result = compared.result
    expected = losses(compared.project, result)
    judged = [result["scores_before"], result["scores_after"]]
    assert np.allclose(judged, expected, atol=1e-5)
    for seed, before, after in zip((42, 43), *expected):
        row = f"{seed:>10}{before:>10.4f}{after:>10.4f}{after - before:>+14.4f}\n"
        assert row in compared.out


def test_a_run_of_ones_own_ends_in_the_same_checkpoint(compared, tmp_path):
    flags = ["--text", compared.project / "text.txt", "--learning_rate=1e-2", "--seed=43"]
    run(*STEPS, *flags, "--save_dir", tmp_path)
    _, side = compared.result["comparison"].split()
    assert newest(tmp_path).id in {each.id for each in checkpoints(compared.project, side)}


def test_repeated_with_its_sides_changed_about_it_trains_nothing(compared):
    files = sorted(compared.project.glob("runs/versus/*/text-*/*"))
    out, _ = compare(compared.project, "--learning_rate=0.010 --pairs 2 --json")
    assert last_line(out)["scores_after"] == compared.result["scores_after"]
    assert sorted(compared.project.glob("runs/versus/*/text-*/*")) == files
    assert '"After" took ' in out, "by the times that are kept"


def test_killed_and_typed_again_it_is_one_more_look(compared):
    """The next edit on one of these seeds has more chances to look good."""
    other = "'--learning_rate 0.02 --untie' --pairs 2 --seeds 43"
    process = begin(compared.project, other)
    for line in process.stdout:
        if "difference" in line:
            process.kill()  # its run goes on alone
    process.wait()
    out, _ = compare(compared.project, other)
    assert out.splitlines()[-1].startswith("Helped, on validation text (there was no test text)")
    assert out.endswith(": try 2.\n")
    sizes = re.findall(r"(\S+) parameters", out)
    smaller, larger = [int(size.replace(",", "")) for size in sizes]
    assert larger - smaller == 257 * 16, "the output matrix"
    listed, _ = compare(compared.project, "--list")
    assert [line.split()[2] for line in listed.splitlines()] == ["2", "2"], "pairs"


def test_sides_with_other_tokens(project):
    """Bits per byte, as both texts have the same bytes; other flags may come from a recipe."""
    typed = "'--tokenizer char --learning_rate 1e-2' '--learning_rate 1e-2' --pairs 2 --json"
    out, _ = compare(project, f"{typed} -- --config first")
    result = last_line(out)
    assert result["unit"] == "bits per byte"
    _, after = losses(project, result)  # in nats/byte: its tokens are bytes
    assert result["scores_after"] == pytest.approx(after / np.log(2), rel=2e-3)


def test_divergence(project):
    out, _ = compare(project, "'--learning_rate 1e30 --grad_clip 0' --pairs 2")
    assert out.endswith("\nDiverged: runs of after.\n")


def test_other_steps_and_texts_from_a_run(project):
    """Each run is one that the side's flags describe; both are scored on the same text.

    Both sides have the weights that they begin with as links: a model may be large. The run is not
    taken for one of theirs, though it has the seed and more steps.
    """
    (project / "more.txt").write_text(TEXT[::-1])
    for name in ("leak.txt", "valid.txt"):
        (project / name).write_text("".join(f"{i * i} other words\n" for i in range(60)))
    line = [*STEPS, *"--text text.txt --valid_text valid.txt --save_dir runs".split()]
    run(*line, "--num_iters=30", cwd=project)
    base = newest(project / "runs")
    after = "--num_iters 16 --text more.txt"
    common = f"--valid_text valid.txt --init_from {base.id}"
    out, _ = compare(project, f"'{after}' --pairs 2 --json -- {common}")
    result = last_line(out)
    assert result["steps"] == [24, 16]
    assert ", with another training text" in result["verdict"]  # the time taken may follow
    for key, flags in (("scores_before", ""), ("scores_after", after)):
        run(*line, "--init_from", base.id, "--eval_tokens=0", *flags.split(), cwd=project)
        assert result[key][0] == pytest.approx(newest(project / "runs").evaluation.loss, abs=1e-5)
    for side in result["comparison"].split():
        [path] = project.glob(f"runs/versus/{side}.*/init_from/{base.weights_path.name}")
        assert path.samefile(base.weights_path)

    leak = "--text leak.txt --valid_text more.txt --save_dir runs --num_iters 2"
    run(*STEPS, *leak.split(), cwd=project)
    learned = f"--init_from {newest(project / 'runs').id}"
    _, err = compare(project, f"'{learned}' -- --valid_text valid.txt", status=2)
    assert f"{learned} cannot run: its --init_from or --teacher has learned the validation" in err


def test_a_side_is_all_its_files(project):
    """An edited file of data is an edit; a large one is linked; what is ignored is not there."""
    reads = "    return float(Path('factor.txt').read_text()) * flags.learning_rate *"
    edit(project, anchors.RATE, reads)
    (project / "factor.txt").write_text("1.0")
    commit(project)
    (project / "factor.txt").write_text("0.1")
    (project / "large.bin").write_bytes(bytes(sides.MAX_COPIED_FILE_BYTES + 1))
    out, _ = compare(project, "HEAD --pairs 2 --json")
    assert "\nLinked, not copied: large.bin\n" in out
    result = last_line(out)
    assert result["outcome"] != "same" and result["difference"] > 0
    assert re.findall("^[-+].*", result["patch"], re.M) == [
        "--- a/0/factor.txt", "+++ b/1/factor.txt", "-1.0", "+0.1"
    ]  # fmt: skip
    _, side = result["comparison"].split()
    [folder] = project.glob(f"runs/versus/{side}.*")
    assert (folder / "large.bin").samefile(project / "large.bin")
    assert not (folder / "text.txt").exists()


def test_a_commit_has_all_its_files(project):
    """Also those that git would leave out of an archive; only your files have repositories."""
    (project / ".gitattributes").write_text("factor.txt export-ignore\n")
    (project / "factor.txt").write_text("1")
    inner = project / "inner"
    inner.mkdir()
    commit(inner)
    (inner / "more.txt").write_text("2")
    commit(project)
    out, _ = compare(project, "HEAD --pairs 2")
    assert out.endswith("\nNothing that counts differs between the sides, so nothing is trained.\n")
    assert out.count("Linked, not copied: inner") == 1


def test_a_recipe_of_a_side_by_any_path(project):
    """Each side has its own, however the path to it is typed."""
    recipe = project / "mine.yaml"
    recipe.write_text("weight_decay: 0\n")
    commit(project)
    recipe.write_text("weight_decay: 3\n")
    for path in (recipe, f"../{project.name}/mine.yaml"):
        out, _ = compare(project, f"HEAD --same --pairs 2 -- --config '{path}'", status=1)
        assert out.startswith("Different weights")


def test_copies_that_were_changed_are_not_trusted(project):
    typed = "'--weight_decay 1' --same --pairs 2"
    compare(project, typed, status=1)
    for copy in (project / "runs" / "versus").glob("*/main.py"):
        copy.write_text(copy.read_text().replace("range(5)", "range(3)"))
    _, err = compare(project, typed, status=125)
    assert "a copy was changed: delete " in err


def test_a_side_cannot_set_what_is_tuned(project):
    out, _ = compare(project, "'--weight_decay 1' --tune weight_decay=0.5,0.1 --pairs 2")
    rows = re.findall(r"--weight_decay 0\.\d: before (.*), after (.*)", out)
    assert len(rows) == 2 and all(before == after for before, after in rows)
    assert re.search(r", each at its best weight_decay: (\S+) before .*, \1 after .*\.\n$", out)


@pytest.mark.parametrize("edits, what", [
    ((anchors.ORDER, "default_rng([7, epoch])"), "order of batches"),
    ((anchors.INIT, "init_weights(model, 7)"), "first weights"),
])  # fmt: skip
def test_seeds_that_are_none(edits, what, project):
    """Pairs that share a part would be counted as independent ones."""
    edit(project, *edits)
    _, err = compare(project, "HEAD", status=1)
    fault = f"all seeds give the same {what}: use flags.seed"
    assert err == f"extras.versus: your files cannot run: {fault}\n"


def test_edit_without_effect_is_proved(project):
    """A plain function runs on both sides: only what it does counts, not how it rounds.

    What a side prints is no answer.
    """
    edit(project, anchors.ROTATE, "def rotate(x, frequencies, offset):  # a note\n")
    out, _ = compare(project, "HEAD --pairs 2")
    assert out.endswith("\nNothing that counts differs between the sides, so nothing is trained.\n")
    assert not [*project.glob("runs/versus/*/text-*")], "nothing is trained"
    edit(project, anchors.TOP, f"print('{{}}')\n\n{anchors.TOP}")
    square = anchors.RELU2
    edit(project, f"    return {square}", f"    squared = {square}    return squared\n")
    out, _ = compare(project, "HEAD --pairs 2")
    assert "\nedited   relu2: both sides run main.py's version" in out
    assert f"\n{NO_EFFECT.rstrip('.')}" in out  # perhaps with the ratio of two noisy times
    assert len([*project.glob("runs/versus/*/text-*/*.safetensors")]) == 4, "both are computed"


def test_keep(project):
    """An edit that looks like a gain, as a mask is missing, and what cannot run, are dropped."""
    shutil.copy(project / "text.txt", project.with_name("test.txt"))
    gate = "--gate -- --learning_rate 0.03 --test_text ../test.txt"
    edit(project, anchors.MASK, "mask=None)")
    out, _ = compare(project, f"HEAD {gate}", status=1)
    *_, verdict, answer = out.splitlines()
    assert "Cannot tell: your files: it sees the future: the prediction at position 0" in verdict
    assert answer == "Drop."
    edit(project, anchors.RELU2, "x x\n")
    out, _ = compare(project, f"HEAD {gate}", status=1)
    assert out.startswith("your files cannot run: SyntaxError: invalid syntax")
    compare(project, f"HEAD~1 {gate}", status=2)
    (project / "runs" / "versus" / "comparisons.jsonl").write_text("{")
    _, err = compare(project, f"HEAD HEAD {gate}", status=125)
    assert "/runs/versus/comparisons.jsonl, line 1 is no comparison" in err


def test_same(project):
    """As `git bisect run` asks it."""
    edit(project, anchors.RATE, "    return 1.001 * flags.learning_rate *")
    out, _ = compare(project, "HEAD --same --pairs 2", status=1)
    assert out == "Different weights after 20 steps, seeds 42 to 43.\n"
    edit(project, "return 1.001 *", "return math.nan *")
    _, err = compare(project, "HEAD --same", status=125)
    assert "is not finite" in err
    shutil.rmtree(project / ".git")
    _, err = compare(project, "HEAD", status=2)
    assert "HEAD is no commit with this program" in err


MISTAKES = [
    ("nonsense", "nonsense is no commit with this program"),
    ("HEAD~1", "HEAD~1 is no commit with this program"),  # it has no main.py
    ('"--stop \'a"', "--stop 'a cannot be read as flags (No closing quotation)"),
    ("'--valid_fraction 0.2'", "the sides' valid texts differ: put what chooses them"),
    ("HEAD --config first", "flags of main.py stand in quotes, or after --"),
    ("HEAD -- --seeds 7", "HEAD cannot run: unrecognized arguments: --seeds"),
    ("--list nowhere", "nothing was compared in nowhere"),
    ("'--tokenizer word'", "the tokens of the sides do not decode to the same valid text"),
    ("'--init_from nobody'", "--init_from nobody cannot run: --save_dir runs holds no runs"),
    ("HEAD --tune seed=1,2", "--tune seed: this flag does not decide how a run ends"),
    ("HEAD --tune random-seed=1,2", "--tune seed: this flag does not decide how a run ends"),
    ("HEAD -- --identifier latest", "--identifier has no effect on a comparison: leave it out"),
    ("HEAD --tune mlp=gelu,relu2", "--tune mlp=gelu,relu2: the values are no numbers"),
    ("HEAD -- --save_dir other", "other would count as code: add it to .gitignore"),
    ("HEAD --gate", "--gate needs text that the runs do not see: name some with --test_text"),
    ("HEAD --max-time=0 --gate --pairs 4", "--gate chooses its own pairs"),
]


@pytest.mark.parametrize("typed, reason", MISTAKES)
def test_mistakes(committed, typed, reason):
    _, err = compare(committed, typed, status=2)
    assert err.startswith("extras.versus: ")
    assert err.count("\n") == 1
    assert reason in err


# ---- Outcomes, without runs ---------------------------------------------------------------------


def side_of(folder, name, code):
    """A Side with this code in a folder of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "main.py").write_text(code)
    empty = sides.Side(**dict.fromkeys(field.name for field in fields(sides.Side)))
    return replace(
        empty,
        name=name,
        commit="1234567",
        code_words={"main.py": code.split()},
        identity={},
        folder=folder,
        words=[],
        flags={"num_iters": 300},
        versions={"dtype": "float32"},
        num_parameters=100,
        tokens_sha256={"train": "a"},
        test=(),
    )


class Drawn(runs.Comparison):
    """A comparison whose runs of the side after end as `after`, a function of the seed, says.

    Nothing is trained. Losses are 2 before, on both texts. typed: the options; code: that of the
    side after.
    """

    plain_functions = patch = ""
    tuning_note = None
    environment = {}
    on_gpu = is_stopped = False

    def __init__(self, folder, after, typed="", code="x = 1"):
        folder.mkdir(exist_ok=True)
        self.options, self.common = versus.read_arguments(["HEAD", *typed.split()])
        self.sides = [
            side_of(folder / "before", "HEAD", "x = 1"),
            side_of(folder / f"after {code}", "your files", code),
        ]
        self.first_seed = self.options.seeds or 42
        self.ledger = folder / "comparisons.jsonl"
        self.after = after
        self.drawn = []  # seeds
        self.run_seconds = [0.01]

    def run_after(self):
        """Trains a run of the side after, as the real one does."""
        self.run_locked(self.sides[1], 42)

    def train_pairs(self, seeds):
        for seed in seeds:
            self.drawn.append(seed)
            before = RunScore(f"before {seed}", 2.0, 2.0, tokens_seen=100, seconds=1.0)
            yield seed, before, self.after(seed)


def noisy(mean, on_test=None, seconds=1.0, tokens_seen=None):
    """Differences around a mean on validation text, with a standard deviation of 0.01.

    on_test: the mean on test text, if it is another.
    """
    means = np.array([mean, mean if on_test is None else on_test])

    def after(seed):
        losses = 2 + means + 0.01 * np.random.default_rng(seed).standard_normal()
        return RunScore(f"after {seed}", *losses, None, tokens_seen, seconds)

    return after


def on_used_seeds(mean):
    """An edit that helps by luck: on seeds that other edits were tried on before."""
    return lambda seed: noisy(mean if seed < 48 else 0)(seed)


def ending(loss, id="after {}", fault=None):
    """Runs that end in this loss on both texts, whatever their seed."""
    return lambda seed: RunScore(id.format(seed), loss, loss, fault, seconds=1.0)


GAIN = noisy(-0.05)
HARM = noisy(0.05)
USELESS = noisy(0)
SLOWER = noisy(-0.05, seconds=1.2)
UNTIMED = noisy(-0.05, seconds=math.nan)  # its runs were stopped and resumed
SAME = ending(2.0, "before {}")
MORE = "x = 1 + 1"  # code than before
LESS = ""
KEPT = [
    (GAIN, "", MORE, "Helped.\nKeep.", 6, 4),
    (noisy(-0.05, tokens_seen=200), "", MORE, "with another number of tokens read.\nDrop.", 6, 4),
    (SLOWER, "", MORE, "It takes longer than --max_time allows.\nDrop.", 6, 4),
    (UNTIMED, "", MORE, "It was stopped too often to be timed: try --again.", 6, 4),
    (SLOWER, "--max_time 1.3", MORE, "Helped, in 1.2 times the time.\nKeep.", 6, 4),
    (HARM, "", MORE, "Not better, on seeds that were used before.\nDrop.", 2, 0),
    (on_used_seeds(-0.05), "", MORE, "four times in five.\nDrop.", 6, 6),
    (SAME, "", MORE, "for these flags and seeds.\nDrop.", 2, 0),
    # Less code may be kept without a gain, if that is allowed by a margin.
    (SAME, "--margin 0.02", LESS, "for these flags and seeds.\nKeep.", 2, 0),
    (USELESS, "--margin 0.02", LESS, "Equal within 0.02.\nKeep.", 6, 4),
    (USELESS, "--margin 0.02", MORE, "on seeds that were used before.\nDrop.", 2, 0),
    (USELESS, "", LESS, "on seeds that were used before.\nDrop.", 2, 0),
]


@pytest.mark.parametrize("after, options, code, end, on_used, on_fresh", KEPT)
def test_what_is_kept(after, options, code, end, on_used, on_fresh, tmp_path, capsys):
    """What seeds that were used before promise counts only if fresh ones confirm it."""
    comparison = Drawn(tmp_path, after, f"--gate {options}", code=code)
    status = versus.keep_or_drop(comparison)
    assert status == {"Keep.": 0, "Drop.": 1}.get(end.split()[-1], 125)
    assert capsys.readouterr().out.endswith(f"{end}\n")
    assert comparison.drawn == [*range(42, 42 + on_used), *range(48, 48 + on_fresh)]


def test_what_was_dropped_is_not_tried_again(tmp_path, capsys):
    assert versus.keep_or_drop(Drawn(tmp_path, HARM, "--gate")) == 1
    other_luck = Drawn(tmp_path, GAIN, "--gate")
    assert versus.keep_or_drop(other_luck) == 1
    assert other_luck.drawn == []
    out = capsys.readouterr().out
    assert out.endswith("\nIt was dropped before: --again tries it on new seeds.\nDrop.\n")
    assert versus.keep_or_drop(Drawn(tmp_path, GAIN, "--gate --tokens 9")) == 1
    again = Drawn(tmp_path, GAIN, "--gate --again")
    assert versus.keep_or_drop(again) == 0
    assert again.drawn == [*range(42, 48), *range(48, 52)]
    assert capsys.readouterr().out.endswith("\nHelped: try 2.\nKeep.\n")


def test_tries_are_counted(tmp_path, capsys):
    """Each is another chance to look good, whatever it asks for; the same one is none."""

    def verdict(typed, after=GAIN, code="x = 2"):
        versus.run_comparison(Drawn(tmp_path, after, typed, code))
        return capsys.readouterr().out.splitlines()[-1]

    assert verdict("", after=SAME) == NO_EFFECT
    assert verdict("--pairs 2") == "Helped."
    assert verdict("--pairs 3") == "Helped: try 2."
    assert verdict("--pairs 3 --tokens 9") == "Helped: try 3."
    assert verdict("--pairs 3", code="x = 3") == "Helped: try 4."
    with pytest.raises(RuntimeError):
        verdict("--pairs 3 --seeds 43", after=stopping_at(44))
    assert verdict("--pairs 4") == "Helped: try 6."
    assert verdict("--pairs 3 --seeds 43") == "Helped: try 5."
    assert verdict("--pairs 2") == "Helped."


def stopping_at(last):
    """A gain in a comparison that is stopped at a seed."""

    def after(seed):
        if seed == last:
            raise RuntimeError
        return GAIN(seed)

    return after


def test_a_gate_goes_on_with_its_fresh_seeds(tmp_path, capsys):
    """Though another comparison has had seeds in the meantime."""
    with pytest.raises(RuntimeError):
        versus.keep_or_drop(Drawn(tmp_path, stopping_at(49), "--gate"))
    versus.run_comparison(Drawn(tmp_path, USELESS, "--seeds 60", code="x = 3"))
    again = Drawn(tmp_path, GAIN, "--gate")
    assert versus.keep_or_drop(again) == 0
    assert again.drawn == [*range(42, 48), *range(48, 52)]


DEATHS = [
    ("import os; os.kill(os.getpid(), 11)", "your files cannot run: ended by SIGSEGV$"),
    ("raise MemoryError", r"your files cannot run: MemoryError \(main.py, line 1\)$"),
    ("import time; time.sleep(99)", "your files cannot run: it does not end$"),
]


@pytest.mark.parametrize("code, reason", DEATHS)
def test_a_run_that_dies(code, reason, tmp_path, monkeypatch):
    """By itself: if it does so again, the machine is not to blame."""
    monkeypatch.setattr(runs, "MIN_TIMEOUT", 1)
    with pytest.raises(sides.SideError, match=reason):
        Drawn(tmp_path, None, code=code).run_after()


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1199))
    with pytest.raises(RunError, match="^no space is left for ") as caught:
        Drawn(tmp_path, None, code="import time; time.sleep(99)").run_after()
    assert not isinstance(caught.value, sides.SideError)


def test_a_score_is_kept_for_its_text(tmp_path, monkeypatch):
    """Another test text with as many tokens is another one."""
    asked = itertools.count()
    judge = SimpleNamespace(examine_run=lambda *_: [1.0, next(asked), None])
    monkeypatch.setattr(runs, "Judge", lambda *_: contextlib.nullcontext(judge))
    comparison = Drawn(tmp_path, None)
    valid = Text(np.arange(9, dtype=np.uint32), [(0, 8)], 1)
    scores = []
    for test in (valid, valid._replace(tokens=valid.tokens + 1), valid):
        side = replace(comparison.sides[0], valid=valid, test=test)
        _, score, _ = comparison.judge(side, {"id": "a", "path": None, "evaluations": []})
        scores.append(score)
    assert scores == [0, 1, 0], "the third one was kept"


def test_a_deleted_folder(tmp_path):
    code = "import os, time; here = os.getcwd(); os.rename(here, here + ' moved'); time.sleep(99)"
    with pytest.raises(FileNotFoundError):
        Drawn(tmp_path, None, code=code).run_after()


def test_the_number_of_training_tokens_is_a_condition(tmp_path):
    before, after = Drawn(tmp_path, None).sides
    after = replace(after, flags=after.flags | {"train_tokens": 1000})
    assert [*list_side_differences((before, after), [])] == ["another training text"]


def test_an_outlier_is_named(tmp_path, capsys):
    """As the test is for normal differences."""
    versus.run_comparison(Drawn(tmp_path, lambda seed: noisy(seed == 45)(seed)))
    assert "\nSeed 45 is an outlier: " in capsys.readouterr().out
    versus.run_comparison(Drawn(tmp_path / "other", GAIN))
    assert "outlier" not in capsys.readouterr().out


class Doubling:
    """A comparison of an edit that doubles the rate: the best one is 0.2, and 0.8 diverges."""

    sides = [SimpleNamespace(identity={"learning_rate": 0.1})]

    def __init__(self, options, common, copies, tuned):
        self.first_seed = options.seeds or 42
        before, after = [float(flags[-1].partition("=")[2]) for flags in tuned]
        self.rates = before, 2 * after

    def train_pairs(self, seeds):
        self.seeds = [*seeds]
        for seed in seeds:
            ends = [RunScore(score=abs(rate - 0.2)) for rate in self.rates]
            yield seed, *[RunScore(fault=DIVERGED) if end.score > 0.5 else end for end in ends]


def test_each_side_at_its_best(monkeypatch, capsys):
    monkeypatch.setattr(runs, "Comparison", Doubling)
    line = "HEAD --tune learning-rate=0.1,0.4,0.2 -- --dim 8"  # in any order
    best = runs.tune(*versus.read_arguments(line.split()), copies=None)
    assert best.rates == (0.2, 0.2)
    chosen = "0.2 before, 0.1 after (at the edge of the list: give more)"
    assert best.tuning_note == f"each at its best learning_rate: {chosen}"
    assert best.first_seed == 44, "other seeds than it was chosen by"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "--learning_rate 0.4: before 0.2000, after inf"


def test_a_side_before_that_fails_keeps_nothing(tmp_path):
    comparison = Drawn(tmp_path, None, "--gate")
    diverged = RunScore("before", np.inf, fault=DIVERGED)
    pair = diverged, RunScore("after", 2.0)
    comparison.train_pairs = lambda seeds: ((seed, *pair) for seed in seeds)
    assert versus.keep_or_drop(comparison) == 125


def test_the_same_weights(tmp_path, capsys):
    assert versus.check_sameness(Drawn(tmp_path, SAME, "--same")) == 0
    assert capsys.readouterr().out.startswith("The same weights after 20 steps")


VERDICTS = [
    # As with a gain, and weights that have seen the validation text.
    (noisy(-0.5, -0.2), "", "Helped, but less on test text: the rest may be a leak.", 4),
    # As with weights that were trained on validation text.
    (noisy(-0.1, 0), "", "Better on validation text only.", 4),
    (HARM, "", "Hurt.", 4),
    (noisy(-0.012), "", "Helped.", 8),
    (USELESS, "", "No difference seen: 6 pairs would detect one of ", 6),
    (GAIN, "--pairs 2", "Helped.", 2),
    (noisy(-0.004), "--margin 0.008", "Not worse by more than 0.008.", 12),
    (SAME, "", NO_EFFECT, 4),
    (ending(2.0), "", "No effect seen: other weights, and the same losses.", 4),
    (ending(np.inf, fault=DIVERGED), "", "Diverged: runs of after.", 1),
    (ending(1.0, fault="it knows"), "", "Cannot tell: your files: it knows.", 1),
]


# Of intervals, in standard errors: Student's for --pairs 2, then those of a race's looks.
WIDTHS = {2: 12.706, 4: 4.85, 6: 3.84, 8: 3.28, 12: 2.76}


@pytest.mark.parametrize("after, options, verdict, pairs", VERDICTS)
def test_verdicts(after, options, verdict, pairs, tmp_path, capsys):
    comparison = Drawn(tmp_path, after, options)
    versus.run_comparison(comparison)
    [result] = read_results(comparison.ledger)
    assert result["verdict"].startswith(verdict)
    assert len(result["seeds"]) == pairs
    assert capsys.readouterr().out.endswith(f"{result['verdict']}\n")
    if "difference" in result:
        drawn = [after(seed).score - 2 for seed in result["seeds"]]
        assert result["difference"] == pytest.approx(np.mean(drawn))
        margin = WIDTHS[pairs] * np.std(drawn, ddof=1) / pairs**0.5
        found = [result["high"] - np.mean(drawn), np.mean(drawn) - result["low"]]
        assert found == pytest.approx([margin, margin], rel=1e-3)


@pytest.mark.parametrize("seconds, end", [
    ((0.89, 0.91), "(0.882 to 0.918). For equal time, add --num_iters 333 to it."),
    ((1.00, 1.02), '"After" took 1.010 times as long (0.992 to 1.028).'),
])  # fmt: skip
def test_what_equal_time_takes(seconds, end, tmp_path, capsys):
    """Nothing where the times agree: 0.01 is less than 3.182 (Student's t) * 0.01 / sqrt(3)."""

    def in_turn(seed):
        return noisy(-0.05, seconds=seconds[seed % 2])(seed)

    versus.run_comparison(Drawn(tmp_path, in_turn))
    *_, line, _ = capsys.readouterr().out.splitlines()
    assert line.endswith(end)


def test_the_steps_of_a_run_are_counted(base, tmp_path):
    """Those in its record: an edit of the loop may have taken more."""
    folder, _ = base
    record = newest(folder)
    comparison = Drawn(tmp_path, None)
    comparison.judge = lambda side, record: [2.0, 2.0, None]
    side = replace(
        comparison.sides[0],
        folder=folder,
        flags={"num_iters": 10},
        tokens_sha256=record.tokens_sha256,
    )
    run_score = comparison.run_locked(side, record.flags["seed"])
    assert (run_score.id, run_score.fault) == (record.id, "it has taken 20 steps, not 10")
    with pytest.raises(UsageError, match="the text of HEAD has changed"):
        comparison.run_locked(replace(side, tokens_sha256={}), record.flags["seed"])
