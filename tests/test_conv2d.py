"""ops/conv2d.py against its definition: insert zeros, filter, convolve, drop samples, one after the other."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.grad import conv2d_weight

from styleloom.ops import conv2d as module
from styleloom.ops.conv2d import conv2d
from styleloom.ops.upfirdn2d import reference, setup_filter

FILTERS = {
    "1331": setup_filter([1, 3, 3, 1]),
    "121": setup_filter([1, 2, 1]),
    "asymmetric": setup_filter([[1.0, 5.0, 2.0], [0.5, 3.0, 1.0]]),
}


def definition(x, w, f, up, down):
    p = w.shape[-1] // 2
    fh, fw = f.shape[0], f.shape[-1]
    if up == 2:  # the weight of an up-sampling layer is applied mirrored
        padding = [p + (fw + 1) // 2, p + (fw - 2) // 2, p + (fh + 1) // 2, p + (fh - 2) // 2]
        return F.conv2d(reference(x, f, up=2, padding=padding, gain=4), w.flip([2, 3]))
    if down == 2:
        padding = [p + (fw - 1) // 2, p + (fw - 2) // 2, p + (fh - 1) // 2, p + (fh - 2) // 2]
        return F.conv2d(reference(x, f, padding=padding), w)[:, :, ::2, ::2]
    return F.conv2d(F.pad(x, [p, p, p, p]), w)


def inputs(k, h=6, w=8):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(2, 3, h, w, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, k, k, generator=g, dtype=torch.float64, requires_grad=True)
    return x, weight


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("name", FILTERS)
def test_values_and_gradients(ops_path, k, up, down, name):
    x, w = inputs(k)
    f = FILTERS[name]
    y, expected = conv2d(x, w, f, up, down), definition(x, w, f, up, down)
    assert y.shape == (2, 4, 6 * up // down, 8 * up // down)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn(y.shape, dtype=torch.float64)
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, w), dy) for out in (y, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups_do_not_mix(ops_path, groups):
    """Values and derivatives of first and second order are torch's."""
    g = torch.Generator().manual_seed(groups)
    x = torch.randn(2, 6, 5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 6 // groups, 3, 3, generator=g, dtype=torch.float64, requires_grad=True)
    y, expected = conv2d(x, w, groups=groups), F.conv2d(x, w, padding=1, groups=groups)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn(y.shape, generator=g, dtype=torch.float64)
    firsts = [torch.autograd.grad(out, (x, w), out * weights, create_graph=True) for out in (y, expected)]
    seconds = [torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (x, w)) for first in firsts]
    for mine, theirs in zip((*firsts[0], *seconds[0]), (*firsts[1], *seconds[1]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_no_filter_is_needed_without_resampling(ops_path):
    x, w = inputs(3)
    torch.testing.assert_close(conv2d(x, w), definition(x, w, torch.ones(1, 1), 1, 1))


def largest(t):
    return t.detach().amax() if t.numel() else t.detach()


def check(agree, x, w, f, up, down, seed=0):
    """Values, both gradients, and the gradients of a function of those, against float64."""
    g = torch.Generator().manual_seed(seed)
    dtype, before = x.dtype, (x.clone(), w.clone())
    its = (x.detach().requires_grad_(), w.detach().requires_grad_())
    exact = [t.detach().to(dtype).double().requires_grad_() for t in its]
    (image, weight), (exact_image, exact_weight) = its, exact
    y, expected = conv2d(image, weight, f, up, down), definition(exact_image, exact_weight, f.double(), up, down)
    assert y.dtype == dtype
    positive = [t.detach().abs().requires_grad_() for t in exact]
    size = definition(positive[0], positive[1], f.double().abs(), up, down)
    # Winograd's sums mix what belongs to neighbours; in low precision, what lies before the filter is rounded too.
    factor = 4 if dtype == torch.float32 else 16
    agree(y.detach(), expected.detach(), dtype, factor * largest(size), torchs=dtype != torch.float32)
    dy = torch.randn(y.shape, generator=g).to(dtype).requires_grad_()
    exact_dy = dy.detach().double().requires_grad_()
    grads = torch.autograd.grad(y, its, dy, create_graph=True)
    exact_grads = torch.autograd.grad(expected, exact, exact_dy, create_graph=True)
    sizes = torch.autograd.grad(size, positive, exact_dy.detach().abs())
    for mine, theirs, terms in zip(grads, exact_grads, sizes, strict=True):
        agree(mine.detach(), theirs.detach(), dtype, factor * largest(terms), torchs=dtype != torch.float32)
    if len(x):
        directions = [torch.randn(t.shape, generator=g).to(t.dtype) for t in its]
        exact_directions = [d.to(dtype).double() for d in directions]
        twice = torch.autograd.grad(grads, [dy, *its], directions)
        exact_twice = torch.autograd.grad(exact_grads, [exact_dy, *exact], exact_directions)
        for mine, theirs in zip(twice, exact_twice, strict=True):
            agree(mine, theirs, dtype, factor * 4 * theirs.abs().max(), torchs=dtype != torch.float32)
    assert torch.equal(its[0].detach(), before[0])  # not written to
    assert torch.equal(its[1].detach(), before[1])
    return y


LAYOUTS = {
    "planes": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels of more": lambda x: torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
    "one for all": lambda x: x[:, :1].expand_as(x),
}
WEIGHTS = {
    "planes": LAYOUTS["planes"],
    "channels last": LAYOUTS["channels last"],
    "transposed": LAYOUTS["transposed"],
    "swapped": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
}
channels = st.sampled_from([1, 3, 16, 16, 17, 32, 48])
parent_settings = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def calls(monkeypatch):
    """The kinds of Winograd convolutions that ran."""
    names, inner = [], module._call

    def spy(name, args, x):
        names.append((name, args.kind))
        return inner(name, args, x)

    monkeypatch.setattr(module, "_call", spy)
    return names


@settings(parent_settings, max_examples=120)
@given(
    k=st.sampled_from([1, 3, 3, 3, 5]),
    resampling=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    inputs=channels,
    outputs=channels,
    n=st.sampled_from([0, 1, 2, 3]),
    sides=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    filter_name=st.sampled_from(sorted(FILTERS)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    weight_layout=st.sampled_from(sorted(WEIGHTS)),
    strided_from=st.sampled_from([0, 0, 50, 1024]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_every_path_equals_the_definition(
    monkeypatch, ops_path, agree, k, resampling, inputs, outputs, n, sides, filter_name, layout, weight_layout,
    strided_from, dtype, seed,
):  # fmt: skip
    monkeypatch.setattr(module, "STRIDED_FROM", strided_from)
    g = torch.Generator().manual_seed(seed)
    up, down = resampling
    f = FILTERS[filter_name]
    assume(down == 1 or min(sides) > 1)
    x = LAYOUTS[layout](torch.randn(n, inputs, *sides, generator=g).to(dtype))
    w = WEIGHTS[weight_layout](torch.randn(outputs, inputs, k, k, generator=g))
    check(agree, x, w, f, up, down, seed)


@pytest.mark.parametrize("ops_path", ["cpu"], indirect=True)
@pytest.mark.parametrize("weight_layout", WEIGHTS)
@pytest.mark.parametrize("resampling", [(1, 1), (2, 1), (1, 2)])
@settings(parent_settings, max_examples=10)
@given(
    inputs=st.sampled_from([16, 32, 48]),
    outputs=st.sampled_from([16, 32, 48]),
    n=st.integers(0, 3),
    sides=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 1000),
)
def test_winograd_equals_the_definition(
    monkeypatch, ops_path, agree, calls, weight_layout, resampling, inputs, outputs, n, sides, layout, seed
):
    monkeypatch.setattr(module, "STRIDED_FROM", 0)
    assume(resampling[1] == 1 or min(sides) > 1)
    g = torch.Generator().manual_seed(seed)
    x = LAYOUTS[layout](torch.randn(n, inputs, *sides, generator=g))
    w = WEIGHTS[weight_layout](torch.randn(outputs, inputs, 3, 3, generator=g))
    calls.clear()
    up, down = resampling
    check(agree, x, w, FILTERS["1331"], up, down, seed)
    assert {name for name, _ in calls} == {"sl_winograd", "sl_winograd_weight"}


@pytest.mark.parametrize("strided_from", [0, 72, 73])
def test_which_convolutions_go_through_winograd(monkeypatch, cpu_library, calls, strided_from):
    monkeypatch.setenv("STYLELOOM_OPS", "cpu")
    monkeypatch.setattr(module, "STRIDED_FROM", strided_from)
    c, f = 2 * cpu_library.sl_winograd_lanes(), FILTERS["1331"]

    def run(up, down, channels=c, k=3, dtype=torch.float32, side=6):
        calls.clear()
        x = torch.randn(2, channels, side, side, dtype=dtype, requires_grad=True)
        w = torch.randn(c, channels, k, k, requires_grad=True)
        y = conv2d(x, w, f, up, down)
        forwards = list(calls)
        torch.autograd.grad(y.sum(), (x, w))
        return forwards, sorted(calls[len(forwards) :])

    same, down, up = ((name, kind) for name, kind in itertools.product(["sl_winograd"], range(3)))
    weights = [("sl_winograd_weight", kind) for kind in range(2)]
    assert run(1, 1) == ([same], [same, weights[0]])
    others: list[dict[str, Any]] = [
        {"channels": 3},
        {"k": 1},
        {"k": 5},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
    ]
    for other in others:
        assert run(1, 1, **other) == ([], [])
    # Results of the strided convolution: 2 * 6 * 6.
    assert run(1, 2, side=12) == (([down], [up, weights[1]]) if strided_from <= 72 else ([], []))
    assert run(2, 1) == (([up], [down, weights[1]]) if strided_from <= 72 else ([], []))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [64, 256])
def test_winograd_is_as_exact_as_torchs_own(monkeypatch, cpu_library, calls, stride, channels):
    """Relative errors, in the norm, of values and gradients against float64; torch's for channels-last images.

    For planes it may choose an algorithm that adds up in blocks, of half these errors.
    """
    monkeypatch.setenv("STYLELOOM_OPS", "cpu")
    monkeypatch.setattr(module, "STRIDED_FROM", 0)
    g = torch.Generator().manual_seed(0)
    side = 31 + stride
    x = torch.randn(4, channels, side, side, generator=g).contiguous(memory_format=torch.channels_last)
    y = torch.randn(4, channels, 32 // stride, 32 // stride, generator=g).contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, generator=g)
    p = 2 - stride

    def results(forward, transposed, weight, dtype):
        its, out, taps = (t.to(dtype) for t in (x, y, w))
        return forward(its, taps), transposed(out, taps), weight(its, out)

    def of_torch(dtype):
        return results(
            lambda x, w: F.conv2d(x, w, stride=stride, padding=p),
            lambda y, w: F.conv_transpose2d(y, w, stride=stride, padding=p),
            lambda x, y: conv2d_weight(x, list(w.shape), y, stride=stride, padding=p),
            dtype,
        )

    mine = results(
        lambda x, w: module._convolve(x, w, stride, p),
        lambda y, w: module._Transposed.apply(y, w, x.shape[2:], stride, p),
        lambda x, y: module._Weight.apply(x, y, w.shape[2:], stride, p),
        torch.float32,
    )
    assert len(calls) == len(mine)
    for ours, theirs, exact in zip(mine, of_torch(torch.float32), of_torch(torch.float64), strict=True):
        errors = [(t.double() - exact).norm() / exact.norm() for t in (ours, theirs)]
        assert errors[0] <= 1.5 * errors[1], errors
        assert errors[0] <= 2**-24 * (9 * channels) ** 0.5 / 4  # the roundings of one plain sum would be twice that


def total(tensors):
    return torch.stack([t.square().mean() for t in tensors]).sum()


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_third_derivatives(monkeypatch, ops_path, agree, up, down):
    monkeypatch.setattr(module, "STRIDED_FROM", 0)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(1, 16, 6, 4, generator=g), torch.randn(16, 16, 3, 3, generator=g) / 12
    found = []
    for op, dtype in ((conv2d, torch.float32), (definition, torch.float64)):
        its = [t.to(dtype).requires_grad_() for t in (x, w)]
        y = op(its[0], its[1], FILTERS["1331"].to(dtype), up, down)
        grads = torch.autograd.grad(y.pow(3).sum(), its, create_graph=True)
        twice = torch.autograd.grad(total(grads), its, create_graph=True)
        found.append(torch.autograd.grad(total(twice), its))
    for mine, theirs in zip(*found, strict=True):
        agree(mine, theirs, size=20 * theirs.abs().max())


@pytest.mark.parametrize(("x", "w"), itertools.combinations([16, 32, 48], 2))
def test_channels_that_do_not_fit_are_refused(ops_path, x, w):
    for k, channels in itertools.product((1, 3), ((x, w), (w, x))):
        with pytest.raises(ValueError, match=f"{channels[1]} input channels for an image of {channels[0]}"):
            conv2d(torch.zeros(1, channels[0], 4, 4), torch.zeros(16, channels[1], k, k))
        with pytest.raises(ValueError, match="input channels"):
            conv2d(torch.zeros(1, channels[0], 4, 4), torch.zeros(16, channels[1], k, k), FILTERS["1331"], up=2)


def test_memory_format(ops_path):
    """Channels-last stays so: then nothing is rearranged between layers."""
    device = torch.device("cpu")
    assert module.memory_format(device) == (torch.contiguous_format if ops_path == "reference" else torch.channels_last)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    for k, (up, down) in itertools.product((1, 3), ((1, 1), (2, 1), (1, 2))):
        y = conv2d(x, torch.randn(32, 16, k, k), FILTERS["1331"], up, down)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        if ops_path == "cpu":
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert dx.is_contiguous(memory_format=torch.channels_last)


def test_up_sampling_mirrors_the_weight(ops_path):
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = 1
    w = torch.arange(9.0).reshape(1, 1, 3, 3)
    f = torch.ones(1, 1)
    # A single pixel spreads the weight the right way round: that is convolution, where plain layers correlate.
    assert torch.equal(conv2d(x, w, f, up=2)[0, 0, 2:5, 2:5] / 4, w[0, 0])
    assert torch.equal(conv2d(x, w)[0, 0], w[0, 0].flip([0, 1]))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_second_derivatives(ops_path, k, up, down):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 2, 4, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, k, k, generator=g, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, w: conv2d(x, w, FILTERS["1331"], up, down), (x, w))
    assert gradgradcheck(lambda x, w: conv2d(x, w, FILTERS["1331"], up, down), (x, w))


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_computes_in_the_dtype_of_the_image(ops_path, up, down):
    x, w = (t.detach().float() for t in inputs(3))
    y = conv2d(x.bfloat16(), w, FILTERS["1331"], up, down)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), conv2d(x, w, FILTERS["1331"], up, down), rtol=0.05, atol=0.2)


def test_up_and_down_at_once_is_refused():
    x, w = inputs(3)
    with pytest.raises(AssertionError, match="up 2, down 2"):
        conv2d(x, w, FILTERS["1331"], up=2, down=2)
