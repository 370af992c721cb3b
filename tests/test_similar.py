"""datasets/similar.py: hashes survive what copies go through, and all near pairs are found."""

import io

import numpy as np
import pytest
from PIL import Image

from styleloom.datasets import similar
from styleloom.datasets.shards import prepare
from styleloom.datasets.similar import NEAR, likeness, near_pairs
from styleloom.datasets.sources import open_source


def blobs(seed: int, side: int = 256) -> Image.Image:
    """Smooth random colours."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def apart(a: Image.Image, b: Image.Image) -> int:
    first, second = likeness(a), likeness(b)
    assert first is not None
    assert second is not None
    return (first ^ second).bit_count()


def test_each_bit_says_that_a_cell_is_brighter_than_the_one_to_its_left():
    cells = np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1))
    assert likeness(Image.fromarray(cells)) == 2**64 - 1
    assert likeness(Image.fromarray(cells[:, ::-1].copy())) == 0
    cells[0] = cells[0, ::-1]
    assert likeness(Image.fromarray(cells)) == 2**56 - 1  # the first row's bits come first
    assert likeness(Image.fromarray(np.kron(cells, np.ones((5, 7), np.uint8)))) == 2**56 - 1


def test_copies_stay_near_and_others_do_not():
    for seed in range(20):
        picture = blobs(seed)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=60)
        assert apart(picture, Image.open(file)) <= NEAR
        assert apart(picture, picture.resize((100, 100), Image.Resampling.LANCZOS)) <= NEAR
        assert apart(picture, picture.point([min(255, v + 10) for v in range(256)] * 3)) <= NEAR
        assert apart(picture, blobs(seed + 100)) > 10


def test_flat_images_have_none():
    assert likeness(Image.new("RGB", (50, 50), "red")) is None
    assert likeness(Image.fromarray(np.random.default_rng(0).integers(100, 106, (90, 90), np.uint8))) is None


def test_what_is_transparent_is_white():
    opaque = blobs(1).convert("RGBA")
    hidden = opaque.copy()
    hidden.putalpha(0)
    assert likeness(hidden) is None
    assert likeness(opaque) == likeness(blobs(1))


def brute(hashes: np.ndarray) -> list[list[int]]:
    """All pairs; of equal hashes the later ones only with the first of them."""
    first = [int(np.flatnonzero(hashes == h)[0]) for h in hashes]
    found = []
    for i in range(len(hashes)):
        for j in range(i + 1, len(hashes)):
            bits = int(np.bitwise_count(hashes[i] ^ hashes[j]))
            if (bits == 0 and first[j] == i) or (0 < bits <= NEAR and first[i] == i and first[j] == j):
                found.append([i, j, bits])
    return found


@pytest.mark.parametrize("seed", range(3))
def test_near_pairs_are_those_of_comparing_all(seed):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, 150, np.uint64)
    near = hashes.copy()
    for i in range(len(near)):
        for bit in rng.choice(64, i % 6, replace=False):
            near[i] ^= np.uint64(1) << np.uint64(bit)
    hashes = rng.permutation(np.concatenate([hashes, near, hashes[:10]]))
    pairs, complete = near_pairs(hashes)
    assert complete
    assert pairs.tolist() == brute(hashes)
    assert set(pairs[:, 2].tolist()) == set(range(NEAR + 1))


def test_pairs_among_none_and_one():
    for n in (0, 1):
        pairs, complete = near_pairs(np.arange(n, dtype=np.uint64))
        assert (pairs.shape, complete) == ((0, 3), True)


def test_crowds_do_not_blow_up_and_are_told(monkeypatch):
    same = near_pairs(np.full(5000, 7, np.uint64))
    assert (len(same.pairs), same.complete) == (4999, True)
    assert (same.pairs[:, 0] == 0).all()
    crowd = np.arange(2000, dtype=np.uint64)  # 11 bits: each is near to hundreds
    crowded = near_pairs(crowd)
    assert not crowded.complete
    assert len(crowded.pairs) > 2000 * 11 / 2
    monkeypatch.setattr(similar, "_MOST_PAIRS", 500)
    capped = near_pairs(crowd)
    assert (len(capped.pairs), capped.complete) == (500, False)


def test_what_looks_alike_is_told_by_name(tmp_path):
    """Whatever was left out before."""
    root = tmp_path / "source"
    root.mkdir()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 9, 3), np.uint8)).resize((90, 80)) for _ in range(4)]
    for number, name in (
        (0, "0.png"),
        (0, "1.png"),
        (1, "3.png"),
        (2, "4.png"),
        (1, "5.bmp"),
        (3, "6.png"),
        (2, "9.jpg"),
    ):
        images[number].save(root / name)
    (root / "2.png").write_bytes(b"broken")
    Image.new("RGB", (90, 80), "red").save(root / "7.png")
    Image.new("RGB", (50, 80), "red").save(root / "8.png")  # flat: shows nothing to compare
    report = prepare(
        open_source(root), tmp_path / "data", width=72, height=64, shard_images=3, progress=False
    ).report  # fmt: skip
    assert [(twin.source, twin.kept) for twin in report.duplicates] == [("1.png", "0.png")]
    assert [look.sources for look in report.look_alikes.first] == [("3.png", "5.bmp"), ("4.png", "9.jpg")]
    assert (report.look_alikes.pairs, report.look_alikes.complete) == (2, True)
    assert report.look_alikes.first[0].bits == 0
