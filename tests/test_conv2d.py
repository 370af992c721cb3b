"""ops/conv2d.py against its definition: insert zeros, filter, convolve, drop samples, one after the other."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from styleloom.ops.conv2d import conv2d
from styleloom.ops.upfirdn2d import reference, setup_filter

FILTERS = {
    "1331": setup_filter([1, 3, 3, 1]),
    "121": setup_filter([1, 2, 1]),
    "asymmetric": setup_filter([[1.0, 5.0, 2.0], [0.5, 3.0, 1.0]]),
}


def definition(x, w, f, up, down):
    p = w.shape[-1] // 2
    fh, fw = f.shape
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
def test_values_and_gradients(k, up, down, name):
    x, w = inputs(k)
    f = FILTERS[name]
    y, expected = conv2d(x, w, f, up, down), definition(x, w, f, up, down)
    assert y.shape == (2, 4, 6 * up // down, 8 * up // down)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn(y.shape, dtype=torch.float64)
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, w), dy) for out in (y, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_no_filter_is_needed_without_resampling():
    x, w = inputs(3)
    torch.testing.assert_close(conv2d(x, w), definition(x, w, torch.ones(1, 1), 1, 1))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("down", [1, 2])
def test_bias_is_added_to_each_channel(k, down):
    x, w = (t.detach().float() for t in inputs(k))
    b = torch.arange(4, dtype=torch.float64)
    y = conv2d(x, w, FILTERS["1331"], down=down, bias=b)
    torch.testing.assert_close(y, conv2d(x, w, FILTERS["1331"], down=down) + b.float()[:, None, None])


def test_up_sampling_mirrors_the_weight():
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = 1
    w = torch.arange(9.0).reshape(1, 1, 3, 3)
    f = torch.ones(1, 1)
    # A single pixel spreads the weight the right way round: that is convolution, where plain layers correlate.
    assert torch.equal(conv2d(x, w, f, up=2)[0, 0, 2:5, 2:5] / 4, w[0, 0])
    assert torch.equal(conv2d(x, w)[0, 0], w[0, 0].flip([0, 1]))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_second_derivatives(k, up, down):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 2, 4, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, k, k, generator=g, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, w: conv2d(x, w, FILTERS["1331"], up, down), (x, w))
    assert gradgradcheck(lambda x, w: conv2d(x, w, FILTERS["1331"], up, down), (x, w))


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_computes_in_the_dtype_of_the_image(up, down):
    x, w = (t.detach().float() for t in inputs(3))
    y = conv2d(x.bfloat16(), w, FILTERS["1331"], up, down)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), conv2d(x, w, FILTERS["1331"], up, down), rtol=0.05, atol=0.2)


def test_up_and_down_at_once_is_refused():
    x, w = inputs(3)
    with pytest.raises(AssertionError, match="up 2, down 2"):
        conv2d(x, w, FILTERS["1331"], up=2, down=2)
