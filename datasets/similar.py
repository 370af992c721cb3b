"""Pictures that look alike: a hash of what an image shows, and all pairs of hashes that are nearly the same.

The hash is the difference hash of N. Krawetz ("Kind of Like That", hackerfactor.com, 2013): the image in 9 x 8 grey
cells, and of each cell but a row's first whether it is brighter than its left neighbour. Copies of another size,
quality or brightness differ in some of the 64 bits; what is cropped, turned or painted over is not found.
"""

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

NEAR = 3  # bits of 64 in which copies may differ
_FLAT = 8  # of 255: an image whose cells differ by less shows nothing to compare
_BLOCKS = 6
_REACH = 64  # hashes of one key that each is compared with
_MOST_PAIRS = 1_000_000


def likeness(image: Image.Image) -> int | None:
    """The difference hash of an image (a thumbnail will do), 0 to 2**64 - 1; None if it is flat."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))  # [8, 9]
    if int(cells.max()) - int(cells.min()) < _FLAT:
        return None
    brighter = cells[:, 1:] > cells[:, :-1]
    return int.from_bytes(np.packbits(brighter).tobytes(), "big")


class Pairs(NamedTuple):
    """Which hashes are near each other."""

    pairs: np.ndarray
    """int64 [P, 3]: place of the one, place of the other (a later one), differing bits; in ascending order."""
    complete: bool
    """False if hashes are so crowded that pairs may be missing."""


def near_pairs(hashes: np.ndarray) -> Pairs:
    """All pairs that differ in no more than `NEAR` bits. Of equal hashes, only the first is paired with others.

    hashes: uint64 [N]; seconds for a million of them. Two hashes that differ in 3 bits agree in 3 of 6 blocks at least,
    so they are neighbours once sorted by these (G. S. Manku et al., "Detecting Near-Duplicates for Web Crawling", 2007,
    section 3). To bound the work, each is compared with only the next 64 that agree with it so.
    """
    distinct, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    places = np.arange(len(hashes))
    again = places[first[group] != places]
    equal = np.stack([first[group[again]], again, np.zeros_like(again)], axis=1)
    found, complete = _near_distinct(distinct)
    apart = np.bitwise_count(distinct[found[:, 0]] ^ distinct[found[:, 1]]).astype(np.int64)
    near = np.column_stack([np.sort(first[found], axis=1), apart])
    pairs = np.concatenate([equal, near]).astype(np.int64)
    return Pairs(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))], complete)


def _near_distinct(distinct: np.ndarray) -> tuple[np.ndarray, bool]:
    """int64 [P, 2]: pairs of places in `distinct` (uint64 [N], all different) that are near; and whether all."""
    found = [np.empty((0, 2), np.int64)]
    complete = True
    for mask in _masks():
        keys = distinct & mask
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for reach in range(1, min(_REACH + 1, len(keys))):
            at = np.flatnonzero(keys[reach:] == keys[:-reach])
            if not len(at):
                break
            pairs = np.stack([order[at], order[at + reach]], axis=1)
            near = np.bitwise_count(distinct[pairs[:, 0]] ^ distinct[pairs[:, 1]]) <= NEAR
            found.append(np.sort(pairs[near], axis=1))
            complete &= reach < _REACH
        found = [np.unique(np.concatenate(found), axis=0)]
        if len(found[0]) > _MOST_PAIRS:
            return found[0][:_MOST_PAIRS], False
    return found[0], complete


def _masks() -> list[np.uint64]:
    """The bits to agree in: every choice of all but `NEAR` blocks."""
    bits = np.arange(64)
    block = bits * _BLOCKS // 64
    ones = np.uint64(1) << bits.astype(np.uint64)
    return [
        np.bitwise_or.reduce(ones[np.isin(block, kept)])
        for kept in itertools.combinations(range(_BLOCKS), _BLOCKS - NEAR)
    ]
