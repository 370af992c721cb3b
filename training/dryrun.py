"""What a run would be: its settings, sizes and schedule, and from a few measured steps its memory and time."""

import contextlib
import json
import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.memory import peak_memory
from .config import Run
from .distributed import Team
from .draws import Draws
from .loop import say
from .phases import Batch, Phase, run_phase
from .report import duration
from .schedule import Stage
from .snapshots import evaluation_of
from .trainer import Training

MEASURED = 2  # runs of every phase, after a first one
LONG = 5.0  # seconds, after which no more are begun
FEW_PIXELS = 2**16  # of all images of a pass on a CPU


@dataclass
class Estimate:
    """Of one process, in one stage. seconds: of an iteration, lazy phases spread over their intervals."""

    stage: Stage
    phase_seconds: dict[str, float]
    seconds: float
    memory_bytes: int
    images: int
    """Of a pass that was measured; the rest is proportional."""


def dry_run(run: Run, team: Team) -> int:
    """Prints the plan of a run and writes nothing. Raises ValueError where training would (but needs no `out`)."""
    training = Training(run, team)
    training.begin()
    training.agree(lambda: evaluation_of(training))
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
    """Runs one pass of each phase a few times on real data, times it, and counts as many as there are of it.

    On a CPU on no more images than memory surely holds: what a pass of more would take is proportional.
    """
    run, team = training.run, training.team
    share, group = stage.batch // team.world // run.passes, run.network.mbstd_group
    few = group * max(FEW_PIXELS // math.prod(training.recipe.G.size) // group, 1)
    n = min(share, few) if team.device.type == "cpu" else share
    peak_memory(team.device)
    before = peak_memory(team.device)  # now, as the call before set it back
    with contextlib.closing(training.stream()) as stream:
        reals, classes = training.to_device(*next(stream))
    seconds = {phase.name: time_phase(training, phase, reals[:n], classes[:n]) for phase in training.recipe.phases}
    total = sum(seconds[phase.name] / phase.interval for phase in training.recipe.phases)
    peak = peak_memory(team.device)
    # Gradients and two moments do not depend on the images.
    fixed = before + 3 * sum(p.nbytes for x in training.recipe.networks.values() for _, p in x.active())
    return Estimate(stage, seconds, total, peak if n == share else round(fixed + max(peak - fixed, 0) * share / n), n)


def time_phase(training: Training, phase: Phase, reals: Tensor, classes: Tensor) -> float:
    """Seconds that a phase takes with all its passes, from one pass on these images, or on fewer. Rather too many, as
    the optimizer's step is counted with each pass."""
    images = phase.batch / training.team.world
    n = min(len(reals), max(round(images / training.run.passes), 1))
    part = Batch(reals, classes, Draws(training.run.seed, phase.name, range(n), reals.device))
    took: list[float] = []
    # All processes have to decide alike.
    while len(took) <= MEASURED and training.team.totals(sum(took))[0] < LONG * training.team.world:
        began = now(reals)
        run_phase(phase, training.recipe.networks, training.updaters[phase.trains], [part])
        took.append(now(reals) - began)
    return statistics.mean(took[1:] or took) * images / n  # the first one is not typical


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


def size(training: Training, stage: Stage) -> str:
    """Of a stage's images, and as growth's fields count it."""
    height, width = training.recipe.G.size_at(stage.level)
    return f"{stage.px} px" if height == width == stage.px else f"{width}x{height} px (growth's {stage.px})"


def schedule_of(training: Training) -> list[str]:
    """A line for each stage."""
    stages, total = coming(training), round(training.run.total_kimg * 1000)
    ends = [*(nimg for nimg, _ in stages[1:]), total]
    lines = []
    for (nimg, stage), end in zip(stages, ends, strict=True):
        each = stage.batch // training.team.world
        where = f"{size(training, stage)}{', fading in' * stage.fading}"
        steps = math.ceil((end - nimg) / stage.batch)
        lines.append(
            f"          {nimg / 1000:g} to {end / 1000:g} kimg at {where}: {steps:,} iterations of {stage.batch} "
            f"images ({each} on each process), {training.recipe.lr_text(stage.lr)}."
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
    share = estimate.stage.batch // training.team.world // training.run.passes
    rest = f" Measured on {estimate.images} images a pass, not {share}." if estimate.images < share else ""
    where = f"{size(training, estimate.stage)} on {training.team.device}"
    return (
        f"At {where}: {each}; together {1000 * estimate.seconds:.0f} ms an iteration, "
        f"{estimate.stage.batch / estimate.seconds:.1f} img/s, {estimate.memory_bytes / 2**30:.1f} GB of memory a "
        f"process; R1 gamma {training.recipe.r1_gamma:g}.{rest}"
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
