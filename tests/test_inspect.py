"""scripts/inspect.py: what is shown, the exit status of --verify, and the grid."""

import numpy as np
import pytest
from PIL import Image

from styleloom.datasets.manifest import load_index, read_manifest, write_manifest
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.scripts.cli import run
from styleloom.scripts.inspect import main

COLOURS = {"cat": [(255, 0, 0), (0, 255, 0), (0, 0, 255)], "dog": [(255, 255, 0), (0, 255, 255)]}


@pytest.fixture
def data(tmp_path):
    """Five plain pictures of 8x4 in two classes and three shards."""
    for name, colours in COLOURS.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i, colour in enumerate(colours):
            Image.new("RGB", (8, 4), colour).save(tmp_path / "pictures" / name / f"{i}.png")
    source = open_source(tmp_path / "pictures", "folders")
    prepare(source, tmp_path / "data", width=8, height=4, shard_images=2, progress=False)
    return tmp_path / "data"


def call(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        run(main, "inspect", [str(arg) for arg in args])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_shows_what_there_is(data, capsys):
    status, out, _ = call(capsys, data)
    assert status == 0
    for line in (
        "images   5 of 8x4, RGB",
        "stored   png, lossless",
        "made by  centre crop, lanczos resize, transparency on #ffffff",
        "shards   3, 0.0 MB",
        "labels   2 classes",
        f"    cat         3 {'#' * 40}",
        f"    dog         2 {'#' * 27}",
        "from     PNG 5",
        "width 8, height 4, aspect 2.00",
        "colour   mean 102 153 102, standard deviation 125 125 125",
        read_manifest(data).hash,
    ):
        assert line in out


@pytest.fixture
def sizes(tmp_path):
    """Three pictures of sizes from 10x10 to 40x40, in two sizes."""
    (tmp_path / "many").mkdir()
    for side in (10, 20, 40):
        Image.new("L", (side, side), side).save(tmp_path / "many" / f"{side}.webp")
    source = open_source(tmp_path / "many")
    prepare(source, tmp_path / "sizes", width=8, height=8, reduced=[(4, 4)], channels=1, progress=False)
    return tmp_path / "sizes"


def test_shows_the_other_sizes_and_the_spread(sizes, capsys):
    _, out, _ = call(capsys, sizes)
    assert f"smaller  4x4: {sizes / '4x4'}" in out
    assert "from     WEBP 3" in out
    assert "width 10 to 40 (median about 20), height 10 to 40 (median about 20), aspect 1.00" in out
    assert "smaller" not in call(capsys, sizes / "4x4")[1]


def test_verify_looks_at_all_sizes(sizes, capsys):
    status, out, _ = call(capsys, sizes, "--verify")
    assert status == 0
    assert out.splitlines()[-1] == "sound: 6 images hashed and decoded."
    (sizes / "4x4" / "shard-000000.npy").unlink()
    status, out, _ = call(capsys, sizes, "--verify")
    assert status == 1
    assert "4x4/shard-000000.tar: " in out


def test_a_set_that_others_made_is_told_as_such(data, capsys):
    manifest = read_manifest(data)
    others = {"resize": "unknown", "background": None, "quality": None, "codec": "mixed", "statistics": None}
    write_manifest(manifest.model_copy(update={**others, "root": str(data)}), data)
    _, out, _ = call(capsys, data)
    assert "made by  others: the images are taken as they are" in out
    assert f"tars in  {data}" in out
    write_manifest(manifest.model_copy(update={"conform": True}), data)
    assert "centre crop, lanczos resize, transparency on #ffffff, as they are read" in call(capsys, data)[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_verify_passes_what_is_sound(data, capsys, workers):
    status, out, _ = call(capsys, data, "--verify", "--workers", workers)
    assert status == 0
    assert out.splitlines()[-1] == "sound: 5 images hashed and decoded."


def test_verify_lists_the_faults_and_fails(data, capsys):
    shard = read_manifest(data).shards[1]
    offset = load_index(data, shard)[0, 0]
    content = bytearray((data / shard.name).read_bytes())
    content[offset + 30] ^= 255
    (data / shard.name).write_bytes(content)
    (data / "shard-000002.tar").unlink()
    status, out, err = call(capsys, data, "--verify", "--workers", "2")
    assert status == 1
    assert "shard-000001.tar: its sha256 is not the manifest's" in out
    assert "shard-000001.tar 00000002: not a whole PNG image" in out
    assert "shard-000002.tar: is missing" in out
    assert f"3 faults. Restore these files, or delete {data} and prepare it again." in out
    assert "Traceback" not in err


def test_what_is_no_data_set_ends_in_a_line(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "nowhere"):
        status, out, err = call(capsys, path)
        assert (status, out) == (1, "")
        assert len(err.splitlines()) == 1
        assert "styleloom prepare SRC" in err


def test_the_grid_shows_the_samples_in_order(data, tmp_path, capsys):
    path = tmp_path / "grid.png"
    assert call(capsys, data, "--grid", path)[0] == 0
    grid = np.asarray(Image.open(path).convert("RGB"))
    assert grid.shape == (2 * 32, 3 * 64, 3)  # tiny images are enlarged
    cells = grid.reshape(2, 32, 3, 64, 3).swapaxes(1, 2).reshape(6, 32, 64, 3)
    for cell, colour in zip(cells, [*COLOURS["cat"], *COLOURS["dog"], (255, 255, 255)], strict=True):
        assert (cell == colour).all()


def test_the_grid_of_a_broken_data_set_says_so(data, tmp_path, capsys):
    (data / "shard-000001.tar").write_bytes(b"")
    status, _, err = call(capsys, data, "--grid", tmp_path / "grid.png")
    assert status == 1
    assert "shard-000001.tar has 0 bytes" in err
    assert not (tmp_path / "grid.png").exists()
