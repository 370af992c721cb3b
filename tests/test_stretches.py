"""datasets/stream.py where batches and images change their size on the way: the samples are those of a stream without
changes, for any ranks and workers, from anywhere, and nothing is started anew."""

import contextlib
import math
import multiprocessing
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import get_worker_info

from styleloom.datasets import storage
from styleloom.datasets.batch import Assembler, Bad, Slots, is_mirrored
from styleloom.datasets.cache import Cache, Prefetcher
from styleloom.datasets.decode import decode_into
from styleloom.datasets.manifest import at_size, index_bytes, load_index, read_manifest
from styleloom.datasets.order import Order
from styleloom.datasets.reader import Reader
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.stream import Stretch, batches

COUNT, SEED, WINDOW = 42, 5, 2
# (start, batch, reduce): batches grow and shrink, and so do the images; three epochs, whose ends are not among these.
CHANGES = [(0, 12, 4), (36, 24, 2), (84, 6, 1), (102, 18, 2)]
END = 138

# torch warns where a test starts more workers than this machine has cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def sizes(pictures, tmp_path_factory):
    """A data set of 42 images in 3 classes and 5 shards, at 16x16, 8x8 and 4x4."""
    return _prepared(pictures, tmp_path_factory.mktemp("sizes") / "data")


@pytest.fixture(scope="module")
def jpegs(pictures, tmp_path_factory):
    return _prepared(pictures, tmp_path_factory.mktemp("sizes") / "jpeg", codec="jpeg")


def _prepared(pictures, folder, **options):
    source = open_source(pictures, "folders")
    reduced = [(8, 8), (4, 4)]
    prepare(source, folder, width=16, height=16, reduced=reduced, shard_images=9, progress=False, **options)
    return folder


def stretches(place, changes=tuple(CHANGES), scaled: bool = False) -> list[Stretch]:
    """Of the sets that were prepared at each size, or `scaled` from the largest as they are read."""
    manifest = read_manifest(place)
    found = {
        reduce: (place, manifest, reduce) if scaled else at_size(place, manifest, reduce) for *_, reduce in changes
    }
    return [Stretch(start, batch, *found[reduce]) for start, batch, reduce in changes]


def begin(parts: list[Stretch], rank: int = 0, world: int = 1, **options):
    """The stream of one rank."""
    first, *then = parts
    options = {"seed": SEED, "window": WINDOW, **options}
    return batches(
        first.folder, first.manifest, start=first.start, batch=first.batch, reduce=first.reduce, then=then, rank=rank,
        world=world, **options,
    )  # fmt: skip


def take(parts: list[Stretch], until: int = END, world: int = 1, **options):
    """The global batches (images, labels) up to a position, put together from those of the ranks."""
    ranks = [begin(parts, rank, world, **options) for rank in range(world)]
    out, position = [], parts[0].start
    with contextlib.ExitStack() as held:
        for rank in ranks:
            held.enter_context(contextlib.closing(rank))
        while position < until:
            images, labels = zip(*(next(rank) for rank in ranks), strict=True)
            # Row k of rank r is row r + world * k of the global batch.
            out.append((torch.stack(images, dim=1).flatten(0, 1), torch.stack(labels, dim=1).flatten(0, 1)))
            position += len(out[-1][1])
    assert position == until
    return out


def plainly(parts: list[Stretch], until: int = END, mirror: bool = False):
    """What the batches should be, without any stream: each position by itself."""
    order = Order([shard.count for shard in parts[0].manifest.shards], SEED, WINDOW)
    ends = [*(part.start for part in parts[1:]), until]
    out = []
    for part, end in zip(parts, ends, strict=True):
        reader, m = Reader(str(part.folder), part.manifest, None), part.manifest
        for first in range(part.start, end, part.batch):
            out.append([])
            for position in range(first, first + part.batch):
                data, label = reader.read(*order(position))
                image = np.empty((m.height // part.reduce, m.width // part.reduce, m.channels), np.uint8)
                decode_into(image, data, m.codec)
                image = image[:, ::-1].copy() if mirror and is_mirrored(SEED, position) else image
                out[-1].append((torch.from_numpy(image).permute(2, 0, 1), label))
    return [(torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])) for rows in out]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def waited(condition, seconds: float = 120) -> bool:
    """Whether it came true in the end."""
    give_up = time.monotonic() + seconds
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.01)
    return condition()


# The batches


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_position_has_the_sample_of_a_stream_without_changes(sizes, world, workers, scaled):
    parts = stretches(sizes, scaled=scaled)
    found = take(parts, world=world, workers=workers, mirror=True)
    assert [tuple(images.shape) for images, _ in found] == (
        3 * [(12, 3, 4, 4)] + 2 * [(24, 3, 8, 8)] + 3 * [(6, 3, 16, 16)] + 2 * [(18, 3, 8, 8)]
    )
    assert same(found, plainly(parts, mirror=True))
    without = take(stretches(sizes, [(0, 6, 1)]), mirror=True)
    images, labels = (torch.cat(x) for x in zip(*without, strict=True))
    assert torch.equal(torch.cat([labels for _, labels in found]), labels)
    assert len(set(labels.tolist())) == 3
    at = 0
    for small, _ in found:
        whole = images[at : at + len(small)]
        mean = torch.nn.functional.avg_pool2d(whole.double(), whole.shape[3] // small.shape[3])
        error = (small.double() - mean).abs()
        # Lanczos makes another mean, but not of another picture: those differ by more.
        assert error.max() <= 0.5 if scaled else error.mean() < 12
        at += len(small)


def test_every_sample_once_an_epoch(sizes):
    """By what the images are, at whatever size."""
    known = {}
    for number, shard in enumerate(read_manifest(sizes).shards):
        for part in stretches(sizes, [(0, 1, 1), (1, 1, 2), (2, 1, 4)]):
            reader = Reader(str(part.folder), part.manifest, None)
            for row in range(shard.count):
                known[reader.read(number, row)[0]] = (number, row)
    assert len(known) == 3 * COUNT
    stream = begin(stretches(sizes), decode=False)
    samples = []
    while len(samples) < 3 * COUNT:
        samples += [known[data] for data in next(stream)[0]]
    for epoch in range(3):
        assert len(set(samples[epoch * COUNT : (epoch + 1) * COUNT])) == COUNT


def from_(parts: list[Stretch], position: int) -> list[Stretch]:
    """The stretches of a stream that begins at a position."""
    number = max(i for i, part in enumerate(parts) if part.start <= position)
    return [replace(parts[number], start=position), *parts[number + 1 :]]


def test_starting_anywhere_equals_having_come_there(sizes):
    parts = stretches(sizes)
    whole = take(parts, mirror=True)
    position = 0
    for step, (_, labels) in enumerate(whole):
        assert same(take(from_(parts, position), mirror=True), whole[step:])
        position += len(labels)


@pytest.mark.parametrize("start", [24, 36, 84])
def test_starting_with_workers_and_ranks(sizes, start):
    """Other workers have the steps than had them before."""
    parts = stretches(sizes)
    assert same(take(from_(parts, start), world=2, workers=3), plainly(from_(parts, start)))


def test_stretches_of_one_step_each(sizes):
    changes = [(0, 6, 1), (6, 12, 2), (18, 6, 4), (24, 18, 1), (42, 6, 2), (48, 6, 4), (54, 6, 1)]
    assert same(take(stretches(sizes, changes), until=66, workers=2), plainly(stretches(sizes, changes), until=66))


def test_only_the_batch_changes(labelled):
    """And one shard serves it all."""
    parts = stretches(labelled, [(0, 24, 1), (24, 6, 1)])
    found = torch.cat([images for images, _ in take(parts, until=60, workers=1)])
    assert torch.equal(found, torch.cat([images for images, _ in take(stretches(labelled, [(0, 12, 1)]), until=60)]))


def test_encoded(sizes):
    parts = stretches(sizes)
    order = Order([shard.count for shard in parts[0].manifest.shards], SEED, WINDOW)
    expected = []
    for part, end in zip(parts, [*(part.start for part in parts[1:]), END], strict=True):
        reader = Reader(str(part.folder), part.manifest, None)
        expected += [reader.read(*order(position))[0] for position in range(part.start, end)]
    for workers in (0, 1):
        stream, found = begin(parts, decode=False, workers=workers), []
        while len(found) < END:
            found += next(stream)[0]
        stream.close()
        assert found == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_decoded_on_a_device(jpegs, workers):
    parts = stretches(jpegs)
    found = take(parts, world=2, workers=workers, device="cpu", mirror=True)
    for (a, x), (b, y) in zip(found, plainly(parts, mirror=True), strict=True):
        assert a.shape == b.shape
        assert (a.int() - b.int()).abs().max() <= 4  # another decoder
        assert torch.equal(x, y)


# Bad samples


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_of_a_later_stretch_is_replaced_and_told(sizes, tmp_path, workers):
    data = shutil.copytree(sizes, tmp_path / "data")
    small, shard = data / "8x8", read_manifest(data / "8x8").shards[1]
    offset, length = map(int, load_index(small, shard)[4, :2])
    tar = bytearray((small / shard.name).read_bytes())
    tar[offset + length // 2] ^= 4
    (small / shard.name).write_bytes(tar)

    changes = [(0, 12, 4), (60, 6, 2)]
    told: list[Bad] = []
    found = take(stretches(data, changes), until=132, workers=workers, max_bad=0.5, report_bad=told.append)
    order = Order([shard.count for shard in read_manifest(data).shards], SEED, WINDOW)
    positions = [position for position in range(132) if order(position) == (1, 4)]
    assert positions[0] < 60 < positions[-1]  # it is good at the first size
    later = [position for position in positions if position >= 60]
    assert [each.position for each in told] == later
    assert {(each.shard, each.row, each.reason) for each in told} == {
        (shard.name, 4, "its bytes are not those that were indexed")
    }
    expected = plainly(stretches(sizes, changes), until=132)
    rows, good = ([image for images, _ in its for image in images] for its in (found, expected))
    assert [i for i, (a, b) in enumerate(zip(rows, good, strict=True)) if not torch.equal(a, b)] == later
    known = {image.numpy().tobytes() for image in good[60:]}
    assert all(rows[position].numpy().tobytes() in known for position in later)


# What does not fit


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ([(0, 12, 4), (36, 10, 2)], 3, "a batch of 10 images does not divide among 3 processes"),
        ([(0, 12, 4), (40, 12, 2)], 1, "batches of 12 images from position 0 on do not end at 40"),
        ([(5, 12, 4), (41, 6, 2), (50, 6, 1)], 1, "batches of 6 images from position 41 on do not end at 50"),
        ([(12, 12, 4), (12, 12, 2)], 1, "from position 12 on cannot follow one from 12 on"),
        ([(0, 12, 4), (36, 12, 2), (24, 12, 1)], 1, "from position 24 on cannot follow one from 36 on"),
    ],
)
def test_stretches_that_do_not_follow_one_another(sizes, changes, world, message):
    with pytest.raises(ValueError, match=message):
        begin(stretches(sizes, changes), world=world)


def test_another_set_is_refused(sizes, labelled, jpegs):
    (first,) = stretches(sizes, [(0, 12, 1)])
    fine = replace(first, start=12)
    for other, what in (
        (read_manifest(labelled), "shards' counts differ"),
        (first.manifest.model_copy(update={"channels": 1}), "channels differ"),
        (first.manifest.model_copy(update={"class_names": ["a", "b", "c"], "channels": 4}), "channels, class_names"),
    ):
        with pytest.raises(ValueError, match=f"elsewhere is not the same data set as .*data: {what}"):
            begin([first, fine, Stretch(24, 12, "elsewhere", other, 1)])
    with pytest.raises(ValueError, match="16x16 cannot be reduced 32 times"):
        begin([first, replace(fine, reduce=32)])
    first, second = stretches(jpegs, [(0, 12, 1), (12, 12, 2)], scaled=True)
    with pytest.raises(ValueError, match="only JPEG images of the size that is asked for"):
        begin([first, second], device="cpu")


# Workers


def test_the_same_workers_run_on_and_ahead_across_a_change(sizes, tmp_path, monkeypatch):
    """The trainer takes one batch of the first stretch only: those of the second are prepared nevertheless."""
    call = Assembler.__call__

    def marking(self, samples):
        (tmp_path / f"{samples[0]['__key__']}-{os.getpid()}").touch()
        return call(self, samples)

    monkeypatch.setattr(Assembler, "__call__", marking)
    before = set(multiprocessing.active_children())
    parts = stretches(sizes)
    stream = begin(parts, workers=2)
    batches_ = [next(stream)]
    pids = {child.pid for child in set(multiprocessing.active_children()) - before}
    assert len(pids) == 2

    def made() -> dict[int, int]:
        return {int(position): int(pid) for position, pid in (path.name.split("-") for path in tmp_path.iterdir())}

    assert waited(lambda: {0, 12, 24, 36, 60} <= made().keys())
    batches_ += [next(stream) for _ in range(9)]
    assert {made()[position] for position in (0, 12, 24)} == {made()[position] for position in (36, 60)} == pids
    assert {child.pid for child in set(multiprocessing.active_children()) - before} == pids
    assert same(batches_, plainly(parts))
    stream.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_slot_is_not_filled_again_before_it_was_copied(sizes, workers, monkeypatch):
    """However late the trainer comes for a batch, and whatever size the next one has."""
    images = Slots.images
    late = {"turn": 0}

    def slowly(self, slot):
        if get_worker_info() is None:
            late["turn"] += 1
            time.sleep(0.05)
        return images(self, slot)

    parts = stretches(sizes, [(0, 2, 4), (14, 6, 1), (50, 2, 2), (66, 4, 1)])
    expected = plainly(parts, until=74)
    monkeypatch.setattr(Slots, "images", slowly)
    assert same(take(parts, until=74, workers=workers), expected)
    assert late["turn"] == len(expected)


def test_a_change_closes_the_shards_of_the_stretch_before(sizes):
    stream = begin(stretches(sizes, [(0, 6, 2), (12, 6, 1)]), window=5)
    process, open_ = psutil.Process(), []
    for _ in range(7):  # an epoch, all in one window
        next(stream)
        open_.append(sum(file.path.endswith(".tar") for file in process.open_files()))
    assert max(open_) == 5
    stream.close()


# Remote sets


@pytest.fixture
def _impatient(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(storage, "LONGEST_DELAY", 0.01)


def two_windows(part: Stretch) -> int:
    """Bytes that a cache must hold to read this."""
    return 2 * WINDOW * max(shard.bytes + index_bytes(shard) for shard in part.manifest.shards)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("small", [False, True])
def test_remote(sizes, serve, tmp_path, workers, small):
    """Over a server that fails, and (`small`) with a cache that just holds two windows of the largest images."""
    expected = plainly(stretches(sizes))
    with serve(sizes, lambda path: ["503", "cut"] if path.endswith((".tar", ".npy")) else []) as server:
        parts = stretches(server.url)
        assert [str(part.folder) for part in parts[:3]] == [f"{server.url}/4x4", f"{server.url}/8x8", server.url]
        cache = (str(tmp_path / "cache"), max(map(two_windows, parts)) if small else 10**8)
        assert same(take(parts, workers=workers, cache=cache), expected)
        tars = {path for path, _, _ in server.requests if path.endswith(".tar")}
        assert {path.rpartition("/")[0] for path in tars} == {"4x4", "8x8", ""}


@pytest.mark.parametrize("remote_first", [True, False])
def test_a_remote_set_and_a_folder(sizes, serve, tmp_path, remote_first):
    changes = [(0, 12, 2), (12, 12, 1)]
    expected = plainly(stretches(sizes, changes), until=60)
    with serve(sizes) as server:
        places = (server.url, sizes) if remote_first else (sizes, server.url)
        parts = [stretches(place, changes)[i] for i, place in enumerate(places)]
        with pytest.raises(ValueError, match="is read through a cache on this node: give its folder and size"):
            begin(parts)
        with pytest.raises(ValueError, match=r"raise --data\.cache-gb"):
            begin(parts, cache=(str(tmp_path / "cache"), 1000))
        assert same(take(parts, until=60, workers=1, cache=(str(tmp_path / "cache"), 10**8)), expected)


@pytest.mark.parametrize("change", [12, 24])
def test_the_shards_of_the_next_set_are_fetched_before_the_change(sizes, serve, tmp_path, change):
    """It lies in the present window or in the next."""
    with serve(sizes) as server:
        first, second = parts = stretches(server.url, [(0, 12, 2), (change, 6, 1)])
        order = Order([shard.count for shard in second.manifest.shards], SEED, WINDOW)
        ends = order.epoch(0)[1].tolist()
        assert change < ends[0] if change == 12 else ends[0] < change < ends[1]
        stream = begin(parts, cache=(str(tmp_path / "cache"), 10**8))
        next(stream)
        shards = [second.manifest.shards[i] for i in {order(position)[0] for position in range(change, ends[1])}]
        hashes = {sha256 for shard in shards for sha256 in (shard.sha256, shard.index_sha256)}
        assert waited(lambda: hashes <= {path.name for path in (tmp_path / "cache").iterdir()})
        before, position = len(server.requests), first.batch
        while position + 6 <= ends[1]:
            position += len(next(stream)[1])
        assert position > change
        # The reader did not have to fetch them.
        assert not {file for shard in shards for file in (shard.name, shard.index)} & {
            path for path, *_ in server.requests[before:]
        }
        stream.close()


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_wanted_ahead(sizes, serve, tmp_path, monkeypatch, scaled):
    """Of each window what is read in it, once, in the order in which it is read; at a change anew."""
    wanted: list[list[tuple[str, int, str]]] = []
    monkeypatch.setattr(Prefetcher, "want", lambda self, files: wanted.append(list(files)))
    with serve(sizes) as server:
        parts = stretches(server.url, [(0, 6, 4), (12, 6, 2), (24, 6, 1)], scaled)
        take(parts, until=30, window=1, cache=(str(tmp_path / "cache"), 10**8))
    order = Order([shard.count for shard in parts[0].manifest.shards], SEED, 1)
    windows, ends = order.epoch(0)
    expected = []
    at = None
    for position in range(30):
        window = int(ends.searchsorted(position, side="right"))
        stretch = sum(part.start <= position for part in parts) - 1
        if at != (window, stretch):
            at = (window, stretch)
            reads = []
            for ahead in (window, window + 1):
                first, last = max(position, ends[ahead - 1] if ahead else 0), ends[ahead] - 1
                for part, end in zip(parts, [12, 24, math.inf], strict=True):
                    if part.start <= last and first < end:
                        reads += Reader(str(part.folder), part.manifest, None).files(int(windows[ahead]))
            expected.append(list(dict.fromkeys(reads)))
    assert wanted == expected
    most = max(len({file[0].rpartition("/")[0] for file in files}) for files in wanted)
    assert most == 1 if scaled else most >= 2


def test_a_set_that_is_read_at_two_sizes_is_fetched_once(sizes, serve, tmp_path):
    with serve(sizes) as server:
        found = take(stretches(server.url, scaled=True), workers=2, cache=(str(tmp_path / "cache"), 10**8))
        assert same(found, plainly(stretches(sizes, scaled=True)))
        files = [path for path, *_ in server.requests if not path.endswith(".json")]
        assert len(files) == len(set(files)) == 10


def test_the_prefetcher_stops_where_the_cache_is_full(tmp_path, monkeypatch):
    """Else the files that are needed last would drive out those that are needed first."""
    monkeypatch.setattr(Prefetcher, "THREADS", 0)
    prefetcher = Prefetcher(Cache(tmp_path, 100))
    for sizes_, fit in (([40, 40, 20, 1], 3), ([40, 61, 1], 1), ([101, 1], 0)):
        prefetcher.want((f"http://127.0.0.1:1/{i}", size, f"{i}") for i, size in enumerate(sizes_))
        assert prefetcher.todo.qsize() == fit
        for size in sizes_[:fit]:
            item = prefetcher.todo.get_nowait()
            assert item is not None
            assert item[1][1] == size
