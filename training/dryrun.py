"""What a run would be: its settings, sizes and schedule, and from a few measured steps its memory and time."""

import json
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import Run
from .distributed import Team
from .loop import peak_memory, say
from .report import duration
from .trainer import Training

WARM_UP, MEASURED = 1, 2  # runs of every phase


@dataclass
class Estimate:
    """Of one process. seconds: of an iteration, lazy phases spread over their intervals."""

    phase_seconds: dict[str, float]
    seconds: float
    memory_bytes: int


def dry_run(run: Run, team: Team) -> int:
    """Prints the plan of a run and writes nothing. Raises ValueError where training would (but needs no `out`)."""
    training = Training(run, team)
    training.begin()
    estimate = measure(training)
    for line in [*describe(training), *costs(training, estimate)]:
        say(team, line)
    return 0


def measure(training: Training) -> Estimate:
    """Runs each phase a few times on real data, and times it."""
    reals, classes = training.to_device(*next(training.stream()))
    seconds = {}
    for phase in training.recipe.phases:
        for _ in range(WARM_UP):
            training.run_phase(phase, reals, classes)
        began = now(reals)
        for _ in range(MEASURED):
            training.run_phase(phase, reals, classes)
        seconds[phase.name] = (now(reals) - began) / MEASURED
    total = sum(seconds[phase.name] / phase.interval for phase in training.recipe.phases)
    return Estimate(seconds, total, peak_memory(training.team.device))


def now(x: Tensor) -> float:
    """Seconds, once the device of `x` has done its work."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def describe(training: Training) -> list[str]:
    """Settings, data set, networks and schedule."""
    run, m, world = training.run, training.manifest, training.team.world
    iterations = math.ceil(run.total_kimg * 1000 / run.batch)
    phases = ", ".join(
        f"{phase.name} ({phase.batch} images{f', every {phase.interval} iterations' if phase.interval > 1 else ''})"
        for phase in training.recipe.phases
    )
    return [
        "The run:",
        json.dumps(run.model_dump(mode="json"), indent=1),
        f"Data set: {m.count:,} images of {training.width}x{training.height}, {m.channels} channels, "
        f"{m.classes or 'no'} classes.",
        *(f"{name}: {count(network):,} parameters." for name, network in training.recipe.networks.items()),
        *(
            f"{name}'s optimizer: " + ", ".join(f"{key} {group[key]}" for key in ("lr", "betas", "eps"))
            for name, optimizer in training.recipe.optimizers.items()
            for group in optimizer.param_groups
        ),
        f"R1 gamma: {training.recipe.r1_gamma:g}. Processes that read data: {training.data_workers()} a trainer.",
        f"Batch: {run.batch} images = {run.batch // world} on each of {world} processes, in {run.passes} passes.",
        f"Schedule: {run.total_kimg:g} kimg = {iterations:,} iterations of {phases}.",
        f"          Every {run.tick_kimg:g} kimg a progress line, every {run.checkpoint_kimg:g} a checkpoint, every "
        f"{run.snapshot_kimg:g} a snapshot.",
    ]


def costs(training: Training, estimate: Estimate) -> list[str]:
    """Time and memory, from the measured steps."""
    run, device = training.run, training.team.device
    each = ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in estimate.phase_seconds.items())
    total = run.total_kimg * 1000 / run.batch * estimate.seconds
    state = sum(x.numel() * x.element_size() for part in training.states().values() for x in part.values())
    return [
        f"Measured on {device}: {each}; together {1000 * estimate.seconds:.0f} ms an iteration, "
        f"{run.batch / estimate.seconds:.1f} img/s.",
        f"Estimate: {duration(total)} for the whole run, {estimate.memory_bytes / 2**30:.1f} GB of memory a process, "
        f"{state / 2**20:.0f} MB a checkpoint.",
    ]


def count(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in network.parameters())
