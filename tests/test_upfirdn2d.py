"""ops/upfirdn2d.py: the published reference's values, the fast path against the definition, two derivatives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from styleloom.ops.upfirdn2d import (
    blur2d,
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


def as_upfirdn2d(case, f):
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
def test_golden(case):
    f = golden_filter(case["f"])
    for op in (reference, upfirdn2d):
        assert_golden(case, lambda x, op=op: op(x, f, **as_upfirdn2d(case, f)))


@pytest.mark.parametrize(("kind", "op"), [("upsample2d", upsample2d), ("downsample2d", downsample2d)])
def test_golden_of_the_short_forms(kind, op):
    plain = [case for case in CASES if case["fn"] == kind and not {"gain", "flip_filter"} & set(case)]
    assert len(plain) == 2
    for case in plain:
        assert_golden(case, lambda x, case=case: op(x, golden_filter(case["f"])))


def test_golden_of_blur2d():
    for case in CASES:
        if case["fn"] == "filter2d":
            f = golden_filter(case["f"])
            assert_golden(case, lambda x, case=case, f=f: blur2d(x, f, **as_upfirdn2d(case, f)))


def test_blur2d_gain():
    x, f = torch.randn(1, 2, 4, 4), setup_filter([1, 2, 1])
    torch.testing.assert_close(blur2d(x, f, padding=1, gain=3), 3 * blur2d(x, f, padding=1))


factor = st.sampled_from([(1, 1), (2, 2), (1, 2), (2, 1), (3, 1), (3, 3)])
pad = st.integers(-2, 4)


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(
    up_not_down=st.booleans(),
    factors=factor,
    sides=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    taps=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    separable=st.booleans(),
    padding=st.tuples(pad, pad, pad, pad),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_fast_path_equals_the_definition(up_not_down, factors, sides, taps, separable, padding, flip, seed):
    g = torch.Generator().manual_seed(seed)
    (h, w), (fh, fw) = sides, taps
    fh = fw if separable else fh
    up, down = (factors, (1, 1)) if up_not_down else ((1, 1), factors)
    x0, x1, y0, y1 = padding
    assume(w * up[0] + x0 + x1 >= fw and h * up[1] + y0 + y1 >= fh)
    x = torch.randn(2, 3, h, w, generator=g, dtype=torch.float64, requires_grad=True)
    f = torch.randn([fw] if separable else [fh, fw], generator=g)
    arguments = (up, down, padding, flip, 1.7)
    expected, fast = reference(x, f, *arguments), strided(x, f, *arguments)
    assert fast is not None
    torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dy)[0] for y in (fast, expected)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", [reference, strided, upfirdn2d])
def test_a_crop_may_take_the_whole_image_where_the_other_side_is_padded(function):
    x, f = torch.ones(1, 1, 1, 1), torch.ones(1, 1)
    y = function(x, f, 2, 1, [-2, 3, 0, 0], False, 1.0)  # 1 0 -> crop both -> 0 0 0
    assert torch.equal(y, torch.zeros(1, 1, 2, 3))


def test_both_up_and_down_has_no_fast_path_and_is_still_right():
    x, f = torch.randn(1, 1, 5, 5), setup_filter([1, 3, 3, 1])
    assert strided(x, f, 2, 2, 2, False, 1.0) is None
    assert torch.equal(upfirdn2d(x, f, 2, 2, 2), reference(x, f, 2, 2, 2))


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
def test_first_and_second_derivatives(arguments):
    f = torch.tensor([[0.3, -0.2, 0.5], [0.1, 0.7, -0.4]])
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: upfirdn2d(x, f, **arguments), x)
    # The op is linear: a non-linear function of it makes the second derivative more than zero.
    assert gradgradcheck(lambda x: upfirdn2d(x, f, **arguments).pow(3), x)


@pytest.mark.parametrize("arguments", RESAMPLINGS[:-1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(arguments, memory_format):
    x = torch.randn(2, 3, 8, 6)
    f = setup_filter([1, 3, 3, 1])
    y = upfirdn2d(x.contiguous(memory_format=memory_format), f, **arguments)
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, reference(x, f, **arguments))


@pytest.mark.parametrize("arguments", RESAMPLINGS)
def test_empty_batch(arguments):
    f = setup_filter([1, 3, 3, 1])
    one = upfirdn2d(torch.randn(1, 2, 6, 8), f, **arguments)
    none = upfirdn2d(torch.randn(0, 2, 6, 8), f, **arguments)
    assert none.shape == (0, *one.shape[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_that_of_the_image(dtype):
    f = setup_filter([1, 3, 3, 1])
    x = torch.randn(1, 2, 6, 6)
    y = upsample2d(x.to(dtype), f)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), upsample2d(x, f), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("op", [upsample2d, downsample2d])
def test_resampling_keeps_brightness(op):
    y = op(torch.ones(1, 1, 12, 12), setup_filter([1, 3, 3, 1]))
    torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones_like(y[:, :, 2:-2, 2:-2]))


def test_setup_filter():
    f = setup_filter([1, 3])
    assert f.dtype == torch.float32
    torch.testing.assert_close(f, torch.tensor([[1.0, 3.0], [3.0, 9.0]]) / 16)
    torch.testing.assert_close(setup_filter([[1, 2, 1]]), torch.tensor([[0.25, 0.5, 0.25]]))


@pytest.mark.parametrize("taps", [[], [[]], 3.0, [[[1.0, 2.0]]]])
def test_bad_filter(taps):
    with pytest.raises(ValueError, match="a filter is one row of taps"):
        setup_filter(taps)
