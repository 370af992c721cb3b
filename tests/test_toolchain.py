"""ops/toolchain.py: which compilers are found, which flags and GPUs a library is built with and for."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from styleloom.ops import toolchain

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs shell scripts")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A folder with sources, and an nvcc that only speaks about itself; no GPU, nothing set, nothing remembered."""
    for name in ("CXX", "LOCAL_RANK", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("answer.cpp", "answer.cu"):
        (tmp_path / name).touch()
    speaks = """
    case "$1" in
    --version) echo "Cuda compilation tools, release 12.4, V12.4.1";;
    --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n';;
    esac"""
    monkeypatch.setenv("STYLELOOM_NVCC", script(tmp_path / "fake-nvcc", speaks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    toolchain._output.cache_clear()
    return tmp_path


def script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


def codes(recipe: toolchain.Recipe) -> list[str]:
    return [word.partition("code=")[2] for word in recipe.compile if "code=" in word]


# The C++ compiler.


@pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
def test_which_compiler_is_taken(place, monkeypatch, name):
    compiler = script(place / name, "echo version")
    monkeypatch.setenv("PATH", str(place))
    assert toolchain.cxx() == [name]
    recipe = toolchain.recipe("cpu", place)
    assert (recipe.compile[0], recipe.link[0], recipe.lacks) == (compiler, compiler, "")


def test_without_a_compiler_the_recipe_says_what_it_lacks(place, monkeypatch):
    whole = toolchain.recipe("cuda", place, ["9.0"])
    monkeypatch.setenv("PATH", str(place))
    monkeypatch.setenv("STYLELOOM_NVCC", "no-such-nvcc")
    recipe = toolchain.recipe("cpu", place)
    assert (recipe.lacks, recipe.tool) == ("no C++ compiler found: install g++ or set CXX", "*")
    recipe = toolchain.recipe("cuda", place, ["9.0"])
    assert (recipe.lacks, recipe.tool) == ("STYLELOOM_NVCC=no-such-nvcc cannot be run", "*")
    assert (recipe.what, recipe.target) == (whole.what, whole.target)  # so what was built elsewhere is found


def test_a_compiler_that_is_not_there_or_does_not_run(place, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    lacks = toolchain.recipe("cpu", place).lacks
    assert lacks == "CXX=no-such-compiler -x, but no-such-compiler cannot be run"
    stub = script(place / "stub", "echo error: install the tools >&2; exit 1")
    monkeypatch.setenv("CXX", stub)
    assert toolchain.recipe("cpu", place).lacks == f"{stub} does not run: error: install the tools"


def test_clang_gets_no_openmp_beside_that_of_gcc(place, monkeypatch):
    monkeypatch.setattr(toolchain.sys, "platform", "linux")
    for version, runtime, flag in [
        ("g++", "/lib/libgomp.so.1", True),
        ("clang", "/lib/libgomp.so.1", False),
        ("clang", "/lib/libomp.so", True),
        ("g++", None, True),
    ]:
        monkeypatch.setenv("CXX", script(place / "compiler", f"echo {version}"))
        monkeypatch.setattr(toolchain, "openmp_runtime", lambda runtime=runtime: runtime)
        toolchain._output.cache_clear()
        recipe = toolchain.recipe("cpu", place)
        assert ("-fopenmp" in recipe.compile) == flag
        assert recipe.libraries == ((runtime or "-fopenmp",) if flag else ())


def test_without_sources(tmp_path):
    with pytest.raises(toolchain.BuildError, match=r"no sources \*\.cpp in "):
        toolchain.recipe("cpu", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("note\n  x.cpp:1: error: bad\nx.cpp:2: error: worse\n", "x.cpp:1: error: bad"),
        ("one\ntwo\n\n", "two"),
        ("\n", "it says nothing"),
        ("Error" + "!" * 999, "Error" + "!" * 195),
    ],
)
def test_the_first_error(said, line):
    assert toolchain.first_error(said) == line


# nvcc and GPUs.


@pytest.mark.parametrize("name", ["STYLELOOM_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"])
def test_where_nvcc_is_looked_for(place, monkeypatch, name):
    (place / "bin").mkdir()
    wrapper = script(place / "bin" / "nvcc", "echo nothing else beside me")
    monkeypatch.delenv("STYLELOOM_NVCC")
    monkeypatch.setenv("PATH", str(place / "bin") if name == "PATH" else "")
    if name != "PATH":
        monkeypatch.setenv(name, wrapper if name == "STYLELOOM_NVCC" else str(place))
    assert toolchain.find_nvcc() == wrapper
    monkeypatch.setenv("STYLELOOM_NVCC", "no-such-nvcc")
    with pytest.raises(toolchain.BuildError, match="STYLELOOM_NVCC=no-such-nvcc cannot be run"):
        toolchain.find_nvcc()


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("8.0 9.0", ["sm_80", "sm_90"]),
        (" 9.0a ", ["sm_90"]),
    ],
)
def test_the_arch_list_of_torch(place, monkeypatch, listed, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert codes(toolchain.recipe("cuda", place)) == expected


def test_without_a_gpu_and_without_a_list(place, monkeypatch):
    with pytest.raises(toolchain.BuildError, match=r"no GPU is visible: .*styleloom doctor --build --archs 8.0 9.0"):
        toolchain.recipe("cuda", place)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(toolchain.BuildError, match="'Hopper' is no GPU architecture such as 9"):
        toolchain.recipe("cuda", place)


def test_the_gpus_that_are_here(place, monkeypatch):
    capabilities = [(9, 0), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")  # which they overrule
    recipe = toolchain.recipe("cuda", place)
    assert (recipe.gpus, codes(recipe)) == ((80, 90), ["sm_80", "sm_90"])
    assert codes(toolchain.recipe("cuda", place, ["7.5"])) == ["sm_75"]


def test_a_gpu_newer_than_nvcc_gets_ptx(place, monkeypatch, capfd):
    monkeypatch.setattr(toolchain, "devices", lambda: (103,))
    recipe = toolchain.recipe("cuda", place)
    assert codes(recipe) == ["sm_90", "compute_90"]
    assert recipe.accepts("90p")
    said = "styleloom: nvcc 12.4 is older than sm_103: the driver finishes code for compute_90"
    assert said in capfd.readouterr().err


def test_a_gpu_older_than_nvcc_knows(place, monkeypatch):
    monkeypatch.setattr(toolchain, "devices", lambda: (61,))
    lacks = toolchain.recipe("cuda", place).lacks
    assert lacks == "nvcc 12.4 no longer knows sm_61: use an older CUDA toolkit"


def test_torch_for_other_gpus(place, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(toolchain.BuildError, match="for NVIDIA's GPUs, and this torch is built for ROCm"):
        toolchain.recipe("cuda", place)


@pytest.mark.parametrize(
    ("gpus", "target", "will_do"),
    [
        ((90,), "90", True),
        ((90,), "80.90p", True),
        ((80, 90), "80.90p", True),
        ((90, 120), "80.90p", True),
        ((80,), "90p", False),
        ((90,), "80", False),
        ((), "80.90", True),  # exactly what was asked for
        ((), "80.90p", False),
    ],
)
def test_which_libraries_will_do(gpus, target, will_do):
    assert toolchain.Recipe("cuda", (), "what", "80.90", gpus).accepts(target) == will_do


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_real_nvcc(place, monkeypatch):
    monkeypatch.setenv("STYLELOOM_NVCC", "nvcc")
    assert float(toolchain.nvcc_version()) > 10
