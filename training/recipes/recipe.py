"""What every GAN here has: a generator and a discriminator that may grow, an optimizer for each, and labels."""

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from .. import schedule
from ..config import Run
from ..draws import Draws
from ..networks import build as build_networks
from ..networks.growing import Growing, fade_reals
from ..phases import Phase
from ..schedule import Stage


class Recipe:
    """Networks, phases and optimizers of a GAN, for the stage of the schedule that it is in.

    The loop uses: `networks`, `levels` (how many they have), `averaged` (name of the network that is averaged and
    shown), `discriminator` (name of the one that goes into snapshots beside it), `z_dim`, `c_dim`, the state_dict for
    what is neither network nor optimizer; `enter`, after which `phases` and `optimizers` (by network) are those of a
    stage, `fade`, and `shown`.

    A GAN derives from it: its `make_phases`, and the phases' losses.
    """

    averaged = "G"
    discriminator = "D"
    penalty = "recipe.r1_gamma"  # the field that weighs what keeps the discriminator smooth

    def __init__(
        self, run: Run, width: int, height: int, img_channels: int, class_counts: list[int], device: torch.device
    ) -> None:
        """Begins in the schedule's first stage.

        Args:
            width, height: of the data set's images, in px, the largest that the networks are to draw.
            img_channels: 1, 3 or 4.
            class_counts: images of each class; empty without labels.
        """
        self.c_dim, self.z_dim = len(class_counts), run.network.z_dim
        self.class_ends = torch.tensor(class_counts, dtype=torch.float64, device=device).cumsum(0)
        G, D = build_networks(run, width, height, img_channels, self.c_dim)
        self.G, self.D = G.to(device), D.to(device)
        self.networks: dict[str, Growing] = {"G": self.G, "D": self.D}
        self.levels = self.G.levels
        self.beta2, self.eps = run.recipe.beta2, run.recipe.eps
        self.enter(schedule.stage(run, self.levels, 0), schedule.alpha(run, self.levels, 0))

    def enter(self, stage: Stage, alpha: float = 1.0) -> None:
        """Goes over to a stage, with new optimizers.

        Moments of the stage before would move the parameters by gradients of another loss, so they are forgotten, as in
        the published trainings of Progressive GAN and StyleGAN.
        """
        self.stage = stage
        self.fade(alpha)
        self.phases = self.make_phases()
        self.optimizers = {name: self._adam(name) for name in self.networks}

    def fade(self, alpha: float) -> None:
        """Gives the newest level its weight, 0 to 1."""
        self.alpha = alpha
        for network in (self.G, self.D):
            network.grow_to(self.stage.level, alpha)

    def make_phases(self) -> list[Phase]:
        """The phases of `stage`, in their order."""
        raise NotImplementedError

    @property
    def r1_gamma(self) -> float:
        """Weight of the R1 penalty in `stage`; 0 without."""
        raise NotImplementedError

    def _adam(self, name: str) -> Optimizer:
        """Of the parameters that are at work."""
        intervals = [phase.interval for phase in self.phases if phase.trains == name]
        lr, beta2 = schedule.lazy(self.stage.lr, self.beta2, intervals)
        parameters = [p for _, p in self.networks[name].active()]
        return Adam(parameters, lr=lr, betas=(0.0, beta2), eps=self.eps, fused=True)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass

    def shown(self, reals: Tensor) -> Tensor:
        """Real images [n, C, h, w] of the stage's size in [-1, 1] as the discriminator gets to see them: while a level
        fades in, they gain their detail with the generated ones."""
        return fade_reals(reals, self.alpha, self.G.upsample_image)

    def labels(self, draws: Draws) -> Tensor:
        """One-hot [n, c_dim], as frequent as in the data."""
        if not self.c_dim:
            return torch.zeros(len(draws), 0, device=draws.device)
        u = draws.uniform().double() * self.class_ends[-1]
        return nn.functional.one_hot(torch.searchsorted(self.class_ends, u, right=True), self.c_dim).float()
