"""Batches: which windows an epoch has, their order, and going on from a saved state."""

import main
import numpy as np
import pytest
from support.cli import UsageError


def make_batches(length, context_size=8, batch_size=4):
    tokens = np.arange(length, dtype=np.uint16)
    return main.Batches(tokens, context_size, batch_size, 1)


def take(batches):
    """The next batch as NumPy arrays, checked.

    On tokens that count up, each target is its input plus one.
    """
    inputs, targets = map(np.array, batches.next())
    shape = (batches.rows_per_step, batches.context_size)
    assert inputs.shape == targets.shape == shape
    assert inputs.dtype == targets.dtype == np.int32
    starts = inputs[:, :1]
    np.testing.assert_array_equal(inputs, starts + np.arange(batches.context_size))
    np.testing.assert_array_equal(targets, inputs + 1)
    return inputs, targets


def take_starts(batches):
    """The first tokens of the next batch's windows."""
    inputs, _ = take(batches)
    return inputs[:, 0]


@pytest.mark.parametrize("length, context_size, batch_size", [
    (103, 8, 4),
    (1000, 7, 5),
    (50, 1, 3),
    (9, 8, 1),
])  # fmt: skip
def test_an_epoch_has_each_window_at_most_once(length, context_size, batch_size):
    """And each epoch another order."""
    batches = make_batches(length, context_size, batch_size)
    orders = set()
    for epoch in range(5):
        starts = take_starts(batches).tolist()
        possible = range(batches.offset, length - context_size, context_size)
        orders.add(tuple(batches.perm[:8]))
        for _ in range(len(possible) // batch_size - 1):  # a rest is dropped
            starts += take_starts(batches).tolist()
        assert batches.epoch == epoch
        assert len(set(starts)) == len(starts)
        assert set(starts) <= set(possible)
        assert batches.perm.dtype == np.uint32
    assert len(orders) == 5 or len(possible) < 9


@pytest.mark.parametrize("length", [9, 12, 103])
def test_offsets_change_and_leave_no_token_out(length):
    batches = make_batches(length, batch_size=1)
    all_offsets = set()
    all_targets = set()
    for _ in range(60 * len(batches.perm)):
        _, targets = take(batches)
        all_targets.update(targets.ravel().tolist())
        all_offsets.add(batches.offset)
    assert all_targets == set(range(1, length))  # all but the first, which nothing can predict
    assert all_offsets == set(range(min(8, length - 8)))  # all that leave room for a window


def test_fewer_windows_than_the_batch_repeat():
    batches = make_batches(length=8 * 4 + 1, batch_size=11)  # 3 or 4 windows
    for epoch in range(10):
        starts = take_starts(batches)
        assert batches.epoch == epoch
        windows = (32 - batches.offset) // 8
        _, counts = np.unique(starts, return_counts=True)
        assert len(counts) == windows
        assert counts.max() - counts.min() <= 1  # each as often as any other, but for one


@pytest.mark.parametrize("length", [0, 1, 2, 8])
def test_a_text_shorter_than_a_window_is_refused(length):
    with pytest.raises(UsageError) as caught:
        make_batches(length)
    proposed = f"or --context_size {length - 1}"
    assert (proposed in str(caught.value)) == (length > 1), "no window has fewer than two tokens"
    if length > 1:  # what the message proposes works
        take(make_batches(length, context_size=length - 1))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_state_of_few_windows_goes_on_in_fresh_batches(steps):
    """Into the next epochs, as those of many do in test_training.py."""
    batches, fresh = [make_batches(length=8 * 4 + 1, batch_size=11) for _ in range(2)]
    for _ in range(steps):
        batches.next()
    fresh.seek(batches.epoch, batches.cursor, batches.offset, batches.perm)
    for _ in range(20):
        np.testing.assert_array_equal(take_starts(fresh), take_starts(batches))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_another_batch_size_goes_on_in_the_same_epoch(size):
    batches = make_batches(length=8 * 20 + 1)
    for _ in range(2):
        take(batches)
    starts = batches.offset + batches.perm * 8
    batches.rows_per_step = size
    for place in range(8, len(starts) - size + 1, size):
        np.testing.assert_array_equal(take_starts(batches), starts[place : place + size])
    take(batches)
    assert batches.epoch == 1
