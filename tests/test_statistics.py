"""datasets/statistics.py: exact, and the same however the pictures are divided."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from styleloom.datasets.decode import decode
from styleloom.datasets.manifest import load_index, read_manifest
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.statistics import Counts, add_up, quantile, thumbnail


def image(seed: int, mode: str = "RGB", side: int = 20) -> Image.Image:
    shape = (side, side, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8).squeeze())


PICTURES = [(20 + 7 * i, 30 + i % 3, ("PNG", "JPEG")[i % 4 == 0], image(i)) for i in range(12)]


def census(pictures):
    counts = Counts()
    for picture in pictures:
        counts.add(*picture)
    census = counts.census()
    assert census is not None
    return census


def test_what_is_counted():
    found = add_up([census(PICTURES)])
    widths = [w for w, *_ in PICTURES]
    assert (found.width.least, found.width.most) == (min(widths), max(widths))
    assert sum(found.width.histogram.values()) == 12
    assert found.width.histogram == {
        k: sum(math.floor(8 * math.log2(w)) == k for w in widths) for k in sorted(found.width.histogram)
    }
    assert found.height.histogram == {39: 8, 40: 4}  # 2 ** 5 is step 40
    assert found.aspect.least == 20 / 30
    assert found.formats == {"JPEG": 3, "PNG": 9}
    pixels = np.stack([np.asarray(each[-1]) for each in PICTURES]).reshape(-1, 3).astype(float)
    assert np.allclose(found.mean_colour, pixels.mean(0), atol=6e-4)
    assert np.allclose(found.std_colour, pixels.std(0), atol=6e-4)


@pytest.mark.parametrize("cuts", [(1,), (5,), (2, 3, 11)])
def test_parts_add_up_to_the_same(cuts):
    edges = (0, *cuts, len(PICTURES))
    parts = [census(PICTURES[a:b]) for a, b in itertools.pairwise(edges)]
    whole = add_up([census(PICTURES)])
    assert add_up(parts).model_dump_json() == whole.model_dump_json()
    assert add_up(parts[::-1]).model_dump_json() == whole.model_dump_json()


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_a_number_for_each_channel(mode, channels):
    found = add_up([census([(5, 5, "PNG", image(0, mode))])])
    assert len(found.mean_colour) == len(found.std_colour) == channels


def test_nothing_has_no_census():
    assert Counts().census() is None


def test_large_images_are_looked_at_here_and_there():
    assert thumbnail(image(0)) is not None
    small = image(1, side=256)
    assert thumbnail(small) is small
    large = image(2, side=1000)
    seen = np.asarray(thumbnail(large))
    assert seen.shape == (256, 256, 3)
    assert set(map(tuple, seen.reshape(-1, 3))) <= set(map(tuple, np.asarray(large).reshape(-1, 3)))
    pixels = np.asarray(large)
    assert np.abs(seen.mean((0, 1)) - pixels.mean((0, 1))).max() < 2
    assert np.abs(seen.std((0, 1)) - pixels.std((0, 1))).max() < 2


def test_quantiles_are_near():
    found = add_up([census([(w, 64, "PNG", image(0)) for w in range(100, 1100, 10)])])
    for share in (0.1, 0.5, 0.9):
        assert abs(math.log2(quantile(found.width, share) / (100 + 1000 * share))) < 1 / 8
    assert quantile(found.width, 1) <= found.width.most
    assert quantile(found.height, 0.5) == 64


def test_they_are_in_the_manifest_of_every_size(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    for i in range(5):
        image(i, side=20 if i else 5).save(root / f"{i}.png")
    made = prepare(open_source(root), tmp_path / "data", width=8, height=8, shard_images=2, progress=False).manifest
    its = made.statistics
    assert its is not None
    assert its.formats == {"PNG": 5}
    assert (its.width.least, its.width.most) == (5, 20)
    assert its.width.histogram == its.height.histogram == {18: 1, 34: 4}
    assert its.aspect.histogram == {0: 5}
    pixels = np.concatenate([decode(data, "png", 3).reshape(3, -1) for data in stored(tmp_path / "data")], axis=1)
    assert np.allclose(its.mean_colour, pixels.mean(1), atol=6e-4)
    assert np.allclose(its.std_colour, pixels.std(1), atol=6e-4)
    again = prepare(
        open_source(root), tmp_path / "two", width=16, height=16, reduced=[(8, 8)], shard_images=3, progress=False
    )
    assert again.manifest.statistics == read_manifest(tmp_path / "two" / "8x8").statistics == its


def stored(folder) -> list[bytes]:
    """All images of a data set."""
    images = []
    for shard in read_manifest(folder).shards:
        data = (folder / shard.name).read_bytes()
        images += [data[offset : offset + length] for offset, length, *_ in load_index(folder, shard)]
    return images
