"""scripts/mix.py: no styles leave the row's image, all make the column's, some the network's own mixture."""

import numpy as np
import pytest
import torch
from PIL import Image

from styleloom.scripts import mix
from styleloom.training.checkpoint import load_generator, save_snapshot
from styleloom.training.config import ProgressiveNetwork, ProgressiveRecipe, Run
from styleloom.training.draws import Draws
from styleloom.training.networks import build
from styleloom.training.report import to_uint8


def make(folder, run, classes=()):
    networks = build(run, 16, 16, 3, len(classes))
    generator = torch.Generator().manual_seed(3)
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return save_snapshot(folder, *networks, run, 7000, 16, 16, 3, list(classes))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory, settings):
    return make(tmp_path_factory.mktemp("mix"), settings("", ""))


@pytest.fixture
def mixed(call, tmp_path):
    """(snapshot, *options) -> what the command wrote, uint8 [H, W, C], by name without .png."""

    def mixed(snapshot, *options):
        out = tmp_path / "out"
        status, said, _ = call(mix.main, snapshot, "--out", out, "--rows=1,2", "--cols=5-7", *options)
        assert status == 0
        assert "2 x 3 mixtures" in said
        return {path.stem: np.asarray(Image.open(path)) for path in out.glob("*.png")}

    return mixed


PLACES = [(r, c) for r in (1, 2) for c in (5, 6, 7)]


@pytest.mark.parametrize("noise", ["const", "none"])
def test_none_and_all(snapshot, mixed, noise):
    none, all_ = (
        mixed(snapshot, "--styles=none", f"--noise={noise}"),
        mixed(snapshot, "--styles=all", f"--noise={noise}"),
    )
    assert len(none) == 1 + 2 + 3 + 6
    for r, c in PLACES:
        assert np.array_equal(none[f"row{r:04d}-col{c:04d}"], none[f"row{r:04d}"])
        assert np.array_equal(all_[f"row{r:04d}-col{c:04d}"], none[f"col{c:04d}"])
    assert not np.array_equal(none["row0001"], none["row0002"])
    assert not np.array_equal(none["row0001"], none["col0005"])


def test_some(snapshot, mixed):
    images = mixed(snapshot, "--styles=1-2,5", "--batch=4", "--truncation=0.5")
    G, _ = load_generator(snapshot)
    with torch.no_grad():
        w = G.mapping.w_avg.lerp(G.mapping(Draws(0, "generate", [1, 2, 5, 6, 7]).normal(8)), 0.5)
        ws = w[:, None].repeat(1, G.num_ws, 1)
        for r, c in PLACES:
            both = ws[[r - 1]].clone()
            both[:, [1, 2, 5]] = ws[[c - 3]][:, [1, 2, 5]]
            expected = to_uint8(G.synthesis(both)).numpy()[0].transpose(1, 2, 0)
            assert np.abs(images[f"row{r:04d}-col{c:04d}"].astype(int) - expected).max() <= 1
        expected = to_uint8(G.synthesis(ws[[0]])).numpy()[0].transpose(1, 2, 0)
    assert np.abs(images["row0001"].astype(int) - expected).max() <= 1


def test_the_table(snapshot, mixed, call, tmp_path):
    images = mixed(snapshot, "--styles=coarse")
    sheet = images["table"]
    status, *_ = call(mix.main, snapshot, "--out", tmp_path / "new" / "a.png", "--rows=1,2", "--cols=5-7")
    assert status == 0
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["a.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), sheet)
    for name, (up, back) in {"row0002-col0007": (1, 1), "row0001-col0006": (2, 2), "row0001-col0007": (2, 1)}.items():
        y, x = sheet.shape[0] - 96 * up, sheet.shape[1] - 96 * back
        assert np.array_equal(sheet[y : y + 96 : 6, x : x + 96 : 6], images[name])
    y, x = sheet.shape[0] - 96, sheet.shape[1] - 3 * 96
    left = [sheet[y : y + 96 : 6, x - 96 - gap : x - gap : 6] for gap in range(1, 12)]
    assert any(np.array_equal(part, images["row0002"]) for part in left)


def test_random_noise_is_the_rows(snapshot, mixed):
    images, again = (mixed(snapshot, "--styles=none", "--noise=random", f"--batch={n}") for n in (2, 16))
    for r, c in PLACES:
        assert np.abs(images[f"row{r:04d}-col{c:04d}"].astype(int) - images[f"row{r:04d}"]).max() <= 1
    assert all(np.abs(images[name].astype(int) - again[name]).max() <= 1 for name in images if name != "table")


def test_classes(tmp_path, settings, mixed, refused):
    folder = make(tmp_path / "conditional", settings("", "", "--data.labels"), ["cat", "cow", "dog"])
    each = [mixed(folder, "--styles=none", f"--class={k}")["row0001"] for k in range(3)]
    assert not np.array_equal(each[0], each[1])
    assert np.array_equal(mixed(folder, "--styles=none")["row0001"], each[1])
    complaint = refused(mix.main, folder, "--out", tmp_path / "x", "--class=0,1")
    assert "--class 0,1: one class at a time" in complaint
    assert "classes 0 to 2" in refused(mix.main, folder, "--out", tmp_path / "x", "--class=3")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--styles=6", "has the layers 0 to 5, so no 6"),
        ("--styles=fine", "has the layers 0 to 5, so no fine"),
        ("--styles=some", "--styles 'some'"),
        ("--rows=a", "--rows 'a': give numbers and ranges"),
        ("--cols=", "--cols ''"),
        ("--batch=0", "--batch"),
        ("--truncation=nan", "--truncation is a number"),
        ("--truncation-cutoff=-1", "--truncation-cutoff"),
        ("--out=a.jpg", "name a .png file"),
    ],
)
def test_bad_options(snapshot, refused, tmp_path, option, says):
    assert says in refused(mix.main, snapshot, "--out", tmp_path / "x", option)
    assert not (tmp_path / "x").exists()


def test_without_w(tmp_path, refused):
    run = Run(network=ProgressiveNetwork(z_dim=8, channel_base=64), recipe=ProgressiveRecipe())
    complaint = refused(mix.main, make(tmp_path / "progressive", run), "--out", tmp_path / "x.png")
    assert "no w, so there are no styles to mix" in complaint
