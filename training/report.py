"""What a run says of itself: numbers reported anywhere, gathered once a tick; files, TensorBoard, pictures."""

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

_moments: dict[str, Tensor] = {}


@torch.no_grad()
def report(name: str, values: Tensor | float) -> None:
    """Adds values of any shape to the statistic `name`. Cheap: nothing is synchronised before `collect`."""
    x = torch.as_tensor(values, dtype=torch.float64).detach().flatten()
    moments = torch.stack([torch.full([], x.numel(), dtype=x.dtype, device=x.device), x.sum(), x.square().sum()])
    if name in _moments:
        moments = moments + _moments[name].to(moments.device)
    _moments[name] = moments


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """What the block reports is forgotten."""
    before = dict(_moments)
    try:
        yield
    finally:
        Report.load_state_dict(before)


class Report:
    """The gathered statistics as an object with state, so that a tick that was interrupted goes on after a resume."""

    @staticmethod
    def state_dict() -> dict[str, Tensor]:
        """name -> fp64 [3] = (count, sum, sum of squares) of what was reported since the last `collect`."""
        return dict(_moments)

    @staticmethod
    def merge(sum_named: Callable[[dict[str, Tensor]], dict[str, Tensor]], keep: bool) -> None:
        """Sums the statistics over all processes into the one that keeps them. To be called by every process."""
        total = sum_named(dict(_moments))
        Report.load_state_dict(total if keep else {})

    @staticmethod
    def load_state_dict(state: dict[str, Tensor]) -> None:
        _moments.clear()
        _moments.update(state)


def collect(sum_named: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, float]:
    """The mean of each statistic over all processes since the last call. To be called by every process.

    Args:
        sum_named: sums equally named tensors over the processes.
    """
    total = sum_named(dict(_moments))
    _moments.clear()
    return {name: (x[1] / x[0]).item() for name, x in sorted(total.items())}


def image_grid(images: Tensor | np.ndarray, columns: int | None = None, min_side: int = 64) -> Image.Image:
    """Images uint8 [N, C, H, W] (C 1, 3 or 4) side by side; small ones enlarged by a whole factor, to be looked at."""
    x = np.asarray(images)
    N, C, H, W = x.shape
    columns = columns or math.ceil(math.sqrt(N))
    rows = math.ceil(N / columns)
    cells = np.full([rows * columns, C, H, W], 255, dtype=np.uint8)
    cells[:N] = x
    sheet = cells.reshape(rows, columns, C, H, W).transpose(0, 3, 1, 4, 2).reshape(rows * H, columns * W, C)
    picture = Image.fromarray(sheet[:, :, 0] if C == 1 else sheet)
    factor = math.ceil(min_side / min(H, W))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def strips(rows: Sequence[tuple[str, Path]], cell: int = 128) -> Image.Image:
    """Pictures of files one under the other, each enlarged or reduced to a height of `cell` px, after its name."""
    margin, font = cell * 2 // 3, ImageFont.load_default(cell // 7)
    pictures = []
    for _, path in rows:
        with Image.open(path) as picture:
            how = Image.Resampling.NEAREST if cell % picture.height == 0 else Image.Resampling.LANCZOS
            width = round(picture.width * cell / picture.height)
            pictures.append(picture.convert("RGB").resize((width, cell), how))
    sheet = Image.new("RGB", (margin + max(x.width for x in pictures), cell * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, ((name, _), picture) in enumerate(zip(rows, pictures, strict=True)):
        sheet.paste(picture, (margin, cell * i))
        draw.text((margin - cell // 14, cell * i + cell // 2), name, "black", font, anchor="rm")
    return sheet


def to_uint8(images: Tensor) -> Tensor:
    """fp [N, C, H, W] in [-1, 1] -> uint8 in 0 to 255, rounded and clamped, on the CPU."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


class Writer:
    """`stats.jsonl`, `tb/` and `samples/` of a run's folder. For one process.

    Going on from a checkpoint forgets what an earlier try wrote after it: lines and events past `nimg`.
    """

    def __init__(self, folder: Path, nimg: int) -> None:
        self.samples = folder / "samples"
        self.samples.mkdir(parents=True, exist_ok=True)
        self.stats = folder / "stats.jsonl"
        with _naming(self.stats):
            _keep_lines_until(self.stats, nimg)
        if threading.excepthook is threading.__excepthook__:
            threading.excepthook = _told_elsewhere
        self.folder = folder / "tb"
        self.tensorboard = SummaryWriter(str(self.folder), purge_step=nimg + 1)

    def line(self, values: dict[str, Any]) -> None:
        """One object (with `nimg`) into `stats.jsonl`, its numbers into TensorBoard."""
        with _naming(self.stats), open(self.stats, "a") as file:
            # JSON has no NaN.
            finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
            file.write(json.dumps(finite, allow_nan=False) + "\n")
        with _naming(self.folder):
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.tensorboard.add_scalar(name, value, values["nimg"])
            self.tensorboard.flush()

    def picture(self, name: str, grid: Image.Image, nimg: int, shown: bool = True) -> Path:
        """A grid into `samples/NAME.png` and, to be shown, TensorBoard."""
        path = self.samples / f"{name}.png"
        temporary = path.with_suffix(".tmp")
        with _naming(path):
            grid.save(temporary, format="PNG")
            os.replace(temporary, path)
        if not shown:
            return path
        with _naming(self.folder):
            self.tensorboard.add_image(name.split("-")[0], np.asarray(grid.convert("RGB")), nimg, dataformats="HWC")
            self.tensorboard.flush()
        return path

    def close(self) -> None:
        self.tensorboard.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError of the block (a full disk) names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _told_elsewhere(fault: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands an OSError on to the next call of its writer: no need for a traceback as well."""
    if not isinstance(fault.exc_value, OSError):
        threading.__excepthook__(fault)


def _keep_lines_until(path: Path, nimg: int) -> None:
    """Drops the lines past `nimg`, and a last line that was cut."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["nimg"] <= nimg:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 7m 05s, 3h 12m, 2d 04h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s % 3600 // 60:02d}m"
    return f"{s // 86400}d {s % 86400 // 3600:02d}h"
