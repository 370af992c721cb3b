"""scripts/doctor.py: what it shows in each mode, and what --build builds."""

import json
import os
import shutil
import tempfile

import pytest
import torch

from styleloom.ops import build, toolchain
from styleloom.scripts import doctor

ROWS = ["styleloom", "python", "torch", "driver", "CPU", "c++", "nvcc", "ninja", "cache", "STYLELOOM_OPS"]
ROWS += ["ops on cpu", "ops on cuda", "decoders", "shards from", "backends", "accelerate", "deepspeed"]

pytestmark = pytest.mark.skipif(shutil.which("c++") is None or os.name != "posix", reason="no C++ compiler")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder with tiny `sources`, a cache and an nvcc that makes empty libraries; no GPU, nothing remembered."""
    for name in ("CXX", "STYLELOOM_OPS", "TORCH_CUDA_ARCH_LIST", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "sources").mkdir()
    for name in ("one.cpp", "two.cpp", "one.cu"):
        (tmp_path / "sources" / name).write_text(f'extern "C" int {name[:3]}(void) {{ return 1; }}')
    (tmp_path / "nvcc").write_text("""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 12.4, V12.4.1";;
--list-gpu-arch) printf 'compute_80\\ncompute_90\\n';;
*) while [ "$1" != -o ]; do shift; done; echo 'int x;' | c++ -x c++ -shared -fPIC - -o "$2";;
esac
""")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("STYLELOOM_NVCC", str(tmp_path / "nvcc"))
    monkeypatch.setenv("STYLELOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    monkeypatch.setattr(build, "_outcomes", {})
    toolchain._output.cache_clear()
    return tmp_path


@pytest.fixture
def shown(call):
    """(*args) -> (exit status, the rows as a dict)."""

    def shown(*args):
        status, out, _ = call(doctor.main, *args)
        assert all(line.startswith("  ") and line[16:].strip() for line in out.splitlines())
        return status, {line[:16].strip(): line[16:].strip() for line in out.splitlines()}

    return shown


def test_shows_everything(place, shown):
    status, rows = shown()
    assert status == 0
    assert set(ROWS) <= set(rows)
    assert rows["GPU"] == "none"
    assert rows["torch"].startswith(torch.__version__)
    assert rows["nvcc"] == f"12.4 ({place / 'nvcc'})"
    assert rows["STYLELOOM_OPS"] == "auto"
    assert rows["ops on cpu"].startswith("one, two: cpu extension (built in ")
    assert rows["ops on cpu"].endswith(".so)")
    assert rows["ops on cuda"] == "one: torch's own ops (no GPU here)"
    assert "cache, 1 library, " in rows["cache"]
    assert "can be written" in rows["cache"]


def test_json_says_the_same(call):
    status, out, _ = call(doctor.main, "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["gpus"] == []
    assert facts["ops"]["cpu"]["path"] == "cpu"
    assert facts["ops"]["cuda"] == {"ops": ["one"], "path": "torch", "why": "no GPU here", "file": None}
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert "builds" not in facts


@pytest.mark.parametrize(
    ("mode", "path", "cpu", "cuda"),
    [
        ("reference", "reference", "the plain definitions (STYLELOOM_OPS=reference)", None),
        ("cuda", "torch", "torch's own ops (STYLELOOM_OPS=cuda)", "torch's own ops (no GPU here)"),
        ("fast", None, "none (STYLELOOM_OPS is one of auto, cuda, cpu, reference)", None),
    ],
)
def test_modes_in_which_nothing_is_built(place, shown, monkeypatch, mode, path, cpu, cuda):
    monkeypatch.setenv("STYLELOOM_OPS", mode)
    status, rows = shown()
    assert (status, rows["ops on cpu"], rows["ops on cuda"]) == (0, f"one, two: {cpu}", f"one: {cuda or cpu}")
    assert {route["path"] for route in doctor.examine()["ops"].values()} == {path}
    assert not (place / "cache").exists()


@pytest.mark.parametrize(("mode", "path"), [("auto", "torch's own ops"), ("cpu", "none")])
def test_without_a_compiler(shown, monkeypatch, mode, path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("STYLELOOM_OPS", mode)
    why = "CXX=no-such-compiler, but no-such-compiler cannot be run"
    status, rows = shown()
    assert (status, rows["ops on cpu"], rows["c++"]) == (0, f"one, two: {path} ({why})", f"missing: {why}")
    status, rows = shown("--build")
    assert (status, rows["--build cpu"]) == (1, f"failed: {why}")


def test_gpus_are_listed(shown, monkeypatch):
    class Properties:
        name, total_memory, major, minor = "NVIDIA H200", 150 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setenv("STYLELOOM_NVCC", "no-such-nvcc")
    status, rows = shown("--build")
    assert rows["cuda:0"] == "NVIDIA H200, 150.0 GiB, capability 9.0"
    assert rows["ops on cuda"] == "one: torch's own ops (STYLELOOM_NVCC=no-such-nvcc cannot be run)"
    assert "--build cuda" not in rows  # nothing to build with, and nobody asked by name
    assert status == 0


def test_build_for_gpus_that_are_elsewhere(place, shown):
    build.load("cpu", place / "sources")
    status, rows = shown("--build", "--archs", "8.0", "9.0")
    assert status == 0
    assert rows["--build cpu"].startswith("from the cache: ")
    assert rows["--build cuda"].startswith("built in ")
    assert len(list((place / "cache").glob("cuda-*-80.90-*.so"))) == 1
    status, rows = shown("--build", "--archs", "6.1")
    assert (status, rows["--build cuda"]) == (1, "failed: nvcc 12.4 no longer knows sm_61: use an older CUDA toolkit")


def test_archs_without_build(refused):
    assert "--archs says for what to build" in refused(doctor.main, "--archs", "9.0")


def test_a_cache_that_cannot_be_written(place, shown, monkeypatch):
    (place / "file").touch()
    monkeypatch.setenv("STYLELOOM_CACHE", str(place / "file" / "cache"))
    monkeypatch.setenv("STYLELOOM_OPS", "reference")
    assert shown()[1]["cache"].endswith("cannot be written (Not a directory)")
