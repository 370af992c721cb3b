"""Shards -> batches, for any rank and any number of worker processes, from any position.

The stream is a permutation, not a process: it has a position (0, 1, 2, ... without end), and which sample stands at a
position follows from the seed alone. Epoch and place are `divmod(position, count)`; an epoch's shards are permuted, cut
into windows of `window` shards, and the samples of each window permuted. At a step, rank r of R reads the positions
start + r, start + r + R, ..., and worker w of n prepares the steps w, w + n, ...: neither ranks nor workers change the
global batch, every rank has as many samples as any other, and going on from a position needs nothing but its number.

It is built from webdataset's own stages; only the first one, which reads records by the manifest's index, is ours.
"""

import atexit
import functools
import itertools
import os
import signal
import weakref
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.compat import WebLoader
from webdataset.filters import batched, pipelinefilter
from webdataset.filters import map as map_samples
from webdataset.pipeline import DataPipeline
from webdataset.tariterators import group_by_keys

from .decode import decode
from .manifest import Manifest, load_index

SHARDS, SAMPLES, FLIPS = range(3)  # what a stream of random words is for


def random_words(seed: int, purpose: int, *counter: int, n: int) -> np.ndarray:
    """uint64 [n], a pure function of its arguments. (Philox: Salmon et al. 2011, "Parallel random numbers".)"""
    a, b = (*counter, 0, 0)[:2]
    return np.random.Philox(key=[seed, purpose], counter=[0, 0, a, b]).random_raw(n)


def permutation(seed: int, purpose: int, *counter: int, n: int) -> np.ndarray:
    """A permutation of range(n). By sorting words, because NumPy keeps Philox's words the same across its versions
    but makes no such promise for `Generator.permutation`."""
    return np.argsort(random_words(seed, purpose, *counter, n=n), kind="stable")


class Order:
    """Which sample stands at which position.

    Args:
        counts: samples of each shard.
        seed: of the permutations, 0 to 2**64 - 1.
        window: shards that are mixed with one another.
    """

    def __init__(self, counts: list[int], seed: int, window: int) -> None:
        self.counts, self.seed, self.window = np.asarray(counts, dtype=np.int64), seed, window
        self.total = int(self.counts.sum())
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)
        self.mixed = functools.lru_cache(maxsize=2)(self._mixed)

    def __getstate__(self) -> dict[str, Any]:
        return {"counts": self.counts.tolist(), "seed": self.seed, "window": self.window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __call__(self, position: int) -> tuple[int, int]:
        """Position (0 or more) -> (shard, row in it)."""
        epoch, place = divmod(position, self.total)
        _, ends = self.epoch(epoch)
        window = int(np.searchsorted(ends, place, side="right"))
        shards, starts, order = self.mixed(epoch, window)
        sample = order[place - (int(ends[window - 1]) if window else 0)]
        which = int(np.searchsorted(starts, sample, side="right")) - 1
        return int(shards[which]), int(sample - starts[which])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in this epoch's order, number of samples up to the end of each window)."""
        shards = permutation(self.seed, SHARDS, epoch, n=len(self.counts))
        ends = np.cumsum(self.counts[shards])
        return shards, np.append(ends[self.window - 1 : -1 : self.window], ends[-1])

    def _mixed(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(the window's shards, the first sample of each, the order of all their samples)."""
        shards = self.epoch(epoch)[0][window * self.window : (window + 1) * self.window]
        ends = np.cumsum(self.counts[shards])
        order = permutation(self.seed, SAMPLES, epoch, window, n=int(ends[-1]))
        return shards, ends - self.counts[shards], order


class Records(IterableDataset):
    """webdataset's first stage: the records of this rank's (and this worker's) samples, read by the index.

    Yields `{fname, data, __url__}` for the image and for the label of a sample, then `{}`, which ends the sample. The
    position serves as the key.
    """

    def __init__(
        self, folder: str, manifest: Manifest, order: Order, start: int, batch: int, rank: int, world: int
    ) -> None:
        self.folder, self.manifest, self.order = Path(folder), manifest, order
        self.start, self.batch, self.rank, self.world = start, batch, rank, world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        open_shard = functools.lru_cache(maxsize=2 * self.order.window)(self._open)
        for step in itertools.count(worker, workers):
            first = self.start + step * self.batch
            for position in range(first + self.rank, first + self.batch, self.world):
                shard, row = self.order(position)
                tar, index = open_shard(shard)
                yield from self._sample(position, self.manifest.shards[shard].name, tar, index[row])
                yield {}

    def _open(self, shard: int) -> tuple["_File", np.ndarray]:
        entry = self.manifest.shards[shard]
        return _File(self.folder / entry.name), load_index(self.folder, entry)

    def _sample(self, position: int, url: str, tar: "_File", row: np.ndarray) -> Iterator[dict[str, Any]]:
        offset, length, label, _ = map(int, row)
        data = os.pread(tar.fd, length, offset)
        if len(data) != length:
            raise ValueError(f"{tar.path} ends before the image at byte {offset}: {REMEDY}")
        yield {"fname": f"{position}.{self.manifest.codec}", "data": data, "__url__": url}
        yield {"fname": f"{position}.cls", "data": label, "__url__": url}


REMEDY = "it changed since it was prepared. `styleloom inspect DATASET --verify` lists what is wrong; prepare it again."


class _File:
    """A file descriptor that is closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self.path, self.fd = path, os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def _decoded(sample: dict[str, Any], manifest: Manifest, seed: int, mirror: bool) -> tuple[np.ndarray, int]:
    try:
        image = decode(sample[manifest.codec], manifest.codec, manifest.channels)
    except ValueError as error:
        raise ValueError(f"{sample['__url__']}, position {sample['__key__']}: {error}: {REMEDY}") from None
    if image.shape != (manifest.channels, manifest.height, manifest.width):
        raise ValueError(f"{sample['__url__']} holds an image of shape {image.shape}: {REMEDY}")
    if mirror and random_words(seed, FLIPS, int(sample["__key__"]), n=1)[0] & 1:
        image = image[:, :, ::-1]
    return image, sample["cls"]


def _collate(samples: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels, dtype=torch.int64)


def _errors_as_items(batches: Iterable[Any]) -> Iterator[Any]:
    """A worker's exception would reach the trainer wrapped in its traceback: hand it over as an item instead."""
    try:
        yield from batches
    except (ValueError, OSError) as error:
        yield error


def _worker_init(_: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the trainer decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(
    folder: str | os.PathLike[str],
    manifest: Manifest,
    *,
    seed: int,
    start: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    mirror: bool = False,
    workers: int = 0,
    window: int = 16,
    pin_memory: bool = False,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """This rank's share of each global batch, without end.

    Args:
        start: position of the first sample of the first batch.
        batch: samples of a global batch; a multiple of `world`.
        mirror: flip about half of the samples left to right, which ones following from seed and position.
        workers: processes that read and decode; 0 does it here.
        window: shards that are mixed with one another.

    Yields:
        (images uint8 [batch / world, C, H, W], labels int64 [batch / world], -1 without labels).

    Raises:
        ValueError: a shard is not what the manifest says, or an image in it does not decode.
    """
    if batch % world:
        raise ValueError(f"a batch of {batch} images does not divide among {world} processes")
    records = Records(
        os.fspath(folder), manifest, Order([s.count for s in manifest.shards], seed, window), start, batch, rank, world
    )
    pipeline = DataPipeline(
        records,
        pipelinefilter(group_by_keys)(),
        map_samples(functools.partial(_decoded, manifest=manifest, seed=seed, mirror=mirror)),
        batched(batch // world, collation_fn=_collate, partial=False),
        pipelinefilter(_errors_as_items)(),
    )
    loader = WebLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_worker_init,
    )
    stream = _items(loader)
    # Without this, a program that ends in the middle of a stream would wait for ever for workers that ignore SIGTERM.
    reference = weakref.ref(stream)
    atexit.register(lambda: (alive := reference()) and alive.close())
    return stream


def _items(loader: Iterable[Any]) -> Generator[Any, None, None]:
    try:
        for item in loader:
            if isinstance(item, Exception):
                raise item
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"a process that reads data was killed ({str(error).splitlines()[0]}). Where memory or /dev/shm is short, "
            "fewer --data.workers help."
        ) from None
