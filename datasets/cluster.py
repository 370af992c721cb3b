"""Runs tasks on a Dask cluster: workers on other machines that see the same folders.

Dask, since it is pure Python and small, and has its own ways to start from Slurm, SGE, PBS, LSF, Kubernetes and ssh.
It is the extra `dask`; nothing of it is imported without `--dask`.
"""

import importlib
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .workers import Engine, Stopped, Tick, interrupts_blocked

LOCAL = "local"
_CONNECT = 15  # seconds
_LOOK = 2.0  # seconds from one look at whether the work was called off to the next


@contextmanager
def dask_engine(address: str, workers: int, shared: Path) -> Iterator[Engine]:
    """Yields what runs tasks on the workers of the scheduler at `address`, such as tcp://host:8786.

    address: or "local", for a cluster of `workers` processes on this machine. shared: a folder that all workers see.
    The bar moves when a task ends, by as much as the task ticked.

    Raises ValueError if Dask is not installed, or nobody answers at the address.
    """
    distributed = _import()
    with ExitStack() as opened:
        if address == LOCAL:
            with interrupts_blocked():  # Ctrl-C reaches the whole group; this process decides
                cluster = distributed.LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    processes=True,
                    memory_limit=0,  # no limit: it would be a share of the machine's
                    dashboard_address=None,
                    silence_logs=logging.CRITICAL,
                )
            address = opened.enter_context(cluster).scheduler_address
        try:
            client = opened.enter_context(distributed.Client(address, timeout=_CONNECT, set_as_default=False))
        except (OSError, ValueError) as error:  # time-outs too
            raise ValueError(f"no Dask scheduler answers at {address}: {error}") from None

        if not client.nthreads():
            print(f"the Dask cluster at {address} has no workers yet: waiting for them", file=sys.stderr, flush=True)

        def engine(work, tasks, bar, collect=lambda result: None, /) -> None:
            _run(client, work, tasks, bar, collect, shared)

        yield engine


def _import() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError:
        raise ValueError("--dask needs Dask: pip install 'styleloom[dask]', here and on the workers") from None


def _run(client: Any, work: Callable, tasks: Sequence, bar: tqdm, collect: Callable[[Any], None], shared: Path) -> None:
    """Keeps so many tasks under way that no worker is idle; a million of them would crowd the scheduler."""
    distributed = _import()
    # While this file is there the work goes on: a task that runs cannot be cancelled, but it can look.
    sign = shared / f"dask-{uuid.uuid4().hex}"
    sign.touch()
    todo = iter(tasks)
    ended, running = distributed.as_completed([], loop=client.loop), set()

    def feed() -> None:
        most = 2 * max(sum(client.nthreads().values()), 32)
        while len(running) < most and (task := next(todo, None)) is not None:
            future = client.submit(remote, work, task, sign, pure=False)
            running.add(future)
            ended.add(future)

    try:
        feed()
        for future in ended:
            running.discard(future)
            try:
                ticks, result = future.result()
            except (distributed.KilledWorker, distributed.client.FutureCancelledError) as error:
                raise ValueError(f"the Dask cluster lost its workers ({error}). Run the same command again.") from None
            except ImportError as error:
                raise ValueError(f"{error} on the Dask workers: they need styleloom of the same version") from None
            bar.update(ticks)
            collect(result)
            feed()
    finally:
        sign.unlink(missing_ok=True)
        client.cancel(list(running))


def remote(work: Callable[[Any, Tick], Any], task: Any, sign: Path) -> tuple[int, Any]:
    """On a worker: (ticks, result) of the task. Raises Stopped soon after `sign` is gone."""
    ticks, looked = 0, time.monotonic()

    def tick() -> None:
        nonlocal ticks, looked
        ticks += 1
        if time.monotonic() - looked > _LOOK:
            looked = time.monotonic()
            if not os.path.exists(sign):
                raise Stopped

    result = work(task, tick)
    return ticks, result
