"""Generated images to measure a generator by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..draws import Draws
from ..networks.growing import Generator, truncate
from ..report import to_uint8


def draw_labels(draws: Draws, class_counts: Sequence[int]) -> Tensor | None:
    """One-hot fp32 [n, classes], as frequent as in `class_counts`; None without classes."""
    if not class_counts:
        return None
    ends = torch.tensor(class_counts, dtype=torch.float64, device=draws.device).cumsum(0)
    return draws.labels(ends)


@torch.no_grad()
def generated_images(
    G: Generator,
    draws: Draws,
    class_counts: Sequence[int] = (),
    *,
    truncation: float = 1.0,
    noise: str = "random",
    batch: int = 16,
) -> Tensor:
    """Images of the latents, labels and noise maps that the draws give, in this order.

    Args:
        G: its parameters lie on any device; the draws on any.
        class_counts: how frequent its classes are to be.
        truncation: psi; without effect where there is no w.
        noise: "random", as published figures are measured, "const" or "none".
        batch: images at a time.

    Returns:
        uint8 [n, C, H, W] on the CPU.
    """
    device = next(G.parameters()).device
    z, c = draws.normal(G.z_dim).to(device), draw_labels(draws, class_counts)
    c = None if c is None else c.to(device)
    sizes = G.synthesis.sizes if noise == "random" else []
    maps = [x.to(device) for x in draws.noise_maps(sizes)] if sizes else []
    fixed = "none" if noise == "none" else "const"
    images = []
    for start in range(0, len(draws), batch):
        some = slice(start, start + batch)
        w = G.mapping(z[some], None if c is None else c[some])[:, None].expand(-1, G.num_ws, -1)
        if G.has_w:
            w = truncate(w, G.mapping.w_avg, truncation, G.truncation_cutoff)
        images.append(to_uint8(G.synthesis(w, [x[some] for x in maps] or fixed)))
    return torch.cat(images)
