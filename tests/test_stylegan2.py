"""training/networks/stylegan2.py: the published networks' values, then what they do not cover."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from styleloom.ops.upfirdn2d import upsample2d
from styleloom.training import losses, official
from styleloom.training.networks.growing import CLAMP, start_size, truncate
from styleloom.training.networks.stylegan2 import Discriminator, Generator, Synthesis

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "network_uncond.npz"))
TOLERANCE = 1e-4  # relative to the largest value


def golden(name):
    return torch.tensor(GOLDEN[name])


def load(network, prefix):
    """Loads the official state."""
    state = {k[2:]: golden(k) for k in GOLDEN if k.startswith(prefix)}
    network.load_state_dict(official.adapt(state, network.state_dict()))
    return network


def discriminator(**settings):
    return load(Discriminator(32, 32, channel_base=16384, channel_max=64, **settings), "D/")


@pytest.fixture(scope="module", name="G")
def official_generator():
    return load(Generator(32, 32, z_dim=64, w_dim=64, mapping_layers=8, channel_base=16384, channel_max=64), "G/")


@pytest.fixture(scope="module", name="D")
def official_discriminator():
    return discriminator()


def assert_golden(value, name):
    expected = golden(name).to(value.dtype)
    assert value.shape == expected.shape
    error = (value.detach() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"


def assert_golden_gradients(network, loss, phase):
    """Gradient norms of every parameter, and the whole gradient where it is stored; a NaN norm says there is none."""
    named = dict(network.named_parameters())
    assert sorted(named) == sorted(GOLDEN[f"grad/{phase}/names"])
    grads = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
    for name, norm in zip(GOLDEN[f"grad/{phase}/names"], GOLDEN[f"grad/{phase}/norms"], strict=True):
        grad = grads[name]
        if grad is None:
            assert math.isnan(norm), name
        else:
            assert grad.norm().item() == pytest.approx(norm, rel=TOLERANCE), name
    whole = [key for key in GOLDEN if key.startswith(f"grad/{phase}/full/")]
    assert whole
    for key in whole:
        assert_golden(grads[key.split("full/")[1]].reshape(golden(key).shape), key)


def test_golden_mapping_and_truncation(ops_path, G):
    w = G.mapping(golden("in/z"))
    assert_golden(w, "out/w")
    assert_golden(truncate(w, G.mapping.w_avg, 0.7), "out/w_psi07")
    ws = w[:, None].expand(-1, G.num_ws, -1)
    assert_golden(truncate(ws, G.mapping.w_avg, 0.7, 4), "out/ws_psi07_cutoff4")


@torch.no_grad()
def test_golden_images(ops_path, G):
    z = golden("in/z")
    assert_golden(G(z, truncation_psi=0.7), "out/img_const_psi07")
    assert_golden(G(z[:1], truncation_psi=0.7), "out/img_const_psi07_batch1")
    assert_golden(G(z[:4]), "out/img_const_psi1")
    assert_golden(G(z[:4], noise="none"), "out/img_none_psi1")


@torch.no_grad()
def test_golden_logits(ops_path, G, D):
    real = golden("in/real")
    assert_golden(D(real), "out/logits_real")
    assert_golden(D(real[:4]), "out/logits_real_first4")
    assert_golden(discriminator(mbstd_group=2)(real[:2]), "out/logits_real_first2")
    assert_golden(D(G(golden("in/z"), truncation_psi=0.7)), "out/logits_fake")


def test_golden_generator_phase(ops_path, G, D):
    loss = losses.logistic_generator(D(G(golden("in/z")))).mean()
    assert_golden(loss, "loss/Gmain")
    assert_golden_gradients(G, loss, "Gmain")


def test_golden_path_length_phase(ops_path, G):
    """The published phase moves its mean first, and lets the gradient through it; its interval is not in the values."""
    ws = G.mapping(golden("in/z")[:4])[:, None].repeat(1, G.num_ws, 1)
    lengths = losses.path_lengths(G.synthesis(ws), ws, golden("in/pl_noise_raw"))
    assert_golden(lengths, "pl/pl_lengths")
    mean = lengths.mean() * 0.01
    assert_golden(mean, "pl/pl_mean")
    penalty = losses.path_length_penalty(lengths, mean)
    assert_golden(penalty, "pl/pl_penalty")
    assert_golden_gradients(G, (penalty * 2).mean(), "Greg")


def test_golden_discriminator_phase(ops_path, G, D):
    with torch.no_grad():
        fakes = G(golden("in/z"), truncation_psi=0.7)
    fake, real = D(fakes), D(golden("in/real"))
    loss = (losses.logistic_discriminator_fake(fake) + losses.logistic_discriminator_real(real)).mean()
    assert_golden(loss, "loss/Dmain")
    assert_golden_gradients(D, loss, "Dmain")


def test_golden_r1_phase(ops_path):
    """In float64: in fp32, rounding alone moves the smallest bias gradients by 3e-4."""
    D = discriminator().double()
    real = golden("in/real").double().requires_grad_()
    logits = D(real)
    assert logits.dtype == torch.float64  # all the way
    penalty = losses.r1_penalty(real, logits)
    assert_golden(penalty, "r1/penalty")
    assert_golden_gradients(D, (penalty * 0.5).mean(), "Dreg")


@torch.no_grad()
def test_a_list_of_the_stored_maps_is_const_noise(G):
    z = golden("in/z")[:2]
    layers = [m for m in G.synthesis.modules() if hasattr(m, "noise_const")]
    assert [tuple(m.noise_const.shape) for m in layers] == G.synthesis.sizes
    maps = [m.noise_const.expand(2, 1, -1, -1) for m in layers]
    torch.testing.assert_close(G(z, noise=maps), G(z), rtol=1e-6, atol=1e-6)
    other = [m + 1 for m in maps]
    assert not torch.allclose(G(z, noise=other), G(z), atol=1e-3)


@torch.no_grad()
def test_truncation_psi_0_gives_the_average_image(G):
    images = G(golden("in/z")[:3], truncation_psi=0.0)
    average = G.synthesis(G.mapping.w_avg.expand(1, G.num_ws, -1))
    torch.testing.assert_close(images, average.expand(3, -1, -1, -1), rtol=1e-4, atol=1e-5)


def test_truncation_leaves_its_input_and_psi_1_alone():
    ws = torch.randn(2, 6, 4)
    before = ws.clone()
    assert truncate(ws, torch.zeros(4), 1.0) is ws
    cut = truncate(ws, torch.zeros(4), 0.5, 2)
    assert torch.equal(ws, before)
    torch.testing.assert_close(cut[:, :2], ws[:, :2] / 2)
    assert torch.equal(cut[:, 2:], ws[:, 2:])


# Tiny networks for the rest.

SIZES: dict[str, Any] = {"channel_base": 128, "channel_max": 8, "mapping_layers": 2}


def tiny(width=16, height=16, img_channels=3, c_dim=0, low_precision=None):
    torch.manual_seed(0)
    settings = {**SIZES, "low_precision": low_precision}
    G = Generator(width, height, img_channels, c_dim, z_dim=8, w_dim=8, **settings)
    D = Discriminator(width, height, img_channels, c_dim, mbstd_group=2, **settings)
    return G, D


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (32, 32, (4, 4, 4)),
        (1024, 1024, (4, 4, 9)),
        (768, 512, (4, 6, 8)),
        (512, 768, (6, 4, 8)),
        (1280, 768, (6, 10, 8)),
        (48, 32, (4, 6, 4)),
        (8, 8, (4, 4, 2)),
        (10, 14, (7, 5, 2)),
    ],
)
def test_start_size(width, height, expected):
    assert start_size(width, height) == expected


@pytest.mark.parametrize(("width", "height"), [(4, 4), (33, 32), (100, 101), (1024, 16), (0, 0), (6, 6), (1022, 1022)])
def test_sizes_that_do_not_work_name_the_remedy(width, height):
    with pytest.raises(ValueError, match=f"{width}x{height} px: .* prepare the data set at such a size"):
        start_size(width, height)


@torch.no_grad()
@pytest.mark.parametrize(("width", "height"), [(48, 32), (16, 40)])
def test_rectangular_images(width, height):
    G, D = tiny(width, height)
    images = G(torch.randn(2, 8))
    assert images.shape == (2, 3, height, width)
    assert G.synthesis.get_parameter("b4.const").shape[1:] == start_size(width, height)[:2]
    assert D(images).shape == (2, 1)
    assert G.synthesis.sizes[-1] == (height, width)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_channels(channels):
    G, D = tiny(img_channels=channels)
    images = G(torch.randn(2, 8))
    assert images.shape == (2, channels, 16, 16)
    assert D(images).shape == (2, 1)


@pytest.mark.parametrize(("side", "num_ws"), [(8, 4), (32, 8), (64, 10)])
def test_num_ws_is_two_a_level(side, num_ws):
    synthesis = Synthesis(side, side, 3, 8, 64, 8)
    assert synthesis.num_ws == num_ws
    assert len(synthesis.sizes) == num_ws - 1  # noise maps: one for each convolution, none for ToRGB


def test_every_w_is_used():
    G, _ = tiny()
    ws = torch.randn(1, G.num_ws, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(G.synthesis(ws).square().sum(), ws)
    assert (grad.abs().sum(dim=2) > 0).all()


@torch.no_grad()
def test_labels_change_images_and_logits():
    G, D = tiny(c_dim=3)
    one, two = torch.eye(3)[[0, 0]], torch.eye(3)[[1, 1]]
    z = torch.randn(2, 8)
    images = G(z, one)
    assert torch.equal(images, G(z, one))
    assert not torch.allclose(images, G(z, two), atol=1e-3)
    assert not torch.allclose(D(images, one), D(images, two), atol=1e-4)


@torch.no_grad()
def test_projection_on_the_mapped_label():
    _, D = tiny(c_dim=3)
    features = []
    handle = D.b4.register_forward_hook(lambda _module, _inputs, output: features.append(output))
    labels = torch.eye(3)[[0, 2]]
    logits = D(torch.randn(2, 3, 16, 16), labels)
    handle.remove()
    assert features[0].shape == (2, D.cmap_dim)
    expected = (features[0] * D.mapping(None, labels)).sum(dim=1, keepdim=True) / math.sqrt(8)
    torch.testing.assert_close(logits, expected)


def output_dtypes(network, names):
    found = {}
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: found.__setitem__(name, output.dtype)
        )
    return found


@torch.no_grad()
def test_bf16_is_close_to_fp32_and_its_results_are_fp32(ops_path):
    G, D = tiny()
    low_G, low_D = tiny(low_precision=torch.bfloat16)
    g_dtypes = output_dtypes(low_G.synthesis, ["b4.conv1", "b8.conv1", "b16.conv1", "b16.torgb"])
    d_dtypes = output_dtypes(low_D, ["b16.conv1", "b8.conv1", "b4.conv"])
    z, images = torch.randn(4, 8), torch.randn(4, 3, 16, 16)
    for low, full in ((low_G(z), G(z)), (low_D(images), D(images))):
        assert low.dtype == torch.float32
        assert not torch.equal(low, full)
        assert (low - full).square().mean().sqrt() < 0.04 * full.square().mean().sqrt()
    # The start and the head, and all that becomes image or logit, stay fp32.
    half, fp32 = torch.bfloat16, torch.float32
    assert g_dtypes == {"b4.conv1": fp32, "b8.conv1": half, "b16.conv1": half, "b16.torgb": fp32}
    assert d_dtypes == {"b16.conv1": half, "b8.conv1": half, "b4.conv": fp32}


@pytest.mark.parametrize(("side", "fp32"), [(8, [4]), (64, [4]), (128, [4, 8]), (256, [4, 8, 16])])
def test_low_precision_is_that_of_the_top_four_levels(side, fp32):
    synthesis = Synthesis(side, side, 3, 4, 4, 1, low_precision=torch.bfloat16)
    assert [res for res, low in zip(synthesis.resolutions, synthesis.low, strict=True) if low is None] == fp32
    D = Discriminator(side, side, 3, 0, 4, 1, low_precision=torch.bfloat16)
    assert [res for res, low in zip(D.resolutions, D.low, strict=True) if low is None] == fp32[:0:-1]


@torch.no_grad()
def test_low_precision_activations_are_clamped(ops_path):
    peaks = {}
    for low_precision in (None, torch.bfloat16):
        G, _ = tiny(low_precision=low_precision)
        layer = G.synthesis.get_submodule("b16.conv1")
        layer.get_parameter("bias").fill_(1e6)
        outputs = []
        layer.register_forward_hook(lambda _module, _inputs, output, outputs=outputs: outputs.append(output))
        G(torch.randn(1, 8))
        peaks[low_precision] = outputs[0].max().item()
    assert peaks[torch.bfloat16] == CLAMP
    assert peaks[None] > 1e6


@torch.no_grad()
def test_without_noise_the_generator_has_neither_maps_nor_strengths():
    torch.manual_seed(0)
    G = Generator(16, 16, 3, 0, z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8, use_noise=False)
    assert G.synthesis.sizes == []
    assert not any("noise" in name for name in G.state_dict())
    assert G.num_ws == 6
    z = torch.randn(2, 8)
    images = G(z)
    assert images.shape == (2, 3, 16, 16)
    for noise in ("none", []):
        assert torch.equal(G(z, noise=noise), images)
    noisy, _ = tiny()
    noisy.load_state_dict(G.state_dict(), strict=False)
    torch.testing.assert_close(noisy(z, noise="none"), images)


def test_initial_values_that_a_loaded_state_hides():
    G, _ = tiny()
    for name, value in G.state_dict().items():
        if name.endswith("affine.bias"):
            assert torch.equal(value, torch.ones_like(value)), name
        elif name.endswith(("bias", "noise_strength", "w_avg")):
            assert torch.equal(value, torch.zeros_like(value)), name
    assert G.synthesis.get_parameter("b4.const").std().item() == pytest.approx(1, abs=0.2)


def test_state_dicts_hold_no_filters_and_no_scalars():
    for network in tiny(c_dim=2):
        for name, value in network.state_dict().items():
            assert "filter" not in name
            assert name.split(".")[-1] != "f"
            assert value.ndim > 0, name  # DeepSpeed refuses 0-dim parameters


# Growing. What it has in common with other networks' is in test_growing.py.


def test_a_discriminator_that_does_not_grow_has_the_published_state():
    """Names and shapes are as they were; growing adds a `fromrgb` to every lower level, and nothing else."""
    settings: dict[str, Any] = {"channel_base": 64, "channel_max": 8, "mapping_layers": 1}
    state = {name: tuple(x.shape) for name, x in Discriminator(16, 16, c_dim=2, **settings).state_dict().items()}
    assert state == {
        "b16.fromrgb.weight": (4, 3, 1, 1), "b16.fromrgb.bias": (4,),
        "b16.conv0.weight": (4, 4, 3, 3), "b16.conv0.bias": (4,),
        "b16.conv1.weight": (8, 4, 3, 3), "b16.conv1.bias": (8,), "b16.skip.weight": (8, 4, 1, 1),
        "b8.conv0.weight": (8, 8, 3, 3), "b8.conv0.bias": (8,),
        "b8.conv1.weight": (8, 8, 3, 3), "b8.conv1.bias": (8,), "b8.skip.weight": (8, 8, 1, 1),
        "mapping.w_avg": (8,), "mapping.embed.weight": (8, 2), "mapping.embed.bias": (8,),
        "mapping.fc0.weight": (8, 8), "mapping.fc0.bias": (8,),
        "b4.conv.weight": (8, 9, 3, 3), "b4.conv.bias": (8,), "b4.fc.weight": (8, 128), "b4.fc.bias": (8,),
        "b4.out.weight": (8, 8), "b4.out.bias": (8,),
    }  # fmt: skip
    grown = Discriminator(16, 16, c_dim=2, grows=True, **settings).state_dict()
    assert {name: tuple(x.shape) for name, x in grown.items() if name not in state} == {
        "b8.fromrgb.weight": (8, 3, 1, 1), "b8.fromrgb.bias": (8,),
        "b4.fromrgb.weight": (8, 3, 1, 1), "b4.fromrgb.bias": (8,),
    }  # fmt: skip
    assert state.keys() <= grown.keys()


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("level", [1, 2])
def test_the_newest_part_of_the_image_is_added_with_its_weight(ops_path, level, alpha):
    """Image = the parts of all levels, each up-sampled as often as there are levels above it."""
    G, _ = tiny()
    G.grow_to(level, alpha)
    parts = []
    for i in range(level + 1):
        G.synthesis.block(i).torgb.register_forward_hook(lambda _module, _inputs, y: parts.append(y))
    image = G(torch.randn(2, 8))
    assert [x.shape[2] for x in parts] == [4 * 2**i for i in range(level + 1)]
    parts[-1] = parts[-1] * alpha
    total = parts[0]
    for part in parts[1:]:
        total = upsample2d(total, G.synthesis.f) + part
    torch.testing.assert_close(image, total)
    torch.testing.assert_close(G.upsample_image(image), upsample2d(image, G.synthesis.f))


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_features_of_the_newest_level_are_blended_with_those_of_the_image_below(ops_path, alpha):
    D = Discriminator(16, 16, mbstd_group=2, grows=True, **SIZES)
    D.grow_to(2, alpha)
    images = torch.randn(2, 3, 16, 16)
    top, middle, head = (D.get_submodule(name) for name in ("b16", "b8", "b4"))
    x = top(top.get_submodule("fromrgb")(images), D.f, None)
    x = alpha * x + (1 - alpha) * middle.get_submodule("fromrgb")(torch.nn.functional.avg_pool2d(images, 2))
    torch.testing.assert_close(D(images), head(middle(x, D.f, None)))
    D.grow_to(0)
    torch.testing.assert_close(D(images[:, :, :4, :4]), head(head.get_submodule("fromrgb")(images[:, :, :4, :4])))
