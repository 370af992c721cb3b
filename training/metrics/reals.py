"""Real images to measure a generator against: each once, in a fixed order, as they are."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...datasets.batch import REMEDY, make_view
from ...datasets.manifest import Manifest
from ...datasets.order import SAMPLES, permutation
from ...datasets.reader import Reader
from ...datasets.stream import checked_cache


class Chosen:
    """Some of a data set's or folder's images, each also flipped if asked for.

    Attributes:
        identity: says all that the images depend on.
        count: of the images, with the flipped ones.
        about: what a JSON line says of them.
        note: what the user should know; may be empty.

    Args:
        total: images there are.
        limit: more than that are not taken, but chosen at random, always the same.
    """

    def __init__(self, place: str, identity: Sequence[Any], total: int, limit: int, mirror: bool) -> None:
        self.place, self.mirror = place, mirror
        self.numbers = np.sort(permutation(0, SAMPLES, n=total)[:limit])
        self.count = len(self.numbers) * (2 if mirror else 1)
        self.identity = json.dumps([*identity, total, "mirror" if mirror else ""])
        self.about: dict[str, Any] = {"images": self.count, "snapshot": place}
        self.note = ""

    def __call__(self, positions: range) -> list[Tensor]:
        """uint8 [C, H, W] each, on the CPU. Raises ValueError for one that cannot be read."""
        if not self.mirror:
            return [self.image(int(self.numbers[p])) for p in positions]
        pairs = [(self.image(int(self.numbers[p // 2])), p % 2) for p in positions]
        return [image.flip(2) if odd else image for image, odd in pairs]

    def image(self, number: int) -> Tensor:
        """uint8 [C, H, W]"""
        raise NotImplementedError


class Records(Chosen):
    """Images of a prepared data set, in the order of its shards.

    Args:
        place: its folder, or where it lies.
        cache: folder and bytes for copies of remote shards.
        reduce: what the images' sides are divided by.
    """

    def __init__(
        self, place: str, manifest: Manifest, limit: int, mirror: bool, cache: tuple[str, int], reduce: int = 1
    ) -> None:
        self.view = make_view(manifest, reduce)
        size = f"{self.view.width}x{self.view.height}"
        super().__init__(place, ["data set", manifest.hash, size], manifest.count, limit, mirror)
        self.manifest, self.reader = manifest, Reader(place, manifest, checked_cache(place, manifest, 1, cache))
        self.ends = np.cumsum([shard.count for shard in manifest.shards])

    def image(self, number: int) -> Tensor:
        shard = int(self.ends.searchsorted(number, side="right"))
        row = number - int(self.ends[shard]) + self.manifest.shards[shard].count
        out = np.empty(self.view.shape, np.uint8)
        try:
            data, _ = self.reader.read(shard, row)
            self.view.decode_into(out, data)
        except ValueError as error:
            where = f"{self.manifest.shards[shard].name}, row {row}"
            raise ValueError(f"{self.place}: {where}: {error}. {REMEDY}") from None
        self.reader.keep([shard])
        return torch.from_numpy(out.transpose(2, 0, 1))
