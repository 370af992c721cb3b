"""When things happen and how large they are, as pure functions of `nimg`, the number of images shown so far."""


def crossed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` images lies in (before, after]; never where `every` is 0."""
    return every > 0 and before // every != after // every


def due(nimg: int, batch: int, interval: int) -> bool:
    """Whether a phase that runs every `interval` iterations runs in the one that starts at `nimg`."""
    return (nimg // batch) % interval == 0


def ema_beta(nimg: int, batch: int, half_life: float, ramp: float | None) -> float:
    """Decay of the generator's average over one batch.

    Args:
        half_life: images after which a weight's influence has halved.
        ramp: limits the half-life to this fraction of the images shown so far, so that the first, poor weights are
            forgotten early (Karras et al. 2020, StyleGAN2-ADA, appendix B); None: no limit.

    Returns:
        0 to 1: what the average keeps of itself.
    """
    if ramp is not None:
        half_life = min(half_life, nimg * ramp)
    return 0.5 ** (batch / max(half_life, 1e-8))


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
