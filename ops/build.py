"""The native ops' libraries: built by the machine's own compilers at first need, kept in a cache, loaded with ctypes.

They are plain C (csrc/api.h), so they depend on neither Python's nor torch's version. What users can set:

    STYLELOOM_OPS            auto (by default), cuda, cpu or reference: what `path` answers
    STYLELOOM_CACHE          the cache's folder; by default $XDG_CACHE_HOME/styleloom/ops or ~/.cache/styleloom/ops
    STYLELOOM_BUILD_TIMEOUT  seconds, for a compilation and for waiting for another process's (600)
    CXX, STYLELOOM_NVCC, CUDA_HOME, MAX_JOBS, TORCH_CUDA_ARCH_LIST    as elsewhere

A library is called KIND-WHAT-TOOL-TARGET-DIGEST.so. WHAT hashes the sources, the flags and the kind of machine, TOOL
the compiler; TARGET lists the GPUs (80.90p: code for sm_80, PTX of compute_90) or is "native"; DIGEST is of the
file itself. So a library built on a login node for several GPUs is found wherever all GPUs are among them, also where
there is no compiler, and one that was cut short is never loaded.
"""

import contextlib
import ctypes
import errno
import functools
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from . import toolchain
from .toolchain import BuildError, Kind, Recipe, say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MODES = ("auto", "cuda", "cpu", "reference")
SOURCES = Path(__file__).parent / "csrc"

_POLL, _SPEAK_AFTER, _SPEAK_EVERY = 0.05, 2, 30  # seconds, while waiting for another process's build
_DAY = 86400
_UNUSED = 30 * _DAY  # after which libraries of other sources go


@dataclass(frozen=True)
class Status:
    """What became of a library: `why` is "built in 6.1 s", "from the cache" or what is wrong."""

    ok: bool
    why: str
    file: Path | None = None
    seconds: float = 0.0
    built: bool = False


_outcomes: dict[Kind, tuple[ctypes.CDLL | None, Status]] = {}
_one_at_a_time = threading.Lock()


def path(device_type: str) -> str:
    """What runs ops on tensors of this device type, as `STYLELOOM_OPS` has it.

    "cuda" and "cpu" are the kernels; "torch" is torch's own ops in their fast formulation, where there are no kernels:
    another device type, one that `STYLELOOM_OPS` does not name, or, in auto, a library that cannot be had; "reference"
    is the plain definitions, only if asked for.

    Raises:
        BuildError: the kernels asked for by name cannot be had.
        ValueError: `STYLELOOM_OPS` is none of `MODES`.
    """
    mode = os.environ.get("STYLELOOM_OPS", "auto")
    if mode not in MODES:
        raise ValueError(f"STYLELOOM_OPS={mode}: it is one of {', '.join(MODES)}")
    if mode == "reference":
        return "reference"
    if (device_type != "cpu" and device_type != "cuda") or mode not in ("auto", device_type):
        return "torch"
    if mode == "auto":
        return device_type if library(device_type) is not None else "torch"
    its = status(device_type)
    if not its.ok:
        raise BuildError(f"STYLELOOM_OPS={mode} asks for the fused {device_type.upper()} ops, but: {its.why}")
    return device_type


def library(kind: Kind) -> ctypes.CDLL | None:
    """The library, built if need be; None, with one line on stderr, if it cannot be had. Tries once a process."""
    found, its = _outcome(kind)
    if found is None:
        _say_lost(kind, its.why)
    return found


def status(kind: Kind) -> Status:
    """What `library` found or will find; builds as it does, but does not say what is lost."""
    return _outcome(kind)[1]


def build(kind: Kind, archs: Sequence[str] | None = None) -> Status:
    """Builds a library, or finds it in the cache; CUDA for `archs` ("8.0", "9.0+PTX") or the GPUs that are here.

    Raises:
        BuildError: it cannot be built.
    """
    its = load(kind, SOURCES, archs)[1] if archs else status(kind)
    if not its.ok:
        raise BuildError(its.why)
    return its


def _outcome(kind: Kind) -> tuple[ctypes.CDLL | None, Status]:
    if kind not in _outcomes:
        with _one_at_a_time:
            if kind not in _outcomes:
                try:
                    _outcomes[kind] = load(kind, SOURCES)
                except (ValueError, OSError) as error:
                    _outcomes[kind] = None, Status(False, str(error))
    return _outcomes[kind]


@functools.cache
def _say_lost(kind: Kind, why: str) -> None:
    say(f"the fused {kind.upper()} ops are off (slower torch ops are used): {why}")


def load(kind: Kind, sources: Path, archs: Sequence[str] | None = None) -> tuple[ctypes.CDLL, Status]:
    """The library of the sources in a folder, from the cache or built; not remembered.

    Raises:
        BuildError: it cannot be built, or does not load, or the GPU's driver refuses it.
    """
    start = time.monotonic()
    recipe = toolchain.recipe(kind, sources, archs)
    useless = set()
    for file in _cached(recipe):
        try:
            loaded, built = ctypes.CDLL(str(file)), False
            break
        except OSError:  # of another machine, whatever its name says
            useless.add(file)
    else:
        file, built = _make(recipe, useless)
        try:
            loaded = ctypes.CDLL(str(file))
        except OSError as error:
            raise BuildError(f"the library was built but does not load: {error}") from None
    with contextlib.suppress(OSError):  # somebody else's
        os.utime(file)
    _check(kind, loaded, archs)
    seconds = time.monotonic() - start
    return loaded, Status(True, f"built in {seconds:.1f} s" if built else "from the cache", file, seconds, built)


def _check(kind: Kind, loaded: ctypes.CDLL, archs: Sequence[str] | None) -> None:
    """Asks the driver whether this process's GPU can run the library; of the others it would fill the memory.

    Raises:
        BuildError: it cannot.
    """
    if kind == "cpu" or archs or not torch.cuda.is_available():
        return
    loaded.sl_error.restype = ctypes.c_char_p
    code = loaded.sl_check(torch.cuda.current_device())
    if code:
        supports = f"the driver supports CUDA {toolchain.driver() or 'of an unknown version'}"
        versions = f"{supports}, torch was built for {torch.version.cuda}, nvcc is {toolchain.nvcc_version()}"
        why = loaded.sl_error(code).decode()
        raise BuildError(f"{why} ({versions}): update the driver or use an older nvcc")


# The cache.


def cache() -> Path:
    """The folder for libraries, which need not exist."""
    if named := os.environ.get("STYLELOOM_CACHE"):
        return Path(os.path.expanduser(named)).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return _spare_cache() if base.startswith("~") else Path(base).absolute() / "styleloom" / "ops"


def _spare_cache() -> Path:
    """Where to build when the cache cannot be written."""
    return Path(tempfile.gettempdir()) / f"styleloom-ops-{os.getuid() if hasattr(os, 'getuid') else 0}"


def _is_safe(folder: Path) -> bool:
    """Whether nobody else can have put a library here: the spare folder is in one that all can write."""
    its = folder.lstat()
    ours = stat.S_ISDIR(its.st_mode) and (os.name == "nt" or (its.st_uid == os.getuid() and not its.st_mode & 0o022))
    return ours or folder != _spare_cache()


def _cached(recipe: Recipe) -> Iterator[Path]:
    """The files that will do. Those that were cut short are removed."""
    for folder in (cache(), _spare_cache()):
        with contextlib.suppress(OSError):
            if not _is_safe(folder):
                continue
            for file in sorted(folder.glob(f"{recipe.kind}-{recipe.what}-{recipe.tool}-*.so")):
                named = file.stem.split("-")
                if len(named) != 5:  # somebody's copy
                    continue
                target, digest = named[3:]
                if recipe.accepts(target):
                    if toolchain.digest(file.read_bytes()) == digest:
                        yield file
                    else:
                        file.unlink()


def _make(recipe: Recipe, useless: set[Path]) -> tuple[Path, bool]:
    """A new library, and whether this process built it: another may have done so meanwhile."""
    if recipe.lacks:
        raise BuildError(recipe.lacks)
    reasons = []
    for folder in (cache(), _spare_cache()):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not _is_safe(folder):
                raise OSError(errno.EPERM, "it belongs to somebody else")
            return _make_in(folder, recipe, useless)
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
            if len(reasons) == 1:
                say(f"cannot write to the cache ({reasons[0]}): building in {_spare_cache()}")
    raise BuildError(f"no folder to build in ({'; '.join(reasons)}): set STYLELOOM_CACHE to one that can be written")


def _time_out() -> float:
    given = os.environ.get("STYLELOOM_BUILD_TIMEOUT", "600")
    try:
        return float(given)
    except ValueError:
        raise BuildError(f"STYLELOOM_BUILD_TIMEOUT={given} is no number of seconds") from None


def _acquire(file: IO[str]) -> bool:
    """Waits until no other process builds this, or `STYLELOOM_BUILD_TIMEOUT`: then two do, which harms nothing.

    Returns whether this process has the lock. The kernel lets go of it when the file is closed or the process dies, so
    a file left behind blocks nobody.
    """
    start, spoken = time.monotonic(), 0.0
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError:  # this file system has none
            return False
        waited = time.monotonic() - start
        if waited > _time_out():
            return False
        if waited > (spoken + _SPEAK_EVERY if spoken else _SPEAK_AFTER):
            spoken = waited
            say(f"waiting for another process to build the ops ({waited:.0f} s so far)")
        time.sleep(_POLL)
    return False


def _changed(file: Path) -> int:
    with contextlib.suppress(OSError):
        return file.stat().st_mtime_ns
    return 0


def _make_in(folder: Path, recipe: Recipe, useless: set[Path]) -> tuple[Path, bool]:
    """As `_make`, in a folder that can be written."""
    log = folder / f"{recipe.stem}.log"
    before = _changed(log)
    with open(folder / f"{recipe.stem}.lock", "w") as lock:
        locked = _acquire(lock)
        for file in _cached(recipe):
            if file not in useless:
                return file, False
        if _changed(log) not in (0, before):  # so does ours fail, as many times as there are processes
            raise BuildError(log.read_text().partition("\n")[0])
        _sweep(folder, recipe.stem if locked else None)
        built = _build_in(folder, recipe, "locked" if locked else "free")
        if locked:
            _forget(folder, recipe)
        return built, True


def _build_in(folder: Path, recipe: Recipe, how: str) -> Path:
    """The new library, complete or not at all; `how` is a part of the name of the folder in which it grows."""
    start = time.monotonic()
    name, takes = f"the {recipe.kind.upper()} ops", "some seconds" if recipe.kind == "cpu" else "a minute"
    say(f"building {name} (once, {takes}) ...")
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{recipe.stem}.{how}-", ignore_cleanup_errors=True) as work:
        made = _compile(recipe, Path(work), folder / f"{recipe.stem}.log")
        with open(made, "rb") as file:
            digest = toolchain.digest(file.read())
            os.fsync(file.fileno())
        library = folder / f"{recipe.stem}-{digest}.so"
        os.replace(made, library)
    say(f"built {name} in {time.monotonic() - start:.1f} s")
    return library


def _sweep(folder: Path, stem: str | None) -> None:
    """Removes what killed builds left: those of the lock that we hold, others when they are a day old."""
    ours = re.compile(r"(cpu|cuda)(-[0-9a-f]{12}){2}-[^-]+\.(locked|free)-")
    for each in filter(lambda each: ours.match(each.name), list(folder.iterdir())):
        with contextlib.suppress(OSError):
            if each.name.startswith(f"{stem}.locked-") or time.time() - each.stat().st_mtime > _DAY:
                shutil.rmtree(each, ignore_errors=True)


def _forget(folder: Path, recipe: Recipe) -> None:
    """Removes the libraries of other sources, for the same tool and target, that have long not been used."""
    for file in folder.glob(f"{recipe.kind}-*-{recipe.tool}-{recipe.target}-*.so"):
        with contextlib.suppress(OSError):
            its = file.stat()  # whoever may not touch it still reads it
            unused = time.time() - max(its.st_atime, its.st_mtime)
            if not file.name.startswith(f"{recipe.stem}-") and unused > _UNUSED:
                file.unlink()


# The compilation.


def _compile(recipe: Recipe, work: Path, log: Path) -> Path:
    """The library, built in the folder `work`.

    Raises:
        BuildError: the compiler refuses, or takes too long; what it said is kept in `log`.
        OSError: the disk is full.
    """
    objects = [f"{i}.o" for i in range(len(recipe.sources))]
    steps = [[*recipe.compile, "-c", str(s), "-o", o] for s, o in zip(recipe.sources, objects, strict=True)]
    steps.append([*recipe.link, "-o", "library.so", *objects, *recipe.libraries])
    program = toolchain.ninja()
    if program:
        (work / "build.ninja").write_text(_ninja_file(steps, objects))
        steps = [[*program, "-j", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)]]
    deadline = time.monotonic() + _time_out()
    for step in steps:
        status, said = _execute(step, work, deadline)
        if status == 0:
            continue
        for code in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(code) in said:
                raise OSError(code, os.strerror(code))
        problem = toolchain.first_error(said).replace(f"{recipe.sources[0].parent}{os.sep}", "")
        if status is None:
            problem = f"the compiler ran longer than {_time_out():g} s (STYLELOOM_BUILD_TIMEOUT)"
        with contextlib.suppress(OSError):
            log.write_text(f"{problem} (more in {log})\n{shlex.join(step)}\n{said}")
            problem = f"{problem} (more in {log})"
        raise BuildError(problem)
    return work / "library.so"


def _ninja_file(steps: Sequence[Sequence[str]], objects: Sequence[str]) -> str:
    """The steps, of which the last needs the others' objects."""
    lines = ["rule run", "  command = $step"]
    for outcome, step in zip([*objects, "library.so"], steps, strict=True):
        needs = " ".join(objects) if outcome == "library.so" else ""
        lines += [f"build {outcome}: run {needs}", f"  step = {shlex.join(step).replace('$', '$$')}"]
    return "\n".join([*lines, ""])


def _execute(command: list[str], work: Path, deadline: float) -> tuple[int | None, str]:
    """Exit status (None: it took too long and was killed) and what it said. Nothing of it outlives an interrupt."""
    said = work / "said"
    with open(said, "wb") as out:
        process = subprocess.Popen(
            command, cwd=work, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            env=toolchain.environment() | {"TMPDIR": str(work)},
        )  # fmt: skip
    try:
        status = process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        status = None
    finally:
        _end(process)
    return status, said.read_text(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills it, if it still runs, and what it started; first kindly, since ninja has to pass it on."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, number) if os.name == "posix" else process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
