"""training/projection.py: it finds what a network has drawn; its parts by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from styleloom.training.checkpoint import load_discriminator, save_snapshot
from styleloom.training.networks import build, progressive, r3gan, stylegan2
from styleloom.training.perceptual import LaplacianPyramid
from styleloom.training.projection import (
    Plan,
    Projection,
    autocorrelation,
    jitter,
    learning_rate,
    normalise,
    statistics,
)

EMBED = LaplacianPyramid(2)
STEPS = 100
SIZE = 8, 8


def livened(network):
    """With weights away from their start, so that noise and labels show; smooth, as a trained one is."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module", name="G")
def small_generator():
    torch.manual_seed(0)
    return livened(stylegan2.Generator(*SIZE, z_dim=8, w_dim=8, mapping_layers=2, channel_base=64))


def z_of(*seeds: int, dim: int = 8) -> Tensor:
    return torch.cat([torch.randn(1, dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def search(G, targets, class_: int | None = None, **plan: Any) -> Projection:
    projection = Projection(G, EMBED, targets, range(len(targets)), Plan(**{"steps": STEPS, **plan}), class_)
    for _ in range(projection.plan.steps):
        projection.step()
    return projection


@pytest.mark.parametrize(
    ("t", "rate"), [(0, 0), (0.025, 0.5), (0.05, 1), (0.5, 1), (0.75, 1), (0.875, 0.5), (1, 0), (0.8125, 0.853553)]
)
def test_learning_rate(t, rate):
    assert learning_rate(t) == pytest.approx(rate, abs=1e-6)


@pytest.mark.parametrize(("t", "scale"), [(0, 1), (0.375, 0.25), (0.75, 0), (1, 0)])
def test_jitter(t, scale):
    assert jitter(t) == pytest.approx(scale)


def test_autocorrelation_by_hand():
    rows = torch.tensor([1.0, -1.0]).repeat(4)[:, None].expand(8, 8)  # -1 times the one above, 1 times the one beside
    assert autocorrelation([rows[None, None]]).tolist() == [2]
    x = torch.zeros(2, 1, 4, 4)
    x[0, 0, 0, 0] = x[0, 0, 0, 3] = 2  # neighbours only round the border: one product of 4 in 16
    x[1, 0, 1, 1] = 3
    assert autocorrelation([x]).tolist() == [(4 / 16) ** 2, 0]
    assert autocorrelation([x, x]).tolist() == [2 * (4 / 16) ** 2, 0]


def test_autocorrelation_sees_larger_scales():
    """Blocks of 2x2 at 16 px are noise with twice the amplitude at 8 px."""
    small = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    blocks = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    own = torch.stack([(blocks * blocks.roll(1, dims=dim)).mean().square() for dim in (2, 3)])
    reduced = torch.stack([(4 * small * small.roll(1, dims=dim)).mean().square() for dim in (2, 3)])
    assert autocorrelation([blocks]).item() == pytest.approx((own + reduced).sum().item(), rel=1e-5)


def test_white_noise_has_hardly_any():
    x = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert autocorrelation([x]).max() < 0.15
    smooth = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1) * 3
    assert autocorrelation([smooth]).min() > 1


def test_normalise():
    maps = [3 + 5 * torch.randn(2, 1, 6, 10), torch.randn(2, 1, 4, 4)]
    normalise(maps)
    for x in maps:
        torch.testing.assert_close(x.mean(dim=[1, 2, 3]), torch.zeros(2), rtol=0, atol=1e-6)
        torch.testing.assert_close(x.var(dim=[1, 2, 3], unbiased=False), torch.ones(2))
    flat = torch.ones(1, 1, 4, 4)
    normalise([flat])
    assert (flat == 0).all()


def test_statistics(G):
    mean, spread = statistics(G, 0, samples=2500)
    w = G.mapping(torch.randn(20000, 8, generator=torch.Generator().manual_seed(1)))
    assert spread == pytest.approx((w - w.mean(dim=0)).square().sum(dim=1).mean().sqrt().item(), rel=0.05)
    assert (mean - w.mean(dim=0)).norm() < 0.1 * spread
    assert statistics(G, 1, samples=2500)[1] != spread


def test_statistics_of_a_class():
    torch.manual_seed(0)
    G = livened(stylegan2.Generator(*SIZE, c_dim=3, z_dim=8, w_dim=8, mapping_layers=2, channel_base=64))
    each = [statistics(G, 0, class_, 600)[0] for class_ in range(3)]
    assert (each[0] - each[1]).norm() > 0.1
    torch.testing.assert_close(statistics(G, 0, None, 600)[0], torch.stack(each).mean(dim=0), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("space", ["w", "w+"])
def test_it_finds_an_image_that_the_network_drew(G, space):
    targets = G(z_of(1, 2), noise="const")
    projection = search(G, targets, space=space, noise="const")
    before = Projection(G, EMBED, targets, range(2), Plan(noise="const")).distances()
    assert (projection.distances() < 0.02 * before).all(), (before, projection.distances())
    assert projection.ws().shape == (2, G.num_ws, 8)
    assert (projection.ws()[:, 0] == projection.ws()[:, 1]).all() == (space == "w")
    assert projection.images().shape == targets.shape
    assert (projection.offsets() > 0.2).all()


def test_w_plus_comes_nearer_to_what_no_w_draws(G):
    ws = G.mapping(z_of(1, 2, 3, 4))
    targets = G.synthesis(torch.stack([ws[[0, 1, 2, 3]], ws[[3, 0, 1, 2]]]), "const")
    one = search(G, targets, noise="const").distances()
    each = search(G, targets, space="w+", noise="const").distances()
    assert (each < 0.5 * one).all(), (one, each)


def test_noise_maps_take_part_and_stay_white(G):
    targets = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    without = search(G, targets, noise="const").distances()
    projection = search(G, targets, regularise=0.0)
    assert (projection.distances() < 0.9 * without).all()
    assert [tuple(x.shape) for x in projection.maps] == [(2, 1, *size) for size in G.synthesis.sizes]
    for x in projection.maps:
        torch.testing.assert_close(x.mean(dim=[1, 2, 3]), torch.zeros(2), rtol=0, atol=1e-5)
        torch.testing.assert_close(x.square().mean(dim=[1, 2, 3]), torch.ones(2), rtol=1e-4, atol=0)
    regular = search(G, targets)
    assert (autocorrelation(regular.maps) < 0.1 * autocorrelation(projection.maps)).all()


def test_images_do_not_depend_on_each_other(G):
    targets = G(z_of(1, 2, 3), noise="none")
    together = search(G, targets, steps=20)
    alone = Projection(G, EMBED, targets[2:], [2], Plan(steps=20))
    for _ in range(20):
        alone.step()
    torch.testing.assert_close(alone.ws(), together.ws()[2:], rtol=1e-3, atol=1e-3)
    for a, b in zip(alone.maps, together.maps, strict=True):
        torch.testing.assert_close(a, b[2:], rtol=1e-2, atol=1e-2)
    other = search(G, targets, steps=20, seed=1)
    assert (other.ws() - together.ws()).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("network", "c_dim"),
    [(progressive.Generator, 0), (progressive.Generator, 3), (r3gan.Generator, 0), (r3gan.Generator, 3)],
)
def test_into_z_where_there_is_no_w(network, c_dim):
    torch.manual_seed(0)
    kind: dict[str, Any] = {"group_width": 4} if network is r3gan.Generator else {}
    G = livened(network(*SIZE, z_dim=8, c_dim=c_dim, channel_base=64, **kind))
    class_, c = (2, torch.eye(3)[[2, 2]]) if c_dim else (None, None)
    z = z_of(1, 2)
    targets = G(z / z.square().mean(dim=1, keepdim=True).sqrt(), c)
    start = Projection(G, EMBED, targets, range(2), Plan(space="z"), class_)
    far = (EMBED(targets) - EMBED(targets.roll(1, dims=0))).square().sum(dim=1)
    assert (start.distances() < far).all()
    projection = search(G, targets, class_, space="z")
    assert (projection.distances() < 0.1 * start.distances().clamp_min(0.01)).all(), projection.distances()
    torch.testing.assert_close(projection.latent.square().mean(dim=2), torch.ones(2, 1))
    assert projection.offsets().tolist() == pytest.approx([1, 1], rel=1e-4)
    assert projection.ws().shape == (2, 1, G.mapping.w_dim)
    assert projection.maps == []
    torch.testing.assert_close(G.synthesis(projection.ws()), projection.images())


def test_the_last_step_is_the_finest(G):
    projection = search(G, G(z_of(5), noise="const"), noise="const")
    settled = projection.ws()
    projection.done = projection.plan.steps - 1
    projection.step()
    assert (projection.ws() - settled).abs().max() < 1e-3
    assert math.isclose(projection.optimizer.param_groups[0]["lr"], 0.1 * learning_rate(1 - 0.5 / STEPS))


def test_discriminators_of_snapshots(tmp_path, settings):
    run = settings("", "", "--recompute")
    generator, discriminator = build(run, 16, 16, 3, 0)
    livened(discriminator)
    folder = save_snapshot(tmp_path, generator, discriminator, run, 7000, 16, 16, 3, [])
    loaded = load_discriminator(folder)
    assert loaded is not None
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded(x), discriminator(x))
    assert not any(p.requires_grad for p in loaded.parameters())
    (folder / "discriminator.safetensors").unlink()
    assert load_discriminator(folder) is None
    (folder / "discriminator.safetensors").write_bytes((folder / "generator.safetensors").read_bytes())
    with pytest.raises(ValueError, match="do not fit this network"):
        load_discriminator(folder)
