"""When things happen and how large they are, as pure functions of `nimg`, the number of images shown so far."""

import math
from typing import NamedTuple

from .config import Run


class Stage(NamedTuple):
    """What stays the same for a while as networks grow. Networks that do not grow have one for ever."""

    level: int
    """The highest of the networks' levels at work; 0 is that of the start size."""
    fading: bool
    """It is being faded in."""
    batch: int
    """Images of a step over all processes."""
    lr: float
    """Learning rate."""

    @property
    def px(self) -> int:
        """Nominal size of the images: 4, 8, 16, ..."""
        return 4 << self.level


def first_level(run: Run, levels: int) -> int:
    """The level that training starts with, of so many. Raises ValueError if there is no such level."""
    level = (run.growth.start or 4 << (levels - 1)).bit_length() - 3
    if level >= levels:
        raise ValueError(
            f"growth.start {run.growth.start} is more than the size of the images, which counts as {4 << (levels - 1)}"
        )
    return level


def stage(run: Run, levels: int, nimg: int) -> Stage:
    """The stage of the iteration that starts at `nimg`, for networks of so many levels.

    Each level is trained for `stabilise_kimg`, while the next one fades in for `fade_kimg` (Karras et al. 2018,
    "Progressive Growing of GANs", section 2 and appendix A).
    """
    level, _, fading = _where(run, levels, nimg)
    level += fading
    return Stage(level, fading, *_sizes(run, 4 << level))


def alpha(run: Run, levels: int, nimg: int) -> float:
    """Weight of the newest level in the iteration that starts at `nimg`: it rises linearly from 0 to 1 while fading."""
    _, shown, fading = _where(run, levels, nimg)
    stabilise, fade = _lengths(run)
    return (shown - stabilise) / fade if fading else 1.0


def stages(run: Run, levels: int, nimg: int) -> list[tuple[int, Stage]]:
    """(`nimg` of its first iteration, stage) of the stage at `nimg` and of all that follow."""
    out = [(nimg, stage(run, levels, nimg))]
    while (end := _end(run, levels, nimg)) is not None:
        batch = out[-1][1].batch
        nimg += math.ceil((end - nimg) / batch) * batch
        out.append((nimg, stage(run, levels, nimg)))
    return out


def _lengths(run: Run) -> tuple[int, int]:
    return round(run.growth.stabilise_kimg * 1000), round(run.growth.fade_kimg * 1000)


def _where(run: Run, levels: int, nimg: int) -> tuple[int, int, bool]:
    """(highest level that is whole, images shown since it is, whether the next one is being faded in)."""
    level, (stabilise, fade) = first_level(run, levels), _lengths(run)
    grown = min(nimg // (stabilise + fade), levels - 1 - level) if level < levels - 1 else 0
    shown = nimg - grown * (stabilise + fade)
    return level + grown, shown, level + grown < levels - 1 and shown > stabilise


def _end(run: Run, levels: int, nimg: int) -> int | None:
    """The first `nimg` that is not in the same stage; None if there is none."""
    level, shown, fading = _where(run, levels, nimg)
    stabilise, fade = _lengths(run)
    if level == levels - 1:
        return None
    return nimg - shown + (stabilise + 1 if fade and not fading else stabilise + fade)


def _sizes(run: Run, px: int) -> tuple[int, float]:
    """(batch, learning rate) at a size."""
    batch, lr = published(run.growth.gpus, px) if run.growth.gpus else (run.batch, run.recipe.lr)
    return dict(run.growth.batch).get(px, batch), dict(run.growth.lr).get(px, lr)


def published(gpus: int, px: int) -> tuple[int, float]:
    """(batch, learning rate) at a size, as published with Progressive GAN and StyleGAN for 1, 2, 4 and 8 GPUs.

    Both rules give those tables exactly. They go on beyond them: at least 4 images a GPU, and where that makes batches
    larger than with 8 GPUs, a learning rate that grows as the square root of the batch does (Malladi et al. 2022, "On
    the SDEs and Scaling Rules for Adaptive Gradient Algorithms"). Nobody has published results of that part.
    """
    batch = max(4 * gpus, min(2048 // px, 128 * gpus))
    doublings = min(max((px * min(gpus, 8) // 512).bit_length() - 1, 0), 3)
    lr = (0.001, 0.0015, 0.002, 0.003)[doublings]
    return batch, lr if gpus <= 8 else lr * math.sqrt(batch / published(8, px)[0])


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` images lies in (before, after]; never where `every` is 0."""
    return every > 0 and before // every != after // every


def due(nimg: int, batch: int, interval: int) -> bool:
    """Whether a phase that runs every `interval` iterations runs in the one that starts at `nimg`."""
    return (nimg // batch) % interval == 0


def ema_beta(
    nimg: int, batch: int, half_life: float, ramp: float | None, decay: float | None = None, warmup: float = 0.0
) -> float:
    """Decay of the generator's average over one batch.

    Args:
        half_life: images after which a weight's influence has halved.
        ramp: limits the half-life to this fraction of the images shown so far, so that the first, poor weights are
            forgotten early (Karras et al. 2020, StyleGAN2-ADA, appendix B); None: no limit.
        decay: not None: what it keeps of itself, whatever the batch.
        warmup: images over which the half-life rises from 0, along half a cosine.

    Returns:
        0 to 1: what the average keeps of itself.
    """
    if decay is not None:
        return decay
    half_life = cosine(0.0, half_life, nimg, warmup)
    if ramp is not None:
        half_life = min(half_life, nimg * ramp)
    return 0.5 ** (batch / max(half_life, 1e-8))


def cosine(start: float, end: float, nimg: int, over: float) -> float:
    """From `start` to `end` along half a cosine over the first `over` images (Huang et al. 2024, "The GAN is dead; long
    live the GAN!", appendix); `end` after them."""
    if nimg >= over:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * nimg / over)) / 2


def lazy(lr: float, beta2: float, intervals: list[int]) -> tuple[float, float]:
    """(learning rate, beta2) of an optimizer whose network also has a phase that runs only every k-th iteration.

    With c = k / (k + 1), lr * c and beta2 ** c keep the total step of k + 1 updates that of k
    (Karras et al. 2020, StyleGAN2, appendix B, "Lazy regularization"). (beta1 is 0 there; 0 ** c is 0.)
    """
    for k in intervals:
        if k > 1:
            c = k / (k + 1)
            lr, beta2 = lr * c, beta2**c
    return lr, beta2
