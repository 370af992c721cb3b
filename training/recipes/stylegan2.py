"""StyleGAN2: four phases an iteration, two of them lazy (Karras et al. 2020, StyleGAN2, section 3 and appendix B)."""

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from .. import losses, schedule
from ..config import Run
from ..draws import Draws
from ..networks import build as build_networks
from ..phases import Batch, Loss, Phase
from ..report import report


class StyleGAN2:
    """Networks, phases, optimizers, and the running mean of path lengths.

    The loop uses: `networks`, `phases`, `optimizers` (by network), `averaged` (name of the network that is averaged and
    shown), `discriminator` (name of the one that goes into snapshots beside it), `z_dim`, `c_dim`, and the state_dict
    for what is neither network nor optimizer.
    """

    averaged = "G"
    discriminator = "D"

    def __init__(
        self, run: Run, width: int, height: int, img_channels: int, class_counts: list[int], device: torch.device
    ) -> None:
        r = run.recipe
        self.settings, self.batch = r, run.batch
        self.c_dim, self.z_dim = len(class_counts), run.network.z_dim
        self.class_ends = torch.tensor(class_counts, dtype=torch.float64, device=device).cumsum(0)
        G, D = build_networks(run, width, height, img_channels, self.c_dim)
        self.G, self.D = G.to(device), D.to(device)
        self.networks: dict[str, nn.Module] = {"G": self.G, "D": self.D}
        self.r1_gamma = 0.0002 * width * height / run.batch if r.r1_gamma is None else r.r1_gamma
        self.pl_mean = torch.zeros([], device=device)
        self.phases = self._phases()
        self.optimizers = {name: self._adam(name) for name in self.networks}

    def _phases(self) -> list[Phase]:
        r, w_dim = self.settings, self.G.mapping.w_dim
        phases = [
            Phase("Gmain", "G", self.g_main, self.batch, statistics={"w": (w_dim,)}, after=self.update_w_avg),
            Phase(
                "Gpl",
                "G",
                self.g_path_length,
                max(self.batch // r.pl_batch_shrink, 1),
                r.pl_interval,
                statistics={"length": ()},
                after=self.update_pl_mean,
            ),
            Phase("Dmain", "D", self.d_main, self.batch),
            Phase("Dr1", "D", self.d_r1, self.batch, r.r1_interval),
        ]
        off = {"Gpl": r.pl_weight == 0, "Dr1": self.r1_gamma == 0}
        return [phase for phase in phases if not off.get(phase.name, False)]

    def _adam(self, name: str) -> Optimizer:
        r = self.settings
        intervals = [phase.interval for phase in self.phases if phase.trains == name]
        lr, beta2 = schedule.lazy(r.lr, r.beta2, intervals)
        return Adam(self.networks[name].parameters(), lr=lr, betas=(0.0, beta2), eps=r.eps, fused=True)

    def state_dict(self) -> dict[str, Tensor]:
        return {"pl_mean": self.pl_mean}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.pl_mean.copy_(state["pl_mean"])

    # What is random about a generated image, drawn in a fixed order from its own generator.

    def labels(self, draws: Draws) -> Tensor:
        """One-hot [n, c_dim], as frequent as in the data."""
        if not self.c_dim:
            return torch.zeros(len(draws), 0, device=draws.device)
        u = draws.uniform().double() * self.class_ends[-1]
        return nn.functional.one_hot(torch.searchsorted(self.class_ends, u, right=True), self.c_dim).float()

    def ws(self, draws: Draws, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(ws [n, num_ws, w_dim] with style mixing, the first latent's w [n, w_dim])."""
        w = self.G.mapping(draws.normal(self.z_dim), labels)
        ws = w[:, None].expand(-1, self.G.num_ws, -1)
        if self.settings.style_mixing > 0:
            second = self.G.mapping(draws.normal(self.z_dim), labels)
            mix, where = draws.uniform(2).unbind(dim=1)
            cutoff = 1 + (where * (self.G.num_ws - 1)).long()  # uniform in 1 .. num_ws - 1
            cutoff = torch.where(mix < self.settings.style_mixing, cutoff, self.G.num_ws)
            layer = torch.arange(self.G.num_ws, device=w.device)
            ws = torch.where((layer[None] < cutoff[:, None])[:, :, None], ws, second[:, None])
        return ws, w

    def fakes(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """(images [n, C, H, W], labels [n, c_dim], w [n, w_dim])."""
        labels = self.labels(draws)
        ws, w = self.ws(draws, labels)
        images = self.G.synthesis(ws, draws.noise_maps(self.G.synthesis.sizes))
        return images, labels, w

    # The phases' losses.

    def g_main(self, batch: Batch) -> Loss:
        """Non-saturating logistic loss."""
        images, labels, w = self.fakes(batch.draws)
        logits = self.D(images, labels)
        report("scores/fake", logits)
        loss = losses.logistic_generator(logits)
        report("loss/G", loss)
        return Loss(loss, {"w": w})

    def update_w_avg(self, means: dict[str, Tensor]) -> None:
        self.G.mapping.update_w_avg(means["w"], self.settings.w_avg_beta)

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
        with torch.no_grad():
            fakes, fake_labels, _ = self.fakes(batch.draws)
        fake_logits = self.D(fakes, fake_labels)
        real_logits = self.D(batch.images, batch.labels)
        report("scores/real", real_logits)
        report("signs/real", real_logits.sign())
        loss = losses.logistic_discriminator_fake(fake_logits) + losses.logistic_discriminator_real(real_logits)
        report("loss/D", loss)
        return Loss(loss)

    def d_r1(self, batch: Batch) -> Loss:
        """R1 on this iteration's reals."""
        images = batch.images.detach().requires_grad_()
        penalty = losses.r1_penalty(images, self.D(images, batch.labels))
        report("loss/r1", penalty)
        return Loss(penalty * (self.r1_gamma / 2) * self.settings.r1_interval)
