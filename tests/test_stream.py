"""datasets/stream.py: every sample once an epoch, the same global batches for any ranks and workers, from anywhere."""

import itertools
import multiprocessing
import shutil
import subprocess
import time

import numpy as np
import psutil
import pytest
import torch

from styleloom.datasets.manifest import load_index, read_manifest
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.stream import Order, batches

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


# The order


@pytest.mark.parametrize("counts", [[1], [7], [3, 1, 5, 2, 9, 4], [1] * 20, [100, 1]])
@pytest.mark.parametrize("window", [1, 2, 3, 16])
def test_each_epoch_has_every_sample_once(counts, window):
    order, total = Order(counts, seed=3, window=window), sum(counts)
    samples = sorted((shard, row) for shard, count in enumerate(counts) for row in range(count))
    for epoch in (0, 1, 12345):
        assert sorted(map(order, range(epoch * total, (epoch + 1) * total))) == samples


def test_a_window_of_shards_is_used_up_before_the_next_begins():
    order = Order([4] * 6, seed=0, window=2)
    shards = [order(position)[0] for position in range(24)]
    for start in (0, 8, 16):
        assert len(set(shards[start : start + 8])) == 2
    assert len(set(shards[:4])) == 2  # mixed, not one after the other


def test_the_order_is_the_published_one():
    """A run resumes years later, with another NumPy. These numbers must never change."""
    order = Order([3, 5, 2, 4], seed=7, window=2)
    assert [order(position) for position in range(14)] == [
        (1, 3), (1, 1), (3, 1), (1, 2), (3, 0), (1, 4), (3, 3),
        (1, 0), (3, 2), (0, 0), (2, 0), (0, 2), (2, 1), (0, 1),
    ]  # fmt: skip
    assert [order(position) for position in (14, 15, 16, 10**12, 10**12 + 1)] == [
        (3, 2), (3, 1), (3, 0), (3, 2), (3, 3),
    ]  # fmt: skip
    assert [Order([1000], seed=2**63 - 1, window=16)(position)[1] for position in range(6)] == [
        431,
        450,
        396,
        510,
        705,
        646,
    ]


def test_seeds_and_epochs_differ():
    orders = [[Order([20, 20], seed, 2)(position) for position in range(120)] for seed in (0, 1)]
    epochs = [order[start : start + 40] for order in orders for start in (0, 40, 80)]
    for a, b in itertools.combinations(epochs, 2):
        assert a != b


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


# Faults


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_shard_names_itself_and_the_remedy(damaged, workers):
    name = read_manifest(damaged).shards[3].name
    with open(damaged / name, "r+b") as file:
        file.truncate(3000)
    with pytest.raises(ValueError, match=rf"{name} ends before the image.*inspect.*prepare it again"):
        take(damaged, 8, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_names_its_shard_and_the_remedy(damaged, workers):
    shard = read_manifest(damaged).shards[1]
    offset, length, *_ = load_index(damaged, shard)[4]
    with open(damaged / shard.name, "r+b") as file:
        file.seek(offset + length // 2)
        file.write(b"garbage")
    with pytest.raises(ValueError, match=rf"{shard.name}.*not a whole PNG.*inspect.*prepare it again"):
        take(damaged, 8, workers=workers)


def test_a_missing_index_names_itself_from_a_worker(damaged):
    shard = read_manifest(damaged).shards[0]
    (damaged / shard.index).unlink()
    with pytest.raises(ValueError, match=rf"cannot read the index.*{shard.index}.*prepare it again"):
        take(damaged, 8, workers=1)


def test_images_of_another_size_than_the_manifest_says_are_refused(pictures, tmp_path):
    prepare(open_source(pictures, "none"), tmp_path / "data", width=8, height=8, progress=False)
    manifest = read_manifest(tmp_path / "data").model_copy(update={"width": 16})
    with pytest.raises(ValueError, match=r"shard-000000\.tar holds an image of shape \(3, 8, 8\)"):
        next(batches(tmp_path / "data", manifest, seed=0, start=0, batch=4))


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
