"""scripts/prepare.py: the command line, and what happens when processes are stopped or killed."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from styleloom.datasets.manifest import WORK, read_manifest
from styleloom.scripts.cli import run
from styleloom.scripts.prepare import joined_resolutions, main, parse_resolution, parse_resolutions

COMMAND = (sys.executable, "-m", "styleloom.scripts.prepare")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(root / f"{i}.png")
    (root / "broken.png").write_bytes(b"x")
    return root


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Pictures of which each takes about a tenth of a second. They differ in what follows the image only."""
    root = tmp_path_factory.mktemp("slow")
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=95)
    for i in range(24):
        (root / f"{i:02d}.jpg").write_bytes(file.getvalue() + b"%02d" % i)
    return root


def arguments(source, dest, workers: int, *more: str) -> list[str]:
    return [str(source), str(dest), "--resolution", "32", "--shard-images", "2", "--workers", str(workers), *more]


def digests(dest) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in dest.iterdir() if path.is_file()}


def call(capsys, *args) -> tuple[int, str, list[str]]:
    """Exit status, stdout, and the lines on stderr without the progress bar."""
    with pytest.raises(SystemExit) as stop:
        run(main, "prepare", [str(arg) for arg in args])
    out, err = capsys.readouterr()
    return (
        int(stop.value.code or 0),
        out,
        [line for line in err.splitlines() if line.strip() and not line.startswith("preparing: ")],
    )


def test_prepares_and_says_what_to_do_next(pictures, tmp_path, capsys):
    dest = tmp_path / "my data"
    status, out, err = call(capsys, pictures, dest, "--resolution", "16x8", "--workers", "1", "--channels", "1")
    assert (status, err) == (0, [])
    lines = out.splitlines()
    assert lines[0] == f"{dest} is ready: 6 images of 16x8 in 1 shard, 0.0 MB."
    assert lines[1] == f"Of 7 pictures: 1 unreadable. See {dest}/report.json"
    assert lines[2] == f"What is in it, at a glance: {dest}/contact.png"
    assert lines[3] == f"Next: styleloom train stylegan2-cpu --data.path '{dest}' --out RUN"
    manifest = read_manifest(dest)
    assert (manifest.width, manifest.height, manifest.channels) == (16, 8, 1)
    status, out, _ = call(capsys, pictures, dest, "--resolution", "16x8", "--workers", "2", "--channels", "1")
    assert status == 0
    assert "is prepared already: 6 images" in out


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["{pictures}", "{dest}", "--resolution", "large"], 1, "--resolution is a number such as 256"),
        (["{pictures}", "{dest}", "--resolution", "0"], 1, "resolution 0x0 is not within"),
        (["{pictures}", "{dest}"], 1, "say SRC, DEST and --resolution (with --index-only, DEST and"),
        (["{pictures}", "--resolution", "8"], 1, "say SRC, DEST and --resolution"),
        ([], 2, "SRC"),
        (["{pictures}", "--index-only"], 1, "no tars in"),
        (
            ["{pictures}", "{dest}", "--index-only", "--codec", "jpeg", "--part", "1/2"],
            1,
            "so --codec, --part cannot be",
        ),
        (
            ["{pictures}", "{dest}", "--index-only", "--resolution", "64", "32"],
            1,
            "--index-only takes one --resolution",
        ),
        (["{pictures}", "{dest}", "--resolution", "8", "--label-field", "kind"], 1, "--label-field are for tars, and"),
        (["{pictures}", "{dest}", "--resolution", "8", "--codec", "gif"], 2, "codec"),
        (["{pictures}", "{dest}", "--resolution", "8", "--labels", "folders"], 1, "7 of 7 pictures have no label"),
        (["{pictures}", "{dest}", "--resolution", "8", "--labels", "nowhere.csv"], 1, "nowhere.csv"),
        (["{dest}", "{dest}", "--resolution", "8"], 1, "there is no"),
        (["{pictures}", "{pictures}/x", "--resolution", "8"], 1, "within the source"),
        (["{pictures}", "{dest}", "--resolution", "32", "16x8"], 1, "32x32 and 16x8 differ in their aspect"),
        (["{pictures}", "{dest}", "--resolution", "8", "--part", "0/2"], 1, "--part is I/N with I from 1 to N"),
        (["{pictures}", "{dest}", "--resolution", "8", "--duplicates", "ask"], 2, "duplicates"),
    ],
)
def test_mistakes_end_in_a_line_or_two(pictures, tmp_path, capsys, args, status, message):
    dest = tmp_path / "data"
    code, out, err = call(capsys, *(arg.format(pictures=pictures, dest=dest) for arg in args))
    assert (code, out) == (status, "")
    assert 1 <= len(err) <= 2
    assert err[0].startswith("styleloom prepare: ")
    assert message in "".join(err)
    assert not dest.exists()


def test_tells_of_sizes_duplicates_and_what_looks_alike(pictures, tmp_path, capsys):
    source, dest = tmp_path / "source", tmp_path / "data"
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / name[-5:], source / name)
    Image.open(source / "a/1.png").save(source / "a/2.jpg", quality=95)
    sizes = ["--resolution", "32x16", "16x8"]
    status, out, _ = call(capsys, *sizes, source, dest, "--labels", "folders", "--workers", "1")
    assert status == 0
    assert out.splitlines()[:-2] == [
        f"{dest} is ready: 3 images of 32x16 in 1 shard, 0.0 MB, 2 classes.",
        f"The same in 16x8: {dest}/16x8",
        f"Of 4 pictures: 1 dropped as exact duplicates (1 of another class), 3 enlarged. See {dest}/report.json",
        f"1 pair of images look alike (all are kept). See {dest}/report.json",
    ]
    assert (read_manifest(dest / "16x8").width, read_manifest(dest / "16x8").count) == (16, 3)
    kept = tmp_path / "kept"
    status, out, _ = call(capsys, source, kept, "--resolution", "16x8,32x16", "--duplicates", "keep", "--workers", "1")
    assert status == 0
    assert f"{kept} is ready: 4 images of 32x16" in out


def test_a_part_says_what_is_missing(pictures, tmp_path, capsys):
    dest = tmp_path / "data"
    status, out, _ = call(capsys, *arguments(pictures, dest, 1, "--part", "2/3"))
    assert status == 0
    assert out.splitlines()[-2:] == [
        f"Part 2/3 of {dest} is made. Of 4 shards 3 are missing yet: those of 1/3, 3/3.",
        "The part that ends last completes the data set; running any part again does no harm.",
    ]
    call(capsys, *arguments(pictures, dest, 1, "--part", "1/3"))
    status, out, _ = call(capsys, *arguments(pictures, dest, 1, "--part", "3/3"))
    assert status == 0
    assert f"{dest} is ready: 6 images" in out


def test_resolutions():
    assert parse_resolutions("256") == [(256, 256)]
    assert parse_resolutions("256,1024,512") == [(1024, 1024), (512, 512), (256, 256)]
    assert parse_resolutions("6x4, 12X8,6x4") == [(12, 8), (6, 4)]
    with pytest.raises(ValueError, match="--resolution"):
        parse_resolutions("256,")


@pytest.mark.parametrize(
    ("args", "joined"),
    [
        ("--resolution 8 4 2 src dest", "--resolution 8,4,2 src dest"),
        ("src dest --resolution 8x4 4x2 --workers 2", "src dest --resolution 8x4,4x2 --workers 2"),
        ("--resolution 8,4 2", "--resolution 8,4,2"),
        ("8 4 --resolution large 4", "8 4 --resolution large 4"),
        ("--shard-images 8 4", "--shard-images 8 4"),
        ("--resolution", "--resolution"),
        ("", ""),
    ],
)
def test_sizes_after_resolution_belong_to_it(args, joined):
    assert joined_resolutions(args.split()) == joined.split()


def test_resolution():
    assert parse_resolution("256") == (256, 256)
    assert parse_resolution(" 768X512") == (768, 512)
    for text in ("", "x", "256x", "-8", "8.5", "1x2x3"):
        with pytest.raises(ValueError, match="--resolution"):
            parse_resolution(text)


def start(source, dest, workers: int = 2, *more: str) -> subprocess.Popen:
    command = [*COMMAND, *arguments(source, dest, workers, *more)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_until(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.01)
    return result


def records(dest) -> list:
    return list((dest / WORK).glob("[0-9]*.json"))


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that make shards: on Linux they are the fork server's children."""
    return [p for p in descendants(process) if sys.platform != "linux" or p.ppid() != process.pid]


def test_killed_at_any_moment_it_continues(slow, tmp_path, capsys):
    dest, whole = tmp_path / "data", tmp_path / "whole"
    process = start(slow, dest)
    wait_until(lambda: records(dest))
    family = descendants(process)
    assert len(family) >= 3
    process.kill()
    process.wait()
    assert psutil.wait_procs(family, timeout=5)[1] == []  # nobody writes on
    kept = {path.name: path.stat().st_mtime_ns for path in records(dest)}
    assert 0 < len(kept) < 12
    tars = {f"shard-{name.removesuffix('.json')}.tar" for name in kept}
    before = {path.name: path.stat().st_mtime_ns for path in dest.glob("*.tar") if path.name in tars}
    assert call(capsys, *arguments(slow, dest, 1))[0] == 0
    process.communicate(timeout=5)
    assert {name: (dest / name).stat().st_mtime_ns for name in before} == before  # kept, not made again
    assert call(capsys, *arguments(slow, whole, 2))[0] == 0
    assert digests(dest) == digests(whole)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGINT, 1)])
def test_stopped_it_says_that_it_continues(slow, tmp_path, number, workers):
    dest = tmp_path / "data"
    process = start(slow, dest, workers)
    wait_until(lambda: records(dest))
    os.killpg(process.pid, number)  # the whole group, as terminals and schedulers do
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("preparing: ")]
    assert lines == [f"styleloom prepare: stopped. The same command continues; {dest} keeps its finished shards."]
    assert not list(dest.rglob("*.tmp"))
    assert records(dest)


@pytest.mark.skipif(sys.platform != "linux", reason="has no fork server")
def test_stopped_while_the_workers_start_it_says_so_too(slow, tmp_path):
    process = start(slow, tmp_path / "data")
    wait_until(lambda: len(descendants(process)) == 2)  # the fork server and the resource tracker
    time.sleep(0.4)  # the server imports now
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("preparing: ")]
    assert len(lines) == 1


def test_stopping_does_not_wait_for_shards_to_be_done(slow, tmp_path):
    dest = tmp_path / "data"
    process = start(slow, dest, 2, "--shard-images", "12")
    wait_until(lambda: list(dest.glob("*.tar.*.tmp")))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert [path.name for path in dest.iterdir()] == [WORK]
    assert records(dest) == []


def test_a_killed_worker_is_told_and_does_not_hang(slow, tmp_path):
    dest = tmp_path / "data"
    process = start(slow, dest)
    wait_until(lambda: records(dest))
    family = workers_of(process)
    family[0].kill()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "styleloom prepare: a worker process was killed, perhaps for want of memory. Run the same command" in err
    assert "Traceback" not in err
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert records(dest)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_write_that_fails_in_a_worker_comes_through(pictures, tmp_path):
    """A limit on the size of files fails a worker's write as a full disk does, with EFBIG."""
    code = (
        "import resource, signal, sys; from styleloom.scripts import prepare, cli;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000));"
        "cli.run(prepare.main, 'prepare', sys.argv[1:])"
    )
    dest = tmp_path / "data"
    script = tmp_path / "limited.py"
    script.write_text(f"if __name__ == '__main__':\n    {code}\n")
    done = subprocess.run(
        [sys.executable, script, *arguments(pictures, dest, 2)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "styleloom prepare: File too large: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in dest.iterdir()] == [WORK]
