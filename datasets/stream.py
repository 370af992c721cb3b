"""Shards -> batches, for any rank and any number of worker processes, from any position.

The stream is a permutation, not a process: it has a position (0, 1, 2, ... without end), and which sample stands at a
position follows from the seed alone (order.py). At a step, rank r of R reads the positions start + r, start + r + R,
..., and worker w of n prepares the steps w, w + n, ...: neither ranks nor workers change the global batch, every rank
has as many samples as any other, and going on from a position needs nothing but its number.

A sample that cannot be used is replaced by another one, which follows from seed and position too, and reported; its
neighbours stay where they are.

The batch and the size of the images may change on the way, at positions that are known from the start (`Stretch`): the
samples stay the same. Each worker knows all changes, so nothing is started anew, nor waited for, at any of them.

It is built from webdataset's own stages; only the first one, which reads samples by the manifest's index, is ours.
"""

import atexit
import bisect
import contextlib
import heapq
import itertools
import math
import os
import signal
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
from .batch import CONTEXT, PREFETCH, Assembler, Bad, Slot, Slots, is_mirrored, make_view, told
from .cache import Prefetcher
from .decode import decode_on_device
from .manifest import Manifest, differences, index_bytes
from .order import Order
from .reader import Reader

LEAST_SEEN = 1000  # samples: the share of bad ones is one of at least so many


@dataclass(frozen=True)
class Stretch:
    """A part of the stream in which batches and images have one size."""

    start: int
    """Position of its first sample."""
    batch: int
    """Samples of a global batch."""
    folder: str | os.PathLike[str]
    """Of the manifest: a path, or a remote place as in storage.py."""
    manifest: Manifest
    reduce: int
    """Images at 1/2, 1/4, ... of the manifest's size; 1: as they are."""


class Plan:
    """Which positions this rank has at each step, and what delivers their samples: for each stretch an assembler."""

    def __init__(self, stretches: Sequence[Stretch], assemblers: list[Assembler], rank: int, world: int) -> None:
        self.stretches, self.assemblers, self.rank, self.world = stretches, assemblers, rank, world
        steps = [(b.start - a.start) // a.batch for a, b in itertools.pairwise(stretches)]
        self.first_steps = [0, *itertools.accumulate(steps)]

    def at(self, step: int) -> tuple[int, range]:
        """Step (0 is the stream's first) -> (number of its stretch, positions)."""
        number = bisect.bisect_right(self.first_steps, step) - 1
        stretch = self.stretches[number]
        begin = stretch.start + (step - self.first_steps[number]) * stretch.batch
        return number, range(begin + self.rank, begin + stretch.batch, self.world)

    def readers(self, begin: int, end: int) -> list[Reader]:
        """Those of the stretches that have positions from `begin` up to `end` (exclusive), in order."""
        starts = [stretch.start for stretch in self.stretches]
        among = slice(bisect.bisect_right(starts, begin) - 1, bisect.bisect_left(starts, end))
        return [assembler.reader for assembler in self.assemblers[among]]


class Records(IterableDataset):
    """webdataset's first stage: the samples of this rank and worker, read by the index, a list for each batch, with the
    assembler that is to have it.

    A sample is `{"__key__": position, "__url__": shard, "row": row in it, "data": encoded image, "cls": label, "fault":
    why these two are missing}`.
    """

    def __init__(self, plan: Plan, order: Order, prefetch: bool) -> None:
        self.plan, self.order, self.prefetch = plan, order, prefetch

    def __iter__(self) -> Iterator[tuple[Assembler, list[dict[str, Any]]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # The cache of any stretch will do: they are one folder.
        cache = next((each.reader.cache for each in self.plan.assemblers if each.reader.cache), None)
        prefetcher = Prefetcher(cache) if cache and self.prefetch and worker == 0 else None
        try:
            at = None
            for step in itertools.count(worker, workers):
                number, positions = self.plan.at(step)
                assembler, samples = self.plan.assemblers[number], []
                for position in positions:
                    epoch, window, _ = self.order.window_of(position)
                    if at != (number, epoch, window):
                        at = (number, epoch, window)
                        self._enter(position, assembler.reader, prefetcher)
                    samples.append(self._sample(position, assembler.reader))
                yield assembler, samples
        finally:
            if prefetcher:
                prefetcher.close()

    def _enter(self, position: int, reader: Reader, prefetcher: Prefetcher | None) -> None:
        """Closes the shards of the window or stretch before, and has those of this window and of the next fetched."""
        shards, middle = self._window(position)
        for assembler in self.plan.assemblers:
            assembler.reader.keep(shards if assembler.reader is reader else ())
        if prefetcher:
            soon, end = self._window(middle)
            wanted = [*self._files(shards, position, middle), *self._files(soon, middle, end)]
            prefetcher.want(dict.fromkeys(wanted))  # once, if two stretches read the same shards

    def _window(self, position: int) -> tuple[list[int], int]:
        """(the shards of a position's window, the first position after that window)"""
        epoch, window, _ = self.order.window_of(position)
        end = epoch * self.order.total + int(self.order.epoch(epoch)[1][window])
        return self.order.shards_of(epoch, window).tolist(), end

    def _files(self, shards: list[int], begin: int, end: int) -> list[tuple[str, int, str]]:
        """The remote files of shards that are read from position `begin` up to `end`: those of each stretch there."""
        readers = self.plan.readers(begin, end)
        return [file for reader in readers for shard in shards for file in reader.files(shard)]

    def _sample(self, position: int, reader: Reader) -> dict[str, Any]:
        shard, row = self.order(position)
        sample = {"__key__": position, "__url__": shard, "row": row, "fault": ""}
        try:
            sample["data"], sample["cls"] = reader.read(shard, row)
        except ValueError as error:
            sample["fault"] = str(error)
        return sample


def _assembled(step: tuple[Assembler, list[dict[str, Any]]]) -> Any:
    assembler, samples = step
    return assembler(samples)


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
    then: Sequence[Stretch] = (),
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
        then: stretches that follow: from the start of each on, batches have its size, and images come from its folder
            and manifest (the same set, perhaps at another size) at 1/`reduce`. Samples, flips and labels are those of
            a stream without changes.

    Yields:
        (images uint8 [batch / world, C, H, W] in channels-last memory, labels int64 [batch / world], -1 without).

    Raises:
        ValueError: too many samples are not what the manifest says or do not decode; the options do not fit the set, or
            the stretches one another.
        OSError: reading failed: this machine's disk, or a remote shard that could not be had.
    """
    stretches = [Stretch(start, batch, folder, manifest, reduce), *then]
    check_stretches(stretches, world)
    for_device = device is not None
    encoded = for_device or not decode
    if for_device:
        for each in stretches:
            check_decodes_on_device(each.manifest, each.reduce)
    views = [make_view(each.manifest, each.reduce, labelled, mirror, encoded, for_device) for each in stretches]
    sizes = [each.batch // world * math.prod(view.shape) for each, view in zip(stretches, views, strict=True)]
    slots = Slots(workers, max(sizes)) if workers and not encoded else None
    order = Order([s.count for s in manifest.shards], seed, window)
    caches = [checked_cache(each.folder, each.manifest, window, cache) for each in stretches]
    readers = [Reader(os.fspath(s.folder), s.manifest, its) for s, its in zip(stretches, caches, strict=True)]
    assemblers = [Assembler(reader, order, view, slots) for reader, view in zip(readers, views, strict=True)]
    plan = Plan(stretches, assemblers, rank, world)
    pipeline = DataPipeline(
        Records(plan, order, prefetch),
        map_samples(_assembled),
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
        stream = _decoded(stream, plan, torch.device(device), seed)
    # Without this, a program that ends in the middle of a stream would wait for ever for workers that ignore SIGTERM.
    reference = weakref.ref(stream)
    atexit.register(lambda: (alive := reference()) and alive.close())
    return stream


def check_stretches(stretches: Sequence[Stretch], world: int) -> None:
    """Raises ValueError, naming what does not fit, if these cannot follow one another in a stream of `world` ranks."""
    for each in stretches:
        if each.batch % world:
            raise ValueError(f"a batch of {each.batch} images does not divide among {world} processes")
    for a, b in itertools.pairwise(stretches):
        if b.start <= a.start:
            raise ValueError(f"a stretch from position {b.start} on cannot follow one from {a.start} on")
        if (b.start - a.start) % a.batch:
            raise ValueError(
                f"batches of {a.batch} images from position {a.start} on do not end at {b.start}, where the next "
                "stretch begins"
            )
        if differing := differences(a.manifest, b.manifest):
            folders = [storage.shown(os.fspath(each.folder)) for each in (a, b)]
            raise ValueError(f"{folders[1]} is not the same data set as {folders[0]}: {', '.join(differing)} differ")


def check_decodes_on_device(manifest: Manifest, reduce: int) -> None:
    """Raises ValueError if the images are not such that a device can decode whole batches of them."""
    if manifest.codec != "jpeg" or manifest.conform or reduce > 1:
        raise ValueError(
            "only JPEG images of the size that is asked for can be decoded on a GPU: prepare them at that size, too, "
            "or leave it to the CPU"
        )


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
        for item in _received(iterator):
            if isinstance(item, Exception):
                raise item
            images, labels, bad = item
            if isinstance(images, Slot):
                assert slots is not None
                images = slots.images(images).permute(0, 3, 1, 2)
                images = torch.empty_like(images, pin_memory=pin).copy_(images)
            elif pin and isinstance(images, Tensor):
                images = images.pin_memory()
            limit.count(len(labels), bad)
            yield images, labels
    finally:
        _end(iterator, workers)


def _received(items: Iterable[Any]) -> Iterator[Any]:
    """What workers send. Raises ValueError where one was killed, perhaps in the midst of sending."""
    try:
        yield from items
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"a process that reads data was killed ({str(error).splitlines()[0] if str(error) else 'its pipe ended'}). "
            "Where memory or /dev/shm is short, fewer --data.workers help."
        ) from None


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
    stream: Generator[Any, None, None], plan: Plan, device: torch.device, seed: int
) -> Generator[Any, None, None]:
    """The encoded images of a stream decoded on a device, a batch at a time, and flipped."""
    try:
        for step, (data, labels) in enumerate(stream):
            number, positions = plan.at(step)
            view = plan.assemblers[number].view
            images = decode_on_device(data, view.channels, device)
            if images.shape[2:] != (view.height, view.width):
                raise ValueError(f"images of {images.shape[3]}x{images.shape[2]}, not {view.width}x{view.height}")
            if view.mirror:
                flips = [is_mirrored(seed, position) for position in positions]
                mask = torch.tensor(flips, device=device)[:, None, None, None]
                images = torch.where(mask, images.flip(3), images)
            yield images, labels
    finally:
        stream.close()
