"""What `prepare` writes down beside the shards, to continue, to recognise its own work, and to report."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .manifest import Shard
from .statistics import Census

REPORT = "report.json"


class Plan(BaseModel):
    """Everything that determines the shards: two equal plans make equal bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int
    height: int
    channels: int
    codec: str
    quality: int | None
    resize: str
    background: str | None
    reduced: list[tuple[int, int]]
    """Width and height of each smaller size that is made in the same pass, the largest first."""
    duplicates: str
    """drop or keep."""
    shard_images: int
    images: int
    """Pictures in the source."""
    source: str
    """The source's digest, in hex."""
    class_names: list[str]


class Unreadable(BaseModel):
    """A picture that was left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Its name in the source."""
    reason: str


class Duplicate(BaseModel):
    """A picture that was left out, as its file is the same, byte for byte, as an earlier one's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Its name in the source."""
    kept: str
    """The earlier one's."""
    labels: tuple[str, str] | None
    """The names of its class and of the other's, where they differ."""


class Look(BaseModel):
    """Two pictures that look alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[str, str]
    """Their names in the source."""
    bits: int
    """In which their hashes differ."""


class LookAlikes(BaseModel):
    """Pictures that may be copies of one another in another size or quality. They are all in the data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    within: int
    """Bits of 64 in which the hashes of two may differ."""
    pairs: int
    """How many there are. Of pictures with the same hash, only the first is paired with others."""
    complete: bool
    """False if there are so many that some may have been missed."""
    first: list[Look]
    """The first thousand."""


class Record(BaseModel):
    """What became of the pictures of one shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: list[Shard]
    """For each size, the largest first. Empty if no picture is left."""
    read: int
    """Pictures of the source that it is made of, with those left out."""
    upscaled: int
    profiles_ignored: int
    labels: dict[int, int]
    """Images of each label."""
    unreadable: list[Unreadable]
    census: Census | None
    likenesses: list[int | None]
    """Of each of the `read` pictures, what similar.py makes of its image; None for those left out, and flat ones."""


class Report(BaseModel):
    """What became of a source: `report.json` in the data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Plan
    read: int
    """Pictures in the source."""
    written: int
    """Images in the shards, of each size."""
    upscaled: int
    """Images made from pictures that were smaller than the (largest) size."""
    profiles_ignored: int
    """Images whose ICC profile was unusable."""
    unreadable: list[Unreadable]
    duplicates: list[Duplicate]
    look_alikes: LookAlikes


_Model = TypeVar("_Model", bound=BaseModel)


def read_record(path: Path, model: type[_Model]) -> _Model:
    """The record in the file `path`. Raises ValueError if it is unreadable."""
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError:
        raise ValueError(f"{path} is unreadable: delete {path.parent} and prepare again") from None


def compare(there: Plan, here: Plan, what: str, dest: Path) -> None:
    """Raises ValueError naming what differs between the two plans."""
    differing = [name for name in Plan.model_fields if getattr(there, name) != getattr(here, name)]
    if not differing:
        return
    named = [f"{name} is {getattr(there, name)} there, {getattr(here, name)} here" for name in differing]
    words = {
        "source": "the pictures or labels of the source changed",
        "class_names": "the classes differ",
        "reduced": f"the smaller sizes are {_sizes(there)} there, {_sizes(here)} here",
    }
    told = "; ".join(words.get(name, text) for name, text in zip(differing, named, strict=True))
    raise ValueError(
        f"{what} of another kind: {told}.\nUse the same source and options, another folder, or delete {dest}."
    )


def _sizes(plan: Plan) -> str:
    return ", ".join(f"{width}x{height}" for width, height in plan.reduced) or "none"
