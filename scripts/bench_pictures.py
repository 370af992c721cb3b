"""Pictures for `styleloom bench data`, drawn so that they compress as photographs do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from styleloom.datasets.sources import LABELS
from styleloom.scripts.bench_show import progress

CLASSES = 10
_SAVE: dict[str, dict[str, Any]] = {".jpg": {"quality": 95, "subsampling": "4:4:4"}}
_IMAGES = {256: 600, 512: 300}  # up to that many pixels a side


def usual_count(side: int) -> int:
    """Different pictures of so many px, enough for a measurement."""
    return next((count for limit, count in _IMAGES.items() if side <= limit), 120)


def draw(number: int, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: a picture.

    Brightness is noise whose amplitude falls with the frequency, f^-1.5, with a gradient and twelve discs that have
    sharp edges; colour is smoother noise; every value has a camera's noise, with a standard deviation of 1. As a JPEG
    of quality 95 it has some 38 kB at 256 px, 112 kB at 512 px and 366 kB at 1024 px; as a PNG three to four times as
    much.
    """
    rng = np.random.default_rng([number, side])
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)).astype(np.float32) * side
    frequency[0, 0] = np.inf

    def noise(exponent: float) -> np.ndarray:
        spectrum = np.fft.rfft2(rng.standard_normal((side, side), np.float32)) / frequency**exponent
        values = np.fft.irfft2(spectrum, s=(side, side))
        return (values / values.std()).astype(np.float32)

    y, x = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
    luma = 118 + 50 * noise(1.5) + rng.normal(0, 40) * x + rng.normal(0, 40) * y
    for _ in range(12):
        centre_x, centre_y, radius = rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5), rng.uniform(0.05, 0.35)
        luma += rng.normal(0, 40) * ((x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2)
    blue, red = (15 * noise(1.8) for _ in range(2))
    rgb = np.stack([luma + red, luma - 0.34 * blue - 0.71 * red, luma + blue], 2)
    rgb += rng.standard_normal(rgb.shape, np.float32)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def drawn(work: Path, side: int, count: int, suffix: str = ".bmp") -> Path:
    """A folder in `work` with `count` pictures in ten classes, made if it is not there yet."""
    folder = work / f"pictures-{side}{suffix}"
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    names = [f"{i:05d}{suffix}" for i in range(count)]
    with progress(count, f"drawing pictures of {side} px") as bar:
        for i, name in enumerate(names):
            Image.fromarray(draw(i, side)).save(folder / name, **_SAVE.get(suffix, {}))
            bar.update()
    labels = [[name, i % CLASSES] for i, name in enumerate(names)]
    (folder / LABELS).write_text(json.dumps({"labels": labels}))
    return folder
