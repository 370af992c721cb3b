"""Memory of the CPU that is freed and soon needed again."""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of glibc's mallopt


def keep_freed_memory() -> bool:
    """Lets this process keep the memory it frees for its next allocations, and says whether it will.

    By default glibc returns every freed block of megabytes to the system, and the next one of the same size comes back
    page by page, cleared: for the feature maps of a training step that costs several times what the ops on them cost.
    The price is that memory once used stays with the process. Only with glibc; there is nothing to do on a GPU.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, 2**31 - 1), mallopt(TOP_PAD, 64 << 20)])
