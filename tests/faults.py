"""What can go wrong in a training of two processes, done to real ones. test_faults.py judges what came of it.

`faults.py all FOLDER ARGS...` plays all CASES, each in a folder of its own, with `styleloom train ARGS`; it writes
FOLDER/CASE.json. Their ranks are forked from this process, which has imported everything: a launch costs a second or
two, not eight. `torchrun ... faults.py rank FAULT FOLDER ARGS...` is `styleloom train ARGS` in which FAULT happens.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
import torch._dynamo  # which otherwise each rank's optimizers would import

from styleloom.scripts import cli, train
from styleloom.training import checkpoint, loop, watchdog  # noqa: F401 (loop: before the first fork)
from styleloom.training.trainer import Training

LIMIT = 150.0  # seconds, for whatever has to come in the end
AT = 52  # images; two thirds of the way from the checkpoint at 40 to the one at 60, neither a tick nor a snapshot
AT_ONCE = 3  # cases

Do = Callable[[], object]


def until(condition: Callable[[], object], what: str) -> None:
    """Waits for a condition. Raises TimeoutError(what)."""
    give_up = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(what)
        time.sleep(0.005)


# Faults: what is changed in a rank before it calls `styleloom train`. FOLDER/reached-RANK says that it has come to it.


def after_step(nimg: int, do: Callable[[Training], object]) -> None:
    step = Training.step

    def stepping(self: Training, images: torch.Tensor, labels: torch.Tensor) -> None:
        step(self, images, labels)
        if self.nimg == nimg:
            do(self)

    Training.step = stepping


def at(place: str, nimg: int, do: Do) -> None:
    """In the midst of what the watchdog knows by this name."""
    note = watchdog.Place.at

    def noting(self: watchdog.Place, what: str) -> None:
        note(self, what)
        if (what, self.nimg) == (place, nimg):
            do()

    watchdog.Place.at = noting


def sleep() -> None:
    time.sleep(10 * LIMIT)


def nothing(rank: int, reach: Do) -> None:
    pass


def held(rank: int, reach: Do) -> None:
    """All wait until FOLDER/released exists. (The first time: a folder has it afterwards.)"""
    after_step(AT, lambda _: reach())


def killed(rank: int, reach: Do) -> None:
    """The second is killed, at the first try of its launcher."""
    if rank == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        after_step(56, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def stuck_saving(rank: int, reach: Do) -> None:
    """The first never gets beyond the first file of its third checkpoint."""
    write = checkpoint.write_tensors

    def stuck(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        if path.parent.name.startswith("nimg-000000060") and any(path.parent.iterdir()):
            reach()
            sleep()
        return write(path, tensors)

    checkpoint.write_tensors = stuck


def stuck_in_a_phase(rank: int, reach: Do) -> None:
    if rank == 1:
        at("phase Gmain", AT, lambda: (reach(), sleep()))


def starved(rank: int, reach: Do) -> None:
    """The second waits for images that do not come."""
    stream = Training.stream

    def starving(self: Training) -> Iterator[Any]:
        for batch in stream(self):
            if self.nimg == AT:
                reach()
                sleep()
            yield batch

    if rank == 1:
        Training.stream = starving  # type: ignore[method-assign]


def starved_and_told(rank: int, reach: Do) -> None:
    """The same, and all are told to stop right before they begin to wait."""
    starved(rank, reach)
    at("waiting for data", AT, lambda: os.kill(os.getpid(), signal.SIGTERM))


def altered(rank: int, reach: Do) -> None:
    """One bit of a weight of the second changes by itself."""

    def alter(training: Training) -> None:
        with torch.no_grad():
            training.recipe.networks["G"].get_parameter("mapping.fc0.weight").view(torch.int32)[0, 0] ^= 1

    if rank == 1:
        after_step(44, alter)


def other_code(rank: int, reach: Do) -> None:
    """The second has another version installed."""
    for name, module in list(sys.modules.items()):
        if rank == 1 and name.startswith("styleloom.") and hasattr(module, "code_version"):
            vars(module)["code_version"] = lambda: "0123456789"


FAULTS = {
    f.__name__: f
    for f in (
        nothing, held, killed, stuck_saving, stuck_in_a_phase, starved, starved_and_told, altered, other_code,
    )
}  # fmt: skip


def take_part(fault: str, folder: Path, command: Sequence[str]) -> NoReturn:
    """`styleloom train COMMAND` in this process, a rank. Notes its status: torch's launcher does not tell it."""
    rank = int(os.environ["RANK"])

    def reach() -> None:
        (folder / f"reached-{rank}").touch()
        if fault == "held":
            until((folder / "released").exists, "released")

    FAULTS[fault](rank, reach)
    try:
        cli.run(train.main, "train", command)
    except SystemExit as stop:
        (folder / f"status-{rank}").write_text(str(stop.code))
        raise
    raise AssertionError


# Launches.


class Ranks:
    """The running processes of a training, forked from this one: one for each command, each in a session of its own.

    Leaving its `with` block waits for their end, and kills them if something is wrong.
    """

    def __init__(self, folder: Path, port: int, fault: str, commands: Sequence[Sequence[str]]) -> None:
        self.folder = folder
        folder.mkdir()
        self.statuses: list[int | None] = [None] * len(commands)
        self.pids: list[int] = []
        launch = {"WORLD_SIZE": len(commands), "LOCAL_WORLD_SIZE": len(commands), "MASTER_PORT": port}
        for rank, command in enumerate(commands):
            its = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", **launch}
            self.pids.append(fork(lambda: take_part(fault, folder, command), folder, rank, its))  # noqa: B023

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                until(self.ended, f"the end of {self.folder}")
        finally:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            until(self.ended, "killed processes")

    def reach(self, *ranks: int) -> None:
        """Waits until the fault has come to these."""
        for rank in ranks:
            until((self.folder / f"reached-{rank}").exists, f"{self.folder}/reached-{rank}")

    def kill(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.pids[rank], number)

    def ended(self) -> bool:
        for rank, pid in enumerate(self.pids):
            if self.statuses[rank] is None:
                its, status = os.waitpid(pid, os.WNOHANG)
                self.statuses[rank] = os.waitstatus_to_exitcode(status) if its else None
        return None not in self.statuses

    def said(self, name: str) -> list[str]:
        return [(self.folder / f"{name}-{rank}").read_text() for rank in range(len(self.pids))]


def fork(do: Callable[[], object], folder: Path, rank: int, environment: dict[str, Any]) -> int:
    """The id of a process that does this, says it in FOLDER/out-RANK and err-RANK, and ends at the latest with us."""
    pid = os.fork()
    if pid:
        return pid
    status: Any = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ |= {name: str(value) for name, value in environment.items()}
        do()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Play:
    """One case, in a folder of its own: the tries of one command, and what came of each."""

    def __init__(self, folder: Path, ports: Iterator[int], command: list[str]) -> None:
        self.folder, self.out, self.ports, self.command = folder, folder / "out", ports, command
        self.tries: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def ranks(self, fault: str = "nothing", *more: str, second: Sequence[str] = ()) -> Iterator[Ranks]:
        """A try; `more` arguments for both, `second` for the second rank only. Notes how it ended."""
        command = [*self.command, "--out", str(self.out), *more]
        folder = self.folder / f"try{len(self.tries)}"
        with Ranks(folder, next(self.ports), fault, [command, [*command, *second]]) as ranks:
            yield ranks
        checkpoints = self.out / "checkpoints"
        self.tries.append(
            {
                "statuses": ranks.statuses,
                "out": ranks.said("out"),
                "err": ranks.said("err"),
                "checkpoints": sorted(path.name for path in checkpoints.iterdir()) if checkpoints.exists() else [],
            }
        )

    def train(self, fault: str = "nothing", *more: str, second: Sequence[str] = ()) -> None:
        with self.ranks(fault, *more, second=second):
            pass


# Cases.


def undisturbed(play: Play) -> None:
    play.train()


def killed_while_saving(play: Play) -> None:
    with play.ranks("stuck_saving") as ranks:
        ranks.reach(0)
        ranks.kill(signal.SIGKILL, 0)
    play.train()


def out_of_grace(play: Play) -> None:
    with play.ranks("stuck_in_a_phase", "--parallel.grace-s=1") as ranks:
        ranks.reach(1)
        time.sleep(1)  # until the first is in a collective with it; if it is not, that is another way to the same end
        ranks.kill(signal.SIGTERM, 0)
        until(lambda: ranks.ended() or ranks.statuses[0] is not None, "the end of the first")
        ranks.kill(signal.SIGTERM, 1)
    play.train()


def waiting_for_data(play: Play) -> None:
    with play.ranks("starved") as ranks:
        ranks.reach(1)
        ranks.kill(signal.SIGTERM, 0, 1)
    play.train()


def told_before_waiting_for_data(play: Play) -> None:
    play.train("starved_and_told")
    play.train()


def full_disk(play: Play) -> None:
    """`play.out` is on a small disk, if one could be mounted."""
    disk = play.folder / "disk"
    if not disk.exists():
        return
    play.out = disk / "out"
    play.train()
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True, timeout=LIMIT)
    play.train()


def damaged(play: Play) -> None:
    play.train("killed")
    newest = play.out / "checkpoints" / "nimg-000000040" / "G.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 4
    newest.write_bytes(data)
    play.train()


def hanging(play: Play) -> None:
    play.train("stuck_in_a_phase", "--parallel.watchdog-s=5")
    play.train()


def other_settings(play: Play) -> None:
    play.train("nothing", second=["--batch=8"])


def different_code(play: Play) -> None:
    play.train("other_code")


def altered_weight(play: Play) -> None:
    play.train("altered")
    play.train()


def no_data(play: Play) -> None:
    play.train("nothing", "--data.path", str(play.folder / "nowhere"))


CASES = [
    undisturbed, killed_while_saving, out_of_grace, waiting_for_data, told_before_waiting_for_data, full_disk, damaged,
    hanging, other_settings, different_code, altered_weight, no_data,
]  # fmt: skip


def perform(case: Callable[[Play], None], folder: Path, ports: Iterator[int], command: list[str]) -> None:
    play = Play(folder, ports, command)
    case(play)
    (folder / "tries.json").write_text(json.dumps(play.tries))


def free_ports(count: int) -> list[int]:
    """Different ones: each is held until all are found."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def perform_all(root: Path, command: list[str]) -> None:
    """All cases, a few at once. A case that fails leaves no tries.json, and what it said in err-0."""
    going: set[int] = set()
    for case in CASES:
        folder, ports = root / case.__name__, iter(free_ports(3))
        folder.mkdir(exist_ok=True)
        if len(going) == AT_ONCE:
            going.remove(os.wait()[0])
        going.add(fork(lambda: perform(case, folder, ports, command), folder, 0, {}))  # noqa: B023
    while going:
        going.remove(os.wait()[0])


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "rank":
        take_part(rest[0], Path(rest[1]), rest[2:])
    perform_all(Path(rest[0]), rest[1:])
