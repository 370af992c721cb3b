"""scripts/bench_ranks.py: what is measured of several ranks, and a cluster on paper. Never how long anything takes."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from styleloom.scripts import bench, bench_model, bench_ranks
from styleloom.scripts.bench_ranks import Cluster, Ranks, all_reduce, scaling, together
from styleloom.training import recipes
from styleloom.training.config import Run, StyleGAN2Network, StyleGAN2Recipe
from styleloom.training.distributed import Replicated, Team

CPU = torch.device("cpu")
SMALL = ["--resolution", "8", "--channel-base", "64", "--mapping-layers", "1", "--rounds", "1", "--device", "cpu"]
NETWORK = StyleGAN2Network(z_dim=8, w_dim=8, mapping_layers=1, channel_base=64)
# A cluster of round numbers: 1 TFLOP/s, 1 GB/s within a node of 2 and, all told, between nodes, no delays.
ROUND = Cluster(
    tflops=1, launch_ms=0, node_gpus=2, link_gb=1, node_gbit=8, use=1, hop_us=0, node_hop_us=0, jitter=0, backward=0.5,
    bucket_mb=1, image_bytes=1,
)  # fmt: skip
PHASE = {"phase": "G", "interval": 1, "gradient_bytes": 4_000_000, "other_bytes": 0, "flops": 8 * 10**9, "of": 8}


def changed(**values: float) -> Cluster:
    return Cluster(**{**vars(ROUND), **values})


# Measured.


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
    recipe = StyleGAN2Recipe(pl_interval=6, r1_interval=4)
    assert bench_ranks.cycle(Run(recipe=recipe)) == 12
    assert bench_ranks.cycle(Run(recipe=recipe.model_copy(update={"pl_weight": 0.0}))) == 4
    assert bench_ranks.cycle(Run(recipe=recipe.model_copy(update={"r1_gamma": 0.0}))) == 6


def test_traffic_is_what_an_updater_sends(monkeypatch):
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
    recipe = recipes.build(Run(batch=4, network=NETWORK), 8, 8, 3, [], CPU)
    rows = bench_ranks.traffic(recipe)
    for phase, row in zip(recipe.phases, rows, strict=True):
        sent.clear()
        updater = Replicated(Two(), recipe.networks[phase.trains], recipe.optimizers[phase.trains])
        updater.reduce([torch.zeros(shape) for shape in phase.statistics.values()])
        assert sent == [row["gradient_bytes"] + row["other_bytes"]]
    assert bench_ranks.bytes_of_iteration(rows[:2]) == sent_in(rows[0]) + sent_in(rows[1]) / 4


def sent_in(row) -> int:
    return row["gradient_bytes"] + row["other_bytes"]


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


# On paper.


def test_an_all_reduce_moves_what_a_ring_moves():
    assert all_reduce(1e9, 1, ROUND) == 0
    assert all_reduce(1e9, 2, ROUND) == pytest.approx(1)  # 2 (n - 1) / n of the bytes
    # Within nodes as before; between 2 nodes each sends as much again, at the rate of the node.
    assert all_reduce(1e9, 4, ROUND) == pytest.approx(2)
    assert all_reduce(1e9, 8, ROUND) == pytest.approx(1 + 1.5)


def test_small_sums_take_the_shorter_way():
    slow = changed(node_hop_us=100)
    assert all_reduce(0, 4, slow) == pytest.approx(2e-4)  # there and back
    assert all_reduce(0, 128, slow) == pytest.approx(12e-4)  # 2 log2 64, rather than 2 * 63


def test_an_iteration_is_arithmetic_and_sums():
    one = scaling([PHASE], 1, 8, 10, ROUND)
    assert one["flat"] == one["overlap"] == one["compute"] == pytest.approx(0.008)
    assert one["img_per_s"] == pytest.approx(1000)
    assert one["read_bytes_per_s"] == pytest.approx(100_000)
    two = scaling([PHASE], 2, 8, 10, ROUND)
    assert two["compute"] == pytest.approx(0.004)
    assert two["flat_sums"] == pytest.approx(0.004, rel=1e-4)
    # Half of the backward pass's time hides 2 of the 4 ms.
    assert two["overlap_sums"] == pytest.approx(0.002, rel=1e-4)
    assert two["img_per_s"] == pytest.approx(8 / 0.006, rel=1e-4)


def test_what_cannot_be_hidden():
    fast = scaling([PHASE | {"flops": 8 * 10**12}], 2, 8, 10, ROUND)
    assert fast["overlap_sums"] == pytest.approx(0.001, rel=1e-4)  # the last of four buckets
    lazy = scaling([PHASE | {"interval": 4}], 2, 8, 10, ROUND)
    assert lazy["flat_sums"] == pytest.approx(0.001, rel=1e-4)


def test_launches_and_jitter():
    assert scaling([PHASE], 2, 8, 10, changed(launch_ms=20))["compute"] == pytest.approx(0.02)
    assert scaling([PHASE], 1, 8, 10, changed(jitter=0.1))["jitter"] == 0
    assert scaling([PHASE], 8, 64, 10, changed(jitter=0.1))["jitter"] == pytest.approx(0.0008 * 2.0393, rel=1e-3)


def test_a_plan_of_a_run():
    run = Run(batch=8, network=NETWORK)
    rows = bench_ranks.plan(run, 8, [2, 4], ROUND)
    ways = [(row["way"], row["gpus"], row["batch"]) for row in rows]
    assert ways == [
        ("one", 1, 8), ("same batch", 2, 8), ("same batch", 4, 8), ("4 a GPU", 2, 8), ("4 a GPU", 4, 16),
        ("8 a GPU", 2, 16), ("8 a GPU", 4, 32),
    ]  # fmt: skip
    assert [row["gpus"] for row in rows if "img_per_s" not in row] == [4]
    recipe = recipes.build(run, 8, 8, 3, [], CPU)
    flops = sum(bench_model.count(phase, recipe, 8) / phase.interval for phase in recipe.phases)
    assert rows[0]["compute"] == pytest.approx(flops / 1e12)
    assert all(row["efficiency"] < 1 for row in rows[1:] if "efficiency" in row)


def test_plan_prints_a_table_and_what_is_not_possible(call, tmp_path):
    file = tmp_path / "plan.json"
    arguments = [*SMALL, "--plan", "--gpus", 2, "--cluster.node-gbit", 25, "--json", file]
    status, out, err = call(bench.main, "model", *arguments)
    assert status == 0, err
    assert "not measured" in out
    assert "Not possible: same batch on 2 GPUs leaves 2 images each" in out
    found = json.loads(file.read_text())
    assert found["cluster"]["node_gbit"] == 25
    assert [row["way"] for row in found["rows"]] == ["one", "same batch", "4 a GPU", "4 a GPU"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--ranks", "1"], "2 at least"),
        (["--ranks", "-1"], "--ranks"),
        (["--ranks", "2", "--batch", "4"], "give another --batch"),
        (["--ranks", "2", "--precision", "fp32", "bf16"], "one precision"),
        (["--ranks", "2", "--compare", "plain"], "--compare"),
        (["--plan", "--gpus", "0"], "--gpus"),
        (["--plan", "--cluster.tflops", "0"], "--cluster.tflops"),
    ],
)
def test_mistakes(refused, arguments, what):
    assert what in refused(bench.main, "model", *SMALL, *arguments)
