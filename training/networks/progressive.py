"""Progressive GAN: pixel-normalised generator, discriminator with an auxiliary classifier.

Karras et al. 2018, "Progressive Growing of GANs for Improved Quality, Stability, and Variation", table 2 and appendix
A.1, with the classifier of Odena et al. 2017, "Conditional Image Synthesis with Auxiliary Classifier GANs".

Its nearest-neighbour up-sampling before a convolution and its 2x2 mean after one are written as `conv2d` with the
filter [1, 1], which gives the same numbers and does not multiply the repeated pixels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ops.bias_act import bias_act
from ...ops.conv2d import memory_format
from ...ops.upfirdn2d import setup_filter
from . import growing
from .growing import channels
from .layers import Conv2d, DiscriminatorHead, normalize_2nd_moment, pixel_norm

FILTER = [1, 1]


class Mapping(growing.Mapping):
    """z and the one-hot label, as a vector of mean square 1 (the sphere of appendix A.1): there is nothing to learn, so
    `w_avg` stays 0."""

    def __init__(self, z_dim: int, c_dim: int) -> None:
        super().__init__(z_dim + c_dim)
        self.c_dim = c_dim

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """z [N, z_dim], c [N, c_dim] one-hot -> [N, z_dim + c_dim], fp32."""
        parts = [z]
        if self.c_dim:
            assert c is not None
            parts.append(c)
        return normalize_2nd_moment(torch.cat([x.to(self.w_avg.dtype) for x in parts], dim=1))

    def update_w_avg(self, w_mean: Tensor, beta: float) -> None:
        """Does nothing."""


class Start(nn.Module):
    """Dense layer without bias, [N, w_dim] -> [N, channels, h, w]."""

    def __init__(self, w_dim: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.shape = (channels, *size)
        self.weight = nn.Parameter(torch.randn(math.prod(self.shape), w_dim))
        self.weight_gain = math.sqrt(2) / 4 / math.sqrt(w_dim)  # a quarter of He's, as published

    def forward(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        x = (w @ (self.weight * self.weight_gain).t()).to(dtype).unflatten(1, self.shape)
        return x.contiguous(memory_format=memory_format(x.device))


class SynthesisBlock(nn.Module):
    """One level of the generator: [N, C_in, H / 2, W / 2] -> [N, C, H, W]; the start: ws [N, 1, w_dim] -> [N, C, H, W].

    Pixel norm follows every activation (section 4.2).
    """

    def __init__(self, in_channels: int, channels: int, w_dim: int, size: tuple[int, int], img_channels: int) -> None:
        super().__init__()
        self.first = in_channels == 0
        if self.first:
            self.input = Start(w_dim, channels, size)
            self.bias = nn.Parameter(torch.zeros(channels))
        else:
            self.conv0 = Conv2d(in_channels, channels, 3, act="lrelu", up=2, he=True)
        self.conv1 = Conv2d(channels, channels, 3, act="lrelu", he=True)
        self.torgb = Conv2d(channels, img_channels, 1)

    def forward(
        self,
        x: Tensor | None,
        ws: Tensor,
        _noise: Sequence[Tensor | str],
        f: Tensor,
        dtype: torch.dtype,
        clamp: float | None,
    ) -> Tensor:
        if self.first:
            y = bias_act(self.input(ws[:, 0], dtype), self.bias, act="lrelu", gain=1, clamp=clamp)
        else:
            assert x is not None
            y = self.conv0(x.to(dtype), f, clamp=clamp)
        return pixel_norm(self.conv1(pixel_norm(y), clamp=clamp))


class Synthesis(growing.Synthesis):
    """w -> image, as `growing.Synthesis`; without noise."""

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int,
        w_dim: int,
        channel_base: int,
        channel_max: int,
        low_precision: torch.dtype | None = None,
        low_precision_levels: int = 4,
        recompute: bool = False,
    ) -> None:
        super().__init__(width, height, low_precision, low_precision_levels, recompute)
        counts = channels(self.resolutions, channel_base, channel_max)
        for i, res in enumerate(self.resolutions):
            block = SynthesisBlock(counts[i - 1] if i else 0, counts[i], w_dim, self.size_at(i), img_channels)
            self.add_module(f"b{res}", block)
        self.register_buffer("f", setup_filter(FILTER), persistent=False)

    @property
    def num_ws(self) -> int:
        """One w, which only the start takes."""
        return 1

    def inputs(self, level: int, ws: Tensor, maps: Sequence[Tensor | str]) -> tuple[Tensor, Sequence[Tensor | str]]:
        return ws, maps


class Generator(growing.Generator):
    """The Progressive GAN's generator. Arguments as in `training.config.ProgressiveNetwork`, sizes in px."""

    has_w = False

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int = 3,
        c_dim: int = 0,
        z_dim: int = 512,
        channel_base: int = 16384,
        channel_max: int = 512,
        low_precision: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__(width, height, z_dim, c_dim)
        self.mapping = Mapping(z_dim, c_dim)
        self.synthesis = Synthesis(
            width, height, img_channels, self.mapping.w_dim, channel_base, channel_max, low_precision,
            recompute=recompute,
        )  # fmt: skip


class DiscriminatorBlock(nn.Module):
    """One level: [N, C_in, H, W] -> [N, C_out, H / 2, W / 2]."""

    def __init__(self, img_channels: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.fromrgb = Conv2d(img_channels, in_channels, 1, act="lrelu", he=True)
        self.conv0 = Conv2d(in_channels, in_channels, 3, act="lrelu", he=True)
        self.conv1 = Conv2d(in_channels, out_channels, 3, act="lrelu", down=2, he=True)

    def forward(self, x: Tensor, f: Tensor, clamp: float | None) -> Tensor:
        return self.conv1(self.conv0(x, clamp=clamp), f, clamp=clamp)


class Discriminator(growing.Discriminator):
    """The Progressive GAN's discriminator, and classifier where there are labels.

    `taps`: of the filter with which it halves the features' size; (1, 1) is the mean of 2x2.
    """

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int = 3,
        c_dim: int = 0,
        channel_base: int = 16384,
        channel_max: int = 512,
        mbstd_group: int = 4,
        taps: Sequence[float] = (1, 1),
        low_precision: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__(width, height, low_precision, 4, recompute)
        self.c_dim, self.mbstd_group = c_dim, mbstd_group
        counts = channels([4, *self.resolutions[::-1]], channel_base, channel_max)[::-1]
        for i, res in enumerate(self.resolutions):
            self.add_module(f"b{res}", DiscriminatorBlock(img_channels, counts[i], counts[i + 1]))
        last = counts[-1]
        self.b4 = DiscriminatorHead(last, last, self.start, 1 + c_dim, mbstd_group, img_channels, he=True)
        self.register_buffer("f", setup_filter(taps), persistent=False)

    def forward(self, img: Tensor) -> Tensor:
        """img [N, img_channels, *size] in [-1, 1] -> [N, 1 + c_dim] fp32: the score, then the logits of the classes.

        N must be a multiple of `mbstd_group`.
        """
        return self.b4(self.features(img))
