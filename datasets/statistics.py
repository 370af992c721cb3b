"""What pictures are like, counted shard by shard: whole numbers that add up to the same whatever the order.

Of an image's colours no more than 256 x 256 pixels are looked at, evenly spaced, in the smallest size that is written:
a thousandth or so of the work, where all pixels of a large image would be a tenth.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from PIL import Image
from pydantic import BaseModel, ConfigDict

from .manifest import Spread, Statistics

_LOOKED_AT = 256  # pixels a side
STEPS = 8  # bars of a `Spread` for each octave


class Census(BaseModel):
    """The pictures of one shard. Any number of these add up to a `Statistics`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Spread
    height: Spread
    aspect: Spread
    formats: dict[str, int]
    levels: list[list[int]]
    """For each channel of the images, how many of the pixels looked at have each value from 0 to 255."""


def thumbnail(image: Image.Image) -> Image.Image:
    """The pixels of an image that are looked at: at most 256 x 256, evenly spaced, as they are."""
    if max(image.size) <= _LOOKED_AT:
        return image
    return image.resize((min(image.width, _LOOKED_AT), min(image.height, _LOOKED_AT)), Image.Resampling.NEAREST)


class Counts:
    """Counts the pictures of a shard one by one."""

    def __init__(self) -> None:
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._formats: Counter[str] = Counter()
        self._levels: list[int] = []

    def add(self, width: int, height: int, format_: str, thumbnail: Image.Image) -> None:
        """width, height: of the picture, upright, in pixels; format_: such as JPEG; thumbnail: of the image."""
        self._sizes[width, height] += 1
        self._formats[format_] += 1
        levels = thumbnail.histogram()
        self._levels = [a + b for a, b in zip(self._levels, levels, strict=True)] if self._levels else levels

    def census(self) -> Census | None:
        """All that was counted; None if that is nothing."""
        if not self._sizes:
            return None
        return Census(
            width=_spread((w, n) for (w, _), n in self._sizes.items()),
            height=_spread((h, n) for (_, h), n in self._sizes.items()),
            aspect=_spread((w / h, n) for (w, h), n in self._sizes.items()),
            formats=dict(sorted(self._formats.items())),
            levels=[self._levels[at : at + 256] for at in range(0, len(self._levels), 256)],
        )


def _spread(values: Iterable[tuple[float, int]]) -> Spread:
    """values: (number, how often)."""
    counted = list(values)
    histogram: Counter[int] = Counter()
    for x, n in counted:
        histogram[math.floor(STEPS * math.log2(x))] += n
    numbers = [x for x, _ in counted]
    return Spread(least=min(numbers), most=max(numbers), histogram=dict(sorted(histogram.items())))


def add_up(parts: Sequence[Census]) -> Statistics:
    """The statistics of the pictures of all parts, of which there is at least one."""
    formats = sum((Counter(part.formats) for part in parts), Counter())
    channels = [
        [sum(counts) for counts in zip(*each, strict=True)]
        for each in zip(*(part.levels for part in parts), strict=True)
    ]
    moments = [_moments(levels) for levels in channels]
    return Statistics(
        width=_joined([part.width for part in parts]),
        height=_joined([part.height for part in parts]),
        aspect=_joined([part.aspect for part in parts]),
        formats=dict(sorted(formats.items())),
        mean_colour=[round(mean, 3) for mean, _ in moments],
        std_colour=[round(deviation, 3) for _, deviation in moments],
    )


def _joined(spreads: Sequence[Spread]) -> Spread:
    histogram = sum((Counter(spread.histogram) for spread in spreads), Counter())
    return Spread(
        least=min(spread.least for spread in spreads),
        most=max(spread.most for spread in spreads),
        histogram=dict(sorted(histogram.items())),
    )


def _moments(levels: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of values that occur `levels[value]` times. Exact until the last division."""
    count = sum(levels)
    first = sum(value * n for value, n in enumerate(levels))
    second = sum(value * value * n for value, n in enumerate(levels))
    return first / count, math.sqrt((second * count - first * first) / (count * count))


def quantile(spread: Spread, share: float) -> float:
    """About the number below which a share of the pictures lie: from the histogram, to an eighth of an octave."""
    wanted = share * sum(spread.histogram.values())
    below = 0
    for step, count in sorted(spread.histogram.items()):
        below += count
        if below >= wanted:
            return min(max(2 ** ((step + 0.5) / STEPS), spread.least), spread.most)
    return spread.most
