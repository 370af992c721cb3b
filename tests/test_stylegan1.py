"""training/networks/stylegan1.py: the networks against torch's plain functions. What they share with others is in
test_growing.py."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from styleloom.ops.upfirdn2d import setup_filter
from styleloom.training import losses
from styleloom.training.networks.layers import Conv2d
from styleloom.training.networks.stylegan1 import FILTER, Discriminator, Generator

SIZES: dict[str, Any] = {"channel_base": 64, "channel_max": 8}
BLUR = torch.tensor([1.0, 2.0, 1.0]).double()


def tiny(c_dim=0, **settings):
    torch.manual_seed(0)
    G = Generator(16, 24, c_dim=c_dim, z_dim=8, w_dim=6, mapping_layers=2, **settings, **SIZES)
    D = Discriminator(16, 24, c_dim=c_dim, mbstd_group=2, **SIZES)
    for network in (G, D):
        network.double()
        for name, p in network.named_parameters():
            if "mapping" not in name:
                p.data.normal_()
    return G, D


def blurred(x):
    """Filtered by [1, 2, 1], only where all of the filter lies inside."""
    kernel = (BLUR[:, None] * BLUR / 16)[None, None].expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, kernel, groups=x.shape[1])


def weight(layer):
    return layer.weight * math.sqrt(2) / math.sqrt(layer.weight[0].numel())


def plain_up(x, w):
    """Nearest neighbour, convolution, blur, with enough zeros around that none of them meets a border."""
    x = F.interpolate(F.pad(x, [2] * 4), scale_factor=2, mode="nearest")
    return blurred(F.conv2d(x, w.flip([2, 3])))[:, :, 2:-2, 2:-2]


def plain_down(x, w):
    """Blur, convolution, mean, likewise."""
    return F.avg_pool2d(F.conv2d(blurred(F.pad(x, [2] * 4)), w), 2)


def plain_epilogue(layer, x, w, noise):
    if noise is not None:
        x = x + noise * layer.noise_strength[None, :, None, None]
    x = F.leaky_relu(x + layer.bias[:, None, None], 0.2)
    x = F.instance_norm(x, eps=1e-8)
    s, b = F.linear(w, layer.affine.weight / math.sqrt(w.shape[1]), layer.affine.bias).unflatten(1, (2, -1)).unbind(1)
    return x * (1 + s)[:, :, None, None] + b[:, :, None, None]


def plain_synthesis(G, ws, noise, level, alpha):
    """`noise` is a list of maps or of None."""
    x, images = torch.zeros(0), []
    for i in range(level + 1):
        block = G.synthesis.block(i)
        if i:
            x = plain_epilogue(block.conv0, plain_up(x, weight(block.conv0)), ws[:, 2 * i], noise[2 * i])
        elif hasattr(block, "const"):
            x = plain_epilogue(block.epilogue, block.const[None].expand(len(ws), -1, -1, -1), ws[:, 0], noise[0])
        else:
            w = block.input.weight * math.sqrt(2) / 4 / math.sqrt(ws.shape[2])
            x = F.linear(ws[:, 0], w).reshape(len(ws), -1, *G.start)
            x = plain_epilogue(block.epilogue, x, ws[:, 0], noise[0])
        y = F.conv2d(x, weight(block.conv1), padding=1)
        x = plain_epilogue(block.conv1, y, ws[:, 2 * i + 1], noise[2 * i + 1])
        images.append(F.conv2d(x, block.torgb.weight / math.sqrt(x.shape[1]), block.torgb.bias))
    if alpha == 1:
        return images[-1]
    return (1 - alpha) * F.interpolate(images[-2], scale_factor=2, mode="nearest") + alpha * images[-1]


STAGES = [(0, 1.0), (1, 0.3), (1, 1.0), (2, 0.6), (2, 1.0)]


@pytest.mark.parametrize("latent_input", [False, True])
@pytest.mark.parametrize("noise", ["given", "none", "const"])
@pytest.mark.parametrize(("level", "alpha"), STAGES)
def test_synthesis_by_plain_functions(ops_path, level, alpha, noise, latent_input):
    G, _ = tiny(latent_input=latent_input)
    G.grow_to(level, alpha)
    ws = torch.randn(3, G.num_ws, 6).double().requires_grad_()
    stored = [m.get_buffer("noise_const") for m in G.synthesis.modules() if hasattr(m, "noise_const")]
    maps = {
        "given": [torch.randn(3, 1, *size).double() for size in G.synthesis.sizes],
        "none": [None] * G.num_ws,
        "const": stored,
    }[noise]
    images = G.synthesis(ws, maps if noise == "given" else noise)
    expected = plain_synthesis(G, ws, maps, level, alpha)
    torch.testing.assert_close(images, expected, rtol=1e-8, atol=1e-8)
    variables = [ws, *(p for name, p in G.synthesis.active() if noise != "none" or "noise" not in name)]
    dy = torch.randn_like(images)
    for mine, theirs in zip(
        torch.autograd.grad(images, variables, dy), torch.autograd.grad(expected, variables, dy), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * max(1, theirs.abs().max().item()))


def plain_discriminator(D, images, level, alpha):
    def conv(name, x):
        layer = D.get_submodule(name)
        return F.leaky_relu(F.conv2d(x, weight(layer), layer.bias, padding=layer.weight.shape[-1] // 2), 0.2)

    x = conv(f"b{4 * 2**level}.fromrgb", images)
    for i in range(level, 0, -1):
        x = conv(f"b{4 * 2**i}.conv0", x)
        layer = D.get_submodule(f"b{4 * 2**i}.conv1")
        x = F.leaky_relu(plain_down(x, weight(layer)) + layer.bias[:, None, None], 0.2)
        if i == level and alpha < 1:
            below = conv(f"b{4 * 2 ** (i - 1)}.fromrgb", F.avg_pool2d(images, 2))
            x = (1 - alpha) * below + alpha * x
    groups = x.reshape(2, len(x) // 2, *x.shape[1:])
    std = (groups.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=[1, 2, 3]).repeat(2)
    x = torch.cat([x, std[:, None, None, None].expand(-1, 1, *x.shape[2:])], dim=1)
    x = conv("b4.conv", x).flatten(1)
    fc, out = D.b4.fc, D.b4.out
    x = F.leaky_relu(F.linear(x, fc.weight * math.sqrt(2) / math.sqrt(x.shape[1]), fc.bias), 0.2)
    return F.linear(x, out.weight / math.sqrt(x.shape[1]), out.bias)


@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize(("level", "alpha"), STAGES)
def test_discriminator_and_its_r1_penalty_by_plain_functions(ops_path, level, alpha, c_dim):
    """Values, gradients, and the gradients of a penalty on gradients; of the logits, that of the label."""
    _, D = tiny(c_dim)
    D.grow_to(level, alpha)
    images = torch.randn(4, 3, 6 * 2**level, 4 * 2**level).double().requires_grad_()
    which = torch.tensor([2, 0, 1, 2]) if c_dim else torch.zeros(4, dtype=torch.long)
    labels = torch.eye(3)[which] if c_dim else None
    parameters = [p for _, p in D.active()]
    expected = plain_discriminator(D, images, level, alpha)
    assert expected.shape == (4, max(c_dim, 1))
    found = []
    for y in (D(images, labels), expected.gather(1, which[:, None])):
        assert y.shape == (4, 1)
        penalty = losses.r1_penalty(images, y).mean()
        found.append([y, penalty, *torch.autograd.grad(y.sum() + penalty, parameters)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_resampling_is_the_published_order_but_for_the_border(ops_path):
    """That cuts what lies beyond the border off between convolution and blur."""
    x, f = torch.randn(2, 4, 6, 8).double(), setup_filter(FILTER)
    up = Conv2d(4, 5, 3, bias=False, up=2, he=True).double()
    w = up.weight / math.sqrt(4 * 9)
    published = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), w.flip([2, 3]), padding=1)
    published, mine = blurred(F.pad(published, [1] * 4)), up(x, f)
    torch.testing.assert_close(mine[:, :, 1:-1, 1:-1], published[:, :, 1:-1, 1:-1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(mine, published, rtol=0.1)
    down = Conv2d(4, 5, 3, bias=False, down=2, he=True).double()
    w = down.weight / math.sqrt(4 * 9)
    published, mine = F.avg_pool2d(F.conv2d(blurred(F.pad(x, [1] * 4)), w, padding=1), 2), down(x, f)
    torch.testing.assert_close(mine[:, :, 1:-1, 1:-1], published[:, :, 1:-1, 1:-1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(mine, published, rtol=0.1)


@torch.no_grad()
def test_a_label_counts_only_for_its_own_sample():
    _, D = tiny(c_dim=3)
    images = torch.randn(2, 3, 16, 24).double()
    first, second = D(images, torch.eye(3)[[0, 1]]), D(images, torch.eye(3)[[0, 2]])
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("latent_input", [False, True])
def test_initial_values(latent_input):
    torch.manual_seed(0)
    G = Generator(8, 8, z_dim=32, w_dim=32, channel_max=32, latent_input=latent_input)
    assert ("b4.const" in dict(G.synthesis.named_parameters())) != latent_input
    for name, p in G.synthesis.named_parameters():
        if name.endswith(("bias", "noise_strength")):
            assert not p.any(), name
        elif name == "b4.const":
            assert torch.equal(p, torch.ones(32, 4, 4))
        else:
            assert p.std().item() == pytest.approx(1, abs=0.15), name
    assert G.synthesis.get_parameter("b8.conv0.noise_strength").shape == (32,)  # a strength for each channel


@torch.no_grad()
def test_without_noise_the_generator_has_neither_maps_nor_strengths():
    G, _ = tiny(use_noise=False)
    assert G.synthesis.sizes == []
    assert G.num_ws == 6
    assert not any("noise" in name for name in G.state_dict())
    z = torch.randn(2, 8).double()
    noisy, _ = tiny()
    noisy.load_state_dict(G.state_dict(), strict=False)
    for noise in ("const", "none", []):
        torch.testing.assert_close(G(z, noise=noise), noisy(z, noise="none"))
