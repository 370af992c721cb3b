"""The bytes of one stored image -> pixels.

Made for the training stream: the input is what `styleloom prepare` wrote, so orientation, colour profile and
size are settled already, and the codec is known from the manifest rather than guessed.
"""

import io

import numpy as np
import simplejpeg
from PIL import Image

_COLORSPACE = {1: "GRAY", 3: "RGB"}
_MODE = {1: "L", 3: "RGB", 4: "RGBA"}
_FORMAT = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}


def decode(data: bytes, codec: str, channels: int) -> np.ndarray:
    """Decodes one image.

    data: the encoded image; codec: "png", "jpeg" or "webp"; channels: 1 (grey), 3 (RGB) or 4 (RGBA).
    Returns uint8 [C, H, W], contiguous and owned by the caller, 0 to 255.
    Raises ValueError, saying what is wrong, if `data` is not a whole image of that codec and number of channels.
    """
    if codec not in _FORMAT or channels not in _MODE:
        raise ValueError(f"cannot decode {codec!r} with {channels} channels")
    if codec == "jpeg" and channels in _COLORSPACE:
        pixels = _decode_jpeg(data, channels)
    else:
        pixels = _decode_pillow(data, codec, channels)
    return np.array(pixels.transpose(2, 0, 1), order="C")


def _decode_jpeg(data: bytes, channels: int) -> np.ndarray:
    """uint8 [H, W, C]. libjpeg-turbo, some three times as fast as Pillow."""
    try:
        stored = simplejpeg.decode_jpeg_header(data)[2]
        if (stored == "Gray") != (channels == 1):
            raise ValueError(f"it is stored as {stored}, not with {channels} channels")
        return simplejpeg.decode_jpeg(data, colorspace=_COLORSPACE[channels])
    except ValueError as error:
        raise ValueError(f"not a whole JPEG image of {len(data)} bytes: {error}") from None


def _decode_pillow(data: bytes, codec: str, channels: int) -> np.ndarray:
    """uint8 [H, W, C]."""
    try:
        # Only the codec's own reader: whatever else the bytes might be is not what the manifest promises.
        with Image.open(io.BytesIO(data), formats=[_FORMAT[codec]]) as image:
            image.load()
            mode = image.mode
            if codec == "webp" and channels != 3 and mode == "RGB":
                # WebP stores grey as colour, and drops an alpha that is opaque throughout.
                image = image.convert(_MODE[channels])
            elif mode != _MODE[channels]:
                raise ValueError(f"it is stored as {mode}, not as {_MODE[channels]}")
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a whole {codec.upper()} image of {len(data)} bytes: {error}") from None
    return pixels.reshape(*pixels.shape[:2], channels)
