"""training/latents.py: layers by name, arcs and splines with the properties that define them."""

import math

import pytest
import torch
from scipy.interpolate import CubicSpline

from styleloom.training.latents import Walks, mix, parse_layers, slerp


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("none", []),
        ("all", [*range(10)]),
        ("coarse", [0, 1, 2, 3]),
        ("middle", [4, 5, 6, 7]),
        ("fine", [8, 9]),
        ("0-3,6", [0, 1, 2, 3, 6]),
        ("fine, 2", [2, 8, 9]),
        ("3,1-3", [1, 2, 3]),
    ],
)
def test_layers(text, layers):
    assert parse_layers(text, 10) == layers


@pytest.mark.parametrize("text", ["", "rough", "3-1", "1,,2", "-1", "1.5"])
def test_layers_that_are_none(text):
    with pytest.raises(ValueError, match="--styles"):
        parse_layers(text, 10)


@pytest.mark.parametrize(("text", "num_ws"), [("8", 8), ("0-8", 8), ("fine", 8), ("coarse,fine", 6)])
def test_layers_that_are_not_there(text, num_ws):
    with pytest.raises(ValueError, match=f"has the layers 0 to {num_ws - 1}, so no"):
        parse_layers(text, num_ws)


def test_middle_ends_with_the_network():
    assert parse_layers("middle", 6) == [4, 5]


def test_mix():
    a, b = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    assert mix(a, b, [1, 3])[:, :, 0].tolist() == [[0, 1, 0, 1]] * 2
    assert a.sum() == 0
    expanded = torch.zeros(2, 1, 3).expand(-1, 4, -1)
    assert mix(expanded, b, [0])[:, :, 0].tolist() == [[1, 0, 0, 0]] * 2


def pairs(n: int = 50, dim: int = 16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, dim, generator=generator), torch.randn(n, dim, generator=generator)


def test_slerp_ends_at_its_ends():
    a, b = pairs()
    torch.testing.assert_close(slerp(a, b, torch.zeros(50)), a, rtol=0, atol=1e-6)
    torch.testing.assert_close(slerp(a, b, torch.ones(50)), b, rtol=0, atol=1e-6)


def test_slerp_by_hand():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    expected = [2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)]
    assert slerp(a, b, torch.tensor([1 / 3]))[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_slerp_keeps_norm_and_speed():
    a, b = (x.double() / x.double().norm(dim=1, keepdim=True) * 3 for x in pairs())
    points = torch.stack([slerp(a, b, torch.full([50], t / 10)) for t in range(11)])
    torch.testing.assert_close(points.norm(dim=2), torch.full([11, 50], 3.0).double())
    angles = torch.acos((points[1:] * points[:-1]).sum(dim=2) / 9)
    whole = torch.acos((a * b).sum(dim=1) / 9)
    torch.testing.assert_close(angles, (whole / 10).expand(10, -1), rtol=1e-6, atol=1e-9)


def test_slerp_interpolates_norms():
    a, b = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 5.0, 0]])
    assert slerp(a, b, torch.tensor([0.25])).norm().item() == pytest.approx(2)


@pytest.mark.parametrize("opposite", [-1.0, -1.0 - 1e-7])
def test_slerp_between_opposites_goes_round(opposite):
    a = torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64)
    b = a * opposite + torch.tensor([[0.0, 1e-7, 0.0]]) * (opposite < -1)
    middle = slerp(a, b, torch.tensor([0.5]))
    assert middle.norm().item() == pytest.approx(5, rel=1e-6)
    assert (middle @ a.t()).item() == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(slerp(a, b, torch.tensor([1.0])), b, rtol=0, atol=1e-5)


def test_slerp_between_equals_stays():
    a, _ = pairs()
    torch.testing.assert_close(slerp(a, a, torch.full([50], 0.3)), a, rtol=0, atol=1e-6)
    assert slerp(torch.zeros(1, 4), a[:1, :4], torch.tensor([0.5])).isfinite().all()


def keys(walks: int, K: int, dim: int = 3) -> torch.Tensor:
    return torch.randn(walks, K, dim, generator=torch.Generator().manual_seed(K))


@pytest.mark.parametrize("curve", ["linear", "slerp", "spline"])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("K", [2, 3, 5])
def test_walks_go_through_their_keys(curve, closed, K):
    x = keys(2, K)
    walks = Walks(x, closed, curve)
    assert walks.duration == (K if closed else K - 1)
    times = torch.arange(walks.duration + 1).double()
    for walk in range(2):
        points = walks.at(torch.full([len(times)], walk), times)
        expected = x[walk, torch.arange(walks.duration + 1) % K]
        torch.testing.assert_close(points, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("curve", ["linear", "slerp", "spline"])
def test_closed_walks_go_on(curve):
    walks = Walks(keys(1, 4), True, curve)
    one, time = torch.zeros(3, dtype=torch.long), torch.tensor([0.0, 0.3, 2.7]).double()
    torch.testing.assert_close(walks.at(one, time), walks.at(one, time + 4), rtol=0, atol=1e-6)


def test_linear_walks():
    walks = Walks(torch.tensor([[[0.0], [1.0], [4.0]]]), False, "linear")
    points = walks.at(torch.zeros(4, dtype=torch.long), torch.tensor([0.5, 1.0, 1.5, 2.0]).double())
    assert points[:, 0].tolist() == [0.5, 1, 2.5, 4]


@pytest.mark.parametrize("closed", [True, False])
def test_splines_are_scipys(closed):
    x = keys(1, 6)
    y = torch.cat([x[0], x[0, :1]]).double().numpy() if closed else x[0].double().numpy()
    truth = CubicSpline(range(len(y)), y, bc_type="periodic" if closed else "natural")
    walks = Walks(x, closed, "spline")
    time = torch.linspace(0, walks.duration, 61).double()
    points = walks.at(torch.zeros(61, dtype=torch.long), time)
    torch.testing.assert_close(points.double(), torch.from_numpy(truth(time.numpy())), rtol=0, atol=1e-5)


def test_a_spline_through_two_turns_without_a_corner():
    walks = Walks(torch.tensor([[[0.0], [1.0]]], dtype=torch.float64), True, "spline")
    h = 1e-4
    time = torch.tensor([1 - h, 1, 1 + h, 2 - h, 2, 2 + h]).double()
    before, at, after, before2, at2, after2 = walks.at(torch.zeros(6, dtype=torch.long), time)[:, 0].tolist()
    assert (at - before) / h == pytest.approx((after - at) / h, abs=1e-3)
    assert (at2 - before2) / h == pytest.approx((after2 - at2) / h, abs=1e-3)
    assert walks.at(torch.zeros(1, dtype=torch.long), torch.tensor([0.5]).double()).item() == pytest.approx(0.5)
