"""Remote files on this node's disk: whole, verified, shared by all its processes, and no more of them than was allowed.

A file is kept under its sha256, so that equal files of different sets are one, and no change at the origin is mistaken
for it. It appears under its name only when its size and hash were checked. A lock for each file (the kernel's, so that
it ends with its holder) lets one process fetch while the others that want it wait. Files that were not used for the
longest time make room for new ones. Readers get an open file, which stays readable when it is removed.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from . import storage

_SLOTS = 3  # hex digits: files whose hashes begin alike share a lock file, of which there are at most 4096
_PART, _PROMISE = ".part", ".promise"


def default_folder() -> Path:
    """STYLELOOM_CACHE/shards, or else $XDG_CACHE_HOME/styleloom/shards, by default ~/.cache/styleloom/shards."""
    if named := os.environ.get("STYLELOOM_CACHE"):
        return Path(named).expanduser().absolute() / "shards"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base).absolute() / "styleloom" / "shards"


class Cache:
    """At most `limit` bytes of remote files in `folder`.

    wanted: asked before another try to fetch a file. Raises OSError if the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int, wanted: Callable[[], bool] = storage.always) -> None:
        self.folder, self.limit, self.wanted = Path(folder), limit, wanted
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)

    def open(self, url: str, size: int, sha256: str) -> BinaryIO:
        """The file of that size (bytes) and sha256 (hex), fetched from `url` if it is not here.

        Raises storage.UnavailableError or FileNotFoundError if it cannot be had, ValueError if it is larger than the
        cache, OSError if the disk is full.
        """
        path = self.folder / sha256
        return _opened(path, size) or self._fetched(url, path, size, sha256)

    def drop(self, sha256: str) -> None:
        """Forgets a file: what was read from it is not what was put there."""
        (self.folder / sha256).unlink(missing_ok=True)

    def _fetched(self, url: str, path: Path, size: int, sha256: str) -> BinaryIO:
        with self._locked(sha256[:_SLOTS]):
            there = _opened(path, size)  # somebody else fetched it while this process waited
            if there:
                return there
            with self._room(path, size):
                storage.fetch(url, path, size, sha256, self.wanted)
                file = _opened(path, size)
        if file is None:
            raise OSError(f"{path} vanished at once: does something else delete from {self.folder}?")
        return file

    @contextlib.contextmanager
    def _room(self, path: Path, size: int) -> Iterator[None]:
        """Keeps `size` bytes free for `path` until the end of the block, and nobody else removes it before."""
        if size > self.limit:
            raise ValueError(
                f"a file of {size / 1e9:.2f} GB does not fit into the cache {self.folder} of "
                f"{self.limit / 1e9:.2f} GB: raise --data.cache-gb"
            )
        # A promise in a file of its own: the part file grows only as bytes come.
        promise = path.with_name(path.name + _PROMISE)
        while True:
            with self._locked("room"):
                if self._make_room(path, size) >= size:
                    with open(promise, "wb") as file:
                        file.truncate(size)  # a sparse file: it takes no space
                    break
            time.sleep(0.1)  # others are fetching; what they fetch can be removed when it is there
        try:
            yield
        finally:
            promise.unlink(missing_ok=True)

    def _make_room(self, path: Path, size: int) -> int:
        """Removes files, the longest unused first, until `size` bytes are free, if it can. Returns the bytes free.

        The caller holds the lock of `path`: what is in the making under that lock was left by a killed process.
        """
        sizes, used = {}, {}
        for entry in os.scandir(self.folder):
            own = entry.name[:_SLOTS] == path.name[:_SLOTS]
            if entry.name.endswith((_PART, _PROMISE)) and (own or self._is_left_over(entry.name)):
                Path(entry.path).unlink(missing_ok=True)
            elif entry.is_file() and not entry.name.endswith(_PART):  # parts are counted by their promise
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat()
                    sizes[entry.name], used[entry.name] = about.st_size, about.st_mtime_ns
        free = self.limit - sum(sizes.values())
        for name in sorted(sizes, key=lambda name: used[name]):
            if free >= size:
                break
            if not name.endswith(_PROMISE) and name + _PROMISE not in sizes:
                (self.folder / name).unlink(missing_ok=True)
                free += sizes[name]
        return free

    def _is_left_over(self, name: str) -> bool:
        """Whether a file in the making is of a process that was killed: nobody holds its lock."""
        with open(self.folder / "locks" / name[:_SLOTS], "ab") as file:
            free = _lock(file, wait=False)
            if free:
                _unlock(file)
            return free

    @contextlib.contextmanager
    def _locked(self, slot: str) -> Iterator[None]:
        """Holds a lock of this cache, waiting for it. Threads of one process exclude each other too."""
        with open(self.folder / "locks" / slot, "ab") as file:
            _lock(file, wait=True)
            try:
                yield
            finally:
                _unlock(file)


def _opened(path: Path, size: int) -> BinaryIO | None:
    """The cached file, marked as used now; None if it is not there (or was cut: then it is removed)."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (it is what is asked for)
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != size:
        file.close()
        path.unlink(missing_ok=True)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return file


def _lock(file: BinaryIO, wait: bool) -> bool:
    """Locks an open file until it is closed; whether it succeeded. Without effect on Windows."""
    if os.name != "posix":
        return wait
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _unlock(file: BinaryIO) -> None:
    """Frees a lock. Closing the file would not, if a process was forked meanwhile: it holds the same open file."""
    if os.name == "posix":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


class Prefetcher:
    """Fetches files into a cache in the background, before a reader asks for them. It changes nothing but when."""

    THREADS = 16  # one connection to an object store gives some 50 MB/s, and a run waits for its whole first window

    def __init__(self, cache: Cache) -> None:
        self.cache = Cache(cache.folder, cache.limit, wanted=lambda: not self.closed)
        self.closed = False
        self.todo: queue.SimpleQueue[tuple[int, tuple[str, int, str]] | None] = queue.SimpleQueue()
        self.turn = 0
        for _ in range(self.THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def want(self, files: Iterable[tuple[str, int, str]]) -> None:
        """Fetches these (url, size, sha256) in order, and no longer what was wanted before and is not begun yet.

        It stops where they would fill the cache: the last would drive out the first before they were read.
        """
        self.turn += 1
        room = self.cache.limit
        for file in files:
            room -= file[1]
            if room < 0:
                break
            self.todo.put((self.turn, file))

    def close(self) -> None:
        """Begins nothing more, and tries nothing again. What is under way ends by itself, or with the process."""
        self.turn += 1
        self.closed = True
        for _ in range(self.THREADS):
            self.todo.put(None)

    def _work(self) -> None:
        while (item := self.todo.get()) is not None:
            turn, file = item
            if turn == self.turn:
                with contextlib.suppress(OSError, ValueError):  # the reader will meet the same, and tell
                    self.cache.open(*file).close()
