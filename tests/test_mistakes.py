"""The failure tour: what a newcomer gets wrong in the first hour.

Each mistake ends with one line.
"""

import gzip
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import MAIN, TINY, newest, run, run_extra, saved

import main

LINE = "".join(f"line {i}: the quick brown fox — jümps over {i * i} dogs\n" for i in range(200))


FILES = {
    "text.txt": LINE,
    "changed.txt": LINE,
    "empty.txt": "",
    "tiny.txt": "tiny",
    "short.txt": LINE[:100],
    "good.txt": LINE[:900],
    "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "foreign/model.safetensors": b"\0" * 64,
    "book.pdf": b"%PDF-1.4\n" + b"x" * 99,
    "book.docx": b"PK\x03\x04" + b"x" * 99,
    "book.txt.gz": gzip.compress(LINE.encode()),
    "rows.jsonl": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "prompts.txt": "line\n",
    "answers.txt": "my own notes\n",
    "latin.txt": "jümps\n".encode("latin-1"),
    "hf/config.json": '{"model_type": "gpt2"}',
    "other.yaml": "config: other.yaml\n",
    "mapping.yaml": "dim: 4\n  heads: [3\n",
    "sections.yaml": "advanced:\n  use_lora: true\nhardware: {device: cpu, dim: 8}\n",
    "deep.yaml": "[" * 1_200,
    "long.yaml": "dim: 8  #" + "x" * (2 << 20),
    "list.yaml": "- dim\n",
    "two.yaml": "dim: [16, 32]\n",
    "prompt.yaml": "- prompt: line\n",
    "cases.yaml": "- {prompt: line, expected: 5}\n",
    "words.yaml": "- line\n",
}


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

    def train(line):
        assert main.main([*TINY, "--num_blocks", "1", *line.split()]) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        train("--text text.txt --tokenizer word --num_iters 1 --save_dir lm")
        steps = "--num_iters 18 --steps_per_save 1 --keep 99"
        train(f"--text text.txt --mlp gelu {steps} --save_dir lm")
        train("--text text.txt --num_iters 1 --save_dir damaged")
        train("--text good.txt --num_iters 1 --steps_per_eval 0 --save_dir gone")
        train("--text changed.txt --num_iters 1 --save_dir changed")
        for path in Path("damaged").glob("*/*.safetensors"):
            path.write_bytes(path.read_bytes()[:-100])
        Path("changed.txt").write_text("One more line\n" + LINE)
        Path("good.txt").unlink()
    return world


def content(world):
    """What tells whether a file was written, of all but those that may come and go.

    They are caches of encoded text. Of a folder, its name is content: no run's may be left empty.
    """
    passing = re.compile(r"(^|/)(text|ptb|python|gpt2)(/|$)")
    found = {}
    for path in world.rglob("*"):
        name = str(path.relative_to(world))
        if passing.search(name):
            continue
        stat = path.stat()
        found[name] = None if path.is_dir() else (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


@pytest.fixture
def left_alone(world, monkeypatch):
    """Puts a test into that folder, whose files it has to leave as they are."""
    monkeypatch.chdir(world)
    before = content(world)
    yield
    assert content(world) == before


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_another_launcher_is_named(name, left_alone):
    _, err = run("--text", "text.txt", "--save_dir", "lm", env={name: "2"}, status=2)
    one_line(err, f"launcher other than MLX's has started 2 processes ({name})", "mlx.launch -n 2")


def one_line(err, *words):
    assert err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert str(word) in err, f"{word!r} is not in: {err}"


def read_arguments(line):
    """The arguments in a line: with `lm` if it names no folder, and ids in the place of names.

    BYTE is a checkpoint by bytes, WORD one by words, and TWICE the letter that two ids begin with.
    """
    if "--save_dir" not in line:
        line += " --save_dir lm"
    checkpoints = saved("lm")
    first_letters = [checkpoint.id[0] for checkpoint in checkpoints]
    line = line.replace("BYTE", checkpoints[3].id)
    line = line.replace("WORD", checkpoints[-1].id)
    return shlex.split(line.replace("TWICE", max(first_letters, key=first_letters.count)))


NO_CASES = "prompt.yaml words.yaml deep.yaml".split()
NO_FLAGS = "deep.yaml list.yaml picture.png".split()
# What is typed after `python main.py`; the cause and the remedy that the line names; the status,
# if it is not 2. A kind of value has one row: all flags of it share its function.
MISTAKES = [
    # Flags that do not exist
    ("--batchsize 4", "--batchsize", "--batch_size?"),
    ("-inference", "-inference", "--inference?"),
    ("dim=16", "dim=16", "--dim?"),
    ("--text text.txt –num_iters=0", "--num_iters", "must be at least"),
    ("--text -text.txt", "--text", "is typed after ="),
    ("--mlp 'gelu\r' --dim 30 --num_heads 2 --text text.txt", "--dim 30", "try 32"),
    ("train", "unrecognized arguments: train", "no flag takes it"),
    ("--qk_norm False", "unrecognized arguments: False", "a switch has no value"),
    ("--prompt the company", "company", "a text with blanks needs quotes"),
    # Values that cannot be
    ("--dim", "--dim: expected one argument", "--help"),
    ("--num_iters 10k", "'10k'", "whole number"),
    ("--dim 1000000", "--dim: must be at least 1 and at most 65536", "not 1000000"),
    ("--evaluate test.txt", "--evaluate: must be one of train, valid, test", "not test.txt"),
    ("--quantize int3", "--quantize: must be one of 4, 8, 16", "not 3"),
    ("--report_to tensorboard", "--report_to: must be wandb or none", "not tensorboard"),
    ("--identifier ''", "--identifier: is empty", "leave it out"),
    ("--text text.txt ''", "--text: is empty", "leave it out"),
    # Values that do not fit each other
    ("--text text.txt --dim 30 --num_heads 2", "--dim 30 is not a multiple", "try 32"),
    ("--text text.txt --lora_rank 4", "--lora_rank trains adapters", "name it by --init_from"),
    ("--valid_text text.txt", "--dataset text and --valid_text go with --text", "your files"),
    ("--list --inference", "--inference", "not allowed with --list"),
    ("--identifier latest --new_model", "--identifier resumes a run", "use only one"),
    # Sizes that no machine has
    ("--text text.txt --dim 65536", "this needs about", "or a smaller model"),
    (
        "--text text.txt --batch_size 1048576 --context_size 9999",
        "this needs about",
        "smaller model or context",
    ),
    # Texts
    ("--text nowhere.txt", "nowhere.txt: no such file", "give a text's path"),
    ("--text $NOWHERE/a.txt", "$NOWHERE/a.txt: no such user or variable", "write the folder out"),
    ("--text ~nobody-here/a.txt", "~nobody-here/a.txt: no such user", "write the folder out"),
    ("--text empty.txt", "there is no text in", "give other files"),
    ("--text tiny.txt", "no text is left for training or validation", "give more text"),
    ("--text short.txt --context_size 5000", "has 95 tokens", "tokens or --context_size 94"),
    ("--text picture.png", "picture.png holds null characters", "it is no plain text"),
    ("--text book.pdf", "book.pdf is a PDF", "save its text"),
    ("--text book.docx", "book.docx is a zip archive", "unpack it"),
    ("--text book.txt.gz", "book.txt.gz is compressed", "gzip -dc"),
    ("--text rows.jsonl", "rows.jsonl is a pointer", "git lfs pull"),
    ("--text https://example.org/a.txt", "https://example.org/a.txt is an address", "download"),
    ("--text text.txt --tokenizer nowhere.json", "nowhere.json must be a", "or one of"),
    ("--text text.txt --eval_test", "text has no test split", "--test_text"),
    ("--save_dir changed", "the text or tokenizer of text-", "new run with --new_model"),
    ("--evaluate valid --save_dir gone", "good.txt: no such file", "put it back"),
    ("--dataset ptb --mirror nowhere", "nowhere/ptb/ptb.train.txt", "Put it at", 1),
    ("--dataset ptb --mirror http://127.0.0.1:9", "Connection refused", "--dataset python", 1),
    ("--text text.txt --tokenizer gpt2 --mirror empty", "empty/gpt2/tokenizer.json", "by hand", 1),
    # Folders and checkpoints
    ("--dataset python --data_dir text.txt", "cannot write texts to text.txt", "name a folder"),
    ("--dataset python --save_dir text.txt/lm", "cannot write to --save_dir", "name a folder"),
    ("--inference --save_dir empty", "no checkpoint in empty", "train a model first"),
    ("--list --save_dir nowhere", "nowhere holds no runs", "train a model first"),
    ("--inference --dim 32", "--dim 32 contradicts text-", "has 16: leave --dim out"),
    ("--identifier unknown", "'unknown' matches no checkpoints in lm", "these runs: text-"),
    ("--identifier TWICE --prompt a", "checkpoints in lm, which has these", "see --list"),
    ("--identifier latest --mlp swiglu", "--mlp swiglu contradicts", "has gelu: leave --mlp out"),
    ("--identifier latest --preset tiny", "--context_size 128 contradicts", "leave --context_size"),
    ("--identifier latest --save_dir damaged", "another SHA1", "use another one from --list", 1),
    ("--text text.txt --init_from latest --save_dir damaged", "another SHA1", "name another", 1),
    ("--evaluate valid --eval_stride 33", "--eval_stride 33 would skip tokens", "at most 8"),
    # A run that blows up
    ("--text text.txt --dim 16 --learning_rate 1e30 --num_iters 9", "not finite", "a lower", 1),
    # YAML files of flags
    ("--config nowhere.yaml", "nowhere.yaml: no such file", "the recipes are characters, finetune"),
    ("--config mapping.yaml", "mapping values are not allowed here", "line 2, column 8"),
    ("--config sections.yaml", "unrecognized arguments: --use_lora", "--lora_rank 8 trains"),
    ("--config other.yaml", "it names another file", "like dim: 8"),
    ("--config two.yaml", "dim has a list or a mapping instead of a value", "like dim: 8"),
    ("--config long.yaml", "longer than 1,048,576 bytes", "like dim: 8"),
    *[(f"--config {name}", name, "YAML file of flags like dim: 8") for name in NO_FLAGS],
    # Models of others
    ("--prompt a --draft nonsense", "--draft 'nonsense' matches no checkpoints", "see --list"),
    ("--prompt a --draft WORD", "has a different tokenizer", "use one trained with the same"),
    ("--prompt a --quantize 4", "needs a model in which 32 divides --dim", "(257,16)"),
    ("--text text.txt --init_from no/such/folder", "is no folder here", "name one"),
    ("--text text.txt --init_from hf/config.json", "is a file", "name the folder"),
    ("--text text.txt --init_from empty", "empty' matches no checkpoints", "see --list"),
    ("--text text.txt --init_from hf", "its model_type is gpt2", "name another model"),
    ("--text text.txt --init_from BYTE --dim 32", "contradicts --init_from", "leave --dim out"),
    ("--text text.txt --init_from BYTE --teacher WORD", "another tokenizer", "use a teacher"),
    ("--text text.txt --teacher BYTE --tokenizer char", "--tokenizer char", "leave --tokenizer"),
]
NO_YAML = "is not a YAML list of entries like - {prompt"
# What is typed behind `python -m extras.`
OF_PROGRAMS = [
    ("attention nowhere/x.png --prompt a", "cannot write nowhere/x.png", "name another file"),
    ("batch latin.txt", "latin.txt", "UTF-8"),
    ("batch prompts.txt --output answers.txt", "holds something other", "name another --output"),
    ("batch prompts.txt --output nowhere/out.jsonl", "nowhere/out.jsonl", "cannot write --output"),
    ("benchmark --prompt a", "--prompt trains nothing", "give the flags of a training"),
    *[(f"cases {name}", name, NO_YAML) for name in NO_CASES],
    ("cases cases.yaml --output ./empty/../cases.yaml", "would overwrite cases.yaml", "rename it"),
    ("export out", "Hugging Face has no model with --mlp gelu", "train one with --mlp swiglu"),
    ("export out --identifier WORD --quantize 4", "has no Arcee", "--quantize 16 or a .gguf"),
    ("export text.txt/hf --identifier WORD", "cannot write to text.txt/hf", "name a folder"),
    ("plot x.nonsense", "cannot write x.nonsense", "name another file"),
    ("plot x.png --save_dir gone", "gone have reported nothing yet", "--steps_per_report"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[ascii(row[0]) for row in MISTAKES])
def test_one_line_and_nothing_lost(mistake, left_alone, capsys):
    line, cause, remedy, *others = mistake
    status = others[0] if others else 2
    code = main.main(["--num_iters", "1", *read_arguments(line)])
    out, err = capsys.readouterr()
    assert code == status, f"status {code}\n{out}\n{err}"
    one_line(err, cause, remedy)
    if status == 2:
        assert "from iteration" not in out, "nothing was begun"


@pytest.mark.parametrize("line, cause, remedy", OF_PROGRAMS)
def test_mistakes_of_programs(line, cause, remedy, left_alone):
    pytest.importorskip("matplotlib")
    out, err = run_extra(*read_arguments(line), status=2)
    assert not out
    one_line(err, cause, remedy)


def test_files_of_others_are_passed_over(world, tmp_path):
    """Beside the runs, and in the folder of one; what is listed is the same, without a word."""
    folder = shutil.copytree(world / "lm", tmp_path / "lm")
    expected, _ = run("--list", "--save_dir", folder)
    for place in (folder, newest(folder).folder, folder / "theirs"):
        place.mkdir(exist_ok=True)
        (place / "results.csv").write_bytes("größe,split\n1,2\n".encode("latin-1"))
        (place / "results.jsonl").write_bytes(b"\xff\0")
        shutil.copy(world / "foreign" / "model.safetensors", place)
    assert run("--list", "--save_dir", folder) == (expected, "")


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="there is a GPU")
def test_gpu_where_there_is_none():
    _, err = run("--gpu", status=2)
    one_line(err, "--gpu: MLX sees no GPU", "omit --gpu, or install MLX for it: pip")


@pytest.mark.parametrize("line, place, words", [
    ("--inference --save_dir lm", "empty", ["--save_dir lm holds no runs", "train a model"]),
    ("--text ../text.txt --save_dir s_\udcff", "foreign", ["names in UTF-8"]),
])  # fmt: skip
def test_typed_in_a_shell(line, place, words, left_alone):
    """In another working directory than the files are in, and with stdin closed."""
    command = f"exec '{sys.executable}' '{MAIN}' {line} <&-"
    process = subprocess.run(command, shell=True, cwd=place, capture_output=True, text=True)
    assert process.returncode == 2, process.stderr
    one_line(process.stderr, "main.py: ", *words)
