"""The commands of both READMEs, as they stand there, in small form and without a network."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import DATASETS, DEFAULTS, ROOT, TEXT, TINY, run, run_extra, run_folder

README = (ROOT / "README.md").read_text()
OF_EXTRAS = (ROOT / "extras" / "README.md").read_text()
BOTH = README + OF_EXTRAS


def read_commands():
    """The lines of the shell blocks of both READMEs."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", BOTH, re.S):
        lines += block.splitlines()
    return [line for line in lines if line]


COMMANDS = read_commands()
OF_MAIN = [line for line in COMMANDS if "main.py" in line]
# Comparisons train a dozen runs: test_versus.py has smaller ones.
OF_PROGRAMS = [line for line in COMMANDS if re.match(r"python -m extras\.(?!versus)", line)]
SMALL = [*TINY, "--num_iters", "3", "--steps_per_report", "1", "--eval_tokens", "500"]
NEED_A_MODEL = {
    "--identifier",
    "--inference",
    "--prompt",
    "--list",
    "--evaluate",
    "--init_from",
    "--teacher",
}
NAMES_OF_MODELS = "ptb-XXXXXX ptb-YYYYYY python-XXXXXX python-0f068f Qwen/Qwen2.5-0.5B".split()
NAMES_OF_FILES = [
    "prompts.txt",
    "answers.jsonl",
    "hf",
    "model.gguf",
    "losses.png",
    "heads.png",
    "cases.json",
]


LOOP = r"for (\w+) in (.*?); do (.*); done"


def unroll(command):
    """A line of shell without its loop, if it is one."""
    loop = re.fullmatch(LOOP, command)
    if not loop:
        return command
    name, values, body = loop.groups()
    return "; ".join(body.replace(f"${name}", value) for value in values.split())


def program_lines(command):
    """The arguments of each call of main.py in a line of shell."""
    lines = []
    for part in re.split(r"&&|\||;", unroll(command)):
        _, program, arguments = part.partition("python main.py")
        if program:
            lines.append(shlex.split(arguments, comments=True))
    return lines


def set_value(arguments, flag, value):
    """Replaces what follows a flag."""
    place = arguments.index(flag)
    arguments[place + 1] = value


def use_text_at_hand(arguments, text):
    """Puts a text in the place of a corpus that would be downloaded, and of other texts."""
    if "--config" in arguments:
        recipe = arguments[arguments.index("--config") + 1]
        if recipe.startswith("ptb"):
            arguments += ["--text", str(text)]
    if "--dataset" in arguments:
        place = arguments.index("--dataset")
        if arguments[place + 1] == "ptb":
            arguments[place : place + 2] = ["--text", str(text), "--tokenizer", "word"]
    for flag in {"--text", "--test_text"} & set(arguments):
        set_value(arguments, flag, str(text))


@pytest.fixture(scope="module")
def model_at_hand(tmp_path_factory):
    """A folder with a small run, which has a best checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text(TEXT)
    shape = [*SMALL, "--dim", 32, "--mlp", "swiglu"]
    line = ["--text", folder / "text.txt", *shape, "--steps_per_eval", 1]
    run(*line, "--save_dir", folder / "lm")
    return folder / "lm"


def use_model_at_hand(arguments, model_at_hand, folder):
    """Copies the small run to a folder, and names it and the files there as the arguments."""
    shutil.copytree(model_at_hand, folder, dirs_exist_ok=True)
    (folder / "prompts.txt").write_text("the company\nline 5\n")
    name = run_folder(folder).name
    renamed = dict.fromkeys(NAMES_OF_MODELS, name)
    renamed["tests/cases.yaml"] = ROOT / "tests" / "cases.yaml"
    for file in NAMES_OF_FILES:
        renamed[file] = folder / file
    if "--eval_stride" in arguments:
        set_value(arguments, "--eval_stride", "4")
    return [renamed.get(argument, argument) for argument in arguments]


def check(arguments, folder):
    """Types one command, and expects of it what its flags promise."""
    given = set(arguments)
    saved = ["--save_dir", folder]
    if "--help" in given:
        run(*arguments)
        return
    if "--evaluate" in given:
        out, _ = run(*arguments, *saved)
        split = arguments[arguments.index("--evaluate") + 1]
        assert out.startswith(f"{split} ")
    elif given & {"--inference", "--prompt"}:
        out, _ = run(*arguments, *saved, input="line 5")
        assert out.strip()
    elif "--list" in given:
        run(*arguments, *saved)
    else:
        has_shape = given & {"--identifier", "--init_from"}
        small = ["--max_tokens", 8] if has_shape else SMALL
        if "--teacher" in given:
            set_value(arguments, "--tokenizer", "byte")
        out, _ = run(*arguments, *small, "--num_iters", 5, *saved)
        assert "at iteration 5" in out


@pytest.mark.parametrize("command", OF_MAIN)
def test_command(command, tmp_path, text, model_at_hand):
    """Each is typed with smaller numbers behind it (the last flag counts).

    And with a text at hand instead of a download.
    """
    calls = program_lines(command)
    assert calls
    for arguments in calls:
        use_text_at_hand(arguments, text)
        if NEED_A_MODEL & set(arguments):
            arguments = use_model_at_hand(arguments, model_at_hand, tmp_path)
        check(arguments, tmp_path)


@pytest.mark.parametrize("command", OF_PROGRAMS)
def test_program(command, tmp_path, text, model_at_hand):
    """Each writes the file that it names, and benchmark prints JSON last."""
    _, _, module, *arguments = shlex.split(command, comments=True)
    name = module.removeprefix("extras.")
    if name == "benchmark":
        use_text_at_hand(arguments, text)
        out, _ = run_extra(name, *arguments, *SMALL, "--save_dir", tmp_path)
        assert out.splitlines()[-1].startswith("{")
        return
    arguments = use_model_at_hand(arguments, model_at_hand, tmp_path)
    run_extra(name, *arguments, "--save_dir", tmp_path)
    written = {tmp_path / file for file in NAMES_OF_FILES} - {tmp_path / "prompts.txt"}
    [path] = written & {*arguments}
    assert path.exists()
    if name == "batch":
        assert len(path.read_text().splitlines()) == 2


def test_classifier(tmp_path):
    """The snippet as it stands.

    It must be right far more often than by naming the largest class.
    """
    [snippet] = re.findall(r"```python\n(.*?)```", OF_EXTRAS, re.S)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    share = process.stdout.split()[-1]
    assert float(share) > 0.8


def test_an_edit(tmp_path, text):
    """The snippet in place of the line that the README names: its schedule is used."""
    [snippet] = re.findall(r"```python\n(.*?)```", README, re.S)
    code = (ROOT / "main.py").read_text()
    code, count = re.subn(r"^SCHEDULES = .*\n", lambda match: snippet, code, flags=re.M)
    assert count == 1
    edited = tmp_path / "main.py"
    edited.write_text(code)
    shutil.copy(DATASETS, tmp_path)
    shutil.copytree(ROOT / "extras", tmp_path / "extras")
    line = [*TINY, "--text", text, "--lr_schedule", "sqrt", "--lr_warmup", 0, "--min_lr", 0]
    line += ["--learning_rate", 0.01, "--num_iters", 4, "--steps_per_report", 1]
    out, _ = run(*line, "--save_dir", tmp_path / "lm", program=[edited])
    assert re.findall(r" lr ([\d.e-]+)", out) == ["1.00e-02", "5.00e-03", "2.93e-03", "1.34e-03"]


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.S))
def test_configuration(block, tmp_path, text):
    """Each YAML block is a file of flags that trains, with all that is not typed beside it."""
    path = tmp_path / "flags.yaml"
    path.write_text(block)
    out, _ = run("--config", path, *SMALL, "--text", text, "--save_dir", tmp_path / "lm")
    optimizer, rate = re.search(r"optimizer: (\w+)\n +learning_rate: (\S+)", block).groups()
    assert f"epochs in all; {optimizer}, " in out
    assert f"rate     {float(rate)} after" in out


OF_OTHERS = """
    --version --model --port --max --backend --hosts --bind --mca --starting --logdir --install
""".split()


def test_named_flags_exist():
    """Whatever a README calls a flag is one."""
    out, _ = run("--help")
    known = {*re.findall(r"--(?:no-)?\w+", out), *OF_OTHERS}
    for program in [ROOT / "datasets.py", *(ROOT / "extras").glob("*.py")]:
        known.update(re.findall(r'"(--\w+)"', program.read_text()))
    named = re.findall(r"(?<![\w-])--(?:no-)?[a-z]\w*", BOTH)
    assert set(named) <= known


def test_defaults_in_the_readme_are_the_parsers():
    for flag, default in re.findall(r"`--(\w+)` \(([\d.e-]+)\)", BOTH):
        assert float(default) == DEFAULTS[flag], flag
