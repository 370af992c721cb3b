"""Multi-scale gradients, the alternative to growing: the discriminator sees images of all sizes at once (Karnewar and
Wang 2019, "MSG-GAN"), here with StyleGAN2's networks, losses and regularisers."""

from torch import Tensor

from ..draws import Draws
from ..networks.growing import pyramid
from .stylegan2 import StyleGAN2


class MSG(StyleGAN2):
    """StyleGAN2 whose discriminator takes a list of images, the smallest first."""

    def fakes(self, draws: Draws) -> tuple[list[Tensor], Tensor, Tensor]:  # type: ignore[override]
        """(images [n, C, H, W] of each size, labels [n, c_dim], w [n, w_dim])."""
        labels = self.labels(draws)
        ws, w = self.ws(draws, labels)
        return self.G.synthesis.pyramid(ws, draws.noise_maps(self.G.synthesis.sizes)), labels, w

    def judge(self, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Reals are shown at all sizes, too; R1 differentiates with respect to the largest, of which the others are
        means."""
        return self.D(pyramid(images, self.levels), labels)
