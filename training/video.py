"""Films: frames -> MP4 through ffmpeg, GIF or WebP through Pillow, or a folder of PNG.

Frames are taken one at a time and not kept, so that a film may be longer than memory is large.
"""

import contextlib
import errno
import itertools
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import GifImagePlugin, Image

from .sheets import on_white
from .whole import whole_file, whole_new_folder

SUFFIXES = (".mp4", ".gif", ".webp")
_GIF_RATE = 50  # browsers slow down what is faster
_LONGEST_WEBP = 16383  # px, of the format


def check_film(path: Path, fps: float) -> None:
    """Raises ValueError if `write_film` would refuse the path or the rate, or lacks a program: to be asked before the
    work begins."""
    if path.suffix.lower() not in ("", *SUFFIXES):
        raise ValueError(f"{path}: a film is .mp4, .gif or .webp, or a folder (a name without a dot) for PNG frames")
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"--fps {fps:g} is not 0.01 to 1000")
    if path.suffix.lower() == ".gif" and fps > _GIF_RATE:
        raise ValueError(f"--fps {fps:g}: a GIF shows at most {_GIF_RATE} frames a second")
    if path.suffix.lower() == ".mp4":
        ffmpeg()
    if path.suffix and path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if not path.suffix and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already and not an empty folder: name another one")


def write_film(path: Path, frames: Iterator[Image.Image], count: int, fps: float, crf: int = 17) -> None:
    """Writes a film, which appears whole or not at all.

    Args:
        path: NAME.mp4, .gif or .webp; a name without a suffix is a folder for frame00000.png, ...
        frames: all of one size and mode: L, RGB, or RGBA, whose transparency only WebP and PNG keep.
        count: of the frames.
        fps: frames a second. GIF counts in hundredths of a second, WebP in thousandths: their frames last as near to it
            as can be, and the whole film as long as it should.
        crf: of MP4, the quality: 0 is lossless, 17 looks so, 23 is smaller, 51 is the worst.

    Raises:
        ValueError: as `check_film`, or ffmpeg failed.
        OSError: naming the path.
    """
    check_film(path, fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    if not suffix:
        with whole_new_folder(path) as folder:
            _write_png(folder, frames)
        return
    with whole_file(path) as temporary:
        if suffix == ".mp4":
            _write_mp4(temporary, frames, fps, crf, path)
        else:
            write: Callable[[IO[bytes], Iterator[Image.Image], list[int]], None]
            write, unit = (_write_gif, 10) if suffix == ".gif" else (_write_webp, 1)
            with open(temporary, "wb") as file:
                write(file, frames, durations(count, fps, unit))


def durations(count: int, fps: float, unit: int) -> list[int]:
    """Milliseconds that each frame is shown: multiples of `unit` whose sums are as near to the truth as can be."""
    ends = [round(i * 1000 / fps / unit) * unit for i in range(count + 1)]
    return [after - before for before, after in itertools.pairwise(ends)]


def ffmpeg() -> str:
    """The path of the packaged ffmpeg. Raises ValueError if it is not installed."""
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except ImportError:
        lacks = "MP4 needs the package imageio-ffmpeg: pip install 'styleloom[video]'"
    except RuntimeError as error:
        lacks = f"imageio-ffmpeg has no ffmpeg for this machine ({str(error).splitlines()[0]})"
    raise ValueError(f"{lacks}\n.gif, .webp or a folder of PNG frames can do without it.")


def _write_png(folder: Path, frames: Iterator[Image.Image]) -> None:
    for i, frame in enumerate(frames):
        frame.save(folder / f"frame{i:05d}.png")


def _write_mp4(temporary: Path, frames: Iterator[Image.Image], fps: float, crf: int, path: Path) -> None:
    first = next(frames)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(_command(temporary, first.size, fps, crf), stdin=subprocess.PIPE, stderr=said)
        assert process.stdin is not None
        try:
            for frame in itertools.chain([first], frames):
                process.stdin.write(_even(frame).tobytes())
            process.stdin.close()
            status = process.wait()
        except BrokenPipeError:  # it ended before its time, and says why
            status = process.wait() or 1
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            # Closing flushes what is left, into a pipe that nobody reads if the process has failed.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if status:
            said.seek(0)
            words = said.read().decode(errors="replace").strip()
            if "No space left" in words:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            last = words.splitlines()[-1] if words else f"status {status}"
            raise ValueError(f"ffmpeg could not write {path}: {last}")


def _command(temporary: Path, size: tuple[int, int], fps: float, crf: int) -> list[str]:
    width, height = (side + side % 2 for side in size)
    return [
        ffmpeg(), "-y", "-nostdin", "-loglevel", "error",
        "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "pipe:0",
        # Players take untagged colours for BT.601 or BT.709 by the picture's size: say which, and convert to that.
        "-vf", "scale=out_color_matrix=bt709:out_range=tv,"
        "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709",
        "-c:v", "libx264", "-preset", "medium", "-crf", str(crf), "-pix_fmt", "yuv420p",
        "-movflags", "+faststart", "-f", "mp4", str(temporary),
    ]  # fmt: skip


def _even(frame: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3], its last row or column repeated where the sides are odd: yuv420p halves them."""
    x = np.asarray(on_white(frame))
    return np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2), (0, 0)), mode="edge")


def _write_gif(file: IO[bytes], frames: Iterator[Image.Image], milliseconds: list[int]) -> None:
    """With a palette for each frame. Pillow's own writer of films keeps all frames until the end."""
    for i, (frame, shown) in enumerate(zip(frames, milliseconds, strict=True)):
        frame = on_white(frame).quantize(256, method=Image.Quantize.MEDIANCUT)
        if i == 0:
            header, _ = GifImagePlugin.getheader(frame.copy(), info={"loop": 0, "duration": shown})
            file.writelines(header)
        file.writelines(GifImagePlugin.getdata(frame, duration=shown, include_color_table=True))
    file.write(b";")


def _write_webp(file: IO[bytes], frames: Iterator[Image.Image], milliseconds: list[int]) -> None:
    film = _Film(frames, len(milliseconds))
    if max(film.size) > _LONGEST_WEBP:
        raise ValueError(f"a WebP has at most {_LONGEST_WEBP} px a side, not {max(film.size)}: use .mp4")
    film.save(file, "WEBP", save_all=True, duration=milliseconds, loop=0, quality=90, method=4)


class _Film(Image.Image):
    """Frames as one picture of several, as Pillow writes it, made when it asks for them."""

    def __init__(self, frames: Iterator[Image.Image], count: int) -> None:
        super().__init__()
        self._frames, self.n_frames, self._at = frames, count, -1
        self.seek(0)

    def seek(self, frame: int) -> None:
        """Goes on to a frame; Pillow asks for one after the other, and in the end for the first again."""
        if frame == self._at + 1:
            shown = next(self._frames)
            self.im, self._mode, self._size, self._at = shown.im, shown.mode, shown.size, frame

    def tell(self) -> int:
        return 0
