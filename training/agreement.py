"""Whether the processes of a training agree: on their settings, on the code they run, and bit by bit on what they
hold."""

import functools
import hashlib
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Gather = Callable[[list[Any]], list[Any]]  # the concatenation over all processes of lists

# Settings that may differ between nodes: paths and what a node has.
PLACES = {"out", "init", "data.path", "data.cache", "data.cache_gb", "data.workers"}

_FOLDERS = ("training", "ops", "datasets", "scripts")
_NAMED = 3  # fields, values, hosts or tensors that a message lists
_LONG = 60  # characters of a value that a message shows
_CHUNK = 2**18  # elements that are hashed at once: their 64-bit products stay in a CPU's cache


@functools.cache
def code_version() -> str:
    """Ten hexadecimal digits that follow from the names and contents of styleloom's source files."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    files = [file for folder in _FOLDERS for file in (root / folder).rglob("*.py")]
    files += (root / "ops" / "csrc").iterdir()
    # Not what editors leave, whose names begin with a dot.
    named = {file.relative_to(root).as_posix(): file for file in files if file.is_file() and file.name[0] != "."}
    for name, file in sorted(named.items()):
        digest.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()[:10]


def check_agreement(rank: int, gather: Gather, settings: dict[str, Any], versions: dict[str, str]) -> None:
    """Checks that all processes run the same code with the same settings. To be called by all.

    Args:
        rank: of this process.
        gather: see `Gather`.
        settings: JSON values by dotted name; those in `PLACES` may differ.
        versions: of what they run: {"styleloom": "0.1.0 (3f2a90c1d4)", "torch": "2.11.0", ...}.

    Raises:
        ValueError: they differ; on all processes, with the same text.
    """
    compared = {name: value for name, value in settings.items() if name not in PLACES}
    told = sorted(gather([(rank, socket.gethostname(), versions, compared)]), key=lambda its: its[0])
    hosts = [host for _, host, _, _ in told]
    if differences := _differences(hosts, [its for _, _, its, _ in told]):
        raise ValueError(
            f"the processes run different code: {differences}.\nInstall the same versions on all nodes, in the "
            "environment that each process runs in."
        )
    if differences := _differences(hosts, [its for _, _, _, its in told]):
        raise ValueError(
            f"the processes were started with different settings: {differences}.\nStart all with the same command."
        )


def _differences(hosts: list[str], told: Sequence[dict[str, Any]]) -> str:
    """The fields in which processes differ, and who has which value."""
    names = dict.fromkeys(name for its in told for name in its)
    wrong = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, its in enumerate(told):
            ranks.setdefault(json.dumps(its[name], sort_keys=True) if name in its else "missing", []).append(rank)
        if len(ranks) > 1:
            values = [f"{_short(value)} on {_who(who, hosts)}" for value, who in ranks.items()]
            wrong.append(f"{name} is {_listed(values)}")
    return _listed(wrong, "; ")


def _short(value: str) -> str:
    value = value.strip('"')
    return value if len(value) <= _LONG else value[: _LONG - 3] + "..."


def _who(ranks: list[int], hosts: list[str]) -> str:
    """ "ranks 0-3, 8 (a, b)" """
    where = _listed(list(dict.fromkeys(hosts[rank] for rank in ranks)))
    return f"rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)} ({where})"


def _ranges(ranks: Iterable[int]) -> str:
    """ "0-3, 8" of ascending numbers."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return _listed(["-".join(map(str, run)) for run in runs])


def _listed(items: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return between.join(items[:_NAMED]) + more


def fingerprints(tensors: dict[str, Tensor]) -> Tensor:
    """A number for each tensor, from the bits of all its elements in their logical order, whatever the layout.

    It is the sum of bits * multiplier modulo 2**64 over the elements. The multipliers are odd, so that whatever changes
    in one element changes the number; they are random, so that anything else leaves it alone with a probability of
    2**-32 at most. (Halves of 64-bit elements count as elements.)

    Args:
        tensors: real numbers or bool, of any shapes, on any devices.

    Returns:
        int64 [n], on the CPU; calculated where the tensors are.
    """
    ours = [_fingerprint(x.detach()) for x in tensors.values()]
    out = torch.zeros(len(ours), dtype=torch.int64)
    for device in {each.device for each in ours}:  # one transfer from each
        at = [i for i, each in enumerate(ours) if each.device == device]
        out[at] = torch.stack([ours[i] for i in at]).cpu()
    return out


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # by bytes of an element


def _fingerprint(x: Tensor) -> Tensor:
    """int64 [] on the tensor's device."""
    bits = x.reshape(-1).view(_BITS[x.element_size()])
    within = _multipliers(x.device)
    total = torch.zeros([], dtype=torch.int64, device=x.device)
    for part, chunk in enumerate(bits.split(_CHUNK)):
        total += (chunk * within[: len(chunk)]).sum() * _odd(part)
    return total


@functools.lru_cache(maxsize=16)
def _multipliers(device: torch.device) -> Tensor:
    """int64 [_CHUNK] on the device: odd, otherwise random."""
    return torch.from_numpy(np.random.Philox(key=1).random_raw(_CHUNK).view(np.int64)).to(device) | 1


@functools.cache
def _odd(part: int) -> int:
    """A chunk's own multiplier, odd and otherwise random, of int64."""
    return int(np.random.Philox(key=2, counter=part).random_raw(1).view(np.int64)[0]) | 1


def check_replicas(rank: int, gather: Gather, tensors: dict[str, Tensor], nimg: int) -> None:
    """Checks that all processes hold the same tensors, bit by bit. To be called by all.

    Args:
        rank: of this process.
        gather: see `Gather`; it gets 64 characters of each process where all is well.
        tensors: as for `fingerprints`, those that are replicas.
        nimg: images shown so far, for the message.

    Raises:
        ValueError: they differ; on all processes, with the same text.
    """
    kinds = [f"{name} {x.dtype} {list(x.shape)}" for name, x in tensors.items()]
    mine = dict(zip(kinds, fingerprints(tensors).tolist(), strict=True))
    if len(set(gather([hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()]))) == 1:
        return
    told = sorted(gather([(rank, socket.gethostname(), mine)]), key=lambda its: its[0])
    hosts = [host for _, host, _ in told]
    wrong = []
    for kind in dict.fromkeys(kind for _, _, its in told for kind in its):
        values = [its.get(kind) for _, _, its in told]
        usual = Counter(values).most_common(1)[0][0]  # of equally many, rank 0's
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            wrong.append(f"{kind.split(' ')[0]} on {_who(odd, hosts)}")
    raise ValueError(
        f"the networks are not the same on all {len(told)} processes any more, at {nimg / 1000:g} kimg; altered: "
        f"{_listed(wrong)}.\n"
        "Memory, a device or the network has altered something, so training stops here; the same command goes on from "
        "the last checkpoint."
    )
