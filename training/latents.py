"""Latents put together: style mixing, and curves through several latents for films."""

import re
from typing import Literal

import torch
from torch import Tensor

# Layers of each scale: those of 4 and 8 px, of 16 and 32 px, and of more (Karras et al. 2019, StyleGAN, section 3.1).
SCALES = {"coarse": (0, 4), "middle": (4, 8), "fine": (8, None)}

_PARALLEL = 1e-6  # sine of an angle below which two directions span no plane


def mix(a: Tensor, b: Tensor, layers: list[int]) -> Tensor:
    """ws [N, num_ws, w_dim] of `a`, with those of `b` in `layers` (StyleGAN, section 3.1)."""
    ws = a.clone()
    ws[:, layers] = b[:, layers]
    return ws


def parse_layers(text: str, num_ws: int) -> list[int]:
    """ "coarse", "0-3,6", "coarse,middle", "all", "none" -> ascending numbers of layers, each below `num_ws`.

    Raises ValueError if it is not of that form, or names a layer that is not there.
    """
    if text == "none":
        return []
    layers: set[int] = set()
    for part in text.split(","):
        part = part.strip()
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if part == "all":
            first, stop = 0, num_ws
        elif part in SCALES:
            first, stop = SCALES[part][0], SCALES[part][1] or num_ws
            stop = min(stop, num_ws)
        elif match:
            first, stop = int(match[1]), int(match[2] or match[1]) + 1
        else:
            raise ValueError(f"--styles {text!r}: give layers such as 0-6 or 0,2,5, or coarse, middle, fine, all, none")
        if not first < stop <= num_ws:
            raise ValueError(f"--styles {text}: this generator has the layers 0 to {num_ws - 1}, so no {part}")
        layers |= set(range(first, stop))
    return sorted(layers)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The point at the fraction t of the way along the great arc from `a` to `b`, at a constant angular speed (Shoemake
    1985, "Animating Rotation with Quaternion Curves", section 3.3); where norms differ, they are interpolated linearly.

    Of the arcs between opposite directions it takes one of those through the axis most nearly at a right angle to `a`.

    Args:
        a, b: [N, dim].
        t: [N].

    Returns:
        [N, dim], dtype of `a`; computed in fp64.
    """
    x, y, t = a.double(), b.double(), t.double()[:, None]
    norms = x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
    u, v = (each / norm.clamp_min(1e-300) for each, norm in zip((x, y), norms, strict=True))
    cosine = (u * v).sum(dim=1, keepdim=True)
    across = v - cosine * u
    sine = across.norm(dim=1, keepdim=True)
    axis = torch.nn.functional.one_hot(u.abs().argmin(dim=1), u.shape[1]).double()
    axis = axis - (axis * u).sum(dim=1, keepdim=True) * u
    across = torch.where(sine < _PARALLEL, axis, across)
    across = across / across.norm(dim=1, keepdim=True)
    angle = t * torch.atan2(sine, cosine)
    return ((angle.cos() * u + angle.sin() * across) * torch.lerp(*norms, t)).to(a.dtype)


class Walks:
    """Curves through key points, one or several at once; a unit of time leads from one key to the next.

    Args:
        keys: [walks, K, dim], K at least 2.
        closed: lead back to the first key at time K; otherwise end at the last one at time K - 1.
        curve: "linear"; "slerp", along great arcs; or "spline", a cubic one with two continuous derivatives, periodic
            if closed and natural otherwise (de Boor 1978, "A Practical Guide to Splines", chapter IV).

    Attributes:
        duration: the time from beginning to end.
    """

    def __init__(self, keys: Tensor, closed: bool, curve: Literal["linear", "slerp", "spline"]) -> None:
        assert keys.ndim == 3
        assert keys.shape[1] >= 2
        self.keys, self.closed, self.curve = keys, closed, curve
        self.duration = keys.shape[1] - (not closed)
        if curve == "spline":
            self.second = _second_derivatives(keys.double(), closed)

    def at(self, walk: Tensor, time: Tensor) -> Tensor:
        """Points [N, dim], dtype of the keys, of the walks with the numbers `walk` [N], int64, at the times `time` [N],
        fp64, from 0 to the duration; closed ones go on beyond it."""
        K = self.keys.shape[1]
        before = time.floor().long()
        if not self.closed:
            before = before.clamp(0, K - 2)
        t = time - before
        i, j = before % K, (before + 1) % K
        a, b = self.keys[walk, i], self.keys[walk, j]
        if self.curve == "slerp":
            return slerp(a, b, t)
        t = t[:, None]
        point = torch.lerp(a.double(), b.double(), t)
        if self.curve == "spline":
            s = 1 - t
            point = point + ((s**3 - s) * self.second[walk, i] + (t**3 - t) * self.second[walk, j]) / 6
        return point.to(a.dtype)


def _second_derivatives(keys: Tensor, closed: bool) -> Tensor:
    """Of a cubic spline with unit intervals, at its keys [walks, K, dim], fp64: M[i-1] + 4 M[i] + M[i+1] = 6 (y[i-1] -
    2 y[i] + y[i+1]), with M = 0 at open ends."""
    K = keys.shape[1]
    matrix, row = torch.zeros(K, K, dtype=keys.dtype), torch.arange(K)
    for shift, value in ((0, 4.0), (1, 1.0), (-1, 1.0)):
        matrix[row, (row + shift) % K] += value  # of two keys, the one before is also the one after
    right = 6 * (keys.roll(1, dims=1) - 2 * keys + keys.roll(-1, dims=1))
    if not closed:
        matrix[[0, -1]] = 0
        matrix[[0, -1], [0, -1]] = 1
        right[:, [0, -1]] = 0
    return torch.linalg.solve(matrix.to(keys.device), right)
