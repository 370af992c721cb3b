"""Shards -> batches, for any rank and any number of worker processes, from any position.

The stream is a permutation, not a process: it has a position (0, 1, 2, ... without end), and which sample stands at a
position follows from the seed alone (order.py). At a step, rank r of R reads the positions start + r, start + r + R,
..., and worker w of n prepares the steps w, w + n, ...: neither ranks nor workers change the global batch, every rank
has as many samples as any other, and going on from a position needs nothing but its number.

A sample that cannot be used is replaced by another one, which follows from seed and position too, and reported; its
neighbours stay where they are.

It is built from webdataset's own stages; only the first one, which reads samples by the manifest's index, is ours.
"""

import atexit
import contextlib
import heapq
import itertools
import os
import signal
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import map as map_samples
from webdataset.filters import pipelinefilter
from webdataset.pipeline import DataPipeline

from . import storage
from .batch import CONTEXT, PREFETCH, Assembler, Bad, Slots, View, is_mirrored, make_view, told
from .cache import Prefetcher
from .decode import decode_on_device
from .manifest import Manifest, index_bytes
from .order import Order
from .reader import Reader

LEAST_SEEN = 1000  # samples: the share of bad ones is one of at least so many


class Records(IterableDataset):
    """webdataset's first stage: the samples of this rank and worker, read by the index, a list for each batch.

    A sample is `{"__key__": position, "__url__": shard, "row": row in it, "data": encoded image, "cls": label, "fault":
    why these two are missing}`.
    """

    def __init__(
        self, reader: Reader, order: Order, start: int, batch: int, rank: int, world: int, prefetch: bool
    ) -> None:
        self.reader, self.order, self.start, self.batch = reader, order, start, batch
        self.rank, self.world, self.prefetch = rank, world, prefetch

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        prefetcher = Prefetcher(self.reader.cache) if self.reader.cache and self.prefetch and worker == 0 else None
        try:
            at = None
            for step in itertools.count(worker, workers):
                first, samples = self.start + step * self.batch, []
                for position in range(first + self.rank, first + self.batch, self.world):
                    epoch, window, _ = self.order.window_of(position)
                    if at != (epoch, window):
                        at = (epoch, window)
                        self._enter(epoch, window, prefetcher)
                    samples.append(self._sample(position))
                yield samples
        finally:
            if prefetcher:
                prefetcher.close()

    def _enter(self, epoch: int, window: int, prefetcher: Prefetcher | None) -> None:
        """Closes the shards of the window before, and has those of this one and of the next fetched."""
        now = self.order.shards_of(epoch, window).tolist()
        self.reader.keep(now)
        if prefetcher:
            soon = self.order.shards_of(epoch, window + 1).tolist()
            prefetcher.want(file for shard in (*now, *soon) for file in self.reader.files(shard))

    def _sample(self, position: int) -> dict[str, Any]:
        shard, row = self.order(position)
        sample = {"__key__": position, "__url__": shard, "row": row, "fault": ""}
        try:
            sample["data"], sample["cls"] = self.reader.read(shard, row)
        except ValueError as error:
            sample["fault"] = str(error)
        return sample


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
    # A signal may end the trainer's waiting in the midst of taking a batch over: no fault of the thread that hands it.
    sys.excepthook = _but_lost_connections


def _but_lost_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


@dataclass
class Limit:
    """Counts bad samples; raises ValueError when they are too many."""

    share: float
    """Bad samples, of those seen (counted as LEAST_SEEN at least), above which it stops."""
    report: Callable[[Bad], None] | None
    seen: int = 0
    bad: int = 0

    def count(self, n: int, bad: list[Bad]) -> None:
        self.seen += n
        for each in bad:
            self.bad += 1
            if self.report:
                self.report(each)
        if bad:
            check_share(self.bad, self.seen, self.share, bad[-1])


def check_share(bad: int, seen: int, share: float, last: Bad) -> None:
    """Raises ValueError if too many samples are bad: more than `share` of those seen, or of LEAST_SEEN at least."""
    if bad > share * max(seen, LEAST_SEEN):
        raise ValueError(
            f"{bad} of {seen} samples could not be used, more than the share of {share:g} that data.max_bad allows. "
            f"The last: {told(last)}"
        )


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
    labelled: bool = False,
    reduce: int = 1,
    decode: bool = True,
    device: torch.device | str | None = None,
    workers: int = 0,
    window: int = 16,
    pin_memory: bool = False,
    cache: tuple[str, int] | None = None,
    prefetch: bool = True,
    max_bad: float = 0.0,
    report_bad: Callable[[Bad], None] | None = None,
) -> Generator[tuple[Any, Tensor], None, None]:
    """This rank's share of each global batch, without end.

    Args:
        folder: of the manifest: a path, or a remote place as in storage.py.
        start: position of the first sample of the first batch.
        batch: samples of a global batch; a multiple of `world`.
        mirror: flip about half of the samples left to right, which ones following from seed and position.
        labelled: labels matter: a sample without a valid one is a bad one.
        reduce: deliver images at 1/2, 1/4, ... of the data set's size.
        decode: False delivers the images as they are stored, as a list of bytes, without flips.
        device: decode there, a batch at a time (JPEG on a GPU); by default on the CPU, in the workers.
        workers: processes that read and decode; 0 does it here.
        window: shards that are mixed with one another.
        cache: for remote shards, (folder, bytes that it may hold).
        prefetch: fetch the next window's remote shards in the background (one process a node should).
        max_bad: share of this process's samples that may be unusable and replaced; above it the stream ends.
        report_bad: is told of each bad sample, in this process.

    Yields:
        (images uint8 [batch / world, C, H, W] in channels-last memory, labels int64 [batch / world], -1 without).

    Raises:
        ValueError: too many samples are not what the manifest says or do not decode; the options do not fit the set.
        OSError: reading failed: this machine's disk, or a remote shard that could not be had.
    """
    if batch % world:
        raise ValueError(f"a batch of {batch} images does not divide among {world} processes")
    reader = Reader(os.fspath(folder), manifest, checked_cache(folder, manifest, window, cache))
    order = Order([s.count for s in manifest.shards], seed, window)
    if device is not None:
        check_decodes_on_device(manifest, reduce)
    for_device = device is not None
    view = make_view(manifest, reduce, labelled, mirror, encoded=for_device or not decode, for_device=for_device)
    shape = (batch // world, view.height, view.width, view.channels)
    slots = Slots(workers, shape) if workers and not view.encoded else None
    pipeline = DataPipeline(
        Records(reader, order, start, batch, rank, world, prefetch),
        map_samples(Assembler(reader, order, view, slots)),
        pipelinefilter(_errors_as_items)(),
    )
    loader = DataLoader(
        cast(IterableDataset, pipeline),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context=CONTEXT if workers else None,
        worker_init_fn=_worker_init,
    )
    stream = _items(loader, Limit(max_bad, report_bad), slots, pin_memory)
    if decode and device is not None:
        stream = _decoded(stream, view, torch.device(device), seed, range(start + rank, start + batch, world), batch)
    # Without this, a program that ends in the middle of a stream would wait for ever for workers that ignore SIGTERM.
    reference = weakref.ref(stream)
    atexit.register(lambda: (alive := reference()) and alive.close())
    return stream


def check_decodes_on_device(manifest: Manifest, reduce: int) -> None:
    """Raises ValueError if the images are not such that a device can decode whole batches of them."""
    if manifest.codec != "jpeg" or manifest.conform or reduce > 1:
        raise ValueError("only JPEG images of the size that is asked for can be decoded on a GPU: leave it to the CPU")


def checked_cache(
    folder: str | os.PathLike[str], manifest: Manifest, window: int, cache: tuple[str, int] | None
) -> tuple[str, int] | None:
    """The cache, if it is needed. Raises ValueError if it is not given, or cannot hold two windows."""
    if not storage.is_remote(folder) and not storage.is_remote(manifest.root):
        return None
    if cache is None:
        raise ValueError(
            f"{storage.shown(os.fspath(folder))} is read through a cache on this node: give its folder and size"
        )
    needed = sum(heapq.nlargest(2 * window, (shard.bytes + index_bytes(shard) for shard in manifest.shards)))
    if cache[1] < needed:
        raise ValueError(
            f"two windows of {window} shards take {needed / 1e9:.2f} GB, the cache holds {cache[1] / 1e9:.2f} GB: "
            "raise --data.cache-gb, or lower --data.window"
        )
    return cache


def _items(loader: DataLoader, limit: Limit, slots: Slots | None, pin: bool) -> Generator[Any, None, None]:
    iterator = iter(loader)
    workers = list(getattr(iterator, "_workers", ()))
    try:
        for item in iterator:
            if isinstance(item, Exception):
                raise item
            images, labels, bad = item
            if isinstance(images, int):
                assert slots is not None
                images = slots.slot(images).permute(0, 3, 1, 2)
                images = torch.empty_like(images, pin_memory=pin).copy_(images)
            elif pin and isinstance(images, Tensor):
                images = images.pin_memory()
            limit.count(len(labels), bad)
            yield images, labels
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"a process that reads data was killed ({str(error).splitlines()[0]}). Where memory or /dev/shm is short, "
            "fewer --data.workers help."
        ) from None
    finally:
        _end(iterator, workers)


def _end(iterator: Any, workers: list[Any]) -> None:
    """Ends the workers. Those in the midst of a fetch do not hear torch's wish, and ignore SIGTERM: they are killed,
    which leaves nothing behind that the cache does not clear away."""
    if not workers:
        return
    with contextlib.suppress(RuntimeError):  # of one that was killed before
        iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


def _decoded(
    stream: Generator[Any, None, None], view: View, device: torch.device, seed: int, positions: range, batch: int
) -> Generator[Any, None, None]:
    """The encoded images of a stream decoded on a device, a batch at a time, and flipped."""
    try:
        for step, (data, labels) in enumerate(stream):
            images = decode_on_device(data, view.channels, device)
            if images.shape[2:] != (view.height, view.width):
                raise ValueError(f"images of {images.shape[3]}x{images.shape[2]}, not {view.width}x{view.height}")
            if view.mirror:
                flips = [is_mirrored(seed, position + step * batch) for position in positions]
                mask = torch.tensor(flips, device=device)[:, None, None, None]
                images = torch.where(mask, images.flip(3), images)
            yield images, labels
    finally:
        stream.close()
