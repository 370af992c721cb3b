"""What StyleGAN, StyleGAN2 and R3GAN share: latents mapped to w and mixed, and the non-saturating logistic loss."""

import torch
from torch import Tensor

from .. import losses
from ..config import R3GANRecipe, Run, StyleGAN1Recipe, StyleGAN2Recipe
from ..draws import Draws
from ..phases import Batch, Loss, Phase
from ..report import report
from .recipe import Recipe


class StyleBased(Recipe):
    """A recipe whose generator maps z to w, one for each of its layers. Keeps the running mean of w."""

    def __init__(
        self, run: Run, width: int, height: int, img_channels: int, class_counts: list[int], device: torch.device
    ) -> None:
        r = run.recipe
        assert isinstance(r, StyleGAN1Recipe | StyleGAN2Recipe | R3GANRecipe)
        self.w_avg_beta = r.w_avg_beta
        self.style_mixing = 0.0 if isinstance(r, R3GANRecipe) else r.style_mixing
        super().__init__(run, width, height, img_channels, class_counts, device)

    def g_phase(self) -> Phase:
        w_dim = self.G.mapping.w_dim
        return Phase("Gmain", "G", self.g_main, self.stage.batch, statistics={"w": (w_dim,)}, after=self.update_w_avg)

    # What is random about a generated image, drawn in a fixed order from its own generator.

    def ws(self, draws: Draws, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(ws [n, num_ws, w_dim] with style mixing, the first latent's w [n, w_dim])."""
        w = self.G.mapping(draws.normal(self.z_dim), labels)
        ws = w[:, None].expand(-1, self.G.num_ws, -1)
        if self.style_mixing > 0:
            second = self.G.mapping(draws.normal(self.z_dim), labels)
            mix, where = draws.uniform(2).unbind(dim=1)
            cutoff = 1 + (where * (self.G.num_ws - 1)).long()  # uniform in 1 .. num_ws - 1
            cutoff = torch.where(mix < self.style_mixing, cutoff, self.G.num_ws)
            layer = torch.arange(self.G.num_ws, device=w.device)
            ws = torch.where((layer[None] < cutoff[:, None])[:, :, None], ws, second[:, None])
        return ws, w

    def fakes(self, draws: Draws, labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(images [n, C, H, W], labels [n, c_dim], w [n, w_dim]); `labels`: those to have, instead of drawn ones."""
        labels = self.labels(draws) if labels is None else labels
        ws, w = self.ws(draws, labels)
        images = self.G.synthesis(ws, draws.noise_maps(self.G.synthesis.sizes))
        return images, labels, w

    def judge(self, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """Logits [n, 1] of real images."""
        return self.D(self.seen(images, draws), labels)

    # Losses.

    def g_main(self, batch: Batch) -> Loss:
        """Non-saturating logistic loss."""
        images, labels, w = self.fakes(batch.draws)
        logits = self.D(self.seen(images, batch.draws), labels)
        report("scores/fake", logits)
        loss = losses.logistic_generator(logits)
        report("loss/G", loss)
        return Loss(loss, {"w": w})

    def update_w_avg(self, means: dict[str, Tensor]) -> None:
        self.G.mapping.update_w_avg(means["w"], self.w_avg_beta)

    def d_logistic(self, batch: Batch, real_logits: Tensor) -> Tensor:
        """[n]"""
        with torch.no_grad():
            fakes, fake_labels, _ = self.fakes(batch.draws)
        fake_logits = self.D(self.seen(fakes, batch.draws), fake_labels)
        report("scores/real", real_logits)
        loss = losses.logistic_discriminator_fake(fake_logits) + losses.logistic_discriminator_real(real_logits)
        report("loss/D", loss)
        return loss
