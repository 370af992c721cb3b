"""training/phema.py: closed forms against integration, and averages made afterwards against those tracked directly."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from styleloom.training import ema, phema

STORED = (0.05, 0.1)


def profile(sigma_rel, time, t):
    """The power function's weights at the times t, by definition."""
    gamma = phema.gamma_of(sigma_rel)
    return np.where(t <= time, (gamma + 1) / time * (np.minimum(t, time) / time) ** gamma, 0.0)


def integrate(values, t):
    """By the midpoint rule; t are the midpoints of equal steps."""
    return float(np.sum(values) * (t[1] - t[0]))


def midpoints(end, n=200_000):
    return (np.arange(n) + 0.5) * (end / n)


# Widths.


@pytest.mark.parametrize("sigma_rel", [0.002, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.288])
def test_a_width_and_its_exponent(sigma_rel):
    gamma = phema.gamma_of(sigma_rel)
    assert gamma > 0
    assert phema.sigma_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)


def test_published_exponents():
    """Of EDM2's two widths, section 3.2."""
    assert phema.gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert phema.gamma_of(0.1) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.94, 30.0])
def test_the_width_is_the_profiles_standard_deviation(gamma):
    t = midpoints(1.0)
    p = (gamma + 1) * t**gamma
    mean = integrate(p * t, t)
    assert integrate(p, t) == pytest.approx(1, abs=1e-6)
    assert phema.sigma_of(gamma) == pytest.approx(math.sqrt(integrate(p * (t - mean) ** 2, t)), rel=1e-6)


def test_a_uniform_average_is_the_widest():
    assert phema.sigma_of(0.0) == pytest.approx(phema.WIDEST)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 12**-0.5, 0.3, 1.0, math.nan])
def test_what_is_no_width_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"a relative width lies between 0 and 0\.289"):
        phema.gamma_of(sigma_rel)
    with pytest.raises(ValueError, match="a relative width"):
        phema.coefficients([(0.05, 100)], (sigma_rel, 100))
    with pytest.raises(ValueError, match="a relative width"):
        phema.coefficients([(sigma_rel, 100)], (0.05, 100))


def test_names_have_three_decimals():
    assert [phema.name(width) for width in (0.05, 0.1, 0.2345)] == ["phema-0.050", "phema-0.100", "phema-0.234"]


# Tracking.


def test_nothing_is_left_of_what_an_average_began_as():
    assert phema.beta(0.05, 64, 64) == 0
    with pytest.raises(AssertionError):
        phema.beta(0.05, 32, 64)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_a_step_gives_the_newest_weights_the_profile_over_its_time(sigma_rel):
    """Whatever the sizes of the steps: they are 4, 16 or 64 images."""
    steps = [4] * 10 + [64] * 5 + [16] * 20
    ends = np.cumsum(steps)
    betas = [phema.beta(sigma_rel, int(end), step) for end, step in zip(ends, steps, strict=True)]
    shares = [(1 - betas[i]) * math.prod(betas[i + 1 :]) for i in range(len(steps))]
    assert sum(shares) == pytest.approx(1)
    t = midpoints(float(ends[-1]), 680_000)  # of which no step's end is one
    p = profile(sigma_rel, ends[-1], t)
    for i, share in enumerate(shares):
        inside = (t > ends[i] - steps[i]) & (t <= ends[i])
        assert share == pytest.approx(integrate(p * inside, t), abs=1e-7)


# Fitting.


@pytest.mark.parametrize(("a", "b"), [((0.05, 100), (0.1, 70)), ((0.1, 70), (0.05, 100)), ((0.2, 30), (0.25, 30))])
def test_inner_products_are_integrals(a, b):
    t = midpoints(100.0)
    pair = [np.array([[phema.gamma_of(width), time]]) for width, time in (a, b)]
    expected = integrate(profile(a[0], a[1], t) * profile(b[0], b[1], t), t)
    assert phema.inner_products(*pair)[0, 0] == pytest.approx(expected, rel=1e-6)


def test_inner_products_of_several():
    a = np.array([[1.0, 1.0], [2.0, 0.5], [7.0, 0.1]])
    b = np.array([[3.0, 0.7], [0.5, 1.0]])
    both = phema.inner_products(a, b)
    assert both.shape == (3, 2)
    assert np.allclose(both, phema.inner_products(b, a).T, rtol=1e-14)
    assert both[2, 1] == phema.inner_products(a[2:], b[1:])[0, 0]


def stored(n, end=10_000):
    return [(width, end * (i + 1) // n) for i in range(n) for width in STORED]


@pytest.mark.parametrize("want", [(0.03, 10_000), (0.07, 10_000), (0.15, 10_000), (0.25, 10_000), (0.1, 9_000)])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_error_is_that_of_the_profile(n, want):
    have = stored(n)
    weights, error = phema.coefficients(have, want)
    assert weights.dtype == np.float64
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    t = midpoints(10_000.0)
    target = profile(want[0], want[1], t)
    basis = np.stack([profile(width, time, t) for width, time in have])
    fitted = weights @ basis
    expected = math.sqrt(integrate((fitted - target) ** 2, t) / integrate(target**2, t))
    assert error == pytest.approx(expected, rel=1e-3, abs=1e-6)
    # No combination near it whose weights add up to 1 is better.
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = rng.normal(size=len(have))
        other = weights + 1e-3 * (other - other.mean())
        assert integrate((other @ basis - target) ** 2, t) >= integrate((fitted - target) ** 2, t) * (1 - 1e-9)


@pytest.mark.parametrize("at", [1, 8, 31])
def test_what_is_stored_is_given_back(at):
    have = stored(16)
    weights, error = phema.coefficients(have, have[at])
    assert error == 0
    assert weights.tolist() == [float(i == at) for i in range(32)]


def test_more_snapshots_fit_better():
    """The error falls with the square of their number."""
    errors = [[phema.coefficients(stored(n), (width, 10_000))[1] for n in (8, 16, 32, 64)] for width in (0.07, 0.15)]
    for each in errors:
        assert each[0] < 0.04
        assert each[-1] < 1e-3
        assert all(b < a / 3 for a, b in itertools.pairwise(each))


def test_snapshots_right_after_one_another_do_no_harm():
    """As when a run is stopped and goes on: their profiles are nearly the same."""
    have = sorted([*stored(16), (0.05, 5_001), (0.1, 5_001), (0.05, 9_999), (0.1, 9_999)], key=lambda each: each[1])
    weights, error = phema.coefficients(have, (0.15, 10_000))
    assert error <= phema.coefficients(stored(16), (0.15, 10_000))[1] * 1.001
    assert np.abs(weights).sum() < 100  # or rounding of what is stored would count


def test_one_average_is_all_there_is():
    weights, error = phema.coefficients([(0.1, 500)], (0.2, 1_000))
    assert weights.tolist() == [1.0]
    assert error > 0.5


# All together.


class Tracked:
    """A network whose weights walk at random, and its averages."""

    def __init__(self, widths, n=400):
        generator = torch.Generator().manual_seed(0)
        self.network = nn.Linear(n, 1, bias=False).double()
        self.network.weight.data = 3 + torch.randn(1, n, generator=generator, dtype=torch.float64)
        self.averages = {width: ema.average_of(self.network) for width in widths}
        self.nimg = 0
        self.generator = generator

    def step(self, batch):
        self.nimg += batch
        walk = torch.randn(self.network.weight.shape, generator=self.generator, dtype=torch.float64)
        self.network.weight.data += 0.1 * math.sqrt(batch) * walk
        for width, average in self.averages.items():
            ema.update_average(average, self.network, phema.beta(width, self.nimg, batch))

    def average(self, width):
        return self.averages[width].weight.detach().clone()


@pytest.mark.parametrize(("every", "within"), [(64, 0.01), (16, 0.0005)])
def test_averages_afterwards_are_those_tracked_directly(every, within):
    """`within` is relative to how far they are from those stored; widths outside theirs are harder below than above."""
    widths = (0.03, 0.07, 0.15, 0.2)
    tracked = Tracked((*STORED, *widths))
    have, kept = [], []
    for i in range(1024):
        tracked.step(8 if i < 512 else 16)
        if (i + 1) % every == 0:
            have += [(width, tracked.nimg) for width in STORED]
            kept += [tracked.average(width) for width in STORED]
    for width in widths:
        weights, error = phema.coefficients(have, (width, tracked.nimg))
        made = sum(weight * x for weight, x in zip(weights, kept, strict=True))
        direct = tracked.average(width)
        distance = min((tracked.average(each) - direct).norm() for each in STORED)
        off = (made - direct).norm() / distance
        print(f"{width}: fit {error:.1e}, average off by {off:.1e} of its distance to those stored")
        assert off < within * (10 if width == 0.03 else 1)
        assert (made - direct).norm() / direct.norm() < error
