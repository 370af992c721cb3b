"""Which latents make the image most like a given one: Karras et al. 2020, "Analyzing and Improving the Image Quality of
StyleGAN", appendix D ("the paper" here).

    projection = Projection(generator, embedding, targets, positions, Plan())
    for _ in range(projection.plan.steps):
        distances = projection.step()
    ws, images = projection.ws(), projection.images()
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draws
from .networks.growing import Generator, Noise
from .networks.layers import normalize_2nd_moment
from .perceptual import Embedding, distances

SAMPLES = 10_000  # of z, for the mean and the spread of w
CANDIDATES = 256  # images of which the most similar one is where a projection into z begins


@dataclass(frozen=True)
class Plan:
    """How to search; the defaults are the paper's."""

    space: Literal["w", "w+", "z"] = "w"
    """One w for all layers; one for each; or z: the only one without a w."""
    steps: int = 1000
    seed: int = 0
    noise: Literal["optimise", "const", "none"] = "optimise"
    """The noise maps: found together with the latent, those stored in the network, or none."""
    rate: float = 0.1
    """Of Adam at its highest; see `learning_rate`."""
    jitter: float = 0.05
    """Of the latent at the beginning, in units of its spread; see `jitter`."""
    regularise: float = 1e5
    """Weight of the noise maps' `autocorrelation`."""


def learning_rate(t: float) -> float:
    """As a fraction of the highest, at the fraction t of all steps: rises linearly over the first 5%, falls as half a
    cosine over the last 25%."""
    fall = min(1.0, (1 - t) / 0.25)
    return min(1.0, t / 0.05) * (0.5 - 0.5 * math.cos(math.pi * fall))


def jitter(t: float) -> float:
    """As a fraction of that at the beginning, at the fraction t of all steps: falls as a square to 0 at 75%."""
    return max(0.0, 1 - t / 0.75) ** 2


def autocorrelation(maps: Sequence[Tensor]) -> Tensor:
    """The paper's regularisation of noise maps [N, 1, H, W]: [N].

    For each map and its reductions down to 8 px, the squared mean product of neighbours across and down, borders
    wrapped around. A reduction halves the size by means of 2x2, times 2, so that white noise keeps its variance.
    """
    total = torch.zeros(len(maps[0]), device=maps[0].device, dtype=maps[0].dtype)
    for x in maps:
        while True:
            for dim in (2, 3):
                total = total + (x * x.roll(1, dims=dim)).mean(dim=[1, 2, 3]).square()
            if min(x.shape[2:]) <= 8:
                break
            x = F.avg_pool2d(x, 2) * 2
    return total


@torch.no_grad()
def normalise(maps: Sequence[Tensor]) -> None:
    """Gives each noise map [N, 1, H, W] of each image zero mean and unit variance, in place."""
    for x in maps:
        x -= x.mean(dim=[1, 2, 3], keepdim=True)
        x *= (x.square().mean(dim=[1, 2, 3], keepdim=True) + 1e-12).rsqrt()


@torch.no_grad()
def statistics(G: Generator, seed: int, class_: int | None = None, samples: int = SAMPLES) -> tuple[Tensor, float]:
    """(mean [w_dim], spread: root of the mean squared distance from it) of w.

    class_: of a conditional generator; None takes its classes in turn.
    """
    device = next(G.parameters()).device
    total = torch.zeros(G.mapping.w_dim, dtype=torch.float64, device=device)
    squares = 0.0
    draws = Draws(seed, "projection statistics", [0])
    for start in range(0, samples, 1000):
        numbers = range(start, min(start + 1000, samples))
        z = draws.normal(len(numbers), G.z_dim)[0].to(device)
        w = G.mapping(z, labels(G, numbers if class_ is None else [class_] * len(numbers))).double()
        total += w.sum(dim=0)
        squares += w.square().sum().item()
    mean = total / samples
    return mean.float(), math.sqrt(max(squares / samples - mean.square().sum().item(), 0))


def labels(G: Generator, numbers: Sequence[int]) -> Tensor | None:
    """One-hot [N, c_dim] of the numbers modulo the classes; None without classes."""
    if not G.c_dim:
        return None
    device = next(G.parameters()).device
    return F.one_hot(torch.tensor([number % G.c_dim for number in numbers], device=device), G.c_dim).float()


class Projection:
    """The search for some images at once, each for itself.

    Args:
        G: whose parameters take no gradients.
        embed: by which images are compared.
        targets: fp32 [N, C, H, W] in [-1, 1], of the generator's size.
        positions: a number for each, from which what is random about it follows.
        class_: of a conditional generator; None: in w any, in z that of the most similar candidate.

    Attributes:
        centre, spread: of the latents, as by `statistics`.
        maps: noise maps, one [N, 1, H, W] a layer.
        done: steps.
    """

    def __init__(
        self,
        G: Generator,
        embed: Embedding,
        targets: Tensor,
        positions: Sequence[int],
        plan: Plan,
        class_: int | None = None,
    ) -> None:
        assert targets.shape[2:] == G.size
        assert G.has_w or plan.space == "z"
        self.G, self.embed, self.plan, self.done = G, embed, plan, 0
        device = targets.device
        with torch.no_grad():
            self.target = embed(targets)
        self.draws = Draws(plan.seed, "projection", positions)
        if plan.space == "z":
            self.centre, self.spread = torch.zeros(G.z_dim, device=device), math.sqrt(G.z_dim)
            latent, self.c = self._nearest(class_)
        else:
            self.centre, self.spread = statistics(G, plan.seed, class_)
            layers = G.num_ws if plan.space == "w+" else 1
            latent, self.c = self.centre.repeat(len(targets), layers, 1), None
        self.latent = latent.requires_grad_()
        self.maps: list[Tensor] = []
        if plan.noise == "optimise" and G.synthesis.sizes:
            self.maps = [x.to(device) for x in self.draws.noise_maps(G.synthesis.sizes)]
            normalise(self.maps)
            self.maps = [x.requires_grad_() for x in self.maps]
        self.optimizer = torch.optim.Adam([self.latent, *self.maps], betas=(0.9, 0.999), eps=1e-8)

    @torch.no_grad()
    def _nearest(self, class_: int | None) -> tuple[Tensor, Tensor | None]:
        """(z [N, 1, z_dim], labels [N, c_dim]) of the candidate most like each target: there is no z in the middle."""
        numbers = range(CANDIDATES)
        z = Draws(self.plan.seed, "projection candidates", [0]).normal(CANDIDATES, self.G.z_dim)[0]
        z = normalize_2nd_moment(z.to(self.target.device))
        c = labels(self.G, numbers if class_ is None else [class_] * CANDIDATES)
        found = []
        for some in torch.arange(CANDIDATES, device=z.device).split(16):
            y = self.embed(self.G.synthesis(self._spread(z[some], None if c is None else c[some]), self._noise()))
            found.append(torch.stack([distances(y, target[None]) for target in self.target]))
        best = torch.cat(found, dim=1).argmin(dim=1)
        return z[best, None], None if c is None else c[best]

    def _spread(self, z: Tensor, c: Tensor | None) -> Tensor:
        return self.G.mapping(z, c)[:, None].expand(-1, self.G.num_ws, -1)

    def _noise(self) -> Noise:
        return "const" if self.plan.noise == "optimise" else self.plan.noise

    def _ws(self, latent: Tensor) -> Tensor:
        if self.plan.space == "z":
            return self._spread(latent[:, 0], self.c)
        return latent.expand(-1, self.G.num_ws, -1)

    def step(self) -> Tensor:
        """One step of Adam; the distances [N] before it, with the jitter."""
        t = (self.done + 0.5) / self.plan.steps
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * learning_rate(t)
        scale = self.plan.jitter * self.spread * jitter(t)
        latent = self.latent + scale * self.draws.normal(*self.latent.shape[1:]).to(self.latent.device)
        images = self.G.synthesis(self._ws(latent), self.maps or self._noise())
        found = distances(self.embed(images), self.target)
        loss = found.sum()  # not the mean: no image's gradients depend on how many there are
        if self.maps:
            loss = loss + self.plan.regularise * autocorrelation(self.maps).sum()
        self.optimizer.zero_grad()
        loss.backward(inputs=[self.latent, *self.maps])
        self.optimizer.step()
        normalise(self.maps)
        if self.plan.space == "z":  # stays where nearly all z lie, which is also where a scale-free mapping puts it
            with torch.no_grad():
                self.latent.copy_(normalize_2nd_moment(self.latent.transpose(1, 2)).transpose(1, 2))
        return found.detach()

    @torch.no_grad()
    def ws(self) -> Tensor:
        """[N, num_ws, w_dim] found so far."""
        return self._ws(self.latent).clone()

    @torch.no_grad()
    def images(self) -> Tensor:
        """fp32 [N, C, H, W] found so far."""
        return self.G.synthesis(self.ws(), self.maps or self._noise())

    @torch.no_grad()
    def distances(self) -> Tensor:
        """[N], of the images found so far, as `embed` sees them."""
        return distances(self.embed(self.images()), self.target)

    @torch.no_grad()
    def offsets(self) -> Tensor:
        """How far each latent is from the centre, in units of the spread; of w+, root mean square over the layers: [N].
        About 1 is usual for an image that the generator would draw by itself."""
        return (self.latent - self.centre).square().sum(dim=2).mean(dim=1).sqrt() / self.spread
