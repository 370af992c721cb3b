"""ops/build.py: what is built when, what is found in the cache, and that no fault stops a run or leaves a mess.

Most processes here get a torch that is a few names, so that they start at once.
"""

import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch

from styleloom.ops import build, toolchain

HAS_CXX = any(map(shutil.which, ("c++", "g++", "clang++")))
pytestmark = [
    pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler"),
    pytest.mark.skipif(os.name != "posix", reason="needs flock, signals and shell scripts"),
]

CXX = shutil.which("c++") or shutil.which("g++") or "clang++"
SOURCE = """
#include "answer.h"
#ifndef ANSWER
#define ANSWER 42
#endif
extern "C" int answer(void) { return ANSWER; }
"""
CUDA_SOURCE = """
extern "C" int sl_check(int device) { return device; }
extern "C" const char *sl_error(int) { return "the driver is too old"; }
extern "C" int answer(void) { return 43; }
"""
# Loads the two modules by themselves, with the names of torch that they use.
PRELUDE = f"""
import sys, types
from pathlib import Path
torch = types.ModuleType("torch")
torch.__file__ = {torch.__file__!r}
torch.version = types.SimpleNamespace(hip=None, cuda="13.0")
torch.cuda = types.SimpleNamespace(is_available=lambda: False)
sys.modules["torch"] = torch
sys.path.append({str(Path(build.__file__).parents[1])!r})
from ops import build
build.SOURCES = Path("sources").absolute()
build._SPEAK_AFTER = 0.1
"""
DAY, OTHER = 86400, 12 * "0"
LOAD = "assert build.load('cpu', build.SOURCES)[0].answer() == 42"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """A folder of its own with `sources`, and a cache and a temporary folder in it; nothing set, nothing remembered."""
    for name in ("CXX", "LOCAL_RANK", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("STYLELOOM_OPS", "STYLELOOM_NVCC", "STYLELOOM_BUILD_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("sources", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "sources" / "answer.cpp").write_text(SOURCE)
    (tmp_path / "sources" / "answer.h").touch()
    (tmp_path / "sources" / "answer.cu").write_text(CUDA_SOURCE)
    monkeypatch.setenv("STYLELOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    monkeypatch.setattr(build, "_outcomes", {})
    toolchain._output.cache_clear()
    build._say_lost.cache_clear()
    return tmp_path


def script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def counted(place, monkeypatch) -> Path:
    """The compiler becomes a script that appends a line for each use; so slow that others have to wait."""
    count = place / "count"
    count.touch()
    wrapper = script(
        place / "counted", f'[ "$1" = --version ] || {{ echo "$@" >> {count}; sleep 0.3; }}\nexec {CXX} "$@"'
    )
    monkeypatch.setenv("CXX", wrapper)
    return count


@pytest.fixture
def nvcc(place, monkeypatch) -> Path:
    """nvcc becomes a script that compiles with the C++ compiler and appends what it was asked for to this file."""
    asked = place / "asked"
    fake = f"""
    case "$1" in
    --version) echo "Cuda compilation tools, release 12.4, V12.4.1"; exit;;
    --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n'; exit;;
    esac
    echo "$@" >> {asked}
    arguments=
    while [ $# -gt 0 ]; do
        case "$1" in
        -gencode) shift;;
        -Xcompiler) arguments="$arguments $2"; shift;;
        *.cu) arguments="$arguments -x c++ $1";;
        *) arguments="$arguments $1";;
        esac
        shift
    done
    exec {CXX} $arguments"""
    monkeypatch.setenv("STYLELOOM_NVCC", script(place / "fake-nvcc", fake))
    return asked


@pytest.fixture
def start(place):
    """(code, **environment) -> a Python process, running, that has `build` and does `code`."""
    started = []

    def start(code: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code], cwd=place, env=os.environ | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=10)


def load(place: Path, kind: toolchain.Kind = "cpu", *archs: str) -> tuple[ctypes.CDLL, build.Status]:
    return build.load(kind, place / "sources", archs)


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def wait_for(what, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


# The cache and its key.


def test_is_built_once_and_then_found(place, capfd):
    loaded, its = load(place)
    assert loaded.answer() == 42
    assert its.ok
    assert its.built
    first, last = capfd.readouterr().err.splitlines()
    assert first == "styleloom: building the CPU ops (once, some seconds) ..."
    assert last.startswith("styleloom: built the CPU ops in ")
    assert libraries(place / "cache") == [its.file]
    loaded, its = load(place)
    assert loaded.answer() == 42
    assert (its.built, its.why) == (False, "from the cache")
    assert capfd.readouterr().err == ""
    assert not [each for each in (place / "cache").iterdir() if each.is_dir()]


@pytest.mark.parametrize("what", ["source", "header", "name", "flags", "compiler", "processor"])
def test_is_built_anew_when_anything_changes(place, monkeypatch, what):
    load(place)
    if what in ("source", "header"):
        with open(place / "sources" / f"answer.{'cpp' if what == 'source' else 'h'}", "a") as file:
            file.write("\n")
    elif what == "name":
        (place / "sources" / "answer.cpp").rename(place / "sources" / "other.cpp")
    elif what == "flags":
        monkeypatch.setattr(toolchain, "_CPU_FLAGS", [*toolchain._CPU_FLAGS, "-g"])
    elif what == "compiler":
        monkeypatch.setenv("CXX", script(place / "another", f'exec {CXX} "$@"'))
    else:
        monkeypatch.setattr(toolchain, "_processor", lambda: "another")
    assert load(place)[1].built
    assert len(libraries(place / "cache")) == 2


@pytest.mark.parametrize("how", ["cut short", "zeros", "no library"])
def test_a_damaged_library_is_built_anew(place, how):
    file = load(place)[1].file
    assert file
    whole = file.read_bytes()
    file.unlink()  # rather than writing into what this process has loaded
    if how == "no library":  # whose name is right, as on another machine
        file.with_name(f"{file.stem.rpartition('-')[0]}-{toolchain.digest(b'x')}.so").write_bytes(b"x")
    else:
        file.write_bytes(whole[: len(whole) // 2] if how == "cut short" else bytes(len(whole)))
    loaded, its = load(place)
    assert its.built
    assert loaded.answer() == 42
    assert not load(place)[1].built


@pytest.mark.parametrize("variables", [{"STYLELOOM_CACHE": "a/b"}, {"XDG_CACHE_HOME": "a"}, {"HOME": "a"}])
def test_where_the_cache_is(place, monkeypatch, variables):
    for name in ("STYLELOOM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(place / value))
    below = {"STYLELOOM_CACHE": "a/b", "XDG_CACHE_HOME": "a/styleloom/ops", "HOME": "a/.cache/styleloom/ops"}
    assert build.cache() == place / below[next(iter(variables))]


def test_without_a_home_folder_the_temporary_folder_is_used(place, monkeypatch):
    for name in ("STYLELOOM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert build.cache().parent == place / "temporary"
    assert load(place)[1].built
    assert not load(place)[1].built


def test_old_leftovers_are_removed_and_foreign_folders_are_not(place):
    its = load(place)[1]
    assert its.file
    its.file.unlink()
    stem = its.file.stem.rpartition("-")[0]
    names = [f"{stem}.free-old", f"{stem}.free-new", "my.project-old"]
    for name in names:
        (place / "cache" / name).mkdir()
        if name.endswith("old"):
            os.utime(place / "cache" / name, (0, 0))
    load(place)
    assert sorted(each.name for each in (place / "cache").iterdir() if each.is_dir()) == sorted(names[1:])


def test_libraries_of_other_sources_go_when_nobody_has_used_them_for_a_month(place):
    first = load(place)[1].file
    assert first
    kind, what, tool, target, digest = first.stem.split("-")
    new, old = time.time() - 29 * DAY, time.time() - 31 * DAY
    others = {  # (last read, last touched), and whether it stays
        f"{kind}-{OTHER}-{tool}-{target}-{digest}": (old, old, False),
        f"{kind}-{OTHER}-{tool}-{target}-{OTHER}": (new, old, True),  # by somebody who may not touch it
        f"{kind}-{OTHER}-{OTHER}-{target}-{digest}": (old, old, True),
        f"{kind}-{OTHER}-{tool}-other-{digest}": (old, old, True),
        f"cuda-{OTHER}-{tool}-{target}-{digest}": (old, old, True),
        f"my-{what}-{tool}-{target}-{digest}": (old, old, True),
    }
    for name, (read, touched, _) in others.items():
        first.with_name(f"{name}.so").touch()
        os.utime(first.with_name(f"{name}.so"), (read, touched))
    (place / "sources" / "answer.h").write_text("// new")
    second = load(place)[1].file
    assert second
    stay = {f"{name}.so" for name, (_, _, stays) in others.items() if stays}
    assert {file.name for file in libraries(place / "cache")} == stay | {first.name, second.name}


def test_a_library_is_used_when_it_is_loaded_and_removed_only_under_the_lock(place, monkeypatch):
    file = load(place)[1].file
    assert file
    os.utime(file, (0, 0))
    load(place)
    assert time.time() - file.stat().st_mtime < DAY
    os.utime(file, (0, 0))
    monkeypatch.setattr(build, "_acquire", lambda _: False)
    (place / "sources" / "answer.h").write_text("// new")
    assert load(place)[1].built
    assert file.exists()


def test_a_copy_beside_the_library_does_no_harm(place):
    load(place)
    (file,) = libraries(place / "cache")
    shutil.copy(file, file.with_name(f"{file.stem} - Copy.so"))
    its = load(place)[1]
    assert its.file == file
    assert not its.built


def test_a_library_that_may_not_be_touched_is_used(place, monkeypatch):
    load(place)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert not load(place)[1].built


# Compilers.


def test_without_a_compiler_says_what_to_do_unless_there_is_a_library(place, monkeypatch):
    monkeypatch.setenv("PATH", str(place))
    with pytest.raises(toolchain.BuildError, match=r"no C\+\+ compiler found: install g\+\+ or set CXX"):
        load(place)
    monkeypatch.undo()
    monkeypatch.setenv("STYLELOOM_CACHE", str(place / "cache"))
    load(place)
    monkeypatch.setenv("PATH", str(place))
    assert load(place)[1].why == "from the cache"


def test_the_compiler_may_have_arguments(place, monkeypatch):
    monkeypatch.setenv("CXX", f"{CXX} -DANSWER=7 '-DTEXT=a b'")
    assert load(place)[0].answer() == 7


@pytest.mark.parametrize("ninja", [True, False])
def test_without_ninja_nothing_is_lost(place, monkeypatch, ninja):
    if not ninja:
        monkeypatch.setattr(toolchain, "ninja", lambda: None)
    elif toolchain.ninja() is None:
        pytest.skip("no ninja")
    (place / "sources" / "more.cpp").write_text('extern "C" int more(void) { return 1; }')
    loaded, _ = load(place)
    assert (loaded.answer(), loaded.more()) == (42, 1)
    (place / "sources" / "more.cpp").write_text("int more(void) { return nothing; }\nint x = wrong;")
    with pytest.raises(toolchain.BuildError, match=r"^more\.cpp:1:\d+: error: .*nothing") as refusal:
        load(place)
    assert "\n" not in str(refusal.value)
    log = Path(str(refusal.value).partition("(more in ")[2].rstrip(")"))
    assert log.parent == place / "cache"
    assert "wrong" in log.read_text()
    assert len(libraries(place / "cache")) == 1


def test_ninja_may_be_a_module_only(place, monkeypatch):
    pytest.importorskip("ninja")
    monkeypatch.setenv("CXX", CXX)
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ninja" else real(name))
    assert toolchain.ninja() == [sys.executable, "-m", "ninja"]
    assert load(place)[1].built


def test_odd_characters_in_folders(place, monkeypatch):
    odd = place / "a $b 'c: d"
    (place / "sources").rename(odd)
    monkeypatch.setenv("STYLELOOM_CACHE", str(place / "cache $x: y"))
    assert build.load("cpu", odd)[0].answer() == 42


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_only_one_openmp_runtime_is_loaded(place):
    (place / "sources" / "sum.cpp").write_text("""
extern "C" int sum(int n) {
    int s = 0;
#pragma omp parallel for reduction(+ : s) num_threads(2)
    for (int i = 0; i < n; i++) s += 1;
    return s;
}
""")
    code = """
import re
from pathlib import Path
from styleloom.ops import build
print(build.load("cpu", Path("sources"))[0].sum(1000))
maps = Path("/proc/self/maps").read_text()
print(len(set(re.findall(r"/\\S*/lib(?:g|i)?omp[-.\\d]\\S*", maps))), len(set(re.findall(r"/\\S*/cpu-\\S*", maps))))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert out.stdout.split() == ["1000", "1", "1"], out.stderr


# Folders that cannot be written.


def test_a_cache_that_cannot_be_written(place, monkeypatch, capfd):
    (place / "file").touch()
    monkeypatch.setenv("STYLELOOM_CACHE", str(place / "file" / "cache"))
    its = load(place)[1]
    assert its.built
    assert its.file
    assert its.file.parent.parent == place / "temporary"
    assert its.file.parent.stat().st_mode & 0o777 == 0o700
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith(f"styleloom: cannot write to the cache ({place / 'file' / 'cache'}: Not a directory)")
    assert len(said) == 3
    assert not load(place)[1].built
    assert capfd.readouterr().err == ""

    its.file.parent.chmod(0o777)  # somebody else may have put a library there
    with pytest.raises(toolchain.BuildError, match=r"(?s)^no folder to build in.*somebody else.*set STYLELOOM_CACHE"):
        load(place)


def test_a_library_in_a_cache_that_cannot_be_written_is_used(place, monkeypatch):
    load(place)
    monkeypatch.setattr(build, "_make", None)
    assert not load(place)[1].built


@pytest.mark.parametrize("who", ["the compiler", "we"])
def test_a_full_disk(place, monkeypatch, capfd, who):
    if who == "we":
        real = os.replace

        def replace(source, target):
            if "/cache/" in str(target):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
    else:
        refuse = 'case "$PWD" in */cache/*) echo "fatal error: x.s: No space left on device" >&2; exit 1;; esac'
        monkeypatch.setenv("CXX", script(place / "full", f'{refuse}\nexec {CXX} "$@"'))
    its = load(place)[1]
    assert its.file
    assert its.file.parent.parent == place / "temporary"
    assert "No space left on device): building in" in capfd.readouterr().err
    assert not [each for each in (place / "cache").iterdir() if each.is_dir()]


# Several processes.


def test_two_at_once_build_once_and_the_other_says_that_it_waits(start, counted):
    two = [start(LOAD), start(LOAD)]
    said = [process.communicate(timeout=30)[1] for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    assert len(counted.read_text().splitlines()) == 2  # compiles and links
    assert sum("building the CPU ops" in each for each in said) == 1
    (waiter,) = [each for each in said if "building" not in each]
    assert "waiting for another process to build the ops (" in waiter


def test_a_failure_is_shared_by_those_who_waited(place, start, counted):
    (place / "sources" / "answer.cpp").write_text("wrong")
    two = [start("print(build.status('cpu').why)") for _ in range(2)]
    said = [process.communicate(timeout=30)[0] for process in two]
    assert said[0] == said[1]
    assert "error" in said[0]
    assert len(counted.read_text().splitlines()) == 1


def test_a_killed_holder_of_the_lock_blocks_nobody(place, start, counted):
    first = start(LOAD)
    wait_for(lambda: counted.read_text())
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    begin = time.monotonic()
    second = start(LOAD)
    err = second.communicate(timeout=30)[1]
    assert second.returncode == 0, err
    assert "waiting" not in err
    assert time.monotonic() - begin < 5
    assert not [each for each in (place / "cache").iterdir() if each.is_dir()]


def test_twenty_killed_builds_leave_nothing_wrong(place, start):
    rng = random.Random(0)
    for i in range(20):
        victim = start(LOAD)
        wait_for((place / "cache").is_dir)
        time.sleep(rng.uniform(0, 0.15))
        family = psutil.Process(victim.pid).children(recursive=True) if i % 2 else []
        os.killpg(victim.pid, signal.SIGKILL)
        for each in family:  # else the compiler goes on for a while
            if each.is_running():
                each.kill()
        victim.wait()
        if i % 4 == 3:
            after = start(LOAD)
            err = after.communicate(timeout=30)[1]
            assert after.returncode == 0, err
            assert not [each for each in (place / "cache").iterdir() if each.is_dir()]
        for file in libraries(place / "cache"):
            assert toolchain.digest(file.read_bytes()) == file.stem.rpartition("-")[2]
        if i % 4 == 3:
            shutil.rmtree(place / "cache")
    assert load(place)[0].answer() == 42


def test_an_interrupt_ends_the_compiler(place, start, monkeypatch):
    monkeypatch.setenv("CXX", script(place / "slow", f'[ "$1" = --version ] && exec {CXX} --version\nsleep 60'))
    process = start(LOAD)
    family: list[psutil.Process] = []
    wait_for(lambda: "sleep" in [each.name() for each in psutil.Process(process.pid).children(recursive=True)])
    family += psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    assert "KeyboardInterrupt" in err
    wait_for(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family), 3)
    assert not [each for each in (place / "cache").iterdir() if each.is_dir()]


def test_who_waits_too_long_builds_himself(place, monkeypatch, capfd):
    fcntl = pytest.importorskip("fcntl")
    file = load(place)[1].file
    assert file
    file.unlink()
    monkeypatch.setenv("STYLELOOM_BUILD_TIMEOUT", "2")
    monkeypatch.setattr(build, "_SPEAK_AFTER", 0.1)
    (lock,) = (place / "cache").glob("*.lock")
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert load(place)[1].built
    assert capfd.readouterr().err.count("waiting for another process") == 1


@pytest.mark.parametrize("ninja", [True, False])
def test_a_compiler_that_hangs_is_killed(place, monkeypatch, ninja):
    if not ninja:
        monkeypatch.setattr(toolchain, "ninja", lambda: None)
    monkeypatch.setenv("STYLELOOM_BUILD_TIMEOUT", "0.5")
    monkeypatch.setenv("CXX", script(place / "slow", f'[ "$1" = --version ] && exec {CXX} --version\nsleep 61'))
    begin = time.monotonic()
    with pytest.raises(toolchain.BuildError, match=r"the compiler ran longer than 0.5 s \(STYLELOOM_BUILD_TIMEOUT\)"):
        load(place)
    assert time.monotonic() - begin < 4
    wait_for(lambda: not any(each.info["cmdline"] == ["sleep", "61"] for each in psutil.process_iter(["cmdline"])), 3)


def test_a_time_out_has_to_be_a_number(place, monkeypatch):
    monkeypatch.setenv("STYLELOOM_BUILD_TIMEOUT", "soon")
    with pytest.raises(toolchain.BuildError, match="STYLELOOM_BUILD_TIMEOUT=soon is no number of seconds"):
        load(place)


@pytest.mark.parametrize("system", ["without fcntl", "without locks"])
def test_without_a_lock(place, monkeypatch, system):
    if system == "without fcntl":
        monkeypatch.setattr(build, "fcntl", None)
    else:

        def flock(*_):
            raise OSError(errno.ENOLCK, "no locks")

        monkeypatch.setattr(build.fcntl, "flock", flock)
    assert load(place)[0].answer() == 42


# What the ops ask for.


def test_a_failure_is_said_once_and_not_tried_again(place, start, counted):
    (place / "sources" / "answer.cpp").write_text("wrong")
    calls = "for _ in range(5): assert build.library('cpu') is None and build.path('cpu') == 'torch'"
    first = start(calls)
    lines = [line for line in first.communicate(timeout=30)[1].splitlines() if "building" not in line]
    assert first.returncode == 0
    assert len(lines) == 1
    assert lines[0].startswith(
        "styleloom: the fused CPU ops are off (slower torch ops are used): answer.cpp:1:1: error:"
    )
    assert len(counted.read_text().splitlines()) == 1
    assert start(calls, LOCAL_RANK="1").communicate(timeout=30)[1] == ""


@pytest.mark.parametrize(
    ("mode", "cpu", "cuda", "other"),
    [
        ("auto", "cpu", "cuda", "torch"),
        ("cpu", "cpu", "torch", "torch"),
        ("cuda", "torch", "cuda", "torch"),
        ("reference", "reference", "reference", "reference"),
    ],
)
def test_paths(monkeypatch, mode, cpu, cuda, other):
    asked = []

    def load(kind, _):
        asked.append(kind)
        return ctypes.CDLL(None), build.Status(True, "")

    monkeypatch.setattr(build, "load", load)
    monkeypatch.setenv("STYLELOOM_OPS", mode)
    for _ in range(3):
        assert [build.path(kind) for kind in ("cpu", "cuda", "mps", "meta")] == [cpu, cuda, other, other]
    assert asked == [each for each in (cpu, cuda) if each in ("cpu", "cuda")]


def test_a_path_that_is_forced_does_not_fall_back(monkeypatch, capfd):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.path("cpu") == "torch"
    assert len(capfd.readouterr().err.splitlines()) == 1
    monkeypatch.setenv("STYLELOOM_OPS", "cpu")
    with pytest.raises(
        toolchain.BuildError, match="STYLELOOM_OPS=cpu asks for the fused CPU ops, but: CXX=no-such-compiler"
    ):
        build.path("cpu")
    with pytest.raises(toolchain.BuildError, match=r"^CXX=no-such-compiler"):
        build.build("cpu")
    monkeypatch.setenv("STYLELOOM_OPS", "fast")
    with pytest.raises(ValueError, match="STYLELOOM_OPS=fast: it is one of auto, cuda, cpu, reference"):
        build.path("cpu")


def test_a_broken_environment_does_not_stop_a_run(monkeypatch, capfd):
    monkeypatch.setenv("CXX", "c++ 'x")
    assert build.path("cpu") == "torch"
    assert len(capfd.readouterr().err.splitlines()) == 1


# CUDA, with a fake nvcc.


def test_built_for_several_gpus_where_there_is_none_and_found_on_each(place, nvcc, monkeypatch):
    its = build.build("cuda", ["8.0", "9.0+PTX"])
    assert its.built
    compiled = nvcc.read_text().splitlines()[0]
    for code in ("compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"):
        assert f"-gencode arch={code}" in compiled
    assert "code=compute_80" not in compiled
    for compiler in (True, False):
        if not compiler:  # as on a compute node
            monkeypatch.setattr(toolchain, "find_nvcc", lambda: (_ for _ in ()).throw(toolchain.BuildError("no nvcc")))
        for gpus in [(80,), (90,), (80, 90), (90, 120)]:
            monkeypatch.setattr(toolchain, "devices", lambda gpus=gpus: gpus)
            assert load(place, "cuda")[1].file == its.file
    monkeypatch.setattr(toolchain, "devices", lambda: (75,))
    with pytest.raises(toolchain.BuildError, match="no nvcc"):
        load(place, "cuda")


def test_a_driver_that_refuses(place, nvcc, monkeypatch):
    monkeypatch.setattr(toolchain, "devices", lambda: (90,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(toolchain, "driver", lambda: "12.2")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert load(place, "cuda")[1].built
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 35)
    with pytest.raises(
        toolchain.BuildError, match=r"the driver is too old \(the driver supports CUDA 12.2, .*nvcc is 12.4"
    ):
        load(place, "cuda")


def test_the_real_nvcc_behind_a_wrapper_script(place, monkeypatch):
    real = shutil.which("nvcc")
    if real is None:
        pytest.skip("no nvcc")
    monkeypatch.setenv("STYLELOOM_NVCC", script(place / "wrapper", f'exec {real} "$@"'))
    (place / "sources" / "answer.cu").write_text("""
__global__ void set(int *p) { *p = 1; }
extern "C" int sl_check(int) { set<<<1, 1>>>(nullptr); return 0; }
extern "C" int answer(void) { return 44; }
""")
    newest = toolchain._output(real, "--list-gpu-arch").split()[-1].removeprefix("compute_")
    loaded, its = load(place, "cuda", f"{newest[:-1]}.{newest[-1]}+PTX")
    assert its.built
    assert loaded.answer() == 44
