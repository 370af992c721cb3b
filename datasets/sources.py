"""Where pictures come from: a folder, a zip, or WebDataset tars -> (name, label, bytes) in a stable order.

The order is that of the names, so it depends neither on the file system nor on how the archive was written. Labels are
class numbers 0, 1, 2, ...; where a source names its classes in words, the sorted words are numbered.
"""

import csv
import functools
import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
LABELS = "dataset.json"  # the file of labels in the zips and folders of stylegan2-ada and stylegan3
UNLABELLED = -1

_COMPRESSED_TARS = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MOST_CLASSES = 1_000_000
_WHOLE = re.compile(r"-?[0-9]{1,18}$")
_FRACTION = re.compile(r"[+-]?[0-9]*\.[0-9]+(e[+-]?[0-9]+)?$", re.IGNORECASE)


class Entry(NamedTuple):
    """One picture of a source."""

    name: str
    """Path within the source, with forward slashes; in tars TAR/MEMBER."""
    size: int
    """Bytes of the encoded picture."""
    label: int = UNLABELLED
    """Class number, or -1."""
    archive: str = ""
    """Tars only: path of the tar."""
    offset: int = 0
    """Tars only: where in the tar the bytes begin."""


@dataclass(frozen=True)
class Source(ABC):
    """A sorted list of pictures. It can be pickled to other processes, which open the files themselves."""

    root: Path
    entries: Sequence[Entry]
    class_names: tuple[str, ...] = ()
    """The name of each label, by its number; empty without labels."""

    def __len__(self) -> int:
        return len(self.entries)

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The encoded bytes of picture `i`.

        Raises OSError if the source as a whole cannot be read (any more), and errors of any other kind if it is only
        this picture.
        """

    def part(self, start: int, stop: int) -> Self:
        """The pictures [start, stop) as a source of their own: what a worker needs, and no more."""
        return replace(self, entries=self.entries[start:stop])

    @property
    def digest(self) -> str:
        """sha256 in hex of all names, sizes and labels: says whether a source is still the same."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(f"{entry.name}\0{entry.size}\0{entry.label}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class FolderSource(Source):
    """Picture files in a folder and its sub-folders."""

    def read(self, i: int) -> bytes:
        try:
            return (self.root / self.entries[i].name).read_bytes()
        except OSError as error:
            if not self.root.is_dir():
                raise
            raise ValueError(error.strerror) from None


class ZipSource(Source):
    """Picture files in a zip."""

    def read(self, i: int) -> bytes:
        return _open_zip(str(self.root), os.getpid()).read(self.entries[i].name)


class TarSource(Source):
    """The samples of WebDataset tars: of each its first picture."""

    def read(self, i: int) -> bytes:
        entry = self.entries[i]
        with open(entry.archive, "rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
        if len(data) != entry.size:
            raise ValueError(f"{entry.archive} ends within it")
        return data


def open_source(path: str | os.PathLike[str], labels: str = "auto") -> Source:
    """Lists the pictures of a folder, a .zip, a .tar or a folder of .tar, and gives each its label.

    labels: "auto" (dataset.json in a folder or zip; `.cls` or the "label" of `.json` in tars; otherwise none), "none",
    "folders" (the top-level folder is the class), or a file: .json as in stylegan2-ada, or .csv with name,label.

    Raises ValueError if there is nothing, if the source cannot be read, or if labels are not classes or are missing.
    """
    root = Path(path).absolute()  # workers may have another current folder
    if not root.exists():
        raise ValueError(f"there is no {root} to take pictures from")
    source, found = _list(root, with_labels=labels == "auto")
    if not source.entries:
        raise ValueError(f"no pictures in {root}: looked for {', '.join(SUFFIXES)} and, in folders, for .tar")
    if labels == "none":
        return source
    if labels == "auto":
        return _label(source, found, f"{root}") if found is not None else source
    if labels == "folders":
        return _label(source, _folder_labels(source), "the folders", named=True)
    return _label(source, _read_labels(Path(labels)), labels)


def _list(root: Path, with_labels: bool) -> tuple[Source, Mapping[str, object] | None]:
    """The unlabelled source at `root`, and the labels that it brings, by name."""
    if root.is_dir():
        files = _walk(root)
        pictures = [name for name in files if name.lower().endswith(SUFFIXES)]
        tars = [name for name in files if name.lower().endswith((".tar", *_COMPRESSED_TARS))]
        if pictures and tars:
            raise ValueError(
                f"{root} holds both pictures ({pictures[0]}) and tars ({tars[0]}): move one kind elsewhere"
            )
        if tars:
            return _list_tars(root, root, tars, with_labels)
        found = _parse_labels((root / LABELS).read_bytes(), root / LABELS) if with_labels and LABELS in files else None
        return FolderSource(root, [Entry(name, _size(root / name)) for name in pictures]), found
    suffix = root.name.lower()
    if suffix.endswith(".zip"):
        return _list_zip(root, with_labels)
    if suffix.endswith((".tar", *_COMPRESSED_TARS)):
        return _list_tars(root, root.parent, [root.name], with_labels)
    raise ValueError(f"{root} is neither a folder, a .zip nor a .tar")


def _walk(root: Path) -> list[str]:
    """Names of all files below `root`, relative, sorted; links to folders are followed, but not in circles."""
    names = []
    todo = [(str(root), frozenset({os.path.realpath(root)}))]
    while todo:
        folder, above = todo.pop()
        with os.scandir(folder) as items:
            for item in items:
                if item.is_dir():
                    real = os.path.realpath(item.path)
                    todo += [(item.path, above | {real})] if real not in above else []
                elif item.is_file() or item.is_symlink():  # a link to nothing is listed, to be reported as unreadable
                    names.append(Path(item.path).relative_to(root).as_posix())
    return sorted(name for name in names if not _hidden(name))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it will fail too, and is reported then


def _hidden(name: str) -> bool:
    """Whether it is a hidden file, lies in a hidden folder, or is what macOS adds to archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _list_zip(root: Path, with_labels: bool) -> tuple[Source, Mapping[str, object] | None]:
    try:
        with zipfile.ZipFile(root) as archive:
            names = sorted({name for name in archive.namelist() if not name.endswith("/") and not _hidden(name)})
            pictures = [archive.getinfo(name) for name in names if name.lower().endswith(SUFFIXES)]
            found = _parse_labels(archive.read(LABELS), root / LABELS) if with_labels and LABELS in names else None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{root} is not a whole zip: {error}") from None
    locked = next((picture.filename for picture in pictures if picture.flag_bits & 1), None)
    if locked:
        raise ValueError(f"{root} is encrypted ({locked}): unpack it and give the folder")
    return ZipSource(root, [Entry(picture.filename, picture.file_size) for picture in pictures]), found


@functools.lru_cache(maxsize=2)
def _open_zip(path: str, pid: int) -> zipfile.ZipFile:
    """The zip, opened once in each process: a handle shared over a fork would share its position too."""
    return zipfile.ZipFile(path)


def _list_tars(
    root: Path, folder: Path, tars: Sequence[str], with_labels: bool
) -> tuple[Source, Mapping[str, object] | None]:
    entries: list[Entry] = []
    found: dict[str, object] = {}
    for tar in tars:
        path = folder / tar
        for _, members in tar_samples(path):
            picture = next((member for member in members if member.name.lower().endswith(SUFFIXES)), None)
            if picture is None or _hidden(picture.name):
                continue
            name = f"{tar}/{picture.name}"
            entries.append(Entry(name, picture.size, archive=str(path), offset=picture.offset))
            label = _member_label(path, members) if with_labels else None
            if label is not None:
                found[name] = label
    # Stable: samples of one name (which tars allow) stay as they lie in the tar.
    return TarSource(root, sorted(entries, key=lambda entry: entry.name)), found or None


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    """Where its bytes begin."""
    size: int


def tar_samples(path: Path) -> Iterator[tuple[str, list[Member]]]:
    """The samples of an uncompressed tar as webdataset groups them: (key, its consecutive members).

    Reads the headers only. Raises ValueError if the tar is compressed, damaged or cut off.
    """
    _refuse_compressed(path)
    key, members = None, []
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  (tarfile would keep every header)
                name = info.name.removeprefix("./")
                folder, _, base = name.rpartition("/")
                stem = base.partition(".")[0]
                if not info.isreg() or not stem:
                    continue
                this = f"{folder}/{stem}" if folder else stem
                if this != key:
                    if key is not None:
                        yield key, members
                    key, members = this, []
                members.append(Member(name, info.offset_data, info.size))
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole tar: {error}") from None
    # tarfile takes half a header, or a broken one, for the end.
    if _read_member(path, Member("", end, tarfile.BLOCKSIZE)).strip(b"\0"):
        raise ValueError(f"{path} is not a whole tar: it is broken or cut off at byte {end}")
    if key is not None:
        yield key, members


def _refuse_compressed(path: Path) -> None:
    with open(path, "rb") as file:
        magic = file.read(6)
    if path.name.lower().endswith(_COMPRESSED_TARS) or magic.startswith(
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
    ):
        raise ValueError(
            f"{path} is compressed, so its samples cannot be reached one by one: unpack it to a plain .tar"
        )


def _member_label(path: Path, members: Sequence[Member]) -> object | None:
    """The label in a sample's `.cls`, or else in its `.json`; None without one."""
    by_suffix = {member.name.rpartition(".")[2].lower(): member for member in members}
    if "cls" in by_suffix:
        return _read_member(path, by_suffix["cls"]).decode("utf-8", "replace").strip() or None
    if "json" in by_suffix:
        try:
            meta = json.loads(_read_member(path, by_suffix["json"]))
        except ValueError:
            return None  # somebody else's notes; if labels are in use, its picture is reported as unlabelled
        return meta.get("label") if isinstance(meta, dict) else None
    return None


def _read_member(path: Path, member: Member) -> bytes:
    with open(path, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _folder_labels(source: Source) -> dict[str, object]:
    if isinstance(source, TarSource):
        raise ValueError("--labels folders does not go with tars: their labels are in .cls or .json (--labels auto)")
    parts = ((entry.name, entry.name.partition("/")) for entry in source.entries)
    return {name: folder for name, (folder, _, rest) in parts if rest}


def _read_labels(path: Path) -> Mapping[str, object]:
    if path.suffix.lower() not in (".json", ".csv"):
        raise ValueError(f"--labels takes auto, none, folders, a .json or a .csv, not {path}")
    data = path.read_bytes()
    if path.suffix.lower() == ".csv":
        return _parse_csv(data, path)
    labels = _parse_labels(data, path)
    if labels is None:
        raise ValueError(f'{path} holds no labels ("labels" is null); use --labels none')
    return labels


def _parse_labels(data: bytes, origin: Path) -> dict[str, object] | None:
    """Labels of the form {"labels": [[name, class], ...]}; None for {"labels": null}."""
    form = f'{origin} is not of the form {{"labels": [["NAME", CLASS], ...]}}'
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{form}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(form)
    pairs = content.get("labels")
    if pairs is None:
        return None
    if not isinstance(pairs, list) or not all(
        isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        raise ValueError(form)
    return _collect(pairs, origin)


def _parse_csv(data: bytes, origin: Path) -> dict[str, object]:
    """Rows of name,label, with or without a heading."""
    try:
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{origin} is not a CSV file in UTF-8: {error}") from None
    if rows and rows[0][0].strip().lower() in ("name", "file", "filename", "file_name", "image", "path"):
        rows = rows[1:]
    bad = next((row for row in rows if len(row) != 2), None)
    if bad is not None or not rows:
        raise ValueError(f"{origin} must have rows of name,label" + (f", not {','.join(bad)!r:.80}" if bad else ""))
    return _collect([(name.strip(), label.strip()) for name, label in rows], origin)


def _collect(pairs: Sequence[Sequence], origin: Path) -> dict[str, object]:
    labels: dict[str, object] = {}
    for raw, label in pairs:
        name = raw.replace("\\", "/").removeprefix("./")
        if labels.setdefault(name, label) != label:
            raise ValueError(f"{origin} gives {name} two labels: {labels[name]!r} and {label!r}")
    return labels


def _label(source: Source, raw: Mapping[str, object], origin: str, named: bool = False) -> Source:
    """The source with its labels numbered; `named`: they are names even where they look like numbers.

    Raises ValueError if one is missing or is no class.
    """
    missing = [entry.name for entry in source.entries if entry.name not in raw]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(source)} pictures have no label in {origin}, the first is {missing[0]}. "
            "Label them, take them out, or use --labels none."
        )
    number, names = _number_classes(raw, origin, named)
    entries = [entry._replace(label=number[str(raw[entry.name])]) for entry in source.entries]
    return replace(source, entries=entries, class_names=names)


def _number_classes(raw: Mapping[str, object], origin: str, named: bool) -> tuple[dict[str, int], tuple[str, ...]]:
    """The number of each label, by its text, and the name of each class, by its number."""
    for name, label in raw.items():
        if not isinstance(label, int | str) or isinstance(label, bool) or (not named and _FRACTION.match(str(label))):
            raise ValueError(
                f"the label of {name} in {origin} is {str(label)[:60]}: only classes are supported "
                "(0, 1, 2, ... or names), no vectors and no fractions"
            )
    texts = {str(label) for label in raw.values()}
    if named or not all(map(_WHOLE.match, texts)):
        names = tuple(sorted(texts))
        return {text: number for number, text in enumerate(names)}, names
    number = {text: int(text) for text in texts}
    for worst in (min(number.values()), max(number.values())):
        if not 0 <= worst < _MOST_CLASSES:
            raise ValueError(f"label {worst} in {origin} is no class number: classes are numbered 0, 1, 2, ...")
    return number, tuple(str(k) for k in range(max(number.values()) + 1))
