"""Whole commands with --gpu, whose branch of the program is taken while a CPU computes.

What a GPU rounds, how fast it is, and in which order it adds cannot be seen here.
"""

import json
import re
import signal

import pytest
from conftest import TINY, ids, log_rows, on_gpu, run, run_extra, write_text

SETTINGS = "--learning_rate 0.01 --lr_warmup 5 --steps_per_report 1 --sample_tokens 8".split()
KINDS = {  # the flags, and what strikes the run
    "float32": ("--grad_clip 0", signal.SIGTERM),
    "bfloat16": (
        "--dtype bfloat16 --optimizer muon --qk_norm --num_kv_heads 1 --untie",
        signal.SIGKILL,
    ),
    "memory": (
        "--dropout 0.1 --grad_checkpoint --grad_accumulation 2 --average 0.3",
        signal.SIGKILL,
    ),
    "lora": ("--init_from {hf} --lora_rank 2", signal.SIGTERM),
}
COMMANDS = [
    "--prompt the --max_tokens 8",
    "--prompt the --max_tokens 8 --temperature 0.8 --top_p 0.9 --min_p 0.01"
    " --repetition_penalty 1.2",
    "--prompt the --max_tokens 8 --quantize 4",
    "--prompt the --max_tokens 8 --quantize 16",
    "--prompt the --max_tokens 8 --draft latest",
    "--inference --max_tokens 8",
    "--evaluate valid --eval_stride 3 --quantize 4",
    "extras.batch prompts.txt --max_tokens 8",
    "extras.attention heads.png --prompt the",
    "extras.cases cases.yaml",
]
# Operations that MLX has for Metal and for CUDA, by its source (0.32.4).
ON_GPUS = set(
    """Add AddMM Arange ArgReduce ArgSort AsType BitwiseXor Broadcast Concatenate Contiguous Copy
    Cos CumSum CustomTransforms Depends Divide Equal Exp ExpandDims Flatten Full Gather
    GatherAxis Greater GreaterEqual LeftShift Less LessEqual Load Log LogSumExp LogicalNot
    Matmul Max Maximum Min Minimum Multiply Negative NotEqual Pad Partition Power Quantize
    QuantizedMatmul RandomBits Reshape RightShift Rsqrt Scatter SearchSorted SegmentedMM
    Select Sigmoid Sin Slice SliceUpdate Softmax Sort Split Sqrt Square Squeeze StopGradient
    Subtract Sum Transpose Unflatten""".split()
)
ON_GPUS.add("ScatterAxis Sum")  # a CPU's part of mx.fast.cross_entropy


def not_on_gpus(path):
    """The operations that a command has used and GPUs lack."""
    return set(path.read_text().split("\n")) - ON_GPUS


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with texts, in `lm` a run that the GPU has trained, and its export `hf`."""
    folder = tmp_path_factory.mktemp("gpu")
    write_text(folder)
    (folder / "prompts.txt").write_text("the quick\nfox\nline 12: the lazy dog and more of it\n")
    (folder / "cases.yaml").write_text("- {prompt: the quick, expected: b}\n")
    line = "--text text.txt --dim 64 --mlp swiglu --num_iters 20 --save_dir lm".split()
    on_gpu(*TINY, *SETTINGS, *line, cwd=folder)
    run_extra("export", "hf", "--save_dir=lm", cwd=folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_the_same_whatever_happens(kind, trained, tmp_path):
    """After a signal or a kill it has the bits of a run without one, and a CPU's loss."""
    line = ["--text", trained / "text.txt", "--batch_size=4", *SETTINGS, "--num_iters=16"]
    flags, strike = KINDS[kind]
    line += flags.format(hf=trained / "hf").split()
    if kind != "lora":
        line += TINY
    out, _ = on_gpu(*line, "--save_dir", tmp_path / "whole")
    assert "machine  gpu, Apple M0; MLX" in out and "TF32" not in out
    [expected] = ids(tmp_path / "whole")
    often = [*line, "--steps_per_save=2", "--save_dir", tmp_path / "struck"]
    status = -strike if strike == signal.SIGKILL else 128 + strike
    on_gpu(f"STRIKE={strike.name}:13", *often, status=status)
    out, _ = on_gpu(*often)
    assert "from iteration 0 " not in out
    assert ids(tmp_path / "struck")[0] == expected
    run(*line, "--save_dir", tmp_path / "cpu")
    loss, of_cpu = [log_rows(tmp_path / name, "train")[-1]["loss"] for name in ("whole", "cpu")]
    assert loss == pytest.approx(of_cpu, abs=0.05 if kind == "bfloat16" else 1e-4)
    used = tmp_path / "used"
    on_gpu(f"PRIMITIVES={used}", *line, "--num_iters=2", "--save_dir", tmp_path / "used.d")
    assert not not_on_gpus(used)


def test_a_step_is_computed_again(trained):
    """It is proved to be the run's own (extras/features/steps.py), or this would be refused."""
    on_gpu("--identifier=latest@15", "--evaluate=valid", "--save_dir=lm", cwd=trained)


@pytest.mark.parametrize("typed", COMMANDS)
def test_a_command_does_as_on_a_cpu(typed, trained, tmp_path):
    """Rounding is the same here, so texts and scores are."""
    line = [*typed.split(), "--save_dir=lm"]
    used = tmp_path / "used"
    found, _ = on_gpu(f"PRIMITIVES={used}", *line, input="the quick\n", cwd=trained)
    if typed.startswith("extras."):
        expected, _ = run_extra(line[0].removeprefix("extras."), *line[1:], cwd=trained)
    else:
        expected, _ = run(*line, input="the quick\n", cwd=trained)
    times = r"[\d.,]+ (tokens/s|s|ms)\b"
    assert re.sub(times, "", found) == re.sub(times, "", expected)
    assert not not_on_gpus(used)


@pytest.mark.parametrize("kind", ["metal", "cuda"])
def test_more_than_the_gpus_memory_is_refused(kind, trained, tmp_path):
    line = ["--text", trained / "text.txt", *TINY, "--dim=512", "--num_iters=1"]
    memory = [f"GPU={kind}", f"GPU_BYTES={16 << 20}"]
    _, err = on_gpu(*memory, *line, "--save_dir", tmp_path, status=2)
    assert "GiB of memory; this GPU has" in err


def test_memory_that_may_not_suffice(trained, tmp_path):
    """Up to 1.5 times the memory, it is only said; what needs less does so."""
    shape = "--context_size 64 --num_blocks 8 --batch_size 64 --num_iters 1".split()
    line = ["--text", trained / "text.txt", *TINY, *shape, "--save_dir", tmp_path]
    out, _ = on_gpu("extras.benchmark", *line)
    needed = sum(json.loads(out.splitlines()[-1])["memory"].values())
    out, _ = on_gpu(f"GPU_BYTES={needed / 1.4:.0f}", *line)
    assert "Perhaps too much: " in out and "give --grad_checkpoint" in out
    out, _ = on_gpu(f"GPU_BYTES={needed / 1.4:.0f}", *line, "--grad_checkpoint")
    assert "GiB of memory" not in out
