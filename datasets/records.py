"""What `prepare` writes down beside the shards, to continue, to recognise its own work, and to report."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .manifest import Shard

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


class Record(BaseModel):
    """What became of the pictures of one shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: Shard | None
    """None if all its pictures were unreadable."""
    read: int
    upscaled: int
    profiles_ignored: int
    labels: dict[int, int]
    """Images of each label."""
    unreadable: list[Unreadable]


class Report(BaseModel):
    """What became of a source: `report.json` in the data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: Plan
    read: int
    """Pictures in the source."""
    written: int
    """Images in the shards."""
    upscaled: int
    """Images made from pictures that were smaller than the target."""
    profiles_ignored: int
    """Images whose ICC profile was unusable."""
    unreadable: list[Unreadable]


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
    words = {"source": "the pictures or labels of the source changed", "class_names": "the classes differ"}
    told = "; ".join(words.get(name, text) for name, text in zip(differing, named, strict=True))
    raise ValueError(
        f"{what} of another kind: {told}.\nUse the same source and options, another folder, or delete {dest}."
    )
