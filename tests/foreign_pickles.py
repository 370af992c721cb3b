"""Writes pickles of the kinds in which StyleGAN2 networks are published, from tensors by the PyTorch code's names.

It imitates what such files say about their classes and functions; none of these exist here, so that reading a file in
any way but as data fails. Loaded by the tests as a file.
"""

import math
import pickle
import sys
import types
from typing import Any
from unittest import mock

import numpy as np
import torch

SOURCE = "raise SystemExit('the source code in the file was executed')"
FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64


def _reconstruct_persistent_obj(meta):
    raise AssertionError("called while writing")


class EasyDict(dict):
    """As in the published code, a dictionary of a class of its own."""


class Network:
    """As in the published code for TensorFlow: all that it is comes as a state."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def __getstate__(self) -> dict[str, Any]:
        return self.state

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("called while writing")


PLACES = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
PLACES |= {"dnnlib.tflib.network": Network}
for _name, _x in PLACES.items():
    _x.__module__, _x.__qualname__ = _name, _x.__name__


def dump(x: Any, protocol: int = 4) -> bytes:
    """Pickles it, as if the published modules were there."""
    modules = {}
    for name, each in PLACES.items():
        parts = name.split(".")
        for i in range(len(parts)):
            modules[".".join(parts[: i + 1])] = types.ModuleType(".".join(parts[: i + 1]))
        setattr(modules[name], each.__name__, each)
    with mock.patch.dict(sys.modules, modules):
        return pickle.dumps(x, protocol)


class Persistent:
    """An object that brings its source code along."""

    def __init__(self, kind: str, state: dict[str, Any]) -> None:
        self.kind, self.state = kind, state

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.kind, "state": self.state}
        return _reconstruct_persistent_obj, (meta,), None


def module(kind: str, tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> Persistent:
    """A tree of modules with tensors and attributes at dotted paths."""

    def build(path: str, kind: str) -> Persistent:
        inside = f"{path}." if path else ""
        names = [name.removeprefix(inside) for name in [*tensors, *(f"{p}.x" for p in attributes)]]
        below = dict.fromkeys(
            rest.split(".")[0]
            for name, rest in zip([*tensors, *(f"{p}.x" for p in attributes)], names, strict=True)
            if name.startswith(inside) and "." in rest
        )
        own = {name.removeprefix(inside): x for name, x in tensors.items() if name.startswith(inside)}
        own = {name: x for name, x in own.items() if "." not in name}
        buffers = ("resample_filter", "noise_const", "w_avg")
        state = {
            "training": False,
            "_parameters": {
                name: torch.nn.Parameter(x, requires_grad=False) for name, x in own.items() if name not in buffers
            },
            "_buffers": {name: x for name, x in own.items() if name in buffers},
            "_non_persistent_buffers_set": set(),
            "_modules": {name: build(inside + name, "Layer") for name in below},
        }
        return Persistent(kind, state | attributes.get(path, {}))

    return build("", kind)


def attributes(tensors: dict[str, torch.Tensor], lr_mul: float = 0.01) -> dict[str, dict[str, Any]]:
    """What the modules of a network say about themselves, by path."""
    found: dict[str, dict[str, Any]] = {}
    generator = "synthesis.b4.const" in tensors
    for name, x in tensors.items():
        path, _, leaf = name.rpartition(".")
        last = path.split(".")[-1]
        if leaf == "weight" and x.ndim == 2:
            gain = lr_mul if path.startswith("mapping.fc") else 1
            linear = last in ("affine", "embed", "out")
            found[path] = {
                "activation": "linear" if linear else "lrelu",
                "weight_gain": gain / np.sqrt(x.shape[1]),
                "bias_gain": gain,
            }
        elif leaf == "weight":
            found[path] = {"conv_clamp": None} | ({} if last == "torgb" else {"activation": "lrelu"})
            if last == "skip":
                found[path]["activation"] = "linear"
            block = ".".join(path.split(".")[:-1])
            found[block] = {"architecture": "skip" if generator else "resnet", "use_fp16": False}
    if "mapping.fc0.weight" in tensors:
        found["mapping"] = {"w_avg_beta": 0.998 if generator else None}
    if not generator:
        found["b4.mbstd"] = {"group_size": 4, "num_channels": 1}
    return found


def with_filters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Filters are among the published modules' tensors."""
    blocks = {name.rpartition(".conv1.")[0] for name in tensors if name.endswith(".conv1.weight")}
    return tensors | {f"{block}.resample_filter": FILTER for block in blocks}


def pytorch_file(G: dict[str, torch.Tensor], D: dict[str, torch.Tensor], **changed: Any) -> dict[str, Any]:
    """What StyleGAN2-ADA-PyTorch pickles. `changed` holds attributes by "G_PATH" or "D_PATH", with __ for a dot."""
    its = {"G": attributes(G), "D": attributes(D)}
    for place, values in changed.items():
        net, _, path = place.partition("_")
        its[net].setdefault(path.replace("__", "."), {}).update(values)
    generator, discriminator = (
        module(kind, with_filters(x), its[net]) for kind, net, x in (("Generator", "G", G), ("Discriminator", "D", D))
    )
    generator.state["_init_kwargs"] = EasyDict(mapping_kwargs=EasyDict(), synthesis_kwargs=EasyDict())
    return {
        "training_set_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", path="cats.zip"),
        "G": Persistent("Generator", {}),
        "D": discriminator,
        "G_ema": generator,
        "augment_pipe": None,
    }


def tensorflow_name(name: str) -> str:
    """The variable that holds a tensor of the PyTorch code."""
    path, _, leaf = name.rpartition(".")
    parts = path.split(".")
    if name == "mapping.w_avg":
        return "dlatent_avg"
    if leaf == "noise_const":
        level = int(math.log2(int(parts[1][1:])))
        return f"synthesis/noise{2 * level - (5 if parts[2] == 'conv0' else 4)}"
    if name == "synthesis.b4.const":
        return "synthesis/4x4/Const/const"
    generator = "mapping/Dense" if parts[0] == "synthesis" else "Mapping"
    if parts[0] == "mapping":
        return "/".join([parts[1].replace("embed", "LabelEmbed").replace("fc", generator), leaf])
    if path == "b4.out":
        return f"Output/{leaf}"
    top = ["synthesis"] if parts[0] == "synthesis" else []
    level, layer, *affine = parts[len(top) :]
    names = {"torgb": "ToRGB", "fromrgb": "FromRGB", "skip": "Skip", "fc": "Dense0", "conv": "Conv"}
    names |= {"conv0": "Conv0_up", "conv1": "Conv1"} if top else {"conv0": "Conv0", "conv1": "Conv1_down"}
    layer = "Conv" if level == "b4" and top and layer == "conv1" else names[layer]
    return "/".join([*top, f"{level[1:]}x{level[1:]}", layer, f"{'mod_' if affine else ''}{leaf}"])


def tensorflow_value(name: str, x: torch.Tensor) -> Any:
    """A tensor as the TensorFlow code lays it out."""
    if name.endswith("noise_strength"):
        return np.float32(x.item())
    y = x.numpy()
    if name.endswith("weight"):
        y = y.T if y.ndim == 2 else y.transpose(2, 3, 1, 0)
        # There, the zero-inserted image is correlated with the weight; in the PyTorch code it is convolved.
        y = y[::-1, ::-1] if ".conv0.weight" in name and name.startswith("synthesis") else y
    elif name.endswith("noise_const"):
        y = y[None, None]
    elif name.endswith("const"):
        y = y[None]
    elif name.endswith("affine.bias"):
        y = y - 1
    return np.ascontiguousarray(y)


def tensorflow_file(
    G: dict[str, torch.Tensor], D: dict[str, torch.Tensor], version: int = 5, g_kwargs: Any = (), d_kwargs: Any = ()
) -> tuple[Network, Network, Network]:
    """What StyleGAN2-ADA (version 5) and StyleGAN2 (4) pickle."""

    def network(prefix: str, variables: dict[str, Any], components: dict[str, Network], kwargs: Any) -> Network:
        own = [(name.removeprefix(prefix), x) for name, x in variables.items() if name.startswith(prefix)]
        return Network(
            version=version, name="G", static_kwargs=dict(kwargs), components=components, build_module_src=SOURCE,
            build_func_name="G_main", variables=own,
        )  # fmt: skip

    g, d = ({}, {})
    for variables, tensors, generator in ((g, G, True), (d, D, False)):
        for name, x in tensors.items():
            variable = tensorflow_name(name)
            variable = variable.replace("Mapping", "mapping/Dense") if generator else variable
            variable = f"mapping/{variable}" if generator and variable.startswith("LabelEmbed") else variable
            variables[variable] = tensorflow_value(name, x)
    g_kwargs = {"num_channels": 3, "fmap_base": 8192, "fmap_max": 64} | dict(g_kwargs)
    d_kwargs = {"num_channels": 3, "fmap_base": 8192, "fmap_max": 64} | dict(d_kwargs)
    parts = {name: network(f"{name}/", g, {}, g_kwargs) for name in ("synthesis", "mapping")}
    top = {name: x for name, x in g.items() if "/" not in name} | {"lod": np.float32(0)}
    Gs = network("", top, parts, g_kwargs)
    return Network(version=version), network("", d, {}, d_kwargs), Gs
