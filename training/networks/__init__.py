"""Generators and discriminators. `build` is the only place that chooses among them."""

import torch

from ..config import Run
from .stylegan2 import Discriminator, Generator

LOW_PRECISION = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(run: Run, width: int, height: int, img_channels: int, c_dim: int) -> tuple[Generator, Discriminator]:
    """(generator, discriminator) on the CPU, initialised from the run's seed alone.

    Args:
        width, height: of the images, in px.
        img_channels: 1, 3 or 4.
        c_dim: number of classes; 0 without labels.
    """
    n = run.network
    sizes = {"channel_base": n.channel_base, "channel_max": n.channel_max, "mapping_layers": n.mapping_layers}
    low = LOW_PRECISION[run.precision]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        generator = Generator(
            width, height, img_channels, c_dim, n.z_dim, n.w_dim,
            use_noise=n.noise, low_precision=low, recompute=run.recompute, **sizes,
        )  # fmt: skip
        discriminator = Discriminator(
            width, height, img_channels, c_dim,
            mbstd_group=n.mbstd_group, low_precision=low, recompute=run.recompute, **sizes,
        )  # fmt: skip
    return generator, discriminator
