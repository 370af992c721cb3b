"""StyleGAN2: generator with skip connections, residual discriminator.

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (config F), with the class conditioning and
mixed precision of Karras et al. 2020, "Training GANs with Limited Data" (StyleGAN2-ADA). Levels are named by their
nominal resolution 4, 8, 16, ...: the sides of a rectangular image start from another size than 4x4.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...ops.conv2d import memory_format
from ...ops.upfirdn2d import setup_filter, upsample2d
from .layers import Conv2d, Linear, minibatch_std, modulated_conv2d, normalize_2nd_moment, run_block

Noise = str | Sequence[Tensor]  # "const", "none", or one [N, 1, H, W] a layer

FILTER = [1, 3, 3, 1]
CLAMP = 256.0  # of activations in low-precision levels: fp16 must not overflow


def start_size(width: int, height: int) -> tuple[int, int, int]:
    """(start height, start width, number of levels) of an image: halve both sides while both stay 4 or more.

    Raises:
        ValueError: the sides are not a small start size times a power of 2.
    """
    levels = 1
    w, h = width, height
    while w % 2 == 0 and h % 2 == 0 and min(w, h) >= 8:
        w, h, levels = w // 2, h // 2, levels + 1
    if levels < 2 or max(w, h) > 32 or min(w, h) < 4:
        raise ValueError(
            f"{width}x{height} px: both sides must be a start size of 4 to 32 times the same power of 2 "
            "(256x256, 768x512, 1280x768, ...); prepare the data set at such a size"
        )
    return h, w, levels


class Mapping(nn.Module):
    """z (and label) -> w.

    `w_avg` [w_dim] is the running mean of w, the point that truncation moves towards.
    """

    w_avg: Tensor

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, layers: int, lr_mul: float = 0.01) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.layers = z_dim, c_dim, w_dim, layers
        if c_dim:
            self.embed = Linear(c_dim, w_dim)
        widths = [z_dim + (w_dim if c_dim else 0)] + [w_dim] * layers
        for i in range(layers):
            self.add_module(f"fc{i}", Linear(widths[i], widths[i + 1], act="lrelu", lr_mul=lr_mul))
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor | None, c: Tensor | None = None) -> Tensor:
        """z [N, z_dim] (None where z_dim is 0), c [N, c_dim] one-hot -> w [N, w_dim], fp32."""
        parts = []
        if self.z_dim:
            assert z is not None
            parts.append(normalize_2nd_moment(z.to(self.w_avg.dtype)))
        if self.c_dim:
            assert c is not None
            parts.append(normalize_2nd_moment(self.embed(c.to(self.w_avg.dtype))))
        x = torch.cat(parts, dim=1)
        for i in range(self.layers):
            x = self.get_submodule(f"fc{i}")(x)
        return x

    @torch.no_grad()
    def update_w_avg(self, w_mean: Tensor, beta: float) -> None:
        """Moves `w_avg` towards the mean w [w_dim] of a batch."""
        self.w_avg.lerp_(w_mean.to(self.w_avg.dtype), 1 - beta)


def truncate(ws: Tensor, w_avg: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
    """ws [N, num_ws, w_dim] moved towards `w_avg`, all layers or the first `cutoff` (StyleGAN, appendix B)."""
    if psi == 1:
        return ws
    ws = ws.clone()
    ws[:, :cutoff] = w_avg.lerp(ws[:, :cutoff], psi)
    return ws


class SynthesisLayer(nn.Module):
    """Modulated convolution, noise, bias, leaky ReLU."""

    noise_const: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, size: tuple[int, int], use_noise: bool, up: int = 1
    ) -> None:
        super().__init__()
        self.up, self.size, self.use_noise = up, size, use_noise
        self.affine = Linear(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        if use_noise:
            self.noise_strength = nn.Parameter(torch.zeros(1))  # not 0-dim: DeepSpeed's flattening refuses that
            self.register_buffer("noise_const", torch.randn(size))

    def forward(self, x: Tensor, w: Tensor, f: Tensor, noise: Tensor | str, clamp: float | None) -> Tensor:
        styles = self.affine(w)
        # Demodulation makes the weight's scale irrelevant, so there is no weight gain here.
        noise_map = None
        if self.use_noise and noise != "none":
            noise_map = (self.noise_const if isinstance(noise, str) else noise) * self.noise_strength
        return modulated_conv2d(
            x, self.weight, styles, f, self.up, noise=noise_map, bias=self.bias, act="lrelu", clamp=clamp
        )


class ToRGB(nn.Module):
    """Modulated 1x1 convolution without demodulation -> image in the dtype of w."""

    def __init__(self, in_channels: int, img_channels: int, w_dim: int) -> None:
        super().__init__()
        self.affine = Linear(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(img_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(img_channels))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Tensor, w: Tensor, clamp: float | None) -> Tensor:
        styles = self.affine(w) * self.weight_gain
        return modulated_conv2d(x, self.weight, styles, demodulate=False, bias=self.bias, clamp=clamp).to(w.dtype)


class SynthesisBlock(nn.Module):
    """One level of the generator: [N, C_in, H / 2, W / 2] -> [N, C, H, W], and its part of the image."""

    def __init__(
        self, in_channels: int, channels: int, w_dim: int, size: tuple[int, int], img_channels: int, use_noise: bool
    ) -> None:
        super().__init__()
        self.first = in_channels == 0
        if self.first:
            self.const = nn.Parameter(torch.randn(channels, *size))
        else:
            self.conv0 = SynthesisLayer(in_channels, channels, w_dim, size, use_noise, up=2)
        self.conv1 = SynthesisLayer(channels, channels, w_dim, size, use_noise)
        self.torgb = ToRGB(channels, img_channels, w_dim)
        self.num_conv = 1 if self.first else 2

    def forward(
        self,
        x: Tensor | None,
        img: Tensor | None,
        ws: Tensor,
        f: Tensor,
        noise: Sequence[Tensor | str],
        dtype: torch.dtype,
        clamp: float | None,
    ) -> tuple[Tensor, Tensor]:
        """ws [N, num_conv + 1, w_dim]: one w a convolution, the last for ToRGB."""
        if self.first:
            y = self.const.to(dtype)[None].expand(len(ws), -1, -1, -1)
            y = y.contiguous(memory_format=memory_format(y.device))
        else:
            assert x is not None
            y = self.conv0(x.to(dtype), ws[:, 0], f, noise[0], clamp)
        y = self.conv1(y, ws[:, self.num_conv - 1], f, noise[-1], clamp)
        rgb = self.torgb(y, ws[:, self.num_conv], clamp)
        return y, rgb if img is None else upsample2d(img, f) + rgb


class Synthesis(nn.Module):
    """ws -> image. With `recompute`, as in `run_block`, training keeps only the activations between levels."""

    f: Tensor

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int,
        w_dim: int,
        channel_base: int,
        channel_max: int,
        use_noise: bool = True,
        low_precision: torch.dtype | None = None,
        low_precision_levels: int = 4,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        h, w, levels = start_size(width, height)
        self.resolutions = [4 * 2**i for i in range(levels)]
        channels = _channels(self.resolutions, channel_base, channel_max)
        self.low = _low_levels(levels, low_precision, low_precision_levels)
        self.recompute = recompute
        self.num_ws = 2 * levels
        self.sizes: list[tuple[int, int]] = []  # of each noise map
        for i, res in enumerate(self.resolutions):
            size = (h * 2**i, w * 2**i)
            below = channels[i - 1] if i else 0
            block = SynthesisBlock(below, channels[i], w_dim, size, img_channels, use_noise)
            self.add_module(f"b{res}", block)
            self.sizes += [size] * (block.num_conv if use_noise else 0)
        self.register_buffer("f", setup_filter(FILTER), persistent=False)

    def forward(self, ws: Tensor, noise: Noise = "const") -> Tensor:
        """ws [N, num_ws, w_dim] fp32 -> images [N, img_channels, height, width] fp32, in [-1, 1] once trained.

        noise: "const" (each layer's stored map), "none", or a list of [N, 1, H, W] of the `sizes`.
        """
        if not self.sizes:
            noise = "none"
        maps: Sequence[Tensor | str] = [noise] * self.num_ws if isinstance(noise, str) else noise
        x = img = None
        first = layer = 0
        for res, low in zip(self.resolutions, self.low, strict=True):
            block = cast(SynthesisBlock, self.get_submodule(f"b{res}"))
            n = block.num_conv
            dtype, clamp = (low, CLAMP) if low else (ws.dtype, None)
            args = (x, img, ws[:, first : first + n + 1], self.f, maps[layer : layer + n], dtype, clamp)
            x, img = run_block(block, self.recompute, *args)
            first, layer = first + n, layer + n
        assert img is not None
        return img


class Generator(nn.Module):
    """StyleGAN2's generator. Arguments as in `training.config.StyleGAN2Network`, sizes in px."""

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int = 3,
        c_dim: int = 0,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
        channel_base: int = 32768,
        channel_max: int = 512,
        use_noise: bool = True,
        low_precision: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.synthesis = Synthesis(
            width, height, img_channels, w_dim, channel_base, channel_max, use_noise, low_precision, recompute=recompute
        )
        self.mapping = Mapping(z_dim, c_dim, w_dim, mapping_layers)
        self.num_ws = self.synthesis.num_ws

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise: Noise = "const",
    ) -> Tensor:
        """z [N, z_dim], c [N, c_dim] one-hot -> images [N, img_channels, height, width] fp32."""
        ws = self.mapping(z, c)[:, None].expand(-1, self.num_ws, -1)
        ws = truncate(ws, self.mapping.w_avg, truncation_psi, truncation_cutoff)
        return self.synthesis(ws, noise)


class DiscriminatorBlock(nn.Module):
    """One residual level: [N, C_in, H, W] -> [N, C_out, H / 2, W / 2]."""

    def __init__(self, img_channels: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if img_channels:
            self.fromrgb = Conv2d(img_channels, in_channels, 1, act="lrelu")
        self.conv0 = Conv2d(in_channels, in_channels, 3, act="lrelu")
        self.conv1 = Conv2d(in_channels, out_channels, 3, act="lrelu", down=2)
        self.skip = Conv2d(in_channels, out_channels, 1, bias=False, down=2)

    def forward(self, x: Tensor, f: Tensor, clamp: float | None) -> Tensor:
        half = math.sqrt(0.5)  # the sum of two branches keeps unit variance
        y = self.skip(x, f, gain=half)
        x = self.conv0(x, clamp=clamp)
        x = self.conv1(x, f, gain=math.sqrt(2) * half, clamp=clamp and clamp * half)
        return y + x


class DiscriminatorHead(nn.Module):
    """Minibatch standard deviation, convolution, two dense layers: [N, C, h, w] fp32 -> [N, 1] or [N, cmap_dim]."""

    def __init__(self, channels: int, size: tuple[int, int], out: int, mbstd_group: int, mbstd_channels: int) -> None:
        super().__init__()
        self.mbstd_group = mbstd_group if mbstd_channels else 0
        self.conv = Conv2d(channels + mbstd_channels, channels, 3, act="lrelu")
        self.fc = Linear(channels * size[0] * size[1], channels, act="lrelu")
        self.out = Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        if self.mbstd_group:
            x = minibatch_std(x, self.mbstd_group)
        return self.out(self.fc(self.conv(x).flatten(1)))


class Discriminator(nn.Module):
    """StyleGAN2's discriminator. With labels: projection (Miyato and Koyama 2018) on the mapped label."""

    f: Tensor

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int = 3,
        c_dim: int = 0,
        channel_base: int = 32768,
        channel_max: int = 512,
        mapping_layers: int = 8,
        mbstd_group: int = 4,
        low_precision: torch.dtype | None = None,
        low_precision_levels: int = 4,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        h, w, levels = start_size(width, height)
        self.c_dim, self.mbstd_group = c_dim, mbstd_group
        self.resolutions = [4 * 2**i for i in range(levels)][:0:-1]  # highest first, without 4
        channels = _channels([4, *self.resolutions[::-1]], channel_base, channel_max)[::-1]
        self.low = _low_levels(levels, low_precision, low_precision_levels)[:0:-1]
        self.recompute = recompute
        for i, res in enumerate(self.resolutions):
            self.add_module(f"b{res}", DiscriminatorBlock(0 if i else img_channels, channels[i], channels[i + 1]))
        self.cmap_dim = channels[-1] if c_dim else 0
        if c_dim:
            self.mapping = Mapping(0, c_dim, self.cmap_dim, mapping_layers)
        self.b4 = DiscriminatorHead(channels[-1], (h, w), self.cmap_dim or 1, mbstd_group, min(mbstd_group - 1, 1))
        self.register_buffer("f", setup_filter(FILTER), persistent=False)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """img [N, img_channels, height, width] in [-1, 1], c [N, c_dim] one-hot -> logits [N, 1] fp32.

        N must be a multiple of `mbstd_group`.
        """
        x = img.contiguous(memory_format=memory_format(img.device))
        for i, (res, low) in enumerate(zip(self.resolutions, self.low, strict=True)):
            block = cast(DiscriminatorBlock, self.get_submodule(f"b{res}"))
            dtype, clamp = (low, CLAMP) if low else (self.f.dtype, None)
            x = x.to(dtype)
            if i == 0:
                x = block.fromrgb(x, clamp=clamp)
            x = run_block(block, self.recompute, x, self.f, clamp)
        x = self.b4(x.to(self.f.dtype))
        if self.c_dim:
            x = (x * self.mapping(None, c)).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x


def _channels(resolutions: Sequence[int], base: int, limit: int) -> list[int]:
    return [max(1, min(base // res, limit)) for res in resolutions]


def _low_levels(levels: int, dtype: torch.dtype | None, top: int) -> list[torch.dtype | None]:
    """The low-precision dtype of each level, lowest level first: the `top` highest ones, never the start."""
    low = min(top, levels - 1) if dtype else 0
    return [None] * (levels - low) + [dtype] * low
