"""ops/memory.py: freed memory comes back without page faults."""

import subprocess
import sys

import pytest

from styleloom.ops import memory

CODE = """
import resource, sys
import torch
from styleloom.ops.memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
def use():
    torch.ones(32 << 20, dtype=torch.uint8)
for _ in range(12):  # until the heap has found a place for it
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    out = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True)
    if out.returncode == 3:
        pytest.skip("this C library does not have glibc's mallopt")
    assert out.returncode == 0, out.stderr
    return int(out.stdout)


def test_freed_memory_comes_back_without_page_faults() -> None:
    pages = 10 * (32 << 20) // 4096
    assert faults("keep") < pages / 20


def test_holes_are_given_back_now_and_then_and_not_at_all_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    if not memory.give_back_freed_memory(every=0):
        pytest.skip("this C library does not have glibc's mallopt")
    assert not memory.give_back_freed_memory(every=1000)
    monkeypatch.setenv("STYLELOOM_KEEP_MEMORY", "0")
    assert not memory.give_back_freed_memory(every=0)
    assert not memory.keep_freed_memory()
