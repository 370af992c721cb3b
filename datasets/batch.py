"""Samples -> a batch: decoded side by side into one block of memory, flipped, and replaced where they are bad."""

import math
import mmap
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .decode import check_jpeg, decode_into
from .manifest import Manifest
from .order import FLIPS, Order, random_words
from .pictures import Form, conform
from .reader import Reader

ATTEMPTS = 64  # substitutes that are tried for one sample
PREFETCH = 4  # batches that each worker may be ahead
CONTEXT = "fork" if sys.platform == "linux" else "spawn"  # how workers are started
REMEDY = "`styleloom inspect DATASET --verify` lists what is wrong"


class Bad(NamedTuple):
    """A sample that could not be used, and what stands in for it."""

    position: int
    shard: str
    row: int
    key: str
    """Its name in the tar; empty if that is unreadable too."""
    reason: str
    substitute: str
    """SHARD:ROW of the sample that took its place."""


@dataclass(frozen=True)
class View:
    """How samples are to be delivered."""

    width: int
    """Pixels."""
    height: int
    channels: int
    codec: str
    form: Form | None
    """Bring each picture into this form as it is read; None: the images have it already, or a multiple of its size."""
    classes: int
    """A label has to be below this; 0: labels do not matter."""
    mirror: bool
    encoded: bool
    """Deliver the images as they are stored."""
    for_device: bool
    """... to be decoded a batch at a time elsewhere, where one that fails would fail them all."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        return self.height, self.width, self.channels

    def decode_into(self, out: np.ndarray, data: bytes) -> None:
        """Brings one stored image into `out`, uint8 of the `shape`. Raises ValueError if it cannot."""
        if self.form:
            out[:] = conform(data, self.form)
        else:
            decode_into(out, data, self.codec)


def make_view(
    manifest: Manifest,
    reduce: int = 1,
    labelled: bool = False,
    mirror: bool = False,
    encoded: bool = False,
    for_device: bool = False,
) -> View:
    """How a data set's samples are delivered; the arguments are those of `stream.batches` and the fields of `View`.

    Raises ValueError if the size does not divide by `reduce`.
    """
    m = manifest
    if reduce < 1 or reduce & (reduce - 1) or m.width % reduce or m.height % reduce:
        raise ValueError(
            f"images of {m.width}x{m.height} cannot be reduced {reduce} times: use a power of 2 that divides both"
        )
    width, height = m.width // reduce, m.height // reduce
    form = None
    if m.conform:
        form = Form(width, height, m.channels, "png", None, m.resize, m.background)
    return View(width, height, m.channels, m.codec, form, m.classes if labelled else 0, mirror, encoded, for_device)


class Slot(NamedTuple):
    """Where a batch lies among the slots."""

    number: int
    shape: tuple[int, ...]
    """[n, H, W, C]"""


class Slots:
    """Memory that workers share with the trainer, for batches on their way.

    Fresh shared memory for each batch, which is what DataLoader would take, costs two fifths of decoding a JPEG of
    1024 px: the system has to clear each page. Here each worker has `each` slots in turn. DataLoader lets it be at most
    PREFETCH batches ahead of the trainer, which copies a batch out at once.

    size: bytes of the largest batch. Smaller ones take the front of a slot, and what was never filled takes no memory.
    """

    def __init__(self, workers: int, size: int) -> None:
        self.size, self.each, self.turn = size, PREFETCH + 1, 0
        n = workers * self.each * size
        if CONTEXT == "fork":  # not /dev/shm, which containers keep small
            self.memory = torch.frombuffer(mmap.mmap(-1, n), dtype=torch.uint8)
        else:
            self.memory = torch.empty(n, dtype=torch.uint8).share_memory_()

    def images(self, slot: Slot) -> Tensor:
        """uint8 [n, H, W, C]"""
        begin = slot.number * self.size
        return self.memory[begin : begin + math.prod(slot.shape)].view(*slot.shape)

    def next(self, worker: int) -> int:
        """The number of the slot that a worker may fill now."""
        self.turn = (self.turn + 1) % self.each
        return worker * self.each + self.turn


class Assembler:
    """A batch's samples -> (images, labels int64 [n], bad ones).

    The images are uint8 [n, C, H, W], in a worker the slot where they lie, or a list of bytes.
    """

    def __init__(self, reader: Reader, order: Order, view: View, slots: Slots | None) -> None:
        self.reader, self.order, self.view, self.slots = reader, order, view, slots

    def __call__(self, samples: list[dict[str, Any]]) -> tuple[Tensor | Slot | list[bytes], Tensor, list[Bad]]:
        slot, images = self._memory(len(samples))
        pixels = None if images is None else images.numpy()
        data, labels, bad = [], [], []
        for i, sample in enumerate(samples):
            encoded, label = self._take(sample, None if pixels is None else pixels[i], bad)
            data.append(encoded)
            labels.append(label)
        if images is None:
            return data, torch.tensor(labels), bad
        images = images.permute(0, 3, 1, 2)
        if self.view.mirror:
            for i, sample in enumerate(samples):
                if is_mirrored(self.order.seed, sample["__key__"]):
                    images[i : i + 1].copy_(images[i : i + 1].flip(3))  # torch is 15 times as fast here as NumPy
        return images if slot is None else slot, torch.tensor(labels), bad

    def _memory(self, n: int) -> tuple[Slot | None, Tensor | None]:
        """(slot, uint8 [n, H, W, C]) to decode into."""
        v, info = self.view, get_worker_info()
        if v.encoded:
            return None, None
        if info is None or self.slots is None:
            return None, torch.empty(n, *v.shape, dtype=torch.uint8)
        slot = Slot(self.slots.next(info.id), (n, *v.shape))
        return slot, self.slots.images(slot)

    def _take(self, sample: dict[str, Any], out: np.ndarray | None, bad: list[Bad]) -> tuple[bytes, int]:
        """Puts a sample, or what stands in for it, into `out`. (encoded image, label)"""
        position, fault = sample["__key__"], sample["fault"]
        if not fault:
            try:
                return self._put(sample["data"], sample["cls"], out)
            except ValueError as error:
                fault = str(error)
        for attempt in range(ATTEMPTS):
            shard, row = self.order.substitute(position, attempt)
            try:
                found = self._put(*self.reader.read(shard, row), out)
            except ValueError:
                continue
            bad.append(self._bad(sample, fault, f"{self.reader.manifest.shards[shard].name}:{row}"))
            return found
        raise ValueError(
            f"no usable sample among {ATTEMPTS} in the window of position {position}: {told(self._bad(sample, fault))}"
        )

    def _put(self, data: bytes, label: int, out: np.ndarray | None) -> tuple[bytes, int]:
        v = self.view
        if v.classes and not 0 <= label < v.classes:
            raise ValueError(f"its label is {'missing' if label < 0 else label}")
        if out is not None:
            v.decode_into(out, data)
        elif v.for_device:
            check_jpeg(data, v.width, v.height, v.channels)
        return data, label

    def _bad(self, sample: dict[str, Any], fault: str, substitute: str = "") -> Bad:
        shard, row = sample["__url__"], sample["row"]
        name = self.reader.manifest.shards[shard].name
        return Bad(sample["__key__"], name, row, self.reader.key(shard, row), fault, substitute)


def told(bad: Bad) -> str:
    """What was wrong with a sample, in a line for a person."""
    return f"{bad.shard}, row {bad.row}{f' ({bad.key})' if bad.key else ''}: {bad.reason}. {REMEDY}"


def is_mirrored(seed: int, position: int) -> bool:
    """Whether the image at a position is flipped, where flipping is asked for."""
    return bool(random_words(seed, FLIPS, position, n=1)[0] & 1)
