"""The bytes of single samples, by shard and row, from shards on this disk or copies of remote ones in the cache."""

import hashlib
import io
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import storage
from .cache import Cache
from .manifest import Manifest, Shard, content_hash, index_bytes, parse_index, tar_location

_HEADER = 512  # bytes of a tar's header, before each member


class _Open:
    """A shard that is being read from; its descriptor is closed with the last reference.

    index: int64 [count, 4], as in manifest.py.
    """

    def __init__(self, tar: BinaryIO, index: np.ndarray) -> None:
        with tar:
            self.tar = os.dup(tar.fileno())
        self.index = index

    def __del__(self) -> None:
        if hasattr(self, "tar"):
            os.close(self.tar)


class Reader:
    """Reads a data set's samples. It may be pickled to other processes, which open the files themselves.

    Args:
        folder: of the manifest: a path, or a remote place as in storage.py.
        manifest: the data set.
        cache: for remote shards, (folder, bytes that it may hold).
    """

    def __init__(self, folder: str, manifest: Manifest, cache: tuple[str, int] | None) -> None:
        self.folder, self.manifest = folder, manifest
        self.cache = Cache(*cache) if cache else None
        self.shards: dict[int, _Open | str] = {}  # open ones; of an unusable one what is wrong
        self.rehashed: set[int] = set()  # those whose copy in the cache was looked at again

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"shards": {}}

    def read(self, shard: int, row: int) -> tuple[bytes, int]:
        """(encoded image, label or -1) of a sample.

        Raises ValueError if the sample is not what was indexed, and OSError if this machine or the network fails.
        """
        opened = self._shard(shard)
        if isinstance(opened, str):
            raise ValueError(opened)
        offset, length, label, expected = opened.index[row].tolist()
        data = os.pread(opened.tar, length, offset)
        if content_hash(data) != expected:
            if self._spoilt(shard):
                return self.read(shard, row)
            if len(data) != length:
                raise ValueError(f"the tar ends before its image ({len(data)} of {length} bytes)")
            raise ValueError("its bytes are not those that were indexed")
        return data, label

    def key(self, shard: int, row: int) -> str:
        """What the tar calls a sample, for a person; empty where that is damaged too."""
        opened = self._shard(shard)
        if isinstance(opened, str):
            return ""
        header = os.pread(opened.tar, _HEADER, max(int(opened.index[row, 0]) - _HEADER, 0))
        name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
        return name if name.isprintable() else ""

    def keep(self, shards: Collection[int]) -> None:
        """Closes all shards but these."""
        self.shards = {number: shard for number, shard in self.shards.items() if number in shards}
        self.rehashed &= set(shards)

    def files(self, shard: int) -> list[tuple[str, int, str]]:
        """(url, size, sha256) of a shard's files that are remote."""
        entry = self.manifest.shards[shard]
        both = [
            (tar_location(self.folder, self.manifest, entry), entry.bytes, entry.sha256),
            (storage.join(self.folder, entry.index), index_bytes(entry), entry.index_sha256),
        ]
        return [file for file in both if storage.is_remote(file[0])]

    def _shard(self, number: int) -> _Open | str:
        if number not in self.shards:
            self.shards[number] = self._open(number)
        return self.shards[number]

    def _open(self, number: int) -> _Open | str:
        """The shard, or what is wrong with it. A missing or broken file is the data set's fault; OSError is not."""
        shard = self.manifest.shards[number]
        try:
            index = self._index(shard)
            return _Open(self._file(tar_location(self.folder, self.manifest, shard), shard.bytes, shard.sha256), index)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            if self.cache:
                raise
            return f"{error.filename} is missing"
        except ValueError as error:
            return str(error)

    def _index(self, shard: Shard) -> np.ndarray:
        location = storage.join(self.folder, shard.index)
        for attempt in range(2):
            with self._file(location, index_bytes(shard), shard.index_sha256) as file:
                data = file.read()
            if hashlib.sha256(data).hexdigest() == shard.index_sha256:
                break
            if self.cache and storage.is_remote(location) and attempt == 0:
                self.cache.drop(shard.index_sha256)  # its copy went bad on this disk
                continue
            raise ValueError(f"the index {shard.index} is not the one that the manifest names")
        return parse_index(io.BytesIO(data), shard, Path(shard.index), "")

    def _file(self, location: str, size: int, sha256: str) -> BinaryIO:
        if storage.is_remote(location):
            assert self.cache is not None, location
            return self.cache.open(location, size, sha256)
        return open(location, "rb")

    def _spoilt(self, number: int) -> bool:
        """Whether a shard's copy in the cache went bad on this disk: then it is removed, to be fetched again."""
        shard, opened = self.manifest.shards[number], self.shards[number]
        if number in self.rehashed or not isinstance(opened, _Open) or not self.files(number):
            return False
        self.rehashed.add(number)
        with open(opened.tar, "rb", closefd=False) as file:
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                return False
        assert self.cache is not None
        self.cache.drop(shard.sha256)
        del self.shards[number]
        return True
