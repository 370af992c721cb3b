"""`styleloom prepare --index-only`: tars that others wrote become a data set where they lie."""

from typing import Any

from styleloom.datasets.alike import Wish
from styleloom.datasets.foreign import Indexed, index_only
from styleloom.datasets.records import REPORT
from styleloom.datasets.tars import Rules

_WRITING = ("codec", "quality", "duplicates", "shard_images", "part", "dask")


def index(options: Any, sizes: list[tuple[int, int]]) -> Indexed:
    """Does what the command line asks for. options: prepare.py's; sizes: (width, height) of --resolution, if given.

    Raises ValueError for options that are about writing images, and as `index_only` does.
    """
    given = [name for name in _WRITING if getattr(options, name) != getattr(type(options), name)]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"--index-only writes no images, so {names} cannot be had: leave it out, or --index-only")
    if len(sizes) > 1:
        raise ValueError("--index-only takes one --resolution: smaller ones are made as the images are read")
    width, height = sizes[0] if sizes else (None, None)
    return index_only(
        options.src,
        options.dest,
        wish=Wish(width, height, options.channels, options.resize, options.background),
        labels=options.labels,
        rules=Rules(options.keys, options.image, options.label_field),
        workers=options.workers,
    )


def summary(outcome: Indexed) -> str:
    """What was found, for a person."""
    manifest, report, dest, already = outcome
    state = "is indexed already" if already else "is ready"
    tars = "1 tar" if len(manifest.shards) == 1 else f"{len(manifest.shards):,} tars"
    where = f" in {manifest.root}" if manifest.root else ""
    classes = f", {manifest.classes:,} classes" if manifest.classes else ""
    lines = [f"{dest} {state}: {manifest.count:,} images in {tars}{where}, {manifest.bytes / 1e6:,.1f} MB{classes}."]
    size = f"{manifest.width}x{manifest.height}"
    if manifest.conform:
        why = "; ".join(report.not_alike) or "they are of another size or kind"
        lines.append(f"Each is brought to {size} as it is read, since not all are alike: {why}.")
    else:
        lines.append(f"All are {manifest.codec} of {size} and taken as they are.")
    notes = {
        "samples left out": len(report.left_out),
        "faults of tars": len(report.faults),
        "samples without an image": report.without_image,
        "images without a label (training with labels replaces them)": report.unlabelled,
        "samples whose key came before (files of one sample have to lie side by side)": report.repeated_keys,
    }
    told = [f"{number:,} {what}" for what, number in notes.items() if number]
    if told:
        lines.append(f"Besides: {', '.join(told)}. See {dest / REPORT}")
    return "\n".join(lines)
