"""The parts of `styleloom bench data` that are about size: late positions, many samples, and making a data set."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from styleloom.datasets import pictures
from styleloom.datasets.manifest import FILE, read_manifest, write_manifest
from styleloom.datasets.order import Order
from styleloom.datasets.pictures import Form, check_form
from styleloom.datasets.shards import prepare
from styleloom.datasets.sources import Source, open_source
from styleloom.datasets.stream import batches
from styleloom.ops.memory import peak_memory
from styleloom.scripts.bench_pictures import drawn, usual_count
from styleloom.scripts.bench_show import Row

LATE = 10**9  # a position
SHARDS, SHARD = 1000, 1000  # of the large set: its shards, and the samples of each
MANY_SHARDS = 10**6
BATCH = 32
DIFFERENT = 50  # pictures of the large set
_PREPARED, _REPEATS = 120, 4  # pictures, and how often each: a set's report has a cost that does not depend on them
_WARM = 0.1  # of the samples, before memory is looked at for the first time


def large_set(work: Path, side: int) -> Path:
    """A data set of 10^6 samples (JPEG) in 1000 shards that are one and the same file."""
    folder = work / "large"
    source = open_source(drawn(work, side, DIFFERENT))
    source = repeated(source, SHARD)
    made = prepare(
        source, folder, width=side, height=side, codec="jpeg", duplicates="keep", shard_images=SHARD, progress=False
    ).manifest  # fmt: skip
    larger: dict[str, Any] = {"shards": made.shards * SHARDS}
    larger |= {"count": made.count * SHARDS, "bytes": made.bytes * SHARDS}
    larger |= {"class_counts": [count * SHARDS for count in made.class_counts]}
    write_manifest(made.model_copy(update=larger), folder)
    return folder


def repeated(source: Source, count: int) -> Source:
    """A source of so many pictures, the same ones again and again."""
    return replace(source, entries=[source.entries[i % len(source)] for i in range(count)])


def resume(work: Path, side: int, rounds: int) -> list[Row]:
    """From nothing (but the imports) to the first batch, at a late position and at the first. The slowest counts."""
    folder, rows = large_set(work, side), []
    for position in (LATE, 0):
        took = []
        for _ in range(rounds):
            began = time.perf_counter()
            manifest = read_manifest(folder)
            stream = batches(folder, manifest, seed=0, start=position, batch=BATCH)
            next(stream)
            took.append(time.perf_counter() - began)
            stream.close()
        rows.append(
            {
                "resolution": side, "samples": manifest.count, "shards": len(manifest.shards), "batch": BATCH,
                "position": position, "seconds": max(took),
            }
        )  # fmt: skip
    return rows


def memory(work: Path, side: int, samples: int) -> list[Row]:
    """What this process holds while many samples pass, and for a manifest of very many shards and their order."""
    return [_memory_of_stream(large_set(work, side), samples), *_memory_of_manifest(work / "many")]


def _memory_of_stream(folder: Path, samples: int) -> Row:
    steps = max(2, samples // BATCH)
    stream = batches(folder, read_manifest(folder), seed=0, start=0, batch=BATCH, decode=False)
    began = before = peak = 0
    for step in range(steps):
        next(stream)
        if step == int(_WARM * steps):
            before, began = held(), time.perf_counter()
        if step % 256 == 0:
            peak = max(peak, held())
    stream.close()
    return {
        "of": "raw stream", "samples": steps * BATCH, "bytes_before": before, "bytes_after": held(),
        "bytes_peak": max(peak, held()), "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _memory_of_manifest(folder: Path) -> list[Row]:
    """Of reading a manifest of MANY_SHARDS shards of 1000 samples each, and of its order."""
    folder.mkdir(parents=True)
    _write_many(folder)
    before, began = held(), time.perf_counter()
    manifest = read_manifest(folder)
    read, took = held(), time.perf_counter() - began
    order = Order([shard.count for shard in manifest.shards], seed=0, window=16)
    order(manifest.count - 1)
    ordered, took_both = held(), time.perf_counter() - began
    row = {"samples": manifest.count, "shards": len(manifest.shards)}
    return [
        row | {"of": "manifest", "bytes_before": before, "bytes_after": read, "seconds": took},
        row | {"of": "order", "bytes_before": read, "bytes_after": ordered, "seconds": took_both - took},
    ]


def _write_many(folder: Path) -> None:
    """A manifest of MANY_SHARDS shards that are nowhere."""
    bytes_ = 40_000_000
    about = {
        "width": 256, "height": 256, "channels": 3, "codec": "jpeg", "quality": 95, "resize": "lanczos",
        "background": "#ffffff", "class_names": [], "class_counts": [], "count": MANY_SHARDS * 1000,
        "bytes": MANY_SHARDS * bytes_,
    }  # fmt: skip
    with open(folder / FILE, "w") as file:
        file.write(json.dumps(about)[:-1] + ', "shards": [')
        for i in range(MANY_SHARDS):
            shard = {
                "name": f"shard-{i:06d}.tar", "count": 1000, "bytes": bytes_, "sha256": f"{i:064x}",
                "index": f"shard-{i:06d}.npy", "index_sha256": f"{i:064x}",
            }  # fmt: skip
            file.write((", " if i else "") + json.dumps(shard))
        file.write("]}")


def held() -> int:
    """Bytes of memory that this process holds now; without Linux, the most that it ever held."""
    table = Path("/proc/self/statm")
    if table.exists():
        return int(table.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory(torch.device("cpu"))


def prepares(work: Path, resolutions: Sequence[int], count: int, rounds: int) -> list[Row]:
    """`styleloom prepare` on one worker beside the decoding, resizing and encoding that it consists of."""
    top, low = max(resolutions), min(resolutions)
    cases = [(".jpg", top, max(1, top // 4), "jpeg"), (".png", low, low, "png")]
    return [_prepare(work, *case, count or min(_PREPARED, usual_count(case[1])), rounds) for case in cases]


def _prepare(work: Path, suffix: str, side: int, target: int, codec: str, count: int, rounds: int) -> Row:
    source = repeated(open_source(drawn(work, side, count, suffix)), _REPEATS * count)
    form = check_form(Form(target, target, 3, codec, None, "lanczos", "#ffffff"))
    whole, alone = [], []
    for i in range(rounds):
        began = cpu_seconds()
        prepare(
            source, work / f"{codec}-{i}", width=target, height=target, codec=codec, duplicates="keep", progress=False
        )  # fmt: skip
        whole.append(cpu_seconds() - began)
        alone.append(_alone(source, form))
    name = suffix.removeprefix(".").replace("jpg", "jpeg")
    return {
        "from": f"{name} {side} px", "to": f"{codec} {target} px", "images": len(source), "cpu_seconds": min(whole),
        "alone_cpu_seconds": min(alone), "alone_share": min(alone) / min(whole),
    }  # fmt: skip


def _alone(source: Source, form: Form) -> float:
    """CPU seconds of what has to be done with each picture, its bytes being in memory."""
    data = [source.read(i) for i in range(len(source))]
    began = cpu_seconds()
    for each in data:
        pictures.encode(pictures.shape(pictures.load(each), form), form)
    return cpu_seconds() - began


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def describe(found: dict[str, list[Row]]) -> list[str]:
    """A line for each row of these parts."""
    lines = [
        f"First batch ({its['batch']} of {its['resolution']} px) at position {its['position']:,} of a set of "
        f"{its['samples']:,} samples in {its['shards']:,} shards: {its['seconds']:.2f} s"
        for its in found.get("resume", [])
    ]
    for its in found.get("memory", []):
        of = f"{its['of']}, {its['shards']:,} shards" if "shards" in its else its["of"]
        peak = f", at most {its['bytes_peak'] / 2**20:,.0f}" if "bytes_peak" in its else ""
        lines.append(
            f"Memory of the {of}, {its['samples']:,} samples: {its['bytes_before'] / 2**20:,.0f} MiB before, "
            f"{its['bytes_after'] / 2**20:,.0f} MiB after{peak}; {its['seconds']:.1f} s"
        )
    lines += [
        f"prepare, one worker, {its['from']} -> {its['to']}: {its['cpu_seconds'] / its['images'] * 1e3:.2f} CPU-ms a "
        f"picture; decoding, resizing and encoding alone {its['alone_share']:.2f} of that"
        for its in found.get("prepare", [])
    ]
    return lines
