"""Convolution with up- or down-sampling by 2 built in, and the formulation of it that is fastest on each device."""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build, native
from .upfirdn2d import downsample2d, filter_size, upfirdn2d, upsample2d


def memory_format(device: torch.device) -> torch.memory_format:
    """The memory format in which images of features are fastest there."""
    plain = build.path(device.type) == "reference"
    return torch.contiguous_format if plain else torch.channels_last


def conv2d(x: Tensor, w: Tensor, f: Tensor | None = None, up: int = 1, down: int = 1, groups: int = 1) -> Tensor:
    """ "Same" convolution, with filtered up-sampling before it or filtered down-sampling after it.

    Args:
        x: [N, C_in, H, W], floating point.
        w: [C_out, C_in / groups, k, k], k odd; cast to the dtype of `x`. With `up` 2 it is applied mirrored (as a true
            convolution), which is how the published networks' weights are stored.
        f: low-pass filter of sum 1, float32, [taps] or [fh, fw]; needed with `up` or `down`.
        up, down: 1 or 2, not both 2.
        groups: of channels that do not mix; without resampling.

    Returns:
        [N, C_out, H * up / down, W * up / down], dtype of `x`. Differentiable to any order.
    """
    if x.shape[1] != w.shape[1] * groups:
        raise ValueError(f"conv2d: a weight of {w.shape[1] * groups} input channels for an image of {x.shape[1]}")
    k = w.shape[-1]
    w = w.to(x.dtype)
    if up == 1 and down == 1:
        return _convolve(x, w, stride=1, padding=k // 2, groups=groups)
    assert f is not None
    assert groups == 1
    assert (up, down) in [(1, 2), (2, 1)], f"up {up}, down {down}"
    fh, fw = filter_size(f)
    if down == 2:
        if k == 1:  # filter and 1x1 convolution commute: filter first, at the low resolution
            return _convolve(downsample2d(x, f), w, stride=1, padding=0)
        p = k // 2
        x = upfirdn2d(x, f, padding=[p + (fw - 1) // 2, p + (fw - 2) // 2, p + (fh - 1) // 2, p + (fh - 2) // 2])
        return _convolve(x, w, stride=2, padding=0)
    if k == 1:
        return upsample2d(_convolve(x, w, stride=1, padding=0), f)
    # Transposed convolution, then the filter: the zeros are never multiplied. Output 2H + k - 2, so the filter's
    # padding is what is left of centring both.
    x = _convolve_transposed(x, w.transpose(0, 1))
    p = k // 2
    x0, x1 = p + (fw + 1) // 2 - (k - 1), p + (fw - 2) // 2 - (k - 2)
    y0, y1 = p + (fh + 1) // 2 - (k - 1), p + (fh - 2) // 2 - (k - 2)
    return upfirdn2d(x, f, padding=[x0, x1, y0, y1], gain=4)


def _left_to_torch(x: Tensor) -> bool:
    return build.path(x.device.type) == "reference" or native.watched() or torch.is_autocast_enabled(x.device.type)


def _convolve(x: Tensor, w: Tensor, stride: int, padding: int, groups: int = 1) -> Tensor:
    if _left_to_torch(x):
        return F.conv2d(x, w, stride=stride, padding=padding, groups=groups)
    return _Convolve.apply(x, w, stride, padding, groups)  # type: ignore[return-value]


def _convolve_transposed(x: Tensor, w: Tensor) -> Tensor:
    """Stride 2, no padding; w [C_in, C_out, k, k]."""
    if _left_to_torch(x):
        return F.conv_transpose2d(x, w, stride=2)
    size = [2 * s + w.shape[-1] - 2 for s in x.shape[2:]]
    return _Transposed.apply(x, w, size, 2, 0, 1)  # type: ignore[return-value]


# A convolution y = w * x is linear in x and in w. Its three faces (y from x and w; x's gradient from y and w; w's
# gradient from x and y) have each other as gradients, to any order. Torch's own second derivatives are the same, but
# take the weights' gradient there as a convolution with the samples for channels, which is many times slower.


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stride: int, padding: int, groups: int = 1) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how = stride, padding, groups
        return _forward(x, w, stride, padding, groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        dx = _Transposed.apply(g, w, x.shape[2:], *ctx.how) if ctx.needs_input_grad[0] else None
        dw = _Weight.apply(x, g, w.shape[2:], *ctx.how) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None  # type: ignore[return-value]


class _Transposed(torch.autograd.Function):
    """x's gradient [N, C_in, *size] from y [N, C_out, ...] and w [C_out, C_in, k, k]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor, size: list[int], stride: int, padding: int, groups: int = 1) -> Tensor:
        ctx.save_for_backward(y, w)
        ctx.how = stride, padding, groups
        return _transposed(y, w, size, stride, padding, groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, w = ctx.saved_tensors
        dy = _Convolve.apply(g, w, *ctx.how) if ctx.needs_input_grad[0] else None
        dw = _Weight.apply(g, y, w.shape[2:], *ctx.how) if ctx.needs_input_grad[1] else None
        return dy, dw, None, None, None, None  # type: ignore[return-value]


class _Weight(torch.autograd.Function):
    """w's gradient [C_out, C_in, *taps] from x and y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, taps: list[int], stride: int, padding: int, groups: int = 1) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.how = stride, padding, groups
        return _weight(x, y, taps, stride, padding, groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        dx = _Transposed.apply(y, g, x.shape[2:], *ctx.how) if ctx.needs_input_grad[0] else None
        dy = _Convolve.apply(x, g, *ctx.how) if ctx.needs_input_grad[1] else None
        return dx, dy, None, None, None, None  # type: ignore[return-value]


SAME, DOWN, UP = range(3)  # of csrc/api.h
# Results of a stride-2 convolution from which Winograd's form is the faster one; below, its weights cost too much.
STRIDED_FROM = 1024


def _forward(x: Tensor, w: Tensor, stride: int, padding: int, groups: int = 1) -> Tensor:
    size = [(s + 2 * padding - k) // stride + 1 for s, k in zip(x.shape[2:], w.shape[2:], strict=True)]
    if groups == 1 and _by_winograd(x, w, size, stride, padding):
        return _winograd(x, w, size, SAME if stride == 1 else DOWN)
    return F.conv2d(x, w, stride=stride, padding=padding, groups=groups)


def _transposed(y: Tensor, w: Tensor, size: list[int], stride: int, padding: int, groups: int = 1) -> Tensor:
    if groups == 1 and _by_winograd(y, w, y.shape[2:], stride, padding):
        return _winograd(y, w, size, SAME if stride == 1 else UP, transposed=True)
    rest = [s - (stride * (r - 1) + w.shape[-1] - 2 * padding) for s, r in zip(size, y.shape[2:], strict=True)]
    return F.conv_transpose2d(y, w, stride=stride, padding=padding, output_padding=rest, groups=groups)


def _weight(x: Tensor, y: Tensor, taps: list[int], stride: int, padding: int, groups: int = 1) -> Tensor:
    w = x.new_empty([y.shape[1], x.shape[1] // groups, *taps])
    if groups == 1 and _by_winograd(x, w, y.shape[2:], stride, padding):
        args, x, y = _winograd_arguments(x, w, y, SAME if stride == 1 else DOWN)
        _call("sl_winograd_weight", args, x)
        return w
    mask, pads = [False, True, False], [padding, padding]
    return torch.ops.aten.convolution_backward(
        y, x, w, None, [stride, stride], pads, [1, 1], False, [0, 0], groups, mask
    )[1]  # fmt: skip


def _by_winograd(t: Tensor, w: Tensor, size: Any, stride: int, padding: int) -> bool:
    """Whether csrc/winograd.cpp does a convolution with results of this size."""
    if t.dtype != torch.float32 or t.device.type != "cpu" or (*w.shape[2:], padding) != (3, 3, 2 - stride):
        return False
    library = native.library(t)
    if library is None or any(c % library.sl_winograd_lanes() for c in w.shape[:2]):
        return False
    return stride == 1 or len(t) * size[0] * size[1] >= STRIDED_FROM


def _winograd(x: Tensor, w: Tensor, size: list[int], kind: int, transposed: bool = False) -> Tensor:
    w = w if w.stride()[2:] == (3, 1) else w.contiguous()
    y = torch.empty(len(x), w.shape[1 if transposed else 0], *size, memory_format=torch.channels_last)
    args, x, y = _winograd_arguments(x, w, y, kind, transposed)
    _call("sl_winograd", args, x)
    return y


def _winograd_arguments(
    x: Tensor, w: Tensor, y: Tensor, kind: int, transposed: bool = False
) -> tuple[native.Winograd, Tensor, Tensor]:
    """(arguments, x, y); the latter two may be copies, and have to live until the call."""
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    (n, ci, h, width), (co, oh, ow) = x.shape, y.shape[1:]
    strides = w.stride()[:2]
    args = native.Winograd(
        x=x.data_ptr(), weight=w.data_ptr(), y=y.data_ptr(), n=n, h=h, w=width, oh=oh, ow=ow, ci=ci, co=co,
        co_stride=strides[1 if transposed else 0], ci_stride=strides[0 if transposed else 1],
        kind=kind, flip=transposed and kind == SAME,
    )  # fmt: skip
    return args, x, y


def _call(name: str, args: native.Winograd, x: Tensor) -> None:
    library = native.library(x)
    assert library is not None
    native.check(library, name, getattr(library, name)(ctypes.byref(args), native.threads(x)))
