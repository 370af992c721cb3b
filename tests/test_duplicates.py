"""datasets/duplicates.py: exactly the pictures whose bytes were there before, found by reading little."""

import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from styleloom.datasets import duplicates
from styleloom.datasets.duplicates import describe, find_duplicates
from styleloom.datasets.manifest import read_manifest
from styleloom.datasets.records import REPORT, Report, read_record
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import FolderSource, open_source
from styleloom.datasets.verify import verify
from styleloom.datasets.workers import local_engine

# name -> which content; those that are given twice are duplicates
CONTENTS = {"a/0": 0, "a/1": 1, "a/2": 0, "a/3": 2, "b/0": 3, "b/1": 1, "b/2": 4, "b/3": 0}
EXPECTED = {"a/2.png": "a/0.png", "b/1.png": "a/1.png", "b/3.png": "a/0.png"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(5)]
    for name, number in CONTENTS.items():
        path = root / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        images[number].save(path)
    sizes = {path.stat().st_size for path in root.rglob("*.png")}
    assert len(sizes) == 1  # noise does not compress: size alone tells nothing
    return root


def packed(pictures, kind, tmp_path):
    """The pictures as a source of that kind."""
    names = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png"))
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.write(pictures / name, name)
        return open_source(tmp_path / "p.zip")
    if kind == "tar":
        with tarfile.open(tmp_path / "p.tar", "w") as archive:
            for name in names:
                archive.add(pictures / name, name)
        return open_source(tmp_path / "p.tar")
    return open_source(pictures)


def search(source, work, workers=1):
    found = find_duplicates(source, work, local_engine(workers), progress=False)
    return {source.entries[i].name.removeprefix("p.tar/"): source.entries[k].name.removeprefix("p.tar/")
            for i, k in found.items()}  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_the_first_of_each_kind_is_kept(pictures, tmp_path, monkeypatch, kind, workers):
    monkeypatch.setattr(duplicates, "_CHUNK", 3)
    assert search(packed(pictures, kind, tmp_path), tmp_path, workers) == EXPECTED


def test_without_any_nothing_is_found(pictures, tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copy(pictures / "a/0.png", tmp_path / "source")
    assert search(open_source(tmp_path / "source"), tmp_path) == {}


def test_pictures_that_differ_in_the_middle_only_are_not_the_same(tmp_path):
    data = bytearray(np.random.default_rng(0).bytes(100_000))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "0.png").write_bytes(data)
    data[50_000] ^= 1
    (tmp_path / "source" / "1.png").write_bytes(data)
    (tmp_path / "source" / "2.png").write_bytes(data)
    assert search(open_source(tmp_path / "source"), tmp_path) == {"2.png": "1.png"}


def test_little_is_read(tmp_path, monkeypatch):
    """Of pictures of their own size nothing, of others the end; only what agrees there is read whole."""
    root = tmp_path / "source"
    root.mkdir()
    rng = np.random.default_rng(0)
    same = rng.bytes(50_000)
    for i, data in enumerate([rng.bytes(49_999), rng.bytes(50_000), same, same, rng.bytes(60_000)]):
        (root / f"{i}.png").write_bytes(data)
    read, ends = [], []
    whole, end = FolderSource.read, duplicates._end
    monkeypatch.setattr(FolderSource, "read", lambda self, i: (read.append(self.entries[i].name), whole(self, i))[1])
    monkeypatch.setattr(duplicates, "_end", lambda part, i: (ends.append(part.entries[i].name), end(part, i))[1])
    assert search(open_source(root), tmp_path) == {"3.png": "2.png"}
    assert ends == ["1.png", "2.png", "3.png"]
    assert read == ["2.png", "3.png"]


def test_what_was_found_is_not_searched_again(pictures, tmp_path, monkeypatch):
    source = open_source(pictures)
    first = search(source, tmp_path)
    monkeypatch.setattr(duplicates, "_search", lambda *args: 1 / 0)
    assert search(source, tmp_path) == first


def test_what_cannot_be_read_is_left_to_be_reported(pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "source")
    (root / "b/3.png").unlink()
    (root / "b/3.png").symlink_to("nowhere")
    listed = open_source(pictures)
    entries = [entry if entry.name != "a/2.png" else entry._replace(name="a/gone.png") for entry in listed.entries]
    gone = FolderSource(root, entries)
    assert search(gone, tmp_path) == {"b/1.png": "a/1.png"}
    shutil.rmtree(root)
    (tmp_path / duplicates.FILE).unlink()
    with pytest.raises(OSError, match="No such file"):
        search(gone, tmp_path)


def test_they_are_dropped_and_reported_with_their_labels(pictures, tmp_path):
    source = open_source(pictures, "folders")
    outcome = prepare(source, tmp_path / "data", width=8, height=8, shard_images=3, progress=False)
    assert outcome.manifest.count == outcome.report.written == 5
    assert outcome.manifest.class_counts == [3, 2]
    assert [shard.count for shard in outcome.manifest.shards] == [2, 2, 1]  # spans of 3 of the source
    report = read_record(tmp_path / "data" / REPORT, Report)
    assert report.read == 8
    assert {twin.source: twin.kept for twin in report.duplicates} == EXPECTED
    assert {twin.source: twin.labels for twin in report.duplicates} == {
        "a/2.png": None,
        "b/1.png": ("b", "a"),
        "b/3.png": ("b", "a"),
    }
    assert verify(tmp_path / "data", progress=False) == []


def test_they_may_be_kept(pictures, tmp_path):
    source = open_source(pictures)
    kept = prepare(source, tmp_path / "data", width=8, height=8, duplicates="keep", progress=False)
    assert read_manifest(tmp_path / "data").count == 8
    assert kept.report.duplicates == []
    # They look alike, of course.
    pairs = {look.sources for look in kept.report.look_alikes.first if look.bits == 0}
    assert pairs == {("a/0.png", "a/2.png"), ("a/0.png", "b/3.png"), ("a/1.png", "b/1.png")}
    with pytest.raises(ValueError, match="duplicates is keep there, drop here"):
        prepare(source, tmp_path / "data", width=8, height=8, progress=False)
    with pytest.raises(ValueError, match="--duplicates is one of drop, keep, not ask"):
        prepare(source, tmp_path / "other", width=8, height=8, duplicates="ask", progress=False)


def test_a_shard_may_vanish(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        if i not in (2, 3):
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(root / f"{i}.png")
    for i in (2, 3):
        shutil.copy(root / f"{i - 2}.png", root / f"{i}.png")
    made = prepare(open_source(root), tmp_path / "data", width=8, height=8, shard_images=2, progress=False)
    assert [shard.name for shard in made.manifest.shards] == ["shard-000000.tar", "shard-000002.tar"]


def test_odd_names_are_reported(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    Image.new("RGB", (4, 4)).save(root / "0.png")
    source = open_source(root)
    odd = FolderSource(root, [source.entries[0], source.entries[0]._replace(name="\udcff.png")])
    assert describe(odd, {1: 0})[0].source == "\\udcff.png"
