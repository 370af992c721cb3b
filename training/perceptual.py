"""How unlike two images are, as a differentiable function: each of these maps images to vectors, of which the squared
distances count.

`Lpips` is what the papers use. Without its network, `DiscriminatorFeatures` or, at last, `LaplacianPyramid` serve.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .metrics.ppl import load_perceptual
from .networks.growing import downsample_box, pyramid, upsample_nearest

LONGEST = 256  # px that VGG sees


class Embedding(Protocol):
    """Attributes: `name`, what the distances are, for people."""

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """fp32 [N, C, H, W] in [-1, 1] -> fp32 [N, D]."""
        ...


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Of vectors [N, D]: squared, [N]."""
    return (a - b).square().sum(dim=1)


class Lpips:
    """LPIPS (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric").

    Images larger than 256 px are reduced to that by averaging (Karras et al. 2020, StyleGAN2, appendix D); grey is
    repeated; RGBA counts by how it looks on black and on white.

    Args:
        script: (fp32 [n, 3, H, W] in 0 to 255, resize_images=False, return_lpips=True) -> fp32 [n, D], of which the
            squared distances are LPIPS; as vgg16.pt.
    """

    def __init__(self, script: nn.Module, name: str) -> None:
        self.script: Any = script.eval()
        for parameter in script.parameters():  # TorchScript's modules lack requires_grad_
            parameter.requires_grad = False
        self.name = name

    def __call__(self, images: Tensor) -> Tensor:
        x = images * 127.5 + 127.5
        H, W = x.shape[2:]
        if max(H, W) > LONGEST:
            scale = LONGEST / max(H, W)
            x = F.interpolate(x, size=(round(H * scale), round(W * scale)), mode="area")
        views = colours(x)
        with torch.jit.optimized_execution(False):  # it would compile anew for each image size, and move the numbers
            y = [self.script(view, resize_images=False, return_lpips=True).flatten(1) for view in views]
        return torch.cat(y, dim=1) * len(views) ** -0.5


def colours(x: Tensor) -> Sequence[Tensor]:
    """Images [N, C, H, W] in 0 to 255 of C = 1, 3 or 4 -> RGB [N, 3, H, W]; of RGBA two, on black and on white."""
    if x.shape[1] == 1:
        return [x.expand(-1, 3, -1, -1)]
    if x.shape[1] == 3:
        return [x]
    alpha = x[:, 3:] / 255
    return [x[:, :3] * alpha + ground * (1 - alpha) for ground in (0, 255)]


def load_lpips(path: Path, device: torch.device) -> Lpips:
    """From a TorchScript file such as vgg16.pt. Raises ValueError if it is missing, or no such network."""
    network = load_perceptual(path, device)
    return Lpips(network.script, f"LPIPS ({path.name})")


class DiscriminatorFeatures:
    """Features of a snapshot's discriminator at each of its levels, scaled to unit length at every place as in LPIPS,
    and the pixels themselves: means over places, of which the levels' mean and the pixels weigh the same.

    Args:
        discriminator: a `networks.growing.Discriminator`.
    """

    name = "features of the snapshot's own discriminator, and pixels"

    def __init__(self, discriminator: nn.Module) -> None:
        self.D: Any = discriminator.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Tensor:
        maps = self.levels(images)
        parts = [x * (x.square().sum(dim=1, keepdim=True) + 1e-8).rsqrt() for x in maps]
        parts = [x / (len(parts) * x.shape[2:].numel()) ** 0.5 for x in parts]
        return torch.cat([x.flatten(1) for x in [*parts, images / images[0].numel() ** 0.5]], dim=1)

    def levels(self, images: Tensor) -> list[Tensor]:
        """Its features [N, channels, h, w] from the image's own size to the lowest."""
        D = self.D
        x = D.from_rgb(D.level, images)
        maps = [x]
        small = pyramid(images, D.level + 1)
        for level in range(D.level, 0, -1):
            x = D.run(level, x)
            if level - 1 in D.image_levels:  # a level that fades in
                x = torch.lerp(D.from_rgb(level - 1, small[level - 1]), x, D.alpha)
            maps.append(x)
            if getattr(D, "concatenates", False):  # MSG-GAN's
                x = torch.cat([x, small[level - 1]], dim=1)
        return maps


class LaplacianPyramid:
    """The image's details at each scale and what is left at the smallest (Burt and Adelson 1983, "The Laplacian Pyramid
    as a Compact Image Code", with 2x2 means): means of squares over each band, so that few coarse values weigh as much
    as many fine ones.

    Args:
        levels: number of scales; both sides of the images are multiples of 2 ** (levels - 1).
    """

    name = "Laplacian pyramid of pixels"

    def __init__(self, levels: int) -> None:
        self.scales = levels

    def __call__(self, images: Tensor) -> Tensor:
        parts = []
        for _ in range(self.scales - 1):
            small = downsample_box(images)
            parts.append(images - upsample_nearest(small))
            images = small
        return torch.cat([x.flatten(1) / x[0].numel() ** 0.5 for x in [*parts, images]], dim=1)
