"""training/metrics/swd.py: pyramids and 1-D transport where the answer is known, independence of chunks, order and
processes, and the damages that the distance has to see, at the level where they are."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from styleloom.training.metrics import swd as metrics
from styleloom.training.metrics.swd import Descriptors, distance, laplacian_pyramid, swd


def pictures(n, side=64, seed=0, width=None, channels=3):
    """uint8 [n, channels, side, width]: rectangles of all sizes over each other, rather grey ones."""
    g = torch.Generator().manual_seed(seed)
    width = width or side
    x = torch.zeros(n, channels, side, width)
    for image in x:
        for size in torch.rand(40, generator=g).square():
            top, left, h, w = (
                torch.rand(4, generator=g) * torch.tensor([side, width, side * size, width * size])
            ).long()
            grey, tint = torch.rand(1, generator=g) * 180 + 30, torch.randn(channels, generator=g) * 15
            image[:, top : top + h + 1, left : left + w + 1] = (grey + tint)[:, None, None]
    return x.round().clamp(0, 255).to(torch.uint8)


def described(images, **options):
    out = Descriptors(**options)
    out.add(images, range(len(images)))
    return out


def blurred(images):
    return metrics._blur(images.float()).round().to(torch.uint8)


A, B = pictures(48, seed=1), pictures(48, seed=2)


def score(reals, fakes, **options):
    return swd(reals, fakes, patches=64, projections=64, **options)


def test_zero_for_the_same_images():
    assert score(A, A) == {"swd/64": 0.0, "swd/32": 0.0, "swd/16": 0.0, "swd/mean": 0.0}


def test_symmetric_and_the_mean_of_its_levels():
    there, back = score(A, B), score(B, A)
    assert there == back
    *levels, mean = there.values()
    assert all(x > 0 for x in levels)
    assert mean == pytest.approx(sum(levels) / 3)


def test_one_pixel_by_hand():
    """Images of 1x1 have one patch of one pixel, so that all that is left is the 1-D distance, normalised."""
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(0)
    a = torch.rand(40, 1, 1, 1, generator=g)
    b = torch.rand(40, 1, 1, 1, generator=g) ** 3
    za, zb = (((x - x.mean()) / x.std(correction=0)).flatten().numpy() for x in (a, b))
    expected = 1000 * stats.wasserstein_distance(za, zb)
    assert swd(a, b, patches=1, projections=1)["swd/1"] == pytest.approx(expected, rel=1e-4)


def test_sliced_distance_is_the_mean_over_directions():
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 4, generator=g), torch.randn(50, 4, generator=g) * 2 + 1
    directions = F.normalize(torch.randn(130, 4, generator=g), dim=1)  # more than are held at a time
    expected = sum(stats.wasserstein_distance(a @ d, b @ d) for d in directions) / 130
    assert metrics._sliced_distance(a, b, directions) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("shape", "sides"), [((64, 64), [64, 32, 16]), ((33, 70), [33, 17]), ((31, 99), [31])])
def test_a_pyramid_adds_up_to_its_image(shape, sides):
    x = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    levels = laplacian_pyramid(x)
    assert [level.shape[2] for level in levels] == sides
    image = levels[-1]
    for level in reversed(levels[:-1]):
        image = level + metrics._enlarge(image, level)
    torch.testing.assert_close(image, x)


def test_a_gradient_has_no_details():
    """The filter keeps straight lines, so only the mirrored borders are left of them."""
    ramp = torch.arange(64.0).expand(1, 1, 64, 64) + torch.arange(64.0)[:, None] * 2
    fine, middle, coarse = laplacian_pyramid(ramp)
    assert fine[:, :, 6:-6, 6:-6].abs().max() < 1e-4
    assert middle[:, :, 6:-6, 6:-6].abs().max() < 1e-4
    torch.testing.assert_close(coarse[:, :, 3:-3, 3:-3], ramp[:, :, ::4, ::4][:, :, 3:-3, 3:-3])


def test_binomial_filter():
    x = torch.zeros(1, 1, 9, 9)
    x[:, :, 4, 4] = 256
    row = torch.tensor([0, 0, 1, 4, 6, 4, 1, 0, 0.0])
    assert torch.equal(metrics._blur(x)[0, 0], torch.outer(row, row))


def test_patches_are_where_their_positions_say():
    x = torch.arange(2 * 3 * 9 * 20).reshape(2, 3, 9, 20).float()
    positions = torch.tensor([[[0, 0], [2, 13]], [[1, 5], [2, 0]]])
    patches = metrics.cut_patches(x, positions)
    assert patches.shape == (2, 2, 3, 7, 7)
    for image in range(2):
        for patch in range(2):
            r, c = positions[image, patch].tolist()
            assert torch.equal(patches[image, patch], x[image, :, r : r + 7, c : c + 7])


def test_patches_are_cut_everywhere_and_no_larger_than_the_image():
    image = torch.arange(5 * 9).reshape(1, 1, 5, 9).to(torch.uint8)
    (level,) = described(image, patches=64).levels()
    assert level.shape == (64, 1, 5 * 7)
    assert {int(patch[0, 0]) for patch in level} == {0, 1, 2}  # rows: all five; columns: from 0, 1 or 2


def test_positions_differ_between_images_levels_and_seeds():
    x = torch.zeros(2, 3, 64, 64)
    one = Descriptors(seed=3)
    first, second = one._positions(0, [5, 6], x)
    assert torch.equal(second, one._positions(0, [6], x[:1])[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, one._positions(1, [5], x)[0])
    assert not torch.equal(first, Descriptors(seed=4)._positions(0, [5], x)[0])
    assert (int(first.min()), int(first.max())) >= (0, 50)
    assert int(first.max()) <= 57


@pytest.mark.parametrize("images", [A, A.double() / 127.5 - 1], ids=["uint8", "float"])
def test_chunks_order_and_processes_do_not_matter(images):
    whole = described(images, patches=32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = [Descriptors(patches=32) for _ in range(3)]
    for i, some in enumerate(order.split(5)):
        parts[i % 3].add(images[some], some.tolist())
    joined = Descriptors(patches=32)
    for part in parts:
        joined.merge(pickle.loads(pickle.dumps(part)))  # as between processes
    assert len(joined) == len(images)
    for a, b in zip(whole.levels(), joined.levels(), strict=True):
        assert torch.equal(a, b)
    other = described(B, patches=32)
    assert distance(whole, other, projections=16) == distance(joined, other, projections=16)


def test_a_part_sent_to_another_process_takes_only_its_patches_along():
    sent = described(A[:16], patches=8)
    assert len(pickle.dumps(sent)) < 2 * sum(x.numel() * 4 for levels in sent.of.values() for x in levels)


def test_an_image_that_is_added_again_takes_the_place_of_the_first():
    twice = described(B, patches=8)
    twice.add(A, range(48))
    assert distance(twice, described(A, patches=8), projections=8)["swd/mean"] == 0


@pytest.mark.parametrize("side", [64, 7], ids=["positions and projections", "projections"])
def test_the_seed_decides(side):
    a, b = A[:, :, :side, :side], B[:, :, :side, :side]  # of 7x7 there is but one patch
    assert score(a, b, seed=5) == score(a, b, seed=5)
    assert score(a, b, seed=5) != score(a, b, seed=6)


def test_uint8_and_float_agree():
    assert score(A, B) == pytest.approx(score(A.float() / 127.5 - 1, B.double() / 127.5 - 1), rel=1e-3)


def test_normalised():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 2, 9, generator=g) * torch.tensor([3.0, 70.0])[:, None] + torch.tensor([250.0, -4])[:, None]
    z = metrics._normalised(x, *metrics._channel_moments(x)).reshape(500, 2, 9)
    torch.testing.assert_close(z.mean(dim=[0, 2]), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(dim=[0, 2], correction=0), torch.ones(2))


def test_a_set_normalised_by_itself_hides_its_contrast_and_cast():
    x = A.float() / 127.5 - 1
    pale = x * torch.tensor([0.5, 0.8, 0.9])[:, None, None] + torch.tensor([0.1, 0.0, -0.1])[:, None, None]
    honest = score(x, B)
    assert score(x, pale)["swd/mean"] < 0.01 * honest["swd/mean"]
    assert score(x, pale, normalise_by="reals")["swd/mean"] > 2 * honest["swd/mean"]


def test_normalised_by_the_reals():
    """Fakes of twice the contrast are as far away as their own values, sorted, are."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(40, 1, 1, 1, generator=g) * 0.2
    expected = 1000 * (a / a.std(correction=0)).sub(a.mean() / a.std(correction=0)).abs().mean()
    found = swd(a, (a - a.mean()) * 2 + a.mean(), patches=1, projections=1, normalise_by="reals")["swd/1"]
    assert found == pytest.approx(float(expected), rel=1e-4)


def noisy(x):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 25
    return (x + noise).round().clamp(0, 255).to(torch.uint8)


def discoloured(x):
    """Inverted red: the same brightness and contrast in every channel, other colours."""
    return torch.cat([255 - x[:, :1], x[:, 1:]], dim=1)


DAMAGES = {
    "blurred": (blurred, 64),
    "noisy": (noisy, 64),
    "discoloured": (discoloured, 16),
    "collapsed": (lambda x: x[:2].repeat(24, 1, 1, 1), 16),
}


@pytest.mark.parametrize("normalise_by", ["each", "reals"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_images_are_further_away_where_they_are_damaged(name, normalise_by):
    damage, side = DAMAGES[name]
    honest, damaged = (score(A, x, normalise_by=normalise_by) for x in (B, damage(B)))
    assert damaged["swd/mean"] > 1.5 * honest["swd/mean"]
    assert damaged[f"swd/{side}"] > 2 * honest[f"swd/{side}"]


def test_blur_and_noise_show_at_the_finest_level_most():
    honest = score(A, B)
    for damage in (blurred, noisy):
        damaged = score(A, damage(B))
        excess = [damaged[f"swd/{side}"] - honest[f"swd/{side}"] for side in (64, 32, 16)]
        assert excess[0] > 2 * max(excess[1:])


def test_the_more_blurred_the_further():
    images, scores = B, []
    for _ in range(4):
        scores.append(score(A, images)["swd/64"])
        images = blurred(images)
    assert scores == sorted(scores)


def test_the_fewer_are_distinct_the_further():
    scores = [score(A, B[:n].repeat(48 // n, 1, 1, 1))["swd/16"] for n in (48, 8, 1)]
    assert scores == sorted(scores)


@pytest.mark.parametrize(
    ("side", "width", "channels", "names"),
    [
        (32, 48, 1, ["swd/32", "swd/16"]),
        (40, 32, 4, ["swd/32", "swd/16"]),
        (33, 70, 3, ["swd/33", "swd/17"]),
        (16, 16, 3, ["swd/16"]),
        (12, 40, 3, ["swd/12"]),
        (4, 4, 3, ["swd/4"]),
    ],
)
def test_all_shapes(side, width, channels, names):
    a, b = (pictures(24, side, seed, width, channels) for seed in (1, 2))
    honest, damaged = score(a, b), score(a, b[:1].repeat(24, 1, 1, 1))
    assert list(honest) == [*names, "swd/mean"]
    assert 0 < honest["swd/mean"] < damaged["swd/mean"]


def test_rounding_errors_of_flat_images_are_not_blown_up_to_the_contrast_of_pictures():
    flat = torch.rand(48, 1, 1, 1, generator=torch.Generator().manual_seed(0)).expand(48, 3, 64, 64)
    found = score(flat, flat.flip(0) * 0.7)
    assert found["swd/64"] < 1
    assert found["swd/32"] < 1


def test_a_constant_set_has_a_finite_distance():
    """A collapsed generator, or an opaque alpha channel."""
    black = torch.zeros_like(A)
    assert score(black, black)["swd/mean"] == 0
    assert 2 * score(A, B)["swd/mean"] < score(A, black)["swd/mean"] < math.inf


def test_a_nan_shows():
    x = A.float() / 127.5 - 1
    x[3] = math.nan
    assert math.isnan(score(A, x)["swd/mean"])


def test_bad_arguments():
    some = described(A[:4], patches=8)
    with pytest.raises(ValueError, match="at least 1"):
        Descriptors(patches=0)
    with pytest.raises(ValueError, match="at least 1"):
        distance(some, some, projections=0)
    with pytest.raises(ValueError, match="indices"):
        some.add(A[:4], range(3))
    with pytest.raises(ValueError, match="shape"):
        some.add(A[0], range(3))
    with pytest.raises(ValueError, match="floating"):
        some.add(A[:4].int(), range(4))
    with pytest.raises(ValueError, match="do not go with"):
        some.add(A[:4, :1], range(4))
    with pytest.raises(ValueError, match="do not compare"):
        distance(some, described(A[:5], patches=8))
    with pytest.raises(ValueError, match="do not compare"):
        distance(some, described(A[:4, :, :32], patches=8))
    with pytest.raises(ValueError, match="do not compare"):
        distance(Descriptors(), Descriptors())
    for other in (described(A[:4], patches=9), described(A[:4], patches=8, seed=1)):
        with pytest.raises(ValueError, match="do not go with"):
            distance(some, other)
        with pytest.raises(ValueError, match="do not go with"):
            some.merge(other)
    with pytest.raises(ValueError, match="do not go with"):
        some.merge(described(A[:4, :1], patches=8))
