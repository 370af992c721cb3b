"""StyleGAN: style-based generator with adaptive instance normalisation, the Progressive GAN's discriminator.

Karras et al. 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks", section 2, appendix C.
The conditioning on labels is that of Mescheder et al. 2018, "Which Training Methods for GANs do actually Converge?".

Its up-sampling (nearest neighbour, convolution, blur [1, 2, 1]) and its down-sampling (blur, convolution, mean of 2x2)
are written as `conv2d` with the filter [1, 3, 3, 1], which is [1, 1] blurred by [1, 2, 1]. That differs from the
published order only along the border, where pixels beyond it are not cut off between convolution and blur.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ops.bias_act import bias_act
from ...ops.conv2d import conv2d, memory_format
from ...ops.upfirdn2d import setup_filter
from . import growing, progressive
from .growing import channels
from .layers import Conv2d, Linear, adain
from .stylegan2 import Mapping

FILTER = (1, 3, 3, 1)


class Epilogue(nn.Module):
    """What follows each convolution: noise, bias, leaky ReLU, style (figure 1b); [N, C, H, W] -> the same."""

    noise_const: Tensor

    def __init__(self, channels: int, w_dim: int, size: tuple[int, int], use_noise: bool) -> None:
        super().__init__()
        self.use_noise = use_noise
        self.bias = nn.Parameter(torch.zeros(channels))
        self.affine = Linear(w_dim, 2 * channels)
        if use_noise:
            self.noise_strength = nn.Parameter(torch.zeros(channels))
            self.register_buffer("noise_const", torch.randn(size))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | str, clamp: float | None) -> Tensor:
        """w [N, w_dim]; noise: "const", "none" or [N, 1, H, W]."""
        if self.use_noise and noise != "none":
            noise_map = self.noise_const if isinstance(noise, str) else noise
            x = torch.addcmul(x, noise_map.to(x.dtype), self.noise_strength.to(x.dtype)[:, None, None])
        x = bias_act(x, self.bias, act="lrelu", gain=1, clamp=clamp)
        scale, shift = self.affine(w).chunk(2, dim=1)
        return adain(x, 1 + scale, shift)


class SynthesisLayer(Epilogue):
    """Convolution and epilogue: [N, C_in, H / up, W / up] -> [N, C, H, W]."""

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, size: tuple[int, int], use_noise: bool, up: int = 1
    ) -> None:
        super().__init__(out_channels, w_dim, size, use_noise)
        self.up = up
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.weight_gain = math.sqrt(2) / math.sqrt(in_channels * 9)  # He et al. 2015, eq. 10

    def forward(self, x: Tensor, w: Tensor, f: Tensor, noise: Tensor | str, clamp: float | None) -> Tensor:
        return super().forward(conv2d(x, self.weight * self.weight_gain, f, self.up), w, noise, clamp)


class SynthesisBlock(nn.Module):
    """One level of the generator: [N, C_in, H / 2, W / 2] -> [N, C, H, W].

    The start has no input: it begins with a learned constant or, with `latent_input`, with a dense layer on w.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        w_dim: int,
        size: tuple[int, int],
        img_channels: int,
        use_noise: bool,
        latent_input: bool,
    ) -> None:
        super().__init__()
        self.first, self.latent_input = in_channels == 0, latent_input
        if self.first:
            if latent_input:
                self.input = progressive.Start(w_dim, channels, size)
            else:
                self.const = nn.Parameter(torch.ones(channels, *size))
            self.epilogue = Epilogue(channels, w_dim, size, use_noise)
        else:
            self.conv0 = SynthesisLayer(in_channels, channels, w_dim, size, use_noise, up=2)
        self.conv1 = SynthesisLayer(channels, channels, w_dim, size, use_noise)
        self.torgb = Conv2d(channels, img_channels, 1)

    def forward(
        self,
        x: Tensor | None,
        ws: Tensor,
        noise: Sequence[Tensor | str],
        f: Tensor,
        dtype: torch.dtype,
        clamp: float | None,
    ) -> Tensor:
        """ws [N, 2, w_dim] and two noise maps: one a layer."""
        if self.first:
            y = self.epilogue(self._start(ws[:, 0], dtype), ws[:, 0], noise[0], clamp)
        else:
            assert x is not None
            y = self.conv0(x.to(dtype), ws[:, 0], f, noise[0], clamp)
        return self.conv1(y, ws[:, 1], f, noise[1], clamp)

    def _start(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        if self.latent_input:
            return self.input(w, dtype)
        y = self.const.to(dtype)[None].expand(w.shape[0], -1, -1, -1)
        return y.contiguous(memory_format=memory_format(y.device))


class Synthesis(growing.Synthesis):
    """ws -> image, as `growing.Synthesis`: one w and one noise map a layer."""

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int,
        w_dim: int,
        channel_base: int,
        channel_max: int,
        use_noise: bool = True,
        latent_input: bool = False,
        low_precision: torch.dtype | None = None,
        low_precision_levels: int = 4,
        recompute: bool = False,
    ) -> None:
        super().__init__(width, height, low_precision, low_precision_levels, recompute)
        counts = channels(self.resolutions, channel_base, channel_max)
        for i, res in enumerate(self.resolutions):
            below = counts[i - 1] if i else 0
            block = SynthesisBlock(below, counts[i], w_dim, self.size_at(i), img_channels, use_noise, latent_input)
            self.add_module(f"b{res}", block)
            self.noise_layers[i] = 2 if use_noise else 0
        self.register_buffer("f", setup_filter(FILTER), persistent=False)

    def inputs(self, level: int, ws: Tensor, maps: Sequence[Tensor | str]) -> tuple[Tensor, Sequence[Tensor | str]]:
        own = slice(2 * level, 2 * level + 2)
        return ws[:, own], maps[own]


class Generator(growing.Generator):
    """StyleGAN's generator. Arguments as in `training.config.StyleGAN1Network`, sizes in px.

    The mapping is StyleGAN2's, which differs from StyleGAN's in how it takes labels and in the gain of its biases.
    """

    truncation_cutoff = 8  # the coarse layers, appendix B

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int = 3,
        c_dim: int = 0,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
        channel_base: int = 16384,
        channel_max: int = 512,
        use_noise: bool = True,
        latent_input: bool = False,
        low_precision: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__(width, height, z_dim, c_dim)
        self.synthesis = Synthesis(
            width, height, img_channels, w_dim, channel_base, channel_max, use_noise, latent_input, low_precision,
            recompute=recompute,
        )  # fmt: skip
        self.mapping = Mapping(z_dim, c_dim, w_dim, mapping_layers)


class Discriminator(progressive.Discriminator):
    """The Progressive GAN's, with blurred down-sampling; of one logit for each class, that of the label counts
    (Mescheder et al. 2018)."""

    def __init__(
        self,
        width: int,
        height: int,
        img_channels: int = 3,
        c_dim: int = 0,
        channel_base: int = 16384,
        channel_max: int = 512,
        mbstd_group: int = 4,
        low_precision: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        outputs = max(c_dim, 1)
        super().__init__(
            width, height, img_channels, outputs - 1, channel_base, channel_max, mbstd_group, FILTER, low_precision,
            recompute,
        )  # fmt: skip
        self.c_dim = c_dim

    def forward(self, img: Tensor, c: Tensor | None = None) -> Tensor:
        """img [N, img_channels, *size] in [-1, 1], c [N, c_dim] one-hot -> logits [N, 1] fp32.

        N must be a multiple of `mbstd_group`.
        """
        x = super().forward(img)
        if self.c_dim:
            assert c is not None
            x = (x * c.to(x.dtype)).sum(dim=1, keepdim=True)
        return x
