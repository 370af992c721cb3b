"""`styleloom generate SNAPSHOT --seeds 0-63 --truncation 0.7 --out DIR`"""

import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from styleloom.scripts.cli import parse, run
from styleloom.training.checkpoint import find_snapshot, load_generator
from styleloom.training.draws import Draws
from styleloom.training.networks.growing import Generator, Noise, truncate
from styleloom.training.report import image_grid, to_uint8
from styleloom.training.sheets import picture, table

MOST = 10_000_000  # seeds in a range


@dataclass(frozen=True, kw_only=True)
class Source:
    """What all that draw from a snapshot are told."""

    snapshot: tyro.conf.Positional[Path]
    """A snapshot folder, or a run's folder: its newest snapshot."""
    batch: int = 16
    """Images at a time."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class Drawing(Source):
    """And how they draw."""

    truncation_cutoff: int | None = None
    """Truncate only the first so many layers; by default as the network was published with: StyleGAN 8, others all."""
    noise: Literal["const", "random", "none"] = "const"
    """The noise maps: those stored in the network, drawn from the seed, or none."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Drawing):
    """Draws images from a snapshot."""

    out: Path
    """Folder for the images."""
    seeds: str = "0-63"
    """Which images: numbers and ranges, such as 0-63 or 1,5,10-19."""
    truncation: str = "0.7"
    """truncation_psi: 1 is the full variety, less is more typical and cleaner, 0 the average image. Several, such as
    0,0.5,0.7,1, draw each image with each."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Class number, for a conditional network; by default seed modulo the number of classes. Several, such as 0,3,5-7,
    or all, draw each seed in each class."""
    latents: Path | None = None
    """A .npy file instead of seeds: z [N, z_dim], w [N, w_dim] with --space w, or ws [N, num_ws, w_dim]."""
    noise_maps: Path | None = None
    """With --latents: a .npz file with the noise maps of each image, as `project` writes it, instead of --noise."""
    space: Literal["z", "w"] = "z"
    """What two-dimensional latents are."""
    format: Literal["png", "npy"] = "png"
    """One PNG an image, or all in one images.npy, uint8 [N, C, H, W]: by seed, then class, then truncation."""
    grid: bool = False
    """Also write grid.png. Of several truncations or classes it is a table, with a row for each seed."""


@dataclass(frozen=True)
class Wanted:
    """One image to draw."""

    name: str
    """Of its file."""
    row: int
    """Of the latents."""
    seed: int
    """From which random noise follows."""
    psi: float


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "generate")
    seeds, psis = parse_seeds(options.seeds), parse_psis(options.truncation)
    generator, about, folder = open_generator(options)
    check_psis(generator, psis)
    rows, columns, wanted, ws = arrange(generator, options, seeds, psis, about["class_names"])
    maps = None if options.noise_maps is None else read_noise_maps(options.noise_maps, generator, len(ws))
    options.out.mkdir(parents=True, exist_ok=True)
    height, width = generator.size
    images = []
    with tqdm(total=len(wanted), unit="img", desc="generating", disable=len(wanted) < 2 * options.batch) as bar:
        for some, x in draw(generator, wanted, ws, options, maps):
            for each, image in zip(some, x.numpy(), strict=True):
                if options.format == "png":
                    picture(image).save(options.out / f"{each.name}.png")
                if options.format == "npy" or options.grid:
                    images.append(image)
            bar.update(len(some))
    if options.format == "npy":
        np.save(options.out / "images.npy", np.stack(images))
    if options.grid:
        n = len(columns)
        sheet = table([images[i * n : (i + 1) * n] for i in range(len(rows))], rows, columns) if n > 1 else None
        (sheet or image_grid(np.stack(images))).save(options.out / "grid.png")
    print(f"{len(wanted)} images of {width}x{height} from {folder} are in {options.out}.")
    return 0


def open_generator(options: Source) -> tuple[Generator, dict[str, Any], Path]:
    """(generator on the device, snapshot.json, its folder) that the options name. Raises ValueError."""
    folder = find_snapshot(options.snapshot)
    if options.batch < 1:
        raise ValueError("--batch is at least 1")
    cutoff = options.truncation_cutoff if isinstance(options, Drawing) else None
    if cutoff is not None and cutoff < 0:
        raise ValueError("--truncation-cutoff is at least 0")
    device = pick_device(options.device)
    generator, about = load_generator(folder)
    return generator.to(device), about, folder


def parse_seeds(text: str, option: str = "--seeds") -> list[int]:
    """ "1,5,10-12" -> [1, 5, 10, 11, 12]. Raises ValueError if it is not of that form."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"{option} {text!r}: give numbers and ranges such as 0-63 or 1,5,10-19")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= 2**63 or last - first >= MOST:
            raise ValueError(f"{option} {text!r}: a seed is below 2^63, and a range has at most {MOST:,} of them")
        seeds += range(first, last + 1)
    return seeds


def parse_psis(text: str) -> list[float]:
    """ "0,0.5,1" -> [0.0, 0.5, 1.0]. Raises ValueError if it is not of that form."""
    try:
        psis = [float(part) for part in text.split(",")]
    except ValueError:
        psis = [math.nan]
    if not all(map(math.isfinite, psis)):
        raise ValueError(f"--truncation {text!r}: give a number such as 0.7, or several such as 0,0.5,0.7,1")
    return psis


def check_psis(G: Generator, psis: list[float]) -> None:
    """Says so where truncation changes nothing. Raises ValueError if several of them would not, or one is no number."""
    if not all(map(math.isfinite, psis)):
        raise ValueError("--truncation is a number such as 0.7")
    if not G.has_w and len(psis) > 1:
        raise ValueError("this kind of generator has no w, so all --truncation are the same: leave it out")
    if not G.has_w and psis != [1]:
        print("Note: this kind of generator has no w, so --truncation changes nothing.")


def parse_classes(text: str | None, class_names: list[str]) -> list[int] | None:
    """ "3", "0,3,5-7" or "all" -> numbers of classes; None for None.

    Raises ValueError if it is not of that form, or for a class that the generator lacks.
    """
    classes = len(class_names)
    if text is None:
        return None
    if text == "all" and classes:
        return list(range(classes))
    numbers = [-1] if text == "all" or re.fullmatch(r"-\d+", text) else parse_seeds(text, "--class")
    if not all(0 <= number < classes for number in numbers):
        has = f"classes 0 to {classes - 1}" if classes else "no classes"
        raise ValueError(f"--class {text}: this generator has {has}")
    return numbers


def one_class(text: str | None, class_names: list[str]) -> int | None:
    """Raises ValueError for several classes."""
    classes = parse_classes(text, class_names)
    if classes is not None and len(classes) > 1:
        raise ValueError(f"--class {text}: one class at a time")
    return classes[0] if classes else None


def pick_device(name: str) -> torch.device:
    """Raises ValueError if the device does not exist here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def arrange(
    G: Generator, options: Arguments, seeds: list[int], psis: list[float], class_names: list[str]
) -> tuple[list[str], list[str], list[Wanted], Tensor]:
    """(names of a table's rows, of its columns, all images row by row, ws [N, num_ws, w_dim] before truncation)."""
    classes = parse_classes(options.class_, class_names)
    device = next(G.parameters()).device
    if options.latents is None:
        z = z_of(seeds, G.z_dim).to(device)
        names, rows = [f"seed{seed:04d}" for seed in seeds], [f"seed {seed}" for seed in seeds]
    else:
        z = read_latents(options.latents, options.space, G).to(device)
        seeds = list(range(len(z)))
        names, rows = [f"latent{i:04d}" for i in seeds], [f"latent {i}" for i in seeds]
    in_w = z.ndim == 3 or (options.latents is not None and options.space == "w")
    if classes is not None and in_w:
        raise ValueError("--class has no effect on latents in w: leave it out")
    if in_w:
        ws = z if z.ndim == 3 else spread(z, G)
    else:
        each = [[seed % len(class_names)] if classes is None else classes for seed in seeds] if class_names else None
        repeated = z if each is None else z.repeat_interleave(len(each[0]), dim=0)
        numbers = None if each is None else [number for some in each for number in some]
        ws = to_w(G, repeated, numbers)
    several = classes if classes is not None and len(classes) > 1 else None
    kinds = [("", "")] if several is None else [(f"-class{k:02d}", class_names[k]) for k in several]
    wanted = [
        Wanted(name + kind + (f"-psi{psi:g}" if len(psis) > 1 else ""), i * len(kinds) + k, seeds[i], psi)
        for i, name in enumerate(names)
        for k, (kind, _) in enumerate(kinds)
        for psi in psis
    ]
    if len(psis) == 1:
        return rows, [title for _, title in kinds], wanted, ws
    rows = [" ".join(filter(None, (row, title))) for row in rows for _, title in kinds]
    return rows, [f"psi {psi:g}" for psi in psis], wanted, ws


def z_of(seeds: Sequence[int], z_dim: int) -> Tensor:
    """z [N, z_dim], fp32 on the CPU: a seed is the same image everywhere."""
    return Draws(0, "generate", seeds).normal(z_dim)


@torch.no_grad()
def to_w(G: Generator, z: Tensor, classes: list[int] | None) -> Tensor:
    """z [N, z_dim] and the number of each one's class (None without labels) -> ws [N, num_ws, w_dim]."""
    c = None
    if classes is not None:
        c = nn.functional.one_hot(torch.tensor(classes, device=z.device), G.c_dim).float()
    return spread(G.mapping(z, c), G)


def spread(w: Tensor, G: Generator) -> Tensor:
    """w [N, w_dim] -> ws [N, num_ws, w_dim], the same for all layers."""
    return w[:, None].expand(-1, G.num_ws, -1)


def read_latents(path: Path, space: str, G: Generator) -> Tensor:
    """fp32 tensor of a .npy file. Raises ValueError if it is not latents of this generator."""
    try:
        with open(path, "rb") as file:  # which numpy would leave open if it is no whole archive
            x = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read the latents {path}: {error}") from None
    if not isinstance(x, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays: save the latents alone, with numpy.save")
    fitting = (None, G.z_dim if space == "z" else G.mapping.w_dim) if x.ndim == 2 else (None, G.num_ws, G.mapping.w_dim)
    if (
        not x.size
        or len(x.shape) != len(fitting)
        or x.shape[1:] != fitting[1:]
        or not np.issubdtype(x.dtype, np.floating)
    ):
        raise ValueError(
            f"{path} holds {x.dtype} {list(x.shape)}; this generator takes z [N, {G.z_dim}], "
            f"w [N, {G.mapping.w_dim}] (--space w) or ws [N, {G.num_ws}, {G.mapping.w_dim}]"
        )
    return torch.from_numpy(x.astype(np.float32))


def read_noise_maps(path: Path, G: Generator, count: int) -> list[Tensor]:
    """One fp32 [N, 1, H, W] a layer, of a .npz file. Raises ValueError if it has not those of this generator for
    `count` images."""
    sizes = [(count, 1, *size) for size in G.synthesis.sizes]
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            maps = [archive[name] for name in sorted(archive.files)]
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read the noise maps {path}: {error}") from None
    if [x.shape for x in maps] != sizes or not all(np.issubdtype(x.dtype, np.floating) for x in maps):
        raise ValueError(f"{path} does not hold {len(sizes)} noise maps for {count} images of this generator")
    return [torch.from_numpy(x.astype(np.float32)) for x in maps]


def draw(
    G: Generator, wanted: list[Wanted], ws: Tensor, options: Drawing, maps: list[Tensor] | None = None
) -> Iterator[tuple[list[Wanted], Tensor]]:
    """(some of the wanted, their images uint8 [n, C, H, W] on the CPU), `options.batch` at a time.

    maps: noise maps for each row of ws, instead of `options.noise`.
    """
    for start in range(0, len(wanted), options.batch):
        some = wanted[start : start + options.batch]
        rows = [each.row for each in some]
        x = torch.cat([truncated(G, ws[each.row, None], each.psi, options.truncation_cutoff) for each in some])
        noise = options.noise if maps is None else [x[rows] for x in maps]
        yield some, render(G, x, noise, [each.seed for each in some])


def truncated(G: Generator, ws: Tensor, psi: float, cutoff: int | None) -> Tensor:
    """ws [N, num_ws, w_dim] moved towards the average, in the first `cutoff` layers (None: the network's own choice);
    as they are where there is no w."""
    return truncate(ws, G.mapping.w_avg, psi, G.truncation_cutoff if cutoff is None else cutoff) if G.has_w else ws


@torch.no_grad()
def render(G: Generator, ws: Tensor, noise: Noise, seeds: Sequence[int]) -> Tensor:
    """ws [N, num_ws, w_dim] -> uint8 [N, C, H, W] on the CPU.

    Args:
        noise: "const", "none", maps, or "random": drawn from the `seeds`, of which there is one for each image.
    """
    if noise == "random":
        noise = Draws(0, "generate noise", seeds).noise_maps(G.synthesis.sizes)
    if not isinstance(noise, str):
        noise = [x.to(ws.device) for x in noise]
    return to_uint8(G.synthesis(ws, noise))


if __name__ == "__main__":
    run(main, "generate")
