"""training/export.py: models give the generators' images, for any batch; what cannot be is refused."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from styleloom.training import config, export
from styleloom.training.networks import build

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

STYLE: dict[str, Any] = {"z_dim": 8, "w_dim": 8, "mapping_layers": 1, "channel_base": 64, "channel_max": 8}
PROGRESSIVE: dict[str, Any] = {"z_dim": 8, "channel_base": 64, "channel_max": 8}
R3GAN: dict[str, Any] = {"z_dim": 8, "channel_base": 64, "channel_max": 16, "group_width": 4}


def generator(network, width, height, c_dim=0, level=None, alpha=1.0, channels=3):
    """A generator all of whose weights are away from their initial values."""
    recipe = {"kind": network.kind}
    run = config.Run.model_validate({"network": network.model_dump(), "recipe": recipe})
    G, _ = build(run, width, height, channels, c_dim)
    numbers = torch.Generator().manual_seed(2)
    for parameter in G.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=numbers)
    if G.has_w:
        G.mapping.w_avg += torch.randn(8, generator=numbers)
    if level is not None:
        G.grow_to(level, alpha)
    return G.eval().requires_grad_(False)


@torch.no_grad()
def assert_model(G, path, psi=None):
    """Its own onnxruntime session, on other numbers and batches than the export's."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = ["z", *["c"] * (G.c_dim > 0), *["truncation_psi"] * (G.has_w and psi is None)]
    assert [x.name for x in session.get_inputs()] == names
    assert all(isinstance(x.shape[0], str) for x in session.get_inputs() if x.shape)  # of any number
    for n in (1, 5):
        z, c = torch.randn(n, 8), torch.eye(G.c_dim)[torch.arange(n) % G.c_dim] if G.c_dim else None
        for its in (0.5, 1.0) if psi is None and G.has_w else (1.0 if psi is None else psi,):
            inputs = {"z": z.numpy(), "truncation_psi": np.array(its, np.float32)}
            inputs |= {} if c is None else {"c": c.numpy()}
            (images,) = session.run(["images"], {name: inputs[name] for name in names})
            assert images.shape == (n, 3, *G.size)
            np.testing.assert_allclose(images, G(z, c, truncation_psi=its).numpy(), rtol=1e-4, atol=1e-4)


FAST = [
    ("stylegan2", config.StyleGAN2Network(**STYLE), (24, 16, 3)),
    ("progressive, fading in", config.ProgressiveNetwork(**PROGRESSIVE), (16, 24, 2, 1, 0.25)),
]
SLOW = [
    ("stylegan2 without noise", config.StyleGAN2Network(noise=False, **STYLE), (8, 8)),
    ("stylegan2, not grown", config.StyleGAN2Network(**STYLE), (16, 16, 0, 1, 0.3)),
    ("stylegan2 of more levels", config.StyleGAN2Network(**STYLE), (64, 64)),
    ("msg", config.MSGNetwork(**STYLE), (16, 16)),
    ("stylegan1, which truncates 8 layers", config.StyleGAN1Network(**STYLE), (64, 64)),
    ("stylegan1 on w, fading in", config.StyleGAN1Network(latent_input=True, **STYLE), (16, 16, 2, 2, 0.5)),
    ("progressive at 4 px", config.ProgressiveNetwork(**PROGRESSIVE), (16, 16, 0, 0)),
    ("r3gan", config.R3GANNetwork(**R3GAN), (16, 16, 2)),
]


@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        *(pytest.param(network, sizes, id=name) for name, network, sizes in FAST),
        *(pytest.param(network, sizes, id=name, marks=pytest.mark.slow) for name, network, sizes in SLOW),
    ],
)
def test_images_are_the_generators(network, sizes, tmp_path):
    G = generator(network, *sizes)
    path = tmp_path / "new" / "model.onnx"
    difference = export.export(G, path, {"network": network.kind, "width": G.size[1], "class_names": ["a", "b"]})
    assert 0 < difference <= 1e-4
    assert_model(G, path)
    assert list(path.parent.iterdir()) == [path]
    model = onnx.load(path)
    assert model.producer_name == "styleloom"
    about = {x.key: x.value for x in model.metadata_props}
    assert about == {"network": network.kind, "width": str(G.size[1]), "class_names": json.dumps(["a", "b"])}


def test_a_fixed_truncation_and_models_that_differ(tmp_path, monkeypatch):
    G = generator(config.StyleGAN2Network(**STYLE), 8, 8)
    traced = export._model(export._Function(G, 0.5).eval())
    monkeypatch.setattr(export, "_model", lambda function: type(traced).FromString(traced.SerializeToString()))
    path = tmp_path / "model.onnx"
    export.export(G, path, {}, truncation=0.5)
    assert_model(G, path, psi=0.5)
    before = path.read_bytes()
    G.get_parameter("synthesis.b8.torgb.bias").data += 0.01  # the model has it as it was
    with pytest.raises(
        ValueError, match=r"the model's images differ by .* more than 1e-04: .*model.onnx is not written"
    ):
        export.export(G, path, {}, truncation=0.5)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_truncation_where_there_is_no_w(tmp_path):
    G = generator(config.ProgressiveNetwork(**PROGRESSIVE), 8, 8)
    with pytest.raises(ValueError, match=r"truncation 0\.7: this kind of generator has no w"):
        export.export(G, tmp_path / "model.onnx", {}, truncation=0.7)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_packages_that_are_not_installed(missing, tmp_path, monkeypatch):
    def import_module(name):
        if name == missing:
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(export.importlib, "import_module", import_module)
    G = generator(config.StyleGAN2Network(**STYLE), 8, 8)
    with pytest.raises(ValueError, match=rf"ONNX models need {missing}: pip install 'styleloom\[onnx\]'"):
        export.export(G, tmp_path / "model.onnx", {})
