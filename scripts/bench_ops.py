"""`styleloom bench ops`: each op beside a copy of the same bytes, the plain formulation and a product of matrices."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from styleloom.ops import build
from styleloom.ops.bias_act import bias_act
from styleloom.ops.conv2d import conv2d
from styleloom.ops.upfirdn2d import setup_filter, strided, upfirdn2d
from styleloom.training.config import PRESETS, StyleGAN2Network
from styleloom.training.networks.growing import CLAMP
from styleloom.training.networks.stylegan2 import FILTER

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
PASSES = ("forward", "backward", "both")

RESAMPLING: dict[str, dict[str, Any]] = {
    "upfirdn2d up2": {"up": 2, "down": 1, "padding": (2, 1, 2, 1), "gain": 4.0},
    "upfirdn2d down2": {"up": 1, "down": 2, "padding": (1, 1, 1, 1), "gain": 1.0},
    "upfirdn2d blur": {"up": 1, "down": 1, "padding": (2, 1, 2, 1), "gain": 1.0},
}
POINTWISE = ("bias_act", "bias_act layer")  # the second is a generator's layer: demodulation and noise as well
CONVOLUTIONS: dict[str, dict[str, int]] = {"conv2d": {}, "conv2d up": {"up": 2}, "conv2d down": {"down": 2}}

TARGETS = [(4, 64, 128, 128), (4, 512, 16, 16)]  # shapes by which the ops on the CPU are judged
COPIES = [2**20, 2**24, 2**28]  # bytes read and written
SHORTEST = 0.002  # seconds: calls that take less are measured several at a time
ROUNDS = (5, 50)  # at least and at most


@dataclass(frozen=True)
class Case:
    """An op at the shape of its input; `channels` of a convolution's result."""

    op: str
    shape: tuple[int, int, int, int]
    channels: int = 0


@dataclass
class Prepared:
    """A case in one dtype and layout.

    paths: the op in each formulation. inputs: what has gradients, x first. bytes: that a forward and a backward pass
    have to move, at least; None where computing takes longer than that.
    """

    paths: dict[str, Callable[[], Tensor]]
    inputs: list[Tensor]
    dy: Tensor
    bytes: dict[str, int] | None


# What is measured.


def cases(resolutions: Sequence[int], batch: int, targets: bool = True) -> list[Case]:
    """The ops at levels 16, R / 4 and R of StyleGAN2 of each resolution R, and at the shapes of the targets.

    The batch belongs to 256 px; larger images come in smaller ones.
    """
    found: dict[Case, None] = {}
    for shape in TARGETS if targets else []:
        found |= dict.fromkeys(Case(op, shape) for op in (*RESAMPLING, *POINTWISE))
    for resolution in resolutions:
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"a resolution of {resolution} px: it has to be a power of 2 from 8 on")
        n = max(1, batch * 256 // max(resolution, 256))
        for level in sorted({16, resolution // 4, resolution} & set(range(8, resolution + 1))):
            found |= dict.fromkeys(_level(resolution, n, level))
    return list(found)


def _level(resolution: int, n: int, level: int) -> list[Case]:
    preset = PRESETS.get(f"stylegan2-{resolution}")
    network = preset.network if preset else StyleGAN2Network()
    c, below = (max(1, min(network.channel_base // s, network.channel_max)) for s in (level, level // 2))
    here, half = (n, c, level, level), (n, c, level // 2, level // 2)
    return [
        *(Case(op, half if op == "upfirdn2d up2" else here) for op in RESAMPLING),
        *(Case(op, here) for op in POINTWISE),
        Case("conv2d", here, c),
        Case("conv2d up", (n, below, level // 2, level // 2), c),
        Case("conv2d down", here, below),
    ]


def prepare(case: Case, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> Prepared:
    """Makes the inputs of a case and its formulations; parameters are fp32, as in training."""
    n, c, h, w = case.shape
    x = torch.randn(case.shape, dtype=dtype, device=device).contiguous(memory_format=layout).requires_grad_()
    inputs, others, f = [x], {}, setup_filter(FILTER).to(device)
    if case.op in RESAMPLING:
        how = RESAMPLING[case.op]
        op = functools.partial(upfirdn2d, x, f, **how)
        others = {"torch": functools.partial(strided, x, f, flip_filter=False, **how)}
    elif case.op in POINTWISE:
        shapes = {"b": [c]} | ({"scale": [n, c], "noise": [n, 1, h, w]} if case.op != "bias_act" else {})
        named = {name: torch.randn(shape, device=device, requires_grad=True) for name, shape in shapes.items()}
        inputs += named.values()
        op = functools.partial(bias_act, x, act="lrelu", clamp=CLAMP, **named)
    else:
        weight = torch.randn(case.channels, c, 3, 3, device=device) / math.sqrt(9 * c)
        inputs += [weight.requires_grad_()]
        op = functools.partial(conv2d, x, weight, f, **CONVOLUTIONS[case.op])
    ours = build.path(device.type)
    paths = {"plain": plainly(op), **others, **({} if ours == "reference" else {ours: op})}
    with torch.no_grad():
        dy = torch.randn_like(op()).contiguous(memory_format=layout)
    moved = None
    if case.op not in CONVOLUTIONS:
        size, result = (t.numel() * t.element_size() for t in (x, dy))
        kept = {"bias_act": size, "bias_act layer": 2 * size}.get(case.op, 0)  # y; for the scale's gradient x as well
        moved = {"forward": size + result, "backward": result + kept + size}
    return Prepared(paths, inputs, dy, moved)


def measure(
    all_cases: Sequence[Case], dtypes: Sequence[str], device: torch.device, rates: dict[str, float], budget: float
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one case, dtype and layout after the other.

    Args:
        rates: FLOP/s of matrices in each dtype.
        budget: seconds for the repetitions of a pass over all its formulations.
    """
    for case in all_cases:
        for dtype in dtypes:
            for layout in LAYOUTS:
                yield _rows(case, dtype, layout, device, rates[dtype], budget)


def _rows(
    case: Case, dtype: str, layout: str, device: torch.device, rate: float, budget: float
) -> list[dict[str, Any]]:
    its = prepare(case, DTYPES[dtype], LAYOUTS[layout], device)
    flops = count(its) if its.bytes is None else None
    found = []
    for name in PASSES:
        moved = None if its.bytes is None else [its.bytes[part] for part in parts(name)]
        functions = {path: timed(op, its, name) for path, op in its.paths.items()}
        if moved is not None:
            functions = {"copy": copy(moved, DTYPES[dtype], device)} | functions
        best = interleave(functions, device, budget)
        where = {"op": case.op, "shape": list(case.shape), "dtype": dtype, "layout": layout}
        for path in its.paths:
            seconds = best[path]
            row = where | {"path": path, "pass": name, "seconds": seconds, "speedup": best["plain"] / seconds}
            if moved is not None:
                row |= {"bytes": sum(moved), "gb_per_s": sum(moved) / seconds / 1e9, "copy_seconds": best["copy"]}
                row |= {"times_copy": seconds / best["copy"], "copy_share": best["copy"] / seconds}
            if flops is not None:
                done = sum(flops[part] for part in parts(name))
                row |= {"flops": done, "flop_per_s": done / seconds, "matrix_share": done / seconds / rate}
            found.append(row)
    return found


def parts(name: str) -> list[str]:
    """The passes of which a pass consists."""
    return ["forward", "backward"] if name == "both" else [name]


def timed(op: Callable[[], Tensor], its: Prepared, name: str) -> Callable[[], Any]:
    """What one repetition of a pass calls."""
    if name == "forward":
        return torch.no_grad()(op)
    if name == "both":
        return lambda: torch.autograd.grad(op(), its.inputs, its.dy)
    y = op()
    return lambda: torch.autograd.grad(y, its.inputs, its.dy, retain_graph=True)


# Formulations and operations.


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Lets the ops run by their definitions."""
    before = os.environ.get("STYLELOOM_OPS")
    os.environ["STYLELOOM_OPS"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["STYLELOOM_OPS"]
        else:
            os.environ["STYLELOOM_OPS"] = before


def plainly(op: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with plain():
            return op()

    return run


def count(its: Prepared) -> dict[str, int]:
    """FLOPs of the plain formulation, forward and backward."""
    found = {name: counted(timed(its.paths["plain"], its, name)) for name in ("forward", "both")}
    return {"forward": found["forward"], "backward": found["both"] - found["forward"]}


class _Counter(TorchDispatchMode):
    """What torch's FlopCounterMode counts. That one also follows modules, and then refuses a gradient of a gradient."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.flops += 0 if formula is None else formula(*args, **(kwargs or {}), out_val=result)
        return result


def counted(function: Callable[[], Any]) -> int:
    """FLOPs of a call: 2 for each multiplication of matrix products and convolutions. Computes nothing; `function`
    must neither change tensors in place nor ask for their values."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Counter() as counter:
        function()
    return counter.flops


# Time.


def interleave(functions: dict[str, Callable[[], Any]], device: torch.device, budget: float) -> dict[str, float]:
    """Seconds of a call of each: the best of several rounds in which each has its turn, after warming up."""
    best, calls = {}, {}
    for name, function in functions.items():
        function()
        best[name] = seconds(function, device)
        calls[name] = max(1, math.ceil(SHORTEST / max(best[name], 1e-7)))
    least, most = ROUNDS
    rounds = int(budget / sum(best[name] * calls[name] for name in functions))
    for _ in range(min(max(rounds, least), most)):
        for name, function in functions.items():
            best[name] = min(best[name], seconds(function, device, calls[name]))
    return best


def seconds(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Of a call, on the device's own clock: on a GPU with what launching costs where that takes longer."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


# What the machine can do.


def copy(moved: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Copies that read and write so many bytes together, one after the other."""
    sizes = [max(1, size // 2 // dtype.itemsize) for size in moved]
    pairs = [[torch.zeros(size, dtype=dtype, device=device) for _ in range(2)] for size in sizes]

    def run() -> None:
        for source, target in pairs:
            target.copy_(source)

    return run


def copy_rates(device: torch.device, budget: float) -> list[dict[str, float]]:
    """Bandwidth of copies of several sizes."""
    found = []
    for size in COPIES:
        took = interleave({"copy": copy([size], torch.float32, device)}, device, budget)["copy"]
        found.append({"bytes": size, "seconds": took, "gb_per_s": size / took / 1e9})
    return found


def matrix_rate(dtype: torch.dtype, device: torch.device, budget: float) -> float:
    """FLOP/s of a product of large matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return 2 * n**3 / interleave({"": lambda: torch.mm(a, b, out=out)}, device, budget)[""]
