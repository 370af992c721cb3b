"""scripts/bench_plan.py: a cluster on paper, by round numbers."""

import json

import pytest
import torch

from styleloom.scripts import bench, bench_model, bench_plan
from styleloom.scripts.bench_plan import Cluster, all_reduce, scaling
from styleloom.training import recipes
from styleloom.training.config import Run, StyleGAN2Network

CPU = torch.device("cpu")
SMALL = ["--resolution", "8", "--channel-base", "64", "--mapping-layers", "1", "--device", "cpu", "--plan"]
NETWORK = StyleGAN2Network(z_dim=8, w_dim=8, mapping_layers=1, channel_base=64)
# A cluster of round numbers: 1 TFLOP/s, 1 GB/s within a node of 2 and, all told, between nodes, no delays.
ROUND = Cluster(
    tflops=1, launch_ms=0, node_gpus=2, link_gb=1, node_gbit=8, use=1, hop_us=0, node_hop_us=0, jitter=0, backward=0.5,
    bucket_mb=1, image_bytes=1,
)  # fmt: skip
PHASE = {"phase": "G", "interval": 1, "gradient_bytes": 4_000_000, "other_bytes": 0, "flops": 8 * 10**9, "of": 8}


def changed(**values: float) -> Cluster:
    return Cluster(**{**vars(ROUND), **values})


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
    rows = bench_plan.plan(run, 8, [2, 4], ROUND)
    ways = [(row["way"], row["gpus"], row["batch"]) for row in rows]
    assert ways == [
        ("one", 1, 8), ("same batch", 2, 8), ("same batch", 4, 8), ("4 a GPU", 2, 8), ("4 a GPU", 4, 16),
        ("8 a GPU", 2, 16), ("8 a GPU", 4, 32),
    ]  # fmt: skip
    assert [row["gpus"] for row in rows if "img_per_s" not in row] == [4]
    recipe = recipes.build(run, 8, 8, 3, [], CPU)
    flops = sum(bench_model.count(phase, recipe) / phase.interval for phase in recipe.phases)
    assert rows[0]["compute"] == pytest.approx(flops / 1e12)
    assert all(row["efficiency"] < 1 for row in rows[1:] if "efficiency" in row)


def test_plan_prints_a_table_and_what_is_not_possible(call, tmp_path):
    file = tmp_path / "plan.json"
    arguments = [*SMALL, "--gpus", 2, "--cluster.node-gbit", 25, "--json", file]
    status, out, err = call(bench.main, "model", *arguments)
    assert status == 0, err
    assert "not measured" in out
    assert "Not possible: same batch on 2 GPUs leaves 2 images each" in out
    found = json.loads(file.read_text())
    assert found["cluster"]["node_gbit"] == 25
    assert [row["way"] for row in found["rows"]] == ["one", "same batch", "4 a GPU", "4 a GPU"]


@pytest.mark.parametrize("preset", ["progressive-cpu", "stylegan1-1024", "msg-256"])
def test_a_plan_of_other_kinds(call, preset):
    arguments = ["--preset", preset, "--resolution", 8, "--channel-base", 64, "--plan", "--gpus", 2, "--json", "-"]
    status, out, err = call(bench.main, "model", *arguments)
    assert status == 0, err
    assert all(row["img_per_s"] > 0 for row in json.loads(out)["rows"])


@pytest.mark.parametrize(
    ("arguments", "what"), [(["--gpus", "0"], "--gpus"), (["--cluster.tflops", "0"], "--cluster.tflops")]
)
def test_mistakes(refused, arguments, what):
    assert what in refused(bench.main, "model", *SMALL, *arguments)
