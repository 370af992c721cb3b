"""StyleGAN2 networks as their authors publish them, as networks of ours and a snapshot."""

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint, published, unpickle
from .config import Data, Run, StyleGAN2Network, StyleGAN2Recipe
from .draws import Draws
from .networks import build
from .networks.growing import channels
from .networks.layers import Conv2d
from .networks.stylegan2 import SynthesisLayer, ToRGB
from .published import Part

MOST_PX = 4096  # a small file could ask for a noise map of any size
LR_MUL = 0.01  # of our mappings
GROUP = 4  # where minibatch-std goes over the whole batch, of which size a network knows nothing
PROBES = 4  # images, at least, on which it is seen whether activations reach a clamp


@dataclass(frozen=True)
class Official:
    """What a file holds: networks of ours, filled. `discriminator_is_its` is False where the file's was left out."""

    run: Run
    generator: Any
    discriminator: Any
    discriminator_is_its: bool
    nimg: int
    source: dict[str, Any]
    notes: list[str]


def read(path: Path, generator_only: bool = False) -> Official:
    """Reads an official file, executing nothing in it (see `unpickle`).

    Args:
        generator_only: leave the discriminator out, which may then be of any kind.

    Raises:
        ValueError: it is no such file, or its networks are such as ours cannot be; says which setting it is.
        OSError: it cannot be read.
    """
    about = unpickle.load(path)
    try:
        G, D, source, notes = published.parts(about, generator_only)
        check_held([part for part in (G, D) if part], path.stat().st_size)
        run, size, c_dim = _describe(G, D)
        wide = run.model_copy(update={"precision": "fp32"})  # its precision is what training goes on in
        generator, discriminator = build(wide, size, size, G.matrix("synthesis.b4.torgb.weight")[0], c_dim)
        for part, network in ((G, generator), (D, discriminator)):
            if part:
                checkpoint.fill(network, adapt(_rescaled(part), network.state_dict()), path)
                network.eval().requires_grad_(False)
        notes += _told(G, D, run, generator, discriminator)
        notes += _clamp_notes(G, D, generator, discriminator)
    except ValueError as error:
        raise ValueError(f"cannot convert {path}: {error}") from None
    match = re.fullmatch(r"network-snapshot-(\d{6})\.pkl", path.name)
    with open(path, "rb") as file:
        source |= {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return Official(run, generator, discriminator, D is not None, 1000 * int(match[1]) if match else 0, source, notes)


def check_held(parts: Sequence[Part], size: int) -> None:
    """Raises ValueError if networks hold more numbers than a file of so many bytes: if many tensors are views of the
    same ones, of which copies would exhaust the memory. Or if names would not do for files of ours."""
    if sum(x.nbytes for part in parts for x in part.tensors.values()) > size:
        raise ValueError("its tensors share their numbers, as those of networks do not")
    for name in (name for part in parts for name in part.tensors):
        if not re.fullmatch(r"[\w.]{1,200}", name, re.ASCII):
            raise ValueError(f"a tensor is called {published.shown(name)}")


def write(official: Official, out: Path) -> None:
    """Writes a snapshot folder, whole or not at all; what `out` was before is replaced.

    Raises OSError, naming it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    height, width = official.generator.size
    image = official.generator.get_parameter("synthesis.b4.torgb.bias")
    classes = [str(i) for i in range(official.generator.c_dim)]
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        fresh = checkpoint.save_snapshot(
            Path(folder) / "fresh", official.generator, official.discriminator, official.run, official.nimg, width,
            height, len(image), classes,
        )  # fmt: skip
        if not official.discriminator_is_its:
            (fresh / "discriminator.safetensors").unlink()
        about = json.loads((fresh / "snapshot.json").read_text())
        (fresh / "snapshot.json").write_text(json.dumps(about | {"source": official.source}, indent=1) + "\n")
        old = Path(folder) / "old"
        if out.exists():
            shutil.move(out, old)
        try:
            fresh.rename(out)
        except OSError:
            if old.exists():
                shutil.move(old, out)
            raise


def adapt(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The PyTorch code's state as ours: names are the same.

    Ours has no filters in it, noise strengths of shape (1,) for (), and a mean of w also where nothing is truncated.

    Args:
        own: the state of our network.
    """
    state = {name: x for name, x in tensors.items() if not name.endswith("resample_filter")}
    state = {name: x.reshape(1) if name.endswith("noise_strength") and x.ndim == 0 else x for name, x in state.items()}
    unused = {name: torch.zeros_like(x) for name, x in own.items() if name == "mapping.w_avg"}
    return unused | state


def _rescaled(part: Part) -> dict[str, Tensor]:
    """The tensors in fp32, with the mapping's learning-rate multiplier as ours have it, by which they are divided."""
    state = {}
    for name, values in part.tensors.items():
        module = name.rpartition(".")[0]
        scale = part.lr_mul.get(module, 1.0) / (LR_MUL if re.fullmatch(r"mapping\.fc\d+", module) else 1.0)
        state[name] = torch.from_numpy(np.array(values, np.float32)) * scale
    return state


def _describe(G: Part, D: Part | None) -> tuple[Run, int, int]:
    """(run, width and height, classes) of networks such as these.

    Sizes are those of tensors, each of which the file holds: what is built of them is no larger than it.
    """
    resolutions = _resolutions(G, r"synthesis\.b(\d+)\.const|synthesis\.b(\d+)\.conv1\.weight")
    counts = [_square(G, f"synthesis.b{res}.conv1.weight", 3) for res in resolutions]
    w_dim = G.matrix("synthesis.b4.conv1.affine.weight")[1]
    c_dim, z_dim, layers = _mapping(G, w_dim)
    if z_dim < 1:
        raise G.refuse("z_dim", z_dim, "1 or more")
    G.shape("mapping.w_avg")
    noise = {f"synthesis.b{res}.conv1.noise_strength" in G.tensors for res in resolutions}
    if len(noise) > 1:
        raise G.refuse("use_noise", "in some levels", "in all or in none")
    told = [G.sizes]
    label_layers = layers
    if D:
        told.append(D.sizes)
        if _resolutions(D, r"b(\d+)\.conv0?\.weight") != resolutions:
            raise ValueError("its D is for images of another size than its generator")
        its_counts = [_square(D, f"b{res}.conv{'0' * (res > 4)}.weight", 3) for res in resolutions]
        if its_counts != counts:
            raise D.refuse("the number of channels of its levels", its_counts, counts)
        its_c_dim, _, label_layers = _mapping(D, counts[0]) if "mapping.embed.weight" in D.tensors else (0, 0, layers)
        if its_c_dim != c_dim:
            raise D.refuse("c_dim", its_c_dim, c_dim)
    base, most = _channel_rule(resolutions, counts, told)
    group = (D.group or GROUP) if D else GROUP
    # The published D may have fewer layers between label and projection than the generator has between z and w.
    differs: dict[str, Any] = {"discriminator_mapping_layers": label_layers} if label_layers != layers else {}
    network = StyleGAN2Network(
        z_dim=z_dim, w_dim=w_dim, mapping_layers=layers, channel_base=base, channel_max=most, noise=noise == {True},
        mbstd_group=group, **differs,
    )  # fmt: skip
    beta = G.w_avg_beta if isinstance(G.w_avg_beta, float) and 0 <= G.w_avg_beta < 1 else 0.995
    run = Run(
        preset="official",
        data=Data(labels=c_dim > 0),
        network=network,
        recipe=StyleGAN2Recipe(w_avg_beta=beta),
        batch=group * math.ceil(32 / group),
        precision="fp16" if G.low_levels else "fp32",
    )
    return run, resolutions[-1], c_dim


def _resolutions(part: Part, pattern: str) -> list[int]:
    """4, 8, 16, ... of the levels there are."""
    found = sorted({int(next(filter(None, m.groups()))) for name in part.tensors if (m := re.fullmatch(pattern, name))})
    if len(found) < 2 or found != [4 << i for i in range(len(found))] or found[-1] > MOST_PX:
        raise part.refuse("img_resolution", found[-1:], f"8, 16, ... or {MOST_PX}, with all levels below it")
    return found


def _square(part: Part, name: str, k: int) -> int:
    """Channels of a k x k convolution that has as many inputs as outputs (but for that of the minibatch statistics)."""
    shape = part.shape(name)
    if len(shape) != 4 or shape[2:] != (k, k) or shape[1] - shape[0] not in (0, name == "b4.conv.weight"):
        raise part.refuse(f"the shape of {name}", shape, f"[C, C, {k}, {k}]")
    return shape[0]


def _mapping(part: Part, width: int) -> tuple[int, int, int]:
    """(c_dim, z_dim, layers) of a mapping all of whose layers have the given width."""
    c_dim, layers = 0, published.mapping_layers(part)
    if "mapping.embed.weight" in part.tensors:
        embed, c_dim = part.matrix("mapping.embed.weight")
        if embed != width:
            raise part.refuse("embed_features", embed, width)
    z_dim = part.matrix("mapping.fc0.weight")[1] - (width if c_dim else 0) if layers else 0
    for i in range(layers):
        shape, only = part.shape(f"mapping.fc{i}.weight"), (width, width if i else z_dim + (width if c_dim else 0))
        if shape != only:
            raise part.refuse(f"layer_features (the shape of mapping.fc{i}.weight)", shape, only)
    return c_dim, z_dim, layers


def _channel_rule(
    resolutions: Sequence[int], counts: Sequence[int], told: Sequence[tuple[int, int] | None]
) -> tuple[int, int]:
    """(channel_base, channel_max) that give these channels: as they were told, or else the least that do."""
    most = max(counts)
    least = max(res * n for res, n in zip(resolutions, counts, strict=True) if n < most or res == resolutions[-1])
    for base, limit in [*filter(None, told), (least, most)]:
        if base >= 4 and limit >= 1 and channels(resolutions, base, limit) == list(counts):
            return base, limit
    raise ValueError(f"channels {list(counts)} do not halve as the size doubles (fmap_decay and fmap_min have to be 1)")


def _told(G: Part, D: Part | None, run: Run, generator: Any, discriminator: Any) -> list[str]:
    """A line for each network, and for what is other than one might think."""
    n, (height, width) = run.network, generator.size
    assert isinstance(n, StyleGAN2Network)
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in (("G", generator), ("D", discriminator))}
    notes = [
        f"{G.what}: {width}x{height} px, z {n.z_dim}, w {n.w_dim}, {n.mapping_layers} mapping layers, "
        f"{generator.c_dim or 'no'} classes, {count['G']:,} parameters"
    ]
    if D:
        group = f"groups of {n.mbstd_group}" if n.mbstd_group > 1 else "no minibatch-std"
        notes.append(f"{D.what}: {group}, {count['D']:,} parameters")
        if D.group is None:
            notes.append(
                f"D: mbstd_group_size is None there, the whole batch: here groups of {GROUP}, the same for batches of "
                f"{GROUP}"
            )
    own = generator.levels - 1  # fp16 never reaches the lowest level
    if min(G.low_levels, own) not in (0, min(4, own)):
        notes.append(f"{G.what}: num_fp16_res is {G.low_levels}; of ours, precision fp16 is that of the top 4 levels")
    return notes


@torch.no_grad()
def _clamp_notes(G: Part, D: Part | None, generator: Any, discriminator: Any) -> list[str]:
    """A line for each network that clamps its activations, as ours in fp32 do not.

    The clamp is there for fp16, an order of magnitude above what activations come to (Karras et al. 2020, "Training
    GANs with Limited Data", appendix on mixed precision), so that networks with and without it are the same function.
    Whether that holds is looked at; raises ValueError if it does not.
    """
    if G.clamp is None and (D is None or D.clamp is None):
        return []
    n = max(discriminator.b4.mbstd_group, 1)
    n *= math.ceil(PROBES / n)
    z = Draws(0, "convert", range(n)).normal(generator.z_dim)
    c_dim = generator.c_dim
    c = nn.functional.one_hot(torch.arange(n) % c_dim, c_dim).float() if c_dim else None
    images, peak = _watched(generator, lambda: generator(z, c))
    notes = [_clamp_note(G, peak)] if G.clamp else []
    if D and D.clamp:
        notes.append(_clamp_note(D, _watched(discriminator, lambda: discriminator(images, c))[1]))
    return notes


def _watched(network: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """(result, largest magnitude of what a clamp would be applied to, before the gain of residual branches)."""
    peaks = [0.0]

    def watch(scale: float) -> Callable[..., None]:
        return lambda _module, _inputs, output: peaks.append(output.abs().amax().item() * scale)

    handles = [
        module.register_forward_hook(watch(math.sqrt(2) if isinstance(module, Conv2d) and module.down > 1 else 1.0))
        for name, module in network.named_modules()
        if isinstance(module, SynthesisLayer | ToRGB | Conv2d) and not name.endswith("skip")
    ]
    try:
        return run(), max(peaks)
    finally:
        for handle in handles:
            handle.remove()


def _clamp_note(part: Part, peak: float) -> str:
    assert part.clamp is not None
    if peak >= part.clamp:
        raise ValueError(
            f"{part.what}: conv_clamp {part.clamp:g} is at work there (activations of {peak:.4g} were seen), and here "
            f"nothing is clamped in fp32{', --generator-only leaves D out' if part.what == 'D' else ''}"
        )
    return f"{part.what}: conv_clamp {part.clamp:g} is left out: the largest activation seen is {peak:.4g}"
