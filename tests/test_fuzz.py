"""The stream over 2,700 spoilt data sets: it never crashes, never hangs, never shifts a sample, never hides one."""

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from styleloom.datasets.batch import Bad
from styleloom.datasets.manifest import content_hash, load_index, read_manifest, write_manifest
from styleloom.datasets.order import Order
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.stream import batches

SIDE, COUNT, SHARDS, SEED = 8, 12, 3, 3


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """codec -> a data set of 12 images in 3 shards."""
    root = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(root / "pictures" / f"{i:02d}.png")
    for codec in ("png", "jpeg", "webp"):
        source = open_source(root / "pictures")
        options = {"width": SIDE, "height": SIDE, "codec": codec, "shard_images": COUNT // SHARDS, "progress": False}
        prepare(source, root / codec, **options)
    return root


def epoch(folder, manifest) -> tuple[torch.Tensor, list[Bad]]:
    """The first 12 images in one batch, and those that were replaced."""
    bad: list[Bad] = []
    options = {"seed": SEED, "start": 0, "batch": COUNT, "window": SHARDS, "max_bad": 1.0, "report_bad": bad.append}
    stream = batches(folder, manifest, **options)
    images, _ = next(stream)
    stream.close()
    return images.clone(), bad


def mutate(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Another version of a file: what disks, networks and people do to them."""
    out = bytearray(data)
    at, end = sorted(rng.integers(0, len(out), 2).tolist())
    kind = rng.choice(["bit", "bits", "byte", "zeros", "cut", "drop", "insert", "swap", "repeat", "empty", "noise"])
    match kind:
        case "bit":
            out[at] ^= 1 << int(rng.integers(8))
        case "bits":
            for i in rng.integers(0, len(out), 20):
                out[i] ^= 1 << int(rng.integers(8))
        case "byte":
            out[at] = int(rng.integers(256))
        case "zeros":
            out[at:end] = bytes(end - at)
        case "cut":
            del out[at:]
        case "drop":
            del out[at:end]
        case "insert":
            out[at:at] = rng.bytes(int(rng.integers(1, 600)))
        case "swap":
            out = out[end:] + out[at:end] + out[:at]
        case "repeat":
            out[at:at] = out[at:end]
        case "empty":
            out = bytearray()
        case "noise":
            out[at:end] = rng.bytes(end - at)
    return bytes(out), str(kind)


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
def test_mutated_files(sets, codec):
    """Of every 10 mutations 9 are of a tar, one is of an index; 700 for each codec."""
    folder, rng = sets / codec, np.random.default_rng(1)
    manifest = read_manifest(folder)
    order = Order([shard.count for shard in manifest.shards], SEED, SHARDS)
    expected, none = epoch(folder, manifest)
    assert not none
    known = {image.numpy().tobytes() for image in expected}
    replaced, kinds = 0, set()
    for turn in range(700):
        number = int(rng.integers(SHARDS))
        shard = manifest.shards[number]
        path = folder / (shard.index if turn % 10 == 0 else shard.name)
        original = path.read_bytes()
        mutant, kind = mutate(original, rng)
        path.write_bytes(mutant)
        try:
            images, bad = epoch(folder, manifest)
        finally:
            path.write_bytes(original)
        gone = {each.position for each in bad}
        assert {order(position)[0] for position in gone} <= {number}, "a sample of a sound shard was replaced"
        for position in range(COUNT):
            if position in gone:
                assert images[position].numpy().tobytes() in known
            else:
                assert torch.equal(images[position], expected[position]), (turn, kind, position)
        assert all(each.reason and each.shard == shard.name for each in bad)
        replaced += len(bad)
        kinds.add(kind)
    assert len(kinds) == 11
    assert replaced > 700, "the mutations did not mutate"
    assert torch.equal(epoch(folder, manifest)[0], expected)


@pytest.mark.parametrize("codec", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("conform", [False, True])
def test_mutated_images_that_were_indexed_as_they_are(sets, codec, conform, tmp_path):
    """Foreign sets: the hash agrees with the broken bytes, and only the decoder can notice; 100 each."""
    folder, rng = sets / codec, np.random.default_rng(2)
    manifest = read_manifest(folder).model_copy(update={"conform": conform})
    shard, index = manifest.shards[0], load_index(folder, manifest.shards[0])
    original = (folder / shard.name).read_bytes()
    expected, _ = epoch(folder, manifest)
    order = Order([shard.count for shard in manifest.shards], SEED, SHARDS)
    known = {image.numpy().tobytes() for image in expected}
    row, replaced = 2, 0
    offset, length = map(int, index[row, :2])
    where = next(position for position in range(COUNT) if order(position) == (0, row))
    for _ in range(100):
        mutant = mutate(original[offset : offset + length], rng)[0] or b"\0"
        changed = index.copy()
        changed[row] = [len(original), len(mutant), -1, content_hash(mutant)]
        table = io.BytesIO()
        np.save(table, changed)
        tar = original + mutant
        update = {"index_sha256": hashlib.sha256(table.getvalue()).hexdigest(), "bytes": len(tar)}
        shards = [shard.model_copy(update=update), *manifest.shards[1:]]
        spoilt = manifest.model_copy(update={"shards": shards, "root": str(folder)})
        for each in manifest.shards[1:]:
            (tmp_path / each.index).write_bytes((folder / each.index).read_bytes())
        (tmp_path / shard.index).write_bytes(table.getvalue())
        write_manifest(spoilt, tmp_path)
        try:
            (folder / shard.name).write_bytes(tar)
            images, bad = epoch(tmp_path, spoilt)
        finally:
            (folder / shard.name).write_bytes(original)
        assert {each.position for each in bad} <= {where}
        for position in set(range(COUNT)) - {where}:
            assert torch.equal(images[position], expected[position])
        if bad:
            assert images[where].numpy().tobytes() in known
        replaced += len(bad)
    assert replaced > 30
