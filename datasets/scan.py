"""One tar that others wrote -> a record of the images in it. It is read once, from front to back, and stays as it is.

Only the headers of the images are looked at: whether an image decodes shows when it is used.
"""

import contextlib
import functools
import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from . import pictures, storage
from .labels import class_text, read_labels
from .manifest import INDEX_COLUMNS, content_hash, write_atomically
from .sources import UNLABELLED
from .tars import (
    Member,
    Rules,
    Sample,
    TarReader,
    brings_label,
    fields_of,
    image_of,
    label_of,
    may_be_image,
    printable,
    refuse_compressed,
    split_name,
)
from .workers import Tick

_CODECS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
_PNG_DEPTH = 24  # where a PNG has its bits a channel
# Without one of these a PNG is upright; to make sure, Pillow would decode it.
_PNG_TURNED = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_SRGB_TOLERANCE = 2  # of 255: profiles called sRGB differ from one another by rounding


class Kind(NamedTuple):
    """What an image is, as far as its header tells."""

    codec: str
    """jpeg, png, webp, or the name of another format."""
    channels: int
    """1, 3 or 4; 0 for pixels of another kind."""
    width: int
    """Pixels, upright."""
    height: int
    obstacle: str
    """Why its pixels cannot be taken as they are decoded, such as "turned by EXIF"; empty if they can."""


def judge(data: bytes) -> Kind:
    """The kind of an encoded image. Raises ValueError, with the reason, if it is none that pictures.py reads."""
    try:
        # Ignored are Pillow's remarks on odd metadata and on large pictures.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=pictures._FORMATS) as image,
        ):
            if image.mode == "F":
                raise ValueError("floating-point pixels, whose range nothing says")
            return _kind(image, data)
    except MemoryError:
        raise  # of this machine, not of this image
    except Image.UnidentifiedImageError:
        raise ValueError("empty file" if not data else "not a picture in a known format") from None
    except Exception as error:  # broken bytes show in errors of every kind
        raise ValueError(f"{error}" or type(error).__name__) from None


def _kind(image: Image.Image, data: bytes) -> Kind:
    codec = _CODECS.get(image.format or "", f"{image.format}".lower())
    turn = _orientation(image, data)
    # (Pillow gives the size of a turned TIFF upright already.)
    width, height = image.size[::-1] if turn >= 5 and codec != "tiff" else image.size
    obstacles = {
        f"stored as {image.format}": codec not in _CODECS.values(),
        f"of mode {image.mode}": image.mode not in _CHANNELS,
        "of 16 bits a channel": codec == "png" and data[_PNG_DEPTH] == 16,
        "with a transparent colour": image.mode in ("L", "RGB") and image.has_transparency_data,
        "turned by EXIF": turn != 1,
        "with a colour profile other than sRGB": not _is_srgb(image.info.get("icc_profile"), image.mode),
    }
    found = next((what for what, there in obstacles.items() if there), "")
    return Kind(codec, _CHANNELS.get(image.mode, 0), width, height, found)


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1 (upright) if nothing is said."""
    if image.format == "PNG" and not any(mark in data for mark in _PNG_TURNED):
        return 1
    try:
        turn = image.getexif().get(pictures._ORIENTATION_TAG)
    except Exception:  # a broken EXIF block says nothing about the orientation
        return 1
    return turn if turn in pictures._UPRIGHT else 1


@functools.lru_cache(maxsize=32)
def _is_srgb(profile: bytes | None, mode: str) -> bool:
    """Whether converting from a profile to sRGB, as pictures.py would, changes nothing."""
    if not profile or mode not in _CHANNELS:
        return True
    values = np.linspace(0, 255, 9).astype(np.uint8)
    colours = values if mode == "L" else np.stack(np.meshgrid(values, values, values), axis=-1)
    image = Image.fromarray(colours.reshape(1, -1) if mode == "L" else colours.reshape(1, -1, 3))
    turned, ignored = pictures._to_srgb(image, profile)
    if ignored:
        return True
    difference = np.asarray(turned, np.int16) - np.asarray(image.convert("RGB"), np.int16)
    return bool(np.abs(difference).max() <= _SRGB_TOLERANCE)


class LeftOut(BaseModel):
    """A sample that is not in the index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tar: str
    key: str
    reason: str


class Record(BaseModel):
    """What is in one tar. Beside it lies an array of its images, as in an index, but with the places of the labels in
    `labels` instead of class numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tar: str
    """Its name below the root."""
    file: tuple[int, int] | None
    """As in its task."""
    reading: str
    """Identifies the rules by which it was read."""
    bytes: int
    sha256: str
    images: int
    """In the array."""
    array_sha256: str
    """Of the array's file: after a kill between the two writes it may be newer than the record."""
    labels: list[str]
    """The different labels."""
    kinds: list[tuple[Kind, int]]
    """Images of each kind."""
    without_image: int
    """Samples in which there is none."""
    repeated_keys: int
    """Samples whose key an earlier one has."""
    left_out: list[LeftOut]
    faults: list[str]
    """What is wrong with the tar as a whole."""
    suffixes: list[str]
    """Of the first sample's members."""
    fields: list[str]
    """Of the first .json."""


@dataclass(frozen=True)
class Reading:
    """How tars are read: what their records depend on."""

    rules: Rules
    labels: str
    """auto, none, or the path of a file."""
    labels_sha256: str = ""
    """Of that file."""

    @property
    def digest(self) -> str:
        """Identifies it."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()

    def wants(self, suffix: str) -> bool:
        """Whether the bytes of a member are needed."""
        return may_be_image(suffix, self.rules) or (self.labels == "auto" and brings_label(suffix))


@dataclass(frozen=True)
class Task:
    """One tar to read."""

    tar: str
    """Its name below the root."""
    location: str
    """Path or URL."""
    file: tuple[int, int] | None
    """(bytes, time of its last change in ns) as listed; None for a remote one."""
    reading: Reading
    work: Path
    """Folder for the record."""

    @property
    def record(self) -> Path:
        """Where its record lies; the array is beside it, as .npy."""
        return self.work / f"{hashlib.sha256(self.tar.encode()).hexdigest()[:32]}.json"


def finished(task: Task) -> Record | None:
    """The record of a tar, if it is there, whole, and of the same tar, read in the same way."""
    try:
        record = Record.model_validate_json(task.record.read_bytes())
        data = task.record.with_suffix(".npy").read_bytes()
        rows = np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, EOFError, ValueError):
        return None
    there = (record.tar, record.file, record.reading, record.array_sha256)
    same = there == (task.tar, task.file, task.reading.digest, hashlib.sha256(data).hexdigest())
    return record if same and rows.shape == (record.images, INDEX_COLUMNS) else None


def load_rows(task: Task) -> np.ndarray:
    """int64 [images, 4] = (offset, length, place of the label in the record's labels or -1, hash)."""
    return np.load(task.record.with_suffix(".npy"), allow_pickle=False)


def scan_tar(task: Task, tick: Tick) -> Record:
    """Reads one tar and puts its record down. Calls `tick` after each sample.

    Raises ValueError if it is compressed, a sample has several pictures, or a label is no class; OSError if it cannot
    be read.
    """
    tally = _Tally(task)
    with _here(task) as path:
        refuse_compressed(path, task.location)
        with open(path, "rb") as file:
            tar = TarReader(file, task.reading.rules.keys, task.reading.wants, hashed=True)
            for sample in tar:
                tally.add(sample)
                tick()
            sha256 = tar.finish()
        size = path.stat().st_size
    array = io.BytesIO()
    np.save(array, np.array(tally.rows, dtype=np.int64).reshape(-1, INDEX_COLUMNS))
    record = tally.record(tar, size, sha256, hashlib.sha256(array.getvalue()).hexdigest())
    write_atomically(task.record.with_suffix(".npy"), array.getvalue())
    write_atomically(task.record, record.model_dump_json().encode())
    return record


@contextlib.contextmanager
def _here(task: Task) -> Iterator[Path]:
    """The tar as a local file; of a remote one a copy, for as long as it is read."""
    if not storage.is_remote(task.location):
        yield storage.local_path(task.location)
        return
    copy = task.record.with_suffix(".tar")
    try:
        storage.fetch(task.location, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


class _Tally:
    """Collects what is in one tar."""

    def __init__(self, task: Task) -> None:
        self.task, self.reading = task, task.reading
        by_file = task.reading.labels not in ("auto", "none")
        self.given = _given(task.reading.labels, task.reading.labels_sha256) if by_file else None
        self.rows: list[tuple[int, int, int, int]] = []
        self.labels: dict[str, int] = {}
        self.kinds: Counter[Kind] = Counter()
        self.keys: set[str] = set()
        self.samples = self.without_image = 0
        self.left_out: list[LeftOut] = []
        self.suffixes: list[str] = []
        self.fields: list[str] = []

    def add(self, sample: Sample) -> None:
        self.samples += 1
        self.keys.add(sample.key)
        self.suffixes = self.suffixes or [printable(member.suffix) for member in sample.members]
        self.fields = self.fields or list(map(printable, fields_of(sample)))
        image = image_of(sample, self.reading.rules, self.task.location)
        if image is None:
            self.without_image += 1
            return
        assert image.data is not None
        try:
            kind = judge(image.data)
        except ValueError as error:
            self.leave_out(sample.key, f"{error}")
            return
        self.kinds[kind] += 1
        self.rows.append((image.offset, image.size, self.label(sample, image), content_hash(image.data)))

    def label(self, sample: Sample, image: Member) -> int:
        """The place of a sample's label among `labels`."""
        if self.reading.labels == "none":
            return UNLABELLED
        label = label_of(sample, image, self.task.tar, self.reading.rules, self.given)
        if label is None:
            return UNLABELLED
        origin = self.task.location if self.given is None else self.reading.labels
        text = printable(class_text(printable(image.name), label, origin))
        return self.labels.setdefault(text, len(self.labels))

    def leave_out(self, key: str, reason: str) -> None:
        self.left_out.append(LeftOut(tar=self.task.tar, key=printable(key), reason=printable(reason)))

    def record(self, tar: TarReader, size: int, sha256: str, array_sha256: str) -> Record:
        for name, what in tar.skipped:
            key, suffix = split_name(name, self.reading.rules.keys) or (name, "")
            if may_be_image(suffix, self.reading.rules):
                self.leave_out(key, f"{name} is {what}")
        if tar.lost:
            self.leave_out(tar.lost, "the tar is damaged or ends there")
        faults = [printable(fault) for fault in (*tar.faults, *tar.remarks)]
        return Record(
            tar=self.task.tar,
            file=self.task.file,
            reading=self.reading.digest,
            bytes=size,
            sha256=sha256,
            images=len(self.rows),
            array_sha256=array_sha256,
            labels=list(self.labels),
            kinds=list(self.kinds.items()),
            without_image=self.without_image,
            repeated_keys=self.samples - len(self.keys),
            left_out=self.left_out,
            faults=faults,
            suffixes=self.suffixes,
            fields=self.fields,
        )


@functools.lru_cache(maxsize=1)
def _given(path: str, sha256: str) -> Mapping[str, object]:
    """The labels in a file, read once in each process."""
    return read_labels(Path(path))
