"""training/metrics/ppl.py: networks for which the path length is known, and files that are none."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from styleloom.training.draws import Draws
from styleloom.training.metrics.ppl import EPSILON, image_pairs, load_perceptual, mean_length
from styleloom.training.metrics.samples import draw_labels, generated_images
from styleloom.training.networks import build
from styleloom.training.report import to_uint8


class Pixels(nn.Module):
    """The squared distance of pixels."""

    def forward(self, x: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        assert return_lpips
        assert not resize_images
        return x.flatten(1) / 100


class Classes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def script(network: nn.Module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network), str(path))
    return path


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory):
    return load_perceptual(script(Pixels(), tmp_path_factory.mktemp("ppl") / "pixels.pt"), "cpu")


class Linear(nn.Module):
    """A generator whose images are linear in w, and w in z: 2x2 px of a grey."""

    z_dim, num_ws, has_w = 4, 3, True

    def __init__(self, has_w: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.has_w = has_w
        self.a, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def mapping(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        return z @ self.a if self.has_w else nn.functional.normalize(z)

    def synthesis(self, ws: Tensor) -> Tensor:
        assert ws.shape[1:] == (3, 4)
        return (ws.mean(dim=1) @ self.b).reshape(-1, 1, 2, 2)


def linear(has_w: bool = True) -> Any:
    return Linear(has_w)


def draws(n, seed=0):
    return Draws(seed, "path", range(n))


@pytest.mark.parametrize("sampling", ["end", "full"])
def test_the_length_of_a_linear_generator(perceptual, sampling):
    """The same anywhere on the path: |A (w1 - w0)|^2, three times as grey is repeated."""
    G = linear()
    a, b = image_pairs(G, draws(20), sampling=sampling, batch=6)
    assert a.shape == (20, 1, 2, 2)
    its = draws(20)
    z0, z1 = its.normal(4), its.normal(4)
    with torch.no_grad():
        whole = ((z1 - z0) @ G.a @ G.b).double() * 127.5 / 100
    expected = 3 * whole.square().sum(dim=1)
    found = perceptual.distances(a, b) / EPSILON**2
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_steps_begin_at_the_end_or_anywhere():
    G = linear()
    end, _ = image_pairs(G, draws(20), sampling="end")
    full, _ = image_pairs(G, draws(20), sampling="full")
    with torch.no_grad():
        z0 = draws(20).normal(4)
        own = G.synthesis(G.mapping(z0)[:, None].expand(-1, 3, -1)) * 127.5 + 127.5
    torch.testing.assert_close(end, own)
    assert ((full - own).abs().amax(dim=[1, 2, 3]) > 1).float().mean() > 0.8


def test_without_a_w_the_path_is_in_z(perceptual):
    """z is normalised, so a step turns it by epsilon times the angle between both ends."""
    G = linear(has_w=False)
    with torch.no_grad():
        G.b.copy_(torch.eye(4))
    a, b = image_pairs(G, draws(20), sampling="full")
    its = draws(20)
    z0, z1 = its.normal(4).double(), its.normal(4).double()
    angles = nn.functional.cosine_similarity(z0, z1).acos()
    expected = 3 * (angles * 127.5 / 100).square()
    torch.testing.assert_close(perceptual.distances(a, b) / EPSILON**2, expected, rtol=0.05, atol=0)


def test_both_ends_of_a_conditional_generators_step_have_one_label(settings):
    run = settings("", "", "--data.labels")
    G, _ = build(run, 16, 16, 3, 3)
    with torch.no_grad():
        for parameter in G.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    a, b = image_pairs(G.eval(), draws(6), [0, 5, 0], batch=4)
    its = draws(6)
    z, c = its.normal(8), torch.eye(3)[[1] * 6]
    with torch.no_grad():
        torch.testing.assert_close(a, G(z, c) * 127.5 + 127.5, atol=1e-2, rtol=1e-4)
    step = (b - a).abs().amax(dim=[1, 2, 3])
    assert (step > 0).all()
    assert (step < 1).all()
    assert a.std() > 10


def test_labels_are_as_frequent_as_in_the_data():
    labels = draw_labels(draws(400), [10, 0, 30])
    assert labels is not None
    assert labels.shape == (400, 3)
    assert torch.equal(labels.sum(dim=1), torch.ones(400))
    assert labels.sum(dim=0)[1] == 0
    assert labels.mean(dim=0)[2] == pytest.approx(0.75, abs=0.07)
    assert draw_labels(draws(4), []) is None


@pytest.mark.parametrize("noise", ["random", "const", "none"])
def test_generated_images_depend_on_nothing_but_their_positions(settings, noise):
    G, _ = build(settings("", ""), 16, 16, 3, 0)
    with torch.no_grad():
        for parameter in G.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        G.mapping.w_avg += 1
    G.eval()
    images = generated_images(G, draws(5), truncation=0.5, noise=noise, batch=2)
    assert images.dtype == torch.uint8
    last = generated_images(G, Draws(0, "path", [4]), truncation=0.5, noise=noise)
    assert (images[4:].int() - last.int()).abs().max() <= 1
    with torch.no_grad():
        own = to_uint8(G(draws(5).normal(8), truncation_psi=0.5, noise="const" if noise == "random" else noise))
    differ = (images.int() - own.int()).abs().max() > 1
    assert differ == (noise == "random")


def test_images_larger_than_256_px_are_reduced(perceptual):
    a, b = torch.rand(2, 2, 3, 520, 600, generator=torch.Generator().manual_seed(0)) * 255
    small = [nn.functional.avg_pool2d(x, 2).double() for x in (a, b)]
    expected = ((small[0] - small[1]) / 100).square().sum(dim=[1, 2, 3])
    torch.testing.assert_close(perceptual.distances(a, b), expected, rtol=1e-4, atol=0)
    rgba = [torch.cat([x, torch.full_like(x[:, :1], fill)], dim=1) for x, fill in ((a, 3), (b, 200))]
    torch.testing.assert_close(perceptual.distances(*rgba), expected, rtol=1e-4, atol=0)


def test_the_mean_leaves_the_extremes_out():
    distances = np.arange(1, 201, dtype=np.float32)
    distances[[3, 50]] = 1e9, -1e9
    kept = np.sort(distances)[1:-1]  # percentiles 1 and 99 of 200 fall on the second and the second last
    assert mean_length(distances) == pytest.approx(float(kept.astype(float).mean()) / EPSILON**2, rel=1e-6)
    assert mean_length(np.array([2.0])) == pytest.approx(2e8)
    with pytest.raises(ValueError, match="at least 1"):
        mean_length(np.zeros(0))


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("STYLELOOM_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="there is no perceptual network") as caught:
        load_perceptual(None, "cpu")
    for text in (
        str(tmp_path / "networks" / "vgg16.pt"),
        "stylegan2-ada-pytorch/pretrained/metrics/vgg16.pt",
        "--lpips",
    ):
        assert text in str(caught.value)


def test_other_networks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"classes\.pt does not give LPIPS"):
        load_perceptual(script(Classes(), tmp_path / "classes.pt"), "cpu")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match=r"text\.pt is not a whole TorchScript network"):
        load_perceptual(tmp_path / "text.pt", "cpu")


def test_what_cannot_be_verified_is_called_so(perceptual):
    assert perceptual.name == "unverified pixels.pt"
