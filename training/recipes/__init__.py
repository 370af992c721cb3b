"""One GAN, one file: its networks, phases and losses. `build` is the only place that chooses among them."""

import torch

from ..config import Run
from .stylegan2 import StyleGAN2


def build(
    run: Run, width: int, height: int, img_channels: int, class_counts: list[int], device: torch.device
) -> StyleGAN2:
    """The recipe of a run, its networks on `device`.

    Args:
        width, height: of the images, in px.
        img_channels: 1, 3 or 4.
        class_counts: images of each class; empty without labels.
    """
    return StyleGAN2(run, width, height, img_channels, class_counts, device)
