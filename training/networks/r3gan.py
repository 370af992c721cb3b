"""R3GAN: two plain residual networks without any normalisation, noise maps or mapping network.

Huang et al. 2024, "The GAN is dead; long live the GAN! A Modern GAN Baseline", section 3, begun as Zhang et al. 2019,
"Fixup Initialization: Residual Learning Without Normalization", section 3, tells. Weights are stored as they are used,
without the equalised learning rate of the other networks here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...ops.bias_act import bias_act
from ...ops.conv2d import conv2d, memory_format
from ...ops.upfirdn2d import downsample2d, setup_filter, upsample2d
from . import growing
from .growing import channels

FILTER = [1, 2, 1]
SLOPE = 0.2  # of the leaky ReLU
GAIN = math.sqrt(2 / (1 + SLOPE**2))  # of weights before it, which keeps the mean square (He et al. 2015, eq. 15)
CONVOLUTIONS = 3  # of a residual block


def weight(*shape: int, gain: float = 1.0) -> nn.Parameter:
    """[out, in, ...] of N(0, gain^2 / fan_in), for results with `gain` times the standard deviation of the inputs."""
    return nn.Parameter(torch.randn(shape) * (gain / math.sqrt(math.prod(shape[1:]))))


def within(x: Tensor, clamp: float | None) -> Tensor:
    """In fp16, `x` limited to [-clamp, clamp]: nothing else keeps a sum of residuals from overflowing."""
    return x if clamp is None or x.dtype != torch.float16 else x.clamp(-clamp, clamp)


@dataclass(frozen=True)
class Residuals:
    """The residual blocks of a network.

    Args:
        each: blocks of a level.
        total: blocks of the network.
        expansion: channels within a block, as a multiple of those outside.
        group_width: channels of a group of its 3x3 convolution.
    """

    each: int
    total: int
    expansion: int
    group_width: int

    @property
    def scale(self) -> float:
        """Of the initial weights in a block but the last, L^(-1 / (2m - 2)) for L blocks of m convolutions (Zhang et
        al. 2019, section 3): a step then changes the network's result as much, however many blocks there are."""
        return self.total ** (-1 / (2 * CONVOLUTIONS - 2))

    def check(self, resolutions: Sequence[int], counts: Sequence[int]) -> None:
        """Raises ValueError if the channels within a level's blocks do not divide into groups."""
        for res, count in zip(resolutions, counts, strict=True):
            if count * self.expansion % self.group_width:
                raise ValueError(
                    f"the {count} channels at {res} px, times network.expansion {self.expansion}, do not divide into "
                    f"groups of network.group_width {self.group_width}: change one of these, network.channel_base or "
                    "network.channel_max"
                )


class ResidualBlock(nn.Module):
    """x + 1x1 convolution, 3x3 convolution in groups, 1x1 convolution: [N, C, H, W] -> the same.

    A leaky ReLU with bias follows the first two. The last one begins with 0, so that at first the block does nothing.
    """

    def __init__(self, channels: int, how: Residuals) -> None:
        super().__init__()
        inner = channels * how.expansion
        self.groups = inner // how.group_width
        self.weight0 = weight(inner, channels, 1, 1, gain=GAIN * how.scale)
        self.bias0 = nn.Parameter(torch.zeros(inner))
        self.weight1 = weight(inner, how.group_width, 3, 3, gain=GAIN * how.scale)
        self.bias1 = nn.Parameter(torch.zeros(inner))
        self.weight2 = nn.Parameter(torch.zeros(channels, inner, 1, 1))

    def forward(self, x: Tensor, clamp: float | None) -> Tensor:
        y = bias_act(conv2d(x, self.weight0), self.bias0, "lrelu", gain=1, clamp=clamp, alpha=SLOPE)
        y = conv2d(y, self.weight1, groups=self.groups)
        y = bias_act(y, self.bias1, "lrelu", gain=1, clamp=clamp, alpha=SLOPE)
        return within(x + conv2d(y, self.weight2), clamp)


class Level(nn.Module):
    """The residual blocks of a level: [N, C, H, W] -> the same."""

    def __init__(self, channels: int, how: Residuals) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(ResidualBlock(channels, how) for _ in range(how.each))

    def forward(self, x: Tensor, clamp: float | None) -> Tensor:
        for block in self.residuals:
            x = block(x, clamp)
        return x


class Pointwise(nn.Module):
    """1x1 convolution without bias, behind down-sampling by `down` or before up-sampling by `up`, 1 or 2 each:
    [N, in, H, W] -> [N, out, H * up / down, W * up / down]. Where nothing but the size changes, there is no
    convolution."""

    def __init__(self, in_channels: int, out_channels: int, up: int = 1, down: int = 1) -> None:
        super().__init__()
        self.up, self.down = up, down
        resamples = in_channels == out_channels and (up, down) != (1, 1)
        self.weight = None if resamples else weight(out_channels, in_channels, 1, 1)

    def forward(self, x: Tensor, f: Tensor | None = None, clamp: float | None = None) -> Tensor:
        """`f` low-pass filter when resampling."""
        if self.down > 1:
            assert f is not None
            x = downsample2d(x, f)
        if self.weight is not None:
            x = within(conv2d(x, self.weight), clamp)
        if self.up > 1:
            assert f is not None
            x = upsample2d(x, f)
        return x


class Mapping(growing.Mapping):
    """z, and behind it an embedding of the label that is as long: nothing is learned of z, so `w_avg` stays 0."""

    def __init__(self, z_dim: int, c_dim: int) -> None:
        super().__init__(2 * z_dim if c_dim else z_dim)
        self.c_dim = c_dim
        if c_dim:  # of one-hot labels, so that each takes one column
            self.embed = nn.Parameter(torch.randn(z_dim, c_dim))

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """z [N, z_dim], c [N, c_dim] one-hot -> [N, w_dim], fp32."""
        z = z.to(self.w_avg.dtype)
        if not self.c_dim:
            return z
        assert c is not None
        return torch.cat([z, c.to(z.dtype) @ self.embed.t()], dim=1)

    def update_w_avg(self, w_mean: Tensor, beta: float) -> None:
        """Does nothing."""


class Basis(nn.Module):
    """Learned features, each scaled by a linear function of the latent: [N, w_dim] -> [N, channels, h, w]."""

    def __init__(self, w_dim: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.randn(channels, *size))
        self.weight = weight(channels, w_dim)

    def forward(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        x = (self.features * (w @ self.weight.t())[:, :, None, None]).to(dtype)
        return x.contiguous(memory_format=memory_format(x.device))


class SynthesisBlock(nn.Module):
    """One level of the generator: [N, C_in, H / 2, W / 2] -> [N, C, H, W]; the start: ws [N, 1, w_dim] -> [N, C, H, W].

    `img_channels`: of the image that its `torgb` makes; 0: it has none.
    """

    def __init__(
        self, in_channels: int, channels: int, w_dim: int, size: tuple[int, int], img_channels: int, how: Residuals
    ) -> None:
        super().__init__()
        self.first = in_channels == 0
        if self.first:
            self.input = Basis(w_dim, channels, size)
        else:
            self.change = Pointwise(in_channels, channels, up=2)
        self.level = Level(channels, how)
        if img_channels:
            self.torgb = Pointwise(channels, img_channels)

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
            y = self.input(ws[:, 0], dtype)
        else:
            assert x is not None
            y = self.change(x.to(dtype), f, clamp)
        return self.level(y, clamp)


class Synthesis(growing.Synthesis):
    """Latent -> image, as `growing.Synthesis`; without noise, and only of its full size."""

    grows = False

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int,
        w_dim: int,
        channel_base: int,
        channel_max: int,
        blocks: int,
        expansion: int,
        group_width: int,
        low_precision: torch.dtype | None = None,
        low_precision_levels: int = 4,
        recompute: bool = False,
    ) -> None:
        super().__init__(width, height, low_precision, low_precision_levels, recompute)
        counts = channels(self.resolutions, channel_base, channel_max)
        how = Residuals(blocks, blocks * self.levels, expansion, group_width)
        how.check(self.resolutions, counts)
        for i, res in enumerate(self.resolutions):
            image = img_channels if i == self.levels - 1 else 0
            block = SynthesisBlock(counts[i - 1] if i else 0, counts[i], w_dim, self.size_at(i), image, how)
            self.add_module(f"b{res}", block)
        self.register_buffer("f", setup_filter(FILTER), persistent=False)

    @property
    def num_ws(self) -> int:
        """One w, which only the start takes."""
        return 1

    def inputs(self, level: int, ws: Tensor, maps: Sequence[Tensor | str]) -> tuple[Tensor, Sequence[Tensor | str]]:
        return ws, maps


class Generator(growing.Generator):
    """R3GAN's generator. Arguments as in `training.config.R3GANNetwork`, sizes in px.

    Raises ValueError if the channels within its blocks do not divide into groups.
    """

    grows = False
    has_w = False

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int = 3,
        c_dim: int = 0,
        z_dim: int = 64,
        channel_base: int = 24576,
        channel_max: int = 768,
        blocks: int = 2,
        expansion: int = 2,
        group_width: int = 16,
        low_precision: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__(width, height, z_dim, c_dim)
        self.mapping = Mapping(z_dim, c_dim)
        self.synthesis = Synthesis(
            width, height, img_channels, self.mapping.w_dim, channel_base, channel_max, blocks, expansion, group_width,
            low_precision, recompute=recompute,
        )  # fmt: skip


class DiscriminatorBlock(nn.Module):
    """One level: [N, C_in, H, W] -> [N, C_out, H / 2, W / 2].

    `img_channels`: of the image that its `fromrgb` takes; 0: it has none.
    """

    def __init__(self, img_channels: int, in_channels: int, out_channels: int, how: Residuals) -> None:
        super().__init__()
        if img_channels:
            self.fromrgb = Pointwise(img_channels, in_channels)
        self.level = Level(in_channels, how)
        self.change = Pointwise(in_channels, out_channels, down=2)

    def forward(self, x: Tensor, f: Tensor, clamp: float | None) -> Tensor:
        return self.change(self.level(x, clamp), f, clamp)


class Head(nn.Module):
    """The lowest level, a weighted sum of each feature's pixels, and a linear layer: [N, C, h, w] -> [N, out].

    It has no bias, which would cancel where only differences of scores count.
    """

    def __init__(self, channels: int, size: tuple[int, int], out: int, how: Residuals) -> None:
        super().__init__()
        self.level = Level(channels, how)
        self.basis = weight(channels, *size)
        self.weight = weight(out, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.level(x, None) * self.basis).sum(dim=[2, 3])
        return x @ self.weight.t()


class Discriminator(growing.Discriminator):
    """R3GAN's discriminator. With labels: projection (Miyato and Koyama 2018) on an embedding of the label.

    Arguments as in `training.config.R3GANNetwork`, sizes in px. Raises ValueError as `Generator` does.
    """

    grows = False

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int = 3,
        c_dim: int = 0,
        channel_base: int = 24576,
        channel_max: int = 768,
        blocks: int = 2,
        expansion: int = 2,
        group_width: int = 16,
        low_precision: torch.dtype | None = None,
        low_precision_levels: int = 4,
        recompute: bool = False,
    ) -> None:
        super().__init__(width, height, low_precision, low_precision_levels, recompute)
        self.c_dim = c_dim
        resolutions = [*self.resolutions, 4]
        counts = channels(resolutions, channel_base, channel_max)
        how = Residuals(blocks, blocks * self.levels, expansion, group_width)
        how.check(resolutions, counts)
        for i, res in enumerate(self.resolutions):
            self.add_module(f"b{res}", DiscriminatorBlock(0 if i else img_channels, counts[i], counts[i + 1], how))
        last = counts[-1]
        self.b4 = Head(last, self.start, last if c_dim else 1, how)
        if c_dim:  # products with it have the mean square of a feature, summed
            self.embed = nn.Parameter(torch.randn(last, c_dim) / math.sqrt(last))
        self.register_buffer("f", setup_filter(FILTER), persistent=False)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """img [N, img_channels, *size] in [-1, 1], c [N, c_dim] one-hot -> logits [N, 1] fp32."""
        x = self.b4(self.features(img))
        if not self.c_dim:
            return x
        assert c is not None
        return (x * (c.to(x.dtype) @ self.embed.t())).sum(dim=1, keepdim=True)
