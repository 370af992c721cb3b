"""Perceptual path length: how much images change when the latent takes a small step (Karras et al. 2019, "A style-based
generator architecture for generative adversarial networks", section 4.1), measured by LPIPS (Zhang et al. 2018) as in
Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN", without a crop.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..draws import Draws
from ..latents import slerp
from ..networks.growing import Generator
from .features import PUBLISHED, file_hash, load_script, network_folder
from .samples import draw_labels

Sampling = Literal["end", "full"]

EPSILON = 1e-4  # of a path, whose length is 1
FILE = "vgg16.pt"
MOST = 256  # px: larger images are reduced, as VGG was made for 224 px


class Perceptual:
    """LPIPS from a TorchScript network, such as NVIDIA's vgg16.pt.

    Args:
        script: (fp32 [n, 3, H, W] in 0 to 255, resize_images=False, return_lpips=True) -> fp32 [n, D], of which the
            squared distances are LPIPS.
        path: of the file.

    Attributes:
        name: `unverified FILE`: there are no figures by which the network could be recognised.
        fingerprint: of the file's bytes.

    Raises:
        ValueError: it is no such network.
    """

    def __init__(self, script: nn.Module, path: Path, device: torch.device | str) -> None:
        self.script: Any = script
        self.device = torch.device("cpu")
        try:
            lengths = self.distances(torch.zeros(2, 3, 64, 64), torch.full([2, 3, 64, 64], 255.0))
        except (RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{path} does not give LPIPS of images, as {PUBLISHED}{FILE} does: {reason}") from None
        if lengths.shape != (2,) or not lengths.isfinite().all():
            raise ValueError(f"{path} does not give LPIPS of images, as {PUBLISHED}{FILE} does")
        self.name = f"unverified {path.name}"
        self.fingerprint = file_hash(path)
        self.device = torch.device(device)
        self.script.to(self.device)

    @torch.no_grad()
    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """Squared distances fp64 [n] on the CPU, of fp32 images [n, C, H, W] in 0 to 255; C = 1 is repeated, and of 4
        (RGBA) the colour counts.

        Reduced by whole numbers to about 256 px.
        """
        x = torch.cat([a, b]).to(self.device)
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3]
        factor = max(min(x.shape[2:]) // MOST, 1)
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with flags, torch.jit.optimized_execution(False), torch.autocast(self.device.type, enabled=False):
            features = self.script(F.avg_pool2d(x, factor), resize_images=False, return_lpips=True)
        first, second = features.double().chunk(2)
        return (first - second).square().flatten(1).sum(dim=1).cpu()


def load_perceptual(path: Path | None, device: torch.device | str) -> Perceptual:
    """LPIPS from a TorchScript file, by default vgg16.pt in `network_folder()`; nothing is downloaded.

    Raises:
        ValueError: there is no such file, naming where to get it, or it is no such network.
    """
    path = path or network_folder() / FILE
    if not path.is_file():
        raise ValueError(
            f"there is no perceptual network {path}, which ppl needs: fetch {PUBLISHED}{FILE} and put it there, or "
            "give --lpips FILE"
        )
    return Perceptual(load_script(path), path, device)


@torch.no_grad()
def image_pairs(
    G: Generator, draws: Draws, class_counts: Sequence[int] = (), sampling: Sampling = "end", batch: int = 16
) -> tuple[Tensor, Tensor]:
    """Images at both ends of a step of `EPSILON` along the path between two latents, of the same label and with the
    stored noise: straight in w (Karras et al. 2019, equation 3), or, where there is no w, along the great circle in z
    (equation 2).

    Args:
        draws: for n latent pairs, labels and places.
        class_counts: how frequent the generator's classes are to be.
        sampling: steps begin at the path's "end", at a latent as it is drawn, or anywhere on the path: "full".
        batch: steps at a time.

    Returns:
        Two of fp32 [n, C, H, W] in 0 to 255, not rounded, on the generator's device.
    """
    device = next(G.parameters()).device
    z0, z1 = (draws.normal(G.z_dim).to(device) for _ in range(2))
    labels = draw_labels(draws, class_counts)
    labels = None if labels is None else labels.to(device)
    t = draws.uniform()[:, None].to(device) * (sampling == "full")
    pairs = []
    for begin in range(0, len(draws), batch):
        some = slice(begin, begin + batch)
        c = None if labels is None else labels[some]
        ends = [_images(G, z0[some], z1[some], c, t[some] + step) for step in (0.0, EPSILON)]
        pairs.append(torch.stack(ends))
    first, second = torch.cat(pairs, dim=1)
    return first, second


def _images(G: Generator, z0: Tensor, z1: Tensor, label: Tensor | None, t: Tensor) -> Tensor:
    """fp32 [n, C, H, W] in 0 to 255, at t fp32 [n, 1] on the way from z0 to z1."""
    if G.has_w:
        w = torch.lerp(G.mapping(z0, label), G.mapping(z1, label), t)
    else:
        w = G.mapping(slerp(z0, z1, t[:, 0]), label)
    return G.synthesis(w[:, None].expand(-1, G.num_ws, -1)) * 127.5 + 127.5


def mean_length(distances: np.ndarray) -> float:
    """The perceptual path length: the mean of LPIPS distances [n] over epsilon squared, without the lowest and the
    highest hundredth.

    Raises:
        ValueError: there are none.
    """
    if not len(distances):
        raise ValueError("ppl needs at least 1 step")
    lengths = np.sort(np.asarray(distances, np.float64)) / EPSILON**2
    low, high = np.percentile(lengths, 1, method="lower"), np.percentile(lengths, 99, method="higher")
    return float(lengths[(lengths >= low) & (lengths <= high)].mean())
