"""ops/native.py and the CPU library's C interface: structures, memory, threads, and where torch's ops take over."""

import ctypes
import itertools
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from styleloom.ops import conv2d as conv2d_module
from styleloom.ops import native, toolchain
from styleloom.ops.bias_act import ACTIVATIONS, bias_act
from styleloom.ops.conv2d import conv2d
from styleloom.ops.upfirdn2d import reference, setup_filter, upfirdn2d

CSRC = Path(__file__).parents[1] / "ops" / "csrc"
STRUCTURES = [native.Upfirdn2d, native.BiasAct, native.Winograd]
SHORT, LONG = setup_filter([1, 3, 3, 1]), setup_filter(range(1, 13))


@pytest.fixture(autouse=True)
def _our_kernels(monkeypatch, cpu_library):
    monkeypatch.setenv("STYLELOOM_OPS", "cpu")


def test_structures_are_those_of_the_header(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "").split(" ")[0]) or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler found")
    lines = ["#include <cstddef>", "#include <cstdio>", "#include <type_traits>", '#include "api.h"', "int main() {"]
    for structure in STRUCTURES:
        name = structure.__name__
        lines.append(f'std::printf("{name} %zu\\n", sizeof({name}));')
        for field, _ in structure._fields_:
            of = f"decltype({name}::{field})"
            kind = f"std::is_pointer<{of}>::value ? 'p' : std::is_floating_point<{of}>::value ? 'f' : 'i'"
            lines.append(
                f'std::printf("{name}.{field} %zu %zu %c\\n", offsetof({name}, {field}), sizeof({of}), {kind});'
            )
    (tmp_path / "sizes.cpp").write_text("\n".join([*lines, "}"]))
    subprocess.run([compiler, "-std=c++17", f"-I{CSRC}", "-o", tmp_path / "sizes", tmp_path / "sizes.cpp"], check=True)
    said = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    kinds = {ctypes.c_void_p: "p", ctypes.c_float: "f", ctypes.c_int32: "i", ctypes.c_int64: "i"}
    expected = []
    for structure in STRUCTURES:
        expected.append(f"{structure.__name__} {ctypes.sizeof(structure)}")
        for field, of in structure._fields_:
            offset = getattr(structure, field).offset
            expected.append(f"{structure.__name__}.{field} {offset} {ctypes.sizeof(of)} {kinds[of]}")
    assert said == expected


def test_numbers_are_those_of_the_header():
    header = (CSRC / "api.h").read_text()
    (activations,) = re.findall(r"enum Activation \{(.*?)\}", header)
    assert [name.strip().lower() for name in activations.split(",")] == list(ACTIVATIONS)
    (dtypes,) = re.findall(r"enum Dtype \{(.*?)\}", header)
    assert dtypes.split(",") == [" F32 = 0", " BF16 = 1", " F16 = 2 "]
    assert list(native.DTYPES) == [torch.float32, torch.bfloat16, torch.float16]
    assert list(native.DTYPES.values()) == [0, 1, 2]


# Memory.

GUARD = 64  # elements


def guarded(shape, dtype, channels_last, values=None):
    """(a tensor between guards, a function that checks them); full of NaN where no values are given."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype)
    inner = whole[GUARD : GUARD + count]
    n, c, *rest = shape
    out = inner.view(n, *rest, c).movedim(-1, 1) if channels_last else inner.view(shape)
    if values is not None:
        out.copy_(values)

    def check():
        assert whole[:GUARD].isnan().all(), "written before the tensor"
        assert whole[GUARD + count :].isnan().all(), "written behind the tensor"
        assert not out.isnan().any(), "not everything written, or something read that does not belong to it"

    return out, check


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("c", [1, 5, 16, 67])
def test_upfirdn2d_stays_within_its_tensors(cpu_library, dtype, channels_last, c):
    g = torch.Generator().manual_seed(0)
    for separable, up, down, (h, w), threads in itertools.product(
        (True, False), ((1, 1), (2, 3)), ((1, 1), (3, 2)), ((1, 1), (7, 5), (67, 3)), (1, 3)
    ):
        source, check_source = guarded((2, c, h, w), dtype, channels_last, torch.randn(2, c, h, w, generator=g))
        fx, fy = torch.randn(5, generator=g), torch.randn(4, generator=g)
        f = fx if separable else (fy[:, None] * fx).contiguous()
        oh, ow = ((s * u + 9 - t) // d + 1 for s, u, d, t in zip((h, w), up, down, (4, 5), strict=True))
        out, check = guarded((2, c, oh, ow), dtype, channels_last)
        args = native.Upfirdn2d(
            x=source.data_ptr(), y=out.data_ptr(), fx=f.data_ptr(), fy=fy.data_ptr() if separable else None,
            n=2, c=c, h=h, w=w, oh=oh, ow=ow, dtype=native.DTYPES[dtype], channels_last=channels_last,
            fw=5, fh=4, up_x=up[1], up_y=up[0], down_x=down[1], down_y=down[0], pad_x=5, pad_y=4, flip=0, gain=1.0,
        )  # fmt: skip
        assert cpu_library.sl_upfirdn2d(ctypes.byref(args), threads, None) == 0
        check()
        check_source()
        expected = reference(source.float(), fy[:, None] * fx, up[::-1], down[::-1], [5, 4, 4, 5])
        torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("c", [1, 5, 16, 67])
@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
def test_bias_act_stays_within_its_tensors(cpu_library, dtype, channels_last, c, act):
    g = torch.Generator().manual_seed(0)
    for p, noise_batch, threads, sums in itertools.product((1, 35, 40), (0, 1), (1, 3), (0, 1)):
        shape = (2, c, 1, p)

        def new(size, dtype=torch.float32, last=False, fill=True):
            return guarded(size, dtype, last, torch.randn(size, generator=g) if fill else None)

        large = [new(shape, dtype, channels_last, fill) for fill in (True, False, True, False)]
        small = [new(size) for size in ((2, c), (1 + noise_batch, p), (c, 1))]
        grads = [new(t.shape, fill=False) for t, _ in small] if sums else []
        (x, _), (y, _), (dy, _), (dx, _) = large
        (scale, _), (noise, _), (bias, _) = small
        args = native.BiasAct(
            x=x.data_ptr(), out=y.data_ptr(), scale=scale.data_ptr(), noise=noise.data_ptr(), bias=bias.data_ptr(),
            n=2, c=c, p=p, dtype=native.DTYPES[dtype], channels_last=channels_last, noise_batch=noise_batch,
            act=ACTIVATIONS.index(act), alpha=0.2, gain=1.0, clamp=-1.0,
        )  # fmt: skip
        assert cpu_library.sl_bias_act_forward(ctypes.byref(args), threads, None) == 0
        args.y, args.dy, args.out = y.data_ptr(), dy.data_ptr(), dx.data_ptr()
        if sums:
            args.dscale, args.dnoise, args.dbias = (t.data_ptr() for t, _ in grads)
        assert cpu_library.sl_bias_act_backward(ctypes.byref(args), None, threads, None) == 0
        for _, check in (*large, *small, *grads):
            check()


@pytest.mark.parametrize("kind", ["same", "down", "up"])
def test_winograd_stays_within_its_tensors(cpu_library, kind):
    lanes = cpu_library.sl_winograd_lanes()
    number = ["same", "down", "up"].index(kind)
    for (ci, co), (h, w), threads in itertools.product(
        ((lanes, 3 * lanes), (2 * lanes, lanes)), ((3, 3), (5, 9), (15, 7)), (1, 3)
    ):
        oh, ow = {"same": (h, w), "down": (h // 2, w // 2), "up": (2 * h + 1, 2 * w + 1)}[kind]
        x, check_x = guarded((2, ci, h, w), torch.float32, True, torch.randn(2, ci, h, w))
        y, check_y = guarded((2, co, oh, ow), torch.float32, True)
        weight, check_weight = guarded((co, ci, 3, 3), torch.float32, False, torch.randn(co, ci, 3, 3))
        args = native.Winograd(
            x=x.data_ptr(), weight=weight.data_ptr(), y=y.data_ptr(), n=2, h=h, w=w, oh=oh, ow=ow, ci=ci, co=co,
            co_stride=9 * ci, ci_stride=9, kind=number, flip=0,
        )  # fmt: skip
        assert cpu_library.sl_winograd(ctypes.byref(args), threads) == 0
        for check in (check_x, check_y, check_weight):
            check()
        if kind != "up":
            gradient, check_gradient = guarded((co, ci, 3, 3), torch.float32, False)
            args.weight = gradient.data_ptr()
            assert cpu_library.sl_winograd_weight(ctypes.byref(args), threads) == 0
            for check in (check_x, check_y, check_gradient):
                check()


# Threads.


def all_ops(seed):
    """Results and gradients of every op, of enough elements for several threads."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 16, 40, 38, generator=g)
    assert x.numel() > native.SMALL
    w, b, scale, noise = (torch.randn(s, generator=g) for s in ((16, 16, 3, 3), (16,), (3, 16), (40, 38)))
    for layout, dtype in itertools.product(
        (torch.contiguous_format, torch.channels_last), (torch.float32, torch.bfloat16)
    ):
        image = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
        its = [t.requires_grad_() for t in (b, scale, noise)]
        for act in ("lrelu", "tanh"):
            y = bias_act(image, b, act, clamp=2.0, scale=scale, noise=noise)
            yield from (y, *torch.autograd.grad(y.square().sum(), [image, *its]))
        for f, up, down in ((SHORT, 2, 1), (SHORT, 1, 2), (LONG, 1, 1), (SHORT, (3, 2), (2, 1))):
            y = upfirdn2d(image, f, up, down, 5)
            yield from (y, *torch.autograd.grad(y.square().sum(), [image]))
    w.requires_grad_()
    for up, down in ((1, 1), (2, 1), (1, 2)):
        y = conv2d(image.float(), w, SHORT, up, down)
        yield from (y, *torch.autograd.grad(y.square().sum(), [image, w]))


@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_the_number_of_threads(monkeypatch, threads):
    """Not in the last bit, the gradients' sums included."""
    one = list(all_ops(0))
    monkeypatch.setattr(native, "threads", lambda x: threads)
    for mine, theirs in zip(all_ops(0), one, strict=True):
        assert torch.equal(mine, theirs)


def test_threads_are_torchs_for_large_tensors_and_one_for_small(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert native.threads(torch.zeros(native.SMALL)) == 7
    assert native.threads(torch.zeros(native.SMALL - 1)) == 1


def test_several_python_threads_at_once(monkeypatch):
    monkeypatch.setattr(native, "threads", lambda x: 2)
    seeds = list(range(3))
    expected = [list(all_ops(seed)) for seed in seeds]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda seed: list(all_ops(seed)), seeds))
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


# Large tensors.


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("op", ["bias_act", "upfirdn2d"])
def test_more_than_2_to_31_elements(op, channels_last):
    if psutil.virtual_memory().available < 16 * 2**30:
        pytest.skip("less than 16 GB of memory are free")
    n, c, h, w = 3, 64, 3400, 3300
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = (
        torch.zeros(n, h, w, c, dtype=torch.bfloat16).movedim(-1, 1)
        if channels_last
        else torch.zeros(n, c, h, w, dtype=torch.bfloat16)
    )
    assert x.numel() > 2**31
    assert x.is_contiguous(memory_format=layout)
    corner = torch.randn(2, 8, 40).bfloat16()
    x[-1, -2:, -8:, -40:] = corner
    b = torch.arange(c).float()
    if op == "bias_act":
        y = bias_act(x, b, "lrelu", gain=1.0)
        torch.testing.assert_close(y[-1, -2:, -8:, -40:], bias_act(corner[None], b[-2:], "lrelu", gain=1.0)[0])
        assert torch.equal(y[0, :, 0, 0].float(), b)
        assert torch.equal(y[1, :, 1700, 0].float(), b)
        assert torch.equal(y[2, :, 0, 1].float(), b)
    else:
        y = upfirdn2d(x, SHORT, padding=[2, 1, 2, 1])
        expected = upfirdn2d(corner[None], SHORT, padding=[2, 1, 2, 1])[0]
        torch.testing.assert_close(y[-1, -2:, -8:, -40:], expected)
        assert not y[0, :, :100].any()
        assert not y[2, :, :100].any()


# Where torch's ops take over.


def one_op(name):
    w = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    return {
        "bias_act": lambda x: bias_act(x, torch.ones(16), "lrelu"),
        "upfirdn2d": lambda x: upfirdn2d(x, SHORT, padding=1),
        "upfirdn2d long": lambda x: upfirdn2d(x, LONG, padding=6),
        "conv2d": lambda x: conv2d(x, w),
        "conv2d up": lambda x: conv2d(x, w, SHORT, up=2),
        "conv2d down": lambda x: conv2d(x, w, SHORT, down=2),
        "conv2d 1x1": lambda x: conv2d(x, w[:, :, :1, :1]),
    }[name]


OPS = ["bias_act", "upfirdn2d", "upfirdn2d long", "conv2d", "conv2d up", "conv2d down", "conv2d 1x1"]


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", OPS)
def test_transforms_of_torch_func(name):
    op, x = one_op(name), torch.randn(2, 16, 8, 8)
    y = op(x)
    close(torch.func.vmap(op)(x[:, None])[:, 0], y)
    close(torch.func.jvp(op, (x,), (x,))[0], y)
    torch.func.vmap(torch.func.jacrev(lambda x: op(x[None]).square().mean()))(x)
    image = x.clone().requires_grad_()
    close(torch.func.grad(lambda x: op(x).square().sum())(x), torch.autograd.grad(op(image).square().sum(), image)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", OPS)
def test_traces(name):
    op, x, other = one_op(name), torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    trace = cast(Any, torch.jit.trace(op, x, check_trace=False))
    close(trace(other), op(other))
    for mode in ("real", "fake"):
        close(make_fx(op, tracing_mode=mode, _allow_non_fake_inputs=True)(x)(other), op(other))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert op(fake.from_tensor(x)).shape == op(x).shape


@pytest.mark.parametrize("name", ["bias_act", "upfirdn2d", "conv2d"])
def test_exports(name):
    class Module(torch.nn.Module):
        def forward(self, x):
            return one_op(name)(x)

    x, other = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    close(torch.export.export(Module(), (x,)).module()(other), one_op(name)(other))


def test_subclasses_and_other_dtypes_are_torchs():
    class Mine(torch.Tensor):
        pass

    x = torch.zeros(1, 16, 2, 2)
    assert native.library(x) is not None
    assert native.library(torch.nn.Parameter(x)) is not None
    for other in (x.double(), x.int(), x.as_subclass(Mine), x.to("meta")):
        assert native.library(other) is None


def test_inference_mode_and_parameters():
    x = torch.randn(2, 16, 8, 8)
    for name in OPS:
        expected = one_op(name)(x)
        with torch.inference_mode():
            assert torch.equal(one_op(name)(x), expected)
        assert torch.equal(one_op(name)(torch.nn.Parameter(x)), expected)


def test_errors_are_in_words(cpu_library):
    native.check(cpu_library, "sl_upfirdn2d", 0)
    with pytest.raises(RuntimeError, match="sl_upfirdn2d: out of memory"):
        native.check(cpu_library, "sl_upfirdn2d", 1)


def test_memory_that_is_not_there_is_an_error(cpu_library):
    """In place of an end of the process; nothing is calculated."""
    args = native.BiasAct(n=1, c=2**58, p=1, act=0, channels_last=1, gain=1.0, clamp=-1.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        native.call(cpu_library, "sl_bias_act_forward", args, torch.zeros(1))


def test_dense():
    x = torch.randn(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    for t, expected in ((x, False), (last, True), (x[:, :, ::2], False), (last[:, :, ::2], True), (x[:, :1], False)):
        found, channels_last = native.dense(t)
        assert channels_last is expected
        assert torch.equal(found, t)
        assert found.is_contiguous(memory_format=torch.channels_last if expected else torch.contiguous_format)
    assert native.dense(x)[0] is x
    assert native.dense(last)[0].data_ptr() == last.data_ptr()
    assert native.dense(torch.randn(3, 4).t())[0].is_contiguous()


@pytest.mark.parametrize("flags", [["-mno-avx"], ["-mavx2", "-mfma", "-mno-avx512f"]])
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other widths of vectors are tried on x86 alone")
def test_narrower_vectors_than_this_machine_has(tmp_path, monkeypatch, cpu_library, flags):
    if "-mavx2" in flags and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    sources = [str(file) for file in CSRC.glob("*.cpp")]
    command = [
        *toolchain.cxx(),
        "-O1",
        "-std=c++17",
        "-fPIC",
        "-shared",
        *flags,
        *sources,
        "-o",
        str(tmp_path / "ops.so"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    narrow = ctypes.CDLL(str(tmp_path / "ops.so"))
    assert narrow.sl_winograd_lanes() < 16
    monkeypatch.setattr(native, "library", lambda x: narrow if x.dtype in native.DTYPES else None)
    monkeypatch.setattr(conv2d_module, "STRIDED_FROM", 0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels in (4, 12, 24):
            x = torch.randn(2, channels, 9, 7, generator=torch.Generator().manual_seed(channels)).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            w = torch.randn(8, channels, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
            f = setup_filter([1, 3, 3, 1])
            for how in ({}, {"f": f, "up": 2}, {"f": f, "down": 2}):
                y = bias_act(conv2d(x, w, **how), act="lrelu", clamp=30)
                got = [y, *torch.autograd.grad(y.square().sum(), [x, w])]
                monkeypatch.setenv("STYLELOOM_OPS", "reference")
                double, w64 = x.detach().double().requires_grad_(), w.detach().to(dtype).double().requires_grad_()
                z = bias_act(conv2d(double, w64, **how), act="lrelu", clamp=30)
                expected = [z, *torch.autograd.grad(z.square().sum(), [double, w64])]
                monkeypatch.delenv("STYLELOOM_OPS")
                for mine, theirs in zip(got, expected, strict=True):
                    error = (mine.double() - theirs).norm() / theirs.norm()
                    assert error < {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]


def test_autocast_and_forward_mode_take_torchs_ops():
    x = torch.randn(1, 16, 4, 4).requires_grad_()
    for k in (3, 5):
        w = torch.randn(16, 16, k, k).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = conv2d(x, w)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(1, 16, 4, 4), torch.ones(1, 16, 4, 4))
        assert torch.autograd.forward_ad.unpack_dual(bias_act(dual, act="lrelu")).tangent is not None
