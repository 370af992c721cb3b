"""datasets/foreign.py: data sets of tars that others wrote, which stay as they are; verified, and streamed."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset.autodecode import Decoder, imagehandler
from webdataset.tariterators import group_by_keys, tar_file_expander

from styleloom.datasets import foreign, scan, storage
from styleloom.datasets.alike import Wish
from styleloom.datasets.foreign import Indexed, index_only
from styleloom.datasets.manifest import (
    FILE,
    WORK,
    Manifest,
    atomic_file,
    content_hash,
    load_index,
    locked,
    read_manifest,
    tar_location,
    write_manifest,
)
from styleloom.datasets.pictures import Form, conform
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.stream import batches
from styleloom.datasets.tars import Rules
from styleloom.datasets.verify import verify
from styleloom.scripts.inspect import main as inspect
from styleloom.scripts.prepare import main

SIDE = 16
Files = list[tuple[str, bytes]]


def image(
    seed: int, size: tuple[int, int] = (SIDE, SIDE), format_: str = "JPEG", mode: str = "RGB", **options
) -> bytes:
    """An encoded picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), np.uint8).squeeze()
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, format_, **options)
    return file.getvalue()


def write_tar(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, jpg: bytes | None, **fields: object) -> Files:
    """As img2dataset writes one."""
    meta = {"caption": f"picture {key}", "url": f"https://example.org/{key}", "key": key, "status": "success"}
    if jpg is None:
        meta |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
    text = (f"{key}.txt", f"picture {key}".encode())
    files = [(f"{key}.json", json.dumps(meta | fields).encode()), text]
    return files if jpg is None else [(f"{key}.jpg", jpg), *files]


COUNTS = [5, 3, 9]  # uneven
FAILED = [(0, 2), (2, 0), (2, 8)]


def make_set(root: Path, size: Callable[[int], tuple[int, int]] = lambda n: (SIDE, SIDE), **options: Any) -> Path:
    """17 samples in 3 tars as img2dataset leaves them, of which 3 have only a .json and a .txt."""
    number = 0
    for shard, count in enumerate(COUNTS):
        files: Files = []
        for i in range(count):
            fields = {"label": number % 3, "source": {"kind": ["cat", "dog"][number % 2]}}
            jpg = None if (shard, i) in FAILED else image(number, size(number), **options)
            files += sample(f"{shard:05d}{i:04d}", jpg, **fields)
            number += 1
        write_tar(root / f"{shard:05d}.tar", files)
        (root / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (root / f"{shard:05d}_stats.json").write_text(json.dumps({"count": count, "successes": count}))
    return root


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def index(src, dest=None, **options) -> Indexed:
    return index_only(src, dest, **{"progress": False, **options})


def rows(folder: Path, manifest: Manifest) -> list[tuple[bytes, int]]:
    """(bytes, label) of all images, by the index."""
    found = []
    for shard in manifest.shards:
        data = Path(tar_location(folder, manifest, shard)).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        for offset, length, label, hashed in load_index(folder, shard).tolist():
            found.append((data[offset : offset + length], label))
            assert content_hash(found[-1][0]) == hashed
    return found


def test_a_set_of_img2dataset_in_place(tmp_path):
    src = make_set(tmp_path / "set")
    before = tree(src)
    manifest, report, dest, already = index(src)
    assert (dest, already) == (src, False)
    after = tree(src)
    assert {name: after[name] for name in before} == before  # nothing of theirs is touched
    assert set(after) - set(before) == {
        "00000.tar.npy", "00001.tar.npy", "00002.tar.npy", "manifest.json", "report.json",
    }  # fmt: skip
    assert manifest == read_manifest(src)
    assert [(shard.name, shard.count) for shard in manifest.shards] == [
        ("00000.tar", 4), ("00001.tar", 3), ("00002.tar", 7),
    ]  # fmt: skip
    # All alike, so they are taken as they are.
    assert (manifest.width, manifest.height, manifest.channels, manifest.codec) == (SIDE, SIDE, 3, "jpeg")
    assert (manifest.conform, manifest.resize, manifest.quality) == (False, "unknown", None)
    assert (manifest.root, manifest.background) == ("", None)
    kept = [n for n in range(17) if n not in (2, 8, 16)]
    assert rows(src, manifest) == [(image(n), n % 3) for n in kept]
    assert manifest.class_names == ["0", "1", "2"]
    assert manifest.class_counts == [sum(n % 3 == k for n in kept) for k in range(3)]
    assert (report.images, report.without_image, report.unlabelled, report.repeated_keys) == (14, 3, 0, 0)
    assert (report.left_out, report.faults, report.not_alike) == ([], [], [])
    assert verify(src, progress=False) == []


def theirs(src: Path, suffix: str) -> list[np.ndarray]:
    """What webdataset itself reads from the tars."""
    found = []
    for path in sorted(src.rglob("*.tar")):
        with open(path, "rb") as file:
            samples = group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))
            found += [np.asarray(s[suffix]) for s in map(Decoder([imagehandler("rgb8")]), samples) if suffix in s]
    return found


def test_the_stream_reads_what_webdataset_reads(tmp_path):
    src = make_set(tmp_path / "set")
    manifest = index(src).manifest
    stream = batches(src, manifest, seed=0, start=0, batch=14, window=3)
    images, labels = next(stream)
    stream.close()
    ours = sorted(zip(images.permute(0, 2, 3, 1).numpy().tolist(), labels.tolist(), strict=True))
    expected = [pixels.tolist() for pixels in theirs(src, "jpg")]
    kept = [n % 3 for n in range(17) if n not in (2, 8, 16)]
    assert ours == sorted(zip(expected, kept, strict=True))


def test_pictures_of_many_sizes_are_brought_into_form_as_they_are_read(tmp_path):
    src = make_set(tmp_path / "set", lambda n: (20 + n, 30 + 2 * n))
    with pytest.raises(ValueError, match=r"the 14 images of .*set cannot be taken as they are: 14 sizes from 20x30 to"):
        index(src)
    with pytest.raises(ValueError, match=r"\nSay --resolution, such as --resolution 16: each is then brought"):
        index(src)
    manifest, report, _, _ = index(src, wish=Wish(8, 8, resize="box"))
    assert (manifest.width, manifest.height, manifest.conform) == (8, 8, True)
    assert (manifest.codec, manifest.resize, manifest.background) == ("jpeg", "box", "#ffffff")
    assert report.not_alike == ["14 sizes from 20x30 to 35x60"]
    assert verify(src, progress=False) == []
    stream = batches(src, manifest, seed=0, start=0, batch=14, window=3)
    images, _ = next(stream)
    stream.close()
    form = Form(8, 8, 3, "png", None, "box", "#ffffff")
    expected = [conform(data, form).tolist() for data, _ in rows(src, manifest)]
    assert sorted(images.permute(0, 2, 3, 1).numpy().tolist()) == sorted(expected)


def test_another_try_with_a_size_does_not_read_the_tars_again(tmp_path, monkeypatch):
    src = make_set(tmp_path / "set", lambda n: (20 + n, 30))
    with pytest.raises(ValueError, match=r"Say --resolution"):
        index(src)
    write_tar(src / "00003.tar", sample("new", image(0)))
    read = []
    scan_tar = scan.scan_tar
    monkeypatch.setattr(foreign, "scan_tar", lambda task, tick: (read.append(task.tar), scan_tar(task, tick))[1])
    assert index(src, wish=Wish(8, 8)).manifest.count == 15
    assert read == ["00003.tar"]
    assert not (src / WORK).exists()


@pytest.mark.parametrize(
    ("files", "wish", "expected"),
    [
        ([image(0), image(1)], Wish(), (16, 16, 3, "jpeg", False)),
        ([image(0), image(1)], Wish(16, 16), (16, 16, 3, "jpeg", False)),
        ([image(0), image(1)], Wish(8, 8), (8, 8, 3, "jpeg", True)),
        ([image(0), image(1)], Wish(16, 16, channels=1), (16, 16, 1, "jpeg", True)),
        ([image(0, mode="L")], Wish(), (16, 16, 1, "jpeg", False)),
        ([image(0, mode="L")], Wish(16, 16, channels=3), (16, 16, 3, "jpeg", True)),
        ([image(0, mode="L"), image(1)], Wish(16, 16), (16, 16, 3, "jpeg", True)),
        ([image(0, mode="L"), image(1, (8, 8), mode="L")], Wish(16, 16), (16, 16, 1, "jpeg", True)),
        ([image(0, format_="PNG"), image(1)], Wish(16, 16), (16, 16, 3, "mixed", True)),
        ([image(0, format_="PNG", mode="RGBA")], Wish(), (16, 16, 4, "png", False)),
        ([image(0, format_="PNG", mode="RGBA")], Wish(16, 16, channels=3), (16, 16, 3, "png", True)),
        ([image(0, format_="PNG", mode="RGBA"), image(1, format_="PNG")], Wish(16, 16), (16, 16, 3, "png", True)),
        ([image(0, (20, 10), format_="WEBP")], Wish(), (20, 10, 3, "webp", False)),
        ([image(0, format_="BMP")], Wish(16, 16), (16, 16, 3, "mixed", True)),
    ],
)
def test_what_the_images_become(tmp_path, files, wish, expected):
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", data) for i, data in enumerate(files)])
    manifest = index(tmp_path, wish=wish).manifest
    assert (manifest.width, manifest.height, manifest.channels, manifest.codec, manifest.conform) == expected
    assert (manifest.resize == "unknown") == (not manifest.conform)
    assert verify(tmp_path, progress=False) == []


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([image(0), image(1, (8, 8))], "2 sizes from 8x8 to 16x16.\n.* --resolution 8:"),
        ([image(0, (40, 30)), image(1, (40, 30), "PNG")], "1 jpeg, 1 png.\n.* --resolution 40x30:"),
        ([image(0), image(1, mode="L")], "1 colour, 1 grey.\n.* --resolution 16:"),
        ([image(0), image(1, format_="BMP")], "1 bmp, 1 jpeg; 1 stored as BMP."),
        ([image(0, format_="PNG"), image(1, format_="PNG", transparency=(0, 0, 0))], ": 1 with a transparent colour."),
    ],
)
def test_images_that_differ_need_a_size(tmp_path, files, told):
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", data) for i, data in enumerate(files)])
    with pytest.raises(ValueError, match=told) as caught:
        index(tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_the_suggested_size_is_one_that_most_have(tmp_path):
    sizes = [(300, 200)] * 19 + [(20, 500)]
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", image(i, size)) for i, size in enumerate(sizes)])
    with pytest.raises(ValueError, match=r"--resolution 128:"):
        index(tmp_path)


# Samples and tars that cannot be used


def test_what_cannot_be_used_is_left_out_and_listed(tmp_path):
    files = [*sample("good", image(0)), ("empty.jpg", b""), ("empty.json", b"{}"), ("html.jpg", b"<html>404")]
    files += [("short.jpg", image(1)[:60]), ("fine.jpg", image(2))]
    write_tar(tmp_path / "a.tar", files)
    write_tar(tmp_path / "b.tar", [("x.json", b"{}")])
    write_tar(tmp_path / "c.tar", [])
    write_tar(tmp_path / "d.tar", [("y.jpg", b"")])
    (tmp_path / "e.tar").write_bytes(b"")
    (tmp_path / "f.tar").write_text("<!doctype html>" * 99)
    manifest, report, _, _ = index(tmp_path)
    assert [shard.name for shard in manifest.shards] == ["a.tar"]
    assert rows(tmp_path, manifest) == [(image(0), -1), (image(2), -1)]
    listed = [(one.tar, one.key, one.reason) for one in report.left_out]
    assert [(tar, key) for tar, key, _ in listed] == [
        ("a.tar", "empty"), ("a.tar", "html"), ("a.tar", "short"), ("d.tar", "y"),
    ]  # fmt: skip
    assert [reason for _, _, reason in listed][:2] == ["empty file", "not a picture in a known format"]
    assert all(reason for _, _, reason in listed)
    whole = [fault.tar for fault in report.faults if fault.what == "no usable image: left out"]
    assert whole == ["b.tar", "c.tar", "d.tar", "e.tar", "f.tar"]
    assert {fault.tar: fault.what for fault in report.faults if fault.what[:2] != "no"}.keys() == {"e.tar", "f.tar"}
    assert report.without_image == 1
    assert json.loads((tmp_path / "report.json").read_text()) == report.model_dump(mode="json")
    assert verify(tmp_path, progress=False) == []
    assert not list(tmp_path.glob("[b-f].tar.npy"))


def test_a_cut_tar_gives_its_whole_samples(tmp_path):
    make_set(tmp_path)
    with open(tmp_path / "00001.tar", "r+b") as file:
        file.truncate(3000)
    manifest, report, _, _ = index(tmp_path)
    assert [shard.count for shard in manifest.shards] == [4, 7]
    with tarfile.open(tmp_path / "00002.tar") as tar:
        second = tar.getmember("000020001.jpg")
    with open(tmp_path / "00002.tar", "r+b") as file:
        file.truncate(second.offset_data + 10)
    (tmp_path / FILE).unlink()
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(
        ValueError, match=r"no usable image in .*000010000 in 00001.tar: the tar is damaged or ends there"
    ):
        index(tmp_path)
    write_tar(tmp_path / "00002.tar", sample("a", image(0)) + sample("b", image(1)))
    content = (tmp_path / "00002.tar").read_bytes()
    (tmp_path / "00002.tar").write_bytes(content[: content.index(b"b.jpg") + 600])
    manifest, report, _, _ = index(tmp_path)
    assert rows(tmp_path, manifest) == [(image(0), -1)]
    assert [(one.tar, one.key) for one in report.left_out] == [("00001.tar", "000010000"), ("00002.tar", "b")]
    assert ["cut off at byte" in fault.what for fault in report.faults] == [True, True, False]
    assert verify(tmp_path, progress=False) == []


def test_links_in_place_of_images_are_listed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(image(0))
        tar.addfile(info, io.BytesIO(image(0)))
        for name in ("b.jpg", "b.json"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, "a.jpg"
            tar.addfile(info)
    report = index(tmp_path).report
    assert [(one.key, one.reason) for one in report.left_out] == [("b", "b.jpg is a link")]


def test_nothing_usable(tmp_path):
    src = tmp_path / "set"
    write_tar(src / "a.tar", [("x.png", b"")])
    with pytest.raises(ValueError, match=r"no usable image in .*; the first, x in a.tar: empty file"):
        index(src)
    assert not (src / WORK).exists()  # free for another try
    write_tar(src / "a.tar", [("x.txt", b""), ("x.json", b"")])
    with pytest.raises(ValueError, match=r"no pictures in .*: looked for .png.*--image SUFFIX takes others"):
        index(src)
    with pytest.raises(ValueError, match=r"no sample in .* has a .left.png; there are: .txt, .json"):
        index(src, rules=Rules(image="left.png"))
    (src / "a.tar").write_text("no tar")
    with pytest.raises(ValueError, match=r"no usable image in .*; a.tar: "):
        index(src)
    (src / "a.tar").unlink()
    with pytest.raises(ValueError, match=r"no tars in .*set: --index-only is for WebDataset tars"):
        index(src)
    with pytest.raises(ValueError, match=r"there is no .*nowhere to take tars from"):
        index(tmp_path / "nowhere")


def test_compressed_tars_are_refused_with_advice(tmp_path):
    make_set(tmp_path)
    shutil.copy(tmp_path / "00000.tar", tmp_path / "00003.tar.gz")
    with pytest.raises(ValueError, match=r"00003.tar.gz is compressed.*\ngzip -dc .*00003.tar.gz > .*00003.tar$"):
        index(tmp_path)
    (tmp_path / "00003.tar.gz").rename(tmp_path / "00003.tar")
    (tmp_path / "00003.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(ValueError, match=r"00003.tar is compressed.*\ngzip -dc .* && mv "):
        index(tmp_path)


# Several pictures, keys, labels


PAIRS = [("7.left.png", image(1, format_="PNG")), ("7.right.png", image(2, format_="PNG")), ("7.cls", b"3")]


def test_several_pictures_in_a_sample(tmp_path):
    write_tar(tmp_path / "a.tar", [*sample("5", image(0)), *PAIRS])
    with pytest.raises(
        ValueError, match=r"sample 7 in .*a.tar has several pictures: 7.left.png, 7.right.png.\nSay whic"
    ):
        index(tmp_path)
    manifest, report, _, _ = index(tmp_path, rules=Rules(image="right.png"))
    assert rows(tmp_path, manifest) == [(image(2, format_="PNG"), 3)]
    assert report.without_image == 1
    (tmp_path / FILE).unlink()
    manifest = index(tmp_path, rules=Rules(image="left.png,jpg"), wish=Wish(16, 16)).manifest
    assert [data for data, _ in rows(tmp_path, manifest)] == [image(0), image(1, format_="PNG")]


def test_dots_in_keys(tmp_path):
    files = [(f"photo.v{i}.{suffix}", data) for i in (1, 2) for suffix, data in (("jpg", image(i)), ("cls", b"%d" % i))]
    write_tar(tmp_path / "a.tar", files)
    with pytest.raises(
        ValueError, match=r"photo.v1.jpg, photo.v2.jpg.\n.* If each is a sample of its own: --keys last"
    ):
        index(tmp_path)
    manifest = index(tmp_path, rules=Rules(keys="last-dot")).manifest
    assert rows(tmp_path, manifest) == [(image(1), 1), (image(2), 2)]
    assert verify(tmp_path, progress=False) == []


def test_files_of_a_sample_that_are_not_side_by_side(tmp_path):
    files = [(f"{i}.jpg", image(i)) for i in range(3)] + [(f"{i}.cls", b"1") for i in range(3)]
    write_tar(tmp_path / "a.tar", files)
    manifest, report, _, _ = index(tmp_path)
    assert (manifest.count, manifest.classes) == (3, 0)
    assert (report.repeated_keys, report.without_image) == (3, 3)


def test_labels_of_a_field(tmp_path):
    src = make_set(tmp_path / "set")
    manifest = index(src, tmp_path / "kinds", rules=Rules(label_field="source.kind")).manifest
    assert manifest.class_names == ["cat", "dog"]
    assert [label for _, label in rows(tmp_path / "kinds", manifest)] == [
        n % 2 for n in range(17) if n not in (2, 8, 16)
    ]
    with pytest.raises(
        ValueError, match=r"no sample in .*set has the field kind in its .json; there are: caption, url, k"
    ):
        index(src, tmp_path / "none", rules=Rules(label_field="kind"))
    with pytest.raises(ValueError, match=r"the label of .*.jpg in .*00000.tar is {'kind': 'cat'}: only classes"):
        index(src, tmp_path / "none", rules=Rules(label_field="source"))
    with pytest.raises(ValueError, match=r"--label-field takes the labels from the samples' .json, --labels none does"):
        index(src, tmp_path / "none", labels="none", rules=Rules(label_field="kind"))


def test_samples_without_a_label_stay(tmp_path):
    src = tmp_path / "set"
    write_tar(src / "a.tar", [("1.jpg", image(1)), ("1.cls", b"dog"), ("2.jpg", image(2)), ("3.jpg", image(3))])
    write_tar(src / "sub" / "b.tar", [("4.jpg", image(4)), ("4.cls", b"cat")])
    manifest, report, _, _ = index(src)
    assert [label for _, label in rows(src, manifest)] == [1, -1, -1, 0]
    assert (manifest.class_names, manifest.class_counts) == (["cat", "dog"], [1, 1])
    assert report.unlabelled == 2
    assert verify(src, progress=False) == []
    manifest, report, _, _ = index(src, tmp_path / "none", labels="none")
    assert (manifest.class_names, manifest.class_counts, report.unlabelled) == ([], [], 0)
    assert verify(tmp_path / "none", progress=False) == []


def test_labels_from_a_file(tmp_path):
    src = make_set(tmp_path / "set")
    labels = tmp_path / "labels.csv"
    labels.write_text("key,label\n000000000,dog\n00001.tar/000010001,cat\n000020001.jpg,ant\nunused,bee\n")
    manifest, report, _, _ = index(src, tmp_path / "data", labels=str(labels), workers=2)
    assert manifest.class_names == ["ant", "bee", "cat", "dog"]
    assert manifest.class_counts == [1, 0, 1, 1]
    assert [label for _, label in rows(tmp_path / "data", manifest)] == [3, -1, -1, -1, -1, 2, -1, 0, *[-1] * 6]
    assert report.unlabelled == 11
    labels.write_text("x,1\n")
    with pytest.raises(
        ValueError, match=r"labels.csv names no sample of .*: it has 'x', for instance; samples are named"
    ):
        index(src, tmp_path / "none", labels=str(labels))
    with pytest.raises(ValueError, match=r"--labels folders does not go with tars"):
        index(src, tmp_path / "none", labels="folders")


def test_an_index_that_was_forged(tmp_path):
    """All hashes agree, but it is not of these images."""
    src = make_set(tmp_path / "set")
    manifest = index(src).manifest
    shard = manifest.shards[0]
    array = load_index(src, shard)
    array[0, 2] = 3
    array[1, 0] += 1
    array[2, 3] += 1
    np.save(src / shard.index, array)
    forged = shard.model_copy(update={"index_sha256": hashlib.sha256((src / shard.index).read_bytes()).hexdigest()})
    write_manifest(manifest.model_copy(update={"shards": [forged, *manifest.shards[1:]]}), src)
    assert [(fault.key, fault.what) for fault in verify(src, progress=False)] == [
        ("000000000.jpg", "the index gives it the label 3 of 3 classes"),
        ("000000003.jpg", "its bytes are not those that were indexed"),
        (f"byte {array[1, 0]}", "its bytes are not those that were indexed"),
    ]


def test_an_image_that_does_not_decode(tmp_path):
    """Its header is whole, so it is in the index."""
    write_tar(tmp_path / "a.tar", [("1.jpg", image(1, (64, 64))[:-300]), ("2.jpg", image(2, (64, 64)))])
    for wish in (Wish(), Wish(8, 8)):
        index(tmp_path, wish=wish)
        (fault,) = verify(tmp_path, progress=False)
        assert (fault.file, fault.key) == ("a.tar", "1.jpg")
        (tmp_path / FILE).unlink()


# The folder of the manifest, and doing it again


def test_a_manifest_elsewhere(tmp_path):
    src = make_set(tmp_path / "set")
    write_tar(src / "more" / "00000.tar", sample("x", image(99)))
    before = tree(src)
    manifest = index(src, tmp_path / "data").manifest
    assert tree(src) == before
    assert manifest.root == str(src)
    assert [shard.name for shard in manifest.shards][3] == "more/00000.tar"
    assert len(rows(tmp_path / "data", manifest)) == 15
    assert verify(tmp_path / "data", progress=False) == []
    one = index(src / "00001.tar", tmp_path / "one").manifest
    assert [(shard.name, shard.count) for shard in one.shards] == [("00001.tar", 3)]
    two = index(f"{src}/0000{{1..2}}.tar", tmp_path / "two").manifest
    assert [shard.name for shard in two.shards] == ["00001.tar", "00002.tar"]
    with pytest.raises(
        ValueError, match=r"say where the index is to be: styleloom prepare --index-only .*00001.tar DEST"
    ):
        index(src / "00001.tar")
    with pytest.raises(FileNotFoundError, match=r"00003\.tar"):
        index(f"{src}/0000{{1..9}}.tar", tmp_path / "nine")


def test_the_result_does_not_depend_on_the_workers(tmp_path):
    src = make_set(tmp_path / "set")
    for workers in (1, 2):
        index(src, tmp_path / f"{workers}", workers=workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


class Interrupt(KeyboardInterrupt):
    pass


def left_by_a_kill(path: Path) -> None:
    """Leaves what a process was writing to `path` when it was killed, under the name that it has then."""
    temporary = path
    with contextlib.suppress(Interrupt), atomic_file(path) as file:
        temporary = Path(file.name)
        raise Interrupt
    assert temporary != path
    temporary.write_bytes(b"left by a kill")


@pytest.mark.parametrize("call", [1, 2, 5, 6, 7, 9, 10, 11])
def test_interrupted_anywhere_it_continues(tmp_path, monkeypatch, call):
    """Stops at the n-th rename: two for each record of 3 tars, one for each index, report and manifest."""
    src = make_set(tmp_path / "set")
    shutil.copytree(src, tmp_path / "other")
    index(tmp_path / "other")
    (src / "precious.tmp").write_text("theirs")
    before = tree(src)
    fsync, calls = os.fsync, 0

    def stopping(descriptor):
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device") if call % 2 else Interrupt
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", stopping)
    with pytest.raises((Interrupt, OSError)):
        index(src)
    monkeypatch.setattr(os, "fsync", fsync)
    for path in (src / "00000.tar.npy", src / FILE, src / "report.json", src / WORK / "x.json"):
        left_by_a_kill(path)
    with pytest.raises(ValueError, match=r"half-written"):
        read_manifest(src)
    read = []
    scan_tar = scan.scan_tar
    monkeypatch.setattr(foreign, "scan_tar", lambda task, tick: (read.append(task.tar), scan_tar(task, tick))[1])
    index(src)
    assert len(read) == 3 - min(3, (call - 1) // 4)  # each rename syncs the file and its folder
    assert tree(src) == tree(tmp_path / "other") | before


def test_a_finished_one_is_recognised(tmp_path):
    src = make_set(tmp_path / "set")
    first = index(src)
    before = tree(src)
    again = index(src)
    assert again == first._replace(already=True)
    with pytest.raises(
        ValueError, match=r"indexed already, but otherwise: width is None there, 8 here; height is .*\nTo m"
    ):
        index(src, wish=Wish(8, 8))
    write_tar(src / "00003.tar", sample("new", image(0)))
    with pytest.raises(
        ValueError, match=r"otherwise: other tars, or of other sizes.\n.*delete .*manifest.json \(the tars"
    ):
        index(src)
    (src / "00003.tar").unlink()
    assert tree(src) == before
    (src / "00001.tar.npy").unlink()
    with pytest.raises(ValueError, match=r"00001.tar.npy is missing.\nTo make it anew, delete .*manifest.json"):
        index(src)
    (src / FILE).unlink()  # as was advised
    index(src)
    assert tree(src) == before


def test_files_of_others_are_left_alone(tmp_path):
    src = make_set(tmp_path / "set")
    (src / "report.json").write_text("{}")
    before = tree(src)
    with pytest.raises(
        ValueError, match=r"holds a manifest.json or report.json that .* did not write: say another folder"
    ):
        index(src)
    (src / "report.json").rename(src / FILE)
    with pytest.raises(ValueError, match=r"holds a manifest.json or report.json that .* did not write"):
        index(src)
    assert sorted(tree(src).values()) == sorted(before.values())
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.jpg").write_bytes(image(1))
    prepare(open_source(tmp_path / "pictures"), tmp_path / "ours", width=8, height=8, progress=False)
    with pytest.raises(ValueError, match="is a data set of styleloom prepare: it is indexed, train from it as it is"):
        index(tmp_path / "ours", tmp_path / "data")
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"is not empty"):
        index(src, tmp_path)
    with pytest.raises(ValueError, match=r"is a file"):
        index(src, tmp_path / "thesis.txt")
    (tmp_path / "begun" / WORK).mkdir(parents=True)
    (tmp_path / "begun" / WORK / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"an unfinished prepare without --index-only"):
        index(src, tmp_path / "begun")


def test_an_array_of_others_is_not_overwritten(tmp_path):
    src = make_set(tmp_path / "set")
    (src / "00001.tar.npy").write_bytes(b"precious")
    before = tree(src)
    with pytest.raises(ValueError, match=r"00001\.tar\.npy is there already, .*: give another folder as DEST$"):
        index(src)
    assert tree(src) == before
    assert not (src / WORK).exists()
    index(src, tmp_path / "data")
    assert tree(src) == before


def test_the_index_of_a_nested_data_set_is_not_overwritten(tmp_path):
    make_set(tmp_path / "set" / "sub")
    index(tmp_path / "set" / "sub", labels="none")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"sub/00000\.tar\.npy is there already, and not of this data set"):
        index(tmp_path / "set")
    assert tree(tmp_path) == before


def test_a_work_folder_of_others_is_left_alone(tmp_path):
    src = make_set(tmp_path / "set")
    (src / WORK).mkdir()
    (src / WORK / "thesis.txt").write_text("precious")
    shutil.copytree(src / WORK, tmp_path / "data" / WORK)
    before = tree(src)
    for folder in (src, tmp_path / "data"):
        with pytest.raises(ValueError, match=r"holds a folder \.prepare that styleloom did not make: move it, or give"):
            index(src, folder)
    assert tree(src) == before
    shutil.rmtree(src / WORK)
    index(src)
    shutil.copytree(tmp_path / "data" / WORK, src / WORK)
    assert index(src).already
    assert (src / WORK / "thesis.txt").exists()


def test_a_tar_that_changed_but_for_its_size(tmp_path):
    src = make_set(tmp_path / "set")
    index(src)
    tar, later = src / "00001.tar", (src / FILE).stat().st_mtime_ns + 10**9
    os.utime(tar, ns=(later, later))
    assert index(src).already  # touched only
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(later, later))
    with pytest.raises(ValueError, match=r"00001\.tar changed since it was indexed\.\nTo make it anew, delete .*json"):
        index(src)
    (src / FILE).unlink()  # as was advised
    index(src)
    assert verify(src, progress=False) == []


def test_a_refusal_leaves_nothing(tmp_path):
    src = tmp_path / "set"
    write_tar(src / "a.tar", [("1.jpg", image(1)), ("1.cls", b"0.5")])
    before = tree(src)
    with pytest.raises(ValueError, match=r"only classes are supported"):
        index(src)
    assert tree(src) == before
    assert not (src / WORK).exists()


def test_labels_of_a_file_that_are_no_classes(tmp_path):
    src = make_set(tmp_path / "set")
    labels = tmp_path / "labels.json"
    for bad in (0.5, [1, 2], True):
        labels.write_text(json.dumps({"labels": [["000000000.jpg", 1], ["unused.jpg", bad]]}))
        with pytest.raises(ValueError, match=r"the label of unused.jpg in .*labels.json is .*: only classes"):
            index(src, tmp_path / "data", labels=str(labels))
    labels.write_text(json.dumps({"labels": [["000000000.jpg", 1], ["unused.jpg", None]]}))
    assert index(src, tmp_path / "data", labels=str(labels)).manifest.class_names == ["0", "1"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs permissions")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    src = make_set(tmp_path / "set")
    src.chmod(0o500)
    with pytest.raises(ValueError, match=r"cannot be written to: say where the index is to be"):
        index(src)


@pytest.mark.skipif(os.name != "posix", reason="needs flock")
def test_two_at_once_are_refused(tmp_path):
    src = make_set(tmp_path / "set")
    (src / WORK).mkdir()
    (src / WORK / "index-only").touch()
    with locked(src / WORK / "lock", "held"), pytest.raises(ValueError, match=r"another styleloom prepare is writing"):
        index(src)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wish": Wish(0, 8)}, "resolution 0x8"),
        ({"wish": Wish(8, 8, channels=2)}, "--channels is one of 1, 3, 4, not 2"),
        ({"wish": Wish(8, 8, resize="nearest")}, "--resize is one of"),
        ({"wish": Wish(8, 8, background="white")}, "--background is a colour"),
        ({"rules": Rules("dots")}, "--keys is one of"),
        ({"labels": "nowhere.txt"}, "--labels takes"),
        ({"workers": 0}, "--workers must be at least 1"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(tmp_path, options, message):
    src = make_set(tmp_path / "set")
    before = tree(src)
    with pytest.raises(ValueError, match=message):
        index(src, **options)
    assert tree(src) == before


def test_names_that_a_manifest_cannot_hold(tmp_path):
    make_set(tmp_path)
    (tmp_path / "00000.tar").rename(tmp_path / "12:30.tar")
    with pytest.raises(ValueError, match=r"'12:30.tar' in .* cannot be named in a manifest: rename it"):
        index(tmp_path)
    (tmp_path / "12:30.tar").rename(tmp_path / "two words é.TAR")
    manifest = index(tmp_path).manifest
    assert manifest.shards[2].name == "two words é.TAR"
    assert verify(tmp_path, progress=False) == []


# Remote tars


@pytest.fixture
def _impatient(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(storage, "LONGEST_DELAY", 0.01)


@pytest.mark.usefixtures("_impatient")
def test_tars_on_a_server_that_fails(tmp_path, serve):
    src = make_set(tmp_path / "web" / "a set")
    here = index(src, tmp_path / "here").manifest
    with serve(tmp_path / "web", lambda path: ["503", "drop"] if path.endswith(".tar") else []) as server:
        pattern = f"{server.url}/a%20set/{{00000..00002}}.tar"
        with pytest.raises(
            ValueError, match=r"say where the index is to be: styleloom prepare --index-only http.* DEST"
        ):
            index(pattern)
        manifest = index(pattern, tmp_path / "there", workers=2).manifest
        assert manifest.root == f"{server.url}/a%20set"
        assert manifest == here.model_copy(update={"root": manifest.root})
        assert manifest.hash == here.hash
        assert sorted(tree(tmp_path / "there")) == sorted(tree(tmp_path / "here"))  # no tar was kept
        assert verify(tmp_path / "there", progress=False) == []
        stream = batches(
            tmp_path / "there", manifest, seed=0, start=0, batch=14, window=3, cache=(str(tmp_path / "cache"), 10**9)
        )
        images, _ = next(stream)
        stream.close()
        assert sorted(images.permute(0, 2, 3, 1).numpy().tolist()) == sorted(p.tolist() for p in theirs(src, "jpg"))
        shutil.copy(src / "00000.tar", src / "two words.tar")
        one = index(f"{server.url}/a%20set/two%20words.tar", tmp_path / "one").manifest
        assert (one.root, one.shards[0].name) == (f"{server.url}/a%20set", "two words.tar")
        (src / "00002.tar").unlink()
        assert [(f.file, f.what) for f in verify(tmp_path / "there", progress=False)] == [("00002.tar", "is missing")]


@pytest.mark.usefixtures("_impatient")
def test_what_was_fetched_is_not_fetched_again(tmp_path, serve):
    src = make_set(tmp_path / "set", lambda n: (20 + n, 30))
    with serve(src) as server:
        pattern = f"{server.url}/{{00000..00003}}.tar?token=secret"
        with pytest.raises(FileNotFoundError, match=r"cannot read http://.*/00003\.tar: HTTP 404") as caught:
            index(pattern, tmp_path / "data")
        assert "secret" not in str(caught.value)
        shutil.copy(src / "00000.tar", src / "00003.tar")
        with pytest.raises(ValueError, match="Say --resolution") as caught:
            index(pattern, tmp_path / "data")
        assert "secret" not in str(caught.value)
        manifest = index(pattern, tmp_path / "data", wish=Wish(8, 8)).manifest
        assert manifest.root == f"{server.url}?token=secret"
        assert {server.count(f"0000{i}.tar") for i in range(3)} == {1}
        assert verify(tmp_path / "data", progress=False) == []


def test_places_that_do_not_list_their_files(tmp_path, serve):
    with serve(tmp_path) as server:
        with pytest.raises(
            ValueError, match=r"cannot be listed: name the tars, as in https://host/set/\{00000..00099\}"
        ):
            index(server.url, tmp_path / "data")
        with pytest.raises(ValueError, match=r"a\.tgz is compressed.*\ngzip -dc "):
            index(f"{server.url}/a.tgz", tmp_path / "data")
    with pytest.raises(ValueError, match="is a command: a manifest does not name commands"):
        index("pipe:cat {0..9}.tar", tmp_path / "data")
    with pytest.raises(ValueError, match="not below one folder"):
        index("https://{a,b}.example.org/0.tar", tmp_path / "data")
    with pytest.raises(ValueError, match="signed one by one"):
        index("https://example.org/0.tar?{a,b}", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_tars_in_an_object_store(tmp_path, s3):
    src = make_set(tmp_path / "set")
    for path in sorted(src.iterdir()):
        s3.upload_file(str(path), "bucket", f"sets/one/{path.name}")
    s3.upload_file(str(src / "00000.tar"), "bucket", "sets/one/more/5.tar")
    manifest = index("s3://bucket/sets/one/", tmp_path / "data").manifest
    assert manifest.root == "s3://bucket/sets/one"
    assert [shard.name for shard in manifest.shards] == ["00000.tar", "00001.tar", "00002.tar", "more/5.tar"]
    assert manifest.count == 18
    assert verify(tmp_path / "data", progress=False) == []
    with pytest.raises(ValueError, match="no tars in s3://bucket/sets/two"):
        index("s3://bucket/sets/two", tmp_path / "none")
    s3.upload_file(str(src / "00000.tar"), "bucket", "sets/one/6.tar.gz")
    with pytest.raises(ValueError, match=r"s3://bucket/sets/one/6\.tar\.gz is compressed"):
        index("s3://bucket/sets/one/", tmp_path / "none")


# The command


def test_the_command(tmp_path, call):
    src = make_set(tmp_path / "my set", lambda n: (20 + n, 30))
    status, _, err = call(main, "--index-only", src, "--workers", 1)
    assert status == 1
    assert err.splitlines()[-1].startswith(
        "Say --resolution, such as --resolution 16: each is then brought to that size"
    )
    status, out, _ = call(main, "--index-only", src, "--resolution", 8, "--workers", 1)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{src} is ready: 14 images in 3 tars, 0.")
    assert lines[0].endswith(" MB, 3 classes.")
    assert lines[1] == (
        "Each is brought to 8x8 as it is read, since not all are alike: 14 sizes from 20x30 to 35x30."
    )  # fmt: skip
    assert lines[2] == f"Besides: 3 samples without an image. See {src}/report.json"
    assert lines[3] == f"Next: styleloom train stylegan2-cpu --data.path '{src}' --out RUN"
    options = ["--label-field", "source.kind", "--channels", 1, "--resize", "box", "--background", "#000000"]
    status, out, _ = call(
        main, src, tmp_path / "kinds", "--index-only", "--resolution", "8x4", *options, "--workers", 1
    )  # fmt: skip
    assert status == 0
    assert f"14 images in 3 tars in {src}, " in out
    manifest = read_manifest(tmp_path / "kinds")
    assert (manifest.class_names, manifest.channels) == (["cat", "dog"], 1)
    assert (manifest.width, manifest.height, manifest.resize, manifest.background) == (8, 4, "box", "#000000")
    status, out, _ = call(inspect, tmp_path / "kinds", "--verify", "--workers", 1, "--grid", tmp_path / "grid.png")
    assert status == 0
    assert "stored   jpeg, as others encoded them" in out
    assert out.splitlines()[-1] == "sound: 14 images hashed and decoded."
    status, out, _ = call(main, src, "--index-only", "--resolution", 8, "--workers", 1)
    assert (status, out.partition(":")[0]) == (0, f"{src} is indexed already")
    with open(src / "00001.tar", "r+b") as file:
        file.seek(600)
        file.write(b"?")
    status, out, _ = call(inspect, src, "--verify", "--workers", 1)
    assert status == 1
    assert "00001.tar 000010000.jpg: its bytes are not those that were indexed" in out
    assert f"2 faults. Restore these files, or delete {src}/manifest.json (not the tars) and prepare it again." in out


def test_a_set_that_is_alike_needs_no_options(tmp_path, call):
    src = make_set(tmp_path / "set")
    status, out, _ = call(main, src, "--index-only", "--workers", 1, "--labels", "none")
    assert status == 0
    assert "All are jpeg of 16x16 and taken as they are." in out
