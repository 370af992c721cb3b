"""Pictures -> tar shards, an index beside each, a manifest and a report.

Shard i holds the pictures [i * S, (i + 1) * S) of the source, less the unreadable ones. So every shard can be made
alone: in parallel, again after an interruption, and with the same bytes however many processes there are. A finished
shard has a record in DEST/.prepare; it is written after the shard's files are safely on the disk under their names.
What has no record is made anew. The manifest comes last, then DEST/.prepare goes.
"""

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from webdataset.writer import TarWriter

from .manifest import (
    FILE,
    TEMPORARY,
    WORK,
    Manifest,
    Shard,
    atomic_file,
    check_shard,
    content_hash,
    load_index,
    locked,
    read_manifest,
    write_atomically,
    write_manifest,
)
from .pictures import Form, bring_into_form, check_form
from .records import REPORT, Plan, Record, Report, Unreadable, compare, read_record
from .sources import UNLABELLED, Source, tar_samples
from .workers import Tick, progress_bar, run

_PLAN = "plan.json"
_LOCK = "lock"


class Prepared(NamedTuple):
    """The outcome of `prepare`."""

    manifest: Manifest
    report: Report
    already: bool
    """The data set was there, complete; nothing was done."""


def prepare(
    source: Source,
    dest: str | os.PathLike[str],
    *,
    width: int,
    height: int,
    channels: int = 3,
    codec: str = "png",
    quality: int | None = None,
    resize: str = "lanczos",
    background: str | None = "#ffffff",
    shard_images: int = 1000,
    workers: int = 1,
    progress: bool = True,
) -> Prepared:
    """Makes the data set `dest` from `source`, or completes it if the same call was interrupted.

    width, height: of the images, in pixels. channels: 1 (grey), 3 (RGB), 4 (RGBA). codec: png, jpeg or webp; quality:
    1 to 100, for jpeg and webp (95 if None). resize: lanczos or box. background: #rrggbb, what transparent pictures are
    put on (without effect for 4 channels). shard_images: pictures of the source for each shard. workers: processes.

    Raises ValueError for what the caller must mend (contradicting options, `dest` belongs to something else, nothing is
    readable, a worker was killed) and OSError (a full disk). Whatever ends it, finished shards stay and count.
    """
    form = check_form(Form(width, height, channels, codec, quality, resize, background))
    if shard_images < 1 or workers < 1:
        raise ValueError("--shard-images and --workers must be at least 1")
    plan = Plan(
        **asdict(form),
        shard_images=shard_images,
        images=len(source),
        source=source.digest,
        class_names=list(source.class_names),
    )
    dest = Path(dest).absolute()  # workers may have another current folder
    finished = _claim(dest, plan, source)
    if finished:
        return finished
    with locked(dest / WORK / _LOCK, f"another styleloom prepare is writing {dest}: let it end first"):
        _sweep(dest)
        try:
            _make_shards(source, dest, form, plan, workers, progress)
        finally:
            _sweep(dest)  # a signal to the whole group kills workers before they can clean up
        return _finish(dest, plan)


def _sweep(dest: Path) -> None:
    """Removes what killed processes were writing."""
    for leftover in (*dest.glob(f"*{TEMPORARY}"), *(dest / WORK).glob(f"*{TEMPORARY}")):
        leftover.unlink()


def _claim(dest: Path, plan: Plan, source: Source) -> Prepared | None:
    """Makes sure that `dest` is ours to write: new, empty, or of the same plan. Returns the outcome if complete."""
    inside, outside = dest.resolve(), source.root.resolve()
    if inside == outside or (source.root.is_dir() and outside in inside.parents):
        raise ValueError(f"{dest} is within the source {source.root}: choose a folder outside of it")
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"{dest} is a file: choose another folder")
    if (dest / FILE).exists():
        return _recognise(dest, plan)
    work = dest / WORK
    if (work / _PLAN).exists():
        compare(read_record(work / _PLAN, Plan), plan, f"{dest} holds an unfinished prepare", dest)
        return None
    if dest.exists() and any(path.name != WORK for path in dest.iterdir()):
        raise ValueError(f"{dest} is not empty and not a data set of this kind: choose another folder")
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(work / _PLAN, plan.model_dump_json(indent=1).encode())
    return None


def _recognise(dest: Path, plan: Plan) -> Prepared:
    """The outcome recorded in the complete data set `dest`. Raises ValueError if it is another one, or damaged."""
    manifest = read_manifest(dest)
    if not (dest / REPORT).exists():
        raise ValueError(f"{dest} is a data set already, of unknown origin: choose another folder")
    report = read_record(dest / REPORT, Report)
    compare(report.plan, plan, f"{dest} is a finished data set", dest)
    for shard in manifest.shards:
        check_shard(dest, shard)
    shutil.rmtree(dest / WORK, ignore_errors=True)
    return Prepared(manifest, report, already=True)


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    number: int
    part: Source
    first: int
    """Index of the part's first picture in the source."""
    form: Form
    dest: Path

    @property
    def record(self) -> Path:
        return _record_path(self.dest, self.number)


def _record_path(dest: Path, number: int) -> Path:
    return dest / WORK / f"{number:06d}.json"


def _make_shards(source: Source, dest: Path, form: Form, plan: Plan, workers: int, progress: bool) -> None:
    """Makes all shards that have no valid record yet."""
    starts = range(0, len(source), plan.shard_images)
    todo = [(i, start) for i, start in enumerate(starts) if not _is_done(dest, i)]
    tasks = [Task(i, source.part(start, start + plan.shard_images), start, form, dest) for i, start in todo]
    kept = len(source) - sum(len(task.part) for task in tasks)
    with progress_bar(len(source), kept, "preparing", progress) as bar:
        run(make_shard, tasks, workers, bar)


def _is_done(dest: Path, number: int) -> bool:
    """Whether a shard has a valid record and its files are whole."""
    path = _record_path(dest, number)
    try:
        shard = Record.model_validate_json(path.read_bytes()).shard
        if shard is not None:
            check_shard(dest, shard)
            load_index(dest, shard)
    except (OSError, ValueError):
        return False
    return True


def make_shard(task: Task, tick: Tick) -> None:
    """Writes one shard, its index and, when both are safely there, its record. Calls `tick` after each picture."""
    name = f"shard-{task.number:06d}"
    tar, index = task.dest / f"{name}.tar", task.dest / f"{name}.npy"
    tally = _Tally()
    with atomic_file(tar) as file:
        sink = _Hashing(file)
        with TarWriter(cast(BinaryIO, sink), encoder=False, mtime=0, user="", group="", compress=False) as writer:
            for i in range(len(task.part)):
                _add_picture(writer, task, i, tally)
                tick()
    shard = None
    if tally.labels:
        table = io.BytesIO()
        np.save(table, _index(tar, task.form.codec, tally))
        write_atomically(index, table.getvalue())
        shard = Shard(
            name=tar.name,
            count=len(tally.labels),
            bytes=sink.size,
            sha256=sink.digest.hexdigest(),
            index=index.name,
            index_sha256=hashlib.sha256(table.getvalue()).hexdigest(),
        )
    else:
        tar.unlink()  # nothing was readable
    record = Record(
        shard=shard,
        read=len(task.part),
        upscaled=tally.upscaled,
        profiles_ignored=tally.profiles_ignored,
        labels=dict(sorted(Counter(tally.labels).items())),
        unreadable=tally.unreadable,
    )
    write_atomically(task.record, record.model_dump_json().encode())


class _Tally:
    """Counts the pictures of one shard."""

    def __init__(self) -> None:
        self.labels: list[int] = []  # of the written ones, in order
        self.hashes: list[int] = []
        self.upscaled = 0
        self.profiles_ignored = 0
        self.unreadable: list[Unreadable] = []


class _Hashing:
    """A file to write that knows its size and sha256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.digest.update(data)
        return self.file.write(data)


def _add_picture(writer: TarWriter, task: Task, i: int, tally: _Tally) -> None:
    """Writes picture `i` of the task's part, or notes why it cannot be read."""
    entry = task.part.entries[i]
    try:
        picture = bring_into_form(task.part.read(i), task.form)
    except (OSError, MemoryError):
        raise  # the source as a whole, or this machine
    except Exception as error:  # broken archives and pictures show in errors of every kind
        reason = str(error) or type(error).__name__
        tally.unreadable.append(Unreadable(source=_printable(entry.name), reason=_printable(reason)))
        return
    origin = {"height": picture.height, "source": _printable(entry.name), "width": picture.width}
    sample = {
        "__key__": f"{task.first + i:08d}",
        task.form.codec: picture.data,
        "json": json.dumps(origin, sort_keys=True).encode(),
    }
    if entry.label != UNLABELLED:
        sample["cls"] = b"%d" % entry.label
    writer.write(sample)
    tally.labels.append(entry.label)
    tally.hashes.append(content_hash(picture.data))
    tally.upscaled += picture.upscaled
    tally.profiles_ignored += picture.profile_ignored


def _printable(text: str) -> str:
    """Text that is valid UTF-8: names of files need not be."""
    return text.encode("utf-8", "backslashreplace").decode()


def _index(tar: Path, codec: str, tally: _Tally) -> np.ndarray:
    """int64 [count, 4] = (offset, length, label, hash); where things lie is read from the tar rather than foretold."""
    found = {key: member for key, members in tar_samples(tar) for member in members if member.name == f"{key}.{codec}"}
    columns = zip(found.values(), tally.labels, tally.hashes, strict=True)
    rows = [(member.offset, member.size, label, hash_) for member, label, hash_ in columns]
    return np.array(rows, dtype=np.int64)


def _finish(dest: Path, plan: Plan) -> Prepared:
    """Puts the shards' records together into the report and the manifest."""
    numbers = range(-(-plan.images // plan.shard_images))
    records = [read_record(_record_path(dest, number), Record) for number in numbers]
    shards = [record.shard for record in records if record.shard is not None]
    unreadable = [picture for record in records for picture in record.unreadable]
    if not shards:
        shutil.rmtree(dest / WORK)  # the next try will be with another source
        first = unreadable[0]
        raise ValueError(f"none of the {plan.images} pictures could be read; the first, {first.source}: {first.reason}")
    labels = sum((Counter(record.labels) for record in records), Counter())
    manifest = Manifest(
        **plan.model_dump(include={"width", "height", "channels", "codec", "quality", "resize", "background"}),
        class_names=plan.class_names,
        class_counts=[labels[k] for k in range(len(plan.class_names))],
        count=sum(shard.count for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=shards,
    )
    report = Report(
        plan=plan,
        read=sum(record.read for record in records),
        written=manifest.count,
        upscaled=sum(record.upscaled for record in records),
        profiles_ignored=sum(record.profiles_ignored for record in records),
        unreadable=unreadable,
    )
    write_atomically(dest / REPORT, (report.model_dump_json(indent=1) + "\n").encode())
    write_manifest(manifest, dest)
    shutil.rmtree(dest / WORK)
    return Prepared(manifest, report, already=False)
