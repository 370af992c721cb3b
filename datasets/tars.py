"""What is in a tar: files, and the samples that they make up by WebDataset's rule.

A sample is a run of consecutive files with the same key. The key is the path up to the first dot of the file's own
name, what follows is the suffix: `a/7.left.png` belongs to sample `a/7`. (`last-dot`: up to the last one, for names
that contain dots.) A suffix that comes again begins another sample. Files without a dot, hidden ones, and those called
`__NAME__` (metadata) do not count.
"""

import hashlib
import json
import os
import re
import shlex
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
COMPRESSED = {
    ".tar.gz": "gzip", ".tgz": "gzip", ".tar.bz2": "bzip2", ".tbz2": "bzip2", ".tar.xz": "xz", ".txz": "xz",
    ".tar.zst": "zstd",
}  # fmt: skip
"""How the names of compressed tars end, and the program that unpacks them."""
KEYS = ("first-dot", "last-dot")

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_METADATA = re.compile(r"__[^/]*__(/|$)")
_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Rules:
    """How the samples of tars are read."""

    keys: str = "first-dot"
    """Where a key ends: at the first dot of the file's name, or the last."""
    image: str | None = None
    """Suffix of the image, or several with commas, of which the first that a sample has is taken; None: its only
    picture."""
    label_field: str | None = None
    """Field of the sample's .json that holds the label, with dots for fields within fields; None: `.cls`, or `label`
    of the .json."""


def check_rules(rules: Rules) -> Rules:
    """The rules. Raises ValueError, by the names of the command line, if there are none such."""
    if rules.keys not in KEYS:
        raise ValueError(f"--keys is one of {', '.join(KEYS)}, not {rules.keys}")
    for name, value in (("image", rules.image), ("label-field", rules.label_field)):
        if value is not None and not value.strip(" .,"):
            raise ValueError(f"--{name} is empty")
    return rules


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    """Where its bytes begin."""
    size: int
    suffix: str = ""
    data: bytes | None = None
    """Its bytes, if they were wanted."""


class Sample(NamedTuple):
    """Files that belong together."""

    key: str
    members: list[Member]


def split_name(name: str, keys: str = "first-dot") -> tuple[str, str] | None:
    """(key, suffix) of a file's path in a tar; None if it does not count."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".") if keys == "first-dot" else base.rpartition(".")
    if not stem or not suffix or is_hidden(name) or _METADATA.match(name):
        return None
    return f"{folder}{slash}{stem}", suffix


def is_hidden(name: str) -> bool:
    """Whether it is a hidden file, lies in a hidden folder, or is what macOS adds to archives."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def printable(name: str) -> str:
    """A name that is valid UTF-8: those in tars, and of files, need not be."""
    return name.encode("utf-8", "backslashreplace").decode()


def tar_samples(
    path: Path, keys: str = "first-dot", wanted: Callable[[str], bool] = lambda suffix: False
) -> Iterator[Sample]:
    """The samples of an uncompressed tar. wanted: says by its suffix whether a member's bytes are to be read.

    Raises ValueError if the tar is compressed, damaged or cut off: after its whole samples.
    """
    refuse_compressed(path)
    with open(path, "rb") as file:
        tar = TarReader(file, keys, wanted)
        yield from tar
    if tar.faults:
        raise ValueError(f"{path} is not a whole tar: {tar.faults[0]}")
    link = next((f"{name} ({what})" for name, what in tar.skipped if name.lower().endswith(SUFFIXES)), None)
    if link:
        raise ValueError(f"{path} holds {link} instead of a picture: pack it with tar -h --hard-dereference")


def refuse_compressed(path: Path, name: str | None = None) -> None:
    """Raises ValueError, with the command that unpacks it, if a file is a compressed tar. name: what to call it."""
    with open(path, "rb") as file:
        begin = file.read(6)
    name = f"{path}" if name is None else name
    by_name = (tool for suffix, tool in COMPRESSED.items() if name.lower().endswith(suffix))
    tool = next((tool for magic, tool in _MAGIC.items() if begin.startswith(magic)), next(by_name, None))
    if tool is not None:
        raise ValueError(compressed(name, tool))


def compressed(name: str, tool: str) -> str:
    """What to say of a compressed tar."""
    plain = re.sub(r"(\.tar)?\.\w+$", ".tar", name)
    other = shlex.quote(plain if plain != name else f"{name}.plain")
    rename = "" if plain != name else f" && mv {other} {shlex.quote(name)}"
    return (
        f"{name} is compressed, so its samples cannot be reached one by one: unpack it to a plain .tar with\n"
        f"{tool} -dc {shlex.quote(name)} > {other}{rename}"
    )


class TarReader:
    """Iterates over the samples of an uncompressed tar, in one pass from front to back.

    Whatever is wrong with it ends the samples, without an error: the sample at which that happens is left out.

    Args:
        file: the tar, at its beginning.
        keys: as in `Rules`.
        wanted: says by its suffix whether a member's bytes are to be read.
        hashed: whether to hash the file: then every byte of it is read.
    """

    def __init__(
        self,
        file: BinaryIO,
        keys: str = "first-dot",
        wanted: Callable[[str], bool] = lambda suffix: False,
        hashed: bool = False,
    ) -> None:
        self.file, self.keys, self.wanted = _Forward(file, hashed), keys, wanted
        self.faults: list[str] = []
        """What is wrong with the tar, once it was gone through."""
        self.remarks: list[str] = []
        """What is odd, but does no harm."""
        self.skipped: list[tuple[str, str]] = []
        """(name, what it is) of the members that have no bytes of their own, such as links."""
        self.lost = ""
        """Key of the sample that was left out because of a fault."""
        self.sample: Sample | None = None

    def __iter__(self) -> Iterator[Sample]:
        try:
            file = cast(BinaryIO, self.file)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                while (info := tar.next()) is not None:
                    if info.size < 0 or tar.offset < info.offset_data:
                        raise tarfile.ReadError(f"{_name(info)} has a size that cannot be")
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  (it would keep every header)
                    if (named := self._named(info)) is None:
                        continue
                    key, suffix = named
                    if self._begins_another(key, suffix):
                        if self.sample:
                            yield self.sample
                        self.sample = Sample(key, [])
                    assert self.sample is not None
                    self.sample.members.append(self._member(info, suffix))
                end, last = tar.offset, self.file.last
            if last.strip(b"\0"):  # tarfile takes half a header, or a broken one, for the end
                raise tarfile.ReadError(f"it is broken or cut off at byte {end}")
        except (tarfile.TarError, ValueError, OverflowError) as error:  # of numbers in headers, too, that make no sense
            self.faults.append(f"{error}")
            self.lost = self.sample.key if self.sample else ""
            return
        if self.sample:
            yield self.sample
        if not last:
            self.remarks.append("it has no end mark: it may have been cut off after its last file")
        self._look_behind()

    def _look_behind(self) -> None:
        """Notes what comes after the end mark."""
        at, block = self.file.find_more()
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if block:
                self.remarks.append(f"what follows its end mark, at byte {at}, is not read")
        else:
            self.faults.append(
                f"another tar was joined to it at byte {at}: unpack both (tar -xif), and pack them again"
            )

    def _named(self, info: tarfile.TarInfo) -> tuple[str, str] | None:
        """(key, suffix) of a file that counts."""
        named = None if info.isdir() else split_name(_name(info), self.keys)
        if named and (not info.isreg() or info.issparse()):
            self.skipped.append((_name(info), "a link" if info.issym() or info.islnk() else "not a plain file"))
            return None
        return named

    def _begins_another(self, key: str, suffix: str) -> bool:
        sample = self.sample
        return not sample or sample.key != key or suffix.lower() in {m.suffix.lower() for m in sample.members}

    def _member(self, info: tarfile.TarInfo, suffix: str) -> Member:
        if not 0 <= info.size <= self.file.size - info.offset_data:
            raise tarfile.ReadError(f"it is cut off at byte {self.file.size}, within {_name(info)}")
        data = None
        if self.wanted(suffix):
            self.file.seek(info.offset_data)
            data = self.file.read(info.size)
        return Member(_name(info), info.offset_data, info.size, suffix, data)

    def finish(self) -> str:
        """sha256 in hex of the whole file, if it was to be hashed: reads what is left of it."""
        assert self.file.digest is not None
        self.file.seek(self.file.size)
        return self.file.digest.hexdigest()


def _name(info: tarfile.TarInfo) -> str:
    return info.name.removeprefix("./")


class _Forward:
    """A file that is read once from front to back; if `hashed`, all bytes that are passed are read and hashed."""

    def __init__(self, file: BinaryIO, hashed: bool) -> None:
        self.file, self.at = file, 0
        self.size = os.fstat(file.fileno()).st_size
        self.digest = hashlib.sha256() if hashed else None
        self.last = b""  # what was read last

    def tell(self) -> int:
        return self.at

    def read(self, size: int) -> bytes:
        self.last = self.file.read(size)
        self.at += len(self.last)
        if self.digest:
            self.digest.update(self.last)
        return self.last

    def seek(self, to: int) -> None:
        if self.digest is None:
            self.at = self.file.seek(to)
            return
        assert to >= self.at, "tarfile went back"
        while self.at < to and self.read(min(_CHUNK, to - self.at)):
            pass

    def find_more(self) -> tuple[int, bytes]:
        """(offset, bytes) of the next block of 512 bytes, from a block's begin on, that is not all zero; empty if there
        is none."""
        while chunk := self.read(_CHUNK):
            if more := chunk.lstrip(b"\0"):
                begin = (len(chunk) - len(more)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
                return self.at - len(chunk) + begin, chunk[begin:][: tarfile.BLOCKSIZE]
        return self.at, b""


def image_of(sample: Sample, rules: Rules, tar: str) -> Member | None:
    """The image of a sample; None without one. tar: for the message.

    Raises ValueError, with the remedies, if the sample has several pictures and the rules do not say which to take.
    """
    found = [member for member in sample.members if may_be_image(member.suffix, rules)]
    if rules.image is not None:
        return min(found, key=lambda member: _suffixes(rules).index(member.suffix.lower()), default=None)
    if len(found) > 1:
        names = ", ".join(member.name for member in found[:4]) + (", ..." if len(found) > 4 else "")
        others = "" if rules.keys == "last-dot" else ". If each is a sample of its own: --keys last-dot"
        raise ValueError(
            f"the sample {sample.key} in {tar} has several pictures: {names}.\n"
            f"Say which to take, such as --image {shlex.quote(found[0].suffix)}{others}."
        )
    return found[0] if found else None


def may_be_image(suffix: str, rules: Rules) -> bool:
    """Whether a member may be its sample's image, by its suffix."""
    return f".{suffix}".lower().endswith(SUFFIXES) if rules.image is None else suffix.lower() in _suffixes(rules)


def _suffixes(rules: Rules) -> list[str]:
    return [suffix.strip().lower().lstrip(".") for suffix in (rules.image or "").split(",")]


def brings_label(suffix: str) -> bool:
    """Whether a member may hold the sample's label, by its suffix."""
    return suffix.rpartition(".")[2].lower() in ("cls", "json")


def label_of(
    sample: Sample, image: Member, tar: str, rules: Rules, given: Mapping[str, object] | None = None
) -> object | None:
    """The label of a sample; None without one.

    given: labels by TAR/FILE, TAR/KEY, FILE or KEY; None: it is in the sample's `.cls`, or else in its `.json`, whose
    bytes were read.
    """
    if given is not None:
        names = (f"{tar}/{image.name}", f"{tar}/{sample.key}", image.name, sample.key)
        return next((given[name] for name in names if name in given), None)
    by_suffix = {member.suffix.rpartition(".")[2].lower(): member.data or b"" for member in sample.members}
    by_suffix |= {member.suffix.lower(): member.data or b"" for member in sample.members}
    if rules.label_field is None and "cls" in by_suffix:
        return by_suffix["cls"].decode("utf-8", "replace").strip() or None
    return _field(_parse_fields(by_suffix.get("json", b"")), rules.label_field or "label")


def fields_of(sample: Sample) -> list[str]:
    """Names of the fields in a sample's `.json`, whose bytes were read."""
    notes = (member.data for member in sample.members if brings_label(member.suffix))
    return [name for data in notes for name in _parse_fields(data or b"")]


def _parse_fields(data: bytes) -> dict[str, object]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return {}  # somebody else's notes; if labels are in use, its picture is reported as unlabelled
    return fields if isinstance(fields, dict) else {}


def _field(fields: object, name: str) -> object | None:
    """The field called `name`, or the field within a field that the dots in `name` lead to."""
    if not isinstance(fields, dict) or name in fields:
        return fields.get(name) if isinstance(fields, dict) else None
    outer, dot, inner = name.partition(".")
    return _field(fields.get(outer), inner) if dot else None


def no_image(where: str, suffixes: Sequence[str], rules: Rules) -> str:
    """What to say if no sample has an image. suffixes: of the members of some sample."""
    if rules.image is None:
        return f"no pictures in {where}: looked for {', '.join(SUFFIXES)} in the tars; --image SUFFIX takes others"
    return f"no sample in {where} has a .{rules.image.lstrip('.')}; there are: .{', .'.join(suffixes)}"


def no_field(where: str, fields: Sequence[str], rules: Rules) -> str:
    """What to say if no sample has the label's field. fields: of the .json of some sample."""
    there = f"there are: {', '.join(fields)}" if fields else "the samples have no .json"
    return f"no sample in {where} has the field {rules.label_field} in its .json; {there}"
