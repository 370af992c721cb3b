"""datasets/contact.py: what is on the sheet, and that nothing is drawn over anything else."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from styleloom.datasets import contact
from styleloom.datasets.contact import contact_sheet, sample_grid
from styleloom.datasets.manifest import Manifest, Spread, read_manifest
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five plain pictures in two classes, of sizes from 20x10 to 60x30."""
    root = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(COLOURS):
        path = root / ("cat", "dog")[i > 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20 + 10 * i, 10 + 5 * i), colour).save(path)
    return root


def make(pictures, dest, labels="folders", **options) -> Manifest:
    options = {"width": 16, "height": 8, "shard_images": 2, "progress": False, **options}
    return prepare(open_source(pictures, labels), dest, **options).manifest


def cells(sheet: Image.Image, width: int, height: int, count: int, columns: int) -> list[np.ndarray]:
    """The cells of a sheet's grid, which is at its bottom left."""
    pixels = np.asarray(sheet)
    rows = -(-count // columns)
    top = sheet.height - 24 - rows * (height + 4) + 4
    return [
        pixels[top + i // columns * (height + 4) :, 24 + i % columns * (width + 4) :][:height, :width]
        for i in range(count)
    ]


@pytest.mark.parametrize("reduced", [(), [(8, 4)], [(8, 4), (2, 1)]])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_sheet_ends_with_the_samples_in_order(pictures, tmp_path, channels, reduced):
    manifest = make(pictures, tmp_path / "data", channels=channels, reduced=reduced)
    sheet = contact_sheet(manifest, tmp_path / "data", "title")
    assert (sheet.mode, sheet.width) == ("RGB", 1100)
    colours = COLOURS if channels != 1 else [(g, g, g) for g in (76, 150, 29, 226, 179)]
    for cell, colour in zip(cells(sheet, 256, 128, 5, 3), colours, strict=True):
        assert np.abs(cell.astype(int) - colour).max() <= 1


def test_prepare_writes_it(pictures, tmp_path):
    manifest = make(pictures, tmp_path / "data")
    stored = Image.open(tmp_path / "data" / contact.FILE)
    drawn = contact_sheet(manifest, tmp_path / "data", pictures.stem)
    assert stored.tobytes() == drawn.tobytes()
    assert stored.info == {}  # no date, so that the bytes are the same each time


class Text:
    """Notes what is written where on a sheet, and where the swatch is."""

    def __init__(self, monkeypatch) -> None:
        self.boxes: list[tuple[str, tuple[float, float, float, float]]] = []
        draw_text = ImageDraw.ImageDraw.text

        def text(draw, at, text, fill, font, anchor="la"):
            self.boxes.append((text, draw.textbbox(at, text, font, anchor=anchor)))
            draw_text(draw, at, text, fill, font, anchor=anchor)

        draw_rectangle = ImageDraw.ImageDraw.rectangle

        def rectangle(draw, box, fill, outline=None):
            if outline:
                self.boxes.append(("", box))
            draw_rectangle(draw, box, fill, outline)

        monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
        monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", rectangle)

    @property
    def all(self) -> str:
        return "\n".join(text for text, _ in self.boxes)

    def overlapping(self) -> list[tuple[str, str]]:
        return [
            (one, other)
            for i, (one, a) in enumerate(self.boxes)
            for other, b in self.boxes[i + 1 :]
            if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
        ]


def test_what_the_header_tells(pictures, tmp_path, monkeypatch):
    manifest = make(pictures, tmp_path / "data", reduced=[(8, 4)])
    written = Text(monkeypatch)
    contact_sheet(manifest, tmp_path / "data", "animals")
    for text in (
        "animals",
        "5 images of 16x8, RGB, 2 classes; also as 8x4",
        "stored as png in 3 shards",
        "made from pictures in PNG (5)",
        "mean 102 153 102",
        "width 20 to 60, median ~40",
        "height 10 to 30, median ~20",
        "aspect 2.00",
        "images of a class 2 to 3",
    ):
        assert text in written.all
    assert written.overlapping() == []


def test_without_statistics_there_are_no_charts(pictures, tmp_path, monkeypatch):
    manifest = make(pictures, tmp_path / "data", labels="none").model_copy(update={"statistics": None})
    written = Text(monkeypatch)
    sheet = contact_sheet(manifest, tmp_path / "data", "animals")
    assert len(written.boxes) == 3
    assert (np.asarray(sheet)[:24] == 255).all()


def test_long_texts_are_cut_and_large_numbers_fit(pictures, tmp_path, monkeypatch):
    manifest = make(pictures, tmp_path / "data")
    assert manifest.statistics is not None
    wide = Spread(least=1, most=99_999, histogram={k: k % 7 for k in range(133)})
    ratios = Spread(least=0.01, most=99.5, histogram=dict.fromkeys(range(-53, 54), 1))
    its = manifest.statistics.model_copy(
        update={"width": wide, "height": wide, "aspect": ratios, "formats": {f"FORMAT{k}": 10**9 for k in range(9)}}
    )
    names = [f"a class with a long name, number {k}" for k in range(5000)]
    many = {"class_names": names, "class_counts": [10**9 + k for k in range(5000)], "reduced": []}
    manifest = manifest.model_copy(update={"statistics": its, **many})
    written = Text(monkeypatch)
    sheet = contact_sheet(manifest, tmp_path / "data", "a long title " * 30)
    assert written.overlapping() == []
    assert min(box[0] for _, box in written.boxes) >= 0
    assert max(box[2] for _, box in written.boxes) <= sheet.width - 48
    assert sum(text.endswith("...") for text, _ in written.boxes) >= 3


def test_a_grid_of_a_set_of_others_is_drawn_as_it_is_read(pictures, tmp_path):
    """The images as they are stored are of another size than the manifest's."""
    make(pictures, tmp_path / "data")
    other = read_manifest(tmp_path / "data").model_copy(
        update={"width": 4, "height": 4, "channels": 1, "codec": "mixed", "conform": True}
    )
    grid = sample_grid(other, tmp_path / "data")
    assert grid.size == (3 * 64, 2 * 64)
    assert grid.getpixel((3, 3)) == (76, 76, 76)
