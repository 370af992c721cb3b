"""`styleloom bench`: how fast ops, training phases and data are, against what this machine reaches in the same run."""

import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from styleloom.ops import build
from styleloom.ops.memory import keep_freed_memory
from styleloom.scripts import bench_data, bench_levels, bench_model, bench_ops, bench_peers, bench_plan, bench_ranks
from styleloom.scripts.bench_data import Data
from styleloom.scripts.bench_levels import Levels
from styleloom.scripts.bench_model import NOT_KEPT
from styleloom.scripts.bench_plan import Cluster
from styleloom.scripts.bench_ranks import Ranks
from styleloom.scripts.bench_show import Row, Table, line, number, progress, text, titles
from styleloom.scripts.cli import parse, run
from styleloom.training.config import PRESETS, Run, StyleGAN2Network
from styleloom.training.networks.growing import start_size

Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]

_BUDGET = 0.5  # seconds of repetitions
_BATCH = {"cpu": 4, "cuda": 32}


@dataclass(frozen=True)
class Ops:
    """Times each op, path, dtype and layout beside a copy of the same bytes, at the shapes of StyleGAN2.

    A copy moves as many bytes as the op has to: what is read and what is written, both counted. Convolutions are held
    against a product of matrices, by the plain formulation's FLOPs (a path may need fewer, and come out above 100%).
    """

    device: Device = "auto"
    """auto: the GPU, if there is one."""
    dtypes: tuple[Precision, ...] = ()
    """By default fp32 and bf16, and on a GPU fp16."""
    resolutions: tuple[int, ...] = (256, 1024)
    """Of the networks whose levels 16, R / 4 and R are measured."""
    quick: bool = False
    """Only the two shapes of the ops' targets: [4, 64, 128, 128] and [4, 512, 16, 16]."""
    seconds: float = _BUDGET
    """For the repetitions of a pass in all its formulations; each has 5 at least."""
    batch: int = 0
    """Images at 256 px, fewer at larger sizes; 0: 4 on the CPU, 32 on a GPU."""
    threads: int = 0
    """Threads of the CPU; 0: as torch has it."""
    json: Path | None = None
    """A file for all rows and the machine's data; - for stdout, without the table."""


@dataclass(frozen=True)
class Model:
    """Times the phases of training on random images, and an iteration with lazy phases averaged in.

    Without data set and averaging. FLOPs are those of the plain formulation. Several resolutions, precisions or
    formulations are measured in a process each. With --levels: networks that grow, at each size; otherwise all are
    measured at their full size. With --ranks: training as it is, on several processes. With --plan: nothing is
    measured, but a cluster calculated.
    """

    preset: str | None = None
    """Take network, recipe, batch and precision from a preset, such as stylegan2-256."""
    resolution: tuple[int, ...] = ()
    """Width and height in px; by default the preset's, or 256."""
    batch: int | None = None
    """Images of an iteration; without preset 4."""
    precision: tuple[Precision, ...] = ()
    """Of the top four levels of both networks; by default the preset's, or fp32."""
    channel_base: int | None = None
    """Channels times resolution; without preset 16384."""
    mapping_layers: int | None = None
    """Layers of the mapping network; without preset 2."""
    device: Device = "auto"
    """auto: the GPU, if there is one."""
    threads: int = 0
    """Threads of the CPU; 0: as torch has it."""
    rounds: int = 3
    """Runs of each phase in a process, after a first one; the fastest counts."""
    compare: Literal["plain"] | None = None
    """Measure the plain formulation (STYLELOOM_OPS=reference) in turns with ours, on the CPU also without keeping
    freed memory as ours does, and print the ratios."""
    memory: Literal["kept", "default"] = "kept"
    """What becomes of memory that is freed on the CPU: kept for the next tensors, as in training, or as the system
    has it."""
    growing: Annotated[Levels, tyro.conf.OmitArgPrefixes] = field(default_factory=Levels)
    several: Annotated[Ranks, tyro.conf.OmitArgPrefixes] = field(default_factory=Ranks)
    plan: bool = False
    """Calculate from assumptions (--cluster.*) how it scales on `gpus` GPUs; without data and without measuring."""
    gpus: tuple[int, ...] = (8, 64, 512)
    """Of the plan."""
    cluster: Cluster = field(default_factory=Cluster)
    json: Path | None = None
    """A file for all rows and the machine's data; - for stdout, without the table."""


Commands = (
    Annotated[Ops, tyro.conf.subcommand("ops")]
    | Annotated[Model, tyro.conf.subcommand("model")]
    | Annotated[Data, tyro.conf.subcommand("data")]
)


def main(args: Sequence[str]) -> int | None:
    options: Ops | Model | Data = parse(
        Commands, args, "bench", description="Measures the ops, training phases, or reading data, on this machine.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )  # fmt: skip
    file = options.json
    if file is not None and str(file) != "-" and not file.resolve().parent.is_dir():
        raise ValueError(f"--json {file}: there is no folder {file.parent}")
    match options:
        case Ops():
            found = ops(options)
        case Model():
            found = model(options)
        case Data():
            found = data(options)
    if file is not None:
        written = json.dumps(found, indent=1) + "\n"
        sys.stdout.write(written) if str(file) == "-" else file.write_text(written)
    return 0


# bench ops


def ops(options: Ops) -> dict[str, Any]:
    at_least(batch=options.batch, threads=options.threads, seconds=options.seconds)
    device = choose(options.device)
    cases = bench_ops.cases([] if options.quick else options.resolutions, options.batch or _BATCH[device.type])
    dtypes = options.dtypes or (("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16"))
    facts = begin(device, options.threads, keep=True)
    ceiling = measure_ceiling(dtypes, device, _BUDGET)
    quiet = str(options.json) == "-"
    if not quiet:
        print("\n".join([*describe(facts, ceiling), "", titles(OPS_TABLE)]), flush=True)
    rows: list[Row] = []
    total = len(cases) * len(dtypes) * len(bench_ops.LAYOUTS)
    with progress(total, "measuring") as bar:
        for found in bench_ops.measure(cases, dtypes, device, ceiling["matrix"], options.seconds):
            rows += found
            bar.update()
            if not quiet:
                bar.write("\n".join(line(OPS_TABLE, row) for row in found), file=sys.stdout)
    return {"machine": facts, "ceiling": ceiling, "rows": rows}


def measure_ceiling(dtypes: Sequence[str], device: torch.device, budget: float) -> dict[str, Any]:
    """What a copy and a product of matrices reach."""
    matrix = {name: bench_ops.matrix_rate(bench_ops.DTYPES[name], device, budget) for name in dtypes}
    return {"copy": bench_ops.copy_rates(device, budget), "matrix": matrix}


# bench model


def model(options: Model) -> dict[str, Any]:
    at_least(threads=options.threads, rounds=options.rounds - 1, ranks=options.several.ranks, kimg=options.growing.kimg)
    device, runs = choose(options.device), read_runs(options)
    quiet = str(options.json) == "-"
    if options.several.ranks or options.plan or options.growing.levels:
        found, lines = (_levels if options.growing.levels else _several)(options, runs, device)
        if not quiet:
            print("\n".join(lines))
        return found
    if len(runs) == 1 and options.compare is None:
        found = _measure_one(options, *runs[0], device)
    else:
        found = _measure_many(options, runs, device)
    if not quiet:
        rows = "\n".join(line(bench_model.TABLE, row) for row in found["rows"])
        print("\n".join([*describe(found["machine"], found["ceiling"]), "", titles(bench_model.TABLE), rows]))
        for ratio in found.get("ratios", []):
            print(bench_model.describe_ratio(ratio))
    return found


def read_runs(options: Model) -> list[tuple[int, Run]]:
    """(width and height, settings) of each resolution and precision. Raises ValueError if there are no such runs."""
    if options.preset is None:
        ranks = 1 if options.several.weak else max(options.several.ranks, 1)
        base = Run(batch=4 * ranks, network=StyleGAN2Network(channel_base=16384, mapping_layers=2))
    elif options.preset in PRESETS:
        base = PRESETS[options.preset]
    else:
        raise ValueError(f"no preset {options.preset!r}; there are {', '.join(PRESETS)}")
    named = re.search(r"-(\d+)$", base.preset)
    if not (options.resolution or options.preset is None or named):
        raise ValueError(f"the preset {base.preset} is for no particular size: give --resolution as well")
    resolutions = options.resolution or (int(named[1]) if named else 256,)
    for resolution in resolutions:
        start_size(resolution, resolution)  # raises
    settings = base.model_dump()
    settings["batch"] = base.batch if options.batch is None else options.batch
    for name in ("channel_base", "mapping_layers"):
        value = getattr(options, name)
        if value is not None and name not in settings["network"]:
            raise ValueError(f"--{name.replace('_', '-')}: networks of kind {base.network.kind} have none")
        settings["network"] |= {} if value is None else {name: value}
    settings |= bench_levels.settings(options.growing, base, options.batch, max(resolutions))
    return [
        (resolution, Run.model_validate(settings | {"precision": precision}))
        for resolution in resolutions
        for precision in options.precision or (base.precision,)
    ]


def _measure_one(options: Model, size: int, its: Run, device: torch.device) -> dict[str, Any]:
    facts = begin(device, options.threads, keep=options.memory == "kept")
    ceiling = measure_ceiling([its.precision], device, _BUDGET)
    with progress(None, "measuring") as bar:
        rows = bench_model.measure(its, size, device, options.rounds, ceiling["matrix"][its.precision], bar)
    formulation = "plain" if facts["ops"] == "reference" else "ours"
    if device.type == "cpu" and not facts["memory_kept"]:
        formulation += NOT_KEPT
    where = {"resolution": size, "precision": its.precision, "formulation": formulation}
    return {
        "machine": facts,
        "ceiling": ceiling,
        "settings": its.model_dump(mode="json"),
        "rows": [where | row for row in rows],
    }


def _levels(options: Model, runs: Sequence[tuple[int, Run]], device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """What --levels found, and the lines that show it. Several sizes are measured in a child each."""
    if len(runs) > 1 or options.compare or options.memory != "kept" or options.several.ranks or options.plan:
        raise ValueError(
            "--levels takes one resolution and one precision, without --compare, --memory, --ranks and --plan"
        )
    (size, its), growing = runs[0], options.growing
    sizes = bench_levels.sizes(growing, its, size)
    if len(sizes) == 1:
        found = [_measure_level(options, size, its, sizes[0], device)]
    else:
        arguments = _arguments(options, size, its, device, "kept")
        found = bench_levels.measure_in_children(arguments, growing, its.growth.start, sizes)
    whole = bench_levels.together(found, its.precision, complete=not growing.sizes)
    lines = [*describe(whole["machine"], whole["ceiling"]), ""]
    return whole, lines + bench_levels.describe(whole, growing, options.batch)


def _measure_level(options: Model, size: int, its: Run, px: int, device: torch.device) -> dict[str, Any]:
    facts = begin(device, options.threads, keep=True)
    ceiling = measure_ceiling([its.precision], device, _BUDGET)
    with progress(None, "measuring") as bar:
        rows = bench_levels.measure(its, size, px, device, options.rounds, ceiling["matrix"][its.precision], bar)
    return {"machine": facts, "ceiling": ceiling, "settings": its.model_dump(mode="json"), "rows": rows}


def _several(options: Model, runs: Sequence[tuple[int, Run]], device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """What --ranks or --plan found, and the lines that show it."""
    if len(runs) > 1 or options.compare or options.memory != "kept":
        raise ValueError("--ranks and --plan take one resolution and one precision, without --compare and --memory")
    (size, its), several, threads = runs[0], options.several, options.threads or 1
    if options.plan:
        bench_plan.check(options.gpus, options.cluster)
        rows = bench_plan.plan(its, size, options.gpus, options.cluster)
        found = {"settings": its.model_dump(mode="json"), "cluster": asdict(options.cluster), "rows": rows}
        return found, bench_plan.describe_plan(found)
    if several.ranks < 2:
        raise ValueError(f"--ranks {several.ranks}: they are compared with one process, so it takes 2 at least")
    if device.type == "cuda" and several.ranks > torch.cuda.device_count():
        raise ValueError(f"--ranks {several.ranks}: there are {torch.cuda.device_count()} GPUs")
    facts = begin(device, threads, keep=False)
    found = {"machine": facts} | bench_ranks.measure(several, its, size, device, threads, options.rounds)
    return found, bench_ranks.describe(found)


def _measure_many(options: Model, runs: Sequence[tuple[int, Run]], device: torch.device) -> dict[str, Any]:
    """In children; with --compare twice each, in turns."""
    ways = {"ours": ("kept", {})}
    if options.compare:
        if build.path(device.type) == "reference":
            raise ValueError("--compare plain: the plain formulation is all there is here (see styleloom doctor)")
        reference = {"STYLELOOM_OPS": "reference"}
        ways |= {"plain": ("kept", reference)}
        ways |= {f"plain{NOT_KEPT}": ("default", reference)} if device.type == "cpu" else {}
    elif options.memory == "default":
        ways = {f"ours{NOT_KEPT}": ("default", {})}
    repeats = 2 if options.compare else 1
    found, ratios = [], []
    with progress(len(runs) * len(ways) * repeats, "configurations") as bar:
        for size, its in runs:
            commands = {
                (size, its.precision, way): (_arguments(options, size, its, device, memory), environment)
                for way, (memory, environment) in ways.items()
            }
            measured: dict[tuple[Any, ...], list[dict[str, Any]]] = {key: [] for key in commands}
            for key, one in bench_model.in_children(commands, repeats):
                measured[key].append(one)
                bar.update()
            together = {way: bench_model.join(measured[size, its.precision, way], its.precision) for way in ways}
            found += together.values()
            if options.compare:
                ratios.append(bench_model.compare({way: one["rows"][-1] for way, one in together.items()}))
    matrix = {its.precision: max(one["ceiling"]["matrix"].get(its.precision, 0) for one in found) for _, its in runs}
    return {
        "machine": found[0]["machine"],
        "ceiling": found[0]["ceiling"] | {"matrix": matrix},
        "settings": [its.model_dump(mode="json") for _, its in runs],
        "rows": [row for one in found for row in one["rows"]],
        **({"ratios": ratios} if options.compare else {}),
    }


def _arguments(options: Model, size: int, its: Run, device: torch.device, memory: str) -> list[str]:
    """For a child that measures one of the runs."""
    named = {
        "preset": options.preset, "resolution": size, "batch": options.batch, "precision": its.precision,
        "channel-base": options.channel_base, "mapping-layers": options.mapping_layers, "device": device.type,
        "threads": options.threads, "rounds": options.rounds, "memory": memory,
    }  # fmt: skip
    return [word for name, value in named.items() if value is not None for word in (f"--{name}", str(value))]


# bench data


def data(options: Data) -> dict[str, Any]:
    at_least(images=options.images, workers=options.workers, rounds=options.rounds - 1)
    bench_data.check(options)
    if len(bench_data.jobs(options)) == 1:
        facts = begin(torch.device("cpu"), threads=1, keep=True) | {"libraries": bench_peers.versions()}
        found = {"machine": facts} | bench_data.measure(options)
    else:
        found = bench_data.measure_in_children(options)
    if str(options.json) != "-":
        print("\n".join(bench_data.describe(found)))
    return found


# The machine, and how things are shown.


def at_least(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"--{name} {value:g}: it has to be a number that is not negative")


def choose(name: Device) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("--device cuda: torch sees no GPU here")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def begin(device: torch.device, threads: int, keep: bool) -> dict[str, Any]:
    """Sets this process up as training does, and says what it measures on."""
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    kept = device.type == "cpu" and keep and keep_freed_memory()
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.*)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return {
        "cpu": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "ops": build.path(device.type),
        "memory_kept": kept,
    }


def describe(facts: dict[str, Any], ceiling: dict[str, Any]) -> list[str]:
    where = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} of {facts['cores']} cores' threads"
    memory = "" if facts["gpu"] else f", freed memory {'kept' if facts['memory_kept'] else 'not kept'}"
    copies = ", ".join(f"{each['gb_per_s']:.1f} of {each['bytes'] >> 20} MiB" for each in ceiling["copy"])
    matrices = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in ceiling["matrix"].items())
    return [
        f"{where}; torch {facts['torch']}; ops: {facts['ops']}{memory}",
        f"A copy, GB/s read and written: {copies}. Products of matrices, GFLOP/s: {matrices}.",
    ]


OPS_TABLE: Table = [
    ("op", -15, text("op")),
    ("shape", -15, text("shape")),
    ("dtype", -5, text("dtype")),
    ("layout", -13, text("layout")),
    ("pass", -8, text("pass")),
    ("path", -5, text("path")),
    ("ms", 9, number("seconds", ".3f", 1e3)),
    ("GB/s", 7, number("gb_per_s", ".1f")),
    ("of copy", 7, number("copy_share", ".0%")),
    ("x copy", 7, number("times_copy", ".2f")),
    ("GFLOP/s", 9, number("flop_per_s", ",.1f", 1e-9)),
    ("of matrix", 9, number("matrix_share", ".0%")),
    ("x plain", 7, number("speedup", ".2f")),
]


if __name__ == "__main__":
    run(main, "bench")
