"""Runs that are killed again and again, at any instant, and end as if nothing had been.

`python test_soak.py FOLDER ARGS...`, which the first test starts, trains with `styleloom train ARGS` in processes
forked from one that has imported everything: a try then costs half a second instead of eight, and a hundred kills two
minutes instead of twenty. It forks before it has any thread. Each try is a session of its own, which is killed as a
whole, so that the process that reads its data is killed as well.
"""

import collections
import contextlib
import ctypes
import json
import mmap
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from styleloom.training.checkpoint import complete

BATCH, EVERY = 4, 12  # images of a step; from one checkpoint to the next
LONG = ["--checkpoint-kimg=0.012", "--tick-kimg=0.02", "--snapshot-kimg=0.16", "--keep-checkpoints=999"]
KILLS, TOTAL = 100, 1200  # at least so many, in so many images of one process
KILLS_OF_RANKS, TOTAL_OF_RANKS = 12, 720
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
LIMIT = 300  # seconds, for each thing that has to come


def newest(out: Path) -> int:
    """Images of the newest whole checkpoint; 0: there is none."""
    return max((int(path.name[5:]) for path in complete(out / "checkpoints")), default=0)


# The process that forks and kills


class Seen(ctypes.Structure):
    """What a try does, in memory that its killer shares and that outlives it."""

    _fields_ = [
        ("moves", ctypes.c_long),  # as the watchdog counts them
        ("nimg", ctypes.c_long),
        ("saves", ctypes.c_long),  # begun
        ("saving", ctypes.c_long),  # one is being written
        ("what", ctypes.c_char * 200),  # the main thread does
    ]

    @property
    def where(self) -> str:
        what = self.what.decode() or "starting"
        return "saving" if self.saving else "step" if what.startswith("phase") else what


def observed(seen: Seen) -> None:
    """From here on this process writes down in `seen` what it does."""
    from styleloom.training import checkpoint
    from styleloom.training.watchdog import Place

    at, save = Place.at, checkpoint.save

    def noting(self: Place, what: str) -> None:
        at(self, what)
        seen.what, seen.nimg = what.encode(), self.nimg
        seen.moves += 1

    def saving(*args: Any) -> Path:
        seen.saves += 1
        seen.saving = 1
        target = save(*args)
        seen.saving = 0
        return target

    Place.at, checkpoint.save = noting, saving


class Try:
    """A process that trains, and the processes that it starts."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        from faults import fork

        from styleloom.scripts import cli, train

        folder.mkdir()
        self.folder, self.status = folder, None
        self.seen = Seen.from_buffer(mmap.mmap(-1, ctypes.sizeof(Seen)))

        def do() -> None:
            observed(self.seen)
            cli.run(train.main, "train", command)

        self.pid = fork(do, folder, 0, {})

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def kill(self) -> None:
        """All of them, and waits until they are gone."""
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has started none yet, or none is left
            os.killpg(self.pid, signal.SIGKILL)
            while True:
                os.waitpid(-self.pid, 0)

    def wait(self, seconds: float, moves: int = 0, saves: int = 0) -> None:
        """Until it has made so many moves and begun so many saves, and some seconds more, or has ended."""
        while not self.ended() and (self.seen.moves < moves or self.seen.saves < saves):
            time.sleep(0.0005)
        until = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < until:
            time.sleep(0.0005)


def wait_for_some_instant(its: Try, chance: random.Random) -> None:
    """Counted in what the try does rather than in seconds, so that it does not depend on the machine how far it comes:
    at any time from the start on; at any move; in the midst of a save, or soon after."""
    kind = chance.random()
    if kind < 0.15:
        its.wait(chance.uniform(0, 0.5))
    elif kind < 0.6:
        its.wait(chance.uniform(0, 0.02), moves=chance.randint(1, 45))
    else:
        its.wait(chance.uniform(0, 0.01), saves=chance.randint(1, 2))


def soak(root: Path, command: list[str]) -> None:
    """An undisturbed run in root/whole; one that is killed until it is done in root/out, with notes in tries.json."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1)  # the children of a killed try become ours
    undisturbed = Try(root / "undisturbed", [*command, "--out", str(root / "whole")])
    while not undisturbed.ended():
        time.sleep(0.01)
    chance, out, tries = random.Random(0), root / "out", []
    while not tries or tries[-1]["status"] is None:
        before = newest(out)
        its = Try(root / f"try{len(tries)}", [*command, "--out", str(out)])
        wait_for_some_instant(its, chance)
        if not its.ended():
            its.kill()
        tries.append(
            {
                "status": its.status,  # None: it was killed
                "before": before,
                "after": newest(out),
                "nimg": its.seen.nimg,
                "where": its.seen.where,
                "half": len(list(out.glob("*/*.tmp"))),
                "out": (its.folder / "out-0").read_text(),
                "err": (its.folder / "err-0").read_text(),
            }
        )
    (root / "tries.json").write_text(json.dumps(tries))


# Tests


@pytest.mark.slow
def test_a_hundred_kills(tmp_path, unlabelled, arguments, python, assert_same_run, capsys):
    command = arguments(unlabelled, "", *LONG, f"--total-kimg={TOTAL / 1000}", "--data.workers=1")
    process = python(Path(__file__), tmp_path, *command)
    try:
        said = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, said
    *killed, last = json.loads((tmp_path / "tries.json").read_text())
    with capsys.disabled():
        print("\n" + told(killed))
    assert last["status"] == 0
    assert len(killed) >= KILLS
    assert {"starting", "waiting for data", "step", "saving"} <= {each["where"] for each in killed}
    for each in [*killed, last]:
        assert each["err"] == ""
        # It goes on from the newest checkpoint that there was, which is not further back than one interval of
        # checkpoints and the save that was under way.
        if going := re.match(r"Going on from \S+/nimg-(\d+): ", each["out"]):
            assert int(going[1]) == each["before"]
        else:
            assert each["before"] == 0 or not each["nimg"]
        assert each["after"] >= each["before"]
        assert each["nimg"] - each["after"] < 2 * EVERY + BATCH
    assert_same_run(tmp_path / "out", tmp_path / "whole", TOTAL // EVERY, -(-TOTAL // 160))
    assert not list((tmp_path / "out").rglob("*.tmp"))


def told(killed: list[dict[str, Any]]) -> str:
    where = collections.Counter(each["where"] for each in killed)
    halves = sum(each["half"] > 0 for each in killed)
    redone = sum(max(each["nimg"] - each["after"], 0) for each in killed)
    return (
        f"{len(killed)} kills: {', '.join(f'{n} {what}' for what, n in where.most_common())}; {halves} left half a "
        f"folder or file; {redone} images had to be done again"
    )


@pytest.mark.slow
def test_a_dozen_kills_of_ranks(tmp_path, unlabelled, arguments, python, assert_same_run, capsys, monkeypatch):
    """Under torch's launcher, which starts both anew each time."""
    # Otherwise torch 2.15 keeps one store for all tries, in which a rank may find where another was that was killed
    # while it joined: both then wait for half an hour.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    module = ["-m", "styleloom.scripts.train"]
    command = arguments(unlabelled, "", *LONG, f"--total-kimg={TOTAL_OF_RANKS / 1000}")
    out, chance, killed = tmp_path / "out", random.Random(0), []
    restarts = f"--max-restarts={KILLS_OF_RANKS}"
    launcher = python(restarts, *module, *command, "--out", out, ranks=2)
    whole = None
    try:
        gone: set[int] = set()
        for _ in range(KILLS_OF_RANKS):
            ranks = wait_for_ranks(launcher.pid, gone)
            before, further = newest(out), chance.randint(0, 3)
            give_up = time.monotonic() + LIMIT
            while newest(out) < before + further * EVERY:
                assert launcher.poll() is None, launcher.communicate()
                assert time.monotonic() < give_up
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.2 if further else 6))  # seconds; it takes some to start
            rank = chance.randrange(2)
            killed.append((rank, newest(out)))
            os.kill(ranks[rank], signal.SIGKILL)
            gone |= set(ranks)
        said = launcher.communicate(timeout=LIMIT)
        assert launcher.returncode == 0, said
        whole = python(*module, *command, "--out", tmp_path / "whole", ranks=2)
        assert whole.communicate(timeout=LIMIT)[1].count("styleloom") == 0
    finally:
        for process in filter(None, (launcher, whole)):
            if process.poll() is None:
                for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    each.kill()
                process.communicate()
    with capsys.disabled():
        print("\nkilled: " + ", ".join(f"rank {rank} beyond {nimg} images" for rank, nimg in killed))
    began = [int(nimg) for nimg in re.findall(r"Going on from \S+/nimg-(\d+): ", said[0])]
    assert began == sorted(began)
    assert set(began) >= {nimg for _, nimg in killed[-1:]} - {0}
    assert_same_run(out, tmp_path / "whole", TOTAL_OF_RANKS // EVERY, -(-TOTAL_OF_RANKS // 160))
    assert not list(out.rglob("*.tmp"))


def wait_for_ranks(launcher: int, gone: set[int]) -> list[int]:
    """The ids of the launcher's two ranks, by rank, once both are others than those that have gone."""
    give_up = time.monotonic() + LIMIT
    while time.monotonic() < give_up:
        found = {}
        for child in psutil.Process(launcher).children():
            with contextlib.suppress(psutil.Error, KeyError):
                found[int(child.environ()["RANK"])] = child.pid
        if len(found) == 2 and not gone & set(found.values()):
            return [found[0], found[1]]
        time.sleep(0.01)
    raise TimeoutError("no ranks")


if __name__ == "__main__":
    soak(Path(sys.argv[1]), sys.argv[2:])
