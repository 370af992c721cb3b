"""training/initialise.py: what is taken of a snapshot, what is said of the rest, and what is refused."""

import copy
from typing import Any

import pytest
import torch

from styleloom.training import recipes
from styleloom.training.checkpoint import read_tensors, save_snapshot
from styleloom.training.config import (
    Growth,
    MSGNetwork,
    MSGRecipe,
    ProgressiveNetwork,
    ProgressiveRecipe,
    R3GANNetwork,
    R3GANRecipe,
    Run,
    StyleGAN1Network,
    StyleGAN1Recipe,
    StyleGAN2Network,
    StyleGAN2Recipe,
)
from styleloom.training.distributed import Replicated, Team
from styleloom.training.draws import Draws
from styleloom.training.ema import average_of
from styleloom.training.initialise import from_snapshot, parts
from styleloom.training.networks import build
from styleloom.training.phases import Batch, run_phase

STYLE: dict[str, Any] = {
    "z_dim": 8,
    "w_dim": 6,
    "mapping_layers": 2,
    "channel_base": 512,
    "channel_max": 8,
    "mbstd_group": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "stylegan2": {"network": StyleGAN2Network(**STYLE), "recipe": StyleGAN2Recipe()},
    "msg": {"network": MSGNetwork(**STYLE), "recipe": MSGRecipe()},
    "stylegan1": {"network": StyleGAN1Network(**STYLE), "recipe": StyleGAN1Recipe()},
    "progressive": {
        "network": ProgressiveNetwork(z_dim=8, channel_base=512, channel_max=8, mbstd_group=2),
        "recipe": ProgressiveRecipe(),
    },
    "r3gan": {
        "network": R3GANNetwork(z_dim=8, channel_base=512, channel_max=8, group_width=4),
        "recipe": R3GANRecipe(),
    },
}
SEVERAL = [kind for kind in KINDS if kind != "r3gan"]  # kinds with a ToRGB at every level


def a_run(kind="stylegan2", network=None, **settings):
    """A Run; `network`: fields of its section that are different."""
    its = dict(KINDS[kind])
    its["network"] = its["network"].model_copy(update=network or {})
    return Run(batch=4, **its, **settings)


def snapshot(folder, run, width=32, height=32, channels=3, classes=0, level=None):
    """A snapshot's folder; of networks that are away from their initialisation everywhere."""
    G, D = build(run, width, height, channels, classes)
    generator = torch.Generator().manual_seed(7)
    for x in [x for network in (G, D) for x in network.state_dict().values()]:
        x += 0.3 * x.std(correction=0).clamp(0.1) * torch.randn(x.shape, generator=generator)
    G.grow_to(G.level if level is None else level)
    names = [f"class {i}" for i in range(classes)]
    return save_snapshot(folder / "snapshots", G, D, run, 1000, width, height, channels, names)


def latents(n, z_dim):
    return torch.randn(n, z_dim, generator=torch.Generator().manual_seed(1))


class Begun:
    """A run that begins from a snapshot, with the networks before and after, and what was told."""

    def __init__(self, folder, run, width=32, height=32, channels=3, classes=0):
        run = run.model_copy(update={"init": str(folder)})
        self.recipe = recipes.build(run, width, height, channels, [1] * classes, torch.device("cpu"))
        self.average = average_of(self.recipe.G)
        self.before = {name: copy.deepcopy(net.state_dict()) for name, net in self.recipe.networks.items()}
        self.said: list[str] = []
        self.error = ""
        try:
            from_snapshot(run, self.recipe, self.average, (width, height, channels), self.said.append)
        except ValueError as error:
            self.error = str(error)
        files = {"G": "generator", "D": "discriminator"}
        self.snapshot = {name: read_tensors(folder / f"{file}.safetensors") for name, file in files.items()}

    def origins(self):
        """(names taken from the snapshot, names as they were initialised, names of other tensors)."""
        out: tuple[list[str], list[str], list[str]] = ([], [], [])
        for a, network in self.recipe.networks.items():
            for name, x in network.state_dict().items():
                its = self.snapshot[a].get(name)
                same = [its is not None and torch.equal(x, its), torch.equal(x, self.before[a][name])]
                out[same.index(True) if any(same) else 2].append(f"{a}.{name}")
        return out

    def unchanged(self):
        networks = self.recipe.networks
        return all(torch.equal(x, self.before[a][b]) for a in networks for b, x in networks[a].state_dict().items())


def begin(*args, **options):
    """`Begun`, that must have succeeded: the average is a copy of the generator, and no error was raised."""
    its = Begun(*args, **options)
    assert its.error == ""
    average, G = its.average.state_dict(), its.recipe.G.state_dict()
    assert all(torch.equal(average[name], x) for name, x in G.items())
    return its


def of(names, *starts):
    """Those of the names that begin so."""
    return [name for name in names if name.startswith(starts)]


# The same networks.


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_all_is_taken_from_networks_that_are_the_same(kind, classes, tmp_path):
    run = a_run(kind)
    folder = snapshot(tmp_path, run, classes=classes)
    its = begin(folder, run, classes=classes)
    taken, initial, other = its.origins()
    assert [*of(initial, "G", "D"), *other] == [n for n in initial if n.endswith(".w_avg")]  # that of kinds without w
    assert its.said == [
        f"took {len(taken) + len(initial)} of {len(taken) + len(initial)} tensors from the snapshot {folder}."
    ]


def test_a_snapshot_that_is_not_as_it_is_described_is_refused(tmp_path):
    folder = snapshot(tmp_path, a_run())
    description = (folder / "snapshot.json").read_text()
    for there, here in (("w_dim", 7), ("z_dim", 9)):
        other = snapshot(tmp_path / there, a_run(network={there: here}))
        (other / "snapshot.json").write_text(description)
        its = Begun(other, a_run())
        assert f"the weights in {other} do not fit this network: " in its.error


def test_without_a_discriminator_that_begins_anew(tmp_path):
    folder = snapshot(tmp_path, a_run())
    (folder / "discriminator.safetensors").rename(tmp_path / "moved")
    run = a_run().model_copy(update={"init": str(folder)})
    recipe = recipes.build(run, 32, 32, 3, [], torch.device("cpu"))
    before = copy.deepcopy(recipe.D.state_dict())
    said = []
    from_snapshot(run, recipe, average_of(recipe.G), (32, 32, 3), said.append)
    assert all(torch.equal(x, before[name]) for name, x in recipe.D.state_dict().items())
    assert said[1:] == ["It has no discriminator, so that begins anew."]
    its = read_tensors(folder / "generator.safetensors")
    assert all(torch.equal(x, its[name]) for name, x in recipe.G.state_dict().items())


# Another resolution.


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_larger_size_has_new_levels(kind, tmp_path):
    run = a_run(kind)
    its = begin(snapshot(tmp_path, run), run, 64, 64)
    taken, initial, other = its.origins()
    assert other == []
    # What takes the next level's image too, where all are shown at once.
    beside = ["D.b32.conv0.weight", "D.b32.skip.weight"] if kind == "msg" else []
    assert [name for name in initial if ".b64." not in name and not name.endswith(".w_avg")] == beside
    assert of(taken, "G.mapping.w_avg", "G.synthesis.b4.", "G.synthesis.b32.", "D.b16.conv0", "D.b4.fc")
    assert its.said[1].startswith("Not taken: G.synthesis.b64 (a new level), D.b")
    assert "D.b64 (a new level)" in its.said[1]
    assert ("Left there: D.b32.fromrgb." in its.said) == (kind in ("stylegan2", "msg"))
    assert ("--growth.start 32 would let what is above 32 px fade in." in its.said) == (kind != "msg")


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_smaller_size_leaves_levels_out(kind, tmp_path):
    run = a_run(kind)
    its = begin(snapshot(tmp_path, run, 64, 64), run)
    taken, initial, _ = its.origins()
    alone = kind in ("stylegan2", "msg")  # a discriminator with one layer for images, at the top
    beside = ["D.b32.conv0.weight", "D.b32.skip.weight"] if kind == "msg" else []
    images = ["D.b32.fromrgb.weight", "D.b32.fromrgb.bias"] if alone else []
    assert set(of(initial, "D.")) == {*beside, *images}
    assert len(taken) > 40
    assert ("D.b32.fromrgb (not there)" in its.said[1]) == alone
    assert any(line.startswith("Left there: G.synthesis.b64, D.b64") for line in its.said)
    G, z = its.recipe.G, latents(2, 8)
    if kind == "stylegan2":  # of the sum of images, the part of the lower levels
        large = build(run, 64, 64, 3, 0)[0]
        large.load_state_dict(its.snapshot["G"])
        large.grow_to(3)
        assert torch.equal(G(z), large(z))


@pytest.mark.parametrize("classes", [0, 2])
def test_r3gan_at_another_size(classes, tmp_path):
    """It has layers for images at its top level only."""
    run = a_run("r3gan")
    its = begin(snapshot(tmp_path, run), run, 64, 64, classes=classes)
    taken, initial, other = its.origins()
    assert of(initial, "G.synthesis.b32.", "G.synthesis.b16.", "G.synthesis.b8.", "D.b32.", "D.b16.", "D.b8.") == []
    assert of(taken, "G.synthesis.b32.level.residuals.1", "D.b32.level.residuals.0")
    assert "G.synthesis.b64 (a new level)" in its.said[1]
    assert "Left there: G.synthesis.b32.torgb, D.b32.fromrgb." in its.said
    assert not [line for line in its.said if "--growth" in line]
    assert other == (["G.synthesis.b4.input.weight"] if classes else [])
    G, z = its.recipe.G, latents(3, 8)
    small = build(run, 32, 32, 3, 0)[0]
    small.load_state_dict(its.snapshot["G"])
    c = torch.eye(2)[[0, 1, 1]] if classes else None
    for network in (G.synthesis, small.synthesis):
        network.b4.input.register_forward_hook(lambda module, _, y: setattr(module, "made", y))
    G(z, c)
    small(z)
    torch.testing.assert_close(G.synthesis.b4.input.made, small.synthesis.b4.input.made)


def test_what_the_generator_drew_is_what_new_levels_begin_from(tmp_path):
    run = a_run(growth=Growth(start=32))
    its = begin(snapshot(tmp_path, a_run()), run, 64, 64)
    G, z = its.recipe.G, latents(2, 8)
    small = build(a_run(), 32, 32, 3, 0)[0]
    small.load_state_dict(its.snapshot["G"])
    assert (G.level, G.alpha) == (3, 1.0)  # by the schedule, which begins at 32 px
    assert torch.equal(G(z), small(z))
    taken, initial, _ = its.origins()
    assert "D.b32.fromrgb.weight" in taken
    assert of(initial, "D.b16.fromrgb.weight")  # which is not needed from 32 px on


def test_channels_that_differ_are_told_with_their_shapes(tmp_path):
    """By channel_base, the top level of the smaller network has half of them."""
    folder = snapshot(tmp_path, a_run(network={"channel_base": 128}))
    its = begin(folder, a_run(), 64, 64)
    taken, initial, _ = its.origins()
    assert of(taken, "G.synthesis.b16.")
    assert not of(taken, "G.synthesis.b32.conv1.weight")
    assert of(initial, "G.synthesis.b32.conv1.weight")
    line = next(line for line in its.said if line.startswith("Not taken: "))
    assert "G.synthesis.b32.conv0.weight ((4, 8, 3, 3) there, (8, 8, 3, 3) here)" in line
    assert "G.synthesis.b64 (a new level)" in line
    assert "D.b32.skip ((8, 4, 1, 1) there, (8, 8, 1, 1) here)" in line


@pytest.mark.parametrize(("its_channels", "channels"), [(3, 1), (1, 3), (3, 4)])
def test_other_colours(its_channels, channels, tmp_path):
    its = begin(snapshot(tmp_path, a_run(), channels=its_channels), a_run(), channels=channels)
    _, initial, other = its.origins()
    levels = (4, 8, 16, 32)
    expected = [f"G.synthesis.b{px}.torgb.{name}" for px in levels for name in ("weight", "bias")]
    assert set(initial) == {*expected, "D.b32.fromrgb.weight"}
    assert other == []
    assert f"D.b32.fromrgb.weight ((8, {its_channels}, 1, 1) there, (8, {channels}, 1, 1) here)" in its.said[1]


# Labels.


@pytest.mark.parametrize("kind", ["stylegan2", "msg", "stylegan1"])
def test_labels_that_are_added_change_nothing_at_first(kind, tmp_path):
    run = a_run(kind)
    its = begin(snapshot(tmp_path, run), run, classes=3)
    G, z = its.recipe.G, latents(6, 8)
    plain = build(run, 32, 32, 3, 0)[0]
    plain.load_state_dict(its.snapshot["G"])
    for label in range(3):
        c = torch.eye(3)[[label] * 6]
        torch.testing.assert_close(G.mapping(z, c), plain.mapping(z), rtol=1e-5, atol=1e-5)
    images = G(z, torch.eye(3)[[0, 1, 2] * 2], truncation_psi=0.7)
    torch.testing.assert_close(images, plain(z, truncation_psi=0.7), rtol=1e-4, atol=1e-4)
    assert "the part for z is taken: at first, labels change nothing." in its.said[-1]
    taken, _, other = its.origins()
    assert other == ["G.mapping.fc0.weight"]
    line = next(line for line in its.said if line.startswith("Not taken: "))
    assert "G.mapping.embed (not there)" in line
    out = 3 if kind == "stylegan1" else 8
    assert f"D.b4.out (weight (1, 8) there, ({out}, 8) here, ...)" in line
    assert ("D.mapping (not there)" in line) == (kind != "stylegan1")
    assert of(taken, "D.b4.fc")


def test_labels_are_learned_from_there(tmp_path):
    """The weight of 0 gets a gradient, and so does what comes before it after a step."""
    run = a_run()
    its = begin(snapshot(tmp_path, run), run, classes=2)
    mapping = its.recipe.G.mapping
    z, c = latents(8, 8), torch.eye(2)[[0, 1] * 4]
    optimizer = torch.optim.Adam(mapping.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        mapping(z, c)[::2].sum().backward()
        assert mapping.fc0.weight.grad[:, 8:].all()
        assert bool(mapping.embed.weight.grad.any()) == (step > 0)
        optimizer.step()
    w = mapping(z[:1].expand(2, -1), torch.eye(2))
    assert not torch.allclose(w[0], w[1], atol=1e-4)


@torch.no_grad()
def test_labels_that_are_added_to_a_progressive_gan(tmp_path):
    """There the label is a part of the vector whose norm is 1, of some hundred parts usually."""
    run = a_run("progressive", {"z_dim": 64})
    its = begin(snapshot(tmp_path, run), run, classes=3)
    G, z = its.recipe.G, latents(6, 64)
    plain = build(run, 32, 32, 3, 0)[0]
    plain.load_state_dict(its.snapshot["G"])
    images = [G(z, torch.eye(3)[[label] * 6]) for label in range(3)]
    assert torch.equal(images[0], images[2])
    assert (images[0] - plain(z)).norm() < 0.01 * plain(z).norm()
    assert its.recipe.G.synthesis.b4.input.weight[:, 64:].count_nonzero() == 0


@pytest.mark.parametrize("kind", ["stylegan2", "stylegan1"])
@torch.no_grad()
def test_labels_that_are_removed(kind, tmp_path):
    run = a_run(kind)
    its = begin(snapshot(tmp_path, run, classes=3), run)
    labelled = build(run, 32, 32, 3, 3)[0]
    labelled.load_state_dict(its.snapshot["G"])
    labelled.mapping.fc0.weight[:, 8:] = 0  # what is left out
    z = latents(4, 8)
    torch.testing.assert_close(its.recipe.G.mapping(z), labelled.mapping(z, torch.eye(3)[[0, 1, 2, 0]]))
    assert "what it made of labels is left out." in its.said[-1]
    left = next(line for line in its.said if line.startswith("Left there: "))
    assert "G.mapping.embed" in left


def test_another_number_of_classes_has_a_new_embedding(tmp_path):
    run = a_run()
    its = begin(snapshot(tmp_path, run, classes=3), run, classes=5)
    _, initial, other = its.origins()
    assert set(initial) == {"G.mapping.embed.weight", "D.mapping.embed.weight"}
    assert other == []
    assert "Not taken: G.mapping.embed.weight ((6, 3) there, (6, 5) here)" in its.said[1]


# What is refused, before anything changes.


def refused(*args, **options):
    its = Begun(*args, **options)
    assert its.error != ""
    assert its.said == []
    assert its.unchanged()
    return its.error


def test_another_kind(tmp_path):
    complaint = refused(snapshot(tmp_path, a_run("progressive")), a_run("stylegan1"))
    assert "is of kind progressive, this run of stylegan1: take a preset of that kind" in complaint


def test_levels_of_other_sizes(tmp_path):
    folder = snapshot(tmp_path, a_run(), 48, 32)
    assert "which grow from 6x4" in refused(folder, a_run(), 32, 32)
    complaint = refused(folder, a_run(), 40, 32)
    assert f"the snapshot {folder} is of 48x32 px images, which grow from 6x4, and this run's of 40x32 px" in complaint
    assert "prepare the data set at 6x4 times a power of 2" in complaint
    assert begin(folder, a_run(), 96, 64).origins()[2] == []


def test_networks_of_which_next_to_nothing_fits(tmp_path):
    folder = snapshot(tmp_path, a_run(network={"z_dim": 16, "w_dim": 16, "channel_max": 5}))
    complaint = refused(folder, a_run())
    assert "of this run's parameters fit the snapshot" in complaint
    assert "(G.mapping (w_avg (16,) there, (6,) here, ...), " in complaint
    assert " more): give the --network.* options that it was trained with" in complaint


@pytest.mark.parametrize("kind", ["stylegan2", "progressive"])
def test_networks_that_have_not_grown_so_far(kind, tmp_path):
    growing = a_run(kind, growth=Growth(start=8))
    folder = snapshot(tmp_path, growing, level=1)
    for size in (32, 64):
        complaint = refused(folder, a_run(kind), size, size)
        assert f"has grown to 8 px only, and this run begins at {size}: give --growth.start 8" in complaint
        its = begin(folder, growing, size, size)
        assert all("goes on from there" not in line for line in its.said)


def test_a_discriminator_with_one_layer_for_images(tmp_path):
    folder = snapshot(tmp_path, a_run())
    start = a_run(growth=Growth(start=16))
    complaint = refused(folder, start, 64, 64)
    assert "takes images of 32 px only, and this run begins at 16: give --growth.start 32" in complaint
    assert "leave out --growth.start, or leave out --init" in refused(folder, start, 16, 16)


def test_networks_that_grew_fit_those_that_do_not(tmp_path):
    its = begin(snapshot(tmp_path, a_run(growth=Growth(start=8))), a_run())
    assert its.origins()[1:] == ([], [])
    assert its.said[-1] == "Left there: D.b4.fromrgb, D.b8.fromrgb, D.b16.fromrgb."


def test_a_snapshot_that_has_grown_further_is_told_of(tmp_path):
    run = a_run("progressive", growth=Growth(start=8))
    folder = snapshot(tmp_path, run, 64, 64, level=3)
    its = begin(folder, run)
    told = "the snapshot has grown to 32 px, and this run begins again at 8: --growth.start 32 goes on from there."
    assert told in its.said


# Frozen levels.


def frozen(count, *args, **options):
    return a_run(*args, **options).model_copy(update={"freeze_d": count})


@pytest.mark.parametrize("kind", KINDS)
def test_levels_from_the_snapshot_can_be_frozen(kind, tmp_path):
    its = begin(snapshot(tmp_path, a_run(kind)), frozen(2, kind))
    learning = {name for name, _ in its.recipe.D.active()}
    assert not of(learning, "b32.", "b16.")
    assert of(learning, "b8.")
    assert of(learning, "b4.")


def test_levels_that_are_new_cannot_be_frozen(tmp_path):
    folder = snapshot(tmp_path, a_run())
    complaint = refused(folder, frozen(2), 64, 64)
    assert f"--freeze-d 2 would keep what the snapshot {folder} does not have or has not trained: b64. " in complaint
    assert "b32.fromrgb.weight" in refused(folder, frozen(1), channels=1)
    assert begin(folder, frozen(1), classes=2)


def test_levels_that_have_not_been_trained_cannot_be_frozen(tmp_path):
    growing = a_run("progressive", growth=Growth(start=8))
    folder = snapshot(tmp_path, growing, level=1)
    its = Begun(folder, frozen(1, "progressive", growth=Growth(start=8)))
    assert "does not have or has not trained: b32. Leave it out" in its.error


@pytest.mark.parametrize("kind", ["stylegan2", "stylegan1"])
def test_frozen_levels_stay_to_the_bit_while_others_learn(kind, tmp_path):
    """Over iterations of all phases, with R1, as the loop runs them."""
    recipe = begin(snapshot(tmp_path, a_run(kind)), frozen(2, kind)).recipe
    before = copy.deepcopy(recipe.D.state_dict())
    updaters = {name: Replicated(Team(), recipe.networks[name], recipe.optimizers[name]) for name in ("G", "D")}
    for start in range(0, 12, 4):
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(start))
        for phase in recipe.phases:
            rows = range(start, start + phase.batch)
            batch = Batch(images[: phase.batch], torch.zeros(phase.batch, 0), Draws(0, phase.name, rows))
            assert run_phase(phase, recipe.networks, updaters[phase.trains], [batch])
    assert {"Dmain", "Dr1"} <= {phase.name for phase in recipe.phases} or kind == "stylegan1"
    idle = {name for name, _ in recipe.D.named_parameters()} - {name for name, _ in recipe.D.active()}
    assert of(sorted(idle), "b32.", "b16.") != []
    for name, p in recipe.D.named_parameters():
        assert torch.equal(p, before[name]) == (name in idle), name


# Names.


def test_parts_are_named_by_their_modules():
    every = ["a.b.weight", "a.b.bias", "a.c.weight", "d.weight", "ab.weight"]
    assert parts(every, every) == ["a", "d", "ab"]
    assert parts(["a.b.weight", "a.b.bias"], every) == ["a.b"]
    assert parts(["a.b.weight", "a.c.weight", "ab.weight"], every) == ["a.b.weight", "a.c", "ab"]
    assert parts([], every) == []
