"""`styleloom doctor`: what this machine has, which path each op takes and why; builds the native ops ahead of time."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import tyro

from styleloom.datasets.decode import decoders
from styleloom.ops import build, toolchain
from styleloom.scripts.cli import parse, run

# What the kernels, or torch's own, run faster with.
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_SOURCES: dict[toolchain.Kind, str] = {"cpu": "*.cpp", "cuda": "*.cu"}


@dataclass(frozen=True)
class Arguments:
    """Shows what this machine has, each op's path and why; builds the native ops that this needs."""

    build: bool = False
    """Build the native ops, for the CPU and, with nvcc, for --archs or the GPUs here; exit with 1 if that fails."""
    archs: tuple[str, ...] = ()
    """With --build: the GPUs to build for, such as 8.0 9.0, where none is to be seen, as on a login node."""
    json: bool = False
    """Print one JSON object."""


def main(args: Sequence[str]) -> int | None:
    options: Arguments = parse(Arguments, args, "doctor", config=(tyro.conf.FlagCreatePairsOff,))
    if options.archs and not options.build:
        raise ValueError("--archs says for what to build: give --build as well")
    builds = build_ahead(options.archs) if options.build else {}
    facts = examine() | ({"builds": builds} if options.build else {})
    print(json.dumps(facts, indent=2) if options.json else describe(facts))
    return 0 if all(each["ok"] for each in builds.values()) else 1


def build_ahead(archs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What became of each library that can be asked for here."""
    kinds: list[toolchain.Kind] = ["cpu"]
    if archs or (toolchain.devices() and not _nvcc().startswith("missing")):
        kinds.append("cuda")
    return {kind: _build(kind, archs) for kind in kinds}


def _build(kind: toolchain.Kind, archs: Sequence[str]) -> dict[str, Any]:
    try:
        its = build.build(kind, archs if kind == "cuda" else None)
    except toolchain.BuildError as error:
        return {"ok": False, "why": str(error), "file": None, "seconds": None}
    return {"ok": True, "why": its.why, "file": str(its.file), "seconds": round(its.seconds, 2)}


def examine() -> dict[str, Any]:
    """All there is to say, as JSON has it."""
    ops = {kind: _route(kind) for kind in _SOURCES}  # first: it may fill the cache
    return {
        "styleloom": _version("styleloom"),
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": {"torch": torch.version.cuda, "driver": toolchain.driver()},
        "gpus": _gpus(),
        "cpu": _cpu(),
        "compilers": {"c++": _cxx(), "nvcc": _nvcc(), "ninja": _ninja()},
        "cache": _cache(),
        "mode": os.environ.get("STYLELOOM_OPS", "auto"),
        "ops": ops,
        "decoders": decoders(),
        "storage": _storage(),
        "backends": _backends(),
        "accelerate": _version("accelerate"),
        "deepspeed": _version("deepspeed"),
    }


def describe(facts: dict[str, Any]) -> str:
    """The same, a line each, for a person."""
    cpu, cuda, cache = facts["cpu"], facts["cuda"], facts["cache"]
    libraries = f"{cache['libraries']} librar{'y' if cache['libraries'] == 1 else 'ies'}"
    rows = [
        ("styleloom", facts["styleloom"]),
        ("python", facts["python"]),
        ("torch", f"{facts['torch']}, built for {'CUDA ' + cuda['torch'] if cuda['torch'] else 'the CPU'}"),
        ("driver", f"supports CUDA {cuda['driver']}" if cuda["driver"] else "none"),
        *(
            (f"cuda:{i}", f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}")
            for i, gpu in enumerate(facts["gpus"])
        ),
        *([] if facts["gpus"] else [("GPU", "none")]),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores, torch uses {cpu['threads']}; {' '.join(cpu['features'])}"),
        *facts["compilers"].items(),
        ("cache", f"{cache['folder']}, {libraries}, {cache['megabytes']} MB, {cache['state']}"),
        ("STYLELOOM_OPS", facts["mode"]),
        *((f"ops on {kind}", _describe_route(route)) for kind, route in facts["ops"].items()),
        ("decoders", ", ".join(f"{codec}: {library}" for codec, library in facts["decoders"].items())),
        ("shards from", ", ".join(f"{name} ({why})" if why else name for name, why in facts["storage"].items())),
        ("backends", ", ".join(name for name, there in facts["backends"].items() if there) or "none"),
        ("accelerate", facts["accelerate"]),
        ("deepspeed", facts["deepspeed"]),
        *((f"--build {kind}", _describe_build(its)) for kind, its in facts.get("builds", {}).items()),
    ]
    return "\n".join(f"  {name:<14} {what}" for name, what in rows)


def _describe_route(route: dict[str, Any]) -> str:
    ops = ", ".join(route["ops"])
    if route["path"] == "reference":
        return f"{ops}: the plain definitions ({route['why']})"
    if route["path"] == "torch":
        return f"{ops}: torch's own ops ({route['why']})"
    if route["path"] is None:
        return f"{ops}: none ({route['why']})"
    return f"{ops}: {route['path']} extension ({route['why']}: {route['file']})"


def _describe_build(its: dict[str, Any]) -> str:
    return f"{its['why']}: {its['file']}" if its["ok"] else f"failed: {its['why']}"


def _route(kind: toolchain.Kind) -> dict[str, Any]:
    """Which path the ops take on tensors of this device and why; none where they would refuse to run."""
    ops = sorted(file.stem for file in build.SOURCES.glob(_SOURCES[kind]))
    mode = os.environ.get("STYLELOOM_OPS", "auto")
    route = {"ops": ops, "path": "torch", "why": "", "file": None}
    if mode not in build.MODES:
        return route | {"path": None, "why": f"STYLELOOM_OPS is one of {', '.join(build.MODES)}"}
    if mode == "reference":
        return route | {"path": "reference", "why": "STYLELOOM_OPS=reference"}
    if kind == "cuda" and not toolchain.devices():
        return route | {"why": "no GPU here"}
    if mode not in ("auto", kind):
        return route | {"why": f"STYLELOOM_OPS={mode}"}
    its = build.status(kind)
    if its.ok:
        return route | {"path": kind, "why": its.why, "file": str(its.file)}
    return route | {"path": "torch" if mode == "auto" else None, "why": its.why}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": its.name, "memory_gib": round(its.total_memory / 2**30, 1), "capability": f"{its.major}.{its.minor}"}
        for its in found
    ]


def _cpu() -> dict[str, Any]:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    model = re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", info, re.MULTILINE)
    has = flags[1].split() if flags else []
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [feature for feature in _CPU_FEATURES if feature in has],
    }


def _or_why_not(find: Callable[[], str]) -> str:
    try:
        return find()
    except ValueError as error:
        return f"missing: {error}"


def _cxx() -> str:
    return _or_why_not(lambda: toolchain.about(toolchain.cxx()).splitlines()[0])


def _nvcc() -> str:
    return _or_why_not(lambda: f"{toolchain.nvcc_version()} ({toolchain.find_nvcc()})")


def _ninja() -> str:
    program = toolchain.ninja()
    return (
        _or_why_not(lambda: toolchain.about(program).strip()) if program else "missing: files are compiled one by one"
    )


def _cache() -> dict[str, Any]:
    folder = build.cache()
    files = list(folder.glob("*.so")) if folder.is_dir() else []
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            state = "can be written"
    except OSError as error:
        state = f"cannot be written ({error.strerror})"
    size = sum(file.stat().st_size for file in files)
    return {"folder": str(folder), "libraries": len(files), "megabytes": round(size / 1e6, 1), "state": state}


def _storage() -> dict[str, str]:
    """Kinds of places that shards can be read from, and what is missing for it."""
    packages = {"s3://": ("s3fs", "s3"), "gs://": ("gcsfs", "gs"), "hf://": ("huggingface_hub", "hf")}
    missing = {
        scheme: "" if importlib.util.find_spec(package) else f"missing: pip install 'styleloom[{extra}]'"
        for scheme, (package, extra) in packages.items()
    }
    return {"folders": "", "http(s)://": "", "pipe:": "", **missing}


def _backends() -> dict[str, bool]:
    of = torch.distributed
    if not of.is_available():
        return {"gloo": False, "nccl": False, "mpi": False}
    return {"gloo": of.is_gloo_available(), "nccl": of.is_nccl_available(), "mpi": of.is_mpi_available()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"missing: pip install {package}" if sys.platform == "linux" or package != "deepspeed" else "not here"


if __name__ == "__main__":
    run(main, "doctor")
