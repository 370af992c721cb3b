"""`styleloom project SNAPSHOT IMAGE... --out DIR`"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from styleloom.datasets.pictures import Form, check_form, conform
from styleloom.scripts.cli import parse, run
from styleloom.scripts.generate import Source, one_class, open_generator
from styleloom.training.checkpoint import load_discriminator
from styleloom.training.networks.growing import Generator
from styleloom.training.perceptual import DiscriminatorFeatures, Embedding, LaplacianPyramid, load_lpips
from styleloom.training.projection import Plan, Projection, autocorrelation
from styleloom.training.report import image_grid, to_uint8
from styleloom.training.sheets import table
from styleloom.training.video import check_film, write_film
from styleloom.training.whole import whole_file


@dataclass(frozen=True, kw_only=True)
class Arguments(Source):
    """Finds the latents whose image is most like each picture. Writes projected_w.npy [N, num_ws, w_dim] and noise.npz,
    from which `generate` draws it again, proj.png with targets and projections, and projection.json."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """The pictures: turned upright, cropped and resized as `prepare` does."""
    out: Path
    """Folder for the results."""
    steps: int = 1000
    """Steps of the search."""
    space: Literal["w", "w+"] | None = None
    """w, the default: one w for all layers, which stays nearer to what the generator knows. w+: one for each layer,
    which comes nearer to the picture. Where there is no w, it is always z that is searched."""
    lpips: Path | None = None
    """The perceptual network: a TorchScript file such as vgg16.pt. Without it, the snapshot's own discriminator tells
    how unlike two images are; without that, their pixels."""
    noise: Literal["optimise", "const", "none"] = "optimise"
    """The noise maps: found together with the latent, those stored in the network, or none."""
    seed: int = 0
    """From which all that is random follows."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Class number, for a conditional network: begin in the middle of that class; by default in the middle of all."""
    resize: Literal["lanczos", "box"] = "lanczos"
    """The filter that resizes pictures, as in `prepare`."""
    background: str = "#ffffff"
    """What transparent pictures are put on, as in `prepare`, unless the generator draws RGBA."""
    video: bool = False
    """Also film the search, as video.mp4."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "project")
    check(options)
    generator, about, folder = open_generator(options)
    device = next(generator.parameters()).device
    form = form_of(generator, about["channels"], options)
    targets = np.stack([read_target(path, form) for path in options.images])
    class_ = one_class(options.class_, about["class_names"])
    embed = pick_embedding(generator, folder, options.lpips, device)
    plan = Plan(space_of(generator, options.space), options.steps, options.seed, options.noise)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"Projecting {len(targets)} picture(s) into {plan.space} by {embed.name}.")
    results = []
    for start in range(0, len(targets), options.batch):
        numbers = range(start, min(start + options.batch, len(targets)))
        x = to_float(targets[numbers.start : numbers.stop], device)
        search = Projection(generator, embed, x, numbers, plan, class_)
        begin = search.distances()
        name = "video.mp4" if len(targets) <= options.batch else f"video-{start // options.batch}.mp4"
        optimise(search, x, options.out / name if options.video else None, f"{numbers.stop} of {len(targets)}")
        results.append(result(search, x, begin))
    write(options, plan, embed.name, folder, about, targets, results)
    return 0


def check(options: Arguments) -> None:
    """Raises ValueError for what can be told before the generator is there."""
    if not options.images:
        raise ValueError("say which pictures to project: styleloom project SNAPSHOT IMAGE... --out DIR")
    if options.steps < 1:
        raise ValueError("--steps is at least 1")
    if not 0 <= options.seed < 2**63:
        raise ValueError("--seed is 0 or more, and below 2^63")
    if options.video:
        check_film(options.out / "video.mp4", 30)


def form_of(G: Generator, channels: int, options: Arguments) -> Form:
    """What targets have to be like."""
    height, width = G.size
    return check_form(Form(width, height, channels, "png", None, options.resize, options.background))


def read_target(path: Path, form: Form) -> np.ndarray:
    """uint8 [C, H, W] of a picture. Raises ValueError naming it if it cannot be read, OSError if there is none."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name its pictures, such as {path}/*.png")
    try:
        return conform(path.read_bytes(), form).transpose(2, 0, 1)
    except ValueError as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from None


def to_float(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [N, C, H, W] -> fp32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).float() / 127.5 - 1


def space_of(G: Generator, asked: Literal["w", "w+"] | None) -> Literal["w", "w+", "z"]:
    """Says so where it is not what was asked for."""
    if G.has_w:
        return asked or "w"
    print(f"Note: this kind of generator has no w: projecting into z{f', not {asked}' if asked else ''}.")
    return "z"


def pick_embedding(G: Generator, folder: Path, lpips: Path | None, device: torch.device) -> Embedding:
    """By what images are compared. Says so where it is not LPIPS."""
    if lpips is not None:
        return load_lpips(lpips, device)
    discriminator = load_discriminator(folder)
    if discriminator is None:
        print("Note: without --lpips and without a discriminator in the snapshot, only pixels are compared.")
        return LaplacianPyramid(G.level + 1)
    print("Note: without --lpips FILE, the snapshot's own discriminator serves as the perceptual network.")
    return DiscriminatorFeatures(discriminator.to(device))


def optimise(search: Projection, targets: Tensor, video: Path | None, which: str) -> None:
    """All steps of a search, with progress, filmed if `video` is a path."""
    steps = search.plan.steps
    with tqdm(total=steps, unit="step", desc=f"projecting {which}") as bar:
        if video is None:
            for _ in range(steps):
                advance(search, bar)
            return
        every = -(-steps // 300)  # ten seconds
        write_film(video, filmed(search, targets, every, bar), -(-steps // every), fps=30)


def advance(search: Projection, bar: "tqdm[Any]") -> None:
    mean = search.step().mean().item()
    bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
    bar.update()


def filmed(search: Projection, targets: Tensor, every: int, bar: "tqdm[Any]") -> Iterator[Image.Image]:
    """Targets and what is found so far, after every so many steps and the last."""
    for step in range(search.plan.steps):
        advance(search, bar)
        if (step + 1) % every == 0 or step + 1 == search.plan.steps:
            pairs = torch.stack([targets, search.images()], dim=1).flatten(0, 1)
            yield image_grid(to_uint8(pairs), columns=2 * min(len(targets), 4), min_side=128)


def result(search: Projection, targets: Tensor, begin: Tensor) -> dict[str, Any]:
    """What came of a search: arrays, and lists of numbers under the key "each"."""
    images = search.images()
    mse = (images.clamp(-1, 1) - targets).square().mean(dim=[1, 2, 3]) / 4  # of values in 0 to 1
    each = {
        "distance_at_start": begin,
        "distance": search.distances(),
        "psnr_db": -10 * mse.clamp_min(1e-10).log10(),
        "offset_in_spreads": search.offsets(),
    }
    if search.maps:
        each["noise_autocorrelation"] = autocorrelation(search.maps)
    return {
        "ws": search.ws().cpu().numpy(),
        "maps": [x.detach().cpu().numpy() for x in search.maps],
        "images": to_uint8(images).numpy(),
        "each": {name: x.tolist() for name, x in each.items()},
    }


def write(
    options: Arguments,
    plan: Plan,
    compared_by: str,
    folder: Path,
    about: dict[str, Any],
    targets: np.ndarray,
    results: list[dict[str, Any]],
) -> None:
    """projected_w.npy, noise.npz, proj.png, projection.json; and says so."""
    with whole_file(options.out / "projected_w.npy") as path, open(path, "wb") as file:
        np.save(file, np.concatenate([some["ws"] for some in results]))
    layers = len(results[0]["maps"])
    if layers:
        maps: dict[str, Any] = {
            f"layer{i:02d}": np.concatenate([some["maps"][i] for some in results]) for i in range(layers)
        }
        with whole_file(options.out / "noise.npz") as path, open(path, "wb") as file:
            np.savez(file, **maps)
    else:
        (options.out / "noise.npz").unlink(missing_ok=True)  # of a search before this one
    images = np.concatenate([some["images"] for some in results])
    names = [path.name for path in options.images]
    with whole_file(options.out / "proj.png") as path:
        table(list(zip(targets, images, strict=True)), names, ["target", "projection"], 128).save(path, "PNG")
    each = {name: [x for some in results for x in some["each"][name]] for name in results[0]["each"]}
    lines = [
        {"picture": str(path), **{name: x[i] for name, x in each.items()}} for i, path in enumerate(options.images)
    ]
    facts = {
        "snapshot": str(folder), "nimg": about["nimg"], "space": plan.space, "steps": plan.steps, "seed": plan.seed,
        "noise": plan.noise if layers or plan.noise != "optimise" else "the generator has none",
        "compared_by": compared_by, "results": lines,
    }  # fmt: skip
    with whole_file(options.out / "projection.json") as path:
        path.write_text(json.dumps(facts, indent=1) + "\n")
    for line in lines:
        print(f"{line['picture']}: distance {line['distance_at_start']:.4f} -> {line['distance']:.4f}, "
              f"PSNR {line['psnr_db']:.1f} dB")  # fmt: skip
    noise = f" --noise-maps {options.out / 'noise.npz'}" if layers else " --noise none" if plan.noise == "none" else ""
    print(f"Written to {options.out}. To draw them again: styleloom generate {folder} --truncation 1 "
          f"--latents {options.out / 'projected_w.npy'}{noise} --out DIR")  # fmt: skip


if __name__ == "__main__":
    run(main, "project")
