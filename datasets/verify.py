"""Checks a data set to the last byte: sizes, hashes, indices, labels, and that every image decodes as promised."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .decode import decode
from .manifest import FILE, Manifest, Shard, content_hash, load_index, read_manifest
from .sources import UNLABELLED, Member, tar_samples
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

    Raises ValueError if its manifest cannot be read, or a worker was killed.
    """
    manifest = read_manifest(folder)
    tasks = [
        Task(Path(folder).absolute(), shard, manifest.model_copy(update={"shards": [shard]}))
        for shard in manifest.shards
    ]
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

    folder: Path
    shard: Shard
    manifest: Manifest
    """Without the other shards."""


class Result(NamedTuple):
    """What came of it."""

    faults: list[Fault]
    labels: Counter[int]


def verify_shard(task: Task, tick: Tick) -> Result:
    """The faults and labels of one shard. Calls `tick` after each sample."""
    path = task.folder / task.shard.name
    if not path.is_file():
        return Result([Fault(task.shard.name, "", "is missing")], Counter())
    faults = [Fault(task.shard.name, "", what) for what in _file_faults(task)]
    try:
        index = load_index(task.folder, task.shard)
    except ValueError as error:
        faults.append(Fault(task.shard.name, "", f"{error}"))
        index = None
    seen = 0
    try:
        with open(path, "rb") as file:
            for key, members in tar_samples(path):
                row = index[seen] if index is not None and seen < len(index) else None
                seen += 1
                contents = {member.name.removeprefix(f"{key}."): (member, _content(file, member)) for member in members}
                faults += [Fault(task.shard.name, key, what) for what in _sample_faults(task.manifest, contents, row)]
                tick()
    except ValueError as error:
        faults.append(Fault(task.shard.name, "", f"{error}"))
    if seen != task.shard.count:
        faults.append(Fault(task.shard.name, "", f"holds {seen} whole samples, the manifest says {task.shard.count}"))
    return Result(faults, Counter() if index is None else Counter(index[:, 2].tolist()))


def hash_faults(folder: str | os.PathLike[str], manifest: Manifest) -> list[Fault]:
    """Files of the data set that are not, byte for byte, what the manifest says. Reads everything, decodes nothing."""
    tasks = [Task(Path(folder), shard, manifest) for shard in manifest.shards]
    return [Fault(task.shard.name, "", what) for task in tasks for what in _file_faults(task)]


def _content(file, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _file_faults(task: Task) -> Iterator[str]:
    shard = task.shard
    size = (task.folder / shard.name).stat().st_size
    if size != shard.bytes:
        yield f"has {size} bytes, the manifest says {shard.bytes}"
    elif _sha256(task.folder / shard.name) != shard.sha256:
        yield "its sha256 is not the manifest's: it changed after it was prepared"
    index = task.folder / shard.index
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
    try:
        shape = decode(data, manifest.codec, manifest.channels).shape
    except ValueError as error:
        yield f"{error}"
        return
    if shape[1:] != (manifest.height, manifest.width):
        yield f"is {shape[2]}x{shape[1]}, not {manifest.width}x{manifest.height}"


def _label(text: bytes) -> int | None:
    return int(text) if text.isdigit() else None


def _shown(contents: dict[str, tuple[Member, bytes]], label: int | None) -> str:
    if label == UNLABELLED:
        return "missing"
    return f"{contents['cls'][1][:20]!r}" if label is None else f"{label}"
