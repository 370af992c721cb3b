"""Scale, noise, bias, activation, gain and clamp in one call."""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

# In csrc's order.
ACTIVATIONS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")
PIECEWISE_LINEAR = ("linear", "relu", "lrelu")
# Gains that keep unit variance through the activation (He et al. 2015, eq. 10); 1 where none is customary.
GAINS: dict[str, float] = {name: math.sqrt(2) if name in ("relu", "lrelu", "swish") else 1.0 for name in ACTIVATIONS}


@dataclass(frozen=True)
class Activation:
    """What happens to the argument: `clamp(gain * act(v))`. A clamp below 0 is none."""

    act: str
    alpha: float
    gain: float
    clamp: float

    @property
    def linear(self) -> bool:
        """Whether the slope is the same everywhere."""
        return self.act == "linear" and self.clamp < 0


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    alpha: float = 0.2,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """`clamp(gain * act(x * scale + noise + b))`.

    Args:
        x: [N, C, ...], fp32, bf16 or fp16 (fp64 through the reference).
        b: [C], added along dimension 1.
        act: one of ACTIVATIONS; "lrelu" is leaky ReLU of slope `alpha`.
        gain: factor after the activation; by default the activation's own (GAINS).
        clamp: limits the result to [-clamp, clamp].
        scale: [N, C], a factor for each channel of each sample (a style, or demodulation).
        noise: [H, W], [1, 1, H, W] or [N, 1, H, W], added to all channels; x is then [N, C, H, W].

    Returns:
        The shape, dtype and memory format of `x`. Differentiable to any order.

    Raises:
        ValueError: an activation that does not exist, or tensors that do not fit together.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"no activation {act!r}; there are {', '.join(ACTIVATIONS)}")
    if noise is not None and noise.ndim == 2:
        noise = noise[None, None]
    _fits("b", b, x, [(x.shape[1],)])
    _fits("scale", scale, x, [(x.shape[0], x.shape[1])])
    _fits("noise", noise, x, [(n, 1, *x.shape[2:]) for n in (1, x.shape[0])])
    how = Activation(act, alpha, GAINS[act] if gain is None else gain, -1.0 if clamp is None else clamp)
    turned = act == "lrelu" and alpha < 0  # the kernels take the slope from the result's sign
    if turned or native.library(x) is None:
        return reference(x, b, scale, noise, how)
    return _BiasAct.apply(x, b, scale, noise, how)  # type: ignore[return-value]


def _fits(name: str, t: Tensor | None, x: Tensor, shapes: list[tuple[int, ...]]) -> None:
    """Raises ValueError if a tensor is not what the kernels take it for: they would read past its end."""
    if t is not None and (tuple(t.shape) not in shapes or t.device != x.device):
        raise ValueError(f"bias_act: {name} {list(t.shape)} on {t.device} does not fit x {list(x.shape)} on {x.device}")


def reference(x: Tensor, b: Tensor | None, scale: Tensor | None, noise: Tensor | None, how: Activation) -> Tensor:
    """The definition in torch's ops, each rounding to the dtype of `x`."""
    if scale is not None:
        x = x * _along_channels(scale.to(x.dtype), x)
    if noise is not None:
        x = x + noise.to(x.dtype)
    if b is not None:
        x = x + _along_channels(b.to(x.dtype)[None], x)
    x = _activate(x, how)
    if how.gain != 1:
        x = x * how.gain
    return x if how.clamp < 0 else x.clamp(-how.clamp, how.clamp)


def _along_channels(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape([*v.shape, *[1] * (x.ndim - 2)])


def _activate(x: Tensor, how: Activation) -> Tensor:
    if how.act == "lrelu":
        return F.leaky_relu(x, how.alpha)
    if how.act == "swish":
        return F.silu(x)
    return x if how.act == "linear" else getattr(F if how.act in ("elu", "selu", "softplus") else torch, how.act)(x)


class _BiasAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor | None, scale: Tensor | None, noise: Tensor | None, how: Activation
    ) -> Tensor:
        given = x  # saved as it is: a copy would not be part of the graph
        x, _ = native.dense(x)
        y = torch.empty_like(x)
        args = _arguments(x, how, b, scale, noise)
        args.x, args.out = x.data_ptr(), y.data_ptr()
        _call("sl_bias_act_forward", args, x)
        from_result = how.act in PIECEWISE_LINEAR
        x_needed = not from_result or (scale is not None and scale.requires_grad)
        ctx.how = how
        ctx.save_for_backward(
            given if x_needed else None, y if from_result and not how.linear else None, b, scale, noise
        )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, b, scale, noise = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if not torch.is_grad_enabled():
            return (*_gradients(dy, x, y, b, scale, noise, ctx.how, needed), None)
        if ctx.how.act in PIECEWISE_LINEAR:
            return (*_differentiable_gradients(dy, x, y, b, scale, noise, ctx.how, needed), None)
        # Of aliases: one of these may have been computed from another, whose part autograd adds by itself.
        x, b, scale, noise = aliases = [None if t is None else t.view_as(t) for t in (x, b, scale, noise)]
        inputs = [t for t, wanted in zip(aliases, needed, strict=True) if wanted]
        result = reference(x, b, scale, noise, ctx.how)  # type: ignore[arg-type]
        grads = iter(torch.autograd.grad(result, inputs, dy, create_graph=True))  # type: ignore[arg-type]
        return (*[next(grads) if wanted else None for wanted in needed], None)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _gradients(
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    b: Tensor | None,
    scale: Tensor | None,
    noise: Tensor | None,
    how: Activation,
    needed: tuple[bool, ...],
) -> Gradients:
    """Gradients with respect to x, b, scale and noise in one pass."""
    like = y if y is not None else x
    dy, x = _in_format_of(dy, like), None if x is None else _in_format_of(x, like)
    dx = torch.empty_like(dy) if needed[0] else None
    sums = [
        None if not wanted or t is None else torch.zeros(t.shape, device=t.device)
        for t, wanted in zip((b, scale, noise), needed[1:], strict=True)
    ]
    args = _arguments(dy, how, b, scale, noise)
    args.x, args.y, args.dy, args.out = (native.pointer(t) for t in (x, y, dy, dx))
    args.dbias, args.dscale, args.dnoise = (native.pointer(t) for t in sums)
    workspace = None
    if dy.is_cuda:
        library = native.library(dy)
        assert library is not None
        library.sl_bias_act_workspace.restype = ctypes.c_int64
        size = library.sl_bias_act_workspace(ctypes.byref(args))
        workspace = torch.empty(size, dtype=torch.uint8, device=dy.device)
    _call("sl_bias_act_backward", args, dy, native.pointer(workspace))
    grads = [None if s is None or t is None else s.to(t.dtype) for s, t in zip(sums, (b, scale, noise), strict=True)]
    return (dx, *grads)  # type: ignore[return-value]


def _differentiable_gradients(
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    b: Tensor | None,
    scale: Tensor | None,
    noise: Tensor | None,
    how: Activation,
    needed: tuple[bool, ...],
) -> Gradients:
    """The same as a graph, for gradients of gradients. The slope is constant almost everywhere."""
    g = dy * how.gain if y is None else _Slope.apply(dy, y, how)
    dx = db = dscale = dnoise = None
    if needed[0]:
        dx = g if scale is None else bias_act(g, scale=scale)
    if needed[1]:
        assert b is not None
        db = g.sum(dim=[0, *range(2, g.ndim)], dtype=torch.float32).to(b.dtype)
    if needed[2]:
        assert scale is not None
        dscale = _Dot.apply(g, x).to(scale.dtype)  # type: ignore[union-attr]
    if needed[3]:
        assert noise is not None
        over = [1] if len(noise) == len(g) else [0, 1]
        dnoise = g.sum(dim=over, dtype=torch.float32).reshape(noise.shape).to(noise.dtype)
    return dx, db, dscale, dnoise


class _Slope(torch.autograd.Function):
    """dy times the slope of a piecewise linear activation, which follows from its result y."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, y: Tensor, how: Activation) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(y)
        return _gradients(dy, None, y, None, None, None, how, (True, False, False, False))[0]  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return _Slope.apply(dg, y, ctx.how), None, None  # type: ignore[return-value]


class _Dot(torch.autograd.Function):
    """[N, C, ...] x [N, C, ...] -> [N, C] float32: sums of the products over each plane."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        x, _ = native.dense(x)
        ones = torch.ones(x.shape[:2], device=x.device)
        how = Activation("linear", 0.0, 1.0, -1.0)
        return _gradients(g, x, None, None, ones, None, how, (False, False, True, False))[2]  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        g, x = ctx.saved_tensors
        return bias_act(x, scale=d), bias_act(g, scale=d)


def _in_format_of(t: Tensor, like: Tensor | None) -> Tensor:
    """Dense, in the memory format of a dense tensor of the same shape."""
    if like is None:
        return native.dense(t)[0]
    return t.contiguous(memory_format=torch.channels_last if native.channels_last(like) else torch.contiguous_format)


def _arguments(
    x: Tensor, how: Activation, b: Tensor | None, scale: Tensor | None, noise: Tensor | None
) -> native.BiasAct:
    """What csrc/api.h asks for, but for the large tensors."""
    n, c = x.shape[:2]
    channels_last = native.channels_last(x)
    p = x[0, 0].numel() if x.numel() else 0
    if x.ndim == 2 and scale is None:  # the samples are the pixels of one image, channels-last
        n, p, channels_last = 1, n, True
    args = native.BiasAct(
        n=n, c=c, p=p, dtype=native.DTYPES[x.dtype], channels_last=channels_last,
        noise_batch=noise is not None and len(noise) == n, act=ACTIVATIONS.index(how.act),
        alpha=how.alpha, gain=how.gain, clamp=how.clamp,
    )  # fmt: skip
    args.held = [None if t is None else t.detach().float().contiguous() for t in (b, scale, noise)]
    args.bias, args.scale, args.noise = (native.pointer(t) for t in args.held)
    return args


def _call(name: str, args: native.BiasAct, x: Tensor, *more: int | None) -> None:
    library = native.library(x)
    assert library is not None
    native.call(library, name, args, x, *more)
