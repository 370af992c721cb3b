"""datasets/decode.py: every codec and number of channels, by every library that may be there; Pillow is the reference.
Whatever is not a whole image is refused with a ValueError, and without asking for much memory."""

import contextlib
import io
import struct
import tracemalloc
import types
import zlib

import numpy as np
import pytest
from PIL import Image

from styleloom.datasets import decode as module
from styleloom.datasets.decode import decode, decode_into, decode_on_device, decoders

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
LOSSLESS = {"png": {}, "jpeg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True, "exact": True}}


def picture(channels: int) -> np.ndarray:
    """uint8 [H=6, W=10, C], smooth, so that lossy codecs stay close."""
    y, x, c = np.meshgrid(np.arange(6), np.arange(10), np.arange(channels), indexing="ij")
    return (100 + 10 * x + 5 * y - 20 * c).astype(np.uint8)


def photo(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, C]: large smooth forms, an edge, and grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 220, (5, 5, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)
    ]
    smooth = np.stack([np.asarray(plane) for plane in planes], axis=2) + rng.normal(0, 4, (height, width, channels))
    smooth[height // 3 :, width // 2 :] *= 0.6
    return smooth.clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, codec: str, **options) -> bytes:
    file = io.BytesIO()
    pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    Image.fromarray(pixels).save(file, codec, **(options or LOSSLESS[codec]))
    return file.getvalue()


def by_pillow(data: bytes, channels: int) -> np.ndarray:
    """uint8 [H, W, C], by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert(MODES[channels])).reshape(image.height, image.width, channels)


def into(data: bytes, codec: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 `shape` = [H, W, C] by `decode_into`, which must not touch what lies around it."""
    batch = np.full((3, *shape), 77, dtype=np.uint8)
    decode_into(batch[1], data, codec)
    assert (batch[[0, 2]] == 77).all()
    return batch[1]


def png(
    pixels: bytes, width: int, height: int, depth: int, colour: int, interlace: int = 0, extra: bytes = b""
) -> bytes:
    """A PNG of any kind; `pixels` has a filter byte before each row."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    parts = chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))


@pytest.fixture(params=["quick", "pillow"])
def library(request, monkeypatch):
    """Runs a test with the faster libraries, as far as they are installed, and without them."""
    if request.param == "pillow":
        monkeypatch.setattr(module, "_quick", lambda codec: None)
    return request.param


@pytest.fixture
def only_quick(monkeypatch):
    """A function that says for which codecs Pillow is out of reach from now on; skips if that leaves no decoder."""

    def forbid(codec: str) -> None:
        if decoders()[codec] == "Pillow":
            pytest.skip(f"no faster library for {codec} is installed")

        def refuse(*_):
            raise AssertionError("by Pillow")

        monkeypatch.setattr(module, "_decode_pillow", refuse)

    return forbid


@pytest.mark.parametrize("how", ["named", "mixed"])
@pytest.mark.parametrize(
    ("codec", "channels", "tolerance"),
    [("png", 1, 0), ("png", 3, 0), ("png", 4, 0), ("jpeg", 1, 3), ("jpeg", 3, 4), ("webp", 3, 0), ("webp", 4, 0)],
)
def test_pixels(codec, channels, tolerance, how, library):
    pixels = picture(channels)
    data, name = encode(pixels, codec), codec if how == "named" else how
    image = decode(data, name, channels)
    assert image.shape == (channels, 6, 10)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert np.abs(image.astype(int) - pixels.transpose(2, 0, 1)).max() <= tolerance
    assert (into(data, name, (6, 10, channels)) == image.transpose(1, 2, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (64, 48), (200, 123)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_pillows_bit_for_bit_without_pillow(size, channels, only_quick):
    pixels = photo(size[0], size[1], channels)
    files = [encode(pixels, "png", compress_level=level) for level in (0, 1, 6)] + [
        encode(pixels, "png", optimize=True)
    ]
    rows = np.concatenate([np.zeros((size[0], 1), np.uint8), pixels.reshape(size[0], -1)], axis=1)
    for kind in range(5):  # filters, whose results need not look like anything
        rows[:, 0] = kind
        files.append(png(rows.tobytes(), size[1], size[0], 8, {1: 0, 3: 2, 4: 6}[channels]))
    key = {1: b"\0\x55", 3: b"\0\x55\0\x20\0\x30"}.get(channels)
    if key:  # a transparent colour, which Pillow leaves to whoever asks
        files.append(png(rows.tobytes(), size[1], size[0], 8, {1: 0, 3: 2}[channels], extra=chunk(b"tRNS", key)))
    expected = [np.asarray(Image.open(io.BytesIO(file))).reshape(*size, channels) for file in files]
    assert (expected[0] == pixels).all()
    only_quick("png")
    for file, image in zip(files, expected, strict=True):
        assert (into(file, "png", (*size, channels)) == image).all()


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (64, 48), (9000, 2)])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 20, "method": 0}, {"lossless": True}, {"exif": b"x"}])
def test_webp_is_pillows_bit_for_bit_without_pillow(size, channels, options, only_quick):
    pixels = photo(size[0], size[1], channels)
    if channels == 4:
        pixels[:, : size[1] // 2 + 1, 3] = 0
    data = encode(pixels, "webp", **options)
    expected = by_pillow(data, channels)
    only_quick("webp")
    assert (into(data, "webp", (*size, channels)) == expected).all()


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (37, 53), (200, 123)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}])
def test_jpeg_is_pillows_bit_for_bit(size, channels, options):
    data = encode(photo(size[0], size[1], channels), "jpeg", quality=90, **options)
    assert (into(data, "jpeg", (*size, channels)) == by_pillow(data, channels)).all()


@pytest.fixture
def never_quick(monkeypatch):
    """Fails a test if it gets to one of the faster libraries."""

    def asked(codec):
        raise AssertionError("not by Pillow")

    monkeypatch.setattr(module, "_quick", asked)


def test_unusual_png_files_are_left_to_pillow(never_quick):
    deep = png(b"\0" + bytes(range(12)), 2, 1, 16, 2)  # 16 bits: the upper ones
    assert into(deep, "png", (1, 2, 3)).tolist() == [[[0, 2, 4], [6, 8, 10]]]
    fine = png(b"\0\x1b", 4, 1, 2, 0)  # 2 bits: 0, 1, 2, 3
    assert into(fine, "png", (1, 4, 1)).ravel().tolist() == [0, 85, 170, 255]
    interlaced = png(b"\0\1\2\3\0\4\5\6", 2, 1, 8, 2, interlace=1)  # of seven passes two have pixels
    assert into(interlaced, "png", (1, 2, 3)).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    with pytest.raises(ValueError, match="stored as L, not as RGB"):
        decode(encode(picture(1), "png"), "png", 3)


def animation(codec: str, **options) -> tuple[bytes, np.ndarray]:
    """Three pictures, and the first of them: uint8 [H=9, W=7, C=3]."""
    file = io.BytesIO()
    frames = [photo(9, 7, 3, seed) for seed in range(3)]
    first, *others = (Image.fromarray(frame) for frame in frames)
    first.save(file, codec, save_all=True, append_images=others, **options)
    return file.getvalue(), frames[0]


def test_of_an_animation_the_first_picture_is_read(library):
    data, first = animation("png")
    assert (into(data, "png", (9, 7, 3)) == first).all()


def test_a_png_with_two_headers_is_refused(library):
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 10, 6, 8, 2, 0, 0, 0))
    data = png((b"\0" + bytes(18)) * 10, 6, 10, 8, 2, extra=second)
    with pytest.raises(ValueError, match="not a whole PNG image"):
        into(data, "png", (10, 6, 3))


def test_unusual_webp_files_are_left_to_pillow(never_quick):
    pixels = picture(4)
    pixels[..., 3] = 255
    dropped = encode(pixels, "webp")
    assert by_pillow(dropped, 3).shape == (6, 10, 3)
    assert (into(dropped, "webp", (6, 10, 4)) == pixels).all()  # an opaque alpha is not stored
    grey = picture(1).repeat(3, axis=2)
    assert (into(encode(grey, "webp"), "webp", (6, 10, 1)) == grey[..., :1]).all()
    data, first = animation("webp", lossless=True)
    assert (into(data, "webp", (9, 7, 3)) == first).all()
    hidden = bytearray(encode(photo(9, 7, 4), "webp"))
    assert hidden[12:16] == b"VP8L"
    hidden[24] &= 0xEF  # the header denies an alpha that is there
    assert (into(bytes(hidden), "webp", (9, 7, 4))[..., 3] == 255).all()


def test_a_webp_that_asks_for_enlarging_is_not_enlarged(library):
    data = bytearray(encode(photo(9, 7, 3), "webp", quality=90))
    plain = into(bytes(data), "webp", (9, 7, 3))
    assert data[12:16] == b"VP8 "
    data[27] |= 0x40
    data[29] |= 0x80
    assert (into(bytes(data), "webp", (9, 7, 3)) == plain).all()


@pytest.mark.parametrize("factor", [2, 4, 32])
@pytest.mark.parametrize("codec", ["png", "webp"])
def test_larger_images_are_averaged(factor, codec, library):
    height, width = (160, 96) if factor == 32 else (520, 384)  # more than is averaged at a time
    for channels in (3, 4):
        pixels = photo(height, width, channels)
        pixels[:64, :64] = 255  # the largest sum
        blocks = pixels.reshape(height // factor, factor, width // factor, factor, channels)
        means = np.rint(blocks.mean(axis=(1, 3)))  # halves to even
        image = into(encode(pixels, codec), codec, (height // factor, width // factor, channels))
        assert (image == means).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
def test_larger_jpeg_images_are_reduced_by_libjpeg(channels, options):
    data = encode(photo(640, 384, channels), "jpeg", quality=95, **options)
    full = into(data, "jpeg", (640, 384, channels))
    reduced = {}
    for factor in (2, 4, 8):
        size = (640 // factor, 384 // factor)
        reduced[factor] = into(data, "jpeg", (*size, channels))
        with Image.open(io.BytesIO(data)) as image:
            image.draft("", (384 // factor, 640 // factor))
            assert (reduced[factor] == np.asarray(image).reshape(*size, channels)).all()
        means = full.reshape(size[0], factor, size[1], factor, channels).mean(axis=(1, 3))
        error = reduced[factor] - means
        assert 10 * np.log10(255**2 / (error**2).mean()) > 45
        assert np.abs(error.mean(axis=(0, 1))).max() < 0.5
    means = reduced[8].reshape(40, 2, 24, 2, channels).mean(axis=(1, 3))
    assert (into(data, "jpeg", (40, 24, channels)) == np.rint(means)).all()


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("size", [(6, 11), (5, 10), (2, 4), (2, 10), (3, 10), (7, 10), (12, 20), (2, 3)])
def test_another_size_is_refused(codec, size):
    with pytest.raises(ValueError, match=f"^an image of 10x6 pixels, not of {size[1]}x{size[0]} or 2, 4, 8, "):
        into(encode(picture(3), codec), codec, (*size, 3))
    with pytest.raises(ValueError, match=r"^an image of 36x24 pixels, not of 12x8 or"):
        into(encode(photo(24, 36, 3), codec), codec, (8, 12, 3))


def claims(codec: str, width: int, height: int) -> bytes:
    """A small file whose header promises a large image."""
    data = bytearray(encode(picture(3), codec, **({"quality": 90} if codec == "webp" else {})))
    if codec == "png":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif codec == "jpeg":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    else:
        assert data[12:16] == b"VP8 "
        data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
def test_a_broken_header_does_not_cost_memory(codec, library):
    side = 16383
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^an image of {side}x{side} pixels is too large"):
            decode(claims(codec, side, side), codec, 3)
        with pytest.raises(ValueError, match=f"^an image of {side}x{side} pixels, not of 64x64"):
            into(claims(codec, side, side), codec, (64, 64, 3))
        with pytest.raises(ValueError, match=r"^an image of 16128x16128 pixels, not of 63x63"):
            into(claims(codec, 16128, 16128), codec, (63, 63, 3))  # 256 times as large
        with pytest.raises(ValueError, match=r"^not a whole"):
            into(claims(codec, 128, 128), codec, (64, 64, 3))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: b"",
        lambda d: d[: len(d) // 2],
        lambda d: d[:-2],
        lambda d: d[:20],
        lambda d: d[:28],
        lambda d: b"x" * 50,
    ],
    ids=["empty", "half", "almost", "start", "header", "other"],
)
def test_broken_bytes_are_refused(codec, spoil, library):
    data = spoil(encode(picture(3), codec, **({"quality": 90} if codec == "webp" else {})))
    with pytest.raises(ValueError, match=f"not a whole {codec.upper()} image of {len(data)} bytes: ."):
        decode(data, codec, 3)
    with pytest.raises(ValueError, match=f"not a whole {codec.upper()} image of {len(data)} bytes: ."):
        into(data, codec, (6, 10, 3))


@pytest.mark.parametrize(
    ("codec", "data", "reason"),
    [
        ("png", png(bytes(16), 4, 4, 8, 5), "its header is broken"),
        ("png", png(bytes(16), 0, 4, 8, 2), "."),
        ("png", b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b"a\0" * 9) + chunk(b"IEND", b""), "it does not begin as one"),
        ("png", png(b"", 4, 4, 8, 2)[:33] + chunk(b"tEXt", chunk(b"IEND", b"")), "it ends too early"),
        ("webp", b"RIFF\x12\0\0\0WEBPVP8 \x0a\0\0\0" + bytes(6), "it does not begin as one"),
        ("webp", b"RIFF\x16\0\0\0WEBPABCD\x0a\0\0\0" + bytes(10), "it does not begin as one"),
    ],
)
def test_the_reason_is_told(codec, data, reason, library):
    with pytest.raises(ValueError, match=f"not a whole {codec.upper()} image of {len(data)} bytes: {reason}"):
        decode(data, codec, 3)


def test_a_lack_of_memory_is_not_the_images_fault(monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(module, "_decode_jpeg", fails)
    with pytest.raises(MemoryError):
        decode(encode(picture(3), "jpeg"), "jpeg", 3)


def test_jpeg_data_that_stop_early_are_not_filled_up():
    data = encode(photo(64, 64, 3), "jpeg", quality=95)
    for at in (len(data) // 2, len(data) - 40):
        for scale in (1, 2):
            with pytest.raises(ValueError, match=r"not a whole JPEG image of .* premature end"):
                into(data[:at] + b"\xff\xd9", "jpeg", (64 // scale, 64 // scale, 3))


def test_every_flipped_bit_of_a_png_is_noticed(library):
    data = encode(picture(3), "png")
    for at in range(8, len(data)):
        spoilt = bytearray(data)
        spoilt[at] ^= 1
        with pytest.raises(ValueError, match=r"not a whole PNG|pixels"):
            into(bytes(spoilt), "png", (6, 10, 3))


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
def test_what_follows_the_image_is_ignored(codec, library):
    data = encode(picture(3), codec)
    assert (into(data + b"xyz" * 30, codec, (6, 10, 3)) == into(data, codec, (6, 10, 3))).all()


def test_another_format_or_number_of_channels_is_refused(library):
    with pytest.raises(ValueError, match="not a whole JPEG"):
        decode(encode(picture(3), "png"), "jpeg", 3)
    with pytest.raises(ValueError, match="not a whole PNG"):
        decode(encode(picture(3), "jpeg"), "png", 3)
    with pytest.raises(ValueError, match="not a whole WEBP"):
        decode(encode(picture(3), "jpeg"), "webp", 3)
    with pytest.raises(ValueError, match="stored as RGBA, not as RGB"):
        decode(encode(picture(4), "png"), "png", 3)
    with pytest.raises(ValueError, match="stored as RGB, not as RGBA"):
        decode(encode(picture(3), "png"), "png", 4)
    with pytest.raises(ValueError, match="stored as L, not as RGB"):
        decode(encode(picture(1), "png"), "mixed", 3)
    with pytest.raises(ValueError, match="stored as RGBA, not as RGB"):
        decode(encode(picture(4), "webp"), "webp", 3)
    with pytest.raises(ValueError, match="stored as RGBA, not as L"):
        decode(encode(picture(4), "webp"), "webp", 1)
    with pytest.raises(ValueError, match="stored as Gray, not with 3"):
        decode(encode(picture(1), "jpeg"), "jpeg", 3)
    with pytest.raises(ValueError, match="stored as YCbCr, not with 1"):
        decode(encode(picture(3), "jpeg"), "mixed", 1)
    with pytest.raises(ValueError, match="stored as YCbCr, not with 4"):
        decode(encode(picture(3), "jpeg"), "jpeg", 4)
    file = io.BytesIO()
    Image.new("CMYK", (10, 6)).save(file, "jpeg")
    with pytest.raises(ValueError, match="stored as CMYK, not with 3"):
        decode(file.getvalue(), "jpeg", 3)
    file = io.BytesIO()
    Image.new("P", (10, 6)).save(file, "png")
    with pytest.raises(ValueError, match="stored as P, not as RGB"):
        decode(file.getvalue(), "png", 3)
    with pytest.raises(ValueError, match="neither a PNG nor a JPEG nor a WebP"):
        decode(b"GIF89a" + bytes(50), "mixed", 3)
    with pytest.raises(ValueError, match="cannot decode 'gif'"):
        decode(b"", "gif", 3)
    with pytest.raises(ValueError, match="cannot decode 'png' with 2"):
        decode(encode(picture(3), "png"), "png", 2)


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Some bytes changed, cut, doubled, or zeros put in, half of the time near the start, where the headers are."""
    spoilt = bytearray(data)
    reach = min(len(spoilt), 64) if rng.random() < 0.5 else len(spoilt)
    a, b = sorted(int(at) for at in rng.integers(reach, size=2))
    match int(rng.integers(7)):
        case 0:
            spoilt[a] ^= 1 << int(rng.integers(8))
        case 1:
            for at in rng.integers(reach, size=rng.integers(1, 20)):
                spoilt[at] = rng.integers(256)
        case 2:
            del spoilt[a:]
        case 3:
            spoilt[a:a] = bytes(int(rng.integers(1, 50)))
        case 4:
            del spoilt[a : a + int(rng.integers(1, 50))]
        case 5:
            spoilt[a : a + 4] = b"\x7f\xff\xff\xff" if rng.random() < 0.5 else b"\xff\xff\xff\x7f"
        case _:
            spoilt[a:a] = spoilt[a:b]
    return bytes(spoilt)


def with_right_sums(data: bytes) -> bytes:
    """A spoilt PNG file whose check sums do not give it away."""
    mended, at = bytearray(data), 8
    while at + 12 <= len(mended) and (end := at + 8 + int.from_bytes(mended[at : at + 4], "big")) + 4 <= len(mended):
        mended[end : end + 4] = struct.pack(">I", zlib.crc32(mended[at + 4 : end]))
        at = end + 4
    return bytes(mended)


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
def test_fuzz(codec, library):
    rng = np.random.default_rng(20)
    kinds = {"png": [1, 3, 4], "jpeg": [1, 3], "webp": [3, 4]}[codec]
    options = {
        "png": [{}],
        "jpeg": [{"quality": 90}, {"progressive": True}],
        "webp": [{"quality": 80}, {"lossless": True}],
    }
    files = [(c, encode(photo(32, 32, c), codec, **o)) for c in kinds for o in options[codec]]
    outcomes = []
    for i in range(600):
        channels, data = files[i % len(files)]
        data = mutated(rng, data)
        data = with_right_sums(data) if codec == "png" and i % 2 else data
        out = np.empty((32 >> i % 3, 32 >> i % 3, channels), dtype=np.uint8)
        try:
            decode_into(out, data, ("mixed", codec)[i // 2 % 2])
            outcomes.append(True)
        except ValueError:
            outcomes.append(False)
        with contextlib.suppress(ValueError):
            assert decode(data, codec, channels).shape[0] == channels
    assert 0 < sum(outcomes) < 600  # else the mutations were too mild or too wild to tell anything


def test_decoders(monkeypatch):
    assert decoders()["jpeg"] == "simplejpeg"
    assert decoders()["png"] in ("kornia-rs", "Pillow")
    assert decoders()["webp"] in ("imagecodecs", "Pillow")
    monkeypatch.setattr(module, "_quick", lambda codec: None)
    assert decoders() == {"jpeg": "simplejpeg", "png": "Pillow", "webp": "Pillow"}


@pytest.fixture
def fake_kornia(monkeypatch):
    """Puts a function in the place of kornia-rs'."""

    def install(function) -> None:
        library = types.SimpleNamespace(io=types.SimpleNamespace(decode_image_png_u8=function))
        monkeypatch.setattr(module.importlib, "import_module", lambda name: library)
        module._quick.cache_clear()

    yield install
    module._quick.cache_clear()


def test_a_library_that_does_not_do_what_it_should_is_not_used(fake_kornia):
    def changed(data):
        raise AssertionError("never called")

    def lies(data, size, mode):
        return np.zeros((*size, 3), np.uint8)

    for function in (changed, lies):
        fake_kornia(function)
        assert decoders()["png"] == "Pillow"
    fake_kornia(lambda data, size, mode: by_pillow(data, 3))
    assert decoders()["png"] == "kornia-rs"


def test_where_a_library_fails_pillow_decides(fake_kornia):
    class PanicException(BaseException):  # of pyo3, which cannot be imported
        pass

    calls = []

    def panics(data, size, mode):
        calls.append(size)
        if size != (6, 10):
            return by_pillow(data, 3)
        raise PanicException("index out of bounds")

    fake_kornia(panics)
    data = encode(picture(3), "png")
    assert (into(data, "png", (6, 10, 3)) == picture(3)).all()
    assert calls[-1] == (6, 10)
    with pytest.raises(ValueError, match="not a whole PNG"):
        into(data[:-20] + data[-12:], "png", (6, 10, 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_decoded_on_a_device(channels):
    files = [encode(photo(24, 40, channels, seed), "jpeg", quality=90) for seed in range(3)]
    images = decode_on_device(files, channels, "cpu")
    assert images.shape == (3, channels, 24, 40)
    assert images.numpy().dtype == np.uint8
    assert decode_on_device(files, channels, "meta").device.type == "meta"
    for file, image in zip(files, images, strict=True):
        assert (image.numpy() == decode(file, "jpeg", channels)).all()


def test_a_broken_image_of_a_batch_is_named():
    good = encode(photo(24, 40, 3), "jpeg", quality=90)
    grey = encode(photo(24, 40, 1), "jpeg", quality=90)
    for bad in (good[: len(good) // 2], good[:-2], b"", b"x" * 50, encode(picture(3), "png")):
        with pytest.raises(ValueError, match=f"^image 1: not a whole JPEG image of {len(bad)} bytes"):
            decode_on_device([good, bad, good], 3, "cpu")
    with pytest.raises(ValueError, match=r"^image 2: .* stored as Gray, not with 3"):
        decode_on_device([good, good, grey], 3, "cpu")
    with pytest.raises(ValueError, match=r"^image 0: .* stored as YCbCr, not with 4"):
        decode_on_device([good], 4, "cpu")
    with pytest.raises(ValueError, match=r"^image 1: an image of 10x6 pixels, not of 40x24$"):
        decode_on_device([good, encode(picture(3), "jpeg")], 3, "cpu")


def test_a_device_is_not_asked_for_cut_images_nor_trusted_with_damaged_ones(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("nvJPEG says no more than that")

    def unreachable(*_, **__):
        raise AssertionError

    good = encode(photo(96, 96, 3), "jpeg", quality=90)
    half = good[: len(good) // 2]
    monkeypatch.setattr("torchvision.io.decode_jpeg", unreachable)
    with pytest.raises(ValueError, match=r"^image 1: not a whole JPEG .* its end is missing"):
        decode_on_device([good, half], 3, "cpu")
    monkeypatch.setattr("torchvision.io.decode_jpeg", fails)
    with pytest.raises(ValueError, match=r"^image 1: not a whole JPEG .* premature end"):
        decode_on_device([good, half + b"\xff\xd9"], 3, "cpu")


def test_what_fails_on_a_device_besides_the_images_is_passed_on(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("torchvision.io.decode_jpeg", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        decode_on_device([encode(photo(24, 40, 3), "jpeg", quality=90)], 3, "cpu")
