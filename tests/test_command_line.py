"""The command line: where each value comes from, --help, --list, the default folder.

Mistakes: test_mistakes.py.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, flags, ids, run, start

import datasets
import main
from extras import names

# Those that are documented, which a new flag leaves as they are.
DEFAULTS = dict(
    dataset="ptb",
    text=None,
    valid_text=None,
    test_text=None,
    valid_fraction=0.1,
    train_tokens=None,
    tokenizer="auto",
    vocab_size=32000,
    save_dir=None,
    mirror=None,
    identifier=None,
    new_model=False,
    num_iters=100000,
    max_minutes=None,
    config=None,
    preset=None,
    gpu=False,
    seed=42,
    context_size=48,
    num_blocks=4,
    dim=1024,
    num_heads=8,
    num_kv_heads=None,
    mlp="relu2",
    mlp_dim=None,
    qk_norm=False,
    untie=False,
    dropout=0.0,
    batch_size=32,
    grad_accumulation=1,
    learning_rate=3e-4,
    min_lr=None,
    weight_decay=1e-5,
    embedding_decay=None,
    beta1=0.9,
    beta2=0.99,
    optimizer="adamw",
    lr_warmup=200,
    lr_schedule="constant",
    lr_cooldown=1.0,
    grad_clip=1.0,
    dropout_final=None,
    dtype="float32",
    checkpoint=False,
    average=0.0,
    patience=None,
    steps_per_report=10,
    steps_per_eval=1000,
    eval_tokens=100000,
    steps_per_save=None,
    eval_test=False,
    keep=3,
    inference=False,
    prompt=None,
    prompts_file=None,
    output=None,
    max_tokens=200,
    num_samples=1,
    temperature=0.5,
    top_k=50,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    stop=None,
    draft=None,
    init_from=None,
    lora_rank=None,
    lora_alpha=None,
    teacher=None,
    teacher_weight=0.5,
    teacher_temperature=2.0,
    quantize=None,
    export=None,
    evaluate=None,
    eval_stride=None,
    benchmark=False,
    cases=None,
    plot=None,
    attention=None,
    list=False,
    version=False,
)
LINES = [f"line {i}: the quick brown fox — jümps over {i * i} lazy dogs\n" for i in range(200)]
LINE = "".join(LINES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `text.txt` and, in `lm`, a run of three iterations on it.

    It is to be left as it is.
    """
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(LINE)
    other = "--mlp gelu --learning_rate 0.01 --dropout 0.1 --num_iters 3 --keep 5".split()
    run("--text", folder / "text.txt", *TINY, *other, "--save_dir", folder / "lm")
    return folder


# ---- Flags and their values ---------------------------------------------------------------------


def test_defaults():
    found = {name: main.DEFAULTS[name] for name in DEFAULTS}
    assert found == DEFAULTS


def test_each_flag_is_its_attribute_and_in_one_group():
    parser = main.make_parser()
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    actions = [action for action in shown if action.dest != "help"]
    for action in actions:
        assert action.option_strings[0] == f"--{action.dest}"
        assert action.help
    in_help = {action.dest for action in actions}
    assert len(in_help) == len(actions)
    grouped = []
    for group in main.FLAGS.values():
        grouped += group
    assert sorted(grouped) == sorted(in_help), "a flag is in no group or in two"
    assert set(DEFAULTS) <= in_help == set(main.DEFAULTS)
    assert set(main.SHAPING) < set(main.INHERITED) < set(main.DEFAULTS)
    of_a_process = {"save_dir", "mirror", "gpu", *main.FLAGS["sampling"], *main.FLAGS["tools"]}
    assert not of_a_process & set(main.INHERITED)


def test_names_of_other_programs():
    """Each is told the one of a flag, and is not one itself."""
    known = []
    for theirs in [*names.OTHER_NAMES.values(), *names.NOT_NEEDED]:
        known += theirs.split()
    ours = set(main.DEFAULTS)
    assert len(known) == len(set(known))
    assert not set(known) & ours
    assert names.OTHER_NAMES.keys() <= ours
    for name in known:
        text = main.explain_name(name)
        assert text.startswith(f"--{name}") and "?" not in text
        assert text == names.explain(name)
        named = set(re.findall(r"--(\w+)", text)) - {name}
        assert named <= ours


def test_hyphens_are_as_good_as_underscores(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("training:\n  lr-warmup: 3\nnum-iters: 4\n")
    line = ["--max-tokens", "7", "--num-kv-heads=2", "--no-qk-norm", "--prompt=--a-b"]
    expected = {
        "max_tokens": 7,
        "num_kv_heads": 2,
        "qk_norm": False,
        "prompt": "--a-b",
        "lr_warmup": 3,
        "num_iters": 4,
        "config": str(path),
    }
    assert main.read_command_line([*line, "--config", str(path)]) == expected
    values = ["--prompt", "-- a well-known query", "--stop", "--- end-of-x"]
    assert main.read_command_line(values) == {"prompt": values[1], "stop": values[3]}


def test_paths_in_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "flags.yaml"
    path.write_text("prompts_file: ~/prompts.txt\n")
    passed = main.read_command_line(["--config", "~/flags.yaml", "--output=~/out.jsonl"])
    assert passed["prompts_file"] == str(tmp_path / "prompts.txt")
    assert passed["output"] == str(tmp_path / "out.jsonl")


def test_half_an_emoji_in_a_config(tmp_path):
    """JSON, which is YAML, too, writes one as two surrogates."""
    path = tmp_path / "flags.yaml"
    path.write_text(json.dumps({"prompt": "😀 \ud83d"}))
    assert main.read_command_line(["--config", str(path)])["prompt"] == "😀 \ufffd"


def test_version(tmp_path):
    out, _ = run("--version", cwd=tmp_path)
    sha1 = hashlib.sha1((ROOT / "main.py").read_bytes()).hexdigest()
    assert out.startswith(f"main.py {sha1[:12]}, Python 3.")
    assert f", MLX {main.mx.__version__}, NumPy " in out
    assert not list(tmp_path.iterdir())


def test_help(tmp_path):
    out, err = run("--help", cwd=tmp_path)
    assert err == "" and "This file" not in out
    assert not list(tmp_path.iterdir())
    for name in main.DEFAULTS:
        assert re.search(rf"^  --{name}\b", out, re.M), name
    for title in ("run", "model", "training", "reports", "sampling", "reuse", "tools"):
        assert f"\n{title}:\n" in out
    for value in ("100000", "1024", "0.0003", "1e-05", "default: ptb", "default: relu2"):
        assert value in out


def test_importing_does_nothing(tmp_path):
    command = [sys.executable, "-c", "import main", "--strange", "--dim", "x", "--inference"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def flags_of(trained, monkeypatch, capsys):
    """A function of a command line on the trained folder.

    It returns (flags, checkpoint's record or None, stdout).
    """

    def call(*arguments):
        seen = []

        def train_run(flags, dataset, checkpoint, *_):
            seen.append((flags, checkpoint))
            return 0

        with monkeypatch.context() as patch:
            patch.setattr(main, "train_run", train_run)
            assert main.main([*map(str, arguments), "--save_dir", str(trained / "lm")]) == 0
        return *seen[0], capsys.readouterr().out

    return call


def test_values_of_a_resumed_run(flags_of, trained):
    values, checkpoint, out = flags_of("--text", trained / "text.txt")
    assert checkpoint["iteration"] == 3
    assert (values.dim, values.mlp, values.mlp_dim, values.dropout) == (16, "gelu", 64, 0.1)
    assert (values.learning_rate, values.num_iters, values.keep) == (0.01, 3, 5)
    assert values.weight_decay == 1e-5 and values.max_tokens == 200, "never typed or not inherited"
    assert values.save_dir == trained / "lm"


def test_typed_values_win(flags_of, trained):
    line = ["--text", trained / "text.txt", "--learning_rate", 0.5, "--num_iters", 9]
    values, checkpoint, out = flags_of(*line, "--mlp", "gelu", "--max_tokens", 7)
    assert checkpoint
    assert (values.learning_rate, values.num_iters, values.max_tokens) == (0.5, 9, 7)
    assert (values.dim, values.keep) == (16, 5)
    changes = main.describe_resume(checkpoint["flags"], vars(values))
    assert changes == (
        "resumed  with --num_iters 3 -> 9, --learning_rate 0.01 -> 0.5"
        " (to start over instead: --new_model)\n"
    )


def test_a_bare_command_resumes_what_was_saved_last(flags_of, trained):
    """Its corpus, too: the default of --dataset is for new runs."""
    values, checkpoint, _ = flags_of()
    assert checkpoint["id"] == ids(trained / "lm")[0]
    assert (values.dataset, values.text) == ("text", [str(trained / "text.txt")])
    assert flags_of("--dim", 16, "--num_iters", 5)[1]["id"] == checkpoint["id"]
    assert flags_of("--dataset", "python", "--dim", 16)[1] is None


@pytest.mark.parametrize("more", [["--mlp", "swiglu"], ["--new_model"], ["--mlp_dim", 48]], ids=str)
def test_a_new_run_takes_nothing_from_another(more, flags_of, trained):
    values, checkpoint, out = flags_of("--text", trained / "text.txt", *more)
    assert checkpoint is None
    assert (values.dim, values.learning_rate) == (1024, 3e-4)
    assert (values.num_iters, values.keep) == (100000, 3)
    if more != ["--new_model"]:
        assert main.list_checkpoints(trained / "lm")[0]["run"] in out
        assert "--identifier" in out


def test_another_dataset_is_a_new_run(flags_of):
    assert flags_of("--dataset", "python")[1] is None


def test_identifier_brings_its_text_along(flags_of, trained):
    values, checkpoint, _ = flags_of("--identifier", ids(trained / "lm")[0][:6], "--keep", 2)
    assert checkpoint
    assert values.text == [str(trained / "text.txt")] and values.dataset == "text"
    assert (values.dim, values.keep) == (16, 2)


def test_config_file_flat_and_in_groups(flags_of, trained, tmp_path):
    """Where a value comes from, weakest first: default, checkpoint, preset, YAML, typed flag."""
    text = trained / "text.txt"
    flat = tmp_path / "flat.yaml"
    flat.write_text(
        f"text: {text}\n"
        "learning_rate: 1e-2\n"
        "num_iters: 9\n"
        "keep: null\n"
        "eval_test: false\n"
    )  # fmt: skip
    values, checkpoint, out = flags_of("--config", flat, "--num_iters", 11)
    assert checkpoint
    assert (values.learning_rate, values.num_iters, values.keep) == (0.01, 11, 5)
    other = tmp_path / "other.yaml"
    other.write_text("dataset: python\nlearning_rate: 0.5\n")
    values, _, _ = flags_of("--config", other, "--text", text)
    assert values.learning_rate == 0.5
    own = tmp_path / "own.yaml"
    own.write_text("text: a.txt\nvalid_text: b.txt\ndim: 32\n")
    passed = main.read_command_line(["--config", str(own), "--dataset", "python"])
    assert passed == {"config": str(own), "dataset": "python", "dim": 32}
    grouped = tmp_path / "grouped.yaml"
    grouped.write_text(
        f"run: {{text: [{text}, {flat}], preset: tiny, new_model: true}}\n"
        "model:\n  context_size: 32\n  qk_norm: true\n"
        "training: {learning_rate: 0.5}\n"
        "batch_size: 3\n"
    )
    values, checkpoint, out = flags_of("--config", grouped, "--num_heads", 2, "--no-qk_norm")
    assert checkpoint is None and len(values.text) == 2
    assert (values.dim, values.num_heads) == (128, 2)
    assert (values.num_blocks, values.context_size) == (4, 32)
    assert (values.learning_rate, values.batch_size) == (0.5, 3)
    assert (values.qk_norm, values.mlp_dim) == (False, 512)


def test_a_text_replaces_the_corpus_of_a_config(tmp_path):
    """All of it: its validation text is of another language, perhaps."""
    own = tmp_path / "own.yaml"
    own.write_text("text: a.txt\nvalid_text: b.txt\ntest_text: c.txt\ndim: 32\n")
    passed = main.read_command_line(["--config", str(own), "--text", "other.txt"])
    assert passed == {"config": str(own), "text": ["other.txt"], "dim": 32}


@pytest.mark.parametrize("content", ["", "# dim: 32\n"])
def test_a_config_of_comments(tmp_path, content):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    assert main.read_command_line(["--config", str(path)]) == {"config": str(path)}


@pytest.mark.parametrize("error, line", [
    (MemoryError(), "main.py: out of memory: "),
    (MemoryError("Unable to allocate 9 TiB"), "main.py: Unable to allocate 9 TiB: "),
])  # fmt: skip
def test_out_of_memory(error, line, monkeypatch, capsys):
    def failing(*_):
        raise error

    monkeypatch.setattr(main, "execute", failing)
    assert main.main([]) == 1
    assert capsys.readouterr().err.startswith(f"{line}give a smaller --batch_size")


def test_the_cores_that_count(monkeypatch):
    """Those that the process may use, by which products are divided, not those of the machine."""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("macOS cannot restrict a process to some cores")
    given = flags(batch_size=4, context_size=8)
    cores = len(os.sched_getaffinity(0))
    device = main.list_versions(given, main.SingleProcess())["device"]
    assert f", {cores} cores" in device
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(77)))
    device = main.list_versions(given, main.SingleProcess())["device"]
    assert device.endswith(", 77 cores")


def test_low_on_disk_space(trained, tmp_path, monkeypatch, capsys):
    """The checkpoint that a resumed run has already takes up its room."""
    [record] = main.list_checkpoints(trained / "lm")
    weights = trained / "lm" / f"{record['id']}.safetensors"
    size = 3 * os.path.getsize(weights)  # with the moments of Adam
    for room, is_low in ((2.5 * size, False), (1.5 * size, True)):
        folder = shutil.copytree(trained / "lm", tmp_path / f"{is_low}")
        usage = argparse.Namespace(free=room)
        monkeypatch.setattr(main.shutil, "disk_usage", lambda _, usage=usage: usage)
        line = ["--text", trained / "text.txt", "--num_iters", 4, "--keep", 1]
        assert main.main([*map(str, line), "--save_dir", str(folder)]) == 0
        assert ("Low on disk space" in capsys.readouterr().out) == is_low


def test_an_evaluation_that_another_rank_ended(trained, monkeypatch):
    """A signal to another rank is known by broadcast.

    There is no score then, and the status says why.
    """

    def score_split(*given):
        interrupts = given[4]
        interrupts.received = signal.SIGTERM

    monkeypatch.setattr(main, "score_split", score_split)
    line = ["--evaluate", "valid", "--save_dir", str(trained / "lm")]
    assert main.main(line) == 128 + signal.SIGTERM


def test_a_preset_is_part_of_what_a_run_is(flags_of, trained):
    values, checkpoint, _ = flags_of("--text", trained / "text.txt", "--preset", "gpt2")
    assert checkpoint is None  # the one there has dim 16
    assert (values.dim, values.num_heads) == (768, 12)
    assert (values.num_blocks, values.context_size) == (12, 1024)
    run = main.list_checkpoints(trained / "lm")[0]["run"]
    with pytest.raises(AssertionError):  # status 2: it contradicts
        flags_of("--identifier", run, "--preset", "gpt2")


def test_resolve():
    assert flags(dataset="ptb").tokenizer == "word"
    assert flags(dataset="python").tokenizer == "byte"
    own = flags(text=["a.txt"])
    assert (own.dataset, own.tokenizer) == ("text", "byte")
    assert own.text == [os.path.abspath("a.txt")]
    assert flags(dataset="ptb", tokenizer="char").tokenizer == "char"
    assert flags(num_kv_heads=None).num_kv_heads == 8
    assert flags(num_kv_heads=2).num_kv_heads == 2
    assert flags(mlp="relu2").mlp_dim == 4096
    assert flags(mlp="gelu").mlp_dim == 4096
    assert flags(mlp="swiglu").mlp_dim == 2752
    for dim, mlp_dim in ((16, 64), (24, 64), (25, 128), (192, 512), (768, 2048)):
        assert flags(mlp="swiglu", dim=dim).mlp_dim == mlp_dim
    assert flags(mlp="swiglu", mlp_dim=100).mlp_dim == 100
    assert flags(mlp_dim=100).mlp_dim == 100


# ---- The folder ---------------------------------------------------------------------------------


def test_list(tmp_path, capsys):
    folder = tmp_path / "lm"
    far = tmp_path / "a folder" / ("long" * 20) / ("name" * 20)
    far.mkdir(parents=True)
    (tmp_path / "text.txt").write_text(LINE)
    (far / "text.txt").write_text(LINE[::-1])
    common = [*TINY, "--save_dir", folder, "--steps_per_eval", 2, "--eval_tokens", 100]
    common += ["--learning_rate", 0.01, "--new_model"]
    names = []
    for place, dim, num_iters in ((tmp_path, 16, 4), (tmp_path, 32, 6), (far, 16, 8)):
        line = [*common, "--text", place / "text.txt", "--dim", dim, "--num_iters", num_iters]
        assert main.main([str(argument) for argument in line]) == 0
        names.append(main.list_checkpoints(folder)[0]["run"])
    capsys.readouterr()

    assert main.main(["--list", "--save_dir", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(len(line) <= 100 for line in out.splitlines()), out
    blocks = re.split(r"^(?=text-)", out, flags=re.M)[1:]
    names.reverse()
    assert [block.split(":")[0] for block in blocks] == names, "the one saved last comes first"
    assert re.findall(r"iteration (\d+) of", out) == ["8", "6", "4"]
    for block, name in zip(blocks, names):
        own = [record for record in main.list_checkpoints(folder) if record["run"] == name]
        rows = [line.split() for line in block.splitlines() if " old" in line]
        for row, record in zip(rows, own, strict=True):
            assert row[:3] == [record["id"][:12], "iteration", str(record["iteration"])]
        best = [row[0] for row in rows if row[-1] == "best"]
        assert best == [own[0]["best"]["id"][:12]]
        assert "--num_iters" in block, "the flags in which they differ"
        assert "--batch_size" not in block, "those in which they do not"
    assert re.findall(r"--dim \d+", out) == ["--dim 16", "--dim 32", "--dim 16"]
    [latest] = [line for line in out.splitlines() if " latest" in line]
    assert ids(folder)[0][:12] in latest and latest in blocks[0]


def test_list_of_nothing(tmp_path, capsys):
    assert main.main(["--list", "--save_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mounted, free, place", [
    (True, 1 << 40, "/Volumes/RAMDisk/transformer-lm"),
    (True, None, "/Volumes/RAMDisk/transformer-lm"),
    (False, 4 << 30, "/dev/shm/transformer-lm"),
    (False, (4 << 30) - 4096, None),
    (False, None, None),
])  # fmt: skip
def test_default_folder(mounted, free, place, tmp_path, monkeypatch, capsys):
    """`free`: bytes in /dev/shm, None where there is none.

    `place`: None means the cache folder.
    """

    def ismount(path):
        return mounted and str(path) == "/Volumes/RAMDisk"

    def isdir(path):
        return str(path) == "/dev/shm" and free is not None

    def statvfs(path):
        return SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(os.path, "ismount", ismount)
    monkeypatch.setattr(os.path, "isdir", isdir)
    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)  # nothing is made outside tmp_path
    monkeypatch.setattr(datasets.tempfile, "TemporaryFile", lambda *_, **__: io.BytesIO())
    expected = tmp_path / "cache"
    if place:
        expected = Path(place)
    assert datasets.open_folder(None, writing=True) == expected
    out = capsys.readouterr().out
    assert str(expected) in out and "--save_dir" in out
    assert out.count("\n") == 1
    assert ("does not survive a reboot" in out) == bool(place)
    monkeypatch.setattr(main.Path, "is_dir", lambda path: True)
    assert datasets.open_folder(None, writing=False) == expected
    assert capsys.readouterr().out == ""


@pytest.fixture
def set_shm(monkeypatch):
    """A function that makes /dev/shm the only RAM disk, with so much room.

    `ours`: the folder in it is there. `writable`: it may be written.
    """

    def set_shm(free, ours=False, writable=True):
        folders = ["/dev/shm"]
        if ours:
            folders.append("/dev/shm/transformer-lm")
        room = SimpleNamespace(f_bavail=free, f_frsize=4096)
        monkeypatch.setattr(os.path, "ismount", lambda path: False)
        monkeypatch.setattr(os.path, "isdir", lambda path: str(path) in folders)
        monkeypatch.setattr(os, "statvfs", lambda path: room)
        if ours:
            monkeypatch.setattr(os, "access", lambda path, mode: writable)

    return set_shm


def test_a_run_that_fills_the_default_folder_is_found_again(set_shm):
    set_shm(free=1, ours=True)
    assert datasets.usual_folder() == Path("/dev/shm/transformer-lm")


def test_the_default_folder_of_another_user_is_left_alone(tmp_path, monkeypatch, set_shm):
    monkeypatch.setattr(datasets, "CACHE", tmp_path)
    set_shm(free=1 << 40, ours=True, writable=False)
    assert datasets.usual_folder() == Path(f"/dev/shm/transformer-lm-{os.getuid()}")


def test_what_was_saved_before_the_ram_disk_had_room_is_found_again(tmp_path, monkeypatch, set_shm):
    monkeypatch.setattr(datasets, "CACHE", tmp_path)
    set_shm(free=1 << 40)
    assert datasets.usual_folder() == Path("/dev/shm/transformer-lm")
    (tmp_path / f"{'0' * 40}.safetensors").write_bytes(b"")
    assert datasets.usual_folder() == tmp_path


def test_named_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.open_folder("~/deep/lm", writing=True) == tmp_path / "deep" / "lm"
    made = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert made == ["deep", "deep/lm"]
    assert capsys.readouterr() == ("", "")


# ---- Results and odd places ---------------------------------------------------------------------


@pytest.mark.parametrize("typed", [
    "--list",
    "--prompt a --max_tokens 2",
    "--evaluate valid",
    "--cases cases.yaml",
])  # fmt: skip
def test_a_result_that_could_not_be_written_is_a_failure(typed, trained):
    (trained / "cases.yaml").write_text("- {prompt: line, expected: '5'}\n")
    with open("/dev/full", "w") as full:
        _, err = run(*typed.split(), "--save_dir", "lm", cwd=trained, stdout=full, status=1)
    first, last = err.splitlines()[0], err.splitlines()[-1]
    assert "could not be written to stdout" in last + first
    assert "No space left" in err
    assert "Traceback" not in err and "Exception ignored" not in err


def test_progress_may_be_lost_and_a_reader_may_leave(trained, tmp_path):
    line = ["--text", trained / "text.txt", *TINY, "--num_iters", 3]
    with open("/dev/full", "w") as full:
        run(*line, "--save_dir", tmp_path / "lm", stdout=full)
    assert len(ids(tmp_path / "lm")) == 1
    command = f"{sys.executable} {ROOT / 'main.py'} --list --save_dir {trained / 'lm'}"
    script = f"{command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_without_docstrings(trained):
    """`python -OO` drops them, and the help shows one."""
    command = [sys.executable, "-OO", str(ROOT / "main.py")]
    for typed in (["--list", "--save_dir", str(trained / "lm")], ["--help"]):
        done = subprocess.run([*command, *typed], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout and not done.stderr


def test_a_folder_whose_name_is_not_utf8(trained, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/s_\xff")
    line = ["--text", trained / "text.txt", *TINY, "--save_dir", folder]
    run(*line, "--num_iters", 3)
    out, _ = run("--prompt", "a", "--save_dir", folder)
    assert out
    out, _ = run(*line, "--num_iters", 5)
    assert "from iteration 3" in out
    run(*line, "--new_model", "--num_iters", 5, "--init_from", "latest", "--lora_rank", 2)


# ---- Several processes --------------------------------------------------------------------------


def test_a_branch_leaves_the_old_run_its_checkpoints(trained, tmp_path):
    """From an older checkpoint, with the same flags, it comes to the same weights.

    What it prunes is its own.
    """
    line = ["--text", trained / "text.txt", *TINY, "--steps_per_eval", 10, "--save_dir", tmp_path]
    run(*line, "--num_iters", 40, "--keep", 10)
    old = main.list_checkpoints(tmp_path)
    run("--identifier", old[-1]["id"], "--keep", 1, "--save_dir", tmp_path)
    records = main.list_checkpoints(tmp_path)
    branch = records[0]["run"]
    assert branch != old[0]["run"]
    assert [record["id"] for record in records if record["run"] == branch] == [old[0]["id"]]
    left = [record for record in records if record["run"] != branch]
    assert [record["id"] for record in left] == [record["id"] for record in old]
    assert [record["saved"] for record in left] == [record["saved"] for record in old]
    line = ["--identifier", old[0]["run"], "--num_iters", 50, "--keep", 1]
    run(*line, "--save_dir", tmp_path)
    records = main.list_checkpoints(tmp_path)
    assert [record["iteration"] for record in records] == [50, 40]
    assert records[1]["run"] == branch
    assert main.find_damage(tmp_path, records[1]) is None


def test_a_run_that_another_process_trained_meanwhile(trained, tmp_path, monkeypatch, capsys):
    """Between the choice of a checkpoint and the run's lock it may have come and gone."""
    line = ["--text", str(trained / "text.txt"), *TINY, "--save_dir", str(tmp_path)]
    assert main.main([*line, "--num_iters", "3"]) == 0
    load_data = main.load_data

    def load_slowly(*given):
        run(*line, "--num_iters", 6)
        return load_data(*given)

    monkeypatch.setattr(main, "load_data", load_slowly)
    assert main.main([*line, "--num_iters", "9"]) == 1
    err = capsys.readouterr().err
    assert "advanced while this process was starting; rerun the command" in err
    monkeypatch.setattr(main, "load_data", load_data)
    assert main.main([*line, "--num_iters", "9"]) == 0
    assert "from iteration 6 to 9" in capsys.readouterr().out


def test_readers_beside_a_run_that_saves_and_prunes_each_step(trained, tmp_path):
    line = ["--text", trained / "text.txt", *TINY, "--steps_per_save", 1, "--keep", 1]
    line += ["--max_tokens", 1, "--save_dir", tmp_path]
    trainer = start(*line, stdout=subprocess.DEVNULL)
    while not ids(tmp_path):
        assert trainer.poll() is None
        time.sleep(0.01)
    for _ in range(12):
        for typed in (["--prompt", "a", "--max_tokens", "1"], ["--list"]):
            assert main.main([*typed, "--save_dir", str(tmp_path)]) == 0
    trainer.send_signal(signal.SIGINT)
    _, err = trainer.communicate(timeout=60)
    assert trainer.returncode == 130, err
