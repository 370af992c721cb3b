"""Who makes which shards where several `styleloom prepare` fill one data set, and the locks that keep them apart.

Part i of n makes every n-th shard. Parts run at any time and on any machine, one after another or at once; the one that
finds all shards there writes the manifest. A run without parts is part 1 of 1. All of it rests on two kinds of locks in
DEST/.prepare, which vanish with their process: each part holds its own for as long as it runs, and the desk is for what
one may do at a time, such as to agree on the plan, to look for duplicates, to finish.
"""

import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from .manifest import TEMPORARY, WORK, locked

_DESK = "desk.lock"
_PART_LOCK = re.compile(r"part-([0-9]+)-of-([0-9]+)\.lock")
_SHARD_FILE = re.compile(r"(?:shard-)?([0-9]+)\.")


class Part(NamedTuple):
    """The i-th of n parts of the shards."""

    number: int
    """1 to `of`."""
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def has(self, shard: int) -> bool:
        """Whether the shard of this number, from 0, belongs to it."""
        return shard % self.of == self.number - 1


WHOLE = Part(1, 1)


def parse_part(text: str) -> Part:
    """The part called "2/8". Raises ValueError if there is no such part."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part is I/N with I from 1 to N, such as 2/8, not {text!r}")
    return Part(int(match[1]), int(match[2]))


@contextmanager
def desk(dest: Path) -> Iterator[None]:
    """Lets one process of all that fill `dest` work within the block at a time; the others wait here."""
    with ExitStack() as held:
        while True:
            (dest / WORK).mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(_queued(dest / WORK / _DESK))
                break
            except FileNotFoundError:  # somebody finished, and removed the folder just now
                continue
        yield


@contextmanager
def _queued(path: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(locked(path, "busy"))
        except ValueError:
            print("waiting for another part, which looks for duplicates or finishes", file=sys.stderr, flush=True)
            held.enter_context(locked(path, "", wait=True))
        yield


@contextmanager
def holding(dest: Path, part: Part) -> Iterator[None]:
    """Holds a part of `dest`. To be entered at the desk.

    Raises ValueError if another process holds it, or parts of another number.
    """
    others = [other for other in _known(dest) if other.of != part.of and _is_held(dest, other)]
    if others and WHOLE in (part, others[0]):
        raise ValueError(f"another styleloom prepare is writing {dest}: let it end first")
    if others:
        raise ValueError(f"another styleloom prepare is writing {dest} as --part {others[0]}: use one number of parts")
    which = "" if part == WHOLE else f" as --part {part}"
    with locked(_lock(dest, part), f"another styleloom prepare is writing {dest}{which}: let it end first"):
        yield


def _lock(dest: Path, part: Part) -> Path:
    return dest / WORK / f"part-{part.number}-of-{part.of}.lock"


def _known(dest: Path) -> list[Part]:
    """The parts that were ever begun."""
    matches = [_PART_LOCK.fullmatch(path.name) for path in sorted((dest / WORK).glob("part-*.lock"))]
    return [Part(int(match[1]), int(match[2])) for match in matches if match]


def _is_held(dest: Path, part: Part) -> bool:
    try:
        with locked(_lock(dest, part), "held"):
            return False
    except ValueError:
        return True


def strange_file(dest: Path) -> Path | None:
    """A file in DEST/.prepare that no `styleloom prepare` can have put there before it had a plan, if there is one."""
    folder = dest / WORK
    names = list(folder.iterdir()) if folder.is_dir() else []
    ours = (
        path for path in names if path.name == _DESK or path.name.endswith(TEMPORARY) or _PART_LOCK.match(path.name)
    )
    return next(iter(sorted(set(names) - set(ours))), None)


def sweep(dest: Path, folders: Iterable[Path], part: Part) -> None:
    """Removes what killed processes of a part were writing. The caller holds the part. folders: of all sizes."""
    for folder in (*folders, dest / WORK):
        for leftover in folder.glob(f"*{TEMPORARY}"):
            match = _SHARD_FILE.match(leftover.name)
            if match and part.has(int(match[1])):
                leftover.unlink(missing_ok=True)


def clear(dest: Path, folders: Iterable[Path]) -> None:
    """Removes all that is no part of the finished data set `dest`, unless somebody is still at work on it."""
    if not (dest / WORK).exists():
        return
    with desk(dest):
        if any(_is_held(dest, part) for part in _known(dest)):
            return  # the last to end will do it
        for folder in folders:
            for leftover in folder.glob(f"*{TEMPORARY}"):
                leftover.unlink(missing_ok=True)
    # Not at the desk: network file systems keep a removed file that is open, and with it its folder.
    shutil.rmtree(dest / WORK, ignore_errors=True)
