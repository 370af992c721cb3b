"""`styleloom prepare`: pictures in, tar shards and a manifest out."""

import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from styleloom.datasets.cluster import dask_engine
from styleloom.datasets.contact import FILE as CONTACT
from styleloom.datasets.manifest import WORK, Manifest
from styleloom.datasets.parts import WHOLE, parse_part
from styleloom.datasets.records import REPORT
from styleloom.datasets.shards import OthersMissing, Prepared, prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.tars import Rules
from styleloom.datasets.workers import default_workers
from styleloom.scripts import indexing
from styleloom.scripts.cli import parse, run
from styleloom.training.networks.growing import start_size

_SIZES = re.compile(r"[0-9]+(x[0-9]+)?(,[0-9]+(x[0-9]+)?)*", re.IGNORECASE)


@dataclass(frozen=True)
class Arguments:
    """Turns pictures into a data set of tar shards, or makes one of the tars that others wrote. Interrupted, the same
    command continues."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A folder of pictures, a .zip (also those of stylegan2-ada and stylegan3), a WebDataset .tar, a folder of .tar.
    With --index-only also s3://bucket/set, gs://, hf://datasets/user/repo, https://host/set/{00000..00099}.tar."""
    dest: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[DEST]")] = None
    """Folder of the data set: new, empty, or left by the same command. With --index-only, SRC if it is left out."""
    resolution: str | None = None
    """256, or WIDTHxHEIGHT such as 768x512. Pictures are cropped about their centre, then resized. Several sizes of one
    aspect are made in one pass: 1024 512 256. The smaller ones become data sets of their own in DEST/WIDTHxHEIGHT.
    With --index-only one size, and only if the images are not all alike, or are to be of another size."""
    codec: Literal["png", "jpeg", "webp"] = "png"
    """How images are stored. JPEG decodes ten times as fast as PNG."""
    quality: int | None = None
    """Of jpeg and webp, 1 to 100; 95 by default."""
    resize: Literal["lanczos", "box"] = "lanczos"
    """The filter; both antialias."""
    labels: str = "auto"
    """auto (dataset.json, or what tars bring), none, folders (a top-level folder is a class), FILE.json or FILE.csv."""
    label_field: str | None = None
    """Of tars: the field of the samples' .json that holds the label, such as kind, or meta.kind within another."""
    image: str | None = None
    """Of tars: the suffix of the image in each sample, such as jpg or left.png; jpg,png takes the first that is there.
    Needed where samples have several pictures."""
    keys: Literal["first-dot", "last-dot"] = "first-dot"
    """Of tars: where a sample's key ends in the names of its files. WebDataset's rule is the first dot."""
    channels: Literal[1, 3, 4] | None = None
    """Grey, RGB or RGBA. By default RGB; with --index-only as they are, if they are all alike."""
    background: str = "#ffffff"
    """What transparent pictures are put on, as #rrggbb, unless there are 4 channels."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Pictures whose files are the same, byte for byte, as an earlier one's. DEST/report.json lists them."""
    shard_images: int = 1000
    """Pictures for each shard."""
    workers: int = field(default_factory=default_workers)
    """Processes. The shards do not depend on it."""
    part: str | None = None
    """I/N makes every N-th shard only, for job arrays: 1/8 to 8/8, in any order, at once or not, on machines that share
    SRC and DEST. The one that ends last completes the data set."""
    dask: str | None = None
    """Address of the scheduler of a Dask cluster whose workers share SRC and DEST, such as tcp://host:8786, to use its
    processes instead; or local: a cluster on this machine."""
    index_only: bool = False
    """Of tars: writes the manifest and an index for each tar, and copies nothing. Images of different sizes or kinds
    are brought to --resolution as they are read."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(
        Arguments, joined_resolutions(args), "prepare", config=(tyro.conf.FlagCreatePairsOff,)
    )  # fmt: skip
    sizes = parse_resolutions(options.resolution) if options.resolution is not None else []
    for size in sizes:
        warn_of_odd_size(*size)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        print(indexed(options, sizes) if options.index_only else prepared(options, sizes))
    except KeyboardInterrupt as stop:
        kept = f"{options.dest or options.src} keeps its finished {'tars' if options.index_only else 'shards'}"
        print(f"\nstyleloom prepare: stopped. The same command continues; {kept}.", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def prepared(options: Arguments, sizes: list[tuple[int, int]]) -> str:
    """Makes shards, and says what came of it. sizes: (width, height), the largest first."""
    if options.dest is None or not sizes:
        raise ValueError("say SRC, DEST and --resolution (with --index-only, DEST and --resolution may be left out)")
    (width, height), *reduced = sizes
    part = parse_part(options.part) if options.part is not None else WHOLE
    work = options.dest.absolute() / WORK
    cluster = dask_engine(options.dask, options.workers, work) if options.dask is not None else None
    try:
        outcome = prepare(
            open_source(options.src, options.labels, Rules(options.keys, options.image, options.label_field)),
            options.dest,
            width=width,
            height=height,
            reduced=reduced,
            channels=options.channels or 3,
            codec=options.codec,
            quality=options.quality,
            resize=options.resize,
            background=options.background,
            duplicates=options.duplicates,
            shard_images=options.shard_images,
            part=part,
            workers=options.workers,
            cluster=cluster,
        )
    except OthersMissing as others:
        return waiting(others, options.dest)
    return summary(outcome, options.dest)


def indexed(options: Arguments, sizes: list[tuple[int, int]]) -> str:
    """Makes a data set of tars as they are, and says what came of it."""
    outcome = indexing.index(options, sizes)
    return f"{indexing.summary(outcome)}\n{next_step(outcome.manifest, outcome.dest)}"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it: ends the work like Ctrl-C."""


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


def joined_resolutions(args: Sequence[str]) -> list[str]:
    """The arguments with all sizes that follow --resolution as one, with commas: SRC and DEST may come after them."""
    joined: list[str] = []
    for arg in args:
        if joined[-2:-1] == ["--resolution"] and _SIZES.fullmatch(joined[-1]) and _SIZES.fullmatch(arg):
            joined[-1] += f",{arg}"
        else:
            joined.append(arg)
    return joined


def parse_resolutions(text: str) -> list[tuple[int, int]]:
    """(width, height) of each size in "1024,512,256", the largest first."""
    return sorted({parse_resolution(each) for each in text.split(",")}, reverse=True)


def parse_resolution(text: str) -> tuple[int, int]:
    """(width, height) of "256" or "768x512"."""
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text.strip().lower())
    if not match:
        raise ValueError(f"--resolution is a number such as 256 or WIDTHxHEIGHT such as 768x512, not {text!r}")
    return int(match[1]), int(match[2] or match[1])


def waiting(others: OthersMissing, dest: Path) -> str:
    """What a part says that is not the last."""
    numbers = [f"{number}/{others.part.of}" for number in others.parts]
    shown = ", ".join(numbers[:10]) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
    return (
        f"Part {others.part} of {dest} is made. Of {others.shards:,} shards {len(others.missing):,} are missing yet: "
        f"those of {shown}.\nThe part that ends last completes the data set; running any part again does no harm."
    )


def warn_of_odd_size(width: int, height: int) -> None:
    """Says before the work that no network here takes such images. Not an error: other programs may."""
    if min(width, height) < 1:
        return  # `prepare` refuses it
    try:
        start_size(width, height)
    except ValueError as error:
        print(f"Note: the networks here cannot be trained at this size. {error}")


def summary(outcome: Prepared, dest: Path) -> str:
    """What was done and what to do next, for a person."""
    manifest, report, already = outcome
    state = "is prepared already" if already else "is ready"
    shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards):,} shards"
    classes = f", {manifest.classes:,} classes" if manifest.classes else ""
    images = f"{manifest.count:,} images of {manifest.width}x{manifest.height}"
    lines = [f"{dest} {state}: {images} in {shards}, {manifest.bytes / 1e6:,.1f} MB{classes}."]
    lines += [f"The same in {name}: {dest / name}" for name in manifest.reduced]
    conflicts = sum(twin.labels is not None for twin in report.duplicates)
    classes = f" ({conflicts:,} of another class)" if conflicts else ""
    notes = {
        "unreadable": len(report.unreadable),
        f"dropped as exact duplicates{classes}": len(report.duplicates),
        "enlarged": report.upscaled,
        "with an unusable colour profile": report.profiles_ignored,
    }
    told = [f"{number:,} {what}" for what, number in notes.items() if number]
    if told:
        lines.append(f"Of {report.read:,} pictures: {', '.join(told)}. See {dest / REPORT}")
    if report.look_alikes.pairs:
        many = "" if report.look_alikes.complete else "At least "
        pairs = "1 pair" if report.look_alikes.pairs == 1 else f"{report.look_alikes.pairs:,} pairs"
        lines.append(f"{many}{pairs} of images look alike (all are kept). See {dest / REPORT}")
    lines.append(f"What is in it, at a glance: {dest / CONTACT}")
    lines.append(next_step(manifest, dest))
    return "\n".join(lines)


def next_step(manifest: Manifest, dest: Path) -> str:
    """The command to go on with."""
    side = max(manifest.width, manifest.height)
    fitting = {64: "stylegan2-cpu", 128: "stylegan2-128", 256: "stylegan2-256", 512: "stylegan2-512"}
    preset = next((name for size, name in fitting.items() if side <= size), "stylegan2-1024")
    return f"Next: styleloom train {preset} --data.path {shlex.quote(str(dest))} --out RUN"


if __name__ == "__main__":
    run(main, "prepare")
