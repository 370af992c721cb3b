"""scripts/bench_ranks.py: what is measured of several ranks. Never how long anything takes."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from styleloom.scripts import bench, bench_ranks
from styleloom.scripts.bench_ranks import Ranks, together
from styleloom.training import recipes
from styleloom.training.config import PRESETS, Growth, Run, StyleGAN2Network, StyleGAN2Recipe
from styleloom.training.distributed import Replicated, Team

CPU = torch.device("cpu")
SMALL = ["--resolution", "8", "--channel-base", "64", "--mapping-layers", "1", "--rounds", "1", "--device", "cpu"]
NETWORK = StyleGAN2Network(z_dim=8, w_dim=8, mapping_layers=1, channel_base=64)
RUN = Run(batch=4, network=NETWORK)


@pytest.mark.slow
def test_two_ranks_beside_one_and_two_apart(call, tmp_path):
    file = tmp_path / "ranks.json"
    status, out, err = call(bench.main, "model", *SMALL, "--ranks", 2, "--workers", 0, "--json", file)
    assert status == 0, err
    found = json.loads(file.read_text())
    assert [(row["way"], row["ranks"], row["batch"]) for row in found["rows"]] == [
        ("one", 1, 8), ("apart", 2, 8), ("together", 2, 8)
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["img_per_s"] == pytest.approx(8 / row["seconds"])
        assert row["step"] + row["data"] + row["transfer"] + row["imbalance"] == pytest.approx(1)
        assert (row["transfer"] > 0) == (row["way"] == "together")
    assert set(found["ratios"]) == {"apart", "together"}
    assert found["settings"]["batch"] == 8
    assert "together: " in out
    assert "All-reduced in an iteration: " in out


@pytest.mark.slow
def test_networks_that_grow_are_trained_at_their_full_size(call):
    arguments = ["--preset", "progressive-cpu", "--resolution", 8, "--channel-base", 64, "--batch", 8, "--rounds", 1]
    more = ["--device", "cpu", "--ranks", 2, "--workers", 0, "--json", "-"]
    status, out, err = call(bench.main, "model", *arguments, *more)
    assert status == 0, err
    found = json.loads(out)
    assert [row["phase"] for row in found["traffic"]] == ["Dmain", "Gmain"]
    assert found["settings"]["growth"]["start"] == 0


def test_a_data_set_that_is_not_there(refused, tmp_path):
    assert str(tmp_path) in refused(bench.main, "model", *SMALL, "--ranks", 2, "--data", tmp_path)


def test_a_group_says_what_ended_it(tmp_path):
    run = Run(batch=4, network=NETWORK, data={"path": str(tmp_path / "none")})  # type: ignore[arg-type]
    with bench_ranks.Group(run, 1, True, CPU, 1) as group, pytest.raises(ValueError, match="none"):
        group.turn()
    assert group.processes[0].poll() is not None


def test_ranks_end_with_the_process_that_started_them(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not bench_ranks.told(tmp_path, "turn-0", ended.pid)
    (tmp_path / "turn-0").touch()
    assert bench_ranks.told(tmp_path, "turn-0", ended.pid)


def test_who_comes_last_waits_for_nobody():
    first = {"iterations": 2, "seconds": 10.0, "cpu_seconds": 3.0, "waited": 2.0, "collectives": [1.0, 3.0]}
    second = {"iterations": 2, "seconds": 10.0, "cpu_seconds": 4.0, "waited": 0.0, "collectives": [2.0, 1.0]}
    row = together([first, second])
    assert (row["seconds"], row["cpu_seconds"]) == (5, 3.5)
    assert row["data"] == pytest.approx(0.1)
    assert row["transfer"] == pytest.approx(0.2)  # 1 + 1
    assert row["imbalance"] == pytest.approx(0.15)  # of 0 + 2 and 1 + 0 in the mean
    assert row["step"] == pytest.approx(0.55)


def test_a_turn_has_each_lazy_phase_as_often_as_training():
    def cycle(**changed: float) -> int:
        its = StyleGAN2Recipe(pl_interval=6, r1_interval=4).model_copy(update=changed)
        return bench_ranks.cycle(recipes.build(Run(batch=4, network=NETWORK, recipe=its), 8, 8, 3, [], CPU).phases)

    assert cycle() == 12
    assert cycle(pl_weight=0.0) == 4
    assert cycle(r1_gamma=0.0) == 6


@pytest.mark.parametrize("preset", ["custom", "progressive-cpu"])
def test_traffic_is_what_an_updater_sends(monkeypatch, preset):
    class Two(Team):
        """One of two processes, the other of which has the same gradients."""

        def __init__(self) -> None:
            self.world, self.rank, self.device = 2, 0, CPU

        @contextlib.contextmanager
        def together(self):
            yield

    class Done:
        def wait(self) -> None: ...

    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda x, async_op: sent.append(x.numel() * x.element_size()) or Done())
    run = PRESETS[preset].model_copy(update={"growth": Growth()}) if preset in PRESETS else RUN
    recipe = recipes.build(run, 8, 8, 3, [], CPU)
    rows = bench_ranks.traffic(recipe)
    for phase, row in zip(recipe.phases, rows, strict=True):
        sent.clear()
        updater = Replicated(Two(), recipe.networks[phase.trains], recipe.optimizers[phase.trains])
        updater.reduce([torch.zeros(shape) for shape in phase.statistics.values()])
        assert sent == [row["gradient_bytes"] + row["other_bytes"]]


def test_lazy_phases_count_in_proportion():
    rows = [
        {"gradient_bytes": 10, "other_bytes": 2, "interval": 1},
        {"gradient_bytes": 8, "other_bytes": 0, "interval": 4},
    ]
    assert bench_ranks.bytes_of_iteration(rows) == 14


def test_the_time_in_collectives_is_noted_once_each():
    team = bench_ranks.TimedTeam()
    for _ in range(2):
        with team.together():
            pass
    assert len(team.take()) == 2
    assert team.take() == []


def test_weak_keeps_the_batch_of_a_process():
    options = bench.Model(several=Ranks(ranks=3, weak=True), resolution=(8,))
    assert bench.read_runs(options)[0][1].batch == 4
    options = bench.Model(several=Ranks(ranks=3), resolution=(8,))
    assert bench.read_runs(options)[0][1].batch == 12


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--ranks", "1"], "2 at least"),
        (["--ranks", "-1"], "--ranks"),
        (["--ranks", "2", "--batch", "4"], "give another --batch"),
        (["--ranks", "2", "--precision", "fp32", "bf16"], "one precision"),
        (["--ranks", "2", "--compare", "plain"], "--compare"),
    ],
)
def test_mistakes(refused, arguments, what):
    assert what in refused(bench.main, "model", *SMALL, *arguments)
