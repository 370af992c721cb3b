"""StyleGAN2: four phases an iteration, two of them lazy (Karras et al. 2020, StyleGAN2, section 3 and appendix B)."""

import torch
from torch import Tensor

from .. import losses
from ..config import Run, StyleGAN2Recipe
from ..phases import Batch, Loss, Phase
from ..report import report
from .style_based import StyleBased


class StyleGAN2(StyleBased):
    """Also keeps the running mean of path lengths."""

    def __init__(
        self, run: Run, width: int, height: int, img_channels: int, class_counts: list[int], device: torch.device
    ) -> None:
        assert isinstance(run.recipe, StyleGAN2Recipe)
        self.settings = run.recipe
        self.pl_mean = torch.zeros([], device=device)
        super().__init__(run, width, height, img_channels, class_counts, device)

    @property
    def r1_gamma(self) -> float:
        """Weight of the R1 penalty at the present size and batch."""
        height, width = self.G.size
        given = self.settings.r1_gamma
        return 0.0002 * width * height / self.stage.batch if given is None else given

    def make_phases(self) -> list[Phase]:
        r, batch = self.settings, self.stage.batch
        phases = [
            self.g_phase(),
            Phase(
                "Gpl",
                "G",
                self.g_path_length,
                max(batch // r.pl_batch_shrink, 1),
                r.pl_interval,
                statistics={"length": ()},
                after=self.update_pl_mean,
            ),
            self.d_phase(self.d_main),
            Phase("Dr1", "D", self.d_r1, batch, r.r1_interval),
        ]
        off = {"Gpl": r.pl_weight == 0, "Dr1": self.r1_gamma == 0}
        return [phase for phase in phases if not off.get(phase.name, False)]

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), "pl_mean": self.pl_mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.pl_mean.copy_(state["pl_mean"])

    # The phases' losses, beside those of StyleBased.

    def g_path_length(self, batch: Batch) -> Loss:
        """Path-length regularisation against the mean of the iterations before this one.

        The published code first moves the mean by this very batch. Doing it afterwards, from the mean over all
        processes, makes the result independent of how the batch is split.
        """
        labels = self.labels(batch.draws)
        ws, _ = self.ws(batch.draws, labels)
        images = self.G.synthesis(ws, batch.draws.noise_maps(self.G.synthesis.sizes))
        lengths = losses.path_lengths(images, ws, batch.draws.normal(*images.shape[1:]))
        penalty = losses.path_length_penalty(lengths, self.pl_mean)
        report("loss/path_length", penalty)
        report("path_length", lengths)
        return Loss(penalty * self.settings.pl_weight * self.settings.pl_interval, {"length": lengths})

    def update_pl_mean(self, means: dict[str, Tensor]) -> None:
        self.pl_mean.lerp_(means["length"], self.settings.pl_decay)

    def d_main(self, batch: Batch) -> Loss:
        """Logistic loss on generated and real images."""
        real_logits = self.judge(batch.images, batch.labels, batch.draws)
        return Loss(self.d_logistic(batch, real_logits), self.signs(real_logits))

    def d_r1(self, batch: Batch) -> Loss:
        """R1 on this iteration's reals."""
        images = batch.images.detach().requires_grad_()
        penalty = losses.r1_penalty(images, self.judge(images, batch.labels, batch.draws))
        report("loss/r1", penalty)
        return Loss(penalty * (self.r1_gamma / 2) * self.settings.r1_interval)
