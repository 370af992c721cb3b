"""datasets/order.py: every sample once an epoch, from anywhere, and the same for ever."""

import itertools

import pytest

from styleloom.datasets.order import Order


@pytest.mark.parametrize("counts", [[1], [7], [3, 1, 5, 2, 9, 4], [1] * 20, [100, 1]])
@pytest.mark.parametrize("window", [1, 2, 3, 16])
def test_each_epoch_has_every_sample_once(counts, window):
    order, total = Order(counts, seed=3, window=window), sum(counts)
    samples = sorted((shard, row) for shard, count in enumerate(counts) for row in range(count))
    for epoch in (0, 1, 12345):
        assert sorted(map(order, range(epoch * total, (epoch + 1) * total))) == samples


def test_a_window_of_shards_is_used_up_before_the_next_begins():
    order = Order([4] * 6, seed=0, window=2)
    shards = [order(position)[0] for position in range(24)]
    for start in (0, 8, 16):
        assert len(set(shards[start : start + 8])) == 2
    assert len(set(shards[:4])) == 2  # mixed, not one after the other


def test_the_order_is_the_published_one():
    """A run resumes years later, with another NumPy. These numbers must never change."""
    order = Order([3, 5, 2, 4], seed=7, window=2)
    assert [order(position) for position in range(14)] == [
        (1, 3), (1, 1), (3, 1), (1, 2), (3, 0), (1, 4), (3, 3),
        (1, 0), (3, 2), (0, 0), (2, 0), (0, 2), (2, 1), (0, 1),
    ]  # fmt: skip
    assert [order(position) for position in (14, 15, 16, 10**12, 10**12 + 1)] == [
        (3, 2), (3, 1), (3, 0), (3, 2), (3, 3),
    ]  # fmt: skip
    assert [Order([1000], seed=2**63 - 1, window=16)(position)[1] for position in range(6)] == [
        431,
        450,
        396,
        510,
        705,
        646,
    ]


def test_seeds_and_epochs_differ():
    orders = [[Order([20, 20], seed, 2)(position) for position in range(120)] for seed in (0, 1)]
    epochs = [order[start : start + 40] for order in orders for start in (0, 40, 80)]
    for a, b in itertools.combinations(epochs, 2):
        assert a != b


def test_shards_of_a_window_and_of_the_one_after_the_last():
    order = Order([4] * 5, seed=0, window=2)
    windows = [order.shards_of(3, window).tolist() for window in range(3)]
    assert sorted(itertools.chain(*windows)) == [0, 1, 2, 3, 4]
    assert [len(window) for window in windows] == [2, 2, 1]
    assert order.shards_of(3, 3).tolist() == order.shards_of(4, 0).tolist()
    assert order.window_of(3 * 20 + 9) == (3, 1, 1)


def test_a_substitute_is_of_the_same_window_and_another_one_each_time():
    order = Order([50] * 6, seed=1, window=2)
    for position in (0, 99, 100, 10**12 + 7):
        epoch, window, _ = order.window_of(position)
        found = [order.substitute(position, attempt) for attempt in range(20)]
        assert {shard for shard, _ in found} == set(order.shards_of(epoch, window).tolist())
        assert len(set(found)) > 12
        assert all(0 <= row < 50 for _, row in found)
    # Published, as the order itself is.
    assert [order.substitute(7, attempt) for attempt in range(3)] == [(3, 4), (3, 34), (3, 30)]
