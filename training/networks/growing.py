"""What every generator and discriminator here is made of: levels, one for each doubling of the image's size, of which
the highest may still be missing or fade in (Karras et al. 2018, "Progressive Growing of GANs", section 2 and figure 2).

Levels are counted from 0, the start. Their modules are named by their nominal resolution `b4`, `b8`, `b16`, ...: the
sides of a rectangular image start from another size than 4x4. In a level, `torgb` makes an image of features, and
`fromrgb` features of an image.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.conv2d import memory_format
from .layers import run_block

Noise = str | Sequence[Tensor]  # "const", "none", or one [N, 1, H, W] a layer

CLAMP = 256.0  # of activations in low-precision levels: fp16 must not overflow

_LEVEL = re.compile(r"(?:^|\.)b(\d+)\.")  # in a parameter's name
_IMAGE = re.compile(r"\.(torgb|fromrgb)\.")  # a layer between features and image


def start_size(width: int, height: int) -> tuple[int, int, int]:
    """(start height, start width, number of levels) of an image: halve both sides while both stay 4 or more.

    Raises:
        ValueError: the sides are not a small start size times a power of 2.
    """
    levels = 1
    w, h = width, height
    while w % 2 == 0 and h % 2 == 0 and min(w, h) >= 8:
        w, h, levels = w // 2, h // 2, levels + 1
    if levels < 2 or max(w, h) > 32 or min(w, h) < 4:
        raise ValueError(
            f"{width}x{height} px: both sides must be a start size of 4 to 32 times the same power of 2 "
            "(256x256, 768x512, 1280x768, ...); prepare the data set at such a size"
        )
    return h, w, levels


def channels(resolutions: Sequence[int], base: int, limit: int) -> list[int]:
    """Channels of each level: the more, the lower it is."""
    return [max(1, min(base // res, limit)) for res in resolutions]


def low_levels(levels: int, dtype: torch.dtype | None, top: int) -> list[torch.dtype | None]:
    """The low-precision dtype of each level, lowest level first: the `top` highest ones, never the start."""
    low = min(top, levels - 1) if dtype else 0
    return [None] * (levels - low) + [dtype] * low


def level_of(name: str) -> int | None:
    """The level that a parameter or buffer of this name belongs to; None: to none, as the mapping's."""
    place = _LEVEL.search(name)
    return int(place[1]).bit_length() - 3 if place else None  # b4 is level 0, b8 is level 1, ...


def upsample_nearest(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W]: every pixel four times."""
    N, C, H, W = x.shape
    return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(N, C, 2 * H, 2 * W)


def downsample_box(x: Tensor) -> Tensor:
    """[N, C, H, W], floating point, both sides even -> [N, C, H / 2, W / 2]: means of 2x2 pixels."""
    return F.avg_pool2d(x, 2)


def fade_reals(images: Tensor, alpha: float, upsample: Callable[[Tensor], Tensor]) -> Tensor:
    """Real images as sharp as generated ones whose newest level has the weight `alpha`.

    Args:
        images: [N, C, H, W], floating point.
        upsample: [N, C, H / 2, W / 2] -> [N, C, H, W], the generator's `upsample_image`.
    """
    return images if alpha == 1 else torch.lerp(upsample(downsample_box(images)), images, alpha)


def pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """[N, C, H, W] -> images of `levels` sizes, each half the next one, lowest first; the last is `images` itself."""
    sizes = [images]
    for _ in range(levels - 1):
        sizes.append(downsample_box(sizes[-1]))
    return sizes[::-1]


def truncate(ws: Tensor, w_avg: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
    """ws [N, num_ws, w_dim] moved towards `w_avg`, all layers or the first `cutoff` (StyleGAN, appendix B)."""
    if psi == 1:
        return ws
    ws = ws.clone()
    ws[:, :cutoff] = w_avg.lerp(ws[:, :cutoff], psi)
    return ws


class Growing(nn.Module):
    """A network for images of `width` x `height` px, and of half, a quarter, ... of it while it grows.

    Attributes:
        levels: how many there are.
        level: the highest at work, 0 is the start; at first all are.
        alpha: weight of the newest level, 1 unless it is fading in.
        frozen: how many of its highest levels do not learn.
        grows: whether it works below its highest level.
        sums_images: whether the images of all levels make the result, not those of the newest alone.

    Neither level nor alpha is part of the state_dict: they are functions of the images shown so far.
    """

    grows = True
    sums_images = False

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        h, w, self.levels = start_size(width, height)
        self.start = (h, w)
        self.level, self.alpha = self.levels - 1, 1.0
        self._frozen = 0

    def grow_to(self, level: int, alpha: float = 1.0) -> None:
        """Makes `level` the highest at work, with the weight `alpha` against what is below it.

        Raises:
            ValueError: there is no such level, or nothing below it to fade from.
        """
        top = self.levels - 1
        lowest = 0 if self.grows else top
        if not lowest <= level <= top:
            raise ValueError(f"level {level}: this {type(self).__name__} works at level {lowest} to {top}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha {alpha} is not from 0 to 1")
        if alpha < 1 and level == lowest:
            raise ValueError(f"alpha {alpha}: level {level} has none below it to fade in from")
        for part in self.modules():
            if isinstance(part, Growing):
                part.level, part.alpha = level, alpha

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image at the present level."""
        return self.size_at(self.level)

    def size_at(self, level: int) -> tuple[int, int]:
        """(height, width) of a level."""
        return self.start[0] << level, self.start[1] << level

    @property
    def image_levels(self) -> range:
        """Levels whose image is blended: the newest one, and the one below while that fades in."""
        return range(self.level - (self.alpha < 1), self.level + 1)

    @property
    def frozen(self) -> int:
        """How many of its highest levels, with their layers between features and image, stay as they are: no gradients,
        and not `active` (of a discriminator: Mo et al. 2020, "Freeze the Discriminator"). They are counted
        from the top of the whole network, however far it has grown. At first none is; the lowest, which has the
        discriminator's head, never is.

        Setting it raises ValueError if there are not so many.
        """
        return self._frozen

    @frozen.setter
    def frozen(self, count: int) -> None:
        if not 0 <= count < self.levels:
            raise ValueError(
                f"cannot freeze {count} levels: this {type(self).__name__} has {self.levels}, of which the lowest has "
                f"to learn; freeze_d is at most {self.levels - 1}"
            )
        self._frozen = count
        for name, p in self.named_parameters():
            if self.is_frozen(name):
                p.requires_grad_(False)

    def is_frozen(self, name: str) -> bool:
        """Whether a parameter of this name stays as it is."""
        level = level_of(name)
        return level is not None and level >= self.levels - self.frozen

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As any module's, but frozen parameters never get gradients."""
        for name, p in self.named_parameters():
            p.requires_grad_(requires_grad and not self.is_frozen(name))
        return self

    def active(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters, in the order of `named_parameters`, that can influence the output at this level and are
        not frozen."""
        return [(name, p) for name, p in self.named_parameters() if self._at_work(name) and not self.is_frozen(name)]

    def _at_work(self, name: str) -> bool:
        level = level_of(name)
        if level is None:
            return True
        if _IMAGE.search(name) and not self.sums_images:
            return level in self.image_levels
        return level <= self.level

    def block(self, level: int) -> Any:
        """The module of a level, in networks that have one a level."""
        return self.get_submodule(f"b{4 << level}")


class Mapping(nn.Module):
    """z (and label) -> w.

    `w_avg` [w_dim] is the running mean of w, the point that truncation moves towards.
    """

    w_avg: Tensor

    def __init__(self, w_dim: int) -> None:
        super().__init__()
        self.w_dim = w_dim
        self.register_buffer("w_avg", torch.zeros(w_dim))

    @torch.no_grad()
    def update_w_avg(self, w_mean: Tensor, beta: float) -> None:
        """Moves `w_avg` towards the mean w [w_dim] of a batch."""
        self.w_avg.lerp_(w_mean.to(self.w_avg.dtype), 1 - beta)


class Synthesis(Growing):
    """ws -> image. With `recompute`, as in `run_block`, training keeps only the activations between levels.

    A network derives from it: blocks (x or None, ws, f, noise, dtype, clamp) -> x with `torgb` (x, clamp=) -> image,
    the filter `f`, which w and which noise map a level takes, and how its images are up-sampled.
    """

    f: Tensor

    def __init__(
        self, width: int, height: int, low_precision: torch.dtype | None, low_precision_levels: int, recompute: bool
    ) -> None:
        super().__init__(width, height)
        self.resolutions = [4 << level for level in range(self.levels)]
        self.low = low_levels(self.levels, low_precision, low_precision_levels)
        self.recompute = recompute
        self.noise_layers = [0] * self.levels  # noise maps of each level

    @property
    def num_ws(self) -> int:
        """How many w the present level takes."""
        return 2 * (self.level + 1)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each noise map at work."""
        return [self.size_at(level) for level in range(self.level + 1) for _ in range(self.noise_layers[level])]

    def precision(self, level: int, wide: torch.dtype) -> tuple[torch.dtype, float | None]:
        """(dtype, clamp) of a level's activations; `wide` is that of the others."""
        low = self.low[level]
        return (low, CLAMP) if low else (wide, None)

    def maps(self, noise: Noise) -> Sequence[Tensor | str]:
        """What stands for each layer's noise."""
        if not any(self.noise_layers):
            noise = "none"
        return [noise] * self.num_ws if isinstance(noise, str) else noise

    def inputs(self, level: int, ws: Tensor, maps: Sequence[Tensor | str]) -> tuple[Tensor, Sequence[Tensor | str]]:
        """(ws, noise) of a level's layers."""
        raise NotImplementedError

    def upsample_image(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2H, 2W], as the image of the level below is while a level fades in."""
        return upsample_nearest(x)

    def forward(self, ws: Tensor, noise: Noise = "const") -> Tensor:
        """ws [N, num_ws, w_dim] fp32 -> images [N, img_channels, *size] fp32, in [-1, 1] once trained.

        noise: "const" (each layer's stored map), "none", or a list of [N, 1, H, W] of the `sizes`.
        """
        maps = self.maps(noise)
        x, images = None, []
        for level in range(self.level + 1):
            block, (dtype, clamp) = self.block(level), self.precision(level, ws.dtype)
            x = run_block(block, self.recompute, x, *self.inputs(level, ws, maps), self.f, dtype, clamp)
            if level in self.image_levels:
                images.append(block.torgb(x, clamp=clamp).to(ws.dtype))
        return images[0] if self.alpha == 1 else torch.lerp(self.upsample_image(images[0]), images[1], self.alpha)


class Generator(Growing):
    """A `mapping` and a `synthesis`.

    Attributes:
        truncation_cutoff: layers that truncation moves unless told otherwise, the first so many; None is all.
        has_w: whether there is a w to truncate, other than the latent itself.
    """

    truncation_cutoff: int | None = None
    has_w = True
    mapping: Mapping
    synthesis: Synthesis

    def __init__(self, width: int, height: int, z_dim: int, c_dim: int) -> None:
        super().__init__(width, height)
        self.z_dim, self.c_dim = z_dim, c_dim

    @property
    def num_ws(self) -> int:
        """How many w the synthesis takes at the present level."""
        return self.synthesis.num_ws

    def upsample_image(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 2H, 2W], as the image of the level below is while a level fades in."""
        return self.synthesis.upsample_image(x)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise: Noise = "const",
    ) -> Tensor:
        """z [N, z_dim], c [N, c_dim] one-hot -> images [N, img_channels, *size] fp32.

        Raises:
            ValueError: truncation where there is no w.
        """
        if truncation_psi != 1 and not self.has_w:
            raise ValueError(f"truncation_psi {truncation_psi}: this generator has no w that could be truncated")
        cutoff = self.truncation_cutoff if truncation_cutoff is None else truncation_cutoff
        ws = self.mapping(z, c)[:, None].expand(-1, self.num_ws, -1)
        return self.synthesis(truncate(ws, self.mapping.w_avg, truncation_psi, cutoff), noise)


class Discriminator(Growing):
    """Image -> features of the start size.

    A network derives from it: blocks (x, f, clamp) -> x of half the size, a head `b4`, and the filter `f`.
    """

    f: Tensor

    def __init__(
        self, width: int, height: int, low_precision: torch.dtype | None, low_precision_levels: int, recompute: bool
    ) -> None:
        super().__init__(width, height)
        self.resolutions = [4 << level for level in range(self.levels)][:0:-1]  # highest first, without 4
        self.low = low_levels(self.levels, low_precision, low_precision_levels)[:0:-1]
        self.recompute = recompute

    def precision(self, level: int) -> tuple[torch.dtype, float | None]:
        """(dtype, clamp) of a level's activations."""
        low = self.low[-level] if level else None
        return (low, CLAMP) if low else (self.f.dtype, None)

    def from_rgb(self, level: int, img: Tensor) -> Tensor:
        """A level's features of an image of its size."""
        dtype, clamp = self.precision(level)
        img = img.contiguous(memory_format=memory_format(img.device)).to(dtype)
        return self.block(level).fromrgb(img, clamp=clamp)

    def run(self, level: int, x: Tensor) -> Tensor:
        """A level's features -> those of the level below, in the dtype of the upper one."""
        dtype, clamp = self.precision(level)
        return run_block(self.block(level), self.recompute, x.to(dtype), self.f, clamp)

    def features(self, img: Tensor) -> Tensor:
        """img [N, img_channels, *size] in [-1, 1] -> what goes into the head, fp32."""
        x = self.from_rgb(self.level, img)
        for level in range(self.level, 0, -1):
            x = self.run(level, x)
            if level - 1 in self.image_levels:
                below = self.from_rgb(level - 1, downsample_box(img))
                x = torch.lerp(below, x.to(below.dtype), self.alpha)
        return x.to(self.f.dtype)
