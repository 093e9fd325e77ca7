"""The failure tour: what a newcomer gets wrong in the first hour.

Each mistake ends with one line.
"""

import contextlib
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


OTHER_NAMES = {  # what users of other programs type, and the flag that it is here
    "lr 3e-4": "learning_rate",
    "lr=3e-4": "learning_rate",
    "max_iters 5": "num_iters",
    "block_size 8": "context_size",
    "n_layer 2": "num_blocks",
    "num_layers 3": "num_blocks",
    "n_embd 8": "dim",
    "n_head 2": "num_heads",
    "out_dir x": "save_dir",
    "interactive": "inference",
    "ckpt abc": "identifier",
    "max_new_tokens 5": "max_tokens",
    "temp 0": "temperature",
    "gradient_accumulation_steps 2": "grad_accumulation",
    "eval_interval 5": "steps_per_eval",
    "log_interval 5": "steps_per_report",
    "warmup_iters 5": "lr_warmup",
    "max_grad_norm 1": "grad_clip",
    "d_model 8": "dim",
    "d_ff 8": "mlp_dim",
    "start x": "prompt",
}
AT_LEAST_1 = """
    num_iters context_size num_blocks dim num_heads num_kv_heads mlp_dim batch_size
    grad_accumulation steps_per_report steps_per_eval steps_per_save keep patience max_tokens
    num_samples eval_stride lora_rank train_tokens
""".split()
AT_LEAST_0 = """
    seed lr_warmup learning_rate weight_decay embedding_decay grad_clip eval_tokens top_k top_p
    min_p temperature dropout dropout_final min_lr lr_cooldown beta1 beta2 max_minutes average
    lora_alpha teacher_weight
""".split()
FINITE = """
    learning_rate weight_decay embedding_decay grad_clip temperature dropout valid_fraction
""".split()
NOT_EMPTY = """
    text save_dir data_dir mirror identifier init_from teacher
""".split()
TOO_LARGE = {  # sizes that no machine has room for, and what needs it
    "--dim 65536": "gradients and moments",
    "--num_blocks 512 --dim 8192": "gradients and moments",
    "--batch_size 1048576 --context_size 4096": "attention scores",
    "--batch_size 1048576 --context_size 1 --num_blocks 64": "hidden units",
    "--grad_accumulation 2147483647": "tokens",
    "--init_from BYTE --lora_rank 2147483647": "gradients and moments",
}
NO_FLAGS = """
    deep.yaml list.yaml none.yaml false.yaml cut.yaml number.yaml zero.yaml text.txt picture.png
""".split()
NO_CASES = """
    prompt.yaml words.yaml cut.yaml empty.yaml number.yaml deep.yaml text.txt picture.png
""".split()


def names_of_others():
    """Each is unknown, and its line says what the flag is called here."""
    for typed, ours in OTHER_NAMES.items():
        name = re.match(r"\w+", typed)[0]
        yield f"--{typed}", f"unrecognized arguments: --{typed}", f"--{name} is --{ours} here"


def unknown_choices():
    """A value that is none of a flag's choices, of which the line names each."""
    for group in main.FLAGS.values():
        for name, (_, options) in group.items():
            if "type" in options:
                continue
            for choice in options.get("choices", []):
                yield f"--{name} nonsense", f"--{name}", choice


# What is typed after `python main.py`; the cause and the remedy that the line names; the status,
# if it is not 2.
MISTAKES = [
    # Flags that do not exist
    ("--batchsize 4", "--batchsize", "--batch_size?"),
    ("--nun-iters 10", "--nun-iters", "--num_iters?"),
    *names_of_others(),
    ("--block-size 8", "--block_size", "--block_size is --context_size here"),
    ("--n_layer 2 --lr 1", "--n_layer is --num_blocks here", "--lr is --learning_rate here"),
    ("--resume", "a run resumes by itself", "--identifier names another"),
    ("--device cpu", "--device cpu", "--gpu, or nothing for the CPU"),
    ("--compile", "--compile", "every step is compiled"),
    ("--compile=False", "--compile=False", "every step is compiled"),
    ("--stream", "--stream", "always printed as it is sampled"),
    ("--epochs 3", "--epochs", "--num_iters counts steps"),
    ("--eval_iters 5", "--eval_iters", "--eval_tokens counts tokens, not batches"),
    (
        "--checkpoint abc",
        "abc",
        "gradient checkpointing takes no value; --identifier names a checkpoint",
    ),
    ("--dat ptb", "--dat", "--help"),
    ("--num_blo=3", "--num_blo", "--num_blocks?"),
    ("-inference", "-inference", "--inference?"),
    ("—inference", "—inference", "--inference?"),
    ("--Dim 16", "--Dim", "--dim?"),
    ("train", "train", "is a flag before it missing, or quotes around it?"),
    ("ptb", "ptb", "is --dataset before ptb missing?"),
    ("text.txt", "text.txt", "is --text before text.txt missing?"),
    ("layers.yaml", "layers.yaml", "is --config before layers.yaml missing?"),
    ("first --batchsize 4", "first", "is --config before first missing?; --batch_size?"),
    ("config/train_char.py", "config/train_char.py", "a YAML file or a recipe: --config first"),
    ("dim=16", "dim=16", "--dim=16?"),
    ("--dataset openwebtext --n_layer 3", "by --text; --n_layer is --num_blocks here", "--help"),
    ("--lr 1 --dim x", "invalid whole number value: 'x'", "(--lr is --learning_rate here; --help"),
    ("--foo=3 ptb", "--foo=3 ptb", "is --dataset before ptb missing?"),
    ("--foo ptb", "unrecognized", "--foo ptb (--help lists all flags)"),
    ("''", "unrecognized", "--help"),
    ("--qk-norm False", "False", "--qk_norm takes no value: --no-qk_norm turns it off"),
    ("--no-gpu False", "False", "--no-gpu takes no value"),
    ("--gpu=true", "ignored explicit argument", "--gpu takes no value: --no-gpu turns it off"),
    ("--checkpoint latest", "latest", "--help"),
    ("--prompt the company said", "company said", "quotes around it?"),
    ("--prompt the 'a\nb'", "a b", "--help"),
    # Values that cannot be
    (f"--dim {10**6}", "--dim", "at most 65536"),
    (f"--num_blocks {10**5}", "--num_blocks", "at most 4096"),
    (f"--batch_size {10**9}", "--batch_size", "at most 1048576"),
    ("--dim", "expected one argument", "--dim N: model dimension"),
    ("--text", "expected at least one argument", "--text PATH: train on your own"),
    ("--evaluate", "expected one argument", "--evaluate train or valid or test: evaluate a"),
    ("--quantize", "expected one argument", "--quantize 4 or 8 or 16: quantize weights"),
    ("--dim=", "--dim", "whole number"),
    ("--dim wide", "'wide'", "whole number"),
    ("--dim 1e3", "'1e3'", "whole number"),
    ("--num_iters 10k", "'10k'", "whole number"),
    ("--num_iters 100,000", "'100,000'", "whole number"),
    ("--seed 1.5", "'1.5'", "whole number"),
    (f"--seed {2**64}", f"{2**64}", "at most 2147483647"),
    (f"--mlp_dim {10**12}", f"{10**12}", "at most"),
    ("--learning_rate fast", "'fast'", "number"),
    ("--learning_rate 3e-4,", "'3e-4,'", "number"),
    *[(f"--{flag} 0", f"--{flag}", "at least 1") for flag in AT_LEAST_1],
    *[(f"--{flag} -1", f"--{flag}", "at least 0") for flag in AT_LEAST_0],
    *[(f"--{flag} inf", "inf", "at least") for flag in FINITE],
    *[(f"--{flag} nan", "nan", "at least") for flag in FINITE],
    ("--dropout 1", "--dropout", "at least 0 and at most 0.9"),
    ("--top_p 1.1", "--top_p", "at least 0 and at most 1"),
    ("--average 20", "--average", "at least 0 and at most 1"),
    ("--lr_cooldown 200", "--lr_cooldown", "at least 0 and at most 1"),
    ("--valid_fraction 0", "--valid_fraction", "at least 0.001 and at most 0.5"),
    ("--valid_fraction 0.9", "--valid_fraction", "at least 0.001 and at most 0.5"),
    ("--repetition_penalty 0", "--repetition_penalty", "at least 0.01"),
    ("--vocab_size 10 --tokenizer bpe", "--vocab_size", "at least 257"),
    ("--vocab_size 2147483647 --tokenizer bpe", "--vocab_size", "at most 1048576"),
    *[(f"--{flag} ''", f"--{flag} is empty", "leave it out") for flag in NOT_EMPTY],
    ("--text text.txt --valid_text ''", "--valid_text is empty", "leave it out"),
    *unknown_choices(),
    ("--dataset shakespeare_char", "'shakespeare_char'", "(tinyshakespeare, by characters"),
    ("--dataset openwebtext", "'openwebtext'", "download files of it, and name them by --text"),
    ("--lr_schedule cosin", "'cosin'", "(cosine?; --help"),
    ("--quantize 3", "3", "8"),
    # Values that do not fit each other
    (
        "--text text.txt --dim 100 --num_heads 8 --new_model",
        "--dim 100 is not a multiple of 2 * num_heads 8",
        "try 96",
    ),
    ("--text text.txt --dim 24 --num_heads 8 --new_model", "--dim 24", "try 32"),
    ("--text text.txt --dim 30 --num_heads 2 --new_model", "--dim 30", "try 32"),
    (
        "--text text.txt --num_heads 8 --num_kv_heads 3 --new_model",
        "--num_kv_heads 3 does not divide",
        "try 1",
    ),
    (
        "--dataset python --min_lr 0.1",
        "--min_lr 0.1 is above --learning_rate 0.0003",
        "give a lower one",
    ),
    (
        "--text text.txt --learning_rate 0.5 --dim 30 --num_heads 2",
        "--dim 30",
        "try 32",
    ),
    ("--text text.txt --lora_rank 4", "--lora_rank", "requires one of --init_from, --identifier"),
    (
        "--text text.txt --lora_rank 4 --init_from x --embedding_decay 1",
        "--lora_rank and --embedding_decay are mutually exclusive",
        "use one of them",
    ),
    ("--text text.txt --lora_alpha 4", "--lora_alpha", "requires one of --lora_rank"),
    (
        "--dataset python --text text.txt",
        "--dataset and --text are mutually exclusive",
        "use one of them",
    ),
    ("--config laughs.yaml", "--config", "it has an alias, like *a"),
    ("--config merged.yaml", "--config", "it has an alias, like *a"),
    ("--config long.yaml", "--config", "longer than 1,048,576 characters"),
    ("--list --identifier latest", "--identifier and --list are mutually exclusive", "use one"),
    (
        "--identifier latest --new_model",
        "--identifier and --new_model are mutually exclusive",
        "use one of them",
    ),
    (
        "--inference --new_model",
        "--inference and --new_model are mutually exclusive",
        "use one of them",
    ),
    (
        "--inference --prompt a",
        "--inference and --prompt are mutually exclusive",
        "use one of them",
    ),
    (
        "--prompt a --evaluate valid",
        "--prompt and --evaluate are mutually exclusive",
        "use one of them",
    ),
    (
        "--text text.txt --quantize 4",
        "--quantize",
        "requires one of --prompt, --inference, --evaluate",
    ),
    ("--valid_text text.txt", "--valid_text", "requires one of --text, --identifier"),
    # Sizes that no machine has
    *[
        (f"--text text.txt --new_model {sizes}", "this needs at least", what)
        for sizes, what in TOO_LARGE.items()
    ],
    (
        "--evaluate valid --batch_size 1048576 --save_dir wide",
        "this needs at least",
        "hidden states",
    ),
    # Texts
    ("--text nowhere.txt", "nowhere.txt: no such file", "give a text's path"),
    ("--text *.md", "*.md: no such file, folder or pattern to read", "give a text's path"),
    (
        "--text text.txt --valid_text nowhere.txt --new_model",
        "nowhere.txt: no such file",
        "give a text's path",
    ),
    pytest.param(
        "--text locked.txt",
        "locked.txt: no such file",
        "give a text's path",
        2,
        marks=UNPRIVILEGED,
    ),
    ("--text empty.txt", "there is no text in", "give other files to --text"),
    ("--text empty", "there is no text in", "give other files to --text"),
    ("--text pictures", "there is no text in", "give other files to --text"),
    ("--text tiny.txt", "no text is left for training or validation", "give more text"),
    ("--text text.txt --valid_text empty.txt --new_model", "no text is left", "give more text"),
    (
        "--text short.txt --context_size 5000",
        "fewer than --context_size 5000",
        "longer text or --context_size",
    ),
    (
        "--text text.txt --train_tokens 5 --new_model",
        "5 tokens, fewer than --context_size 48",
        "--context_size 4",
    ),
    ("--text cut.txt", "cut.txt is not UTF-8 at byte 5:", "iconv"),
    ("--text windows.txt", "windows.txt is not UTF-8 at byte 0:", "iconv"),
    ("--text picture.png", "picture.png is not UTF-8", "convert it"),
    ("--save_dir changed", "has changed", "start a new run with --new_model"),
    ("--identifier latest --save_dir changed", "has changed", "start a new run with --new_model"),
    ("--identifier latest --save_dir gone", "good.txt: no such file", "put it back"),
    ("--evaluate valid --save_dir gone", "good.txt: no such file", "put it back"),
    ("--text text.txt --eval_test", "text has no test split", "--test_text"),
    ("--evaluate test", "text has no test split", "--test_text"),
    ("--text text.txt --eval_stride 4", "--eval_stride", "requires --evaluate"),
    ("--dataset ptb --mirror nowhere", "nowhere/ptb/ptb.train.txt", "Put it at", 1),
    (
        "--dataset ptb --mirror ~nobody-here",
        "~nobody-here/ptb/ptb.train.txt: no such user",
        "write the folder out",
    ),
    ("--text text.txt --tokenizer gpt2 --mirror empty", "empty/gpt2/tokenizer.json", "by hand", 1),
    # Folders and checkpoints
    (
        "--dataset python --data_dir text.txt",
        "cannot write to --data_dir text.txt",
        "name a folder of yours",
    ),
    ("--inference --save_dir empty", "no checkpoint in empty", "or check --save_dir"),
    ("--inference --save_dir nowhere", "nowhere is not an existing folder", "check --save_dir"),
    ("--list --save_dir nowhere", "nowhere is not an existing folder", "check --save_dir"),
    ("--list --save_dir text.txt", "text.txt is not an existing folder", "check --save_dir"),
    ("--prompt a --save_dir foreign", "no checkpoint in foreign", "train a model first"),
    ("--dataset python --save_dir text.txt", "--save_dir text.txt", "name a folder"),
    ("--dataset python --save_dir text.txt/lm", "--save_dir text.txt/lm", "name a folder"),
    pytest.param(
        "--dataset python --save_dir locked/lm",
        "(Permission",
        "a folder of yours",
        2,
        marks=UNPRIVILEGED,
    ),
    ("--inference --dim 32", "no checkpoint in lm has the flags given", "--list"),
    (
        "--identifier latest --save_dir empty",
        "--identifier 'latest' matches no checkpoints in empty",
        "has these runs: none (see --list)",
    ),
    (
        "--identifier unknown",
        "--identifier 'unknown' matches no checkpoint",
        "(see --list)",
    ),
    (
        "--identifier unknown --inference",
        "--identifier 'unknown' matches no checkpoint",
        "text-",
    ),
    (
        "--identifier lm/BYTE.safetensors --prompt a",
        "matches no checkpoint",
        "(see --list)",
    ),
    (
        "--identifier TWICE --prompt a",
        "checkpoints in lm, which has these runs: ",
        "(see --list)",
    ),
    (
        "--identifier latest --dim 32",
        "--dim 32 contradicts",
        "leave --dim out, or start a new run with --new_model",
    ),
    ("--identifier latest --mlp swiglu", "--mlp swiglu contradicts", "has gelu: leave --mlp out"),
    ("--identifier latest --seed 1", "--seed 1 contradicts", "has 42: leave --seed out"),
    (
        "--identifier latest --preset tiny",
        "--context_size 128 contradicts",
        "has 8: leave --context_size out",
    ),
    (
        "--identifier latest --dataset python",
        "--dataset python contradicts",
        "has text: leave --dataset out",
    ),
    (
        "--identifier latest --text changed.txt",
        "the text or tokenizer of text-",
        "has changed: start a new run with --new_model",
    ),
    (
        "--prompt a --identifier latest --num_blocks 3",
        "--num_blocks 3 contradicts",
        "has 1: leave --num_blocks out",
    ),
    (
        "--identifier latest --tokenizer word",
        "--tokenizer word contradicts",
        "has byte: leave --tokenizer out",
    ),
    (
        "--prompt a --identifier latest --save_dir damaged",
        "is damaged (its .safetensors",
        "use another one from --list",
        1,
    ),
    (
        "--text text.txt --init_from latest --save_dir damaged",
        "is damaged (its .safetensors",
        "--init_from cannot be used: name another",
        1,
    ),
    # A run that blows up
    (
        "--text text.txt --dim 16 --learning_rate 1e30 --num_iters 30 --steps_per_save 99",
        "not finite",
        "choose a lower --learning_rate or --grad_clip, and start over with --new_model",
        1,
    ),
    # YAML files of flags
    (
        "--config nowhere.yaml",
        "--config nowhere.yaml: no such file",
        "none of the recipes characters, finetune, first",
    ),
    ("--config empty", "--config empty: no such file", "none of the recipes characters"),
    ("--config ''", "--config : no such file", "none of the recipes characters"),
    ("--config ../recipes/first", "no such file", "none of the recipes characters"),
    ("--config ~nobody-here/flags.yaml", "~nobody-here/flags.yaml", "write the folder out"),
    ("--config mapping.yaml", "line 2, column 8: mapping values are not allowed", "like dim: 8"),
    ("--config sections.yaml", "no flag is named device, use_lora", "CPU; --use_lora is --lora"),
    ("--config layers.yaml", "heads, layers", "--help lists all"),
    ("--config null.yaml", "no flag is named dimm", "--help lists all"),
    (
        "--config gpt.yaml",
        "--d_model is --dim here; --max_steps is --num_iters here",
        "--n_layers is --num_blocks here",
    ),
    (
        "--config gpt.yaml",
        "no flag is named d_model, max_steps, n_layers, warmup_steps",
        "--warmup_steps is --lr_warmup",
    ),
    ("--config other.yaml", "no flag is named config", "--help lists all"),
    ("--config comments.yaml", "--dim: invalid whole number value: 'wide'", "YAML file of flags"),
    ("--config twice.yaml", "dim stands in it twice", "YAML file of flags"),
    ("--config wide.yaml", "--dim: invalid whole number value: 'wide'", "YAML file of flags"),
    ("--config half.yaml", "--num_iters: invalid whole number value: '1.5'", "YAML file of flags"),
    ("--config true.yaml", "--dim", "YAML file of flags"),
    ("--config null_name.yaml", "--identifier holds a null character", "leave it out"),
    ("--config two.yaml", "dim takes one value", "YAML file of flags"),
    ("--config yes.yaml", "--new_model", "YAML file of flags"),
    ("--config both.yaml", "--inference and --new_model are mutually exclusive", "use one of them"),
    *[(f"--config {name}", name, "YAML file of flags like dim: 8") for name in NO_FLAGS],
    # Prompts
    (
        "--prompt a --draft nonsense",
        "--draft 'nonsense' matches no checkpoint",
        "(see --list)",
    ),
    (
        "--prompt a --draft WORD",
        "has a different tokenizer",
        "use one trained with the same tokenizer",
    ),
    ("--prompt a --quantize 4", "The last dimension", "needs a model in which 32 divides --dim"),
    # Models of others
    (
        "--text text.txt --init_from nonsense",
        "--init_from 'nonsense' matches no checkpoint",
        "(see --list)",
    ),
    (
        "--text text.txt --init_from nonsense --save_dir empty",
        "--init_from 'nonsense' matches no checkpoints in empty",
        "has these runs: none (see --list)",
    ),
    (
        "--text text.txt --init_from resume",
        "--init_from 'resume' matches no checkpoints in lm",
        "(see --list)",
    ),
    (
        "--text text.txt --init_from gpt2 --save_dir empty",
        "--init_from 'gpt2' matches no checkpoints in empty",
        "has these runs: none",
    ),
    (
        "--text text.txt --new_model --init_from empty",
        "empty holds no Llama, Mistral, Qwen2, Qwen3 or Arcee model",
        "see --list",
    ),
    (
        "--text text.txt --new_model --init_from lm",
        "lm holds no Llama, Mistral, Qwen2, Qwen3 or Arcee model",
        "see --list",
    ),
    ("--text text.txt --new_model --init_from hf", "model_type gpt2", "see --list"),
    (
        "--text text.txt --new_model --init_from BYTE --dim 32",
        "--dim 32 contradicts --init_from",
        "leave --dim out",
    ),
    (
        "--text text.txt --new_model --init_from BYTE --teacher WORD",
        "has a different tokenizer",
        "use one with the same tokenizer",
    ),
    (
        "--text text.txt --new_model --teacher BYTE --tokenizer char",
        "--tokenizer char",
        "leave --tokenizer out",
    ),
    (
        "--text text.txt --new_model --teacher BYTE --context_size 9",
        "--context_size 9 is more than the teacher has read",
        "at most 8",
    ),
    (
        "--text text.txt --new_model --teacher nonsense",
        "--teacher 'nonsense' matches no checkpoint",
        "(see --list)",
    ),
    # Tools
    ("--evaluate valid --eval_stride 33", "--eval_stride 33 would skip tokens", "at most 8"),
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


@contextlib.contextmanager
def locked(folder):
    """Holds the lock of a folder, as the process that trains there does."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_a_run_that_another_process_trains(world, tmp_path, capsys):
    """Only the lock of the run's folder is taken: other runs, and readers, go on."""
    save_dir = shutil.copytree(world / "lm", tmp_path / "lm")
    folder = main.list_checkpoints(save_dir)[0].folder
    with locked(folder):
        line = ["--num_iters", "19", "--save_dir", save_dir]
        before = content(tmp_path)
        fails(capsys, line, f"{folder.name} is being trained by another process", "--new_model")
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
