"""The recipes of extras/recipes: how --config finds them, that they start, and are documented."""

import re

import pytest
from conftest import ROOT, newest, run
from test_readme import PAGES

RECIPES = {path.stem: path.read_text() for path in (ROOT / "extras" / "recipes").glob("*.yaml")}


def test_readmes_name_each_recipe_and_no_other():
    named = set(re.findall(r"--config ([\w-]+)", PAGES)) - {"NAME"}
    assert named and named <= RECIPES.keys()
    assert all(f"`{name}`" in PAGES for name in RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"finetune", "lora"}))
def test_a_recipe_starts(name, line, tmp_path):
    """With what it says but for a smaller shape, on a text in the place of its corpus."""
    run("--config", name, *line, "--tokenizer", "char", "--num_iters", 2)
    checkpoint = newest(tmp_path)
    assert checkpoint.iteration == 2
    [rate] = re.findall(r"  learning_rate: (\S+)", RECIPES[name])
    assert checkpoint.flags["learning_rate"] == float(rate)
    assert checkpoint.flags["dim"] == 16, "a flag beside a recipe wins"


@pytest.mark.parametrize("name, trainable", [("finetune", False), ("lora", True)])
def test_a_recipe_trains_on(name, trainable, base, text, tmp_path):
    """A text named notes.txt, from the model saved last, and its rerun resumes it."""
    text.rename(tmp_path / "notes.txt")
    folder, _ = base
    line = ["--config", name, "--save_dir", folder, "--batch_size", 4, "--max_tokens", 5]
    out, _ = run(*line, "--num_iters", 2, cwd=tmp_path)
    assert "from iteration 0 to 2" in out
    assert (" trainable: " in out) == trainable
    out, _ = run(*line, "--num_iters", 3, cwd=tmp_path)
    assert "from iteration 2 to 3" in out


def test_a_file_comes_before_a_recipe_of_its_name(line, tmp_path):
    (tmp_path / "first").write_text("num_iters: 7\n")
    run("--config", "first", *line, "--max_minutes", 1e-9, cwd=tmp_path)
    assert newest(tmp_path).flags["num_iters"] == 7


def test_uv_installs_what_pip_does():
    """pyproject.toml has the lists of the two files of requirements."""
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == requirements("requirements.txt")
    assert {*project["dependency-groups"]["test"]} == {*requirements("tests/requirements.txt")}
    assert not project["tool"]["uv"]["package"], "datasets is the name of another package"


def requirements(name):
    """The lines of a file of requirements, without remarks."""
    text = (ROOT / name).read_text().replace('"', "'")
    return re.findall(r"^[^#\n]*[^#\s]", text, re.M)
