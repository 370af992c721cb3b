"""`styleloom inspect`: shows, verifies or draws a prepared data set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from styleloom.datasets.decode import decode
from styleloom.datasets.manifest import Manifest, check_shard, load_index, read_manifest
from styleloom.datasets.verify import verify
from styleloom.datasets.workers import default_workers
from styleloom.scripts.cli import parse, run

_CELLS = 64
_SMALLEST_CELL, _LARGEST_CELL = 64, 256  # pixels, of the longer side
_MOST_CLASSES = 40


@dataclass(frozen=True)
class Arguments:
    """Shows what a prepared data set holds."""

    dataset: tyro.conf.Positional[Path]
    """Folder of the data set."""
    verify: bool = False
    """Hash and decode everything; list each fault; exit with 1 if there is one."""
    grid: Path | None = None
    """A picture file to draw samples into, up to 64, evenly spaced."""
    workers: int = field(default_factory=default_workers)
    """Processes, for --verify."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "inspect", config=(tyro.conf.FlagCreatePairsOff,))
    manifest = read_manifest(options.dataset)
    print(describe(manifest, options.dataset))
    if options.grid is not None:
        draw_grid(manifest, options.dataset).save(options.grid)
        print(f"drawn into {options.grid}")
    if not options.verify:
        return 0
    faults = verify(options.dataset, options.workers)
    for fault in faults:
        print(" ".join(filter(None, (fault.file, fault.key))) + f": {fault.what}")
    if faults:
        print(f"{len(faults)} faults. Restore these files, or delete {options.dataset} and prepare it again.")
    else:
        print(f"sound: {manifest.count:,} images hashed and decoded.")
    return 1 if faults else 0


def describe(manifest: Manifest, folder: Path) -> str:
    """The data set in some lines, for a person."""
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}[manifest.channels]
    quality = "lossless" if manifest.quality is None else f"quality {manifest.quality}"
    ground = f", transparency on {manifest.background}" if manifest.background else ""
    lines = [
        f"{folder}",
        f"  images   {manifest.count:,} of {manifest.width}x{manifest.height}, {kind}",
        f"  stored   {manifest.codec}, {quality}; {manifest.bytes / manifest.count / 1e3:,.1f} kB an image",
        f"  made by  centre crop, {manifest.resize} resize{ground}",
        f"  shards   {len(manifest.shards):,}, {manifest.bytes / 1e6:,.1f} MB",
        f"  labels   {f'{manifest.classes:,} classes' if manifest.classes else 'none'}",
        *_histogram(manifest),
        f"  hash     {manifest.hash}",
    ]
    return "\n".join(lines)


def _histogram(manifest: Manifest) -> list[str]:
    """A bar for each class; of many classes, the first."""
    shown = list(zip(manifest.class_names, manifest.class_counts, strict=True))[:_MOST_CLASSES]
    most = max(manifest.class_counts, default=0)
    width = max((len(name) for name, _ in shown), default=0)
    bars = [f"    {name:<{width}} {count:>9,} {'#' * math.ceil(40 * count / most)}" for name, count in shown]
    rest = manifest.classes - len(shown)
    if rest:
        low, high = min(manifest.class_counts[len(shown) :]), max(manifest.class_counts[len(shown) :])
        bars.append(f"    and {rest:,} more, of {low:,} to {high:,} images")
    return bars


def draw_grid(manifest: Manifest, folder: Path) -> Image.Image:
    """RGB picture of up to 64 samples, evenly spaced over the data set. Raises ValueError on a broken shard."""
    positions = np.linspace(0, manifest.count - 1, min(_CELLS, manifest.count)).round().astype(int)
    cells = [_cell(pixels) for pixels in _samples(manifest, folder, positions)]
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    width, height = cells[0].size
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for i, cell in enumerate(cells):
        grid.paste(cell, (i % columns * width, i // columns * height))
    return grid


def _samples(manifest: Manifest, folder: Path, positions: np.ndarray) -> list[np.ndarray]:
    """uint8 [C, H, W] at each position; positions ascend."""
    ends = np.cumsum([shard.count for shard in manifest.shards])
    images = []
    for number in np.unique(np.searchsorted(ends, positions, side="right")):
        shard = manifest.shards[number]
        check_shard(folder, shard)
        index = load_index(folder, shard)
        first = ends[number] - shard.count
        with open(folder / shard.name, "rb") as file:
            for position in positions[(positions >= first) & (positions < ends[number])]:
                offset, length, *_ = index[position - first]
                file.seek(offset)
                images.append(decode(file.read(length), manifest.codec, manifest.channels))
    return images


def _cell(pixels: np.ndarray) -> Image.Image:
    """uint8 [C, H, W] as an RGB picture of a size to look at; transparency on white."""
    image = Image.fromarray(
        pixels.transpose(1, 2, 0).squeeze(axis=2) if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    )
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    longer = max(image.size)
    if longer < _SMALLEST_CELL:
        k = math.ceil(_SMALLEST_CELL / longer)
        image = image.resize((image.width * k, image.height * k), Image.Resampling.NEAREST)
    elif longer > _LARGEST_CELL:
        image.thumbnail((_LARGEST_CELL, _LARGEST_CELL))
    return image.convert("RGB")


if __name__ == "__main__":
    run(main, "inspect")
