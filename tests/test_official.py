"""training/official.py: converted networks give the published networks' numbers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from styleloom.training import checkpoint, official
from styleloom.training.config import Run, StyleGAN2Network, StyleGAN2Recipe
from styleloom.training.networks import build

_spec = importlib.util.spec_from_file_location("foreign_pickles", Path(__file__).with_name("foreign_pickles.py"))
assert _spec is not None
assert _spec.loader is not None
foreign = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(foreign)

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "network_uncond.npz"))
SAID = {"channel_base": 16384, "channel_max": 64}  # of the golden networks


def golden(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[name])


def golden_tensors(prefix: str) -> dict[str, torch.Tensor]:
    return {k[2:]: golden(k) for k in GOLDEN if k.startswith(prefix) and not k.endswith("resample_filter")}


def assert_golden(value: torch.Tensor, name: str) -> None:
    expected = golden(name)
    assert (value - expected).abs().max() <= 1e-4 * expected.abs().max(), name


def pytorch(said: Any = SAID, protocol: int = 4) -> bytes:
    file = foreign.pytorch_file(golden_tensors("G/"), golden_tensors("D/"))
    file["G_ema"].state["_init_kwargs"]["synthesis_kwargs"].update(said)
    return foreign.dump(file, protocol)


def tensorflow(version: int) -> bytes:
    d = {"mbstd_group_size": 4} if version == 5 else {}
    said = {"fmap_base": 8192, "fmap_max": 64}
    file = foreign.tensorflow_file(
        golden_tensors("G/"), golden_tensors("D/"), version, said | {"mapping_lrmul": 0.01}, said | d
    )
    return foreign.dump(file)


@pytest.fixture
def convert(tmp_path):
    """(bytes of a file, its name) -> (snapshot's generator, discriminator, snapshot.json, what was read)."""

    def convert(data: bytes, name: str = "network.pkl", generator_only: bool = False) -> Any:
        (tmp_path / name).write_bytes(data)
        its = official.read(tmp_path / name, generator_only)
        official.write(its, tmp_path / "out" / "snapshot")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["snapshot"]
        G, about = checkpoint.load_generator(tmp_path / "out" / "snapshot")
        D = None
        if not generator_only:
            run = about["run"].model_copy(update={"precision": "fp32"})
            _, D = build(run, about["width"], about["height"], about["channels"], len(about["class_names"]))
            file = tmp_path / "out" / "snapshot" / "discriminator.safetensors"
            checkpoint.fill(D, checkpoint.read_tensors(file), file)
        return G, D, about, its

    return convert


@torch.no_grad()
@pytest.mark.parametrize(
    "data",
    [pytorch(), pytorch(protocol=2), pytorch(protocol=3), tensorflow(5), tensorflow(4)],
    ids=["pytorch", "pytorch-2", "pytorch-3", "tensorflow-5", "tensorflow-4"],
)
def test_golden_images_and_logits(convert, data):
    G, D, about, _ = convert(data)
    z = golden("in/z")
    assert_golden(G(z, truncation_psi=0.7), "out/img_const_psi07")
    assert_golden(G(z[:4], noise="none"), "out/img_none_psi1")
    assert_golden(D(golden("in/real")), "out/logits_real")
    assert_golden(D(G(z, truncation_psi=0.7)), "out/logits_fake")
    n = about["run"].network
    assert (n.z_dim, n.w_dim, n.mapping_layers, n.channel_base, n.channel_max) == (64, 64, 8, 16384, 64)
    assert (n.mbstd_group, n.noise, about["nimg"], about["class_names"]) == (4, True, 0, [])


# Networks of ours, away from their initial values, as published ones, and back.


def networks(c_dim: int = 0, size: int = 16, channels: int = 3, **its: Any) -> tuple[Any, Any]:
    its = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 64, "channel_max": 8} | its
    G, D = build(Run(network=StyleGAN2Network(**its)), size, size, channels, c_dim)
    generator = torch.Generator().manual_seed(1)
    for network in (G, D):
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    G.mapping.w_avg += torch.randn(8, generator=generator)
    return G.eval().requires_grad_(False), D.eval().requires_grad_(False)


def tensors(G: Any, D: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By the PyTorch code's names; its discriminators have no mean of w, its noise strengths no axis."""
    g = {name: x.reshape(()) if name.endswith("noise_strength") else x for name, x in G.state_dict().items()}
    return g, {name: x for name, x in D.state_dict().items() if name != "mapping.w_avg"}


def assert_same(mine: Any, theirs: Any, c_dim: int = 0, size: int = 16, channels: int = 3) -> None:
    z, images = torch.randn(4, 8), torch.randn(4, channels, size, size)
    c = torch.eye(c_dim)[torch.arange(4) % c_dim] if c_dim else None
    a, b = (G(z, c, truncation_psi=0.7) for G, _ in (mine, theirs))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if theirs[1] is not None:
        torch.testing.assert_close(mine[1](images, c), theirs[1](images, c), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pytorch", "tensorflow"])
@pytest.mark.parametrize(
    ("c_dim", "size", "channels", "its"),
    [
        (3, 16, 3, {}),
        (0, 8, 1, {"mbstd_group": 1}),
        (0, 16, 3, {"noise": False}),
        (2, 8, 4, {"mapping_layers": 3, "discriminator_mapping_layers": 0}),
        (2, 8, 3, {"mapping_layers": 1, "discriminator_mapping_layers": 2}),
    ],
    ids=["labels", "grey", "no noise", "labels that are only embedded", "more layers for labels"],
)
def test_networks_come_back(convert, kind, c_dim, size, channels, its):
    G, D = networks(c_dim, size, channels, **its)
    group = its.get("mbstd_group", 4)
    if kind == "pytorch":
        file = foreign.pytorch_file(*tensors(G, D))
        if group == 1:
            del file["D"].state["_modules"]["b4"].state["_modules"]["mbstd"]
    else:
        lr_mul = {"mapping_lrmul": 0.01}
        said = {"mbstd_num_features": int(group > 1), "mbstd_group_size": 4, **lr_mul}
        file = foreign.tensorflow_file(*tensors(G, D), g_kwargs=lr_mul, d_kwargs=said)
    *read, about, _ = convert(foreign.dump(file))
    assert_same((G, D), read, c_dim, size, channels)
    assert about["class_names"] == [str(i) for i in range(c_dim)]
    assert about["run"].data.labels == (c_dim > 0)
    assert about["run"].network.noise == its.get("noise", True)
    assert about["run"].network.mbstd_group == group


@torch.no_grad()
def test_learning_rate_multipliers_of_the_mapping(convert):
    """Parameters are stored divided by it, and used multiplied with it: as many as 0.01 here, 0.1 there."""
    G, D = networks(2)
    g, d = tensors(G, D)
    others = [{name: x / 10 if ".fc" in name and "mapping" in name else x for name, x in its.items()} for its in (g, d)]
    file = foreign.pytorch_file(g, d)
    for key, its in (("G_ema", others[0]), ("D", others[1])):
        kind = file[key].kind
        file[key] = foreign.module(kind, foreign.with_filters(its), foreign.attributes(its, lr_mul=0.1))
    *read, _, _ = convert(foreign.dump(file))
    assert_same((G, D), read, 2)


def test_channel_rules_as_told_or_the_least(convert):
    assert convert(pytorch({}))[2]["run"].network.channel_base == 64 * 32
    assert convert(pytorch({"channel_base": 4096, "channel_max": 64}))[2]["run"].network.channel_base == 4096
    assert convert(pytorch({"channel_base": 1, "channel_max": 64}))[2]["run"].network.channel_base == 64 * 32


def test_low_precision_and_clamps(convert):
    """The largest activation is told; where it is clamped there, it would be another function here."""
    G, D = networks()
    layers = [name for name, x in [*G.named_modules(), *D.named_modules()] if name.endswith(("conv", "conv0", "conv1"))]
    layers += [name for name, x in [*G.named_modules(), *D.named_modules()] if name.endswith("rgb")]

    def file(clamp: float) -> bytes:
        low = {f"G_synthesis__b{res}": {"use_fp16": True} for res in (8, 16)}
        clamps = {
            f"{'G' if name.startswith('syn') else 'D'}_{name.replace('.', '__')}": {"conv_clamp": clamp}
            for name in layers
        }
        return foreign.dump(foreign.pytorch_file(*tensors(G, D), **low, **clamps))

    _, _, about, its = convert(file(256))
    assert about["run"].precision == "fp16"
    notes = [note for note in its.notes if "clamp" in note]
    assert [note.rpartition(" ")[0] for note in notes] == [
        "G_ema: conv_clamp 256 is left out: the largest activation seen is",
        "D: conv_clamp 256 is left out: the largest activation seen is",
    ]
    seen = [float(note.rpartition(" ")[2]) for note in notes]
    assert 1 < min(seen) < max(seen) < 256
    convert(file(max(seen) * 1.01))
    with pytest.raises(ValueError, match=r"conv_clamp .* is at work there"):
        convert(file(max(seen) * 0.99))
    with pytest.raises(ValueError, match=r"G_ema: conv_clamp 0\.01 is at work there"):
        convert(file(0.01))


def test_without_a_discriminator(convert, tmp_path):
    G, D, _, its = convert(pytorch(), generator_only=True)
    assert D is None
    assert not (tmp_path / "out" / "snapshot" / "discriminator.safetensors").exists()
    assert its.notes[0] == "not taken: training_set_kwargs, G, augment_pipe, D"
    assert_golden(G(golden("in/z"), truncation_psi=0.7), "out/img_const_psi07")
    file = foreign.pytorch_file(golden_tensors("G/"), golden_tensors("D/")) | {"D": None}
    (tmp_path / "no-d.pkl").write_bytes(foreign.dump(file))
    assert not official.read(tmp_path / "no-d.pkl").discriminator_is_its


def test_what_the_snapshot_tells(convert, tmp_path):
    _, _, about, its = convert(pytorch(), "network-snapshot-025000.pkl")
    assert about["nimg"] == 25_000_000
    assert about["source"]["file"] == "network-snapshot-025000.pkl"
    assert about["source"]["networks"] == "StyleGAN2 for PyTorch"
    assert len(about["source"]["sha256"]) == 64
    assert (about["run"].preset, about["run"].recipe) == ("official", StyleGAN2Recipe(w_avg_beta=0.998))
    assert its.notes[1:] == [
        "G_ema: 32x32 px, z 64, w 64, 8 mapping layers, no classes, 339,347 parameters",
        "D: groups of 4, 337,281 parameters",
    ]


def test_a_snapshot_is_replaced_whole(convert, tmp_path):
    convert(pytorch())
    before = json.loads((tmp_path / "out" / "snapshot" / "snapshot.json").read_text())
    convert(pytorch(), "network-snapshot-000001.pkl", generator_only=True)
    after = json.loads((tmp_path / "out" / "snapshot" / "snapshot.json").read_text())
    assert (before["nimg"], after["nimg"]) == (0, 1000)
    assert not (tmp_path / "out" / "snapshot" / "discriminator.safetensors").exists()


def changed(network: str, name: str, value: torch.Tensor | None) -> bytes:
    """The golden file with another tensor."""
    its = {"G/": golden_tensors("G/"), "D/": golden_tensors("D/")}
    its[network].pop(name, None)
    if value is not None:
        its[network][name] = value
    return foreign.dump(foreign.pytorch_file(its["G/"], its["D/"]))


@pytest.mark.parametrize(
    ("network", "name", "value", "complaint"),
    [
        ("G/", "mapping.w_avg", None, "G_ema has no mapping.w_avg"),
        ("G/", "synthesis.b8.conv0.bias", None, "do not fit this network: synthesis.b8.conv0.bias is nothing there"),
        ("G/", "synthesis.b8.conv0.extra", torch.ones(1), r"conv0.extra is \(1,\) there, nothing here"),
        ("G/", "mapping.fc3.weight", torch.ones(64, 32), r"layer_features .*mapping.fc3.weight\) is \(64, 32\)"),
        ("G/", "mapping.embed.weight", torch.ones(32, 5), "embed_features is 32, and here it can only be 64"),
        (
            "G/",
            "synthesis.b16.conv1.weight",
            torch.ones(48, 48, 3, 3),
            r"D: the number of channels of its levels is .* only be \[64, 64, 48, 64\]",
        ),
        ("G/", "synthesis.b16.conv1.weight", torch.ones(64, 64, 5, 5), "the shape of synthesis.b16.conv1.weight"),
        ("G/", "synthesis.b16.conv1.weight", torch.ones(0), "the shape of synthesis.b16.conv1.weight"),
        ("G/", "synthesis.b16.conv1.noise_strength", None, "use_noise is 'in some levels'"),
        ("G/", "synthesis.b64.conv1.weight", torch.ones(64, 64, 3, 3), "use_noise is 'in some levels'"),
        ("G/", "synthesis.b1048576.conv1.weight", torch.ones(1, 1, 3, 3), "img_resolution"),
        ("G/", "synthesis.b4.torgb.weight", torch.ones(3), r"the shape of synthesis.b4.torgb.weight is \(3,\)"),
        (
            "D/",
            "b16.conv0.weight",
            torch.ones(32, 32, 3, 3),
            r"D: the number of channels of its levels is \[64, 64, 32, 64\]",
        ),
        ("D/", "mapping.embed.weight", torch.ones(64, 5), "D: c_dim is 5, and here it can only be 0"),
        ("D/", "b4.out.weight", torch.ones(5, 64), r"b4.out.weight is \(5, 64\) there, \(1, 64\) here"),
    ],
)
def test_networks_of_other_shapes(convert, network, name, value, complaint):
    with pytest.raises(ValueError, match=f"cannot convert .*network.pkl: .*(?:{complaint})"):
        convert(changed(network, name, value))


def test_tensors_that_share_their_numbers(convert):
    """A small file whose copies would fill the memory."""
    tensors, shared = golden_tensors("G/"), torch.zeros(1 << 14)
    file = foreign.pytorch_file(tensors, golden_tensors("D/"))
    its = file["G_ema"].state["_modules"]["mapping"].state["_buffers"]
    its |= {f"x{i}": shared for i in range(500)}
    with pytest.raises(ValueError, match="its tensors share their numbers"):
        convert(foreign.dump(file))


@pytest.mark.parametrize(
    ("name", "complaint"), [("x" * 101, "a name of more than 100 letters"), ("\x1b[2J", r"a tensor is called '.*\\x1b")]
)
def test_names_that_do_not_do(convert, name, complaint):
    file = foreign.pytorch_file(golden_tensors("G/"), golden_tensors("D/"))
    file["G_ema"].state["_modules"]["mapping"].state["_buffers"][name] = torch.zeros(1)
    with pytest.raises(ValueError, match=complaint):
        convert(foreign.dump(file))


def test_a_group_that_no_batch_has(convert):
    file = foreign.pytorch_file(
        golden_tensors("G/"), golden_tensors("D/"), D_b4__mbstd={"group_size": 10**7, "num_channels": 1}
    )
    with pytest.raises(ValueError, match="mbstd_group_size is 10000000"):
        convert(foreign.dump(file))


def test_minibatch_std_over_the_whole_batch(convert):
    file = foreign.pytorch_file(
        golden_tensors("G/"), golden_tensors("D/"), D_b4__mbstd={"group_size": None, "num_channels": 1}
    )
    _, D, about, its = convert(foreign.dump(file))
    assert about["run"].network.mbstd_group == 4
    assert any("mbstd_group_size is None there, the whole batch: here groups of 4" in note for note in its.notes)
    assert_golden(D(golden("in/real")[:4]), "out/logits_real_first4")


def test_batches_divide_into_groups(convert):
    file = foreign.pytorch_file(
        golden_tensors("G/"), golden_tensors("D/"), D_b4__mbstd={"group_size": 5, "num_channels": 1}
    )
    assert convert(foreign.dump(file))[2]["run"].batch == 35
