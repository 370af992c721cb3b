"""Generators and discriminators. `build` is the only place that chooses among them."""

from typing import Any

import torch

from ..config import MSGNetwork, ProgressiveNetwork, R3GANNetwork, Run, StyleGAN1Network, StyleGAN2Network
from . import msg, progressive, r3gan, stylegan1, stylegan2

LOW_PRECISION = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(run: Run, width: int, height: int, img_channels: int, c_dim: int) -> tuple[Any, Any]:
    """(generator, discriminator) on the CPU, initialised from the run's seed alone, whole (not grown back to a level).

    Args:
        width, height: of the images, in px.
        img_channels: 1, 3 or 4.
        c_dim: number of classes; 0 without labels.
    """
    n = run.network
    both: dict[str, Any] = {
        "width": width, "height": height, "img_channels": img_channels, "c_dim": c_dim,
        "channel_base": n.channel_base, "channel_max": n.channel_max,
        "low_precision": LOW_PRECISION[run.precision], "recompute": run.recompute,
    }  # fmt: skip
    group = {"mbstd_group": n.mbstd_group}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        if isinstance(n, ProgressiveNetwork):
            return progressive.Generator(z_dim=n.z_dim, **both), progressive.Discriminator(**group, **both)
        if isinstance(n, R3GANNetwork):
            both |= {"blocks": n.blocks, "expansion": n.expansion, "group_width": n.group_width}
            return r3gan.Generator(z_dim=n.z_dim, **both), r3gan.Discriminator(**both)
        style = {
            "z_dim": n.z_dim, "w_dim": n.w_dim, "mapping_layers": n.mapping_layers, "use_noise": n.noise,
        }  # fmt: skip
        if isinstance(n, StyleGAN1Network):
            generator = stylegan1.Generator(latent_input=n.latent_input, **style, **both)
            return generator, stylegan1.Discriminator(**group, **both)
        assert isinstance(n, StyleGAN2Network)
        its = n.discriminator_mapping_layers
        group |= {"mapping_layers": n.mapping_layers if its is None else its}
        if isinstance(n, MSGNetwork):
            return msg.Generator(**style, **both), msg.Discriminator(**group, **both)
        grows = run.growth.start > 0
        return stylegan2.Generator(**style, **both), stylegan2.Discriminator(grows=grows, **group, **both)
