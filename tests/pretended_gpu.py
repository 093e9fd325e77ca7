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

from extras.features import fast  # noqa: F401 (first: it chooses the BLAS before MLX takes one)

import mlx.core as mx
from mlx.utils import tree_flatten


class Device:
    """Functions of mlx.core as they are where there is a GPU."""

    def __init__(self):
        mx.set_default_device(mx.cpu)  # which is what computes
        self.stream = mx.default_stream(mx.cpu)

    def is_available(self, device):
        return True

    def default_device(self):
        return mx.Device(mx.gpu)

    def set_default_device(self, device):
        assert device == mx.gpu

    def default_stream(self, device):
        return self.stream

    def new_stream(self, device):
        raise AssertionError("a GPU has one stream")

    def device_info(self):
        size = int(os.environ.get("GPU_BYTES", 16 << 30))
        if os.environ.get("GPU") == "cuda":
            return {"device_name": "NVIDIA 0", "total_memory": size}
        return {"device_name": "Apple M0", "max_recommended_working_set_size": size}


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
    device = Device()
    for name in vars(Device):
        if not name.startswith("_"):
            setattr(mx, name, getattr(device, name))
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
