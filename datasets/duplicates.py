"""Pictures whose files are the same, byte for byte, found without reading everything twice.

Files of different size differ. Of files of one size, the ends are compared, and only where these agree too are whole
files hashed. In a zip the checksums of its directory stand for the ends, and are read at once.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict

from .manifest import write_atomically
from .records import Duplicate, read_record
from .sources import UNLABELLED, FolderSource, Source, TarSource, ZipSource
from .tars import printable
from .workers import Engine, Tick, progress_bar

FILE = "duplicates.json"
_END = 16 << 10  # bytes
_CHUNK = 500  # pictures for each task
_WAIT = 1.0  # seconds before the bar shows: mostly there is little to do


class _Found(BaseModel):
    """The file of what was found."""

    model_config = ConfigDict(extra="forbid")

    first: dict[int, int]


def find_duplicates(source: Source, work: Path, engine: Engine, progress: bool) -> dict[int, int]:
    """The index in the source of each picture that was there before -> that of the first one of its kind.

    What was found is kept in the folder `work`, and taken from there. Raises OSError if the source went away.
    """
    if (work / FILE).exists():
        first = read_record(work / FILE, _Found).first
        if _still_true(source, first, engine, progress):
            return first
    first = _search(source, engine, progress)
    write_atomically(work / FILE, _Found(first=first).model_dump_json().encode())
    return first


def _still_true(source: Source, first: Mapping[int, int], engine: Engine, progress: bool) -> bool:
    """Whether what was found before an interruption holds: pictures may have been changed since, at the same size."""
    both = np.array(sorted({*first, *first.values()}), np.int64)
    whole = _hashes(source, both, hash_whole, "comparing whole files", engine, progress)
    return all(i in whole and whole[i] == whole.get(kept) for i, kept in first.items())


def _search(source: Source, engine: Engine, progress: bool) -> dict[int, int]:
    sizes = np.array([entry.size for entry in source.entries], np.int64)
    suspects = _alike(sizes, np.flatnonzero(sizes > 0))  # those without a size could not be opened
    if isinstance(source, ZipSource):
        ends = _checksums(source, suspects)
    else:
        ends = _hashes(source, suspects, hash_ends, "comparing", engine, progress)
    suspects = suspects[[int(i) in ends for i in suspects]]
    codes = np.array([ends[int(i)] for i in suspects], np.uint64)
    kinds = np.stack([sizes[suspects].astype(np.uint64), codes], axis=1)
    _, kind = np.unique(kinds, axis=0, return_inverse=True)
    suspects = suspects[_alike(kind.reshape(-1), np.arange(len(suspects)))]
    whole = _hashes(source, suspects, hash_whole, "comparing whole files", engine, progress)
    first: dict[bytes, int] = {}
    found = {}
    for i in sorted(whole):
        kept = first.setdefault(whole[i], i)
        if kept != i:
            found[i] = kept
    return found


def _alike(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Those of the indices `among` (ascending) whose value another of them has too. values: [N]."""
    _, group, counts = np.unique(values[among], return_inverse=True, return_counts=True)
    return among[counts[group] > 1]


def _checksums(source: ZipSource, suspects: np.ndarray) -> dict[int, int]:
    with zipfile.ZipFile(source.root) as archive:
        return {int(i): archive.getinfo(source.entries[i].name).CRC for i in suspects}


@dataclass(frozen=True)
class Task:
    """Some pictures to hash."""

    part: Source
    """Only these."""
    places: list[int]
    """Their indices in the whole source."""


class Hashed(NamedTuple):
    """What came of it."""

    hashes: dict[int, int | bytes]
    """By index in the whole source; without those that cannot be read."""


def _hashes(
    source: Source,
    suspects: np.ndarray,
    work: Callable[[Task, Tick], Hashed],
    what: str,
    engine: Engine,
    progress: bool,
) -> dict:
    chunks = [suspects[at : at + _CHUNK].tolist() for at in range(0, len(suspects), _CHUNK)]
    tasks = [Task(replace(source, entries=[source.entries[i] for i in chunk]), chunk) for chunk in chunks]
    hashes = {}
    with progress_bar(len(suspects), 0, what, progress, after=_WAIT) as bar:
        engine(work, tasks, bar, lambda result: hashes.update(result.hashes))
    return hashes


def hash_ends(task: Task, tick: Tick) -> Hashed:
    """A short hash of the last bytes of each picture."""
    return _each(task, tick, lambda i: xxhash.xxh3_64_intdigest(_end(task.part, i)))


def hash_whole(task: Task, tick: Tick) -> Hashed:
    """A hash of each picture that only the same bytes have."""
    return _each(task, tick, lambda i: hashlib.sha256(task.part.read(i)).digest())


def _each(task: Task, tick: Tick, hash_: Callable[[int], int | bytes]) -> Hashed:
    hashes = {}
    for i, place in enumerate(task.places):
        try:
            hashes[place] = hash_(i)
        except OSError:
            if not os.path.exists(task.part.root):
                raise
        except Exception:  # it will be reported as unreadable
            pass
        tick()
    return Hashed(hashes)


def _end(source: Source, i: int) -> bytes:
    """The last bytes of a picture, or where it takes more to reach them, all of it."""
    entry = source.entries[i]
    if isinstance(source, TarSource):
        path, begin = Path(entry.archive), entry.offset
    elif isinstance(source, FolderSource):
        path, begin = source.root / entry.name, 0
    else:
        return source.read(i)
    length = min(entry.size, _END)
    with open(path, "rb") as file:
        file.seek(begin + entry.size - length)
        return file.read(length)


def describe(source: Source, found: Mapping[int, int]) -> list[Duplicate]:
    """What is reported of the duplicates in a source, in its order."""
    return [
        Duplicate(
            source=printable(source.entries[i].name),
            kept=printable(source.entries[kept].name),
            labels=_labels(source, i, kept),
        )
        for i, kept in sorted(found.items())
    ]


def _labels(source: Source, i: int, kept: int) -> tuple[str, str] | None:
    labels = (source.entries[i].label, source.entries[kept].label)
    if labels[0] == labels[1]:
        return None
    names: Sequence[str] = ["" if k == UNLABELLED else source.class_names[k] for k in labels]
    return names[0], names[1]
