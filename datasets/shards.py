"""Pictures -> tar shards in one or several sizes, an index beside each, a manifest, a report and a contact sheet.

Shard i holds the pictures [i * S, (i + 1) * S) of the source, less unreadable ones and exact duplicates. So every shard
can be made alone: in parallel, on other machines, again after an interruption, and with the same bytes however it was
run. A finished shard has a record in DEST/.prepare; it is written after the shard's files of all sizes are safely on
the disk under their names. What has no record is made anew. The manifests come last, then DEST/.prepare goes.

Smaller sizes lie in DEST/WIDTHxHEIGHT, each a data set of its own with the same shards, keys and labels.
"""

import io
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import contact
from .duplicates import describe, find_duplicates
from .manifest import FILE, WORK, Manifest, Shard, check_shard, read_manifest, write_atomically, write_manifest
from .parts import WHOLE, Part, clear, desk, holding, strange_file, sweep
from .pictures import Form, check_form
from .records import REPORT, Look, LookAlikes, Plan, Record, Report, compare, read_record
from .similar import NEAR, near_pairs
from .sources import Source
from .statistics import add_up
from .tars import printable
from .workers import Engine, local_engine, progress_bar
from .writer import Task, finished_record, make_shard, record_path, size_folders

DUPLICATES = ("drop", "keep")
_PLAN = "plan.json"
_PAIRS_REPORTED = 1000


class Prepared(NamedTuple):
    """The outcome of `prepare`."""

    manifest: Manifest
    report: Report
    already: bool
    """The data set was there, complete; nothing was done."""


class OthersMissing(Exception):  # noqa: N818 (it is no failure)
    """A part is made, and waits for others."""

    def __init__(self, part: Part, shards: int, missing: Sequence[int]) -> None:
        self.part, self.shards, self.missing = part, shards, missing
        super().__init__(f"part {part} is made; {len(missing)} of {shards} shards are still missing")

    @property
    def parts(self) -> list[int]:
        """The numbers of the parts to which missing shards belong."""
        return sorted({shard % self.part.of + 1 for shard in self.missing})


def prepare(
    source: Source,
    dest: str | os.PathLike[str],
    *,
    width: int,
    height: int,
    reduced: Sequence[tuple[int, int]] = (),
    channels: int = 3,
    codec: str = "png",
    quality: int | None = None,
    resize: str = "lanczos",
    background: str | None = "#ffffff",
    duplicates: str = "drop",
    shard_images: int = 1000,
    part: Part = WHOLE,
    workers: int = 1,
    cluster: AbstractContextManager[Engine] | None = None,
    progress: bool = True,
) -> Prepared:
    """Makes the data set `dest` from `source`, or completes it if the same call was interrupted.

    width, height: of the images, in pixels. reduced: (width, height) of smaller sizes, of the same aspect, to make
    besides. channels: 1 (grey), 3 (RGB), 4 (RGBA). codec: png, jpeg or webp; quality: 1 to 100, for jpeg and webp (95
    if None). resize: lanczos or box. background: #rrggbb, what transparent pictures are put on (without effect for 4
    channels). duplicates: drop or keep pictures whose files are the same as an earlier one's. shard_images: pictures of
    the source for each shard. part: which shards to make. workers: processes; cluster: what to use instead.

    Raises ValueError for what the caller must mend (contradicting options, `dest` belongs to something else, nothing is
    readable, a worker was killed) and OSError (a full disk). Whatever ends it, finished shards stay and count. Raises
    OthersMissing if the part is made but is not the last.
    """
    forms = _forms(Form(width, height, channels, codec, quality, resize, background), reduced)
    if shard_images < 1 or workers < 1:
        raise ValueError("--shard-images and --workers must be at least 1")
    if duplicates not in DUPLICATES:
        raise ValueError(f"--duplicates is one of {', '.join(DUPLICATES)}, not {duplicates}")
    plan = Plan(
        **asdict(forms[0]),
        reduced=[(form.width, form.height) for form in forms[1:]],
        duplicates=duplicates,
        shard_images=shard_images,
        images=len(source),
        source=source.digest,
        class_names=list(source.class_names),
    )
    dest = Path(dest).absolute()  # workers may have another current folder
    _refuse_foreign(dest, source)
    engine = nullcontext(local_engine(workers)) if cluster is None else cluster
    made = _recognise(dest, plan) or _make(source, dest, forms, plan, part, engine, progress)
    clear(dest, size_folders(dest, forms))
    return made


def _forms(form: Form, reduced: Sequence[tuple[int, int]]) -> tuple[Form, ...]:
    """The form of each size, the largest first. Raises ValueError if one contradicts itself or the others."""
    form = check_form(form)
    smaller = [check_form(replace(form, width=w, height=h)) for w, h in sorted(set(reduced), reverse=True)]
    for other in smaller:
        if other.width * form.height != form.width * other.height or other.width >= form.width:
            raise ValueError(
                f"the resolutions {form.width}x{form.height} and {other.width}x{other.height} differ in their aspect: "
                "prepare them one by one"
                if other.width < form.width
                else f"{other.width}x{other.height} is not smaller than {form.width}x{form.height}"
            )
    return form, *smaller


def _refuse_foreign(dest: Path, source: Source) -> None:
    """Raises ValueError unless `dest` is new, empty, or `prepare` made it or was at it."""
    inside, outside = dest.resolve(), source.root.resolve()
    if inside == outside or (source.root.is_dir() and outside in inside.parents):
        raise ValueError(f"{dest} is within the source {source.root}: choose a folder outside of it")
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"{dest} is a file: choose another folder")
    # Listed before the plan is looked for: another part may be writing it, and shards after it, just now.
    occupied = dest.exists() and any(path.name != WORK for path in dest.iterdir())
    begun = (dest / FILE).exists() or (dest / WORK / _PLAN).exists()
    if not begun and (stranger := strange_file(dest)):
        raise ValueError(f"{stranger} is not of styleloom prepare: choose another folder")
    if occupied and not begun:
        raise ValueError(f"{dest} is not empty and not a data set of this kind: choose another folder")


def _make(
    source: Source,
    dest: Path,
    forms: tuple[Form, ...],
    plan: Plan,
    part: Part,
    cluster: AbstractContextManager[Engine],
    progress: bool,
) -> Prepared:
    """Makes the part's missing shards, and the data set once all are there."""
    folders = size_folders(dest, forms)
    with ExitStack() as held:
        with desk(dest):
            if finished := _recognise(dest, plan):  # while this waited for the desk
                return finished
            _agree(dest, plan)
            held.enter_context(holding(dest, part))
            sweep(dest, folders, part)
            engine = held.enter_context(cluster)
            find = plan.duplicates == "drop"
            twins = find_duplicates(source, dest / WORK, engine, progress) if find else {}
        try:
            _make_shards(source, dest, forms, plan, part, twins, engine, progress)
        finally:
            sweep(dest, folders, part)  # a signal to the whole group kills workers before they can clean up
        with desk(dest):
            return _recognise(dest, plan) or _finish(source, dest, folders, plan, part, twins)


def _agree(dest: Path, plan: Plan) -> None:
    """Writes the plan down; or raises ValueError if another one was begun."""
    path = dest / WORK / _PLAN
    if path.exists():
        compare(read_record(path, Plan), plan, f"{dest} holds an unfinished prepare", dest)
    else:
        write_atomically(path, plan.model_dump_json(indent=1).encode())


def _recognise(dest: Path, plan: Plan) -> Prepared | None:
    """The outcome recorded in `dest` if it is complete. Raises ValueError if it is another data set, or damaged."""
    if not (dest / FILE).exists():
        return None
    manifest = read_manifest(dest)
    if manifest.foreign or not (dest / REPORT).exists():
        raise ValueError(f"{dest} is a data set already, of another origin: choose another folder")
    report = read_record(dest / REPORT, Report)
    compare(report.plan, plan, f"{dest} is a finished data set", dest)
    for folder, its in ((dest, manifest), *((dest / name, read_manifest(dest / name)) for name in manifest.reduced)):
        for shard in its.shards:
            check_shard(folder, shard)
    return Prepared(manifest, report, already=True)


def _make_shards(
    source: Source,
    dest: Path,
    forms: tuple[Form, ...],
    plan: Plan,
    part: Part,
    twins: dict[int, int],
    engine: Engine,
    progress: bool,
) -> None:
    """Makes all shards of the part that have no valid record yet."""
    folders = size_folders(dest, forms)
    for folder in folders:
        folder.mkdir(exist_ok=True)
    spans = [(start, min(start + plan.shard_images, len(source))) for start in range(0, len(source), plan.shard_images)]
    own = [i for i in range(len(spans)) if part.has(i)]
    todo = [i for i in own if finished_record(dest, i, folders) is None]
    tasks = []
    for i in todo:
        start, stop = spans[i]
        skipped = frozenset(k - start for k in range(start, stop) if k in twins)
        tasks.append(Task(i, source.part(start, stop), start, skipped, forms, dest))
    total = sum(stop - start for start, stop in (spans[i] for i in own))
    kept = total - sum(len(task.part) for task in tasks)
    with progress_bar(total, kept, "preparing", progress) as bar:
        engine(make_shard, tasks, bar)


def _finish(
    source: Source, dest: Path, folders: Sequence[Path], plan: Plan, part: Part, twins: dict[int, int]
) -> Prepared:
    """Puts the shards' records together into the report and the manifests."""
    records = _all_records(dest, folders, plan, part)
    kept = [record for record in records if record.shards]
    if not kept:
        shutil.rmtree(dest / WORK, ignore_errors=True)  # the next try will be with another source
        for folder in folders[1:]:
            folder.rmdir()
        first = next(picture for record in records for picture in record.unreadable)
        raise ValueError(f"none of the {plan.images} pictures could be read; the first, {first.source}: {first.reason}")
    labels = sum((Counter(record.labels) for record in records), Counter())
    described = Manifest(
        **plan.model_dump(include={"width", "height", "channels", "codec", "quality", "resize", "background"}),
        class_names=plan.class_names,
        class_counts=[labels[k] for k in range(len(plan.class_names))],
        **_files([record.shards[0] for record in kept]),
        reduced=[folder.name for folder in folders[1:]],
        statistics=add_up([record.census for record in kept if record.census]),
    )
    manifests = [described]
    for k, (width, height) in enumerate(plan.reduced, 1):
        its = {"width": width, "height": height, "reduced": [], **_files([record.shards[k] for record in kept])}
        manifests.append(described.model_copy(update=its))
    report = Report(
        plan=plan,
        read=sum(record.read for record in records),
        written=described.count,
        upscaled=sum(record.upscaled for record in records),
        profiles_ignored=sum(record.profiles_ignored for record in records),
        unreadable=[picture for record in records for picture in record.unreadable],
        duplicates=describe(source, twins),
        look_alikes=_look_alikes(source, records),
    )
    write_atomically(dest / REPORT, (report.model_dump_json(indent=1) + "\n").encode())
    for manifest, folder in reversed(list(zip(manifests[1:], folders[1:], strict=True))):
        write_manifest(manifest, folder)
    write_atomically(dest / contact.FILE, _png(described, dest, source.root.stem))
    write_manifest(described, dest)
    return Prepared(described, report, already=False)


def _all_records(dest: Path, folders: Sequence[Path], plan: Plan, part: Part) -> list[Record]:
    """The records of all shards. Raises OthersMissing if there are not all."""
    numbers = range(-(-plan.images // plan.shard_images))
    missing = [number for number in numbers if not record_path(dest, number).exists()]
    if not missing:
        records = {number: finished_record(dest, number, folders) for number in numbers}
        missing = [number for number, record in records.items() if record is None]
        if not missing:
            return [record for record in records.values() if record is not None]
    raise OthersMissing(part, len(numbers), missing)


def _files(shards: list[Shard]) -> dict:
    """The fields of a manifest that follow from its shards."""
    return {
        "count": sum(shard.count for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "shards": shards,
    }


def _look_alikes(source: Source, records: Sequence[Record]) -> LookAlikes:
    hashes = [hash_ for record in records for hash_ in record.likenesses]
    places = np.array([i for i, hash_ in enumerate(hashes) if hash_ is not None], np.int64)
    found = near_pairs(np.array([hash_ for hash_ in hashes if hash_ is not None], np.uint64))
    first = [
        Look(sources=(printable(source.entries[i].name), printable(source.entries[j].name)), bits=bits)
        for i, j, bits in (
            (int(places[a]), int(places[b]), int(bits)) for a, b, bits in found.pairs[:_PAIRS_REPORTED].tolist()
        )
    ]
    return LookAlikes(within=NEAR, pairs=len(found.pairs), complete=found.complete, first=first)


def _png(manifest: Manifest, folder: Path, title: str) -> bytes:
    file = io.BytesIO()
    contact.contact_sheet(manifest, folder, title).save(file, "PNG")
    return file.getvalue()
