"""Ends a training of several processes in which one hangs, and says which one, where, and in the middle of what.

Without it the others wait in a collective until its time-out, half an hour later, which names nobody. Each process
notes in a `Place` what it does, and a thread of its own tells rank 0's thread about once a second, in a datagram. Once
nobody has moved for `seconds`, rank 0's thread judges who holds up the others and tells everyone, and all end with
status `HANGS`. If rank 0 itself no longer answers, each of the others ends by itself.

Why not a TCPStore: a client whose server is a stopped process waits in C++ for ever, whatever its time-out, and each
call to one that has gone prints C++ stacks.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, TextIO

HANGS = 70  # the exit status of a training that hung: EX_SOFTWARE of sysexits.h
_NAMED = 3  # processes that a message names one by one
_PATIENCE = 10.0  # seconds, for the first answer of rank 0 and for a stderr that nobody reads
_BYTES = 65536  # of a datagram, at most


class Place:
    """What a process is doing. Its main thread writes, its watchdog reads; every change is a move."""

    def __init__(self) -> None:
        self.what = "starting"
        self.nimg = 0
        self.waits = False  # in a collective, for the other processes
        self.collectives = 0  # entered so far: the same on all processes, but for one that is behind
        self.moves = 0

    def at(self, what: str) -> None:
        """Notes what this process does now: "phase Gmain", "waiting for data"."""
        # First, as everywhere here: then who reads the state and then `moves` never takes a new state for an old one.
        self.moves += 1
        self.what = what

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Marks a collective: in this block the process waits for the others. Blocks may be nested."""
        nested = self.waits
        self.moves += 1
        self.collectives += not nested
        self.waits = True
        try:
            yield
        finally:
            self.moves += 1
            self.waits = nested


@dataclasses.dataclass(frozen=True)
class State:
    """What a process tells of itself."""

    rank: int
    host: str
    pid: int
    what: str
    nimg: int
    waits: bool
    collectives: int
    still: float  # seconds without a move
    ended: str | None = None  # None: it goes on; "": it left in good order; else the error that ended it
    silent: float = 0.0  # seconds since it was last heard of; for the listener to fill in

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    @property
    def where(self) -> str:
        waits = ", waiting for the others" if self.waits else ""
        return f"{self.what}{waits}, at {self.nimg / 1000:g} kimg"


class Verdict(NamedTuple):
    text: str
    speakers: list[int]  # the ranks that say it: one on each host
    stacks: list[int]  # the ranks that print their Python stacks


def judge(states: Sequence[State], seconds: float) -> Verdict | None:
    """Who holds up the others, if no process has moved for `seconds`; None as long as one does.

    Args:
        states: of the processes, by rank, as last heard.
        seconds: a process that has not been heard of for half of these gives no sign of life.
    """
    there = [s for s in states if s.ended is None]
    if not there or any(s.still + s.silent < seconds for s in there):
        return None
    if len(there) == 1 and not there[0].waits and not any(s.ended for s in states):
        return None  # the last one at work, for which nobody waits
    live = [s for s in there if s.silent <= seconds / 2]
    text, guilty = _accuse(states, there, live)
    speakers = {s.host: s.rank for s in sorted(live, key=lambda s: -s.rank)}
    stacks = [s.rank for s in guilty[:_NAMED] if s in live] if guilty else [live[0].rank]
    return Verdict(
        f"{text}.\nThe training ends here; the same command goes on from its newest checkpoint.",
        sorted(speakers.values()),
        stacks,
    )


def _accuse(states: Sequence[State], there: list[State], live: list[State]) -> tuple[str, list[State]]:
    """(what is wrong, who is to blame): the surest sign first."""
    lost = [s for s in there if s not in live]
    if lost:
        return _listed(lost, lambda s: f"{s} has given no sign of life for {s.silent:.0f} s ({s.where})"), lost
    failed = [s for s in states if s.ended]
    if failed:
        return _listed(failed, lambda s: f"{s} ended ({s.ended}), and the others wait"), failed
    furthest = max(s.collectives for s in live)
    behind = [s for s in live if s.collectives < furthest] or [s for s in live if not s.waits]
    if behind and len(behind) < len(live):
        says = _listed(behind, lambda s: f"{s} has not moved for {s.still:.0f} s ({s.where})")
        return f"{says}; the other processes wait for it", behind
    left = [s for s in states if s.ended == ""]
    if left:
        return _listed(left, lambda s: f"{s} has left in good order, but the others still wait for it"), left
    return _standstill(live), []


def _standstill(live: list[State]) -> str:
    """What to say where nobody is behind."""
    groups: dict[str, list[State]] = {}
    for s in live:
        groups.setdefault(s.where, []).append(s)
    still = f"for {min(s.still for s in live):.0f} s"
    if len(groups) > 1:
        places = "; ".join(f"rank {g[0].rank}{_more(g, 1)}: {where}" for where, g in list(groups.items())[:_NAMED])
        return f"the processes have waited for one another {still}, in different places ({places})"
    suspects = "the network between them, or a device," if live[0].waits else "what they read, or a device,"
    return f"no process has moved {still} ({live[0].where}): {suspects} does not answer"


def _listed(states: list[State], says: Callable[[State], str]) -> str:
    return "; ".join(map(says, states[:_NAMED])) + _more(states, _NAMED)


def _more(states: list[State], named: int) -> str:
    return f" and {len(states) - named} more" if len(states) > named else ""


class Post:
    """Datagrams of JSON between processes that share a secret; others' are ignored. None of it ever blocks for long."""

    def __init__(self, family: socket.AddressFamily, token: str) -> None:
        """Raises OSError if there is no such network."""
        self.token = token
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.bind(("", 0))

    @property
    def port(self) -> int:
        return self.socket.getsockname()[1]

    def close(self) -> None:
        self.socket.close()

    def send(self, to: Any, **content: Any) -> None:
        """Sends, or loses it."""
        with contextlib.suppress(OSError):
            self.socket.sendto(json.dumps({"token": self.token, **content}).encode(), to)

    def receive(self, seconds: float) -> tuple[dict[str, Any], Any] | None:
        """(content, address) of what came, if something came within `seconds`."""
        self.socket.settimeout(max(seconds, 0.001))
        try:
            data, address = self.socket.recvfrom(_BYTES)
            content = json.loads(data)
        except (OSError, ValueError):
            return None
        ours = isinstance(content, dict) and content.get("token") == self.token
        return (content, address) if ours else None


def _listening() -> Post:
    """A post at a free port that all hosts can reach. Raises OSError."""
    try:
        return Post(socket.AF_INET6, secrets.token_hex(16))  # takes IPv4 as well
    except OSError:
        return Post(socket.AF_INET, secrets.token_hex(16))


class Watchdog:
    """Watches over the processes of a training while in its context, from a daemon thread in each.

    Entering it is a collective. It does nothing with one process, with `seconds` 0, or, after a line on stderr, where
    rank 0 cannot be reached by UDP.

    Args:
        place: where this process's main thread says what it does.
        rank, world: of this process; the number of all.
        gather: the concatenation over all processes of lists, in the order of ranks.
        seconds: without a move of any process, after which all end with status `HANGS`. More than the longest time that
            a process does one thing.
        address: of rank 0's host; by default MASTER_ADDR.
        out: where it speaks, a file of the system; by default stderr.
    """

    def __init__(
        self,
        place: Place,
        rank: int,
        world: int,
        gather: Callable[[list[Any]], list[Any]],
        seconds: float,
        address: str | None = None,
        out: TextIO | None = None,
    ) -> None:
        self.place, self.rank, self.world, self.gather, self.seconds = place, rank, world, gather, seconds
        self.address = address or os.environ.get("MASTER_ADDR") or "localhost"
        self.out = out or sys.stderr
        # With very many processes rank 0 may spend a percent or two of its time on this, not more.
        self.beat = max(min(1.0, seconds / 20), world / 200)  # seconds
        self.host = socket.gethostname()
        self.clock = self.woke = self.still = 0.0  # seconds
        self.moves = -1
        self.heard: dict[int, tuple[State, float, Any]] = {}  # by rank: what it told, when by `clock`, its address
        self.ended: str | None = None
        self.leaving = threading.Event()
        self.post: Post | None = None
        self.to: Any = None  # rank 0's address
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.world == 1 or not self.seconds:
            return self
        fault = ""
        try:
            self.post = _listening() if self.rank == 0 else None
        except OSError as error:
            fault = f"rank 0 on {self.host}: {error}"
        port, token = self.gather([(self.post.port, self.post.token) if self.post else None])[0] or (0, "")
        if self.rank == 0 and self.post:
            self._start()  # the others want answers now
        elif port:
            fault = self._find(port, token)
        faults = [each for each in self.gather([fault]) if each]
        if faults:
            if self.rank == 0:
                self._say(f"hanging processes will not be noticed: {faults[0]}")
            self._stop()
        elif self.rank:
            self._start()
        return self

    def _find(self, port: int, token: str) -> str:
        """Calls rank 0 at each of its addresses; what is wrong if none answers."""
        why = f"no answer to UDP port {port} within {_PATIENCE:.0f} s"
        try:
            found = socket.getaddrinfo(self.address, port, type=socket.SOCK_DGRAM)
        except OSError as error:
            found, why = [], str(error)
        for family, _, _, _, to in found:
            with contextlib.suppress(OSError):
                self.post, self.to = Post(family, token), to
                give_up = time.monotonic() + _PATIENCE / len(found)
                while time.monotonic() < give_up:
                    self.post.send(to, state=vars(self._state()))
                    if self._take(self.post.receive(0.2)):
                        return ""
                self.post.close()
        return f"rank {self.rank} on {self.host} cannot reach {self.address} ({why})"

    def _start(self) -> None:
        self.woke = time.monotonic()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.ended = "" if kind is None else f"{kind.__name__}: {error}".splitlines()[0][:200]
        self._stop()

    def _stop(self) -> None:
        self.leaving.set()
        if self.thread:
            self.thread.join()  # where a verdict has come it ends the process, whatever the main thread has come to
        if self.post:
            self.post.close()

    def _watch(self) -> None:
        """The thread."""
        while not self.leaving.is_set():
            self._wake()
            if self.rank:
                self._send()
            if verdict := judge(self._states(), self.seconds):
                self._end(verdict)
            self._listen(self.beat)
        self._farewell()

    def _wake(self) -> None:
        """Counts time. What passes while this thread does not run, as in a job that is suspended, counts as a beat."""
        now = time.monotonic()
        passed, self.woke = min(now - self.woke, 2 * self.beat), now
        self.clock += passed
        self.still += passed

    def _state(self) -> State:
        """This process's own."""
        p = self.place
        what, waits, collectives = p.what, p.waits, p.collectives
        if p.moves != self.moves:
            self.moves, self.still = p.moves, 0.0
        return State(
            self.rank, self.host, os.getpid(), what[:200], p.nimg, waits, collectives, self.still, self.ended
        )  # fmt: skip

    def _states(self) -> list[State]:
        """Those to judge by: on rank 0 of all processes, elsewhere of rank 0 and this one, if rank 0 judges no more."""
        others = [dataclasses.replace(s, silent=self.clock - at) for s, at, _ in self.heard.values()]
        if self.rank == 0 and len(others) < self.world - 1:
            return []  # not all have called yet
        if self.rank and others[0].ended is None and others[0].silent <= self.seconds / 2:
            return []
        return sorted([*others, self._state()], key=lambda s: s.rank)

    def _send(self) -> None:
        """Tells rank 0; rank 0 tells all the others."""
        assert self.post
        state = vars(self._state())
        for to in [address for _, _, address in self.heard.values()]:
            self.post.send(to, state=state)

    def _listen(self, seconds: float) -> None:
        """Takes what comes within `seconds`, and answers on rank 0. Returns earlier when the process leaves."""
        assert self.post
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.leaving.is_set():
            came = self.post.receive(min(left, 0.1))
            if self._take(came) and came and self.rank == 0:
                self.post.send(came[1], state=vars(self._state()))

    def _take(self, came: tuple[dict[str, Any], Any] | None) -> bool:
        """Whether something came. Notes a state; ends the process if it was a verdict."""
        if not came:
            return False
        content, address = came
        if "verdict" in content:
            self._end(Verdict(*content["verdict"]))
        state = State(**content["state"])
        self.heard[state.rank] = state, self.clock, address if self.rank == 0 else self.to
        return True

    def _farewell(self) -> None:
        """Tells that this process leaves, and makes sure that it is known."""
        assert self.post
        for _ in range(3):
            self._send()
            if self.rank == 0 or self.heard[0][0].ended is not None or self._take(self.post.receive(0.1)):
                return

    def _end(self, verdict: Verdict) -> None:
        """Says the verdict, has all others say it, and ends this process: its main thread may be stuck in C code."""
        _end_after(_PATIENCE, HANGS)
        try:
            self._pass_on(verdict)
            if self.rank in verdict.speakers:
                self._say(verdict.text)
            if self.rank in verdict.stacks:
                self._say(f"the Python stacks of rank {self.rank} on {self.host}:")
                faulthandler.dump_traceback(self.out, all_threads=True)
            # Not before the others have heard it: they would see a broken connection and nothing else.
            for _ in range(2):
                time.sleep(self.beat)
                self._pass_on(verdict)
        finally:
            os._exit(HANGS)

    def _pass_on(self, verdict: Verdict) -> None:
        assert self.post
        for _, _, address in self.heard.values() if self.rank == 0 else []:
            self.post.send(address, verdict=verdict)

    def _say(self, text: str) -> None:
        print(f"styleloom train: {text}", file=self.out, flush=True)


def _end_after(seconds: float, status: int) -> None:
    """Ends the process even if what it says stays in a pipe that nobody empties."""
    timer = threading.Timer(seconds, os._exit, [status])
    timer.daemon = True
    timer.start()


class Grace:
    """In its context, the time that a process has to end once SIGTERM came; then it is ended.

    It counts from the signal itself: Python's handlers have to wait while the main thread is in C code, which may be
    a collective with a process that hangs. For the main thread, and there has to be a handler for SIGTERM.

    Args:
        seconds: of grace; 0: no limit.
        text: called when they have passed, for the line that is printed.
        out: where to; by default stderr.
    """

    def __init__(self, seconds: float, text: Callable[[], str], out: TextIO | None = None) -> None:
        self.seconds, self.text, self.out = seconds, text, out or sys.stderr
        self.cancelled = threading.Event()
        self.bell, self.rung = socket.socketpair()  # takes a byte for each signal: its number
        self.bell.setblocking(False)

    def __enter__(self) -> Self:
        if self.seconds:
            self.before = signal.set_wakeup_fd(self.bell.fileno(), warn_on_full_buffer=False)
            self.thread = threading.Thread(target=self._wait, name="grace", daemon=True)
            self.thread.start()
        return self

    def start(self) -> None:
        """The seconds begin, as with SIGTERM; only the first call counts. A signal's handler may call it."""
        with contextlib.suppress(OSError):  # full of signals
            self.bell.send(bytes([signal.SIGTERM]))

    def __exit__(self, *_: object) -> None:
        self.cancelled.set()
        if self.seconds:
            signal.set_wakeup_fd(self.before)
            self.bell.shutdown(socket.SHUT_WR)  # a process that reads data may hold a copy of it
            self.thread.join()
        self.bell.close()
        self.rung.close()

    def _wait(self) -> None:
        while (came := self.rung.recv(64)) and signal.SIGTERM not in came:
            pass
        if self.cancelled.wait(self.seconds):
            return
        _end_after(_PATIENCE, 128 + signal.SIGTERM)
        try:
            print(self.text(), file=self.out, flush=True)
        finally:
            os._exit(128 + signal.SIGTERM)
