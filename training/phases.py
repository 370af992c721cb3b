"""One phase of a training iteration: accumulate over passes, sum over processes, check, step."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .draws import Draws
from .report import report

Sum = Callable[[Tensor], Tensor]


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


def own_rows(batch: int, rank: int, world: int, part: int = 0, parts: int = 1) -> range:
    """Rows of a global batch that one process works on in one of its passes.

    Strided, so that strided minibatch-std groups of the rows are groups of the global batch.
    """
    return range(rank + world * part, batch, world * parts)


def run_phase(
    phase: Phase,
    networks: dict[str, nn.Module],
    optimizer: Optimizer,
    passes: list[Batch],
    sum_: Sum | None,
) -> bool:
    """Runs one phase on this process's passes and steps the optimizer with the global batch's gradient.

    The loss of the global batch is the sum over its samples divided by `phase.batch`, whatever the split. If any
    gradient element is not finite, they are counted and the step is left out, on every process alike.

    Args:
        sum_: sums a tensor over the processes; None for a process alone.

    Returns:
        Whether the step was taken.
    """
    for name, network in networks.items():
        network.requires_grad_(name == phase.trains)
    parameters = list(networks[phase.trains].parameters())
    optimizer.zero_grad(set_to_none=True)
    dtype, device = parameters[0].dtype, parameters[0].device
    sums = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in phase.statistics.items()}
    for batch in passes:
        if len(batch) == 0:
            continue
        loss = phase.loss(batch)
        (loss.per_sample.sum() / phase.batch).backward(inputs=parameters)
        for name, rows in loss.statistics.items():
            sums[name] += rows.detach().to(dtype).sum(dim=0)
    others = list(sums.values())
    bad = reduce_gradients(parameters, others, sum_) if sum_ else count_nonfinite(parameters, others)
    report(f"nonfinite/{phase.name}", float(bad))
    if bad:
        return False
    optimizer.step()
    if phase.after is not None:
        phase.after({name: x / phase.batch for name, x in sums.items()})
    return True


def count_nonfinite(parameters: list[nn.Parameter], others: list[Tensor]) -> int:
    """How many elements of the gradients and of the other tensors are not finite."""
    tensors = [p.grad for p in parameters if p.grad is not None] + others
    if not tensors:
        return 0
    if torch.stack(torch._foreach_norm(tensors, ord=1)).isfinite().all():  # one pass, and one wait, if all is well
        return 0
    return int(sum((~x.isfinite()).sum() for x in tensors))


def reduce_gradients(parameters: list[nn.Parameter], others: list[Tensor], sum_: Sum) -> int:
    """Sums the gradients, and other tensors in place, over all processes with one flat all-reduce.

    A parameter without a gradient anywhere keeps none: Adam leaves it alone, which a zero gradient would not.

    Returns:
        How many elements of the summed gradients (and other tensors) are not finite.
    """
    dtype, device = parameters[0].dtype, parameters[0].device
    has = torch.tensor([p.grad is not None for p in parameters], dtype=dtype, device=device)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    tensors = [*grads, *others, has]
    flat = sum_(torch.cat([x.flatten().to(dtype) for x in tensors]))
    parts = [part.reshape(x.shape) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)]
    *present, bad = torch.cat([parts[-1], (~torch.isfinite(flat)).sum().to(dtype)[None]]).tolist()  # one wait for both
    for p, grad, any_ in zip(parameters, parts, present, strict=False):
        p.grad = grad if any_ else None
    for x, total in zip(others, parts[len(parameters) :], strict=False):
        x.copy_(total)
    return int(bad)
