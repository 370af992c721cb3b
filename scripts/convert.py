"""`styleloom convert IN OUT`: an official .pkl becomes a snapshot, a snapshot becomes an .onnx model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from styleloom.scripts.cli import parse, run
from styleloom.training import official
from styleloom.training.checkpoint import find_snapshot, load_generator
from styleloom.training.export import export


@dataclass(frozen=True)
class Arguments:
    """Turns an official StyleGAN2 pickle into a snapshot, or a snapshot's generator into an ONNX model.

    Nothing in a pickle is executed. The networks are those of StyleGAN2, StyleGAN2-ADA and StyleGAN2-ADA-PyTorch, and
    StyleGAN2's of the StyleGAN3 repository. A model's images are compared with the generator's before it is written.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="in")]
    """The .pkl; or a snapshot folder, or a run's folder: its newest snapshot."""
    out: tyro.conf.Positional[Path]
    """The snapshot folder, or the .onnx file."""
    to: Literal["auto", "snapshot", "onnx"] = "auto"
    """What OUT becomes; auto: a snapshot of a file, a model of a folder."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    generator_only: bool = False
    """Of a .pkl, leave the discriminator out, which may then be of another kind than StyleGAN2's."""
    truncation: float | None = None
    """Of a model: fix truncation_psi at this; by default it is an input of the model."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "convert")
    if not options.source.exists():
        raise ValueError(f"there is no {options.source}")
    to = options.to if options.to != "auto" else ("onnx" if options.source.is_dir() else "snapshot")
    if to == "snapshot" and options.source.is_dir():
        raise ValueError(f"{options.source} is a folder: a snapshot is made of a .pkl file")
    if to == "onnx" and options.out.suffix != ".onnx":
        raise ValueError(f"{options.out}: a model's name ends in .onnx")
    if to == "onnx" and options.generator_only:
        raise ValueError("--generator-only is for .pkl files: a model is the generator alone")
    if to == "snapshot" and options.truncation is not None:
        raise ValueError("--truncation is for models: leave it out, or give it to `styleloom generate`")
    if options.out.exists():
        _check_replaceable(options.out, options.overwrite, to)
    return _to_onnx(options) if to == "onnx" else _to_snapshot(options)


def _check_replaceable(out: Path, overwrite: bool, to: str) -> None:
    """Raises ValueError if `out` is not to be overwritten, or is something else than what it would become."""
    if not overwrite:
        raise ValueError(f"{out} exists: give another name, or --overwrite")
    if not (out.is_file() if to == "onnx" else (out / "snapshot.json").is_file()):
        raise ValueError(f"{out} is no {'file' if to == 'onnx' else 'snapshot'}: give another name")


def _to_snapshot(options: Arguments) -> int:
    its = official.read(options.source, options.generator_only)
    official.write(its, options.out)
    for note in its.notes:
        print(note)
    print(f"The networks of {options.source} ({its.source['networks']}) are in {options.out}.")
    return 0


def _to_onnx(options: Arguments) -> int:
    folder = find_snapshot(options.source)
    generator, about = load_generator(folder)
    height, width = generator.size
    metadata = {
        "network": about["run"].network.kind, "width": width, "height": height, "channels": about["channels"],
        "class_names": about["class_names"], "nimg": about["nimg"], "z_dim": generator.z_dim, "noise": "const",
        "truncation_psi": "an input" if options.truncation is None else options.truncation,
        "range": "images are [N, C, H, W], -1 is black and 1 is white",
    }  # fmt: skip
    if not generator.has_w:
        del metadata["truncation_psi"]
    difference = export(generator, options.out, metadata, options.truncation)
    print(f"The generator of {folder} is in {options.out}.")
    print(f"Largest difference from its images in onnxruntime: {difference:.1e}.")
    return 0


if __name__ == "__main__":
    run(main, "convert")
