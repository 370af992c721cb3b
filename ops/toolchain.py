"""What the native ops' libraries are built of and with: sources, compilers, flags, GPUs. `recipe` says it all.

CXX, STYLELOOM_NVCC, CUDA_HOME, CUDA_PATH and TORCH_CUDA_ARCH_LIST have their say, as elsewhere.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Kind = Literal["cpu", "cuda"]

_CPU_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
_NATIVE = {"x86_64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native", "ppc64le": "-mcpu=native"}
_CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC"]
_NVCC_VARIABLES = ("NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # nvcc reads them itself


class BuildError(ValueError):
    """The native ops cannot be had here; says why and, where it can be mended, how."""


@dataclass(frozen=True)
class Recipe:
    """How a library is made, and which files in the cache will do."""

    kind: Kind
    sources: tuple[Path, ...]
    what: str
    target: str
    gpus: tuple[int, ...] = ()  # capabilities (90) that it has to run on, if it need not have exactly this target
    tool: str = "*"  # any, where there is no compiler
    compile: tuple[str, ...] = ()  # before: -c SOURCE -o OBJECT
    link: tuple[str, ...] = ()  # before: -o LIBRARY OBJECTS
    libraries: tuple[str, ...] = ()  # after the objects
    lacks: str = ""  # why nothing can be compiled here

    @property
    def stem(self) -> str:
        return f"{self.kind}-{self.what}-{self.tool}-{self.target}"

    def accepts(self, target: str) -> bool:
        """Whether a library of this target will do: it has code, or PTX that becomes code, for all GPUs."""
        has = target.split(".")
        ptx = [int(each[:-1]) for each in has if each.endswith("p")]
        runs = [str(gpu) in has or any(number <= gpu for number in ptx) for gpu in self.gpus]
        return target == self.target or (bool(runs) and all(runs))


def recipe(kind: Kind, folder: Path, archs: Sequence[str] | None = None) -> Recipe:
    """For the sources in a folder; CUDA for `archs` ("8.0", "9.0+PTX"), else the GPUs here or TORCH_CUDA_ARCH_LIST.

    Raises:
        BuildError: there is nothing to build, or nothing to build it for. Want of a compiler is in `lacks` instead.
    """
    return _cpu_recipe(folder) if kind == "cpu" else _cuda_recipe(folder, archs)


def _cpu_recipe(folder: Path) -> Recipe:
    flags = [*_CPU_FLAGS, *filter(None, [_NATIVE.get(platform.machine())])]
    command, tool, lacks = [], "*", ""
    try:
        command, tool = _identify(cxx())
    except BuildError as error:
        lacks = str(error)
    libraries = []
    runtime = openmp_runtime()
    clang = command and "clang" in about(command)
    # Clang's OpenMP needs libomp, which must not run beside torch's libgomp: then one thread has to do.
    if sys.platform == "linux" and not (clang and "libgomp" in (runtime or "")):
        flags += ["-fopenmp"]
        libraries = [runtime or "-fopenmp"]
    sources, what = _what(folder, "*.cpp", [*flags, *libraries, _processor()])
    return Recipe(
        "cpu", sources, what, "native", tool=tool, lacks=lacks,
        compile=(*command, *flags), link=(*command, "-shared"), libraries=tuple(libraries),
    )  # fmt: skip


def _cuda_recipe(folder: Path, archs: Sequence[str] | None) -> Recipe:
    gpus = () if archs else devices()
    wanted = _wanted(archs, gpus)
    sources, what = _what(folder, "*.cu", _CUDA_FLAGS)
    try:
        nvcc = find_nvcc()
        command, tool = _identify([nvcc], *(os.environ.get(name, "") for name in _NVCC_VARIABLES))
        targets = _targets(nvcc, wanted)
    except BuildError as error:
        return Recipe("cuda", sources, what, ".".join(wanted), gpus, lacks=str(error))
    code = [flag for target in targets for flag in _gencode(target)]
    return Recipe(
        "cuda", sources, what, ".".join(targets), gpus, tool,
        compile=(*command, *_CUDA_FLAGS, *code), link=(*command, "-shared", *code),
    )  # fmt: skip


def _what(folder: Path, pattern: str, more: Sequence[str]) -> tuple[tuple[Path, ...], str]:
    """The sources, and a hash of them, of their headers, of `more` and of the machine's architecture."""
    folder = folder.absolute()
    sources = tuple(sorted(folder.glob(pattern)))
    if not sources:
        raise BuildError(f"no sources {pattern} in {folder}")
    parts = [*more, sys.platform, platform.machine()]
    for file in [*sources, *sorted(folder.glob("*.h")), *sorted(folder.glob("*.cuh"))]:
        parts += [file.name, digest(file.read_bytes())]
    return sources, digest("\n".join(parts).encode())


def digest(data: bytes) -> str:
    """The hash that names of libraries have parts of."""
    return hashlib.sha256(data).hexdigest()[:12]


# The machine.


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[0]
    return platform.processor()


def openmp_runtime() -> str | None:
    """The OpenMP runtime that torch has loaded (Linux): a second one would bring its own, spinning threads."""
    with contextlib.suppress(OSError):
        files = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        found = [file for file in files if re.search(r"/lib(gomp|iomp\d*|omp\d*)(-\w+)?\.so[\d.]*$", file)]
        return min(found, key=lambda file: ("torch" not in file, file), default=None)
    return None


def devices() -> tuple[int, ...]:
    """The capabilities of the GPUs that are here, such as (80, 90)."""
    if torch.version.hip or not torch.cuda.is_available():
        return ()
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(sorted(major * 10 + minor for major, minor in found))


def driver() -> str | None:
    """The CUDA version that the GPU's driver supports, such as "13.2"."""
    number = ctypes.c_int()
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            if ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(number)) == 0:
                return f"{number.value // 1000}.{number.value % 1000 // 10}"
    return None


# The tools.


def cxx() -> list[str]:
    """The C++ compiler's command.

    Raises:
        BuildError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"CXX={shlex.join(named)}, but {named[0]} cannot be run")
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found: install g++ or set CXX")


def find_nvcc() -> str:
    """The CUDA compiler's file. Nothing is derived from where it lies: it may be a wrapper script.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("STYLELOOM_NVCC")
    if named:
        if shutil.which(named) is None:
            raise BuildError(f"STYLELOOM_NVCC={named} cannot be run")
        return named
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    wheels = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/bin/nvcc"), reverse=True)
    for place in [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc", *map(str, wheels)]:
        found = shutil.which(place)
        if found:
            return found
    raise BuildError("no nvcc found: install the CUDA toolkit or set CUDA_HOME")


def nvcc_version() -> str:
    """Such as "13.0".

    Raises:
        BuildError: there is no nvcc, or it does not run.
    """
    found = re.search(r"release ([\d.]+)", about([find_nvcc()]))
    return found[1] if found else "of an unknown version"


def ninja() -> list[str] | None:
    """The command of ninja, which compiles several files at once; without it they are compiled one by one."""
    if os.name == "nt":  # where commands are quoted otherwise
        return None
    found = shutil.which("ninja")
    if found:
        return [found]
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else None


def about(command: Sequence[str]) -> str:
    """What a compiler says of its version.

    Raises:
        BuildError: it does not run.
    """
    return _output(*command, "--version")


@functools.cache
def _output(*command: str) -> str:
    """What a compiler says about itself."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment(), timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        raise BuildError(f"{command[0]} does not run: {first_error(done.stderr + done.stdout)}")
    return done.stdout


def environment() -> dict[str, str]:
    """For compilers: English messages."""
    return os.environ | {"LC_ALL": "C"}


def first_error(said: str) -> str:
    """The line of a compiler's words that says what is wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return ((errors or lines[-1:]) or ["it says nothing"])[0][:200]


def _identify(command: list[str], *more: str) -> tuple[list[str], str]:
    """The command with its program's full path, and a hash of what it is."""
    full = [shutil.which(command[0]) or command[0], *command[1:]]
    return full, digest("\n".join([*full, *more, about(full)]).encode())


# The GPUs to compile for: "90", or "90p" for PTX of it too.


def _wanted(archs: Sequence[str] | None, gpus: Sequence[int]) -> list[str]:
    """What is asked for, or what is here.

    Raises:
        BuildError: there is no GPU, or not NVIDIA's, and nobody says for which to build.
    """
    if gpus:
        return sorted(str(gpu) for gpu in gpus)
    if torch.version.hip:
        raise BuildError("the kernels are for NVIDIA's GPUs, and this torch is built for ROCm")
    listed = re.findall(r"[^;,\s]+", " ".join(archs or [os.environ.get("TORCH_CUDA_ARCH_LIST", "")]))
    if not listed:
        raise BuildError("no GPU is visible: say for which to build (styleloom doctor --build --archs 8.0 9.0)")
    wanted = set()
    for arch in listed:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if match is None:
            raise BuildError(f"{arch!r} is no GPU architecture such as 9.0 or 9.0+PTX")
        wanted.add(f"{match[1]}{match[2]}{'p' if match[3] else ''}")
    return sorted(wanted)


def _targets(nvcc: str, wanted: Sequence[str]) -> list[str]:
    """What this nvcc can compile of it: for GPUs newer than it, PTX that the driver finishes.

    Raises:
        BuildError: it no longer knows a GPU.
    """
    known = [int(number) for number in re.findall(r"compute_(\d+)\b", _output(nvcc, "--list-gpu-arch"))]
    targets = set()
    for arch in wanted:
        number = int(arch.rstrip("p"))
        nearest = max((k for k in known if k <= number), default=None)
        if nearest is None:
            raise BuildError(f"nvcc {nvcc_version()} no longer knows sm_{number}: use an older CUDA toolkit")
        if nearest != number:
            say(f"nvcc {nvcc_version()} is older than sm_{number}: the driver finishes code for compute_{nearest}")
        targets.add(arch if nearest == number else f"{nearest}p")
    return sorted(targets)


def _gencode(target: str) -> list[str]:
    number = target.rstrip("p")
    codes = [f"sm_{number}", f"compute_{number}"] if target.endswith("p") else [f"sm_{number}"]
    return [flag for code in codes for flag in ("-gencode", f"arch=compute_{number},code={code}")]


def say(line: str) -> None:
    """Once a node, on stderr rather than as a warning, which filters might hide."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"styleloom: {line}", file=sys.stderr, flush=True)
