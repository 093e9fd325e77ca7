"""Signals, closed pipes and terminals.

The work is always saved, and a second Ctrl+C always leaves.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import DATASETS, ROOT, ids, interrupt, run, start, wait_for, write_script
from test_prompts import Terminal

import main

# Takes minutes a step.
SLOW = "--dim 1024 --num_heads 8 --num_blocks 4 --context_size 256 --batch_size 64".split()


def test_signals_of_others_stop_nothing(line):
    """Of a terminal whose size changes, for which a package has set a handler."""
    handle = "import signal; signal.signal(signal.SIGWINCH, lambda *_: None)"
    code = f"{handle}; import main, sys; sys.exit(main.main(sys.argv[1:]))"
    process = start(*line, program=["-c", code], cwd=ROOT)
    wait_for(process, "20/100,000 ")
    process.send_signal(signal.SIGWINCH)
    wait_for(process, "40/100,000 ")
    _, err = interrupt(process)
    assert err.count("Stopping after this step") == 1


# Of a terminal, of Slurm and Grid Engine, and of a limit of CPU time.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2, signal.SIGXCPU])
def test_first_signal_saves(line, tmp_path, number):
    process = start(*line)
    wait_for(process, "20/100,000 ")
    out, err = interrupt(process, number)
    assert "Stopped at iteration" in out
    assert len(ids(tmp_path)) == 1
    again = "again " if number == signal.SIGINT else ""
    assert f"Press Ctrl+C {again}to exit without saving." in err
    assert "Traceback" not in err


def test_second_signal_leaves_inside_a_long_step(line, tmp_path):
    process = start(*line, *SLOW, "--steps_per_report", 1)
    wait_for(process, "files ")
    time.sleep(1)  # into the first step
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)  # within half a second it would be the same request
    assert process.poll() is None, "the first signal must wait for the step"
    out, err = interrupt(process)
    assert "Exited without saving" in err
    assert "  loss " not in out, "it waited for the step after all"
    assert not ids(tmp_path)


def test_timeout_that_sends_its_signal_twice_loses_nothing(line, tmp_path):
    """GNU's `timeout` sends SIGTERM to the process and then to its whole group."""
    line += ["--dim", 256, "--batch_size", 64, "--context_size", 64]  # steps that take a while
    process = start(*line, "--steps_per_report", 1)
    wait_for(process, "1/100,000 ")
    process.send_signal(signal.SIGTERM)
    while "Stopping after this step" not in process.stderr.readline():
        pass  # the system could deliver both as one
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (143, -signal.SIGTERM), err  # the second may come after all
    assert len(ids(tmp_path)) == 1


def test_signal_that_the_parent_ignores_stays_ignored(line):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = start(*line, "--num_iters", 120, preexec_fn=ignore)
    wait_for(process, "20/120 ")
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "at iteration 120" in out


def test_closed_pipe_costs_nothing(line, tmp_path):
    line += ["--num_iters", 70]
    process = start(*line, "--steps_per_report", 1)
    wait_for(process, "10/70 ")
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    run(*line, "--save_dir", tmp_path / "undisturbed")
    assert ids(tmp_path) == ids(tmp_path / "undisturbed")


@pytest.mark.parametrize("said, advice", [
    ("[metal::malloc] Attempting to allocate 9 bytes which is greater", "smaller --batch_size"),
    ("[METAL] Command buffer execution failed: Insufficient Memory", "smaller --batch_size"),
    ("CUDA error: out of memory", "smaller --batch_size"),
    ("[metal::malloc] Resource limit (499000) exceeded.", "more arrays at once"),
    ("[METAL] Command buffer execution failed: Impacting Interactivity.", "rerun the command to"),
    ("cudaGraphLaunch(graph, stream) failed: unspecified launch failure", "rerun the command to"),
    ("can't start new thread", "ulimit -u"),
    ("[Compile::eval_cpu] Failed. The output is: xcrun: error: invalid active developer path",
     "xcode-select --install"),
    ("[matmul] shapes do not match", None),
])  # fmt: skip
def test_errors_of_mlx(said, advice, line, monkeypatch, capsys):
    """What the user can cure is one line; a bug of this program has to show its traceback."""

    def fail(*arrays):
        raise RuntimeError(said)

    monkeypatch.setattr(mx, "eval", fail)
    line = [*map(str, line)]
    if advice:
        assert main.main(line) == 1
        err = capsys.readouterr().err
        assert advice in err and err.count("\n") == 1
    else:
        with pytest.raises(RuntimeError):
            main.main(line)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_numpy_starts_no_threads():
    """Where none may start, OpenBLAS ends the process by SIGINT, after four lines of its own."""
    code = f"""
import os, sys
os.environ.pop("OPENBLAS_NUM_THREADS", None)
sys.argv[0] = {DATASETS!r}
import datasets
print(len(os.listdir("/proc/self/task")))
"""
    assert run(program=["-c", code], cwd=ROOT)[0] == "1\n"


def test_libraries_that_were_cut_off_are_deleted(tmp_path):
    """MLX compiles again what is not there; it would crash in half a library."""
    whole = Path(mx.__file__).read_bytes()
    env = {"XDG_CACHE_HOME": str(tmp_path), "DISABLE_FAST": "1"}
    run("--list", "--save_dir", tmp_path, env=env)
    [folder] = tmp_path.glob("transformer-lm/code-*")
    compiled = folder / "mlx" / "0" / "cpu"
    compiled.mkdir(parents=True)
    (compiled / "libwhole.so").write_bytes(whole)
    cut_off = {"half": whole[: len(whole) // 2], "none": b"", "zeros": bytes(99)}
    for name, content in cut_off.items():
        (compiled / f"lib{name}.so").write_bytes(content)
    run("--list", "--save_dir", tmp_path, env=env)
    assert os.listdir(compiled) == ["libwhole.so"]


def test_closed_terminal_saves(line, tmp_path):
    """A terminal that goes away sends SIGHUP and makes every later write fail."""
    with Terminal(*line) as terminal:
        terminal.wait_for("loss")  # the bar's first report
        terminal.ptyproc.fileobj.close()
        assert terminal.wait() == 129
    assert len(ids(tmp_path)) == 1


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="nothing is compiled")


def with_compiler(folder, lines):
    """The environment of a process that has compiled nothing before; its g++ is these lines."""
    compiler = folder / "bin" / "g++"
    write_script(compiler, lines)
    return {"PATH": f"{compiler.parent}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder)}


def compiler_that_tells(folder):
    """The same with a g++ that makes the file `header` or `kernel` before it compiles one."""
    header = f"*c++-header*) touch {folder / 'header'} ;;"
    kernel = f"*mlx/*/tmp_*) touch {folder / 'kernel'} ;;"
    lines = f'case "$*" in {header} {kernel} esac\nexec {shutil.which("g++")} "$@"'
    return with_compiler(folder, lines)


def strike(process, number, path):
    """Sends a process and its compiler a signal once there is a file; returns what was printed."""
    while not path.exists():
        assert process.poll() is None, "nothing was left to compile"
        time.sleep(0.01)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return out


@needs_compiler
def test_signal_to_the_group_during_the_first_compile(line, tmp_path):
    """Ctrl+C in a terminal reaches the compiler too, which goes on: the step is taken and saved.

    Whatever a kill leaves behind, the next start must work.
    """
    env = compiler_that_tells(tmp_path)
    line += ["--num_iters", 3, "--num_blocks", 1, "--sample_tokens", 0]
    line += ["--steps_per_eval", 0, "--grad_clip", 0, "--optimizer", "adamw"]  # fewer kernels
    first = tmp_path / ("header" if sys.platform == "linux" else "kernel")
    for number, status, path in (
        (signal.SIGKILL, -signal.SIGKILL, first),
        (signal.SIGINT, 130, tmp_path / "kernel"),
    ):
        path.unlink(missing_ok=True)
        process = start(*line, env=env, start_new_session=True)
        out = strike(process, number, path)
        assert process.returncode == status
    assert "\nStopped at iteration 1. " in out
    run(*line, env=env)
    assert not list((tmp_path / "transformer-lm").rglob("*.new"))
    assert len(ids(tmp_path)) == 2
    run(*line, "--save_dir", tmp_path / "whole")
    assert ids(tmp_path)[0] == ids(tmp_path / "whole")[0]


A_KERNEL = """
import signal
signal.signal(signal.SIGINT, lambda *_: None)
import main, mlx.core as mx
main.use_device(gpu=False)
double = mx.compile(lambda x: mx.exp(x) * 2 + x)
print(double(mx.zeros(3)).tolist())
"""


@needs_compiler
def test_the_compiler_without_extras_ignores_signals_too(tmp_path):
    env = compiler_that_tells(tmp_path) | {"DISABLE_FAST": "1"}
    process = start(program=["-c", A_KERNEL], cwd=ROOT, env=env, start_new_session=True)
    assert strike(process, signal.SIGINT, tmp_path / "kernel") == "[2.0, 2.0, 2.0]\n"


@needs_compiler
def test_include_paths_of_the_environment_do_not_count(tmp_path):
    """As a system of modules exports them: with some, no header of C++ is found."""
    real = shutil.which("g++")
    env = with_compiler(tmp_path, f'[ -z "$CPATH$CPLUS_INCLUDE_PATH" ] && exec {real} "$@"')
    env |= {"CPLUS_INCLUDE_PATH": "/usr/include", "CPATH": "/x", "DISABLE_FAST": "1"}
    out, _ = run(program=["-c", A_KERNEL], cwd=ROOT, env=env)
    assert out == "[2.0, 2.0, 2.0]\n"


def test_a_compiler_that_fails(line, tmp_path):
    # MLX asks for the version first, and does without a compiler if it gets no answer.
    script = 'case "$*" in *--version) exit;; esac\necho No space left >&2\nexit 1'
    env = with_compiler(tmp_path, script)
    _, err = run(*line, "--num_iters", 1, env=env, status=1)
    assert err.startswith("main.py: MLX cannot compile, or what it has compiled is damaged: rerun")
    assert "No space left" in err
    assert err.count("\n") == 1


def test_ctrl_c_before_training_is_silent(tmp_path):
    process = start("--dataset", "python", "--save_dir", tmp_path / "lm")
    while not (tmp_path / "lm").exists():  # imports and parsing are over, the corpus is being read
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in err


IN_A_NOTEBOOK = """
import glob, os, signal, sys, threading, time
import main

def what_there_is():
    handlers = [signal.getsignal(number) for number in signal.Signals]
    return handlers, threading.active_count(), len(os.listdir("/dev/fd"))

def count_saved():
    folder = sys.argv[sys.argv.index("--save_dir") + 1]
    return len(glob.glob(f"{folder}/*/*.safetensors"))

def press_ctrl_c(before):
    while count_saved() == before:  # until it has taken some steps
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

def train():
    thread = threading.Thread(target=press_ctrl_c, args=[count_saved()])
    thread.start()
    status = main.main(sys.argv[1:])
    thread.join()
    print("STATUS", status)

train()  # MLX and tqdm keep what they have begun
time.sleep(1)
before = what_there_is()
train()
time.sleep(1)
print("equal" if what_there_is() == before else "something stays")
"""


def test_nothing_of_it_stays(line, tmp_path):
    """In a notebook, where main() is one call of many."""
    program = ["-c", IN_A_NOTEBOOK]
    steps = "--num_iters 100000 --steps_per_save 20 --keep 1000 --sample_tokens 0".split()
    process = start(*line, *steps, program=program, cwd=ROOT)
    out, err = process.communicate(timeout=100)
    assert out.count("STATUS 130\n") == 2, err
    assert out.endswith("equal\n")
