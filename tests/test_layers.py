"""training/networks/layers.py: modulated convolution, minibatch std, equalised learning rate."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradgradcheck

from styleloom.ops.bias_act import ACTIVATIONS, GAINS, Activation
from styleloom.ops.bias_act import reference as activated
from styleloom.ops.upfirdn2d import reference, setup_filter
from styleloom.training.networks.layers import (
    Conv2d,
    DiscriminatorHead,
    Linear,
    adain,
    minibatch_std,
    modulated_conv2d,
    normalize_2nd_moment,
    pixel_norm,
)

FILTER = setup_filter([1, 3, 3, 1])


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def by_materialised_weights(x, weight, styles, up, demodulate):
    """StyleGAN2's eqs. 1 and 3 as they stand: one weight tensor for each sample, applied with a grouped convolution."""
    N, C, H, W = x.shape
    w = weight[None] * styles[:, None, :, None, None]  # eq. 1: [N, C_out, C_in, k, k]
    if demodulate:
        w = w / (w.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).sqrt()  # eq. 3
    p = weight.shape[-1] // 2
    if up == 2:
        x = reference(x, FILTER, up=2, padding=[p + 2, p + 1, p + 2, p + 1], gain=4)
        w = w.flip([3, 4])
    else:
        x = F.pad(x, [p, p, p, p])
    y = F.conv2d(x.reshape(1, N * C, *x.shape[2:]), w.flatten(0, 1), groups=N)
    return y.reshape(N, -1, H * up, W * up)


def by_definition(x, weight, styles, up, demodulate, noise=None, bias=None, act: Any = "linear", clamp=None):
    y = by_materialised_weights(x, weight, styles, up, demodulate)
    return activated(y, bias, None, noise, Activation(act, 0.2, GAINS[act], -1 if clamp is None else clamp))


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("k", "up"), [(3, 1), (3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels", [4, 16])
def test_modulated_conv2d_equals_materialised_weights(ops_path, agree, channels, dtype, k, up, demodulate):
    tensors = [randn(*size, dtype=dtype) for size in ((3, channels, 5, 6), (16, channels, k, k), (3, channels))]
    exact = [t.double().requires_grad_() for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    y = modulated_conv2d(*tensors, f=FILTER, up=up, demodulate=demodulate)
    expected = by_definition(*exact, up=up, demodulate=demodulate)
    agree(y.detach(), expected.detach())
    dy = randn(*y.shape, seed=1).to(dtype)
    for mine, theirs in zip(
        torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, exact, dy.double()), strict=True
    ):
        agree(mine, theirs, size=4 * theirs.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize(
    ("noise", "act", "clamp"),
    [("each", "lrelu", 1.5), ("shared", "lrelu", None), ("", "linear", 0.7), ("", "swish", None)],
)
def test_modulated_conv2d_adds_noise_and_bias_and_activates(ops_path, agree, dtype, demodulate, up, noise, act, clamp):
    fine = torch.float64 if dtype == torch.float64 else torch.float32
    side = [5 * up, 6 * up]
    x, weight, styles = randn(3, 16, 5, 6).to(dtype), randn(16, 16, 3, 3, dtype=fine) / 12, randn(3, 16, dtype=fine) + 1
    bias, size = randn(16, dtype=fine), {"each": (3, 1, *side), "shared": side, "": None}[noise]
    maps = None if size is None else randn(*size, dtype=fine)
    given = {"x": x, "weight": weight, "styles": styles, "noise": maps, "bias": bias}
    tensors = {name: t.requires_grad_() for name, t in given.items() if t is not None}
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    how: dict[str, Any] = {"up": up, "demodulate": demodulate, "act": act, "clamp": clamp}
    y, expected = modulated_conv2d(**tensors, f=FILTER, **how), by_definition(**exact, **how)
    assert y.dtype == dtype
    low = dtype in (torch.float16, torch.bfloat16)  # the convolution is torch's, and rounds
    agree(y.detach(), expected.detach(), size=(3 if low else 2) * expected.abs().max(), torchs=low)
    # No gradients are compared where a rounding error might decide on the side of a kink.
    inside = by_definition(**exact, up=up, demodulate=demodulate).detach()
    free = inside.abs() > 0.1
    if clamp is not None:
        free &= (activated(inside, None, None, None, Activation(act, 0.2, GAINS[act], -1)).abs() - clamp).abs() > 0.1
    dy = (randn(*y.shape, seed=1) * free).to(dtype)
    grads = torch.autograd.grad(y, list(tensors.values()), dy)
    exact_grads = torch.autograd.grad(expected, list(exact.values()), dy.double())
    for grad, theirs in zip(grads, exact_grads, strict=True):
        agree(grad, theirs, dtype, (4 if low else 8) * theirs.abs().max(), torchs=low)


def test_fp16_weights_and_styles_are_divided_by_their_largest_only_where_demodulation_undoes_it(ops_path):
    """Without demodulation the scale of styles and weights is the result's."""
    x, weight, styles = (
        randn(2, 8, 4, 4).half(),
        randn(8, 8, 3, 3, dtype=torch.float32),
        randn(2, 8, dtype=torch.float32),
    )
    raw = modulated_conv2d(x, weight, styles, demodulate=False)
    torch.testing.assert_close(modulated_conv2d(x, weight, 2 * styles, demodulate=False), 2 * raw, rtol=1e-2, atol=1e-2)
    demodulated = modulated_conv2d(x, weight, styles)
    torch.testing.assert_close(modulated_conv2d(x, 3 * weight, 2 * styles), demodulated, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_conv2d_layer_by_hand(ops_path, agree, act, down, bias):
    torch.manual_seed(0)
    layer, x = Conv2d(16, 16, 3, act, bias, down), torch.randn(2, 16, 6, 8)
    if bias:
        torch.nn.init.normal_(layer.get_parameter("bias"))
    w = layer.weight.detach().double() / math.sqrt(16 * 9)
    image = reference(x.double(), FILTER, padding=[2, 2, 2, 2])[:, :, :, :] if down == 2 else F.pad(x.double(), [1] * 4)
    y = F.conv2d(image, w, stride=down) + (layer.get_parameter("bias").detach().double()[:, None, None] if bias else 0)
    for gain, clamp in ((None, None), (0.5, 0.3), (1.7, None)):
        its = GAINS[act] if gain is None else gain
        expected = activated(y, None, None, None, Activation(act, 0.2, its, -1 if clamp is None else clamp))
        agree(layer(x, FILTER, gain, clamp).detach(), expected, size=5)


@pytest.mark.parametrize("up", [1, 2])
def test_modulated_conv2d_second_derivatives(ops_path, up):
    tensors = randn(2, 2, 2, 2), randn(2, 2, 3, 3), randn(2, 2)
    for t in tensors:
        t.requires_grad_()
    assert gradgradcheck(lambda x, w, s: modulated_conv2d(x, w, s, FILTER, up), tensors)


def test_demodulation_gives_unit_variance(ops_path):
    x, weight = randn(4, 32, 16, 16, dtype=torch.float32), 7 * randn(24, 32, 3, 3, dtype=torch.float32)
    styles = 50 * randn(4, 32, dtype=torch.float32)
    y = modulated_conv2d(x, weight, styles)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(y.std(dim=[0, 2, 3]), torch.ones(24), rtol=0.15, atol=0)
    raw = modulated_conv2d(x, weight, styles, demodulate=False)
    assert raw.std() > 1000  # so it is the demodulation that does it


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_close_to_fp32(ops_path, dtype, up):
    x, weight = randn(2, 16, 8, 8, dtype=torch.float32), randn(12, 16, 3, 3, dtype=torch.float32)
    styles = randn(2, 16, dtype=torch.float32) + 1
    expected = modulated_conv2d(x, weight, styles, FILTER, up)
    y = modulated_conv2d(x.to(dtype), weight, styles, FILTER, up)
    assert y.dtype == dtype
    error = (y.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("scale", [1e-4, 1e5])
def test_fp16_survives_extreme_styles(ops_path, scale):
    x, weight = randn(2, 64, 8, 8, dtype=torch.float32), 100 * randn(8, 64, 3, 3, dtype=torch.float32)
    styles = scale * randn(2, 64, dtype=torch.float32)
    y = modulated_conv2d(x.half(), weight, styles, FILTER)
    assert y.isfinite().all()
    expected = modulated_conv2d(x, weight, styles, FILTER)
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


def test_minibatch_std_by_hand():
    x = torch.tensor([0.0, 10.0, 4.0, 16.0]).reshape(4, 1, 1, 1).repeat(1, 1, 2, 3)
    y = minibatch_std(x, group=2)  # groups {0, 4} and {10, 16}: standard deviations 2 and 3
    assert torch.equal(y[:, :1], x)
    expected = torch.tensor([2.0, 3.0, 2.0, 3.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 3)
    torch.testing.assert_close(y[:, 1:], expected)


def test_minibatch_std_averages_over_channels_and_pixels():
    x = randn(4, 3, 2, 5)
    y = minibatch_std(x, group=4)
    assert y.shape == (4, 4, 2, 5)
    torch.testing.assert_close(y[:, 3], x.std(dim=0, correction=0).mean().expand(4, 2, 5))


def test_minibatch_std_of_equal_samples_has_a_finite_gradient():
    x = torch.ones(2, 1, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(minibatch_std(x, 2).sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("world", [2, 4])
def test_minibatch_std_of_strided_rows_is_that_of_the_whole_batch(world):
    x = randn(16, 3, 4, 4)
    whole = minibatch_std(x, group=4)
    for rank in range(world):
        torch.testing.assert_close(minibatch_std(x[rank::world], group=4), whole[rank::world])


def test_minibatch_std_names_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"6 samples .* groups of 4"):
        minibatch_std(torch.zeros(6, 1, 2, 2), 4)


def power(y):
    return y.square().mean().item()


@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
def test_linear_has_unit_variance_at_the_start(ops_path, lr_mul):
    torch.manual_seed(0)
    layer = Linear(256, 256, lr_mul=lr_mul)
    assert power(layer(torch.randn(64, 256))) == pytest.approx(1, abs=0.1)
    assert layer.weight.std().item() == pytest.approx(1 / lr_mul, rel=0.05)


@pytest.mark.parametrize(("k", "channels"), [(1, 256), (3, 32)])
def test_conv2d_has_unit_variance_at_the_start(ops_path, k, channels):
    torch.manual_seed(0)
    layer = Conv2d(channels, 128, k)
    y = layer(torch.randn(4, channels, 12, 12))[:, :, 1:-1, 1:-1]
    assert power(y) == pytest.approx(1, abs=0.1)
    assert layer.weight.std().item() == pytest.approx(1, rel=0.05)


def test_leaky_relu_keeps_it(ops_path):
    torch.manual_seed(0)
    assert power(Linear(256, 256, act="lrelu")(torch.randn(64, 256))) == pytest.approx(1.04, abs=0.1)
    assert power(Conv2d(256, 64, 1, act="lrelu")(torch.randn(4, 256, 8, 8))) == pytest.approx(1.04, abs=0.1)


@pytest.mark.parametrize("act", ["linear", "lrelu"])
def test_bias_init_is_the_bias_applied(ops_path, act):
    layer = Linear(4, 3, act=act, lr_mul=0.01, bias_init=2.0)
    torch.testing.assert_close(layer(torch.zeros(1, 4)), torch.full([1, 3], 2.0 * (2**0.5 if act == "lrelu" else 1)))


def test_conv2d_without_bias_has_none():
    assert Conv2d(2, 3, 1, bias=False).bias is None
    assert torch.equal(Conv2d(2, 3, 3).get_parameter("bias"), torch.zeros(3))


def test_normalize_2nd_moment():
    x = torch.tensor([[3.0, -3.0, 3.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(normalize_2nd_moment(x), torch.tensor([[1.0, -1.0, 1.0], [0.0, 0.0, 0.0]]))


# What the networks before StyleGAN2 are made of.

LOW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("act", ["linear", "lrelu"])
@pytest.mark.parametrize(("up", "down", "taps"), [(1, 1, [1, 1]), (2, 1, [1, 1]), (1, 2, [1, 1])])
def test_gain_in_the_weights_and_fused_resampling_by_plain_functions(ops_path, agree, up, down, taps, act):
    """Nearest neighbours before the convolution, the mean of 2x2 after it; the bias is not multiplied by the gain."""
    torch.manual_seed(0)
    layer, x = Conv2d(16, 16, 3, act, up=up, down=down, he=True), torch.randn(2, 16, 6, 8)
    bias = torch.nn.init.normal_(layer.get_parameter("bias")).detach().double()
    w = layer.weight.detach().double() * GAINS[act] / math.sqrt(16 * 9)
    y = F.interpolate(x.double(), scale_factor=up, mode="nearest")
    y = F.conv2d(y, w.flip([2, 3]) if up == 2 else w, padding=1)  # stored mirrored where it up-samples
    y = F.avg_pool2d(y, down) + bias[:, None, None]
    expected = F.leaky_relu(y, 0.2) if act == "lrelu" else y
    assert layer(x, setup_filter(taps)).shape == (2, 16, 6 * up // down, 8 * up // down)
    agree(layer(x, setup_filter(taps)).detach(), expected, size=5)
    agree(layer(x, setup_filter(taps), clamp=0.5).detach(), expected.clamp(-0.5, 0.5), size=5)


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_second_derivatives_of_resampling_layers(ops_path, up, down, taps):
    torch.manual_seed(0)
    layer = Conv2d(2, 2, 3, "lrelu", up=up, down=down, he=True).double()
    x, w, b = randn(2, 2, 4, 4), randn(2, 2, 3, 3), randn(2)

    def apply(x, w, b):
        return torch.func.functional_call(layer, {"weight": w, "bias": b}, (x, setup_filter(taps)))

    for t in (x, w, b):
        t.requires_grad_()
    assert torch.autograd.gradcheck(apply, (x, w, b))
    assert gradgradcheck(apply, (x, w, b))


@pytest.mark.parametrize("act", ["linear", "lrelu"])
def test_linear_with_the_gain_in_the_weights(ops_path, act):
    torch.manual_seed(0)
    layer, x = Linear(8, 5, act, bias_init=0.7, he=True), torch.randn(3, 8)
    y = F.linear(x, layer.weight * GAINS[act] / math.sqrt(8), torch.full([5], 0.7))
    torch.testing.assert_close(layer(x), F.leaky_relu(y, 0.2) if act == "lrelu" else y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
def test_pixel_norm_by_hand(dtype):
    x = 300 * torch.randn(2, 32, 3, 4).to(dtype)  # the squares' sum overflows in fp16
    y = pixel_norm(x)
    assert y.dtype == dtype
    expected = x.double() / x.double().square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(y.double(), expected, rtol={torch.float64: 1e-9}.get(dtype, 1e-2), atol=1e-6)
    assert not pixel_norm(torch.zeros(1, 2, 1, 1)).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW])
def test_adain_by_instance_norm(dtype):
    fine = torch.float64 if dtype == torch.float64 else torch.float32
    x = (300 * torch.randn(2, 5, 6, 7) + 100).to(dtype)
    scale, shift = torch.randn(2, 5, dtype=fine), torch.randn(2, 5, dtype=fine)
    y = adain(x, scale, shift)
    assert y.dtype == dtype
    expected = F.instance_norm(x.double(), eps=1e-8) * scale.double()[:, :, None, None]
    expected += shift.double()[:, :, None, None]
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_adain_of_a_constant_channel_is_its_shift():
    shift = torch.tensor([[3.0, -2.0]])
    y = adain(torch.full([1, 2, 4, 4], 0.3), torch.ones(1, 2), shift)
    torch.testing.assert_close(y, shift[:, :, None, None].expand(-1, -1, 4, 4), rtol=0, atol=1e-3)


def test_second_derivatives_of_the_normalisations():
    x, scale, shift = randn(2, 3, 2, 3), randn(2, 3), randn(3, 2).t().contiguous()
    for t in (x, scale, shift):
        t.requires_grad_()
    assert gradgradcheck(pixel_norm, x)
    assert gradgradcheck(adain, (x, scale, shift))


@pytest.mark.parametrize("he", [False, True])
@pytest.mark.parametrize("mbstd_group", [1, 2])
def test_discriminator_head_by_hand(ops_path, mbstd_group, he):
    torch.manual_seed(0)
    head, x = DiscriminatorHead(4, 6, (4, 5), 3, mbstd_group, img_channels=2, he=he).double(), randn(2, 4, 4, 5)
    for p in head.parameters():
        p.data.normal_()

    def lrelu(x, weight, bias):  # x is weighted by 1 / sqrt(terms) times the weight
        inside, outside = (2**0.5, 1) if he else (1, 2**0.5)
        return outside * F.leaky_relu(inside * (x / math.sqrt(weight[0].numel())) + bias, 0.2)

    y = minibatch_std(x, mbstd_group) if mbstd_group > 1 else x
    conv, fc, out = head.conv, head.fc, head.out
    y = lrelu(F.conv2d(y, conv.weight, padding=1), conv.weight, conv.get_parameter("bias")[:, None, None])
    y = lrelu(y.flatten(1) @ fc.weight.t(), fc.weight, fc.bias)
    y = F.linear(y, out.weight / math.sqrt(6), out.bias)
    torch.testing.assert_close(head(x), y)
    image = randn(2, 2, 4, 5)
    assert head.fromrgb(image).shape == x.shape
    assert not hasattr(DiscriminatorHead(4, 6, (4, 5), 3, mbstd_group), "fromrgb")
