"""training/networks/progressive.py: the networks against torch's plain functions. What they share with others is in
test_growing.py."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from styleloom.training.networks.growing import channels
from styleloom.training.networks.progressive import Discriminator, Generator

SIZES: dict[str, Any] = {"channel_base": 64, "channel_max": 8}


def randomised(network):
    """In float64, no bias 0."""
    network.double()
    for p in network.parameters():
        p.data.normal_()
    return network


def tiny(c_dim=0, mbstd_group=2, taps=(1, 1)):
    torch.manual_seed(0)
    G = Generator(16, 24, c_dim=c_dim, z_dim=8, **SIZES)
    D = Discriminator(16, 24, c_dim=c_dim, mbstd_group=mbstd_group, taps=taps, **SIZES)
    return randomised(G), randomised(D)


# The definition in torch's plain functions: nearest neighbours are made before they are convolved, and the full size is
# convolved before it is averaged. `he` is the weights' gain.


def plain_conv(network, name, x, he=2**0.5, act=True):
    w, b = (network.get_parameter(f"{name}.{part}") for part in ("weight", "bias"))
    k = w.shape[-1]
    x = F.conv2d(x, w * he / math.sqrt(w.shape[1] * k * k), b, padding=k // 2)
    return F.leaky_relu(x, 0.2) if act else x


def plain_pixel_norm(x):
    return x / (x.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()


def plain_generator(G, z, c, level, alpha):
    images = []
    x = z if c is None else torch.cat([z, c], dim=1)
    x = plain_pixel_norm(x)
    w, b = G.synthesis.get_parameter("b4.input.weight"), G.synthesis.get_parameter("b4.bias")
    x = F.linear(x, w * (math.sqrt(2) / 4) / math.sqrt(x.shape[1])).reshape(len(x), len(b), *G.start)
    x = plain_pixel_norm(F.leaky_relu(x + b[:, None, None], 0.2))
    for i in range(level + 1):
        name = f"b{4 * 2**i}"
        if i:
            conv = G.synthesis.get_submodule(f"{name}.conv0")
            # Weights of up-sampling layers are stored mirrored.
            w = conv.weight.flip([2, 3]) * math.sqrt(2) / math.sqrt(conv.weight[0].numel())
            x = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), w, conv.bias, padding=1)
            x = plain_pixel_norm(F.leaky_relu(x, 0.2))
        x = plain_pixel_norm(plain_conv(G.synthesis, f"{name}.conv1", x))
        images.append(plain_conv(G.synthesis, f"{name}.torgb", x, 1.0, act=False))
    if alpha == 1:
        return images[-1]
    return (1 - alpha) * F.interpolate(images[-2], scale_factor=2, mode="nearest") + alpha * images[-1]


def plain_discriminator(D, images, level, alpha, group):
    x = plain_conv(D, f"b{4 * 2**level}.fromrgb", images)
    for i in range(level, 0, -1):
        x = plain_conv(D, f"b{4 * 2**i}.conv0", x)
        conv = D.get_submodule(f"b{4 * 2**i}.conv1")
        w = conv.weight * math.sqrt(2) / math.sqrt(conv.weight[0].numel())
        x = F.avg_pool2d(F.conv2d(x, w, padding=1), 2)
        x = F.leaky_relu(x + conv.bias[:, None, None], 0.2)
        if i == level and alpha < 1:
            below = plain_conv(D, f"b{4 * 2 ** (i - 1)}.fromrgb", F.avg_pool2d(images, 2))
            x = (1 - alpha) * below + alpha * x
    if group > 1:
        groups = x.reshape(group, len(x) // group, *x.shape[1:])
        std = (groups.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=[1, 2, 3]).repeat(group)
        x = torch.cat([x, std[:, None, None, None].expand(-1, 1, *x.shape[2:])], dim=1)
    x = plain_conv(D, "b4.conv", x).flatten(1)
    fc, out = D.b4.fc, D.b4.out
    x = F.leaky_relu(F.linear(x, fc.weight * math.sqrt(2) / math.sqrt(x.shape[1]), fc.bias), 0.2)
    return F.linear(x, out.weight / math.sqrt(x.shape[1]), out.bias)


STAGES = [(0, 1.0), (1, 0.3), (1, 1.0), (2, 0.6), (2, 1.0)]


@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize(("level", "alpha"), STAGES)
def test_generator_by_plain_functions(ops_path, c_dim, level, alpha):
    G, _ = tiny(c_dim)
    G.grow_to(level, alpha)
    z, c = torch.randn(3, 8).double(), torch.eye(3).double() if c_dim else None
    images, expected = G(z, c), plain_generator(G, z, c, level, alpha)
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
    parameters = [p for _, p in G.active()]
    dy = torch.randn_like(images)
    for mine, theirs in zip(
        torch.autograd.grad(images, parameters, dy), torch.autograd.grad(expected, parameters, dy), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("mbstd_group", [1, 2, 4])
@pytest.mark.parametrize(("level", "alpha"), STAGES)
def test_discriminator_and_its_gradient_penalty_by_plain_functions(ops_path, level, alpha, mbstd_group):
    """Values, gradients, and the gradients of a penalty on gradients."""
    _, D = tiny(c_dim=2, mbstd_group=mbstd_group)
    D.grow_to(level, alpha)
    images = torch.randn(4, 3, 6 * 2**level, 4 * 2**level).double().requires_grad_()
    parameters = [p for _, p in D.active()]
    results = [D(images), plain_discriminator(D, images, level, alpha, mbstd_group)]
    assert results[0].shape == (4, 3)
    found = []
    for y in results:
        (grad,) = torch.autograd.grad(y[:, 0].sum(), images, create_graph=True)
        penalty = (grad.square().sum(dim=[1, 2, 3]).sqrt() - 1).square().mean()  # Gulrajani et al. 2017, eq. 3
        found.append([y, grad, *torch.autograd.grad(y.sum() + penalty, parameters)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_latents_and_labels_lie_on_a_sphere():
    G, _ = tiny(c_dim=3)
    z, c = torch.randn(4, 8), torch.eye(3)[[0, 1, 2, 0]]
    w = G.mapping(z, c)
    assert (G.mapping.w_dim, w.shape, w.dtype) == (11, (4, 11), torch.float64)
    torch.testing.assert_close(w.square().mean(dim=1), torch.ones(4).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(G.mapping(7 * z, 7 * c), w)
    G.mapping.update_w_avg(w.mean(dim=0), 0.5)
    assert not G.mapping.w_avg.any()


@torch.no_grad()
def test_there_is_no_w_to_truncate():
    G, _ = tiny()
    assert not G.has_w
    assert G.synthesis.sizes == []
    z = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"truncation_psi 0\.7"):
        G(z, truncation_psi=0.7)
    assert torch.equal(G(z, noise="none"), G(z))


@pytest.mark.parametrize("low_precision", [None, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_features_of_every_pixel_have_mean_square_1(low_precision):
    torch.manual_seed(0)
    G = Generator(16, 16, z_dim=8, channel_base=256, channel_max=64, low_precision=low_precision)
    found = {}
    for level in range(G.levels):
        G.synthesis.block(level).register_forward_hook(lambda _module, _inputs, y, i=level: found.__setitem__(i, y))
    G(torch.randn(2, 8))
    for level, y in found.items():
        assert y.dtype == (low_precision if level and low_precision else torch.float32)
        power = y.float().square().mean(dim=1)
        tolerance = {None: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[low_precision]
        torch.testing.assert_close(power, torch.ones_like(power), rtol=tolerance, atol=0)


def test_channels_and_initial_values_of_the_published_networks():
    G, D = Generator(32, 32, c_dim=2), Discriminator(32, 32, c_dim=2)
    assert G.synthesis.get_parameter("b4.input.weight").shape == (512 * 16, 514)
    assert G.synthesis.get_parameter("b32.conv1.weight").shape == (512, 512, 3, 3)
    assert D.get_parameter("b4.conv.weight").shape == (512, 513, 3, 3)
    assert D.get_parameter("b4.out.weight").shape == (3, 512)
    for network in (G, D):
        for name, p in network.named_parameters():
            if name.endswith("bias"):
                assert not p.any(), name
            else:
                assert p.std().item() == pytest.approx(1, abs=0.05), name
    published = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}  # table 2
    assert channels(list(published), 16384, 512) == list(published.values())
