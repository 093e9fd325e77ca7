"""Without extras/: the program trains, is stopped, resumes exactly and samples."""

import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, ids, interrupt, log_rows, run, start, wait_for


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """How `run` and `start` start it, copied into a folder of its own."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(ROOT / "support", folder / "support")
    for name in ("main.py", "datasets.py"):
        shutil.copy(ROOT / name, folder)
    return {"program": [folder / "main.py"], "cwd": folder, "env": {"PYTHONPATH": ""}}


@pytest.fixture(scope="module")
def trained(alone, tmp_path_factory):
    """A folder with texts, a Hugging Face folder `hf` and, in `lm`, a run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    (folder / "rows.jsonl").write_text('{"text": "the quick"}\n')
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text('{"model_type": "llama"}')
    line = ["--text", folder / "text.txt", *TINY, "--dim", 32, "--num_iters", 5]
    run(*line, "--save_dir", folder / "lm", **alone)
    return folder


def losses(folder):
    """The loss and the gradient norm of each step of the one run in a folder: [steps, 2]."""
    steps = [[row["loss"], row["gradient_norm"]] for row in log_rows(folder, "train")]
    return np.array(steps)


def test_the_whole_program_trains_the_same_but_for_its_kernels(alone, text, tmp_path):
    """Without them to the bit; with them to rounding, which 20 steps hardly multiply."""
    options = (
        "--context_size 64 --batch_size 8 --grad_accumulation 2 --qk_norm --dropout 0.1 "
        "--optimizer muon --learning_rate 3e-3 --lr_warmup 2 --num_iters 20 --steps_per_report 1"
    )
    line = ["--text", text, *TINY, *options.split()]
    run(*line, "--save_dir", tmp_path / "alone", **alone)
    out, _ = run(*line, "--save_dir", tmp_path / "plain", env={"DISABLE_FAST": "1"})
    assert "matmuls: MLX's own BLAS, kernels: main.py\n" in out
    assert ids(tmp_path / "alone") == ids(tmp_path / "plain")
    out, _ = run(*line, "--save_dir", tmp_path / "fast")
    assert "MLX's own BLAS" not in out
    np.testing.assert_allclose(losses(tmp_path / "alone"), losses(tmp_path / "fast"), rtol=1e-4)


MISSING = [  # what is typed; the file that it needs
    ("--text text.txt --new_model --teacher latest", "distil"),
    ("--text text.txt --new_model --init_from latest --lora_rank 2", "lora"),
    ("--list", "list"),
    ("--prompt the --quantize 4", "quantize"),
    ("--text text.txt --new_model --init_from hf", "huggingface"),
    ("--prompt the --draft hf", "decode"),
    ("--prompt the --draft latest", "decode"),
    ("--text rows.jsonl --new_model", "formats"),
    ("--text text.txt --new_model --report_to wandb", "report"),
]
# Modules that are not there, and what the two programs say then.
NOT_THERE = [
    ("main.py", "fcntl"),  # as on Windows
    ("main.py", "tqdm"),
    ("datasets.py", "numpy"),
]


def hide(folder, *modules):
    """Makes modules missing in a Python with this folder in its path, and -B: one of its own."""
    lines = [f"sys.modules[{module!r}] = None\n" for module in modules]
    (folder / "sitecustomize.py").write_text("import sys\n" + "".join(lines))


@pytest.mark.parametrize("line, name", MISSING)
def test_a_flag_that_needs_extras_names_the_missing_file(line, name, trained, alone):
    before = ids(trained / "lm")
    _, err = run(*line.split(), "--save_dir", "lm", status=2, **alone | {"cwd": trained})
    missing = f"extras/features/{name}.py, or a file that it imports, is missing: "
    remedy = "copy the project's folder extras next to main.py"
    assert err.splitlines()[-1] == f"main.py: {missing}{remedy}"
    assert err.count("main.py: ") == 1
    assert ids(trained / "lm") == before


@pytest.mark.parametrize("program, module", NOT_THERE)
def test_a_system_or_a_python_that_lacks_something(program, module, alone, tmp_path):
    """One line, as a Python on Windows, or one without the requirements, would say."""
    hide(tmp_path, module)
    command = ["-B", alone["cwd"] / program]
    _, err = run("--help", program=command, env={"PYTHONPATH": str(tmp_path)}, status=2)
    assert err.startswith(f"{program}: import of {module} halted")
    assert "pip install -r requirements.txt, or uv run python main.py (Windows: in WSL)" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("module", ["random.py", "numpy.py", "typing.py", "yaml"])
def test_a_file_that_hides_a_module_is_named(module, alone, tmp_path):
    folder = shutil.copytree(alone["cwd"], tmp_path / "copy")
    path = folder / module
    if path.suffix:
        path.write_text("x = 1\n")
    else:
        path.mkdir()
        (path / "__init__.py").write_text("")
    for program in ("main.py", "datasets.py"):
        _, err = run("--help", program=["-B", folder / program], status=2)
        assert err == f"{path} hides the module of this name from Python: rename it\n"


LACKING = """
import sys

class Finder:
    def find_spec(self, name, *_):
        if name == "tqdm":
            raise ImportError({!r})

sys.meta_path.insert(0, Finder())
"""
OLD = "/opt/lib/libstdc++.so.6: version `GLIBCXX_3.4.30' not found (required by x.so)"


@pytest.mark.parametrize("reason, line", [
    (f"numpy fails.\n\n{'Advice. ' * 99}Original error was: {OLD}\n",
     "/opt/lib/libstdc++.so.6 is too old: take its folder out of LD_LIBRARY_PATH"),
    ("/lib/libc.so.6: version `GLIBC_2.35' not found", "MLX needs glibc 2.35 or newer"),
    ("No module named 'mlx'", "No module named 'mlx': activate the environment"),
])  # fmt: skip
def test_what_an_import_lacks(reason, line, tmp_path):
    """As numpy or mlx says it; here, the first package that is imported."""
    (tmp_path / "sitecustomize.py").write_text(LACKING.format(reason))
    _, err = run(program=["-B", ROOT / "main.py"], env={"PYTHONPATH": str(tmp_path)}, status=2)
    assert err.startswith("main.py: ") and line in err
    assert err.count("\n") == 1 and len(err) < 500


def test_losses_are_compared_without_what_windows_lacks(tmp_path):
    """With NumPy and tqdm alone."""
    hide(tmp_path, "fcntl", "mlx", "yaml", "requests", "tokenizers")
    command = ["-B", "-m", "extras.versus.losses", "extras/versus/nanogpt.csv"]
    out, _ = run(program=command, env={"PYTHONPATH": str(tmp_path)}, cwd=ROOT)
    assert out.splitlines()[-1].startswith("Helped, if both")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has no -P yet")
def test_a_python_that_does_not_look_beside_the_program(tmp_path):
    for option in ("-P", "-I"):
        out, err = run("--list", "--save_dir", tmp_path, program=[option, ROOT / "main.py"])
        assert "no checkpoint in" in out and not err
        out, err = run("--help", program=[option, ROOT / "datasets.py"], cwd=tmp_path)
        assert "Prepares a text" in out and not err


def test_a_run_goes_on_where_extras_are_missing(alone, text, tmp_path):
    """fast.py is other code: without flags, the run goes on, and says so."""
    line = ["--text", text, *TINY, "--save_dir", tmp_path]
    run(*line, "--num_iters", 3, **alone)
    line = ["--save_dir", tmp_path]
    out, _ = run(*line, "--num_iters", 6, program=["-B", ROOT / "main.py"])
    others = "extras/features/fast.c, extras/features/fast.py, extras/features/ranks.py"
    assert f"Code changed since iteration 3 ({others}).\n" in out, "no file is there twice"
    assert "kernels main.py -> fast.py" in out
    assert "resume may not be bit-exact" in out
    assert "from iteration 3 to 6" in out
    out, _ = run(*line, "--num_iters", 9, **alone)
    assert "kernels fast.py -> main.py" in out
    assert "from iteration 6 to 9" in out


def test_a_run_that_is_stopped_ends_as_one_that_never_was(alone, text, tmp_path):
    line = ["--text", text, *TINY, *"--tokenizer word --dropout 0.1 --num_iters 60".split()]
    saved = ["--save_dir", tmp_path / "lm"]
    process = start(*line, *saved, **alone)
    wait_for(process, "10/60 ")
    interrupt(process)
    run(*line, *saved, **alone)
    run(*line, "--save_dir", tmp_path / "whole", **alone)
    assert ids(tmp_path / "lm")[0] == ids(tmp_path / "whole")[0]
    for more in ("--evaluate valid", "--prompt line --max_tokens 5", "--inference --max_tokens 5"):
        out, _ = run(*more.split(), *saved, input="line 5\n", **alone)
        assert out.strip()


@pytest.mark.parametrize("line, package", [
    ("--config flags.yaml", "yaml"),
    ("--tokenizer bpe", "tokenizers"),
    ("--tokenizer own.json", "tokenizers"),  # the file is not at fault
])  # fmt: skip
def test_a_missing_package_is_named(line, package, alone, text, tmp_path):
    hide(tmp_path, package)
    (tmp_path / "flags.yaml").write_text("dim: 8\n")
    (tmp_path / "own.json").write_text('{"model": {}}')
    program = {"program": ["-B", *alone["program"]], "env": {"PYTHONPATH": str(tmp_path)}}
    line = ["--text", text, *line.split(), "--save_dir", "lm"]
    _, err = run(*line, cwd=tmp_path, status=2, **program)
    assert package in err and "pip install" in err
    assert err.count("\n") == 1


def test_beside_another_package_named_datasets(alone, tmp_path):
    """As Hugging Face's that is installed."""
    (tmp_path / "datasets.py").write_text("")
    code = f"import sys; sys.path.append({str(alone['cwd'])!r}); import main"
    code += "; print(main.datasets.__file__)"
    out, _ = run(program=["-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert out == f"{alone['cwd'] / 'datasets.py'}\n"
