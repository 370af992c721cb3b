"""Random numbers that belong to samples, not to processes.

Everything random about a sample (latents, style mixing, noise maps, its label) follows from (seed, phase, position),
so that a run neither depends on how its batch is split over passes and ranks, nor needs generator state to resume.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sample_seed(seed: int, purpose: str, position: int) -> int:
    """A 63-bit seed, a pure function of its arguments. (Philox: Salmon et al. 2011, "Parallel random numbers".)"""
    words = np.random.Philox(key=[seed, zlib.crc32(purpose.encode())], counter=[0, 0, position, 0]).random_raw(1)
    return int(words[0] >> np.uint64(1))


class Draws:
    """One random generator for each of n samples; successive calls continue them.

    Args:
        seed: of the run, 0 to 2**64 - 1.
        purpose: keeps independent uses (phases) apart.
        positions: of the samples in the stream, 0 or more.
        device: where the numbers are made. CPU and CUDA make different ones from the same seed.
    """

    def __init__(self, seed: int, purpose: str, positions: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generators = [
            torch.Generator(self.device).manual_seed(sample_seed(seed, purpose, position)) for position in positions
        ]

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, *shape: int) -> Tensor:
        """fp32 [n, *shape] of the unit normal distribution."""
        out = torch.empty([len(self), *shape], device=self.device)
        for row, generator in zip(out, self.generators, strict=True):
            row.normal_(generator=generator)
        return out

    def uniform(self, *shape: int) -> Tensor:
        """fp32 [n, *shape], uniform in [0, 1)."""
        out = torch.empty([len(self), *shape], device=self.device)
        for row, generator in zip(out, self.generators, strict=True):
            row.uniform_(generator=generator)
        return out

    def labels(self, ends: Tensor) -> Tensor:
        """One-hot fp32 [n, classes] of classes drawn in proportion to their counts, of which `ends` [classes], fp64 on
        the same device, are the running sums."""
        numbers = torch.searchsorted(ends, self.uniform().double() * ends[-1], right=True)
        return torch.nn.functional.one_hot(numbers, len(ends)).float()

    def noise_maps(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """One fp32 [n, 1, H, W] of unit normal noise for each (H, W)."""
        lengths = [h * w for h, w in sizes]
        flat = self.normal(sum(lengths)).split(lengths, dim=1)
        return [x.reshape(len(self), 1, h, w) for x, (h, w) in zip(flat, sizes, strict=True)]
