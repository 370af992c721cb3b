"""`styleloom bench model --plan`: how training scales on a cluster, on paper."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from styleloom.scripts import bench_model
from styleloom.scripts.bench_ranks import traffic
from styleloom.scripts.bench_show import Row, Table, line, number, text, titles
from styleloom.training import recipes
from styleloom.training.config import Run


@dataclass(frozen=True)
class Cluster:
    """What is assumed of GPUs and of the links between them. None of it was measured here."""

    tflops: float = 60.0
    """10^12 FLOP/s that a GPU reaches in these networks, by the plain formulation's count: 6% of an H200's 989 in fp16.
    By its published times the official code reaches 13 to 18 on a V100 (10 to 14%), with a fifth of the bandwidth."""
    launch_ms: float = 40.0
    """Of a phase, however few its images, to start its kernels; a phase takes this or its arithmetic's time. The least
    certain estimate of all: docs/cluster.md says what follows from 12 instead."""
    node_gpus: int = 8
    """GPUs of a node."""
    link_gb: float = 300.0
    """10^9 bytes a second that a GPU sends to others of its node: two thirds of NVLink 4's 450."""
    node_gbit: float = 400.0
    """10^9 bits a second that a node sends to others: one such network card; 3200 where each GPU has its own."""
    use: float = 0.8
    """Share of `node_gbit` that an all-reduce reaches."""
    hop_us: float = 3.0
    """10^-6 s of a message to a GPU of the same node ..."""
    node_hop_us: float = 15.0
    """... and to another node, with what it takes to start it."""
    jitter: float = 0.01
    """Standard deviation of a GPU's time for a phase, of that time. All wait for the slowest."""
    backward: float = 0.6
    """Share of a phase's time in which gradients appear, behind which they can be summed."""
    bucket_mb: float = 16.0
    """As parallel.bucket_mb of a run."""
    image_bytes: float = 1.3
    """Bytes of an image in a shard for each of its pixels: PNG of photographs; JPEG has some 0.35."""


def check(gpus: Sequence[int], c: Cluster) -> None:
    """Raises ValueError for what there cannot be."""
    if min(gpus, default=0) < 1:
        raise ValueError("--gpus: at least one, each 1 or more")
    for name, value in vars(c).items():
        divides = name in ("tflops", "node_gpus", "link_gb", "node_gbit", "use", "bucket_mb")
        if not (value > 0 or (value == 0 and not divides)):
            raise ValueError(
                f"--cluster.{name.replace('_', '-')} {value:g}: it has to be {'above' if divides else 'at least'} 0"
            )


def all_reduce(size: float, gpus: int, c: Cluster) -> float:
    """Seconds in which all GPUs have the sum of `size` bytes: a reduce-scatter within each node, an all-reduce of the
    parts between nodes, an all-gather within. Between nodes a ring (2(m-1)/m of the bytes, 2(m-1) hops) or a double
    tree (2 of the bytes, 2 log2 m hops: Sanders, Speck, Träff 2009), whichever is faster."""
    inside, nodes = min(gpus, c.node_gpus), math.ceil(gpus / c.node_gpus)
    within = 2 * (inside - 1) * (size / inside / (c.link_gb * 1e9) + c.hop_us * 1e-6)
    rate, hop = c.node_gbit / 8 * 1e9 * c.use, c.node_hop_us * 1e-6
    ring = 2 * (nodes - 1) * (size / nodes / rate + hop)
    tree = 2 * size / rate + 2 * math.ceil(math.log2(nodes)) * hop
    return within + min(ring, tree)


def scaling(phases: Sequence[Row], gpus: int, batch: int, size: int, c: Cluster) -> Row:
    """An iteration of a run on a cluster.

    Args:
        phases: rows of `traffic` with the `images` of the phase in a batch of `of`, and their `flops`.
        batch: images of an iteration on all GPUs.
        size: width and height in px.

    Returns:
        Seconds of an iteration, with the gradient summed after the backward pass (`flat`) and during it (`overlap`),
        and what they consist of: arithmetic or launches (`compute`), waiting for the slowest GPU (`jitter`), sums
        (`flat_sums`, `overlap_sums`); images/s, and bytes/s that all GPUs read.
    """
    compute = jitter = flat = exposed = 0.0
    for row in phases:
        flops = row["flops"] * batch / row["of"] / gpus
        took = max(flops / (c.tflops * 1e12), c.launch_ms * 1e-3)
        small = all_reduce(row["other_bytes"], gpus, c) if gpus > 1 else 0.0
        parts = max(row["gradient_bytes"] / (c.bucket_mb * 1e6), 1)
        one = all_reduce(row["gradient_bytes"] / parts, gpus, c) if gpus > 1 else 0.0
        whole = all_reduce(row["gradient_bytes"] + row["other_bytes"], gpus, c) if gpus > 1 else 0.0
        compute += took / row["interval"]
        # The largest of n normal numbers is about sqrt(2 ln n) standard deviations above their mean.
        jitter += took * c.jitter * math.sqrt(2 * math.log(gpus)) / row["interval"]
        flat += whole / row["interval"]
        # The last bucket has no backward pass left to hide behind.
        exposed += (small + max(one, one * parts - took * c.backward)) / row["interval"]
    agree = all_reduce(24, gpus, c) if gpus > 1 else 0.0  # whether to go on, in each iteration
    seconds = {"flat": compute + jitter + flat + agree, "overlap": compute + jitter + exposed + agree}
    best = batch / min(seconds.values())
    return {
        "gpus": gpus, "batch": batch, "each": batch / gpus, "compute": compute, "jitter": jitter,
        "flat_sums": flat + agree, "overlap_sums": exposed + agree, **seconds,
        "flat_share": (flat + agree) / seconds["flat"], "overlap_share": (exposed + agree) / seconds["overlap"],
        "img_per_s": best, "read_bytes_per_s": best * size * size * c.image_bytes,
    }  # fmt: skip


def plan(run: Run, size: int, gpus: Sequence[int], c: Cluster) -> list[Row]:
    """Rows of `scaling`: at the run's batch, where it can be divided so, and with as many images a GPU as one has."""
    recipe = recipes.build(run, size, size, 3, [], torch.device("cpu"))
    phases = [
        row | {"flops": bench_model.count(phase, recipe), "of": run.batch}
        for phase, row in zip(recipe.phases, traffic(recipe), strict=True)
    ]
    group = run.network.mbstd_group
    alone = scaling(phases, 1, run.batch, size, c)
    image = sum(row["flops"] / row["of"] / row["interval"] for row in phases) / (c.tflops * 1e12)  # seconds
    launches = sum(1 / row["interval"] for row in phases) * c.launch_ms * 1e-3
    rows = [alone | {"way": "one", "efficiency": 1.0, "launch_bound_below": launches / image}]
    for way, n in itertools.product(("same batch", f"{group} a GPU", f"{run.batch} a GPU"), gpus):
        batch = {"same batch": run.batch, f"{group} a GPU": group * n}.get(way, run.batch * n)
        if batch % (n * group):
            rows.append({"way": way, "gpus": n, "batch": batch, "each": batch / n})
            continue
        row = scaling(phases, n, batch, size, c)
        rows.append(row | {"way": way, "efficiency": row["img_per_s"] / n / alone["img_per_s"]})
    return rows


PLAN_TABLE: Table = [
    ("way", -10, text("way")),
    ("GPUs", 5, text("gpus")),
    ("batch", 6, text("batch")),
    ("each", 6, number("each", ".4g")),
    ("compute ms", 10, number("compute", ".1f", 1e3)),
    ("jitter ms", 9, number("jitter", ".1f", 1e3)),
    ("sums ms", 8, number("flat_sums", ".1f", 1e3)),
    ("share", 6, number("flat_share", ".1%")),
    ("overlapped", 10, number("overlap_sums", ".1f", 1e3)),
    ("share", 6, number("overlap_share", ".1%")),
    ("img/s", 8, number("img_per_s", ",.0f")),
    ("of 1 GPU's", 10, number("efficiency", ".0%")),
    ("MB/s read", 9, number("read_bytes_per_s", ",.0f", 1e-6)),
]


def describe_plan(found: dict[str, Any]) -> list[str]:
    """The table, and lines after it."""
    rows, group = found["rows"], found["settings"]["network"].get("mbstd_group", 1)  # R3GAN has none
    lines = [titles(PLAN_TABLE), *(line(PLAN_TABLE, row) for row in rows)]
    few = rows[0]["launch_bound_below"]
    lines += [
        "Calculated from assumptions (--cluster.*), not measured.",
        f"Below {few:.1f} images a GPU its host cannot start kernels as fast as it computes: more GPUs add nothing.",
    ]
    lines += [
        f"Not possible: {row['way']} on {row['gpus']} GPUs leaves {row['each']:g} images each, which has to be a "
        f"multiple of network.mbstd_group {group}"
        for row in rows
        if "img_per_s" not in row
    ]
    return lines
