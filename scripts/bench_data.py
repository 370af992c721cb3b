"""`styleloom bench data`: our stream beside its own decoder and beside other libraries, on the same images."""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import open_source
from styleloom.datasets.stream import batches
from styleloom.datasets.workers import default_workers
from styleloom.scripts import bench_model, bench_peers, bench_scale
from styleloom.scripts.bench_peers import OURS, PEERS, Contender, Images
from styleloom.scripts.bench_pictures import drawn, usual_count
from styleloom.scripts.bench_scale import cpu_seconds
from styleloom.scripts.bench_show import Row, Table, line, number, progress, text, titles

Part = Literal["streams", "resume", "memory", "prepare"]
Codec = Literal["jpeg", "png", "webp"]
PARTS: tuple[Part, ...] = ("streams", "resume", "memory", "prepare")

_PASS = 100_000_000  # bytes that a measurement of the raw stream reads, unless once through the set is more
_SHARDS = 6
_TURNS, _SLOW = 3, 1.3  # after so many turns only those go on that are not so many times as slow as the fastest
STAGES = ("decode", "raw", "full")
SAMPLES = (200_000, 10**6)  # of the raw stream over which memory is watched


@dataclass(frozen=True)
class Data:
    """Times decoding, the raw stream and the full stream beside other libraries, all on the same images.

    Images a second of one core's time: the best of several rounds in which they take turns, one thread, no worker
    processes. Besides: the first batch at a late position, memory over many samples, and `styleloom prepare` beside the
    work that it cannot avoid. Several configurations are measured in a process each.
    """

    resolutions: tuple[int, ...] = (256, 512, 1024)
    """Width and height in px."""
    codecs: tuple[Codec, ...] = ("jpeg", "png")
    """How images are stored."""
    images: int = 0
    """Different ones for each resolution; 0: 600 of 256 px, 300 of 512 px, 120 of 1024 px."""
    pictures: Path | None = None
    """A folder, zip or tar with your own instead of drawn ones; for the streams."""
    peers: tuple[str, ...] = ()
    """Of webdataset, zip, mosaicml-streaming and litdata; by default all that are installed."""
    workers: int = 0
    """If it is not 0: also our stream with so many processes, by the wall clock."""
    rounds: int = 12
    """Turns of each, of the clearly slower ones three; the best counts."""
    parts: tuple[Part, ...] = PARTS
    """What to measure."""
    long: bool = False
    """Memory over 10^6 samples instead of 200,000."""
    json: Path | None = None
    """A file for all rows and the machine's data; - for stdout, without the table."""


def check(options: Data) -> None:
    """Raises ValueError for what cannot be measured."""
    for name in ("resolutions", "codecs", "parts"):
        if not getattr(options, name):
            raise ValueError(f"--{name}: at least one")
    for name in options.peers:
        if name not in PEERS:
            raise ValueError(f"--peers {name}: there are {', '.join(PEERS)}")
        if reason := bench_peers.missing(name):
            raise ValueError(f"--peers {name}: {reason}")
    for resolution in options.resolutions:
        if resolution < 4:
            raise ValueError(f"--resolutions {resolution}: at least 4 px")
    if options.pictures is not None:
        open_source(options.pictures)  # raises if there are none


def jobs(options: Data) -> list[dict[str, Any]]:
    """What one process each measures, as the options that say so."""
    streams = [
        {"resolutions": resolution, "codecs": codec} for resolution in options.resolutions for codec in options.codecs
    ]
    found = []
    for part in dict.fromkeys(options.parts):
        found += [{"parts": part} | job for job in (streams if part == "streams" else [{}])]
    return found


def measure(options: Data) -> dict[str, list[Row]]:
    """The rows of each part, measured in this process."""
    found: dict[str, list[Row]] = {}
    with temporary_folder() as work:
        for part in dict.fromkeys(options.parts):
            match part:
                case "streams":
                    for resolution in options.resolutions:
                        for codec in options.codecs:
                            its = streams(options, resolution, codec, work / f"{resolution}-{codec}")
                            for key, rows in its.items():
                                found.setdefault(key, []).extend(rows)
                case "resume":
                    found["resume"] = bench_scale.resume(work / part, min(options.resolutions), options.rounds)
                case "memory":
                    found["memory"] = bench_scale.memory(work / part, min(options.resolutions), SAMPLES[options.long])
                case "prepare":
                    found["prepare"] = bench_scale.prepares(
                        work / part, options.resolutions, options.images, min(options.rounds, _TURNS)
                    )
    return found


def measure_in_children(options: Data) -> dict[str, Any]:
    """The same, each job in a process of its own; pictures are drawn once for each resolution."""
    found: dict[str, Any] = {}
    todo = jobs(options)
    with temporary_folder() as work, progress(len(todo), "configurations") as bar:
        commands = {}
        for job in todo:
            commands[tuple(job.values())] = (_arguments(options, job, work), {"TMPDIR": str(work)})
        for _, one in bench_model.in_children(commands, 1, "data"):
            found.setdefault("machine", one.pop("machine"))
            for key, rows in one.items():
                found.setdefault(key, []).extend(row for row in rows if row not in found[key])
            bar.update()
    return found


def _arguments(options: Data, job: dict[str, Any], work: Path) -> list[str]:
    """For a child that does one job."""
    named: dict[str, Any] = {"resolutions": " ".join(map(str, options.resolutions))} | job
    named |= {"images": options.images, "workers": options.workers, "rounds": options.rounds}
    words = [word for name, value in named.items() for word in (f"--{name}", *str(value).split())]
    words += ["--long"] if options.long else []
    words += ["--peers", *options.peers] if options.peers else []
    pictures = options.pictures
    if job["parts"] == "streams" and pictures is None:
        side = job["resolutions"]
        pictures = drawn(work, side, options.images or usual_count(side))
    return [*words, *(["--pictures", str(pictures.resolve())] if pictures else [])]


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Where everything is written; it is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="styleloom-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


# Streams.


def streams(options: Data, resolution: int, codec: str, work: Path) -> dict[str, list[Row]]:
    """The rows and ratios of one resolution and codec, and which libraries are missing."""
    images = make_images(options, resolution, codec, work)
    absent = {name: bench_peers.missing(name) for name in PEERS if not options.peers}
    peers = options.peers or [name for name in PEERS if not absent[name]]
    contenders = [*bench_peers.decoding(images), *bench_peers.streaming(images, peers)]
    contenders.sort(key=lambda contender: STAGES.index(contender.stage))
    count = images.manifest.count
    once = math.ceil(count / images.batch)
    steps = {"decode": once, "raw": images.passes * once, "full": once}
    with progress(options.rounds * len(contenders), f"{resolution} px {codec}") as bar:
        measured = race(contenders, steps, images.batch, options.rounds, bar)
    where = {"resolution": resolution, "codec": codec}
    size = {"bytes_per_image": sum(map(len, images.data)) / count}
    rows = rates([where | row | size for row in measured])
    if options.workers:
        rows.append(where | with_workers(images, options.workers, once, min(options.rounds, _TURNS)) | size)
    reasons = [{"library": name, "reason": reason} for name, reason in absent.items() if reason]
    return {"rows": rows, "ratios": [where | ratios(rows)], "missing": reasons}


def make_images(options: Data, resolution: int, codec: str, work: Path) -> Images:
    """Our data set of the pictures, and what goes with it."""
    folder = options.pictures or drawn(work, resolution, options.images or usual_count(resolution))
    source = open_source(folder)
    source = source.part(0, options.images or usual_count(resolution))
    manifest = prepare(
        source, work / "set", width=resolution, height=resolution, codec=codec,
        shard_images=math.ceil(len(source) / _SHARDS), workers=default_workers(), progress=False,
    ).manifest  # fmt: skip
    passes = min(8, max(1, round(_PASS / manifest.bytes)))
    batch = min(32 if resolution <= 512 else 16, manifest.count)
    return Images(work / "set", manifest, batch, passes, work)


def race(contenders: Sequence[Contender], steps: dict[str, int], batch: int, rounds: int, bar: tqdm) -> list[Row]:
    """A row for each contender with the best times of `rounds` rounds, in which each has its turn. The clearly slower
    ones have only a few turns.

    steps: batches that are timed in each stage, after a first one: starting is another matter (see `resume`).
    """
    rows: list[Row] = [
        {"stage": c.stage, "library": c.library, "decoder": c.decoder, "images": steps[c.stage] * batch}
        for c in contenders
    ]
    for turn in range(rounds):
        for contender, row in zip(contenders, rows, strict=True):
            bar.update()
            if turn >= _TURNS and row["cpu_seconds"] > _SLOW * _fastest(rows, row["stage"]):
                continue
            wall, cpu = timed(contender, steps[contender.stage])
            row["seconds"] = min(wall, row.get("seconds", wall))
            row["cpu_seconds"] = min(cpu, row.get("cpu_seconds", cpu))
    return rows


def _fastest(rows: Sequence[Row], stage: str) -> float:
    return min(row["cpu_seconds"] for row in rows if row["stage"] == stage)


def timed(contender: Contender, steps: int) -> tuple[float, float]:
    """(wall, CPU seconds) of so many batches after the first."""
    stream = contender.start(steps + 1)
    next(stream)
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(steps):
        next(stream)
    took = time.perf_counter() - wall, cpu_seconds() - cpu
    close = getattr(stream, "close", None)
    if close:
        close()
    return took


def rates(rows: list[Row]) -> list[Row]:
    """Adds what follows from the times: images a second, and their ratio to those of our decoder alone."""
    for row in rows:
        row |= {"img_per_s": row["images"] / row["seconds"], "img_per_cpu_s": row["images"] / row["cpu_seconds"]}
    bare = next(row for row in rows if (row["stage"], row["library"]) == ("decode", OURS))
    for row in rows:
        row["of_decoder"] = None if row["stage"] == "raw" else row["img_per_cpu_s"] / bare["img_per_cpu_s"]
    return rows


def ratios(rows: Sequence[Row]) -> Row:
    """How many times as many images a CPU-second our streams have as others."""
    found: Row = {}
    for stage in ("full", "raw"):
        ours = next(row for row in rows if (row["stage"], row["library"]) == (stage, OURS))
        others = [row for row in rows if row["stage"] == stage and row["library"] != OURS]
        best = max(others, key=lambda row: row["img_per_cpu_s"], default=None)
        plain = next((row for row in others if row["library"] == "webdataset"), None)
        found |= {f"{stage}_img_per_cpu_s": ours["img_per_cpu_s"], f"{stage}_of_decoder": ours["of_decoder"]}
        found |= {f"{stage}_best_peer": best and " ".join(filter(None, (best["library"], best["decoder"])))}
        found |= {f"{stage}_of_best_peer": best and ours["img_per_cpu_s"] / best["img_per_cpu_s"]}
        if stage == "raw":
            found |= {"raw_of_webdataset": plain and ours["img_per_cpu_s"] / plain["img_per_cpu_s"]}
    return found


def with_workers(images: Images, workers: int, steps: int, rounds: int) -> Row:
    """Our full stream in several processes, by the wall clock; the batches that they prepare ahead are warmed up."""
    ahead, steps = 5 * workers, max(steps, 20 * workers)
    best = math.inf
    for _ in range(rounds):
        stream = batches(images.folder, images.manifest, seed=0, start=0, batch=images.batch, workers=workers)
        for _ in range(ahead):
            next(stream)
        began = time.perf_counter()
        for _ in range(steps):
            next(stream)
        best = min(best, time.perf_counter() - began)
        stream.close()
    n = steps * images.batch
    return {
        "stage": "full", "library": OURS, "decoder": f"{workers} workers", "images": n, "seconds": best,
        "cpu_seconds": None, "img_per_s": n / best, "img_per_cpu_s": None, "of_decoder": None,
    }  # fmt: skip


# How it is shown.

STREAMS: Table = [
    ("px", 4, text("resolution")),
    ("codec", -5, text("codec")),
    ("stage", -6, text("stage")),
    ("library", -18, lambda row: row["library"] or "-"),
    ("decoder", -20, lambda row: row["decoder"] or "-"),
    ("images", 6, text("images")),
    ("us/img", 9, lambda row: f"{1e6 * (row['cpu_seconds'] or row['seconds']) / row['images']:.1f}"),
    ("img/CPU-s", 9, number("img_per_cpu_s", ",.0f")),
    ("img/s", 8, number("img_per_s", ",.0f")),
    ("of decoder", 10, number("of_decoder", ".2f")),
]


def describe(found: dict[str, Any]) -> list[str]:
    """The lines of a report."""
    its = found["machine"]
    libraries = ", ".join(f"{name} {number}" for name, number in its["libraries"].items())
    lines = [
        f"{its['cpu']}, one of {its['cores']} cores; torch {its['torch']}, {libraries}; "
        f"freed memory {'kept' if its['memory_kept'] else 'not kept'}",
        *(f"Without {each['library']} ({each['reason']})" for each in found.get("missing", [])),
        "",
    ]
    if found.get("rows"):
        lines += [titles(STREAMS), *(line(STREAMS, row) for row in found["rows"]), ""]
    lines += [words for each in found.get("ratios", []) for words in describe_ratios(each)]
    return [*lines, *bench_scale.describe(found)]


def describe_ratios(its: Row) -> list[str]:
    where = f"{its['resolution']} px {its['codec']}"
    full = f"{where}: full stream {its['full_of_decoder']:.2f} of the decoder alone"
    raw = f"{where}: raw stream {its['raw_img_per_cpu_s']:,.0f} img a CPU-second"
    if its["full_best_peer"]:
        full += f", {its['full_of_best_peer']:.2f} times the best peer ({its['full_best_peer']})"
        raw += f", {its['raw_of_best_peer']:.2f} times the best peer ({its['raw_best_peer']})"
    if its["raw_of_webdataset"]:
        raw += f", {its['raw_of_webdataset']:.2f} times webdataset"
    return [full, raw]
