"""scripts/project.py: what it writes draws the same images again, and says by what images were compared."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from styleloom.scripts import generate, project
from styleloom.training.checkpoint import save_snapshot
from styleloom.training.config import ProgressiveNetwork, ProgressiveRecipe, Run
from styleloom.training.networks import build


def make(folder, run, classes=(), channels: int = 3):
    networks = build(run, 16, 16, channels, len(classes))
    generator = torch.Generator().manual_seed(3)
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return save_snapshot(folder, *networks, run, 7000, 16, 16, channels, list(classes))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory, settings):
    return make(tmp_path_factory.mktemp("project"), settings("", ""))


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """Two pictures: one of 24x16 lying on its side, one transparent."""
    folder = tmp_path_factory.mktemp("targets")
    pixels = np.zeros([16, 24, 3], np.uint8)
    pixels[:8] = 200, 50, 50
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(folder / "lying.png", exif=exif)
    Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(folder / "clear.png")
    return folder / "lying.png", folder / "clear.png"


def facts(out):
    return json.loads((out / "projection.json").read_text())


@pytest.mark.parametrize("space", ["w", "w+"])
def test_it_can_be_drawn_again(snapshot, targets, call, tmp_path, space):
    out = tmp_path / "out"
    status, said, _ = call(
        project.main, snapshot, *targets, "--out", out, "--steps=40", f"--space={space}", "--batch=1"
    )  # fmt: skip
    assert status == 0
    assert "the snapshot's own discriminator serves" in said
    assert sorted(x.name for x in out.iterdir()) == ["noise.npz", "proj.png", "projected_w.npy", "projection.json"]
    ws = np.load(out / "projected_w.npy", allow_pickle=False)
    assert (ws.dtype, ws.shape) == (np.float32, (2, 6, 8))
    sheet = np.asarray(Image.open(out / "proj.png"))
    shown = sheet[-256:, -256:][::8, ::8]  # two rows of target and projection
    lying, clear = shown[:16, :16], shown[16:, :16]
    assert (lying[:, 8:] == [200, 50, 50]).all()  # turned upright: what was above is right
    assert (lying[:, :8] == 0).all()
    assert (clear == 255).all()
    status, *_ = call(
        generate.main, snapshot, "--latents", out / "projected_w.npy", "--noise-maps", out / "noise.npz",
        "--truncation=1", "--out", tmp_path / "again", "--format=npy",
    )  # fmt: skip
    assert status == 0
    again = np.load(tmp_path / "again" / "images.npy").transpose(0, 2, 3, 1)
    assert np.abs(again.astype(int) - np.stack([shown[:16, 16:], shown[16:, 16:]])).max() <= 1
    about = facts(out)
    assert (about["space"], about["steps"], about["noise"], about["nimg"]) == (space, 40, "optimise", 7000)
    assert about["compared_by"] == "features of the snapshot's own discriminator, and pixels"
    for line, path, image, target in zip(about["results"], targets, again, (lying, clear), strict=True):
        assert line["picture"] == str(path)
        assert line["distance"] < 0.8 * line["distance_at_start"]
        mse = ((image / 255 - target / 255) ** 2).mean()
        assert line["psnr_db"] == pytest.approx(-10 * np.log10(mse), abs=0.1)
        assert line["noise_autocorrelation"] >= 0


def test_batches_change_nothing(snapshot, targets, call, tmp_path):
    found = []
    for batch in (1, 2):
        out = tmp_path / str(batch)
        status, *_ = call(project.main, snapshot, *targets, "--out", out, "--steps=10", f"--batch={batch}", "--video")
        assert status == 0
        found.append(np.load(out / "projected_w.npy"))
    assert np.abs(found[0] - found[1]).max() < 1e-3
    assert {x.name for x in (tmp_path / "1").glob("*.mp4")} == {"video-0.mp4", "video-1.mp4"}
    assert {x.name for x in (tmp_path / "2").glob("*.mp4")} == {"video.mp4"}


def test_without_a_discriminator(settings, targets, call, tmp_path):
    folder = make(tmp_path / "snapshots", settings("", ""))
    (folder / "discriminator.safetensors").unlink()
    status, said, _ = call(project.main, folder, targets[0], "--out", tmp_path / "out", "--steps=2", "--noise=none")
    assert status == 0
    assert "without a discriminator in the snapshot, only pixels are compared" in said
    assert " --noise none " in said
    assert facts(tmp_path / "out")["compared_by"] == "Laplacian pyramid of pixels"
    assert not (tmp_path / "out" / "noise.npz").exists()


class Grey(nn.Module):
    def forward(self, x: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        return x.mean(dim=1).flatten(1) / 4000


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
@pytest.mark.parametrize("channels", [1, 4])
def test_lpips_of_grey_and_rgba(settings, targets, call, tmp_path, channels):
    folder = make(tmp_path / "snapshots", settings("", ""), channels=channels)
    torch.jit.script(Grey()).save(str(tmp_path / "grey.pt"))
    status, said, _ = call(
        project.main, folder, *targets, "--out", tmp_path / "out", "--steps=30", "--lpips", tmp_path / "grey.pt"
    )  # fmt: skip
    assert status == 0
    assert "Note" not in said
    assert facts(tmp_path / "out")["compared_by"] == "LPIPS (grey.pt)"
    for line in facts(tmp_path / "out")["results"]:
        assert line["distance"] < 0.9 * line["distance_at_start"]


def test_into_z(targets, call, tmp_path):
    run = Run(network=ProgressiveNetwork(z_dim=8, channel_base=64), recipe=ProgressiveRecipe())
    folder = make(tmp_path / "snapshots", run)
    status, said, _ = call(project.main, folder, *targets, "--out", tmp_path / "out", "--steps=5", "--space=w+")
    assert status == 0
    assert "has no w: projecting into z, not w+" in said
    assert facts(tmp_path / "out")["space"] == "z"
    assert facts(tmp_path / "out")["noise"] == "the generator has none"
    assert np.load(tmp_path / "out" / "projected_w.npy").shape == (2, 1, 8)
    status, *_ = call(
        generate.main, folder, "--latents", tmp_path / "out" / "projected_w.npy", "--out", tmp_path / "again",
        "--truncation=1", "--format=npy",
    )  # fmt: skip
    assert status == 0
    again = np.load(tmp_path / "again" / "images.npy")[1].transpose(1, 2, 0)
    shown = np.asarray(Image.open(tmp_path / "out" / "proj.png"))[-128::8, -128::8]
    assert np.abs(again.astype(int) - shown).max() <= 1


def test_classes(settings, targets, call, refused, tmp_path):
    folder = make(tmp_path / "snapshots", settings("", "", "--data.labels"), ["cat", "cow", "dog"])
    found = []
    for option in ([], ["--class=0"], ["--class=2"]):
        status, *_ = call(project.main, folder, targets[0], "--out", tmp_path / "out", "--steps=1", *option)
        assert status == 0
        found.append(np.load(tmp_path / "out" / "projected_w.npy"))
    assert np.abs(found[1] - found[2]).max() > 0.05
    assert np.abs(found[0] - found[1]).max() > 0.01
    assert "classes 0 to 2" in refused(project.main, folder, targets[0], "--out", tmp_path / "x", "--class=3")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps=0"], "--steps is at least 1"),
        (["--seed=-1"], "--seed is 0 or more"),
        (["--batch=0"], "--batch"),
        (["--lpips=none.pt"], "none.pt"),
        (["--background=red"], "--background"),
        (["--class=0"], "this generator has no classes"),
        (["--space=z"], "space"),
    ],
)
def test_bad_options(snapshot, targets, refused, tmp_path, options, says):
    assert says in refused(project.main, snapshot, targets[0], "--out", tmp_path / "x", *options)
    assert not (tmp_path / "x").exists()


def test_bad_pictures(snapshot, refused, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    complaint = refused(project.main, snapshot, tmp_path / "a.png", "--out", tmp_path / "x")
    assert f"cannot read the picture {tmp_path / 'a.png'}: not a picture in a known format" in complaint
    complaint = refused(project.main, snapshot, tmp_path / "b.png", "--out", tmp_path / "x")
    assert f"No such file or directory: {tmp_path / 'b.png'}" in complaint
    assert "is a folder" in refused(project.main, snapshot, tmp_path, "--out", tmp_path / "x")
    assert "IMAGE" in refused(project.main, snapshot, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
