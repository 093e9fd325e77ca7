"""What computes: the device, the processes that share a run, and what to record of them.

main.py imports this file after fast.py, which chooses a BLAS before MLX is loaded.
"""

import os
import sys

import mlx.core as mx
import numpy as np

from support import code
from support.cli import UsageError
from support.machine import count_cores, make_kernel_dir, use_compiler


# mlx-cpu and mlx-cuda-13 have a library of the same name: the one installed last is used.
CUDA = "pip uninstall -y mlx-cpu; pip install --force-reinstall 'mlx[cuda13]'"


class SingleProcess:
    """The processes (ranks) that train a run together: here, only one.

    Group in extras/features/ranks.py does the same for those that `mlx.launch` or MPI started, and
    has `follow` for other ranks than 0. Only rank 0 saves and reports.
    """

    rank = 0
    size = 1

    def broadcast_run(self, run):
        """Sends rank 0's run to the other ranks."""

    def all_mean(self, tree):
        """The mean of a tree of arrays over all ranks."""
        return tree

    def all_sum(self, number):
        """The sum of a number over all ranks."""
        return number

    def agree(self, stop_signal, is_time_up=False):
        """A signal that any rank has received, and whether the time is up on any."""
        return stop_signal, is_time_up


ALONE = SingleProcess()


def refuse_launchers():
    """Raises UsageError if a launcher that MLX does not know has started several processes."""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):  # torchrun's and accelerate's; srun's
        size = os.environ.get(name) or "1"
        if size != "1":
            raise UsageError(
                f"a launcher other than MLX's has started {size} processes ({name}): use "
                f"mlx.launch -n {size} -- python {code.main_file}, or unset {name}"
            )


def on_gpu():
    """Whether MLX computes on a GPU."""
    return mx.default_device() == mx.gpu


def use_device(gpu, fast):
    """Makes the GPU or the CPU the default device; call it before anything is computed.

    It also sets TMPDIR, where MLX keeps kernels, and on a CPU puts a script `g++` first in PATH.
    fast: extras/features/fast.py, or None. Raises UsageError if there is no GPU.
    """
    if gpu and not mx.is_available(mx.gpu):
        remedy = f"{CUDA} (NVIDIA GPUs)"
        if sys.platform == "darwin":
            remedy = "in a Python for arm64, on Apple silicon with macOS 14 or newer"
        raise UsageError(f"--gpu: MLX sees no GPU; omit --gpu, or install MLX for it: {remedy}")
    mx.set_default_device(mx.gpu if gpu else mx.cpu)
    # MLX loads its compiled kernels from the folder for temporary files, where another user could
    # have put a file of that name.
    os.environ["TMPDIR"] = str(make_kernel_dir())
    if gpu and fast:
        fast.use_gpu()
    elif fast:
        fast.use_cpu()
    if not gpu and (not fast or sys.platform != "linux"):  # on Linux, fast.use_cpu does it
        # On ARM, compilers fuse products with sums, but only in some loops of a kernel. Timing
        # decides which loop computes an element, so its last bit would vary.
        compile_command = 'PATH=${PATH#*:}; g++ -ffp-contract=off "$@"'
        use_compiler(make_kernel_dir(), compile_command)


def list_versions(flags, ranks, fast):
    """The environment of a run: while it and the code stay the same, resume is bit-exact.

    fast: extras/features/fast.py, or None. The C++ compiler is left out, as MLX and fast.py keep
    what it has compiled.
    """
    is_gpu = on_gpu()
    device = f"{mx.default_device().type.name}, {mx.device_info().get('device_name', '?')}"
    blas = fast.describe_blas() if fast else "MLX's own BLAS"
    dtype = "float32"
    if is_gpu or (fast and fast.has_bfloat16()):
        dtype = flags.dtype
    streams = 1
    if not is_gpu:
        device += f", {count_cores()} cores"
    if fast:
        streams = fast.count_streams(flags.batch_size // ranks.size, flags.context_size)
    return {
        "MLX": mx.__version__,
        "NumPy": np.__version__,
        "BLAS": blas,
        "kernels": "fast.py" if fast else "main.py",
        "dtype": dtype,
        "device": device,
        "streams": streams,
        "ranks": ranks.size,
    }
