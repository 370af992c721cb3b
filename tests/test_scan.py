"""datasets/scan.py: what an image's header tells, held against what reading the image does."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from styleloom.datasets.decode import decode
from styleloom.datasets.pictures import Form, conform
from styleloom.datasets.scan import Kind, Reading, Task, finished, judge, scan_tar
from styleloom.datasets.tars import Rules

WIDTH, HEIGHT = 10, 6


def pixels(mode: str) -> Image.Image:
    shape = {"L": (HEIGHT, WIDTH), "RGB": (HEIGHT, WIDTH, 3), "RGBA": (HEIGHT, WIDTH, 4), "CMYK": (HEIGHT, WIDTH, 4)}
    rng = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (HEIGHT, WIDTH), np.uint16))
    values = rng.integers(0, 256, shape.get(mode, (HEIGHT, WIDTH, 3)), np.uint8)
    return (
        Image.fromarray(values, mode if mode == "CMYK" else None).convert(mode)
        if mode != "LA"
        else (Image.merge("LA", [pixels("L"), pixels("L").rotate(180)]))
    )


def encoded(mode: str, format_: str, **options) -> bytes:
    file = io.BytesIO()
    pixels(mode).save(file, format_, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def profile(name: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()  # type: ignore[arg-type]


def deep_png() -> bytes:
    """RGB of 16 bits a channel, which Pillow reads, but does not write."""
    rows = b"".join(b"\0" + bytes(range(WIDTH * 6)) for _ in range(HEIGHT))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


SRGB, LAB = profile("sRGB"), profile("LAB")
PLAIN = {
    "jpeg": ("RGB", "JPEG", {}),
    "grey jpeg": ("L", "JPEG", {}),
    "progressive jpeg": ("RGB", "JPEG", {"progressive": True}),
    "png": ("RGB", "PNG", {}),
    "grey png": ("L", "PNG", {}),
    "png with alpha": ("RGBA", "PNG", {}),
    "webp": ("RGB", "WEBP", {"quality": 80}),
    "webp with alpha": ("RGBA", "WEBP", {"lossless": True}),
    "in sRGB": ("RGB", "JPEG", {"icc_profile": SRGB}),
    "png in sRGB": ("RGB", "PNG", {"icc_profile": SRGB}),
    "a profile that is broken": ("RGB", "JPEG", {"icc_profile": b"rubbish"}),
    "a profile of other pixels": ("RGB", "JPEG", {"icc_profile": LAB}),
    "upright by EXIF": ("RGB", "JPEG", {"exif": exif(1)}),
    "an orientation that is none": ("RGB", "JPEG", {"exif": exif(9)}),
    "png with EXIF": ("RGB", "PNG", {"exif": exif(1)}),
    "broken EXIF": ("RGB", "JPEG", {"exif": b"Exif\0\0II*\0rubbish"}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_can_be_taken_as_it_is_decoded(name):
    mode, format_, options = PLAIN[name]
    data = encoded(mode, format_, **options)
    codec, channels = format_.lower(), len(mode)
    assert judge(data) == Kind(codec, channels, WIDTH, HEIGHT, "")
    # It is true: decoding gives what converting would, up to the rounding of two JPEG decoders and of profiles.
    form = Form(WIDTH, HEIGHT, channels, "png", None, "lanczos", None if channels == 4 else "#ffffff")
    one, other = decode(data, codec, channels).transpose(1, 2, 0), conform(data, form)
    assert np.abs(one.astype(int) - other).max() <= (3 if format_ == "JPEG" or options else 0)


OBSTACLES = {
    "turned by EXIF": [("RGB", "JPEG", {"exif": exif(6)}), ("RGB", "PNG", {"exif": exif(3)}),
                       ("RGB", "WEBP", {"exif": exif(8)})],
    "of mode CMYK": [("CMYK", "JPEG", {})],
    "of mode P": [("P", "PNG", {})],
    "of mode 1": [("1", "PNG", {})],
    "of mode LA": [("LA", "PNG", {})],
    "of mode I;16": [("I;16", "PNG", {})],
    "with a transparent colour": [("RGB", "PNG", {"transparency": (1, 2, 3)}), ("L", "PNG", {"transparency": 7})],
    "stored as GIF": [("L", "GIF", {})],
    "stored as BMP": [("RGB", "BMP", {})],
    "stored as TIFF": [("RGB", "TIFF", {})],
}  # fmt: skip


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_has_to_be_converted(obstacle):
    for mode, format_, options in OBSTACLES[obstacle]:
        assert judge(encoded(mode, format_, **options)).obstacle == obstacle


def test_the_size_is_that_of_the_picture_upright():
    assert judge(encoded("RGB", "JPEG", exif=exif(6)))[2:4] == (HEIGHT, WIDTH)
    assert judge(encoded("RGB", "JPEG", exif=exif(3)))[2:4] == (WIDTH, HEIGHT)
    assert judge(encoded("RGB", "TIFF", tiffinfo={0x0112: 6}))[2:4] == (HEIGHT, WIDTH)


def test_16_bits_a_channel():
    assert judge(deep_png()) == Kind("png", 3, WIDTH, HEIGHT, "of 16 bits a channel")


def test_a_wide_gamut():
    """sRGB with the red and green primaries exchanged stands for all other profiles."""
    swapped = SRGB.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")
    assert judge(encoded("RGB", "JPEG", icc_profile=swapped)).obstacle == "with a colour profile other than sRGB"
    assert judge(encoded("RGB", "PNG", icc_profile=swapped)).obstacle == "with a colour profile other than sRGB"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"x", "not a picture in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture in a known format"),
        (encoded("RGB", "JPEG")[:50], ""),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), ""),
    ],
)
def test_what_is_no_picture(data, reason):
    with pytest.raises(ValueError, match=reason or ".") as caught:
        judge(data)
    assert str(caught.value)


def test_floating_point_pixels():
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(file, "TIFF")
    with pytest.raises(ValueError, match="floating-point pixels"):
        judge(file.getvalue())


def test_only_the_header_is_read():
    data = encoded("RGB", "JPEG")
    assert judge(data[:-20]) == judge(data)


def scanned(path: Path, data: bytes) -> Task:
    """A tar of one image, read."""
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("1.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    task = Task(path.name, str(path), None, Reading(Rules(), "auto"), path.parent)
    scan_tar(task, lambda *_: None)
    return task


def test_a_record_of_another_array(tmp_path):
    """As a kill leaves it that came between the two: the array is replaced first."""
    task = scanned(tmp_path / "a.tar", encoded("RGB", "PNG"))
    assert finished(task) is not None
    old = task.record.read_bytes()
    scanned(tmp_path / "a.tar", encoded("L", "PNG"))
    assert finished(task) is not None
    task.record.write_bytes(old)
    assert finished(task) is None
