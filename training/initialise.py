"""`init`: networks that begin with a snapshot's weights."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from . import checkpoint, schedule
from .config import Run
from .recipes.recipe import Recipe


def from_snapshot(
    run: Run, recipe: Recipe, average: nn.Module, size: tuple[int, int, int], tell: Callable[[str], None]
) -> None:
    """Takes the networks' weights from the snapshot `run.init`.

    Args:
        size: (width, height, channels) of the data set's images.
        tell: is given a line where it goes on otherwise than one might think.

    Raises ValueError, saying what to change, if they do not fit.
    """
    folder = checkpoint.find_snapshot(Path(run.init))
    about = checkpoint.read_snapshot(folder)
    its = (about["width"], about["height"], about["channels"], len(about["class_names"]))
    for what, a, b in zip(("width", "height", "channels", "classes"), its, (*size, recipe.c_dim), strict=True):
        if a != b:
            raise ValueError(
                f"the snapshot {folder} has {what} {a}, this run {b}: prepare the data set to match, or leave out "
                "--init"
            )
    check_growth(folder, about["run"], about["level"], run, recipe.levels)
    first, grown = schedule.stage(run, recipe.levels, 0).px, 4 << about["level"]
    if grown > first:
        tell(
            f"the snapshot has grown to {grown} px, and this run begins again at {first}: --growth.start {grown} goes "
            "on from there."
        )
    generator = checkpoint.read_tensors(folder / "generator.safetensors")
    checkpoint.fill(recipe.networks[recipe.averaged], generator, folder)
    checkpoint.fill(average, generator, folder)
    if (folder / "discriminator.safetensors").exists():
        discriminator = checkpoint.read_tensors(folder / "discriminator.safetensors")
        checkpoint.fill(recipe.networks[recipe.discriminator], discriminator, folder)


def check_growth(folder: Path, its: Run, level: int, mine: Run, levels: int) -> None:
    """Raises ValueError if a snapshot's networks are of another kind than the run's, or have not grown as far.

    Args:
        its: the run that the snapshot is of.
        level: how far it has grown, of as many levels.
    """
    if its.network.kind != mine.network.kind:
        raise ValueError(
            f"the snapshot {folder} is of kind {its.network.kind}, this run of {mine.network.kind}: take a preset of "
            "that kind, or leave out --init"
        )
    grown, first = 4 << level, schedule.stage(mine, levels, 0).px
    if grown < first:
        raise ValueError(
            f"the snapshot {folder} has grown to {grown} px only, and this run begins at {first}: give "
            f"--growth.start {grown}, or leave out --init"
        )
    if bool(its.growth.start) != bool(mine.growth.start) and mine.network.kind == "stylegan2":
        remedy = f"give --growth.start {grown}" if its.growth.start else "leave out --growth.start"
        raise ValueError(
            f"the discriminator of the snapshot {folder} is for networks that "
            f"{'grow' if its.growth.start else 'do not grow'}: {remedy}, or leave out --init"
        )
