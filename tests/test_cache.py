"""datasets/cache.py: whole files only, once a node, bounded, whoever is killed."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import threading
import time

import numpy as np
import psutil
import pytest

from styleloom.datasets import storage
from styleloom.datasets.cache import Cache, Prefetcher
from styleloom.datasets.storage import join

SIZE = 100_000


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(storage, "LONGEST_DELAY", 0.01)


@pytest.fixture
def folder(tmp_path):
    """Ten files of 100 kB, called 0 to 9."""
    (tmp_path / "served").mkdir()
    for i in range(10):
        (tmp_path / "served" / f"{i}").write_bytes(content(i))
    return tmp_path / "served"


def content(i: int) -> bytes:
    return np.random.default_rng(i).bytes(SIZE)


def sha(i: int) -> str:
    return hashlib.sha256(content(i)).hexdigest()


def read(cache: Cache, url: str, i: int) -> bytes:
    with cache.open(join(url, f"{i}"), SIZE, sha(i)) as file:
        return file.read()


def names(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.is_file()}


def test_a_file_is_fetched_once(serve, folder, tmp_path):
    cache = Cache(tmp_path / "cache", 10 * SIZE)
    with serve(folder, lambda path: ["wrong", "drop"]) as server:
        for _ in range(3):
            assert read(cache, server.url, 1) == content(1)
        assert server.count("1") == 3  # two faults and once well
    assert read(Cache(tmp_path / "cache", 10 * SIZE), "http://127.0.0.1:1/gone", 1) == content(1)
    assert names(cache) == {sha(1)}


def test_the_longest_unused_go_and_the_bound_holds(serve, folder, tmp_path):
    cache = Cache(tmp_path / "cache", 3 * SIZE + 10)
    with serve(folder) as server:
        for i in (0, 1, 2, 0, 3):  # 1 is the longest unused
            assert read(cache, server.url, i) == content(i)
            time.sleep(0.01)
            assert sum(path.stat().st_size for path in cache.folder.iterdir() if path.is_file()) <= cache.limit
        assert names(cache) == {sha(0), sha(2), sha(3)}
        assert read(cache, server.url, 1) == content(1)
        assert server.count("1") == 2


def test_an_open_file_stays_readable_when_it_is_removed(serve, folder, tmp_path):
    cache = Cache(tmp_path / "cache", SIZE)
    with serve(folder) as server, cache.open(join(server.url, "0"), SIZE, sha(0)) as file:
        assert read(cache, server.url, 1) == content(1)
        assert names(cache) == {sha(1)}
        assert file.read() == content(0)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not fit into the cache .* raise --data.cache-gb"):
        Cache(tmp_path / "cache", SIZE - 1).open("http://127.0.0.1:1/x", SIZE, sha(0))


def test_a_file_that_was_cut_on_the_disk_is_fetched_again(serve, folder, tmp_path):
    cache = Cache(tmp_path / "cache", 10 * SIZE)
    with serve(folder) as server:
        read(cache, server.url, 0)
        os.truncate(cache.folder / sha(0), 10)
        assert read(cache, server.url, 0) == content(0)
        cache.drop(sha(0))
        assert read(cache, server.url, 0) == content(0)
        assert server.count("0") == 3


def _reader(url: str, folder: str, limit: int, seed: int, count: int) -> None:
    """In a process of its own: reads files in its own order, and dies of whatever is not whole."""
    storage.FIRST_DELAY, storage.LONGEST_DELAY = 0.001, 0.01
    cache = Cache(folder, limit)
    for i in np.random.default_rng(seed).integers(0, 10, count):
        assert read(cache, url, int(i)) == content(int(i))


def test_many_processes_and_threads_share_it_and_a_faulty_server(serve, folder, tmp_path):
    """Only whole files are ever read, and never more than the bound lies there."""
    limit, most = 4 * SIZE, 0
    faults = ["503", "wrong", "short", "drop", "flip", "cut"]
    (tmp_path / "cache").mkdir()
    with serve(folder, lambda path: faults[int(path) % 6 :] + faults[: int(path) % 3]) as server:
        context = multiprocessing.get_context("fork")
        readers = [
            context.Process(target=_reader, args=(server.url, str(tmp_path / "cache"), limit, seed, 60))
            for seed in range(4)
        ]
        threads = [
            threading.Thread(target=_reader, args=(server.url, str(tmp_path / "cache"), limit, seed, 30))
            for seed in (7, 8)
        ]
        for each in (*readers, *threads):
            each.start()
        while any(reader.is_alive() for reader in readers):
            sizes = []
            for path in (tmp_path / "cache").iterdir():
                try:
                    sizes += [path.stat().st_size] if path.is_file() and not path.name.endswith(".promise") else []
                except FileNotFoundError:
                    continue
            most = max(most, sum(sizes))
            time.sleep(0.001)
        for each in (*readers, *threads):
            each.join()
        assert [reader.exitcode for reader in readers] == [0] * 4
    # Between two looks a file may be counted both as it goes and as it comes.
    assert 0 < most <= limit + SIZE
    assert not [name for name in names(Cache(tmp_path / "cache", limit)) if "." in name]


def test_processes_that_want_one_file_fetch_it_once(serve, folder, tmp_path):
    with serve(folder) as server:
        context = multiprocessing.get_context("fork")
        readers = [
            context.Process(target=_wanting_one, args=(server.url, str(tmp_path / "cache"))) for _ in range(6)
        ]  # fmt: skip
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert [reader.exitcode for reader in readers] == [0] * 6
        assert server.count("5") == 1


def _wanting_one(url: str, folder: str) -> None:
    assert read(Cache(folder, 10 * SIZE), url, 5) == content(5)


PROGRAM = """
import sys
from styleloom.datasets.cache import Cache
Cache(sys.argv[1], 10**6).open("pipe:cat " + sys.argv[2] + "; exec sleep 60", 10**5, sys.argv[3])
"""


def test_what_a_killed_process_left_is_cleared_away(folder, tmp_path, python, serve):
    cache = Cache(tmp_path / "cache", SIZE)
    process: subprocess.Popen = python("-c", PROGRAM, cache.folder, folder / "0", sha(0))
    give_up = time.monotonic() + 60
    while not any(name.endswith(".part") for name in names(cache)) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert len(names(cache)) == 2  # the part and its promise
    command = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    for each in command:
        each.kill()
    process.communicate()
    with serve(folder) as server:
        assert read(cache, server.url, 1) == content(1)
    assert names(cache) == {sha(1)}


def test_a_promise_that_was_left_over_does_not_stand_in_its_own_way(serve, folder, tmp_path):
    cache = Cache(tmp_path / "cache", SIZE)
    for ending in (".promise", ".part"):
        with open(cache.folder / f"{sha(0)}{ending}", "wb") as file:
            file.truncate(SIZE)
    with serve(folder) as server:
        assert read(cache, server.url, 0) == content(0)
    assert names(cache) == {sha(0)}


def test_it_can_be_handed_to_other_processes(tmp_path):
    assert pickle.loads(pickle.dumps(Cache(tmp_path, 7))).limit == 7


def test_the_prefetcher(serve, folder, tmp_path):
    cache = Cache(tmp_path / "cache", 10 * SIZE)
    with serve(folder) as server:
        prefetcher = Prefetcher(cache)
        prefetcher.want((join(server.url, f"{i}"), SIZE, sha(i)) for i in range(5))
        prefetcher.want([(join(server.url, "nowhere"), SIZE, "0" * 64)])  # nothing is said of what fails
        prefetcher.want((join(server.url, f"{i}"), SIZE, sha(i)) for i in (7, 8, 9))
        give_up = time.monotonic() + 20
        while not {sha(i) for i in (7, 8, 9)} <= names(cache) and time.monotonic() < give_up:
            time.sleep(0.01)
        prefetcher.close()
        before = len(server.requests)
        for i in (7, 8, 9):
            assert read(cache, server.url, i) == content(i)
        assert len(server.requests) == before
