"""training/published.py: settings that our networks cannot have are refused by name, others are taken."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from styleloom.training import published, unpickle
from styleloom.training.config import Run, StyleGAN2Network
from styleloom.training.networks import build
from styleloom.training.published import parts, shown
from styleloom.training.unpickle import Array, Record

_spec = importlib.util.spec_from_file_location("foreign_pickles", Path(__file__).with_name("foreign_pickles.py"))
assert _spec is not None
assert _spec.loader is not None
foreign = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(foreign)

TINY = Run(network=StyleGAN2Network(z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8))
SAID = {"fmap_base": 32, "fmap_max": 8}


@pytest.fixture(scope="module")
def tensors():
    """(G, D) of 16 px and 2 classes, by the PyTorch code's names."""
    G, D = build(TINY, 16, 16, 3, 2)
    return dict(G.state_dict()), {name: x for name, x in D.state_dict().items() if name != "mapping.w_avg"}


@pytest.fixture(scope="module")
def read(tensors):
    """(**changed attributes) -> parts of a file of the PyTorch code."""
    return lambda **changed: parts(unpickle.loads(foreign.dump(foreign.pytorch_file(*tensors, **changed))), False)


@pytest.fixture(scope="module")
def read_tf(tensors):
    """(generator's, discriminator's arguments, version) -> parts of a file of the TensorFlow code."""

    def read_tf(g: Any = (), d: Any = (), version: int = 5) -> Any:
        file = foreign.tensorflow_file(*tensors, version=version, g_kwargs=g, d_kwargs=d)
        return parts(unpickle.loads(foreign.dump(file)), False)

    return read_tf


def test_a_file_of_the_pytorch_code(read, tensors):
    G, D, source, notes = read()
    assert D is not None
    for part, its in ((G, tensors[0]), (D, tensors[1])):
        assert part.tensors.keys() == its.keys()
        assert all(np.array_equal(part.tensors[name], x.numpy()) for name, x in its.items())
    assert (G.clamp, G.low_levels, G.w_avg_beta, G.sizes) == (None, 0, 0.998, (32768, 512))
    assert (D.group, D.lr_mul["mapping.fc1"], D.lr_mul["b4.out"]) == (4, 0.01, 1)
    assert source == {"networks": "StyleGAN2 for PyTorch"}
    assert notes == ["not taken: training_set_kwargs, G, augment_pipe"]


def test_a_file_of_the_tensorflow_code(read_tf, tensors):
    G, D, source, notes = read_tf(SAID | {"dlatent_avg_beta": 0.9}, SAID | {"mapping_lrmul": 0.01})
    for part, its in ((G, tensors[0]), (D, tensors[1])):
        assert part.tensors.keys() == its.keys()
        for name, x in its.items():
            np.testing.assert_allclose(part.tensors[name], x.reshape(part.tensors[name].shape), rtol=1e-6, atol=1e-7)
    assert (G.sizes, G.w_avg_beta, G.lr_mul) == ((64, 8), 0.9, {"mapping.fc0": 0.01, "mapping.fc1": 0.01})
    assert D.lr_mul == {"mapping.fc0": 0.01, "mapping.fc1": 0.01}
    assert source == {"networks": "StyleGAN2 for TensorFlow"}
    assert notes == ["not taken: G"]


def test_defaults_of_the_tensorflow_code(read_tf):
    """D's were others in StyleGAN2 (4) than in StyleGAN2-ADA (5)."""
    assert read_tf(version=5)[1].group is None
    assert read_tf(version=4)[1].group == 4
    assert read_tf(version=4, d={"mbstd_group_size": 0})[1].group == 1
    assert read_tf(d={"mbstd_num_features": 0})[1].group == 1
    assert read_tf(d={"mbstd_group_size": 8})[1].group == 8
    G, D = read_tf(g={"num_fp16_res": 3, "conv_clamp": 256})[:2]
    assert (G.lr_mul["mapping.fc0"], D.lr_mul["mapping.fc0"]) == (0.01, 0.1)
    assert (G.low_levels, G.clamp, D.low_levels, D.clamp) == (3, 256, 0, None)


def test_up_sampling_convolutions_of_the_tensorflow_code():
    """They correlate the zero-inserted image with the weight; ours convolve it, with the weight as it is then laid out.

    By the definition, in numpy, on the weight that comes out for one that went in.
    """
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((3, 3, 2, 4)), rng.standard_normal((2, 5, 5))
    zeros = np.zeros((2, 13, 13))
    zeros[:, 2:11:2, 2:11:2] = x
    correlated = np.zeros((4, 11, 11))
    for i in range(11):
        for j in range(11):
            correlated[:, i, j] = np.einsum("iyx,yxio->o", zeros[:, i : i + 3, j : j + 3], weight)
    part = published.Part("Gs", {})
    published._take_variable(part, "synthesis/8x8/Conv0_up/weight", weight, generator=True)
    ours = torch.from_numpy(part.tensors["synthesis.b8.conv0.weight"].copy())
    # What ops/conv2d.py does with up=2, without its filter: a transposed convolution spreads the weight unflipped.
    y = F.conv_transpose2d(torch.from_numpy(x)[None], ours.transpose(0, 1), stride=2)[0]
    np.testing.assert_allclose(y.numpy(), correlated, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"G_synthesis__b8": {"architecture": "resnet"}}, "G_ema: architecture of synthesis.b8 is 'resnet'"),
        ({"D_b16": {"architecture": "skip"}}, "D: architecture of b16 is 'skip'"),
        ({"G_synthesis__b8__conv0": {"activation": "relu"}}, "G_ema: activation of synthesis.b8.conv0 is 'relu'"),
        ({"G_mapping__fc1": {"activation": "linear"}}, "G_ema: activation of mapping.fc1 is 'linear'"),
        ({"D_b4__out": {"activation": "tanh"}}, "D: activation of b4.out is 'tanh'"),
        (
            {"G_synthesis__b8__conv0": {"conv_clamp": 256}},
            r"G_ema: conv_clamp is .* only be 'one number for all layers",
        ),
        ({"D_b4__mbstd": {"num_channels": 2}}, "D: mbstd_num_channels is 2"),
        ({"D_b4__mbstd": {"group_size": "4"}}, "D: mbstd_group_size is '4'"),
        ({"G_mapping__fc0": {"weight_gain": 0.5}}, "G_ema: weight_gain of mapping.fc0 is 0.5"),
        ({"G_mapping__fc0": {"bias_gain": -1}}, "G_ema: bias_gain of mapping.fc0 is -1"),
        ({"G_mapping__fc0": {"bias_gain": float("nan")}}, "G_ema: bias_gain of mapping.fc0 is nan"),
        (
            {"G_synthesis__b8": {"_buffers": {"resample_filter": torch.ones(3, 3) / 9}}},
            r"G_ema: the filter synthesis.b8.resample_filter is .* can only be \[1, 3, 3, 1\]",
        ),
        ({"G_synthesis__b8__conv0": {"_parameters": [1]}}, "_parameters of a 'Layer' are no dictionary"),
        ({"G_synthesis__b8__conv0": {"_parameters": {"weight": "x"}}}, "'weight' is no tensor"),
        ({"G_synthesis": {"_modules": {"input": None}}}, r"no synthesis.b4.const\); StyleGAN3's are not read"),
        ({"G_mapping": {"_modules": {"fc0": 1}}}, r"no tree of modules \('mapping.fc0'\)"),
    ],
)
def test_settings_that_ours_cannot_have(read, changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        read(**changed)


@pytest.mark.parametrize(
    ("g", "d", "complaint"),
    [
        ({"architecture": "resnet"}, {}, "Gs: architecture is 'resnet', and here it can only be 'skip'"),
        ({}, {"architecture": "orig"}, "D: architecture is 'orig', and here it can only be 'resnet'"),
        ({"nonlinearity": "relu"}, {}, "Gs: nonlinearity is 'relu'"),
        ({"resample_kernel": [1, 2, 1]}, {}, r"Gs: resample_kernel is \[1, 2, 1\]"),
        ({"normalize_latents": False}, {}, "Gs: normalize_latents is False"),
        ({"something": 1}, {}, "Gs: 'something' is a setting that is not known here"),
        ({}, {"use_spectral_norm": True}, "D: use_spectral_norm is True"),
        ({}, {"mbstd_num_features": 4}, "D: mbstd_num_channels is 4"),
        ({"mapping_lrmul": "1"}, {}, "Gs: mapping_lrmul is '1'"),
        ({"num_fp16_res": []}, {}, r"Gs: num_fp16_res is \[\]"),
    ],
)
def test_tensorflow_settings_that_ours_cannot_have(read_tf, g, d, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_tf(g, d)


@pytest.mark.parametrize("version", [2, 3, 6, None])
def test_other_versions_of_the_tensorflow_code(read_tf, version):
    with pytest.raises(ValueError, match=f"Gs is of format {version}: StyleGAN2 and StyleGAN2-ADA have 4 and 5"):
        read_tf(version=version)


@pytest.mark.parametrize(
    "variable",
    ["synthesis/ToRGB_lod0/weight", "mapping/LabelConcat/weight", "synthesis/8x16/Conv1/bias", "x", "Output/weight"],
)
def test_variables_of_other_networks(tensors, variable):
    file = foreign.tensorflow_file(*tensors)
    file[2].state["variables"].append((variable, np.zeros((2, 2), "f4")))
    with pytest.raises(ValueError, match=f"the variable '{variable}' is none of StyleGAN2's configurations E and F"):
        parts(unpickle.loads(foreign.dump(file)), False)


@pytest.mark.parametrize("about", [{}, [], None, {"G_ema": 1}, (1, 2, 3), {"state_dict": {}}, Record("X")])
def test_files_of_something_else(about):
    with pytest.raises(ValueError, match=r"it holds neither \(G, D, Gs\) .* nor G_ema and D"):
        parts(about, False)


@pytest.mark.parametrize(
    ("kind", "only"), [("Generator", "Discriminator"), ("ProjectedDiscriminator", "Discriminator")]
)
def test_a_discriminator_of_another_class(tensors, kind, only):
    file = foreign.pytorch_file(*tensors)
    file["D"].kind = kind
    about = unpickle.loads(foreign.dump(file))
    with pytest.raises(ValueError, match=f"D is of class '{kind}', not {only}"):
        parts(about, False)
    G, D, _, notes = parts(about, True)
    assert (G.what, D) == ("G_ema", None)
    assert notes == ["not taken: training_set_kwargs, G, augment_pipe, D"]


def test_modules_that_hold_themselves(tensors):
    file = unpickle.loads(foreign.dump(foreign.pytorch_file(*tensors)))
    synthesis = file["G_ema"].state["_modules"]["synthesis"]
    synthesis.state["_modules"]["more"] = file["G_ema"]
    with pytest.raises(ValueError, match=r"no tree of modules \('synthesis.more'\)"):
        parts(file, False)
    top = Record("Generator", {})
    inner = top
    for _ in range(50):
        inner.state["_modules"] = {"a": Record("Layer", {})}
        inner = inner.state["_modules"]["a"]
    with pytest.raises(ValueError, match=r"no tree of modules \('a\.a\."):
        parts({"G_ema": top}, False)


def test_what_is_shown_of_a_value_is_a_line():
    deep: list[Any] = []
    for _ in range(10000):
        deep = [deep]
    many: Any = "x"
    for _ in range(60):
        many = [many] * 8
    cycle: list[Any] = []
    cycle.append(cycle)
    for value in (deep, many, cycle, {1: cycle}, "x" * 10**6, Array(np.zeros(1000)), Record("X", {"a": many}), 2**4000):
        assert len(shown(value)) < 400
        assert shown(value).isprintable()
    assert shown([1, 2.5, "a", None]) == "[1, 2.5, 'a', None]"
