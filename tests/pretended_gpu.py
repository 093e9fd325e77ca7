"""Runs a command with the branch of the program that is for GPUs; the CPU computes it.

    python tests/pretended_gpu.py --dataset python --gpu      of main.py
    python tests/pretended_gpu.py extras.batch FILE --gpu     of a program in extras/

What a GPU rounds, how fast it is, and what its driver does cannot be seen here. What can is set by
words before the command, or in the environment:

    GPU=cuda              what the GPU says about itself; without it, what Metal's would
    GPU_BYTES=N           its memory
    STRIKE=SIGKILL:12     the signal comes once MLX has computed something 12 times
    PRIMITIVES=FILE       gets the names of the operations that MLX has computed, a line each
"""

import io
import os
import re
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from extras import fast  # noqa: F401 (first: it chooses the BLAS before MLX takes one)

import mlx.core as mx
from mlx.utils import tree_flatten

GPU = mx.Device(mx.gpu, 0)
CPU = mx.Device(mx.cpu, 0)


class Devices:
    """The functions of mlx.core that know the device."""

    def __init__(self):
        mx.set_default_device(mx.cpu)  # which is the only one that computes
        self.default = CPU
        self.stream = mx.default_stream(mx.cpu)
        self.info_of_cpu = mx.device_info(mx.cpu)

    def is_available(self, device):
        return True

    def default_device(self):
        return self.default

    def set_default_device(self, device):
        self.default = GPU if device == mx.gpu else CPU

    def default_stream(self, device):
        return self.stream

    def new_stream(self, device):
        raise AssertionError("a GPU has one stream")

    def device_info(self, device=None):
        if (device or self.default) != GPU:
            return self.info_of_cpu
        size = int(os.environ.get("GPU_BYTES", 16 << 30))
        if os.environ.get("GPU") == "cuda":
            return {"device_name": "NVIDIA 0", "total_memory": size}
        usable = size * 3 // 4
        return {
            "device_name": "Apple M0",
            "memory_size": size,
            "max_recommended_working_set_size": usable,
        }


class Evaluation:
    """mx.eval, which counts its calls and can tell which operations it computes."""

    def __init__(self):
        self.compute = mx.eval
        self.calls = 0
        self.signal, _, calls = os.environ.get("STRIKE", "").partition(":")
        self.last = int(calls or 0)
        self.path = os.environ.get("PRIMITIVES")
        self.primitives = set()
        if self.path:
            mx.disable_compile()  # which would hide them in kernels

    def __call__(self, *trees):
        self.note([array for _, array in tree_flatten(list(trees))])
        self.compute(*trees)
        self.calls += 1
        if self.calls == self.last:
            os.kill(os.getpid(), signal.Signals[self.signal])

    def note(self, arrays):
        """Adds the operations of which these arrays are the result."""
        if self.path and arrays:
            graph = io.StringIO()
            mx.export_to_dot(graph, *arrays)
            self.primitives.update(re.findall(r'label ="(.+)", shape=rectangle', graph.getvalue()))
            Path(self.path).write_text("\n".join(sorted(self.primitives)))


def pretend():
    """Replaces these functions of mlx.core."""
    devices = Devices()
    for name in vars(Devices):
        if not name.startswith("_"):
            setattr(mx, name, getattr(devices, name))
    mx.eval = evaluation = Evaluation()
    item = mx.array.item

    def noted_item(array):
        evaluation.note([array])
        return item(array)

    mx.array.item = noted_item


if __name__ == "__main__":
    words = sys.argv[1:]
    while "=" in words[0] and not words[0].startswith("-"):
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
    pretend()
    module = "main"
    if words[0].startswith("extras."):
        module = words.pop(0)
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
