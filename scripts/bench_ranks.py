"""`styleloom bench model --ranks N`: training with several processes of this machine, beside one; `--plan`: a cluster,
on paper."""

import contextlib
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from styleloom.datasets.manifest import read_manifest, write_atomically
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.scripts import bench_model
from styleloom.scripts.bench_pictures import drawn
from styleloom.scripts.bench_show import Row, Table, line, number, progress, text, titles
from styleloom.training import recipes
from styleloom.training.config import Run, read_run, write_run
from styleloom.training.distributed import Team
from styleloom.training.saver import Saver
from styleloom.training.trainer import Training

WAYS: tuple[str, ...] = ("one", "apart", "together")
"""One process; as many as there are ranks, each training by itself on its share of the batch, which is what the machine
has for them; the ranks of one run."""
_PICTURES = 200  # of a data set that is made for the measurement
_GIVE_UP = 600.0  # seconds for one turn
_LOOK = 0.01  # seconds between two looks for a file


@dataclass(frozen=True)
class Ranks:
    """Training as it is, on several processes."""

    ranks: int = 0
    """Train with so many processes of this machine (on GPUs: one each), in turns with a single one: every phase when it
    is due, from the data set to the average. Both have the same batch; without preset that is 4 a process."""
    weak: bool = False
    """The batch is that of a process: so many have so many times as much."""
    data: Path | None = None
    """A prepared data set to read from, at its own size; by default a small one of drawn pictures, in PNG."""
    workers: int = -1
    """As data.workers of a run: processes that read, for each process that trains; -1: by the number of cores."""
    strategy: Literal["accelerate", "deepspeed"] = "accelerate"
    """As parallel.strategy of a run."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """As parallel.overlap of a run."""
    bucket_mb: float = 16.0
    """As parallel.bucket_mb of a run."""


def settings(options: Ranks, run: Run, data: Path, reduce: int, ranks: int, batch: int) -> Run:
    """The run that so many processes train. Raises ValueError if its batch cannot be divided so."""
    each, rest = divmod(batch, ranks)
    if rest or each % run.network.mbstd_group:
        raise ValueError(
            f"batch {batch} over {ranks} processes has to leave each a multiple of network.mbstd_group "
            f"{run.network.mbstd_group}: give another --batch"
        )
    parallel = {
        "strategy": options.strategy, "overlap": options.overlap, "bucket_mb": options.bucket_mb, "watchdog_s": 0,
    }  # fmt: skip
    its_data = {"path": str(data), "workers": options.workers, "reduce": reduce}
    return Run.model_validate(run.model_dump() | {"batch": batch, "data": its_data, "parallel": parallel})


def cycle(run: Run) -> int:
    """Iterations after which the lazy phases have all come round."""
    r = run.recipe
    return math.lcm(r.pl_interval if r.pl_weight else 1, 1 if r.r1_gamma == 0 else r.r1_interval)


@contextlib.contextmanager
def data_set(given: Path | None, size: int) -> Iterator[Path]:
    """The one that was given, or one that is made of drawn pictures and removed again."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="styleloom-ranks-") as work:
        source = open_source(drawn(Path(work), size, _PICTURES), "none")
        prepare(source, Path(work) / "data", width=size, height=size, progress=False)
        yield Path(work) / "data"


def measure(options: Ranks, run: Run, size: int, device: torch.device, threads: int, rounds: int) -> dict[str, Any]:
    """Trains in turns with one process, with `options.ranks` apart, and with as many together.

    Args:
        size: width and height in px.
        threads: of the CPU, for each process.
        rounds: turns of each; a turn is as many iterations as it takes until all lazy phases have come round.
    """
    n, whole = options.ranks, run.batch * (options.ranks if options.weak else 1)
    turns: dict[str, list[Row]] = {name: [] for name in WAYS}
    with contextlib.ExitStack() as stack, progress(rounds * len(WAYS), "turns") as bar:
        data = stack.enter_context(data_set(options.data, size))
        reduce = max(read_manifest(data).width // size, 1)
        its = settings(options, run, data, reduce, n, whole)
        one, part = (settings(options, run, data, reduce, 1, batch) for batch in (run.batch, whole // n))
        groups = {
            name: stack.enter_context(Group(*group, device, threads))
            for name, group in zip(WAYS, [(one, 1, True), (part, n, True), (its, n, False)], strict=True)
        }
        for group in groups.values():  # all are up before the first one is measured
            group.turn()
        for _, name in itertools.product(range(rounds), WAYS):
            turns[name].append(together(groups[name].turn()))
            bar.update()
    batches: dict[str, int] = dict(zip(WAYS, [run.batch, whole, whole], strict=True))
    rows = [{"way": name, "ranks": 1 if name == "one" else n} | rates(turns[name], batches[name]) for name in WAYS]
    ratios = {name: ratio(turns, batches, name) for name in WAYS[1:]}
    recipe = recipes.build(its, size, size, 3, [], torch.device("meta"))
    return {"settings": its.model_dump(mode="json"), "rows": rows, "ratios": ratios, "traffic": traffic(recipe)}


def together(ranks: Sequence[Row]) -> Row:
    """What all ranks of a turn measured, as one row: seconds of an iteration, and how they were spent.

    They meet in each collective. Who comes last waits for nobody, so that the shortest time among the ranks is that of
    the transfer; what the others spent there beyond it they waited for a rank that was slower: `imbalance`.
    """
    n = ranks[0]["iterations"]
    seconds = max(rank["seconds"] for rank in ranks)
    waits = zip(*(rank["collectives"] for rank in ranks), strict=True)
    transfer = sum(map(min, waits))
    spent = statistics.mean(sum(rank["collectives"]) for rank in ranks)
    data = statistics.mean(rank["waited"] for rank in ranks)
    return {
        "seconds": seconds / n, "cpu_seconds": sum(rank["cpu_seconds"] for rank in ranks) / n, "data": data / seconds,
        "transfer": transfer / seconds, "imbalance": (spent - transfer) / seconds,
        "step": (seconds - data - spent) / seconds,
    }  # fmt: skip


def rates(turns: Sequence[Row], batch: int) -> Row:
    """The fastest turn, and images a second over all ranks in it and in the median one."""
    best = min(turns, key=lambda turn: turn["seconds"])
    median = statistics.median(turn["seconds"] for turn in turns)
    return best | {
        "batch": batch, "img_per_s": batch / best["seconds"], "median_img_per_s": batch / median,
        "img_per_cpu_s": batch / min(turn["cpu_seconds"] for turn in turns),
    }  # fmt: skip


def ratio(turns: dict[str, list[Row]], batches: dict[str, int], way: str) -> Row:
    """How many times as many images a second a way has as one process: by the fastest turns, by the medians, and the
    median over pairs of turns of the same round."""
    one, its = ([batches[name] / turn["seconds"] for turn in turns[name]] for name in ("one", way))
    return {
        "fastest": max(its) / max(one), "median": statistics.median(its) / statistics.median(one),
        "rounds": statistics.median(b / a for a, b in zip(one, its, strict=True)),
    }  # fmt: skip


def describe(found: dict[str, Any]) -> list[str]:
    """The table, and lines after it."""
    lines = [titles(TABLE), *(line(TABLE, row) for row in found["rows"])]
    lines += [
        f"{way}: {its['fastest']:.2f} times the images a second of one (fastest turns; medians {its['median']:.2f}, "
        f"round by round {its['rounds']:.2f})"
        for way, its in found["ratios"].items()
    ]
    lines += [
        f"All-reduced in {row['phase']}, each {row['interval']} iterations: {row['gradient_bytes'] / 1e6:.2f} MB of "
        f"gradient, {row['other_bytes']:,} bytes besides"
        for row in found["traffic"]
    ]
    return [*lines, f"All-reduced in an iteration: {bytes_of_iteration(found['traffic']) / 1e6:.2f} MB"]


TABLE: Table = [
    ("way", -8, text("way")),
    ("ranks", 5, text("ranks")),
    ("batch", 5, text("batch")),
    ("s/iteration", 11, number("seconds", ".3f")),
    ("img/s", 8, number("img_per_s", ".2f")),
    ("median", 8, number("median_img_per_s", ".2f")),
    ("img/CPU-s", 9, number("img_per_cpu_s", ".2f")),
    ("step", 6, number("step", ".1%")),
    ("data wait", 9, number("data", ".1%")),
    ("transfer", 8, number("transfer", ".1%")),
    ("imbalance", 9, number("imbalance", ".1%")),
]


# What goes over the network.


def traffic(recipe: Any) -> list[Row]:
    """Bytes that each phase sums over the processes: its network's gradient; statistics, and for each parameter
    whether it has a gradient, which go with it."""
    rows = []
    for phase in recipe.phases:
        parameters = list(recipe.networks[phase.trains].parameters())
        size = parameters[0].element_size()
        others = sum(math.prod(shape) for shape in phase.statistics.values()) + len(parameters)
        rows.append(
            {
                "phase": phase.name,
                "interval": phase.interval,
                "gradient_bytes": sum(p.numel() for p in parameters) * size,
                "other_bytes": others * size,
            }
        )
    return rows


def bytes_of_iteration(rows: Sequence[Row]) -> float:
    """With lazy phases averaged in; without the 24 bytes by which ranks agree to go on."""
    return sum((row["gradient_bytes"] + row["other_bytes"]) / row["interval"] for row in rows)


# The processes. They are told by files in a folder that all of them see: `turn-K` to begin, `end` to end; and answer
# with `turn-K-rank-R.json`. So those whose turn it is not take no time of the machine.


class Group:
    """Processes that train at the same time, one turn after another.

    Args:
        apart: each trains `run` by itself, instead of all of them together.
        threads: of the CPU, for each.
    """

    def __init__(self, run: Run, ranks: int, apart: bool, device: torch.device, threads: int) -> None:
        self.ranks, self.turns = ranks, 0
        self.work = tempfile.TemporaryDirectory(prefix="styleloom-ranks-")
        self.folder = Path(self.work.name)
        write_run(run, self.folder / "run.json")
        self.said = (self.folder / "said.txt").open("w+")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        environment = os.environ | {
            "ACCELERATE_USE_CPU": str(device.type == "cpu").lower(), "OMP_NUM_THREADS": str(threads),
            "LOCAL_WORLD_SIZE": str(ranks),  # who trains apart has as many data workers as who trains together
        }  # fmt: skip
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable, *([] if apart else launcher),
                    "-m", "styleloom.scripts.bench_ranks", str(self.folder), str(os.getpid()), str(i),
                ],
                env=environment | ({"CUDA_VISIBLE_DEVICES": _gpu(i)} if apart and device.type == "cuda" else {}),
                stdout=self.said, stderr=subprocess.STDOUT, start_new_session=True,
            )
            for i in range(ranks if apart else 1)
        ]  # fmt: skip

    def __enter__(self) -> "Group":
        return self

    def turn(self) -> list[Row]:
        """What each rank measured. Raises ValueError, in their words, if they ended instead."""
        name = f"turn-{self.turns}"
        self.turns += 1
        (self.folder / name).touch()
        files = [self.folder / f"{name}-rank-{rank}.json" for rank in range(self.ranks)]
        give_up = time.monotonic() + _GIVE_UP
        while not all(file.exists() for file in files):
            if any(process.poll() is not None for process in self.processes) or time.monotonic() > give_up:
                raise ValueError(f"--ranks {self.ranks}: {self._complaint()}")
            time.sleep(_LOOK)
        return [json.loads(file.read_text()) for file in files]

    def _complaint(self) -> str:
        """The last line that says what is wrong: the launcher adds a report of its own."""
        self.said.seek(0)
        lines = [line.strip() for line in self.said if line.strip()]
        named = [line for line in lines if line.startswith("styleloom ") or "Error: " in line]
        ours = [line for line in named if "torch.distributed" not in line and "ChildFailedError" not in line]
        return (ours or lines or [f"nothing came for {_GIVE_UP:g} s (out of memory?)"])[-1]

    def __exit__(self, *_: object) -> None:
        (self.folder / "end").touch()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.said.close()
        self.work.cleanup()


def _gpu(i: int) -> str:
    """The i-th of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[i] if visible else str(i)


class TimedTeam(Team):
    """A team that notes how long it was in each collective: the wall time, on a GPU the time of its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        with super().together():
            start = self._mark()
            yield
            self.marks.append((start, self._mark()))

    def _mark(self) -> Any:
        """A point in time; in a stream of a GPU, where a process only enqueues what is to be done, an event."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> list[float]:
        """Seconds of each collective since the last call."""
        self.synchronize()
        marks, self.marks = self.marks, []
        if self.device.type == "cuda":
            return [start.elapsed_time(end) / 1000 for start, end in marks]
        return [end - start for start, end in marks]

    def synchronize(self) -> None:
        """Waits for what this process's GPU has to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def train_in_turns(folder: Path, parent: int, number: int) -> None:
    """One rank, or the process `number` of those that train apart: trains the run in `folder`, a turn whenever it is
    told to, while the process `parent` lives."""
    run, team = read_run(folder / "run.json"), TimedTeam()
    training = Training(run, team)
    training.begin()
    with contextlib.closing(training.stream()) as reals, Saver() as saver:
        for i in itertools.count():
            if not told(folder, f"turn-{i}", parent):
                break
            # The first turn is to get warm: all phases are due in a run's first iteration.
            row = turn(training, team, reals, saver, iterations=cycle(run) if i else 1)
            write_atomically(folder / f"turn-{i}-rank-{number + team.rank}.json", json.dumps(row).encode())
    team.close()


def told(folder: Path, name: str, parent: int) -> bool:
    """Waits for a file; False if it is the end instead."""
    while not (folder / name).exists():
        if (folder / "end").exists() or not alive(parent):
            return False
        time.sleep(_LOOK)
    return True


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def turn(training: Training, team: TimedTeam, reals: Iterator[Any], saver: Saver, iterations: int) -> Row:
    """Seconds of so many iterations of the loop, of waiting for data in them, and of each collective."""
    team.take()
    began, cpu, waited = time.perf_counter(), time.process_time(), 0.0
    for _ in range(iterations):
        start = time.perf_counter()
        batch = next(reals)
        waited += time.perf_counter() - start
        training.stopping(0, saver)
        training.step(*batch)
    collectives = team.take()
    return {
        "iterations": iterations, "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu,
        "waited": waited, "collectives": collectives,
    }  # fmt: skip


# A cluster on paper.


@dataclass(frozen=True)
class Cluster:
    """What is assumed of GPUs and of the links between them. None of it was measured here."""

    tflops: float = 60.0
    """10^12 FLOP/s that a GPU reaches in these networks, by the plain formulation's count: 6% of an H200's 989 in fp16.
    By its published times the official code reaches 13 to 18 on a V100 (10 to 14%), with a fifth of the bandwidth."""
    launch_ms: float = 40.0
    """Of a phase, however few its images, to start its kernels; a phase takes this or its arithmetic's time. On this
    CPU 20 ms do not depend on the images at 64 px (5 levels), so some 35 at 256 px (7), to which CUDA adds."""
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
        row | {"flops": bench_model.count(phase, recipe, size), "of": run.batch}
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
    rows, group = found["rows"], found["settings"]["network"]["mbstd_group"]
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


if __name__ == "__main__":
    train_in_turns(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
