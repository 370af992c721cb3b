"""training/metrics/store.py: what was written comes back, and what is spoilt does not."""

import os
from pathlib import Path

import numpy as np
import pytest

from styleloom.training.metrics.store import Store, delete_abandoned, retain


def rows(n, width=3):
    return np.random.default_rng(n).standard_normal((n, width)).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache", "fakes-0", 10, 4)


def test_parts_and_the_whole(store):
    assert store.there() == []
    assert store.whole() is store.part(0) is None
    assert [store.rows(i) for i in range(3)] == [range(4), range(4, 8), range(8, 10)]
    store.save_part(2, rows(2))
    store.save_part(0, rows(4))
    assert store.there() == [0, 2]
    assert np.array_equal(store.part(2), rows(2))
    assert store.part(1) is None
    store.save_whole(rows(10))
    store.delete_parts()
    assert store.there() == []
    assert np.array_equal(store.whole(), rows(10))
    assert [path.name for path in store.path.parent.iterdir()] == ["fakes-0.npy"]


def test_a_file_is_one_that_numpy_reads(store):
    store.save_whole(rows(10))
    assert np.array_equal(np.load(store.path, allow_pickle=False), rows(10))


@pytest.mark.parametrize("where", [0, 20, 60, 150, -20, -1])
def test_a_flipped_bit_is_noticed(store, where):
    store.save_part(1, rows(4))
    path = store.parts / "000001.npy"
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(data)
    assert store.part(1) is None


@pytest.mark.parametrize("length", [0, 5, 16, 100, -1])
def test_a_cut_file_is_noticed(store, length):
    store.save_part(1, rows(4))
    path = store.parts / "000001.npy"
    path.write_bytes(path.read_bytes()[:length])
    assert store.part(1) is None
    path.write_bytes(b"")
    assert store.part(1) is None


def test_a_file_of_another_set_is_not_taken(store):
    store.save_part(0, rows(3))  # as many rows as it should not have
    assert store.part(0) is None


def test_strange_names_are_no_parts(store):
    store.save_part(0, rows(4))
    for name in ("000003.npy", "x.npy", "000001.npy.abc.tmp"):
        (store.parts / name).write_bytes(b"")
    assert store.there() == [0]


def test_a_part_of_what_another_process_has_finished(store, monkeypatch):
    """It has the whole, and has deleted the folder of parts while this one writes into it."""
    mkdir = Path.mkdir

    def and_gone(self, *args, **options):
        mkdir(self, *args, **options)
        store.delete_parts()

    monkeypatch.setattr(Path, "mkdir", and_gone)
    store.save_part(0, rows(4))
    monkeypatch.undo()
    assert store.there() == []


def test_parts_that_nobody_goes_on_with_go(tmp_path):
    old, new = (Store(tmp_path, name, 2, 2) for name in ("fakes-a", "fakes-b"))
    for each in (old, new):
        each.save_part(0, rows(2))
    os.utime(old.parts, (0, 0))
    delete_abandoned(tmp_path)
    assert (old.there(), new.there()) == ([], [0])


def test_only_the_last_used_stay(tmp_path):
    for i, name in enumerate(["fakes-a", "fakes-b", "fakes-c", "reals-a"]):
        its = Store(tmp_path, name, 2, 2)
        its.save_whole(rows(2))
        os.utime(its.path, (i, i))
    Store(tmp_path, "fakes-a", 2, 2).whole()  # is used now
    retain(tmp_path, "fakes-*.npy", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fakes-a.npy", "fakes-c.npy", "reals-a.npy"]
