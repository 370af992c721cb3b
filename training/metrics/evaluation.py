"""Sets of images -> features -> metrics, by all processes of a team together.

A set is cut into chunks of 64 images, whatever the number of processes. Each chunk goes through the network on one of
them, always in the same batches, so the features are the same bits on any number of processes (of the same devices and
threads). After each round of chunks the main process gathers the rows; so nobody waits for longer than a chunk takes.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from ...datasets.workers import progress_bar
from ..distributed import Team
from . import distances
from .features import Inception, Resize, images_to_features, no_head
from .ppl import Perceptual, mean_length
from .store import Store, delete_abandoned, retain

CHUNK = 64  # images
NOTHING = np.empty([0, 0], np.float32)
VERSION = 1  # of how features are made: others' files are not taken
KEPT = 16  # whole sets of generated images' features that stay on disk; of 50,000 images each has 400 MB
THREADS = 8  # at most, that resize

METRICS = ("fid", "kid", "is", "pr", "ppl")

Positions = Callable[[range], Iterable[Tensor]]  # which images of a set -> uint8 [C, H, W] each, on the CPU
Pairs = Callable[[range], tuple[Tensor, Tensor]]  # ... -> both ends of steps, fp32 [n, C, H, W] in 0 to 255


def never() -> bool:
    return False


class Features(NamedTuple):
    """Of a set of images."""

    rows: np.ndarray
    """fp32 [count, D] on the main process, [0, D] or [0, 0] on the others."""
    count: int
    """Images."""


_T = TypeVar("_T")


class _Done(NamedTuple):
    """What a process did in a step."""

    number: int | None = None
    """The chunk that it has; None: there was none for it."""
    rows: np.ndarray = NOTHING
    stopped: bool = False


class Evaluation:
    """Measures images by a feature network. All methods but `measure` are to be called by every process alike.

    Args:
        network: on each process; None where only path lengths are measured.
        perceptual: for path lengths.
        cache: folder for what is finished.
        resize: how images come to the network's size.
        progress: show a bar with the time left, on the main process's stderr.
        stopped: asked between chunks; if it says so on any process, all give up. What is finished stays in the cache.
    """

    def __init__(
        self,
        team: Team,
        network: Inception | None,
        perceptual: Perceptual | None,
        cache: Path,
        resize: Resize,
        progress: bool = True,
        stopped: Callable[[], bool] = never,
    ) -> None:
        self.team, self.network, self.perceptual, self.cache = team, network, perceptual, Path(cache)
        self.resize: Resize = resize
        self.progress, self.stopped = progress, stopped
        self.threads = min(max((os.cpu_count() or 1) // team.local_world, 1), THREADS)

    def reals(self, identity: str, count: int, images: Positions) -> Features | None:
        """Features of real images, which stay in the cache.

        Args:
            identity: says all that the images depend on, such as the manifest's hash and their size.
            images: at some of the positions 0 to count - 1.

        Returns:
            None, everywhere, if `stopped` said so.

        Raises:
            ValueError: everywhere, if an image could not be had or a file not be written on any process.
        """
        return self._features("reals", identity, count, images)

    def fakes(self, identity: str | None, count: int, images: Positions) -> Features | None:
        """As `reals`, of generated images. identity: None: nothing is kept."""
        return self._features("fakes", identity, count, images)

    def lengths(self, identity: str | None, count: int, pairs: Pairs) -> Features | None:
        """As `fakes`: perceptual distances, fp32 [count, 1], between both ends of steps (see `ppl.image_pairs`)."""
        perceptual = self.perceptual
        assert perceptual is not None

        def rows(positions: range) -> np.ndarray:
            return perceptual.distances(*pairs(positions)).numpy()[:, None]

        return self._rows("lengths", identity, [perceptual.fingerprint], count, rows)

    def _features(self, kind: str, identity: str | None, count: int, images: Positions) -> Features | None:
        network = self.network
        assert network is not None

        def rows(positions: range) -> np.ndarray:
            return images_to_features(network, images(positions), self.resize, self.threads)

        return self._rows(kind, identity, [network.fingerprint, self.resize], count, rows)

    def _rows(
        self, kind: str, identity: str | None, how: Sequence[str], count: int, make: Callable[[range], np.ndarray]
    ) -> Features | None:
        """fp32 [count, D] of `make(positions)`, from the cache as far as it is there."""
        key = json.dumps([VERSION, CHUNK, kind, identity, *how, count])
        name, counts = f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}", self.team.gather([count])
        if len(set(counts)) > 1:
            raise ValueError(f"the processes see different sets of images, of {min(counts)} to {max(counts)}")
        name = self.team.gather([name])[0]  # a node's copies of files may have other times
        store = Store(self.cache, name, count, CHUNK)
        found = store.whole() if identity is not None and self.team.main else None
        if any(self.team.gather([found is not None])):
            out = found if found is not None else NOTHING
        else:
            out = self._collected(kind, store, identity is not None, make)
            if out is None:
                return None
            if identity is not None:
                self._agree(lambda: self._finish(store, out) if self.team.main else None)
                store.delete_parts()
        return Features(out, count)

    def _finish(self, store: Store, rows: np.ndarray) -> None:
        store.save_whole(rows)
        retain(self.cache, "fakes-*.npy", KEPT)
        delete_abandoned(self.cache)

    def _collected(self, kind: str, store: Store, keep: bool, make: Callable[[range], np.ndarray]) -> np.ndarray | None:
        """All rows, on the main process; None everywhere if it was stopped."""
        out = NOTHING

        def step(number: int | None) -> _Done:
            self.team.place.at(f"measuring {kind}")
            if self.stopped():
                return _Done(stopped=True)
            return _Done() if number is None else _Done(number, _chunk(store, keep, number, make))

        with progress_bar(store.count, 0, f"measuring {kind}", self.progress and self.team.main, after=1) as bar:
            for number in self._mine(store, keep):
                done = self._agree(functools.partial(step, number))
                if any(its.stopped for its in done):
                    return None
                for its in done:
                    bar.update(len(its.rows))
                    if self.team.main and its.number is not None:
                        out = out if out.size else np.empty([store.count, its.rows.shape[1]], np.float32)
                        where = store.rows(its.number)
                        out[where.start : where.stop] = its.rows
        return out

    def _agree(self, act: Callable[[], _T]) -> list[_T]:
        """What each process's `act` returned. Raises ValueError, everywhere the same, if one of them failed."""
        fault, value = "", None
        try:
            value = act()
        except (ValueError, OSError) as error:
            fault = str(error) or type(error).__name__
        results = self.team.gather([(fault, value)])
        if faults := [fault for fault, _ in results if fault]:
            raise ValueError(faults[0])
        return [value for _, value in results]

    def _mine(self, store: Store, keep: bool) -> Iterator[int | None]:
        """The chunks that this process is to deliver, as many steps on each; None: nothing in this step.

        First what is on disk, by a process that sees it (the cache may be each node's own), then the others in turn.
        """
        rank, world = self.team.rank, self.team.world
        there = self.team.gather([store.there() if keep else []])
        seen_by: dict[int, list[int]] = {}
        for who, numbers in enumerate(there):
            for number in numbers:
                seen_by.setdefault(number, []).append(who)
        loads: list[list[int]] = [[] for _ in range(world)]
        for number, who in sorted(seen_by.items()):
            loads[who[number % len(who)]].append(number)
        missing = [i for i in range(-(-store.count // CHUNK)) if i not in seen_by]
        for queues in (loads, [missing[i::world] for i in range(world)]):
            for step in range(max(map(len, queues))):
                yield queues[rank][step] if step < len(queues[rank]) else None

    def measure(
        self,
        names: Sequence[str],
        reals: Features | None,
        fakes: Features | None,
        lengths: Features | None = None,
        seed: int = 0,
    ) -> dict[str, float]:
        """The values, for the main process: "fid", "kid", "is" and "is_std", "precision" and "recall" (on this
        network's features) for "pr", "ppl". Seconds each for 50,000 images; `pr` needs a GPU for that.

        Args:
            names: of `METRICS`.
            reals, fakes, lengths: as far as they are needed.
            seed: of the subsets that `kid` takes.

        Raises:
            ValueError: too few images, or no classifier for `is`.
        """
        out: dict[str, float] = {}
        for name in names:
            self.team.place.at(f"calculating {name}")
            out |= self._value(name, reals, fakes, lengths, seed)
        return out

    def _value(
        self, name: str, reals: Features | None, fakes: Features | None, lengths: Features | None, seed: int
    ) -> dict[str, float]:
        if name == "ppl":
            assert lengths is not None
            return {"ppl": mean_length(lengths.rows[:, 0])}
        assert fakes is not None
        if name == "is":
            assert self.network is not None
            mean, std = distances.inception_score(self.network.probabilities(fakes.rows))
            return {"is": mean, "is_std": std}
        assert reals is not None
        if name == "fid":
            return {"fid": distances.frechet(*distances.moments(reals.rows), *distances.moments(fakes.rows))}
        if name == "kid":
            return {"kid": distances.kid(reals.rows, fakes.rows, seed)}
        assert name == "pr", name
        precision, recall = distances.precision_recall(reals.rows, fakes.rows, device=self.team.device)
        return {"precision": precision, "recall": recall}


def _chunk(store: Store, keep: bool, number: int, make: Callable[[range], np.ndarray]) -> np.ndarray:
    """A chunk's rows, fp32 [n, D]: from the cache, or made and put there."""
    found = store.part(number) if keep else None
    if found is not None:
        return found
    rows = make(store.rows(number)).astype(np.float32, copy=False)
    if keep:
        store.save_part(number, rows)
    return rows


def check_metrics(names: Sequence[str], network: Inception | None, count: int) -> None:
    """Raises ValueError, before hours are spent, if metrics cannot be had of so many images by this network."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"there is no metric {name!r}. There are: {', '.join(METRICS)}.")
    least = {"fid": 2, "kid": 2, "is": 10, "pr": 4, "ppl": 1}
    for name in names:
        if count < least[name]:
            raise ValueError(f"{name} needs at least {least[name]} images, not {count}")
    if "is" in names and network is not None and network.head is None:
        raise ValueError(no_head(network.name))
