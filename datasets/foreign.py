"""Tars that others wrote, as a data set: a manifest and indices beside them, or elsewhere; the tars stay as they are.

Each tar is read once (scan.py), in parallel, and leaves a record in DEST/.prepare; what has a record is not read again
after an interruption, nor when the same is asked for in another form. What images of that sort become is decided when
all are known (alike.py); then the records become indices. The manifest comes last, then DEST/.prepare goes.
"""

import hashlib
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from . import storage
from .alike import Agreed, Wish, agree, check_wish, differences
from .labels import class_text, number_classes, read_labels
from .listing import Tars, find_tars
from .manifest import FILE, TEMPORARY, WORK, Manifest, Shard, locked, read_manifest, write_atomically, write_manifest
from .records import REPORT
from .scan import Kind, LeftOut, Reading, Record, Task, finished, load_rows, scan_tar
from .sources import checked_rules
from .tars import Rules, no_field, no_image, printable
from .workers import progress_bar, run

_LOCK = "lock"
_MARKER = "index-only"  # in the work folder: this module made it
# As manifest.atomic_file names what it writes.
_OURS = re.compile(
    rf"(\.tar\.npy|{re.escape(FILE)}|{re.escape(REPORT)})\.[0-9a-f]{{16}}{re.escape(TEMPORARY)}$", re.IGNORECASE
)


class IndexPlan(BaseModel):
    """Everything that determines the manifest and the indices."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: str
    """Folder or URL of the tars; empty: that of the manifest."""
    tars: str
    """Digest of their names and, where they are known before they are read, sizes; in hex."""
    keys: str
    image: str | None
    label_field: str | None
    labels: str
    labels_sha256: str
    width: int | None
    height: int | None
    channels: int | None
    resize: str
    background: str | None


class Fault(BaseModel):
    """Something wrong with a tar as a whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tar: str
    what: str


class IndexReport(BaseModel):
    """What was found in tars of others: `report.json` in the data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: IndexPlan
    images: int
    """In the indices."""
    unlabelled: int
    """Of them, without a label; 0 if none has one."""
    not_alike: list[str]
    """In what the images differ, or why they cannot be taken as they are decoded; empty if they can."""
    without_image: int
    """Samples in which there is no image."""
    repeated_keys: int
    """Samples whose key an earlier one of the same tar has: their files may have been meant to be one sample."""
    left_out: list[LeftOut]
    """Samples that are not in the index."""
    faults: list[Fault]
    """Of whole tars."""


class Indexed(NamedTuple):
    """The outcome of `index_only`."""

    manifest: Manifest
    report: IndexReport
    dest: Path
    already: bool
    """The data set was there, complete; nothing was done."""


def index_only(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str] | None = None,
    *,
    wish: Wish | None = None,
    labels: str = "auto",
    rules: Rules | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Indexed:
    """Makes a data set of the tars at `src` without copying them, or completes it if the same was interrupted.

    src: a folder of tars (also in sub-folders), a tar, a URL of either, or a pattern with braces. dest: the folder of
    the manifest; None: `src`, if it is a local folder. wish: what the images are to be; those that are not all like
    that are brought into form as they are read. labels: "auto", "none", or a file, as for `open_source`. rules: how
    the tars are read. workers: processes.

    Raises ValueError for what the caller must mend (no tars, compressed ones, several pictures in a sample, images that
    differ without a size to bring them to, `dest` belongs to something else, nothing usable), and OSError.
    """
    if workers < 1:
        raise ValueError("--workers must be at least 1")
    wish, rules = check_wish(wish or Wish()), checked_rules(rules, labels)
    if labels == "folders":
        raise ValueError("--labels folders does not go with tars: their labels are in .cls or .json (--labels auto)")
    reading = _reading(rules, labels)
    tars = find_tars(os.fspath(src))
    folder = _folder(dest, tars, os.fspath(src))
    in_place = not storage.is_remote(tars.root) and folder.resolve() == storage.local_path(tars.root).resolve()
    plan = IndexPlan(
        root="" if in_place else tars.root, tars=tars.digest, **asdict(rules), **asdict(wish),
        labels=Path(labels).name, labels_sha256=reading.labels_sha256,
    )  # fmt: skip
    if already := _claim(folder, plan, tars, in_place):
        return already
    tasks = [
        Task(name, storage.join(tars.root, name), file, reading, folder / WORK) for name, file in tars.files.items()
    ]
    with locked(folder / WORK / _LOCK, f"another styleloom prepare is writing {folder}: let it end first"):
        _sweep(folder)
        try:
            _scan(tasks, workers, progress)
            return _finish(folder, plan, tasks, wish, os.fspath(src))
        except ValueError:
            if not any((folder / WORK).glob("*.json")):
                _discard(folder)  # nothing in it is of use to another try
            raise
        finally:
            _sweep(folder)  # a signal to the whole group kills workers before they can clean up


def _reading(rules: Rules, labels: str) -> Reading:
    if labels in ("auto", "none"):
        return Reading(rules, labels)
    path = Path(labels).absolute()  # workers may have another current folder
    read_labels(path)  # mistakes show before the work
    return Reading(rules, f"{path}", hashlib.sha256(path.read_bytes()).hexdigest())


def _folder(dest: str | os.PathLike[str] | None, tars: Tars, src: str) -> Path:
    """The folder of the manifest."""
    if dest is not None:
        return Path(dest).absolute()
    if storage.is_remote(src) or not storage.local_path(src).is_dir():
        raise ValueError(f"say where the index is to be: styleloom prepare --index-only {storage.shown(src)} DEST")
    return Path(tars.root)


def _claim(dest: Path, plan: IndexPlan, tars: Tars, in_place: bool) -> Indexed | None:
    """Makes sure that `dest` is ours to write. Returns the outcome if it is complete."""
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"{dest} is a file: choose another folder")
    known = (dest / FILE).exists() or (dest / REPORT).exists()
    if known:
        report = _own_report(dest)
        if (dest / FILE).exists():
            return _recognise(dest, plan, report, tars)
    _refuse_work_of_others(dest)
    begun = (dest / WORK / _MARKER).is_file()
    if not known and not begun:
        if not in_place and dest.exists() and any(path.name != WORK for path in dest.iterdir()):
            raise ValueError(f"{dest} is not empty and not a data set of this kind: choose another folder")
        _refuse_indices_of_others(dest, tars)
    try:
        (dest / WORK).mkdir(parents=True, exist_ok=True)
        (dest / WORK / _MARKER).touch()  # lasts over a power cut as soon as a record does, which syncs the folder
    except PermissionError:
        advice = ": say where the index is to be, styleloom prepare --index-only SRC DEST" if in_place else ""
        raise ValueError(f"{dest} cannot be written to{advice}") from None
    return None


def _refuse_work_of_others(dest: Path) -> None:
    """Raises ValueError if there is a work folder that is not ours: ours is swept and removed."""
    work = dest / WORK
    if (work / "plan.json").exists():
        raise ValueError(f"{dest} holds an unfinished prepare without --index-only: choose another folder")
    if not os.path.lexists(work) or (work / _MARKER).is_file():
        return
    if work.is_symlink() or not work.is_dir() or any(work.iterdir()):
        raise ValueError(f"{dest} holds a folder {WORK} that styleloom did not make: move it, or give another DEST")


def _refuse_indices_of_others(dest: Path, tars: Tars) -> None:
    """Raises ValueError if a file that is not ours has the name of an index: somebody's array, or the index of a data
    set in a folder below or above."""
    for name in tars.files:
        index = dest / f"{name}.npy"
        if os.path.lexists(index):
            raise ValueError(f"{index} is there already, and not of this data set: give another folder as DEST")


def _discard(dest: Path) -> None:
    """Removes the work folder, if it is ours. The marker goes last: a kill meanwhile leaves a folder that is known."""
    work = dest / WORK
    if not (work / _MARKER).is_file():
        return
    for path in work.iterdir():
        if path.name != _MARKER and not path.is_dir():
            path.unlink(missing_ok=True)
    shutil.rmtree(work)


def _own_report(dest: Path) -> IndexReport:
    try:
        return IndexReport.model_validate_json((dest / REPORT).read_bytes())
    except (OSError, ValidationError):
        raise ValueError(
            f"{dest} holds a {FILE} or {REPORT} that styleloom prepare --index-only did not write: "
            "say another folder for the index, as DEST"
        ) from None


def _recognise(dest: Path, plan: IndexPlan, report: IndexReport, tars: Tars) -> Indexed:
    """The outcome recorded in the complete data set `dest`. Raises ValueError if it is another one, or damaged."""
    again = f"To make it anew, delete {dest / FILE} (the tars stay) and run the same command."
    words = {"tars": "other tars, or of other sizes", "root": "the tars lie elsewhere"}
    differing = [name for name in IndexPlan.model_fields if getattr(report.plan, name) != getattr(plan, name)]
    if differing:
        there = [f"{name} is {getattr(report.plan, name)} there, {getattr(plan, name)} here" for name in differing]
        told = "; ".join(words.get(name, text) for name, text in zip(differing, there, strict=True))
        raise ValueError(f"{dest} is indexed already, but otherwise: {told}.\n{again}")
    manifest = read_manifest(dest)
    missing = next((shard.index for shard in manifest.shards if not (dest / shard.index).is_file()), None)
    if missing:
        raise ValueError(f"{dest / missing} is missing.\n{again}")
    if changed := _changed(dest, manifest, tars):
        raise ValueError(f"{changed} changed since it was indexed.\n{again}")
    _discard(dest)
    return Indexed(manifest, report, dest, already=True)


def _changed(dest: Path, manifest: Manifest, tars: Tars) -> Path | None:
    """The first local tar that is not the one that was indexed; read are only those touched after the manifest."""
    written = (dest / FILE).stat().st_mtime_ns
    for shard in manifest.shards:
        file = tars.files.get(shard.name)
        if file is None or file[1] < written:
            continue
        path = storage.local_path(storage.join(tars.root, shard.name))
        with open(path, "rb") as tar:
            if hashlib.file_digest(tar, "sha256").hexdigest() != shard.sha256:
                return path
    return None


def _sweep(dest: Path) -> None:
    """Removes what killed processes were writing, and nothing of others: tars may lie here."""
    for folder, _, names in os.walk(dest):
        for name in names:
            if _OURS.search(name) or (
                Path(folder) == dest / WORK and not name.endswith((".json", ".npy", _LOCK, _MARKER))
            ):
                (Path(folder) / name).unlink(missing_ok=True)


def _scan(tasks: list[Task], workers: int, progress: bool) -> None:
    """Reads all tars that have no valid record yet. How many images there are in all is estimated from those read."""
    todo, kept = [], 0
    for task in tasks:
        record = finished(task)
        kept += record.images if record else 0
        todo += [] if record else [task]
    read = len(tasks) - len(todo)
    with progress_bar(0, kept, "indexing", progress) as bar:

        def collect(record: Record) -> None:
            nonlocal read
            read += 1
            bar.total = max(bar.n, round(bar.n * len(tasks) / read))

        run(scan_tar, todo, workers, bar, collect)


def _finish(dest: Path, plan: IndexPlan, tasks: list[Task], wish: Wish, src: str) -> Indexed:
    """Decides what the images become, and puts the tars' records together into indices, report and manifest."""
    where = storage.shown(src) if storage.is_remote(src) else src
    kinds, records = _gather(tasks)
    if not kinds:
        _discard(dest)  # nothing in it is of use to another try
        raise ValueError(_nothing(records, tasks[0].reading.rules, where))
    agreed = agree(kinds, wish, where)
    number, names = _classes(records, tasks[0].reading, where)
    shards, counts, unlabelled = [], np.zeros(len(names), np.int64), 0
    for task, record in zip(tasks, records, strict=True):
        if record.images:
            rows = _numbered(load_rows(task), record, number)
            shards.append(_write_index(dest, record, rows))
            labels = rows[rows[:, 2] >= 0, 2]
            counts += np.bincount(labels, minlength=len(names))
            unlabelled += len(rows) - len(labels)
    manifest = _manifest(plan, agreed, names, counts.tolist(), shards)
    report = _report(plan, records, manifest, differences(kinds), unlabelled if names else 0)
    write_atomically(dest / REPORT, (report.model_dump_json(indent=1) + "\n").encode())
    write_manifest(manifest, dest)
    _discard(dest)
    return Indexed(manifest, report, dest, already=False)


def _gather(tasks: list[Task]) -> tuple[Counter[Kind], list[Record]]:
    """How many images of each kind there are, and the records of all tars without that, which may be long."""
    kinds: Counter[Kind] = Counter()
    records = []
    for task in tasks:
        record = finished(task)
        assert record is not None, f"the record of {task.tar} was removed while this ran"
        kinds.update(dict(record.kinds))
        records.append(record.model_copy(update={"kinds": []}))
    return kinds, records


def _nothing(records: Iterable[Record], rules: Rules, where: str) -> str:
    """What to say if there is no usable image."""
    left_out = next((one for record in records for one in record.left_out), None)
    if left_out:
        return f"no usable image in {where}; the first, {left_out.key} in {left_out.tar}: {left_out.reason}"
    fault = next((f"{record.tar}: {fault}" for record in records for fault in record.faults), "")
    suffixes = next((record.suffixes for record in records if record.suffixes), [])
    return f"no usable image in {where}; {fault}" if fault and not suffixes else no_image(where, suffixes, rules)


def _classes(records: list[Record], reading: Reading, where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Numbers of the labels, and names of the classes.

    Raises ValueError if a label is no class, or if labels were asked for and there are none.
    """
    texts = {text for record in records for text in record.labels}
    if reading.labels in ("auto", "none"):
        if reading.rules.label_field is not None and not texts:
            fields = next((record.fields for record in records if record.fields), [])
            raise ValueError(no_field(where, fields, reading.rules))
        return number_classes(texts, where)
    given = read_labels(Path(reading.labels))
    if not texts:
        raise ValueError(
            f"{reading.labels} names no sample of {where}: it has {next(iter(given), 'nothing')!r}, for instance; "
            "samples are named TAR/FILE, TAR/KEY, FILE or KEY"
        )
    # All of the file, so that other tars with the same file have the same numbers.
    every = {
        printable(class_text(printable(name), label, reading.labels))
        for name, label in given.items()
        if label is not None
    }
    return number_classes(texts | every, reading.labels)


def _numbered(rows: np.ndarray, record: Record, number: dict[str, int]) -> np.ndarray:
    """The rows of an index, from those of a record: [n, 4]."""
    numbers = np.array([number[text] for text in record.labels] + [-1], dtype=np.int64)
    return np.column_stack([rows[:, :2], numbers[rows[:, 2]], rows[:, 3]])


def _write_index(dest: Path, record: Record, rows: np.ndarray) -> Shard:
    index = dest / f"{record.tar}.npy"
    index.parent.mkdir(parents=True, exist_ok=True)
    array = io.BytesIO()
    np.save(array, rows)
    write_atomically(index, array.getvalue())
    return Shard(
        name=record.tar,
        count=record.images,
        bytes=record.bytes,
        sha256=record.sha256,
        index=f"{record.tar}.npy",
        index_sha256=hashlib.sha256(array.getvalue()).hexdigest(),
    )


def _manifest(
    plan: IndexPlan, agreed: Agreed, names: tuple[str, ...], counts: list[int], shards: list[Shard]
) -> Manifest:
    return Manifest.model_validate(
        {
            **agreed._asdict(),
            "root": plan.root,
            "quality": None,
            "class_names": list(names),
            "class_counts": counts,
            "count": sum(shard.count for shard in shards),
            "bytes": sum(shard.bytes for shard in shards),
            "shards": shards,
        }
    )


def _report(
    plan: IndexPlan, records: list[Record], manifest: Manifest, not_alike: list[str], unlabelled: int
) -> IndexReport:
    faults = [Fault(tar=record.tar, what=what) for record in records for what in record.faults]
    faults += [Fault(tar=record.tar, what="no usable image: left out") for record in records if not record.images]
    return IndexReport(
        plan=plan,
        images=manifest.count,
        unlabelled=unlabelled,
        not_alike=not_alike,
        without_image=sum(record.without_image for record in records),
        repeated_keys=sum(record.repeated_keys for record in records),
        left_out=[one for record in records for one in record.left_out],
        faults=faults,
    )
