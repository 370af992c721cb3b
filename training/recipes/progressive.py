"""Progressive GAN: Wasserstein loss with gradient penalty, or the logistic one with R1 (Karras et al. 2018, appendix A;
Mescheder et al. 2018), and with labels an auxiliary classifier (Odena et al. 2017)."""

import torch
from torch import Tensor

from .. import losses
from ..config import ProgressiveRecipe, Run
from ..draws import Draws
from ..phases import Batch, Loss, Phase
from ..report import report
from .recipe import Recipe


class Progressive(Recipe):
    """Two phases an iteration, the discriminator's first. The discriminator gives scores and logits of the classes."""

    def __init__(
        self, run: Run, width: int, height: int, img_channels: int, class_counts: list[int], device: torch.device
    ) -> None:
        assert isinstance(run.recipe, ProgressiveRecipe)
        self.settings = run.recipe
        self.wasserstein = run.recipe.loss == "wgan-gp"
        self.scores = "distances" if self.wasserstein else "logits"
        self.penalty = "recipe.gp_weight" if self.wasserstein else "recipe.r1_gamma"
        super().__init__(run, width, height, img_channels, class_counts, device)

    @property
    def r1_gamma(self) -> float:
        return 0.0 if self.wasserstein else self.settings.r1_gamma

    def make_phases(self) -> list[Phase]:
        batch = self.stage.batch
        return [self.d_phase(self.d_main), Phase("Gmain", "G", self.g_main, batch)]

    def fakes(self, draws: Draws, labels: Tensor) -> Tensor:
        """[n, C, h, w]"""
        return self.G(draws.normal(self.z_dim), labels)

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [n, 1], logits of the classes [n, c_dim])."""
        out = self.D(images)
        return out[:, :1], out[:, 1:]

    def class_penalty(self, name: str, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted cross entropy [n] of the auxiliary classifier; 0 without labels."""
        if not self.c_dim:
            return logits.new_zeros(len(logits))
        penalty = losses.cross_entropy(logits, labels)
        report(f"loss/class_{name}", penalty)
        return penalty * self.settings.class_weight

    def g_main(self, batch: Batch) -> Loss:
        labels = self.labels(batch.draws)
        scores, classes = self.judge(self.seen(self.fakes(batch.draws, labels), batch.draws))
        report("scores/fake", scores)
        loss = losses.wasserstein_generator(scores) if self.wasserstein else losses.logistic_generator(scores)
        report("loss/G", loss)
        return Loss(loss + self.class_penalty("G", classes, labels))

    def d_main(self, batch: Batch) -> Loss:
        """Fakes are of the reals' classes, so that what lies between two images has one."""
        with torch.no_grad():
            fakes = self.fakes(batch.draws, batch.labels)
        reals = batch.images.detach().requires_grad_(self.r1_gamma > 0)
        fake_scores, fake_classes = self.judge(self.seen(fakes, batch.draws))
        real_scores, real_classes = self.judge(self.seen(reals, batch.draws))
        report("scores/real", real_scores)
        if self.wasserstein:
            loss = losses.wasserstein_discriminator(real_scores, fake_scores)
            penalty = self.wasserstein_penalty(batch, fakes, real_scores)
        else:
            loss = losses.logistic_discriminator_fake(fake_scores) + losses.logistic_discriminator_real(real_scores)
            penalty = self.r1(reals, real_scores)
        report("loss/D", loss)
        classes = self.class_penalty("real", real_classes, batch.labels)
        classes = classes + self.class_penalty("fake", fake_classes, batch.labels)
        return Loss(loss + penalty + classes, self.signs(real_scores))

    def wasserstein_penalty(self, batch: Batch, fakes: Tensor, real_scores: Tensor) -> Tensor:
        """Weighted gradient penalty, and drift [n]."""
        r = self.settings
        between = batch.images.lerp(fakes, batch.draws.uniform(1, 1, 1)).requires_grad_()
        penalty = losses.gradient_penalty(between, self.judge(between)[0], r.gp_target)
        report("loss/gradient_penalty", penalty)
        return penalty * (r.gp_weight / r.gp_target**2) + real_scores.flatten().square() * r.drift

    def r1(self, reals: Tensor, real_scores: Tensor) -> Tensor:
        """Weighted R1 penalty [n]; 0 where it is off."""
        if not self.r1_gamma:
            return reals.new_zeros(len(reals))
        penalty = losses.r1_penalty(reals, real_scores)
        report("loss/r1", penalty)
        return penalty * (self.r1_gamma / 2)
