"""ops/csrc/*.cu against the definitions: on a CPU, where tests/emulate runs their source, and on a GPU if one is there.

Which of the kernels a call takes follows from dtype, layout, sizes and addresses alone; `test_all_paths_of_upfirdn2d`
and `test_all_paths_of_bias_act` go through all of them, and the emulation counts that they did.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from styleloom.ops.upfirdn2d import reference

HERE = Path(__file__).parent
SOURCES = sorted((HERE.parent / "ops" / "csrc").glob("*.cu"))
ACTIVATIONS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")  # as in api.h
PIECEWISE_LINEAR = ACTIVATIONS[:3]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative, of one rounding (or a few)
GUARD = 512  # poisoned bytes around every tensor
POISON = 0xFF  # NaN, in floats

pointer, i64, i32, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Upfirdn2dArgs(ctypes.Structure):
    _fields_ = (
        *[(name, pointer) for name in ("x", "y", "fx", "fy")],
        *[(name, i64) for name in ("n", "c", "h", "w", "oh", "ow")],
        *[(name, i32) for name in ("dtype", "channels_last", "fw", "fh", "up_x", "up_y", "down_x", "down_y")],
        *[(name, i32) for name in ("pad_x", "pad_y", "flip")],
        ("gain", f32),
    )


class BiasActArgs(ctypes.Structure):
    _fields_ = (
        *[(name, pointer) for name in ("x", "y", "dy", "out", "scale", "noise", "bias", "dscale", "dnoise", "dbias")],
        *[(name, i64) for name in ("n", "c", "p")],
        *[(name, i32) for name in ("dtype", "channels_last", "noise_batch", "act")],
        *[(name, f32) for name in ("alpha", "gain", "clamp")],
    )


class Buffers:
    """Makes tensors between guards of NaN, and checks that the guards stay."""

    def __init__(self, device: str):
        self.device = device
        self.all: list[tuple[Tensor, int, int]] = []

    def new(self, shape, dtype=torch.float32, channels_last=False, shift=0, values: Tensor | None = None) -> Tensor:
        """A tensor [N, C, ...] in the layout, `shift` elements off 16-byte alignment; NaN where no values are given."""
        size = torch.Size(shape)
        item = torch.empty((), dtype=dtype).element_size()
        start, length = GUARD + shift * item, size.numel() * item
        raw = torch.full((start + length + GUARD,), POISON, dtype=torch.uint8, device=self.device)
        assert raw.data_ptr() % 16 == 0
        self.all.append((raw, start, length))
        flat = raw[start : start + length].view(dtype)
        if channels_last:
            n, c, *rest = size
            out = flat.view(n, *rest, c).movedim(-1, 1)
        else:
            out = flat.view(size)
        return out if values is None else out.copy_(values)

    def check(self) -> None:
        for raw, start, length in self.all:
            assert (raw[:start] == POISON).all(), "written before the tensor"
            assert (raw[start + length :] == POISON).all(), "written behind the tensor"


class Library:
    """The kernels, called as Python will call them."""

    def __init__(self, path: Path, device: str):
        self.lib, self.device = ctypes.CDLL(str(path)), device
        self.lib.sl_bias_act_workspace.restype = i64
        self.lib.sl_error.restype = ctypes.c_char_p
        self.done(self.lib.sl_check(0))

    def done(self, code: int) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
        assert code == 0, self.lib.sl_error(code)

    def stream(self):
        return pointer(torch.cuda.current_stream().cuda_stream if self.device != "cpu" else None)

    def upfirdn2d(self, x, fx, fy, up, down, pad, flip, gain, channels_last=False, shifts=(0, 0)) -> Tensor:
        """x is a CPU tensor; pad is (x0, x1, y0, y1); fx alone is a filter [fh, fw]. Returns a CPU tensor."""
        buffers = Buffers(self.device)
        (n, c, h, w), (fw, fh) = x.shape, (fx.shape[-1], len(fx if fy is None else fy))
        oh = (h * up[1] + pad[2] + pad[3] - fh) // down[1] + 1
        ow = (w * up[0] + pad[0] + pad[1] - fw) // down[0] + 1
        source = buffers.new(x.shape, x.dtype, channels_last, shifts[0], x)
        out = buffers.new((n, c, oh, ow), x.dtype, channels_last, shifts[1])
        taps = [None if f is None else buffers.new(f.shape, values=f) for f in (fx, fy)]
        its = [None if f is None else f.data_ptr() for f in taps]
        args = Upfirdn2dArgs(
            source.data_ptr(), out.data_ptr(), *its, n, c, h, w, oh, ow,
            DTYPES[x.dtype], channels_last, fw, fh, *up, *down, pad[0], pad[2], flip, gain,
        )  # fmt: skip
        self.done(self.lib.sl_upfirdn2d(ctypes.byref(args), 0, self.stream()))
        buffers.check()
        return out.cpu()

    def bias_act(self, x, scale, noise, bias, act, alpha, gain, clamp, channels_last, shift, dy, wanted):
        """(y, gradients of what `wanted` names among x, scale, noise, bias) from CPU tensors, as CPU tensors."""
        buffers = Buffers(self.device)
        its_x = buffers.new(x.shape, x.dtype, channels_last, shift, x)
        y = buffers.new(x.shape, x.dtype, channels_last, shift)
        operands = {"scale": scale, "noise": noise, "bias": bias}
        there = {k: buffers.new(v.shape, values=v) for k, v in operands.items() if v is not None}
        common = {
            **{k: v.data_ptr() for k, v in there.items()},
            **{"n": x.shape[0], "c": x.shape[1], "p": x.shape[2], "dtype": DTYPES[x.dtype]},
            **{"channels_last": channels_last, "noise_batch": noise is not None and noise.ndim == 2},
            **{"act": ACTIVATIONS.index(act), "alpha": alpha, "gain": gain, "clamp": -1 if clamp is None else clamp},
        }
        args = BiasActArgs(x=its_x.data_ptr(), out=y.data_ptr(), **common)
        self.done(self.lib.sl_bias_act_forward(ctypes.byref(args), 0, self.stream()))

        its_dy = buffers.new(x.shape, x.dtype, channels_last, shift, dy)
        found = {k: buffers.new(there[k].shape) for k in wanted if k != "x"}
        if "x" in wanted:
            found["x"] = buffers.new(x.shape, x.dtype, channels_last, shift)
        args = BiasActArgs(dy=its_dy.data_ptr(), **common)
        args.out = found["x"].data_ptr() if "x" in found else None
        for name in found.keys() & operands.keys():
            setattr(args, f"d{name}", found[name].data_ptr())
        # No more than it is promised: the rest is null.
        if act not in PIECEWISE_LINEAR or "scale" in wanted:
            args.x = its_x.data_ptr()
        if act in PIECEWISE_LINEAR and (act != "linear" or clamp is not None):
            args.y = y.data_ptr()
        workspace = buffers.new((self.lib.sl_bias_act_workspace(ctypes.byref(args)),), torch.uint8)
        for _ in range(2):
            before = {k: v.cpu().clone() for k, v in found.items()}
            self.done(
                self.lib.sl_bias_act_backward(ctypes.byref(args), pointer(workspace.data_ptr()), 0, self.stream())
            )
        for name, values in found.items():
            torch.testing.assert_close(values.cpu(), before[name], rtol=0, atol=0, equal_nan=True, msg="other bits")
        buffers.check()
        return y.cpu(), {k: v.cpu() for k, v in found.items()}


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Library:
    """The kernels compiled for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    path = tmp_path_factory.mktemp("emulated") / "kernels.so"
    includes = ["-I", HERE / "emulate", "-I", SOURCES[0].parent]
    options = ["-x", "c++", "-O1", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    # A GPU refuses 16-byte accesses elsewhere than at multiples of 16, a CPU does not: here they trap.
    options += ["-fsanitize=alignment,shift,bounds", "-fsanitize-undefined-trap-on-error"]
    options += ["-DSL_BLOCKS=32"]  # of bias_act: so that blocks take several turns, and partial sums several blocks
    subprocess.run(["g++", *options, *includes, *SOURCES, "-o", path], check=True)
    return Library(path, "cpu")


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc here")
    return found


@pytest.fixture(scope="session")
def on_gpu(tmp_path_factory) -> Library:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    path = tmp_path_factory.mktemp("cuda") / "kernels.so"
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    options = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-arch={arch}"]
    subprocess.run([nvcc(), *options, *SOURCES, "-o", path], check=True)
    return Library(path, "cuda")


@pytest.fixture(scope="session", params=["emulated", pytest.param("on_gpu", marks=pytest.mark.gpu)])
def library(request) -> Library:
    return request.getfixturevalue(request.param)


def kernels_run(library: Library) -> int | None:
    """How many different kernels have run since the last call; None on a GPU."""
    return library.lib.emulated_kernels() if library.device == "cpu" else None


def assert_upfirdn2d(library, x, fx, fy, up, down, pad, flip=False, gain=1.0, channels_last=False, shifts=(0, 0)):
    f = fx if fy is None else fy[:, None] * fx[None, :]
    expected = reference(x.double(), f, up, down, pad, flip, gain)
    found = library.upfirdn2d(x, fx, fy, up, down, pad, flip, gain, channels_last, shifts)
    size = float(f.abs().sum() * abs(gain) * x.abs().max()) if x.numel() else 0
    torch.testing.assert_close(found.double(), expected, rtol=ROUNDING[x.dtype], atol=1e-6 * size)


def pads(size, out, taps, up, down, before):
    """(before, after) so that `out` outputs come of `size` inputs."""
    return before, (out - 1) * down + taps - size * up - before


def test_all_paths_of_upfirdn2d(library):
    torch.manual_seed(0)
    kernels_run(library)
    for dtype in DTYPES:
        for up, down in ((1, 1), (2, 1), (1, 2)):
            for taps in (1, 2, 4, 5, 8):
                fx, fy = torch.randn(taps), torch.randn(max(taps - 1, 1))
                how = {"up": (up, up), "down": (down, down), "gain": 1.5}
                # Planes, of input and output widths that allow 16-byte accesses, or do not. 160 is more than one tile.
                for w, ow in ((160, 160), (48, 45), (45, 48), (45, 45)):
                    ow = ow * up // down
                    pad = (*pads(w, ow, taps, up, down, taps // 2), 1, taps)
                    x = torch.randn(1, 2, 11, w).to(dtype)
                    assert_upfirdn2d(library, x, fx, fy, pad=pad, **how)
                # Channels: odd; one chunk; more than one tile of 64 bytes, its last one not full.
                for channels, w in ((3, 21), (8, 9), (40, 50)):
                    x = torch.randn(1, channels, 9, w).to(dtype)
                    pad = (taps // 2, taps, 1, taps)
                    assert_upfirdn2d(library, x, fx, fy, pad=pad, flip=True, channels_last=True, **how)
    assert kernels_run(library) in (3 * 3 * 2, None)
    for dtype in DTYPES:
        for channels_last in (False, True):
            x = torch.randn(1, 8, 5, 6).to(dtype)
            assert_upfirdn2d(library, x, torch.randn(3, 4), None, (1, 1), (1, 1), (1, 2, 1, 1), False, 1, channels_last)
    assert kernels_run(library) in (3 * 2, None)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_upfirdn2d_of_several_tiles_along_both_axes(library, up, down, channels_last):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 70 * down // up, 150 * down // up)
    fx, fy = torch.randn(4), torch.randn(3)
    assert_upfirdn2d(library, x, fx, fy, (up, up), (down, down), (1, 2, 2, 1), channels_last=channels_last)


def test_zero_taps_and_crops_that_leave_one_output(library):
    x = torch.randn(1, 1, 9, 9)
    one = torch.ones(1)
    assert_upfirdn2d(library, x, one, one, (1, 1), (1, 1), (-4, -4, -8, 0))
    assert_upfirdn2d(library, x, one, one, (1, 1), (1, 1), (3, -11, -12, 4))  # all of it padding
    assert_upfirdn2d(library, x, torch.zeros(4), torch.ones(4), (2, 2), (1, 1), (2, 1, 2, 1))


def test_nothing_in_nothing_out(library):
    one = torch.ones(1)
    x = torch.zeros(0, 3, 4, 4)
    assert library.upfirdn2d(x, one, one, (1, 1), (1, 1), (0, 0, 0, 0), False, 1.0).shape == x.shape
    x, scale, noise, bias = torch.zeros(0, 3, 4), torch.zeros(0, 3), torch.zeros(4), torch.zeros(3)
    wanted = ("x", "scale", "noise", "bias")
    _, found = library.bias_act(x, scale, noise, bias, "lrelu", 0.2, 1, None, False, 0, x, wanted)
    assert torch.equal(found["noise"], noise)
    assert torch.equal(found["bias"], bias)


def test_the_device_that_was_current_is_so_again(emulated):
    for device in (1, 0):
        assert emulated.lib.sl_check(device) == 0
        assert emulated.lib.emulated_device() == 0


def test_tall_and_small_images_fit_into_shared_memory(emulated):
    """Tiles of few columns have many rows, each of them padded: more than 48 KB would be refused."""
    four, eight = torch.ones(4), torch.ones(8)
    for dtype in (torch.float32, torch.float16):
        for taps in (four, eight):
            for up, down in ((1, 1), (2, 1), (1, 2)):
                for channels, w, channels_last in ((1, 8, False), (1, 24, False), (1, 5, False), (8, 2, True)):
                    x = torch.ones(1, channels, 520, w).to(dtype)
                    pad = (4, 4, 4, 4)
                    assert_upfirdn2d(emulated, x, taps, taps, (up, up), (down, down), pad, channels_last=channels_last)


def test_unknown_dtypes_and_devices_are_errors(library):
    args = Upfirdn2dArgs(n=1, c=1, h=1, w=1, oh=1, ow=1, dtype=3)
    assert library.lib.sl_upfirdn2d(ctypes.byref(args), 0, None) != 0
    args.dtype = 0
    code = library.lib.sl_upfirdn2d(ctypes.byref(args), 1000, None)
    assert code != 0
    assert library.lib.sl_error(code)
    if library.device != "cpu":
        torch.cuda.synchronize()


many = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
pair = st.tuples(st.integers(1, 4), st.integers(1, 4))
factors = st.one_of(st.sampled_from([((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2))]), st.tuples(pair, pair))


@settings(many, max_examples=250)
@given(
    shape=st.tuples(st.integers(1, 2), st.sampled_from([1, 3, 8, 40]), st.integers(1, 17), st.integers(1, 35)),
    dtype=st.sampled_from(list(DTYPES)),
    factors=factors,
    taps=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    separable=st.booleans(),
    pad=st.tuples(*[st.integers(-5, 9)] * 4),
    flip=st.booleans(),
    gain=st.sampled_from([1.0, 4.0, -0.5]),
    channels_last=st.booleans(),
    shifts=st.sampled_from([(0, 0), (1, 0), (0, 1), (2, 3)]),
    seed=st.integers(0, 100),
)
def test_upfirdn2d_is_its_definition(
    library, shape, dtype, factors, taps, separable, pad, flip, gain, channels_last, shifts, seed
):
    up, down = factors
    (_, _, h, w), (fw, fh) = shape, taps
    assume(h * up[1] + pad[2] + pad[3] >= fh)
    assume(w * up[0] + pad[0] + pad[1] >= fw)
    torch.manual_seed(seed)
    x = torch.randn(shape).to(dtype)
    fx, fy = (torch.randn(fw), torch.randn(fh)) if separable else (torch.randn(fh, fw), None)
    assert_upfirdn2d(library, x, fx, fy, up, down, pad, flip, gain, channels_last, shifts)


def activation(v: Tensor, act: str, alpha: float) -> Tensor:
    if act == "linear":
        return v
    if act == "lrelu":
        return F.leaky_relu(v, alpha)
    if act == "swish":
        return F.silu(v)
    return getattr(F, act)(v) if hasattr(F, act) else getattr(torch, act)(v)


def definition(x, scale, noise, bias, act, alpha, gain, clamp):
    v = x
    if scale is not None:
        v = v * scale[:, :, None]
    if noise is not None:
        v = v + (noise[:, None] if noise.ndim == 2 else noise)
    if bias is not None:
        v = v + bias[:, None]
    y = activation(v, act, alpha) * gain
    return y if clamp is None else y.clamp(-clamp, clamp)


def assert_bias_act(library, shape, dtype, operands, act, gain=1.4, clamp=None, channels_last=False, shift=0, drop=()):
    """`operands`: some of scale, noise, batch (the noise's) and bias. `drop`: gradients that are not wanted."""
    n, c, p = shape
    alpha = 0.2
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    scale = torch.randn(n, c) if "scale" in operands else None
    noise = (torch.randn(n, p) if "batch" in operands else torch.randn(p)) if "noise" in operands else None
    bias = torch.randn(c) if "bias" in operands else None
    inputs = {"x": x, "scale": scale, "noise": noise, "bias": bias}
    # In float64, and away from where rounding decides: from the kink, and from the limit.
    exact = {k: v.double().requires_grad_() for k, v in inputs.items() if v is not None}

    def run(clamp):
        return definition(**{k: exact.get(k) for k in inputs}, act=act, alpha=alpha, gain=gain, clamp=clamp)

    with torch.no_grad():
        free = run(None).abs()
        risky = (free < 1e-5) | ((free - (inf if clamp is None else clamp)).abs() < 0.02)
        dy[risky] = 0
    expected = run(clamp)
    wanted = [k for k in exact if k not in drop]
    gradients = torch.autograd.grad(expected, [exact[k] for k in wanted], dy.double())
    found, its = library.bias_act(x, scale, noise, bias, act, alpha, gain, clamp, channels_last, shift, dy, wanted)

    torch.testing.assert_close(found.double(), expected.detach(), rtol=ROUNDING[dtype], atol=1e-5)
    for name, gradient in zip(wanted, gradients, strict=True):
        rtol, atol = (ROUNDING[dtype], 2e-5) if name == "x" else (1e-5, 1e-5 * x.numel() ** 0.5)
        torch.testing.assert_close(
            its[name].double(), gradient, rtol=rtol, atol=atol, msg=lambda m, name=name: f"d{name}: {m}"
        )


ALL = ("scale", "noise", "batch", "bias")


def test_all_paths_of_bias_act(library):
    torch.manual_seed(2)
    kernels_run(library)
    for dtype in DTYPES:
        for act in ACTIVATIONS:
            for channels_last in (False, True):
                for shape in ((2, 16, 24), (1, 5, 7)):
                    assert_bias_act(library, shape, dtype, ALL, act, clamp=1.1, channels_last=channels_last)
    assert_bias_act(library, (2, 16, 24), torch.float32, ("noise", "bias"), "lrelu")  # sums over the other axes
    # Forward and backward, for three dtypes, two widths, two layouts and two kinds of activation; two for the sums.
    assert kernels_run(library) in (2 * 3 * 2 * 2 * 2 + 2, None)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("operands", [(), ("bias",), ("noise", "bias"), ("scale",), ("batch", "noise"), ALL])
@pytest.mark.parametrize("shape", [(3, 300, 1), (2, 1, 4100), (1, 520, 16), (5, 3, 40), (2, 40, 300)], ids=str)
def test_sums_of_bias_act(library, shape, operands, channels_last):
    """Sizes of several tiles along either axis, the last one not full."""
    torch.manual_seed(3)
    assert_bias_act(library, shape, torch.float32, operands, "lrelu", channels_last=channels_last)
    assert_bias_act(library, shape, torch.float16, operands, "swish", channels_last=channels_last)


@settings(many, max_examples=120)
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 8, 40]), st.integers(1, 80)),
    dtype=st.sampled_from(list(DTYPES)),
    operands=st.sets(st.sampled_from(ALL)),
    act=st.sampled_from(ACTIVATIONS),
    gain=st.sampled_from([1.0, 2.5, -0.7]),
    clamp=st.sampled_from([None, 0.9, 3.3]),
    channels_last=st.booleans(),
    shift=st.integers(0, 2),
    drop=st.sets(st.sampled_from(("x", "scale", "noise", "bias"))),
    seed=st.integers(0, 100),
)
def test_bias_act_is_its_definition(
    library, shape, dtype, operands, act, gain, clamp, channels_last, shift, drop, seed
):
    assume({"x"} | (operands - {"batch"}) > drop)
    torch.manual_seed(seed)
    assert_bias_act(library, shape, dtype, operands, act, gain, clamp, channels_last, shift, drop)


def test_overflow_is_not_hidden(library):
    """Infinity and NaN go through, and so do the gradients, which tell a gradient scaler to step back."""
    x = torch.tensor([[[inf, -inf, float("nan"), 1.0]]])
    y, its = library.bias_act(x, None, None, torch.zeros(1), "linear", 0, 1, None, False, 0, x, ("x", "bias"))
    torch.testing.assert_close(y, x, equal_nan=True)
    torch.testing.assert_close(its["x"], x, equal_nan=True)
    assert its["bias"].isnan().all()
    y, _ = library.bias_act(x, None, None, None, "linear", 0, 1, 2.0, False, 0, x, ("x",))
    torch.testing.assert_close(y, torch.tensor([[[2.0, -2.0, float("nan"), 1.0]]]), equal_nan=True)


def test_emulation_stops_at_a_barrier_that_some_threads_miss(emulated, tmp_path):
    """The emulation itself, as a program of its own: it ends by a signal."""
    (tmp_path / "kernel.cpp").write_text(
        "#include <launch.cuh>\n"
        "void kernel(int many) { if ((int)threadIdx.x < many) __syncthreads(); }\n"
        "void beyond(int where) { SL_SHARED(shared); shared[where] = 1; }\n"
        "int main(int count, char **) {\n"
        "  if (count == 4) return launch(beyond, 1, 32, 128, nullptr, 32);\n"
        "  return launch(kernel, 1, 32, 0, nullptr, count == 2 ? 32 : 31);\n"
        "}\n"
    )
    program = tmp_path / "program"
    includes = ["-I", HERE / "emulate", "-I", SOURCES[0].parent]
    subprocess.run(["g++", "-std=c++17", *includes, tmp_path / "kernel.cpp", "-o", program], check=True)
    ends = [subprocess.run([program, *["x"] * count], capture_output=True, text=True) for count in (1, 2, 3)]
    assert [end.returncode == 0 for end in ends] == [True, False, False]
    assert "elsewhere or gone" in ends[1].stderr
    assert "outside its shared memory" in ends[2].stderr


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_100", "sm_120"])
def test_compiles(arch, tmp_path):
    """Unoptimised, which takes a third of the time."""
    fast = ["-std=c++17", "-cubin", f"-arch={arch}", "-Xcicc=-O0", "-Xptxas=-O0"]
    for source in SOURCES:
        subprocess.run([nvcc(), *fast, source, "-o", tmp_path / "out"], check=True)


def test_compiles_without_spills(tmp_path):
    """Without a word from the compiler, and with all of a thread's values in registers."""
    for source in SOURCES:
        command = [nvcc(), "-O3", "-std=c++17", "-cubin", "-arch=sm_90", "-Xptxas=-v", source, "-o", tmp_path / "out"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        assert "warning" not in said
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
        assert len(spills) > 6
        assert set(spills) == {("0", "0", "0")}, said


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_two_to_the_31_elements(on_gpu, channels_last):
    """The last image of many, against the same alone."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of GPU memory")
    form = torch.channels_last if channels_last else torch.contiguous_format
    n, c, side = 33, 1024, 256
    x = torch.empty(n, c, side, side, dtype=torch.bfloat16, device="cuda", memory_format=form).normal_()
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device="cuda") / 8

    def blurred(x):
        y = torch.empty_like(x)
        args = Upfirdn2dArgs(
            x.data_ptr(), y.data_ptr(), taps.data_ptr(), taps.data_ptr(), *x.shape, side, side,
            1, channels_last, 4, 4, 1, 1, 1, 1, 2, 2, 0, 1,
        )  # fmt: skip
        on_gpu.done(on_gpu.lib.sl_upfirdn2d(ctypes.byref(args), 0, on_gpu.stream()))
        return y

    def activated(x):
        y = torch.empty_like(x)
        args = BiasActArgs(
            x=x.data_ptr(), out=y.data_ptr(), n=len(x), c=c, p=side * side, dtype=1, channels_last=channels_last,
            act=2, alpha=0.2, gain=1.5, clamp=2,
        )  # fmt: skip
        on_gpu.done(on_gpu.lib.sl_bias_act_forward(ctypes.byref(args), 0, on_gpu.stream()))
        return y

    assert torch.equal(blurred(x)[-1:], blurred(x[-1:].clone(memory_format=torch.preserve_format)))
    assert torch.equal(activated(x)[-1:], activated(x[-1:].clone(memory_format=torch.preserve_format)))


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(on_gpu, tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer here")
    tests = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "on_gpu and (all_paths or sums or several_tiles)"]
    subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests],
        check=True,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
