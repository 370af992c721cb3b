"""scripts/interpolate.py: the way's frames are the network's own, begin and end where they should."""

import numpy as np
import pytest
import torch
from PIL import Image

from styleloom.scripts import interpolate
from styleloom.training.checkpoint import load_generator, save_snapshot
from styleloom.training.config import ProgressiveNetwork, ProgressiveRecipe, Run
from styleloom.training.draws import Draws
from styleloom.training.latents import slerp
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
    return make(tmp_path_factory.mktemp("interpolate"), settings("", ""))


@pytest.fixture(scope="module")
def without_w(tmp_path_factory):
    run = Run(network=ProgressiveNetwork(z_dim=8, channel_base=64), recipe=ProgressiveRecipe())
    return make(tmp_path_factory.mktemp("interpolate"), run)


@pytest.fixture
def filmed(call, tmp_path):
    """(snapshot, *options) -> the frames of one film, reduced to their own 16 px, uint8 [N, H, W, C]."""
    count = 0

    def filmed(snapshot, *options):
        nonlocal count
        count += 1
        out = tmp_path / f"frames{count}"
        status, said, _ = call(interpolate.main, snapshot, "--out", out, *options)
        assert status == 0
        images = np.stack([np.asarray(Image.open(path)) for path in sorted(out.iterdir())])
        assert f"{len(images)} frames" in said
        return images[:, ::8, ::8]

    return filmed


def z_of(*seeds):
    return Draws(0, "generate", seeds).normal(8)


def own(snapshot, w, psi=0.7):
    """What the network itself makes of w."""
    G, _ = load_generator(snapshot)
    with torch.no_grad():
        ws = G.mapping.w_avg.lerp(w, psi)[:, None].expand(-1, G.num_ws, -1)
        return to_uint8(G.synthesis(ws)).numpy().transpose(0, 2, 3, 1)


def mapped(snapshot, z):
    with torch.no_grad():
        return load_generator(snapshot)[0].mapping(z)


def apart(a, b) -> int:
    return np.abs(a.astype(int) - b).max()


def test_straight_in_w(snapshot, filmed):
    frames = filmed(snapshot, "--seeds=3,5,9", "--frames=4", "--batch=5")
    assert frames.shape == (12, 16, 16, 3)
    w = mapped(snapshot, z_of(3, 5, 9))
    path = torch.cat([w[[i]].lerp(w[[(i + 1) % 3]], t / 4) for i in range(3) for t in range(4)])
    assert apart(frames, own(snapshot, path)) <= 1
    assert apart(frames[0], frames[4]) > 10


def test_great_arcs_in_z(snapshot, filmed):
    frames = filmed(snapshot, "--seeds=3,5", "--frames=4", "--space=z", "--no-loop", "--truncation=1")
    assert len(frames) == 5
    z = z_of(3, 5)
    path = torch.cat([slerp(z[[0]], z[[1]], torch.tensor([t / 4])) for t in range(5)])
    assert apart(frames, own(snapshot, mapped(snapshot, path), 1)) <= 1
    assert apart(frames, filmed(snapshot, "--seeds=3,5", "--frames=4", "--no-loop", "--truncation=1")) > 5


def test_loops(snapshot, filmed):
    """The last frame is one step before the first: the loop of the same keys begun one frame on is the same, turned."""
    closed = filmed(snapshot, "--seeds=3,5", "--frames=6")
    there, back = closed[:7], [closed[0], *closed[:5:-1]]
    assert len(closed) == 12
    assert apart(there, np.stack(back)) <= 1  # of two keys: straight there and straight back
    steps = [np.abs(closed[i].astype(int) - closed[i - 1]).mean() for i in range(12)]
    assert steps[0] < 2 * np.median(steps)
    opened = filmed(snapshot, "--seeds=3,5", "--frames=6", "--no-loop")
    assert len(opened) == 7
    assert apart(opened, there) <= 1


def test_smooth(snapshot, filmed):
    straight = filmed(snapshot, "--seeds=3,5,9", "--frames=4")
    smooth = filmed(snapshot, "--seeds=3,5,9", "--frames=4", "--smooth")
    assert apart(smooth[::4], straight[::4]) <= 1
    assert apart(smooth[2::4], straight[2::4]) > 3


def test_several_at_once(snapshot, filmed):
    frames = filmed(snapshot, "--seeds=0-11", "--frames=2", "--grid=2x3", "--batch=7")
    assert frames.shape == (4, 32, 48, 3)
    for cell in range(6):
        alone = filmed(snapshot, f"--seeds={2 * cell},{2 * cell + 1}", "--frames=2")
        y, x = 16 * (cell // 3), 16 * (cell % 3)
        assert apart(frames[:, y : y + 16, x : x + 16], alone) <= 1


def test_random_noise_stands_still(snapshot, filmed):
    twice = filmed(snapshot, "--seeds=3,3", "--frames=2", "--noise=random")
    assert apart(twice, twice[:1]) <= 1
    assert apart(twice, filmed(snapshot, "--seeds=3,3", "--frames=2")) > 3


def test_classes(tmp_path, settings, filmed, refused):
    folder = make(tmp_path / "conditional", settings("", "", "--data.labels"), ["cat", "cow", "dog"])
    options = "--seeds=3,4", "--frames=2", "--no-loop"
    for space in ("w", "z"):
        frames = {c: filmed(folder, *options, f"--space={space}", f"--class={c}") for c in ("0", "1", "0,1", "1,1")}
        assert apart(frames["0,1"][0], frames["0"][0]) <= 1
        assert apart(frames["0,1"][2], frames["1"][2]) <= 1
        assert apart(frames["1,1"], frames["1"]) <= 1
        assert apart(frames["0"][0], frames["1"][0]) > 5
        assert apart(filmed(folder, *options, f"--space={space}"), frames["0,1"]) <= 1  # seed modulo classes
    complaint = refused(interpolate.main, folder, "--out", tmp_path / "x", "--seeds=0-3", "--class=0,1")
    assert "give one class, or one for each of the 4 seeds" in complaint


def test_without_w(without_w, filmed, refused, tmp_path):
    frames = filmed(without_w, "--seeds=3,5", "--frames=2", "--no-loop", "--truncation=1")
    z = z_of(3, 5)
    path = torch.cat([slerp(z[[0]], z[[1]], torch.tensor([t / 2])) for t in range(3)])
    with torch.no_grad():
        expected = to_uint8(load_generator(without_w)[0](path)).numpy().transpose(0, 2, 3, 1)
    assert apart(frames, expected) <= 1
    for option in ("--space=w", "--smooth"):
        complaint = refused(interpolate.main, without_w, "--out", tmp_path / "x", "--truncation=1", option)
        assert option.strip("=w") in complaint
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_formats(snapshot, call, tmp_path, suffix):
    path = tmp_path / "new" / f"a{suffix}"
    status, said, _ = call(interpolate.main, snapshot, "--out", path, "--seeds=0,1", "--frames=3", "--fps=20")
    assert status == 0
    assert "6 frames, 0.3 s, of 1x1 images of 16x16" in said
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    if suffix != ".mp4":  # for the frames of those see test_video.py
        with Image.open(path) as film:
            assert (film.size, getattr(film, "n_frames", 0)) == ((128, 128), 6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seeds=1"], "1 seeds for 1 film(s)"),
        (["--seeds=0-4", "--grid=1x2"], "5 seeds for 2 film(s)"),
        (["--seeds=0,1", "--grid=1x2"], "give each at least 2"),
        (["--grid=2"], "--grid '2': give ROWSxCOLUMNS"),
        (["--grid=0x2"], "--grid '0x2'"),
        (["--frames=0"], "--frames is at least 1"),
        (["--fps=0"], "--fps 0"),
        (["--crf=99"], "--crf is 0 to 51"),
        (["--smooth", "--space=z"], "--smooth is for --space w"),
        (["--seeds=x"], "--seeds 'x'"),
        (["--out=a.avi"], ".mp4, .gif or .webp"),
    ],
)
def test_bad_options(snapshot, refused, tmp_path, options, says):
    assert says in refused(interpolate.main, snapshot, "--out", tmp_path / "x", *options)
    assert not (tmp_path / "x").exists()
