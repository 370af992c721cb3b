"""Up-sample, pad, filter, down-sample: the resampling op of the StyleGAN family.

Definition (Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", appendix B): insert `up - 1`
zeros after every sample, pad (or crop, where negative), convolve with `f`, keep every `down`-th sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build, native

Ints = int | Sequence[int]
LONG = 6  # taps of a separable filter from which two passes are faster than one


def setup_filter(taps: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    """A float32 filter of sum 1: [taps], for both axes, from 1-D taps, or [fh, fw] from 2-D ones."""
    f = torch.as_tensor(taps, dtype=torch.float32)
    if f.ndim not in (1, 2) or f.numel() == 0 or f.sum() == 0:
        raise ValueError(f"a filter is one row of taps or a table of them, of sum other than 0, not {taps}")
    return f / f.sum()


def upfirdn2d(
    x: Tensor,
    f: Tensor,
    up: Ints = 1,
    down: Ints = 1,
    padding: Ints = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Up-samples, pads, filters and down-samples each channel.

    Args:
        x: [N, C, H, W], floating point, any memory format (kept).
        f: filter, float32, [fh, fw], or [taps] for a separable one.
        up, down: integer factors, one for both axes or (x, y).
        padding: of the zero-inserted image; one number, (x, y), or (x0, x1, y0, y1). Negative crops.
        flip_filter: correlate instead of convolve.
        gain: factor on the result.

    Raises:
        ValueError: factors below 1, an image smaller than the filter, a filter on another device.

    Returns:
        [N, C, (H * up_y + y0 + y1 - fh) // down_y + 1, the same for W], dtype of `x`. Differentiable to any order.
    """
    if min(*_pair(up), *_pair(down)) < 1:
        raise ValueError(f"upfirdn2d: up {up} and down {down} have to be 1 or more")
    if f.device != x.device:
        raise ValueError(f"upfirdn2d: the filter is on {f.device}, the images are on {x.device}")
    if f.ndim == 1 and len(f) > LONG and x.device.type == "cpu":  # cheaper along one axis after the other
        (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1) = _pair(up), _pair(down), _quad(padding)
        x = upfirdn2d(x, f[None, :], (up_x, 1), (down_x, 1), (x0, x1, 0, 0), flip_filter, gain)
        return upfirdn2d(x, f[:, None], (1, up_y), (1, down_y), (0, 0, y0, y1), flip_filter)
    if native.library(x) is not None and not f.requires_grad:
        fh, fw = filter_size(f)
        (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1) = _pair(up), _pair(down), _quad(padding)
        size = (
            (x.shape[2] * up_y + y0 + y1 - fh) // down_y + 1,
            (x.shape[3] * up_x + x0 + x1 - fw) // down_x + 1,
        )
        if min(size) < 1:
            raise ValueError(f"upfirdn2d: the padded image is smaller than the {fh}x{fw} filter")
        how = Resampling((up_x, up_y), (down_x, down_y), (x0, y0), flip_filter, gain)
        return _Upfirdn2d.apply(x, f, size, how)  # type: ignore[return-value]
    fast = None if build.path(x.device.type) == "reference" else strided(x, f, up, down, padding, flip_filter, gain)
    return reference(x, f, up, down, padding, flip_filter, gain) if fast is None else fast


@dataclass(frozen=True)
class Resampling:
    """What `_Upfirdn2d` does, as (x, y); padding is that before the first sample."""

    up: tuple[int, int]
    down: tuple[int, int]
    padding: tuple[int, int]
    flip_filter: bool
    gain: float

    def adjoint(self, taps: tuple[int, int]) -> "Resampling":
        """The transposed operation, for a filter of (width, height) taps."""
        padding = (taps[0] - 1 - self.padding[0], taps[1] - 1 - self.padding[1])
        return Resampling(self.down, self.up, padding, not self.flip_filter, self.gain)


class _Upfirdn2d(torch.autograd.Function):
    """The native op, whose gradient is itself with up and down exchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, size: tuple[int, int], how: Resampling) -> Tensor:
        library = native.library(x)
        assert library is not None
        ctx.size, ctx.how = x.shape[2:], how
        ctx.save_for_backward(f)
        x, channels_last = native.dense(x)
        f = f.detach().float().contiguous()
        (n, c, h, w), (fh, fw) = x.shape, filter_size(f)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        y = torch.empty(n, c, *size, dtype=x.dtype, device=x.device, memory_format=layout)
        args = native.Upfirdn2d(
            x=x.data_ptr(), y=y.data_ptr(), fx=f.data_ptr(), fy=f.data_ptr() if f.ndim == 1 else None,
            n=n, c=c, h=h, w=w, oh=size[0], ow=size[1], dtype=native.DTYPES[x.dtype], channels_last=channels_last,
            fw=fw, fh=fh, up_x=how.up[0], up_y=how.up[1], down_x=how.down[0], down_y=how.down[1],
            pad_x=how.padding[0], pad_y=how.padding[1], flip=how.flip_filter, gain=how.gain,
        )  # fmt: skip
        native.call(library, "sl_upfirdn2d", args, y if y.numel() > x.numel() else x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (f,) = ctx.saved_tensors
        fh, fw = filter_size(f)
        return _Upfirdn2d.apply(dy, f, ctx.size, ctx.how.adjoint((fw, fh))), None, None, None  # type: ignore[return-value]


def reference(
    x: Tensor,
    f: Tensor,
    up: Ints = 1,
    down: Ints = 1,
    padding: Ints = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """The definition, word for word. Arguments and result as in `upfirdn2d`; runs in any dtype `x` has."""
    (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1) = _pair(up), _pair(down), _quad(padding)
    N, C, H, W = x.shape
    x = F.pad(x.reshape(N, C, H, 1, W, 1), [0, up_x - 1, 0, 0, 0, up_y - 1])
    x = x.reshape(N, C, H * up_y, W * up_x)
    x = _pad(x, [x0, x1, y0, y1])
    weight = _weight(f, gain, flip_filter, C, x.dtype)
    x = F.conv2d(x, weight, groups=C)
    return x[:, :, ::down_y, ::down_x]


def strided(
    x: Tensor,
    f: Tensor,
    up: Ints,
    down: Ints,
    padding: Ints,
    flip_filter: bool,
    gain: float,
) -> Tensor | None:
    """The same without the inserted zeros and the discarded samples: a strided or a transposed depthwise convolution.

    None where up- and down-sampling meet in one call, which no network here does.
    """
    (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1) = _pair(up), _pair(down), _quad(padding)
    C = x.shape[1]
    if up_x == up_y == 1:
        weight = _weight(f, gain, flip_filter, C, x.dtype)
        if x0 == x1 and y0 == y1 and min(x0, y0) >= 0:  # the convolution pads by itself: no padded copy
            return F.conv2d(x, weight, stride=(down_y, down_x), padding=(y0, x0), groups=C)
        return F.conv2d(_pad(x, [x0, x1, y0, y1]), weight, stride=(down_y, down_x), groups=C)
    if down_x == down_y == 1:
        # A transposed convolution spreads the unflipped filter: a true convolution of the zero-inserted image.
        weight = _weight(f, gain, not flip_filter, C, x.dtype)
        fh, fw = weight.shape[2:]
        y = F.conv_transpose2d(x, weight, stride=(up_y, up_x), groups=C)
        # It covers the image from its first to its last non-zero sample with the filter's full support around it.
        return _pad(y, [x0 - fw + 1, x1 - fw + up_x, y0 - fh + 1, y1 - fh + up_y])
    return None


def upsample2d(x: Tensor, f: Tensor, up: int = 2) -> Tensor:
    """[N, C, H, W] -> [N, C, H * up, W * up], centred, keeping the mean brightness."""
    fh, fw = filter_size(f)
    padding = [(fw + up - 1) // 2, (fw - up) // 2, (fh + up - 1) // 2, (fh - up) // 2]
    return upfirdn2d(x, f, up=up, padding=padding, gain=up**2)


def downsample2d(x: Tensor, f: Tensor, down: int = 2) -> Tensor:
    """[N, C, H, W] -> [N, C, H // down, W // down], centred."""
    fh, fw = filter_size(f)
    padding = [(fw - down + 1) // 2, (fw - down) // 2, (fh - down + 1) // 2, (fh - down) // 2]
    return upfirdn2d(x, f, down=down, padding=padding)


def _weight(f: Tensor, gain: float, flip_filter: bool, channels: int, dtype: torch.dtype) -> Tensor:
    """Depthwise weight [C, 1, fh, fw] for a correlation (what torch calls convolution)."""
    if f.ndim == 1:
        f = f[:, None] * f[None, :]
    f = f * gain
    if not flip_filter:
        f = f.flip([0, 1])
    return f.to(dtype)[None, None].expand(channels, 1, -1, -1)


def filter_size(f: Tensor) -> tuple[int, int]:
    """(height, width) of a filter, [taps] or [fh, fw]."""
    return (f.shape[0], f.shape[-1])


def _pad(x: Tensor, amounts: list[int]) -> Tensor:
    """Zeros around the image; negative amounts crop. In this order: a crop on one side may take more than the image is
    wide, and the rest of what is padded on the other, which `F.pad` alone refuses."""
    if min(amounts) < 0 < max(amounts):
        x = F.pad(x, [max(n, 0) for n in amounts])
        amounts = [min(n, 0) for n in amounts]
    return F.pad(x, amounts)


def _pair(value: Ints) -> tuple[int, int]:
    x, y = (value, value) if isinstance(value, int) else value
    return x, y


def _quad(padding: Ints) -> tuple[int, int, int, int]:
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if len(padding) == 2:
        return padding[0], padding[0], padding[1], padding[1]
    x0, x1, y0, y1 = padding
    return x0, x1, y0, y1
