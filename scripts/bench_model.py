"""`styleloom bench model`: whole training phases on random images, and an iteration with lazy phases averaged in."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from styleloom.scripts.bench_ops import counted, plain
from styleloom.training import recipes
from styleloom.training.config import Run
from styleloom.training.distributed import Replicated, Team
from styleloom.training.draws import Draws
from styleloom.training.loop import peak_memory
from styleloom.training.phases import Batch, Phase, run_phase
from styleloom.training.report import collect

ITERATION = "iteration"  # the row of all phases, each divided by its interval


def measure(run: Run, size: int, device: torch.device, rounds: int, rate: float, bar: tqdm) -> list[dict[str, Any]]:
    """A row for each phase and one for the iteration, on one device, without data set and averaging.

    Args:
        size: width and height in px.
        rounds: runs of each phase after a first one; the fastest counts.
        rate: FLOP/s of matrices in the run's precision.
        bar: shows how far it is.
    """
    before = resident() if device.type == "cpu" else peak_memory(device)
    recipe = recipes.build(run, size, size, 3, [], device)
    team = Team()
    updaters = {name: Replicated(team, recipe.networks[name], x) for name, x in recipe.optimizers.items()}
    flops = {phase.name: count(phase, recipe, size) for phase in recipe.phases}
    reals = torch.rand(run.batch, 3, size, size, device=device) * 2 - 1
    best: dict[str, tuple[float, float]] = {}
    peaks = dict.fromkeys((phase.name for phase in recipe.phases), 0)
    bar.total = (rounds + 1) * len(recipe.phases)
    for i in range(rounds + 1):
        for phase in recipe.phases:
            batch = Batch(reals[: phase.batch], reals.new_zeros(phase.batch, 0), _draws(phase, run, device, i))
            step = partial(run_phase, phase, recipe.networks, updaters[phase.trains], [batch])
            took = _time(step, device)
            if device.type == "cuda":
                peaks[phase.name] = max(peaks[phase.name], peak_memory(device))
            if i:
                wall, cpu = best.get(phase.name, took)
                best[phase.name] = min(wall, took[0]), min(cpu, took[1])
            bar.update()
    if device.type == "cpu":
        growth = resident(reset=False) - before
        peaks = dict.fromkeys(peaks) | {ITERATION: growth}
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
    return rates([*rows, {"phase": ITERATION, "images": run.batch, "peak_bytes": peaks[ITERATION]}], rate)


def rates(rows: Sequence[dict[str, Any]], rate: float) -> list[dict[str, Any]]:
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


def count(phase: Phase, recipe: Any, size: int) -> int:
    """FLOPs of a phase in the plain formulation (its optimizer has none worth counting); computes nothing."""
    for name, network in recipe.networks.items():
        network.requires_grad_(name == phase.trains)
    parameters = list(recipe.networks[phase.trains].parameters())
    device = parameters[0].device

    def step() -> None:
        images = torch.zeros(phase.batch, 3, size, size, device=device)
        draws = Draws(0, phase.name, range(phase.batch), device)
        loss = phase.loss(Batch(images, images.new_zeros(phase.batch, 0), draws)).per_sample.sum()
        torch.autograd.grad(loss, parameters, allow_unused=True)

    with plain():
        flops = counted(step)
    collect(lambda reported: {})  # the statistics that it reported are of no value
    return flops


def _draws(phase: Phase, run: Run, device: torch.device, i: int) -> Draws:
    return Draws(run.seed, phase.name, range(i * run.batch, i * run.batch + phase.batch), device)


def _time(function: Callable[[], Any], device: torch.device) -> tuple[float, float]:
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


def resident(reset: bool = True) -> int:
    """Bytes: the most memory that this process had since the last reset (without Linux: ever)."""
    if not sys.platform.startswith("linux"):
        return peak_memory(torch.device("cpu"))
    if reset:
        with contextlib.suppress(OSError):  # then it is the peak of the whole process
            Path("/proc/self/clear_refs").write_text("5")
    high = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(high[1]) * 1024 if high else peak_memory(torch.device("cpu"))


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


def best_of(measured: Sequence[list[dict[str, Any]]], rate: float) -> list[dict[str, Any]]:
    """One configuration's rows from several measurements of it: the fastest run of each phase, the largest peaks."""
    rows = [dict(row) for row in measured[0]]
    for i, row in enumerate(rows):
        for key, pick in (("seconds", min), ("cpu_seconds", min), ("peak_bytes", max)):
            row[key] = None if row[key] is None else pick(each[i][key] for each in measured)
    return rates(rows, rate)
