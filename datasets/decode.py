"""The bytes of one stored image -> pixels.

Made for the training stream: the input is what `styleloom prepare` wrote, so orientation, colour profile and size are
settled already, and the codec is known from the manifest rather than guessed ("mixed", for sets that others wrote, lets
each image say so itself). Any image of the right size and kind is read, though; only the usual ones quickly.

| codec | decoder | without it |
|---|---|---|
| jpeg | simplejpeg (libjpeg-turbo), straight into the caller's memory | it is always there |
| png | kornia-rs (the Rust crate `png`) | Pillow, at a third of the speed |
| webp | imagecodecs (libwebp), straight into the caller's memory | Pillow, at five sixths of the speed |

Of a whole image all of them give Pillow's pixels, bit for bit, and what they do not accept Pillow judges, so a run does
not depend on which of them is installed. (kornia-rs takes a PNG whose chunks are sound but whose last sum, Adler's, is
not; only a faulty writer makes those.)
"""

import functools
import importlib
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from PIL import Image

if TYPE_CHECKING:
    import torch

_MODE = {1: "L", 3: "RGB", 4: "RGBA"}
_COLORSPACE = {1: "GRAY", 3: "RGB"}
_JPEG_CHANNELS = {"Gray": 1, "YCbCr": 3, "RGB": 3}
_FORMAT = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}
_SIGNATURE = {"png": b"\x89PNG\r\n\x1a\n", "webp": b"RIFF", "jpeg": b"\xff\xd8\xff"}
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # its last chunk
_PNG_COLOUR = {1: 0, 3: 2, 4: 6}
_JPEG_END = b"\xff\xd9"
_JPEG_SCALES = 8  # libjpeg decodes to 1/2, 1/4 and 1/8
_MOST_PIXELS = 1 << 27  # of an image that memory has to be found for: a broken header must not ask for gigabytes
_BAND = 1 << 18  # bytes that are averaged at a time: they stay in a core's cache

Decoder = Callable[[np.ndarray, bytes], None]


def decode_into(out: np.ndarray, data: bytes, codec: str) -> None:
    """Decodes one image into memory that is there already, such as a row of a batch.

    An image that is 2, 4, 8, ... times as large as `out` in both directions is reduced: each pixel of `out` is the mean
    of those it covers, rounded to the nearest, each channel by itself. Only with JPEG libjpeg does that on the
    coefficients, as far as it can (1/8): it skips a part of the work, and differs a little from the mean.

    out: uint8 [H, W, C], C-contiguous, C = 1 (grey), 3 (RGB) or 4 (RGBA); after an error its contents are undefined.
    codec: "png", "jpeg", "webp", or "mixed", which goes by the image's first bytes.
    Raises ValueError, saying what is wrong, if `data` is not a whole image of that codec and number of channels, or of
    another size.
    """
    assert (out.dtype, out.ndim) == (np.uint8, 3)
    assert out.flags.carray  # C-contiguous and writeable
    codec = _recognised(data, codec, out.shape[2])
    factor = _factor(_size(data, codec), (out.shape[0], out.shape[1]))
    scale = min(factor, _JPEG_SCALES) if codec == "jpeg" else 1
    factor //= scale
    height, width, channels = out.shape
    pixels = out if factor == 1 else np.empty((height * factor, width * factor, channels), dtype=np.uint8)
    _fill(pixels, data, codec, scale)
    if factor > 1:
        _average(out, pixels, factor)


def decode(data: bytes, codec: str, channels: int) -> np.ndarray:
    """Decodes one image.

    data: the encoded image; codec: "png", "jpeg", "webp" or "mixed"; channels: 1 (grey), 3 (RGB) or 4 (RGBA).
    Returns uint8 [C, H, W], contiguous and owned by the caller, 0 to 255.
    Raises ValueError, saying what is wrong, if `data` is not a whole image of that codec and number of channels.
    """
    codec = _recognised(data, codec, channels)
    height, width = _size(data, codec)
    if height * width > _MOST_PIXELS:
        raise ValueError(f"an image of {width}x{height} pixels is too large to decode (at most {_MOST_PIXELS:,})")
    pixels = np.empty((height, width, channels), dtype=np.uint8)
    _fill(pixels, data, codec, scale=1)
    return np.array(pixels.transpose(2, 0, 1), order="C")


def decode_on_device(data: Sequence[bytes], channels: int, device: "torch.device | str") -> "torch.Tensor":
    """Decodes a batch of JPEG images on a device: by nvJPEG on an NVIDIA GPU, by libjpeg on "cpu".

    Only "cpu" promises the pixels of `decode`: nvJPEG may round, and enlarge subsampled colour, in ways of its own. Nor
    need damage within the image be noticed here (content hashes are for that); a missing end is.

    data: n >= 1 encoded images of one size; channels: 1 (grey) or 3 (RGB).
    Returns uint8 [n, C, H, W] on `device`.
    Raises ValueError, naming the image by its number, if one is not a whole JPEG image of that number of channels, or
    of another size than the first.
    """
    # These take seconds and 170 MB, which those who prepare, inspect or decode on the CPU can spare.
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    height = width = 0
    for number, image in enumerate(data):
        try:
            if number == 0:
                height, width = _size(image, "jpeg")
            check_jpeg(image, width, height, channels)
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from None
    encoded = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image in data]
    try:
        images = decode_jpeg(encoded, ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB, device=device)
    except RuntimeError:
        for number, image in enumerate(data):
            _check_whole(image, channels, number)
        raise  # whatever failed, it was not the images
    return torch.stack(list(images)).to(device)  # where there is no nvJPEG, torchvision decodes on the CPU


def decoders() -> dict[str, str]:
    """Codec -> the library that decodes it in this process (see above: it makes no difference but for the speed)."""
    names = {"jpeg": "simplejpeg"}
    for codec, (library, _) in _LIBRARIES.items():
        names[codec] = library if _quick(codec) else "Pillow"
    return names


def _recognised(data: bytes, codec: str, channels: int) -> str:
    """The codec, found from the first bytes where it is "mixed"."""
    if codec == "mixed":
        codec = next((name for name, start in _SIGNATURE.items() if data.startswith(start)), "")
        if not codec:
            raise ValueError(f"the {len(data)} bytes are neither a PNG nor a JPEG nor a WebP image")
    if codec not in _FORMAT or channels not in _MODE:
        raise ValueError(f"cannot decode {codec!r} with {channels} channels")
    return codec


class _complaints:  # noqa: N801 (a context manager; as a class it costs a tenth of one made by contextlib)
    """Completes what decoders say of broken bytes."""

    def __init__(self, data: bytes, codec: str) -> None:
        self.data, self.codec = data, codec

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, MemoryError):
            return  # nothing, or of this machine and not of this image
        # Decoders meet broken bytes with errors of every kind.
        reason = f"{error}" or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "its header is broken"
        raise ValueError(f"not a whole {self.codec.upper()} image of {len(self.data)} bytes: {reason}") from None


def _size(data: bytes, codec: str) -> tuple[int, int]:
    """(height, width) as the header has it."""
    with _complaints(data, codec):
        if codec == "jpeg":
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
        elif codec == "png":
            width, height = _png_size(data)
        else:
            width, height, _, _ = _webp_header(data)
    return int(height), int(width)


def _factor(stored: tuple[int, int], wanted: tuple[int, int]) -> int:
    """How many times, 1, 2, 4, 8, ..., an image of the (height, width) `stored` is as large as `wanted`."""
    factor = stored[0] // wanted[0]
    reducible = factor.bit_count() == 1 and stored == (wanted[0] * factor, wanted[1] * factor)
    if not reducible or (factor > 1 and stored[0] * stored[1] > _MOST_PIXELS):
        raise ValueError(
            f"an image of {stored[1]}x{stored[0]} pixels, not of {wanted[1]}x{wanted[0]} or 2, 4, 8, ... times as much"
        )
    return factor


def _fill(out: np.ndarray, data: bytes, codec: str, scale: int) -> None:
    """Decodes into uint8 [H, W, C] an image whose header says [H * scale, W * scale]; `scale` is 1 but for JPEG."""
    with _complaints(data, codec):
        if codec == "jpeg":
            _decode_jpeg(out, data, scale)
        elif not _decode_quickly(out, data, codec):
            _decode_pillow(out, data, codec)


def _average(out: np.ndarray, pixels: np.ndarray, factor: int) -> None:
    """Means of squares of factor * factor pixels, halves rounded to even: up, they would brighten by 1/8 level for 2.

    out: uint8 [H, W, C]; pixels: uint8 [H * factor, W * factor, C]; factor: 2, 4, 8, ....
    """
    height, width, channels = out.shape
    dtype = np.uint16 if factor <= 16 else np.uint32  # 16 * 16 * 255 is just below 2^16
    count, shift = factor * factor, 2 * (factor.bit_length() - 1)
    band = max(1, _BAND // (count * width * channels))
    for top in range(0, height, band):
        sums = pixels[top * factor : (top + band) * factor]
        while sums.shape[1] > width:
            sums = _halved(sums, dtype)
        sums += (sums >> shift) & 1
        sums += count // 2 - 1
        sums >>= shift
        out[top : top + band] = sums


def _halved(values: np.ndarray, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Sums of squares of 2 * 2 pixels: [2 H, 2 W, C] -> dtype [H, W, C]."""
    rows = np.add(values[0::2], values[1::2], dtype=dtype)  # [H, 2 W, C]
    sums = np.empty((rows.shape[0], rows.shape[1] // 2, rows.shape[2]), dtype)
    for c in range(rows.shape[2]):  # NumPy is slow where the innermost axis has three values
        np.add(rows[:, 0::2, c], rows[:, 1::2, c], out=sums[..., c])
    return sums


def _decode_jpeg(out: np.ndarray, data: bytes, scale: int) -> None:
    channels = out.shape[2]
    _check_jpeg_channels(data, channels)
    # Strict by default: what libjpeg would only warn of, such as a missing end, is an error.
    pixels = simplejpeg.decode_jpeg(
        data, _COLORSPACE[channels], min_height=out.shape[0], min_width=out.shape[1], min_factor=scale, buffer=out
    )
    if pixels.shape != out.shape:
        raise ValueError(f"it decodes to {pixels.shape[1]}x{pixels.shape[0]} pixels")


def _check_jpeg_channels(data: bytes, channels: int) -> None:
    stored = simplejpeg.decode_jpeg_header(data)[2]
    if _JPEG_CHANNELS.get(str(stored)) != channels:
        raise ValueError(f"it is stored as {stored}, not with {channels} channels")


def check_jpeg(data: bytes, width: int, height: int, channels: int) -> None:
    """What can be seen of a JPEG image without decoding it: its size (pixels), its channels, and that it has an end.

    Raises ValueError if they are others.
    """
    stored = _size(data, "jpeg")
    with _complaints(data, "jpeg"):
        _check_jpeg_channels(data, channels)
        if data.rfind(_JPEG_END) < 0:
            raise ValueError("its end is missing")
    if stored != (height, width):
        raise ValueError(f"an image of {stored[1]}x{stored[0]} pixels, not of {width}x{height}")


def _check_whole(data: bytes, channels: int, number: int) -> None:
    try:
        decode(data, "jpeg", channels)
    except ValueError as error:
        raise ValueError(f"image {number}: {error}") from None


def _png_size(data: bytes) -> tuple[int, int]:
    """(width, height)"""
    if not data.startswith(_SIGNATURE["png"]) or data[12:16] != b"IHDR" or len(data) < 33:
        raise ValueError("it does not begin as one")
    if _PNG_END not in data[-16:] and _PNG_END not in data:
        raise ValueError("its end is missing")
    return struct.unpack_from(">II", data, 16)


def _webp_header(data: bytes) -> tuple[int, int, bool, bool]:
    """(width, height, with alpha, animated), of the still picture or the canvas."""
    kind = data[12:16]
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < (25 if kind == b"VP8L" else 30):
        raise ValueError("it does not begin as one")
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return width, height, bool(data[20] & 0x10), bool(data[20] & 0x02)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1), False
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF, False, False
    raise ValueError("it does not begin as one")


def _decode_quickly(out: np.ndarray, data: bytes, codec: str) -> bool:
    """Decodes a PNG or WebP image of the kind that `styleloom prepare` writes by the faster library.

    False, with anything in `out`, if there is none, or if it cannot do that: then Pillow is to judge.
    """
    channels = out.shape[2]
    if codec == "png":
        # 8 bits, of the wanted kind, not interlaced
        usual = data[24] == 8 and data[25] == _PNG_COLOUR[channels] and data[28] == 0
    else:
        _, _, alpha, animated = _webp_header(data)
        usual = not animated and channels == (4 if alpha else 3)
    quick = _quick(codec) if usual else None
    if quick is None:
        return False
    try:
        quick(out, data)
    except Exception:
        return False
    return True


@functools.cache
def _quick(codec: str) -> Decoder | None:
    """The faster decoder for "png" or "webp"; None where it is not installed, or does not do what it should."""
    sample = (np.arange(4 * 5 * 4, dtype=np.uint8) * 3).reshape(4, 5, 4)[..., :3].copy()
    file, out = io.BytesIO(), np.zeros_like(sample)
    try:
        quick = _LIBRARIES[codec][1]()
        Image.fromarray(sample).save(file, _FORMAT[codec], lossless=True)
        quick(out, file.getvalue())
    except Exception:  # the interfaces of young libraries change
        return None
    return quick if np.array_equal(out, sample) else None


def _kornia() -> Decoder:
    decode_png = importlib.import_module("kornia_rs").io.decode_image_png_u8
    modes = {1: "mono", 3: "rgb", 4: "rgba"}

    def into(out: np.ndarray, data: bytes) -> None:
        try:
            out[...] = decode_png(data, out.shape[:2], modes[out.shape[2]])
        except BaseException as error:
            # A panic of Rust, which no fuzzing brought about so far, would not be an Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{error}") from None

    return into


def _imagecodecs() -> Decoder:
    decode_webp = importlib.import_module("imagecodecs").webp_decode
    return lambda out, data: decode_webp(data, out=out)


_LIBRARIES = {"png": ("kornia-rs", _kornia), "webp": ("imagecodecs", _imagecodecs)}


def _decode_pillow(out: np.ndarray, data: bytes, codec: str) -> None:
    channels = out.shape[2]
    if codec == "png":
        _check_png_sums(data)
    # Only the codec's own reader: whatever else the bytes might be is not what the manifest promises.
    with Image.open(io.BytesIO(data), formats=[_FORMAT[codec]]) as image:
        if image.size != (out.shape[1], out.shape[0]):
            raise ValueError(f"it decodes to {image.size[0]}x{image.size[1]} pixels")
        image.load()
        mode = image.mode
        if codec == "webp" and channels != 3 and mode == "RGB":
            # WebP stores grey as colour, and drops an alpha that is opaque throughout.
            image = image.convert(_MODE[channels])
        elif mode != _MODE[channels]:
            raise ValueError(f"it is stored as {mode}, not as {_MODE[channels]}")
        out[...] = np.asarray(image).reshape(out.shape)


def _check_png_sums(data: bytes) -> None:
    """Pillow does not look at the check sums of the pixels."""
    view, at, kind = memoryview(data), 8, b""
    while kind != b"IEND":
        if len(data) < at + 12:
            raise ValueError("it ends too early")
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if len(data) < end + 4:
            raise ValueError("it ends too early")
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError("a check sum is wrong")
        at = end + 4
