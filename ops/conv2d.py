"""Convolution with up- or down-sampling by 2 built in."""

import torch.nn.functional as F
from torch import Tensor

from .upfirdn2d import blur2d, downsample2d, upfirdn2d, upsample2d


def conv2d(
    x: Tensor, w: Tensor, f: Tensor | None = None, up: int = 1, down: int = 1, bias: Tensor | None = None
) -> Tensor:
    """ "Same" convolution, with filtered up-sampling before it or filtered down-sampling after it.

    Args:
        x: [N, C_in, H, W], floating point.
        w: [C_out, C_in, k, k], k odd; cast to the dtype of `x`. With `up` 2 it is applied mirrored (as a true
            convolution), which is how the published networks' weights are stored.
        f: low-pass filter [fh, fw] of sum 1, float32; needed with `up` or `down`.
        up, down: 1 or 2, not both 2.
        bias: [C_out]; cast to the dtype of `x`. Not with `up` 2.

    Returns:
        [N, C_out, H * up / down, W * up / down], dtype of `x`. Differentiable to any order.
    """
    k = w.shape[-1]
    w = w.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if up == 1 and down == 1:
        return F.conv2d(x, w, bias, padding=k // 2)
    assert f is not None
    assert (up, down) in [(1, 2), (2, 1)], f"up {up}, down {down}"
    fh, fw = f.shape
    if down == 2:
        if k == 1:  # filter and 1x1 convolution commute: filter first, at the low resolution
            return F.conv2d(downsample2d(x, f), w, bias)
        p = k // 2
        x = blur2d(x, f, padding=[p + (fw - 1) // 2, p + (fw - 2) // 2, p + (fh - 1) // 2, p + (fh - 2) // 2])
        return F.conv2d(x, w, bias, stride=2)
    assert bias is None
    if k == 1:
        return upsample2d(F.conv2d(x, w), f)
    # Transposed convolution, then the filter: the zeros are never multiplied. Output 2H + k - 2, so the filter's
    # padding is what is left of centring both.
    x = F.conv_transpose2d(x, w.transpose(0, 1), stride=2)
    p = k // 2
    x0, x1 = p + (fw + 1) // 2 - (k - 1), p + (fw - 2) // 2 - (k - 2)
    y0, y1 = p + (fh + 1) // 2 - (k - 1), p + (fh - 2) // 2 - (k - 2)
    return upfirdn2d(x, f, padding=[x0, x1, y0, y1], gain=4)
