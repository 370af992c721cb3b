"""`styleloom mix SNAPSHOT --rows 0-3 --cols 10-15 --styles coarse --out FILE.png`"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from torch import Tensor
from tqdm import tqdm

from styleloom.scripts.cli import parse, run
from styleloom.scripts.generate import (
    Drawing,
    check_psis,
    one_class,
    open_generator,
    parse_seeds,
    render,
    to_w,
    truncated,
    z_of,
)
from styleloom.training.latents import mix, parse_layers
from styleloom.training.networks.growing import Generator
from styleloom.training.sheets import picture, table
from styleloom.training.whole import whole_file


@dataclass(frozen=True, kw_only=True)
class Arguments(Drawing):
    """Draws a style-mixing table: each row's image with the styles of each column's image in some of its layers. The
    first column and the first row show those images themselves."""

    out: Path
    """The table as a .png file, or a folder for the table and each of its images."""
    rows: str = "0-3"
    """Seeds of the images that are changed: numbers and ranges."""
    cols: str = "10-15"
    """Seeds of the images that lend their styles."""
    styles: str = "coarse"
    """The layers whose styles are lent: coarse (those of 4 and 8 px, which make pose and shape), middle (16 and 32 px),
    fine (64 px and more: colours and textures), all, none, or numbers and ranges such as 0-6."""
    truncation: float = 0.7
    """truncation_psi of both: 1 is the full variety, less is more typical and cleaner."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Class number, for a conditional network; by default seed modulo the number of classes."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "mix")
    rows, cols = parse_seeds(options.rows, "--rows"), parse_seeds(options.cols, "--cols")
    if options.out.suffix.lower() not in ("", ".png"):
        raise ValueError(f"--out {options.out}: name a .png file, or a folder (a name without a dot)")
    generator, about, folder = open_generator(options)
    if not generator.has_w:
        raise ValueError("this kind of generator has no w, so there are no styles to mix")
    check_psis(generator, [options.truncation])
    layers = parse_layers(options.styles, generator.num_ws)
    classes = one_class(options.class_, about["class_names"])
    sources = [latents(generator, seeds, classes, about["class_names"], options) for seeds in (rows, cols)]
    images: dict[tuple[int, int], np.ndarray] = {}
    total = (1 + len(rows)) * (1 + len(cols)) - 1
    with tqdm(total=total, unit="img", desc="mixing", disable=total < 2 * options.batch) as bar:
        for places, x in drawn(generator, rows, cols, sources[0], sources[1], layers, options):
            images |= zip(places, x.numpy(), strict=True)
            bar.update(len(places))
    cells = [[images.get((i, j)) for j in range(1 + len(cols))] for i in range(1 + len(rows))]
    names = ["", *(f"seed {seed}" for seed in rows)], ["", *(f"seed {seed}" for seed in cols)]
    file = options.out if options.out.suffix else options.out / "table.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        table(cells, *names, sources=True).save(temporary, "PNG")
    if not options.out.suffix:
        for place, image in images.items():
            picture(image).save(options.out / f"{file_name(place, rows, cols)}.png")
    said = ", ".join(map(str, layers)) or "none"
    print(f"{len(rows)} x {len(cols)} mixtures of {folder}, with the columns' styles in the layers {said} of "
          f"{generator.num_ws}, are in {options.out}.")  # fmt: skip
    return 0


def latents(G: Generator, seeds: list[int], class_: int | None, class_names: list[str], options: Arguments) -> Tensor:
    """ws [N, num_ws, w_dim] of the seeds, truncated."""
    classes = [seed % len(class_names) if class_ is None else class_ for seed in seeds] if class_names else None
    device = next(G.parameters()).device
    ws = to_w(G, z_of(seeds, G.z_dim).to(device), classes)
    return truncated(G, ws, options.truncation, options.truncation_cutoff)


def drawn(
    G: Generator, rows: list[int], cols: list[int], a: Tensor, b: Tensor, layers: list[int], options: Arguments
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """(places in the table, their images uint8 [n, C, H, W]), some at a time. Row 0 and column 0 are the sources.
    Random noise follows from the row's seed, in row 0 from the column's.

    Args:
        a, b: ws of the rows and of the columns.
    """
    places = [(i, j) for i in range(1 + len(rows)) for j in range(1 + len(cols)) if i or j]
    for start in range(0, len(places), options.batch):
        some = places[start : start + options.batch]
        first = a[[max(i - 1, 0) for i, _ in some]]
        second = b[[max(j - 1, 0) for _, j in some]]
        ws = mix(first, second, layers)
        for k, (i, j) in enumerate(some):
            if i == 0 or j == 0:
                ws[k] = second[k] if i == 0 else first[k]
        seeds = [rows[i - 1] if i else cols[j - 1] for i, j in some]
        yield some, render(G, ws, options.noise, seeds)


def file_name(place: tuple[int, int], rows: list[int], cols: list[int]) -> str:
    """Such as row0003-col0010; row0003 and col0010 are the sources."""
    i, j = place
    return "-".join([f"row{rows[i - 1]:04d}"] * (i > 0) + [f"col{cols[j - 1]:04d}"] * (j > 0))


if __name__ == "__main__":
    run(main, "mix")
