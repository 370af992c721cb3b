"""training/video.py: films that players can read, as long as they should be, and no half ones."""

import errno
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageSequence

from styleloom.training import video
from styleloom.training.video import check_film, durations, write_film


def frames(count: int, size=(33, 18), mode: str = "RGB"):
    """Flat colours, each brighter than the one before."""
    for i in range(count):
        colour = (20 * i, 100, 255 - 20 * i, 128)[: len(mode)]
        yield Image.new(mode, size, colour if len(mode) > 1 else colour[0])


def read_mp4(path):
    """(what ffmpeg says of it, its frames, uint8 [N, H, W, 3])."""
    command = [video.ffmpeg(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    about = done.stderr.decode()
    width, height = map(int, re.findall(r"Video: h264.*?, (\d+)x(\d+)[ ,]", about)[0])
    return about, np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


@pytest.mark.parametrize(("size", "even"), [((33, 17), (34, 18)), ((32, 18), (32, 18))])
def test_mp4(tmp_path, size, even):
    path = tmp_path / "new" / "a.mp4"
    write_film(path, frames(10, size), 10, fps=25)
    about, shown = read_mp4(path)
    assert shown.shape == (10, even[1], even[0], 3)
    assert "yuv420p(tv, bt709, progressive)" in about
    assert " 25 fps" in about
    assert "Duration: 00:00:00.40" in about
    for i, x in enumerate(shown):
        assert np.abs(x.astype(int) - [20 * i, 100, 255 - 20 * i]).max() <= 8
    assert [x.name for x in path.parent.iterdir()] == ["a.mp4"]


def test_mp4_of_grey_and_of_transparency(tmp_path):
    for mode, expected in (("L", [40] * 3), ("RGBA", [147, 177, 235])):
        write_film(tmp_path / "a.mp4", frames(3, (32, 32), mode), 3, fps=30)
        _, shown = read_mp4(tmp_path / "a.mp4")
        assert np.abs(shown[2].astype(int).mean(axis=(0, 1)) - expected).max() <= 4


@pytest.mark.parametrize(("suffix", "unit"), [(".gif", 10), (".webp", 1)])
def test_gif_and_webp(tmp_path, suffix, unit):
    path = tmp_path / f"a{suffix}"
    write_film(path, frames(10), 10, fps=30)
    with Image.open(path) as film:
        assert (film.size, film.info["loop"]) == ((33, 18), 0)
        shown = []
        for i, frame in enumerate(ImageSequence.Iterator(film)):
            colour = np.asarray(frame.convert("RGB")).mean(axis=(0, 1))
            assert np.abs(colour - [20 * i, 100, 255 - 20 * i]).max() <= 6
            shown.append(frame.info["duration"])
    assert shown == durations(10, 30, unit)
    assert abs(sum(shown) - 1000 / 3) <= unit / 2


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_frames_that_are_alike_take_their_time(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    colours = ["red", "red", "blue", "blue", "red"]
    write_film(path, (Image.new("RGB", (16, 16), colour) for colour in colours), 5, fps=10)
    with Image.open(path) as film:
        total = 0
        for frame in ImageSequence.Iterator(film):
            frame.load()
            total += frame.info["duration"]
    assert total == 500


def test_webp_keeps_transparency(tmp_path):
    write_film(tmp_path / "a.webp", frames(2, mode="RGBA"), 2, fps=10)
    with Image.open(tmp_path / "a.webp") as film:
        assert np.asarray(film.convert("RGBA"))[0, 0, 3] == 128


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4", ""])
def test_frames_are_asked_for_one_at_a_time(tmp_path, suffix, monkeypatch):
    """When the last is made, those before have been let go."""
    alive = []

    class Counted(Image.Image):
        def __init__(self):
            super().__init__()
            alive.append(1)

        def __del__(self):
            alive.pop()

    most = 0

    def counted():
        nonlocal most
        for frame in frames(40):
            image = Counted()
            image.im, image._mode, image._size = frame.im, frame.mode, frame.size
            yield image
            most = max(most, len(alive))
            del image

    write_film(tmp_path / f"a{suffix}", counted(), 40, fps=10)
    assert 1 <= most <= 3


def test_png(tmp_path):
    write_film(tmp_path / "a", frames(3, mode="RGBA"), 3, fps=30)
    assert sorted(x.name for x in (tmp_path / "a").iterdir()) == [f"frame{i:05d}.png" for i in range(3)]
    with Image.open(tmp_path / "a" / "frame00002.png") as image:
        assert image.getpixel((0, 0)) == (40, 100, 215, 128)


@pytest.mark.parametrize("fps", [7, 23.976, 30, 50])
def test_durations(fps):
    for unit in (1, 10):
        shown = durations(101, fps, unit)
        assert all(x % unit == 0 and x > 0 for x in shown)
        assert np.abs(np.cumsum(shown) - np.arange(1, 102) * 1000 / fps).max() <= unit / 2
        assert max(shown) - min(shown) <= unit


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4", ""])
def test_a_film_that_fails_leaves_nothing(tmp_path, suffix):
    def failing():
        yield from frames(3)
        raise RuntimeError("out of memory")

    path = tmp_path / f"a{suffix}"
    if suffix:
        path.write_text("old")
    with pytest.raises(RuntimeError):
        write_film(path, failing(), 6, fps=30)
    assert [x.name for x in tmp_path.iterdir()] == (["a" + suffix] if suffix else [])
    assert not suffix or path.read_text() == "old"


def fake_ffmpeg(tmp_path, monkeypatch, script: str) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(video, "ffmpeg", lambda: str(program))


@pytest.mark.skipif(sys.platform == "win32", reason="needs /bin/sh")
@pytest.mark.parametrize("reads", ["", "cat > /dev/null;"])
def test_a_full_disk(tmp_path, monkeypatch, reads):
    fake_ffmpeg(tmp_path, monkeypatch, f"{reads} echo 'av_interleaved: No space left on device' >&2; exit 228")
    with pytest.raises(OSError, match="No space left") as caught:
        write_film(tmp_path / "out" / "a.mp4", frames(400, (256, 256), "L"), 400, fps=30)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "out" / "a.mp4"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs /bin/sh")
@pytest.mark.parametrize(
    ("script", "says"), [("echo 'Unknown encoder' >&2; exit 1", "Unknown encoder"), ("exit 3", "status 3")]
)
def test_ffmpeg_fails(tmp_path, monkeypatch, script, says):
    fake_ffmpeg(tmp_path, monkeypatch, script)
    with pytest.raises(ValueError, match=f"ffmpeg could not write .*a.mp4: {says}"):
        write_film(tmp_path / "out" / "a.mp4", frames(4), 4, fps=30)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r"pip install 'styleloom\[video\]'"):
        check_film(tmp_path / "a.mp4", 30)
    check_film(tmp_path / "a.gif", 30)


@pytest.mark.parametrize(
    ("name", "fps", "says"),
    [
        ("a.avi", 30, ".mp4, .gif or .webp"),
        ("a.mp4", 0, "--fps 0"),
        ("a.gif", 0.001, "is not 0.01 to 1000"),
        ("a.mp4", float("nan"), "--fps nan"),
        ("a.gif", 60, "at most 50"),
        ("full", 30, "is there already"),
        ("folder.gif", 30, "is a folder"),
    ],
)
def test_what_cannot_be_a_film(tmp_path, name, fps, says):
    (tmp_path / "folder.gif").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match=says):
        check_film(tmp_path / name, fps)


def test_a_webp_too_large(tmp_path):
    with pytest.raises(ValueError, match="at most 16383 px"):
        write_film(tmp_path / "a.webp", frames(2, (16384, 2)), 2, fps=10)
    assert list(tmp_path.iterdir()) == []
