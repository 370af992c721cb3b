"""scripts/bench_data.py and what it consists of: what is measured, counted and shown. Never how long anything takes."""

import importlib
import io
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from styleloom.datasets import decode
from styleloom.scripts import bench, bench_data, bench_peers, bench_pictures, bench_scale

pytestmark = [  # plain webdataset leaves the tars open that it reads
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"),
]
TINY = ["--resolutions", "32", "--images", "8", "--rounds", "1"]
STREAMS = {
    "resolution", "codec", "stage", "library", "decoder", "images", "bytes_per_image", "seconds", "cpu_seconds",
    "img_per_s", "img_per_cpu_s", "of_decoder",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> Iterator[None]:
    """Few samples, and this process's allocator as it is."""
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(bench_data, "_PASS", 30_000)
    monkeypatch.setattr(bench_data, "default_workers", lambda: 1)
    monkeypatch.setattr(bench_data, "SAMPLES", (640, 1280))
    monkeypatch.setattr(bench_scale, "SHARD", 20)
    monkeypatch.setattr(bench_scale, "SHARDS", 30)
    monkeypatch.setattr(bench_scale, "MANY_SHARDS", 50)
    monkeypatch.setattr(bench_scale, "DIFFERENT", 5)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def sound(value) -> bool:
    return math.isfinite(value) and value > 0


def importable(name: str) -> bool:
    try:
        importlib.import_module(bench_peers.MODULES[name])
    except ImportError:
        return False
    return True


# Streams.


@pytest.fixture
def images(tmp_path):
    """Of 32 px as JPEG, 8 of them in batches of 4."""
    made = bench_data.make_images(bench_data.Data(images=8), 32, "jpeg", tmp_path)
    return bench_peers.Images(made.folder, made.manifest, 4, 2, tmp_path)


@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_rows_of_a_resolution_and_codec(call, codec):
    status, out, _ = call(bench.main, "data", *TINY, "--codecs", codec, "--parts", "streams", "--json", "-",
                          "--peers", "webdataset", "zip")  # fmt: skip
    assert status == 0
    found = json.loads(out)
    rows = found["rows"]
    fast = decode.decoders()[codec]
    for library, decoders in {"styleloom": [fast], "webdataset": ["Pillow", f"{fast}, stacked"]}.items():
        assert [row["decoder"] for row in rows if (row["stage"], row["library"]) == ("full", library)] == decoders
    assert {(row["stage"], row["library"]) for row in rows} == {
        ("decode", ""), *((stage, "styleloom") for stage in bench_data.STAGES),
        *((stage, library) for stage in ("raw", "full") for library in ("webdataset", "zip")),
    }  # fmt: skip
    for row in rows:
        assert set(row) == STREAMS
        assert (row["resolution"], row["codec"]) == (32, codec)
        assert all(sound(row[key]) for key in STREAMS if key.startswith(("img", "bytes", "seconds", "cpu", "images")))
        assert row["img_per_s"] == pytest.approx(row["images"] / row["seconds"])
        assert row["img_per_cpu_s"] == pytest.approx(row["images"] / row["cpu_seconds"])
    assert found["machine"]["libraries"]["webdataset"]
    assert found["missing"] == []


def test_ratios_follow_from_the_rows(call):
    status, out, _ = call(bench.main, "data", *TINY, "--codecs", "jpeg", "--parts", "streams", "--json", "-")
    assert status == 0
    found = json.loads(out)
    (ratios,) = found["ratios"]
    rows = found["rows"]
    rate = {(row["stage"], row["library"], row["decoder"]): row["img_per_cpu_s"] for row in rows}
    for row in rows:
        expected = None if row["stage"] == "raw" else row["img_per_cpu_s"] / rate["decode", "styleloom", "simplejpeg"]
        assert row["of_decoder"] == (expected and pytest.approx(expected))
    for stage, decoder in (("full", "simplejpeg"), ("raw", "")):
        best = max(value for (its, library, _), value in rate.items() if its == stage and library != "styleloom")
        assert ratios[f"{stage}_of_best_peer"] == pytest.approx(rate[stage, "styleloom", decoder] / best)
        library, _, way = ratios[f"{stage}_best_peer"].partition(" ")
        assert rate[stage, library, way] == best
    raw = {library: value for (stage, library, _), value in rate.items() if stage == "raw"}
    assert ratios["raw_of_webdataset"] == pytest.approx(raw["styleloom"] / raw["webdataset"])
    assert ratios["full_of_decoder"] == pytest.approx(
        rate["full", "styleloom", "simplejpeg"] / rate["decode", "styleloom", "simplejpeg"]
    )
    there = {"styleloom", ""} | {name for name in bench_peers.PEERS if importable(name)}
    assert {row["library"] for row in rows} == there
    assert {each["library"] for each in found["missing"]} == set(bench_peers.PEERS) - there
    assert all("pip install" in each["reason"] for each in found["missing"])


@pytest.mark.parametrize("library", ["styleloom", *bench_peers.PEERS])
def test_all_deliver_the_same_images(images, library):
    if library in bench_peers.PEERS and (reason := bench_peers.missing(library)):
        pytest.skip(reason)
    peers = [library] if library in bench_peers.PEERS else []
    contenders = [c for c in bench_peers.streaming(images, peers) if c.library == library]
    assert len(contenders) == (3 if peers else 2)
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in images.data]
    for contender in contenders:
        seen = set()
        stream = contender.start(40)  # from a shuffled buffer, not each has come after one round
        for batch, labels in islice(stream, 40):
            assert labels.shape == (4,)
            if contender.stage == "raw":
                found = [images.data.index(data) for data in batch]
            else:
                assert (batch.dtype, batch.shape) == (torch.uint8, (4, 3, 32, 32))
                found = [_which(image.permute(1, 2, 0).numpy(), pixels) for image in batch]
            assert [images.labels[i] for i in found] == labels.tolist()
            seen |= set(found)
        assert seen == set(range(8))


def _which(image: np.ndarray, pixels: list[np.ndarray]) -> int:
    """The picture that an image shows: decoders differ in rounding."""
    distances = [np.abs(image.astype(int) - each).max() for each in pixels]
    assert min(distances) <= 3
    return int(np.argmin(distances))


def test_all_decoders_decode_the_same(images):
    first, *others = (np.asarray(decode_(images.data[0])) for decode_ in bench_peers.others("jpeg").values())
    for other in others:
        other = other if other.shape == first.shape else other.transpose(1, 2, 0)
        assert np.abs(other.astype(int) - first).max() <= 3


def test_own_pictures_need_no_labels(call, tmp_path):
    for i in range(3):
        Image.fromarray(bench_pictures.draw(i, 20)).save(tmp_path / f"{i}.png")
    status, out, _ = call(bench.main, "data", *TINY, "--codecs", "webp", "--parts", "streams", "--json", "-",
                          "--pictures", tmp_path, "--peers", "webdataset", "zip", "--workers", 1)  # fmt: skip
    assert status == 0
    rows = json.loads(out)["rows"]
    assert {row["images"] for row in rows if row["stage"] == "full" and row["cpu_seconds"]} == {3}
    (many,) = [row for row in rows if row["decoder"] == "1 workers"]
    assert (many["cpu_seconds"], many["img_per_cpu_s"]) == (None, None)
    assert many["img_per_s"] == pytest.approx(many["images"] / many["seconds"])


@pytest.mark.parametrize(
    ("error", "what"),
    [(ModuleNotFoundError("x", name="litdata"), "not installed: pip install litdata"),
     (ModuleNotFoundError("x", name="boto3"), "it lacks boto3"), (AttributeError("odd"), "cannot be imported: odd")],
)  # fmt: skip
def test_a_library_that_is_missing_is_named(monkeypatch, error, what):
    def broken(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    assert what in (bench_peers.missing("litdata") or "")


# Pictures.


def test_pictures_have_the_size_of_photographs():
    file = io.BytesIO()
    pixels = bench_pictures.draw(0, 256)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (256, 256, 3))
    assert not np.array_equal(pixels, bench_pictures.draw(1, 256))
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling="4:4:4")
    assert 20_000 < file.tell() < 60_000


# What is about size, and all together.


def test_parts_in_processes_of_their_own(call, tmp_path, monkeypatch):
    commands = []
    measure = bench_data.bench_model.in_children

    def children(some, repeats, what):
        commands.append((some, repeats, what))
        for key, (arguments, _) in some.items():
            if key == ("prepare",):
                yield from measure({key: some[key]}, 1, what)  # one of them for real
            else:
                options = bench.parse(bench.Commands, ["data", *arguments], "bench")
                yield key, {"machine": None} | bench_data.measure(options)

    monkeypatch.setattr(bench_data.bench_model, "in_children", children)
    file = tmp_path / "data.json"
    status, out, _ = call(
        bench.main, "data", "--resolutions", 32, 16, "--images", 6, "--rounds", 1, "--codecs", "png", "--json", file,
        "--peers", "zip", "--parts", "prepare", "resume", "streams", "memory",
    )  # fmt: skip
    assert status == 0
    ((some, repeats, what),) = commands
    assert (repeats, what) == (1, "data")
    assert list(some) == [("prepare",), ("resume",), ("streams", 32, "png"), ("streams", 16, "png"), ("memory",)]
    assert not any(Path(environment["TMPDIR"]).exists() for _, environment in some.values())
    found = json.loads(file.read_text())
    assert {row["resolution"] for row in found["rows"]} == {16, 32}
    assert len(found["ratios"]) == 2
    assert [(row["position"], row["samples"], row["shards"]) for row in found["resume"]] == [
        (10**9, 600, 30),
        (0, 600, 30),
    ]
    assert [row["of"] for row in found["memory"]] == ["raw stream", "manifest", "order"]
    assert found["memory"][0]["samples"] == 640
    assert [row["samples"] for row in found["memory"][1:]] == [50_000, 50_000]
    assert [(row["from"], row["to"], row["images"]) for row in found["prepare"]] == [
        ("jpeg 32 px", "jpeg 8 px", 24), ("png 16 px", "png 16 px", 24),
    ]  # fmt: skip
    for row in found["prepare"]:
        assert row["alone_share"] == pytest.approx(row["alone_cpu_seconds"] / row["cpu_seconds"])
    lines = out.splitlines()
    assert "one of" in lines[0]
    assert sum(line.startswith(("  32  png", "  16  png")) for line in lines) == len(found["rows"])
    for words in ("32 px png: full stream", "times the best peer (zip", "at position 1,000,000,000",
                  "prepare, one worker", "Memory of the manifest, 50 shards"):  # fmt: skip
        assert words in out


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--peers", "tfrecord"], "there are webdataset, zip, mosaicml-streaming, litdata"),
        (["--pictures", "EMPTY"], "no pictures in"),
        (["--pictures", "no/such/folder"], "there is no"),
        (["--codecs", "gif"], "gif"),
        (["--parts", "all"], "all"),
        (["--resolutions", "0"], "--resolutions 0"),
        (["--resolutions"], "--resolutions: at least one"),
        (["--rounds", "0"], "--rounds"),
        (["--images", "-1"], "--images"),
        (["--workers", "-1"], "--workers"),
    ],
)
def test_mistakes(refused, tmp_path, arguments, what):
    arguments = [str(tmp_path) if word == "EMPTY" else word for word in arguments]
    assert what in refused(bench.main, "data", *arguments)


def test_a_peer_that_is_asked_for_has_to_be_there(refused, monkeypatch):
    monkeypatch.setitem(bench_peers.MODULES, "litdata", "no_such_module")
    assert "--peers litdata: not installed" in refused(bench.main, "data", "--peers", "litdata")
