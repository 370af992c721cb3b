"""training/draws.py: random numbers that belong to samples."""

import pytest
import torch

from styleloom.training.draws import Draws, sample_seed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, "Gmain", 0), 6244436351945034072),
        ((0, "Gmain", 1), 2315688483792552394),
        ((0, "Dmain", 0), 5437310771381339704),
        ((1, "Gmain", 0), 6065215177977688595),
        ((2**63 - 1, "Gpl", 10**9), 7036185686740160400),
    ],
)
def test_sample_seed_stays_what_it_was(arguments, expected):
    """Were numpy to change Philox, old runs would resume with other numbers."""
    assert sample_seed(*arguments) == expected


def test_sample_seed_fits_a_torch_generator():
    seeds = [sample_seed(0, "x", i) for i in range(1000)]
    assert len(set(seeds)) == 1000
    assert min(seeds) >= 0
    assert 2**62 < max(seeds) < 2**63


def everything(positions, seed=3, purpose="Gmain"):
    """All kinds of draws in a fixed order, as one [n, ...] matrix."""
    draws = Draws(seed, purpose, positions)
    parts = [draws.normal(20), draws.uniform(3), draws.uniform()[:, None], draws.normal(2, 3).flatten(1)]
    return torch.cat([*parts, *(m.flatten(1) for m in draws.noise_maps([(4, 4), (2, 6)]))], dim=1)


def test_numbers_do_not_depend_on_how_positions_are_split_or_ordered():
    whole = everything(range(100, 108))
    for step in (2, 4):
        for r in range(step):
            assert torch.equal(everything(range(100 + r, 108, step)), whole[r::step])
    assert torch.equal(everything([107, 100]), whole[[7, 0]])


@pytest.mark.parametrize("other", [{"seed": 4}, {"purpose": "Dmain"}, {"positions": [6]}])
def test_another_seed_purpose_or_position_gives_other_numbers(other):
    a, b = everything([5]), everything(**{"positions": [5], **other})
    assert (a == b).float().mean() < 0.05


def test_successive_calls_continue():
    draws = Draws(0, "a", [0, 1])
    first, second = draws.normal(8), draws.normal(8)
    assert not torch.isclose(first, second).any()
    again = Draws(0, "a", [0, 1])
    assert torch.equal(again.normal(8), first)
    assert torch.equal(again.normal(8), second)


def test_order_of_calls_matters():
    a, b = Draws(0, "a", [0]), Draws(0, "a", [0])
    normal = a.normal(4)
    b.uniform(4)
    assert not torch.isclose(b.normal(4), normal).any()


def test_normal_has_mean_0_and_variance_1():
    x = Draws(0, "a", range(300)).normal(100)
    assert x.dtype == torch.float32
    assert x.mean().abs() < 0.02
    assert abs(x.var().item() - 1) < 0.03
    rows = x.mean(dim=1)  # samples are independent of one another: their means spread as 1 / sqrt(100)
    assert abs(rows.std().item() - 0.1) < 0.02


def test_uniform_fills_0_to_1():
    x = Draws(0, "a", range(300)).uniform(100)
    assert 0 <= x.min() < 0.001
    assert 0.999 < x.max() < 1
    assert abs(x.mean().item() - 0.5) < 0.01


def test_shapes():
    draws = Draws(0, "a", [3, 4])
    assert len(draws) == 2
    assert draws.uniform().shape == (2,)
    assert draws.normal(3, 4).shape == (2, 3, 4)
    assert [m.shape for m in draws.noise_maps([(4, 6), (8, 12)])] == [(2, 1, 4, 6), (2, 1, 8, 12)]


def test_no_positions_give_no_rows():
    assert Draws(0, "a", []).normal(5).shape == (0, 5)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    everything([1, 2])
    assert torch.equal(torch.get_rng_state(), state)
