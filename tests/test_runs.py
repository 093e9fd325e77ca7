"""One command, one run.

Which run a command begins or resumes, branches, and the commands that the program prints.
"""

import re
import shlex
import shutil
import signal

import anchors
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
    assert f"\n{name}.bak " in listed


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


# Of a function that shapes each run; the first edit changes no number.
SECTION = {anchors.ADAMW: "# ---- My own ----\n\n\ndef make_adamw("}
EDITS = [
    {},
    {'"""MLX\'s AdamW (Loshchilov & Hutter 2019)."""': '"""AdamW."""  # or Muon', **SECTION},
    {anchors.BETAS: "betas = [flags.beta1, 0.98]", **SECTION},
]


def test_an_edit_of_a_function_is_another_experiment(line, folder, tmp_path):
    """A finished run lets a new one begin; an unfinished one ends the command, with two ways on."""
    paths = []
    for number, edits in enumerate(EDITS):
        paths.append(copy_program(tmp_path / f"copy{number}", edits))
    plain, reworded, edited = [{"program": [path]} for path in paths]
    with open(tmp_path / "copy2/extras/features/fast.py", "a") as file:
        file.write("# A comment is no edit.\n")
    leg = [*line, "--num_iters", 9, "--max_minutes", 1e-9]  # two steps: the first is not timed
    name, _, _ = begin(*leg, **plain)
    assert begin(*leg, **reworded)[:2] == (name, 2)

    _, err = run(*leg, status=2, **edited)
    [kept] = folder.glob(f"{name}/code-*/main.py")
    assert kept.read_text() == paths[0].read_text()
    differs = f"was trained by other code than this (main.py: diff {kept} {paths[2]}): "
    assert f"main.py: {name} {differs}" in err
    assert err.endswith(", or start a new run by its original command and --new_model\n")
    assert begin(*leg, "--new_model", **edited)[:2] == (f"{name}.2", 0)
    assert begin(*leg, **reworded)[:2] == (name, 4)
    [command] = re.findall(r"by python main\.py (.*), or start", err)
    resumed, iteration, out = begin(*shlex.split(command), "--max_minutes", 1e-9, **edited)
    assert (resumed, iteration) == (name, 6)
    assert "The code that trains was edited since the checkpoint" in out
    first, second = newest(folder).segments
    assert (first.iteration, second.iteration) == (0, 6)
    assert first.code_sha1 != second.code_sha1

    finished = [*line, "--seed", 7]
    name, _, _ = begin(*finished, **edited)
    longer = [*finished, "--num_iters", 3]
    _, err = run(*longer, status=2, **plain)
    assert f"main.py: {name} was trained by other code" in err
    assert begin(*finished, **plain)[:2] == (f"{name}.2", 0)
    assert begin(*longer, **edited)[:2] == (name, 2)
    assert begin(*longer, **reworded)[:2] == (f"{name}.2", 2)


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
    assert last.startswith(f"Stopped at iteration {stopped.iteration}. ")
    name, iteration, _ = begin(*typed("To resume: ", last))
    assert (name, iteration) == (stopped.folder.name, stopped.iteration)
