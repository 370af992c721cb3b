"""Pictures of a data set: a grid of samples, and a contact sheet with what there is to know above the grid."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .decode import decode
from .manifest import Manifest, Spread, check_shard, read_manifest, tar_location
from .pictures import Form, conform
from .reader import Reader
from .statistics import STEPS, quantile
from .storage import is_remote

FILE = "contact.png"
_MOST_CELLS = 64
_SMALLEST_CELL, _LARGEST_CELL = 64, 256  # pixels, of the longer side

_WIDTH = 1100  # pixels, of a sheet: 8 cells of 128 fit
_MARGIN, _GAP = 24, 4
_TITLE, _TEXT, _SMALL = 30, 17, 14  # pixels, of the fonts
_CHART = 84  # pixels, the height of the bars' field
_FEWEST_BARS = 16
_INK, _FAINT, _BAR = (32, 34, 38), (112, 116, 124), (72, 112, 160)
_PAPER, _FIELD = (255, 255, 255), (240, 242, 245)


def sample_grid(manifest: Manifest, folder: Path) -> Image.Image:
    """RGB picture of up to 64 samples, evenly spaced over the data set. Raises ValueError on a broken shard."""
    longer = min(max(manifest.width, manifest.height, _SMALLEST_CELL), _LARGEST_CELL)
    return _grid(_samples(manifest, folder), longer, gap=0)


def contact_sheet(manifest: Manifest, folder: Path, title: str) -> Image.Image:
    """RGB picture, 1100 pixels wide: title, counts, statistics if the manifest has them, and up to 64 samples.

    Raises ValueError on a broken shard.
    """
    inner = _WIDTH - 2 * _MARGIN
    columns = _columns(min(_MOST_CELLS, manifest.count))
    cell_width = (inner + _GAP) // columns - _GAP
    longer = min(cell_width * max(manifest.width, manifest.height) // manifest.width, _LARGEST_CELL)
    grid = _grid(_samples(*_size_to_show(manifest, folder, longer)), longer, _GAP)
    header = _header(manifest, title, inner)
    sheet = Image.new("RGB", (_WIDTH, header.height + grid.height + 3 * _MARGIN), _PAPER)
    sheet.paste(header, (_MARGIN, _MARGIN))
    sheet.paste(grid, (_MARGIN, header.height + 2 * _MARGIN))
    return sheet


# Samples


def _size_to_show(manifest: Manifest, folder: Path, longer: int) -> tuple[Manifest, Path]:
    """The smallest size of the data set that is at least as large as it is shown: the quickest to decode."""
    for name in reversed(manifest.reduced):
        smaller = read_manifest(folder / name)
        if max(smaller.width, smaller.height) >= longer:
            return smaller, folder / name
    return manifest, folder


def _samples(manifest: Manifest, folder: Path) -> list[Image.Image]:
    """Evenly spaced ones, as they are stored."""
    positions = np.linspace(0, manifest.count - 1, min(_MOST_CELLS, manifest.count)).round().astype(int)
    ends = np.cumsum([shard.count for shard in manifest.shards])
    reader = Reader(str(folder), manifest, None)
    images = []
    if is_remote(tar_location(folder, manifest, manifest.shards[0])):
        raise ValueError(f"the tars are at {manifest.root}: pictures are drawn of data sets on this machine only")
    for position in positions:
        number = int(np.searchsorted(ends, position, side="right"))
        shard = manifest.shards[number]
        if number not in reader.shards:
            check_shard(folder, shard, tar_location(folder, manifest, shard))
            reader.keep([])
        data, _ = reader.read(number, int(position - ends[number] + shard.count))
        images.append(_decoded(manifest, data))
    return images


def _decoded(m: Manifest, data: bytes) -> Image.Image:
    """RGB; transparency on white."""
    if m.conform:
        pixels = conform(data, Form(m.width, m.height, m.channels, "png", None, "lanczos", m.background))
    else:
        pixels = decode(data, m.codec, m.channels).transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(pixels.squeeze(axis=2) if m.channels == 1 else pixels))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _columns(cells: int) -> int:
    return math.ceil(math.sqrt(cells))


def _grid(images: Sequence[Image.Image], longer: int, gap: int) -> Image.Image:
    """longer: pixels, the longer side of each cell."""
    cells = [_cell(image, longer) for image in images]
    columns = _columns(len(cells))
    rows = math.ceil(len(cells) / columns)
    width, height = cells[0].width + gap, cells[0].height + gap
    grid = Image.new("RGB", (columns * width - gap, rows * height - gap), _PAPER)
    for i, cell in enumerate(cells):
        grid.paste(cell, (i % columns * width, i // columns * height))
    return grid


def _cell(image: Image.Image, longer: int) -> Image.Image:
    """The image enlarged or reduced. Pixels stay pixels where they are enlarged by a whole factor."""
    has = max(image.size)
    size = max(1, round(image.width * longer / has)), max(1, round(image.height * longer / has))
    return image.resize(size, Image.Resampling.NEAREST if longer % has == 0 else Image.Resampling.LANCZOS)


# Header


def _header(manifest: Manifest, title: str, width: int) -> Image.Image:
    """Title, lines of text, a swatch of the mean colour and the charts."""
    lines = _lines(manifest)
    charts = _charts(manifest)
    at_charts = _TITLE + 16 + len(lines) * (_TEXT + 8) + 12
    height = at_charts + (_CHART + 2 * (_SMALL + 8) if charts else -12)
    header = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(header)
    room = width
    if manifest.statistics is not None:
        room -= _swatch(draw, manifest.statistics.mean_colour, width) + _MARGIN
    _write(draw, (0, 0), title, _TITLE, room)
    for i, line in enumerate(lines):
        _write(draw, (0, _TITLE + 16 + i * (_TEXT + 8)), line, _TEXT, room, _FAINT if i else _INK)
    for i, (name, counts, left, right) in enumerate(charts):
        field = (width + _MARGIN) // len(charts)
        _chart(draw, (i * field, at_charts), field - _MARGIN, name, counts, left, right)
    return header


def _lines(manifest: Manifest) -> list[str]:
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}[manifest.channels]
    quality = "" if manifest.quality is None else f" {manifest.quality}"
    classes = f", {manifest.classes:,} classes" if manifest.classes else ""
    shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards):,} shards"
    smaller = f"; also as {', '.join(manifest.reduced)}" if manifest.reduced else ""
    lines = [
        f"{manifest.count:,} images of {manifest.width}x{manifest.height}, {kind}{classes}{smaller}",
        f"stored as {manifest.codec}{quality} in {shards}, {manifest.bytes / 1e6:,.1f} MB; "
        f"{manifest.bytes / manifest.count / 1e3:,.1f} kB an image",
    ]
    if (its := manifest.statistics) is not None:
        formats = ", ".join(f"{name} ({count:,})" for name, count in sorted(its.formats.items(), key=lambda f: -f[1]))
        lines.append(f"made from pictures in {formats}")
    return lines


def _swatch(draw: ImageDraw.ImageDraw, colour: Sequence[float], right: int) -> int:
    """Draws the mean colour into the right upper corner, and returns how wide that is."""
    levels = [round(level) for level in colour]
    red, green, blue = levels[:3] if len(levels) >= 3 else levels[:1] * 3
    caption = f"mean {' '.join(map(str, levels))}"
    size = _TITLE + 26
    width = max(size, math.ceil(draw.textlength(caption, _font(_SMALL))))
    draw.rectangle((right - size, 0, right - 1, size), fill=(red, green, blue), outline=_FAINT)
    draw.text((right - 1, size + 8), caption, _FAINT, _font(_SMALL), anchor="ra")
    return width


def _charts(manifest: Manifest) -> list[tuple[str, list[int], str, str]]:
    """(name, heights of the bars, what is at the left end, at the right end) of each."""
    charts = []
    if (its := manifest.statistics) is not None:
        for name, spread, form in (
            ("width", its.width, "{:,.0f}"),
            ("height", its.height, "{:,.0f}"),
            ("aspect", its.aspect, "{:.2f}"),
        ):
            ends = [form.format(x) for x in (spread.least, quantile(spread, 0.5), spread.most)]
            told = f"{ends[0]} to {ends[2]}, median ~{ends[1]}" if spread.least < spread.most else ends[0]
            first, counts = _bars(spread)
            scale = [form.format(2 ** (step / STEPS)) for step in (first, first + len(counts))]
            charts.append((f"{name} {told}", counts, scale[0], f"{scale[1]} (log scale)"))
    if manifest.classes:
        least, most = min(manifest.class_counts), max(manifest.class_counts)
        name = f"images of a class {least:,} to {most:,}" if least < most else f"{most:,} images of each class"
        charts.append((name, manifest.class_counts, manifest.class_names[0], manifest.class_names[-1]))
    return charts


def _bars(spread: Spread) -> tuple[int, list[int]]:
    """The first step of a histogram, and the counts from there on; empty ones around them if there are few."""
    first, last = min(spread.histogram), max(spread.histogram)
    around = max(0, _FEWEST_BARS - 1 - (last - first)) // 2
    steps = range(first - around, last + around + 1)
    return steps[0], [spread.histogram.get(step, 0) for step in steps]


def _chart(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, name: str, counts: Sequence[int], left: str, right: str
) -> None:
    """Bars in a field, its name above, the ends of its scale below."""
    x, y = at
    _write(draw, (x, y), name, _SMALL, width, _FAINT)
    y += _SMALL + 8
    draw.rectangle((x, y, x + width - 1, y + _CHART - 1), fill=_FIELD)
    heights = _pooled(counts, width // 2)
    most = max(heights)
    for i, height in enumerate(heights):
        if height:
            begin, end = x + i * width // len(heights), x + (i + 1) * width // len(heights)
            top = y + _CHART - max(1, round((_CHART - 6) * height / most))
            draw.rectangle((begin, top, max(begin, end - 2), y + _CHART - 1), fill=_BAR)
    y += _CHART + 4
    _write(draw, (x, y), left, _SMALL, width // 2 - 4, _FAINT)
    _write(draw, (x + width - 1, y), right, _SMALL, width // 2 - 4, _FAINT, anchor="ra")


def _pooled(counts: Sequence[int], most: int) -> list[float]:
    """No more than `most` bars: neighbours share one, as high as they are on average."""
    if len(counts) <= most:
        return list(counts)
    edges = [i * len(counts) // most for i in range(most + 1)]
    return [sum(counts[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    room: int,
    fill: tuple[int, int, int] = _INK,
    anchor: str = "la",
) -> None:
    """Text that is cut off where there is no room, in one line."""
    text = " ".join(text.split())
    font = _font(size)
    if draw.textlength(text, font) > room:
        while text and draw.textlength(f"{text}...", font) > room:
            text = text[:-1]
        text = f"{text.rstrip()}..."
    draw.text(at, text, fill, font, anchor=anchor)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
