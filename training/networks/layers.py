"""Building blocks with the equalised learning rate: weights are stored at unit variance and scaled when used, so that
Adam's step is relative to each layer's own scale (Karras et al. 2018, "Progressive Growing of GANs", section 4.1)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...ops.bias_act import GAINS, bias_act
from ...ops.conv2d import conv2d


def normalize_2nd_moment(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Scales [N, C, ...] to a mean square of 1 over dimension 1."""
    return x * (x.square().mean(dim=1, keepdim=True) + eps).rsqrt()


def pixel_norm(x: Tensor) -> Tensor:
    """Scales the features [N, C, H, W] of every pixel to a mean square of 1 (Karras et al. 2018, section 4.2), in fp32
    where `x` is of less precision; dtype of `x`."""
    return normalize_2nd_moment(_wide(x)).to(x.dtype)


def adain(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-8) -> Tensor:
    """Adaptive instance normalisation (Karras et al. 2019, StyleGAN, eq. 1): every channel of every sample gets mean
    `shift` and standard deviation `scale`.

    Args:
        x: [N, C, H, W]; in fp32 where it is of less precision.
        scale, shift: [N, C], fp32.

    Returns:
        [N, C, H, W], dtype of `x`.
    """
    y = _wide(x)
    y = y - y.mean(dim=[2, 3], keepdim=True)
    scale = scale[:, :, None, None] * (y.square().mean(dim=[2, 3], keepdim=True) + eps).rsqrt()
    return torch.addcmul(shift[:, :, None, None], y, scale).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In fp32, if `x` is of less precision: sums of squares need it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def run_block(block: nn.Module, recompute: bool, *args: Any) -> Any:
    """`block(*args)`; with `recompute`, its inner activations are not kept for the backward pass but computed again in
    it, with the same result to the bit (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").

    The block must draw nothing random."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    return block(*args)


class Linear(nn.Module):
    """Fully connected layer [N, in] -> [N, out], with bias and optionally leaky ReLU.

    Args:
        lr_mul: learning-rate multiplier; parameters are stored divided by it.
        bias_init: initial bias as the layer applies it.
        he: have the activation's gain in the weights (He et al. 2015, eq. 10), as the networks before StyleGAN2 do, and
            not behind the activation, where it also amplifies the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        act: str = "linear",
        lr_mul: float = 1.0,
        bias_init: float = 0.0,
        he: bool = False,
    ) -> None:
        super().__init__()
        self.act, self.lr_mul = act, lr_mul
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.full([out_features], bias_init / lr_mul))
        self.gain = 1.0 if he else GAINS[act]
        self.weight_gain = lr_mul / math.sqrt(in_features) * (GAINS[act] / self.gain)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.to(x.dtype) * self.weight_gain
        b = self.bias.to(x.dtype) * self.lr_mul
        if self.act == "linear":
            return torch.addmm(b, x, w.t())
        return bias_act(x @ w.t(), b, act=self.act, gain=self.gain)


class Conv2d(nn.Module):
    """Convolution [N, in, H, W] -> [N, out, H * up / down, W * up / down] of odd size k, with optional bias and leaky
    ReLU. `up`, `down` as in `conv2d`; `he` as in `Linear`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int,
        act: str = "linear",
        bias: bool = True,
        down: int = 1,
        up: int = 1,
        he: bool = False,
    ) -> None:
        super().__init__()
        self.act, self.up, self.down = act, up, down
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, k, k))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.gain = 1.0 if he else GAINS[act]
        self.weight_gain = 1 / math.sqrt(in_channels * k**2) * (GAINS[act] / self.gain)

    def forward(
        self, x: Tensor, f: Tensor | None = None, gain: float | None = None, clamp: float | None = None
    ) -> Tensor:
        """`f` low-pass filter when resampling; `gain`, `clamp` as in `bias_act`. Computes in the dtype of `x`."""
        gain = self.gain if gain is None else gain
        if self.act == "linear" and self.bias is None and clamp is None:
            return conv2d(x, self.weight * (self.weight_gain * gain), f, self.up, self.down)
        x = conv2d(x, self.weight * self.weight_gain, f, self.up, self.down)
        return bias_act(x, self.bias, self.act, gain, clamp)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    demodulate: bool = True,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "linear",
    clamp: float | None = None,
) -> Tensor:
    """Convolution whose weights are scaled per sample (Karras et al. 2020, StyleGAN2, section 2.2, eqs. 1 and 3), then
    noise, bias and activation.

    Scaling the input channels by the style and the output channels by the demodulation coefficient equals scaling the
    weights, and needs no per-sample weights.

    Args:
        x: [N, C_in, H, W], fp32, bf16 or fp16.
        weight: [C_out, C_in, k, k], fp32.
        styles: [N, C_in], fp32.
        f, up: low-pass filter and up-sampling factor, as in `conv2d`.
        noise: [N, 1, H * up, W * up] or [H * up, W * up], added to the convolution's result.
        bias, act, clamp: as in `bias_act`, with the activation's own gain.

    Returns:
        [N, C_out, H * up, W * up], dtype of `x`.
    """
    if demodulate and x.dtype == torch.float16:
        # Demodulation divides any scale out again: keep the intermediate values inside fp16's range.
        weight = weight / weight.abs().amax(dim=[1, 2, 3], keepdim=True) / math.sqrt(weight[0].numel())
        styles = styles / styles.abs().amax(dim=1, keepdim=True)
    y = conv2d(bias_act(x, scale=styles), weight, f, up=up)
    d = None
    if demodulate:
        power = weight.square().sum(dim=[2, 3])  # [C_out, C_in]
        d = (styles.square() @ power.t() + 1e-8).rsqrt()  # [N, C_out]
    return bias_act(y, bias, act, clamp=clamp, scale=d, noise=noise)


def minibatch_std(x: Tensor, group: int) -> Tensor:
    """Appends one channel: the standard deviation over groups of samples, averaged over everything else.

    (Karras et al. 2018, section 3.) Group g takes rows g, g + N / group, ...: when rank r of R holds the rows r::R of a
    larger batch, its groups are groups of the larger batch.

    Args:
        x: [N, C, H, W]; N divisible by `group`.

    Returns:
        [N, C + 1, H, W].
    """
    N, C, H, W = x.shape
    if N % group:
        raise ValueError(f"{N} samples do not divide into minibatch-std groups of {group}")
    y = x.reshape(group, N // group, C, H, W)
    y = (y - y.mean(dim=0)).square().mean(dim=0)  # torch's var along the first dimension is many times slower
    y = (y + 1e-8).sqrt().mean(dim=[1, 2, 3])  # [N / group]
    y = y.repeat(group)[:, None, None, None].expand(-1, -1, H, W)
    return torch.cat([x, y], dim=1)


class DiscriminatorHead(nn.Module):
    """Minibatch standard deviation, convolution, two dense layers: [N, in, h, w] -> [N, out].

    Args:
        channels: of the two layers in between.
        mbstd_group: 1 leaves the minibatch standard deviation out.
        img_channels: of the image that its `fromrgb` takes, where it is the lowest level of a network that grows.
        he: as in `Linear`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        size: tuple[int, int],
        out: int,
        mbstd_group: int,
        img_channels: int = 0,
        he: bool = False,
    ) -> None:
        super().__init__()
        self.mbstd_group = mbstd_group if mbstd_group > 1 else 0
        if img_channels:
            self.fromrgb = Conv2d(img_channels, in_channels, 1, act="lrelu", he=he)
        self.conv = Conv2d(in_channels + (self.mbstd_group > 0), channels, 3, act="lrelu", he=he)
        self.fc = Linear(channels * size[0] * size[1], channels, act="lrelu", he=he)
        self.out = Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        if self.mbstd_group:
            x = minibatch_std(x, self.mbstd_group)
        return self.out(self.fc(self.conv(x).flatten(1)))
