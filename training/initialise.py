"""`init`: networks that begin with a snapshot's weights, as far as they fit."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checkpoint, schedule
from .config import Run
from .networks.growing import Growing, level_of, start_size
from .recipes.recipe import Recipe

LITTLE = 0.1  # share of the parameters below which a snapshot is refused
SHOWN = 12  # parts of the networks that are named in a line
NEW_LEVEL, MISSING = "a new level", "not there"

# By kind of network: the weight [out, in] that z goes into and, behind it, what stands for a label; and whether z is
# normalised for itself and the weight's gain is by the number of inputs.
LATENT_WEIGHTS = {
    "stylegan2": ("mapping.fc0.weight", True),
    "msg": ("mapping.fc0.weight", True),
    "stylegan1": ("mapping.fc0.weight", True),
    "progressive": ("synthesis.b4.input.weight", False),
    "r3gan": ("synthesis.b4.input.weight", False),
}


def from_snapshot(
    run: Run, recipe: Recipe, average: nn.Module, size: tuple[int, int, int], tell: Callable[[str], None]
) -> None:
    """Takes the networks' weights from the snapshot `run.init`.

    From one that is described as this run is, that is all of them. From others it is what has the same name and shape
    (a level's name follows from its size, whatever the largest one is), and `Fit.take_latent_weight`; the rest begins
    as it was initialised.

    Args:
        average: of the generator; becomes a copy of it.
        size: (width, height, channels) of the data set's images.
        tell: is given a line about what is taken, and about what one might not expect.

    Raises ValueError, saying what to change, if too little fits.
    """
    folder = checkpoint.find_snapshot(Path(run.init))
    about = checkpoint.read_snapshot(folder)
    check_kind(folder, about, run, size)
    check_growth(folder, about, run, recipe.levels)
    same, lines = alike(about, run, size, recipe.c_dim), []
    fits: dict[str, Fit] = {}
    for part, name in (("generator", recipe.averaged), ("discriminator", recipe.discriminator)):
        file = folder / f"{part}.safetensors"
        if part == "discriminator" and not file.exists():
            lines.append("It has no discriminator, so that begins anew.")
            continue
        tensors = checkpoint.read_tensors(file)
        if same:
            checkpoint.fill(recipe.networks[name], tensors, folder)
        fits[name] = Fit(recipe.networks[name], tensors, levels_of(about))
    if fits[recipe.averaged].take_latent_weight(run.network.kind, about["run"].network.z_dim, run.network.z_dim):
        then = "at first, labels change nothing" if recipe.c_dim else "what it made of labels is left out"
        lines.append(f"Of its layer for z and the label, the part for z is taken: {then}.")
    check_share(fits, folder)
    check_frozen(recipe.networks[recipe.discriminator], fits.get(recipe.discriminator), about["level"], folder)
    for its in fits.values():
        its.load()
    average.load_state_dict(recipe.networks[recipe.averaged].state_dict())
    for line in (*summary(fits, folder), *lines, *of_sizes(about, run, recipe.levels)):
        tell(line)


def levels_of(about: dict[str, Any]) -> int:
    """How many levels a snapshot's networks have."""
    return start_size(about["width"], about["height"])[2]


def alike(about: dict[str, Any], run: Run, size: tuple[int, int, int], c_dim: int) -> bool:
    """Whether a snapshot's networks have to be as a run's, by their descriptions."""
    its = about["run"]
    return (
        (about["width"], about["height"], about["channels"], len(about["class_names"])) == (*size, c_dim)
        and its.network == run.network
        and bool(its.growth.start) == bool(run.growth.start)
    )


def check_kind(folder: Path, about: dict[str, Any], run: Run, size: tuple[int, int, int]) -> None:
    """Raises ValueError if a snapshot's networks are of another kind than the run's, or their levels of other sizes."""
    its, mine = about["run"].network.kind, run.network.kind
    if its != mine:
        raise ValueError(
            f"the snapshot {folder} is of kind {its}, this run of {mine}: take a preset of that kind, or leave out "
            "--init"
        )
    width, height = about["width"], about["height"]
    (h, w, _), (own_h, own_w, _) = start_size(width, height), start_size(size[0], size[1])
    if (h, w) != (own_h, own_w):
        raise ValueError(
            f"the snapshot {folder} is of {width}x{height} px images, which grow from {w}x{h}, and this run's of "
            f"{size[0]}x{size[1]} px from {own_w}x{own_h}: prepare the data set at {w}x{h} times a power of 2, or "
            "leave out --init"
        )


def check_growth(folder: Path, about: dict[str, Any], mine: Run, levels: int) -> None:
    """Raises ValueError if a snapshot's networks have not grown as far as the run wants, or if its discriminator has no
    layer for the run's first images.

    Args:
        levels: of the run's networks.
    """
    full = 4 << (levels_of(about) - 1)
    grown, first = 4 << about["level"], schedule.stage(mine, levels, 0).px
    if grown < min(first, full):
        raise ValueError(
            f"the snapshot {folder} has grown to {grown} px only, and this run begins at {first}: give "
            f"--growth.start {grown}, or leave out --init"
        )
    did_not_grow = mine.network.kind == "stylegan2" and not about["run"].growth.start
    if did_not_grow and mine.growth.start and first < full:
        remedy = f"give --growth.start {full}" if full <= 4 << (levels - 1) else "leave out --growth.start"
        raise ValueError(
            f"the discriminator of the snapshot {folder} takes images of {full} px only, and this run begins at "
            f"{first}: {remedy}, or leave out --init"
        )


class Fit:
    """What of a network comes from a snapshot.

    Attributes:
        taken: tensors by the names of the network's state_dict.
        why: why another tensor of it is not taken, by name.

    Args:
        tensors: the snapshot's.
        levels: how many its network has.
    """

    def __init__(self, network: Growing, tensors: dict[str, Tensor], levels: int) -> None:
        self.network, self.tensors = network, tensors
        self.taken: dict[str, Tensor] = {}
        self.why: dict[str, str] = {}
        for name, x in network.state_dict().items():
            if name not in tensors:
                self.why[name] = NEW_LEVEL if (level_of(name) or 0) >= levels else MISSING
            elif tensors[name].shape != x.shape:
                self.why[name] = f"{tuple(tensors[name].shape)} there, {tuple(x.shape)} here"
            else:
                self.taken[name] = tensors[name]

    def take_latent_weight(self, kind: str, z_dim: int, own_z_dim: int) -> bool:
        """Takes the part for z of the weight that z goes into, where it does not fit because labels come in or go.
        Returns whether that is so.

        What stands for a label gets the weight 0. So the images are at first those of the unconditional snapshot,
        whatever the label (of the Progressive GAN nearly so: the label takes a little of z's norm). The weights get a
        gradient at once all the same, and once they are not 0, so does the label's embedding.
        """
        name, scaled = LATENT_WEIGHTS[kind]
        if name not in self.why or name not in self.tensors or z_dim != own_z_dim:
            return False
        its, own = self.tensors[name], self.network.state_dict()[name]
        if len(its) != len(own) or min(its.shape[1], own.shape[1]) < z_dim:
            return False
        x = its.new_zeros(own.shape)
        x[:, :z_dim] = its[:, :z_dim] * (math.sqrt(own.shape[1] / its.shape[1]) if scaled else 1.0)
        self.taken[name] = x
        del self.why[name]
        return True

    def load(self) -> None:
        """Changes the network."""
        self.network.load_state_dict(self.taken, strict=False)


def check_share(fits: dict[str, Fit], folder: Path) -> None:
    """Raises ValueError if nothing or very little of the networks fits."""
    sizes = {(a, name): p.numel() for a, its in fits.items() for name, p in its.network.named_parameters()}
    share = sum(n for (a, name), n in sizes.items() if name in fits[a].taken) / sum(sizes.values())
    if share < LITTLE:
        raise ValueError(
            f"only {share:.1%} of this run's parameters fit the snapshot {folder} ({not_taken(fits)}): give the "
            "--network.* options that it was trained with, or leave out --init"
        )


def check_frozen(discriminator: Growing, its: Fit | None, level: int, folder: Path) -> None:
    """Raises ValueError if levels are frozen that are not all from the snapshot, or had not been trained there.

    Args:
        its: of the discriminator; None if the snapshot has none.
        level: that it had grown to.
    """
    frozen = [name for name, _ in discriminator.named_parameters() if discriminator.is_frozen(name)]
    new = [name for name in frozen if its is None or name in its.why or (level_of(name) or 0) > level]
    if new:
        raise ValueError(
            f"--freeze-d {discriminator.frozen} would keep what the snapshot {folder} does not have or has not "
            f"trained: {listed(parts(new, frozen))}. Leave it out, or take a snapshot of such images at this size"
        )


def summary(fits: dict[str, Fit], folder: Path) -> list[str]:
    """What was taken and what was not, in up to three lines."""
    taken = sum(len(its.taken) for its in fits.values())
    total = taken + sum(len(its.why) for its in fits.values())
    lines = [f"took {taken} of {total} tensors from the snapshot {folder}."]
    if taken < total:
        lines.append(f"Not taken: {not_taken(fits)}.")
    left = [
        f"{a}.{part}"
        for a, its in fits.items()
        for part in parts([name for name in its.tensors if name not in its.network.state_dict()], its.tensors)
    ]
    if left:
        lines.append(f"Left there: {listed(left)}.")
    return lines


def not_taken(fits: dict[str, Fit]) -> str:
    """The parts of networks that are not taken, with the reasons."""
    out = []
    for a, its in fits.items():
        for part in parts(its.why, its.network.state_dict()):
            reasons = {name[len(part) + 1 :]: why for name, why in its.why.items() if within(part, name)}
            example, reason = next(iter(reasons.items()))
            out.append(f"{a}.{part} ({reason if len({*reasons.values()}) == 1 else f'{example} {reason}, ...'})")
    return listed(out)


def parts(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """The modules of which all tensors are among the `names`, by the shortest name; otherwise single tensors. Those of
    no level come first, then the lowest level.

    Args:
        every: the names of all tensors that there are.
    """
    names, every, out = set(names), list(every), []
    for name in every:
        if name in names and not any(within(part, name) for part in out):
            steps = name.split(".")
            prefixes = [".".join(steps[:n]) for n in range(1, len(steps) + 1)]
            out.append(next(p for p in prefixes if all(each in names for each in every if within(p, each))))
    return sorted(out, key=lambda part: -1 if (level := level_of(f"{part}.")) is None else level)


def within(part: str, name: str) -> bool:
    """Whether a tensor is (of) a part."""
    return f"{name}.".startswith(f"{part}.")


def listed(texts: list[str]) -> str:
    """All of them, or the first and how many more there are."""
    rest = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def of_sizes(about: dict[str, Any], run: Run, levels: int) -> list[str]:
    """A line if a run could go on at another size than it does, or let new levels fade in."""
    full, grown, first = 4 << (levels - 1), 4 << about["level"], schedule.stage(run, levels, 0).px
    known = min(grown, full)
    if known > first:
        return [
            f"the snapshot has grown to {grown} px, and this run begins again at {first}: --growth.start {known} goes "
            "on from there."
        ]
    grows = run.network.kind != "msg" and run.recipe.kind != "r3gan"
    if known < first and grows:
        return [f"--growth.start {known} would let what is above {known} px fade in."]
    return []
