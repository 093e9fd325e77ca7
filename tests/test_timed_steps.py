"""tests/benchmark.py: what it measures is training."""

import math

import numpy as np
import pytest

import benchmark


def test_the_steps_that_are_timed_learn():
    shape = (65, 32, 2, 1, 16, 4)  # vocabulary, dim, heads, blocks, context, batch
    random = np.random.default_rng(0)
    weights = benchmark.draw_weights(shape, random)
    step = benchmark.mlx_step("main", shape, False, "float32", weights)
    batch = random.integers(0, 65, (4, 17))
    losses = [step(batch) for _ in range(20)]
    assert losses[0] == pytest.approx(math.log(65), abs=0.1)
    assert losses[-1] < losses[0]
