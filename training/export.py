"""A generator as an ONNX model, compared with itself before anyone sees it."""

import importlib
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .draws import Draws
from .networks.growing import Generator

TOLERANCE = 1e-4  # of images, relative to their largest value if that is more than 1
OPSET = 18
BATCHES = (1, 3)  # that the model is compared on, other than that it was traced with
PSIS = (1.0, 0.7, 0.0)


class _Function(nn.Module):
    """(z[, c][, truncation_psi]) -> images [N, C, H, W], noise const.

    psi: a number, or None for an input: truncation_psi, fp32 []. Without w there is neither.
    """

    def __init__(self, generator: Generator, psi: float | None) -> None:
        super().__init__()
        self.generator, self.psi = generator, psi

    def forward(self, *inputs: Tensor) -> Tensor:
        G = self.generator
        ws = G.mapping(*inputs[: 2 if G.c_dim else 1])[:, None].expand(-1, G.num_ws, -1)
        if G.has_w:
            psi = inputs[-1] if self.psi is None else self.psi
            cut = G.truncation_cutoff or G.num_ws
            low = G.mapping.w_avg + (ws[:, :cut] - G.mapping.w_avg) * psi
            ws = torch.cat([low, ws[:, cut:]], dim=1) if cut < G.num_ws else low
        return G.synthesis(ws)


def export(generator: Generator, out: Path, about: dict[str, Any], truncation: float | None = None) -> float:
    """Writes `out`, whole or not at all, after running it in onnxruntime beside the generator.

    Args:
        generator: in eval mode on the CPU, in fp32; as far grown as it is.
        about: the model's metadata; strings are kept, all else becomes JSON.
        truncation: truncation_psi, fixed; None makes it an input (of generators that have a w).

    Returns:
        The largest difference of their images, relative to the largest value if that is more than 1; at most
        `TOLERANCE`.

    Raises:
        ValueError: the packages for it are not installed, the images differ by more, or there is no w to truncate.
        OSError: `out` cannot be written.
    """
    if truncation is not None and not generator.has_w:
        raise ValueError(f"truncation {truncation:g}: this kind of generator has no w that could be truncated")
    onnx, runtime, _ = map(_package, ("onnx", "onnxruntime", "onnxscript"))
    function = _Function(generator, truncation).eval()
    model = _model(function)
    onnx.helper.set_model_props(model, {key: x if isinstance(x, str) else json.dumps(x) for key, x in about.items()})
    model.producer_name, model.producer_version = "styleloom", importlib.metadata.version("styleloom")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        fresh = Path(folder) / "model.onnx"
        onnx.save(model, fresh)
        onnx.checker.check_model(fresh)
        difference = max(_differences(function, runtime.InferenceSession(fresh, providers=["CPUExecutionProvider"])))
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the model's images differ by {difference:.1e} from the generator's, more than {TOLERANCE:.0e}: "
                f"{out} is not written"
            )
        os.replace(fresh, out)
    return difference


def _package(name: str) -> Any:
    """A package that the rest of the project does without. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"ONNX models need {name}: pip install 'styleloom[onnx]'") from None


def _inputs(function: _Function, n: int, psi: float) -> dict[str, Tensor]:
    """n random latents and labels, always the same; truncation_psi only if it is an input."""
    G = function.generator
    inputs = {"z": Draws(0, "export", range(n)).normal(G.z_dim)}
    if G.c_dim:
        inputs["c"] = torch.eye(G.c_dim)[torch.arange(n) % G.c_dim]
    if G.has_w and function.psi is None:
        inputs["truncation_psi"] = torch.tensor(psi)
    return inputs


def _model(function: _Function) -> Any:
    """The function as an ONNX model, for any batch. (While it is traced, ops are torch's own: see ops/native.py.)"""
    inputs = _inputs(function, 2, 0.7)
    batch = torch.export.Dim("batch")
    dynamic = tuple({0: batch} if x.ndim else {} for x in inputs.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        program = torch.export.export(
            function, tuple(inputs.values()), dynamic_shapes={"inputs": dynamic}, strict=False
        )
        model = torch.onnx.export(
            program, input_names=list(inputs), output_names=["images"], opset_version=OPSET, verbose=False,
            external_data=False,
        )  # fmt: skip
    assert model is not None
    return model.model_proto


@torch.no_grad()
def _differences(function: _Function, session: Any) -> Iterator[float]:
    """Between the images of the model and of the generator, for several batches and truncations."""
    for n in BATCHES:
        for psi in PSIS if function.generator.has_w and function.psi is None else PSIS[:1]:
            inputs = _inputs(function, n, psi)
            expected = _own_images(function, inputs, psi)
            (images,) = session.run(["images"], {name: x.numpy() for name, x in inputs.items()})
            assert images.shape == expected.shape
            yield float(np.abs(images - expected).max() / max(1.0, np.abs(expected).max()))


def _own_images(function: _Function, inputs: dict[str, Tensor], psi: float) -> np.ndarray:
    """What the generator itself makes, by the ops of this machine."""
    G = function.generator
    psi = psi if function.psi is None else function.psi
    return G(inputs["z"], inputs.get("c"), truncation_psi=psi if G.has_w else 1.0).numpy()
