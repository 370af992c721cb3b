"""What the tests share: tiny shard sets, a tiny run, commands called in this process, launches of several processes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.ops import build as ops_build
from styleloom.scripts.cli import run
from styleloom.scripts.train import read_settings
from styleloom.training import report
from styleloom.training.checkpoint import complete
from styleloom.training.config import write_run

SIDE, COUNT = 16, 42
PRESET = "stylegan2-cpu"
# Few channels, all four phases, and cadences that do not coincide: ticks every 3 steps, checkpoints every 5, snapshots
# every 7.
TINY = [
    "--network.z-dim=8", "--network.w-dim=8", "--network.mapping-layers=2", "--network.channel-base=64",
    "--network.mbstd-group=2", "--recipe.pl-weight=2", "--recipe.pl-interval=2", "--recipe.r1-interval=3",
    "--recipe.r1-gamma=10", "--recipe.lr=0.0025", "--recipe.style-mixing=0.9", "--network.noise",
    "--data.mirror", "--data.workers=0", "--data.window=2",
    "--batch=4", "--total-kimg=0.048", "--tick-kimg=0.012", "--checkpoint-kimg=0.02", "--snapshot-kimg=0.028",
    "--score-images=24",
]  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """As in the processes that tests start: with another number of threads, sums differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


AUGMENTS = ["blit", "geom", "color", "filter", "noise", "cutout"]


@pytest.fixture(autouse=True)
def _no_reports():
    """What a test reported and nobody collected is not in the statistics of another's run."""
    yield
    report.Report.load_state_dict({})


# How far a result may be from that of the same inputs in float64, relative to what was added up to make it: of our
# kernels, which calculate in fp32 and round once, and of torch's ops, which round at every step.
TOLERANCE = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (2**-8, 2**-5),
    torch.float16: (2**-10, 2**-8),
}


PATHS = {"cpu": "cpu", "torch": "cuda", "reference": "reference"}  # and the STYLELOOM_OPS that leads to them on a CPU


@pytest.fixture(params=PATHS)
def ops_path(request, monkeypatch):
    """What runs the ops on a CPU: our kernels, torch's ops in the fastest order, or the plain definitions."""
    if request.param == "cpu":
        request.getfixturevalue("cpu_library")
    monkeypatch.setenv("STYLELOOM_OPS", PATHS[request.param])
    assert ops_build.path("cpu") == request.param
    return request.param


@pytest.fixture(scope="session")
def cpu_library():
    """The library of our kernels, without which there is nothing to test where there is no compiler."""
    if not any(map(shutil.which, [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"])):
        pytest.skip("no C++ compiler found")
    assert ops_build.status("cpu").ok, ops_build.status("cpu").why
    return ops_build.library("cpu")


@pytest.fixture
def agree(ops_path):
    """(value, expected, dtype=, size=, torchs=) checks a result of an op against that in float64.

    `dtype` is that of the op's images, if it is not the value's; `size` is the sum of the terms' magnitudes, by default
    that of the largest value expected; `torchs` says that torch's ops made it on every path.
    """

    def agree(value, expected, dtype=None, size=None, torchs=False) -> None:
        assert expected.dtype == torch.float64
        assert value.shape == expected.shape
        dtype = dtype or value.dtype
        tolerance, its = TOLERANCE[dtype][0 if ops_path == "cpu" and not torchs else 1], torch.finfo(dtype)
        if expected.numel() == 0:
            return
        size = expected.abs().amax() if size is None else size
        error = (value.double() - expected).abs()
        assert (error <= tolerance * size + 16 * its.smallest_normal * its.eps).all(), f"{(error / size).max():.2e}"

    return agree


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """42 pictures of 16x16 in the folders cat, cow and dog (14 each): a coloured rectangle on noise."""
    root = tmp_path_factory.mktemp("tiny") / "pictures"
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = root / ("cat", "cow", "dog")[i // 14] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (SIDE, SIDE, 3), np.uint8)
        pixels[2 + i % 5 : 12, 1 : 6 + i % 7] = rng.integers(100, 256, 3)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="session")
def unlabelled(pictures):
    """A data set of 42 images without labels in 5 shards: 9, 9, 9, 9 and 6."""
    return _shards(pictures, "unlabelled", "none", 9)


@pytest.fixture(scope="session")
def labelled(pictures):
    """The same images in 3 classes, in one shard."""
    return _shards(pictures, "labelled", "folders", 1000)


def _shards(pictures: Path, name: str, labels: str, shard_images: int) -> Path:
    folder = pictures.with_name(name)
    prepare(
        open_source(pictures, labels), folder, width=SIDE, height=SIDE, shard_images=shard_images, progress=False
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def serve():
    """faulty.py's `serve(folder, faults)`: an HTTP server that misbehaves."""
    spec = importlib.util.spec_from_file_location("faulty", Path(__file__).with_name("faulty.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.serve


@pytest.fixture(scope="session")
def s3_server():
    """The URL of a server of S3's protocol on loopback."""
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A client of that server, which has one bucket, "bucket"; s3:// leads there."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    return client


@pytest.fixture(scope="session")
def arguments():
    """(data, out, *more) -> the arguments of `styleloom train` for a tiny run of 12 steps."""

    def make(data, out, *more) -> list[str]:
        return [PRESET, *TINY, "--data.path", str(data), "--out", str(out), *map(str, more)]

    return make


@pytest.fixture(scope="session")
def settings(arguments):
    """(data, out, *more) -> the same as a Run."""

    def make(data, out, *more):
        preset, *fields = arguments(data, out, *more)
        return read_settings(preset, fields)

    return make


@pytest.fixture
def call(capsys):
    """(main, *args) -> (exit status, stdout, stderr) of a command called in this process."""

    def call(main, *args) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(main, main.__module__.rpartition(".")[2], [str(a) for a in args])
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    return call


@pytest.fixture
def refused(call):
    """(main, *args) -> the complaint of a command that has to end in one or two lines on stderr and a status not 0."""

    def refused(main, *args) -> str:
        status, _, err = call(main, *args)
        assert status != 0
        assert 1 <= len(err.splitlines()) <= 2, err
        assert "Traceback" not in err
        assert err.startswith("styleloom ")
        return err

    return refused


@pytest.fixture(scope="session")
def python():
    """(*args, ranks=0) -> a running `python ARGS`, or as many ranks of it, each on one thread of the CPU."""

    def start(*args, ranks: int = 0) -> subprocess.Popen[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
        environment = {key: value for key, value in os.environ.items() if key != "STYLELOOM_TRACEBACK"}
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *launcher, *map(str, args)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def kill():
    """(process, run's folder) -> kills a launched training, with all its processes, after its first checkpoint."""

    def kill(process: subprocess.Popen[str], out: Path) -> None:
        give_up = time.monotonic() + 120
        while not complete(out / "checkpoints") and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.002)
        family = psutil.Process(process.pid)
        for each in [family, *family.children(recursive=True)]:
            each.kill()
        said = process.communicate(timeout=60)
        assert complete(out / "checkpoints"), said
        assert "Done" not in said[0], "it ended before it could be killed"

    return kill


CLOCK = {"sec_per_kimg", "images_per_s", "data_wait", "peak_memory_gb", "seconds"}


@pytest.fixture(scope="session")
def stats():
    """(run's folder) -> the lines of stats.jsonl, without what the clock says."""

    def stats(out: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]

    return stats


@pytest.fixture(scope="session")
def tensors():
    """(folder) -> all tensors of a checkpoint or snapshot, as FILE/NAME."""

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        files = sorted(folder.glob("*.safetensors"))
        return {f"{file.stem}/{name}": x for file in files for name, x in load_file(file).items()}

    return tensors


@pytest.fixture(scope="session")
def assert_same_tensors(tensors):
    """(folder, folder): of a checkpoint or snapshot, bit for bit."""

    def assert_same_tensors(a: Path, b: Path) -> None:
        x, y = tensors(a), tensors(b)
        assert x.keys() == y.keys()
        assert len(x) > 0
        different = [name for name in x if x[name].numpy().tobytes() != y[name].numpy().tobytes()]
        assert different == []

    return assert_same_tensors


@pytest.fixture(scope="session")
def assert_same_run(stats, assert_same_tensors):
    """(run's folder, run's folder, checkpoints=, snapshots=): bit for bit all checkpoints and all snapshots (and as
    many as that), the statistics, the pictures."""

    def assert_same_run(a: Path, b: Path, checkpoints: int = 5, snapshots: int = 4) -> None:
        for kind, count in (("checkpoints", checkpoints), ("snapshots", snapshots)):
            folders = complete(a / kind)
            assert len(folders) == count
            assert [x.name for x in folders] == [x.name for x in complete(b / kind)]
            for x, y in zip(folders, complete(b / kind), strict=True):
                assert_same_tensors(x, y)
        assert stats(a) == stats(b)
        pictures = sorted(path.name for path in (a / "samples").iterdir())
        assert pictures == sorted(path.name for path in (b / "samples").iterdir())
        for name in pictures:
            assert (a / "samples" / name).read_bytes() == (b / "samples" / name).read_bytes()

    return assert_same_run


@pytest.fixture(scope="session")
def feature_network(tmp_path_factory) -> Path:
    """The file of a small network in the place of Inception."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 6))
    path = tmp_path_factory.mktemp("networks") / "small.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but the published networks come as it
        torch.jit.save(torch.jit.trace(network.eval(), torch.zeros(1, 3, 299, 299)), str(path))
    return path


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, unlabelled, labelled, arguments, settings, python, kill):
    """The folder with what two_ranks.py did on two ranks; its run `killed` had been killed and was taken up again."""
    root = tmp_path_factory.mktemp("two_ranks")
    (root / "runs").mkdir()
    long = ["--total-kimg=0.096", "--keep-checkpoints=9"]
    zero = ["--parallel.strategy=deepspeed"]
    runs = {
        "gradients": settings(unlabelled, ""),
        "labelled": settings(labelled, "", "--data.labels"),
        "few": settings(unlabelled, "", "--recipe.pl-batch-shrink=4"),
        "ada": settings(unlabelled, "", "--augment.kind=ada", "--augment.p=0.7", "--augment.pipe", *AUGMENTS),
        "buckets": settings(unlabelled, "", "--parallel.overlap=on", "--parallel.bucket-mb=0.002"),
        **{f"zero{stage}": settings(unlabelled, "", *zero, f"--parallel.zero-stage={stage}") for stage in range(3)},
        "zero1-passes": settings(unlabelled, "", *zero, "--batch=8", "--passes=2"),
        "zero2-few": settings(unlabelled, "", *zero, "--parallel.zero-stage=2", "--recipe.pl-batch-shrink=4"),
        "zero1-bf16": settings(unlabelled, "", *zero, "--precision=bf16"),
        "whole": settings(unlabelled, root / "whole", *long),
        "killed": settings(unlabelled, root / "killed", *long),
        "stopped": settings(unlabelled, root / "stopped", "--total-kimg=9"),
    }
    for name, its in runs.items():
        write_run(its, root / "runs" / f"{name}.json")
    command = arguments(unlabelled, root / "killed", *long)
    kill(python("-m", "styleloom.scripts.train", *command, ranks=2), root / "killed")
    process = python(Path(__file__).with_name("two_ranks.py"), root, root / "runs", ranks=2)
    try:
        out, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        out, err = process.communicate()
    assert process.returncode == 0, (sorted(root.glob("*-failed-*")), err)
    (root / "stdout.txt").write_text(out)
    return root
