"""ops/upfirdn2d.py: the published reference's values, every path against the definition, three derivatives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from styleloom.ops.upfirdn2d import (
    LONG,
    downsample2d,
    reference,
    setup_filter,
    strided,
    upfirdn2d,
    upsample2d,
)

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "op_upfirdn2d.npz"))
CASES = json.loads(GOLDEN["meta"].item())
ARGUMENTS = ("up", "down", "padding", "flip_filter", "gain")


def golden_filter(name):
    return torch.ones(1, 1) if name == "none" else torch.tensor(GOLDEN[f"filter/{name}"])


def size_xy(f):
    return f.shape[-1], f.shape[0]


def as_upfirdn2d(case, f) -> dict[str, Any]:
    """The arguments of `upfirdn2d` that say what the case's function says."""
    w, h = size_xy(f)
    kind = case["fn"]
    if kind == "upfirdn2d":
        return {name: case[name] for name in ARGUMENTS}
    if kind == "filter2d":
        x, y = case.get("padding", [0, 0])
        return {"padding": [x + w // 2, x + (w - 1) // 2, y + h // 2, y + (h - 1) // 2]}
    if kind == "upsample2d":
        padding = [(w + 1) // 2, (w - 2) // 2, (h + 1) // 2, (h - 2) // 2]
        return {"up": 2, "padding": padding, "gain": 4 * case.get("gain", 1)}
    assert kind == "downsample2d"
    padding = [(w - 1) // 2, (w - 2) // 2, (h - 1) // 2, (h - 2) // 2]
    return {"down": 2, "padding": padding, "flip_filter": case.get("flip_filter", False)}


def assert_golden(case, op):
    x = torch.tensor(GOLDEN[f"x/{case['x']}"], requires_grad=True)
    y = op(x)
    (dx,) = torch.autograd.grad(y, x, torch.tensor(GOLDEN[f"{case['id']}/dy"]))
    torch.testing.assert_close(y.detach(), torch.tensor(GOLDEN[f"{case['id']}/y"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, torch.tensor(GOLDEN[f"{case['id']}/dx"]), rtol=1e-5, atol=1e-5)


def test_every_kind_of_golden_case_is_there():
    assert len(CASES) == 242
    assert {case["fn"] for case in CASES} == {"upfirdn2d", "filter2d", "upsample2d", "downsample2d"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['fn']}")
def test_golden_of_the_definition(case):
    f = golden_filter(case["f"])
    assert_golden(case, lambda x: reference(x, f, **as_upfirdn2d(case, f)))


def test_golden(ops_path):
    for case in CASES:
        f = golden_filter(case["f"])
        assert_golden(case, lambda x, case=case, f=f: upfirdn2d(x, f, **as_upfirdn2d(case, f)))


@pytest.mark.parametrize(("kind", "op"), [("upsample2d", upsample2d), ("downsample2d", downsample2d)])
def test_golden_of_the_short_forms(ops_path, kind, op):
    plain = [case for case in CASES if case["fn"] == kind and not {"gain", "flip_filter"} & set(case)]
    assert len(plain) == 2
    for case in plain:
        assert_golden(case, lambda x, case=case: op(x, golden_filter(case["f"])))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = {
    "planes": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "channels of more": lambda x: x.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "one for all channels": lambda x: x[:, :1].expand_as(x),
}


def kept_format(x, y):
    """Whether y is dense, and channels-last where x has its channels next to each other."""
    last = x.stride(1) == 1 and x.shape[1] > 1
    return y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def check_op(agree, x, f, arguments, seed=0):
    """Values, gradient and gradient of the gradient, against the definition in float64."""
    g = torch.Generator().manual_seed(seed)
    up, down, padding, flip, gain = arguments
    before = x.clone()
    dtype = torch.float32 if x.dtype == torch.float64 else x.dtype  # the filter is float32
    x = x.detach().requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = upfirdn2d(x, f, *arguments), reference(exact, f.double(), *arguments)
    assert y.dtype == x.dtype
    # The same sums with everything positive: what the rounding errors are relative to.
    exact_size = exact.detach().abs().requires_grad_()
    size = reference(exact_size, f.double().abs(), up, down, padding, flip, abs(gain))
    agree(y.detach(), expected.detach(), dtype, size.detach())
    dy = torch.randn(y.shape, generator=g).to(x.dtype).requires_grad_()
    exact_dy = dy.detach().double().requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (expected_dx,) = torch.autograd.grad(expected, exact, exact_dy, create_graph=True)
    (dx_size,) = torch.autograd.grad(size, exact_size, exact_dy.detach().abs())
    assert dx.dtype == x.dtype
    agree(dx.detach(), expected_dx.detach(), dtype, dx_size)
    if len(x):  # torch's own convolution of nothing has no second derivative
        (ddy,) = torch.autograd.grad(dx, dy, x.detach())  # once more the op itself
        agree(ddy, expected.detach(), dtype, size.detach())
    assert torch.equal(x.detach(), before)  # not written to
    return y


factor, pad = st.integers(1, 4), st.integers(-3, 5)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
@given(
    up=st.tuples(factor, factor),
    down=st.tuples(factor, factor),
    direction=st.sampled_from(["up", "down", "both"]),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    taps=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    separable=st.booleans(),
    padding=st.tuples(pad, pad, pad, pad),
    flip=st.booleans(),
    gain=st.sampled_from([1.0, 1.7, -0.3]),
    n=st.sampled_from([0, 1, 1, 2]),
    channels=st.sampled_from([1, 3, 15, 16, 17, 64, 70, 83]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_every_path_equals_the_definition(
    ops_path, agree, up, down, direction, sides, taps, separable, padding, flip, gain, n, channels, layout, dtype, seed
):
    g = torch.Generator().manual_seed(seed)
    (h, w), (fh, fw) = sides, taps
    fh = fw if separable else fh
    up, down = ((1, 1) if direction == "down" else up), ((1, 1) if direction == "up" else down)
    x0, x1, y0, y1 = padding
    assume(w * up[0] + x0 + x1 >= fw and h * up[1] + y0 + y1 >= fh)
    x = LAYOUTS[layout](torch.randn(n, channels, h, w, generator=g).to(dtype))
    f = torch.randn([fw] if separable else [fh, fw], generator=g)
    y = check_op(agree, x, f, (up, down, padding, flip, gain), seed)
    assert ops_path != "cpu" or dtype == torch.float64 or not y.numel() or kept_format(x, y)


@pytest.mark.parametrize("layout", ["planes", "channels last"])
@pytest.mark.parametrize(
    ("taps", "up", "down", "padding"),
    [
        ([4], 1, 1, [1, 2, 1, 2]),
        ([4], (1, 2), 1, [1, 2, 2, 1]),
        ([12], 2, 1, [6, 5, 6, 5]),
        ([12], 1, 2, [5, 5, 5, 5]),
        ([3, 4], 1, (1, 2), 1),
        ([6], (3, 2), (2, 3), 4),
    ],
)
def test_tall_images(ops_path, agree, taps, up, down, padding, layout):
    """Our kernel cuts planes into bands of 64 rows."""
    g = torch.Generator().manual_seed(0)
    x = LAYOUTS[layout](torch.randn(1, 2, 200, 20, generator=g))
    check_op(agree, x, torch.randn(taps, generator=g), (up, down, padding, False, 1.0))


@pytest.mark.parametrize("taps", [4, 12])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_third_derivatives(ops_path, agree, taps, up, down):
    g = torch.Generator().manual_seed(0)
    x, f, weight = torch.randn(1, 3, 8, 6, generator=g), torch.rand(taps, generator=g), torch.randn(3, generator=g)
    found = []
    for op, image in ((upfirdn2d, x), (reference, x.double())):
        image = image.requires_grad_()
        y = op(op(image, f, up, down, taps).pow(4), f, 1, 2, 3)
        for _ in range(3):
            (y,) = torch.autograd.grad((y * weight.to(y.dtype)[:, None, None]).sum(), image, create_graph=True)
        found.append(y.detach())
    agree(*found, size=20 * found[1].abs().max())


def test_the_filter_may_lie_anyhow(ops_path, agree):
    """As a view of something larger, in another precision, or with a gradient nobody asks for."""
    x, f = torch.randn(1, 2, 9, 9), torch.randn(6, 8)
    check_op(agree, x, f[::2, ::2], (1, 1, 2, False, 1.0))
    check_op(agree, x, f.mT, (1, 2, 4, True, 1.0))
    check_op(agree, x, f[:, 3], (2, 1, 4, False, 1.0))
    assert torch.equal(upfirdn2d(x, f.double()), upfirdn2d(x, f))
    torch.testing.assert_close(upfirdn2d(x, f.requires_grad_()), upfirdn2d(x, f.detach()), check_stride=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["planes", "channels last"])
def test_rounding_is_that_of_torch(cpu_library, monkeypatch, dtype, layout):
    monkeypatch.setenv("STYLELOOM_OPS", "cpu")
    x = LAYOUTS[layout](torch.ones(1, 37, 2, 19, dtype=dtype))
    for step in range(32):
        gain = 1 + step * torch.finfo(dtype).eps / 8  # ties and what is beside them
        assert torch.equal(upfirdn2d(x, torch.ones(1), gain=gain), (x.float() * gain).to(dtype))


def test_two_passes_are_as_good_as_one(ops_path, agree):
    x, f = torch.randn(2, 3, 20, 20), torch.rand(LONG + 1)
    assert len(f) > LONG
    table = (f[:, None] * f).clone()
    for arguments in [(1, 1, 3, False, 2.0), (2, 1, (4, 3, 2, 5), True, 3.0), ((1, 2), (2, 1), (4, 3), False, 0.5)]:
        agree(upfirdn2d(x, f, *arguments), reference(x.double(), table.double(), *arguments), size=20)


def test_an_image_smaller_than_the_filter_is_refused(ops_path):
    x, f = torch.randn(1, 1, 2, 5), torch.ones(3, 3)
    with pytest.raises((ValueError, RuntimeError), match=r"smaller than|can't be greater than|too small"):
        upfirdn2d(x, f)
    assert upfirdn2d(x, f, padding=[0, 0, 0, 1]).shape == (1, 1, 1, 3)


def test_the_strided_form_in_float64():
    g = torch.Generator().manual_seed(0)
    x, f = torch.randn(2, 3, 7, 5, generator=g, dtype=torch.float64), torch.randn(4, 3, generator=g)
    for up, down in ((1, 1), (2, 1), ((3, 1), 1), (1, 2), (1, (3, 2))):
        for padding in (2, [1, 3, -1, 4], (1, 2), [2, 2, 1, 1]):
            for flip in (False, True):
                fast = strided(x, f, up, down, padding, flip, 1.7)
                assert fast is not None
                expected = reference(x, f, up, down, padding, flip, 1.7)
                torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", [reference, strided, upfirdn2d])
def test_a_crop_may_take_the_whole_image_where_the_other_side_is_padded(ops_path, function):
    x, f = torch.ones(1, 1, 1, 1), torch.ones(1, 1)
    y = function(x, f, 2, 1, [-2, 3, 0, 0], False, 1.0)  # 1 0 -> crop both -> 0 0 0
    assert torch.equal(y, torch.zeros(1, 1, 2, 3))


def test_both_up_and_down_has_no_strided_form_and_is_still_right(ops_path, agree):
    x, f = torch.randn(1, 1, 5, 5), setup_filter([1, 3, 3, 1])
    assert strided(x, f, 2, 2, 2, False, 1.0) is None
    agree(upfirdn2d(x, f, 2, 2, 2), reference(x.double(), f, 2, 2, 2))


RESAMPLINGS = [
    pytest.param({"padding": 1}, id="blur-even-padding"),
    pytest.param({"padding": [2, -1, 0, 1]}, id="blur-crop"),
    pytest.param({"padding": [0, -1]}, id="blur-even-crop"),
    pytest.param({"up": 2, "padding": [2, 1, 2, 1]}, id="up"),
    pytest.param({"up": [2, 1], "padding": [2, -1, 1, 1]}, id="up-x"),
    pytest.param({"down": 2, "padding": 1}, id="down"),
    pytest.param({"up": 2, "down": 2, "padding": 2}, id="up-down"),
]


@pytest.mark.parametrize("arguments", RESAMPLINGS)
def test_first_and_second_derivatives(ops_path, arguments):
    f = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.7, -0.4]])
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: upfirdn2d(x, f, **arguments), x)
    # The op is linear: a non-linear function of it makes the second derivative more than zero.
    assert gradgradcheck(lambda x: upfirdn2d(x, f, **arguments).pow(3), x)


@pytest.mark.parametrize("arguments", RESAMPLINGS[:-1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(ops_path, arguments, memory_format):
    x = torch.randn(2, 3, 8, 6)
    f = setup_filter([1, 3, 3, 1])
    y = upfirdn2d(x.contiguous(memory_format=memory_format), f, **arguments)
    assert ops_path == "reference" or y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, reference(x, f, **arguments))


@pytest.mark.parametrize("arguments", RESAMPLINGS)
def test_empty_batch(ops_path, arguments):
    f = setup_filter([1, 3, 3, 1])
    one = upfirdn2d(torch.randn(1, 2, 6, 8), f, **arguments)
    none = upfirdn2d(torch.randn(0, 2, 6, 8), f, **arguments)
    assert none.shape == (0, *one.shape[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_that_of_the_image(ops_path, dtype):
    f = setup_filter([1, 3, 3, 1])
    x = torch.randn(1, 2, 6, 6)
    y = upsample2d(x.to(dtype), f)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), upsample2d(x, f), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("op", [upsample2d, downsample2d])
def test_resampling_keeps_brightness(ops_path, op):
    y = op(torch.ones(1, 1, 12, 12), setup_filter([1, 3, 3, 1]))
    torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones_like(y[:, :, 2:-2, 2:-2]))


def test_a_separable_filter_is_the_table_of_its_products(ops_path, agree):
    x, f = torch.randn(2, 3, 8, 9), setup_filter([1, 3, 3, 1])
    agree(upfirdn2d(x, f, 2, 1, 3, False, 1.3), reference(x.double(), f[:, None] * f, 2, 1, 3, False, 1.3))


def test_setup_filter():
    f = setup_filter([1, 3])
    assert f.dtype == torch.float32
    torch.testing.assert_close(f, torch.tensor([1.0, 3.0]) / 4)
    torch.testing.assert_close(setup_filter([[1, 2, 1]]), torch.tensor([[0.25, 0.5, 0.25]]))


@pytest.mark.parametrize("taps", [[], [[]], 3.0, [[[1.0, 2.0]]], [1.0, -1.0]])
def test_bad_filter(taps):
    with pytest.raises(ValueError, match="a filter is one row of taps"):
        setup_filter(taps)


def test_a_filter_may_have_a_gradient(ops_path):
    x = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(0))
    f = torch.tensor([1.0, 3.0, 3.0, 1.0]).requires_grad_()
    (df,) = torch.autograd.grad(upfirdn2d(x, f, padding=2).sum(), f)
    (expected,) = torch.autograd.grad(reference(x, f, padding=2).sum(), f)
    torch.testing.assert_close(df, expected)


@pytest.mark.parametrize("factors", [{"up": 0}, {"down": 0}, {"up": (1, 0)}, {"down": -1}])
def test_factors_below_1_are_refused(ops_path, factors):
    with pytest.raises(ValueError, match="have to be 1 or more"):
        upfirdn2d(torch.ones(1, 16, 8, 8), torch.ones(4), padding=9, **factors)
