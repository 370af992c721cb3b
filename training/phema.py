"""Averages after the fact: power-function averages that are tracked while training, and any other width made of them.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), sections 3.1 and 3.2 and
appendix C. Equations are numbered as there.

At time T, counted in images, such an average is the integral over the weights theta(t) so far, each with the weight

    p(t) = (gamma + 1) / T * (t / T)^gamma,    0 <= t <= T                                                   (eq. 121)

whose standard deviation is always the same share of T, the relative width sigma_rel. A run keeps the averages of a few
widths in every snapshot. Their profiles at all snapshots are a basis in which the profile of any width is fitted, and
the same combination of the stored averages is that width's average.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

WIDEST = 12**-0.5  # of a uniform average, gamma = 0


def name(sigma_rel: float) -> str:
    """What the average of a relative width is called in folders, such as phema-0.050."""
    return f"phema-{sigma_rel:.3f}"


def sigma_of(gamma: float) -> float:
    """Relative width of the power function with the exponent `gamma`, which is more than -1 (eq. 123)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


@functools.cache
def gamma_of(sigma_rel: float) -> float:
    """Exponent, above 0, of the power function of a relative width: `sigma_of` solved for gamma (eq. 126, algorithm 2).

    Raises ValueError if there is none.
    """
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(
            f"a relative width lies between 0 and {WIDEST:.3f}, that of a uniform average, not {sigma_rel:g}"
        )
    # (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2. Its largest root is the one above 0.
    k = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - k, 12.0 - k]).real.max())


def beta(sigma_rel: float, nimg_end: int, batch: int) -> float:
    """What the average keeps of itself in a step of `batch` images that ends at `nimg_end` (eq. 127).

    It is 0 in the first step, so that nothing remains of what the average began as, and exact for steps of any sizes:
    weights that stay the same from one step to the next get the integral of p over the time between.
    """
    assert 0 < batch <= nimg_end, (batch, nimg_end)
    return (1 - batch / nimg_end) ** (gamma_of(sigma_rel) + 1)


def inner_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integrals over time of the products of profiles, fp64 [n, m] (eq. 151).

    With the smaller of the two times s, the larger t, and that one's exponent g, such an integral is

        (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) * (s / t)^g / t.

    Args:
        a, b: fp64 [n, 2] and [m, 2]: each profile's gamma and time.
    """
    (gamma_a, time_a), (gamma_b, time_b) = a.T[:, :, None], b.T[:, None, :]
    first, last = np.minimum(time_a, time_b), np.maximum(time_a, time_b)
    gamma_last = np.where(time_a < time_b, gamma_b, gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (first / last) ** gamma_last / last


def coefficients(have: Sequence[tuple[float, int]], want: tuple[float, int]) -> tuple[np.ndarray, float]:
    """The combination of stored averages that comes nearest to the average of another width, or at another time.

    Its profile is the least-squares fit to the wanted one (section 3.2, algorithm 3) among those whose weights add up
    to 1. (The published solution is scaled to that afterwards; as a condition it costs less of the fit.)

    Args:
        have: (sigma_rel, nimg) of each stored average, at least one, nimg above 0; those after `want` are of no use.
        want: (sigma_rel, nimg).

    Returns:
        (weights fp64 [n] in the order of `have`, error of the fitted profile relative to the wanted one, both as norms
        over time). Of an average that is stored, weight 1 and error 0.

    Raises ValueError if a width is not one.
    """
    assert have
    assert all(nimg > 0 for _, nimg in (*have, want))
    sigma_rel, now = want
    target = np.array([[gamma_of(sigma_rel), 1.0]])  # with the wanted time as the unit, all numbers are about 1
    if want in have:
        return np.eye(len(have))[have.index(want)], 0.0
    basis = np.array([[gamma_of(width), nimg / now] for width, nimg in have])
    gram, its, whole = inner_products(basis, basis), inner_products(basis, target)[:, 0], inner_products(target, target)
    # Profiles of norm 1. (It also makes small what `lstsq` leaves out where two snapshots are next to each other.)
    norms = np.sqrt(np.diag(gram))
    system = np.zeros([len(have) + 1, len(have) + 1])
    system[:-1, :-1] = gram / np.outer(norms, norms)
    system[-1, :-1] = system[:-1, -1] = 1 / norms  # the condition, and its Lagrange multiplier
    solution = np.linalg.lstsq(system, np.append(its / norms, 1.0), rcond=1e-13)[0]
    weights = solution[:-1] / norms
    weights /= weights.sum()
    square = weights @ gram @ weights - 2 * weights @ its + whole[0, 0]
    return weights, math.sqrt(max(square, 0.0) / whole[0, 0])
