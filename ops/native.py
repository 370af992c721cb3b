"""The C interface of the native libraries, as csrc/api.h declares it."""

import ctypes

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from . import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SMALL = 32768  # elements below which a second thread costs more than it brings


class Upfirdn2d(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "y", "fx", "fy")],
        *[(name, ctypes.c_int64) for name in ("n", "c", "h", "w", "oh", "ow")],
        *[(name, ctypes.c_int32) for name in ("dtype", "channels_last", "fw", "fh", "up_x", "up_y")],
        *[(name, ctypes.c_int32) for name in ("down_x", "down_y", "pad_x", "pad_y", "flip")],
        ("gain", ctypes.c_float),
    ]


class BiasAct(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "y", "dy", "out", "scale", "noise", "bias")],
        *[(name, ctypes.c_void_p) for name in ("dscale", "dnoise", "dbias")],
        *[(name, ctypes.c_int64) for name in ("n", "c", "p")],
        *[(name, ctypes.c_int32) for name in ("dtype", "channels_last", "noise_batch", "act")],
        *[(name, ctypes.c_float) for name in ("alpha", "gain", "clamp")],
    ]


class Winograd(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "weight", "y")],
        *[(name, ctypes.c_int64) for name in ("n", "h", "w", "oh", "ow", "ci", "co", "co_stride", "ci_stride")],
        *[(name, ctypes.c_int32) for name in ("kind", "flip")],
    ]


def library(x: Tensor) -> ctypes.CDLL | None:
    """The native library for tensors like `x`; None where torch's own ops do the work."""
    if x.dtype not in DTYPES or type(x) not in (Tensor, torch.nn.Parameter) or watched():
        return None
    path = build.path(x.device.type)
    return build.library(path) if path in ("cuda", "cpu") else None


def watched() -> bool:
    """Whether something has to see torch's own ops and nothing else: a trace, fake tensors, torch.func's transforms
    or forward-mode differentiation.

    Traces would miss what ours do; the others' tensors have no memory.
    """
    modes = torch._C._TorchDispatchModeKey
    return (
        torch.jit.is_tracing()
        or peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.PROXY, modes.FAKE))
    )


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """(x [N, C, ...] without gaps, whether it is channels-last)."""
    if channels_last(x):
        return x.contiguous(memory_format=torch.channels_last), True
    return x.contiguous(), False


def channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.stride(1) == 1 and x.shape[1] > 1


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def call(library: ctypes.CDLL, name: str, args: ctypes.Structure, x: Tensor, *more: int | None) -> None:
    """Calls `name(args, *more, device or threads, stream)` for tensors where `x` lies. Raises as `check` does."""
    if x.is_cuda:
        where = (x.get_device(), ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream))
    else:
        where = (threads(x), None)
    check(library, name, getattr(library, name)(ctypes.byref(args), *(ctypes.c_void_p(m) for m in more), *where))


def check(library: ctypes.CDLL, name: str, code: int) -> None:
    """Raises RuntimeError, in the library's words, for a code other than 0."""
    if code:
        library.sl_error.restype = ctypes.c_char_p
        raise RuntimeError(f"{name}: {library.sl_error(code).decode()}")


def threads(x: Tensor) -> int:
    """Threads that the CPU library should use for a tensor."""
    return 1 if x.numel() < SMALL else torch.get_num_threads()
