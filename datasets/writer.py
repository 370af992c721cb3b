"""One shard: pictures -> a tar and its index in each size, and a record of what became of them."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from webdataset.writer import TarWriter

from .manifest import WORK, Shard, atomic_file, check_shard, content_hash, load_index, write_atomically
from .pictures import Form, Picture, bring_into_forms
from .records import Record, Unreadable
from .similar import likeness
from .sources import UNLABELLED, Source
from .statistics import Counts, thumbnail
from .tars import printable, tar_samples
from .workers import Tick


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    number: int
    part: Source
    """Its pictures."""
    first: int
    """Index of the first of them in the source."""
    skipped: frozenset[int]
    """Indices in `part` of those that are left out, as duplicates."""
    forms: tuple[Form, ...]
    """Of each size, the largest first."""
    dest: Path


def size_folders(dest: Path, forms: Sequence[Form]) -> list[Path]:
    """Where each size goes: the first into the data set itself, the others into folders in it."""
    return [dest / f"{form.width}x{form.height}" if i else dest for i, form in enumerate(forms)]


def record_path(dest: Path, number: int) -> Path:
    """Where the record of a finished shard is, until all are finished."""
    return dest / WORK / f"{number:06d}.json"


def finished_record(dest: Path, number: int, folders: Sequence[Path]) -> Record | None:
    """The record of a shard, if it is there and the shard's files of all sizes are whole."""
    try:
        record = Record.model_validate_json(record_path(dest, number).read_bytes())
        for shard, folder in zip(record.shards, folders, strict=bool(record.shards)):
            check_shard(folder, shard)
            load_index(folder, shard)
    except (OSError, ValueError):
        return None
    return record


def make_shard(task: Task, tick: Tick) -> None:
    """Writes one shard's tars, their indices and, when all are safely there, its record. Calls `tick` after each
    picture. Raises OSError (a full disk, a source that went away)."""
    tally = _Tally(len(task.forms))
    stem = f"shard-{task.number:06d}"
    tars = [folder / f"{stem}.tar" for folder in size_folders(task.dest, task.forms)]
    with ExitStack() as files:
        sinks = [_Hashing(files.enter_context(atomic_file(tar))) for tar in tars]
        writers = [files.enter_context(_tar_writer(sink)) for sink in sinks]
        for i in range(len(task.part)):
            tally.likenesses.append(None)
            if i not in task.skipped:
                _add_picture(writers, task, i, tally)
            tick()
    shards = []
    for k, (tar, sink) in enumerate(zip(tars, sinks, strict=True)):
        if tally.labels:
            table = _index(tar, task.forms[k].codec, tally.labels, tally.hashes[k])
            shards.append(_seal(tar, sink, table, len(tally.labels)))
        else:
            tar.unlink()  # nothing is left of it
    record = Record(
        shards=shards,
        read=len(task.part),
        upscaled=tally.upscaled,
        profiles_ignored=tally.profiles_ignored,
        labels=dict(sorted(Counter(tally.labels).items())),
        unreadable=tally.unreadable,
        census=tally.counts.census(),
        likenesses=tally.likenesses,
    )
    write_atomically(record_path(task.dest, task.number), record.model_dump_json().encode())


class _Tally:
    """Counts the pictures of one shard."""

    def __init__(self, sizes: int) -> None:
        self.labels: list[int] = []  # of the written ones, in order
        self.hashes: list[list[int]] = [[] for _ in range(sizes)]  # of the written images, by size
        self.counts = Counts()
        self.likenesses: list[int | None] = []
        self.upscaled = 0
        self.profiles_ignored = 0
        self.unreadable: list[Unreadable] = []

    def add(self, picture: Picture, label: int) -> None:
        """A picture that was written, the last one in `likenesses`."""
        self.labels.append(label)
        for hashes, data in zip(self.hashes, picture.data, strict=True):
            hashes.append(content_hash(data))
        small = thumbnail(picture.smallest)
        self.counts.add(picture.width, picture.height, picture.format, small)
        self.likenesses[-1] = likeness(small)
        self.upscaled += picture.upscaled
        self.profiles_ignored += picture.profile_ignored


class _Hashing:
    """A file to write that knows its size and sha256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.digest.update(data)
        return self.file.write(data)


def _tar_writer(sink: _Hashing) -> TarWriter:
    return TarWriter(cast(BinaryIO, sink), encoder=False, mtime=0, user="", group="", compress=False)


def _add_picture(writers: Sequence[TarWriter], task: Task, i: int, tally: _Tally) -> None:
    """Writes picture `i` of the task's part in all sizes, or notes why it cannot be read."""
    entry = task.part.entries[i]
    try:
        picture = bring_into_forms(task.part.read(i), task.forms)
    except (OSError, MemoryError):
        raise  # the source as a whole, or this machine
    except Exception as error:  # broken archives and pictures show in errors of every kind
        reason = str(error) or type(error).__name__
        tally.unreadable.append(Unreadable(source=printable(entry.name), reason=printable(reason)))
        return
    origin = {"height": picture.height, "source": printable(entry.name), "width": picture.width}
    common = {"__key__": f"{task.first + i:08d}", "json": json.dumps(origin, sort_keys=True).encode()}
    if entry.label != UNLABELLED:
        common["cls"] = b"%d" % entry.label
    for writer, form, data in zip(writers, task.forms, picture.data, strict=True):
        writer.write({**common, form.codec: data})
    tally.add(picture, entry.label)


def _index(tar: Path, codec: str, labels: Sequence[int], hashes: Sequence[int]) -> np.ndarray:
    """int64 [count, 4] = (offset, length, label, hash); where things lie is read from the tar rather than foretold."""
    images = [member for sample in tar_samples(tar) for member in sample.members if member.suffix == codec]
    columns = zip(images, labels, hashes, strict=True)
    return np.array([(image.offset, image.size, label, hash_) for image, label, hash_ in columns], dtype=np.int64)


def _seal(tar: Path, sink: _Hashing, index: np.ndarray, count: int) -> Shard:
    """Writes a tar's index beside it, and describes both."""
    table = io.BytesIO()
    np.save(table, index)
    path = tar.with_suffix(".npy")
    write_atomically(path, table.getvalue())
    return Shard(
        name=tar.name,
        count=count,
        bytes=sink.size,
        sha256=sink.digest.hexdigest(),
        index=path.name,
        index_sha256=hashlib.sha256(table.getvalue()).hexdigest(),
    )
