"""What every GAN here has: a generator and a discriminator that may grow, an optimizer for each, labels, and what the
discriminator gets to see."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from .. import schedule
from ..augment import AdaptivePipe, Controller, DiffAugment
from ..config import Augment, Run
from ..draws import Draws
from ..networks import build as build_networks
from ..networks.growing import Growing, fade_reals
from ..phases import Batch, Loss, Phase
from ..report import report
from ..schedule import Stage


class Recipe:
    """Networks, phases and optimizers of a GAN, for the stage of the schedule that it is in.

    The loop uses: `networks`, `levels` (how many they have), `averaged` (name of the network that is averaged and
    shown), `discriminator` (name of the one that goes into snapshots beside it), `z_dim`, `c_dim`, the state_dict for
    what is neither network nor optimizer; `enter`, after which `phases` and `optimizers` (by network) are those of a
    stage, `fade`, `at`, `shown`, and `reals`.

    A GAN derives from it: its `make_phases`, and the phases' losses, in which the discriminator judges what is `seen`.
    """

    reals = 1  # sets of as many real images as the batch has, that an iteration takes
    averaged = "G"
    discriminator = "D"
    scores: Literal["logits", "differences", "distances"] = "logits"
    """What the discriminator's outputs are: logits, whose sign is a verdict; numbers of which only differences mean
    something; or distances, whose size means nothing either."""
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
        self.D.frozen = run.freeze_d
        self.networks: dict[str, Growing] = {"G": self.G, "D": self.D}
        self.augmentation = Augmentation(run.augment, device)
        self.levels = self.G.levels
        self.beta2, self.eps = run.recipe.beta2, run.recipe.eps
        self.enter(schedule.stage(run, self.levels, 0), schedule.alpha(run, self.levels, 0))

    def enter(self, stage: Stage, alpha: float = 1.0) -> None:
        """Goes over to a stage, with new optimizers.

        Moments of the stage before would move the parameters by gradients of another loss, so they are forgotten, as in
        the published trainings of Progressive GAN and StyleGAN.
        """
        self.stage, self.lr = stage, stage.lr
        self.fade(alpha)
        self.phases = self.make_phases()
        self.optimizers = {name: self._adam(name) for name in self.networks}

    def fade(self, alpha: float) -> None:
        """Gives the newest level its weight, 0 to 1."""
        self.alpha = alpha
        for network in (self.G, self.D):
            network.grow_to(self.stage.level, alpha)

    def at(self, nimg: int) -> None:
        """Brings what follows from the images shown so far, other than stage and alpha, to where it is at `nimg`."""
        self.augmentation.at(nimg)

    def lr_text(self, lr: float) -> str:
        """The learning rate of a stage, in words."""
        return f"lr {lr:g}"

    def make_phases(self) -> list[Phase]:
        """The phases of `stage`, in their order."""
        raise NotImplementedError

    def d_phase(self, loss: Callable[[Batch], Loss]) -> Phase:
        """The discriminator's phase whose loss gives `signs`: that by which the augmentation is controlled."""
        shapes, batch = {"signs": ()} if self.augmentation.controller else {}, self.stage.batch
        after = (lambda means: self.augmentation.control(means["signs"], batch)) if shapes else None
        return Phase("Dmain", "D", loss, batch, statistics=shapes, after=after)

    def signs(self, real_logits: Tensor) -> dict[str, Tensor]:
        """The statistic of `d_phase`: [n]. It is reported in any case."""
        signs = real_logits.detach().sign().flatten()
        report("signs/real", signs)
        return {"signs": signs} if self.augmentation.controller else {}

    def seen(self, images: Tensor, draws: Draws) -> Tensor:
        """Images [n, C, h, w], real or generated, as the discriminator gets to see them: augmented."""
        return self.augmentation(images, draws)

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
        return self.augmentation.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.augmentation.load_state_dict(state)

    def shown(self, reals: Tensor) -> Tensor:
        """Real images [n, C, h, w] of the stage's size in [-1, 1] as the discriminator gets to see them: while a level
        fades in, they gain their detail with the generated ones."""
        return fade_reals(reals, self.alpha, self.G.upsample_image)

    def labels(self, draws: Draws) -> Tensor:
        """One-hot [n, c_dim], as frequent as in the data."""
        return draws.labels(self.class_ends) if self.c_dim else torch.zeros(len(draws), 0, device=draws.device)


class Augmentation:
    """What the discriminator's images go through, with its probability p."""

    def __init__(self, settings: Augment, device: torch.device) -> None:
        s = self.settings = settings
        self.pipe = {"none": None, "diffaugment": DiffAugment(s.policy)}.get(s.kind, AdaptivePipe(s.pipe))
        adaptive = s.kind == "ada"
        self.controller = Controller(s.p, s.target, s.kimg, s.interval, device) if adaptive else None
        self.fixed = torch.ones([], device=device)

    @property
    def p(self) -> Tensor:
        """Probability of each transform, a scalar."""
        return self.controller.p if self.controller else self.fixed

    def at(self, nimg: int) -> None:
        """Brings a p that follows from the images shown so far to where it is."""
        if self.settings.kind == "fixed":
            self.fixed.fill_(schedule.cosine(0.0, self.settings.p, nimg, self.settings.warmup_kimg * 1000))

    def control(self, sign_mean: Tensor, batch: int) -> None:
        """Takes the mean sign of the scores of a batch of reals."""
        assert self.controller
        self.controller.update(sign_mean, batch)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        if self.pipe is None:
            return images
        report("augment/p", self.p)
        return self.pipe(images, self.p, draws)

    def state_dict(self) -> dict[str, Tensor]:
        """`augment.` and the controller's names."""
        state = self.controller.state_dict() if self.controller else {}
        return {f"augment.{name}": x for name, x in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.controller:
            own = {name.removeprefix("augment."): x for name, x in state.items() if name.startswith("augment.")}
            self.controller.load_state_dict(own)
