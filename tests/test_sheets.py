"""training/sheets.py: every image in its place, names beside them that keep to their own."""

import numpy as np
import pytest
from PIL import Image

from styleloom.training import sheets
from styleloom.training.sheets import on_white, picture, table


def cell(value: int, channels: int = 3, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full([channels, height, width], value, np.uint8)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_picture(channels, mode):
    x = np.random.default_rng(0).integers(0, 256, [channels, 4, 6], np.uint8)
    image = picture(x)
    assert (image.mode, image.size) == (mode, (6, 4))
    assert np.array_equal(np.asarray(image).reshape(4, 6, channels).transpose(2, 0, 1), x)


def test_on_white():
    image = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8))
    assert np.asarray(on_white(image)).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert on_white(Image.new("L", (2, 2), 7)).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("sources", [False, True])
def test_cells_are_in_their_places(channels, sources):
    rng = np.random.default_rng(1)
    cells = rng.integers(0, 256, [2, 3, channels, 8, 10], np.uint8)
    if channels == 4:
        cells[:, :, 3] = 255
    rows = [list(row) for row in cells]
    sheet = np.asarray(table(rows, ["a", "b"], ["x", "y", "z"], min_side=32, sources=sources))
    gap = sheet.shape[0] - np.asarray(table(rows, ["a", "b"], ["x", "y", "z"], min_side=32)).shape[0]
    assert (gap > 0) == sources
    left, top = sheet.shape[1] - 3 * 40 - gap, sheet.shape[0] - 2 * 32 - gap
    assert left > 0
    assert top > 0
    for i in range(2):
        for j in range(3):
            x, y = left + 40 * j + gap * (j > 0), top + 32 * i + gap * (i > 0)
            shown = sheet[y : y + 32 : 4, x : x + 40 : 4].transpose(2, 0, 1)
            assert np.array_equal(shown, np.broadcast_to(cells[i, j][:3], [3, 8, 10]))


def test_an_empty_place_is_white():
    sheet = np.asarray(table([[None, cell(0)], [cell(0), cell(0)]], ["", ""], ["", ""], min_side=8))
    assert sheet.shape == (16, 16, 3)
    assert (sheet[:8, :8] == 255).all()
    assert (sheet[8:] == 0).all()
    assert (sheet[:8, 8:] == 0).all()


def test_names_keep_to_their_places():
    names = ["short", "a name so long that no column of this table could ever hold it" * 4]
    sheet = np.asarray(table([[cell(255)] * 2] * 2, names, names, min_side=64))
    ink = sheet.min(axis=2) < 128
    top, left = sheet.shape[0] - 128, sheet.shape[1] - 128
    assert left < 64 * 4
    assert ink[:top, left : left + 64].any()
    assert ink[:top, left + 64 :].any()
    assert not ink[:top, [left, left + 63, left + 64, -1]].any()
    assert not ink[:top, :left].any()
    assert ink[top : top + 64, :left].any()
    assert ink[top + 64 :, :left].any()
    assert not ink[top:, left - 2 :].any()


def test_a_huge_table_is_reduced(monkeypatch):
    monkeypatch.setattr(sheets, "_LONGEST_SIDE", 64)
    names = [""] * 4
    assert table([[cell(9)] * 4] * 4, names, names, min_side=96).size == (64, 64)
    assert table([[cell(9)] * 4] * 2, names[:2], names, min_side=8).size == (32, 16)
    halved = table([[cell(9, height=32, width=32)] * 4] * 4, names, names)
    assert halved.size == (64, 64)
    assert (np.asarray(halved) == 9).all()
