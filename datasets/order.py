"""Which sample stands at which position of the endless stream: a pure function of the seed.

Epoch and place are `divmod(position, count)`; an epoch's shards are permuted, cut into windows of `window` shards, and
the samples of each window permuted.
"""

import functools
from typing import Any

import numpy as np

SHARDS, SAMPLES, FLIPS, SUBSTITUTES = range(4)  # what a stream of random words is for


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
        seed: of the permutations, 0 to 2**63 - 1.
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
        epoch, window, place = self.window_of(position)
        return self._sample(epoch, window, place)

    def window_of(self, position: int) -> tuple[int, int, int]:
        """Position -> (epoch, window of that epoch, place in that window)."""
        epoch, place = divmod(position, self.total)
        _, ends = self.epoch(epoch)
        window = int(ends.searchsorted(place, side="right"))
        return epoch, window, place - (int(ends[window - 1]) if window else 0)

    def shards_of(self, epoch: int, window: int) -> np.ndarray:
        """int64: the shards of a window. The window after an epoch's last is the first of the next epoch."""
        shards, ends = self.epoch(epoch)
        if window == len(ends):
            return self.shards_of(epoch + 1, 0)
        return shards[window * self.window : (window + 1) * self.window]

    def substitute(self, position: int, attempt: int) -> tuple[int, int]:
        """(shard, row) of a sample that may stand in for the one at `position`: drawn from the same window."""
        epoch, window, _ = self.window_of(position)
        size = len(self.mixed(epoch, window)[2])
        word = random_words(self.seed, SUBSTITUTES, position, attempt, n=1)[0]
        return self._sample(epoch, window, int(word) % size)

    def _sample(self, epoch: int, window: int, place: int) -> tuple[int, int]:
        shards, starts, order = self.mixed(epoch, window)
        sample = order[place]
        which = int(starts.searchsorted(sample, side="right")) - 1
        return int(shards[which]), int(sample - starts[which])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in this epoch's order, number of samples up to the end of each window)."""
        shards = permutation(self.seed, SHARDS, epoch, n=len(self.counts))
        ends = np.cumsum(self.counts[shards])
        return shards, np.append(ends[self.window - 1 : -1 : self.window], ends[-1])

    def _mixed(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(the window's shards, the first sample of each, the order of all their samples)."""
        shards = self.shards_of(epoch, window)
        ends = np.cumsum(self.counts[shards])
        order = permutation(self.seed, SAMPLES, epoch, window, n=int(ends[-1]))
        return shards, ends - self.counts[shards], order
