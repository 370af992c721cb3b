"""datasets/decode.py: every codec and number of channels; whatever is not a whole image is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from styleloom.datasets.decode import decode


def picture(channels: int) -> np.ndarray:
    """uint8 [H=6, W=10, C], smooth, so that lossy codecs stay close."""
    y, x, c = np.meshgrid(np.arange(6), np.arange(10), np.arange(channels), indexing="ij")
    return (100 + 10 * x + 5 * y - 20 * c).astype(np.uint8)


def encode(pixels: np.ndarray, codec: str) -> bytes:
    file = io.BytesIO()
    options = {"png": {}, "jpeg": {"quality": 100, "subsampling": 0}, "webp": {"quality": 100}}[codec]
    Image.fromarray(pixels.squeeze()).save(file, codec, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("codec", "channels", "tolerance"),
    [("png", 1, 0), ("png", 3, 0), ("png", 4, 0), ("jpeg", 1, 3), ("jpeg", 3, 4), ("webp", 3, 6), ("webp", 4, 6)],
)
def test_pixels(codec, channels, tolerance):
    pixels = picture(channels)
    image = decode(encode(pixels, codec), codec, channels)
    assert image.shape == (channels, 6, 10)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert np.abs(image.astype(int) - pixels.transpose(2, 0, 1)).max() <= tolerance


def test_webp_that_dropped_an_opaque_alpha_gets_it_back():
    pixels = picture(4)
    pixels[..., 3] = 255
    assert (decode(encode(pixels, "webp"), "webp", 4)[3] == 255).all()


def test_webp_grey():
    grey = picture(1).repeat(3, axis=2)
    assert np.abs(decode(encode(grey, "webp"), "webp", 1)[0].astype(int) - grey[..., 0]).max() <= 6


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    "spoil", [lambda d: b"", lambda d: d[: len(d) // 2], lambda d: b"x" * 50], ids=["empty", "cut", "other"]
)
def test_broken_bytes_are_refused(codec, spoil):
    with pytest.raises(ValueError, match=f"not a whole {codec.upper()} image of"):
        decode(spoil(encode(picture(3), codec)), codec, 3)


def test_another_format_or_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="not a whole JPEG"):
        decode(encode(picture(3), "png"), "jpeg", 3)
    with pytest.raises(ValueError, match="not a whole PNG"):
        decode(encode(picture(3), "jpeg"), "png", 3)
    with pytest.raises(ValueError, match="stored as RGBA, not as RGB"):
        decode(encode(picture(4), "png"), "png", 3)
    with pytest.raises(ValueError, match="stored as Gray, not with 3"):
        decode(encode(picture(1), "jpeg"), "jpeg", 3)
    with pytest.raises(ValueError, match="cannot decode 'gif'"):
        decode(b"", "gif", 3)
