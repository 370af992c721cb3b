"""datasets/workers.py in the test's own process; what happens to killed processes is in test_prepare.py."""

import io

import pytest
from tqdm import tqdm

from styleloom.datasets.workers import Stopped, default_workers, progress_bar, run


def test_one_worker_runs_here_in_order_and_moves_the_bar():
    seen, results = [], []

    def work(task, tick):
        tick()
        tick()
        seen.append(bar.n)
        return 10 * task

    with tqdm(total=10, initial=4, file=io.StringIO()) as bar:
        run(work, [1, 2, 3], 1, bar, results.append)
    assert results == [10, 20, 30]
    assert seen == [6, 8, 10]


def test_errors_come_through():
    def work(task, tick):
        raise Stopped

    with progress_bar(1, 0, "working", show=False) as bar, pytest.raises(Stopped):
        run(work, [1], 1, bar)


def test_default_workers():
    assert default_workers() >= 1
