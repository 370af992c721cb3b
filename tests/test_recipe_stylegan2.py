"""training/recipes/stylegan2.py: phases, optimizers, and what is random about a generated image."""

import pytest
import torch

from styleloom.training import losses, report
from styleloom.training.config import Run, StyleGAN2Network, StyleGAN2Recipe
from styleloom.training.distributed import Replicated, Team
from styleloom.training.draws import Draws
from styleloom.training.networks import build as build_networks
from styleloom.training.phases import Batch, run_phase
from styleloom.training.recipes import build
from styleloom.training.recipes.stylegan2 import StyleGAN2

CPU = torch.device("cpu")
NETWORK = StyleGAN2Network(z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8, mbstd_group=2)


@pytest.fixture(autouse=True)
def _own_statistics(monkeypatch):
    monkeypatch.setattr(report, "_moments", {})


def recipe(class_counts=(), batch=4, network=NETWORK, width=16, height=16, recompute=False, **settings):
    run = Run(batch=batch, network=network, recompute=recompute, recipe=StyleGAN2Recipe(**settings))
    built = build(run, width, height, 3, list(class_counts), CPU)
    assert isinstance(built, StyleGAN2)
    return built


def batch_of(recipe, purpose, n=4, seed=0):
    images = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    labels = torch.eye(recipe.c_dim)[torch.arange(n) % max(recipe.c_dim, 1)] if recipe.c_dim else torch.zeros(n, 0)
    return Batch(images, labels, Draws(seed, purpose, range(n)))


def updater(recipe, name):
    return Replicated(Team(), recipe.networks[name], recipe.optimizers[name])


def phase_of(recipe, name):
    return {phase.name: phase for phase in recipe.phases}[name]


def test_phases_in_order():
    phases = recipe(batch=8).phases
    assert [(p.name, p.trains, p.interval, p.batch) for p in phases] == [
        ("Gmain", "G", 1, 8),
        ("Gpl", "G", 4, 4),
        ("Dmain", "D", 1, 8),
        ("Dr1", "D", 16, 8),
    ]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"pl_weight": 0}, ["Gmain", "Dmain", "Dr1"]),
        ({"r1_gamma": 0}, ["Gmain", "Gpl", "Dmain"]),
        ({"pl_weight": 0, "r1_gamma": 0}, ["Gmain", "Dmain"]),
    ],
)
def test_a_weight_of_0_switches_a_phase_off(settings, names):
    assert [phase.name for phase in recipe(**settings).phases] == names


def test_adam_with_the_correction_for_lazy_regularisation():
    optimizers = recipe(lr=0.002).optimizers
    g, d = (optimizers[name].param_groups[0] for name in ("G", "D"))
    assert (g["lr"], g["betas"][1]) == pytest.approx((0.0016, 0.99199), abs=5e-6)
    assert (d["lr"], d["betas"][1]) == pytest.approx((0.0018824, 0.990586), abs=1e-6)
    for group in (g, d):
        assert group["betas"][0] == 0
        assert group["eps"] == 1e-8
        assert group["weight_decay"] == 0


def test_adam_without_lazy_phases_is_not_corrected():
    optimizers = recipe(lr=0.002, pl_weight=0, r1_gamma=0).optimizers
    for optimizer in optimizers.values():
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][1]) == (0.002, 0.99)


@pytest.mark.parametrize(("side", "batch", "gamma"), [(256, 16, 0.8192), (512, 64, 0.8192), (1024, 32, 6.5536)])
def test_r1_gamma_by_the_heuristic(side, batch, gamma):
    network = StyleGAN2Network(z_dim=1, w_dim=1, mapping_layers=1, channel_max=1)
    assert recipe(batch=batch, network=network, width=side, height=side).r1_gamma == pytest.approx(gamma)


def test_r1_gamma_given_or_rectangular():
    assert recipe(r1_gamma=3.0).r1_gamma == 3.0
    assert recipe(width=24, height=16).r1_gamma == pytest.approx(0.0002 * 24 * 16 / 4)


def cutoffs(r, n=2000):
    """Of each sample: how many layers take the first latent's w."""
    ws, w = r.ws(Draws(0, "Gmain", range(n)), torch.zeros(n, 0))
    first = (ws == w[:, None]).all(dim=2)
    counts = first.sum(dim=1)
    assert torch.equal(first, torch.arange(r.G.num_ws) < counts[:, None])  # the first layers, without gaps
    rest = ws[counts < r.G.num_ws, -1]
    assert len(rest) < 2 or not torch.equal(rest[0], rest[1])  # the second latent is each sample's own
    return counts


@torch.no_grad()
def test_style_mixing_cutoff_is_uniform_with_the_stated_probability():
    r = recipe(style_mixing=0.9)
    assert r.G.num_ws == 6
    share = torch.bincount(cutoffs(r), minlength=7) / 2000
    expected = torch.tensor([0, 0.18, 0.18, 0.18, 0.18, 0.18, 0.1])
    torch.testing.assert_close(share, expected, rtol=0, atol=0.035)
    assert share[0] == 0


@torch.no_grad()
@pytest.mark.parametrize(("probability", "lowest", "highest"), [(0.0, 6, 6), (1.0, 1, 5)])
def test_style_mixing_never_and_always(probability, lowest, highest):
    counts = cutoffs(recipe(style_mixing=probability), n=200)
    assert (counts.min(), counts.max()) == (lowest, highest)


def test_labels_are_as_frequent_as_in_the_data():
    r = recipe(class_counts=[10, 0, 30])
    labels = r.labels(Draws(0, "Gmain", range(2000)))
    assert labels.shape == (2000, 3)
    assert torch.equal(labels.sum(dim=1), torch.ones(2000))
    torch.testing.assert_close(labels.mean(dim=0), torch.tensor([0.25, 0.0, 0.75]), rtol=0, atol=0.03)


def test_a_class_without_images_is_never_drawn():
    class Lowest(Draws):
        def uniform(self, *shape):
            return torch.zeros(len(self), *shape)

    labels = recipe(class_counts=[0, 5]).labels(Lowest(0, "Gmain", [0]))
    assert torch.equal(labels, torch.tensor([[0.0, 1.0]]))


def test_labels_without_classes():
    assert recipe().labels(Draws(0, "Gmain", range(3))).shape == (3, 0)


@torch.no_grad()
def test_fakes_belong_to_their_positions(ops_path):
    """Latent, label, mixing and noise of a sample do not depend on the samples beside it."""
    r = recipe(class_counts=[1, 1])
    for name, parameter in r.G.named_parameters():
        if name.endswith("noise_strength"):
            parameter.fill_(0.5)
    whole = r.fakes(Draws(0, "Dmain", range(6)))
    part = r.fakes(Draws(0, "Dmain", range(1, 6, 2)))
    for mine, theirs in zip(part, whole, strict=True):
        torch.testing.assert_close(mine, theirs[1::2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Gmain", "Gpl", "Dmain", "Dr1"])
def test_every_phase_runs_without_noise(ops_path, name):
    r = recipe(network=NETWORK.model_copy(update={"noise": False}))
    assert r.G.synthesis.sizes == []
    phase = phase_of(r, name)
    loss = phase.loss(batch_of(r, name, phase.batch)).per_sample
    assert loss.shape == (phase.batch,)
    assert loss.isfinite().all()


def test_main_phases_give_the_logistic_losses():
    r = recipe()
    batch = batch_of(r, "x")
    fakes, labels, w = r.fakes(Draws(0, "x", range(4)))
    fake, real = r.D(fakes, labels), r.D(batch.images, batch.labels)
    loss = r.g_main(batch)
    torch.testing.assert_close(loss.per_sample, losses.logistic_generator(fake))
    torch.testing.assert_close(loss.statistics["w"], w)
    expected = losses.logistic_discriminator_fake(fake) + losses.logistic_discriminator_real(real)
    torch.testing.assert_close(r.d_main(batch_of(r, "x")).per_sample, expected)


def test_discriminator_phases_do_not_reach_the_generator():
    r = recipe()
    for loss in (r.d_main, r.d_r1):
        total = loss(batch_of(r, "x")).per_sample.sum()
        grads = torch.autograd.grad(total, list(r.G.parameters()), allow_unused=True)
        assert all(grad is None for grad in grads)


def test_r1_phase_has_half_of_gamma_and_its_interval():
    r = recipe(r1_gamma=3.0, r1_interval=8)
    batch = batch_of(r, "Dr1")
    images = batch.images.clone().requires_grad_()
    penalty = losses.r1_penalty(images, r.D(images, batch.labels))
    torch.testing.assert_close(r.d_r1(batch).per_sample, penalty * 1.5 * 8)
    assert not batch.images.requires_grad


def test_path_length_phase_is_against_the_mean_before_with_its_weight_and_interval():
    r = recipe(pl_weight=3.0, pl_interval=5)
    r.pl_mean.fill_(0.25)
    loss = r.g_path_length(batch_of(r, "Gpl"))
    torch.testing.assert_close(loss.per_sample, (loss.statistics["length"] - 0.25).square() * 15)
    assert r.pl_mean == 0.25  # moved after the step, not by the loss


@pytest.mark.parametrize("name", ["Gmain", "Gpl", "Dmain", "Dr1"])
def test_a_phase_changes_its_own_network_only(ops_path, name):
    r = recipe(class_counts=[3, 1])
    phase = phase_of(r, name)
    before = {key: [p.clone() for p in net.parameters()] for key, net in r.networks.items()}
    batch = batch_of(r, name, phase.batch)
    assert run_phase(phase, r.networks, updater(r, phase.trains), [batch])
    changed = {
        key: any(not torch.equal(a, b) for a, b in zip(before[key], net.parameters(), strict=True))
        for key, net in r.networks.items()
    }
    assert changed == {"G": phase.trains == "G", "D": phase.trains == "D"}


def test_pl_mean_moves_by_its_decay_towards_the_batch():
    r = recipe(pl_decay=0.01)
    r.update_pl_mean({"length": torch.tensor(2.0)})
    r.update_pl_mean({"length": torch.tensor(4.0)})
    torch.testing.assert_close(r.pl_mean, torch.tensor(0.99 * 0.02 + 0.04))


def test_path_length_phase_updates_pl_mean():
    r = recipe(pl_batch_shrink=1)
    lengths = r.g_path_length(batch_of(r, "Gpl")).statistics["length"]
    run_phase(phase_of(r, "Gpl"), r.networks, updater(r, "G"), [batch_of(r, "Gpl")])
    torch.testing.assert_close(r.pl_mean, 0.01 * lengths.mean().detach())


def test_generator_phase_updates_w_avg():
    r = recipe(w_avg_beta=0.995)
    r.G.mapping.w_avg.fill_(1.0)
    w = r.g_main(batch_of(r, "Gmain")).statistics["w"].detach()
    run_phase(phase_of(r, "Gmain"), r.networks, updater(r, "G"), [batch_of(r, "Gmain")])
    torch.testing.assert_close(r.G.mapping.w_avg, 0.995 + 0.005 * w.mean(dim=0))


def test_state_dict_brings_pl_mean_back():
    r, other = recipe(), recipe()
    r.pl_mean.fill_(0.7)
    other.load_state_dict(r.state_dict())
    assert other.pl_mean == r.pl_mean
    r.pl_mean.zero_()
    assert other.pl_mean > 0  # a copy


def test_networks_follow_from_the_seed_alone():
    state = torch.get_rng_state()
    one, same, other = (
        [p.clone() for net in build_networks(Run(seed=seed, network=NETWORK), 16, 16, 3, 0) for p in net.parameters()]
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["Gmain", "Gpl", "Dmain", "Dr1"])
def test_recomputed_activations_change_nothing_but_what_is_kept(name):
    gradients, kept = [], []
    for recompute in (False, True):
        r = recipe(recompute=recompute)
        r.D.requires_grad_(name[0] == "D")
        r.G.requires_grad_(name[0] == "G")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss = phase_of(r, name).loss(batch_of(r, name)).per_sample.sum()
        loss.backward(inputs=list(r.networks[name[0]].parameters()))
        gradients.append([p.grad for p in r.networks[name[0]].parameters()])
        kept.append(sum(saved))
    for plain, again in zip(*gradients, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.equal(plain, again)
    if name.endswith("main"):  # for second derivatives, all has to be kept
        assert kept[1] < kept[0] / 2
