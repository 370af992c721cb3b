"""datasets/sources.py: order, labels and bytes of folders, zips and tars."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image
from webdataset.writer import TarWriter

from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import Source, open_source
from styleloom.datasets.tars import Rules

FILES = {"b/2.png": b"b2", "b/1.JPG": b"b1", "a/9.webp": b"a9", "c.png": b"c", "a/10.webp": b"a10"}
ORDER = ["a/10.webp", "a/9.webp", "b/1.JPG", "b/2.png", "c.png"]
JUNK = {".hidden.png": b"x", ".git/x.png": b"x", "__MACOSX/a/._9.png": b"x", "notes.txt": b"x", "a/.DS_Store": b"x"}


def make_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_tar(path: Path, files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def names(source: Source) -> list[str]:
    return [entry.name for entry in source.entries]


def labels(source: Source) -> list[int]:
    return [entry.label for entry in source.entries]


def contents(source: Source) -> list[bytes]:
    return [source.read(i) for i in range(len(source))]


@pytest.fixture(params=["folder", "zip"])
def make(request, tmp_path):
    """Makes a folder or a zip of files."""

    def make(files: dict[str, bytes]) -> Path:
        if request.param == "zip":
            return make_zip(tmp_path / "source.zip", files)
        return make_folder(tmp_path / "source", files)

    return make


def test_names_are_sorted_and_junk_is_skipped(make):
    source = open_source(make({**JUNK, **FILES}))
    assert names(source) == ORDER
    assert contents(source) == [FILES[name] for name in ORDER]
    assert [entry.size for entry in source.entries] == [len(FILES[name]) for name in ORDER]
    assert set(labels(source)) == {-1}
    assert source.class_names == ()  # sub-folders are not labels unless asked for


def test_the_order_does_not_depend_on_the_archive(tmp_path):
    backwards = dict(reversed(FILES.items()))
    zips = make_zip(tmp_path / "1.zip", FILES), make_zip(tmp_path / "2.zip", backwards)
    assert open_source(zips[0]).digest == open_source(zips[1]).digest


def test_a_part_goes_to_another_process(make):
    source = pickle.loads(pickle.dumps(open_source(make(FILES)).part(1, 3)))
    assert names(source) == ORDER[1:3]
    assert contents(source) == [FILES[name] for name in ORDER[1:3]]


def test_the_digest_tells_names_sizes_and_labels(tmp_path):
    files = {"a/1.png": b"1", "b/2.png": b"2"}
    original = open_source(make_folder(tmp_path / "0", files)).digest
    assert open_source(make_folder(tmp_path / "1", files)).digest == original
    assert open_source(make_folder(tmp_path / "2", {**files, "c.png": b""})).digest != original
    assert open_source(make_folder(tmp_path / "3", {**files, "b/2.png": b"22"})).digest != original
    assert open_source(tmp_path / "0", "folders").digest != original


def test_folders_as_labels(make):
    files = {"02/x.png": b"", "10/y.png": b"", "1/z/w.png": b""}
    source = open_source(make(files), "folders")
    assert source.class_names == ("02", "1", "10")
    assert dict(zip(names(source), labels(source), strict=True)) == {"02/x.png": 0, "1/z/w.png": 1, "10/y.png": 2}


def test_a_picture_outside_of_the_folders_has_no_label(make):
    with pytest.raises(ValueError, match=r"1 of 5 pictures have no label in the folders, the first is c\.png"):
        open_source(make(FILES), "folders")


def dataset_json(pairs) -> bytes:
    return json.dumps({"labels": pairs}).encode()


STYLEGAN = {"00000/img00000000.png": b"0", "00000/img00000001.png": b"1", "00001/img00001000.png": b"2"}


def test_the_format_of_stylegan(make):
    pairs = [[name, 3 * i] for i, name in enumerate(STYLEGAN)]
    source = open_source(make({**STYLEGAN, "dataset.json": dataset_json(pairs)}))
    assert names(source) == sorted(STYLEGAN)
    assert labels(source) == [0, 3, 6]
    assert source.class_names == tuple("0123456")
    assert labels(open_source(source.root, "none")) == [-1, -1, -1]


def test_the_format_of_stylegan_without_labels(make):
    source = open_source(make({**STYLEGAN, "dataset.json": dataset_json(None)}))
    assert labels(source) == [-1, -1, -1]
    assert source.class_names == ()


def test_a_file_of_labels(tmp_path):
    root = make_folder(tmp_path / "source", {"a.png": b"", "x/b.png": b"", "dataset.json": b"broken"})
    path = tmp_path / "labels.json"
    path.write_bytes(dataset_json([["a.png", 1], ["x\\b.png", 0], ["unused.png", 2]]))
    assert labels(open_source(root, str(path))) == [1, 0]
    path = tmp_path / "labels.csv"
    for text in ("name,label\na.png,dog\nx/b.png,cat\n", "\ufeffa.png, dog\r\n./x/b.png ,cat\r\n"):
        path.write_bytes(text.encode())
        source = open_source(root, str(path))
        assert labels(source) == [1, 0]
        assert source.class_names == ("cat", "dog")
    path.write_text("a.png,4\nx/b.png,0")
    assert labels(open_source(root, str(path))) == [4, 0]
    assert open_source(root, str(path)).class_names == tuple("01234")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([["a.png", [0.1, 0.9]], ["b.png", [1, 0]]], r"label of a.png in .* is \[0.1, 0.9\]: only classes"),
        ([["a.png", 0.5], ["b.png", 1]], "label of a.png .* is 0.5"),
        ([["a.png", 0], ["b.png", -1]], "label -1 .* is no class number"),
        ([["a.png", 0], ["b.png", 10**9]], "label 1000000000 .* is no class number"),
        ([["a.png", True], ["b.png", 1]], "label of a.png .* is True"),
        ([["a.png", 0]], r"1 of 2 pictures have no label in .*, the first is b\.png"),
        ([["a.png", 0], ["a.png", 1]], "gives a.png two labels: 0 and 1"),
        (["a.png", "b.png"], "is not of the form"),
        ({"a.png": 0}, "is not of the form"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, pairs, message):
    root = make_folder(tmp_path, {"a.png": b"", "b.png": b"", "dataset.json": dataset_json(pairs)})
    with pytest.raises(ValueError, match=message):
        open_source(root)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("l.json", b"{", "is not of the form"),
        ("l.json", b"[]", "is not of the form"),
        ("l.json", dataset_json(None), "holds no labels"),
        ("l.csv", b"a.png,1,2\n", "must have rows of name,label, not 'a.png,1,2'"),
        ("l.csv", b"", "must have rows of name,label"),
        ("l.csv", b"a.png,0.5\n", "is 0.5: only classes"),
        ("l.csv", b"\xff\xfe", "not a CSV file in UTF-8"),
        ("l.txt", b"", "--labels takes auto, none, folders"),
    ],
)
def test_unusable_files_of_labels_are_refused(tmp_path, name, data, message):
    root = make_folder(tmp_path / "source", {"a.png": b""})
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_source(root, str(tmp_path / name))


def test_a_missing_file_of_labels_is_named(tmp_path):
    root = make_folder(tmp_path, {"a.png": b""})
    with pytest.raises(OSError, match=r"nowhere\.csv"):
        open_source(root, str(tmp_path / "nowhere.csv"))


def test_tars_written_by_webdataset(tmp_path):
    for number in (1, 0):
        with TarWriter(str(tmp_path / f"{number}.tar")) as writer:
            for i in range(2):
                writer.write({"__key__": f"k{i}", "jpg": b"image%d%d" % (number, i), "cls": 2 * i, "txt": "a caption"})
    source = open_source(tmp_path)
    assert names(source) == ["0.tar/k0.jpg", "0.tar/k1.jpg", "1.tar/k0.jpg", "1.tar/k1.jpg"]
    assert contents(source) == [b"image00", b"image01", b"image10", b"image11"]
    assert labels(source) == [0, 2, 0, 2]
    assert source.class_names == ("0", "1", "2")
    one = open_source(tmp_path / "1.tar")
    assert names(one) == ["1.tar/k0.jpg", "1.tar/k1.jpg"]
    assert contents(one) == [b"image10", b"image11"]
    assert labels(open_source(tmp_path, "none")) == [-1] * 4


def test_samples_of_a_tar_are_grouped(tmp_path):
    files = {
        "./d/2.txt": b"first",
        "./d/2.jpg": b"second",
        "./d/2.json": b'{"label": "dog"}',
        "d/1.json": b'{"label": "cat"}',
        "d/1.txt": b"",
        "d/1.PNG": b"one",
        "d/3.txt": b"no picture",
        "._d/4.png": b"hidden",
    }
    source = open_source(make_tar(tmp_path / "x.tar", files))
    assert names(source) == ["x.tar/d/1.PNG", "x.tar/d/2.jpg"]
    assert contents(source) == [b"one", b"second"]
    assert source.class_names == ("cat", "dog")
    assert labels(source) == [0, 1]


def test_some_labels_missing_in_a_tar(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"1.png": b"", "1.cls": b"0", "2.png": b"", "2.json": b"broken"})
    with pytest.raises(ValueError, match=r"1 of 2 pictures have no label in .*x\.tar, the first is x\.tar/2\.png"):
        open_source(path)
    with pytest.raises(ValueError, match="does not go with tars"):
        open_source(path, "folders")


PAIRS = {"1.left.png": b"1l", "1.right.png": b"1r", "1.json": b'{"kind": {"of": "dog"}}', "2.left.png": b"2l"}


def test_several_pictures_in_a_sample_of_a_tar(tmp_path):
    path = make_tar(tmp_path / "x.tar", PAIRS)
    with pytest.raises(ValueError, match=r"sample 1 in .*x\.tar has several pictures: 1\.left\.png, 1\.right\.png\.\n"):
        open_source(path)
    source = open_source(path, rules=Rules(image="left.png"))
    assert names(source) == ["x.tar/1.left.png", "x.tar/2.left.png"]
    assert contents(open_source(path, rules=Rules(image="right.png"))) == [b"1r"]
    assert contents(open_source(path, rules=Rules(image="right.png,left.png"))) == [b"1r", b"2l"]
    assert contents(open_source(path, rules=Rules(keys="last-dot"))) == [b"1l", b"1r", b"2l"]
    with pytest.raises(
        ValueError, match=r"no sample in .*x\.tar has a \.jpg; there are: \.left\.png, \.right\.png, \.json"
    ):
        open_source(path, rules=Rules(image="jpg"))


def test_labels_of_a_field_in_a_tar(tmp_path):
    files = {
        "1.jpg": b"1",
        "1.cls": b"7",
        "1.json": b'{"kind": {"of": "dog"}}',
        "2.jpg": b"2",
        "2.json": b'{"kind": 1}',
    }
    path = make_tar(tmp_path / "x.tar", dict(list(files.items())[:3]))
    source = open_source(path, rules=Rules(label_field="kind.of"))
    assert (labels(source), source.class_names) == ([0], ("dog",))
    make_tar(path, files)
    with pytest.raises(ValueError, match=r"1 of 2 pictures have no label in .*x\.tar, the first is x\.tar/2\.jpg"):
        open_source(path, rules=Rules(label_field="kind.of"))
    with pytest.raises(ValueError, match=r"no sample in .*x\.tar has the field sort in its \.json; there are: kind"):
        open_source(path, rules=Rules(label_field="sort"))
    with pytest.raises(
        ValueError, match=r"--label-field takes the labels from the samples' \.json, --labels none does not"
    ):
        open_source(path, "none", Rules(label_field="kind.of"))


def test_a_file_of_labels_names_samples_of_tars(tmp_path):
    for name in "ab":
        make_tar(tmp_path / "set" / f"{name}.tar", {"1.jpg": b"1", "2.jpg": b"2"})
    path = tmp_path / "labels.csv"
    path.write_text("key,label\na.tar/1.jpg,ant\na.tar/2,bee\n1,cat\n2.jpg,dog\nunused,emu\n")
    source = open_source(tmp_path / "set", str(path))
    assert labels(source) == [0, 1, 2, 3]
    assert source.class_names == ("ant", "bee", "cat", "dog", "emu")
    path.write_text("1,cat\n")
    with pytest.raises(ValueError, match=r"2 of 4 pictures have no label in .*labels\.csv, the first is a\.tar/2\.jpg"):
        open_source(tmp_path / "set", str(path))


def test_rules_are_for_tars(make):
    root = make({"1.left.png": b"1", "1.right.png": b"2"})
    assert len(open_source(root)) == 2
    for rules in (Rules(image="left.png"), Rules(keys="last-dot"), Rules(label_field="kind")):
        with pytest.raises(ValueError, match="--image, --keys and --label-field are for tars, and there are none in"):
            open_source(root, rules=rules)


def test_a_data_set_of_several_sizes_is_one_source(tmp_path):
    make_folder(tmp_path / "pictures", {f"{i}.png": png(i) for i in range(3)})
    root = tmp_path / "data"
    prepare(open_source(tmp_path / "pictures"), root, width=4, height=4, shard_images=2, progress=False)
    make_tar(root / "2x2" / "shard-000000.tar", {"0.png": png(0)})
    (root / "contact.png").write_bytes(png(0))
    assert [entry.name.partition("/")[0] for entry in open_source(root).entries] == [
        "shard-000000.tar", "shard-000000.tar", "shard-000001.tar",
    ]  # fmt: skip


def test_compressed_and_broken_archives_are_refused(tmp_path):
    files = {"1.png": bytes(2000), "2.png": bytes(2000)}
    for name in ("a.tar.gz", "a.tar"):
        with pytest.raises(ValueError, match=rf"{name} is compressed.*unpack it"):
            open_source(make_tar(tmp_path / name, files, "w:gz"))
    whole = make_tar(tmp_path / "whole.tar", files).read_bytes()
    for length in (100, 1000, 2560 + 100, 2560 + 1000):  # within headers and within pictures
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.tar is not a whole tar"):
            open_source(tmp_path / "cut.tar")
    (tmp_path / "cut.tar").write_bytes(whole[:2560] + b"x" + whole[2561:])
    with pytest.raises(ValueError, match=r"cut\.tar is not a whole tar: it is broken or cut off at byte 2560"):
        open_source(tmp_path / "cut.tar")
    whole = make_zip(tmp_path / "whole.zip", files).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"cut\.zip is not a whole zip"):
        open_source(tmp_path / "cut.zip")


def test_where_there_is_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*nowhere"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no pictures in"):
        open_source(make_folder(tmp_path / "empty", JUNK))
    with pytest.raises(ValueError, match="no pictures in"):
        open_source(make_zip(tmp_path / "empty.zip", JUNK))
    with pytest.raises(ValueError, match="no pictures in"):
        open_source(make_tar(tmp_path / "empty.tar", {"a.txt": b""}))
    (tmp_path / "x.pdf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither a folder, a \.zip nor a \.tar"):
        open_source(tmp_path / "x.pdf")


def test_pictures_and_tars_in_one_folder_are_refused(tmp_path):
    make_tar(make_folder(tmp_path, {"a.png": b""}) / "b.tar", {"1.png": b""})
    with pytest.raises(ValueError, match=r"both pictures \(a\.png\) and tars \(b\.tar\)"):
        open_source(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links_are_followed_but_not_in_circles(tmp_path):
    make_folder(tmp_path / "else" / "where", {"1.png": b"1"})
    root = make_folder(tmp_path / "source", {"a/2.png": b"2"})
    (root / "a" / "up").symlink_to(root)
    (root / "b").symlink_to(tmp_path / "else")
    (root / "gone.png").symlink_to(tmp_path / "nowhere")
    source = open_source(root)
    assert names(source) == ["a/2.png", "b/where/1.png", "gone.png"]
    with pytest.raises(ValueError, match="No such file"):
        source.read(2)


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of members in this order, which may have one name twice."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_samples_of_one_name_keep_their_labels(tmp_path):
    members = [("a.png", b"1"), ("a.cls", b"0"), ("a.png", b"2"), ("a.cls", b"1"), ("b.png", b"3"), ("b.cls", b"2")]
    source = open_source(tar_of(tmp_path / "0.tar", members))
    assert [(read, label) for read, label in zip(contents(source), labels(source), strict=True)] == [
        (b"1", 0),
        (b"2", 1),
        (b"3", 2),
    ]


def test_labels_that_lie_apart_from_their_pictures_are_refused(tmp_path):
    tar = tar_of(tmp_path / "0.tar", [("a.png", b"1"), ("b.png", b"2"), ("a.cls", b"0"), ("b.cls", b"1")])
    with pytest.raises(ValueError, match=r"label of a in 0.tar is not next to its picture.*--labels none"):
        open_source(tar)
    assert labels(open_source(tar, "none")) == [-1, -1]


def test_links_in_the_place_of_pictures_are_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"holds b.png \(a link\) instead of a picture: pack it with tar -h"):
        open_source(tmp_path / "0.tar")


def test_a_size_below_zero_ends_in_a_line(tmp_path):
    path = tar_of(tmp_path / "0.tar", [("README", b"x"), ("a.png", b"1")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\xff" * 10 + b"\xf0\x00"  # base 256
    info = bytearray(data[:512])
    info[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(info)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="README has a size that cannot be"):
        open_source(path)


def test_a_heading_of_any_words(tmp_path):
    make_folder(tmp_path / "set", {f"{i}.png": b"x" for i in range(12)})
    rows = ["image_id,class", *(f"{i}.png,{i}" for i in range(12))]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    source = open_source(tmp_path / "set", str(tmp_path / "labels.csv"))
    assert source.class_names == tuple(map(str, range(12)))
    assert {entry.name: entry.label for entry in source.entries}["2.png"] == 2


def test_label_files_nested_too_deep_end_in_a_line(tmp_path):
    make_folder(tmp_path / "set", {"a.png": b"x"})
    (tmp_path / "labels.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="is not of the form"):
        open_source(tmp_path / "set", str(tmp_path / "labels.json"))


def test_a_half_written_data_set_is_no_source(tmp_path):
    make_folder(tmp_path / "set", {".prepare/plan.json": b"{}", "shard-000000.tar": b""})
    with pytest.raises(ValueError, match="prepare has not finished"):
        open_source(tmp_path / "set")
