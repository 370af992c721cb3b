"""`styleloom generate SNAPSHOT --seeds 0-63 --truncation 0.7 --out DIR`"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from styleloom.scripts.cli import parse, run
from styleloom.training.checkpoint import find_snapshot, load_generator
from styleloom.training.draws import Draws
from styleloom.training.networks.growing import Generator, truncate
from styleloom.training.report import image_grid, to_uint8

MOST = 10_000_000  # seeds in a range


@dataclass(frozen=True)
class Arguments:
    """Draws images from a snapshot."""

    snapshot: tyro.conf.Positional[Path]
    """A snapshot folder, or a run's folder: its newest snapshot."""
    out: Path
    """Folder for the images."""
    seeds: str = "0-63"
    """Which images: numbers and ranges, such as 0-63 or 1,5,10-19."""
    truncation: float = 0.7
    """truncation_psi: 1 is the full variety, less is more typical and cleaner, 0 the average image."""
    truncation_cutoff: int | None = None
    """Truncate only the first so many layers; by default as the network was published with: StyleGAN 8, others all."""
    noise: Literal["const", "random", "none"] = "const"
    """The noise maps: those stored in the network, drawn from the seed, or none."""
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class number, for a conditional network; by default seed modulo the number of classes."""
    latents: Path | None = None
    """A .npy file instead of seeds: z [N, z_dim], w [N, w_dim] with --space w, or ws [N, num_ws, w_dim]."""
    space: Literal["z", "w"] = "z"
    """What two-dimensional latents are."""
    format: Literal["png", "npy"] = "png"
    """One PNG an image, or all in one images.npy, uint8 [N, C, H, W]."""
    grid: bool = False
    """Also write grid.png."""
    batch: int = 16
    """Images at a time."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "generate")
    folder = find_snapshot(options.snapshot)
    seeds = parse_seeds(options.seeds)
    if options.batch < 1:
        raise ValueError("--batch is at least 1")
    if options.truncation_cutoff is not None and options.truncation_cutoff < 0:
        raise ValueError("--truncation-cutoff is at least 0")
    generator, about = load_generator(folder)
    generator.to(pick_device(options.device))
    if not generator.has_w and options.truncation != 1:
        print("Note: this kind of generator has no w, so --truncation changes nothing.")
    names, seeds, ws = latents(generator, options, seeds, about["class_names"])
    options.out.mkdir(parents=True, exist_ok=True)
    height, width = generator.size
    images = []
    with tqdm(total=len(names), unit="img", desc="generating", disable=len(names) < 2 * options.batch) as bar:
        for some, x in draw(generator, seeds, ws, options):
            for i, image in zip(some, x.numpy(), strict=True):
                if options.format == "png":
                    write_png(image, options.out / f"{names[i]}.png")
                if options.format == "npy" or options.grid:
                    images.append(image)
            bar.update(len(some))
    if options.format == "npy":
        np.save(options.out / "images.npy", np.stack(images))
    if options.grid:
        image_grid(np.stack(images)).save(options.out / "grid.png")
    print(f"{len(names)} images of {width}x{height} from {folder} are in {options.out}.")
    return 0


def parse_seeds(text: str) -> list[int]:
    """ "1,5,10-12" -> [1, 5, 10, 11, 12]. Raises ValueError if it is not of that form."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--seeds {text!r}: give numbers and ranges such as 0-63 or 1,5,10-19")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= 2**63 or last - first >= MOST:
            raise ValueError(f"--seeds {text!r}: a seed is below 2^63, and a range has at most {MOST:,} of them")
        seeds += range(first, last + 1)
    return seeds


def pick_device(name: str) -> torch.device:
    """Raises ValueError if the device does not exist here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def latents(
    G: Generator, options: Arguments, seeds: list[int], class_names: list[str]
) -> tuple[list[str], list[int], Tensor]:
    """(name of each image, its seed, ws [N, num_ws, w_dim] before truncation)."""
    device = next(G.parameters()).device
    if options.latents is None:
        z = Draws(0, "generate", seeds).normal(G.z_dim).to(device)  # on the CPU: a seed is the same image everywhere
        names = [f"seed{seed:04d}" for seed in seeds]
    else:
        z = read_latents(options.latents, options.space, G).to(device)
        names = [f"latent{i:04d}" for i in range(len(z))]
        seeds = list(range(len(z)))
    if options.class_ is not None and (z.ndim == 3 or options.space == "w"):
        raise ValueError("--class has no effect on latents in w: leave it out")
    if z.ndim == 3:
        return names, seeds, z
    if options.latents is None or options.space == "z":
        z = G.mapping(z, one_hot(options.class_, seeds, class_names, device))
    return names, seeds, z[:, None].expand(-1, G.num_ws, -1)


def read_latents(path: Path, space: str, G: Generator) -> Tensor:
    """fp32 tensor of a .npy file. Raises ValueError if it is not latents of this generator."""
    try:
        x = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read the latents {path}: {error}") from None
    fitting = (None, G.z_dim if space == "z" else G.mapping.w_dim) if x.ndim == 2 else (None, G.num_ws, G.mapping.w_dim)
    if not isinstance(x, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays: save the latents alone, with numpy.save")
    if (
        not len(x)
        or len(x.shape) != len(fitting)
        or x.shape[1:] != fitting[1:]
        or not np.issubdtype(x.dtype, np.floating)
    ):
        raise ValueError(
            f"{path} holds {x.dtype} {list(x.shape)}; this generator takes z [N, {G.z_dim}], "
            f"w [N, {G.mapping.w_dim}] (--space w) or ws [N, {G.num_ws}, {G.mapping.w_dim}]"
        )
    return torch.from_numpy(x.astype(np.float32))


def one_hot(number: int | None, seeds: list[int], class_names: list[str], device: torch.device) -> Tensor | None:
    """Labels [N, c_dim], or None for an unconditional generator. Raises ValueError for a class that it lacks."""
    classes = len(class_names)
    if number is not None and not 0 <= number < classes:
        has = f"classes 0 to {classes - 1}" if classes else "no classes"
        raise ValueError(f"--class {number}: this generator has {has}")
    if not classes:
        return None
    numbers = [seed % classes if number is None else number for seed in seeds]
    return nn.functional.one_hot(torch.tensor(numbers, device=device), classes).float()


@torch.no_grad()
def draw(G: Generator, seeds: list[int], ws: Tensor, options: Arguments) -> Iterator[tuple[range, Tensor]]:
    """(which images, uint8 [n, C, H, W] on the CPU), some at a time."""
    if G.has_w:
        cutoff = G.truncation_cutoff if options.truncation_cutoff is None else options.truncation_cutoff
        ws = truncate(ws, G.mapping.w_avg, options.truncation, cutoff)
    for start in range(0, len(seeds), options.batch):
        some = range(start, min(start + options.batch, len(seeds)))
        noise = options.noise
        if noise == "random":
            draws = Draws(0, "generate noise", seeds[some.start : some.stop])
            noise = [x.to(ws.device) for x in draws.noise_maps(G.synthesis.sizes)]
        yield some, to_uint8(G.synthesis(ws[some.start : some.stop], noise))


def write_png(image: np.ndarray, path: Path) -> None:
    """uint8 [C, H, W] -> a PNG file."""
    Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))).save(path)


if __name__ == "__main__":
    run(main, "generate")
