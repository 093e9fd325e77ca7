"""Batches: which windows an epoch has, their order, and going on from a saved state."""

import main
import numpy as np
import pytest
from datasets import UsageError


def make_batches(length=103, context_size=8, batch_size=4, seed=1):
    tokens = np.arange(length).astype(np.uint16)
    return main.Batches(tokens, context_size, batch_size, seed)


def steps_per_epoch(batches):
    """The whole batches of an epoch; windows that are too few for one are repeated."""
    windows = len(batches.perm)
    return max(1, windows // batches.rows_per_step)


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


def take_epoch(batches):
    """The first tokens of the windows of one epoch, and its offset."""
    starts = [take_starts(batches)]
    epoch = batches.epoch
    offset = batches.offset
    for _ in range(steps_per_epoch(batches) - 1):
        starts.append(take_starts(batches))
        assert batches.epoch == epoch
    return np.concatenate(starts), offset


@pytest.mark.parametrize("length, context_size, batch_size", [
    (103, 8, 4),
    (1000, 7, 5),
    (50, 1, 3),
    (9, 8, 1),
])  # fmt: skip
def test_an_epoch_has_each_window_at_most_once(length, context_size, batch_size):
    batches = make_batches(length, context_size, batch_size)
    for _ in range(5):
        starts, offset = take_epoch(batches)
        possible = np.arange(offset, length - context_size, context_size)
        in_whole_batches = len(possible) // batch_size * batch_size  # a rest is dropped
        assert len(set(starts)) == len(starts) == in_whole_batches
        assert set(starts) <= set(possible)
        assert len(possible) - len(starts) < batch_size
    before = batches.epoch
    order = batches.perm.copy()
    take(batches)
    assert batches.epoch == before + 1
    assert len(order) < 9 or not np.array_equal(batches.perm[: len(order)], order)


@pytest.mark.parametrize("length", [9, 12, 103])
def test_offsets_change_and_leave_no_token_out(length):
    batches = make_batches(length, batch_size=1)
    all_offsets = set()
    all_targets = set()
    for _ in range(60 * steps_per_epoch(batches)):
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
        assert steps_per_epoch(batches) == 1
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
@pytest.mark.parametrize("length, batch_size", [(103, 4), (33, 11)])
def test_a_state_goes_on_in_fresh_batches(steps, length, batch_size):
    """Into the next epochs; another seed has other batches."""
    batches = make_batches(length, batch_size=batch_size)
    for _ in range(steps):
        batches.next()
    fresh = make_batches(length, batch_size=batch_size)
    fresh.seek(batches.epoch, batches.cursor, batches.offset, batches.perm)
    other = make_batches(length, batch_size=batch_size, seed=2)
    for _ in range(20):
        starts = take_starts(batches)
        np.testing.assert_array_equal(take_starts(fresh), starts)
        assert not np.array_equal(take_starts(other), starts)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_another_batch_size_goes_on_in_the_same_epoch(size):
    batches = make_batches(length=8 * 20 + 1)
    seen = [take_starts(batches), take_starts(batches)]
    perm = batches.perm.copy()
    offset = batches.offset
    batches.rows_per_step = size
    for i in range((len(perm) - 8) // size):
        place = 8 + i * size
        windows = perm[place : place + size]
        starts = take_starts(batches)
        np.testing.assert_array_equal(starts, offset + windows * 8)
        seen.append(starts)
    assert batches.epoch == 0
    all_starts = np.concatenate(seen)
    assert len(set(all_starts)) == len(all_starts)
    take(batches)
    assert batches.epoch == 1
