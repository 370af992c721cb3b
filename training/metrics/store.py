"""Rows of numbers about images (features, distances), kept on disk by chunks until all are there, so that what was
killed goes on where it was.

A file is a `.npy` with a hash of it behind. It appears whole or not at all; one that a disk or a copy
spoilt is as good as missing.
"""

import contextlib
import io
import os
import shutil
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from ...datasets.manifest import atomic_file

BLOCK = 2**22  # bytes that are hashed at a time


class Store:
    """The rows of one set of images: `folder/NAME.npy`, and until that is whole `folder/NAME.parts/NNNNNN.npy`.

    Args:
        name: of the set; says everything that its rows depend on.
        count: rows.
        chunk: rows of a part, but for the last.
    """

    def __init__(self, folder: Path, name: str, count: int, chunk: int) -> None:
        self.count, self.chunk = count, chunk
        self.path, self.parts = folder / f"{name}.npy", folder / f"{name}.parts"

    def rows(self, number: int) -> range:
        """The rows of a part."""
        return range(number * self.chunk, min((number + 1) * self.chunk, self.count))

    def whole(self) -> np.ndarray | None:
        """All rows, fp32 [count, D], marked as used now; None if they are not there."""
        found = _read(self.path, self.count)
        if found is not None:
            with contextlib.suppress(OSError):
                os.utime(self.path)
        return found

    def there(self) -> list[int]:
        """The numbers of the parts that have files, whole or spoilt."""
        stems = [path.stem for path in self.parts.glob("*.npy")]
        return sorted(int(stem) for stem in stems if stem.isdigit() and len(self.rows(int(stem))))

    def part(self, number: int) -> np.ndarray | None:
        """fp32 [n, D], or None if it is not there."""
        return _read(self._file(number), len(self.rows(number)))

    def save_part(self, number: int, rows: np.ndarray) -> None:
        """Raises OSError naming the file, other than where another process has the whole by now, and has tidied up."""
        with contextlib.suppress(FileNotFoundError):
            self.parts.mkdir(parents=True, exist_ok=True)
            _write(self._file(number), rows)

    def save_whole(self, rows: np.ndarray) -> None:
        """Raises OSError naming the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _write(self.path, rows)

    def delete_parts(self) -> None:
        """Deletes the parts, once the whole is there."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.parts / f"{number:06d}.npy"


def delete_abandoned(folder: Path, days: float = 30) -> None:
    """Deletes the parts of sets that nobody has gone on with for so long."""
    for path in folder.glob("*.parts"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > days * 86400:
                shutil.rmtree(path, ignore_errors=True)


def retain(folder: Path, pattern: str, keep: int) -> None:
    """Deletes all but the `keep` last used whole sets whose file names match."""
    used = []
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process tidies up too
            used.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(used, reverse=True)[keep:]:
        path.unlink(missing_ok=True)


def _write(path: Path, rows: np.ndarray) -> None:
    rows = np.ascontiguousarray(rows, np.float32)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(rows))
    digest = xxhash.xxh3_128(header.getvalue())
    digest.update(rows.data)
    with atomic_file(path) as file:
        for data in (header.getvalue(), rows.data, digest.digest()):
            file.write(data)


def _read(path: Path, count: int) -> np.ndarray | None:
    """fp32 [count, D] of a file, or None if it is not as it was written."""
    try:
        with open(path, "rb") as file:
            if not _is_whole(file):
                return None
            file.seek(0)
            rows = np.load(file, allow_pickle=False)
    except OSError:
        return None
    return rows if rows.dtype == np.float32 and rows.ndim == 2 and len(rows) == count else None


def _is_whole(file: BinaryIO) -> bool:
    """Whether the hash at a file's end is that of all before it."""
    digest = xxhash.xxh3_128()
    left = os.fstat(file.fileno()).st_size - digest.digest_size
    while left > 0 and (block := file.read(min(left, BLOCK))):
        digest.update(block)
        left -= len(block)
    return left == 0 and file.read() == digest.digest()
