"""training/watchdog.py: who is to blame, and real hangs.

`python test_watchdog.py FOLDER`, which the fixture `outcomes` starts, provokes all hangs at once: each case below is
played by three processes over gloo, forked so that torch is imported once. It writes what each said on stderr,
CASE-RANK.err, and how they ended, outcomes.json.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from styleloom.training import watchdog
from styleloom.training.watchdog import HANGS, Grace, Place, State, Watchdog, judge

WORLD, SECONDS, LONG = 3, 3.0, 600.0


class Played:
    """One process of a case: its rank, its place, and collectives in it."""

    def __init__(self, rank: int, place: Place) -> None:
        self.rank, self.place = rank, place

    def gather(self, objects: list) -> list:
        with self.place.waiting():
            theirs = [[] for _ in range(WORLD)]
            dist.all_gather_object(theirs, objects)
            return [x for each in theirs for x in each]

    def reduce(self) -> None:
        with self.place.waiting():
            dist.all_reduce(torch.ones(1))

    def reduce_as_nccl(self) -> None:
        """Where another process is gone, gloo raises; this waits on, as NCCL does."""
        with self.place.waiting():
            try:
                dist.all_reduce(torch.ones(1))
            except RuntimeError:
                time.sleep(LONG)

    def work(self, seconds: float) -> None:
        """Alone, with progress."""
        for step in range(int(seconds / 0.1)):
            self.place.at(f"step {step}")
            time.sleep(0.1)


def hangs(its: Played) -> None:
    its.place.nimg = 12300
    its.place.at("phase Dmain")
    if its.rank == 2:
        stuck_on_a_dead_disk()
    its.reduce()


def stuck_on_a_dead_disk() -> None:
    time.sleep(LONG)


def all_wait(its: Played) -> None:
    with its.place.waiting():
        time.sleep(LONG)


def gone(rank: int, number: signal.Signals) -> Callable[[Played], None]:
    def case(its: Played) -> None:
        its.place.at("phase Gmain")
        if its.rank == rank:
            time.sleep(0.5)  # so that the others have heard where it is
            os.kill(os.getpid(), number)
        its.reduce_as_nccl()

    return case


def fails(its: Played) -> None:
    if its.rank == 1:
        raise ValueError("the disk is full")
    its.reduce_as_nccl()


def leaves_early(rank: int) -> Callable[[Played], None]:
    def case(its: Played) -> None:
        if its.rank != rank:
            its.work(1.5 * SECONDS)

    return case


def well(its: Played) -> None:
    """Others wait for longer than `SECONDS` for one that works."""
    if its.rank == 1:
        its.work(1.5 * SECONDS)
    its.reduce()


def suspended(its: Played) -> None:
    """The parent stops all three for longer than `SECONDS`; one has still to work when it lets them go on."""
    if its.rank == 1:
        for _ in range(20):
            time.sleep(0.05)
    its.reduce()


CASES: dict[str, Callable[[Played], None]] = {
    "hangs": hangs,
    "all wait": all_wait,
    "first killed": gone(0, signal.SIGKILL),
    "killed": gone(1, signal.SIGKILL),
    "first stopped": gone(0, signal.SIGSTOP),
    "stopped": gone(1, signal.SIGSTOP),
    "fails": fails,
    "first leaves early": leaves_early(0),
    "leaves early": leaves_early(1),
    "well": well,
    "suspended": suspended,
    "unreachable": well,
}


def take_part(case: str, rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / f"{case}.store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    its = Played(rank, Place())
    address = "localhost"
    if case == "unreachable":
        watchdog._PATIENCE = 0.5
        address = "192.0.2.1"  # of TEST-NET-1, which is nowhere
    with Watchdog(its.place, rank, WORLD, its.gather, SECONDS, address):
        (folder / f"{case}-{rank}.entered").touch()
        CASES[case](its)


def out_of_grace(case: str, rank: int, folder: Path) -> None:
    with Grace(0.2, lambda: "too late; the newest checkpoint is checkpoints/nimg-000000040") as grace:
        if case == "in time":
            grace.start()
        elif case == "out of time":
            signal.signal(signal.SIGTERM, lambda *_: grace.start())
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LONG)
        else:
            time.sleep(0.5)  # never started
    time.sleep(0.5)


GRACES = ("in time", "out of time", "never asked for")


def fork(case: str, rank: int, folder: Path, play: Callable[[str, int, Path], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    file = os.open(folder / f"{case}-{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    try:
        play(case, rank, folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def suspend(pids: list[int], folder: Path) -> None:
    """As a batch system suspends a job."""
    while not all((folder / f"suspended-{rank}.entered").exists() for rank in range(WORLD)):
        time.sleep(0.01)
    for number, then in ((signal.SIGSTOP, 1.5 * SECONDS), (signal.SIGCONT, 0.0)):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(then)


def main(folder: Path) -> None:
    pids = {case: [fork(case, rank, folder, take_part) for rank in range(WORLD)] for case in CASES}
    pids |= {case: [fork(case, 0, folder, out_of_grace)] for case in GRACES}
    threading.Thread(target=suspend, args=(pids["suspended"], folder), daemon=True).start()
    ended: dict[int, int] = {}
    # Those that a case stops stay stopped.
    wanted = {pid for its in pids.values() for pid in its} - {pids["first stopped"][0], pids["stopped"][1]}
    give_up = time.monotonic() + 60
    while wanted - set(ended) and time.monotonic() < give_up:
        for pid in wanted - set(ended):
            its, status = os.waitpid(pid, os.WNOHANG)
            if its:
                ended[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in {pid for its in pids.values() for pid in its} - set(ended):
        os.kill(pid, signal.SIGKILL)
    outcomes = {case: [(ended.get(pid), pid) for pid in its] for case, its in pids.items()}
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, python):
    """case -> (statuses by rank, None where it had not ended; pids; what each said)."""
    folder = tmp_path_factory.mktemp("hangs")
    process = python(Path(__file__), folder)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, (out, err)
    return {
        case: (
            [status for status, _ in its],
            [pid for _, pid in its],
            [(folder / f"{case}-{rank}.err").read_text() for rank in range(len(its))],
        )
        for case, its in json.loads((folder / "outcomes.json").read_text()).items()
    }


def named(rank: int, pids: list[int]) -> str:
    return f"styleloom train: rank {rank} on {socket.gethostname()} (pid {pids[rank]})"


def test_one_that_hangs_is_named_with_its_phase_and_all_end(outcomes):
    statuses, pids, said = outcomes["hangs"]
    assert statuses == [HANGS] * WORLD
    first, second = said[0].splitlines()  # once on a host
    assert first.startswith(f"{named(2, pids)} has not moved for 3 s (phase Dmain, at 12.3 kimg)")
    assert first.endswith("the other processes wait for it.")
    assert "the same command goes on" in second
    assert said[1] == ""


def test_one_that_hangs_shows_its_stacks(outcomes):
    said = outcomes["hangs"][2][2]
    assert said.startswith("styleloom train: the Python stacks of rank 2")
    assert "in stuck_on_a_dead_disk" in said


def test_where_all_wait_the_network_is_suspected(outcomes):
    statuses, _, said = outcomes["all wait"]
    assert statuses == [HANGS] * WORLD
    assert "no process has moved for 3 s (starting, waiting for the others, at 0 kimg): the network" in said[0]
    assert said[1:] == ["", ""]


@pytest.mark.parametrize("case", ["killed", "stopped"])
def test_one_without_a_sign_of_life_is_named_and_the_others_end(outcomes, case):
    statuses, pids, said = outcomes[case]
    assert [statuses[0], statuses[2]] == [HANGS] * 2
    assert said[0].startswith(f"{named(1, pids)} has given no sign of life for ")
    assert "(phase Gmain, at 0 kimg)" in said[0].splitlines()[0]
    assert len(said[0].splitlines()) == 2


@pytest.mark.parametrize("case", ["first killed", "first stopped"])
def test_without_the_first_each_of_the_others_ends_by_itself(outcomes, case):
    statuses, pids, said = outcomes[case]
    assert statuses[1:] == [HANGS] * 2
    for each in said[1:]:
        assert each.startswith(f"{named(0, pids)} has given no sign of life for ")
        assert "(phase Gmain, at 0 kimg)" in each
        assert len(each.splitlines()) == 2


def test_one_that_failed_is_named_with_its_error(outcomes):
    statuses, pids, said = outcomes["fails"]
    assert statuses == [HANGS, 1, HANGS]
    assert said[0].startswith(f"{named(1, pids)} ended (ValueError: the disk is full)")
    assert "watchdog" not in said[1].replace("test_watchdog", "")  # its own traceback only


@pytest.mark.parametrize("case", ["well", "leaves early", "first leaves early", "suspended"])
def test_no_false_alarm(outcomes, case):
    statuses, _, said = outcomes[case]
    assert statuses == [0] * WORLD
    assert said == [""] * WORLD


def test_a_first_that_cannot_be_reached_is_told_of_and_training_goes_on(outcomes):
    statuses, _, said = outcomes["unreachable"]
    assert statuses == [0] * WORLD
    assert said[0].startswith("styleloom train: hanging processes will not be noticed: rank 1 on ")
    assert "cannot reach 192.0.2.1" in said[0]
    assert said[1:] == ["", ""]


def test_grace_ends_a_process_that_does_not_end(outcomes):
    statuses, _, said = outcomes["out of time"]
    assert statuses == [128 + signal.SIGTERM]
    assert said == ["too late; the newest checkpoint is checkpoints/nimg-000000040\n"]


@pytest.mark.parametrize("case", ["in time", "never asked for"])
def test_grace_leaves_alone_who_ends_in_time(outcomes, case):
    statuses, _, said = outcomes[case]
    assert (statuses, said) == ([0], [""])


@pytest.mark.parametrize(("world", "seconds"), [(1, 60.0), (2, 0.0)])
def test_nothing_is_watched_alone_or_without_a_limit(world, seconds):
    def gather(_):
        raise AssertionError

    before = threading.active_count()
    with Watchdog(Place(), 0, world, gather, seconds):
        assert threading.active_count() == before


def test_a_place_counts_its_moves_and_a_collective_within_another_once():
    place = Place()
    place.at("phase Gmain")
    assert (place.what, place.moves, place.waits) == ("phase Gmain", 1, False)
    with place.waiting():
        with contextlib.suppress(ValueError), place.waiting():
            raise ValueError
        assert place.waits
    assert (place.collectives, place.waits) == (1, False)
    moves = place.moves
    place.at("phase Gmain")
    assert place.moves > moves


def states(count: int = 4, **its) -> list[State]:
    """Of processes on the hosts a, a, b, b, ... that have all stood still in the same place."""
    its = {"what": "phase Gmain", "nimg": 0, "waits": True, "collectives": 5, "still": 60.0} | its
    return [State(rank=rank, host="abcdefgh"[rank // 2], pid=100 + rank, **its) for rank in range(count)]


def test_nobody_is_judged_while_one_moves():
    its = states()
    assert judge(its, 60) is not None
    its[3] = replace(its[3], still=59.0)
    assert judge(its, 60) is None


def test_who_says_it_and_who_shows_stacks():
    its = states(6)
    its[3] = replace(its[3], waits=False)
    verdict = judge(its, 60)
    assert verdict is not None
    assert (verdict.speakers, verdict.stacks) == ([0, 2, 4], [3])
    its[2] = replace(its[2], silent=45.0)
    verdict = judge(its, 60)
    assert verdict is not None
    assert (verdict.speakers, verdict.stacks) == ([0, 3, 4], [])
    assert verdict.text.startswith("rank 2 on b (pid 102) has given no sign of life for 45 s (phase Gmain, waiting")


def test_who_has_entered_fewer_collectives_is_behind_where_none_waits_in_one():
    # As with CUDA, whose collectives return at once.
    its = states(waits=False)
    its[1] = replace(its[1], collectives=4, what="phase Dmain")
    verdict = judge(its, 60)
    assert verdict is not None
    assert verdict.text.startswith("rank 1 on a (pid 101) has not moved for 60 s (phase Dmain, at 0 kimg); the other")


def test_all_stuck_at_the_same_thing():
    verdict = judge(states(what="waiting for data", waits=False), 60)
    assert verdict is not None
    assert "no process has moved for 60 s (waiting for data, at 0 kimg): what they read, or a device," in verdict.text


def test_places_are_named_where_all_wait_in_different_ones():
    its = states()
    its[3] = replace(its[3], what="saving")
    verdict = judge(its, 60)
    assert verdict is not None
    assert "(rank 0 and 2 more: phase Gmain, waiting for the others, at 0 kimg; rank 3: saving," in verdict.text


def test_many_are_summarised():
    its = [replace(s, waits=s.rank == 0) for s in states(8)]
    verdict = judge(its, 60)
    assert verdict is not None
    line = verdict.text.splitlines()[0]
    assert "rank 3 on b" in line
    assert "rank 4" not in line
    assert " and 4 more; the other processes wait" in line


def test_the_last_at_work_is_not_judged_unless_it_waits():
    its = [replace(s, ended=None if s.rank == 0 else "", waits=False) for s in states()]
    assert judge(its, 60) is None
    verdict = judge([replace(its[0], waits=True), *its[1:]], 60)
    assert verdict is not None
    assert verdict.text.startswith("rank 1 on a (pid 101) has left in good order, but the others still wait for it;")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
