"""ops/bias_act.py: `clamp(gain * act(x * scale + noise + b))`, on every path against the definition in float64."""

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from styleloom.ops.bias_act import ACTIVATIONS, GAINS, PIECEWISE_LINEAR, Activation, bias_act, reference

X = torch.tensor([[[-3.0, 1.0], [-2.0, 4.0]]])  # [N=1, C=2, 2]
B = torch.tensor([1.0, -2.0])
SMOOTH = [act for act in ACTIVATIONS if act not in PIECEWISE_LINEAR]


def test_bias_is_added_along_channels(ops_path):
    assert torch.equal(bias_act(X, B), torch.tensor([[[-2.0, 2.0], [-4.0, 2.0]]]))


def test_scale_is_of_each_sample_and_channel(ops_path):
    scale = torch.tensor([[2.0, 3.0], [4.0, 5.0]])
    assert torch.equal(bias_act(torch.ones(2, 2, 3), scale=scale), scale[:, :, None].expand(2, 2, 3))
    assert torch.equal(bias_act(torch.ones(2, 2), scale=scale), scale)


@pytest.mark.parametrize("form", ["for all samples", "with axes", "of each sample"])
def test_noise_is_added_to_all_channels(ops_path, form):
    noise = torch.arange(24.0).reshape(2, 1, 3, 4)
    noise = {"for all samples": noise[0, 0], "with axes": noise[:1], "of each sample": noise}[form]
    y = bias_act(torch.zeros(2, 5, 3, 4), noise=noise)
    assert torch.equal(y, noise.expand(2, 5, 3, 4))


def test_leaky_relu_has_slope_and_gain(ops_path):
    expected = torch.tensor([[[-0.4, 2.0], [-0.8, 2.0]]]) * 2**0.5
    torch.testing.assert_close(bias_act(X, B, "lrelu"), expected)
    torch.testing.assert_close(bias_act(X, B, "lrelu", gain=1.0, alpha=0.5), torch.tensor([[[-1.0, 2.0], [-2.0, 2.0]]]))


def test_clamp_comes_after_gain(ops_path):
    assert torch.equal(bias_act(X, B, gain=3.0, clamp=7.0), torch.tensor([[[-6.0, 6.0], [-7.0, 6.0]]]))


def test_without_anything_it_is_the_identity(ops_path):
    assert torch.equal(bias_act(X), X)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_by_hand(ops_path, act):
    """Around 0, and where softplus and the exponentials are at the ends of their ranges."""
    values = [-100.0, -30.0, -1.5, -1e-4, 0.0, 1e-4, 1.5, 30.0, 100.0]
    elu = [math.expm1(v) if v < 0 else v for v in values]
    expected = {
        "linear": values,
        "relu": [max(v, 0) for v in values],
        "lrelu": [max(v, 0.2 * v) for v in values],
        "tanh": [math.tanh(v) for v in values],
        "sigmoid": [1 / (1 + math.exp(-v)) for v in values],
        "elu": elu,
        "selu": [1.0507009873554805 * (v if v > 0 else 1.6732632423543772 * v) for v in elu],
        "softplus": [max(v, 0) + math.log1p(math.exp(-abs(v))) for v in values],
        "swish": [v / (1 + math.exp(-v)) for v in values],
    }[act]
    gain = math.sqrt(2) if act in ("relu", "lrelu", "swish") else 1
    assert GAINS[act] == gain
    y = bias_act(torch.tensor(values)[:, None], act=act)[:, 0]
    torch.testing.assert_close(y, torch.tensor(expected) * gain, rtol=1e-5, atol=1e-30)


# Every path against the definition.

LAYOUTS = {
    "plain": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "channels of more": lambda x: LAYOUTS["channels last"](torch.cat([x, x], dim=1))[:, : x.shape[1]],
    "one for all": lambda x: x[:1].expand_as(x),
}


def along_channels(v, ndim):
    return v.reshape([*v.shape, *[1] * (ndim - 2)])


def draw(shape, g, b, scale, noise, dtype) -> tuple[Any, ...]:
    """(x, b, scale, noise): what is wanted of it, noise in the form asked for."""
    n, c, *pixels = shape
    fine = torch.float64 if dtype == torch.float64 else torch.float32
    noises = {"": None, "shared": pixels, "axes": [1, 1, *pixels], "each": [n, 1, *pixels]}
    size = noises[noise if len(pixels) == 2 else ""]
    return (
        torch.randn(shape, generator=g).to(dtype),
        torch.randn(c, generator=g).to(fine) if b else None,
        torch.randn(n, c, generator=g).to(fine) if scale else None,
        None if size is None else torch.randn(size, generator=g).to(fine),
    )


def add(tensors):
    return functools.reduce(torch.add, tensors)


def check_op(agree, tensors, act, alpha, gain, clamp, seed=0):
    """Values, gradients with respect to everything there is, and the gradients of a function of those."""
    g = torch.Generator().manual_seed(seed)
    x, b, scale, noise = tensors
    dtype, ndim = x.dtype, x.ndim
    how = Activation(act, alpha, GAINS[act] if gain is None else gain, -1.0 if clamp is None else clamp)
    its: list[Any] = [None if t is None else t.detach().requires_grad_() for t in (x, b, scale, noise)]
    exact: list[Any] = [None if t is None else t.detach().double().requires_grad_() for t in its]
    before: list[Any] = [None if t is None else t.detach().clone() for t in its]
    y = bias_act(its[0], its[1], act, gain, clamp, alpha, its[2], its[3])
    assert y.dtype == dtype
    assert y.shape == x.shape

    terms = [exact[0], exact[3], exact[1] if b is None else along_channels(exact[1][None], ndim)]
    if scale is not None:
        terms[0] = exact[0] * along_channels(exact[2], ndim)
    argument = add(t for t in terms if t is not None)
    size = add(t.abs() for t in terms if t is not None).detach() + 1
    everywhere = torch.zeros(x.shape, dtype=torch.float64, requires_grad=True)
    expected = reference(argument + everywhere, None, None, None, how)
    agree(y.detach(), expected.detach(), dtype, 4 * max(abs(how.gain), 1) * size)

    # Where rounding decides on which side of a kink or of the clamp a value is, nothing is compared.
    free = argument.detach().abs() > 0.05
    if clamp is not None:
        limitless = reference(argument.detach(), None, None, None, Activation(act, alpha, how.gain, -1.0))
        free &= (limitless.abs() - clamp).abs() > 0.05 * (clamp + 1)
    dy = (torch.randn(x.shape, generator=g) * free).to(dtype).requires_grad_()
    exact_dy = dy.detach().double().requires_grad_()
    given = [t for t in its if t is not None]
    exact_given = [t for t in exact if t is not None]
    plain = torch.autograd.grad(y, given, dy, retain_graph=True)
    grads = torch.autograd.grad(y, given, dy, create_graph=True)
    *exact_grads, inner = torch.autograd.grad(expected, [*exact_given, everywhere], exact_dy, create_graph=True)
    inner = inner.detach().abs()  # the terms of which the gradients are sums
    sizes = [inner * (1 if scale is None else along_channels(exact[2].detach().abs(), ndim))]
    sizes += [] if b is None else [inner.sum(dim=[0, *range(2, ndim)])]
    sizes += (
        []
        if scale is None
        else [(inner * exact[0].detach().abs()).sum_to_size([*x.shape[:2], *[1] * (ndim - 2)]).reshape(scale.shape)]
    )
    sizes += (
        []
        if noise is None
        else [inner.sum(dim=1, keepdim=True).sum_to_size([1] * (4 - noise.ndim) + [*noise.shape]).reshape(noise.shape)]
    )
    for of, first, second, theirs, its_size in zip(given, plain, grads, exact_grads, sizes, strict=True):
        assert first.dtype == second.dtype == of.dtype
        agree(first.detach(), theirs.detach(), dtype, 6 * (its_size + its_size.mean()))
        agree(second.detach(), theirs.detach(), dtype, 6 * (its_size + its_size.mean()), torchs=act in SMOOTH)

    if x.numel():
        # A random linear function of the gradients, of terms where the definition is smooth.
        directions = [torch.randn(t.shape, generator=g).to(t.dtype) for t in given]
        directions[0] = (directions[0] * free).to(dtype)
        twice = torch.autograd.grad(grads, [dy, *given], directions, allow_unused=True, materialize_grads=True)
        exact_twice = torch.autograd.grad(
            exact_grads,
            [exact_dy, *exact_given],
            [d.double() for d in directions],
            allow_unused=True,
            materialize_grads=True,
        )
        for mine, theirs in zip(twice, exact_twice, strict=True):
            mask = free if theirs.shape == free.shape else True
            agree(
                mine * mask,
                theirs * mask,
                dtype,
                8 * (theirs * mask).abs().max() + 4 * max(abs(how.gain), 1),
                act in SMOOTH,
            )
    for t, was in zip(its, before, strict=True):
        assert t is None or torch.equal(t.detach(), was)  # not written to
    return y


def shapes():
    side = st.integers(0, 7)
    channels = st.sampled_from([1, 3, 15, 16, 17, 33])
    return st.tuples(st.integers(0, 3), channels, st.lists(side, min_size=0, max_size=3)).map(
        lambda shape: (shape[0], shape[1], *shape[2])
    )


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.one_of(shapes(), st.tuples(st.integers(1, 3), st.sampled_from([3, 16, 17]), *[st.integers(1, 7)] * 2)),
    act=st.sampled_from(ACTIVATIONS),
    alpha=st.sampled_from([0.2, 0.0, 0.7]),
    gain=st.sampled_from([None, 1.0, 0.3, 2.5]),
    clamp=st.sampled_from([None, None, 0.4, 1.5]),
    b=st.booleans(),
    scale=st.booleans(),
    noise=st.sampled_from(["", "shared", "axes", "each"]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_every_path_equals_the_definition(
    ops_path, agree, shape, act, alpha, gain, clamp, b, scale, noise, layout, dtype, seed
):
    g = torch.Generator().manual_seed(seed)
    x, *rest = draw(shape, g, b, scale, noise, dtype)
    x = LAYOUTS[layout](x)
    y = check_op(agree, (x, *rest), act, alpha, gain, clamp, seed)
    if ops_path == "cpu" and dtype != torch.float64 and x.numel() and x.ndim == 4:
        last = x.stride(1) == 1 and x.shape[1] > 1
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("shape", [(3, 5, 90, 80), (40000, 7), (2, 600, 9, 9), (3, 70000, 1)])
@pytest.mark.parametrize("layout", ["plain", "channels last"])
def test_sums_over_several_units(ops_path, agree, shape, layout):
    """Our kernel cuts its work into units of 32768 elements, whose sums are added up afterwards."""
    x, *rest = draw(shape, torch.Generator().manual_seed(0), True, len(shape) > 2, "shared", torch.float32)
    check_op(agree, (LAYOUTS[layout](x), *rest), "lrelu", 0.2, None, None)


@pytest.mark.parametrize("wanted", ["x", "b", "scale", "noise", "b noise", "x scale", "scale noise"])
@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
@pytest.mark.parametrize("layout", ["plain", "channels last"])
def test_gradients_of_some_of_the_inputs(ops_path, wanted, act, layout):
    drawn = draw((2, 5, 4, 3), torch.Generator(), True, True, "each", torch.float32)
    tensors = dict(zip(("x", "b", "scale", "noise"), drawn, strict=True))
    tensors["x"] = LAYOUTS[layout](tensors["x"])
    found = []
    for names in (list(tensors), wanted.split()):
        its = {k: t.clone().requires_grad_(k in names) for k, t in tensors.items()}
        y = bias_act(its["x"], its["b"], act, clamp=1.0, scale=its["scale"], noise=its["noise"])
        asked = [its[name] for name in wanted.split()]
        grads = torch.autograd.grad(y, asked, torch.ones_like(y), create_graph=True)
        power = sum((grad**2).sum() for grad in grads)
        found.append([*grads, *torch.autograd.grad(power + (y**2).sum(), asked)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_third_derivatives(ops_path, agree, act):
    g = torch.Generator().manual_seed(3)
    x, b, scale, noise = draw((2, 3, 4, 5), g, True, True, "shared", torch.float32)
    weight = torch.randn(x.shape, generator=g)
    found = []
    for op, dtype in ((bias_act, torch.float32), (None, torch.float64)):
        image, *rest = (t.to(dtype).requires_grad_() for t in (x, b, scale, noise))
        if op is not None:
            y = op(image, rest[0], act, 1.2, 2.0, 0.2, rest[1], rest[2])
        else:
            y = reference(image, rest[0], rest[1], rest[2], Activation(act, 0.2, 1.2, 2.0))
        grads = torch.autograd.grad((y**3 * weight).sum(), [image, *rest], create_graph=True)
        twice = torch.autograd.grad(add((grad**2).sum() for grad in grads), [image, *rest], create_graph=True)
        found.append(torch.autograd.grad(add((grad**2).sum() for grad in twice), [image, *rest]))
    for mine, theirs in zip(*found, strict=True):
        agree(mine, theirs, size=100 * theirs.abs().max())


@pytest.mark.parametrize("act", ["relu", "lrelu"])
@pytest.mark.parametrize(("gain", "alpha"), [(-1.5, 0.2), (1.5, -0.3), (-1.5, -0.3), (0.0, 0.2)])
def test_results_of_the_other_sign(ops_path, agree, act, gain, alpha):
    """Where the result's sign is not that of the argument, from which our kernels infer the slope."""
    tensors = draw((2, 3, 4, 5), torch.Generator().manual_seed(0), True, True, "shared", torch.float32)
    check_op(agree, tensors, act, alpha, gain, 5.0)


def test_slopes_at_the_kinks(ops_path):
    """As torch has them at 0; and nothing passes where the clamp cut something off."""
    for clamp in (0.3, 3.3):  # which bf16 and fp16 round downwards and upwards
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.tensor([[-9.0, 0.01, 9.0]], dtype=dtype, requires_grad=True)
            for act in ("linear", "lrelu"):
                (dx,) = torch.autograd.grad(bias_act(x, act=act, gain=1.0, clamp=clamp, alpha=1.0).sum(), x)
                assert torch.equal(dx, torch.tensor([[0.0, 1.0, 0.0]], dtype=dtype))
    for act, slope in (("linear", 1), ("relu", 0), ("lrelu", 0.2), ("tanh", 1), ("elu", 1), ("softplus", 0.5)):
        x = torch.zeros(1, 1, requires_grad=True)
        (dx,) = torch.autograd.grad(bias_act(x, act=act, gain=1.0), x)
        torch.testing.assert_close(dx.item(), float(slope))
    x = torch.tensor([[-3.0, -1.0, 1.0, 3.0]], requires_grad=True)
    (dx,) = torch.autograd.grad(bias_act(x, clamp=2.0).sum(), x)
    assert torch.equal(dx, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))


# Not numbers.

STRANGE = [math.nan, math.inf, -math.inf, 1.5, -1.5, 0.0]


@pytest.mark.parametrize("clamp", [None, 2.0])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7])  # with and without whole vectors
def test_what_is_not_finite_stays_so(ops_path, act, clamp, dtype, count):
    """The trainer counts gradients that are not finite: none may be lost."""
    how = Activation(act, 0.2, GAINS[act], -1.0 if clamp is None else clamp)
    values = torch.tensor(STRANGE * count).to(dtype)
    x = values[None].repeat(len(STRANGE), 1).reshape(1, 1, -1).requires_grad_()
    dy = values.reshape(count, -1)[0][:, None].repeat(1, len(values)).reshape(1, 1, -1)
    exact = x.detach().clone().requires_grad_()
    y, expected = bias_act(x, act=act, clamp=clamp), reference(exact, None, None, None, how)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())
    (dx,), (expected_dx,) = (torch.autograd.grad(out, t, dy) for out, t in ((y, x), (expected, exact)))
    lost = ~expected_dx.isfinite() & dx.isfinite()
    assert not lost.any(), [(x.flatten()[i], dy.flatten()[i]) for i in lost.flatten().nonzero()]
    # More than torch's are not finite where its ops leave out a product with a slope of 0; never of finite numbers.
    more = expected_dx.isfinite() & ~dx.isfinite() & x.isfinite() & dy.isfinite()
    assert not more.any()
    same = expected_dx.isfinite() & dx.isfinite() & ~x.isnan()  # infinity has a slope too
    torch.testing.assert_close(dx[same], expected_dx[same], rtol=0.02, atol=0.002)


def test_sums_with_something_not_finite(ops_path):
    for bad in (math.nan, math.inf):
        x, b, scale, noise = draw((2, 3, 9, 9), torch.Generator().manual_seed(0), True, True, "shared", torch.float32)
        b, scale, noise = (t.requires_grad_() for t in (b, scale, noise))
        dy = torch.ones_like(x)
        dy[1, 2, 8, 7] = bad
        grads = torch.autograd.grad(bias_act(x, b, scale=scale, noise=noise), (b, scale, noise), dy)
        where = [grad.isfinite().logical_not().nonzero().tolist() for grad in grads]
        assert where == [[[2]], [[1, 2]], [[8, 7]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch(cpu_library, monkeypatch, dtype):
    """To nearest, ties to even; beyond the largest to infinity; and every NaN is one afterwards."""
    monkeypatch.setenv("STYLELOOM_OPS", "cpu")
    g = torch.Generator().manual_seed(0)
    sixteen, largest = torch.arange(-64, 64) * 2.0**-13, torch.finfo(dtype).max
    values = torch.cat([
        1 + sixteen, 1 + 32 * sixteen, 2.0**-14 * sixteen, torch.randn(500, generator=g) * 2.0**-20,
        torch.tensor([largest * (1 + 2.0**-12), largest * (1 + 2.0**-8), 3e38, 0.0, -0.0]),
        torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32),
    ])  # fmt: skip
    rounded = values.to(dtype)
    for n in (1, 40):  # one at a time and as vectors
        y = bias_act(torch.zeros(n, len(values), dtype=dtype), values)
        planes = bias_act(torch.zeros(1, len(values), n, dtype=dtype), values)[0].t()
        torch.testing.assert_close(y, rounded.expand(n, -1), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(planes, rounded.expand(n, -1), rtol=0, atol=0, equal_nan=True)


# The rest.


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="no activation 'gelu'; there are linear, "):
        bias_act(X, act="gelu")


@pytest.mark.parametrize("shape", [(0, 2), (5, 2), (3, 2, 4, 5), (0, 2, 4, 5), (3, 2, 0, 5)])
def test_shapes(ops_path, shape):
    x, b = torch.randn(shape, requires_grad=True), B.clone().requires_grad_()
    y = bias_act(x, b, "lrelu", clamp=1.0)
    assert y.shape == shape
    dx, db = torch.autograd.grad(y.sum(), (x, b))
    assert dx.shape == shape
    assert x.numel() or torch.equal(db, torch.zeros(2))


WRONG = [
    {"b": torch.zeros(3)},
    {"scale": torch.zeros(2, 3)},
    {"scale": torch.zeros(3, 2)},
    {"noise": torch.zeros(4, 4)},
    {"noise": torch.zeros(3, 1, 4, 5)},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: "".join(f"{k}{tuple(v.shape)}" for k, v in wrong.items()))
def test_tensors_that_do_not_fit_are_refused(ops_path, wrong):
    with pytest.raises((ValueError, RuntimeError)):
        bias_act(torch.zeros(2, 2, 4, 5), **wrong)


def test_dtype_and_memory_format_are_kept(ops_path):
    x = torch.randn(2, 2, 4, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    y = bias_act(x, B, "lrelu", clamp=256.0)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_gradients_have_the_memory_format_of_the_images(ops_path):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    for act in ("linear", "lrelu", "swish"):
        dy = torch.randn(2, 3, 4, 5)  # planes
        (dx,) = torch.autograd.grad(bias_act(x, act=act), x, dy)
        (expected,) = torch.autograd.grad(reference(x, None, None, None, Activation(act, 0.2, GAINS[act], -1.0)), x, dy)
        torch.testing.assert_close(dx, expected)
        assert ops_path != "cpu" or act == "linear" or dx.is_contiguous(memory_format=torch.channels_last)


def test_gain_keeps_unit_power(ops_path):
    x = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    assert bias_act(x, act="lrelu").square().mean().item() == pytest.approx(1.04, abs=0.02)  # 2 * (1 + 0.2**2) / 2


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_first_and_second_derivatives(ops_path, act):
    x = torch.tensor([[[[-3.0, 0.5], [-1.5, 4.0]]]], dtype=torch.float64, requires_grad=True)  # off the kinks
    b = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[1.1]], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[0.1, 0.2], [0.3, -0.1]], dtype=torch.float64, requires_grad=True)

    def op(x, b, scale, noise):
        return bias_act(x, b, act, 1.3, 3.5, scale=scale, noise=noise)

    assert gradcheck(op, (x, b, scale, noise))
    assert gradgradcheck(lambda *tensors: op(*tensors).pow(3), (x, b, scale, noise))


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_an_input_computed_from_another_counts_once(ops_path, act):
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for create_graph in (False, True):
        y = bias_act(x, scale=x.mean(dim=[2, 3]).sigmoid(), act=act)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph)
        z = x.detach().double().requires_grad_()
        scaled = z * z.mean(dim=[2, 3]).sigmoid()[:, :, None, None]
        expected = torch.nn.functional.silu(scaled) if act == "swish" else torch.nn.functional.leaky_relu(scaled, 0.2)
        (dz,) = torch.autograd.grad(expected.sum() * math.sqrt(2), z)
        torch.testing.assert_close(dx.detach().double(), dz, rtol=1e-4, atol=1e-5)
