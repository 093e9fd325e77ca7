"""The recipes of extras/recipes: what they are, how --config finds them, and that they start."""

import re
import shlex

import pytest
from conftest import ROOT, TINY, flags, run, settled

import main

README = (ROOT / "README.md").read_text() + (ROOT / "extras" / "README.md").read_text()
RECIPES = {path.stem: path.read_text() for path in main.RECIPES.glob("*.yaml")}
# The commands whose results README states: another value would be another run.
PTB = """
    --dataset ptb --dim 256 --num_heads 4 --context_size 128 --batch_size 32 --qk_norm
    --optimizer muon --learning_rate 5e-3 --lr_schedule linear --lr_cooldown 0.5 --min_lr 0
    --lr_warmup 20 --weight_decay 0.5 --dropout 0.1 --average 0.1 --dtype bfloat16
    --steps_per_eval 310 --eval_tokens 0
"""
TUNE = """
    --text notes.txt --init_from latest --learning_rate 1e-3 --lr_warmup 20 --num_iters 500
    --steps_per_eval 250
"""
FIRST = """
    --dim 128 --num_heads 4 --context_size 128 --batch_size 8 --learning_rate 3e-3 --lr_warmup 50
    --num_iters 800 --optimizer muon --lr_schedule cosine
"""
COMMANDS = {
    "first": FIRST + "--dataset python --steps_per_eval 400 --sample_prompt 'def '",
    "own-text": FIRST
    + """
        --text notes.txt --weight_decay 8 --embedding_decay 1 --average 0.1 --steps_per_eval 200
        --sample_prompt "The "
    """,
    "characters": """
        --dataset python --tokenizer char --num_blocks 4 --dim 128 --num_heads 4
        --context_size 128 --batch_size 12 --qk_norm --untie --optimizer muon
        --learning_rate 5e-3 --lr_schedule linear --lr_cooldown 0.6 --min_lr 0 --lr_warmup 10
        --dtype bfloat16 --num_iters 920 --steps_per_eval 920 --eval_tokens 0
    """,
    "ptb-1-hour": PTB
    + "--dim 384 --num_heads 6 --embedding_decay 2 --num_iters 2300 --steps_per_eval 230",
    "ptb-15-minutes": PTB
    + """
        --embedding_decay 1.5 --num_iters 1240 --dropout 0.05 --mlp_dim 768
    """,
    "ptb-5-minutes": PTB
    + """
        --embedding_decay 1 --num_iters 850 --dim 128 --dropout 0 --steps_per_eval 425
    """,
    "finetune": TUNE,
    "lora": TUNE + "--lora_rank 8",
}
SIZES = {"tinystories": 53, "gpt2": 124}  # million parameters, with GPT-2's vocabulary


def test_each_recipe_is_tested():
    assert RECIPES.keys() == COMMANDS.keys() | SIZES.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_is_the_command_that_was_measured(name):
    assert settled("--config", name) == settled(*shlex.split(COMMANDS[name]))


@pytest.mark.parametrize("name", SIZES)
def test_size_of_a_recipe(name):
    given = flags(**main.read_command_line(["--config", name]))
    assert given.tokenizer == "gpt2"
    model = main.LanguageModel(main.make_config(given, vocab_size=50257))
    parameters = main.count_parameters(model.parameters())
    assert round(parameters / 1e6) == SIZES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_begins_with_what_it_needs_and_reaches(name):
    head, _, settings = RECIPES[name].partition("\nrun:\n")
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"python main.py --config {name}" in head
    assert "# Needs: " in head
    assert "# Reaches: " in head
    assert settings


def test_readmes_name_each_recipe_and_no_other():
    named = set(re.findall(r"--config ([\w-]+)", README)) - {"NAME"}
    assert named and named <= RECIPES.keys()
    assert all(f"`{name}`" in README for name in RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"finetune", "lora"}))
def test_a_recipe_starts(name, text, tmp_path):
    small = [*TINY, "--tokenizer", "char", "--num_iters", 2, "--save_dir", tmp_path]
    out, _ = run("--config", name, "--text", text, *small)
    assert "saved " in out and " at iteration 2" in out


@pytest.mark.parametrize("name, trainable", [("finetune", False), ("lora", True)])
def test_a_recipe_trains_on(name, trainable, base, tmp_path):
    """A text named notes.txt, from the model saved last, and its rerun resumes it."""
    (tmp_path / "text.txt").rename(tmp_path / "notes.txt")
    folder, checkpoint = base
    line = ["--config", name, "--save_dir", folder]
    small = ["--batch_size", 4, "--max_tokens", 5]
    out, _ = run(*line, *small, "--num_iters", 2, cwd=tmp_path)
    assert "from iteration 0 to 2" in out
    assert (" trainable: " in out) == trainable
    out, _ = run(*line, *small, "--num_iters", 3, cwd=tmp_path)
    assert "from iteration 2 to 3" in out


def test_a_flag_beside_a_recipe_wins():
    expected = settled(*shlex.split(COMMANDS["first"])) | {"learning_rate": 0.5, "num_heads": 2}
    expected["num_kv_heads"] = 2  # which are as many
    other = ["--learning_rate", "0.5", "--num_heads", "2"]
    assert settled("--config", "first", *other) == expected
    assert settled(*other, "--config", "first") == expected


def test_a_corpus_beside_a_recipe_replaces_its_own():
    """And keeps its tokenizer."""
    values = settled("--config", "characters", "--dataset", "ptb")
    assert (values["dataset"], values["tokenizer"]) == ("ptb", "char")
    values = settled("--config", "first", "--text", "notes.txt")
    assert (values["dataset"], values["tokenizer"]) == ("text", "byte")


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    """A folder, which cannot be read, does not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    assert settled("--config", "first")["num_iters"] == 800
    (tmp_path / "first").rmdir()
    (tmp_path / "first").write_text("num_iters: 7\n")
    assert settled("--config", "first")["num_iters"] == 7
    assert settled("--config", "./first")["num_iters"] == 7


def test_script_metadata_is_the_requirements():
    """What `uv run` installs (PEP 723) for main.py is what pip installs."""
    required = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        requirement, _, _ = line.partition("#")
        required.append(requirement.strip().replace('"', "'"))
    pattern = r"^# /// script$\n((?:^#(?:| .*)$\n)+?)^# ///$"  # that of PEP 723, one block
    [block] = re.findall(pattern, (ROOT / "main.py").read_text(), re.MULTILINE)
    assert '# requires-python = ">=3.10"\n' in block
    assert re.findall(r'^#     "(.*)",$', block, re.MULTILINE) == required
