"""scripts/convert.py: which way it goes, what it says, what it refuses."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from styleloom.scripts import convert, generate
from styleloom.scripts.cli import COMMANDS
from styleloom.training import export
from styleloom.training.checkpoint import load_generator

_spec = importlib.util.spec_from_file_location("foreign_pickles", Path(__file__).with_name("foreign_pickles.py"))
assert _spec is not None
assert _spec.loader is not None
foreign = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(foreign)

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "network_uncond.npz"))


@pytest.fixture(scope="module")
def pickle(tmp_path_factory):
    """An official file of the networks with known images."""
    G, D = (
        {k[2:]: torch.tensor(x) for k, x in GOLDEN.items() if k.startswith(net) and not k.endswith("resample_filter")}
        for net in ("G/", "D/")
    )
    path = tmp_path_factory.mktemp("convert") / "network.pkl"
    path.write_bytes(foreign.dump(foreign.pytorch_file(G, D)))
    return path


@pytest.fixture
def snapshot(call, pickle, tmp_path):
    assert call(convert.main, pickle, tmp_path / "snapshot")[0] == 0
    return tmp_path / "snapshot"


def test_it_is_a_command():
    assert "convert" in COMMANDS


@torch.no_grad()
def test_a_pickle_becomes_a_snapshot(call, pickle, tmp_path):
    out = tmp_path / "new" / "snapshot"
    status, said, err = call(convert.main, pickle, out)
    assert (status, err) == (0, "")
    assert said.splitlines() == [
        "not taken: training_set_kwargs, G, augment_pipe",
        "G_ema: 32x32 px, z 64, w 64, 8 mapping layers, no classes, 339,347 parameters",
        "D: groups of 4, 337,281 parameters",
        f"The networks of {pickle} (StyleGAN2 for PyTorch) are in {out}.",
    ]
    images = load_generator(out)[0](torch.tensor(GOLDEN["in/z"]), truncation_psi=0.7).numpy()
    expected = GOLDEN["out/img_const_psi07"]
    assert np.abs(images - expected).max() < 1e-4 * np.abs(expected).max()
    assert call(generate.main, out, "--out", tmp_path / "images", "--seeds", "0-1")[0] == 0
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["seed0000.png", "seed0001.png"]


def test_the_generator_alone(call, pickle, tmp_path):
    status, said, _ = call(convert.main, pickle, tmp_path / "out", "--generator-only")
    assert status == 0
    assert "not taken: training_set_kwargs, G, augment_pipe, D" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["generator.safetensors", "snapshot.json"]


def test_a_snapshot_becomes_a_model(call, snapshot, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(convert, "export", lambda *args: asked.append(args) or 3e-6)
    status, said, err = call(convert.main, snapshot, tmp_path / "model.onnx", "--truncation", "0.7")
    assert (status, err) == (0, "")
    assert said.splitlines() == [
        f"The generator of {snapshot} is in {tmp_path / 'model.onnx'}.",
        "Largest difference from its images in onnxruntime: 3.0e-06.",
    ]
    ((generator, out, about, truncation),) = asked
    assert (generator.size, out, truncation) == ((32, 32), tmp_path / "model.onnx", 0.7)
    assert (about["network"], about["width"], about["z_dim"], about["truncation_psi"]) == ("stylegan2", 32, 64, 0.7)


@pytest.mark.slow
def test_a_pickle_becomes_a_model(call, snapshot, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert call(convert.main, snapshot, tmp_path / "model.onnx")[0] == 0
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (images,) = session.run(None, {"z": GOLDEN["in/z"], "truncation_psi": np.array(0.7, np.float32)})
    expected = GOLDEN["out/img_const_psi07"]
    assert np.abs(images - expected).max() < 1e-4 * np.abs(expected).max()
    about = session.get_modelmeta().custom_metadata_map
    assert (about["truncation_psi"], about["nimg"], about["class_names"]) == ("an input", "0", "[]")


def test_a_model_that_differs_ends_in_status_1(refused, snapshot, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "_model", lambda function: pytest.importorskip("onnx").ModelProto())
    monkeypatch.setattr("onnx.checker.check_model", lambda path: None)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda path, providers: None)
    monkeypatch.setattr(export, "_differences", lambda function, session: iter([1e-6, 2e-4]))
    complaint = refused(convert.main, snapshot, tmp_path / "model.onnx")
    assert "the model's images differ by 2.0e-04 from the generator's, more than 1e-04" in complaint
    assert not (tmp_path / "model.onnx").exists()


def test_what_is_there_is_not_overwritten(call, refused, pickle, snapshot, tmp_path):
    assert f"{snapshot} exists: give another name, or --overwrite" in refused(convert.main, pickle, snapshot)
    assert call(convert.main, pickle, snapshot, "--overwrite", "--generator-only")[0] == 0
    assert not (snapshot / "discriminator.safetensors").exists()
    folder, model = tmp_path / "folder", tmp_path / "model.onnx"
    folder.mkdir()
    (folder / "precious").touch()
    assert "is no snapshot: give another name" in refused(convert.main, pickle, folder, "--overwrite")
    assert (folder / "precious").exists()
    model.mkdir()
    assert "is no file: give another name" in refused(convert.main, snapshot, model, "--overwrite")
    assert "model.onnx exists" in refused(convert.main, snapshot, model)


def test_what_does_not_go_together(refused, pickle, snapshot, tmp_path):
    new = tmp_path / "new"
    assert "there is no" in refused(convert.main, tmp_path / "none.pkl", new)
    assert "a model's name ends in .onnx" in refused(convert.main, snapshot, new)
    assert "a model's name ends in .onnx" in refused(convert.main, pickle, new, "--to", "onnx")
    assert "is a folder: a snapshot is made of a .pkl file" in refused(convert.main, snapshot, new, "--to", "snapshot")
    assert "--truncation is for models" in refused(convert.main, pickle, new, "--truncation", "0.7")
    onnx = tmp_path / "new.onnx"
    assert "--generator-only is for .pkl files" in refused(convert.main, snapshot, onnx, "--generator-only")
    assert "there is no snapshot in" in refused(convert.main, tmp_path, onnx)
    assert not new.exists()
    assert not onnx.exists()


def test_files_that_are_no_networks(refused, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"cos\nsystem\n(X\x04\x00\x00\x00truetR.")
    assert refused(convert.main, path, tmp_path / "out") == (
        f"styleloom convert: cannot convert {path}: os.system is not among what such a file may hold\n"
    )
    path.write_bytes(b"<html>not found</html>")
    assert "no pickle" in refused(convert.main, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
