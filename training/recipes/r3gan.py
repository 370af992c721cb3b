"""R3GAN: the relativistic pairing loss with R1 and R2 in every step (Huang et al. 2024, "The GAN is dead; long live the
GAN! A Modern GAN Baseline", section 2), for its own networks and for those of StyleGAN2."""

from dataclasses import replace

import torch
from torch import Tensor

from .. import losses
from ..config import R3GANRecipe, Run
from ..phases import Batch, Loss, Phase
from ..report import report
from ..schedule import cosine
from .style_based import StyleBased


class R3GAN(StyleBased):
    """Two phases an iteration, the discriminator's first, each with real images of its own. Generated images are paired
    with them, and have their labels.

    Attributes:
        lr, beta2: of both optimizers.
        gamma: weight of both penalties. All three follow from the images shown so far.
    """

    reals = 2
    scores = "differences"
    penalty = "recipe.gamma"

    def __init__(
        self, run: Run, width: int, height: int, img_channels: int, class_counts: list[int], device: torch.device
    ) -> None:
        assert isinstance(run.recipe, R3GANRecipe)
        self.settings = run.recipe
        self.lr, self.gamma = run.recipe.lr, run.recipe.gamma
        super().__init__(run, width, height, img_channels, class_counts, device)

    @property
    def r1_gamma(self) -> float:
        """As it is now; R2's is the same."""
        return self.gamma

    def lr_text(self, lr: float) -> str:
        r = self.settings
        return (
            f"lr {r.lr:g} to {r.lr_end:g}, beta2 {r.beta2:g} to {r.beta2_end:g} and gamma {r.gamma:g} to "
            f"{r.gamma_end:g} within {r.decay_kimg:g} kimg"
        )

    def make_phases(self) -> list[Phase]:
        return [self.d_phase(self.d_main), replace(self.g_phase(), reals=1)]

    def at(self, nimg: int) -> None:
        super().at(nimg)
        r, over = self.settings, self.settings.decay_kimg * 1000
        self.lr = cosine(r.lr, r.lr_end, nimg, over)
        self.beta2 = cosine(r.beta2, r.beta2_end, nimg, over)
        self.gamma = cosine(r.gamma, r.gamma_end, nimg, over)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"], group["betas"] = self.lr, (0.0, self.beta2)

    def g_main(self, batch: Batch) -> Loss:
        """Relativistic pairing loss; statistic w, as in StyleBased."""
        fakes, labels, w = self.fakes(batch.draws, batch.labels)
        fake_logits = self.judge(fakes, labels, batch.draws)
        with torch.no_grad():
            real_logits = self.judge(batch.images, labels, batch.draws)
        report("scores/fake", fake_logits)
        loss = losses.relativistic_generator(real_logits, fake_logits)
        report("loss/G", loss)
        return Loss(loss, {"w": w})

    def d_main(self, batch: Batch) -> Loss:
        """Relativistic pairing loss, with R1 on the reals and R2 on the generated images.

        Only differences of scores mean something here, so the augmentation is controlled by the sign of these.
        """
        with torch.no_grad():
            fakes, labels, _ = self.fakes(batch.draws, batch.labels)
        fakes.requires_grad_(self.gamma > 0)
        reals = batch.images.detach().requires_grad_(self.gamma > 0)
        fake_logits = self.judge(fakes, labels, batch.draws)
        real_logits = self.judge(reals, labels, batch.draws)
        report("scores/real", real_logits)
        loss = losses.relativistic_discriminator(real_logits, fake_logits)
        report("loss/D", loss)
        penalties = self.penalties(reals, real_logits, fakes, fake_logits)
        return Loss(loss + penalties, self.signs(real_logits - fake_logits))

    def penalties(self, reals: Tensor, real_logits: Tensor, fakes: Tensor, fake_logits: Tensor) -> Tensor:
        """Weighted R1 and R2 [n]; 0 where they are off."""
        if not self.gamma:
            return reals.new_zeros(len(reals))
        r1, r2 = losses.r1_penalty(reals, real_logits), losses.r2_penalty(fakes, fake_logits)
        report("loss/r1", r1)
        report("loss/r2", r2)
        return (r1 + r2) * (self.gamma / 2)
