"""One phase of a training iteration: accumulate over passes, sum over processes, check, step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .distributed import Updater
from .draws import Draws
from .report import report, unreported


@dataclass
class Batch:
    """The rows of a global batch that one pass of one process works on.

    images [n, C, H, W] fp32 in [-1, 1] and labels [n, c_dim] one-hot belong to the positions; a phase may hold fewer
    positions than the iteration has images. `draws` are the samples' random numbers in this phase.
    """

    images: Tensor
    labels: Tensor
    draws: Draws

    def __len__(self) -> int:
        return len(self.draws)


@dataclass
class Loss:
    """What a phase computes of a batch: a loss for each sample [n], and statistics [n, ...] whose means over the
    global batch the phase wants afterwards (a running mean of path lengths, the average w)."""

    per_sample: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Phase:
    """A kind of update: which network it trains, every how many iterations, on which loss."""

    name: str
    trains: str
    """Name of the network whose parameters it changes."""
    loss: Callable[[Batch], Loss]
    """Of one pass: its `per_sample` [n] belongs to the batch's n samples."""
    batch: int
    """Images over all passes and processes."""
    interval: int = 1
    """Iterations from one run to the next. The loss must already be multiplied by it (lazy regularisation)."""
    statistics: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of a sample's row of each statistic."""
    after: Callable[[dict[str, Tensor]], None] | None = None
    """Takes the statistics' means over the global batch, the same on every process."""
    reals: int = 0
    """Which of the iteration's sets of real images it takes, where the recipe has several."""


def own_rows(batch: int, rank: int, world: int, part: int = 0, parts: int = 1) -> range:
    """Rows of a global batch that one process works on in one of its passes.

    Strided, so that strided minibatch-std groups of the rows are groups of the global batch.
    """
    return range(rank + world * part, batch, world * parts)


def run_phase(phase: Phase, networks: Mapping[str, nn.Module], updater: Updater, passes: list[Batch]) -> bool:
    """Runs one phase on this process's passes and makes a step with the global batch's gradient.

    The loss of the global batch is the sum over its samples divided by `phase.batch`, whatever the split. If any
    gradient element is not finite, they are counted and the step is left out, on every process alike; otherwise the
    gradient's norm is reported, as grad_norm/PHASE.

    Args:
        updater: of the network that the phase trains.

    Returns:
        Whether the step was taken.
    """
    only_trained(phase, networks)
    p = next(networks[phase.trains].parameters())
    sums = {name: torch.zeros(shape, dtype=p.dtype, device=p.device) for name, shape in phase.statistics.items()}
    updater.clear()
    for i, batch in enumerate(passes):
        loss = phase.loss(batch) if len(batch) else None
        updater.add(loss.per_sample.sum() / phase.batch if loss else None, last=i == len(passes) - 1)
        if loss:
            for name, rows in loss.statistics.items():
                sums[name] += rows.detach().to(p.dtype).sum(dim=0)
    bad = updater.reduce(list(sums.values()))
    report(f"nonfinite/{phase.name}", float(bad))
    if bad:
        return False
    updater.step()
    report(f"grad_norm/{phase.name}", updater.norm)
    if phase.after is not None:
        phase.after({name: x / phase.batch for name, x in sums.items()})
    return True


def only_trained(phase: Phase, networks: Mapping[str, nn.Module]) -> None:
    """Gradients are for the parameters that the phase trains."""
    for name, network in networks.items():
        network.requires_grad_(name == phase.trains)


def reached(phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> set[str]:
    """Names of the parameters (of the network that it trains) that the phase's loss depends on. Changes nothing."""
    only_trained(phase, networks)
    trained = networks[phase.trains].named_parameters()
    names, parameters = zip(*((name, p) for name, p in trained if p.requires_grad), strict=True)
    with unreported():
        gradients = torch.autograd.grad(phase.loss(batch).per_sample.sum(), parameters, allow_unused=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
