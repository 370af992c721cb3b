"""Whether images are all of one kind, to be taken as they are, and into what form to bring them if not."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .pictures import Form, check_form
from .scan import Kind

_CODECS = ("jpeg", "png", "webp")
_NAMES = {1: "grey", 3: "colour", 4: "with alpha"}


@dataclass(frozen=True)
class Wish:
    """What the images of a set are to be."""

    width: int | None = None
    """Pixels; None, as `height`: as they are."""
    height: int | None = None
    channels: int | None = None
    """1, 3 or 4; None: as they are, or colour if they differ."""
    resize: str = "lanczos"
    background: str | None = "#ffffff"


class Agreed(NamedTuple):
    """What the images of a set are, by the names of the manifest."""

    width: int
    height: int
    channels: int
    codec: str
    resize: str
    background: str | None
    conform: bool
    """They are to be brought into this form as they are read."""


def check_wish(wish: Wish) -> Wish:
    """The wish. Raises ValueError, by the names of the command line, if nothing can be like that."""
    width, height = (1 if side is None else side for side in (wish.width, wish.height))
    _form(wish, width, height, 3 if wish.channels is None else wish.channels)
    return wish


def _form(wish: Wish, width: int, height: int, channels: int) -> Form:
    return check_form(Form(width, height, channels, "png", None, wish.resize, wish.background))


def agree(kinds: Counter[Kind], wish: Wish, where: str) -> Agreed:
    """What images of these kinds (with how many there are of each) become. where: their source, for the message.

    Raises ValueError, suggesting a size, if they differ and none is wished for.
    """
    codecs, channels = {kind.codec for kind in kinds}, {kind.channels for kind in kinds}
    first = next(iter(kinds))
    size = (first.width, first.height)
    as_wished = wish.channels in (None, first.channels) and (wish.width, wish.height) in ((None, None), size)
    if as_wished and not differences(kinds):
        return Agreed(*size, first.channels, first.codec, "unknown", None, False)
    if wish.width is None or wish.height is None:
        width, height = _suggest(kinds)
        other = differences(kinds) or [f"not of {wish.channels} channels"]
        advice = f"{width}" if width == height else f"{width}x{height}"
        raise ValueError(
            f"the {kinds.total():,} images of {where} cannot be taken as they are: {'; '.join(other)}.\n"
            f"Say --resolution, such as --resolution {advice}: each is then brought to that size as it is read."
        )
    form = _form(wish, wish.width, wish.height, wish.channels or (1 if channels == {1} else 3))
    codec = first.codec if len(codecs) == 1 and first.codec in _CODECS else "mixed"
    return Agreed(form.width, form.height, form.channels, codec, form.resize, form.background, True)


def differences(kinds: Counter[Kind]) -> list[str]:
    """In what images of these kinds differ, or why their pixels cannot be taken as they are decoded."""
    sizes = sorted({(kind.width, kind.height) for kind in kinds}, key=lambda size: (size[0] * size[1], size))
    (w0, h0), (w1, h1) = sizes[0], sizes[-1]
    found = [f"{len(sizes):,} sizes from {w0}x{h0} to {w1}x{h1}"] if len(sizes) > 1 else []
    codecs = _counted(kinds, lambda kind: kind.codec)
    if len(codecs) > 1:
        found.append(", ".join(f"{number:,} {codec}" for codec, number in codecs))
    channels = [(name, number) for name, number in _counted(kinds, lambda kind: _NAMES.get(kind.channels, "")) if name]
    if len(channels) > 1:
        found.append(", ".join(f"{number:,} {name}" for name, number in channels))
    return found + [f"{number:,} {what}" for what, number in _counted(kinds, lambda kind: kind.obstacle) if what]


def _counted(kinds: Counter[Kind], what: Callable[[Kind], str]) -> list[tuple[str, int]]:
    """How many images have each property, the most frequent first."""
    counts: Counter[str] = Counter()
    for kind, number in kinds.items():
        counts[what(kind)] += number
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _suggest(kinds: Counter[Kind]) -> tuple[int, int]:
    """The size that all have, or else the largest power of two that nine tenths of them reach."""
    sizes = {(kind.width, kind.height) for kind in kinds}
    if len(sizes) == 1:
        return sizes.pop()
    sides: Counter[int] = Counter()
    for kind, number in kinds.items():
        sides[min(kind.width, kind.height).bit_length() - 1] += number
    few, below = kinds.total() / 10, 0
    for power in sorted(sides):
        below += sides[power]
        if below > few:
            return 1 << power, 1 << power
    raise AssertionError(sides)
