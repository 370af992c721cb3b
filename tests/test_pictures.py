"""datasets/pictures.py: each rule of the stated policy, on pixels."""

import io
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms

from styleloom.datasets.decode import decode
from styleloom.datasets.pictures import Form, bring_into_forms, cut, load, resize

FORM = Form(width=4, height=4, channels=3, codec="png", quality=None, resize="box", background="#ffffff")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, codec: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, codec, **options)
    return file.getvalue()


def bring_into_form(data: bytes, form: Form):
    """The picture, and its one image."""
    picture = bring_into_forms(data, [form])
    (encoded,) = picture.data
    return picture, encoded


def convert(data: bytes, **form) -> np.ndarray:
    """int [H, W, C]"""
    form = replace(FORM, **form)
    pixels = decode(bring_into_form(data, form)[1], form.codec, form.channels)
    return pixels.transpose(1, 2, 0).astype(int)


def quarters(*colours) -> Image.Image:
    """4x4: top left, top right, bottom left, bottom right."""
    pixels = np.array(colours, np.uint8).reshape(2, 2, -1)
    return Image.fromarray(pixels.repeat(2, axis=0).repeat(2, axis=1))


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(v) for v in pixels[y, x]) for y in (0, -1) for x in (0, -1)]


# Where the stored corners (top left, top right, bottom left, bottom right) are to be seen, by EXIF 2.3, 4.6.4.A.
UPRIGHT = {1: "RGBW", 2: "GRWB", 3: "WBGR", 4: "BWRG", 5: "RBGW", 6: "BRWG", 7: "WGBR", 8: "GWRB"}


@pytest.mark.parametrize(("orientation", "expected"), UPRIGHT.items())
@pytest.mark.parametrize("codec", ["png", "tiff"])
def test_exif_orientation(orientation, expected, codec):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(quarters(RED, GREEN, BLUE, WHITE), codec, exif=exif)
    names: dict[tuple[int, ...], str] = {RED: "R", GREEN: "G", BLUE: "B", WHITE: "W"}
    assert "".join(names[c] for c in corners(convert(data))) == expected


def test_orientation_counts_for_the_crop_and_the_recorded_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture, _ = bring_into_form(encode(Image.new("RGB", (30, 10)), exif=exif), FORM)
    assert (picture.width, picture.height) == (10, 30)


def swapped_profile() -> bytes:
    """An ICC profile like sRGB, but whose first channel is green and whose second is red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.find(b"rXYZ"), profile.find(b"gXYZ")
    assert 0 < red < 500
    assert 0 < green < 500
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_an_icc_profile_is_converted_to_srgb(mode):
    image = quarters(RED, GREEN, BLUE, WHITE).convert(mode)
    data = encode(image, icc_profile=swapped_profile())
    picture, stored = bring_into_form(data, FORM)
    assert not picture.profile_ignored
    assert b"iCCP" not in stored  # the stored image is plain sRGB
    assert np.abs(np.array(corners(convert(data))) - [GREEN, RED, BLUE, WHITE]).max() <= 2


def test_an_srgb_profile_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(convert(encode(Image.fromarray(pixels), icc_profile=profile)) - pixels).max() <= 1


@pytest.mark.parametrize(
    ("mode", "profile"), [("RGB", b"nonsense"), ("L", swapped_profile()), ("RGB", swapped_profile()[:300])]
)
def test_an_unusable_profile_is_ignored_and_told(mode, profile):
    picture, stored = bring_into_form(encode(Image.new(mode, (4, 4), "white"), icc_profile=profile), FORM)
    assert picture.profile_ignored
    assert corners(decode(stored, "png", 3).transpose(1, 2, 0)) == [WHITE] * 4


def test_cmyk():
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert corners(convert(encode(image, "tiff"))) == [RED] * 4
    assert np.abs(convert(encode(image, "jpeg", quality=100)) - RED).max() <= 3


def test_sixteen_bits_are_rounded_to_eight():
    values = np.array([[0, 128, 129, 257], [385, 386, 32896, 65535], [1000] * 4, [60000] * 4], np.uint16)
    expected = np.round(values / 257)
    for codec in ("png", "tiff"):
        assert (convert(encode(Image.fromarray(values), codec), channels=1)[..., 0] == expected).all()
    as_i = encode(Image.fromarray(values.astype(np.int32)), "tiff")
    assert (convert(as_i, channels=1)[..., 0] == expected).all()


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [(np.full((4, 4), 70000, np.int32), "32-bit"), (np.full((4, 4), 0.5, np.float32), "floating-point")],
)
def test_pixels_without_a_known_range_are_refused(pixels, reason):
    with pytest.raises(ValueError, match=reason):
        bring_into_form(encode(Image.fromarray(pixels), "tiff"), FORM)


def test_alpha_is_put_on_the_background():
    image = quarters((*RED, 255), (*RED, 0), (*RED, 51), (0, 0, 0, 0))
    assert corners(convert(encode(image))) == [RED, WHITE, (255, 204, 204), WHITE]
    assert corners(convert(encode(image), background="#0000ff")) == [RED, BLUE, (51, 0, 204), BLUE]
    assert corners(convert(encode(image), channels=1)) == [(76,), (255,), (219,), (255,)]


def test_alpha_is_kept_and_resized_premultiplied():
    transparent_green = np.zeros((8, 8, 4), np.uint8)
    transparent_green[..., 1] = 255
    transparent_green[:, ::2] = (*RED, 255)  # each second column is opaque red
    pixels = convert(encode(Image.fromarray(transparent_green)), channels=4)
    assert (np.abs(pixels - [255, 0, 0, 128]) <= 1).all()  # no green shines through
    assert (convert(encode(quarters(RED, GREEN, BLUE, WHITE)), channels=4)[..., 3] == 255).all()


def test_a_palette_is_expanded_with_its_transparency():
    image = Image.new("P", (4, 4))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 0, 1, 1] * 2 + [2, 2, 0, 0] * 2)
    assert corners(convert(encode(image))) == [RED, GREEN, BLUE, RED]
    assert corners(convert(encode(image, transparency=1))) == [RED, WHITE, BLUE, RED]
    assert corners(convert(encode(image, transparency=bytes([255, 51, 0])))) == [RED, (204, 255, 204), WHITE, RED]
    assert corners(convert(encode(image, "gif", transparency=1))) == [RED, WHITE, BLUE, RED]


def test_other_modes():
    assert corners(convert(encode(Image.new("1", (4, 4), 1)))) == [WHITE] * 4
    assert corners(convert(encode(Image.new("LA", (4, 4), (0, 0))))) == [WHITE] * 4
    assert corners(convert(encode(Image.new("L", (4, 4), 7)))) == [(7, 7, 7)] * 4
    assert corners(convert(encode(Image.new("L", (4, 4), 7), transparency=7))) == [WHITE] * 4
    assert corners(convert(encode(Image.new("RGB", (4, 4), RED), transparency=RED))) == [WHITE] * 4
    assert np.abs(convert(encode(Image.new("RGB", (4, 4), RED).convert("YCbCr"), "tiff")) - RED).max() <= 2


def test_of_an_animation_the_first_picture():
    red, blue = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    assert corners(convert(encode(red, "gif", save_all=True, append_images=[blue]))) == [RED] * 4
    stereo = encode(red, "mpo", save_all=True, append_images=[blue], quality=100)  # some cameras' .jpg
    assert np.abs(convert(stereo) - RED).max() <= 3


def test_the_centre_is_cropped_to_the_aspect():
    stripes = np.zeros((4, 12, 3), np.uint8)
    stripes[:, :4], stripes[:, 4:8], stripes[:, 8:] = RED, GREEN, BLUE
    assert (convert(encode(Image.fromarray(stripes))) == GREEN).all()
    assert (convert(encode(Image.fromarray(stripes.transpose(1, 0, 2).copy()))) == GREEN).all()
    wide = convert(encode(Image.fromarray(stripes)), width=12, height=4)
    assert (wide == stripes).all()


def test_reducing_averages_and_the_filters_differ():
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    for filter_ in ("box", "lanczos"):
        assert np.abs(convert(encode(board), channels=1, resize=filter_) - 127.5).max() < 4
    edge = np.zeros((16, 16), np.uint8)
    edge[:, 6:] = 255
    box, lanczos = (convert(encode(Image.fromarray(edge)), channels=1, resize=r) for r in ("box", "lanczos"))
    assert box[0, :, 0].tolist() == [0, 128, 255, 255]
    assert (box != lanczos).any()


def test_small_pictures_are_enlarged_and_told():
    assert bring_into_form(encode(Image.new("RGB", (3, 9))), FORM)[0].upscaled
    assert not bring_into_form(encode(Image.new("RGB", (4, 9))), FORM)[0].upscaled
    assert convert(encode(Image.new("RGB", (1, 1), RED))).shape == (4, 4, 3)


def test_codecs():
    smooth = Image.fromarray(np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)).convert("RGB")
    data = encode(smooth)
    for codec in ("jpeg", "webp"):
        low, high = (convert(data, width=64, height=64, codec=codec, quality=q) for q in (10, 95))
        assert np.abs(high - np.asarray(smooth)).mean() < 2
        assert np.abs(high - np.asarray(smooth)).mean() < np.abs(low - np.asarray(smooth)).mean()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    jpeg = bring_into_form(encode(Image.fromarray(noise)), Form(16, 16, 3, "jpeg", 95, "box", "#ffffff"))[1]
    frame = jpeg.index(b"\xff\xc0")
    sampling = [jpeg[frame + 11 + 3 * c] for c in range(3)]
    assert sampling == [0x11, 0x11, 0x11]  # 4:4:4


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_several_sizes_are_each_made_from_the_whole_picture(mode, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (33, 50, len(mode)), np.uint8)
    data = encode(Image.fromarray(pixels.squeeze()))
    forms = [replace(FORM, width=w, height=h, channels=channels, resize="lanczos") for w, h in ((24, 16), (12, 8))]
    picture = bring_into_forms(data, forms)
    assert picture.data == [bring_into_form(data, form)[1] for form in forms]
    assert picture.smallest.size == (12, 8)
    assert (picture.width, picture.height, picture.format) == (50, 33, "PNG")


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp", "bmp", "tiff", "gif"])
def test_what_needs_no_change_is_not_copied_and_not_written_to(codec):
    data = encode(quarters(RED, GREEN, BLUE, WHITE), codec)
    picture = load(data)
    assert picture.format == codec.upper()
    before = np.array(picture.colour)
    whole = cut(picture, FORM)
    assert whole is picture.colour
    image = resize(whole, FORM)
    image.paste("black", (0, 0, 4, 4))
    assert (np.asarray(picture.colour) == before).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello", "not a picture in a known format"),
        (encode(Image.new("RGB", (64, 64), "red"))[:60], "."),
        (
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + b"IHDR"
            + struct.pack(">IIBBBBB", 2**31 - 1, 9, 8, 2, 0, 0, 0),
            ".",
        ),
    ],
)
def test_unreadable_pictures_say_why(data, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        bring_into_form(data, FORM)
    assert " at 0x" not in str(caught.value)  # reports are the same each time
