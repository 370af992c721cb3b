"""`styleloom evaluate SNAPSHOT --data DATASET --metrics fid,kid,is,pr,ppl`"""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from styleloom.datasets.cache import default_folder
from styleloom.datasets.manifest import FILE, read_manifest
from styleloom.datasets.pictures import load
from styleloom.datasets.sources import FolderSource, Source, open_source
from styleloom.datasets.storage import is_remote
from styleloom.scripts.cli import parse, run
from styleloom.training.checkpoint import find_snapshot, load_generator
from styleloom.training.config import Data
from styleloom.training.draws import Draws
from styleloom.training.metrics.evaluation import Evaluation, Features, check_metrics
from styleloom.training.metrics.features import file_hash, load_inception
from styleloom.training.metrics.ppl import image_pairs, load_perceptual
from styleloom.training.metrics.reals import Chosen, Records
from styleloom.training.metrics.samples import generated_images

OF_REALS = {"fid", "kid", "pr"}  # metrics that compare with real images


@dataclass(frozen=True)
class Arguments:
    """Measures snapshots, or folders of pictures, against a data set: a JSON line on stdout for each metric.

    On several processes (torchrun ... -m styleloom.scripts.evaluate ...) each does its share."""

    snapshots: tyro.conf.Positional[tuple[str, ...]]
    """Snapshot folders; of a run's folder its newest snapshot. Or folders of pictures, or prepared data sets."""
    data: str
    """What is compared with: a data set made by styleloom prepare, or a folder (or .zip, .tar) of pictures."""
    metrics: str = "fid"
    """Which, with commas: fid, kid, is (Inception Score), pr (precision and recall), ppl (path length)."""
    images: int = 50_000
    """Generated images, and real ones at most: of more, a fixed random choice. For ppl: steps."""
    inception: Path | None = None
    """The feature network's file (a TorchScript program: take it only from whom you trust); by default
    inception-2015-12-05.pt or default_1.pt in networks/ in STYLELOOM_CACHE or ~/.cache/styleloom."""
    lpips: Path | None = None
    """The perceptual network's file, for ppl; by default vgg16.pt in the same folder."""
    resize: Literal["clean", "legacy"] = "clean"
    """How images come to the feature network's size: as clean-fid does, or as the first implementation of the FID."""
    truncation: float = 1.0
    """truncation_psi; published figures are without truncation: 1. Not for ppl."""
    noise: Literal["random", "const", "none"] = "random"
    """The noise maps of generated images: drawn for each, as published figures are, those stored, or none."""
    path: Literal["end", "full"] = "end"
    """Where the steps of ppl begin: at latents as they are drawn, or anywhere between two."""
    mirror: bool = False
    """Measure each real image twice, as it is and flipped left to right."""
    seed: int = 0
    """Generated images, steps and subsets follow from it."""
    cache: Path | None = None
    """Folder for what is finished: a killed evaluation goes on there, and real images are measured once. By default
    features/ in STYLELOOM_CACHE or ~/.cache/styleloom."""
    batch: int = 16
    """Images that the generator makes at a time."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "evaluate")
    names = list(dict.fromkeys(name.strip() for name in options.metrics.split(",")))
    check_options(options, names)
    from styleloom.training.distributed import Team  # after the arguments: a typo should not cost the imports

    team = Team()
    inception = load_inception(options.inception, team.device) if set(names) - {"ppl"} else None
    perceptual = load_perceptual(options.lpips, team.device) if "ppl" in names else None
    data = open_images(options.data, options.images, options.mirror)
    subjects = [open_subject(place, options, data, team.device) for place in options.snapshots]
    for each in subjects:
        check_metrics(names, inception, each.count)
        check_metrics([name for name in names if name in OF_REALS], None, data.count)
        if "ppl" in names and not isinstance(each, Drawn):
            raise ValueError(f"ppl is measured of a snapshot, and {each.place} holds pictures: leave it out")
        if each.note and team.main:
            print(f"Note: {each.note}.", file=sys.stderr)
    cache = options.cache or default_folder().with_name("features")
    evaluation = Evaluation(team, inception, perceptual, cache, options.resize)
    reals = evaluation.reals(data.identity, data.count, data) if OF_REALS & set(names) else None
    for each in subjects:
        start = time.perf_counter()
        fakes, lengths = features(evaluation, each, names)
        for line in lines(evaluation, names, reals, fakes, lengths, options) if team.main else ():
            print(json.dumps({**line, **each.about, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
    team.close()
    return 0


def check_options(options: Arguments, names: list[str]) -> None:
    """Raises ValueError for what can be seen to be wrong at once."""
    check_metrics(names, None, options.images)
    if not options.snapshots:
        raise ValueError("name a snapshot's or a run's folder, or a folder of pictures")
    if options.batch < 1:
        raise ValueError("--batch is at least 1")
    if not math.isfinite(options.truncation):
        raise ValueError("--truncation is a number such as 0.7")
    if not 0 <= options.seed < 2**32:
        raise ValueError("--seed is 0 to 2^32 - 1")


class Pictures(Chosen):
    """Pictures of any sizes, upright and in sRGB, in the order of their names."""

    def __init__(self, place: str, source: Source, limit: int, mirror: bool) -> None:
        self.source = source
        files = [source.root / entry.name if isinstance(source, FolderSource) else Path(entry.archive or source.root)
                 for entry in source.entries]  # fmt: skip
        times = [file.stat().st_mtime_ns for file in dict.fromkeys(files)]
        super().__init__(place, ["pictures", source.digest, times], len(source), limit, mirror)

    def image(self, number: int) -> Tensor:
        name = self.source.entries[number].name
        try:
            picture = load(self.source.read(number))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.place}: {name}: {error}. Take it out, or mend it.") from None
        colour = picture.colour
        if picture.alpha:
            colour = colour.convert("RGBA")
            colour.putalpha(picture.alpha)
        pixels = np.array(colour)
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


class Drawn:
    """Images of a snapshot's generator. Attributes as those of `Chosen`.

    Args:
        data: says how frequent the generator's classes are to be.
    """

    def __init__(self, place: str, options: Arguments, data: Records | Pictures, device: torch.device) -> None:
        folder = find_snapshot(Path(place))
        self.generator, about = load_generator(folder)
        self.generator.to(device)
        self.place, self.options, self.count = place, options, options.images
        self.class_counts, uniform = frequencies(about["class_names"], data)
        without_w = options.truncation != 1 and not self.generator.has_w
        notes = [
            f"{data.place} does not have the classes of {folder}: all are equally frequent" if uniform else "",
            "this kind of generator has no w, so --truncation changes nothing" if without_w else "",
            size_note(self.generator.size, data),
        ]
        self.note = "; ".join(filter(None, notes))
        o, weights = options, file_hash(folder / "generator.safetensors")
        settings = [o.seed, o.truncation, o.noise, self.class_counts]
        self.identity = json.dumps([weights, about["level"], about["alpha"], *settings])
        self.path_identity = json.dumps([weights, about["level"], about["alpha"], o.seed, o.path, self.class_counts])
        self.about: dict[str, Any] = {
            "images": self.count, "snapshot": str(folder), "nimg": about["nimg"], "truncation": o.truncation,
        }  # fmt: skip

    def __call__(self, positions: range) -> list[Tensor]:
        o = self.options
        draws = Draws(o.seed, "evaluate", positions)
        images = generated_images(
            self.generator, draws, self.class_counts, truncation=o.truncation, noise=o.noise, batch=o.batch
        )
        return list(images)

    def pairs(self, positions: range) -> tuple[Tensor, Tensor]:
        """Both ends of steps, as `image_pairs`."""
        draws = Draws(self.options.seed, "path", positions)
        return image_pairs(self.generator, draws, self.class_counts, self.options.path, self.options.batch)


def size_note(size: tuple[int, int], data: Records | Pictures) -> str:
    """What to tell of a generator's (height, width), if it is not that of the data."""
    if not isinstance(data, Records) or size == (data.view.height, data.view.width):
        return ""
    theirs = f"{data.view.width}x{data.view.height}"
    return (
        f"the generator's images have {size[1]}x{size[0]} px, those of {data.place} {theirs}: each is measured as it is"
    )


def frequencies(class_names: list[str], data: Records | Pictures) -> tuple[list[int], bool]:
    """(how frequent a generator's classes are in the data, by their names; whether the data does not say it, and each
    has 1)."""
    manifest = data.manifest if isinstance(data, Records) else None
    counts = dict(zip(manifest.class_names, manifest.class_counts, strict=True)) if manifest else {}
    if set(class_names) <= set(counts) and sum(counts[name] for name in class_names):
        return [counts[name] for name in class_names], False
    return [1 for _ in class_names], bool(class_names)


def open_images(place: str, limit: int, mirror: bool = False) -> Records | Pictures:
    """A prepared data set, or a folder, .zip or .tar of pictures. Raises ValueError if there is neither."""
    if is_remote(place) or (Path(place) / FILE).is_file():
        cache = str(default_folder()), int(Data().cache_gb * 1e9)
        return Records(place, read_manifest(place), limit, mirror, cache)
    if is_snapshot(place):
        raise ValueError(f"{place} is a run or a snapshot, not a data set or pictures")
    return Pictures(place, open_source(place, "none"), limit, mirror)


def is_snapshot(place: str) -> bool:
    path = Path(place)
    return (path / "snapshot.json").is_file() or (path / "snapshots").is_dir() or (path / "run.json").is_file()


def open_subject(
    place: str, options: Arguments, data: Records | Pictures, device: torch.device
) -> Drawn | Records | Pictures:
    """What is to be measured. Raises ValueError if it is not there."""
    if is_snapshot(place):
        return Drawn(place, options, data, device)
    if not is_remote(place) and not Path(place).exists():
        raise ValueError(f"there is no {place}: name a snapshot's or a run's folder, or a folder of pictures")
    return open_images(place, options.images)


def features(
    evaluation: Evaluation, subject: Drawn | Records | Pictures, names: list[str]
) -> tuple[Features | None, Features | None]:
    """(features of a subject's images, its path lengths), as far as the metrics need them."""
    fakes = lengths = None
    if set(names) - {"ppl"}:
        collect = evaluation.fakes if isinstance(subject, Drawn) else evaluation.reals
        fakes = collect(subject.identity, subject.count, subject)
    if isinstance(subject, Drawn) and "ppl" in names:
        lengths = evaluation.lengths(subject.path_identity, subject.count, subject.pairs)
    return fakes, lengths


def lines(
    evaluation: Evaluation,
    names: list[str],
    reals: Features | None,
    fakes: Features | None,
    lengths: Features | None,
    options: Arguments,
) -> Iterator[dict[str, Any]]:
    """What is printed of each metric, as soon as it is calculated."""
    inception, perceptual = evaluation.network, evaluation.perceptual
    for name in names:
        values = evaluation.measure([name], reals, fakes, lengths, options.seed)
        if name == "ppl":
            assert perceptual is not None
            yield {"metric": name, "value": values[name], "sampling": options.path, "network": perceptual.name}
            continue
        assert inception is not None
        how: dict[str, Any] = {"resize": options.resize, "network": inception.name}
        if name == "is":
            # There are no figures by which a head could be recognised.
            head = {"classifier": f"unverified head of {inception.file}"}
            yield {"metric": name, "value": values["is"], "std": values["is_std"], **how, **head}
            continue
        assert reals is not None
        how["reals"] = reals.count
        if name == "pr":
            how["features"] = "Inception's, where the paper takes VGG-16's"
        yield from ({"metric": metric, "value": value, **how} for metric, value in values.items())


if __name__ == "__main__":
    run(main, "evaluate")
