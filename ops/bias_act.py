"""Bias, activation, gain and clamp in one call."""

import torch.nn.functional as F
from torch import Tensor

GAINS = {"linear": 1.0, "lrelu": 2.0**0.5}  # keep unit variance through the activation (He et al. 2015, eq. 10)


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    alpha: float = 0.2,
) -> Tensor:
    """`clamp(gain * act(x + b))`.

    Args:
        x: [N, C, ...], floating point.
        b: [C], added along dimension 1; cast to the dtype of `x`.
        act: "linear" or "lrelu" (leaky ReLU of slope `alpha`).
        gain: factor after the activation; by default the activation's own (1, sqrt 2).
        clamp: limits the result to [-clamp, clamp].

    Returns:
        The shape, dtype and memory format of `x`. Differentiable to any order.
    """
    gain = GAINS[act] if gain is None else gain
    if b is not None:
        x = x + b.to(x.dtype).reshape([1, -1] + [1] * (x.ndim - 2))
    if act == "lrelu":
        x = F.leaky_relu(x, alpha)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x
