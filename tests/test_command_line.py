"""The command line: where each value comes from, --help, --list, the default folder.

Mistakes: test_mistakes.py.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import MAIN, ROOT, TINY, flags, ids, resumed_by, run, run_folder, start

import main
from datasets import UsageError
from extras import names

# Those that are documented, which a new flag leaves as they are.
DEFAULTS = dict(
    dataset="ptb",
    text=None,
    valid_text=None,
    test_text=None,
    valid_fraction=0.1,
    text_field="text",
    train_tokens=None,
    tokenizer="auto",
    vocab_size=32000,
    save_dir=None,
    data_dir=None,
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
    grad_checkpoint=False,
    average=0.0,
    patience=None,
    steps_per_report=10,
    steps_per_eval=1000,
    eval_tokens=100000,
    steps_per_save=None,
    eval_test=False,
    keep=3,
    sample_prompt=None,
    sample_tokens=None,
    inference=False,
    prompt=None,
    max_tokens=200,
    num_samples=1,
    temperature=0.5,
    top_k=50,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    stop=None,
    stop_at_end=True,
    draft=None,
    init_from=None,
    lora_rank=None,
    lora_alpha=None,
    teacher=None,
    teacher_weight=0.5,
    teacher_temperature=2.0,
    quantize=None,
    evaluate=None,
    eval_stride=None,
    list=False,
)
LINES = [f"line {i}: the quick brown fox — jümps over {i * i} lazy dogs\n" for i in range(200)]
LINE = "".join(LINES)


SHAPE = "--mlp gelu --learning_rate 0.01 --dropout 0.1".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `text.txt` and, in `lm`, a run of three iterations on it.

    It is to be left as it is.
    """
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(LINE)
    others = ["--num_iters", 3, "--keep", 5, "--save_dir", folder / "lm"]
    run("--text", folder / "text.txt", *TINY, *SHAPE, *others)
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
    assert set(main.FIXED) < set(main.SHAPING) < set(main.INHERITED) < set(main.DEFAULTS)
    of_a_process = {"save_dir", "data_dir", "mirror", "gpu"}
    of_a_process |= {*main.FLAGS["sampling"], *main.FLAGS["tools"]}
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
        text = main.make_parser().hint(name)
        assert text.startswith(f"--{name}") and "?" not in text
        assert text == names.explain(name, ours)
        named = set(re.findall(r"--(?:no-)?(\w+)", text)) - {name}
        assert named <= ours


def test_values_of_other_programs():
    """Each belongs to a flag, and none of them is one that it takes."""
    for name, values in names.OTHER_VALUES.items():
        action = main.make_parser()._option_string_actions[f"--{name}"]
        for value in " ".join(values).split():
            explained = names.explain_value(name, value.upper())
            assert explained
            assert value not in (action.choices or [])
            flags_named = set(re.findall(r"--(\w+)", explained))
            assert flags_named <= set(main.DEFAULTS)
            if action.choices and not flags_named:  # then it names values alone
                assert set(explained.split()) - {"or"} <= set(action.choices)


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
    values = ["--prompt", "--foo-bar=1 x", "--stop", "--foo-bar x"]
    assert main.read_command_line(values) == {"prompt": values[1], "stop": values[3]}


IDLE = [
    ("--min_lr 1e-5", "--min_lr has no effect with --lr_schedule constant."),
    ("--lr_cooldown 0.5", "--lr_cooldown has no effect with --lr_schedule constant."),
    ("--vocab_size 300", "--vocab_size has no effect with --tokenizer byte."),
    ("--min_lr 1e-5 --lr_cooldown 0.5 --lr_schedule linear", None),
    ("--vocab_size 300 --tokenizer bpe", None),
    ("--valid_fraction 0.2", None),
]


@pytest.mark.parametrize("line, notice", IDLE)
def test_a_flag_without_an_effect_is_named(line, notice, text, tmp_path):
    out, _ = run("--text", text, *TINY, "--num_iters", 1, *line.split(), "--save_dir", tmp_path)
    found = [each for each in out.splitlines() if "has no effect" in each]
    assert found == ([notice] if notice else [])


def test_more_flags_without_an_effect_are_named(trained, tmp_path):
    """Where the text or the tokenizer comes from elsewhere."""
    small = [*TINY, "--eval_tokens", 100, "--num_iters", 1]
    lines = ["--dataset", "python", "--valid_fraction", 0.2]
    out, _ = run(*lines, *small, "--save_dir", tmp_path / "lm")
    assert "\n--valid_fraction has no effect with --dataset python.\n" in out
    bpe = ["--text", trained / "text.txt", *small, "--save_dir", tmp_path / "bpe"]
    run(*bpe, "--tokenizer", "bpe", "--vocab_size", 300)
    for flag in ("init_from", "teacher"):
        out, _ = run(*bpe, f"--{flag}", "latest", "--vocab_size", 400)
        assert f"\n--vocab_size has no effect with --{flag}, whose tokenizer is used.\n" in out


def test_a_flag_without_an_effect_on_an_evaluation_is_named(trained):
    """A whole split is scored; 0 stands for that."""
    line = ["--evaluate", "valid", "--save_dir", trained / "lm"]
    whole, err = run(*line)
    assert "--eval_tokens" not in err
    limited, err = run(*line, "--eval_tokens", 20)
    assert limited.split()[:8] == whole.split()[:8], "the same score"
    notice = "--eval_tokens has no effect with --evaluate, which scores the whole split.\n"
    assert err.endswith(notice)
    _, err = run(*line, "--eval_tokens", 0)
    assert "--eval_tokens" not in err


def test_paths_in_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "flags.yaml"
    path.write_text("tokenizer: ~/tokenizer.json\n")
    passed = main.read_command_line(["--config", "~/flags.yaml"])
    assert passed["tokenizer"] == str(tmp_path / "tokenizer.json")


def test_half_an_emoji_in_a_config(tmp_path):
    """JSON, which is YAML, too, writes one as two surrogates."""
    path = tmp_path / "flags.yaml"
    path.write_text(json.dumps({"prompt": "😀 \ud83d"}))
    assert main.read_command_line(["--config", str(path)])["prompt"] == "😀 \ufffd"


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


def test_the_old_name_of_grad_checkpoint(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("checkpoint: true\n")
    assert main.read_command_line(["--checkpoint"]) == {"grad_checkpoint": True}
    assert main.read_command_line(["--no-checkpoint"]) == {"grad_checkpoint": False}
    of_file = main.read_command_line(["--config", str(path)])
    assert of_file == {"config": str(path), "grad_checkpoint": True}
    out, _ = run("--help")
    assert "--checkpoint" not in out


# ---- Flags that do not go together --------------------------------------------------------------


def value_of(name):
    """A value that may be given to a flag, of which only its presence counts."""
    _, options = next(rows[name] for rows in main.FLAGS.values() if name in rows)
    if options.get("action") == "store_true":
        return True
    if "nargs" in options:
        return ["x"]
    return "x"


def test_the_rules_are_about_flags():
    for one, other in main.EXCLUDES:
        assert one != other
        assert {one, other} <= set(main.DEFAULTS)
    for name, partners in main.REQUIRES.items():
        assert {name, *partners} <= set(main.DEFAULTS)
        assert name not in partners


@pytest.mark.parametrize("one, other", main.EXCLUDES)
def test_flags_that_exclude_one_another(one, other):
    pair = {one: value_of(one), other: value_of(other)}
    with pytest.raises(UsageError, match=f"^--{one} and --{other} are mutually exclusive"):
        main.check_rules(pair)
    if pair[other] is True:
        main.check_rules(pair | {other: False})


@pytest.mark.parametrize("name", main.REQUIRES)
def test_flags_that_require_another(name):
    alone = {name: value_of(name)}
    with pytest.raises(UsageError, match=f"^--{name} requires .*--{main.REQUIRES[name][0]}"):
        main.check_rules(alone)
    for partner in main.REQUIRES[name]:
        both = alone | {partner: value_of(partner)}
        missing = main.REQUIRES.get(partner, [])
        for each in missing[:1]:
            both[each] = value_of(each)
        main.check_rules(both)


def test_an_empty_prompt_is_one_and_an_empty_path_is_none():
    main.check_rules({"prompt": ""})
    with pytest.raises(UsageError, match="--identifier is empty"):
        main.check_rules({"identifier": ""})


# ---- Where a value comes from ------------------------------------------------------------------


def test_config_file_flat_and_in_groups(trained, tmp_path):
    """Weakest first: default, checkpoint, YAML's preset, YAML, typed preset, typed flag."""
    text = trained / "text.txt"
    shutil.copytree(trained / "lm", tmp_path / "lm")
    folder = ["--save_dir", tmp_path / "lm"]
    name = newest(tmp_path / "lm").run
    flat = tmp_path / "flat.yaml"
    flat.write_text(
        f"text: {text}\n"
        "dim: 16\nnum_heads: 2\nnum_blocks: 2\ncontext_size: 8\nbatch_size: 4\n"
        "mlp: gelu\ndropout: 0.1\nlearning_rate: 1e-2\n"
        "num_iters: 9\n"
        "keep: null\n"
        "eval_test: false\n"
    )  # fmt: skip
    assert begin("--config", flat, "--num_iters", 4, *folder)[:2] == (name, 3)
    recorded = newest(tmp_path / "lm").flags
    assert (recorded["learning_rate"], recorded["num_iters"], recorded["keep"]) == (0.01, 4, 5)

    own = tmp_path / "own.yaml"
    own.write_text("text: a.txt\nvalid_text: b.txt\ndim: 32\n")
    passed = main.read_command_line(["--config", str(own), "--dataset", "python"])
    assert passed == {"config": str(own), "dataset": "python", "dim": 32}
    # A preset that is typed wins over the file's sizes, and other flags win over it.
    line = ["--config", str(own), "--preset", "small", "--num_blocks", "3"]
    passed = main.read_command_line(line)
    sizes = [passed[name] for name in ("dim", "num_heads", "num_blocks", "context_size")]
    assert sizes == [256, 8, 3, 256]

    grouped = tmp_path / "grouped.yaml"
    grouped.write_text(
        f"run: {{text: [{text}, {flat}], preset: tiny, new_model: true, num_iters: 1}}\n"
        "model:\n  context_size: 32\n  qk_norm: true\n"
        "training: {learning_rate: 0.5}\n"
        "batch_size: 3\n"
    )
    other, iteration, _ = begin("--config", grouped, "--num_heads", 2, "--no-qk_norm", *folder)
    assert (other != name, iteration) == (True, 0)
    recorded = newest(tmp_path / "lm").flags
    expected = {"dim": 128, "num_heads": 2, "num_blocks": 4, "context_size": 32, "mlp_dim": 512}
    expected |= {"learning_rate": 0.5, "batch_size": 3, "qk_norm": False}
    assert {name: recorded[name] for name in expected} == expected
    assert len(recorded["text"]) == 2


def test_a_text_replaces_the_corpus_of_a_config(tmp_path):
    """All of it: its validation text is of another language, perhaps."""
    own = tmp_path / "own.yaml"
    own.write_text("text: a.txt\nvalid_text: b.txt\ntest_text: c.txt\ndim: 32\n")
    passed = main.read_command_line(["--config", str(own), "--text", "other.txt"])
    assert passed == {"config": str(own), "text": ["other.txt"], "dim": 32}


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


def test_sizes_on_the_start_screen(trained, tmp_path, monkeypatch, capsys):
    """That of a checkpoint and the free space tell whether the disk will be full."""
    usage = SimpleNamespace(free=1234 << 20)
    monkeypatch.setattr(main.shutil, "disk_usage", lambda _: usage)
    line = ["--text", trained / "text.txt", *TINY, "--dim", 256, "--num_iters", 1]
    assert main.main([*map(str, line), "--save_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    size, free = re.search(r"([\d,]+) MiB per checkpoint, ([\d,]+) MiB free", out).groups()
    checkpoint = newest(tmp_path)
    paths = (checkpoint.weights_path, checkpoint.metadata_path)
    written = sum(os.path.getsize(path) for path in paths)
    assert int(size) == pytest.approx(written / 2**20, abs=1)
    assert free == "1,234"


def test_settle():
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
    assert flags(lora_rank=4, init_from="x").lora_alpha == 8
    assert flags(lora_rank=4, init_from="x", lora_alpha=3.0).lora_alpha == 3


def test_whose_value_counts():
    """What a run's origins decide, else what is given, else what a checkpoint holds."""
    given = {"dim": 16, "keep": 5}
    saved = {"dim": 32, "keep": 7, "num_blocks": 2, "seed": 9}
    settled = main.settle(given, saved, {"dim": 64})
    assert (settled.dim, settled.keep, settled.num_blocks) == (64, 5, 2)
    assert (settled.seed, settled.batch_size) == (9, 32)
    assert settled.given == {"dim": 16, "keep": 5}
    assert saved == {"dim": 32, "keep": 7, "num_blocks": 2, "seed": 9}
    assert main.DEFAULTS["dim"] == 1024


def test_a_command_that_works_when_pasted(tmp_path):
    given = flags(save_dir=str(tmp_path / "my runs"), data_dir="/tmp/it's here", gpu=True)
    line = main.command(given, "--identifier", "text-0a1b2c", "--inference")
    assert shlex.split(line) == [
        *["python", "main.py", "--identifier", "text-0a1b2c", "--inference"],
        *["--save_dir", str(tmp_path / "my runs"), "--data_dir", "/tmp/it's here", "--gpu"],
    ]
    assert main.command(flags(), "--list") == "python main.py --list"


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
        names.append(main.list_checkpoints(folder)[0].run)
    line = [*common, "--text", tmp_path / "text.txt", "--num_iters", 1]
    assert main.main([str(argument) for argument in line]) == 0
    unscored = main.list_checkpoints(folder)[0].run
    capsys.readouterr()

    assert main.main(["--list", "--save_dir", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    header, *rows = out.splitlines()
    assert header.split() == "run trained valid nats iteration checkpoint flags".split()
    checkpoints = main.list_checkpoints(folder)
    bests = [main.best_of(checkpoints, name) for name in names]
    bests.sort(key=lambda each: each.score)
    assert [row.split()[0] for row in rows] == [*(each.run for each in bests), unscored]
    trained = dict(zip([*names, unscored], ["4 of 4", "6 of 6", "8 of 8", "1 of 1"]))
    for row, each in zip(rows, bests):
        cells = [each.run, trained[each.run], f"{each.score:.4f}", each.iteration, each.id[:12]]
        assert row.split()[:7] == " ".join(map(str, cells)).split()
    assert re.split("  +", rows[-1])[1:4] == ["1 of 1", "-", "1"]
    dims = {row.split()[0]: re.search(r"--dim=(\d+)", row)[1] for row in rows}
    assert [dims[name] for name in names] == ["16", "32", "16"]
    assert "--batch_size" not in out, "those in which they do not differ"
    assert f"--text={far / 'text.txt'}'" in out, "quoted for a shell"


def test_list_of_nothing(tmp_path, capsys):
    assert main.main(["--list", "--save_dir", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == f"no checkpoint in {tmp_path}: train a model first, or check --save_dir\n"
    assert err == ""


def test_runs_are_saved_here_unless_a_folder_is_named(trained, tmp_path, monkeypatch):
    """In ./runs; what can be made again lies elsewhere, as tests of the default --data_dir say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    line = ["--text", trained / "text.txt", *TINY, "--num_iters", 1]
    line = [str(argument) for argument in line]
    assert main.main([*line, "--data_dir", "data"]) == 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["text"]
    own = run_folder(tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == [own]
    assert main.main(["--list"]) == 0
    assert main.main([*line, "--save_dir", "~/deep/lm"]) == 0
    home = tmp_path / "home" / "deep" / "lm"
    assert sorted(home.iterdir()) == sorted([run_folder(home), home / "text"])


def test_what_is_used_is_named_before_it_begins(trained):
    """On stderr, so that stdout has nothing but the result."""
    out, err = run("--prompt", "line", "--max_tokens", 2, "--save_dir", trained / "lm")
    checkpoint = newest(trained / "lm")
    first = err.splitlines()[0]
    assert first == (
        f"{checkpoint.run}, iteration 3, checkpoint {checkpoint.id[:12]}, in {trained / 'lm'}"
    )
    assert checkpoint.run not in out
    out, err = run("--evaluate", "valid", "--save_dir", trained / "lm")
    assert err.splitlines()[0] == first
    assert out.startswith("valid ")


# ---- Results and odd places ---------------------------------------------------------------------


@pytest.mark.parametrize("typed", [
    "--list",
    "--prompt a --max_tokens 2",
    "--evaluate valid",
    "-m extras.cases cases.yaml",
])  # fmt: skip
def test_a_result_that_could_not_be_written_is_a_failure(typed, trained):
    (trained / "cases.yaml").write_text("- {prompt: line, expected: '5'}\n")
    program = [] if typed.startswith("-m") else [MAIN]
    options = {"program": program, "env": {"PYTHONPATH": str(ROOT)}, "cwd": trained}
    with open("/dev/full", "w") as full:
        _, err = run(*typed.split(), "--save_dir", "lm", stdout=full, status=1, **options)
    lines = err.splitlines()
    messages = [line for line in lines if re.match(r"(main\.py|extras\.cases): ", line)]
    assert messages == lines[-1:], "one, and the last of all"
    assert "No space left" in lines[-1]
    assert "Traceback" not in err and "Exception ignored" not in err


def test_progress_may_be_lost_and_a_reader_may_leave(trained, tmp_path):
    line = ["--text", trained / "text.txt", *TINY, "--num_iters", 3]
    with open("/dev/full", "w") as full:
        run(*line, "--save_dir", tmp_path / "lm", stdout=full)
    assert len(ids(tmp_path / "lm")) == 1
    command = f"{sys.executable} {ROOT / 'main.py'} --list --save_dir {trained / 'lm'}"
    script = f"{command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode in (0, 1)  # 1 if it had not written all before
    assert done.stderr == ""


def test_without_docstrings(trained):
    """`python -OO` drops them, and the help shows one."""
    command = [sys.executable, "-OO", str(ROOT / "main.py")]
    for typed in (["--list", "--save_dir", str(trained / "lm")], ["--help"]):
        done = subprocess.run([*command, *typed], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout and not done.stderr


def test_a_folder_whose_name_is_not_utf8(trained, tmp_path):
    """MLX could write there, and not read."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/s_\xff")
    for words in (["--text", trained / "text.txt", *TINY, "--num_iters", 1], ["--list"]):
        _, err = run(*words, "--save_dir", folder, status=2)
        assert "MLX reads only names in UTF-8; rename it\n" in err
    assert not list(tmp_path.iterdir())


# ---- Several processes --------------------------------------------------------------------------


def test_readers_beside_a_run_that_saves_and_prunes(trained, tmp_path):
    line = ["--text", trained / "text.txt", *TINY, "--steps_per_save", 9]
    line += ["--max_tokens", 1, "--save_dir", tmp_path]
    trainer = start(*line, stdout=subprocess.DEVNULL)
    while not ids(tmp_path):
        assert trainer.poll() is None
        time.sleep(0.01)
    for _ in range(6):
        for typed in (["--prompt", "a", "--max_tokens", "1"], ["--list"]):
            assert main.main([*typed, "--save_dir", str(tmp_path)]) == 0
    trainer.send_signal(signal.SIGINT)
    _, err = trainer.communicate(timeout=60)
    assert trainer.returncode == 130, err
