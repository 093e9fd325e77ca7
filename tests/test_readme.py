"""The commands of both READMEs, as they stand there, in small form and without a network."""

import argparse
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import DATASETS, ROOT, TINY, run

import main

README = (ROOT / "README.md").read_text()
BOTH = README + (ROOT / "extras" / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", BOTH, re.S) for line in block.splitlines() if line]
WRITTEN = {"--export": "hf/config.json", "--plot": "losses.png", "--attention": "heads.png", "--cases": "cases.json"}
SMALL = [*TINY, "--num_iters", "3", "--steps_per_report", "1", "--eval_tokens", "500"]


def program_lines(command):
    """The arguments of each call of main.py in a line of shell."""
    parts = re.split(r"&&|\||;", command)
    return [shlex.split(part.partition("main.py")[2], comments=True) for part in parts if "python main.py" in part]


def test_both_first_commands_set_everything_up():
    first, second = [line for line in COMMANDS if line.startswith("python3 -m venv")]
    assert "pip install -q -r requirements.txt" in first and "--dataset python" in first
    assert "-r tests/requirements.txt" in second and "pytest" in second
    assert "README.md" in (ROOT / ".ci" / "run").read_text(), "CI calls the very command of the README"


@pytest.mark.parametrize("command", [line for line in COMMANDS if "main.py" in line])
def test_command(command, tmp_path, text):
    """Each is typed with smaller numbers behind it (the last flag counts), and a text at hand instead of a download."""
    calls = program_lines(command)
    assert calls
    for arguments in calls:
        if "--dataset" in arguments and arguments[arguments.index("--dataset") + 1] == "ptb":
            at = arguments.index("--dataset")
            arguments[at : at + 2] = ["--text", str(text), "--tokenizer", "word"]
        if "--text" in arguments:
            arguments[arguments.index("--text") + 1] = str(text)
        if {"--identifier", "--inference", "--prompt", "--plot", "--cases", "--prompts_file", "--list", "--evaluate", "--init_from", "--teacher", "--export"} & set(arguments):
            run("--text", text, *SMALL, "--dim", 32, "--mlp", "swiglu", "--save_dir", tmp_path)
            (tmp_path / "prompts.txt").write_text("the company\nline 5\n")
            named = dict.fromkeys(["ptb-XXXXXX", "ptb-YYYYYY", "python-XXXXXX"], main.list_checkpoints(tmp_path)[0]["run"])
            named |= {name: tmp_path / name for name in ("prompts.txt", "answers.jsonl", "hf", "model.gguf", "losses.png", "heads.png", "cases.json")}
            named["tests/cases.yaml"] = ROOT / "tests" / "cases.yaml"
            if "--eval_stride" in arguments:
                arguments[arguments.index("--eval_stride") + 1] = "4"
            arguments = [named.get(argument, argument) for argument in arguments]
        if written := [name for flag, name in WRITTEN.items() if flag in arguments]:
            run(*arguments, "--save_dir", tmp_path)
            [written] = ["model.gguf"] if tmp_path / "model.gguf" in arguments else written
            assert (tmp_path / written).exists()
        elif "--evaluate" in arguments:
            assert run(*arguments, "--save_dir", tmp_path)[0].startswith("valid ")
        elif "--prompts_file" in arguments:
            run(*arguments, "--save_dir", tmp_path)
            assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
        elif {"--inference", "--prompt"} & set(arguments):
            out, _ = run(*arguments, "--save_dir", tmp_path, input="line 5")
            assert out.strip()
        elif "--benchmark" in arguments:
            assert run(*arguments, *SMALL, "--save_dir", tmp_path)[0].splitlines()[-1].startswith("{")
        elif {"--help", "--list", "--evaluate"} & set(arguments):
            run(*arguments, *([] if "--help" in arguments else ["--save_dir", tmp_path]))
        else:
            shape = ["--max_tokens", 8] if {"--identifier", "--init_from"} & set(arguments) else SMALL
            if "--teacher" in arguments:
                arguments[arguments.index("--tokenizer") + 1] = "byte"
            out, _ = run(*arguments, *shape, "--num_iters", 5, "--save_dir", tmp_path)
            assert "at iteration 5" in out


@pytest.mark.parametrize("command", [line for line in COMMANDS if "datasets.py" in line])
def test_preparing_a_corpus(command, tmp_path):
    arguments = shlex.split(command)[1:]
    arguments[arguments.index("--save_dir") + 1] = str(tmp_path)
    out, _ = run(*arguments[1:], program=[DATASETS], cwd=ROOT)
    assert "vocabulary 257" in out and out.count("words and line ends") == 3


def test_classifier(tmp_path):
    """The snippet as it stands, which must be right far more often than by naming the largest class."""
    [snippet] = re.findall(r"```python\n(.*?)```", BOTH, re.S)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", snippet]
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert float(out.split()[-1]) > 0.8


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.S))
def test_configuration(block, tmp_path):
    """Each YAML block is a file of flags that begins a run."""
    path = tmp_path / "flags.yaml"
    path.write_text(block)
    arguments = main.read_config(str(path), {})
    names = set(re.findall(r"(\w+): ", re.sub("#.*", "", block).replace("\n", " "))) - main.FLAGS.keys()
    assert arguments.keys() == names
    flags = main.resolve(argparse.Namespace(**main.DEFAULTS | arguments))
    assert main.make_config(flags, vocab_size=10000).dim == flags.dim


def test_named_flags_exist():
    """Whatever a README calls a flag is one."""
    known = {f"--{name}" for name in main.DEFAULTS} | {"--help"}
    others = set(re.findall(r'"(--\w+)"', (ROOT / "datasets.py").read_text())) | set("--version --model --port --max --backend --hosts --bind --mca".split())  # of mlx
    assert set(re.findall(r"(?<![\w-])--[a-z]\w*", BOTH)) <= known | others


def test_defaults_in_the_readme_are_the_parsers():
    for flag, default in re.findall(r"`--(\w+)` \(([\d.e-]+)\)", BOTH):
        assert float(default) == main.DEFAULTS[flag], flag
