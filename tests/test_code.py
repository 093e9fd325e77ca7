"""The code of a run is what Python has loaded; an edit of it is another run, wherever it stands."""

import re

import pytest
from conftest import TINY, begin, copy_program, run, saved

SMALL = [*TINY, "--num_blocks", 1, "--sample_tokens", 0, "--num_iters", 2, "--steps_per_eval", 0]

# What a notebook does in its cells. The arguments of the process: a folder, then those of main.py.
NOTEBOOK = """
import importlib, pathlib, sys
folder = sys.argv.pop(1)
import main

def train():
    return main.main(sys.argv[1:])

def edit(file, old, new):
    path = pathlib.Path(folder, file)
    source = path.read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))

"""
SMALLER_EMBEDDINGS = 'edit("main.py", "* 5 / model.config.dim", "* 4 / model.config.dim")'


@pytest.fixture
def line(text, tmp_path):
    """A command that trains two steps of a small model."""
    return ["--text", text, *SMALL, "--save_dir", tmp_path / "lm"]


def cells(folder, line, *code):
    """Runs the cells of a notebook: the runs that it trains, and what was said."""
    source = NOTEBOOK + "\n".join(code)
    out, err = run("-c", source, folder, *line, program=[folder / "main.py"])
    return re.findall(r"^run +(\S+), from iteration (\d+) ", out, re.M), out + err


def test_an_edit_is_trained_once_it_is_loaded(line, tmp_path):
    """By a notebook that reloads, or by the next process; until then, the run is the old one."""
    folder = copy_program(tmp_path / "copy").parent
    look = "main.Batches.__annotations__, main.RMSNorm.__annotations__"
    runs, said = cells(folder, line, "train()", SMALLER_EMBEDDINGS, look, "train()")
    [(name, _), _] = runs
    assert runs == [(name, "0"), (name, "2")]
    assert "not as in main.py" not in said
    assert said.count("main.py was edited since it was loaded: the edit is not in this run.\n") == 1
    back = SMALLER_EMBEDDINGS.replace("5", "X").replace("4", "5").replace("X", "4")
    reload = "importlib.reload(main)"
    runs, _ = cells(folder, line, "train()", back, "train()", reload, "train()")
    assert runs == [(f"{name}.2", "0"), (f"{name}.2", "2"), (name, "2")]


REPLACEMENTS = {
    "attend": "main.attend = lambda queries, keys, values, mask=None: values",
    "RMSNorm": "main.RMSNorm.__call__ = lambda self, x: x",
    "MLPS": "main.MLPS['relu2'] = (main.mx.abs, False)",
    "hash32": "main.hash32 = main.mx.compile(main.hash32)",
    "Linear": "del main.Linear.__call__",
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_what_a_cell_replaces_is_named_and_not_resumed(name, line, tmp_path):
    """Nobody could know later what was trained."""
    folder = copy_program(tmp_path / "copy").parent
    runs, said = cells(folder, line, "train()", REPLACEMENTS[name], "train()", "train()")
    [(first, _), *_] = runs
    assert runs == [(first, "0"), (f"{first}.2", "0"), (f"{first}.3", "0")]
    assert len(re.findall(rf"^{name}: not as in main\.py, so that no command", said, re.M)) == 2
    runs, _ = cells(folder, line, "train()")
    assert runs == [(first, "2")]


def test_logits_that_are_replaced_would_not_be_trained(line, tmp_path):
    """By extras/fast.py: one line, and no run."""
    folder = copy_program(tmp_path / "copy").parent
    replace = "main.LanguageModel.logits = lambda self, hidden: self.lm_head(hidden)"
    runs, said = cells(folder, line, replace, "print('status', train())")
    assert runs == []
    assert "main.py: extras/fast.py computes the loss without a part of main.LanguageModel" in said
    assert "Traceback" not in said


def test_extras_are_loaded_anew_with_main(line, tmp_path):
    """Or LoRA would go on with what it imported from the main.py of before."""
    folder = copy_program(tmp_path / "copy").parent
    [(base, _)], _ = cells(folder, line, "train()")
    line += ["--init_from", base, "--lora_rank", 2]
    edit = 'edit("main.py", "rng.standard_normal(shape", "2 * rng.standard_normal(shape")'
    runs, _ = cells(folder, line, "train()", edit, "importlib.reload(main)", "train()")
    [(name, _), (other, _)] = runs
    fresh, _, _ = begin(*line, "--new_model", program=["-B", folder / "main.py"])
    ended = {run: saved(line[-5], run)[0].id for run in (name, other, fresh)}
    assert ended[name] != ended[other] == ended[fresh]


def test_what_code_keeps_while_it_runs_is_no_edit(line, tmp_path):
    """A table that it fills: the command goes on with its run."""
    edits = {
        "EDITED = []": "SEEN = {}\n\nEDITED = []",
        "        self.embed_tokens = ": "        SEEN[len(SEEN)] = 1\n        self.embed_tokens = ",
    }
    program = {"program": [copy_program(tmp_path / "copy", edits)]}
    line += ["--num_iters", 9, "--max_minutes", 1e-9]  # two steps: the first is not timed
    name, _, _ = begin(*line, **program)
    assert begin(*line, **program)[:2] == (name, 2)


def test_without_its_c_the_fast_version_still_runs(line, tmp_path):
    path = copy_program(tmp_path / "copy")
    (path.parent / "extras" / "fast.c").unlink()
    begin(*line, program=[path])


# Places of main.py, and what is put before each; the same with a 2 is the edit.
TITLE = "# ---- Sampling of weights -----\n\nFACTOR = 1\n\n\n"
BANNER = f"# {'=' * 97}\n# OPERATIONS"
PLACES = {
    "at the top": ("EDITED = []", "FACTOR = 1\n"),
    "in a room": ("def adamw(", "FACTOR = 1\n\n\n"),
    "with a title": ("def adamw(", TITLE),
    "after the rooms": (BANNER, f"# ---- Mine ----\n\nFACTOR = 1\n\n\n{BANNER}\n\n\n"),
    "as a table": ("def adamw(", 'FACTORS = {"mine": 1}\n\n\n'),
}
ELSEWHERE = {
    "Sampling": ("def keep_top_k(", "FACTOR = 1\n\n\n"),
    "Evaluation": ("def scored_windows(", "FACTOR = 1\n\n\n"),
    "Reports": ("def plural(", "FACTOR = 1\n\n\n"),
}


def name_of_run(folder, line, place, factor, more=None):
    """The run that a main.py trains in which `place` was edited."""
    target, insertion = place
    edits = {target: insertion.replace("1", str(factor)) + target} | (more or {})
    name, _, _ = begin(*line, program=[copy_program(folder / str(factor), edits)])
    return name


@pytest.mark.parametrize("place", PLACES)
def test_code_counts_wherever_it_stands(place, line, tmp_path):
    first = name_of_run(tmp_path, line, PLACES[place], 1)
    assert name_of_run(tmp_path, line, PLACES[place], 2) == f"{first}.2"


@pytest.mark.parametrize("place", ELSEWHERE)
def test_what_trains_nothing_does_not_count(place, line, tmp_path):
    first = name_of_run(tmp_path, line, ELSEWHERE[place], 1)
    assert name_of_run(tmp_path, line, ELSEWHERE[place], 2) == first


def test_without_a_banner_all_of_it_counts(line, tmp_path):
    """As where it stands twice, so that it does not tell apart what trains."""
    twice = {"def adamw(": f"{BANNER}\n\n\ndef adamw("}
    first = name_of_run(tmp_path, line, ELSEWHERE["Reports"], 1, twice)
    assert name_of_run(tmp_path, line, ELSEWHERE["Reports"], 2, twice) == f"{first}.2"


def test_what_a_cell_does_to_a_module_counts(line, tmp_path):
    """Loaded anew, or where its function is replaced in main.py."""
    edits = {
        "EDITED = []": "import mine\nfrom mine import f\n\nEDITED = []",
        "return mx.square(nn.relu(x))": "return f(nn.relu(x)) * mine.FACTOR",
    }
    path = copy_program(tmp_path / "copy", edits)
    path.with_name("mine.py").write_text("FACTOR = 1\n\n\ndef f(x):\n    return x * x\n")
    replace = "main.f = lambda x: x"
    edit = 'edit("mine.py", "FACTOR = 1", "FACTOR = 2")'
    reload = "importlib.reload(sys.modules['mine'])"
    code = ["train()", edit, "train()", reload, "train()", replace, "train()"]
    runs, said = cells(path.parent, line, *code)
    [(name, _), *_] = runs
    assert runs == [(name, "0"), (name, "2"), (f"{name}.2", "0"), (f"{name}.3", "0")]
    assert re.findall("^(.*): not as in main.py, ", said, re.M) == ["mine", "f, mine"]


@pytest.mark.parametrize("place", [
    ".conda/lib/python3.11/mine.py",
    "venv/lib/python3.11/site-packages/mine.py",
])  # fmt: skip
def test_installed_modules_are_not_ones_own(place, line, tmp_path):
    """Wherever an environment lies."""
    edits = {"EDITED = []": "import mine\n\nEDITED = []"}
    path = copy_program(tmp_path / "copy", edits)
    module = path.parent / place
    module.parent.mkdir(parents=True, exist_ok=True)
    options = {"program": ["-B", path], "env": {"PYTHONPATH": str(module.parent)}}
    module.write_text("FACTOR = 1\n")
    name, _, _ = begin(*line, **options)
    module.write_text("FACTOR = 22\n")
    assert begin(*line, "--num_iters", 3, **options)[:2] == (name, 2)


def test_modules_count_where_they_are_used(line, text, tmp_path):
    """One of the user's own, extras/fast.py with its C, and extras/lora.py in a LoRA run alone.

    A remark does not, nor does extras/check.py.
    """
    imported = {"EDITED = []": "import mine\n\nEDITED = []"}
    path = copy_program(tmp_path / "copy", imported)
    path.with_name("mine.py").write_text("FACTOR = 1\n")
    name, _, _ = begin(*line, program=["-B", path])
    adapters = ["--init_from", name, "--lora_rank", 2, *line]
    lora, _, _ = begin(*adapters, program=["-B", path])

    def edit(name, addition):
        with open(path.parent / name, "a") as file:
            file.write(addition)

    def names_of(*lines):
        return [begin(*each, program=["-B", path])[0] for each in lines]

    edit("extras/check.py", "FACTOR = 2\n")
    edit("mine.py", "# A remark\n")
    assert names_of(line, adapters) == [name, lora]
    edit("extras/lora.py", "FACTOR = 1\n")
    assert names_of(line, adapters) == [name, f"{lora}.2"]
    edit("mine.py", "FACTOR = 2\n")
    assert names_of(line, adapters) == [f"{name}.2", f"{lora}.3"]
    edit("extras/fast.c", "// 2\n")
    assert names_of(line) == [f"{name}.3"]
    edit("extras/fast.py", "FACTOR = 2\n")
    assert names_of(line) == [f"{name}.4"]
