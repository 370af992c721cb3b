"""scripts/evaluate.py: snapshots, data sets and folders of pictures; what is printed, and what is kept and used."""

import inspect
import json
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from styleloom.scripts import evaluate
from styleloom.scripts.evaluate import open_images
from styleloom.training.checkpoint import load_generator, save_snapshot
from styleloom.training.distributed import Team
from styleloom.training.draws import Draws
from styleloom.training.metrics import evaluation as metrics
from styleloom.training.metrics.distances import frechet, moments
from styleloom.training.metrics.features import Inception, load_inception, resize
from styleloom.training.networks import build
from styleloom.training.report import to_uint8


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(48, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)).relu()


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()
        self.output = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(x))


class Pixels(nn.Module):
    def forward(self, x: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        assert return_lpips
        assert not resize_images
        return x.flatten(1) / 100


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """A folder with headed.pt, bare.pt and pixels.pt."""
    folder = tmp_path_factory.mktemp("networks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, network in (("headed", Headed()), ("bare", Layers()), ("pixels", Pixels())):
            torch.jit.save(torch.jit.script(network), str(folder / f"{name}.pt"))
    return folder


def snapshot(folder: Path, run: Any, classes: list[str], nimg: int = 7000, seed: int = 3) -> Path:
    pair = build(run, 16, 16, 3, len(classes))
    generator = torch.Generator().manual_seed(seed)
    for network in pair:
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return save_snapshot(folder / "snapshots", *pair, run, nimg, 16, 16, 3, classes)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    snapshot(folder, settings("", ""), [])
    return folder


@pytest.fixture(scope="module")
def conditional(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("evaluate") / "conditional"
    snapshot(folder, settings("", "", "--data.labels"), ["cat", "cow", "dog"])
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Not by STYLELOOM_CACHE, where the ops would be built anew."""
    monkeypatch.setattr(evaluate, "default_folder", lambda: tmp_path / "home" / "shards")


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """How many images went through the feature network, call by call; not its recognition."""
    counts: list[int] = []
    real = metrics.images_to_features

    def counting(network: Inception, images: Any, *rest: Any) -> np.ndarray:
        images = list(images)
        counts.append(len(images))
        return real(network, images, *rest)

    monkeypatch.setattr(metrics, "images_to_features", counting)
    return counts


@pytest.fixture
def measure(call, networks) -> Callable[..., list[dict[str, Any]]]:
    """(subjects, data, *options) -> the lines that the command printed."""

    def measure(*args: Any) -> list[dict[str, Any]]:
        *subjects, data = [str(arg) for arg in args if not str(arg).startswith("--")]
        options = [str(arg) for arg in args if str(arg).startswith("--")]
        if not any(option.startswith("--inception") for option in options):
            options.append(f"--inception={networks / 'headed.pt'}")
        status, out, err = call(
            evaluate.main, *subjects, f"--data={data}", f"--lpips={networks / 'pixels.pt'}", *options
        )
        assert status == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return measure


def test_all_metrics_of_a_snapshot(measure, run_folder, unlabelled, seen):
    found = measure(run_folder, unlabelled, "--metrics=fid,kid,is,pr,ppl", "--images=40")
    assert [line["metric"] for line in found] == ["fid", "kid", "is", "precision", "recall", "ppl"]
    fid, _, score, precision, _, ppl = found
    common = {"images": 40, "snapshot": str(run_folder / "snapshots" / "nimg-000007000"), "nimg": 7000, "truncation": 1}
    how = {"resize": "clean", "network": "stand-in headed.pt", "reals": 40}
    assert set(fid) == {"metric", "value", "seconds", *common, *how}
    assert {**common, **how}.items() <= fid.items()
    assert fid["value"] > 0.1
    assert score["classifier"] == "unverified head of headed.pt"
    assert score["std"] >= 0
    assert "reals" not in score
    assert "Inception" in precision["features"]
    assert (ppl["network"], ppl["sampling"]) == ("unverified pixels.pt", "end")
    assert "resize" not in ppl
    assert ppl["value"] > 0
    assert sum(seen) == 80
    assert all(line["seconds"] >= 0 for line in found)


def test_the_fid_is_that_of_the_images(measure, run_folder, unlabelled, networks):
    """From generator and records to the number, by another way."""
    found = measure(run_folder, unlabelled, "--noise=const", "--seed=5", "--images=30")
    G, _ = load_generator(run_folder / "snapshots" / "nimg-000007000")
    with torch.no_grad():
        fakes = to_uint8(G(Draws(5, "evaluate", range(30)).normal(8)))
    data = open_images(str(unlabelled), 30)
    network = load_inception(networks / "headed.pt", "cpu")
    features = [network(resize(images, "clean")).numpy() for images in (data(range(30)), fakes)]
    assert found[0]["value"] == pytest.approx(frechet(*moments(features[0]), *moments(features[1])), rel=1e-3)


def test_what_was_measured_is_not_measured_again(measure, run_folder, unlabelled, seen, tmp_path):
    first = measure(run_folder, unlabelled, "--images=40")
    assert sorted(path.name[:5] for path in (tmp_path / "home" / "features").iterdir()) == ["fakes", "reals"]
    assert sum(seen) == 80
    again = measure(run_folder, unlabelled, "--images=40", "--metrics=fid,pr")
    assert sum(seen) == 80
    assert again[0]["value"] == first[0]["value"]
    for option in ("--seed=1", "--truncation=0.5", "--noise=const"):
        before = sum(seen)
        other = measure(run_folder, unlabelled, "--images=40", option)
        assert sum(seen) - before == 40  # only the fakes
        assert other[0]["value"] != first[0]["value"]
    before = sum(seen)
    measure(run_folder, unlabelled, "--images=40", f"--cache={tmp_path / 'elsewhere'}")
    assert sum(seen) - before == 80


def test_other_weights_are_measured_anew(measure, run_folder, unlabelled, seen, settings, tmp_path):
    a = measure(run_folder, unlabelled, "--images=40")
    snapshot(tmp_path / "run", settings("", ""), [], seed=4)
    b = measure(tmp_path / "run", unlabelled, "--images=40")
    assert sum(seen) == 120
    assert a[0]["value"] != b[0]["value"]


def test_several_snapshots_share_the_reals(measure, run_folder, conditional, unlabelled, seen):
    found = measure(run_folder, conditional, unlabelled, "--images=20")
    assert [Path(line["snapshot"]).parents[1].name for line in found] == ["run", "conditional"]
    assert sum(seen) == 60


def test_a_killed_evaluation_goes_on(measure, call, networks, run_folder, unlabelled, monkeypatch, seen):
    monkeypatch.setattr(metrics, "CHUNK", 16)
    whole = measure(run_folder, unlabelled, "--images=40", "--cache=" + str(networks / "whole"))
    real, seen[:] = metrics.images_to_features, []

    def dying(*args: Any) -> np.ndarray:
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(metrics, "images_to_features", dying)
    args = [run_folder, f"--data={unlabelled}", "--images=40", f"--inception={networks / 'headed.pt'}"]
    status, out, err = call(evaluate.main, *args)
    assert (status, out) == (130, "")
    assert "interrupted" in err
    assert seen == [16, 16, 8, 16]  # all reals, and the first of the fakes
    monkeypatch.setattr(metrics, "images_to_features", real)
    found = measure(run_folder, unlabelled, "--images=40")
    assert seen == [16, 16, 8, 16, 16, 8]
    assert found[0]["value"] == whole[0]["value"]


def test_a_data_set_and_its_pictures_are_the_same(measure, pictures, unlabelled):
    found = measure(pictures, unlabelled, "--metrics=fid,kid,pr")
    fid, _, precision, recall = (line["value"] for line in found)
    assert fid == pytest.approx(0, abs=1e-4)
    assert precision == recall == 1
    assert found[0]["images"] == found[0]["reals"] == 42
    assert "nimg" not in found[0]
    assert "truncation" not in found[0]


def test_pictures_of_all_kinds(tmp_path, measure, unlabelled):
    """Turned by EXIF, grey, transparent, of other sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels[..., :3]).save(folder / "0.png", exif=exif)
    Image.fromarray(pixels[..., 0]).save(folder / "1.png")
    Image.fromarray(pixels).save(folder / "2.png")
    turned, grey, clear = open_images(str(folder), 10)(range(3))
    assert np.array_equal(turned.numpy(), np.rot90(pixels[..., :3], -1).transpose(2, 0, 1))
    assert np.array_equal(grey.numpy(), pixels[None, ..., 0])
    assert np.array_equal(clear.numpy(), pixels.transpose(2, 0, 1))
    assert measure(folder, unlabelled)[0]["images"] == 3


def test_changed_pictures_are_measured_anew(tmp_path, measure, unlabelled, seen):
    (tmp_path / "pictures").mkdir()
    values = []
    for seed in (0, 1):
        for i in range(3):
            pixels = np.random.default_rng(seed * 10 + i).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.bmp")  # as many bytes
        values.append(measure(tmp_path / "pictures", unlabelled)[0]["value"])
    assert seen == [42, 3, 3]
    assert values[0] != values[1]


def test_records_come_in_the_order_of_the_shards(pictures, unlabelled):
    data = open_images(str(unlabelled), 100)
    assert data.count == 42
    files = sorted(pictures.rglob("*.png"))
    for position, image in zip((0, 8, 9, 41), (data(range(p, p + 1))[0] for p in (0, 8, 9, 41)), strict=True):
        assert np.array_equal(image.numpy(), np.asarray(Image.open(files[position])).transpose(2, 0, 1))


def test_of_more_images_some_are_chosen(unlabelled):
    everything = {image.numpy().tobytes(): i for i, image in enumerate(open_images(str(unlabelled), 42)(range(42)))}
    chosen = open_images(str(unlabelled), 20)
    assert chosen.count == 20
    numbers = [everything[image.numpy().tobytes()] for image in chosen(range(20))]
    assert numbers == sorted(set(numbers)) == chosen.numbers.tolist()
    assert 10 < np.mean(numbers) < 31
    assert max(numbers) > 20  # not just the first


def test_mirror(measure, run_folder, unlabelled, seen):
    plain, mirrored = open_images(str(unlabelled), 42), open_images(str(unlabelled), 42, mirror=True)
    assert mirrored.count == 84
    (image,), (same, flipped) = plain(range(5, 6)), mirrored(range(10, 12))
    assert torch.equal(same, image)
    assert torch.equal(flipped, image.flip(2))
    assert not torch.equal(flipped, image)
    found = measure(run_folder, unlabelled, "--mirror", "--images=42")
    assert (found[0]["reals"], found[0]["images"]) == (84, 42)
    assert found[0]["value"] != measure(run_folder, unlabelled, "--images=42")[0]["value"]
    assert sum(seen) == 84 + 42 + 42


def test_classes_are_as_frequent_as_in_the_data(call, networks, conditional, labelled, unlabelled, monkeypatch):
    counts = []
    real = evaluate.generated_images

    def noting(G: Any, draws: Any, class_counts: list[int], **options: Any) -> Tensor:
        counts.append(class_counts)
        return real(G, draws, class_counts, **options)

    monkeypatch.setattr(evaluate, "generated_images", noting)
    options = ["--images=20", f"--inception={networks / 'headed.pt'}"]
    status, _, err = call(evaluate.main, conditional, f"--data={labelled}", *options)
    assert (status, "Note" in err) == (0, False)
    status, _, err = call(evaluate.main, conditional, f"--data={unlabelled}", *options)
    assert status == 0
    assert f"Note: {unlabelled} does not have the classes of {conditional}" in err
    assert counts == [[14, 14, 14], [1, 1, 1]]


def test_sizes_that_differ_are_told(unlabelled):
    data = open_images(str(unlabelled), 42)
    assert evaluate.size_note((16, 16), data) == ""
    assert "have 32x8 px" in evaluate.size_note((8, 32), data)


def test_classes_are_found_by_their_names(labelled):
    data = open_images(str(labelled), 42)
    assert isinstance(data, evaluate.Records)
    data.manifest = data.manifest.model_copy(update={"class_counts": [20, 2, 14]})
    assert evaluate.frequencies(["dog", "cat"], data) == ([14, 20], False)
    assert evaluate.frequencies(["dog", "bird"], data) == ([1, 1], True)
    assert evaluate.frequencies([], data) == ([], False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--metrics=fit"], "there is no metric 'fit'"),
        (["--images=1"], "fid needs at least 2 images, not 1"),
        (["--batch=0"], "--batch is at least 1"),
        (["--seed=-1"], "--seed is 0 to"),
        (["--resize=box"], "box"),
        (["--inception=none.pt"], "there is no feature network none.pt"),
        (["--metrics=ppl", "--lpips=none.pt"], "there is no perceptual network none.pt"),
        (["--data=nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_refused(refused, networks, run_folder, unlabelled, options, said):
    usual = {"--data": unlabelled, "--inception": networks / "headed.pt", "--lpips": networks / "pixels.pt"}
    usual |= {option.split("=")[0]: option.split("=")[1] for option in options}
    assert said in refused(evaluate.main, run_folder, *(f"{name}={value}" for name, value in usual.items()))


def test_what_cannot_be_measured_is_refused_before_anything_is(
    refused, networks, run_folder, pictures, unlabelled, tmp_path, seen
):
    options = [f"--data={unlabelled}", f"--inception={networks / 'bare.pt'}", f"--lpips={networks / 'pixels.pt'}"]
    assert "'is' needs a classifier" in refused(evaluate.main, run_folder, *options, "--metrics=fid,is")
    assert "ppl is measured of a snapshot" in refused(evaluate.main, pictures, *options, "--metrics=fid,ppl")
    assert "there is no nowhere" in refused(evaluate.main, run_folder, "nowhere", *options)
    (tmp_path / "few").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "few" / "0.png")
    assert "fid needs at least 2 images" in refused(evaluate.main, tmp_path / "few", *options)
    options[0] = f"--data={run_folder}"
    assert "is a run or a snapshot, not a data set" in refused(evaluate.main, run_folder, *options)
    assert "--data" in refused(evaluate.main, run_folder)
    assert seen == []


def test_spoilt_images_are_named(refused, networks, run_folder, unlabelled, tmp_path):
    shutil.copytree(unlabelled, tmp_path / "set")
    tar = next(iter(sorted((tmp_path / "set").glob("*.tar"))))
    data = bytearray(tar.read_bytes())
    index = np.load(tar.with_suffix(".npy"))
    data[index[3, 0] + 40] ^= 255
    tar.write_bytes(data)
    options = [f"--inception={networks / 'headed.pt'}"]
    said = refused(evaluate.main, run_folder, f"--data={tmp_path / 'set'}", *options)
    assert f"{tar.name}, row 3" in said
    assert "inspect DATASET --verify" in said
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "1.png").write_bytes(b"no picture")
    said = refused(evaluate.main, tmp_path / "pictures", f"--data={unlabelled}", *options)
    assert "1.png: not a picture in a known format" in said


def test_two_ranks_measure_what_one_does(python, networks, run_folder, unlabelled, call, tmp_path, monkeypatch):
    """Bit for bit: the features that they leave, and so the numbers."""
    options = [
        run_folder, f"--data={unlabelled}", "--images=70", "--metrics=fid,is,pr,ppl", "--mirror",
        f"--inception={networks / 'headed.pt'}", f"--lpips={networks / 'pixels.pt'}",
    ]  # fmt: skip
    process = python("-m", "styleloom.scripts.evaluate", *options, f"--cache={tmp_path / 'two'}", ranks=2)
    try:
        two, said = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        two, said = process.communicate()
    assert process.returncode == 0, said
    status, one, _ = call(evaluate.main, *options, f"--cache={tmp_path / 'one'}")
    assert status == 0
    timeless = [[{**json.loads(line), "seconds": 0} for line in out.splitlines()] for out in (one, two)]
    assert len(timeless[0]) == 5
    assert timeless[0] == timeless[1]
    files = sorted((tmp_path / "one").iterdir())
    assert [path.name[:5] for path in files] == ["fakes", "lengt", "reals"]
    for path in files:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_help(call):
    status, out, _ = call(evaluate.main, "--help")
    assert status == 0
    for option in ("--data", "--metrics", "--images", "--inception", "--lpips", "--resize", "--truncation", "--mirror"):
        assert option in out


def test_the_team_has_what_evaluations_ask_of_it():
    """The fake team of test_evaluation.py stands in for this one."""
    assert list(inspect.signature(Team.gather).parameters) == ["self", "objects"]
