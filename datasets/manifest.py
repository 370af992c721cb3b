"""The typed description of a shard set: which tars it has, what is in them, and how the pictures were made.

What concerns a single sample (where its image lies in the tar, its label and a hash of its bytes) is not in
`manifest.json` but in one `.npy` for each tar, so that reading a manifest costs memory by the shard, not by the sample:
10^9 samples are 10^6 shards, and a process opens the indices of only the shards it is reading from.

The tars of a set that `styleloom prepare` wrote lie beside the manifest, and all images have the form it states. A set
that others wrote (`prepare --index-only`) stays where and as it is: `root` says where the tars lie, and `conform` that
the images have other sizes or kinds, to be brought into the form as they are read.
"""

import hashlib
import json
import os
import posixpath
import secrets
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, Literal, Self

import numpy as np
import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from . import storage

FILE = "manifest.json"
WORK = ".prepare"  # the folder of work files that an unfinished `styleloom prepare` leaves in the data set
TEMPORARY = ".tmp"  # how the names of files end that are being written

_SHA256 = r"^[0-9a-f]{64}$"
INDEX_COLUMNS = 4


def _within(name: str) -> str:
    """A manifest that came from elsewhere must not point outside its own folder."""
    parts = PurePosixPath(name).parts
    # A colon begins a place elsewhere, two of them a place within a place (fsspec's chains).
    if not parts or name.startswith("/") or ".." in parts or set("\\\0") & set(name) or "::" in name or ":" in parts[0]:
        raise ValueError(f"{name!r} is not a path within the data set")
    return name


def _passive(root: str) -> str:
    """A manifest that came from elsewhere must run nothing: it may name folders, and places that are only read."""
    if "::" in root or (storage.is_remote(root) and not root.lower().startswith(storage.PASSIVE)):
        raise ValueError(f"a manifest's tars are in a folder or at {', '.join(storage.PASSIVE)}, not at {root!r}")
    return root


_Tar = Annotated[str, Field(pattern=r"\.(?i:tar)$"), AfterValidator(_within)]
_Npy = Annotated[str, Field(pattern=r"\.npy$"), AfterValidator(_within)]


class Shard(BaseModel):
    """One tar of samples and the index beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: _Tar
    """Path of the tar, with forward slashes, below the manifest's `root`."""
    count: int = Field(gt=0)
    """Samples in it."""
    bytes: int = Field(gt=0, lt=2**63)
    """Size of the tar."""
    sha256: str = Field(pattern=_SHA256)
    """Of the tar, in hex."""
    index: _Npy
    """Path of the index, in the manifest's folder: int64 [count, 4] = (offset of the image's bytes in the tar, their
    length, label or -1, `content_hash`)."""
    index_sha256: str = Field(pattern=_SHA256)
    """Of the index file, in hex."""

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.count * 512 > self.bytes:  # a header for each: broken numbers are not to fill the memory
            raise ValueError(f"{self.bytes} bytes do not hold {self.count} samples")
        return self


class Spread(BaseModel):
    """How a positive number is spread over the pictures that a data set was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    least: float
    most: float
    histogram: dict[int, int]
    """Pictures by the number's logarithm in eighths of an octave: floor(8 * log2(x)) -> how many."""


class Statistics(BaseModel):
    """What the pictures that a data set was made from were like, and what the images are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Spread
    """Of the pictures, upright, in pixels."""
    height: Spread
    aspect: Spread
    """Width / height."""
    formats: dict[str, int]
    """Pictures of each format, such as JPEG."""
    mean_colour: list[float]
    """Of the images, one number for each channel, 0 to 255: of up to 256 x 256 evenly spaced pixels of each, in the
    smallest size that was made."""
    std_colour: list[float]
    """Standard deviation over the same pixels, for each channel, 0 to 255."""


class Manifest(BaseModel):
    """A whole shard set. All images have the same size and channels, as they are or (`conform`) once they are read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["styleloom-shards-2"] = "styleloom-shards-2"
    root: Annotated[str, AfterValidator(_passive)] = ""
    """Folder or URL below which the tars lie; empty: beside this file."""
    width: int = Field(gt=0, lt=2**14)
    """Pixels."""
    height: int = Field(gt=0, lt=2**14)
    """Pixels."""
    channels: Literal[1, 3, 4]
    """Grey, RGB or RGBA."""
    codec: Literal["png", "jpeg", "webp", "mixed"]
    """Of the images as they are stored; mixed: each says so itself."""
    quality: int | None
    """Of the codec, 1 to 100; None is lossless, or unknown where `resize` is."""
    resize: Literal["lanczos", "box", "unknown"]
    """The filter that brought the pictures to this size. It shows in the metrics, so it is recorded. Unknown: others
    did that."""
    conform: bool = False
    """The stored images have other sizes or kinds: reading brings each into this form (pictures.py)."""
    crop: Literal["center"] = "center"
    background: str | None
    """The colour that transparent pictures were composited on, such as "#ffffff"; None where alpha was kept."""
    class_names: list[str]
    """Name of each label, by its number; empty when there are no labels."""
    class_counts: list[int]
    """Samples of each label. Samples without one (in sets that others wrote) are in none of them."""
    count: int = Field(gt=0)
    """Samples in all shards."""
    bytes: int = Field(gt=0)
    """Size of all tars."""
    reduced: list[Annotated[str, Field(pattern=r"^[0-9]+x[0-9]+$")]] = []
    """Folders in this one with the same samples, keys and shards at smaller sizes, each a data set of its own."""
    statistics: Statistics | None = None
    shards: list[Shard] = Field(min_length=1)

    @model_validator(mode="after")
    def _totals_agree(self) -> Self:
        if self.count != sum(shard.count for shard in self.shards):
            raise ValueError("count is not the sum over the shards")
        if self.bytes != sum(shard.bytes for shard in self.shards):
            raise ValueError("bytes is not the sum over the shards")
        if len(self.class_counts) != len(self.class_names):
            raise ValueError("class_names and class_counts differ in length")
        if sum(self.class_counts) > self.count:
            raise ValueError("class_counts add up to more than count")
        return self

    @property
    def classes(self) -> int:
        """Number of classes; 0 when the samples have no labels."""
        return len(self.class_names)

    @property
    def foreign(self) -> bool:
        """Whether others wrote the tars (`prepare --index-only`)."""
        return self.conform or self.resize == "unknown"

    @property
    def hash(self) -> str:
        """sha256 in hex of the canonical JSON: the identity of the data set, as checkpoints record it.

        Where the tars lie, and what is told of the pictures, does not count.
        """
        identity = self.model_dump(mode="json", exclude={"root", "reduced", "statistics"})
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of the data set in `folder`: a path, or a remote place as in storage.py.

    Raises OSError if a remote one cannot be reached. Raises ValueError, naming the remedy, if there is none, if
    `styleloom prepare` has not finished, or if it is unreadable.
    """
    if storage.is_remote(folder):
        path = storage.join(folder, FILE)
        try:
            text = storage.read(path)
        except FileNotFoundError as error:
            raise ValueError(f"there is no data set at {storage.shown(os.fspath(folder))}: {error}") from None
        return _parse_manifest(text, storage.shown(path), "Copy the data set there anew.")
    folder = storage.local_path(folder)
    path = folder / FILE
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(_no_manifest(folder)) from None
    return _parse_manifest(
        text, path, f"Restore it, or delete {folder} (of tars of others: only {path}) and prepare it again."
    )


def _parse_manifest(text: bytes, path: Path | str, remedy: str) -> Manifest:
    if not text.strip():
        raise ValueError(f"{path} is empty. {remedy}")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise ValueError(
            f"{path} is not a manifest that this version reads ({where + ': ' if where else ''}{fault['msg']}). "
            f"{remedy}"
        ) from None


def _no_manifest(folder: Path) -> str:
    if not folder.exists():
        return f"there is no data set at {folder}: make one with styleloom prepare SRC {folder}"
    if (folder / WORK).is_dir():
        return (
            f"{folder} is half-written: its styleloom prepare was interrupted. "
            "Run the same prepare again: it continues where it stopped."
        )
    return f"{folder} is not a data set: no {FILE}; make one with styleloom prepare SRC DEST"


def write_manifest(manifest: Manifest, folder: str | os.PathLike[str]) -> None:
    """Writes `manifest.json` into `folder`: whole or not at all, also across a power cut. Raises OSError."""
    write_atomically(Path(folder) / FILE, (manifest.model_dump_json(indent=1) + "\n").encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Puts `data` at `path` as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which appears at `path` when the block ends: whoever reads sees the old or the new whole.

    Raises OSError naming `path` (a full disk, no permission). After any error nothing is left of the new file.
    """
    # Nobody else writes into it: neither a dying worker of a killed run, nor a process of another machine.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        named = getattr(error, "filename", None)  # of another file, if the block was about that
        if isinstance(error, OSError) and error.errno is not None and named in (None, temporary, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` last over a power cut. Does nothing where folders cannot be opened (Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_locks: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked process: what reads data must not keep a lock for a process that was killed."""
    for file in list(_locks):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(path: Path, complaint: str, wait: bool = False) -> Iterator[None]:
    """Holds a lock file; if another process does, waits for it or raises ValueError(complaint).

    However a process ends, the system frees its lock: processes that it has forked do not hold it. Without effect on
    Windows.
    """
    with open(path, "wb") as file:
        _locks.add(file)
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise ValueError(complaint) from None
        yield


def tar_location(folder: str | os.PathLike[str], manifest: Manifest, shard: Shard) -> str:
    """Path or URL of a shard's tar. `folder` is where the manifest is: a relative `root` begins there."""
    root = manifest.root
    if storage.is_remote(root) or os.path.isabs(root):
        return storage.join(root, shard.name)
    return storage.join(folder, posixpath.join(root, shard.name))


def load_index(folder: str | os.PathLike[str], shard: Shard) -> np.ndarray:
    """The index of a shard: int64 [count, 4] = (offset of the image's bytes in the tar, their length, label or -1,
    their `content_hash`).

    Raises ValueError if it is missing, unreadable or does not fit the shard.
    """
    path = Path(folder) / shard.index
    try:
        with open(path, "rb") as file:
            return parse_index(file, shard, path, _remedy(folder, shard))
    except OSError as error:
        raise ValueError(f"cannot read the index {path} of {shard.name} ({error}). {_remedy(folder, shard)}") from None


def index_bytes(shard: Shard) -> int:
    """Size of a shard's index file: NumPy's header and 8 bytes a number."""
    return 128 + 8 * INDEX_COLUMNS * shard.count


def parse_index(file: BinaryIO, shard: Shard, path: Path, remedy: str) -> np.ndarray:
    """The index in a file, as `load_index` returns it. path and remedy: for the message.

    Raises ValueError if it is unreadable or does not fit the shard.
    """
    try:
        index = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read the index {path} of {shard.name} ({error}). {remedy}") from None
    if index.dtype != np.int64 or index.shape != (shard.count, INDEX_COLUMNS):
        raise ValueError(
            f"the index {path} holds {index.dtype} {list(index.shape)} instead of int64 [{shard.count}, "
            f"{INDEX_COLUMNS}]: "
            f"it changed after the manifest was written. {remedy}"
        )
    offsets, lengths = index[:, 0], index[:, 1]
    if (offsets < 0).any() or (lengths <= 0).any() or (offsets > shard.bytes - lengths).any():
        raise ValueError(f"the index {path} points outside {shard.name}. {remedy}")
    return index


def at_size(
    folder: str | os.PathLike[str], manifest: Manifest, reduce: int
) -> tuple[str | os.PathLike[str], Manifest, int]:
    """(folder, manifest, reduce) of the set to read for images at 1/reduce of the size: the one that was prepared at
    that size, if there is one, and then nothing is left to reduce.

    Raises as `read_manifest` does, and ValueError if that set is not the same at another size.
    """
    name = f"{manifest.width // reduce}x{manifest.height // reduce}"
    if reduce == 1 or name not in manifest.reduced:
        return folder, manifest, reduce
    place = storage.subfolder(folder, name)
    smaller = read_manifest(place)
    differing = [side for side in ("width", "height") if getattr(smaller, side) != getattr(manifest, side) // reduce]
    differing += differences(manifest, smaller)
    if differing:
        raise ValueError(f"{place} is not the same data set at {name}: its {', '.join(differing)} differ")
    return place, smaller, 1


def differences(a: Manifest, b: Manifest) -> list[str]:
    """What tells two data sets apart that should be one at two sizes; empty if nothing does.

    A position of the stream stands for the same sample in both only if they have the same counts, shard by shard.
    """
    differing = [name for name in ("channels", "class_names", "class_counts") if getattr(a, name) != getattr(b, name)]
    if [shard.count for shard in a.shards] != [shard.count for shard in b.shards]:
        differing.append("shards' counts")
    return differing


def content_hash(data: bytes) -> int:
    """What an index holds of an image's bytes, to notice any change of them: XXH3 (64 bits), as a signed number.

    Not against forgery (sha256 of the whole shard is); it costs a hundredth of decoding the image.
    """
    value = xxhash.xxh3_64_intdigest(data)
    return value - (1 << 64) if value >> 63 else value


def check_shard(folder: str | os.PathLike[str], shard: Shard, tar: str = "") -> None:
    """A check that costs two `stat`, for the start of a training run: the files are there and the tar has its size.

    tar: its path, where it does not lie in `folder`.

    Raises ValueError naming the shard and the remedy.
    """
    folder, path = Path(folder), Path(tar or Path(folder) / shard.name)
    if not path.is_file():
        raise ValueError(f"{path} is missing, though the manifest lists it. {_remedy(folder, shard)}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise ValueError(
            f"{path} has {size} bytes, the manifest says {shard.bytes}: "
            f"it changed after the manifest was written. {_remedy(folder, shard)}"
        )
    if not (folder / shard.index).is_file():
        raise ValueError(f"{folder / shard.index}, the index of {shard.name}, is missing. {_remedy(folder, shard)}")


def _remedy(folder: str | os.PathLike[str], shard: Shard) -> str:
    foreign = shard.index == f"{shard.name}.npy"  # as `prepare --index-only` calls it; ours have other names
    what = f"{Path(folder) / FILE} (not the tars)" if foreign else f"{folder}"
    return f"Restore it, or delete {what} and prepare it again; styleloom inspect {folder} --verify lists every fault."
