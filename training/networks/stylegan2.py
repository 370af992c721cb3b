"""StyleGAN2: generator with skip connections, residual discriminator.

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (config F), with the class conditioning and
mixed precision of Karras et al. 2020, "Training GANs with Limited Data" (StyleGAN2-ADA). Levels are named by their
nominal resolution 4, 8, 16, ...: the sides of a rectangular image start from another size than 4x4.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ops.conv2d import memory_format
from ...ops.upfirdn2d import setup_filter, upsample2d
from . import growing
from .growing import Noise, channels
from .layers import Conv2d, DiscriminatorHead, Linear, modulated_conv2d, normalize_2nd_moment, run_block

FILTER = [1, 3, 3, 1]


class Mapping(growing.Mapping):
    """z (and label) -> w."""

    def __init__(self, z_dim: int, c_dim: int, w_dim: int, layers: int, lr_mul: float = 0.01) -> None:
        super().__init__(w_dim)
        self.z_dim, self.c_dim, self.layers = z_dim, c_dim, layers
        if c_dim:
            self.embed = Linear(c_dim, w_dim)
        widths = [z_dim + (w_dim if c_dim else 0)] + [w_dim] * layers
        for i in range(layers):
            self.add_module(f"fc{i}", Linear(widths[i], widths[i + 1], act="lrelu", lr_mul=lr_mul))

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
        alpha: float,
    ) -> tuple[Tensor, Tensor]:
        """ws [N, num_conv + 1, w_dim]: one w a convolution, the last for ToRGB. `alpha`: weight of its part."""
        if self.first:
            y = self.const.to(dtype)[None].expand(ws.shape[0], -1, -1, -1)
            y = y.contiguous(memory_format=memory_format(y.device))
        else:
            assert x is not None
            y = self.conv0(x.to(dtype), ws[:, 0], f, noise[0], clamp)
        y = self.conv1(y, ws[:, self.num_conv - 1], f, noise[-1], clamp)
        rgb = self.torgb(y, ws[:, self.num_conv], clamp)
        return y, rgb if img is None else torch.add(upsample2d(img, f), rgb, alpha=alpha)


class Synthesis(growing.Synthesis):
    """ws -> image. With `recompute`, as in `run_block`, training keeps only the activations between levels.

    `skip`: each level adds its part to the image of the level below (section 4.1); otherwise it makes its own.
    """

    skip = True

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
        super().__init__(width, height, low_precision, low_precision_levels, recompute)
        counts = channels(self.resolutions, channel_base, channel_max)
        for i, res in enumerate(self.resolutions):
            below = counts[i - 1] if i else 0
            block = SynthesisBlock(below, counts[i], w_dim, self.size_at(i), img_channels, use_noise)
            self.add_module(f"b{res}", block)
            self.noise_layers[i] = block.num_conv if use_noise else 0
        self.register_buffer("f", setup_filter(FILTER), persistent=False)

    def upsample_image(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2H, 2W], as the image of a level is below the next one's part."""
        return upsample2d(x, self.f)

    def pyramid(self, ws: Tensor, noise: Noise = "const") -> list[Tensor]:
        """ws [N, num_ws, w_dim] fp32 -> each level's images [N, img_channels, h, w] fp32, lowest level first.

        noise: "const" (each layer's stored map), "none", or a list of [N, 1, H, W] of the `sizes`.
        """
        maps = self.maps(noise)
        x, images = None, []
        first = layer = 0
        for level in range(self.level + 1):
            block, (dtype, clamp) = self.block(level), self.precision(level, ws.dtype)
            n = block.num_conv
            img = images[-1] if images and self.skip else None
            alpha = self.alpha if level == self.level else 1.0
            args = (x, img, ws[:, first : first + n + 1], self.f, maps[layer : layer + n], dtype, clamp, alpha)
            x, img = run_block(block, self.recompute, *args)
            images.append(img)
            first, layer = first + n, layer + n
        return images

    def forward(self, ws: Tensor, noise: Noise = "const") -> Tensor:
        """ws [N, num_ws, w_dim] fp32 -> images [N, img_channels, *size] fp32, in [-1, 1] once trained. A level that
        fades in adds its part with the weight `alpha`.

        noise: "const" (each layer's stored map), "none", or a list of [N, 1, H, W] of the `sizes`.
        """
        return self.pyramid(ws, noise)[-1]


class Generator(growing.Generator):
    """StyleGAN2's generator. Arguments as in `training.config.StyleGAN2Network`, sizes in px."""

    sums_images = True
    synthesis: Synthesis
    synthesis_type: type[Synthesis] = Synthesis

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
        super().__init__(width, height, z_dim, c_dim)
        self.synthesis = self.synthesis_type(
            width, height, img_channels, w_dim, channel_base, channel_max, use_noise, low_precision, recompute=recompute
        )
        self.mapping = Mapping(z_dim, c_dim, w_dim, mapping_layers)


class DiscriminatorBlock(nn.Module):
    """One residual level: [N, C_in, H, W] -> [N, C_out, H / 2, W / 2].

    Args:
        img_channels: of the image that its `fromrgb` takes; 0: it has none.
        in_channels: of what `fromrgb` makes.
        extra: channels that the level above has beside these.
    """

    def __init__(self, img_channels: int, in_channels: int, out_channels: int, extra: int = 0) -> None:
        super().__init__()
        if img_channels:
            self.fromrgb = Conv2d(img_channels, in_channels, 1, act="lrelu")
        self.conv0 = Conv2d(in_channels + extra, in_channels, 3, act="lrelu")
        self.conv1 = Conv2d(in_channels, out_channels, 3, act="lrelu", down=2)
        self.skip = Conv2d(in_channels + extra, out_channels, 1, bias=False, down=2)

    def forward(self, x: Tensor, f: Tensor, clamp: float | None) -> Tensor:
        half = math.sqrt(0.5)  # the sum of two branches keeps unit variance
        y = self.skip(x, f, gain=half)
        x = self.conv0(x, clamp=clamp)
        x = self.conv1(x, f, gain=math.sqrt(2) * half, clamp=clamp and clamp * half)
        return y + x


class Discriminator(growing.Discriminator):
    """StyleGAN2's discriminator. With labels: projection (Miyato and Koyama 2018) on the mapped label.

    `grows`: have a `fromrgb` at every level, not only the highest.
    """

    concatenates = False  # the image of each lower level to its features

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
        grows: bool = False,
    ) -> None:
        super().__init__(width, height, low_precision, low_precision_levels, recompute)
        self.grows = grows
        self.c_dim, self.mbstd_group = c_dim, mbstd_group
        counts = channels([4, *self.resolutions[::-1]], channel_base, channel_max)[::-1]
        extra = img_channels if self.concatenates else 0
        for i, res in enumerate(self.resolutions):
            image = img_channels if grows or i == 0 else 0
            block = DiscriminatorBlock(image, counts[i], counts[i + 1], extra if i else 0)
            self.add_module(f"b{res}", block)
        self.cmap_dim = counts[-1] if c_dim else 0
        if c_dim:
            self.mapping = Mapping(0, c_dim, self.cmap_dim, mapping_layers)
        image, out = img_channels if grows else 0, self.cmap_dim or 1
        self.b4 = DiscriminatorHead(counts[-1] + extra, counts[-1], self.start, out, mbstd_group, image)
        self.register_buffer("f", setup_filter(FILTER), persistent=False)

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """img [N, img_channels, *size] in [-1, 1], c [N, c_dim] one-hot -> logits [N, 1] fp32.

        N must be a multiple of `mbstd_group`.
        """
        return self.logits(self.features(img), c)

    def logits(self, x: Tensor, c: Tensor | None) -> Tensor:
        """What comes out of the levels, [N, channels, h, w] -> [N, 1]."""
        x = self.b4(x)
        if self.c_dim:
            x = (x * self.mapping(None, c)).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x
