"""StyleGAN: grown, logistic loss with R1 in every step (Karras et al. 2019, section 2 and appendix C)."""

import torch

from .. import losses
from ..config import Run, StyleGAN1Recipe
from ..phases import Batch, Loss, Phase
from ..report import report
from .style_based import StyleBased


class StyleGAN1(StyleBased):
    """Two phases an iteration, the discriminator's first."""

    def __init__(
        self, run: Run, width: int, height: int, img_channels: int, class_counts: list[int], device: torch.device
    ) -> None:
        assert isinstance(run.recipe, StyleGAN1Recipe)
        self.settings = run.recipe
        super().__init__(run, width, height, img_channels, class_counts, device)

    @property
    def r1_gamma(self) -> float:
        return self.settings.r1_gamma

    def make_phases(self) -> list[Phase]:
        return [self.d_phase(self.d_main), self.g_phase()]

    def d_main(self, batch: Batch) -> Loss:
        """Logistic loss, with R1 on the reals."""
        images = batch.images.detach().requires_grad_(self.r1_gamma > 0)
        real_logits = self.judge(images, batch.labels, batch.draws)
        loss = self.d_logistic(batch, real_logits)
        if self.r1_gamma > 0:
            penalty = losses.r1_penalty(images, real_logits)
            report("loss/r1", penalty)
            loss = loss + penalty * (self.r1_gamma / 2)
        return Loss(loss, self.signs(real_logits))
