"""scripts/average.py: snapshots of other widths, on run folders made by hand."""

import json
import shutil

import pytest
import torch

from styleloom.scripts import average, generate
from styleloom.training import ema, phema
from styleloom.training.checkpoint import find_snapshot, load_generator, read_snapshot, read_tensors, save_snapshot
from styleloom.training.networks import build

STORED = (0.05, 0.1)
WANTED = (0.07, 0.15)
BATCH, STEPS, EVERY = 10, 96, 6


def walk(settings, out, widths, *more, steps=STEPS, every=EVERY, level=lambda nimg: 2):
    """A run's folder whose weights walk at random, with STORED in each snapshot; returns the averages of `widths`.

    Args:
        level: the generator's, of the images shown so far; those above do not move.
    """
    run = settings("", str(out), *more)
    G, D = build(run, 16, 16, 3, 0)
    usual = ema.average_of(G)
    tracked = {width: ema.parameters_of(G) for width in {*STORED, *widths}}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        nimg = step * BATCH
        G.grow_to(level(nimg))
        for _, p in G.active():
            p.data += 0.2 * torch.randn(p.shape, generator=generator)
        G.mapping.w_avg += torch.randn(G.mapping.w_dim, generator=generator)
        ema.update_average(usual, G, 0.5)
        for width, parameters in tracked.items():
            ema.update_parameters(parameters, G, phema.beta(width, nimg, BATCH))
        if step % every == 0:
            usual.grow_to(G.level)
            averages = {width: tracked[width] for width in STORED}
            save_snapshot(out / "snapshots", usual, D, run, nimg, 16, 16, 3, [], averages=averages)
    return {width: tracked[width] for width in widths}


@pytest.fixture(scope="module")
def made(tmp_path_factory, settings):
    """(run's folder, what the averages of WANTED really are)."""
    folder = tmp_path_factory.mktemp("average") / "run"
    return folder, walk(settings, folder, WANTED)


@pytest.fixture
def folder(made):
    return made[0]


def missed(its, snapshot, expected):
    """How far an average is from what it should be, as a share of how far that stored in a snapshot is."""

    def distance(tensors):
        return torch.cat([(tensors[name] - x).flatten() for name, x in expected.items()]).norm().item()

    return distance(read_tensors(its / "generator.safetensors")) / distance(
        read_tensors(snapshot / "phema-0.100.safetensors")
    )


def test_averages_are_those_tracked_directly(made, call, tmp_path):
    folder, direct = made
    status, said, err = call(average.main, folder, tmp_path / "out", "--sigma-rel=0.07,0.15")
    assert (status, err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sigma-0.070", "sigma-0.150"]
    for width, expected in direct.items():
        out = tmp_path / "out" / f"sigma-{width:.3f}"
        assert missed(out, folder / "snapshots" / "nimg-000000960", expected) < 0.01
        about = read_snapshot(out)
        assert about["sigma_rel"] == width
        assert 0 < about["fit_error"] < 0.02
        assert f"sigma_rel {width:g} at 0.96 kimg, from 16 of 16 snapshots" in said
        assert f"relative error of the fit {about['fit_error']:.1e}" in said
    assert "Note" not in said


@pytest.mark.parametrize("width", STORED)
def test_a_width_that_is_stored_is_given_back_to_the_bit(folder, call, tmp_path, width):
    status, said, _ = call(average.main, folder, f"--sigma-rel={width}", tmp_path / "out")
    assert status == 0
    assert "from 1 of 16 snapshots; relative error of the fit 0.0e+00" in said
    stored = read_tensors(folder / "snapshots" / "nimg-000000960" / f"phema-{width:.3f}.safetensors")
    its = read_tensors(tmp_path / "out" / "generator.safetensors")
    assert len(stored) > 20
    assert all(torch.equal(its[name], x) for name, x in stored.items())


def test_the_result_is_a_snapshot(folder, call, tmp_path):
    """Buffers, the discriminator and the description are the newest snapshot's; its weights make other images."""
    newest, out = folder / "snapshots" / "nimg-000000960", tmp_path / "deep" / "out"
    assert call(average.main, folder, "--sigma-rel", "0.15", out)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "discriminator.safetensors", "generator.safetensors", "snapshot.json",
    ]  # fmt: skip
    assert (out / "discriminator.safetensors").read_bytes() == (newest / "discriminator.safetensors").read_bytes()
    its, theirs = (read_tensors(path / "generator.safetensors") for path in (out, newest))
    parameters = {name for name, _ in load_generator(out)[0].named_parameters()}
    assert its.keys() == theirs.keys() > parameters
    for name in its:
        assert torch.equal(its[name], theirs[name]) == (name not in parameters), name
        assert its[name].dtype == theirs[name].dtype
    about, original = (json.loads((path / "snapshot.json").read_text()) for path in (out, newest))
    assert about.pop("sigma_rel") == 0.15
    assert about.pop("fit_error") > 0
    assert about == {**original, "phema": []}
    assert find_snapshot(out) == out
    assert call(generate.main, out, "--seeds=0-1", "--out", tmp_path / "images")[0] == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


def test_an_earlier_time_takes_no_later_snapshots(settings, made, call, tmp_path):
    direct = walk(settings, tmp_path / "shorter", WANTED, steps=48)
    status, said, _ = call(average.main, made[0], "--sigma-rel=0.15", "--nimg=480", tmp_path / "out")
    assert status == 0
    assert "at 0.48 kimg, from 8 of 8 snapshots" in said
    assert missed(tmp_path / "out", made[0] / "snapshots" / "nimg-000000480", direct[0.15]) < 0.02
    assert read_snapshot(tmp_path / "out")["nimg"] == 480


def test_too_few_snapshots_are_told_of(folder, call, tmp_path):
    few = tmp_path / "few"
    for name in ("nimg-000000480", "nimg-000000960"):
        shutil.copytree(folder / "snapshots" / name, few / "snapshots" / name)
    status, said, _ = call(average.main, few, "--sigma-rel=0.05,0.2", tmp_path / "out")
    assert status == 0
    notes = [line for line in said.splitlines() if line.startswith("Note")]
    assert len(notes) == 1
    assert "what these 2 snapshots hold, of widths 0.05, 0.1, makes no good average of width 0.2" in notes[0]


def test_snapshots_without_averages_are_left_out(folder, call, tmp_path):
    """Such as those of an older version, or of no images yet."""
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    for number in (60, 120):
        file = mixed / "snapshots" / f"nimg-{number:09d}" / "snapshot.json"
        about = json.loads(file.read_text())
        del about["phema"]
        file.write_text(json.dumps(about))
    status, said, _ = call(average.main, mixed, "--sigma-rel=0.15", tmp_path / "out")
    assert status == 0
    assert "from 14 of 14 snapshots" in said


def test_snapshots_of_all_levels_count(settings, call, tmp_path):
    """Of a run that grew: what was not at work yet is in a directly tracked average, too."""
    growth = ["--growth.start=4", "--growth.stabilise-kimg=0.2", "--growth.fade-kimg=0.1"]
    direct = walk(settings, tmp_path / "run", (0.07, 0.2), *growth, level=lambda nimg: min((nimg + 100) // 300, 2))
    levels = [read_snapshot(path)["level"] for path in sorted((tmp_path / "run" / "snapshots").glob("nimg-*"))]
    assert sorted(set(levels)) == [0, 1, 2]
    status, said, _ = call(average.main, tmp_path / "run", "--sigma-rel=0.07,0.2", tmp_path / "out")
    assert status == 0
    assert "from 16 of 16 snapshots" in said
    newest = tmp_path / "run" / "snapshots" / "nimg-000000960"
    for width, expected in direct.items():
        off = missed(tmp_path / "out" / f"sigma-{width:.3f}", newest, expected)
        assert off < 0.02
    # The level of 16 px trained from 500 images on: (500 / 960)^(gamma + 1) of the average is older.
    share = (500 / 960) ** (phema.gamma_of(0.2) + 1)
    assert share > 0.1
    assert f"{share:.0%} of this average is of before the 16 px level trained" in said
    assert said.count("Note") == 1
    assert read_snapshot(tmp_path / "out" / "sigma-0.200")["level"] == 2


# What is refused, with nothing left behind.


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("0", "a relative width lies between 0 and 0.289, that of a uniform average, not 0"),
        ("0.05,0.3", "not 0.3"),
        ("-0.1", "not -0.1"),
        ("nan", "a relative width"),
        ("wide", "give numbers such as 0.1 or 0.05,0.1,0.15"),
        ("0.1,", "give numbers"),
        ("0.1,0.1002", "have to differ in the first three decimals"),
    ],
)
def test_what_are_no_widths(folder, refused, tmp_path, given, told):
    complaint = refused(average.main, folder, f"--sigma-rel={given}", tmp_path / "out")
    assert f"--sigma-rel {given!r}: " in complaint
    assert told in complaint
    assert list(tmp_path.iterdir()) == []


def test_no_snapshots(refused, tmp_path):
    complaint = refused(average.main, tmp_path / "run", "--sigma-rel=0.1", tmp_path / "out")
    assert f"there is no snapshot in {tmp_path / 'run'}: name the folder of a run" in complaint


def test_a_run_that_kept_no_averages(settings, refused, tmp_path):
    run = settings("", str(tmp_path))
    save_snapshot(tmp_path / "snapshots", *build(run, 16, 16, 3, 0), run, 7000, 16, 16, 3, [])
    complaint = refused(average.main, tmp_path, "--sigma-rel=0.1", tmp_path / "out")
    assert "hold no averages to make others of: they are kept by runs with ema.sigma_rel" in complaint


def test_a_time_without_a_snapshot(folder, refused, tmp_path):
    complaint = refused(average.main, folder, "--sigma-rel=0.1", "--nimg=500", tmp_path / "out")
    assert "--nimg 500: no snapshot with averages is of that; the nearest one is of 480" in complaint


def test_nothing_is_written_over(folder, refused, tmp_path):
    (tmp_path / "out").mkdir()
    for widths in ("0.1", "0.1,0.2"):
        complaint = refused(average.main, folder, f"--sigma-rel={widths}", tmp_path / "out")
        assert f"{tmp_path / 'out'} is there already: give another folder" in complaint
    assert list((tmp_path / "out").iterdir()) == []


def change(folder, tmp_path, edit):
    """A copy of the run in which one snapshot's averages are `edit`ed: a dictionary of tensors."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "snapshots" / "nimg-000000540"
    file = path / "phema-0.050.safetensors"
    edit(file)
    return copy, file


def test_a_missing_file(folder, refused, tmp_path):
    copy, file = change(folder, tmp_path, lambda file: file.unlink())
    complaint = refused(average.main, copy, "--sigma-rel=0.15", tmp_path / "out")
    assert f"cannot read {file}" in complaint
    assert not (tmp_path / "out").exists()


def test_averages_of_another_network(folder, settings, refused, tmp_path):
    other = tmp_path / "other"
    walk(settings, other, (), "--network.w-dim=6", steps=6)
    theirs = other / "snapshots" / "nimg-000000060" / "phema-0.050.safetensors"
    copy, file = change(folder, tmp_path, lambda file: shutil.copy(theirs, file))
    complaint = refused(average.main, copy, "--sigma-rel=0.15", tmp_path / "out")
    assert f"{file} has other parameters than" in complaint
    assert not (tmp_path / "out").exists()


def test_averages_that_are_not_of_the_generator_beside_them(folder, settings, refused, tmp_path):
    other = tmp_path / "other"
    walk(settings, other, (), "--network.w-dim=6", steps=6)
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy" / "snapshots").glob("nimg-*"):
        for width in STORED:
            name = f"phema-{width:.3f}.safetensors"
            shutil.copy(other / "snapshots" / "nimg-000000060" / name, path / name)
    complaint = refused(average.main, tmp_path / "copy", "--sigma-rel=0.15", tmp_path / "out")
    assert "are not of the generator there: the snapshot is damaged" in complaint
    assert not (tmp_path / "out").exists()


def test_help(call):
    status, out, _ = call(average.main, "--help")
    assert status == 0
    assert "--sigma-rel" in out
