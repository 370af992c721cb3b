"""Training on shards that lie elsewhere, over servers that fail: the same weights, bit for bit, as from a folder."""

import contextlib
import multiprocessing
import shutil
import signal
import subprocess
import time

import fsspec
import psutil
import pytest
import torch

from styleloom.datasets import storage
from styleloom.datasets.manifest import index_bytes, read_manifest, write_manifest
from styleloom.datasets.order import Order
from styleloom.datasets.stream import batches
from styleloom.scripts.train import main
from styleloom.training.checkpoint import complete

LONG = ["--total-kimg=0.096", "--keep-checkpoints=9"]
FAULTS = ["503", "wrong", "short", "drop", "flip", "cut", "refuse", "no-range"]


def faults(path: str) -> list[str]:
    """Two for each file, another pair for each."""
    if path == "manifest.json":
        return ["503", "short"]
    number = sum(path.encode())
    return [FAULTS[number % 8], FAULTS[(number // 8 + 3) % 8]]


def files(folder) -> dict[str, bytes]:
    """The newest checkpoint's tensors."""
    newest = complete(folder / "checkpoints")[-1]
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def take(place, manifest, steps=6, **options):
    stream = batches(place, manifest, seed=5, start=0, batch=12, window=2, **options)
    out = [next(stream) for _ in range(steps)]
    stream.close()
    return torch.cat([images for images, _ in out])


@pytest.fixture
def _impatient(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(storage, "LONGEST_DELAY", 0.01)


def test_two_processes_over_a_faulty_server(two_ranks, unlabelled, serve, arguments, python, tmp_path):
    """`whole` is the same run from the folder."""
    with serve(unlabelled, faults) as server:
        command = arguments(server.url, tmp_path / "run", *LONG, "--data.workers=1", f"--data.cache={tmp_path}/cache")
        process: subprocess.Popen = python("-m", "styleloom.scripts.train", *command, ranks=2)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        names = {shard.name for shard in read_manifest(unlabelled).shards}
        assert {path for path, _, fault in server.requests if fault} >= names
        # Each file once well, or in two parts, for both processes together.
        assert max(server.count(name) for name in names) <= 3
    expected, found = files(two_ranks / "whole"), files(tmp_path / "run")
    assert expected
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_pixels_are_those_of_the_folder(unlabelled, serve, tmp_path, workers):
    expected = take(unlabelled, read_manifest(unlabelled))
    with serve(unlabelled, faults) as server:
        manifest = read_manifest(server.url)
        assert manifest == read_manifest(unlabelled)
        cache = (str(tmp_path / "cache"), 10**8)
        assert torch.equal(take(server.url, manifest, workers=workers, cache=cache), expected)
        assert len([path for path, _, _ in server.requests if path.endswith(".tar")]) >= 5
        # With a cache that just holds two windows, shards come and go.
        small = (str(tmp_path / "small"), 4 * max(shard.bytes + index_bytes(shard) for shard in manifest.shards))
        assert torch.equal(take(server.url, manifest, workers=workers, cache=small, steps=20)[:72], expected)


@pytest.mark.usefixtures("_impatient")
def test_s3_with_worker_processes(unlabelled, s3, tmp_path):
    for path in unlabelled.iterdir():
        s3.upload_file(str(path), "bucket", f"train/{path.name}")
    manifest = read_manifest("s3://bucket/train")
    expected = take(unlabelled, manifest)
    for workers in (0, 2):
        cache = (str(tmp_path / f"cache-{workers}"), 10**8)
        assert torch.equal(take("s3://bucket/train", manifest, workers=workers, cache=cache), expected)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_faulty_s3(unlabelled, s3, s3_server, serve, tmp_path, monkeypatch, workers):
    """The faults come between a real server of S3's protocol and s3fs."""
    for path in unlabelled.iterdir():
        s3.upload_file(str(path), "bucket", f"faulty-{workers}/{path.name}")
    expected = take(unlabelled, read_manifest(unlabelled))
    kinds = [fault for fault in FAULTS if fault != "no-range"]

    def plan(path: str) -> list[str]:
        number = sum(path.encode())
        return [kinds[number % 7], kinds[(number // 7 + 3) % 7]] if path.endswith((".tar", ".npy")) else ["503"]

    with serve(s3_server, plan) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # it would remember the other endpoint
        place = f"s3://bucket/faulty-{workers}"
        cache = (str(tmp_path / "cache"), 10**8)
        assert torch.equal(take(place, read_manifest(place), workers=workers, cache=cache), expected)
        assert {fault for _, _, fault in server.requests} >= {"wrong", "short", "503"}
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.usefixtures("_impatient")
def test_tars_elsewhere_than_their_manifest(unlabelled, serve, tmp_path):
    expected = take(unlabelled, read_manifest(unlabelled))
    with serve(unlabelled) as server:
        manifest = read_manifest(unlabelled).model_copy(update={"root": server.url})
        (tmp_path / "set").mkdir()
        write_manifest(manifest, tmp_path / "set")
        for path in unlabelled.glob("*.npy"):
            shutil.copy(path, tmp_path / "set")
        cache = (str(tmp_path / "cache"), 10**8)
        assert torch.equal(take(tmp_path / "set", read_manifest(tmp_path / "set"), cache=cache), expected)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_stays_away_ends_the_run_and_replaces_nothing(unlabelled, serve, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(storage, "TRIES", 3)
    manifest, told = read_manifest(unlabelled), []
    with serve(unlabelled, lambda path: ["503"] * 999 if path.endswith("3.tar") else []) as server:
        cache = (str(tmp_path / "cache"), 10**8)
        with pytest.raises(OSError, match=r"cannot read http://127.0.0.1:\d+/shard-000003.tar \(3 tries\): HTTP 503"):
            take(server.url, manifest, cache=cache, workers=workers, max_bad=1.0, report_bad=told.append)
    assert not told


@pytest.mark.usefixtures("_impatient")
def test_a_copy_that_rots_in_the_cache_is_fetched_again(unlabelled, serve, tmp_path):
    manifest = read_manifest(unlabelled)
    expected, cache = take(unlabelled, manifest), (str(tmp_path / "cache"), 10**8)
    with serve(unlabelled) as server:
        take(server.url, manifest, cache=cache)
        for sha256 in (name for shard in manifest.shards for name in (shard.sha256, shard.index_sha256)):
            path = tmp_path / "cache" / sha256
            path.write_bytes(bytes(path.stat().st_size))
        before = len(server.requests)
        assert torch.equal(take(server.url, manifest, cache=cache), expected)
        assert len(server.requests) == before + 2 * len(manifest.shards)


def test_pipe(unlabelled, tmp_path):
    manifest = read_manifest(f"pipe:cat {unlabelled}/{{}}")
    cache = (str(tmp_path / "cache"), 10**8)
    expected = take(unlabelled, manifest)
    for workers in (0, 1):
        assert torch.equal(take(f"pipe:cat {unlabelled}/{{}}", manifest, cache=cache, workers=workers), expected)


def test_workers_forked_while_a_shard_is_fetched(unlabelled, tmp_path):
    """They inherit the open lock file of the fetch: closing it here does not free the lock."""
    manifest, cache = read_manifest(unlabelled), (str(tmp_path / "cache"), 10**8)
    place = f"pipe:sleep 0.5; cat {unlabelled}/{{}}"
    first = batches(place, manifest, seed=5, start=0, batch=1, window=2, cache=cache)
    next(first)  # its prefetcher goes on in this process
    assert torch.equal(take(place, manifest, cache=cache, workers=2), take(unlabelled, manifest))
    first.close()


def kill_sleepers() -> None:
    """The commands that shards were to come from: they outlive the processes that were killed."""
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if each.name() == "sleep" and each.cmdline()[-1:] == ["600"]:
                each.kill()


def test_the_end_does_not_wait_for_a_fetch(unlabelled, tmp_path):
    """Here one that never ends."""
    manifest, cache = read_manifest(unlabelled), (str(tmp_path / "cache"), 10**8)
    first = manifest.shards[Order([shard.count for shard in manifest.shards], seed=5, window=1)(0)[0]].name
    place = f"pipe:case {{}} in {first}) ;; *.tar) exec sleep 600 2>/dev/null;; esac; cat {unlabelled}/{{}}"
    stream = batches(place, manifest, seed=5, start=0, batch=2, window=1, cache=cache, workers=2)
    before = set(multiprocessing.active_children())
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    time.sleep(1)
    began = time.monotonic()
    stream.close()
    assert not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - began < 60  # torch waits 5 s for each
    kill_sleepers()


def test_a_signal_ends_the_wait_for_a_shard(unlabelled, arguments, python, tmp_path):
    """SIGTERM, while nothing comes: what was trained is saved."""
    place = (
        f"pipe:case {{}} in *.tar) test -e {tmp_path}/dry && exec sleep 600 2>/dev/null;; esac; cat {unlabelled}/{{}}"
    )
    more = ["--total-kimg=99", "--data.workers=0", "--data.window=1", f"--data.cache={tmp_path}/cache"]
    bytes_ = 2 * max(shard.bytes + index_bytes(shard) for shard in read_manifest(unlabelled).shards)
    more.append(f"--data.cache-gb={(bytes_ + 1) * 1e-9:.12f}")
    process = python("-m", "styleloom.scripts.train", *arguments(place, tmp_path / "run", *more))
    give_up = time.monotonic() + 120
    while not complete(tmp_path / "run" / "checkpoints") and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.02)
    (tmp_path / "dry").touch()
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "and saved" in out
    kill_sleepers()


def test_what_a_user_can_get_wrong(unlabelled, serve, arguments, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "TRIES", 1)
    with serve(unlabelled, lambda path: ["403"] if path == "x/manifest.json" else []) as server:
        nowhere = arguments(f"{server.url}/nowhere", tmp_path / "run")
        assert f"there is no data set at {server.url}/nowhere" in refused(main, *nowhere)
        assert "HTTP 403" in refused(main, *arguments(f"{server.url}/x", tmp_path / "run"))
        small = arguments(server.url, tmp_path / "run", "--data.cache-gb=1e-5", f"--data.cache={tmp_path}/cache")
        assert "raise --data.cache-gb, or lower --data.window" in refused(main, *small)
    assert "(1 tries)" in refused(main, *arguments(server.url, tmp_path / "run"))
    assert "has no {}, where the name" in refused(main, *arguments("pipe:cat x", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
