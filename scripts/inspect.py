"""`styleloom inspect`: shows, verifies or draws a prepared data set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from styleloom.datasets.contact import sample_grid
from styleloom.datasets.manifest import FILE, Manifest, Spread, Statistics, read_manifest
from styleloom.datasets.statistics import quantile
from styleloom.datasets.verify import Fault, verify
from styleloom.datasets.workers import default_workers
from styleloom.scripts.cli import parse, run

_MOST_CLASSES = 40


@dataclass(frozen=True)
class Arguments:
    """Shows what a prepared data set holds."""

    dataset: tyro.conf.Positional[Path]
    """Folder of the data set."""
    verify: bool = False
    """Hash and decode everything, in all sizes; list each fault; exit with 1 if there is one."""
    grid: Path | None = None
    """A picture file to draw samples into, up to 64, evenly spaced."""
    workers: int = field(default_factory=default_workers)
    """Processes, for --verify."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "inspect", config=(tyro.conf.FlagCreatePairsOff,))
    manifest = read_manifest(options.dataset)
    print(describe(manifest, options.dataset))
    if options.grid is not None:
        sample_grid(manifest, options.dataset).save(options.grid)
        print(f"drawn into {options.grid}")
    if not options.verify:
        return 0
    faults = verify(options.dataset, options.workers)
    for name in manifest.reduced:
        its = verify(options.dataset / name, options.workers)
        faults += [Fault(f"{name}/{fault.file}", fault.key, fault.what) for fault in its]
    for fault in faults:
        print(" ".join(filter(None, (fault.file, fault.key))) + f": {fault.what}")
    if faults:
        what = f"{options.dataset / FILE} (not the tars)" if manifest.foreign else f"{options.dataset}"
        print(f"{len(faults)} faults. Restore these files, or delete {what} and prepare it again.")
    else:
        print(f"sound: {manifest.count * (1 + len(manifest.reduced)):,} images hashed and decoded.")
    return 1 if faults else 0


def describe(manifest: Manifest, folder: Path) -> str:
    """The data set in some lines, for a person."""
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}[manifest.channels]
    lossless = "as others encoded them" if manifest.foreign else "lossless"
    quality = lossless if manifest.quality is None else f"quality {manifest.quality}"
    lines = [
        f"{folder}",
        f"  images   {manifest.count:,} of {manifest.width}x{manifest.height}, {kind}",
        f"  stored   {manifest.codec}, {quality}; {manifest.bytes / manifest.count / 1e3:,.1f} kB an image",
        f"  made by  {_making(manifest)}",
        *(f"  smaller  {name}: {folder / name}" for name in manifest.reduced),
        f"  shards   {len(manifest.shards):,}, {manifest.bytes / 1e6:,.1f} MB",
        *([f"  tars in  {manifest.root}"] if manifest.root else []),
        f"  labels   {f'{manifest.classes:,} classes' if manifest.classes else 'none'}",
        *_histogram(manifest),
        *(_statistics(manifest.statistics) if manifest.statistics else []),
        f"  hash     {manifest.hash}",
    ]
    return "\n".join(lines)


def _making(manifest: Manifest) -> str:
    """How the images came to be what they are."""
    if manifest.resize == "unknown":
        return "others: the images are taken as they are"
    when = ", as they are read" if manifest.conform else ""
    ground = f", transparency on {manifest.background}" if manifest.background else ""
    return f"centre crop, {manifest.resize} resize{ground}{when}"


def _statistics(its: Statistics) -> list[str]:
    """What the pictures were like that the images were made from, and the images' colours."""

    def spread(name: str, numbers: Spread, form: str) -> str:
        least, middle, most = (form.format(x) for x in (numbers.least, quantile(numbers, 0.5), numbers.most))
        return f"{name} {least}" if least == most else f"{name} {least} to {most} (median about {middle})"

    formats = ", ".join(f"{name} {count:,}" for name, count in sorted(its.formats.items(), key=lambda f: -f[1]))
    mean, deviation = (" ".join(f"{x:.0f}" for x in colour) for colour in (its.mean_colour, its.std_colour))
    return [
        f"  from     {formats}",
        f"           {spread('width', its.width, '{:,.0f}')}, {spread('height', its.height, '{:,.0f}')}, "
        f"{spread('aspect', its.aspect, '{:.2f}')}",
        f"  colour   mean {mean}, standard deviation {deviation}",
    ]


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


if __name__ == "__main__":
    run(main, "inspect")
