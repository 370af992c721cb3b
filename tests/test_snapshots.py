"""training/snapshots.py: scores that do not depend on the number of ranks, and the best snapshot."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from styleloom.scripts import evaluate, train
from styleloom.training.checkpoint import complete, find_snapshot
from styleloom.training.distributed import Team
from styleloom.training.loop import Stop
from styleloom.training.metrics.swd import swd
from styleloom.training.snapshots import Snapshots, fakes, reals
from styleloom.training.trainer import Training


@pytest.fixture
def training(settings, unlabelled):
    return Training(settings(unlabelled, ""), Team())


def scores(out: Path) -> dict[str, float]:
    return {
        path.name: json.loads((path / "snapshot.json").read_text())["score"] for path in complete(out / "snapshots")
    }


def test_the_score_is_the_distance_of_fakes_from_reals(training):
    a, b = (torch.cat([reals(training, 2, range(24))]), fakes(training, "score", range(24)))
    expected = swd(a, b, patches=64, projections=128, normalise_by="reals")["swd/mean"]
    assert Snapshots(training).score(24) == pytest.approx(expected, rel=1e-5)
    assert expected > 10


def test_reals_are_those_of_the_stream_whoever_asks(training):
    whole = reals(training, 2, range(24))
    assert torch.equal(reals(training, 2, range(17, 24, 3)), whole[17:24:3])
    assert not torch.equal(whole[0], whole[1])


def test_fakes_stay_the_same_images_whoever_asks(training):
    whole = fakes(training, "score", range(24))
    torch.testing.assert_close(fakes(training, "score", range(5, 24, 4)), whole[5:24:4], atol=1, rtol=0)
    assert whole.dtype == torch.uint8


def test_a_score_is_of_the_same_images_in_parts_and_at_once(training, monkeypatch):
    once = Snapshots(training).score(24)
    monkeypatch.setattr("styleloom.training.snapshots.CHUNK", 5)
    assert Snapshots(training).score(24) == pytest.approx(once, rel=1e-3)


@pytest.mark.parametrize(
    ("wanted", "side", "device", "n"),
    [(-1, 16, "cpu", 512), (-1, 128, "cpu", 0), (-1, 1024, "cuda", 512), (9, 1024, "cpu", 9), (0, 16, "cuda", 0)],
)
def test_how_many_images_are_scored(training, wanted, side, device, n):
    training.recipe.G = SimpleNamespace(size=(side, side))
    training.team.device = torch.device(device)
    training.run = training.run.model_copy(update={"score_images": wanted})
    assert Snapshots(training).scored_images() == n


def test_the_best_snapshot_of_a_run_is_kept_and_found(unlabelled, arguments, tmp_path):
    out = tmp_path / "out"
    assert train.main(arguments(unlabelled, out, "--total-kimg=0.096")) == 0
    scored = scores(out)
    assert len(scored) == 4
    best = min(scored, key=scored.__getitem__)
    assert find_snapshot(out / "snapshots" / "best").name == best
    kept = tmp_path / "kept"
    assert train.main(arguments(unlabelled, kept, "--total-kimg=0.096", "--keep-snapshots=1")) == 0
    assert set(scores(kept)) == {best, max(scored)}
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [line["swd"] for line in lines if "swd" in line] == pytest.approx(list(scored.values()))


def test_a_run_is_measured_as_it_goes(unlabelled, arguments, feature_network, call, tmp_path):
    """Each snapshot by what `evaluate` says of it, the best one by that; in between by fewer images."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    measured = [f"--metrics.inception={feature_network}", f"--metrics.cache={cache}", "--metrics.names", "fid", "kid"]
    more = ["--metrics.images=24", "--metrics.tick-images=12", "--metrics.tick-kimg=0.024", "--total-kimg=0.056"]
    assert train.main(arguments(unlabelled, out, *measured, *more)) == 0
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [line["nimg"] for line in lines if "fid-12" in line] == [24, 48]
    found = [line["fid-24"] for line in lines if "fid-24" in line]
    assert found == list(scores(out).values())
    assert len(found) == 2
    assert find_snapshot(out / "snapshots" / "best").name == min(scores(out), key=scores(out).__getitem__)
    assert not list(cache.glob("fakes-*"))
    options = ["--images=24", f"--inception={feature_network}", f"--cache={cache}", "--metrics=fid,kid"]
    status, said, _ = call(evaluate.main, out, f"--data={unlabelled}", *options)
    assert status == 0
    its = {line["metric"]: line for line in map(json.loads, said.splitlines())}
    assert its["fid"]["value"] == pytest.approx(found[-1], rel=1e-4)
    assert its["kid"]["value"] == pytest.approx(lines[-1]["kid-24"], rel=1e-3)
    assert its["fid"]["network"] == "stand-in small.pt"


def test_a_network_that_is_not_there_is_told_before_training(unlabelled, arguments, refused, tmp_path):
    its = arguments(unlabelled, tmp_path / "out", f"--metrics.inception={tmp_path / 'none.pt'}")
    assert "there is no feature network" in refused(train.main, *its)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert "--metrics.inception of train" in refused(train.main, *its, "--dry-run")


def test_metrics_give_way_to_a_signal(settings, unlabelled, feature_network, tmp_path):
    its = [f"--metrics.inception={feature_network}", "--metrics.images=24", f"--metrics.cache={tmp_path}"]
    training, signals = Training(settings(unlabelled, "", *its), Team()), [True]
    snapshots = Snapshots(training, stopped=lambda: bool(signals))
    assert snapshots.scored() == (None, "fid-24")
    signals.clear()
    score, _ = snapshots.scored()
    assert score is not None
    assert score > 0


def test_snapshots_hold_the_averages_of_the_state(unlabelled, arguments, tensors, tmp_path):
    out = tmp_path / "out"
    its = ["--snapshot-kimg=0.02", "--total-kimg=0.02", "--ema.sigma-rel", "0.05", "0.2"]
    assert train.main(arguments(unlabelled, out, *its)) == 0
    (snapshot,), (state,) = complete(out / "snapshots"), complete(out / "checkpoints")
    assert json.loads((snapshot / "snapshot.json").read_text())["phema"] == [0.05, 0.2]
    shown, held = tensors(snapshot), tensors(state)
    for width in ("0.050", "0.200"):
        names = [name for name in held if name.startswith(f"G_phema-{width}/")]
        assert len(names) > 10
        assert all(torch.equal(held[name], shown[name.removeprefix("G_")]) for name in names)
    weight = "synthesis.b16.conv1.weight"
    assert not torch.equal(shown[f"phema-0.050/{weight}"], shown[f"phema-0.200/{weight}"])


def stop_at(monkeypatch, nimg: int) -> None:
    """Training is told to end while it makes the step to `nimg`."""
    step = Training.step

    def stopping(self, *args):
        step(self, *args)
        if self.nimg == nimg:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Training, "step", stopping)


def test_stopping_where_a_snapshot_was_due_keeps_its_score(unlabelled, arguments, tmp_path, monkeypatch):
    write = Snapshots.write

    def then_stop(self, *args, **options):
        write(self, *args, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Snapshots, "write", then_stop)
    out = tmp_path / "out"
    assert train.main(arguments(unlabelled, out)) == 143
    assert list(scores(out)) == ["nimg-000000028"]
    assert scores(out)["nimg-000000028"] > 0
    monkeypatch.undo()
    monkeypatch.setattr(Stop, "take", lambda self, items: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(arguments(unlabelled, out)) == 143  # at once, at the same images
    assert scores(out)["nimg-000000028"] > 0
    assert find_snapshot(out / "snapshots" / "best").name == "nimg-000000028"


def test_snapshots_made_at_stops_do_not_push_others_out(unlabelled, arguments, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = arguments(unlabelled, out, "--total-kimg=0.096", "--keep-snapshots=2", "--score-images=0")
    for nimg in (32, 60, 64):
        with monkeypatch.context() as patch:
            stop_at(patch, nimg)
            assert train.main(command) == 143
        assert max(scores(out)) == f"nimg-{nimg:09d}"  # what one was told to stop at can be seen
    assert list(scores(out)) == ["nimg-000000028", "nimg-000000056", "nimg-000000064"]
    assert train.main(command) == 0
    assert list(scores(out)) == ["nimg-000000084", "nimg-000000096"]


def test_a_signal_while_reals_do_not_come_leaves_out_the_score(training):
    training.run = training.run.model_copy(update={"score_images": 24})
    snapshots = Snapshots(training, take=lambda items: None)
    assert snapshots.score(24) is None
    snapshots.take = next
    assert isinstance(snapshots.score(24), float)


def test_no_score_if_none_is_wanted(unlabelled, arguments, tmp_path):
    assert train.main(arguments(unlabelled, tmp_path / "out", "--score-images=0")) == 0
    assert set(scores(tmp_path / "out").values()) == {None}
    assert not (tmp_path / "out" / "snapshots" / "best").exists()
