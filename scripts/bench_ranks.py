"""`styleloom bench model --ranks N`: training with several processes of this machine, beside one."""

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
from styleloom.scripts.bench_pictures import drawn
from styleloom.scripts.bench_show import Row, Table, line, number, progress, text, titles
from styleloom.training import recipes
from styleloom.training.config import Run, read_run, write_run
from styleloom.training.distributed import Team
from styleloom.training.phases import Phase
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


def cycle(phases: Sequence[Phase]) -> int:
    """Iterations after which the lazy phases have all come round."""
    return math.lcm(*(phase.interval for phase in phases))


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
        parameters = [p for _, p in recipe.networks[phase.trains].active()]
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
            row = turn(training, team, reals, saver, iterations=cycle(training.recipe.phases) if i else 1)
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


if __name__ == "__main__":
    train_in_turns(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
