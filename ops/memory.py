"""Memory of the CPU that is freed and soon needed again, and how much a device needs."""

import contextlib
import ctypes
import os
import re
import resource
import sys
import time
from pathlib import Path

import torch

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of glibc's mallopt

_given_back = time.monotonic()


def keep_freed_memory() -> bool:
    """Lets this process keep the memory it frees for its next allocations, and says whether it will.

    By default glibc returns every freed block of megabytes to the system, and the next one of the same size comes back
    page by page, cleared: for the feature maps of a training step that costs several times what the ops on them cost.
    The price is that freed memory stays with the process, and that a heap with holes may hold some times what is in
    use: `give_back_freed_memory` bounds that. STYLELOOM_KEEP_MEMORY=0 leaves all as the system has it. Only with glibc;
    there is nothing to do on a GPU.
    """
    libc = _glibc()
    if libc is None:
        return False
    return all([libc.mallopt(MMAP_MAX, 0), libc.mallopt(TRIM_THRESHOLD, -1), libc.mallopt(TOP_PAD, 64 << 20)])


def give_back_freed_memory(every: float = 30.0) -> bool:
    """Returns the pages of freed blocks to the system, and says so, unless it did in the last `every` seconds.

    Seldom enough to cost nothing, it keeps holes in the heap from adding up."""
    global _given_back
    libc = _glibc()
    if libc is None or time.monotonic() - _given_back < every:
        return False
    libc.malloc_trim(0)
    _given_back = time.monotonic()
    return True


def peak_memory(device: torch.device) -> int:
    """Bytes, the most since the last call: on a GPU of tensors, on the CPU of this process (but without Linux, or where
    the system does not allow it, since its start)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if not sys.platform.startswith("linux"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    high = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(high[1]) * 1024 if high else 0


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux") or os.environ.get("STYLELOOM_KEEP_MEMORY") == "0":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
