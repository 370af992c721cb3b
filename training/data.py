"""A run's data set: found, opened, and checked alike on every process."""

import os
from typing import NamedTuple

from ..datasets.batch import make_view
from ..datasets.cache import default_folder
from ..datasets.manifest import Manifest, at_size, check_shard, read_manifest, tar_location
from ..datasets.storage import is_remote
from ..datasets.stream import check_decodes_on_device, checked_cache
from ..datasets.verify import hash_faults
from .config import Run
from .distributed import Team
from .networks.growing import start_size
from .schedule import first_level

HASHED_BELOW = 2 * 2**30  # bytes of shards that `data.verify` auto re-hashes at the start of a run


class Opened(NamedTuple):
    """A data set to train with."""

    folder: str | os.PathLike[str]
    manifest: Manifest
    reduce: int
    """What its images are still to be divided by."""


def open_data(run: Run, team: Team) -> list[Opened]:
    """The run's data set at each size that it is trained at, the largest first and each half the one before.

    Its shards are checked as `data.verify` says. Raises ValueError, the same on every process, if it is missing,
    half-written, changed, or lacks the labels.
    """
    fault, opened = "", []
    try:
        if not run.data.path:
            raise ValueError("no data set given: --data.path DATASET, a folder made by styleloom prepare")
        manifest = read_manifest(run.data.path)
        opened = [_open(run, team, manifest, run.data.reduce << halvings) for halvings in range(_sizes(run, manifest))]
        for folder, its in {os.fspath(each.folder): each.manifest for each in opened}.items():
            check_data(run, team, folder, its)
    except (ValueError, OSError) as error:
        fault = str(error)
    faults = [message for message in team.gather([fault]) if message]
    if faults:
        raise ValueError(faults[0])
    return opened


def _sizes(run: Run, manifest: Manifest) -> int:
    """How many sizes a run trains at. Raises ValueError if the networks cannot have the images' size."""
    make_view(manifest, run.data.reduce)
    *_, levels = start_size(manifest.width // run.data.reduce, manifest.height // run.data.reduce)
    return levels - first_level(run, levels)


def _open(run: Run, team: Team, manifest: Manifest, reduce: int) -> Opened:
    """The data set at 1/reduce of its size. Raises ValueError if the run cannot use it so."""
    opened = Opened(*at_size(run.data.path, manifest, reduce))
    if run.data.labels and not opened.manifest.classes:
        raise ValueError(
            f"data.labels asks for a class-conditional run, but {run.data.path} has no labels: "
            "prepare it with --labels, or leave data.labels out"
        )
    make_view(opened.manifest, opened.reduce)
    if run.data.decoder == "gpu":
        if team.device.type != "cuda":
            raise ValueError("data.decoder gpu needs a CUDA device: leave it out")
        check_decodes_on_device(opened.manifest, opened.reduce)
    checked_cache(opened.folder, opened.manifest, run.data.window, cache_of(run))
    return opened


def cache_of(run: Run) -> tuple[str, int]:
    """(folder, bytes) for copies of remote shards."""
    return run.data.cache or str(default_folder()), int(run.data.cache_gb * 1e9)


def check_data(run: Run, team: Team, folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Checks local shards as `data.verify` says; remote ones are checked as they come. Raises ValueError."""
    if run.data.verify == "none" or is_remote(folder) or is_remote(manifest.root):
        return
    for shard in manifest.shards:
        check_shard(folder, shard, tar_location(folder, manifest, shard))
    hashed = run.data.verify == "hash" or (run.data.verify == "auto" and manifest.bytes < HASHED_BELOW)
    if hashed:
        mine = manifest.model_copy(update={"shards": manifest.shards[team.rank :: team.world]})
        faults = hash_faults(folder, mine)
        if faults:
            raise ValueError(
                f"{folder}/{faults[0].file}: {faults[0].what}. `styleloom inspect {folder} --verify` "
                "lists all faults; prepare the data set again."
            )
