"""What people look at: snapshots of the averaged generator, how good each is, and grids of fakes and reals."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ..datasets.batch import Bad
from ..datasets.cache import default_folder
from . import checkpoint, report, schedule
from .data import cache_of
from .draws import Draws
from .metrics.evaluation import Evaluation, check_metrics, never
from .metrics.features import load_inception
from .metrics.ppl import image_pairs, load_perceptual
from .metrics.reals import Records
from .metrics.samples import generated_images
from .metrics.swd import Descriptors, distance
from .networks.growing import Generator
from .trainer import Training

CHUNK = 16  # images at once
ROW = 8  # images of a level in growth.png
SCORED = 512  # images: fewer tell only very good from very bad
SCORED_PX = 64 * 64  # on a CPU, larger images would take minutes


class Snapshots:
    """Writes a training's snapshots, with a score by which the best is known: lower is better.

    The score is the first of `run.metrics`, where there is a network to measure by. Otherwise it is the sliced
    Wasserstein distance to the data set's first images (`metrics.swd.distance`), by their colours: a rough one, which
    sees colours, textures and severe collapse, not what a picture shows.

    Args:
        take: the next of some items, or None where a signal says not to wait for it any longer, as reals may not come.
        stopped: whether there was a signal.

    Raises:
        ValueError: the metrics cannot be had, such as without their networks.
    """

    def __init__(
        self,
        training: Training,
        take: Callable[[Iterator[Any]], Any | None] = next,
        stopped: Callable[[], bool] = never,
    ) -> None:
        self.training, self.take = training, take
        self.reals: dict[int, Descriptors] = {}  # by level: of the last one
        self.evaluation = evaluation_of(training, stopped)

    def write(self, writer: report.Writer | None, at_stop: bool = False) -> None:
        """Writes a snapshot and a grid of samples. To be called by all processes; the main one has the writer.

        at_stop: because the run is stopped: at once, without a score, and only if there is none yet.
        """
        training = self.training
        folder = Path(training.run.out) / "snapshots"
        if at_stop and (folder / checkpoint.name_of(training.nimg)).exists():
            return  # with its score
        score, name = (None, "") if at_stop else self.scored()
        training.team.place.at("writing a snapshot")
        if not writer:
            return
        m, run, recipe = training.manifest, training.run, training.recipe
        checkpoint.save_snapshot(
            folder, training.average, recipe.networks[recipe.discriminator], run, training.nimg,
            training.width, training.height, m.channels, m.class_names if run.data.labels else [],
            score, name, at_stop, training.averages,
        )  # fmt: skip
        checkpoint.retain_snapshots(folder, run.keep_snapshots)
        writer.picture(f"fakes-{training.nimg:09d}", sample_grid(training), training.nimg)

    def scored(self) -> tuple[float | None, str]:
        """(score, name of its measure with the number of images). To be called by all; None but on the main process."""
        if self.evaluation:
            first, n = self.training.run.metrics.names[0], self.training.run.metrics.images
            return self.measured(n).get(first), f"{first}-{n}"
        n = self.scored_images()
        score = self.score(n) if n else None
        if score is not None:
            report.report("swd", score)
        return score, f"swd-{n}" if n else ""

    def estimate(self, before: int, nimg: int) -> None:
        """Measures fewer images, if it is time by `metrics.tick_kimg` in a tick that went from `before` to `nimg`. To
        be called by all."""
        settings = self.training.run.metrics
        if self.evaluation and schedule.crossed(before, nimg, round(settings.tick_kimg * 1000)):
            self.measured(settings.tick_images)

    def measured(self, n: int) -> dict[str, float]:
        """The run's metrics of n generated images, which are also reported as METRIC-n. Empty but on the main process,
        and if a signal came. To be called by all."""
        training, evaluation, m = self.training, self.evaluation, self.training.run.metrics
        G = training.average
        assert evaluation
        assert isinstance(G, Generator)
        place, manifest, reduce = training.opened(training.stage.level)
        records = Records(os.fspath(place), manifest, m.images, False, cache_of(training.run), reduce)
        counts = manifest.class_counts if training.recipe.c_dim else []
        reals = evaluation.reals(records.identity, records.count, records)
        fakes = lengths = None
        if reals:
            # The images that `styleloom evaluate` draws of the snapshot.
            fakes = evaluation.fakes(None, n, lambda rows: generated_images(G, Draws(0, "evaluate", rows), counts))
        if fakes and "ppl" in m.names:
            lengths = evaluation.lengths(
                None, n, lambda rows: image_pairs(G, Draws(0, "path", rows), counts, "end", CHUNK)
            )
        if not fakes or ("ppl" in m.names and not lengths) or not training.team.main:
            return {}
        values = evaluation.measure(m.names, reals, fakes, lengths)
        for name, value in values.items():
            report.report(f"{name}-{n}", value)
        return values

    def scored_images(self) -> int:
        """How many images a score takes."""
        training = self.training
        small = math.prod(training.recipe.G.size) <= SCORED_PX
        automatic = SCORED if small or training.team.device.type == "cuda" else 0
        return automatic if training.run.score_images < 0 else training.run.score_images

    def score(self, n: int) -> float | None:
        """The distance of n generated images, always from the same latents, to n real ones. None on all but the main
        process, and if a signal came. To be called by all: each makes its share."""
        training, level = self.training, self.training.stage.level
        if level not in self.reals:
            found = self._described(
                "looking at reals", n, lambda positions: reals(training, level, positions, prefetch=True)
            )
            if found is None:
                return None
            self.reals = {level: found}
        its = self._described("looking at fakes", n, lambda positions: fakes(training, "score", positions))
        if its is None or not training.team.main:
            return None
        return distance(self.reals[level], its, projections=128, normalise_by="reals")["swd/mean"]

    def add_level(self, writer: report.Writer | None, last: bool) -> None:
        """Draws what a level has come to as a row of `samples/growth.png`, under those of the levels before it.

        For the end of a stage, of runs that grow; it does so before the next level comes, and at the run's end (last).
        """
        training, level = self.training, self.training.stage.level
        following = training.stages(training.nimg)[0][1].level
        if not writer or len(training.data) == 1 or not (last or following > level):
            return
        row = report.image_grid(fakes(training, "grid", range(ROW)), columns=ROW, min_side=1)
        writer.picture(f"growth-{training.px(level):04d}", row, training.nimg, shown=False)
        sizes = [training.px(each) for each in range(level + 1)]
        rows = {px: writer.samples / f"growth-{px:04d}.png" for px in sizes}
        strips = [(f"{px} px", path) for px, path in rows.items() if path.exists()]
        writer.picture("growth", report.strips(strips), training.nimg)

    def _described(self, what: str, n: int, images: Callable[[range], Tensor]) -> Descriptors | None:
        """Of the first n of some images, from all processes; empty on all but the main one. None if a signal came."""
        team = self.training.team
        step = CHUNK * team.world
        chunks = [range(start + team.rank, min(start + step, n), team.world) for start in range(0, n, step)]
        mine: Descriptors | None = Descriptors(patches=64)
        for positions in filter(len, chunks):
            team.place.at(what)
            made = self.take(map(images, [positions]))
            if made is None:
                mine = None
                break
            mine.add(made, positions)
        whole = Descriptors(patches=64)
        for each in team.gather([mine]):
            if each is None:
                return None
            if team.main:
                whole.merge(each)
        return whole


def evaluation_of(training: Training, stopped: Callable[[], bool] = never) -> Evaluation | None:
    """What measures by the run's feature network; None if it names none. Raises ValueError if that cannot be had."""
    m, team = training.run.metrics, training.team
    if not m.inception:
        return None
    network = load_inception(Path(m.inception), team.device)
    perceptual = load_perceptual(Path(m.lpips) if m.lpips else None, team.device) if "ppl" in m.names else None
    check_metrics(m.names, network, min(m.images, m.tick_images, training.manifest.count))
    cache = Path(m.cache) if m.cache else default_folder().with_name("features")
    return Evaluation(team, network, perceptual, cache, m.resize, stopped=stopped)


@torch.no_grad()
def fakes(training: Training, purpose: str, positions: range) -> Tensor:
    """uint8 [n, C, H, W] of the averaged generator, from latents that stay the same throughout the run."""
    draws = Draws(training.run.seed, purpose, positions, training.team.device)
    z, labels = draws.normal(training.recipe.z_dim), training.recipe.labels(draws)
    images = [training.average(a, b) for a, b in zip(z.split(CHUNK), labels.split(CHUNK), strict=True)]
    return torch.cat([report.to_uint8(x) for x in images])


def reals(training: Training, level: int, positions: range, prefetch: bool = False) -> Tensor:
    """uint8 [n, C, H, W], on the CPU: the images at these positions of the stream, of the size of a level.

    prefetch: fetch remote shards in a thread, so that a signal ends the waiting for them; not before the processes that
    read data are there: they would be forked in the midst of it.
    """
    bad: list[Bad] = []
    its = training.batches(
        level,
        start=positions[0] - positions[0] % positions.step,
        batch=len(positions) * positions.step,
        rank=positions[0] % positions.step,
        world=positions.step,
        prefetch=prefetch,
        report_bad=bad.append,
    )
    with contextlib.closing(its):
        images, _ = next(its)
    training.tell_of(bad)
    return images.cpu()


def sample_grid(training: Training) -> Image:
    columns = grid_columns(training.width)
    return report.image_grid(fakes(training, "grid", range(columns**2)), columns)


def real_grid(training: Training) -> Image:
    """The first images of the stream, of full size."""
    columns = grid_columns(training.width)
    return report.image_grid(reals(training, training.recipe.levels - 1, range(columns**2)), columns)


def grid_columns(width: int) -> int:
    """Columns (and rows) of a sample grid about 2048 px wide, 4 to 8."""
    return min(max(2048 // width, 4), 8)
