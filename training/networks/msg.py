"""MSG-GAN: a generator that makes an image at every level, and a discriminator that sees them all, so that gradients
reach every level directly and nothing has to grow.

Karnewar and Wang 2019, "MSG-GAN: Multi-Scale Gradients for Generative Adversarial Networks", section 2, on StyleGAN2's
layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import stylegan2


class Synthesis(stylegan2.Synthesis):
    """ws -> image; `pyramid`: -> the images of all levels, each of its own ToRGB."""

    grows = False
    skip = False


class Generator(stylegan2.Generator):
    """MSG-GAN's generator. Arguments and result as of StyleGAN2's; `synthesis.pyramid` is for the discriminator."""

    grows = False
    synthesis_type = Synthesis


class Discriminator(stylegan2.Discriminator):
    """MSG-GAN's discriminator: StyleGAN2's, with each lower level's image concatenated to its features."""

    concatenates = True

    def forward(self, images: Sequence[Tensor], c: Tensor | None = None) -> Tensor:
        """Logits [N, 1] fp32. N must be a multiple of `mbstd_group`.

        Args:
            images: of each level, lowest first, [N, img_channels, h, w] in [-1, 1].
            c: [N, c_dim] one-hot.
        """
        if len(images) != self.levels:
            raise ValueError(f"{len(images)} images for {self.levels} levels")
        x = self.from_rgb(self.level, images[-1])
        for level in range(self.level, 0, -1):
            x = self.run(level, x)
            x = torch.cat([x, images[level - 1].to(x.dtype)], dim=1)  # the paper's phi_simple
        return self.logits(x.to(self.f.dtype), c)
