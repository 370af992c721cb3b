"""datasets/manifest.py: what is written is read back; every kind of broken data set is named."""

import io
import json
import os

import numpy as np
import pytest

from styleloom.datasets.manifest import (
    FILE,
    WORK,
    Manifest,
    Shard,
    at_size,
    atomic_file,
    check_shard,
    content_hash,
    load_index,
    locked,
    read_manifest,
    tar_location,
    write_manifest,
)

SHARD = Shard(
    name="shard-000000.tar",
    count=2,
    bytes=10240,
    sha256="0" * 64,
    index="shard-000000.npy",
    index_sha256="1" * 64,
)
MANIFEST = Manifest(
    width=8,
    height=4,
    channels=3,
    codec="png",
    quality=None,
    resize="lanczos",
    background="#ffffff",
    class_names=["cat", "dog"],
    class_counts=[2, 0],
    count=2,
    bytes=10240,
    shards=[SHARD],
)


@pytest.fixture
def folder(tmp_path):
    write_manifest(MANIFEST, tmp_path)
    (tmp_path / SHARD.name).write_bytes(bytes(SHARD.bytes))
    np.save(tmp_path / SHARD.index, np.array([[512, 100, 0, 5], [2048, 50, 0, -5]], dtype=np.int64))
    return tmp_path


def test_is_read_as_it_was_written(folder):
    assert read_manifest(folder) == MANIFEST
    assert read_manifest(str(folder)).classes == 2
    assert not list(folder.glob("*.tmp"))


def test_the_hash_depends_on_the_content_and_not_on_the_layout(folder):
    path = folder / FILE
    path.write_text(json.dumps(json.loads(path.read_text()), indent=8, sort_keys=True))
    assert read_manifest(folder).hash == MANIFEST.hash
    assert MANIFEST.model_copy(update={"resize": "box"}).hash != MANIFEST.hash
    assert MANIFEST.model_copy(update={"root": "https://example.org/set"}).hash == MANIFEST.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "is empty"),
        (lambda text: text[: len(text) // 2], "Invalid JSON"),
        (lambda text: text.replace("styleloom-shards-2", "styleloom-shards-9"), "format"),
        (lambda text: text.replace('"count": 2', '"count": 3', 1), "count is not the sum|class_counts"),
        (lambda text: text.replace('"width": 8', '"width": 8, "depth": 1'), "depth"),
        (lambda text: text.replace("shard-000000.tar", "../secret.tar"), "shards.0.name"),
        (lambda text: text.replace("shard-000000.tar", "/etc/secret.tar"), "shards.0.name"),
        (lambda text: text.replace("shard-000000.tar", "pipe:rm -r x.tar"), "shards.0.name"),
        (lambda text: text.replace("shard-000000.npy", "a/../../b.npy"), "shards.0.index"),
        (lambda text: text.replace('"root": ""', '"root": "pipe:rm -r {}"'), "root.*tars are in a folder or at"),
        (lambda text: text.replace('"root": ""', '"root": "reference://x::http://evil"'), "root.*tars are in a folder"),
        (lambda text: text.replace('"root": ""', '"root": "https://x::file:///y"'), "root.*tars are in a folder"),
        (lambda text: text.replace('"root": ""', '"root": "ftp://host"'), "root.*tars are in a folder or at"),
        (lambda text: text.replace("shard-000000.tar", "a/b::file:///x.tar"), "shards.0.name"),
        (lambda text: text.replace('"width": 8', f'"width": {2**30}'), "width"),
        (lambda text: text.replace('"bytes": 10240', f'"bytes": {10**30}'), "bytes"),
        (lambda text: text.replace('"count": 2', f'"count": {10**9}'), "do not hold 1000000000 samples"),
        (lambda text: text.replace('"class_counts": [\n  2', '"class_counts": [\n  3'), "add up to more"),
    ],
)
def test_an_unusable_manifest_is_named(folder, change, message):
    path = folder / FILE
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(folder)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_what_is_no_data_set_is_told_apart(tmp_path):
    with pytest.raises(ValueError, match="there is no data set at"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not a data set: no manifest.json; make one with styleloom prepare SRC DEST"):
        read_manifest(tmp_path)
    (tmp_path / WORK).mkdir()
    with pytest.raises(ValueError, match=r"half-written.*Run the same prepare again"):
        read_manifest(tmp_path)


def test_check_shard(folder):
    check_shard(folder, SHARD)
    (folder / SHARD.name).write_bytes(bytes(SHARD.bytes - 1))
    with pytest.raises(
        ValueError, match=r"shard-000000.tar has 10239 bytes, the manifest says 10240.*inspect .* --verify"
    ):
        check_shard(folder, SHARD)
    (folder / SHARD.name).unlink()
    with pytest.raises(ValueError, match=r"shard-000000.tar is missing"):
        check_shard(folder, SHARD)
    (folder / SHARD.name).write_bytes(bytes(SHARD.bytes))
    (folder / SHARD.index).unlink()
    with pytest.raises(ValueError, match=r"shard-000000.npy, the index of shard-000000.tar, is missing"):
        check_shard(folder, SHARD)


@pytest.mark.parametrize(
    ("folder", "root", "location"),
    [
        ("/sets/mine", "", "/sets/mine/shard-000000.tar"),
        ("mine", "", "mine/shard-000000.tar"),
        ("/sets/mine", "../theirs", "/sets/mine/../theirs/shard-000000.tar"),
        ("/sets/mine", "/theirs/tars", "/theirs/tars/shard-000000.tar"),
        ("/sets/mine", "https://example.org/set", "https://example.org/set/shard-000000.tar"),
        ("/sets/mine", "s3://bucket/set/", "s3://bucket/set/shard-000000.tar"),
        ("s3://bucket/set", "", "s3://bucket/set/shard-000000.tar"),
        ("/sets/mine", "https://example.org/my set?key=1", "https://example.org/my set/shard-000000.tar?key=1"),
        ("s3://bucket/set", "tars", "s3://bucket/set/tars/shard-000000.tar"),
    ],
)
def test_where_a_tar_lies(folder, root, location):
    manifest = MANIFEST.model_copy(update={"root": root})
    assert tar_location(folder, manifest, SHARD) == location


TWO = MANIFEST.model_copy(
    update={
        "shards": [SHARD, SHARD.model_copy(update={"count": 1})],
        "count": 3,
        "bytes": 20480,
        "class_counts": [3, 0],
        "reduced": ["4x2"],
    }
)


def test_the_set_at_a_smaller_size(tmp_path):
    smaller = TWO.model_copy(update={"width": 4, "height": 2, "reduced": [], "codec": "jpeg", "quality": 90})
    (tmp_path / "4x2").mkdir()
    write_manifest(smaller, tmp_path / "4x2")
    assert at_size(tmp_path, TWO, 2) == (str(tmp_path / "4x2"), smaller, 1)
    for reduce in (1, 4):  # nobody prepared that
        assert at_size(tmp_path, TWO, reduce) == (tmp_path, TWO, reduce)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"width": 8}, "width"),
        ({"height": 4, "channels": 1}, "height, channels"),
        ({"class_names": ["dog", "cat"]}, "class_names"),
        ({"class_counts": [2, 1]}, "class_counts"),
        ({"shards": TWO.shards[::-1]}, "shards' counts"),  # a position would be another sample's
        ({"shards": [SHARD.model_copy(update={"count": 3, "bytes": 20480})]}, "shards' counts"),
    ],
)
def test_another_set_in_the_place_of_the_smaller_one_is_refused(tmp_path, change, what):
    (tmp_path / "4x2").mkdir()
    write_manifest(TWO.model_copy(update={"width": 4, "height": 2, "reduced": []} | change), tmp_path / "4x2")
    with pytest.raises(ValueError, match=f"4x2 is not the same data set at 4x2: its {what} differ$"):
        at_size(tmp_path, TWO, 2)


def test_nobody_is_advised_to_delete_the_tars_of_others(folder):
    """In place, the data set's folder is theirs."""
    shard = SHARD.model_copy(update={"index": f"{SHARD.name}.npy"})
    with pytest.raises(ValueError, match=r"shard-000000\.tar\.npy.* delete .*/manifest\.json \(not the tars\)"):
        check_shard(folder, shard)
    with pytest.raises(ValueError, match=r"shard-000000\.tar\.npy.* delete .*/manifest\.json \(not the tars\)"):
        load_index(folder, shard)


def test_load_index(folder):
    index = load_index(folder, SHARD)
    assert index.dtype == np.int64
    assert index.tolist() == [[512, 100, 0, 5], [2048, 50, 0, -5]]


def _pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{}, {}], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (np.zeros((3, 4), np.int64), r"int64 \[3, 4\] instead of int64 \[2, 4\]"),
        (np.ones((2, 4), np.int32), "int32"),
        (np.array([[0, 1, 0, 0], [10239, 2, 0, 0]]), "points outside"),
        (np.array([[-1, 1, 0, 0], [0, 1, 0, 0]]), "points outside"),
        (b"\x93NUMPY", "cannot read the index"),
        (b"", "cannot read the index"),
        (_pickled(), "cannot read the index"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(folder, index, message):
    path = folder / SHARD.index
    if isinstance(index, bytes):
        path.write_bytes(index)
    else:
        np.save(path, index)
    with pytest.raises(ValueError, match=message):
        load_index(folder, SHARD)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught, atomic_file(path) as file:
        file.write(b"new")
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_content_hash_is_the_published_one():
    """XXH3 of nothing is 0x2D06800538D394C2 (reference implementation); above 2**63 it turns negative."""
    assert content_hash(b"") == 0x2D06800538D394C2
    assert {content_hash(bytes([i])) < 0 for i in range(8)} == {True, False}
    assert all(-(2**63) <= content_hash(bytes([i])) < 2**63 for i in range(64))


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    """What reads data lives on for seconds after the training process was killed; nobody is to wait for it."""
    asked, told = os.pipe(), os.pipe()
    with locked(tmp_path / "lock", "held"):
        child = os.fork()
        if not child:
            os.write(told[1], b"x")
            os.read(asked[0], 1)
            os._exit(0)
        os.read(told[0], 1)
        with pytest.raises(ValueError, match="held"), locked(tmp_path / "lock", "held"):
            pass  # the child has not freed it either
    with locked(tmp_path / "lock", "held"):
        os.write(asked[1], b"x")
        os.waitpid(child, 0)
