"""How far generated images are from real ones, measured without a network: the sliced Wasserstein distance between
patches of their Laplacian pyramids (Karras et al. 2018, "Progressive Growing of GANs", section 5).

    reals, fakes = Descriptors(), Descriptors()
    reals.add(images, indices)  # as many calls as memory asks for, in any order; `merge` joins those of other processes
    distance(reals, fakes)  # {"swd/32": ..., "swd/16": ..., "swd/mean": ...}
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COARSEST = 16  # px: no level of a pyramid has a shorter side below it
PATCH = 7  # px
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
FLAT = 0.01  # grey levels: a channel that varies less is constant, and what is left of it are rounding errors
CHUNK = 4  # images whose pyramids are held at a time
SLICES = 64  # projections that are held at a time


class Descriptors:
    """Patches from every level of the Laplacian pyramids of a set of images.

    Where they are cut follows from (seed, level, index of the image) alone. So neither the order of the images nor
    their split over calls and processes changes anything.

    Args:
        seed: 0 to 2**64 - 1.
        patches: from each level of each image, 1 or more; 128 in the paper. At 7x7x3 and fp32, 128 take 75 KB.
    """

    def __init__(self, seed: int = 0, patches: int = 128) -> None:
        if patches < 1:
            raise ValueError(f"patches is at least 1, not {patches}")
        self.seed, self.patches = seed, patches
        self.shape: tuple[int, ...] | None = None  # (C, H, W) of the images
        # Index of an image -> for each level, finest first: fp32 [patches, C * D].
        self.of: dict[int, list[Tensor]] = {}

    def __len__(self) -> int:
        """Images so far."""
        return len(self.of)

    @torch.no_grad()
    def add(self, images: Tensor, indices: Sequence[int]) -> None:
        """Adds images; one of an index that is there already takes its place.

        Args:
            images: uint8 in 0 to 255 or fp in [-1, 1], [N, C, H, W], on any device. All of a set have one shape.
            indices: N numbers, 0 or more: which images of the set these are.

        Raises:
            ValueError: for another shape, another number of indices, or images of integers that are not uint8.
        """
        if images.ndim != 4 or len(images) != len(indices):
            raise ValueError(f"{len(indices)} indices for images of shape {list(images.shape)}: give [N, C, H, W]")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images are uint8 or floating point, not {images.dtype}")
        self._set_shape(tuple(images.shape[1:]))
        for start in range(0, len(images), CHUNK):
            some = indices[start : start + CHUNK]
            levels = [
                cut_patches(x, self._positions(level, some, x)).flatten(2).cpu()
                for level, x in enumerate(laplacian_pyramid(_grey_levels(images[start : start + CHUNK])))
            ]
            # Copies, as a view that is sent to another process takes all of its memory along.
            self.of |= {index: [x[i].clone() for x in levels] for i, index in enumerate(some)}

    def merge(self, other: "Descriptors") -> None:
        """Adds the images of `other`. Raises ValueError if they were cut with other settings or have another shape."""
        _check_same_settings(self, other)
        if other.shape:
            self._set_shape(other.shape)
        self.of |= other.of

    def levels(self) -> Iterator[Tensor]:
        """For each level, finest first: fp32 [N * patches, C, D], by the index of the image; D are a patch's pixels."""
        rows = [self.of[index] for index in sorted(self.of)]
        channels = self.shape[0] if self.shape else 0
        for level in zip(*rows, strict=True):
            yield torch.cat(level).unflatten(1, (channels, -1))

    def _set_shape(self, shape: tuple[int, ...]) -> None:
        if self.shape not in (None, shape):
            raise ValueError(f"images (C, H, W) = {shape} do not go with those of {self.shape}")
        self.shape = shape

    def _positions(self, level: int, indices: Sequence[int], x: Tensor) -> Tensor:
        """int64 [N, patches, 2]: top rows and left columns, uniform over all places, with repetition."""
        places = np.array([side - min(side, PATCH) + 1 for side in x.shape[2:]], dtype=np.uint64)
        words = [
            np.random.Philox(key=[self.seed, level], counter=[0, 0, index, 0]).random_raw(self.patches * 2)
            for index in indices
        ]
        # Of 64 random bits, what the remainder prefers is below 2**-50.
        positions = np.stack(words).reshape(len(indices), self.patches, 2) % places
        return torch.from_numpy(positions.astype(np.int64)).to(x.device)


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """(Burt & Adelson 1983, "The Laplacian pyramid as a compact image code".)

    Args:
        images: fp [N, C, H, W].

    Returns:
        Finest level first, each half the size of the one before (rounded up), as long as no side falls below 16 px: the
        difference to the next coarser level enlarged; last, the coarsest image itself. An image with a side below 32 px
        is its only level.
    """
    levels = []
    while min(images.shape[2:]) >= COARSEST * 2:
        coarse = _blur(images)[:, :, ::2, ::2]
        levels.append(images - _enlarge(coarse, images))
        images = coarse
    return [*levels, images]


def cut_patches(images: Tensor, positions: Tensor) -> Tensor:
    """Patches of 7x7 px; where the image is smaller than that, as high or wide as it is.

    Args:
        images: [N, C, H, W].
        positions: int64 [N, P, 2], top rows and left columns.

    Returns:
        [N, P, C, h, w].
    """
    h, w = (min(side, PATCH) for side in images.shape[2:])
    windows = images.unfold(2, h, 1).unfold(3, w, 1)  # [N, C, H - h + 1, W - w + 1, h, w], a view
    each = torch.arange(len(images), device=images.device)[:, None]
    return windows[each, :, positions[..., 0], positions[..., 1]]


@torch.no_grad()
def distance(
    reals: Descriptors, fakes: Descriptors, projections: int = 512, normalise_by: Literal["each", "reals"] = "each"
) -> dict[str, float]:
    """The sliced Wasserstein distance of two sets of as many images, times 1000 as in the paper.

    Per level, each channel is brought to mean 0 and standard deviation 1 over a set; then the distance is the mean over
    random directions of the one-dimensional Wasserstein distance of the projected patches (Rabin et al. 2011). It falls
    with the number of images, even between sets of equal distribution: compare only what was measured with the same
    number.

    Args:
        reals, fakes: of the same seed, patches, number and shape of images.
        projections: random directions, 1 or more; drawn from the seed of the descriptors.
        normalise_by: `each` set by its own mean and deviation, as in the paper: symmetric, but blind to a cast of
            colour, and to too much or too little contrast or detail, of a whole set; or both by those of the `reals`,
            which sees them.

    Returns:
        `swd/SIDE` for every level, SIDE being its shorter side in px, and their mean `swd/mean`; NaN if a patch is.

    Raises:
        ValueError: if the sets do not compare, or are empty.
    """
    _check_same_settings(reals, fakes)
    if reals.shape != fakes.shape or len(reals) != len(fakes) or not len(reals):
        raise ValueError(
            f"{len(reals)} images (C, H, W) = {reals.shape} do not compare with {len(fakes)} of {fakes.shape}"
        )
    if projections < 1:
        raise ValueError(f"projections is at least 1, not {projections}")
    generator = torch.Generator().manual_seed(reals.seed)
    assert reals.shape
    side = min(reals.shape[1:])
    out = {}
    for a, b in zip(reals.levels(), fakes.levels(), strict=True):
        directions = torch.randn(projections, a.shape[1] * a.shape[2], generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        moments = _channel_moments(a)
        x = _normalised(a, *moments)
        y = _normalised(b, *(moments if normalise_by == "reals" else _channel_moments(b)))
        out[f"swd/{side}"] = 1000 * _sliced_distance(x, y, directions)
        side = (side + 1) // 2
    return {**out, "swd/mean": sum(out.values()) / len(out)}


def swd(
    reals: Tensor,
    fakes: Tensor,
    *,
    patches: int = 128,
    projections: int = 512,
    seed: int = 0,
    normalise_by: Literal["each", "reals"] = "each",
) -> dict[str, float]:
    """`distance` of two sets that fit into memory: uint8 in 0 to 255 or fp in [-1, 1], [N, C, H, W]."""
    a, b = Descriptors(seed, patches), Descriptors(seed, patches)
    a.add(reals, range(len(reals)))
    b.add(fakes, range(len(fakes)))
    return distance(a, b, projections, normalise_by)


def _grey_levels(images: Tensor) -> Tensor:
    """fp32 in 0 to 255 (neither rounded nor clamped), of uint8 or of fp in [-1, 1]."""
    return images.float() if images.dtype == torch.uint8 else images.float() * 127.5 + 127.5


def _blur(x: Tensor) -> Tensor:
    """Binomial filter of 5x5, mirrored at the borders: [N, C, H, W] -> the same.

    By sums of shifted images, as convolutions may round differently for batches of different sizes.
    """
    x = F.pad(x, [2, 2, 2, 2], mode="reflect")
    for dim in (3, 2):
        x = _weighted_sum([x.narrow(dim, k, x.shape[dim] - 4) for k in range(5)])
    return x


def _weighted_sum(shifted: Sequence[Tensor]) -> Tensor:
    out = shifted[0] * BINOMIAL[0]
    for x, weight in zip(shifted[1:], BINOMIAL[1:], strict=True):
        out.add_(x, alpha=weight)
    return out


def _enlarge(coarse: Tensor, like: Tensor) -> Tensor:
    """To the size of `like`, about twice: zeros between the pixels, then the filter, four times as strong for them."""
    x = torch.zeros_like(like)
    x[:, :, ::2, ::2] = coarse * 4
    return _blur(x)


def _channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel over the set: fp32 [n, C, D] -> two of fp32 [1, C, 1]."""
    mean = x.mean(dim=[0, 2], keepdim=True, dtype=torch.float64).float()
    return mean, (x - mean).square().mean(dim=[0, 2], keepdim=True, dtype=torch.float64).sqrt().float()


def _normalised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """fp32 [n, C, D] -> [n, C * D]."""
    return ((x - mean) / std.clamp(min=FLAT)).flatten(1)


def _sliced_distance(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Mean one-dimensional Wasserstein distance along directions [P, d] of unit length, of point sets fp32 [n, d].

    In one dimension the best transport of n points to n points keeps their order.
    """
    total = 0.0
    for some in directions.split(SLICES):
        gaps = np.abs(_sorted_projections(a, some) - _sorted_projections(b, some))
        total += float(gaps.sum(dtype=np.float64))
    return total / (len(directions) * len(a))


def _sorted_projections(x: Tensor, directions: Tensor) -> np.ndarray:
    """[P, n]. NumPy sorts three times as fast as torch on a CPU."""
    return np.sort((directions @ x.T).numpy(), axis=1)


def _check_same_settings(a: Descriptors, b: Descriptors) -> None:
    if (a.seed, a.patches) != (b.seed, b.patches):
        raise ValueError(
            f"descriptors of seed {a.seed} with {a.patches} patches an image do not go with those of seed {b.seed} "
            f"with {b.patches}"
        )
