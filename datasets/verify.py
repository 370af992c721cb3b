"""Checks a data set to the last byte: sizes, hashes, indices, labels, and that every image decodes as promised."""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import storage
from .decode import decode
from .manifest import FILE, Manifest, Shard, content_hash, parse_index, read_manifest, tar_location
from .pictures import Form, conform
from .sources import UNLABELLED
from .tars import Member, TarReader, printable, tar_samples
from .workers import Tick, progress_bar, run


class Fault(NamedTuple):
    """Something wrong with a data set."""

    file: str
    """The shard, or manifest.json."""
    key: str
    """The sample; empty if it is not about one."""
    what: str


def verify(folder: str | os.PathLike[str], workers: int = 1, progress: bool = True) -> list[Fault]:
    """All faults of the data set in `folder`, by shard; empty if it is sound.

    Remote tars are fetched one by one for it, into the folder for temporary files.

    Raises ValueError if its manifest cannot be read, or a worker was killed.
    """
    manifest = read_manifest(folder)
    place = os.fspath(folder)
    if not storage.is_remote(place):
        place = os.fspath(storage.local_path(place).absolute())  # workers may have another current folder
    tasks = [Task(place, shard, manifest.model_copy(update={"shards": [shard]})) for shard in manifest.shards]
    results: list[Result] = []
    with progress_bar(manifest.count, 0, "verifying", progress) as bar:
        run(verify_shard, tasks, workers, bar, results.append)
    faults = sorted(fault for result in results for fault in result.faults)
    labels = sum((result.labels for result in results), Counter())
    counts = [labels[k] for k in range(manifest.classes)]
    if not faults and counts != manifest.class_counts:
        faults.append(Fault(FILE, "", "class_counts are not those of the labels in the shards"))
    return faults


@dataclass(frozen=True)
class Task:
    """One shard to verify."""

    folder: str
    """Path or URL."""
    shard: Shard
    manifest: Manifest
    """Without the other shards."""


class Result(NamedTuple):
    """What came of it."""

    faults: list[Fault]
    labels: Counter[int]


def verify_shard(task: Task, tick: Tick) -> Result:
    """The faults and labels of one shard. Calls `tick` after each sample."""
    name = task.shard.name
    with tempfile.TemporaryDirectory() as copies:
        try:
            tar, index = _files(task, Path(copies))
        except FileNotFoundError:
            return Result([Fault(name, "", "is missing")], Counter())
        except storage.UnavailableError as error:
            return Result([Fault(name, "", f"{error}")], Counter())
        faults = [Fault(name, "", what) for what in _file_faults(task.shard, tar, index)]
        try:
            rows = _load(task.shard, index)
        except ValueError as error:
            faults.append(Fault(name, "", f"{error}"))
            rows = None
        if task.manifest.foreign:
            faults += _rows(task, tar, rows, tick) if rows is not None else []
        else:
            faults += _samples(task, tar, rows, tick)
    return Result(faults, Counter() if rows is None else Counter(rows[:, 2].tolist()))


def hash_faults(folder: str | os.PathLike[str], manifest: Manifest) -> list[Fault]:
    """Files of the data set (a local one) that are not, byte for byte, what the manifest says. Reads everything,
    decodes nothing."""
    faults = []
    for shard in manifest.shards:
        tar, index = _files(Task(os.fspath(folder), shard, manifest), Path())
        faults += [Fault(shard.name, "", what) for what in _file_faults(shard, tar, index)]
    return faults


def _files(task: Task, copies: Path) -> tuple[Path, Path]:
    """A shard's tar and index; of remote ones copies. Raises FileNotFoundError if there is no tar."""
    places = tar_location(task.folder, task.manifest, task.shard), storage.join(task.folder, task.shard.index)
    paths = []
    for place, copy in zip(places, (copies / "tar", copies / "npy"), strict=True):
        if storage.is_remote(place):
            storage.fetch(place, copy)
            paths.append(copy)
        else:
            paths.append(storage.local_path(place))
    if not paths[0].is_file():
        raise FileNotFoundError(paths[0])
    return paths[0], paths[1]


def _load(shard: Shard, path: Path) -> np.ndarray:
    """int64 [count, 4] as in manifest.py. Raises ValueError."""
    try:
        with open(path, "rb") as file:
            return parse_index(file, shard, Path(shard.index), "")
    except OSError as error:
        raise ValueError(f"cannot read its index {shard.index}: {error.strerror}") from None


def _samples(task: Task, path: Path, index: np.ndarray | None, tick: Tick) -> list[Fault]:
    """Faults in a tar of ours: it holds what the index says, and nothing else."""
    name, seen, faults = task.shard.name, 0, []
    try:
        with open(path, "rb") as file:
            for key, members in tar_samples(path):
                row = index[seen] if index is not None and seen < len(index) else None
                seen += 1
                contents = {member.suffix: (member, _content(file, *member[1:3])) for member in members}
                faults += [Fault(name, printable(key), what) for what in _sample_faults(task.manifest, contents, row)]
                tick()
    except ValueError as error:
        faults.append(Fault(name, "", f"{error}"))
    if seen != task.shard.count:
        faults.append(Fault(name, "", f"holds {seen} whole samples, the manifest says {task.shard.count}"))
    return faults


def _rows(task: Task, path: Path, index: np.ndarray, tick: Tick) -> list[Fault]:
    """Faults of the images that the index finds in a tar of others, whatever else is in it."""
    faults = []
    with open(path, "rb") as file:
        members = {member.offset: member for sample in TarReader(file) for member in sample.members}
    with open(path, "rb") as file:
        for offset, length, label, hashed in index.tolist():
            data = _content(file, offset, length)
            name = printable(members[offset].name) if offset in members else f"byte {offset}"
            faults += [Fault(task.shard.name, name, what) for what in _row_faults(task.manifest, data, label, hashed)]
            tick()
    return faults


def _row_faults(manifest: Manifest, data: bytes, label: int, hashed: int) -> Iterator[str]:
    """What is wrong with one image of others, of which the index says label and hash."""
    if content_hash(data) != hashed:
        yield "its bytes are not those that were indexed"
    else:
        yield from _image_faults(manifest, data)
    if not UNLABELLED <= label < manifest.classes:
        yield f"the index gives it the label {label} of {manifest.classes} classes"


def _content(file, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _file_faults(shard: Shard, tar: Path, index: Path) -> Iterator[str]:
    size = tar.stat().st_size
    if size != shard.bytes:
        yield f"has {size} bytes, the manifest says {shard.bytes}"
    elif _sha256(tar) != shard.sha256:
        yield "its sha256 is not the manifest's: it changed after it was prepared"
    if index.is_file() and _sha256(index) != shard.index_sha256:
        yield f"the sha256 of its index {shard.index} is not the manifest's"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sample_faults(
    manifest: Manifest, contents: dict[str, tuple[Member, bytes]], row: np.ndarray | None
) -> Iterator[str]:
    """What is wrong with one sample. contents: its members by suffix; row: of the index, if there is one."""
    if manifest.codec not in contents:
        yield f"has no .{manifest.codec}"
        return
    image, data = contents[manifest.codec]
    broken = list(_image_faults(manifest, data))
    yield from broken
    label = _label(contents["cls"][1]) if "cls" in contents else UNLABELLED
    if label is None or not (0 <= label < manifest.classes if manifest.classes else label == UNLABELLED):
        allowed = f"0 to {manifest.classes - 1}" if manifest.classes else "none"
        yield f"its label is {_shown(contents, label)}, not {allowed}"
    if row is not None and tuple(row[:2]) != (image.offset, image.size):
        yield "the index points elsewhere"
    elif row is not None and not broken and row[3] != content_hash(data):
        yield "its bytes are not those that were indexed"
    if row is not None and label is not None and row[2] != label:
        yield f"its label is {_shown(contents, label)}, the index says {row[2]}"


def _image_faults(manifest: Manifest, data: bytes) -> Iterator[str]:
    m = manifest
    try:
        if m.conform:
            conform(data, Form(m.width, m.height, m.channels, "png", None, m.resize, m.background))
            return
        shape = decode(data, m.codec, m.channels).shape
    except ValueError as error:
        yield f"{error}"
        return
    if shape[1:] != (m.height, m.width):
        yield f"is {shape[2]}x{shape[1]}, not {m.width}x{m.height}"


def _label(text: bytes) -> int | None:
    return int(text) if text.isdigit() else None


def _shown(contents: dict[str, tuple[Member, bytes]], label: int | None) -> str:
    if label == UNLABELLED:
        return "missing"
    return f"{contents['cls'][1][:20]!r}" if label is None else f"{label}"
