"""training/networks/growing.py: what all networks that grow have in common, tried on each of them."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from styleloom.training import losses
from styleloom.training.networks import msg, progressive, stylegan1, stylegan2
from styleloom.training.networks.growing import (
    Growing,
    downsample_box,
    fade_reals,
    level_of,
    pyramid,
    start_size,
    truncate,
    upsample_nearest,
)

SIZES: dict[str, Any] = {"channel_base": 64, "channel_max": 8}
GROWING = ["progressive", "stylegan1", "stylegan1-latent", "stylegan2"]
KINDS = [*GROWING, "msg"]
LEVELS = 3  # of 16 px
STAGES = [(0, 1.0), *((level, alpha) for level in range(1, LEVELS) for alpha in (0.0, 0.3, 1.0))]


def networks(
    kind, width=16, height=16, c_dim=0, low_precision=None, recompute=False, img_channels=3
) -> tuple[Any, Any]:
    """(G, D) of 8 z, whose parameters all have a part in the result: those that begin with 0 are random, too."""
    torch.manual_seed(0)
    both = {"low_precision": low_precision, "recompute": recompute, **SIZES}
    size, latents, group = (width, height, img_channels, c_dim), {"z_dim": 8, "w_dim": 6, "mapping_layers": 2}, 2
    if kind == "progressive":
        G = progressive.Generator(*size, z_dim=8, **both)
        D = progressive.Discriminator(*size, mbstd_group=group, **both)
    elif kind.startswith("stylegan1"):
        G = stylegan1.Generator(*size, **latents, latent_input=kind.endswith("latent"), **both)
        D = stylegan1.Discriminator(*size, mbstd_group=group, **both)
    elif kind == "stylegan2":
        G = stylegan2.Generator(*size, **latents, **both)
        D = stylegan2.Discriminator(*size, mapping_layers=2, mbstd_group=group, grows=True, **both)
    else:
        G = msg.Generator(*size, **latents, **both)
        D = msg.Discriminator(*size, mapping_layers=2, mbstd_group=group, **both)
    for network in (G, D):
        for p in network.parameters():
            p.data += 0.3 * torch.randn_like(p) * (1 if p.count_nonzero() else 0.5)
    return G, D


def inputs(G, D, c_dim=0, n=2):
    """(z, images of the present size, labels) in the networks' dtype."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(D.parameters()).dtype
    z = torch.randn(n, 8, generator=generator).to(dtype)
    images = torch.randn(n, 3, *G.size, generator=generator).to(dtype)
    labels = torch.eye(c_dim)[torch.arange(n) % c_dim].to(dtype) if c_dim else None
    return z, images, labels


def scores(kind, D, images, labels):
    """What D says of images, in the form that it takes them."""
    if kind == "progressive":
        return D(images)
    return D(pyramid(images, D.levels) if kind == "msg" else images, labels)


# Functions.


def test_upsample_nearest_and_downsample_box():
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    assert torch.equal(upsample_nearest(x), F.interpolate(x, scale_factor=2, mode="nearest"))
    assert upsample_nearest(torch.tensor([[[[1, 2]]]])).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]
    assert torch.equal(downsample_box(upsample_nearest(x)), x)
    assert downsample_box(torch.tensor([[[[1.0, 2.0, 0.0, 0.0], [3.0, 6.0, 0.0, 4.0]]]])).tolist() == [[[[3.0, 1.0]]]]


def test_reals_fade_in_as_generated_images_do():
    images = torch.randn(2, 3, 4, 8)
    assert fade_reals(images, 1.0, upsample_nearest) is images
    coarse = upsample_nearest(F.avg_pool2d(images, 2))
    assert torch.equal(fade_reals(images, 0.0, upsample_nearest), coarse)
    torch.testing.assert_close(fade_reals(images, 0.25, upsample_nearest), 0.75 * coarse + 0.25 * images)


def test_pyramid_begins_with_the_lowest_and_ends_with_the_images():
    images = torch.randn(2, 3, 16, 24)
    sizes = pyramid(images, 3)
    assert [tuple(x.shape[2:]) for x in sizes] == [(4, 6), (8, 12), (16, 24)]
    assert sizes[-1] is images
    torch.testing.assert_close(sizes[0], F.avg_pool2d(images, 4))
    assert pyramid(images, 1) == [images]


# Growing.


@pytest.mark.parametrize("kind", KINDS)
def test_networks_begin_whole(kind):
    for network in networks(kind):
        assert isinstance(network, Growing)
        assert (network.levels, network.level, network.alpha) == (LEVELS, LEVELS - 1, 1.0)


@pytest.mark.parametrize("kind", GROWING)
@torch.no_grad()
def test_sizes_follow_the_level(kind):
    G, D = networks(kind, width=24, height=16)
    for level, alpha in STAGES:
        G.grow_to(level, alpha)
        D.grow_to(level, alpha)
        size = (4 * 2**level, 6 * 2**level)
        assert G.size == D.size == G.synthesis.size == size
        assert (G.level, G.alpha) == (D.level, D.alpha) == (level, alpha)
        assert G.num_ws == G.synthesis.num_ws == (1 if kind == "progressive" else 2 * (level + 1))
        maps = {"progressive": 0, "stylegan2": 2 * level + 1}.get(kind, 2 * level + 2)
        assert len(G.synthesis.sizes) == maps
        assert set(G.synthesis.sizes) == ({(4 * 2**i, 6 * 2**i) for i in range(level + 1)} if maps else set())
        z, images, _ = inputs(G, D)
        assert G(z).shape == images.shape == (2, 3, *size)
        assert D(images).shape == (2, 1)
        assert G.upsample_image(images).shape == (2, 3, 2 * size[0], 2 * size[1])


@pytest.mark.parametrize("kind", GROWING)
@pytest.mark.parametrize(
    ("level", "alpha", "match"),
    [
        (3, 1.0, "level 3: .* works at level 0 to 2"),
        (-1, 1.0, "level -1"),
        (1, -0.1, "alpha -0.1"),
        (1, 1.1, "alpha 1.1"),
        (0, 0.5, "level 0 has none below"),
    ],
)
def test_growing_to_what_is_not_there_changes_nothing(kind, level, alpha, match):
    for network in networks(kind):
        network.grow_to(1, 0.5)
        with pytest.raises(ValueError, match=match):
            network.grow_to(level, alpha)
        assert (network.level, network.alpha) == (1, 0.5)


def test_networks_that_do_not_grow_say_so():
    for network in (*networks("msg"), stylegan2.Discriminator(16, 16, mapping_layers=1, **SIZES)):
        network.grow_to(2)
        for level, alpha in ((1, 1.0), (0, 1.0), (2, 0.5)):
            with pytest.raises(ValueError, match=f"level {level}"):
                network.grow_to(level, alpha)


@pytest.mark.parametrize("kind", GROWING)
@torch.no_grad()
def test_a_copy_is_as_far_grown_and_the_state_dict_does_not_say(kind):
    G, D = networks(kind)
    names = [list(network.state_dict()) for network in (G, D)]
    for network in (G, D):
        network.grow_to(1, 0.3)
    z, images, _ = inputs(G, D)
    other_G, other_D = copy.deepcopy((G, D))
    assert torch.equal(other_G(z), G(z))
    assert torch.equal(other_D(images), D(images))
    G.grow_to(2)
    assert (other_G.level, other_G.synthesis.level, other_G.alpha) == (1, 1, 0.3)
    assert [list(network.state_dict()) for network in (G, D)] == names


@pytest.mark.parametrize("c_dim", [0, 2])
@pytest.mark.parametrize("kind", GROWING)
def test_active_parameters_are_those_that_autograd_reaches(kind, c_dim):
    G, D = (network.double() for network in networks(kind, c_dim=c_dim))
    for level, alpha in STAGES:
        for network in (G, D):
            network.grow_to(level, alpha)
        z, images, labels = inputs(G, D, c_dim)
        for network, result in ((G, G(z, labels)), (D, scores(kind, D, images, labels))):
            names, parameters = zip(*network.named_parameters(), strict=True)
            gradients = torch.autograd.grad(result.square().sum(), parameters, allow_unused=True)
            reached = [name for name, g in zip(names, gradients, strict=True) if g is not None]
            active = network.active()
            assert [name for name, _ in active] == reached
            assert all(p is network.get_parameter(name) for name, p in active)
            if alpha > 0:  # and they do influence it
                assert [n for n, g in zip(names, gradients, strict=True) if g is not None and not g.any()] == []


@pytest.mark.parametrize("c_dim", [0, 2])
def test_all_of_msgs_parameters_are_active(c_dim):
    G, D = networks("msg", c_dim=c_dim)
    z, images, labels = inputs(G, D, c_dim)
    drawn = G.synthesis.pyramid(G.mapping(z, labels)[:, None].expand(-1, G.num_ws, -1))
    results = torch.stack([x.sum() for x in drawn]).sum()
    for network, result in ((G, results), (D, scores("msg", D, images, labels).sum())):
        assert [name for name, _ in network.active()] == [name for name, _ in network.named_parameters()]
        gradients = torch.autograd.grad(result, [p for _, p in network.active()], allow_unused=True)
        assert None not in gradients


@pytest.mark.parametrize("low_precision", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", GROWING)
@torch.no_grad()
def test_a_level_begins_as_the_one_below_to_the_bit(ops_path, kind, low_precision):
    G, D = networks(kind, low_precision=low_precision)
    for level in range(1, LEVELS):
        G.grow_to(level, 0.0)
        D.grow_to(level, 0.0)
        z, images, _ = inputs(G, D)
        drawn, seen = G(z), D(images)
        G.grow_to(level - 1)
        D.grow_to(level - 1)
        assert torch.equal(drawn, G.upsample_image(G(z)))
        assert torch.equal(seen, D(downsample_box(images)))


@pytest.mark.parametrize("kind", GROWING)
@torch.no_grad()
def test_a_level_that_has_faded_in_is_that_of_a_network_which_ends_there(kind):
    """With the same weights; and at the top, that of the network which was never grown."""
    G, D = networks(kind, c_dim=2)
    small_G, small_D = networks(kind, 8, 8, c_dim=2)
    for small, large in ((small_G, G), (small_D, D)):
        state = large.state_dict()
        small.load_state_dict({name: state[name] for name in small.state_dict()})
    whole_G, whole_D = copy.deepcopy((G, D))
    for level, other_G, other_D in ((1, small_G, small_D), (2, whole_G, whole_D)):
        G.grow_to(0)
        D.grow_to(0)
        G.grow_to(level)
        D.grow_to(level)
        z, images, labels = inputs(G, D, 2)
        assert torch.equal(G(z, labels), other_G(z, labels))
        assert torch.equal(scores(kind, D, images, labels), scores(kind, other_D, images, labels))


@pytest.mark.parametrize("kind", GROWING)
@torch.no_grad()
def test_images_fade_linearly(kind):
    G, D = (network.double() for network in networks(kind))
    for level in range(1, LEVELS):
        images = {}
        for alpha in (0.0, 0.2, 0.5, 0.9, 1.0):
            G.grow_to(level, alpha)
            images[alpha] = G(inputs(G, D)[0])
        assert not torch.allclose(images[0.0], images[1.0], rtol=0.1, atol=0.1)
        for alpha in (0.2, 0.5, 0.9):
            expected = (1 - alpha) * images[0.0] + alpha * images[1.0]
            torch.testing.assert_close(images[alpha], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", GROWING)
@torch.no_grad()
def test_features_fade_linearly(kind):
    """Those of the level below; what follows is not linear."""
    _, D = (network.double() for network in networks(kind))
    D.grow_to(1)  # then what fades is what goes into the head
    G, _ = networks(kind)
    G.grow_to(1)
    _, images, _ = inputs(G, D)
    features = {}
    for alpha in (0.0, 0.2, 0.5, 0.9, 1.0):
        D.grow_to(1, alpha)
        features[alpha] = D.features(images)
    torch.testing.assert_close(features[0.0], D.b4.fromrgb(F.avg_pool2d(images, 2)))
    for alpha in (0.2, 0.5, 0.9):
        expected = (1 - alpha) * features[0.0] + alpha * features[1.0]
        torch.testing.assert_close(features[alpha], expected, rtol=1e-12, atol=1e-12)


# Levels that are frozen.


@pytest.mark.parametrize(
    ("name", "level"),
    [("b4.conv.weight", 0), ("synthesis.b8.torgb.bias", 1), ("b1024.fromrgb.weight", 8), ("mapping.fc0.weight", None)],
)
def test_the_level_in_a_name(name, level):
    assert level_of(name) == level


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_levels_get_no_gradients_and_are_not_active(kind):
    _, D = networks(kind, c_dim=2)
    assert D.frozen == 0
    every, active = [name for name, _ in D.named_parameters()], [name for name, _ in D.active()]

    def learning():
        return [name for name, p in D.named_parameters() if p.requires_grad]

    D.frozen = 1
    assert learning() == [name for name in every if not name.startswith("b16.")]
    D.frozen = 2
    rest = [name for name in every if not name.startswith(("b16.", "b8."))]
    assert learning() == rest == [name for name in every if not D.is_frozen(name)]
    for on in (True, False, True):
        assert D.requires_grad_(on) is D
        assert learning() == (rest if on else [])
    assert [name for name, _ in D.active()] == [name for name in active if name in rest]
    assert copy.deepcopy(D).requires_grad_().frozen == 2
    assert list(D.state_dict()) == list(networks(kind, c_dim=2)[1].state_dict())


@pytest.mark.parametrize("kind", GROWING)
def test_frozen_levels_are_counted_from_the_top_of_the_whole_network(kind):
    _, D = networks(kind)
    D.frozen = 1
    for level in (0, 1):
        D.grow_to(level)
        assert all(p.requires_grad for _, p in D.active())
        _, other = networks(kind)
        other.grow_to(level)
        assert [name for name, _ in D.active()] == [name for name, _ in other.active()]
    D.grow_to(2, 0.5)
    assert {name for name, _ in D.active() if name.startswith("b16.")} == set()
    assert ("b8.fromrgb.weight" in dict(D.active())) == (kind != "stylegan2" or D.grows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [-1, 3, 9])
def test_as_many_levels_as_there_are_cannot_be_frozen(kind, count):
    _, D = networks(kind)
    D.frozen = 2
    with pytest.raises(ValueError, match=f"cannot freeze {count} levels: this Discriminator has 3, .* is at most 2"):
        D.frozen = count
    assert D.frozen == 2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_levels_stay_and_others_learn(ops_path, kind, recompute):
    """Over steps with R1, whose second derivative goes through the frozen levels; others learn as without them."""
    _, D = networks(kind, recompute=recompute)
    _, whole = networks(kind, recompute=recompute)
    D.frozen = 2
    before = copy.deepcopy(D.state_dict())
    idle = {name for name, _ in D.named_parameters()} - {name for name, _ in whole.active()}  # layers for other sizes
    found = []
    for network in (D, whole):
        network.requires_grad_(True)
        optimizer = torch.optim.Adam([p for _, p in network.active()], lr=0.01, betas=(0.0, 0.99))
        for seed in range(3):
            optimizer.zero_grad()
            images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            logits = scores(kind, network, images, None)
            loss = (F.softplus(-logits).flatten() + losses.r1_penalty(images, logits)).sum()
            loss.backward(inputs=[p for _, p in network.active()])
            if seed == 0:
                found.append({name: p.grad for name, p in network.active()})
            optimizer.step()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    for name, p in D.named_parameters():
        assert torch.equal(p, before[name]) == (name.startswith(("b16.", "b8.")) or name in idle), name


# What every kind has to do, grown or not.


def gradients(network, loss):
    """By name."""
    names, parameters = zip(*network.active(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize(("kind", "alpha"), [*((kind, 1.0) for kind in KINDS), *((kind, 0.4) for kind in GROWING)])
def test_recomputing_activations_changes_no_bit(kind, alpha):
    found: list[list[Any]] = []
    for recompute in (False, True):
        G, D = networks(kind, c_dim=2, low_precision=torch.bfloat16, recompute=recompute)
        G.grow_to(2, alpha)
        D.grow_to(2, alpha)
        z, images, labels = inputs(G, D, 2)
        fakes, score = G(z, labels), scores(kind, D, images, labels)
        found.append([fakes, score, *gradients(G, fakes.square().sum()).values(), *gradients(D, score.sum()).values()])
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_close_to_fp32_with_results_in_fp32(ops_path, kind, dtype):
    full_G, full_D = networks(kind, c_dim=2)
    G, D = networks(kind, c_dim=2, low_precision=dtype)
    for alpha in (1.0,) if kind == "msg" else (1.0, 0.4):
        for network in (G, D, full_G, full_D):
            network.grow_to(2, alpha)
        z, images, labels = inputs(G, D, 2, n=4)
        pairs = (
            (G(z, labels), full_G(z, labels)),
            (scores(kind, D, images, labels), scores(kind, full_D, images, labels)),
        )
        for network, (low, full) in zip((G, D), pairs, strict=True):
            assert low.dtype == torch.float32
            assert not torch.equal(low, full)
            error = (low - full).square().mean().sqrt() / full.square().mean().sqrt()
            assert error < {torch.bfloat16: 0.05, torch.float16: 0.006}[dtype]
            for name, g in gradients(network, low.square().sum()).items():
                assert g is None or g.isfinite().all(), name


@pytest.mark.parametrize("kind", GROWING)
@torch.no_grad()
def test_low_precision_is_that_of_the_whole_networks_top_four_levels(kind):
    """However far it is grown: at 4 and 8 px of 128, all is fp32."""
    full, low = networks(kind, 128, 128), networks(kind, 128, 128, low_precision=torch.bfloat16)
    for level, same in ((0, True), (1, True), (2, False)):
        for network in (*full, *low):
            network.grow_to(level)
        z, images, _ = inputs(*full)
        assert torch.equal(low[0](z), full[0](z)) == same
        assert torch.equal(low[1](images), full[1](images)) == same


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fp16_does_not_overflow(kind):
    """Activations a thousand times as large are clamped, and squared in fp32."""
    G, D = networks(kind, low_precision=torch.float16)
    for network in (G, D):
        for name, p in network.named_parameters():
            if "conv" in name and name.endswith((".bias", ".weight")) and "affine" not in name:
                p *= 1e3
    z, images, _ = inputs(G, D)
    assert G(z).isfinite().all()
    assert scores(kind, D, images, None).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_labels_count(kind):
    G, D = networks(kind, c_dim=3)
    z, images, _ = inputs(G, D)
    one, two = torch.eye(3)[[0, 0]], torch.eye(3)[[1, 1]]
    assert torch.equal(G(z, one), G(z, one))
    assert not torch.allclose(G(z, one), G(z, two), atol=1e-3)
    if kind == "progressive":
        assert D(images).shape == (2, 4)
    else:
        assert scores(kind, D, images, one).shape == (2, 1)
        assert not torch.allclose(scores(kind, D, images, one), scores(kind, D, images, two), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "height", "img_channels"), [(24, 16, 1), (16, 40, 4)])
@torch.no_grad()
def test_rectangular_images_and_their_channels(kind, width, height, img_channels):
    G, D = networks(kind, width, height, img_channels=img_channels)
    images = G(torch.randn(2, 8))
    assert images.shape == (2, img_channels, height, width)
    assert G.size == (height, width)
    assert G.start == start_size(width, height)[:2]
    assert scores(kind, D, images, None).shape == (2, 1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "progressive"])
@torch.no_grad()
def test_noise_is_constant_given_or_none(kind):
    G, _ = networks(kind)
    for level in (1, 2) if kind != "msg" else (2,):
        G.grow_to(level)
        z = torch.randn(2, 8)
        layers = [m for m in G.synthesis.modules() if hasattr(m, "noise_const")][: len(G.synthesis.sizes)]
        assert [tuple(m.noise_const.shape) for m in layers] == G.synthesis.sizes
        maps = [m.get_buffer("noise_const").expand(2, 1, -1, -1) for m in layers]
        images = G(z)
        torch.testing.assert_close(G(z, noise=maps), images, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(G(z, noise=[0 * m for m in maps]), G(z, noise="none"), rtol=1e-5, atol=1e-5)
        for i in range(len(maps)):  # each map counts, and only for its own sample
            other = [m.clone() for m in maps]
            other[i][1] += torch.randn_like(other[i][1])
            changed = (G(z, noise=other) - images).abs().amax(dim=[1, 2, 3])
            assert changed[0] < 1e-4 < 1e-3 < changed[1], (i, changed)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "progressive"])
@torch.no_grad()
def test_every_w_counts(kind):
    G, _ = networks(kind)
    for level in (0, 2) if kind != "msg" else (2,):
        G.grow_to(level)
        ws = torch.randn(1, G.num_ws, 6)
        images = G.synthesis(ws)
        for i in range(G.num_ws):
            other = ws.clone()
            other[:, i] += 1
            assert not torch.allclose(G.synthesis(other), images, atol=1e-3), i


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "progressive"])
@torch.no_grad()
def test_truncation_moves_the_layers_it_is_to_move(kind):
    G, _ = networks(kind, 64, 64)
    assert G.num_ws == 10
    assert G.has_w
    G.mapping.update_w_avg(torch.full([6], 0.5), 0.9)
    torch.testing.assert_close(G.mapping.w_avg, torch.full([6], 0.05))
    z = torch.randn(2, 8)
    ws = G.mapping(z)[:, None].expand(-1, 10, -1)
    assert torch.equal(G(z), G.synthesis(ws))
    usual = G.truncation_cutoff
    assert usual == (8 if kind.startswith("stylegan1") else None)
    for given, cutoff in ((None, usual), (3, 3), (10, 10)):
        expected = G.synthesis(truncate(ws, G.mapping.w_avg, 0.5, cutoff))
        assert torch.equal(G(z, truncation_psi=0.5, truncation_cutoff=given), expected)
        assert not torch.allclose(expected, G(z), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_hold_no_filters_and_no_scalars(kind):
    for network in networks(kind, c_dim=2):
        for name, value in network.state_dict().items():
            assert name.split(".")[-1] != "f"
            assert value.ndim > 0, name  # DeepSpeed refuses 0-dim parameters


def smooth_images(n, side):
    """Of mean square 1, with little detail, as photographs have: down-sampling takes next to nothing away."""
    x = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(x, size=(side, side), mode="bicubic")
    return x / x.square().mean().sqrt()


def powers(kind, seed):
    """({G's layer: mean square of its result}, {D's: ...}, {D's: the same relative to what went in}, that of w)."""
    torch.manual_seed(seed)
    module: Any = {"progressive": progressive, "stylegan2": stylegan2, "msg": msg}.get(kind, stylegan1)
    style = {} if kind == "progressive" else {"w_dim": 64, "mapping_layers": 2}
    style |= {"latent_input": True} if kind == "stylegan1-latent" else {}
    G = module.Generator(32, 32, z_dim=64, channel_base=4096, channel_max=64, **style)
    D = module.Discriminator(32, 32, channel_base=4096, channel_max=64)
    drawn: dict[str, float] = {}
    seen: dict[str, float] = {}
    kept: dict[str, float] = {}

    def power(x):
        return x.square().mean().item()

    def note(found, name, _module, inputs, y):
        found[name] = power(y)
        if found is seen:
            kept[name] = power(y) / power(inputs[0])

    # The sum of a residual block counts, not the branches.
    halves = ("conv0",) if module in (stylegan2, msg) else ("conv0", "conv1")
    for network, found, which in (
        (G, drawn, ("epilogue", "conv0", "conv1")),
        (D, seen, ("fromrgb", *halves, "conv", "fc")),
    ):
        for name, part in network.named_modules():
            if name.split(".")[-1] in which or (found is seen and name in ("b8", "b16", "b32")):
                part.register_forward_hook(functools.partial(note, found, name))
    z = torch.randn(8, 64)
    G(z)
    scores(kind, D, smooth_images(8, 32), None)
    return drawn, seen, kept, power(G.mapping(z))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_activations_have_about_unit_variance_at_the_start(kind):
    """Of every layer with an activation, in both networks; means over some initialisations."""
    runs = [powers(kind, seed) for seed in range(4)]
    drawn, seen, kept = ({name: sum(r[i][name] for r in runs) / 4 for name in runs[0][i]} for i in range(3))
    assert len(drawn) == (8 if kind.startswith("stylegan1") else 7)
    assert len(seen) == 1 + 3 * (3 if kind.startswith(("stylegan1", "progressive")) else 2) + 2
    low, high, expected = {"progressive": (0.5, 2.0, 1.0)}.get(kind, (0.1, 2.0, 1.0))
    if kind.startswith("stylegan1"):  # (1 + s)^2 + b^2, where s and b are of w's variance
        low, high, expected = 0.6, 1.7, 1 + 2 * sum(r[3] for r in runs) / 4
        if kind == "stylegan1":  # a constant channel is 0 after instance norm: there is b^2 alone
            assert 0.6 < drawn.pop("synthesis.b4.epilogue") / ((expected - 1) / 2) < 1.7
    # StyleGAN2's constant is white noise, of which the filters leave little. In the discriminators, zeros beyond the
    # border take their part of each level.
    assert {name: x for name, x in drawn.items() if not low < x / expected < high} == {}
    assert {name: x for name, x in seen.items() if not 0.1 < x < 2} == {}
    assert {name: x for name, x in kept.items() if not 0.4 < x < 1.5} == {}
