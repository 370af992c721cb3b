"""Where pictures come from: a folder, a zip, or WebDataset tars -> (name, label, bytes) in a stable order.

The order is that of the names, so it depends neither on the file system nor on how the archive was written. Labels are
class numbers 0, 1, 2, ...; where a source names its classes in words, the sorted words are numbered.
"""

import functools
import hashlib
import os
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

from .labels import class_text, number_classes, parse_labels, read_labels
from .manifest import FILE, WORK, read_manifest
from .tars import (
    COMPRESSED,
    SUFFIXES,
    Rules,
    brings_label,
    check_rules,
    fields_of,
    image_of,
    is_hidden,
    label_of,
    no_field,
    no_image,
    printable,
    tar_samples,
)

LABELS = "dataset.json"  # the file of labels in the zips and folders of stylegan2-ada and stylegan3
UNLABELLED = -1


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
    """The images of the samples in WebDataset tars."""

    def read(self, i: int) -> bytes:
        entry = self.entries[i]
        with open(entry.archive, "rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
        if len(data) != entry.size:
            raise ValueError(f"{entry.archive} ends within it")
        return data


def open_source(path: str | os.PathLike[str], labels: str = "auto", rules: Rules | None = None) -> Source:
    """Lists the pictures of a folder, a .zip, a .tar or a folder of .tar, and gives each its label.

    labels: "auto" (dataset.json in a folder or zip; what the samples of tars bring; otherwise none), "none", "folders"
    (the top-level folder is the class), or a file: .json as in stylegan2-ada, or .csv with name,label; for tars the
    name is that of the picture or the key of its sample, with or without TAR/ before it. rules: how tars are read.

    Raises ValueError if there is nothing, if the source cannot be read, if a sample has several pictures and the rules
    do not say which to take, or if labels are not classes or are missing.
    """
    root = Path(path).absolute()  # workers may have another current folder
    if not root.exists():
        raise ValueError(f"there is no {root} to take pictures from")
    given = None if labels in ("auto", "none", "folders") else read_labels(Path(labels))
    source, found = _list(root, labels == "auto", given, checked_rules(rules, labels))
    if rules not in (None, Rules()) and not isinstance(source, TarSource):
        raise ValueError(f"--image, --keys and --label-field are for tars, and there are none in {root}")
    if not source.entries:
        raise ValueError(f"no pictures in {root}: looked for {', '.join(SUFFIXES)} and, in folders, for .tar")
    if labels == "none":
        return source
    if labels == "folders":
        return _label(source, _folder_labels(source), "the folders", named=True)
    if given is not None:
        return _label(source, {**given, **(found or {})}, labels)
    return source if found is None else _label(source, found, f"{root}")


def checked_rules(rules: Rules | None, labels: str) -> Rules:
    """The rules, or the usual ones. Raises ValueError if they are none or do not go with `labels`."""
    rules = check_rules(rules or Rules())
    if rules.label_field is not None and labels != "auto":
        raise ValueError(f"--label-field takes the labels from the samples' .json, --labels {labels} does not")
    return rules


def _list(
    root: Path, with_labels: bool, given: Mapping[str, object] | None, rules: Rules
) -> tuple[Source, Mapping[str, object] | None]:
    """The unlabelled source at `root`, and its labels by name: those that it brings (with_labels), or the given ones of
    the samples of tars."""
    if root.is_dir():
        files = walk(root)
        if (shards := own_shards(root, files)) is not None:
            return _list_tars(root, root, shards, with_labels, given, rules)
        pictures = [name for name in files if name.lower().endswith(SUFFIXES)]
        tars = [name for name in files if name.lower().endswith((".tar", *COMPRESSED))]
        if pictures and tars:
            raise ValueError(
                f"{root} holds both pictures ({pictures[0]}) and tars ({tars[0]}): move one kind elsewhere"
            )
        if tars:
            return _list_tars(root, root, tars, with_labels, given, rules)
        found = parse_labels((root / LABELS).read_bytes(), root / LABELS) if with_labels and LABELS in files else None
        return FolderSource(root, [Entry(name, _size(root / name)) for name in pictures]), found
    suffix = root.name.lower()
    if suffix.endswith(".zip"):
        return _list_zip(root, with_labels)
    if suffix.endswith((".tar", *COMPRESSED)):
        return _list_tars(root, root.parent, [root.name], with_labels, given, rules)
    raise ValueError(f"{root} is neither a folder, a .zip nor a .tar")


def own_shards(root: Path, files: Sequence[str]) -> list[str] | None:
    """The tars of a data set that `styleloom prepare` wrote, without those of the smaller sizes; None if it is none."""
    if (root / WORK / "plan.json").exists():
        raise ValueError(f"{root} is a data set whose styleloom prepare has not finished: run it again first")
    if FILE not in files:
        return None
    try:
        manifest = read_manifest(root)
    except ValueError:
        return None  # somebody else's
    return None if manifest.foreign else [shard.name for shard in manifest.shards]


def walk(root: Path) -> list[str]:
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
    return sorted(name for name in names if not is_hidden(name))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it will fail too, and is reported then


def _list_zip(root: Path, with_labels: bool) -> tuple[Source, Mapping[str, object] | None]:
    try:
        with zipfile.ZipFile(root) as archive:
            names = sorted({name for name in archive.namelist() if not name.endswith("/") and not is_hidden(name)})
            pictures = [archive.getinfo(name) for name in names if name.lower().endswith(SUFFIXES)]
            found = parse_labels(archive.read(LABELS), root / LABELS) if with_labels and LABELS in names else None
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
    root: Path, folder: Path, tars: Sequence[str], with_labels: bool, given: Mapping[str, object] | None, rules: Rules
) -> tuple[Source, Mapping[str, object] | None]:
    entries: list[Entry] = []
    found: dict[str, object] = {}
    suffixes: list[str] = []
    fields: list[str] = []
    seen: Counter[str] = Counter()
    astray = ""  # a label without a picture beside it
    for tar in tars:
        path = folder / tar
        for sample in tar_samples(path, rules.keys, brings_label if with_labels else lambda suffix: False):
            suffixes = suffixes or [member.suffix for member in sample.members]
            fields = fields or fields_of(sample)
            picture = image_of(sample, rules, f"{path}")
            if picture is None:
                if with_labels and any(member.suffix.lower().endswith("cls") for member in sample.members):
                    astray = astray or f"{sample.key} in {tar}"
                continue
            name = f"{tar}/{picture.name}"
            seen[name] += 1
            if seen[name] > 1:  # tars allow that; names tell pictures and their labels apart
                name += f"#{seen[name]}"
            entries.append(Entry(name, picture.size, archive=str(path), offset=picture.offset))
            label = label_of(sample, picture, tar, rules, given) if with_labels or given is not None else None
            if label is not None:
                found[name] = label
    if not entries:
        raise ValueError(no_image(f"{root}", suffixes, rules))
    if astray and not found:
        raise ValueError(
            f"the label of {astray} is not next to its picture, and so it is with all: pack the files of each sample "
            "one after another, or use --labels none"
        )
    if rules.label_field is not None and not found:
        raise ValueError(no_field(f"{root}", fields, rules))
    return TarSource(root, sorted(entries, key=lambda entry: entry.name)), found or None


def _folder_labels(source: Source) -> dict[str, object]:
    if isinstance(source, TarSource):
        raise ValueError("--labels folders does not go with tars: their labels are in .cls or .json (--labels auto)")
    parts = ((entry.name, entry.name.partition("/")) for entry in source.entries)
    return {name: folder for name, (folder, _, rest) in parts if rest}


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
    texts = {name: printable(class_text(name, label, origin, named)) for name, label in raw.items()}
    number, names = number_classes(texts.values(), origin, named)
    entries = [entry._replace(label=number[texts[entry.name]]) for entry in source.entries]
    return replace(source, entries=entries, class_names=names)
