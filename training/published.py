"""Files of StyleGAN2 networks as their authors publish them, each network as a `Part`.

There are three kinds: StyleGAN2's and StyleGAN2-ADA's for TensorFlow, a tuple (G, D, average of G) of networks with
their arguments and variables; and those of StyleGAN2-ADA-PyTorch and of the StyleGAN3 repository, a dictionary of
modules. What our networks cannot do exactly is refused by the name of its setting.
"""

import math
import re
import reprlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .unpickle import Array, Record

FILTER = np.array([1, 3, 3, 1])
DEEPEST = 8  # modules in modules
LONGEST = 100  # letters of a name
MOST_GROUP = 1024  # images of a minibatch standard deviation

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 100, 100


def shown(value: Any) -> str:
    """Of a value that a file holds, as much as goes into a line: it may be huge, or hold itself."""
    return _REPR.repr(value)


@dataclass
class Part:
    """A network of an official file.

    Attributes:
        what: its name in messages.
        tensors: by the PyTorch code's names, without the filters.
        lr_mul: learning-rate multipliers other than 1, by module.
        low_levels: levels in fp16.
        clamp: of the activations, in all levels.
        group: of the minibatch standard deviation; 1 is none, None the whole batch.
        sizes: (channel_base, channel_max) as it was told.
    """

    what: str
    tensors: dict[str, np.ndarray]
    lr_mul: dict[str, float] = field(default_factory=dict)
    low_levels: int = 0
    clamp: float | None = None
    group: int | None = None
    w_avg_beta: float = 0.995
    sizes: tuple[int, int] | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor. Raises ValueError if it is missing or empty."""
        if name not in self.tensors:
            raise ValueError(f"{self.what} has no {name}: it is no StyleGAN2 network that could be converted")
        shape = self.tensors[name].shape
        if 0 in shape:
            raise self.refuse(f"the shape of {name}", shape, "without 0")
        return shape

    def matrix(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a dense layer or a 1x1 convolution. Raises ValueError if there is none."""
        shape = self.shape(name)
        if shape[2:] not in ((), (1, 1)) or len(shape) < 2:
            raise self.refuse(f"the shape of {name}", shape, "[out, in]")
        return shape[0], shape[1]

    def refuse(self, setting: str, value: Any, only: Any) -> ValueError:
        """That a setting has a value which our networks cannot have."""
        return ValueError(f"{self.what}: {setting} is {shown(value)}, and here it can only be {shown(only)}")


def parts(about: Any, generator_only: bool) -> tuple[Part, Part | None, dict[str, Any], list[str]]:
    """(averaged generator, discriminator, where they come from, what is left out)."""
    if isinstance(about, tuple) and len(about) == 3 and all(isinstance(x, Record) for x in about):
        G, D = about[2], None if generator_only else about[1]
        found = [_from_tensorflow(record, what) for record, what in ((G, "Gs"), (D, "D")) if record]
        source, left = {"networks": "StyleGAN2 for TensorFlow"}, ["G"]
    elif isinstance(about, dict) and isinstance(about.get("G_ema"), Record):
        G, D = about["G_ema"], None if generator_only else about.get("D")
        if D is not None and not isinstance(D, Record):
            raise ValueError("its D is no network")
        found = [_from_torch(record, what) for record, what in ((G, "G_ema"), (D, "D")) if record]
        source, left = {"networks": "StyleGAN2 for PyTorch"}, [key for key in about if key not in ("G_ema", "D")]
    else:
        raise ValueError("it holds neither (G, D, Gs) of the TensorFlow code nor G_ema and D of the PyTorch code")
    left += ["D"] * (len(found) == 1)
    notes = [f"not taken: {', '.join(ascii(str(key)[:40])[1:-1] for key in left[:9])}"] if left else []
    return found[0], found[1] if len(found) > 1 else None, source, notes


# PyTorch.


def _from_torch(top: Record, what: str) -> Part:
    """A pickled module. Its settings are taken from the modules' attributes, which defaults cannot hide."""
    expected = "Generator" if what == "G_ema" else "Discriminator"
    if top.kind != expected:
        raise ValueError(f"{what} is of class {shown(top.kind)}, not {expected}")
    modules = _modules(top, what)
    part = Part(what, {})
    for path, record in modules.items():
        for name, values in _tensors_of(record, what).items():
            whole = f"{path}.{name}" if path else name
            if name == "resample_filter":
                _check_filter(part, whole, values)
            else:
                part.tensors[whole] = values
    if what == "G_ema" and "synthesis.b4.const" not in part.tensors:
        raise ValueError(f"{what} is no StyleGAN2 generator (it has no synthesis.b4.const); StyleGAN3's are not read")
    clamps = []
    for path, record in modules.items():
        _take_settings(part, path, record.state, "skip" if what == "G_ema" else "resnet")
        if "conv_clamp" in record.state and not path.endswith("skip"):
            clamps.append(record.state["conv_clamp"])
    part.clamp = _only_clamp(part, clamps)
    if what == "D":
        part.group = _group_of(part, modules.get("b4.mbstd"))
    part.w_avg_beta = modules["mapping"].state.get("w_avg_beta", 0.995) if "mapping" in modules else 0.995
    part.sizes = _told_sizes(top.state.get("_init_kwargs"))
    return part


def _modules(top: Record, what: str) -> dict[str, Record]:
    """A module and those within it, by dotted path. Raises ValueError if that is no tree."""
    found: dict[str, Record] = {}
    seen: set[int] = set()
    waiting = [("", top)]
    while waiting:
        path, record = waiting.pop()
        if not isinstance(record, Record) or id(record) in seen or path.count(".") > DEEPEST:
            raise ValueError(f"{what}: its modules are no tree of modules ({shown(path)})")
        seen.add(id(record))
        found[path] = record
        below = record.state.get("_modules", {})
        if not isinstance(below, dict):
            raise ValueError(f"{what}: its modules are no tree of modules ({shown(path)})")
        _check_names(below, what)
        waiting += [(f"{path}.{name}" if path else str(name), x) for name, x in below.items() if x is not None]
    return found


def _check_names(values: dict[Any, Any], what: str) -> None:
    """Raises ValueError for a name that is too long: each is copied in front of those below it."""
    for name in values:
        if type(name) is str and len(name) > LONGEST:
            raise ValueError(f"{what}: a name of more than {LONGEST} letters ({shown(name)})")


def _tensors_of(record: Record, what: str) -> dict[str, np.ndarray]:
    """Parameters and buffers (frozen layers keep their weights there) of one module."""
    found = {}
    for kind in ("_parameters", "_buffers"):
        values = record.state.get(kind, {})
        if not isinstance(values, dict):
            raise ValueError(f"{what}: {kind} of a {shown(record.kind)} are no dictionary")
        _check_names(values, what)
        for name, x in values.items():
            if x is not None:
                found[str(name)] = _values(x, f"{what}: {shown(name)}")
    return found


def _values(x: Any, what: str) -> np.ndarray:
    if isinstance(x, float | int):
        x = Array(np.array(x))
    if not isinstance(x, Array) or x.values is None:
        raise ValueError(f"{what} is no tensor")
    return x.values


def _check_filter(part: Part, name: str, values: np.ndarray) -> None:
    expected = np.outer(FILTER, FILTER) / FILTER.sum() ** 2
    if values.shape != (4, 4) or not np.abs(values - expected).max() < 1e-6:
        raise part.refuse(f"the filter {name}", values.tolist(), FILTER.tolist())


def _take_settings(part: Part, path: str, state: dict[str, Any], architecture: str) -> None:
    """Checks a module's attributes, and takes those that ours can follow."""
    last = path.rpartition(".")[2]
    linear = last in ("affine", "embed", "out", "skip")
    fixed = {"architecture": architecture, "activation": "linear" if linear else "lrelu"}
    for setting, only in fixed.items():
        if state.get(setting, only) != only:
            raise part.refuse(f"{setting} of {path}", state[setting], only)
    if "bias_gain" in state:  # a dense layer
        part.lr_mul[path] = _number(part, f"bias_gain of {path}", state["bias_gain"])
        gain = _number(part, f"weight_gain of {path}", state.get("weight_gain"))
        only = part.lr_mul[path] / math.sqrt(part.matrix(f"{path}.weight")[1])
        if not math.isclose(gain, only, rel_tol=1e-6):
            raise part.refuse(f"weight_gain of {path}", gain, only)
    part.low_levels += state.get("use_fp16") is True


def _number(part: Part, what: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise part.refuse(what, value, "a number above 0")
    return float(value)


def _only_clamp(part: Part, clamps: list[Any]) -> float | None:
    """The clamp of all layers."""
    if any(type(x) not in (int, float, type(None)) for x in clamps) or len(set(clamps)) > 1:
        raise part.refuse("conv_clamp", clamps, "one number for all layers, or None")
    return None if not clamps or clamps[0] is None else _number(part, "conv_clamp", clamps[0])


def _group_of(part: Part, mbstd: Record | None) -> int | None:
    if mbstd is None:
        return 1
    return _group(part, mbstd.state.get("group_size"), mbstd.state.get("num_channels", 1))


def _group(part: Part, size: Any, features: Any) -> int | None:
    """Of the minibatch standard deviation; None for the whole batch."""
    if features == 0:
        return 1
    if features != 1:
        raise part.refuse("mbstd_num_channels", features, 1)
    if size is not None and (type(size) is not int or not 1 <= size <= MOST_GROUP):
        raise part.refuse("mbstd_group_size", size, f"1 to {MOST_GROUP}")
    return size


def _told_sizes(kwargs: Any) -> tuple[int, int] | None:
    """channel_base and channel_max as the constructor was told, or its defaults."""
    kwargs = kwargs if isinstance(kwargs, dict) else {}
    synthesis = kwargs.get("synthesis_kwargs")
    kwargs = kwargs | (synthesis if isinstance(synthesis, dict) else {})
    base, most = kwargs.get("channel_base", 32768), kwargs.get("channel_max", 512)
    return (base, most) if type(base) is int and type(most) is int else None


# TensorFlow.

# Settings by which our networks are the same whatever they are: what the tensors' shapes say, what holds in training
# or for a call only, and what is looked at elsewhere.
FREE = {
    "num_channels", "resolution", "label_size", "latent_size", "dlatent_size", "dlatent_broadcast", "mapping_layers",
    "mapping_fmaps", "label_fmaps", "fmap_base", "fmap_max", "fmap_min", "fmap_const", "fmap_decay", "mapping_lrmul",
    "truncation_psi", "truncation_cutoff", "truncation_psi_val", "truncation_cutoff_val", "dlatent_avg_beta",
    "style_mixing_prob", "randomize_noise", "use_noise", "structure", "fused_modconv", "num_fp16_res", "conv_clamp",
    "mbstd_group_size", "mbstd_num_features", "freeze_layers", "is_validation", "is_training", "augment_strength",
    "pagan_num", "pagan_fade", "score_size", "score_max",
}  # fmt: skip
FIXED: dict[str, tuple[Any, ...]] = {
    "mapping_nonlinearity": ("lrelu",), "nonlinearity": ("lrelu",), "resample_kernel": ([1, 3, 3, 1], (1, 3, 3, 1)),
    "normalize_latents": (True,), "dtype": ("float32",), "mapping_func": ("G_mapping",),
    "synthesis_func": ("G_synthesis_stylegan2", "G_synthesis"), "use_spectral_norm": (False,), "use_pagan": (False,),
    "adaptive_dropout": (0,),
}  # fmt: skip

_LAYERS = {
    "Conv": "conv", "Conv0_up": "conv0", "Conv0": "conv0", "Conv1": "conv1", "Conv1_down": "conv1", "ToRGB": "torgb",
    "FromRGB": "fromrgb", "Skip": "skip", "Dense0": "fc",
}  # fmt: skip


def _from_tensorflow(top: Record, what: str) -> Part:
    """A pickled network: version, static_kwargs, components (which are networks) and variables."""
    version = top.state.get("version")
    if version not in (4, 5):
        raise ValueError(f"{what} is of format {shown(version)}: StyleGAN2 and StyleGAN2-ADA have 4 and 5")
    part = Part(what, {})
    kwargs: dict[str, Any] = {}
    for prefix, network in _components(top, what):
        its = network.state.get("static_kwargs")
        if not isinstance(its, dict):
            raise ValueError(f"{what} has no static_kwargs")
        kwargs |= its
        for name, values in _variables(network, what):
            _take_variable(part, f"{prefix}{name}", values, generator=what == "Gs")
    fixed = FIXED | {"architecture": ("skip" if what == "Gs" else "resnet",)}
    for name, value in kwargs.items():
        if name in fixed and value not in fixed[name]:
            raise part.refuse(name, value, fixed[name][0])
        if name not in fixed and name not in FREE:
            raise ValueError(f"{what}: {shown(name)} is a setting that is not known here")
    lr_mul = _number(part, "mapping_lrmul", kwargs.get("mapping_lrmul", 0.01 if what == "Gs" else 0.1))
    part.lr_mul = {f"mapping.fc{i}": lr_mul for i in range(mapping_layers(part))}
    part.clamp = _only_clamp(part, [kwargs.get("conv_clamp")])
    part.low_levels = kwargs.get("num_fp16_res", 0)
    if type(part.low_levels) is not int:
        raise part.refuse("num_fp16_res", part.low_levels, "a number")
    if what == "D":
        # Left unsaid, it was 4 in StyleGAN2's code and the whole batch in StyleGAN2-ADA's; where 0 or 1 it was off in
        # the former.
        group = kwargs.get("mbstd_group_size", 4 if version == 4 else None)
        features = kwargs.get("mbstd_num_features", 1)
        part.group = _group(part, group or (1 if group == 0 else None), features)
    part.w_avg_beta = kwargs.get("dlatent_avg_beta", 0.995)
    base, most = kwargs.get("fmap_base", 16384), kwargs.get("fmap_max", 512)
    part.sizes = (2 * base, most) if type(base) is int and type(most) is int else None
    return part


def _components(top: Record, what: str) -> list[tuple[str, Record]]:
    """(prefix of its variables' names, network) of a network and of those that it is made of."""
    below = top.state.get("components", {})
    if not isinstance(below, dict) or not all(isinstance(x, Record) for x in below.values()):
        raise ValueError(f"{what}: its components are no networks")
    return [("", top), *((f"{name}/", x) for name, x in below.items())]


def _variables(network: Record, what: str) -> list[tuple[str, np.ndarray]]:
    pairs = network.state.get("variables")
    if not isinstance(pairs, list) or not all(isinstance(x, tuple) and len(x) == 2 for x in pairs):
        raise ValueError(f"{what} has no variables")
    return [(str(name), _values(x, f"{what}: {shown(name)}")) for name, x in pairs]


def _take_variable(part: Part, name: str, values: np.ndarray, generator: bool) -> None:
    """Adds a variable under the name and in the layout of the PyTorch code.

    Dense weights are [in, out] there and convolutions [k, k, in, out]. Up-sampling convolutions correlate the
    zero-inserted image with the weight, which conv2d takes mirrored. Styles have 1 added to their bias when used.
    """
    if name in ("lod", "synthesis/lod"):
        return
    target = _tensorflow_name(name, generator)
    if target is None:
        raise ValueError(f"{part.what}: the variable {shown(name)} is none of StyleGAN2's configurations E and F")
    if values.ndim == 4 and target.endswith("weight"):
        values = values.transpose(3, 2, 0, 1)
        values = values[:, :, ::-1, ::-1] if "Conv0_up" in name else values
    elif values.ndim == 2:
        values = values.T
    elif target.endswith("noise_const"):
        values = values.reshape(values.shape[-2:])
    elif target.endswith("const"):
        values = values.reshape(values.shape[-3:])
    elif target.endswith("affine.bias"):
        values = values + 1
    part.tensors[target] = values


def _tensorflow_name(name: str, generator: bool) -> str | None:
    """The PyTorch code's name of a variable; None for one that it has not."""
    prefix = "synthesis." if generator else ""
    if generator and name == "dlatent_avg":
        return "mapping.w_avg"
    if generator and (match := re.fullmatch(r"synthesis/noise(\d{1,2})", name)):  # of 4x4's layer, 8x8's two, ...
        i = int(match[1])
        return f"synthesis.b{2 ** ((i + 5) // 2)}.conv{1 - i % 2}.noise_const"
    if generator and name == "synthesis/4x4/Const/const":
        return "synthesis.b4.const"
    mapping = r"mapping/(?:(LabelEmbed)|Dense(\d+))" if generator else r"(?:(LabelEmbed)|Mapping(\d+))"
    if match := re.fullmatch(rf"{mapping}/(weight|bias)", name):
        return f"mapping.{'embed' if match[1] else f'fc{match[2]}'}.{match[3]}"
    if not generator and (match := re.fullmatch(r"Output/(weight|bias)", name)):
        return f"b4.out.{match[1]}"
    start = "synthesis/" if generator else ""
    match = re.fullmatch(rf"{start}(\d+)x\1/({'|'.join(_LAYERS)})/(mod_)?(weight|bias|noise_strength)", name)
    if not match:
        return None
    layer = "conv1" if generator and match[2] == "Conv" else _LAYERS[match[2]]
    return f"{prefix}b{match[1]}.{layer}.{'affine.' if match[3] else ''}{match[4]}"


def mapping_layers(part: Part) -> int:
    """Of the mapping."""
    return sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", name)) for name in part.tensors)
