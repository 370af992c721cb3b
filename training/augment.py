"""Augmentation of what the discriminator sees, with which it cannot learn few images by heart: the adaptive one of
StyleGAN2-ADA (Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix B) with its
controller, and DiffAugment (Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training").

All are linear in the images, or polynomials of them, and differentiable to any order. A sample's result follows from
its own image, its own draws and the probability p, which scales no strength: a transform happens or does not. Nothing
branches on a tensor's value, so that a GPU is never waited for; where none of a group's transforms happens to a sample,
`torch.where` takes its pixels as they were, bit for bit.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.upfirdn2d import setup_filter, upfirdn2d
from .draws import Draws

# Low-pass filters of the least asymmetric orthonormal wavelets with 6 and 2 vanishing moments (Daubechies 1992, "Ten
# Lectures on Wavelets", table 6.3). The sum is the square root of 2.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
SYM2 = tuple(x / (4 * 2**0.5) for x in (1 - 3**0.5, 3 - 3**0.5, 3 + 3**0.5, 1 + 3**0.5))
SYM6_FILTER = setup_filter(SYM6)

# Numbers of a sample in the order of the transforms, whichever groups are on: none changes another's.
UNIFORM = {"blit": 7, "geom": 7, "color": 7, "filter": 4, "noise": 1, "cutout": 3}
NORMAL = {"geom": 4, "color": 3, "filter": 4, "noise": 1}
POLICIES = ("color", "translation", "cutout")
SMALLEST = 4  # px

BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)  # of natural images in the four bands, from low to high frequencies


class AdaptivePipe:
    """The augmentation of StyleGAN2-ADA, each transform at its published strength (appendix B).

    Args:
        groups: any of "blit" (flips, quarter turns, whole pixels), "geom" (other affine transforms), "color",
            "filter", "noise" and "cutout". They act in this order, however they are given.

    Raises:
        ValueError: an unknown group.
    """

    def __init__(self, groups: Sequence[str]) -> None:
        if wrong := set(groups) - set(UNIFORM):
            raise ValueError(f"unknown augmentation {', '.join(sorted(wrong))}: there are {', '.join(UNIFORM)}")
        self.groups = frozenset(groups)
        self.banks: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, images: Tensor, p: Tensor | float, draws: Draws) -> Tensor:
        """Augments each image on its own.

        Args:
            images: [N, C, H, W], fp32 or fp64, in [-1, 1]; C is 1, 3 or 4 (the fourth is alpha: without "color"); H
                and W 4 or more.
            p: probability of each transform, in [0, 1]; a number or a 0-dim tensor (whose value is not checked).
            draws: of the N samples. What is taken from them does not depend on p.

        Raises:
            ValueError: another number of channels, a smaller image, a p outside [0, 1].

        Returns:
            [N, C, H, W], not clamped to [-1, 1], as published.
        """
        _check(images, p, draws)
        u = _columns(draws.uniform(sum(UNIFORM.values())).to(images), UNIFORM)
        z = _columns(draws.normal(sum(NORMAL.values())).to(images), NORMAL)
        size = (images.shape[3], images.shape[2])
        blit = blits(u["blit"], p, size) if "blit" in self.groups else None
        if "geom" in self.groups:
            images = transform(images, blit, geometry(u["geom"], z["geom"], p, size))
        elif blit is not None:
            images = copy_pixels(images, blit)
        if "color" in self.groups:
            images = recolour(images, colours(u["color"], z["color"], p))
        if "filter" in self.groups:
            images = self.filter(images, *band_gains(u["filter"], z["filter"], p))
        if "noise" in self.groups:
            deviation = _if(u["noise"][0] < p, z["noise"][0].abs() * 0.1, 0)
            images = images + draws.normal(*images.shape[1:]).to(images) * deviation[:, None, None, None]
        if "cutout" in self.groups:
            images = cut_out(images, u["cutout"], p)
        return images

    def filter(self, images: Tensor, gains: Tensor, active: Tensor) -> Tensor:
        """Amplifies the four bands of the active [N] samples by gains [N, 4], along both axes (appendix B).

        The filter of each sample, with the reflection at the borders, is one matrix for an axis: exact for any size.
        """
        x = images
        for _ in range(2):  # W, then H
            N, C, rows, width = x.shape
            weight = (gains @ self.bank(width, x).flatten(1)).reshape(N, width, width)
            x = torch.bmm(x.reshape(N, C * rows, width), weight.mT).reshape(N, C, rows, width).mT
        return torch.where(active[:, None, None, None], x, images)

    def bank(self, size: int, like: Tensor) -> Tensor:
        """[4, size, size]: `reflecting_bank` where `like` is, kept from call to call."""
        key = (size, like.device, like.dtype)
        if key not in self.banks:
            self.banks[key] = torch.from_numpy(reflecting_bank(size)).to(like)
        return self.banks[key]


# Pixel blitting.


@dataclass(frozen=True)
class Blit:
    """Transforms that copy pixels. turn [N, 2, 2]: offsets (x, y) from the centre of the output -> of the input, being
    flips and quarter turns; shift [N, 2]: whole pixels (x, y) by which the turned image moves."""

    turn: Tensor
    shift: Tensor


def blits(u: Sequence[Tensor], p: Tensor | float, size: tuple[int, int]) -> Blit:
    """From seven uniform [N]; size is (W, H). A flip (x), a counterclockwise quarter turn (0 to 3), a shift."""
    flip_on, flip, turn_on, quarters, shift_on, dx, dy = u
    sign = 1 - 2 * _if(flip_on < p, (flip * 2).floor(), 0)
    k = _if(turn_on < p, (quarters * 4).floor(), 0)
    odd = k.remainder(2)
    cos, sin = (1 - odd) * (1 - k), odd * (2 - k)  # of k quarter turns, exactly
    turn = torch.stack([sign * cos, -sign * sin, sin, cos], dim=1).reshape(-1, 2, 2)
    shift = torch.stack([((d * 2 - 1) * 0.125 * n).round() for d, n in zip((dx, dy), size, strict=True)], dim=1)
    return Blit(turn, _if((shift_on < p)[:, None], shift, 0))


def copy_pixels(images: Tensor, blit: Blit) -> Tensor:
    """[N, C, H, W] -> the same with each pixel copied from one of the reflected image.

    Where the sides of an image are not both even or both odd, its pixels after a quarter turn are half a pixel off the
    grid: the nearest to the left or above is taken.
    """
    H, W = images.shape[2:]
    # In half pixels from the centre, so that all numbers are whole, and exact.
    x = (torch.arange(W, device=images.device) * 2 - (W - 1)).to(images)
    y = (torch.arange(H, device=images.device) * 2 - (H - 1)).to(images)
    x, y = x - 2 * blit.shift[:, :1], y - 2 * blit.shift[:, 1:]  # [N, W], [N, H]
    columns = _outer(blit.turn[:, 0], x, y).add_(W - 1).div_(2).floor_()  # [N, H, W]
    rows = _outer(blit.turn[:, 1], x, y).add_(H - 1).div_(2).floor_()
    return _gather(images, _reflect(rows, H - 1), _reflect(columns, W - 1))


# General geometry.


@dataclass(frozen=True)
class Geometry:
    """In the order in which they act: scale [N], angle [N] in radians counterclockwise, stretch [N] (of x; that of y is
    its inverse), second_angle [N], shift [N, 2] in pixels (x, y). active [N]: whether any of them does anything."""

    scale: Tensor
    angle: Tensor
    stretch: Tensor
    second_angle: Tensor
    shift: Tensor
    active: Tensor

    def inverse(self) -> Tensor:
        """[N, 2, 2]: offsets (x, y) from the shifted centre of the output -> from the centre of the input."""
        c1, s1, c2, s2 = self.angle.cos(), self.angle.sin(), self.second_angle.cos(), self.second_angle.sin()
        x, y = 1 / (self.scale * self.stretch), self.stretch / self.scale
        rows = [
            c1 * x * c2 - s1 * y * s2,
            -c1 * x * s2 - s1 * y * c2,
            s1 * x * c2 + c1 * y * s2,
            c1 * y * c2 - s1 * x * s2,
        ]
        return torch.stack(rows, dim=1).reshape(-1, 2, 2)


def geometry(u: Sequence[Tensor], z: Sequence[Tensor], p: Tensor | float, size: tuple[int, int]) -> Geometry:
    """From seven uniform and four normal [N]; size is (W, H).

    Of the two rotations, each has such a probability that any happens with probability p (appendix B).
    """
    scale_on, first_on, first, stretch_on, second_on, second, shift_on = u
    p_rotate = 1 - (1 - p) ** 0.5
    on = [scale_on < p, first_on < p_rotate, stretch_on < p, second_on < p_rotate, shift_on < p]
    shift = torch.stack([d * 0.125 * n for d, n in zip(z[2:], size, strict=True)], dim=1)
    return Geometry(
        scale=_if(on[0], (z[0] * 0.2).exp2(), 1),
        angle=_if(on[1], (first * 2 - 1) * math.pi, 0),
        stretch=_if(on[2], (z[1] * 0.2).exp2(), 1),
        second_angle=_if(on[3], (second * 2 - 1) * math.pi, 0),
        shift=_if(on[4][:, None], shift, 0),
        active=functools.reduce(torch.logical_or, on),
    )


def transform(images: Tensor, blit: Blit | None, its: Geometry) -> Tensor:
    """[N, C, H, W] -> the same: all geometry in one resampling, but for the samples of which only pixels are copied."""
    matrix, offset = its.inverse(), torch.zeros_like(its.shift)
    copied = images
    if blit is not None:
        copied = copy_pixels(images, blit)
        matrix, offset = _times(blit.turn, matrix), -_apply(blit.turn, blit.shift)
    moved = resample(images, matrix, offset - _apply(matrix, its.shift))
    return torch.where(its.active[:, None, None, None], moved, copied)


def resample(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Affine resampling: up twofold by the sym6 low-pass, bilinear samples, the same filter down (appendix B).

    The published code pads the image by reflection as far as the batch's transforms reach, up to its size, and takes
    what lies beyond for 0. Here one period of the reflected image (2 size - 2) is made, and coordinates are taken
    modulo that: it reaches any distance at any image size, is smaller, and a sample does not depend on the batch. Where
    nothing moves, or by whole pixels, up and down cancel, as the filter is orthonormal. As published, its delay is
    taken to be 5 taps, at the largest; it is 5.1, so that an image turned by 180 degrees is 0.1 px off.

    Args:
        images: [N, C, H, W].
        matrix, offset: [N, 2, 2] and [N, 2], (x, y) in pixels from the centre: input = matrix @ output + offset.
    """
    H, W = images.shape[2:]
    f = SYM6_FILTER.to(images.device, non_blocking=True)
    period = F.pad(images, [0, W - 1, 0, H - 1], "reflect")
    # Tap k of `f` brings pixel i to sample 2i + k - 5: the fine image's samples 0, 2, 4, ... are where the pixels are.
    fine = upfirdn2d(F.pad(period, [3, 3, 3, 3], "reflect"), f, up=2, padding=[0, -1, 0, -1], gain=4)
    like = {"dtype": images.dtype, "device": images.device}
    x = (torch.arange(2 * W + 10, **like) - 5) / 2 - (W - 1) / 2
    y = (torch.arange(2 * H + 10, **like) - 5) / 2 - (H - 1) / 2
    grid = []
    for axis, size in enumerate((W, H)):
        unit = 4 / (4 * size - 3)  # a pixel, where grid_sample counts -1 to 1 from the first to the last sample
        moved = (offset[:, axis, None, None] + (size - 1) / 2) * unit
        grid.append(_outer(matrix[:, axis] * unit, x, y).add_(moved).remainder_((2 * size - 2) * unit).sub_(1))
    fine = F.grid_sample(fine, torch.stack(grid, dim=3), mode="bilinear", padding_mode="border", align_corners=True)
    return upfirdn2d(fine, f, down=2, flip_filter=True)


# Colour.


@dataclass(frozen=True)
class Colour:
    """brightness [N] (added), contrast [N] (factor), flip [N] (-1: luma is negated, or 1), hue [N] (radians around the
    grey axis), saturation [N] (factor), in the order in which they act."""

    brightness: Tensor
    contrast: Tensor
    flip: Tensor
    hue: Tensor
    saturation: Tensor

    def grey(self) -> tuple[Tensor, Tensor]:
        """Factor and summand [N] of an image's grey."""
        factor = self.contrast * self.flip
        return factor, factor * self.brightness

    def matrix(self) -> Tensor:
        """[N, 3, 3] on (R, G, B), to which the summand of `grey` is to be added.

        Along the grey axis v = (1, 1, 1) / sqrt 3 and in the plane across it the transforms commute: it is
        g v v^T + s (cos(hue) (1 - v v^T) + sin(hue) [v]_x), with s = contrast * saturation (Rodrigues' formula).
        """
        factor, _ = self.grey()
        across = self.contrast * self.saturation
        cos, sin = across * self.hue.cos(), across * self.hue.sin() / 3**0.5
        mean = (factor - cos) / 3
        own, next_, last = mean + cos, mean - sin, mean + sin
        rows = [own, next_, last, last, own, next_, next_, last, own]
        return torch.stack(rows, dim=1).reshape(-1, 3, 3)


def colours(u: Sequence[Tensor], z: Sequence[Tensor], p: Tensor | float) -> Colour:
    """From seven uniform and three normal [N]."""
    brightness_on, contrast_on, flip_on, flip, hue_on, hue, saturation_on = u
    return Colour(
        brightness=_if(brightness_on < p, z[0] * 0.2, 0),
        contrast=_if(contrast_on < p, (z[1] * 0.5).exp2(), 1),
        flip=1 - 2 * _if(flip_on < p, (flip * 2).floor(), 0),
        hue=_if(hue_on < p, (hue * 2 - 1) * math.pi, 0),
        saturation=_if(saturation_on < p, z[2].exp2(), 1),
    )


def recolour(images: Tensor, its: Colour) -> Tensor:
    """[N, C, H, W]: an image of one channel has no hue and no saturation, a fourth channel stays."""
    N, C, H, W = images.shape
    factor, summand = its.grey()
    if C == 1:
        return images * factor[:, None, None, None] + summand[:, None, None, None]
    rgb = images[:, :3].reshape(N, 3, H * W)
    rgb = torch.baddbmm(summand[:, None, None], its.matrix(), rgb).reshape(N, 3, H, W)
    return torch.cat([rgb, images[:, 3:]], dim=1) if C > 3 else rgb


# Filtering, noise, cutout.


def band_gains(u: Sequence[Tensor], z: Sequence[Tensor], p: Tensor | float) -> tuple[Tensor, Tensor]:
    """(gains [N, 4] of the bands from low to high, whether any is other than 1 [N]), from four uniform and four normal.

    Each band's factor is followed by one for all bands that keeps the expected power of a natural image (appendix B).
    """
    on = torch.stack(list(u), dim=1) < p
    factor = _if(on, torch.stack(list(z), dim=1).exp2(), 1)
    power = torch.stack([1 + share * (t.square() - 1) for share, t in zip(BAND_POWER, factor.unbind(1), strict=True)])
    return factor / power.prod(dim=0).sqrt()[:, None], on.any(dim=1)


@functools.cache
def band_filters() -> np.ndarray:
    """fp64 [4, 43] taps of the zero-phase filters that split a signal into the octaves below pi/8, pi/4, pi/2 and pi.

    With L(w) = |H(w)|^2 / 2 of sym2 they are L(w) L(2w) L(4w), L(w) L(2w) (1 - L(4w)), L(w) (1 - L(2w)) and 1 - L(w)
    (appendix B); their sum is 1.
    """
    low = np.correlate(SYM2, SYM2, "full") / 2  # 7 taps
    one = np.zeros(43)
    one[21] = 1
    bands, rest = [], one
    for octave in range(3):
        sparse = np.zeros(6 * 2**octave + 1)
        sparse[:: 2**octave] = low
        passed = np.convolve(rest, sparse, "same")
        bands.append(rest - passed)
        rest = passed
    return np.stack([rest, *bands[::-1]])


def reflecting_bank(size: int) -> np.ndarray:
    """fp64 [4, size, size]: the band filters as matrices on a signal that is reflected at its ends."""
    taps = band_filters()
    matrices = np.zeros([4, size, size])
    at = np.arange(size)
    for k, tap in enumerate(taps.T):
        source = size - 1 - np.abs((at + k - 21) % (2 * size - 2) - (size - 1))
        matrices[:, at, source] += tap[:, None]
    return matrices


def cut_out(images: Tensor, u: Sequence[Tensor], p: Tensor | float) -> Tensor:
    """Makes a rectangle of half the width and height grey, centred anywhere in the image, from three uniform [N]."""
    on, x, y = u
    H, W = images.shape[2:]
    columns = (torch.arange(W, device=images.device) + 0.5) / W
    rows = (torch.arange(H, device=images.device) + 0.5) / H
    inside_x = (columns - x[:, None]).abs() < 0.25  # [N, W]
    inside_y = (rows - y[:, None]).abs() < 0.25
    inside = inside_x[:, None, :] & inside_y[:, :, None] & (on < p)[:, None, None]
    return images.masked_fill(inside[:, None], 0)


class DiffAugment:
    """DiffAugment (Zhao et al. 2020, section 3.3), at its published strengths.

    Args:
        policy: any of "color", "translation" and "cutout". They act in this order, however they are given.

    Raises:
        ValueError: an unknown policy.
    """

    def __init__(self, policy: Sequence[str]) -> None:
        if wrong := set(policy) - set(POLICIES):
            raise ValueError(f"unknown policy {', '.join(sorted(wrong))}: there are {', '.join(POLICIES)}")
        self.policy = frozenset(policy)

    def __call__(self, images: Tensor, p: Tensor | float, draws: Draws) -> Tensor:
        """As `AdaptivePipe`, but p (published: 1) is the probability that a sample is augmented at all."""
        _check(images, p, draws)
        on, brightness, saturation, contrast, dx, dy, x, y = draws.uniform(8).to(images).unbind(1)
        augmented = images
        if "color" in self.policy:
            augmented = jitter(augmented, brightness, saturation, contrast)
        if "translation" in self.policy:
            augmented = translate(augmented, dx, dy)
        if "cutout" in self.policy:
            augmented = cut_square(augmented, x, y)
        return torch.where((on < p)[:, None, None, None], augmented, images)


def jitter(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """From three uniform [N]: adds -0.5 to 0.5, multiplies what differs from a pixel's grey by 0 to 2, and what differs
    from the image's mean by 0.5 to 1.5. A fourth channel stays."""
    brightness, saturation, contrast = (x[:, None, None, None] for x in (brightness, saturation, contrast))
    rgb = images[:, :3] + (brightness - 0.5)
    grey = rgb.mean(dim=1, keepdim=True)
    rgb = (rgb - grey) * (saturation * 2) + grey
    mean = rgb.mean(dim=[1, 2, 3], keepdim=True)
    rgb = (rgb - mean) * (contrast + 0.5) + mean
    return torch.cat([rgb, images[:, 3:]], dim=1) if images.shape[1] > 3 else rgb


def translate(images: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Moves by up to an eighth of each side, in whole pixels, from two uniform [N]; what was outside is 0."""
    H, W = images.shape[2:]
    rows, columns = (_moved(u, n, images.device) for u, n in ((dy, H), (dx, W)))
    inside = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None, :]
    rows, columns = rows.clamp(0, H - 1)[:, :, None], columns.clamp(0, W - 1)[:, None, :]
    moved = _gather(images, *torch.broadcast_tensors(rows, columns))
    return moved.masked_fill(~inside[:, None], 0)


def _moved(u: Tensor, size: int, device: torch.device) -> Tensor:
    """[N, size]: from which position each comes."""
    most = int(size / 8 + 0.5)
    return torch.arange(size, device=device) - ((u * (2 * most + 1)).floor() - most)[:, None]


def cut_square(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Makes a rectangle of half the width and height grey, from two uniform [N]; part of it may be outside."""
    H, W = images.shape[2:]
    rows, columns = (_covered(u, n, images.device) for u, n in ((y, H), (x, W)))
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _covered(u: Tensor, size: int, device: torch.device) -> Tensor:
    """[N, size]: whether a stretch of half the size covers a position. Its centre is any pixel, or the end of an
    even-sized stretch."""
    length = int(size * 0.5 + 0.5)
    first = (u * (size + 1 - length % 2)).floor()[:, None] - length // 2
    at = torch.arange(size, device=device)
    return (at >= first) & (at < first + length)


class Controller:
    """Adapts p to how far the discriminator has learned its reals by heart (Karras et al. 2020, ADA, section 3.1).

    The measure is r_t = E[sign(D(real))] (eq. 1), over `interval` iterations.

    Args:
        p: at the start.
        target: of r_t.
        kimg: thousands of images in which p would go from 0 to 1.
        interval: iterations from one change of p to the next.
        device: of `p`.

    Raises:
        ValueError: p outside [0, 1], kimg or interval not above 0.
    """

    def __init__(self, p: float, target: float, kimg: float, interval: int, device: torch.device | str = "cpu") -> None:
        if not 0 <= p <= 1 or kimg <= 0 or interval < 1:
            raise ValueError(
                f"p has to be in [0, 1], kimg above 0 and interval 1 or more, not {p}, {kimg} and {interval}"
            )
        self.target, self.kimg, self.interval = target, kimg, interval
        self.p = torch.tensor(p, dtype=torch.float32, device=device)
        """0-dim; changed in place."""
        self.r_t = torch.full_like(self.p, math.nan)
        """0-dim: of the last whole interval, nan before the first."""
        self.sum = torch.zeros_like(self.p)
        self.count = 0

    def update(self, sign_mean: Tensor, batch: int) -> None:
        """Takes one iteration's mean of sign(D(real)) over the global batch, 0-dim, and the number of its images.

        At an interval's end p moves by batch * interval / (1000 * kimg) towards the target and stays in [0, 1]. A
        mean that is not a number shows in `r_t` and leaves p as it is.
        """
        self.sum += sign_mean.detach()
        self.count += 1
        if self.count < self.interval:
            return
        self.r_t.copy_(self.sum / self.interval)
        direction = (self.r_t - self.target).sign().nan_to_num(nan=0)
        self.p.add_(direction * (batch * self.interval / (self.kimg * 1000))).clamp_(0, 1)
        self.sum.zero_()
        self.count = 0

    def state_dict(self) -> dict[str, Tensor]:
        return {"p": self.p, "r_t": self.r_t, "sum": self.sum, "count": torch.tensor(self.count)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in ("p", "r_t", "sum"):
            getattr(self, name).copy_(state[name])
        self.count = int(state["count"])


# Shared by several transforms.


def _check(images: Tensor, p: Tensor | float, draws: Draws) -> None:
    assert len(draws) == len(images)
    C, H, W = images.shape[1:]
    if C not in (1, 3, 4) or min(H, W) < SMALLEST:
        raise ValueError(
            f"augmentation takes images of 1, 3 or 4 channels and {SMALLEST}x{SMALLEST} px or more, not {C}x{H}x{W}"
        )
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        raise ValueError(f"the probability of augmentation has to be in [0, 1], not {p}")


def _columns(x: Tensor, counts: dict[str, int]) -> dict[str, tuple[Tensor, ...]]:
    """[N, sum of counts] -> for each name its columns [N]."""
    parts = x.split(list(counts.values()), dim=1)
    return {name: part.unbind(1) for name, part in zip(counts, parts, strict=True)}


def _if(on: Tensor, value: Tensor, neutral: float) -> Tensor:
    return value.masked_fill(~on, neutral)


def _outer(row: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """row [N, 2] of a matrix; x [W] or [N, W]; y [H] or [N, H] -> [N, H, W]: row @ (x, y)."""
    return (row[:, :1] * x)[:, None, :] + (row[:, 1:] * y)[:, :, None]


def _times(a: Tensor, b: Tensor) -> Tensor:
    """[N, 2, 2] @ [N, 2, 2], in full precision whatever torch is told to do with matrices."""
    return (a[:, :, :, None] * b[:, None]).sum(dim=2)


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """[N, 2, 2] @ [N, 2] -> [N, 2], in full precision."""
    return (matrix * x[:, None, :]).sum(dim=2)


def _reflect(x: Tensor, end: float) -> Tensor:
    """Reflects coordinates, in place, at 0 and `end`, as often as it takes."""
    return x.remainder_(2 * end).sub_(end).abs_().neg_().add_(end)


def _gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images [N, C, H, W]; rows and columns [N, H, W] of whole numbers -> [N, C, H, W]."""
    N, C, H, W = images.shape
    index = (rows * W + columns).long().reshape(N, 1, H * W).expand(-1, C, -1)
    return images.reshape(N, C, H * W).gather(2, index).reshape(N, C, H, W)
