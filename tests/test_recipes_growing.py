"""training/recipes: Progressive GAN, StyleGAN and MSG, whose losses are computed by hand; what all recipes share."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from styleloom.training import report, schedule
from styleloom.training.config import (
    Growth,
    MSGNetwork,
    MSGRecipe,
    ProgressiveNetwork,
    ProgressiveRecipe,
    Run,
    StyleGAN1Network,
    StyleGAN1Recipe,
    StyleGAN2Network,
    StyleGAN2Recipe,
)
from styleloom.training.draws import Draws
from styleloom.training.networks.growing import downsample_box
from styleloom.training.phases import Batch
from styleloom.training.recipes import build

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"z_dim": 8, "channel_base": 64, "channel_max": 8, "mbstd_group": 2}
STYLE: dict[str, Any] = {**SMALL, "w_dim": 8, "mapping_layers": 2}
NETWORKS = {
    "progressive": ProgressiveNetwork(**SMALL),
    "stylegan1": StyleGAN1Network(**STYLE),
    "stylegan2": StyleGAN2Network(**STYLE),
    "msg": MSGNetwork(**STYLE),
}
RECIPES = {
    "progressive": ProgressiveRecipe, "stylegan1": StyleGAN1Recipe, "stylegan2": StyleGAN2Recipe, "msg": MSGRecipe,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_statistics(monkeypatch):
    monkeypatch.setattr(report, "_moments", {})


def recipe(kind, class_counts=(), growth=None, batch=4, **settings) -> Any:
    """In float64, of 16 px; biases are random too, so that scores are not symmetric."""
    run = Run(batch=batch, network=NETWORKS[kind], recipe=RECIPES[kind](**settings), growth=growth or Growth())
    built = build(run, 16, 16, 3, list(class_counts), CPU)
    generator = torch.Generator().manual_seed(5)
    for network in built.networks.values():
        network.double()
        for parameter in network.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return built


def batch_of(recipe, purpose, n=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, *recipe.G.size, generator=generator, dtype=torch.float64)
    labels = torch.eye(recipe.c_dim)[torch.arange(n) % max(recipe.c_dim, 1)] if recipe.c_dim else torch.zeros(n, 0)
    return Batch(images, labels.double(), double(purpose, n))


def double(purpose, n=4):
    draws = Draws(0, purpose, range(n))
    normal, uniform = draws.normal, draws.uniform
    draws.normal = lambda *shape: normal(*shape).double()
    draws.uniform = lambda *shape: uniform(*shape).double()
    return draws


@pytest.mark.parametrize("kind", ["progressive", "stylegan1"])
def test_the_discriminator_comes_first_and_there_are_two_phases(kind):
    assert [(p.name, p.trains, p.interval, p.batch) for p in recipe(kind).phases] == [
        ("Dmain", "D", 1, 4),
        ("Gmain", "G", 1, 4),
    ]


@pytest.mark.parametrize("classes", [(), (3, 1, 2)])
def test_wgan_gp_by_hand(classes):
    """D's loss from three separate forward passes, the penalty's gradient by `torch.func`."""
    r = recipe("progressive", classes, gp_weight=7.0, gp_target=2.0, drift=0.3, class_weight=0.5)
    batch = batch_of(r, "Dmain")
    loss = r.d_main(batch).per_sample
    draws = double("Dmain")
    z, t = draws.normal(8), draws.uniform(1, 1, 1)
    fakes = r.G(z, batch.labels)
    between = batch.images + t * (fakes - batch.images)
    fake, real = r.D(fakes), r.D(batch.images)
    grads = torch.func.grad(lambda x: r.D(x)[:, 0].sum())(between)
    norms = grads.square().sum(dim=[1, 2, 3]).sqrt()
    expected = fake[:, 0] - real[:, 0] + 7 / 2**2 * (norms - 2) ** 2 + 0.3 * real[:, 0] ** 2
    if classes:
        index = batch.labels.argmax(dim=1)
        for out in (fake, real):
            expected = expected + 0.5 * F.cross_entropy(out[:, 1:], index, reduction="none")
    torch.testing.assert_close(loss, expected)
    parameters = [p for _, p in r.D.active()]
    mine = torch.autograd.grad(loss.sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad(expected.sum(), parameters)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("classes", [(), (3, 1, 2)])
def test_the_progressive_generators_loss_by_hand(classes):
    r = recipe("progressive", classes, class_weight=0.5)
    loss = r.g_main(batch_of(r, "Gmain")).per_sample
    draws = double("Gmain")
    labels = r.labels(draws)
    out = r.D(r.G(draws.normal(8), labels))
    expected = -out[:, 0]
    if classes:
        expected = expected + 0.5 * F.cross_entropy(out[:, 1:], labels.argmax(dim=1), reduction="none")
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("gamma", [0.0, 10.0])
def test_the_logistic_variant_by_hand(gamma):
    r = recipe("progressive", loss="logistic", r1_gamma=gamma)
    batch = batch_of(r, "Dmain")
    loss = r.d_main(batch).per_sample
    fakes = r.G(double("Dmain").normal(8), batch.labels)
    grads = torch.func.grad(lambda x: r.D(x)[:, 0].sum())(batch.images)
    expected = F.softplus(r.D(fakes)[:, 0]) + F.softplus(-r.D(batch.images)[:, 0])
    expected = expected + gamma / 2 * grads.square().sum(dim=[1, 2, 3])
    torch.testing.assert_close(loss, expected)
    assert r.r1_gamma == gamma


@pytest.mark.parametrize("classes", [(), (3, 1, 2)])
def test_stylegan1s_discriminator_has_r1_in_its_one_step(classes):
    r = recipe("stylegan1", classes, style_mixing=0.0)
    batch = batch_of(r, "Dmain")
    loss = r.d_main(batch).per_sample
    draws = double("Dmain")
    fakes, labels, _ = r.fakes(draws)
    grads = torch.func.grad(lambda x: r.D(x, batch.labels).sum())(batch.images)
    expected = F.softplus(r.D(fakes, labels))[:, 0] + F.softplus(-r.D(batch.images, batch.labels))[:, 0]
    torch.testing.assert_close(loss, expected + 10 / 2 * grads.square().sum(dim=[1, 2, 3]))
    assert not any(x.grad is not None for x in r.G.parameters())


def test_msg_judges_reals_at_all_sizes_and_fakes_as_they_are_made():
    r = recipe("msg")
    batch = batch_of(r, "Dmain")
    small = downsample_box(batch.images)
    torch.testing.assert_close(
        r.judge(batch.images, batch.labels, batch.draws),
        r.D([downsample_box(small), small, batch.images], batch.labels),
    )
    images, _, _ = r.fakes(double("Dmain"))
    assert [tuple(x.shape[2:]) for x in images] == [(4, 4), (8, 8), (16, 16)]
    images = [x.detach().requires_grad_() for x in images]
    grads = torch.autograd.grad(r.D(images, batch.labels).sum(), images)
    assert all(grad.abs().max() > 0 for grad in grads)
    loss = r.g_main(batch_of(r, "Gmain")).per_sample
    torgb = [r.G.synthesis.get_submodule(f"b{px}").torgb.weight for px in (4, 8, 16)]
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(loss.sum(), torgb))


@pytest.mark.parametrize("kind", ["progressive", "stylegan1", "stylegan2"])
def test_a_recipe_begins_in_the_schedules_first_stage_and_enters_others(kind):
    growth = Growth(start=4, stabilise_kimg=1, fade_kimg=1, batch=((4, 16), (8, 8)), lr=((8, 0.25),))
    r = recipe(kind, growth=growth)
    assert (r.stage.px, r.stage.batch, r.alpha, r.G.size) == (4, 16, 1.0, (4, 4))
    first = r.optimizers
    r.enter(schedule.Stage(1, True, 8, 0.25), 0.5)
    assert (r.G.level, r.D.level, r.G.alpha, r.D.alpha, r.G.size) == (1, 1, 0.5, 0.5, (8, 8))
    assert {phase.batch for phase in r.phases if phase.name != "Gpl"} == {8}
    for name, network in r.networks.items():
        assert r.optimizers[name] is not first[name]
        held = [p for group in r.optimizers[name].param_groups for p in group["params"]]
        assert [id(p) for p in held] == [id(p) for _, p in network.active()]
        assert len(held) < len(list(network.parameters()))
    lr = r.optimizers["D"].param_groups[0]["lr"]
    assert lr == (0.25 if kind != "stylegan2" else pytest.approx(0.25 * 16 / 17))


def test_r1_of_grown_stylegan2_goes_by_the_present_size():
    r = recipe("stylegan2", growth=Growth(start=4, batch=((4, 16),)))
    assert r.r1_gamma == pytest.approx(0.0002 * 4 * 4 / 16)
    r.enter(schedule.Stage(2, False, 4, 0.1))
    assert r.r1_gamma == pytest.approx(0.0002 * 16 * 16 / 4)


def test_what_a_phase_trains_is_at_work():
    """In every stage, each phase's loss reaches nothing but active parameters, and all of those are reached by one."""
    for kind in ("progressive", "stylegan1", "stylegan2"):
        r = recipe(kind, growth=Growth(start=4))
        for stage, alpha in [((0, False), 1.0), ((1, True), 0.3), ((1, False), 1.0), ((2, True), 0.7)]:
            r.enter(schedule.Stage(*stage, 4, 0.1), alpha)
            reached = {"G": set(), "D": set()}
            for phase in r.phases:
                loss = phase.loss(batch_of(r, phase.name)).per_sample.sum()
                names, parameters = zip(*r.networks[phase.trains].named_parameters(), strict=True)
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
                reached[phase.trains] |= {n for n, g in zip(names, grads, strict=True) if g is not None}
            for name, network in r.networks.items():
                assert reached[name] == {n for n, _ in network.active()}, (kind, stage, name)
