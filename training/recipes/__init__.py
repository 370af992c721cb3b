"""One GAN, one file: its networks, phases and losses. `build` is the only place that chooses among them."""

import torch

from ..config import Run
from .msg import MSG
from .progressive import Progressive
from .r3gan import R3GAN
from .recipe import Recipe
from .stylegan1 import StyleGAN1
from .stylegan2 import StyleGAN2

RECIPES: dict[str, type[Recipe]] = {
    "stylegan2": StyleGAN2,
    "msg": MSG,
    "stylegan1": StyleGAN1,
    "progressive": Progressive,
    "r3gan": R3GAN,
}


def build(
    run: Run, width: int, height: int, img_channels: int, class_counts: list[int], device: torch.device
) -> Recipe:
    """The recipe of a run, its networks on `device`, in the schedule's first stage.

    Args:
        width, height: of the data set's images, in px.
        img_channels: 1, 3 or 4.
        class_counts: images of each class; empty without labels.
    """
    return RECIPES[run.recipe.kind](run, width, height, img_channels, class_counts, device)
