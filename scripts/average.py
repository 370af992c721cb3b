"""`styleloom average RUN --sigma-rel 0.1 OUT`"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from styleloom.scripts.cli import parse, run
from styleloom.training import phema, schedule
from styleloom.training.checkpoint import (
    complete,
    load_generator,
    read_snapshot,
    read_tensors,
    write_tensors,
)
from styleloom.training.networks.growing import start_size
from styleloom.training.whole import whole_new_folder

POOR = 0.05  # relative error of a fit above which it is warned of
EARLY = 0.01  # share of an average before its highest level trained, above which it is told of


@dataclass(frozen=True)
class Arguments:
    """Makes averages of other widths of a run's generator, from those in its snapshots, without training again.

    An average's relative width is the standard deviation of its weights over time, as a share of the images shown so
    far: 0.05 looks back over about a tenth of the training, 0.2 over half of it."""

    run: tyro.conf.Positional[Path]
    """A run's folder."""
    out: tyro.conf.Positional[Path]
    """The new snapshot's folder; with several widths, a folder for sigma-0.050, sigma-0.100, ..."""
    sigma_rel: str
    """The relative width, or several: 0.05,0.1,0.15."""
    nimg: int | None = None
    """The average as it was after so many images, of which there has to be a snapshot; by default at the newest one."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "average")
    widths = parse_widths(options.sigma_rel)
    snapshots = stored(options.run, options.nimg)
    target, have = snapshots[-1], [(width, about["nimg"]) for _, about in snapshots for width in about["phema"]]
    if options.out.exists():
        raise ValueError(f"{options.out} is there already: give another folder, or delete it")
    now = target[1]["nimg"]
    fits = {width: phema.coefficients(have, (width, now)) for width in widths}
    sums = combine(snapshots, {width: weights for width, (weights, _) in fits.items()})
    for width, (weights, error) in fits.items():
        folder = options.out if len(widths) == 1 else options.out / f"sigma-{width:.3f}"
        write(folder, target, width, error, sums[width])
        used = len({nimg for (_, nimg), weight in zip(have, weights, strict=True) if weight})
        print(
            f"{folder}: sigma_rel {width:g} at {now / 1000:g} kimg, from {used} of {len(snapshots)} snapshots; "
            f"relative error of the fit {error:.1e}."
        )
        for note in notes(width, error, target[1], have):
            print(f"Note: {note}")
    return 0


def parse_widths(text: str) -> list[float]:
    """ "0.05,0.1" -> [0.05, 0.1]. Raises ValueError if they are not widths, or have the same name."""
    try:
        widths = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--sigma-rel {text!r}: give numbers such as 0.1 or 0.05,0.1,0.15") from None
    for width in widths:
        try:
            phema.gamma_of(width)
        except ValueError as error:
            raise ValueError(f"--sigma-rel {text!r}: {error}") from None
    if len({phema.name(width) for width in widths}) < len(widths):
        raise ValueError(f"--sigma-rel {text!r}: widths have to differ in the first three decimals")
    return widths


def stored(folder: Path, nimg: int | None) -> list[tuple[Path, dict[str, Any]]]:
    """(path, snapshot.json) of a run's snapshots with averages in them, oldest first, up to `nimg` or the newest.

    Raises ValueError if there are none, or none at `nimg`.
    """
    paths = complete(folder / "snapshots")
    if not paths:
        raise ValueError(f"there is no snapshot in {folder}: name the folder of a run that has some")
    read = [(path, read_snapshot(path)) for path in paths]
    whole = [(path, about) for path, about in read if about["phema"] and about["nimg"] > 0]
    if not whole:
        raise ValueError(
            f"the snapshots in {folder} hold no averages to make others of: they are kept by runs with ema.sigma_rel, "
            "which is so unless it was emptied, or an older version trained it"
        )
    if nimg is None:
        return whole
    if nimg not in [about["nimg"] for _, about in whole]:
        nearest = min((about["nimg"] for _, about in whole), key=lambda each: abs(each - nimg))
        raise ValueError(f"--nimg {nimg}: no snapshot with averages is of that; the nearest one is of {nearest}")
    return [(path, about) for path, about in whole if about["nimg"] <= nimg]


def combine(
    snapshots: list[tuple[Path, dict[str, Any]]], weights: dict[float, np.ndarray]
) -> dict[float, dict[str, Tensor]]:
    """Weighted sums of the averages in snapshots, in fp64: all widths at once, of one file after the other.

    Args:
        weights: by the width that is wanted, fp64 [n], in the order of the snapshots and of the widths in each.

    Raises ValueError if a file is missing or has other parameters than the newest snapshot's.
    """
    files = [(path / f"{phema.name(width)}.safetensors") for path, about in snapshots for width in about["phema"]]
    expected = {name: x.shape for name, x in read_tensors(files[-1]).items()}
    sums = {
        width: {name: torch.zeros(shape, dtype=torch.float64) for name, shape in expected.items()} for width in weights
    }
    for i, file in enumerate(tqdm(files, unit="file", desc="averaging", disable=None)):
        shares = {width: float(each[i]) for width, each in weights.items() if each[i]}
        tensors = read_tensors(file) if shares else {}
        if shares and {name: x.shape for name, x in tensors.items()} != expected:
            raise ValueError(f"{file} has other parameters than {files[-1]}: they are not of the same run")
        for width, share in shares.items():
            for name, x in tensors.items():
                sums[width][name].add_(x, alpha=share)
    return sums


def write(
    folder: Path, target: tuple[Path, dict[str, Any]], width: float, error: float, average: dict[str, Tensor]
) -> None:
    """Writes a snapshot: that at the same time, but for the generator's parameters, which are the average's.

    Raises ValueError if the average is not of that generator, and OSError.
    """
    path, _ = target
    generator, _ = load_generator(path)
    own = {name: p.shape for name, p in generator.named_parameters()}
    if own != {name: x.shape for name, x in average.items()}:
        raise ValueError(f"the averages in {path} are not of the generator there: the snapshot is damaged")
    state = generator.state_dict()
    state |= {name: x.to(state[name].dtype) for name, x in average.items()}
    about = json.loads((path / "snapshot.json").read_text())
    about |= {"sigma_rel": width, "fit_error": error, "phema": [], "score": None, "score_name": "", "at_stop": False}
    with whole_new_folder(folder) as temporary:
        write_tensors(temporary / "generator.safetensors", state)
        if (path / "discriminator.safetensors").exists():
            shutil.copyfile(path / "discriminator.safetensors", temporary / "discriminator.safetensors")
        (temporary / "snapshot.json").write_text(json.dumps(about, indent=1) + "\n")


def notes(width: float, error: float, about: dict[str, Any], have: list[tuple[float, int]]) -> list[str]:
    """What someone should know who uses an average."""
    out = []
    if error > POOR:
        stored_widths = ", ".join(f"{each:g}" for each in sorted({each for each, _ in have}))
        out.append(
            f"that is much: what these {len({nimg for _, nimg in have})} snapshots hold, of widths {stored_widths}, "
            f"makes no good average of width {width:g}. More snapshots (train's --snapshot-kimg smaller, "
            "--keep-snapshots 0) make a better one, and so does a width nearer to those."
        )
    early = share_before(width, about)
    if early > EARLY:
        out.append(
            f"{early:.0%} of this average is of before the {4 << about['level']} px level trained: a smaller width has "
            "less of that."
        )
    return out


def share_before(width: float, about: dict[str, Any]) -> float:
    """Of networks that grow, how much of an average lies before the highest level came to work; 0 of others.

    A level that is not at work yet keeps the values it was initialised with, in the averages too, so snapshots from
    then are combined as all others: the result is what would have been tracked, which has that much of those values.
    """
    stages = schedule.stages(about["run"], start_size(about["width"], about["height"])[2], 0)
    begin = next(nimg for nimg, stage in stages if stage.level == about["level"])
    return (begin / about["nimg"]) ** (phema.gamma_of(width) + 1)


if __name__ == "__main__":
    run(main, "average")
