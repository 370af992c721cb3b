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

HASHED_BELOW = 2 * 2**30  # bytes of shards that `data.verify` auto re-hashes at the start of a run


class Opened(NamedTuple):
    """A data set to train with."""

    folder: str | os.PathLike[str]
    manifest: Manifest
    reduce: int
    """What its images are still to be divided by."""


def open_data(run: Run, team: Team) -> Opened:
    """The run's data set, its shards checked as `data.verify` says.

    Raises ValueError, the same on every process, if it is missing, half-written, changed, or lacks the labels.
    """
    fault, opened = "", None
    try:
        if not run.data.path:
            raise ValueError("no data set given: --data.path DATASET, a folder made by styleloom prepare")
        opened = Opened(*at_size(run.data.path, read_manifest(run.data.path), run.data.reduce))
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
        check_data(run, team, opened.folder, opened.manifest)
    except (ValueError, OSError) as error:
        fault = str(error)
    faults = [message for message in team.gather([fault]) if message]
    if faults:
        raise ValueError(faults[0])
    assert opened is not None
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
