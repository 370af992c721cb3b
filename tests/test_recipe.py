"""training/recipes/recipe.py: what the discriminator gets to see, and what follows from the images shown so far."""

from typing import Any

import pytest
import torch

from styleloom.training import report
from styleloom.training.config import (
    Augment,
    ProgressiveNetwork,
    ProgressiveRecipe,
    Run,
    StyleGAN1Network,
    StyleGAN1Recipe,
    StyleGAN2Network,
    StyleGAN2Recipe,
)
from styleloom.training.draws import Draws
from styleloom.training.phases import Batch
from styleloom.training.recipes import build
from styleloom.training.recipes.recipe import Augmentation

CPU = torch.device("cpu")
STYLE: dict[str, Any] = {
    "z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 64, "channel_max": 8, "mbstd_group": 2,
}  # fmt: skip
RUNS = {
    "stylegan2": {"network": StyleGAN2Network(**STYLE), "recipe": StyleGAN2Recipe()},
    "stylegan1": {"network": StyleGAN1Network(**STYLE), "recipe": StyleGAN1Recipe()},
    "progressive": {
        "network": ProgressiveNetwork(z_dim=8, channel_base=64, mbstd_group=2),
        "recipe": ProgressiveRecipe(loss="logistic"),
    },
}
ALWAYS = Augment(kind="fixed", p=1.0, pipe=("blit", "color"))


@pytest.fixture(autouse=True)
def _own_statistics(monkeypatch):
    monkeypatch.setattr(report, "_moments", {})


def recipe(kind="stylegan2", augment=Augment(), **settings) -> Any:  # noqa: B008
    built = build(Run(batch=4, augment=augment, **RUNS[kind], **settings), 16, 16, 3, [], CPU)
    built.at(0)
    return built


def batch_of(recipe, purpose="Dmain"):
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(images, torch.zeros(4, 0), Draws(0, purpose, range(4)))


def phases(recipe):
    return {phase.name: phase for phase in recipe.phases}


def inputs_of(network, monkeypatch):
    """Images that a discriminator is given, as they come."""
    seen = []
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda x, *more: (seen.append(x.detach().clone()), forward(x, *more))[1])
    return seen


def test_labels_are_as_frequent_as_in_the_data():
    built = build(Run(batch=4, **RUNS["stylegan2"]), 16, 16, 3, [10, 0, 30], CPU)
    labels = built.labels(Draws(0, "labels", range(2000)))
    assert labels.shape == (2000, 3)
    assert labels.sum(dim=0).tolist() == pytest.approx([500, 0, 1500], abs=80)
    assert torch.equal(labels.sum(dim=1), torch.ones(2000))


@pytest.mark.parametrize("kind", RUNS)
def test_without_augmentation_the_discriminator_sees_images_as_they_are(kind, monkeypatch):
    r = recipe(kind)
    seen, batch = inputs_of(r.D, monkeypatch), batch_of(r)
    phases(r)["Dmain"].loss(batch)
    assert any(torch.equal(x, batch.images) for x in seen)
    assert "augment/p" not in report._moments


@pytest.mark.parametrize("kind", RUNS)
def test_augmentation_is_on_all_that_the_discriminator_sees(kind, monkeypatch):
    """Fakes in both main phases, and reals, for R1 as well; and on no path length."""
    plain, r = recipe(kind), recipe(kind, ALWAYS)
    for name in phases(r):
        batch, other = batch_of(r, name), batch_of(plain, name)
        with monkeypatch.context() as patch:
            before, after = inputs_of(plain.D, patch), inputs_of(r.D, patch)
            phases(plain)[name].loss(other)
            phases(r)[name].loss(batch)
        assert len(before) == len(after) == {"Gpl": 0, "Gmain": 1, "Dr1": 1, "Dmain": 2}[name]
        for x, y in zip(before, after, strict=True):
            assert not torch.equal(x, y)
        if name in ("Dmain", "Dr1"):
            assert any(torch.equal(x, other.images) for x in before)
            assert not any(torch.equal(y, other.images) for y in after)


def test_r1_is_of_the_images_before_the_augmentation(monkeypatch):
    r = recipe(augment=ALWAYS, seed=3)
    batch = batch_of(r, "Dr1")
    loss = phases(r)["Dr1"].loss(batch).per_sample
    images = batch.images.clone().requires_grad_()
    logits = r.D(r.augmentation.pipe(images, torch.ones([]), Draws(0, "Dr1", range(4))), batch.labels)
    (grad,) = torch.autograd.grad(logits.sum(), images)
    torch.testing.assert_close(loss, grad.square().sum(dim=[1, 2, 3]) * (r.r1_gamma / 2) * 16)


def test_p_follows_the_signs_of_the_reals_scores():
    """After so many iterations, by so much, and only of the discriminator's main phase."""
    r = recipe(augment=Augment(kind="ada", target=0.6, kimg=0.1, interval=2))
    after = phases(r)["Dmain"].after
    assert phases(r)["Dmain"].statistics == {"signs": ()}
    assert all("signs" not in phase.statistics for name, phase in phases(r).items() if name != "Dmain")
    for signs, p in ((1.0, 0.0), (1.0, 0.08), (0.7, 0.08), (0.9, 0.16), (-1.0, 0.16), (1.0, 0.08)):
        after({"signs": torch.tensor(signs)})
        assert r.augmentation.p.item() == pytest.approx(p)


def test_the_signs_are_those_of_the_reals():
    r = recipe(augment=Augment(kind="ada"))
    found = phases(r)["Dmain"].loss(batch_of(r)).statistics["signs"]
    batch = batch_of(r)
    assert torch.equal(found, r.D(batch.images, batch.labels).sign().flatten())


def test_the_controller_is_part_of_the_state():
    r, other = (recipe(augment=Augment(kind="ada", kimg=0.01, interval=3)) for _ in range(2))
    for _ in range(4):
        phases(r)["Dmain"].after({"signs": torch.tensor(1.0)})
    assert r.augmentation.p > 0
    other.load_state_dict({name: x.clone() for name, x in r.state_dict().items()})
    assert "pl_mean" in r.state_dict()
    for each in (r, other):
        for _ in range(2):
            phases(each)["Dmain"].after({"signs": torch.tensor(1.0)})
    assert torch.equal(r.augmentation.p, other.augmentation.p)
    assert {name: x.tolist() for name, x in r.state_dict().items()} == {
        name: x.tolist() for name, x in other.state_dict().items()
    }


def test_a_fixed_p_warms_up_and_is_told():
    augmentation = Augmentation(Augment(kind="fixed", p=0.4, warmup_kimg=1.0), CPU)
    batch = batch_of(None)
    for nimg, p in ((0, 0.0), (500, 0.2), (1000, 0.4), (5000, 0.4)):
        augmentation.at(nimg)
        assert augmentation.p.item() == pytest.approx(p)
        augmentation(batch.images, batch.draws)
        assert report.collect(lambda sums: sums)["augment/p"] == pytest.approx(p)


def test_diffaugment_is_on_every_image():
    augmentation = Augmentation(Augment(kind="diffaugment"), CPU)
    augmentation.at(0)
    images = batch_of(None).images
    assert augmentation.p.item() == 1
    assert all(
        not torch.equal(x, y) for x, y in zip(images, augmentation(images, Draws(0, "a", range(4))), strict=True)
    )
