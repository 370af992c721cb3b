"""ops/bias_act.py: `clamp(gain * act(x + b))`."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from styleloom.ops.bias_act import bias_act

X = torch.tensor([[[-3.0, 1.0], [-2.0, 4.0]]])  # [N=1, C=2, 2]
B = torch.tensor([1.0, -2.0])


def test_bias_is_added_along_channels():
    assert torch.equal(bias_act(X, B), torch.tensor([[[-2.0, 2.0], [-4.0, 2.0]]]))


def test_leaky_relu_has_slope_and_gain():
    expected = torch.tensor([[[-0.4, 2.0], [-0.8, 2.0]]]) * 2**0.5
    torch.testing.assert_close(bias_act(X, B, "lrelu"), expected)
    torch.testing.assert_close(bias_act(X, B, "lrelu", gain=1.0, alpha=0.5), torch.tensor([[[-1.0, 2.0], [-2.0, 2.0]]]))


def test_clamp_comes_after_gain():
    assert torch.equal(bias_act(X, B, gain=3.0, clamp=7.0), torch.tensor([[[-6.0, 6.0], [-7.0, 6.0]]]))


def test_without_anything_it_is_the_identity():
    assert torch.equal(bias_act(X), X)


@pytest.mark.parametrize("shape", [(0, 2), (5, 2), (3, 2, 4, 5), (0, 2, 4, 5)])
def test_shapes(shape):
    assert bias_act(torch.randn(shape), B, "lrelu", clamp=1.0).shape == shape


def test_dtype_and_memory_format_are_kept():
    x = torch.randn(2, 2, 4, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    y = bias_act(x, B, "lrelu", clamp=256.0)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_gain_keeps_unit_power():
    x = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    assert bias_act(x, act="lrelu").square().mean().item() == pytest.approx(1.04, abs=0.02)  # 2 * (1 + 0.2**2) / 2


@pytest.mark.parametrize("act", ["linear", "lrelu"])
def test_first_and_second_derivatives(act):
    x = torch.tensor([[[-3.0, 0.5], [-1.5, 4.0]]], dtype=torch.float64, requires_grad=True)  # off the kinks
    b = B.double().requires_grad_()
    assert gradcheck(lambda x, b: bias_act(x, b, act, gain=1.3, clamp=3.5), (x, b))
    assert gradgradcheck(lambda x, b: bias_act(x, b, act, gain=1.3, clamp=3.5).pow(3), (x, b))
