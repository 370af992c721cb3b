"""training/health.py: what each rule sees, what becomes of it, and runs that are really in trouble."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.scripts import train
from styleloom.training import health, loop, report
from styleloom.training.checkpoint import complete
from styleloom.training.distributed import Team
from styleloom.training.health import Collapse, Diversity, Explosion, Finding, Gap, Memorised, Monitor, Saturation
from styleloom.training.trainer import Training

# Rules


@pytest.mark.parametrize(
    ("rule", "limit", "well", "wrong", "said"),
    [
        (
            Gap,
            50.0,
            {"scores/real": 30.0, "scores/fake": -20.0},
            {"scores/real": 30.5, "scores/fake": -20.0},
            "50.5 above",
        ),
        (Gap, 50.0, {"scores/real": -50.0, "scores/fake": 0.0}, {"scores/real": -60.0, "scores/fake": 9.0}, "69 below"),
        (Gap, 50.0, {"scores/real": 99.0}, {"scores/real": None, "scores/fake": 0.0}, "scores are not finite"),
        (Memorised, 0.95, {"signs/real": 0.95}, {"signs/real": 0.9512}, "mean sign of the reals' scores is 0.951"),
        (Collapse, 0.1, {"diversity": 0.1}, {"diversity": 0.0999}, "differ from one another 0.1 times"),
        (Saturation, 1.0, {"augment/p": 0.9999}, {"augment/p": 1.0}, "p is 1 and can follow no further"),
    ],
)
def test_a_rule_holds_beyond_its_limit(rule, limit, well, wrong, said):
    its = rule("warn", limit, "a lower recipe.lr")
    assert its.see(well) is None
    assert its.see({"loss/G": 1.0}) is None  # it does not apply
    seen, meaning = its.see(wrong)
    assert said in seen
    assert "--init from a snapshot before it) with a lower recipe.lr." in meaning
    assert "\n" not in seen + meaning


def norms(**phases):
    return {"px": 16, **{f"grad_norm/{phase}": norm for phase, norm in phases.items()}}


def test_an_explosion_is_measured_by_the_median_of_each_phase():
    rule = Explosion("warn", 100.0, "a lower recipe.lr")
    for i in range(9):
        assert rule.see(norms(Gmain=1.0 + i, Dr1=1e4)) is None  # 1 to 9: their median is 5
    assert rule.see(norms(Gmain=5.0, Dr1=1e9)) is None  # of fewer than 10 nothing is said
    assert rule.see(norms(Gmain=500.0, Dr1=1e4)) is None
    its = rule.see(norms(Gmain=501.0, Dr1=1e4))
    assert its is not None
    assert "phase Gmain is 501, 100 times its median so far (health.explosion_factor 100)" in its[0]
    its = rule.see(norms(Gmain=1000.0, Dr1=1e8))
    assert its is not None
    assert "phase Dr1 is 1e+08, 1e+04 times" in its[0]  # the worse one
    assert rule.see({"px": 16, "grad_norm/Gmain": None}) is None
    assert rule.see({"px": 32, "grad_norm/Gmain": 1e9}) is None  # another size: there is nothing to compare with


def test_a_rule_has_to_hold_for_some_ticks_in_a_row():
    monitor = Monitor([Memorised("warn", 0.9, "x"), Collapse("ignore", 0.1, "x")], ticks=3, nonfinite="stop")
    signs = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0]
    found = [
        monitor.see({"nimg": 1000 * (i + 1), "signs/real": sign, "diversity": 0.0}) for i, sign in enumerate(signs)
    ]
    assert [len(each) for each in found] == [0, 0, 0, 0, 0, 1, 1, 0, 0]
    assert [each[0].new for each in found if each] == [True, False]
    assert found[5][0][:2] == ("memorised", "warn")
    assert found[5][0].message.startswith(
        "the mean sign of the reals' scores is 1.000 (health.memorised_limit 0.9), in 3 "
    )
    assert ", in 3 ticks in a row up to 6 kimg: the discriminator knows" in found[5][0].message
    assert monitor.well == 9000  # a warning is no trouble


def test_what_a_monitor_knows_follows_from_the_lines():
    """As of a run that goes on."""
    rng = np.random.default_rng(0)
    lines = [
        {
            "nimg": 100 * (i + 1),
            "px": 16,
            "signs/real": float(rng.uniform(-1, 1)),
            "grad_norm/D": float(rng.lognormal(0, 2)),
        }
        for i in range(60)
    ]
    lines[20]["signs/real"] = float("nan")

    def monitor(told=()):
        rules = [Memorised("roll-back", 0.0, "x"), Explosion("warn", 2.0, "x")]
        return Monitor(rules, ticks=2, nonfinite="stop", lines=told)

    one, found = monitor(), []
    for i, line in enumerate(lines):
        finite = [{name: None if x != x else x for name, x in each.items()} for each in lines[:i]]
        resumed = monitor(json.loads(json.dumps(finite)))
        assert resumed.well == one.well
        found.append(one.see(line))
        assert resumed.see(line) == found[-1]
    assert {each.rule for its in found for each in its} == {"memorised", "explosion"}


def test_all_is_well_where_nothing_interrupts_the_run():
    rules = [Memorised("roll-back", 0.9, "x"), Collapse("warn", 0.1, "x")]
    monitor = Monitor(rules, ticks=9, nonfinite="stop")
    assert monitor.well == 0
    for nimg, line, well in [
        (10, {}, 10),
        (20, {"diversity": 0.0}, 20),
        (30, {"signs/real": 1.0}, 20),  # long before it is found
        (40, {"signs/real": 0.0}, 40),
        (50, {"skipped": 2}, 40),
        (60, {}, 60),
    ]:
        monitor.see({"nimg": nimg, **line})
        assert monitor.well == well
    patient = Monitor(rules, ticks=9, nonfinite="warn")
    patient.see({"nimg": 50, "skipped": 2})
    assert patient.well == 50


def test_stopping_comes_before_going_back_and_both_before_warning():
    a, b, c = (Finding(action, action, "") for action in ("warn", "roll-back", "stop"))
    assert health.interrupting([a, b, c]) == c
    assert health.interrupting([a, b]) == b
    assert health.interrupting([a]) is None


# Diversity


class Ranks(Team):
    """One of several ranks, whose sums are made by hand."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world
        self.sent = []

    def sum_named(self, values):
        self.sent.append(values)
        return values


def some_images(n: int = 7, size: tuple[int, int] = (40, 24)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, *size), generator=generator, dtype=torch.uint8)


def test_the_distance_is_that_of_all_pairs():
    images = some_images()
    x = torch.nn.functional.adaptive_avg_pool2d(images.double(), (16, 16)).flatten(1)
    squares = [(a - b).square().sum() for i, a in enumerate(x) for b in x[:i]]
    expected = torch.stack(squares).mean().sqrt().item()
    parts = health.moments(images[:3]) + health.moments(images[3:])
    assert health.root_mean_square_distance(parts) == pytest.approx(expected, rel=1e-6)
    assert health.root_mean_square_distance(health.moments(images[:1].expand(5, -1, -1, -1))) == pytest.approx(
        0, abs=1e-3
    )


def test_small_images_are_compared_as_they_are():
    images = some_images(2, (4, 8))
    distance = (images[0].double() - images[1].double()).square().sum().sqrt().item()
    assert health.root_mean_square_distance(health.moments(images)) == pytest.approx(distance, rel=1e-6)


@pytest.mark.parametrize(("n", "world"), [(64, 1), (7, 2), (50, 3), (2, 4)])
def test_each_image_is_looked_at_by_one_rank(n, world):
    chunks = [list(health.chunks(n, rank, world)) for rank in range(world)]
    assert sorted(i for each in chunks for chunk in each for i in chunk) == list(range(n))
    assert all(len(chunk) <= 16 and chunk[0] % chunk.step == rank for rank in range(world) for chunk in chunks[rank])


def test_diversity_is_relative_to_the_reals_of_the_level():
    images, asked = some_images(20), []

    def reals(positions):
        asked.append(positions)
        return images[list(positions)]

    def fakes(positions):
        return images[list(positions)] // 2

    diversity = Diversity(20, Team(), fakes, reals)
    assert diversity.measure(2) == {"diversity": pytest.approx(0.5, rel=0.02)}
    assert diversity.measure(2) == {"diversity": pytest.approx(0.5, rel=0.02)}
    assert asked == [range(16), range(16, 20)]  # once
    diversity.measure(3)
    assert len(asked) == 4


def test_ranks_have_the_sums_of_one():
    images = some_images(20)
    alone = Ranks(0, 1)
    Diversity(20, alone, lambda positions: images[list(positions)], lambda positions: images[list(positions)]).measure(
        0
    )
    total = 0
    for rank in range(3):
        team = Ranks(rank, 3)
        Diversity(20, team, lambda p: images[list(p)], lambda p: images[list(p)]).measure(0)
        total = total + team.sent[0]["moments"]
    torch.testing.assert_close(total, alone.sent[0]["moments"], rtol=1e-12, atol=0)


def test_reals_that_do_not_come_or_are_all_the_same_leave_it_out():
    images, come = some_images(4), [False]
    diversity = Diversity(4, Team(), lambda p: images[list(p)], lambda p: images[list(p)] if come[0] else None)
    assert diversity.measure(0) == {}
    come[0] = True
    assert diversity.measure(0) == {"diversity": 1.0}
    same = Diversity(4, Team(), lambda p: images[list(p)], lambda p: torch.zeros(len(p), 3, 8, 8, dtype=torch.uint8))
    assert same.measure(0) == {}


# Going back, on disk


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    for kind, nimgs in (("checkpoints", (20, 40, 60)), ("snapshots", (30, 60))):
        for nimg in nimgs:
            (tmp_path / kind / f"nimg-{nimg:09d}").mkdir(parents=True)
    return tmp_path


def test_going_back_renames_what_came_after(folder):
    finding = Finding("gap", "roll-back", "far apart")
    assert health.go_back(folder, 59, 66, finding) == (40, 1)
    assert names(folder / "checkpoints") == ["nimg-000000020", "nimg-000000040", "nimg-000000060.diverged-1"]
    assert names(folder / "snapshots") == ["nimg-000000030", "nimg-000000060.diverged-1"]
    line = {"from": 66, "to": 40, "rule": "gap", "message": "far apart", "rollbacks": 1}
    assert health.read_rollbacks(folder) == [line]
    assert health.go_back(folder, 0, 50, finding) == (0, 2)
    assert complete(folder / "checkpoints") == complete(folder / "snapshots") == []
    assert names(folder / "checkpoints")[0] == "nimg-000000020.diverged-2"
    assert [each["to"] for each in health.read_rollbacks(folder)] == [40, 0]


def test_nothing_that_was_set_aside_is_lost(folder):
    """A run that was killed while it went back comes there again."""
    (folder / "checkpoints" / "nimg-000000060.diverged-1").mkdir()
    (folder / "checkpoints" / "nimg-000000060.diverged-1" / "first").touch()
    health.go_back(folder, 40, 66, Finding("gap", "roll-back", ""))
    assert names(folder / "checkpoints")[2:] == ["nimg-000000060.diverged-1", "nimg-000000060.diverged-1-1"]
    assert (folder / "checkpoints" / "nimg-000000060.diverged-1" / "first").exists()


def test_a_damaged_list_of_rollbacks_is_named(tmp_path):
    assert health.read_rollbacks(tmp_path) == []
    (tmp_path / "rollbacks.jsonl").write_text('{"from": 6')
    with pytest.raises(ValueError, match=r"rollbacks\.jsonl is damaged"):
        health.read_rollbacks(tmp_path)


def test_processes_wait_until_all_see_the_folder(folder, monkeypatch):
    team, stale, slept = Team(), [["old"], ["old"]], []
    monkeypatch.setattr(team, "gather", lambda mine: [*mine, stale.pop() if stale else mine[0]])
    monkeypatch.setattr("time.sleep", slept.append)
    loop.seen_by_all(team, folder)
    assert slept == [1, 1]


# Runs in trouble. Ticks every 3 steps, checkpoints every 5 (conftest.py's TINY).

LONG = ["--total-kimg=0.096", "--keep-checkpoints=9"]
CALM = ["--score-images=0", "--health.images=8"]


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    """A data set of 32 pictures of one colour, the same for all."""
    root = tmp_path_factory.mktemp("constant")
    (root / "pictures").mkdir()
    for i in range(32):
        Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(root / "pictures" / f"{i:02d}.png")
    prepare(open_source(root / "pictures", "none"), root / "data", width=16, height=16, progress=False)
    return root / "data"


def set_lr(training: Training, lr: float) -> None:
    for optimizer in training.recipe.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr


def too_high(patch: pytest.MonkeyPatch, lr: float) -> None:
    """Gives runs that have never gone back a learning rate far too high from 44 images on."""
    step = Training.step

    def stepping(self, *args):
        if self.rollbacks == 0 and self.nimg >= 44:
            set_lr(self, lr)
        step(self, *args)

    patch.setattr(Training, "step", stepping)


def test_constant_images_are_warned_of_once(constant, arguments, capsys, tmp_path, stats):
    out = tmp_path / "out"
    more = [*CALM, "--snapshot-kimg=9", "--checkpoint-kimg=9"]
    assert train.main(arguments(constant, out, *more)) == 0
    said = capsys.readouterr().err
    assert said.startswith(
        "styleloom train: the mean sign of the reals' scores is 1.000 (health.memorised_limit 0.95), "
    )
    assert "in 3 ticks in a row up to 0.036 kimg: the discriminator knows the real images by heart" in said
    assert len(said.splitlines()) == 1
    assert [line.get("health") for line in stats(out)] == [None, None, ["memorised"], ["memorised"]]
    assert all("diversity" not in line for line in stats(out))  # the reals have none
    assert train.main(arguments(constant, out, *more, "--total-kimg=0.06")) == 0
    assert "memorised" not in capsys.readouterr().err
    assert stats(out)[-1]["health"] == ["memorised"]


def test_a_run_goes_back_with_other_latents_and_only_so_often(constant, arguments, call, tmp_path, tensors, stats):
    """Constant images are no better the second time; there is no good checkpoint but the start."""
    out = tmp_path / "out"
    more = [*CALM, "--health.memorised=roll-back", "--health.ticks=2", "--health.rollbacks=2", "--total-kimg=9"]
    status, _, err = call(train.main, *arguments(constant, out, *more))
    assert status == 1
    lines = err.splitlines()
    assert "going back to 0 kimg, and on with other latents (roll-back 1 of 2)" in lines[1]
    assert "is kept as NAME.diverged-2" in lines[3]
    assert lines[-1].startswith("There is no checkpoint before it. The run has gone back 2 times already")
    assert [(each["from"], each["to"], each["rule"]) for each in health.read_rollbacks(out)] == [
        (24, 0, "memorised")
    ] * 2
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["nimg-000000020", "nimg-000000020.diverged-1", "nimg-000000020.diverged-2"]
    tries = [tensors(out / "checkpoints" / name)["D/b16.conv0.weight"] for name in names]
    assert not any(torch.equal(a, b) for a, b in zip(tries, [*tries[1:], tries[0]], strict=True))
    assert [line["nimg"] for line in stats(out)] == [12, 24]


BACK = [*LONG, *CALM, "--health.gap=roll-back", "--health.ticks=2"]


@pytest.fixture(scope="module")
def gone_back(unlabelled, arguments, tmp_path_factory):
    """A run that diverged from 44 images on, went back, and came to its end."""
    out = tmp_path_factory.mktemp("gone_back") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        too_high(patch, 0.5)
        assert train.main(arguments(unlabelled, out, *BACK)) == 0
    return out


class Killed(BaseException):
    """Nothing that the program may catch comes after it."""


def killed():
    raise Killed


@pytest.mark.parametrize("where", ["renaming", "noted", "later"])
def test_a_run_that_went_back_goes_on_as_exactly_as_any(
    gone_back, where, unlabelled, arguments, tmp_path, monkeypatch, capsys, stats, assert_same_run
):
    """Killed in the midst of going back, or later, and gone on with."""
    (line,) = health.read_rollbacks(gone_back)
    assert (line["to"], line["rule"]) == (40, "gap")
    assert 60 <= line["from"] <= 84
    assert (gone_back / "checkpoints" / "nimg-000000060.diverged-1").is_dir()
    assert not any("gap" in told.get("health", []) for told in stats(gone_back))
    out = tmp_path / "killed"
    too_high(monkeypatch, 0.5)
    step = Training.step
    with monkeypatch.context() as patch:
        if where == "renaming":
            patch.setattr(type(out), "rename", after(1, type(out).rename, "diverged"))
        if where == "noted":
            patch.setattr(loop, "seen_by_all", lambda *_: killed())
        if where == "later":
            patch.setattr(
                Training, "step", lambda self, *a: killed() if self.rollbacks and self.nimg == 72 else step(self, *a)
            )
        with pytest.raises(Killed):
            train.main(arguments(unlabelled, out, *BACK))
    report.Report.load_state_dict({})
    capsys.readouterr()
    assert train.main(arguments(unlabelled, out, *BACK)) == 0
    assert ("going back" in capsys.readouterr().err) == (where == "renaming")
    assert health.read_rollbacks(out) == [line]
    assert_same_run(out, gone_back)


def after(calls, method, told):
    """The method, but the process is killed at a later call than that that has to do with `told`."""
    seen = []

    def counted(self, *args):
        if told in str(args[0]):
            seen.append(1)
            if len(seen) > calls:
                raise Killed
        return method(self, *args)

    return counted


def test_steps_left_out_lead_back_too(unlabelled, arguments, tmp_path, monkeypatch, capsys, stats):
    too_high(monkeypatch, 1e30)
    more = ["--health.nonfinite=roll-back", "--health.patience=4", "--health.collapse=ignore", "--health.gap=ignore"]
    assert train.main(arguments(unlabelled, tmp_path, *LONG, *CALM, *more)) == 0
    assert "were not finite 4 times in a row" in capsys.readouterr().err
    (line,) = health.read_rollbacks(tmp_path)
    assert (line["to"], line["rule"]) == (20, "nonfinite")  # at 48 it had left out steps, at 36 all was well
    assert [line["nimg"] for line in stats(tmp_path)] == [12, 24, 36, 48, 60, 72, 84, 96]
    assert all(line["nonfinite/Dmain"] == 0 for line in stats(tmp_path))


def test_a_warning_lets_steps_be_left_out(unlabelled, arguments, tmp_path, monkeypatch, capsys, stats):
    too_high(monkeypatch, 1e30)
    more = ["--health.nonfinite=warn", "--health.patience=2", "--health.collapse=ignore", "--health.gap=ignore"]
    assert train.main(arguments(unlabelled, tmp_path, *CALM, *more, "--total-kimg=0.072")) == 0
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 4  # once for each phase
    assert all("were not finite 2 times in a row" in line for line in said)
    assert stats(tmp_path)[-1]["skipped"] > 2
    assert "skipped" not in stats(tmp_path)[0]


def test_a_stop_keeps_the_last_good_checkpoint(unlabelled, arguments, tmp_path, monkeypatch, refused):
    """However few are kept."""
    too_high(monkeypatch, 0.5)
    out = tmp_path / "out"
    more = [*CALM, "--keep-checkpoints=1", "--checkpoint-kimg=0.008", "--health.gap=stop", "--health.gap-limit=5"]
    complaint = refused(train.main, *arguments(unlabelled, out, *more, "--total-kimg=9"))
    assert "that of generated images (health.gap_limit 5), in 3 ticks in a row up to 0." in complaint
    good = complete(out / "checkpoints")[0]
    assert good.name in ("nimg-000000040", "nimg-000000048")
    assert f"\nThe last checkpoint before it is {good}; --health.gap roll-back goes back there" in complaint
    assert len(complete(out / "checkpoints")) == 2


def test_an_explosion_stops_a_run(unlabelled, arguments, tmp_path, monkeypatch, refused):
    too_high(monkeypatch, 0.5)
    more = [*CALM, "--tick-kimg=0.004", "--health.explosion=stop", "--health.gap=ignore", "--health.ticks=1"]
    more += ["--health.memorised=ignore"]
    complaint = refused(train.main, *arguments(unlabelled, tmp_path / "out", *more, "--total-kimg=9"))
    assert "times its median so far (health.explosion_factor 100), in 1 tick up to 0.0" in complaint


def test_a_signal_while_it_goes_back_is_heeded(constant, arguments, tmp_path, monkeypatch, capsys):
    go_back, out = health.go_back, tmp_path / "out"
    command = arguments(constant, out, *CALM, "--health.memorised=roll-back", "--health.ticks=1")

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return go_back(*args)

    monkeypatch.setattr(health, "go_back", signalled)
    assert train.main(command) == 143
    assert "Stopped at 0 kimg and saved" in capsys.readouterr().out
    assert len(health.read_rollbacks(out)) == 1
    assert [path.name for path in complete(out / "checkpoints")] == ["nimg-000000000"]


def test_two_ranks_go_back_alike(two_ranks):
    out = two_ranks / "diverging"
    assert [json.loads((two_ranks / f"diverging-{rank}.json").read_text()) for rank in (0, 1)] == [[0, 1], [0, 1]]
    (line,) = health.read_rollbacks(out)
    assert (line["to"], line["rule"]) == (40, "gap")
    assert [path.name for path in complete(out / "checkpoints")] == [f"nimg-{n:09d}" for n in (20, 40, 60, 64)]
