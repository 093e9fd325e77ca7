"""The command line: where each value comes from, names of other programs, --help, --list, folders.

Mistakes: test_mistakes.py. Which run a command means: test_runs.py.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import datasets
import main
import pytest
from conftest import MAIN, ROOT, TINY, begin, ids, newest, run, run_folder, saved, settled, start, wait_for

# Those that are documented, which a new flag leaves as they are.
DEFAULTS = """
    --dataset ptb --tokenizer word --vocab_size 32000 --valid_fraction 0.1 --text_field text
    --context_size 48 --num_blocks 4 --dim 1024 --num_heads 8 --num_kv_heads 8 --mlp relu2
    --mlp_dim 4096 --no-qk_norm --no-untie --dropout 0 --seed 42 --optimizer adamw
    --batch_size 32 --grad_accumulation 1 --learning_rate 3e-4 --weight_decay 1e-5 --beta1 0.9
    --beta2 0.99 --lr_warmup 200 --lr_schedule constant --lr_cooldown 1 --grad_clip 1
    --dtype float32 --no-grad_checkpoint --average 0 --teacher_weight 0.5 --teacher_temperature 2
    --num_iters 100000 --steps_per_report 10 --steps_per_eval 1000 --eval_tokens 100000 --keep 3
    --no-eval_test --max_tokens 200 --num_samples 1 --temperature 0.5 --top_k 50 --top_p 1
    --min_p 0 --repetition_penalty 1 --stop_at_end --save_dir runs --no-gpu
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lines):
    """A folder with `text.txt` and, in `lm`, a run of three iterations; to be left as it is."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(lines)
    line = ["--text", folder / "text.txt", *TINY, "--num_iters", 3, "--steps_per_eval", 3]
    run(*line, "--save_dir", folder / "lm")
    return folder


@pytest.fixture(scope="module")
def lines():
    """A text of 200 lines."""
    return "".join(f"line {i}: the quick brown fox — jümps over {i} dogs\n" for i in range(200))


# ---- Values -------------------------------------------------------------------------------------


def test_defaults():
    assert settled(*DEFAULTS.split()) == settled()


@pytest.mark.parametrize("line, same", [
    ("--dataset python", "--dataset python --tokenizer byte"),
    ("--text a.txt", "--text a.txt --tokenizer byte"),
    ("--mlp swiglu", "--mlp swiglu --mlp_dim 2752"),
    ("--mlp swiglu --dim 192", "--mlp swiglu --dim 192 --mlp_dim 512"),
    ("--mlp gelu --dim 16", "--mlp gelu --dim 16 --mlp_dim 64"),
    ("--num_heads 4", "--num_heads 4 --num_kv_heads 4"),
    ("--init_from x --lora_rank 4", "--init_from x --lora_rank 4 --lora_alpha 8"),
    ("--preset gpt2", "--dim 768 --num_heads 12 --num_blocks 12 --context_size 1024"),
    ("--text a.txt --text b.txt", "--text a.txt b.txt"),
    ("--num-kv-heads=2 --no-qk-norm --prompt=--a-b", "--num_kv_heads 2 --prompt=--a-b"),
])  # fmt: skip
def test_lines_that_mean_the_same(line, same):
    assert settled(*line.split()) == settled(*same.split())


FLAT = """
dim: 16
num-heads: 2
mlp: gelu
learning_rate: 1e-2
keep: null
qk_norm: false
eval_test: true
"""
GROUPED = """
run: {preset: tiny, sample_prompt: [a b, --c]}
model:
  context_size: 32
whatever: {learning_rate: 0.5, qk_norm: true}
batch_size: 3
"""
FROM_FILES = [  # what the file holds, what is typed beside it; the line without a file
    (
        FLAT,
        "--learning_rate 0.5",
        "--dim 16 --num_heads 2 --mlp gelu --learning_rate 0.5 --eval_test",
    ),
    ("# dim: 32\n", "--dim 8", "--dim 8"),
    (
        GROUPED,
        "--num_heads 2 --no-qk_norm",
        "--dim 128 --num_heads 2 --num_blocks 4 --context_size 32 --batch_size 3 "
        "--learning_rate 0.5 --sample_prompt 'a b' --sample_prompt=--c",
    ),
    ("context_size: 32\n", "--preset tiny", "--preset tiny"),
    (
        "text: a.txt\nvalid_text: b.txt\ntokenizer: char\n",
        "--text c.txt",
        "--text c.txt --tokenizer char",
    ),
    ("text: [a.txt, b.txt]\n", "--dim 8", "--text a.txt b.txt --dim 8"),
    ("text: a.txt\n", "--dataset python", "--dataset python"),
    ("tokenizer: ~/t.json\nsave_dir: $HOME/lm\n", "", "--tokenizer ~/t.json --save_dir ~/lm"),
    (json.dumps({"prompt": "😀 \ud83d"}), "", "--prompt '😀 \ufffd'"),  # JSON is YAML, too
]


@pytest.mark.parametrize("content, beside, line", FROM_FILES)
def test_a_file_of_flags(content, beside, line, tmp_path):
    """Flat or in groups: what is typed counts more, and all of it more than a preset."""
    path = tmp_path / "own.yaml"
    path.write_text(content)
    assert settled("--config", str(path), *shlex.split(beside)) == settled(*shlex.split(line))


USELESS = [  # what is typed beside a text's training; the flags that the start screen names
    ("--min_lr 1e-5 --lr_cooldown 0.5", "--min_lr, --lr_cooldown"),
    ("--vocab_size 300", "--vocab_size"),
    (
        "--teacher_weight 0.1 --quantize 4 --eval_stride 4",
        "--teacher_weight, --quantize, --eval_stride",
    ),
    ("--min_lr 1e-5 --lr_schedule linear --valid_fraction 0.2", None),
    ("--vocab_size 300 --tokenizer bpe", None),
]


@pytest.mark.parametrize("options, named", USELESS)
def test_flags_without_an_effect_are_named(options, named, trained, tmp_path):
    line = ["--text", trained / "text.txt", *TINY, "--num_iters", 1, "--save_dir", tmp_path]
    out, _ = run(*line, *options.split())
    notices = [each for each in out.splitlines() if each.startswith("No effect here: ")]
    assert notices == ([f"No effect here: {named}."] if named else [])


def test_a_flag_without_an_effect_on_an_evaluation_is_named(trained):
    _, err = run("--evaluate", "valid", "--eval_tokens", 9, "--save_dir", trained / "lm")
    assert "No effect here: --eval_tokens.\n" in err


# ---- Names of other programs --------------------------------------------------------------------

# {program: {its names: ours}}. Both have the same unit.
SAME = {
    "nanoGPT": {
        "n_layer 3": "num_blocks 3",
        "n_head 2": "num_heads 2",
        "n_embd 64": "dim 64",
        "block_size 64": "context_size 64",
        "max_iters 9": "num_iters 9",
        "warmup_iters 9": "lr_warmup 9",
        "gradient_accumulation_steps 2": "grad_accumulation 2",
        "eval_interval 9": "steps_per_eval 9",
        "log_interval 9": "steps_per_report 9",
        "out_dir x": "save_dir x",
        "start x": "prompt x",
        "max_new_tokens 9": "max_tokens 9",
    },
    "Hugging Face": {
        "hidden_size 64": "dim 64",
        "num_hidden_layers 3": "num_blocks 3",
        "num_attention_heads 2": "num_heads 2",
        "num_key_value_heads 2": "num_kv_heads 2",
        "intermediate_size 64": "mlp_dim 64",
        "per_device_train_batch_size 2": "batch_size 2",
        "max_steps 9": "num_iters 9",
        "warmup_steps 9": "lr_warmup 9",
        "lr_scheduler_type cosine": "lr_schedule cosine",
        "max_grad_norm 2": "grad_clip 2",
        "adam_beta1 0.8": "beta1 0.8",
        "adam_beta2 0.8": "beta2 0.8",
        "gradient_checkpointing": "grad_checkpoint",
        "logging_steps 9": "steps_per_report 9",
        "eval_steps 9": "steps_per_eval 9",
        "save_steps 9": "steps_per_save 9",
        "save_total_limit 9": "keep 9",
        "output_dir x": "save_dir x",
        "resume_from_checkpoint x": "identifier x",
    },
    "mlx-lm": {
        "iters 9": "num_iters 9",
        "save_every 9": "steps_per_save 9",
        "max_seq_length 64": "context_size 64",
        "temp 0.8": "temperature 0.8",
    },
    "nanochat": {
        "depth 3": "num_blocks 3",
        "max_seq_len 64": "context_size 64",
        "device_batch_size 2": "batch_size 2",
        "num_iterations 9": "num_iters 9",
        "eval_every 9": "steps_per_eval 9",
    },
    "litgpt and others": {
        "lr 0.1": "learning_rate 0.1",
        "max_lr 0.1": "learning_rate 0.1",
        "micro_batch_size 2": "batch_size 2",
        "d_model 64": "dim 64",
        "n_layers 3": "num_blocks 3",
        "n_heads 2": "num_heads 2",
        "n_kv_heads 2": "num_kv_heads 2",
        "d_ff 64": "mlp_dim 64",
        "context_length 64": "context_size 64",
        "clip_grad_norm 2": "grad_clip 2",
        "interactive": "inference",
        "checkpoint": "grad_checkpoint",
    },
    "llama.cpp": {"n_predict 9": "max_tokens 9"},
}
SAME_LINES = [pair for names in SAME.values() for pair in names.items()]
# Those of which nothing here has the same meaning and unit, and what the line says instead.
ANOTHER = {
    "eval_iters 200": "--eval_tokens counts tokens",
    "device cuda": "--gpu an Apple or NVIDIA GPU",
    "wandb_log True": "--report_to wandb",
    "compile False": "--help lists all flags",
    "num_train_epochs 3": "--num_iters counts steps",
    "bf16": "--dtype bfloat16",
    "model_name_or_path gpt2": "--init_from names a model",
    "train_file a.txt": "--text names files of yours",
    "data a.txt": "--text names files of yours",
    "resume": "the same command resumes its run",
    "use_lora": "--lora_rank 8",
    "precision bf16-true": "--dtype bfloat16",
    "ctx_size 64": "--context_size?",
    "repeat_penalty 1.1": "--repetition_penalty?",
    "threads 4": "--threads (--help lists all flags)",
}


@pytest.mark.parametrize("theirs, ours", SAME_LINES, ids=[theirs for theirs, _ in SAME_LINES])
def test_names_of_other_programs(theirs, ours, tmp_path):
    """Typed, or in a file of flags."""
    expected = settled(*f"--{ours}".split())
    assert settled(*f"--{theirs}".split()) == expected
    name, _, value = theirs.partition(" ")
    path = tmp_path / "own.yaml"
    path.write_text(f"{name}: {value or 'true'}\n")
    assert settled("--config", str(path)) == expected


@pytest.mark.parametrize("theirs", ANOTHER)
def test_names_of_something_else(theirs, capsys):
    assert main.main(f"--{theirs}".split()) == 2
    err = capsys.readouterr().err
    name = theirs.partition(" ")[0]
    assert err.startswith(f"main.py: unrecognized arguments: --{name} (") and err.count("\n") == 1
    assert ANOTHER[theirs] in err


# Files of flags from READMEs of small projects, as they stand there.
DOCUMENTED = {
    "sections": """
model:
  vocab_size: 32000
  embedding_dim: 768
  num_layers: 16
  num_heads: 12
  ff_dim: 3072
  context_length: 2048
  dropout: 0.1

training:
  batch_size: 4
  gradient_accumulation_steps: 8  # effective batch = 32
  learning_rate: 3.0e-4
  weight_decay: 0.1
  max_steps: 100000
  warmup_steps: 2000
""",
    "nanoGPT's names": """
model:
  d_model: 256        # Model dimension
  n_heads: 8          # Number of attention heads
  n_layers: 6         # Number of transformer blocks
  block_size: 256     # Context length
  dropout: 0.1        # Dropout rate

training:
  batch_size: 32
  learning_rate: 3.0e-4
  max_iters: 10000
""",
    "flat": """
d_model: 128
n_heads: 4
n_layers: 4
block_size: 128
""",
    "quantized": """
advanced:
  quantize: "int8"
""",
    "GPT-2": """
model:
  d_model: 768
  n_heads: 12
  n_layers: 12
  block_size: 1024
  vocab_size: 50257  # GPT-2 BPE vocab

training:
  batch_size: 12  # Adjust for your GPU
  learning_rate: 2.5e-4
  max_iters: 600000
  warmup_iters: 2000
""",
}
SAID = {  # the same, typed
    "sections": "--vocab_size 32000 --dim 768 --num_blocks 16 --num_heads 12 --mlp_dim 3072 "
    "--context_size 2048 --dropout 0.1 --batch_size 4 --grad_accumulation 8 --weight_decay 0.1 "
    "--lr_warmup 2000",
    "nanoGPT's names": "--dim 256 --num_heads 8 --num_blocks 6 --context_size 256 --dropout 0.1 "
    "--num_iters 10000",
    "flat": "--dim 128 --num_heads 4 --num_blocks 4 --context_size 128",
    "quantized": "--quantize 8",
    "GPT-2": "--dim 768 --num_heads 12 --num_blocks 12 --context_size 1024 --vocab_size 50257 "
    "--batch_size 12 --learning_rate 2.5e-4 --num_iters 600000 --lr_warmup 2000",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_file_of_flags_trains(name, trained, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(DOCUMENTED[name])
    assert settled("--config", str(path)) == settled(*SAID[name].split())
    small = [*TINY, "--num_blocks", 1, "--mlp_dim", 8, "--num_iters", 1, "--grad_accumulation", 1]
    line = ["--config", path, "--text", trained / "text.txt", *small, "--save_dir", tmp_path / "lm"]
    assert begin(*line)[1] == 0
    assert newest(tmp_path / "lm").iteration == 1


# ---- Help, imports ------------------------------------------------------------------------------


def test_help(tmp_path):
    out, err = run("--help", cwd=tmp_path)
    assert err == "" and "research" not in out
    assert not list(tmp_path.iterdir())
    for name in main.DEFAULTS:
        assert re.search(rf"^  --{name}\b", out, re.M), name
    for title in ("data", "model", "start", "training", "run", "sampling", "command"):
        assert f"\n{title}:\n" in out
    for value in ("100000", "1024", "0.0003", "1e-05", "default: ptb", "default: relu2"):
        assert value in out
    assert "n_embd" not in out


def test_importing_does_nothing(tmp_path):
    command = [sys.executable, "-c", "import main", "--strange", "--dim", "x", "--inference"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---- The folder of runs -------------------------------------------------------------------------


def test_list(trained, tmp_path):
    """The best run first, one without a score last, with the flags that tell them apart."""
    folder = ["--save_dir", tmp_path / "lm"]
    far = tmp_path / "a folder"
    far.mkdir()
    (far / "text.txt").write_text((trained / "text.txt").read_text()[::-1])
    common = [*TINY, *folder, "--steps_per_eval", 2, "--learning_rate", 0.01]
    trainings = [  # options, iterations
        (["--text", trained / "text.txt"], 4),
        (["--text", trained / "text.txt", "--dim", 32], 6),
        (["--text", far / "text.txt"], 8),
        (["--text", trained / "text.txt", "--seed", 1], 1),
    ]
    names = []
    for options, num_iters in trainings:
        names.append(begin(*common, *options, "--num_iters", num_iters)[0])

    out, err = run("--list", *folder)
    assert err == ""
    header, *rows = out.splitlines()
    assert header.split() == "run trained valid nats iteration checkpoint flags".split()
    cells = {row.split()[0]: re.split("  +", row, maxsplit=5)[1:] for row in rows}
    scores = {}
    for name, (_, num_iters) in zip(names[:3], trainings):
        own = [each for each in saved(tmp_path / "lm", name) if each.score is not None]
        best = min(own, key=lambda each: each.score)
        scores[name] = best.score
        end = f"{num_iters} of {num_iters}"
        assert cells[name][:4] == [end, f"{best.score:.4f}", str(best.iteration), best.id[:12]]
    assert list(cells) == [*sorted(scores, key=scores.get), names[3]]
    assert cells[names[3]][:3] == ["1 of 1", "-", "1"]
    assert ["--dim=32" in cells[name][-1] for name in names] == [False, True, False, False]
    assert f"'--text={far / 'text.txt'}'" in cells[names[2]][-1], "quoted for a shell"
    assert "--batch_size" not in out, "those in which they do not differ"

    out, err = run("--list", "--save_dir", far)
    assert (out, err) == (main.NO_CHECKPOINT.format(far) + "\n", "")


def test_runs_are_saved_here_unless_a_folder_is_named(trained, tmp_path):
    """In ./runs; texts' tokens lie in --data_dir, or in the folder that is named."""
    home = tmp_path / "home"
    caches = str(datasets.CACHE.parent)  # of compiled code
    options = {"cwd": tmp_path, "env": {"HOME": str(home), "XDG_CACHE_HOME": caches}}
    line = ["--text", trained / "text.txt", *TINY, "--num_iters", 1]
    run(*line, "--data_dir", "data", **options)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["text"]
    assert [*(tmp_path / "runs").iterdir()] == [run_folder(tmp_path / "runs")]
    run(*line, "--save_dir", "~/deep/lm", **options)
    run(*line, "--save_dir", "$HOME/deep/lm", **options)
    [own] = (home / "deep").iterdir()
    assert sorted(own.iterdir()) == sorted([run_folder(own), own / "text"])


def test_what_is_used_is_named_before_it_begins(trained):
    """On stderr, so that stdout has nothing but the result."""
    folder = ["--save_dir", trained / "lm"]
    used = newest(trained / "lm")
    said = f"{used.run}, iteration 3, checkpoint {used.id[:12]}, in {trained / 'lm'}"
    for typed, begins in (("--prompt line --max_tokens 2", ""), ("--evaluate valid", "valid ")):
        out, err = run(*typed.split(), *folder)
        assert err.splitlines()[0] == said
        assert out.startswith(begins) and used.run not in out


def test_a_path_is_expanded_where_it_is_typed_alone(trained, tmp_path):
    """A text may have a name like $x; its run can be used after it has gone."""
    odd = tmp_path / "$x"
    odd.mkdir()
    (odd / "text.txt").write_text((trained / "text.txt").read_text())
    folder = ["--save_dir", tmp_path / "lm"]
    run("--text", odd / "text.txt", *TINY, "--num_iters", 1, *folder)
    (odd / "text.txt").unlink()
    out, err = run("--prompt", "line", "--max_tokens", 2, *folder)
    assert out and "Skipping" not in err


# ---- Results, readers ---------------------------------------------------------------------------


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
    command = f"{sys.executable} {MAIN} --list --save_dir {trained / 'lm'}"
    script = f"{command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode in (0, 1)  # 1 if it had not written all before
    assert done.stderr == ""


def test_readers_beside_a_run_that_saves_and_prunes(trained, tmp_path):
    """What vanishes while it is read is passed over."""
    line = ["--text", trained / "text.txt", *TINY, "--steps_per_save", 9]
    trainer = start(*line, "--sample_tokens", 0, "--save_dir", tmp_path)
    wait_for(trainer, "saved ")
    trainer.stdout.close()  # nobody reads on, which ends no run
    for _ in range(8):
        run("--prompt", "a", "--max_tokens", 1, "--save_dir", tmp_path)
        run("--list", "--save_dir", tmp_path)
    trainer.send_signal(signal.SIGINT)
    err = trainer.stderr.read()
    assert trainer.wait(timeout=60) == 130, err
