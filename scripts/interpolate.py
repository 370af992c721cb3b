"""`styleloom interpolate SNAPSHOT --seeds 0,5,9 --out FILE.mp4`"""

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
from styleloom.scripts.generate import (
    Drawing,
    check_psis,
    open_generator,
    parse_classes,
    parse_seeds,
    render,
    spread,
    truncated,
    z_of,
)
from styleloom.training.latents import Walks
from styleloom.training.networks.growing import Generator
from styleloom.training.report import image_grid
from styleloom.training.video import check_film, write_film


@dataclass(frozen=True, kw_only=True)
class Arguments(Drawing):
    """Films the way from one image to the next."""

    out: Path
    """FILE.mp4, FILE.gif or FILE.webp; a name without a dot is a folder for PNG frames."""
    seeds: str = "0-7"
    """The images that it leads through: numbers and ranges. With --grid, the first cell takes the first ones."""
    frames: int = 60
    """From one image to the next."""
    fps: float = 30
    """Frames a second."""
    space: Literal["w", "z"] | None = None
    """Straight lines in w, or great arcs in z; by default w where the generator has one."""
    smooth: bool = False
    """In w, a cubic spline instead of straight lines: no sudden turn at any image."""
    loop: bool = True
    """End where it began, so that it can be played over and over."""
    grid: str = "1x1"
    """ROWSxCOLUMNS of films side by side, each through its share of the seeds."""
    truncation: float = 0.7
    """truncation_psi: 1 is the full variety, less is more typical and cleaner."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Class number, for a conditional network, or one for each seed; by default seed modulo the number of classes."""
    crf: int = 17
    """Of MP4, the quality: 0 is lossless, 17 looks so, 23 is smaller, 51 is the worst."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "interpolate")
    seeds, (rows, columns) = parse_seeds(options.seeds), parse_grid(options.grid)
    check(options, len(seeds), rows * columns)
    generator, about, folder = open_generator(options)
    check_psis(generator, [options.truncation])
    if options.space == "w" and not generator.has_w:
        raise ValueError("this kind of generator has no w: leave --space out, or use --space z")
    walk = Way(generator, seeds, classes_of(options.class_, seeds, about["class_names"]), rows * columns, options)
    with tqdm(frames(walk, columns, options), total=walk.count, unit="frame", desc="filming") as bar:
        write_film(options.out, iter(bar), walk.count, options.fps, options.crf)
    seconds = walk.count / options.fps
    height, width = generator.size
    print(f"{walk.count} frames, {seconds:.1f} s, of {rows}x{columns} images of {width}x{height} from {folder} are in "
          f"{options.out}.")  # fmt: skip
    return 0


def check(options: Arguments, seeds: int, cells: int) -> None:
    """Raises ValueError for what can be told before the generator is there."""
    if seeds % cells or seeds < 2 * cells:
        raise ValueError(f"{seeds} seeds for {cells} film(s): give each at least 2, and all as many")
    if options.frames < 1:
        raise ValueError("--frames is at least 1")
    if not 0 <= options.crf <= 51:
        raise ValueError("--crf is 0 to 51")
    if options.smooth and options.space == "z":
        raise ValueError("--smooth is for --space w: the arcs in z are great circles")
    check_film(options.out, options.fps)


def parse_grid(text: str) -> tuple[int, int]:
    """ "2x3" -> (2, 3). Raises ValueError if it is not of that form."""
    match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", text)
    if not match:
        raise ValueError(f"--grid {text!r}: give ROWSxCOLUMNS such as 2x3")
    return int(match[1]), int(match[2])


def classes_of(text: str | None, seeds: list[int], class_names: list[str]) -> list[int] | None:
    """The class of each seed; None without labels. Raises ValueError for another number of classes."""
    classes = parse_classes(text, class_names)
    if classes is None:
        return [seed % len(class_names) for seed in seeds] if class_names else None
    if len(classes) not in (1, len(seeds)):
        raise ValueError(f"--class {text}: give one class, or one for each of the {len(seeds)} seeds")
    return classes if len(classes) == len(seeds) else classes * len(seeds)


class Way:
    """The way of one film or of several at once.

    Attributes:
        films: how many.
        count: frames of each; after the last one of those that loop comes the first.
        noise_seeds: of each film: with random noise, all its frames have the same.
    """

    @torch.no_grad()
    def __init__(
        self, G: Generator, seeds: list[int], classes: list[int] | None, films: int, options: Arguments
    ) -> None:
        self.G, self.options, self.films = G, options, films
        self.device = next(G.parameters()).device
        self.in_w = G.has_w if options.space is None else options.space == "w"
        if options.smooth and not self.in_w:
            raise ValueError("--smooth is for generators with a w")
        keys = z_of(seeds, G.z_dim).to(self.device)
        labels = None
        if classes is not None:
            labels = nn.functional.one_hot(torch.tensor(classes, device=self.device), G.c_dim).float()
        if self.in_w:
            keys = G.mapping(keys, labels)
        curve = "slerp" if not self.in_w else "spline" if options.smooth else "linear"
        self.walks = Walks(keys.unflatten(0, (films, -1)), options.loop, curve)
        self.labels = None  # in z, the label goes with it
        if labels is not None and not self.in_w:
            self.labels = Walks(labels.unflatten(0, (films, -1)), options.loop, "linear")
        self.count = self.walks.duration * options.frames + (not options.loop)
        self.noise_seeds = seeds[:: len(seeds) // films]

    @torch.no_grad()
    def at(self, numbers: range) -> Tensor:
        """ws [N, num_ws, w_dim], truncated, of images counted frame by frame, and film by film in each."""
        number = torch.tensor(numbers, device=self.device)
        film, time = number % self.films, (number // self.films).double() / self.options.frames
        x = self.walks.at(film, time)
        if not self.in_w:
            x = self.G.mapping(x, None if self.labels is None else self.labels.at(film, time))
        return truncated(self.G, spread(x, self.G), self.options.truncation, self.options.truncation_cutoff)


def frames(way: Way, columns: int, options: Arguments) -> Iterator[Image.Image]:
    """The film's pictures, one after the other; `options.batch` images are drawn at a time."""
    total = way.count * way.films
    waiting: list[np.ndarray] = []
    for start in range(0, total, options.batch):
        numbers = range(start, min(start + options.batch, total))
        seeds = [way.noise_seeds[number % way.films] for number in numbers]
        for image in render(way.G, way.at(numbers), options.noise, seeds).numpy():
            waiting.append(image)
            if len(waiting) == way.films:
                yield image_grid(np.stack(waiting), columns, min_side=128)
                waiting = []


if __name__ == "__main__":
    run(main, "interpolate")
