"""The commands of the READMEs and the tutorial, as they stand there, in small form and offline."""

import os
import re
import shlex
import shutil

import pytest
from conftest import ROOT, TEXT, TINY, run, run_extra, run_folder, write_text

NAMES = ["README.md", "extras/README.md", "docs/tutorial.md", "docs/training.md"]
PAGES = "".join((ROOT / name).read_text() for name in NAMES)


BLOCKS = re.findall(r"```bash\n(.*?)```", PAGES, re.S)
COMMANDS = [*dict.fromkeys("".join(BLOCKS).splitlines())]  # each once
OF_MAIN = [line for line in COMMANDS if "python main.py" in line]
# Comparisons and checks train several runs, `inspect_step` needs one of many steps: they have tests
# of their own.
OF_PROGRAM = r"python -m extras\.(?!versus|inspect_step|check)"
OF_PROGRAMS = [line for line in COMMANDS if re.match(OF_PROGRAM, line)]
SMALL = [*TINY, "--num_iters", "3", "--steps_per_report", "1"]
# What stands for what cannot be had here, or does not fit the models at hand.
REPLACED = {
    "--dataset ptb": "--text notes.txt --tokenizer byte",
    "--text \"$(python -c 'import logging; print(logging.__file__)')\"": "--text notes.txt",
    "Qwen/Qwen2.5-0.5B": "python-XXXXXX",
    "--inference --gpu": "--inference",
}
MODELS = ["ptb-XXXXXX", "ptb-YYYYYY", "python-XXXXXX"]


def read_arguments(line, program):
    """The arguments of each call of a program in a line of shell."""
    for words, others in REPLACED.items():
        line = line.replace(words, others)
    calls = []
    for part in re.split(r"&&|\|+|;", line):
        _, found, arguments = part.partition(program)
        if found:
            calls.append(shlex.split(arguments))
    assert calls
    return calls


@pytest.fixture(scope="module")
def model_at_hand(tmp_path_factory):
    """The folder of a small run, which has a best checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    line = ["--text", write_text(folder, TEXT), *SMALL, "--dim", 32, "--mlp", "swiglu"]
    run(*line, "--steps_per_eval", 1, "--save_dir", folder / "lm")
    return run_folder(folder / "lm")


@pytest.fixture
def place(model_at_hand, tmp_path):
    """A folder with the text, prompts and cases that the commands name, and runs."""
    for name in MODELS:
        shutil.copytree(model_at_hand, tmp_path / "runs" / name)
    (tmp_path / "notes.txt").write_text(TEXT)
    (tmp_path / "prompts.txt").write_text("the company\nline 5\n")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    return tmp_path


def test_no_command_ends_in_a_comment():
    """zsh, the shell of macOS, takes a comment at its prompt for arguments."""
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            assert not re.search("^#| #", block, re.M), f"{page}: {block}"


@pytest.mark.parametrize("command", OF_MAIN)
def test_command(command, place):
    """Each is typed, a training with smaller numbers behind it (the last flag counts)."""
    for arguments in read_arguments(command, "python main.py"):
        given = set(arguments)
        if "--save_dir" not in given:
            arguments += ["--save_dir", "runs"]
        if given & {"--help", "--evaluate", "--inference", "--prompt", "--list"}:
            out, _ = run(*arguments, input="line 5", cwd=place)
            assert len(out) > 1
            continue
        arguments += ["--sample_tokens", "8"]
        if not given & {"--identifier", "--init_from"}:
            arguments += SMALL
        out, _ = run(*arguments, "--num_iters", 5, cwd=place)
        assert "at iteration 5" in out


@pytest.mark.parametrize("command", OF_PROGRAMS)
def test_program(command, place):
    """Each writes the file that it names, and benchmark prints JSON last."""
    [[name, *arguments]] = read_arguments(command, "python -m extras.")
    before = set(os.listdir(place))
    if name == "benchmark":
        arguments += SMALL
    out, _ = run_extra(name, *arguments, "--save_dir", "runs", cwd=place)
    made = set(os.listdir(place)) - before - {"heads.npz"}  # the numbers of heads.png
    if name == "benchmark":
        assert out.splitlines()[-1].startswith("{")
    else:
        assert made and made <= {*arguments}


def test_classifier(tmp_path):
    """The snippet of the tutorial as it stands.

    It must be right far more often than by naming the largest class.
    """
    [snippet] = re.findall(r"```python\n(.*?)```", PAGES, re.S)
    out, _ = run(program=["-c", snippet], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert float(out.split()[-1]) > 0.8


@pytest.mark.upkeep
def test_edits_can_be_made():
    """What the pages say to change in main.py stands there once."""
    source = (ROOT / "main.py").read_text().splitlines()
    lines = re.findall(r"^-( .*)", "\n".join(re.findall(r"```diff\n(.*?)```", PAGES, re.S)), re.M)
    assert lines
    assert all(source.count(line) == 1 for line in lines), lines


OF_OTHERS = "--backend --hosts --bind --starting --logdir --group --install --force".split()


def test_named_flags_exist():
    """Whatever a README calls a flag is one."""
    out, _ = run("--help")
    known = {*re.findall(r"--(?:no-)?\w+", out), *OF_OTHERS}
    for program in [ROOT / "datasets.py", *(ROOT / "extras").rglob("*.py")]:
        source = program.read_text()
        known.update(re.findall(r'"(--\w+)"', source))
        known.update(f"--{name}" for name in re.findall(r'"(\w+)": Flag\(', source))
    named = re.findall(r"(?<![\w-])--(?:no-)?[a-z]\w*", PAGES)
    assert set(named) <= known
