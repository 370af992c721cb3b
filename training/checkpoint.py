"""Training state and snapshots: named dictionaries of tensors in a folder of safetensors and JSON, never pickles.

A folder is written under a temporary name, flushed to disk, and renamed: whoever looks sees a whole one or none.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import Run, read_run, write_run
from .networks import Generator, build

States = dict[str, dict[str, Tensor]]

SNAPSHOT = "styleloom-snapshot-1"


def optimizer_state(optimizer: Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of an optimizer as PARAMETER:KEY -> tensor. Its hyper-parameters follow from the run."""
    names: dict[Tensor, str] = {p: name for name, p in network.named_parameters()}
    return {f"{names[p]}:{key}": x for p, state in optimizer.state.items() for key, x in state.items()}


def load_optimizer_state(optimizer: Optimizer, network: nn.Module, state: dict[str, Tensor]) -> None:
    """The reverse of `optimizer_state`."""
    parameters = dict(network.named_parameters())
    optimizer.state.clear()
    for name, x in state.items():
        parameter, key = name.rsplit(":", 1)
        p = parameters[parameter]
        optimizer.state[p][key] = x.to(p.device) if key == "step" else torch.empty_like(p).copy_(x)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that appears as `folder` only if the block ends well. Raises OSError naming `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left_over in folder.parent.glob("*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if folder.exists():  # written by an earlier try at the same images; the new one is as good
            folder.rename(replaced := folder.with_name(folder.name + ".old.tmp"))
            temporary.rename(folder)
            shutil.rmtree(replaced)
        else:
            temporary.rename(folder)
        _sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(folder)) from None
        raise


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file. Through bytes, so that a full disk is an ordinary OSError."""
    path.write_bytes(to_bytes({name: x.detach().cpu().contiguous() for name, x in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU. Raises ValueError if it is missing or not one."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {_brief(error)}") from None


def save(folder: Path, states: States, meta: dict[str, Any], run: Run, keep: int) -> Path:
    """Writes the checkpoint `folder/nimg-NNNNNNNNN`, unless it is there, and deletes all but the newest `keep`.

    Args:
        states: name -> tensors; each becomes NAME.safetensors.
        meta: JSON values, with `nimg`.
    """
    target = folder / _name(meta["nimg"])
    if target.exists():  # the run goes on from its newest checkpoint, so this one holds the same
        return target
    with whole_folder(target) as temporary:
        for name, tensors in states.items():
            write_tensors(temporary / f"{name}.safetensors", tensors)
        write_run(run, temporary / "run.json")
        (temporary / "state.json").write_text(json.dumps({**meta, "states": sorted(states)}, indent=1) + "\n")
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old.rename(old.with_name(old.name + ".tmp")))  # never a half one under a whole one's name
    return target


def load(folder: Path) -> tuple[States, dict[str, Any], Run]:
    """(states, meta, run) of a checkpoint folder. Raises ValueError if a part is missing or unreadable."""
    try:
        meta = json.loads((folder / "state.json").read_text())
        _require(meta, "nimg", "seconds", "processes", "data_hash")
        states = {name: read_tensors(folder / f"{name}.safetensors") for name in meta["states"]}
        return states, meta, read_run(folder / "run.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the checkpoint {folder} is damaged, or of another version ({_brief(error)}).\n"
            "Move that folder away to go on from the one before."
        ) from None


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints (or snapshots) in a folder, oldest first."""
    if not folder.is_dir():
        return []
    whole = [path for path in folder.iterdir() if re.fullmatch(r"nimg-\d{9,}", path.name)]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("nimg-")))


def _require(values: dict[str, Any], *keys: str) -> None:
    """Raises KeyError naming the first key that is missing."""
    for key in keys:
        values[key]


def _brief(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))
    return f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())


def _name(nimg: int) -> str:
    return f"nimg-{nimg:09d}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_snapshot(
    folder: Path,
    average: nn.Module,
    discriminator: nn.Module,
    run: Run,
    nimg: int,
    width: int,
    height: int,
    channels: int,
    class_names: list[str],
) -> Path:
    """Writes `folder/nimg-NNNNNNNNN`: the averaged generator, what is needed to build it, and the discriminator, from
    which `--init` can go on."""
    target = folder / _name(nimg)
    about = {
        "format": SNAPSHOT,
        "styleloom": importlib.metadata.version("styleloom"),
        "nimg": nimg,
        "width": width,
        "height": height,
        "channels": channels,
        "class_names": class_names,
        "run": run.model_dump(mode="json"),
    }
    with whole_folder(target) as temporary:
        write_tensors(temporary / "generator.safetensors", average.state_dict())
        write_tensors(temporary / "discriminator.safetensors", discriminator.state_dict())
        (temporary / "snapshot.json").write_text(json.dumps(about, indent=1) + "\n")
    return target


def find_snapshot(path: Path) -> Path:
    """A snapshot folder: `path` itself, or the newest one of the run in `path`. Raises ValueError if there is none."""
    if (path / "snapshot.json").is_file():
        return path
    newest = complete(path / "snapshots")[-1:]
    if not newest:
        raise ValueError(f"there is no snapshot in {path}: name a folder with a snapshot.json, or a run that has one")
    return newest[0]


def read_snapshot(path: Path) -> dict[str, Any]:
    """`snapshot.json`, its `run` as a Run. Raises ValueError if it is not one that this version reads."""
    try:
        about = json.loads((path / "snapshot.json").read_text())
        if about["format"] != SNAPSHOT:
            raise ValueError(f"its format is {about['format']!r}, not {SNAPSHOT!r}")
        about["run"] = Run.model_validate(about["run"])
        _require(about, "nimg", "width", "height", "channels", "class_names")
        return about
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path / 'snapshot.json'} is not a snapshot that this version reads: {_brief(error)}"
        ) from None


def load_generator(path: Path) -> tuple[Generator, dict[str, Any]]:
    """(averaged generator in eval mode on the CPU, in fp32 whatever it was trained in, snapshot.json) of a folder.

    Raises:
        ValueError: a part is missing, or the weights do not fit the description.
    """
    about = read_snapshot(path)
    sizes = about["width"], about["height"], about["channels"], len(about["class_names"])
    generator, _ = build(about["run"].model_copy(update={"precision": "fp32"}), *sizes)
    fill(generator, read_tensors(path / "generator.safetensors"), path)
    return generator.eval().requires_grad_(False), about


def fill(network: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Loads all tensors into a network. Raises ValueError naming the first that is missing, left over or of another
    shape."""
    own = network.state_dict()
    for name in [*own, *tensors]:
        here = tuple(own[name].shape) if name in own else "nothing"
        there = tuple(tensors[name].shape) if name in tensors else "nothing"
        if here != there:
            raise ValueError(f"the weights in {source} do not fit this network: {name} is {there} there, {here} here")
    network.load_state_dict(tensors)
