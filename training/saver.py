"""Saving beside training: the states are copied to host memory, and a thread writes the copy while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from .checkpoint import States


class Saver:
    """Writes states in a thread, one save at a time. Leaving its `with` block finishes.

    Host memory: the size of one checkpoint, from the first `submit` on, since the copy's memory is used again. States
    on a GPU are copied to pinned memory, of which PyTorch takes the next power of two for each tensor: at most double.
    """

    def __init__(self) -> None:
        # The thread starts with the first save: processes that read data are forked before there is one.
        self._thread = ThreadPoolExecutor(1, "saver")
        self._writing: Future[Any] | None = None
        self._host: States = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.finish()
        except Exception as its:
            if error is None:
                raise
            error.add_note(f"Nor could the last save be written: {its}")
        finally:
            self._thread.shutdown()

    def submit(self, states: States, write: Callable[[States], object]) -> None:
        """Copies `states`, which may change once this returns, and calls `write` with the copy in the background.

        Waits for the save before, and raises what that one raised.
        """
        self.finish()
        self._host = to_host(states, self._host)
        self._writing = self._thread.submit(write, self._host)

    def check(self) -> None:
        """Raises, once, what the last save raised if it has ended. Never waits."""
        if self._writing and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Waits until the last save is written; raises, once, what it raised, such as OSError for a full disk."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()


def to_host(states: States, memory: States) -> States:
    """A copy of `states` on the CPU, contiguous, in the tensors of `memory` (an earlier copy) where they fit.

    The copy is whole when this returns.
    """
    host = {
        part: {name: _like(x, memory.get(part, {}).get(name)) for name, x in tensors.items()}
        for part, tensors in states.items()
    }
    on_gpu = [x.device for tensors in states.values() for x in tensors.values() if x.is_cuda]
    for part, tensors in states.items():
        for name, x in tensors.items():
            host[part][name].copy_(x.detach(), non_blocking=x.is_cuda)
    for device in set(on_gpu):  # the copies were only begun; pinned memory lets them overlap
        torch.cuda.synchronize(device)
    return host


def _like(x: Tensor, memory: Tensor | None) -> Tensor:
    """Memory on the CPU for a copy of `x`, pinned for a tensor on a GPU: `memory` if it is like that."""
    if memory is not None and (memory.shape, memory.dtype, memory.is_pinned()) == (x.shape, x.dtype, x.is_cuda):
        return memory
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
