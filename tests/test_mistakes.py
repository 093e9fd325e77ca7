"""The failure tour: what a newcomer gets wrong in the first hour.

Each mistake ends with one line.
"""

import fcntl
import functools
import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from datasets import run_command

import main

LINES = [f"line {i}: the quick brown fox — jümps over {i * i} lazy dogs\n" for i in range(200)]
LINE = "".join(LINES)


def billion_laughs_merged():
    """The same in mappings, which contain the one before."""
    lines = ["a0: &a0 {dim: 8}"]
    for i in range(1, 9):
        lines.append(f"a{i}: &a{i} " + "{<<: [" + ", ".join([f"*a{i - 1}"] * 10) + "]}")
    return "\n".join(lines) + "\n"


def billion_laughs():
    """Lists of lists in YAML: a billion words, if its aliases were spelled out."""
    lines = ["text:", "- &a0 [" + ", ".join(["x"] * 10) + "]"]
    for i in range(1, 9):
        lines.append(f"- &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]")
    return "\n".join(lines) + "\n"


SMALL = " ".join([*TINY, "--num_blocks 1"])  # a small model
FILES = {
    "text.txt": LINE,
    "changed.txt": LINE,
    "empty.txt": "",
    "tiny.txt": "tiny",
    "short.txt": LINE[:100],
    "good.txt": LINE[:900],
    "cut.txt": b"good \xff bad",
    "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "windows.txt": LINE.encode("utf-16"),
    "pictures/cat.png": b"\x89PNG\r\n\x1a\n\0",
    "foreign/model.safetensors": b"\0" * 64,
    "foreign/results.csv": "a;b\n1;2\n",
    "prompts.txt": "line\n",
    "answers.txt": "my own notes\n",
    "latin.txt": "jümps\n".encode("latin-1"),
    "hf/config.json": '{"model_type": "gpt2"}',
    "hf/model.safetensors": b"",
    "layers.yaml": "dim: 128\nlayers: 4\nmodel: {heads: 2}\n",
    "wide.yaml": "dim: wide\n",
    "twice.yaml": "model: {dim: 8}\ntraining: {dim: 16}\n",
    "true.yaml": "dim: true\n",
    "gpt.yaml": "model: {d_model: 8, n_layers: 2}\nmax_steps: 5\nwarmup-steps: 3\n",
    "other.yaml": "config: other.yaml\n",
    "mapping.yaml": "dim: 4\n  heads: [3\n",
    "sections.yaml": "advanced:\n  use_lora: true\nhardware: {device: cpu, dim: 8}\n",
    "null.yaml": "dimm:\n",
    "deep.yaml": "[" * 500_000,
    "laughs.yaml": billion_laughs(),
    "merged.yaml": billion_laughs_merged(),
    "long.yaml": "dim: 8  #" + "x" * (1 << 20),
    "list.yaml": "- dim\n",
    "cut.yaml": "dim: [1\n",
    "empty.yaml": "",
    "none.yaml": "[]",
    "false.yaml": "false",
    "null_name.yaml": 'identifier: "a\\0b"\n',
    "number.yaml": "7",
    "zero.yaml": "\0",
    "yes.yaml": "new_model: 'yes'\n",
    "two.yaml": "dim: [16, 32]\n",
    "both.yaml": "inference: true\nnew_model: true\n",
    "half.yaml": "num_iters: 1.5\n",
    "comments.yaml": "dataset: python\ntraining:\n  # dim: 5\ndim: wide\n",
    "prompt.yaml": "- prompt: line\n",
    "cases.yaml": "- {prompt: line, expected: 5}\n",
    "words.yaml": "- line\n",
}
LARGE = 1 << 20  # bytes of a file that is not read twice for each mistake
UNPRIVILEGED = pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everywhere")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of files good and bad.

    In `lm` are a run by words and, saved later, one by bytes with 18 checkpoints, so that two ids
    begin alike; in `damaged` is one cut short, in `gone` and `changed` ones whose text is no more.
    """
    world = tmp_path_factory.mktemp("world")
    for name, data in FILES.items():
        if isinstance(data, str):
            data = data.encode()
        path = world / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    (world / "empty").mkdir()
    (world / "locked").mkdir(0o555)
    (world / "locked.txt").touch(0)

    def train(line):
        assert main.main([*SMALL.split(), *line.split()]) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        train("--text text.txt --tokenizer word --num_iters 1 --save_dir lm")
        by_bytes = "--text text.txt --mlp gelu --num_iters 18 --save_dir lm"
        train(f"{by_bytes} --steps_per_save 1 --keep 99")
        train("--text text.txt --num_iters 1 --context_size 64 --dim 512 --save_dir wide")
        train("--text good.txt --num_iters 1 --save_dir damaged")
        train("--text good.txt --num_iters 1 --save_dir gone")
        train("--text changed.txt --num_iters 1 --save_dir changed")
        for path in Path("damaged").glob("*/*.safetensors"):
            path.write_bytes(path.read_bytes()[:-100])
        Path("changed.txt").write_text("One more line\n" + LINE)
        Path("good.txt").unlink()
    return world


@functools.lru_cache(64)
def bytes_of(path, inode, size, mtime_ns, ctime_ns):
    """The bytes of a file, read anew once one of these differs; each write changes ctime."""
    return path.read_bytes()


def content(world):
    """The bytes of all files but those that may come and go.

    They are caches of encoded text. Of a folder, its name is content: no run's may be left empty.
    """
    passing = re.compile(r"(^|/)(text|ptb|python|gpt2)(/|$)")
    data = {}
    for path in world.rglob("*"):
        name = str(path.relative_to(world))
        if passing.search(name):
            continue
        if path.is_dir():
            data[name] = None
        elif os.access(path, os.R_OK):
            stat = path.stat()
            state = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            if stat.st_size > LARGE:
                data[name] = bytes_of(path, *state)
            else:
                data[name] = path.read_bytes()
    return data


def one_line(err, *words):
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err, err
    for word in words:
        assert str(word) in err, f"{word!r} is not in: {err}"


def fails(capsys, arguments, *words, status=2, program=main.main):
    """This command line of main.py ends with `status` and one line that has all these words.

    Returns that line. program: a function that runs another command line, and returns its status.
    """
    capsys.readouterr()
    code = program([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == status, f"status {code}\n{out}\n{err}"
    one_line(err, *words)
    if status == 2:  # nothing was begun
        assert "new run" not in out
        assert "from iteration" not in out
    return err


def names_in(world, line):
    """`line` with ids in the place of these names.

    BYTE is a checkpoint by bytes, WORD one by words, and TWICE the letter that two ids begin with.
    """
    if not re.search("BYTE|WORD|TWICE", line):
        return line
    checkpoints = main.list_checkpoints(world / "lm")
    first_letters = [checkpoint.id[0] for checkpoint in checkpoints]
    line = line.replace("BYTE", checkpoints[3].id)
    line = line.replace("WORD", checkpoints[-1].id)
    return line.replace("TWICE", max(first_letters, key=first_letters.count))


NO_CASES = """
    prompt.yaml words.yaml cut.yaml empty.yaml number.yaml deep.yaml text.txt picture.png
""".split()


MISTAKES = [
]
NO_YAML = "is not a YAML list of entries like - {prompt"
# What is typed behind `python -m extras.`
OF_PROGRAMS = [
    ("attention a.png", "required: --prompt", "--help lists all flags"),
    ("attention nowhere/x.png --prompt a", "cannot write nowhere/x.png", "name another file"),
    ("attention '' --prompt a", "file is empty", "give it a value"),
    ("batch", "required: FILE", "--help"),
    ("batch empty.txt", "empty.txt must be a UTF-8 file", "it is empty"),
    ("batch latin.txt", "latin.txt", "UTF-8"),
    ("batch nowhere.txt", "No such file or directory: 'nowhere.txt'", "UTF-8"),
    ("batch prompts.txt --dim 8", "unrecognized arguments: --dim 8", "--help"),
    ("batch prompts.txt --identifier nonsense", "matches no checkpoint", "--list shows all"),
    ("batch prompts.txt --output answers.txt", "holds something other", "name another --output"),
    ("batch prompts.txt --output empty", "is not a regular file", "name another --output"),
    ("batch prompts.txt --output nowhere/out.jsonl", "nowhere/out.jsonl", "--output writable"),
    ("batch prompts.txt --output prompts.txt", "holds something other", "name another --output"),
    ("batch prompts.txt --top_p 2", "--top_p", "at most 1"),
    ("benchmark --identifier latest --save_dir changed", "has changed", "another --save_dir"),
    ("benchmark --prompt a", "--prompt trains nothing", "give the flags of a training"),
    ("benchmark --text text.txt --dim 65536", "this needs at least", "gradients and moments"),
    *[(f"cases {name}", name, NO_YAML) for name in NO_CASES],
    ("cases cases.yaml --output ./empty/../cases.yaml", "would overwrite cases.yaml", "rename it"),
    ("cases cases.yaml --output nowhere/out.json", "nowhere/out.json", "name another file"),
    ("cases cases.yaml --save_dir empty", "no checkpoint in empty", "train a model first"),
    ("cases cases.yaml --save_dir nowhere", "nowhere is not an existing", "check --save_dir"),
    ("cases cases.yaml --top_k 0", "--top_k", "at least 1"),
    ("cases laughs.yaml", "laughs.yaml", "it has an alias, like *a"),
    ("cases ~nobody-here/cases.yaml", "~nobody-here", NO_YAML),
    ("export out", "Hugging Face has no model with --mlp gelu", "train one with --mlp swiglu"),
    ("export out --identifier WORD --quantize 4", "The last dimension", "in which 32 divides --dim"),
    ("export text.txt --identifier WORD", "cannot write to text.txt", "name a folder"),
    ("export text.txt/hf --identifier WORD", "cannot write to text.txt/hf", "name a folder"),
    ("plot x.nonsense", "cannot write x.nonsense", "name another file"),
    ("plot x.png --identifier nonsense", "'nonsense' matches no checkpoint", "--list shows all"),
    ("plot x.png --save_dir empty", "no checkpoint in empty", "train a model first"),
]


def with_status(mistake):
    """The mistake, with status 2 if it names none; a pytest.param has its own."""
    if type(mistake) is tuple and len(mistake) == 3:
        return (*mistake, 2)
    return mistake


@pytest.mark.parametrize("line, cause, remedy, status", list(map(with_status, MISTAKES)))
def test_one_line_and_nothing_lost(line, cause, remedy, status, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = content(world)
    arguments = ["--num_iters", "1", *shlex.split(names_in(world, line))]
    if "--save_dir" not in line:
        arguments += ["--save_dir", "lm"]
    fails(capsys, arguments, cause, remedy, status=status)
    assert content(world) == before


@pytest.mark.parametrize("line, cause, remedy", OF_PROGRAMS)
def test_mistakes_of_programs(line, cause, remedy, world, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(world)
    before = content(world)
    name, *arguments = shlex.split(names_in(world, line))
    if "--save_dir" not in line:
        arguments += ["--save_dir", "lm"]
    program = partial(run_command, name, importlib.import_module(f"extras.{name}").main)
    fails(capsys, arguments, cause, remedy, program=program)
    assert content(world) == before


def test_the_context_size_it_proposes_works(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    line = ["--text", "short.txt", *TINY, "--num_iters", "1", "--save_dir", str(tmp_path / "lm")]
    err = fails(capsys, [*line, "--context_size", 5000])
    proposed = re.search(r"or --context_size (\d+)", err)[1]
    fails(capsys, [*line, "--context_size", int(proposed) + 1])
    assert main.main([*line, "--context_size", proposed]) == 0


def test_no_context_size_is_proposed_for_a_single_token(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    line = ["--text", "short.txt", *TINY, "--num_iters", "1", "--save_dir", str(tmp_path / "lm")]
    err = fails(capsys, [*line, "--train_tokens", "1", "--context_size", "1"])
    assert err.endswith(": use a longer text\n")


def test_a_run_that_another_process_trains(world, tmp_path, capsys):
    """Only the lock of the run's folder is taken: other runs, and readers, go on."""
    save_dir = shutil.copytree(world / "lm", tmp_path / "lm")
    newest = main.list_checkpoints(save_dir)[0]
    with main.lock(newest.folder, fcntl.LOCK_EX):
        line = ["--num_iters", "19", "--save_dir", save_dir]
        before = content(tmp_path)
        fails(capsys, line, f"{newest.run} is being trained by another process", "--new_model")
        assert content(tmp_path) == before
        line = ["--prompt", "a", "--max_tokens", "1", "--save_dir", str(save_dir)]
        assert main.main(line) == 0


def test_files_of_others_are_passed_over(world, tmp_path, monkeypatch, capsys):
    """Beside the runs, and in the folder of one; what is listed is the same, without a word."""
    pytest.importorskip("matplotlib")
    shutil.copytree(world / "lm", tmp_path / "lm")
    folder = ["--save_dir", str(tmp_path / "lm")]
    assert main.main(["--list", *folder]) == 0
    expected = capsys.readouterr().out
    own = main.list_checkpoints(tmp_path / "lm")[0].folder
    for place in (tmp_path / "lm", own, tmp_path / "lm" / "theirs"):
        place.mkdir(exist_ok=True)
        (place / "results.csv").write_bytes("größe,split\n1,2\n".encode("latin-1"))
        (place / "results.jsonl").write_bytes(b"\xff\0")
        shutil.copy(world / "foreign" / "model.safetensors", place)
    importlib.import_module("extras.plot").main([str(tmp_path / "x.png"), *folder])
    capsys.readouterr()
    assert main.main(["--list", *folder]) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert err == ""


@pytest.mark.skipif(main.mx.is_available(main.mx.gpu), reason="there is a GPU")
def test_gpu_where_there_is_none(capsys):
    fails(capsys, ["--gpu"], "--gpu: MLX sees no GPU", "leave it out, or install")


def test_refused_download(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as bound:  # and never listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{bound.getsockname()[1]}"
        line = ["--dataset", "ptb", "--mirror", base, "--save_dir", tmp_path]
        words = [f"{base}/ptb/ptb.train.txt", "--mirror", "--dataset python"]
        err = fails(capsys, line, *words, status=1)
    assert f"Put it at {tmp_path / 'ptb' / 'ptb.train.txt'}" in err


@pytest.mark.parametrize("line, place, words", [
    ("--foo", ".", ["unrecognized arguments: --foo", "--help"]),
    (
        "--text text.txt --save_dir lm",
        "empty",
        ["empty/text.txt: no such file", "give a text's path"],
    ),
    ("--inference --save_dir lm", "pictures", ["lm is not an existing folder", "check --save_dir"]),
])  # fmt: skip
def test_typed_in_a_shell(line, place, words, world):
    """In another working directory than the files are in, and with stdin closed."""
    before = content(world)
    command = [sys.executable, ROOT / "main.py", *line.split()]
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    process = subprocess.run(command, cwd=world / place, capture_output=True, text=True)
    assert process.returncode == 2, process.stderr
    one_line(process.stderr, "main.py: ", *words)
    if place == "empty":  # the folder that was named is made, with nothing but caches in it
        shutil.rmtree(world / "empty" / "lm" / "text")
        (world / "empty" / "lm").rmdir()
    assert content(world) == before
