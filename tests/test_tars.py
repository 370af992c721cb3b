"""datasets/tars.py: which samples a tar holds, by WebDataset's rule, and what is wrong with it."""

import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from styleloom.datasets.tars import (
    Member,
    Rules,
    Sample,
    TarReader,
    check_rules,
    compressed,
    image_of,
    label_of,
    refuse_compressed,
    split_name,
    tar_samples,
)

Files = list[tuple[str, bytes]]


def write_tar(path: Path, files: Files, **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path, keys: str = "first-dot", hashed: bool = False) -> tuple[TarReader, list[Sample]]:
    with open(path, "rb") as file:
        tar = TarReader(file, keys, lambda suffix: True, hashed)
        samples = list(tar)
        if hashed:
            assert tar.finish() == hashlib.sha256(path.read_bytes()).hexdigest()
    return tar, samples


def grouped(samples: list[Sample]) -> list[tuple[str, list[str]]]:
    return [(sample.key, [member.suffix for member in sample.members]) for sample in samples]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("a.jpg", ("a", "jpg"), ("a", "jpg")),
        ("d/a.left.PNG", ("d/a", "left.PNG"), ("d/a.left", "PNG")),
        ("v1.2/a.jpg", ("v1.2/a", "jpg"), ("v1.2/a", "jpg")),
        ("two words.jpg", ("two words", "jpg"), ("two words", "jpg")),
        ("/a.jpg", ("/a", "jpg"), ("/a", "jpg")),
        ("../a.jpg", ("../a", "jpg"), ("../a", "jpg")),
        ("README", None, None),
        ("a.", None, None),
        ("._a.jpg", None, None),
        (".git/a.jpg", None, None),
        ("__MACOSX/a.jpg", None, None),
        ("__meta__.json", ("__meta__", "json"), ("__meta__", "json")),
        ("__meta__/a.json", None, None),
    ],
)
def test_keys_and_suffixes(name, first, last):
    assert split_name(name) == first
    assert split_name(name, "last-dot") == last


FILES = [
    ("d/2.jpg", b"image"),
    ("d/2.seg.png", b"segments"),
    ("d/2.JSON", b"{}"),
    ("README", b"between"),
    ("d/2.txt", b"still the same"),
    ("d/1.jpg", b""),
    ("d/2.jpg", b"again"),
    ("3.jpg", b"x" * 1500),
]


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_webdataset(tmp_path, format_):
    files = [*FILES, ("n" * 150 + "/é.jpg", b"long"), ("n" * 150 + "/é.cls", b"1")]
    path = write_tar(tmp_path / "a.tar", files, format=format_)
    content = path.read_bytes()
    with open(path, "rb") as file:
        theirs = list(group_by_keys(tar_file_expander([{"url": "a.tar", "stream": file}])))
    for hashed in (False, True):
        tar, samples = read(path, hashed=hashed)
        assert (tar.faults, tar.remarks, tar.skipped) == ([], [], [])
        assert [sample.key for sample in samples] == [sample["__key__"] for sample in theirs]
        for ours, its in zip(samples, theirs, strict=True):
            assert {m.suffix.lower(): m.data for m in ours.members} == {k: v for k, v in its.items() if k[0] != "_"}
            assert all(content[m.offset :][: m.size] == m.data for m in ours.members)
    assert list(tar_samples(path)) == [Sample(s.key, [m._replace(data=None) for m in s.members]) for s in read(path)[1]]


def test_a_suffix_that_comes_again_begins_a_sample(tmp_path):
    files = [("a.jpg", b"1"), ("a.cls", b"1"), ("a.jpg", b"2"), ("a.JPG", b"3")]
    samples = read(write_tar(tmp_path / "a.tar", files))[1]
    assert grouped(samples) == [("a", ["jpg", "cls"]), ("a", ["jpg"]), ("a", ["JPG"])]


def test_dots_in_keys(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("photo.v1.jpg", b"1"), ("photo.v1.json", b"2"), ("photo.v2.jpg", b"3")])
    assert grouped(read(path)[1]) == [("photo", ["v1.jpg", "v1.json", "v2.jpg"])]
    assert grouped(read(path, "last-dot")[1]) == [("photo.v1", ["jpg", "json"]), ("photo.v2", ["jpg"])]


def test_members_without_bytes_of_their_own(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("./d.x", tarfile.DIRTYPE), ("d/b.jpg", tarfile.SYMTYPE),
                           ("d/c.jpg", tarfile.LNKTYPE), ("d/e.jpg", tarfile.FIFOTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "d/a.jpg"
            tar.addfile(info)
        info = tarfile.TarInfo("./d/a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    tar, samples = read(tmp_path / "a.tar")
    assert grouped(samples) == [("d/a", ["jpg"])]
    assert tar.skipped == [("d/b.jpg", "a link"), ("d/c.jpg", "a link"), ("d/e.jpg", "not a plain file")]


def test_sparse_members_are_not_taken_for_their_bytes(tmp_path):
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x" * 5000)
    for format_ in ("gnu", "pax"):
        subprocess.run(["tar", "-C", tmp_path, "-S", f"--format={format_}", "-cf", tmp_path / "a.tar", "hole.jpg"],
                       check=True)  # fmt: skip
        if (tmp_path / "a.tar").stat().st_size > 1 << 20:
            pytest.skip("this file system or tar makes no sparse files")
        tar, samples = read(tmp_path / "a.tar", hashed=True)
        assert samples == []
        assert tar.skipped == [("hole.jpg", "not a plain file")]


def test_names_that_are_not_utf8(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("xyz.jpg", b"1"), ("xyz.cls", b"0")], format=tarfile.GNU_FORMAT)
    content = path.read_bytes()
    for name in (b"xyz.jpg", b"xyz.cls"):
        header = content.index(name)
        block = bytearray(content[header : header + 512])
        block[1] = 0xFF
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
        content = content[:header] + block + content[header + 512 :]
    path.write_bytes(content)
    tar, samples = read(path)
    assert tar.faults == []
    assert grouped(samples) == [("x\udcffz", ["jpg", "cls"])]


THREE = [("a.jpg", b"a" * 700), ("b.cls", b"1"), ("b.jpg", b"b" * 700), ("c.jpg", b"c" * 512)]
# Headers at 0, 1536 (b.cls), 2560 (b.jpg), 4096 (c.jpg), end mark at 5120.


@pytest.mark.parametrize(
    ("length", "whole", "lost", "fault"),
    [
        (0, "", "", "empty file"),
        (100, "", "", "truncated header"),
        (600, "", "a", "cut off at byte 600, within a.jpg"),
        (1536 + 100, "", "a", "broken or cut off at byte 1536"),
        (2560 + 100, "a", "b", "broken or cut off at byte 2560"),
        (3200, "a", "b", "cut off at byte 3200, within b.jpg"),
        (4096 - 10, "a", "b", "unexpected end of data"),
        (4608 + 100, "ab", "c", "cut off at byte 4708, within c.jpg"),
        (5120 + 100, "abc", "", ""),
    ],
)
def test_a_cut_tar_has_its_whole_samples(tmp_path, length, whole, lost, fault):
    path = write_tar(tmp_path / "a.tar", THREE)
    path.write_bytes(path.read_bytes()[:length])
    for hashed in (False, True):
        tar, samples = read(path, hashed=hashed)
        assert "".join(sample.key for sample in samples) == whole
        assert tar.lost == lost
        assert len(tar.faults) == bool(fault)
        assert fault in "".join(tar.faults)
    if fault:
        with pytest.raises(ValueError, match="is not a whole tar: .*" + fault):
            list(tar_samples(path))


def test_a_tar_without_its_end_mark(tmp_path):
    path = write_tar(tmp_path / "a.tar", THREE)
    path.write_bytes(path.read_bytes()[:5120])
    tar, samples = read(path)
    assert (len(samples), tar.faults) == (3, [])
    assert tar.remarks == ["it has no end mark: it may have been cut off after its last file"]
    assert len(list(tar_samples(path))) == 3


def test_a_broken_header_ends_the_samples(tmp_path):
    path = write_tar(tmp_path / "a.tar", THREE)
    content = bytearray(path.read_bytes())
    content[4096] ^= 1
    path.write_bytes(content)
    tar, samples = read(path, hashed=True)
    assert [sample.key for sample in samples] == ["a"]
    assert (tar.lost, tar.faults) == ("b", ["it is broken or cut off at byte 4096"])


def test_what_follows_the_end_mark(tmp_path):
    path = write_tar(tmp_path / "a.tar", THREE)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(3 << 20) + b"rubbish")
    tar, samples = read(path, hashed=True)
    assert (len(samples), tar.faults) == (3, [])
    assert tar.remarks == [f"what follows its end mark, at byte {len(whole) + (3 << 20)}, is not read"]
    assert len(list(tar_samples(path))) == 3
    path.write_bytes(whole + whole)
    tar, samples = read(path, hashed=True)
    assert len(samples) == 3
    assert tar.faults[0].startswith(f"another tar was joined to it at byte {len(whole)}: unpack both (tar -xif)")
    with pytest.raises(ValueError, match="another tar was joined to it"):
        list(tar_samples(path))


def test_an_empty_tar(tmp_path):
    tar, samples = read(write_tar(tmp_path / "a.tar", []), hashed=True)
    assert (samples, tar.faults, tar.remarks) == ([], [], [])


def test_what_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<!doctype html>" * 100)
    tar, samples = read(tmp_path / "a.tar", hashed=True)
    assert samples == []
    assert len(tar.faults) == 1


@pytest.mark.parametrize("tool", ["gzip", "bzip2", "xz"])
def test_compressed_tars_are_refused_with_the_command_that_unpacks_them(tmp_path, tool):
    """By name or content; the command is tried."""
    suffix = {"gzip": ".tgz", "bzip2": ".tar.bz2", "xz": ".tar.xz"}[tool]
    whole = write_tar(tmp_path / "w.tar", THREE).read_bytes()
    packed = subprocess.run([tool, "-c"], input=whole, capture_output=True, check=True).stdout
    for name, plain in ((f"my set{suffix}", "my set.tar"), ("b.tar", "b.tar")):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(ValueError, match=r"is compressed, .*unpack it to a plain \.tar with\n") as caught:
            refuse_compressed(tmp_path / name)
        subprocess.run(str(caught.value).splitlines()[1], shell=True, check=True)
        assert (tmp_path / plain).read_bytes() == whole
    assert compressed("x.tar.zst", "zstd").endswith("\nzstd -dc x.tar.zst > x.tar")


def sample(*names: str, **data: bytes) -> Sample:
    files = [(name, b"") for name in names] + [(f"k.{suffix}", text) for suffix, text in data.items()]
    with_suffix = [(name, (split_name(name) or ("", ""))[1], text) for name, text in files]
    return Sample("k", [Member(name, 0, len(text), suffix, text) for name, suffix, text in with_suffix])


def test_the_image_of_a_sample():
    two = sample("k.txt", "k.left.png", "k.RIGHT.png")
    with pytest.raises(ValueError, match=r"the sample k in x.tar has several pictures: k.left.png, k.RIGHT.png.\nSay"):
        image_of(two, Rules(), "x.tar")
    with pytest.raises(ValueError, match=r"--image left.png. If each is a sample of its own: --keys last-dot\.$"):
        image_of(two, Rules(), "x.tar")
    with pytest.raises(ValueError, match=r"--image left.png\.$"):
        image_of(two, Rules("last-dot"), "x.tar")

    def name(image: str, of: Sample = two) -> str:
        found = image_of(of, Rules(image=image), "x.tar")
        return found.name if found else ""

    assert name("left.png") == "k.left.png"
    assert name(".right.PNG") == "k.RIGHT.png"
    assert name("png") == ""
    assert name("jpg, right.png, left.png") == "k.RIGHT.png"
    assert name("txt") == "k.txt"
    assert image_of(sample("k.txt"), Rules(), "x.tar") is None


@pytest.mark.parametrize(
    ("data", "field", "label"),
    [
        ({"cls": b" 7\n", "json": b'{"label": 8}'}, None, "7"),
        ({"cls": b"", "json": b'{"label": 8}'}, None, None),
        ({"json": b'{"label": "dog"}'}, None, "dog"),
        ({"json": b'{"label": null}'}, None, None),
        ({"json": b"[1]"}, None, None),
        ({"json": b"{"}, None, None),
        ({"json": b"\xff\xfe"}, None, None),
        ({"cls": b"7", "json": b'{"kind": "dog"}'}, "kind", "dog"),
        ({"json": b'{"a": {"b": {"c": 3}}}'}, "a.b.c", 3),
        ({"json": b'{"a.b": 1, "a": {"b": 2}}'}, "a.b", 1),
        ({"json": b'{"a": [1]}'}, "a.b", None),
        ({"json": b'{"a": 1}'}, "a.b", None),
        ({"meta.json": b'{"label": 1}'}, None, 1),
        ({"json": b'{"label": 2}', "meta.json": b'{"label": 1}'}, None, 2),
        ({}, None, None),
    ],
)
def test_the_label_of_a_sample(data, field, label):
    one = sample("k.jpg", **data)
    assert label_of(one, one.members[0], "x.tar", Rules(label_field=field)) == label


def test_labels_that_are_given():
    one = sample("k.jpg", cls=b"9")

    def given(**labels: object) -> object:
        return label_of(one, one.members[0], "x.tar", Rules(), labels)

    names = ["x.tar/k.jpg", "x.tar/k", "k.jpg", "k"]
    for i in range(4):
        assert given(**dict.fromkeys(names[i + 1 :], "worse"), **{names[i]: "best"}) == "best"
    assert given(other=1) is None


def test_rules_that_are_none():
    with pytest.raises(ValueError, match="--keys is one of first-dot, last-dot, not dot"):
        check_rules(Rules("dot"))
    with pytest.raises(ValueError, match="--image is empty"):
        check_rules(Rules(image="."))
    with pytest.raises(ValueError, match="--label-field is empty"):
        check_rules(Rules(label_field=""))


def test_a_big_number_in_a_header_is_a_fault(tmp_path):
    path = write_tar(tmp_path / "a.tar", THREE)
    for size in (b"\x80" + b"\xff" * 11, b"\xff" * 11 + b"\x00", b"77777777777\0", b"-1\0" + bytes(9)):
        content = bytearray(path.read_bytes())
        block = content[1536 : 1536 + 512]
        block[124:136] = size
        block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
        content[1536 : 1536 + 512] = block
        (tmp_path / "b.tar").write_bytes(content)
        for hashed in (False, True):
            tar, samples = read(tmp_path / "b.tar", hashed=hashed)
            assert len(tar.faults) == 1, size
            assert len(samples) <= 1


def test_the_rest_is_hashed_too(tmp_path):
    path = write_tar(tmp_path / "a.tar", THREE)
    with open(path, "rb") as file:
        tar = TarReader(file, hashed=True)
        next(iter(tar))
        assert tar.finish() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert file.tell() == os.path.getsize(path)
