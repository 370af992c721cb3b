"""training/networks/r3gan.py against torch's plain functions; training/recipes/r3gan.py: its losses by hand, and runs
from end to end."""

import math
import shutil
import subprocess
from itertools import islice
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradgradcheck
from tqdm import tqdm

from styleloom.datasets.manifest import read_manifest
from styleloom.datasets.stream import batches
from styleloom.scripts import bench_model, bench_plan
from styleloom.training import report
from styleloom.training.checkpoint import complete, load_generator
from styleloom.training.config import Augment, Data, Ema, R3GANNetwork, R3GANRecipe, Run, StyleGAN2Network, write_run
from styleloom.training.distributed import Replicated, Team
from styleloom.training.draws import Draws
from styleloom.training.dryrun import dry_run
from styleloom.training.loop import train
from styleloom.training.networks import build as build_networks
from styleloom.training.networks import r3gan
from styleloom.training.networks.growing import channels
from styleloom.training.networks.r3gan import Discriminator, Generator, ResidualBlock, Residuals
from styleloom.training.phases import Batch, run_phase
from styleloom.training.recipes import build
from styleloom.training.trainer import Training
from styleloom.training.watchdog import Place

CPU = torch.device("cpu")
# 8, 8 and 4 channels at 4, 8 and 16 px: a change of size with and without convolution.
SIZES: dict[str, Any] = {"channel_base": 64, "channel_max": 8, "group_width": 4}
NETWORK = R3GANNetwork(z_dim=8, **SIZES)
STYLEGAN2 = StyleGAN2Network(z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8, mbstd_group=2)


@pytest.fixture(autouse=True)
def _own_statistics(monkeypatch):
    monkeypatch.setattr(report, "_moments", {})


def randomised(network, scale=1.0):
    """No parameter 0."""
    generator = torch.Generator().manual_seed(3)
    for p in network.parameters():
        p.data += scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return network


def tiny(c_dim=0, width=16, height=24, img_channels=3, **more) -> tuple[Any, Any]:
    torch.manual_seed(0)
    settings = {"img_channels": img_channels, "c_dim": c_dim, **SIZES, **more}
    G, D = Generator(width, height, z_dim=8, **settings), Discriminator(width, height, **settings)
    return randomised(G, 0.2), randomised(D, 0.2)


def inputs(G, c_dim=0, n=3):
    """(z, images, labels) in the networks' dtype."""
    generator, dtype = torch.Generator().manual_seed(1), next(G.parameters()).dtype
    z, images = torch.randn(n, 8, generator=generator), torch.randn(n, 3, *G.size, generator=generator)
    labels = torch.eye(c_dim)[torch.arange(n) % c_dim].to(dtype) if c_dim else None
    return z.to(dtype), images.to(dtype), labels


# The networks in torch's plain functions.

TAPS = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
KERNEL = TAPS[:, None] * TAPS / 16


def depthwise(x, stride):
    kernel = KERNEL.to(x.dtype).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, kernel, stride=stride, groups=x.shape[1])


def plain_up(x):
    N, C, H, W = x.shape
    zeros = x.new_zeros(N, C, 2 * H, 2 * W)
    zeros[:, :, ::2, ::2] = x
    return depthwise(F.pad(zeros, [2, 0, 2, 0]), 1) * 4


def plain_down(x):
    return depthwise(F.pad(x, [1, 0, 1, 0]), 2)


def plain_residuals(network, name, x, blocks=2):
    for i in range(blocks):
        w0, b0, w1, b1, w2 = (
            network.get_parameter(f"{name}.level.residuals.{i}.{part}")
            for part in ("weight0", "bias0", "weight1", "bias1", "weight2")
        )
        y = F.leaky_relu(F.conv2d(x, w0, b0), 0.2)
        y = F.leaky_relu(F.conv2d(y, w1, b1, padding=1, groups=len(w1) // 4), 0.2)
        x = x + F.conv2d(y, w2)
    return x


def plain_generator(G, z, c):
    S = G.synthesis
    w = z if c is None else torch.cat([z, c @ G.mapping.embed.t()], dim=1)
    x = S.b4.input.features * (w @ S.b4.input.weight.t())[:, :, None, None]
    for px in (4, 8, 16):
        if px > 4:
            x = plain_up(x)
        if px == 16:  # from 8 to 4 channels
            x = F.conv2d(x, S.b16.change.weight)
        x = plain_residuals(S, f"b{px}", x)
    return F.conv2d(x, S.b16.torgb.weight)


def plain_discriminator(D, images, c):
    x = F.conv2d(images, D.b16.fromrgb.weight)
    x = plain_down(F.conv2d(plain_residuals(D, "b16", x), D.b16.change.weight))
    x = plain_residuals(D, "b4", plain_down(plain_residuals(D, "b8", x)))
    x = torch.einsum("nchw,chw->nc", x, D.b4.basis) @ D.b4.weight.t()
    return x if c is None else (x * (c @ D.embed.t())).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("c_dim", [0, 3])
def test_generator_by_plain_functions(ops_path, c_dim):
    G, _ = tiny(c_dim)
    G.double()
    z, _, c = inputs(G, c_dim)
    images, expected = G(z, c), plain_generator(G, z, c)
    assert images.shape == (3, 3, 24, 16)
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
    names, parameters = zip(*G.active(), strict=True)
    assert names == tuple(name for name, _ in G.named_parameters())
    dy = torch.randn_like(images)
    found, right = (torch.autograd.grad(y, parameters, dy) for y in (images, expected))
    for name, mine, theirs in zip(names, found, right, strict=True):
        assert theirs.abs().max() > 1e-6, name
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("c_dim", [0, 3])
def test_discriminator_and_its_gradient_penalty_by_plain_functions(ops_path, c_dim):
    """Values, gradients, and the gradients of a penalty on gradients."""
    G, D = (network.double() for network in tiny(c_dim))
    _, images, c = inputs(G, c_dim)
    images.requires_grad_()
    names, parameters = zip(*D.active(), strict=True)
    assert names == tuple(name for name, _ in D.named_parameters())
    found = []
    for y in (D(images, c), plain_discriminator(D, images, c)):
        assert y.shape == (3, 1)
        (grad,) = torch.autograd.grad(y.sum(), images, create_graph=True)
        found.append([y, grad, *torch.autograd.grad(y.square().sum() + grad.square().sum(), parameters)])
    for mine, theirs in zip(*found, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)


def test_the_discriminator_has_two_derivatives():
    _, D = tiny(c_dim=2, width=8, height=8, blocks=1, expansion=1, channel_max=4, img_channels=1)
    D.double()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: D(x, torch.eye(2, dtype=torch.float64)), images, atol=1e-6)


@pytest.mark.parametrize(("width", "height", "img_channels"), [(24, 16, 1), (16, 40, 4), (64, 64, 3)])
@torch.no_grad()
def test_sizes_and_channels_of_images(width, height, img_channels):
    G, D = tiny(width=width, height=height, img_channels=img_channels, channel_base=256)
    images = G(torch.randn(2, 8))
    assert images.shape == (2, img_channels, height, width)
    assert D(images).shape == (2, 1)
    assert (G.num_ws, G.synthesis.sizes, G.has_w) == (1, [], False)


# What the networks begin with.


def test_blocks_do_nothing_at_first_and_their_weights_are_as_fixup_wants():
    torch.manual_seed(0)
    G = Generator(32, 32, channel_base=4096, channel_max=128)
    D = Discriminator(32, 32, channel_base=4096, channel_max=128)
    scale = 8 ** (-1 / 4)  # of 4 levels with 2 blocks each, of 3 convolutions
    he = math.sqrt(2 / (1 + 0.2**2))
    assert Residuals(2, 8, 2, 16).scale == pytest.approx(scale)
    for network in (G, D):
        for name, p in network.named_parameters():
            part = name.rsplit(".", 1)[1]
            if part in ("bias0", "bias1", "weight2"):
                assert not p.any(), name
                continue
            fan_in = p[0].numel()
            gain = he * scale if part in ("weight0", "weight1") else 1.0
            expected = 1.0 if part == "features" else gain / math.sqrt(fan_in)
            assert p.std().item() == pytest.approx(expected, rel=0.15 if p.numel() < 1000 else 0.05), name
    assert sum(name.endswith("weight2") for name, _ in G.named_parameters()) == 8
    x = torch.randn(2, 128, 8, 8)
    assert torch.equal(G.synthesis.block(1).level(x, None), x)


@torch.no_grad()
def test_he_weights_keep_the_mean_square_through_a_block():
    """Of its inner activations, but for what Fixup takes."""
    torch.manual_seed(0)
    block = ResidualBlock(128, Residuals(each=1, total=3, expansion=2, group_width=16))
    x, scale = torch.randn(16, 128, 8, 8), 3 ** (-1 / 4)
    y = F.leaky_relu(F.conv2d(x, block.weight0), 0.2)
    assert y.square().mean().item() == pytest.approx(scale**2, rel=0.05)
    y = F.leaky_relu(F.conv2d(y, block.weight1, groups=block.groups), 0.2)
    assert y.square().mean().item() == pytest.approx(scale**4, rel=0.1)


@torch.no_grad()
def test_results_are_of_the_order_of_1_at_first():
    """Resampling takes something away, as the start's features are noise."""
    images, logits = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        G = Generator(64, 64, channel_base=2048, channel_max=64)
        D = Discriminator(64, 64, channel_base=2048, channel_max=64)
        images.append(G(torch.randn(4, 64)))
        smooth = F.interpolate(torch.randn(4, 3, 8, 8), size=(64, 64), mode="bicubic")
        logits.append(D(smooth / smooth.std()))
    assert 0.3 < torch.cat(images).std() < 1.2
    assert 0.1 < torch.cat(logits).std() < 1.2


def test_the_published_networks_size(monkeypatch):
    """23 million parameters each at 256 px; 768 channels below 64 px, 96 at the top."""
    monkeypatch.setattr(r3gan, "weight", lambda *shape, gain=1.0: nn.Parameter(torch.empty(shape, device="meta")))
    G, D = Generator(256, 256), Discriminator(256, 256)
    assert [sum(p.numel() for p in network.parameters()) for network in (G, D)] == [23057952, 23009568]
    assert channels([4, 8, 16, 32, 64, 128, 256], 24576, 768) == [768, 768, 768, 768, 384, 192, 96]
    assert G.synthesis.get_parameter("b256.level.residuals.0.weight1").shape == (192, 16, 3, 3)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"group_width": 16}, "the 8 channels at 16 px, times network.expansion 1"),
        ({"group_width": 6}, "the 16 channels at 4 px"),
    ],
)
def test_channels_that_do_not_divide_into_groups(more, named):
    run = Run(network=R3GANNetwork(channel_base=128, channel_max=16, expansion=1, **more), recipe=R3GANRecipe())
    with pytest.raises(ValueError, match=f"{named}.*network.group_width {more['group_width']}: change"):
        build_networks(run, 16, 16, 3, 0)
    with pytest.raises(ValueError, match="do not divide into groups"):
        Discriminator(16, 16, channel_base=128, channel_max=16, expansion=1, **more)


def test_networks_do_not_grow():
    for network in tiny():
        network.grow_to(2)
        with pytest.raises(ValueError, match="level 1"):
            network.grow_to(1)


# Latents and labels.


@torch.no_grad()
def test_latents_are_taken_as_they_are():
    G, _ = tiny(c_dim=3)
    z, _, c = inputs(G, 3)
    w = G.mapping(7 * z, c)
    assert (G.mapping.w_dim, w.shape) == (16, (3, 16))
    assert torch.equal(w[:, :8], 7 * z)
    torch.testing.assert_close(w[:, 8:], G.mapping.embed.t()[:3])
    G.mapping.update_w_avg(w.mean(dim=0), 0.5)
    assert not G.mapping.w_avg.any()
    with pytest.raises(ValueError, match=r"truncation_psi 0\.7"):
        G(z, c, truncation_psi=0.7)
    assert torch.equal(G(z, c, noise="none"), G(z, c))


@torch.no_grad()
def test_labels_count():
    G, D = tiny(c_dim=3)
    z, images, _ = inputs(G, n=2)
    one, two = torch.eye(3)[[0, 0]], torch.eye(3)[[1, 1]]
    assert not torch.allclose(G(z, one), G(z, two), atol=1e-3)
    assert not torch.allclose(D(images, one), D(images, two), atol=1e-3)
    mixed = torch.eye(3)[[0, 1]]
    torch.testing.assert_close(D(images, mixed), torch.cat([D(images, one)[:1], D(images, two)[1:]]))


# Precision and memory.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close_to_fp32_with_results_in_fp32(ops_path, dtype):
    full, low = tiny(c_dim=2), tiny(c_dim=2, low_precision=dtype)
    z, images, c = inputs(full[0], 2, n=4)
    for index, given in ((0, z), (1, images)):
        expected, found = full[index](given, c), low[index](given, c)
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < {torch.bfloat16: 0.05, torch.float16: 0.006}[dtype]
        assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), list(low[index].parameters())))


@torch.no_grad()
def test_the_start_and_all_below_the_top_four_levels_are_fp32():
    full, low = (tiny(width=256, height=256, channel_base=512, low_precision=p) for p in (None, torch.bfloat16))
    found: dict[str, torch.dtype] = {}
    for level in range(7):
        name = f"b{4 << level}"
        low[0].synthesis.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, y, name=name: found.__setitem__(name, y.dtype)
        )
    assert low[0](torch.randn(1, 8)).shape == full[0](torch.randn(1, 8)).shape
    assert list(found.values()) == [torch.float32] * 3 + [torch.bfloat16] * 4


@torch.no_grad()
def test_fp16_does_not_overflow():
    G, D = tiny(low_precision=torch.float16)
    for network in (G, D):
        for name, p in network.named_parameters():
            if ("residuals" in name or "change" in name) and "b4." not in name:
                p *= 1e3
    z, images, _ = inputs(G)
    assert G(z).isfinite().all()
    assert D(images).isfinite().all()


@pytest.mark.parametrize("phase", ["Dmain", "Gmain"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_activations_changes_no_bit(phase, precision):
    gradients, kept = [], []
    for recompute in (False, True):
        r = recipe(recompute=recompute, precision=precision)
        trained = list(r.networks[phase[0]].parameters())
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss = phase_of(r, phase).loss(batch_of(r, phase)).per_sample.sum()
        gradients.append(torch.autograd.grad(loss, trained))
        kept.append(sum(saved))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    if phase == "Gmain":  # the penalties' second derivatives need all
        assert kept[1] < kept[0]


# The recipe.


def recipe(classes=(), network: Any = NETWORK, augment: Any = None, settings: Any = None, **more: Any) -> Any:
    """Of 16 px, with no parameter 0. `settings` are the recipe's, `more` the run's."""
    its: dict[str, Any] = {"gamma": 3.0, "gamma_end": 0.3, "decay_kimg": 1.0} | (settings or {})
    run = Run(batch=4, network=network, recipe=R3GANRecipe(**its), augment=augment or Augment(), **more)
    built = build(run, 16, 16, 3, list(classes), CPU)
    for each in built.networks.values():
        randomised(each, 0.2)
    return built


def doubled(r):
    """The recipe in float64, as `batch_of` then is."""
    for network in r.networks.values():
        network.double()
    return r


def batch_of(r, purpose, n=4):
    """In the networks' dtype."""
    generator, dtype = torch.Generator().manual_seed(0), next(r.G.parameters()).dtype
    images = torch.randn(n, 3, *r.G.size, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.eye(r.c_dim)[torch.arange(n) % max(r.c_dim, 1)] if r.c_dim else torch.zeros(n, 0)
    return Batch(images, labels.to(dtype), draws_of(r, purpose, n))


def draws_of(r, purpose, n=4):
    draws, dtype = Draws(0, purpose, range(n)), next(r.G.parameters()).dtype
    normal = draws.normal
    draws.normal = lambda *shape: normal(*shape).to(dtype)
    return draws


def phase_of(r, name):
    return {phase.name: phase for phase in r.phases}[name]


@pytest.mark.parametrize("network", [NETWORK, STYLEGAN2], ids=["r3gan", "stylegan2"])
def test_the_discriminator_comes_first_and_each_phase_has_reals_of_its_own(network):
    r = recipe(network=network)
    assert [(p.name, p.trains, p.interval, p.batch, p.reals) for p in r.phases] == [
        ("Dmain", "D", 1, 4, 0),
        ("Gmain", "G", 1, 4, 1),
    ]
    assert r.reals == 2
    assert r.penalty == "recipe.gamma"


@pytest.mark.parametrize("network", [NETWORK, STYLEGAN2], ids=["r3gan", "stylegan2"])
@pytest.mark.parametrize("classes", [(), (3, 1, 2)])
def test_the_discriminators_loss_by_hand(network, classes):
    """From separate forward passes, the penalties' gradients by `torch.func`; values and gradients."""
    r = doubled(recipe(classes, network))
    batch = batch_of(r, "Dmain")
    loss = r.d_main(batch).per_sample
    fakes = r.fakes(draws_of(r, "Dmain"), batch.labels)[0].detach()
    real, fake = r.D(batch.images, batch.labels)[:, 0], r.D(fakes, batch.labels)[:, 0]
    expected = torch.log1p(torch.exp(fake - real))
    for images in (batch.images, fakes):
        grads = torch.func.grad(lambda x: r.D(x, batch.labels).sum())(images)
        expected = expected + 3 / 2 * grads.square().sum(dim=[1, 2, 3])
    assert loss.shape == (4,)
    torch.testing.assert_close(loss, expected)
    parameters = list(r.D.parameters())
    mine = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("classes", [(), (3, 1, 2)])
def test_the_generators_loss_by_hand(classes):
    """Its images have the labels of the reals that they are paired with."""
    r = doubled(recipe(classes))
    batch = batch_of(r, "Gmain")
    found = r.g_main(batch)
    z = draws_of(r, "Gmain").normal(8)
    fake, real = r.D(r.G(z, batch.labels), batch.labels)[:, 0], r.D(batch.images, batch.labels)[:, 0]
    expected = torch.log1p(torch.exp(real - fake))
    torch.testing.assert_close(found.per_sample, expected)
    parameters = list(r.G.parameters())
    mine, theirs = (torch.autograd.grad(x.sum(), parameters) for x in (found.per_sample, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_each_phase_reaches_its_own_network_only():
    """R2 is of generated images as constants: the generator learns nothing from it."""
    r = recipe()
    r.G.requires_grad_(True)
    loss = r.d_main(batch_of(r, "Dmain")).per_sample.sum()
    assert all(g is None for g in torch.autograd.grad(loss, list(r.G.parameters()), allow_unused=True))
    for phase in r.phases:
        before = {name: [p.clone() for p in network.parameters()] for name, network in r.networks.items()}
        assert run_phase(phase, r.networks, updater_of(r, phase.trains), [batch_of(r, phase.name)])
        changed = {
            name: any(not torch.equal(a, b) for a, b in zip(before[name], network.parameters(), strict=True))
            for name, network in r.networks.items()
        }
        assert changed == {"G": phase.trains == "G", "D": phase.trains == "D"}


def updater_of(r, name):
    return Replicated(Team(), r.networks[name], r.optimizers[name])


def test_gradients_are_by_the_images_before_their_augmentation():
    """An augmentation that doubles differences quadruples both penalties."""
    r = doubled(recipe())
    r.seen = lambda images, draws: 2 * images
    batch = batch_of(r, "Dmain")
    loss = r.d_main(batch).per_sample
    fakes = r.fakes(draws_of(r, "Dmain"), batch.labels)[0].detach()
    expected = F.softplus(r.D(2 * fakes) - r.D(2 * batch.images))[:, 0]
    for images in (batch.images, fakes):
        grads = torch.func.grad(lambda x: r.D(x).sum())(2 * images)
        expected = expected + 3 / 2 * 4 * grads.square().sum(dim=[1, 2, 3])
    torch.testing.assert_close(loss, expected)


def test_the_augmentation_is_controlled_by_the_signs_of_differences():
    """Scores alone mean nothing: adding to all of them changes no loss."""
    r = recipe(augment=Augment(kind="ada", pipe=("blit",)))
    assert phase_of(r, "Dmain").statistics == {"signs": ()}
    batch = batch_of(r, "Dmain")
    signs = r.d_main(batch).statistics["signs"]
    draws = draws_of(r, "Dmain")
    fakes = r.fakes(draws, batch.labels)[0]
    difference = r.judge(batch.images, batch.labels, draws) - r.judge(fakes, batch.labels, draws)
    assert torch.equal(signs, difference.sign().flatten())
    judge = r.judge
    r.judge = lambda *args: judge(*args) + 1000
    torch.testing.assert_close(r.d_main(batch_of(r, "Dmain")).statistics["signs"], signs)


def test_without_penalties():
    r = recipe(settings={"gamma": 0.0, "gamma_end": 0.0})
    batch = batch_of(r, "Dmain")
    fakes = r.fakes(draws_of(r, "Dmain"), batch.labels)[0]
    torch.testing.assert_close(r.d_main(batch).per_sample, F.softplus(r.D(fakes) - r.D(batch.images))[:, 0])
    assert r.r1_gamma == 0
    assert not any(name in report.Report.state_dict() for name in ("loss/r1", "loss/r2"))


def test_what_is_reported():
    r = recipe()
    r.d_main(batch_of(r, "Dmain"))
    r.g_main(batch_of(r, "Gmain"))
    names = {"loss/G", "loss/D", "loss/r1", "loss/r2", "scores/real", "scores/fake", "signs/real"}
    assert report.Report.state_dict().keys() == names


# Schedules.


def test_schedules_from_end_to_end():
    r = recipe(
        settings={"lr": 4e-4, "lr_end": 1e-4, "beta2": 0.9, "beta2_end": 0.99, "gamma": 150, "gamma_end": 15}
        | {"decay_kimg": 20}
    )
    half = (2.5e-4, 0.945, 82.5)
    quarter = tuple(b + (a - b) * (1 + math.cos(math.pi / 4)) / 2 for a, b in ((4e-4, 1e-4), (0.9, 0.99), (150, 15)))
    ends = [(0, (4e-4, 0.9, 150)), (5000, quarter), (10000, half), (20000, (1e-4, 0.99, 15)), (90000, (1e-4, 0.99, 15))]
    for nimg, expected in ends:
        r.at(nimg)
        assert (r.lr, r.beta2, r.r1_gamma) == pytest.approx(expected)
        for optimizer in r.optimizers.values():
            (group,) = optimizer.param_groups
            assert (group["lr"], group["betas"], group["eps"]) == (r.lr, (0.0, r.beta2), 1e-8)
    r.enter(r.stage)
    r.at(10000)
    assert [o.param_groups[0]["lr"] for o in r.optimizers.values()] == [pytest.approx(2.5e-4)] * 2


def test_a_decay_of_0_is_at_its_end():
    r = recipe(settings={"decay_kimg": 0.0})
    r.at(0)
    assert (r.lr, r.beta2, r.gamma) == (5e-5, 0.99, 0.3)


def test_adam_takes_the_steps_of_the_schedule():
    """Against Adam's definition (Kingma and Ba 2015, algorithm 1) with beta1 0, its numbers changed at each step."""
    r = recipe(settings={"lr": 1e-2, "lr_end": 1e-3, "decay_kimg": 3})
    p = r.D.b4.weight
    moment, expected = torch.zeros_like(p), p.detach().clone()
    for step in range(1, 4):
        r.at(step * 1000)
        r.optimizers["D"].zero_grad()
        p.grad = torch.full_like(p, 0.1 * step)
        moment = r.beta2 * moment + (1 - r.beta2) * p.grad**2
        expected -= r.lr * p.grad / ((moment / (1 - r.beta2**step)).sqrt() + 1e-8)
        r.optimizers["D"].step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)


# Runs.


class Alone:
    """One of so many processes, in this one."""

    local_rank, local_world, main = 0, 1, True
    device = CPU

    def __init__(self, rank=0, world=1) -> None:
        self.rank, self.world, self.place = rank, world, Place()

    def gather(self, objects: list) -> list:
        return objects


def run_of(folder, out: Any = "", network: Any = NETWORK, **more: Any) -> Run:
    """12 steps of 4 images; its schedules end before it does."""
    its: dict[str, Any] = {
        "network": network,
        "recipe": R3GANRecipe(lr=2e-3, lr_end=5e-4, gamma=1.0, gamma_end=0.1, decay_kimg=0.04),
        "augment": Augment(kind="fixed", pipe=("blit", "color"), p=0.5, warmup_kimg=0.04),
        "ema": Ema(half_life_kimg=0.02, warmup_kimg=0.04, sigma_rel=(0.1,)),
        "data": Data(path=str(folder), workers=0, window=2, mirror=True),
        "batch": 4, "total_kimg": 0.048, "tick_kimg": 0.012, "checkpoint_kimg": 0.008, "snapshot_kimg": 0.024,
        "keep_checkpoints": 9, "score_images": 24,
    }  # fmt: skip
    return Run(out=str(out), **its | more)


@pytest.mark.parametrize("passes", [1, 2])
def test_each_phase_sees_its_own_half_of_the_reals(unlabelled, passes):
    """Of positions 0 to 7 the first four are the discriminator's, and so on."""
    training = Training(run_of(unlabelled, passes=passes), Team())
    training.begin()
    seen: dict[str, list[torch.Tensor]] = {"Dmain": [], "Gmain": []}
    for phase in training.recipe.phases:
        phase.loss = lambda batch, loss=phase.loss, name=phase.name: seen[name].append(batch.images) or loss(batch)
    for images, labels in islice(training.stream(), 3):
        assert len(images) == 8
        training.step(images, labels)
    its = islice(batches(unlabelled, read_manifest(unlabelled), seed=0, start=0, batch=4, window=2, mirror=True), 6)
    expected = [images.float() / 127.5 - 1 for images, _ in its]
    order = [0, 1, 2, 3] if passes == 1 else [0, 2, 1, 3]  # of a pass: every other row
    for name, first in (("Dmain", 0), ("Gmain", 1)):
        found = torch.cat(seen[name])
        assert torch.equal(found, torch.cat([x[order] for x in expected[first::2]]))


@pytest.mark.parametrize("kind", ["r3gan", "r3gan-labels", "stylegan2"])
@pytest.mark.parametrize(("world", "passes"), [(1, 2), (2, 1)])
def test_gradients_do_not_depend_on_how_a_batch_is_split(unlabelled, labelled, kind, world, passes):
    """Over passes and processes: their sums are those of one pass of one process."""
    network = STYLEGAN2 if kind == "stylegan2" else NETWORK
    data = Data(path=str(labelled if "labels" in kind else unlabelled), labels="labels" in kind, workers=0, window=2)

    def gradients(world: int, passes: int) -> dict[str, torch.Tensor]:
        sums: dict[str, torch.Tensor] = {}
        run = run_of("", network=network, data=data, passes=passes, batch=8)
        for rank in range(world):
            training: Any = Training(run, Alone(rank, world))  # type: ignore[arg-type]
            for each in doubled(training.recipe).networks.values():
                randomised(each, 0.1)
            training.nimg = 8
            training.follow()
            reals, classes = training.to_device(*next(training.stream()))
            for phase in training.recipe.phases:
                names, parameters = zip(*training.recipe.networks[phase.trains].named_parameters(), strict=True)
                for part in training.passes(phase, reals.double(), classes):
                    loss = phase.loss(part).per_sample.sum() / phase.batch
                    found = torch.autograd.grad(loss, parameters, allow_unused=True)
                    for name, g in zip(names, found, strict=True):
                        if g is not None:
                            sums[f"{phase.name}/{name}"] = sums.get(f"{phase.name}/{name}", 0) + g
        return sums

    whole, split = gradients(1, 1), gradients(world, passes)
    assert whole.keys() == split.keys()
    assert {name[:5] for name in whole} == {"Dmain", "Gmain"}
    for name, expected in whole.items():
        torch.testing.assert_close(split[name], expected, rtol=1e-8, atol=1e-10, msg=lambda t, n=name: f"{n}: {t}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, unlabelled):
    out = tmp_path_factory.mktemp("r3gan") / "whole"
    assert train(run_of(unlabelled, out), Team()) == 0
    report.Report.load_state_dict({})
    return out


def test_a_run_and_its_snapshot(whole, stats, tensors):
    lines = stats(whole)
    assert [line["nimg"] for line in lines] == [12, 24, 36, 48]
    assert all(np.isfinite(x) for line in lines for x in line.values())
    assert lines[0].keys() >= {"loss/G", "loss/D", "loss/r1", "loss/r2", "scores/real", "scores/fake"}
    first, last = (tensors(complete(whole / "checkpoints")[i]) for i in (0, -1))
    still = [name for name in first if name.startswith(("G/", "D/")) and torch.equal(first[name], last[name])]
    assert still == ["G/mapping.w_avg"]
    assert last["optimizer_D/b4.weight:step"] == last["optimizer_G/synthesis.b4.input.weight:step"] == 12
    G, about = load_generator(complete(whole / "snapshots")[-1])
    assert isinstance(G, Generator)
    assert about["nimg"] == 48
    assert G(torch.randn(2, 8)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("nimg", [16, 40])
def test_it_goes_on_exactly(whole, unlabelled, tmp_path, assert_same_run, nimg):
    """In the midst of its schedules and at their end: learning rate, beta2, gamma and the average's half-life."""
    out = shutil.copytree(whole, tmp_path / "out")
    for folder in complete(out / "checkpoints"):
        if int(folder.name[5:]) > nimg:
            shutil.rmtree(folder)
    assert train(run_of(unlabelled, out), Team()) == 0
    assert_same_run(out, whole, checkpoints=6, snapshots=2)


def test_the_schedules_take_part_in_a_run(whole, unlabelled, tmp_path, tensors):
    """The same run without them ends elsewhere."""
    its = R3GANRecipe(lr=2e-3, lr_end=2e-3, beta2_end=0.9, gamma=1.0, gamma_end=1.0)
    assert train(run_of(unlabelled, tmp_path / "out", recipe=its), Team()) == 0
    a, b = (tensors(complete(out / "checkpoints")[-1]) for out in (tmp_path / "out", whole))
    assert (a["D/b4.weight"] - b["D/b4.weight"]).norm() > 1e-3 * b["D/b4.weight"].norm()


def test_stylegan2s_networks_train_and_keep_their_mean_w(unlabelled, labelled, tmp_path, tensors, stats):
    for data, labels in ((unlabelled, False), (labelled, True)):
        out = tmp_path / f"labels-{labels}"
        its = Data(path=str(data), workers=0, window=2, labels=labels)
        assert train(run_of(data, out, network=STYLEGAN2, data=its, total_kimg=0.024), Team()) == 0
        assert all(np.isfinite(x) for line in stats(out) for x in line.values())
        report.Report.load_state_dict({})
        first, last = (tensors(complete(out / "checkpoints")[i]) for i in (0, -1))
        still = [name for name in first if name.startswith(("G/", "D/")) and torch.equal(first[name], last[name])]
        # What is added to both scores of a pair, which have the same label, has no gradient.
        assert {name for name in still if not name.endswith(("noise_const", "w_avg"))} <= {"D/b4.out.bias"}
        assert last["G/mapping.w_avg"].abs().max() > 0
        assert last["G/synthesis.b16.conv1.noise_strength"] != 0


def test_stylegan2s_images_have_noise_and_no_mixing():
    r = recipe(network=STYLEGAN2)
    labels = torch.zeros(4, 0)
    images, _, w = r.fakes(draws_of(r, "Dmain"), labels)
    draws = draws_of(r, "Dmain")
    assert torch.equal(w, r.G.mapping(draws.normal(8), labels))
    ws = w[:, None].expand(-1, r.G.num_ws, -1)
    assert torch.equal(images, r.G.synthesis(ws, draws.noise_maps(r.G.synthesis.sizes)))
    assert [phase.name for phase in r.phases] == ["Dmain", "Gmain"]


def test_a_dry_run_measures_both_phases(unlabelled, capsys):
    assert dry_run(run_of(unlabelled, total_kimg=8), Team()) == 0
    said = capsys.readouterr().out
    for text in ("lr 0.002, betas (0.0, 0.9), eps 1e-08", "Dmain", "Gmain", "R1 gamma 1."):
        assert text in said


def test_the_benchmarks_measure_both_phases():
    run = Run(batch=4, network=NETWORK, recipe=R3GANRecipe())
    rows = bench_model.measure(run, 16, CPU, 1, 1e9, tqdm(disable=True))
    assert [row["phase"] for row in rows] == ["Dmain", "Gmain", "iteration"]
    assert rows[0]["flops"] > 2 * rows[1]["flops"] > 0
    planned = {"rows": bench_plan.plan(run, 16, [3], bench_plan.Cluster()), "settings": run.model_dump(mode="json")}
    (impossible,) = (line for line in bench_plan.describe_plan(planned) if line.startswith("Not possible"))
    assert "same batch on 3 GPUs leaves 1.33333 images each" in impossible


# Several processes, and DeepSpeed's engines, which have optimizers of their own.

RANKS = """
import sys
from pathlib import Path
from styleloom.training.config import read_run
from styleloom.training.distributed import Team
from styleloom.training.loop import train
team = Team()
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    assert train(read_run(path), team) == 0
team.close()
"""


@pytest.mark.slow
def test_engines_follow_the_schedules(unlabelled, python, tmp_path, tensors):
    """Two processes with DeepSpeed end where two without it do, and where one does."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "ranks.py").write_text(RANKS)
    strategies: dict[str, Any] = {"accelerate": {}} | {
        f"zero{stage}": {"strategy": "deepspeed", "zero_stage": stage} for stage in range(3)
    }
    for name, its in strategies.items():
        run = Run.model_validate(run_of(unlabelled, tmp_path / name).model_dump() | {"parallel": its})
        write_run(run, tmp_path / "runs" / f"{name}.json")
    process = python(tmp_path / "ranks.py", tmp_path / "runs", ranks=2)
    try:
        said = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        said = process.communicate()
    assert process.returncode == 0, said
    assert train(run_of(unlabelled, tmp_path / "one"), Team()) == 0
    one = tensors(complete(tmp_path / "one" / "checkpoints")[-1])
    for name in strategies:
        found = tensors(complete(tmp_path / name / "checkpoints")[-1])
        for part in ("G/", "D/", "G_ema/"):
            names = [each for each in one if each.startswith(part)]
            assert max(float((found[n] - one[n]).norm() / (one[n].norm() + 1e-3)) for n in names) < 5e-3, (name, part)
