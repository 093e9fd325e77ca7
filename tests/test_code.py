"""The code of a run is what Python has loaded; an edit of it is another run, wherever it stands."""

import os
import re
import shutil

import anchors
import pytest
from conftest import ROOT, begin, copy_program, run, saved
from support.code import hash_of_code

# What a notebook does in its cells. The arguments of the process: a folder, then those of main.py.
NOTEBOOK = """
import pathlib, sys
folder = sys.argv.pop(1)
import main

def edit(file, old, new):
    path = pathlib.Path(folder, file)
    source = path.read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))

"""
TRAIN = "main.main(sys.argv[1:])"
# As IPython does it: once more, in the same process.
RUN_AGAIN = """
import runpy
try:
    runpy.run_path(folder + "/main.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
"""
FIRST = "import argparse\n"
IMPORTED = {FIRST: f"import mine\n{FIRST}"}
SMALLER_EMBEDDINGS = f'edit("main.py", "{anchors.EMBEDDINGS_SCALE}", "* 4 / model.config.dim")'


@pytest.fixture
def line(line):
    """A command that trains two steps of a small model."""
    return [*line, "--num_blocks", 1, "--sample_tokens", 0, "--num_iters", 2, "--steps_per_eval", 0]


def cells(folder, line, *code):
    """Runs the cells of a notebook: the runs that it trains, and what was said."""
    source = NOTEBOOK + "\n".join(code)
    out, err = run(folder, *line, program=["-c", source], cwd=folder)
    return re.findall(r"^run +(\S+), from iteration (\d+) ", out, re.M), out + err


def test_a_strangers_folder_of_code_stays_as_it_is(line, tmp_path):
    """If it holds a link, which could lead anywhere, or a pipe, which never ends."""
    name, _, _ = begin(*line)
    [code] = tmp_path.glob(f"{name}/code-*/extras")
    shutil.rmtree(code)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code.symlink_to(elsewhere)
    run(*line, "--num_iters", 3)
    assert not os.listdir(elsewhere)
    code.unlink()
    os.mkfifo(code)
    run(*line, "--num_iters", 4)
    edited = [copy_program(tmp_path / "copy", {anchors.MOMENTUM: "momentum=0.8"})]
    _, _, said = begin(*line, "--num_iters", 5, program=edited)
    assert f"{name}, at iteration 4 of 4, was trained by other code (main.py: diff " in said


def test_an_edit_is_trained_once_it_is_loaded(line, tmp_path):
    """By the next process, or the next %run of a notebook; until then, the run is the old one."""
    folder = copy_program(tmp_path / "copy").parent
    runs, said = cells(folder, line, TRAIN, SMALLER_EMBEDDINGS, TRAIN, RUN_AGAIN)
    [(name, _), *_] = runs
    assert runs == [(name, "0"), (name, "2"), (f"{name}.2", "0")]
    assert said.count("main.py was edited since it was loaded: the edit is not in this run.\n") == 1
    assert begin(*line, program=[folder / "main.py"])[:2] == (f"{name}.2", 2)


def test_what_main_imports_is_loaded_anew_with_it(line, tmp_path):
    """Or LoRA would go on with the functions of the main.py of before, and a module be the old."""
    path = copy_program(tmp_path / "copy", IMPORTED)
    path.with_name("mine.py").write_text("FACTOR = 1\n")
    folder = path.parent
    [(base, _)], _ = cells(folder, line, TRAIN)
    line += ["--init_from", base, "--lora_rank", 2]
    values = anchors.NORMAL_INIT
    edit = f'edit("main.py", "{values}", "2 * {values}")'
    mine = 'edit("mine.py", "FACTOR = 1", "FACTOR = 2")'
    runs, _ = cells(folder, line, RUN_AGAIN, edit, RUN_AGAIN, mine, RUN_AGAIN)
    [(name, _), (other, _), (third, _)] = runs
    assert (other, third) == (f"{name}.2", f"{name}.3")
    fresh, _, _ = begin(*line, "--new_model", program=[path])
    ended = {run: saved(tmp_path, run)[0].id for run in (name, other, fresh)}
    assert ended[name] != ended[other] == ended[fresh]


SAMPLE = """
import os as system

@decorated(1, key=None)
class Model(Base, metaclass=Meta):
    width: int = 3

    async def call(self, x: list[int], /, *rest, mode=u"plain", **more) -> str | None:
        with open(x) as file, lock:
            return f"{x!r:>{width}} of {{{x=}}}" f' {rest[-1]:.3f}' "\\N{BULLET}" + b"\\x00".hex()
        try:
            [*first, last] = (yield x)
        except OSError:
            return lambda y: y if y else -1.5e300j
        match x:
            case {"a": [1, *_]} | None:
                x @= ...
"""
REFORMATTED = SAMPLE.replace('f"{x', "f'{x").replace('}}}"', "}}}'").replace('"a"', "'a'")
REFORMATTED = REFORMATTED.replace("(1, key=None)", "(  # why\n    1,\n    key=None,\n)")
REFORMATTED = REFORMATTED.replace('u"plain"', '"plain"')
REFORMATTED = REFORMATTED.replace("    width", '    """A."""\n    width')
PINNED = "72fd7836ac820b2729772ba286c749a5b0f65bc57816a0d11edced8bcaaf1623"


def test_what_is_code_is_the_same_in_all_versions_of_python():
    """Else a run would not be resumed by a newer one. Layout, quotes and docstrings are no code."""
    assert hash_of_code(SAMPLE) == hash_of_code(REFORMATTED) == PINNED
    assert REFORMATTED.count("\n") > SAMPLE.count("\n")
    for edit in (("3", "4"), ("+ b", "- b"), ("{width}", "{widths}"), ("key", "keys")):
        assert hash_of_code(SAMPLE.replace(*edit)) != PINNED


@pytest.mark.upkeep
@pytest.mark.parametrize("name", [*filter(str.isupper, vars(anchors))])
def test_each_anchor_stands_once(name):
    """Where tests edit main.py."""
    assert (ROOT / "main.py").read_text().count(vars(anchors)[name]) == 1


OWN = [  # where main.py imports a module of one's own; its path; the line
    (FIRST, "mine.py", "import mine"),
    (anchors.TOP, "mine.py", "from mine import FACTOR"),
    (anchors.TOP, "own/part/mine.py", "import own.part.mine"),
    (anchors.TOP, "mine.py", '__import__("importlib").import_module("mine")'),
]


@pytest.mark.parametrize("place, path, imported", OWN)
def test_a_module_of_ones_own_counts_wherever_it_is_imported(place, path, imported, line, tmp_path):
    program = copy_program(tmp_path / "copy", {place: f"{imported}\n{place}"})
    module = program.parent / path
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_text("FACTOR = 1\n")
    name, _, _ = begin(*line, program=[program])
    [kept] = tmp_path.glob(f"{name}/code-*/{path}")
    assert kept.read_text() == "FACTOR = 1\n"
    module.write_text("FACTOR = 2\n")
    other, _, said = begin(*line, program=[program])
    assert other == f"{name}.2"
    assert f"was trained by other code ({path}: diff {kept} {module})" in said


def test_a_copy_of_another_name_is_the_program(line, tmp_path):
    """For extras, too, which import main; and by that name for the user. The two do not mix."""
    program = copy_program(tmp_path / "copy")
    base, _, _ = begin(*line, program=[program])
    lora = [*line, "--init_from", base, "--lora_rank", 2]
    plain, _, _ = begin(*lora, program=[program])
    source = program.read_text()
    edited = source.replace("inner = self.activation(inner)", "inner = 2 * self.activation(inner)")
    mine = program.with_name("mine.py")
    mine.write_text(edited)
    name, _, said = begin(*lora, program=[mine])
    assert name == f"{plain}.2"
    assert f"trained by other code (main.py: diff {tmp_path}" in said and f" {mine})" in said
    assert "\nTo train on: python mine.py --identifier " in said
    program.write_text(edited)
    same, iteration, _ = begin(*lora, program=[program])
    assert (same, iteration) == (name, 2), "it is the same code"
    _, err = run("--dim", program=[mine], status=2)
    assert err.startswith("mine.py: argument --dim: expected one argument")


def test_kept_code_can_be_run(line, tmp_path):
    """It trains as the program did; its C is compiled anew."""
    name, _, _ = begin(*line)
    [code] = tmp_path.glob(f"{name}/code-*")
    begin(*line, "--new_model", program=["-B", code / "main.py"])
    assert len({checkpoint.id for checkpoint in saved(tmp_path)}) == 1


@pytest.mark.parametrize("place", [
    ".conda/lib/python3.11/mine.py",
    "venv/lib/python3.11/site-packages/mine.py",
])  # fmt: skip
def test_installed_modules_are_not_ones_own(place, line, tmp_path):
    """Wherever an environment lies."""
    path = copy_program(tmp_path / "copy", IMPORTED)
    module = path.parent / place
    module.parent.mkdir(parents=True, exist_ok=True)
    options = {"program": [path], "env": {"PYTHONPATH": str(module.parent)}}
    module.write_text("FACTOR = 1\n")
    name, _, _ = begin(*line, **options)
    module.write_text("FACTOR = 22\n")
    assert begin(*line, "--num_iters", 3, **options)[:2] == (name, 2)


def test_modules_count_where_they_are_used(line, tmp_path):
    """One of the user's own, fast.py with its C, and extras/features/lora.py in a LoRA run alone.

    A remark does not, nor does extras/check.py. Each run keeps what it was trained by.
    """
    edits = {anchors.TOP: f"import own.part.mine\n\n{anchors.TOP}"}
    path = copy_program(tmp_path / "copy", edits)
    module = path.parent / "own/part/mine.py"
    module.parent.mkdir(parents=True)
    module.write_text("FACTOR = 1\n")
    name, _, _ = begin(*line, program=["-B", path])
    adapters = ["--init_from", name, "--lora_rank", 2, *line]
    lora, _, _ = begin(*adapters, program=["-B", path])

    def edit(name, addition):
        with open(path.parent / name, "a") as file:
            file.write(addition)

    def names_of(*lines):
        return [begin(*each, program=["-B", path])[0] for each in lines]

    edit("extras/check.py", "FACTOR = 2\n")
    edit("own/part/mine.py", "# A remark\n")
    assert names_of(line, adapters) == [name, lora]
    edit("extras/features/lora.py", "FACTOR = 1\n")
    assert names_of(line, adapters) == [name, f"{lora}.2"]
    edit("own/part/mine.py", "FACTOR = 2\n")
    assert names_of(line, adapters) == [f"{name}.2", f"{lora}.3"]
    kept = tmp_path.glob(f"{lora}/code-*/own/part/mine.py")
    assert [each.read_text() for each in kept] == ["FACTOR = 1\n"], "as it was loaded"
    edit("extras/features/fast.c", "// 2\n")
    assert names_of(line) == [f"{name}.3"]
    edit("extras/features/fast.py", "FACTOR = 2\n")
    (path.parent / "extras/features/fast.c").unlink()
    assert names_of(line) == [f"{name}.4"], "it runs without its C"
