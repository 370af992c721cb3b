"""training/perceptual.py: squared distances of what each embedding makes of images are the distances it stands for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from styleloom.training.networks import growing, msg, progressive, r3gan, stylegan1, stylegan2
from styleloom.training.perceptual import (
    DiscriminatorFeatures,
    LaplacianPyramid,
    Lpips,
    colours,
    distances,
    load_lpips,
)


class Pixels(nn.Module):
    """A stand-in for vgg16.pt: what it is given."""

    def forward(self, x: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        assert not resize_images
        assert return_lpips
        return x.flatten(1)


class Means(nn.Module):
    """A stand-in of few features: the mean colours."""

    def forward(self, x: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        return x.mean(dim=[2, 3])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def test_distances():
    assert distances(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 5.0]])).tolist() == [9, 26]


@pytest.mark.parametrize(("size", "seen"), [((64, 64), (64, 64)), ((512, 512), (256, 256)), ((512, 384), (256, 192))])
def test_lpips_sees_at_most_256_px(size, seen):
    x = noise(2, 3, *size)
    y = Lpips(Pixels(), "stand-in")(x).reshape(2, 3, *seen)
    factor = size[0] // seen[0]
    expected = torch.nn.functional.avg_pool2d(x * 127.5 + 127.5, factor)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_lpips_of_a_file(tmp_path):
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    lpips = load_lpips(tmp_path / "means.pt", torch.device("cpu"))
    assert lpips.name == "LPIPS (means.pt)"
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    d = distances(lpips(x), lpips(torch.ones(1, 3, 32, 32)))
    assert d.item() == pytest.approx(3 * 127.5**2, rel=1e-5)
    (gradient,) = torch.autograd.grad(d.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, -2 * 127.5**2 / 1024))


def test_no_lpips_file(tmp_path):
    with pytest.raises(ValueError, match=r"there is no perceptual network .*none.pt.*vgg16.pt"):
        load_lpips(tmp_path / "none.pt", torch.device("cpu"))


def test_colours():
    assert colours(noise(1, 3, 2, 2))[0].shape == (1, 3, 2, 2)
    (grey,) = colours(torch.full([2, 1, 2, 2], 7.0))
    assert grey.shape == (2, 3, 2, 2)
    assert (grey == 7).all()
    rgba = torch.tensor([200.0, 100.0, 0.0, 51.0]).reshape(1, 4, 1, 1)
    black, white = colours(rgba)
    assert black.flatten().tolist() == pytest.approx([40, 20, 0])
    assert white.flatten().tolist() == pytest.approx([244, 224, 204])


def test_alpha_counts_for_lpips():
    lpips = Lpips(Means(), "stand-in")
    x, y = torch.full([1, 4, 8, 8], -1.0), torch.full([1, 4, 8, 8], -1.0)
    y[:, 3] = 1
    assert distances(lpips(x), lpips(y)).item() == pytest.approx(3 * 255**2 / 2)  # the same on black


def discriminators():
    sizes: dict[str, Any] = {"width": 32, "height": 16, "channel_base": 128, "channel_max": 8}
    yield "stylegan2", stylegan2.Discriminator(**sizes, mbstd_group=2)
    yield "growing", stylegan2.Discriminator(**sizes, mbstd_group=2, grows=True)
    yield "conditional", stylegan2.Discriminator(**sizes, mbstd_group=2, c_dim=3, mapping_layers=1)
    yield "progressive", progressive.Discriminator(**sizes, mbstd_group=2)
    yield "stylegan1", stylegan1.Discriminator(**sizes, mbstd_group=2)
    yield "r3gan", r3gan.Discriminator(**sizes)
    yield "msg", msg.Discriminator(**sizes, mbstd_group=2)


@pytest.mark.parametrize(("kind", "D"), [pytest.param(*each, id=each[0]) for each in discriminators()])
def test_features_are_the_discriminators_own(kind, D):
    x = noise(2, 3, 16, 32)
    for alpha in (1, 0.3) if kind in ("growing", "progressive", "stylegan1") else (1,):
        D.grow_to(D.levels - 1, alpha)
        seen = []
        handle = D.b4.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0]))
        if kind == "msg":
            D(growing.pyramid(x, D.levels))
        else:
            D(x, *[torch.eye(3)[:2]] * (kind == "conditional"))
        handle.remove()
        maps = DiscriminatorFeatures(D).levels(x)
        assert [tuple(y.shape[2:]) for y in maps] == [(16, 32), (8, 16), (4, 8)]
        last = seen[0][:, : maps[-1].shape[1]]
        torch.testing.assert_close(maps[-1], last, rtol=1e-4, atol=1e-5)


def test_discriminator_distances():
    """Each level's features of unit length, their mean over places, the mean of the levels; and the mean of pixels."""
    D = stylegan2.Discriminator(16, 16, channel_base=64, mbstd_group=1)
    embed = DiscriminatorFeatures(D)
    x, y = noise(3, 3, 16, 16), noise(3, 3, 16, 16, seed=1)
    expected = (x - y).square().mean(dim=[1, 2, 3])
    levels = list(zip(embed.levels(x), embed.levels(y), strict=True))
    for a, b in levels:
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
        expected = expected + (2 - 2 * cosine).mean(dim=[1, 2]) / len(levels)
    torch.testing.assert_close(distances(embed(x), embed(y)), expected, rtol=1e-4, atol=1e-5)
    assert distances(embed(x), embed(x)).tolist() == [0, 0, 0]


def test_discriminator_distances_have_gradients():
    D = stylegan2.Discriminator(16, 16, channel_base=64, mbstd_group=1)
    embed = DiscriminatorFeatures(D)
    x, y = noise(2, 3, 16, 16).requires_grad_(), noise(2, 3, 16, 16, seed=1)
    (gradient,) = torch.autograd.grad(distances(embed(x), embed(y)).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.9
    assert not any(p.requires_grad for p in D.parameters())


def test_laplacian_pyramid():
    """What differs at one scale only counts with its mean square, whatever the scale."""
    embed = LaplacianPyramid(3)
    x = noise(1, 3, 16, 16)
    fine = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]).repeat(8, 8)
    middle = fine[:8, :8].repeat_interleave(2, 0).repeat_interleave(2, 1)
    rest = torch.full([16, 16], 0.5)
    for detail in (fine, middle, rest):
        assert distances(embed(x), embed(x + detail)).item() == pytest.approx(0.25, rel=1e-4)
    assert distances(embed(x), embed(x + fine + middle + rest)).item() == pytest.approx(0.75, rel=1e-4)
    assert distances(embed(x), embed(x)).item() == 0
