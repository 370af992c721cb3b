"""`styleloom bench model --levels`: networks that grow, at each of their sizes, and the time of the whole schedule."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from styleloom.scripts import bench_model
from styleloom.scripts.bench_model import Steps, measure_stage, random_images, settled, timed
from styleloom.scripts.bench_show import Row, Table, line, number, progress, text, titles
from styleloom.training import recipes, schedule
from styleloom.training.config import Growth, Run
from styleloom.training.networks.growing import start_size
from styleloom.training.schedule import Stage

_ALPHA = 0.5  # weight of a level that fades in


@dataclass(frozen=True)
class Levels:
    """Networks that grow."""

    levels: bool = False
    """Measure a run that grows, at each of its sizes (a process each): whole, while the newest level fades in, and the
    change from one to the next. --batch then replaces the batches of all sizes."""
    start: int = 0
    """With --levels, the size in px to grow from, as growth.start of a run; 0: that of the preset."""
    kimg: float = 0.0
    """With --levels, the length of the run in thousands of images, to which the time at each size is shortened or
    lengthened in proportion; 0: that of the preset."""
    sizes: tuple[int, ...] = ()
    """With --levels, measure only these sizes, in px as growth.start counts them; then nothing is said of the whole."""


def settings(options: Levels, base: Run, batch: int | None, size: int) -> dict[str, Any]:
    """Fields of the run to measure, by which it grows, or not at all.

    Args:
        base: the preset.
        batch: images at every size; None: those of the schedule.
        size: largest width and height in px.

    Raises:
        ValueError: there is nothing that grows, or something is given for it without --levels.
    """
    if not options.levels:
        if options.start or options.kimg or options.sizes:
            raise ValueError("--start, --kimg and --sizes are for networks that grow: give --levels as well")
        return {"growth": Growth()}
    growth = base.growth.model_dump() | ({"start": options.start} if options.start else {})
    if not growth["start"]:
        raise ValueError(f"--levels: the preset {base.preset} does not grow: give --start PX, the size to grow from")
    if batch is not None:
        *_, levels = start_size(size, size)
        growth["batch"] = tuple((4 << level, batch) for level in range(levels))
    share = (options.kimg or base.total_kimg) / base.total_kimg
    growth |= {name: growth[name] * share for name in ("stabilise_kimg", "fade_kimg")}
    return {"growth": growth, "total_kimg": base.total_kimg * share}


def sizes(options: Levels, run: Run, size: int) -> list[int]:
    """In px as growth.start counts them: those to measure. Raises ValueError if the run has no such sizes."""
    *_, levels = start_size(size, size)
    there = [4 << level for level in range(schedule.first_level(run, levels), levels)]
    for px in options.sizes:
        if px not in there:
            raise ValueError(f"--sizes {px}: the run has {', '.join(map(str, there))} px")
    return [px for px in there if px in (options.sizes or there)]


def spans(run: Run, levels: int) -> list[tuple[Stage, float]]:
    """(stage, thousands of images that the run shows in it) of all stages, also of those it ends before."""
    total = round(run.total_kimg * 1000)
    starts, stages = zip(*schedule.stages(run, levels, 0), strict=True)
    ends = itertools.pairwise([*(min(start, total) for start in starts), total])
    return [(stage, (end - start) / 1000) for stage, (start, end) in zip(stages, ends, strict=True)]


def measure(run: Run, size: int, px: int, device: torch.device, rounds: int, rate: float, bar: tqdm) -> list[Row]:
    """A row for each stage of one size: where it fades in, and where it is whole. On one device, without data set and
    averaging.

    Args:
        size: width and height in px of the whole networks.
        px: the size to measure, as growth.start counts it.
        rounds, rate, bar: as of `bench_model.measure`.
    """
    before = settled(device)
    recipe = recipes.build(run, size, size, 3, [], device)
    steps, rows = Steps(recipe, run.seed, random_images(recipe, recipe.stage, device)), []
    stages = spans(run, recipe.levels)
    here = [i for i, (stage, _) in enumerate(stages) if stage.px == px]
    bar.total = len(here) * (rounds + 1) * len(recipe.phases)
    for i in range(max(here[0] - 1, 0), here[-1] + 1):  # the stage before, too, from which the first one is entered
        stage, kimg = stages[i]
        changed = change(steps, stage, device)
        if i in here:
            found = measure_stage(steps, rounds, rate, before, bar)
            rows.append(row_of(stage, recipe.G.size[1], kimg, found, changed if i else None))
    return rows


def change(steps: Steps, stage: Stage, device: torch.device) -> float:
    """Seconds that it takes to go over to a stage as training does, and for a first iteration, of all phases."""
    images = random_images(steps.recipe, stage, device)

    def enter() -> None:
        steps.enter(stage, _ALPHA if stage.fading else 1.0, images)
        for phase in steps.recipe.phases:
            steps.run(phase, 0)

    return timed(enter, device)[0]


def row_of(stage: Stage, resolution: int, kimg: float, found: Sequence[Row], changed: float | None) -> Row:
    """What was measured of a stage.

    Args:
        resolution: its images' width in px.
        kimg: thousands of images that the run shows in it.
        found: rows of `bench_model.measure_stage`.
        changed: seconds to enter it and for a first iteration, in which all phases ran; None at a run's beginning.
    """
    *phases, whole = found
    row = {name: value for name, value in whole.items() if name not in ("phase", "images")}
    row = {"px": stage.px, "resolution": resolution, "fading": stage.fading, "batch": stage.batch, "kimg": kimg} | row
    extra = None if changed is None else changed - sum(phase["seconds"] for phase in phases)
    return row | {
        "sec_per_kimg": row["seconds"] / stage.batch * 1000, "change_seconds": extra,
        "change_share": None if extra is None else extra / row["seconds"], "phases": phases,
    }  # fmt: skip


def measure_in_children(
    arguments: list[str], options: Levels, start: int, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """What `styleloom bench model --levels` says of each size in px, in a process each.

    Args:
        arguments: of those processes, besides what follows from `options`.
        start: size in px that the run grows from.
    """
    more = ["--levels", "--start", str(start), "--kimg", str(options.kimg), "--sizes"]
    commands = {(px, "px"): ([*arguments, *more, str(px)], {}) for px in sizes}
    found = []
    with progress(len(sizes), "sizes") as bar:
        for _, one in bench_model.in_children(commands, 1):
            found.append(one)
            bar.update()
    return found


def together(found: Sequence[dict[str, Any]], precision: str, complete: bool) -> dict[str, Any]:
    """Measurements of several sizes as one, with a summary if they are all."""
    rows = [row for one in found for row in one["rows"]]
    matrix = {precision: max(one["ceiling"]["matrix"][precision] for one in found)}
    whole = {"summary": summary(rows)} if complete else {}
    return found[0] | {"ceiling": found[0]["ceiling"] | {"matrix": matrix}, "rows": rows} | whole


def summary(rows: Sequence[Row]) -> Row:
    """The time of the schedule, from all its rows, beside that of as many images at the full size alone.

    Returns:
        Thousands of images; hours as they are scheduled, and all at the full size with its batch; how many times as
        long the latter is; the largest share of an iteration that a change took, None without one.
    """
    grown, full = sum(row["kimg"] * row["sec_per_kimg"] for row in rows), rows[-1]["sec_per_kimg"]
    kimg = sum(row["kimg"] for row in rows)
    shares = [row["change_share"] for row in rows if row["change_share"] is not None]
    return {
        "kimg": kimg, "grown_hours": grown / 3600, "full_hours": kimg * full / 3600, "ratio": kimg * full / grown,
        "largest_change_share": max(shares, default=None),
    }  # fmt: skip


def describe(found: dict[str, Any], options: Levels, batch: int | None) -> list[str]:
    """The table, and lines after it."""
    growth = found["settings"]["growth"]
    lines = [titles(TABLE), *(line(TABLE, row) for row in found["rows"])]
    lines.append(
        "A change: what entering the stage and its first iteration, with all phases, take beyond the same phases "
        "later. A step: an iteration with lazy phases averaged in."
    )
    if batch is not None:
        lines.append(f"--batch: {batch} images at every size, whatever the schedule says.")
    if options.kimg:
        lines.append(f"--kimg: all stages are scaled in proportion to the length of {options.kimg:g} kimg.")
    whole, top = found.get("summary"), found["rows"][-1]
    if whole:
        lines.append(
            f"{whole['kimg']:,g} kimg, of which at each size {growth['stabilise_kimg']:g} whole and "
            f"{growth['fade_kimg']:g} before it to fade in: {whole['grown_hours']:.3g} hours; all at "
            f"{top['resolution']} px with batch {top['batch']}: {whole['full_hours']:.3g} hours, {whole['ratio']:.2f} "
            "times as long."
        )
    return lines


def phase_seconds(row: Row) -> str:
    """Of each phase; of lazy ones also every how many iterations."""
    names = [f"{each['phase']}/{each['interval']}".removesuffix("/1") for each in row["phases"]]
    return ", ".join(f"{name} {each['seconds']:.3g}" for name, each in zip(names, row["phases"], strict=True))


TABLE: Table = [
    ("px", 4, text("px")),
    ("stage", -6, lambda row: "fading" if row["fading"] else "whole"),
    ("batch", 5, text("batch")),
    ("kimg", 8, number("kimg", ",.6g")),
    ("s/kimg", 9, number("sec_per_kimg", ",.2f")),
    ("img/s", 8, number("img_per_s", ",.1f")),
    ("GiB", 6, number("peak_bytes", ".2f", 2**-30)),
    ("change s", 8, number("change_seconds", ".3f")),
    ("of a step", 9, number("change_share", ".0%")),
    ("seconds of the phases", -21, phase_seconds),
]
