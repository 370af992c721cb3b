"""scripts/generate.py: the images are the network's own, whatever they are asked as; bad input ends in a line."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from styleloom.scripts import generate
from styleloom.scripts.generate import parse_seeds
from styleloom.training.checkpoint import load_generator, save_snapshot
from styleloom.training.config import ProgressiveNetwork, ProgressiveRecipe, Run
from styleloom.training.draws import Draws
from styleloom.training.networks import build
from styleloom.training.networks.growing import Noise
from styleloom.training.report import to_uint8


def make(folder, run, channels: int, classes: list[str]):
    """A snapshot of a network whose weights are all away from their start, so that noise and labels show."""
    networks = build(run, 16, 16, channels, len(classes))
    generator = torch.Generator().manual_seed(3)
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    if networks[0].has_w:
        networks[0].mapping.w_avg += torch.randn(8, generator=generator)
    return save_snapshot(folder / "snapshots", *networks, run, 7000, 16, 16, channels, classes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, settings):
    """A run's folder with one snapshot."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    make(folder, settings("", ""), 3, [])
    return folder


@pytest.fixture(scope="module")
def conditional(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("generate") / "conditional"
    make(folder, settings("", "", "--data.labels"), 3, ["cat", "cow", "dog"])
    return folder


@pytest.fixture
def draw(call, tmp_path):
    """(snapshot, *options) -> the images that the command wrote, uint8 [N, C, H, W], by file name."""

    def draw(snapshot, *options):
        out = tmp_path / "images"
        status, said, err = call(generate.main, snapshot, "--out", out, *options)
        assert (status, err) == (0, "")
        assert f"are in {out}" in said
        if (out / "images.npy").exists():
            return np.load(out / "images.npy")
        images = [np.asarray(Image.open(path)) for path in sorted(out.glob("*[0-9].png"))]
        return np.stack([x[None] if x.ndim == 2 else x.transpose(2, 0, 1) for x in images])

    return draw


def own(snapshot, z, psi=0.7, noise: Noise = "const", c=None):
    """What the network itself makes of z."""
    generator, _ = load_generator(next((snapshot / "snapshots").iterdir()))
    with torch.no_grad():
        return to_uint8(generator(z, c, truncation_psi=psi, noise=noise)).numpy()


def z_of(seeds):
    return Draws(0, "generate", seeds).normal(8)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("7", [7]), ("0-3", [0, 1, 2, 3]), ("1,5, 10-12", [1, 5, 10, 11, 12]), ("4-4,4", [4, 4]), ("0007", [7])],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "5-", "-5", "5-3", "1,,2", "1;2", "1.5", "0-3-5"])
def test_bad_seeds_are_refused(text, folder, refused, tmp_path):
    complaint = refused(generate.main, folder, "--out", tmp_path / "out", f"--seeds={text}")
    assert f"--seeds {text!r}: give numbers and ranges such as 0-63" in complaint
    assert not (tmp_path / "out").exists()


def test_the_images_are_the_networks_own(folder, draw, tmp_path):
    images = draw(folder, "--seeds=3-7,1", "--batch=4")
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == [
        f"seed{seed:04d}.png" for seed in (1, 3, 4, 5, 6, 7)
    ]
    expected = own(folder, z_of([1, 3, 4, 5, 6, 7]))
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert (images != expected).mean() < 0.01
    assert expected.std() > 10
    assert np.abs(expected[0].astype(int) - expected[1]).max() > 10


def test_a_snapshot_folder_is_as_good_as_the_run(folder, draw):
    assert np.array_equal(draw(folder / "snapshots" / "nimg-000007000", "--seeds=2"), draw(folder, "--seeds=2"))


def test_npy_holds_the_same(folder, draw):
    png = draw(folder, "--seeds=0-2")
    npy = draw(folder, "--seeds=0-2", "--format=npy")
    assert (npy.dtype, npy.shape) == (np.uint8, (3, 3, 16, 16))
    assert np.array_equal(npy, png)


@pytest.mark.parametrize("form", ["png", "npy"])
def test_a_grid_shows_them_all(folder, draw, tmp_path, form):
    images = draw(folder, "--seeds=0-3", "--grid", f"--format={form}")
    grid = np.asarray(Image.open(tmp_path / "images" / "grid.png"))
    assert grid.shape == (128, 128, 3)  # 2 x 2 of 16 px, 4 times as large
    assert np.array_equal(grid[64::4, 64::4].transpose(2, 0, 1), images[3])


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_rgba(settings, draw, tmp_path, channels):
    make(tmp_path / "run", settings("", ""), channels, [])
    images = draw(tmp_path / "run", "--seeds=0-1")
    assert images.shape == (2, channels, 16, 16)
    assert np.abs(images.astype(int) - own(tmp_path / "run", z_of([0, 1]))).max() <= 1


@pytest.mark.parametrize("psi", [1, 0.3, 0])
def test_truncation(folder, draw, psi):
    images = draw(folder, "--seeds=0-1", f"--truncation={psi}")
    assert np.abs(images.astype(int) - own(folder, z_of([0, 1]), psi)).max() <= 1
    assert np.array_equal(images[0], images[1]) == (psi == 0)


def test_noise(folder, draw):
    const, none, random = (draw(folder, "--seeds=5-8", f"--noise={kind}") for kind in ("const", "none", "random"))
    assert np.abs(none.astype(int) - own(folder, z_of(range(5, 9)), noise="none")).max() <= 1
    for a, b in ((const, none), (const, random), (none, random)):
        assert (a != b).mean() > 0.1
    # Random noise follows from the seed, whatever else is drawn with it.
    assert np.abs(draw(folder, "--seeds=5-8", "--noise=random", "--batch=3").astype(int) - random).max() <= 1


def test_classes(conditional, draw):
    z = z_of([4])
    each = [own(conditional, z, c=torch.eye(3)[[k]]) for k in range(3)]
    assert np.abs(each[0].astype(int) - each[2]).max() > 10
    for k in range(3):
        assert np.abs(draw(conditional, "--seeds=4", f"--class={k}").astype(int) - each[k]).max() <= 1
    assert np.abs(draw(conditional, "--seeds=4").astype(int) - each[4 % 3]).max() <= 1  # seed modulo classes


def test_a_sweep_of_truncations(folder, draw, tmp_path):
    draw(folder, "--seeds=3,5", "--truncation=0,0.5,1", "--grid", "--batch=4")
    names = [f"seed{seed:04d}-psi{psi}.png" for seed in (3, 5) for psi in ("0", "0.5", "1")]
    assert sorted(x.name for x in (tmp_path / "images").iterdir()) == sorted(["grid.png", *names])
    sheet = np.asarray(Image.open(tmp_path / "images" / "grid.png"))
    for i, seed in enumerate((3, 5)):
        for j, psi in enumerate((0, 0.5, 1)):
            shown = np.asarray(Image.open(tmp_path / "images" / names[3 * i + j])).transpose(2, 0, 1)
            assert np.abs(shown.astype(int) - own(folder, z_of([seed]), psi)[0]).max() <= 1
            assert np.array_equal(cell(sheet, i, j, 2, 3), shown)


def cell(sheet, i: int, j: int, rows: int, columns: int):
    """Of a table of images of 16 px, enlarged to 96: uint8 [3, 16, 16]."""
    top, left = sheet.shape[0] - 96 * rows, sheet.shape[1] - 96 * columns
    assert (sheet[:top].min(), sheet[:, :left].min()) < (128, 128)  # names
    return sheet[top + 96 * i :, left + 96 * j :][:96:6, :96:6].transpose(2, 0, 1)


def test_a_sweep_into_one_array(folder, draw):
    images = draw(folder, "--seeds=3,5", "--truncation=0.5,1", "--format=npy")
    for k, (seed, psi) in enumerate([(3, 0.5), (3, 1), (5, 0.5), (5, 1)]):
        assert np.abs(images[k].astype(int) - own(folder, z_of([seed]), psi)[0]).max() <= 1


@pytest.mark.parametrize("text", ["", "0.5,", "nan", "0,inf", "0;1"])
def test_bad_truncations_are_refused(folder, refused, tmp_path, text):
    complaint = refused(generate.main, folder, "--out", tmp_path / "out", f"--truncation={text}")
    assert f"--truncation {text!r}: give a number such as 0.7" in complaint


@pytest.mark.parametrize(("option", "numbers"), [("all", [0, 1, 2]), ("2,0", [2, 0]), ("1-2", [1, 2])])
def test_several_classes(conditional, draw, tmp_path, option, numbers):
    images = draw(conditional, "--seeds=4,5", f"--class={option}", "--grid")
    names = [f"seed{seed:04d}-class{k:02d}.png" for seed in (4, 5) for k in sorted(numbers)]
    assert sorted(x.name for x in (tmp_path / "images").iterdir()) == ["grid.png", *names]
    sheet = np.asarray(Image.open(tmp_path / "images" / "grid.png"))
    for i, seed in enumerate((4, 5)):
        for j, k in enumerate(numbers):
            expected = own(conditional, z_of([seed]), c=torch.eye(3)[[k]])[0]
            assert np.abs(images[names.index(f"seed{seed:04d}-class{k:02d}.png")].astype(int) - expected).max() <= 1
            assert np.abs(cell(sheet, i, j, 2, len(numbers)).astype(int) - expected).max() <= 1


def test_classes_and_truncations(conditional, draw, tmp_path):
    draw(conditional, "--seeds=4", "--class=all", "--truncation=0.5,1", "--grid")
    assert (tmp_path / "images" / "seed0004-class02-psi0.5.png").exists()
    sheet = np.asarray(Image.open(tmp_path / "images" / "grid.png"))
    expected = own(conditional, z_of([4]), 1, c=torch.eye(3)[[2]])[0]
    assert np.abs(cell(sheet, 2, 1, 3, 2).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("text", ["0,3", "all", "cat"])
def test_classes_that_are_not_there(conditional, folder, refused, tmp_path, text):
    complaint = refused(generate.main, folder, "--out", tmp_path / "out", f"--class={text}")
    assert "give numbers and ranges" in complaint if text == "cat" else "this generator has no classes" in complaint
    if text != "all":
        complaint = refused(generate.main, conditional, "--out", tmp_path / "out", f"--class={text}")
        assert "classes 0 to 2" in complaint or text == "cat"


def test_noise_maps(folder, draw, refused, tmp_path):
    generator, _ = load_generator(folder / "snapshots" / "nimg-000007000")
    z = z_of([0, 1, 2])
    maps = Draws(1, "", [0, 1, 2]).noise_maps(generator.synthesis.sizes)
    arrays: dict[str, Any] = {f"layer{i:02d}": x.numpy() for i, x in enumerate(maps)}
    np.savez(tmp_path / "noise.npz", **arrays)
    np.save(tmp_path / "z.npy", z.numpy())
    options = ["--latents", tmp_path / "z.npy", "--noise-maps", tmp_path / "noise.npz"]
    images = draw(folder, *options, "--batch=4", "--truncation=0.5,1", "--format=npy")
    for k, psi in enumerate((0.5, 1)):
        assert np.abs(images[k::2].astype(int) - own(folder, z, psi, noise=maps)).max() <= 1
    np.savez(tmp_path / "noise.npz", **{name: x[:2] for name, x in arrays.items()})
    complaint = refused(generate.main, folder, "--out", tmp_path / "out", *options)
    assert f"does not hold {len(maps)} noise maps for 3 images" in complaint
    (tmp_path / "noise.npz").write_bytes(b"PK")
    assert "cannot read the noise maps" in refused(generate.main, folder, "--out", tmp_path / "out", *options)
    (tmp_path / "noise.npz").write_bytes(b"PK\x03\x04 and no archive")
    assert "cannot read the noise maps" in refused(generate.main, folder, "--out", tmp_path / "out", *options)
    options = ["--latents", tmp_path / "noise.npz"]
    assert "cannot read the latents" in refused(generate.main, folder, "--out", tmp_path / "out", *options)


def test_an_archive_is_no_latents(folder, refused, tmp_path):
    np.savez(tmp_path / "latents.npz", z=np.zeros([1, 8], np.float32))
    complaint = refused(generate.main, folder, "--out", tmp_path / "out", "--latents", tmp_path / "latents.npz")
    assert "is an archive of arrays" in complaint


@pytest.fixture(scope="module")
def without_w(tmp_path_factory):
    """A run's folder with a snapshot of a network that has no w."""
    folder = tmp_path_factory.mktemp("generate") / "progressive"
    run = Run(network=ProgressiveNetwork(z_dim=8, channel_base=64), recipe=ProgressiveRecipe())
    make(folder, run, 3, [])
    return folder


def test_truncation_without_w(without_w, call, refused, tmp_path):
    status, said, _ = call(generate.main, without_w, "--out", tmp_path / "out", "--seeds=0", "--truncation=0.5")
    assert status == 0
    assert "--truncation changes nothing" in said
    complaint = refused(generate.main, without_w, "--out", tmp_path / "out", "--truncation=0.5,1")
    assert "has no w, so all --truncation are the same" in complaint


@pytest.mark.parametrize("number", [3, -1])
def test_a_class_that_is_not_there(conditional, folder, refused, tmp_path, number):
    complaint = refused(generate.main, conditional, "--out", tmp_path / "out", f"--class={number}")
    assert f"--class {number}: this generator has classes 0 to 2" in complaint
    complaint = refused(generate.main, folder, "--out", tmp_path / "out", "--class=0")
    assert "this generator has no classes" in complaint


def test_latents(folder, draw, tmp_path):
    generator, _ = load_generator(folder / "snapshots" / "nimg-000007000")
    z = z_of([0, 1, 2])
    with torch.no_grad():
        w = generator.mapping(z)
    ws = w[:, None].repeat(1, generator.num_ws, 1)
    expected = own(folder, z)
    for x, space in ((z, "z"), (w, "w"), (ws, "z"), (ws.double(), "w")):
        np.save(tmp_path / "latents.npy", x.numpy())
        images = draw(folder, "--latents", tmp_path / "latents.npy", f"--space={space}")
        assert np.abs(images.astype(int) - expected).max() <= 1
    ws[:, 2:] = ws[[1, 2, 0], 2:]  # another w in the later layers
    np.save(tmp_path / "latents.npy", ws.numpy())
    assert (draw(folder, "--latents", tmp_path / "latents.npy") != expected).mean() > 0.1
    assert len(list((tmp_path / "images").glob("latent000[0-2].png"))) == 3


@pytest.mark.parametrize(
    "x",
    [
        np.zeros([2, 7], np.float32),
        np.zeros([2, 3, 8], np.float32),
        np.zeros([8], np.float32),
        np.zeros([2, 8], np.int64),
        np.array([{}], object),
    ],
)
def test_latents_that_do_not_fit_are_refused(folder, refused, tmp_path, x):
    np.save(tmp_path / "latents.npy", x)
    complaint = refused(generate.main, folder, "--out", tmp_path / "out", "--latents", tmp_path / "latents.npy")
    assert str(tmp_path / "latents.npy") in complaint
    assert not (tmp_path / "out").exists()


def test_missing_latents_are_refused(folder, refused, tmp_path):
    assert "cannot read the latents" in refused(
        generate.main, folder, "--out", tmp_path / "out", "--latents", tmp_path / "none.npy"
    )


def test_no_snapshot(refused, tmp_path):
    complaint = refused(generate.main, tmp_path / "none", "--out", tmp_path / "out")
    assert f"there is no snapshot in {tmp_path / 'none'}" in complaint


def test_a_damaged_snapshot(settings, refused, tmp_path):
    snapshot = make(tmp_path, settings("", ""), 3, [])
    path = snapshot / "generator.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert f"cannot read {path}" in refused(generate.main, snapshot, "--out", tmp_path / "out")
    path.unlink()
    assert f"cannot read {path}" in refused(generate.main, snapshot, "--out", tmp_path / "out")
    (snapshot / "snapshot.json").write_text("{")
    assert "is not a snapshot that this version reads" in refused(generate.main, snapshot, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--device=tpu9", "--device tpu9"),
        ("--batch=0", "--batch is at least 1"),
        ("--truncation=much", "truncation"),
        ("--nose", "Perhaps you meant --noise?"),
    ],
)
def test_other_bad_options(folder, refused, tmp_path, option, named):
    assert named in refused(generate.main, folder, "--out", tmp_path / "out", option)


def test_out_is_needed(folder, refused):
    assert "--out" in refused(generate.main, folder)


def test_help(call):
    status, out, _ = call(generate.main, "--help")
    assert status == 0
    assert "--truncation" in out
    assert "--class" in out
