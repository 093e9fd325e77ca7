"""The command line: where each value comes from, names of other programs, --help, --list, folders.

Mistakes: test_mistakes.py. Which run a command means: test_runs.py.
"""

import os
import re
import shlex
import signal

import pytest
from conftest import CACHES, ROOT, TINY, begin, newest, run, run_folder, saved
from conftest import start, wait_for

from extras.features.hints import ALIASES, NOT_HERE
from support.flags import FLAGS


# ---- Values -------------------------------------------------------------------------------------


def test_help(tmp_path):
    out, err = run("--help", cwd=tmp_path)
    assert err == "" and "n_embd" not in out
    assert "list all flags\n\noptions:\n" in out, "and nothing of how the code is read"
    for name in ("learning_rate", "dim", "mlp"):
        assert f" (default: {FLAGS.defaults[name]}) " in " ".join(out.split())
    assert not list(tmp_path.iterdir())
    for title in FLAGS:
        assert f"\n{title}:\n" in out


def given_in(folder, *line):
    """The flags of the run that a line trains for a step, but for those with their defaults."""
    run(*line, "--save_dir", folder, "--num_iters", 1, "--new_model")
    given = {}
    for name, value in newest(folder).flags.items():
        is_default = not value or value == FLAGS.defaults[name]
        if not is_default and name not in ("num_iters", "text", "dataset", "sample_tokens"):
            given[name] = value
    return given


@pytest.mark.parametrize("line, expected", [
    ("--mlp swiglu --dim 48", dict(mlp="swiglu", dim=48, mlp_dim=128)),
    ("--mlp gelu --dim 16 --untie=true", dict(mlp="gelu", dim=16, mlp_dim=64, untie=True)),
    ("--num-blocks=1 --qk-norm=False --dim 16", dict(num_blocks=1, dim=16, mlp_dim=64)),
    (
        "--preset tiny --num_heads 2 --num_kv_heads 1 --seed 1",
        dict(dim=128, mlp_dim=512, num_heads=2, num_kv_heads=1, context_size=128, seed=1),
    ),
])  # fmt: skip
def test_what_is_not_given_follows(line, expected, text, tmp_path):
    """Or has its default, which --help says."""
    small = ["--text", text, "--batch_size", 1, "--sample_tokens", 1]
    values = dict(tokenizer="byte", batch_size=1, num_kv_heads=8) | expected
    assert given_in(tmp_path, *small, *line.split()) == values


FLAT = """
dim: 16
num-heads: 2
mlp: gelu
learning_rate: 1e-2
keep: null
qk_norm: false
untie: true
inference: false
list: false
sample-prompt: [a b, --c]
"""
GROUPED = """
run: {preset: tiny, sample_prompt: a}
model:
  context_size: 32
whatever: {learning_rate: 0.5, qk_norm: true}
text: [nowhere.txt, b.txt]
valid_text: nowhere.txt
tokenizer: char
"""
FROM_FILES = [  # what the file holds, what is typed beside it; the line without a file
    (FLAT, "--learning_rate 0.5", "--dim 16 --num_heads 2 --mlp gelu --learning_rate 0.5 --untie "
     "--sample_prompt 'a b' --sample_prompt=--c"),
    (GROUPED, "--no-qk_norm --dim 16 --num_heads 2", "--dim 16 --num_heads 2 --context_size 32 "
     "--learning_rate 0.5 --sample_prompt a --tokenizer char"),
    ("n_embd: 16\ngradient_checkpointing: true\nsample_prompt: []\n", "--num_heads 2",
     "--dim 16 --num_heads 2 --grad_checkpoint"),
    ("context_size: 32\ndim: 8\n", "--preset tiny --dim 16", "--preset tiny --dim 16"),
]  # fmt: skip


@pytest.mark.parametrize("content, beside, line", FROM_FILES)
def test_a_file_of_flags(content, beside, line, text, tmp_path):
    """Flat or in groups: what is typed counts more, and all of it more than a preset.

    Names may be those of other programs.
    """
    path = tmp_path / "own.yaml"
    path.write_text(content)
    small = ["--text", text, "--batch_size", 2, "--sample_tokens", 1]
    found = given_in(tmp_path / "lm", *small, "--config", path, *shlex.split(beside))
    assert found == given_in(tmp_path / "lm", *small, *shlex.split(line))


ANOTHER_DEFAULT = """
data = main.FLAGS["data"]
data["dataset"] = data["dataset"]._replace(default="python")
"""


def test_a_file_that_names_no_text_says_so(text, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("num_iters: 2\n")
    config = ["--config", path, "--save_dir", tmp_path / "lm"]
    name, _, out = begin(*TINY, *config, "--text", text)
    assert "names no text" not in out
    assert "names no text" not in begin(*config, "--identifier", name)[2]
    # Python's library instead of Penn Treebank, which would have to be downloaded.
    program = ["-c", f"import main\n{ANOTHER_DEFAULT}exit(main.main())"]
    out, _ = run(*TINY, *config, program=program, cwd=ROOT)
    assert "The --config names no text, so this is python; --text FILE names yours." in out


@pytest.mark.parametrize("options, needed", [
    (
        "--min_lr 1e-5 --lr_cooldown 0.5",
        {"min_lr": "--lr_schedule", "lr_cooldown": "--lr_schedule"},
    ),
    (
        "--teacher_weight 0.1 --vocab_size 300 --eval_stride 4",
        {
            "teacher_weight": "--teacher",
            "eval_stride": "--evaluate or --eval_test",
            "vocab_size": "--tokenizer bpe; gpt2 has 50,257 tokens",
        },
    ),
    (
        "--patience 3 --steps_per_eval 0 --sample_prompt a",
        {"patience": "--steps_per_eval", "eval_tokens": "--steps_per_eval"},
    ),
    ("--num_iters 2 --min_lr 1e-5 --lr_schedule linear --lr_warmup 0 --valid_fraction 0.2", {}),
])  # fmt: skip
def test_flags_without_an_effect_are_named(options, needed, line):
    out, _ = run(*line, "--num_iters", 1, *options.split())
    notices = re.findall(r"^--(\w+) has no effect without (.*)\.$", out, re.M)
    assert dict(notices) == needed


# ---- Names of other programs --------------------------------------------------------------------

# Lines of theirs, and what they mean here, in the same unit.
THEIRS = {
    "nanoGPT": (
        "--n_layer 2 --n_head 2 --n_embd 16 --block_size 8 --warmup_iters 9 --log_interval 8 "
        "--gradient_accumulation_steps 2 --eval_interval 9 --max_iters 1",
        "--num_blocks 2 --num_heads 2 --dim 16 --context_size 8 --lr_warmup 9 "
        "--steps_per_report 8 --grad_accumulation 2 --steps_per_eval 9",
    ),
    "Hugging Face": (
        "--num_hidden_layers 2 --num_attention_heads 2 --hidden_size 16 --seq_length 8 "
        "--num_key_value_heads 1 --intermediate_size 32 --per_device_train_batch_size 2 "
        "--warmup_steps 9 --lr_scheduler_type cosine --max_grad_norm 2 --adam_beta1 0.8 "
        "--adam_beta2 0.7 --logging_steps 9 --eval_steps 8 --save_steps 7 --save_total_limit 6 "
        "--gradient_checkpointing --max_steps 1",
        "--num_blocks 2 --num_heads 2 --dim 16 --context_size 8 --num_kv_heads 1 --mlp_dim 32 "
        "--batch_size 2 --lr_warmup 9 --lr_schedule cosine --grad_clip 2 --beta1 0.8 --beta2 0.7 "
        "--steps_per_report 9 --steps_per_eval 8 --steps_per_save 7 --keep 6 --grad_checkpoint",
    ),
    "others": (
        "--depth 2 --n_heads 2 --d_model 16 --max_seq_len 8 --n_kv_heads 1 --d_ff 32 --lr 0.1 "
        "--device_batch_size 2 --clip_grad_norm 2 --save_every 9 --eval_every 8 --checkpoint "
        "--num_iterations 1",
        "--num_blocks 2 --num_heads 2 --dim 16 --context_size 8 --num_kv_heads 1 --mlp_dim 32 "
        "--learning_rate 0.1 --batch_size 2 --grad_clip 2 --steps_per_save 9 --steps_per_eval 8 "
        "--grad_checkpoint",
    ),
}
# Those of which nothing here has the same meaning and unit, and what the line says instead.
ANOTHER = {
    "eval_iters 200": "--eval_tokens counts tokens",
    "device cuda": "--gpu an Apple or NVIDIA GPU",
    "checkpoint best": "--identifier names a checkpoint",
    "num_train_epochs 3": "--num_iters counts steps",
    "output answers.txt": "python -m extras.batch FILE --output FILE",
    "rope_thetas 4": "--rope_thetas (--help lists all flags)",
}


@pytest.mark.parametrize("theirs, ours", THEIRS.values(), ids=THEIRS)
def test_names_of_other_programs(theirs, ours, text, tmp_path):
    line = ["--text", text, "--sample_tokens", 4]
    expected = given_in(tmp_path, *line, *ours.split())
    assert len(expected) > 6
    assert given_in(tmp_path, *line, *theirs.split()) == expected


def test_names_of_samplers(first_base):
    ours = "--prompt line --max_tokens 9 --temperature 2 --identifier latest"
    theirs = "--start line --max_new_tokens 9 --temp 2 --resume_from_checkpoint latest"
    expected, _ = run(*ours.split(), "--save_dir", first_base)
    assert run(*theirs.split(), "--out_dir", first_base)[0] == expected
    assert len(expected) > 2


@pytest.mark.parametrize("theirs", ANOTHER)
def test_names_of_something_else(theirs):
    _, err = run(*f"--{theirs}".split(), status=2)
    assert err.startswith("main.py: unrecognized arguments: ") and err.count("\n") == 1
    assert ANOTHER[theirs] in err


@pytest.mark.parametrize("program", ["datasets.py", "-m extras.export DIR"])
def test_other_programs_know_them_too(program):
    _, err = run(program=[*program.split(), "--compile"], status=2, cwd=ROOT)
    hint = "steps are always compiled; --help lists all flags"
    assert err.endswith(f": unrecognized arguments: --compile ({hint})\n")


def test_each_hint_can_be_found():
    """By names as flags have them here: with `_`, and without the "no" of what is switched off."""
    assert {*ALIASES} <= {*FLAGS.rows}
    ours = {*FLAGS.rows, *" ".join(ALIASES.values()).split()} - {"checkpoint"}
    theirs = " ".join(NOT_HERE).split()
    assert len(theirs) == len({*theirs} - ours)
    assert all(re.fullmatch("(?!no_)[a-z0-9_]+", name) for name in theirs)


# ---- The folder of runs -------------------------------------------------------------------------


def test_list(text, tmp_path):
    """The newest run first, the best loss of each; one without a checkpoint, too."""
    folder = ["--save_dir", tmp_path]
    common = [*TINY, *folder, "--steps_per_eval", 2, "--learning_rate", 0.01, "--lr_warmup", 1]
    config = tmp_path / "mine.yaml"
    config.write_text("num_iters: 9\n")
    names = []
    for line in (
        ["--text", text, "--config", config],
        ["--text", text, "--seed", 1, "--num_iters", 1, "--steps_per_eval", 0],
        ["--text", text, "--tokenizer", "char", "--num_iters", 9],
    ):
        names.append(begin(*common, *line)[0])
    good, unscored, char = names
    (tmp_path / "text-01234567").mkdir()
    header, *rows = run("--list", *folder, env={"COLUMNS": "200"})[0].splitlines()
    assert header.split()[-1] == "MiB"
    cells = [re.split("  +", row) for row in rows]
    assert [row[1] for row in cells] == [char, unscored, good, "text-01234567"]
    assert [row[2] for row in cells[:3]] == ["text.txt", "text.txt", "mine.yaml"]
    assert [row[3] for row in cells[:3]] == ["9 of 9", "1 of 1", "9 of 9"]
    scored = [each.evaluation for each in saved(tmp_path, good) if each.evaluation]
    best = min(scored, key=lambda evaluation: evaluation.loss)
    assert cells[2][4:6] == [f"{best.loss:.4f} at {best.iteration}", f"{best.bits_per_byte:.4f}"]
    assert cells[3][2] == "nothing saved"
    narrow, _ = run("--list", *folder, env={"COLUMNS": "60"})
    assert all(len(row) <= 60 for row in narrow.splitlines())
    flags, *checkpoints = run("--list", "--identifier", good, *folder)[0].splitlines()
    assert flags.startswith(f"{good}: ") and f" --text={text} " in flags
    assert "--num_iters=9" in flags and "--seed" not in flags, (
        "those with other values than their defaults"
    )
    listed = [(each.id, f"{each.iteration}") for each in saved(tmp_path, good)]
    assert [(row.split()[1], row.split()[0]) for row in checkpoints] == listed


def test_runs_are_saved_here_unless_a_folder_is_named(text, tmp_path):
    """In ./runs; texts' tokens lie in --data_dir, or in the folder that is named."""
    home = tmp_path / "home"
    options = {"cwd": tmp_path, "env": {"HOME": str(home), "XDG_CACHE_HOME": CACHES}}
    line = ["--text", text, *TINY, "--num_iters", 1]
    run(*line, "--data_dir", "data", **options)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["text"]
    assert [*(tmp_path / "runs").iterdir()] == [run_folder(tmp_path / "runs")]
    run(*line, "--save_dir", "~/deep/lm", **options)
    run(*line, "--save_dir", "$HOME/deep/lm", **options)
    [own] = (home / "deep").iterdir()
    assert sorted(own.iterdir()) == sorted([run_folder(own), own / "text"])


def test_a_path_is_expanded_where_it_is_typed_alone(text, tmp_path):
    """A text may have a name like $x; its run can be used after it has gone."""
    odd = text.rename(tmp_path / "$x.txt")
    folder = ["--save_dir", tmp_path]
    run("--text", odd, *TINY, "--num_iters", 1, *folder)
    odd.unlink()
    out, err = run("--prompt", "line", "--max_tokens", 2, *folder)
    assert out and "Skipping" not in err


# ---- Results, readers ---------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="macOS has none")
@pytest.mark.parametrize("typed", [
    "main.py --list",
    "main.py --evaluate valid",
    "-m extras.cases tests/cases.yaml",
])  # fmt: skip
def test_a_result_that_could_not_be_written_is_a_failure(typed, first_base):
    program = [*typed.split(), "--save_dir", first_base]
    with open("/dev/full", "w") as full:
        _, err = run(program=program, cwd=ROOT, stdout=full, status=1)
    [message] = re.findall(r"^(?:main\.py|extras\.cases): .*\n", err, re.M)
    assert "No space left" in message and err.endswith(message)


def test_a_reader_may_leave(first_base):
    read, write = os.pipe()
    os.close(read)
    _, err = run("--list", "--save_dir", first_base, stdout=write, status=1)
    os.close(write)
    assert err == ""


def test_readers_beside_a_run_that_saves_and_prunes(line, tmp_path):
    """What vanishes while it is read is passed over."""
    trainer = start(*line, "--steps_per_save", 9, "--sample_tokens", 0)
    wait_for(trainer, "saved ")
    trainer.stdout.close()  # nobody reads on, which ends no run
    for _ in range(4):
        run("--prompt", "a", "--max_tokens", 1, "--save_dir", tmp_path)
        run("--list", "--save_dir", tmp_path)
    trainer.send_signal(signal.SIGINT)
    err = trainer.stderr.read()
    assert trainer.wait(timeout=60) == 130, err
