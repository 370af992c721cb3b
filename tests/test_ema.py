"""training/ema.py: the averaged generator."""

import pytest
import torch
from torch import nn

from styleloom.training import ema, schedule


class Net(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full([3], value))
        self.register_buffer("w_avg", torch.full([2], value))
        self.register_buffer("count", torch.tensor(int(value)))


def test_average_of_is_a_copy_in_eval_mode_without_gradients():
    network = Net(1.0).train()
    average = ema.average_of(network)
    assert not average.training
    assert network.training
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        network.weight.fill_(5.0)
    assert torch.equal(average.get_parameter("weight"), torch.ones(3))


def test_influence_halves_after_the_half_life():
    average, network = ema.average_of(Net(1.0)), Net(0.0)
    beta = schedule.ema_beta(nimg=0, batch=50, half_life=1000, ramp=None)
    for _ in range(1000 // 50):
        ema.update_average(average, network, beta)
    torch.testing.assert_close(average.weight, torch.full([3], 0.5))


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 3.0), (1.0, 1.0), (0.75, 1.5)])
def test_beta_is_the_share_of_the_old_average(beta, expected):
    average = ema.average_of(Net(1.0))
    ema.update_average(average, Net(3.0), beta)
    torch.testing.assert_close(average.weight, torch.full([3], expected))


def test_buffers_are_copied():
    average, network = ema.average_of(Net(1.0)), Net(4.0)
    ema.update_average(average, network, beta=0.9)
    assert torch.equal(average.get_buffer("w_avg"), torch.full([2], 4.0))
    assert average.get_buffer("count").item() == 4
    network.get_buffer("w_avg").zero_()
    assert torch.equal(average.get_buffer("w_avg"), torch.full([2], 4.0))  # a copy, not the same memory


def test_the_network_is_left_alone():
    average, network = ema.average_of(Net(1.0)), Net(4.0)
    ema.update_average(average, network, beta=0.9)
    assert torch.equal(network.weight, torch.full([3], 4.0))
    assert network.weight.requires_grad


def test_parameters_are_averaged_without_a_network_of_their_own():
    network = Net(1.0)
    average = ema.parameters_of(network)
    with torch.no_grad():
        network.weight.fill_(5.0)
    assert list(average) == ["weight"]
    assert torch.equal(average["weight"], torch.ones(3))
    ema.update_parameters(average, network, 0.75)
    assert torch.equal(average["weight"], torch.full([3], 2.0))
    assert not average["weight"].requires_grad
