"""`styleloom bench model`: whole training phases on random images, and an iteration with lazy phases averaged in."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from styleloom.ops.memory import give_back_freed_memory, peak_memory
from styleloom.scripts.bench_ops import counted, plain
from styleloom.scripts.bench_show import Row, Table, number, text
from styleloom.training import recipes
from styleloom.training.config import Run
from styleloom.training.distributed import Replicated, Team
from styleloom.training.draws import Draws
from styleloom.training.phases import Batch, Phase, run_phase
from styleloom.training.recipes.recipe import Recipe
from styleloom.training.report import collect
from styleloom.training.schedule import Stage

ITERATION = "iteration"  # the row of all phases, each divided by its interval
NOT_KEPT = ", memory not kept"


def measure(run: Run, size: int, device: torch.device, rounds: int, rate: float, bar: tqdm) -> list[Row]:
    """A row for each phase and one for the iteration, on one device, without data set and averaging.

    Args:
        size: width and height in px.
        rounds: runs of each phase after a first one; the fastest counts.
        rate: FLOP/s of matrices in the run's precision.
        bar: shows how far it is.
    """
    before = settled(device)
    recipe = recipes.build(run, size, size, 3, [], device)
    bar.total = (rounds + 1) * len(recipe.phases)
    steps = Steps(recipe, run.seed, random_images(recipe, recipe.stage, device))
    return measure_stage(steps, rounds, rate, before, bar)


def settled(device: torch.device) -> int:
    """Bytes of memory in use. From here on `peak_memory` counts anew."""
    give_back_freed_memory(every=0.0)  # what was measured before may have left more than the networks will need
    peak_memory(device)
    return peak_memory(device)  # now, as the call before set it back


def random_images(recipe: Recipe, stage: Stage, device: torch.device) -> Tensor:
    """A batch [n, 3, h, w] of a stage, in [-1, 1]."""
    return torch.rand(stage.batch, 3, *recipe.G.size_at(stage.level), device=device) * 2 - 1


class Steps:
    """Runs phases of the stage that a recipe is in, always on the same images [n, 3, h, w]."""

    def __init__(self, recipe: Recipe, seed: int, images: Tensor) -> None:
        self.recipe, self.seed, self.team = recipe, seed, Team()
        self._begin(images)

    def _begin(self, images: Tensor) -> None:
        recipe = self.recipe
        self.images = recipe.shown(images)
        self.updaters = {n: Replicated(self.team, recipe.networks[n], x) for n, x in recipe.optimizers.items()}

    def enter(self, stage: Stage, alpha: float, images: Tensor) -> None:
        """Goes over to a stage and its images, as training does."""
        for updater in self.updaters.values():
            updater.close()
        self.updaters = {}
        self.recipe.enter(stage, alpha)
        give_back_freed_memory(every=0.0)
        self._begin(images)

    def run(self, phase: Phase, i: int) -> None:
        """A phase of iteration `i`, with its step."""
        first, labels = i * len(self.images), self.images.new_zeros(phase.batch, 0)
        draws = Draws(self.seed, phase.name, range(first, first + phase.batch), self.images.device)
        batch = Batch(self.images[: phase.batch], labels, draws)
        run_phase(phase, self.recipe.networks, self.updaters[phase.trains], [batch])


def measure_stage(steps: Steps, rounds: int, rate: float, before: int, bar: tqdm) -> list[Row]:
    """Rows as of `measure`, of the stage that the recipe is in.

    Args:
        before: bytes of memory that were in use before there were networks.
    """
    recipe, device = steps.recipe, steps.images.device
    flops = {phase.name: count(phase, recipe) for phase in recipe.phases}
    peak_memory(device)  # what was before does not count
    best: dict[str, tuple[float, float]] = {}
    peaks = dict.fromkeys((phase.name for phase in recipe.phases), 0)
    for i in range(rounds + 1):
        for phase in recipe.phases:
            took = timed(partial(steps.run, phase, i), device)
            if device.type == "cuda":
                peaks[phase.name] = max(peaks[phase.name], peak_memory(device))
            if i:
                wall, cpu = best.get(phase.name, took)
                best[phase.name] = min(wall, took[0]), min(cpu, took[1])
            bar.update()
    if device.type == "cpu":
        peaks = dict.fromkeys(peaks) | {ITERATION: peak_memory(device) - before}
    else:
        peaks |= {ITERATION: max(peaks.values())}
    rows = [
        {
            "phase": phase.name, "images": phase.batch, "interval": phase.interval, "seconds": best[phase.name][0],
            "cpu_seconds": best[phase.name][1] if device.type == "cpu" else None, "flops": flops[phase.name],
            "peak_bytes": peaks[phase.name],
        }
        for phase in recipe.phases
    ]  # fmt: skip
    return rates([*rows, {"phase": ITERATION, "images": len(steps.images), "peak_bytes": peaks[ITERATION]}], rate)


def rates(rows: Sequence[Row], rate: float) -> list[Row]:
    """Adds what follows from the times: the iteration's, and images and FLOPs a second."""
    *phases, iteration = (dict(row) for row in rows)
    for key in ("seconds", "cpu_seconds", "flops"):
        values = [row[key] for row in phases]
        whole = None if None in values else sum(v / row["interval"] for v, row in zip(values, phases, strict=True))
        iteration[key] = whole
    for row in (*phases, iteration):
        cpu = row["cpu_seconds"]
        speed = row["flops"] / row["seconds"]
        row |= {"img_per_s": row["images"] / row["seconds"], "img_per_cpu_s": row["images"] / cpu if cpu else None}
        row |= {"flop_per_s": speed, "matrix_share": speed / rate}
    return [*phases, iteration]


def count(phase: Phase, recipe: Recipe) -> int:
    """FLOPs of a phase of the recipe's stage in the plain formulation (its optimizer has none worth counting); computes
    nothing."""
    for name, network in recipe.networks.items():
        network.requires_grad_(name == phase.trains)
    parameters = list(recipe.networks[phase.trains].parameters())
    device = parameters[0].device

    def step() -> None:
        images = torch.zeros(phase.batch, 3, *recipe.G.size, device=device)
        draws = Draws(0, phase.name, range(phase.batch), device)
        loss = phase.loss(Batch(images, images.new_zeros(phase.batch, 0), draws)).per_sample.sum()
        torch.autograd.grad(loss, parameters, allow_unused=True)

    with plain():
        flops = counted(step)
    collect(lambda reported: {})  # the statistics that it reported are of no value
    return flops


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(seconds, seconds of CPU over all threads) of a call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000, 0.0
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


# Several configurations: a process for each, so that neither memory nor what was compiled is shared.


def in_children(
    commands: dict[tuple[Any, ...], tuple[list[str], dict[str, str]]], repeats: int, what: str = "model"
) -> Iterator[Any]:
    """Runs `styleloom bench WHAT` with the (arguments, environment) of each, in turns: A B A B.

    Yields:
        (key, what it measured), `repeats` times each.

    Raises:
        ValueError: one of them failed; in its words.
    """
    for _ in range(repeats):
        for key, (arguments, environment) in commands.items():
            done = subprocess.run(
                [sys.executable, "-m", "styleloom.scripts.bench", what, *arguments, "--json", "-"],
                env=os.environ | environment, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                said = done.stderr.strip().splitlines() or [f"ended with status {done.returncode} (out of memory?)"]
                raise ValueError(f"{' '.join(map(str, key))}: {said[-1]}")
            yield key, json.loads(done.stdout)


def best_of(measured: Sequence[list[Row]], rate: float) -> list[Row]:
    """One configuration's rows from several measurements of it: the fastest run of each phase, the largest peaks."""
    rows = [dict(row) for row in measured[0]]
    for i, row in enumerate(rows):
        for key, pick in (("seconds", min), ("cpu_seconds", min), ("peak_bytes", max)):
            row[key] = None if row[key] is None else pick(each[i][key] for each in measured)
    return rates(rows, rate)


def join(measured: Sequence[dict[str, Any]], precision: str) -> dict[str, Any]:
    """Several measurements of a configuration as one."""
    rate = max(one["ceiling"]["matrix"][precision] for one in measured)
    ceiling = measured[0]["ceiling"] | {"matrix": {precision: rate}}
    return measured[0] | {"ceiling": ceiling, "rows": best_of([one["rows"] for one in measured], rate)}


def compare(iterations: dict[str, Row]) -> Row:
    """How many times as many images a CPU-second (on a GPU: a second) ours has as each other formulation."""
    ours = iterations["ours"]
    key = "img_per_s" if ours["img_per_cpu_s"] is None else "img_per_cpu_s"
    others = {way: ours[key] / row[key] for way, row in iterations.items() if way != "ours"}
    return {"resolution": ours["resolution"], "precision": ours["precision"], "of": key, "ours": ours[key]} | others


def describe_ratio(ratio: Row) -> str:
    unit = "s" if ratio["of"] == "img_per_s" else "CPU-second"
    others = [f"{ratio[way]:.2f} times {way}" for way in ("plain", f"plain{NOT_KEPT}") if way in ratio]
    return f"{ratio['resolution']} px {ratio['precision']}: {ratio['ours']:.3g} img a {unit}, {', '.join(others)}"


TABLE: Table = [
    ("px", 4, text("resolution")),
    ("precision", -9, text("precision")),
    ("formulation", -22, text("formulation")),
    ("phase", -9, text("phase")),
    ("images", 6, text("images")),
    ("s", 8, number("seconds", ".3f")),
    ("CPU-s", 8, number("cpu_seconds", ".3f")),
    ("img/s", 8, number("img_per_s", ".2f")),
    ("img/CPU-s", 9, number("img_per_cpu_s", ".3f")),
    ("GFLOP", 9, number("flops", ",.1f", 1e-9)),
    ("GFLOP/s", 9, number("flop_per_s", ",.1f", 1e-9)),
    ("of matrix", 9, number("matrix_share", ".0%")),
    ("GiB", 6, number("peak_bytes", ".2f", 2**-30)),
]
