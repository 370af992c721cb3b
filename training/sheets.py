"""Pictures of several images with words beside them."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SMALLEST_FONT = 9  # px, of what can still be read
_LONGEST_SIDE = 16384  # px; more is of no use to a viewer


def picture(image: np.ndarray) -> Image.Image:
    """uint8 [C, H, W], C 1, 3 or 4 -> L, RGB or RGBA."""
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def on_white(image: Image.Image) -> Image.Image:
    """RGB of a picture of any mode; what is transparent becomes white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def table(
    cells: Sequence[Sequence[np.ndarray | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    min_side: int = 96,
    sources: bool = False,
) -> Image.Image:
    """A table of images with a name beside each row and above each column.

    Args:
        cells: for each row, uint8 [C, H, W] for each column, all of one shape; None leaves a place empty.
        rows, columns: their names. Those of a row or column that are too long for it are written smaller, then cut.
        min_side: images are enlarged by a whole factor until their smaller side has so many px. If the table became
            longer than 16384 px, they are reduced instead.
        sources: set the first row and column apart from the rest.

    Returns:
        RGB.
    """
    _, H, W = next(x for row in cells for x in row if x is not None).shape
    scale: float = math.ceil(min_side / min(H, W))
    limit = _LONGEST_SIDE / max(len(columns) * W, len(rows) * H)
    if scale > limit:
        scale = math.floor(limit) if limit >= 1 else limit
    w, h = max(1, round(W * scale)), max(1, round(H * scale))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    size = max(_SMALLEST_FONT + 2, min(w, h) // 7)
    fonts = _font(rows, 3 * w, size), _font(columns, w - 4, size)
    margin = math.ceil(max(fonts[0].getlength(name) for name in rows)) + size if any(rows) else 0
    margin = min(margin, 3 * w + size)
    top = size * 2 if any(columns) else 0
    gap = max(2, size // 3) if sources else 0
    sheet = Image.new("RGB", (margin + len(columns) * w + gap, top + len(rows) * h + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for j, name in enumerate(columns):
        x = margin + j * w + gap * (j > 0)
        draw.text((x + w / 2, top / 2), _cut(name, fonts[1], w - 4), "black", fonts[1], anchor="mm")
    for i, (name, row) in enumerate(zip(rows, cells, strict=True)):
        y = top + i * h + gap * (i > 0)
        draw.text((margin - size // 2, y + h / 2), _cut(name, fonts[0], 3 * w), "black", fonts[0], anchor="rm")
        for j, cell in enumerate(row):
            if cell is not None:
                sheet.paste(on_white(picture(cell)).resize((w, h), how), (margin + j * w + gap * (j > 0), y))
    return sheet


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font(names: Sequence[str], width: int, size: int) -> Font:
    """The largest font, of at most `size` px, in which all names fit into `width`; the smallest if none does."""
    for px in range(size, _SMALLEST_FONT, -1):
        font = ImageFont.load_default(px)
        if max(font.getlength(name) for name in names) <= width:
            return font
    return ImageFont.load_default(_SMALLEST_FONT)


def _cut(name: str, font: Font, width: int) -> str:
    """The name, or as much of it as fits with dots behind it."""
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(name + "...") > width:
        name = name[:-1]
    return name + "..."
