"""Sets of features -> how far they are from each other, and how good and how varied what they came from is.

Features are fp32 [n, D], a row an image. Everything is a function of the sets: in which order the images came does not
matter but for `kid` and `inception_score`, which take subsets.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

ROWS = 1024  # of features at a time: in fp64, and of a matrix of distances to all others
SUBSETS, SUBSET = 100, 1000  # of `kid`: how many, of how many images


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean fp64 [D], covariance fp64 [D, D], unbiased) of features [n, D].

    Raises:
        ValueError: fewer than 2 images.
    """
    n, width = features.shape
    if n < 2:
        raise ValueError(f"fid needs at least 2 images on either side, not {n}")
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros([width, width])
    for start in range(0, n, ROWS):
        centred = features[start : start + ROWS] - mean
        covariance += centred.T @ centred
    return mean, covariance / (n - 1)


def frechet(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The squared Fréchet distance of two normal distributions, which for Inception features is the FID (Heusel et al.
    2017, equation 6): |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The trace of the root is the sum of the singular values of A1^T A2, where S = A A^T: neither roots of rounding
    errors (of which a covariance of fewer images than features is full) nor imaginary parts come up.

    Args:
        mu1, mu2: fp64 [D]; sigma1, sigma2: fp64 [D, D], symmetric and positive semi-definite.
    """
    root = np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum()
    difference = mu1 - mu2
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


def _factor(sigma: np.ndarray) -> np.ndarray:
    """A, fp64 [D, rank], with A A^T = sigma."""
    values, vectors = np.linalg.eigh(sigma)
    # What is below is the rounding error of a zero.
    there = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, there] * np.sqrt(values[there])


def kid(reals: np.ndarray, fakes: np.ndarray, seed: int = 0) -> float:
    """The Kernel Inception Distance: the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, the mean of
    its unbiased estimates from 100 random subsets of up to 1000 (Bińkowski et al. 2018, "Demystifying MMD GANs",
    section 4).

    The same number as clean-fid's `kernel_distance(reals, fakes)` after `numpy.random.seed(seed)`; NumPy's own
    generator is left alone. It may be below 0.

    Raises:
        ValueError: fewer than 2 images on a side.
    """
    size = min(len(reals), len(fakes), SUBSET)
    if size < 2:
        raise ValueError(f"kid needs at least 2 images on either side, not {size}")
    draws = np.random.RandomState(seed)
    total = 0.0
    for _ in range(SUBSETS):
        x = fakes[draws.choice(len(fakes), size, replace=False)]
        y = reals[draws.choice(len(reals), size, replace=False)]
        within = _kernel(x, x) + _kernel(y, y)
        total += (within.sum() - np.trace(within)) / (size - 1) - 2 * _kernel(x, y).sum() / size
    return float(total / SUBSETS / size)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """(mean, standard deviation) over parts of the images of exp(E[KL(p(y|x) || p(y))]) (Salimans et al. 2016,
    "Improved techniques for training GANs", section 4).

    Args:
        probabilities: fp64 [n, classes], each row the classifier's for an image.
        splits: parts, of images that follow one another.

    Raises:
        ValueError: fewer images than parts.
    """
    if len(probabilities) < splits:
        raise ValueError(f"is takes {splits} parts of the images, so it needs as many, not {len(probabilities)}")
    ends = [i * len(probabilities) // splits for i in range(splits + 1)]
    scores = []
    for start, end in itertools.pairwise(ends):
        p = torch.from_numpy(probabilities[start:end])
        marginal = p.mean(dim=0)
        divergence = torch.xlogy(p, p) - torch.xlogy(p, marginal)  # 0 where p is, also where no image has the class
        scores.append(float(divergence.sum(dim=1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    reals: np.ndarray, fakes: np.ndarray, k: int = 3, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """(precision, recall): the share of generated images within the reals' manifold, and of reals within that of the
    generated ones. A set's manifold are the balls around its images that reach to their k-th nearest neighbours
    (Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing generative models", equations 1 and
    2; there on features of VGG-16).

    Takes memory by the image, not by the pair: 1024 rows of distances at a time.

    Args:
        reals, fakes: fp32 [n, D] and [m, D].
        device: where the distances are calculated.

    Raises:
        ValueError: a side has no k neighbours for an image.
    """
    if min(len(reals), len(fakes)) <= k:
        raise ValueError(f"pr needs more than {k} images on either side, not {len(reals)} and {len(fakes)}")
    # Around their mean, as distances are differences of squares, of which fp32 keeps seven digits.
    middle = (reals.mean(axis=0, dtype=np.float64) + fakes.mean(axis=0, dtype=np.float64)) / 2
    a, b = (torch.from_numpy((x - middle).astype(np.float32)).to(device) for x in (reals, fakes))
    reach_a, reach_b = _reach(a, k), _reach(b, k)
    inside_b = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    recalled = 0
    for rows, reach in zip(a.split(ROWS), reach_a.split(ROWS), strict=True):
        distances = _squared_distances(rows, b)
        inside_b |= (distances <= reach[:, None]).any(dim=0)
        recalled += int((distances <= reach_b).any(dim=1).sum())
    return int(inside_b.sum()) / len(b), recalled / len(a)


def _reach(x: Tensor, k: int) -> Tensor:
    """fp32 [n]: of each row of [n, D], the squared distance to its k-th nearest other one."""
    # The nearest of all is the row itself.
    return torch.cat([_squared_distances(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(ROWS)])


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[n, D] and [m, D] -> [n, m]."""
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return squares.sub_(x @ y.T, alpha=2).clamp_(min=0)
