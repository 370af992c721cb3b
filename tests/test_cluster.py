"""datasets/cluster.py: the same bytes from a Dask cluster, and what happens when that is not there or is stopped."""

import hashlib
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from styleloom.datasets import cluster
from styleloom.datasets.cluster import dask_engine, remote
from styleloom.datasets.manifest import WORK
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.workers import Stopped, interrupts_blocked

needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="needs the extra dask: pip install 'styleloom[dask]'"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), np.uint8)).save(root / f"{i:02d}.png")
    (root / "07.png").write_bytes(b"broken")
    (root / "08.png").write_bytes((root / "01.png").read_bytes())
    return root


def command(source, dest, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "styleloom.scripts.prepare", str(source), str(dest), "--resolution", "16", "8",
        "--shard-images", "2", "--workers", "2", *more,
    ]  # fmt: skip


def tree(folder) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@needs_dask
def test_a_cluster_of_two_processes_makes_the_same(pictures, tmp_path):
    dest, alone = tmp_path / "data", tmp_path / "alone"
    done = subprocess.run(command(pictures, dest, "--dask", "local"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if not re.match(r"\s*$|preparing: |comparing", line)]
    assert lines == []  # Dask says nothing
    assert f"{dest} is ready: 10 images" in done.stdout
    prepare(
        open_source(pictures), alone, width=16, height=16, reduced=[(8, 8)], shard_images=2, progress=False
    )  # fmt: skip
    assert tree(dest) == tree(alone)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Pictures of which each takes about a tenth of a second. They differ in what follows the image only."""
    root = tmp_path_factory.mktemp("slow")
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), np.uint8)
    Image.fromarray(noise).save(root / "00.jpg", quality=95)
    data = (root / "00.jpg").read_bytes()
    for i in range(40):
        (root / f"{i:02d}.jpg").write_bytes(data + b"%02d" % i)
    return root


@needs_dask
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_keeps_the_finished_shards(slow, tmp_path, number):
    dest = tmp_path / "data"
    process = subprocess.Popen(
        command(slow, dest, "--dask", "local"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 60
    while not list((dest / WORK).glob("[0-9]*.json")):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)
    os.killpg(process.pid, number)  # the whole group, as terminals and schedulers do
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    lines = [line for line in re.split(r"[\r\n]+", err) if not re.match(r"\s*$|preparing: |comparing", line)]
    assert lines == [f"styleloom prepare: stopped. The same command continues; {dest} keeps its finished shards."]
    assert 0 < len(list((dest / WORK).glob("[0-9]*.json"))) < 20
    assert not list(dest.rglob("*.tmp"))


def square(task: int, tick) -> int:
    """A task; of a negative number a wrong one."""
    for _ in range(abs(task)):
        tick()
    if task < 0:
        raise ValueError(f"{task} is negative")
    return task**2


@pytest.fixture(scope="module")
def scheduler():
    """The address of a Dask cluster of two processes, somewhere."""
    distributed = pytest.importorskip("distributed")
    with (
        interrupts_blocked(),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0, silence_logs=50
        ) as running,
    ):
        yield running.scheduler_address


def test_tasks_run_elsewhere_and_results_and_errors_come_back(scheduler, tmp_path):
    results = []
    with dask_engine(scheduler, 1, tmp_path) as engine, tqdm(file=io.StringIO()) as bar:
        engine(square, [3, 1, 4], bar, results.append)
        assert sorted(results) == [1, 9, 16]
        assert bar.n == 8
        with pytest.raises(ValueError, match="-2 is negative"):
            engine(square, [1, -2, 3], bar)
        engine(square, [], bar)
        results.clear()
        engine(square, list(range(200)), bar, results.append)  # more than are under way at a time
        assert sorted(results) == [n**2 for n in range(200)]
    assert list(tmp_path.iterdir()) == []


@needs_dask
def test_nobody_at_the_address(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT", 0.5)
    with (
        pytest.raises(ValueError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9: "),
        dask_engine("tcp://127.0.0.1:9", 1, tmp_path),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"no Dask scheduler answers at nonsense"),
        dask_engine("nonsense", 1, tmp_path),
    ):
        pass


def test_without_dask_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(ValueError, match=r"--dask needs Dask: pip install 'styleloom\[dask\]', here and on the workers"),
        dask_engine("local", 1, tmp_path),
    ):
        pass


def test_dask_is_imported_only_when_it_is_asked_for():
    code = "import sys, styleloom.scripts.prepare; assert not {'dask', 'distributed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_task_ends_soon_after_it_was_called_off(tmp_path, monkeypatch):
    sign = tmp_path / "sign"
    sign.touch()
    ticked = []

    def work(task, tick):
        for i in range(task):
            if i == 3:
                sign.unlink()
            tick()
            ticked.append(i)
        return "done"

    assert remote(work, 2, sign) == (2, "done")
    monkeypatch.setattr(cluster, "_LOOK", 0.0)
    ticked.clear()
    with pytest.raises(Stopped):
        remote(work, 9, sign)
    assert ticked == [0, 1, 2]
