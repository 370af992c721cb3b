"""datasets/stream.py: every sample once an epoch, the same global batches for any ranks and workers, from anywhere."""

import hashlib
import io
import multiprocessing
import re
import shutil
import subprocess
import time
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from styleloom.datasets import stream
from styleloom.datasets.batch import Bad, Slots
from styleloom.datasets.decode import decode
from styleloom.datasets.manifest import content_hash, load_index, read_manifest, write_manifest
from styleloom.datasets.order import Order
from styleloom.datasets.pictures import Form, conform
from styleloom.datasets.reader import Reader
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.stream import batches

COUNT = 42

# torch warns where a test starts more workers than this machine has cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def take(folder, steps: int, *, batch: int = 12, world: int = 1, **options):
    """The first global batches (images, labels), put together from those of the ranks."""
    options = {"seed": 5, "start": 0, "window": 2, **options}
    manifest = read_manifest(folder)
    ranks = [batches(folder, manifest, batch=batch, rank=rank, world=world, **options) for rank in range(world)]
    out = []
    for _ in range(steps):
        parts = [next(rank) for rank in ranks]
        # Row k of rank r is row r + world * k of the global batch.
        out.append(tuple(torch.stack(x, dim=1).flatten(0, 1) for x in zip(*parts, strict=True)))
    for rank in ranks:
        rank.close()
    return out


def same(a, b) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def rows(batches) -> list[bytes]:
    return [image.numpy().tobytes() for images, _ in batches for image in images]


@pytest.fixture
def damaged(unlabelled, tmp_path):
    return shutil.copytree(unlabelled, tmp_path / "damaged")


# The batches


def test_an_epoch_of_the_stream_is_the_data_set(labelled):
    images, labels = zip(*take(labelled, 3, batch=14), strict=True)
    once = {
        image.tobytes(): int(label) for image, label in zip(torch.cat(images).numpy(), torch.cat(labels), strict=True)
    }
    assert len(once) == COUNT
    assert np.bincount(list(once.values())).tolist() == [14, 14, 14]
    again = take(labelled, 3, batch=14, start=COUNT)
    assert sorted(rows(again)) == sorted(once)
    assert [once[row] for row in rows(again)] == torch.cat([label for _, label in again]).tolist()


@pytest.mark.parametrize(
    ("world", "workers"), [(2, 0), (3, 0), (4, 0), (6, 0), (1, 1), (1, 3), (2, 3), (3, 1)]
)  # fmt: skip
def test_neither_ranks_nor_workers_change_the_global_batches(unlabelled, world, workers):
    assert same(
        take(unlabelled, 8, mirror=True, start=36),
        take(unlabelled, 8, mirror=True, start=36, world=world, workers=workers),
    )


def test_a_single_shard_serves_many_ranks(labelled):
    assert len(read_manifest(labelled).shards) == 1
    assert same(take(labelled, 5), take(labelled, 5, world=6))


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_position_equals_skipping_to_it(unlabelled, workers):
    whole = take(unlabelled, 8, mirror=True)
    assert same(whole[5:], take(unlabelled, 3, start=5 * 12, mirror=True, workers=workers))
    shifted = take(unlabelled, 2, start=7, mirror=True)  # also between the batches
    assert rows(shifted) == rows(whole)[7 : 7 + 24]


def test_flips_follow_from_seed_and_position_and_are_about_half(unlabelled):
    plain, mirrored = (rows_ := [torch.cat([x for x, _ in take(unlabelled, 20, mirror=m)]) for m in (False, True)])
    assert plain.shape == (240, 3, 16, 16)
    flipped = (mirrored == plain.flip(3)).flatten(1).all(dim=1)
    kept = (mirrored == plain).flatten(1).all(dim=1)
    assert (flipped ^ kept).all()
    assert 90 <= int(flipped.sum()) <= 150
    # Of the position, not of the image: an image is flipped in one epoch and not in another.
    assert not torch.equal(flipped[:COUNT], flipped[COUNT : 2 * COUNT])
    assert torch.equal(rows_[1], torch.cat([x for x, _ in take(unlabelled, 20, mirror=True, world=3)]))


def test_a_batch_that_does_not_divide_is_refused(unlabelled):
    with pytest.raises(ValueError, match="batch of 10 images does not divide among 4"):
        batches(unlabelled, read_manifest(unlabelled), seed=0, start=0, batch=10, rank=0, world=4)


# Bad samples


@pytest.fixture
def spoil(damaged):
    """(shard, row, how) -> spoils a sample; how: (the tar as a bytearray, offset, length) -> None."""

    def spoil(number: int, row: int, how) -> str:
        shard = read_manifest(damaged).shards[number]
        offset, length = map(int, load_index(damaged, shard)[row, :2])
        tar = bytearray((damaged / shard.name).read_bytes())
        how(tar, offset, length)
        (damaged / shard.name).write_bytes(tar)
        return shard.name

    return spoil


def flip_a_bit(tar: bytearray, offset: int, length: int) -> None:
    tar[offset + length // 2] ^= 4


def positions_of(folder, shard: int, row: int, until: int, **options) -> list[int]:
    options = {"seed": 5, "window": 2, **options}
    order = Order([s.count for s in read_manifest(folder).shards], options["seed"], options["window"])
    return [position for position in range(until) if order(position) == (shard, row)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_replaced_and_its_neighbours_stay(unlabelled, damaged, spoil, workers):
    name = spoil(1, 4, flip_a_bit)
    told: list[Bad] = []
    whole = torch.cat([images for images, _ in take(unlabelled, 8)])
    found = torch.cat([images for images, _ in take(damaged, 8, workers=workers, max_bad=0.5, report_bad=told.append)])
    positions = positions_of(damaged, 1, 4, len(whole))
    assert len(positions) in (2, 3)  # in 96 positions of 42 samples
    assert [each.position for each in told] == positions
    for each in told:
        assert (each.shard, each.row, each.key) == (name, 4, "00000013.png")
        assert each.reason == "its bytes are not those that were indexed"
        shard, row = each.substitute.split(":")
        assert (shard, int(row)) != (name, 4)
    differing = [i for i in range(len(whole)) if not torch.equal(whole[i], found[i])]
    assert differing == positions
    known = {image.tobytes() for image in whole.numpy()}
    assert all(found[i].numpy().tobytes() in known for i in positions)


def test_the_substitute_depends_on_neither_ranks_nor_workers_nor_the_start(damaged, spoil):
    for row in range(9):
        spoil(2, row, flip_a_bit)  # a whole shard: about a fifth of the samples
    one = take(damaged, 8, max_bad=1.0, mirror=True)
    assert same(one, take(damaged, 8, max_bad=1.0, mirror=True, world=3, workers=1))
    assert same(one[5:], take(damaged, 3, start=60, max_bad=1.0, mirror=True, workers=2))


SPOILT = {
    "bit": (flip_a_bit, "its bytes are not those that were indexed"),
    "zeros": (lambda tar, o, n: tar.__setitem__(slice(o, o + n), bytes(n)), "its bytes are not"),
    "cut in the image": (lambda tar, o, n: tar.__delitem__(slice(o + n // 2, None)), "the tar ends before its image"),
    "cut in the header": (lambda tar, o, n: tar.__delitem__(slice(o - 100, None)), "the tar ends before its image"),
    "a byte too many": (lambda tar, o, n: tar.insert(o - 600, 0), "its bytes are not"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_wrong_is_said(damaged, spoil, how):
    act, reason = SPOILT[how]
    name = spoil(3, 2, act)
    with pytest.raises(ValueError, match=rf"data.max_bad allows. The last: {name}, row \d.*: {reason}.*--verify"):
        take(damaged, 20, window=16)


def reindex(folder, number: int, change) -> None:
    """Lets `change` the index of a shard, and the manifest name what came of it: as if it had always been so."""
    manifest = read_manifest(folder)
    shard = manifest.shards[number]
    index = load_index(folder, shard)
    change(index)
    np.save(folder / shard.index, index)
    sha256 = hashlib.sha256((folder / shard.index).read_bytes()).hexdigest()
    shards = [
        s if i != number else s.model_copy(update={"index_sha256": sha256}) for i, s in enumerate(manifest.shards)
    ]
    write_manifest(manifest.model_copy(update={"shards": shards}), folder)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "its image is empty|not a whole PNG"),
        (b"nonsense" * 20, "not a whole PNG"),
        ("small", "8x8|size"),
    ],
)
def test_samples_that_were_bad_when_they_were_indexed(damaged, data, reason):
    """Foreign sets: the bytes are those that were indexed, and no image."""
    if data == "small":
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        data = file.getvalue()
    shard = read_manifest(damaged).shards[1]
    tar = bytearray((damaged / shard.name).read_bytes())
    offset = int(load_index(damaged, shard)[4, 0])
    tar[offset : offset + max(len(data), 1)] = data or b"\0"
    (damaged / shard.name).write_bytes(tar)
    stored = bytes(data or b"\0")
    reindex(damaged, 1, lambda index: index.__setitem__(4, [offset, len(stored), -1, content_hash(stored)]))
    told: list[Bad] = []
    take(damaged, 8, max_bad=0.5, report_bad=told.append)
    assert {(each.row, each.shard) for each in told} == {(4, shard.name)}
    assert re.search(reason, told[0].reason), told[0].reason


def test_a_missing_label_is_bad_only_where_labels_matter(labelled, tmp_path):
    data = shutil.copytree(labelled, tmp_path / "data")
    reindex(data, 0, lambda index: index.__setitem__((7, 2), -1))
    told: list[Bad] = []
    labels = torch.cat([labels for _, labels in take(data, 7, report_bad=told.append)])
    assert (labels < 0).sum() == 2
    assert not told
    labels = torch.cat([labels for _, labels in take(data, 7, labelled=True, max_bad=0.5, report_bad=told.append)])
    assert (labels >= 0).all()
    assert [each.reason for each in told] == ["its label is missing"] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_without_tar_or_index_is_all_bad(damaged, workers):
    shards = read_manifest(damaged).shards
    (damaged / shards[0].index).unlink()
    (damaged / shards[2].index).write_bytes(b"no index")
    (damaged / shards[4].name).unlink()
    told: list[Bad] = []
    take(damaged, 7, window=16, max_bad=1.0, report_bad=told.append, workers=workers)
    assert {each.shard for each in told} == {shards[i].name for i in (0, 2, 4)}
    reasons = {each.shard: each.reason for each in told}
    assert reasons[shards[0].name].endswith(f"{shards[0].index} is missing")
    assert reasons[shards[2].name] == f"the index {shards[2].index} is not the one that the manifest names"
    assert reasons[shards[4].name].endswith(f"{shards[4].name} is missing")


def test_too_many_bad_samples_end_the_stream(damaged, spoil):
    for row in range(9):
        spoil(2, row, flip_a_bit)
    told: list[Bad] = []
    with pytest.raises(
        ValueError, match=r"1\d of \d+ samples could not be used, more than the share of 0.01 that data"
    ):
        take(damaged, 50, max_bad=0.01, report_bad=told.append)  # more than 10: a hundredth of the 1000 at least
    assert 11 <= len(told) < 20  # it is noticed at the end of a batch
    with pytest.raises(ValueError, match=r"^\d of \d+ samples could not be used"):
        take(damaged, 50)


def test_a_window_without_a_usable_sample_ends_the_stream(damaged):
    for shard in read_manifest(damaged).shards:
        (damaged / shard.name).write_bytes(b"")
    with pytest.raises(ValueError, match="no usable sample among 64 in the window of position 0: shard-"):
        take(damaged, 1, max_bad=1.0)


def test_a_failing_disk_is_no_bad_sample(damaged, monkeypatch):
    def fail(descriptor, length, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.pread", fail)
    with pytest.raises(OSError, match="Input/output error"):
        take(damaged, 1, max_bad=1.0)


@pytest.mark.parametrize("error", [ConnectionResetError("Connection reset by peer"), EOFError()])
def test_a_worker_killed_while_it_sends(error):
    """It breaks the connection, on some machines before the system tells of its death."""

    def items():
        yield 1
        raise error

    received = stream._received(items())
    assert next(received) == 1
    with pytest.raises(ValueError, match="a process that reads data was killed"):
        next(received)


# Other sizes and forms


def test_reduced(unlabelled):
    whole = torch.cat([images for images, _ in take(unlabelled, 3, mirror=True)])
    half = torch.cat([images for images, _ in take(unlabelled, 3, mirror=True, reduce=2)])
    assert half.shape == (36, 3, 8, 8)
    mean = torch.nn.functional.avg_pool2d(whole.double(), 2)
    assert (half.double() - mean).abs().max() <= 0.5
    with pytest.raises(ValueError, match="16x16 cannot be reduced 3 times"):
        take(unlabelled, 1, reduce=3)
    with pytest.raises(ValueError, match="16x16 cannot be reduced 32 times"):
        take(unlabelled, 1, reduce=32)


def test_images_in_another_form_are_brought_into_it(unlabelled, tmp_path):
    """As sets that others wrote are read; the set's own images, here, which makes the result known."""
    data = shutil.copytree(unlabelled, tmp_path / "data")
    manifest = read_manifest(data).model_copy(update={"conform": True, "codec": "mixed", "width": 8, "height": 4})
    write_manifest(manifest, data)
    found = torch.cat([images for images, _ in take(data, 2)])
    whole = torch.cat([images for images, _ in take(unlabelled, 2)])
    form = Form(8, 4, 3, "png", None, "lanczos", "#ffffff")
    for a, b in zip(found, whole, strict=True):
        file = io.BytesIO()
        Image.fromarray(b.permute(1, 2, 0).numpy()).save(file, "PNG")
        assert np.array_equal(a.permute(1, 2, 0).numpy(), conform(file.getvalue(), form))


def test_encoded(unlabelled):
    manifest = read_manifest(unlabelled)
    options: dict[str, Any] = {"seed": 5, "start": 3, "batch": 6, "window": 2}
    for workers in (0, 1):
        data, labels = next(batches(unlabelled, manifest, decode=False, workers=workers, **options))
        images, _ = next(batches(unlabelled, manifest, **options))
        assert labels.tolist() == [-1] * 6
        assert [decode(each, "png", 3).tobytes() for each in data] == [image.numpy().tobytes() for image in images]


def test_decoded_on_a_device(pictures, tmp_path):
    prepare(open_source(pictures, "none"), tmp_path / "jpeg", width=16, height=16, codec="jpeg", progress=False)
    expected = take(tmp_path / "jpeg", 3, mirror=True, world=2)
    found = take(tmp_path / "jpeg", 3, mirror=True, world=2, workers=1, device="cpu")
    for (a, _), (b, _) in zip(expected, found, strict=True):
        assert (a.int() - b.int()).abs().max() <= 4  # another decoder
    with pytest.raises(ValueError, match="only JPEG images"):
        take(tmp_path / "jpeg", 1, device="cpu", reduce=2)


def test_a_bad_image_for_a_device_is_replaced_too(pictures, tmp_path):
    data = tmp_path / "jpeg"
    prepare(open_source(pictures, "none"), data, width=16, height=16, codec="jpeg", progress=False)
    shard = read_manifest(data).shards[0]
    offset, length, *_ = map(int, load_index(data, shard)[5])
    tar = (data / shard.name).read_bytes()
    cut = tar[offset : offset + length - 2]  # without its end mark
    reindex(data, 0, lambda index: index.__setitem__(5, [offset, len(cut), -1, content_hash(cut)]))
    told: list[Bad] = []
    options: dict[str, Any] = {"max_bad": 0.5, "report_bad": told.append}
    expected = take(data, 4, **options)
    found = take(data, 4, device="cpu", **options)
    assert [each.position for each in told[: len(told) // 2]] == [each.position for each in told[len(told) // 2 :]]
    assert {(each.row, each.substitute) for each in told} == {(5, each.substitute) for each in told[: len(told) // 2]}
    for (a, _), (b, _) in zip(expected, found, strict=True):
        assert (a.int() - b.int()).abs().max() <= 4


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_slot_is_not_filled_again_before_it_was_copied(unlabelled, workers, monkeypatch):
    """However late the trainer comes for a batch: the workers are as far ahead as they may be."""
    images = Slots.images
    late = {"turn": 0}

    def slowly(self, slot):
        if get_worker_info() is None:
            late["turn"] += 1
            time.sleep(0.05)
        return images(self, slot)

    expected = take(unlabelled, 16, batch=2)
    monkeypatch.setattr(Slots, "images", slowly)
    assert same(take(unlabelled, 16, batch=2, workers=workers), expected)
    assert late["turn"] == 16


def test_the_images_lie_channels_last(unlabelled):
    for workers in (0, 1):
        (images, _), *_ = take(unlabelled, 1, workers=workers)
        stream = batches(unlabelled, read_manifest(unlabelled), seed=0, start=0, batch=4, workers=workers)
        images, _ = next(stream)
        assert images.is_contiguous(memory_format=torch.channels_last)
        stream.close()


# The end


def test_closing_the_stream_ends_its_workers_promptly(unlabelled):
    before = set(multiprocessing.active_children())
    stream = batches(unlabelled, read_manifest(unlabelled), seed=0, start=0, batch=4, workers=2)
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    began = time.monotonic()
    stream.close()
    assert not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - began < 4


PROGRAM = """
import sys
from styleloom.datasets.manifest import read_manifest
from styleloom.datasets import stream
from styleloom.datasets.stream import batches

stream = batches(sys.argv[1], read_manifest(sys.argv[1]), seed=0, start=0, batch=4, workers=2)
next(stream)
print("in the midst", flush=True)
if sys.argv[2] == "error":
    raise ValueError("the trainer failed")
"""


@pytest.mark.parametrize(("ending", "status"), [("plain", 0), ("error", 1)])
def test_a_program_that_ends_in_the_midst_of_a_stream_does_not_hang(unlabelled, python, ending, status):
    program = python("-c", PROGRAM, unlabelled, ending)
    try:
        out, err = program.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        for each in [*psutil.Process(program.pid).children(recursive=True), program]:
            each.kill()
        out, err = program.communicate()
    assert "in the midst" in out, err
    assert program.returncode == status


# Scale


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """(folder, manifest) of 10^6 samples in 1000 shards, which are all the same file: 1000 images of 2x2."""
    root = tmp_path_factory.mktemp("huge")
    (root / "pictures").mkdir()
    for i in range(1000):
        colour = (i % 256, i // 256, 0)
        Image.new("RGB", (2, 2), colour).save(root / "pictures" / f"{i:04d}.png", compress_level=0)
    prepare(open_source(root / "pictures"), root / "data", width=2, height=2, progress=False)
    manifest = read_manifest(root / "data")
    (shard,) = manifest.shards
    many = {"shards": [shard] * 1000, "count": 10**6, "bytes": 1000 * shard.bytes}
    return root / "data", manifest.model_copy(update=many)


def test_the_first_batch_at_a_billion_opens_what_it_needs(huge, monkeypatch):
    folder, manifest = huge
    opened = []
    monkeypatch.setattr(
        Reader, "_open", lambda self, number, open_=Reader._open: opened.append(number) or open_(self, number)
    )
    stream = batches(folder, manifest, seed=5, start=10**9, batch=8)
    images, _ = next(stream)
    order = Order([1000] * 1000, seed=5, window=16)
    rows = [order(10**9 + i) for i in range(8)]
    assert [int(x[0, 0, 0]) + 256 * int(x[1, 0, 0]) for x in images] == [row for _, row in rows]
    assert sorted(opened) == sorted({shard for shard, _ in rows})
    stream.close()


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_is_flat(huge, steps):
    """Over 10^5 samples, or all 10^6: 62 windows."""
    folder, manifest = huge
    stream = batches(folder, manifest, seed=5, start=0, batch=1000, decode=False)
    for _ in range(40):
        next(stream)
    process = psutil.Process()
    before, files = process.memory_info().rss, process.num_fds()
    for _ in range(steps):
        next(stream)
    assert process.memory_info().rss - before < 10e6
    assert process.num_fds() <= files + 1
    stream.close()


def test_what_a_billion_samples_take(huge):
    """Memory by the shard, not by the sample: here 10^4 shards of 10^5 samples."""
    _, manifest = huge
    shards = [manifest.shards[0].model_copy(update={"count": 10**5}) for _ in range(10**4)]
    big = manifest.model_copy(update={"shards": shards, "count": 10**9})
    before = psutil.Process().memory_info().rss
    order = Order([shard.count for shard in big.shards], seed=1, window=1)
    assert all(0 <= order(position)[1] < 10**5 for position in (0, 10**9 - 1, 10**12))
    assert psutil.Process().memory_info().rss - before < 20e6
