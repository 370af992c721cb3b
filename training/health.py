"""What goes wrong with trainings: rules that tell it from the statistics of ticks, and the way back to before it.

All that the rules know is in the lines of `stats.jsonl`, from which a run that goes on knows it again.
"""

import bisect
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..datasets.manifest import write_atomically
from . import checkpoint
from .distributed import Team

Line = Mapping[str, Any]
INTERRUPTS = ("roll-back", "stop")
FEW = 10  # ticks, of whose gradients a median would say little
SIDE = 16  # px, to which images are reduced to be compared
CHUNK = 16  # images at once


class Finding(NamedTuple):
    """Something that has gone wrong."""

    rule: str
    action: str
    """What the run is to do about it: warn, roll-back or stop."""
    message: str
    """One line for people: what is seen, what it likely means, what to change."""
    new: bool = True
    """It has not been found at the tick before."""


class Trouble(ValueError):  # noqa: N818 (what to do about it is up to the run)
    """Training is not to go on as it does."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


# Rules


class Rule:
    """One thing that may go wrong. It sees the line of every tick, in their order.

    Args:
        action: ignore, warn, roll-back or stop.
        limit: of what it measures.
        gentler: the change of the run's fields that makes its training calmer, in words.
    """

    name: ClassVar[str]

    def __init__(self, action: str, limit: float, gentler: str) -> None:
        self.action, self.limit = action, limit
        self.anew = f"Begin anew (--init from a snapshot before it) with {gentler}."

    def see(self, line: Line) -> tuple[str, str] | None:
        """What is seen, and what it means and calls for; None if all is well, or the run has no such statistic."""
        raise NotImplementedError


class Explosion(Rule):
    """A phase's gradient norm is many times its median over the ticks before, at the same size of images."""

    name = "explosion"

    def __init__(self, action: str, limit: float, gentler: str) -> None:
        super().__init__(action, limit, gentler)
        self.px: Any = None
        self.norms: dict[str, list[float]] = {}  # by phase, sorted

    def see(self, line: Line) -> tuple[str, str] | None:
        if line.get("px") != self.px:
            self.px, self.norms = line.get("px"), {}
        worst, seen = self.limit, ""
        for name, norm in line.items():
            if not name.startswith("grad_norm/") or norm is None:
                continue
            norms = self.norms.setdefault(name, [])
            median = norms[len(norms) // 2] if len(norms) >= FEW else 0.0
            if median and norm > worst * median:
                worst = norm / median
                seen = f"the gradient norm of phase {name[10:]} is {norm:.3g}, {worst:.3g} times its median so far"
            bisect.insort(norms, norm)
        if not seen:
            return None
        return f"{seen} (health.explosion_factor {self.limit:g})", f"training is about to diverge. {self.anew}"


class Gap(Rule):
    """The mean scores of real and of generated images are far apart. For scores that are logits: those of a Wasserstein
    critic are distances, of any size."""

    name = "gap"

    def see(self, line: Line) -> tuple[str, str] | None:
        if not {"scores/real", "scores/fake"} <= line.keys():
            return None
        real, fake = line["scores/real"], line["scores/fake"]
        if None in (real, fake):
            return "the scores are not finite", f"training has diverged. {self.anew}"
        if abs(real - fake) <= self.limit:
            return None
        side = "above" if real > fake else "below"
        return (
            f"the reals' mean score is {abs(real - fake):.3g} {side} that of generated images (health.gap_limit "
            f"{self.limit:g})",
            f"one network has left the other behind. {self.anew}",
        )


class Memorised(Rule):
    """The discriminator is sure of nearly every real image: the mean sign r_t of its scores is near 1 (Karras et al.
    2020, StyleGAN2-ADA, eq. 1). For scores whose sign is a verdict."""

    name = "memorised"

    def see(self, line: Line) -> tuple[str, str] | None:
        sign = line.get("signs/real")
        if sign is None or sign <= self.limit:
            return None
        return (
            f"the mean sign of the reals' scores is {sign:.3f} (health.memorised_limit {self.limit:g})",
            "the discriminator knows the real images by heart, and the generator learns little from it. More images or "
            f"--augment.kind ada help. {self.anew}",
        )


class Collapse(Rule):
    """Generated images are much more alike than real ones (`Diversity`)."""

    name = "collapse"

    def see(self, line: Line) -> tuple[str, str] | None:
        diversity = line.get("diversity")
        if diversity is None or diversity >= self.limit:
            return None
        return (
            f"generated images differ from one another {diversity:.2g} times as much as real ones do "
            f"(health.collapse_limit {self.limit:g})",
            f"the generator draws nearly the same from all latents. {self.anew}",
        )


class Saturation(Rule):
    """The adaptive augmentation's p has been at its limit during a whole tick."""

    name = "saturation"

    def see(self, line: Line) -> tuple[str, str] | None:
        p = line.get("augment/p")
        if p is None or p < self.limit:
            return None
        return (
            f"the augmentation's p is {p:g} and can follow no further",
            "the discriminator learns the real images by heart all the same. More images help, or fewer channels. "
            f"{self.anew}",
        )


class Monitor:
    """Watches a run's ticks.

    Args:
        rules: those that have a meaning for the run.
        ticks: in a row for which one has to hold until it is found.
        nonfinite: the action of the one rule that is not of ticks, but of steps that are left out because gradients are
            not finite.
        lines: of the ticks so far.
    """

    def __init__(self, rules: Iterable[Rule], ticks: int, nonfinite: str, lines: Iterable[Line] = ()) -> None:
        self.rules = [rule for rule in rules if rule.action != "ignore"]
        self.ticks, self.nonfinite = ticks, nonfinite
        self.held = {rule.name: 0 for rule in self.rules}  # ticks in a row
        self.well = 0
        """Images shown at the last tick at which all was well, for the rules that interrupt a run; 0: at its start."""
        for line in lines:
            self.see(line)

    def see(self, line: Line) -> list[Finding]:
        """What is found at a tick. Its line has the images shown so far as "nimg", and as "skipped", if any, the steps
        that a phase has left out in a row until now."""
        line = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in line.items()}
        found, well = [], not (self.nonfinite in INTERRUPTS and line.get("skipped"))
        for rule in self.rules:
            its = rule.see(line)
            held = self.held[rule.name] = self.held[rule.name] + 1 if its else 0
            if not its:
                continue
            well = well and rule.action not in INTERRUPTS
            if held >= self.ticks:
                when = f"in {held} tick{'s in a row' if held > 1 else ''} up to {line['nimg'] / 1000:g} kimg"
                message = f"{its[0]}, {when}: {its[1]}"
                found.append(Finding(rule.name, rule.action, message, new=held == self.ticks))
        if well:
            self.well = line["nimg"]
        return found


def interrupting(found: list[Finding]) -> Finding | None:
    """The one that a run has to heed at once; one that stops it before others."""
    order = [x for action in reversed(INTERRUPTS) for x in found if x.action == action]
    return order[0] if order else None


def not_finite(phase: str, times: int, nimg: int, action: str, gentler: str) -> Finding:
    """That a phase has left out so many steps in a row."""
    message = (
        f"the gradients of phase {phase} were not finite {times} times in a row, at {nimg} images: training has "
        f"diverged. Begin anew (--init from a snapshot before it) with {gentler}."
    )
    return Finding("nonfinite", action, message)


# Diversity


class Diversity:
    """How much generated images differ from one another, as a multiple of what as many real ones do.

    The measure is the root mean square distance of two images, reduced to 16x16 px by averaging. It sees whether all
    latents give nearly the same picture, or pictures of nearly the same colours and layout; it does not see repeated
    detail, copies of training images, or a few kinds of pictures that are far apart.

    Args:
        n: images of either kind.
        fakes, reals: uint8 [n, C, H, W] at some positions; `reals` may give None, where a signal says not to wait for
            them any longer.
    """

    def __init__(
        self, n: int, team: Team, fakes: Callable[[range], Tensor], reals: Callable[[range], Tensor | None]
    ) -> None:
        self.n, self.team, self.fakes, self.reals = n, team, fakes, reals
        self.among_reals: dict[int, float] = {}  # by level: of the last one

    def measure(self, level: int) -> dict[str, float]:
        """{"diversity": that of the images at a level}; {} if the reals did not come, or are all the same. To be called
        by all processes."""
        if level not in self.among_reals:
            spread = self._spread("looking at reals", self.reals)
            self.among_reals = {} if spread is None else {level: spread}
        among_reals = self.among_reals.get(level)
        among_fakes = self._spread("looking at fakes", self.fakes) if among_reals else None
        return {"diversity": among_fakes / among_reals} if among_reals and among_fakes is not None else {}

    def _spread(self, what: str, images: Callable[[range], Tensor | None]) -> float | None:
        """Of the first n of some images, of which each process looks at its share."""
        mine: dict[str, Tensor] = {}
        for positions in chunks(self.n, self.team.rank, self.team.world):
            self.team.place.at(what)
            its = images(positions)
            if its is None:
                mine["lacking"] = torch.ones([])
                break
            mine["moments"] = moments(its) + mine["moments"] if "moments" in mine else moments(its)
        sums = self.team.sum_named(mine)
        return None if "lacking" in sums else root_mean_square_distance(sums["moments"])


def chunks(n: int, rank: int, world: int) -> Iterator[range]:
    """The positions 0 to n - 1 that are a process's, at most `CHUNK` at once."""
    step = CHUNK * world
    return filter(len, (range(start + rank, min(start + step, n), world) for start in range(0, n, step)))


def moments(images: Tensor) -> Tensor:
    """fp64 [2 + F] of images uint8 [n, C, H, W], each reduced to F numbers x: n, the sum of |x|^2, the sum of x."""
    h, w = (min(side, SIDE) for side in images.shape[2:])
    x = torch.stack([adaptive_avg_pool2d(image.float(), (h, w)) for image in images]).double().flatten(1)
    return torch.cat([torch.tensor([len(x), x.square().sum()], dtype=x.dtype), x.sum(dim=0)])


def root_mean_square_distance(moments: Tensor) -> float:
    """Of two different ones of n >= 2 images, from the sum of their `moments`: the mean squared distance is twice their
    variance, 2 / (n - 1) * (sum |x|^2 - |sum x|^2 / n)."""
    n, squares, total = moments[0], moments[1], moments[2:]
    return (2 / (n - 1) * (squares - total.square().sum() / n)).clamp(min=0).sqrt().item()


# Going back


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of one a line, such as `stats.jsonl`; none if there is no file.

    Raises ValueError if it is damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): put back a good copy, or begin with another --out") from None


def read_rollbacks(folder: Path) -> list[dict[str, Any]]:
    """The lines of `rollbacks.jsonl` in a run's folder, one for each time that the run has gone back."""
    return read_lines(folder / "rollbacks.jsonl")


def go_back(folder: Path, well: int, nimg: int, finding: Finding) -> tuple[int, int]:
    """Takes a run's folder back to the newest checkpoint at or before `well` images, or to the start if there is none,
    and notes it in `rollbacks.jsonl`. Checkpoints and snapshots after it get other names, and nothing deletes them. For
    one process, while nothing is being saved.

    Killed at any point, the run comes here once more: until the last act, which is to write the line, it goes on from a
    checkpoint with the draws that led it here.

    Args:
        nimg: images shown until the trouble.

    Returns:
        (images at that checkpoint, how often the run has now gone back).
    """
    before = read_rollbacks(folder)
    number = len(before) + 1
    there = map(nimg_of, checkpoint.complete(folder / "checkpoints"))
    to = max((each for each in there if each <= well), default=0)
    for kind in ("checkpoints", "snapshots"):
        for path in reversed(checkpoint.complete(folder / kind)):  # those left are what a run could have left
            if nimg_of(path) > to:
                names = (f"{path.name}.diverged-{number}{f'-{n}' if n else ''}" for n in itertools.count())
                path.rename(next(new for name in names if not (new := path.with_name(name)).exists()))
    checkpoint.mark_best(folder / "snapshots")
    line = {"from": nimg, "to": to, "rule": finding.rule, "message": finding.message, "rollbacks": number}
    lines = [json.dumps(each) + "\n" for each in (*before, line)]
    write_atomically(folder / "rollbacks.jsonl", "".join(lines).encode())
    return to, number


def nimg_of(folder: Path) -> int:
    """Images shown until a checkpoint or snapshot."""
    return int(folder.name.removeprefix("nimg-"))
