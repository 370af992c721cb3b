"""Runs one function over many tasks in several processes, which may be stopped or killed at any time.

What the standard pool lacks: progress within a task, stopping between two images, workers that end with their parent
(after a kill -9 they would wait for it for ever, or write on beside its successor), a plain error for a killed worker.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.sharedctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[], None]
"""To be called after each image."""


class Engine(Protocol):
    """Something that runs tasks, such as `run` with its number of workers given."""

    def __call__(
        self,
        work: Callable[[Task, Tick], Result],
        tasks: Sequence[Task],
        bar: tqdm,
        collect: Callable[[Result], None] = lambda result: None,
        /,
    ) -> None: ...


class Stopped(Exception):  # noqa: N818 (it is a request, not an error)
    """The run is being ended: leave the task, clean up."""


def default_workers() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_engine(workers: int) -> Engine:
    """`run` in so many processes of this machine."""

    def engine(work, tasks, bar, collect=lambda result: None, /) -> None:
        run(work, tasks, workers, bar, collect)

    return engine


def run(
    work: Callable[[Task, Tick], Result],
    tasks: Sequence[Task],
    workers: int,
    bar: tqdm,
    collect: Callable[[Result], None] = lambda result: None,
) -> None:
    """Calls `work(task, tick)` for every task, in no particular order, and `collect` on each result as it comes.

    `work` must be a top-level function. With one worker or task it runs in this process. `bar` moves on each tick.
    Raises what a task raised, and ValueError if a worker was killed. By then all workers have left their tasks.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        for task in tasks:
            collect(work(task, lambda: _advance(bar, bar.n + 1)))
        return
    first = bar.n
    with _held_signals() as came:
        context = _context(work.__module__)
        # Without locks: a worker killed while it holds one would stop everybody. A slot has one writer at a time.
        done, stop = context.RawArray("q", 2 * workers), context.RawValue("b", 0)
        pool = ProcessPoolExecutor(workers, context, _start, (done, stop))

        def is_over() -> bool:
            _advance(bar, first + sum(done))
            return bool(came)

        try:
            _feed(pool, work, tasks, 2 * workers, collect, is_over)
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed, perhaps for want of memory. "
                "Run the same command again, with fewer --workers if memory is short."
            ) from None
        finally:
            stop.value = 1
            pool.shutdown(cancel_futures=True)


def _context(module: str) -> Any:
    """How workers are started, with `module` imported.

    A fork server starts them in no time and lets them share the memory of what is imported; it is for Linux only.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    with interrupts_blocked():
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Lets processes and threads that are started in the block never hear of Ctrl-C, which would end them while they
    import. Without effect on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # it would be started on the way, and unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _held_signals() -> Iterator[list[int]]:
    """Holds Ctrl-C and SIGTERM back until the end of the block, and notes them in the list that it yields.

    Raised within the pool's own code, an exception leaves its locks taken, and its shutdown waits for ever.
    """
    came: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(n))]
        before = {n: signal.signal(n, lambda number, frame: came.append(number)) for n in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
            raise KeyboardInterrupt  # the work is not done, should the handler have returned


def _advance(bar: tqdm, n: int) -> None:
    bar.update(n - bar.n)


def _feed(
    pool: ProcessPoolExecutor,
    work: Callable,
    tasks: Sequence,
    slots: int,
    collect: Callable[[Any], None],
    is_over: Callable[[], bool],
) -> None:
    """Keeps a few tasks under way, so that a million of them do not lie pickled in the queue.

    Returns when all are done, or `is_over`, which is asked every quarter of a second or so.
    """
    todo = iter(tasks)
    free = list(range(slots))
    pending: dict[Future, int] = {}
    while True:
        while free and (task := next(todo, None)) is not None:
            slot = free.pop()
            pending[pool.submit(_work, work, task, slot)] = slot
        if is_over() or not pending:
            return
        finished, _ = wait(pending, timeout=0.25, return_when=FIRST_COMPLETED)
        for future in finished:
            free.append(pending.pop(future))
            collect(future.result())


_done: Any = None
_stop: Any = None


def _start(done: Any, stop: Any) -> None:
    """In a new worker."""
    global _done, _stop
    _done, _stop = done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(work: Callable, task: Any, slot: int) -> Any:
    """In a worker."""

    def tick() -> None:
        _done[slot] += 1
        if _stop.value:
            raise Stopped

    return work(task, tick)


def progress_bar(total: int, initial: int, what: str, show: bool, after: float = 0) -> tqdm:
    """A bar on stderr with images a second and the time left; in a log file, a line each half minute.

    after: seconds for which it does not show.
    """
    interval = 0.25 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=initial, desc=what, unit="img", mininterval=interval, disable=not show, delay=after
    )
