"""Runs that grow, from end to end: stages, exact resume in the midst of them, only what is at work, other ranks."""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from styleloom.datasets.manifest import read_manifest
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.scripts import generate, train
from styleloom.scripts.train import read_settings
from styleloom.training import report, schedule
from styleloom.training.checkpoint import best_snapshot, complete, load, load_generator
from styleloom.training.distributed import Replicated, Team
from styleloom.training.loop import Tick
from styleloom.training.trainer import Training

# 4 px until 0.024 kimg, fading to 8 px until 0.036, 8 px until 0.056, fading to 16 px until 0.072.
SCHEDULE = [
    "--growth.start=4", "--growth.stabilise-kimg=0.016", "--growth.fade-kimg=0.02", "--growth.batch", "4", "8", "8",
    "4", "--growth.lr", "16", "0.001",
]  # fmt: skip
COMMON = [
    "--network.z-dim=8", "--network.channel-base=64", "--network.mbstd-group=2", "--recipe.lr=0.0025", "--data.mirror",
    "--data.workers=0", "--data.window=2", "--batch=4", "--total-kimg=0.096", "--tick-kimg=0.012",
    "--checkpoint-kimg=0.004", "--snapshot-kimg=0.028", "--keep-checkpoints=99", "--score-images=24",
]  # fmt: skip
STYLE = ["--network.w-dim=8", "--network.mapping-layers=2", "--recipe.style-mixing=0.9"]
STYLEGAN2 = ["--recipe.pl-interval=2", "--recipe.r1-interval=3", *STYLE]
KINDS = {
    "progressive": ("progressive-1024", ["--growth.gpus=0"]),
    "progressive-labels": ("progressive-1024", ["--growth.gpus=0", "--data.labels"]),
    "logistic": ("progressive-cpu", ["--recipe.loss=logistic"]),
    "logistic-ada": (
        "progressive-cpu",
        ["--recipe.loss=logistic", "--augment.kind=ada", "--augment.kimg=0.05", "--augment.interval=3"],
    ),
    "stylegan1": ("stylegan1-1024", ["--growth.gpus=0", *STYLE]),
    "stylegan1-labels": ("stylegan1-1024", ["--growth.gpus=0", "--data.labels", *STYLE]),
    "stylegan2": ("stylegan2-256", [*STYLEGAN2, "--precision=fp32"]),
}
STAGES = [(0, 4, False, 8), (24, 8, True, 4), (36, 8, False, 4), (56, 16, True, 4), (72, 16, False, 4)]


@pytest.fixture(scope="module")
def command(unlabelled, labelled):
    """(kind, out, *more) -> arguments of `styleloom train`."""

    def command(kind: str, out: Path | str, *more: str) -> list[str]:
        preset, its = KINDS[kind]
        data = labelled if "--data.labels" in its else unlabelled
        return [preset, *COMMON, *SCHEDULE, *its, f"--data.path={data}", f"--out={out}", *more]

    return command


@pytest.fixture(scope="module")
def runs(command, tmp_path_factory):
    """(kind) -> the folder of a whole run; each is trained once."""
    root = tmp_path_factory.mktemp("growth")

    def run(kind: str) -> Path:
        if not (root / kind).exists():
            report.Report.load_state_dict({})  # what other tests reported in this process
            assert train.main(command(kind, root / kind)) == 0
            report.Report.load_state_dict({})
        return root / kind

    return run


def begin_at(whole: Path, nimg: int, out: Path) -> Path:
    """A copy of a run as it was at so many images, with what it wrote later."""
    shutil.copytree(whole, out)
    for folder in complete(out / "checkpoints"):
        if int(folder.name[5:]) > nimg:
            shutil.rmtree(folder)
    assert complete(out / "checkpoints")[-1].name == f"nimg-{nimg:09d}"
    return out


def test_the_stages_of_a_run(command, stats, runs):
    run = read_settings("progressive-1024", command("progressive", "x")[1:])
    expected = [(nimg, schedule.Stage([4, 8, 16].index(px), fading, batch, 0.001 if px == 16 else 0.0025))
                for nimg, px, fading, batch in STAGES]  # fmt: skip
    assert schedule.stages(run, 3, 0) == expected
    for line in stats(runs("progressive")):
        stage = [stage for nimg, stage in expected if nimg < line["nimg"]][-1]
        assert (line["px"], line["batch"], line["lr"]) == (stage.px, stage.batch, stage.lr)
        assert (line["alpha"] < 1) == stage.fading
    ends = {line["nimg"] for line in stats(runs("progressive"))}
    assert ends >= {nimg for nimg, _ in expected[1:]}  # a line is about one stage


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_grows_and_tells_it(kind, runs, stats, tensors):
    out = runs(kind)
    assert [path.name for path in complete(out / "checkpoints")] == [
        f"nimg-{nimg:09d}" for nimg in (8, 16, *range(24, 97, 4))
    ]
    assert all(np.isfinite(x) for line in stats(out) for x in line.values())
    first, last = (tensors(complete(out / "checkpoints")[i]) for i in (0, -1))
    moved = {name for name in first if name.startswith(("G/", "D/")) and not torch.equal(first[name], last[name])}
    assert any(".b16." in name for name in moved if name.startswith("G/"))
    assert any("b16." in name for name in moved if name.startswith("D/"))


@pytest.mark.parametrize("nimg", [16, 24, 28, 36, 56, 60, 72])
def test_it_goes_on_exactly_from_any_stage(nimg, runs, command, tmp_path, assert_same_run, capsys):
    """In the midst of a fade, at the first step of a stage with its new optimizers, and between."""
    out = begin_at(runs("progressive"), nimg, tmp_path / "out")
    assert train.main(command("progressive", out)) == 0
    assert f"Going on from {out}/checkpoints/nimg-{nimg:09d}" in capsys.readouterr().out
    assert_same_run(out, runs("progressive"), checkpoints=21)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "progressive"])
def test_every_kind_goes_on_exactly_in_the_midst_of_a_fade(kind, runs, command, tmp_path, assert_same_run):
    out = begin_at(runs(kind), 32, tmp_path / "out")
    assert train.main(command(kind, out)) == 0
    assert_same_run(out, runs(kind), checkpoints=21)


def test_killed_and_gone_on_with_workers_is_the_same(runs, command, python, kill, tmp_path, assert_same_run):
    out = tmp_path / "out"
    its = command("progressive", out, "--data.workers=1")
    kill(python("-m", "styleloom.scripts.train", *its), out)
    assert train.main(its) == 0
    assert_same_run(out, runs("progressive"), checkpoints=21)


def states(run: Path, nimg: int):
    return load(run / "checkpoints" / f"nimg-{nimg:09d}")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_at_work_is_held_by_the_optimizer_and_moves(kind, runs):
    whole = runs(kind)
    for name in ("G", "D"):
        held = {key.rsplit(":", 1)[0] for key in states(whole, 16)[f"optimizer_{name}"]}
        assert held
        assert not [key for key in held if "b8." in key or "b16." in key]
        early, later = states(whole, 8)[name], states(whole, 16)[name]
        moved = {key for key in early if not torch.equal(early[key], later[key])} - {"mapping.w_avg"}
        assert moved <= held
        held = {key.rsplit(":", 1)[0] for key in states(whole, 40)[f"optimizer_{name}"]}
        assert [key for key in held if "b8." in key]
        assert not [key for key in held if "b16." in key]


def test_optimizers_begin_anew_at_each_stage(runs):
    """A checkpoint at a stage's beginning holds no moments; later ones count their steps from there."""
    whole = runs("progressive")
    for nimg, *_ in STAGES[1:]:
        assert states(whole, nimg)["optimizer_G"] == states(whole, nimg)["optimizer_D"] == {}
        steps = {float(x) for key, x in states(whole, nimg + 8)["optimizer_G"].items() if key.endswith(":step")}
        assert steps == {2.0}


def test_snapshots_draw_what_the_average_was(runs, call, tmp_path):
    """At 28 images 8 px fade in, with the weight that the last iteration, from 24 on, had."""
    folder = runs("progressive") / "snapshots" / "nimg-000000028"
    generator, about = load_generator(folder)
    assert (about["level"], about["alpha"], generator.size) == (1, pytest.approx(8 / 20), (8, 8))
    status, said, _ = call(generate.main, folder, "--seeds=0-3", "--out", tmp_path, "--format=npy")
    assert status == 0
    assert "4 images of 8x8" in said
    assert "no w" in said
    images = np.load(tmp_path / "images.npy")
    assert images.shape == (4, 3, 8, 8)
    generator.grow_to(1)
    z = torch.randn(4, 8)
    whole = generator(z)
    generator.grow_to(1, about["alpha"])
    assert not torch.equal(generator(z), whole)


def test_the_best_snapshot_is_one_of_the_newests_size(runs, tmp_path):
    snapshots = tmp_path / "snapshots"
    shutil.copytree(runs("progressive") / "snapshots", snapshots, symlinks=True)
    levels, scores = {}, {}
    for path in complete(snapshots):
        about = json.loads((path / "snapshot.json").read_text())
        levels[path.name], scores[path.name] = about["level"], about["score"]
    assert list(levels.values()) == [1, 1, 2, 2]
    best = min((name for name in levels if levels[name] == 2), key=scores.__getitem__)
    assert (snapshots / "best").resolve().name == best
    for path in complete(snapshots):  # the smaller one has by far the lowest score now
        about = json.loads((path / "snapshot.json").read_text())
        about["score"] = 1e-3 if about["level"] == 1 else about["score"]
        (path / "snapshot.json").write_text(json.dumps(about))
    found = best_snapshot(snapshots)
    assert found is not None
    assert found.name == best
    newest = complete(snapshots)[-1]
    about = json.loads((newest / "snapshot.json").read_text()) | {"level": 3, "score": None}
    (newest / "snapshot.json").write_text(json.dumps(about))
    assert best_snapshot(snapshots) is None  # a size of which none is scored


def test_a_snapshot_at_the_end_of_a_stage_shows_what_was_trained(command, tmp_path, call):
    """At 24 images, where 4 px end: neither it nor the run's last checkpoint has begun with 8 px."""
    its = command("progressive", tmp_path / "out", "--total-kimg=0.024", "--snapshot-kimg=0.024")
    assert train.main(its) == 0
    (snapshot,) = complete(tmp_path / "out" / "snapshots")
    about = json.loads((snapshot / "snapshot.json").read_text())
    assert (about["nimg"], about["level"], about["alpha"]) == (24, 0, 1.0)
    assert states(tmp_path / "out", 24)["optimizer_G"] == {}


def test_a_row_of_samples_for_each_level(runs):
    samples = runs("progressive") / "samples"
    rows = [np.asarray(picture(samples / f"growth-{px:04d}.png")) for px in (4, 8, 16)]
    assert [row.shape for row in rows] == [(px, 8 * px, 3) for px in (4, 8, 16)]
    sheet = np.asarray(picture(samples / "growth.png"))
    assert sheet.shape == (3 * 128, 128 * 2 // 3 + 8 * 128, 3)
    assert np.array_equal(sheet[128:256:16, 85 : 85 + 128 : 16], rows[1][:, :8])


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def test_reals_lose_their_detail_with_the_fakes(command, settings):
    training = Training(read_settings("progressive-1024", command("progressive", "")[1:]), Team())
    training.begin()
    images, labels = next(training.stream())
    assert images.shape[2:] == (4, 4)
    training.nimg = 32  # 0.8 of the way
    training.follow()
    images, labels = next(training.stream())
    x, _ = training.to_device(images, labels)
    exact = images.float() / 127.5 - 1
    blocks = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(exact, 2), scale_factor=2)
    torch.testing.assert_close(x, blocks + (exact - blocks) * 0.8)


def test_low_levels_of_a_set_of_one_size_cost_decoding_which_is_told(command, pictures, tmp_path, capsys):
    its = command("progressive", "")[1:]
    Training(read_settings("progressive-1024", its), Team())
    assert "low levels decode images of 16x16" in capsys.readouterr().out
    prepare(
        open_source(pictures, "none"), tmp_path / "data", width=16, height=16, reduced=[(8, 8), (4, 4)], progress=False
    )
    training = Training(read_settings("progressive-1024", [*its, f"--data.path={tmp_path / 'data'}"]), Team())
    assert "low levels" not in capsys.readouterr().out
    assert [(each.manifest.width, each.reduce) for each in training.data] == [(16, 1), (8, 1), (4, 1)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_grows_on_a_gpu(kind, command, stats, tmp_path):
    assert train.main(command(kind, tmp_path / "out")) == 0
    assert all(np.isfinite(x) for line in stats(tmp_path / "out") for x in line.values())
    (last,) = stats(tmp_path / "out")[-1:]
    assert (last["px"], last["alpha"]) == (16, 1.0)


def test_the_schedule_is_protected(runs, command, refused, tmp_path):
    out = begin_at(runs("progressive"), 40, tmp_path / "out")
    complaint = refused(train.main, *command("progressive", out, "--growth.fade-kimg=0.03"))
    assert "growth.fade_kimg: 0.02 -> 0.03" in complaint


def test_a_start_beyond_the_data_set_is_refused(command, refused, tmp_path):
    complaint = refused(train.main, *command("progressive", tmp_path / "out", "--growth.start=32"))
    assert "growth.start 32 is more than the size of the images, which counts as 16" in complaint


def test_a_size_that_there_is_not_is_refused(command, refused, tmp_path):
    complaint = refused(train.main, *command("progressive", tmp_path / "out", "--growth.lr", "32", "0.1"))
    assert "there is no size 32; sizes are 4 to 16" in complaint


def test_fields_without_effect_are_told(command, capsys):
    published = ["--growth.gpus=1", "--growth.batch", "4", "8", "--total-kimg=0.02"]
    for more, told in (([], True), (["--batch=32", "--recipe.lr=0.001"], False)):
        Training(read_settings("progressive-1024", [*command("progressive", "")[1:], *published, *more]), Team())
        assert ("--batch and --recipe.lr have no effect" in capsys.readouterr().out) is told


def test_other_sets_of_smaller_sizes_are_other_data(command, pictures, refused, tmp_path):
    source, data = open_source(pictures, "none"), tmp_path / "data"
    prepare(source, data, width=16, height=16, progress=False)
    whole = read_manifest(data)
    its = [*command("progressive", tmp_path / "out", "--total-kimg=0.016"), f"--data.path={data}"]
    assert train.main(its) == 0
    shutil.rmtree(data)
    prepare(source, data, width=16, height=16, reduced=[(8, 8), (4, 4)], progress=False)
    assert read_manifest(data).hash == whole.hash
    assert "(with the sets of smaller sizes in it) is not the one" in refused(train.main, *its, "--total-kimg=0.032")


INITS = [
    ("progressive", "stylegan1", [], "is of kind progressive, this run of stylegan1"),
    ("stylegan1", "stylegan1", ["--growth.start=16"], "to 8 px only, and this run begins at 16: give --growth.start 8"),
    ("stylegan2", "stylegan2", ["--growth.start=0"], "has grown to 8 px only, and this run begins at 16: give"),
]  # fmt: skip


@pytest.mark.parametrize(("its", "mine", "more", "told"), INITS)
def test_init_from_networks_that_do_not_fit_is_refused(its, mine, more, told, runs, command, refused, tmp_path):
    snapshot = runs(its) / "snapshots" / "nimg-000000028"
    assert told in refused(train.main, *command(mine, tmp_path / "out", f"--init={snapshot}", *more))


def test_init_from_a_whole_snapshot_of_networks_that_grew(runs, command, tensors, tmp_path, capsys):
    """A StyleGAN2 discriminator that grows has more layers than one that does not."""
    snapshot = complete(runs("stylegan2") / "snapshots")[-1]
    its = command("stylegan2", tmp_path / "out", f"--init={snapshot}", "--total-kimg=0.004")
    assert train.main([*its, "--growth.start=0", f"--out={tmp_path / 'other'}"]) == 0
    training = Training(read_settings("stylegan2-256", [*its[1:], "--growth.start=16"]), Team())
    training.begin()
    assert (training.stage.px, "goes on from there" in capsys.readouterr().err) == (16, False)
    mine, its_own = training.recipe.D.state_dict(), tensors(snapshot)
    assert all(torch.equal(x, its_own[f"discriminator/{name}"]) for name, x in mine.items())
    again = Training(read_settings("stylegan2-256", its[1:]), Team())
    again.begin()
    assert "begins again at 4: --growth.start 16 goes on from there" in capsys.readouterr().err


def test_what_a_stage_held_is_let_go_of(command):
    """Moments, gradients and optimizers of the stage before; hooks are in test_worlds.py's overlap."""
    training = Training(read_settings("progressive-1024", command("progressive", "")[1:]), Team())
    training.begin()
    stream = training.stream()
    training.step(*next(stream))
    updaters = [updater for updater in training.updaters.values() if isinstance(updater, Replicated)]
    held = [weakref.ref(x) for each in updaters for its in each.optimizer.state.values() for x in its.values()]
    updaters.clear()
    held += [weakref.ref(x) for x in training.recipe.optimizers.values()]
    assert len(held) > 10
    assert all(ref() is not None for ref in held)
    training.nimg = 24
    training.follow()
    assert not [ref for ref in held if ref() is not None]
    assert not [p for network in training.recipe.networks.values() for p in network.parameters() if p.grad is not None]
    stream.close()


def test_the_time_left_is_that_to_the_next_size(command):
    training = Training(read_settings("progressive-1024", command("progressive", "")[1:]), Team())
    training.begin()
    tick = Tick(training)
    tick.worked, training.nimg = 8.0, 8  # a second an image
    assert tick.left(96) == "16s to 8 px"
    tick.start, training.nimg = 16, 24  # the end of 4 px
    assert tick.left(96) == "32s to 16 px"
    tick.start, training.nimg = 48, 56
    assert tick.left(96) == "40s"
    assert tick.left(60) == "4s"
    tick.start, training.nimg = 0, 8
    assert tick.left(20) == "12s"  # it ends before there is another size


def test_a_batch_of_a_level_has_to_divide(command, refused, tmp_path):
    complaint = refused(
        train.main, *command("progressive", tmp_path / "out", "--growth.batch", "4", "8", "8", "6", "--passes=2")
    )
    assert "batch 6" in complaint


def test_a_dry_run_measures_every_level(command, call, tmp_path):
    status, said, err = call(train.main, *command("progressive", tmp_path / "out", "--dry-run"))
    assert (status, err) == (0, "")
    for text in (
        "0 to 0.024 kimg at 4 px: 3 iterations of 8 images (8 on each process), lr 0.0025.",
        "0.024 to 0.036 kimg at 8 px, fading in: 3 iterations of 4 images",
        "0.072 to 0.096 kimg at 16 px: 6 iterations of 4 images (4 on each process), lr 0.001.",
        "At 4 px on cpu", "At 8 px on cpu", "At 16 px on cpu", "for the whole run",
    ):  # fmt: skip
        assert text in said
    assert not (tmp_path / "out").exists()


def test_msg_trains_and_goes_on_exactly(unlabelled, tmp_path, assert_same_run, stats):
    """The alternative to growing."""
    its = ["msg-256", *COMMON, *STYLEGAN2, "--precision=fp32", f"--data.path={unlabelled}", "--total-kimg=0.036"]
    assert train.main([*its, f"--out={tmp_path / 'whole'}"]) == 0
    assert all(np.isfinite(x) for line in stats(tmp_path / "whole") for x in line.values())
    out = begin_at(tmp_path / "whole", 16, tmp_path / "out")
    report.Report.load_state_dict({})
    assert train.main([*its, f"--out={out}"]) == 0
    assert_same_run(out, tmp_path / "whole", checkpoints=9, snapshots=2)
