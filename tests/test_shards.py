"""datasets/shards.py: the same bytes every time, whatever happens in between. datasets/verify.py: finds every fault."""

import hashlib
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from webdataset.autodecode import Decoder, imagehandler
from webdataset.tariterators import group_by_keys, tar_file_expander

from styleloom.datasets import shards, writer
from styleloom.datasets.decode import decode
from styleloom.datasets.manifest import WORK, content_hash, load_index, read_manifest, write_manifest
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.verify import verify

COUNT, BROKEN = 23, (4, 10, 11)  # 10 and 11 fill a shard


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """23 pictures in two folders; three are unreadable, one is smaller than the target. No two are the same."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = root / ("cat" if i < 9 else "dog") / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        side = 5 if i == 7 else 20
        Image.fromarray(rng.integers(0, 256, (side, side + 4, 3), np.uint8)).save(path)
        if i in BROKEN:
            path.write_bytes(path.read_bytes()[:100] if i != 11 else b"")
    return root


def make(pictures, dest, labels="folders", **options):
    options = {"width": 8, "height": 8, "shard_images": 2, "progress": False, **options}
    return prepare(open_source(pictures, labels), dest, **options)


def tree(folder) -> dict[str, str]:
    """sha256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    """Files of a data set made in one go by one process."""
    dest = tmp_path_factory.mktemp("undisturbed") / "data"
    make(pictures, dest)
    return dest


def test_what_is_in_it(pictures, undisturbed):
    manifest = read_manifest(undisturbed)
    assert manifest.count == COUNT - len(BROKEN)
    assert manifest.class_names == ["cat", "dog"]
    assert manifest.class_counts == [8, 12]
    names = [shard.name for shard in manifest.shards]
    assert names == [f"shard-{i:06d}.tar" for i in range(12) if i != 5]  # an empty shard is left out
    assert [shard.count for shard in manifest.shards] == [2, 2, 1] + [2] * 7 + [1]
    assert not (undisturbed / WORK).exists()
    assert verify(undisturbed, progress=False) == []
    keys = []
    for shard in manifest.shards:
        data = (undisturbed / shard.name).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = [(info.name, data[info.offset_data :][: info.size]) for info in tar]
            assert {(i.uid, i.gid, i.uname, i.gname, i.mtime) for i in tar} == {(0, 0, "", "", 0)}
        index = load_index(undisturbed, shard)
        for row, (offset, length, label, hashed) in enumerate(index):
            (cls, label_text), (meta, text), (png, image) = members[3 * row : 3 * row + 3]
            key = png.partition(".")[0]
            assert (cls, meta, png) == (f"{key}.cls", f"{key}.json", f"{key}.png")
            assert int(label_text) == label == (0 if int(key) < 9 else 1)
            assert data[offset : offset + length] == image
            assert hashed == content_hash(image)
            side = 5 if int(key) == 7 else 20
            source = f"{'cat' if label == 0 else 'dog'}/{int(key):03d}.png"
            assert json.loads(text) == {"source": source, "width": side + 4, "height": side}
            assert decode(image, "png", 3).shape == (3, 8, 8)
            keys.append(int(key))
    assert keys == [i for i in range(COUNT) if i not in BROKEN]


def test_the_report(undisturbed):
    report = json.loads((undisturbed / "report.json").read_text())
    assert (report["read"], report["written"], report["upscaled"]) == (23, 20, 1)
    assert [entry["source"] for entry in report["unreadable"]] == ["cat/004.png", "dog/010.png", "dog/011.png"]
    assert report["unreadable"][2]["reason"] == "empty file"
    assert all(entry["reason"] for entry in report["unreadable"])


def test_a_set_of_tars_that_others_wrote_is_not_taken_for_ours(pictures, undisturbed, tmp_path):
    dest = shutil.copytree(undisturbed, tmp_path / "data")
    write_manifest(read_manifest(dest).model_copy(update={"conform": True}), dest)
    with pytest.raises(ValueError, match="is a data set already, of another origin: choose another folder"):
        make(pictures, dest)


def test_webdataset_reads_it(undisturbed):
    samples = []
    for path in sorted(undisturbed.glob("*.tar")):
        with open(path, "rb") as file:
            samples += map(
                Decoder([imagehandler("pil")]), group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))
            )
    assert len(samples) == 20
    assert samples[0]["png"].size == (8, 8)
    assert [sample["cls"] for sample in samples] == [0] * 8 + [1] * 12


def test_the_same_bytes_however_many_workers(pictures, undisturbed, tmp_path):
    make(pictures, tmp_path / "data", workers=2)
    assert tree(tmp_path / "data") == tree(undisturbed)
    assert verify(tmp_path / "data", workers=2, progress=False) == []


class Interrupt(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("call", [1, 6, 17, 25, 40, 66, 68, 69, 70])
def test_interrupted_anywhere_it_continues(pictures, undisturbed, tmp_path, monkeypatch, call):
    """Stops at the n-th time that something is made to last, of about 6 for each of 12 shards and some more, with each
    way of stopping in turn."""
    dest = tmp_path / "data"
    fsync, calls = os.fsync, 0

    def stopping(descriptor):
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device") if call % 2 else Interrupt
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", stopping)
    with pytest.raises((Interrupt, OSError)) as caught:
        make(pictures, dest)
    if call % 2:
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == 28
        assert str(dest) in caught.value.filename
    assert not list(dest.rglob("*.tmp"))
    # Every shard under a final name is whole.
    finished = tree(undisturbed)
    for name, digest in tree(dest).items():
        assert name.startswith(WORK) or digest == finished[name]
    with pytest.raises(ValueError, match=r"half-written.*Run the same prepare again"):
        read_manifest(dest)
    made = []
    make_shard = shards.make_shard
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(shards, "make_shard", lambda task, tick: (made.append(task.number), make_shard(task, tick)))
    records = len(list((dest / WORK).glob("[0-9]*.json"))) if (dest / WORK).exists() else 0
    make(pictures, dest)
    assert len(made) == 12 - records  # nothing is made twice
    assert tree(dest) == finished


def test_a_full_disk_in_the_midst_of_a_tar(pictures, tmp_path, monkeypatch):
    class Full(writer._Hashing):
        def write(self, data):
            if self.size > 5000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(writer, "_Hashing", Full)
    with pytest.raises(OSError, match="No space left") as caught:
        make(pictures, tmp_path / "data", shard_images=10)
    assert caught.value.filename.endswith("shard-000000.tar")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [WORK]


def test_a_record_without_its_shard_does_not_count(pictures, undisturbed, tmp_path, monkeypatch):
    dest = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(pictures, dest)
    with open(dest / "shard-000001.tar", "r+b") as file:
        file.truncate(100)
    (dest / "shard-000002.npy").unlink()
    (dest / WORK / "000003.json").write_text("{")
    (dest / "shard-000006.npy").write_bytes(b"")
    (dest / "shard-000004.tar.123.tmp").write_bytes(b"left by a kill")
    make(pictures, dest)
    assert tree(dest) == tree(undisturbed)


def test_a_finished_one_is_recognised(pictures, undisturbed, tmp_path):
    dest = shutil.copytree(undisturbed, tmp_path / "data")
    outcome = make(pictures, dest)
    assert outcome.already
    assert outcome.manifest == read_manifest(undisturbed)
    assert tree(dest) == tree(undisturbed)
    with pytest.raises(ValueError, match="finished data set of another kind: width is 8 there, 16 here; height is"):
        make(pictures, dest, width=16, height=16)
    with pytest.raises(ValueError, match="the pictures or labels of the source changed; the classes differ"):
        make(pictures, dest, labels="none")
    (dest / "shard-000003.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000003\.tar is missing.*delete .* and prepare it again"):
        make(pictures, dest)


def test_an_unfinished_one_of_another_plan_is_refused(pictures, tmp_path, monkeypatch):
    dest = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_make_shards", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(pictures, dest)
    with pytest.raises(ValueError, match="unfinished prepare of another kind: resize is lanczos there, box here"):
        make(pictures, dest, resize="box")


def test_foreign_folders_are_left_alone(pictures, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        make(pictures, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        make(pictures, tmp_path / "thesis.txt")
    with pytest.raises(ValueError, match="is within the source"):
        make(pictures, pictures / "data")
    assert not (pictures / "data").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_nothing_readable(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of the 1 pictures could be read; the first, a\.png: not a picture"):
        make(source, tmp_path / "data", labels="none")
    assert list((tmp_path / "data").iterdir()) == []  # free for the next try


def test_a_source_that_goes_away_is_not_reported_as_unreadable_pictures(pictures, tmp_path, monkeypatch):
    source = shutil.copytree(pictures, tmp_path / "source")
    listed = open_source(source)
    shutil.rmtree(source)
    with pytest.raises(OSError, match="No such file"):
        prepare(listed, tmp_path / "data", width=8, height=8, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "jpeg", "channels": 4}, "JPEG has no alpha"),
        ({"quality": 90}, "PNG is lossless"),
        ({"codec": "jpeg", "quality": 0}, "--quality is 1 to 100"),
        ({"width": 0}, "resolution 0x8"),
        ({"height": 99999}, "resolution 8x99999"),
        ({"background": "white"}, "--background is a colour such as '#ffffff', not 'white'"),
        ({"shard_images": 0}, "at least 1"),
        ({"workers": 0}, "at least 1"),
        ({"codec": "gif"}, "--codec is one of png, jpeg, webp, not gif"),
        ({"channels": 2}, "--channels is one of 1, 3, 4, not 2"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(pictures, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(pictures, tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "jpeg"},
        {"codec": "jpeg", "channels": 1},
        {"codec": "webp", "channels": 4, "quality": 80},
        {"codec": "webp", "channels": 1},
        {"channels": 4},
        {"channels": 1, "width": 12},
    ],
)
def test_every_kind_is_sound(pictures, tmp_path, options):
    manifest = make(pictures, tmp_path / "data", shard_images=100, labels="none", **options).manifest
    quality = {"png": None, "jpeg": 95, "webp": 95}[manifest.codec]
    assert manifest.quality == options.get("quality", quality)
    assert manifest.background == (None if manifest.channels == 4 else "#ffffff")
    assert manifest.class_counts == []
    assert verify(tmp_path / "data", progress=False) == []


def test_a_data_set_is_a_source(undisturbed, tmp_path):
    again = make(undisturbed, tmp_path / "data", labels="auto", shard_images=100).manifest
    assert (again.count, again.class_counts) == (20, [8, 12])


# Faults


@pytest.fixture
def data(undisturbed, tmp_path):
    return shutil.copytree(undisturbed, tmp_path / "data")


def faults(data, workers=1) -> list[str]:
    return [f"{fault.file} {fault.key} {fault.what}" for fault in verify(data, workers=workers, progress=False)]


def forge(data, number: int, tar: bytes | None = None, index: np.ndarray | None = None) -> None:
    """Replaces a shard's files and makes the manifest's sizes and hashes agree."""
    manifest = read_manifest(data)
    shard = manifest.shards[number]
    if tar is not None:
        (data / shard.name).write_bytes(tar)
    if index is not None:
        np.save(data / shard.index, index)
    digests = [hashlib.sha256((data / name).read_bytes()).hexdigest() for name in (shard.name, shard.index)]
    update = {"sha256": digests[0], "index_sha256": digests[1]}
    listed = list(manifest.shards)
    listed[number] = shard.model_copy(update=update)
    write_manifest(manifest.model_copy(update={"shards": listed}), data)


def test_a_flipped_byte_is_found_in_its_sample(data):
    shard = read_manifest(data).shards[3]
    offset, length, *_ = load_index(data, shard)[1]
    content = bytearray((data / shard.name).read_bytes())
    content[offset + length // 2] ^= 1
    (data / shard.name).write_bytes(content)
    found = faults(data)
    assert len(found) == 2
    assert found[0].startswith("shard-000003.tar  its sha256 is not the manifest's")
    assert found[1].startswith("shard-000003.tar 00000007 not a whole PNG image")


def test_a_flipped_byte_outside_of_the_images_is_found(data):
    path = data / "shard-000002.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert faults(data) == ["shard-000002.tar  its sha256 is not the manifest's: it changed after it was prepared"]


def test_a_truncated_tar_is_found(data):
    with open(data / "shard-000000.tar", "r+b") as file:
        file.truncate(2500)
    found = "\n".join(faults(data))
    assert "has 2500 bytes, the manifest says 10240" in found
    assert "is not a whole tar: it is broken or cut off at byte 2048" in found
    assert "holds 0 whole samples, the manifest says 2" in found


def test_missing_files_are_found(data):
    (data / "shard-000000.tar").unlink()
    (data / "shard-000001.npy").unlink()
    found = faults(data)
    assert found[0] == "shard-000000.tar  is missing"
    assert "shard-000001.npy" in found[1]
    assert len(found) == 2


def test_a_wrong_label_is_found_though_the_hashes_agree(data):
    index = load_index(data, read_manifest(data).shards[0])
    index[1, 2] = 1
    forge(data, 0, index=index)
    assert faults(data) == ["shard-000000.tar 00000001 its label is 0, the index says 1"]


def test_a_label_out_of_range_is_found(data):
    tar = (data / "shard-000000.tar").read_bytes()
    forge(data, 0, tar=tar[:512] + b"7" + tar[513:])  # the first member is 00000000.cls
    assert any("00000000 its label is 7, not 0 to 1" in fault for fault in faults(data))


def test_a_wrong_offset_is_found(data):
    index = load_index(data, read_manifest(data).shards[0])
    index[0, 0] += 1
    forge(data, 0, index=index)
    assert faults(data) == ["shard-000000.tar 00000000 the index points elsewhere"]


def test_wrong_counts_and_sizes_are_found(data):
    manifest = read_manifest(data)
    write_manifest(manifest.model_copy(update={"class_counts": [12, 8]}), data)
    assert faults(data) == ["manifest.json  class_counts are not those of the labels in the shards"]
    write_manifest(manifest.model_copy(update={"width": 16}), data)
    assert faults(data, workers=2)[0] == "shard-000000.tar 00000000 is 8x8, not 16x8"
    write_manifest(manifest.model_copy(update={"channels": 1}), data)
    assert "stored as RGB, not as L" in faults(data)[0]
    assert len(faults(data)) == manifest.count


def test_a_work_folder_of_others_is_left_alone(pictures, tmp_path):
    (tmp_path / "data" / WORK).mkdir(parents=True)
    (tmp_path / "data" / WORK / "mine.sh").write_text("mine")
    with pytest.raises(ValueError, match=r"mine.sh is not of styleloom prepare"):
        make(pictures, tmp_path / "data")
    assert (tmp_path / "data" / WORK / "mine.sh").read_text() == "mine"


def test_odd_names_of_classes(tmp_path):
    """A line break, and bytes that are no UTF-8."""
    for name in (b"c\nd", b"\xff\xfe"):
        folder = os.fsencode(tmp_path / "pictures") + b"/" + name
        os.makedirs(folder)
        Image.new("RGB", (8, 8), (name[0], 0, 0)).save(os.fsdecode(folder) + "/x.png")
    outcome = make(tmp_path / "pictures", tmp_path / "data", "folders")
    assert outcome.manifest.class_names == ["\\udcff\\udcfe", "c\nd"]


def test_a_duplicate_that_changed_before_a_resumption_is_none_any_more(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for name, colour in (("a", 10), ("b", 20), ("c", 10)):
        image = Image.fromarray(np.full((8, 8, 3), colour, np.uint8))
        image.save(tmp_path / "pictures" / f"{name}.bmp")

    def stop(task, tick):
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "make_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "pictures", tmp_path / "data", "none")
    Image.fromarray(np.full((8, 8, 3), 30, np.uint8)).save(tmp_path / "pictures" / "c.bmp")
    outcome = make(tmp_path / "pictures", tmp_path / "data", "none")
    assert outcome.manifest.count == 3
    assert not outcome.report.duplicates
