"""Training state and snapshots: named dictionaries of tensors in a folder of safetensors and JSON, never pickles.

A folder is written under a temporary name, flushed to disk, and renamed: whoever looks sees a whole one or none. What a
disk or a copy spoils afterwards is noticed by the hashes in a checkpoint's `state.json`, and an older one serves.
"""

import contextlib
import errno
import importlib.metadata
import itertools
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from . import phema
from .config import Run, write_run
from .networks import build
from .networks.growing import Discriminator, Generator, Growing, start_size

States = dict[str, dict[str, Tensor]]

CHECKPOINT, SNAPSHOT = "styleloom-checkpoint-3", "styleloom-snapshot-2"
WHOLE = "styleloom-snapshot-1"  # the format of before there were networks that grow
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

_names = threading.Lock()  # held while folders get other names, which several threads may want at once
_begun: set[Path] = set()  # the temporary folders that this process is writing


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that appears as `folder` only if the block ends well. Raises OSError naming `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(folder.name + ".tmp")
    with _names:
        for left_over in folder.parent.glob("*.tmp"):  # of a try that was killed
            if left_over.absolute() not in _begun:
                shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir()
        _begun.add(temporary.absolute())
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        replaced = folder.with_name(folder.name + ".old.tmp")
        with _names:
            if folder.exists():  # written by an earlier try at the same images; the new one is as good
                folder.rename(replaced)
            temporary.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        _sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(folder)) from None
        raise
    finally:
        _begun.discard(temporary.absolute())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes a safetensors file; returns its {"bytes": size, "xxh3": hash}. Raises OSError, also for a full disk.

    Whole tensors are hashed and written as they lie in memory, because both leave the interpreter to other threads
    meanwhile; safetensors' own `save` keeps it for about a second a gigabyte.
    """
    host = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    names = sorted(host, key=lambda name: (-host[name].element_size(), name))  # so that every tensor is aligned
    types = {dtype: name for name, dtype in DTYPES.items()}
    header, size = {}, 0
    for name in names:
        x, begin, size = host[name], size, size + host[name].nbytes
        header[name] = {"dtype": types[x.dtype], "shape": list(x.shape), "data_offsets": [begin, size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    xxh3 = xxhash.xxh3_128()
    with open(path, "wb") as file:
        for data in itertools.chain([head], (_bytes(host[name]) for name in names)):
            xxh3.update(data)
            file.write(data)
    return {"bytes": len(head) + size, "xxh3": xxh3.hexdigest()}


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return x.view(-1).view(torch.uint8).numpy().data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU. Raises ValueError if it is missing or not one."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {_brief(error)}") from None


def save(
    folder: Path, states: States, meta: dict[str, Any], run: Run, keep: int, keep_every: int = 0, well: int = 0
) -> Path:
    """Writes the checkpoint `folder/nimg-NNNNNNNNN`, unless it is there, and deletes those that are `doomed`.

    Args:
        states: name -> tensors; each becomes NAME.safetensors.
        meta: JSON values, with `nimg`.
        keep, keep_every, well: as in `doomed`.

    Raises OSError naming the folder; no part of a new checkpoint is left then, and the earlier ones stay.
    """
    target = folder / name_of(meta["nimg"])
    if target.exists():  # the run goes on from its newest checkpoint, so this one holds the same
        return target
    with whole_folder(target) as temporary:
        names = sorted(states)
        files = {
            f"{name}.safetensors": write_tensors(temporary / f"{name}.safetensors", states[name]) for name in names
        }
        write_run(run, temporary / "run.json")
        files["run.json"] = _identity((temporary / "run.json").read_bytes())
        about = {"format": CHECKPOINT, **meta, "states": names, "files": files}
        (temporary / "state.json").write_bytes(_sealed(about))
    whole = {_nimg(path): path for path in complete(folder)}
    for nimg in doomed(whole, keep, keep_every, well):
        _delete(whole[nimg])
    return target


def doomed(nimgs: Iterable[int], keep: int, keep_every: int = 0, well: int = 0) -> list[int]:
    """Those of the checkpoints at `nimgs` that may go: all but the newest `keep`, the newest one at or before `well`,
    to which a run in trouble goes back, and, where `keep_every` (images) is not 0, the first one at or after each of
    its multiples (0 is none: nobody goes back to a run's first minutes)."""
    ordered = sorted(nimgs)
    first = {nimg // keep_every: nimg for nimg in reversed(ordered) if nimg >= keep_every} if keep_every else {}
    good = max((nimg for nimg in ordered if nimg <= well), default=None)
    return [nimg for nimg in ordered[:-keep] if nimg not in first.values() and nimg != good]


def load(folder: Path) -> tuple[States, dict[str, Any], Run]:
    """(states, meta, run) of a checkpoint folder, whose every byte is checked.

    Raises:
        ValueError: a part is missing, not as it was written, or of another version.
        OSError: a part cannot be read now, which says nothing about what it holds.
    """
    try:
        return _read(folder)
    except ValueError as error:
        raise ValueError(
            f"the checkpoint {folder} is damaged, or of another version ({_brief(error)}).\n"
            "Move that folder away to go on from the one before, or begin anew with another --out."
        ) from None


def newest_good(folder: Path, tell: Callable[[str], None]) -> tuple[Path, States, dict[str, Any], Run] | None:
    """(path, states, meta, run) of the newest checkpoint in `folder` that loads; None if the folder holds none at all.

    Changes nothing: every process may call it. `tell` is given a line for each newer one that is damaged.

    Raises:
        ValueError: there are checkpoints, but all are damaged.
        OSError: one cannot be read now, which says nothing about what it holds.
    """
    faults: list[tuple[Path, str]] = []
    for path in reversed(complete(folder)):
        try:
            states, meta, run = _read(path)
        except ValueError as error:
            faults.append((path, _brief(error)))
            continue
        for damaged, what in faults:
            tell(f"the checkpoint {damaged} is damaged ({what}): going back to {path.name}.")
        return path, states, meta, run
    if faults:
        raise ValueError(
            f"no checkpoint in {folder} can be read ({faults[0][0].name}: {faults[0][1]}).\n"
            "Put back a good copy of one, or move that folder away (or give another --out) to begin anew; "
            "--init begins from a snapshot's weights."
        )
    return None


def set_aside(folder: Path, good: Path | None) -> list[Path]:
    """Renames the checkpoints newer than `good` to NAME.damaged, so that the run can write its own at those images.

    For one process, once all have loaded `good` (None: there was none) and no other training can write. Returns the new
    paths; nothing ever deletes them.

    Raises:
        ValueError: one of them is whole, and has come since.
        OSError: renaming failed.
    """
    aside = []
    for path in complete(folder):
        if good is None or _nimg(path) > _nimg(good):
            if _is_whole(path):
                raise ValueError(f"another training has just saved {path}: the same command goes on from there")
            fresh = (path.with_name(f"{path.name}.damaged{f'-{n}' if n else ''}") for n in itertools.count())
            aside.append(path.rename(next(name for name in fresh if not name.exists())))
    return aside


def _is_whole(folder: Path) -> bool:
    try:
        _read(folder)
        return True
    except ValueError:
        return False


def _read(folder: Path) -> tuple[States, dict[str, Any], Run]:
    """As `load`, but the ValueError is one line that names a file in the folder."""
    try:
        meta = _unsealed((folder / "state.json").read_bytes())
        files = {name: _checked(folder / name, identity) for name, identity in meta["files"].items()}
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):  # gone, or on a bad part of the disk
            raise
        raise ValueError(f"{Path(error.filename or folder).name}: {error.strerror}") from None
    states = {name: _tensors(files[f"{name}.safetensors"]) for name in meta["states"]}
    try:
        return states, meta, Run.model_validate_json(bytes(_bytes(files["run.json"])))
    except ValidationError as error:
        raise ValueError(f"run.json: {_brief(error)}") from None


def _checked(path: Path, identity: dict[str, Any]) -> Tensor:
    """The bytes of a file, uint8 [n]. Raises ValueError if they are not those of `identity`, and OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != identity["bytes"]:
            raise ValueError(f"{path.name} has {size} bytes, not {identity['bytes']}")
        data = torch.empty(size, dtype=torch.uint8)
        file.readinto(_bytes(data))
    if _identity(_bytes(data)) != identity:
        raise ValueError(f"{path.name} is not as it was written: its hash differs")
    return data


def _identity(data: bytes | memoryview) -> dict[str, Any]:
    """Size and hash of a file's bytes."""
    return {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}


def _tensors(data: Tensor) -> dict[str, Tensor]:
    """The tensors in the bytes of a file that `write_tensors` wrote, without a copy."""
    begin = 8 + int.from_bytes(_bytes(data[:8]), "little")
    header = json.loads(bytes(_bytes(data[8:begin])))
    views = {
        name: data[begin + its["data_offsets"][0] : begin + its["data_offsets"][1]]
        .view(DTYPES[its["dtype"]])
        .view(its["shape"])
        for name, its in header.items()
    }
    # An optimizer keeps its step counts as they are: as a view, each would hold the whole file in memory.
    return {name: x if x.ndim else x.clone() for name, x in views.items()}


def _sealed(values: dict[str, Any]) -> bytes:
    """`values` as JSON, with a hash of themselves as `xxh3`."""
    rest = {key: x for key, x in values.items() if key != "xxh3"}
    xxh3 = xxhash.xxh3_128_hexdigest(json.dumps(rest).encode())
    return (json.dumps({**rest, "xxh3": xxh3}, indent=1) + "\n").encode()


def _unsealed(data: bytes) -> dict[str, Any]:
    """The values in a `state.json`. Raises ValueError if a single byte is not as `_sealed` wrote it."""
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ValueError(f"state.json: {_brief(error)}") from None
    if isinstance(values, dict) and not {"format", "xxh3"} & values.keys():
        raise ValueError(f"state.json has no format and no hashes: it is older than {CHECKPOINT}")
    if not isinstance(values, dict) or _sealed(values) != data:
        raise ValueError("state.json is not as it was written: its hash differs")
    if values["format"] != CHECKPOINT:
        raise ValueError(f"its format is {values['format']!r}, not {CHECKPOINT!r}")
    return values


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints (or snapshots) in a folder, oldest first."""
    if not folder.is_dir():
        return []
    whole = [path for path in folder.iterdir() if re.fullmatch(r"nimg-\d{9,}", path.name)]
    return sorted(whole, key=_nimg)


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


def name_of(nimg: int) -> str:
    """Of the folder of a checkpoint or snapshot at so many images."""
    return f"nimg-{nimg:09d}"


def _nimg(path: Path) -> int:
    return int(path.name.removeprefix("nimg-"))


def _delete(folder: Path) -> None:
    """Deletes a whole folder: never a half one under a whole one's name. The next writer deletes what is left."""
    with _names:
        going = folder.rename(folder.with_name(folder.name + ".tmp"))
    shutil.rmtree(going, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_snapshot(
    folder: Path,
    average: Growing,
    discriminator: nn.Module,
    run: Run,
    nimg: int,
    width: int,
    height: int,
    channels: int,
    class_names: list[str],
    score: float | None = None,
    score_name: str = "",
    at_stop: bool = False,
    averages: Mapping[float, dict[str, Tensor]] | None = None,
) -> Path:
    """Writes `folder/nimg-NNNNNNNNN`: the averaged generator, what is needed to build it, and the discriminator, from
    which `--init` can go on. Then `mark_best`.

    Args:
        width, height: of the data set's images.
        score: how good it is by the measure `score_name` (such as "swd"), lower is better; None or not finite: unknown.
        at_stop: it is made because the run is stopped, not because it is time.
        averages: by relative width, parameters of the generator (see `phema`).

    Raises OSError naming the folder; nothing is left of the new one then.
    """
    target = folder / name_of(nimg)
    about = {
        "format": SNAPSHOT,
        "styleloom": importlib.metadata.version("styleloom"),
        "nimg": nimg,
        "width": width,
        "height": height,
        "channels": channels,
        "class_names": class_names,
        "level": average.level,  # how far it has grown
        "alpha": average.alpha,
        "score": score if score is not None and math.isfinite(score) else None,
        "score_name": score_name,
        "at_stop": at_stop,
        "phema": sorted(averages or {}),
        "run": run.model_dump(mode="json"),
    }
    with whole_folder(target) as temporary:
        write_tensors(temporary / "generator.safetensors", average.state_dict())
        write_tensors(temporary / "discriminator.safetensors", discriminator.state_dict())
        for sigma_rel, parameters in (averages or {}).items():
            write_tensors(temporary / f"{phema.name(sigma_rel)}.safetensors", parameters)
        (temporary / "snapshot.json").write_text(json.dumps(about, indent=1) + "\n")
    mark_best(folder)
    return target


def best_snapshot(folder: Path) -> Path | None:
    """The snapshot with the lowest score, of the measure by which the newest scored one was; the older of equals. Of
    networks that grow, only those as large as the newest count."""
    whole = complete(folder)
    scored = [(*score, path) for path in whole if _level(path) == _level(whole[-1]) and (score := _score(path))]
    comparable = [(score, path) for name, score, path in scored if name == scored[-1][0]]
    return min(comparable, key=lambda each: each[0])[1] if comparable else None


def _score(path: Path) -> tuple[str, float] | None:
    """(name, value) of a snapshot's score; None if it has none."""
    try:
        about = json.loads((path / "snapshot.json").read_text())
        return about["score_name"], float(about["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _level(path: Path) -> int | None:
    """How far a snapshot's networks have grown; None if it does not say."""
    try:
        return json.loads((path / "snapshot.json").read_text()).get("level")
    except (OSError, ValueError):
        return None


def mark_best(folder: Path) -> Path | None:
    """Makes the symlink `folder/best` lead to the `best_snapshot`, which it returns. Without symlinks: does nothing."""
    best, link, fresh = best_snapshot(folder), folder / "best", folder / "best.tmp"
    with contextlib.suppress(OSError):  # a disk without symlinks; the scores say the same
        fresh.unlink(missing_ok=True)
        if best:
            fresh.symlink_to(best.name, target_is_directory=True)
            os.replace(fresh, link)
        elif link.is_symlink():
            link.unlink()
    return best


def retain_snapshots(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` snapshots (0: none is deleted) and the best one. Those made because a run was
    stopped do not count, and go once there is a newer one."""
    if not keep:
        return
    best, whole = best_snapshot(folder), complete(folder)
    stopped = [path for path in whole if _at_stop(path)]
    for path in [*stopped, *[path for path in whole if path not in stopped][:-keep]]:
        if path not in (best, whole[-1]):
            _delete(path)


def _at_stop(snapshot: Path) -> bool:
    try:
        return json.loads((snapshot / "snapshot.json").read_text()).get("at_stop", False)
    except (OSError, ValueError):
        return False


def find_snapshot(path: Path) -> Path:
    """A snapshot folder: `path` itself, which may be a link such as `best`, or the newest one of the run in `path`.

    Raises ValueError if there is none.
    """
    path = path.resolve() if path.is_symlink() else path  # who reads goes on with this one if another becomes the best
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
        if about["format"] not in (SNAPSHOT, WHOLE):
            raise ValueError(f"its format is {about['format']!r}, not {SNAPSHOT!r}")
        if about["format"] == WHOLE:
            about |= {"level": start_size(about["width"], about["height"])[2] - 1, "alpha": 1.0}
        about.setdefault("phema", [])
        about["run"] = Run.model_validate(about["run"])
        _require(about, "nimg", "width", "height", "channels", "class_names", "level", "alpha")
        return about
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path / 'snapshot.json'} is not a snapshot that this version reads: {_brief(error)}"
        ) from None


def load_generator(path: Path) -> tuple[Generator, dict[str, Any]]:
    """(averaged generator in eval mode on the CPU, in fp32 whatever it was trained in, snapshot.json) of a folder; as
    far grown as it was then.

    Raises:
        ValueError: a part is missing, or the weights do not fit the description.
    """
    about = read_snapshot(path)
    generator, _ = _networks(about)
    return _loaded(generator, path / "generator.safetensors", about), about


def load_discriminator(path: Path) -> Discriminator | None:
    """The discriminator of a snapshot folder in eval mode on the CPU, in fp32; None if the snapshot has none.

    Raises:
        ValueError: the weights do not fit the description.
    """
    file = path / "discriminator.safetensors"
    if not file.exists():
        return None
    about = read_snapshot(path)
    _, discriminator = _networks(about)
    return _loaded(discriminator, file, about)


def _networks(about: dict[str, Any]) -> tuple[Generator, Discriminator]:
    """What a snapshot's networks are loaded into."""
    sizes = about["width"], about["height"], about["channels"], len(about["class_names"])
    return build(about["run"].model_copy(update={"precision": "fp32", "recompute": False}), *sizes)


def _loaded(network: Any, file: Path, about: dict[str, Any]) -> Any:
    """The network with the weights of the file, as far grown as the snapshot."""
    fill(network, read_tensors(file), file.parent)
    network.grow_to(about["level"], about["alpha"])
    return network.eval().requires_grad_(False)


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
