"""The averaged generator, which is the one that is shown and kept."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def average_of(network: Network) -> Network:
    """A copy to hold the average: in eval mode, without gradients."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, beta: float) -> None:
    """average = network + beta * (average - network) for parameters; buffers (w_avg, noise maps) are copied."""
    update_parameters(dict(average.named_parameters()), network, beta)
    for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, by name: an average that needs no network of its own."""
    return {name: p.detach().clone() for name, p in network.named_parameters()}


@torch.no_grad()
def update_parameters(average: dict[str, Tensor], network: nn.Module, beta: float) -> None:
    """average = network + beta * (average - network), in the order of `named_parameters`."""
    torch._foreach_lerp_(list(average.values()), list(network.parameters()), 1 - beta)
