"""training/loop.py: exact resume after kill -9, signals, what a run may change, what it leaves in its folder."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from styleloom.datasets.manifest import locked, read_manifest
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.stream import batches
from styleloom.scripts import generate, train
from styleloom.training import report
from styleloom.training.checkpoint import complete
from styleloom.training.config import read_run
from styleloom.training.distributed import Team
from styleloom.training.trainer import Training

LONG = ["--total-kimg=0.096", "--keep-checkpoints=9"]  # 24 steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory, unlabelled, arguments):
    """A run of 24 steps in one go."""
    out = tmp_path_factory.mktemp("loop") / "whole"
    assert train.main(arguments(unlabelled, out, *LONG)) == 0
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """The same run, to be spoilt."""
    return shutil.copytree(whole, tmp_path / "copy")


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], prefix: str) -> float:
    """The largest difference of any tensor, relative to the tensor's size."""
    names = [name for name in a if name.startswith(prefix)]
    assert names
    return max(float((a[name] - b[name]).norm() / (b[name].norm() + 1e-3)) for name in names)


# What a run leaves


def test_the_folder_of_a_run(whole, settings, unlabelled):
    entries = {path.name for path in whole.iterdir()}
    assert entries == {".lock", "run.json", "stats.jsonl", "tb", "samples", "checkpoints", "snapshots"}
    assert read_run(whole / "run.json") == settings(unlabelled, whole, *LONG)
    assert [path.name for path in complete(whole / "checkpoints")] == [f"nimg-{n:09d}" for n in (20, 40, 60, 80, 96)]
    assert [path.name for path in complete(whole / "snapshots")] == [f"nimg-{n:09d}" for n in (28, 56, 84, 96)]
    shown = ["fakes-000000000", "fakes-000000028", "fakes-000000056", "fakes-000000084", "fakes-000000096", "reals"]
    assert sorted(path.stem for path in (whole / "samples").iterdir()) == shown
    assert not list(whole.rglob("*.tmp"))


def test_a_checkpoint_holds_all_that_changes(whole, tensors):
    folder = complete(whole / "checkpoints")[-1]
    names = {path.name for path in folder.iterdir()}
    parts = {"G", "D", "G_ema", "G_phema-0.050", "G_phema-0.100", "optimizer_G", "optimizer_D", "recipe", "report"}
    assert names == {f"{part}.safetensors" for part in parts} | {"run.json", "state.json"}
    found = tensors(folder)
    assert found["recipe/pl_mean"] > 0
    assert found["G/mapping.w_avg"].abs().max() > 0
    assert not torch.equal(found["G/mapping.fc0.weight"], found["G_ema/mapping.fc0.weight"])
    # 24 steps of Gmain and 12 of Gpl; 24 of Dmain and 8 of Dr1. A phase does not step what it does not reach.
    assert found["optimizer_G/mapping.fc0.weight:step"] == 36
    assert found["optimizer_G/synthesis.b16.torgb.bias:step"] == 24
    assert found["optimizer_D/b16.conv0.weight:step"] == 32
    assert found["optimizer_D/b4.out.bias:step"] == 24
    # At 80 images a tick that began at 72 was under way.
    assert tensors(whole / "checkpoints" / "nimg-000000080")["report/loss/G"][0] == 8


def test_the_statistics_of_a_run(whole):
    lines = [json.loads(line) for line in (whole / "stats.jsonl").read_text().splitlines()]
    assert [line["nimg"] for line in lines] == [12, 24, 36, 48, 60, 72, 84, 96]
    clock = {"sec_per_kimg", "images_per_s", "data_wait", "peak_memory_gb", "seconds"}
    learned = {"loss/G", "loss/D", "loss/r1", "loss/path_length", "scores/real", "scores/fake"}
    for line in lines:
        assert line.keys() >= clock | learned
        assert line["sec_per_kimg"] * line["images_per_s"] == pytest.approx(1000)
        assert 0 <= line["data_wait"] <= 1
        assert all(line[f"grad_norm/{phase}"] > 0 for phase in ("Gmain", "Gpl", "Dmain", "Dr1"))
        assert line["diversity"] > 0
        assert line["peak_memory_gb"] > 0.05
        assert {name: x for name, x in line.items() if name.startswith("nonfinite/")} == {
            f"nonfinite/{phase}": 0 for phase in ("Gmain", "Gpl", "Dmain", "Dr1")
        }
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_tensorboard_shows_the_same(whole, stats):
    events = EventAccumulator(str(whole / "tb"), {"images": 0, "scalars": 0}).Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss/D")] == [
        (line["nimg"], line["loss/D"]) for line in stats(whole)
    ]
    assert [event.step for event in events.Images("fakes")] == [0, 28, 56, 84, 96]
    assert [event.step for event in events.Images("reals")] == [0]


def test_the_pictures_of_a_run(whole, unlabelled):
    reals, first, last = (
        Image.open(whole / "samples" / f"{name}.png") for name in ("reals", "fakes-000000000", "fakes-000000096")
    )
    assert reals.size == first.size == last.size == (8 * 64, 8 * 64)  # 8 x 8 of 16 px, 4 times as large
    assert np.asarray(first).tobytes() != np.asarray(last).tobytes()
    cell = np.asarray(reals)[:64:4, :64:4]
    assert cell.tobytes() in pictures_of(unlabelled)


def pictures_of(folder: Path) -> set[bytes]:
    images, _ = next(batches(folder, read_manifest(folder), seed=0, start=0, batch=42))
    return {image.permute(1, 2, 0).numpy().tobytes() for image in images}


# Exact resume


def test_killed_and_gone_on_with_is_the_same_as_never_killed(
    whole, unlabelled, arguments, python, kill, tmp_path, capsys, assert_same_run
):
    out = tmp_path / "killed"
    command = arguments(unlabelled, out, *LONG)
    kill(python("-m", "styleloom.scripts.train", *command), out)
    assert len(complete(out / "checkpoints")) < 5
    (out / "checkpoints" / "nimg-000000999.tmp").mkdir()  # as a kill in the midst of writing leaves it
    with open(out / "stats.jsonl", "a") as file:
        file.write('{"nimg": 9')
    assert train.main(command) == 0
    assert "Going on from" in capsys.readouterr().out
    assert_same_run(out, whole)
    assert not list(out.rglob("*.tmp"))


def test_two_processes_killed_and_gone_on_with_are_the_same_as_never_killed(two_ranks, assert_same_run):
    assert "Going on from" in (two_ranks / "stdout.txt").read_text()
    assert_same_run(two_ranks / "killed", two_ranks / "whole")


def test_it_goes_on_from_every_checkpoint_alike(copy, whole, unlabelled, arguments, assert_same_run):
    for folder in complete(copy / "checkpoints")[2:]:
        shutil.rmtree(folder)
    assert train.main(arguments(unlabelled, copy, *LONG)) == 0
    assert_same_run(copy, whole)


def test_workers_do_not_change_the_run(whole, unlabelled, arguments, tmp_path, assert_same_run):
    assert train.main(arguments(unlabelled, tmp_path / "out", *LONG, "--data.workers=2")) == 0
    assert_same_run(tmp_path / "out", whole)


def test_another_seed_is_another_run(whole, unlabelled, arguments, tmp_path, tensors):
    assert train.main(arguments(unlabelled, tmp_path / "out", "--total-kimg=0.02", "--seed=1")) == 0
    a, b = (tensors(folder / "checkpoints" / "nimg-000000020") for folder in (tmp_path / "out", whole))
    assert furthest(a, b, "G/synthesis") > 0.1


# Ranks, passes, precision


def test_two_ranks_train_the_network_of_one(two_ranks, whole, stats, tensors):
    a, b = (tensors(out / "checkpoints" / "nimg-000000020") for out in (two_ranks / "whole", whole))
    assert furthest(a, b, "G/") < 1e-3
    assert furthest(a, b, "D/") < 1e-3
    assert furthest(a, b, "G_ema/") < 1e-3
    assert furthest(a, b, "recipe/") < 1e-3
    assert furthest(a, b, "optimizer_") < 1e-2
    assert furthest(a, b, "report/loss") < 1e-3
    assert stats(two_ranks / "whole")[0] == pytest.approx(stats(whole)[0], rel=1e-3, abs=1e-4)


def test_a_run_of_two_ranks_goes_on_with_one(two_ranks, unlabelled, arguments, tmp_path, capsys, tensors):
    out = shutil.copytree(two_ranks / "whole", tmp_path / "out")
    for folder in complete(out / "checkpoints")[1:]:
        shutil.rmtree(folder)
    assert train.main(arguments(unlabelled, out, "--total-kimg=0.04")) == 0
    assert "It was written by 2 processes; now there are 1." in capsys.readouterr().out
    a, b = (tensors(run / "checkpoints" / "nimg-000000040") for run in (out, two_ranks / "whole"))
    assert furthest(a, b, "G/") < 1e-2


def test_accumulating_gradients_trains_the_same_network(unlabelled, arguments, tmp_path, tensors):
    """Groups of the minibatch standard deviation are strided, so they are the same for one pass and two."""
    for passes in (1, 2):
        assert train.main(arguments(unlabelled, tmp_path / f"{passes}", "--total-kimg=0.02", f"--passes={passes}")) == 0
    a, b = (tensors(tmp_path / f"{passes}" / "checkpoints" / "nimg-000000020") for passes in (1, 2))
    for part in ("G/", "D/", "G_ema/"):
        assert 0 < furthest(a, b, part) < 1e-3  # not 0: the sums are in another order


def test_bf16_trains(unlabelled, arguments, whole, tmp_path, tensors):
    assert train.main(arguments(unlabelled, tmp_path / "out", "--total-kimg=0.02", "--precision=bf16")) == 0
    a, b = (tensors(out / "checkpoints" / "nimg-000000020") for out in (tmp_path / "out", whole))
    assert all(x.dtype == torch.float32 for name, x in a.items() if not name.startswith("report/"))
    assert all(torch.isfinite(x).all() for x in a.values())
    assert 1e-5 < furthest(a, b, "G/synthesis.b16") < 0.3


def test_a_conditional_run(labelled, arguments, tmp_path, tensors):
    out = tmp_path / "out"
    assert train.main(arguments(labelled, out, "--data.labels")) == 0
    found = tensors(complete(out / "checkpoints")[-1])
    assert found["G/mapping.embed.weight"].shape == (8, 3)
    assert found["optimizer_D/mapping.embed.weight:step"] > 0
    about = json.loads((complete(out / "snapshots")[-1] / "snapshot.json").read_text())
    assert about["class_names"] == ["cat", "cow", "dog"]


# Stopping


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(
    number, status, whole, unlabelled, arguments, tmp_path, monkeypatch, capsys, stats, assert_same_tensors
):
    step, handlers = Training.step, [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def stopping(self, *args):
        step(self, *args)
        if self.nimg == 52:  # neither a tick nor a checkpoint nor a snapshot
            os.kill(os.getpid(), number)

    command = arguments(unlabelled, tmp_path / "out", *LONG)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", stopping)
        assert train.main(command) == status
    assert "Stopped at 0.052 kimg and saved" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert complete(tmp_path / "out" / "checkpoints")[-1].name == "nimg-000000052"
    assert complete(tmp_path / "out" / "snapshots")[-1].name == "nimg-000000052"
    assert train.main(command) == 0
    assert_same_tensors(*(complete(out / "checkpoints")[-1] for out in (tmp_path / "out", whole)))
    assert stats(tmp_path / "out") == stats(whole)


def test_a_real_ctrl_c_on_a_real_process(unlabelled, arguments, python, tmp_path):
    out = tmp_path / "out"
    process = python(
        "-m", "styleloom.scripts.train", *arguments(unlabelled, out, "--total-kimg=900", "--data.workers=1")
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("kimg")  # training is under way
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, said
    assert "Stopped at" in said[0]
    assert said[1] == ""


def test_a_signal_to_one_rank_stops_all(two_ranks):
    assert [json.loads((two_ranks / f"stopped-{rank}.json").read_text()) for rank in (0, 1)] == [143, 143]
    assert [path.name for path in complete(two_ranks / "stopped" / "checkpoints")] == [
        f"nimg-{n:09d}" for n in (20, 28)
    ]


def test_a_second_ctrl_c_ends_it_at_once(unlabelled, arguments, tmp_path, monkeypatch):
    def stopping(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(Training, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train.main(arguments(unlabelled, tmp_path / "out"))
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_finished_run_says_so(copy, whole, unlabelled, arguments, call):
    before = (copy / "stats.jsonl").stat().st_mtime_ns
    status, out, _ = call(train.main, *arguments(unlabelled, copy, *LONG))
    assert status == 0
    assert "is complete at 0.096 kimg; a larger --total-kimg goes on with it" in out
    assert (copy / "stats.jsonl").stat().st_mtime_ns == before


def test_a_full_disk_ends_in_a_line_and_loses_nothing(copy, unlabelled, arguments, refused, monkeypatch):
    earlier = complete(copy / "checkpoints")
    monkeypatch.setattr("styleloom.training.checkpoint.write_tensors", lambda *_: _full())
    complaint = refused(train.main, *arguments(unlabelled, copy, *LONG, "--total-kimg=0.2"))
    assert "No space left on device" in complaint
    assert "checkpoints/nimg-000000100" in complaint
    assert "free some space" in complaint
    assert complete(copy / "checkpoints") == earlier
    assert not list(copy.rglob("*.tmp"))
    monkeypatch.undo()
    assert train.main(arguments(unlabelled, copy, *LONG, "--total-kimg=0.12")) == 0


def _full():
    raise OSError(28, "No space left on device")


# Going on with other settings


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--seed=3"], "seed: 0 -> 3"),
        (["--batch=8"], "batch: 4 -> 8"),
        (["--network.w-dim=16"], "network.w_dim: 8 -> 16"),
        (["--recipe.lr=0.1", "--data.window=4"], "data.window: 2 -> 4; recipe.lr: 0.0025 -> 0.1"),
        (["--precision=bf16"], "precision: fp32 -> bf16"),
    ],
)
def test_a_protected_field_cannot_change(copy, unlabelled, arguments, refused, more, named):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    complaint = refused(train.main, *arguments(unlabelled, copy, *LONG, "--total-kimg=0.2", *more))
    assert f"holds a run with other settings: {named}.\n" in complaint
    assert "another --out" in complaint
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


def test_durations_cadences_and_paths_may_change(copy, unlabelled, arguments, tmp_path, stats):
    moved = shutil.copytree(unlabelled, tmp_path / "moved")
    more = ["--total-kimg=0.1", "--tick-kimg=1", "--checkpoint-kimg=1", "--snapshot-kimg=1", "--keep-checkpoints=1"]
    assert train.main(arguments(moved, copy, *more, "--data.workers=1", "--data.verify=size")) == 0
    assert [path.name for path in complete(copy / "checkpoints")] == ["nimg-000000100"]
    assert [line["nimg"] for line in stats(copy)][-2:] == [96, 100]
    assert read_run(copy / "run.json").total_kimg == 0.1


def test_another_data_set_is_refused(copy, labelled, arguments, refused):
    complaint = refused(train.main, *arguments(labelled, copy, *LONG, "--total-kimg=0.2"))
    assert f"the data set at {labelled} is not the one that the run in {copy} began with" in complaint


def flip(path: Path, at: int = -5) -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("fault", ["cut", "flipped", "missing"])
def test_the_checkpoint_before_a_damaged_one_serves(copy, whole, unlabelled, arguments, capsys, fault, assert_same_run):
    newest = complete(copy / "checkpoints")[-1]
    file = newest / "optimizer_D.safetensors"
    {"cut": lambda: os.truncate(file, 99), "flipped": lambda: flip(file), "missing": file.unlink}[fault]()
    assert train.main(arguments(unlabelled, copy, *LONG)) == 0
    out, err = capsys.readouterr()
    assert f"the checkpoint {newest} is damaged (" in err
    assert "optimizer_D.safetensors" in err
    assert "going back to nimg-000000080" in err
    assert f"Going on from {copy / 'checkpoints' / 'nimg-000000080'}" in out
    assert (copy / "checkpoints" / f"{newest.name}.damaged").is_dir()
    assert_same_run(copy, whole)


def test_where_all_checkpoints_are_damaged_no_new_run_begins(copy, unlabelled, arguments, refused):
    for folder in complete(copy / "checkpoints"):
        flip(folder / "G.safetensors")
    before = sorted(path for path in copy.rglob("*"))
    complaint = refused(train.main, *arguments(unlabelled, copy, *LONG))
    assert f"no checkpoint in {copy / 'checkpoints'} can be read" in complaint
    assert sorted(path for path in copy.rglob("*")) == before


# Beginning from a snapshot


def test_init_takes_the_weights_of_a_snapshot(whole, unlabelled, arguments, settings, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(Training, "step", lambda self, *args: _note(self, seen))
    out = tmp_path / "out"
    assert train.main(arguments(unlabelled, out, f"--init={whole}", "--total-kimg=0.004", "--seed=9")) == 0
    snapshot = complete(whole / "snapshots")[-1]
    generator, discriminator = (load_file(snapshot / f"{name}.safetensors") for name in ("generator", "discriminator"))
    for name, expected in (("G", generator), ("average", generator), ("D", discriminator)):
        assert seen[name].keys() == expected.keys()
        assert all(torch.equal(seen[name][key], x) for key, x in expected.items())
    # The grid at the start of the new run shows what it began from.
    assert (out / "samples" / "fakes-000000000.png").exists()


def _note(training, seen):
    networks = {**training.recipe.networks, "average": training.average}
    seen |= {name: {k: x.clone() for k, x in network.state_dict().items()} for name, network in networks.items()}
    training.nimg += training.run.batch


def test_init_without_a_snapshot_is_refused(unlabelled, arguments, refused, tmp_path):
    complaint = refused(train.main, *arguments(unlabelled, tmp_path / "out", f"--init={tmp_path}"))
    assert f"there is no snapshot in {tmp_path}" in complaint


@pytest.mark.parametrize("more", [["--ema.ramp=0.05"], ["--ema.warmup-kimg=20000"]])
def test_the_average_of_a_snapshot_is_not_forgotten_at_once(whole, unlabelled, settings, more):
    training = Training(settings(unlabelled, "", f"--init={whole}", "--ema.half-life-kimg=10", *more), Team())
    training.begin()
    before = training.average.get_parameter("mapping.fc0.weight").clone()
    training.step(*next(training.stream()))
    after, live = (x.get_parameter("mapping.fc0.weight") for x in (training.average, training.recipe.G))
    assert (after - before).norm() < 0.01 * (live - before).norm()


def test_init_from_a_snapshot_that_does_not_fit_is_refused(whole, pictures, arguments, refused, tmp_path):
    """What else does not fit is left out: see test_initialise.py."""
    prepare(open_source(pictures, "none"), tmp_path / "data", width=24, height=24, progress=False)
    complaint = refused(train.main, *arguments(tmp_path / "data", tmp_path / "out", f"--init={whole}"))
    assert "which grow from" in complaint
    assert str(complete(whole / "snapshots")[-1]) in complaint
    assert not (tmp_path / "out").exists()


# Divergence


def test_a_run_that_diverges_stops_with_a_clear_message(unlabelled, arguments, call, tmp_path, stats):
    out = tmp_path / "out"
    status, _, err = call(train.main, *arguments(unlabelled, out, "--recipe.lr=1e30", "--total-kimg=9"))
    assert status == 1
    complaint, rest = err.splitlines()[-2:]  # after warnings of what led there
    assert "were not finite 10 times in a row" in complaint
    assert "a lower recipe.lr" in complaint
    assert rest == "There is no checkpoint before it."
    assert sum(line["nonfinite/Dmain"] for line in stats(out)) > 0


@pytest.mark.parametrize(
    ("width", "height", "channels", "options"),
    [(16, 24, 4, ["--data.labels"]), (16, 24, 1, ["--precision=bf16"]), (24, 16, 3, ["--precision=fp16"])],
)
def test_rectangular_grey_and_transparent_pictures(
    tmp_path, pictures, arguments, width, height, channels, options, stats
):
    """The whole way: prepare, train, draw. (A start of 4x6 or 6x4, two more levels.)"""
    data, out, images = tmp_path / "data", tmp_path / "out", tmp_path / "images"
    source = open_source(pictures, "folders")
    prepare(source, data, width=width, height=height, channels=channels, progress=False)
    assert train.main(arguments(data, out, *options)) == 0
    assert stats(out)[-1]["nonfinite/Gmain"] == 0
    assert generate.main([str(out), "--seeds", "0-5", "--out", str(images), "--grid"]) == 0
    with Image.open(images / "seed0005.png") as image:
        assert image.size == (width, height)
        assert image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]


def test_a_second_training_in_the_same_folder_is_refused(copy, unlabelled, arguments):
    held = locked(copy / ".lock", "held by the test")
    more = [*LONG[1:], "--total-kimg=0.1"]
    with held, pytest.raises(ValueError, match="another styleloom train is running in"):
        train.main(arguments(unlabelled, copy, *more))
    assert train.main(arguments(unlabelled, copy, *more)) == 0


def test_a_batch_that_is_not_trained_on_is_not_reported(unlabelled, settings, tmp_path):
    """The one that a stopped run drops."""
    training = Training(settings(unlabelled, tmp_path / "out"), Team())
    training.begin()
    its = training.stream()
    training.step(*next(its))
    next(its)
    assert report.Report.state_dict()["data/replaced"][0] == 4
    its.close()


def test_processes_that_see_other_checkpoints_are_refused(copy, unlabelled, settings, monkeypatch):
    team = Team()
    elsewhere = (0, read_manifest(unlabelled).hash)  # what a node with a folder of its own would begin with
    training = Training(settings(unlabelled, copy, *LONG), team)
    monkeypatch.setattr(team, "gather", lambda mine: [*mine, elsewhere])
    with pytest.raises(ValueError, match="folders that all nodes share"):
        training.begin()


def test_passes_may_change_on_resume(copy, unlabelled, arguments):
    more = [*LONG[1:], "--total-kimg=0.104", "--passes=2"]
    assert train.main(arguments(unlabelled, copy, *more)) == 0
