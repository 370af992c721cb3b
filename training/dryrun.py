"""What a run would be: its settings, sizes and schedule, and from a few measured steps its memory and time."""

import contextlib
import json
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.memory import peak_memory
from .config import Run
from .distributed import Team
from .loop import say
from .report import duration
from .schedule import Stage
from .trainer import Training

WARM_UP, MEASURED = 1, 2  # runs of every phase


@dataclass
class Estimate:
    """Of one process, in one stage. seconds: of an iteration, lazy phases spread over their intervals."""

    stage: Stage
    phase_seconds: dict[str, float]
    seconds: float
    memory_bytes: int


def dry_run(run: Run, team: Team) -> int:
    """Prints the plan of a run and writes nothing. Raises ValueError where training would (but needs no `out`)."""
    training = Training(run, team)
    training.begin()
    for line in describe(training):
        say(team, line)
    estimates: dict[int, Estimate] = {}  # by level
    for level, (nimg, stage) in {stage.level: (nimg, stage) for nimg, stage in coming(training)}.items():
        training.nimg = nimg
        training.follow()
        estimates[level] = measure(training, stage)
        say(team, told(training, estimates[level]))
    say(team, whole(training, estimates))
    return 0


def coming(training: Training) -> list[tuple[int, Stage]]:
    """(`nimg` of its first iteration, stage) of all stages of the run, from its beginning to its end."""
    total = round(training.run.total_kimg * 1000)
    return [(nimg, stage) for nimg, stage in training.stages(0) if nimg < total]


def measure(training: Training, stage: Stage) -> Estimate:
    """Runs each phase a few times on real data, and times it."""
    peak_memory(training.team.device)  # what was before does not count
    with contextlib.closing(training.stream()) as stream:
        reals, classes = training.to_device(*next(stream))
    seconds = {}
    for phase in training.recipe.phases:
        for _ in range(WARM_UP):
            training.run_phase(phase, reals, classes)
        began = now(reals)
        for _ in range(MEASURED):
            training.run_phase(phase, reals, classes)
        seconds[phase.name] = (now(reals) - began) / MEASURED
    total = sum(seconds[phase.name] / phase.interval for phase in training.recipe.phases)
    return Estimate(stage, seconds, total, peak_memory(training.team.device))


def now(x: Tensor) -> float:
    """Seconds, once the device of `x` has done its work."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def describe(training: Training) -> list[str]:
    """Settings, data set, networks and schedule."""
    run, m, world = training.run, training.manifest, training.team.world
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
        f"Processes: {world}, and {training.data_workers()} that read data for each; {run.passes} passes.",
        "Schedule:",
        *schedule_of(training),
        f"          Every {run.tick_kimg:g} kimg a progress line, every {run.checkpoint_kimg:g} a checkpoint, every "
        f"{run.snapshot_kimg:g} a snapshot.",
    ]


def schedule_of(training: Training) -> list[str]:
    """A line for each stage."""
    stages, total = coming(training), round(training.run.total_kimg * 1000)
    ends = [*(nimg for nimg, _ in stages[1:]), total]
    lines = []
    for (nimg, stage), end in zip(stages, ends, strict=True):
        each = stage.batch // training.team.world
        lines.append(
            f"          {nimg / 1000:g} to {end / 1000:g} kimg at {stage.px} px{', fading in' * stage.fading}: "
            f"{math.ceil((end - nimg) / stage.batch):,} iterations of {stage.batch} images ({each} on each process), "
            f"lr {stage.lr:g}."
        )
    return lines


def told(training: Training, estimate: Estimate) -> str:
    """Time and memory of a level, from the measured steps."""
    batches = {phase.name: phase for phase in training.recipe.phases}
    each = ", ".join(
        f"{name} {1000 * s:.0f} ms ({batches[name].batch} images"
        + (f", every {batches[name].interval} iterations)" if batches[name].interval > 1 else ")")
        for name, s in estimate.phase_seconds.items()
    )
    return (
        f"At {estimate.stage.px} px on {training.team.device}: {each}; together {1000 * estimate.seconds:.0f} ms an "
        f"iteration, {estimate.stage.batch / estimate.seconds:.1f} img/s, {estimate.memory_bytes / 2**30:.1f} GB of "
        f"memory a process; R1 gamma {training.recipe.r1_gamma:g}."
    )


def whole(training: Training, estimates: dict[int, Estimate]) -> str:
    """Time of the run, from that of its levels."""
    stages, total = coming(training), round(training.run.total_kimg * 1000)
    ends = [*(nimg for nimg, _ in stages[1:]), total]
    seconds = sum(
        (end - nimg) / stage.batch * estimates[stage.level].seconds
        for (nimg, stage), end in zip(stages, ends, strict=True)
    )
    state = sum(x.numel() * x.element_size() for part in training.states().values() for x in part.values())
    return (
        f"Estimate: {duration(seconds)} for the whole run, "
        f"{max(each.memory_bytes for each in estimates.values()) / 2**30:.1f} GB of memory a process, "
        f"{state / 2**20:.0f} MB a checkpoint."
    )


def count(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in network.parameters())
