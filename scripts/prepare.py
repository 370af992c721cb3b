"""`styleloom prepare`: pictures in, tar shards and a manifest out."""

import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from styleloom.datasets.records import REPORT
from styleloom.datasets.shards import Prepared, prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.workers import default_workers
from styleloom.scripts.cli import parse, run
from styleloom.training.networks.stylegan2 import start_size


@dataclass(frozen=True)
class Arguments:
    """Turns pictures into a data set of tar shards. Interrupted, the same command continues."""

    src: tyro.conf.Positional[Path]
    """A folder of pictures, a .zip (also those of stylegan2-ada and stylegan3), a WebDataset .tar, a folder of .tar."""
    dest: tyro.conf.Positional[Path]
    """Folder of the data set: new, empty, or left by the same command."""
    resolution: str
    """256, or WIDTHxHEIGHT such as 768x512. Pictures are cropped about their centre, then resized."""
    codec: Literal["png", "jpeg", "webp"] = "png"
    """How images are stored. JPEG decodes ten times as fast as PNG."""
    quality: int | None = None
    """Of jpeg and webp, 1 to 100; 95 by default."""
    resize: Literal["lanczos", "box"] = "lanczos"
    """The filter; both antialias."""
    labels: str = "auto"
    """auto (dataset.json, or what tars bring), none, folders (a top-level folder is a class), FILE.json or FILE.csv."""
    channels: Literal[1, 3, 4] = 3
    """Grey, RGB or RGBA."""
    background: str = "#ffffff"
    """What transparent pictures are put on, as #rrggbb, unless there are 4 channels."""
    shard_images: int = 1000
    """Pictures for each shard."""
    workers: int = field(default_factory=default_workers)
    """Processes. The shards do not depend on it."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "prepare")
    width, height = parse_resolution(options.resolution)
    warn_of_odd_size(width, height)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        outcome = prepare(
            open_source(options.src, options.labels),
            options.dest,
            width=width,
            height=height,
            channels=options.channels,
            codec=options.codec,
            quality=options.quality,
            resize=options.resize,
            background=options.background,
            shard_images=options.shard_images,
            workers=options.workers,
        )
    except KeyboardInterrupt as stop:
        print(
            f"\nstyleloom prepare: stopped. The same command continues; {options.dest} keeps its finished shards.",
            file=sys.stderr,
        )
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(summary(outcome, options.dest))
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it: ends the work like Ctrl-C."""


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


def parse_resolution(text: str) -> tuple[int, int]:
    """(width, height) of "256" or "768x512"."""
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text.strip().lower())
    if not match:
        raise ValueError(f"--resolution is a number such as 256 or WIDTHxHEIGHT such as 768x512, not {text!r}")
    return int(match[1]), int(match[2] or match[1])


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
    notes = {
        "unreadable": len(report.unreadable),
        "enlarged": report.upscaled,
        "with an unusable colour profile": report.profiles_ignored,
    }
    told = [f"{number:,} {what}" for what, number in notes.items() if number]
    if told:
        lines.append(f"Of {report.read:,} pictures: {', '.join(told)}. See {dest / REPORT}")
    side = max(outcome.manifest.width, outcome.manifest.height)
    fitting = {64: "stylegan2-cpu", 128: "stylegan2-128", 256: "stylegan2-256", 512: "stylegan2-512"}
    preset = next((name for size, name in fitting.items() if side <= size), "stylegan2-1024")
    lines.append(f"Next: styleloom train {preset} --data.path {shlex.quote(str(dest))} --out RUN")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, "prepare")
