"""One command, one run.

Which run a command begins or resumes, branches, and the commands that the program prints.
"""

import re
import shlex
import shutil
import signal

import pytest
from conftest import TINY, begin, copy_program, ids, interrupt, newest, run, run_folders, saved
from conftest import start, wait_for, write_text

SMALL = [*TINY, "--num_blocks", 1, "--sample_tokens", 0]


@pytest.fixture
def line(text, tmp_path):
    """A command that trains two steps of a small model."""
    return ["--text", text, *SMALL, "--num_iters", 2, "--save_dir", tmp_path / "lm"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "lm"


def files_of(folder):
    """The bytes of all files in a folder, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- What tells runs apart ----------------------------------------------------------------------

# A value of flags of each kind; the first one begins the run of which the others differ.
SHAPING = [
    "",
    "--seed 7",
    "--learning_rate 1e-3",
    "--dropout 0.1",
    "--batch_size 2",
    "--average 0.5",
    "--optimizer muon",
    "--mlp gelu",
    "--num_kv_heads 1",
    "--lr_schedule cosine",
    "--tokenizer char",
    "--train_tokens 500",
]
# None of these decides the weights.
OTHERS = (
    "--steps_per_report 1 --steps_per_eval 2 --eval_tokens 50 --steps_per_save 1 --keep 1 "
    "--patience 9 --max_minutes 5 --grad_checkpoint --sample_prompt line --sample_tokens 3"
)


# What the values are that are not given.
SPELLED_OUT = (
    "--seed 42 --learning_rate 3e-4 --dropout 0 --batch_size 4 --optimizer adamw --mlp relu2 "
    "--mlp_dim 64 --num_kv_heads 2 --lr_schedule constant --tokenizer byte --average 0"
)


def test_a_command_resumes_its_own_run(line, folder, text):
    """Whichever was saved last; once more, it finds the run complete."""
    begun = []
    for options in SHAPING:
        name, _, _ = begin(*line, *options.split())
        begun.append(name)
    assert len(set(begun)) == len(SHAPING)
    copy = shutil.copy(text, text.with_name("copy.txt"))
    spelled_out = ["--text", copy, *line[2:], *SPELLED_OUT.split()]
    assert begin(*spelled_out)[:2] == (begun[0], 2)
    for options, name in zip(SHAPING[::5], begun[::5]):
        more = [*options.split(), *OTHERS.split(), "--num_iters", 4]
        resumed, iteration, out = begin(*line, *more)
        assert (resumed, iteration) == (name, 2)
        assert "--num_iters 2 -> 4" in out
        assert "Schedules" not in out  # a constant rate has no end
        before = files_of(folder / name)
        resumed, iteration, out = begin(*line, *more)
        assert (resumed, iteration) == (name, 4)
        assert "Run complete (4/4). " in out
        assert files_of(folder / name) == before


def test_without_flags_the_run_saved_last_goes_on(line, folder):
    """With its own values."""
    first, _, _ = begin(*line, "--learning_rate", 0.002)
    second, _, _ = begin(*line)
    name, iteration, _ = begin("--save_dir", folder, "--num_iters", 3)
    assert (name, iteration) == (second, 2)
    begin(*line, "--learning_rate", 0.002, "--num_iters", 3)
    name, iteration, out = begin("--save_dir", folder, "--num_iters", 10)
    assert (name, iteration) == (first, 3)
    assert re.search(r"10/10 .* lr 1\.00e-04", out), "0.002 * 10 / 200"
    _, _, out = begin("--save_dir", folder)
    assert "Run complete (10/10). " in out
    assert "resumed  with unchanged flags\n" in out


def test_new_model_twice_makes_two_more_runs(line, folder):
    """With equal weights; the plain command goes on with what was saved last of them."""
    name, _, _ = begin(*line)
    for count in (2, 3):
        assert begin(*line, "--new_model")[:2] == (f"{name}.{count}", 0)
    assert len(set(ids(folder))) == 1
    assert begin(*line)[:2] == (f"{name}.3", 2)


# ---- Texts, folders, processes ------------------------------------------------------------------


def test_another_text_is_another_run_and_the_same_text_the_same(line, folder, text):
    """By its content: the file may be changed, and changed back."""
    name, _, _ = begin(*line)
    original = text.read_text()
    text.write_text(original.replace("quick", "slow!"), newline="\r\n")
    for words in (["--identifier", name], []):
        _, err = run("--save_dir", folder, *words, "--num_iters", 3, status=2)
        assert f"the text or tokenizer of {name} has changed: " in err
    other, iteration, _ = begin(*line)
    assert (other != name, iteration) == (True, 0)
    text.write_text(original)
    assert begin(*line)[:2] == (name, 2)


def test_a_moved_project_goes_on(tmp_path):
    """Text, tokenizer and runs, in a folder with another name, or seen through a link."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "notes.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    line = ["--text", "notes.txt", *SMALL, "--tokenizer", "word", "--data_dir", "data"]
    name, _, _ = begin(*line, "--num_iters", 2, cwd=old)
    (tmp_path / "link").symlink_to("old")
    through_link = ["--text", tmp_path / "link" / "notes.txt", *line[2:]]
    assert begin(*through_link, "--num_iters", 3, cwd=old)[:2] == (name, 2)
    old.rename(tmp_path / "new")
    assert begin(*line, "--num_iters", 4, cwd=tmp_path / "new")[:2] == (name, 3)
    named = ["--identifier", name, "--data_dir", "data", "--num_iters", 5]
    assert begin(*named, "--text", "notes.txt", cwd=tmp_path / "new")[:2] == (name, 4)


def test_a_runs_folder_is_the_run(line, folder, tmp_path):
    """Moved, copied or renamed, it ends as it would have; no command touches another one."""
    name, _, _ = begin(*line)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder / name, elsewhere / name)
    shutil.copytree(folder / name, folder / f"{name}.bak")
    shutil.copytree(folder / name, folder / "before-the-change.1")
    backup = files_of(folder / f"{name}.bak")
    shutil.copytree(folder / name, folder / "a")
    assert begin("--save_dir", folder, "--num_iters", 3)[:2] == (name, 2)
    id = saved(folder, "a")[0].id
    _, err = run("--prompt", "a", "--identifier", id, "--save_dir", folder)
    assert err.startswith(f"{name}, ")
    more = [*line, "--num_iters", 4, "--steps_per_save", 1, "--keep", 1]
    assert begin(*more, "--save_dir", elsewhere)[:2] == (name, 2)
    assert begin(*more)[:2] == (name, 3)
    named = ["--identifier", "before-the-change.1"]
    assert begin(*more, *named)[:2] == ("before-the-change.1", 2)
    ended = {saved(folder, run)[0].id for run in (name, "before-the-change.1")}
    assert ended == {newest(elsewhere).id}
    assert files_of(folder / f"{name}.bak") == backup
    listed, _ = run("--list", "--save_dir", folder)
    assert f"  {name}.bak  " in listed


def test_a_base_that_was_trained_on_is_another_base(line, folder):
    """Its run's name means the newest checkpoint; the run from the older one stays resumable."""
    base, _, _ = begin(*line)
    tuned = [*line, "--init_from", base, "--seed", 1]
    name, _, _ = begin(*tuned)
    assert begin(*tuned)[:2] == (name, 2)
    begin("--identifier", base, "--save_dir", folder, "--num_iters", 4)
    other, iteration, _ = begin(*tuned)
    assert (other != name, iteration) == (True, 0)
    assert begin("--identifier", name, "--save_dir", folder, "--num_iters", 3)[:2] == (name, 2)


def test_the_folder_of_a_run_is_not_one_of_runs(line, folder):
    name, _, _ = begin(*line)
    before = files_of(folder)
    for words in (line, ["--prompt", "a"]):
        _, err = run(*words, "--save_dir", folder / name, status=2)
        assert f"--save_dir {folder / name} is the folder of a run: name its parent folder" in err
    assert files_of(folder) == before


def test_a_command_that_is_running_is_refused_before_its_first_save(line, folder):
    """However often: the folder of the one that trains stays its own."""
    process = start(*line, "--num_iters", 100_000)
    wait_for(process, "20/100,000 ")
    assert not ids(folder)
    for _ in range(2):
        _, err = run(*line, status=2)
        assert "is being trained by another process: wait for it" in err
    name, _, _ = begin(*line, "--new_model")
    interrupt(process)
    [first] = [path.name for path in run_folders(folder) if path.name != name]
    assert name == f"{first}.2"


# ---- Code ---------------------------------------------------------------------------------------


REWORDED = {'"""MLX\'s AdamW (Loshchilov & Hutter 2019)."""': '"""AdamW."""  # or Muon'}
MESSAGE = "Press Ctrl+C or send SIGTERM"
EDITED = {MESSAGE: "Type Ctrl+C or send SIGTERM"}  # a message counts as all else does
# Two steps of a longer run: the first is not timed.
LEG = ["--num_iters", 9, "--max_minutes", 1e-9]
# A second of this clock is a microsecond.
QUICK_CLOCK = "import time\nclock = time.perf_counter\ntime.perf_counter = lambda: 1e6 * clock()\n"


@pytest.fixture
def programs(tmp_path):
    """The plain program, one with another comment, and one with another message: for `begin`."""
    paths = [copy_program(tmp_path / name, edits) for name, edits in (
        ("plain", {}), ("reworded", REWORDED), ("edited", EDITED)
    )]  # fmt: skip
    return [{"program": [path]} for path in paths]


def changed(folder, name, program, kept=0):
    """What is said of main.py where it differs from the code that a run keeps."""
    codes = sorted(folder.glob(f"{name}/code-*/main.py"), key=lambda path: path.stat().st_mtime)
    return f"(main.py: diff {codes[kept]} {program['program'][0]})"


def test_without_flags_a_run_goes_on_with_edited_code(line, folder, programs):
    """Which is said once, and recorded; a comment is no edit."""
    plain, reworded, edited = programs
    name, _, _ = begin(*line, *LEG, **plain)
    bare = ["--save_dir", folder, "--max_minutes", 1e-9]
    resumed, iteration, said = begin(*bare, **reworded)
    assert (resumed, iteration) == (name, 2)
    assert "Code changed" not in said
    for more in ([], ["--identifier", name]):
        resumed, iteration, said = begin(*bare, *more, **edited)
        assert resumed == name
        what = f"Code changed since iteration 4 {changed(folder, name, edited)}.\n"
        assert said.count(what) == (not more)
    first, second = newest(folder).segments
    assert (first.iteration, second.iteration) == (0, 4)
    differing = [path for path in first.code if first.code[path] != second.code[path]]
    assert differing == ["main.py"]
    _, _, said = begin(*bare, *more, **plain)
    assert f"Code changed since iteration 8 {changed(folder, name, plain, 1)}.\n" in said


def test_with_flags_edited_code_begins_a_run_beside_it(line, folder, programs):
    """It says at the start and at the end where the other is, and how to continue that."""
    plain, reworded, edited = programs
    name, _, _ = begin(*line, *LEG, **plain)
    assert begin(*line, *LEG, **reworded)[:2] == (name, 2)
    other, iteration, said = begin(*line, *LEG, **edited)
    assert (other, iteration) == (f"{name}.2", 0)
    resume = f"python main.py --identifier {name} --save_dir {folder}"
    beside = (
        f"{name}, at iteration 4 of 9, was trained by other code {changed(folder, name, edited)}"
    )
    note = f"{beside}; to continue it with this code: {resume}\n"
    assert said.count(note) == 2
    assert said.endswith(note)
    resumed, iteration, said = begin(*line, *LEG, **edited)
    assert (resumed, iteration, note in said) == (other, 2, False)
    assert begin(*line, *LEG, **plain)[:2] == (name, 4), "each code goes on with its own run"


def test_ten_minutes_of_training_are_not_left_behind_untold(line, folder, programs, tmp_path):
    """Unless the run is complete: such a command is refused, with both ways on."""
    plain, _, edited = programs
    (tmp_path / "sitecustomize.py").write_text(QUICK_CLOCK)
    slow = {"env": {"PYTHONPATH": str(tmp_path)}}
    name, _, _ = begin(*line, *LEG, **plain, **slow)
    [minutes] = [checkpoint.seconds / 60 for checkpoint in saved(folder)]
    assert minutes > 10
    _, err = run(*line, *LEG, status=2, **edited)
    reached = (
        f"the code was edited since {name} reached iteration 2 of 9, after {minutes:.0f} minutes"
    )
    assert f"main.py: {reached} of training {changed(folder, name, edited)}: continue it " in err
    [command] = re.findall(r"with this code by python main\.py (.*), or add --new_model", err)
    resumed, iteration, _ = begin(*shlex.split(command), "--max_minutes", 1e-9, **edited)
    assert (resumed, iteration) == (name, 2)
    assert begin(*line, *LEG, "--new_model", **plain)[:2] == (f"{name}.2", 0)

    finished = [*line, "--seed", 7]
    name, _, _ = begin(*finished, **edited, **slow)
    _, err = run(*finished, "--num_iters", 3, status=2, **plain)
    assert " --num_iters 3, or add --new_model" in err
    assert begin(*finished, **plain)[:2] == (f"{name}.2", 0)


def test_the_package_beside_main_is_part_of_the_environment(line, folder, programs):
    """A message that is reworded there makes no other run, but is recorded."""
    plain, reworded, _ = programs
    name, _, _ = begin(*line, *LEG, **plain)
    path = reworded["program"][0].parent / "support/reports.py"
    reworded["program"][:0] = ["-B"]  # a Python of its own
    source = path.read_text()
    assert source.count("To sample: ") == 1
    path.write_text(source.replace("To sample: ", "Sample: "))
    resumed, iteration, said = begin(*line, *LEG, **reworded)
    assert (resumed, iteration) == (name, 2)
    environments = [segment.versions["support"] for segment in newest(folder).segments]
    before, after = environments
    assert f"Environment changed (support {before} -> {after}): resume may not be bit-exact" in said
    assert "Code changed" not in said
    _, err = run("--identifier", f"{name}@3", "--evaluate=valid", *line[-2:], **reworded)
    assert err.startswith(f"{name}@3, "), "its SHA1 proves the step"


# ---- --identifier, branches ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A folder with two runs, of three and two checkpoints; the first of each is its best."""
    folder = tmp_path_factory.mktemp("two_runs")
    text = write_text(folder, "the quick brown fox jumps over the lazy dog\n" * 200)
    line = ["--text", text, *SMALL, "--steps_per_save", 1, "--keep", 9, "--save_dir", folder / "lm"]
    line += ["--steps_per_eval", 1, "--learning_rate", 1, "--lr_warmup", 0]
    first, _, _ = begin(*line, "--num_iters", 3)
    second, _, _ = begin(*line, "--seed", 1, "--num_iters", 2)
    return folder / "lm", first, second


def test_identifiers(two_runs, tmp_path, text):
    """An id or its beginning, a run, the newest checkpoint, the best of the run saved last."""
    folder, first, second = two_runs
    checkpoints = {(each.folder.name, each.iteration): each for each in saved(folder)}
    older = checkpoints[first, 1]
    for identifier, expected in {
        older.id: older,
        older.id[:8]: older,
        first: checkpoints[first, 3],
        second: checkpoints[second, 2],
        "latest": checkpoints[second, 2],
        "best": min(saved(folder, second), key=lambda checkpoint: checkpoint.evaluation.loss),
    }.items():
        words = ["--prompt", "a", "--max_tokens", 1, "--save_dir", folder]
        _, err = run(*words, "--identifier", identifier)
        assert err.startswith(f"{expected}, in {folder}\n"), identifier
    for identifier in ("zzz", older.id[1:9]):
        _, err = run(*words, "--identifier", identifier, status=2)
        assert f"matches no checkpoints in {folder}" in err
        assert f"{second}, {first} (see --list)" in err
    elsewhere = shutil.copytree(folder / first, tmp_path / first)
    _, err = run(*words, "--identifier", elsewhere, status=2)
    assert f"{elsewhere} lies outside --save_dir {folder}" in err
    (tmp_path / "empty").mkdir()
    words = ["--prompt", "a", "--save_dir", tmp_path / "empty", "--identifier", elsewhere]
    assert "lies outside" in run(*words, status=2)[1]
    words[3] = tmp_path / "unscored"
    name, _, _ = begin(*TINY, "--text", text, "--num_iters=2", *words[2:4], "--steps_per_eval=0")
    _, err = run(*words[:4], "--max_tokens=1", "--identifier", "best")
    assert err.startswith(f"{name}, iteration 2, "), "the newest, where none is scored"


@pytest.mark.parametrize("options", [[], ["--beta2", 0.9]])
def test_a_branch_is_resumed_by_the_same_command(two_runs, folder, options):
    """From an older checkpoint, with other flags or not; the run that it left stays as it is."""
    shutil.copytree(two_runs[0], folder)
    first = two_runs[1]
    older = saved(folder, first)[-1]
    before = files_of(folder)
    line = ["--identifier", older.id, *options, "--keep", 1, "--save_dir", folder, "--num_iters"]
    branch, iteration, out = begin(*line, 3)
    assert iteration == 1
    assert "This is a branch of" in out
    assert before.items() <= files_of(folder).items()
    assert branch != first
    ended = saved(folder, branch)[0]
    assert (ended.id == saved(folder, first)[0].id) == (not options), "the steps are those of it"
    log = (folder / branch / "log.csv").read_text()
    assert "\n1," not in log and "\n3," in log

    name, iteration, out = begin(*line, 4)
    assert (name, iteration) == (branch, 3)
    assert "This is a branch of" not in out
    assert begin("--identifier", first, "--save_dir", folder, "--num_iters", 4)[:2] == (first, 3)
    path = (folder / first / older.id).with_suffix(".safetensors")
    named = ["--identifier", path, "--beta1", 0.8, "--save_dir", folder]
    name, _, out = begin(*named, "--num_iters", 2)
    assert name not in (first, branch)
    assert f"This is a branch of {first}, " in out, "a path names a folder, too"


def test_a_changed_flag_under_identifier_is_a_branch(two_runs, folder):
    """Of the newest checkpoint, too: the run's own command goes on with what it described."""
    shutil.copytree(two_runs[0], folder)
    second = two_runs[2]
    line = ["--identifier", second, "--learning_rate", 0.5, "--save_dir", folder, "--num_iters"]
    branch, iteration, out = begin(*line, 3)
    assert branch != second
    assert iteration == 2
    newest(folder).weights_path.write_bytes(b"")
    assert begin(*line, 4)[:2] == (branch, 2), "a damaged one is passed over, as it was not named"
    line[1] = "latest"
    assert begin(*line, 5)[:2] == (branch, 4)
    assert begin("--identifier", second, "--save_dir", folder, "--num_iters", 3)[:2] == (second, 2)


def test_a_branch_that_was_killed_at_its_start_can_be_branched(two_runs, folder):
    """Its only checkpoint is the parent's, whose id names what both branches began with."""
    shutil.copytree(two_runs[0], folder)
    second = two_runs[2]
    line = ["--save_dir", folder, "--num_iters", 2, "--identifier"]
    branch, _, _ = begin(*line, second, "--learning_rate", 0.5)
    assert [each.iteration for each in saved(folder, branch)] == [2]
    other, _, out = begin(*line, branch, "--learning_rate", 0.25)
    assert other not in (branch, *two_runs[1:]) and f"This is a branch of {branch}, " in out
    assert saved(folder, branch)[0].flags["learning_rate"] == 0.5
    # A resumed parent is saved again; its id still names it, not the branch.
    parent = saved(folder, second)[0]
    begin("--identifier", second, "--num_iters", 3, "--keep", 5, "--save_dir", folder)
    _, _, out = begin("--identifier", parent.id, "--beta1", 0.5, "--save_dir", folder)
    assert f"This is a branch of {second}, " in out


# ---- What the program prints to be typed --------------------------------------------------------

ODD_FOLDER = "it's my runs; 'x' `y`"


def typed(pattern, said):
    """The arguments of the command that follows `pattern` in what the program said."""
    [command] = re.findall(pattern + r"(python main\.py .*)", said)
    _, _, *arguments = shlex.split(command)
    return arguments


@pytest.fixture
def odd_line(text, tmp_path):
    """A command that trains a small model in folders with odd names."""
    folders = ["--save_dir", tmp_path / ODD_FOLDER, "--data_dir", tmp_path / "my data"]
    return ["--text", text, *TINY, "--sample_tokens", 4, *folders]


def test_commands_of_a_run_that_ended(odd_line, tmp_path):
    """Early, complete, and shorter than it is."""
    name, _, out = begin(*odd_line, "--max_minutes", 1e-9, "--num_iters", 4)
    assert "Ended at iteration 2 of 4. To sample: " in out
    resumed, iteration, out = begin(*typed("To train on: ", out))
    assert (resumed, iteration) == (name, 2)
    sample, err = run(*typed(r"Run complete \(4/4\)\. To sample: ", out), input="line 5\n")
    assert sample.strip()
    assert err == f"{newest(tmp_path / ODD_FOLDER)}, in {tmp_path / ODD_FOLDER}\n"
    _, _, out = begin(*odd_line, "--num_iters", 1)
    assert begin(*typed("To train on: ", out))[:2] == (name, 4)


def test_commands_lead_beyond_a_plateau(odd_line):
    """What the program says to type ends in further steps, not in the same two lines again."""
    plateau = ["--learning_rate", 0, "--steps_per_eval", 1, "--patience", 1]
    _, before, out = begin(*odd_line, *plateau, "--num_iters", 2)
    for _ in range(3):
        name, iteration, out = begin(*typed("To train on: ", out))
        assert iteration > before
        before = iteration
    # The parent's plateau is none of a branch that learns.
    folders = odd_line[-4:]
    learning = ["--learning_rate", 1e-2, "--num_iters", 9, "--patience", 2]
    branch, iteration, out = begin("--identifier", name, *learning, *folders)
    assert branch != name and iteration < 9 and "Run complete (9/9)" in out


def test_command_of_a_run_that_was_stopped(odd_line, tmp_path):
    process = start(*odd_line, "--new_model", "--num_iters", 120)
    wait_for(process, "20/120 ")
    out, _ = interrupt(process, signal.SIGTERM)
    stopped = newest(tmp_path / ODD_FOLDER)
    last = out.splitlines()[-1]
    assert last.startswith(f"Stopped at iteration {stopped.iteration}. To resume: python main.py ")
    name, iteration, _ = begin(*typed("To resume: ", last), "--max_minutes", 1e-9)
    assert (name, iteration) == (stopped.folder.name, stopped.iteration)


def test_the_command_that_was_stopped_resumes_itself(odd_line, tmp_path):
    """It is shown without the password in it."""
    mirror = ["--mirror", "https://me:passw0rd@example.org/x"]  # not used by one's own text
    process = start(*odd_line, "--num_iters", 120, *mirror)
    wait_for(process, "20/120 ")
    out, _ = interrupt(process)
    assert "--mirror https://example.org/x" in out and "passw0rd" not in out
    stopped = newest(tmp_path / ODD_FOLDER)
    way = r"To resume: the same command \(.*\); after an edit: "
    same = r"To resume: the same command \("
    last = out.splitlines()[-1]
    for command in (typed(same, last.partition("); ")[0]), typed(way, last)):
        name, iteration, _ = begin(*command, "--num_iters", 120, "--max_minutes", 1e-9)
        assert name == stopped.folder.name and iteration >= stopped.iteration
