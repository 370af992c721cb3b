"""One picture as people have it -> one image of the data set. The policy, in the order in which it is applied:

1. Of animations and multi-page files, the first picture.
2. EXIF orientation is applied.
3. 16-bit grey becomes 8-bit as round(value / 257). (Pillow itself reads 16-bit colour by its upper bytes.)
4. Palettes are expanded; transparency of any kind becomes an alpha channel.
5. An embedded ICC profile is converted to sRGB (relative colorimetric, black point compensation). One that is broken or
   does not fit the pixels is ignored and counted. CMYK without a profile is converted by Pillow's formula.
6. The largest centred crop of the target's aspect.
7. Unless alpha is kept (4 channels), it is composited on the background. Grey is Rec. 601 luma.
8. Resized with an antialiasing filter on the sRGB values, alpha premultiplied; too small pictures are enlarged, and
   counted.
"""

import functools
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

# Only what photographs come in: Pillow knows formats besides that start other programs (EPS, PDF).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_FILTER = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
_MODE = {1: "L", 3: "RGB", 4: "RGBA"}
_LONGEST_SIDE = 16383  # pixels, of WebP
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Form:
    """What the images of a data set have in common."""

    width: int
    height: int
    channels: int
    """1 (grey), 3 (RGB) or 4 (RGBA)."""
    codec: str
    """png, jpeg or webp."""
    quality: int | None
    """Of jpeg and webp, 1 to 100; None is lossless: png."""
    resize: str
    """lanczos or box."""
    background: str | None
    """#rrggbb under transparent pictures; None with 4 channels."""


def check_form(form: Form) -> Form:
    """The form with its defaults filled in: quality 95; no background under an alpha that is kept.

    Raises ValueError, by the names of the command line, if it contradicts itself.
    """
    if not (1 <= form.width <= _LONGEST_SIDE and 1 <= form.height <= _LONGEST_SIDE):
        raise ValueError(f"the resolution {form.width}x{form.height} is not within 1 to {_LONGEST_SIDE} pixels a side")
    known = {"channels": (1, 3, 4), "codec": ("png", "jpeg", "webp"), "resize": ("lanczos", "box")}
    for name, values in known.items():
        if getattr(form, name) not in values:
            raise ValueError(f"--{name} is one of {', '.join(map(str, values))}, not {getattr(form, name)}")
    if form.codec == "jpeg" and form.channels == 4:
        raise ValueError("JPEG has no alpha: use --codec png or webp, or --channels 3")
    if form.codec == "png" and form.quality is not None:
        raise ValueError("PNG is lossless and has no quality: leave --quality out, or use --codec jpeg or webp")
    quality = None if form.codec == "png" else 95 if form.quality is None else form.quality
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"--quality is 1 to 100, not {quality}")
    background = None if form.channels == 4 else form.background
    if form.channels != 4 and not _is_colour(background):
        raise ValueError(f"--background is a colour such as '#ffffff', not {background!r}")
    return Form(form.width, form.height, form.channels, form.codec, quality, form.resize, background)


def _is_colour(text: str | None) -> bool:
    digits = (text or "").removeprefix("#")
    return text == f"#{digits}" and len(digits) == 6 and all(c in "0123456789abcdefABCDEF" for c in digits)


class Picture(NamedTuple):
    """A picture brought into form, in one size or several."""

    data: list[bytes]
    """Encoded, for each form."""
    smallest: Image.Image
    """The image of the last form."""
    width: int
    """Before cropping and resizing, upright."""
    height: int
    format: str
    """PNG, JPEG, WEBP, BMP, TIFF or GIF."""
    upscaled: bool
    """It was smaller than the first form in some direction."""
    profile_ignored: bool
    """Its ICC profile was unusable."""


class Loaded(NamedTuple):
    """A picture as it was found, decoded, upright and in sRGB; not yet cropped."""

    colour: Image.Image
    """L or RGB."""
    alpha: Image.Image | None
    """L; None if nothing is transparent."""
    format: str
    """PNG, JPEG, WEBP, BMP, TIFF or GIF."""
    profile_ignored: bool
    """Its ICC profile was unusable."""


def load(data: bytes) -> Loaded:
    """Decodes a picture of any kind: steps 1 to 5 of the policy. Raises ValueError, with the reason, if that fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata and on large pictures
        try:
            image, format_, profile = _load(data)
            colour, alpha = _split(image)
            colour, ignored = _to_srgb(colour, profile)
        except MemoryError:
            raise  # of this machine, not of this picture
        except Image.UnidentifiedImageError:
            raise ValueError("empty file" if not data else "not a picture in a known format") from None
        except Exception as error:  # decoders meet broken bytes with errors of every kind
            raise ValueError(f"{error}" or type(error).__name__) from None
    return Loaded(colour, alpha, format_, ignored)


def shape(picture: Loaded, form: Form) -> Image.Image:
    """The picture cropped, composited and resized: steps 6 to 8 of the policy. L, RGB or RGBA, of the form's size."""
    return resize(cut(picture, form), form)


def cut(picture: Loaded, form: Form) -> Image.Image:
    """The picture cropped and composited: steps 6 and 7. L, RGB or RGBA; the same for all forms that differ only in
    size and have one aspect. It may be the picture itself: not to be changed."""
    box = _centre(*picture.colour.size, form)
    return _flatten(_crop(picture.colour, box), picture.alpha and _crop(picture.alpha, box), form)


def resize(image: Image.Image, form: Form) -> Image.Image:
    """A new image of the form's size, from one that `cut` made: step 8."""
    # For RGBA Pillow resizes premultiplied values.
    return image.resize((form.width, form.height), _FILTER[form.resize])


def is_enlarged(picture: Loaded, form: Form) -> bool:
    """Whether the picture is smaller than the form in some direction, once cropped."""
    left, top, right, bottom = _centre(*picture.colour.size, form)
    return right - left < form.width or bottom - top < form.height


def bring_into_forms(data: bytes, forms: Sequence[Form]) -> Picture:
    """Decodes, converts and crops a picture once; resizes that to each form, and encodes.

    forms: one or more that differ only in size and have one aspect.
    Raises ValueError, with the reason, if the picture cannot be read.
    """
    picture = load(data)
    whole = cut(picture, forms[0])
    images = [resize(whole, form) for form in forms]
    encoded = [encode(image, form) for image, form in zip(images, forms, strict=True)]
    enlarged = is_enlarged(picture, forms[0])
    return Picture(encoded, images[-1], *picture.colour.size, picture.format, enlarged, picture.profile_ignored)


def conform(data: bytes, form: Form) -> np.ndarray:
    """uint8 [height, width, channels] of a picture of any kind in the given form. Raises ValueError as `load` does."""
    return np.asarray(shape(load(data), form)).reshape(form.height, form.width, form.channels)


def _load(data: bytes) -> tuple[Image.Image, str, bytes | None]:
    """The first picture in `data`, upright, its format and its colour profile."""
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    image.load()  # before asking for the orientation: TIFF is turned by Pillow while loading
    return _upright(image), image.format or "", image.info.get("icc_profile")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a broken EXIF block says nothing about the orientation
        orientation = None
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """8-bit colour (L, RGB or CMYK) and alpha (L), if there is any."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range nothing says")
    if image.mode.startswith("I"):
        return _eight_bits(image), None
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        image = _convert(image, "LA" if grey else "RGBA")
        return image.convert("L" if grey else "RGB"), image.getchannel("A")
    if image.mode == "1":
        return image.convert("L"), None
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB"), None


# Pillow copies where nothing is to be done, which for large pictures costs about what decoding them costs.


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    return image if box == (0, 0, *image.size) else image.crop(box)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels, whose range nothing says")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """The image in L or RGB, and whether its profile was unusable."""
    transform = _transform(profile, image.mode) if profile else None
    if transform is not None:
        turned = ImageCms.applyTransform(image, transform)
        assert turned is not None  # it is only for transforms in place
        return turned, False
    return image.convert("RGB") if image.mode == "CMYK" else image, bool(profile)


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From `profile` to sRGB; None if the profile is broken or describes another kind of pixels than `mode`."""
    try:
        return ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _centre(width: int, height: int, form: Form) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the largest centred box with the form's aspect, in whole pixels."""
    w = max(1, min(width, round(height * form.width / form.height)))
    h = max(1, min(height, round(width * form.height / form.width)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _flatten(colour: Image.Image, alpha: Image.Image | None, form: Form) -> Image.Image:
    """Colour and alpha in the form's channels."""
    if form.channels == 4:
        image = colour.convert("RGBA")
        if alpha is not None:
            image.putalpha(alpha)
        return image
    if alpha is not None and form.background is not None:
        image = Image.new("RGB", colour.size, form.background)
        image.paste(_convert(colour, "RGB"), mask=alpha)
        colour = image
    return _convert(colour, _MODE[form.channels])


def encode(image: Image.Image, form: Form) -> bytes:
    """The image's bytes in the form's codec, without metadata."""
    image.info = {}  # the profile and the like are spent
    file = io.BytesIO()
    match form.codec:
        case "png":
            image.save(file, "PNG", compress_level=6)
        case "jpeg":
            image.save(file, "JPEG", quality=form.quality, subsampling="4:4:4")
        case "webp":
            image.save(file, "WEBP", quality=form.quality, method=4)
        case _:
            raise AssertionError(form.codec)
    return file.getvalue()
