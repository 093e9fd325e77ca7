"""Batches: which windows an epoch has, their order, and going on from a saved state."""

import json

import main
import numpy as np
import pytest
from datasets import UsageError


def make_batches(length=103, context_size=8, batch_size=4, seed=1):
    return main.Batches(np.arange(length).astype(np.uint16), context_size, batch_size, seed)


def take(batches):
    """The next batch as NumPy arrays, checked: on tokens that count up, each target is its input plus one."""
    inputs, targets = (np.array(array) for array in batches.next())
    assert inputs.shape == targets.shape == (batches.batch_size, batches.context_size)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(batches.context_size))
    np.testing.assert_array_equal(targets, inputs + 1)
    return inputs, targets


def take_epoch(batches):
    """The first tokens of the windows of one epoch, and its offset."""
    starts = [take(batches)[0][:, 0]]
    epoch, offset = batches.epoch, batches.offset
    for _ in range(max(1, len(batches.perm) // batches.batch_size) - 1):
        starts.append(take(batches)[0][:, 0])
        assert batches.epoch == epoch
    return np.concatenate(starts), offset


@pytest.mark.parametrize("length, context_size, batch_size", [
    (103, 8, 1), (103, 8, 4), (1000, 7, 5), (50, 1, 3), (9, 8, 1),
])  # fmt: skip
def test_an_epoch_has_each_window_at_most_once(length, context_size, batch_size):
    batches = make_batches(length, context_size, batch_size)
    for _ in range(5):
        starts, offset = take_epoch(batches)
        possible = np.arange(offset, length - context_size, context_size)
        assert len(set(starts)) == len(starts) == len(possible) // batch_size * batch_size  # a rest is dropped
        assert set(starts) <= set(possible)
        assert len(possible) - len(starts) < batch_size
    before = batches.epoch
    take(batches)
    assert batches.epoch == before + 1


def test_an_epoch_of_whole_batches_has_every_window():
    batches = make_batches(batch_size=1)
    starts, offset = take_epoch(batches)
    assert sorted(starts) == list(range(offset, 103 - 8, 8))
    assert list(starts) != sorted(starts)


def test_steps_per_epoch_counts_whole_batches():
    batches = make_batches(length=8 * 11 + 8 + 1)  # 11 or 12 windows, by the offset
    assert max(1, len(batches.perm) // batches.batch_size) == len(batches.perm) // 4
    for _ in range(max(1, len(batches.perm) // batches.batch_size)):
        take(batches)
    assert batches.epoch == 0
    take(batches)
    assert batches.epoch == 1 and batches.place == 4


@pytest.mark.parametrize("length", [9, 10, 12, 16, 17, 100, 103])
def test_offsets_change_and_leave_no_token_out(length):
    batches = make_batches(length, batch_size=1)
    offsets, targets = set(), set()
    for _ in range(60 * max(1, len(batches.perm) // batches.batch_size)):
        targets.update(take(batches)[1].ravel().tolist())
        offsets.add(batches.offset)
    assert targets == set(range(1, length))  # all but the first, which nothing can predict
    assert offsets == set(range(min(8, length - 8)))  # all that leave room for a window


def test_orders_change_between_epochs():
    batches = make_batches(length=1601, batch_size=1)
    orders = set()
    for _ in range(5):
        take_epoch(batches)
        orders.add(tuple(batches.perm[:100]))
    assert len(orders) == 5


def test_a_rest_is_dropped_and_other_windows_get_their_turn():
    batches = make_batches(length=8 * 7 + 1, batch_size=4)  # 6 or 7 windows
    assert max(1, len(batches.perm) // batches.batch_size) == 1
    seen = []
    for epoch in range(8):
        inputs, _ = take(batches)
        assert batches.epoch == epoch and len(set(inputs[:, 0])) == 4
        seen.append(tuple(inputs[:, 0]))
    assert len(set(seen)) > 1


def test_fewer_windows_than_the_batch_repeat():
    batches = make_batches(length=8 * 4 + 1, batch_size=11)  # 3 or 4 windows
    for epoch in range(10):
        inputs, _ = take(batches)
        assert batches.epoch == epoch and max(1, len(batches.perm) // batches.batch_size) == 1
        windows = (32 - batches.offset) // 8
        counts = np.unique(inputs[:, 0], return_counts=True)[1]
        assert len(counts) == windows and counts.max() - counts.min() <= 1  # each as often as any other, but for one


def test_shortest_text():
    batches = make_batches(length=9, batch_size=2)
    for _ in range(5):
        inputs, targets = take(batches)
        np.testing.assert_array_equal(inputs, [range(8)] * 2)
        np.testing.assert_array_equal(targets, [range(1, 9)] * 2)


@pytest.mark.parametrize("length", [0, 1, 2, 8])
def test_a_text_shorter_than_a_window_is_refused(length):
    with pytest.raises(UsageError) as caught:
        make_batches(length)
    assert f"--context_size {max(1, length - 1)}" in str(caught.value)
    if length > 1:  # what the message proposes works
        take(make_batches(length, context_size=length - 1))


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 10])
@pytest.mark.parametrize("length, batch_size", [(103, 4), (103, 1), (33, 11)])
def test_a_state_goes_on_in_fresh_batches(steps, length, batch_size):
    batches = make_batches(length, batch_size=batch_size)
    for _ in range(steps):
        batches.next()
    fresh = make_batches(length, batch_size=batch_size)
    fresh.restore(json.loads(json.dumps(batches.state())), batches.perm.copy())  # as a checkpoint does
    for _ in range(20):  # into the next epochs
        np.testing.assert_array_equal(take(batches)[0], take(fresh)[0])


def test_the_seed_decides():
    first, same, other = make_batches(), make_batches(), make_batches(seed=2)
    pairs = [(take(first)[0], take(same)[0], take(other)[0]) for _ in range(20)]
    assert all((a == b).all() for a, b, _ in pairs)
    assert sum((a == c).all() for a, _, c in pairs) == 0


@pytest.mark.parametrize("size", [1, 3, 8])
def test_another_batch_size_goes_on_in_the_same_epoch(size):
    batches = make_batches(length=8 * 20 + 1)
    seen = [take(batches)[0][:, 0] for _ in range(2)]
    perm, offset = batches.perm.copy(), batches.offset
    batches.batch_size = size
    for i in range((len(perm) - 8) // size):
        start = 8 + i * size
        seen.append(take(batches)[0][:, 0])
        np.testing.assert_array_equal(seen[-1], offset + perm[start : start + size] * 8)
    assert batches.epoch == 0 and len(set(np.concatenate(seen))) == sum(map(len, seen))
    take(batches)
    assert batches.epoch == 1


def test_a_batch_larger_than_what_is_left_begins_an_epoch():
    batches = make_batches()
    take(batches)
    batches.batch_size = 100  # more than the text has windows
    take(batches)
    assert batches.epoch == 1
    batches.batch_size = 2
    take(batches)
    assert batches.epoch == 2 and batches.place == 2
